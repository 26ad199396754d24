"""The report of gradient noise agrees with variances known in closed form."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.figure import Figure
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal

import vi_toolkit as vi
from tests.models import regression, regression_data, scale_model
from tests.tolerances import Z


def model():
    pyro.sample("z", dist.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0))


def guide():
    m = pyro.param("m", torch.tensor(2.0, dtype=torch.float64))
    pyro.sample("z", dist.Normal(m, 1.0))


def test_the_report_agrees_with_variances_known_in_closed_form():
    """p = N(0, 1), q = N(m, 1), z = m + e. Gradients of the loss with respect to m, one particle:

    reparameterised  z           mean m, variance 1
    path derivative  m           mean m, variance 0
    score            m^2 e / 2 + m e^2, mean m, variance m^4 / 4 + 2 m^2 = 12 at m = 2
    """
    estimators = [vi.Reparam(), vi.PathDerivative(), vi.Score(), vi.Reparam(4)]
    report = vi.gradient_report(model, guide, {}, estimators, num_draws=2000)
    table, costs = report.table, report.costs
    for name, sd in (
        ("Reparam(particles=1)", 1.0),
        ("Score(particles=1)", 12**0.5),
        ("Reparam(particles=4)", 0.5),
    ):
        row = table.loc[name, "z"]
        assert abs(row["sd"] - sd) < Z * row["sd_se"]
        assert abs(row["norm"] - 2) < Z * row["norm_se"]
        assert abs(row["snr"] - 2 / sd) < Z * row["snr_se"]
        assert 0 < row["sd_se"] < 0.1 * sd
    still = table.loc["PathDerivative(particles=1)", "z"]
    assert still["norm"] == pytest.approx(2) and still["sd"] < 1e-12
    score = costs.loc["Score(particles=1)"]
    assert abs(score["variance"] - 12) < Z * score["variance_se"]
    assert (costs["ms per gradient"] > 0).all()
    equal = score["variance"] * score["ms per gradient"] / costs["ms per gradient"].iloc[0]
    assert score["variance at equal time"] == pytest.approx(equal)
    assert report.mean["Score(particles=1)"]["m"].shape == ()


def test_the_standard_errors_match_the_scatter_over_seeds():
    """Over 30 seeds the scatter of each entry is its mean standard error, within 40 % or so."""
    found = [
        vi.gradient_report(model, guide, {}, [vi.Score(4)], num_draws=100, seed=s)
        for s in range(30)
    ]
    for column in ("norm", "sd", "snr"):
        values = np.array([r.table[column].iloc[0] for r in found])
        errors = np.array([r.table[f"{column}_se"].iloc[0] for r in found])
        # The sd of 30 values is good to 1 / sqrt(58) = 13 %; Z = 4.5 of those is 59 %.
        assert abs(np.log(values.std(ddof=1) / errors.mean())) < Z / 58**0.5


def test_a_seed_repeats_the_report_and_each_estimator_has_its_own_stream():
    data = regression_data(n=12)
    pair = [vi.Reparam(2), vi.Score(2, vi.RunningMean())]
    first, again = (
        vi.gradient_report(regression, AutoNormal, data, pair, num_draws=20, seed=4)
        for _ in range(2)
    )
    assert first.table.equals(again.table)
    other = vi.gradient_report(regression, AutoNormal, data, pair, num_draws=20, seed=5)
    assert not first.table.equals(other.table)
    alone = vi.gradient_report(regression, AutoNormal, data, pair[:1], num_draws=20, seed=4)
    assert alone.table.equals(first.table.loc[["Reparam(particles=2)"]])


def test_the_callers_state_is_left_alone():
    data = regression_data(n=12)
    mine = pyro.param("mine", torch.tensor(1.0))
    automatic = AutoNormal(regression)
    estimator = vi.Score(2, vi.RunningMean())
    rng, dtype = torch.get_rng_state(), torch.get_default_dtype()
    vi.gradient_report(regression, automatic, data, [estimator], num_draws=10)
    assert list(pyro.get_param_store().keys()) == ["mine"] and pyro.param("mine") is mine
    assert torch.equal(torch.get_rng_state(), rng) and torch.get_default_dtype() == dtype
    assert estimator.state() == {} and not list(automatic.parameters())
    fit = vi.fit(regression, AutoNormal, data, progress=False)
    before = {k: v.clone() for k, v in fit.params.items()}
    vi.gradient_report(regression, AutoNormal, data, [estimator], at=fit, num_draws=10)
    assert all(torch.equal(v, fit.params[k]) for k, v in before.items())


def test_the_order_of_the_estimators_flips_at_the_optimum():
    """Full rank is exact here, so the path derivative ends without variance; the start is far."""
    data = regression_data(n=20, dtype=torch.float64)
    pair = [vi.Reparam(4), vi.PathDerivative(4)]
    at = {
        where: vi.gradient_report(
            regression, AutoMultivariateNormal, data, pair, at=where, num_draws=60
        )
        for where in ("init", "optimum")
    }
    assert at["optimum"].costs["variance"].iloc[1] < 1e-6
    assert at["init"].costs["variance"].iloc[1] > 0.5
    assert "optimum" in repr(at["optimum"]) and "start" in repr(at["init"])


def test_gradients_are_grouped_by_site():
    data = regression_data(n=12)
    report = vi.gradient_report(
        scale_model, AutoNormal, {"y": data["y"]}, [vi.Reparam()], num_draws=10
    )
    assert list(report.table.index.get_level_values("site")) == ["mu", "sigma"]
    joint = vi.gradient_report(
        scale_model, AutoMultivariateNormal, {"y": data["y"]}, [vi.Reparam()], num_draws=10
    )
    assert list(joint.table.index.get_level_values("site")) == ["_AutoMultivariateNormal_latent"]
    point = vi.gradient_report(regression, AutoDelta, data, num_draws=10)
    assert list(point.table.index.get_level_values("site").unique()) == ["w"]
    assert "Score, naive" in point.refused and "point mass" in repr(point)


def test_estimators_that_cannot_be_used_are_named_and_the_others_measured():
    def discrete(y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(z + w, 1.0), obs=y)

    def its_guide(y):
        pyro.sample("w", dist.Normal(pyro.param("m", torch.tensor(0.1)), 1.0))
        pyro.sample("z", dist.Bernoulli(pyro.param("p", torch.tensor(0.4))))

    data = {"y": torch.tensor(1.0)}
    report = vi.gradient_report(discrete, its_guide, data, num_draws=10)
    assert "Reparam" not in report.costs.index
    assert "Score where needed, leave one out" in report.costs.index
    named = vi.gradient_report(
        discrete, its_guide, data, [vi.Reparam(), vi.Score(), Trace_ELBO()], num_draws=10
    )
    assert "'z'" in named.refused["Reparam(particles=1)"]
    assert list(named.costs.index) == ["Score(particles=1)", "Trace_ELBO"]
    assert "not possible" in repr(named)


def test_minibatches_add_their_own_variance():
    data = regression_data(n=50)
    whole = vi.gradient_report(regression, AutoNormal, data, [vi.Reparam(8)], num_draws=100)
    part = vi.gradient_report(
        regression, AutoNormal, data, [vi.Reparam(8)], num_draws=100, subsample={"observations": 5}
    )
    a, b = part.table.iloc[0], whole.table.iloc[0]
    assert a["sd"] - b["sd"] > Z * np.hypot(a["sd_se"], b["sd_se"])


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="at must be"):
        vi.gradient_report(model, guide, {}, at="end")
    with pytest.raises(ValueError, match="same name"):
        vi.gradient_report(model, guide, {}, [vi.Reparam(), vi.Reparam()])
    with pytest.raises(ValueError, match="at least 10"):
        vi.gradient_report(model, guide, {}, num_draws=1)
    with pytest.raises(vi.PreflightError):
        vi.gradient_report(model, lambda: None, {})


def test_the_plot_has_a_log_scale_and_every_estimator():
    report = vi.gradient_report(regression, AutoNormal, regression_data(n=12), num_draws=20)
    figure = report.plot()
    assert isinstance(figure, Figure)
    assert all(axis.get_xscale() == "log" for axis in figure.axes)
    labels = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert labels == list(report.costs.index)
