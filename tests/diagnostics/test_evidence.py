"""The log evidence and its gap to the ELBO, where both are known."""

import math

import pytest
from pyro.infer.autoguide import AutoNormal

import vi_toolkit as vi
from tests.models import gaussian
from tests.support import fitted, shifted_fit
from tests.tolerances import Z


@pytest.mark.parametrize("rho", [0.3, 0.5])
def test_the_gap_is_the_divergence_of_mean_field(rho):
    """Normalised, so log evidence 0 and KL = -log(1 - rho^2) / 2."""
    found = vi.log_evidence(fitted(gaussian(rho), AutoNormal), num_draws=20_000)
    assert abs(found.log_evidence) < Z * found.log_evidence_se
    assert abs(found.gap + 0.5 * math.log(1 - rho**2)) < Z * found.gap_se
    assert found.pareto_k.k < found.pareto_k.limit
    assert found.pareto_k.unseen < found.log_evidence_se + 2e-3
    assert "too low" not in repr(found)


def test_an_unreliable_evidence_says_so():
    found = vi.log_evidence(shifted_fit(0.0, 0.3), num_draws=20_000)
    assert not found.pareto_k.reliable
    assert "too low" in found.meaning
