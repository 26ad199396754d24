"""Closed-form KL of a LogNormal against quadrature, and where the ELBO uses it."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.integrate
import torch
from pyro.infer.autoguide import AutoNormal

import vi_toolkit as vi
from tests.estimators.checks import assert_unbiased
from tests.estimators.models import flat, gradient, gradients
from tests.tolerances import Z
from vi_toolkit.estimators.divergence import kl_divergence

ROOT = Path(__file__).parents[2]

ONE = torch.ones((), dtype=torch.float64)
PRIORS = {
    "Gamma": dist.Gamma(2.5 * ONE, 3 * ONE),
    "Chi2": dist.Chi2(3 * ONE),
    "Exponential": dist.Exponential(1.5 * ONE),
    "InverseGamma": dist.InverseGamma(3 * ONE, 0.7 * ONE),
    "HalfNormal": dist.HalfNormal(1.3 * ONE),
    "LogNormal": dist.LogNormal(0.2 * ONE, 0.9 * ONE),
}


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize(("loc", "scale"), [(0.3, 0.5), (-1.0, 1.2)])
def test_the_kl_of_a_lognormal_agrees_with_quadrature(name, loc, scale):
    prior, q = PRIORS[name], dist.LogNormal(loc * ONE, scale * ONE)

    def integrand(log_x):
        x = torch.tensor(math.exp(log_x), dtype=torch.float64)
        density = math.exp(-(((log_x - loc) / scale) ** 2) / 2) / (scale * math.sqrt(2 * math.pi))
        return density * float(q.log_prob(x) - prior.log_prob(x))

    expected, _ = scipy.integrate.quad(integrand, loc - 10 * scale, loc + 10 * scale, epsabs=1e-11)
    assert float(kl_divergence(q, prior)) == pytest.approx(expected, abs=1e-8)
    together = kl_divergence(q.expand([3]).to_event(1), prior.expand([3]).to_event(1))
    assert float(together) == pytest.approx(3 * expected, abs=1e-7)


def test_divergence_of_a_lognormal_from_a_gamma():
    q = dist.LogNormal(torch.tensor([-1.0, 0.5]).double(), torch.tensor([0.7, 1.1]).double())
    p = dist.Gamma(torch.tensor([0.1, 3.0]).double(), torch.tensor([0.3, 2.0]).double())
    torch.manual_seed(0)
    z = q.sample((200_000,))
    sampled = q.log_prob(z) - p.log_prob(z)
    error = sampled.std(0) / math.sqrt(len(z))
    assert ((kl_divergence(q, p) - sampled.mean(0)).abs() < Z * error).all()


def test_wrapped_pairs():
    torch.manual_seed(0)
    q = dist.LogNormal(torch.randn(4, 3).double(), torch.rand(4, 3).double() + 0.1)
    p = dist.Gamma(torch.rand(4, 3).double() + 0.5, torch.rand(4, 3).double() + 0.5)
    each = kl_divergence(q, p)
    assert each.shape == (4, 3)
    torch.testing.assert_close(kl_divergence(q.to_event(1), p.to_event(1)), each.sum(1))
    twice = kl_divergence(q.to_event(1).to_event(1), p.to_event(2))
    torch.testing.assert_close(twice, each.sum())
    first, second = torch.rand(2, 4, 3) > 0.4
    masked = kl_divergence(q.mask(first), p.mask(second))
    torch.testing.assert_close(masked, each * first * second)
    whole = kl_divergence(q.mask(True).to_event(1), p.mask(second).to_event(1))
    torch.testing.assert_close(whole, (each * second).sum(1))
    assert kl_divergence(q.mask(False), p.mask(second)) == 0
    half = [dist.transforms.AffineTransform(0.0, 0.5)]
    scaled = (dist.TransformedDistribution(fn, half) for fn in (q, p))
    torch.testing.assert_close(kl_divergence(*scaled), each)
    for a, b in ((q, p.mask(second)), (q.to_event(1), p), (q, dist.HalfCauchy(p.rate))):
        with pytest.raises(NotImplementedError):
            kl_divergence(a, b)


def test_imports_leave_torchs_table_of_divergences_alone():
    code = """
import importlib, pkgutil
import pyro.infer.autoguide
from torch.distributions.kl import _KL_REGISTRY

before = dict(_KL_REGISTRY)
for package in ("vi_toolkit", "recipes"):
    root = importlib.import_module(package)
    for module in pkgutil.walk_packages(root.__path__, package + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
assert _KL_REGISTRY == before, set(_KL_REGISTRY) ^ set(before)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def positive():
    """One latent of each kind, a plate of vectors, and a prior that another latent sets."""
    rate = pyro.sample("rate", PRIORS["Gamma"])
    total = rate + pyro.sample("spread", PRIORS["HalfNormal"])
    total = total + pyro.sample("inverse", PRIORS["InverseGamma"])
    with pyro.plate("rows", 2):
        x = pyro.sample("x", dist.Exponential(rate).expand([3]).to_event(1))
        total = total + x.sum(-1) + pyro.sample("log", PRIORS["LogNormal"])
        pyro.sample("y", dist.Normal(total, ONE), obs=torch.tensor([5.0, 6.0]).double())


def test_positive_latents_of_an_autonormal_use_the_closed_form():
    guide = AutoNormal(positive, init_scale=0.3)
    guide()
    for scale in guide.scales.parameters():
        scale.data += torch.linspace(-0.3, 0.3, scale.numel()).reshape(scale.shape)
    sampled, closed = vi.Reparam(20), vi.Reparam(20, analytic_kl=True)
    closed.loss(positive, guide)
    assert set(closed.kl.values()) == {"analytic"} and len(closed.kl) == 5

    losses = np.array([[e.loss(positive, guide) for e in (sampled, closed)] for _ in range(300)])
    difference = losses[:, 0] - losses[:, 1]
    assert abs(difference.mean()) < Z * difference.std() / math.sqrt(len(losses))
    assert losses[:, 1].std() < losses[:, 0].std()

    def of(estimator, draws):
        found = []
        for _ in range(draws):
            guide.zero_grad()
            estimator.loss_and_grads(positive, guide)
            found.append(flat({n: p.grad.clone() for n, p in guide.named_parameters()}))
        return torch.stack(found)

    exact = of(vi.Reparam(20_000, analytic_kl=True), 1)[0]
    # Its Monte Carlo error is a fifth of that of the mean of 50 rows of 20 particles, or less.
    assert_unbiased(of(sampled, 50), exact)


def test_the_loss_has_no_noise_without_a_likelihood():
    def model():
        pyro.sample("x", PRIORS["Gamma"])

    def guide():
        loc = pyro.param("loc", torch.tensor(0.3, dtype=torch.float64))
        pyro.sample("x", dist.LogNormal(loc, 0.5 * ONE))

    estimator = vi.Reparam(analytic_kl=True)
    loss, found = gradient(estimator, model, guide, {})
    kl = float(kl_divergence(dist.LogNormal(0.3 * ONE, 0.5 * ONE), PRIORS["Gamma"]))
    assert loss == pytest.approx(kl, rel=1e-12)
    assert estimator.kl == {"x": "analytic"}
    assert_unbiased(gradients(vi.Reparam(50), model, guide, {}, 100), flat(found))


def test_other_supports_are_refused_with_a_reason():
    def model():
        scale = pyro.sample("scale", dist.HalfCauchy(ONE))
        pyro.sample("share", dist.Beta(2 * ONE, 3 * ONE))
        pyro.sample("above", dist.Pareto(scale.detach(), 3 * ONE))
        pyro.sample("real", dist.Normal(0 * ONE, scale))

    guide = AutoNormal(model)
    guide()
    estimator = vi.Reparam(analytic_kl=True)
    with pytest.warns(UserWarning, match="No analytic KL"):
        estimator.loss(model, guide)
    why = {name.removesuffix("_unconstrained"): text for name, text in estimator.kl.items()}
    assert why["real"] == "analytic"
    assert "another scale" in why["share"] and "another scale" in why["above"]
    assert "no closed form for LogNormal and HalfCauchy" in why["scale"]
