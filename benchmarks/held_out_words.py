"""Held-out words of the State of the Union, for the variants of the deep exponential family.

    python -m benchmarks.held_out_words fit --widths 100 30 15 --seeds 0 1 2
    python -m benchmarks.held_out_words table

Protocol: recipes/deep_exponential_family/evaluate.py. `fit` fits one variant from several starts
and keeps of each the probabilities of the held-out tokens at 50 and at 10 per cent observed, in
OUTPUT. `table` prints the scores of all that is there: of the fits one by one, and of the average
of a variant's fits, since each sits in one of the topics' many modes.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import vi_toolkit as vi
from recipes.deep_exponential_family import data, evaluate
from recipes.deep_exponential_family.guide import Guide
from recipes.deep_exponential_family.model import variant

SHARES = (0.5, 0.1)


def corpus():
    """Training counts, and (observed, held out) of the test documents per share."""
    counts = data.state_of_the_union().counts
    train, test = (counts[data.rows(split, counts.shape[0])] for split in ("train", "test"))
    return train, {share: evaluate.thin(test, share) for share in SHARES}


def fit_one(given, options, seed):
    """A fit of the options' variant from one start."""
    structure = (tuple(options.widths), options.latent, options.weights)
    guide = Guide(*structure, factors=options.factors, spread=options.spread or None)
    guide.start(**given, seed=seed, passes=options.passes)
    gamma = options.latent in ("gamma", "normal")
    return vi.fit(
        variant(*structure, options.link),
        guide,
        given,
        estimator=vi.Reparam(analytic_kl=True) if gamma else None,
        optimizer=lambda p: torch.optim.Adam(p, lr=options.rate, betas=(0.9, 0.99)),
        steps=options.steps,
        subsample={"documents": options.batch},
        compile=False,  # the number of words differs by minibatch
        seed=seed,
        progress=False,
    )


def fit(options):
    torch.set_num_threads(1)
    train, tests = corpus()
    given = data.arguments(train)
    name = f"{options.latent}-{'-'.join(map(str, options.widths))}-{options.link}"
    name += f"-{options.factors}-{options.spread}-{options.passes}-{options.steps}"
    options.output.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        began = time.process_time()
        fitted = fit_one(given, options, seed)
        seconds = time.process_time() - began
        kept, scores = {"cpu seconds": seconds, "elbo": np.mean(fitted.elbo[-50:])}, []
        for share, (observed, held_out) in tests.items():
            there = data.arguments(observed, train=train)
            model = evaluate.predictive(fitted, there, draws=options.draws, seed=seed)
            kept[str(share)] = evaluate.chances(held_out, model).astype(np.float32)
            scores.append(evaluate.score(evaluate.by_document(held_out, kept[str(share)])))
        print(
            f"{name}, start {seed}: {seconds:.0f} CPU seconds, ELBO {kept['elbo']:.0f}, nats per "
            + ", ".join(
                f"token at {share:.0%} {found['score']:.4f}"
                for share, found in zip(tests, scores, strict=True)
            ),
            flush=True,
        )
        np.savez(options.output / f"{name}--{seed}.npz", **kept)
        if options.keep:
            fitted.save(options.output / f"{name}--{seed}.safetensors")


def table(options):
    train, tests = corpus()
    variants = {}
    for path in sorted(options.output.glob("*.npz")):
        variants.setdefault(path.stem.split("--")[0], []).append(np.load(path))
    for share, (_, held_out) in tests.items():
        unigram = evaluate.log_predictive(held_out, evaluate.same_for_all(evaluate.unigram(train)))
        rows = {"unigram": {"fits": 0, "each": evaluate.score(unigram)["score"]}}
        for name, fits in variants.items():
            each = [f[str(share)].astype(float) for f in fits]
            single = [evaluate.score(evaluate.by_document(held_out, e))["score"] for e in each]
            together = evaluate.by_document(held_out, sum(each) / len(each))
            found = evaluate.score(together)
            gain, low, high = evaluate.difference(together, unigram)
            rows[name] = {
                "fits": len(fits),
                "each": np.mean(single),
                "sd": np.std(single, ddof=1) if len(fits) > 1 else np.nan,
                "average": found["score"],
                "se": found["se"],
                "perplexity": found["perplexity"],
                "gain over unigram": f"{gain:.3f} ({low:.3f} to {high:.3f})",
                "CPU s a fit": np.mean([float(f["cpu seconds"]) for f in fits]),
            }
        print(f"\n{share:.0%} of the test tokens observed")
        print(pd.DataFrame(rows).T.to_string(float_format=lambda x: f"{x:.4f}"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["fit", "table"])
    parser.add_argument("--widths", type=int, nargs="+", default=(100, 30, 15))
    parser.add_argument("--latent", default="gamma")
    parser.add_argument("--weights", default="gamma")
    parser.add_argument("--link", default="inverse")
    parser.add_argument("--factors", default="gamma", help="of the units above the lowest layer")
    parser.add_argument("--spread", type=float, default=0.1, help="of topics; 0 to fit it")
    parser.add_argument("--passes", type=int, default=15, help="over the documents at the start")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0,))
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--keep", action="store_true", help="write the fits, too")
    parser.add_argument("--output", type=Path, default=Path("runs/held_out_words"))
    options = parser.parse_args()
    {"fit": fit, "table": table}[options.what](options)


if __name__ == "__main__":
    main()
