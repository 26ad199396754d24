"""Noise that is fixed, recorded or drawn in a batch leaves each distribution as it is."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from tests.tolerances import Z
from vi_toolkit.programs.noise import (
    FixedNoise,
    FunctionalNoise,
    RecordNoise,
    UnsupportedNoise,
    fixed_normals,
)
from vi_toolkit.programs.vectorise import Batched


def test_fixed_normals_match_the_first_two_moments_exactly():
    z = fixed_normals(64, 5, seed=0)
    assert z.shape == (64, 5)
    assert z.mean(0).abs().max() < 1e-14
    assert (z.T @ z / 64 - torch.eye(5)).abs().max() < 1e-12


def test_fixed_normals_too_few_for_a_covariance_match_the_variances():
    z = fixed_normals(8, 20, seed=0)
    assert (z.square().mean(0) - 1).abs().max() < 1e-12


def test_fixed_normals_differ_by_seed_and_offset_and_repeat():
    a = fixed_normals(16, 2, 0, 0)
    assert torch.equal(a, fixed_normals(16, 2, 0, 0))
    assert not torch.equal(a, fixed_normals(16, 2, 0, 1))
    assert not torch.equal(a, fixed_normals(16, 2, 1, 0))


FAMILIES = [
    dist.Normal(torch.zeros(3), 2.0),
    dist.LogNormal(torch.tensor(0.3), 0.5),
    dist.Gamma(torch.tensor([0.3, 2.0, 9.0]), 1.5),
    dist.InverseGamma(torch.tensor(4.0), 2.0),
    dist.Beta(torch.tensor(2.0), 3.0),
    dist.Dirichlet(torch.tensor([0.5, 1.0, 3.0])),
    dist.MultivariateNormal(torch.zeros(2), torch.tensor([[2.0, 0.5], [0.5, 1.0]])),
    dist.Exponential(torch.tensor(2.0)),
    dist.Laplace(torch.tensor(0.0), 1.0),
    dist.StudentT(torch.tensor(7.0)),
    dist.Gumbel(torch.tensor(0.0), 1.0),
]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: type(f).__name__)
def test_served_noise_leaves_the_distribution_as_it_is(family):
    """Samples from given base noise have the distribution's own mean and variance."""
    with RecordNoise() as record:
        family.rsample()
    n = 4_000
    draws = []
    for z in torch.randn(n, record.total):
        with FixedNoise(z):
            draws.append(family.rsample())
    draws = torch.stack(draws).double()
    error = draws.std(0) / n**0.5
    assert ((draws.mean(0) - family.mean).abs() <= Z * error).all()
    centred = (draws - draws.mean(0)).square()
    assert ((centred.mean(0) - family.variance).abs() <= Z * centred.std(0) / n**0.5).all()


def test_a_gamma_draw_is_smooth_in_its_shape_at_fixed_noise():
    z = torch.tensor([0.7], dtype=torch.float64)

    def draw(shape):
        with FixedNoise(z):
            return dist.Gamma(shape, torch.ones((), dtype=torch.float64)).rsample()

    shape = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(draw(shape), shape)
    h = 1e-5
    numerical = (draw(shape.detach() + h) - draw(shape.detach() - h)) / (2 * h)
    assert abs(float(slope - numerical)) < 1e-5 * abs(float(numerical))


def test_fixed_noise_gives_the_same_draws_under_vmap():
    z = torch.randn(7, 4, dtype=torch.float64)
    concentration = torch.tensor([0.5, 2.0, 4.0], dtype=torch.float64)

    def draw(z):
        with FixedNoise(z):
            gamma = dist.Gamma(concentration, 1.0).rsample()
            normal = dist.Normal(torch.zeros((), dtype=torch.float64), 1.0).rsample()
        return gamma.sum() + normal

    batched = Batched(draw)(z)
    assert torch.allclose(batched, torch.stack([draw(row) for row in z]), rtol=1e-12)


def test_discrete_draws_are_refused():
    with pytest.raises(UnsupportedNoise, match="bernoulli"), RecordNoise():
        dist.Bernoulli(torch.tensor(0.5)).sample()


def test_a_guide_that_asks_for_more_noise_than_before_is_refused():
    with pytest.raises(UnsupportedNoise, match="not fixed"), FixedNoise(torch.zeros(1)):
        dist.Normal(torch.zeros(2), 1.0).rsample()


def test_functional_noise_gives_each_draw_its_own_numbers_under_vmap():
    def draw(_):
        with FunctionalNoise():
            return dist.Normal(torch.zeros(()), 1.0).rsample()

    draws = torch.func.vmap(draw, randomness="different")(torch.zeros(1000))
    assert draws.unique().numel() > 990


@pytest.mark.parametrize("kind", ["Beta", "Dirichlet"])
@pytest.mark.parametrize("plate", [None, 2])
def test_beta_and_dirichlet_sites_are_drawn_in_one_batch(kind, plate):
    """Independent draws of the right distribution, with torch's implicit gradient of their mean."""
    size = [] if plate is None else [plate]
    weights = torch.tensor([0.7, 2.0, 1.3], dtype=torch.float64).expand([*size, 3]).clone()
    weights.requires_grad_()
    fn = dist.Dirichlet(weights) if kind == "Dirichlet" else dist.Beta(weights[..., 0], 2.0)
    n = 20_000

    def draw(_):
        with FunctionalNoise(), pyro.plate_stack("plates", size):
            return pyro.sample("w", fn)

    batched = Batched(draw, random=True)
    torch.manual_seed(0)
    x = batched(torch.zeros(n))
    assert batched.vectorises
    error = (fn.variance / n).sqrt()
    assert ((x.mean(0) - fn.mean).abs() < Z * error).all()
    fourth = (x.detach() - fn.mean.detach()) ** 4
    assert ((x.var(0) - fn.variance).abs() < Z * (fourth.mean(0) / n).sqrt()).all()
    assert x.detach().reshape(n, -1)[:, 0].unique().numel() > 0.99 * n
    # d mean / d weights, by 40 blocks of draws, whose spread gives the error
    (exact,) = torch.autograd.grad(
        (fn.mean[..., 0] if kind == "Dirichlet" else fn.mean).sum(), weights, retain_graph=True
    )
    blocks = x.reshape(40, n // 40, -1).mean(1)[:, 0 :: 3 if kind == "Dirichlet" else 1].sum(1)
    found = torch.stack(
        [torch.autograd.grad(block, weights, retain_graph=True)[0] for block in blocks]
    )
    error = found.std(0) / 40**0.5
    assert ((found.mean(0) - exact).abs() <= Z * error).all()


def test_a_distribution_made_of_a_dirichlet_is_drawn_as_itself():
    def draw(_):
        with FunctionalNoise():
            return pyro.sample("counts", dist.DirichletMultinomial(torch.ones(3), 5.0))

    draws = Batched(draw, random=True)(torch.zeros(20))
    assert draws.shape == (20, 3)
    assert (draws.sum(-1) == 5).all() and (draws == draws.round()).all()


def test_a_distribution_made_while_validation_was_on_is_batched():
    with pyro.validation_enabled(True):
        fn = dist.Normal(torch.tensor(0.0), torch.tensor(1.0), validate_args=True)
    batched = Batched(fn.log_prob)
    x = torch.tensor([0.0, 1.0, 2.0])
    assert torch.allclose(batched(x), -0.5 * x**2 - 0.5 * torch.log(torch.tensor(2 * torch.pi)))
    assert batched.vectorises
