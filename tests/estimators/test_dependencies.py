"""Rao-Blackwellisation leaves out only terms with mean zero, on models that tempt it further."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch

import vi_toolkit as vi
from tests.estimators.checks import FALSE_ALARM, mean_test, total_variance
from tests.estimators.models import flat, gradients
from tests.tolerances import Z
from vi_toolkit.estimators import dependencies
from vi_toolkit.estimators.particles import Given, trace_model_and_guide
from vi_toolkit.programs.sites import is_drawn


def bernoulli(name, shape=(), spread=0.8):
    size = math.prod(shape)
    start = torch.linspace(-spread, spread, size).reshape(shape) if size > 1 else torch.tensor(0.3)
    return dist.Bernoulli(logits=pyro.param(name, start))


def normal(name, shape=()):
    return dist.Normal(pyro.param(name, torch.full(shape, 0.4)), 0.8)


def nested_plates():
    def model():
        top = pyro.sample("top", dist.Bernoulli(0.3))
        with pyro.plate("groups", 3, dim=-2):
            group = pyro.sample("group", dist.Bernoulli(logits=2 * top - 1))
            with pyro.plate("items", 2, dim=-1):
                item = pyro.sample("item", dist.Bernoulli(logits=2 * group - 1))
                pyro.sample("y", dist.Normal(item + top, 0.6), obs=torch.ones(3, 2))

    def guide():
        pyro.sample("top", bernoulli("a"))
        with pyro.plate("groups", 3, dim=-2):
            group = pyro.sample("group", bernoulli("b", (3, 1)))
            with pyro.plate("items", 2, dim=-1):
                pyro.sample("item", dist.Bernoulli(logits=group + pyro.param("c", torch.ones(2))))

    return model, guide


def crossed_plates():
    def model():
        rows, columns = pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 2, dim=-1)
        with rows:
            r = pyro.sample("r", dist.Bernoulli(0.4))
        with columns:
            c = pyro.sample("c", dist.Normal(0.0, 1.0))
        with rows, columns:
            pyro.sample("y", dist.Normal(r * c, 0.5), obs=torch.arange(6.0).reshape(3, 2) / 4)

    def guide():
        with pyro.plate("rows", 3, dim=-2):
            pyro.sample("r", bernoulli("a", (3, 1)))
        with pyro.plate("columns", 2, dim=-1):
            pyro.sample("c", normal("b", (2,)))

    return model, guide


def chain():
    """A structured guide: what follows z1 in the guide must stay in its signal."""

    def model():
        a = pyro.sample("z1", dist.Bernoulli(0.4))
        b = pyro.sample("z2", dist.Bernoulli(logits=1.5 * a - 0.5))
        c = pyro.sample("z3", dist.Bernoulli(logits=2 * b - 1))
        pyro.sample("y", dist.Normal(3 * c, 0.7), obs=torch.tensor(1.0))

    def guide():
        c = pyro.sample("z3", bernoulli("a"))  # backwards
        b = pyro.sample("z2", dist.Bernoulli(logits=c - pyro.param("b", torch.tensor(0.2))))
        pyro.sample("z1", dist.Bernoulli(logits=2 * b * pyro.param("c", torch.tensor(0.5))))

    return model, guide


def sum_comes_back():
    """The plate is entered again with a sum over itself: its indices are mixed."""

    def model():
        n = pyro.plate("n", 4)
        with n:
            z = pyro.sample("z", dist.Bernoulli(0.4))
        total = z.sum()
        with n:
            pyro.sample("y", dist.Normal(total, 0.8), obs=torch.arange(4.0))

    def guide():
        with pyro.plate("n", 4):
            pyro.sample("z", bernoulli("a", (4,)))

    return model, guide


def neighbours():
    """In a plate, and yet each datum sees the one before."""

    def model():
        with pyro.plate("n", 4):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z.cumsum(-1), 0.5), obs=torch.arange(4.0))

    def guide():
        with pyro.plate("n", 4):
            pyro.sample("z", normal("a", (4,)))

    return model, guide


def through_a_global():
    """The guide draws a global given all locals; the locals' terms depend on each other by it."""

    def model():
        g = pyro.sample("g", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 3):
            z = pyro.sample("z", dist.Bernoulli(logits=g))
            pyro.sample("y", dist.Normal(z + g, 0.8), obs=torch.tensor([1.0, 0.0, 2.0]))

    def guide():
        with pyro.plate("n", 3):
            z = pyro.sample("z", bernoulli("a", (3,)))
        pyro.sample("g", dist.Normal(pyro.param("b", torch.tensor(0.7)) * z.sum(), 0.9))

    return model, guide


def factors():
    def model():
        with pyro.plate("n", 3):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.factor("one by one", z * torch.tensor([1.0, -1.0, 0.5]))
        pyro.factor("all together", -((z.sum() - 2) ** 2))

    def guide():
        with pyro.plate("n", 3):
            pyro.sample("z", bernoulli("a", (3,)))

    return model, guide


def masked_and_scaled():
    kept = torch.tensor([True, False, True])

    def model():
        with poutine.scale(scale=0.5):
            g = pyro.sample("g", dist.Bernoulli(0.4))
        with pyro.plate("n", 3), poutine.mask(mask=kept), poutine.scale(scale=2.0):
            z = pyro.sample("z", dist.Normal(g, 1.0))
            pyro.sample("y", dist.Normal(z, 0.7), obs=torch.ones(3))

    def guide():
        with poutine.scale(scale=0.5):
            pyro.sample("g", bernoulli("a"))
        with pyro.plate("n", 3), poutine.mask(mask=kept), poutine.scale(scale=2.0):
            pyro.sample("z", normal("b", (3,)))

    return model, guide


def masked_in_the_guide_only():
    """The draw under the mask still reaches the likelihood, so its score still counts."""
    kept = torch.tensor([True, False])

    def model():
        with pyro.plate("n", 2):
            z = pyro.sample("z", dist.Bernoulli(0.4))
            pyro.sample("y", dist.Normal(2 * z, 0.7), obs=torch.ones(2))

    def guide():
        with pyro.plate("n", 2), poutine.mask(mask=kept):
            pyro.sample("z", bernoulli("a", (2,)))

    return model, guide


def partly_observed():
    seen, y = torch.tensor([True, False, True]), torch.tensor([1.0, 0.0, -1.0])

    def model():
        g = pyro.sample("g", dist.Bernoulli(0.4))
        with pyro.plate("n", 3):
            full = pyro.sample("y", dist.Normal(g, 1.0), obs=y, obs_mask=seen)
            pyro.sample("x", dist.Normal(2 * full, 0.8), obs=torch.ones(3))

    def guide():
        pyro.sample("g", bernoulli("a"))
        with pyro.plate("n", 3):
            pyro.sample("y_unobserved", normal("b", (3,)))

    return model, guide


def coordinates():
    """Independent coordinates, a Dirichlet prior, a Categorical that indexes."""

    def model():
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
        pyro.sample("y", dist.Normal(w[k] + w[0] * w[1], 0.6), obs=torch.tensor(1.0))

    def guide():
        pyro.sample("w", normal("a", (3,)).to_event(1))
        pyro.sample("k", dist.Categorical(logits=pyro.param("b", torch.tensor([0.0, 0.3, -0.2]))))

    return model, guide


def filled_in_place():
    """A tensor filled in place, which provenance cannot follow."""

    def model():
        a = pyro.sample("z1", dist.Bernoulli(0.4))
        b = pyro.sample("z2", dist.Bernoulli(0.6))
        both = torch.zeros(2)
        both[0], both[1] = a, b
        pyro.sample("y", dist.Normal(3 * both[0], 0.7), obs=torch.tensor(1.0))

    def guide():
        pyro.sample("z1", bernoulli("a"))
        pyro.sample("z2", bernoulli("b"))

    return model, guide


MODELS = [
    nested_plates,
    crossed_plates,
    chain,
    sum_comes_back,
    neighbours,
    through_a_global,
    factors,
    masked_and_scaled,
    masked_in_the_guide_only,
    partly_observed,
    coordinates,
    filled_in_place,
]


def random_program(seed):
    """Random latents, discrete or not, in a plate or not, with random parents on both sides."""
    g = torch.Generator().manual_seed(seed)

    def coin(p):
        return bool(torch.rand((), generator=g) < p)

    count = 4
    in_plate = [coin(0.5) for _ in range(count)]
    discrete = [coin(0.6) for _ in range(count)]
    parents = [[j for j in range(i) if coin(0.5)] for i in range(count)]
    order = torch.randperm(count, generator=g).tolist()
    guide_parents = {i: [j for j in order[:k] if coin(0.35)] for k, i in enumerate(order)}
    seen = [[j for j in range(count) if coin(0.5)] for _ in range(2)]
    weights = torch.randn(count + 2, count, generator=g)

    def at(value, inside):
        return value.sum() if value.dim() and not inside else value  # a sum leaves the plate

    def link(i, js, values, inside):
        return sum((weights[i, j] * at(values[j], inside) for j in js), torch.tensor(0.2))

    def draw(i, location):
        one = dist.Bernoulli(logits=location) if discrete[i] else dist.Normal(location, 1.0)
        return pyro.sample(f"z{i}", one)

    def places():
        return {True: pyro.plate("n", 3), False: poutine.scale(scale=1.0)}

    def model():
        values, place = {}, places()
        for i in range(count):
            with place[in_plate[i]]:
                values[i] = draw(i, link(i, parents[i], values, in_plate[i]))
        for k, js in enumerate(seen):
            with place[k == 0]:
                y = torch.tensor([0.5, -0.5, 1.0]) if k == 0 else torch.tensor(0.7)
                pyro.sample(f"y{k}", dist.Normal(link(count + k, js, values, k == 0), 1.0), obs=y)

    def guide():
        values, place = {}, places()
        for i in order:
            start = torch.full((3,), 0.3) if in_plate[i] else torch.tensor(0.3)
            own = pyro.param(f"p{i}", start)
            with place[in_plate[i]]:
                values[i] = draw(i, own + 0.5 * link(i, guide_parents[i], values, in_plate[i]))

    return model, guide


@pytest.mark.parametrize("make", MODELS, ids=lambda m: m.__name__)
def test_the_mean_stays_and_the_variance_does_not_grow(make):
    small = (60, 8) if make is filled_in_place else (120, 50)  # vmap cannot follow: a loop
    compare(*make(), *small)


@pytest.mark.parametrize("seed", range(8))
def test_the_mean_stays_and_the_variance_does_not_grow_on_random_programs(seed):
    compare(*random_program(seed))


def compare(model, guide, repeats=120, particles=50):
    """Both estimators on the same draws: their difference has mean zero."""
    found = {}
    for rao_blackwell in (True, False):
        pyro.set_rng_seed(2)
        estimator = vi.Score(particles, vi.LeaveOneOut(), rao_blackwell=rao_blackwell)
        found[rao_blackwell] = gradients(estimator, model, guide, {}, repeats)
    zero = torch.zeros(found[True].shape[1])
    z, p = mean_test(found[True] - found[False], zero)
    assert z < Z and p > FALSE_ALARM, (z, p)
    (less, se_less), (more, se_more) = (total_variance(found[k]) for k in (True, False))
    assert less < more + Z * math.hypot(se_less, se_more)


def test_leaving_out_too_much_would_be_seen():
    """The comparison above fails when a term that is needed is left out."""

    class TooEager(vi.Score):
        def prepare(self, *args):
            super().prepare(*args)
            for pair in self.dependencies.involved:
                if pair[1] == ("model", "y"):
                    self.dependencies.involved[pair] = frozenset({"n"})

    model, guide = sum_comes_back()
    pyro.set_rng_seed(2)
    eager = gradients(TooEager(50, vi.LeaveOneOut()), model, guide, {}, 200)
    pyro.set_rng_seed(2)
    naive = gradients(vi.Score(50, vi.LeaveOneOut(), False), model, guide, {}, 200)
    z, _ = mean_test(eager - naive, torch.zeros(4))
    assert z > Z


@pytest.mark.parametrize(
    "make",
    [chain, sum_comes_back, factors, masked_in_the_guide_only],
    ids=lambda m: m.__name__,
)
def test_the_mean_is_that_of_enumeration(make):
    """Every configuration of the Bernoulli latents, weighted by q."""
    model, guide = make()
    guide_trace = poutine.trace(guide).get_trace()
    latents = {n: s["value"] for n, s in guide_trace.nodes.items() if is_drawn(s)}
    elbo = torch.tensor(0.0)
    for bits in itertools.product([0.0, 1.0], repeat=sum(v.numel() for v in latents.values())):
        bits, values = torch.tensor(bits), {}
        for name, value in latents.items():
            values[name] = bits[: value.numel()].reshape(value.shape)
            bits = bits[value.numel() :]
        traces = trace_model_and_guide(model, guide, (), {}, Given(values))
        weight = sum(traces[1].nodes[n]["fn"].log_prob(values[n]).sum() for n in latents).exp()
        elbo = elbo + weight * (traces[0].log_prob_sum() - traces[1].log_prob_sum())
    leaves = dict(sorted(pyro.get_param_store().named_parameters()))
    truth = dict(zip(leaves, torch.autograd.grad(-elbo, list(leaves.values())), strict=True))
    truth = flat(truth)
    found = gradients(vi.Score(100, vi.LeaveOneOut()), model, guide, {}, 150)
    z, p = mean_test(found, truth)
    assert z < Z and p > FALSE_ALARM, (z, p)


def test_dependencies_are_read_off_the_model():
    found = dependencies.trace(*nested_plates(), (), {})
    both = frozenset({"groups", "items"})
    assert found.involved["item", ("model", "y")] == both
    assert found.involved["item", ("model", "item")] == both
    assert ("item", ("model", "group")) not in found.involved
    assert found.involved["group", ("model", "y")] == {"groups"}  # by way of the guide's item
    assert found.involved["top", ("model", "y")] == frozenset()
    assert ("top", ("guide", "item")) not in found.involved
    assert (
        dependencies.trace(*sum_comes_back(), (), {}).involved["z", ("model", "y")] == frozenset()
    )
    assert dependencies.trace(*neighbours(), (), {}).involved["z", ("model", "y")] == frozenset()
    assert dependencies.trace(*neighbours(), (), {}).involved["z", ("model", "z")] == {"n"}
    locals_terms = dependencies.trace(*through_a_global(), (), {}).involved
    assert locals_terms["z", ("model", "y")] == frozenset()
    assert locals_terms["z", ("guide", "z")] == {"n"}
    pyro.clear_param_store()  # the models' parameters share names
    assert "in place" in dependencies.trace(*filled_in_place(), (), {}).unreadable


def test_a_branch_on_a_latent_value_makes_the_model_unreadable():
    def model():
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Normal(1.0 if z > 0 else -1.0, 1.0), obs=torch.tensor(0.3))

    def guide():
        pyro.sample("z", bernoulli("a"))

    assert "steers" in dependencies.trace(model, guide, (), {}).unreadable
    compare(model, guide, repeats=60, particles=8)  # with a loop: vmap cannot follow either
