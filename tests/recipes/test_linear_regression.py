"""Conjugate linear regression: its data, its reference, and fits against the closed forms."""

import functools
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

import vi_toolkit as vi
from recipes.linear_regression import (
    GUIDES,
    coords,
    exact,
    load_data,
    model,
    reference,
    simulate,
    target_scale,
)
from recipes.linear_regression.exact import NormalInverseGamma
from recipes.linear_regression.guide import full_rank
from tests.tolerances import Z
from vi_toolkit.programs.joint import Joint

# --- data ------------------------------------------------------------------------------------


def test_splits_share_one_scale_and_no_row():
    everything, train, test = (load_data(split) for split in ("all", "train", "test"))
    assert everything["X"].shape == (442, 11)
    assert train["X"].shape == (342, 11)
    assert test["X"].shape == (100, 11)
    assert (everything["X"][:, 0] == 1).all()
    assert len(coords()["predictors"]) == 11
    rows = torch.cat([train["X"], test["X"]])
    assert len(torch.unique(rows, dim=0)) == len(torch.unique(everything["X"], dim=0)) == 442
    # Standardised by the training rows alone.
    torch.testing.assert_close(train["X"][:, 1:].mean(0), torch.zeros(10).double())
    torch.testing.assert_close(train["X"][:, 1:].std(0, correction=0), torch.ones(10).double())
    mean, sd = target_scale()
    assert mean + sd * everything["y"][0].item() == pytest.approx(151.0)  # the file's first row
    with pytest.raises(ValueError, match="all, train, test"):
        load_data("validation")


def test_simulate_leaves_the_callers_random_state_alone():
    before = torch.get_rng_state()
    first, _ = simulate(0)
    again, _ = simulate(0)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first["y"], again["y"])


# --- reference -------------------------------------------------------------------------------


def test_reference_describes_the_exact_draws():
    ours = reference()
    data = load_data()
    assert ours.names == Joint(model, data).names
    assert ours.log_evidence == exact.log_evidence(**data).item()
    draws = exact.posterior(**data).sample(100_000, seed=0)
    z = torch.column_stack([draws["variance"].log(), draws["coefficients"]]).numpy()
    for level, values in ours.quantiles.items():
        p = float(level.strip("%")) / 100
        below = (z < values).mean(0)
        assert (np.abs(below - p) < Z * math.sqrt(p * (1 - p) / len(z))).all()
    own = np.column_stack([draws["variance"], draws["coefficients"]])
    for row, values in zip(ours.sites, own.T, strict=True):
        assert abs(values.mean() - row["mean"]) < Z * row["sd"] / math.sqrt(len(values))
        for level in ("5%", "95%"):
            p = float(level.strip("%")) / 100
            below = (values < row[level]).mean()
            assert abs(below - p) < Z * math.sqrt(p * (1 - p) / len(values))


def test_reference_shape_is_that_of_the_known_laws():
    ours = reference()
    a = exact.posterior(**load_data()).a.item()
    skewness, kurtosis = scipy.stats.loggamma(a).stats("sk")  # log(variance) is minus a log-gamma
    np.testing.assert_allclose(ours.skewness[0], -skewness, rtol=1e-6)
    np.testing.assert_allclose(ours.excess_kurtosis[0], kurtosis, rtol=1e-6)
    np.testing.assert_allclose(ours.excess_kurtosis[1:], scipy.stats.t(2 * a).stats("k"), rtol=1e-9)
    assert ours.near_gaussian


def test_reference_file_is_the_exact_posterior():
    stored = vi.Reference.load(Path(exact.__file__).with_name("reference.json"))
    ours = reference()
    assert stored.kind == "exact"
    assert stored.names == ours.names
    assert stored.log_evidence == pytest.approx(ours.log_evidence, rel=1e-10)
    # Relative to the sds: another processor may round the last digits differently.
    assert np.abs((stored.mean - ours.mean) / ours.sd).max() < 1e-8
    np.testing.assert_allclose(stored.sd, ours.sd, rtol=1e-8)
    scale = np.outer(ours.sd, ours.sd)
    np.testing.assert_allclose(stored.covariance / scale, ours.covariance / scale, atol=1e-8)


# --- fits ------------------------------------------------------------------------------------


@functools.cache
def fitted(label):
    return vi.fit(model, GUIDES[label], load_data(), progress=False)


def gaussian(fit):
    """(loc, covariance) of a Gaussian fit over (log(variance), coefficients), from its params."""
    p = {name.partition(".")[2]: value for name, value in fit.params.items()}
    if "scale_tril" in p:
        factor = p["scale"][:, None] * p["scale_tril"]
        return p["loc"], factor @ factor.T
    loc = torch.cat([p["locs.variance"][None], p["locs.coefficients"]])
    sd = torch.cat([p["scales.variance"][None], p["scales.coefficients"]])
    return loc, torch.diag(sd**2)


def normal_inverse_gamma(fit):
    p = fit.params
    return NormalInverseGamma(p["a"], p["b"], p["m"], p["scale_tril"] @ p["scale_tril"].T)


def kl_of_fit(label):
    """KL(fitted q || posterior), in closed form."""
    data, fit = load_data(), fitted(label)
    if label == "exact family":
        return normal_inverse_gamma(fit).kl(exact.posterior(**data))
    return exact.log_evidence(**data) - exact.gaussian_elbo(*gaussian(fit), **data)


@pytest.mark.parametrize(
    ("label", "verdict"),
    [
        ("full-rank", "trust"),
        ("mean-field", "trust the means only"),
        ("exact family", "trust"),
    ],
)
def test_fit_agrees_with_the_exact_posterior(label, verdict):
    fit = fitted(label)
    assert fit.method == "deterministic"
    assert fit.converged
    comparison = vi.compare(fit, reference())
    comparison.assert_ok()
    assert comparison.verdict == verdict


@pytest.mark.parametrize("label", ["full-rank", "mean-field"])
def test_gaussian_fit_lands_on_the_optimum_in_closed_form(label):
    data, fit = load_data(), fitted(label)
    loc, covariance = gaussian(fit)
    best = exact.gaussian_optimum(**data, mean_field=label == "mean-field")
    posterior_sd = exact.posterior(**data).moments()[1].diagonal().sqrt()
    # The fit's only error is that of its fixed draws, and it says how large that is.
    tolerance = Z * fit.monte_carlo_error
    assert tolerance < 0.01
    assert ((loc - best[0]) / posterior_sd).abs().max() < tolerance
    sd, best_sd = covariance.diagonal().sqrt(), best[1].diagonal().sqrt()
    assert ((sd - best_sd) / posterior_sd).abs().max() < tolerance
    correlation = covariance / torch.outer(sd, sd)
    best_correlation = best[1] / torch.outer(best_sd, best_sd)
    assert (correlation - best_correlation).abs().max() < tolerance
    # An optimum is flat: the ELBO is below its maximum by the square of the errors.
    lost = exact.gaussian_elbo(*best, **data) - exact.gaussian_elbo(loc, covariance, **data)
    free = 24 if label == "mean-field" else 12 + 78
    assert 0 <= lost < free / 2 * tolerance**2


def test_exact_family_fit_is_the_posterior():
    fit, posterior = fitted("exact family"), exact.posterior(**load_data())
    assert kl_of_fit("exact family") < 1e-8
    q = normal_inverse_gamma(fit)
    sd = posterior.moments()[1].diagonal().sqrt()
    # KL is half the squared error in these units (sds; relative for a precision), or more.
    assert ((q.m - posterior.m) / sd[1:]).abs().max() < 1e-4
    assert abs(q.a / posterior.a - 1) < 1e-4
    assert abs(q.b / posterior.b - 1) < 1e-4


@pytest.mark.parametrize("label", GUIDES)
def test_log_evidence_minus_the_estimated_elbo_is_kl(label):
    elbo, se = fitted(label).elbo_estimate(10_000)
    gap = reference().log_evidence - elbo
    assert gap == pytest.approx(kl_of_fit(label).item(), abs=Z * se + 1e-8)


def test_held_out_score_is_the_exact_predictive_and_beats_the_intercept():
    train, test = load_data("train"), load_data("test")
    fit = vi.fit(model, full_rank, train, progress=False)
    draws = fit.sample(4000)
    law = torch.distributions.Normal(
        draws["coefficients"] @ test["X"].T, draws["variance"].sqrt()[:, None]
    )
    density = law.log_prob(test["y"]).exp()
    # Delta method; the draws are shared by all patients, so their errors may all go one way.
    se = (density.std(0) / density.mean(0) / 4000**0.5).mean().item()
    # Data processing: two predictive laws are no further apart (KL) than the laws of the latents.
    kl = exact.log_evidence(**train) - exact.gaussian_elbo(*gaussian(fit), **train)
    predictive = exact.posterior(**train).predictive(test["X"]).logpdf(test["y"])
    score = density.mean(0).log().mean().item()
    assert score == pytest.approx(predictive.mean(), abs=Z * se + kl.item())
    alone = exact.posterior(train["X"][:, :1], train["y"]).predictive(test["X"][:, :1])
    difference = predictive - alone.logpdf(test["y"])
    assert difference.mean() > Z * difference.std(ddof=1) / math.sqrt(len(difference))
