"""Eight schools: a hierarchical Normal model with known standard errors, in two forms."""

import pyro
import pyro.distributions as dist

# "schools" is the plate; mu and tau are outside it. Sampled inside they would be eight copies, and
# there would be no pooling.
LATENTS = {"mu": (), "tau": (), "z": ("schools",)}
CENTRED_LATENTS = {"mu": (), "tau": (), "theta": ("schools",)}

# As in posteriordb, whose reference draws have mu near 4.4 and tau near 3.6. Other collections use
# other priors under the same name (TensorFlow Probability: mu ~ Normal(0, 10), log-normal tau) and
# have other posteriors: with eight data and two hyperparameters the prior matters.
MU_SCALE, TAU_SCALE = 5.0, 5.0


def model(sigma, y=None, mu_scale=MU_SCALE, tau_scale=TAU_SCALE):
    """mu ~ Normal(0, mu_scale),   tau ~ HalfCauchy(tau_scale)
    z ~ Normal(0, 1),   theta = mu + tau z                       for each school
    y | theta ~ Normal(theta, sigma)                             for each school

    The non-centred form: a priori z knows nothing of mu and tau. sigma, y: (schools,), the standard
    errors and the estimates; y None to draw it. Returns y.
    """
    mu = pyro.sample("mu", dist.Normal(sigma.new_zeros(()), mu_scale))
    tau = pyro.sample("tau", dist.HalfCauchy(sigma.new_tensor(tau_scale)))
    with pyro.plate("schools", sigma.shape[0]):
        z = pyro.sample("z", dist.Normal(sigma.new_zeros(()), 1.0))
        return pyro.sample("y", dist.Normal(mu + tau * z, sigma), obs=y)


def centred(sigma, y=None, mu_scale=MU_SCALE, tau_scale=TAU_SCALE):
    """mu ~ Normal(0, mu_scale),   tau ~ HalfCauchy(tau_scale)
    theta | mu, tau ~ Normal(mu, tau),   y | theta ~ Normal(theta, sigma)   for each school

    The same model of y as `model`, with theta itself for a latent. Where tau is small all theta
    must be near mu, where it is large they are free: a funnel.
    """
    mu = pyro.sample("mu", dist.Normal(sigma.new_zeros(()), mu_scale))
    tau = pyro.sample("tau", dist.HalfCauchy(sigma.new_tensor(tau_scale)))
    with pyro.plate("schools", sigma.shape[0]):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        return pyro.sample("y", dist.Normal(theta, sigma), obs=y)
