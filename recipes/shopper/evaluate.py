"""How well a model predicts one item of a basket from the rest, and what it is compared with.

Protocol: `train, validation, test = load_trips().split(by)`, by "random" or "last weeks". Fit on
the training trips and tune on the validation trips. For every item i of a test trip with basket y,
household u, week w: log p(i | y without i, u, w, prices of w), a distribution over the items that
are not in y without i. Checkout is not among them. The score is the mean over all test items, in
nats; its standard error comes from resampling trips.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from .data import Trips
from .model import PAPER, baseline, best_next

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
    must not look at the item itself. Any method can be scored that way.

    >>> from recipes.shopper import load_trips
    >>> trips = load_trips(items=50)
    >>> uniform = score_of(lambda trip, item: torch.zeros(len(trip), 50), trips)
    >>> round(float(uniform.max()), 2), round(float(uniform.mean()), 2)
    (-3.4, -3.88)
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
    terms: tuple[str, ...] = PAPER,
    smoothing: float = 100.0,
    look_ahead: bool = False,
) -> torch.Tensor:
    """Utilities of all items given the rest of the basket under one draw: (purchases, items).

    u: one value of every latent. trips: where household, week and prices are from. history: that of
    the training trips. trip, item: (purchases,), the purchases; item None means the whole basket.
    """
    del terms
    household, week = trips.household[trip], trips.week[trip]
    psi = baseline(u, household, week, trips.log_price, history, smoothing)
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
    smoothing: float = 100.0,
    look_ahead: bool = False,
) -> np.ndarray:
    """Posterior predictive log probability of every item: (purchases,), in nats.

    draws: {site: (S, ...)}; probabilities are averaged over the S draws. With S = 1 and the
    posterior's means it is the plug-in prediction.
    """
    each = []
    for s in range(len(next(iter(draws.values())))):
        u = {name: value[s] for name, value in draws.items()}

        def one(trip, item, u=u):
            options = {"smoothing": smoothing, "look_ahead": look_ahead}
            return utilities(u, trips, history, trip, item, **options)

        each.append(score_of(one, trips))
    return np.logaddexp.reduce(each, axis=0) - np.log(len(each))


def mean_and_error(
    scores: np.ndarray, trips: Trips, rows: np.ndarray | None = None, resamples: int = 200
) -> tuple[float, float]:
    """Mean over purchases and its bootstrap standard error over trips.

    scores: (purchases,) as above, or a difference of two, which is then paired. rows: a boolean
    mask, to score a slice.
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
