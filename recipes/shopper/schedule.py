"""The learning-rate schedule of Shopper's fits."""

import math
from typing import Any

import torch


def cosine(step: int, steps: int) -> float:
    """Factor of the learning rate: 1 for the first 40 % of the steps, then a cosine down to 0.001.

    How well a model of half a million parameters predicts depends on where its last steps end, so
    the schedule anneals them over the number of steps that there is time for.

    >>> [round(cosine(step, 100), 3) for step in (0, 40, 70, 100)]
    [1.001, 1.001, 0.501, 0.001]
    """
    done = max(0.0, (step / steps - 0.4) / 0.6)
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0))) + 1e-3


class CosineAdam(torch.optim.Adam):
    """Adam with the learning rate ``lr * cosine(step, steps)``."""

    def __init__(self, params: Any, lr: float, steps: int):
        super().__init__(params, lr=lr, betas=(0.9, 0.99), fused=True)
        self.first, self.steps, self.taken = lr, steps, 0

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["lr"] = self.first * cosine(self.taken, self.steps)
        self.taken += 1
        return super().step(closure)
