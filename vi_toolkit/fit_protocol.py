"""What a function that takes a fit may ask of it, without knowing how fits are made.

The module stands just above ``programs``, so that the protocol can name the types found there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from vi_toolkit.programs.joint import Joint
from vi_toolkit.programs.workspace import Draws, Workspace


class FitLike(Protocol):
    """A fitted guide: what was fitted, whether the optimum was reached, and draws of the result.

    :class:`vi_toolkit.Fit` is one. Its documentation describes every member; ``num_draws`` counts
    draws, and ``seed`` is that of the draws (the fit's own if None).
    """

    @property
    def model(self) -> Callable[..., Any]: ...
    @property
    def guide(self) -> Any: ...
    @property
    def data(self) -> Mapping[str, Any]: ...
    @property
    def seed(self) -> int: ...
    @property
    def workspace(self) -> Workspace: ...
    @property
    def joint(self) -> Joint: ...
    @property
    def guide_family(self) -> str | None: ...
    @property
    def method(self) -> str: ...
    @property
    def elbo(self) -> np.ndarray: ...
    @property
    def converged(self) -> bool: ...
    @property
    def convergence(self) -> str: ...
    @property
    def monte_carlo_error(self) -> float: ...

    def sample(self, num_draws: int = 1000, seed: int | None = None) -> Draws: ...

    def predict(
        self,
        num_draws: int = 1000,
        data: Mapping[str, Any] | None = None,
        draws: Draws | None = None,
        seed: int | None = None,
    ) -> Draws: ...

    def log_likelihood(self, draws: Draws | None = None, num_draws: int = 1000) -> Draws: ...
