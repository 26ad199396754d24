"""Pareto-smoothed importance sampling: how far importance weights can be believed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vi_toolkit.arviz_adapter import psislw

GOOD, USABLE = 0.5, 0.7  # shape of the weights' tail: finite variance below 1/2
UNSEEN = 2e-3  # share of the mass: at five sds it moves a mean by 0.01 sd and an sd by 2.5 %


@dataclass(frozen=True)
class ParetoK:
    """The tail of the importance weights p(x, z) / q(z), over several sets of draws.

    k-hat by itself condemns correct fits (its single-run standard deviation is 0.05 to 0.08, and
    in many dimensions small errors add up), and passes weights of which a few carry much. It is
    the *shape* of a tail; ``unseen`` is how much is in it. Neither says anything of mass that q
    never visits: look at the ELBOs of other starts.

    Attributes:
        k: mean over repetitions of the fitted Pareto shape k-hat.
        k_se: Monte Carlo standard error of that mean.
        effective_fraction: effective sample size of the smoothed weights, over the draws.
        sd_log_weight: sd of log p(x, z) - log q(z), in nats; 0 for an exact posterior.
        unseen: estimated share of the posterior's mass where the weights are larger than any that
            was drawn, w / (1 - k) with w the largest smoothed weight's share of all draws' (what a
            Pareto tail has beyond its quantile 1 - 1/S); infinite for k of 1 or more.
        draws: draws per repetition.
        repetitions: how many sets of draws.

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry, "Pareto Smoothed Importance Sampling", JMLR 2024;
        Yao, Vehtari, Simpson and Gelman, "Yes, but Did It Work?", ICML 2018.
    """

    k: float
    k_se: float
    effective_fraction: float
    sd_log_weight: float
    num_draws: int
    repetitions: int
    unseen: float = 0.0

    @property
    def limit(self) -> float:
        """k above which so many draws say nothing: 1 - 1 / log10(draws), Vehtari et al. (2024)."""
        return 1 - 1 / math.log10(max(self.num_draws, 11))

    @property
    def reliable(self) -> bool:
        """Whether averages with these weights can be used.

        k-hat below ``limit``, and at most 0.2 % of the mass unseen. Vehtari et al. also stop at
        k = 0.7, beyond which an average may converge too slowly; whether it has, ``unseen`` says of
        the draws at hand: a little mass in a heavy tail does no harm, much of it in a lighter
        tail does.
        """
        return self.k < self.limit and self.unseen <= UNSEEN

    @property
    def fault(self) -> str:
        """Why they cannot be used, in words; empty if they can."""
        if self.reliable:
            return ""
        if self.k >= self.limit:
            return f"k-hat is {self.k:.2f}, where {self.limit:.2f} is the most for {self.num_draws} draws"
        return (
            f"about {self.unseen:.2g} of the mass is beyond the largest weight (k-hat {self.k:.2f})"
        )

    @property
    def meaning(self) -> str:
        """In plain words."""
        share = f"{100 * self.effective_fraction:.0f}% of the draws count"
        if not self.reliable:
            return f"averages with these weights cannot be used: {self.fault}"
        if self.k < GOOD:
            return f"the weights have a finite variance; {share}"
        return f"the weights are usable, their averages converge slowly; {share}"

    def __repr__(self) -> str:
        return (
            f"Pareto k-hat {self.k:.2f} ± {self.k_se:.2f}, effective fraction "
            f"{self.effective_fraction:.3f}, sd of log weights {self.sd_log_weight:.3f} "
            f"({self.repetitions} x {self.num_draws} draws): {self.meaning}"
        )


def pareto_k(log_weights: torch.Tensor | np.ndarray) -> ParetoK:
    r"""k-hat, effective fraction and spread of sets of importance weights.

    The largest weights, min(S / 5, 3 sqrt(S)) of them, are fitted by a generalised Pareto
    distribution with shape k (ArviZ's ``psislw``). The weights' :math:`1/k`-th moment is the last
    that exists.

    Args:
        log_weights: (repetitions, S), log p(x, z) - log q(z) at independent draws of q.

    Example:
        >>> import torch
        >>> from vi_toolkit.diagnostics import pareto_k
        >>> pareto_k(0.01 * torch.randn(8, 1000)).reliable
        True
    """
    weights = np.atleast_2d(np.asarray(log_weights, dtype=np.float64))
    if not np.isfinite(weights).any(1).all():
        raise ValueError("no draw has a finite log weight")
    ks, fractions = zip(*(smoothed_with_shape(row)[1:] for row in weights), strict=True)
    finite = weights[np.isfinite(weights)]
    count = len(ks)
    return ParetoK(
        k=float(np.mean(ks)),
        k_se=float(np.std(ks, ddof=1) / math.sqrt(count)) if count > 1 else math.nan,
        effective_fraction=float(np.mean(fractions)),
        sd_log_weight=float(finite.std()),
        num_draws=weights.shape[1],
        repetitions=count,
        unseen=_unseen(weights, float(np.mean(ks))),
    )


def _unseen(weights: np.ndarray, k: float) -> float:
    """Mass beyond the largest weight of a tail with shape k, from (repetitions, S) log weights."""
    return float(smoothed(weights.ravel()).max() / (1 - max(k, 0.0))) if k < 1 else math.inf


def smoothed(log_weights: torch.Tensor | np.ndarray) -> np.ndarray:
    """Pareto-smoothed, normalised weights (S,) of log weights (S,)."""
    return smoothed_with_shape(np.asarray(log_weights, dtype=np.float64))[0]


def smoothed_with_shape(row: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Smoothed, normalised weights (S,) of log weights (S,), their k-hat and effective fraction."""
    row = np.where(np.isfinite(row), row, -1e300)
    if np.ptp(row) < 1e-10:  # an exact posterior: nothing to smooth
        return np.full(len(row), 1 / len(row)), 0.0, 1.0
    log_smooth, k = psislw(row)
    weights = np.exp(log_smooth - log_smooth.max())
    weights /= weights.sum()
    return weights, float(k), float(1 / (weights**2).sum() / len(row))


def psis(fit: Any, num_draws: int | None = None, repetitions: int = 8, seed: int = 0) -> ParetoK:
    """k-hat of a fit's guide, from fresh draws.

    Args:
        fit: a :class:`~vi_toolkit.Fit` on full data.
        num_draws: per repetition; None for as many as is cheap, at most 50,000. (k-hat of a long tail
            is biased low with few: 0.81 at 10,000 draws where it is 0.95.)
        repetitions: sets of draws.
        seed: of the draws.
    """
    count = num_draws or affordable_draws(fit.joint, repetitions)
    return pareto_k(torch.stack([fit.log_weights(count, seed + r) for r in range(repetitions)]))


def affordable_draws(joint: Any, repetitions: int, work: float = 4e7) -> int:
    """Draws per repetition, between 2,000 and 50,000, for ``work`` log densities of one datum."""
    return int(min(5e4, max(2e3, work / (repetitions * (joint.observations + joint.dim)))))
