"""The deep exponential family's guide: factors, reading, fits, and exact answers."""

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

import vi_toolkit as vi
from recipes import deep_exponential_family
from recipes.deep_exponential_family import exact, plots, reference_problem
from recipes.deep_exponential_family.collapsed import read, start
from recipes.deep_exponential_family.data import arguments
from recipes.deep_exponential_family.evaluate import (
    difference,
    log_predictive,
    predictive,
    same_for_all,
    thin,
    unigram,
)
from recipes.deep_exponential_family.guide import Guide, positive
from recipes.deep_exponential_family.model import FAMILIES, OWN
from recipes.deep_exponential_family.variants import variant
from recipes.deep_exponential_family.words import dense
from tests.tolerances import Z
from vi_toolkit.estimators.divergence import kl_divergence

# --- factors ---------------------------------------------------------------------------------


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
    kl = kl_divergence(q, dist.Gamma(torch.full((4,), 0.1), torch.tensor(0.3)))
    gradients = torch.autograd.grad(kl.sum() + draws.log().sum(), (log_mean, log_shape))
    assert torch.isfinite(kl).all() and all(torch.isfinite(g).all() for g in gradients)


def test_guides_begin_alike_whatever_was_drawn_before():
    one = Guide((6, 3))
    torch.rand(3)
    two = Guide((6, 3))
    for name, value in one.named_parameters():
        assert torch.equal(value, dict(two.named_parameters())[name]), name


# --- reading ---------------------------------------------------------------------------------


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


def test_expected_counts_are_read_too():
    torch.manual_seed(0)
    given = (torch.zeros(6, dtype=torch.long), torch.arange(6), torch.rand(6))  # less than a word
    n, g = read(*given, torch.rand(6, 3), torch.full((3,), 0.05), torch.ones(1, 3), 20)
    assert (g >= 0).all() and (n >= 0).all()
    torch.testing.assert_close(n.sum(), given[2].sum())


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


def test_parameters_do_not_grow_with_the_documents():
    sizes = []
    for n in (50, 500):
        rng = np.random.default_rng(0)
        given = arguments(scipy.sparse.csr_matrix(rng.poisson(1.0, (n, 30)) + (np.arange(30) < 1)))
        guide = Guide((5, 3)).start(**given)
        sizes.append(sum(p.numel() for p in guide.parameters()))
    assert sizes[0] == sizes[1]


# --- fits ------------------------------------------------------------------------------------


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


# --- exact answers ---------------------------------------------------------------------------


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
