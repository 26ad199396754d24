"""Every private name of torch that the toolkit uses.

A new version of torch may drop or move a private name. Each one is therefore looked up here, when
it is first used, so that a missing name costs the feature that needs it and nothing else:

* ``torch_private.NAME`` raises an error that says what cannot be done;
* ``torch_private.optional("NAME")`` warns once of what is lost, and returns None.

Example:
    >>> from vi_toolkit import torch_private
    >>> torch_private.tree_map(lambda n: 2 * n, {"a": 1, "b": (2, 3)})
    {'a': 2, 'b': (4, 6)}
"""

from __future__ import annotations

import importlib
import logging
import warnings
from typing import Any

import torch

from vi_toolkit.errors import CompileError, VIError

_COMPILING = "which compiling needs"

# name -> (module, attribute in it or "" for the module itself, what is lost without it)
_NAMES: dict[str, tuple[str, str, str]] = {
    # Recording a step
    "make_fx": ("torch.fx.experimental.proxy_tensor", "make_fx", _COMPILING),
    "TorchDispatchMode": ("torch.utils._python_dispatch", "TorchDispatchMode", _COMPILING),
    "disable_modes": ("torch.utils._python_dispatch", "_disable_current_modes", _COMPILING),
    "OpOverload": ("torch._ops", "OpOverload", _COMPILING),
    "check_errors": ("torch", "ops.aten._linalg_check_errors.default", _COMPILING),
    "local_scalar": ("torch", "ops.aten._local_scalar_dense.default", _COMPILING),
    "to_copy": ("torch", "ops.aten._to_copy.default", _COMPILING),
    "unsafe_view": ("torch", "ops.aten._unsafe_view.default", _COMPILING),
    "graph_sources": (
        "torch.fx.graph_module",
        "_loader.eval_cache",
        "so that each compiled fit leaves some 200 KB of memory behind",
    ),
    # Compiling it
    "TracingContext": ("torch._guards", "TracingContext", _COMPILING),
    "tracing": ("torch._guards", "tracing", _COMPILING),
    "FakeTensorMode": ("torch._subclasses", "FakeTensorMode", _COMPILING),
    "ShapeEnv": ("torch.fx.experimental.symbolic_shapes", "ShapeEnv", _COMPILING),
    "compile_fx_aot": ("torch._inductor.compile_fx", "compile_fx_aot", _COMPILING),
    "inductor_config": ("torch._inductor.config", "", _COMPILING),
    "CppBuilder": ("torch._inductor.cpp_builder", "CppBuilder", _COMPILING),
    "CppTorchDeviceOptions": (
        "torch._inductor.cpp_builder",
        "CppTorchDeviceOptions",
        _COMPILING,
    ),
    "cpu_vec_isa": ("torch._inductor.cpu_vec_isa", "", _COMPILING),
    # Running it
    "load_library": ("torch", "_C._aoti.AOTIModelContainerRunnerCpu", _COMPILING),
    "foreach_copy_": ("torch", "_foreach_copy_", _COMPILING),
    "foreach_add_": ("torch", "_foreach_add_", _COMPILING),
    # Noise
    "standard_gamma": (
        "torch",
        "_standard_gamma",
        "so that the base noise of a guide cannot be held fixed",
    ),
    "sample_dirichlet": (
        "torch",
        "_sample_dirichlet",
        "so that Beta and Dirichlet sites are drawn one draw at a time, which is slow",
    ),
    "dirichlet_grad": (
        "torch",
        "_dirichlet_grad",
        "so that Beta and Dirichlet sites are drawn one draw at a time, which is slow",
    ),
    # Many draws at once
    "tree_map": (
        "torch.utils._pytree",
        "tree_map",
        "so that a model cannot be evaluated at several draws",
    ),
    "is_all_true": (
        "torch",
        "_is_all_true",
        "so that models whose distributions check their values are evaluated one draw at a time, "
        "which is slow",
    ),
}


def __getattr__(name: str) -> Any:
    """Look up one of the names above, and keep it as an attribute of this module."""
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute, lost = _NAMES[name]
    found: Any
    try:
        with warnings.catch_warnings():  # torch's imports warn of deprecations in torch
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            found = importlib.import_module(module)
        for part in filter(None, attribute.split(".")):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise _gone(f"{module}.{attribute}".rstrip("."), lost) from error
    globals()[name] = found
    return found


def optional(name: str) -> Any:
    """The private name, or None if this version of torch does not have it.

    The first time that a name is missing, a warning says what is lost.
    """
    if name in globals():
        return globals()[name]
    try:
        return __getattr__(name)
    except VIError as error:
        warnings.warn(str(error), stacklevel=3)
        globals()[name] = None
        return None


def version(tensor: torch.Tensor) -> int:
    """Number of times that a tensor has been changed in place."""
    try:
        return tensor._version
    except AttributeError as error:
        raise _gone("torch.Tensor._version", _COMPILING) from error


def storage_id(tensor: torch.Tensor) -> int:
    """Identifies a tensor's memory for as long as the tensor lives."""
    try:
        return tensor.untyped_storage()._cdata
    except AttributeError as error:
        raise _gone("torch.UntypedStorage._cdata", _COMPILING) from error


def schema(operator: Any) -> Any:
    """An operator's signature: its arguments, and which of them it changes in place."""
    try:
        return operator._schema
    except AttributeError as error:
        raise _gone("OpOverload._schema", _COMPILING) from error


def compiler_log() -> logging.Logger:
    """The logger of torch's compiler."""
    return logging.getLogger("torch._inductor")


def _gone(path: str, lost: str) -> VIError:
    kind = CompileError if lost is _COMPILING else VIError
    return kind(f"torch {torch.__version__} has no {path}, {lost}")
