"""Linear response against posteriors whose covariance is known."""

import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import vi_toolkit as vi
from tests.models import gaussian
from tests.support import fitted
from vi_toolkit.diagnostics.linear_response import _conjugate_gradients, _dense


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


def test_linear_response_agrees_with_refitting_a_tilted_model():
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


def test_linear_response_reports_that_there_is_no_maximum():
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
