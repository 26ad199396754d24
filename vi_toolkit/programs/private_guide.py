"""A copy of the user's guide, which a fit or a check may set up and change."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import (
    AutoGuide,
    AutoLaplaceApproximation,
    AutoMultivariateNormal,
)
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.guide import GuideMessenger

from vi_toolkit.programs.prototype import start_value, values_it_runs_at
from vi_toolkit.programs.sites import Site
from vi_toolkit.pyro_private import outer_handler, set_model


def private_guide(model: Callable[..., Any], guide: Any) -> Any:
    """Copy a guide, so that nothing changes the original.

    A function keeps no state and is returned as it is. An autoguide class is instantiated with the
    model. A guide that runs the model under its own effects shows only what it samples, and for
    ``AutoLaplaceApproximation``, which is a point until its user asks it for the Gaussian, comes
    that Gaussian's guide. Three shortcomings of Pyro's autoguides are mended: when one is copied,
    it and the copy forget their model; it draws its first values from the prior, which fails if the
    prior is improper; and if the model raises at these values, it does not try others.

    Args:
        model: the model for an autoguide class.
        guide: function, module, autoguide, autoguide class, or a function from the model to one of
            these, such as ``functools.partial(AutoNormal, init_scale=0.01)``.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> guide = AutoNormal(model)
        >>> private_guide(model, guide)()["z"].shape, len(list(guide.parameters()))
        (torch.Size([]), 0)
    """
    if _makes_guides(model, guide):
        guide = guide(model)
    if asks_for_laplace(guide):
        handler, inner = outer_handler(guide.model)
        start = {"init_loc_fn": handler.init_fn} if isinstance(handler, InitMessenger) else {}
        guide = AutoMultivariateNormal(inner, **start)
    if isinstance(guide, GuideMessenger):
        own = copy.deepcopy(guide) if isinstance(guide, torch.nn.Module) else guide
        return SampledSites(own)
    if not isinstance(guide, torch.nn.Module):
        return guide
    autos = [m for m in guide.modules() if isinstance(m, AutoGuide)]
    kept = [(auto.model, auto.master) for auto in autos]
    # Prototype traces are never changed, and may hold tensors that cannot be copied: share them.
    shared = {id(auto.prototype_trace): auto.prototype_trace for auto in autos}
    try:
        twin = copy.deepcopy(guide, shared)
    finally:
        for auto, (its_model, master) in zip(autos, kept, strict=True):
            set_model(auto, its_model)
            auto.master = master
    copies = [m for m in twin.modules() if isinstance(m, AutoGuide)]
    for auto, (its_own, _) in zip(copies, kept, strict=True):
        handler, inner = outer_handler(its_own)
        if isinstance(handler, InitMessenger):
            its_own = _Started(inner, functools.partial(_first_value, handler.init_fn))
        set_model(auto, its_own)
    return twin


def _makes_guides(model: Callable[..., Any], guide: Any) -> bool:
    """Whether ``guide(model)`` is a guide: for a class, or a factory such as ``lambda model: ...``.

    A factory's only required argument is called ``model``, which is no argument of the model's.
    """
    made = guide.func if isinstance(guide, functools.partial) else guide
    if isinstance(made, type):
        return issubclass(made, AutoGuide | GuideMessenger)
    required = _required_arguments(guide)
    return required == ["model"] and "model" not in _required_arguments(model)


def _required_arguments(fn: Any) -> list[str]:
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return []
    return [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]


def asks_for_laplace(guide: Any) -> bool:
    """Whether a guide, or guide class, stands for the Laplace approximation at the mode."""
    guide = guide.func if isinstance(guide, functools.partial) else guide
    kind = guide if isinstance(guide, type) else type(guide)
    return issubclass(kind, AutoLaplaceApproximation)


class SampledSites(torch.nn.Module):
    """The latent sites of a guide such as ``AutoNormalMessenger``, which runs the model itself.

    The model's observations must not be seen in the guide: there, their likelihood would count as
    a density of the guide and cancel that of the model.

    Args:
        messenger: the guide.
    """

    def __init__(self, messenger: GuideMessenger):
        super().__init__()
        self.messenger: Any = messenger

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with poutine.block(hide_fn=_is_observed):
            return self.messenger(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """The guide's own attributes."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("messenger"), name)


def _is_observed(site: Site) -> bool:
    return site["type"] == "sample" and site["is_observed"]


def _first_value(init: Callable[[dict[str, Any]], torch.Tensor], site: dict[str, Any]) -> Any:
    try:
        return init(site)
    except NotImplementedError:
        return start_value(site)


class _Started:
    """A model that is run at first values at which it does not raise."""

    def __init__(self, model: Callable[..., Any], init: Callable[[dict[str, Any]], torch.Tensor]):
        self.model, self.init = model, init

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        values = values_it_runs_at(functools.partial(self.model, *args), kwargs, self.init)

        def value(site: dict[str, Any]) -> torch.Tensor:
            # A handler inside the model may replace a site by others: the site then asks for a
            # value, but is not in the trace.
            return values[site["name"]] if site["name"] in values else self.init(site)

        with InitMessenger(value):
            return self.model(*args, **kwargs)
