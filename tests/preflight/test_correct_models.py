"""Preflight passes every correct pair of model and guide."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib import gp
from pyro.contrib.easyguide import easy_guide
from pyro.distributions import constraints
from pyro.distributions.transforms import Permute
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
from pyro.nn import PyroModule, PyroSample
from torch.distributions import biject_to

from tests.preflight.models import (
    BINARY,
    COUNTS,
    GY,
    ORDER,
    POINTS,
    XY,
    X,
    Y,
    after_a_run,
    conjugate,
    conjugate_guide,
    correlated,
    cutpoints,
    cutpoints_guide,
    discrete_guide,
    discrete_guided,
    enumerated_mixture,
    gaussian_process,
    hidden_markov,
    hide,
    hierarchical,
    hierarchical_guide,
    horseshoe,
    improper,
    list_guide,
    marginal_mixture,
    markov_chain,
    markov_chain_guide,
    parts,
    prior,
    q,
    regression,
    regression_guide,
    sequential,
    sequential_guide,
    shifted_exponential,
    simplex,
    simplex_guide,
    topics,
    topics_guide,
)
from vi_toolkit.preflight import preflight


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


class NamedGuide(PyroModule):
    def forward(self, X, y=None):
        return pyro.sample("weight", dist.Normal(torch.zeros(3), 0.1).to_event(1))


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


def converts_order(y):
    conjugate(torch.as_tensor(y.astype(float)))


process = gp.models.GPRegression(X, Y, gp.kernels.RBF(input_dim=3))
process.kernel.lengthscale = PyroSample(dist.LogNormal(0.0, 1.0))
process.kernel.autoguide("lengthscale", dist.Normal)


def funnel():
    log_scale = pyro.sample("log_scale", dist.Normal(0.0, 3.0))
    pyro.sample("x", dist.Normal(0.0, (log_scale / 2).exp()).expand([2]).to_event(1))


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
def test_correct_models_pass(name):
    model, guide, data, *options = CORRECT[name]
    preflight(model, guide, data, **(options[0] if options else {}))
