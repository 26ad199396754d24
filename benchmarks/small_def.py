"""Deep exponential families small enough for an exact answer: how far VI is from it.

python -m benchmarks.small_def sigmoid     evidence by enumeration, ELBO, importance weighting
python -m benchmarks.small_def gibbs       one layer: held-out words and rates against Gibbs
"""

import argparse
import math

import numpy as np
import pandas as pd
import pyro.poutine as poutine
import torch

import vi_toolkit as vi
from recipes.deep_exponential_family import Guide, arguments, exact, variant
from recipes.deep_exponential_family.data import state_of_the_union
from recipes.deep_exponential_family.evaluate import (
    difference,
    log_predictive,
    score,
    thin,
    unigram,
)


def drawn(model, exposure, background, seed):
    """Weights and documents from a model: (model given the weights, its arguments, weights)."""
    given = {"exposure": exposure.double(), "background": background.double()}
    torch.manual_seed(seed)
    nodes = poutine.trace(model).get_trace(**given).nodes
    weights = {name: nodes[name]["value"] for name in model.LATENTS if name[0] == "w"}
    known = poutine.condition(model, data=weights)
    given["documents"] = poutine.trace(known).get_trace(**given).nodes["x"]["value"]
    return known, given, weights


def sigmoid(steps=2_500, draws=2_000):
    """9 binary units, 40 documents of about 10 words; the weights are known."""
    model = variant((6, 3), "bernoulli", "normal", "logit", learn=False)
    known, given, weights = drawn(model, torch.ones(40), torch.full((25,), 0.4), seed=0)
    evidence = exact.log_evidence(model, given, weights)
    rows = {}
    for seed in range(3):
        guide = Guide((6, 3), "bernoulli", "normal", hidden=64, known=weights).double()
        fit = vi.fit(
            known,
            guide,
            given,
            estimator=vi.Score(8, vi.LeaveOneOut()),
            optimizer=0.005,
            steps=steps,
            compile=False,
            progress=False,
            seed=seed,
        )
        log_weights = exact.log_weights(known, fit.guide, given, draws)
        bound = {"evidence": evidence.mean(), "ELBO": log_weights.mean()}
        for k in (10, 100, 1000):
            groups = log_weights.view(draws // k, k, -1)
            bound[f"importance weighted, {k}"] = (groups.logsumexp(1) - math.log(k)).mean()
        rows[f"seed {seed}"] = {name: float(value) for name, value in bound.items()}
    print("nats per document")
    print(pd.DataFrame(rows).round(3).to_string())


def gibbs(units=4, steps=1_500):
    """178 paragraphs, their 200 most frequent words, 4 units; a fifth of the tokens held out."""
    counts = state_of_the_union().counts[::100]
    frequent = np.sort(np.argsort(-np.asarray(counts.sum(0)).ravel())[:200])
    counts = counts[:, frequent]
    counts = counts[np.asarray(counts.sum(1)).ravel() > 4]
    train, test = thin(counts, 0.8)
    given = arguments(train)
    print(f"{train.shape[0]} documents, {train.sum()} tokens, {test.sum()} held out")

    def completed(rates):
        return log_predictive(test, rates / rates.sum(1, keepdims=True))

    numbers = [given[name].double().numpy() for name in ("exposure", "background")]
    chains = [
        exact.gibbs(
            train.toarray(), *numbers, units, 3_000, 1_000, (0.1, 0.1), np.random.default_rng(seed)
        )["rates"]
        for seed in range(3)
    ]
    truth = sum(chains) / len(chains)
    rows = {"unigram": completed(np.tile(unigram(train), (train.shape[0], 1)))}
    rates = {"Gibbs, all chains": truth}
    rates |= {f"Gibbs, chain {i}": chain for i, chain in enumerate(chains)}
    for seed in range(2):
        guide = Guide((units,)).start(**given, seed=seed)
        fit = vi.fit(
            variant((units,), learn=False),
            guide,
            given,
            estimator=vi.Reparam(analytic_kl=True),
            optimizer=0.01,
            steps=steps,
            compile=False,
            progress=False,
            seed=seed,
        )
        draws = fit.sample(400)
        mean = (draws["z1"].double() @ draws["w0"].double()).mean(0)
        rates[f"VI, seed {seed}"] = mean.numpy()
        print(f"seed {seed}: ELBO {fit.elbo_estimate(200)[0]:.0f}")
    rows |= {name: completed(rate) for name, rate in rates.items()}
    table = pd.DataFrame({name: score(result) for name, result in rows.items()}).T
    best = rows["Gibbs, all chains"]
    gaps = {name: difference(result, best) for name, result in rows.items()}
    table["less Gibbs"] = [f"{g:.3f} ({low:.3f} to {high:.3f})" for g, low, high in gaps.values()]
    correlation = {
        n: np.corrcoef(np.log(truth).ravel(), np.log(r).ravel()) for n, r in rates.items()
    }
    table["correlation of log rates"] = {name: c[0, 1] for name, c in correlation.items()}
    print(table.drop(columns=["tokens"]).round(3).to_string())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("which", choices=["sigmoid", "gibbs"])
    torch.set_num_threads(1)
    {"sigmoid": sigmoid, "gibbs": gibbs}[parser.parse_args().which]()
