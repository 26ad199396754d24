"""Shopper on its authors' own simulation: are the planted price effects recovered?

    VI_BENCH_DATA=path/to/folder python -m benchmarks.authors_simulation

Eight items, 250 households, 100,000 baskets (shopper_sim, from the repository of the authors of
"SHOPPER", 2020). Items 100 and 101 are bought by one half of the households and 200 and 201 by the
other; 300 and 301 go together, as do 400 and 401, and everybody takes one pair or the other: the
cheaper one. So a higher price of 301 takes 300 out of the basket, too: a cross effect that a model
that chooses one item after the other sees only if it thinks ahead.

Fitted with and without thinking ahead. Then baskets are drawn from the fit, for the trips of the
training and of the held-out sessions, and the shares of baskets that hold an item are compared
with those observed, by which of the four prices are high.
"""

import io
import os
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyro.poutine as poutine
import torch

from recipes.shopper import Trips, fit_trips, mean_field, model, plug_in, point
from recipes.shopper import evaluate as ev

PAIRS = (300, 301, 400, 401)


def read(name, columns):
    folder = Path(os.environ["VI_BENCH_DATA"]) / "shopper_sim"
    text = (folder / f"{name}.tsv").read_text().replace("\r", "\n")  # lines end in \r alone
    return pd.read_csv(io.StringIO(text), sep="\t", names=columns)


def load():
    """(training trips, test trips): sessions 1 to 400, and 401 to 430."""
    prices = read("item_sess_price", ["item", "session", "price"])
    price = prices.pivot(index="session", columns="item", values="price")

    def trips(name):
        rows = read(name, ["user", "item", "session", "quantity"])
        bought = pd.crosstab([rows["user"], rows["session"]], rows["item"]).clip(upper=1)
        held = bought.reindex(columns=price.columns, fill_value=0).to_numpy() > 0
        order = np.argsort(~held, axis=1, kind="stable")  # held items first, ascending
        baskets = np.where(np.arange(held.shape[1]) < held.sum(1)[:, None], order, -1)
        user, session = (bought.index.get_level_values(i).to_numpy() for i in (0, 1))
        return Trips(
            baskets=torch.tensor(baskets[:, : held.sum(1).max()]),
            household=torch.tensor(user - 1),
            week=torch.tensor(session - 1),
            price=torch.tensor(price.to_numpy(), dtype=torch.float32),
            items=price.columns.to_numpy(),
            households=np.arange(1, 251),
            weeks=price.index.to_numpy(),
            item_labels=[str(item) for item in price.columns],
            basket_ids=np.arange(len(bought)),
        )

    return trips("train"), trips("test")


def holds(baskets, items):
    """(trips, items): whether each basket holds each item."""
    out = torch.zeros(len(baskets), items + 1)
    return out.scatter_(1, torch.where(baskets < 0, items, baskets), 1.0)[:, :items].numpy()


def drawn(draws, trips, options):
    """Shares of baskets with each item, drawn from the model once per draw of the latents."""
    given = trips.arguments(**options) | {"baskets": None, "longest": 8}
    total = 0.0
    count = len(draws["intercept"])
    for s in range(count):
        u = {name: value[s] for name, value in draws.items()}
        torch.manual_seed(s)
        with torch.no_grad():
            total = total + holds(poutine.condition(model, data=u)(**given), len(trips.items))
    return total / count


def compare(name, observed, predicted, trips):
    """Shares by which of the four prices are high."""
    items = [list(trips.items).index(item) for item in PAIRS]
    high = (trips.price[trips.week][:, items] > 1).numpy()
    code = high @ (1 << np.arange(4))
    rows, weights = [], []
    for k in np.unique(code):
        here = code == k
        rows.append(observed[here][:, items].mean(0) - predicted[here][:, items].mean(0))
        weights.append(here.sum())
    error = np.sqrt(np.average(np.square(rows).mean(1), weights=weights))
    print(f"  {name}: root mean squared error of the shares {error:.3f}", end="")
    for mine, other, what in ((0, 0, "its own price"), (0, 1, "301's"), (0, 2, "400's")):
        shares = [
            table[high[:, other] == up][:, items[mine]].mean()
            for table in (observed, predicted)
            for up in (False, True)
        ]
        print(f"\n    300 with {what} low, high: observed {shares[0]:.2f}, {shares[1]:.2f}", end="")
        print(f"; predicted {shares[2]:.2f}, {shares[3]:.2f}", end="")
    print(flush=True)


def main():
    torch.set_num_threads(1)
    train, test = load()
    history = train.history()
    print(train)
    some = train.take(np.arange(0, len(train), 10))
    for label, guide in (("VI", mean_field), ("point", point)):
        for ahead in (True, False):
            began = time.process_time()
            options = {
                "terms": ("basket", "households", "prices"),
                "look_ahead": ahead,
                "size": 10,
                "price_prior": (2.0, 5.0),
            }
            fit = fit_trips(train, guide, steps=2_000, progress=False, **options)
            seconds = time.process_time() - began
            draws = plug_in(fit)
            score = ev.predictive_scores(draws, test, history, look_ahead=ahead)
            value, error = ev.mean_and_error(score, test)
            print(
                f"{label}, {'' if ahead else 'not '}thinking ahead: {seconds:.0f} CPU s, ELBO "
                f"{fit.elbo[-200:].mean():.0f}, {value:.4f} +- {error:.4f} nats per held-out item"
            )
            draws = fit.sample(5) if guide is mean_field else draws
            for name, trips in (("training sessions", some), ("held-out sessions", test)):
                observed = holds(trips.baskets, len(trips.items))
                compare(name, observed, drawn(draws, trips, options), trips)
            together, spread = ev.complements(fit.sample(200) if guide is mean_field else draws)
            pairs = [(0, 1), (2, 3), (4, 5), (6, 7), (0, 2), (4, 6), (5, 7)]
            print(
                "  complementarity: "
                + ", ".join(
                    f"{train.items[i]}-{train.items[j]} {together[i, j]:.2f} +- {spread[i, j]:.2f}"
                    for i, j in pairs
                )
            )


if __name__ == "__main__":
    main()
