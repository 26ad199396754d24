"""Compiled loops of optimiser steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vi_toolkit import torch_private
from vi_toolkit.compiled.aot_cache import check_folder, compile_loop
from vi_toolkit.compiled.loop_state import LoopState, StepsTaken
from vi_toolkit.compiled.quiet import forgetting_sources, quiet
from vi_toolkit.compiled.rewrites import (
    failures_become_nan,
    hoist,
    inline_constants,
    lookups_stay_inside,
    replace_draws,
    transpose_products,
)
from vi_toolkit.compiled.running_fit import FitParts
from vi_toolkit.compiled.stacked_state import StackedState
from vi_toolkit.compiled.tracing import Traced, functional, trace_step
from vi_toolkit.errors import CompileError
from vi_toolkit.programs.isolation import random_state, set_random_state

MOST_STEPS_PER_CALL = 256
LONGEST_CALL = 0.5  # seconds without a chance to interrupt
# How far a compiled and an eager step may differ. Rounding errors are far smaller than this, and
# the difference between two models is far larger.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}


class CompiledSteps:
    """Optimiser steps of a fit by machine code, many per call.

    The state stays where eager steps keep it (the leaves, ``optimizer.state``, the estimator's
    buffers, torch's generator). It is read before each call and written after it, so compiled and
    eager steps can follow one another in any order. The random draws are those of eager steps.

    Args:
        fit: its optimiser is one of those in :mod:`vi_toolkit.compiled.updates` and has taken a
            step; its estimator has a ``differentiable_loss`` that does not read values.
        others: fits that differ from it only in parameter values, guide and estimator objects.
            Each call takes the steps of all fits. The draws then differ from those of each fit run
            separately.

    Raises:
        CompileError: the cache folder cannot be used. :meth:`loop` raises the same error if the
            steps cannot be compiled.
    """

    def __init__(self, fit: FitParts, *others: FitParts):
        self.fit, self.others = fit, others
        self.loops: dict[int | None, Loop] = {}
        check_folder()

    def loop(self, batch: int | None) -> Loop:
        """The compiled loop for minibatches of one size; None stands for no minibatches."""
        found = self.loops.get(batch)
        if found is None or found.outdated():
            try:
                self.loops[batch] = found = Loop(self.fit, self.others, batch)
            except CompileError:
                raise
            except Exception as error:  # tracing runs user code, which may raise anything
                text = (str(error).splitlines() or [""])[0][:200]
                raise CompileError(
                    f"it cannot be compiled ({type(error).__name__}: {text})"
                ) from error
        return found

    def advance(
        self,
        steps: int,
        indices: torch.Tensor | None = None,
        iterate_sum: torch.Tensor | None = None,
    ) -> StepsTaken:
        """Take up to ``steps`` steps of a single fit.

        Args:
            steps: at most :data:`MOST_STEPS_PER_CALL`.
            indices: minibatch indices, shape (steps, batch); None without minibatches.
            iterate_sum: sum of the iterates so far, flat; zero if None.

        Returns:
            The steps taken. There are fewer than asked for if a step was not finite. That step is
            not taken: the state is the last finite one.
        """
        if iterate_sum is None:
            with torch.no_grad():
                leaves = self.fit.leaves
                iterate_sum = torch.cat([torch.zeros_like(p).reshape(-1) for p in leaves])
        loop = self.loop(None if indices is None else indices.shape[1])
        return loop.advance(steps, indices, iterate_sum)


class Loop:
    """A compiled loop for minibatches of one size."""

    @forgetting_sources()
    @quiet()
    def __init__(self, fit: FitParts, others: Sequence[FitParts], batch: int | None):
        leaves = fit.leaves
        if not hasattr(fit.estimator, "differentiable_loss"):
            raise CompileError(f"{type(fit.estimator).__name__} has no differentiable_loss")
        if len({p.dtype for p in leaves}) > 1:
            raise CompileError("the parameters are of different precisions")
        device = leaves[0].device
        examples: list[tuple[torch.Tensor, ...]] = [(), ()]
        if batch is not None:
            assert fit.plan is not None
            indices = torch.arange(batch, device=device)
            examples = [(indices,), ((fit.plan.size - 1) - indices,)]
        traced = trace_step(_loss_of(fit), leaves, examples)
        failures_become_nan(traced.graph)

        one = LoopState(leaves, fit.optimizer, traced, traced.buffers, fit.next_rates)
        idle = [k for k in range(len(leaves)) if k not in traced.live]
        self.states = [one]
        for other in others:
            if idle:
                raise CompileError("the loss does not depend on all of the parameters")
            buffers = [_counterpart(t, fit, other) for t in traced.buffers]
            self.states.append(
                LoopState(other.leaves, other.optimizer, traced, buffers, other.next_rates)
            )
        self.state: Any = one if len(self.states) == 1 else StackedState(self.states)
        self._read = traced.read
        self._constants = [leaves[k] for k in idle] + traced.constants

        body = _loop_body(traced, one, idle, batch is not None)
        fits = [] if len(self.states) == 1 else [len(self.states)]
        width = sum(len(r.coefficients(0.1, 1.0)) for r in one.rules)
        most = MOST_STEPS_PER_CALL
        counts: dict[str, Any] = {"dtype": torch.long, "device": device}
        self._elbo = torch.zeros(most, dtype=traced.loss_dtype, device=device)
        self._coefficients = torch.zeros((most, *fits, width), dtype=leaves[0].dtype, device=device)
        self._indices = None if batch is None else torch.zeros((most, *fits, batch), **counts)
        self._n = torch.zeros((), **counts)
        each_state = [s.carried(None, self._elbo) for s in self.states]
        carried = each_state[0]
        if fits:
            carried = [torch.stack(ts) for ts in zip(*each_state, strict=True)]
        per_call = self._per_call()
        first = torch.zeros((), **counts)
        if fits:
            per_call_of_one = [self._n, *(t[:, 0] for t in per_call[1:])]
            self._graph_of_one = functional(
                body, [first, *each_state[0], *per_call_of_one, *self._constants]
            )
            body = _vectorised(
                self._graph_of_one, len(carried), len(per_call), len(self._constants)
            )
            self._graph_of_all = body
        each = functional(body, [first, *carried, *per_call, *self._constants])
        if fits:
            transpose_products(each.graph)
        bounds = {0: MOST_STEPS_PER_CALL}  # of the loop's counter
        if fit.plan is not None:
            bounds[1 + len(carried) + 2] = fit.plan.size  # of the minibatch's indices
        checked = not lookups_stay_inside(each.graph, bounds)
        variable = 1 + len(carried) + len(per_call)
        fresh = [False] * len(idle) + traced.fresh
        self._once, each, unchanging = hoist(each, variable, fresh)
        self._versions: tuple[int, ...] = ()
        self._invariants: list[torch.Tensor] = []
        self._inputs: list[int] | None = None
        self._refresh()
        self._inputs = inline_constants(each, variable, self._invariants, unchanging)
        self._invariants = [self._invariants[k] for k in self._inputs]
        self._machine_code = compile_loop(each, carried, [*per_call, *self._invariants], checked)

    # ------------------------------------------------------------- one call

    def advance(self, steps: int, indices: torch.Tensor | None, iterate_sum: Any) -> Any:
        """Take up to ``steps`` steps, see :meth:`CompiledSteps.advance`.

        For several fits, ``indices`` have shape (steps, fits, batch), and ``iterate_sum`` and the
        result are lists with an entry for each fit. Finished fits have no entry (None), and do not
        move.
        """
        sums = self.state.sums(iterate_sum)
        before = random_state()
        done, out = self.compute(steps, indices, sums)
        if 0 < done < steps:  # again, up to the step that is not finite
            set_random_state(before)
            done, out = self.compute(done, indices, sums)
        if done == 0:
            set_random_state(before)
            if isinstance(iterate_sum, torch.Tensor):
                return StepsTaken([], iterate_sum)
            return [None if t is None else StepsTaken([], t) for t in iterate_sum]
        return self.state.commit(done, out, iterate_sum)

    def compute(
        self,
        steps: int,
        indices: torch.Tensor | None,
        sums: list[torch.Tensor] | None = None,
    ) -> tuple[int, list[torch.Tensor]]:
        """Compute the state after ``steps`` steps without changing it.

        Returns:
            The number of finite steps, and the new state in the order of :meth:`carried`.
        """
        self._refresh()
        if self._indices is not None:
            assert indices is not None
            self._indices[:steps] = indices[:steps]
        self._coefficients[:steps] = torch.as_tensor(self.state.coefficients(steps))
        self._n.fill_(steps)
        state = [t.clone() for t in self.carried(sums)]  # the machine code overwrites its inputs
        try:
            with torch.no_grad():
                i, *out = self._machine_code([*state, *self._per_call(), *self._invariants])
        except RuntimeError as error:
            raise CompileError(f"the compiled step failed ({error})") from error
        done = int(i)
        return (done if done <= steps else done - (MOST_STEPS_PER_CALL + 1)), out

    def carried(self, sums: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
        """See :meth:`LoopState.carried`."""
        return self.state.carried(sums, self._elbo)

    def _per_call(self) -> list[torch.Tensor]:
        """The inputs that are the same for all steps of a call."""
        return [
            self._n,
            self._coefficients,
            *([self._indices] if self._indices is not None else []),
        ]

    # ------------------------------------------------------------- checks

    def state_of(self, k: int) -> list[torch.Tensor]:
        """Copy of one fit's state."""
        return [t.clone() for t in self.states[k].carried(None, self._elbo)]

    def step_of_one(self, k: int, indices: torch.Tensor | None) -> list[torch.Tensor]:
        """One fit's state after a step by the graph that is vectorised over fits."""
        table = torch.zeros_like(self._coefficients[:, 0])
        table[:1] = torch.as_tensor(self.states[k].coefficients(1))
        per_call = [self._n, table]
        if self._indices is not None:
            assert indices is not None
            padded = torch.zeros_like(self._indices[:, 0])
            padded[:1] = indices
            per_call.append(padded)
        with torch.no_grad():
            _, *out = self._graph_of_one(
                torch.zeros_like(self._n), *self.state_of(k), *per_call, *self._constants
            )
        return out

    def follows_graph(self, indices: torch.Tensor | None) -> bool:
        """Whether a step of several fits by machine code and by its graph, with the same draws,
        lead to the same state."""
        before = random_state()
        old = [t.clone() for t in self.carried()]
        done, compiled = self.compute(1, indices)
        set_random_state(before)
        with torch.no_grad():
            i, *expected = self._graph_of_all(
                torch.zeros_like(self._n), *old, *self._per_call(), *self._constants
            )
        set_random_state(before)
        if done != 1 or int(i) != 1:
            return done != 1 and int(i) != 1  # not finite
        elbo = expected[self._elbo_at()][:, 0]
        return self.agree(old, expected, compiled, elbo)

    def _elbo_at(self) -> int:
        """Position of the ELBO's history in the state."""
        rules = self.states[0].rules
        return 2 * len(rules) + sum(len(rule.slots) for rule in rules)

    def agree(
        self,
        old: list[torch.Tensor],
        eager: list[torch.Tensor],
        compiled: list[torch.Tensor],
        elbo: float | torch.Tensor,
    ) -> bool:
        """Whether one step led to the same state both ways, up to rounding.

        The ELBO and the optimiser's slots, which are averages of the gradient, are compared
        strictly. Parameters are compared roughly if there are slots: Adam's first moves have the
        gradient's sign, however small it is, and magnify rounding errors.
        """
        tolerance = TOLERANCE.get(self._coefficients.dtype, 1e-2)
        rules = self.states[0].rules
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
        """Recompute what was moved out of the loop if a tensor it depends on has changed."""
        versions = tuple(map(torch_private.version, self._constants))
        if versions != self._versions:
            with torch.no_grad():
                values = [t.contiguous() for t in self._once(*self._constants)]
            self._invariants = values if self._inputs is None else [values[k] for k in self._inputs]
            self._versions = versions
            self._read_versions = list(map(torch_private.version, self._read))

    def outdated(self) -> bool:
        """Whether a value that is written into the machine code has changed."""
        changed = self._read_versions != list(map(torch_private.version, self._read))
        return changed or any(state.outdated() for state in self.states)


def _loss_of(fit: FitParts) -> Callable[..., torch.Tensor]:
    """The estimator's loss as a function of a minibatch's indices, or of nothing."""

    def loss(*indices: torch.Tensor) -> torch.Tensor:
        data, handler = (
            fit.plan.apply(fit.data, indices[0])
            if fit.plan is not None
            else (fit.data, contextlib.nullcontext())
        )
        with handler:
            return fit.estimator.differentiable_loss(fit.model, fit.guide, **data)

    return loss


def _loop_body(
    traced: Traced, one: LoopState, idle: Sequence[int], minibatches: bool
) -> Callable[..., tuple[torch.Tensor, ...]]:
    """The body of a loop over the steps of one fit.

    Args:
        traced: the step.
        one: the fit's state.
        idle: positions of the leaves that the loss does not depend on.
        minibatches: whether a step takes the indices of a minibatch.

    Returns:
        (step number, *state, number of steps, coefficients, indices if any, *constants) -> (next
        step number, *new state), with the state in the order of :meth:`LoopState.carried`.
    """

    def body(i: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = iter(rest)
        theta = [next(given) for _ in one.rules]
        slots = [[next(given) for _ in rule.slots] for rule in one.rules]
        sums = [next(given) for _ in one.rules]
        elbo = next(given)
        buffers = [next(given) for _ in one.buffers]
        _, coefficient_table = next(given), next(given)
        at = i.reshape(1)
        inputs = [next(given).index_select(0, at)[0]] if minibatches else []
        coefficients = iter(coefficient_table.index_select(0, at)[0].unbind())
        constants = list(given)
        values = dict(zip(idle, constants, strict=False))
        for members, vector in zip(one.members, theta, strict=True):
            values.update(zip(members, one.split(vector, members), strict=True))
        loss, *outputs = traced.graph(
            *inputs, *(values[k] for k in range(len(one.leaves))), *buffers, *constants[len(idle) :]
        )
        gradient = dict(zip(traced.live, outputs, strict=False))
        finite = torch.isfinite(loss)
        new_theta, new_slots = [], []
        for rule, members, vector, state in zip(one.rules, one.members, theta, slots, strict=True):
            g = one.join([gradient[k] for k in members])
            # NaN if an entry is not finite: one sum is faster than testing each entry.
            finite = finite & ((0 * g).sum() == 0)
            numbers = [next(coefficients) for _ in rule.coefficients(0.1, 1.0)]
            vector, state = rule.update(vector, g, state, numbers)
            new_theta.append(vector)
            new_slots += state
        sums = [t + v for t, v in zip(sums, new_theta, strict=True)]
        elbo = elbo.index_put((at,), -loss.reshape(1))
        # A step that is not finite ends the loop: its count is too large to be a number of steps.
        i = torch.where(finite, i + 1, i + (MOST_STEPS_PER_CALL + 1))
        return i, *new_theta, *new_slots, *sums, elbo, *outputs[len(traced.live) :]

    return body


def _vectorised(
    graph: torch.fx.GraphModule, carried: int, per_call: int, constants: int
) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Turn the loop body of one fit into that of several fits.

    The state has a new first dimension, for the fits. Coefficients and indices have it second,
    after the steps. Each fit has its own draws.
    """
    replace_draws(graph.graph)
    for node in list(graph.graph.nodes):  # torch cannot vectorise a copy
        if node.target is torch.ops.aten.copy.default:
            into, source = (n.meta["val"] for n in node.args)
            if (into.shape, into.dtype) == (source.shape, source.dtype):
                node.replace_all_uses_with(node.args[1])
                graph.graph.erase_node(node)
    graph.recompile()
    axes = (None, *[0] * carried, None, *[1] * (per_call - 1), *[None] * constants)
    each = torch.func.vmap(graph, in_dims=axes, randomness="different")

    def body(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        i, *out = each(*given)
        return i.amax(), *out  # too large if one fit's step is not finite

    return body


def _counterpart(tensor: torch.Tensor, one: FitParts, other: FitParts) -> torch.Tensor:
    """The tensor of ``other`` that corresponds to a tensor that a step of ``one`` changes."""
    for mine, theirs in zip(_changing(one), _changing(other), strict=True):
        for name in mine:
            if mine[name] is tensor and theirs[name] is not tensor:
                return theirs[name]
    raise CompileError("the model changes a tensor in place, which all fits would share")


def _changing(fit: FitParts) -> list[dict[str, torch.Tensor]]:
    guide = fit.guide if isinstance(fit.guide, torch.nn.Module) else torch.nn.Module()
    state = fit.estimator.state() if hasattr(fit.estimator, "state") else {}
    return [dict(guide.named_buffers()), state]
