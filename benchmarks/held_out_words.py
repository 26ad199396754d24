"""Held-out words of the State of the Union, for the variants of the deep exponential family.

    python -m benchmarks.held_out_words --widths 100 30 15 --seed 0 --output runs/held_out_words

Protocol: recipes/deep_exponential_family/evaluate.py. One call fits one variant with one seed,
prints its scores at 50 and at 10 per cent of the test tokens observed, and writes the fit and its
scores per document to OUTPUT. With --table it prints the scores of all that is in OUTPUT.
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


def fit_one(train, options):
    torch.set_num_threads(1)
    given = data.arguments(train)
    structure = (options.widths, options.latent, options.weights)
    guide = Guide(*structure, factors=options.factors, spread=options.spread)
    guide.start(**given, seed=options.seed, passes=options.passes)
    fit = vi.fit(
        variant(*structure, options.link),
        guide,
        given,
        estimator=vi.Reparam(analytic_kl=options.latent == "gamma"),
        optimizer=lambda p: torch.optim.Adam(p, lr=options.rate, betas=(0.9, 0.99)),
        steps=options.steps,
        subsample={"documents": options.batch},
        compile=False,  # the number of words differs by minibatch
        seed=options.seed,
        progress=False,
        stop=lambda running: print(running.step, np.mean(running.elbo[-200:]), flush=True),
    )
    return fit


def table(folder):
    rows = []
    for path in sorted(folder.glob("*.csv")):
        frame = pd.read_csv(path)
        for share, part in frame.groupby("share"):
            rows.append({"fit": path.stem, "share": share} | dict(evaluate.score(part)))
    print(pd.DataFrame(rows).round(4).to_string(index=False))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--widths", type=int, nargs="+", default=(100, 30, 15))
    parser.add_argument("--latent", default="gamma")
    parser.add_argument("--weights", default="gamma")
    parser.add_argument("--link", default="inverse")
    parser.add_argument("--factors", default="gamma")
    parser.add_argument("--spread", type=float, default=0.1, help="of topics; 0 to fit it")
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--documents", type=int, help="fit to this many training documents only")
    parser.add_argument(
        "--passes", type=int, default=8, help="of EM over the documents at the start"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/held_out_words"))
    parser.add_argument("--table", action="store_true", help="only print what is in OUTPUT")
    options = parser.parse_args()
    if options.table:
        return table(options.output)
    options.widths, options.spread = tuple(options.widths), options.spread or None
    name = f"{options.latent}-{'-'.join(map(str, options.widths))}-{options.link}"
    name += f"-{options.factors}-{options.spread}-{options.steps}"
    train, tests = corpus()
    if options.documents:
        train, name = train[: options.documents], f"{name}-{options.documents}-documents"
        seen = np.asarray(train.sum(0)).ravel() > 0  # words of the others are left out everywhere
        train = train[:, seen]
        tests = {share: tuple(half[:, seen] for half in halves) for share, halves in tests.items()}
    base = evaluate.same_for_all(evaluate.unigram(train))
    began = time.process_time()
    fit = fit_one(train, options)
    print(f"{name} seed {options.seed}: fitted in {time.process_time() - began:.0f} CPU seconds")
    frames = []
    for share, (observed, held_out) in tests.items():
        given = data.arguments(observed, train=train)
        result = evaluate.log_predictive(
            held_out, evaluate.predictive(fit, given, draws=options.draws, seed=options.seed)
        )
        found, over = evaluate.score(result), evaluate.log_predictive(held_out, base)
        gain = "{:.4f} ({:.4f} to {:.4f})".format(*evaluate.difference(result, over))
        print(
            f"  {share:.0%} observed: {found['score']:.4f}, se {found['se']:.4f}, perplexity "
            f"{found['perplexity']:.0f}; gain over the unigram {gain}",
            flush=True,
        )
        frames.append(result.assign(share=share))
    options.output.mkdir(parents=True, exist_ok=True)
    pd.concat(frames).to_csv(options.output / f"{name}-{options.seed}.csv", index_label="document")
    fit.save(options.output / f"{name}-{options.seed}.safetensors")


if __name__ == "__main__":
    main()
