"""Three small models with exact gradients: global g, local z_n in a plate, data y_n.

Each is written twice from the same densities: as a Pyro model and guide, and as plain functions
of tensors from which gradients are worked out by hand or by summing over a grid.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch.distributions import constraints

N, B = 5, 2
Y = torch.tensor([0.5, -1.0, 2.0, 0.3, 1.1], dtype=torch.float64)
X = torch.tensor([1.0, -0.5, 0.7, 2.0, -1.5], dtype=torch.float64)


@dataclass
class Toy:
    """log p and q of one model; ``continuous`` says which of g and z can be reparameterised."""

    name: str
    continuous: dict[str, bool]

    def prior_g(self):
        return self._normal(0.0, 1.0) if self.continuous["g"] else dist.Bernoulli(self._one * 0.4)

    _one = torch.tensor(1.0, dtype=torch.float64)

    def _normal(self, loc, scale):
        return dist.Normal(loc * self._one, scale * self._one)

    def prior_z(self, g, x):
        return self._normal(g * x, 1.0) if self.continuous["z"] else dist.Bernoulli(logits=g * x)

    def likelihood(self, z):
        """Of y, which g does not enter: the terms that Rao-Blackwellisation leaves out."""
        return dist.Normal(torch.sin(2 * z) + z, 0.7)

    def q_g(self, p):
        if self.continuous["g"]:
            return dist.Normal(p["g_loc"], p["g_log_scale"].exp())
        return dist.Bernoulli(logits=p["g_loc"])

    def q_z(self, p, i):
        if self.continuous["z"]:
            return dist.Normal(p["z_loc"][i], p["z_log_scale"][i].exp())
        return dist.Bernoulli(logits=p["z_loc"][i])

    def parameters(self):
        values = {"g_loc": torch.tensor(0.4), "z_loc": torch.linspace(-0.8, 0.9, N)}
        if self.continuous["g"]:
            values["g_log_scale"] = torch.tensor(-0.3)
        if self.continuous["z"]:
            values["z_log_scale"] = torch.linspace(-0.5, 0.2, N)
        return {k: v.double().requires_grad_() for k, v in sorted(values.items())}

    # -- as Pyro sees it

    def pair(self, subsample=None):
        start = {k: v.detach() for k, v in self.parameters().items()}
        # A dtype of its own for the subsample, so that the default one does not matter.

        def model(x, y):
            g = pyro.sample("g", self.prior_g())
            with pyro.plate("data", N, subsample_size=subsample) as i:
                z = pyro.sample("z", self.prior_z(g, x[i]))
                pyro.sample("y", self.likelihood(z), obs=y[i])

        def guide(x, y):
            p = {name: pyro.param(name, value.clone()) for name, value in start.items()}
            pyro.sample("g", self.q_g(p))
            with pyro.plate("data", N, subsample_size=subsample) as i:
                pyro.sample("z", self.q_z(p, i))

        return model, guide

    # -- by hand

    def terms(self, p, g, z, i):
        """The ELBO's terms at one draw: (of g alone, (B,) of z_n and perhaps g), unscaled."""
        of_g = self.prior_g().log_prob(g) - self.q_g(p).log_prob(g)
        of_z = self.prior_z(g, X[i]).log_prob(z) - self.q_z(p, i).log_prob(z)
        return of_g, of_z, self.likelihood(z).log_prob(Y[i])

    def redraw(self, p, g, z, i):
        """The same draws as functions of p, where they can be."""
        if self.continuous["g"]:
            q = self.q_g(p)
            g = q.loc + q.scale * ((g - q.loc) / q.scale).detach()
        if self.continuous["z"]:
            q = self.q_z(p, i)
            z = q.loc + q.scale * ((z - q.loc) / q.scale).detach()
        return g, z

    def exact_elbo(self, p):
        """The ELBO by Gauss-Hermite quadrature and enumeration; differentiable in p."""
        g, wg = self._nodes(self.q_g(p))
        i = torch.arange(N)
        z, wz = self._nodes(self.q_z(p, i))  # (K, N) twice
        g, wg, z, wz = g[:, None, None], wg[:, None, None], z[None], wz[None]
        of_g, of_z, of_y = self.terms(p, g, z, i)
        weighted = wg * wz * (of_z + of_y)
        return (wg * of_g).sum() + weighted.sum()

    def _nodes(self, q):
        if isinstance(q, dist.Normal):
            x, w = np.polynomial.hermite_e.hermegauss(60)
            x, w = torch.as_tensor(x), torch.as_tensor(w / w.sum())
            shape = (-1, *[1] * q.loc.dim())
            return q.loc + q.scale * x.reshape(shape), w.reshape(shape).expand(-1, *q.loc.shape)
        values = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(-1, *[1] * q.logits.dim())
        values = values.expand(-1, *q.logits.shape)
        return values, q.log_prob(values).exp()

    def exact_gradient(self):
        """Gradient of the loss (minus the ELBO), name -> tensor."""
        p = self.parameters()
        return dict(zip(p, torch.autograd.grad(-self.exact_elbo(p), list(p.values())), strict=True))


TOYS = {
    "continuous": Toy("continuous", {"g": True, "z": True}),
    "discrete": Toy("discrete", {"g": False, "z": False}),
    "mixed": Toy("mixed", {"g": True, "z": False}),
}
DATA = {"x": X, "y": Y}


class Recorder(Messenger):
    """Values at the sample sites of a guide."""

    def __init__(self):
        super().__init__()
        self.values = {}

    def _pyro_post_sample(self, msg):
        if not msg["is_observed"]:
            self.values.setdefault(msg["name"], msg["value"])


def capturing(estimator):
    """The same estimator, keeping the draws of its last step in ``captured``."""

    class Capturing(type(estimator)):
        def one(self, model, guide, args, kwargs):
            with Recorder() as recorder:
                tensors, about = super().one(model, guide, args, kwargs)
            captured = {n: recorder.values[n].detach() for n in ("g", "z", "data")}
            return tensors | {"captured": captured}, about

        def _draw(self, *args):
            tensors, about = super()._draw(*args)
            self.captured = tensors["captured"]
            return tensors, about

    estimator.__class__ = Capturing
    return estimator


def gradient(estimator, model, guide, data):
    """(loss, name of parameter -> gradient) of one step; None where there is no gradient."""
    store = pyro.get_param_store()
    for _, leaf in store.named_parameters():
        leaf.grad = None
    loss = estimator.loss_and_grads(model, guide, **data)
    return loss, {n: leaf.grad for n, leaf in store.named_parameters()}


def gradients(estimator, model, guide, data, draws):
    """(draws, all parameters): independent estimates of the gradient, flattened by name."""
    rows = []
    for _ in range(draws):
        found = gradient(estimator, model, guide, data)[1]
        leaves = dict(pyro.get_param_store().named_parameters())
        rows.append(
            torch.cat(
                [
                    (torch.zeros_like(leaves[n]) if g is None else g).reshape(-1)
                    for n, g in sorted(found.items())
                ]
            )
        )
    return torch.stack(rows)


def flat(gradient):
    return torch.cat([g.reshape(-1) for _, g in sorted(gradient.items())])


def conjugate(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def normal_guide(loc, scale):
    def guide(y):
        m = pyro.param("loc", loc.clone())
        s = pyro.param("scale", scale.clone(), constraint=constraints.positive)
        pyro.sample("mu", dist.Normal(m, s))

    return guide


def conjugate_posterior(y):
    precision = 1 / 4 + len(y)
    return y.sum() / precision, torch.tensor(precision, dtype=y.dtype).rsqrt()


class Indexed:
    """Bernoulli latents, one per datum, in the two ways that fit subsamples."""

    y = torch.tensor([0.2, 1.4, -0.3, 0.9, 1.8, 0.1, 0.4], dtype=torch.float64)
    data: ClassVar = {"y": y, "row": torch.arange(7)}

    @staticmethod
    def model(y, row):
        with pyro.plate("n", len(y)) as i:
            z = pyro.sample("z", dist.Bernoulli(0.5 * torch.ones((), dtype=y.dtype)))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y[i])

    @staticmethod
    def guide(y, row):
        logits = pyro.param("logits", torch.zeros(7, dtype=y.dtype))
        with pyro.plate("n", len(y)) as i:
            pyro.sample("z", dist.Bernoulli(logits=logits[row[i]]))
