"""Whether the optimiser has converged, which every other diagnostic takes for granted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vi_toolkit.arviz_adapter import ess, rhat
from vi_toolkit.deterministic.run import DeterministicRun
from vi_toolkit.result import Fit

MOST_COLUMNS = 2_000  # ArviZ takes 0.2 ms for each


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
        meaning: the same in one sentence, with what to do.
    """

    converged: bool
    monte_carlo_error: float
    gradient: float
    r_hat: float
    effective_iterates: float
    restart_gap: float
    meaning: str

    def __repr__(self) -> str:
        return f"Convergence: {self.meaning}"


def convergence(fit: Fit) -> Convergence:
    """Summarise how a fit ended.

    For a stochastic fit, R-hat and effective sample size treat the block means of the last stage's
    iterates as two half chains. Iterates that still drift have an R-hat above 1.1.

    Args:
        fit: a :class:`~vi_toolkit.Fit`.

    References:
        Dhaka et al., "Robust, Accurate Stochastic Optimization for Variational Inference",
        NeurIPS 2020.

    Example:
        >>> import pyro, pyro.distributions as dist, vi_toolkit as vi
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> vi.convergence(vi.fit(model, AutoNormal, {}, progress=False)).converged
        True
    """
    r_hat = effective = gradient = gap = float("nan")
    run = fit.run
    if isinstance(run, DeterministicRun):
        gradient = run.progress.gradient if run.progress else gradient
    elif len(run.stages.blocks) >= 8:
        blocks = run.stages.blocks
        tail = torch.stack(blocks[len(blocks) // 4 :]).double().cpu().numpy()
        r_hat, effective = split_r_hat(tail), effective_size(tail)
    if len(fit.restarts) > 1:
        best, second = sorted(fit.restarts, reverse=True)[:2]
        gap = best - second
    return Convergence(
        fit.converged, fit.monte_carlo_error, gradient, r_hat, effective, gap, fit.convergence
    )


def split_r_hat(iterates: np.ndarray) -> float:
    """Largest R-hat over the columns of (iterates, parameters), with the two halves as chains.

    Ranks are not used, because the reported solution is an average of the iterates themselves.
    """
    half = len(iterates) // 2
    live = _moving(iterates)
    halves = np.stack([live[:half], live[-half:]])
    return float(rhat(halves, "identity").max()) if live.size else 1.0


def effective_size(iterates: np.ndarray) -> float:
    """Smallest effective sample size of the mean over columns of (iterates, parameters)."""
    live = _moving(iterates)
    if not live.size:
        return float(len(iterates))
    return float(ess(live[None], "mean").min())


def _moving(iterates: np.ndarray) -> np.ndarray:
    """The columns that vary within at least one half; the others have no R-hat.

    If there are very many, only the columns whose halves differ most in their means, measured in
    sds: they have the largest R-hat.
    """
    half = len(iterates) // 2
    first, last = iterates[:half], iterates[-half:]
    spread = first.std(0) + last.std(0)
    moves = np.flatnonzero(spread > 0)
    if len(moves) > MOST_COLUMNS:
        gap = np.abs(first.mean(0) - last.mean(0))[moves] / spread[moves]
        moves = moves[np.argsort(-gap)[:MOST_COLUMNS]]
    return iterates[:, moves]
