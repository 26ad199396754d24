"""Checks before the first step that model, guide and data fit together.

Pyro reports most of these mistakes late and from deep inside torch, and some of them never. Here
each mistake is one :class:`~vi_toolkit.errors.PreflightError`, which names the site and says what
to change. A correct model must pass. A check whose outcome depends on the values of the latents (a
density that is not finite, a matrix that is not positive definite) therefore raises only if it
fails at every value tried.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine

from vi_toolkit.errors import PreflightError
from vi_toolkit.preflight import words
from vi_toolkit.preflight.checks import Checks
from vi_toolkit.preflight.data import check_arguments, check_data
from vi_toolkit.preflight.runs import run_model
from vi_toolkit.programs.isolation import isolated_pyro_state, seeded_state
from vi_toolkit.programs.minibatches import plan_of_large_plate
from vi_toolkit.programs.workspace import Workspace

__all__ = ["preflight"]

PART = 4_096  # rows of a large plate that are checked in one run


def preflight(
    model: Callable[..., Any],
    guide: Any,
    data: Mapping[str, Any],
    subsample: Mapping[str, int] | None = None,
    reparameterised: bool | None = None,
    enumerate: bool = False,
    seed: int = 0,
    double: bool = False,
) -> Workspace:
    """Raise :class:`PreflightError` if model, guide and data do not fit together.

    The model runs two to four times and the guide once, more often only if something is wrong.
    They run with Pyro's validation on, in a parameter store, random state and default dtype of
    their own, so the caller's do not change. If a large plate is subsampled, these runs see one
    minibatch of it; the model alone then runs over all rows, a few thousand at a time.

    Args:
        model: Pyro model, called as ``model(**data)``. Its latents are checked against its
            ``LATENTS``, if there is one: an attribute of the model, or of the module whose
            ``model`` it is. ``LATENTS`` maps a site name to a tuple of dims: () for a global
            scalar, a string for a plate or a named dimension, an int for a size.
        guide: Pyro guide, called as ``guide(**data)``; an autoguide class means ``guide(model)``.
        data: keyword arguments. Their float tensors must be finite: fill in missing values and
            mask them in the model. They must also share one dtype, which is the default dtype
            during the checks, so that a model's own constants have it too.
        subsample: plate name -> minibatch size.
        reparameterised: True if the estimator needs gradients through the guide's draws.
        enumerate: whether latents marked ``infer={"enumerate": "parallel"}`` are summed out, and
            so may be missing in the guide.
        seed: for the first values of the guide's parameters.
        double: whether to run the guide in double precision, if it and the model can.

    Returns:
        The :class:`~vi_toolkit.programs.workspace.Workspace` of the checks. It holds the guide,
        set up, and the traces of its first run, so that a fit need not run them again.

    Raises:
        PreflightError: model, guide and data do not fit together. The error has ``site`` and
            ``remedy``.

    Warns:
        UserWarning: there are data but no observed site. A model may be written that way: a known
            density has constants for data, and observes nothing. An argument that is left at None,
            however, is a forgotten observation, and an error.

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
    workspace = Workspace(model, guide, data, seed, subsample)
    check_arguments("model", model, data)
    check_arguments("guide", workspace.guide, data)
    checks = Checks(workspace, subsample or {}, reparameterised, enumerate)
    # (Isolated before anything else: Pyro's handler stack belongs to all threads.)
    with isolated_pyro_state(), warnings.catch_warnings(), poutine.block(), torch.no_grad():
        warnings.simplefilter("ignore")  # the fit itself repeats them
        well, warning = _check_in_parts(checks)
        if well:
            workspace.set_up()
        else:
            warning = checks.on_all_data(double)
    if warning:
        warnings.warn(warning, UserWarning, stacklevel=2)
    return workspace


def _check_in_parts(checks: Checks) -> tuple[bool, str | None]:
    """Check a model with a large plate on minibatches of it.

    Returns:
        (True, the warning or None) if nothing is wrong; (False, None) if something is, or if no
        large plate is subsampled. Runs on all the data must then follow. They name the rows at
        fault as the user numbers them.
    """
    workspace = checks.workspace
    model, data = workspace.model, workspace.data
    with workspace.isolated(seeded_state(0)):
        plan = plan_of_large_plate(model, data, workspace.subsample)
    if plan is None:
        return False, None
    rows, handler = plan.apply(data, torch.arange(plan.batch))
    apart = Checks(workspace.unused(), {}, checks.reparameterised, checks.enumerated)
    try:
        with handler:
            alone = apart.model_alone(rows)
            warning = apart.guide_and_model(alone, rows)
    except PreflightError:
        return False, None
    for part in torch.arange(plan.size).split(max(plan.batch, PART)):
        rows, handler = plan.with_batch(len(part)).apply(data, part)
        with handler, apart.workspace.isolated(validate=True):
            found = run_model(model, rows)
        if found.error is not None or found.problems.keys() & found.observed.keys():
            return False, None
    return True, warning
