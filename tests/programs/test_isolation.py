"""Fits borrow the global random state, dtype and parameter store, and give them back unchanged."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from tests.models import regression, regression_data
from tests.support import quietly
from vi_toolkit.programs import isolation


@pytest.mark.parametrize(("made", "known"), [(2, 2), (2, 1), (1, 2), (0, 2), (2, 0)])
def test_the_random_state_includes_the_gpus(monkeypatch, made, known):
    """As many as there are; kept in a process with some, a state can be set in one with others."""

    def pretend(number, first):
        states = {
            k: torch.full((isolation.GPU_STATE_BYTES,), first + k, dtype=torch.uint8)
            for k in range(number)
        }
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: number > 0)
        monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: list(states.values()))
        monkeypatch.setattr(torch.cuda, "set_rng_state", lambda s, k: states.update({k: s}))
        return states

    pretend(made, 1)
    kept = isolation.random_state()
    drawn = torch.rand(3)
    states = pretend(known, 7)
    isolation.set_random_state(kept)
    assert torch.equal(torch.rand(3), drawn)
    found = [int(s[0]) for s in states.values()]
    assert found == [1 + k if k < made else 7 + k for k in range(known)]


@pytest.mark.parametrize("options", [{}, {"steps": 60}], ids=["deterministic", "stochastic"])
def test_the_same_seed_gives_the_same_fit_and_globals_are_unchanged(options):
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


def test_networks_and_tensors_that_the_guide_closes_over_are_left_untouched():
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
