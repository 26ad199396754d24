"""k-hat of each datum's own latents: for which data the guide is far from the posterior."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import pyro.poutine as poutine
import torch

from vi_toolkit.diagnostics.pareto import USABLE, pareto_k
from vi_toolkit.figures import COLOURS, LIMIT, STYLE, Figure
from vi_toolkit.programs.isolation import seeded_state
from vi_toolkit.programs.noise import FunctionalNoise
from vi_toolkit.programs.sites import latent_sites
from vi_toolkit.programs.vectorise import Batched
from vi_toolkit.programs.workspace import Workspace
from vi_toolkit.result import Fit

MOST_NUMBERED = 5  # of the worst data, in words and in the figure


@dataclass(frozen=True, eq=False)
class LocalParetoK:
    """k-hat of the latents in a plate of n data, given the latents outside it.

    Attributes:
        plate: name of the plate.
        sites: names of the latents in it.
        k: k-hat of each datum, mean over repetitions, (n,).
        k_se: Monte Carlo standard error of that mean, (n,).
        effective_fraction: effective sample size over the number of draws, (n,).
    """

    plate: str
    sites: list[str]
    k: np.ndarray
    k_se: np.ndarray
    effective_fraction: np.ndarray

    @property
    def bad(self) -> np.ndarray:
        """Indices of the data with k-hat of 0.7 or more, the worst first."""
        order = np.argsort(-self.k)
        return order[self.k[order] >= USABLE]

    @property
    def meaning(self) -> str:
        """The result in one sentence."""
        what = f"the guide of {', '.join(self.sites)}"
        if not len(self.bad):
            return (
                f"{what} can be used for all {len(self.k)} data (largest k-hat {self.k.max():.2f})"
            )
        worst = ", ".join(f"{i} ({self.k[i]:.2f})" for i in self.bad[:MOST_NUMBERED])
        more = ", ..." if len(self.bad) > MOST_NUMBERED else ""
        return (
            f"{what} is far from the posterior for {len(self.bad)} of {len(self.k)} data in plate "
            f"{self.plate!r}: {worst}{more}"
        )

    def __repr__(self) -> str:
        return f"Local k-hat: {self.meaning}"

    def plot(self) -> Figure:
        """Figure with k-hat of every datum and two standard errors; the worst data are numbered."""
        data, error = np.arange(len(self.k)), 2 * np.nan_to_num(self.k_se)
        bad = np.zeros(len(self.k), dtype=bool)
        bad[self.bad] = True
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(7, 2.8), layout="constrained")
            axes = figure.subplots()
            for pick, colour in ((~bad, COLOURS[0]), (bad, COLOURS[1])):
                axes.errorbar(data[pick], self.k[pick], yerr=error[pick], fmt="o", ms=3.5,
                              lw=0.8, color=colour)  # fmt: skip
            for i in self.bad[:MOST_NUMBERED]:
                axes.annotate(str(i), (i, self.k[i]), (4, 3), textcoords="offset points",
                              fontsize=8)  # fmt: skip
            axes.axhline(USABLE, **LIMIT)
            axes.margins(y=0.12)
            axes.set_xlabel(self.plate)
            axes.set_ylabel("k-hat")
            sites = ", ".join(self.sites)
            axes.set_title(f"{sites}: {len(self.bad)} of {len(self.k)} with k-hat of 0.7 or more")
        return figure


def local_psis(
    fit: Fit,
    plate: str | None = None,
    num_draws: int = 2_000,
    repetitions: int = 4,
    seed: int = 0,
) -> LocalParetoK:
    r"""k-hat of each datum, for a model with local latents in a plate over the data.

    One k-hat for all latents together says little if thousands of them are local. Given the global
    latents :math:`\beta` the local ones are independent, and each datum has weights

    .. math:: w_i = \frac{p(x_i, z_i \mid \beta)}{q(z_i \mid \beta)}.

    Each repetition draws the global latents once from the guide and the local ones many times. Its
    k-hat therefore measures only how well q(z_i | beta) approximates p(z_i | x_i, beta).

    Args:
        fit: a :class:`~vi_toolkit.Fit` on full data, whose guide has the same plate.
        plate: name of the plate; None if only one has latents in it.
        num_draws: number of draws of the local latents per repetition.
        repetitions: number of draws of the global latents.
        seed: of the draws.

    Raises:
        ValueError: no such plate, or a guide whose density does not factor over it
            (``AutoMultivariateNormal`` draws all latents at once).

    References:
        Yao, Vehtari, Simpson and Gelman, "Yes, but Did It Work?", ICML 2018, section 3.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, vi_toolkit as vi
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         z = pyro.sample("z", dist.Normal(mu, 1.0))
        ...         pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        >>> fit = vi.fit(model, AutoNormal, {"y": torch.zeros(3)}, progress=False)
        >>> vi.local_psis(fit).bad
        array([], dtype=int64)
    """
    workspace = fit.workspace
    workspace.require_guide_density("An importance weight")
    workspace.require_whole_plates()
    frame = _frame(workspace, plate)
    guide_sites = _in_plate(workspace.guide_trace, frame.name)
    in_plate = _in_plate(workspace.model_trace, frame.name)
    sites = [name for name in latent_sites(workspace.model_trace) if name in in_plate]

    def per_datum(trace: Any) -> torch.Tensor:
        trace.compute_log_prob()
        total: Any = 0.0
        for name in _in_plate(trace, frame.name):
            log_prob = trace.nodes[name]["log_prob"]
            dim = log_prob.dim() + frame.dim
            others = [d for d in range(log_prob.dim()) if d != dim]
            total = total + (log_prob.sum(others) if others else log_prob)
        return total

    rows = []
    for r in range(repetitions):
        with workspace.isolated(seeded_state(fit.derived_seed(seed + r, 5))), torch.no_grad():
            globals_only: Any = poutine.trace(workspace.guide).get_trace(**workspace.data)
            for name in guide_sites:
                globals_only.remove_node(name)
            _check_that_locals_move(workspace, globals_only, sites, frame.name)

            def one(_: torch.Tensor, globals_only: Any = globals_only) -> torch.Tensor:
                with FunctionalNoise():
                    replayed = poutine.replay(workspace.guide, trace=globals_only)
                    trace = poutine.trace(replayed).get_trace(**workspace.data)
                    model = poutine.trace(poutine.replay(workspace.model, trace=trace))
                    model_trace = model.get_trace(**workspace.data)
                return per_datum(model_trace) - per_datum(trace)

            many = Batched(one, workspace.chunk, random=True)
            rows.append(many(torch.zeros(num_draws)).double())
    weights = torch.stack(rows).numpy()  # (repetitions, draws, n)
    found = [pareto_k(weights[:, :, i]) for i in range(frame.size)]
    return LocalParetoK(
        frame.name,
        sites,
        np.array([f.k for f in found]),
        np.array([f.k_se for f in found]),
        np.array([f.effective_fraction for f in found]),
    )


def _check_that_locals_move(
    workspace: Workspace, globals_only: Any, sites: list[str], plate: str
) -> None:
    """Raise ValueError if the guide's global latents already determine the local ones."""
    replayed = poutine.trace(poutine.replay(workspace.guide, trace=globals_only))
    first, second = (replayed.get_trace(**workspace.data).nodes for _ in range(2))
    for name in sites:
        if torch.equal(first[name]["value"], second[name]["value"]):
            raise ValueError(
                f"The guide draws {name!r} outside the plate {plate!r}, so its density has no "
                "factor per datum. AutoNormal and guides that open the same plate have one."
            )


def _in_plate(trace: Any, plate: str) -> list[str]:
    return [
        name
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and any(f.name == plate for f in site["cond_indep_stack"])
    ]


def _frame(workspace: Workspace, plate: str | None) -> Any:
    frames = {
        f.name: f
        for site in latent_sites(workspace.model_trace).values()
        for f in site["cond_indep_stack"]
        if f.dim is not None
    }
    if plate is None and len(frames) == 1:
        return next(iter(frames.values()))
    if plate not in frames:
        there = ", ".join(map(repr, frames)) or "none"
        raise ValueError(
            f"which plate? The plates with latents in them are: {there}"
            if plate is None
            else f"no latent is in a plate {plate!r}; plates with latents in them: {there}"
        )
    return frames[plate]
