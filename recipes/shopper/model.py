"""Shopper: sequential choices from a catalogue, by households with tastes, at prices."""

import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints

# "items" is the catalogue and, last, checkout; "vector", "prices" and "seasons" are the dimensions
# of the embeddings. These are the sites of `load_data()`, which has the price terms only; ALL_SITES
# are those of the whole model.
LATENTS = {
    "intercept": ("items",),
    "price_effect": ("items", "prices"),
    "price_sensitivity": ("households", "prices"),
}
ALL_SITES = LATENTS | {
    "attributes": ("items", "vector"),
    "interaction": ("items", "vector"),
    "preference": ("households", "vector"),
    "season_effect": ("items", "seasons"),
    "season": ("weeks", "seasons"),
    "habit_mean": (),
    "habit": ("items",),
    "habit_rate": ("items",),
    "loyalty": ("households",),
}
OF_ITEMS = tuple(name for name, dims in ALL_SITES.items() if dims[:1] == ("items",))
PAPER = ("basket", "households", "seasons", "prices")
TERMS = (*PAPER, "habit")
PRIOR_SD = {
    "intercept": 1.0,
    "attributes": 1.0,
    "interaction": 1.0,
    "preference": 1.0,
    "season_effect": 0.1,
    "season": 0.1,
    "habit": 0.3,
    "loyalty": 0.3,
}
HABIT_RATE_PRIOR = (2.0, 1.0)  # of its log
PRICE_PRIOR = (100.0, 1000.0)  # shape and rate
CACHED = 2**21  # utilities; more are computed in blocks of half as many, which stay in a cache
MOST_TRIPS = 2000  # at once
RARE = 1e-30  # a probability whose log is computed from the utilities, lest it be that of 0


def model(
    household,
    week,
    log_price,
    history,
    baskets=None,
    terms=PAPER,
    size=50,
    price_size=10,
    season_size=10,
    prior_sd=None,
    price_prior=PRICE_PRIOR,
    shuffle=True,
    rest=False,
    checkout=True,
    look_ahead=False,
    negatives=None,
    longest=30,
):
    """Household u buys in week w, one item after the other, and then checks out:

        psi_c = intercept_c + preference_u . attributes_c                        "households"
                - (price_sensitivity_u . price_effect_c) log_price_wc            "prices"
                + season_w . season_effect_c                                     "seasons"
                + (habit_c + loyalty_u) log(1 + habit_rate_c history_uc)        "habit", ours
        utility_c = psi_c + interaction_c . mean of the attributes in the basket "basket"
        next item ~ Categorical(softmax of the utilities of the items not yet in the basket)

    with Normal(0, prior_sd) priors, Gamma(*price_prior) for the two price terms, and a LogNormal
    habit_rate; the habits of all items share a mean. With
    `look_ahead` a shopper thinks one step ahead: utility_c also has the utility of the best item
    that could come after c.

    household, week: (trips,). log_price: (weeks, items). history: (households, items), how often
    each household bought each item, in these trips and others; the model takes one purchase of each
    of a trip's own items out of it again, or a basket would predict itself. baskets: (trips,
    longest) of item numbers, then -1; or None to draw them, of at most `longest` items.

    terms: which of the terms there are. size, price_size, season_size: dimensions of the
    embeddings. shuffle: a basket has no order, so that its probability is a sum over orders: each
    evaluation draws one at random, which bounds its log from below in expectation. False takes
    items as they come. rest: give every item all the others, instead of those before it: a
    pseudo-likelihood (Besag, "Statistical Analysis of Non-Lattice Data", 1975), of the very
    conditional probabilities by which predictions are judged, and without checkout. checkout: False
    leaves out leaving. negatives: None for the exact softmax, or a number of items, drawn at random
    and the same for all choices, for an unbiased estimate of the one-versus-each bound

        log p(c) >= sum over the other items c' of log sigmoid(utility_c - utility_c')

    (Titsias, "One-vs-Each Approximation to Softmax for Scalable Estimation of Probabilities",
    2016), for catalogues too large for the softmax. Returns the baskets.
    """
    unknown = set(terms) - set(TERMS)
    if unknown:
        raise ValueError(f"terms are {', '.join(TERMS)}; not {', '.join(sorted(unknown))}")
    sd = PRIOR_SD | (prior_sd or {})
    zero = log_price.new_zeros(())
    households, catalogue = history.shape

    def embedding(name, width):
        return pyro.sample(name, dist.Normal(zero, sd[name]).expand([width]).to_event(1))

    def positive(name):
        shape, rate = (zero + x for x in price_prior)
        return pyro.sample(name, dist.Gamma(shape, rate).expand([price_size]).to_event(1))

    u = {}
    if "habit" in terms:
        u["habit_mean"] = pyro.sample("habit_mean", dist.Normal(zero, 1.0))
    with pyro.plate("items", catalogue + checkout):
        u["intercept"] = pyro.sample("intercept", dist.Normal(zero, sd["intercept"]))
        if "households" in terms or "basket" in terms:
            u["attributes"] = embedding("attributes", size)
        if "basket" in terms:
            u["interaction"] = embedding("interaction", size)
        if "prices" in terms:
            u["price_effect"] = positive("price_effect")
        if "seasons" in terms:
            u["season_effect"] = embedding("season_effect", season_size)
        if "habit" in terms:
            u["habit"] = pyro.sample("habit", dist.Normal(u["habit_mean"], sd["habit"]))
            centre, spread = (zero + x for x in HABIT_RATE_PRIOR)
            u["habit_rate"] = pyro.sample("habit_rate", dist.LogNormal(centre, spread))
    with pyro.plate("households", households):
        if "households" in terms:
            u["preference"] = embedding("preference", size)
        if "prices" in terms:
            u["price_sensitivity"] = positive("price_sensitivity")
        if "habit" in terms:
            u["loyalty"] = pyro.sample("loyalty", dist.Normal(zero, sd["loyalty"]))
    if "seasons" in terms:
        with pyro.plate("weeks", len(log_price)):
            u["season"] = embedding("season", season_size)

    with pyro.plate("trips", len(household)):
        drawn = Baskets(
            u,
            household,
            week,
            log_price,
            history,
            longest=longest if baskets is None else baskets.shape[1],
            shuffle=shuffle,
            rest=rest,
            checkout=checkout,
            look_ahead=look_ahead,
            negatives=negatives,
        )
        return pyro.sample("baskets", drawn, obs=baskets)


def baseline(u, household, week, log_price, history, own=None):
    """psi: (trips, items [and checkout]), the utilities before anything is in the basket.

    u: one value of every latent. own: (trip, item) numbers of purchases in `history` that are not
    to count. Checkout has no price and no habit.
    """
    psi = u["intercept"].expand(len(household), -1)
    left, right = [], []
    if "preference" in u:
        left.append(u["preference"].index_select(0, household))
        right.append(u["attributes"])
    if "season" in u:
        left.append(u["season"].index_select(0, week))
        right.append(u["season_effect"])
    if left:
        psi = torch.addmm(psi, torch.cat(left, -1), torch.cat(right, -1).T)
    catalogue = log_price.shape[1]
    rest = 0.0
    if "price_sensitivity" in u:
        sensitivity = u["price_sensitivity"].index_select(0, household)
        rest = rest - (sensitivity @ u["price_effect"][:catalogue].T) * log_price[week]
    if "habit" in u:
        loyalty = u["loyalty"].index_select(0, household)
        seen = _others_of(history, household, own)
        rest = rest + (u["habit"][:catalogue] + loyalty[:, None]) * torch.log1p(
            u["habit_rate"][:catalogue] * seen
        )
    if torch.is_tensor(rest):
        psi = psi + torch.nn.functional.pad(rest, (0, psi.shape[1] - catalogue))
    return psi


def _others_of(history, household, own, out=None):
    """How often each of the households bought each item, without the purchases `own`."""
    seen = torch.index_select(history, 0, household, out=out)
    if own is not None:
        seen[own] = (seen[own] - 1).clamp_(min=0)
    return seen


def best_next(now, attributes, interaction, places, rows_at_once=8):
    """Utility of the best item after each: (rows, items), from `now`, that of each item next.

    now: (rows, items), where items that cannot come are -inf: psi_c' + interaction_c' . sum of the
    basket / (places + 1). places: (rows,), how many are in the basket. To it comes
    interaction_c' . attributes_c / (places + 1), and an item does not follow itself. The best is
    looked for without gradients, all pairs of items, and its utility taken with them.
    """
    pairs = attributes @ interaction.T  # (item, the one after it)
    after = torch.empty(now.shape, dtype=torch.long)
    with torch.no_grad():
        barred = pairs.clone()
        barred.fill_diagonal_(-torch.inf)
        for rows in torch.arange(len(now)).split(rows_at_once):
            table = torch.addcdiv(now[rows, None], barred, (places[rows] + 1.0)[:, None, None])
            after[rows] = table.argmax(-1)
    item = torch.arange(now.shape[1])
    return now.gather(1, after) + pairs[item, after] / (places + 1.0)[:, None]


def first_of_each(counts):
    """Where each block of so many entries begins: [2, 3, 1] -> [0, 2, 5]."""
    return counts.cumsum(0) - counts


def choice_log_prob(u, mean, trips, own, choices):
    """log softmax of psi + mean interaction' at each choice's item: (choices,).

    u: one value of every latent. mean: (choices, size), what each choice's basket holds so far, or
    None. trips: household, week, log_price and history, see `baseline`. own: (trip, item) numbers
    of purchases in `history` that are not to count, the trips ascending. choices: the trip of each,
    ascending, and its item; then pairs of a choice and an item that it cannot be, the choices
    ascending.

    Utilities that do not fit into the processor's cache are never written down: they are computed
    some trips at a time, and with them what the gradient needs of them.
    """
    trip, target, out_row, out_item = choices
    if len(trip) * len(u["intercept"]) > CACHED:
        values = {name: u[name] for name in CHOOSING if name in u}
        values |= {} if mean is None else {"mean": mean}
        return _TripsAtATime.apply((*trips, own, *choices), tuple(values), *values.values())
    utility = baseline(u, *trips, own)[trip]
    if mean is not None:
        utility = torch.addmm(utility, mean, u["interaction"].T)
    utility = utility.index_put((out_row, out_item), utility.new_tensor(-torch.inf))
    return utility.log_softmax(-1).gather(1, target[:, None])[:, 0]


CHOOSING = tuple(name for name in ALL_SITES if name != "habit_mean")  # what utilities depend on


class _TripsAtATime(torch.autograd.Function):
    """`choice_log_prob` and, at once, the gradient of the sum of its values. Choices of unequal
    weight go through it again."""

    @staticmethod
    def forward(ctx, data, names, *values):
        chosen, ctx.gradients = _choices_and_gradient(data, dict(zip(names, values, strict=True)))
        ctx.save_for_backward(*values)
        ctx.data, ctx.names = data, names
        return chosen

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        gradients, ctx.gradients = ctx.gradients, None  # used up
        if gradients is not None and (grad == grad[0]).all():
            factor = -float(grad[0])  # often 1
            return None, None, *(g if factor == 1.0 else g.mul_(factor) for g in gradients.values())
        u = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        return None, None, *_choices_and_gradient(ctx.data, u, -grad)[1].values()


def _choices_and_gradient(data, u, weight=None):
    """(choices,) and {name: gradient of minus their sum, so weighted}. The names are those of
    `baseline` and `choice_log_prob`, an `of_` before them the gradient with respect to them."""
    household, week, log_price, history, own, trip, target, out_row, out_item = data
    items, catalogue = len(u["intercept"]), log_price.shape[1]
    of = {name: torch.zeros_like(value) for name, value in u.items()}
    new = u["intercept"].new_empty
    chosen = new(len(target))
    log_price, history = log_price.to(chosen), history.to(chosen)

    pairs = [("preference", household, "attributes"), ("season", week, "season_effect")]
    pairs = [pair for pair in pairs if pair[0] in u]
    right = torch.cat([u[name] for _, _, name in pairs], 1) if pairs else None
    of_right = None if right is None else torch.zeros_like(right)
    effect, habit, rate = (
        u[name][:catalogue] if name in u else None
        for name in ("price_effect", "habit", "habit_rate")
    )

    at_once = max(1, CACHED // (2 * items) * len(household) // len(trip))  # trips
    edges = torch.arange(0, len(household) + at_once, at_once, device=trip.device)
    rows = torch.searchsorted(trip, edges)
    barred = torch.searchsorted(out_row, rows).tolist()
    out_place = out_row * items + out_item
    bought = None if own is None else torch.searchsorted(own[0].contiguous(), edges).tolist()
    longest = int(rows.diff().max())
    rows, edges = rows.tolist(), edges.tolist()
    # Memory is slow when it is new, so every block's matrices are where the last one's were.
    room, slope_room = new(2, longest, items)
    psi_room, of_psi_room = new(2, at_once, items)
    moved_room, seen_room, more_room, past_room, strength_room = new(5, at_once, catalogue)
    for k in range(len(edges) - 1):
        here, these = slice(edges[k], edges[k + 1]), slice(rows[k], rows[k + 1])
        of_household, of_week = household[here], week[here]
        n = len(of_household)
        psi = psi_room[:n].copy_(u["intercept"])
        if pairs:
            left = [u[name].index_select(0, index[here]) for name, index, _ in pairs]
            left = torch.cat(left, 1)
            psi.addmm_(left, right.T)
        if effect is not None:
            sensitivity = u["price_sensitivity"].index_select(0, of_household)
            moved = torch.index_select(log_price, 0, of_week, out=moved_room[:n])
            slope = torch.mm(sensitivity, effect.T, out=past_room[:n])
            psi[:, :catalogue].addcmul_(slope, moved, value=-1)
        if habit is not None:
            mine = None
            if own is not None:
                mine = slice(bought[k], bought[k + 1])
                mine = own[0][mine] - here.start, own[1][mine]
            seen = _others_of(history, of_household, mine, out=seen_room[:n])
            more = torch.mul(seen, rate, out=more_room[:n])
            past = torch.log1p(more, out=past_room[:n])
            loyalty = u["loyalty"].index_select(0, of_household)[:, None]
            strength = torch.add(habit, loyalty, out=strength_room[:n])
            psi[:, :catalogue].addcmul_(past, strength)

        local, picked = trip[these] - here.start, target[these, None]
        utility = torch.index_select(psi, 0, local, out=room[: len(local)])
        if "mean" in u:
            utility.addmm_(u["mean"][these], u["interaction"].T)
        out = out_place[barred[k] : barred[k + 1]] - these.start * items
        utility.view(-1).index_fill_(0, out, -torch.inf)
        slope = torch.softmax(utility, 1, out=slope_room[: len(local)])
        share = slope.gather(1, picked)
        torch.log(share[:, 0], out=chosen[these])
        rare = share[:, 0] < RARE
        if rare.any():
            few = utility[rare]
            chosen[these][rare] = few.gather(1, picked[rare])[:, 0] - few.logsumexp(1)
        # Softmax minus choice, the gradient of minus the log, and so weighted.
        slope.scatter_(1, picked, share - 1)
        if weight is not None:
            slope.mul_(weight[these, None])

        of_psi = of_psi_room[:n].zero_().index_add_(0, local, slope)
        if "mean" in u:
            torch.mm(slope, u["interaction"], out=of["mean"][these])
            of["interaction"].addmm_(slope.T, u["mean"][these])
        of["intercept"] += of_psi.sum(0)
        if pairs:
            of_right.addmm_(of_psi.T, left)
            of_left = (of_psi @ right).split([u[name].shape[1] for name, _, _ in pairs], 1)
            for (name, index, _), part in zip(pairs, of_left, strict=True):
                of[name].index_add_(0, index[here], part)
        of_psi = of_psi[:, :catalogue]
        if effect is not None:
            moved.mul_(of_psi)
            of["price_sensitivity"].index_add_(0, of_household, moved @ effect, alpha=-1)
            of["price_effect"][:catalogue].addmm_(moved.T, sensitivity, alpha=-1)
        if habit is not None:
            past.mul_(of_psi)
            of["habit"][:catalogue] += past.sum(0)
            of["loyalty"].index_add_(0, of_household, past.sum(1))
            of_rate = seen.mul_(of_psi).mul_(strength).div_(more.add_(1)).sum(0)
            of["habit_rate"][:catalogue] += of_rate
    if pairs:
        widths = [u[name].shape[1] for _, _, name in pairs]
        for (_, _, name), part in zip(pairs, of_right.split(widths, 1), strict=True):
            of[name] += part
    return chosen, of


class Baskets(dist.TorchDistribution):
    """The baskets of given trips, given all latents: batch shape (trips,), event shape (longest,).

    A value is item numbers in the order in which they were put into the basket, then -1.
    """

    arg_constraints = {}  # noqa: RUF012  (torch's own way)
    has_rsample = False

    def __init__(self, u, household, week, log_price, history, **options):
        self.u, self.household, self.week = u, household, week
        self.log_price, self.history, self.options = log_price, history, options
        self.items = log_price.shape[1]
        super().__init__((len(household),), (options["longest"],), validate_args=False)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self):
        return constraints.independent(constraints.integer_interval(-1, self.items - 1), 1)

    def expand(self, batch_shape, _instance=None):
        if tuple(batch_shape) != tuple(self.batch_shape):
            raise NotImplementedError("Baskets are those of given trips")
        return self

    def of_trips(self, trips):
        return self.household[trips], self.week[trips], self.log_price, self.history

    def psi(self, trips, own=None):
        return baseline(self.u, *self.of_trips(trips), own)

    def log_prob(self, value):
        rows = MOST_TRIPS
        parts = torch.arange(len(value)).split(rows)
        return torch.cat([self._log_prob(part, value[part]) for part in parts])

    def _log_prob(self, trips, baskets):
        o = self.options
        held = baskets >= 0
        sizes = held.sum(1)
        if o["rest"]:
            return self._each_given_the_rest(trips, baskets)
        others = None
        if o["negatives"] is not None:
            choices = self.items + o["checkout"]
            others = torch.randperm(choices, device=baskets.device)[: o["negatives"]]
        if o["shuffle"]:
            keys = torch.rand(baskets.shape, device=baskets.device).masked_fill(~held, 2.0)
            baskets = baskets.gather(1, keys.argsort(1))
        # One row per choice: those of a trip, in order, then its checkout.
        choices = sizes + 1 if o["checkout"] else sizes
        first = first_of_each(sizes)  # of each trip, among all purchases
        bought = baskets[held]
        trip = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), choices)
        place = torch.arange(len(trip), device=trip.device) - first_of_each(choices)[trip]
        begin = first[trip]
        leaving = place == sizes[trip]
        there = torch.nn.functional.pad(bought, (0, 1))  # (nothing at the last trip's checkout)
        target = torch.where(leaving, self.items, there[begin + place])
        # Pairs (row, item) that are out of the question: bought already, or leaving at once.
        barred = place.clamp(min=1) if o["checkout"] else place
        out_row = torch.repeat_interleave(torch.arange(len(trip), device=trip.device), barred)
        step = torch.arange(len(out_row), device=trip.device) - first_of_each(barred)[out_row]
        out_item = torch.where(place[out_row] == 0, self.items, there[begin[out_row] + step])

        mean = total = None
        if "interaction" in self.u:
            attributes = self.u["attributes"]
            nothing = torch.zeros_like(attributes[:1]).expand(len(trip), -1)
            total = nothing.index_add(0, out_row, attributes.index_select(0, out_item))
            total = total * (place > 0)[:, None]  # (checkout was not in the basket)
            mean = total / place.clamp(min=1)[:, None]
        own = held.nonzero()[:, 0], bought
        if others is not None:
            chosen = self._one_versus_each(
                others, trips, own, mean, trip, target, out_row, out_item
            )
            return chosen.new_zeros(len(sizes)).index_add(0, trip, chosen)
        if o["look_ahead"] and mean is not None:
            psi = self.psi(trips, own)
            utility = torch.addmm(psi[trip], mean, self.u["interaction"].T)
            now = torch.addmm(psi[trip], total / (place[:, None] + 1), self.u["interaction"].T)
            utility[out_row, out_item] = now[out_row, out_item] = -torch.inf
            ahead = best_next(now, self.u["attributes"], self.u["interaction"], place)
            utility = utility + self._until_checkout(ahead)
            chosen = utility.log_softmax(-1).gather(1, target[:, None])[:, 0]
        else:
            choices = trip, target, out_row, out_item
            chosen = choice_log_prob(self.u, mean, self.of_trips(trips), own, choices)
        return chosen.new_zeros(len(sizes)).index_add(0, trip, chosen)

    def _one_versus_each(self, others, trips, own, mean, trip, target, out_row, out_item):
        u, household, week = self.u, self.household[trips], self.week[trips]
        leave = len(u["intercept"]) - self.items
        log_price = torch.nn.functional.pad(self.log_price, (0, leave))
        history = torch.nn.functional.pad(self.history, (0, leave))
        column = torch.full((self.items + leave,), -1, device=trip.device)
        column[others] = torch.arange(len(others), device=trip.device)
        few = {k: v[others] if k in OF_ITEMS else v for k, v in u.items()}
        there = column[own[1]] >= 0
        own_there = own[0][there], column[own[1]][there]
        lp, past = log_price[:, others], history[:, others]
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
        scale = (self.items + leave) / len(others)  # one over the chance of being among them
        terms = torch.nn.functional.logsigmoid(chosen[:, None] - utility)
        return scale * terms.masked_fill(~allowed, 0.0).sum(1)

    def _each_given_the_rest(self, trips, baskets):
        held = baskets >= 0
        sizes, bought = held.sum(1), baskets[held]
        trip = held.nonzero()[:, 0]
        # All pairs of purchases of a trip: those of different items are out of the question.
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
        chosen = choice_log_prob(self.u, mean, self.of_trips(trips), (trip, bought), choices)
        return chosen.new_zeros(len(sizes)).index_add(0, trip, chosen)

    def _until_checkout(self, ahead):
        """Nothing comes after checkout."""
        return torch.nn.functional.pad(ahead[:, : self.items], (0, ahead.shape[1] - self.items))

    @torch.no_grad()
    def sample(self, sample_shape=()):
        if sample_shape:
            raise NotImplementedError("one set of baskets at a time")
        o, u = self.options, self.u
        trips = len(self.household)
        rows = torch.arange(trips)
        baskets = torch.full((trips, o["longest"]), -1)
        psi = self.psi(rows)
        out = torch.zeros(psi.shape, dtype=torch.bool)
        total = psi.new_zeros(trips, u["attributes"].shape[1]) if "interaction" in u else None
        there = torch.ones(trips, dtype=torch.bool)
        for place in range(o["longest"]):
            if o["checkout"]:
                out[:, self.items] = place == 0
            utility = psi
            if total is not None:
                utility = psi + total @ u["interaction"].T / max(place, 1)
            utility = utility.masked_fill(out, -torch.inf)
            if o["look_ahead"] and total is not None:
                now = psi + total @ u["interaction"].T / (place + 1)
                places = torch.full((trips,), place)
                now = now.masked_fill(out, -torch.inf)
                ahead = best_next(now, u["attributes"], u["interaction"], places)
                utility = utility + self._until_checkout(ahead)
            item = torch.distributions.Categorical(logits=utility).sample()
            there = there & (item < self.items)
            baskets[there, place] = item[there]
            out[rows[there], item[there]] = True
            if total is not None:
                total[there] += u["attributes"][item[there]]
        return baskets
