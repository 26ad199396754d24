"""Gaussian guides for the hierarchical logistic regression."""

from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from .model import model

# Recommended. An intercept and the effects of groups can be exchanged for one another, so they are
# strongly correlated; 46 latents cost 1,081 numbers for a full covariance.
full_rank = AutoMultivariateNormal(model)

# Ignores it, and is too sure of every party's effect.
mean_field = AutoNormal(model)

guide = full_rank
GUIDES = {"full-rank": full_rank, "mean-field": mean_field}
