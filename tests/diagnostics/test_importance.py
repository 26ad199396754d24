"""Importance sampling from the guide against a conjugate posterior."""

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal

from tests.support import fitted
from tests.tolerances import Z
from vi_toolkit.diagnostics.importance import draws_from_guide, draws_from_t, moments_of


def test_evidence_and_moments_of_a_conjugate_model_are_right():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("observations", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    y = torch.tensor([1.0, 0.2, 2.5]).double()
    exact = dist.MultivariateNormal(torch.zeros(3).double(), torch.eye(3).double() + 4).log_prob(y)
    precision = 3 + 1 / 4
    fit = fitted(model, AutoNormal, {"y": y})
    wide = np.array([[2 / precision]])
    for draws in (draws_from_guide(fit, 20_000, 8, 0), draws_from_t(fit, wide, 20_000, 8, 0)):
        found = moments_of(fit, draws, "any")
        assert found.pareto_k.reliable
        assert abs(found.log_evidence - float(exact)) < Z * found.log_evidence_se + 1e-3
        assert abs(found.mean[0] - float(y.sum()) / precision) < Z * found.mean_se[0] + 1e-3
        assert abs(found.sd[0] - precision**-0.5) < Z * found.sd_se[0] + 1e-3
