"""Restarts of the stochastic method, one after the other and as one program."""

import contextvars
import math
import warnings
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal

import vi_toolkit as vi
from tests.compiled.test_compile import DATA, interpret, regression
from tests.models import regression as conjugate
from tests.models import regression_data, regression_posterior
from tests.tolerances import Z
from vi_toolkit.compiled import batched, steps
from vi_toolkit.compiled.aot_cache import functional
from vi_toolkit.compiled.batched import BatchedFits
from vi_toolkit.compiled.loop_state import LoopState, SharedRows, StackedState
from vi_toolkit.compiled.rewrites import turn_products
from vi_toolkit.programs.leaves import flat
from vi_toolkit.stochastic.stages import ERROR_TOLERANCE

OPTIONS = {"method": "stochastic", "progress": False, "optimizer": 0.02, "seed": 3}


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(steps, "compile_loop", interpret)


def at_random(site):
    return site["fn"].sample()


def from_anywhere(family, model=regression):
    return family(model, init_loc_fn=at_random)


def fit(model, guide, data=DATA, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", vi.ConvergenceWarning)
        return vi.fit(model, guide, data, **OPTIONS | options)


def starts_of(one, monkeypatch):
    """The running fits of all restarts, as :class:`BatchedFits` is given them."""
    seen = []
    original = BatchedFits.__init__

    def keeping(self, fits, room):
        seen.extend(fits)
        original(self, fits, room)

    with monkeypatch.context() as patch:
        patch.setattr(BatchedFits, "__init__", keeping)
        one()
    return seen


def has_memory_of_its_own(one):
    tensors = [*one.leaves, one.block_sum]
    tensors += [v for p in one.leaves for v in one.optimizer.state[p].values()]
    return all(t.untyped_storage().nbytes() == t.nbytes for t in tensors)


# ---------------------------------------------------------------- the same fits


@pytest.mark.parametrize("subsample", [None, 7], ids=["full", "minibatches"])
@pytest.mark.parametrize("compiler", ["machine code", "interpreted"])
def test_fits_without_noise_are_those_made_one_after_the_other(subsample, compiler, monkeypatch):
    """A point estimate draws nothing, so that nothing but rounding may differ."""
    if compiler == "interpreted":
        monkeypatch.setattr(steps, "compile_loop", interpret)
    elif subsample:
        pytest.skip("once is enough")
    guide = from_anywhere(AutoDelta)
    # (Of 30 rows the fifth minibatch is short: it would be the next after 64 steps.)
    options = {"steps": 64, "restarts": 3, "subsample": subsample and {"data": subsample}}
    alone = fit(regression, guide, compile=False, **options)
    at_once = fit(regression, guide, compile=True, **options)
    assert len(set(np.round(alone.restarts, 6))) == 3  # they started from different places
    np.testing.assert_allclose(at_once.restarts, alone.restarts, rtol=1e-5)
    np.testing.assert_allclose(at_once.elbo, alone.elbo, rtol=2e-5)
    for name, value in alone.params.items():
        torch.testing.assert_close(at_once.params[name], value, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", [AutoNormal, AutoMultivariateNormal])
@pytest.mark.usefixtures("interpreted")
def test_each_has_draws_of_its_own(family, monkeypatch):
    """Fits from one and the same start part at once, and their noise has no correlation."""
    guide = family(regression, init_scale=0.3)
    fits = starts_of(
        lambda: fit(regression, guide, steps=150, restarts=4, compile=True, optimizer=1e-6),
        monkeypatch,
    )
    elbos = np.array([one.elbo for one in fits])[:, 2:]
    correlation = np.corrcoef(elbos) - np.eye(4)
    assert np.abs(correlation).max() < Z / math.sqrt(elbos.shape[1])
    assert (elbos.std(1) > 0).all()


def test_left_open_each_ends_when_it_has_converged(monkeypatch):
    data = regression_data(n=20)
    mean, covariance, _ = regression_posterior(**data)
    found, ended = [], {}
    original = BatchedFits._block

    def watched(self, going, most):
        for k, one in enumerate(self.fits):
            if k not in going:
                state = [flat(one.leaves), one.block_sum.clone()]
                state += [v.clone() for p in one.leaves for v in one.optimizer.state[p].values()]
                assert all(map(torch.equal, state, ended.setdefault(k, state)))
        return original(self, going, most)

    monkeypatch.setattr(BatchedFits, "_block", watched)
    fits = starts_of(
        lambda: found.append(fit(conjugate, AutoNormal, data, restarts=3, compile=True)),
        monkeypatch,
    )
    assert all(one.converged for one in fits)
    assert len({one.step for one in fits}) > 1  # and not all at once
    assert ended  # and those that had ended stayed as they were
    assert all(len(one.elbo) == one.step for one in fits)
    for one in fits:  # whichever is kept, all are right
        loc = one.result()[: len(mean)]
        error = (loc - mean).abs() / covariance.diagonal().sqrt()
        assert float(error.max()) < 2 * ERROR_TOLERANCE
    (best,) = found
    assert best.converged and len(best.restarts) == 3
    assert best.elbo_estimate(200)[0] == pytest.approx(max(best.restarts), rel=1e-6)


def test_in_the_row_of_a_fit_that_has_ended_another_one_goes():
    """So that no step of one that has ended can end the steps of all."""
    leaves = [[torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 4.0])]]
    traced = SimpleNamespace(live=[0])
    for (leaf,) in leaves:
        leaf.requires_grad_().grad = torch.ones(2)
    optimizers = [torch.optim.Adam(mine) for mine in leaves]
    for optimizer in optimizers:
        optimizer.step()
    places = StackedState(
        [LoopState(mine, o, traced, []) for mine, o in zip(leaves, optimizers, strict=True)]
    )
    first, second = (mine[0].detach().clone() for mine in leaves)
    sums = places.totals([None, torch.zeros(2)])
    theta, *others, elbo = places.carried(sums, torch.zeros(4))
    assert torch.equal(theta, torch.stack([second, second]))
    blocks = places.commit(1, [theta + 1, *others, elbo], [None, torch.zeros(2)])
    assert blocks[0] is None and blocks[1].elbo == [0.0]
    assert torch.equal(leaves[0][0], first) and torch.equal(leaves[1][0], second + 1)
    assert [float(o.state[m[0]]["step"]) for o, m in zip(optimizers, leaves, strict=True)] == [1, 2]


@pytest.mark.usefixtures("interpreted")
def test_left_open_they_end_all_the_same(monkeypatch):
    monkeypatch.setattr(vi.stochastic, "MOST_COMPILED_STEPS", 70)
    found = fit(regression, from_anywhere(AutoNormal), restarts=2, compile=True)
    assert len(found.elbo) == 70 and not found.converged


@pytest.mark.parametrize(
    "estimator",
    [vi.Reparam(3), vi.Score(4, vi.RunningMean()), vi.Reparam(analytic_kl=True)],
    ids=repr,
)
@pytest.mark.usefixtures("interpreted")
def test_estimators(estimator, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error", vi.CompileWarning)
        fits = starts_of(
            lambda: fit(
                regression,
                from_anywhere(AutoNormal),
                estimator=estimator,
                steps=50,
                restarts=3,
                compile=True,
            ),
            monkeypatch,
        )
    assert [one.step for one in fits] == [50] * 3
    states = [one.estimator.state() if hasattr(one.estimator, "state") else {} for one in fits]
    for other in states[1:]:
        assert all(other[name] is not value for name, value in states[0].items())
        different = [not torch.equal(other[name], value) for name, value in states[0].items()]
        assert any(different) or not states[0]  # each learns from its own draws


@pytest.mark.usefixtures("interpreted")
def test_the_same_seed_gives_the_same_fits():
    one, other = (
        fit(regression, from_anywhere(AutoNormal), steps=40, restarts=3, compile=True)
        for _ in range(2)
    )
    assert one.restarts == other.restarts
    np.testing.assert_array_equal(one.elbo, other.elbo)


@pytest.mark.usefixtures("interpreted")
def test_the_best_can_be_kept_on_disk_and_extended(tmp_path):
    best = fit(regression, from_anywhere(AutoNormal), steps=40, restarts=3, compile=True)
    best.save(tmp_path / "fit")
    again = vi.load(tmp_path / "fit", regression, from_anywhere(AutoNormal))
    assert again.restarts == best.restarts
    for one in (best, again):
        one.progress = False
        one.extend(10)
    assert len(best.elbo) == 50
    np.testing.assert_array_equal(best.elbo, again.elbo)


# ---------------------------------------------------------------- when it is not done


def counting(monkeypatch):
    made = []
    original = BatchedFits.__init__

    def noting(self, fits, room):
        made.append(len(fits))
        original(self, fits, room)

    monkeypatch.setattr(BatchedFits, "__init__", noting)
    return made


@pytest.mark.parametrize(
    ("options", "at_once"),
    [
        ({"compile": False, "steps": 3000}, False),
        ({"compile": "auto", "steps": 100}, False),
        ({"compile": "auto", "steps": 700}, True),
        ({"compile": True, "steps": 20}, True),
        ({"compile": True, "steps": 20, "stop": lambda running: False}, False),
    ],
)
@pytest.mark.usefixtures("interpreted")
def test_when(options, at_once, monkeypatch):
    made = counting(monkeypatch)
    if options["steps"] > 1000:  # only the decision is of interest
        monkeypatch.setattr(vi.Fit, "_advance", lambda *a: None)
    found = fit(regression, AutoNormal, restarts=3, **options)
    assert made == ([3] if at_once else [])
    assert len(found.restarts) == 3


@pytest.mark.usefixtures("interpreted")
def test_many_parameters_run_one_after_the_other(monkeypatch):
    made = counting(monkeypatch)
    monkeypatch.setattr("vi_toolkit.fitting.MOST_TOGETHER", 20)
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

    original = batched.BatchedFits._block

    def changing(self, going, most):
        done = original(self, going, most)
        spread["scale"] = torch.tensor(3.0)
        hidden.set(torch.tensor(3.0))
        return done

    monkeypatch.setattr(batched.BatchedFits, "_block", changing)
    with pytest.warns(vi.CompileWarning, match=says) as given:
        found = fit(model, AutoNormal, steps=50, restarts=2, compile=True)
    assert len(found.restarts) == 2
    assert "one after the other" in str(given[0].message)


@pytest.mark.parametrize("from_call", [1, 3])
def test_a_program_that_is_wrong(from_call, monkeypatch):
    """Held against the graph that it was made of, at the start and at the end."""
    calls = 0

    def compile_wrongly(*given):
        run = interpret(*given)

        def wrong(inputs):
            nonlocal calls
            calls += 1
            out = run(inputs)
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
def test_a_parameter_without_elements():
    def model(y):
        empty = pyro.param("empty", torch.zeros(0))
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(w + empty.sum(), 1.0), obs=y)

    data = {"y": torch.tensor(2.0)}
    options = {"steps": 30, "restarts": 3}
    alone, at_once = (
        fit(model, from_anywhere(AutoDelta, model), data, compile=c, **options)
        for c in (False, True)
    )
    np.testing.assert_allclose(at_once.restarts, alone.restarts, rtol=1e-5)


@pytest.mark.usefixtures("interpreted")
def test_a_model_that_cannot_be_compiled_says_so():
    def model(X, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        scale = 1.0 if float(w.sum()) > 0 else 2.0
        pyro.sample("y", dist.Normal(X @ w, scale).to_event(1), obs=y)

    with pytest.warns(vi.CompileWarning, match="one after the other"):
        found = fit(model, AutoNormal, steps=700, restarts=3, compile="auto")
    assert len(found.restarts) == 3
    with (
        pytest.raises(vi.CompileError),
        pytest.warns(vi.CompileWarning, match="one after the other"),
    ):
        fit(model, AutoNormal, steps=30, restarts=2, compile=True)


# ---------------------------------------------------------------- what goes wrong


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
    original = batched.BatchedFits._block

    def interrupted(self, going, most):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return original(self, going, most)

    monkeypatch.setattr(batched.BatchedFits, "_block", interrupted)
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


# ---------------------------------------------------------------- the program


def test_rows_follow_the_tensors_that_they_are():
    first, second, rows = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), SharedRows()
    whole = rows.of("name", [first, second])
    whole += 1
    assert first.tolist() == [2.0, 3.0] and second.tolist() == [4.0, 5.0]
    assert rows.of("name", [first, second]) is whole
    second.data = torch.tensor([6.0, 7.0])  # as an optimiser that is loaded anew
    assert rows.of("name", [first, second]).tolist() == [[2.0, 3.0], [6.0, 7.0]]
    rows.part()
    whole += 1
    assert first.tolist() == [2.0, 3.0] and first.untyped_storage().nbytes() == first.nbytes


def test_products_of_several_fits_keep_them_in_front():
    A, B = torch.randn(30, 4), torch.randn(5, 4)

    def together(A, B):
        scores = torch.func.vmap(lambda b: A @ b)(B)
        return scores, torch.func.vmap(lambda s: A.T @ s)(scores.tanh()), A.T @ A

    graph = functional(together, [A, B])
    before = graph(A, B)
    turn_products(graph.graph)
    graph.graph.lint()
    graph.recompile()
    for one, other in zip(graph(A, B), before, strict=True):
        torch.testing.assert_close(one, other)
    shapes = [n.meta["val"].shape for n in graph.graph.nodes if "mm" in str(n.target)]
    assert shapes == [(5, 30), (5, 4), (4, 4)]
