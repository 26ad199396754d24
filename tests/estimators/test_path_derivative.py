"""The path derivative has no noise where the guide is the posterior."""

import pytest
import torch

import vi_toolkit as vi
from tests.estimators.models import conjugate, conjugate_posterior, flat, gradient, normal_guide


@pytest.mark.parametrize("particles", [1, 4])
def test_the_path_derivative_is_zero_at_the_posterior(particles):
    y = torch.tensor([1.0, 2.5, 0.3, -0.7], dtype=torch.float64)
    guide = normal_guide(*conjugate_posterior(y))
    found = gradient(vi.PathDerivative(particles), conjugate, guide, {"y": y})[1]
    assert float(flat(found).abs().max()) < 1e-13
    noisy = gradient(vi.Reparam(particles), conjugate, guide, {"y": y})[1]
    assert float(flat(noisy).abs().max()) > 1e-3  # the score term alone
