"""Figures show what they were given and leave pyplot alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from tests.support import COVARIANCE, EXACT, MEAN, MEAN_FIELD, SD, gaussian_fit
from vi_toolkit.comparison import compare, plot_comparisons
from vi_toolkit.figures import MOST_SCALARS
from vi_toolkit.fit_figure import plot_fit
from vi_toolkit.reference.reference import Reference


@pytest.fixture(autouse=True)
def pyplot_stays_empty():
    yield
    assert plt.get_fignums() == []


def fake_fit(elbo, draws=None, method="stochastic"):
    draws = {"w": torch.randn(500, 4), "sigma": torch.rand(500)} if draws is None else draws
    return SimpleNamespace(
        elbo=np.asarray(elbo), converged=True, method=method, sample=lambda n, seed: draws
    )


def shown(figure):
    """The axes that are drawn on, after a layout pass, which must not warn."""
    figure.canvas.draw()
    return [axes for axes in figure.get_axes() if axes.axison]


def test_the_figure_of_a_fit_shows_history_and_marginals():
    figure = plot_fit(fake_fit(np.linspace(-50, -10, 40), method="deterministic"))
    history, *marginals = shown(figure)
    assert [axes.get_title(loc="left") for axes in marginals] == [
        "w[0]",
        "w[1]",
        "w[2]",
        "w[3]",
        "sigma",
    ]
    assert history.get_title(loc="left") == "Deterministic, 40 steps, converged"
    assert history.get_xlabel() == "step"
    x, y = history.lines[0].get_data()
    assert (x[0], x[-1]) == (1, 40)
    assert y[-1] == -10
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_an_early_transient_does_not_crush_the_rest():
    elbo = np.concatenate(
        [-np.geomspace(1e7, 200, 50), -100 + np.random.default_rng(0).normal(size=950)]
    )
    history = shown(plot_fit(fake_fit(elbo)))[0]
    low, high = history.get_ylim()
    assert -115 < low < elbo[500:].min()
    assert elbo.max() < high < -90
    assert "early steps below, down to -1e+07" in history.texts[0].get_text()


def test_a_history_without_transient_is_shown_whole():
    elbo = np.linspace(-30, -10, 60)
    low, high = shown(plot_fit(fake_fit(elbo)))[0].get_ylim()
    assert low < -30 < -10 < high


@pytest.mark.parametrize("elbo", [[], [-5.0], [-5.0, -5.0, -5.0], [np.nan, -1e300, -4.0, -4.0]])
def test_odd_histories_can_be_drawn(elbo):
    shown(plot_fit(fake_fit(elbo)))


def test_at_most_twelve_marginals_are_drawn():
    figure = plot_fit(fake_fit([-1.0] * 10, {"w": torch.randn(50, 5, 5)}))
    assert len(shown(figure)) == 1 + 12
    assert "first 12 of 25" in str([s._suptitle.get_text() for s in figure.subfigs if s._suptitle])


def test_draws_of_a_point_estimate_or_of_integers_can_be_drawn():
    shown(plot_fit(fake_fit([-1.0] * 10, {"a": torch.zeros(50), "k": torch.arange(50)})))


def both():
    return {
        "mean field": compare(gaussian_fit(covariance=MEAN_FIELD, family="mean-field"), EXACT),
        "full rank": compare(gaussian_fit(), EXACT),
    }


def test_comparisons_show_the_numbers_of_the_table():
    comparisons = both()
    left, right = shown(plot_comparisons(comparisons, title="Three scalars"))
    assert [t.get_text() for t in left.get_yticklabels()] == EXACT.names
    dots = [line.get_xdata() for line in right.lines if line.get_marker() == "o"]
    diamonds = [line.get_xdata() for line in right.lines if line.get_marker() == "D"]
    for k, comparison in enumerate(comparisons.values()):
        np.testing.assert_array_equal(dots[k], comparison.table["sd ratio"])
        np.testing.assert_array_equal(diamonds[k], comparison.table["expected sd ratio"])
    (legend,) = left.figure.legends
    text = [t.get_text() for t in legend.get_texts()]
    assert "mean field: trust the means only" in text
    assert "full rank: trust" in text
    assert legend.get_title().get_text() == "Three scalars"


def test_scales_that_are_far_apart_are_standardised():
    left, _ = shown(both()["full rank"].plot())
    assert "reference sd" in left.get_xlabel()
    low, high = left.get_xlim()
    assert -3 < low < -1.645 < 1.645 < high < 3
    left, _ = shown(plot_comparisons(both(), standardise=False))
    assert left.get_xlabel() == "value"
    assert left.get_xlim()[0] < MEAN[1] - SD[1]


def test_scales_that_can_share_an_axis_are_left_alone():
    r = Reference.exact(EXACT.names, [0, 1, 2], np.eye(3))
    fit = gaussian_fit(np.array([0.0, 1, 2]), np.eye(3))
    left, _ = shown(compare(fit, r).plot())
    assert left.get_xlabel() == "value"
    (dots,) = (line for line in left.lines if line.get_marker() == "o")
    np.testing.assert_allclose(dots.get_xdata(), [0, 1, 2], atol=0.02)


def test_a_reference_without_quantiles_can_be_drawn():
    r = Reference.exact(EXACT.names, MEAN, COVARIANCE, skewness=[0, 0.1, 0])
    shown(compare(gaussian_fit(), r).plot())


@pytest.mark.parametrize("d", [1, 2, MOST_SCALARS, MOST_SCALARS + 20])
def test_any_number_of_scalars_can_be_drawn(d):
    names = [f"w[{i}]" for i in range(d)]
    r = Reference.exact(names, np.zeros(d), np.eye(d))
    mean = np.zeros(d)
    mean[d // 2] = 1.0  # the worst one must be among those drawn
    left, _ = shown(compare(gaussian_fit(mean, np.eye(d), names=names), r).plot())
    labels = [t.get_text() for t in left.get_yticklabels()]
    assert len(labels) == min(d, MOST_SCALARS)
    assert f"w[{d // 2}]" in labels
    title = left.figure.legends[0].get_title().get_text()
    assert ("largest errors" in title) is (d > MOST_SCALARS)


def test_comparisons_with_different_references_are_refused():
    other = Reference.exact(EXACT.names, MEAN + SD, COVARIANCE)
    with pytest.raises(ValueError, match="second was compared with another reference"):
        plot_comparisons(both() | {"second": compare(gaussian_fit(), other)})
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_comparisons({})
