"""Logistic regression: one datum against quadrature, 426 patients against NUTS, and predictions."""

from pathlib import Path

import numpy as np
import pyro.poutine as poutine
import pytest
import scipy.integrate
import scipy.stats
import torch
from pyro.infer.autoguide import AutoMultivariateNormal
from scipy.special import expit, log_expit

import vi_toolkit as vi
from recipes.logistic_regression import (
    GUIDES,
    full_rank,
    guide,
    load_data,
    model,
    one_datum,
    simulate,
)
from recipes.logistic_regression.evaluate import (
    calibration_error,
    chance_calibration_error,
    difference,
    log_predictive_density,
    nuts_predictive_logits,
    point_estimate,
    predictive_logits,
    reliability,
    scores,
)
from recipes.logistic_regression.optimum import elbo, gaussian_optimum
from tests.tolerances import Z

REFERENCE = Path(__file__).parents[2] / "recipes" / "logistic_regression" / "reference.json"
FALSE_ALARM = 2 * scipy.stats.norm.sf(Z)
DRAWS = 20_000


@pytest.fixture(scope="module")
def reference():
    return vi.Reference.load(REFERENCE)


@pytest.fixture(scope="module")
def fits():
    return {k: vi.fit(model, g, load_data(), progress=False) for k, g in GUIDES.items()}


@pytest.fixture(scope="module")
def comparisons(fits, reference):
    return {label: vi.compare(fit, reference) for label, fit in fits.items()}


@pytest.fixture(scope="module")
def predictions(fits):
    """label -> predictive logits of the 143 held-out patients."""
    X = load_data("test")["X"]
    vi_logits = {k: predictive_logits(fit.sample(DRAWS), X) for k, fit in fits.items()}
    return vi_logits | {
        "NUTS": nuts_predictive_logits(),
        "maximum likelihood": predictive_logits(point_estimate(**load_data()), X),
    }


def moments(fit):
    """Mean (31,) and covariance (31, 31) of a fitted Gaussian, from its parameters."""
    params = {name.partition(".")[2]: value.numpy() for name, value in fit.params.items()}
    if fit.guide_family == "full-rank":
        root = params["scale"][:, None] * params["scale_tril"]
        return params["loc"], root @ root.T
    loc, scale = (
        np.append(params[f"{part}.intercept"], params[f"{part}.coefficients"])
        for part in ("locs", "scales")
    )
    return loc, np.diag(scale**2)


# --- one datum: exact -----------------------------------------------------------------------

# Posterior mean and sd; VI mean, sd, ELBO and KL; Laplace mean and sd. Computed independently of
# this code (another quadrature rule, another optimiser) and rounded to the digits shown.
TABLE = {
    1: (0.41324193, 0.91062128, 0.41312682, 0.91042204, -0.69322547, 7.829e-5, 0.401058, 0.897950),
    2: (0.60570551, 0.79568891, 0.60349655, 0.79144167, -0.69551815, 2.371e-3, 0.521298, 0.751467),
    5: (0.75144854, 0.65979170, 0.74301238, 0.61822543, -0.72644805, 3.330e-2, 0.458575, 0.569564),
    -3: (
        -0.68902743, 0.72473526, -0.68347498, 0.71027704, -0.70274427, 9.597e-3, -0.520410, 0.660760
    ),
    10: (0.78519120, 0.61925340, 0.78484367, 0.52436009, -0.78849614, 9.535e-2, 0.335927, 0.485275),
}  # fmt: skip

every_x = pytest.mark.parametrize("x", TABLE)


@every_x
def test_quadrature_table(x):
    mean, sd, log_evidence = one_datum.exact_posterior(x)
    q, laplace = one_datum.gaussian_optimum(x), one_datum.laplace(x)
    ours = (mean, sd, q.mean, q.sd, q.elbo, log_evidence - q.elbo, laplace.mean, laplace.sd)
    # The KL column has four significant digits, the last two columns six decimals.
    half_digit = [0.0] * 5 + [5e-4 * TABLE[x][5], 5e-7, 5e-7]
    assert np.all(np.abs(np.subtract(ours, TABLE[x])) <= 1e-6 + np.array(half_digit))


@every_x
def test_exact_posterior_by_another_route(x):
    # Adaptive quadrature of the density, whose constant is exact; and since the posterior is the
    # prior plus an odd function, E z^2 = 1.
    mean, sd, log_evidence = one_datum.exact_posterior(x)
    moment = [
        scipy.integrate.quad(lambda z, p=p: z**p * one_datum.density(z, x), -12, 12, points=[0])[0]
        for p in (0, 1)
    ]
    assert moment == pytest.approx([1.0, mean], abs=1e-8)
    assert mean**2 + sd**2 == pytest.approx(1.0, abs=1e-12)
    assert log_evidence == pytest.approx(-np.log(2), abs=1e-12)


@every_x
def test_toolkit_quadrature_agrees(x):
    reference = vi.Reference.quadrature(one_datum.model, one_datum.data(x))
    mean, sd, log_evidence = one_datum.exact_posterior(x)
    found = [reference.mean[0], reference.sd[0], reference.log_evidence]
    assert found == pytest.approx([mean, sd, log_evidence], abs=1e-7)


@every_x
def test_elbo_is_largest_at_the_optimum_and_below_the_evidence(x):
    q = one_datum.gaussian_optimum(x)
    h = 1e-4
    for mean, sd in (
        (q.mean + h, q.sd),
        (q.mean - h, q.sd),
        (q.mean, q.sd + h),
        (q.mean, q.sd - h),
    ):
        assert one_datum.elbo(mean, sd, x) < q.elbo
    assert one_datum.laplace(x).elbo < q.elbo < one_datum.LOG_EVIDENCE


def test_pyro_model_is_the_model_of_the_formulas():
    data = one_datum.data(2.0)
    for z in (-1.5, 0.0, 0.7):
        fixed = poutine.condition(one_datum.model, {"z": torch.tensor(z, dtype=torch.float64)})
        log_joint = poutine.trace(fixed).get_trace(**data).log_prob_sum()
        expected = np.log(one_datum.density(z, 2.0)) + one_datum.LOG_EVIDENCE
        assert log_joint.item() == pytest.approx(expected, abs=1e-12)


# --- one datum: VI --------------------------------------------------------------------------


def test_stochastic_vi_lands_on_the_optimum():
    x, exact = 2, one_datum.gaussian_optimum(2)
    solutions = []
    for seed in range(8):
        fit = vi.fit(
            one_datum.model,
            one_datum.guide,
            one_datum.data(x),
            method="stochastic",
            steps=2_000,
            seed=seed,
            progress=False,
        )
        assert fit.method == "stochastic"
        mean, error = fit.elbo_estimate(2_000)
        assert mean <= one_datum.LOG_EVIDENCE + Z * error
        solutions.append([float(fit.params[f"AutoNormal.{part}.z"]) for part in ("locs", "scales")])
    solutions = np.array(solutions)
    standard_error = solutions.std(0, ddof=1) / np.sqrt(len(solutions))
    assert np.all(standard_error < 0.03 * exact.sd)  # or the next line would say little
    assert np.all(np.abs(solutions.mean(0) - [exact.mean, exact.sd]) < 4 * standard_error)


@every_x
def test_deterministic_vi_lands_on_the_optimum(x):
    exact = one_datum.gaussian_optimum(x)
    fit = vi.fit(one_datum.model, one_datum.guide, one_datum.data(x), progress=False)
    assert fit.method == "deterministic"
    tolerance = Z * fit.monte_carlo_error * exact.sd
    assert abs(float(fit.params["AutoNormal.locs.z"]) - exact.mean) < tolerance
    assert abs(float(fit.params["AutoNormal.scales.z"]) - exact.sd) < tolerance


# --- data and model -------------------------------------------------------------------------


def test_splits_share_one_scale_and_no_row():
    everything, train, test = (load_data(split) for split in ("all", "train", "test"))
    assert [len(d["y"]) for d in (everything, train, test)] == [569, 426, 143]
    rows = torch.cat([train["X"], test["X"]])
    assert len(torch.unique(rows, dim=0)) == len(torch.unique(everything["X"], dim=0)) == 569
    # Standardised by the training rows alone, and with the same share of malignant masses.
    torch.testing.assert_close(train["X"].mean(0), torch.zeros(30).double())
    torch.testing.assert_close(train["X"].std(0, correction=0), torch.ones(30).double())
    assert abs(train["y"].mean() - test["y"].mean()) < 1 / 143
    assert everything["y"].sum() == 212  # malignant, as the data's own description counts them
    with pytest.raises(ValueError, match="all, train, test"):
        load_data("validation")


def test_simulated_data_give_back_their_truth():
    data, truth = simulate(seed=3, observations=2_000, predictors=4)
    truth = torch.cat([truth["intercept"][None], truth["coefficients"]]).numpy()
    mean, covariance = gaussian_optimum(**data)
    distance = (truth - mean) @ np.linalg.solve(covariance, truth - mean)
    assert scipy.stats.chi2(len(truth)).sf(distance) > FALSE_ALARM


# --- the posterior --------------------------------------------------------------------------


@pytest.mark.parametrize("in_mean_field", [False, True])
def test_gaussian_optimum_is_the_maximum(in_mean_field):
    data = load_data()
    mean, covariance = gaussian_optimum(**data, mean_field=in_mean_field)
    best = elbo(mean, covariance, **data)
    rng = np.random.default_rng(0)
    root = np.linalg.cholesky(covariance)
    for _ in range(20):
        step = rng.normal(size=31) * 0.02
        change = np.eye(31) + 0.02 * np.diag(rng.normal(size=31))
        if not in_mean_field:
            change = change + np.tril(0.02 * rng.normal(size=(31, 31)), -1)
        other = root @ change
        assert elbo(mean + root @ step, other @ other.T, **data) < best


@pytest.mark.parametrize("label", GUIDES)
def test_fit_lands_on_the_best_gaussian(fits, label):
    fit = fits[label]
    assert fit.method == "deterministic"
    assert fit.converged
    mean, covariance = moments(fit)
    best_mean, best_covariance = gaussian_optimum(**load_data(), mean_field=label == "mean-field")
    sd = np.sqrt(np.diag(best_covariance))
    tolerance = Z * fit.monte_carlo_error
    assert np.all(np.abs(mean - best_mean) / sd < tolerance)
    assert np.all(np.abs(np.sqrt(np.diag(covariance)) / sd - 1) < tolerance)
    # The quadrature's ELBO of this very q is Pyro's, constants included, and below the best one.
    ours = elbo(mean, covariance, **load_data())
    theirs, error = fit.elbo_estimate(5_000)
    assert abs(ours - theirs) < Z * error
    assert ours < elbo(best_mean, best_covariance, **load_data())


def test_reference_was_admitted(reference):
    made = reference.made
    assert reference.kind == "nuts"
    assert made["chains"] >= 4
    assert made["r_hat"] < 1.01
    assert min(made["bulk_ess"], made["tail_ess"]) >= 1_000
    assert made["divergences"] == 0


def test_reference_agrees_with_importance_sampling(reference):
    # An independent route to the same posterior: Student-t proposals around the best Gaussian,
    # reweighted. Shares no code with NUTS, nor the model with Pyro.
    data = load_data()
    mean, covariance = gaussian_optimum(**data)
    proposal = scipy.stats.multivariate_t(mean, covariance * 1.1, df=30, seed=0)
    z = proposal.rvs(50_000)
    A = np.column_stack([np.ones(len(data["X"])), data["X"].numpy()])
    prior_sd = np.r_[2.5, np.ones(30)]
    log_joint = log_expit((z @ A.T) * (2 * data["y"].numpy() - 1)).sum(1)
    log_joint += scipy.stats.norm(0, prior_sd).logpdf(z).sum(1)
    log_weights = log_joint - proposal.logpdf(z)
    w = np.exp(log_weights - log_weights.max())
    w /= w.sum()
    assert 1 / (w**2).sum() > 5_000  # effective draws
    order = [reference.names.index(name) for name in names_of(reference)]
    for power, expected, standard_error in (
        (1, reference.mean[order], reference.mean_se[order]),
        (2, reference.sd[order], reference.sd_se[order]),
    ):
        values = z if power == 1 else (z - w @ z) ** 2
        found = w @ values
        error = np.sqrt((w**2) @ (values - found) ** 2)
        if power == 2:
            found, error = np.sqrt(found), error / (2 * np.sqrt(found))
        assert np.all(np.abs(found - expected) < Z * np.hypot(error, standard_error))


def names_of(reference):
    """The reference's names in the order intercept, coefficients[0], ..."""
    return ["intercept"] + [f"coefficients[{i}]" for i in range(len(reference.names) - 1)]


def test_full_rank_is_right(comparisons):
    comparison = comparisons["full-rank"]
    comparison.assert_ok()
    assert comparison.verdict == "trust"
    assert guide is full_rank


def test_mean_field_is_wrong_as_theory_says(comparisons, reference):
    comparison = comparisons["mean-field"]
    table = comparison.table
    ratio, r = table["sd ratio"], table["expected sd ratio"]
    # Too narrow by r_i, a factor of two for some.
    assert np.all(np.abs(np.log(ratio / r)) < np.log(1.05))
    assert r.min() < 0.5
    # A Gaussian posterior would leave the means right. This one does not, and the distance is that
    # of the family's own optimum, not an optimiser's.
    mean, _ = gaussian_optimum(**load_data(), mean_field=True)
    order = [names_of(reference).index(name) for name in reference.names]
    predicted = (mean[order] - reference.mean) / reference.sd
    assert np.abs(predicted).max() > 0.15
    assert np.allclose(table["mean error"], predicted, atol=Z * 0.02, rtol=0)
    assert comparison.verdict == "do not trust"
    with pytest.raises(AssertionError):
        comparison.assert_ok()


def test_a_slightly_wrong_prior_is_refused(reference):
    def wrong(X, y=None):
        return model(X, y, coefficient_scale=1.1)

    fit = vi.fit(wrong, AutoMultivariateNormal, load_data(), progress=False)
    with pytest.raises(AssertionError):
        vi.compare(fit, reference).assert_ok()


# --- predictions ----------------------------------------------------------------------------


def test_training_data_are_separable_so_maximum_likelihood_does_not_exist():
    data, test = load_data(), load_data("test")
    norms, densities = [], []
    for tolerance in (1e-2, 1e-4, 1e-6):
        estimate = point_estimate(**data, tolerance=tolerance)
        norms.append(estimate["coefficients"].norm().item())
        logits = predictive_logits(estimate, test["X"])
        densities.append(log_predictive_density(logits, test["y"]).mean())
    margins = (2 * data["y"].numpy() - 1) * predictive_logits(estimate, data["X"])
    assert margins.min() > 0  # a separating plane: scaled up, its likelihood tends to one
    assert norms[0] < norms[1] < norms[2]
    assert densities[0] > densities[1] > densities[2]


@pytest.mark.parametrize(("label", "largest"), [("full-rank", 0.02), ("mean-field", 0.08)])
def test_vi_predicts_as_nuts_does(predictions, label, largest):
    y = load_data("test")["y"]
    # In probability, and in nats per patient, where 0.01 is the margin for calling methods equal.
    assert np.abs(expit(predictions[label]) - expit(predictions["NUTS"])).max() < largest
    gain, error = difference(predictions[label], predictions["NUTS"], y)
    assert abs(gain) + 1.96 * error < 0.01


def test_bayes_beats_maximum_likelihood(predictions):
    y = load_data("test")["y"]
    table = scores(predictions, y)
    for label in ("full-rank", "mean-field", "NUTS"):
        gain, error = difference(predictions[label], predictions["maximum likelihood"], y)
        assert gain > 1.96 * error
        assert table.loc[label, "accuracy"] > 0.94
        low, _, high = chance_calibration_error(predictions[label])
        assert low < calibration_error(predictions[label], y) < high


def test_scores_by_hand():
    logits = np.log([1 / 99, 1.0, 99.0, 99.0])  # probabilities 0.01, 0.5, 0.99, 0.99
    y = torch.tensor([0.0, 1.0, 1.0, 0.0])
    density = np.log([0.99, 0.5, 0.99, 0.01])
    assert log_predictive_density(logits, y) == pytest.approx(density)
    row = scores({"a": logits}, y).loc["a"]
    assert row["log predictive density"] == pytest.approx(density.mean())
    assert row["se"] == pytest.approx(density.std(ddof=1) / 2)
    assert row["accuracy"] == 0.5  # a probability of exactly one half predicts 0
    # Bins: {0.01}, {0.5}, {0.99, 0.99}.
    assert row["calibration error"] == pytest.approx((0.01 + 0.5 + 2 * 0.49) / 4)
    table = reliability(logits, y)
    assert table["patients"].tolist() == [1, 1, 2]
    assert table["observed"].tolist() == [0.0, 1.0, 0.5]
    mean, error = difference(logits, logits, y)
    assert mean == error == 0


def test_calibration_tells_overconfidence():
    p = expit(np.random.default_rng(0).normal(0, 2, size=3_000))
    logits = np.log(p / (1 - p))
    y = torch.bernoulli(torch.tensor(p))
    low, _, high = chance_calibration_error(logits, simulations=200)
    assert low < calibration_error(logits, y) < high
    assert calibration_error(2 * logits, y) > chance_calibration_error(2 * logits, 200)[2]


def test_predictive_logits_survive_certainty():
    # 1 - sigmoid(800) is zero in floating point; its logarithm is -800.
    logits = predictive_logits(
        {"intercept": torch.zeros(1).double(), "coefficients": torch.ones(1, 1).double()},
        torch.tensor([[800.0]]).double(),
    )
    assert log_predictive_density(logits, torch.tensor([0.0])) == pytest.approx([-800])
