"""Where a fit keeps what its steps change, and how that goes into a compiled loop and back."""

from __future__ import annotations

from collections.abc import Sequence
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


class Place:
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

    def coefficients(self, steps: int) -> np.ndarray:
        """Those of the next steps: (steps, coefficients of all groups)."""
        columns = []
        for rule, group, members in zip(self.rules, self.groups, self.members, strict=True):
            taken = float(self.optimizer.state[self.leaves[members[0]]].get("step", 0.0))
            number = taken + np.arange(1.0, steps + 1)
            columns += [np.broadcast_to(c, steps) for c in rule.coefficients(group["lr"], number)]
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
