"""A stochastic fit: its settings and state, how it goes on, and how it is stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from pyro.infer import ELBO
from tqdm.auto import tqdm

from vi_toolkit.estimators import PathDerivative, Reparam
from vi_toolkit.estimators.description import describe, make
from vi_toolkit.look import Callback, Look
from vi_toolkit.programs.isolation import seeded_state
from vi_toolkit.programs.jumps import Jump, jumps_of
from vi_toolkit.programs.leaves import flat, unflat, unique_leaves
from vi_toolkit.programs.minibatch_plan import minibatch_plan
from vi_toolkit.programs.workspace import Workspace
from vi_toolkit.stochastic.schedule import Schedule, scheduled_rates
from vi_toolkit.stochastic.stages import Stochastic

Optimizer = float | Callable[[list[torch.Tensor]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Settings:
    """How to take stochastic steps; the arguments of ``fit`` of the same names."""

    estimator: ELBO
    optimizer: Optimizer
    average: bool = True
    compile: str | bool = "auto"
    schedule: Schedule | None = None
    steps: int | None = None  # over which the schedule goes


class StochasticRun:
    """Where a stochastic fit stands.

    Args:
        workspace: set up; its ``subsample`` says which plate to take minibatches of.
        seed: of the draws and the minibatches.
        settings: see :class:`Settings`.
    """

    method = "stochastic"

    def __init__(self, workspace: Workspace, seed: int, settings: Settings):
        self.workspace, self.seed, self.settings = workspace, seed, settings
        self.cannot_extend = ""
        plan = None
        if workspace.subsample:
            ((name, batch),) = workspace.subsample.items()
            plan = minibatch_plan(workspace, name, batch)
        estimator: Any = settings.estimator
        rate = settings.optimizer
        optimizer = rate if callable(rate) else partial(torch.optim.Adam, lr=rate)
        rates = None
        with workspace.isolated(seeded_state(seed)):
            if settings.schedule is not None:
                assert settings.steps is not None
                leaves = unique_leaves()
                rates = scheduled_rates(optimizer, leaves, settings.schedule, settings.steps)
            self.stages = Stochastic(
                workspace.model,
                workspace.guide,
                workspace.data,
                # What an estimator learns belongs to one fit.
                estimator.fresh() if hasattr(estimator, "fresh") else estimator,
                optimizer,
                plan,
                seed,
                settings.average,
                settings.compile,
                rates,
            )
        self.iterate = torch.empty(0)  # where the last step ended, which is not the average
        self.jumps: list[Jump] = []

    def start(
        self, steps: int | None, description: str, show: bool, callback: Callback | None
    ) -> bool:
        """Take ``steps`` steps, or until convergence; returns whether Ctrl-C ended it."""
        return self._advance(steps, description, show, callback)

    def extend(self, steps: int | None, show: bool, callback: Callback | None = None) -> bool:
        """Take so many further steps."""
        if self.cannot_extend:
            raise ValueError(self.cannot_extend)
        if steps is None or steps < 1:
            raise ValueError("extend(steps) needs the number of further steps")
        return self._advance(steps, "fit", show, callback)

    def _advance(
        self, steps: int | None, description: str, show: bool, callback: Callback | None
    ) -> bool:
        stages = self.stages
        bar = tqdm(total=steps, disable=not show, desc=description, unit="step")
        smooth, seen = 0.0, len(stages.elbo)

        def report(step: int, elbos: list[float], error: float) -> None:
            nonlocal smooth
            for elbo in elbos:
                smooth = 0.98 * smooth + 0.02 * elbo if smooth else elbo
            bar.update(len(elbos))
            if step % 50 < len(elbos):
                bar.set_postfix_str(f"ELBO {smooth:.2f}", refresh=False)

        def look() -> bool:
            nonlocal seen
            new, seen = stages.elbo[seen:], len(stages.elbo)
            shown = Look(self.method, stages.step, new, stages.error)
            return bool(callback and callback(shown))

        try:
            with self.workspace.isolated():
                if stages.step:
                    unflat(self.iterate, stages.leaves)
                try:
                    stages.advance(steps, report, look)
                finally:
                    self.report_average()
        except KeyboardInterrupt:
            return True
        finally:
            bar.close()
        return False

    def report_average(self) -> None:
        """Put the parameters to report in place of the last iterate, which is kept to go on from.

        Inside the workspace's isolation.
        """
        self.iterate = flat(self.stages.leaves)
        unflat(self.stages.result(), self.stages.leaves)
        self.workspace.snapshot_params()

    def look_for_jumps(self) -> None:
        """See whether the gradients missed jumps of the density, where they cannot see them."""
        if isinstance(self.settings.estimator, Reparam | PathDerivative):
            self.jumps = jumps_of(self.workspace, self.seed, self.stages.plan)

    # ---------------------------------------------------------------- what it found

    @property
    def elbo(self) -> np.ndarray:
        """An ELBO estimate per step, in nats."""
        return np.asarray(self.stages.elbo)

    @property
    def last_elbo(self) -> str:
        """The newest ELBO in words, for a summary."""
        tail = self.elbo[-400:]
        return (
            f"{tail.mean():.2f} (mean of the last {len(tail)} steps)" if len(tail) else "none yet"
        )

    @property
    def converged(self) -> bool:
        """Whether the Monte Carlo error is small, and no gradient missed a jump of the density."""
        return self.stages.converged and not self.jumps

    @property
    def error(self) -> float:
        """Largest Monte Carlo error of the averaged iterate, in posterior sds."""
        return self.stages.error

    @property
    def convergence(self) -> str:
        """How close this is to the optimum, in one sentence."""
        stages = self.stages
        if self.jumps:
            return str(self.jumps[0])
        if self.converged:
            return f"converged after {stages.step} steps: Monte Carlo error {stages.error:.3f} sd"
        known = f"{stages.error:.3f}" if math.isfinite(stages.error) else "not known"
        return (
            f"Not converged after {stages.step} steps: the averaged iterate's Monte Carlo "
            f"error is {known}, wanted 0.02 posterior sds. Continue with fit.extend(steps)."
        )

    # ---------------------------------------------------------------- stored

    def state(self) -> dict[str, Any]:
        """Everything that :meth:`extend` needs, as nested dicts of tensors, numbers and text."""
        optimizer = self.settings.optimizer
        return {
            "kind": self.method,
            "running": self.stages.state() | {"iterate": self.iterate},
            "rate": optimizer if isinstance(optimizer, float) else None,
            "estimator": describe(self.settings.estimator),
            "subsample": self.workspace.subsample,
            "average": self.settings.average,
            "compile": self.settings.compile,
            "jumps": [dict(vars(jump)) for jump in self.jumps],
        }

    @classmethod
    def restored(
        cls,
        workspace: Workspace,
        seed: int,
        state: Mapping[str, Any],
        estimator: ELBO | None,
        optimizer: Callable[[list[torch.Tensor]], torch.optim.Optimizer] | None,
        default: Settings,
    ) -> StochasticRun:
        """A run as :meth:`state` described it.

        Args:
            estimator, optimizer: the caller's own, where the state cannot hold them.
            default: for what neither the state nor the caller has; such a run cannot be extended.
        """
        if estimator is None and state["estimator"] is not None:
            estimator = make(state["estimator"])
        known = state["rate"] if state["rate"] is not None else optimizer
        settings = Settings(
            default.estimator if estimator is None else estimator,
            default.optimizer if known is None else known,
            state["average"],
            state.get("compile", "auto"),
        )
        reported = dict(workspace.values)
        run = cls(workspace, seed, settings)
        running = dict(state["running"])
        if known is None:
            # Without the optimiser's code its state cannot be taken up; all else can.
            running["optimizer"] = run.stages.optimizer.state_dict()
            run.cannot_extend = "pass optimizer= to vi.load to continue this fit"
        if estimator is None:
            running["estimator"] = {}
            run.cannot_extend = "pass estimator= to vi.load to continue this fit"
        with workspace.isolated():
            run.stages.restore(running)  # leaves the iterate in the parameters
        workspace.load_params(reported)
        run.iterate = running["iterate"]
        run.jumps = [Jump(**jump) for jump in state["jumps"]]
        return run
