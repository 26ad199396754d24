"""Blocks of optimiser steps, compiled."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from pyro.infer import ELBO

from vi_toolkit.compiled.aot_cache import check_folder, compile_loop, forgetting_sources, functional
from vi_toolkit.compiled.loop_state import Block, LoopState, StackedState
from vi_toolkit.compiled.rewrites import (
    failures_become_nan,
    hoist,
    lookups_stay_inside,
    replace_draws,
    turn_products,
    write_in,
)
from vi_toolkit.compiled.tracing import trace_step
from vi_toolkit.errors import CompileError
from vi_toolkit.programs.isolation import random_state, set_random_state
from vi_toolkit.programs.minibatches import PlatePlan

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
        beside: other fits of the same kind from other starts, each with ``guide``, ``estimator``,
            ``optimizer`` and ``leaves``, whose steps are taken by the same program at once. Their
            draws are those of none of them alone.

    Raises:
        CompileError: at the first step, if it cannot be compiled.
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
        beside: Sequence[Any] = (),
    ):
        self.beside = list(beside)
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
        """Take up to ``steps`` steps of the one fit.

        Args:
            steps: at most :data:`MOST_STEPS_PER_CALL`.
            rows: minibatch indices, shape (steps, batch); None without minibatches.
            total: what the sum of the iterates starts from, flat; zero if None.

        Returns:
            :class:`~vi_toolkit.compiled.loop_state.Block`; it is shorter than asked for if a step was
            not finite. Such a step is not taken: the state is the last good one.
        """
        if total is None:
            with torch.no_grad():
                total = torch.cat([torch.zeros_like(p).reshape(-1) for p in self.leaves])
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


class Loop:
    """A compiled loop for one shape of minibatch."""

    @forgetting_sources()
    def __init__(self, steps: CompiledSteps, batch: int | None):
        estimator, optimizer, leaves = steps.estimator, steps.optimizer, steps.leaves
        if not hasattr(estimator, "differentiable_loss"):
            raise CompileError(f"{type(estimator).__name__} has no differentiable_loss")
        if len({p.dtype for p in leaves}) > 1:
            raise CompileError("the parameters are of different precisions")
        device, *others = {p.device for p in leaves}
        if others:
            raise CompileError("the parameters are on different devices")
        if device.type != "cpu":
            raise CompileError("only steps on the CPU are compiled")
        examples: list[tuple[torch.Tensor, ...]] = [(), ()]
        if batch is not None:
            assert steps.plan is not None
            rows = torch.arange(batch, device=device)
            examples = [(rows,), ((steps.plan.size - 1) - rows,)]
        traced = trace_step(steps.loss, leaves, examples)
        failures_become_nan(traced.graph)

        place = LoopState(leaves, optimizer, traced, traced.buffers)
        idle = [k for k in range(len(leaves)) if k not in traced.live]
        self.places = [place]
        for other in steps.beside:
            if idle:
                raise CompileError("the loss does not depend on all of the parameters")
            buffers = [_counterpart(t, steps, other) for t in traced.buffers]
            self.places.append(LoopState(other.leaves, other.optimizer, traced, buffers))
        self.place: Any = place if len(self.places) == 1 else StackedState(self.places)
        self.read = traced.read
        self.constants = [leaves[k] for k in idle] + traced.constants

        def body(i: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
            given = iter(rest)
            theta = [next(given) for _ in place.rules]
            slots = [[next(given) for _ in rule.slots] for rule in place.rules]
            totals = [next(given) for _ in place.rules]
            elbo = next(given)
            buffers = [next(given) for _ in place.buffers]
            _, table = next(given), next(given)
            at = i.reshape(1)
            inputs = [next(given).index_select(0, at)[0]] if batch is not None else []
            coefficients = iter(table.index_select(0, at)[0].unbind())
            constants = list(given)
            values = dict(zip(idle, constants, strict=False))
            for members, vector in zip(place.members, theta, strict=True):
                values.update(zip(members, place.apart(vector, members), strict=True))
            loss, *others = traced.graph(
                *inputs, *(values[k] for k in range(len(leaves))), *buffers, *constants[len(idle) :]
            )
            gradient = dict(zip(traced.live, others, strict=False))
            finite = torch.isfinite(loss)
            new_theta, new_slots = [], []
            for rule, members, vector, state in zip(
                place.rules, place.members, theta, slots, strict=True
            ):
                g = place.joined([gradient[k] for k in members])
                # Not a number where one of them is not finite: faster than looking at each.
                finite = finite & ((0 * g).sum() == 0)
                numbers = [next(coefficients) for _ in rule.coefficients(0.1, 1.0)]
                vector, state = rule.update(vector, g, state, numbers)
                new_theta.append(vector)
                new_slots += state
            totals = [t + v for t, v in zip(totals, new_theta, strict=True)]
            elbo = elbo.index_put((at,), -loss.reshape(1))
            # A step that is not finite ends the loop and says so by a count beyond reach.
            i = torch.where(finite, i + 1, i + (MOST_STEPS_PER_CALL + 1))
            return i, *new_theta, *new_slots, *totals, elbo, *others[len(traced.live) :]

        many = [] if len(self.places) == 1 else [len(self.places)]
        width = sum(len(r.coefficients(0.1, 1.0)) for r in place.rules)
        most = MOST_STEPS_PER_CALL
        counts: dict[str, Any] = {"dtype": torch.long, "device": device}
        self.elbo = torch.zeros(most, dtype=traced.loss_dtype, device=device)
        self.table = torch.zeros((most, *many, width), dtype=leaves[0].dtype, device=device)
        self.rows = None if batch is None else torch.zeros((most, *many, batch), **counts)
        self.n = torch.zeros((), **counts)
        states = [p.carried(None, self.elbo) for p in self.places]
        carried = [torch.stack(ts) for ts in zip(*states, strict=True)] if many else states[0]
        fixed = self._fixed()
        first = torch.zeros((), **counts)
        if many:
            given_to_one = [self.n, *(t[:, 0] for t in fixed[1:])]
            self.alone = functional(body, [first, *states[0], *given_to_one, *self.constants])
            body = _vectorised(self.alone, len(carried), len(fixed), len(self.constants))
            self.vectorised = body
        each = functional(body, [first, *carried, *fixed, *self.constants])
        if many:
            turn_products(each.graph)
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

    def run(self, steps: int, rows: torch.Tensor | None, total: Any) -> Any:
        """See :meth:`CompiledSteps.take`. Of several fits ``total`` is a list, and so is what
        comes back; their indices lie side by side, (steps, fits, batch). A fit whose total is None
        stays where it is, and has no block."""
        sums = self.place.totals(total)
        before = random_state()
        done, out = self.compute(steps, rows, sums)
        if 0 < done < steps:  # once more, up to the step that is not finite
            set_random_state(before)
            done, out = self.compute(done, rows, sums)
        if done == 0:
            set_random_state(before)
            if isinstance(total, torch.Tensor):
                return Block([], total)
            return [None if t is None else Block([], t) for t in total]
        return self.place.commit(done, out, total)

    def compute(
        self,
        steps: int,
        rows: torch.Tensor | None,
        totals: list[torch.Tensor] | None = None,
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
        self.table[:steps] = torch.as_tensor(self.place.coefficients(steps))
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
        """See :meth:`LoopState.carried`."""
        return self.place.carried(totals, self.elbo)

    def _fixed(self) -> list[torch.Tensor]:
        return [self.n, self.table, *([self.rows] if self.rows is not None else [])]

    # ------------------------------------------------------------- staying true

    def state_of(self, k: int) -> list[torch.Tensor]:
        """One fit's state, as it is now."""
        return [t.clone() for t in self.places[k].carried(None, self.elbo)]

    def one_alone(self, k: int, rows: torch.Tensor | None) -> list[torch.Tensor]:
        """One fit's state after a step by the graph that is vectorised for several of them."""
        table = torch.zeros_like(self.table[:, 0])
        table[:1] = torch.as_tensor(self.places[k].coefficients(1))
        given = [self.n, table]
        if self.rows is not None:
            assert rows is not None
            indices = torch.zeros_like(self.rows[:, 0])
            indices[:1] = rows
            given.append(indices)
        with torch.no_grad():
            _, *out = self.alone(
                torch.zeros_like(self.n), *self.state_of(k), *given, *self.constants
            )
        return out

    def true_of_all(self, rows: torch.Tensor | None) -> bool:
        """Whether a step of several fits by the program is one by the graph that it was made of,
        with the same draws."""
        before = random_state()
        old = [t.clone() for t in self.carried()]
        done, compiled = self.compute(1, rows)
        set_random_state(before)
        with torch.no_grad():
            i, *graph = self.vectorised(
                torch.zeros_like(self.n), *old, *self._fixed(), *self.constants
            )
        set_random_state(before)
        if done != 1 or int(i) != 1:
            return done != 1 and int(i) != 1  # not finite
        elbo = graph[self._elbo_at()][:, 0]
        return self.agree(old, graph, compiled, elbo)

    def _elbo_at(self) -> int:
        """Where the ELBO's history is in the state."""
        rules = self.places[0].rules
        return 2 * len(rules) + sum(len(rule.slots) for rule in rules)

    def agree(
        self,
        old: list[torch.Tensor],
        eager: list[torch.Tensor],
        compiled: list[torch.Tensor],
        elbo: float | torch.Tensor,
    ) -> bool:
        """Whether one step led to the same state both ways, up to rounding.

        Compared are the ELBO and the optimiser's slots, which are averages of the gradient, and the
        parameters only roughly, unless there are no slots: Adam's first moves have the gradient's
        sign, however small it is, and magnify rounding.
        """
        tolerance = TOLERANCE.get(self.table.dtype, 1e-2)
        rules = self.places[0].rules
        many, slots = len(rules), sum(len(rule.slots) for rule in rules)
        mine, theirs = compiled[self._elbo_at()][..., 0].double(), torch.as_tensor(elbo).double()
        if not ((mine - theirs).abs() <= tolerance * theirs.abs().clamp(min=1.0)).all():
            return False
        for k in (*range(many + slots), *range(self._elbo_at() + 1, len(old))):
            a, b, c = (x[k].double() for x in (old, eager, compiled))
            roughly = k < many and slots
            scale = (3.0 if roughly else 10 * tolerance) * (b - a).norm()
            if not (c - b).norm() <= scale + 10 * tolerance**2 * b.norm() + 1e-30:
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
        return any(place.outdated() for place in self.places) or self.read_versions != [
            t._version for t in self.read
        ]


def _vectorised(
    alone: torch.fx.GraphModule, carried: int, fixed: int, constants: int
) -> Callable[..., tuple[torch.Tensor, ...]]:
    """The body of one fit's loop as that of several, whose state has one more dimension, in front,
    and whose steps' coefficients and indices have it second. Each has draws of its own."""
    replace_draws(alone.graph)
    for node in list(alone.graph.nodes):  # torch cannot vectorise a copy
        if node.target is torch.ops.aten.copy.default:
            into, source = (n.meta["val"] for n in node.args)
            if (into.shape, into.dtype) == (source.shape, source.dtype):
                node.replace_all_uses_with(node.args[1])
                alone.graph.erase_node(node)
    alone.recompile()
    axes = (None, *[0] * carried, None, *[1] * (fixed - 1), *[None] * constants)
    each = torch.func.vmap(alone, in_dims=axes, randomness="different")

    def body(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        i, *out = each(*given)
        return i.amax(), *out  # beyond reach if one of them is

    return body


def _counterpart(tensor: torch.Tensor, one: Any, other: Any) -> torch.Tensor:
    """Of a tensor that a step changes in one fit, that of another fit."""
    for mine, theirs in zip(_changing(one), _changing(other), strict=True):
        for name in mine:
            if mine[name] is tensor and theirs[name] is not tensor:
                return theirs[name]
    raise CompileError("the model changes a tensor in place, which all fits would share")


def _changing(fit: Any) -> list[dict[str, torch.Tensor]]:
    guide = fit.guide if isinstance(fit.guide, torch.nn.Module) else torch.nn.Module()
    state = fit.estimator.state() if hasattr(fit.estimator, "state") else {}
    return [dict(guide.named_buffers()), state]


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
