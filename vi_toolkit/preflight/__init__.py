"""Checks made before step one: do model, guide and data fit together?

Pyro reports most of these mistakes late and from deep inside torch, and some of them never. Here
each is one :class:`~vi_toolkit.errors.PreflightError` that names the site and what to change.
A correct model must pass, so a check that depends on where the latents happen to be (a density
that is not finite, a matrix that is not positive definite) raises only if it fails everywhere.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide

from vi_toolkit.errors import PreflightError
from vi_toolkit.preflight import shapes, sites, support, words
from vi_toolkit.preflight.causes import cause, density_error
from vi_toolkit.preflight.data import check_arguments, check_data, tensors
from vi_toolkit.preflight.runs import Run, model_runs, numerical, passed, run, run_model
from vi_toolkit.programs.isolation import isolated_pyro_state, seeded_state
from vi_toolkit.programs.minibatches import PlatePlan, plan_of_large_plate
from vi_toolkit.programs.private_guide import private_guide

__all__ = ["preflight"]

PART = 4_096  # rows of a large plate that are looked at in one run


def preflight(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Mapping[str, Any],
    subsample: Mapping[str, int] | None = None,
    reparameterised: bool | None = None,
    enumerate: bool = False,
) -> None:
    """Raise :class:`PreflightError` if model, guide and data do not fit together.

    Runs the model two to four times and the guide once (more only when something is wrong), with
    Pyro's validation on and in its own parameter store, random state and default dtype, so that
    nothing of the caller's changes. Of a large plate that is subsampled these runs hold one
    minibatch; then the model alone goes over all rows, some minibatches at a time.

    Args:
        model: Pyro model, called as ``model(**data)``. If it carries ``model.LATENTS``, or is the
            ``model`` of a module with ``LATENTS`` (site name -> tuple of dims: () for a global
            scalar, a string for a plate or a named dimension, an int for a size), its latents are
            checked against that.
        guide: Pyro guide, called as ``guide(**data)``; an autoguide class means ``guide(model)``.
        data: keyword arguments. Their float tensors must be finite: fill in what is missing and
            mask it in the model. They must also share one dtype, which becomes the default dtype
            for the checks, so that a model's own constants follow its data.
        subsample: plate name -> minibatch size.
        reparameterised: True if the estimator needs gradients through the guide's draws.
        enumerate: whether latents marked ``infer={"enumerate": "parallel"}`` are summed out, and
            so may be missing in the guide.

    Raises:
        PreflightError: with ``site`` and ``remedy``.

    Warns:
        UserWarning: if there are data but no observed site. This is no error, because a density
            written without observations (a known target, say) is a legitimate model whose data
            are its constants; an argument left at None, however, is a forgotten observation and
            raises.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("observations", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> def guide(y):
        ...     pyro.sample("mean", dist.Normal(0.0, 1.0))
        >>> preflight(model, guide, {"y": torch.zeros(3)})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        vi_toolkit.errors.PreflightError: The guide does not sample the model's latent 'mu'. ...
    """
    for role, fn in (("model", model), ("guide", guide)):
        if not callable(fn):
            raise PreflightError(
                f"The {role} is {words.a(fn)}, which cannot be called.",
                remedy=f"Pass a function or PyroModule to be called as {role}(**data).",
            )
    check_data(data)
    data = dict(data)
    own = private_guide(model, guide)
    check_arguments("model", model, data)
    check_arguments("guide", own, data)
    floats = {v.dtype for _, _, v in tensors(data) if v.is_floating_point() and v.dim()}
    usual = floats & {torch.float32, torch.float64}
    with (
        isolated_pyro_state(
            rng_state=seeded_state(0), dtype=usual.pop() if usual else None, validate=True
        ),
        warnings.catch_warnings(),
        poutine.block(),
    ):
        warnings.simplefilter("ignore")  # the fit itself will show them
        well, warning = False, None
        if plan := plan_of_large_plate(model, data, subsample):
            another = private_guide(model, guide)
            well, warning = _check_in_parts(model, another, data, plan, reparameterised, enumerate)
        if not well:
            warning = _check_runs(model, own, data, subsample or {}, reparameterised, enumerate)
    if warning:
        warnings.warn(warning, UserWarning, stacklevel=2)


def _check_in_parts(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: dict[str, Any],
    plan: PlatePlan,
    *options: Any,
) -> tuple[bool, str | None]:
    """Whether all is well as far as minibatches of a large plate can tell, and the warning.

    If not, runs on the whole data say what is wrong in terms of its own rows.
    """
    rows, handler = plan.apply(data, torch.arange(plan.batch))
    try:
        with handler:
            warning = _check_runs(model, guide, rows, {}, *options)
    except PreflightError:
        return False, None
    for part in torch.arange(plan.size).split(max(plan.batch, PART)):
        rows, handler = plan.with_batch(len(part)).apply(data, part)
        with handler, torch.no_grad():
            found = run_model(model, rows)
        if found.error is not None or found.problems.keys() & found.observed.keys():
            return False, None
    return True, warning


def _check_runs(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: dict[str, Any],
    subsample: Mapping[str, int],
    reparameterised: bool | None,
    enumerated: bool,
) -> str | None:
    """The checks that need model and guide to run; returns a warning, if there is one."""
    automatic = isinstance(guide, AutoGuide)
    autoguide = type(guide).__name__ if automatic else ""
    run_again = partial(run_model, model)
    draws = model_runs(model, guide, data)
    runs = []
    for attempt in draws:
        runs.append(attempt)
        if not numerical(attempt.error):
            break
    alone = runs[-1]
    if alone.error is not None:
        stopped = runs[0] if numerical(alone.error) else alone
        raise cause("model", stopped, data, run_again) from stopped.error

    sites.check_latents(alone)
    shapes.check_broadcast(alone)
    if enumerated:
        shapes.check_enumerable(alone)
    shapes.check_subsample(alone, subsample)
    sites.check_declared(model, alone)

    drawn = _run_guide(guide, data)
    if drawn.error is not None:
        raise cause("guide", drawn, data, partial(run, guide), autoguide, alone) from drawn.error
    sites.check_guide(drawn, reparameterised, enumerated)
    replayed = run_model(model, data, drawn)
    sites.check_sites(alone, drawn, enumerated, automatic)
    shapes.check_plates(alone, drawn, automatic)
    prototypes = support.set_up_on(guide)
    if automatic:
        runs.append(run_model(model, data))
        for name in prototypes.keys() & alone.sites.keys() & runs[-1].sites.keys():
            one, other = alone.sites[name], runs[-1].sites[name]
            support.check_fixed_support(name, one, other, autoguide)
    for name, site in drawn.latents.items():
        if name in alone.sites:
            # Bounds may follow another latent, and sizes the guide's minibatch: compare with the
            # model at the guide's own draw, if it got that far.
            there = replayed.sites.get(name, alone.sites[name])
            shapes.check_shape(name, there, site, name in prototypes)
            support.check_support(name, there, site, prototypes.get(name), autoguide)
    if replayed.error is not None and not numerical(replayed.error):
        raise cause("model", replayed, data, run_again) from replayed.error

    runs.append(replayed)
    while not passed(runs):  # starts are many, so one good draw is enough
        further = next(draws, None)
        if further is None:
            raise density_error(runs)
        runs.append(further)
    return sites.unobserved(model, alone, data)


def _run_guide(guide: Callable[..., Any], data: Mapping[str, Any]) -> Run:
    for validate in (True, False, False):
        # An autoguide runs the model, and a fit does so without validation.
        with pyro.validation_enabled(validate):
            drawn = run(guide, data)
        if not numerical(drawn.error):
            break
    return drawn
