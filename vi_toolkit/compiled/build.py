"""From a graph to a shared library: inductor writes C++, the system's compiler translates it.

The first compilation is what a user waits for, and most of it would be the compiler's work on what
surrounds a program rather than on the program. So inductor is asked for the C++ only; what it puts
around the program to load and call it is replaced by the few functions needed
(``entry.h``), and memory is allocated before the loop
(:mod:`~vi_toolkit.compiled.allocation`). Nor is a test program built for each kind of vector
instructions that the processor has. Where any of this fails, as with a compiler or a version of
torch that differ, inductor compiles everything its own way.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from vi_toolkit.compiled.allocation import allocate_once

# Elements per thread from which a loop is shared among threads: waking one takes as long as
# several thousand operations.
LEAST_SHARE = 2**14
_patching = threading.Lock()


def build(
    graph: torch.fx.GraphModule,
    inputs: Sequence[torch.Tensor],
    folder: Path,
    options: Mapping[str, Any],
) -> None:
    """Make ``folder``, where :func:`find` finds the library, complete or not at all.

    Args:
        graph: a function of tensors like ``inputs``.
        options: further settings of inductor.
    """
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    scratch = Path(tempfile.mkdtemp(prefix="partial-", dir=folder.parent))
    try:
        kept = scratch / "kept"
        kept.mkdir()
        with trusting_the_processor():
            _write(graph, inputs, scratch, {**options, **_ONLY_CPP})
            try:
                _translate(graph, scratch)
                torch._C._aoti.AOTIModelContainerRunnerCpu(str(_keep(scratch, kept)), 1)
                quickly = True
            except InvalidCxxCompiler:
                raise
            except (CppCompileError, RuntimeError, ValueError):
                quickly = False
        if not quickly:
            for path in scratch.iterdir():
                _remove(path)
            kept.mkdir()
            _write(graph, inputs, scratch, options)
            _keep(scratch, kept)
        if find(folder) is None:  # what is left of one, perhaps
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # another process was first: its library is the same
            os.rename(kept, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def find(folder: Path) -> Path | None:
    """The library in a folder; None if it is not there, or not all of it.

    One that calls operators without a C++ binding has another name, by which torch looks for their
    description beside it.
    """
    alone, described = folder / "step.so", folder / "operators.so"
    if alone.exists():
        return alone
    return described if described.exists() and described.with_suffix(".json").exists() else None


def without_its_container(source: str, outputs: int) -> str:
    """C++ that inductor wrote for ahead-of-time use, with ``entry.h`` in place of what it puts
    around the program.

    Args:
        source: the program, with the kernels that it calls.
        outputs: number of tensors that it returns.

    Raises:
        ValueError: it has not the form that inductor's C++ had when this was written.
    """
    _, _, rest = source.partition('\n} // extern "C"\n')
    declarations, found, rest = rest.partition("AOTInductorModel::AOTInductorModel(")
    _, run, program = rest.partition("void AOTInductorModel::run_impl(")
    if not (declarations and found and program):
        raise ValueError("inductor writes its C++ in another form")
    program = program.replace("__check_inputs_outputs(input_handles, output_handles);", "", 1)
    return f"#define NUMBER_OF_OUTPUTS {outputs}\n{entry()}{declarations}{run}{program}"


@functools.cache
def entry() -> str:
    """The text of ``entry.h``."""
    return Path(__file__).with_name("entry.h").read_text()


# ------------------------------------------------------------- one way and the other

_FOR_NO_DEBUGGER = {
    "aot_inductor.enable_line_tables": False,
    "aot_inductor.enable_frame_pointer": False,
}
_ONLY_CPP = {
    "aot_inductor.package": True,
    "aot_inductor.package_cpp_only": True,
    "size_asserts": False,  # each program is called with tensors of the shapes it was made for
}


def _write(
    graph: torch.fx.GraphModule,
    inputs: Sequence[torch.Tensor],
    scratch: Path,
    options: Mapping[str, Any],
) -> None:
    """Have inductor write what ``options`` ask for into a folder: C++, or a library as well."""
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx_aot
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    settings = {
        "fallback_random": True,  # torch's own generator: the same draws as eagerly
        "compile_threads": 1,  # no pool of worker processes for one file
        "cpp.min_chunk_size": LEAST_SHARE,
        "aot_inductor.precompile_headers": False,  # 290 MB on disk, and seconds to make
        "aot_inductor.output_path": str(scratch / "step.so"),
        **options,
    }
    with tracing(TracingContext(mode)), torch.no_grad():
        fake: list[Any] = [mode.from_tensor(t.detach(), static_shapes=True) for t in inputs]
        compile_fx_aot(graph, fake, config_patches=settings)


def _translate(graph: torch.fx.GraphModule, scratch: Path) -> None:
    """Compile the C++ in ``scratch`` into ``step.so``."""
    from torch._inductor import config
    from torch._inductor.cpp_builder import CppBuilder, CppTorchDeviceOptions
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    (written,) = scratch.glob("*.wrapper.cpp")
    (result,) = (node for node in graph.graph.nodes if node.op == "output")
    source = without_its_container(written.read_text(), len(result.args[0]))
    (scratch / "step.cpp").write_text(allocate_once(source))
    with config.patch(_FOR_NO_DEBUGGER):
        settings = CppTorchDeviceOptions(vec_isa=pick_vec_isa(), device_type="cpu", aot_mode=True)
    CppBuilder("step", str(scratch / "step.cpp"), settings, str(scratch)).build()


def _keep(scratch: Path, kept: Path) -> Path:
    """Move the library, and what describes its operators, to where they stay."""
    described = list(scratch.glob("*.wrapper.json"))
    library = kept / ("operators.so" if described else "step.so")
    os.rename(scratch / "step.so", library)
    for description in described:
        os.rename(description, library.with_suffix(".json"))
    return library


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextlib.contextmanager
def trusting_the_processor() -> Iterator[None]:
    """Within, inductor writes for the vector instructions that the processor has, without building
    a test program for each kind to see whether the compiler knows them."""
    from torch._inductor import cpu_vec_isa as isa

    def trusted(kind: type) -> Any:
        return type(kind.__name__, (kind,), {"__bool__": lambda _: True})()

    has = isa.x86_isa_checker()
    kinds = (("avx512", isa.VecAVX512), ("avx2", isa.VecAVX2))
    found = [trusted(kind) for name, kind in kinds if name in has]
    if not found:  # another kind of processor, for which there is but one test
        yield
        return
    with _patching, mock.patch.object(isa, "valid_vec_isa_list", return_value=found):
        yield
