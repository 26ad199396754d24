"""References by NUTS are right, reproducible, refused when too short, and leave no trace."""

import numpy as np
import pandas as pd
import pyro
import pytest
import torch

import vi_toolkit as vi
from tests.reference.models import location_scale
from tests.tolerances import Z
from vi_toolkit.errors import InvalidReferenceError
from vi_toolkit.programs.joint import Joint
from vi_toolkit.reference import LEVELS, Reference, nuts_draws
from vi_toolkit.reference import draws as rules


def test_nuts_agrees_with_quadrature(nuts, y):
    exact = Reference.quadrature(location_scale, {"y": y})
    assert nuts.names == exact.names == ["mu", "log(sigma)"]
    assert np.all(np.abs(nuts.mean - exact.mean) < Z * nuts.mean_se)
    assert np.all(np.abs(nuts.sd - exact.sd) < Z * nuts.sd_se)
    for level in LEVELS:
        error = np.abs(nuts.quantiles[level] - exact.quantiles[level])
        assert np.all(error < Z * nuts.quantiles_se[level]), level
    for row, other in zip(nuts.sites, exact.sites, strict=True):
        assert abs(row["mean"] - other["mean"]) < Z * row["mean_se"]


def test_nuts_records_how_it_was_made(nuts):
    made = nuts.made
    assert made["divergences"] == 0
    assert made["r_hat"] < 1.01
    assert len(set(made["chain_seeds"])) == made["chains"] == 2
    assert made["versions"]["pyro-ppl"] == pyro.__version__
    assert "seed=0" in made["command"]


def short(y, **options):
    options = {"chains": 2, "num_draws": 30, "warmup": 50, "progress": False} | options
    return Reference.nuts(location_scale, {"y": y}, **options)


def test_nuts_is_refused_when_too_short(y):
    with pytest.raises(
        InvalidReferenceError, match=r"bulk ESS of \S+ is \d+ \(must be at least 1000\)"
    ):
        short(y)
    with pytest.raises(InvalidReferenceError, match="at least two"):
        short(y, chains=1)


def test_a_refused_run_is_not_lost(y, tmp_path):
    with pytest.raises(InvalidReferenceError, match=r"error\.reference has") as caught:
        short(y)
    refused = caught.value.reference
    assert isinstance(refused, Reference)
    assert "bulk ESS" in refused.made["refused"]
    assert refused.made["refused"] in str(caught.value)
    assert refused.names == ["mu", "log(sigma)"]
    # Only 60 draws, but of the right posterior.
    assert abs(refused.mean[0] - float(y.mean())) < 1.0
    refused.save(tmp_path / "refused.json")
    assert Reference.load(tmp_path / "refused.json").made == refused.made


def test_an_admitted_run_is_not_marked_as_refused(nuts):
    assert "refused" not in nuts.made


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda y: {"y": y.numpy()}, r'data\["y"\] is a numpy.ndarray where the model needs'),
        (lambda y: {"y": pd.Series(y)}, r'torch.as_tensor\(data\["y"\].to_numpy\(\)\)'),
        (lambda y: {"x": y}, r"needs the argument 'y', which data does not have"),
        (lambda y: {"y": y * torch.nan}, "values that are not finite"),
        (lambda y: [y], "data is a list"),
    ],
    ids=["numpy", "pandas", "another name", "nan", "a list"],
)
def test_nuts_checks_its_data(y, data, message):
    with pytest.raises(vi.PreflightError, match=message):
        Reference.nuts(location_scale, data(y), num_draws=30, warmup=50, progress=False)


def test_nuts_draws_are_returned_although_no_rule_admits_them(y):
    draws, made = nuts_draws(location_scale, {"y": y.float()}, 2, 20, 30, progress=False)
    assert {name: value.shape for name, value in draws.items()} == {"mu": (2, 20), "sigma": (2, 20)}
    assert all(value.dtype == torch.float64 for value in draws.values())
    assert (draws["sigma"] > 0).all()
    with pytest.raises(InvalidReferenceError, match="bulk ESS"):
        Reference.from_draws(Joint(location_scale, {"y": y}), draws, made)


def test_nuts_draws_checks_its_data(y):
    with pytest.raises(vi.PreflightError, match=r"numpy.ndarray where the model needs"):
        nuts_draws(location_scale, {"y": y.numpy()}, 1, 4, 4, progress=False)


def test_nuts_depends_on_its_seed_alone_and_leaves_global_state_alone(y, monkeypatch, capfd):
    monkeypatch.setattr(rules, "MIN_ESS", 1)
    monkeypatch.setattr(rules, "MAX_R_HAT", 10)
    pyro.param("mine", torch.tensor(1.0))
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = short(y, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert list(pyro.get_param_store()) == ["mine"]
    assert torch.get_default_dtype() == torch.float32
    torch.rand(3)  # the caller's own draws must not matter
    again, other = short(y, seed=3), short(y, seed=4)
    assert np.array_equal(first.mean, again.mean)
    assert not np.array_equal(first.mean, other.mean)
    assert capfd.readouterr() == ("", "")
    # Single-precision data are converted to double, so only the data's rounding differs.
    single = short(y.float(), seed=3)
    assert np.all(np.abs(single.mean - first.mean) < first.sd)


def test_progress_bar(y, monkeypatch, capfd):
    monkeypatch.setattr(rules, "MIN_ESS", 1)
    monkeypatch.setattr(rules, "MAX_R_HAT", 10)
    # Pyro shows no bars where either of these is set, as under pytest-xdist.
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    short(y, progress=True)
    assert "Sample" in capfd.readouterr().err
