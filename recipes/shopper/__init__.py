"""Shopper: which items go into a basket, for whom, when, and at what prices.

    psi_c = intercept_c + preference_u . attributes_c + season_w . season_effect_c
            - (price_sensitivity_u . price_effect_c) log price_wc
    next item ~ softmax(psi_c + interaction_c . mean of the attributes in the basket)

until checkout. Ruiz, Athey and Blei, "SHOPPER: A Probabilistic Model of Consumer Choice with
Substitutes and Complements", Annals of Applied Statistics, 2020. The data are half a million
purchases of 1,000 products by 2,401 households, Complete Journey, see `recipes.shopper.data`;
`from_frame` takes your own. `model` is the model as the paper writes it; `fast_model` is the same
model with a faster density, for training.

>>> from recipes.shopper import LARGEST_STORE, fit_trips, load_trips, plug_in
>>> from recipes.shopper.evaluate import predictive_scores
>>> train, _, test = load_trips(items=50, store=LARGEST_STORE).split()
>>> fit = fit_trips(train, steps=100, batch=200, size=5, price_prior=(2.0, 5.0), progress=False)
>>> scores = predictive_scores(plug_in(fit), test, train.history())  # of items given the rest
>>> bool(scores.mean() > -3.4)        # nats; a guess among 50 items is -3.9
True
"""

from .data import LARGEST_STORE, coords, load_data, load_trips
from .fast import fast_model
from .guide import GUIDES, guide, mean_field, point
from .model import ALL_SITES, LATENTS, PAPER, TERMS, model
from .simulation import simulate
from .training import fit_trips, plug_in
from .trips import Trips, from_frame

__all__ = [
    "ALL_SITES",
    "GUIDES",
    "LARGEST_STORE",
    "LATENTS",
    "PAPER",
    "TERMS",
    "Trips",
    "coords",
    "fast_model",
    "fit_trips",
    "from_frame",
    "guide",
    "load_data",
    "load_trips",
    "mean_field",
    "model",
    "plug_in",
    "point",
    "simulate",
]
