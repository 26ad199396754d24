"""Predictive checks pass on data from the model and fail on data from another."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import vi_toolkit as vi
from recipes.logistic_regression import model as logistic_regression
from recipes.logistic_regression import simulate
from tests.support import fitted
from tests.tolerances import Z
from vi_toolkit.diagnostics.predictive import spiegelhalter


def one_mean(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("observations", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def counts(y):
    rate = pyro.sample("rate", dist.Gamma(1.0, 0.1))
    with pyro.plate("observations", len(y)):
        pyro.sample("y", dist.Poisson(rate), obs=y)


def normal(n, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_data_from_the_model_pass_and_their_elpd_is_exact():
    y = 1 + normal(40)
    fit = fitted(one_mean, AutoNormal, {"y": y})
    found = vi.predictive_check(fit, num_draws=4_000)
    assert found.failed == []
    assert "right uncertainty" in found.meaning
    # Left out, y_i is Normal around the others' posterior mean: known in closed form.
    precision = 1 / 4 + len(y) - 1
    mean = (y.sum() - y) / precision
    exact = dist.Normal(mean, (1 + 1 / precision) ** 0.5)
    elpd = [vi.predictive_check(fit, num_draws=1_000, seed=s).elpd_loo for s in range(8)]
    error = np.std(elpd, ddof=1) / 8**0.5
    assert abs(np.mean(elpd) - float(exact.log_prob(y).sum())) < Z * error
    # 4,000 draws: an sd of at most 0.5 / sqrt(4000) = 0.008 for each, by 4.5.
    assert np.abs(found.pit - exact.cdf(y).numpy()).max() < 0.036
    assert found.p_loo == pytest.approx(1, abs=0.5)


def test_leave_one_out_corrects_for_a_wrong_guide():
    """A guide twice too wide around the wrong place gives the posterior's elpd all the same."""

    def wide(y):
        shift = pyro.param("shift", torch.tensor(0.0).double())
        sd = 2 / len(y) ** 0.5
        pyro.sample("mu", dist.Normal(y.mean() + sd / 2 + 0 * shift, sd))

    y = 1 + normal(40)
    elpd = {}
    for guide, options in ((wide, {"steps": 1}), (AutoNormal, {})):
        fit = fitted(one_mean, guide, {"y": y}, **options)
        checks = [vi.predictive_check(fit, num_draws=2_000, seed=s) for s in range(8)]
        elpd[guide] = np.array([check.elpd_loo for check in checks])
    gap = elpd[wide].mean() - elpd[AutoNormal].mean()
    assert abs(gap) < Z * np.sqrt(sum(x.var(ddof=1) / 8 for x in elpd.values()))


def test_a_wrong_spread_and_heavy_tails_fail(tmp_path):
    wide = vi.predictive_check(fitted(one_mean, AutoNormal, {"y": 2 * normal(60)}))
    assert {"sd", "calibration"} <= set(wide.failed)
    assert "sd of the data" in repr(wide)
    y = normal(60)
    y[3] = 9.0
    assert "maximum" in vi.predictive_check(fitted(one_mean, AutoNormal, {"y": y})).failed
    wide.plot().savefig(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_poisson_counts_pass_and_overdispersed_counts_fail():
    generator = torch.Generator().manual_seed(1)
    right = torch.poisson(torch.full((150,), 4.0), generator=generator)
    found = vi.predictive_check(fitted(counts, AutoNormal, {"y": right}))
    assert found.failed == []
    rates = 4 * torch.rand(150, generator=generator) * 2
    found = vi.predictive_check(
        fitted(counts, AutoNormal, {"y": torch.poisson(rates, generator=generator)}),
        statistics={"variance over mean": lambda y: y.var() / y.mean()},
    )
    assert "variance over mean" in found.failed
    assert "calibration" in found.failed


def test_calibrated_binary_data_pass_and_overconfident_predictions_fail(tmp_path):
    data, _ = simulate(0, observations=300, predictors=2)
    fit = fitted(logistic_regression, AutoMultivariateNormal, data)
    found = vi.predictive_check(fit)
    assert found.failed == []
    assert list(found.table.index) == ["mean"]
    assert found.pit is None
    found.plot().savefig(tmp_path / "page.png")

    def overconfident(X, y):
        """Known coefficients, far too large."""
        pyro.sample("nothing", dist.Normal(0.0, 1.0))
        with pyro.plate("observations", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=6 * X[:, 0]), obs=y)

    y = torch.bernoulli(torch.sigmoid(data["X"][:, 0]), generator=torch.Generator().manual_seed(0))
    found = vi.predictive_check(fitted(overconfident, AutoNormal, {"X": data["X"], "y": y}))
    assert "calibration" in found.failed


def test_spiegelhalters_test_keeps_its_level():
    rng = np.random.default_rng(0)
    p = rng.uniform(0.05, 0.95, size=(500, 200))
    found = [spiegelhalter(row, (rng.uniform(size=200) < row).astype(float)) for row in p]
    assert scipy.stats.kstest(found, "uniform").pvalue > 1e-5
    assert np.isnan(spiegelhalter(np.full(5, 0.5), np.ones(5)))


def test_an_influential_datum_is_named():
    """One datum far out decides a coefficient of its own, so that it cannot be left out."""

    def own_coefficient(y):
        b = pyro.sample("b", dist.Normal(0.0, 30.0))
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        first = torch.zeros(len(y)).double()
        first[0] = 1.0
        with pyro.plate("observations", len(y)):
            pyro.sample("y", dist.Normal(mu + b * first, 0.5), obs=y)

    y = normal(20) * 0.5
    y[0] = 40.0
    found = vi.predictive_check(fitted(own_coefficient, AutoMultivariateNormal, {"y": y}))
    assert found.pareto_k.argmax() == 0
    assert found.pareto_k[0] > 0.7
    assert not found.loo_reliable  # 1 of 20
    assert "leave-one-out says nothing" in found.meaning
    assert "calibration" not in found.failed


def test_the_observed_site_must_be_named_if_there_are_two():
    def two(x, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(mu, 1.0).expand([3]).to_event(1), obs=x)
        with pyro.plate("observations", 2):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    fit = fitted(two, AutoNormal, {"x": torch.zeros(3), "y": torch.ones(2)})
    with pytest.raises(ValueError, match="site="):
        vi.predictive_check(fit)
    with pytest.raises(ValueError, match="no observed site 'q'"):
        vi.predictive_check(fit, site="q")
    vector = vi.predictive_check(fit, site="x", num_draws=200)
    assert vector.pit is None
    assert vector.pareto_k.shape == (1,)


def exact_elpd(y, weights):
    """Sum of log p(y_i | the others) for y ~ Normal(mu, 1), mu ~ Normal(0, 10), weighted."""
    y, weights = y.double(), weights.double()
    total = 0.0
    for i in range(len(y)):
        rest = torch.arange(len(y)) != i
        precision = 1 / 100 + weights[rest].sum()
        mean = (weights * y)[rest].sum() / precision
        total += float(dist.Normal(mean, (1 + 1 / precision).sqrt()).log_prob(y[i]))
    return total


def assert_agrees(fit, exact):
    """The elpd of eight sets of draws has the exact mean, to their own standard error."""
    elpd = np.array([vi.predictive_check(fit, seed=seed).elpd_loo for seed in range(8)])
    assert elpd.std(ddof=1) < 0.5
    assert abs(elpd.mean() - exact) < Z * elpd.std(ddof=1) / 8**0.5


@pytest.mark.parametrize("filler", [0.0, -100.0])
def test_what_a_mask_hides_is_left_out(filler):
    seen = torch.arange(60) % 10 != 0
    y = torch.randn(60, generator=torch.Generator().manual_seed(1))

    def model(y, seen):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", len(y)), poutine.mask(mask=seen):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    fit = fitted(model, AutoNormal, {"y": torch.where(seen, y, torch.tensor(filler)), "seen": seen})
    check = vi.predictive_check(fit)
    assert len(check.observed) == 54
    assert not check.failed
    exact = exact_elpd(y[seen], torch.ones(54))
    assert_agrees(fit, exact)


def test_scaled_data_are_left_out_with_their_scale():
    y = torch.randn(200, generator=torch.Generator().manual_seed(2)) + 1

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", len(y)), poutine.scale(scale=0.25):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    assert_agrees(fitted(model, AutoNormal, {"y": y}), exact_elpd(y, torch.full((200,), 0.25)))
