"""Jumps of a log density, which gradients along a path do not see."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vi_toolkit.programs.joint import Joint

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
        low, high: its value just before and just after, the entry that moves most.
        nats: by how much the log density changes there.
        share: of the pairs of draws, how many have a jump between them.
    """

    site: str
    low: float
    high: float
    nats: float
    share: float

    def __str__(self) -> str:
        at = f"{(self.low + self.high) / 2:.4g}"
        return (
            f"The model's log density jumps by {abs(self.nats):.3g} nats where {self.site!r} passes "
            f"{at}. Gradients along the guide's draws do not see jumps, so that fits with them are "
            f"wrong. Sum over {self.site!r} (write the sum into the likelihood, or make the latent "
            f"discrete and use vi.Enumerate()), or use estimator=vi.Score(8, vi.LeaveOneOut(), "
            f"sites=[{self.site!r}])."
        )


def find_jump(joint: Joint, draws: torch.Tensor) -> Jump | None:
    """The largest jump between pairs of draws, or None if the log density is continuous there.

    Each segment between two draws is halved again and again, and the half with the larger change
    is kept. Across a continuous density, however steep, the change goes to zero with the length
    of the interval; across a jump it stays.

    Args:
        joint: the log density.
        draws: (S, d), unconstrained points where the density matters: draws from the guide.
    """
    work = max(joint.observations, 1) * 2 * HALVINGS
    pairs = min(PAIRS, len(draws) // 2, int(MOST_WORK // work))
    if pairs < LEAST_PAIRS:
        return None
    low, high = draws[:pairs].clone(), draws[pairs : 2 * pairs].clone()
    at_low, at_high = joint.log_densities(low), joint.log_densities(high)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        at_middle = joint.log_densities(middle)
        left = (at_middle - at_low).abs() >= (at_high - at_middle).abs()
        low, high = (
            torch.where(left[:, None], low, middle),
            torch.where(left[:, None], middle, high),
        )
        at_low, at_high = (
            torch.where(left, at_low, at_middle),
            torch.where(left, at_middle, at_high),
        )
    change = (at_high - at_low).nan_to_num(0, 0, 0)
    # What rounding leaves of a continuous density grows with its size.
    floor = LEAST_JUMP + 1e3 * torch.finfo(change.dtype).eps * at_low.abs().nan_to_num(0, 0, 0)
    jumps = change.abs() > floor
    if not bool(jumps.any()):
        return None
    k = int(change.abs().argmax())
    site = _moving_site(joint, low[k], high[k])
    below, above = (
        joint.unflatten(u[None])[site][0].double().reshape(-1) for u in (low[k], high[k])
    )
    part = joint.sites[site].slice
    entry = int((high[k, part] - low[k, part]).abs().argmax()) if part.stop > part.start else 0
    entry = entry if entry < len(below) else 0
    return Jump(
        site,
        float(below[entry]),
        float(above[entry]),
        float(change[k]),
        float(jumps.double().mean()),
    )


def _moving_site(joint: Joint, low: torch.Tensor, high: torch.Tensor) -> str:
    """The site that takes the density across the jump when it alone moves from low to high."""
    names = list(joint.sites)
    points = low.repeat(len(names), 1)
    for row, name in zip(points, names, strict=True):
        row[joint.sites[name].slice] = high[joint.sites[name].slice]
    change = (joint.log_densities(points) - joint.log_densities(low[None])).abs()
    return names[int(change.nan_to_num(0, 0, 0).argmax())]
