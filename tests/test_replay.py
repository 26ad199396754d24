"""Steps for a GPU: the same steps on the CPU, all but the capture as a CUDA graph."""

import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal

import vi_toolkit as vi
from tests.test_compile import (
    DATA,
    assert_same,
    both,
    errors_both_ways,
    mixture,
    regression,
)
from vi_toolkit import scope
from vi_toolkit.compiled import replay, steps


@pytest.fixture(autouse=True)
def replayed(monkeypatch):
    """On the CPU, with Python for what a CUDA graph would do."""

    def captured(once, device):
        for _ in range(replay.WARM_UP):
            once()

        def run(times):
            for _ in range(times):
                once()

        return run

    monkeypatch.setattr(replay, "captured", captured)
    monkeypatch.setattr(steps, "compile_loop", replay.replay_loop)


@pytest.mark.parametrize(
    ("model", "guide", "options"),
    [
        (regression, AutoNormal, {}),
        (regression, AutoMultivariateNormal, {"estimator": Trace_ELBO(num_particles=2)}),
        (regression, AutoNormal, {"subsample": {"data": 10}}),
        (regression, AutoNormal, {"estimator": vi.Score(4, vi.RunningMean())}),
        (
            mixture,
            lambda model: AutoNormal(poutine.block(model, hide=["k"])),
            {"estimator": TraceEnum_ELBO(max_plate_nesting=1)},
        ),
    ],
    ids=["mean field", "full rank", "minibatches", "a baseline that it keeps", "enumeration"],
)
def test_replayed_steps_are_the_eager_ones(model, guide, options):
    assert_same(*both(model, guide(model), **options))


def test_restarts_at_once():
    """(A point estimate, which draws nothing.)"""
    options = {"steps": 30, "restarts": 3, "progress": False, "optimizer": 0.02}
    guide = AutoDelta(regression, init_loc_fn=lambda site: site["fn"].sample())
    alone = vi.fit(regression, guide, DATA, compile=False, **options)
    at_once = vi.fit(regression, guide, DATA, compile=True, **options)
    assert len({round(x, 3) for x in alone.restarts}) == 3
    assert at_once.restarts == pytest.approx(alone.restarts, rel=1e-4)


def test_steps_after_one_that_is_not_finite_change_nothing():
    eager, compiled = errors_both_ways()
    assert (compiled.site, compiled.step) == (eager.site, eager.step)
    assert_same(eager.fit, compiled.fit, 1e-4)


def test_a_capture_that_fails_says_why(monkeypatch):
    def fails(once, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(replay, "captured", fails)
    with pytest.raises(vi.CompileError, match="stream is capturing"):
        vi.fit(regression, AutoNormal, DATA, steps=5, compile=True, progress=False)


def test_what_is_outside_of_the_loop_may_be_replaced():
    """Captured are places in memory, so that new values go there."""
    body = torch.fx.symbolic_trace(lambda i, x, n, table, c: (i + 1, x + c))
    x, n, table, c = torch.zeros(2), torch.tensor(3), torch.zeros(4, 1), torch.ones(2)
    run = replay.replay_loop(body, [x], [n, table, c], False)
    assert [t.tolist() for t in run([x, n, table, c])] == [3, [3.0, 3.0]]
    i, y = run([x + 1, n, table, 2 * c])
    assert int(i) == 3 and y.tolist() == [7.0, 7.0]
    assert x.tolist() == [0.0, 0.0] and c.tolist() == [1.0, 1.0]
    c += 2
    assert run([x, n, table, c])[1].tolist() == [9.0, 9.0]


@pytest.mark.parametrize(("made", "known"), [(2, 2), (2, 1), (1, 2), (0, 2), (2, 0)])
def test_the_state_of_the_generators_holds_those_of_the_gpus(monkeypatch, made, known):
    """As many as there are; kept in a process with some, a state can be set in one with others."""

    def pretend(number, first):
        states = {
            k: torch.full((scope.OF_A_GPU,), first + k, dtype=torch.uint8) for k in range(number)
        }
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: number > 0)
        monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: list(states.values()))
        monkeypatch.setattr(torch.cuda, "set_rng_state", lambda s, k: states.update({k: s}))
        return states

    pretend(made, 1)
    kept = scope.random_state()
    drawn = torch.rand(3)
    states = pretend(known, 7)
    scope.set_random_state(kept)
    assert torch.equal(torch.rand(3), drawn)
    found = [int(s[0]) for s in states.values()]
    assert found == [1 + k if k < made else 7 + k for k in range(known)]
