"""Blocks of optimiser steps, compiled."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pyro.infer import ELBO

from vi_toolkit.compiled.program import (
    check_folder,
    compile_loop,
    failures_become_nan,
    forgetting_sources,
    functional,
    hoist,
    lookups_stay_inside,
    write_in,
)
from vi_toolkit.compiled.tracing import trace_step
from vi_toolkit.compiled.updates import hyperparameters, rule_for
from vi_toolkit.errors import CompileError
from vi_toolkit.subsampling import PlatePlan

MOST_STEPS_PER_CALL = 256
# How far a compiled and an eager step may differ: rounding is far below, another model far above.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}


class CompiledSteps:
    """Optimiser steps of ``estimator`` on ``model`` and ``guide``, many per call.

    The state is where it is for eager steps (the leaves, ``optimizer.state``, the estimator's
    buffers, torch's generator), and is read before and written after each call, so that compiled
    and eager steps can follow one another in any order. The draws are those of eager steps.

    Args:
        model, guide, data: called as ``model(**data)``.
        estimator: an ELBO with a ``differentiable_loss`` that reads no values.
        optimizer: one of those in :mod:`vi_toolkit.compiled.updates`; it must have taken a step.
        plan: how a plate is subsampled, if one is.
        leaves: the unconstrained parameters.

    Raises:
        CompileError: at the first :meth:`take`, if the step cannot be compiled.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        data: Mapping[str, Any],
        estimator: ELBO,
        optimizer: torch.optim.Optimizer,
        plan: PlatePlan | None,
        leaves: Sequence[torch.Tensor],
    ):
        self.model, self.guide, self.data, self.estimator = model, guide, data, estimator
        self.optimizer, self.plan, self.leaves = optimizer, plan, list(leaves)
        self.loops: dict[int | None, Loop] = {}
        check_folder()

    def loop(self, batch: int | None) -> Loop:
        """The compiled loop for minibatches of this size; None without minibatches."""
        found = self.loops.get(batch)
        if found is None or found.outdated():
            try:
                self.loops[batch] = found = Loop(self, batch)
            except CompileError:
                raise
            except Exception as error:  # whatever tracing another's model may meet
                text = (str(error).splitlines() or [""])[0][:200]
                raise CompileError(
                    f"it cannot be compiled ({type(error).__name__}: {text})"
                ) from error
        return found

    def take(
        self, steps: int, rows: torch.Tensor | None = None, total: torch.Tensor | None = None
    ) -> Block:
        """Take up to ``steps`` steps.

        Args:
            steps: at most :data:`MOST_STEPS_PER_CALL`.
            rows: minibatch indices, shape (steps, batch); None without minibatches.
            total: what the sum of the iterates starts from, flat; zero if None.

        Returns:
            :class:`Block`; it is shorter than asked for if a step was not finite. Such a step is
            not taken: the state is the last good one.
        """
        return self.loop(None if rows is None else rows.shape[1]).run(steps, rows, total)

    def loss(self, *rows: torch.Tensor) -> torch.Tensor:
        data, handler = (
            self.plan.apply(self.data, rows[0])
            if self.plan is not None
            else (self.data, contextlib.nullcontext())
        )
        with handler:
            differentiable_loss: Any = getattr(self.estimator, "differentiable_loss")  # noqa: B009
            return differentiable_loss(self.model, self.guide, **data)


@dataclass
class Block:
    """What a call brought: the ELBO of each step and the sum of the iterates, flat."""

    elbo: list[float]
    total: torch.Tensor


class Loop:
    """A compiled loop for one shape of minibatch."""

    @forgetting_sources()
    def __init__(self, steps: CompiledSteps, batch: int | None):
        estimator, optimizer, leaves = steps.estimator, steps.optimizer, steps.leaves
        if not hasattr(estimator, "differentiable_loss"):
            raise CompileError(f"{type(estimator).__name__} has no differentiable_loss")
        if len({p.dtype for p in leaves}) > 1:
            raise CompileError("the parameters are of different precisions")
        if any(p.device.type != "cpu" for p in leaves):
            raise CompileError("only steps on the CPU are compiled")
        self.leaves, self.optimizer = leaves, optimizer
        examples: list[tuple[torch.Tensor, ...]] = [(), ()]
        if batch is not None:
            assert steps.plan is not None
            rows = torch.arange(batch)
            examples = [(rows,), ((steps.plan.size - 1) - rows,)]
        traced = trace_step(steps.loss, leaves, examples)
        failures_become_nan(traced.graph)

        # Parameters by group of the optimiser; what the loss does not depend on stays as it is.
        self.hyperparameters = [hyperparameters(g) for g in optimizer.param_groups]
        self.rules, self.members = [], []
        position = {id(p): k for k, p in enumerate(leaves)}
        for group in optimizer.param_groups:
            members = [position[id(p)] for p in group["params"] if position[id(p)] in traced.live]
            if members:
                self.rules.append(rule_for(optimizer, group))
                self.members.append(members)
        if sum(map(len, self.members)) < len(traced.live):
            raise CompileError("the optimiser does not have all of the parameters")
        self.groups = [
            g
            for g in optimizer.param_groups
            if any(position[id(p)] in traced.live for p in g["params"])
        ]
        for rule, members in zip(self.rules, self.members, strict=True):
            counts = {float(optimizer.state[leaves[k]].get("step", 0.0)) for k in members}
            missing = any(
                optimizer.state[leaves[k]].get(slot) is None for k in members for slot in rule.slots
            )
            if missing or len(counts) > 1:
                raise CompileError("the parameters have not all taken the same number of steps")
        idle = [k for k in range(len(leaves)) if k not in traced.live]
        self.buffers, self.read = traced.buffers, traced.read
        self.constants = [leaves[k] for k in idle] + traced.constants

        def body(i: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
            given = iter(rest)
            theta = [next(given) for _ in self.rules]
            slots = [[next(given) for _ in rule.slots] for rule in self.rules]
            totals = [next(given) for _ in self.rules]
            elbo = next(given)
            buffers = [next(given) for _ in self.buffers]
            _, table = next(given), next(given)
            at = i.reshape(1)
            inputs = [next(given).index_select(0, at)[0]] if batch is not None else []
            coefficients = iter(table.index_select(0, at)[0].unbind())
            constants = list(given)
            values = dict(zip(idle, constants, strict=False))
            for members, vector in zip(self.members, theta, strict=True):
                pieces = vector.split([leaves[k].numel() for k in members])
                for k, piece in zip(members, pieces, strict=True):
                    values[k] = piece.reshape(leaves[k].shape)
            loss, *others = traced.graph(
                *inputs, *(values[k] for k in range(len(leaves))), *buffers, *constants[len(idle) :]
            )
            gradient = dict(zip(traced.live, others, strict=False))
            finite = torch.isfinite(loss)
            new_theta, new_slots = [], []
            for rule, members, vector, state in zip(
                self.rules, self.members, theta, slots, strict=True
            ):
                g = torch.cat([gradient[k].reshape(-1) for k in members])
                finite = finite & torch.isfinite(g).all()
                numbers = [next(coefficients) for _ in rule.coefficients(0.1, 1.0)]
                vector, state = rule.update(vector, g, state, numbers)
                new_theta.append(vector)
                new_slots += state
            totals = [t + v for t, v in zip(totals, new_theta, strict=True)]
            elbo = elbo.index_put((at,), -loss.reshape(1))
            # A step that is not finite ends the loop and says so by a count beyond reach.
            i = torch.where(finite, i + 1, i + (MOST_STEPS_PER_CALL + 1))
            return i, *new_theta, *new_slots, *totals, elbo, *others[len(traced.live) :]

        dtype = leaves[0].dtype
        loss_dtype = traced.loss_dtype
        self.elbo = torch.zeros(MOST_STEPS_PER_CALL, dtype=loss_dtype)
        self.table = torch.zeros(
            MOST_STEPS_PER_CALL, sum(len(r.coefficients(0.1, 1.0)) for r in self.rules), dtype=dtype
        )
        self.rows = (
            None if batch is None else torch.zeros(MOST_STEPS_PER_CALL, batch, dtype=torch.long)
        )
        self.n = torch.zeros((), dtype=torch.long)
        carried, fixed = self.carried(), self._fixed()
        each = functional(
            body,
            [torch.zeros((), dtype=torch.long), *carried, *fixed, *self.constants],
        )
        bounds = {0: MOST_STEPS_PER_CALL}  # of the loop's counter
        if steps.plan is not None:
            bounds[1 + len(carried) + 2] = steps.plan.size  # of the minibatch's indices
        checked = not lookups_stay_inside(each.graph, bounds)
        variable = 1 + len(carried) + len(fixed)
        fresh = [False] * len(idle) + traced.fresh
        self.once, each, unchanging = hoist(each, variable, fresh)
        self.versions: tuple[int, ...] = ()
        self.invariants: list[torch.Tensor] = []
        self.inputs: list[int] | None = None
        self._refresh()
        self.inputs = write_in(each, variable, self.invariants, unchanging)
        self.invariants = [self.invariants[k] for k in self.inputs]
        self.program = compile_loop(each, carried, [*fixed, *self.invariants], checked)

    # ------------------------------------------------------------- one call

    def run(self, steps: int, rows: torch.Tensor | None, total: torch.Tensor | None) -> Block:
        """See :meth:`CompiledSteps.take`."""
        with torch.no_grad():
            if total is None:
                total = torch.zeros(sum(p.numel() for p in self.leaves), dtype=self.table.dtype)
            pieces = total.split([p.numel() for p in self.leaves])
            totals = [torch.cat([pieces[k] for k in m]) for m in self.members]
        before = torch.get_rng_state()
        done, out = self.compute(steps, rows, totals)
        if 0 < done < steps:  # once more, up to the step that is not finite
            torch.set_rng_state(before)
            done, out = self.compute(done, rows, totals)
        if done == 0:
            torch.set_rng_state(before)
            return Block([], total)
        return self._commit(done, out, pieces)

    def compute(
        self, steps: int, rows: torch.Tensor | None, totals: list[torch.Tensor] | None = None
    ) -> tuple[int, list[torch.Tensor]]:
        """The state after ``steps`` steps, without taking them.

        Returns:
            Number of steps until one was not finite, and the state in the order of
            :meth:`carried`.
        """
        self._refresh()
        if self.rows is not None:
            assert rows is not None
            self.rows[:steps] = rows[:steps]
        self._fill_table(steps)
        self.n.fill_(steps)
        state = [t.clone() for t in self.carried(totals)]  # the program writes into its inputs
        try:
            with torch.no_grad():
                i, *out = self.program([*state, *self._fixed(), *self.invariants])
        except RuntimeError as error:
            raise CompileError(f"the compiled step failed ({error})") from error
        done = int(i)
        return (done if done <= steps else done - (MOST_STEPS_PER_CALL + 1)), out

    def carried(self, totals: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
        """Parameters, optimiser slots and sums by group, the ELBO's history, buffers."""
        leaves, state = self.leaves, self.optimizer.state
        with torch.no_grad():
            theta = [torch.cat([leaves[k].reshape(-1) for k in m]) for m in self.members]
            slots = [
                torch.cat([state[leaves[k]][slot].reshape(-1) for k in members])
                for rule, members in zip(self.rules, self.members, strict=True)
                for slot in rule.slots
            ]
        sums = totals or [torch.zeros_like(t) for t in theta]
        return [*theta, *slots, *sums, self.elbo, *self.buffers]

    def _fixed(self) -> list[torch.Tensor]:
        return [self.n, self.table, *([self.rows] if self.rows is not None else [])]

    def _fill_table(self, steps: int) -> None:
        columns = []
        for rule, group, members in zip(self.rules, self.groups, self.members, strict=True):
            taken = float(self.optimizer.state[self.leaves[members[0]]].get("step", 0.0))
            number = taken + np.arange(1.0, steps + 1)
            columns += [np.broadcast_to(c, steps) for c in rule.coefficients(group["lr"], number)]
        self.table[:steps] = torch.as_tensor(np.stack(columns, 1))

    def _commit(self, done: int, out: list[torch.Tensor], before: Sequence[torch.Tensor]) -> Block:
        """Write what a call returned to where eager steps keep it."""
        state, leaves = self.optimizer.state, self.leaves
        given = iter(out)
        into: list[torch.Tensor] = []
        values: list[torch.Tensor] = []

        def share(vector: torch.Tensor, tensors: list[torch.Tensor]) -> None:
            into.extend(tensors)
            pieces = vector.split([t.numel() for t in tensors])
            values.extend(p.view(t.shape) for p, t in zip(pieces, tensors, strict=True))

        for members in self.members:
            share(next(given), [leaves[k] for k in members])
        for rule, members in zip(self.rules, self.members, strict=True):
            for slot in rule.slots:
                share(next(given), [state[leaves[k]][slot] for k in members])
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
                return Block(elbo, totals[0])
            sums = [b + done * p.reshape(-1) for b, p in zip(before, leaves, strict=True)]
            for members, total in zip(self.members, totals, strict=True):
                pieces = total.split([leaves[k].numel() for k in members])
                for k, piece in zip(members, pieces, strict=True):
                    sums[k] = piece
            return Block(elbo, torch.cat(sums))

    # ------------------------------------------------------------- staying true

    def agree(
        self,
        old: list[torch.Tensor],
        eager: list[torch.Tensor],
        compiled: list[torch.Tensor],
        elbo: float,
    ) -> bool:
        """Whether one step led to the same state both ways, up to rounding.

        Compared are the ELBO and the optimiser's slots, which are averages of the gradient (the
        parameters themselves where there are none): Adam's first moves have the gradient's sign,
        however small it is, and would magnify rounding.
        """
        tolerance = TOLERANCE.get(self.table.dtype, 1e-2)
        many = len(self.rules)
        slots = sum(len(rule.slots) for rule in self.rules)
        sums = slice(many + slots, 2 * many + slots)
        mine = float(compiled[sums.stop][0])
        if not abs(mine - elbo) <= tolerance * max(1.0, abs(elbo)):
            return False
        compare = [k for k in range(len(old)) if many <= k < many + slots or k > sums.stop]
        if not slots:
            compare += range(many)
        for k in compare:
            a, b, c = (x[k].double() for x in (old, eager, compiled))
            scale = (b - a).norm() + b.norm() * tolerance
            if not (c - b).norm() <= 10 * tolerance * scale + 1e-30:
                return False
        return True

    def _refresh(self) -> None:
        """Compute again what was taken out of the loop, if a tensor it comes from has changed."""
        versions = tuple(t._version for t in self.constants)
        if versions != self.versions:
            with torch.no_grad():
                values = [t.contiguous() for t in self.once(*self.constants)]
            self.invariants = values if self.inputs is None else [values[k] for k in self.inputs]
            self.versions = versions
            self.read_versions = [t._version for t in self.read]

    def outdated(self) -> bool:
        """Whether something that is written into the program has changed."""
        return self.hyperparameters != [
            hyperparameters(g) for g in self.optimizer.param_groups
        ] or self.read_versions != [t._version for t in self.read]


@contextlib.contextmanager
def without_interrupt() -> Iterator[None]:
    """Ctrl-C waits until the block ends, so that it never meets half-written state."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[tuple[int, Any]] = []
    handler = signal.signal(signal.SIGINT, lambda *args: waiting.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if waiting and callable(handler):
        handler(*waiting[0])
