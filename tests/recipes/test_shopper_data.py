"""Shopper's data: the real trips, a table of one's own, what is wrong with a table."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from recipes.shopper import LARGEST_STORE, from_frame, load_trips


def frame(**changes):
    columns = {
        "household": ["a", "a", "a", "b"],
        "basket": [1, 1, 2, 3],
        "item": ["tea", "milk", "tea", "tea"],
        "week": [3, 3, 4, 5],
        "price": [2.0, 1.0, 2.5, 3.0],
    }
    return pd.DataFrame(columns | changes)


def test_real_data_are_those_of_the_protocol():
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


def test_a_table_of_purchases_becomes_trips():
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
def test_bad_tables_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        from_frame(frame(**changes))


def test_what_a_fitted_model_does_not_know_is_refused():
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


def test_one_store_has_the_prices_of_the_chain():
    trips = load_trips(items=50, store=LARGEST_STORE)
    assert len(trips.households) == int(trips.household.max()) + 1
    assert torch.equal(trips.price, load_trips(items=50).price)
    with pytest.raises(ValueError, match="no store 1"):
        load_trips(items=50, store=1)
