"""A guide for the deep exponential family: factors for the weights, a reader for the documents.

    q(w, z | x) = prod q(w_lkj)  prod_n q(z_n,L) ... q(z_n,2) q(z_n,1 | z_n,2, x_n, w_0)

Each part answers a difficulty of this posterior.

*A document has no parameters of its own.* The guide reads it, so the cost of a step and the memory
do not depend on the number of documents. Reading (:func:`~.collapsed.read`) shares the document's
words out among the units of the lowest layer. It integrates the factors z_1 out and judges each
word by the other words of the document.

*The lowest layer of Gamma units is conjugate.* If n_k words are due to unit k, then

    q(z_1,k | z_2, x) = Gamma(shape_k + n_k, rate shape_k / s_k + e sum_v w_kv)

is the exact conditional, and through s = z_2 w_1 it depends on the layer above. Independent factors
would have to state how much of each unit there is without knowing what the others took.

*Upper layers, and lowest layers of other units*, have independent factors, which a small network
computes from n. Positive factors have parameters for log mean and log shape. Most draws of a sparse
Gamma underflow, and its shape and rate are strongly dependent; the mean and the shape are not, and
soft bounds keep draws within single precision. A lowest layer of other units starts at the mean
that a Gamma unit would have, (shape + n) / (shape / prior mean + e sum_v w_kv), and the network
corrects it. If all documents started alike, the score function's gradient would hardly find a
difference between them.

*Topics have lognormal factors of one small, fixed width*, so they are nearly points. If each weight
had a width of its own, a word that is rare in a topic would get a wide factor, and its draws would
swamp the gradient.

*Every layer starts from topics of the one below* (:func:`~.collapsed.start`). From random weights,
gradients find next to nothing above the lowest layer.
"""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch.nn.functional import softplus

from . import collapsed, differences
from .collapsed import SHAPE
from .model import FLOOR, MEAN, OWN, WIDTHS
from .words import entries

# Adam moves every weight of the network by about its step size, and so an output by the step size
# times the network's width. These two scales keep the first moves of log means and log shapes near
# 0.1 at the step size of 0.02 that suits the weights; without them ten steps undo the start.
INPUT_SCALE, OUTPUT_SCALE = 0.1, 0.05
TOPIC_SCALE = 0.5  # lets the log weights of topics move twice as fast as everything else


def positive(family, log_mean, log_shape):
    """A distribution on (0, inf) with this mean and a Gamma's relative variance, 1 / shape.

    family: "gamma" or "lognormal". The mean is softly bounded by exp(+-25) and the shape by
    exp(+-7). At both lower bounds a lognormal draw five sds below the mean is exp(-42), which
    single precision still represents; torch keeps Gamma draws above its smallest number.

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


class Guide(PyroModule):
    """Guide of :func:`~.variants.variant`; call :meth:`start` before fitting.

    widths, latent, weights: as the model's. factors: family of the documents' positive factors
    above the first layer, "gamma" or "lognormal". spread: relative sd of the topics' lognormal
    factors; None fits one for each weight. reads: updates by which a document is read. hidden:
    units in each of the two hidden layers of the network. known: weights {"w0": ..., ...} of a
    model that is conditioned on them; the guide then has factors for the documents alone. shape: of
    the lowest layer's units, at first.
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
                torch.manual_seed(0)  # or every process would fit from different weights
                self.network = torch.nn.Sequential(
                    torch.nn.Linear(self.widths[0] + 1, hidden),
                    torch.nn.ReLU(),
                    torch.nn.Linear(hidden, hidden),
                    torch.nn.ReLU(),
                    torch.nn.Linear(hidden, sum(self.outputs)),
                )
            torch.nn.init.zeros_(self.network[-1].weight)  # every document has the same outputs
            torch.nn.init.zeros_(self.network[-1].bias)

    def start(self, documents, exposure, background, seed=0, **options):
        """Give every weight its first factor, from :func:`~.collapsed.start`. Returns the guide.

        options: of :func:`~.collapsed.topics`. The first run of the guide calls this if nobody did.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            options.setdefault("shape", self.shape)
            first = collapsed.start(documents, exposure, background, self.widths, **options)
        for layer, w in enumerate(first):
            if layer and self.weights == "normal":
                w = w.log() - w.log().mean()
            elif layer:
                w = w.log()
            else:
                if not self.conjugate:  # the rest is the words' own rates
                    w = w * (1 - OWN) / MEAN[self.latent]
                w = TOPIC_SCALE * w.log()
            setattr(self, f"w{layer}_location", torch.nn.Parameter(w))
            if layer or self.spread is None:
                first_spread = -2.0 if layer and self.weights == "normal" else 3.0
                spread = torch.full_like(w, first_spread)
                setattr(self, f"w{layer}_spread", torch.nn.Parameter(spread))
        return self

    def weight(self, layer):
        """q(w_layer), a distribution of shape (units above, units below)."""
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

        a, b: (B, K), the network's outputs, zero at first. mean: (B, K) or (), the mean of units
        that are not Gamma where a is zero; for Normal units, of what the words see of them.
        """
        if self.latent == "gamma":
            return positive(self.factors, a, b)
        if self.latent == "bernoulli":
            return differences.Bernoulli(logits=a + mean.clamp(0.01, 0.99).logit())
        if self.latent == "poisson":
            rate = (25 * torch.tanh((mean.log() + a) / 25)).exp()
            return differences.Poisson(rate + FLOOR)  # a rate of zero has the score nan
        mean = mean.clamp(min=0.1)
        return dist.Normal(a + mean + (-(-mean).expm1()).log(), softplus(b))  # softplus inverted

    def forward(self, documents=None, exposure=None, background=None):
        depth, w = len(self.widths), self.known
        if self.known is None:
            if not hasattr(self, "w0_location"):
                self.start(documents, exposure, background)
            q = [self.weight(layer) for layer in range(depth)]
            w = {f"w{i}": pyro.sample(f"w{i}", q[i].to_event(2)) for i in range(depth)}
        # Documents are read through a constant copy of the topics, which no gradient reaches.
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
                n, _ = collapsed.read(*words, w, shape.detach(), rate.detach(), self.reads)
                return n, rate

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
                if depth > 1:  # read again, now that the layer above is known
                    n, rate = given(shape / (z @ w["w1"] + FLOOR))
                pyro.sample("z1", dist.Gamma(shape + n, rate).to_event(1))


guide = Guide()
# The same with lognormal factors for the upper layers, whose tails are heavier than those of the
# sparse Gamma that a unit without words has in the posterior.
lognormal_factors = Guide(factors="lognormal")
GUIDES = {"gamma factors": guide, "lognormal factors": lognormal_factors}
