"""What people do with a fit, and a clear message for each mistake they make."""

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import vi_toolkit as vi
from tests.models import (
    regression,
    regression_data,
    regression_posterior,
    two_predictors,
    two_predictors_data,
)
from tests.support import fitted
from tests.tolerances import Z


@pytest.fixture
def rows():
    return two_predictors_data()


def test_rows_that_change_on_every_run_are_not_predicted(rows):
    def model(X, y=None, size=None):
        w = pyro.sample("w", dist.Normal(0.0, 5.0).expand([2]).to_event(1))
        with pyro.plate("obs", len(X), subsample_size=size) as i:
            pyro.sample("y", dist.Normal(X[i] @ w, 0.3), obs=None if y is None else y[i])

    fit = fitted(model, AutoNormal, rows | {"size": 10}, steps=20)
    for use in (fit.predict, fit.log_likelihood, fit.elbo_estimate, fit.to_arviz):
        with pytest.raises(ValueError, match=r"subsample=\{'obs': 10\}"):
            use()
    fit = fitted(model, AutoNormal, rows, subsample={"obs": 10}, steps=20)
    assert fit.predict(5)["y"].shape == (5, 50)
    assert fit.log_likelihood(num_draws=5)["y"].shape == (5, 50)


def test_a_likelihood_that_is_a_factor_cannot_be_predicted():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        pyro.factor("mixture", dist.Normal(mu, 1.0).log_prob(y).sum())

    fit = fitted(model, AutoNormal, {"y": torch.randn(20)})
    for use in (fit.predict, fit.log_likelihood):
        with pytest.raises(ValueError, match="factor 'mixture'"):
            use()
    assert "posterior" in fit.to_arviz()


def test_latents_that_the_estimator_sums_out_are_not_sampled():
    y = torch.cat([torch.randn(30) - 2, torch.randn(30) + 2])

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
        with pyro.plate("obs", len(y)):
            z = pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(torch.where(z > 0, mu[0], mu[1]), 1.0), obs=y)

    guide = AutoNormal(poutine.block(model, hide=["z"]))
    fit = fitted(model, guide, {"y": y}, estimator=TraceEnum_ELBO(), steps=300)
    assert list(fit.sample(10)) == ["mu"]
    assert fit.predict(10)["y"].shape == (10, 60)
    mean, error = fit.elbo_estimate(100)
    with fit.workspace.isolated():
        peer = torch.tensor([-TraceEnum_ELBO().loss(model, fit.guide, y) for _ in range(200)])
    assert abs(mean - float(peer.mean())) < Z * (error**2 + float(peer.var()) / 200) ** 0.5
    with pytest.raises(ValueError, match="'z', which was summed out"):
        fit.log_likelihood()


def test_predictions_at_inputs_that_do_not_fit_are_refused(rows):
    fit = fitted(two_predictors, AutoNormal, rows)
    new = torch.randn(4, 2)
    assert fit.predict(7, data={"X": new})["y"].shape == (7, 4)
    with pytest.raises(TypeError, match=r"predict\(data="):
        fit.predict({"X": new})
    for wrong in ({"X": torch.randn(4, 3)}, {}, {"X": new.numpy()}, {"X": new, "z": new}):
        with pytest.raises(vi.PreflightError):
            fit.predict(7, data=wrong)


def test_samples_predictions_and_likelihoods_have_documented_shapes_and_precision():
    data = regression_data()
    fit = vi.fit(regression, AutoMultivariateNormal, data, progress=False)
    draws = fit.sample(7)
    assert draws["w"].shape == (7, 3) and draws["w"].dtype == torch.float32
    assert torch.equal(fit.sample(7)["w"], draws["w"])
    assert not torch.equal(fit.sample(7, seed=1)["w"], draws["w"])
    assert fit.predict(5)["y"].shape == (5, 60)
    new = fit.predict(5, data={"X": torch.randn(4, 3)})
    assert new["y"].shape == (5, 4)
    log_likelihood = fit.log_likelihood(draws)["y"]
    by_hand = dist.Normal(draws["w"] @ data["X"].T, 1.0).log_prob(data["y"])
    assert torch.allclose(log_likelihood, by_hand, atol=1e-4)


def test_predictions_have_the_predictive_variance():
    data = regression_data()
    mean, covariance, _ = regression_posterior(**data)
    fit = vi.fit(regression, AutoMultivariateNormal, data, progress=False)
    n = 20_000
    y = fit.predict(n)["y"].double()
    X = data["X"].double()
    variance = 1 + (X @ covariance * X).sum(-1)
    assert ((y.mean(0) - X @ mean).abs() <= Z * (variance / n).sqrt() + 1e-3).all()
    assert (y.var(0) / variance - 1).abs().max() <= Z * (2 / n) ** 0.5 + 2e-3


def test_the_elbo_estimate_is_the_evidence_where_the_guide_holds_the_posterior():
    data = regression_data()
    fit = vi.fit(regression, AutoMultivariateNormal, data, progress=False)
    X, y = data["X"].double(), data["y"].double()
    marginal = dist.MultivariateNormal(
        torch.zeros(60).double(), torch.eye(60).double() + 25 * X @ X.T
    )
    elbo, error = fit.elbo_estimate(500)
    assert abs(elbo - float(marginal.log_prob(y))) < 1e-4 + Z * error


def test_the_text_of_a_fit_says_what_it_is():
    text = repr(vi.fit(regression, AutoNormal, regression_data(), progress=False))
    for part in ("regression", "mean-field", "w[3]", "deterministic", "ELBO", "converged"):
        assert part in text
