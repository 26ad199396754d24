"""A guide must put its draws where the model's latent can be."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal, AutoStructured

from tests.preflight.mistakes import Case, check_message
from tests.preflight.models import (
    BINARY,
    COUNTS,
    FREE,
    ORDER,
    XY,
    N,
    X,
    Y,
    after_a_run,
    columns,
    conjugate,
    cutpoints,
    discrete_guide,
    discrete_guided,
    improper,
    local,
    normal,
    observed,
    positive,
    prior,
    q,
    sequential,
    shifted_exponential,
    simplex,
)


def _nan_guide(y):
    pyro.sample("mu", dist.Delta(torch.tensor(float("nan"))))


def _dependent_bounds(y):
    low = pyro.sample("low", dist.Uniform(-1.0, 0.0))
    high = pyro.sample("high", dist.Uniform(low, low + 2.0))
    pyro.sample("y", dist.Normal(high, 1.0).expand([len(y)]).to_event(1), obs=y)


CASES: dict[str, Case] = {
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
}


@pytest.mark.parametrize("name", CASES)
def test_the_message_names_the_site_and_the_remedy(name):
    check_message(CASES[name])
