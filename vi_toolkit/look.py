"""What a callback of ``fit`` is shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Look:
    """One look at a running fit.

    Attributes:
        method: "deterministic" or "stochastic".
        step: optimiser steps so far, or rounds of the deterministic method.
        elbo: ELBO estimates since the last look, in nats.
        error: Monte Carlo error of the present solution in posterior sds; infinite if not known.
    """

    method: str
    step: int
    elbo: Sequence[float]
    error: float


Callback = Callable[[Look], bool | None]
