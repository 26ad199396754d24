"""A deterministic run can be interrupted, extended, and run in single precision."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import vi_toolkit as vi
from tests.models import regression_posterior, scale_model
from tests.support import quietly


def test_an_interrupted_deterministic_fit_can_be_extended_to_the_same_end(monkeypatch):
    from vi_toolkit.deterministic import rounds as deterministic

    y = {"y": torch.randn(12, generator=torch.Generator().manual_seed(0))}
    whole = vi.fit(scale_model, AutoMultivariateNormal, y, progress=False)
    assert whole.run.progress.rounds >= 2
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


def test_extend_doubles_the_draws_of_a_deterministic_fit():
    fit = vi.fit(scale_model, AutoNormal, {"y": torch.randn(9)}, progress=False)
    with pytest.raises(ValueError, match="deterministic"):
        fit.extend(100)
    draws = fit.run.progress.num_draws
    fit.extend()
    assert fit.run.progress.num_draws == 2 * draws


def test_a_model_with_single_precision_constants_of_its_own_still_runs():
    constants = torch.randn(60, 3)

    def model(y):
        w = pyro.sample("w", dist.Normal(0.0, 5.0).expand([3]).to_event(1))
        with pyro.plate("observations", len(y)):
            pyro.sample("y", dist.Normal(constants @ w, 1.0), obs=y)

    fit = quietly(model, AutoMultivariateNormal, {"y": torch.randn(60)})
    assert fit.method == "deterministic" and fit.workspace.dtype == torch.float32
    mean, covariance, _ = regression_posterior(constants, fit.data["y"])
    found = fit.guide.get_posterior().mean.detach().double()
    assert ((found - mean) / covariance.diagonal().sqrt()).abs().max() < 0.02
