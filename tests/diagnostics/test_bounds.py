"""Bounds on the errors of means and sds, where those errors are known."""

import math

import numpy as np
import pytest
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import vi_toolkit as vi
from tests.models import gaussian
from tests.support import fitted, shifted_fit


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.2), (0.3, 1.1), (-0.5, 1.5)])
def test_bounds_hold_and_are_tight(shift, scale):
    fit = shifted_fit(shift, scale)
    found = vi.error_bounds(fit, num_draws=20_000)
    assert found.mean[0] >= abs(shift)
    assert found.sd[0] >= abs(scale - 1)
    # By Cauchy and Schwarz no larger than with D2, which is known for Gaussians: the weights'
    # second moment is scale^2 / sqrt(2 scale^2 - 1) exp(shift^2 / (2 scale^2 - 1)).
    a = 2 * scale**2 - 1
    chi = math.sqrt(scale**2 / math.sqrt(a) * math.exp(shift**2 / a) - 1)
    assert found.mean[0] <= 1.01 * scale * chi
    assert found.sd[0] <= 1.01 * math.sqrt(2 * math.sqrt(3) * chi) * scale
    assert "within" in found.meaning


def test_bounds_are_near_zero_for_an_exact_posterior_and_infinite_for_bad_weights():
    exact = vi.error_bounds(fitted(gaussian(0.9), AutoMultivariateNormal), num_draws=10_000)
    assert exact.mean.max() < 0.01
    narrow = vi.error_bounds(shifted_fit(0.0, 0.3), num_draws=20_000)  # k = 1 - 0.3^2
    assert np.isinf(narrow.mean).all()
    assert np.isinf(narrow.sd).all()
    assert "no bounds" in narrow.meaning


def test_the_figure_shows_the_bounds_or_says_that_there_are_none(tmp_path):
    axes = vi.error_bounds(fitted(gaussian(0.5), AutoNormal), num_draws=10_000).plot().axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()][::-1] in (
        ["z[0]", "z[1]"],
        ["z[1]", "z[0]"],
    )
    assert [len(line.get_xdata()) for line in axes.lines] == [2, 2]  # means, sds
    none = vi.error_bounds(shifted_fit(0.0, 0.3), num_draws=20_000).plot()
    assert "no bounds" in none.axes[0].texts[0].get_text()
    none.savefig(tmp_path / "none.png")
