"""Held-out words: how well a model completes documents of which it has seen a part.

The protocol, for any model:

1. Fit to all words of the training documents.
2. *Thin* the test documents: each token (an occurrence of a word) is observed with probability
   `share` and held out otherwise, independently. A split by word type, which observes or holds out
   all counts of a word together, would reveal which other types are zero, and with them much of
   what is held out.
3. From the observed tokens alone the model gives each test document a distribution over the
   vocabulary. All that it knows of a document's length is the number of observed tokens.
4. The score is the mean log probability of a held-out token, in nats; perplexity is exp(-score).

Every method is scored on the same tokens. Compare two by :func:`difference`, in which the
documents' difficulty cancels.
"""

import numpy as np
import pandas as pd
import pyro
import pyro.poutine as poutine
import torch
from torch.nn.functional import softplus

CHUNK = 512  # documents whose probabilities are in memory at once


def thin(counts, share=0.5, seed=0):
    """(observed, held out), two CSR matrices: each token is observed with probability `share`.

    Every held-out count is the total minus the observed one, so the two parts of a Poisson document
    are independent Poisson documents.
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
    that do not add up to one or that give a held-out word probability zero.

    The mean of several models' results is the result of their mixture, so nothing else of a model
    has to be kept.
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
    """The held-out tokens' summed log probability and their number, for each document.

    chance: as :func:`chances` returns it. Returns a DataFrame with columns "log probability" and
    "tokens"; documents without held-out tokens have zeros.
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

    result: as :func:`log_predictive` returns it. The score is a ratio of sums over documents, and
    its standard error is that of the linearised ratio.
    """
    result = result[result["tokens"] > 0]
    tokens, n = result["tokens"].sum(), len(result)
    mean = result["log probability"].sum() / tokens
    residual = result["log probability"] - mean * result["tokens"]
    se = np.sqrt((residual**2).sum() * n / max(n - 1, 1)) / tokens
    return pd.Series({"score": mean, "se": se, "perplexity": np.exp(-mean), "tokens": tokens})


def difference(result, baseline, replicates=2_000, seed=0):
    """Gain in score over `baseline`, with a 95 % bootstrap interval over documents.

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
    """The words' frequencies in the training documents, (words,), with one added to each count."""
    counts = np.asarray(train.sum(0)).ravel() + 1.0
    return counts / counts.sum()


def same_for_all(distribution):
    """A model that predicts `distribution` (words,) everywhere, for :func:`log_predictive`."""
    return lambda part: np.broadcast_to(distribution, (part.stop - part.start, len(distribution)))


def predictive(fit, data, draws=20, seed=0):
    """A fitted model's predictions for documents, as a function for :func:`log_predictive`.

    fit: a fit with a :class:`~.guide.Guide`, or such a guide itself after its
    :meth:`~.guide.Guide.start`. data: arguments of the model, with the observed tokens as
    `documents`. The probabilities are E[z_1] E[w_0], normalised. E[z_1] is the mean of the guide's
    conditional given the layers above, averaged over `draws` of those; other units than Gamma are
    averaged over draws of z_1 itself. The weights are those fitted.
    """
    guide = getattr(fit, "guide", fit)
    with torch.no_grad():
        w = guide.weight(0).mean
    own = fit.params.get("b0") if guide is not fit else None

    @torch.no_grad()
    def probabilities(part):
        here = data | {key: data[key][part] for key in ("documents", "exposure")}
        total = torch.zeros(part.stop - part.start, w.shape[1], device=w.device)
        # The guide registers its parameters, so it gets a store of its own; the caller's is kept.
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
