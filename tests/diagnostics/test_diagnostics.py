"""Every diagnostic where it must fire and where it must stay silent."""

import json
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal

import vi_toolkit as vi
from tests.tolerances import Z
from vi_toolkit.diagnostics.convergence import effective_size, split_r_hat
from vi_toolkit.diagnostics.importance import draws_from_guide, draws_from_t, moments_of
from vi_toolkit.diagnostics.linear_response import _conjugate_gradients, _dense


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


def fitted(model, guide, data=None, **options):
    return vi.fit(model, guide, data or {}, progress=False, **options)


# ------------------------------------------------------------------ k-hat


@pytest.mark.parametrize("rho", [0.3, 0.5, 0.7, 0.9])
def test_k_hat_of_mean_field_on_a_gaussian_is_the_correlation(rho):
    """k = 1 - lambda_min(D^-1/2 Lambda D^-1/2), in two dimensions |rho|."""
    found = vi.psis(fitted(gaussian(rho), AutoNormal), num_draws=100_000)
    assert found.k == pytest.approx(rho, abs=0.1)
    if rho != 0.7:  # there the mass unseen is on either side of the limit
        assert found.reliable == (rho < 0.7)


def test_k_hat_is_silent_on_an_exact_posterior():
    found = vi.psis(fitted(gaussian(0.9), AutoMultivariateNormal), num_draws=10_000)
    assert found.reliable
    assert found.sd_log_weight < 0.01
    assert found.effective_fraction == pytest.approx(1, abs=0.01)


def test_k_hat_of_weights_with_a_known_tail():
    """Weights (1 - u)^-k are Pareto with shape k."""
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(8, 50_000, generator=generator, dtype=torch.float64)
    for k in (0.2, 0.6, 1.2):
        found = vi.pareto_k(-k * torch.log1p(-u))
        assert abs(found.k - k) < max(Z * found.k_se, 0.1)
    with pytest.raises(ValueError, match="finite"):
        vi.pareto_k(torch.full((2, 100), -torch.inf))


def test_a_heavy_tail_is_judged_by_how_much_is_in_it():
    """Weights 1 + c ((1 - u)^-k - 1), k = 0.72: little mass in the tail, and much."""
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(8, 50_000, generator=generator, dtype=torch.float64)
    k = 0.72
    for c, good in ((0.005, True), (0.5, False)):
        weights = 1 + c * ((1 - u) ** -k - 1)
        found = vi.pareto_k(weights.log())
        assert 0.65 < found.k < found.limit
        assert found.reliable == good
        # What the largest weight leaves out, in truth: c / (1 - k) (1 / n)^(1 - k) of the mass.
        total = 1 + c * (1 / (1 - k) - 1)
        expected = c / (1 - k) * (8 * 50_000) ** -(1 - k) / total
        assert found.unseen == pytest.approx(expected, rel=0.5)
        assert ("mass" in found.fault) == (not good)


def test_few_weights_that_carry_everything_are_refused_whatever_their_tail():
    """Log-normal weights have every moment: k = 0, in the end. Of 8 x 2,000 it is not seen."""
    generator = torch.Generator().manual_seed(0)
    found = vi.pareto_k(1.4 * torch.randn(8, 2_000, generator=generator, dtype=torch.float64))
    assert found.k < 0.7
    assert found.unseen > 2e-3
    assert not found.reliable
    assert vi.pareto_k(torch.zeros(8, 100)).limit == 0.5


# ------------------------------------------------------------------ linear response


def hand_written():
    """Mean field by hand: not one of the families, so through the guide's own parameters."""
    loc = pyro.param("loc", torch.tensor([0.3, -0.2]).double())
    scale = pyro.param("scale", torch.ones(2).double(), constraint=dist.constraints.positive)
    pyro.sample("z", dist.Normal(loc, scale).to_event(1))


@pytest.mark.parametrize("guide", [AutoNormal, hand_written, AutoMultivariateNormal])
@pytest.mark.parametrize("most_dense", [1_000, 1])  # formed, or by conjugate gradients
def test_linear_response_is_exact_on_a_gaussian(guide, most_dense, monkeypatch):
    module = sys.modules["vi_toolkit.diagnostics.linear_response"]
    monkeypatch.setattr(module, "DENSE", most_dense)
    fit = fitted(gaussian(0.9), guide)
    before = fit.params
    found = vi.linear_response(fit)
    assert found.covariance == pytest.approx(np.array([[1, 0.9], [0.9, 1]]), abs=1e-3)
    expected = 0.19**0.5 if guide is not AutoMultivariateNormal else 1
    assert found.guide_sd == pytest.approx(expected, rel=0.02)
    assert found.optimum
    assert all(torch.equal(before[k], v) for k, v in fit.params.items())
    one = vi.linear_response(fit, scalars=["z[1]"])
    assert one.sd == pytest.approx(found.sd[1:], rel=1e-4)


def test_linear_response_of_a_poisson_rate():
    """d E_q[log rate] / d tilt against the tilted optimum itself, by refitting."""
    y = torch.tensor([0.0, 2.0, 1.0, 4.0]).double()

    def model(y, tilt=0.0):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.factor("tilt", tilt * a)
        with pyro.plate("observations", len(y)):
            rate = (a + b * torch.linspace(0.5, 1.5, 4).double()).exp()
            pyro.sample("y", dist.Poisson(rate), obs=y)

    variance = vi.linear_response(fitted(model, AutoNormal, {"y": y})).covariance[0, 0]
    h = 0.02
    ends = [
        fitted(model, AutoNormal, {"y": y, "tilt": t}).params["AutoNormal.locs.a"] for t in (h, -h)
    ]
    assert float(ends[0] - ends[1]) / (2 * h) == pytest.approx(variance, rel=0.02)


def test_linear_response_says_where_there_is_no_maximum():
    indefinite = torch.diag(torch.tensor([1.0, -1.0]))
    jacobian = torch.eye(2)
    assert not _dense(lambda v: indefinite @ v, jacobian)[1]
    assert not _conjugate_gradients(lambda v: indefinite @ v, jacobian)[1]
    definite = torch.diag(torch.tensor([1.0, 4.0]))
    for solve in (_dense, _conjugate_gradients):
        solved, optimum = solve(lambda v: definite @ v, jacobian)
        assert optimum
        assert torch.allclose(solved, torch.diag(torch.tensor([1.0, 0.25])))


def test_linear_response_refuses_a_stochastic_fit():
    fit = fitted(gaussian(0.5), AutoNormal, steps=5)
    with pytest.raises(vi.NotDeterministicError, match="deterministic"):
        vi.linear_response(fit)
    with pytest.raises(ValueError, match="no scalar 'q'"):
        vi.linear_response(fitted(gaussian(0.5), AutoNormal), scalars=["q"])


# ------------------------------------------------------------------ importance sampling


def test_evidence_and_moments_of_a_conjugate_model():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("observations", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    y = torch.tensor([1.0, 0.2, 2.5]).double()
    exact = dist.MultivariateNormal(torch.zeros(3).double(), torch.eye(3).double() + 4).log_prob(y)
    precision = 3 + 1 / 4
    fit = fitted(model, AutoNormal, {"y": y})
    wide = np.array([[2 / precision]])
    for draws in (draws_from_guide(fit, 20_000, 8, 0), draws_from_t(fit, wide, 20_000, 8, 0)):
        found = moments_of(fit, draws, "any")
        assert found.pareto_k.reliable
        assert abs(found.log_evidence - float(exact)) < Z * found.log_evidence_se + 1e-3
        assert abs(found.mean[0] - float(y.sum()) / precision) < Z * found.mean_se[0] + 1e-3
        assert abs(found.sd[0] - precision**-0.5) < Z * found.sd_se[0] + 1e-3


# ------------------------------------------------------------------ convergence


def test_r_hat_fires_on_a_drift_and_is_silent_on_noise():
    noise = np.random.default_rng(0).normal(size=(64, 5))
    assert split_r_hat(noise) < 1.1
    assert split_r_hat(noise + np.linspace(0, 4, 64)[:, None]) > 1.5
    assert split_r_hat(np.ones((64, 2))) == 1
    constant = np.ones((64, 1))
    assert split_r_hat(np.hstack([noise, constant])) == split_r_hat(noise)
    # Beyond 2,000 parameters the one that drifts is still found.
    many = np.random.default_rng(1).normal(size=(64, 2_500))
    many[:, 1_234] += np.linspace(0, 8, 64)
    assert split_r_hat(many) == split_r_hat(many[:, 1_234:1_235]) > 1.5
    assert 30 < effective_size(noise) <= 64
    assert effective_size(np.cumsum(noise, 0)) < 10


def test_the_stopping_rule_stops_a_fit():
    model = gaussian(0.5)
    fit = fitted(model, AutoNormal, optimizer=0.05, callback=lambda look: look.error <= 0.3)
    assert fit.monte_carlo_error <= 0.3
    found = vi.convergence(fit)
    assert found.r_hat < 1.1
    assert found.converged == fit.converged


# ------------------------------------------------------------------ the verdict


def test_trust():
    found = vi.diagnose(fitted(gaussian(0.9), AutoMultivariateNormal), num_draws=10_000)
    assert found.verdict == "trust"
    assert not found.next_steps


def test_trust_the_means_only_and_the_correction_offered_is_right():
    found = vi.diagnose(fitted(gaussian(0.9), AutoNormal), num_draws=20_000)
    assert found.verdict == "trust the means only"
    assert found.table["sd ratio"].to_numpy() == pytest.approx(0.19**0.5, rel=0.05)
    assert "linear_response" in found.next_steps[0]
    assert found.moments.sd == pytest.approx(1, rel=0.05)


def test_do_not_trust_means_that_are_off():
    """A gamma posterior with shape 1.5: the best Gaussian of its log is centred elsewhere."""

    def model():
        pyro.sample("rate", dist.Gamma(0.4, 1.0))

    fit = fitted(model, AutoNormal)
    found = vi.diagnose(fit)
    # E[log rate] = digamma(0.4)
    truth = float(torch.digamma(torch.tensor(0.4)))
    off = abs(float(fit.sample(50_000)["rate"].log().mean()) - truth) / float(
        torch.polygamma(1, torch.tensor(0.4)).sqrt()
    )
    assert off > 0.05
    assert found.verdict == "do not trust"


@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal])
def test_do_not_trust_centred_eight_schools(guide):
    found = vi.diagnose(fitted(eight_schools, guide, SCHOOLS), num_draws=20_000, chains=False)
    assert found.verdict == "do not trust"
    assert found.pareto_k.k > 0.7
    assert found.next_steps


def test_do_not_trust_what_has_not_converged():
    found = vi.diagnose(fitted(gaussian(0.5), AutoNormal, steps=5))
    assert found.verdict == "do not trust"
    assert found.pareto_k is None
    assert "extend" in found.next_steps[0]


def test_a_point_is_refused():
    with pytest.raises(ValueError, match="point"):
        vi.diagnose(fitted(gaussian(0.5), AutoDelta))


def test_seed_report_dictionary_and_figure(tmp_path):
    fit = fitted(gaussian(0.9), AutoNormal)
    first, again = (vi.diagnose(fit, num_draws=2_000, seed=5) for _ in range(2))
    assert repr(first) == repr(again)
    assert json.loads(json.dumps(first.to_dict()))["verdict"] == first.verdict
    for found in (first, vi.diagnose(fitted(gaussian(0.5), AutoNormal, steps=5))):
        found.plot().savefig(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 10_000
