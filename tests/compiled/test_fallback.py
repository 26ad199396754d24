"""What cannot be compiled says why and runs eagerly."""

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoNormal

import vi_toolkit as vi
from tests.compiled.checks import accelerator_of, assert_same, interpret, refuses
from tests.compiled.models import DATA, coin, coin_guide, regression
from vi_toolkit import machine_code
from vi_toolkit.compiled import steps

count = [0]


def by_chance(X, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    scale = 1.0 if w[0] > 0 else 2.0
    with pyro.plate("data", 30):
        pyro.sample("y", dist.Normal(X @ w, scale), obs=y)


def printing(X, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    print("step", end="\r")
    with pyro.plate("data", 30):
        pyro.sample("y", dist.Normal(X @ w, 1.0), obs=y)


def by_parameter(X, y):
    a = pyro.param("a", torch.tensor(1.0))
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("data", 30):
        pyro.sample("y", dist.Normal(X @ w + (a if a.item() > 0.9 else 0.0), 1.0), obs=y)


def growing_plate(X, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    n = int(20 + 5 * (w[0].detach() > 0))
    with pyro.plate("data", n):
        pyro.sample("y", dist.Normal(X[:n] @ w, 1.0), obs=y[:n])


@pytest.mark.usefixtures("short_runs_compile")
@pytest.mark.parametrize(
    ("model", "match"),
    [
        (by_chance, "depends on values that change"),
        (printing, r"calls print\(\)"),
        (by_parameter, "value of a parameter"),
        (growing_plate, "depends on values that change"),
    ],
)
def test_what_python_decides_at_each_step_runs_eagerly(model, match, capsys):
    fit, eager = refuses(model, AutoNormal, match)
    assert np.array_equal(fit.elbo, eager.elbo)


@pytest.mark.usefixtures("short_runs_compile")
def test_a_counter_in_the_model_is_found_before_anything_is_traced():
    def model(X, y):
        count[0] += 1
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("data", 30), poutine.scale(scale=min(1.0, count[0] / 1_000)):
            pyro.sample("y", dist.Normal(X @ w, 1.0), obs=y)

    def fit(compile):
        count[0] = 0
        return vi.fit(
            model, AutoNormal, DATA, steps=30, optimizer=0.02, compile=compile, progress=False
        )

    with pytest.warns(vi.CompileWarning, match=r"count\[0\] changes when the model"):
        auto = fit("auto")
    assert np.array_equal(auto.elbo, fit(False).elbo)
    with pytest.raises(vi.CompileError, match="count"):
        fit(True)


@pytest.mark.usefixtures("short_runs_compile")
@pytest.mark.parametrize(
    ("estimator", "optimizer", "match"),
    [
        (RenyiELBO(num_particles=2), 0.02, "RenyiELBO has no differentiable_loss"),
        (TraceGraph_ELBO(), 0.02, "TraceGraph_ELBO has no differentiable_loss"),
        (None, lambda p: torch.optim.Adagrad(p, lr=0.02), "Adagrad is not one of"),
    ],
)
def test_what_cannot_be_compiled_says_why(estimator, optimizer, match):
    fit, eager = refuses(regression, AutoNormal, match, estimator=estimator, optimizer=optimizer)
    assert np.array_equal(fit.elbo, eager.elbo)


@pytest.mark.usefixtures("interpreted")
def test_a_tensor_that_wants_a_gradient_but_is_no_parameter_is_an_error():
    forgotten = torch.ones(3, requires_grad=True)

    def model(X, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("data", 30):
            pyro.sample("y", dist.Normal(X @ (w * forgotten), 1.0), obs=y)

    with pytest.raises(vi.CompileError, match="not registered as a parameter"):
        vi.fit(model, AutoNormal, DATA, steps=5, compile=True, progress=False)


def test_auto_compiles_long_runs_only(interpreted):
    short = vi.fit(regression, AutoNormal, DATA, steps=20, progress=False)
    assert accelerator_of(short) is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", vi.ConvergenceWarning)
        fit = vi.fit(coin, coin_guide, DATA, steps=2_000, progress=False)
    assert accelerator_of(fit).active
    with pytest.raises(ValueError, match="compile must be"):
        vi.fit(regression, AutoNormal, DATA, compile="yes")


def test_an_error_while_compiling_in_mid_fit(monkeypatch):
    """The short last minibatch needs machine code of its own, which cannot be made."""
    compiled = 0

    def second_fails(*args):
        nonlocal compiled
        compiled += 1
        if compiled == 2:
            raise vi.CompileError("the C++ compiler failed (no space left)")
        return interpret(*args)

    monkeypatch.setattr(steps, "compile_loop", second_fails)
    monkeypatch.setattr(machine_code, "LONG_RUN", 1)
    options = {"subsample": {"data": 8}, "optimizer": 0.02, "progress": False, "steps": 60}
    with pytest.warns(vi.CompileWarning, match="no space left"):
        fit = vi.fit(regression, AutoNormal, DATA, **options)
    assert_same(vi.fit(regression, AutoNormal, DATA, compile=False, **options), fit)


def test_a_step_that_differs_from_the_eager_one_sends_the_fit_back(monkeypatch):
    """The standing check: machine code gone wrong in mid-fit changes no result."""
    calls = 0

    def corrupt(body, carried, fixed, checked):
        run = interpret(body, carried, fixed, checked)

        def wrong(inputs):
            nonlocal calls
            calls += 1
            out = run(inputs)
            if calls > 4:
                out[1] = out[1] + 0.5
                out[-1 - 0] = out[-1] + 100.0  # the ELBO's history
            return out

        return wrong

    monkeypatch.setattr(steps, "compile_loop", corrupt)
    monkeypatch.setattr(machine_code, "LONG_RUN", 1)
    eager = vi.fit(regression, AutoNormal, DATA, steps=60, compile=False, progress=False)
    with pytest.warns(vi.CompileWarning, match="a compiled step and an eager one"):
        fit = vi.fit(regression, AutoNormal, DATA, steps=60, progress=False)
    assert calls > 4
    assert_same(eager, fit)
