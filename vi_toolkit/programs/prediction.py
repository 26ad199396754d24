"""The model at posterior draws: predictions, and the log likelihood of each datum."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.distributions.util import scale_and_mask

from vi_toolkit.errors import PreflightError
from vi_toolkit.programs.noise import FunctionalNoise
from vi_toolkit.programs.sites import is_factor, is_plate, latent_sites, observed_sites, plates
from vi_toolkit.programs.workspace import Draws, Workspace, cast

# What a model that is given other data than it was written for may raise.
_FAILURES = (TypeError, KeyError, IndexError, ValueError, RuntimeError, AttributeError)


def row_latents(workspace: Workspace) -> list[str]:
    """Latents that every row of the observations has for itself.

    These are the latents inside all plates of an observed site (an overdispersion term per row,
    say). The effect of a group that has many rows stands in fewer plates, and is none of them.
    """
    trace = workspace.first_traces[1]
    around = [set(plates(site)) for site in observed_sites(trace).values()]
    return [
        name
        for name, site in latent_sites(trace).items()
        if any(rows and rows <= set(plates(site)) for rows in around)
    ]


def predictions(
    workspace: Workspace,
    draws: Draws,
    data: Mapping[str, Any] | None,
    redraw: Collection[str],
    seed: int,
) -> Draws:
    """Observed and deterministic sites drawn given posterior draws: site -> (S, *site shape).

    Args:
        draws: of the latents, shape (S, *site shape) each.
        data: arguments for the model at new inputs; the workspace's own if None.
        redraw: latents, or plates with all their latents, that the model draws anew.
        seed: of the draws.

    Raises:
        PreflightError: the model does not run on the new data.
        ValueError: it observes nothing.
    """
    inputs = workspace.data if data is None else cast(data, workspace.dtype)
    workspace.require_whole_plates()
    latents = latent_sites(workspace.first_traces[1])
    anew = {n for n, s in latents.items() if n in redraw or set(plates(s)) & set(redraw)}
    known = {name for site in latents.values() for name in plates(site)} | set(latents)
    if unknown := set(redraw) - known:
        raise ValueError(
            f"redraw names {sorted(unknown)[0]!r}, which is no latent and no plate of latents; "
            f"there are {', '.join(sorted(known))}"
        )

    def one(draw: Draws) -> Draws:
        kept = {name: value for name, value in draw.items() if name not in anew}
        conditioned = poutine.condition(poutine.uncondition(workspace.model), data=kept)
        with FunctionalNoise():
            trace: Any = poutine.trace(conditioned).get_trace(**inputs)
        return {
            name: site["value"]
            for name, site in trace.nodes.items()
            if site["type"] == "sample"
            and name not in latents
            and not (is_plate(site) or is_factor(site))
        }

    try:
        out = workspace.over_draws(one, draws, random=True, seed=seed)
    except _FAILURES as error:
        if data is None:
            raise
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise PreflightError(
            f"The model does not run on the new data: {reason}",
            remedy="It is called as model(**data), with the posterior's draws for its latents: "
            f"give what the fit was given ({', '.join(workspace.given_data)}), with as many "
            "columns and no group that the fit has not seen (or redraw=[the group's effects]); "
            "leave out or set to None what is observed.",
        ) from error
    if not out:
        raise ValueError(nothing_observed(workspace))
    return out


def pointwise_log_likelihood(workspace: Workspace, draws: Draws) -> Draws:
    """log p(datum | draw) in nats: observed site -> (S, *batch shape).

    It is 0 where ``poutine.mask`` hides an observation, and does not contain ``poutine.scale``:
    :func:`observation_weights` has both.

    Raises:
        ValueError: the model observes nothing, or a latent was summed out.
    """
    workspace.require_guide_density("The log likelihood")
    workspace.require_whole_plates()
    names = list(observed_sites(workspace.first_traces[1]))
    if not names:
        raise ValueError(nothing_observed(workspace))

    def one(draw: Draws) -> Draws:
        conditioned = poutine.condition(workspace.model, data=draw)
        trace: Any = poutine.trace(conditioned).get_trace(**workspace.data)
        sites = {name: trace.nodes[name] for name in names}
        return {
            name: scale_and_mask(s["fn"].log_prob(s["value"]), 1.0, s["mask"]).expand(
                s["fn"].batch_shape
            )
            for name, s in sites.items()
        }

    return workspace.over_draws(one, draws, random=False, seed=0)


def observation_weights(workspace: Workspace) -> Draws:
    """What each observation counts in the log density: observed site -> (*batch shape).

    1 as a rule, 0 where ``poutine.mask`` hides it, and the factor of ``poutine.scale``.
    """
    out = {}
    for name, site in observed_sites(workspace.model_trace).items():
        ones = torch.ones(site["fn"].batch_shape, dtype=workspace.dtype)
        out[name] = scale_and_mask(ones, site["scale"], site["mask"]).expand(ones.shape)
    return out


def nothing_observed(workspace: Workspace) -> str:
    """The sentence for a model without observed sites."""
    nodes = workspace.first_traces[1].nodes
    factors = [name for name, site in nodes.items() if is_factor(site)]
    through = f" Its likelihood is the factor {factors[0]!r}." if factors else ""
    return (
        "The model observes no site, so there is nothing to predict or to score."
        + through
        + " Write the likelihood as a distribution: pyro.sample(..., obs=y)."
    )
