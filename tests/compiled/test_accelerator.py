"""A fit around its compiled steps: files, errors, interrupts and threads."""

import signal
import threading

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import vi_toolkit as vi
from tests.compiled.checks import STEPS, assert_same, both, interpret
from tests.compiled.models import DATA, local, regression
from vi_toolkit import machine_code
from vi_toolkit.compiled import aot_cache, steps


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("batch", [None, {"data": 8}])
def test_extend_save_and_load_go_on_bit_for_bit(batch, tmp_path, monkeypatch):
    monkeypatch.setattr(machine_code, "LONG_RUN", 1)  # compile the short last minibatch too
    options = {"compile": True, "subsample": batch, "optimizer": 0.02, "progress": False}
    whole = vi.fit(regression, AutoNormal, DATA, steps=90, **options)
    parts = vi.fit(regression, AutoNormal, DATA, steps=37, **options)
    parts.save(tmp_path / "fit")
    loaded = vi.load(tmp_path / "fit", regression, AutoNormal)
    assert np.array_equal(parts.extend(53).elbo, whole.elbo)
    assert np.array_equal(loaded.extend(53).elbo, whole.elbo)
    for name, value in whole.params.items():
        assert torch.equal(parts.params[name], value) and torch.equal(loaded.params[name], value)


def errors_both_ways():
    def model(X, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        a = pyro.param("a", torch.tensor(1.0))
        with pyro.plate("data", 30):
            # a falls until its root is NaN
            pyro.sample("y", dist.Normal(X @ w, 1.0 + a.sqrt()), obs=y)

    errors = []
    for compile in (False, True):
        with pytest.raises(vi.NonFiniteError) as caught:
            vi.fit(
                model, AutoNormal, DATA, steps=500, optimizer=0.05, compile=compile, progress=False
            )
        errors.append(caught.value)
    return errors


@pytest.mark.usefixtures("interpreted")
def test_a_non_finite_step_names_its_site_as_eagerly():
    eager, compiled = errors_both_ways()
    assert (compiled.site, compiled.index, compiled.step) == (eager.site, eager.index, eager.step)
    assert compiled.step > 5
    assert_same(eager.fit, compiled.fit, 1e-4)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_in_a_call_waits_for_its_end(monkeypatch):
    calls = 0

    def interrupting(body, carried, fixed, checked):
        loop = interpret(body, carried, fixed, checked)

        def interrupted(inputs):
            nonlocal calls
            calls += 1
            if calls == 3:
                signal.raise_signal(signal.SIGINT)
            return loop(inputs)

        return interrupted

    monkeypatch.setattr(steps, "compile_loop", interrupting)
    options = {"compile": True, "optimizer": 0.02, "progress": False}
    with pytest.warns(vi.ConvergenceWarning, match="interrupted"):
        fit = vi.fit(regression, AutoNormal, DATA, steps=90, **options)
    assert fit.interrupted and 1 < len(fit.elbo) < 90
    monkeypatch.setattr(steps, "compile_loop", interpret)
    whole = vi.fit(regression, AutoNormal, DATA, steps=90, **options)
    assert np.array_equal(fit.extend(90 - len(fit.elbo)).elbo, whole.elbo)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_while_compiling(monkeypatch):
    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(aot_cache, "build", interrupted)
    monkeypatch.setattr(aot_cache, "_key", lambda *args: "not in the cache")
    options = {"compile": True, "optimizer": 0.02, "progress": False}
    with pytest.warns(vi.ConvergenceWarning, match="interrupted"):
        fit = vi.fit(regression, AutoNormal, DATA, steps=50, **options)
    assert fit.interrupted and len(fit.elbo) == 1
    monkeypatch.undo()
    monkeypatch.setattr(steps, "compile_loop", interpret)
    whole = vi.fit(regression, AutoNormal, DATA, steps=50, **options)
    assert np.array_equal(fit.extend(49).elbo, whole.elbo)


@pytest.mark.usefixtures("interpreted")
def test_two_fits_in_two_threads_do_not_disturb_each_other():
    alone = [both(m, g)[1] for m, g in ((regression, AutoNormal), (local, AutoNormal))]
    in_threads: dict[int, object] = {}

    def fit(k, model):
        in_threads[k] = vi.fit(
            model,
            AutoNormal,
            DATA,
            steps=STEPS,
            compile=True,
            optimizer=0.02,
            seed=3,
            progress=False,
        )

    threads = [threading.Thread(target=fit, args=(k, m)) for k, m in enumerate((regression, local))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(2):
        assert np.array_equal(in_threads[k].elbo, alone[k].elbo)
