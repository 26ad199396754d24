"""Models, guides and data for the tests of preflight."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.distributions.transforms import OrderedTransform
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoNormal
from torch.distributions import transforms

N = 12
generator = torch.Generator().manual_seed(0)
Y = torch.randn(N, generator=generator)
X = torch.randn(N, 3, generator=generator)
GROUP = torch.arange(N) % 4
BINARY = (Y > 0).float()
COUNTS = torch.arange(N)
POINTS = torch.randn(N, 2, generator=generator)
XY, GY, ORDER = {"X": X, "y": Y}, {"group": GROUP, "y": Y}, {"rating": COUNTS % 4}
FREE = {"mu": dist.Normal(0.0, 1.0)}


def q(**sites):
    """A guide with the given distributions and no plates."""

    def guide(*args, **kwargs):
        for name, fn in sites.items():
            pyro.sample(name, fn)

    return guide


def normal(*shape):
    return dist.Normal(torch.zeros(shape), 1.0)


def conjugate(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("observations", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def conjugate_guide(y):
    loc = pyro.param("loc", torch.tensor(0.0))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    pyro.sample("mu", dist.Normal(loc, scale))


def regression(X, y=None):
    sigma = pyro.sample("sigma", dist.HalfCauchy(1.0))
    coefficients = pyro.sample("coefficients", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("observations", len(X)):
        return pyro.sample("y", dist.Normal(X @ coefficients, sigma), obs=y)


def regression_guide(X, y=None):
    loc = pyro.param("loc", torch.zeros(4))
    tril = pyro.param("tril", torch.eye(4), constraint=constraints.lower_cholesky)
    both = pyro.sample(
        "both", dist.MultivariateNormal(loc, scale_tril=tril), infer={"is_auxiliary": True}
    )
    pyro.sample("coefficients", dist.Delta(both[:3], event_dim=1))
    sigma = both[3].exp()
    pyro.sample("sigma", dist.Delta(sigma, log_density=-both[3]))


def hierarchical(group, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(2.0))
    with pyro.plate("groups", 4):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
    pyro.deterministic("largest", theta.max())
    with pyro.plate("observations", len(y)):
        pyro.sample("y", dist.Normal(theta[group], 1.0), obs=y)


hierarchical.LATENTS = {"mu": (), "tau": (), "theta": ("groups",)}


def hierarchical_guide(group, y):
    pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    loc = pyro.param("theta_loc", torch.zeros(4))
    with pyro.plate("groups", 4):
        pyro.sample("theta", dist.Normal(loc, 0.5))


def parts(group, y):
    return hierarchical(group, y)


def mu_guide(group, y):
    pyro.sample("mu", dist.Normal(0.0, 1.0))


def list_guide():
    guide = AutoGuideList(parts)
    guide.append(AutoDelta(poutine.block(parts, expose=["tau"])))
    guide.append(AutoNormal(poutine.block(parts, expose=["theta"])))
    guide.append(mu_guide)
    return guide


def simplex(counts):
    probs = pyro.sample("probs", dist.Dirichlet(torch.ones(5)))
    pyro.sample("counts", dist.Multinomial(int(counts.sum()), probs), obs=counts)


def simplex_guide(counts):
    alpha = pyro.param("alpha", torch.ones(5), constraint=constraints.positive)
    pyro.sample("probs", dist.Dirichlet(alpha))


def cutpoints(rating):
    base = dist.Normal(0.0, 1.0).expand([3]).to_event(1)
    cuts = pyro.sample("cuts", dist.TransformedDistribution(base, [OrderedTransform()]))
    ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
    with pyro.plate("observations", len(rating)):
        pyro.sample("rating", dist.OrderedLogistic(ability, cuts), obs=rating)


def cutpoints_guide(rating):
    loc = pyro.param("loc", torch.tensor([-1.0, 0.0, 1.0]))
    base = dist.Normal(loc, 0.1).to_event(1)
    pyro.sample("cuts", dist.TransformedDistribution(base, [OrderedTransform()]))
    pyro.sample("ability", dist.Normal(0.0, 1.0))


@config_enumerate
def enumerated_mixture(y):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("components", 2):
        locs = pyro.sample("locs", dist.Normal(0.0, 5.0))
    with pyro.plate("observations", len(y)):
        component = pyro.sample("component", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(locs[component], 1.0), obs=y)


def marginal_mixture(y):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    locs = pyro.sample("locs", dist.Normal(0.0, 5.0).expand([2]).to_event(1))
    with pyro.plate("observations", len(y)):
        mixture = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(locs, 1.0))
        pyro.sample("y", mixture, obs=y)


def markov_chain(y):
    drift = pyro.sample("drift", dist.Normal(0.0, 0.1))
    state = 0.0
    for t in pyro.markov(range(len(y))):
        state = pyro.sample(f"state_{t}", dist.Normal(state + drift, 0.5))
        pyro.sample(f"y_{t}", dist.Normal(state, 1.0), obs=y[t])


def markov_chain_guide(y):
    pyro.sample("drift", dist.Normal(0.0, 0.1))
    for t in range(len(y)):
        pyro.sample(f"state_{t}", dist.Normal(0.0, 1.0))


def hidden_markov(y):
    rows = pyro.sample("rows", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
    locs = pyro.sample("locs", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    hmm = dist.DiscreteHMM(torch.zeros(2), rows.log(), dist.Normal(locs, 1.0), duration=len(y))
    pyro.sample("y", hmm, obs=y)


def correlated(points):
    scale = pyro.sample("scale", dist.HalfNormal(1.0).expand([2]).to_event(1))
    tril = pyro.sample("tril", dist.LKJCholesky(2, 1.0))
    with pyro.plate("observations", len(points)):
        pyro.sample(
            "points",
            dist.MultivariateNormal(torch.zeros(2), scale_tril=scale[:, None] * tril),
            obs=points,
        )


def topics(words):
    """Latent Dirichlet allocation: nested plates, a minibatch that the guide chooses."""
    with pyro.plate("topics", 3):
        topic_words = pyro.sample("topic_words", dist.Dirichlet(torch.ones(4)))
    with pyro.plate("documents", words.shape[1]) as i:
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("words_in_documents", words.shape[0]):
            topic = pyro.sample("topic", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("words", dist.Categorical(topic_words[topic]), obs=words[:, i])


def topics_guide(words):
    with pyro.plate("topics", 3):
        pyro.sample("topic_words", dist.Dirichlet(torch.ones(3, 4)))
    with pyro.plate("documents", words.shape[1], subsample_size=2):
        pyro.sample("weights", dist.Dirichlet(torch.ones(2, 3)))


def gaussian_process(points, y):
    length = pyro.sample("length", dist.LogNormal(0.0, 1.0))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    kernel = (-0.5 * torch.cdist(points / length, points / length) ** 2).exp()
    covariance = kernel + (noise**2 + 1e-3) * torch.eye(len(y))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(y)), covariance), obs=y)


def horseshoe(X, y):
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    with pyro.plate("predictors", X.shape[1]):
        local = pyro.sample("local", dist.HalfCauchy(1.0))
        beta = pyro.sample("beta", dist.Normal(0.0, tau * local))
    with pyro.plate("observations", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=X @ beta), obs=y)


def improper(y):
    mu = pyro.sample("mu", dist.ImproperUniform(constraints.ordered_vector, (), (2,)))
    shift = pyro.sample("shift", dist.ImproperUniform(constraints.real, (), ()))
    pyro.factor("mu_prior", dist.Normal(0.0, 2.0).log_prob(mu).sum(-1))
    with pyro.plate("observations", len(y)):
        pyro.sample("y", dist.Normal(shift + mu.mean(), 1.0), obs=y)


def sequential(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    for i in pyro.plate("observations", len(y)):
        z = pyro.sample(f"z_{i}", dist.Normal(mu, 1.0))
        pyro.sample(f"y_{i}", dist.Normal(z, 1.0), obs=y[i])


def sequential_guide(y):
    pyro.sample("mu", dist.Normal(0.0, 1.0))
    for i in pyro.plate("observations", len(y)):
        pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))


def sequential_repeated(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    for i in pyro.plate("observations", len(y)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample(f"y_{i}", dist.Normal(z, 1.0), obs=y[i])


def discrete_guided(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    flip = pyro.sample("flip", dist.Bernoulli(0.3))
    with pyro.plate("observations", len(y)):
        pyro.sample("y", dist.Normal(mu * (1 - 2 * flip), 1.0), obs=y)


def discrete_guide(y):
    pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("flip", dist.Bernoulli(0.5))


def positive(y):
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("observations", len(y)):
        pyro.sample("y", dist.Normal(0.0, sigma), obs=y)


def local(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("observations", len(y)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def columns(X, y):
    coefficients = pyro.sample(
        "coefficients", dist.Normal(0.0, 1.0).expand([X.shape[1]]).to_event(1)
    )
    pyro.sample("y", dist.Normal(X @ coefficients, 1.0).to_event(1), obs=y)


columns.LATENTS = {"coefficients": ("predictors",)}


def raises_later(y):
    conjugate(y)
    raise KeyError("no such column")


def density(covariance):
    """A known target: its data are constants, not observations."""
    pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), covariance))


def prior(latent):
    """A model with one latent `z`."""

    def model(y):
        z = pyro.sample("z", latent)
        pyro.sample("y", dist.Normal(z.sum(), 1.0).expand([len(y)]).to_event(1), obs=y)

    return model


def observed(fn, latent=None):
    """A model with a real latent `z` and one observed site."""

    def model(y):
        z = pyro.sample("z", latent or dist.Normal(0.0, 1.0))
        pyro.sample("y", fn(z, y), obs=y)

    return model


def shifted_exponential(rate=1.0):
    base = dist.Normal(0.0, rate)
    return dist.TransformedDistribution(
        base, [transforms.ExpTransform(), transforms.AffineTransform(2.0, 3.0)]
    )


def plate_guide(name, size, fn=None):
    def guide(y):
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate(name, size):
            pyro.sample("z", fn or dist.Normal(0.0, 1.0))

    return guide


def after_a_run(model, data):
    guide = AutoNormal(model)
    guide(**data)
    return guide


def hide(model, *names):
    return poutine.block(model, hide=list(names))
