"""From a traced step to machine code: a loop of K optimiser steps per call.

The traced step, the optimiser's update, the running sum of the iterates and the ELBO's history
become the body of a ``while_loop``. Inductor compiles the loop ahead of time (AOTInductor) into
one shared library that is called with tensors only: no guards, no Python between steps. Libraries
are kept in a folder, where the next process finds them.
"""

from __future__ import annotations

import contextlib
import functools
import getpass
import hashlib
import linecache
import logging
import operator
import os
import platform
import re
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from vi_toolkit.compiled.build import build, entry, find
from vi_toolkit.errors import CompileError
from vi_toolkit.programs.isolation import kept_random_state

Tensors = list[torch.Tensor]

FORMAT = "9"  # of the folders in the cache and of the loop around a body
_MOST_LOADED = 64
_TRUSTED = (0,)  # root
_loaded: OrderedDict[str, Callable[[Tensors], Tensors]] = OrderedDict()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Deprecations inside torch and notes of its compiler are not the user's business; the model's
    own warnings came when it ran eagerly."""
    compiler = logging.getLogger("torch._inductor")
    level = compiler.level
    compiler.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        compiler.setLevel(level)


@contextlib.contextmanager
def forgetting_sources() -> Iterator[None]:
    """torch.fx keeps the text of every graph for ever, in case a traceback wants to show it: some
    200 KB for a fit. Here that of the graphs made within is given back at the end."""
    loader = getattr(torch.fx.graph_module, "_loader", None)
    texts: dict[str, str] = getattr(loader, "eval_cache", {})
    before = set(texts)
    try:
        yield
    finally:
        for name in set(texts) - before:
            texts.pop(name, None)
            linecache.cache.pop(name, None)


def functional(body: Callable[..., Any], example: Sequence[torch.Tensor]) -> torch.fx.GraphModule:
    """Trace a function of tensors once more, without in-place operations."""
    try:
        with quiet(), kept_random_state():
            graph = make_fx(torch.func.functionalize(body, remove="mutations"))(*example)
    except Exception as error:
        text = str(error).split("\n")[0][:200]
        raise CompileError(f"it cannot be traced ({type(error).__name__}: {text})") from error
    graph.graph.eliminate_dead_code()
    return graph


def compile_loop(
    body: torch.fx.GraphModule,
    carried: Sequence[torch.Tensor],
    fixed: Sequence[torch.Tensor],
    checked: bool,
) -> Callable[[Tensors], Tensors]:
    """Compile ``while i < n: i, *carried = body(i, *carried, n, *fixed)``.

    The first of ``fixed`` is n. The same loop is compiled once per process and its library is kept
    in inductor's cache folder, where the next process finds it. ``checked``: whether the loop looks
    at every index before it uses it.

    Returns:
        Function of [*carried, *fixed] that returns [i, *carried], and may write into the carried
        tensors that it is given.

    Raises:
        CompileError: there is no working C++ compiler, or inductor cannot compile the loop.
    """
    inputs = [*carried, *fixed]
    key = _key(f"loop {len(carried)} {checked}", body, inputs)
    options = {"assert_indirect_indexing": checked}
    return _program(key, lambda: _loop(body, len(carried), len(inputs)), inputs, options)


def compile_graph(
    graph: torch.fx.GraphModule, inputs: Sequence[torch.Tensor]
) -> Callable[[Tensors], Tensors]:
    """Compile a graph as it is, to be called with a list of tensors like ``inputs``.

    Raises:
        CompileError: there is no working C++ compiler, or inductor cannot compile it.
    """
    return _program(_key("once", graph, inputs), lambda: graph, inputs, {})


def _program(
    key: str,
    graph: Callable[[], torch.fx.GraphModule],
    inputs: Sequence[torch.Tensor],
    options: Mapping[str, Any],
) -> Callable[[Tensors], Tensors]:
    """The machine code of that name: loaded, found on disk or made."""
    if key not in _loaded:
        try:
            folder = _folder() / key
            if find(folder) is None:
                with quiet():
                    build(graph(), inputs, folder, options)
            runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(find(folder)), 1)
        except (KeyboardInterrupt, CompileError):
            raise
        except Exception as error:
            raise CompileError(compile_reason(error)) from error
        _loaded[key] = runner.run
        if len(_loaded) > _MOST_LOADED:
            _loaded.popitem(last=False)
    _loaded.move_to_end(key)
    return _loaded[key]


def _key(kind: str, body: torch.fx.GraphModule, inputs: Sequence[torch.Tensor]) -> str:
    """Everything that the machine code depends on: the same key means the same program."""
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
    """Inside inductor's cache folder, found without importing inductor (which takes a while)."""
    given = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if given:
        return Path(given) / "vi_toolkit"
    user = re.sub(r"[^\w.-]", "_", getpass.getuser())
    return Path(tempfile.gettempdir()) / f"torchinductor_{user}" / "vi_toolkit"


def check_folder() -> None:
    """Make the cache folder, before torch's own imports look for it.

    Raises:
        CompileError: it cannot be made, or is another user's, whose machine code we do not load.
    """
    folder = _folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CompileError(compile_reason(error)) from error
    if hasattr(os, "getuid") and folder.stat().st_uid not in (*_TRUSTED, os.getuid()):
        raise CompileError(
            f"the cache folder {folder} belongs to another user; TORCHINDUCTOR_CACHE_DIR names "
            "another"
        )


def _loop(body: torch.fx.GraphModule, carried: int, inputs: int) -> torch.fx.GraphModule:
    # Written by hand, as one comparison needs no tracing.
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


def compile_reason(error: Exception) -> str:
    """Why something could not be compiled, in a sentence."""
    name, text = type(error).__name__, str(error)
    if "InvalidCxxCompiler" in name + text or "No working C++ compiler" in text:
        return "there is no working C++ compiler (set CXX to one)"
    if "CppCompileError" in name + text:
        return f"the C++ compiler failed ({text.strip().splitlines()[-1][:200]})"
    if isinstance(error, OSError):
        return f"the cache folder cannot be used ({text}); TORCHINDUCTOR_CACHE_DIR names another"
    return f"inductor cannot compile it ({name}: {(text.strip().splitlines() or [''])[0][:200]})"
