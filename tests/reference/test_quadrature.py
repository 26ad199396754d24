"""Quadrature gives known answers to many digits, on both scales, and says what it cannot do."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch

from vi_toolkit.errors import InvalidReferenceError
from vi_toolkit.reference import LEVELS, Reference


def regression(X, y):
    """A model with a Gaussian posterior and a known evidence."""
    d = X.shape[1]
    w = pyro.sample("w", dist.Normal(torch.zeros(d, dtype=X.dtype), 2.0).to_event(1))
    with pyro.plate("observations", len(y)):
        pyro.sample("y", dist.Normal(X @ w, 0.5), obs=y)


@pytest.mark.parametrize(
    ("x", "mean", "sd"),
    [(1.0, 0.41324193, 0.91062128), (-3.0, -0.68902743, 0.72473526), (10.0, 0.7851912, 0.6192534)],
)
def test_quadrature_of_one_datum_logistic(x, mean, sd):
    """Numbers from 200-point Gauss-Hermite quadrature; the evidence is 1/2 for every x."""

    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Bernoulli(logits=x * z), obs=y)

    r = Reference.quadrature(model, {"y": torch.tensor(1.0)})
    assert r.mean[0] == pytest.approx(mean, abs=1e-8)
    assert r.sd[0] == pytest.approx(sd, abs=1e-8)
    assert r.log_evidence == pytest.approx(-np.log(2), abs=1e-9)


def test_quadrature_of_a_correlated_gaussian():
    X = torch.tensor([[1.0, 1.0], [1.0, 1.2], [1.0, 0.7], [1.0, 1.1]], dtype=torch.float64)
    y = torch.tensor([2.0, 2.5, 1.0, 2.2], dtype=torch.float64)
    r = Reference.quadrature(regression, {"X": X, "y": y})
    covariance = np.linalg.inv(X.T.numpy() @ X.numpy() / 0.25 + np.eye(2) / 4)
    assert r.covariance == pytest.approx(covariance, rel=1e-7)
    assert r.mean == pytest.approx(covariance @ (X.T @ y).numpy() / 0.25, rel=1e-7)
    marginal = scipy.stats.multivariate_normal(np.zeros(4), (X @ X.T).numpy() * 4 + np.eye(4) / 4)
    assert r.log_evidence == pytest.approx(marginal.logpdf(y), abs=1e-8)
    for level, p in LEVELS.items():
        exact = scipy.stats.norm.ppf(p, r.mean, r.sd)
        assert r.quantiles[level] == pytest.approx(exact, abs=1e-7)


def test_quadrature_on_the_models_own_scale():
    def model(y):
        p = pyro.sample("p", dist.Beta(2.0, 3.0))
        with pyro.plate("observations", len(y)):
            pyro.sample("y", dist.Bernoulli(p), obs=y)

    r = Reference.quadrature(model, {"y": torch.tensor([1.0, 1.0, 0.0])})
    exact = scipy.stats.beta(4, 4)
    assert r.names == ["logit(p)"]
    (row,) = r.sites
    assert [row["mean"], row["sd"]] == pytest.approx([exact.mean(), exact.std()], abs=1e-8)
    assert [row[k] for k in ("5%", "50%", "95%")] == pytest.approx(exact.ppf([0.05, 0.5, 0.95]))


def test_quadrature_refuses_many_scalars_and_heavy_tails(y):
    with pytest.raises(InvalidReferenceError, match="has 4"):
        Reference.quadrature(regression, {"X": torch.ones(100, 4, dtype=y.dtype), "y": y})

    def heavy(y):
        pyro.sample("z", dist.Cauchy(0.0, 1.0))

    with pytest.raises(InvalidReferenceError, match=r"Reference\.nuts"):
        Reference.quadrature(heavy, {"y": y})
