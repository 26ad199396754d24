"""Draws are copies: using them never changes the fit, and going on never changes them."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta

import vi_toolkit as vi

Y = [1.0, 1.5, 1.6]
MODE = sum(Y) / (len(Y) + 1 / 25)  # of Normal(0, 5) times three Normal(mu, 1)


def location(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def point(y):
    pyro.sample("mu", dist.Delta(pyro.param("m", torch.tensor(0.0))))


def two_points(y):
    with pyro.plate("pair", 2):
        pyro.sample("mu", dist.Delta(pyro.param("m", torch.zeros(2))))


def two_locations(y):
    with pyro.plate("pair", 2):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu.mean(), 1.0), obs=y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["auto", "stochastic"])
@pytest.mark.parametrize("guide", [point, AutoDelta])
def test_a_site_whose_value_is_a_parameter_is_drawn_at_its_fitted_value(guide, method, dtype):
    fit = vi.fit(location, guide, {"y": torch.tensor(Y, dtype=dtype)}, method=method,
                 progress=False)  # fmt: skip
    (value,) = fit.params.values()
    draws = fit.sample(3)["mu"]
    assert torch.equal(draws, value.to(dtype).expand(3))
    assert float(value) == pytest.approx(MODE, abs=1e-3)  # Adam's last step size is 2e-4 or less
    assert not draws.requires_grad
    draws += 100
    (after,) = fit.params.values()
    assert torch.equal(after, value)
    assert torch.equal(fit.sample(3)["mu"], value.to(dtype).expand(3))


def test_draws_do_not_follow_a_fit_that_goes_on():
    fit = vi.fit(location, point, {"y": torch.tensor(Y)}, steps=50, average=False, progress=False)
    before = fit.sample(2)["mu"]
    kept = before.clone()
    fit.extend(50)
    assert torch.equal(before, kept)
    assert not torch.equal(fit.sample(2)["mu"], kept)


def test_points_in_a_plate_are_drawn_at_their_fitted_values():
    fit = vi.fit(two_locations, two_points, {"y": torch.tensor(Y)}, progress=False)
    assert torch.equal(fit.sample(4)["mu"], fit.params["m"].float().expand(4, 2))
    assert fit.params["m"].abs().min() > 0.5
