"""The deep exponential family: its data, the held-out protocol, model, guide, and exact answers."""

import math
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import scipy.sparse
import scipy.special
import scipy.stats
import torch
from torch.nn.functional import softplus

import vi_toolkit as vi
from recipes import deep_exponential_family
from recipes.deep_exponential_family import differences, exact, plots, reference_problem
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
    predictive,
    same_for_all,
    score,
    thin,
    unigram,
)
from recipes.deep_exponential_family.guide import Guide, entries, positive, read, start
from recipes.deep_exponential_family.model import (
    FAMILIES,
    FLOOR,
    OWN,
    VARIANTS,
    Below,
    Words,
    variant,
    with_differences,
)
from tests.tolerances import Z


@pytest.fixture(scope="module")
def corpus():
    return state_of_the_union()


def matrix(*document):
    return scipy.sparse.csr_matrix(np.array(document))


def dense(documents, terms, dtype):
    """Counts (B, terms) from (word, count) pairs (B, M, 2)."""
    row, word, count = entries(documents, dtype)
    return torch.zeros(len(documents), terms, dtype=dtype).index_put_((row, word), count)


# --- data -----------------------------------------------------------------------------------


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


# --- the held-out protocol ------------------------------------------------------------------


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


# --- the model ------------------------------------------------------------------------------


def test_words_are_independent_poisson_counts():
    torch.manual_seed(0)
    z, w = torch.rand(7, 3).double(), torch.rand(3, 11).double()
    own, exposure = torch.rand(11).double(), torch.rand(7).double()
    words = Words(z, w, own, exposure, None)
    rates = exposure[:, None] * (z @ w + own)
    counts = torch.poisson(rates)
    value = pairs(scipy.sparse.csr_matrix(counts.long().numpy()))
    expected = dist.Poisson(rates).log_prob(counts).sum(1)
    torch.testing.assert_close(words.log_prob(value), expected)
    # Draws keep every word, and have the rates as their means.
    total = sum(dense(words.sample(), 11, torch.float64) for _ in range(2_000))
    assert ((total / 2_000 - rates).abs() < Z * (rates / 2_000).sqrt()).all()


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


@pytest.mark.parametrize("kind", ["bernoulli", "poisson"])
def test_differences_are_unbiased(kind):
    # The ELBO of one document and its gradient in the units' means by summing over all states (of
    # Poisson units, those below 12), against draws: one row of the plate each.
    torch.manual_seed(0)
    w1, w0 = torch.randn(2, 3).double(), torch.rand(3, 6).double()
    own, x = torch.full((6,), 0.1).double(), torch.tensor([[[0, 2], [3, 1], [4, 1]]])
    binary, bias = kind == "bernoulli", torch.tensor([-0.5, 0.2, 0.0]).double()
    draws = differences.Bernoulli if binary else differences.Poisson

    def conditional(s):
        return dist.Bernoulli(logits=s + bias) if binary else dist.Poisson(softplus(s + bias))

    def elbo(z2, z1, mean2, mean1):
        top = type(conditional(bias))(torch.full((2,), 0.3).double())
        words = Words(z1, w0, own, torch.ones(len(z1)).double(), 3, kind)
        p = top.log_prob(z2).sum(-1) + Below(z2, w1, conditional, binary).log_prob(z1)
        q = draws(mean2).log_prob(z2).sum(-1) + draws(mean1).log_prob(z1).sum(-1)
        return p + words.log_prob(x.expand(len(z1), -1, -1)) - q, q

    means = torch.tensor([0.6, 0.3]).double(), torch.tensor([0.2, 0.7, 0.4]).double()
    inputs = [m.clone().requires_grad_() for m in means]
    # At these rates the states that are left out have a chance below 1e-9.
    every = torch.cartesian_prod(*[torch.arange(2.0 if binary else 12.0).double()] * 5)
    value, q = elbo(every[:, :2], every[:, 2:], *inputs)
    exact = torch.autograd.grad((q.exp() * value).sum(), inputs)
    rows = 20_000
    inputs = [m.expand(rows, -1).clone().requires_grad_() for m in means]
    z2, z1 = (draws(m).rsample() for m in inputs)
    found = torch.autograd.grad(elbo(z2, z1, *inputs)[0].sum(), inputs)
    # Beside it the score function, on the same draws, with a constant baseline.
    value, q = elbo(z2.detach(), z1.detach(), *inputs)
    score = torch.autograd.grad(((value - value.mean()).detach() * q).sum(), inputs)
    for truth, gradient, other in zip(exact, found, score, strict=True):
        error = gradient.std(0) / math.sqrt(rows)
        assert ((gradient.mean(0) - truth).abs() < Z * error).all()
        assert (gradient.std(0) < other.std(0)).all()
        assert (error < 0.05 * truth.abs().max()).all()  # or it would say little


def test_draws_that_are_not_asked_for_gradients_cost_none():
    value = torch.ones(3)
    assert with_differences(value, torch.ones(3, 2), None) is value


def test_simulated_documents_have_the_length_asked_for():
    lengths = []
    for seed in range(30):
        data, _ = simulate(seed, documents=20, terms=30, length=25.0)
        lengths.append(data["documents"][..., 1].sum(1).double().mean().item())
    # Documents of one simulation share their weights: each simulation is one observation.
    assert abs(np.mean(lengths) - 25) < Z * np.std(lengths, ddof=1) / math.sqrt(30)


# --- the guide ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gamma", "lognormal"])
def test_positive_factors_have_the_mean_and_variance_asked_for(kind):
    mean, shape = torch.tensor([0.3, 4.0]).double(), torch.tensor([0.5, 8.0]).double()
    q = positive(kind, 25 * torch.atanh(mean.log() / 25), 7 * torch.atanh(shape.log() / 7))
    torch.testing.assert_close(q.mean, mean)
    torch.testing.assert_close(q.variance, mean**2 / shape)


@pytest.mark.parametrize("kind", ["gamma", "lognormal"])
def test_positive_factors_are_safe_at_their_bounds(kind):
    ends = torch.tensor([-1e4, 1e4])
    log_mean, log_shape = (
        x.reshape(-1).requires_grad_() for x in torch.meshgrid(ends, ends, indexing="ij")
    )
    q = positive(kind, log_mean, log_shape)
    draws = q.rsample((1_000,))
    assert (draws > 0).all() and torch.isfinite(draws.log()).all()
    kl = torch.distributions.kl_divergence(q, dist.Gamma(torch.full((4,), 0.1), torch.tensor(0.3)))
    gradients = torch.autograd.grad(kl.sum() + draws.log().sum(), (log_mean, log_shape))
    assert torch.isfinite(kl).all() and all(torch.isfinite(g).all() for g in gradients)


def test_divergence_of_a_lognormal_from_a_gamma():
    q = dist.LogNormal(torch.tensor([-1.0, 0.5]).double(), torch.tensor([0.7, 1.1]).double())
    p = dist.Gamma(torch.tensor([0.1, 3.0]).double(), torch.tensor([0.3, 2.0]).double())
    torch.manual_seed(0)
    z = q.sample((200_000,))
    sampled = q.log_prob(z) - p.log_prob(z)
    error = sampled.std(0) / math.sqrt(len(z))
    assert ((torch.distributions.kl_divergence(q, p) - sampled.mean(0)).abs() < Z * error).all()


def exact_shares(words, w, shape, rate):
    """P(word i is unit k's), one document, by summing over all assignments of its words."""
    units = len(shape)
    total, shares = 0.0, np.zeros((len(words), units))
    for assigned in np.ndindex(*[units] * len(words)):
        n = np.bincount(assigned, minlength=units)
        # Gamma(shape, prior rate) integrated out against Poisson counts n of posterior rate `rate`.
        weight = np.exp(scipy.special.gammaln(shape + n) - n * np.log(rate)).prod()
        weight *= np.prod([w[v, k] for v, k in zip(words, assigned, strict=True)])
        total += weight
        shares[np.arange(len(words)), assigned] += weight
    return shares / total


def test_reading_against_all_assignments():
    torch.manual_seed(0)
    w, shape = torch.rand(9, 3).double() ** 3, torch.tensor([0.1, 0.4, 0.2]).double()
    rates = torch.tensor([[0.5, 0.7, 0.9]]).double()
    one = (torch.tensor([0]), torch.tensor([4]), torch.ones(1).double())
    n, _ = read(*one, w, shape, rates, 3)
    truth = exact_shares([4], w.numpy(), shape.numpy(), rates.numpy()[0])
    np.testing.assert_allclose(n.numpy(), truth, rtol=1e-12)  # one word: no approximation is left
    errors = {0: [], 20: []}
    for seed in range(20):
        torch.manual_seed(seed)
        words = torch.randperm(9)[:6]
        given = (torch.zeros(6, dtype=torch.long), words, torch.ones(6).double())
        truth = exact_shares(words.tolist(), w.numpy(), shape.numpy(), rates.numpy()[0])
        for steps, found in errors.items():
            n, g = read(*given, w, shape, rates, steps)
            torch.testing.assert_close(n.sum(1), torch.tensor([6.0]).double())
            found.append(np.abs(g.numpy() - truth).mean())
    # Words tell of each other: the fixed point is nearer to the truth than each word by itself.
    gain = np.array(errors[0]) - np.array(errors[20])
    assert gain.mean() > Z * gain.std(ddof=1) / math.sqrt(20)


def test_parameters_do_not_grow_with_the_documents():
    sizes = []
    for n in (50, 500):
        rng = np.random.default_rng(0)
        given = arguments(scipy.sparse.csr_matrix(rng.poisson(1.0, (n, 30)) + (np.arange(30) < 1)))
        guide = Guide((5, 3)).start(**given)
        sizes.append(sum(p.numel() for p in guide.parameters()))
    assert sizes[0] == sizes[1]


def test_topics_at_the_start_hold_all_words():
    rng = np.random.default_rng(0)
    given = arguments(scipy.sparse.csr_matrix(rng.poisson(1.0, (400, 30)) + 1))
    torch.manual_seed(0)
    w, upper, top = start(**given, widths=(5, 3, 2), passes=3, batch=100)
    words = given["documents"][..., 1].sum().item()
    # Every word is in one topic, whatever the minibatches: totals vary with what the last ones
    # hold, which is 400 documents' words estimated from some 100: a relative sd below 2 %.
    assert w.sum().item() * 400 == pytest.approx(words, rel=0.02 * Z)
    assert (w > 0).all()
    # z_1 has mean one where z_2 has.
    for weights in (upper, top):
        torch.testing.assert_close(weights.sum(0), torch.ones(weights.shape[1]))
        assert (weights > 0).all()


def test_expected_counts_are_read_too():
    torch.manual_seed(0)
    given = (torch.zeros(6, dtype=torch.long), torch.arange(6), torch.rand(6))  # less than a word
    n, g = read(*given, torch.rand(6, 3), torch.full((3,), 0.05), torch.ones(1, 3), 20)
    assert (g >= 0).all() and (n >= 0).all()
    torch.testing.assert_close(n.sum(), given[2].sum())


def block_corpus(documents=300, seed=0):
    """Two kinds of documents that use different halves of 40 words."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 2, documents)
    rates = np.where((np.arange(40) < 20) == kind[:, None], 1.0, 0.02)
    counts = rng.poisson(rates)
    counts[:, 0] += counts.sum(1) == 0
    return scipy.sparse.csr_matrix(counts), rates


@pytest.fixture(scope="module")
def block_fit():
    train, _ = block_corpus()
    given = arguments(train)
    with pyro.get_param_store().scope():
        guide = Guide((4, 2), hidden=20).start(**given)
        fit = vi.fit(
            variant((4, 2)),
            guide,
            given,
            estimator=vi.Reparam(analytic_kl=True),
            subsample={"documents": 100},
            steps=300,
            compile=False,
            progress=False,
        )
    return fit, train


def test_fit_finds_the_blocks(block_fit):
    fit, train = block_fit
    test, rates = block_corpus(200, seed=1)
    observed, held_out = thin(test, 0.5)
    given = arguments(observed, train=train)
    ours = log_predictive(held_out, predictive(fit, given))
    base = log_predictive(held_out, same_for_all(unigram(train)))
    truth = log_predictive(held_out, rates / rates.sum(1, keepdims=True))
    # Two blocks are worth log 2 less what the rare words cost. Half of it at least is found; what
    # knows the truth is no worse.
    possible = difference(truth, base)[0]
    assert difference(ours, base)[1] > 0.5 * possible
    assert difference(ours, truth)[0] < 0.01
    again = log_predictive(held_out, predictive(fit, given))
    assert again.equals(ours)


@pytest.mark.parametrize(("latent", "weights", "link"), FAMILIES[1:])
def test_the_other_families_find_the_blocks(latent, weights, link):
    train, _ = block_corpus()
    given = arguments(train)
    structure = ((6, 2), latent, weights)
    fit = vi.fit(
        variant(*structure, link),
        Guide(*structure, hidden=20).start(**given),
        given,
        optimizer=0.02,
        subsample={"documents": 100},
        steps=300,
        compile=False,
        progress=False,
    )
    test, rates = block_corpus(200, seed=1)
    observed, held_out = thin(test, 0.5)
    ours = log_predictive(held_out, predictive(fit, arguments(observed, train=train)))
    base = log_predictive(held_out, same_for_all(unigram(train)))
    truth = log_predictive(held_out, rates / rates.sum(1, keepdims=True))
    assert difference(ours, base)[1] > 0.5 * difference(truth, base)[0]


def test_looking_at_a_fit_leaves_the_callers_parameters_alone(block_fit):
    fit, train = block_fit
    with pyro.get_param_store().scope():
        pyro.param("mine", torch.tensor(1.0))
        predictive(fit, arguments(train))(slice(0, 5))
        plots.document_through_layers(fit, 0, [str(i) for i in range(40)], draws=2)
        assert set(pyro.get_param_store().keys()) == {"mine"}


def test_every_parameter_gets_a_gradient(block_fit):
    fit, _ = block_fit
    moved = Guide((4, 2), hidden=20).start(**fit.data)
    before = dict(moved.named_parameters())
    for name, parameter in fit.guide.named_parameters():
        assert not torch.equal(parameter, before[name]), f"{name} has not moved"


# --- exact answers --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sigmoid():
    """A sigmoid DEF of 6 + 3 units whose weights are known, 15 documents and a fitted guide."""
    drawn = variant((6, 3), "bernoulli", "normal", "logit", learn=False)
    given = {"exposure": torch.ones(15), "background": torch.full((25,), 0.4)}
    given = {name: value.double() for name, value in given.items()}
    torch.manual_seed(0)
    weights = poutine.trace(drawn).get_trace(**given).nodes
    weights = {name: weights[name]["value"] for name in ("w0", "w1")}
    known = poutine.condition(drawn, data=weights)
    given["documents"] = poutine.trace(known).get_trace(**given).nodes["x"]["value"]
    guide = Guide((6, 3), "bernoulli", "normal", hidden=32, known=weights).double()
    with pyro.get_param_store().scope():
        fit = vi.fit(
            known,
            guide,
            given,
            estimator=vi.Score(8, vi.LeaveOneOut()),
            optimizer=0.01,
            steps=400,
            compile=False,
            progress=False,
        )
    return drawn, known, weights, given, fit


def test_evidence_is_the_sum_over_states(sigmoid):
    drawn, _, weights, given, _ = sigmoid
    evidence = exact.log_evidence(drawn, given, weights)
    x = dense(given["documents"], 25, torch.float64).numpy()[0]
    own, w0, w1 = np.full(25, 0.4 * OWN), weights["w0"].numpy(), weights["w1"].numpy()
    bias = np.log(0.1 / 0.9)
    total = 0.0
    for top in np.ndindex(2, 2, 2):
        p = 1 / (1 + np.exp(-(np.array(top) @ w1 + bias)))
        for low in np.ndindex(*[2] * 6):
            prior = 0.1 ** sum(top) * 0.9 ** (3 - sum(top))
            prior *= np.prod(np.where(low, p, 1 - p))
            total += prior * scipy.stats.poisson(np.array(low) @ w0 + own).pmf(x).prod()
    assert evidence[0].item() == pytest.approx(math.log(total), rel=1e-6)
    with pytest.raises(ValueError, match="20 units have"):
        exact.log_evidence(variant((15, 5), "bernoulli", "normal", "logit"), given, weights)


def test_bounds_are_in_order(sigmoid):
    drawn, known, weights, given, fit = sigmoid
    evidence = exact.log_evidence(drawn, given, weights)
    log_weights = exact.log_weights(known, fit.guide, given, 300)
    elbo = log_weights.mean(0)
    error = log_weights.std(0) / math.sqrt(300)
    tighter = log_weights.view(10, 30, -1).logsumexp(1) - math.log(30)
    tighter_error = tighter.std(0) / math.sqrt(10)
    assert (elbo < evidence + Z * error).all()
    assert (tighter.mean(0) < evidence + Z * tighter_error + 1e-6).all()
    assert tighter.mean() > elbo.mean()
    # A mean-field posterior of units that explain the same words stays off, but the fit has closed
    # most of the gap that the guide starts with.
    gap = (evidence - elbo).mean()
    prior = Guide((6, 3), "bernoulli", "normal", known=weights).double()
    at_start = (evidence - exact.log_weights(known, prior, given, 300).mean(0)).mean()
    assert gap < at_start / 3
    # The estimate that fit reports is the same sum, constants (the weights' density) included.
    constant = poutine.trace(known).get_trace(**given)
    constant.compute_log_prob()
    constant = sum(constant.nodes[w]["log_prob"].sum() for w in ("w0", "w1")).item()
    mean, se = fit.elbo_estimate(500)
    assert abs(mean - constant - elbo.sum().item()) < Z * math.hypot(se, error.norm().item())


def test_gibbs_against_quadrature():
    # One document, one word, one unit: x ~ Poisson(e z w), a double integral.
    x, e, b, (a, c) = 3, 1.5, 0.7, (0.8, 1.3)

    # On log scales the integrand is smooth and decays: the trapezoidal rule is exact to rounding.
    t = np.linspace(-45, 5, 1_501)
    z, w = np.exp(t)[:, None], np.exp(t)[None, :]
    joint = scipy.stats.gamma(a, scale=1 / a).pdf(z) * scipy.stats.gamma(c, scale=b / c).pdf(w)
    joint = joint * scipy.stats.poisson(e * z * w).pmf(x) * z * w
    moments = [(joint * (z * w) ** power).sum() for power in (0, 1, 2)]
    mean = moments[1] / moments[0]
    sd = math.sqrt(moments[2] / moments[0] - mean**2)
    given = np.array([[x]]), np.array([e]), np.array([b])
    found = [
        exact.gibbs(*given, 1, 600, 50, (a, c), np.random.default_rng(seed)) for seed in range(8)
    ]
    for name, expected in (("rates", mean), ("rates sd", sd)):
        values = [f[name].item() for f in found]
        assert abs(np.mean(values) - expected) < Z * np.std(values, ddof=1) / math.sqrt(8)
        assert np.std(values, ddof=1) < 0.2 * expected  # or the line above would say little


def test_factors_given_the_weights_against_nuts():
    # Mean field: factors that words speak for (known to within a factor of e) are near the truth
    # and rather too narrow; those that they do not speak for are taken for smaller than they are.
    drawn, guides, given = reference_problem()
    fit = vi.fit(
        drawn,
        guides["gamma factors"],
        given,
        estimator=vi.Reparam(8, analytic_kl=True),
        optimizer=0.01,
        steps=1_200,
        compile=False,
        progress=False,
    )
    path = Path(deep_exponential_family.__file__).with_name("reference.json")
    table = vi.compare(fit, vi.Reference.load(path)).table
    known = table[table["reference sd"] < 1.0]
    assert len(known) >= 6
    assert known["mean error"].abs().max() < 0.6 and known["mean error"].abs().median() < 0.3
    assert known["sd ratio"].min() > 0.5 and known["sd ratio"].max() < 1.1
    unknown = table[table["reference sd"] > 1.0]
    assert unknown["sd ratio"].min() < 0.5  # not hidden


def test_background_is_the_mean_count():
    assert background(matrix([3, 0], [1, 1])).tolist() == [2.5, 1.0]


def test_guides_begin_alike_whatever_was_drawn_before():
    one = Guide((6, 3))
    torch.rand(3)
    two = Guide((6, 3))
    for name, value in one.named_parameters():
        assert torch.equal(value, dict(two.named_parameters())[name]), name
