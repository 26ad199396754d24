"""When restarts are not taken at once, and what goes wrong."""

import contextvars

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoNormal

import vi_toolkit as vi
from tests.compiled.checks import interpret
from tests.compiled.models import regression
from tests.stochastic.restarts import (
    counting,
    fit,
    from_anywhere,
    has_memory_of_its_own,
    starts_of,
)
from vi_toolkit.compiled import batched, steps
from vi_toolkit.stochastic.run import StochasticRun


@pytest.mark.parametrize(
    ("options", "at_once"),
    [
        ({"compile": False, "steps": 3000}, False),
        ({"compile": "auto", "steps": 100}, False),
        ({"compile": "auto", "steps": 700}, True),
        ({"compile": True, "steps": 20}, True),
        ({"compile": True, "steps": 20, "callback": lambda look: False}, False),
    ],
)
@pytest.mark.usefixtures("interpreted")
def test_when(options, at_once, monkeypatch):
    made = counting(monkeypatch)
    if options["steps"] > 1000:  # only the decision is of interest
        monkeypatch.setattr(StochasticRun, "start", lambda *a: False)
    found = fit(regression, AutoNormal, restarts=3, **options)
    assert made == ([3] if at_once else [])
    assert len(found.restarts) == 3


@pytest.mark.usefixtures("interpreted")
def test_many_parameters_run_one_after_the_other(monkeypatch):
    made = counting(monkeypatch)
    monkeypatch.setattr("vi_toolkit.machine_code.MOST_BATCHED_PARAMETERS", 20)
    found = fit(regression, AutoNormal, steps=20, restarts=3, compile=True)
    assert made == [] and len(found.restarts) == 3


@pytest.mark.usefixtures("interpreted")
def test_a_network_that_all_would_share():
    net = torch.nn.Linear(3, 3)
    before = [p.detach().clone() for p in net.parameters()]

    def guide(X, y):
        pyro.module("net", net)
        loc = net(X.mean(0))
        pyro.sample("w", dist.Normal(loc, 0.1).to_event(1))
        shape = pyro.param("shape", torch.tensor(2.0), constraint=dist.constraints.positive)
        pyro.sample("s", dist.Gamma(shape, 1.0))

    with pytest.warns(vi.CompileWarning, match="one after the other, because the fits share"):
        found = fit(regression, guide, steps=30, restarts=2, compile=True)
    assert len(found.restarts) == 2 and len(found.elbo) == 30
    for p, there in zip(net.parameters(), before, strict=True):
        assert torch.equal(p, there)


class Tilted(AutoNormal):
    """Makes something for itself when it is made."""

    def __init__(self, model):
        super().__init__(model)
        self.tilt = None

    def forward(self, *args, **kwargs):
        values = super().forward(*args, **kwargs)
        if self.tilt is None:
            self.tilt = torch.randn(())
        pyro.factor("tilt", -self.tilt * values["w"].sum(), has_rsample=True)
        return values


@pytest.mark.usefixtures("interpreted")
def test_a_guide_that_is_another_each_time():
    with pytest.warns(vi.CompileWarning, match="not the one that was compiled"):
        found = fit(regression, Tilted(regression), steps=30, restarts=2, compile=True)
    assert len(found.restarts) == 2


@pytest.mark.parametrize(
    ("seen", "says"), [(True, "changes when the model"), (False, "not the one that was compiled")]
)
@pytest.mark.usefixtures("interpreted")
def test_a_model_that_changes_meanwhile(seen, says, monkeypatch):
    """What a look at Python state cannot see is found by the comparison at the end."""
    spread = {"scale": torch.tensor(1.0)}
    hidden = contextvars.ContextVar("hidden")
    hidden.set(torch.tensor(1.0))

    def open_scale():
        return spread["scale"]

    scale = open_scale if seen else hidden.get

    def model(X, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("data", len(X)):
            pyro.sample("y", dist.Normal(X @ w, scale()), obs=y)

    original = batched.BatchedFits._take

    def changing(self, running, most):
        done = original(self, running, most)
        spread["scale"] = torch.tensor(3.0)
        hidden.set(torch.tensor(3.0))
        return done

    monkeypatch.setattr(batched.BatchedFits, "_take", changing)
    with pytest.warns(vi.CompileWarning, match=says) as given:
        found = fit(model, AutoNormal, steps=50, restarts=2, compile=True)
    assert len(found.restarts) == 2
    assert "one after the other" in str(given[0].message)


@pytest.mark.parametrize("from_call", [1, 3])
def test_wrong_machine_code_is_found(from_call, monkeypatch):
    """It is compared with the graph it was made of, at the start and at the end."""
    calls = 0

    def compile_wrongly(*given):
        loop = interpret(*given)

        def wrong(inputs):
            nonlocal calls
            calls += 1
            out = loop(inputs)
            if calls >= from_call:
                out[2] = out[2] + 0.5  # a slot of the optimiser
            return out

        return wrong

    monkeypatch.setattr(steps, "compile_loop", compile_wrongly)
    guide = from_anywhere(AutoDelta)
    options = {"steps": 700, "restarts": 3}  # (of which one after the other none is compiled)
    with pytest.warns(vi.CompileWarning, match="not the one that was recorded"):
        found = fit(regression, guide, **options)
    assert calls >= from_call
    alone = fit(regression, guide, compile=False, **options)
    np.testing.assert_allclose(found.restarts, alone.restarts, rtol=1e-5)


@pytest.mark.usefixtures("interpreted")
def test_a_model_that_cannot_be_compiled_says_so():
    def model(X, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        scale = 1.0 if float(w.sum().detach()) > 0 else 2.0
        pyro.sample("y", dist.Normal(X @ w, scale).to_event(1), obs=y)

    with pytest.warns(vi.CompileWarning, match="one after the other"):
        found = fit(model, AutoNormal, steps=700, restarts=3, compile="auto")
    assert len(found.restarts) == 3
    with (
        pytest.raises(vi.CompileError),
        pytest.warns(vi.CompileWarning, match="one after the other"),
    ):
        fit(model, AutoNormal, steps=30, restarts=2, compile=True)


@pytest.mark.usefixtures("interpreted")
def test_one_fit_that_is_not_finite():
    """Everything is pushed to where an exponential overflows, and one start is close to that."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1e4))
        pyro.factor("likelihood", z + 0 * z.exp())

    def start(site):
        return torch.where(torch.rand(()) < 0.5, torch.tensor(0.0), torch.tensor(80.0))

    guide = AutoNormal(model, init_loc_fn=start)
    options = {"steps": 60, "compile": True, "optimizer": 0.5, "seed": 0}
    assert float(fit(model, guide, {}, **options).params["AutoNormal.locs.z"]) < 40
    with pytest.raises(vi.NonFiniteError, match="likelihood") as caught:
        fit(model, guide, {}, restarts=2, **options)
    failed = caught.value.fit
    assert float(failed.params["AutoNormal.locs.z"]) > 80 and caught.value.step > 1
    assert len(failed.elbo) == caught.value.step


@pytest.mark.usefixtures("interpreted")
def test_an_interrupt_returns_the_best_so_far(monkeypatch):
    calls = 0
    original = batched.BatchedFits._take

    def interrupted(self, running, most):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return original(self, running, most)

    monkeypatch.setattr(batched.BatchedFits, "_take", interrupted)
    results = []
    guide = from_anywhere(AutoNormal)
    fits = starts_of(
        lambda: results.append(fit(regression, guide, steps=2000, restarts=3, compile=True)),
        monkeypatch,
    )
    assert all(map(has_memory_of_its_own, fits))
    (found,) = results
    assert found.interrupted and 0 < len(found.elbo) < 2000
    assert len(found.restarts) == 3
    assert np.mean(found.elbo[-100:]) == pytest.approx(max(found.restarts))
    assert torch.isfinite(found.sample(5)["w"]).all()


def test_an_interrupt_before_the_first_step(monkeypatch):
    def interrupted(self, running):
        raise KeyboardInterrupt

    monkeypatch.setattr(batched.BatchedFits, "_first_step", interrupted)
    found = fit(regression, from_anywhere(AutoNormal), steps=2000, restarts=3, compile=True)
    assert found.interrupted and len(found.elbo) == 0 and len(found.restarts) == 3


def test_an_interrupt_while_compiling(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(steps, "compile_loop", interrupted)
    guide = from_anywhere(AutoNormal)
    fits = starts_of(
        lambda: fit(regression, guide, steps=2000, restarts=3, compile=True), monkeypatch
    )
    assert len(fits) == 3 and all(map(has_memory_of_its_own, fits))
