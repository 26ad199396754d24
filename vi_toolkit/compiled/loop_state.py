"""Where a fit keeps what its steps change, and how that goes into a compiled loop and back."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vi_toolkit.compiled.tracing import Traced
from vi_toolkit.compiled.updates import hyperparameters, rule_for
from vi_toolkit.errors import CompileError

LARGE = 2**12  # numbers from which a parameter with more than one dimension keeps its shape


@dataclass
class Block:
    """What a call brought: the ELBO of each step and the sum of the iterates, flat."""

    elbo: list[float]
    total: torch.Tensor


class LoopState:
    """The parameters, optimiser slots and buffers of one fit.

    Args:
        leaves: the unconstrained parameters.
        optimizer: one of those in :mod:`vi_toolkit.compiled.updates`; it must have taken a step.
        traced: the step; parameters that its loss does not depend on stay as they are.
        buffers: tensors that a step changes in place.

    Raises:
        CompileError: the optimiser's step cannot be compiled.
    """

    def __init__(
        self,
        leaves: Sequence[torch.Tensor],
        optimizer: torch.optim.Optimizer,
        traced: Traced,
        buffers: Sequence[torch.Tensor],
    ):
        self.leaves, self.optimizer, self.buffers = list(leaves), optimizer, list(buffers)
        # Parameters by group of the optimiser, the small ones of a group as one vector.
        self.hyperparameters = [hyperparameters(g) for g in optimizer.param_groups]
        self.rules, self.groups, self.members = [], [], []
        position = {id(p): k for k, p in enumerate(leaves)}
        for group in optimizer.param_groups:
            live = [position[id(p)] for p in group["params"] if position[id(p)] in traced.live]
            alone = [k for k in live if leaves[k].dim() > 1 and leaves[k].numel() >= LARGE]
            small = [k for k in live if k not in alone]
            for members in [small] * bool(small) + [[k] for k in alone]:
                self.rules.append(rule_for(optimizer, group))
                self.groups.append(group)
                self.members.append(members)
        if sum(map(len, self.members)) < len(traced.live):
            raise CompileError("the optimiser does not have all of the parameters")
        for rule, members in zip(self.rules, self.members, strict=True):
            counts = {float(optimizer.state[leaves[k]].get("step", 0.0)) for k in members}
            missing = any(
                optimizer.state[leaves[k]].get(slot) is None for k in members for slot in rule.slots
            )
            if missing or len(counts) > 1:
                raise CompileError("the parameters have not all taken the same number of steps")

    @staticmethod
    def joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Those of a group as one vector, or a single one as it is: over its own shape a compiled
        loop has no need of divisions to find out where it is."""
        if len(tensors) == 1 and tensors[0].dim() > 1:
            return tensors[0]
        return torch.cat([t.reshape(-1) for t in tensors])

    def apart(self, vector: torch.Tensor, members: Sequence[int]) -> list[torch.Tensor]:
        """The opposite of :meth:`joined`."""
        shapes = [self.leaves[k].shape for k in members]
        pieces = vector.reshape(-1).split([shape.numel() for shape in shapes])
        return [p.view(shape) for p, shape in zip(pieces, shapes, strict=True)]

    def carried(self, totals: list[torch.Tensor] | None, elbo: torch.Tensor) -> list[torch.Tensor]:
        """Parameters, optimiser slots and sums by group, the ELBO's history, buffers."""
        leaves, state = self.leaves, self.optimizer.state
        with torch.no_grad():
            theta = [self.joined([leaves[k].detach() for k in m]) for m in self.members]
            slots = [
                self.joined([state[leaves[k]][slot] for k in members])
                for rule, members in zip(self.rules, self.members, strict=True)
                for slot in rule.slots
            ]
        sums = totals or [torch.zeros_like(t) for t in theta]
        return [*theta, *slots, *sums, elbo, *self.buffers]

    def outdated(self) -> bool:
        """Whether a hyperparameter that is written into the program has changed."""
        return self.hyperparameters != [hyperparameters(g) for g in self.optimizer.param_groups]

    def totals(self, total: torch.Tensor) -> list[torch.Tensor]:
        """A sum of iterates over all leaves, flat, by group."""
        with torch.no_grad():
            pieces = total.split([p.numel() for p in self.leaves])
            shaped = [p.view(leaf.shape) for p, leaf in zip(pieces, self.leaves, strict=True)]
            return [self.joined([shaped[k] for k in m]) for m in self.members]

    def taken(self) -> tuple[tuple[float, float], ...]:
        """Learning rate of each group and the steps that it has taken."""
        first = [self.leaves[members[0]] for members in self.members]
        return tuple(
            (float(group["lr"]), float(self.optimizer.state[leaf].get("step", 0.0)))
            for group, leaf in zip(self.groups, first, strict=True)
        )

    def coefficients(self, steps: int) -> np.ndarray:
        """Those of the next steps: (steps, coefficients of all groups)."""
        columns = []
        for rule, (rate, taken) in zip(self.rules, self.taken(), strict=True):
            number = taken + np.arange(1.0, steps + 1)
            columns += [np.broadcast_to(c, steps) for c in rule.coefficients(rate, number)]
        return np.stack(columns, 1)

    def commit(self, done: int, out: Sequence[torch.Tensor], total: torch.Tensor) -> Block:
        """Write what a call returned to where eager steps keep it."""
        state, leaves = self.optimizer.state, self.leaves
        given = iter(out)
        into: list[torch.Tensor] = []
        values: list[torch.Tensor] = []

        for members in self.members:
            into += [leaves[k] for k in members]
            values += self.apart(next(given), members)
        for rule, members in zip(self.rules, self.members, strict=True):
            for slot in rule.slots:
                into += [state[leaves[k]][slot] for k in members]
                values += self.apart(next(given), members)
        totals = [next(given) for _ in self.rules]
        elbo = next(given)[:done].tolist()
        into += self.buffers
        values += given
        counters = [
            state[leaves[k]]["step"]
            for rule, members in zip(self.rules, self.members, strict=True)
            if rule.counted
            for k in members
        ]
        with torch.no_grad():
            torch._foreach_copy_(into, values)
            if counters:
                torch._foreach_add_(counters, float(done))
            if self.members == [list(range(len(leaves)))]:
                return Block(elbo, totals[0].reshape(-1))
            before = total.split([p.numel() for p in leaves])
            sums = [b + done * p.reshape(-1) for b, p in zip(before, leaves, strict=True)]
            for members, group_total in zip(self.members, totals, strict=True):
                for k, piece in zip(members, self.apart(group_total, members), strict=True):
                    sums[k] = piece.reshape(-1)
            return Block(elbo, torch.cat(sums))


class SharedRows:
    """Tensors of several fits as the rows of one, so that what is done to all is done once.

    They stay the same objects for those who hold them; only their memory is elsewhere.
    """

    def __init__(self) -> None:
        self._made: dict[Hashable, tuple[torch.Tensor, list[torch.Tensor], list[int]]] = {}

    def of(self, name: Hashable, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The tensor whose rows these are; they are copied there if they are not, or no longer."""
        found = self._made.get(name)
        if found is None or found[2] != [t.data_ptr() for t in tensors]:
            whole = torch.stack([t.detach() for t in tensors])
            for tensor, row in zip(tensors, whole.unbind(), strict=True):
                tensor.data = row
            found = whole, list(tensors), [t.data_ptr() for t in tensors]
            self._made[name] = found
        return found[0]

    def part(self) -> None:
        """Give each tensor memory of its own again."""
        for _, tensors, _ in self._made.values():
            for tensor in tensors:
                tensor.data = tensor.data.clone()
        self._made.clear()


class StackedState:
    """Those of several fits of one kind: every tensor has one more dimension, in front.

    Args:
        each: with all parameters in use.
    """

    def __init__(self, each: Sequence[LoopState]):
        self.each, self.rows = list(each), SharedRows()
        self.instead: torch.Tensor | None = None  # whose state each row has, if not its own

    def _parameters(self) -> list[list[torch.Tensor]]:
        """By group."""
        return [
            [self.rows.of(k, [p.leaves[k] for p in self.each]) for k in members]
            for members in self.each[0].members
        ]

    def _slots(self) -> list[list[torch.Tensor]]:
        """By group and slot."""
        return [
            [self._states(k, slot) for k in members]
            for rule, members in zip(self.each[0].rules, self.each[0].members, strict=True)
            for slot in rule.slots
        ]

    def _states(self, k: int, name: str) -> torch.Tensor:
        return self.rows.of((k, name), [p.optimizer.state[p.leaves[k]][name] for p in self.each])

    def _buffers(self) -> list[torch.Tensor]:
        number = len(self.each[0].buffers)
        return [
            self.rows.of(("buffer", j), [p.buffers[j] for p in self.each]) for j in range(number)
        ]

    @staticmethod
    def joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """As :meth:`LoopState.joined` of each fit."""
        if len(tensors) == 1 and tensors[0].dim() > 2:
            return tensors[0]
        return torch.cat([t.reshape(len(t), -1) for t in tensors], 1)

    def apart(self, vectors: torch.Tensor, members: Sequence[int]) -> list[torch.Tensor]:
        """The opposite of :meth:`joined`."""
        shapes = [self.each[0].leaves[k].shape for k in members]
        pieces = vectors.reshape(len(vectors), -1).split([shape.numel() for shape in shapes], 1)
        return [p.reshape(len(vectors), *shape) for p, shape in zip(pieces, shapes, strict=True)]

    def carried(self, totals: list[torch.Tensor] | None, elbo: torch.Tensor) -> list[torch.Tensor]:
        """As :meth:`LoopState.carried`; with ``totals``, of fits that go on in all rows."""
        with torch.no_grad():
            theta = [self.joined(members) for members in self._parameters()]
            slots = [self.joined(members) for members in self._slots()]
            buffers = self._buffers()
            if totals is not None and self.instead is not None:
                theta, slots, buffers = (
                    [t.index_select(0, self.instead) for t in ts] for ts in (theta, slots, buffers)
                )
        sums = totals or [torch.zeros_like(t) for t in theta]
        return [*theta, *slots, *sums, elbo.repeat(len(self.each), 1), *buffers]

    def totals(self, totals: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        """Sums of iterates, flat, by group.

        A fit that stays where it is has none. In its row another one takes the steps meanwhile, or
        a step of its own that is not finite would end the call for all of them.
        """
        one = self.each[0]
        first = next(k for k, t in enumerate(totals) if t is not None)
        whose = [first if t is None else k for k, t in enumerate(totals)]
        whole = torch.stack([totals[k] for k in whose])  # type: ignore[misc]
        all_go = whose == list(range(len(whose)))
        self.instead = None if all_go else torch.tensor(whose, device=whole.device)
        pieces = self.apart(whole, range(len(one.leaves)))
        return [self.joined([pieces[k] for k in members]) for members in one.members]

    def coefficients(self, steps: int) -> np.ndarray:
        """(steps, fits, coefficients of all groups)"""
        known: dict[Hashable, np.ndarray] = {}
        tables = []
        for place in self.each:
            taken = place.taken()
            if taken not in known:
                known[taken] = place.coefficients(steps)
            tables.append(known[taken])
        return np.stack(tables, 1)

    def commit(
        self, done: int, out: Sequence[torch.Tensor], totals: Sequence[torch.Tensor | None]
    ) -> list[Block | None]:
        """As :meth:`LoopState.commit`, of the fits that have a total; the others stay."""
        one, given = self.each[0], iter(out)
        going = [k for k, total in enumerate(totals) if total is not None]
        theta = [piece for m in one.members for piece in self.apart(next(given), m)]
        slots = [
            piece
            for rule, members in zip(one.rules, one.members, strict=True)
            for _ in rule.slots
            for piece in self.apart(next(given), members)
        ]
        sums: dict[int, torch.Tensor] = {}
        for members in one.members:
            sums.update(zip(members, self.apart(next(given), members), strict=True))
        elbo = next(given)[:, :done].tolist()
        into = [t for group in (*self._parameters(), *self._slots()) for t in group]
        into += self._buffers()
        counters = [
            self._states(k, "step")
            for rule, members in zip(one.rules, one.members, strict=True)
            if rule.counted
            for k in members
        ]
        with torch.no_grad():
            values = [*theta, *slots, *given]
            steps = torch.zeros(len(self.each))
            steps[going] = float(done)
            if len(going) < len(self.each):
                moved = (steps > 0).to(theta[0].device)
                values = [
                    torch.where(moved.view(-1, *[1] * (old.dim() - 1)), new, old)
                    for new, old in zip(values, into, strict=True)
                ]
            torch._foreach_copy_(into, values)
            for counter in counters:
                counter += steps.to(counter.device)
            whole = torch.cat([sums[k].reshape(len(self.each), -1) for k in sorted(sums)], 1)
        rows = whole.unbind()
        blocks: list[Block | None] = [None] * len(self.each)
        for k in going:
            blocks[k] = Block(elbo[k], rows[k])
        return blocks
