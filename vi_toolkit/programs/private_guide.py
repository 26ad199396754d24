"""A guide of one's own: the copy that a fit or a check may set up and change."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.messenger import Messenger

from vi_toolkit.programs.prototype import start_value, values_it_runs_at


def private_guide(model: Callable[..., Any], guide: Any) -> Any:
    """A copy of the guide that leaves the caller's as it is.

    Functions keep no state and are returned as they are; an autoguide class is built on the model.
    Three shortcomings of Pyro's autoguides are mended: copying makes the copy and the original
    forget their model; their first values are drawn from the prior, which an improper prior does
    not allow; and where the model raises at these values, they do not try others.

    Args:
        model: what an autoguide class is built on.
        guide: function, module, autoguide or autoguide class.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> guide = AutoNormal(model)
        >>> private_guide(model, guide)()["z"].shape, len(list(guide.parameters()))
        (torch.Size([]), 0)
    """
    if isinstance(guide, type) and issubclass(guide, AutoGuide):
        guide = guide(model)
    if not isinstance(guide, torch.nn.Module):
        return guide
    autos = [m for m in guide.modules() if isinstance(m, AutoGuide)]
    kept = [(auto._model, auto.master) for auto in autos]
    # Prototypes are only read once they are there, and may hold tensors that cannot be copied.
    shared = {id(auto.prototype_trace): auto.prototype_trace for auto in autos}
    try:
        twin = copy.deepcopy(guide, shared)
    finally:
        for auto, (its_model, master) in zip(autos, kept, strict=True):
            auto._model, auto.master = its_model, master
    copies = [m for m in twin.modules() if isinstance(m, AutoGuide)]
    for auto, ((its_own,), _) in zip(copies, kept, strict=True):
        handler, inner = outer_handler(its_own)
        if isinstance(handler, InitMessenger):
            its_own = _Started(inner, functools.partial(_first_value, handler.init_fn))
        auto._model = (its_own,)
    return twin


def _first_value(init: Callable[[dict[str, Any]], torch.Tensor], site: dict[str, Any]) -> Any:
    try:
        return init(site)
    except NotImplementedError:
        return start_value(site)


class _Started:
    """The model run at first values at which it does not raise."""

    def __init__(self, model: Callable[..., Any], init: Callable[[dict[str, Any]], torch.Tensor]):
        self.model, self.init = model, init

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        values = values_it_runs_at(functools.partial(self.model, *args), kwargs, self.init)

        def value(site: dict[str, Any]) -> torch.Tensor:
            # A site that a handler inside replaces by others is asked for, but not in the trace.
            return values[site["name"]] if site["name"] in values else self.init(site)

        with InitMessenger(value):
            return self.model(*args, **kwargs)


def outer_handler(fn: Any) -> tuple[Messenger | None, Any]:
    """The outermost effect handler of a callable such as ``poutine.block(model)``, and the rest."""
    inner = fn.func if isinstance(fn, functools.partial) else None
    if isinstance(inner, functools.partial) and len(inner.args) == 2:
        handler, rest = inner.args
        if isinstance(handler, Messenger):
            return handler, rest
    return None, fn


def unwrap(fn: Any) -> Any:
    """The function inside all effect handlers."""
    handler, inner = outer_handler(fn)
    return fn if handler is None else unwrap(inner)
