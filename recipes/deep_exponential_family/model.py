"""Deep exponential families for word counts: layers of latent factors, each the mean of the next.

Ranganath, Tang, Charlin and Blei, "Deep Exponential Families", AISTATS 2015.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch.nn.functional import softplus

WIDTHS = (100, 30, 15)  # from the words up
SHAPE = 0.1  # of w0, and of z at the start. Sparse: half its mass lies below 0.006 of its mean
WEIGHT_SHAPE = 0.3  # of the weights between layers
FAMILIES = (  # latent, weights, link
    ("gamma", "gamma", "inverse"),
    ("bernoulli", "normal", "logit"),
    ("poisson", "normal", "softplus"),
    ("poisson", "gamma", "log"),
    ("normal", "normal", "identity"),
)
MEAN = {"gamma": 1.0, "bernoulli": 0.1, "poisson": 0.1, "normal": 0.8}  # of what the words see
OWN = 0.1  # share of the background that is a word's own rate, where it has one, at the start
FLOOR = 1e-6  # least mean of a Gamma unit, as in the authors' code: with all units above near zero,
# 1 / mean and its gradient would overflow single precision
TINY = 1e-30  # the least rate of a word: keeps its logarithm finite where factors underflow


def latents(widths):
    """Site -> dims. z1 is the layer next to the words; w0 joins it to them, w1 to layer 2, ..."""
    layers = range(1, len(widths) + 1)
    weights = {f"w{i}": (widths[i], widths[i - 1]) for i in layers[:-1]}
    factors = {f"z{i}": ("documents", widths[i - 1]) for i in reversed(layers)}
    return {"w0": (widths[0], "terms")} | weights | factors


LATENTS = latents(WIDTHS)


def gamma(shape, mean):
    """The Gamma distribution by shape and mean: its rate is shape / mean."""
    return dist.Gamma(shape, shape / mean)


def model(
    documents=None,
    exposure=None,
    background=None,
    widths=WIDTHS,
    latent="gamma",
    weights="gamma",
    link="inverse",
    learn=True,
    shape=SHAPE,
):
    """z_L ~ F(top),  z_l | z_(l+1) ~ F(link(s)), s = z_(l+1) w_l,  x_v ~ Poisson(e (z_1 w_0)_v)

    for each document, with w_l and F one of

        latent       weights   link        z_l,k given s
        "gamma"      "gamma"   "inverse"   Gamma(shape_k, rate = shape_k / s_k), of mean s_k
        "bernoulli"  "normal"  "logit"     Bernoulli(sigmoid(s_k + b_k))
        "poisson"    "normal"  "softplus"  Poisson(softplus(s_k + b_k))
        "poisson"    "gamma"   "log"       Poisson(s_k + b_k)
        "normal"     "normal"  "identity"  Normal(s_k + b_k, 1); the words see softplus(z_1)

    and w_0 ~ Gamma always, since words need positive rates. Except with Gamma units, which are
    never zero, words have rates of their own besides: x_v ~ Poisson(e (z_1 w_0 + b_0)_v). The
    shapes of z, the top layer's means and the intercepts b are parameters, fitted with the guide's
    (empirical Bayes), or stay where they start if not `learn`.

    documents: (N, M, 2), pairs (word, count) filled up with (0, 0); None to draw them. exposure:
    (N,), the size of each document, 1 being an average one. background: (V,), the mean count of
    each word in a document of exposure 1. widths: units per layer, from the words up. shape: of
    Gamma units, at the start.
    """
    if (latent, weights, link) not in FAMILIES:
        known = "; ".join(", ".join(map(repr, family)) for family in FAMILIES)
        raise ValueError(
            f"there is no family with latent, weights, link = {latent!r}, {weights!r}, {link!r}; "
            f"there are: {known}"
        )
    depth, terms = len(widths), len(background)

    def parameter(name, size, value, constraint=constraints.positive):
        start = value if torch.is_tensor(value) else background.new_full((size,), value)
        return pyro.param(name, start.clone(), constraint=constraint) if learn else start

    mean = (background / (widths[0] * MEAN[latent])).expand(widths[0], terms)
    w = [pyro.sample("w0", gamma(background.new_tensor(SHAPE), mean).to_event(2))]
    for layer in range(1, depth):
        zeros = background.new_zeros(widths[layer], widths[layer - 1])
        if weights == "gamma":  # a priori s has the mean of z
            prior = gamma(background.new_tensor(WEIGHT_SHAPE), zeros + 1 / widths[layer])
        else:
            prior = dist.Normal(zeros, 1.0)
        w.append(pyro.sample(f"w{layer}", prior.to_event(2)))

    with pyro.plate("documents", len(exposure)) as rows:
        z = None
        for layer in range(depth, 0, -1):
            units, top = widths[layer - 1], layer == depth
            if latent == "gamma":
                s = parameter("top_mean", units, 1.0) if top else z @ w[layer] + FLOOR
                prior = gamma(parameter(f"z{layer}_shape", units, shape), s)
                prior = prior.expand([len(rows), units]).to_event(1)
            else:
                conditional = conditional_of(latent, link, units, parameter, f"b{layer}")
                if top:
                    prior = conditional(background.new_zeros(len(rows), units)).to_event(1)
                elif latent == "normal":
                    prior = conditional(z @ w[layer]).to_event(1)
                else:
                    prior = Below(z, w[layer], conditional, latent == "bernoulli")
            z = pyro.sample(f"z{layer}", prior)
        z = softplus(z) if latent == "normal" else z
        own = None if latent == "gamma" else parameter("b0", terms, OWN * background)
        length = None if documents is None else documents.shape[1]
        words = Words(z, w[0], own, exposure[rows], length, latent)
        return pyro.sample("x", words, obs=None if documents is None else documents[rows])


def variant(
    widths=WIDTHS, latent="gamma", weights="gamma", link="inverse", learn=True, shape=SHAPE
):
    """:func:`model` with its structure fixed, to be called with data alone.

    >>> variant((100, 30), "poisson", "gamma", "log").LATENTS["w1"]
    (30, 100)
    """

    def deep_exponential_family(documents=None, exposure=None, background=None):
        options = (widths, latent, weights, link, learn, shape)
        return model(documents, exposure, background, *options)

    deep_exponential_family.LATENTS = latents(widths)
    return deep_exponential_family


# The table of the paper: sparse Gamma, sigmoid, Poisson with real weights, Poisson with log link.
VARIANTS = {
    "sparse gamma 100": variant((100,)),
    "sparse gamma 100-30": variant((100, 30)),
    "sparse gamma 100-30-15": variant((100, 30, 15)),
    "sigmoid 100-30-15": variant((100, 30, 15), "bernoulli", "normal", "logit"),
    "poisson 100-30-15": variant((100, 30, 15), "poisson", "normal", "softplus"),
    "poisson log-link 100-30-15": variant((100, 30, 15), "poisson", "gamma", "log"),
}


def conditional_of(latent, link, units, parameter, name):
    """s -> the conditional of a layer that is not Gamma; at s = 0 its mean starts at MEAN."""
    start = torch.tensor(MEAN[latent])
    if link == "log":
        intercept = parameter(name, units, MEAN[latent])
        return lambda s: dist.Poisson(s + intercept)
    first = {"logit": start.logit(), "softplus": start.expm1().log(), "identity": 0 * start}[link]
    intercept = parameter(name, units, first.item(), constraints.real)
    if latent == "poisson":
        return lambda s: dist.Poisson(softplus(s + intercept))
    if latent == "bernoulli":
        return lambda s: dist.Bernoulli(logits=s + intercept)
    return lambda s: dist.Normal(s + intercept, 1.0)


def step(z, binary):
    """Which way each unit can go: up, or down where it is binary and on."""
    return 1 - 2 * z if binary else torch.ones_like(z)


def with_differences(value, z, difference):
    """`value` (...,), a function of z (..., K), with derivatives `difference` (..., K) in z.

    By them a guide's units that count are fitted, see differences.py. difference: a function that
    returns them, called if there is somebody to ask for them.
    """
    if not z.requires_grad:
        return value
    with torch.no_grad():
        slope = difference()
    return value + ((z - z.detach()) * slope).sum(-1)


class Below(TorchDistribution):
    """Units below a layer that counts: independent, of the `conditional` given s = z w.

    z: (N, K), of the layer above, with differences for derivatives; w: (K, J).
    """

    arg_constraints = {"z": constraints.real, "w": constraints.real}  # noqa: RUF012
    has_rsample = False

    def __init__(self, z, w, conditional, binary, validate_args=None):
        self.z, self.w, self.conditional, self.binary = z, w, conditional, binary
        self.base = conditional(z.detach() @ w)
        super().__init__(z.shape[:-1], w.shape[-1:], validate_args=False)

    @property
    def support(self):
        return constraints.independent(self.base.support, 1)

    @property
    def mean(self):
        return self.base.mean

    def expand(self, batch_shape, _instance=None):
        z = self.z.expand(*batch_shape, self.z.shape[-1])
        return Below(z, self.w, self.conditional, self.binary)

    def log_prob(self, value):
        def difference():
            direction = step(self.z, self.binary)
            s = (self.z @ self.w)[..., None, :] + direction[..., None] * self.w
            value_ = value.detach()
            moved = self.conditional(s).log_prob(value_[..., None, :]).sum(-1)
            return direction * (moved - self.base.log_prob(value_).sum(-1, keepdim=True))

        return with_differences(self.base.log_prob(value).sum(-1), self.z, difference)

    def sample(self, sample_shape=()):
        return self.base.sample(sample_shape)


class Words(TorchDistribution):
    """Independent Poisson counts of every word of the vocabulary, kept as (word, count) pairs.

    rate of word v in document n = exposure_n ((z_n w)_v + own_v). Only the counts that are not zero
    are kept; the others enter through the sum of the rates, z_n (w 1).

    z: (N, K); w: (K, V); own: (V,) or None; exposure: (N,); length: pairs per document, M; latent:
    of z, with differences for derivatives where z counts. A value is (N, M, 2), filled up with
    (0, 0).
    """

    arg_constraints = {"z": constraints.real, "w": constraints.real}  # noqa: RUF012
    support = constraints.independent(constraints.nonnegative_integer, 2)
    has_rsample = False

    def __init__(self, z, w, own, exposure, length, latent="gamma", validate_args=None):
        self.z, self.w, self.own, self.exposure, self.latent = z, w, own, exposure, latent
        self.length = w.shape[-1] if length is None else length
        super().__init__(z.shape[:-1], (self.length, 2), validate_args=False)

    def log_prob(self, value):
        row, place = (value[..., 1] > 0).nonzero(as_tuple=True)
        word, count = value[row, place].unbind(1)
        count = count.to(self.z.dtype)
        counting = self.latent in ("bernoulli", "poisson")
        z = self.z.detach() if counting else self.z
        of_word = self.w.T.contiguous()[word]
        rate, total = (z[row] * of_word).sum(1), z @ self.w.sum(1)
        if self.own is not None:
            rate, total = rate + self.own[word], total + self.own.sum()
        rate = rate.clamp(min=TINY)
        each = count * (self.exposure[row] * rate).log() - torch.lgamma(count + 1)
        found = torch.zeros_like(total).index_add(0, row, each) - self.exposure * total
        if not counting:
            return found

        def difference():
            direction = step(z, self.latent == "bernoulli")
            moved = (direction[row] * of_word / rate[:, None]).clamp_(min=1e-6 - 1).log1p_()
            moved = torch.zeros_like(z).index_add(0, row, moved.mul_(count[:, None]))
            return direction * moved - self.exposure[:, None] * self.w.sum(1)

        return with_differences(found, self.z, difference)

    @torch.no_grad()
    def sample(self, sample_shape=()):
        rates = self.z @ self.w
        if self.own is not None:
            rates = rates + self.own
        counts = torch.poisson(self.exposure[:, None] * rates)
        count, word = counts.topk(self.length, -1)
        return torch.stack([word * (count > 0), count.long()], -1)
