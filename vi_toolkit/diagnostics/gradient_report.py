"""Variance and cost of gradient estimators, measured on the user's own model."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pyro
import pyro.poutine as poutine
import torch
from pyro.infer import ELBO

from vi_toolkit.estimators import LeaveOneOut, PathDerivative, Reparam, Score
from vi_toolkit.estimators.particles import pointwise
from vi_toolkit.estimators.reparam import reparameterised
from vi_toolkit.figures import COLOURS, PALE, STYLE, Figure
from vi_toolkit.fitting import fit
from vi_toolkit.preflight import preflight
from vi_toolkit.programs.isolation import random_state, seeded_state, set_random_state
from vi_toolkit.programs.minibatch_plan import minibatch_plan
from vi_toolkit.programs.minibatches import Minibatches, PlatePlan
from vi_toolkit.programs.sites import is_drawn, is_term
from vi_toolkit.programs.workspace import Workspace
from vi_toolkit.result import Fit

WARM_UP = 30  # gradients before measuring, from which baselines learn
WHERE = {"init": "at the start", "optimum": "at the optimum", "fit": "at the given fit"}


@dataclass
class GradientReport:
    """Signal, noise and cost of each estimator's gradient at one point of the parameter space.

    Attributes:
        table: a row per (estimator, site), with ``norm`` of the mean gradient, ``sd`` (root of its
            total variance) and ``snr`` (their ratio), and the standard errors ``norm_se``,
            ``sd_se`` and ``snr_se``.
        costs: a row per estimator, over all sites, with the total ``variance`` relative to the
            first estimator's, the median of ``ms per gradient`` in milliseconds, and the
            ``variance at equal time`` (variance times cost) relative to the first estimator's, each
            followed by its standard error (``variance_se``, ...).
        refused: estimator -> the reason why it cannot be used here.
        at: "init", "optimum" or "fit", the point where the gradients were taken.
        num_draws: number of gradients per estimator.
        mean, sd: estimator -> parameter -> array of the parameter's shape, on the unconstrained
            scale on which optimisers work.
    """

    table: pd.DataFrame
    costs: pd.DataFrame
    refused: dict[str, str]
    at: str
    num_draws: int
    mean: dict[str, dict[str, np.ndarray]] = field(repr=False)
    sd: dict[str, dict[str, np.ndarray]] = field(repr=False)

    def __repr__(self) -> str:
        lines = [f"Gradient estimators {WHERE[self.at]}, {self.num_draws} gradients each"]
        with pd.option_context("display.width", 120, "display.max_columns", 20):
            for table in (self.costs, self.table):
                lines += ["", table.map("{:.3g}".format).to_string()]
        lines += [f"{name}: not possible. {why}" for name, why in self.refused.items()]
        return "\n".join([*lines, "", self.best])

    @property
    def best(self) -> str:
        """The estimator of least variance at equal time, and those within two standard errors."""
        value, error = self.costs["variance at equal time"], self.costs["variance_at_equal_time_se"]
        if value.isna().all():
            return f"{self.costs.index[0]} has no variance here, so there is nothing to compare."
        first = value.idxmin()
        gap = 2 * np.hypot(error, error[first])
        close = [n for n in value.index[value - value[first] <= gap] if n != first]
        return f"Least variance at equal time: {first}" + (
            f" (within 2 standard errors of it: {', '.join(close)})." if close else "."
        )

    def plot(self) -> Figure:
        """Figure of the total variance per gradient and at equal time, on a log scale."""
        costs = self.costs
        heights = np.arange(len(costs))[::-1]
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(9, 1.1 + 0.35 * len(costs)), layout="constrained")
            both = figure.subplots(1, 2, sharex=True, sharey=True)
            for axes, column in zip(both, ("variance", "variance at equal time"), strict=True):
                value, error = costs[column], costs[_se(column)]
                low = np.minimum(2 * error, 0.95 * value)  # a log axis has no negative numbers
                axes.errorbar(value, heights, xerr=[low, 2 * error], fmt="o", ms=5, capsize=3,
                              color=COLOURS[0])  # fmt: skip
                axes.axvline(1, color="#AAAAAA", lw=1, zorder=0)
                axes.set(xscale="log", xlabel=f"{column}, relative to {costs.index[0]}")
                axes.grid(axis="x", color=PALE, lw=0.7)
                axes.set_axisbelow(True)
            low_limit, high_limit = both[0].get_xlim()
            if high_limit / low_limit < 30:  # a range that may have no labelled tick
                both[0].set_xlim(low_limit / 3, high_limit * 3)
            both[0].set_yticks(heights, costs.index)
            figure.suptitle(f"{WHERE[self.at].capitalize()}; bars are 2 standard errors",
                            x=0.01, ha="left", fontsize=10)  # fmt: skip
        return figure


def gradient_report(
    model: Callable[..., Any],
    guide: Any,
    data: Mapping[str, Any],
    estimators: Sequence[ELBO] | Mapping[str, ELBO] | None = None,
    *,
    at: str | Fit = "init",
    num_draws: int = 200,
    subsample: Mapping[str, int] | None = None,
    seed: int = 0,
) -> GradientReport:
    r"""Measure the gradients of several estimators for one model and guide, at one point.

    With g the gradient of the loss on the unconstrained scale, restricted to the parameters of a
    site, the report has :math:`\|E g\|`, :math:`\mathrm{sd} = \sqrt{\mathrm{tr\,Cov}\,g}` and their
    ratio, the signal-to-noise ratio. Per estimator it has the cost c of a gradient in time, and
    :math:`c \,\mathrm{tr\,Cov}\,g`, which compares averages of independent gradients that take the
    same time. Look at the start *and* at the optimum, because the order of the estimators often
    changes.

    Baselines learn from 30 gradients before the measurement and go on learning during it. The
    parameters do not move meanwhile, which flatters baselines that remember earlier steps: in a fit
    they lag. Times are taken in turns, one gradient of each estimator after the other, so that a
    busy machine slows all of them alike. The caller's parameters, random state and estimators do
    not change.

    Args:
        model, guide, data: as for :func:`~vi_toolkit.fit`.
        estimators: list, or label -> estimator. By default ``Reparam``, ``PathDerivative`` and
            ``Score`` without control variates, Rao-Blackwellised, and leave-one-out, with 8
            particles each. If only some sites can be reparameterised, also the score function for
            the others alone.
        at: "init", "optimum" (fits first, with the defaults of :func:`~vi_toolkit.fit`), or a
            :class:`~vi_toolkit.Fit`, whose model, data and parameters are then used.
        num_draws: number of gradients per estimator.
        subsample: plate name -> minibatch size. The variance then includes that of the minibatch.
        seed: of the draws.

    Returns:
        A :class:`GradientReport`. Its ``refused`` lists the estimators that this guide does not
        allow, each with the reason.

    Raises:
        PreflightError: model, guide and data do not fit together.
        ValueError: no estimator can be used, or an argument is wrong.

    References:
        Rainforth et al., "Tighter Variational Bounds are Not Necessarily Better", 2018, for the
        signal-to-noise ratio; Geffner and Domke, "Approximation Based Variance Reduction for
        Reparameterization Gradients", 2020, for the comparison at equal time.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, vi_toolkit as vi
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("observations", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> report = vi.gradient_report(model, AutoNormal, {"y": torch.arange(5.0)}, num_draws=50)
        >>> list(report.costs.columns[::2])
        ['variance', 'ms per gradient', 'variance at equal time']
        >>> bool(report.costs.loc["Score, naive", "variance"] > 1)  # relative to Reparam
        True
    """
    if num_draws < 10:
        raise ValueError(f"num_draws must be at least 10, not {num_draws!r}")
    if isinstance(at, Fit):
        workspace, where = at.workspace, "fit"
    elif at == "init":
        workspace, where = preflight(model, guide, data, subsample=subsample, seed=seed), at
    elif at == "optimum":
        workspace, where = fit(model, guide, data, seed=seed, progress=False).workspace, at
    else:
        raise ValueError(f'at must be "init", "optimum" or a Fit, not {at!r}')
    named = _named(estimators, workspace)
    return _measure(workspace, named, where, num_draws, subsample, seed)


def _named(estimators: Any, workspace: Workspace) -> dict[str, ELBO]:
    if estimators is None:
        sites = workspace.guide_trace.nodes.items()
        hard = [name for name, site in sites if not reparameterised(site)]
        chosen: dict[str, ELBO] = {}
        if not hard:
            chosen = {"Reparam": Reparam(8), "PathDerivative": PathDerivative(8)}
        chosen |= {
            "Score, naive": Score(8, rao_blackwell=False),
            "Score, Rao-Blackwell": Score(8),
            "Score, leave one out": Score(8, LeaveOneOut()),
        }
        drawn = [n for n, s in workspace.guide_trace.nodes.items() if is_drawn(s)]
        if hard and len(hard) < len(drawn):
            chosen["Score where needed, leave one out"] = Score(8, LeaveOneOut(), sites=hard)
        return chosen
    if isinstance(estimators, Mapping):
        return dict(estimators)
    names = [repr(e) if hasattr(e, "options") else type(e).__name__ for e in estimators]
    if len(set(names)) < len(names):
        raise ValueError(f"two estimators have the same name in {names}: give a dict of labels")
    return dict(zip(names, estimators, strict=True))


def _measure(
    workspace: Workspace,
    named: Mapping[str, ELBO],
    where: str,
    num_draws: int,
    subsample: Mapping[str, int] | None,
    seed: int,
) -> GradientReport:
    plan = None
    if subsample:
        ((plate, batch),) = subsample.items()
        plan = minibatch_plan(workspace, plate, batch)
    gradients: dict[str, list[dict[str, torch.Tensor]]] = {}
    seconds: dict[str, list[float]] = {}
    refused: dict[str, str] = {}
    with workspace.isolated(seeded_state(seed)):
        live: dict[str, tuple[ELBO, Minibatches | None, torch.Tensor]] = {}
        for k, (name, estimator) in enumerate(named.items()):
            own: Any = estimator.fresh() if hasattr(estimator, "fresh") else estimator
            generator = torch.Generator().manual_seed(seed)
            batches = Minibatches(plan.size, plan.batch, generator) if plan else None
            # Each has its own random numbers, so adding an estimator does not change the others.
            live[name] = (own, batches, seeded_state(seed + 7919 * k))
        for number in range(-WARM_UP, num_draws):
            for name in list(live):
                estimator, batches, state = live[name]
                set_random_state(state)
                try:
                    taken, found = _one(workspace, estimator, plan, batches)
                except (ValueError, NotImplementedError) as error:
                    if number > -WARM_UP:
                        raise
                    refused[name] = str(error).split("\n")[0]
                    del live[name]
                    continue
                live[name] = (estimator, batches, random_state())
                if number >= 0:
                    gradients.setdefault(name, []).append(found)
                    seconds.setdefault(name, []).append(taken)
        if not live:
            raise ValueError("no estimator can be used: " + "; ".join(refused.values()))
        owners = _owners(workspace)
    stacked = {
        name: {p: torch.stack([g[p] for g in rows]).double() for p in rows[0]}
        for name, rows in gradients.items()
    }
    rows, costs = {}, {}
    first: tuple[float, float, float, float] | None = None
    for name, by_parameter in stacked.items():
        for site, parameters in owners.items():
            rows[name, site] = _summary(torch.cat([by_parameter[p] for p in parameters], 1))
        variance, se = _total_variance(torch.cat(list(by_parameter.values()), 1))
        cost, cost_se = _median(seconds[name])
        if first is None:
            first = (variance, se, cost, cost_se)
        costs[name] = _relative(variance, se, cost, cost_se, first, name == next(iter(stacked)))
    table = pd.DataFrame(rows).T.rename_axis(["estimator", "site"])
    shapes = {n: p.shape for n, p in workspace.values.items()}
    moments = [
        {
            name: {p: f(g).reshape(shapes[p]).cpu().numpy() for p, g in by.items()}
            for name, by in stacked.items()
        }
        for f in (lambda g: g.mean(0), lambda g: g.std(0))
    ]
    frame = pd.DataFrame(costs).T.rename_axis("estimator")
    return GradientReport(table, frame, refused, where, num_draws, moments[0], moments[1])


def _one(
    workspace: Workspace, estimator: Any, plan: PlatePlan | None, batches: Minibatches | None
) -> tuple[float, dict[str, torch.Tensor]]:
    """One gradient: (seconds, parameter -> flat gradient)."""
    data: Mapping[str, Any] = workspace.data
    handler: contextlib.AbstractContextManager = contextlib.nullcontext()
    if plan is not None and batches is not None:
        data, handler = plan.apply(workspace.data, batches.next())
    leaves = dict(pyro.get_param_store().named_parameters())
    theirs = {n: leaf.grad for n, leaf in leaves.items()}
    for leaf in leaves.values():
        leaf.grad = None
    try:
        began = time.perf_counter()
        with handler:
            estimator.loss_and_grads(workspace.model, workspace.guide, **data)
        taken = time.perf_counter() - began
        found = {
            n: (torch.zeros_like(leaf) if leaf.grad is None else leaf.grad).detach().reshape(-1)
            for n, leaf in leaves.items()
        }
    finally:
        for n, leaf in leaves.items():
            leaf.grad = theirs[n]
    return taken, found


def _owners(workspace: Workspace) -> dict[str, list[str]]:
    """Site -> names of its distribution's parameters; sites that share them are named together."""
    trace = poutine.trace(workspace.guide).get_trace(**workspace.data)
    # With the values held fixed, a site's density depends on its own parameters only.
    held = poutine.trace(poutine.replay(workspace.guide, trace=_detached(trace)))
    nodes = held.get_trace(**workspace.data).nodes
    leaves = dict(pyro.get_param_store().named_parameters())
    users: dict[str, list[str]] = {n: [] for n in leaves}
    for name, site in nodes.items():
        if not is_term(site):
            continue
        density = pointwise(site)[0].sum() if is_drawn(site) else site["fn"].log_prob(site["value"])
        density = density.sum() + (0.0 if is_drawn(site) else _location(site))
        if not density.requires_grad:
            continue
        grads = torch.autograd.grad(
            density, list(leaves.values()), retain_graph=True, allow_unused=True
        )
        for parameter, g in zip(leaves, grads, strict=True):
            if g is not None:
                users[parameter].append(name.removesuffix("_unconstrained"))
    owners: dict[str, list[str]] = {}
    for parameter, sites in users.items():
        label = ", ".join(dict.fromkeys(sites)) or "model"
        owners.setdefault(label, []).append(parameter)
    return owners


def _location(site: dict[str, Any]) -> Any:
    """Location of a point mass, through which gradients reach its parameters; 0 for others."""
    value = site["fn"]
    while hasattr(value, "base_dist"):
        value = value.base_dist
    return value.v.sum() if hasattr(value, "v") else 0.0


def _detached(trace: Any) -> Any:
    trace = trace.copy()
    for name in list(trace.nodes):
        node = trace.nodes[name] = dict(trace.nodes[name])
        if node["type"] != "sample" or (is_term(node) and not is_drawn(node)):
            del trace.nodes[name]
        elif torch.is_tensor(node["value"]):
            node["value"] = node["value"].detach()
    return trace


def _total_variance(g: torch.Tensor) -> tuple[float, float]:
    """(trace of the covariance, standard error) of draws (n, d)."""
    n = len(g)
    squares = (g - g.mean(0)).square().sum(1) * n / (n - 1)
    return float(squares.mean()), float(squares.std()) / math.sqrt(n)


def _summary(g: torch.Tensor) -> dict[str, float]:
    n = len(g)
    mean, (variance, se) = g.mean(0), _total_variance(g)
    # On average, the squared norm of a mean over n draws is too large by variance / n.
    norm = math.sqrt(max(float(mean.square().sum()) - variance / n, 0.0))
    length = float(mean.norm())
    along = float((g @ (mean / length)).std()) / math.sqrt(n) if length else 0.0
    sd = math.sqrt(variance)
    sd_se = se / (2 * sd) if sd else 0.0
    snr = norm / sd if sd else math.inf
    snr_se = math.hypot(along / sd, snr * sd_se / sd) if sd else 0.0
    return {"norm": norm, "norm_se": along, "sd": sd, "sd_se": sd_se, "snr": snr, "snr_se": snr_se}


def _median(seconds: list[float]) -> tuple[float, float]:
    """(median, its standard error) in milliseconds, by the spread of the middle half."""
    t = np.asarray(seconds) * 1e3
    low, middle, high = np.quantile(t, [0.25, 0.5, 0.75])
    return float(middle), float(1.2533 * (high - low) / 1.349 / math.sqrt(len(t)))


def _relative(
    variance: float,
    se: float,
    cost: float,
    cost_se: float,
    first: tuple[float, float, float, float],
    is_first: bool,
) -> dict[str, float]:
    v0, v0_se, c0, c0_se = first
    zero = v0 == 0
    ratio = math.nan if zero else variance / v0
    equal = math.nan if zero else ratio * cost / c0
    parts = [se / variance if variance else 0.0, 0.0 if zero else v0_se / v0]
    times = [cost_se / cost, c0_se / c0]
    own = 0.0 if is_first else 1.0
    return {
        "variance": ratio,
        "variance_se": own * ratio * math.hypot(*parts),
        "ms per gradient": cost,
        "ms_per_gradient_se": cost_se,
        "variance at equal time": equal,
        "variance_at_equal_time_se": own * equal * math.hypot(*parts, *times),
    }


def _se(column: str) -> str:
    """Name of the column with a column's standard error."""
    return f"{column.replace(' ', '_')}_se"
