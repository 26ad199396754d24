"""Preflight runs the model a few times and leaves everything as it was."""

import pyro
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from tests.preflight.models import Y, conjugate, conjugate_guide, sequential_repeated
from vi_toolkit.errors import PreflightError
from vi_toolkit.preflight import preflight


def test_preflight_leaves_everything_as_it_was():
    pyro.param("loc", torch.tensor(7.0))
    guide = AutoNormal(conjugate)
    state = torch.get_rng_state()
    preflight(conjugate, guide, {"y": Y.double()})
    assert torch.equal(torch.get_rng_state(), state)
    assert list(pyro.get_param_store()) == ["loc"]
    assert pyro.param("loc").item() == 7.0
    assert torch.get_default_dtype() == torch.float32
    assert guide.prototype_trace is None
    assert guide.model is not None
    assert not list(guide.parameters())


def test_preflight_leaves_everything_as_it_was_after_an_error():
    state = torch.get_rng_state()
    with pytest.raises(PreflightError):
        preflight(sequential_repeated, AutoNormal, {"y": Y})
    assert torch.equal(torch.get_rng_state(), state)
    assert not pyro.poutine.runtime._PYRO_STACK
    preflight(conjugate, AutoNormal, {"y": Y})


def test_preflight_takes_a_guide_that_has_run():
    guide = AutoNormal(conjugate)
    guide(y=Y)
    preflight(conjugate, guide, {"y": Y})


def test_preflight_runs_the_model_only_a_few_times():
    calls = {"model": 0, "guide": 0}

    def model(y):
        calls["model"] += 1
        conjugate(y)

    def guide(y):
        calls["guide"] += 1
        conjugate_guide(y)

    preflight(model, guide, {"y": Y})
    assert calls == {"model": 2, "guide": 1}
    calls["model"] = 0
    preflight(model, AutoNormal, {"y": Y})
    assert calls["model"] == 5  # two of them the autoguide's own: at first values that work
