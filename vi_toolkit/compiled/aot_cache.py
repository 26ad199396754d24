"""Machine code for graphs: loaded, found on disk or built.

The loop around a step is compiled ahead of time (AOTInductor) into a shared library that is called
with tensors only, without guards and without Python between steps. Libraries are kept in a folder,
where the next process finds them.
"""

from __future__ import annotations

import contextlib
import functools
import getpass
import hashlib
import operator
import os
import platform
import re
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vi_toolkit import torch_private
from vi_toolkit.compiled.build import build, entry, find, no_compiler
from vi_toolkit.compiled.quiet import quiet
from vi_toolkit.errors import CompileError

Tensors = list[torch.Tensor]

FORMAT = "9"  # of the folders in the cache and of the loop around a body
_MOST_LOADED = 64
_TRUSTED = (0,)  # root
_loaded: OrderedDict[str, Callable[[Tensors], Tensors]] = OrderedDict()


def compile_loop(
    body: torch.fx.GraphModule,
    carried: Sequence[torch.Tensor],
    fixed: Sequence[torch.Tensor],
    checked: bool,
) -> Callable[[Tensors], Tensors]:
    """Compile ``while i < n: i, *carried = body(i, *carried, n, *fixed)``, starting at ``i = 0``.

    Args:
        body: the graph of the loop's body.
        carried: examples of the tensors that change from iteration to iteration.
        fixed: examples of those that do not; the first is n.
        checked: whether the loop tests that every index is in range before it uses it.

    Returns:
        Function of [*carried, *fixed] that returns [i, *carried]. It may overwrite the carried
        tensors that it is given.

    Raises:
        CompileError: there is no working C++ compiler, or inductor cannot compile the loop.
    """
    inputs = [*carried, *fixed]
    key = _key(f"loop {len(carried)} {checked}", body, inputs)
    options = {"assert_indirect_indexing": checked}
    return _machine_code(key, lambda: _loop(body, len(carried), len(inputs)), inputs, options)


def compile_graph(
    graph: torch.fx.GraphModule, inputs: Sequence[torch.Tensor]
) -> Callable[[Tensors], Tensors]:
    """Compile a graph into a function of a list of tensors like ``inputs``.

    Raises:
        CompileError: there is no working C++ compiler, or inductor cannot compile the graph.
    """
    return _machine_code(_key("once", graph, inputs), lambda: graph, inputs, {})


def check_folder() -> None:
    """Make the cache folder.

    This must happen before inductor is imported, which looks for a cache folder as well.

    Raises:
        CompileError: the folder cannot be made, or belongs to another user, whose machine code we
            do not load.
    """
    folder = _folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CompileError(compile_reason(error)) from error
    if hasattr(os, "getuid") and folder.stat().st_uid not in (*_TRUSTED, os.getuid()):
        raise CompileError(
            f"the cache folder {folder} belongs to another user (set TORCHINDUCTOR_CACHE_DIR to "
            "one of your own)"
        )


def compile_reason(error: Exception) -> str:
    """Why compiling failed, as a clause."""
    name, text = type(error).__name__, str(error)
    if no_compiler(error):
        return "there is no working C++ compiler (set CXX to one)"
    if "CppCompileError" in name + text:
        return f"the C++ compiler failed ({text.strip().splitlines()[-1][:200]})"
    if isinstance(error, OSError):
        return f"the cache folder cannot be used ({text}); set TORCHINDUCTOR_CACHE_DIR to another"
    return f"inductor cannot compile it ({name}: {(text.strip().splitlines() or [''])[0][:200]})"


def _machine_code(
    key: str,
    graph: Callable[[], torch.fx.GraphModule],
    inputs: Sequence[torch.Tensor],
    options: Mapping[str, Any],
) -> Callable[[Tensors], Tensors]:
    """The machine code with this key."""
    if key not in _loaded:
        try:
            folder = _folder() / key
            with quiet():
                if find(folder) is None:
                    build(graph(), inputs, folder, options)
                library = find(folder)
                if library is None:
                    raise CompileError(f"no library was made in {folder}")
                loaded = torch_private.load_library(str(library), 1)
        except CompileError:
            raise
        except Exception as error:
            raise CompileError(compile_reason(error)) from error
        _loaded[key] = loaded.run
        if len(_loaded) > _MOST_LOADED:
            _loaded.popitem(last=False)
    _loaded.move_to_end(key)
    return _loaded[key]


def _key(kind: str, body: torch.fx.GraphModule, inputs: Sequence[torch.Tensor]) -> str:
    """Digest of everything that the machine code depends on."""
    text = "\n".join(
        [
            FORMAT,
            torch.__version__,
            _machine(),
            str(torch.get_num_threads()),
            kind,
            entry(),
            body.code,
            *(f"{t.dtype} {tuple(t.shape)} {t.stride()} {t.device}" for t in inputs),
        ]
    )
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def _machine() -> str:
    """What the compiled instructions rely on."""
    parts = [platform.machine(), platform.system(), torch.backends.cpu.get_cpu_capability()]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        parts += [line for line in lines if line.startswith("flags")][:1]
    return " ".join(parts)


def _folder() -> Path:
    """Our part of inductor's cache folder. (Importing inductor to ask for it takes seconds.)"""
    given = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if given:
        return Path(given) / "vi_toolkit"
    user = re.sub(r"[^\w.-]", "_", getpass.getuser())
    return Path(tempfile.gettempdir()) / f"torchinductor_{user}" / "vi_toolkit"


def _loop(body: torch.fx.GraphModule, carried: int, inputs: int) -> torch.fx.GraphModule:
    """The graph of a ``while`` loop around a body, written by hand because tracing is slower."""
    test = torch.fx.Graph()
    nodes = [test.placeholder(f"arg{k}") for k in range(inputs + 1)]
    test.output(test.call_function(torch.ops.aten.lt.Tensor, (nodes[0], nodes[1 + carried])))
    outer = torch.fx.Graph()
    given = [outer.placeholder(f"input_{k}") for k in range(inputs)]
    start = outer.call_function(torch.ops.aten.full.default, ([], 0), {"dtype": torch.int64})
    root = torch.nn.Module()
    root.test = torch.fx.GraphModule({}, test)
    root.body = torch.fx.GraphModule({}, body.graph)
    loop = outer.call_function(
        torch.ops.higher_order.while_loop,
        (
            outer.get_attr("test"),
            outer.get_attr("body"),
            (start, *given[:carried]),
            tuple(given[carried:]),
        ),
    )
    outer.output(
        tuple(outer.call_function(operator.getitem, (loop, k)) for k in range(carried + 1))
    )
    return torch.fx.GraphModule(root, outer)
