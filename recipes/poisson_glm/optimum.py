r"""The best Gaussian approximations, without any sampling: E exp(z) is known for a Normal z.

Regression. Under q = Normal(m, S) over (intercept, coefficients), with a_n = (1, x_n), exposure e_n
and prior precision P, the expected rate is r_n = e_n exp(a_n' m + a_n' S a_n / 2), and the optimum
solves

    sum_n (y_n - r_n) a_n = P m,    S = (P + sum_n r_n a_n a_n')^-1    (mean field: its diagonal)

Mixed model. With mean field over (intercept, coefficients, log sd, log rates) every expectation in
the ELBO is closed too, so that the optimum, and from its Hessian the linear response, are exact.
"""

import math

import numpy as np
import scipy.optimize
import torch

from .model import COEFFICIENT_SCALE, INTERCEPT_SCALE, SD_SCALE


def _design(X):
    """X with a column of ones, (n, 1 + d), and the prior precision of each column, (1 + d,)."""
    A = torch.cat([torch.ones_like(X[:, :1]), X], 1)
    precision = torch.full((A.shape[1],), COEFFICIENT_SCALE**-2.0, dtype=X.dtype)
    precision[0] = INTERCEPT_SCALE**-2.0
    return A, precision


def gaussian_optimum(X, y, exposure, mean_field=False, tolerance=1e-10):
    """(mean, covariance) of the Gaussian q of largest ELBO for `model`: (1 + d,), (1 + d, 1 + d).

    The ELBO is concave in the mean and a root of the covariance (Challis and Barber, 2013), so the
    stationary point is the optimum. Newton steps in the mean, starting from a constant rate.
    Raises RuntimeError if 500 iterations do not suffice.
    """
    A, prior = _design(X)
    A, prior, y, exposure = (value.numpy() for value in (A, prior, y, exposure))
    mean, covariance = np.zeros(A.shape[1]), np.zeros((A.shape[1],) * 2)
    mean[0] = np.log(y.sum() / exposure.sum())
    for _ in range(500):
        rate = exposure * np.exp(A @ mean + np.einsum("ni,ij,nj->n", A, covariance, A) / 2)
        precision = np.diag(prior) + (A.T * rate) @ A
        step = np.linalg.solve(precision, A.T @ (y - rate) - prior * mean)
        target = np.diag(1 / np.diag(precision)) if mean_field else np.linalg.inv(precision)
        change = np.abs(target - covariance).max() / np.abs(target).max()
        if max(np.abs(step).max(), change) < tolerance:
            return mean, covariance
        mean, covariance = mean + step, target
    raise RuntimeError(f"not converged: the last step was {np.abs(step).max():.1e}")


def mixed_elbo(parameters, X, y):
    """The ELBO of mean field for `mixed`, in nats, constants included.

    parameters: (2, D), means and log sds of the D = 1 + d + 1 + n latents intercept, coefficients,
    log sd and log rates. Of q(log sd) = Normal(t, v^2) it needs
    E[sd^-2] = exp(-2 t + 2 v^2) and E[sd^2] = exp(2 t + 2 v^2).
    """
    A, prior = _design(X)
    k = A.shape[1]
    mean, log_sd = parameters
    variance = (2 * log_sd).exp()
    b, t, z = mean[:k], mean[k], mean[k + 1 :]
    vb, vt, vz = variance[:k], variance[k], variance[k + 1 :]
    half_log_2pi = 0.5 * math.log(2 * math.pi)
    poisson = (y * z - (z + vz / 2).exp() - torch.lgamma(y + 1)).sum()
    squares = ((z - A @ b).square() + vz + A.square() @ vb).sum()
    rates = -len(y) * (half_log_2pi + t) - 0.5 * (2 * vt - 2 * t).exp() * squares
    coefficients = (prior.log() / 2 - half_log_2pi - prior * (b.square() + vb) / 2).sum()
    half_normal = math.log(2) - half_log_2pi - math.log(SD_SCALE)
    person_sd = half_normal - 0.5 * (2 * t + 2 * vt).exp() / SD_SCALE**2 + t  # t: the Jacobian
    entropy = log_sd.sum() + len(mean) * (half_log_2pi + 0.5)
    return poisson + rates + coefficients + person_sd + entropy


def mixed_optimum(X, y):
    """(mean, sd, linear-response covariance) of `mixed_elbo`'s optimum: (D,), (D,), (D, D).

    BFGS, then Newton steps to machine precision. The linear response (Giordano, Broderick and
    Jordan, 2018) is the block of the inverse of minus the Hessian that belongs to the means.
    """
    A, _ = _design(X)
    D = A.shape[1] + 1 + len(y)
    start = torch.zeros(2, D, dtype=X.dtype)
    start[0, 0], start[0, A.shape[1] + 1 :] = y.mean().log(), (y + 0.5).log()
    start[1] = math.log(0.3)

    def negative(flat):
        return -mixed_elbo(flat.reshape(2, D), X, y)

    gradient, hessian = torch.func.grad(negative), torch.func.hessian(negative)
    rough = scipy.optimize.minimize(
        lambda x: float(negative(torch.tensor(x))),
        start.flatten().numpy(),
        jac=lambda x: gradient(torch.tensor(x)).numpy(),
        method="L-BFGS-B",
        options={"maxiter": 5_000, "maxfun": 10_000},
    )
    x = torch.tensor(rough.x)
    for _ in range(20):
        step = torch.linalg.solve(hessian(x), gradient(x))
        x = x - step
        if step.abs().max() < 1e-10:
            covariance = torch.linalg.inv(hessian(x))[:D, :D]
            mean, log_sd = x.reshape(2, D)
            return mean.numpy(), log_sd.exp().numpy(), covariance.numpy()
    raise RuntimeError(f"not converged: the last step was {float(step.abs().max()):.1e}")
