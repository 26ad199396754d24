"""Learning rates that follow one of torch's schedulers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

Schedule = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


def scheduled_rates(
    optimizer: Callable[[list[torch.Tensor]], torch.optim.Optimizer],
    leaves: Sequence[torch.Tensor],
    schedule: Schedule,
    steps: int,
) -> np.ndarray:
    """The learning rates that a scheduler gives, tried on copies of the parameters.

    Args:
        optimizer: function from parameters to an optimiser.
        leaves: the parameters.
        schedule: function from the optimiser to a scheduler, which is stepped after each step.
        steps: number of optimiser steps.

    Returns:
        Shape (steps, groups of the optimiser).

    Raises:
        ValueError: the scheduler needs more than the number of the step, such as the loss.

    Example:
        >>> import torch
        >>> sgd = lambda params: torch.optim.SGD(params, lr=1.0)
        >>> halve = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        >>> scheduled_rates(sgd, [torch.zeros(3)], halve, 5).ravel()
        array([1.  , 1.  , 0.5 , 0.5 , 0.25])
    """
    copies = [p.detach().clone().requires_grad_() for p in leaves]
    own = optimizer(copies)
    scheduler = schedule(own)
    rates = np.empty((steps, len(own.param_groups)))
    for step in range(steps):
        rates[step] = [float(group["lr"]) for group in own.param_groups]
        own.step()  # the copies have no gradients and stay where they are
        try:
            scheduler.step()
        except TypeError as error:
            raise ValueError(
                f"{type(scheduler).__name__} cannot be used as schedule=: a schedule may depend "
                f"on the number of the step only ({error})"
            ) from error
    return rates
