"""The learning-rate schedule of Shopper's fits."""

import math


def cosine(step: int, steps: int) -> float:
    """Factor of the learning rate: 1 for the first 40 % of the steps, then a cosine down to 0.001.

    How well a model of half a million parameters predicts depends on where its last steps end, so
    the schedule anneals them over the number of steps that there is time for.

    >>> [round(cosine(step, 100), 3) for step in (0, 40, 70, 100)]
    [1.001, 1.001, 0.501, 0.001]
    """
    done = max(0.0, (step / steps - 0.4) / 0.6)
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0))) + 1e-3
