"""The model at posterior draws: predictions, and the log likelihood of each datum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro.poutine as poutine

from vi_toolkit.errors import PreflightError
from vi_toolkit.programs.noise import FunctionalNoise
from vi_toolkit.programs.sites import is_factor, is_plate, latent_sites, observed_sites
from vi_toolkit.programs.workspace import Draws, Workspace, cast

# What a model that is given other data than it was written for may raise.
_FAILURES = (TypeError, KeyError, IndexError, ValueError, RuntimeError, AttributeError)


def predictions(
    workspace: Workspace, draws: Draws, data: Mapping[str, Any] | None, seed: int
) -> Draws:
    """Observed and deterministic sites drawn given posterior draws: site -> (S, *site shape).

    Args:
        draws: of the latents, shape (S, *site shape) each.
        data: arguments for the model at new inputs; the workspace's own if None.
        seed: of the draws.

    Raises:
        PreflightError: the model does not run on the new data.
        ValueError: it observes nothing.
    """
    inputs = workspace.data if data is None else cast(data, workspace.dtype)
    workspace.require_whole_plates()
    latent = set(latent_sites(workspace.first_traces[1]))

    def one(draw: Draws) -> Draws:
        conditioned = poutine.condition(poutine.uncondition(workspace.model), data=draw)
        with FunctionalNoise():
            trace: Any = poutine.trace(conditioned).get_trace(**inputs)
        return {
            name: site["value"]
            for name, site in trace.nodes.items()
            if site["type"] == "sample"
            and name not in latent
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
            f"give what the fit was given ({', '.join(workspace.given_data)}), with as many columns "
            "and no group that the fit has not seen; leave out or set to None what is observed.",
        ) from error
    if not out:
        raise ValueError(nothing_observed(workspace))
    return out


def pointwise_log_likelihood(workspace: Workspace, draws: Draws) -> Draws:
    """log p(datum | draw) in nats: observed site -> (S, *batch shape).

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
            name: s["fn"].log_prob(s["value"]).expand(s["fn"].batch_shape)
            for name, s in sites.items()
        }

    return workspace.over_draws(one, draws, random=False, seed=0)


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
