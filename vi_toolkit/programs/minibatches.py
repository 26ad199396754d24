"""Minibatches of a plate, for models written with or without the plate's indices.

A model may be written in either of two ways:

* *with indices*: ``with pyro.plate("observations", N) as i: ... X[i] ... obs=y[i]``. The plate
  gives the model the minibatch's indices, and scales the sites in it by N/B.
* *with slices*: ``with pyro.plate("observations", len(y)): ... obs=y``. Data tensors whose first
  dimension is the plate's are cut to the minibatch before the model sees them, and the sites in
  the plate are scaled by N/B here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

# A plate with more rows than this is large: checks and set-up run on a minibatch of it.
MANY_ROWS = 5_000
# What a model may raise if it does not take minibatches in the way that is tried.
FAILURES = (RuntimeError, ValueError, IndexError, AssertionError)


class Minibatches:
    """Indices of minibatches, epoch after epoch, each epoch in a new random order.

    The last minibatch of an epoch may be short. A new order is drawn once per epoch, so the cost
    per step does not grow with ``size``.

    Args:
        size: number of data, N.
        batch: minibatch size, B.
        generator: draws the orders.
    """

    def __init__(self, size: int, batch: int, generator: torch.Generator):
        self.size, self.batch, self.generator = size, batch, generator
        self.order = torch.empty(0, dtype=torch.long)
        self.position = 0

    def next(self) -> torch.Tensor:
        """Indices of the next minibatch."""
        if self.position >= len(self.order):
            self.order = torch.randperm(self.size, generator=self.generator)
            self.position = 0
        indices = self.order[self.position : self.position + self.batch]
        self.position += self.batch
        return indices

    @property
    def per_epoch(self) -> int:
        """Number of minibatches per epoch."""
        return -(-self.size // self.batch)

    @property
    def next_size(self) -> int:
        """Size of the next minibatch."""
        left = len(self.order) - self.position
        return min(self.batch, left if left > 0 else self.size)

    def several(self, most: int) -> torch.Tensor:
        """Indices of the next minibatches, as many as have one size: (at most ``most``, size).

        Example:
            >>> batches = Minibatches(10, 4, torch.Generator().manual_seed(0))
            >>> [tuple(batches.several(5).shape) for _ in range(3)]
            [(2, 4), (1, 2), (2, 4)]
        """
        parts: list[torch.Tensor] = []
        missing = most
        while missing:
            if self.position >= len(self.order):
                self.order = torch.randperm(self.size, generator=self.generator)
                self.position = 0
            left = len(self.order) - self.position
            length = min(self.batch, left)
            if parts and parts[0].shape[1] != length:
                break
            count = min(missing, left // length)
            parts.append(self.order[self.position :][: count * length].view(count, length))
            self.position += count * length
            missing -= count
        return torch.cat(parts)

    def state(self) -> dict[str, Any]:
        return {
            "order": self.order,
            "position": self.position,
            "generator": self.generator.get_state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.order, self.position = state["order"], int(state["position"])
        self.generator.set_state(state["generator"])


class SubsamplePlates(Messenger):
    """Makes the named plates hold a minibatch while it is active.

    Args:
        indices: plate name -> indices, for models that use the plate's indices.
        scales: plate name -> N/B, for models that are given cut data.
        rows: plate name -> (indices of the cut data, N), for models that are given cut data.
    """

    def __init__(
        self,
        indices: Mapping[str, torch.Tensor],
        scales: Mapping[str, float],
        rows: Mapping[str, tuple[torch.Tensor, int]] | None = None,
    ):
        super().__init__()
        self.indices, self.scales, self.rows = indices, scales, rows or {}

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            if msg["name"] in self.indices:
                msg["value"] = self.indices[msg["name"]]
            return
        for frame in msg["cond_indep_stack"]:
            if frame.name in self.scales:
                msg["scale"] = msg["scale"] * self.scales[frame.name]
            if frame.name in self.rows:
                msg["infer"] = {**msg["infer"], "vi_rows": self.rows}


@dataclass
class PlatePlan:
    """How one plate is subsampled.

    Attributes:
        name: name of the plate.
        size: number of its rows, N.
        batch: minibatch size, B.
        cut: entries of the data that are cut to the minibatch; None if the model uses indices.
    """

    name: str
    size: int
    batch: int
    cut: list[str] | None

    def apply(
        self, data: Mapping[str, Any], indices: torch.Tensor
    ) -> tuple[dict[str, Any], SubsamplePlates]:
        """The data and the handler for one minibatch."""
        if self.cut is None:
            return dict(data), SubsamplePlates({self.name: indices}, {})
        cut = {k: v[indices] if k in self.cut else v for k, v in data.items()}
        rows = {self.name: (indices, self.size)}
        return cut, SubsamplePlates({}, {self.name: self.size / len(indices)}, rows)

    def check(self, trace: Any) -> None:
        """Check that every site in the plate has one entry per row, scaled by N/B.

        Args:
            trace: of a run on a minibatch, with log densities.

        Raises:
            ValueError: a site has other entries or another scale.
        """
        for name, site in trace.nodes.items():
            frames = [f for f in site.get("cond_indep_stack", ()) if f.name == self.name]
            if site["type"] != "sample" or not frames:
                continue
            expected = self.size / self.batch
            if not math.isclose(float(site["scale"]), expected, rel_tol=1e-6):
                raise ValueError(
                    f"site {name!r} is scaled by {float(site['scale'])}, not {expected}"
                )
            dim = frames[0].dim
            for shape in (site["fn"].batch_shape, site["log_prob"].shape):
                if len(shape) < -dim or shape[dim] not in (1, self.batch):
                    raise ValueError(f"site {name!r} has batch shape {tuple(shape)}")

    def with_batch(self, batch: int) -> PlatePlan:
        """The same plan with minibatches of another size."""
        return PlatePlan(self.name, self.size, batch, self.cut)


def plans(data: Mapping[str, Any], name: str, size: int, batch: int) -> Iterator[PlatePlan]:
    """The two ways in which a model may take minibatches of a plate."""
    yield PlatePlan(name, size, batch, None)
    rows = [k for k, v in data.items() if torch.is_tensor(v) and v.dim() and v.shape[0] == size]
    yield PlatePlan(name, size, batch, rows)


class _Entered(Exception):
    """Ends a run when it enters the plate."""

    def __init__(self, size: int):
        self.size = size


class _UntilEntered(Messenger):
    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["name"] == self.name:
            raise _Entered(int(msg["fn"].size))


def plan_of_large_plate(
    model: Callable[..., Any], data: Mapping[str, Any], subsample: Mapping[str, int] | None
) -> PlatePlan | None:
    """The plan for the plate that ``subsample`` names, if the plate is large; else None.

    Finding it never runs the model on all rows. A plate is large if it has more than ``MANY_ROWS``
    rows and more than four minibatches. The answer is also None if the model fails on a minibatch:
    a run on all the data then shows what is wrong.
    """
    if not subsample or len(subsample) > 1:
        return None
    ((name, batch),) = subsample.items()
    try:
        with _UntilEntered(name):
            model(**data)
    except _Entered as entered:
        size = entered.size
    except Exception:
        return None
    else:
        return None
    whole = isinstance(batch, int) and not isinstance(batch, bool)
    if not whole or batch < 1 or size <= max(MANY_ROWS, 4 * batch):
        return None
    for plan in plans(data, name, size, batch):
        rows, handler = plan.apply(data, torch.arange(batch))
        try:
            with torch.no_grad(), handler, pyro.validation_enabled(True):
                trace = poutine.trace(model).get_trace(**rows)
                trace.compute_log_prob()
            plan.check(trace)
        except FAILURES:
            continue
        return plan
    return None
