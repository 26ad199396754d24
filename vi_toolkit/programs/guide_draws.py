"""Draws from a workspace's guide, with and without importance weights."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro.poutine as poutine
import torch

from vi_toolkit.programs.isolation import seeded_state
from vi_toolkit.programs.noise import FunctionalNoise
from vi_toolkit.programs.workspace import Draws, Workspace


def derived_seed(seed: int, purpose: int) -> int:
    """A seed for one purpose, independent of those for other purposes."""
    return int(np.random.SeedSequence([seed, purpose]).generate_state(1)[0])


def guide_draws(workspace: Workspace, num_draws: int, seed: int) -> Draws:
    """Draws of every latent that the guide samples: site -> (num_draws, *site shape)."""
    names = workspace.latents

    def one(_: torch.Tensor) -> Draws:
        with FunctionalNoise():
            trace = poutine.trace(workspace.guide).get_trace(**workspace.data)
        return {name: trace.nodes[name]["value"] for name in names}

    draws = workspace.many(one, torch.zeros(num_draws), random=True, seed=seed)
    return {k: workspace.to_user_dtype(v) for k, v in draws.items()}


def weighted_draws(workspace: Workspace, num_draws: int, seed: int) -> tuple[Draws, torch.Tensor]:
    """Draws from the guide and log p(x, z) - log q(z) of each, shape (num_draws,)."""
    workspace.require_guide_density("An importance weight")
    workspace.require_whole_plates()
    names = workspace.latents

    def one(_: torch.Tensor) -> tuple[Draws, torch.Tensor]:
        with FunctionalNoise():
            trace = poutine.trace(workspace.guide).get_trace(**workspace.data)
            model: Any = poutine.trace(poutine.replay(workspace.model, trace=trace))
            model_trace = model.get_trace(**workspace.data)
        values = {name: trace.nodes[name]["value"] for name in names}
        return values, model_trace.log_prob_sum() - trace.log_prob_sum()

    draws, weights = workspace.many(one, torch.zeros(num_draws), random=True, seed=seed)
    return {k: workspace.to_user_dtype(v) for k, v in draws.items()}, weights


def elbo_estimate(
    workspace: Workspace, num_draws: int, seed: int, estimator: Any = None
) -> tuple[float, float]:
    """The ELBO on all the data: (mean, standard error) in nats.

    Args:
        estimator: evaluates the ELBO if it sums latents out, which then have no draws to weigh.
    """
    if workspace.summed_out and estimator is not None:
        with workspace.isolated(seeded_state(seed)), torch.no_grad():
            losses = [
                estimator.loss(workspace.model, workspace.guide, **workspace.data)
                for _ in range(num_draws)
            ]
        values = -torch.tensor(losses, dtype=torch.float64)
    else:
        values = weighted_draws(workspace, num_draws, seed)[1].double()
    return float(values.mean()), float(values.std() / math.sqrt(num_draws))
