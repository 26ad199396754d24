"""k-hat of every datum's own latents: which local approximations to believe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro.poutine as poutine
import torch

from vi_toolkit.diagnostics.pareto import USABLE, pareto_k
from vi_toolkit.programs.isolation import seeded_state
from vi_toolkit.programs.noise import FunctionalNoise
from vi_toolkit.programs.sites import latent_sites
from vi_toolkit.programs.vectorise import Batched

if TYPE_CHECKING:
    from vi_toolkit.figures import Figure


@dataclass(frozen=True, eq=False)
class LocalParetoK:
    """k-hat of the latents in a plate of n data, given the latents outside it.

    Attributes:
        plate: its name.
        sites: the latents in it.
        k: (n,), mean over repetitions.
        k_se: of that mean, (n,).
        effective_fraction: effective share of the draws, (n,).
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
        """In plain words."""
        what = f"the guide of {', '.join(self.sites)}"
        if not len(self.bad):
            return (
                f"{what} can be used for all {len(self.k)} data (largest k-hat {self.k.max():.2f})"
            )
        worst = ", ".join(f"{i} ({self.k[i]:.2f})" for i in self.bad[:5])
        more = ", ..." if len(self.bad) > 5 else ""
        return (
            f"{what} is far from the posterior for {len(self.bad)} of {len(self.k)} data in plate "
            f"{self.plate!r}: {worst}{more}"
        )

    def plot(self) -> Figure:
        """k-hat of every datum."""
        from vi_toolkit.figures import plot_local_psis

        return plot_local_psis(self)

    def __repr__(self) -> str:
        return f"Local k-hat: {self.meaning}"


def local_psis(
    fit: Any,
    plate: str | None = None,
    num_draws: int = 2_000,
    repetitions: int = 4,
    seed: int = 0,
) -> LocalParetoK:
    r"""k-hat per datum of a model with latents of its own for every datum.

    One k-hat for all latents together says little when there are thousands of local ones. Given
    the global latents :math:`\beta` the local ones are independent, and each datum has weights

    .. math:: w_i = \frac{p(x_i, z_i \mid \beta)}{q(z_i \mid \beta)}.

    Each repetition draws the globals once from the guide and then the locals many times, so that
    k-hat is that of q(z_i | beta) as an approximation of p(z_i | x_i, beta) alone.

    Args:
        fit: a :class:`~vi_toolkit.Fit` on full data, whose guide has the same plate.
        plate: name of the plate; None if only one has latents in it.
        num_draws: of the locals, per repetition.
        repetitions: draws of the globals.
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
    fit.workspace.require_guide_density("An importance weight")
    fit.workspace.require_whole_plates()
    frame = _frame(fit, plate)
    n = frame.size
    guide_sites = _in_plate(fit.workspace.guide_trace, frame.name)
    sites = [
        s
        for s in latent_sites(fit.workspace.model_trace)
        if s in _in_plate(fit.workspace.model_trace, frame.name)
    ]

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
        with fit.workspace.isolated(seeded_state(fit.derived_seed(seed + r, 5))), torch.no_grad():
            globals_only: Any = poutine.trace(fit.guide).get_trace(**fit.workspace.data)
            for name in guide_sites:
                globals_only.remove_node(name)
            _check_that_locals_move(fit, globals_only, sites, frame.name)

            def one(_: torch.Tensor, globals_only: Any = globals_only) -> torch.Tensor:
                with FunctionalNoise():
                    replayed = poutine.replay(fit.guide, trace=globals_only)
                    trace = poutine.trace(replayed).get_trace(**fit.workspace.data)
                    model = poutine.trace(poutine.replay(fit.model, trace=trace))
                    model_trace = model.get_trace(**fit.workspace.data)
                return per_datum(model_trace) - per_datum(trace)

            rows.append(
                Batched(one, fit.workspace.chunk, random=True)(torch.zeros(num_draws)).double()
            )
    weights = torch.stack(rows).numpy()  # (repetitions, draws, n)
    found = [pareto_k(weights[:, :, i]) for i in range(n)]
    return LocalParetoK(
        frame.name,
        sites,
        np.array([f.k for f in found]),
        np.array([f.k_se for f in found]),
        np.array([f.effective_fraction for f in found]),
    )


def _check_that_locals_move(fit: Any, globals_only: Any, sites: list[str], plate: str) -> None:
    """Given the guide's globals its locals must still be drawn, each in the plate."""
    replayed = poutine.trace(poutine.replay(fit.guide, trace=globals_only))
    first, second = (replayed.get_trace(**fit.workspace.data).nodes for _ in range(2))
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


def _frame(fit: Any, plate: str | None) -> Any:
    frames = {
        f.name: f
        for site in latent_sites(fit.workspace.model_trace).values()
        for f in site["cond_indep_stack"]
        if f.dim is not None
    }
    if plate is None and len(frames) == 1:
        return next(iter(frames.values()))
    if plate not in frames:
        there = ", ".join(map(repr, frames)) or "none"
        raise ValueError(
            f"which plate? Those with latents in them: {there}"
            if plate is None
            else f"no latent is in a plate {plate!r}; plates with latents in them: {there}"
        )
    return frames[plate]
