"""Stochastic optimisation knows its error, stops by itself, and continues as asked."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch.distributions import constraints

import vi_toolkit as vi
from tests.models import regression, regression_data
from tests.support import quietly


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


def test_an_unfinished_stochastic_fit_warns():
    with pytest.warns(vi.ConvergenceWarning, match="Not converged"):
        vi.fit(
            regression,
            AutoNormal,
            regression_data(),
            method="stochastic",
            callback=lambda look: True,
            progress=False,
        )


@pytest.mark.parametrize("options", [{}, {"subsample": {"observations": 7}}], ids=["full", "batch"])
def test_an_extended_fit_equals_one_that_never_stopped_bit_for_bit(options):
    data = regression_data()
    whole = quietly(regression, AutoNormal, data, steps=1500, **options)
    parts = quietly(regression, AutoNormal, data, steps=613, **options)
    parts.sample(10)  # using a fit in between changes nothing
    parts.extend(887)
    assert np.array_equal(whole.elbo, parts.elbo)
    assert all(torch.equal(whole.params[k], parts.params[k]) for k in whole.params)


def test_a_converged_fit_takes_the_steps_it_is_asked_for():
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


@pytest.mark.parametrize("family", [AutoDelta, AutoNormal])
def test_measuring_the_fisher_scale_leaves_the_random_state_unchanged(family):
    fit = quietly(regression, family, regression_data(n=20), steps=5)
    with fit.workspace.isolated():
        before = torch.get_rng_state()
        fit.run.stages.fisher_scale()
        assert torch.equal(torch.get_rng_state(), before)
