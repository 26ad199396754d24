"""Shopper: the model's density by hand, draws from it, fits against NUTS."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pyro.poutine as poutine
import pytest
import scipy.special
import torch

import vi_toolkit as vi
from recipes.shopper import ALL_SITES, TERMS, guide, load_data, mcmc, model, simulate
from tests.support import log_likelihood
from tests.tolerances import Z

REFERENCE = Path(__file__).parents[2] / "recipes" / "shopper" / "reference.json"
# Every term, in the order in which the items come.
EVERYTHING = {"terms": TERMS, "size": 3, "price_size": 2, "season_size": 2, "shuffle": False}


@pytest.fixture(scope="module")
def reference():
    return vi.Reference.load(REFERENCE)


@pytest.fixture(scope="module")
def fit():
    return vi.fit(model, guide, load_data(), progress=False)


# ------------------------------------------------------------------------------------ model


def by_hand(u, data, baskets, look_ahead=False):
    """log p(baskets | latents), the formula once more, one choice after the other."""
    u = {k: v.numpy() for k, v in u.items()}
    total = np.zeros(len(baskets))
    items = data["log_price"].shape[1]
    for t, basket in enumerate(baskets.numpy()):
        basket = list(basket[basket >= 0])
        h, w = int(data["household"][t]), int(data["week"][t])
        psi = u["intercept"] + u["attributes"] @ u["preference"][h]
        psi = psi + u["season_effect"] @ u["season"][w]
        slope = u["price_effect"][:items] @ u["price_sensitivity"][h]
        psi[:items] -= slope * data["log_price"][w].numpy()
        counts = data["history"][h].numpy().copy()
        counts[basket] = np.maximum(counts[basket] - 1, 0)
        weight = u["habit"][:items] + u["loyalty"][h]
        psi[:items] += weight * np.log1p(u["habit_rate"][:items] * counts)
        for place, target in enumerate([*basket, items]):
            have = basket[:place]
            mean = u["attributes"][have].mean(0) if have else np.zeros(3)
            utility = psi + u["interaction"] @ mean
            barred = set(have) | (set() if have else {items})
            if look_ahead:
                for c in range(items):
                    after = u["attributes"][[*have, c]].mean(0)
                    rest = [d for d in range(items + 1) if d not in barred | {c}]
                    utility[c] += max(psi[d] + u["interaction"][d] @ after for d in rest)
            utility[list(barred)] = -np.inf
            total[t] += utility[target] - scipy.special.logsumexp(utility)
    return total


@pytest.mark.parametrize("look_ahead", [False, True])
def test_density_is_the_one_by_hand(look_ahead):
    data, truth = simulate(2, trips=12, items=8, **EVERYTHING, look_ahead=look_ahead)
    # The history counts the trips' own purchases, which the density subtracts.
    trip, place = torch.nonzero(data["baskets"] >= 0, as_tuple=True)
    one = torch.ones(len(trip)).double()
    data["history"].index_put_(
        (data["household"][trip], data["baskets"][trip, place]), one, accumulate=True
    )
    expected = by_hand(truth, data, data["baskets"], look_ahead)
    found = log_likelihood(model, "baskets", truth, data)
    assert found.numpy() == pytest.approx(expected, abs=1e-9)


def test_whole_model_has_the_sites_of_all_sites():
    data, truth = simulate(0, trips=5, **EVERYTHING)
    assert set(truth) == set(ALL_SITES)
    sizes = {"items": 13, "households": 20, "weeks": 20, "vector": 3, "prices": 2, "seasons": 2}
    for name, dims in ALL_SITES.items():
        assert truth[name].shape == tuple(sizes[dim] for dim in dims)
    assert not torch.equal(simulate(1, trips=5, **EVERYTHING)[0]["baskets"], data["baskets"])


def test_unknown_terms_are_refused():
    with pytest.raises(ValueError, match="terms are"):
        model(**load_data() | {"terms": ("price",)})


def test_items_given_the_rest_have_no_checkout_among_them():
    data, truth = simulate(2, trips=12, items=8, longest=5, **EVERYTHING, rest=True)
    assert len(truth["intercept"]) == 8
    found = log_likelihood(model, "baskets", truth, data)
    without = log_likelihood(model, "baskets", truth, data | {"checkout": False})
    assert torch.equal(found, without)


def test_a_basket_does_not_predict_itself():
    data, truth = simulate(2, trips=1, items=8, **EVERYTHING)
    own = data["baskets"][0][data["baskets"][0] >= 0]
    data["history"][data["household"][0], own] += 1
    before = data["history"].clone()
    found = log_likelihood(model, "baskets", truth, data)
    assert torch.equal(data["history"], before)
    assert found.numpy() == pytest.approx(by_hand(truth, data, data["baskets"]), abs=1e-9)


def test_orders_are_drawn_uniformly():
    # The mean over random orders is the mean over all orders of the basket.
    data, truth = simulate(5, trips=1, items=8, **EVERYTHING)
    data["baskets"] = torch.tensor([[4, 1, 6, -1]])
    data["history"][data["household"][0], [4, 1, 6]] += 1
    orders = [torch.tensor([[*order, -1]]) for order in itertools.permutations([4, 1, 6])]
    exact = np.array([by_hand(truth, data, order)[0] for order in orders])
    many = data | {"shuffle": True, "household": data["household"].repeat(4000)}
    many |= {"week": data["week"].repeat(4000), "baskets": data["baskets"].repeat(4000, 1)}
    drawn = log_likelihood(model, "baskets", truth, many)
    assert len(np.unique(drawn.numpy().round(6))) == len(np.unique(exact.round(6)))
    assert exact.std() > 0.05  # else the order would not matter
    assert abs(drawn.mean() - exact.mean()) < Z * exact.std() / math.sqrt(4000)


def test_one_versus_each_is_below_the_log_probability():
    data, truth = simulate(2, trips=12, items=8, **EVERYTHING)
    exact = log_likelihood(model, "baskets", truth, data)
    bound = log_likelihood(model, "baskets", truth, data | {"negatives": 9})
    assert (bound <= exact).all()
    assert bound.sum() > 3 * exact.sum()


@pytest.mark.parametrize("negatives", [None, 3])
def test_one_versus_each_is_exact_for_two_choices(negatives):
    two = {"intercept": torch.tensor([0.3, -0.4, 0.9]).double()}
    small = {"household": torch.tensor([0]), "week": torch.tensor([0])}
    small |= {"log_price": torch.zeros(1, 2).double(), "history": torch.zeros(1, 2).double()}
    small |= {"baskets": torch.tensor([[1, -1]]), "terms": (), "shuffle": False}
    found = log_likelihood(model, "baskets", two, small | {"negatives": negatives})
    expected = -math.log1p(math.exp(0.3 + 0.4)) - math.log1p(math.exp(0.3 - 0.9))
    assert float(found) == pytest.approx(expected)


def test_one_versus_each_with_few_rivals_is_unbiased():
    data, truth = simulate(2, trips=12, items=8, **EVERYTHING)
    bound = log_likelihood(model, "baskets", truth, data | {"negatives": 9}).sum()
    draws = torch.stack(
        [log_likelihood(model, "baskets", truth, data | {"negatives": 4}).sum() for _ in range(400)]
    )
    assert abs(draws.mean() - bound) < Z * draws.std() / math.sqrt(400)
    assert draws.std() > 1


def test_baskets_are_drawn_from_the_density():
    # The frequency of each drawn basket is its probability: all baskets of at most two of three.
    options = EVERYTHING | {"terms": ("basket", "households")}
    data, truth = simulate(1, trips=1, items=3, longest=3, **options)
    baskets = [
        [*order, *[-1] * (3 - size)]
        for size in (1, 2)
        for order in itertools.permutations(range(3), size)
    ]
    each = {k: v.repeat(len(baskets)) for k, v in data.items() if k in ("household", "week")}
    scored = data | each | {"baskets": torch.tensor(baskets)}
    probability = log_likelihood(model, "baskets", truth, scored).exp().numpy()
    n = 20_000
    many = {k: v.repeat(n) for k, v in data.items() if k in ("household", "week")}
    drawn = poutine.condition(model, data=truth)(**data | many | {"baskets": None, "longest": 3})
    found, counts = np.unique(drawn.numpy(), axis=0, return_counts=True)
    frequency = {tuple(b): c / n for b, c in zip(found.tolist(), counts, strict=True)}
    error = np.sqrt(probability * (1 - probability) / n)
    got = np.array([frequency.get(tuple(b), 0.0) for b in baskets])
    assert (np.abs(got - probability) < Z * error).all()


# -------------------------------------------------------------------------------- reference


def test_reference_was_admitted(reference):
    made = reference.made
    assert made["chains"] >= 4
    assert made["r_hat"] < 1.01
    assert min(made["bulk_ess"], made["tail_ess"]) >= 1_000
    assert made["divergences"] == 0


def test_mean_field_has_the_right_means_and_too_small_sds(fit, reference):
    # Raising all intercepts together changes nothing, nor does trading a household's sensitivity
    # against the items' effects: correlations reach 0.95, and mean field has none.
    comparison = vi.compare(fit, reference)
    table = comparison.table
    assert fit.converged
    assert comparison.verdict == "do not trust"
    error = table["mean error"].abs() - Z * table["mean_error_se"]
    assert error.max() < 0.05
    ratio, expected = table["sd ratio"], table["expected sd ratio"]
    assert ratio.max() < 0.9
    intercepts = [name for name in table.index if name.startswith("intercept")]
    assert table.loc[intercepts, "ok"].all()  # as narrow as theory says: 0.26 to 0.44
    assert ratio[intercepts].max() < 0.45
    # The logs of the price terms are skewed, so their sds are below the Gaussian theory's.
    assert (ratio.drop(intercepts) < expected.drop(intercepts)).all()


def test_linear_response_corrects_the_sds(fit, reference):
    response = vi.linear_response(fit)
    ratio = np.log(response.sd / reference.sd)
    noise = Z * reference.sd_se / reference.sd
    assert (np.abs(ratio) < np.log(1.05) + noise).all()


def test_choice_probabilities_and_elasticities_agree_with_nuts():
    # With all terms, by quantities that a rotation of the embeddings leaves alone.
    nuts = json.loads(mcmc.EMBEDDED.read_text("utf-8"))
    for name in ("log probability", "elasticity"):
        assert nuts["made"][f"r_hat of {name}"] < 1.02
        assert nuts["made"][f"bulk ESS of {name}"] > 400
    data, new = mcmc.embedded_problem()
    fit = vi.fit(model, guide, data, steps=2000, optimizer=0.02, compile=False, progress=False)
    ours = mcmc.summary(fit.sample(300), data, new)
    error, ratio = {}, {}
    for name in ("log probability", "elasticity"):
        mean, sd = (np.array(nuts[name][what]) for what in ("mean", "sd"))
        error[name] = np.abs(np.array(ours[name]["mean"]) - mean) / sd
        ratio[name] = np.array(ours[name]["sd"]) / sd
    # NUTS' own Monte Carlo error is 0.035 sd.
    noise = Z / math.sqrt(800)
    assert error["log probability"].max() < 0.35 + noise
    assert error["elasticity"].max() < 0.15 + noise
    # A log probability is a difference of utilities that move together. Mean field ignores their
    # correlation, so most of its sds here are too large, though the sd of each latent is too small.
    assert 1.1 < np.median(ratio["log probability"]) < 1.4
    assert 0.85 < np.median(ratio["elasticity"]) < 1.15
    gain = np.subtract(ours["held out"], nuts["held out"])  # nats per basket
    assert abs(gain.mean()) < 0.01 + Z * gain.std() / math.sqrt(len(gain))
