"""Models and guides that several tests share, most of them with a known posterior."""

import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints


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


def own_guide(X, y=None):
    loc = pyro.param("loc", torch.zeros(X.shape[1]))
    scale = pyro.param("scale", torch.ones(X.shape[1]), constraint=constraints.positive)
    pyro.sample("w", dist.Normal(loc, scale).to_event(1))


def gaussian(rho):
    tril = torch.tensor([[1.0, 0.0], [rho, (1 - rho**2) ** 0.5]], dtype=torch.float64)

    def model():
        pyro.sample("z", dist.MultivariateNormal(torch.zeros(2).double(), scale_tril=tril))

    return model


def eight_schools(y, s):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, s), obs=y)


SCHOOLS = {
    "y": torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]).double(),
    "s": torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]).double(),
}


def standard():
    pyro.sample("z", dist.Normal(torch.tensor(0.0).double(), 1.0))


def two_predictors(X, y=None):
    """Known noise of 0.3, and two weights."""
    w = pyro.sample("w", dist.Normal(0.0, 5.0).expand([2]).to_event(1))
    with pyro.plate("obs", len(X)):
        pyro.sample("y", dist.Normal(X @ w, 0.3), obs=y)


def two_predictors_data():
    X = torch.randn(50, 2)
    return {"X": X, "y": X @ torch.tensor([1.0, -1.0]) + 0.3 * torch.randn(50)}
