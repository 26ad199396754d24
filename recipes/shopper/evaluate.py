"""How well a model predicts one item of a basket from the rest, and what a fitted model says.

Protocol: `train, validation, test = load_trips().split(by)`, by "random" or "last weeks". Fit on
the training trips and tune on the validation trips. Every item i of a test trip with basket y,
household u and week w has the score log p(i | y without i, u, w, prices of w), under a distribution
over the items outside the rest of the basket, without checkout. We report the mean over all test
items, in nats, and its standard error from resampling trips.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from .choices import baseline, best_next
from .trips import Trips

Draws = Mapping[str, torch.Tensor]
CHUNK = 512  # trips


def each_item(trips: Trips) -> tuple[torch.Tensor, torch.Tensor]:
    """(trip, item) of every purchase, in the order of all scores: (purchases,) each."""
    trip, place = torch.nonzero(trips.baskets >= 0, as_tuple=True)
    return trip, trips.baskets[trip, place]


def score_of(
    utilities: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], trips: Trips
) -> np.ndarray:
    """Log probability of every item given the rest of its basket: (purchases,), in nats.

    utilities: (trip, item) of purchases -> (purchases, items) unnormalised log probabilities, which
    must not look at the item itself. Any method can be scored this way.

    >>> from recipes.shopper import load_trips
    >>> trips = load_trips(items=50)
    >>> uniform = score_of(lambda trip, item: torch.zeros(len(trip), 50), trips)
    >>> round(float(uniform.max()), 2), round(float(uniform.mean()), 2)
    (-3.58, -3.85)
    """
    trip, item = each_item(trips)
    scores = []
    begin = 0
    for part in torch.arange(len(trips)).split(CHUNK):
        end = begin + int((trips.baskets[part] >= 0).sum())
        rows = slice(begin, end)
        utility = utilities(trip[rows], item[rows]).double()
        baskets = trips.baskets[trip[rows]]
        row, place = torch.nonzero((baskets >= 0) & (baskets != item[rows, None]), as_tuple=True)
        utility = utility.index_put((row, baskets[row, place]), utility.new_tensor(-torch.inf))
        scores.append(utility.log_softmax(-1).gather(1, item[rows, None])[:, 0])
        begin = end
    return torch.cat(scores).numpy()


def utilities(
    u: Draws,
    trips: Trips,
    history: torch.Tensor,
    trip: torch.Tensor,
    item: torch.Tensor | None,
    look_ahead: bool = False,
    log_price: torch.Tensor | None = None,
) -> torch.Tensor:
    """Utilities of all items given the rest of the basket under one draw: (purchases, items).

    u: one value of every latent. trips: give household, week, basket and prices. history: that of
    the training trips. trip, item: (purchases,), the purchases; with item None, utilities given the
    whole basket. log_price: (weeks, items), to replace the prices of the trips.
    """
    household, week = trips.household[trip], trips.week[trip]
    log_price = trips.log_price if log_price is None else log_price
    log_price = log_price.to(u["intercept"].dtype)
    history = history.to(log_price.dtype)
    psi = baseline(u, household, week, log_price, history)
    if "interaction" in u:
        table = torch.nn.functional.pad(u["attributes"][: len(trips.items)], (0, 0, 0, 1))
        total = table[trips.baskets[trip]].sum(1)  # -1 is the last row, of zeros
        places = (trips.baskets[trip] >= 0).sum(1)
        if item is not None:
            total, places = total - table[item], places - 1
        utility = psi + total / places.clamp(min=1)[:, None] @ u["interaction"].T
        if look_ahead:
            now = psi + total / (places + 1)[:, None] @ u["interaction"].T
            baskets = trips.baskets[trip]
            held = baskets >= 0
            if item is not None:
                held = held & (baskets != item[:, None])
            row, place = torch.nonzero(held, as_tuple=True)
            now[row, baskets[row, place]] = -torch.inf
            utility = utility + best_next(now, u["attributes"], u["interaction"], places)
    else:
        utility = psi
    return utility[:, : len(trips.items)]


def predictive_scores(
    draws: Draws,
    trips: Trips,
    history: torch.Tensor,
    look_ahead: bool = False,
) -> np.ndarray:
    """Posterior predictive log probability of every item: (purchases,), in nats.

    draws: {site: (S, ...)}. Probabilities are averaged over the S draws; one draw, the posterior's
    mean, gives the plug-in prediction.
    """
    each = []
    for s in range(len(next(iter(draws.values())))):
        u = {name: value[s] for name, value in draws.items()}

        def one(trip, item, u=u):
            options = {"look_ahead": look_ahead}
            return utilities(u, trips, history, trip, item, **options)

        each.append(score_of(one, trips))
    return np.logaddexp.reduce(each, axis=0) - np.log(len(each))


def mean_and_error(
    scores: np.ndarray, trips: Trips, rows: np.ndarray | None = None, resamples: int = 200
) -> tuple[float, float]:
    """Mean over purchases and its bootstrap standard error over trips.

    scores: (purchases,) as above, or the difference of two methods' scores, for a paired
    comparison. rows: a boolean mask, to score a slice.
    """
    trip = each_item(trips)[0].numpy()
    if rows is not None:
        trip, scores = trip[rows], scores[rows]
    _, trip = np.unique(trip, return_inverse=True)
    total, count = np.bincount(trip, scores), np.bincount(trip).astype(float)
    rng = np.random.default_rng(0)
    means = []
    for _ in range(resamples):
        chosen = rng.integers(0, len(total), len(total))
        weight = np.bincount(chosen, minlength=len(total))
        means.append((weight @ total) / (weight @ count))
    return float(scores.mean()), float(np.std(means))


def complements(draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
    """Complementarity of each pair of items: mean and sd over draws, (items, items) each.

    (interaction_c . attributes_d + interaction_d . attributes_c) / 2 (Ruiz, Athey and Blei, 2020):
    what a basket of one of the two adds to the utility of the other, in nats.
    """
    scores = draws["interaction"] @ draws["attributes"].transpose(1, 2)
    scores = (scores + scores.transpose(1, 2)) / 2
    return scores.mean(0), _spread(scores)


def _spread(draws: torch.Tensor) -> torch.Tensor:
    """Sd over draws; zero if there is only one, as with a point estimate."""
    return draws.std(0) if len(draws) > 1 else torch.zeros_like(draws[0])


def exchangeability(draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
    """How differently a basket goes on after each of two items: mean and sd over draws.

    The symmetrised Kullback-Leibler divergence between the next item's distribution after c alone
    and after d alone, with c and d left out, for a household and a week of average utilities:
    (items, items) each, in nats. Two items of small divergence are exchangeable; if they are not
    complements, they are substitutes (Ruiz, Athey and Blei, 2020). Checkout, if there is one,
    counts as an item.
    """
    each = []
    for s in range(len(draws["interaction"])):
        u = {name: value[s].double() for name, value in draws.items()}
        utility = u["intercept"] + u["attributes"] @ u["interaction"].T  # row: what is there
        if "preference" in u:
            utility = utility + u["attributes"] @ u["preference"].mean(0)
        top = utility.max()
        weight = (utility - top).exp()
        total, own = weight.sum(1), weight.diagonal()
        # Sums over everything but c and d, from the sums over everything: e is neither c nor d.
        own_other = weight  # [c, d]: weight of d after c
        norm = total[:, None] - own[:, None] - own_other
        log_norm = norm.log()
        energy = weight @ utility.T  # [c, d]: sum over e of weight_ce utility_de
        same = (weight * utility).sum(1)
        corner = own[:, None] * utility.T + own_other * utility.diagonal()  # e = c and e = d
        at_own = (own * utility.diagonal())[:, None] + weight * utility
        expected_own = (same[:, None] - at_own) / norm
        expected_other = (energy - corner) / norm
        divergence = expected_own - expected_other - log_norm + log_norm.T
        each.append((divergence + divergence.T) / 2)
    stacked = torch.stack(each)
    return stacked.mean(0), _spread(stacked)


def price_moves(
    trips: Trips, first_week: int, least: float = 0.15
) -> tuple[np.ndarray, np.ndarray]:
    """(week, item) of price moves by at least the fraction `least` from one week to the next.

    Only weeks from `first_week` on (a row of `trips.price`), and items bought in either week.
    """
    log_price = trips.log_price.double().numpy()
    moved = np.abs(np.diff(log_price, axis=0, prepend=log_price[:1])) >= np.log1p(least)
    bought = _bought(trips) > 0
    either = bought | np.vstack([bought[:1], bought[:-1]])
    moved &= either
    moved[:first_week] = False
    return np.nonzero(moved)


def _bought(trips: Trips) -> np.ndarray:
    """(weeks, items) numbers of purchases."""
    trip, item = each_item(trips)
    counts = np.zeros(trips.price.shape)
    np.add.at(counts, (trips.week[trip].numpy(), item.numpy()), 1)
    return counts


def share_changes(
    u: Draws, trips: Trips, history: torch.Tensor, first_week: int
) -> dict[str, np.ndarray]:
    """What price moves did to shares and what the model predicts: arrays, one entry per move.

    "observed": log ratio of the item's share of the purchases in the week to its share in the week
    before (half a purchase added to both). "predicted": for the purchases of the week, log ratio of
    the item's expected share at the week's prices to its expected share at the prices of the week
    before. "move": change of the log price. "purchases": of the item, in the two weeks together.
    """
    week_of, item_of = price_moves(trips, first_week)
    counts = _bought(trips)
    totals = counts.sum(1)
    observed = np.log((counts[week_of, item_of] + 0.5) / (counts[week_of - 1, item_of] + 0.5))
    observed = observed - np.log(totals[week_of] / totals[week_of - 1])
    log_price = trips.log_price
    before = torch.vstack([log_price[:1], log_price[:-1]])
    trip, item = each_item(trips)
    predicted = np.zeros(len(week_of))
    for week in np.unique(week_of):
        rows = (trips.week[trip] == int(week)).nonzero()[:, 0]
        shares = []
        for price in (log_price, before):
            total = torch.zeros(len(trips.items))
            for part in rows.split(2048):
                utility = utilities(u, trips, history, trip[part], item[part], log_price=price)
                total += utility.softmax(1).sum(0)
            shares.append(total)
        change = (shares[0] / shares[1]).log().numpy()
        here = week_of == week
        predicted[here] = change[item_of[here]]
    move = (log_price - before).numpy()[week_of, item_of]
    purchases = counts[week_of, item_of] + counts[week_of - 1, item_of]
    return {"observed": observed, "predicted": predicted, "move": move, "purchases": purchases}


def choice_probabilities(
    draws: Draws,
    household: torch.Tensor,
    week: torch.Tensor,
    log_price: torch.Tensor,
    history: torch.Tensor,
    baskets: torch.Tensor,
) -> torch.Tensor:
    """Probability of each next item given what is in the basket: (draws, cases, items).

    household, week: (cases,). baskets: (cases, longest), item numbers and then -1. The last item is
    checkout, if the draws have it.
    """
    out = []
    held = baskets >= 0
    row, place = torch.nonzero(held, as_tuple=True)
    for s in range(len(draws["intercept"])):
        u = {name: value[s] for name, value in draws.items()}
        utility = baseline(u, household, week, log_price, history)
        if "interaction" in u:
            table = torch.nn.functional.pad(u["attributes"][: log_price.shape[1]], (0, 0, 0, 1))
            mean = table[baskets].sum(1) / held.sum(1).clamp(min=1)[:, None]
            utility = utility + mean @ u["interaction"].T
        utility = utility.index_put((row, baskets[row, place]), utility.new_tensor(-torch.inf))
        out.append(utility.softmax(-1))
    return torch.stack(out)
