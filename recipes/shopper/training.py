"""Fits of the whole model to many trips: minibatches, and steps that shrink to nothing."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.infer.autoguide import AutoNormal

import vi_toolkit as vi

from .data import Trips
from .guide import mean_field
from .model import model


class CosineAdam(torch.optim.Adam):
    """Adam whose step size stays for the first 40 % of the steps, then falls to zero by a cosine.

    How well a model of half a million parameters predicts depends on where its last steps end: it
    pays to anneal them to the number of steps that there is time for.
    """

    def __init__(self, params: Any, lr: float, steps: int):
        super().__init__(params, lr=lr, betas=(0.9, 0.99), fused=True)
        self.first, self.steps, self.taken = lr, steps, 0

    def step(self, closure: Any = None) -> Any:
        done = max(0.0, (self.taken / self.steps - 0.4) / 0.6)
        for group in self.param_groups:
            group["lr"] = self.first * (0.5 * (1 + math.cos(math.pi * min(done, 1.0))) + 1e-3)
        self.taken += 1
        return super().step(closure)


POSITIVE = ("price_effect", "price_sensitivity", "habit_rate")


def any_terms(**arguments: Any) -> Any:
    """`model`, with whichever terms. (A preflight holds `LATENTS`, the sites of `load_data()`,
    against the function that they stand beside.)"""
    return model(**arguments)


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
    """A fit of the model to these trips by so many minibatches of so many trips.

    steps: a mean-field fit to 63,000 trips predicts better with 1,500 than with 500. A point
    estimate of the same likelihood predicts worse with 1,500: it learns its trips by heart.
    options: of the model, see :func:`recipes.shopper.model`.

    >>> from recipes.shopper import LARGEST_STORE, load_trips
    >>> train, _, test = load_trips(items=50, store=LARGEST_STORE).split()
    >>> fit = fit_trips(train, steps=20, batch=200, size=5, progress=False)
    >>> fit.method, len(fit.elbo)
    ('stochastic', 20)
    """
    return vi.fit(
        any_terms,
        guide,
        train.arguments(**options),
        estimator=vi.Reparam(analytic_kl=isinstance(guide, AutoNormal)),
        optimizer=lambda params: CosineAdam(params, rate, steps),
        steps=steps,
        subsample={"trips": min(batch, len(train))},
        seed=seed,
        average=False,
        compile=False,
        progress=progress,
    )


def plug_in(fit: vi.Fit) -> dict[str, torch.Tensor]:
    """The mean of every latent under a mean-field fit, or the point of a point estimate, as one
    draw: {site: (1, ...)}.

    (Means, not medians: the mean of a LogNormal is larger, and a price term multiplies two.)
    """
    out = {}
    with fit.workspace.isolated(), torch.no_grad():
        for name, value in fit.guide.median().items():
            if name in POSITIVE and hasattr(fit.guide, "scales"):
                value = value * (getattr(fit.guide.scales, name).square() / 2).exp()
            out[name] = value.detach()[None]
    return out
