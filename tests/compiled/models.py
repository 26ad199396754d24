"""Models and guides of the tests of compiled steps."""

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints

X = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))


Y = X @ torch.tensor([1.0, -1.0, 0.5]) + torch.randn(30, generator=torch.Generator().manual_seed(1))


DATA = {"X": X, "y": Y}


def regression(X, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    s = pyro.sample("s", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(X)):
        pyro.sample("y", dist.Normal(X @ w, s), obs=y)


def positive(name, value):
    return pyro.param(name, torch.tensor(value), constraint=constraints.positive)


def hand_written(scale):
    def guide(X, y):
        loc = pyro.param("loc", torch.zeros(3, dtype=X.dtype))
        pyro.sample("w", dist.Normal(loc, positive("sd", 0.1)).to_event(1))
        pyro.sample("s", scale())

    return guide


log_normal = hand_written(
    lambda: dist.LogNormal(pyro.param("a", torch.tensor(0.0)), positive("b", 0.2))
)


gamma = hand_written(lambda: dist.Gamma(positive("a", 4.0), positive("b", 4.0)))


def local(X, y):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 30) as i:
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y[i])


def amortised(seed=0):
    torch.manual_seed(seed)
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))

    def guide(X, y):
        pyro.module("network", network)
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.sample("mean", dist.Normal(loc, positive("sd", 0.5)))
        with pyro.plate("data", 30) as i:
            out = network(X[i])
            pyro.sample("z", dist.Normal(out[:, 0], out[:, 1].exp()))

    return guide


def mixture(X, y):
    share = pyro.sample("share", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("components", 2):
        centre = pyro.sample("centre", dist.Normal(0.0, 3.0))
    with pyro.plate("data", 30) as i:
        k = pyro.sample("k", dist.Categorical(share), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(centre[k], 1.0), obs=y[i])


def coin(X, y):
    z = pyro.sample("z", dist.Bernoulli(0.3))
    pyro.sample("observed", dist.Normal(z, 1.0), obs=torch.tensor(0.7))


def coin_guide(X, y):
    p = pyro.param("p", torch.tensor(0.5), constraint=constraints.unit_interval)
    pyro.sample("z", dist.Bernoulli(p))


def discrete(X, y):
    """One latent of each kind that torch draws by an operator of its own."""
    with pyro.plate("data", len(y)) as rows:
        b = pyro.sample("b", dist.Bernoulli(X.new_tensor(0.3)))
        c = pyro.sample("c", dist.Categorical(X.new_tensor([0.2, 0.3, 0.5])))
        k = pyro.sample("k", dist.Poisson(X.new_tensor(1.5)))
        pyro.sample("observed", dist.Normal(b + c - k, 1.0), obs=y[rows])


def discrete_guide(X, y):
    logits = pyro.param("logits", X.new_zeros(len(y)))
    weights = pyro.param("weights", X.new_ones(len(y), 3), constraint=constraints.simplex)
    rate = pyro.param("rate", X.new_ones(len(y)), constraint=constraints.positive)
    with pyro.plate("data", len(y)) as rows:
        pyro.sample("b", dist.Bernoulli(logits=logits[rows]))
        pyro.sample("c", dist.Categorical(weights[rows]))
        pyro.sample("k", dist.Poisson(rate[rows]))


def shares(X, y):
    with pyro.plate("groups", 3):
        g = pyro.sample("g", dist.Gamma(X.new_tensor(2.0), X.new_tensor(1.0)))
        w = pyro.sample("w", dist.Dirichlet(X.new_ones(4)))
        b = pyro.sample("b", dist.Beta(X.new_tensor(2.0), X.new_tensor(3.0)))
    pyro.sample("observed", dist.Normal((g * b * w[..., 0]).sum(), 1.0), obs=y[0])


def shares_guide(X, y):
    def positive(name, shape):
        return pyro.param(name, 1.5 * X.new_ones(shape), constraint=constraints.positive)

    with pyro.plate("groups", 3):
        pyro.sample("g", dist.Gamma(positive("shape", (3,)), positive("rate", (3,))))
        pyro.sample("w", dist.Dirichlet(positive("weights", (3, 4))))
        pyro.sample("b", dist.Beta(positive("plus", (3,)), positive("minus", (3,))))
