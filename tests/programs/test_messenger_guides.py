"""Guides that run the model under their own effects: the likelihood counts, once."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide.effect import (
    AutoHierarchicalNormalMessenger,
    AutoNormalMessenger,
    AutoRegressiveMessenger,
)
from pyro.poutine.guide import GuideMessenger

import vi_toolkit as vi
from tests.tolerances import Z

Y = torch.tensor([4.0, 5.0, 6.0])
MEAN, SD = 15 / 4, 0.5  # of Normal(0, 1) times three Normal(mu, 1)
EVIDENCE = float(
    dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + torch.ones(3, 3)).log_prob(Y)
)


def location(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.deterministic("twice", 2 * mu)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


class OwnMessenger(GuideMessenger):
    def get_posterior(self, name, prior):
        loc = pyro.param(f"{name} loc", torch.zeros(prior.shape()))
        log_scale = pyro.param(f"{name} log scale", torch.zeros(prior.shape()))
        return dist.Normal(loc, log_scale.exp())


@pytest.mark.parametrize(
    "guide",
    [AutoNormalMessenger, AutoHierarchicalNormalMessenger, AutoRegressiveMessenger, OwnMessenger],
)
@pytest.mark.parametrize("given", ["class", "instance"])
def test_the_likelihood_does_not_cancel(guide, given, tmp_path):
    own = guide if given == "class" else guide(location)
    fit = vi.fit(location, own, {"y": Y}, progress=False)
    assert fit.converged
    draws = fit.sample(4000)["mu"].double()
    assert abs(float(draws.mean()) - MEAN) < 0.02 * SD + Z * SD / 4000**0.5
    assert abs(float(draws.std()) - SD) < 0.02 * SD + Z * SD / 8000**0.5
    elbo, elbo_se = fit.elbo_estimate(4000)
    assert abs(elbo - EVIDENCE) < 1e-3 + Z * elbo_se
    assert abs(vi.log_evidence(fit).log_evidence - EVIDENCE) < 0.01
    assert vi.diagnose(fit).verdict == "trust"
    assert fit.predict(5)["y"].shape == (5, 3)
    fit.save(tmp_path / "fit")
    again = vi.load(tmp_path / "fit", location, own)
    assert torch.equal(again.sample(3)["mu"], fit.sample(3)["mu"])


def test_minibatches_of_rows_under_a_messenger_guide():
    y = torch.randn(200, generator=torch.Generator().manual_seed(0)) + 2
    fit = vi.fit(
        location, AutoNormalMessenger, {"y": y}, subsample={"rows": 20}, steps=3000,
        optimizer=0.02, compile=False, progress=False,
    )  # fmt: skip
    exact = float(y.sum()) / 201
    assert abs(float(fit.sample(4000)["mu"].mean()) - exact) < 0.3 * 201**-0.5
