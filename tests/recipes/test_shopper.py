"""Shopper: the density by hand, fits against NUTS, planted structure, scores, bad input."""

import importlib
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pyro.poutine as poutine
import pytest
import scipy.special
import torch

import vi_toolkit as vi
from recipes.shopper import (
    ALL_SITES,
    LARGEST_STORE,
    TERMS,
    from_frame,
    guide,
    load_data,
    load_trips,
    mcmc,
    model,
    simulate,
)
from recipes.shopper import evaluate as ev
from recipes.shopper.training import fit_trips, plug_in
from tests.tolerances import Z
from vi_toolkit.programs.joint import Joint

module = importlib.import_module("recipes.shopper.model")
REFERENCE = Path(__file__).parents[2] / "recipes" / "shopper" / "reference.json"
EVERYTHING = {"terms": TERMS, "size": 3, "price_size": 2, "season_size": 2, "shuffle": False}


@pytest.fixture(scope="module")
def reference():
    return vi.Reference.load(REFERENCE)


@pytest.fixture(scope="module")
def fit():
    return vi.fit(model, guide, load_data(), progress=False)


def frame(**changes):
    columns = {
        "household": ["a", "a", "a", "b"],
        "basket": [1, 1, 2, 3],
        "item": ["tea", "milk", "tea", "tea"],
        "week": [3, 3, 4, 5],
        "price": [2.0, 1.0, 2.5, 3.0],
    }
    return pd.DataFrame(columns | changes)


# ------------------------------------------------------------------------------------ data


def test_the_real_data_are_those_of_the_protocol():
    trips = load_trips()
    assert len(trips) == 78_459
    assert int((trips.baskets >= 0).sum()) == 491_761
    assert trips.price.shape == (53, 1000)
    assert (trips.price > 0).all()
    assert len(trips.households) == 2401
    popular = np.bincount(trips.baskets[trips.baskets >= 0])
    assert popular.argmax() == 0  # most bought first
    sizes = {by: [len(part) for part in trips.split(by)] for by in ("random", "last weeks")}
    assert sizes["random"] == [62_767, 7_846, 7_846]
    train, _, test = trips.split("last weeks")
    assert test.week.min() == 47 and train.week.max() == 46
    assert sum(sizes["last weeks"]) == len(trips)
    assert not set(train.basket_ids) & set(test.basket_ids)


def test_a_table_of_ones_own():
    trips = from_frame(frame())
    assert list(trips.items) == ["tea", "milk"]  # most bought first
    assert trips.baskets.tolist() == [[0, 1], [0, -1], [0, -1]]  # one-item baskets stay
    assert trips.household.tolist() == [0, 0, 1]
    assert trips.week.tolist() == [0, 1, 2]
    # Milk was bought in the first week only, and has that price in all.
    assert trips.price.tolist() == [[2.0, 1.0], [2.5, 1.0], [3.0, 1.0]]
    assert trips.history().tolist() == [[2.0, 1.0], [1.0, 0.0]]
    twice = pd.concat([frame(), frame().iloc[[1]]])
    assert torch.equal(from_frame(twice).baskets, trips.baskets)
    assert len(from_frame(frame(), smallest=2)) == 1
    again = from_frame(frame(price=[9.0] * 4), like=trips)
    assert torch.equal(again.price, trips.price)
    assert torch.equal(again.baskets, trips.baskets)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"price": [2.0, 0.0, 2.5, 3.0]}, "1 prices are not positive; row 1 has 0.0"),
        ({"price": [2.0, -1.0, math.inf, 3.0]}, "2 prices are not positive"),
        ({"price": [2.0, math.nan, 2.5, 3.0]}, "row 1 lacks price"),
        ({"item": ["tea", None, "tea", "tea"]}, "row 1 lacks item"),
        ({"week": [3.5, 3.5, 4, 5]}, "whole number"),
        ({"week": ["Mon", "Mon", "Tue", "Wed"]}, "whole number"),
        ({"week": [3, 4, 4, 5]}, "basket 1 has more than one week"),
        ({"household": ["a", "b", "a", "b"]}, "basket 1 has more than one household"),
    ],
)
def test_bad_tables(changes, message):
    with pytest.raises(ValueError, match=message):
        from_frame(frame(**changes))


def test_what_a_fitted_model_does_not_know():
    trips = from_frame(frame())
    for column, value in (("item", "rum"), ("household", "c"), ("week", 9)):
        values = frame()[column].tolist()
        values[3] = value
        with pytest.raises(ValueError, match=f"1 {column}s are not among .* is {value}"):
            from_frame(frame(**{column: values}), like=trips)
    with pytest.raises(ValueError, match="lacks price"):
        from_frame(frame().drop(columns="price"))
    with pytest.raises(ValueError, match="no rows"):
        from_frame(frame().iloc[:0])
    with pytest.raises(ValueError, match="at least 3"):
        from_frame(frame(), smallest=3)
    with pytest.raises(ValueError, match="'random' or 'last weeks'"):
        trips.split("first weeks")
    with pytest.raises(ValueError, match="products"):
        load_trips(of="brands")
    with pytest.raises(ValueError, match="terms are"):
        model(**load_data() | {"terms": ("price",)})


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
def test_log_density_by_hand(look_ahead, monkeypatch):
    data, truth = simulate(2, trips=12, items=8, **EVERYTHING, look_ahead=look_ahead)
    # Their own purchases are in the history, where the density looks for what to take out.
    trip, place = torch.nonzero(data["baskets"] >= 0, as_tuple=True)
    one = torch.ones(len(trip)).double()
    data["history"].index_put_(
        (data["household"][trip], data["baskets"][trip, place]), one, accumulate=True
    )
    expected = by_hand(truth, data, data["baskets"], look_ahead)
    conditioned = poutine.condition(model, data=truth)
    for cached in (module.CACHED, 1):  # both ways of computing it
        monkeypatch.setattr(module, "CACHED", cached)
        site = poutine.trace(conditioned).get_trace(**data).nodes["baskets"]
        found = site["fn"].log_prob(site["value"])
        assert found.numpy() == pytest.approx(expected, abs=1e-9)


def test_both_ways_have_the_same_gradient(monkeypatch):
    data, _ = simulate(2, trips=12, items=8, **EVERYTHING)
    joint = Joint(model, data)
    point = 0.3 * torch.randn(joint.dim).double()

    def gradient():
        u = point.clone().requires_grad_()
        joint.log_density(u).backward()
        return u.grad

    plain = gradient()
    monkeypatch.setattr(module, "CACHED", 40)  # a few rows at a time
    torch.testing.assert_close(gradient(), plain, rtol=0, atol=1e-10)


def test_a_choice_of_no_probability_has_its_log(monkeypatch):
    """The exponential of its utility is 0 in any precision."""
    data, truth = simulate(2, trips=12, items=8, **EVERYTHING)
    truth["intercept"] = truth["intercept"] * 1e4
    conditioned = poutine.condition(model, data=truth)

    def log_prob():
        site = poutine.trace(conditioned).get_trace(**data).nodes["baskets"]
        return site["fn"].log_prob(data["baskets"])

    plain = log_prob()
    assert bool((plain < -1e3).any())
    monkeypatch.setattr(module, "CACHED", 40)  # a few rows at a time
    torch.testing.assert_close(log_prob(), plain, rtol=1e-12, atol=1e-9)


def test_choices_of_unequal_weight_have_their_gradient(monkeypatch):
    data, u = simulate(2, trips=12, items=8, **EVERYTHING)
    u = {name: u[name] for name in module.CHOOSING}
    held = data["baskets"] >= 0
    trip, bought = held.nonzero()[:, 0], data["baskets"][held]
    barred = (bought[1:] != bought[:-1]).nonzero()[:, 0]
    choices = trip, bought, barred, bought[barred + 1]
    data["history"] = data["history"].float()  # counts, whatever the precision of the rest
    trips = tuple(data[name] for name in ("household", "week", "log_price", "history"))
    mean = torch.randn(len(trip), u["interaction"].shape[1]).double()

    def gradients(weight, own, mean):
        inputs = {name: value.clone().requires_grad_() for name, value in u.items()}
        mean = None if mean is None else mean.clone().requires_grad_()
        log_prob = module.choice_log_prob(inputs, mean, trips, own, choices)
        among = [*inputs.values(), *([] if mean is None else [mean])]
        return torch.autograd.grad(log_prob @ weight, among, allow_unused=True)

    for weight in (torch.full((len(trip),), 2.0), torch.arange(float(len(trip)))):
        for given in (((trip, bought), mean), (None, None)):
            plain = gradients(weight.double(), *given)
            with monkeypatch.context() as patch:
                patch.setattr(module, "CACHED", 60)  # a few rows at a time
                for one, other in zip(gradients(weight.double(), *given), plain, strict=True):
                    other = torch.zeros_like(one) if other is None else other
                    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_sites_of_the_whole_model():
    data, truth = simulate(0, trips=5, **EVERYTHING)
    assert set(truth) == set(ALL_SITES)
    sizes = {"items": 13, "households": 20, "weeks": 20, "vector": 3, "prices": 2, "seasons": 2}
    for name, dims in ALL_SITES.items():
        assert truth[name].shape == tuple(sizes[dim] for dim in dims)
    assert not torch.equal(simulate(1, trips=5, **EVERYTHING)[0]["baskets"], data["baskets"])


def test_a_basket_does_not_predict_itself():
    # Whatever the history says of a trip's own purchases is taken out of it.
    data, truth = simulate(2, trips=1, items=8, **EVERYTHING)
    own = data["baskets"][0][data["baskets"][0] >= 0]
    data["history"][data["household"][0], own] += 1
    conditioned = poutine.condition(model, data=truth)
    site = poutine.trace(conditioned).get_trace(**data).nodes["baskets"]
    before = data["history"].clone()
    with_own = site["fn"].log_prob(site["value"])
    assert torch.equal(data["history"], before)
    assert with_own.numpy() == pytest.approx(by_hand(truth, data, data["baskets"]), abs=1e-9)


def test_orders_are_drawn_uniformly():
    # The mean over draws of the order is that over all of a basket's orders.
    data, truth = simulate(5, trips=1, items=8, **EVERYTHING)
    data["baskets"] = torch.tensor([[4, 1, 6, -1]])
    data["history"][data["household"][0], [4, 1, 6]] += 1
    orders = [torch.tensor([[*order, -1]]) for order in itertools.permutations([4, 1, 6])]
    exact = np.array([by_hand(truth, data, order)[0] for order in orders])
    many = data | {"shuffle": True, "household": data["household"].repeat(4000)}
    many |= {"week": data["week"].repeat(4000), "baskets": data["baskets"].repeat(4000, 1)}
    site = poutine.trace(poutine.condition(model, data=truth)).get_trace(**many).nodes["baskets"]
    drawn = site["fn"].log_prob(site["value"])
    assert len(np.unique(drawn.numpy().round(6))) == len(np.unique(exact.round(6)))
    assert exact.std() > 0.05  # else the order would not matter
    assert abs(drawn.mean() - exact.mean()) < Z * exact.std() / math.sqrt(4000)


def test_one_versus_each():
    # With all items among the others it is the bound itself, which is below the log probability;
    # with a few, an unbiased estimate of it.
    data, truth = simulate(2, trips=12, items=8, **EVERYTHING)
    conditioned = poutine.condition(model, data=truth)

    def log_prob(**options):
        site = poutine.trace(conditioned).get_trace(**data | options).nodes["baskets"]
        return site["fn"].log_prob(site["value"])

    exact, bound = log_prob(), log_prob(negatives=9)
    assert (bound <= exact).all()
    assert bound.sum() > 3 * exact.sum()
    two = {"intercept": torch.tensor([0.3, -0.4, 0.9]).double()}  # two choices: the bound is exact
    small = {"household": torch.tensor([0]), "week": torch.tensor([0])}
    small |= {"log_price": torch.zeros(1, 2).double(), "history": torch.zeros(1, 2).double()}
    small |= {"baskets": torch.tensor([[1, -1]]), "terms": (), "shuffle": False}
    for options in ({}, {"negatives": 3}):
        trace = poutine.trace(poutine.condition(model, data=two)).get_trace(**small, **options)
        value = trace.nodes["baskets"]["fn"].log_prob(small["baskets"])
        assert float(value) == pytest.approx(
            -math.log1p(math.exp(0.3 + 0.4)) - math.log1p(math.exp(0.3 - 0.9))
        )
    draws = torch.stack([log_prob(negatives=4).sum() for _ in range(400)])
    assert abs(draws.mean() - bound.sum()) < Z * draws.std() / math.sqrt(400)
    assert draws.std() > 1


def test_baskets_are_drawn_from_the_density():
    # How often each basket is drawn, against its probability: all baskets of at most two of three.
    options = EVERYTHING | {"terms": ("basket", "households")}
    data, truth = simulate(1, trips=1, items=3, longest=3, **options)
    conditioned = poutine.condition(model, data=truth)
    baskets = [
        [*order, *[-1] * (3 - size)]
        for size in (1, 2)
        for order in itertools.permutations(range(3), size)
    ]
    each = {k: v.repeat(len(baskets)) for k, v in data.items() if k in ("household", "week")}
    scored = data | each | {"baskets": torch.tensor(baskets)}
    site = poutine.trace(conditioned).get_trace(**scored).nodes["baskets"]
    probability = site["fn"].log_prob(site["value"]).exp().numpy()
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


def test_mean_field_is_right_about_means_and_too_narrow(fit, reference):
    # Intercepts can all be raised together, and a household's sensitivity be exchanged for the
    # items' effects: the correlations reach 0.95, and mean field has none.
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
    # The price terms, whose logs are skewed, are narrower than their Gaussian theory says.
    assert (ratio.drop(intercepts) < expected.drop(intercepts)).all()


def test_linear_response_mends_the_widths(fit, reference):
    response = vi.linear_response(fit)
    ratio = np.log(response.sd / reference.sd)
    noise = Z * reference.sd_se / reference.sd
    assert (np.abs(ratio) < np.log(1.05) + noise).all()


# ------------------------------------------------------------------------------- prediction


def test_scores_by_hand():
    trips = from_frame(frame())
    utility = torch.tensor([0.0, 1.0])
    scores = ev.score_of(lambda trip, item: utility.expand(len(trip), 2), trips)
    # With milk in the basket only tea is left, and the other way round; alone both are possible.
    assert scores == pytest.approx([0.0, 0.0, -math.log1p(math.e), -math.log1p(math.e)])
    mean, error = ev.mean_and_error(scores, trips)
    assert mean == pytest.approx(scores.mean())
    assert 0 < error < 1
    assert ev.mean_and_error(scores, trips, scores < 0)[0] == pytest.approx(-math.log1p(math.e))


def test_predictions_are_those_of_the_density():
    # Of two items without checkout, the second given the first: the density's second factor.
    options = EVERYTHING | {"checkout": False}
    data, truth = simulate(3, trips=6, items=8, longest=2, **options)
    u = {name: value[None] for name, value in truth.items()}
    probability = ev.choice_probabilities(
        u,
        data["household"],
        data["week"],
        data["log_price"],
        data["history"],
        torch.tensor([[first, -1] for first in data["baskets"][:, 0]]),
    )
    nothing = torch.full((6, 1), -1)
    first = ev.choice_probabilities(
        u, data["household"], data["week"], data["log_price"], data["history"], nothing
    )
    rows = torch.arange(6)
    expected = first[0, rows, data["baskets"][:, 0]] * probability[0, rows, data["baskets"][:, 1]]
    site = poutine.trace(poutine.condition(model, data=truth)).get_trace(**data).nodes["baskets"]
    found = site["fn"].log_prob(site["value"])
    torch.testing.assert_close(found, expected.log())


def test_planted_structure_is_found():
    data, truth = simulate(0, trips=1500, planted=True)
    fit = vi.fit(
        model, guide, data, steps=700, optimizer=0.03, compile=False, average=False, progress=False
    )
    draws = fit.sample(200)
    score, error = (x[:12, :12] for x in ev.complements(draws))
    alike, _ = (x[:12, :12] for x in ev.exchangeability({k: v[:20] for k, v in draws.items()}))
    item = torch.arange(12)
    partners = (item[:, None] // 4 == item // 4) & (item[:, None] // 2 != item // 2)
    twins = (item[:, None] // 2 == item // 2) & (item[:, None] != item)
    others = ~(partners | twins | torch.eye(12, dtype=torch.bool))
    assert score[partners].min() > score[others].max()
    assert score[twins].max() < score[others].min()
    assert (score[partners] > 3 * error[partners]).all()
    # The most exchangeable item of each is its twin.
    alike = alike + torch.diag(torch.full((12,), torch.inf))
    assert torch.equal(alike.argmin(1), item ^ 1)
    # Slopes in the log price: 2 for the first four items, 1 for the others.
    slope = (draws["price_sensitivity"].mean(1)[:, None] * draws["price_effect"][:, :12]).sum(-1)
    expected = torch.where(item < 4, 2.0, 1.0)
    # Mean field's sds are too narrow: by no more than half.
    assert ((slope.mean(0) - expected).abs() < Z * slope.std(0) / 0.5).all()
    assert slope.mean(0)[:4].min() > slope.mean(0)[4:].max()
    assert truth["attributes"].shape == (13, 6)


def test_prediction_and_price_moves():
    trips = load_trips(items=60)
    train, _, test = trips.split("last weeks")
    history = train.history()
    options = {"terms": TERMS, "size": 8, "price_prior": (2.0, 5.0), "rest": True}
    fit = fit_trips(train, steps=80, rate=0.05, progress=False, checkout=False, **options)
    mean = plug_in(fit)
    scores = ev.predictive_scores(mean, test, history)
    popular = (history.sum(0) + 0.5).log()
    baseline = ev.score_of(lambda trip, item: popular.expand(len(trip), -1), test)
    gain, error = ev.mean_and_error(scores - baseline, test)
    assert gain > 0.3 > Z * error
    # An average over draws is a prediction too, of probabilities that sum to one or less.
    averaged = ev.predictive_scores(fit.sample(3), test.take(np.arange(50)), history)
    assert (averaged < 0).all()
    changes = ev.share_changes({k: v[0] for k, v in mean.items()}, test, history, first_week=48)
    assert (np.abs(changes["move"]) >= math.log(1.15) - 1e-6).all()
    # Dearer is less, by the model; and in most of the weeks.
    assert (np.sign(changes["predicted"]) == -np.sign(changes["move"])).mean() > 0.9
    often = changes["purchases"] >= 20
    assert (np.sign(changes["observed"]) == np.sign(changes["predicted"]))[often].mean() > 0.6


def test_the_largest_store():
    trips = load_trips(items=50, store=LARGEST_STORE)
    assert len(trips.households) == int(trips.household.max()) + 1
    assert torch.equal(trips.price, load_trips(items=50).price)  # the chain's
    with pytest.raises(ValueError, match="no store 1"):
        load_trips(items=50, store=1)


def test_embeddings_against_nuts():
    # On all terms, in what the turning of embeddings leaves alone.
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
    # A log probability is a difference of utilities that move together: without their correlation
    # mean field has most of them too wide, though each latent is too narrow.
    assert 1.1 < np.median(ratio["log probability"]) < 1.4
    assert 0.85 < np.median(ratio["elasticity"]) < 1.15
    gain = np.subtract(ours["held out"], nuts["held out"])  # nats per basket
    assert abs(gain.mean()) < 0.01 + Z * gain.std() / math.sqrt(len(gain))
