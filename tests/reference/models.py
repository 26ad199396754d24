"""A model and a covariance that several tests of references share."""

import numpy as np
import pyro
import pyro.distributions as dist

COVARIANCE = np.array([[1.0, 0.6, 0.0], [0.6, 1.0, 0.3], [0.0, 0.3, 4.0]])


def location_scale(y):
    """Two latents, one of them positive. The flat prior cannot be sampled."""
    mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    with pyro.plate("observations", len(y)):
        pyro.sample("y", dist.Normal(mu, sigma), obs=y)
