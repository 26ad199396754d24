r"""Logistic regression with one datum: the smallest model whose posterior has no closed form.

    z ~ Normal(0, 1),    y = 1 | z ~ Bernoulli(logit = x z),

so that, with sigmoid(a) = 1 / (1 + exp(-a)),

    p(z | y = 1, x) = Normal(z; 0, 1) sigmoid(x z) / p(y = 1 | x).

The evidence is known: sigmoid(-a) = 1 - sigmoid(a) and the prior is symmetric, so
p(y = 1 | x) = 1/2 for every x. Nothing else is, but all of it is a one-dimensional integral, which
quadrature gives to machine precision. So this model shows VI's error with nothing in the way. It
is the example of Blei's lectures on variational inference; the ELBO is written out in full below,
constants included, because log p(y) - ELBO = KL(q || posterior) holds only with them.
"""

from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal
from scipy.optimize import brentq, root
from scipy.special import expit, log_expit

LOG_EVIDENCE = -np.log(2.0)

# The trapezoidal rule with step h on a standard Normal times a function whose nearest pole is at
# distance a from the real line has error of order exp(-2 pi a / h) (Trefethen and Weideman, 2014).
# sigmoid(x z) has its poles at pi / |x|, so h = 0.01 is exact to rounding for |x| up to 50.
# Gauss-Hermite with 200 nodes, its nodes being wider apart, is off by 6e-5 at x = 10.
_NODES = np.linspace(-10.0, 10.0, 2001)
_WEIGHTS = np.exp(-(_NODES**2) / 2)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()


class Gaussian(NamedTuple):
    """A Gaussian approximation of the posterior of z, and its ELBO."""

    mean: float
    sd: float
    elbo: float


def model(x, y=None):
    """The model in Pyro. x: scalar; y: scalar tensor 1.0 (or 0.0), or None to draw it."""
    z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
    return pyro.sample("y", dist.Bernoulli(logits=x * z), obs=y)


# q(z) = Normal(mu, sigma): with a single latent there is no other Gaussian.
guide = AutoNormal(model)


def data(x):
    """The model's arguments for the datum y = 1 at x: {"x": (), "y": ()}, float64."""
    return {"x": torch.tensor(x, dtype=torch.float64), "y": torch.tensor(1.0).double()}


def expectation(f, mean=0.0, sd=1.0):
    """E f(z) under Normal(mean, sd), by the trapezoidal rule. f: vectorised."""
    return _WEIGHTS @ f(mean + sd * _NODES)


def exact_posterior(x):
    """Posterior mean and sd and the log evidence at y = 1: three integrals over the prior.

    >>> mean, sd, log_evidence = exact_posterior(2.0)
    >>> round(float(mean), 6), round(float(sd), 6), round(float(log_evidence + np.log(2)), 12)
    (0.605706, 0.795689, 0.0)
    """
    evidence = expectation(lambda z: expit(x * z))
    mean = expectation(lambda z: z * expit(x * z)) / evidence
    variance = expectation(lambda z: z**2 * expit(x * z)) / evidence - mean**2
    return mean, np.sqrt(variance), np.log(evidence)


def density(z, x):
    """Exact posterior density of z at y = 1."""
    return np.exp(log_expit(x * z) - z**2 / 2 - LOG_EVIDENCE) / np.sqrt(2 * np.pi)


def elbo(mean, sd, x):
    """ELBO of q = Normal(mean, sd) at y = 1:

    E_q[log sigmoid(x z)] - (mean^2 + sd^2) / 2 + log(sd) + 1/2.

    The log 2 pi of prior and entropy cancel; their constants leave the 1/2.
    """
    likelihood = expectation(lambda z: log_expit(x * z), mean, sd)
    return likelihood - (mean**2 + sd**2) / 2 + np.log(sd) + 0.5


def laplace(x):
    """Laplace's approximation: the mode, with the curvature there as precision.

    At the mode z = x sigmoid(-x z); the precision is 1 + x^2 sigmoid(x z) sigmoid(-x z).
    """
    mode = brentq(lambda z: z - x * expit(-x * z), -abs(x), abs(x), xtol=1e-14)
    sd = (1 + x**2 * expit(x * mode) * expit(-x * mode)) ** -0.5
    return Gaussian(mode, sd, elbo(mode, sd, x))


def gaussian_optimum(x):
    """The Gaussian of largest ELBO: where both of its derivatives vanish,

    d/dmean:  x E_q[sigmoid(-x z)] - mean = 0
    d/dsd:   -x^2 sd E_q[sigmoid(x z) sigmoid(-x z)] - sd + 1 / sd = 0.

    The ELBO is concave in (mean, sd), as log sigmoid is concave (Challis and Barber, 2013), so this
    is the maximum. The second line has been integrated by parts (Stein's lemma) from
    x E_q[e sigmoid(-x z)], with z = mean + sd e.

    >>> q = gaussian_optimum(2.0)
    >>> round(float(q.mean), 6), round(float(q.sd), 6), round(float(q.elbo), 6)
    (0.603497, 0.791442, -0.695518)
    """

    def gradient(parameters):
        mean, sd = parameters
        residual = expectation(lambda z: expit(-x * z), mean, sd)
        curvature = expectation(lambda z: expit(x * z) * expit(-x * z), mean, sd)
        return x * residual - mean, 1 / sd - sd * (1 + x**2 * curvature)

    start = laplace(x)
    solution = root(gradient, (start.mean, start.sd), tol=1e-13)
    mean, sd = solution.x
    return Gaussian(mean, sd, elbo(mean, sd, x))
