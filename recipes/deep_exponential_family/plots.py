"""Figures of a fitted deep exponential family: its topics of topics, and one document's factors."""

import matplotlib.pyplot as plt
import numpy as np
import pyro
import torch
from pyro import poutine


def top_words(w, background, vocabulary, count=8):
    """The most characteristic words of each unit: lists of `count`, best first.

    w: (K, V) weights; background: (V,). Words are ranked by p log(p / p_0), with p the unit's
    distribution over words and p_0 that of all documents. This is the word's part of KL(p || p_0):
    it is large for words that are frequent in the topic, and more frequent than elsewhere.
    """
    p = w / w.sum(1, keepdim=True)
    p0 = background / background.sum()
    best = (p * (p / p0).log()).topk(count, 1).indices
    return [[vocabulary[i] for i in row] for row in best.tolist()]


def means(fit):
    """E[w_0], E[w_1], ... of a fitted guide."""
    with torch.no_grad():
        return [fit.guide.weight(layer).mean for layer in range(len(fit.guide.widths))]


def topic_tree(fit, vocabulary, children=3, units=5, words=5):
    """The top two layers of a sparse Gamma DEF as a tree, with the words under each unit.

    Shows the `units` top units with the most expected words, and for each the `children` units
    below it that pass on most of these words. A line's width is its share of them. Returns the
    figure.
    """
    w = means(fit)
    if len(w) < 2:
        raise ValueError("a tree needs a model of at least two layers, and this one has one")
    upper, lower = w[-1], w[0]
    for between in reversed(w[1:-1]):
        lower = between @ lower  # words under the units of the last layer but one
    below = upper @ lower
    background = fit.data["background"]
    order = below.sum(1).argsort(descending=True)[:units].tolist()
    labels_above = top_words(below, background, vocabulary, words)
    labels_below = top_words(lower, background, vocabulary, words)
    figure, axes = plt.subplots(figsize=(11, 1.15 * units * children / 2 + 1))
    shares = upper * lower.sum(1)  # expected words along each edge
    row = 0
    for unit in order:
        best = shares[unit].argsort(descending=True)[:children].tolist()
        rows = [-(row + i) for i in range(len(best))]
        middle = float(np.mean(rows))
        total = float(shares[unit].sum())
        for y, child in zip(rows, best, strict=True):
            share = float(shares[unit, child]) / total
            axes.plot([0.30, 0.52], [middle, y], color="C0", lw=1 + 12 * share, alpha=0.6)
            axes.text(0.535, y, ", ".join(labels_below[child]), va="center", fontsize=10)
            axes.text(0.41, (middle + y) / 2, f"{share:.0%}", ha="center", va="center", fontsize=8)
        axes.text(
            0.29, middle, "\n".join(labels_above[unit]), ha="right", va="center", weight="bold"
        )
        row += children + 0.6
    axes.set_xlim(0.1, 1.05)
    axes.set_ylim(-row + 0.2, 0.8)
    axes.axis("off")
    axes.set_title(
        f"Topics of layer {len(w)} (left) and the topics of layer {len(w) - 1} that they contain.\n"
        "Line width: share of the upper topic's expected words",
        fontsize=11,
    )
    figure.tight_layout()
    return figure


def document_through_layers(fit, row, vocabulary, draws=50, units=6, words=5):
    """The strongest units of each layer in one document, by their expected numbers of words.

    row: the document's number in `fit.data`. Returns the figure.
    """
    w = means(fit)
    # The guide registers its parameters, so it gets a store of its own; the caller's is kept.
    with torch.no_grad(), pyro.get_param_store().scope():
        one = {
            key: value[row : row + 1] if key in ("documents", "exposure") else value
            for key, value in fit.data.items()
        }
        traces = [poutine.trace(fit.guide).get_trace(**one) for _ in range(draws)]
    figure, axes = plt.subplots(1, len(w), figsize=(4.8 * len(w), 0.34 * units + 1.1))
    to_words = None
    for layer, ax in enumerate(np.atleast_1d(axes)):
        to_words = w[0] if layer == 0 else w[layer] @ to_words
        z = torch.stack([t.nodes[f"z{layer + 1}"]["value"][0] for t in traces])
        due = (z * to_words.sum(1)).numpy() * float(one["exposure"])
        mean, low, high = due.mean(0), *np.quantile(due, [0.05, 0.95], axis=0)
        best = np.argsort(-mean)[:units]
        labels = top_words(to_words, fit.data["background"], vocabulary, words)
        y = np.arange(len(best))
        ax.barh(y, mean[best], color=f"C{layer}", alpha=0.6)
        ax.hlines(y, low[best], high[best], color="black", lw=1)
        ax.set_yticks(y, [", ".join(labels[unit]) for unit in best], fontsize=7)
        ax.invert_yaxis()
        ax.set_title(f"layer {layer + 1}", fontsize=10)
        ax.set_xlabel("expected number of words (bar: mean, line: 90 % interval)", fontsize=8)
    figure.tight_layout()
    return figure
