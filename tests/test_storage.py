"""A saved fit can be loaded and continued exactly, and bad files are refused."""

import json

import numpy as np
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from safetensors.torch import save_file

import vi_toolkit as vi
from tests.models import own_guide, regression, regression_data, scale_model
from tests.support import quietly


@pytest.mark.parametrize(
    "guide", [AutoNormal, AutoMultivariateNormal, own_guide], ids=lambda g: g.__name__
)
@pytest.mark.parametrize(
    "options",
    [{}, {"steps": 700}, {"steps": 100, "subsample": {"observations": 13}}],
    ids=["deterministic", "stochastic", "minibatch"],
)
def test_a_loaded_fit_continues_exactly_where_the_saved_one_was(guide, options, tmp_path):
    fit = quietly(regression, guide, regression_data(), **options)
    fit.save(tmp_path / "fit")
    loaded = vi.load(tmp_path / "fit", regression, guide)
    assert np.array_equal(fit.elbo, loaded.elbo)
    assert all(torch.equal(fit.params[k], loaded.params[k]) for k in fit.params)
    assert torch.equal(fit.sample(4)["w"], loaded.sample(4)["w"])
    assert torch.equal(fit.predict(4)["y"], loaded.predict(4)["y"])
    assert repr(fit) == repr(loaded)
    extra = () if fit.method == "deterministic" else (650,)
    fit.extend(*extra)
    loaded.extend(*extra)
    assert np.array_equal(fit.elbo, loaded.elbo)
    assert all(torch.equal(fit.params[k], loaded.params[k]) for k in fit.params)


def test_an_optimiser_given_as_a_function_must_be_given_again(tmp_path):
    def optimizer(leaves):
        return torch.optim.SGD(leaves, lr=1e-4, momentum=0.9)

    fit = quietly(regression, AutoNormal, regression_data(), steps=40, optimizer=optimizer)
    fit.save(tmp_path / "fit.safetensors")
    loaded = vi.load(tmp_path / "fit.safetensors", regression, AutoNormal)
    assert torch.equal(fit.sample(3)["w"], loaded.sample(3)["w"])
    with pytest.raises(ValueError, match="optimizer="):
        loaded.extend(5)
    loaded = vi.load(tmp_path / "fit", regression, AutoNormal, optimizer=optimizer)
    assert np.array_equal(fit.extend(5).elbo, loaded.extend(5).elbo)


@pytest.fixture
def saved(tmp_path):
    fit = quietly(regression, AutoNormal, regression_data(), steps=5)
    fit.save(tmp_path / "fit.safetensors")
    return tmp_path / "fit.safetensors"


def test_bad_files_are_refused_by_name(saved, tmp_path):
    with pytest.raises(vi.LoadError, match="no file"):
        vi.load(tmp_path / "nothing", regression, AutoNormal)
    whole = saved.read_bytes()
    saved.write_bytes(whole[:-9])
    with pytest.raises(vi.LoadError, match="truncated"):
        vi.load(saved, regression, AutoNormal)
    saved.write_bytes(b"")
    with pytest.raises(vi.LoadError, match="truncated"):
        vi.load(saved, regression, AutoNormal)
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    saved.write_bytes(bytes(flipped))
    with pytest.raises(vi.LoadError, match="checksum"):
        vi.load(saved, regression, AutoNormal)
    saved.write_bytes(b"\x80\x04\x95pickle" * 20)
    with pytest.raises(vi.LoadError, match="not a readable"):
        vi.load(saved, regression, AutoNormal)
    save_file({"a": torch.ones(2)}, saved)
    with pytest.raises(vi.LoadError, match="not a fit"):
        vi.load(saved, regression, AutoNormal)


def test_another_model_or_guide_is_refused(saved):
    with pytest.raises(vi.LoadError, match="another model or guide"):
        vi.load(saved, regression, AutoMultivariateNormal)
    with pytest.raises(vi.LoadError, match="not the ones that were saved"):
        vi.load(saved, scale_model, AutoNormal)


def test_a_newer_format_is_refused(saved):
    from vi_toolkit import storage

    text = json.dumps({"format": "vi_toolkit fit", "version": 99})
    save_file({}, saved, {"vi_toolkit": text, "sha256": storage._digest(text, {})})
    with pytest.raises(vi.LoadError, match="version 99"):
        vi.load(saved, regression, AutoNormal)


def test_an_unsaveable_entry_is_named_and_no_file_appears(tmp_path):
    data = regression_data()
    fit = quietly(regression, AutoNormal, data, steps=2)
    fit.data["notes"] = object()
    with pytest.raises(TypeError, match="data/notes"):
        fit.save(tmp_path / "fit")
    assert list(tmp_path.iterdir()) == []
