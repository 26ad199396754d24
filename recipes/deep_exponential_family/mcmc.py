"""The reference posterior by NUTS: the factors of a few documents, given the weights.

The posterior of a whole deep exponential family has a copy for every order of its units, and scale
can move between its layers. MCMC cannot explore it, and no two fits agree on it. Given the weights
the factors are identified, so the reference is their posterior, for two layers and four paragraphs.
"""

import numpy as np
import pyro.poutine as poutine
import torch

import vi_toolkit as vi

from .collapsed import start
from .data import arguments, state_of_the_union
from .guide import Guide
from .variants import variant

WIDTHS = (6, 3)
WORDS, EVERY, DOCUMENTS, SHAPE = 300, 40, 4, 0.3


def reference_problem():
    """(model, guides, data) whose posterior reference.json holds.

    The weights are known: they are what :func:`~.collapsed.start` finds on every 40th paragraph,
    with the 300 most frequent words. data: four of those paragraphs. The units have the shape of
    the authors' code, 0.3; with 0.1 NUTS takes very long to explore the tails of their logarithms.

    >>> model, guides, data = reference_problem()
    >>> data["documents"].shape[0], list(guides)
    (4, ['gamma factors', 'lognormal factors'])
    """
    counts = state_of_the_union().counts[::EVERY]
    frequent = np.sort(np.argsort(-np.asarray(counts.sum(0)).ravel(), kind="stable")[:WORDS])
    counts = counts[:, frequent]
    counts = counts[np.asarray(counts.sum(1)).ravel() >= 12]
    given = {
        name: value.double() if value.is_floating_point() else value
        for name, value in arguments(counts).items()
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        w0, w1 = start(**given, widths=WIDTHS, passes=30, batch=100, pseudo=0.05)
    weights = {"w0": w0, "w1": w1}
    model = poutine.condition(variant(WIDTHS, learn=False, shape=SHAPE), data=weights)
    guides = {
        f"{factors} factors": Guide(WIDTHS, factors=factors, hidden=32, known=weights).double()
        for factors in ("gamma", "lognormal")
    }
    few = {name: given[name][:DOCUMENTS] for name in ("documents", "exposure")}
    return model, guides, given | few


def reference(chains=4, num_draws=3_000, warmup=500, seed=0, progress=True):
    """vi.Reference of `reference_problem()`; what `python -m recipes reference` writes to disk."""
    model, _, data = reference_problem()
    return vi.Reference.nuts(
        model,
        data,
        chains=chains,
        num_draws=num_draws,
        warmup=warmup,
        seed=seed,
        target_accept=0.9,
        progress=progress,
        command="python -m recipes reference deep_exponential_family",
    )
