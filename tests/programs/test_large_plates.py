"""A large plate that is subsampled is checked and set up by minibatches."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch.distributions import constraints

import vi_toolkit as vi
from tests.support import quietly
from vi_toolkit.programs import minibatches

ROWS, BATCH = 6_000, 50
OPTIONS = {"subsample": {"data": BATCH}, "steps": 30, "optimizer": 0.05}


def data():
    generator = torch.Generator().manual_seed(0)
    return {"y": torch.poisson(torch.full((ROWS,), 3.0), generator)}


def minibatch_fit(*args, **kwargs):
    return quietly(*args, **OPTIONS | kwargs)


def by_slices(seen):
    def model(y):
        seen.append(len(y))
        log_rate = pyro.sample("log_rate", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Poisson(log_rate.exp()), obs=y)

    return model


def by_indices(seen):
    def model(y):
        log_rate = pyro.sample("log_rate", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)) as i:
            seen.append(len(y[i]))
            pyro.sample("y", dist.Poisson(log_rate.exp()), obs=y[i])

    return model


def global_guide(y):
    loc = pyro.param("loc", torch.tensor(0.5))
    scale = pyro.param("scale", torch.tensor(0.1), constraint=constraints.positive)
    pyro.sample("log_rate", dist.Normal(loc, scale))


WAYS = pytest.mark.parametrize("way", [by_slices, by_indices])


@WAYS
def test_nothing_runs_on_all_rows_and_the_fit_is_the_same(way, monkeypatch):
    seen = []
    fit = minibatch_fit(way(seen), global_guide, data())
    # Written with slices the model is called with all rows to find the plate's size, and to see
    # that it does not take indices: in the preflight and in the set-up.
    calls = 4 if way is by_slices else 0
    assert seen.count(ROWS) == calls
    assert set(seen) - {ROWS} == {BATCH, 2 * BATCH, 4096, ROWS - 4096}
    assert seen.count(4096) == 1
    assert "log_rate" in repr(fit)
    assert seen.count(ROWS) == calls

    monkeypatch.setattr(minibatches, "MANY_ROWS", ROWS)
    other = []
    same = minibatch_fit(way(other), global_guide, data())
    assert other.count(ROWS) > calls
    assert (same.elbo == fit.elbo).all()
    assert all(torch.equal(same.params[name], fit.params[name]) for name in fit.params)


@WAYS
def test_a_bad_observation_far_down_is_named_by_its_own_row(way):
    bad = data()
    bad["y"][5_432] = -1.0
    with pytest.raises(vi.PreflightError, match=r"5432") as caught:
        minibatch_fit(way([]), global_guide, bad)
    assert caught.value.site == "y"


def latent_rows(y):
    with pyro.plate("data", len(y)) as i:
        z = pyro.sample("z", dist.Gamma(3.0, 1.0))
        pyro.sample("y", dist.Poisson(z), obs=y[i])


def guide_of_rows(y):
    shape = pyro.param("shape", torch.full((len(y),), 3.0), constraint=constraints.positive)
    with pyro.plate("data", len(y)) as i:
        pyro.sample("z", dist.Gamma(shape[i], 2.0))


@pytest.mark.parametrize("guide", [guide_of_rows, AutoNormal])
def test_latents_of_the_rows_have_the_shapes_of_the_whole_data(guide, tmp_path):
    given = data()
    fit = minibatch_fit(latent_rows, guide, given)
    assert f"z[{ROWS}]" in repr(fit)
    assert fit.sample(2)["z"].shape == (2, ROWS)
    assert fit.predict(num_draws=2)["y"].shape == (2, ROWS)
    assert fit.log_likelihood(num_draws=2)["y"].shape == (2, ROWS)
    assert {tuple(p.shape) for p in fit.params.values()} == {(ROWS,)}
    fit.save(tmp_path / "fit")
    loaded = vi.load(tmp_path / "fit", latent_rows, guide)
    assert torch.equal(loaded.sample(2)["z"], fit.sample(2)["z"])
    again = minibatch_fit(latent_rows, guide, given, steps=40)
    assert (loaded.extend(10).elbo == again.elbo).all()


def test_a_model_that_computes_from_all_rows_is_refused():
    def model(y):
        log_rate = pyro.sample("log_rate", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Poisson((log_rate + (y - y.mean()) / 10).exp()), obs=y)

    with pytest.raises(vi.PreflightError, match="computes something from all rows"):
        minibatch_fit(model, global_guide, data())


def test_a_guide_that_takes_no_minibatch_is_refused():
    def guide(y):
        shape = pyro.param("shape", torch.full((len(y),), 3.0))
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Gamma(shape, 2.0))

    with pytest.raises(vi.PreflightError, match="cannot be subsampled"):
        minibatch_fit(latent_rows, guide, data())
