"""The state of a fit, as a compiled loop takes it and as eager steps keep it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vi_toolkit import torch_private
from vi_toolkit.compiled.tracing import Traced
from vi_toolkit.compiled.updates import hyperparameters, rule_for
from vi_toolkit.errors import CompileError

LARGE = 2**12  # parameters of more than one dimension and at least this size keep their shape


@dataclass
class StepsTaken:
    """The result of one call of machine code.

    Attributes:
        elbo: ELBO of each step.
        iterate_sum: the sum of the iterates, flat, with those of the new steps added.
    """

    elbo: list[float]
    iterate_sum: torch.Tensor


class LoopState:
    """The parameters, optimiser slots and buffers of one fit.

    Args:
        leaves: the unconstrained parameters.
        optimizer: one of those in :mod:`vi_toolkit.compiled.updates`; it must have taken a step.
        traced: the step. Parameters that its loss does not depend on are not moved.
        buffers: tensors that a step changes in place.
        next_rates: number of steps -> their scheduled learning rates, shape (steps, groups of the
            optimiser); None if the optimiser's own rates hold.

    Attributes:
        members: positions of the leaves in each group. The small parameters of a group of the
            optimiser form one group here, each large one a group of its own.
        rules: update rule of each group.

    Raises:
        CompileError: the optimiser's step cannot be compiled.
    """

    def __init__(
        self,
        leaves: Sequence[torch.Tensor],
        optimizer: torch.optim.Optimizer,
        traced: Traced,
        buffers: Sequence[torch.Tensor],
        next_rates: Callable[[int], np.ndarray | None] = lambda steps: None,
    ):
        self.leaves, self.optimizer, self.buffers = list(leaves), optimizer, list(buffers)
        self.next_rates = next_rates
        self.hyperparameters = [hyperparameters(g) for g in optimizer.param_groups]
        self.rules, self.groups, self.members = [], [], []
        self.columns: list[int] = []  # of the optimiser's groups in a table of rates
        position = {id(p): k for k, p in enumerate(leaves)}
        for column, group in enumerate(optimizer.param_groups):
            live = [position[id(p)] for p in group["params"] if position[id(p)] in traced.live]
            large = [k for k in live if leaves[k].dim() > 1 and leaves[k].numel() >= LARGE]
            small = [k for k in live if k not in large]
            for members in [small] * bool(small) + [[k] for k in large]:
                self.rules.append(rule_for(optimizer, group))
                self.groups.append(group)
                self.columns.append(column)
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
    def join(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The tensors of a group as one vector.

        A single tensor keeps its shape, because a loop over a flat vector would need divisions to
        find the position in it.
        """
        if len(tensors) == 1 and tensors[0].dim() > 1:
            return tensors[0]
        return torch.cat([t.reshape(-1) for t in tensors])

    def split(self, joined: torch.Tensor, members: Sequence[int]) -> list[torch.Tensor]:
        """The inverse of :meth:`join`."""
        shapes = [self.leaves[k].shape for k in members]
        pieces = joined.reshape(-1).split([shape.numel() for shape in shapes])
        return [p.view(shape) for p, shape in zip(pieces, shapes, strict=True)]

    def carried(self, sums: list[torch.Tensor] | None, elbo: torch.Tensor) -> list[torch.Tensor]:
        """Parameters, optimiser slots and iterate sums by group, the ELBO's history, buffers."""
        leaves, state = self.leaves, self.optimizer.state
        with torch.no_grad():
            theta = [self.join([leaves[k].detach() for k in m]) for m in self.members]
            slots = [
                self.join([state[leaves[k]][slot] for k in members])
                for rule, members in zip(self.rules, self.members, strict=True)
                for slot in rule.slots
            ]
        sums = sums or [torch.zeros_like(t) for t in theta]
        return [*theta, *slots, *sums, elbo, *self.buffers]

    def outdated(self) -> bool:
        """Whether a hyperparameter that is written into the machine code has changed."""
        return self.hyperparameters != [hyperparameters(g) for g in self.optimizer.param_groups]

    def sums(self, iterate_sum: torch.Tensor) -> list[torch.Tensor]:
        """Split a sum of iterates over all leaves, which is flat, by group."""
        with torch.no_grad():
            pieces = iterate_sum.split([p.numel() for p in self.leaves])
            shaped = [p.view(leaf.shape) for p, leaf in zip(pieces, self.leaves, strict=True)]
            return [self.join([shaped[k] for k in m]) for m in self.members]

    def rates_and_counts(self) -> tuple[tuple[float, float], ...]:
        """Learning rate of each group, and the number of steps that it has taken."""
        first = [self.leaves[members[0]] for members in self.members]
        return tuple(
            (float(group["lr"]), float(self.optimizer.state[leaf].get("step", 0.0)))
            for group, leaf in zip(self.groups, first, strict=True)
        )

    def coefficients(self, steps: int) -> np.ndarray:
        """Coefficients of the next steps' updates, shape (steps, coefficients of all groups)."""
        columns, table = [], self.next_rates(steps)
        each = zip(self.rules, self.columns, self.rates_and_counts(), strict=True)
        for rule, column, (rate, count) in each:
            numbers = count + np.arange(1.0, steps + 1)
            rates: Any = rate if table is None else table[:, column]
            columns += [np.broadcast_to(c, steps) for c in rule.coefficients(rates, numbers)]
        return np.stack(columns, 1)

    def commit(
        self, done: int, out: Sequence[torch.Tensor], iterate_sum: torch.Tensor
    ) -> StepsTaken:
        """Write the result of ``done`` steps to where eager steps keep it."""
        state, leaves = self.optimizer.state, self.leaves
        given = iter(out)
        targets: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        for members in self.members:
            targets += [leaves[k] for k in members]
            values += self.split(next(given), members)
        for rule, members in zip(self.rules, self.members, strict=True):
            for slot in rule.slots:
                targets += [state[leaves[k]][slot] for k in members]
                values += self.split(next(given), members)
        sums = [next(given) for _ in self.rules]
        elbo = next(given)[:done].tolist()
        targets += self.buffers
        values += given
        counters = [
            state[leaves[k]]["step"]
            for rule, members in zip(self.rules, self.members, strict=True)
            if rule.counted
            for k in members
        ]
        with torch.no_grad():
            torch_private.foreach_copy_(targets, values)
            if counters:
                torch_private.foreach_add_(counters, float(done))
            if self.members == [list(range(len(leaves)))]:
                return StepsTaken(elbo, sums[0].reshape(-1))
            # Leaves that the loss does not depend on have not moved.
            before = iterate_sum.split([p.numel() for p in leaves])
            by_leaf = [b + done * p.reshape(-1) for b, p in zip(before, leaves, strict=True)]
            for members, group_sum in zip(self.members, sums, strict=True):
                for k, piece in zip(members, self.split(group_sum, members), strict=True):
                    by_leaf[k] = piece.reshape(-1)
            return StepsTaken(elbo, torch.cat(by_leaf))
