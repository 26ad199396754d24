"""Shopper: sequential choices from a catalogue, by households with tastes, at prices.

Ruiz, Athey and Blei, "SHOPPER: A Probabilistic Model of Consumer Choice with Substitutes and
Complements", Annals of Applied Statistics, 2020.
"""

import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints
from torch.nn.functional import logsigmoid, pad

# "items" is the catalogue and, last, checkout; "vector", "prices" and "seasons" are the dimensions
# of the embeddings. LATENTS are the sites for `load_data()`, which has only the price terms;
# ALL_SITES are those of the whole model.
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
PAPER = ("basket", "households", "seasons", "prices")
TERMS = (*PAPER, "habit")
PRIOR_SD = {"intercept": 1.0, "attributes": 1.0, "interaction": 1.0, "preference": 1.0}
PRIOR_SD |= {"season_effect": 0.1, "season": 0.1, "habit": 0.3, "loyalty": 0.3}
PRICE_PRIOR = (100.0, 1000.0)  # shape and rate
HABIT_RATE_PRIOR = (2.0, 1.0)  # mean and sd of its log


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
                + (habit_c + loyalty_u) log(1 + habit_rate_c history_uc)         "habit", ours
        utility_c = psi_c + interaction_c . mean of the attributes in the basket "basket"
        next item ~ Categorical(softmax of the utilities of the items not yet in the basket)

    The priors are Normal(0, prior_sd), Gamma(*price_prior) for the two price terms and LogNormal
    for habit_rate; the habits of all items share a mean. A shopper who thinks one step ahead
    (`look_ahead`) adds to utility_c the utility of the best item that could come after c.

    household, week: (trips,). log_price: (weeks, items). history: (households, items), how often
    each household bought each item, in these trips and others; the model subtracts one purchase of
    each item that a trip holds, or a basket would predict itself. baskets: (trips, longest) item
    numbers, then -1; or None to draw them, of at most `longest` items.

    terms: which of the terms above to use. size, price_size, season_size: dimensions of the
    embeddings. shuffle: a basket has no order, so its probability is a sum over orders. Each
    evaluation draws one order at random, which bounds the log of the sum from below in expectation;
    False takes the items as they come. rest: condition every item on all the others instead of
    those before it, and leave out checkout: a pseudo-likelihood (Besag, "Statistical Analysis of
    Non-Lattice Data", 1975) made of the conditional probabilities by which predictions are judged.
    checkout: False leaves out checkout. negatives: None for the exact softmax, or a number of
    items, drawn at random and shared by all choices, for an unbiased estimate of the bound

        log p(c) >= sum over the other items c' of log sigmoid(utility_c - utility_c')

    (Titsias, "One-vs-Each Approximation to Softmax for Scalable Estimation of Probabilities",
    2016), for catalogues too large for the softmax. Returns the baskets.
    """
    unknown = set(terms) - set(TERMS)
    if unknown:
        raise ValueError(f"terms are {', '.join(TERMS)}; not {', '.join(sorted(unknown))}")
    checkout = checkout and not rest
    sd = PRIOR_SD | (prior_sd or {})
    zero = log_price.new_zeros(())
    households, catalogue = history.shape
    u = {}  # the latents

    def normal(name, width=None, mean=zero):
        prior = dist.Normal(mean, sd[name])
        u[name] = pyro.sample(name, prior if width is None else prior.expand([width]).to_event(1))

    def positive(name):
        shape, rate = (zero + x for x in price_prior)
        u[name] = pyro.sample(name, dist.Gamma(shape, rate).expand([price_size]).to_event(1))

    if "habit" in terms:
        u["habit_mean"] = pyro.sample("habit_mean", dist.Normal(zero, 1.0))
    with pyro.plate("items", catalogue + checkout):
        normal("intercept")
        if "households" in terms or "basket" in terms:
            normal("attributes", size)
        if "basket" in terms:
            normal("interaction", size)
        if "prices" in terms:
            positive("price_effect")
        if "seasons" in terms:
            normal("season_effect", season_size)
        if "habit" in terms:
            normal("habit", mean=u["habit_mean"])
            centre, spread = (zero + x for x in HABIT_RATE_PRIOR)
            u["habit_rate"] = pyro.sample("habit_rate", dist.LogNormal(centre, spread))
    with pyro.plate("households", households):
        if "households" in terms:
            normal("preference", size)
        if "prices" in terms:
            positive("price_sensitivity")
        if "habit" in terms:
            normal("loyalty")
    if "seasons" in terms:
        with pyro.plate("weeks", len(log_price)):
            normal("season", season_size)

    options = {"shuffle": shuffle, "rest": rest, "look_ahead": look_ahead, "negatives": negatives}
    options["longest"] = longest if baskets is None else baskets.shape[1]
    with pyro.plate("trips", len(household)):
        bought = Baskets(u, household, week, log_price, history, checkout, **options)
        return pyro.sample("baskets", bought, obs=baskets)


class Baskets(dist.TorchDistribution):
    """The baskets of given trips, given all latents: batch shape (trips,), event shape (longest,).

    A value is item numbers in the order in which they were put into the basket, then -1.
    """

    arg_constraints = {}  # noqa: RUF012  (torch's own way)

    def __init__(self, u, household, week, log_price, history, checkout, **options):
        self.u, self.household, self.week = u, household, week
        self.log_price, self.history, self.options = log_price, history, options
        self.checkout, self.items = checkout, log_price.shape[1]
        super().__init__((len(household),), (options["longest"],), validate_args=False)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self):
        return constraints.independent(constraints.integer_interval(-1, self.items - 1), 1)

    def expand(self, batch_shape, _instance=None):
        if tuple(batch_shape) != tuple(self.batch_shape):
            raise NotImplementedError("Baskets are those of given trips")
        return self

    def baseline(self, own=None):
        """psi, the utilities in an empty basket: (trips, items [and checkout]).

        own: (trips, items [and checkout]), purchases to subtract from the history.
        """
        u, household, week = self.u, self.household, self.week
        psi = u["intercept"].expand(len(household), -1)
        if "preference" in u:
            psi = psi + u["preference"][household] @ u["attributes"].T
        if "season" in u:
            psi = psi + u["season"][week] @ u["season_effect"].T
        if "price_sensitivity" in u:
            slope = u["price_sensitivity"][household] @ u["price_effect"].T
            psi = psi - slope * pad(self.log_price[week], (0, self.checkout))  # checkout: 0
        if "habit" in u:
            past = pad(self.history[household], (0, self.checkout))
            past = past if own is None else (past - own.to(past)).clamp(min=0)
            strength = u["habit"] + u["loyalty"][household][:, None]
            psi = psi + strength * torch.log1p(u["habit_rate"] * past)
        return psi

    def utilities(self, psi, basket):
        """Utility of each item as the next one, -inf if it cannot come: as psi.

        basket: (trips, any number) of items that are there, and -1.
        """
        held = contents(basket, psi.shape[1])
        number = held.sum(1, keepdim=True)
        barred = held.clone()
        if self.checkout:
            barred[:, self.items] |= number[:, 0] == 0  # nobody leaves with nothing
        if "interaction" not in self.u:
            return psi.masked_fill(barred, -torch.inf)
        attributes, interaction = self.u["attributes"], self.u["interaction"]
        total = held.to(psi) @ attributes
        utility = psi + total / number.clamp(min=1) @ interaction.T
        if self.options["look_ahead"]:
            now = (psi + total / (number + 1) @ interaction.T).masked_fill(barred, -torch.inf)
            after = now[:, None] + attributes @ interaction.T / (number + 1)[..., None]
            same = torch.eye(len(attributes), dtype=torch.bool, device=psi.device)
            best = after.masked_fill(same, -torch.inf).max(-1).values
            utility = utility + pad(best[:, : self.items], (0, self.checkout))  # checkout is last
        return utility.masked_fill(barred, -torch.inf)

    def log_prob(self, value):
        rivals = None
        if self.options["negatives"] is not None:
            choices = torch.randperm(self.items + self.checkout, device=value.device)
            rivals = choices[: self.options["negatives"]]
        held = value >= 0
        if self.options["shuffle"]:
            keys = torch.rand(value.shape, device=value.device).masked_fill(~held, 2.0)
            value = value.gather(1, keys.argsort(1))
        psi = self.baseline(contents(value, self.items + self.checkout))
        if self.checkout:
            value = pad(value, (0, 1), value=-1).scatter(1, held.sum(1, keepdim=True), self.items)
        log_prob = psi.new_zeros(len(value))
        for place, item in enumerate(value.unbind(1)):
            trip = (item >= 0).nonzero()[:, 0]  # those that still choose
            hidden = place if self.options["rest"] else slice(place, None)
            given = value[trip]
            given[:, hidden] = -1
            utility = self.utilities(psi[trip], given)
            log_prob = log_prob.index_add(0, trip, log_choice(utility, item[trip], rivals))
        return log_prob

    @torch.no_grad()
    def sample(self, sample_shape=()):
        if sample_shape:
            raise NotImplementedError("one set of baskets at a time")
        psi = self.baseline()
        baskets = self.household.new_full((len(psi), self.options["longest"]), -1)
        shopping = torch.ones_like(self.household, dtype=torch.bool)
        for place in range(baskets.shape[1]):
            item = dist.Categorical(logits=self.utilities(psi, baskets)).sample()
            shopping = shopping & (item < self.items)
            baskets[shopping, place] = item[shopping]
        return baskets


def contents(baskets, items):
    """Whether each basket holds each item: (trips, items)."""
    held = torch.zeros(len(baskets), items + 1, dtype=torch.bool, device=baskets.device)
    return held.scatter(1, baskets.where(baskets >= 0, items), True)[:, :items]


def log_choice(utility, item, rivals=None):
    """log softmax(utility) at the item, or an estimate of its one-versus-each bound.

    rivals: numbers of the items to compare it with, a random sample.
    """
    if rivals is None:
        return utility.log_softmax(-1).gather(1, item[:, None])[:, 0]
    margin = utility.gather(1, item[:, None]) - utility[:, rivals]
    each = logsigmoid(margin).masked_fill(rivals == item[:, None], 0.0)
    return utility.shape[1] / len(rivals) * each.sum(1)
