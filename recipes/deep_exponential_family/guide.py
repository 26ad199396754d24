"""A guide for the deep exponential family: factors for the weights, a reader for the documents.

    q(w, z | x) = prod q(w_lkj)  prod_n q(z_n,L) ... q(z_n,2) q(z_n,1 | z_n,2, x_n, w_0)

What makes it fit:

*Documents are read through the topics.* There is no parameter per document, so the cost of a step
and the memory do not depend on their number. A document's words are shared out among the units of
the lowest layer by the collapsed fixed point of :func:`read`, which treats the factors z_1 as
integrated out and each word as judged by the *other* words of its document. Given the expected
number n_k of words due to unit k the conditional of a Gamma factor is conjugate:

    q(z_1,k | z_2, x) = Gamma(shape_k + n_k, rate shape_k / s_k + e sum_v w_kv)

It keeps the dependence on the layer above. Independent factors would have to say how much of each
unit there is without knowing what the others took.

*Upper layers, and units that are not Gamma*, have independent factors that a small network computes
from n. Positive ones are held by (mean, shape) on log scales, softly bounded: a sparse Gamma has
most of its draws at numbers that underflow, and its shape and rate are strongly dependent. Units
of the lowest layer that are not Gamma start at the mean that a Gamma unit would have, (shape + n) /
(shape / prior mean + e sum_v w_kv), which the network corrects. Were all documents alike at first,
the score function's gradient would hardly find a difference between them.

*Topics* have lognormal factors of one fixed, small width: all but points. With a width of its own
for each, a rare word of a topic gets a wide factor whose draws swamp the gradient.

*Every layer starts from topics of the one below.* From noise, gradients find next to nothing above
the lowest layer.
"""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch.distributions import kl
from torch.nn.functional import softplus

from . import differences
from .model import FLOOR, MEAN, OWN, TINY, WIDTHS

SHAPE = 0.05  # of the lowest layer's units, at first
PSEUDO = 0.02  # words that each topic has of each kind before any document, at the start
# Adam moves every weight by about its step size, so a network's output by the step size times its
# width. These keep the first moves of log means and log shapes near 0.1 at the step size of 0.02
# that suits the weights; without them the first ten steps undo the start.
INPUT_SCALE, OUTPUT_SCALE = 0.1, 0.05
TOPIC_SCALE = 0.5  # so that the log weights of topics move twice as fast as all else


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


def entries(documents, dtype):
    """(document, word, count) of every pair that is not filling, each (E,): E differs by batch."""
    row, place = (documents[..., 1] > 0).nonzero(as_tuple=True)
    word, count = documents[row, place].unbind(1)
    return row, word, count.to(dtype)


def read(row, word, count, w, shape, rate, steps):
    """Expected number of words due to each unit, the factors of the lowest layer integrated out.

    Each word of a document is given to unit k with probability

        g_k proportional to  w_kv (shape_k + n_k - g_k) / rate_k,   n = sum of g over its words,

    where n - g counts the other words only: the zero-order collapsed variational inference of
    Asuncion, Welling, Smyth and Teh, "On smoothing and inference for topic models", UAI 2009, for
    Gamma factors of this shape and posterior rate in place of a Dirichlet.

    row, word, count: (E,), as :func:`entries` has them; w: (V, K), the weights transposed; shape:
    (K,); rate: (B, K), of the factors' posterior, that of the prior plus e sum_v w_kv. At
    first each word is by itself. Returns n (B, K), whose rows add up to the documents' lengths, and
    g (E, K).
    """
    chance = w[word] / rate[row]
    count = count[:, None]
    one = count.clamp(max=1)  # word, or what there is of it: expected counts may be less

    def shared_out(g):
        g = g.div_(g.sum(1, keepdim=True).clamp_(min=TINY))
        return torch.zeros_like(rate).index_add(0, row, g * count), g

    n, g = shared_out(chance.clone())
    for _ in range(steps):
        n, g = shared_out(n[row].sub_(g * one).add_(shape).mul_(chance))
    return n, g


@torch.no_grad()
def topics(
    minibatch,
    background,
    units,
    size,
    passes=15,
    batch=512,
    steps=6,
    shape=SHAPE,
    pseudo=PSEUDO,
):
    """Topics of `size` documents by stochastic collapsed variational inference: (w, n).

    minibatch: rows -> :func:`entries` of those documents; background: (V,), the mean count of each
    word in a document; units: how many topics; steps, shape: of the readings; pseudo: words that
    each topic has of each kind before any document. Returns w (units, V), the mean count of a word
    in a document by way of each topic, whose sum over topics is near the background; and n (size,
    units), each document's expected words by topic.

    Each minibatch is read, and the words it gives to a topic, scaled up to all documents, replace
    a share of what the topic holds, which so forgets at the pace of half a pass, in the last third
    of the passes of 1.7 (Foulds et al., "Stochastic collapsed variational Bayesian inference for
    latent Dirichlet allocation", KDD 2013). Topics begin as the background times noise.
    """
    total = background[:, None] * size / units  # expected words of each kind in a topic
    held = pseudo + total * torch.empty_like(total).expand(-1, units).contiguous().exponential_()
    shape = held.new_full((units,), shape)

    def reading(rows):
        row, word, count = minibatch(rows)
        w = held / held.sum(0)  # equal sums: the posterior rates are equal and cancel
        return *read(row, word, count, w, shape, w.new_ones(len(rows), units), steps), word, count

    for step in range(passes):
        memory = 0.5 if 3 * step < 2 * passes else 1.7  # passes, the topics' time constant
        for rows in torch.randperm(size).split(batch):
            _, g, word, count = reading(rows)
            new = torch.zeros_like(held).index_add_(0, word, g * count[:, None])
            share = min(1.0, len(rows) / size / memory)
            held = (1 - share) * held + share * (pseudo + new * (size / len(rows)))
    n = torch.cat([reading(rows)[0] for rows in torch.arange(size).split(batch)])
    return (held / size).T.contiguous(), n


@torch.no_grad()
def start(documents, exposure, background, widths, **options):
    """Weights of every layer, greedily from the words up: [w0, w1, ...].

    A layer is fitted as :func:`topics` of the one below: the expected words of a document by unit
    are to it what the words are to the lowest. All means of z are one at first, so that those of w
    above w0 add up to one over the units above.
    """

    def words(rows):
        return entries(documents[rows], background.dtype)

    w, n = topics(words, background, widths[0], len(exposure), **options)
    weights = [w]
    for units in widths[1:]:
        below = n

        def units_below(rows, below=below):
            row, unit = (below[rows] > 0.05).nonzero(as_tuple=True)
            return row, unit, below[rows][row, unit]

        w, n = topics(units_below, below.mean(0), units, len(exposure), **options)
        weights.append(w / w.sum(0))
    return weights


class Guide(PyroModule):
    """Guide of :func:`~.model.model`; call :meth:`start` before fitting.

    widths, latent, weights: as the model's. factors: family of the documents' positive factors
    above the first layer, "gamma" or "lognormal". spread: relative sd of the topics' lognormal
    factors; None fits one for each weight. reads: steps by which a document is read. hidden: units
    in each of the two hidden layers of the network. known: weights that are given, {"w0": ...,
    ...}, for a model that is conditioned on them; the guide is then for the documents alone.
    shape: of the lowest layer's units, at first.
    """

    def __init__(
        self,
        widths=WIDTHS,
        latent="gamma",
        weights="gamma",
        factors="gamma",
        spread=0.1,
        reads=3,
        hidden=200,
        known=None,
        shape=SHAPE,
    ):
        super().__init__()
        self.widths, self.latent, self.weights = tuple(widths), latent, weights
        self.factors, self.spread, self.reads, self.known = factors, spread, reads, known
        self.shape = shape
        self.conjugate = latent == "gamma"  # the lowest layer, given the one above
        first = torch.zeros(self.widths[0])  # log shapes and log means of the lowest layer
        self.log_shape = torch.nn.Parameter(first + math.log(shape)) if self.conjugate else None
        self.log_mean = torch.nn.Parameter(first) if self.conjugate and len(widths) == 1 else None
        self.outputs = [2 * units for units in self.widths[self.conjugate :]]
        if self.outputs:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # or no two processes would have the same fit
                self.network = torch.nn.Sequential(
                    torch.nn.Linear(self.widths[0] + 1, hidden),
                    torch.nn.ReLU(),
                    torch.nn.Linear(hidden, hidden),
                    torch.nn.ReLU(),
                    torch.nn.Linear(hidden, sum(self.outputs)),
                )
            torch.nn.init.zeros_(self.network[-1].weight)  # at first every document is alike
            torch.nn.init.zeros_(self.network[-1].bias)

    def start(self, documents, exposure, background, seed=0, **options):
        """Give every weight its first factor; `options` go to :func:`start`. Returns the guide.

        Called by the first run of the guide if it was not before.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            options.setdefault("shape", self.shape)
            first = start(documents, exposure, background, self.widths, **options)
        for layer, w in enumerate(first):
            if layer and self.weights == "normal":
                w = w.log() - w.log().mean()
            elif layer:
                w = w.log()
            else:
                if not self.conjugate:  # the rest is each word's own
                    w = w * (1 - OWN) / MEAN[self.latent]
                w = TOPIC_SCALE * w.log()
            setattr(self, f"w{layer}_location", torch.nn.Parameter(w))
            if layer or self.spread is None:
                first_spread = -2.0 if layer and self.weights == "normal" else 3.0
                spread = torch.full_like(w, first_spread)
                setattr(self, f"w{layer}_spread", torch.nn.Parameter(spread))
        return self

    def weight(self, layer):
        """q(w_layer): distribution of shape (units above, units below)."""
        location = getattr(self, f"w{layer}_location")
        if layer == 0 and self.spread is not None:
            return dist.LogNormal(location / TOPIC_SCALE, self.spread)
        spread = getattr(self, f"w{layer}_spread")
        if layer == 0:
            location = location / TOPIC_SCALE
        if layer and self.weights == "normal":
            return dist.Normal(location, softplus(spread))
        return positive("lognormal", location, spread)

    def factor(self, a, b, mean):
        """q(z | document) of units that are not conjugate, (B, K).

        a, b: (B, K), the network's outputs, zero at first. mean: (B, K) or (), of the units that
        are not Gamma where a is zero; what the words see of them if they are Gaussian.
        """
        if self.latent == "gamma":
            return positive(self.factors, a, b)
        if self.latent == "bernoulli":
            return differences.Bernoulli(logits=a + mean.clamp(0.01, 0.99).logit())
        if self.latent == "poisson":
            rate = (25 * torch.tanh((mean.log() + a) / 25)).exp()
            return differences.Poisson(rate + FLOOR)  # at a rate of zero the score is nan
        mean = mean.clamp(min=0.1)
        return dist.Normal(a + mean + (-(-mean).expm1()).log(), softplus(b))  # softplus inverted

    def forward(self, documents=None, exposure=None, background=None):
        depth, w = len(self.widths), self.known
        if self.known is None:
            if not hasattr(self, "w0_location"):
                self.start(documents, exposure, background)
            q = [self.weight(layer) for layer in range(depth)]
            w = {f"w{i}": pyro.sample(f"w{i}", q[i].to_event(2)) for i in range(depth)}
        # Words are shared out through a constant copy of the topics: they are not fitted to that.
        topics = (self.known["w0"] if self.known else q[0].mean).detach()
        with pyro.plate("documents", len(exposure)) as rows:
            words = entries(documents[rows], topics.dtype)
            shape = torch.full_like(topics[:, 0], self.shape)
            shape = self.log_shape.exp() if self.conjugate else shape
            prior_mean = torch.full_like(shape, MEAN[self.latent])
            prior_mean = prior_mean if self.log_mean is None else self.log_mean.exp()
            size = exposure[rows, None] * topics.sum(1)

            def given(rate):
                rate, w = rate + size, topics.T.contiguous()
                return read(*words, w, shape.detach(), rate.detach(), self.reads)[0], rate

            n, rate = given(shape / prior_mean)
            if self.outputs:
                features = torch.cat([(self.shape + n).log(), exposure[rows, None].log()], 1)
                outputs = OUTPUT_SCALE * self.network(INPUT_SCALE * features)
                outputs = outputs.split(self.outputs, 1)
            for layer in range(depth, self.conjugate, -1):
                a, b = outputs[layer - 1 - self.conjugate].chunk(2, 1)
                mean = (shape + n) / rate if layer == 1 else prior_mean[0]
                z = pyro.sample(f"z{layer}", self.factor(a, b, mean).to_event(1))
            if self.conjugate:
                if depth > 1:
                    n, rate = given(shape / (z @ w["w1"] + FLOOR))
                pyro.sample("z1", dist.Gamma(shape + n, rate).to_event(1))


guide = Guide()
# The same with lognormal factors for the upper layers, which have heavier tails than the sparse
# Gamma that a unit without words has in the posterior.
lognormal_factors = Guide(factors="lognormal")
GUIDES = {"gamma factors": guide, "lognormal factors": lognormal_factors}
