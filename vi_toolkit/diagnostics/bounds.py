"""How wrong the guide's means and sds can be: bounds in Wasserstein distance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import matplotlib
import numpy as np
import torch

from vi_toolkit.diagnostics.importance import WeightedDraws, draws_from_guide
from vi_toolkit.diagnostics.pareto import ParetoK, pareto_k, smoothed
from vi_toolkit.figures import COLOURS, MOST_SCALARS, PALE, REFERENCE, STYLE, Figure, wrapped
from vi_toolkit.result import Fit


@dataclass(frozen=True, eq=False)
class ErrorBounds:
    """Bounds on the Wasserstein distances between the guide's marginals and the posterior's.

    Attributes:
        names: names of the scalars on the unconstrained scale, (d,).
        mean: bound on the error of each mean, (d,). It bounds the distance W1, and therefore the
            error of the expectation of every function of that scalar with slope at most 1. Infinite
            if the weights cannot be used.
        sd: bound on the error of each sd, (d,), which bounds the distance W2; infinite likewise.
        guide_sd: the guide's sds, the unit in which to read the bounds, (d,).
        pareto_k: of the weights.
    """

    names: list[str]
    mean: np.ndarray
    sd: np.ndarray
    guide_sd: np.ndarray
    pareto_k: ParetoK

    @property
    def meaning(self) -> str:
        """The result in one sentence."""
        if not self.pareto_k.reliable:
            return f"no bounds: {self.pareto_k.fault}"
        mean, sd = self.mean / self.guide_sd, self.sd / self.guide_sd
        return (
            f"means are within {mean.max():.3f} and sds within {sd.max():.3f} guide sds of the "
            f"posterior's (loosest for {self.names[int(mean.argmax())]} and "
            f"{self.names[int(sd.argmax())]})"
        )

    def __repr__(self) -> str:
        return f"Error bounds of {len(self.names)} scalars: {self.meaning}"

    def plot(self) -> Figure:
        """Figure with the bounds of every scalar, in the guide's sds, the largest first."""
        mean, sd = self.mean / self.guide_sd, self.sd / self.guide_sd
        order = np.argsort(-mean, kind="stable")[:MOST_SCALARS][::-1]
        heights = np.arange(len(order))
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(6.4, 1.3 + 0.2 * max(len(order), 4)), layout="constrained")
            axes = figure.subplots()
            if not np.isfinite(mean).all():
                axes.axis("off")
                axes.text(0, 1, wrapped([self.meaning], 80), va="top", fontsize=9)
                return figure
            for k, (label, bound) in enumerate((("mean", mean), ("sd", sd))):
                axes.plot(bound[order], heights, "o", ms=4.5, color=COLOURS[k], label=label)
            axes.axvspan(0, 0.05, color=REFERENCE, lw=0)
            axes.set_yticks(heights, [self.names[i] for i in order])
            axes.set_xlim(0, 1.08 * max(mean.max(), sd.max(), 0.05))
            axes.set_xlabel("the error is at most (guide's sds)")
            axes.legend(frameon=False, fontsize=8, loc="lower right")
            hidden = len(mean) - len(order)
            axes.set_title("Bounds" + (f", without the {hidden} smallest" if hidden else ""))
            axes.grid(axis="x", color=PALE, lw=0.7)
            axes.set_axisbelow(True)
        return figure


def error_bounds(
    fit: Fit, num_draws: int | None = None, repetitions: int = 8, seed: int = 0
) -> ErrorBounds:
    r"""Bounds on the error of every mean and sd, from the guide's importance weights.

    With normalised weights w = p(u | x) / q(u) and m the guide's mean of a scalar u,

    .. math:: W_1(p, q) \le E_q\big[|u - m| \, |w - 1|\big], \qquad
              W_2(p, q)^2 \le 2 E_q\big[(u - m)^2 \, |w - 1|\big]

    (Villani 2009, theorem 6.15). Means differ by at most W1 and sds by at most W2. By the
    Cauchy-Schwarz inequality these bounds are no larger than those of Huggins et al. in terms of
    the Rényi divergence D2, :math:`2 E_q[|u - m|^{2p}]^{1/2p} (\exp D_2 - 1)^{1/2p}`, and they
    exist where D2 is infinite.

    They hold for the worst posterior with such weights. The errors themselves, which
    :func:`~vi_toolkit.diagnose` estimates, are often several times smaller. The sums are estimates
    and miss mass that no draw visits. Noise in the weights alone keeps the bound on an sd above
    zero, because that bound is a square root.

    Args:
        fit: a :class:`~vi_toolkit.Fit` on full data.
        num_draws: number of draws per repetition; None for as many as are cheap.
        repetitions: number of sets of draws.
        seed: of the draws.

    References:
        Huggins, Kasprzak, Campbell and Broderick, "Validated Variational Inference via Practical
        Posterior Error Bounds", AISTATS 2020; Villani, "Optimal Transport, Old and New", 2009.

    Example:
        >>> import pyro, pyro.distributions as dist, vi_toolkit as vi
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> bool(vi.error_bounds(vi.fit(model, AutoNormal, {}, progress=False)).mean[0] < 0.01)
        True
    """
    return bounds_of(fit, draws_from_guide(fit, num_draws, repetitions, seed))


def bounds_of(fit: Fit, draws: WeightedDraws) -> ErrorBounds:
    """The bounds from weighted draws of the guide."""
    first, second, sds = [], [], []
    for u, log_weights in draws:
        x = u.numpy()
        off = np.abs(x - x.mean(0))
        excess = np.abs(len(x) * smoothed(log_weights) - 1)
        first.append(excess @ off / len(x))
        second.append(excess @ off**2 / len(x))
        sds.append(x.std(0))
    k = pareto_k(torch.stack([w for _, w in draws]))
    usable = 1.0 if k.reliable else math.inf
    return ErrorBounds(
        names=list(fit.joint.names),
        mean=usable * np.mean(first, 0),
        sd=usable * np.sqrt(2 * np.mean(second, 0)),
        guide_sd=np.mean(sds, 0),
        pareto_k=k,
    )
