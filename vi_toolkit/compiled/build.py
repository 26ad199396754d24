"""Builds a shared library for a graph: inductor writes C++, the system's compiler translates it.

A user waits for the first compilation, and most of it would be spent on code around the graph
rather than on the graph. So there is a quick way and inductor's own way. In the quick way inductor
writes the C++ only. The code that it puts around the graph's, to load and call it, is replaced by
the few functions that are needed (``entry.h``). Memory is allocated before the loop
(:mod:`~vi_toolkit.compiled.allocation`), and no test programs are built to find out which vector
instructions the compiler knows. If the quick way fails for any reason, as it may with another
version of torch or another compiler, inductor builds the library its own way.
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

from vi_toolkit import torch_private
from vi_toolkit.compiled.allocation import allocate_once
from vi_toolkit.compiled.interrupts import interrupt_kept

# Elements per thread from which a loop is shared among threads: waking a thread takes as long as
# several thousand operations.
LEAST_SHARE = 2**14
_patching = threading.Lock()


def build(
    graph: torch.fx.GraphModule,
    inputs: Sequence[torch.Tensor],
    folder: Path,
    options: Mapping[str, Any],
) -> None:
    """Make ``folder``, complete with the library, or leave it as it is.

    Args:
        graph: a function of tensors like ``inputs``.
        inputs: examples of its inputs.
        folder: where :func:`find` will find the library.
        options: further settings of inductor.

    Raises:
        KeyboardInterrupt: the build was interrupted.
        Exception: whatever torch raises if there is no C++ compiler, or inductor fails.
    """
    scratch = Path(tempfile.mkdtemp(prefix="partial-", dir=folder.parent))
    try:
        kept = scratch / "kept"
        try:
            with interrupt_kept():
                kept.mkdir()
                with trusting_the_processor():
                    _write(graph, inputs, scratch, _ONLY_CPP, {**options, "size_asserts": False})
                    _translate(graph, scratch)
                # Loading shows whether torch finds the functions that it needs.
                torch_private.load_library(str(_keep(scratch, kept)), 1)
        except Exception as error:
            if no_compiler(error):
                raise
            for path in scratch.iterdir():
                _remove(path)
            with interrupt_kept():
                kept.mkdir()
                _write(graph, inputs, scratch, {}, options)
                _keep(scratch, kept)
        if find(folder) is None:  # the folder may exist and be incomplete
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # another process was faster and made the same library
            os.rename(kept, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def find(folder: Path) -> Path | None:
    """The library in a folder; None if it is missing or incomplete.

    A library that calls operators without a C++ binding has another name, because torch looks for
    their description next to it, under the same name.
    """
    alone, described = folder / "step.so", folder / "operators.so"
    if alone.exists():
        return alone
    return described if described.exists() and described.with_suffix(".json").exists() else None


def no_compiler(error: Exception) -> bool:
    """Whether an error of inductor means that there is no working C++ compiler."""
    text = f"{type(error).__name__} {error}"
    return "InvalidCxxCompiler" in text or "No working C++ compiler" in text


def without_its_container(source: str, outputs: int) -> str:
    """C++ that inductor wrote, with ``entry.h`` in place of the code that loads and calls it.

    Args:
        source: the C++ of a graph and of the kernels that it calls.
        outputs: number of tensors that it returns.

    Raises:
        ValueError: inductor has written it in a form that is not known here.
    """
    _, _, rest = source.partition('\n} // extern "C"\n')
    declarations, found, rest = rest.partition("AOTInductorModel::AOTInductorModel(")
    _, signature, body = rest.partition("void AOTInductorModel::run_impl(")
    if not (declarations and found and body):
        raise ValueError("inductor writes its C++ in another form")
    body = body.replace("__check_inputs_outputs(input_handles, output_handles);", "", 1)
    return f"#define NUMBER_OF_OUTPUTS {outputs}\n{entry()}{declarations}{signature}{body}"


@functools.cache
def entry() -> str:
    """The text of ``entry.h``."""
    return Path(__file__).with_name("entry.h").read_text()


# ------------------------------------------------------------- the two ways

_NO_DEBUGGER = {
    "aot_inductor.enable_line_tables": False,
    "aot_inductor.enable_frame_pointer": False,
}
_ONLY_CPP = {"aot_inductor.package": True, "aot_inductor.package_cpp_only": True}
_FASTER = {
    "compile_threads": 1,  # no pool of worker processes for one file
    "cpp.min_chunk_size": LEAST_SHARE,
    "aot_inductor.precompile_headers": False,  # 290 MB on disk, and seconds to make
}


def _write(
    graph: torch.fx.GraphModule,
    inputs: Sequence[torch.Tensor],
    scratch: Path,
    needed: Mapping[str, Any],
    options: Mapping[str, Any],
) -> None:
    """Let inductor write into a folder: C++ and a library, or C++ only.

    Args:
        needed: settings that say what to write; an error if this version does not have them.
        options: settings that make the result faster, left out if this version does not have them.
    """
    fake_tensors = torch_private.FakeTensorMode(
        shape_env=torch_private.ShapeEnv(), allow_non_fake_inputs=True
    )
    settings = {
        **_known({**_FASTER, **options}),
        **needed,
        "fallback_random": True,  # torch's generator, so that the draws are those of eager steps
        "aot_inductor.output_path": str(scratch / "step.so"),
    }
    context = torch_private.TracingContext(fake_tensors)
    with torch_private.tracing(context), torch.no_grad():
        fake = [fake_tensors.from_tensor(t.detach(), static_shapes=True) for t in inputs]
        torch_private.compile_fx_aot(graph, fake, config_patches=settings)


def _known(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that this version of inductor has."""
    known = {}
    for name, value in settings.items():
        with (
            contextlib.suppress(AttributeError, KeyError),
            torch_private.inductor_config.patch({name: value}),
        ):
            known[name] = value
    return known


def _translate(graph: torch.fx.GraphModule, scratch: Path) -> None:
    """Compile the C++ in ``scratch`` into ``step.so``."""
    (written,) = scratch.glob("*.wrapper.cpp")
    (result,) = (node for node in graph.graph.nodes if node.op == "output")
    source = without_its_container(written.read_text(), len(result.args[0]))
    (scratch / "step.cpp").write_text(allocate_once(source))
    vectors = torch_private.cpu_vec_isa.pick_vec_isa()
    with torch_private.inductor_config.patch(_known(_NO_DEBUGGER)):
        settings = torch_private.CppTorchDeviceOptions(
            vec_isa=vectors, device_type="cpu", aot_mode=True
        )
    torch_private.CppBuilder("step", str(scratch / "step.cpp"), settings, str(scratch)).build()


def _keep(scratch: Path, kept: Path) -> Path:
    """Move the library, and the description of its operators, to the folder that stays."""
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
    """Let inductor use the vector instructions of the processor without testing the compiler.

    Inductor would build a test program for each kind of instructions.
    """
    isa = torch_private.cpu_vec_isa

    def trusted(kind: type) -> Any:
        return type(kind.__name__, (kind,), {"__bool__": lambda _: True})()

    has = isa.x86_isa_checker()
    kinds = (("avx512", isa.VecAVX512), ("avx2", isa.VecAVX2))
    found = [trusted(kind) for name, kind in kinds if name in has]
    if not found:  # other processors have one kind of instructions, so there is only one test
        yield
        return
    with _patching, mock.patch.object(isa, "valid_vec_isa_list", return_value=found):
        yield
