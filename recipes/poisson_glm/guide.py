"""Gaussian guides for the Poisson regression and for the mixed model."""

from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from .model import mixed, model

# Recommended. With thousands of people the posterior is Gaussian to the eye, and the insurance
# plan's three payments measure much the same thing, so the coefficients are correlated.
full_rank = AutoMultivariateNormal(model)

# Ignores the correlations: right means, since the posterior is so near a Gaussian, and sds that are
# the conditional ones.
mean_field = AutoNormal(model)

guide = full_rank
GUIDES = {"full-rank": full_rank, "mean-field": mean_field}

# For the mixed model, where a full covariance grows with the square of the number of people. Its
# sds of the coefficients are those they would have if every person's rate were known, which is far
# too narrow; vi.linear_response(fit) gives them back.
mixed_mean_field = AutoNormal(mixed)
