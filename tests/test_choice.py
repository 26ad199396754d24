"""Which method runs, and why."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoNormal

import vi_toolkit as vi
from tests.models import regression, regression_data
from tests.support import quietly


def test_the_automatic_choice_gives_its_reason():
    data = regression_data()
    assert vi.fit(regression, AutoNormal, data, progress=False).method == "deterministic"
    for given in ({"steps": 5}, {"optimizer": 0.1, "steps": 5}, {"subsample": {"observations": 9}}):
        fit = quietly(regression, AutoNormal, data, **({"steps": 5} | given))
        assert fit.method == "stochastic" and next(iter(given)) in fit.why

    def discrete_guide(y):
        pyro.sample("k", dist.Bernoulli(pyro.param("p", torch.tensor(0.5))))

    def discrete(y):
        k = pyro.sample("k", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(k, 1.0), obs=y)

    fit = quietly(
        discrete, discrete_guide, {"y": torch.tensor(0.5)}, estimator=Trace_ELBO(), steps=5
    )
    assert fit.method == "stochastic"
    flow = quietly(
        regression, AutoIAFNormal(regression, hidden_dim=[40], num_transforms=2), data, steps=5
    )
    assert flow.method == "stochastic"


def test_the_deterministic_method_refuses_what_it_cannot_do():
    data = regression_data()
    with pytest.raises(vi.NotDeterministicError, match="steps"):
        vi.fit(regression, AutoNormal, data, method="deterministic", steps=10, progress=False)

    def guide(y):
        pyro.sample("k", dist.Bernoulli(pyro.param("p", torch.tensor(0.5))))

    def model(y):
        pyro.sample("y", dist.Normal(pyro.sample("k", dist.Bernoulli(0.3)), 1.0), obs=y)

    with pytest.raises(vi.NotDeterministicError, match="'k' cannot be reparameterised"):
        vi.fit(model, guide, {"y": torch.tensor(1.0)}, method="deterministic", progress=False)

    class StraightThrough(dist.Bernoulli):
        has_rsample = True

        def rsample(self, sample_shape=()):
            return self.sample(sample_shape) + (self.probs - self.probs.detach())

    def with_gradient(y):
        pyro.sample("k", StraightThrough(pyro.param("p", torch.tensor(0.5))))

    with pytest.raises(vi.NotDeterministicError, match="'k' is discrete"):
        vi.fit(
            model, with_gradient, {"y": torch.tensor(1.0)}, method="deterministic", progress=False
        )
