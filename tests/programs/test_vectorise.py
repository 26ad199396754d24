"""A batch of points gives the same numbers as one point at a time."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from vi_toolkit.deterministic.modes import hessians
from vi_toolkit.programs.joint import Joint
from vi_toolkit.programs.vectorise import Batched


def random_walk(y):
    """Writes each state into a tensor that the model made."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    steps = pyro.sample("steps", dist.Normal(0.0, 1.0).expand([len(y) - 1]).to_event(1))
    level = torch.zeros(len(y))
    for t in range(1, len(y)):
        level[t] = level[t - 1] + scale * steps[t - 1]
    with pyro.plate("time", len(y)):
        pyro.sample("y", dist.Normal(level, 1.0), obs=y)


def ordered(y):
    """Pyro's own distribution writes into a tensor."""
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("observations", len(y)):
        cuts = torch.tensor([-1.0, 0.5])
        pyro.sample("y", dist.OrderedLogistic(slope * torch.linspace(-1, 1, len(y)), cuts), obs=y)


def multinomial(y):
    """torch's own log density writes through a boolean mask."""
    probs = pyro.sample("probs", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("groups", len(y)):
        pyro.sample("y", dist.Multinomial(10, probs), obs=y)


MODELS = {
    "random walk": (random_walk, torch.tensor([0.0, 0.4, 1.2, 0.3])),
    "ordered": (ordered, torch.tensor([0.0, 1.0, 1.0, 2.0])),
    "multinomial": (multinomial, torch.tensor([[10.0, 0.0, 0.0], [3.0, 3.0, 4.0]])),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_write_in_place_are_batched(name):
    model, y = MODELS[name]
    joint = Joint(model, {"y": y.double()})
    u = torch.randn(5, joint.dim, dtype=torch.float64)
    gradient, value = joint.gradients(u)
    assert joint.many_with_gradient.vectorises
    assert joint.many_with_gradient.writes
    joint.log_densities(u)
    curvature = hessians(joint, u)
    for i, point in enumerate(u):
        one = torch.func.hessian(joint.log_density)(point)
        assert torch.allclose(value[i], joint.log_density(point), rtol=1e-12)
        assert torch.allclose(gradient[i], torch.func.grad(joint.log_density)(point), rtol=1e-10)
        assert torch.allclose(curvature[i], one, rtol=1e-6, atol=1e-8)


def test_a_branch_on_values_falls_back_to_a_loop():
    batched = Batched(lambda x: x**2 if x.sum() > 0 else -x)
    x = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])
    assert torch.equal(batched(x), torch.tensor([[1.0, 4.0], [1.0, 2.0]]))
    assert batched.vectorises is False
    assert "vmap" in batched.why_not


def test_a_point_that_raises_is_marked_and_the_others_stay():
    def f(x):
        return torch.linalg.cholesky(x * torch.eye(2)).sum()

    batched = Batched(f, bad_point=lambda: torch.tensor(float("nan")))
    out = batched(torch.tensor([4.0, -1.0, 9.0]))
    assert out.isnan().tolist() == [False, True, False]
    assert torch.equal(out[::2], torch.tensor([4.0, 6.0]))
    assert batched.vectorises is None
    batched(torch.tensor([1.0, 4.0]))
    assert batched.vectorises
