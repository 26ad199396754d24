"""The density of `recipes.shopper.model`, evaluated for all choices at once: for training.

The model's own density walks through the places of all baskets, one after the other. This one lists
every choice of every trip, one row each, and computes all rows together; see
`recipes.shopper.choices` for how. Values and gradients are the same.
"""

import inspect

import torch
from pyro.poutine.messenger import Messenger
from torch.nn.functional import logsigmoid, pad

from .choices import baseline, best_next, choice_log_prob
from .model import ALL_SITES, Baskets, model

MOST_TRIPS = 2000  # at once
OF_ITEMS = tuple(name for name, dims in ALL_SITES.items() if dims[:1] == ("items",))


def fast_model(*args, **arguments):
    """`model` with a density that is fast enough for training: the same arguments and sites.

    >>> from recipes.shopper import load_data
    >>> fast_model(**load_data()).shape
    torch.Size([245, 3])
    """
    with _Fast():
        return model(*args, **arguments)


fast_model.__signature__ = inspect.signature(model)


class _Fast(Messenger):
    """Replaces the distribution of the baskets by its fast version."""

    def _pyro_sample(self, msg):
        slow = msg["fn"]
        if isinstance(slow, Baskets):
            of_trips = slow.household, slow.week, slow.log_price, slow.history
            msg["fn"] = FastBaskets(slow.u, *of_trips, slow.checkout, **slow.options)


class FastBaskets(Baskets):
    """`Baskets`, with all choices of many trips evaluated at once."""

    def log_prob(self, value):
        o = self.options
        if sum((o["rest"], o["look_ahead"], o["negatives"] is not None)) > 1:
            return super().log_prob(value)  # Nobody trains with two of these.
        score = self._each_given_the_rest if o["rest"] else self._one_after_the_other
        parts = torch.arange(len(value)).split(MOST_TRIPS)
        return torch.cat([score(part, value[part]) for part in parts])

    def _of_trips(self, trips):
        return self.household[trips], self.week[trips], self.log_price, self.history

    def _one_after_the_other(self, trips, baskets):
        o = self.options
        held = baskets >= 0
        sizes = held.sum(1)
        rivals = None
        if o["negatives"] is not None:
            choices = self.items + self.checkout
            rivals = torch.randperm(choices, device=baskets.device)[: o["negatives"]]
        if o["shuffle"]:
            keys = torch.rand(baskets.shape, device=baskets.device).masked_fill(~held, 2.0)
            baskets = baskets.gather(1, keys.argsort(1))
        # One row per choice: those of a trip, in order, then its checkout.
        choices = sizes + 1 if self.checkout else sizes
        first = first_of_each(sizes)  # of each trip, among all purchases
        bought = baskets[held]
        trip = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), choices)
        place = torch.arange(len(trip), device=trip.device) - first_of_each(choices)[trip]
        begin = first[trip]
        leaving = place == sizes[trip]
        padded = pad(bought, (0, 1))  # (the last trip's checkout has no purchase)
        target = torch.where(leaving, self.items, padded[begin + place])
        # Pairs (row, item) that are barred: items in the basket, and leaving at once.
        barred = place.clamp(min=1) if self.checkout else place
        out_row = torch.repeat_interleave(torch.arange(len(trip), device=trip.device), barred)
        step = torch.arange(len(out_row), device=trip.device) - first_of_each(barred)[out_row]
        out_item = torch.where(place[out_row] == 0, self.items, padded[begin[out_row] + step])

        mean = total = None
        if "interaction" in self.u:
            attributes = self.u["attributes"]
            nothing = torch.zeros_like(attributes[:1]).expand(len(trip), -1)
            total = nothing.index_add(0, out_row, attributes.index_select(0, out_item))
            total = total * (place > 0)[:, None]  # (checkout was not in the basket)
            mean = total / place.clamp(min=1)[:, None]
        own = held.nonzero()[:, 0], bought
        choices = trip, target, out_row, out_item
        if rivals is not None:
            chosen = self._one_versus_each(rivals, trips, own, mean, *choices)
        elif o["look_ahead"] and mean is not None:
            chosen = self._thinking_ahead(trips, own, mean, total, place, *choices)
        else:
            chosen = choice_log_prob(self.u, mean, self._of_trips(trips), own, choices)
        return chosen.new_zeros(len(sizes)).index_add(0, trip, chosen)

    def _thinking_ahead(self, trips, own, mean, total, place, trip, target, out_row, out_item):
        attributes, interaction = self.u["attributes"], self.u["interaction"]
        psi = baseline(self.u, *self._of_trips(trips), own)
        utility = torch.addmm(psi[trip], mean, interaction.T)
        now = torch.addmm(psi[trip], total / (place[:, None] + 1), interaction.T)
        utility[out_row, out_item] = now[out_row, out_item] = -torch.inf
        ahead = best_next(now, attributes, interaction, place)
        # Nothing comes after checkout.
        utility = utility + pad(ahead[:, : self.items], (0, ahead.shape[1] - self.items))
        return utility.log_softmax(-1).gather(1, target[:, None])[:, 0]

    def _one_versus_each(self, rivals, trips, own, mean, trip, target, out_row, out_item):
        u, household, week = self.u, self.household[trips], self.week[trips]
        leave = len(u["intercept"]) - self.items
        log_price, history = pad(self.log_price, (0, leave)), pad(self.history, (0, leave))
        column = torch.full((self.items + leave,), -1, device=trip.device)
        column[rivals] = torch.arange(len(rivals), device=trip.device)
        few = {k: v[rivals] if k in OF_ITEMS else v for k, v in u.items()}
        there = column[own[1]] >= 0
        own_there = own[0][there], column[own[1]][there]
        lp, past = log_price[:, rivals], history[:, rivals]
        utility = baseline(few, household, week, lp, past, own_there)[trip]
        # The chosen item's own utility, one row at a time.
        h, w = household[trip], week[trip]
        chosen = u["intercept"][target]
        if "preference" in u:
            chosen = chosen + (u["preference"][h] * u["attributes"][target]).sum(-1)
        if "season" in u:
            chosen = chosen + (u["season"][w] * u["season_effect"][target]).sum(-1)
        if "price_sensitivity" in u:
            slope = (u["price_sensitivity"][h] * u["price_effect"][target]).sum(-1)
            chosen = chosen - slope * log_price[w, target]
        if "habit" in u:
            past = torch.log1p(u["habit_rate"][target] * (history[h, target] - 1).clamp(min=0))
            leaving = target == self.items
            weight = (u["habit"][target] + u["loyalty"][h]).masked_fill(leaving, 0.0)
            chosen = chosen + weight * past
        if mean is not None:
            utility = torch.addmm(utility, mean, few["interaction"].T)
            chosen = chosen + (mean * u["interaction"][target]).sum(-1)
        allowed = torch.ones(utility.shape, dtype=torch.bool, device=trip.device)
        hit = column[out_item] >= 0
        allowed[out_row[hit], column[out_item][hit]] = False
        itself = (column[target] >= 0).nonzero()[:, 0]
        allowed[itself, column[target][itself]] = False
        scale = (self.items + leave) / len(rivals)  # one over the chance of being among them
        terms = logsigmoid(chosen[:, None] - utility)
        return scale * terms.masked_fill(~allowed, 0.0).sum(1)

    def _each_given_the_rest(self, trips, baskets):
        held = baskets >= 0
        sizes, bought = held.sum(1), baskets[held]
        trip = held.nonzero()[:, 0]
        # All pairs of purchases of a trip; a pair of different items is barred.
        row = torch.repeat_interleave(torch.arange(len(trip), device=trip.device), sizes[trip])
        first = first_of_each(sizes)[trip]
        step = torch.arange(len(row), device=row.device) - first_of_each(sizes[trip])[row]
        other = bought[first[row] + step]
        differ = other != bought[row]
        mean = None
        if "interaction" in self.u:
            attributes = self.u["attributes"].index_select(0, bought)
            sums = torch.zeros_like(attributes[:1]).expand(len(sizes), -1)
            total = sums.index_add(0, trip, attributes).index_select(0, trip) - attributes
            mean = total / (sizes[trip] - 1).clamp(min=1)[:, None]
        choices = trip, bought, row[differ], other[differ]
        chosen = choice_log_prob(self.u, mean, self._of_trips(trips), (trip, bought), choices)
        return chosen.new_zeros(len(sizes)).index_add(0, trip, chosen)


def first_of_each(counts):
    """Where each block of so many entries begins: [2, 3, 1] -> [0, 2, 5]."""
    return counts.cumsum(0) - counts
