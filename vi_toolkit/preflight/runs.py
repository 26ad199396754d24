"""Runs of model and guide: their sites, their errors, and densities that are not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

from vi_toolkit.preflight import support, words
from vi_toolkit.programs.sites import Site, is_deterministic
from vi_toolkit.pyro_private import mask_of

# A density counts as a mistake only if it is not finite, or raises, at all of these draws.
PRIOR_DRAWS = 5
GUIDE_DRAWS = 10


@dataclass
class Run:
    """One run of the model or guide.

    Attributes:
        trace: the sites that it reached.
        error: the exception that ended it, if one did.
        last: the site at which it raised, or the last one before that.
        problems: site -> why its density is not finite.
        replayed: whether it ran at the guide's draws, not the prior's.
        scored: whether it ran to its end, so that an error comes from a site's density.
        sites, latents, observed: its sample sites by name, without plates.
        plates: name -> (size, subsample size).
    """

    trace: Any
    error: Exception | None = None
    last: str | None = None
    problems: dict[str, str] = field(default_factory=dict)
    replayed: bool = False
    scored: bool = False

    def __post_init__(self) -> None:
        samples = {n: s for n, s in self.trace.nodes.items() if s["type"] == "sample"}
        self.sites = {n: s for n, s in samples.items() if not site_is_subsample(s)}
        self.last = next(reversed(self.sites), None)
        self.latents = {n: s for n, s in self.sites.items() if not s["is_observed"]}
        self.observed = {
            n: s for n, s in self.sites.items() if s["is_observed"] and not is_deterministic(s)
        }
        fns = {n: s["fn"] for n, s in samples.items() if site_is_subsample(s)}
        self.plates = {n: (int(fn.size), fn.subsample_size) for n, fn in fns.items()}


class _ImproperDraws(Messenger):
    """Draws a standard Normal on the unconstrained scale in place of an improper prior."""

    def __init__(self, data: Mapping[str, Any]):
        super().__init__()
        self.device = next((v.device for v in data.values() if isinstance(v, Tensor)), None)

    def _pyro_sample(self, msg: Site) -> None:
        fn = msg["fn"]
        if msg["value"] is None and isinstance(support.core(fn), dist.ImproperUniform):
            transform = biject_to(fn.support)
            shape = transform.inverse_shape(fn.shape())
            msg["value"] = transform(torch.randn(shape, device=self.device))


def trace_run(fn: Callable[..., Any], data: Mapping[str, Any], *handlers: Messenger) -> Run:
    """Trace ``fn(**data)`` under some handlers, and catch what it raises.

    Returns:
        The sites up to the end of the run or to its exception, and that exception.
    """
    tracer = poutine.trace()
    error = None
    try:
        with ExitStack() as stack:
            for handler in (tracer, *handlers):
                stack.enter_context(handler)
            fn(**data)
    except Exception as raised:
        error = raised
    return Run(tracer.trace, error)


def run_model(model: Callable[..., Any], data: Mapping[str, Any], guide: Run | None = None) -> Run:
    """Run the model and compute the log density of every site.

    Args:
        guide: a run of the guide, whose draws the model takes; None for draws of the prior.
    """
    replay = [poutine.replay(trace=guide.trace)] if guide else []
    result = trace_run(model, data, _ImproperDraws(data), *replay)
    result.replayed = guide is not None
    result.scored = result.error is None
    for name, site in result.sites.items() if result.scored else ():
        try:
            problem = _density_problem(site)
        except Exception as error:
            result.error, result.last = error, name
            break
        if problem:
            result.problems[name] = problem
    return result


def model_runs(
    model: Callable[..., Any], guide: Callable[..., Any], data: Mapping[str, Any]
) -> Iterator[Run]:
    """Run the model at draws of the prior, then at draws of the guide."""
    for _ in range(PRIOR_DRAWS):
        yield run_model(model, data)
    for _ in range(GUIDE_DRAWS):
        drawn = trace_run(guide, data)
        if drawn.error is None:
            yield run_model(model, data, drawn)


def _density_problem(site: Site) -> str | None:
    """Why a site's log density is not finite; None if it is finite. Sets site["log_prob"]."""
    fn, value = site["fn"], site["value"]
    if is_deterministic(site) or isinstance(value, int | float):
        return None
    if not isinstance(value, Tensor):
        raise TypeError(f"the observation is {words.a(value)}, not a tensor")
    try:
        log_prob = fn.log_prob(value, *site["args"], **site["kwargs"])
    except ValueError as error:
        if "within the support" not in str(error):
            raise
        # Values outside may be masked, or outside by rounding only. That is decided below.
        log_prob = torch.zeros(fn.batch_shape, device=value.device)
    outside = support.outside(fn, value, edge=site["is_observed"])
    if outside is not None:
        entries = support.entry_dims(fn)
        events = outside.flatten(-entries).any(-1) if entries else outside
        if isinstance(fn, dist.MaskedDistribution):
            events = events & mask_of(fn)
        log_prob = torch.where(events, -torch.inf, log_prob)
    site["log_prob"] = log_prob
    bad = ~torch.isfinite(scale_and_mask(log_prob, site["scale"], site["mask"]))
    if not bad.any():
        return None
    if outside is not None:
        outside = outside & bad.reshape(bad.shape + (1,) * entries)
        if outside.any():
            what = "observation" if site["is_observed"] else "draw"
            return (
                f"the {what} {words.item(value, outside)} lies outside the support of "
                f"{support.distribution_name(fn)}, {support.describe(fn)}"
            )
    return f"the log density is {words.item(log_prob.expand(bad.shape), bad)}"


def numerical(error: Exception | None) -> bool:
    """Whether an error depends on the values of the latents, so that another draw may be fine."""
    if isinstance(error, torch.linalg.LinAlgError | ArithmeticError):
        return not isinstance(error, ZeroDivisionError)  # which Pyro raises for an empty plate
    signs = (
        "to satisfy the constraint",
        "to be within the support",
        "positive-definite",
        "positive definite",
        "singular",
        "contains either `inf`, `nan` or element < 0",
    )
    return isinstance(error, ValueError | RuntimeError) and any(s in str(error) for s in signs)


def passed(runs: list[Run]) -> bool:
    """Whether each site's density was finite in at least one run."""
    complete = [set(run.problems) for run in runs if run.error is None]
    return bool(complete) and not set.intersection(*complete)
