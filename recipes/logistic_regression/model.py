"""Bayesian logistic regression with Normal priors."""

import pyro
import pyro.distributions as dist

# A global latent has no dims; "predictors" is the columns of X.
LATENTS = {"intercept": (), "coefficients": ("predictors",)}

# Weakly informative, for standardised predictors: one sd of a predictor multiplies the odds by a
# factor between 1/7 and 7 with prior probability 0.95, and the intercept allows base rates from
# under one to over 99 %. The prior is what makes the posterior proper: where a plane separates the
# two classes the likelihood has no maximum, it grows without end along that plane's normal.
INTERCEPT_SCALE, COEFFICIENT_SCALE = 2.5, 1.0


def model(X, y=None, intercept_scale=INTERCEPT_SCALE, coefficient_scale=COEFFICIENT_SCALE):
    """intercept ~ Normal(0, intercept_scale)
    coefficients ~ Normal(0, coefficient_scale)                        for each column of X
    y | intercept, coefficients ~ Bernoulli(logit = intercept + X coefficients)  for each row of X

    X: (observations, predictors), without a column of ones. y: (observations,) of zeros and ones,
    floating point, or None to draw it. Returns y.
    """
    intercept = pyro.sample("intercept", dist.Normal(X.new_zeros(()), intercept_scale))
    coefficients = pyro.sample(
        "coefficients", dist.Normal(X.new_zeros(X.shape[1]), coefficient_scale).to_event(1)
    )
    with pyro.plate("observations", X.shape[0]):
        return pyro.sample("y", dist.Bernoulli(logits=intercept + X @ coefficients), obs=y)
