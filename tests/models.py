"""Small models with known posteriors that several tests share."""

import pyro
import pyro.distributions as dist
import torch


def regression(X, y=None):
    """Known noise: the posterior is N(V X'y, V), V = (X'X + I/25)^-1."""
    w = pyro.sample("w", dist.Normal(0.0, 5.0).expand([X.shape[1]]).to_event(1))
    with pyro.plate("observations", len(X)):
        return pyro.sample("y", dist.Normal(X @ w, 1.0), obs=y)


def regression_posterior(X, y):
    X, y = X.double(), y.double()
    precision = X.T @ X + torch.eye(X.shape[1], dtype=torch.float64) / 25
    covariance = torch.linalg.inv(precision)
    return covariance @ X.T @ y, covariance, precision


def regression_data(n=60, d=3, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, d, generator=generator)
    X[:, -1] = 0.9 * X[:, 0] + 0.3 * X[:, -1]  # correlated, so that mean field shows its bias
    y = X @ torch.linspace(-1, 2, d) + torch.randn(n, generator=generator)
    return {"X": X.to(dtype), "y": y.to(dtype)}


def scale_model(y):
    """A location without a proper prior and a positive scale."""
    mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
    sigma = pyro.sample("sigma", dist.HalfCauchy(5.0))
    with pyro.plate("observations", len(y)):
        pyro.sample("y", dist.Normal(mu, sigma), obs=y)
