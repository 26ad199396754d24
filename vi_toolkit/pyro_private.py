"""Everything in vi_toolkit that depends on what Pyro keeps private.

A new version of Pyro may rename or rebuild any of it. Each function below says which private name
it uses and what is lost without it, and looks for that name when it is first called: if it is
gone, one sentence says so. Use Pyro's public interface wherever there is one.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import warnings
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoGuide
from pyro.nn import PyroModule
from pyro.params.param_store import ParamStoreDict
from pyro.poutine.messenger import Messenger

from vi_toolkit.errors import CompileError, PrivateNameError

WRITTEN_FOR = "1.9.2"  # the version of Pyro whose source these functions were written from


def _missing(what: str, lost: str) -> str:
    return (
        f"Pyro {pyro.__version__} has no {what} (vi_toolkit was written for Pyro {WRITTEN_FOR}), "
        f"so {lost}."
    )


# ------------------------------------------------------------------ parameters


@contextlib.contextmanager
def global_store_as(store: ParamStoreDict) -> Iterator[None]:
    """While the block runs, Pyro's global parameter store holds what ``store`` holds.

    The two are one: a parameter made in the block is in ``store`` too. The global store then gets
    its own parameters back.

    Relies on a ``ParamStoreDict`` keeping all that it holds in attributes. The public
    ``get_state`` and ``set_state`` copy the parameters, and cut the link from each of the caller's
    constrained parameters to its unconstrained value. Without this, nothing can be fitted.

    Example:
        >>> import pyro, torch
        >>> store = ParamStoreDict()
        >>> with global_store_as(store):
        ...     _ = pyro.param("loc", torch.tensor(1.0))
        >>> list(store.keys()), "loc" in pyro.get_param_store()
        (['loc'], False)
    """
    if not _stores_keep_attributes():
        lost = "parameters cannot be kept apart from the caller's, and nothing can be fitted"
        raise PrivateNameError(_missing("ParamStoreDict that keeps its parameters itself", lost))
    live = pyro.get_param_store()
    theirs = live.__dict__
    live.__dict__ = store.__dict__
    try:
        yield
    finally:
        live.__dict__ = theirs


@functools.cache
def _stores_keep_attributes() -> bool:
    """Whether two parameter stores that share their attributes share their parameters."""
    one, other = ParamStoreDict(), ParamStoreDict()
    try:
        one.__dict__ = other.__dict__
    except (AttributeError, TypeError):
        return False
    one["probe"] = torch.zeros(())
    return "probe" in other


def unconstrained_parameter(
    module: PyroModule, name: str
) -> tuple[torch.Tensor, constraints.Constraint]:
    """The tensor that holds a parameter of a Pyro module, and the parameter's constraint.

    Relies on ``PyroModule._pyro_params`` and on the attribute ``NAME_unconstrained``. The public
    way, to assign to the attribute, puts a new tensor in the place of the old. Without this,
    deterministic fits cannot write their solution into an autoguide.

    Args:
        module: the module, or one around it.
        name: as in ``named_pyro_params``, with dots between modules.

    Example:
        >>> from pyro.nn import PyroModule, PyroParam
        >>> module = PyroModule()
        >>> module.scale = PyroParam(torch.tensor(1.0), constraints.positive)
        >>> leaf, constraint = unconstrained_parameter(module, "scale")
        >>> leaf.item(), constraint  # log(1)
        (0.0, GreaterThan(lower_bound=0.0))
    """
    *path, last = name.split(".")
    for step in path:
        module = getattr(module, step)
    try:
        constrained = module._pyro_params
        if last in constrained:
            return getattr(module, f"{last}_unconstrained"), constrained[last][0]
    except AttributeError as error:
        lost = "deterministic fits cannot write their solution into an autoguide"
        raise PrivateNameError(_missing("PyroModule._pyro_params", lost)) from error
    return getattr(module, last), constraints.real


# ------------------------------------------------------------------ models, guides, distributions


def set_model(autoguide: AutoGuide, model: Callable[..., Any]) -> None:
    """Let an autoguide run another model.

    Relies on ``AutoGuide._model``, because ``AutoGuide.model`` can only be read. Copying an
    autoguide makes both it and the copy forget their model; without this, neither could be
    reminded of it, and no fit could use an autoguide.
    """
    if "_model" not in vars(autoguide):
        raise PrivateNameError(_missing("AutoGuide._model", "autoguides cannot be copied"))
    autoguide._model = (model,)


def mask_of(fn: dist.MaskedDistribution) -> torch.Tensor | bool:
    """The mask of a masked distribution: shape (*batch shape), or one value for all of it.

    Relies on ``MaskedDistribution._mask``. Without this, the checks before a fit cannot tell
    masked observations, which may be anything, from others.
    """
    try:
        return fn._mask
    except AttributeError as error:
        lost = "the checks before a fit cannot tell masked observations from others"
        raise PrivateNameError(_missing("MaskedDistribution._mask", lost)) from error


def outer_handler(fn: Any) -> tuple[Messenger | None, Any]:
    """The outermost effect handler of a callable such as ``poutine.block(model)``, and the rest.

    Returns (None, fn) for a callable without a handler.

    Relies on how a handler wraps a function: as the first two arguments of a
    ``functools.partial``, itself inside another. The public ``poutine.unwrap`` also takes
    ``functools.partial(model, x, y)`` of a user's for such a wrapper. Without this, a warning says
    once that handlers are not seen through: the arguments of wrapped models are then not checked,
    and autoguides start where they were told to even if the model raises there.

    Example:
        >>> from pyro import poutine
        >>> def model():
        ...     pass
        >>> handler, inner = outer_handler(poutine.block(model))
        >>> type(handler).__name__, inner is model
        ('BlockMessenger', True)
    """
    if not isinstance(fn, functools.partial):
        return None, fn
    _check_wrappers()
    return _taken_apart(fn)


def unwrap(fn: Any) -> Any:
    """The function inside all effect handlers."""
    handler, inner = outer_handler(fn)
    return fn if handler is None else unwrap(inner)


def _taken_apart(fn: Any) -> tuple[Messenger | None, Any]:
    inner = fn.func
    if isinstance(inner, functools.partial) and len(inner.args) == 2:
        handler, rest = inner.args
        if isinstance(handler, Messenger):
            return handler, rest
    return None, fn


@functools.cache
def _check_wrappers() -> None:
    handler, function = Messenger(), _missing
    if _taken_apart(handler(function)) != (handler, function):
        lost = "the arguments of models inside an effect handler are not checked"
        warnings.warn(_missing("effect handlers that can be taken apart", lost), stacklevel=4)


# ------------------------------------------------------------------ for the compiler


class ValueReaders(NamedTuple):
    """Code objects of those functions of Pyro that read the values of tensors.

    Attributes:
        item: turn a loss into a number.
        nan: warn of NaN and infinity.
        all: ask, in enumeration, whether every probability is positive.
        dot: multiply probabilities and costs in enumeration.
    """

    item: frozenset[CodeType]
    nan: frozenset[CodeType]
    all: frozenset[CodeType]
    dot: frozenset[CodeType]


@functools.cache
def value_readers() -> ValueReaders:
    """The functions of Pyro whose questions about values a recorded step answers by itself.

    Relies on their names in ``pyro.util`` and ``pyro.infer.util``, ``_fulldot`` among them.
    Without one of them, no step can be compiled.

    Raises:
        CompileError: one of them is gone.
    """

    def codes(module: str, *names: str) -> frozenset[CodeType]:
        found = set()
        for name in names:
            function: Any = importlib.import_module(module)
            try:
                for part in name.split("."):
                    function = getattr(function, part)
                found.add(function.__code__)
            except AttributeError as error:
                lost = "steps cannot be compiled"
                raise CompileError(_missing(f"{module}.{name}", lost).rstrip(".")) from error
        return frozenset(found)

    return ValueReaders(
        item=codes("pyro.infer.util", "torch_item"),
        nan=codes("pyro.util", "torch_isnan", "torch_isinf", "warn_if_nan", "warn_if_inf"),
        all=codes("pyro.infer.util", "Dice.compute_expectation"),
        dot=codes("pyro.infer.util", "_fulldot"),
    )
