"""Predictions at the fit's own rows and at new ones; what masks and scales leave of the data."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal

import vi_toolkit as vi
from tests.tolerances import Z
from vi_toolkit.programs.prediction import observation_weights, row_latents

N = 30


def overdispersed_counts(x, y=None):
    s = pyro.sample("s", dist.HalfNormal(1.0))
    with pyro.plate("rows", len(x)):
        e = pyro.sample("e", dist.Normal(0.0, s))
        pyro.sample("y", dist.Poisson(torch.exp(x + e)), obs=y)


@pytest.fixture(scope="module")
def counts():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, generator=generator)
    y = torch.poisson(torch.exp(x + torch.randn(N, generator=generator)), generator)
    return vi.fit(overdispersed_counts, AutoNormal, {"x": x, "y": y}, progress=False)


def test_new_rows_get_latents_of_their_own(counts):
    draws = counts.sample(20_000)
    # E[y | s] = exp(s^2 / 2) at x = 0, and identical rows have identical predictions.
    expected = float((draws["s"].double() ** 2 / 2).exp().mean())
    for rows in (N, 7):  # as many rows as before, and another number
        y = counts.predict(draws=draws, data={"x": torch.zeros(rows)})["y"].double()
        assert y.shape == (20_000, rows)
        errors = (y.mean(0) - expected) / (y.std(0) / math.sqrt(len(y)))
        assert errors.abs().max() < Z


def test_the_same_rows_keep_their_latents(counts):
    x = counts.data["x"]
    fresh = counts.predict(4000)["y"]
    again = counts.predict(4000, data={"x": x}, same_rows=True)["y"]
    assert torch.equal(fresh, again)
    anew = counts.predict(4000, data={"x": x})["y"]
    busy = int(counts.data["y"].argmax())
    assert fresh[:, busy].mean() > 1.5 * anew[:, busy].mean()


def test_effects_of_groups_are_kept_or_redrawn_where_asked_for():
    group = torch.arange(40) % 4
    y = 3.0 * group + torch.randn(40, generator=torch.Generator().manual_seed(0))

    def model(group, y=None):
        with pyro.plate("groups", 4):
            effect = pyro.sample("effect", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", len(group)):
            pyro.sample("y", dist.Normal(effect[group], 1.0), obs=y)

    fit = vi.fit(model, AutoNormal, {"group": group, "y": y}, progress=False)
    assert row_latents(fit.workspace) == []
    new = {"group": torch.tensor([3, 3])}
    kept = fit.predict(4000, data=new)["y"]
    assert (kept.mean(0) - y[group == 3].mean()).abs().max() < Z * math.sqrt((1 + 0.1) / 4000)
    for name in ("effect", "groups"):
        redrawn = fit.predict(4000, data=new, redraw=[name])["y"]
        # Normal(0, 10) effects, noise of sd 1; the sd of an sd is sd / sqrt(2 n).
        assert abs(float(redrawn[:, 0].std()) - math.sqrt(101)) < Z * math.sqrt(101 / 8000)
    with pytest.raises(vi.PreflightError, match="not seen"):
        fit.predict(10, data={"group": torch.tensor([4])})
    with pytest.raises(ValueError, match="no latent and no plate"):
        fit.predict(10, redraw=["efect"])


@pytest.mark.parametrize("filler", [0.0, -100.0])
def test_masked_observations_do_not_count(filler):
    seen = torch.arange(60) % 10 != 0
    y = torch.randn(60, generator=torch.Generator().manual_seed(1))

    def model(y, seen):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", len(y)), poutine.mask(mask=seen):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    data = {"y": torch.where(seen, y, torch.tensor(filler)), "seen": seen}
    fit = vi.fit(model, AutoNormal, data, progress=False)
    draws = fit.sample(50)
    likelihood = fit.log_likelihood(draws)["y"]
    expected = dist.Normal(draws["mu"][:, None], 1.0).log_prob(y[seen])
    assert torch.allclose(likelihood[:, seen], expected)
    assert not likelihood[:, ~seen].any()
    assert torch.equal(observation_weights(fit.workspace)["y"] > 0, seen)


def test_scaled_observations_are_known_by_their_scale():
    weights = torch.linspace(0.5, 2.0, 20)

    def model(y, weights):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", len(y)), poutine.scale(scale=weights):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    data = {"y": torch.randn(20), "weights": weights}
    fit = vi.fit(model, AutoNormal, data, progress=False)
    assert torch.allclose(observation_weights(fit.workspace)["y"].float(), weights)
    draws = fit.sample(5)
    expected = dist.Normal(draws["mu"][:, None], 1.0).log_prob(data["y"])
    assert torch.allclose(fit.log_likelihood(draws)["y"], expected)
