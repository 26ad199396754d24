"""Linear regression with automatic relevance determination: a precision for every coefficient."""

import pyro
import pyro.distributions as dist

# A global latent has no dims; "predictors" is the columns of X.
LATENTS = {"variance": (), "relevance": ("predictors",), "coefficients": ("predictors",)}

# All four hyperparameters are one, as in Kucukelbir et al. (2017), for a standardised target.
# Relevance ~ Gamma(1, 1) makes each coefficient a Student t with two degrees of freedom a priori.
A0, B0, C0, D0 = 1.0, 1.0, 1.0, 1.0


def model(X, y=None, rest=None, rest_count=0):
    """variance ~ InverseGamma(1, 1)
    relevance ~ Gamma(1, 1)                                       for each column of X
    coefficients | relevance, variance ~ Normal(0, sqrt(variance / relevance))
    y | coefficients, variance ~ Normal(X coefficients, sqrt(variance))   for each row of X

    A large relevance means an irrelevant predictor: its coefficient is held near zero (MacKay,
    "Bayesian Non-Linear Modeling for the Prediction Competition", 1994). X: (rows, predictors), y:
    (rows,), both centred; y None to draw it. Returns y.

    rest, rest_count: what data.compress leaves of many rows besides its few: the squared length of
    y outside the columns of X, and in how many dimensions; rest / variance is chi-squared.
    """
    d = X.shape[1]
    variance = pyro.sample("variance", dist.InverseGamma(X.new_tensor(A0), X.new_tensor(B0)))
    relevance = pyro.sample(
        "relevance", dist.Gamma(X.new_tensor(C0), X.new_tensor(D0)).expand([d]).to_event(1)
    )
    coefficients = pyro.sample(
        "coefficients", dist.Normal(X.new_zeros(()), (variance / relevance).sqrt()).to_event(1)
    )
    if rest is not None:
        pyro.sample("rest", dist.Gamma(rest_count / 2, 1 / (2 * variance)), obs=rest)
    with pyro.plate("rows", X.shape[0]):
        return pyro.sample("y", dist.Normal(X @ coefficients, variance.sqrt()), obs=y)


def collapsed(X, y=None, rest=None, rest_count=0):
    """`model` with the relevances integrated out, which turns the Normals into Student t's:

    coefficients | variance ~ StudentT(2 C0, 0, sqrt(variance D0 / C0))    for each column of X

    The posterior of variance and coefficients is that of `model`, in half the dimensions. Given
    them, relevance ~ Gamma(C0 + 1/2, D0 + coefficients^2 / (2 variance)).
    """
    variance = pyro.sample("variance", dist.InverseGamma(X.new_tensor(A0), X.new_tensor(B0)))
    scale = (variance * D0 / C0).sqrt()
    coefficients = pyro.sample(
        "coefficients",
        dist.StudentT(2 * C0, X.new_zeros(()), scale).expand([X.shape[1]]).to_event(1),
    )
    if rest is not None:
        pyro.sample("rest", dist.Gamma(rest_count / 2, 1 / (2 * variance)), obs=rest)
    with pyro.plate("rows", X.shape[0]):
        return pyro.sample("y", dist.Normal(X @ coefficients, variance.sqrt()), obs=y)
