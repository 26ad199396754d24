"""Modes and Hessians of the log joint density, and the fits that are modes."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoLaplaceApproximation, AutoNormal

import vi_toolkit as vi
from tests.models import regression, regression_data, regression_posterior
from tests.tolerances import Z
from vi_toolkit.deterministic.modes import find_modes, hessian_product, hessians
from vi_toolkit.programs.isolation import isolated_pyro_state
from vi_toolkit.programs.joint import Joint


def test_hessians_agree_with_products_and_with_the_conjugate_precision():
    data = regression_data(dtype=torch.float64)
    _, _, precision = regression_posterior(**data)
    with isolated_pyro_state(dtype=torch.float64):
        joint = Joint(regression, data)
        u = torch.randn(2, 3)
        h = hessians(joint, u)
        assert torch.allclose(h, -precision.expand(2, 3, 3), atol=1e-8)
        v = torch.randn(3)
        assert torch.allclose(hessian_product(joint, u[0], v), h[0] @ v, atol=1e-8)


@pytest.mark.parametrize("units", [1.0, 1e4])
def test_the_mode_of_a_gaussian_posterior_is_found_in_any_units(units):
    data = regression_data(dtype=torch.float64)
    data["X"] = data["X"] * torch.tensor([1.0, units, 1 / units])
    mean, _, precision = regression_posterior(**data)
    with isolated_pyro_state(dtype=torch.float64):
        modes = find_modes(Joint(regression, data))
    assert len(modes) == 1 and modes[0].converged
    sd = torch.linalg.inv(precision).diagonal().sqrt()
    assert ((modes[0].location - mean) / sd).abs().max() < 1e-6


def test_every_mode_is_found_and_the_higher_comes_first():
    def two_modes():
        x = pyro.sample("x", dist.Normal(0.0, 10.0))
        pyro.factor("bumps", torch.logaddexp(2 - 2 * (x + 4) ** 2, -2 * (x - 4) ** 2))

    with isolated_pyro_state(dtype=torch.float64):
        torch.manual_seed(0)
        modes = find_modes(Joint(two_modes, {}))
    assert [round(float(m.location[0])) for m in modes[:2]] == [-4, 4]


def test_a_point_guide_finds_the_mode():
    data = regression_data()
    mean, covariance, _ = regression_posterior(**data)
    fit = vi.fit(regression, AutoDelta, data, progress=False)
    draws = fit.sample(2)["w"].double()
    assert torch.equal(draws[0], draws[1])
    assert ((draws[0] - mean) / covariance.diagonal().sqrt()).abs().max() < 1e-3


def skewed(y):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Poisson(rate), obs=y)


@pytest.mark.parametrize("given", ["class", "instance"])
def test_laplace_is_the_gaussian_at_the_mode(given, tmp_path):
    y = torch.tensor([2.0, 3.0, 1.0])
    own = AutoLaplaceApproximation if given == "class" else AutoLaplaceApproximation(skewed)
    fit = vi.fit(skewed, own, {"y": y}, progress=False)
    # u = log rate has log density (2 + sum y) u - (1 + n) exp(u): mode log(8 / 4), curvature 8.
    assert fit.converged
    assert fit.guide_family == "full-rank"
    assert "Laplace" in fit.why
    assert float(fit.params["AutoMultivariateNormal.loc"]) == pytest.approx(math.log(2), abs=1e-5)
    assert float(fit.params["AutoMultivariateNormal.scale"]) == pytest.approx(8**-0.5, rel=1e-5)
    u = fit.sample(40_000)["rate"].double().log()
    assert abs(float(u.std()) - 8**-0.5) < Z * 8**-0.5 / 80_000**0.5
    assert vi.diagnose(fit).verdict != "trust"  # E u is lower than the mode by 0.06, 0.18 sd
    fit.save(tmp_path / "fit")
    assert torch.equal(
        vi.load(tmp_path / "fit", skewed, own).sample(3)["rate"], fit.sample(3)["rate"]
    )
    with pytest.raises(vi.NotDeterministicError, match="AutoLaplaceApproximation needs the mode"):
        vi.fit(skewed, own, {"y": y}, steps=10, progress=False)


def test_many_latents_are_fitted_by_hessian_vector_products():
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
