"""Reference posteriors by NUTS: for `load_data()`, and for a small problem with embeddings.

Embeddings are not identified: a rotation of all of them changes nothing. So the second problem
compares what is invariant: the probabilities of choices and their elasticities in the price.
"""

import json
import math
from pathlib import Path

import pyro.poutine as poutine
import torch

import vi_toolkit as vi
from vi_toolkit.arviz_adapter import ess, rhat
from vi_toolkit.reference import nuts_draws

from .data import load_data
from .evaluate import choice_probabilities
from .fast import fast_model
from .model import model
from .simulation import simulate

EMBEDDED = Path(__file__).with_name("embedded_reference.json")
CASES = 40


def reference(chains=4, num_draws=2000, warmup=500, seed=0, progress=True):
    """vi.Reference for `load_data()`, as `python -m recipes reference shopper` writes it."""
    return vi.Reference.nuts(
        model,
        load_data(),
        chains=chains,
        num_draws=num_draws,
        warmup=warmup,
        seed=seed,
        progress=progress,
        command="python -m recipes reference shopper",
    )


def embedded_problem():
    """(data, new trips): 150 trips of 6 households to 4 items, with all terms, and 100 more trips.

    The items are two exchangeable pairs, as `simulate` plants them; embeddings have one dimension.
    """
    data, _ = simulate(3, trips=250, households=6, items=4, weeks=6, planted=True)
    data["size"] = 1
    of_trips = ("household", "week", "baskets")
    kept = data | {name: data[name][:150] for name in of_trips}
    return kept, data | {name: data[name][150:] for name in of_trips}


def functionals(draws, data, new):
    """Functions of the latents that rotations leave alone: {name: (draws, numbers)}.

    "log probability": of every next item, for households, weeks and first items of the new trips.
    "elasticity": the slope of that log probability in the log of the item's own price.
    """
    household, week = new["household"][:CASES], new["week"][:CASES]
    baskets = new["baskets"][:CASES].clone()
    baskets[:, 1:] = -1  # one item is there
    probability = choice_probabilities(
        draws, household, week, new["log_price"], new["history"], baskets
    )
    possible = probability[0] > 0
    items = data["log_price"].shape[1]
    slope = torch.einsum(
        "scp,sip->sci",
        draws["price_sensitivity"][:, household],
        draws["price_effect"][:, :items],
    )
    elasticity = -slope * (1 - probability[..., :items])
    return {
        "log probability": probability[:, possible].log(),
        "elasticity": elasticity[:, possible[:, :items]],
    }


def summary(draws, data, new):
    """{name: {"mean": [...], "sd": [...]}} of the functionals, and "held out".

    "held out" is the posterior predictive log probability of each new basket, in nats.
    """
    out = {
        name: {"mean": value.mean(0).tolist(), "sd": value.std(0).tolist()}
        for name, value in functionals(draws, data, new).items()
    }
    each = []
    for s in range(len(draws["intercept"])):
        u = {name: value[s] for name, value in draws.items()}
        trace = poutine.trace(poutine.condition(fast_model, data=u)).get_trace(**new)
        site = trace.nodes["baskets"]
        each.append(site["fn"].log_prob(site["value"]))
    scores = torch.stack(each).logsumexp(0) - math.log(len(each))
    out["held out"] = scores.tolist()
    return out


def embedded_reference(chains=4, num_draws=300, warmup=200, seed=0, progress=True):
    """Runs NUTS on `embedded_problem()` and writes embedded_reference.json."""
    data, new = embedded_problem()
    by_chain, made = nuts_draws(
        fast_model, data, chains, num_draws, warmup, seed, progress, full_mass=True, compile=True
    )
    flat = {name: value.flatten(0, 1) for name, value in by_chain.items()}
    out = summary(flat, data, new)
    for name, value in functionals(flat, data, new).items():
        chained = value.reshape(chains, -1, value.shape[1]).numpy()
        made[f"r_hat of {name}"] = float(rhat(chained).max())
        made[f"bulk ESS of {name}"] = float(ess(chained).min())
    EMBEDDED.write_text(json.dumps(out | {"made": made}, indent=1) + "\n", "utf-8")
    return out
