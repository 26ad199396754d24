"""Convergence: split R-hat, effective sample size and the stopping rule."""

import numpy as np
from pyro.infer.autoguide import AutoNormal

import vi_toolkit as vi
from tests.models import gaussian
from tests.support import fitted
from vi_toolkit.diagnostics.convergence import effective_size, split_r_hat


def test_r_hat_fires_on_a_drift_and_is_silent_on_noise():
    noise = np.random.default_rng(0).normal(size=(64, 5))
    assert split_r_hat(noise) < 1.1
    assert split_r_hat(noise + np.linspace(0, 4, 64)[:, None]) > 1.5
    assert split_r_hat(np.ones((64, 2))) == 1
    constant = np.ones((64, 1))
    assert split_r_hat(np.hstack([noise, constant])) == split_r_hat(noise)
    # Beyond 2,000 parameters the one that drifts is still found.
    many = np.random.default_rng(1).normal(size=(64, 2_500))
    many[:, 1_234] += np.linspace(0, 8, 64)
    assert split_r_hat(many) == split_r_hat(many[:, 1_234:1_235]) > 1.5
    assert 30 < effective_size(noise) <= 64
    assert effective_size(np.cumsum(noise, 0)) < 10


def test_a_callback_that_returns_true_ends_a_fit():
    model = gaussian(0.5)
    fit = fitted(model, AutoNormal, optimizer=0.05, callback=lambda look: look.error < 0.3)
    assert fit.monte_carlo_error <= 0.3
    found = vi.convergence(fit)
    assert found.r_hat < 1.1
    assert found.converged == fit.converged
