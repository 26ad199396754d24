"""Evidence, its gap to the ELBO, and bounds on means and sds, where all of them are known."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import vi_toolkit as vi
from tests.diagnostics.test_diagnostics import fitted, gaussian
from tests.tolerances import Z


def off(shift, scale):
    """A guide N(shift, scale^2) for the posterior N(0, 1)."""

    def guide():
        nothing = pyro.param("nothing", torch.tensor(0.0).double())
        pyro.sample("z", dist.Normal(shift + 0 * nothing, torch.tensor(scale).double()))

    return fitted(standard, guide, steps=1)


def standard():
    pyro.sample("z", dist.Normal(torch.tensor(0.0).double(), 1.0))


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.2), (0.3, 1.1), (-0.5, 1.5)])
def test_bounds_hold_and_are_not_far_off(shift, scale):
    fit = off(shift, scale)
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


def test_bounds_are_nothing_for_an_exact_posterior_and_infinite_for_bad_weights():
    exact = vi.error_bounds(fitted(gaussian(0.9), AutoMultivariateNormal), num_draws=10_000)
    assert exact.mean.max() < 0.01
    narrow = vi.error_bounds(off(0.0, 0.3), num_draws=20_000)  # k = 1 - 0.3^2
    assert np.isinf(narrow.mean).all()
    assert np.isinf(narrow.sd).all()
    assert "no bounds" in narrow.meaning


def test_figure_of_bounds(tmp_path):
    axes = vi.error_bounds(fitted(gaussian(0.5), AutoNormal), num_draws=10_000).plot().axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()][::-1] in (
        ["z[0]", "z[1]"],
        ["z[1]", "z[0]"],
    )
    assert [len(line.get_xdata()) for line in axes.lines] == [2, 2]  # means, sds
    none = vi.error_bounds(off(0.0, 0.3), num_draws=20_000).plot()
    assert "no bounds" in none.axes[0].texts[0].get_text()
    none.savefig(tmp_path / "none.png")


@pytest.mark.parametrize("rho", [0.3, 0.5])
def test_gap_is_the_divergence_of_mean_field(rho):
    """Normalised, so log evidence 0 and KL = -log(1 - rho^2) / 2."""
    found = vi.log_evidence(fitted(gaussian(rho), AutoNormal), num_draws=20_000)
    assert abs(found.log_evidence) < Z * found.log_evidence_se
    assert abs(found.gap + 0.5 * math.log(1 - rho**2)) < Z * found.gap_se
    assert found.pareto_k.k < found.pareto_k.limit
    assert found.pareto_k.unseen < found.log_evidence_se + 2e-3
    assert "too low" not in repr(found)


def test_evidence_says_when_it_cannot_be_had():
    found = vi.log_evidence(off(0.0, 0.3), num_draws=20_000)
    assert not found.pareto_k.reliable
    assert "too low" in found.meaning


def test_the_diagnosis_has_them():
    right = vi.diagnose(fitted(gaussian(0.9), AutoMultivariateNormal), num_draws=10_000)
    assert right.bounds.mean.max() < 0.01
    assert abs(right.evidence.gap) < Z * right.evidence.gap_se + 1e-3
    narrow = vi.diagnose(fitted(gaussian(0.9), AutoNormal), num_draws=20_000)
    assert narrow.bounds is None  # k-hat is 0.9
    expected = -0.5 * math.log(1 - 0.9**2)
    assert abs(narrow.evidence.gap - expected) < Z * narrow.evidence.gap_se
    assert narrow.to_dict()["gap"] == narrow.evidence.gap
    assert "evidence" in repr(narrow)
