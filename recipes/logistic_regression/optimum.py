"""The best Gaussian approximation of the logistic regression's posterior, without any sampling.

Under a Gaussian q each linear predictor eta_n = a_n' z, with a_n = (1, x_n) and z = (intercept,
coefficients), is a one-dimensional Gaussian, so every expectation in

    ELBO(m, S) = sum_n E_q[log sigmoid((2 y_n - 1) eta_n)] - KL(q || prior)

is a one-dimensional integral, and the optimum can be found to machine precision. It tells what a
*family* costs from what an optimiser costs: a fit should land here, and the distance from here to
the posterior is the family's.
"""

import numpy as np
from scipy.special import expit, log_expit

from .model import COEFFICIENT_SCALE, INTERCEPT_SCALE

_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(64)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()


def _design(X):
    """X with a column of ones, (n, 1 + d), and the prior precision of each column, (1 + d,)."""
    A = np.column_stack([np.ones(len(X)), X.numpy()])
    precision = np.full(A.shape[1], COEFFICIENT_SCALE**-2.0)
    precision[0] = INTERCEPT_SCALE**-2.0
    return A, precision


def _predictors(A, mean, covariance):
    """Each linear predictor at each quadrature node: (n, nodes)."""
    sd = np.sqrt(np.einsum("ni,ij,nj->n", A, covariance, A))
    return (A @ mean)[:, None] + sd[:, None] * _NODES


def elbo(mean, covariance, X, y):
    """The ELBO of q = Normal(mean, covariance) over (intercept, coefficients), in nats.

    mean: (1 + d,), covariance: (1 + d, 1 + d) arrays; X: (n, d), y: (n,) tensors.
    """
    A, prior = _design(X)
    signs = 2 * y.numpy()[:, None] - 1
    likelihood = (log_expit(signs * _predictors(A, mean, covariance)) @ _WEIGHTS).sum()
    kl = 0.5 * (
        prior @ (mean**2 + np.diag(covariance))
        - len(mean)
        - np.log(prior).sum()
        - np.linalg.slogdet(covariance)[1]
    )
    return likelihood - kl


def gaussian_optimum(X, y, mean_field=False, tolerance=1e-10):
    """(mean, covariance) of the Gaussian q of largest ELBO: shapes (1 + d,), (1 + d, 1 + d).

    With P the prior precision, s_n = E_q[sigmoid(eta_n)] and w_n = E_q[sigmoid'(eta_n)], the
    stationary point solves (Opper and Archambeau, 2009)

        sum_n (y_n - s_n) a_n = P mean
        covariance = (P + sum_n w_n a_n a_n')^-1      (mean field: 1 / its diagonal entries).

    Both families share the first line, but s_n depends on the variance of eta_n, so their means
    differ. The ELBO is concave in the mean and a root of the covariance; the iteration below takes
    damped Newton steps in the mean and moves the covariance part of the way each time.
    X: (n, d), y: (n,) tensors. Raises RuntimeError if 5,000 iterations do not suffice.
    """
    A, prior = _design(X)
    mean, covariance = np.zeros(A.shape[1]), np.diag(1 / prior)
    for _ in range(5_000):
        s = expit(_predictors(A, mean, covariance))
        weights = (s * (1 - s)) @ _WEIGHTS
        precision = np.diag(prior) + (A.T * weights) @ A
        full = np.linalg.inv(precision)
        step = full @ (A.T @ (y.numpy() - s @ _WEIGHTS) - prior * mean)
        target = np.diag(1 / np.diag(precision)) if mean_field else full
        change = target - covariance
        if max(np.abs(step).max(), np.abs(change).max()) < tolerance:
            return mean, covariance
        mean, covariance = mean + 0.5 * step, covariance + 0.5 * change
    raise RuntimeError(f"not converged: the last step was {np.abs(step).max():.1e}")
