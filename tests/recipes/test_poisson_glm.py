"""Poisson regression and mixed model: fits against closed forms, closed forms against NUTS."""

from pathlib import Path

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch

import vi_toolkit as vi
from recipes.poisson_glm import (
    GUIDES,
    MIXED_LATENTS,
    MIXED_REFERENCE,
    coords,
    load_data,
    mixed,
    mixed_mean_field,
    model,
    simulate,
)
from recipes.poisson_glm.mcmc import log_rates, marginal
from recipes.poisson_glm.optimum import gaussian_optimum, mixed_elbo, mixed_optimum
from tests.recipes.checks import check_latents
from tests.tolerances import Z
from vi_toolkit.programs.joint import Joint

REFERENCE = Path(__file__).parents[2] / "recipes" / "poisson_glm" / "reference.json"
GLOBALS = 11  # intercept, nine coefficients, log sd


@pytest.fixture(scope="module")
def fits():
    return {k: vi.fit(model, g, load_data(), progress=False) for k, g in GUIDES.items()}


@pytest.fixture(scope="module")
def mixed_fit():
    return vi.fit(mixed, mixed_mean_field, load_data("sample"), progress=False)


@pytest.fixture(scope="module")
def mixed_exact():
    """Mean, sd, linear-response sd of the mixed model's best mean-field Gaussian: (111,) each."""
    mean, sd, covariance = mixed_optimum(**load_data("sample"))
    return mean, sd, np.sqrt(np.diag(covariance))


# --- data and models ------------------------------------------------------------------------


def test_splits():
    everything, cells, sample = (load_data(split) for split in ("all", "cells", "sample"))
    assert len(everything["y"]) == cells["exposure"].sum() == 20_190
    assert everything["y"].sum() == cells["y"].sum()
    torch.testing.assert_close(everything["X"].mean(0), torch.zeros(9).double())
    rows = {tuple(row) for row in everything["X"].tolist()}
    assert {tuple(row) for row in sample["X"].tolist()} <= rows
    assert len(rows) == len(cells["X"]) == 2_760
    assert len(coords()["predictors"]) == 9
    with pytest.raises(ValueError, match="cells, all, sample"):
        load_data("train")


def test_adding_up_people_with_the_same_predictors_loses_nothing():
    joints = [Joint(model, load_data(split)) for split in ("all", "cells")]
    generator = torch.Generator().manual_seed(0)
    points = 0.3 * torch.randn(5, 10, generator=generator, dtype=torch.float64)
    gaps = [float(joints[0].log_density(u) - joints[1].log_density(u)) for u in points]
    # Both are sums of 20,190 terms of size up to 100, in floating point.
    assert np.ptp(gaps) < 1e-8 * abs(gaps[0])


def test_mixed_model_has_its_plates():
    check_latents(mixed, MIXED_LATENTS, load_data("sample"), coords())
    data, truth = simulate(2, form=mixed)
    check_latents(mixed, MIXED_LATENTS, data, {"predictors": ["a", "b", "c"]})
    assert set(truth) == set(MIXED_LATENTS)


def test_marginal_is_the_mixed_model_integrated():
    data = load_data("sample")
    three = {name: value[[0, 1, int(data["y"].argmax())]] for name, value in data.items()}
    joint, whole = Joint(marginal, three), Joint(mixed, three)
    generator = torch.Generator().manual_seed(1)
    for u in 0.3 * torch.randn(3, GLOBALS, generator=generator, dtype=torch.float64):
        # Given the globals the people are independent: the integral is a product of three. At the
        # point `base` of the log rates, log p splits into the globals' part and each person's.
        eta, sd = u[0] + three["X"] @ u[1:10], u[10].exp()
        base = torch.cat([u, eta])
        logs = 0.0
        for n in range(3):
            at_eta = scipy.stats.norm.logpdf(0, 0, sd) + scipy.stats.poisson.logpmf(
                three["y"][n], eta[n].exp()
            )

            def density(x, n=n, sd=float(sd), eta=float(eta[n])):
                rate = np.exp(eta + x)
                return scipy.stats.norm.pdf(x, 0, sd) * scipy.stats.poisson.pmf(three["y"][n], rate)

            peak = float(np.log(max(float(three["y"][n]), 0.5)) - eta[n])
            integral = scipy.integrate.quad(
                density, -12 * float(sd), 12 * float(sd), points=[0, peak], epsabs=0, epsrel=1e-11
            )[0]
            logs += np.log(integral) - at_eta
        expected = float(whole.log_density(base)) + float(logs)
        assert float(joint.log_density(u)) == pytest.approx(expected, abs=1e-7)


def test_log_rates_are_drawn_from_their_conditional():
    X, y = torch.zeros(1, 9).double(), torch.tensor([4.0]).double()
    n = 20_000
    globals_ = {
        "intercept": torch.full((n,), 0.5).double(),
        "coefficients": torch.zeros(n, 9).double(),
        "sd": torch.full((n,), 0.8).double(),
    }
    draws = log_rates(globals_, X, y)[:, 0].numpy()
    grid = np.linspace(-6, 6, 4001)
    density = scipy.stats.norm.pdf(grid, 0.5, 0.8) * scipy.stats.poisson.pmf(4, np.exp(grid))
    density /= density.sum()
    mean = density @ grid
    sd = np.sqrt(density @ (grid - mean) ** 2)
    assert abs(draws.mean() - mean) < Z * sd / n**0.5
    assert abs(draws.std() / sd - 1) < Z * (0.5 / n) ** 0.5 * 1.1  # a little heavier than Normal


# --- the regression -------------------------------------------------------------------------


@pytest.mark.parametrize("path", [REFERENCE, MIXED_REFERENCE])
def test_references_were_admitted(path):
    made = vi.Reference.load(path).made
    assert made["chains"] >= 4
    assert made["r_hat"] < 1.01
    assert min(made["bulk_ess"], made["tail_ess"]) >= 1_000
    assert made["divergences"] == 0


@pytest.mark.parametrize("label", GUIDES)
def test_fit_lands_on_the_best_gaussian(fits, label):
    fit = fits[label]
    assert fit.converged
    mean, covariance = gaussian_optimum(**load_data(), mean_field=label == "mean-field")
    sd = np.sqrt(np.diag(covariance))
    n = 100_000
    draws = fit.sample(n)
    z = np.column_stack([draws["intercept"], draws["coefficients"]])
    tolerance = Z * np.hypot(fit.monte_carlo_error, n**-0.5)
    assert np.all(np.abs(z.mean(0) - mean) / sd < tolerance)
    assert np.all(np.abs(z.std(0) / sd - 1) < tolerance)


def test_verdicts_of_the_regression(fits):
    reference = vi.Reference.load(REFERENCE)
    assert reference.near_gaussian
    comparisons = {label: vi.compare(fit, reference) for label, fit in fits.items()}
    for comparison in comparisons.values():
        comparison.assert_ok()
    assert comparisons["full-rank"].verdict == "trust"
    assert comparisons["mean-field"].verdict == "trust the means only"
    assert comparisons["mean-field"].table["sd ratio"].min() < 0.8


def test_visits_are_overdispersed(fits):
    # Box's loop: under a Poisson regression the variance is the mean; the visits' is many times it.
    everything = load_data("all")
    draws = fits["full-rank"].sample(50)
    rate = (draws["intercept"][:, None] + draws["coefficients"] @ everything["X"].T).exp()
    observed = ((everything["y"] - rate) ** 2 / rate).mean(1)
    replicated = ((torch.poisson(rate) - rate) ** 2 / rate).mean(1)
    assert replicated.max() < 1.2
    assert observed.min() > 5


# --- the mixed model ------------------------------------------------------------------------


def test_mixed_elbo_is_the_expectation_of_the_joint(mixed_exact):
    data = load_data("sample")
    joint = Joint(mixed, data)
    mean, sd, _ = (torch.tensor(value) for value in mixed_exact)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20_000, len(mean), generator=generator, dtype=torch.float64)
    values = joint.log_densities(mean + sd * noise)
    entropy = sd.log().sum() + len(sd) * (np.log(2 * np.pi) + 1) / 2
    expected = mixed_elbo(torch.stack([mean, sd.log()]), **data) - entropy
    assert abs(float(values.mean() - expected)) < Z * float(values.std()) / 20_000**0.5


def test_mixed_fit_and_its_linear_response_are_the_closed_form(mixed_fit, mixed_exact):
    mean, sd, response_sd = (value[:GLOBALS] for value in mixed_exact)
    names = mixed_fit.joint.names[:GLOBALS]
    response = vi.linear_response(mixed_fit, names)
    assert response.optimum
    # The fit's own account of its Monte Carlo error; the curvature is from the same draws.
    tolerance = Z * mixed_fit.monte_carlo_error
    assert np.all(np.abs(response.mean - mean) / sd < tolerance)
    assert np.all(np.abs(np.log(response.guide_sd / sd)) < tolerance)
    assert np.all(np.abs(np.log(response.sd / response_sd)) < tolerance)


def test_mean_field_is_too_narrow_and_linear_response_is_not(mixed_exact):
    reference = vi.Reference.load(MIXED_REFERENCE)
    mean, sd, response_sd = mixed_exact
    assert reference.names[0] == "intercept"
    assert reference.names[GLOBALS - 1] == "log(sd)"
    # Two people of the sample are in poor health, and neither saw a doctor. Their rates and that
    # coefficient cannot be told apart, and are skewed (-0.95): linear response falls short there.
    poor = reference.names.index(f"coefficients[{coords()['predictors'].index('health poor')}]")
    theirs = reference.names.index("log_rate[0]") + np.flatnonzero(
        load_data("sample")["X"][:, -1] > 1
    )
    assert len(theirs) == 2
    usual = np.setdiff1d(np.arange(len(mean)), [poor, *theirs])
    assert abs(reference.skewness[poor]) > 0.9
    assert np.abs(reference.skewness[usual]).max() < 0.6
    ratio, corrected = sd / reference.sd, response_sd / reference.sd
    assert ratio[:GLOBALS].max() < 0.75
    # 10 % holds the response's own error, up to 6 %, and the reference's standard error of 1.4 %.
    assert np.abs(np.log(corrected[usual])).max() < np.log(1.1)
    assert corrected[poor] < 0.85
    # What it does not mend: the means, which the wrong widths have moved.
    errors = (mean - reference.mean) / reference.sd
    assert errors[reference.names.index("intercept")] > 0.2
