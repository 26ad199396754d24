"""Compiled steps against eager ones: the same draws and the same fit.

Most comparisons run the traced loop in Python (fixture ``interpreted``): everything but the machine
code is the same, and no compiler is waited for. A few models go through the C++ compiler as well.
"""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
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
from tests.compiled.checks import accelerator_of, assert_same, both, precision, running
from tests.compiled.models import (
    DATA,
    amortised,
    coin,
    coin_guide,
    discrete,
    discrete_guide,
    gamma,
    local,
    log_normal,
    mixture,
    regression,
    shares,
    shares_guide,
)

optim = torch.optim


def cell(name, model, guide, **options):
    return pytest.param(model, guide, options, id=name)


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
    state, mine = running(eager).state(), running(compiled).state()
    torch.testing.assert_close(mine["block_sum"], state["block_sum"], rtol=1e-3, atol=1e-4)
    assert len(running(compiled).blocks) == len(running(eager).blocks)


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
    assert_same(eager, compiled, 1e-9 if precision(compiled) == torch.float64 else 1e-4)
    assert accelerator_of(compiled).active


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
    (loop,) = accelerator_of(compiled).steps.loops.values()
    shapes = [tuple(t.shape) for t in loop.carried()[: len(loop.states[0].rules)]]
    assert shapes == [(2,), (70, 60), (70, 60)]
