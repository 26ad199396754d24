"""Shopper: which items go into a basket, by whom, when, and at what prices.

    psi_c = intercept_c + preference_u . attributes_c + season_w . season_effect_c
            - (price_sensitivity_u . price_effect_c) log price_wc
    next item ~ softmax(psi_c + interaction_c . mean of the attributes in the basket)

until checkout. Ruiz, Athey and Blei, "SHOPPER: A Probabilistic Model of Consumer Choice with
Substitutes and Complements", Annals of Applied Statistics, 2020. The data are half a million
purchases of 1,000 products by 2,401 households, Complete Journey, see `recipes.shopper.data`;
`from_frame` takes your own.

>>> import vi_toolkit as vi
>>> from recipes.shopper import guide, load_data, model
>>> fit = vi.fit(model, guide, load_data(), progress=False)
>>> draws = fit.sample(1000)
>>> slope = draws["price_effect"][:, :-1, 0] * draws["price_sensitivity"][:, :, 0].mean(1)[:, None]
>>> bool(slope.mean() > 0.5)        # a higher price, fewer purchases
True
"""

from .data import LARGEST_STORE, Trips, coords, from_frame, load_data, load_trips, simulate
from .guide import GUIDES, guide, mean_field, point
from .model import ALL_SITES, LATENTS, PAPER, TERMS, model

__all__ = [
    "ALL_SITES",
    "GUIDES",
    "LARGEST_STORE",
    "LATENTS",
    "PAPER",
    "TERMS",
    "Trips",
    "coords",
    "from_frame",
    "guide",
    "load_data",
    "load_trips",
    "mean_field",
    "model",
    "point",
    "simulate",
]
