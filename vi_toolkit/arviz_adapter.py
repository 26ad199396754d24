"""What this package takes from ArviZ, called in the same way for ArviZ 0.18 to 1.x.

ArviZ 1.0 moved and renamed part of it. This is the only module that imports ArviZ, and it does so
when a function is first called, because the import takes half a second.

Statistics of Markov chains take draws of shape (chains, n, *shape) and return an array of that
shape. They call ArviZ once for each scalar. One call for all of them would take as long, because
ArviZ itself loops over the scalars in Python.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import logsumexp

TAILS = (0.05, 0.95)  # the quantiles that the tails' effective sample size is about


@functools.cache
def _arviz() -> Any:
    """The package, without the announcement of 1.0 that version 0.23 makes once a day."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing", FutureWarning)
        import arviz
    return arviz


def _before_1() -> bool:
    return int(_arviz().__version__.split(".")[0]) < 1


def rhat(draws: np.ndarray, method: str = "rank") -> np.ndarray:
    """R-hat of each scalar, the potential scale reduction of its chains.

    Args:
        draws: (chains, n, *shape).
        method: "rank" for the larger of the rank-normalised split R-hats of the draws and of
            their distances from the median (Vehtari et al., 2021); "identity" for the R-hat of
            Gelman and Rubin (1992), without splitting or ranks.

    Example:
        >>> import numpy as np
        >>> float(rhat(np.random.default_rng(0).normal(size=(4, 500)))) < 1.01
        True
    """
    return _each_scalar(_arviz().rhat, draws, method=method)


def ess(draws: np.ndarray, method: str = "bulk") -> np.ndarray:
    """Effective sample size of each scalar (Vehtari et al., 2021).

    Args:
        draws: (chains, n, *shape).
        method: "bulk" for the mean of the rank-normalised draws; "tail" for the 5 % or the 95 %
            quantile, whichever has the smaller one; "mean" for the mean.

    Example:
        >>> import numpy as np
        >>> ess(np.random.default_rng(0).normal(size=(4, 500, 3)), "tail").shape
        (3,)
    """
    options = {"prob": TAILS} if method == "tail" else {}
    return _each_scalar(_arviz().ess, draws, method=method, **options)


def mean_se(draws: np.ndarray) -> np.ndarray:
    """Monte Carlo standard error of the mean of each scalar of draws (chains, n, *shape)."""
    return _each_scalar(_arviz().mcse, draws, method="mean")


def sd_se(draws: np.ndarray) -> np.ndarray:
    r"""Monte Carlo standard error of the sd of each scalar of draws (chains, n, *shape).

    It is :math:`\sqrt{(m_4 - m_2^2) / (4 S m_2)}` with the central moments :math:`m_2` and
    :math:`m_4` and the effective sample size S of the squared deviations. Only S comes from ArviZ:
    its own ``mcse`` assumes a Normal distribution before 0.21, and in 1.0 to 1.2 it takes the
    effective sample size of the draws instead of S.
    """
    squares = (draws - draws.mean((0, 1))) ** 2
    variance = squares.mean((0, 1))
    return np.sqrt(((squares**2).mean((0, 1)) - variance**2) / ess(squares, "mean") / variance / 4)


def quantile_se(draws: np.ndarray, prob: float) -> np.ndarray:
    """Monte Carlo standard error of one quantile of each scalar of draws (chains, n, *shape)."""
    return _each_scalar(_arviz().mcse, draws, method="quantile", prob=prob)


def psislw(log_weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pareto-smoothed, normalised log weights and the k-hat of each set of log weights.

    k-hat is infinite, and the weights are not smoothed, if no Pareto distribution can be fitted:
    there are fewer than some 20 weights, or the largest weights are all equal, or nearly all of
    the weights are zero. The tail is one weight shorter in ArviZ 1.x than in 0.x, which changes
    k-hat by about 0.01.

    Args:
        log_weights: (..., S), finite.

    Returns:
        The log weights (..., S), whose exponentials sum to one over S, and k-hat (...).

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry, "Pareto Smoothed Importance Sampling", 2024.

    Example:
        >>> import numpy as np
        >>> smooth, k = psislw(np.random.default_rng(0).normal(size=(3, 1000)))
        >>> smooth.shape, k.shape
        ((3, 1000), (3,))
    """
    with np.errstate(all="ignore"):  # the tail of weights that cannot be used overflows
        if _before_1():
            return _arviz().psislw(log_weights.copy())  # 0.18 overwrites its argument
        from arviz_stats.base import array_stats

        smooth, k = np.array(log_weights, dtype=float), np.empty(log_weights.shape[:-1])
        for index in np.ndindex(k.shape):
            try:
                # Its argument is the log likelihood of a datum to leave out: minus the weight.
                smooth[index], k[index] = array_stats.psislw(-log_weights[index])
            except (IndexError, ValueError):  # too few weights, or all of the tail the same
                k[index] = np.nan
        # If tail weights underflow, k-hat is NaN in 1.3; in 1.0 it is 0.05 and the weights are NaN.
        lost = ~np.isfinite(k) | np.isnan(smooth).any(-1)
        smooth[lost] = log_weights[lost] - logsumexp(log_weights[lost], -1, keepdims=True)
        return smooth, np.where(lost, np.inf, k)


def from_dict(
    groups: Mapping[str, Mapping[str, np.ndarray]],
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
) -> Any:
    """``InferenceData`` (ArviZ 0.x) or ``DataTree`` (1.x) of groups of named arrays.

    Args:
        groups: group -> name -> array, (chains, draws, *shape) except in ``observed_data``.
        dims: name -> names of the dimensions in its shape.
        coords: dimension -> labels.
    """
    options = {
        "dims": {site: list(names) for site, names in (dims or {}).items()},
        "coords": {name: list(labels) for name, labels in (coords or {}).items()},
    }
    if _before_1():
        return _arviz().from_dict(**groups, **options)
    return _arviz().from_dict(groups, **options)


def _each_scalar(statistic: Callable[..., Any], draws: np.ndarray, **options: Any) -> np.ndarray:
    """A statistic of each scalar; (chains, n, *shape) -> shape."""
    scalars = np.moveaxis(draws.reshape(*draws.shape[:2], -1), -1, 0)
    return np.array([float(statistic(one, **options)) for one in scalars]).reshape(draws.shape[2:])
