"""What compiled steps need of a stochastic fit, and how such a fit is set back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from vi_toolkit.programs.isolation import random_state, set_random_state
from vi_toolkit.programs.minibatches import Minibatches, PlatePlan


class FitParts(Protocol):
    """What an optimiser step is made of.

    Attributes:
        model, guide, data: called as ``model(**data)``.
        estimator: the ``pyro.infer.ELBO`` whose gradient is followed.
        optimizer: optimiser of the leaves.
        plan: how a plate is subsampled; None without minibatches.
        leaves: the unconstrained parameters.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    data: Mapping[str, Any]
    estimator: Any
    optimizer: torch.optim.Optimizer
    plan: PlatePlan | None
    leaves: list[torch.Tensor]

    def next_rates(self, steps: int) -> np.ndarray | None:
        """Scheduled learning rates of the next steps, (steps, groups); None without a schedule."""


class RunningFit(FitParts, Protocol):
    """A stochastic fit in progress.

    Attributes:
        batches: source of the minibatches; None without minibatches.
        rng: state of torch's generators between two runs.
        step: number of steps taken.
        elbo: ELBO estimate of each of them.
        block_sum: sum of the iterates in the current averaging block, flat.
        in_block: number of iterates in it.
        block_length: number of iterates at which the block is complete.
        error: largest Monte Carlo error of the solution so far.
        converged: whether that error is small enough.
    """

    batches: Minibatches | None
    rng: torch.Tensor
    step: int
    elbo: list[float]
    block_sum: torch.Tensor
    in_block: int
    block_length: int
    error: float

    @property
    def converged(self) -> bool: ...

    def one_step(self) -> float:
        """Take one eager step; returns its ELBO estimate."""

    def check_parameters(self) -> None:
        """Raise if a parameter has appeared since the first step."""

    def check_stage(self) -> bool:
        """Judge the stage if it is time to; returns whether it was."""

    def state(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to what :meth:`state` returned."""


@dataclass(frozen=True)
class Checkpoint:
    """Counters, sums and random state of a fit. Parameters and optimiser are not part of it."""

    step: int
    in_block: int
    block_sum: torch.Tensor
    batches: dict[str, Any] | None
    random: torch.Tensor


def checkpoint(fit: RunningFit) -> Checkpoint:
    """Where the fit is now."""
    return Checkpoint(
        fit.step,
        fit.in_block,
        fit.block_sum.clone(),
        fit.batches.state() if fit.batches else None,
        random_state(),
    )


def rollback(fit: RunningFit, to: Checkpoint) -> None:
    """Set the fit back to a checkpoint."""
    fit.step, fit.in_block, fit.block_sum = to.step, to.in_block, to.block_sum
    del fit.elbo[to.step :]
    if fit.batches and to.batches is not None:
        fit.batches.restore(to.batches)
    set_random_state(to.random)
