"""Guides written by hand end at the optimum that theory gives."""

import math

import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints

import vi_toolkit as vi
from tests.models import own_guide, regression, regression_data, regression_posterior


def test_a_guide_written_by_hand_reaches_the_same_optimum():
    data = regression_data()
    mean, covariance, precision = regression_posterior(**data)
    fit = vi.fit(regression, own_guide, data, progress=False)
    assert fit.method == "deterministic" and fit.converged
    sd = covariance.diagonal().sqrt()
    assert ((fit.params["loc"] - mean) / sd).abs().max() < 5e-3
    assert (fit.params["scale"].double() * precision.diagonal().sqrt()).log().abs().max() < 5e-3


def test_a_gamma_guide_reaches_a_conjugate_posterior_and_its_elbo_is_the_evidence():
    counts = torch.tensor([3.0, 5.0, 2.0, 4.0], dtype=torch.float64)

    def model(counts):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("observations", len(counts)):
            pyro.sample("counts", dist.Poisson(rate), obs=counts)

    def guide(counts):
        a = pyro.param("a", torch.tensor(1.0), constraint=constraints.positive)
        b = pyro.param("b", torch.tensor(1.0), constraint=constraints.positive)
        pyro.sample("rate", dist.Gamma(a, b))

    fit = vi.fit(model, guide, {"counts": counts}, progress=False)
    a, b, n = 2.0 + 14.0, 1.0 + 4.0, 4
    assert abs(float(fit.params["a"]) / a - 1) < 1e-3
    assert abs(float(fit.params["b"]) / b - 1) < 1e-3
    log_evidence = (
        math.lgamma(a) - a * math.log(b) - math.lgamma(2.0) - torch.lgamma(counts + 1).sum().item()
    )
    elbo, error = fit.elbo_estimate(2000)
    assert abs(elbo - log_evidence) < 1e-5 and error < 1e-5 and n == len(counts)
