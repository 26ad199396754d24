"""A deterministic run can be interrupted, extended, and run in single precision."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoMultivariateNormal, AutoNormal
from torch.distributions import constraints

import vi_toolkit as vi
from tests.models import regression, regression_data, regression_posterior, scale_model
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


def test_a_guide_of_part_normal_and_part_points_converges_and_is_not_trusted():
    y = 2 + torch.randn(40, generator=torch.Generator().manual_seed(0))

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu, sigma), obs=y)

    listed = AutoGuideList(model)
    listed.append(AutoNormal(poutine.block(model, expose=["mu"])))
    listed.append(AutoDelta(poutine.block(model, expose=["sigma"])))

    def by_hand(y):
        loc = pyro.param("loc", torch.tensor(0.0))
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        pyro.sample("mu", dist.Normal(loc, scale))
        point = pyro.param("point", torch.tensor(1.0), constraint=constraints.positive)
        pyro.sample("sigma", dist.Delta(point))

    for guide in (listed, by_hand):
        fit = vi.fit(model, guide, {"y": y}, progress=False)
        assert fit.converged
        assert fit.workspace.points == ["sigma"]
        draws = fit.sample(100)
        assert torch.equal(draws["sigma"], draws["sigma"][:1].expand(100))
        assert len(draws["mu"].unique()) == 100
        diagnosis = vi.diagnose(fit)
        assert diagnosis.verdict == "do not trust"
        assert "'sigma' at a point" in diagnosis.reasons[0]


def test_a_hand_written_point_guide_is_known_for_one():
    def point(X, y):
        pyro.sample("w", dist.Delta(pyro.param("m", torch.zeros(3)), event_dim=1))

    fit = vi.fit(regression, point, regression_data(), progress=False)
    assert fit.converged
    assert fit.guide_family == "point"
    with pytest.raises(ValueError, match="point estimate"):
        vi.diagnose(fit)
