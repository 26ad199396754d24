"""Modes of the posterior that a fit does not cover: what no weights of its own draws can show."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vi_toolkit.deterministic.modes import DENSE, Mode, find_modes
from vi_toolkit.programs.isolation import seeded_state

BARRIER = 5.0  # nats that the density must fall on the way there: else it is the same mode
SHARE = 0.05  # of the posterior's mass, from which a missed mode is worth a word
STEPS = 60  # points on the way


@dataclass(frozen=True)
class MissedMode:
    """A mode with mass, where the guide never goes.

    Attributes:
        location: scalar name -> value on the unconstrained scale.
        share: of the posterior mass of this mode and the fit together, by Laplace's method.
        furthest: the scalar that is furthest from the guide, in the guide's sds.
        distance: how far.
    """

    location: dict[str, float]
    share: float
    furthest: str
    distance: float

    @property
    def meaning(self) -> str:
        return (
            f"another mode, at {self.furthest} = {self.location[self.furthest]:.3g} "
            f"({self.distance:.0f} sds of the guide away), has about {self.share:.0%} of the mass"
        )


def missed_modes(
    fit: Any, log_mass: float | None = None, starts: int = 32, seed: int = 0
) -> list[MissedMode]:
    r"""Other modes that hold more than 5 % of the mass, the heaviest first.

    Importance weights of draws from the guide, or from around it, know nothing of a place where no
    draw falls. So modes of the log joint density are looked for from many starts (prior draws and
    wide boxes); one counts as missed if the density falls by more than 5 nats on the straight way
    from the nearest of the guide's better draws. Its mass is Laplace's,

    .. math:: \log Z_j \approx \log p(x, u_j) + \tfrac d2 \log 2\pi - \tfrac12 \log \det \Lambda_j

    with :math:`\Lambda_j` minus the Hessian there. Nothing is promised: a mode that no start
    reaches is not found, and beyond 300 latents none is looked for.

    Args:
        fit: a :class:`~vi_toolkit.Fit` without discrete latents.
        log_mass: log evidence of what the fit covers, in nats; its ELBO if None.
        starts: number of starts.
        seed: of the starts; others than those that the fit began with.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, vi_toolkit as vi
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(y):
        ...     z = pyro.sample("z", dist.Normal(0.0, 3.0))
        ...     pyro.sample("y", dist.Normal(z**2, 0.5), obs=y)
        >>> fit = vi.fit(model, AutoNormal, {"y": torch.tensor(9.0)}, progress=False)
        >>> [round(mode.share, 2) for mode in vi.missed_modes(fit)]
        [0.5]
    """
    joint = fit.joint
    if joint.dim > DENSE:
        return []
    draws = joint.flatten(fit.sample(2_000, seed=seed)).to(joint.start.dtype)
    if log_mass is None:
        log_mass = fit.elbo_estimate()[0]
    with fit.workspace.isolated(seeded_state(fit.derived_seed(seed, 5))):
        density = joint.log_densities(draws)
        inside = draws[density >= density.nanmedian()]  # a draw in the tail is half over a barrier
        modes = find_modes(joint, starts, seed + 1)
        found = []
        for mode in modes:
            tril, fault = torch.linalg.cholesky_ex(mode.precision)
            if not mode.converged or int(fault) or not _behind_a_barrier(joint, mode, inside, tril):
                continue
            log_det = 2 * float(tril.diagonal().log().sum())
            mass = mode.log_density + 0.5 * joint.dim * math.log(2 * math.pi) - 0.5 * log_det
            share = 1 / (1 + math.exp(min(log_mass - mass, 700.0)))
            if share > SHARE:
                found.append(_describe(joint.names, mode, draws, share))
    return sorted(found, key=lambda m: -m.share)


def _behind_a_barrier(joint: Any, mode: Mode, draws: torch.Tensor, tril: torch.Tensor) -> bool:
    distance = ((draws - mode.location) @ tril).norm(dim=-1)
    nearest = draws[distance.argmin()]
    t = torch.linspace(0, 1, STEPS, dtype=draws.dtype)[:, None]
    density = joint.log_densities(nearest + t * (mode.location - nearest))
    lowest = density.nan_to_num(nan=-math.inf).min()
    return bool(lowest < torch.minimum(density[0], density[-1]) - BARRIER)


def _describe(names: list[str], mode: Mode, draws: torch.Tensor, share: float) -> MissedMode:
    away = ((mode.location - draws.mean(0)) / draws.std(0)).abs()
    furthest = int(away.argmax())
    location = dict(zip(names, np.asarray(mode.location, dtype=float).tolist(), strict=True))
    return MissedMode(location, share, names[furthest], float(away[furthest]))
