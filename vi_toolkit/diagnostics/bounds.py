"""How wrong the guide's means and sds can be: bounds in Wasserstein distance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vi_toolkit.diagnostics.importance import Sample, weighted_draws
from vi_toolkit.diagnostics.pareto import ParetoK, pareto_k, smoothed

if TYPE_CHECKING:
    from vi_toolkit.figures import Figure


@dataclass(frozen=True, eq=False)
class ErrorBounds:
    """Bounds on the Wasserstein distances of the guide's marginals from the posterior's.

    Attributes:
        names: of the scalars on the unconstrained scale, (d,).
        mean: bound on the error of each mean, the distance W1: it bounds the error of the
            expectation of every function of that scalar with slope at most 1; (d,), inf where the
            weights cannot be used.
        sd: bound on the error of each sd, the distance W2, (d,) likewise.
        guide_sd: the guide's sds, as a unit to read the others in, (d,).
        pareto_k: of the weights.
    """

    names: list[str]
    mean: np.ndarray
    sd: np.ndarray
    guide_sd: np.ndarray
    pareto_k: ParetoK

    @property
    def meaning(self) -> str:
        """In plain words."""
        if not self.pareto_k.reliable:
            return f"no bounds: {self.pareto_k.fault}"
        mean, sd = self.mean / self.guide_sd, self.sd / self.guide_sd
        return (
            f"means are within {mean.max():.3f} and sds within {sd.max():.3f} guide sds of the "
            f"posterior's (loosest for {self.names[int(mean.argmax())]} and "
            f"{self.names[int(sd.argmax())]})"
        )

    def plot(self) -> Figure:
        """The bounds of every scalar, in the guide's sds."""
        from vi_toolkit.figures import plot_bounds

        return plot_bounds(self)

    def __repr__(self) -> str:
        return f"Error bounds of {len(self.names)} scalars: {self.meaning}"


def error_bounds(
    fit: Any, num_draws: int | None = None, repetitions: int = 8, seed: int = 0
) -> ErrorBounds:
    r"""Bounds on the error of every mean and sd, from the guide's importance weights.

    With normalised weights w = p(u | x) / q(u) and m the guide's mean of a scalar u,

    .. math:: W_1(p, q) \le E_q\big[|u - m| \, |w - 1|\big], \qquad
              W_2(p, q)^2 \le 2 E_q\big[(u - m)^2 \, |w - 1|\big]

    (Villani 2009, theorem 6.15), and means differ by at most W1, sds by at most W2. By the
    inequality of Cauchy and Schwarz these are no larger than the bounds of Huggins et al. in terms
    of the Rényi divergence D2,
    :math:`2 E_q[|u - m|^{2p}]^{1/2p} (\exp D_2 - 1)^{1/2p}`, and they exist where D2 is infinite.

    They hold for the worst posterior with such weights: errors by importance sampling
    (:func:`~vi_toolkit.importance_moments`) are often several times smaller. The sums are estimates
    and miss mass that no draw visits; W2, being a square root, has a floor from the weights' noise.

    Args:
        fit: a :class:`~vi_toolkit.Fit` on full data.
        num_draws: per repetition; None for as many as is cheap.
        repetitions: sets of draws.
        seed: of the draws.

    References:
        Huggins, Kasprzak, Campbell and Broderick, "Validated Variational Inference via Practical
        Posterior Error Bounds", AISTATS 2020; Villani, "Optimal Transport, Old and New", 2009.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, vi_toolkit as vi
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> bool(vi.error_bounds(vi.fit(model, AutoNormal, {}, progress=False)).mean[0] < 0.01)
        True
    """
    return bounds_of(fit, weighted_draws(fit, None, num_draws, repetitions, seed))


def bounds_of(fit: Any, sample: Sample) -> ErrorBounds:
    """The bounds from draws of the guide."""
    first, second, sds = [], [], []
    for u, log_weights in sample:
        x = u.numpy()
        off = np.abs(x - x.mean(0))
        excess = np.abs(len(x) * smoothed(log_weights) - 1)
        first.append(excess @ off / len(x))
        second.append(excess @ off**2 / len(x))
        sds.append(x.std(0))
    k = pareto_k(torch.stack([w for _, w in sample]))
    usable = 1.0 if k.reliable else math.inf
    return ErrorBounds(
        names=list(fit.joint.names),
        mean=usable * np.mean(first, 0),
        sd=usable * np.sqrt(2 * np.mean(second, 0)),
        guide_sd=np.mean(sds, 0),
        pareto_k=k,
    )
