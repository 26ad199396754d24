"""The model as it is fitted: a family and widths of model.py with a faster evaluation.

Values are those of model.py. The words cost time in proportion to those that occur (words.py), and
units that count have differences for derivatives (differences.py), by which guides of such units
are fitted. A document is a set of (word, count) pairs here, as data.py makes them.
"""

from .differences import Below
from .model import SHAPE, WIDTHS, latents, layer_below
from .model import model as in_plain_torch
from .words import Words


def variant(
    widths=WIDTHS, latent="gamma", weights="gamma", link="inverse", learn=True, shape=SHAPE
):
    """The model of one family, see :func:`~.model.model`; called with data alone.

    It takes `documents` as (N, M, 2), pairs (word, count) padded with (0, 0), or None to draw them.

    >>> variant((100, 30), "poisson", "gamma", "log").LATENTS["w1"]
    (30, 100)
    """

    def below(z, w, units, b):
        if latent in ("bernoulli", "poisson"):
            return Below(z, w, lambda s: units(s, b), latent == "bernoulli")
        return layer_below(z, w, units, b)

    def deep_exponential_family(documents=None, exposure=None, background=None):
        length = None if documents is None else documents.shape[1]

        def words(z, w, own, exposure):
            return Words(z, w, own, exposure, length, latent)

        structure = (widths, latent, weights, link, learn, shape)
        return in_plain_torch(documents, exposure, background, *structure, below, words)

    deep_exponential_family.LATENTS = latents(widths)
    return deep_exponential_family


model = variant()
# The table of the paper: sparse Gamma, sigmoid, Poisson with real weights, Poisson with log link.
VARIANTS = {
    "sparse gamma 100": variant((100,)),
    "sparse gamma 100-30": variant((100, 30)),
    "sparse gamma 100-30-15": model,
    "sigmoid 100-30-15": variant((100, 30, 15), "bernoulli", "normal", "logit"),
    "poisson 100-30-15": variant((100, 30, 15), "poisson", "normal", "softplus"),
    "poisson log-link 100-30-15": variant((100, 30, 15), "poisson", "gamma", "log"),
}
