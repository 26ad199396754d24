"""``fit``: one call from a Pyro model and guide to a posterior."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from pyro.infer import ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoGuide
from pyro.optim import PyroOptim

from vi_toolkit.choice import Choice, choose
from vi_toolkit.deterministic.run import DeterministicRun
from vi_toolkit.errors import (
    ConvergenceWarning,
    NonFiniteError,
    NotDeterministicError,
    PreflightError,
)
from vi_toolkit.estimators import LeaveOneOut, Reparam, Score
from vi_toolkit.estimators.reparam import reparameterised
from vi_toolkit.look import Callback
from vi_toolkit.preflight import preflight
from vi_toolkit.preflight.data import named_arguments
from vi_toolkit.programs.guide_draws import derived_seed, elbo_estimate
from vi_toolkit.programs.integers import as_integer
from vi_toolkit.programs.private_guide import asks_for_laplace
from vi_toolkit.programs.workspace import Workspace
from vi_toolkit.result import DEFAULT_RATE, Fit
from vi_toolkit.stochastic.restarts import run_restarts
from vi_toolkit.stochastic.run import Optimizer, Settings, StochasticRun
from vi_toolkit.stochastic.schedule import Schedule

Run = DeterministicRun | StochasticRun
SEED_STEP = 7919  # from restart to restart
ELBO_DRAWS = 200  # by which restarts are ranked


def fit(
    model: Callable[..., Any],
    guide: Callable[..., Any] | type[AutoGuide],
    data: Any,
    *,
    estimator: ELBO | None = None,
    optimizer: Optimizer | None = None,
    schedule: Schedule | None = None,
    method: str = "auto",
    steps: int | None = None,
    seed: int = 0,
    subsample: Mapping[str, int] | None = None,
    callback: Callback | None = None,
    average: bool = True,
    compile: str | bool = "auto",
    restarts: int = 1,
    progress: bool = True,
) -> Fit:
    r"""Fit a guide to the posterior of a Pyro model by maximising the ELBO.

    .. math:: \mathcal L(\lambda) = E_{q_\lambda(z)}[\log p(x, z) - \log q_\lambda(z)]
              = \log p(x) - \mathrm{KL}(q_\lambda \,\|\, p(z \mid x))

    There are two methods. The *deterministic* method fixes the guide's base noise and optimises to
    convergence. It needs no tuning, and it is the default for full data, a differentiable model
    and a guide of moderate size. The *stochastic* method takes annealed, averaged gradient steps;
    it handles everything else. ``Fit.method`` says which one ran and ``Fit.why`` gives the reason.

    The caller's parameter store, random state and default dtype are left as they were, the guide
    is copied, and the same seed gives the same fit bit for bit.

    Args:
        model: Pyro model, called as ``model(**data)``.
        guide: Pyro guide, called as ``guide(**data)``. An ``AutoGuide`` class, or a
            function from the model to a guide, is called on the model first.
            ``AutoLaplaceApproximation`` gives the Gaussian at the mode.
        data: dict of the arguments of model and guide, by name. A tuple of positional arguments or
            a single tensor also works.
        estimator: gradient estimator, any ``pyro.infer.ELBO``. The default is
            :class:`~vi_toolkit.Reparam` if every guide site can be reparameterised, else
            ``Score(8, LeaveOneOut(), sites=...)`` with the score function at the other sites.
            Estimators other than ``Reparam`` are stochastic.
        optimizer: first learning rate of Adam (0.02 if None), or a function from a list of
            parameters to a ``torch.optim.Optimizer``. Stochastic.
        schedule: function from the optimizer to one of ``torch.optim.lr_scheduler``, stepped after
            each optimiser step. It replaces the built-in annealing, and the error of the result is
            then not estimated. Needs ``steps``. Stochastic.
        method: ``"auto"``, ``"deterministic"`` or ``"stochastic"``. Arguments marked "Stochastic"
            make ``"auto"`` choose the stochastic method.
        steps: number of optimiser steps; None runs until convergence. Stochastic.
        seed: seed of everything random.
        subsample: minibatch size of one plate, ``{"observations": 256}``. Stochastic.
        callback: function called with a :class:`~vi_toolkit.look.Look` after each round of the
            deterministic method, and each time the stochastic method checks for convergence (after
            640 steps, 1,280, 2,560, ...). Returning True ends the fit.
        average: report the average of the last iterates rather than the last iterate (stochastic
            method only).
        compile: ``True`` compiles or raises, ``False`` never compiles, and ``"auto"`` compiles
            where that pays and warns where it fails. Stochastic steps pay from 2,000 on (or if
            ``steps`` is None), on the CPU; results agree with eager steps to rounding. The log
            density of the deterministic method pays when draws times observations reach four
            million.
        restarts: number of independent starts. The fit with the best ELBO is returned, and
            ``Fit.restarts`` holds the ELBO of each. Compiled stochastic restarts run together in
            one program, with random draws other than those of each fit run separately.
        progress: show a progress bar.

    Returns:
        A :class:`Fit`. After an interrupt (Ctrl-C) it is the fit so far.

    Raises:
        PreflightError: model, guide and data do not fit together.
        NonFiniteError: the ELBO or its gradient is not finite; ``error.fit`` is the last good
            state.
        NotDeterministicError: ``method="deterministic"`` is impossible here.
        CompileError: ``compile=True``, and compilation fails.

    Warns:
        ConvergenceWarning: the fit stopped before it converged, although ``steps`` is None; or the
            log density jumps, which reparameterised gradients do not see.
        CompileWarning: ``compile="auto"`` fell back to eager steps.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, vi_toolkit as vi
        >>> from pyro.infer.autoguide import AutoMultivariateNormal
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("observations", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> y = torch.tensor([1.0, 2.0, 3.0])
        >>> fit = vi.fit(model, AutoMultivariateNormal, {"y": y}, progress=False)
        >>> round(float(fit.sample(1000)["mu"].mean()), 1)
        2.0
    """
    if method not in ("auto", "deterministic", "stochastic"):
        raise ValueError(f"method must be 'auto', 'deterministic' or 'stochastic', not {method!r}")
    steps = None if steps is None else as_integer("steps", steps, 1)
    restarts, seed = as_integer("restarts", restarts, 1), as_integer("seed", seed, 0)
    _check_options(estimator, optimizer, schedule, steps, compile, subsample)
    given = {
        "steps": steps is not None,
        "subsample": subsample is not None,
        "optimizer": optimizer is not None,
        "schedule": schedule is not None,
        "estimator": estimator is not None and not isinstance(estimator, Reparam),
    }
    stochastic_only = [name for name, is_given in given.items() if is_given]
    data = named_arguments(model, data)

    began = time.monotonic()

    def checked(double: bool) -> Workspace:
        return preflight(
            model,
            guide,
            data,
            subsample=subsample,
            reparameterised=isinstance(estimator, Reparam),
            enumerate=isinstance(estimator, TraceEnum_ELBO),
            seed=seed,
            double=double,
        )

    workspace = checked(double=method != "stochastic" and not stochastic_only)
    if not workspace.values:
        workspace.first_traces  # noqa: B018  (runs the guide if its first run had no finite density)
    if not workspace.values:
        raise PreflightError(
            "Neither guide nor model has a parameter, so there is nothing to fit.",
            remedy='Give the guide\'s distributions parameters: loc = pyro.param("loc", ...).',
        )
    choice = choose(workspace, method, stochastic_only)
    if asks_for_laplace(guide):
        if choice.method == "stochastic":
            raise NotDeterministicError(
                "AutoLaplaceApproximation needs the mode and the curvature of the full posterior, "
                f"and here the stochastic method was chosen ({choice.why}). Use "
                "AutoMultivariateNormal, or AutoDelta for the mode alone."
            )
        choice = Choice("deterministic", "Laplace approximation at the highest mode")
    seeds = [seed + SEED_STEP * k for k in range(restarts)]

    def finish(run: Run, interrupted: bool) -> Fit:
        found = Fit(run.workspace, run, choice.why, seed, progress)
        found.interrupted, found.seconds = interrupted, time.monotonic() - began
        return found

    def failed(run: Run, error: NonFiniteError) -> None:
        error.fit = finish(run, False)

    def stochastic(workspace: Workspace, estimator: ELBO) -> tuple[Sequence[Run], bool]:
        rate = DEFAULT_RATE if optimizer is None else optimizer
        settings = Settings(estimator, rate, average, compile, schedule, steps)
        return run_restarts(workspace, settings, steps, seeds, callback, progress, failed)

    runs: Sequence[Run]
    if choice.method == "deterministic":
        runs, interrupted = _run_deterministic(workspace, seeds, compile, callback, progress)
    else:
        if workspace.dtype != workspace.given_dtype:  # the other method was tried first
            workspace = checked(double=False)
        chosen = _default_estimator(workspace) if estimator is None else estimator
        runs, interrupted = stochastic(workspace, chosen)
    jumps = runs[0].jumps
    if jumps and method != "deterministic" and estimator is None and not interrupted:
        sites = [jump.site for jump in jumps]
        choice = Choice(
            "stochastic",
            f"the log density jumps in {' and '.join(map(repr, sites))}, where the score function "
            "is used",
        )
        score = Score(8, LeaveOneOut(), sites=sites)
        runs, interrupted = stochastic(checked(double=False), score)
    elbos = [_final_elbo(run, seed, interrupted) for run in runs] if len(runs) > 1 else []
    best = runs[int(np.argmax(np.nan_to_num(elbos, nan=-np.inf)))] if elbos else runs[0]
    result = finish(best, interrupted)
    result.restarts = elbos
    if interrupted or result.run.jumps or (not result.converged and steps is None):
        warnings.warn(result.convergence, ConvergenceWarning, stacklevel=2)
    return result


def _check_options(
    estimator: Any, optimizer: Any, schedule: Any, steps: int | None, compile: Any, subsample: Any
) -> None:
    if isinstance(estimator, type):
        raise TypeError(f"estimator is a class: write {estimator.__name__}()")
    if isinstance(optimizer, PyroOptim):
        raise TypeError(
            "optimizer is one of pyro.optim, which keeps parameters to itself: give the first step "
            "size of Adam, or lambda params: torch.optim.Adam(params, lr=0.01)"
        )
    if schedule is not None and steps is None:
        raise ValueError("schedule= needs steps=: it replaces the annealing that finds convergence")
    if compile not in ("auto", True, False):
        raise ValueError(f"compile must be 'auto', True or False, not {compile!r}")
    if subsample is not None and (not isinstance(subsample, Mapping) or len(subsample) != 1):
        raise ValueError("subsample takes one plate: {'name of the plate': minibatch size}")


def _default_estimator(workspace: Workspace) -> ELBO:
    sites = workspace.first_traces[0].nodes.items()
    discrete = [name for name, site in sites if not reparameterised(site)]
    return Score(8, LeaveOneOut(), sites=discrete) if discrete else Reparam()


def _run_deterministic(
    workspace: Workspace,
    seeds: Sequence[int],
    compile: str | bool,
    callback: Callback | None,
    show: bool,
) -> tuple[list[DeterministicRun], bool]:
    """A deterministic fit from each seed; whether Ctrl-C ended them."""
    runs: list[DeterministicRun] = []
    for k, seed in enumerate(seeds):
        own = workspace
        if k:
            own = workspace.unused(seed)
            own.set_up()
        runs.append(DeterministicRun(own, seed, compile))
        description = f"fit {k + 1}/{len(seeds)}" if len(seeds) > 1 else "fit"
        if runs[-1].start(description, show, callback):
            return runs, True
    return runs, False


def _final_elbo(run: Run, seed: int, interrupted: bool) -> float:
    if interrupted:  # no time for more
        last = run.elbo[-100:]
        return float(np.mean(last)) if len(last) else math.nan
    estimator = run.stages.estimator if isinstance(run, StochasticRun) else None
    return elbo_estimate(run.workspace, ELBO_DRAWS, derived_seed(seed, 3), estimator)[0]
