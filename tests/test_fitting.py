"""Arguments of fit: what is accepted, what is refused, and what the message says."""

import itertools

import numpy as np
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
from vi_toolkit.programs.joint import Joint


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


def test_a_default_fit_calls_the_model_six_times_before_its_density_exists():
    """Prior draw, the guide's set-up (two), its draw, one more for its support, the density."""
    calls = []

    def model(X, y=None):
        calls.append(torch.get_default_dtype())
        w = pyro.sample("w", dist.Normal(0.0, 5.0).expand([X.shape[1]]).to_event(1))
        with pyro.plate("observations", len(X)):
            pyro.sample("y", dist.Normal(X @ w, 1.0), obs=y)

    built = []
    original = Joint.__init__

    def counted(self, *arguments):
        original(self, *arguments)
        built.append(len(calls))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Joint, "__init__", counted)
        fitted(model, AutoNormal, {"X": torch.randn(100, 3), "y": torch.randn(100)})
    assert built == [6]


def test_positional_arguments_mean_the_same_as_named_ones(rows):
    named = fitted(two_predictors, AutoNormal, rows)
    positional = fitted(two_predictors, AutoNormal, (rows["X"], rows["y"]))
    assert torch.equal(named.sample(3)["w"], positional.sample(3)["w"])
    assert list(positional.data) == ["X", "y"]

    def one(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    assert list(fitted(one, AutoNormal, torch.ones(3)).data) == ["y"]
    with pytest.raises(vi.PreflightError, match="3 positional arguments, but the model names 2"):
        fitted(two_predictors, AutoNormal, (rows["X"], rows["y"], 1))


@pytest.mark.parametrize("options", [{}, {"optimizer": 0.02, "compile": False}])
def test_a_callback_sees_every_look_and_may_end_the_fit(rows, options):
    looks = []
    whole = fitted(two_predictors, AutoNormal, rows, callback=looks.append, **options)
    assert len(looks) >= 2
    assert [look.method for look in looks] == [whole.method] * len(looks)
    assert looks[-1].error == whole.monte_carlo_error
    assert all(a.step < b.step for a, b in itertools.pairwise(looks))
    with pytest.warns(vi.ConvergenceWarning):
        short = fitted(two_predictors, AutoNormal, rows, callback=lambda look: True, **options)
    assert not short.converged
    assert len(short.elbo) < len(whole.elbo)


def test_restarts_of_the_deterministic_method_are_fits_of_their_own(rows):
    fit = fitted(two_predictors, AutoNormal, rows, restarts=3)
    assert fit.method == "deterministic" and fit.converged
    assert len(fit.restarts) == 3
    # One posterior, one optimum: their ELBOs agree to the error of 200 draws each.
    assert np.ptp(fit.restarts) < 1.0


@pytest.mark.parametrize("compile", [False, True])
def test_a_schedule_sets_the_learning_rate_of_every_step(rows, compile):
    made = []

    def sgd(leaves):
        made.append(torch.optim.SGD(leaves, lr=1e-3))
        return made[-1]

    def halve(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5)

    options = {"steps": 12, "optimizer": sgd, "average": False, "compile": compile}
    fit = fitted(two_predictors, AutoNormal, rows, schedule=halve, **options)
    assert fit.run.stages.rates.ravel().tolist() == [1e-3] * 5 + [5e-4] * 5 + [2.5e-4] * 2
    by_hand = fitted(two_predictors, AutoNormal, rows, **(options | {"steps": 5}))
    for steps, rate in ((5, 5e-4), (2, 2.5e-4)):
        made[-1].param_groups[0]["lr"] = rate
        by_hand.extend(steps)
    for name, value in fit.params.items():
        torch.testing.assert_close(value, by_hand.params[name], rtol=1e-5, atol=1e-6)


def test_a_schedule_that_needs_the_loss_or_has_no_end_is_refused(rows):
    def plateau(optimizer):
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)

    with pytest.raises(ValueError, match="number of the step only"):
        fitted(two_predictors, AutoNormal, rows, steps=10, schedule=plateau)
    with pytest.raises(ValueError, match="needs steps="):
        fitted(two_predictors, AutoNormal, rows, schedule=plateau)
