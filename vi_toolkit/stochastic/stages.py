"""Stochastic VI: annealed steps, averaged iterates, and a rule for when to stop.

For minibatches, discrete latents, amortised guides and very large guides. With a constant step size
the iterates keep jittering around the optimum, and a schedule that is fixed in advance must guess
how far away the optimum is. So the steps are taken in stages of constant step size. A stage is
checked when it has 640 steps, then at 1,280, 2,560 and so on. Once its last three quarters no
longer drift, their average is the stage's answer, and the step size is divided by four. The fit
ends when the average's Monte Carlo error is small, in posterior standard deviations, and the
average agrees with that of the stage before. (The error of an average depends on the number of
steps, not on their size. The step size sets only the bias, which shows as the difference between
stages.)

The rule follows Dhaka et al., "Robust, Accurate Stochastic Optimization for Variational Inference",
2020, and Welandawe et al., "A Framework for Improving the Reliability of Black-box Variational
Inference", JMLR 2024, in that it looks at the iterates rather than at the ELBO. The guide's Fisher
information gives the scale on which an error of a variational parameter is judged.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyro
import pyro.poutine as poutine
import torch
from pyro.infer import ELBO

from vi_toolkit.machine_code import Stepper, stepper
from vi_toolkit.programs.isolation import (
    kept_random_state,
    random_state,
    seeded_state,
    set_random_state,
)
from vi_toolkit.programs.leaves import flat, unflat, unique_leaves
from vi_toolkit.programs.minibatches import Minibatches, PlatePlan
from vi_toolkit.programs.nonfinite import blame
from vi_toolkit.programs.sites import is_factor, is_point, is_term

BLOCKS = 64  # block means at a check; if the stage goes on, neighbours merge
FIRST_BLOCK = 10  # steps per block at the start
SHRINK = 0.25  # factor of the step size from stage to stage
ERROR_TOLERANCE = 0.02  # posterior sds
MOST_STEPS = 40_000  # of a fit whose number of steps is open
# The average over T steps on minibatches of B out of N data is off by at least sqrt(N / (B T))
# posterior sds, so small minibatches need many steps. Compiled steps are fast enough for that.
MOST_COMPILED_STEPS = 200_000


class Stochastic:
    """A stochastic fit in progress: everything that a step needs and changes.

    Runs inside :func:`~vi_toolkit.programs.isolation.isolated_pyro_state`, which holds its
    parameters.

    Args:
        model, guide, data: called as ``model(**data)``.
        estimator: the ``pyro.infer.ELBO`` whose gradient is followed.
        optimizer: function from parameters to an optimiser.
        plan: how a plate is subsampled; None without minibatches.
        seed: seed of the draws and of the minibatches.
        average: report an average of the iterates rather than the last one.
        compile: whether to compile the steps, see :func:`vi_toolkit.machine_code.stepper`.
        rates: learning rate of each group of the optimiser at each step, (steps, groups), instead
            of annealing in stages; the last holds for further steps. None without a schedule.

    Attributes:
        step: number of steps taken; ``elbo`` holds the ELBO estimate of each.
        stage: number of completed stages.
        blocks: means of the iterates over the blocks of the current stage, each flat.
        error: Monte Carlo error of the solution in posterior sds, so far.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        data: Mapping[str, Any],
        estimator: ELBO,
        optimizer: Callable[[list[torch.Tensor]], torch.optim.Optimizer],
        plan: PlatePlan | None,
        seed: int,
        average: bool = True,
        compile: str | bool = False,
        rates: np.ndarray | None = None,
    ):
        self.rates = rates
        self.model, self.guide, self.data = model, guide, data
        self.estimator: Any = estimator
        self.plan, self.average = plan, average
        self.leaves = unique_leaves()
        self.optimizer = optimizer(self.leaves)
        self.batches = (
            Minibatches(plan.size, plan.batch, torch.Generator().manual_seed(seed))
            if plan
            else None
        )
        self.rng = seeded_state(seed)
        self.step = 0
        self.stage = 0
        self.block_length = FIRST_BLOCK
        self.in_block = 0
        self.block_sum = torch.zeros_like(flat(self.leaves))
        self.blocks: list[torch.Tensor] = []
        self.stage_average: torch.Tensor | None = None  # of the last completed stage
        self.stage_noise: torch.Tensor | None = None  # its standard error
        self.error = math.inf
        self.elbo: list[float] = []
        self.stepper: Stepper = stepper(self, compile, MOST_STEPS)

    @property
    def converged(self) -> bool:
        return self.error <= ERROR_TOLERANCE

    def one_step(self) -> float:
        """One optimiser step; returns its ELBO estimate."""
        data: Mapping[str, Any] = self.data
        handler: contextlib.AbstractContextManager = contextlib.nullcontext()
        if self.plan is not None and self.batches is not None:
            data, handler = self.plan.apply(self.data, self.batches.next())
        self.optimizer.zero_grad(set_to_none=True)
        before = random_state()
        with handler, warnings.catch_warnings():
            # What Pyro warns of here is raised below, with the site's name.
            warnings.filterwarnings("ignore", message="Encountered ")
            loss = self.estimator.loss_and_grads(self.model, self.guide, **data)
        bad_gradient = next(
            (p for p in self.leaves if p.grad is not None and not torch.isfinite(p.grad).all()),
            None,
        )
        if not math.isfinite(loss) or bad_gradient is not None:
            set_random_state(before)
            raise blame(self.model, self.guide, data, handler, self.step, loss, bad_gradient)
        self.check_parameters()
        rates = self.next_rates(1)
        if rates is not None:
            for group, rate in zip(self.optimizer.param_groups, rates[0], strict=True):
                group["lr"] = float(rate)
        self.optimizer.step()
        self.step += 1
        self.elbo.append(-loss)
        self.block_sum += flat(self.leaves)
        self.in_block += 1
        return -loss

    def next_rates(self, steps: int) -> np.ndarray | None:
        """Scheduled learning rates of the next steps, (steps, groups); None without a schedule."""
        if self.rates is None:
            return None
        return self.rates[np.minimum(self.step + np.arange(steps), len(self.rates) - 1)]

    def check_parameters(self) -> None:
        """Raise ValueError if a parameter has appeared since the first step."""
        new = [p for p in unique_leaves() if not any(p is q for q in self.leaves)]
        if new:
            names = [n for n, p in pyro.get_param_store().named_parameters() if p is new[0]]
            raise ValueError(
                f"the parameter {names[0]!r} appeared only at step {self.step}: register every "
                "pyro.param on every run of the model or guide"
            )

    def check_stage(self) -> bool:
        """Check the stage if it is long enough; returns whether it was checked."""
        if self.in_block < self.block_length:
            return False
        self.blocks.append(self.block_sum / self.block_length)
        self.block_sum, self.in_block = torch.zeros_like(self.block_sum), 0
        if len(self.blocks) < BLOCKS:
            return False
        tail = torch.stack(self.blocks[BLOCKS // 4 :])
        if self.rates is not None or drifts(tail):  # a schedule has no stages of constant size
            self._merge_blocks()
            return True
        scale, average = self.fisher_scale(), tail.mean(0)
        noises = monte_carlo_error(tail)
        noise = float((noises * scale).max())
        self.error = math.inf
        if self.stage_average is not None and self.stage_noise is not None:
            # A bias that is linear in the step size shrinks fourfold with each stage, so what
            # remains is a third of the move between the stages, their noise taken out.
            square = (average - self.stage_average) ** 2 - self.stage_noise**2 - noises**2
            moved = float((square.clamp_min(0).sqrt() * scale).max())
            self.error = max(noise, moved * SHRINK / (1 - SHRINK))
        if self.stage_average is not None and noise > ERROR_TOLERANCE:
            self._merge_blocks()  # only more steps make an average more precise
            return True
        if self.converged:
            self._merge_blocks()  # if it is extended, the fit goes on with longer blocks
            return True
        self.stage_average, self.stage_noise, self.blocks = average, noises, []
        self.stage += 1
        for group in self.optimizer.param_groups:
            group["lr"] *= SHRINK
        return True

    def _merge_blocks(self) -> None:
        pairs = zip(self.blocks[::2], self.blocks[1::2], strict=True)
        self.blocks = [(a + b) / 2 for a, b in pairs]
        self.block_length *= 2

    @kept_random_state()
    def fisher_scale(self, num_draws: int = 64) -> torch.Tensor:
        """Square root of the guide's Fisher information of each parameter: 1/sd for a location.

        A change of a parameter times this scale is the change in posterior standard deviations
        (root 2 times that for a log scale). Parameters that the guide's density does not depend on,
        such as those of the model, get 0: their error is not judged.

        Returns:
            Shape (number of parameters,), flat over all leaves.
        """
        torch.manual_seed(self.step)
        total = torch.zeros_like(self.block_sum)
        data: Mapping[str, Any] = self.data
        handler: contextlib.AbstractContextManager = contextlib.nullcontext()
        if self.plan is not None:
            rows = torch.randint(0, self.plan.size, (self.plan.batch,))
            data, handler = self.plan.apply(self.data, rows)
        for _ in range(num_draws):
            with handler:
                with torch.no_grad():
                    values = poutine.trace(self.guide).get_trace(**data)
                # A second run at these draws: they are constants, and only log q depends on the
                # parameters.
                replayed = poutine.replay(self.guide, trace=values)
                trace: Any = poutine.trace(replayed).get_trace(**data)
            log_q = sum(
                site["fn"].log_prob(site["value"].detach()).sum()
                for site in trace.nodes.values()
                if is_term(site) and not (is_point(site) or is_factor(site))
            )
            if not isinstance(log_q, torch.Tensor) or not log_q.requires_grad:
                return total
            grads = torch.autograd.grad(log_q, self.leaves, allow_unused=True)
            total += torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).reshape(-1)
                    for p, g in zip(self.leaves, grads, strict=True)
                ]
            ).square()
        return (total / num_draws).sqrt()

    def result(self) -> torch.Tensor:
        """The parameters to report, flat: an average if the iterates no longer drift."""
        if self.average and len(self.blocks) >= BLOCKS // 2:
            tail = torch.stack(self.blocks[len(self.blocks) // 4 :])
            if self.stage or not drifts(tail):
                return tail.mean(0)
        if self.average and self.stage_average is not None:
            return self.stage_average
        return flat(self.leaves)

    def advance(
        self,
        steps: int | None,
        report: Callable[[int, list[float], float], None],
        look: Callable[[], bool] = lambda: False,
    ) -> None:
        """Take ``steps`` steps, or as many as convergence needs if None.

        Args:
            steps: number of optimiser steps.
            report: called after each eager step and each call of compiled steps, with the number of
                steps so far, the ELBOs of the new steps and the error so far.
            look: called after each check of a stage; ends the run if it returns True. Without
                ``steps``, the run also ends at convergence.
        """
        end = None if steps is None else self.step + steps
        set_random_state(self.rng)
        try:
            self.stepper.begin(steps)
            while (left := self._left(end)) > 0:
                # A call must end at the end of a block, whose sum is complete then.
                elbos = self.stepper.advance(min(left, self.block_length - self.in_block))
                checked = self.check_stage()
                report(self.step, elbos, self.error)
                if checked and (look() or (steps is None and self.converged)):
                    break
                if checked:
                    self.stepper.recheck_python()  # ``look`` may have changed things
            self.stepper.finish()
        finally:
            self.rng = random_state()

    def _left(self, end: int | None) -> int:
        if end is None:
            end = MOST_COMPILED_STEPS if self.stepper.compiles else MOST_STEPS
        return end - self.step

    def state(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit, as nested dicts of tensors and numbers.

        The model's and guide's parameters are in it, flat, under "iterate".
        """
        return {
            "iterate": flat(self.leaves),
            "optimizer": self.optimizer.state_dict(),
            "batches": self.batches.state() if self.batches else None,
            "rng": self.rng,
            "step": self.step,
            "stage": self.stage,
            "rates": None if self.rates is None else torch.from_numpy(self.rates),
            "block_length": self.block_length,
            "in_block": self.in_block,
            "block_sum": self.block_sum,
            "blocks": torch.stack(self.blocks) if self.blocks else None,
            "stage_average": self.stage_average,
            "stage_noise": self.stage_noise,
            "error": self.error,
            "elbo": torch.tensor(self.elbo, dtype=torch.float64),
            "estimator": self.estimator.state() if hasattr(self.estimator, "state") else {},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to what :meth:`state` returned."""
        unflat(state["iterate"], self.leaves)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.batches:
            self.batches.restore(state["batches"])
        self.rng = state["rng"]
        self.step, self.stage = int(state["step"]), int(state["stage"])
        self.rates = None if state["rates"] is None else state["rates"].numpy()
        self.block_length, self.in_block = int(state["block_length"]), int(state["in_block"])
        self.block_sum = state["block_sum"]
        self.blocks = list(state["blocks"]) if state["blocks"] is not None else []
        self.stage_average = state["stage_average"]
        self.stage_noise = state.get("stage_noise")
        self.error = float(state["error"])
        self.elbo = state["elbo"].tolist()
        if hasattr(self.estimator, "load_state"):
            self.estimator.load_state(state["estimator"])


def drifts(blocks: torch.Tensor) -> bool:
    """Whether the iterates still move in one direction.

    Compares the means of the two halves. For iterates in equilibrium the squared standardised
    difference is about 1 on average over the parameters, a little more with autocorrelation.

    Args:
        blocks: block means, shape (blocks, parameters).
    """
    half = len(blocks) // 2
    first, second = blocks[:half], blocks[half:]
    variance = first.var(0) / half + second.var(0) / (len(blocks) - half)
    live = variance > 0
    if not live.any():
        return False
    t = (second.mean(0) - first.mean(0))[live].square() / variance[live]
    return float(t.mean()) > 4.0


def monte_carlo_error(blocks: torch.Tensor) -> torch.Tensor:
    """Standard error of the mean over the blocks, by 8 batch means.

    Args:
        blocks: block means, shape (blocks, parameters).

    Returns:
        Shape (parameters,).
    """
    batches = torch.stack([b.mean(0) for b in blocks.tensor_split(8)])
    return batches.std(0) / math.sqrt(8)
