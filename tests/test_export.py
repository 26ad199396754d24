"""A fit as ArviZ data has the same draws in every group, and attributes that say what it is."""

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal

import vi_toolkit as vi
from tests.tolerances import Z

LABELS = ["age", "bmi"]


def model(X, y=None):
    w = pyro.sample("w", dist.Normal(X.new_zeros(2), 2.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(X.new_ones(())))
    mean = pyro.deterministic("mean", X @ w)
    with pyro.plate("observations", len(X)):
        return pyro.sample("y", dist.Normal(mean, sigma), obs=y)


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=["float32", "float64"])
def fit(request):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(30, 2, generator=generator, dtype=torch.float64)
    y = X @ torch.tensor([1.0, -2.0]).double() + torch.randn(30, generator=generator).double()
    data = {"X": X.to(request.param), "y": y.to(request.param)}
    return vi.fit(model, AutoMultivariateNormal, data, progress=False)


def test_every_group_has_its_variables_and_shapes(fit):
    tree = fit.to_arviz(num_draws=50)
    assert tree["posterior"]["w"].shape == (1, 50, 2)
    assert tree["posterior"]["sigma"].shape == (1, 50)
    assert tree["posterior"]["mean"].shape == (1, 50, 30)  # deterministic: a function of the draws
    assert set(tree["posterior_predictive"].data_vars) == {"y"}
    assert tree["posterior_predictive"]["y"].shape == (1, 50, 30)
    assert tree["log_likelihood"]["y"].shape == (1, 50, 30)
    assert np.array_equal(tree["observed_data"]["y"], fit.data["y"])
    assert tree["posterior"]["w"].dtype == fit.data["X"].numpy().dtype


def test_every_group_is_at_the_same_draws(fit):
    tree = fit.to_arviz(num_draws=20)
    w, sigma = (torch.from_numpy(tree["posterior"][k].values[0]) for k in ("w", "sigma"))
    mean = w @ fit.data["X"].T
    tight = {"rtol": 1e-4, "atol": 1e-4}  # single precision
    np.testing.assert_allclose(tree["posterior"]["mean"].values[0], mean, **tight)
    expected = dist.Normal(mean, sigma[:, None]).log_prob(fit.data["y"])
    np.testing.assert_allclose(tree["log_likelihood"]["y"].values[0], expected, **tight)


def test_predictive_draws_scatter_as_the_model_says(fit):
    tree = fit.to_arviz(num_draws=2000)
    mean, sigma = (tree["posterior"][k].values[0] for k in ("mean", "sigma"))
    z = (tree["posterior_predictive"]["y"].values[0] - mean) / sigma[:, None]
    n = z.size
    assert abs(float(z.mean())) < Z / np.sqrt(n)
    assert abs(float(z.std()) - 1) < Z / np.sqrt(2 * n)


def test_attributes_are_honest(fit):
    tree = fit.to_arviz(num_draws=10, seed=7)
    for attributes in (tree.attrs, tree["posterior"].attrs):
        assert attributes["inference_library"] == "vi_toolkit"
        assert attributes["method"] == "deterministic"
        assert attributes["guide_family"] == "full-rank"
        assert attributes["elbo"] == fit.elbo[-1]
        assert attributes["converged"] == 1
        assert attributes["monte_carlo_error"] == fit.monte_carlo_error < 0.02
        assert attributes["seed"] == fit.seed
        assert attributes["draws_seed"] == 7
        assert "not a Markov chain" in attributes["note"]
        assert "R-hat" in attributes["note"]


def test_labels_become_dimensions_and_coordinates(fit):
    tree = fit.to_arviz(num_draws=10, dims={"w": ("predictors",)}, coords={"predictors": LABELS})
    assert tree["posterior"]["w"].dims == ("chain", "draw", "predictors")
    assert tree["posterior"]["w"].sel(predictors="bmi").shape == (1, 10)


def test_arviz_can_use_and_store_it(fit, tmp_path):
    tree = fit.to_arviz(num_draws=500)
    summary = az.summary(tree, var_names=["w", "sigma"], kind="stats")
    # The summary is rounded, to two decimals in some versions of ArviZ.
    mean = float(tree["posterior"]["sigma"].mean())
    assert float(summary.loc["sigma", "mean"]) == pytest.approx(mean, abs=1e-2)
    path = tmp_path / "fit.nc"
    tree.to_netcdf(str(path), engine="h5netcdf")
    back = az.from_netcdf(str(path), engine="h5netcdf")
    assert back["posterior"].attrs["method"] == "deterministic"
    assert np.array_equal(back["posterior"]["w"], tree["posterior"]["w"])


def test_a_seed_repeats_the_draws_and_leaves_the_global_state_alone(fit):
    state, dtype = torch.get_rng_state(), torch.get_default_dtype()
    one, two, other = (fit.to_arviz(num_draws=10, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == dtype
    assert len(pyro.get_param_store()) == 0
    for group in ("posterior", "posterior_predictive", "log_likelihood"):
        for name in one[group].data_vars:
            assert np.array_equal(one[group][name], two[group][name])
    assert not np.array_equal(one["posterior"]["w"], other["posterior"]["w"])
