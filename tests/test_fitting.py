"""Arguments of fit: what is accepted, what is refused, and what the message says."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch.distributions import constraints

import vi_toolkit as vi
from tests.models import regression, regression_data, two_predictors, two_predictors_data
from tests.support import fitted, quietly
from tests.tolerances import Z


@pytest.fixture
def rows():
    return two_predictors_data()


@pytest.mark.parametrize(
    "bad", [{"method": "exact"}, {"steps": 0}, {"steps": 2.5}, {"restarts": 0}], ids=str
)
def test_bad_arguments_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        vi.fit(regression, AutoNormal, regression_data(), progress=False, **bad)


def test_restarts_keep_the_best():
    fit = quietly(regression, AutoNormal, regression_data(), steps=30, restarts=3)
    assert len(fit.restarts) == 3
    elbo, error = fit.elbo_estimate(200)
    assert abs(elbo - max(fit.restarts)) < 1e-3 * abs(elbo) + Z * error


@pytest.mark.parametrize("wrong", [lambda y: y[:, None], lambda y: y[:1]], ids=["column", "one"])
@pytest.mark.parametrize("subsample", [None, {"obs": 10}])
def test_an_observation_that_would_be_repeated_is_refused(rows, wrong, subsample):
    with pytest.raises(vi.PreflightError, match="broadcasting would count") as error:
        fitted(two_predictors, AutoNormal, {**rows, "y": wrong(rows["y"])}, subsample=subsample)
    assert error.value.site == "y"


def test_a_parameter_of_the_model_is_learnt():
    """Empirical Bayes: both ways of asking end at the same noise."""
    y = 3 + 0.3 * torch.randn(200)

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        s = pyro.param("s", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("obs", len(y)):
            pyro.sample("y", dist.Normal(mu, s), obs=y)

    # The optimum: s^2 = mean of (y - m)^2 + Var q(mu), with Var q(mu) = s^2 / n, so that s^2 is the
    # unbiased variance. In log s the gradient has sd sqrt(2) there and the ELBO the curvature 2 n;
    # Adam at rate r then wanders with variance r sqrt(2) / (2 * 2 n), before any averaging.
    fit = fitted(model, AutoNormal, {"y": y}, steps=1500, optimizer=(rate := 0.02))
    error = (rate * 2**0.5 / (4 * len(y))) ** 0.5
    assert float(fit.params["s"].log() - y.std().log()) == pytest.approx(0, abs=Z * error)
    plain = fitted(model, AutoNormal, {"y": y}, compile=False)
    assert plain.method == "stochastic" and "parameter of its own ('s')" in plain.why


def test_a_guide_without_parameters_is_refused():
    def guide(X, y):
        pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    with pytest.raises(vi.PreflightError, match="nothing to fit"):
        fitted(two_predictors, guide, {"X": torch.randn(5, 2), "y": torch.randn(5)})


def test_arguments_of_the_wrong_kind_are_refused(rows):
    refused = (
        ({"optimizer": pyro.optim.Adam({"lr": 0.01})}, TypeError, "lambda params"),
        ({"estimator": Trace_ELBO}, TypeError, r"Trace_ELBO\(\)"),
        ({"subsample": 20}, ValueError, "one plate"),
        ({"seed": -1}, ValueError, "seed must be"),
        ({"steps": 1.5}, ValueError, "steps must be"),
    )
    for options, kind, words in refused:
        with pytest.raises(kind, match=words):
            fitted(two_predictors, AutoNormal, rows, **options)


def test_whole_numbers_of_any_kind_are_accepted(rows):
    fit = fitted(two_predictors, AutoNormal, rows, steps=torch.tensor(3))
    assert len(fit.elbo) == 3
    assert len(fit.sample(torch.tensor(5))["w"]) == 5


def test_an_interrupt_before_there_is_a_fit_is_raised(rows, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("vi_toolkit.deterministic.starts.find_modes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fitted(two_predictors, AutoNormal, rows)
