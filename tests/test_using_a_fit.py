"""What people do with a fit, and the mistakes they make: an answer or a clear message."""

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal
from torch.distributions import constraints

import vi_toolkit as vi
from tests.tolerances import Z


@pytest.fixture
def rows():
    X = torch.randn(50, 2)
    return {"X": X, "y": X @ torch.tensor([1.0, -1.0]) + 0.3 * torch.randn(50)}


def regression(X, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 5.0).expand([2]).to_event(1))
    with pyro.plate("obs", len(X)):
        pyro.sample("y", dist.Normal(X @ w, 0.3), obs=y)


def quick(model, data, guide=AutoNormal, **options):
    return vi.fit(model, guide, data, progress=False, **options)


# ------------------------------------------------------------------ data of the wrong shape


@pytest.mark.parametrize("wrong", [lambda y: y[:, None], lambda y: y[:1]], ids=["column", "one"])
@pytest.mark.parametrize("subsample", [None, {"obs": 10}])
def test_an_observation_that_would_be_repeated_is_refused(rows, wrong, subsample):
    with pytest.raises(vi.PreflightError, match="broadcasting would count") as error:
        quick(regression, {**rows, "y": wrong(rows["y"])}, subsample=subsample)
    assert error.value.site == "y"


def test_minibatches_of_one_row():
    """A minibatch of one broadcasts against anything: each datum must still count once.

    Then the mean over all minibatches of the scaled log density is the log density of all data.
    """

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("obs", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    data = {"y": torch.randn(40)}
    fit = quick(model, data, subsample={"obs": 1}, steps=100)
    at = poutine.condition(model, {"mu": torch.tensor(0.4)})
    parts = []
    for row in range(40):
        minibatch, handler = fit._stochastic.plan.apply(data, torch.tensor([row]))
        with handler:
            parts.append(poutine.trace(at).get_trace(**minibatch).log_prob_sum())
    whole = poutine.trace(at).get_trace(**data).log_prob_sum()
    torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-5, atol=0)


def test_a_model_that_computes_from_all_rows_is_not_cut():
    def model(x, y):
        b = pyro.sample("b", dist.Normal(0.0, 10.0))
        with pyro.plate("obs", len(x)):
            pyro.sample("y", dist.Normal(b * (x - x.mean()) / x.std(), 0.5), obs=y)

    data = {"x": torch.randn(60), "y": torch.randn(60)}
    with pytest.raises(vi.PreflightError, match="computes something from all rows"):
        quick(model, data, subsample={"obs": 3}, steps=5)


# ------------------------------------------------------------------ other kinds of models


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
    fit = quick(model, {"y": y}, steps=1500, optimizer=(rate := 0.02))
    error = (rate * 2**0.5 / (4 * len(y))) ** 0.5
    assert float(fit.params["s"].log() - y.std().log()) == pytest.approx(0, abs=Z * error)
    plain = vi.Fit(model, AutoNormal, {"y": y}, torch.float32, 0, False)
    assert "parameter of its own ('s')" in plain._set_up_deterministic(limits=True)


def test_latents_that_the_estimator_sums_out():
    y = torch.cat([torch.randn(30) - 2, torch.randn(30) + 2])

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
        with pyro.plate("obs", len(y)):
            z = pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(torch.where(z > 0, mu[0], mu[1]), 1.0), obs=y)

    guide = AutoNormal(poutine.block(model, hide=["z"]))
    fit = quick(model, {"y": y}, guide, estimator=TraceEnum_ELBO(), steps=300)
    assert list(fit.sample(10)) == ["mu"]
    assert fit.predict(10)["y"].shape == (10, 60)
    mean, error = fit.elbo_estimate(100)
    with fit._isolated():
        peer = torch.tensor([-TraceEnum_ELBO().loss(model, fit.guide, y) for _ in range(200)])
    assert abs(mean - float(peer.mean())) < Z * (error**2 + float(peer.var()) / 200) ** 0.5
    with pytest.raises(ValueError, match="'z', which was summed out"):
        fit.log_likelihood()


def test_rows_that_change_on_every_run_are_not_predicted(rows):
    def model(X, y=None, size=None):
        w = pyro.sample("w", dist.Normal(0.0, 5.0).expand([2]).to_event(1))
        with pyro.plate("obs", len(X), subsample_size=size) as i:
            pyro.sample("y", dist.Normal(X[i] @ w, 0.3), obs=None if y is None else y[i])

    fit = quick(model, rows | {"size": 10}, steps=20)
    for use in (fit.predict, fit.log_likelihood, fit.elbo_estimate, fit.to_arviz):
        with pytest.raises(ValueError, match=r"subsample=\{'obs': 10\}"):
            use()
    fit = quick(model, rows, subsample={"obs": 10}, steps=20)
    assert fit.predict(5)["y"].shape == (5, 50)
    assert fit.log_likelihood(n=5)["y"].shape == (5, 50)


def test_a_likelihood_that_is_a_factor():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        pyro.factor("mixture", dist.Normal(mu, 1.0).log_prob(y).sum())

    fit = quick(model, {"y": torch.randn(20)})
    for use in (fit.predict, fit.log_likelihood):
        with pytest.raises(ValueError, match="factor 'mixture'"):
            use()
    assert "posterior" in fit.to_arviz()


def test_a_guide_without_parameters():
    def guide(X, y):
        pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    with pytest.raises(vi.PreflightError, match="nothing to fit"):
        quick(regression, {"X": torch.randn(5, 2), "y": torch.randn(5)}, guide)


# ------------------------------------------------------------------ arguments


def test_arguments_that_cannot_be(rows):
    refused = (
        ({"optimizer": pyro.optim.Adam({"lr": 0.01})}, TypeError, "lambda params"),
        ({"estimator": Trace_ELBO}, TypeError, r"Trace_ELBO\(\)"),
        ({"subsample": 20}, ValueError, "one plate"),
        ({"seed": -1}, ValueError, "seed must be"),
        ({"steps": 1.5}, ValueError, "steps must be"),
    )
    for options, kind, words in refused:
        with pytest.raises(kind, match=words):
            quick(regression, rows, **options)


def test_whole_numbers_of_any_kind(rows):
    fit = quick(regression, rows, steps=torch.tensor(3))
    assert len(fit.elbo) == 3
    assert len(fit.sample(torch.tensor(5))["w"]) == 5


def test_predictions_at_inputs_that_do_not_fit(rows):
    fit = quick(regression, rows)
    new = torch.randn(4, 2)
    assert fit.predict(7, data={"X": new})["y"].shape == (7, 4)
    with pytest.raises(TypeError, match=r"predict\(data="):
        fit.predict({"X": new})
    for wrong in ({"X": torch.randn(4, 3)}, {}, {"X": new.numpy()}, {"X": new, "z": new}):
        with pytest.raises(vi.PreflightError):
            fit.predict(7, data=wrong)


def test_an_interrupt_before_there_is_anything_goes_on_up(rows, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("vi_toolkit.deterministic.find_modes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quick(regression, rows)
