import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from torch.distributions import constraints

import vi_toolkit as vi
from tests.models import regression, regression_data, regression_posterior, scale_model
from tests.tolerances import Z


def quietly(*args, **kwargs):
    """A fit whose lack of convergence is not the test's point."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", vi.ConvergenceWarning)
        return vi.fit(*args, progress=False, **kwargs)


def moments(fit):
    """Mean and sd under the guide, from its parameters' own draws: (mean, sd, n)."""
    n = 40_000
    u = fit.joint.flatten(fit.sample(n)).double()
    return u.mean(0), u.std(0), n


# ------------------------------------------------------------------ the answer


@pytest.mark.parametrize("guide", [AutoMultivariateNormal, AutoLowRankMultivariateNormal])
def test_full_and_low_rank_land_on_a_gaussian_posterior(guide):
    data = regression_data()
    mean, covariance, _ = regression_posterior(**data)
    make = (lambda m: guide(m, rank=2)) if guide is AutoLowRankMultivariateNormal else guide
    fit = vi.fit(regression, make(regression), data, progress=False)
    assert fit.method == "deterministic" and fit.converged
    posterior = fit.guide.get_posterior()
    sd = covariance.diagonal().sqrt()
    assert ((posterior.mean.detach() - mean) / sd).abs().max() < 1e-3
    tolerance = 1e-3 if guide is AutoMultivariateNormal else 5e-3
    assert (posterior.covariance_matrix.detach() - covariance).abs().max() < tolerance * (
        sd.max() ** 2
    )


@pytest.mark.parametrize("guide", [AutoNormal, AutoDiagonalNormal])
def test_mean_field_has_exactly_the_sds_that_theory_gives(guide):
    data = regression_data()
    mean, covariance, precision = regression_posterior(**data)
    fit = vi.fit(regression, guide, data, progress=False)
    location, scale = fit._progress.problem.q.location, fit._progress.problem.q.scale
    assert ((location - mean) / covariance.diagonal().sqrt()).abs().max() < 1e-4
    assert (scale * precision.diagonal().sqrt() - 1).abs().max() < 1e-4
    assert scale[0] < 0.7 * covariance[0, 0].sqrt()  # its known bias: too narrow


def test_raw_units_do_no_harm():
    data = regression_data(dtype=torch.float64)
    data["X"] = data["X"] * torch.tensor([1.0, 1e3, 1e-3]) + torch.tensor([0.0, 5e3, 0.0])
    mean, covariance, _ = regression_posterior(**data)
    fit = vi.fit(regression, AutoMultivariateNormal, data, progress=False)
    sd = covariance.diagonal().sqrt()
    posterior = fit.guide.get_posterior()
    assert ((posterior.mean.detach() - mean) / sd).abs().max() < 1e-3
    assert (posterior.covariance_matrix.diagonal().sqrt() / sd).log().abs().max() < 1e-3


def own_guide(X, y=None):
    loc = pyro.param("loc", torch.zeros(X.shape[1]))
    scale = pyro.param("scale", torch.ones(X.shape[1]), constraint=constraints.positive)
    pyro.sample("w", dist.Normal(loc, scale).to_event(1))


def test_a_guide_of_the_users_own_lands_on_the_same_optimum():
    data = regression_data()
    mean, covariance, precision = regression_posterior(**data)
    fit = vi.fit(regression, own_guide, data, progress=False)
    assert fit.method == "deterministic" and fit.converged
    sd = covariance.diagonal().sqrt()
    assert ((fit.params["loc"] - mean) / sd).abs().max() < 5e-3
    assert (fit.params["scale"].double() * precision.diagonal().sqrt()).log().abs().max() < 5e-3


def test_a_gamma_guide_lands_on_a_conjugate_posterior_and_its_elbo_is_the_evidence():
    counts = torch.tensor([3.0, 5.0, 2.0, 4.0], dtype=torch.float64)

    def model(counts):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("observations", len(counts)):
            pyro.sample("counts", dist.Poisson(rate), obs=counts)

    def guide(counts):
        a = pyro.param("a", torch.tensor(1.0), constraint=constraints.positive)
        b = pyro.param("b", torch.tensor(1.0), constraint=constraints.positive)
        pyro.sample("rate", dist.Gamma(a, b))

    fit = vi.fit(model, guide, {"counts": counts}, progress=False)
    a, b, n = 2.0 + 14.0, 1.0 + 4.0, 4
    assert abs(float(fit.params["a"]) / a - 1) < 1e-3
    assert abs(float(fit.params["b"]) / b - 1) < 1e-3
    log_evidence = (
        math.lgamma(a) - a * math.log(b) - math.lgamma(2.0) - torch.lgamma(counts + 1).sum().item()
    )
    elbo, error = fit.elbo_estimate(2000)
    assert abs(elbo - log_evidence) < 1e-5 and error < 1e-5 and n == len(counts)


def test_point_guides_find_the_mode():
    data = regression_data()
    mean, covariance, _ = regression_posterior(**data)
    for guide in (AutoDelta, AutoLaplaceApproximation):
        fit = vi.fit(regression, guide, data, progress=False)
        draws = fit.sample(2)["w"].double()
        assert torch.equal(draws[0], draws[1])
        assert ((draws[0] - mean) / covariance.diagonal().sqrt()).abs().max() < 1e-3


def test_the_better_mode_is_kept_whatever_the_prior_median_leads_to():
    def model(y):
        x = pyro.sample("x", dist.Normal(-3.0, 3.0))
        # Symmetric up to the prior but for a likelihood that prefers the far mode by 20 nats.
        pyro.factor("bump", torch.logaddexp(-20 - 8 * (x + 4) ** 2, -8 * (x - 5) ** 2))
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    fit = vi.fit(model, AutoNormal, {"y": torch.tensor(0.0)}, progress=False)
    assert abs(float(fit.sample(1000)["x"].mean()) - 5) < 0.5


def test_minibatches_reach_the_posterior_with_either_way_of_writing_the_model():
    def indexed(X, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 5.0).expand([X.shape[1]]).to_event(1))
        with pyro.plate("observations", len(X)) as i:
            pyro.sample("y", dist.Normal(X[i] @ w, 1.0), obs=y[i])

    data = regression_data(n=203)  # ragged last batch: 203 = 4 * 50 + 3
    mean, _, precision = regression_posterior(**data)
    for model, cut in ((regression, ["X", "y"]), (indexed, None)):
        fit = quietly(model, AutoNormal(model), data, subsample={"observations": 50}, steps=6000)
        assert fit.method == "stochastic" and fit._stochastic.plan.cut == cut
        location, scale, n = moments(fit)
        sd = precision.diagonal().rsqrt()
        # 6,000 steps leave the averaged iterate within about 0.05 sd (that is measured below).
        assert ((location - mean) / sd).abs().max() < 0.2 + Z / n**0.5
        assert (scale / sd).log().abs().max() < 0.1 + Z / (2 * n) ** 0.5


def test_the_stochastic_method_knows_its_monte_carlo_error():
    """Where it says 0.02 sd, independent runs scatter by that much and centre on the truth."""
    y = torch.tensor([1.0, 2.0, 4.0])

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("observations", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    precision = 3 + 0.01
    exact = 7.0 / precision
    errors = []
    for seed in range(3):
        fit = vi.fit(model, AutoNormal, {"y": y}, method="stochastic", seed=seed, progress=False)
        assert fit.converged and fit.monte_carlo_error <= 0.02
        loc = float(fit.params["AutoNormal.locs.mu"])
        errors.append((loc - exact) * precision**0.5)
    assert np.sqrt(np.mean(np.square(errors))) < 3 * 0.02


def test_local_latents_with_parameters_per_datum_under_minibatches():
    y = torch.randn(40, generator=torch.Generator().manual_seed(0)) * 2

    def model(y):
        with pyro.plate("observations", len(y)) as i:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[i])

    def guide(y):
        loc = pyro.param("loc", torch.zeros(len(y)))
        scale = pyro.param("scale", torch.ones(len(y)), constraint=constraints.positive)
        with pyro.plate("observations", len(y)) as i:
            pyro.sample("z", dist.Normal(loc[i], scale[i]))

    fit = quietly(model, guide, {"y": y}, subsample={"observations": 16}, steps=6000)
    assert ((fit.params["loc"] - y / 2) / 0.5**0.5).abs().max() < 0.2
    fit = quietly(model, AutoNormal(model), {"y": y}, subsample={"observations": 16}, steps=3000)
    assert ((fit.params["AutoNormal.locs.z"] - y / 2) / 0.5**0.5).abs().max() < 0.3


def test_the_cost_of_a_minibatch_does_not_grow_with_the_data():
    """Counted, not timed: no tensor of the size of the data is made in a step."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if torch.is_tensor(out):
                self.largest = max(self.largest, out.numel())
            return out

    data = regression_data(n=50_000)
    fit = quietly(regression, AutoNormal, data, subsample={"observations": 20}, steps=2)
    running = fit._stochastic
    with fit._isolated(), Largest() as seen:
        running.one_step()
    assert 0 < seen.largest <= 20 * 3


# ------------------------------------------------------------------ which method


def test_auto_says_why():
    data = regression_data()
    assert vi.fit(regression, AutoNormal, data, progress=False).method == "deterministic"
    for given in ({"steps": 5}, {"optimizer": 0.1, "steps": 5}, {"subsample": {"observations": 9}}):
        fit = quietly(regression, AutoNormal, data, **({"steps": 5} | given))
        assert fit.method == "stochastic" and next(iter(given)) in fit.why

    def discrete_guide(y):
        pyro.sample("k", dist.Bernoulli(pyro.param("p", torch.tensor(0.5))))

    def discrete(y):
        k = pyro.sample("k", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(k, 1.0), obs=y)

    fit = quietly(
        discrete, discrete_guide, {"y": torch.tensor(0.5)}, estimator=Trace_ELBO(), steps=5
    )
    assert fit.method == "stochastic"
    flow = quietly(
        regression, AutoIAFNormal(regression, hidden_dim=[40], num_transforms=2), data, steps=5
    )
    assert flow.method == "stochastic"


def test_the_deterministic_method_refuses_what_it_cannot_do():
    data = regression_data()
    with pytest.raises(vi.NotDeterministicError, match="steps"):
        vi.fit(regression, AutoNormal, data, method="deterministic", steps=10, progress=False)

    def guide(y):
        pyro.sample("k", dist.Bernoulli(pyro.param("p", torch.tensor(0.5))))

    def model(y):
        pyro.sample("y", dist.Normal(pyro.sample("k", dist.Bernoulli(0.3)), 1.0), obs=y)

    with pytest.raises(vi.NotDeterministicError, match="'k' cannot be reparameterised"):
        vi.fit(model, guide, {"y": torch.tensor(1.0)}, method="deterministic", progress=False)

    class StraightThrough(dist.Bernoulli):
        has_rsample = True

        def rsample(self, sample_shape=()):
            return self.sample(sample_shape) + (self.probs - self.probs.detach())

    def with_gradient(y):
        pyro.sample("k", StraightThrough(pyro.param("p", torch.tensor(0.5))))

    with pytest.raises(vi.NotDeterministicError, match="'k' is discrete"):
        vi.fit(
            model, with_gradient, {"y": torch.tensor(1.0)}, method="deterministic", progress=False
        )


@pytest.mark.parametrize(
    "bad", [{"method": "exact"}, {"steps": 0}, {"steps": 2.5}, {"restarts": 0}], ids=str
)
def test_bad_arguments_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        vi.fit(regression, AutoNormal, regression_data(), progress=False, **bad)


def test_reparam_names_the_site_it_cannot_do_before_step_one():
    class Untouched(vi.Reparam):
        def _get_trace(self, *args, **kwargs):
            raise AssertionError("a step was taken")

    def guide(y):
        pyro.sample("k", dist.Bernoulli(pyro.param("p", torch.tensor(0.5))))

    def model(y):
        pyro.sample("y", dist.Normal(pyro.sample("k", dist.Bernoulli(0.3)), 1.0), obs=y)

    options = {"method": "stochastic", "steps": 3, "progress": False}
    with pytest.raises(vi.PreflightError, match="Bernoulli at site 'k'") as caught:
        vi.fit(model, guide, {"y": torch.tensor(1.0)}, estimator=Untouched(), **options)
    assert caught.value.site == "k" and "Trace_ELBO" in caught.value.remedy
    vi.fit(model, guide, {"y": torch.tensor(1.0)}, estimator=Trace_ELBO(), **options)


def test_a_plate_that_cannot_be_subsampled_is_named():
    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(y)]).to_event(1))
        with pyro.plate("observations", 6):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    with pytest.raises(vi.PreflightError, match="cannot be subsampled") as caught:
        vi.fit(
            model,
            AutoNormal,
            {"y": torch.zeros(6)},
            subsample={"observations": 2},
            progress=False,
        )
    assert caught.value.site == "observations" and "as i:" in caught.value.remedy
    assert len(str(caught.value)) < 400


# ------------------------------------------------------------------ nothing stale


@pytest.mark.parametrize("options", [{}, {"steps": 60}], ids=["deterministic", "stochastic"])
def test_the_same_seed_gives_the_same_fit_and_globals_stay(options):
    data = regression_data()
    guide = AutoNormal(regression)
    pyro.param("mine", torch.tensor(7.0))
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    a = quietly(regression, guide, data, seed=3, **options)
    assert torch.equal(torch.randn(3), expected)
    assert list(pyro.get_param_store()) == ["mine"]
    assert torch.get_default_dtype() == torch.float32
    assert guide.prototype_trace is None  # the given guide stays pristine, the fit has its own
    other = quietly(regression, guide, regression_data(seed=9, d=2), seed=1, **options)
    b = quietly(regression, guide, data, seed=3, **options)
    assert np.array_equal(a.elbo, b.elbo)
    assert all(torch.equal(a.params[k], b.params[k]) for k in a.params)
    assert torch.equal(a.sample(5)["w"], b.sample(5)["w"])
    assert other.sample(2)["w"].shape == (2, 2)


def test_networks_and_tensors_that_the_guide_closes_over_are_given_back_untouched():
    net = torch.nn.Linear(1, 2)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    start = torch.zeros(())

    def model(y):
        with pyro.plate("observations", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    def guide(y):
        pyro.module("net", net)
        shift = pyro.param("shift", start)
        out = net(y[:, None])
        with pyro.plate("observations", len(y)):
            pyro.sample("z", dist.Normal(out[:, 0] + shift, out[:, 1].exp()))

    data = {"y": torch.linspace(-1, 1, 8)}
    fit = quietly(model, guide, data, steps=50)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert start.item() == 0.0
    again = quietly(model, guide, data, steps=50)
    assert np.array_equal(fit.elbo, again.elbo)
    assert not torch.equal(fit.params["net$$$weight"], before["weight"])
    assert torch.equal(fit.sample(3)["z"], again.sample(3)["z"])


# ------------------------------------------------------------------ going wrong


def test_a_non_finite_elbo_names_site_index_and_step_and_keeps_the_last_good_state():
    def model(y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("observations", len(y)):
            # Past 1.5 the square root has no value; the factor pushes a there.
            pyro.sample("y", dist.Normal((1.5 - a * y).sqrt(), 1.0), obs=y)
            pyro.factor("push", 50 * a)

    def guide(y):
        pyro.sample("a", dist.Delta(pyro.param("at", torch.tensor(0.0))))

    data = {"y": torch.tensor([0.0, 1.0])}
    with pytest.raises(vi.NonFiniteError) as caught:
        vi.fit(model, guide, data, steps=500, optimizer=0.05, progress=False)
    error = caught.value
    assert error.site == "y" and error.index == (1,) and error.step is not None
    assert "'y'" in str(error) and f"step {error.step}" in str(error)
    assert error.fit is not None
    assert len(error.fit.elbo) == error.step
    assert all(torch.isfinite(v).all() for v in error.fit.params.values())


def test_no_finite_start_is_an_error_that_names_the_site():
    def model(y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("observations", len(y)):
            pyro.sample("y", dist.Poisson(a.exp()), obs=y)

    with pytest.raises((vi.NonFiniteError, vi.PreflightError), match="'y'"):
        vi.fit(model, AutoNormal, {"y": torch.tensor([1.0, -2.0])}, progress=False)


def test_ctrl_c_returns_the_fit_so_far(monkeypatch):
    data = regression_data()
    calls = 0
    original = vi.Reparam.loss_and_grads

    def interrupted(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 30:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(vi.Reparam, "loss_and_grads", interrupted)
    with pytest.warns(vi.ConvergenceWarning, match="interrupted"):
        fit = vi.fit(
            regression, AutoNormal, data, method="stochastic", compile=False, progress=False
        )
    assert fit.interrupted and not fit.converged and len(fit.elbo) == 29
    assert "interrupted" in fit.convergence
    assert fit.sample(3)["w"].shape == (3, 3)
    monkeypatch.undo()
    whole = quietly(regression, AutoNormal, data, steps=80)
    assert np.array_equal(fit.extend(51).elbo, whole.elbo)


def test_ctrl_c_in_the_deterministic_method_can_be_taken_up_again(monkeypatch):
    from vi_toolkit.deterministic import run as deterministic

    y = {"y": torch.randn(12, generator=torch.Generator().manual_seed(0))}
    whole = vi.fit(scale_model, AutoMultivariateNormal, y, progress=False)
    assert whole._progress.rounds >= 2
    original, calls = deterministic.solve, 0

    def interrupted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(deterministic, "solve", interrupted)
    with pytest.warns(vi.ConvergenceWarning, match="interrupted"):
        fit = vi.fit(scale_model, AutoMultivariateNormal, y, progress=False)
    assert fit.interrupted and not fit.converged
    monkeypatch.undo()
    fit.extend()
    assert fit.converged
    assert all(torch.equal(fit.params[k], whole.params[k]) for k in whole.params)


@pytest.mark.parametrize("options", [{}, {"subsample": {"observations": 7}}], ids=["full", "batch"])
def test_extend_is_bit_for_bit_a_fit_that_never_stopped(options):
    data = regression_data()
    whole = quietly(regression, AutoNormal, data, steps=1500, **options)
    parts = quietly(regression, AutoNormal, data, steps=613, **options)
    parts.sample(10)  # using a fit in between changes nothing
    parts.extend(887)
    assert np.array_equal(whole.elbo, parts.elbo)
    assert all(torch.equal(whole.params[k], parts.params[k]) for k in whole.params)


def test_extend_on_a_deterministic_fit():
    fit = vi.fit(scale_model, AutoNormal, {"y": torch.randn(9)}, progress=False)
    with pytest.raises(ValueError, match="deterministic"):
        fit.extend(100)
    draws = fit._progress.num_draws
    fit.extend()
    assert fit._progress.num_draws == 2 * draws


def test_an_unfinished_stochastic_fit_warns():
    with pytest.warns(vi.ConvergenceWarning, match="Not converged"):
        vi.fit(
            regression,
            AutoNormal,
            regression_data(),
            method="stochastic",
            stop=lambda running: True,
            progress=False,
        )


# ------------------------------------------------------------------ using it


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


def test_repr_says_what_it_is():
    text = repr(vi.fit(regression, AutoNormal, regression_data(), progress=False))
    for part in ("regression", "mean-field", "w[3]", "deterministic", "ELBO", "converged"):
        assert part in text


def test_restarts_keep_the_best():
    fit = quietly(regression, AutoNormal, regression_data(), steps=30, restarts=3)
    assert len(fit.restarts) == 3
    elbo, error = fit.elbo_estimate(200)
    assert abs(elbo - max(fit.restarts)) < 1e-3 * abs(elbo) + Z * error


def test_a_model_with_single_precision_constants_of_its_own_still_runs():
    constants = torch.randn(60, 3)

    def model(y):
        w = pyro.sample("w", dist.Normal(0.0, 5.0).expand([3]).to_event(1))
        with pyro.plate("observations", len(y)):
            pyro.sample("y", dist.Normal(constants @ w, 1.0), obs=y)

    fit = quietly(model, AutoMultivariateNormal, {"y": torch.randn(60)})
    assert fit.method == "deterministic" and fit._dtype == torch.float32
    mean, covariance, _ = regression_posterior(constants, fit.data["y"])
    found = fit.guide.get_posterior().mean.detach().double()
    assert ((found - mean) / covariance.diagonal().sqrt()).abs().max() < 0.02


def test_many_latents_go_by_hessian_vector_products():
    y = 3 + torch.randn(400, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("groups", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    fit = vi.fit(model, AutoNormal, {"y": y}, progress=False)
    assert fit.method == "deterministic" and fit.converged
    n = len(y)
    precision_mu = n / 2 + 0.01
    exact = float(y.sum() / 2) / precision_mu
    conditional_sd = (n + 0.01) ** -0.5  # mean field: theta given
    assert abs(float(fit.params["AutoNormal.locs.mu"]) - exact) < 0.05 * precision_mu**-0.5
    assert abs(math.log(float(fit.params["AutoNormal.scales.mu"]) / conditional_sd)) < 0.01


def test_a_density_without_a_bound_does_not_catch_the_fit():
    """Rat tumours (Gelman et al. 2013, section 5.3): with all rates equal the density is infinite.

    Every mode found runs off there. Mean field's best member is where the mass is: its ELBO is
    within 2 nats of that of the best full-rank member, and 50 above what it is at such a mode.
    """

    def model(n, y):
        positive = dist.ImproperUniform(constraints.positive, (), ())
        a, b = pyro.sample("a", positive), pyro.sample("b", positive)
        pyro.factor("hyperprior", -2.5 * torch.log(a + b))
        with pyro.plate("groups", len(n)):
            theta = pyro.sample("theta", dist.Beta(a, b))
            pyro.sample("y", dist.Binomial(n, theta), obs=y)

    n = torch.full((20,), 20.0)
    y = torch.tensor([0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 8, 9, 10, 12.0])
    full, diagonal = (
        vi.fit(model, guide, {"n": n, "y": y}, progress=False)
        for guide in (AutoMultivariateNormal, AutoNormal)
    )
    assert full.elbo_estimate()[0] - 2 < diagonal.elbo_estimate()[0] < full.elbo_estimate()[0]
    assert float(diagonal.sample(100)["a"].max()) < 1e3


@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal])
def test_a_model_that_raises_at_its_prior_medians(guide):
    """A conditional autoregression, whose precision is positive definite for |rho| < 1 only."""
    neighbours = torch.diag(torch.ones(5), 1)
    neighbours = neighbours + neighbours.T
    weights = neighbours / neighbours.sum(0).sqrt().outer(neighbours.sum(0).sqrt())

    def model(y):
        rho = pyro.sample("rho", dist.Normal(1.5, 1.0))
        field = dist.MultivariateNormal(
            torch.zeros(6), precision_matrix=torch.eye(6) - rho * weights
        )
        with pyro.plate("years", len(y)):
            pyro.sample("y", field, obs=y)

    covariance = torch.linalg.inv(torch.eye(6) - 0.3 * weights)
    y = dist.MultivariateNormal(torch.zeros(6), covariance).sample((100,))
    with pytest.raises(ValueError, match="PositiveDefinite"):
        pyro.condition(model, data={"rho": torch.tensor(1.5)})(y)
    fit = vi.fit(model, guide, {"y": y}, progress=False)
    rho = fit.sample(4000)["rho"]
    assert fit.converged
    assert abs(float(rho.mean()) - 0.3) < Z * float(rho.std())


def test_steps_beyond_convergence():
    """A fit that has converged goes on when it is asked for more steps."""

    def model():
        pyro.sample("z", dist.Bernoulli(0.3))

    def guide():
        p = pyro.param("p", torch.tensor(0.3), constraint=constraints.unit_interval)
        pyro.sample("z", dist.Bernoulli(p))

    fit = quietly(model, guide, {}, steps=6_000)
    assert fit.converged
    assert len(fit.elbo) == 6_000
    assert float(fit.extend(1_000).params["p"]) == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("family", [AutoDelta, AutoNormal])
def test_a_look_at_the_guides_units_leaves_the_draws_as_they_were(family):
    fit = quietly(regression, family, regression_data(n=20), steps=5)
    with fit._isolated():
        before = torch.get_rng_state()
        fit._stochastic.fisher_scale()
        assert torch.equal(torch.get_rng_state(), before)
