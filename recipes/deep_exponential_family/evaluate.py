"""Held-out words: how well a model completes documents it has seen half of, or a tenth.

The protocol, for any model:

1. Fit to the training documents, all of their words.
2. *Thin* the test documents: each word, a token, is observed with probability `share` and held out
   otherwise, independently. So the split is by token. A split by type (all counts of a word
   observed or held out) tells which other types are zero, and much of what is held out with it.
3. From the observed tokens alone the model gives each test document a distribution over the
   vocabulary. What it knows of a document's length is the observed tokens.
4. The score is the mean log probability of a held-out token, in nats; perplexity is exp(-score).

Every method is scored on the same tokens, so compare two by :func:`difference`, in which the
documents' difficulty cancels.
"""

import numpy as np
import pandas as pd
import pyro
import pyro.poutine as poutine
import torch
from torch.nn.functional import softplus

CHUNK = 512  # documents whose probabilities are held at once


def thin(counts, share=0.5, seed=0):
    """(observed, held out): each token observed with probability `share`. CSR matrices.

    Every held-out count is the total less the observed one, so the two halves of a Poisson
    document are independent Poisson documents.
    """
    counts = counts.tocsr().copy()
    counts.sort_indices()
    observed = counts.copy()
    observed.data = np.random.default_rng(seed).binomial(counts.data, share)
    held_out = (counts - observed).tocsr()
    for part in (observed, held_out):
        part.eliminate_zeros()
        part.sort_indices()
    if held_out.nnz == 0:
        raise ValueError(f"share = {share} leaves no token held out")
    return observed, held_out


def chances(held_out, probabilities):
    """Probability of each held-out entry (document, word), in the order of held_out.tocoo().

    held_out: (documents, words) CSR counts. probabilities: (documents, words) array, or a function
    from a slice of the documents to its rows; every row adds up to one. Raises ValueError for rows
    that do not add up to one or that give a held-out word no chance.

    The mean of several models' arrays is that of their mixture: enough to keep of each.
    """
    found = []
    for first in range(0, held_out.shape[0], CHUNK):
        part = slice(first, min(first + CHUNK, held_out.shape[0]))
        p = probabilities(part) if callable(probabilities) else probabilities[part]
        p = np.asarray(p, np.float64)
        here = held_out[part].tocoo()
        if p.shape != here.shape:
            raise ValueError(f"probabilities of documents {part} are {p.shape}, not {here.shape}")
        sums = p.sum(1)
        if not np.allclose(sums, 1, atol=1e-4):
            worst = np.abs(sums - 1).argmax()
            raise ValueError(
                f"the probabilities of document {first + worst} add up to {sums[worst]:.6g}, not 1"
            )
        chance = p[here.row, here.col] / sums[here.row]
        if not (chance > 0).all():
            i = int((~(chance > 0)).argmax())
            raise ValueError(
                f"word {here.col[i]} of document {first + here.row[i]} is held out and has "
                f"probability {chance[i]}: its score is minus infinity. Smooth the probabilities."
            )
        found.append(chance)
    return np.concatenate(found)


def by_document(held_out, chance):
    """Per document: the held-out tokens' summed log probability and their number.

    chance: as :func:`chances` returns. Documents without held-out tokens count for nothing. Returns
    a DataFrame with columns "log probability" and "tokens".
    """
    entries = held_out.tocoo()
    total = np.zeros(held_out.shape[0])
    np.add.at(total, entries.row, entries.data * np.log(chance))
    tokens = np.asarray(held_out.sum(1)).ravel()
    return pd.DataFrame({"log probability": total, "tokens": tokens})


def log_predictive(held_out, probabilities):
    """:func:`by_document` of the :func:`chances` that `probabilities` give."""
    return by_document(held_out, chances(held_out, probabilities))


def score(result):
    """Score of one method: nats per held-out token, its standard error over documents, perplexity.

    result: as :func:`log_predictive` returns. The score is a ratio of sums over documents, and its
    standard error that of the linearised ratio.
    """
    result = result[result["tokens"] > 0]
    tokens, n = result["tokens"].sum(), len(result)
    mean = result["log probability"].sum() / tokens
    residual = result["log probability"] - mean * result["tokens"]
    se = np.sqrt((residual**2).sum() * n / max(n - 1, 1)) / tokens
    return pd.Series({"score": mean, "se": se, "perplexity": np.exp(-mean), "tokens": tokens})


def difference(result, baseline, replicates=2_000, seed=0):
    """Gain in score over `baseline`, with a 95 % interval by the bootstrap over documents.

    Both must be results for the same held-out tokens. Returns (gain, low, high) in nats per token.
    """
    if not np.array_equal(result["tokens"], baseline["tokens"]):
        raise ValueError("the two results are not for the same held-out tokens")
    gain = (result["log probability"] - baseline["log probability"]).to_numpy()
    tokens = result["tokens"].to_numpy()
    rng = np.random.default_rng(seed)
    many = np.array(
        [
            gain[rows].sum() / tokens[rows].sum()
            for rows in rng.integers(0, len(gain), (replicates, len(gain)))
        ]
    )
    low, high = np.quantile(many, [0.025, 0.975])
    return float(gain.sum() / tokens.sum()), float(low), float(high)


def unigram(train):
    """The same distribution for every document, (words,): training frequency, one token added."""
    counts = np.asarray(train.sum(0)).ravel() + 1.0
    return counts / counts.sum()


def same_for_all(distribution):
    """A model that predicts `distribution` (words,) everywhere, for :func:`log_predictive`."""
    return lambda part: np.broadcast_to(distribution, (part.stop - part.start, len(distribution)))


def predictive(fit, data, draws=20, seed=0):
    """What a fitted DEF predicts for documents: a function for :func:`log_predictive`.

    fit: of a :class:`~.guide.Guide`, or such a guide itself as its :meth:`~.guide.Guide.start`
    leaves it. data: arguments of the model, `documents` holding the observed tokens. The
    probabilities are E[z_1] E[w_0], normalised, with E[z_1] the mean of the guide's conditional
    given the layers above, averaged over `draws` of those; the weights stay as fitted. Units that
    are not Gamma are averaged over draws of z_1 itself.
    """
    guide = getattr(fit, "guide", fit)
    with torch.no_grad():
        w = guide.weight(0).mean
    own = fit.params.get("b0") if guide is not fit else None

    @torch.no_grad()
    def probabilities(part):
        here = data | {key: data[key][part] for key in ("documents", "exposure")}
        total = torch.zeros(part.stop - part.start, w.shape[1], device=w.device)
        # A store of its own: the guide registers its parameters, and the caller's stays as it was.
        with torch.random.fork_rng(devices=[]), pyro.get_param_store().scope():
            torch.manual_seed(seed + part.start)
            for _ in range(draws if len(guide.widths) > 1 or not guide.conjugate else 1):
                node = poutine.trace(guide).get_trace(**here).nodes["z1"]
                z = node["fn"].mean if guide.conjugate else node["value"]
                rate = (softplus(z) if guide.latent == "normal" else z) @ w
                rate = rate if own is None else rate + own
                total += rate / rate.sum(1, keepdim=True)
        return (total / total.sum(1, keepdim=True)).cpu().numpy()

    return probabilities
