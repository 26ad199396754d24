"""Conjugate linear regression: its closed forms against Pyro, cubature and one another."""

import math

import numpy as np
import pyro
import pyro.poutine as poutine
import pytest
import scipy.stats
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from recipes.linear_regression import LATENTS, exact, exact_family, load_data, model, simulate
from recipes.linear_regression.exact import NormalInverseGamma
from tests.tolerances import Z

FALSE_ALARM = 2 * scipy.stats.norm.sf(Z)


def small_data():
    """A problem small enough for the cubature below: 40 observations, 3 predictors."""
    return simulate(seed=1, observations=40, predictors=3)[0]


def some_member(seed, d):
    """A NormalInverseGamma with nothing special about it; a > 3, so that its moments exist."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    factor = draw(d, d)
    return NormalInverseGamma(
        3 + draw(1)[0].exp(), draw(1)[0].exp(), draw(d), factor @ factor.T / d + 0.1 * torch.eye(d)
    )


def set_exact_family(q, data):
    """Put the parameters of the exact-family guide at q."""
    exact_family(**data)
    store = pyro.get_param_store()
    store["a"], store["b"], store["m"] = q.a, q.b, q.m
    store["scale_tril"] = torch.linalg.cholesky(q.V)


def log_ratio(guide, values, data):
    """log p(y, z) - log q(z), as Pyro's own traces have it, at the guide's sites' values."""
    guide_trace = poutine.trace(poutine.condition(guide, values)).get_trace(**data)
    for name in values:  # conditioning marks them observed, and then they would not be replayed
        guide_trace.nodes[name]["is_observed"] = False
    model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(**data)
    return (model_trace.log_prob_sum() - guide_trace.log_prob_sum()).detach()


def sigma_points(d):
    """2 d points with mean 0 and covariance I: their average of a quadratic is its expectation."""
    eye = math.sqrt(d) * torch.eye(d, dtype=torch.float64)
    return torch.cat([eye, -eye])


def trapezoid(log_density, low, high, points):
    """Nodes and weights of a smooth density on the line (geometric convergence, error < 1e-12)."""
    u = torch.linspace(low, high, points, dtype=torch.float64)
    weights = torch.tensor(log_density(u.numpy())).exp() * (u[1] - u[0])
    assert abs(weights.sum() - 1) < 1e-12
    return zip(u, weights, strict=True)


def test_latents_are_what_the_model_samples():
    data = small_data()
    trace = poutine.trace(model).get_trace(**data)
    shapes = {name: trace.nodes[name]["value"].shape for name in LATENTS}
    assert shapes == {"variance": (), "coefficients": (3,)}
    assert not any(trace.nodes[name]["cond_indep_stack"] for name in LATENTS)


@pytest.mark.parametrize("hyper", [{}, {"a0": 4.5, "b0": 2.0, "prior_scale": 0.3}])
def test_log_evidence_is_the_multivariate_t_density(hyper):
    # Integrating the coefficients and the variance out of the joint Gaussian leaves a
    # multivariate t with 2 a0 degrees of freedom: an n x n formula that shares no code with ours.
    data = load_data()
    X, y = data["X"].numpy(), data["y"].numpy()
    a0, b0 = hyper.get("a0", exact.A0), hyper.get("b0", exact.B0)
    scale = hyper.get("prior_scale", exact.PRIOR_SCALE)
    shape = b0 / a0 * (np.eye(len(y)) + scale**2 * X @ X.T)
    expected = scipy.stats.multivariate_t.logpdf(y, loc=None, shape=shape, df=2 * a0)
    assert exact.log_evidence(**data, **hyper).item() == pytest.approx(expected, abs=1e-8)


def test_at_the_posterior_log_joint_minus_log_guide_is_constant():
    data = load_data()
    q = exact.posterior(**data)
    set_exact_family(q, data)
    draws = q.sample(50, seed=0)
    # Far from the posterior too: the identity holds for every z.
    draws = {name: torch.cat([value, 1 + 3 * value]) for name, value in draws.items()}
    values = [
        log_ratio(exact_family, {"variance": v, "coefficients": c}, data)
        for v, c in zip(draws["variance"], draws["coefficients"], strict=True)
    ]
    torch.testing.assert_close(
        torch.stack(values), exact.log_evidence(**data).expand(100), rtol=0, atol=1e-8
    )


@pytest.mark.parametrize("seed", range(5))
def test_log_evidence_minus_elbo_is_kl_for_the_exact_family(seed):
    data = load_data()
    posterior = exact.posterior(**data)
    far = some_member(seed, 11)
    near = NormalInverseGamma(
        posterior.a * 1.2, posterior.b, posterior.m + 0.01 * far.m, posterior.V * 1.1
    )
    for q in (far, near):
        gap = exact.log_evidence(**data) - exact.elbo(q, **data)
        # A float64 has 16 digits; the ELBO of a poor q is of the order of 1e5.
        assert gap.item() == pytest.approx(q.kl(posterior).item(), abs=1e-8, rel=1e-12)
        assert gap > 0
    assert (exact.log_evidence(**data) - exact.elbo(posterior, **data)).abs() < 1e-8
    assert posterior.kl(posterior).abs() < 1e-10


@pytest.mark.parametrize("seed", range(3))
def test_pyros_elbo_of_the_exact_family_by_cubature(seed):
    # The expectation is over what Pyro computes: the model's and the guide's traces. Given the
    # variance the log ratio is quadratic in the coefficients, so 2 d points integrate it exactly.
    data = small_data()
    q = some_member(seed, 3)
    set_exact_family(q, data)
    factor = torch.linalg.cholesky(q.V)
    law = scipy.stats.loggamma(q.a.item(), -math.log(q.b))  # of -log(variance)
    low, high = -law.isf(1e-19), -law.ppf(1e-19)
    elbo = 0.0
    for u, weight in trapezoid(lambda u: law.logpdf(-u), low, high, 150):
        for point in sigma_points(3):
            z = {"variance": u.exp(), "coefficients": q.m + (u / 2).exp() * factor @ point}
            elbo += weight / 6 * log_ratio(exact_family, z, data)
    gap = exact.log_evidence(**data) - elbo
    assert gap.item() == pytest.approx(q.kl(exact.posterior(**data)).item(), abs=1e-8)
    assert elbo.item() == pytest.approx(exact.elbo(q, **data).item(), abs=1e-8)


@pytest.mark.parametrize("guide_class", [AutoNormal, AutoMultivariateNormal])
def test_pyros_elbo_of_the_gaussian_guides_by_cubature(guide_class):
    data = small_data()
    guide = guide_class(model)
    guide(**data)
    generator = torch.Generator().manual_seed(2)
    loc = 0.3 * torch.randn(4, generator=generator, dtype=torch.float64)
    factor = 0.3 * torch.randn(4, 4, generator=generator, dtype=torch.float64).tril()
    factor += 0.5 * torch.eye(4)
    if guide_class is AutoNormal:
        factor = torch.diag(factor.diagonal().abs())
        guide.locs.variance, guide.locs.coefficients = loc[0], loc[1:]
        guide.scales.variance, guide.scales.coefficients = factor[0, 0], factor.diagonal()[1:]
    else:
        factor = factor * factor.diagonal().sign()
        scale = factor.diagonal()
        guide.loc, guide.scale = torch.nn.Parameter(loc), scale
        guide.scale_tril = factor / scale[:, None]
    covariance = factor @ factor.T
    # z = loc + factor e: a trapezoid over e_0, and given it a quadratic in the others.
    elbo = 0.0
    for e0, weight in trapezoid(scipy.stats.norm.logpdf, -11, 11, 120):
        for point in sigma_points(3):
            z = loc + factor @ torch.cat([e0[None], point])
            if guide_class is AutoNormal:
                values = {"variance_unconstrained": z[0], "coefficients_unconstrained": z[1:]}
            else:
                values = {"_AutoMultivariateNormal_latent": z}
            elbo += weight / 6 * log_ratio(guide, values, data)
    assert elbo.item() == pytest.approx(
        exact.gaussian_elbo(loc, covariance, **data).item(), abs=1e-8
    )


@pytest.mark.parametrize("mean_field", [True, False])
def test_gaussian_optimum_is_a_maximum(mean_field):
    data = load_data()
    loc, covariance = exact.gaussian_optimum(**data, mean_field=mean_field)

    def elbo(loc, factor):
        if mean_field:
            factor = torch.diag(factor.diagonal())
        return exact.gaussian_elbo(loc, factor @ factor.T, **data)

    factor = torch.linalg.cholesky(covariance)

    # In units of the optimum's own sds, where the curvature is of the order of one.
    def scaled(a, b):
        return elbo(loc + factor @ a, factor @ (torch.eye(12).double() + b.tril()))

    zeros = torch.zeros(12).double(), torch.zeros(12, 12).double()
    for gradient in torch.func.grad(scaled, argnums=(0, 1))(*zeros):
        assert gradient.abs().max() < 1e-9
    best = elbo(loc, factor)
    assert best < exact.log_evidence(**data)
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        a = 0.1 * torch.randn(12, generator=generator, dtype=torch.float64)
        b = 0.1 * torch.randn(12, 12, generator=generator, dtype=torch.float64)
        assert scaled(a, b) < best


def test_mean_field_is_too_narrow_by_exactly_what_theory_says():
    data = load_data()
    posterior = exact.posterior(**data)
    _, covariance = posterior.moments()
    loc, q_covariance = exact.gaussian_optimum(**data, mean_field=True)
    sd = q_covariance.diagonal().sqrt()
    # From the fitted q alone: (E_q[1/variance] P_ii)^(-1/2), with q(variance) lognormal.
    inverse_variance = (-loc[0] + sd[0] ** 2 / 2).exp()
    P = data["X"].T @ data["X"] + torch.eye(11) / exact.PRIOR_SCALE**2
    torch.testing.assert_close(sd[1:], (inverse_variance * P.diagonal()) ** -0.5)
    torch.testing.assert_close(inverse_variance, posterior.a / posterior.b)
    # Against the posterior: r_i = (Lambda_ii Sigma_ii)^(-1/2), the ratio for a Gaussian posterior,
    # but for the Student-t's tails: its variance has a_n - 1 where its precision has a_n.
    r = (torch.linalg.inv(covariance).diagonal() * covariance.diagonal()) ** -0.5
    ratio = sd / covariance.diagonal().sqrt()
    torch.testing.assert_close(ratio[1:], r[1:] * ((posterior.a - 1) / posterior.a).sqrt())
    assert r.min() < 0.2  # the blood serums: mean field is far too narrow here
    # KL: full rank's, plus the Gaussian value sum_i log P_ii - log|P| over two.
    full_loc, full_covariance = exact.gaussian_optimum(**data)
    extra = exact.gaussian_elbo(full_loc, full_covariance, **data) - exact.gaussian_elbo(
        loc, q_covariance, **data
    )
    torch.testing.assert_close(extra, 0.5 * (P.diagonal().log().sum() - torch.logdet(P)))


def test_exact_draws_have_the_exact_moments():
    q = some_member(0, 3)
    q = NormalInverseGamma(q.a + 20, q.b, q.m, q.V)  # light enough tails for a z-test of variances
    draws = q.sample(100_000, seed=0)
    z = torch.column_stack([draws["variance"].log(), draws["coefficients"]])
    mean, covariance = q.moments()
    centred = z - mean
    for statistic, expected in [
        (z, mean),
        (centred.square(), covariance.diagonal()),
        (centred[:, :1] * centred[:, 1:], covariance[0, 1:]),
        (centred[:, 1:2] * centred[:, 2:], covariance[1, 2:]),
    ]:
        error = (statistic.mean(0) - expected) / (statistic.std(0) / len(z) ** 0.5)
        assert error.abs().max() < Z


def test_simulated_truths_are_draws_from_their_posteriors():
    # Over data sets from the model, the posterior's distribution function at the truth is uniform:
    # model, simulate and exact agree, or this fails.
    uniform = []
    for seed in range(400):
        data, truth = simulate(seed, observations=12, predictors=2)
        q = exact.posterior(**data)
        scale = (q.b / q.a * q.V.diagonal()).sqrt()
        uniform.append(
            [
                scipy.stats.invgamma.cdf(truth["variance"], q.a, scale=q.b),
                *scipy.stats.t.cdf(truth["coefficients"], 2 * q.a, q.m, scale),
            ]
        )
    for values in np.transpose(uniform):
        assert scipy.stats.kstest(values, "uniform").pvalue > FALSE_ALARM


def test_predictive_is_the_ratio_of_evidences():
    data = load_data("train")
    new = load_data("test")
    q = exact.posterior(**data)
    for i in range(3):
        both = {
            "X": torch.cat([data["X"], new["X"][i : i + 1]]),
            "y": torch.cat([data["y"], new["y"][i : i + 1]]),
        }
        expected = exact.log_evidence(**both) - exact.log_evidence(**data)
        actual = q.predictive(new["X"][i : i + 1]).logpdf(new["y"][i].numpy())
        assert actual.item() == pytest.approx(expected.item(), abs=1e-8)
