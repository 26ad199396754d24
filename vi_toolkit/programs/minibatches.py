"""Minibatches of a plate, for models written with or without the plate's indices.

Two ways of writing a model are served alike:

* *indices*: ``with pyro.plate("observations", N) as i: ... X[i] ... obs=y[i]``. The plate hands
  out the minibatch's indices and scales by N/B itself.
* *slices*: ``with pyro.plate("observations", len(y)): ... obs=y``. The data tensors whose first
  dimension is the plate's are cut before the model sees them, and what the plate holds is scaled
  by N/B here.
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

# A plate of more than so many rows is large: checks and set-up run on a minibatch of it.
MANY_ROWS = 5_000
FAILURES = (RuntimeError, ValueError, IndexError, AssertionError)  # of a plan that is not the one


class Minibatches:
    """Indices of one epoch after the other, each in a new random order; the last may be short.

    The cost per step does not depend on ``size``: the order is drawn once per epoch.

    Args:
        size: number of data, N.
        batch: minibatch size, B.
        generator: source of the orders.
    """

    def __init__(self, size: int, batch: int, generator: torch.Generator):
        self.size, self.batch, self.generator = size, batch, generator
        self.order = torch.empty(0, dtype=torch.long)
        self.position = 0

    def next(self) -> torch.Tensor:
        """The next minibatch's indices."""
        if self.position >= len(self.order):
            self.order = torch.randperm(self.size, generator=self.generator)
            self.position = 0
        indices = self.order[self.position : self.position + self.batch]
        self.position += self.batch
        return indices

    @property
    def per_epoch(self) -> int:
        """Minibatches per epoch."""
        return -(-self.size // self.batch)

    @property
    def next_size(self) -> int:
        """Size of the next minibatch."""
        left = len(self.order) - self.position
        return min(self.batch, left if left > 0 else self.size)

    def several(self, most: int) -> torch.Tensor:
        """The next minibatches as far as they are of one size: shape (at most ``most``, size).

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
    """While active, the named plates hold a minibatch.

    Args:
        indices: plate name -> indices, for models that use the plate's indices.
        scales: plate name -> N/B, for models that are given cut data.
        rows: plate name -> (indices, N), for models that are given cut data: which data those are.
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
    """How one plate is subsampled: its sizes, and the data entries to cut (None: by indices)."""

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
        """Raises ValueError unless every site in the plate, in a trace of a minibatch with log
        densities, has an entry for each of its rows, scaled by N/B."""
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
        """The same for minibatches of another size."""
        return PlatePlan(self.name, self.size, batch, self.cut)


def plans(data: Mapping[str, Any], name: str, size: int, batch: int) -> Iterator[PlatePlan]:
    """The two ways in which a model may take minibatches of a plate."""
    yield PlatePlan(name, size, batch, None)
    rows = [k for k, v in data.items() if torch.is_tensor(v) and v.dim() and v.shape[0] == size]
    yield PlatePlan(name, size, batch, rows)


class _Entered(Exception):
    """Ends a run where it enters the plate."""

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
    """How the model takes minibatches of the plate named by `subsample`, if the plate is large.

    The model never runs on all rows for it. None if the plate has at most MANY_ROWS rows or four
    minibatches, or if the model does not run on a minibatch: whatever is wrong then shows, and is
    explained, on the whole data.
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
