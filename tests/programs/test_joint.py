"""The log joint density as a function of one unconstrained vector."""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.mcmc.util import initialize_model

from tests.models import scale_model
from vi_toolkit.programs.isolation import isolated_pyro_state
from vi_toolkit.programs.joint import Joint


def everything(y):
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
    p = pyro.sample("p", dist.Beta(2.0, 3.0))
    theta = pyro.sample("theta", dist.Dirichlet(torch.ones(3)))
    tril = pyro.sample("tril", dist.LKJCholesky(3, 1.0))
    with pyro.plate("groups", 2):
        a = pyro.sample("a", dist.Normal(0.0, sigma))
    pyro.deterministic("b", a.sum())
    pyro.factor("penalty", -(tril.sum() ** 2))
    with pyro.plate("observations", len(y)), pyro.poutine.mask(mask=y > 0):
        pyro.sample("y", dist.Normal(a.sum() + p * theta[0], sigma), obs=y)


def test_log_density_is_minus_the_potential_of_pyros_own_nuts():
    y = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    with isolated_pyro_state(dtype=torch.float64):
        joint = Joint(everything, {"y": y})
        start, potential, *_ = initialize_model(everything, model_args=(y,))
        differences = []
        for scale in (0.0, 0.5, 1.0):
            u = joint.start + scale
            values = {n: u[s.slice].reshape(s.unconstrained_shape) for n, s in joint.sites.items()}
            differences.append(float(joint.log_density(u) + potential(values)))
    assert set(start) == set(joint.sites)
    assert max(abs(d) for d in differences) < 1e-10


def test_names_of_scalars_include_their_transform():
    with isolated_pyro_state(dtype=torch.float64):
        joint = Joint(everything, {"y": torch.ones(2, dtype=torch.float64)})
    assert joint.names[:4] == ["log(sigma)", "logit(p)", "u(theta)[0]", "u(theta)[1]"]
    assert joint.names[-2:] == ["a[0]", "a[1]"]
    assert joint.dim == len(joint.names) == 9
    assert joint.observations == 2


def test_flatten_and_unflatten_are_inverse():
    with isolated_pyro_state(dtype=torch.float64):
        joint = Joint(everything, {"y": torch.ones(2, dtype=torch.float64)})
        u = torch.randn(5, joint.dim)
        draws = joint.unflatten(u)
    assert draws["theta"].shape == (5, 3)
    assert torch.allclose(joint.flatten(draws), u, atol=1e-9)


def test_batched_densities_agree_with_single_ones_and_bad_points_are_nan():
    def fragile(y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        torch.linalg.cholesky(torch.stack([torch.stack([a, a * 0]), torch.stack([a * 0, a])]))
        pyro.sample("y", dist.Normal(a, 1.0), obs=y)

    with isolated_pyro_state(dtype=torch.float64):
        joint = Joint(scale_model, {"y": torch.randn(4)})
        u = torch.randn(6, 2)
        assert torch.allclose(
            joint.log_densities(u), torch.stack([joint.log_density(row) for row in u])
        )

        def positive_start():
            return Joint(fragile, {"y": torch.tensor(1.0)})

        torch.manual_seed(3)
        joint = None
        for _ in range(20):
            try:
                joint = positive_start()
                break
            except torch.linalg.LinAlgError:
                continue
        assert joint is not None
        density = joint.log_densities(torch.tensor([[1.0], [-1.0], [2.0]]))
    assert torch.isfinite(density).tolist() == [True, False, True]


def in_place(y):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    path = torch.zeros(len(y))
    path[0] = a
    for t in range(1, len(y)):
        path[t] = 0.5 * path[t - 1] + a
    with pyro.plate("t", len(y)):
        pyro.sample("y", dist.Normal(path, 1.0), obs=y)


def test_models_that_vmap_cannot_run_give_the_same_numbers():
    with isolated_pyro_state(dtype=torch.float64):
        joint = Joint(in_place, {"y": torch.ones(4)})
        u = torch.randn(5, 1)
        gradient, value = joint.gradients(u)
        h = 1e-5
        numerical = (joint.log_densities(u + h) - joint.log_densities(u - h)) / (2 * h)
    assert torch.allclose(gradient[:, 0], numerical, atol=1e-6)
    assert torch.isfinite(value).all()
