"""Bayesian linear regression with unknown noise variance (Normal-inverse-gamma)."""

import pyro
import pyro.distributions as dist

# A global latent has no dims; "predictors" is the columns of X, the intercept among them.
LATENTS = {"variance": (), "coefficients": ("predictors",)}

# The prior for a target standardised to sd 1: variance ~ InverseGamma(2, 1) has mean 1 and
# infinite variance, and one sd of a predictor moves the target by about one noise sd.
A0, B0, PRIOR_SCALE = 2.0, 1.0, 1.0


def model(X, y=None, a0=A0, b0=B0, prior_scale=PRIOR_SCALE):
    """variance ~ InverseGamma(a0, b0)
    coefficients | variance ~ Normal(0, sqrt(variance) * prior_scale)   for each column of X
    y | coefficients, variance ~ Normal(X coefficients, sqrt(variance))  for each row of X

    X: (observations, predictors), its first column all ones, so that the intercept is one of the
    coefficients. y: (observations,), or None to draw it. Returns y.

    The prior of the coefficients scales with the noise sd. That is what makes the model conjugate:
    the posterior is again Normal-inverse-gamma (see exact.py).
    """
    variance = pyro.sample("variance", dist.InverseGamma(X.new_tensor(a0), X.new_tensor(b0)))
    sd = variance.sqrt()
    coefficients = pyro.sample(
        "coefficients", dist.Normal(0.0, sd * prior_scale).expand([X.shape[1]]).to_event(1)
    )
    with pyro.plate("observations", X.shape[0]):
        return pyro.sample("y", dist.Normal(X @ coefficients, sd), obs=y)
