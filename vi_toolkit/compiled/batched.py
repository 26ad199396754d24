"""Takes the steps of several fits at once: the restarts of one fit from different starts.

The compiled step of one fit is vectorised over the fits (``torch.vmap`` of its graph). For small
models a step of ten fits takes two to four times as long as a step of one, and tracing and
compiling happen once. Each fit has its own parameters, optimiser, minibatches and stages, and ends
by itself. Only the random draws come from one source, so they differ from those of each fit run
separately.

Two comparisons guard the result. Before the first compiled step, the eager step of each fit is
compared with the graph that is vectorised, using the same draws. This finds a guide that drew
something for itself when it was constructed, so that the fits differ. The machine code is compared
with the graph for all fits. At the end both are repeated, the first for one fit, in case the model
has changed in between.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence

import torch

from vi_toolkit.compiled.in_place import InPlaceChanges
from vi_toolkit.compiled.interrupts import interrupt_deferred
from vi_toolkit.compiled.purity import PythonSnapshot, effects
from vi_toolkit.compiled.running_fit import RunningFit, checkpoint, rollback
from vi_toolkit.compiled.stacked_state import StackedState
from vi_toolkit.compiled.steps import LONGEST_CALL, MOST_STEPS_PER_CALL, CompiledSteps, Loop
from vi_toolkit.errors import CompileError
from vi_toolkit.programs.isolation import random_state, set_random_state


class BatchedFits:
    """Several fits whose steps are taken by one call of machine code.

    Args:
        fits: fits that have taken no step and differ only in parameter values and seeds.
        isolated: number of a fit -> context in which its parameters are in use.
        most_steps: number of steps at which a fit ends that has not converged.

    Raises:
        CompileError: the fits cannot be batched. They have been modified; rebuild them.
    """

    def __init__(
        self,
        fits: Sequence[RunningFit],
        isolated: Callable[[int], contextlib.AbstractContextManager[object]],
        most_steps: int,
    ):
        self.fits, self.isolated, self.most_steps = list(fits), isolated, most_steps
        first = self.fits[0]
        memory = [t.untyped_storage().data_ptr() for f in fits for t in f.leaves if t.numel()]
        if len(set(memory)) < len(memory):
            raise CompileError("the fits share a parameter, which would be changed by all of them")
        if len({tuple(p.shape for p in fit.leaves) for fit in fits}) > 1:
            raise CompileError("the fits' parameters differ in shape")
        self._python: PythonSnapshot | None = None
        for k, fit in enumerate(fits):
            with isolated(k):
                self._first_step(fit)
        self.steps = CompiledSteps(*self.fits)
        self._random = first.rng
        self._seconds_per_step = 0.0

    def _first_step(self, fit: RunningFit) -> None:
        """Take a fit's first step eagerly. The first fit's is inspected for side effects."""
        set_random_state(fit.rng)
        if self._python is not None:
            fit.one_step()
        else:
            before = PythonSnapshot(fit.model, fit.guide)
            with effects() as found:
                fit.one_step()
            changed = before.changed()
            if found or changed:
                what = f"calls {found[0]}()" if found else f"changes {changed}"
                raise CompileError(f"the model or guide {what}")
            self._python = PythonSnapshot(fit.model, fit.guide, fit.estimator)
        fit.rng = random_state()

    def advance(self, steps: int | None, report: Callable[[int, float], None]) -> None:
        """Take steps until every fit has taken ``steps`` steps, or has converged if that is None.

        Args:
            steps: number of steps of each fit, those already taken included.
            report: called after each call of machine code with the number of steps taken and the
                largest error of the fits so far.

        Raises:
            NonFiniteError: a fit's ELBO or gradient is not finite.
            CompileError: the model has changed since it was compiled.
        """
        try:
            self._advance(self.most_steps if steps is None else steps, steps is None, report)
        finally:
            for loop in self.steps.loops.values():
                if isinstance(loop.state, StackedState):
                    loop.state.shared.separate()
            for fit in self.fits:
                fit.block_sum = fit.block_sum.clone()

    def _advance(
        self, most: int, until_converged: bool, report: Callable[[int, float], None]
    ) -> None:
        report(1, float("inf"))
        running = [k for k, fit in enumerate(self.fits) if fit.step < most]
        while running:
            done = self._take(running, most)
            for k in running:
                fit = self.fits[k]
                if fit.in_block >= fit.block_length:
                    with self.isolated(k):
                        fit.check_stage()
            ended = [
                k
                for k in running
                if self.fits[k].step >= most or (until_converged and self.fits[k].converged)
            ]
            running = [k for k in running if k not in ended]
            report(done, max(fit.error for fit in self.fits))
        for fit in self.fits:
            fit.rng = self._random
        assert self._python is not None
        changed = self._python.changed()
        if changed:
            raise CompileError(f"{changed} changes when the model or guide runs")
        for loop in self.steps.loops.values():  # check the last steps before returning
            with self.isolated(0):
                self._check_graph(loop, 0)
            self._check_machine_code(loop)

    def _take(self, running: list[int], most: int) -> int:
        """Take some steps of the fits that are running; returns how many."""
        fits = [self.fits[k] for k in running]
        steps = min(min(most - f.step, f.block_length - f.in_block) for f in fits)
        steps = min(steps, MOST_STEPS_PER_CALL)
        if self._seconds_per_step:
            steps = max(1, min(steps, int(LONGEST_CALL / self._seconds_per_step)))
        batches = fits[0].batches
        if batches and batches.next_size < batches.batch:
            return self._eager_step(running)  # a short minibatch would need its own machine code
        new = not self.steps.loops
        with self.isolated(0):
            loop = self.steps.loop(batches.batch if batches else None)
        if new:
            for k in range(len(self.fits)):
                with self.isolated(k):
                    self._check_graph(loop, k)
            self._check_machine_code(loop)
        began = time.perf_counter()
        with interrupt_deferred(), self.isolated(0):
            before = [f.batches.state() for f in fits if f.batches]
            indices = self._next_indices(fits, steps) if batches else None
            steps = steps if indices is None else len(indices)
            if indices is not None and len(running) < len(self.fits):
                # What finished fits compute is dropped, so any indices will do.
                padded = indices[:, :1].expand(-1, len(self.fits), -1).clone()
                padded[:, running] = indices
                indices = padded
            set_random_state(self._random)
            sums = [f.block_sum if k in running else None for k, f in enumerate(self.fits)]
            results = loop.advance(steps, indices, sums)
            self._random = random_state()
            done = len(next(taken.elbo for taken in results if taken is not None))
            for fit, there in zip(fits, before, strict=False):
                if done < steps and fit.batches:
                    fit.batches.restore(there)
                    if done:
                        fit.batches.several(done)
            for k in running:
                fit, taken = self.fits[k], results[k]
                assert taken is not None
                fit.step += done
                fit.in_block += done
                fit.elbo += taken.elbo
                fit.block_sum = taken.iterate_sum
        if done < steps:
            # An eager step names the site that is not finite, or finds that all is well.
            return done + self._eager_step(running)
        self._seconds_per_step = (time.perf_counter() - began) / done
        return done

    @staticmethod
    def _next_indices(fits: Sequence[RunningFit], steps: int) -> torch.Tensor:
        """The fits' next minibatches, shape (steps, fits, batch)."""
        return torch.stack([f.batches.several(steps) for f in fits if f.batches], 1)

    def _eager_step(self, running: Sequence[int]) -> int:
        for k in running:
            with self.isolated(k):
                set_random_state(self._random)
                try:
                    self.fits[k].one_step()
                finally:
                    self._random = random_state()
        return 1

    def _check_graph(self, loop: Loop, k: int) -> None:
        """Compare a fit's next step, computed eagerly, with the graph that is vectorised.

        Raises:
            CompileError: the results differ.
        """
        fit = self.fits[k]
        if fit.batches and fit.batches.next_size < fit.batches.batch:
            return  # a short minibatch, which the graph does not take
        set_random_state(fit.rng)
        start = checkpoint(fit)
        indices = fit.batches.several(1) if fit.batches else None
        old = loop.state_of(k)
        compiled = loop.step_of_one(k, indices)
        rollback(fit, start)
        with InPlaceChanges() as changes:
            elbo = fit.one_step()
        eager = loop.state_of(k)
        changes.undo()
        rollback(fit, start)
        if not loop.agree(old, eager, compiled, elbo):
            raise CompileError(
                "the step of one fit is not the one that was compiled: the guide makes something "
                "for itself, the model has changed, or they lose precision"
            )

    def _check_machine_code(self, loop: Loop) -> None:
        """Compare the next step of all fits by machine code with the graph it was made of.

        Raises:
            CompileError: the results differ.
        """
        batches = [fit.batches for fit in self.fits if fit.batches]
        if any(b.next_size < b.batch for b in batches):
            return
        before = [b.state() for b in batches]
        indices = self._next_indices(self.fits, 1) if batches else None
        for b, there in zip(batches, before, strict=True):
            b.restore(there)
        with self.isolated(0):
            set_random_state(self._random)
            good = loop.follows_graph(indices)
        if not good:
            raise CompileError("the compiled step of several fits is not the one that was recorded")
