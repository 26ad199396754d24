"""Deep exponential families for word counts: layers of latent factors, each the mean of the next.

Ranganath, Tang, Charlin and Blei, "Deep Exponential Families", AISTATS 2015.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch.nn.functional import softplus

WIDTHS = (100, 30, 15)  # units per layer, from the words up
SHAPE = 0.1  # of w0, and of Gamma units at the start: half of the draws are below 0.006 of the mean
WEIGHT_SHAPE = 0.3  # of Gamma weights between layers
OWN = 0.1  # a word's own rate at the start, as a share of its mean count
FLOOR = 1e-6  # added to the mean of a Gamma unit, as in the authors' code: if all units above are
# near zero, 1 / mean and its gradient would overflow single precision
TINY = 1e-30  # the least rate of a word: keeps its logarithm finite where factors underflow
# Mean of what the words see of a unit, at the start.
MEAN = {"gamma": 1.0, "bernoulli": 0.1, "poisson": 0.1, "normal": 0.8}


def gamma(shape, mean):
    """The Gamma distribution by shape and mean: its rate is shape / mean."""
    return dist.Gamma(shape, shape / mean)


RARE = torch.tensor(0.1)  # MEAN of the units that count
UNITS = {
    # latent, weights, link: the units given their inputs s and a parameter b; where b starts, and
    # its range
    ("gamma", "gamma", "inverse"): (
        lambda s, b: gamma(b, s + FLOOR),
        (SHAPE, constraints.positive),
    ),
    ("bernoulli", "normal", "logit"): (
        lambda s, b: dist.Bernoulli(logits=s + b),
        (RARE.logit().item(), constraints.real),
    ),
    ("poisson", "normal", "softplus"): (
        lambda s, b: dist.Poisson(softplus(s + b)),
        (RARE.expm1().log().item(), constraints.real),
    ),
    ("poisson", "gamma", "log"): (
        lambda s, b: dist.Poisson(s + b),
        (MEAN["poisson"], constraints.positive),
    ),
    ("normal", "normal", "identity"): (
        lambda s, b: dist.Normal(s + b, 1.0),
        (0.0, constraints.real),
    ),
}
FAMILIES = tuple(UNITS)


def latents(widths):
    """Site -> dims. z1 is the layer next to the words; w0 joins it to them, w1 to layer 2, ..."""
    layers = range(1, len(widths) + 1)
    weights = {f"w{i}": (widths[i], widths[i - 1]) for i in layers[:-1]}
    factors = {f"z{i}": ("documents", widths[i - 1]) for i in reversed(layers)}
    return {"w0": (widths[0], "terms")} | weights | factors


LATENTS = latents(WIDTHS)


def layer_below(z, w, units, b):
    """Independent units with the inputs z w. z: (N, K), the layer above; w: (K, J); b: (J,)."""
    return units(z @ w, b).to_event(1)


def word_counts(z, w, own, exposure):
    """Independent counts of all V words. z: (N, K); w: (K, V); own: (V,) or None; exposure: (N,)"""
    rates = z @ w if own is None else z @ w + own
    return dist.Poisson(exposure[:, None] * rates.clamp(min=TINY)).to_event(1)


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
    below=layer_below,
    words=word_counts,
):
    """z_L ~ F(0),   z_l | z_(l+1) ~ F(s),  s = z_(l+1) w_l,   x_v | z_1 ~ Poisson(e (z_1 w_0)_v)

    for each document. F and the weights w_l between layers are one of

        latent       weights   link        w_l                   F(s), given s
        "gamma"      "gamma"   "inverse"   Gamma(0.3, mean 1/K)  Gamma(b, mean s)
        "bernoulli"  "normal"  "logit"     Normal(0, 1)          Bernoulli(sigmoid(s + b))
        "poisson"    "normal"  "softplus"  Normal(0, 1)          Poisson(softplus(s + b))
        "poisson"    "gamma"   "log"       Gamma(0.3, mean 1/K)  Poisson(s + b)
        "normal"     "normal"  "identity"  Normal(0, 1)          Normal(s + b, 1)

    with K the number of units above. w_0 is Gamma in every family, since words need positive rates,
    and Normal units show the words softplus(z_1). Gamma units are never zero. In the other families
    all units of a document may be off, so each word also has a rate of its own:
    x_v ~ Poisson(e (z_1 w_0 + b_0)_v). Gamma units of the top layer have parameters as their means.
    These means and all b are fitted with the guide's parameters (empirical Bayes), or stay where
    they start if `learn` is False.

    documents: (N, V), the count of each word, or None to draw them. exposure: (N,), the size of
    each document; an average one has 1. background: (V,), the mean count of each word in a document
    of exposure 1. widths: units per layer, from the words up. shape: where b starts for Gamma
    units. below, words: functions that return the distribution of a layer and of the words, in
    plain torch by default; variants.py has faster ones with the same values. Returns the counts.
    """
    units, (first, support) = family(latent, weights, link)
    is_gamma, depth, one = latent == "gamma", len(widths), background.new_ones(())

    def parameter(name, start, constraint=constraints.positive):
        return pyro.param(name, start, constraint=constraint) if learn else start

    b = [None if is_gamma else parameter("b0", OWN * background)]
    for i, K in enumerate(widths, 1):
        name, start = (f"z{i}_shape", shape) if is_gamma else (f"b{i}", first)
        b.append(parameter(name, start * one.expand(K), support))
    top_mean = parameter("top_mean", one.repeat(widths[-1])) if is_gamma else None

    topic = gamma(SHAPE * one, background / (widths[0] * MEAN[latent]))
    w = [pyro.sample("w0", topic.expand([widths[0], len(background)]).to_event(2))]
    for i in range(1, depth):
        K = widths[i]
        prior = gamma(WEIGHT_SHAPE * one, one / K) if weights == "gamma" else dist.Normal(0, one)
        w.append(pyro.sample(f"w{i}", prior.expand([K, widths[i - 1]]).to_event(2)))

    with pyro.plate("documents", len(exposure)) as rows:
        s = background.new_zeros(len(rows), widths[-1])  # the top layer has no inputs
        top = gamma(b[-1], top_mean).expand(s.shape) if is_gamma else units(s, b[-1])
        z = pyro.sample(f"z{depth}", top.to_event(1))
        for i in range(depth - 1, 0, -1):
            z = pyro.sample(f"z{i}", below(z, w[i], units, b[i]))
        x = words(softplus(z) if latent == "normal" else z, w[0], b[0], exposure[rows])
        return pyro.sample("x", x, obs=None if documents is None else documents[rows])


def family(latent, weights, link):
    """A row of UNITS. Raises ValueError, with the rows that there are, if there is none."""
    if (latent, weights, link) not in UNITS:
        known = "; ".join(", ".join(map(repr, row)) for row in UNITS)
        raise ValueError(
            f"there is no family with latent, weights, link = {latent!r}, {weights!r}, {link!r}; "
            f"there are: {known}"
        )
    return UNITS[latent, weights, link]
