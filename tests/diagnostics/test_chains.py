"""Short chains started at the guide stay where it is right and leave it where it is wrong."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import vi_toolkit as vi
from tests.models import SCHOOLS, eight_schools, gaussian
from tests.support import fitted
from tests.tolerances import Z
from vi_toolkit.diagnostics import chains


def log_gammas(shape, d):
    """Logs of Gammas: skewed, the more the smaller the shape, with moments in closed form."""

    def model():
        a = torch.full((d,), float(shape), dtype=torch.float64)
        pyro.sample("rate", dist.Gamma(a, 1.0).to_event(1))

    a = torch.tensor(float(shape), dtype=torch.float64)
    return model, float(torch.digamma(a)), float(torch.polygamma(1, a).sqrt())


@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal])
@pytest.mark.parametrize("dense", [1_000, 1])  # a metric with correlations, and one without
def test_chains_find_the_moments_of_a_gaussian(guide, dense, monkeypatch):
    """Mean field starts with sds of 0.44, full rank with the right ones."""
    monkeypatch.setattr(chains, "DENSE", dense)
    found = vi.warm_chains(fitted(gaussian(0.9), guide))
    assert found.reliable
    assert "agree" in found.meaning
    assert (np.abs(found.mean) < Z * found.mean_se).all()
    assert (np.abs(found.sd - 1) < Z * found.sd_se).all()
    assert max(found.mean_se.max(), found.sd_se.max()) <= chains.WANTED
    assert np.abs(found.moved).max() < 0.05 + Z * found.mean_se.max()


def test_chains_adapt_to_scales_far_apart_from_a_poor_metric():
    def model():
        pyro.sample("a", dist.Normal(0.0, torch.tensor(1e-3).double()))
        pyro.sample("b", dist.Normal(0.0, torch.tensor(1e3).double()))

    found = vi.warm_chains(fitted(model, AutoNormal), covariance=np.diag([1e-5, 1e5]))
    assert found.reliable
    assert (np.abs(found.sd / [1e-3, 1e3] - 1) < Z * found.sd_se / found.sd).all()


@pytest.mark.parametrize(
    ("shape", "d", "verdict"), [(10, 100, "trust"), (2, 40, "trust the means only")]
)
def test_the_verdict_is_right_in_many_dimensions(shape, d, verdict):
    """Gaussian guides: all sds 2.4 % (shape 10) and 11 % (shape 2) too small, means right."""
    model, mean, sd = log_gammas(shape, d)
    fit = fitted(model, AutoNormal)
    found = vi.diagnose(fit, num_draws=2_000)
    assert not found.pareto_k.reliable
    assert found.verdict == verdict
    assert found.moments is found.chains
    assert "short chains" in found.reasons[0]
    assert found.to_dict()["moments_by"] == "short chains"
    assert (np.abs(found.moments.mean - mean) < Z * found.moments.mean_se).all()
    assert (np.abs(found.moments.sd - sd) < Z * found.moments.sd_se).all()
    if verdict == "trust":
        without = vi.diagnose(fit, num_draws=2_000, chains=False)
        assert without.verdict == "do not trust"
        assert without.chains is None


def test_chains_correct_a_mean_that_is_off():
    """A guide that may not move: half an sd away in one of 30 directions."""
    model, mean, sd = log_gammas(50, 30)
    at = torch.full((30,), mean, dtype=torch.float64)
    at[17] += 0.5 * sd

    def guide():
        scale = pyro.param("scale", torch.tensor(sd).double(), constraint=dist.constraints.positive)
        pyro.sample("rate", dist.LogNormal(at, scale).to_event(1))

    found = vi.warm_chains(fitted(model, guide))
    assert found.reliable
    error = Z * found.mean_se / found.sd + 0.02  # and that of the guide's mean, from 4,000 draws
    assert np.abs(found.moved[17] + 0.5) < error[17] + Z / math.sqrt(4_000)
    assert (np.abs(np.delete(found.moved, 17)) < np.delete(error, 17) + Z / math.sqrt(4_000)).all()


def test_chains_in_a_funnel_are_not_used():
    diagnosis = vi.diagnose(fitted(eight_schools, AutoNormal, SCHOOLS), num_draws=5_000)
    found = diagnosis.chains
    assert not found.reliable
    assert "log(tau)" in found.meaning
    assert found.moved[found.names.index("log(tau)")] < -0.3  # -0.8 in truth: towards the neck
    assert diagnosis.verdict == "do not trust"
    assert diagnosis.moments is None
    assert "log(tau)" in " ".join(diagnosis.reasons)


def test_chains_are_not_run_where_they_would_take_too_long(monkeypatch):
    monkeypatch.setattr(chains, "MOST_WORK", 10)
    assert vi.warm_chains(fitted(gaussian(0.5), AutoNormal)) is None


def test_a_seed_repeats_the_chains_and_nothing_is_left_behind():
    fit = fitted(gaussian(0.5), AutoNormal)
    state, params = torch.get_rng_state(), fit.params
    first, again, other = (vi.warm_chains(fit, seed=s) for s in (3, 3, 4))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(params[k], v) for k, v in fit.params.items())
    assert np.array_equal(first.mean, again.mean)
    assert not np.array_equal(first.mean, other.mean)


def test_points_without_density_are_not_visited():
    """A density that is not finite beyond 3: the draws stay below."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0).double(), 1.0))
        pyro.factor("wall", torch.where(z > 3, -torch.inf, 0.0))

    def guide():
        loc = pyro.param("loc", torch.tensor(-1.0).double())
        pyro.sample("z", dist.Normal(loc, 0.3))

    found = vi.warm_chains(fitted(model, guide, steps=2, optimizer=1e-6))
    assert found.path.max() < 3
    assert abs(found.sd[0] - 1) < 0.02 + Z * found.sd_se[0]


def test_the_figure_shows_every_scalar_and_whether_the_chains_are_usable(tmp_path):
    for name, guide in (("narrow", AutoNormal), ("right", AutoMultivariateNormal)):
        figure = vi.warm_chains(fitted(gaussian(0.9), guide)).plot()
        left, right = figure.axes
        assert len(left.lines) == 1 + 2 * 2  # the end of the warm-up, and a line and a dot each
        assert right.get_title(loc="left") == "usable"
        figure.savefig(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
