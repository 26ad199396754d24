"""Compiled steps against eager ones: the same draws, the same fit, and never a frozen model.

Most comparisons run the traced loop in Python (fixture ``interpreted``): everything but the machine
code is the same, and no compiler is waited for. A few models go through the C++ compiler as well.
"""

import cProfile
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
)

import vi_toolkit as vi
from vi_toolkit.compiled import accelerator, aot_cache, rewrites, steps
from vi_toolkit.compiled.purity import PythonSnapshot, effects

STEPS = 40
X = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
Y = X @ torch.tensor([1.0, -1.0, 0.5]) + torch.randn(30, generator=torch.Generator().manual_seed(1))
DATA = {"X": X, "y": Y}


def interpret(body, carried, fixed, checked):
    """Stands in for ``compile_loop``: the same loop, in Python."""

    def run(inputs):
        state, rest = list(inputs[: len(carried)]), list(inputs[len(carried) :])
        i = torch.zeros((), dtype=torch.long)
        while i < rest[0]:
            i, *state = body(i, *state, *rest)
        return [i, *state]

    return run


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(steps, "compile_loop", interpret)


def both(model, guide, data=DATA, number=STEPS, **options):
    """The same fit eagerly and compiled."""
    options = {"optimizer": 0.02, "seed": 3, "progress": False} | options
    eager = vi.fit(model, guide, data, steps=number, compile=False, **options)
    compiled = vi.fit(model, guide, data, steps=number, compile=True, **options)
    assert not compiled._stochastic.accelerator.reason
    return eager, compiled


def assert_same(eager, compiled, tolerance=None):
    """Equal up to rounding that a few steps may magnify."""
    if tolerance is None:
        tolerance = 1e-10 if eager._dtype == torch.float64 else 2e-5
    assert len(eager.elbo) == len(compiled.elbo)
    np.testing.assert_allclose(compiled.elbo, eager.elbo, rtol=tolerance, atol=tolerance)
    mine, theirs = compiled.params, eager.params
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=10 * tolerance, atol=tolerance)


# ---------------------------------------------------------------- models and guides


def regression(X, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    s = pyro.sample("s", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(X)):
        pyro.sample("y", dist.Normal(X @ w, s), obs=y)


def positive(name, value):
    return pyro.param(name, torch.tensor(value), constraint=constraints.positive)


def hand_written(scale):
    def guide(X, y):
        loc = pyro.param("loc", torch.zeros(3, dtype=X.dtype))
        pyro.sample("w", dist.Normal(loc, positive("sd", 0.1)).to_event(1))
        pyro.sample("s", scale())

    return guide


log_normal = hand_written(
    lambda: dist.LogNormal(pyro.param("a", torch.tensor(0.0)), positive("b", 0.2))
)
gamma = hand_written(lambda: dist.Gamma(positive("a", 4.0), positive("b", 4.0)))


def local(X, y):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 30) as i:
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y[i])


def amortised(seed=0):
    torch.manual_seed(seed)
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))

    def guide(X, y):
        pyro.module("network", network)
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.sample("mean", dist.Normal(loc, positive("sd", 0.5)))
        with pyro.plate("data", 30) as i:
            out = network(X[i])
            pyro.sample("z", dist.Normal(out[:, 0], out[:, 1].exp()))

    return guide


def mixture(X, y):
    share = pyro.sample("share", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("components", 2):
        centre = pyro.sample("centre", dist.Normal(0.0, 3.0))
    with pyro.plate("data", 30) as i:
        k = pyro.sample("k", dist.Categorical(share), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(centre[k], 1.0), obs=y[i])


def coin(X, y):
    z = pyro.sample("z", dist.Bernoulli(0.3))
    pyro.sample("observed", dist.Normal(z, 1.0), obs=torch.tensor(0.7))


def coin_guide(X, y):
    p = pyro.param("p", torch.tensor(0.5), constraint=constraints.unit_interval)
    pyro.sample("z", dist.Bernoulli(p))


def discrete(X, y):
    """One latent of each kind that torch draws by an operator of its own."""
    with pyro.plate("data", len(y)) as rows:
        b = pyro.sample("b", dist.Bernoulli(X.new_tensor(0.3)))
        c = pyro.sample("c", dist.Categorical(X.new_tensor([0.2, 0.3, 0.5])))
        k = pyro.sample("k", dist.Poisson(X.new_tensor(1.5)))
        pyro.sample("observed", dist.Normal(b + c - k, 1.0), obs=y[rows])


def discrete_guide(X, y):
    logits = pyro.param("logits", X.new_zeros(len(y)))
    weights = pyro.param("weights", X.new_ones(len(y), 3), constraint=constraints.simplex)
    rate = pyro.param("rate", X.new_ones(len(y)), constraint=constraints.positive)
    with pyro.plate("data", len(y)) as rows:
        pyro.sample("b", dist.Bernoulli(logits=logits[rows]))
        pyro.sample("c", dist.Categorical(weights[rows]))
        pyro.sample("k", dist.Poisson(rate[rows]))


def shares(X, y):
    with pyro.plate("groups", 3):
        g = pyro.sample("g", dist.Gamma(X.new_tensor(2.0), X.new_tensor(1.0)))
        w = pyro.sample("w", dist.Dirichlet(X.new_ones(4)))
        b = pyro.sample("b", dist.Beta(X.new_tensor(2.0), X.new_tensor(3.0)))
    pyro.sample("observed", dist.Normal((g * b * w[..., 0]).sum(), 1.0), obs=y[0])


def shares_guide(X, y):
    def positive(name, shape):
        return pyro.param(name, 1.5 * X.new_ones(shape), constraint=constraints.positive)

    with pyro.plate("groups", 3):
        pyro.sample("g", dist.Gamma(positive("shape", (3,)), positive("rate", (3,))))
        pyro.sample("w", dist.Dirichlet(positive("weights", (3, 4))))
        pyro.sample("b", dist.Beta(positive("plus", (3,)), positive("minus", (3,))))


def cell(name, model, guide, **options):
    return pytest.param(model, guide, options, id=name)


optim = torch.optim
GRID = [
    cell("AutoNormal", regression, AutoNormal),
    cell("AutoDiagonalNormal", regression, AutoDiagonalNormal),
    cell("AutoMultivariateNormal", regression, AutoMultivariateNormal),
    cell("AutoLowRank", regression, AutoLowRankMultivariateNormal),
    cell("AutoDelta", regression, AutoDelta),
    cell("AutoIAF", regression, AutoIAFNormal),
    cell("AutoStructured", regression, AutoStructured),
    cell("log-normal", regression, log_normal),
    cell("gamma", regression, gamma),
    cell("amortised", local, amortised()),
    cell("mean-field KL", regression, log_normal, estimator=TraceMeanField_ELBO()),
    cell("three particles", regression, AutoNormal, estimator=vi.Reparam(particles=3)),
    cell(
        "vectorised particles",
        local,
        AutoNormal,
        estimator=Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1),
    ),
    cell("score function", coin, coin_guide, estimator=Trace_ELBO()),
    cell(
        "enumeration",
        mixture,
        lambda: AutoNormal(poutine.block(mixture, hide=["k"])),
        estimator=TraceEnum_ELBO(max_plate_nesting=1),
    ),
    cell("minibatch by slices", regression, AutoNormal, subsample={"data": 8}),
    cell("minibatch by indices", local, AutoNormal, subsample={"data": 10}),
    cell("amortised minibatch", local, amortised(), subsample={"data": 8}),
    cell(
        "enumerated minibatch",
        mixture,
        lambda: AutoNormal(poutine.block(mixture, hide=["k"])),
        estimator=TraceEnum_ELBO(max_plate_nesting=1),
        subsample={"data": 8},
    ),
    cell("AdamW", regression, AutoNormal, optimizer=lambda p: optim.AdamW(p, lr=0.02)),
    cell(
        "AMSGrad",
        regression,
        AutoNormal,
        optimizer=lambda p: optim.Adam(p, lr=0.02, amsgrad=True, weight_decay=0.1),
    ),
    cell("SGD", regression, AutoNormal, optimizer=lambda p: optim.SGD(p, lr=1e-4)),
    cell(
        "Nesterov",
        regression,
        AutoNormal,
        optimizer=lambda p: optim.SGD(p, lr=1e-4, momentum=0.9, nesterov=True),
    ),
    cell("RMSprop", regression, AutoNormal, optimizer=lambda p: optim.RMSprop(p, lr=0.01)),
    cell(
        "centred RMSprop",
        regression,
        AutoNormal,
        optimizer=lambda p: optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5),
    ),
    cell(
        "two groups",
        regression,
        AutoNormal,
        optimizer=lambda p: optim.Adam(
            [{"params": p[1::2], "lr": 0.1}, {"params": p[::2]}], lr=0.01
        ),
    ),
]


def build(guide):
    return guide() if getattr(guide, "__name__", "") == "<lambda>" else guide


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("model", "guide", "options"), GRID)
def test_compiled_and_eager_fits_are_the_same(model, guide, options):
    eager, compiled = both(model, build(guide), **options)
    assert_same(eager, compiled)
    state, mine = eager._stochastic.state(), compiled._stochastic.state()
    torch.testing.assert_close(mine["block_sum"], state["block_sum"], rtol=1e-3, atol=1e-4)
    assert len(compiled._stochastic.blocks) == len(eager._stochastic.blocks)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal, AutoIAFNormal])
def test_in_double_precision_they_are_the_same_to_ten_digits(guide):
    data = {k: v.double() for k, v in DATA.items()}
    assert_same(*both(regression, guide, data))


@pytest.mark.parametrize(
    ("model", "guide", "options"),
    [
        cell("AutoNormal", regression, AutoNormal),
        cell("full rank, double", regression, AutoMultivariateNormal, double=True),
        cell("gamma", regression, gamma),
        cell("low rank", regression, AutoLowRankMultivariateNormal),
        cell("amortised minibatch", local, amortised(), subsample={"data": 10}),
        cell(
            "enumeration",
            mixture,
            lambda: AutoNormal(poutine.block(mixture, hide=["k"])),
            estimator=TraceEnum_ELBO(max_plate_nesting=1),
        ),
        cell("coin", coin, lambda: coin_guide, double=True),
        cell("shares", shares, lambda: shares_guide, double=True, estimator=vi.Reparam(5)),
        cell(
            "discrete minibatch",
            discrete,
            lambda: discrete_guide,
            double=True,
            subsample={"data": 10},
            estimator=vi.Score(3, vi.ControlVariate()),
        ),
    ],
)
def test_machine_code_and_eager_fits_are_the_same(model, guide, options):
    data = DATA
    if options.pop("double", False):
        data = {k: v.double() for k, v in DATA.items()}
    eager, compiled = both(model, build(guide), data, number=120, **options)
    assert_same(eager, compiled, 1e-9 if "double" in str(compiled._dtype) else 1e-4)
    assert compiled._stochastic.accelerator.active


# ---------------------------------------------------------------- random small models

PRIORS = [
    lambda: dist.Normal(0.0, 2.0),
    lambda: dist.LogNormal(0.0, 0.5),
    lambda: dist.Gamma(2.0, 2.0),
    lambda: dist.Beta(2.0, 3.0),
    lambda: dist.StudentT(4.0, 0.0, 1.0),
    lambda: dist.TransformedDistribution(
        dist.Normal(0.0, 1.0), dist.transforms.AffineTransform(1.0, 0.3)
    ),
]


def random_model(seed):
    """A model with global latents, maybe a plate, a nested plate and an enumerated site."""
    draw = np.random.default_rng(seed)
    shapes = [int(draw.integers(1, 4)) for _ in range(int(draw.integers(1, 4)))]
    priors = [PRIORS[int(draw.integers(len(PRIORS)))]() for _ in shapes]
    groups, nested, discrete = (bool(draw.integers(2)) for _ in range(3))
    data = {"y": torch.tensor(draw.normal(size=(4, 5)), dtype=torch.float32)}

    def model(y):
        total = 0.0
        for k, (prior, size) in enumerate(zip(priors, shapes, strict=True)):
            value = pyro.sample(f"global_{k}", prior.expand([size]).to_event(1))
            total = total + value.sum(-1)
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
        with pyro.plate("columns", 5, dim=-1):
            if groups:
                total = total + pyro.sample("column", dist.Normal(0.0, 1.0))
            with pyro.plate("rows", 4, dim=-2):
                if nested:
                    total = total + pyro.sample("entry", dist.Normal(0.0, 1.0))
                if discrete:
                    kind = pyro.sample("kind", dist.Bernoulli(0.4), infer={"enumerate": "parallel"})
                    total = total + kind
                pyro.sample("y", dist.Normal(total, scale), obs=y)

    guide = [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal][int(draw.integers(3))]
    estimator = TraceEnum_ELBO(max_plate_nesting=2) if discrete else vi.Reparam()
    return model, guide(poutine.block(model, hide=["kind"])), data, estimator


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("seed", range(12))
def test_random_models_are_the_same_compiled(seed):
    model, guide, data, estimator = random_model(seed)
    assert_same(*both(model, guide, data, number=25, estimator=estimator), 1e-4)


# ---------------------------------------------------------------- what must not be frozen


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


@pytest.fixture
def short_runs_compile(monkeypatch, interpreted):
    monkeypatch.setattr(accelerator, "LONG_RUN", 1)


count = [0]
temperature = 1.0
sizes = {"n": 30}


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
        (None, lambda p: optim.Adagrad(p, lr=0.02), "Adagrad is not one of"),
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


def tempered(X, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    n = sizes["n"]
    with pyro.plate("data", n), poutine.scale(scale=temperature):
        pyro.sample("y", dist.Normal(X[:n] @ w, 1.0), obs=y[:n])


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("what", ["global", "plate size", "rate"])
def test_changes_from_outside_between_looks_are_followed(what, monkeypatch):
    """A callback changes a global, a plate's size or the learning rate in mid-fit."""

    def callback(running):
        if what == "global":
            monkeypatch.setitem(globals(), "temperature", 0.5)
        elif what == "plate size":
            monkeypatch.setitem(sizes, "n", 20)
        else:
            running.optimizer.param_groups[0]["lr"] = 0.1
        return False

    fits = []
    for compile in (False, True):
        fits.append(
            vi.fit(
                tempered,
                AutoNormal,
                DATA,
                steps=700,
                optimizer=0.02,
                compile=compile,
                stop=callback,
                progress=False,
            )
        )
        monkeypatch.undo()
        monkeypatch.setattr(steps, "compile_loop", interpret)
    assert_same(*fits, 1e-3)
    before, after = fits[1].elbo[600:640].mean(), fits[1].elbo[640:].mean()
    assert what == "rate" or after > before + 3  # fewer or weaker terms: a higher ELBO


@pytest.mark.usefixtures("interpreted")
def test_data_changed_between_two_runs_are_seen():
    """Also where their values decided a shape, or left the loop as constants."""

    def model(counts, group):
        rates = pyro.sample(
            "rates", dist.Gamma(2.0, 1.0).expand([int(group.max()) + 1]).to_event(1)
        )
        with pyro.plate("data", 30):
            pyro.sample("counts", dist.Poisson(rates[group]), obs=counts)

    fits = []
    for compile in (False, True):
        data = {"counts": Y.abs().round(), "group": (X[:, 0] > 0).long()}
        fit = vi.fit(model, AutoNormal, data, steps=20, compile=compile, progress=False)
        fit._data["counts"].add_(7.0)
        fits.append(fit.extend(20))
    assert_same(*fits)
    assert fits[1].elbo[20:].mean() < fits[1].elbo[:20].mean() - 20


@pytest.mark.usefixtures("interpreted")
def test_a_buffer_that_the_model_changes_is_state():
    class Noise(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, w):
            self.calls += 1
            self.mean.mul_(0.9).add_(0.1 * w.detach())
            return 0.1 * self.mean

    fits = []
    for compile in (False, True):
        module = Noise()

        def model(X, y, module=module):
            w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
            with pyro.plate("data", 30):
                pyro.sample("y", dist.Normal(X @ (w + module(w)), 1.0), obs=y)

        fits.append(
            vi.fit(
                model, AutoNormal, DATA, steps=50, compile=compile, optimizer=0.02, progress=False
            )
        )
        fits[-1].module = module
    assert_same(*fits)
    eager, compiled = (fit.module for fit in fits)
    assert eager.calls == compiled.calls  # traces and checks leave no mark
    torch.testing.assert_close(compiled.mean, eager.mean, rtol=1e-4, atol=1e-5)


class Baseline(Trace_ELBO):
    """Score function with a running mean, kept in tensors changed in place."""

    def __init__(self):
        super().__init__()
        self.mean, self.count = torch.zeros(()), torch.zeros(())

    def differentiable_loss(self, model, guide, *args, **kwargs):
        for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
            log_p, log_q = model_trace.log_prob_sum(), guide_trace.log_prob_sum()
            cost = (log_q - log_p).detach()
            surrogate = log_q * (cost - self.mean)
            self.count += 1
            self.mean += (cost - self.mean) / self.count
        return cost + surrogate - surrogate.detach()

    def loss_and_grads(self, model, guide, *args, **kwargs):
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward()
        return loss.item()


@pytest.mark.usefixtures("interpreted")
def test_an_estimator_with_buffers():
    fits, estimators = [], [Baseline(), Baseline()]
    for compile, estimator in zip((False, True), estimators, strict=True):
        fits.append(
            vi.fit(
                coin,
                coin_guide,
                DATA,
                steps=50,
                estimator=estimator,
                compile=compile,
                optimizer=0.02,
                progress=False,
            )
        )
    assert_same(*fits)
    assert estimators[0].count == estimators[1].count == 50
    torch.testing.assert_close(estimators[1].mean, estimators[0].mean)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.usefixtures("interpreted")
def test_an_estimator_that_settles_something_goes_on_compiled_from_a_file(tmp_path):
    options = {"estimator": vi.Score(4, vi.RunningMean()), "optimizer": 0.02, "progress": False}
    fit = vi.fit(regression, AutoNormal, DATA, steps=40, compile=True, **options)
    fit.save(tmp_path / "fit")
    loaded = vi.load(tmp_path / "fit", regression, AutoNormal)
    assert np.array_equal(fit.extend(20).elbo, loaded.extend(20).elbo)
    assert loaded._stochastic.accelerator.active


def test_a_parameter_replaced_from_outside_raises_as_it_does_eagerly():
    def callback(running):
        pyro.get_param_store()["loc"] = torch.ones(3)
        return False

    for compile in (False, True):
        with pytest.raises(ValueError, match="'loc' appeared only at step"):
            vi.fit(
                regression,
                log_normal,
                DATA,
                steps=700,
                stop=callback,
                compile=compile,
                progress=False,
            )


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
    monkeypatch.setattr(accelerator, "LONG_RUN", 1)
    eager = vi.fit(regression, AutoNormal, DATA, steps=60, compile=False, progress=False)
    with pytest.warns(vi.CompileWarning, match="a compiled step and an eager one"):
        fit = vi.fit(regression, AutoNormal, DATA, steps=60, progress=False)
    assert calls > 4
    assert_same(eager, fit)


# ---------------------------------------------------------------- the fit around it


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("batch", [None, {"data": 8}])
def test_extend_save_and_load_go_on_bit_for_bit(batch, tmp_path, monkeypatch):
    monkeypatch.setattr(accelerator, "LONG_RUN", 1)  # compile the short last minibatch too
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
def test_a_non_finite_step_is_blamed_on_its_site_as_eagerly():
    eager, compiled = errors_both_ways()
    assert (compiled.site, compiled.index, compiled.step) == (eager.site, eager.index, eager.step)
    assert compiled.step > 5
    assert_same(eager.fit, compiled.fit, 1e-4)


def test_ctrl_c_in_a_block_waits_for_its_end(monkeypatch):
    calls = 0

    def interrupting(body, carried, fixed, checked):
        run = interpret(body, carried, fixed, checked)

        def wrapped(inputs):
            nonlocal calls
            calls += 1
            if calls == 3:
                signal.raise_signal(signal.SIGINT)
            return run(inputs)

        return wrapped

    monkeypatch.setattr(steps, "compile_loop", interrupting)
    options = {"compile": True, "optimizer": 0.02, "progress": False}
    with pytest.warns(vi.ConvergenceWarning, match="interrupted"):
        fit = vi.fit(regression, AutoNormal, DATA, steps=90, **options)
    assert fit.interrupted and 1 < len(fit.elbo) < 90
    monkeypatch.setattr(steps, "compile_loop", interpret)
    whole = vi.fit(regression, AutoNormal, DATA, steps=90, **options)
    assert np.array_equal(fit.extend(90 - len(fit.elbo)).elbo, whole.elbo)


def test_ctrl_c_while_compiling(monkeypatch):
    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(aot_cache, "build", interrupted)
    monkeypatch.setattr(aot_cache, "_key", lambda *args: "a program that is not there")
    options = {"compile": True, "optimizer": 0.02, "progress": False}
    with pytest.warns(vi.ConvergenceWarning, match="interrupted"):
        fit = vi.fit(regression, AutoNormal, DATA, steps=50, **options)
    assert fit.interrupted and len(fit.elbo) == 1
    monkeypatch.undo()
    monkeypatch.setattr(steps, "compile_loop", interpret)
    whole = vi.fit(regression, AutoNormal, DATA, steps=50, **options)
    assert np.array_equal(fit.extend(49).elbo, whole.elbo)


def test_an_error_while_compiling_in_mid_fit(monkeypatch):
    """The short last minibatch needs a second program, and that one fails."""
    compiled = 0

    def second_fails(*args):
        nonlocal compiled
        compiled += 1
        if compiled == 2:
            raise vi.CompileError("the C++ compiler failed (no space left)")
        return interpret(*args)

    monkeypatch.setattr(steps, "compile_loop", second_fails)
    monkeypatch.setattr(accelerator, "LONG_RUN", 1)
    options = {"subsample": {"data": 8}, "optimizer": 0.02, "progress": False, "steps": 60}
    with pytest.warns(vi.CompileWarning, match="no space left"):
        fit = vi.fit(regression, AutoNormal, DATA, **options)
    assert_same(vi.fit(regression, AutoNormal, DATA, compile=False, **options), fit)


def test_a_cache_folder_that_cannot_be_written(monkeypatch, tmp_path):
    torch.optim.Adam([torch.zeros(1)])  # the first one imports what wants a folder itself
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(aot_cache, "_loaded", type(aot_cache._loaded)())
    with pytest.raises(vi.CompileError, match="TORCHINDUCTOR_CACHE_DIR"):
        vi.fit(regression, AutoNormal, DATA, steps=5, compile=True, progress=False)


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no owners of files here")
def test_machine_code_in_the_folder_of_another_user_is_not_loaded(monkeypatch, tmp_path):
    (tmp_path / "vi_toolkit").mkdir()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(aot_cache, "_loaded", type(aot_cache._loaded)())
    other = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: other)
    if (tmp_path / "vi_toolkit").stat().st_uid == 0:
        monkeypatch.setattr(aot_cache, "_TRUSTED", ())
    with pytest.raises(vi.CompileError, match="belongs to another user"):
        vi.fit(regression, AutoNormal, DATA, steps=5, compile=True, progress=False)


SCRIPT = """
import json, sys, warnings
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
import vi_toolkit as vi
from vi_toolkit.compiled import accelerator
from pyro.infer.autoguide import AutoNormal
from tests.models import regression, regression_data
accelerator.LONG_RUN = 1
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", vi.CompileWarning)
    fit = vi.fit(regression, AutoNormal, regression_data(), steps={steps}, progress=False,
                 optimizer=0.02, compile={compile!r})
print(json.dumps({{"elbo": fit.elbo.tolist(), "active": fit._stochastic.accelerator.active,
                   "warnings": [str(w.message) for w in caught
                                if issubclass(w.category, vi.CompileWarning)]}}))
"""


def process(compile, number, **environment):
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(root=root, steps=number, compile=compile)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        text=True,
    )


def result(started):
    out, _ = started.communicate(timeout=300)
    assert started.returncode == 0
    return json.loads(out.splitlines()[-1])


def test_two_processes_at_once_and_a_third_that_finds_their_program(tmp_path):
    cache = str(tmp_path / "cache")
    first, second = (process(True, 200, TORCHINDUCTOR_CACHE_DIR=cache) for _ in range(2))
    results = [result(first), result(second)]
    assert all(r["active"] and not r["warnings"] for r in results)
    assert results[0]["elbo"] == results[1]["elbo"]
    libraries = list((tmp_path / "cache" / "vi_toolkit").glob("*/step.so"))
    assert len(libraries) == 1
    # With the program in the cache not even a compiler is needed.
    third = result(
        process(True, 200, TORCHINDUCTOR_CACHE_DIR=cache, CXX="/does/not/exist", PATH="/nowhere")
    )
    assert third["active"] and third["elbo"] == results[0]["elbo"]
    assert list((tmp_path / "cache" / "vi_toolkit").glob("*")) == [libraries[0].parent]


def test_without_a_compiler_the_fit_is_eager_and_says_so(tmp_path):
    nothing = {"CXX": "/does/not/exist", "PATH": "/nowhere"}
    auto = process("auto", 200, TORCHINDUCTOR_CACHE_DIR=str(tmp_path), **nothing)
    eager = process(False, 200)
    auto, eager = result(auto), result(eager)
    assert len(auto["warnings"]) == 1 and "no working C++ compiler" in auto["warnings"][0]
    assert auto["elbo"] == eager["elbo"]


def test_many_fits_share_one_program_and_leave_nothing_behind():
    def fit():
        vi.fit(regression, AutoNormal, DATA, steps=12, compile=True, progress=False)
        gc.collect()
        loops = sum(type(o) is steps.Loop for o in gc.get_objects())
        return len(aot_cache._loaded), loops, len(gc.get_objects())

    fit()
    programs, _, objects = fit()
    for _ in range(6):
        last = fit()
    assert last[0] == programs and last[1] == 0
    assert last[2] - objects < 60  # ten a fit: a graph's text kept in torch.fx is four objects


def test_a_program_is_never_used_for_another_structure(monkeypatch):
    """Same model function, other constants or shapes: other keys."""
    keys = []
    original = aot_cache._key
    monkeypatch.setattr(
        steps,
        "compile_loop",
        lambda *a: (keys.append(original("loop", a[0], [*a[1], *a[2]])), interpret(*a))[1],
    )

    def model(X, y, scale):
        w = pyro.sample("w", dist.Normal(0.0, scale).expand([3]).to_event(1))
        with pyro.plate("data", len(X)):
            pyro.sample("y", dist.Normal(X @ w, 1.0), obs=y)

    for rows, scale in ((30, 1.0), (30, 1.0), (30, 2.0), (20, 1.0)):
        data = {"X": X[:rows], "y": Y[:rows], "scale": scale}
        vi.fit(model, AutoNormal, data, steps=5, compile=True, progress=False)
    assert keys[0] == keys[1] and len(set(keys)) in (2, 3)
    assert keys[3] != keys[0]


def test_a_factorisation_that_fails_makes_the_loss_nan():
    def loss(matrix):
        return torch.linalg.cholesky(matrix).diagonal().log().sum(), matrix.trace()

    good, bad = 4 * torch.eye(3), torch.tensor([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    graph = aot_cache.functional(loss, [good])
    with pytest.raises(torch.linalg.LinAlgError):
        graph(bad)
    rewrites.failures_become_nan(graph)
    torch.testing.assert_close(graph(good), loss(good))
    value, trace = graph(bad)
    assert value.isnan() and trace == 3


def test_what_does_not_change_leaves_the_loop(monkeypatch):
    """lgamma(counts + 1) of all data is computed once, also where minibatches of it are used."""
    seen = []
    monkeypatch.setattr(steps, "compile_loop", lambda *a: (seen.append(a), interpret(*a))[1])
    counts = Y.abs().round()

    def model(y):
        rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", 30) as i:
            pyro.sample("y", dist.Poisson(rate), obs=y[i])

    assert_same(*both(model, AutoNormal, {"y": counts}, number=12, subsample={"data": 10}))
    body, _, fixed, checked = seen[0]
    assert not checked  # only its own minibatches are looked up
    assert "lgamma" not in body.code
    assert any(t.shape == (30,) and torch.equal(t, torch.lgamma(counts + 1)) for t in fixed)
    assert body.code.count("aten.randn") == 1 and "normal_functional" not in body.code


@pytest.mark.usefixtures("interpreted")
def test_two_fits_in_two_threads_do_not_disturb_each_other():
    alone = [both(m, g)[1] for m, g in ((regression, AutoNormal), (local, AutoNormal))]
    together: dict[int, object] = {}

    def run(k, model):
        together[k] = vi.fit(
            model,
            AutoNormal,
            DATA,
            steps=STEPS,
            compile=True,
            optimizer=0.02,
            seed=3,
            progress=False,
        )

    threads = [threading.Thread(target=run, args=(k, m)) for k, m in enumerate((regression, local))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(2):
        assert np.array_equal(together[k].elbo, alone[k].elbo)


def test_auto_compiles_long_runs_only(interpreted):
    short = vi.fit(regression, AutoNormal, DATA, steps=20, progress=False)
    assert not short._stochastic.accelerator.active
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", vi.ConvergenceWarning)
        fit = vi.fit(coin, coin_guide, DATA, steps=2_000, progress=False)
    assert fit._stochastic.accelerator.active
    with pytest.raises(ValueError, match="compile must be"):
        vi.fit(regression, AutoNormal, DATA, compile="yes")


# ---------------------------------------------------------------- watching


def test_python_state_sees_globals_closures_attributes_and_containers():
    class Settings:
        beta = 1.0

    class Model:
        scale = 2.0

        def __init__(self):
            self.items = [1, 2]

        def __call__(self):
            return self.items, Settings.beta, temperature

    array = np.zeros(3)
    counter = {"n": 0}

    def function(default=[0]):  # noqa: B006
        return array, counter, default

    model = Model()
    state = PythonSnapshot(model, function)
    assert state.changed() is None
    changes = [
        lambda: model.items.append(3),
        lambda: setattr(Model, "scale", 3.0),
        lambda: setattr(Settings, "beta", 2.0),
        lambda: array.__setitem__(0, 1.0),
        lambda: counter.update(n=1),
        lambda: function.__defaults__[0].append(1),
    ]
    for k, change in enumerate(changes):
        change()
        assert state.changed() is not None, k
        assert state.changed() is None, k


def test_effects_sees_prints_clocks_and_foreign_randomness(capsys):
    import random
    import time

    with effects() as found:
        print("x")
        time.time()
        random.random()
        np.random.normal()  # noqa: NPY002
        torch.ones(2).sum()
    text = " ".join(found)
    assert all(word in text for word in ("print", "time.time", "random.random", "numpy.random"))
    assert len(found) == 4
    with effects() as found:
        torch.distributions.Normal(0.0, 1.0).sample()
        sum(range(3))
    assert not found


def test_effects_leave_a_profiler_running():
    profiler = cProfile.Profile()
    with profiler:
        with effects() as found:
            torch.ones(2).sum()
        sorted([3, 1, 2])  # the profiler still sees what comes after
    seen = {str(code) for code, *_ in profiler.getstats()}
    assert not found and any("sorted" in name for name in seen)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.usefixtures("interpreted")
def test_large_parameters_keep_their_shape(groups):
    data = {"y": torch.randn(70, 60, generator=torch.Generator().manual_seed(2))}

    def model(y):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("rows", 70):
            mean = pyro.sample("mean", dist.Normal(0.0, 1.0).expand([60]).to_event(1))
            pyro.sample("y", dist.Normal(mean, scale).to_event(1), obs=y)

    def optimizer(leaves):
        if groups == 1:
            return torch.optim.Adam(leaves, lr=0.02)
        large = [p for p in leaves if p.numel() > 4000]
        small = [p for p in leaves if p.numel() < 4000]
        return torch.optim.Adam([{"params": small, "lr": 0.05}, {"params": large}], lr=0.02)

    eager, compiled = both(model, AutoNormal, data, 90, optimizer=optimizer)
    assert_same(eager, compiled)
    (loop,) = compiled._stochastic.accelerator.steps.loops.values()
    shapes = [tuple(t.shape) for t in loop.carried()[: len(loop.places[0].rules)]]
    assert shapes == [(2,), (70, 60), (70, 60)]


# ---------------------------------------------------------------- what leaves the loop


def loop_of(function, variable, constants):
    """(once, each) of a function of variable inputs and then constants, and what each gives."""
    graph = aot_cache.functional(function, [*variable, *constants])
    expected = graph(*variable, *constants)
    once, each, _ = rewrites.hoist(graph, len(variable), [False] * len(constants))
    given = once(*constants)
    for found, right in zip(each(*variable, *given), expected, strict=True):
        torch.testing.assert_close(found, right, equal_nan=True)
    return [str(n.target) for n in each.graph.nodes if n.op == "call_function"]


def test_a_gradient_of_rows_looked_up_is_a_product_of_the_library():
    table, rows = torch.randn(500, 60), torch.randint(0, 500, (100,))
    v, w = torch.randn(100), torch.randn(60)

    def function(rows, v, w, table):
        return table[rows] @ w, table[rows].T @ v, table.exp()[rows].T @ v

    left = loop_of(function, [rows, v, w], [table])
    assert left.count("aten.mm.default") == 2 and left.count("aten.mv.default") == 1
    assert "aten.exp.default" not in left
    few = loop_of(function, [rows[:10], v[:10], w], [table])
    assert "aten.mm.default" not in few


def test_masks_are_made_once():
    def function(x, c):
        strict = x.tril(-1)
        return strict + torch.eye(5) + c, strict.tril().triu(-2), torch.where(c > 0, x, 1.0).triu(1)

    x = torch.randn(5, 5)
    x[0, 4] = torch.nan  # above the diagonal, where nobody looks
    left = loop_of(function, [x], [torch.randn(5, 5)])
    assert not {"aten.tril.default", "aten.triu.default", "aten.eye.default"} & set(left)
