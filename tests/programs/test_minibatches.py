"""Minibatches: every datum counts once, and the fit is that of the whole data."""

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch.distributions import constraints

import vi_toolkit as vi
from tests.models import regression, regression_data, regression_posterior
from tests.support import fitted, moments, quietly
from tests.tolerances import Z


def test_minibatches_reach_the_posterior_with_either_way_of_writing_the_model():
    def indexed(X, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 5.0).expand([X.shape[1]]).to_event(1))
        with pyro.plate("observations", len(X)) as i:
            pyro.sample("y", dist.Normal(X[i] @ w, 1.0), obs=y[i])

    data = regression_data(n=203)  # ragged last batch: 203 = 4 * 50 + 3
    mean, _, precision = regression_posterior(**data)
    for model, cut in ((regression, ["X", "y"]), (indexed, None)):
        fit = quietly(model, AutoNormal(model), data, subsample={"observations": 50}, steps=6000)
        assert fit.method == "stochastic" and fit.run.stages.plan.cut == cut
        location, scale, n = moments(fit)
        sd = precision.diagonal().rsqrt()
        # 6,000 steps leave the averaged iterate within about 0.05 sd (that is measured below).
        assert ((location - mean) / sd).abs().max() < 0.2 + Z / n**0.5
        assert (scale / sd).log().abs().max() < 0.1 + Z / (2 * n) ** 0.5


def test_minibatches_fit_local_latents_with_parameters_per_datum():
    y = torch.randn(40, generator=torch.Generator().manual_seed(0)) * 2

    def model(y):
        with pyro.plate("observations", len(y)) as i:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[i])

    def guide(y):
        loc = pyro.param("loc", torch.zeros(len(y)))
        scale = pyro.param("scale", torch.ones(len(y)), constraint=constraints.positive)
        with pyro.plate("observations", len(y)) as i:
            pyro.sample("z", dist.Normal(loc[i], scale[i]))

    fit = quietly(model, guide, {"y": y}, subsample={"observations": 16}, steps=6000)
    assert ((fit.params["loc"] - y / 2) / 0.5**0.5).abs().max() < 0.2
    fit = quietly(model, AutoNormal(model), {"y": y}, subsample={"observations": 16}, steps=3000)
    assert ((fit.params["AutoNormal.locs.z"] - y / 2) / 0.5**0.5).abs().max() < 0.3


def test_the_cost_of_a_minibatch_does_not_grow_with_the_data():
    """Counted, not timed: no tensor of the size of the data is made in a step."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if torch.is_tensor(out):
                self.largest = max(self.largest, out.numel())
            return out

    data = regression_data(n=50_000)
    fit = quietly(regression, AutoNormal, data, subsample={"observations": 20}, steps=2)
    running = fit.run.stages
    with fit.workspace.isolated(), Largest() as seen:
        running.one_step()
    assert 0 < seen.largest <= 20 * 3


def test_a_plate_that_cannot_be_subsampled_is_named():
    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(y)]).to_event(1))
        with pyro.plate("observations", 6):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    with pytest.raises(vi.PreflightError, match="cannot be subsampled") as caught:
        vi.fit(
            model,
            AutoNormal,
            {"y": torch.zeros(6)},
            subsample={"observations": 2},
            progress=False,
        )
    assert caught.value.site == "observations" and "as i:" in caught.value.remedy
    assert len(str(caught.value)) < 400


def test_every_datum_counts_once_in_minibatches_of_one_row():
    """A minibatch of one broadcasts against anything: each datum must still count once.

    Then the mean over all minibatches of the scaled log density is the log density of all data.
    """

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("obs", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    data = {"y": torch.randn(40)}
    fit = fitted(model, AutoNormal, data, subsample={"obs": 1}, steps=100)
    at = poutine.condition(model, {"mu": torch.tensor(0.4)})
    parts = []
    for row in range(40):
        minibatch, handler = fit.run.stages.plan.apply(data, torch.tensor([row]))
        with handler:
            parts.append(poutine.trace(at).get_trace(**minibatch).log_prob_sum())
    whole = poutine.trace(at).get_trace(**data).log_prob_sum()
    torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-5, atol=0)


def test_a_model_that_computes_from_all_rows_is_not_cut():
    def model(x, y):
        b = pyro.sample("b", dist.Normal(0.0, 10.0))
        with pyro.plate("obs", len(x)):
            pyro.sample("y", dist.Normal(b * (x - x.mean()) / x.std(), 0.5), obs=y)

    data = {"x": torch.randn(60), "y": torch.randn(60)}
    with pytest.raises(vi.PreflightError, match="computes something from all rows"):
        fitted(model, AutoNormal, data, subsample={"obs": 3}, steps=5)
