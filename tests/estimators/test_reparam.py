"""Reparameterised gradients: exact means, an analytic KL, and clear refusals."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch.distributions import constraints

import vi_toolkit as vi
from tests.estimators.checks import assert_unbiased
from tests.estimators.models import flat, gradient, gradients


@pytest.mark.parametrize("kind", ["Gamma", "Beta", "Dirichlet"])
@pytest.mark.parametrize("particles", [1, 20])
def test_implicit_and_score_gradients_agree_with_the_exact_kl(kind, particles):
    """minus ELBO = KL(q || prior), whose gradient torch has in closed form."""
    ones = torch.ones((), dtype=torch.float64)
    prior, start = {
        "Gamma": (dist.Gamma(2 * ones, 3 * ones), [1.5 * ones, 2 * ones]),
        "Beta": (dist.Beta(2 * ones, 3 * ones), [1.5 * ones, 2 * ones]),
        "Dirichlet": (
            dist.Dirichlet(torch.tensor([2.0, 1, 3]).double()),
            [torch.tensor([1.5, 2, 1]).double()],
        ),
    }[kind]

    def q():
        return getattr(dist, kind)(
            *(
                pyro.param(f"p{k}", value.clone(), constraint=constraints.positive)
                for k, value in enumerate(start)
            )
        )

    def model():
        pyro.sample("z", prior)

    def guide():
        pyro.sample("z", q())

    q()
    leaves = dict(sorted(pyro.get_param_store().named_parameters()))
    kl = torch.distributions.kl_divergence(q(), prior)
    truth = flat(dict(zip(leaves, torch.autograd.grad(kl, list(leaves.values())), strict=True)))
    draws = {1: 600, 20: 80}[particles]
    for estimator in (
        vi.Reparam(particles),
        vi.PathDerivative(particles),
        vi.Score(particles, vi.ControlVariate()),
    ):
        assert_unbiased(gradients(estimator, model, guide, {}, draws), truth, repr(estimator))
    exact = gradient(vi.Reparam(1, analytic_kl=True), model, guide, {})[1]
    torch.testing.assert_close(flat(exact), truth)


def kl_of(model, guide, *args):
    estimator = vi.Reparam(analytic_kl=True)
    if not hasattr(guide, "prototype_trace"):
        estimator.prepare(model, guide, args, {})
    return estimator.kl


def test_analytic_kl_is_refused_with_a_reason():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("c", dist.LogNormal(0.0, 1.0))

    def guide():
        b = pyro.sample("b", dist.Normal(pyro.param("m", torch.tensor(0.3)), 1.0))
        pyro.sample("a", dist.Normal(0.5 * b, 1.0))  # given b: b's prior depends on what follows
        pyro.sample("c", dist.Gamma(2.0, 1.0))

    with pytest.warns(UserWarning, match="No analytic KL"):
        found = kl_of(model, guide)
    assert found["a"] == "analytic"
    assert "depends on a" in found["b"]
    assert "no closed form for Gamma and LogNormal" in found["c"]


def test_reparam_names_a_site_it_cannot_reparameterise_before_the_first_step():
    class Untouched(vi.Reparam):
        def _get_trace(self, *args, **kwargs):
            raise AssertionError("a step was taken")

    def guide(y):
        pyro.sample("k", dist.Bernoulli(pyro.param("p", torch.tensor(0.5))))

    def model(y):
        pyro.sample("y", dist.Normal(pyro.sample("k", dist.Bernoulli(0.3)), 1.0), obs=y)

    options = {"method": "stochastic", "steps": 3, "progress": False}
    with pytest.raises(vi.PreflightError, match="Bernoulli at site 'k'") as caught:
        vi.fit(model, guide, {"y": torch.tensor(1.0)}, estimator=Untouched(), **options)
    assert caught.value.site == "k" and "Trace_ELBO" in caught.value.remedy
    vi.fit(model, guide, {"y": torch.tensor(1.0)}, estimator=Trace_ELBO(), **options)
