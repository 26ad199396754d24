"""Preflight must pass every correct model and guide, and name site and remedy for each mistake.

``python -m tests.test_preflight`` prints every message, one a line.
"""

import re
import sys
import types
from typing import Any, NamedTuple

import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib import gp
from pyro.contrib.easyguide import easy_guide
from pyro.distributions import constraints
from pyro.distributions.transforms import OrderedTransform, Permute
from pyro.infer import config_enumerate
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoDiscreteParallel,
    AutoGaussian,
    AutoGuideList,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
    AutoStructured,
    init_to_feasible,
)
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch.distributions import biject_to, transforms

from vi_toolkit.errors import PreflightError
from vi_toolkit.preflight import preflight
from vi_toolkit.programs.private_guide import private_guide

N = 12
generator = torch.Generator().manual_seed(0)
Y = torch.randn(N, generator=generator)
X = torch.randn(N, 3, generator=generator)
GROUP = torch.arange(N) % 4
BINARY = (Y > 0).float()
COUNTS = torch.arange(N)
POINTS = torch.randn(N, 2, generator=generator)


def q(**sites):
    """A guide with the given distributions and no plates."""

    def guide(*args, **kwargs):
        for name, fn in sites.items():
            pyro.sample(name, fn)

    return guide


def normal(*shape):
    return dist.Normal(torch.zeros(shape), 1.0)


# --- correct models -------------------------------------------------------------------------------


def conjugate(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("observations", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def conjugate_guide(y):
    loc = pyro.param("loc", torch.tensor(0.0))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    pyro.sample("mu", dist.Normal(loc, scale))


def regression(X, y=None):
    sigma = pyro.sample("sigma", dist.HalfCauchy(1.0))
    coefficients = pyro.sample("coefficients", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("observations", len(X)):
        return pyro.sample("y", dist.Normal(X @ coefficients, sigma), obs=y)


def regression_guide(X, y=None):
    loc = pyro.param("loc", torch.zeros(4))
    tril = pyro.param("tril", torch.eye(4), constraint=constraints.lower_cholesky)
    both = pyro.sample(
        "both", dist.MultivariateNormal(loc, scale_tril=tril), infer={"is_auxiliary": True}
    )
    pyro.sample("coefficients", dist.Delta(both[:3], event_dim=1))
    sigma = both[3].exp()
    pyro.sample("sigma", dist.Delta(sigma, log_density=-both[3]))


def hierarchical(group, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(2.0))
    with pyro.plate("groups", 4):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
    pyro.deterministic("largest", theta.max())
    with pyro.plate("observations", len(y)):
        pyro.sample("y", dist.Normal(theta[group], 1.0), obs=y)


hierarchical.LATENTS = {"mu": (), "tau": (), "theta": ("groups",)}


def hierarchical_guide(group, y):
    pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    loc = pyro.param("theta_loc", torch.zeros(4))
    with pyro.plate("groups", 4):
        pyro.sample("theta", dist.Normal(loc, 0.5))


def marginal_mixture(y):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    locs = pyro.sample("locs", dist.Normal(0.0, 5.0).expand([2]).to_event(1))
    with pyro.plate("observations", len(y)):
        mixture = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(locs, 1.0))
        pyro.sample("y", mixture, obs=y)


def markov_chain(y):
    drift = pyro.sample("drift", dist.Normal(0.0, 0.1))
    state = 0.0
    for t in pyro.markov(range(len(y))):
        state = pyro.sample(f"state_{t}", dist.Normal(state + drift, 0.5))
        pyro.sample(f"y_{t}", dist.Normal(state, 1.0), obs=y[t])


def markov_chain_guide(y):
    pyro.sample("drift", dist.Normal(0.0, 0.1))
    for t in range(len(y)):
        pyro.sample(f"state_{t}", dist.Normal(0.0, 1.0))


def hidden_markov(y):
    rows = pyro.sample("rows", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
    locs = pyro.sample("locs", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    hmm = dist.DiscreteHMM(torch.zeros(2), rows.log(), dist.Normal(locs, 1.0), duration=len(y))
    pyro.sample("y", hmm, obs=y)


def simplex(counts):
    probs = pyro.sample("probs", dist.Dirichlet(torch.ones(5)))
    pyro.sample("counts", dist.Multinomial(int(counts.sum()), probs), obs=counts)


def simplex_guide(counts):
    alpha = pyro.param("alpha", torch.ones(5), constraint=constraints.positive)
    pyro.sample("probs", dist.Dirichlet(alpha))


def correlated(points):
    scale = pyro.sample("scale", dist.HalfNormal(1.0).expand([2]).to_event(1))
    tril = pyro.sample("tril", dist.LKJCholesky(2, 1.0))
    with pyro.plate("observations", len(points)):
        pyro.sample(
            "points",
            dist.MultivariateNormal(torch.zeros(2), scale_tril=scale[:, None] * tril),
            obs=points,
        )


def cutpoints(rating):
    base = dist.Normal(0.0, 1.0).expand([3]).to_event(1)
    cuts = pyro.sample("cuts", dist.TransformedDistribution(base, [OrderedTransform()]))
    ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
    with pyro.plate("observations", len(rating)):
        pyro.sample("rating", dist.OrderedLogistic(ability, cuts), obs=rating)


def cutpoints_guide(rating):
    loc = pyro.param("loc", torch.tensor([-1.0, 0.0, 1.0]))
    base = dist.Normal(loc, 0.1).to_event(1)
    pyro.sample("cuts", dist.TransformedDistribution(base, [OrderedTransform()]))
    pyro.sample("ability", dist.Normal(0.0, 1.0))


@config_enumerate
def enumerated_mixture(y):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("components", 2):
        locs = pyro.sample("locs", dist.Normal(0.0, 5.0))
    with pyro.plate("observations", len(y)):
        component = pyro.sample("component", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(locs[component], 1.0), obs=y)


def topics(words):
    """Latent Dirichlet allocation: nested plates, a minibatch that the guide chooses."""
    with pyro.plate("topics", 3):
        topic_words = pyro.sample("topic_words", dist.Dirichlet(torch.ones(4)))
    with pyro.plate("documents", words.shape[1]) as i:
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("words_in_documents", words.shape[0]):
            topic = pyro.sample("topic", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("words", dist.Categorical(topic_words[topic]), obs=words[:, i])


def topics_guide(words):
    with pyro.plate("topics", 3):
        pyro.sample("topic_words", dist.Dirichlet(torch.ones(3, 4)))
    with pyro.plate("documents", words.shape[1], subsample_size=2):
        pyro.sample("weights", dist.Dirichlet(torch.ones(2, 3)))


def gaussian_process(points, y):
    length = pyro.sample("length", dist.LogNormal(0.0, 1.0))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    kernel = (-0.5 * torch.cdist(points / length, points / length) ** 2).exp()
    covariance = kernel + (noise**2 + 1e-3) * torch.eye(len(y))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(y)), covariance), obs=y)


class Autoencoder(torch.nn.Module):
    """Amortised guide and subsampled plate, with pyro.module."""

    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Linear(2, 2)
        self.decoder = torch.nn.Linear(1, 2)

    def model(self, points):
        pyro.module("decoder", self.decoder)
        with pyro.plate("observations", len(points), subsample_size=5) as i:
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([1]).to_event(1))
            pyro.sample("points", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=points[i])

    def guide(self, points):
        pyro.module("encoder", self.encoder)
        with pyro.plate("observations", len(points), subsample_size=5) as i:
            loc, log_scale = self.encoder(points[i]).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


autoencoder = Autoencoder()


def horseshoe(X, y):
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    with pyro.plate("predictors", X.shape[1]):
        local = pyro.sample("local", dist.HalfCauchy(1.0))
        beta = pyro.sample("beta", dist.Normal(0.0, tau * local))
    with pyro.plate("observations", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=X @ beta), obs=y)


def missing(y, seen):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("observations", len(y)), poutine.mask(mask=seen):
        pyro.sample("y", dist.LogNormal(mu, 1.0), obs=y)


def masked(y, seen):
    """The mask as a part of the distribution."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("observations", len(y)):
        pyro.sample("y", dist.LogNormal(mu, 1.0).mask(seen), obs=y)


def imputed(y, seen):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("observations", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=seen)


def improper(y):
    mu = pyro.sample("mu", dist.ImproperUniform(constraints.ordered_vector, (), (2,)))
    shift = pyro.sample("shift", dist.ImproperUniform(constraints.real, (), ()))
    pyro.factor("mu_prior", dist.Normal(0.0, 2.0).log_prob(mu).sum(-1))
    with pyro.plate("observations", len(y)):
        pyro.sample("y", dist.Normal(shift + mu.mean(), 1.0), obs=y)


def type_two(y):
    """A model with a parameter of its own."""
    scale = pyro.param("prior_scale", torch.tensor(1.0), constraint=constraints.positive)
    mu = pyro.sample("mu", dist.Normal(0.0, scale))
    with pyro.plate("observations", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


class BayesianLinear(PyroModule):
    def __init__(self):
        super().__init__()
        self.weight = PyroSample(dist.Normal(0.0, 1.0).expand([3]).to_event(1))

    def forward(self, X, y=None):
        mean = X @ self.weight
        with pyro.plate("observations", len(X)):
            return pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


class LinearGuide(PyroModule):
    def __init__(self):
        super().__init__()
        self.loc = PyroParam(torch.zeros(3))

    @PyroSample
    def weight(self):
        return dist.Normal(self.loc, 0.1).to_event(1)

    def forward(self, X, y=None):
        return self.weight


class NamedGuide(PyroModule):
    def forward(self, X, y=None):
        return pyro.sample("weight", dist.Normal(torch.zeros(3), 0.1).to_event(1))


def sequential(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    for i in pyro.plate("observations", len(y)):
        z = pyro.sample(f"z_{i}", dist.Normal(mu, 1.0))
        pyro.sample(f"y_{i}", dist.Normal(z, 1.0), obs=y[i])


def sequential_guide(y):
    pyro.sample("mu", dist.Normal(0.0, 1.0))
    for i in pyro.plate("observations", len(y)):
        pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))


def crossed(y):
    """Two plates, one of them at dim=-2, and LATENTS for both."""
    rows, columns = pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 4, dim=-1)
    with rows:
        a = pyro.sample("a", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with columns:
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with rows, columns:
        c = pyro.sample("c", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(a.sum(-1) + b + c, 1.0), obs=y)


crossed.LATENTS = {"a": ("rows", 2), "b": ("columns",), "c": ("rows", "columns")}


def undeclared(y):
    """Batch dimensions without plates, as many models for NUTS are written."""
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), torch.ones(3)))
    pyro.sample("y", dist.Normal(beta.sum(), 1.0), obs=y)


def bounded(y):
    low = pyro.sample("low", dist.Uniform(-1.0, 0.0))
    high = pyro.sample("high", dist.Uniform(low, low + 2.0))
    offset = pyro.sample("offset", dist.Uniform(2.0, 5.0))
    with pyro.plate("observations", len(y)):
        pyro.sample("y", dist.Normal(high + offset, 1.0), obs=y)


def bounded_guide(y):
    """Bounds that follow another latent, and one made from an affine transform."""
    low = pyro.sample("low", dist.Uniform(-0.9, -0.1))
    pyro.sample("high", dist.Uniform(low, low + 1.0))
    support = biject_to(constraints.interval(2.0, 5.0))
    pyro.sample("offset", dist.TransformedDistribution(dist.Normal(0.0, 1.0), support))


def excess(y):
    mu = pyro.sample("mu", dist.Pareto(2.0, 3.0))
    with pyro.plate("observations", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def excess_guide(y):
    pyro.sample(
        "mu",
        dist.TransformedDistribution(
            dist.Normal(0.0, 1.0), biject_to(constraints.greater_than(2.0))
        ),
    )


def truncated(y):
    """At most starting points the data have density zero, which is no reason to refuse."""
    top = pyro.sample("top", dist.Pareto(1.0, 0.1))
    with pyro.plate("observations", len(y)):
        pyro.sample("y", dist.Uniform(0.0, top), obs=y.abs())


def truncated_guide(y):
    pyro.sample("top", dist.Pareto(2.0, 1.0))


def discrete_guided(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    flip = pyro.sample("flip", dist.Bernoulli(0.3))
    with pyro.plate("observations", len(y)):
        pyro.sample("y", dist.Normal(mu * (1 - 2 * flip), 1.0), obs=y)


def discrete_guide(y):
    pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("flip", dist.Bernoulli(0.5))


def parts(group, y):
    return hierarchical(group, y)


def mu_guide(group, y):
    pyro.sample("mu", dist.Normal(0.0, 1.0))


def list_guide():
    guide = AutoGuideList(parts)
    guide.append(AutoDelta(poutine.block(parts, expose=["tau"])))
    guide.append(AutoNormal(poutine.block(parts, expose=["theta"])))
    guide.append(mu_guide)
    return guide


@easy_guide(hierarchical)
def easy(self, group, y):
    block = self.group(match="mu|tau")
    loc = pyro.param("easy_loc", torch.zeros(2))
    scale = pyro.param("easy_scale", torch.ones(2), constraint=constraints.positive)
    block.sample("block", dist.Normal(loc, scale).to_event(1))
    with self.plate("groups", 4):
        pyro.sample("theta", dist.Normal(0.0, 1.0))


def converts(y):
    """Takes an array and makes its own tensor."""
    conjugate(torch.as_tensor(y))


def prior(latent):
    """A model with one latent `z`."""

    def model(y):
        z = pyro.sample("z", latent)
        pyro.sample("y", dist.Normal(z.sum(), 1.0).expand([len(y)]).to_event(1), obs=y)

    return model


def shifted_exponential(rate=1.0):
    base = dist.Normal(0.0, rate)
    return dist.TransformedDistribution(
        base, [transforms.ExpTransform(), transforms.AffineTransform(2.0, 3.0)]
    )


def factor_guide(y):
    """A change of variables by hand, with its Jacobian as a factor."""
    u = pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
    pyro.factor("jacobian", torch.zeros(()), has_rsample=True)
    pyro.deterministic("twice", 2 * u)
    pyro.sample("mu", dist.Delta(u))


def long_simplex(counts):
    """A float32 sum of many entries is further from 1 than torch's check allows."""
    probs = pyro.sample("probs", dist.Dirichlet(torch.ones(20_000)))
    pyro.sample("counts", dist.Multinomial(int(counts.sum()), probs), obs=counts)


def long_simplex_guide(counts):
    pyro.sample("probs", dist.Delta(torch.softmax(torch.randn(20_000), -1), event_dim=1))


def parallel_guide():
    guide = AutoGuideList(discrete_guided)
    guide.append(AutoNormal(hide(discrete_guided, "flip")))
    guide.append(AutoDiscreteParallel(poutine.block(discrete_guided, expose=["flip"])))
    return guide


def after_a_run(model, data):
    guide = AutoNormal(model)
    guide(**data)
    return guide


def converts_order(y):
    conjugate(torch.as_tensor(y.astype(float)))


process = gp.models.GPRegression(X, Y, gp.kernels.RBF(input_dim=3))
process.kernel.lengthscale = PyroSample(dist.LogNormal(0.0, 1.0))
process.kernel.autoguide("lengthscale", dist.Normal)


def density(covariance):
    """A known target: its data are constants, not observations."""
    pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), covariance))


def funnel():
    log_scale = pyro.sample("log_scale", dist.Normal(0.0, 3.0))
    pyro.sample("x", dist.Normal(0.0, (log_scale / 2).exp()).expand([2]).to_event(1))


def hide(model, *names):
    return poutine.block(model, hide=list(names))


XY, GY, ORDER = {"X": X, "y": Y}, {"group": GROUP, "y": Y}, {"rating": COUNTS % 4}
SEEN = {"y": torch.where(BINARY > 0, Y.abs(), torch.tensor(0.0)), "seen": BINARY.bool()}

CORRECT: dict[str, tuple[Any, ...]] = {
    "conjugate": (conjugate, conjugate_guide, {"y": Y}),
    "conjugate, float64": (conjugate, AutoNormal, {"y": Y.double()}),
    "regression": (regression, regression_guide, XY),
    "regression, mean field": (regression, AutoDiagonalNormal, XY),
    "regression, float64": (
        regression,
        AutoMultivariateNormal,
        {k: v.double() for k, v in XY.items()},
    ),
    "regression, low rank": (regression, AutoLowRankMultivariateNormal, XY),
    "regression, Laplace": (regression, AutoLaplaceApproximation, XY),
    "regression, flow": (regression, AutoIAFNormal, XY),
    "hierarchical": (hierarchical, hierarchical_guide, GY),
    "hierarchical, full rank": (hierarchical, AutoMultivariateNormal, GY),
    "hierarchical, structured": (hierarchical, AutoStructured, GY),
    "hierarchical, AutoGaussian": (hierarchical, AutoGaussian, GY),
    "hierarchical, point": (hierarchical, AutoDelta(hierarchical, init_to_feasible), GY),
    "hierarchical, parts": (parts, list_guide(), GY),
    "hierarchical, easy guide": (hierarchical, easy, GY),
    "hierarchical, effect guide": (hierarchical, AutoNormalMessenger(hierarchical), GY),
    "hierarchical, reparameterised": (
        poutine.reparam(hierarchical, config={"theta": LocScaleReparam(0.0)}),
        AutoNormal(poutine.reparam(hierarchical, config={"theta": LocScaleReparam(0.0)})),
        GY,
    ),
    "hierarchical, conditioned": (
        poutine.condition(hierarchical, data={"tau": torch.tensor(1.0)}),
        AutoNormal(poutine.condition(hierarchical, data={"tau": torch.tensor(1.0)})),
        GY,
    ),
    "mixture, summed out": (marginal_mixture, AutoMultivariateNormal, {"y": Y}),
    "mixture, enumerated": (
        enumerated_mixture,
        AutoNormal(hide(enumerated_mixture, "component")),
        {"y": Y},
        {"enumerate": True},
    ),
    "topics": (topics, topics_guide, {"words": (COUNTS % 4).reshape(3, 4)}, {"enumerate": True}),
    "Markov chain": (markov_chain, markov_chain_guide, {"y": Y}),
    "Markov chain, autoguide": (markov_chain, AutoNormal, {"y": Y}),
    "hidden Markov": (hidden_markov, AutoNormal, {"y": Y}),
    "simplex": (simplex, simplex_guide, {"counts": COUNTS[:5]}),
    "simplex, autoguide": (simplex, AutoNormal, {"counts": COUNTS[:5].float()}),
    "correlation matrix": (correlated, AutoMultivariateNormal, {"points": POINTS}),
    "ordered": (cutpoints, cutpoints_guide, ORDER),
    "ordered, autoguide": (cutpoints, AutoNormal, ORDER),
    "Gaussian process": (gaussian_process, AutoNormal, {"points": POINTS, "y": Y}),
    "autoencoder": (autoencoder.model, autoencoder.guide, {"points": POINTS}),
    "autoencoder, autoguide": (
        autoencoder.model,
        AutoNormal(autoencoder.model),
        {"points": POINTS},
    ),
    "horseshoe": (horseshoe, AutoNormal, {"X": X, "y": BINARY}),
    "missing data": (missing, AutoNormal, SEEN),
    "masked data": (masked, AutoNormal, SEEN),
    "imputed data": (imputed, AutoNormal, SEEN),
    "improper prior": (improper, AutoMultivariateNormal, {"y": Y}),
    "improper prior, mean field": (improper, AutoNormal, {"y": Y}),
    "model parameter": (type_two, AutoNormal, {"y": Y}),
    "PyroModule": (BayesianLinear(), AutoNormal, XY),
    "PyroModule guide": (BayesianLinear(), NamedGuide(), XY),
    "sequential plate": (sequential, sequential_guide, {"y": Y}),
    "crossed plates": (crossed, AutoNormal, {"y": Y.reshape(3, 4)}),
    "no plates": (undeclared, AutoNormal, {"y": Y}),
    "dependent bounds": (bounded, bounded_guide, {"y": Y}),
    "affine bounds": (excess, excess_guide, {"y": Y}),
    "zero density at most starts": (truncated, truncated_guide, {"y": 20 * Y}),
    "discrete latent in the guide": (discrete_guided, discrete_guide, {"y": Y}),
    "array that the model converts": (converts, AutoNormal, {"y": Y.numpy()}),
    "Gumbel prior": (prior(dist.Gumbel(0.0, 1.0)), q(z=dist.Normal(0.0, 1.0)), {"y": Y}),
    "Weibull prior": (prior(dist.Weibull(1.0, 2.0)), q(z=dist.LogNormal(0.0, 1.0)), {"y": Y}),
    "Gumbel guide": (prior(dist.Normal(0.0, 1.0)), q(z=dist.Gumbel(0.0, 1.0)), {"y": Y}),
    "inverse gamma": (prior(dist.InverseGamma(2.0, 1.0)), q(z=dist.Weibull(1.0, 2.0)), {"y": Y}),
    "shifted prior": (prior(shifted_exponential()), q(z=shifted_exponential(2.0)), {"y": Y}),
    "permuted guide": (
        prior(dist.HalfNormal(torch.ones(3)).to_event(1)),
        q(
            z=dist.TransformedDistribution(
                dist.LogNormal(torch.zeros(3), 1.0).to_event(1), [Permute(torch.tensor([2, 0, 1]))]
            )
        ),
        {"y": Y},
    ),
    "mixture guide": (
        prior(dist.HalfNormal(1.0)),
        q(
            z=dist.MixtureSameFamily(
                dist.Categorical(torch.ones(2)), dist.LogNormal(torch.tensor([0.0, 1.0]), 1.0)
            )
        ),
        {"y": Y},
    ),
    "mixture prior": (
        prior(
            dist.MixtureSameFamily(
                dist.Categorical(torch.ones(2)),
                dist.Uniform(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0])),
            )
        ),
        q(z=dist.Uniform(0.1, 1.9)),
        {"y": Y},
    ),
    "factor in the guide": (conjugate, factor_guide, {"y": Y}),
    "long simplex": (long_simplex, long_simplex_guide, {"counts": torch.ones(20_000)}),
    "autoguide for discrete": (discrete_guided, parallel_guide(), {"y": Y}),
    "autoguide that has run": (type_two, after_a_run(type_two, {"y": Y}), {"y": Y}),
    "autoguide that has run with plates": (hierarchical, after_a_run(hierarchical, GY), GY),
    "Gaussian process of Pyro": (process.model, process.guide, {}),
    "foreign byte order": (converts_order, AutoNormal, {"y": Y.numpy().astype(">f8")}),
    "no observations": (funnel, AutoNormal, {}),
    "subsample": (conjugate, AutoNormal, {"y": Y}, {"subsample": {"observations": 5}}),
    "reparameterised": (conjugate, conjugate_guide, {"y": Y}, {"reparameterised": True}),
}


@pytest.mark.parametrize("name", CORRECT)
def test_passes_correct_models(name):
    model, guide, data, *options = CORRECT[name]
    preflight(model, guide, data, **(options[0] if options else {}))


def test_leaves_everything_as_it_was():
    pyro.param("loc", torch.tensor(7.0))
    guide = AutoNormal(conjugate)
    state = torch.get_rng_state()
    preflight(conjugate, guide, {"y": Y.double()})
    assert torch.equal(torch.get_rng_state(), state)
    assert list(pyro.get_param_store()) == ["loc"]
    assert pyro.param("loc").item() == 7.0
    assert torch.get_default_dtype() == torch.float32
    assert guide.prototype_trace is None
    assert guide.model is not None
    assert not list(guide.parameters())


def test_leaves_everything_as_it_was_after_an_error():
    state = torch.get_rng_state()
    with pytest.raises(PreflightError):
        preflight(sequential_repeated, AutoNormal, {"y": Y})
    assert torch.equal(torch.get_rng_state(), state)
    assert not pyro.poutine.runtime._PYRO_STACK
    preflight(conjugate, AutoNormal, {"y": Y})


def test_takes_a_guide_that_has_run():
    guide = AutoNormal(conjugate)
    guide(y=Y)
    preflight(conjugate, guide, {"y": Y})


def test_private_guide_copies():
    guide = list_guide()
    twin = private_guide(parts, guide)
    twin(**GY)
    assert guide.prototype_trace is None
    assert [part.model is not None for part in guide] == [True] * 3
    assert all(part.master() is guide for part in guide)
    assert all(part.master() is twin for part in twin)


def test_runs_the_model_a_few_times_only():
    calls = {"model": 0, "guide": 0}

    def model(y):
        calls["model"] += 1
        conjugate(y)

    def guide(y):
        calls["guide"] += 1
        conjugate_guide(y)

    preflight(model, guide, {"y": Y})
    assert calls == {"model": 2, "guide": 1}
    calls["model"] = 0
    preflight(model, AutoNormal, {"y": Y})
    assert calls["model"] == 5  # two of them the autoguide's own: at first values that work


# --- mistakes -------------------------------------------------------------------------------------


def sequential_repeated(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    for i in pyro.plate("observations", len(y)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample(f"y_{i}", dist.Normal(z, 1.0), obs=y[i])


def positive(y):
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("observations", len(y)):
        pyro.sample("y", dist.Normal(0.0, sigma), obs=y)


def local(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("observations", len(y)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def global_inside(y):
    with pyro.plate("observations", len(y)):
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        pyro.sample("y", dist.Normal(0.0, sigma), obs=y)


def globals_of(latents):
    def model(y):
        local(y)

    model.LATENTS = latents
    return model


def observed(fn, latent=None):
    """A model with a real latent `z` and one observed site."""

    def model(y):
        z = pyro.sample("z", latent or dist.Normal(0.0, 1.0))
        pyro.sample("y", fn(z, y), obs=y)

    return model


def _factor_of_other_shape(y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(5), 1.0).to_event(1))
    pyro.factor("likelihood", dist.Normal(mu, 1.0).log_prob(y).sum())


def _empty_plate(y):
    with pyro.plate("groups", len(y) - N):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def _forgets_to_index(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("observations", len(y), subsample_size=4):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def raises_later(y):
    conjugate(y)
    raise KeyError("no such column")


def forgets(X, y=None):
    pyro.sample("coefficients", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    pyro.sample("y", dist.Normal(X.sum(-1), 1.0).to_event(1), obs=y)


class Case(NamedTuple):
    """A mistake, and what the message must say."""

    model: Any
    guide: Any
    data: Any
    says: tuple[str, ...]
    site: str | None
    options: dict[str, Any] = {}  # noqa: RUF012


def _plate_guide(name, size, fn=None):
    def guide(y):
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate(name, size):
            pyro.sample("z", fn or dist.Normal(0.0, 1.0))

    return guide


def columns(X, y):
    coefficients = pyro.sample(
        "coefficients", dist.Normal(0.0, 1.0).expand([X.shape[1]]).to_event(1)
    )
    pyro.sample("y", dist.Normal(X @ coefficients, 1.0).to_event(1), obs=y)


columns.LATENTS = {"coefficients": ("predictors",)}


def _other_size(X, y):
    columns(X, y)


_other_size.LATENTS = {"coefficients": (4,)}


def _second_site(y):
    pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("mu", dist.Normal(0.0, 1.0))


def _name_taken(y):
    pyro.param("mu", torch.tensor(0.0))
    pyro.sample("mu", dist.Normal(0.0, 1.0))


def _second_plate(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("observations", len(y)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
    with pyro.plate("observations", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def _colliding_plates(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 2, dim=-1), pyro.plate("columns", 3, dim=-1):
        pyro.sample("z", dist.Normal(mu, 1.0))


def _fixed_plate(X, y=None):
    coefficients = pyro.sample("coefficients", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("observations", 10):
        pyro.sample("y", dist.Normal(X @ coefficients, 1.0), obs=y)


def _short_plate(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("observations", 10):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def _column(X, y=None):
    """The mean has shape (n, 1), the observation (n,)."""
    coefficients = pyro.sample("coefficients", dist.Normal(0.0, 1.0).expand([3, 1]).to_event(2))
    with pyro.plate("observations", len(y)):
        pyro.sample("y", dist.Normal(X @ coefficients, 1.0), obs=y)


def _observing_guide(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu, 1.0), obs=y.sum())


def _nan_guide(y):
    pyro.sample("mu", dist.Delta(torch.tensor(float("nan"))))


def _subsampling(size):
    def run(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("observations", len(y), subsample_size=size) as i:
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            if size == 4:
                pyro.sample("y", dist.Normal(z, 1.0), obs=y[i])

    return run


def _sequential_enumeration(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    flip = pyro.sample("flip", dist.Bernoulli(0.3), infer={"enumerate": "sequential"})
    with pyro.plate("observations", len(y)):
        pyro.sample("y", dist.Normal(mu * (1 - 2 * flip), 1.0), obs=y)


@config_enumerate
def _undeclared_enumeration(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    flip = pyro.sample("flip", dist.Bernoulli(0.3))
    pyro.sample("y", dist.Normal(mu * (1 - 2 * flip), 1.0).expand([len(y)]), obs=y)


def _dependent_bounds(y):
    low = pyro.sample("low", dist.Uniform(-1.0, 0.0))
    high = pyro.sample("high", dist.Uniform(low, low + 2.0))
    pyro.sample("y", dist.Normal(high, 1.0).expand([len(y)]).to_event(1), obs=y)


def _factor_nan(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.factor("penalty", -torch.log(-(mu.abs()) - 1))


def _all_observed(y):
    pyro.sample("y", dist.Normal(0.0, 1.0).expand([len(y)]).to_event(1), obs=y)


def _mixed_shapes(X, y=None):
    coefficients = pyro.sample("coefficients", dist.Normal(0.0, 1.0).expand([5]).to_event(1))
    pyro.sample("y", dist.Normal(X @ coefficients, 1.0).to_event(1), obs=y)


def _value_dependent(y):
    """Runs at any prior draw, fails where the guide goes."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    ["only", "two"][int(mu.abs() > 50) * 5]
    pyro.sample("y", dist.Normal(mu, 1.0).expand([len(y)]).to_event(1), obs=y)


class _Scaled(torch.nn.Module):
    """Has single-precision weights, whatever the data."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 1)

    def forward(self, X, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + self.linear(X)[:, 0], 1.0).to_event(1), obs=y)


def with_nan(*indices):
    bad = Y.clone()
    bad[list(indices)] = float("nan")
    return bad


MEANINGS = {"X": X, "y": Y}
FREE = {"mu": dist.Normal(0.0, 1.0)}

CASES: dict[str, Case] = {
    # data
    "data is no dict": Case(conjugate, AutoNormal, [Y], ("a list", '{"X": X'), None),
    "key is no string": Case(conjugate, AutoNormal, {1: Y}, ("key 1", "strings"), "1"),
    "guide cannot be called": Case(conjugate, None, {"y": Y}, ("The guide is a NoneType",), None),
    "missing argument": Case(regression, AutoNormal, {"y": Y}, ("'X'", 'Add data["X"]'), "X"),
    "misspelt argument": Case(
        regression, AutoNormal, {"x": X, "y": Y}, ("'X'", 'Rename data["x"] to "X"'), "X"
    ),
    "unexpected argument": Case(
        conjugate, AutoNormal, {"y": Y, "weights": Y}, ("'weights'", "takes y", "Remove"), "weights"
    ),
    "misspelt optional argument": Case(
        regression, AutoNormal, {"X": X, "Y": Y}, ("'Y'", 'Rename data["Y"] to "y"'), "Y"
    ),
    "guide's arguments": Case(
        regression, conjugate_guide, XY, ("guide has no argument 'X'", "def guide(X, y)"), "X"
    ),
    "guide needs more": Case(
        conjugate, regression_guide, {"y": Y}, ("The guide needs the argument 'X'",), "X"
    ),
    "one nan": Case(conjugate, AutoNormal, {"y": with_nan(4)}, ("nan at index 4", "mask"), "y"),
    "several nans": Case(
        conjugate, AutoNormal, {"y": with_nan(2, 7)}, ("2 values", "nan at index 2"), "y"
    ),
    "infinity": Case(conjugate, AutoNormal, {"y": Y / 0}, (f"{N} values", "inf at index 0"), "y"),
    "nan inside a list": Case(
        conjugate, AutoNormal, {"y": [Y, with_nan(0)]}, ("nan at index 0",), "y"
    ),
    "nan in an array": Case(
        conjugate, AutoNormal, {"y": with_nan(3).numpy()}, ("nan at index 3",), "y"
    ),
    "empty": Case(regression, AutoNormal, {"X": X[:0], "y": Y}, ("is empty", "filter"), "X"),
    "two devices": Case(
        regression,
        AutoNormal,
        {"X": X, "y": Y.to("meta")},
        ('data["X"] is on cpu but data["y"] is on meta', '.to("cpu")'),
        "y",
    ),
    "two dtypes": Case(
        regression,
        AutoNormal,
        {"X": X, "y": Y.double()},
        ("float32", "float64", 'data["y"].to(torch.float32)'),
        "y",
    ),
    "integers": Case(
        regression,
        AutoNormal,
        {"X": X.round().long(), "y": Y},
        ('data["X"] is int64', "floats", 'Pass data["X"].float()'),
        "X",
    ),
    "integers, float64": Case(
        regression,
        AutoNormal,
        {"X": X.round().long(), "y": Y.double()},
        ('Pass data["X"].double()',),
        "X",
    ),
    "integer observations": Case(
        horseshoe, AutoNormal, {"X": X, "y": BINARY.long()}, ('Pass data["y"].float()',), "y"
    ),
    "boolean observations": Case(
        horseshoe, AutoNormal, {"X": X, "y": BINARY.bool()}, ("bool", 'data["y"].float()'), "y"
    ),
    "integers twice": Case(
        horseshoe,
        AutoNormal,
        {"X": X.long(), "y": BINARY.long()},
        ('data["X"].float() and data["y"].float()',),
        "X",
    ),
    "integers in the guide": Case(
        simplex,
        lambda counts: pyro.sample("probs", dist.Dirichlet(counts @ torch.eye(5))),
        {"counts": COUNTS[:5]},
        ("the guide needs floats", 'data["counts"].float()'),
        "counts",
    ),
    "array": Case(
        regression,
        AutoNormal,
        {"X": X, "y": Y.numpy()},
        ("a numpy.ndarray", 'torch.as_tensor(data["y"])'),
        "y",
    ),
    "list": Case(
        regression,
        AutoNormal,
        {"X": X, "y": Y.tolist()},
        ("a list", 'torch.as_tensor(data["y"])'),
        "y",
    ),
    "integer array": Case(
        regression,
        AutoNormal,
        {"X": X.round().long().numpy(), "y": Y},
        ('torch.as_tensor(data["X"]).float()',),
        "X",
    ),
    "table": Case(
        regression,
        AutoNormal,
        {"X": pd.DataFrame(X.numpy()), "y": Y},
        ("a pandas.DataFrame", 'torch.as_tensor(data["X"].to_numpy())'),
        "X",
    ),
    "weights of another dtype": Case(
        _Scaled(),
        AutoNormal,
        {"X": X.double(), "y": Y.double()},
        ("float64", "computes in float32", "to(torch.float32)"),
        "X",
    ),
    "half precision": Case(
        columns,
        AutoNormal,
        {"X": X.bfloat16(), "y": Y.bfloat16()},
        ("are bfloat16", "computes in float32", 'data["y"].to(torch.float32)'),
        "X",
    ),
    # sites
    "missing in the guide": Case(
        regression,
        q(sigma=dist.LogNormal(0.0, 1.0)),
        XY,
        ("does not sample the model's latent 'coefficients'", 'Add pyro.sample("coefficients"'),
        "coefficients",
    ),
    "misspelt in the guide": Case(
        positive,
        q(sigmma=dist.LogNormal(0.0, 1.0)),
        {"y": Y},
        ("'sigma'", "Rename the guide's 'sigmma' to 'sigma'"),
        "sigma",
    ),
    "hidden from the autoguide": Case(
        regression,
        AutoNormal(hide(regression, "sigma")),
        XY,
        ("'sigma'", "without hiding"),
        "sigma",
    ),
    "discrete": Case(
        discrete_guided, q(**FREE), {"y": Y}, ("'flip'", "MixtureSameFamily", "enumerate"), "flip"
    ),
    "discrete, autoguide": Case(
        discrete_guided, AutoNormal, {"y": Y}, ("'flip'", "MixtureSameFamily", "enumerate"), "flip"
    ),
    "enumerated without an estimator for it": Case(
        enumerated_mixture,
        AutoNormal(hide(enumerated_mixture, "component")),
        {"y": Y},
        ("'component'", "TraceEnum_ELBO"),
        "component",
    ),
    "sequential enumeration": Case(
        _sequential_enumeration,
        q(**FREE),
        {"y": Y},
        ("'flip'", '"parallel"'),
        "flip",
        {"enumerate": True},
    ),
    "enumeration without plates": Case(
        _undeclared_enumeration,
        q(**FREE),
        {"y": Y},
        ("'y'", "pyro.plate", "to_event"),
        "y",
        {"enumerate": True},
    ),
    "extra in the guide": Case(
        conjugate, q(**FREE, tau=normal()), {"y": Y}, ("'tau'", "is_auxiliary"), "tau"
    ),
    "extra and similar": Case(
        conjugate, q(**FREE, mu2=normal()), {"y": Y}, ("'mu2'", "did you mean 'mu'"), "mu2"
    ),
    "guide samples an observation": Case(
        conjugate,
        q(**FREE, y=normal(N)),
        {"y": Y},
        ("'y', which the model observes", "Remove"),
        "y",
    ),
    "guide samples a deterministic site": Case(
        hierarchical,
        q(mu=normal(), tau=dist.LogNormal(0.0, 1.0), theta=normal(4), largest=normal()),
        GY,
        ("'largest'", "computes (pyro.deterministic)", "Remove"),
        "largest",
    ),
    "guide observes": Case(
        conjugate, _observing_guide, {"y": Y}, ("guide observes 'y'", "obs="), "y"
    ),
    "two sites of one name": Case(
        sequential_repeated, AutoNormal, {"y": Y}, ("two sites named 'z'", 'f"z_{i}"'), "z"
    ),
    "two sites of one name in the guide": Case(
        conjugate, _second_site, {"y": Y}, ("The guide has two sites named 'mu'",), "mu"
    ),
    "parameter and site of one name": Case(
        conjugate, _name_taken, {"y": Y}, ("'mu' for a parameter and", "Rename"), "mu"
    ),
    "plate made twice": Case(
        _second_plate, AutoNormal, {"y": Y}, ("plate 'observations' twice", "once"), "observations"
    ),
    "plates collide": Case(
        _colliding_plates, AutoNormal, {"y": Y}, ("'rows'", "'columns'", "dim=-2"), "columns"
    ),
    "no latent": Case(_all_observed, q(), {"y": Y}, ("no latent variable", "without obs"), None),
    "forgotten observation": Case(
        regression, AutoNormal, {"X": X}, ("'y' is None", 'Add data["y"]'), "y"
    ),
    # shapes and plates
    "shape": Case(
        forgets,
        q(coefficients=normal(2).to_event(1)),
        XY,
        ("'coefficients'", "event shape (3,) in the model", "(2,) in the guide", "shape (3,)"),
        "coefficients",
    ),
    "batch for event": Case(
        forgets,
        q(coefficients=normal(3)),
        XY,
        ("batch shape () and event shape (3,)", "Call .to_event(1)"),
        "coefficients",
    ),
    "event for batch": Case(
        local,
        _plate_guide("observations", N, normal(N, 2).to_event(1)),
        {"y": Y},
        ("'z'", "without .to_event"),
        "z",
    ),
    "Delta without event_dim": Case(
        forgets,
        q(coefficients=dist.Delta(torch.zeros(3))),
        XY,
        ("event shape (3,)", "event_dim=1"),
        "coefficients",
    ),
    "scalar for a vector": Case(
        forgets,
        q(coefficients=normal()),
        XY,
        ("'coefficients'", "shape (3,)", "to_event(1)"),
        "coefficients",
    ),
    "plate missing in the guide": Case(
        local,
        q(**FREE, z=normal(N)),
        {"y": Y},
        ("'z' inside plate 'observations'", f'with pyro.plate("observations", {N})'),
        "z",
    ),
    "joint draw over a plate": Case(
        local,
        q(**FREE, z=normal(N).to_event(1)),
        {"y": Y},
        ("'z' inside plate 'observations'", "is_auxiliary", "dist.Delta"),
        "z",
    ),
    "plate misspelt in the guide": Case(
        local, _plate_guide("observation", N), {"y": Y}, ("it is inside 'observation'",), "z"
    ),
    "plate size": Case(
        local,
        _plate_guide("observations", 8),
        {"y": Y},
        ("'observations'", f"{N} in the model and 8 in the guide", f"{N}) in the guide"),
        "observations",
    ),
    "minibatch size": Case(
        _subsampling(4),
        _subsampling(3),
        {"y": Y},
        ("4 in the model and 3 in the guide", "same"),
        "observations",
    ),
    "plate and data": Case(
        _fixed_plate,
        AutoNormal,
        XY,
        ("plate 'observations' has size 10", f"'y' inside it has size {N}", f"{N})"),
        "y",
    ),
    "plate and observation": Case(
        _short_plate,
        AutoNormal,
        {"y": Y},
        ("Observed site 'y'", f"({N},)", "plate 'observations' of size 10", "len(y)"),
        "y",
    ),
    "empty plate": Case(
        _empty_plate, AutoNormal, {"y": Y}, ("Plate 'groups'", "size 0", "Size it"), "groups"
    ),
    "minibatch and observation": Case(
        _forgets_to_index,
        AutoNormal,
        {"y": Y},
        ("'y'", f"({N},)", "plate 'observations' of size 4", "obs=y[i]"),
        "y",
    ),
    "observation broadcast": Case(
        _column, AutoNormal, XY, ("'y'", f"counted {N} times", "squeeze"), "y"
    ),
    # supports
    "Normal guide for a positive latent": Case(
        positive,
        q(sigma=dist.Normal(5.0, 0.1)),
        {"y": Y},
        ("'sigma'", "(-inf, inf)", "HalfNormal, (0, inf)", "dist.LogNormal"),
        "sigma",
    ),
    "Normal guide for a probability": Case(
        observed(lambda z, y: dist.Bernoulli(z).expand([N]).to_event(1), dist.Beta(1.0, 1.0)),
        q(z=dist.Normal(0.5, 0.1)),
        {"y": BINARY},
        ("'z'", "(0, 1)", "dist.Beta"),
        "z",
    ),
    "wider bounds": Case(
        observed(lambda z, y: dist.Normal(z, 1.0).expand([N]).to_event(1), dist.Uniform(1.0, 3.0)),
        q(z=dist.Uniform(1.0, 4.0)),
        {"y": Y},
        ("(1, 4)", "(1, 3)", "biject_to(constraints.interval(1, 3))"),
        "z",
    ),
    "wider bounds of a vector": Case(
        prior(dist.Uniform(torch.zeros(2), torch.tensor([1.0, 2.0])).to_event(1)),
        q(z=dist.Uniform(torch.zeros(2), torch.tensor([1.0, 3.0])).to_event(1)),
        {"y": Y},
        ("'z'", "(0, 1...3)", "(0, 1...2)", "interval(0, bound)"),
        "z",
    ),
    "guide of free entries for a matrix": Case(
        prior(dist.Wishart(torch.tensor(3.0), covariance_matrix=torch.eye(2))),
        q(z=normal(2, 2).to_event(2)),
        {"y": Y},
        ("'z'", "positive definite matrices", "Wishart, in the guide"),
        "z",
    ),
    "guide of free entries for a simplex": Case(
        simplex,
        q(probs=normal(5).to_event(1)),
        {"counts": COUNTS[:5]},
        ("'probs'", "simplex", "dist.Dirichlet"),
        "probs",
    ),
    "guide of free entries for cutpoints": Case(
        cutpoints,
        q(cuts=normal(3).to_event(1), ability=normal()),
        ORDER,
        ("'cuts'", "ordered vectors", "biject_to(constraints.ordered_vector)"),
        "cuts",
    ),
    "continuous guide for a discrete latent": Case(
        discrete_guided,
        q(**FREE, flip=dist.Normal(0.0, 1.0)),
        {"y": Y},
        ("'flip'", "Bernoulli", "integers from 0 to 1"),
        "flip",
    ),
    "point outside the support": Case(
        positive,
        q(sigma=dist.Delta(torch.tensor(-1.0))),
        {"y": Y},
        ("draw -1 of 'sigma'", "(0, inf)", "constraint="),
        "sigma",
    ),
    "guide's draw is nan": Case(
        conjugate, _nan_guide, {"y": Y}, ("'mu' is nan", "parameters"), "mu"
    ),
    "bounds that move": Case(
        _dependent_bounds,
        AutoNormal,
        {"y": Y},
        ("'high' depends on other latents", "AutoNormal fixes it", "'high_unit'"),
        "high",
    ),
    "prior that an autoguide must draw from": Case(
        improper, AutoStructured, {"y": Y}, ("'mu'", "improper", "AutoMultivariateNormal"), "mu"
    ),
    "loop over a plate": Case(
        sequential,
        AutoNormal,
        {"y": Y},
        ("AutoNormal", "loop over a plate", "with pyro.plate"),
        None,
    ),
    "not reparameterised": Case(
        discrete_guided,
        discrete_guide,
        {"y": Y},
        ("Bernoulli at site 'flip'", "score-function"),
        "flip",
        {"reparameterised": True},
    ),
    "autoguide of another model": Case(
        positive,
        AutoNormal(lambda y: pyro.sample("sigma", dist.Normal(0.0, 1.0))),
        {"y": Y},
        ("AutoNormal has support (-inf, inf)", "Build it anew"),
        "sigma",
    ),
    "autoguide on a transformed prior": Case(
        prior(shifted_exponential()),
        AutoNormal,
        {"y": Y},
        ("AutoNormal has support (-inf, inf)", "(2, inf)", "Sample the base distribution"),
        "z",
    ),
    "autoguide set up on other data": Case(
        local,
        after_a_run(local, {"y": Y[:5]}),
        {"y": Y},
        (f"size {N} in the model and 5 in the guide", "build a new one"),
        "observations",
    ),
    "autoguide set up on other columns": Case(
        columns,
        after_a_run(columns, {"X": X[:, :2], "y": Y}),
        XY,
        ("event shape (3,) in the model", "build a new one"),
        "coefficients",
    ),
    # LATENTS
    "global latent inside a data plate": Case(
        globals_of({"mu": (), "z": ()}),
        _plate_guide("observations", N),
        {"y": Y},
        ("'z' a global scalar", "inside plate 'observations'", "Move"),
        "z",
    ),
    "LATENTS names no site": Case(
        globals_of({"mu": (), "zz": ("observations",)}),
        _plate_guide("observations", N),
        {"y": Y},
        ("'zz'", "Write 'z'"),
        "zz",
    ),
    "LATENTS of other dims": Case(
        globals_of({"mu": ("predictors",)}),
        _plate_guide("observations", N),
        {"y": Y},
        ("'mu' with dims ('predictors',)", "shape ()"),
        "mu",
    ),
    "LATENTS of another size": Case(
        _other_size,
        AutoNormal,
        XY,
        ("'coefficients' with dims (4,)", "shape (3,)", "Correct"),
        "coefficients",
    ),
    "LATENTS is no tuple": Case(
        globals_of({"mu": "predictors"}),
        _plate_guide("observations", N),
        {"y": Y},
        ("LATENTS['mu'] is a str", "tuple"),
        "mu",
    ),
    # minibatches
    "subsample, misspelt": Case(
        conjugate,
        AutoNormal,
        {"y": Y},
        ("'observation'", "Write 'observations'"),
        "observation",
        {"subsample": {"observation": 5}},
    ),
    "subsample without plates": Case(
        observed(lambda z, y: dist.Normal(z, 1.0).expand([N]).to_event(1)),
        AutoNormal,
        {"y": Y},
        ("it has none",),
        "observations",
        {"subsample": {"observations": 5}},
    ),
    "subsample of nothing": Case(
        conjugate,
        AutoNormal,
        {"y": Y},
        ("asks for 0", f"from 1 to {N}"),
        "observations",
        {"subsample": {"observations": 0}},
    ),
    "subsample of more": Case(
        conjugate,
        AutoNormal,
        {"y": Y},
        ("asks for 99", f"from 1 to {N}"),
        "observations",
        {"subsample": {"observations": 99}},
    ),
    "subsample of a fraction": Case(
        conjugate,
        AutoNormal,
        {"y": Y},
        ("asks for 0.5", "whole number"),
        "observations",
        {"subsample": {"observations": 0.5}},
    ),
    # densities, and the rest
    "observation outside its support": Case(
        observed(lambda z, y: dist.Poisson(z.exp()).expand([N]).to_event(1)),
        AutoNormal,
        {"y": COUNTS - 2},
        ("'y'", "-2 at index 0", "Poisson", "integers from 0", "Correct the data"),
        "y",
    ),
    "density zero": Case(
        observed(lambda z, y: dist.LogNormal(z, 1.0).expand([N]).to_event(1)),
        AutoNormal,
        {"y": COUNTS.float()},
        ("the observation 0 at index 0", "LogNormal, (0, inf)"),
        "y",
    ),
    "factor that is nan": Case(
        _factor_nan, AutoNormal, {"y": Y}, ("model raised", "log_factor", "nan"), "mu"
    ),
    "bad constant": Case(
        observed(lambda z, y: dist.Normal(z, -1.0).expand([N]).to_event(1)),
        AutoNormal,
        {"y": Y},
        ("model raised ValueError", "'z'", "scale", "by itself"),
        "z",
    ),
    "shapes inside the model": Case(
        _mixed_shapes,
        AutoNormal,
        XY,
        ("model raised RuntimeError", "'coefficients'"),
        "coefficients",
    ),
    "shapes inside a density": Case(
        _factor_of_other_shape,
        AutoNormal,
        {"y": Y},
        ("model raised ValueError", "not broadcastable", "by itself"),
        "mu",
    ),
    "error in the model": Case(
        raises_later, AutoNormal, {"y": Y}, ("model raised KeyError", "no such column"), "y"
    ),
    "error in the guide": Case(
        conjugate,
        lambda y: pyro.sample("mu", dist.Normal(y, 1.0).to_event(3)),
        {"y": Y},
        ("guide raised ValueError",),
        None,
    ),
    "error on the guide's draws": Case(
        _value_dependent,
        q(mu=dist.Normal(1000.0, 1.0)),
        {"y": Y},
        ("model raised IndexError", "guide's draws"),
        "mu",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_names_the_site_and_the_remedy(name):
    case = CASES[name]
    with pytest.raises(PreflightError) as caught:
        preflight(case.model, case.guide, case.data, **case.options)
    message = str(caught.value)
    for part in case.says:
        assert part in message
    assert caught.value.site == case.site
    assert caught.value.remedy
    assert message.endswith(caught.value.remedy)
    assert "\n" not in message
    assert re.search(r"[.?!]$", message)


def test_keeps_the_cause():
    with pytest.raises(PreflightError) as caught:
        preflight(raises_later, AutoNormal, {"y": Y})
    assert isinstance(caught.value.__cause__, KeyError)


def test_latents_of_a_module_are_those_of_its_model(monkeypatch):
    module = types.ModuleType("recipe")
    module.LATENTS = {"z": ()}
    monkeypatch.setitem(sys.modules, "recipe", module)

    def model(y):
        local(y)

    def other(y):
        local(y)

    model.__module__ = other.__module__ = "recipe"
    module.model = model
    with pytest.raises(PreflightError, match="'z' a global scalar"):
        preflight(model, AutoNormal, {"y": Y})
    with pytest.raises(PreflightError, match="'z' a global scalar"):
        preflight(poutine.scale(model, scale=2.0), AutoNormal, {"y": Y})
    preflight(other, AutoNormal, {"y": Y})


def test_warns_of_data_that_are_not_observed():
    with pytest.warns(UserWarning, match="observes nothing"):
        preflight(density, AutoNormal, {"covariance": torch.eye(2)})


def print_messages():
    for name, case in CASES.items():
        try:
            preflight(case.model, case.guide, case.data, **case.options)
        except PreflightError as error:
            print(f"{name}: {error}")
        else:
            print(f"{name}: NO MESSAGE")


if __name__ == "__main__":
    print_messages()
