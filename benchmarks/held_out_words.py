"""Held-out words of four corpora, for the variants of the deep exponential family and for LDA.

    python -m benchmarks.held_out_words collapsed --seeds $(seq 0 29)
    python -m benchmarks.held_out_words fit --widths 100 30 15 --seeds 0 1 2
    python -m benchmarks.held_out_words lda --seeds 0 1 2
    python -m benchmarks.held_out_words table

Protocol: recipes/deep_exponential_family/evaluate.py. All keep, for each start, the probabilities
of the held-out tokens at 50 and at 10 per cent observed, in OUTPUT. `fit` fits one variant by steps
along the ELBO's gradient. `collapsed` is one layer of sparse Gamma units as its start leaves it,
that is by stochastic collapsed variational inference alone; the shape of the units and the steps by
which a test document is read are chosen on validation documents, for the average of three starts.
`lda` is latent Dirichlet allocation by collapsed Gibbs sampling (tomotopy, which must be there).
`table` prints the scores of all that is there: of the fits one by one, and of the average of a
variant's fits by tens, since each sits in one of the topics' many modes.

Corpora other than the State of the Union are read from $VI_BENCH_DATA: `ap`, `wikipedia` and
`newsgroups`, the latter with its own test documents.
"""

import argparse
import contextlib
import itertools
import os
import pickle
import tarfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse
import torch
from pyro.distributions import Bernoulli

import vi_toolkit as vi
from recipes.deep_exponential_family import data, evaluate, variants
from recipes.deep_exponential_family.collapsed import read
from recipes.deep_exponential_family.guide import Guide
from recipes.deep_exponential_family.variants import variant
from recipes.deep_exponential_family.words import Words, entries

SHARES = (0.5, 0.1)
SHAPES = (0.1, 0.05, 0.03, 0.02, 0.01, 0.005)  # to choose from
READS = (2, 3, 6, 12)  # likewise: the more, the nearer the mode, and the better for long documents
TOGETHER = 10  # fits that are averaged, where there are so many


def sparse(entries, shape):
    row, word, count = np.asarray(entries, np.int64).T
    return scipy.sparse.csr_matrix((count, (row, word)), shape)


def ap(folder):
    with tarfile.open(folder / "ap" / "ap.tgz") as archive:
        terms = len(archive.extractfile("ap/vocab.txt").read().split())
        lines = archive.extractfile("ap/ap.dat").read().decode().splitlines()
    entries = [
        (row, *map(int, pair.split(":")))
        for row, line in enumerate(lines)
        for pair in line.split()[1:]
    ]
    return sparse(entries, (len(lines), terms))


def wikipedia(folder):
    lines = iter((folder / "def_wikipedia" / "train.cpp.dat").read_text().splitlines())
    documents, terms = map(int, next(lines).split())
    entries = []
    for row in range(documents):
        next(lines)  # the document's number and length
        numbers = list(map(int, next(lines).split()))
        entries += [(row, *pair) for pair in zip(numbers[::2], numbers[1::2], strict=True)]
    return sparse(entries, (documents, terms))


def newsgroups(folder, part):
    folder = folder / "etm_20ng"
    with open(folder / "vocab.pkl", "rb") as file:  # the benchmark's own file
        terms = len(pickle.load(file))
    words, counts = (
        scipy.io.loadmat(folder / f"bow_{part}_{what}.mat")[what].squeeze()
        for what in ("tokens", "counts")
    )
    entries = [
        (row, *pair)
        for row, (word, count) in enumerate(zip(words, counts, strict=True))
        for pair in zip(np.ravel(word), np.ravel(count), strict=True)
    ]
    return sparse(entries, (len(words), terms))


def corpus(name):
    """Training counts, and (observed, held out) of the test documents per share."""
    if name == "newsgroups":
        folder = Path(os.environ["VI_BENCH_DATA"])
        train, halves = newsgroups(folder, "tr"), ("ts_h1", "ts_h2")
        train = train[np.random.default_rng(0).permutation(train.shape[0])]
        test = sum(newsgroups(folder, half) for half in halves).tocsr()
    else:
        if name == "sotu":
            counts = data.state_of_the_union().counts
        else:
            counts = {"ap": ap, "wikipedia": wikipedia}[name](Path(os.environ["VI_BENCH_DATA"]))
        train, test = (counts[data.rows(split, counts.shape[0])] for split in ("train", "test"))
    return without_gaps(train), {share: evaluate.thin(test, share) for share in SHARES}


def without_gaps(train):
    """Without documents that have no words. A word that is in no training document keeps its place
    in the vocabulary: the last training document is given one of each."""
    train = train[np.asarray(train.sum(1)).ravel() > 0]
    unseen = np.flatnonzero(np.asarray(train.sum(0)).ravel() == 0)
    if len(unseen):
        extra = sparse([(train.shape[0] - 1, word, 1) for word in unseen], train.shape)
        train = (train + extra).tocsr()
    return train


class StraightThrough(Bernoulli):
    """Binary draws whose gradient is that of a logistic variable at the temperature 0.5.

    Jang, Gu and Poole, "Categorical Reparameterization with Gumbel-Softmax", ICLR 2017. Biased.
    """

    has_rsample = True

    def rsample(self, sample_shape=()):
        noise = torch.rand(self._extended_shape(sample_shape)).logit(1e-6)
        soft = ((self.logits + noise) / 0.5).sigmoid()
        return (soft > 0.5).to(soft.dtype) + (soft - soft.detach())


class Relaxed(Guide):
    def factor(self, a, b, mean):
        q = super().factor(a, b, mean)
        return StraightThrough(logits=q.logits) if isinstance(q, Bernoulli) else q


@contextlib.contextmanager
def relaxed():
    """The model with derivatives in its binary units where it has differences."""
    with (
        mock.patch.object(variants, "Words", lambda *given: Words(*given[:-1])),
        mock.patch.object(variants, "Below", lambda z, w, of, _: of(z @ w).to_event(1)),
    ):
        yield


def fit_one(given, options, seed):
    """A fit of the options' variant from one start."""
    structure = (tuple(options.widths), options.latent, options.weights)
    kind = Relaxed if options.gradient == "relaxed" else Guide
    guide = kind(*structure, factors=options.factors, spread=options.spread or None)
    guide.start(**given, seed=seed, passes=options.passes)
    estimator = {
        "reparam": vi.Reparam(analytic_kl=True),  # with differences for units that count
        "score": vi.Score(
            8, vi.LeaveOneOut(), sites=[f"z{i + 1}" for i in range(len(structure[0]))]
        ),
        "relaxed": vi.Reparam(8, analytic_kl=True),
    }[options.gradient]
    with relaxed() if options.gradient == "relaxed" else contextlib.nullcontext():
        return vi.fit(
            variant(*structure, options.link),
            guide,
            given,
            estimator=estimator,
            optimizer=lambda p: torch.optim.Adam(p, lr=options.rate, betas=(0.9, 0.99)),
            steps=options.steps,
            subsample={"documents": options.batch},
            compile=False,  # the number of words differs by minibatch
            seed=seed,
            progress=False,
        )


def keep(options, name, seed, tests, predicted, seconds, **more):
    """Write the probabilities of the held-out tokens and print their scores."""
    kept, scores = {"cpu seconds": seconds, **more}, []
    for share, (_, held_out) in tests.items():
        chance = predicted[share]
        kept[str(share)] = chance.astype(np.float32)
        scores.append(evaluate.score(evaluate.by_document(held_out, chance))["score"])
    found = ", ".join(
        f"{score:.4f} at {share:.0%}" for share, score in zip(tests, scores, strict=True)
    )
    print(f"{options.corpus}, {name}, start {seed}: {seconds:.0f} CPU s, {found}", flush=True)
    folder = options.output / options.corpus
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / f"{name}--{seed}.npz", **kept)


def fit(options):
    train, tests = corpus(options.corpus)
    given = data.arguments(train)
    name = f"{options.latent}-{'-'.join(map(str, options.widths))}-{options.link}"
    name += f"-{options.factors}-{options.spread}-{options.passes}-{options.steps}"
    name += "" if options.gradient == "reparam" else f"-{options.gradient}"
    for seed in options.seeds:
        began = time.process_time()
        fitted = fit_one(given, options, seed)
        seconds = time.process_time() - began
        predicted = {}
        for share, (observed, held_out) in tests.items():
            there = data.arguments(observed, train=train)
            model = evaluate.predictive(fitted, there, draws=options.draws, seed=seed)
            predicted[share] = evaluate.chances(held_out, model)
        keep(options, name, seed, tests, predicted, seconds, elbo=np.mean(fitted.elbo[-50:]))


def one_layer(given, options, seed):
    guide = Guide(options.widths[:1], shape=0.02)
    return guide.start(**given, seed=seed, passes=options.passes, batch=options.batch)


def read_with(guide, shape, reads, observed, held_out, train):
    with torch.no_grad():
        guide.log_shape.fill_(float(np.log(shape)))
    guide.reads = reads
    there = data.arguments(observed, train=train)
    return evaluate.chances(held_out, evaluate.predictive(guide, there))


def choose_readings(train, options):
    """Share -> the (shape, reads) that are best for three starts' average on a tenth of the
    documents."""
    count = round(0.1 * train.shape[0])
    rest, validation = without_gaps(train[:-count]), train[-count:]
    given = data.arguments(rest)
    guides = [one_layer(given, options, 1000 + k) for k in range(3)]
    best = {}
    for share in SHARES:
        observed, held_out = evaluate.thin(validation, share)
        scores = {}
        for reading in itertools.product(SHAPES, READS):
            each = [read_with(guide, *reading, observed, held_out, rest) for guide in guides]
            average = evaluate.by_document(held_out, sum(each) / len(each))
            scores[reading] = evaluate.score(average)["score"]
        best[share] = max(scores, key=scores.get)
        found = ", ".join(
            f"{shape} {reads}: {score:.4f}" for (shape, reads), score in scores.items()
        )
        print(f"{options.corpus}, validation at {share:.0%}, shape and reads: {found}", flush=True)
    return best


def collapsed(options):
    train, tests = corpus(options.corpus)
    readings = choose_readings(train, options)
    given = data.arguments(train)
    for seed in options.seeds:
        began = time.process_time()
        guide = one_layer(given, options, seed)
        seconds = time.process_time() - began
        predicted = {
            share: read_with(guide, *readings[share], observed, held_out, train)
            for share, (observed, held_out) in tests.items()
        }
        keep(options, f"gamma-{options.widths[0]}-collapsed", seed, tests, predicted, seconds)


def lda(options):
    """100 topics, the parameters of their shares learned.

    Ten states after 1,000 iterations, 20 apart.

    Test documents are read by collapsed variational inference, as ours are, given a state's topics
    and learned Dirichlet parameters: that scores better than sampling each document's topics.
    Keeps the average of the ten states' probabilities, and those of the last state.
    """
    import tomotopy

    train, tests = corpus(options.corpus)
    tokens = [np.repeat(row.indices, row.data).astype(str).tolist() for row in train]
    seen = {
        share: entries(data.pairs(observed), torch.float32)
        for share, (observed, _) in tests.items()
    }
    for seed in options.seeds:
        began = time.process_time()
        model = tomotopy.LDAModel(k=options.widths[0], seed=seed + 1)
        for words in tokens:
            model.add_doc(words)
        model.burn_in = 200
        model.optim_interval = 10
        model.train(1000, workers=1)
        columns = [int(word) for word in model.used_vocabs]
        total, last = dict.fromkeys(SHARES, 0.0), {}
        for _ in range(10):
            model.train(20, workers=1)
            topics = torch.zeros(model.k, train.shape[1])
            for k in range(model.k):
                topics[k, columns] = torch.tensor(model.get_topic_word_dist(k))
            alpha = torch.tensor(model.alpha)
            for share, (_, held_out) in tests.items():
                equal = torch.ones(held_out.shape[0], model.k)
                n, _ = read(*seen[share], topics.T.contiguous(), alpha, equal, 10)
                theta = (n + alpha) / (n + alpha).sum(1, keepdim=True)
                chance = evaluate.chances(
                    held_out,
                    lambda part, theta=theta, topics=topics: (theta[part] @ topics).numpy(),
                )
                total[share] = total[share] + chance / 10
                last[share] = chance
        seconds = time.process_time() - began
        keep(options, f"lda-{model.k}-one-state", seed, tests, last, seconds)
        keep(options, f"lda-{model.k}-ten-states", seed, tests, total, seconds)


def table(options):
    for name in sorted(path.name for path in options.output.iterdir()):
        train, tests = corpus(name)
        variants = {}
        for path in sorted((options.output / name).glob("*.npz")):
            variants.setdefault(path.stem.split("--")[0], []).append(np.load(path))
        for share, (_, held_out) in tests.items():
            unigram = evaluate.log_predictive(
                held_out, evaluate.same_for_all(evaluate.unigram(train))
            )
            peer, beside = unigram, "over single words"
            if found := variants.get("lda-100-ten-states"):
                # Chains averaged in score, by document: each is a fit of its own.
                beside = "over ten states of LDA"
                each = [evaluate.by_document(held_out, f[str(share)].astype(float)) for f in found]
                peer = each[0].assign(
                    **{"log probability": np.mean([e["log probability"] for e in each], axis=0)}
                )
            rows = {"unigram": {"fits": 0, "each": evaluate.score(unigram)["score"]}}
            for label, fits in variants.items():
                rows[label] = row(held_out, share, fits, peer, beside)
            words = int(held_out.sum())
            print(f"\n{name}, {share:.0%} of the test tokens observed, {words:,} held out")
            print(pd.DataFrame(rows).T.to_string(float_format=lambda x: f"{x:.4f}"))


def row(held_out, share, fits, peer, beside):
    each = [f[str(share)].astype(float) for f in fits]
    single = [evaluate.score(evaluate.by_document(held_out, e))["score"] for e in each]
    groups = [each[i : i + TOGETHER] for i in range(0, len(each), TOGETHER)]
    groups = [group for group in groups if len(group) == TOGETHER] or [each]
    together = [evaluate.by_document(held_out, sum(group) / len(group)) for group in groups]
    scores = [evaluate.score(one)["score"] for one in together]
    mean = together[0].assign(
        **{"log probability": np.mean([one["log probability"] for one in together], axis=0)}
    )
    gain, low, high = evaluate.difference(mean, peer)
    return {
        "fits": len(fits),
        "each": np.mean(single),
        "sd": np.std(single, ddof=1) if len(fits) > 1 else np.nan,
        "averaged by": len(groups[0]),
        "averages": " ".join(f"{s:.4f}" for s in scores),
        "mean": np.mean(scores),
        "perplexity": np.exp(-np.mean(scores)),
        beside: f"{gain:+.4f} ({low:+.4f} to {high:+.4f})",
        "CPU s a fit": np.mean([float(f["cpu seconds"]) for f in fits]),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["collapsed", "fit", "lda", "table"])
    parser.add_argument(
        "--corpus", choices=["sotu", "ap", "wikipedia", "newsgroups"], default="sotu"
    )
    parser.add_argument("--widths", type=int, nargs="+", default=(100, 30, 15))
    parser.add_argument("--latent", default="gamma")
    parser.add_argument("--weights", default="gamma")
    parser.add_argument("--link", default="inverse")
    parser.add_argument("--gradient", choices=["reparam", "score", "relaxed"], default="reparam")
    parser.add_argument("--factors", default="gamma", help="of the units above the lowest layer")
    parser.add_argument("--spread", type=float, default=0.1, help="of topics; 0 to fit it")
    parser.add_argument("--passes", type=int, default=15, help="over the documents at the start")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0,))
    parser.add_argument("--draws", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path("runs/held_out_words"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    {"collapsed": collapsed, "fit": fit, "lda": lda, "table": table}[options.what](options)


if __name__ == "__main__":
    main()
