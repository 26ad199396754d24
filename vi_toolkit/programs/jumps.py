"""Jumps of a model's log density, which gradients along the guide's draws do not see."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro.poutine as poutine
import torch

from vi_toolkit.programs.isolation import seeded_state
from vi_toolkit.programs.joint import Joint
from vi_toolkit.programs.minibatches import PlatePlan
from vi_toolkit.programs.noise import FunctionalNoise
from vi_toolkit.programs.workspace import Draws, Workspace

PAIRS = 128  # of draws, between which jumps are looked for
LEAST_PAIRS = 16
HALVINGS = 24  # the last interval is 6e-8 of the first
LEAST_JUMP = 0.02  # nats
MOST_WORK = 5e8  # observations times evaluations of the density


@dataclass(frozen=True)
class Jump:
    """A place where a log density jumps.

    Attributes:
        site: the latent that moves across it.
        at: its value there (of the entry that moves most).
        nats: by how much the log density changes.
    """

    site: str
    at: float
    nats: float

    def __str__(self) -> str:
        return (
            f"The log density jumps by {abs(self.nats):.3g} nats where {self.site!r} passes "
            f"{self.at:.4g}, and reparameterised gradients do not see jumps: a fit by them is "
            f"wrong. Sum over {self.site!r}, or use "
            f"estimator=vi.Score(8, vi.LeaveOneOut(), sites=[{self.site!r}])."
        )


def jumps_of(workspace: Workspace, seed: int, plan: PlatePlan | None = None) -> list[Jump]:
    """The largest jump in each site, between draws of the guide; the largest first.

    Empty where the density is continuous, and where it cannot be looked at: latents are discrete
    or summed out, or there are too many data to look at them again.

    Args:
        workspace: with the guide fitted.
        seed: of the draws.
        plan: looks at the first minibatch only, instead of all rows.
    """
    if workspace.summed_out:
        return []
    data: Mapping[str, Any] = workspace.data
    handler: contextlib.AbstractContextManager = contextlib.nullcontext()
    if plan is not None:
        data, handler = plan.apply(workspace.data, torch.arange(plan.batch))

    def model(**arguments: Any) -> Any:
        with handler:
            return workspace.model(**arguments)

    def one(_: torch.Tensor) -> Draws:
        with FunctionalNoise(), handler:
            trace = poutine.trace(workspace.guide).get_trace(**data)
        return {name: trace.nodes[name]["value"] for name in workspace.latents}

    with workspace.isolated(seeded_state(seed)), torch.no_grad():
        try:
            joint = workspace.joint if plan is None else Joint(model, data)
        except (NotImplementedError, ValueError):  # not all latents are continuous
            return []
        draws = workspace.many(one, torch.zeros(2 * PAIRS), random=True, seed=seed)
        points = joint.flatten({name: draws[name] for name in joint.sites})
        return find_jumps(joint, points.to(joint.start.dtype))


def find_jumps(joint: Joint, draws: torch.Tensor) -> list[Jump]:
    """The largest jump in each site between pairs of these points (S, d), the largest first.

    Each segment between two points is halved again and again, and the half with the larger change
    of the log density is kept. If the density is continuous, however steep, the change goes to
    zero with the length of the interval; at a jump it stays.
    """
    work = max(joint.observations, 1) * HALVINGS
    pairs = min(PAIRS, len(draws) // 2, int(MOST_WORK // work))
    if pairs < LEAST_PAIRS or not joint.dim:
        return []
    low, high = draws[:pairs].clone(), draws[pairs : 2 * pairs].clone()
    at_low, at_high = joint.log_densities(low), joint.log_densities(high)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        at_middle = joint.log_densities(middle)
        left = (at_middle - at_low).abs() >= (at_high - at_middle).abs()
        low = torch.where(left[:, None], low, middle)
        high = torch.where(left[:, None], middle, high)
        at_low, at_high = (
            torch.where(left, at_low, at_middle),
            torch.where(left, at_middle, at_high),
        )
    change, size = (at_high - at_low).cpu(), at_low.abs().cpu()
    if not torch.equal(joint.log_densities(low).nan_to_num().cpu(), at_low.nan_to_num().cpu()):
        return []  # the model's density is itself a random number
    # What rounding leaves of a continuous density grows with the number of its terms.
    floor = LEAST_JUMP + 1e3 * torch.finfo(change.dtype).eps * size
    found: dict[str, Jump] = {}
    for k in (torch.isfinite(change) & (change.abs() > floor)).nonzero().flatten().tolist():
        name = _moving_site(joint, low[k], high[k])
        if name not in found or abs(found[name].nats) < abs(float(change[k])):
            found[name] = Jump(name, _where(joint, name, low[k], high[k]), float(change[k]))
    return sorted(found.values(), key=lambda jump: -abs(jump.nats))


def _moving_site(joint: Joint, low: torch.Tensor, high: torch.Tensor) -> str:
    """The site that takes the density across the jump when it alone moves from low to high."""
    names = list(joint.sites)
    points = low.repeat(len(names), 1)
    for row, name in zip(points, names, strict=True):
        row[joint.sites[name].slice] = high[joint.sites[name].slice]
    change = (joint.log_densities(points) - joint.log_densities(low[None])).abs()
    return names[int(change.cpu().nan_to_num(0, 0, 0).argmax())]


def _where(joint: Joint, name: str, low: torch.Tensor, high: torch.Tensor) -> float:
    """The site's value, on the model's scale, in the entry that moves most."""
    below, above = (joint.unflatten(u[None])[name].cpu().double().reshape(-1) for u in (low, high))
    entry = int((above - below).abs().argmax())
    return float(below[entry] + above[entry]) / 2
