"""The state of several fits, stacked: what is done to one fit's tensors is done to all at once."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import torch

from vi_toolkit import torch_private
from vi_toolkit.compiled.loop_state import LoopState, StepsTaken


class SharedRows:
    """Lets corresponding tensors of several fits share memory, as the rows of one tensor.

    The fits' tensors stay the same objects, only their memory moves. So the fits' optimisers and
    parameter stores see every change.
    """

    def __init__(self) -> None:
        self._made: dict[Hashable, tuple[torch.Tensor, list[torch.Tensor], list[int]]] = {}

    def of(self, name: Hashable, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The tensor whose rows these are. They are copied into one if they are not yet, or are no
        longer, because something has replaced their memory."""
        found = self._made.get(name)
        if found is None or found[2] != [t.data_ptr() for t in tensors]:
            whole = torch.stack([t.detach() for t in tensors])
            for tensor, row in zip(tensors, whole.unbind(), strict=True):
                tensor.data = row
            found = whole, list(tensors), [t.data_ptr() for t in tensors]
            self._made[name] = found
        return found[0]

    def separate(self) -> None:
        """Give each tensor memory of its own again."""
        for _, tensors, _ in self._made.values():
            for tensor in tensors:
                tensor.data = tensor.data.clone()
        self._made.clear()


class StackedState:
    """The states of several fits of one kind. Every tensor has a new first dimension for the fits.

    Args:
        each: the fits' states; the loss depends on all of their leaves.
    """

    def __init__(self, each: Sequence[LoopState]):
        self.each, self.shared = list(each), SharedRows()
        self._stand_ins: torch.Tensor | None = None  # which fit moves in each row, if not its own

    def _parameters(self) -> list[list[torch.Tensor]]:
        """By group."""
        return [
            [self.shared.of(k, [one.leaves[k] for one in self.each]) for k in members]
            for members in self.each[0].members
        ]

    def _slots(self) -> list[list[torch.Tensor]]:
        """By group and slot."""
        return [
            [self._optimizer_state(k, slot) for k in members]
            for rule, members in zip(self.each[0].rules, self.each[0].members, strict=True)
            for slot in rule.slots
        ]

    def _optimizer_state(self, k: int, name: str) -> torch.Tensor:
        tensors = [one.optimizer.state[one.leaves[k]][name] for one in self.each]
        return self.shared.of((k, name), tensors)

    def _buffers(self) -> list[torch.Tensor]:
        return [
            self.shared.of(("buffer", j), [one.buffers[j] for one in self.each])
            for j in range(len(self.each[0].buffers))
        ]

    @staticmethod
    def join(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """:meth:`LoopState.join` for each fit."""
        if len(tensors) == 1 and tensors[0].dim() > 2:
            return tensors[0]
        return torch.cat([t.reshape(len(t), -1) for t in tensors], 1)

    def split(self, joined: torch.Tensor, members: Sequence[int]) -> list[torch.Tensor]:
        """The inverse of :meth:`join`."""
        fits = len(joined)
        shapes = [self.each[0].leaves[k].shape for k in members]
        pieces = joined.reshape(fits, -1).split([shape.numel() for shape in shapes], 1)
        return [p.reshape(fits, *shape) for p, shape in zip(pieces, shapes, strict=True)]

    def carried(self, sums: list[torch.Tensor] | None, elbo: torch.Tensor) -> list[torch.Tensor]:
        """:meth:`LoopState.carried` for each fit.

        With ``sums``, the rows of finished fits hold the state of their stand-ins, see
        :meth:`sums`.
        """
        with torch.no_grad():
            theta = [self.join(members) for members in self._parameters()]
            slots = [self.join(members) for members in self._slots()]
            buffers = self._buffers()
            if sums is not None and self._stand_ins is not None:
                theta, slots, buffers = (
                    [t.index_select(0, self._stand_ins) for t in ts]
                    for ts in (theta, slots, buffers)
                )
        sums = sums or [torch.zeros_like(t) for t in theta]
        return [*theta, *slots, *sums, elbo.repeat(len(self.each), 1), *buffers]

    def sums(self, iterate_sums: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        """Stack the fits' sums of iterates, which are flat, and split them by group.

        Finished fits have no entry (None). In each one's row a fit that is still running stands in.
        Otherwise a step of the finished fit that is not finite would end the call for all fits.
        """
        one = self.each[0]
        first = next(k for k, s in enumerate(iterate_sums) if s is not None)
        moving = [first if s is None else k for k, s in enumerate(iterate_sums)]
        whole = torch.stack([iterate_sums[k] for k in moving])  # type: ignore[misc]
        all_move = moving == list(range(len(moving)))
        self._stand_ins = None if all_move else torch.tensor(moving, device=whole.device)
        pieces = self.split(whole, range(len(one.leaves)))
        return [self.join([pieces[k] for k in members]) for members in one.members]

    def coefficients(self, steps: int) -> np.ndarray:
        """:meth:`LoopState.coefficients` of all fits, shape (steps, fits, coefficients)."""
        known: dict[Hashable, np.ndarray] = {}
        tables = []
        for one in self.each:
            key = one.rates_and_counts()
            if key not in known:
                known[key] = one.coefficients(steps)
            tables.append(known[key])
        return np.stack(tables, 1)

    def commit(
        self,
        done: int,
        out: Sequence[torch.Tensor],
        iterate_sums: Sequence[torch.Tensor | None],
    ) -> list[StepsTaken | None]:
        """:meth:`LoopState.commit` for the fits that have a sum; the finished fits stay."""
        one, given = self.each[0], iter(out)
        running = [k for k, s in enumerate(iterate_sums) if s is not None]
        theta = [piece for m in one.members for piece in self.split(next(given), m)]
        slots = [
            piece
            for rule, members in zip(one.rules, one.members, strict=True)
            for _ in rule.slots
            for piece in self.split(next(given), members)
        ]
        sums: dict[int, torch.Tensor] = {}
        for members in one.members:
            sums.update(zip(members, self.split(next(given), members), strict=True))
        elbo = next(given)[:, :done].tolist()
        targets = [t for group in (*self._parameters(), *self._slots()) for t in group]
        targets += self._buffers()
        counters = [
            self._optimizer_state(k, "step")
            for rule, members in zip(one.rules, one.members, strict=True)
            if rule.counted
            for k in members
        ]
        with torch.no_grad():
            values = [*theta, *slots, *given]
            steps = torch.zeros(len(self.each))
            steps[running] = float(done)
            if len(running) < len(self.each):
                moved = (steps > 0).to(theta[0].device)
                values = [
                    torch.where(moved.view(-1, *[1] * (old.dim() - 1)), new, old)
                    for new, old in zip(values, targets, strict=True)
                ]
            torch_private.foreach_copy_(targets, values)
            for counter in counters:
                counter += steps.to(counter.device)
            rows = torch.cat([sums[k].reshape(len(self.each), -1) for k in sorted(sums)], 1)
        results: list[StepsTaken | None] = [None] * len(self.each)
        for k in running:
            results[k] = StepsTaken(elbo[k], rows[k])
        return results
