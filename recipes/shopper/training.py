"""Fits of the whole model to many trips, by minibatches and an annealed learning rate."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from pyro.infer.autoguide import AutoNormal
from torch.optim.lr_scheduler import LambdaLR

import vi_toolkit as vi

from .fast import fast_model
from .guide import mean_field
from .schedule import cosine
from .trips import Trips

POSITIVE = ("price_effect", "price_sensitivity", "habit_rate")


def fit_trips(
    train: Trips,
    guide: Any = mean_field,
    steps: int = 1500,
    batch: int = 1000,
    rate: float = 0.02,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> vi.Fit:
    """A fit of the model to these trips, in `steps` minibatches of `batch` trips.

    It evaluates the model's density by `recipes.shopper.fast`.

    steps: a mean-field fit to 63,000 trips predicts better after 1,500 steps than after 500. A
    point estimate of the same likelihood predicts worse after 1,500: it overfits.
    options: of the model, see :func:`recipes.shopper.model`.

    >>> from recipes.shopper import LARGEST_STORE, load_trips
    >>> train, _, test = load_trips(items=50, store=LARGEST_STORE).split()
    >>> fit = fit_trips(train, steps=20, batch=200, size=5, progress=False)
    >>> fit.method, len(fit.elbo)
    ('stochastic', 20)
    """
    return vi.fit(
        fast_model,
        guide,
        train.arguments(**options),
        estimator=vi.Reparam(analytic_kl=isinstance(guide, AutoNormal)),
        optimizer=partial(torch.optim.Adam, lr=rate, betas=(0.9, 0.99), fused=True),
        schedule=lambda optimizer: LambdaLR(optimizer, partial(cosine, steps=steps)),
        steps=steps,
        subsample={"trips": min(batch, len(train))},
        seed=seed,
        average=False,
        compile=False,
        progress=progress,
    )


def plug_in(fit: vi.Fit) -> dict[str, torch.Tensor]:
    """The mean of every latent under a mean-field fit, or the point of a point estimate.

    Returned as one draw: {site: (1, ...)}. (Means, not medians: a LogNormal's mean is the larger,
    and a price term multiplies two of them.)
    """
    out = {}
    with fit.workspace.isolated(), torch.no_grad():
        for name, value in fit.guide.median().items():
            if name in POSITIVE and hasattr(fit.guide, "scales"):
                value = value * (getattr(fit.guide.scales, name).square() / 2).exp()
            out[name] = value.detach()[None]
    return out
