"""Predictions of Shopper: scores, planted structure, price moves."""

import math

import numpy as np
import pandas as pd
import pyro.poutine as poutine
import pytest
import torch

import vi_toolkit as vi
from recipes.shopper import (
    ALL_SITES,
    LARGEST_STORE,
    PAPER,
    TERMS,
    fast_model,
    fit_trips,
    from_frame,
    guide,
    load_trips,
    model,
    plug_in,
    simulate,
)
from recipes.shopper import evaluate as ev
from tests.support import log_likelihood
from tests.tolerances import Z


def test_scores_are_those_by_hand():
    purchases = {"household": ["a"] * 4, "basket": [1, 1, 2, 3], "week": [1] * 4}
    purchases |= {"item": ["tea", "milk", "tea", "tea"], "price": [1.0] * 4}
    trips = from_frame(pd.DataFrame(purchases))
    utility = torch.tensor([0.0, 1.0])
    scores = ev.score_of(lambda trip, item: utility.expand(len(trip), 2), trips)
    # In the first basket only one item is left, given the other. Alone, both are possible.
    assert scores == pytest.approx([0.0, 0.0, -math.log1p(math.e), -math.log1p(math.e)])
    mean, error = ev.mean_and_error(scores, trips)
    assert mean == pytest.approx(scores.mean())
    assert 0 < error < 1
    assert ev.mean_and_error(scores, trips, scores < 0)[0] == pytest.approx(-math.log1p(math.e))


def test_probabilities_of_choices_are_the_factors_of_the_density():
    # Two items without checkout: the first, and the second given the first.
    options = {"terms": TERMS, "size": 3, "price_size": 2, "season_size": 2, "shuffle": False}
    data, truth = simulate(3, trips=6, items=8, longest=2, checkout=False, **options)
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
    found = log_likelihood(model, "baskets", truth, data)
    torch.testing.assert_close(found, expected.log())


def test_density_given_the_rest_is_the_score():
    trips = load_trips(items=50, store=LARGEST_STORE)
    given = trips.arguments(terms=PAPER, size=3, rest=True, price_prior=(2.0, 5.0))
    nodes = poutine.trace(fast_model).get_trace(**given).nodes
    draw = {name: nodes[name]["value"] for name in ALL_SITES if name in nodes}
    scores = ev.predictive_scores({k: v[None] for k, v in draw.items()}, trips, given["history"])
    found = log_likelihood(fast_model, "baskets", draw, given)
    assert float(found.sum()) == pytest.approx(scores.sum(), rel=1e-5)


def test_planted_complements_and_exchangeable_items_are_found():
    data, truth = simulate(0, trips=1500, planted=True)
    fit = vi.fit(
        fast_model,
        guide,
        data,
        steps=700,
        optimizer=0.03,
        compile=False,
        average=False,
        progress=False,
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
    # The sds of mean field are too small, by no more than a factor of two.
    assert ((slope.mean(0) - expected).abs() < Z * slope.std(0) / 0.5).all()
    assert slope.mean(0)[:4].min() > slope.mean(0)[4:].max()
    assert truth["attributes"].shape == (13, 6)


def test_predictions_beat_popularity_and_follow_prices():
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
    # Draws give a prediction, too.
    averaged = ev.predictive_scores(fit.sample(3), test.take(np.arange(50)), history)
    assert (averaged < 0).all()
    changes = ev.share_changes({k: v[0] for k, v in mean.items()}, test, history, first_week=48)
    assert (np.abs(changes["move"]) >= math.log(1.15) - 1e-6).all()
    # A higher price predicts a lower share, and in most weeks the share is lower.
    assert (np.sign(changes["predicted"]) == -np.sign(changes["move"])).mean() > 0.9
    often = changes["purchases"] >= 20
    assert (np.sign(changes["observed"]) == np.sign(changes["predicted"]))[often].mean() > 0.6
