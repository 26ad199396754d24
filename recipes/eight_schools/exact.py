r"""The posterior of eight schools, exactly: one integral over tau, everything else in closed form.

Given tau the model is Gaussian (Gelman et al., Bayesian Data Analysis, section 5.4). With
w_j = 1 / (sigma_j^2 + tau^2) and m the prior sd of mu,

    mu | tau, y     ~ Normal(V sum_j w_j y_j, sqrt(V)),       1 / V = 1 / m^2 + sum_j w_j
    z_j | mu, tau, y ~ Normal(tau w_j (y_j - mu), sqrt(sigma_j^2 w_j)),   independent over j
    theta_j = mu + tau z_j
    p(y | tau) = prod_j Normal(y_j; 0, 1 / sqrt(w_j)) sqrt(V) / m exp((V sum_j w_j y_j)^2 / 2 V)

so p(tau | y) is known up to one constant. The trapezoidal rule in log tau gives it: the integrand
is smooth and dies out exponentially on both sides, where the rule converges geometrically
(Trefethen and Weideman, "The Exponentially Convergent Trapezoidal Rule", 2014).
"""

import numpy as np
import scipy.stats
import torch

import vi_toolkit as vi

from .data import load_data
from .model import MU_SCALE, TAU_SCALE

# log tau. Beyond the ends lies less than 1e-12 of the posterior: at the lower one the density
# falls like tau, at the upper one like tau^-1 p(y | tau), which itself falls like tau^-7.
_GRID = np.linspace(-30.0, 12.0, 8401)


def conditional(tau, sigma, y):
    """Mean and variance of mu, and mean slope, intercept and variance of z, given tau.

    tau: array (...,). Returns (mean, variance) of mu, each (...,), and (intercept, slope, variance)
    of z_j = intercept_j + slope_j mu + noise, each (..., 8).
    """
    w = 1 / (sigma**2 + tau[..., None] ** 2)
    variance = 1 / (1 / MU_SCALE**2 + w.sum(-1))
    return (variance * (w @ y), variance), (
        tau[..., None] * w * y,
        -tau[..., None] * w,
        sigma**2 * w,
    )


def log_joint(log_tau, sigma, y):
    """log p(y, log tau): array like `log_tau`."""
    tau = np.exp(log_tau)
    (mean, variance), _ = conditional(tau, sigma, y)
    likelihood = scipy.stats.norm.logpdf(y, 0, np.hypot(sigma, tau[..., None])).sum(-1)
    likelihood += mean**2 / (2 * variance) + 0.5 * np.log(variance) - np.log(MU_SCALE)
    return likelihood + scipy.stats.halfcauchy.logpdf(tau, scale=TAU_SCALE) + log_tau


def posterior_of_log_tau():
    """(grid, density) of log tau given the eight estimates, and log p(y), in nats.

    >>> grid, density, log_evidence = posterior_of_log_tau()
    >>> round(float(log_evidence), 4)
    -31.3113
    """
    sigma, y = (value.numpy() for value in load_data().values())
    log_density = log_joint(_GRID, sigma, y)
    top = log_density.max()
    density = np.exp(log_density - top)
    total = density.sum() * (_GRID[1] - _GRID[0])
    return _GRID, density / total, top + np.log(total)


def reference(form="non-centred"):
    """vi.Reference of (mu, log tau, z_1, ..., z_8), or with form="centred" theta for z.

    Moments up to the fourth come from those of Normals given tau, averaged over tau.
    """
    if form not in ("non-centred", "centred"):
        raise ValueError(f"form must be 'non-centred' or 'centred'; got {form!r}")
    sigma, y = (value.numpy() for value in load_data().values())
    grid, density, log_evidence = posterior_of_log_tau()
    weights = density * (grid[1] - grid[0])
    tau = np.exp(grid)
    (mu, mu_variance), (intercept, slope, noise) = conditional(tau, sigma, y)
    if form == "centred":  # theta = mu + tau z
        slope, intercept = 1 + tau[:, None] * slope, tau[:, None] * intercept
        noise = tau[:, None] ** 2 * noise
    # Conditional mean and covariance of (mu, log tau, the rest) at each node.
    means = np.column_stack([mu, grid, intercept + slope * mu[:, None]])
    loading = np.column_stack([np.ones(len(grid)), np.zeros(len(grid)), slope])
    own = np.column_stack([np.zeros((len(grid), 2)), noise])
    mean = weights @ means
    covariance = (means - mean).T * weights @ (means - mean)
    covariance += (loading.T * (weights * mu_variance)) @ loading + np.diag(weights @ own)
    deviation, variance = means - mean, loading**2 * mu_variance[:, None] + own
    sd = np.sqrt(np.diag(covariance))
    third = weights @ (deviation**3 + 3 * deviation * variance)
    fourth = weights @ (deviation**4 + 6 * deviation**2 * variance + 3 * variance**2)
    site = "theta" if form == "centred" else "z"
    return vi.Reference.exact(
        ["mu", "log(tau)", *(f"{site}[{j}]" for j in range(8))],
        mean,
        covariance,
        skewness=third / sd**3,
        excess_kurtosis=fourth / sd**4 - 3,
        log_evidence=log_evidence,
        made={
            "method": "closed form given tau, trapezoidal rule over log tau",
            "command": "python -m recipes reference eight_schools",
        },
    )


def sample(n, seed=0):
    """n independent draws: {"mu": (n,), "tau": (n,), "z": (n, 8), "theta": (n, 8)}, float64.

    tau by inverting its distribution function on the grid, the rest from its Normals.

    >>> {name: tuple(value.shape) for name, value in sample(5).items()}
    {'mu': (5,), 'tau': (5,), 'z': (5, 8), 'theta': (5, 8)}
    """
    sigma, y = (value.numpy() for value in load_data().values())
    rng = np.random.default_rng(seed)
    grid, density, _ = posterior_of_log_tau()
    tau = np.exp(np.interp(rng.random(n), np.cumsum(density) * (grid[1] - grid[0]), grid))
    (mean, variance), (intercept, slope, noise) = conditional(tau, sigma, y)
    mu = mean + np.sqrt(variance) * rng.standard_normal(n)
    z = intercept + slope * mu[:, None] + np.sqrt(noise) * rng.standard_normal((n, 8))
    draws = {"mu": mu, "tau": tau, "z": z, "theta": mu[:, None] + tau[:, None] * z}
    return {name: torch.tensor(value) for name, value in draws.items()}
