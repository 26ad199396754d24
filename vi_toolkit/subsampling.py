"""Minibatches of a plate, for models written with or without the plate's indices.

Two ways of writing a model are served alike:

* *indices*: ``with pyro.plate("observations", N) as i: ... X[i] ... obs=y[i]``. The plate hands
  out the minibatch's indices and scales by N/B itself.
* *slices*: ``with pyro.plate("observations", len(y)): ... obs=y``. The data tensors whose first
  dimension is the plate's are cut before the model sees them, and what the plate holds is scaled
  by N/B here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample


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
