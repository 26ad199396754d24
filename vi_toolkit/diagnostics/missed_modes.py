"""Modes of the posterior that a fit does not cover, which its own draws cannot show."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from vi_toolkit.deterministic.modes import DENSE, Mode, find_modes
from vi_toolkit.programs.isolation import seeded_state
from vi_toolkit.programs.joint import Joint
from vi_toolkit.result import Fit

BARRIER = 5.0  # nats by which the density must fall between two points in different modes
SHARE = 0.05  # smallest share of the posterior's mass that is reported
POINTS = 60  # on the line between two points, where the density is evaluated


@dataclass(frozen=True)
class MissedMode:
    """A mode that holds mass and from which the guide draws nothing.

    Attributes:
        location: scalar name -> value on the unconstrained scale.
        share: this mode's share of the mass of itself and the fit, by Laplace's method.
        furthest: name of the scalar that is furthest from the guide's mean, in the guide's sds.
        distance: that distance, in the guide's sds.
    """

    location: dict[str, float]
    share: float
    furthest: str
    distance: float

    @property
    def meaning(self) -> str:
        """The result in one sentence."""
        return (
            f"another mode, at {self.furthest} = {self.location[self.furthest]:.3g} "
            f"({self.distance:.0f} sds of the guide away), has about {self.share:.0%} of the mass"
        )


def missed_modes(
    fit: Fit, log_mass: float | None = None, starts: int = 32, seed: int = 0
) -> list[MissedMode]:
    r"""Other modes that hold more than 5 % of the mass, the heaviest first.

    Importance weights of draws from the guide, or from around it, say nothing of places that no
    draw visits. This function therefore looks for modes of the log joint density from many starts
    (prior draws and wide boxes). A mode counts as missed if the density falls by more than 5 nats
    on the straight line to it from the nearest of the guide's better draws. Its mass is
    approximated by Laplace's method,

    .. math:: \log Z_j \approx \log p(x, u_j) + \tfrac d2 \log 2\pi - \tfrac12 \log \det \Lambda_j

    where :math:`\Lambda_j` is minus the Hessian there. An empty list proves nothing: the search may
    miss modes, and with more than 300 latents there is no search.

    Args:
        fit: a :class:`~vi_toolkit.Fit` without discrete latents.
        log_mass: log of the mass that the fit covers, in nats; its ELBO if None.
        starts: number of starts.
        seed: of the starts, which differ from those of the fit itself.

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
        # A draw in the tail may already be part of the way over a barrier.
        inside = draws[density >= density.nanmedian()]
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


def _behind_a_barrier(joint: Joint, mode: Mode, draws: torch.Tensor, tril: torch.Tensor) -> bool:
    distance = ((draws - mode.location) @ tril).norm(dim=-1)
    nearest = draws[distance.argmin()]
    t = torch.linspace(0, 1, POINTS, dtype=draws.dtype)[:, None]
    density = joint.log_densities(nearest + t * (mode.location - nearest))
    lowest = density.nan_to_num(nan=-math.inf).min()
    return bool(lowest < torch.minimum(density[0], density[-1]) - BARRIER)


def _describe(names: list[str], mode: Mode, draws: torch.Tensor, share: float) -> MissedMode:
    away = ((mode.location - draws.mean(0)) / draws.std(0)).abs()
    furthest = int(away.argmax())
    location = dict(zip(names, np.asarray(mode.location, dtype=float).tolist(), strict=True))
    return MissedMode(location, share, names[furthest], float(away[furthest]))
