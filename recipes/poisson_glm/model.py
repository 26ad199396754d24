"""Poisson regression, and the Poisson mixed model that adds an effect of each person."""

import pyro
import pyro.distributions as dist

# "predictors" is the columns of X; "people" is the plate of its rows in the mixed model.
LATENTS = {"intercept": (), "coefficients": ("predictors",)}
MIXED_LATENTS = LATENTS | {"sd": (), "log_rate": ("people",)}

# Weakly informative, for standardised predictors: one sd of a predictor multiplies the rate by a
# factor between 1/7 and 7 with prior probability 0.95, and so does one sd of a person's effect.
INTERCEPT_SCALE, COEFFICIENT_SCALE, SD_SCALE = 2.5, 1.0, 1.0


def linear_predictor(X):
    """intercept ~ Normal(0, 2.5), coefficients ~ Normal(0, 1); their linear predictor, (rows,)."""
    intercept = pyro.sample("intercept", dist.Normal(X.new_zeros(()), INTERCEPT_SCALE))
    coefficients = pyro.sample(
        "coefficients", dist.Normal(X.new_zeros(X.shape[1]), COEFFICIENT_SCALE).to_event(1)
    )
    return intercept + X @ coefficients


def person_sd(X):
    """sd ~ HalfNormal(1)."""
    return pyro.sample("sd", dist.HalfNormal(X.new_tensor(SD_SCALE)))


def model(X, y=None, exposure=None):
    """intercept ~ Normal(0, 2.5)
    coefficients ~ Normal(0, 1)                                                 for each column of X
    y | intercept, coefficients ~ Poisson(exposure exp(intercept + X coefficients))  for each row

    X: (rows, predictors), without a column of ones. y: (rows,) of counts, floating point, or None
    to draw it. exposure: (rows,), how many people a row stands for, y being their total; None for
    one each. Counts with the same predictors may be added up: the posterior is the same. Returns y.
    """
    rate = linear_predictor(X).exp()
    if exposure is not None:
        rate = exposure * rate
    with pyro.plate("rows", X.shape[0]):
        return pyro.sample("y", dist.Poisson(rate), obs=y)


def mixed(X, y=None):
    """intercept ~ Normal(0, 2.5),   coefficients ~ Normal(0, 1),   sd ~ HalfNormal(1)
    log_rate | ... ~ Normal(intercept + X coefficients, sd)            for each row of X
    y | log_rate ~ Poisson(exp(log_rate))                              for each row of X

    People with the same predictors differ: sd says by how much. X: (people, predictors), y:
    (people,), as for `model`; returns y.
    """
    eta = linear_predictor(X)
    sd = person_sd(X)
    with pyro.plate("people", X.shape[0]):
        log_rate = pyro.sample("log_rate", dist.Normal(eta, sd))
        return pyro.sample("y", dist.Poisson(log_rate.exp()), obs=y)
