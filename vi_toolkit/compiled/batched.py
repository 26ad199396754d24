"""Restarts at once: fits of one kind from several starts, whose steps one program takes.

The compiled step of one fit is vectorised over the fits (``torch.vmap`` of its graph). On small
models a step of ten fits costs what two to four steps of one do, and nothing is traced or
compiled ten times. Each fit keeps its own parameters, optimiser, minibatches, stages and end; only
the draws come from one source, so that they are others than if the fits ran one after the other.

Before the first of these steps, every fit's own eager step is held against the graph that is
vectorised, with the same draws: a fit of which the program is not true (its guide drew something
for itself when it was made) is found then, and the fits run one after the other. The program is
held against that graph for all of them. Both are done again at the end, the first for one fit, so
that a model that changes meanwhile is found too.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from vi_toolkit.compiled.accelerator import LONGEST_CALL
from vi_toolkit.compiled.purity import PythonSnapshot, effects
from vi_toolkit.compiled.steps import (
    MOST_STEPS_PER_CALL,
    CompiledSteps,
    Loop,
    without_interrupt,
)
from vi_toolkit.compiled.tracing import Watch
from vi_toolkit.errors import CompileError
from vi_toolkit.programs.isolation import random_state, set_random_state

if TYPE_CHECKING:
    from vi_toolkit.stochastic.stages import Stochastic

Room = Callable[[int], contextlib.AbstractContextManager[object]]


class BatchedFits:
    """Takes the steps of several fits.

    Args:
        fits: at their starts, no step taken; equal but for their parameters' values and seeds.
        room: number of a fit -> context in which its parameters are those in use.

    Raises:
        CompileError: they cannot be run by one program; no fit is as it was.
    """

    def __init__(self, fits: Sequence[Stochastic], room: Room):
        self.fits, self.room = list(fits), room
        first = self.fits[0]
        owners = [t.untyped_storage().data_ptr() for f in fits for t in f.leaves if t.numel()]
        if len(set(owners)) < len(owners):
            raise CompileError("the fits share a parameter, which would be changed by all of them")
        if len({tuple(p.shape for p in fit.leaves) for fit in fits}) > 1:
            raise CompileError("the fits' parameters differ in shape")
        self.state: PythonSnapshot | None = None
        for k, fit in enumerate(fits):
            with room(k):
                self._first_step(fit)
        self.steps = CompiledSteps(
            first.model,
            first.guide,
            first.data,
            first.estimator,
            first.optimizer,
            first.plan,
            first.leaves,
            beside=self.fits[1:],
        )
        self.rng = first.rng
        self.per_step = 0.0

    def _first_step(self, fit: Stochastic) -> None:
        """Eager; the first fit's shows what model and guide do besides computing."""
        set_random_state(fit.rng)
        if self.state is not None:
            fit.one_step()
        else:
            before = PythonSnapshot(fit.model, fit.guide)
            with effects() as found:
                fit.one_step()
            changed = before.changed()
            if found or changed:
                what = f"calls {found[0]}()" if found else f"changes {changed}"
                raise CompileError(f"the model or guide {what}")
            self.state = PythonSnapshot(fit.model, fit.guide, fit.estimator)
        fit.rng = random_state()

    def advance(self, steps: int | None, report: Callable[[int, float], None]) -> None:
        """Take steps until each fit has taken so many, or, if None, has converged or taken most.

        Args:
            report: called after each call of the program with the steps that it took and the
                largest error of the fits so far.

        Raises:
            NonFiniteError: a fit's ELBO or gradient is not finite.
            CompileError: the model is no longer what was compiled.
        """
        from vi_toolkit.stochastic.stages import MOST_COMPILED_STEPS

        try:
            self._advance(MOST_COMPILED_STEPS if steps is None else steps, steps is None, report)
        finally:
            for loop in self.steps.loops.values():
                loop.place.rows.part()
            for fit in self.fits:
                fit.block_sum = fit.block_sum.clone()

    def _advance(self, most: int, watched: bool, report: Callable[[int, float], None]) -> None:
        report(1, float("inf"))
        going = [k for k, fit in enumerate(self.fits) if fit.step < most]
        while going:
            done = self._block(going, most)
            for k in going:
                fit = self.fits[k]
                if fit.in_block >= fit.block_length:
                    with self.room(k):
                        fit.check_stage()
            ended = [
                k
                for k in going
                if self.fits[k].step >= most or (watched and self.fits[k].converged)
            ]
            going = [k for k in going if k not in ended]
            report(done, max(fit.error for fit in self.fits))
        for fit in self.fits:
            fit.rng = self.rng
        assert self.state is not None
        changed = self.state.changed()
        if changed:
            raise CompileError(f"{changed} changes when the model or guide runs")
        for loop in self.steps.loops.values():  # nothing leaves it unchecked
            with self.room(0):
                self._check(loop, 0)
            self._check_program(loop)

    def _block(self, going: list[int], most: int) -> int:
        """Take some steps of the fits that still go; returns how many."""
        fits = [self.fits[k] for k in going]
        steps = min(min(most - f.step, f.block_length - f.in_block) for f in fits)
        steps = min(steps, MOST_STEPS_PER_CALL)
        if self.per_step:
            steps = max(1, min(steps, int(LONGEST_CALL / self.per_step)))
        batches = fits[0].batches
        if batches and batches.next_size < batches.batch:
            return self._eager(going)  # an epoch's short end would be another program
        new = not self.steps.loops
        with self.room(0):
            loop = self.steps.loop(batches.batch if batches else None)
        if new:
            for k in range(len(self.fits)):
                with self.room(k):
                    self._check(loop, k)
            self._check_program(loop)
        began = time.perf_counter()
        with without_interrupt(), self.room(0):
            places = [f.batches.state() for f in fits if f.batches]
            rows = self._rows(fits, steps) if batches else None
            steps = steps if rows is None else len(rows)
            if rows is not None and len(going) < len(self.fits):  # for the others anything will do
                some = rows[:, :1].expand(-1, len(self.fits), -1).clone()
                some[:, going] = rows
                rows = some
            set_random_state(self.rng)
            totals = [f.block_sum if k in going else None for k, f in enumerate(self.fits)]
            blocks = loop.run(steps, rows, totals)
            self.rng = random_state()
            done = len(next(block.elbo for block in blocks if block is not None))
            for fit, place in zip(fits, places, strict=False):
                if done < steps and fit.batches:
                    fit.batches.restore(place)
                    if done:
                        fit.batches.several(done)
            for k in going:
                fit, block = self.fits[k], blocks[k]
                assert block is not None
                fit.step += done
                fit.in_block += done
                fit.elbo += block.elbo
                fit.block_sum = block.total
        if done < steps:
            return done + self._eager(going)  # blames the site, or finds that all is well
        self.per_step = (time.perf_counter() - began) / done
        return done

    @staticmethod
    def _rows(fits: Sequence[Stochastic], steps: int) -> torch.Tensor:
        """The next minibatches of each: (steps, fits, batch)."""
        return torch.stack([f.batches.several(steps) for f in fits if f.batches], 1)

    def _eager(self, going: Sequence[int]) -> int:
        for k in going:
            with self.room(k):
                set_random_state(self.rng)
                try:
                    self.fits[k].one_step()
                finally:
                    self.rng = random_state()
        return 1

    def _check(self, loop: Loop, k: int) -> None:
        """Compute a fit's next step eagerly and by the graph that is vectorised, and compare."""
        fit = self.fits[k]
        if fit.batches and fit.batches.next_size < fit.batches.batch:
            return  # an epoch's short end, which the program does not take
        set_random_state(fit.rng)
        before = fit.accelerator.bookmark()
        rows = fit.batches.several(1) if fit.batches else None
        old = loop.state_of(k)
        compiled = loop.one_alone(k, rows)
        fit.accelerator.back_to(before)
        with Watch() as watch:
            elbo = fit.one_step()
        eager = loop.state_of(k)
        watch.undo()
        fit.accelerator.back_to(before)
        if not loop.agree(old, eager, compiled, elbo):
            raise CompileError(
                "the step of one fit is not the one that was compiled: the guide makes something "
                "for itself, the model has changed, or they compute with little precision"
            )

    def _check_program(self, loop: Loop) -> None:
        """Compute the next step of all fits by the program and by its graph, and compare."""
        batches = [fit.batches for fit in self.fits if fit.batches]
        if any(b.next_size < b.batch for b in batches):
            return
        places = [b.state() for b in batches]
        rows = self._rows(self.fits, 1) if batches else None
        for b, place in zip(batches, places, strict=True):
            b.restore(place)
        with self.room(0):
            set_random_state(self.rng)
            good = loop.true_of_all(rows)
        if not good:
            raise CompileError("the compiled step of several fits is not the one that was recorded")
