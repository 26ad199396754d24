"""Finds out what a model or guide does besides computing with tensors.

A compiled step contains no Python. If the model counts its calls, prints, or reads a clock or a
global that somebody changes, the compiled step would silently go on as it was recorded. So the
calls of one ordinary step are searched for side effects (:func:`effects`). The Python values that
model, guide and the functions they call can see are compared before and after the step, and again
later (:class:`PythonSnapshot`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import random
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

_LIBRARIES = {"torch", "pyro", "numpy", "scipy", "pandas", "vi_toolkit", "opt_einsum"}
_EFFECTS = {"print", "input", "open"}
_EFFECT_MODULES = {"logging", "secrets"}
_MOST_VALUES = 5_000


def _library(name: str | None) -> bool:
    root = (name or "").split(".")[0]
    return root in _LIBRARIES or (root in sys.stdlib_module_names and root != "__main__")


@contextlib.contextmanager
def effects() -> Iterator[list[str]]:
    """Collect the calls with side effects that code outside libraries makes in this thread.

    Example:
        >>> with effects() as found:
        ...     torch.ones(2).sum(), random.random()  # doctest: +ELLIPSIS
        (...)
        >>> found
        ['random.random']
    """
    found: list[str] = []

    def note(frame: types.FrameType, event: str, arg: Any) -> None:
        if event == "c_call":
            if _library(frame.f_globals.get("__name__")):
                return
            owner = getattr(arg, "__self__", None)
            module = getattr(arg, "__module__", None) or type(owner).__module__
            if arg.__name__ in _EFFECTS and module in ("builtins", "_io"):
                found.append(arg.__name__)
            elif (module or "").split(".")[0] in ("time", "_datetime"):
                found.append(f"{module.lstrip('_')}.{arg.__name__}")
            elif arg.__name__ == "write" and module == "_io":
                found.append("write")
        elif event == "call":
            name = frame.f_globals.get("__name__")
            caller = frame.f_back
            if (
                name in _EFFECT_MODULES
                and caller is not None
                and not _library(caller.f_globals.get("__name__"))
            ):
                found.append(f"{name}.{frame.f_code.co_name}")

    before: Any = sys.getprofile()
    states = random.getstate(), _numpy_state()
    sys.setprofile(note)
    try:
        yield found
    finally:
        if before is None or callable(before):
            sys.setprofile(before)
        else:  # cProfile, which is not a function
            sys.setprofile(None)
            before.enable()
    if random.getstate() != states[0]:
        found.append("random.random")
    if _numpy_state() != states[1]:
        found.append("numpy.random")


def _numpy_state() -> tuple[bytes, int]:
    _, keys, position, *_ = np.random.get_state(legacy=True)  # noqa: NPY002
    return np.asarray(keys).tobytes(), int(position)


class PythonSnapshot:
    """The Python values that functions can see: globals, closures, attributes, containers.

    Tensors are compared by identity, because their values are inputs of a compiled step. Numbers,
    text and small arrays are compared by value. Everything else is compared by identity, except for
    what a library keeps in its own objects and may make new at each call (the plates of an
    autoguide).

    State inside generators and C extensions, and what a library's object keeps for itself, is not
    seen. The comparison with eager steps finds changes of these.

    Args:
        roots: model, guide and other objects to start from.

    Example:
        >>> settings = types.SimpleNamespace(beta=1.0)
        >>> state = PythonSnapshot(settings)
        >>> state.changed() is None
        True
        >>> settings.beta = 0.5
        >>> state.changed()
        'SimpleNamespace.beta'
    """

    def __init__(self, *roots: Any):
        self.roots = roots
        self.values = self._collect()

    def changed(self) -> str | None:
        """Name of a value that has changed since the last call; None if there is none."""
        before, self.values = self.values, self._collect()
        names = itertools.chain(self.values, before)
        return next((n for n in names if before.get(n, self) != self.values.get(n, self)), None)

    def _collect(self) -> dict[str, Any]:
        self._found: dict[str, Any] = {}
        self._seen: set[int] = set()
        self._keep: list[Any] = []  # an id stands for an object only as long as it lives
        for root in self.roots:
            self._value(getattr(root, "__name__", type(root).__name__), root)
        del self._seen
        return self._found

    def _value(self, name: str, value: Any, inside: bool = False) -> None:
        if len(self._found) > _MOST_VALUES:
            return
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype)):
            self._found[name] = value
        elif isinstance(value, torch.Tensor):
            self._found[name] = id(value), tuple(value.shape), value.dtype
            self._keep.append(value)
        elif isinstance(value, np.ndarray):
            content = value.tobytes() if value.nbytes < 1_000_000 else b""
            self._found[name] = id(value), value.shape, hashlib.sha256(content).digest()
            self._keep.append(value)
        elif id(value) in self._seen:
            return
        else:
            self._seen.add(id(value))
            self._keep.append(value)
            self._compound(name, value, inside)

    def _compound(self, name: str, value: Any, inside: bool) -> None:
        if isinstance(value, (list, tuple)):
            self._found[name] = type(value), len(value)
            for k, item in enumerate(value):
                self._value(f"{name}[{k}]", item, inside)
        elif isinstance(value, (set, frozenset)):
            self._found[name] = type(value), frozenset(map(_simple, value))
        elif isinstance(value, dict):
            self._found[name] = type(value), len(value)
            for k, (key, item) in enumerate(list(value.items())):
                shown = repr(key) if isinstance(key, (str, int)) else f"#{k}"
                self._value(f"{name}[{shown}]", item, inside)
        elif isinstance(value, types.FunctionType):
            self._function(name, value)
        elif isinstance(value, types.MethodType):
            self._value(name, value.__func__)
            self._value(f"{name}.__self__", value.__self__)
        elif isinstance(value, functools.partial):
            for part in (value.func, value.args, value.keywords):
                self._value(name, part)
        elif isinstance(value, itertools.count):
            self._found[name] = repr(value)
        elif isinstance(value, np.random.Generator):
            self._found[name] = repr(value.bit_generator.state)
        elif isinstance(value, torch.nn.Module):
            self._found[f"{name}.training"] = tuple(m.training for m in value.modules())
            self._object(name, value)
        elif isinstance(value, (type, types.ModuleType, types.BuiltinFunctionType)):
            self._found[name] = id(value)
        else:
            self._found[name] = type(value) if inside else id(value)
            module = type(value).__module__
            if not _library(module) or module.startswith(("types", "vi_toolkit.estimators")):
                self._object(name, value)

    def _object(self, name: str, value: Any) -> None:
        library = _library(type(value).__module__)
        for key, item in list(getattr(value, "__dict__", {}).items()):
            # A private attribute of a library's object is a cache, except for a module's parts.
            own = key.startswith("__" if not library else "_")
            if not own or key in ("_modules", "_parameters", "_buffers"):
                self._value(f"{name}.{key}", item, library)
        if not library:
            for key, item in list(vars(type(value)).items()):
                if isinstance(item, types.FunctionType):
                    self._function(f"{name}.{key}", item)
                elif not key.startswith("__"):
                    self._value(f"{name}.{key}", item)

    def _function(self, name: str, function: Callable[..., Any]) -> None:
        if _library(function.__module__):
            # This may be a library's wrapper around a user's function, as by pyro.poutine.
            for cell in function.__closure__ or ():
                with contextlib.suppress(ValueError):
                    if not _library(getattr(cell.cell_contents, "__module__", None) or ""):
                        self._value(name, cell.cell_contents)
            return
        names = _names(function.__code__)
        for cell, free in zip(
            function.__closure__ or (), function.__code__.co_freevars, strict=True
        ):
            with contextlib.suppress(ValueError):  # an empty cell
                self._reference(f"{name}.{free}", cell.cell_contents, names)
        self._value(f"{name}'s defaults", function.__defaults__)
        self._value(f"{name}'s keyword defaults", function.__kwdefaults__)
        self._value(f"{name}'s attributes", function.__dict__)
        for used in names & set(function.__globals__):
            self._reference(f"{function.__module__}.{used}", function.__globals__[used], names)

    def _reference(self, name: str, item: Any, names: set[str]) -> None:
        """A variable of a function that uses these names."""
        if not isinstance(item, (types.ModuleType, type)):
            self._value(name, item)
            return
        self._found[f"{name} itself"] = id(item)
        owner = item.__name__ if isinstance(item, types.ModuleType) else item.__module__
        if not _library(owner):  # the function may read config.beta or Settings.beta
            for attribute in names & set(vars(item)):
                self._value(f"{name}.{attribute}", getattr(item, attribute))


def _names(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant)
    return names


def _simple(value: Any) -> Any:
    return value if isinstance(value, (int, float, str)) else id(value)
