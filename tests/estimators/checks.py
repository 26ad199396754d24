"""Is the mean of these gradients the one given? Per coordinate, and jointly."""

import math

import scipy.stats
import torch

from tests.tolerances import Z

FALSE_ALARM = 2 * scipy.stats.norm.sf(Z)


def mean_test(draws, truth):
    """(largest |z| over coordinates, p-value of Hotelling's T^2) of draws (n, d) against (d,).

    A coordinate without spread must be equal to the truth, and is left out of the joint test.
    """
    n = len(draws)
    error, sd = draws.mean(0) - truth, draws.std(0)
    still = sd < 1e-9 * (1 + truth.abs())
    if bool((error[still].abs() > 1e-7 * (1 + truth[still].abs())).any()):
        return math.inf, 0.0
    error, moving = error[~still], draws[:, ~still]
    if not len(error):
        return 0.0, 1.0
    z = float((error / (moving.std(0) / math.sqrt(n))).abs().max())
    d = len(error)
    t2 = n * error @ torch.linalg.pinv(torch.atleast_2d(torch.cov(moving.T))) @ error
    return z, float(scipy.stats.f.sf(float(t2) * (n - d) / (d * (n - 1)), d, n - d))


def assert_unbiased(draws, truth, what=""):
    z, p = mean_test(draws, truth)
    assert z < Z and p > FALSE_ALARM, f"{what}: |z| {z:.2f}, joint p {p:.1e}"
    return z, p


def is_caught(draws, truth):
    z, p = mean_test(draws, truth)
    return z > Z or p < FALSE_ALARM


def total_variance(draws):
    """(trace of the covariance, its standard error) of gradients (n, d)."""
    squares = (draws - draws.mean(0)).square().sum(1)
    n = len(draws)
    return float(squares.mean()) * n / (n - 1), float(squares.std()) / math.sqrt(n)
