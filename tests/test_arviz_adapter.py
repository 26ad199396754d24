"""Statistics from ArviZ, against known answers: they hold with every version of ArviZ installed.

``make arviz-versions`` runs this file and the tests of what uses it with several versions.
"""

import numpy as np
import pytest
from scipy.stats import norm

from vi_toolkit.arviz_adapter import ess, from_dict, mean_se, psislw, quantile_se, rhat, sd_se

CHAINS, N = 4, 20_000
TOTAL = CHAINS * N


def autoregressive(correlation, seed=0, shape=()):
    """Stationary Markov chains (CHAINS, N, *shape) of standard Normal draws."""
    noise = np.random.default_rng(seed).normal(size=(CHAINS, N, *shape))
    draws = noise.copy()
    for i in range(1, N):
        fresh = np.sqrt(1 - correlation**2) * noise[:, i]
        draws[:, i] = correlation * draws[:, i - 1] + fresh
    return draws


@pytest.mark.parametrize("correlation", [-0.5, 0.0, 0.8])
def test_effective_sample_size_and_error_of_the_mean(correlation):
    draws = autoregressive(correlation)
    size = TOTAL * (1 - correlation) / (1 + correlation)
    assert ess(draws, "mean") == pytest.approx(size, rel=0.1)
    assert ess(draws) == pytest.approx(size, rel=0.1)
    assert mean_se(draws) == pytest.approx(draws.std() / np.sqrt(size), rel=0.1)


@pytest.mark.parametrize("correlation", [-0.5, 0.0, 0.8])
def test_error_of_the_sd_counts_the_squares(correlation):
    """The squares of a Normal chain have the squared correlation, and the variance 2."""
    size = TOTAL * (1 - correlation**2) / (1 + correlation**2)
    assert sd_se(autoregressive(correlation)) == pytest.approx(1 / np.sqrt(2 * size), rel=0.1)


def test_error_of_the_sd_of_heavy_tails():
    draws = np.random.default_rng(0).laplace(size=(CHAINS, N))  # variance 2, fourth moment 24
    assert sd_se(draws) == pytest.approx(np.sqrt((24 - 4) / (4 * 2 * TOTAL)), rel=0.1)


@pytest.mark.parametrize("prob", [0.05, 0.5])
def test_error_of_a_quantile(prob):
    density = norm.pdf(norm.ppf(prob))
    expected = np.sqrt(prob * (1 - prob) / TOTAL) / density
    assert quantile_se(autoregressive(0.0), prob) == pytest.approx(expected, rel=0.1)


def test_tail_size_is_the_smaller_of_the_tails():
    draws = autoregressive(0.0)
    stuck = draws.copy()
    low = np.quantile(draws[0], 0.05)
    stuck[0] = np.where(stuck[0] < low, stuck[0] + 3, stuck[0])  # one chain avoids one tail
    assert ess(draws, "tail") == pytest.approx(TOTAL, rel=0.1)
    assert ess(stuck, "tail") < 0.1 * TOTAL


def test_rhat_of_one_distribution_of_shifted_and_of_wider_chains():
    draws = np.random.default_rng(0).normal(size=(CHAINS, 1000))
    assert rhat(draws) < 1.01
    assert rhat(draws + np.arange(CHAINS)[:, None]) > 1.3
    assert rhat(draws * np.array([1, 1, 1, 3])[:, None]) > 1.1  # equal means: only the ranks see it
    assert rhat(draws * np.array([1, 1, 1, 3])[:, None], "identity") < 1.01


def test_rhat_by_identity_is_that_of_gelman_and_rubin():
    draws = autoregressive(0.5)[:, :200]
    within = draws.var(1, ddof=1).mean()
    between = 200 * draws.mean(1).var(ddof=1)
    expected = np.sqrt((199 / 200 * within + between / 200) / within)
    assert rhat(draws, "identity") == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("statistic", [rhat, ess, mean_se, sd_se, lambda x: quantile_se(x, 0.1)])
def test_every_scalar_has_its_own(statistic):
    draws = autoregressive(0.3, shape=(2, 3))[:, :500]
    together = statistic(draws)
    assert together.shape == (2, 3)
    for index in np.ndindex(2, 3):
        alone = statistic(draws[:, :, *index])
        assert alone.shape == ()
        assert together[index] == pytest.approx(alone, rel=1e-12)


@pytest.mark.parametrize("shape", [0.2, 0.6, 1.2])
def test_k_hat_of_a_tail_with_known_shape(shape):
    uniform = np.random.default_rng(0).uniform(size=(8, 20_000))
    log_weights = -shape * np.log(uniform)
    before = log_weights.copy()
    smooth, k = psislw(log_weights)
    assert np.array_equal(log_weights, before)
    assert k.mean() == pytest.approx(shape, abs=0.05)
    np.testing.assert_allclose(np.exp(smooth).sum(1), 1)
    for row, log_row, k_row in zip(log_weights, smooth, k, strict=True):
        log_alone, k_alone = psislw(row)
        assert np.array_equal(log_alone, log_row)
        assert k_alone == k_row


NORMAL = np.random.default_rng(0).normal(size=1000)


@pytest.mark.parametrize(
    "log_weights",
    [
        NORMAL[:3],
        NORMAL[:15],
        np.zeros(1000),
        np.where(np.arange(1000) < 500, -1e300, 0.0),
        np.where(np.arange(1000) < 997, -1e300, NORMAL),
        np.r_[1e4, np.zeros(999)],
    ],
    ids=["three", "fifteen", "constant", "constant and zero", "three are not zero", "one"],
)
def test_tails_without_a_shape_have_an_infinite_k_hat(log_weights):
    smooth, k = psislw(log_weights)
    assert k == np.inf
    expected = np.exp(log_weights - log_weights.max())
    np.testing.assert_allclose(np.exp(smooth), expected / expected.sum())


def test_weights_of_a_hopeless_fit_are_not_usable():
    for log_weights in (50 * NORMAL, 1000 * NORMAL):
        smooth, k = psislw(log_weights)
        assert k > 1
        assert np.exp(smooth).max() > 0.99


def test_one_lost_set_does_not_spoil_the_others():
    smooth, k = psislw(np.stack([NORMAL, np.zeros(1000), NORMAL]))
    assert np.isinf(k).tolist() == [False, True, False]
    assert np.array_equal(smooth[0], smooth[2])
    np.testing.assert_allclose(np.exp(smooth).sum(1), 1)


def test_groups_dimensions_and_labels():
    groups = {"posterior": {"w": np.zeros((1, 5, 2))}, "observed_data": {"y": np.arange(3.0)}}
    tree = from_dict(groups, dims={"w": ("predictors",)}, coords={"predictors": ("age", "bmi")})
    assert tree["posterior"]["w"].dims == ("chain", "draw", "predictors")
    assert tree["posterior"]["predictors"].values.tolist() == ["age", "bmi"]
    assert tree["observed_data"]["y"].values.tolist() == [0, 1, 2]
