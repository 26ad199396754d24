"""Collapsed variational inference: documents read through topics, and topics learnt by reading.

A document's words are shared out among the units of the lowest layer with the document's factors
z_1 integrated out. This needs no parameter per document and no gradient. The guide uses it twice:
:func:`start` finds first weights for every layer, and :func:`read` reads each minibatch.
"""

import torch

from .model import TINY
from .words import entries

SHAPE = 0.05  # of the units
PSEUDO = 0.02  # count of each word that a topic has before it sees any document


def read(row, word, count, w, shape, rate, steps):
    """Expected number of words due to each unit, the factors of the lowest layer integrated out.

    Each word of a document belongs to unit k with probability

        g_k proportional to  w_kv (shape_k + n_k - g_k) / rate_k,   n = sum of g over its words,

    where n - g counts the other words only: a word is judged by its document's other words. This is
    the zero-order collapsed variational inference of Asuncion, Welling, Smyth and Teh, "On
    smoothing and inference for topic models", UAI 2009, with Gamma factors of this shape and
    posterior rate in place of a Dirichlet.

    row, word, count: (E,), as :func:`~.words.entries` returns them; w: (V, K), the transposed
    weights; shape: (K,); rate: (B, K), of the factors' posterior, which is the prior's rate plus
    e sum_v w_kv. At first each word is judged by itself; `steps` updates follow. Returns n (B, K),
    whose rows add up to the documents' lengths, and g (E, K).
    """
    chance = w[word] / rate[row]
    count = count[:, None]
    one = count.clamp(max=1)  # one word, or less if that is the (expected) count

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

    minibatch: function from row numbers to the :func:`~.words.entries` of those documents;
    background: (V,), the mean count of each word in a document; units: the number of topics; steps,
    shape: as :func:`read` takes them; pseudo: count of each word that a topic has before it sees
    any document. Returns w (units, V), the mean count of a word in a document that is due to each
    topic, whose sum over topics is near the background; and n (size, units), each document's
    expected words by topic.

    Each minibatch is read. The words that it gives to a topic, scaled up to all documents, replace
    a share of what the topic holds, so that a topic forgets what it held half a pass ago (1.7
    passes ago in the last third of the passes), see Foulds et al., "Stochastic collapsed
    variational Bayesian inference for latent Dirichlet allocation", KDD 2013. Topics start as the
    background times noise.
    """
    total = background[:, None] * size / units  # expected count of each word in a topic
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
    """First weights of every layer, found greedily from the words up: [w0, w1, ...].

    Each layer is fitted as :func:`topics` of the one below: to it, a document's expected words by
    unit of that layer are what the words are to the lowest layer. All means of z are one at first,
    so the weights above w0 are scaled to add up to one over the units above. options: of
    :func:`topics`.
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
