"""Guides for both forms of eight schools: one that is right, and the usual ones, which are not."""

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from .model import MU_SCALE, centred, model


def conditional(sigma, y=None):
    """tau ~ Weibull(scale, concentration),   mu | tau and z | mu, tau exactly as in the posterior.

    Recommended. Everything but tau is Normal given tau, with moments in closed form (exact.py), so
    the guide only has to find the law of one number. A Weibull has tau's two features: mass down to
    zero (with a concentration near 1; a Normal in log tau leaves it out), and a tail a little
    heavier than a half-Normal's. What is left of KL(q || posterior) is that of tau, 0.001 nats.

    Where y is None, the guide is of the prior: of no use, but the shapes are right.
    """
    scale = pyro.param("scale", lambda: sigma.new_tensor(5.0), constraint=constraints.positive)
    concentration = pyro.param(
        "concentration", lambda: sigma.new_tensor(1.0), constraint=constraints.positive
    )
    tau = pyro.sample("tau", dist.Weibull(scale, concentration))
    y = torch.zeros_like(sigma) if y is None else y
    w = 1 / (sigma**2 + tau**2)
    variance = 1 / (MU_SCALE**-2 + w.sum())
    mu = pyro.sample("mu", dist.Normal(variance * (w * y).sum(), variance.sqrt()))
    with pyro.plate("schools", sigma.shape[0]):
        pyro.sample("z", dist.Normal(tau * w * (y - mu), sigma * w.sqrt()))


# A Gaussian over (mu, log tau, z). Its means are nearly right, since the non-centred posterior has
# almost no correlations, but log tau is skewed towards zero (-1.3), so its sd is not.
full_rank = AutoMultivariateNormal(model)
mean_field = AutoNormal(model)

guide = conditional
GUIDES = {"conditional": conditional, "full-rank": full_rank, "mean-field": mean_field}

# On the centred form, where each theta_j is Normal(mu, tau) a priori. The ELBO has its best q where
# tau is large enough for the theta to be spread out; the neck of the funnel is left out.
CENTRED_GUIDES = {
    "full-rank": AutoMultivariateNormal(centred),
    "mean-field": AutoNormal(centred),
}
