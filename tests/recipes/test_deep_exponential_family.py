"""The deep exponential family: its data, the held-out protocol, and the model's families."""

import math

import numpy as np
import pyro
import pyro.poutine as poutine
import pytest
import scipy.sparse
import torch

from recipes.deep_exponential_family.data import (
    arguments,
    background,
    checked,
    load_data,
    pairs,
    rows,
    simulate,
    state_of_the_union,
)
from recipes.deep_exponential_family.evaluate import (
    difference,
    log_predictive,
    same_for_all,
    score,
    thin,
    unigram,
)
from recipes.deep_exponential_family.model import FAMILIES, FLOOR
from recipes.deep_exponential_family.variants import VARIANTS, variant
from recipes.deep_exponential_family.words import dense
from tests.tolerances import Z


@pytest.fixture(scope="module")
def corpus():
    return state_of_the_union()


def matrix(*document):
    return scipy.sparse.csr_matrix(np.array(document))


# --- data ------------------------------------------------------------------------------------


def test_corpus(corpus):
    counts, vocabulary, years = corpus
    assert counts.shape == (21_183, 7_754) == (len(years), len(vocabulary))
    assert vocabulary == sorted(set(vocabulary))
    assert (years[0], years[-1]) == (1790, 2026) and (np.diff(years) >= 0).all()
    assert counts.sum(1).min() >= 1
    documents = {tuple(zip(row.indices, row.data, strict=True)) for row in counts}
    assert len(documents) == counts.shape[0]  # no twins
    assert min(np.bincount(counts.indices, minlength=counts.shape[1])) >= 1


def test_splits(corpus):
    n = corpus.counts.shape[0]
    train, test = rows("train", n), rows("test", n)
    assert len(test) == 2_118 and sorted([*train, *test]) == list(range(n))
    with pytest.raises(ValueError, match="train, test, all"):
        load_data("validation")
    ours, theirs = load_data("train"), load_data("test")
    assert torch.equal(ours["background"], theirs["background"])
    assert ours["exposure"].mean() == pytest.approx(1, abs=1e-5)
    back = dense(theirs["documents"], n := 7_754, torch.float64)
    assert back.shape == (2_118, n)
    assert np.array_equal(back.numpy(), corpus.counts[test].toarray())


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (matrix([1.5, 1]), r"counts\[0, 0\] is 1.5: counts are whole numbers"),
        (matrix([1, 1], [2, -1]), r"counts\[1, 1\] is -1"),
        (matrix([1, np.nan]), r"counts\[0, 1\] is nan"),
        (matrix([1, np.inf]), r"counts\[0, 1\] is inf"),
        (matrix([1, 2], [0, 0]), "document 1 has no count at all. Leave it out"),
        (matrix([1, 0], [2, 0]), "word 1 has no count at all"),
        (np.zeros((2, 3)), "document 0 and 1 others"),
        (np.zeros(3), r"shape \(3,\)"),
        (np.zeros((0, 3)), r"shape \(0, 3\)"),
    ],
)
def test_bad_counts_are_refused(counts, message):
    with pytest.raises(ValueError, match=message):
        checked(counts)


def test_bad_vocabularies_and_types_are_refused():
    counts = matrix([1, 2], [3, 0])
    with pytest.raises(ValueError, match="3 words, counts has 2 columns"):
        arguments(counts, ["a", "b", "c"])
    with pytest.raises(ValueError, match="'a' twice"):
        arguments(counts, ["a", "a"])
    with pytest.raises(TypeError, match="not list"):
        arguments([[1, 2]])
    with pytest.raises(ValueError, match="counts has 3 columns, the training documents 2"):
        arguments(matrix([1, 0, 1]), train=counts)
    assert checked(counts, ["a", "b"]).dtype == np.int64
    kept = matrix([1, 2], [3, 0])
    checked(kept).data[:] = 9  # a copy: the caller's matrix stays
    assert kept.sum() == 6


def test_new_documents_may_be_empty():
    given = arguments(matrix([0, 0], [4, 0]), train=matrix([1, 2], [1, 0]))
    assert given["documents"].tolist() == [[[0, 0]], [[0, 4]]]
    assert given["exposure"].tolist() == [0.25, 2.0]  # half a word, of 2 in a mean document
    assert given["background"].tolist() == [1.5, 1.5]


def test_pairs_are_the_counts():
    rng = np.random.default_rng(0)
    counts = scipy.sparse.csr_matrix(rng.poisson(0.3, (50, 20)))
    assert np.array_equal(dense(pairs(counts), 20, torch.float64).numpy(), counts.toarray())


def test_background_is_the_mean_count():
    assert background(matrix([3, 0], [1, 1])).tolist() == [2.5, 1.0]


# --- the held-out protocol -------------------------------------------------------------------


def test_unigram_scores_as_measured_elsewhere(corpus):
    # The figures of an independent implementation of this protocol, to its printed digits.
    n = corpus.counts.shape[0]
    train, test = corpus.counts[rows("train", n)], corpus.counts[rows("test", n)]
    _, held_out = thin(test, 0.5)
    found = score(log_predictive(held_out, same_for_all(unigram(train))))
    assert found["tokens"] == 41_335
    assert found["score"] == pytest.approx(-7.947448, abs=1e-6)
    assert found["se"] == pytest.approx(0.009004, abs=1e-6)
    assert found["perplexity"] == pytest.approx(2828.35, abs=0.01)


def test_thinning_is_by_token():
    counts = scipy.sparse.csr_matrix(np.full((300, 4), 50))
    observed, held_out = thin(counts, 0.1)
    assert ((observed + held_out) != counts).nnz == 0
    n = 300 * 4 * 50
    assert abs(observed.sum() - 0.1 * n) < Z * math.sqrt(n * 0.1 * 0.9)
    # Within a word type too: the observed counts of a type vary as a binomial's.
    variance = observed.toarray().var(ddof=1)
    assert abs(variance / (50 * 0.1 * 0.9) - 1) < Z * math.sqrt(2 / 1_199)
    assert (thin(counts, 0.1)[0] != observed).nnz == 0
    with pytest.raises(ValueError, match="leaves no token held out"):
        thin(counts, 1.0)


def test_scores_by_hand():
    held_out = matrix([1, 0, 2], [0, 0, 0], [0, 3, 0])
    p = np.array([[0.5, 0.25, 0.25], [1, 0, 0], [0.1, 0.8, 0.1]])
    result = log_predictive(held_out, p)
    logs = [math.log(0.5) + 2 * math.log(0.25), 0.0, 3 * math.log(0.8)]
    assert result["log probability"].tolist() == pytest.approx(logs)
    found = score(result)
    mean = (logs[0] + logs[2]) / 6
    assert found["score"] == pytest.approx(mean)
    assert found["perplexity"] == pytest.approx(math.exp(-mean))
    # Two documents of three tokens: the se of the mean of two numbers.
    assert found["se"] == pytest.approx(abs(logs[0] - logs[2]) / 3 / 2)
    assert log_predictive(held_out, lambda part: p[part]).equals(result)


def test_bad_probabilities_are_refused():
    held_out = matrix([1, 0], [0, 2])
    with pytest.raises(ValueError, match=r"document 1 add up to 0\.9"):
        log_predictive(held_out, np.array([[0.5, 0.5], [0.4, 0.5]]))
    with pytest.raises(
        ValueError, match=r"word 1 of document 1 is held out and has probability 0\.0"
    ):
        log_predictive(held_out, np.array([[0.5, 0.5], [1.0, 0.0]]))
    with pytest.raises(ValueError, match=r"are \(2, 3\), not \(2, 2\)"):
        log_predictive(held_out, np.full((2, 3), 1 / 3))


def test_difference_is_paired():
    rng = np.random.default_rng(0)
    held_out = scipy.sparse.csr_matrix(rng.poisson(2, (400, 5)) + 1)
    p = rng.dirichlet(np.ones(5), 400)
    better = p + 0.05 / 5
    better /= better.sum(1, keepdims=True)
    a, b = log_predictive(held_out, better), log_predictive(held_out, p)
    gain, low, high = difference(a, b)
    assert gain == pytest.approx(score(a)["score"] - score(b)["score"])
    assert low < gain < high
    unpaired = math.hypot(score(a)["se"], score(b)["se"])
    assert (high - low) / (2 * 1.96) < unpaired
    assert difference(a, a) == (0, 0, 0)
    with pytest.raises(ValueError, match="not for the same"):
        difference(a, b.assign(tokens=1))


# --- the model -------------------------------------------------------------------------------


@pytest.mark.parametrize(("latent", "weights", "link"), FAMILIES)
def test_every_family_draws_and_has_a_density(latent, weights, link):
    given = {"exposure": torch.ones(30), "background": torch.full((20,), 2.0)}
    drawn = variant((6, 4, 3), latent, weights, link)
    trace = poutine.trace(drawn).get_trace(**given)
    assert set(drawn.LATENTS) == set(trace.stochastic_nodes) - {"documents", "x"}
    documents = trace.nodes["x"]["value"]
    assert documents.shape == (30, 20, 2)
    held = {name: trace.nodes[name]["value"] for name in drawn.LATENTS}
    again = poutine.trace(poutine.condition(drawn, data=held)).get_trace(documents, **given)
    assert torch.isfinite(again.log_prob_sum())
    # What a layer's conditional is, by the formulas of the paper.
    mean = getattr(again.nodes["z1"]["fn"], "base_dist", again.nodes["z1"]["fn"]).mean
    s = held["z2"] @ held["w1"]
    store = pyro.get_param_store()
    expected = {
        "inverse": lambda: s + FLOOR,
        "logit": lambda: torch.sigmoid(s + store["b1"]),
        "softplus": lambda: torch.log1p(torch.exp(s + store["b1"])),
        "log": lambda: s + store["b1"],
        "identity": lambda: s + store["b1"],
    }[link]()
    torch.testing.assert_close(mean, expected)


def test_variants_of_the_paper():
    given = {"exposure": torch.ones(2), "background": torch.ones(9)}
    for name, drawn in VARIANTS.items():
        with pyro.get_param_store().scope():
            trace = poutine.trace(drawn).get_trace(**given)
        widths = [int(units) for units in name.split()[-1].split("-")]
        shapes = {n: trace.nodes[n]["value"].shape for n in drawn.LATENTS}
        layers = range(1, len(widths) + 1)
        assert [shapes[f"z{i}"] for i in layers] == [(2, units) for units in widths]
        assert [shapes[f"w{i}"] for i in layers[:-1]] == [
            (above, below) for above, below in zip(widths[1:], widths, strict=False)
        ]


def test_what_is_no_family_is_refused():
    with pytest.raises(
        ValueError, match="no family with latent, weights, link = 'gamma', 'normal'"
    ):
        variant((3,), "gamma", "normal")(exposure=torch.ones(2), background=torch.ones(4))


def test_a_gamma_layer_survives_units_that_all_underflow():
    tiny = torch.full((5, 2), 1e-38, requires_grad=True)
    given = arguments(matrix(*np.eye(5, dtype=int)))
    two = poutine.condition(variant((3, 2)), data={"z2": tiny, "z1": torch.ones(5, 3)})
    density = poutine.trace(two).get_trace(**given).log_prob_sum()
    (gradient,) = torch.autograd.grad(density, tiny)
    assert torch.isfinite(gradient).all()


def test_simulated_documents_have_the_length_asked_for():
    lengths = []
    for seed in range(30):
        data, _ = simulate(seed, documents=20, terms=30, length=25.0)
        lengths.append(data["documents"][..., 1].sum(1).double().mean().item())
    # Documents of one simulation share their weights: each simulation is one observation.
    assert abs(np.mean(lengths) - 25) < Z * np.std(lengths, ddof=1) / math.sqrt(30)
