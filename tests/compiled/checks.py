"""Runs the same fit eagerly and compiled, and compares."""

import numpy as np
import pytest
import torch

import vi_toolkit as vi
from tests.compiled.models import DATA

STEPS = 40


def interpret(body, carried, fixed, checked):
    """Stands in for ``compile_loop``: the same loop, in Python."""

    def loop(inputs):
        state, rest = list(inputs[: len(carried)]), list(inputs[len(carried) :])
        i = torch.zeros((), dtype=torch.long)
        while i < rest[0]:
            i, *state = body(i, *state, *rest)
        return [i, *state]

    return loop


def running(fit):
    """The stochastic fit in progress inside a fit."""
    return fit.run.stages


def accelerator_of(fit):
    return running(fit).stepper.accelerator


def both(model, guide, data=DATA, number=STEPS, **options):
    """The same fit eagerly and compiled."""
    options = {"optimizer": 0.02, "seed": 3, "progress": False} | options
    eager = vi.fit(model, guide, data, steps=number, compile=False, **options)
    compiled = vi.fit(model, guide, data, steps=number, compile=True, **options)
    assert not accelerator_of(compiled).reason
    return eager, compiled


def precision(fit):
    return next(iter(fit.params.values())).dtype


def assert_same(eager, compiled, tolerance=None):
    """Equal up to rounding that a few steps may magnify."""
    if tolerance is None:
        tolerance = 1e-10 if precision(eager) == torch.float64 else 2e-5
    assert len(eager.elbo) == len(compiled.elbo)
    np.testing.assert_allclose(compiled.elbo, eager.elbo, rtol=tolerance, atol=tolerance)
    mine, theirs = compiled.params, eager.params
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=10 * tolerance, atol=tolerance)


def refuses(model, guide, match, **options):
    """compile=True says why, and "auto" warns once and gives the eager answer."""
    options = {"optimizer": 0.02, "seed": 3, "progress": False, "steps": 30} | options
    with pytest.raises(vi.CompileError, match=match):
        vi.fit(model, guide, DATA, compile=True, **options)
    assert torch._C._len_torch_function_stack() == 0 and torch._C._len_torch_dispatch_stack() == 0
    with pytest.warns(vi.CompileWarning, match=match) as caught:
        fit = vi.fit(model, guide, DATA, compile="auto", **options)
    assert len(caught) == 1
    return fit, vi.fit(model, guide, DATA, compile=False, **options)
