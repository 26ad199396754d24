"""Exact answers for small models: sums over all states of binary units, and Gibbs sampling.

The posterior of a whole deep exponential family is not identified: units can be exchanged, and
scale can move between layers. So compare quantities that are identified: the probability of the
words, their fitted rates, and the held-out log density.
"""

import numpy as np
import pyro.poutine as poutine
import torch


def states(units):
    """Every state of `units` binary units: (2^units, units) of zeros and ones."""
    return (torch.arange(2**units)[:, None] >> torch.arange(units)) % 2


@torch.no_grad()
def log_evidence(model, given, fixed):
    """log p(x_n | weights) of each document under a sigmoid DEF, by summing over all its states.

    model: a :func:`~.variants.variant` with latent "bernoulli" and at most 16 units. given: its
    arguments. fixed: {"w0": ..., "w1": ...}, and other sites that are fixed. Returns (documents,).

    Each document is repeated once per state, so the sum is over densities of the model itself.
    """
    widths = [model.LATENTS[f"z{layer}"][1] for layer in range(1, len(model.LATENTS) // 2 + 1)]
    if sum(widths) > 16:
        raise ValueError(f"{sum(widths)} units have 2^{sum(widths)} states: at most 16 units")
    every = states(sum(widths)).to(given["background"].dtype)
    layers = {f"z{i + 1}": z for i, z in enumerate(every.split(widths, 1))}
    evidence = []
    for document, exposure in zip(given["documents"], given["exposure"], strict=True):
        repeated = given | {
            "documents": document.expand(len(every), -1, -1),
            "exposure": exposure.expand(len(every)),
        }
        conditioned = poutine.condition(model, data=fixed | layers)
        trace = poutine.trace(conditioned).get_trace(**repeated)
        trace.compute_log_prob()
        joint = sum(trace.nodes[site]["log_prob"] for site in [*layers, "x"])
        evidence.append(joint.logsumexp(0))
    return torch.stack(evidence)


@torch.no_grad()
def log_weights(model, guide, given, draws):
    """log p(x_n, z | weights) - log q(z | x_n) at draws from a guide: (draws, documents).

    model: conditioned on the weights; guide: with the same weights known.

    The mean over draws estimates the ELBO of each document. Their logsumexp minus log(draws)
    estimates the importance-weighted bound of Burda, Grosse and Salakhutdinov (2016).
    """
    weights = []
    for _ in range(draws):
        q = poutine.trace(guide).get_trace(**given)
        p = poutine.trace(poutine.replay(model, trace=q)).get_trace(**given)
        q.compute_log_prob()
        p.compute_log_prob()
        layers = [site for site in q.stochastic_nodes if site[0] == "z"]
        here = sum(p.nodes[site]["log_prob"] - q.nodes[site]["log_prob"] for site in layers)
        weights.append(here + p.nodes["x"]["log_prob"])
    return torch.stack(weights)


def gibbs(counts, exposure, background, units, sweeps, warmup, shapes, rng, test=None):
    """Gibbs sampling of the one-layer model, sparse Gamma factors and Gamma weights.

        z_nk ~ Gamma(shape_z, shape_z),   w_kv ~ Gamma(shape_w, rate shape_w units / background_v)
        x_nv ~ Poisson(e_n sum_k z_nk w_kv)

    Each count is split among the units, multinomially given z and w; given the split, z and w are
    Gamma (Cemgil, "Bayesian inference for nonnegative matrix factorisation models", 2009).

    counts: (N, V) array; exposure: (N,); background: (V,); shapes: (shape_z, shape_w). test: (N, V)
    held-out counts of the same documents, with the same exposure. Returns a dict: "rates" and
    "rates sd", the mean and sd of sum_k z_nk w_kv over the sweeps after warmup, (N, V); "held-out",
    log p(test | z, w) of each of these sweeps; "last", (z, w) after the last one.
    """
    (N, V), (shape_z, shape_w) = counts.shape, shapes
    rate_w = shape_w * units / background
    z = rng.gamma(shape_z, 1 / shape_z, (N, units)) + 1e-8
    w = rng.gamma(shape_w, 1 / rate_w, (units, V)) + 1e-8
    document, word = counts.nonzero()
    x = counts[document, word]
    first, second, held_out = np.zeros((N, V)), np.zeros((N, V)), []
    for sweep in range(warmup + sweeps):
        share = z[document] * w[:, word].T
        split = rng.multinomial(x, share / share.sum(1, keepdims=True))
        by_document, by_word = np.zeros((N, units)), np.zeros((V, units))
        np.add.at(by_document, document, split)
        np.add.at(by_word, word, split)
        z = rng.gamma(shape_z + by_document) / (shape_z + exposure[:, None] * w.sum(1))
        w = rng.gamma(shape_w + by_word.T) / (rate_w + (exposure @ z)[:, None])
        # A shape of 0.1 gives draws that underflow. They add nothing to the likelihood, but
        # zeros would make log(0) here.
        z, w = np.maximum(z, 1e-100), np.maximum(w, 1e-100)
        if sweep >= warmup:
            rates = z @ w
            first += rates
            second += rates**2
            if test is not None:
                mean = exposure[:, None] * rates
                held_out.append((test * np.log(mean) - mean).sum())
    mean = first / sweeps
    sd = np.sqrt(np.maximum(second / sweeps - mean**2, 0))
    return {"rates": mean, "rates sd": sd, "held-out": np.array(held_out), "last": (z, w)}
