"""Guides for the deep exponential family: factors for the weights, a reader for the documents.

q(w, z) = prod q(w_lkj) prod q(z_nlk | document n): all factors are independent. What makes it fit:

*Factors.* A sparse Gamma factor has most of its draws at numbers that underflow, and its shape and
rate are strongly dependent. Here positive factors are held by (mean, shape), both on log scales and
softly bounded, as a Gamma or as the lognormal of the same mean and variance. KL(q || prior) is in
closed form for both.

*Documents.* There is no parameter per document: a document's factors are computed from its words
when it comes up, so the cost of a step and the memory do not depend on the number of documents, and
a new document costs what an old one does. The words are first *read* through the model's own
topics: a few steps of EM give the expected number of words due to each unit of the lowest layer.
From those K numbers, not from V words, a small network computes the factors of all layers; for the
lowest layer it only corrects the conjugate answer, shape = prior shape + expected number of words.

*Start.* Started from noise, the topics of a mean-field guide stay near the background for long, and
if the prior of w0 is fitted meanwhile, for good. So the weights start from EM on some thousand
documents, means and shapes, and that prior is fixed.
"""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch.distributions import kl
from torch.nn.functional import softplus

from .model import TINY, WIDTHS

PSEUDO = 0.1  # shape that EM adds to each unit and word: keeps unseen ones possible
SEEDS = 20  # documents that a unit starts from
# Adam moves every weight by about its step size, so a network's output by the step size times its
# width. These keep the first moves of log means and log shapes near 0.1 at the step size of 0.02
# that suits the weights; without them the first ten steps undo the start.
INPUT_SCALE, OUTPUT_SCALE = 0.1, 0.05
CHUNK = 1000  # documents that are read at once at the start


@kl.register_kl(torch.distributions.LogNormal, torch.distributions.Gamma)
def _kl_lognormal_gamma(q, p):
    """E_q[log q(z) - log p(z)], with E_q[log z] = mu and E_q[z] = exp(mu + sigma^2 / 2)."""
    shape, rate, mu, sigma = p.concentration, p.rate, q.loc, q.scale
    entropy = 0.5 + 0.5 * math.log(2 * math.pi) + sigma.log() + mu
    mean = (mu + sigma**2 / 2).exp()
    return rate * mean - (shape - 1) * mu - shape * rate.log() + torch.lgamma(shape) - entropy


def positive(family, log_mean, log_shape):
    """A distribution on (0, inf) of this mean, with the relative variance 1 / shape of a Gamma.

    family: "gamma" or "lognormal". Soft bounds: exp(+-25) for the mean and exp(+-7) for the shape.
    At both lower bounds a lognormal draw five sds down is exp(-42), still a number in single
    precision; Gamma draws are kept above the smallest one by torch.

    >>> q = positive("lognormal", torch.tensor(0.0), torch.tensor(0.0))
    >>> round(float(q.mean), 3), round(float(q.variance), 3)
    (1.0, 1.0)
    """
    log_mean = 25 * torch.tanh(log_mean / 25)
    shape = (7 * torch.tanh(log_shape / 7)).exp()
    if family == "gamma":
        return dist.Gamma(shape, shape / log_mean.exp())
    variance = torch.log1p(1 / shape)
    return dist.LogNormal(log_mean - variance / 2, variance.sqrt())


def read(x, exposure, w, steps):
    """Expected number of words due to each unit, by EM for the factors of the lowest layer.

    x: (B, V) counts; exposure: (B,); w: (K, V), the weights; steps: of EM, from equal factors.
    Returns expected counts n (B, K), whose rows add up to the documents' lengths, and the means
    (PSEUDO + n) / (PSEUDO + exposure w 1) of the factors given them.
    """
    z, size = w.new_ones(len(x), len(w)), exposure[:, None] * w.sum(1)
    n = z
    for _ in range(steps):
        n = z * ((x / (z @ w + TINY)) @ w.T)
        z = (PSEUDO + n) / (PSEUDO + size)
    return n, z


def dense(documents, terms, dtype):
    """Counts (B, terms) from (word, count) pairs (B, M, 2)."""
    x = torch.zeros(len(documents), terms, dtype=dtype, device=documents.device)
    return x.scatter_add(1, documents[..., 0], documents[..., 1].to(dtype))


@torch.no_grad()
def start(documents, exposure, background, units, steps=2, few=5_000, passes=8):
    """Log means and log shapes of w0, both (units, V), by EM on `few` random documents.

    Each unit starts from the words of SEEDS random documents. The shapes are those of the Gamma
    factors given all expected counts, scaled up to all of the documents.
    """
    dtype, terms = background.dtype, len(background)
    chosen = torch.randperm(len(documents))[:few]
    seeds = torch.randint(0, len(chosen), (units * SEEDS,))
    documents, exposure, share = documents[chosen], exposure[chosen], len(chosen) / len(documents)
    w = dense(documents[seeds].reshape(units, -1, 2), terms, dtype)
    w = (w / SEEDS + background) / units
    for _ in range(passes):
        n, size = torch.zeros_like(w), torch.zeros_like(w[:, 0])
        for part in torch.arange(len(documents)).split(CHUNK):
            x, e = dense(documents[part], terms, dtype), exposure[part]
            z = read(x, e, w, steps)[1] * e[:, None]
            n += w * (z.T @ (x / (z @ w + TINY)))
            size += z.sum(0)
        w = (PSEUDO + n) / (PSEUDO * units / background + size[:, None])
    return w.log(), (PSEUDO + n / share).log()


class Guide(PyroModule):
    """Mean-field guide of :func:`~.model.model`; call :meth:`start` before fitting.

    widths, latent, weights: as the model's. factors: family of the documents' positive factors,
    "gamma" or "lognormal"; weight_factors: that of the weights. reads: steps of EM by which a
    document is read. hidden: units in each of the two hidden layers of the network. known: weights
    that are given, {"w0": ..., ...}, for a model that is conditioned on them; the guide is then for
    the documents alone.
    """

    def __init__(
        self,
        widths=WIDTHS,
        latent="gamma",
        weights="gamma",
        factors="gamma",
        weight_factors="lognormal",
        reads=2,
        hidden=200,
        known=None,
    ):
        super().__init__()
        self.widths, self.latent, self.weights = tuple(widths), latent, weights
        self.factors, self.weight_factors, self.reads = factors, weight_factors, reads
        self.known = known
        self.network = torch.nn.Sequential(
            torch.nn.Linear(self.widths[0] + 1, hidden),
            torch.nn.ReLU(),
            torch.nn.Linear(hidden, hidden),
            torch.nn.ReLU(),
            torch.nn.Linear(hidden, 2 * sum(self.widths)),
        )
        torch.nn.init.zeros_(self.network[-1].weight)  # at first, the conjugate answer alone
        torch.nn.init.zeros_(self.network[-1].bias)

    def start(self, documents, exposure, background, seed=0, **options):
        """Give every weight its first factor; `options` go to :func:`start`. Returns the guide.

        Called by the first run of the guide if it was not before.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            first = [start(documents, exposure, background, self.widths[0], **options)]
            for above, below in zip(self.widths[1:], self.widths, strict=False):
                noise = torch.randn(above, below, dtype=background.dtype)
                if self.weights == "gamma":
                    first.append((0.5 * noise - math.log(above), torch.full_like(noise, 2.0)))
                else:
                    first.append((0.1 * noise, torch.full_like(noise, -2.0)))
            for layer, (location, spread) in enumerate(first):
                setattr(self, f"w{layer}_location", torch.nn.Parameter(location))
                setattr(self, f"w{layer}_spread", torch.nn.Parameter(spread))
        return self

    def weight(self, layer):
        """q(w_layer): distribution of shape (units above, units below)."""
        location = getattr(self, f"w{layer}_location")
        spread = getattr(self, f"w{layer}_spread")
        if layer and self.weights == "normal":
            return dist.Normal(location, softplus(spread))
        return positive(self.weight_factors, location, spread)

    def factor(self, layer, a, b, n, z):
        """q(z_layer | document) from the network's outputs a and b and what was read, n and z."""
        if self.latent == "gamma":
            if layer == 1:
                a, b = a + z.log(), b + (PSEUDO + n).log()
            return positive(self.factors, a, b)
        if self.latent == "bernoulli":
            return dist.Bernoulli(logits=a - 2.0)
        if self.latent == "poisson":
            return dist.Poisson(softplus(a - 2.0))
        return dist.Normal(a, softplus(b))

    def forward(self, documents=None, exposure=None, background=None):
        depth = len(self.widths)
        if self.known is None:
            if not hasattr(self, "w0_location"):
                self.start(documents, exposure, background)
            q = [self.weight(layer) for layer in range(depth)]
            for layer in range(depth):
                pyro.sample(f"w{layer}", q[layer].to_event(2))
        w = self.known["w0"] if self.known else q[0].mean.detach()
        with pyro.plate("documents", len(exposure)) as rows:
            x = dense(documents[rows], len(background), background.dtype)
            # Through a constant copy of the weights: q(w) is fitted to words, not to the reader.
            n, z = read(x, exposure[rows], w, self.reads)
            features = torch.cat([(PSEUDO + n).log(), exposure[rows, None].log()], 1)
            outputs = OUTPUT_SCALE * self.network(INPUT_SCALE * features)
            outputs = outputs.split([2 * units for units in self.widths], 1)
            for layer in range(depth, 0, -1):
                a, b = outputs[layer - 1].chunk(2, 1)
                pyro.sample(f"z{layer}", self.factor(layer, a, b, n, z).to_event(1))


guide = Guide()
# The same with lognormal factors for the documents, which have heavier tails than the sparse Gamma
# that a unit without words has in the posterior.
lognormal_factors = Guide(factors="lognormal")
GUIDES = {"gamma factors": guide, "lognormal factors": lognormal_factors}
