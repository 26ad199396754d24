"""Trips: baskets with who bought them, when and at what prices; made from a table of purchases."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch

COLUMNS = ("household", "basket", "item", "week", "price")


@dataclass(frozen=True)
class Trips:
    """Baskets of distinct items, with who bought them, when, and at what prices.

    Attributes:
        baskets: (trips, longest) item numbers, in ascending order, then -1 to the end.
        household, week: (trips,) numbers of household and of week.
        price: (weeks, items) of every item in every week, positive.
        items, households, weeks: what the numbers stand for.
        item_labels: a name for each item, for plots.
        basket_ids: (trips,) the names of the baskets.

    The tensors are int64, except ``price``, which is float32.
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
        """Only the given trips; items, households, weeks and prices stay as they are."""
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
        """The model's arguments: baskets, prices and history of these trips, and the options.

        >>> from recipes.shopper import LARGEST_STORE, load_trips
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

        by: "random" for 80, 10 and 10 % of the trips, or "last weeks": then the trips of the
        `last` weeks are for testing, and 10 % of the others, chosen at random, for validation.

        Raises ValueError for any other `by`.

        >>> from recipes.shopper import LARGEST_STORE, load_trips
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
    """Trips from one table of purchases.

    Args:
        frame: one row per purchase, with the columns household, basket, item, week (a whole
            number) and price (of one unit, positive). An item that a basket holds twice counts
            once. An item's price in a week is the median over its rows of that week, or the median
            of its other weeks where there is no row; rows of dropped baskets count here too.
        items: keep this many items, those with the most rows; all of them if None.
        smallest: drop baskets with fewer distinct items. A basket of one item says nothing about
            what goes together, but it is a choice like any other.
        labels: item -> name for plots; the item itself if None.
        like: number items, households and weeks as these trips do, and take the prices from them,
            to score new baskets by a model fitted to `like`. `items` and `labels` are then ignored.

    Returns:
        Trips, sorted by the basket's name; the items most bought come first. With `like`, an item
        may be missing from the training part: its posterior is then the prior.

    Raises:
        ValueError: if a column or a value is missing, a week is not a whole number, a price is not
            positive, a basket has two households or two weeks, or no basket is left; with `like`,
            if an item, household or week is unknown there. The message names the first row or
            value.

    >>> frame = pd.DataFrame({"household": ["a", "a", "b"], "basket": [1, 1, 2], "week": [1, 1, 2],
    ...                       "item": ["tea", "milk", "tea"], "price": [2.0, 1.0, 2.5]})
    >>> from_frame(frame)
    Trips(2 baskets, 3 purchases of 2 items by 2 households, 2 weeks)
    """
    return from_checked_frame(_checked(frame), items, smallest, labels, like)


def from_checked_frame(
    frame: pd.DataFrame,
    items: int | None,
    smallest: int,
    labels: dict[Any, str] | None,
    like: Trips | None,
) -> Trips:
    """`from_frame` without its checks: some prices may be missing."""
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
    """The five columns; a ValueError names what is wrong with them."""
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
    """(weeks, items): median prices, and the median of the item's weeks where there is no row."""
    median = frame.groupby([frame["week"].to_numpy() - weeks[0], number])["price"].median()
    price = np.full((len(weeks), items), np.nan)
    price[median.index.get_level_values(0), median.index.get_level_values(1)] = median.to_numpy()
    return np.where(np.isnan(price), np.nanmedian(price, axis=0), price)


def _position(values: np.ndarray, among: np.ndarray) -> np.ndarray:
    place = {value: i for i, value in enumerate(among)}
    return np.array([place[value] for value in values], dtype=np.int64)
