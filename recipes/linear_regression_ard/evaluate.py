"""Held-out score of the regression: log predictive density per row, in nats."""

import math

import torch


def log_predictive_densities(draws, X, y):
    """log of the posterior mean of p(y_n | coefficients, variance): (n,).

    draws: {"coefficients": (S, d), "variance": (S,)}; X: (n, d); y: (n,).

    >>> draws = {"coefficients": torch.zeros(2, 1), "variance": torch.ones(2)}
    >>> log_predictive_densities(draws, torch.ones(1, 1), torch.zeros(1))
    tensor([-0.9189])
    """
    residual = y - draws["coefficients"] @ X.T
    variance = draws["variance"][:, None]
    log_p = -0.5 * (residual.square() / variance + variance.log() + math.log(2 * math.pi))
    return torch.logsumexp(log_p, 0) - math.log(len(log_p))
