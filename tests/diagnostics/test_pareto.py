"""k-hat against its known value, and the mass that the weights leave out."""

import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import vi_toolkit as vi
from tests.models import gaussian
from tests.support import fitted
from tests.tolerances import Z


@pytest.mark.parametrize("rho", [0.3, 0.5, 0.7, 0.9])
def test_k_hat_of_mean_field_on_a_gaussian_is_the_correlation(rho):
    """k = 1 - lambda_min(D^-1/2 Lambda D^-1/2), in two dimensions |rho|."""
    found = vi.psis(fitted(gaussian(rho), AutoNormal), num_draws=100_000)
    assert found.k == pytest.approx(rho, abs=0.1)
    if rho != 0.7:  # there the mass unseen is on either side of the limit
        assert found.reliable == (rho < 0.7)


def test_k_hat_raises_no_alarm_on_an_exact_posterior():
    found = vi.psis(fitted(gaussian(0.9), AutoMultivariateNormal), num_draws=10_000)
    assert found.reliable
    assert found.sd_log_weight < 0.01
    assert found.effective_fraction == pytest.approx(1, abs=0.01)


def test_k_hat_finds_a_known_tail():
    """Weights (1 - u)^-k are Pareto with shape k."""
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(8, 50_000, generator=generator, dtype=torch.float64)
    for k in (0.2, 0.6, 1.2):
        found = vi.pareto_k(-k * torch.log1p(-u))
        assert abs(found.k - k) < max(Z * found.k_se, 0.1)
    with pytest.raises(ValueError, match="finite"):
        vi.pareto_k(torch.full((2, 100), -torch.inf))


def test_a_heavy_tail_is_judged_by_its_mass():
    """Weights 1 + c ((1 - u)^-k - 1), k = 0.72: little mass in the tail, and much."""
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(8, 50_000, generator=generator, dtype=torch.float64)
    k = 0.72
    for c, good in ((0.005, True), (0.5, False)):
        weights = 1 + c * ((1 - u) ** -k - 1)
        found = vi.pareto_k(weights.log())
        assert 0.65 < found.k < found.limit
        assert found.reliable == good
        # What the largest weight leaves out, in truth: c / (1 - k) (1 / n)^(1 - k) of the mass.
        total = 1 + c * (1 / (1 - k) - 1)
        expected = c / (1 - k) * (8 * 50_000) ** -(1 - k) / total
        assert found.unseen == pytest.approx(expected, rel=0.5)
        assert ("mass" in found.fault) == (not good)


def test_few_weights_that_carry_everything_are_refused_whatever_their_tail():
    """Log-normal weights have every moment: k = 0, in the end. Of 8 x 2,000 it is not seen."""
    generator = torch.Generator().manual_seed(0)
    found = vi.pareto_k(1.4 * torch.randn(8, 2_000, generator=generator, dtype=torch.float64))
    assert found.k < 0.7
    assert found.unseen > 2e-3
    assert not found.reliable
    assert vi.pareto_k(torch.zeros(8, 100)).limit == 0.5
