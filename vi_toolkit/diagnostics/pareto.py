"""Pareto-smoothed importance sampling: how far importance weights can be trusted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from vi_toolkit.arviz_adapter import psislw
from vi_toolkit.programs.joint import Joint
from vi_toolkit.result import Fit

# Limits of k-hat: below the first the weights have a finite variance, above the second averages
# converge too slowly.
GOOD, USABLE = 0.5, 0.7
UNSEEN = 2e-3  # share of the mass: five sds away it moves a mean by 0.01 sd and an sd by 2.5 %


@dataclass(frozen=True)
class ParetoK:
    """The tail of the importance weights p(x, z) / q(z), over several sets of draws.

    k-hat alone rejects correct fits, because the k-hat of one set of draws has a standard deviation
    of 0.05 to 0.08 and because small errors add up in many dimensions. It also accepts weights of
    which a few carry most of the mass. It describes the *shape* of the tail, and ``unseen`` the
    mass in it. Neither detects mass in places where q has no draws; compare the ELBOs of several
    starts for that.

    Attributes:
        k: fitted Pareto shape k-hat, mean over repetitions.
        k_se: Monte Carlo standard error of that mean.
        effective_fraction: effective sample size of the smoothed weights over the number of draws.
        sd_log_weight: sd of log p(x, z) - log q(z), in nats; 0 for an exact posterior.
        num_draws: number of draws per repetition.
        repetitions: number of sets of draws.
        unseen: estimated share of the posterior mass where the weights are larger than all those
            drawn. It is w / (1 - k), where w is the share of the largest smoothed weight among all
            draws: a Pareto tail has that much mass beyond its quantile 1 - 1/S. Infinite for
            k >= 1.

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
        """Largest usable k-hat for this number of draws S, 1 - 1 / log10(S) (Vehtari et al.)."""
        return 1 - 1 / math.log10(max(self.num_draws, 11))

    @property
    def reliable(self) -> bool:
        """Whether averages with these weights can be used.

        They can if k-hat is below ``limit`` and at most 0.2 % of the mass is unseen. Vehtari et al.
        also reject k-hat above 0.7, where averages may converge too slowly. ``unseen`` measures
        directly whether they have converged: a heavy tail with little mass does no harm, and a
        lighter tail with much mass does.
        """
        return self.k < self.limit and self.unseen <= UNSEEN

    @property
    def fault(self) -> str:
        """The reason why they cannot be used; empty if they can."""
        if self.reliable:
            return ""
        if self.k >= self.limit:
            return (
                f"k-hat is {self.k:.2f}, above the limit of {self.limit:.2f} for {self.num_draws} "
                "draws"
            )
        return (
            f"about {self.unseen:.2g} of the mass is beyond the largest weight (k-hat {self.k:.2f})"
        )

    @property
    def meaning(self) -> str:
        """The result in one sentence."""
        if not self.reliable:
            return f"averages with these weights cannot be used: {self.fault}"
        share = f"the effective sample size is {100 * self.effective_fraction:.0f}% of the draws"
        if self.k < GOOD:
            return f"the weights have a finite variance; {share}"
        return f"the weights are usable, but their averages converge slowly; {share}"

    def __repr__(self) -> str:
        return (
            f"Pareto k-hat {self.k:.2f} ± {self.k_se:.2f}, effective fraction "
            f"{self.effective_fraction:.3f}, sd of log weights {self.sd_log_weight:.3f} "
            f"({self.repetitions} x {self.num_draws} draws): {self.meaning}"
        )


def pareto_k(log_weights: torch.Tensor | np.ndarray) -> ParetoK:
    r"""k-hat, effective fraction and spread of sets of importance weights.

    ArviZ fits a generalised Pareto distribution with shape k to the min(S / 5, 3 sqrt(S)) largest
    weights. Moments of the weights exist up to order :math:`1/k`.

    Args:
        log_weights: log p(x, z) - log q(z) at independent draws of q, (repetitions, S).

    Raises:
        ValueError: no draw of a repetition has a finite log weight.

    Example:
        >>> import torch, vi_toolkit as vi
        >>> vi.pareto_k(0.01 * torch.randn(8, 1000)).reliable
        True
    """
    weights = np.atleast_2d(np.asarray(log_weights, dtype=np.float64))
    _, ks, fractions = smoothed_with_shape(weights)
    finite = weights[np.isfinite(weights)]
    k, count = float(ks.mean()), len(ks)
    return ParetoK(
        k=k,
        k_se=float(ks.std(ddof=1) / math.sqrt(count)) if count > 1 else math.nan,
        effective_fraction=float(fractions.mean()),
        sd_log_weight=float(finite.std()),
        num_draws=weights.shape[1],
        repetitions=count,
        unseen=float(smoothed(weights.ravel()).max() / (1 - max(k, 0.0))) if k < 1 else math.inf,
    )


def smoothed(log_weights: torch.Tensor | np.ndarray) -> np.ndarray:
    """Pareto-smoothed, normalised weights of log weights; (..., S) -> (..., S)."""
    return smoothed_with_shape(log_weights)[0]


def smoothed_with_shape(
    log_weights: torch.Tensor | np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Smoothed, normalised weights, k-hat and effective fraction of each set of log weights.

    Args:
        log_weights: (..., S).

    Returns:
        Weights (..., S) with sum 1, k-hat (...) and effective fraction (...).

    Raises:
        ValueError: no weight of a set is finite.
    """
    rows = np.asarray(log_weights, dtype=np.float64)
    finite = np.isfinite(rows)
    if not finite.any(-1).all():
        raise ValueError("no draw has a finite log weight")
    if not finite.all():
        rows = np.where(finite, rows, -1e300)
    exact = np.ptp(rows, -1) < 1e-10  # weights without a tail to fit: q is the posterior
    weights, k = psislw(rows)
    weights -= weights.max(-1, keepdims=True)
    np.exp(weights, out=weights)
    weights /= weights.sum(-1, keepdims=True)
    count = rows.shape[-1]
    weights[exact] = 1 / count
    fraction = 1 / np.einsum("...s,...s->...", weights, weights) / count
    return weights, np.where(exact, 0.0, k), fraction


def psis(fit: Fit, num_draws: int | None = None, repetitions: int = 8, seed: int = 0) -> ParetoK:
    """k-hat of a fit's guide, from fresh draws.

    Args:
        fit: a :class:`~vi_toolkit.Fit` on full data.
        num_draws: number of draws per repetition; None for as many as are cheap, at most 50,000.
            Few draws bias the k-hat of a heavy tail downwards: 0.81 at 10,000 draws where it is
            0.95.
        repetitions: number of sets of draws.
        seed: of the draws.

    Example:
        >>> import pyro, pyro.distributions as dist, vi_toolkit as vi
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> vi.psis(vi.fit(model, AutoNormal, {}, progress=False)).reliable
        True
    """
    count = num_draws or affordable_draws(fit.joint, repetitions)
    return pareto_k(torch.stack([fit.log_weights(count, seed + r) for r in range(repetitions)]))


def affordable_draws(joint: Joint, repetitions: int, work: float = 4e7) -> int:
    """Draws per repetition, between 2,000 and 50,000, for ``work`` log densities of one datum."""
    return int(min(5e4, max(2e3, work / (repetitions * (joint.observations + joint.dim)))))
