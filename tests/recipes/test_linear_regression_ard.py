"""Automatic relevance determination: what is exact, fits against NUTS, and the simulated design."""

from pathlib import Path

import numpy as np
import pyro.poutine as poutine
import pytest
import scipy.stats
import torch

import vi_toolkit as vi
from recipes.linear_regression_ard import (
    GUIDES,
    collapsed,
    compress,
    coords,
    draw_relevance,
    load_data,
    model,
    of_collapsed,
    simulate,
)
from recipes.linear_regression_ard.evaluate import log_predictive_densities
from tests.tolerances import Z
from vi_toolkit.programs.joint import Joint

REFERENCE = Path(__file__).parents[2] / "recipes" / "linear_regression_ard" / "reference.json"


def log_density(form, values, data):
    return poutine.trace(poutine.condition(form, values)).get_trace(**data).log_prob_sum().item()


@pytest.fixture(scope="module")
def reference():
    return vi.Reference.load(REFERENCE)


# --- data and exact identities --------------------------------------------------------------


def test_splits_and_names():
    everything, train, test = (load_data(split) for split in ("all", "train", "test"))
    assert everything["X"].shape == (442, 64)
    assert (len(train["y"]), len(test["y"])) == (342, 100)
    torch.testing.assert_close(train["X"].mean(0), torch.zeros(64).double())
    torch.testing.assert_close(train["X"].std(0, correction=0), torch.ones(64).double())
    names = coords()["predictors"]
    assert len(set(names)) == 64
    # A product is the product: undo the second standardisation by regressing on it.
    i, j, k = names.index("bmi"), names.index("bp"), names.index("bmi:bp")
    product = train["X"][:, i] * train["X"][:, j]
    correlation = torch.corrcoef(torch.stack([product, train["X"][:, k]]))[0, 1]
    assert correlation == pytest.approx(1.0, abs=1e-12)
    with pytest.raises(ValueError, match="train, test"):
        load_data("validation")


def test_simulated_design():
    data, truth = simulate(0)
    assert data["X"].shape == (10_000, 250)
    assert int((truth["coefficients"] == 0).sum()) == 125
    assert truth["relevance"].isinf().sum() == 125
    residual = data["y"] - data["X"] @ truth["coefficients"]
    assert abs(float(residual.var()) - 1) < Z * (2 / 10_000) ** 0.5


def test_compressed_data_have_the_same_posterior():
    data, _ = simulate(1, observations=300, predictors=6)
    small = compress(**data)
    assert small["X"].shape == (6, 6)
    rng = np.random.default_rng(0)
    for form in (model, collapsed):
        gaps = []
        for _ in range(5):
            values = {
                "variance": torch.tensor(np.float64(rng.gamma(2.0))),
                "relevance": torch.tensor(rng.gamma(1.0, size=6)),
                "coefficients": torch.tensor(rng.normal(size=6)),
            }
            if form is collapsed:
                del values["relevance"]
            gaps.append(log_density(form, values, data) - log_density(form, values, small))
        assert np.ptp(gaps) < 1e-8


def test_collapsed_model_and_exact_relevances_make_the_model():
    # log p(model) - log p(collapsed) = log Gamma density of the relevances, at every point.
    data, _ = simulate(2, observations=20, predictors=3)
    rng = np.random.default_rng(1)
    for _ in range(5):
        variance, w = np.float64(rng.gamma(2.0)), rng.normal(size=3)
        relevance = rng.gamma(1.0, size=3)
        values = {"variance": torch.tensor(variance), "coefficients": torch.tensor(w)}
        whole = log_density(model, values | {"relevance": torch.tensor(relevance)}, data)
        part = log_density(collapsed, values, data)
        gamma = scipy.stats.gamma(1.5, scale=1 / (1 + w**2 / (2 * variance)))
        assert whole - part == pytest.approx(gamma.logpdf(relevance).sum(), abs=1e-9)


def test_drawn_relevances():
    draws = {"variance": torch.full((50_000,), 2.0), "coefficients": torch.full((50_000, 1), 3.0)}
    relevance = draw_relevance(draws).double()
    # Gamma(3/2, 1 + 9/4): mean 6/13, variance 1.5 / 3.25^2.
    assert abs(float(relevance.mean()) - 1.5 / 3.25) < Z * (1.5 / 3.25**2 / 50_000) ** 0.5


def test_log_predictive_densities_by_hand():
    draws = {
        "coefficients": torch.tensor([[1.0], [2.0]]).double(),
        "variance": torch.tensor([1.0, 4.0]).double(),
    }
    X, y = torch.tensor([[1.0]]).double(), torch.tensor([1.5]).double()
    expected = np.log((scipy.stats.norm.pdf(1.5, 1, 1) + scipy.stats.norm.pdf(1.5, 2, 2)) / 2)
    assert float(log_predictive_densities(draws, X, y)[0]) == pytest.approx(expected)


# --- fits -----------------------------------------------------------------------------------


def test_reference_was_admitted(reference):
    made = reference.made
    assert made["chains"] >= 4
    assert made["r_hat"] < 1.01
    assert min(made["bulk_ess"], made["tail_ess"]) >= 1_000
    assert made["divergences"] == 0


@pytest.fixture(scope="module")
def fit():
    return vi.fit(collapsed, of_collapsed, load_data(), progress=False)


@pytest.fixture(scope="module")
def draws(fit):
    """100,000 of them, relevances included, as the guide `conditional` gives them."""
    own = fit.sample(100_000)
    return own | {"relevance": draw_relevance(own)}


def test_conditional_guide_is_of_collapsed_and_the_exact_relevances():
    data, truth = simulate(3, observations=20, predictors=3)
    values = {"coefficients": truth["coefficients"], "variance": truth["variance"]}
    with_relevance = values | {"relevance": torch.tensor([0.5, 1.0, 3.0]).double()}
    # The ELBO's integrand is the same number, whatever the relevances are.
    whole = log_density(model, with_relevance, data)
    whole -= log_density(GUIDES["conditional"], with_relevance, data)
    part = log_density(collapsed, values, data) - log_density(of_collapsed, values, data)
    assert whole == pytest.approx(part, abs=1e-9)


def test_recommended_guide_is_right(draws, reference):
    joint = Joint(model, load_data())
    u = joint.flatten(draws).numpy()
    assert joint.names == reference.names
    error = (u.mean(0) - reference.mean) / reference.sd
    standard_error = np.hypot(reference.mean_se / reference.sd, len(u) ** -0.5)
    assert np.all(np.abs(error) < 0.05 + Z * standard_error)
    # Its family has one free scale per column of a fixed root, not a free covariance: a product's
    # coefficient is 7 % too narrow, and no other sd is further off.
    ratio_error = np.hypot(reference.sd_se / reference.sd, (2 * len(u)) ** -0.5)
    assert np.all(np.abs(np.log(u.std(0) / reference.sd)) < np.log(1.05) + Z * ratio_error)


def test_predicts_no_worse_than_the_ten_measurements_alone(draws):
    # 54 useless predictors more must not cost much where relevance is determined; ridge with the
    # prior's own width, relevance fixed at one, is what they cost without it.
    train, test = load_data(), load_data("test")
    ard = log_predictive_densities({k: draws[k][:2_000] for k in draws}, **test)
    X, y = train["X"][:, :10], train["y"]
    precision = X.T @ X + torch.eye(10)
    mean = torch.linalg.solve(precision, X.T @ y)
    variance = (y - X @ mean).square().sum() / (len(y) - 10)
    tril = torch.linalg.cholesky(variance * torch.linalg.inv(precision))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2_000, 10, generator=generator, dtype=torch.float64)
    small = {"coefficients": mean + noise @ tril.T, "variance": variance.expand(2_000)}
    ten = log_predictive_densities(small, test["X"][:, :10], test["y"])
    gap = ard - ten
    # Paired over 100 patients: not worse by more than chance allows.
    assert gap.mean() > -Z * gap.std() / 10
