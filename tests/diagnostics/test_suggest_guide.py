"""The guide that is suggested is one that was fitted and found better."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import vi_toolkit as vi
from tests.diagnostics.test_diagnostics import SCHOOLS, eight_schools, fitted, gaussian
from tests.tolerances import Z
from vi_toolkit.diagnostics.suggest import hierarchical


def test_a_full_covariance_gains_the_known_divergence():
    """Mean field on a bivariate Gaussian loses -log(1 - rho^2) / 2 nats, full rank nothing."""
    fit = fitted(gaussian(0.9), AutoNormal)
    found = vi.suggest_guide(fit)
    assert found.best == "AutoMultivariateNormal"
    row = found.table.loc[found.best]
    expected = -0.5 * torch.tensor(1 - 0.9**2).log()
    assert abs(row["gain"] - float(expected)) < Z * row["gain_se"]
    assert found.fit.guide_family == "full-rank"
    assert "larger" in repr(found)
    left, right = found.plot().axes
    assert left.get_title(loc="left") == "Best: AutoMultivariateNormal"
    assert [bar.get_width() for bar in left.patches] == pytest.approx([row["gain"], 0.0])
    assert len(right.collections[0].get_offsets()) == 2


def test_silent_where_nothing_is_better():
    fit = fitted(gaussian(0.9), AutoMultivariateNormal)
    found = vi.suggest_guide(fit)
    assert found.best is None
    assert found.fit is fit
    assert "keep the guide" in found.meaning
    nearly = vi.suggest_guide(fitted(gaussian(0.1), AutoNormal))  # 0.005 nats to gain
    assert nearly.best is None


def test_non_centring_the_eight_schools():
    fit = fitted(eight_schools, AutoMultivariateNormal, SCHOOLS)
    assert hierarchical(fit) == ["theta"]
    found = vi.suggest_guide(fit)
    assert found.best == "AutoMultivariateNormal with theta non-centred"
    row = found.table.loc[found.best]
    assert row["gain"] > 0.5
    assert row["k-hat"] < 0.7 < found.table.loc["as it is", "k-hat"]
    # The suggested fit is of the same posterior: it makes theta, and predicts.
    assert found.fit.predict(5)["theta"].shape == (5, 8)


def test_candidates_of_ones_own_and_those_that_cannot_be_fitted():
    def broken():
        pyro.sample("q", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    fit = fitted(gaussian(0.5), AutoNormal)
    mine = {"mine": (gaussian(0.5), AutoMultivariateNormal), "broken": (gaussian(0.5), broken)}
    found = vi.suggest_guide(fit, mine)
    assert found.best == "mine"
    assert "PreflightError" in found.failed["broken"]
    assert list(found.table.index) == ["as it is", "mine"]


def test_what_is_hierarchical():
    def model(y):
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        pyro.sample("free", dist.Normal(0.0, 1.0))
        pyro.sample("vector", dist.Normal(torch.zeros(3), scale).to_event(1))
        pyro.sample("positive", dist.LogNormal(0.0, scale))
        pyro.sample("y", dist.Normal(0.0, 1.0).expand([2]).to_event(1), obs=y)

    assert hierarchical(fitted(model, AutoNormal, {"y": torch.zeros(2)}, steps=1)) == ["vector"]


def test_the_diagnosis_points_to_it():
    found = vi.diagnose(fitted(gaussian(0.9), AutoNormal), num_draws=10_000)
    assert any("vi.suggest_guide(fit)" in step for step in found.next_steps)
