"""Data drawn from the model, with latents from their priors or with planted structure."""

from __future__ import annotations

from typing import Any

import pyro.poutine as poutine
import torch

from .data import SMALL
from .model import PAPER, model


def simulate(
    seed: int,
    trips: int = 400,
    households: int = 20,
    items: int = 12,
    weeks: int = 20,
    planted: bool = False,
    **options: Any,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Data drawn from the model: (its arguments, {site: true value}), in float64.

    planted: the items come in fours, A, A', B, B'. A and A' are exchangeable, and so are B and B'.
    A basket with one of the As wants a B and no second A, and the other way round. Prices matter
    twice as much for the first four items as for the others. `items` must be divisible by four.
    Without it, the latents are drawn from their priors.

    options: of the model. By default those of `load_data()`, or, if planted, the paper's terms with
    embeddings of `items` / 2 dimensions. The history counts the drawn trips; with habits, which
    need the history of earlier trips, it is zero.

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
        conditioned = poutine.condition(model, data=truth)
        nodes: Any = poutine.trace(conditioned).get_trace(**data, **options).nodes
    sites = {name: node["value"] for name, node in nodes.items() if _latent(node)}
    baskets = nodes["baskets"]["value"]
    data["baskets"] = baskets
    if "habit" not in options["terms"]:
        trip, place = torch.nonzero(baskets >= 0, as_tuple=True)
        one = torch.ones(len(trip)).double()
        where = data["household"][trip], baskets[trip, place]
        data["history"] = data["history"].index_put(where, one, accumulate=True)
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
