"""Pareto-smoothed importance sampling: how far importance weights can be believed."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import arviz as az
import numpy as np
import torch

GOOD, USABLE = 0.5, 0.7  # shape of the weights' tail: finite variance below 1/2


@dataclass(frozen=True)
class ParetoK:
    """The tail of the importance weights p(x, z) / q(z), over several sets of draws.

    k-hat by itself condemns correct fits (its single-run standard deviation is 0.05 to 0.08, and
    in many dimensions small errors add up) and says nothing of mass that q never visits. Read it
    with the other two numbers, and with the ELBOs of other starts.

    Attributes:
        k: mean over repetitions of the fitted Pareto shape k-hat.
        standard_error: Monte Carlo standard error of that mean.
        effective_fraction: effective sample size of the smoothed weights, over the draws.
        sd_log_weight: sd of log p(x, z) - log q(z), in nats; 0 for an exact posterior.
        draws: draws per repetition.
        repetitions: how many sets of draws.

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry, "Pareto Smoothed Importance Sampling", JMLR 2024;
        Yao, Vehtari, Simpson and Gelman, "Yes, but Did It Work?", ICML 2018.
    """

    k: float
    standard_error: float
    effective_fraction: float
    sd_log_weight: float
    draws: int
    repetitions: int

    @property
    def reliable(self) -> bool:
        """Whether estimates with these weights can be used: k-hat below 0.7."""
        return self.k < USABLE

    @property
    def meaning(self) -> str:
        """In plain words."""
        share = f"{100 * self.effective_fraction:.0f}% of the draws count"
        if self.k < GOOD:
            return f"the weights have a finite variance; {share}"
        if self.k < USABLE:
            return f"the weights are usable, their averages converge slowly; {share}"
        return "the weights are dominated by a few draws; averages with them mean nothing"

    def __repr__(self) -> str:
        return (
            f"Pareto k-hat {self.k:.2f} ± {self.standard_error:.2f}, effective fraction "
            f"{self.effective_fraction:.3f}, sd of log weights {self.sd_log_weight:.3f} "
            f"({self.repetitions} x {self.draws} draws): {self.meaning}"
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
        standard_error=float(np.std(ks, ddof=1) / math.sqrt(count)) if count > 1 else math.nan,
        effective_fraction=float(np.mean(fractions)),
        sd_log_weight=float(finite.std()),
        draws=weights.shape[1],
        repetitions=count,
    )


def smoothed(log_weights: torch.Tensor | np.ndarray) -> np.ndarray:
    """Pareto-smoothed, normalised weights (S,) of log weights (S,)."""
    return smoothed_with_shape(np.asarray(log_weights, dtype=np.float64))[0]


def smoothed_with_shape(row: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Smoothed, normalised weights (S,) of log weights (S,), their k-hat and effective fraction."""
    row = np.where(np.isfinite(row), row, -1e300)
    if np.ptp(row) < 1e-10:  # an exact posterior: nothing to smooth
        return np.full(len(row), 1 / len(row)), 0.0, 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ's advice on k-hat, which is given here in numbers
        log_smooth, k = az.psislw(row.copy())
    weights = np.exp(log_smooth - log_smooth.max())
    weights /= weights.sum()
    return weights, float(k), float(1 / (weights**2).sum() / len(row))


def psis(fit: Any, draws: int | None = None, repetitions: int = 8, seed: int = 0) -> ParetoK:
    """k-hat of a fit's guide, from fresh draws.

    Args:
        fit: a :class:`~vi_toolkit.Fit` on full data.
        draws: per repetition; None for as many as is cheap, at most 50,000. (k-hat of a long tail
            is biased low with few: 0.81 at 10,000 draws where it is 0.95.)
        repetitions: sets of draws.
        seed: of the draws.
    """
    count = draws or affordable_draws(fit.joint, repetitions)
    return pareto_k(torch.stack([fit.log_weights(count, seed + r) for r in range(repetitions)]))


def affordable_draws(joint: Any, repetitions: int, work: float = 4e7) -> int:
    """Draws per repetition, between 2,000 and 50,000, for ``work`` log densities of one datum."""
    return int(min(5e4, max(2e3, work / (repetitions * (joint.observations + joint.dim)))))
