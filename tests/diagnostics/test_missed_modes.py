"""Modes that a fit misses are found, and odd shapes with one mode raise no alarm."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import vi_toolkit as vi
from tests.support import fitted


def two_signs(y):
    z = pyro.sample("z", dist.Normal(y.new_zeros(()), 3.0))
    pyro.sample("y", dist.Normal(z**2, 0.5), obs=y)


def two_components(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0).expand([2]).to_event(1))
    with pyro.plate("data", len(y)):
        each = dist.Normal(mean, 1.0).log_prob(y[:, None])
        pyro.factor("y", torch.logsumexp(each + math.log(0.5), -1))


def lopsided(weight):
    """Two Normals 8 sds apart, the further one with that weight."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        near, far = dist.Normal(0.0, 1.0).log_prob(z), dist.Normal(8.0, 1.0).log_prob(z)
        both = torch.logaddexp(near + math.log1p(-weight), far + math.log(weight))
        pyro.factor("both", both - near)

    return model


@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal])
def test_the_other_sign_and_the_other_labels_are_reported(guide):
    """By symmetry each holds one half, up to Laplace's error: a tenth of it here."""
    y = torch.randn(60) + torch.tensor([-3.0, 3.0]).repeat(30)
    for model, data in ((two_signs, torch.tensor(9.0)), (two_components, y)):
        fit = fitted(model, guide, {"y": data})
        (missed,) = vi.missed_modes(fit)
        assert missed.share == pytest.approx(0.5, abs=0.05)
        assert missed.distance > 5 and missed.furthest in missed.location
    assert missed.location["mean[0]"] * float(fit.sample(100)["mean"][:, 0].mean()) < 0


@pytest.mark.parametrize("weight", [0.2, 0.01])
def test_the_share_is_the_modes_mass(weight):
    """Exact for Normals: the fit is in the heavy one, whose log mass is that of its evidence."""
    missed = vi.missed_modes(fitted(lopsided(weight), AutoNormal))
    assert [round(m.share, 2) for m in missed] == ([0.2] if weight == 0.2 else [])


def banana():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("b", dist.Normal(a**2, 0.1))


def funnel():
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    pyro.sample("x", dist.Normal(0.0, (v / 2).exp()).expand([5]).to_event(1))


def skewed():
    pyro.sample("g", dist.Gamma(1.2, 1.0))


def heavy():
    pyro.sample("t", dist.StudentT(2.0, 0.0, 1.0).expand([3]).to_event(1))


@pytest.mark.parametrize("model", [banana, funnel, skewed, heavy, lopsided(1e-6)])
def test_one_mode_raises_no_alarm(model):
    assert vi.missed_modes(fitted(model, AutoNormal)) == []


def test_the_verdict_reports_a_missed_mode():
    fit = fitted(two_signs, AutoNormal, {"y": torch.tensor(9.0)})
    diagnosis = vi.diagnose(fit, num_draws=5_000)
    assert diagnosis.verdict == "do not trust"
    assert "not the whole posterior: another mode, at z = -3" in diagnosis.reasons[0]
    assert "symmetry" in diagnosis.next_steps[0]
    (mode,) = diagnosis.to_dict()["missed_modes"]
    assert mode["location"]["z"] == pytest.approx(-3, abs=0.1)
    assert diagnosis.table["mean ok"].all()  # within the mode


def test_many_latents_are_not_searched():
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0).expand([301]).to_event(1))

    assert vi.missed_modes(vi.fit(model, AutoNormal, {}, progress=False)) == []
