"""Has the optimiser arrived? The rung below all others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vi_toolkit.stochastic import ERROR_TOLERANCE, Stochastic


@dataclass(frozen=True, eq=False)
class Convergence:
    """Whether a fit is at the optimum of its ELBO.

    Attributes:
        converged: whether it is, to 0.02 posterior sds.
        monte_carlo_error: largest Monte Carlo error of the reported solution, in posterior sds.
        gradient: largest gradient of the fixed-draw ELBO per posterior sd (deterministic), or nan.
        r_hat: largest split R-hat over the variational parameters' iterates (stochastic), or nan.
        effective_iterates: smallest effective sample size of these iterates, or nan.
        restart_gap: ELBO of the best restart minus that of the second, in nats, or nan.
        sentence: the same in words, with what to do.
    """

    converged: bool
    monte_carlo_error: float
    gradient: float
    r_hat: float
    effective_iterates: float
    restart_gap: float
    sentence: str

    @property
    def meaning(self) -> str:
        return self.sentence

    def __repr__(self) -> str:
        return f"Convergence: {self.sentence}"


def convergence(fit: Any) -> Convergence:
    """Summary of how a fit ended.

    For a stochastic fit, R-hat and effective sample size treat the block means of the last stage's
    iterates as two half chains: iterates that still go somewhere have an R-hat above 1.1.

    Args:
        fit: a :class:`~vi_toolkit.Fit`.

    References:
        Dhaka et al., "Robust, Accurate Stochastic Optimization for Variational Inference",
        NeurIPS 2020.
    """
    r_hat = effective = gradient = gap = float("nan")
    running: Stochastic | None = fit._stochastic
    if running is not None and len(running.blocks) >= 8:
        tail = torch.stack(running.blocks[len(running.blocks) // 4 :]).double().numpy()
        r_hat, effective = split_r_hat(tail), effective_size(tail)
    elif fit._progress is not None:
        gradient = fit._progress.gradient
    if len(fit.restarts) > 1:
        best, second = sorted(fit.restarts, reverse=True)[:2]
        gap = best - second
    return Convergence(
        fit.converged, fit.monte_carlo_error, gradient, r_hat, effective, gap, fit.convergence
    )


def split_r_hat(iterates: np.ndarray) -> float:
    """Largest R-hat over columns of (iterates, parameters), the two halves taken as chains."""
    half = len(iterates) // 2
    halves = np.stack([iterates[:half], iterates[-half:]])
    within = halves.var(1, ddof=1).mean(0)
    between = half * halves.mean(1).var(0, ddof=1)
    live = within > 0
    if not live.any():
        return 1.0
    pooled = ((half - 1) * within + between)[live] / half
    return float(np.sqrt(pooled / within[live]).max())


def effective_size(iterates: np.ndarray) -> float:
    """Smallest effective sample size over columns of (iterates, parameters), by lag-1 correlation.

    For block means long against the optimiser's memory the correlation is short, and
    n (1 - rho) / (1 + rho) is enough.
    """
    x = iterates - iterates.mean(0)
    variance = (x**2).mean(0)
    live = variance > 0
    if not live.any():
        return float(len(iterates))
    rho = np.clip((x[1:] * x[:-1]).mean(0)[live] / variance[live], 0, 0.999)
    return float((len(iterates) * (1 - rho) / (1 + rho)).min())


def when_converged(
    error: float = ERROR_TOLERANCE, r_hat: float = 1.1
) -> Callable[[Stochastic], bool]:
    """A stopping rule for ``vi.fit(..., stop=...)``.

    Args:
        error: stop once the averaged iterate's Monte Carlo error is below this many posterior sds
        r_hat: and the split R-hat of the last iterates is below this.

    Example:
        >>> import vi_toolkit as vi
        >>> rule = vi.when_converged(error=0.05)
    """

    def rule(running: Stochastic) -> bool:
        if running.error > error or len(running.blocks) < 8:
            return False
        tail = torch.stack(running.blocks[len(running.blocks) // 4 :]).double().numpy()
        return split_r_hat(tail) < r_hat

    return rule
