"""What draws in chains say about a posterior, and the rules that admit them as a reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.stats
import torch

from vi_toolkit.arviz_adapter import ess, mean_se, quantile_se, rhat, sd_se
from vi_toolkit.errors import InvalidReferenceError
from vi_toolkit.programs.joint import Joint, indices
from vi_toolkit.reference.summary import LEVELS, SITE_LEVELS, site_rows

MAX_R_HAT = 1.01
"""Rank-normalised split R-hat must be below this (Vehtari et al., Bayesian Analysis 16, 2021)."""
MIN_ESS = 1000
"""Bulk and tail effective sample sizes must reach this: the error of a mean is then 0.03 sd."""


def summarise(
    joint: Joint, draws: Mapping[str, torch.Tensor], divergences: int
) -> tuple[dict[str, Any], dict[str, float], list[str]]:
    """Moments and quantiles of draws in chains, with their Monte Carlo standard errors.

    Args:
        joint: names the d scalars and maps draws to the unconstrained scale.
        draws: site -> (chains, n, *site shape), on the model's own scale.
        divergences: number of divergent transitions.

    Returns:
        Three things: the fields of a :class:`~vi_toolkit.Reference` from ``names`` to ``sites``;
        the worst R-hat and effective sample sizes over the scalars; and the admission rules that
        fail, from :func:`admission_faults`.

    Raises:
        InvalidReferenceError: there are fewer than two chains of four draws, or the draws of a
            scalar are not finite or all the same.
    """
    chains, n = draws[next(iter(joint.sites))].shape[:2]
    if chains < 2 or n < 4:
        raise InvalidReferenceError(
            f"R-hat needs two chains of four draws; there are {chains} of {n}"
        )
    own = {
        name: torch.as_tensor(draws[name]).detach().cpu().double().flatten(0, 1)
        for name in joint.sites
    }
    flat = joint.flatten(own).numpy()
    by_chain = flat.reshape(chains, n, joint.dim)
    for name, column in zip(joint.names, flat.T, strict=True):
        if not np.isfinite(column).all():
            raise InvalidReferenceError(f"the draws of {name} are not all finite")
        if column.min() == column.max():
            raise InvalidReferenceError(f"{name} does not vary: every draw is {column[0]:.6g}")
    r_hat = rhat(by_chain)
    bulk = ess(by_chain, "bulk")
    tail = ess(by_chain, "tail")
    covariance = np.atleast_2d(np.cov(flat, rowvar=False))
    sd = np.sqrt(covariance.diagonal())
    # Scalar i deviates from its regression on the others by (Lambda z)_i / Lambda_ii. The sd of
    # that deviation is the conditional sd. An error of the regression matters to second order
    # only, so the standard error is that of the sd of the deviations.
    precision = np.linalg.pinv(covariance / np.outer(sd, sd), hermitian=True)
    residuals = (by_chain - flat.mean(0)) / sd @ precision / precision.diagonal() * sd
    fields = {
        "names": list(joint.names),
        "mean": _rounded(flat.mean(0)),
        "sd": _rounded(sd),
        "covariance": _rounded(covariance),
        "mean_se": _rounded(mean_se(by_chain), 4),
        "sd_se": _rounded(sd_se(by_chain), 4),
        "conditional_sd_se": _rounded(sd_se(residuals), 4),
        "quantiles": {k: _rounded(np.quantile(flat, p, axis=0)) for k, p in LEVELS.items()},
        "quantiles_se": {k: _rounded(quantile_se(by_chain, p), 4) for k, p in LEVELS.items()},
        "skewness": _rounded(scipy.stats.skew(flat), 4),
        "excess_kurtosis": _rounded(scipy.stats.kurtosis(flat), 4),
        "sites": _own_scale(joint, own, chains),
    }
    worst = {"r_hat": r_hat.max(), "bulk_ess": bulk.min(), "tail_ess": tail.min()}
    faults = admission_faults(joint.names, r_hat, bulk, tail, divergences)
    return fields, {k: _rounded(v, 6) for k, v in worst.items()}, faults


def admission_faults(
    names: list[str], r_hat: np.ndarray, bulk: np.ndarray, tail: np.ndarray, divergences: int
) -> list[str]:
    """Every admission rule that fails, with the worst scalar and its number; empty if none does."""
    faults = []
    # Each comparison is written so that a NaN fails it.
    worst = int(np.argmax(np.where(np.isnan(r_hat), np.inf, r_hat)))
    if not r_hat[worst] < MAX_R_HAT:
        faults.append(
            f"rank R-hat of {names[worst]} is {r_hat[worst]:.4f} (must be below {MAX_R_HAT})"
        )
    for label, sizes in (("bulk", bulk), ("tail", tail)):
        worst = int(np.argmin(np.where(np.isnan(sizes), -np.inf, sizes)))
        if not sizes[worst] >= MIN_ESS:
            faults.append(
                f"{label} ESS of {names[worst]} is {sizes[worst]:.0f} (must be at least {MIN_ESS})"
            )
    if divergences != 0:
        faults.append(f"{divergences} transitions diverged (none may)")
    return faults


def _own_scale(joint: Joint, draws: dict[str, torch.Tensor], chains: int) -> list[dict[str, Any]]:
    """Rows of ``Reference.sites`` from draws (chains * n, *site shape)."""
    values = np.concatenate([draws[s].reshape(len(draws[s]), -1).numpy() for s in joint.sites], -1)
    names = [s.name + index for s in joint.sites.values() for index in indices(s.shape)]
    # A structural constant, such as a corner of a Cholesky factor, has no standard error.
    varies = values.min(0) < values.max(0)
    errors = np.zeros(len(names))
    by_chain = values.reshape(chains, -1, len(names))
    errors[varies] = mean_se(by_chain[..., varies])
    return site_rows(
        names,
        _rounded(values.mean(0)),
        _rounded(np.where(varies, values.std(0, ddof=1), 0.0)),
        _rounded(np.quantile(values, [LEVELS[k] for k in SITE_LEVELS], axis=0)),
        _rounded(errors, 4),
    )


def _rounded(x: Any, digits: int = 12) -> Any:
    """``x`` to significant digits: far below the Monte Carlo standard error, and short on disk."""
    if np.ndim(x):
        return np.array([_rounded(value, digits) for value in x])
    return float(f"{float(x):.{digits}g}")
