"""The deep exponential family in plain torch, and the faster evaluation that fits use."""

import functools
import math
import runpy
from pathlib import Path

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import scipy.sparse
import torch
from torch.nn.functional import softplus

from recipes.deep_exponential_family import differences
from recipes.deep_exponential_family.data import pairs
from recipes.deep_exponential_family.differences import Below, with_differences
from recipes.deep_exponential_family.model import FAMILIES, model
from recipes.deep_exponential_family.variants import variant
from recipes.deep_exponential_family.words import Words, dense
from tests.tolerances import Z

COUNTING = [family for family in FAMILIES if family[0] in ("bernoulli", "poisson")]


class Pair:
    """The model of one family in plain torch and as it is fitted, at one draw of everything."""

    def __init__(self, latent, weights, link):
        structure = {"widths": (5, 4, 3), "latent": latent, "weights": weights, "link": link}
        self.plain, self.fast = functools.partial(model, **structure), variant(**structure)
        torch.manual_seed(0)
        given = {"exposure": 0.5 + torch.rand(7), "background": 0.1 + 3 * torch.rand(12)}
        self.given = {name: value.double() for name, value in given.items()}
        nodes = poutine.trace(self.fast).get_trace(**self.given).nodes
        self.documents = nodes["x"]["value"]
        self.counts = dense(self.documents, 12, torch.float64)
        self.values = {name: nodes[name]["value"].detach() for name in self.fast.LATENTS}

    def log_probs(self, fast, values):
        """Site -> log density at `values` and the documents."""
        model, documents = (self.fast, self.documents) if fast else (self.plain, self.counts)
        conditioned = poutine.condition(model, data=values)
        trace = poutine.trace(conditioned).get_trace(documents, **self.given)
        trace.compute_log_prob()
        return {name: trace.nodes[name]["log_prob"] for name in [*values, "x"]}


@pytest.mark.parametrize(("latent", "weights", "link"), FAMILIES)
def test_values_and_gradients_are_those_of_the_plain_model(latent, weights, link):
    pair = Pair(latent, weights, link)
    counting = (latent, weights, link) in COUNTING  # their units have differences instead
    store, found = pyro.get_param_store(), {}
    for fast in (False, True):
        values = {
            name: value.clone().requires_grad_(not (counting and name[0] == "z"))
            for name, value in pair.values.items()
        }
        with store.scope():
            log_probs = pair.log_probs(fast, values)
            sum(log_prob.sum() for log_prob in log_probs.values()).backward()
            parameters = {name: p.unconstrained().grad for name, p in store.items()}
        gradients = {name: value.grad for name, value in values.items() if value.requires_grad}
        found[fast] = log_probs | {f"d {name}": g for name, g in (gradients | parameters).items()}
    assert len(found[True]) == len(found[False]) >= 14
    for name, value in found[False].items():
        torch.testing.assert_close(
            found[True][name], value, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize(("latent", "weights", "link"), COUNTING)
def test_units_that_count_have_the_plain_models_differences(latent, weights, link):
    pair = Pair(latent, weights, link)
    for layer, below in (("z3", "z2"), ("z2", "z1"), ("z1", "x")):
        z = pair.values[layer]
        leaf = z.clone().requires_grad_()
        density = pair.log_probs(True, pair.values | {layer: leaf})[below]
        (gradient,) = torch.autograd.grad(density.sum(), leaf)
        direction = 1 - 2 * z if latent == "bernoulli" else torch.ones_like(z)
        for unit in range(z.shape[1]):
            moved = z.clone()
            moved[:, unit] += direction[:, unit]
            change = pair.log_probs(False, pair.values | {layer: moved})[below] - density
            torch.testing.assert_close(gradient[:, unit], direction[:, unit] * change.detach())


def test_model_runs_when_copied_out_alone(tmp_path):
    copy = tmp_path / "model.py"
    copy.write_text(Path(model.__code__.co_filename).read_text("utf-8"), "utf-8")
    alone = runpy.run_path(str(copy))["model"]
    given = {"exposure": torch.ones(7), "background": torch.ones(12)}
    for latent, weights, link in FAMILIES:
        family = functools.partial(alone, latent=latent, weights=weights, link=link)
        with pyro.get_param_store().scope():
            counts = family(**given)
            assert counts.shape == (7, 12)
            assert poutine.trace(family).get_trace(counts, **given).log_prob_sum().isfinite()


def test_words_are_independent_poisson_counts():
    torch.manual_seed(0)
    z, w = torch.rand(7, 3).double(), torch.rand(3, 11).double()
    own, exposure = torch.rand(11).double(), torch.rand(7).double()
    words = Words(z, w, own, exposure, None)
    rates = exposure[:, None] * (z @ w + own)
    counts = torch.poisson(rates)
    value = pairs(scipy.sparse.csr_matrix(counts.long().numpy()))
    expected = dist.Poisson(rates).log_prob(counts).sum(1)
    torch.testing.assert_close(words.log_prob(value), expected)
    # Draws keep every word, and have the rates as their means.
    total = sum(dense(words.sample(), 11, torch.float64) for _ in range(2_000))
    assert ((total / 2_000 - rates).abs() < Z * (rates / 2_000).sqrt()).all()


@pytest.mark.parametrize("kind", ["bernoulli", "poisson"])
def test_differences_are_unbiased(kind):
    # The ELBO of one document and its gradient in the units' means by summing over all states (of
    # Poisson units, those below 12), against draws: one row of the plate each.
    torch.manual_seed(0)
    w1, w0 = torch.randn(2, 3).double(), torch.rand(3, 6).double()
    own, x = torch.full((6,), 0.1).double(), torch.tensor([[[0, 2], [3, 1], [4, 1]]])
    binary, bias = kind == "bernoulli", torch.tensor([-0.5, 0.2, 0.0]).double()
    draws = differences.Bernoulli if binary else differences.Poisson

    def conditional(s):
        return dist.Bernoulli(logits=s + bias) if binary else dist.Poisson(softplus(s + bias))

    def elbo(z2, z1, mean2, mean1):
        top = type(conditional(bias))(torch.full((2,), 0.3).double())
        words = Words(z1, w0, own, torch.ones(len(z1)).double(), 3, kind)
        p = top.log_prob(z2).sum(-1) + Below(z2, w1, conditional, binary).log_prob(z1)
        q = draws(mean2).log_prob(z2).sum(-1) + draws(mean1).log_prob(z1).sum(-1)
        return p + words.log_prob(x.expand(len(z1), -1, -1)) - q, q

    means = torch.tensor([0.6, 0.3]).double(), torch.tensor([0.2, 0.7, 0.4]).double()
    inputs = [m.clone().requires_grad_() for m in means]
    # At these rates the states that are left out have a chance below 1e-9.
    every = torch.cartesian_prod(*[torch.arange(2.0 if binary else 12.0).double()] * 5)
    value, q = elbo(every[:, :2], every[:, 2:], *inputs)
    exact = torch.autograd.grad((q.exp() * value).sum(), inputs)
    rows = 20_000
    inputs = [m.expand(rows, -1).clone().requires_grad_() for m in means]
    z2, z1 = (draws(m).rsample() for m in inputs)
    found = torch.autograd.grad(elbo(z2, z1, *inputs)[0].sum(), inputs)
    # Beside it the score function, on the same draws, with a constant baseline.
    value, q = elbo(z2.detach(), z1.detach(), *inputs)
    score = torch.autograd.grad(((value - value.mean()).detach() * q).sum(), inputs)
    for truth, gradient, other in zip(exact, found, score, strict=True):
        error = gradient.std(0) / math.sqrt(rows)
        assert ((gradient.mean(0) - truth).abs() < Z * error).all()
        assert (gradient.std(0) < other.std(0)).all()
        assert (error < 0.05 * truth.abs().max()).all()  # or it would say little


def test_draws_that_are_not_asked_for_gradients_cost_none():
    value = torch.ones(3)
    assert with_differences(value, torch.ones(3, 2), None) is value
