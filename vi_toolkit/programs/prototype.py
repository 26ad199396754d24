"""Runs a model once, at values of its latents at which it does not raise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from pyro.infer.autoguide.utils import helpful_support_errors
from torch.distributions import biject_to

from vi_toolkit.programs.sites import latent_sites
from vi_toolkit.programs.vectorise import BAD_POINT

ATTEMPTS = 100  # to find latents at which a model runs


def start_value(site: dict[str, Any]) -> torch.Tensor:
    """A first value for a latent: the prior median, or zero on the unconstrained scale.

    Pyro's own initialisers draw from the prior, which is impossible if the prior is improper.
    """
    fn = site["fn"]
    try:
        return init_to_median(site)
    except NotImplementedError:
        with helpful_support_errors(site):
            transform = biject_to(fn.support)
        return transform(torch.zeros(transform.inverse_shape(fn.shape())))


def prototype(
    model: Callable[..., Any],
    data: Mapping[str, Any],
    start: Callable[[dict[str, Any]], torch.Tensor] = start_value,
) -> Any:
    """Trace the model once, with a value from ``start`` for every latent."""
    with torch.no_grad(), InitMessenger(start):
        return poutine.trace(model).get_trace(**data)


def trace_that_runs(
    model: Callable[..., Any],
    data: Mapping[str, Any],
    start: Callable[[dict[str, Any]], torch.Tensor] = start_value,
) -> Any:
    """Trace the model at latents from ``start`` or, where it raises there, at draws of the prior.

    A sound model may raise at its prior medians, for example because a covariance is not positive
    definite there, or because a solver does not converge.

    Raises:
        Exception: the model raises at ``start`` and at ``ATTEMPTS`` prior draws. This is the first
            of those errors.
    """

    def prior_draw(site: dict[str, Any]) -> torch.Tensor:
        try:
            return site["fn"].sample().detach()
        except NotImplementedError:
            return start_value(site)

    first: Exception | None = None
    for attempt in range(1 + ATTEMPTS):
        try:
            # Handlers around this must not see the runs that fail.
            with poutine.block():
                return prototype(model, data, prior_draw if attempt else start)
        except BAD_POINT as error:
            first = first or error
    assert first is not None
    raise first


def values_it_runs_at(
    model: Callable[..., Any],
    data: Mapping[str, Any],
    start: Callable[[dict[str, Any]], torch.Tensor] = start_value,
) -> dict[str, torch.Tensor]:
    """The latents of :func:`trace_that_runs`."""
    trace = trace_that_runs(model, data, start)
    return {name: site["value"] for name, site in latent_sites(trace).items()}
