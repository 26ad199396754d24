"""Guides for the regression with relevances: one that integrates them out, and the usual two."""

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from .model import C0, D0, model


def of_collapsed(X, y=None, rest=None, rest_count=0):
    """variance ~ LogNormal,   coefficients | variance ~ Normal(loc, variance C diag(stretch^2) C')

    For `collapsed`. Of the coefficients' covariance the data give the shape, C C' = (X'X + I)^-1;
    how the unknown relevances change it is left to one number per column. So 2 d + 2 parameters
    carry a full covariance. Returns (variance, coefficients).
    """
    d = X.shape[1]
    precision = X.T @ X + torch.eye(d, dtype=X.dtype)
    C = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(precision)))
    center = pyro.param("log_variance_loc", lambda: X.new_zeros(()))
    spread = pyro.param(
        "log_variance_scale", lambda: X.new_tensor(0.1), constraint=constraints.positive
    )
    loc = pyro.param("loc", lambda: X.new_zeros(d))
    stretch = pyro.param("stretch", lambda: X.new_ones(d), constraint=constraints.positive)
    variance = pyro.sample("variance", dist.LogNormal(center, spread))
    scale_tril = variance.sqrt() * C * stretch
    normal = dist.MultivariateNormal(loc, scale_tril=scale_tril)
    return variance, pyro.sample("coefficients", normal)


def conditional(X, y=None, rest=None, rest_count=0):
    """variance and coefficients as `of_collapsed`,   relevance | coefficients, variance exactly.

    Recommended. Given the others a relevance is Gamma(C0 + 1/2, D0 + coefficient^2 / (2 variance)),
    whatever the data, so there is nothing to approximate, and the ELBO is that of `of_collapsed` on
    `collapsed`, which is the faster of the two to fit: it draws no Gamma.
    """
    variance, coefficients = of_collapsed(X, y, rest, rest_count)
    rate = D0 + coefficients.square() / (2 * variance)
    pyro.sample("relevance", dist.Gamma(C0 + 0.5, rate).to_event(1))


# A Gaussian over (log variance, log relevance, coefficients). Given its coefficient a log relevance
# is the log of a Gamma(3/2), skewed, and of a Gaussian fitted to that the sd is too small by 15 %.
full_rank = AutoMultivariateNormal(model)

# Also ignores the correlations among the coefficients, which products of predictors have.
mean_field = AutoNormal(model)

guide = conditional
GUIDES = {"conditional": conditional, "full-rank": full_rank, "mean-field": mean_field}
