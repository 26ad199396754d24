"""Compiled log densities: the model's own numbers, or a clear refusal."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import vi_toolkit as vi
from tests.models import regression, regression_data
from vi_toolkit.compiled import density
from vi_toolkit.deterministic import run
from vi_toolkit.machine_code import compile_joint
from vi_toolkit.programs.joint import Joint
from vi_toolkit.reference import nuts
from vi_toolkit.reference.nuts import nuts_draws


@pytest.fixture
def interpreted(monkeypatch):
    """Runs the graph operation by operation instead of compiling it."""
    monkeypatch.setattr(density, "compile_graph", lambda graph, inputs: lambda x: graph(*x))


@pytest.fixture(autouse=True)
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def schools(y, sd):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sd), obs=y)


def many_supports(y):
    p = pyro.sample("p", dist.Beta(2.0, 3.0))
    w = pyro.sample("w", dist.Dirichlet(torch.ones(3)))
    L = pyro.sample("L", dist.LKJCholesky(2, 1.5))
    k = pyro.sample("k", dist.Gamma(2.0, 1.0).expand([2]).to_event(1))
    scale = L * k.sqrt()[..., None]
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.MultivariateNormal(w[..., :2] * p, scale_tril=scale), obs=y)


def in_place(y):
    """A random walk, written into a tensor."""
    step = pyro.sample("step", dist.HalfNormal(1.0))
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(y)]).to_event(1))
    mean = torch.zeros(len(y))
    for t in range(1, len(y)):
        mean[t] = mean[t - 1] + step * z[t]
    pyro.sample("y", dist.Normal(mean, 0.5).to_event(1), obs=y)


EIGHT = {
    "y": torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12], dtype=torch.float64),
    "sd": torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18], dtype=torch.float64),
}
PAIRS = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
MODELS = [
    pytest.param(schools, EIGHT, id="schools"),
    pytest.param(many_supports, {"y": PAIRS}, id="many supports"),
    pytest.param(in_place, {"y": PAIRS[:, 0]}, id="in place"),
]


def points(joint, count):
    generator = torch.Generator().manual_seed(1)
    return joint.start + 0.3 * torch.randn(count, joint.dim, generator=generator)


def assert_the_same(joint, u):
    expected = joint.many_with_gradient(u)
    for mine, theirs in zip(joint.gradients(u), expected, strict=True):
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("model", "data"), MODELS)
@pytest.mark.parametrize("count", [1, 9, 37])
@pytest.mark.usefixtures("interpreted")
def test_gradients_are_the_models(model, data, count):
    joint = Joint(model, data)
    compile_joint(joint, insist=True)
    assert joint.compiled is not None
    assert_the_same(joint, points(joint, count))


def test_machine_code_follows_data_that_change_in_place():
    data = {k: v.clone() for k, v in EIGHT.items()}
    joint = Joint(schools, data)
    compile_joint(joint, insist=True)
    u = points(joint, 21)
    assert_the_same(joint, u)
    before = joint.gradients(u)[1]
    data["y"] += 1
    data["sd"] *= 2
    assert_the_same(joint, u)
    assert not torch.allclose(joint.gradients(u)[1], before)


@pytest.mark.usefixtures("interpreted")
def test_a_point_without_a_density_is_nan_and_spoils_no_other():
    def covariance(y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        matrix = torch.eye(2) + a * (1 - torch.eye(2))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), matrix), obs=y)

    joint = Joint(covariance, {"y": PAIRS[0]})
    compile_joint(joint, insist=True)
    u = torch.tensor([[0.3], [2.0], [-0.5]]).repeat(4, 1)  # 2 makes the matrix indefinite
    value = joint.gradients(u)[1]
    assert torch.isfinite(value).tolist() == 4 * [True, False, True]
    assert torch.allclose(value[0], joint.log_density(u[0]))


CALLS = []


def noting(y):
    CALLS.append(1)
    schools(y, torch.ones(8))


def talking(y):
    print("here")
    schools(y, torch.ones(8))


class Counting:
    def __init__(self):
        self.count = 0

    def __call__(self, y):
        self.count += 1
        schools(y, torch.ones(8) * self.count)


def changing(y):
    y.add_(1)
    schools(y, torch.ones(8))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("model", "says"),
    [
        (noting, "CALLS"),
        (talking, "print"),
        (Counting(), "count"),
        (changing, "many draws at once"),
    ],
    ids=["global", "print", "attribute", "data"],
)
def test_what_machine_code_would_not_repeat_is_refused(model, says):
    joint = Joint(model, {"y": EIGHT["y"].clone()})
    with pytest.raises(vi.CompileError, match=says):
        compile_joint(joint, insist=True)
    with pytest.warns(vi.CompileWarning, match="evaluated eagerly"):
        compile_joint(joint)
    assert joint.compiled is None


def test_wrong_machine_code_is_found(monkeypatch):
    def wrong(graph, inputs):
        return lambda x: [1.001 * t for t in graph(*x)]

    monkeypatch.setattr(density, "compile_graph", wrong)
    with pytest.raises(vi.CompileError, match="differs from the model's"):
        compile_joint(Joint(schools, EIGHT), insist=True)


# ------------------------------------------------------------------ in use


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal])
def test_a_deterministic_fit_is_the_same_compiled(guide, monkeypatch):
    eager = vi.fit(regression, guide, regression_data(), compile=False, progress=False)
    compiled = vi.fit(regression, guide, regression_data(), compile=True, progress=False)
    assert compiled.method == "deterministic"
    assert compiled.joint.compiled is not None and eager.joint.compiled is None
    for name, value in eager.params.items():
        torch.testing.assert_close(compiled.params[name], value, rtol=1e-5, atol=1e-6)
    small = vi.fit(regression, guide, regression_data(), progress=False)
    assert small.joint.compiled is None
    monkeypatch.setattr(run, "COMPILED_WORK", 1)
    assert vi.fit(regression, guide, regression_data(), progress=False).joint.compiled is not None


def test_a_fit_that_cannot_be_compiled_is_eager_and_says_so(monkeypatch):
    def fails(graph, inputs):
        raise vi.CompileError("there is no working C++ compiler")

    monkeypatch.setattr(density, "compile_graph", fails)
    monkeypatch.setattr(run, "COMPILED_WORK", 1)
    with pytest.warns(vi.CompileWarning, match="no working C\\+\\+ compiler"):
        fit = vi.fit(regression, AutoNormal, regression_data(), progress=False)
    assert fit.converged
    with pytest.raises(vi.CompileError, match="no working"):
        vi.fit(regression, AutoNormal, regression_data(), progress=False, compile=True)
    monkeypatch.setattr(nuts, "LONG_RUN", 1)
    with pytest.warns(vi.CompileWarning, match="no working"):
        draws, made = nuts_draws(schools, EIGHT, 2, 4, 4, progress=False)
    assert not made["compiled"] and draws["theta"].shape == (2, 4, 8)


@pytest.mark.usefixtures("interpreted")
def test_nuts_draws_the_same_from_a_compiled_density():
    """Rounding grows along a chain, so a short one."""
    eager, made = nuts_draws(schools, EIGHT, 2, 8, 8, progress=False, compile=False)
    compiled, other = nuts_draws(schools, EIGHT, 2, 8, 8, progress=False, compile=True)
    assert (made["compiled"], other["compiled"]) == (False, True)
    assert made["chain_seeds"] == other["chain_seeds"]
    for name, value in eager.items():
        np.testing.assert_allclose(compiled[name], value, rtol=1e-6, atol=1e-8)


def test_nuts_says_where_it_cannot_start():
    def nowhere(y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.factor("wall", torch.where(a > 10, 0.0, -math.inf))

    with pytest.raises(vi.InvalidReferenceError, match="none of 100 starts"):
        nuts_draws(nowhere, {"y": torch.ones(1)}, 2, 4, 4, progress=False, compile=True)
