"""A deterministic fit: its state, how it goes on, and how it is stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from pyro.infer.autoguide import AutoDelta
from tqdm.auto import tqdm

from vi_toolkit import machine_code
from vi_toolkit.deterministic.families import (
    FAMILIES,
    FAMILY_OF,
    FullRank,
    guide_family,
    set_parameter,
    write_to_guide,
)
from vi_toolkit.deterministic.modes import find_modes, hessians
from vi_toolkit.deterministic.objective import (
    FamilyProblem,
    GuideProblem,
    Problem,
    first_draws,
    noise_needed,
    normals,
)
from vi_toolkit.deterministic.rounds import Progress, solve_rounds
from vi_toolkit.deterministic.solver import GRADIENT_TOLERANCE
from vi_toolkit.deterministic.starts import family_starter, first_problem, warm_started
from vi_toolkit.errors import NonFiniteError
from vi_toolkit.look import Callback, Look
from vi_toolkit.programs.isolation import seeded_state
from vi_toolkit.programs.jumps import Jump, jumps_of
from vi_toolkit.programs.leaves import unflat
from vi_toolkit.programs.nonfinite import first_non_finite
from vi_toolkit.programs.private_guide import asks_for_laplace
from vi_toolkit.programs.prototype import prototype
from vi_toolkit.programs.workspace import Workspace

STARTS = 16  # points from which modes are looked for
COMPILED_WORK = 4e6  # draws times observations from which compiling the density pays


class DeterministicRun:
    """Where a deterministic fit stands.

    Args:
        workspace: set up, in the precision to work in.
        seed: of the fixed draws and the starts.
        compile: whether to compile the log density: True, False or "auto".
    """

    method = "deterministic"

    def __init__(self, workspace: Workspace, seed: int, compile: str | bool = "auto"):
        self.workspace, self.seed, self.compile = workspace, seed, compile
        self.progress: Progress | None = None
        self.jumps: list[Jump] = []

    def start(self, description: str, show: bool, callback: Callback | None) -> bool:
        """Look for modes, then solve until converged; returns whether Ctrl-C ended it."""
        return self._solve(None, description, show, callback)

    def extend(self, steps: int | None, show: bool, callback: Callback | None = None) -> bool:
        """Solve again with twice as many fresh draws, until converged."""
        if steps is not None:
            raise ValueError(
                "this fit is deterministic: call extend() without steps to solve again with "
                "twice the draws, or fit with steps= for stochastic steps"
            )
        rounds = self.progress.rounds + 1 if self.progress and self.converged else None
        return self._solve(rounds, "fit", show, callback)

    def _solve(
        self, rounds: int | None, description: str, show: bool, callback: Callback | None
    ) -> bool:
        workspace, interrupted = self.workspace, False
        bar = tqdm(disable=not show, desc=description, bar_format="{desc} [{elapsed}]")

        def report(message: str) -> None:
            if show:
                bar.set_description_str(f"{description}: {message}")

        def checkpoint(progress: Progress) -> bool:
            self.write_solution()
            if progress.rounds == 1:
                self.jumps = jumps_of(workspace, self.seed)
            look = Look(self.method, progress.rounds, progress.elbo[-1:], progress.error)
            return bool(callback and callback(look)) or bool(self.jumps)

        try:
            joint = workspace.joint
            with workspace.isolated(seeded_state(self.seed)):
                self._compile_density(report)
                if asks_for_laplace(workspace.given_guide):
                    self.progress = self._laplace(report)
                    checkpoint(self.progress)
                else:
                    if self.progress is None:
                        self.progress = Progress(self._first_problem(report))
                        self.write_solution()
                    solve_rounds(
                        self.progress,
                        self.seed,
                        joint.observations,
                        workspace.dtype,
                        rounds,
                        report,
                        checkpoint,
                    )
                workspace.snapshot_params()
        except KeyboardInterrupt:
            if self.progress is None:
                raise  # still looking for modes: there is nothing to return
            interrupted = True
        finally:
            bar.close()
        if self.progress.rounds == 0 and not interrupted:
            raise self._non_finite()
        return interrupted

    def _compile_density(self, report: Callable[[str], None]) -> None:
        joint = self.workspace.joint
        work = joint.observations * max(128, 8 * joint.dim)
        pays = work >= COMPILED_WORK and guide_family(self.workspace.guide) is not None
        if self.compile is True or (self.compile == "auto" and pays):
            report("compiling the log density")
            machine_code.compile_joint(joint, insist=self.compile is True)

    def _laplace(self, report: Callable[[str], None]) -> Progress:
        """The Gaussian at the highest mode whose precision is minus the Hessian there."""
        joint = self.workspace.joint
        report("looking for modes")
        modes = find_modes(joint, STARTS, self.seed, report=report)
        if not modes:
            raise self._non_finite()
        precision = -hessians(joint, modes[0].location[None])[0]
        problem = FamilyProblem(joint, FullRank.around(modes[0].location, precision))
        z = normals(problem, first_draws(problem), self.seed, 0, self.workspace.dtype)
        elbo, _ = problem.value_and_gradient(torch.zeros(problem.size, dtype=z.dtype), z)
        # Nothing is estimated from draws, and at a mode the density has no gradient.
        exact = 0.0 if modes[0].converged else math.inf
        return Progress(problem, 1, len(z), exact, exact, [elbo])

    def _first_problem(self, report: Callable[[str], None]) -> Problem:
        workspace, guide = self.workspace, self.workspace.guide
        joint, kind = workspace.joint, type(guide)
        if kind in FAMILY_OF:
            family, isotropic = family_starter(kind, getattr(guide, "rank", None))
            problem = first_problem(joint, family, isotropic, STARTS, self.seed, report)
            if problem is None:
                raise self._non_finite()
            return problem
        report("looking for modes")
        modes = find_modes(joint, STARTS, self.seed, report=report)
        noise = noise_needed(guide, workspace.data)
        if modes and kind is AutoDelta:
            for name, value in joint.unflatten(modes[0].location).items():
                set_parameter(guide, name, value)
        general = GuideProblem(workspace.model, guide, workspace.data, joint, noise)
        return warm_started(general, modes, self.seed) if noise else general

    def write_solution(self) -> None:
        """Put the solution into the guide's parameters; inside the workspace's isolation."""
        problem = self.progress.problem if self.progress else None
        if isinstance(problem, FamilyProblem):
            write_to_guide(self.workspace.guide, self.workspace.joint, problem.q)
        elif isinstance(problem, GuideProblem):
            unflat(problem.origin, problem.leaves)
        self.workspace.snapshot_params()

    def _non_finite(self) -> NonFiniteError:
        workspace = self.workspace
        with workspace.isolated(seeded_state(self.seed)):
            found = first_non_finite(prototype(workspace.model, workspace.data), "model")
        where = found[2] if found else "its log joint density is not finite"
        return NonFiniteError(
            f"No start has a finite ELBO: at the prior medians, {where}. Check the data against "
            "the likelihood's support, and the priors' scales.",
            site=found[0] if found else None,
            index=found[1] if found else None,
            step=0,
        )

    # ---------------------------------------------------------------- what it found

    @property
    def elbo(self) -> np.ndarray:
        """ELBO over the fixed draws after each quasi-Newton iteration, in nats."""
        return np.asarray(self.progress.elbo if self.progress else [])

    @property
    def last_elbo(self) -> str:
        """The newest ELBO in words, for a summary."""
        return f"{self.elbo[-1]:.2f}" if len(self.elbo) else "none yet"

    @property
    def converged(self) -> bool:
        """Whether gradient and Monte Carlo error are small, and the density does not jump."""
        return self.progress is not None and self.progress.converged and not self.jumps

    @property
    def error(self) -> float:
        """Largest Monte Carlo error of the solution, in posterior sds."""
        return self.progress.error if self.progress else math.inf

    @property
    def convergence(self) -> str:
        """How close this is to the optimum, in one sentence."""
        p = self.progress
        if p is None or p.rounds == 0:
            return "Nothing was optimised yet."
        if self.jumps:
            return str(self.jumps[0])
        if self.converged:
            return (
                f"converged with {p.num_draws} draws: Monte Carlo error {p.error:.4f} sd, largest "
                f"gradient {p.gradient:.0e} per sd"
            )
        known = f"{p.error:.3f}" if math.isfinite(p.error) else "not known"
        reason = (
            f"the largest gradient is {p.gradient:.1e} per sd"
            if p.gradient > GRADIENT_TOLERANCE
            else f"the Monte Carlo error is {known}, wanted 0.02 posterior sds"
        )
        return f"Not converged with {p.num_draws} draws: {reason}. See fit.extend()."

    # ---------------------------------------------------------------- stored

    def state(self) -> dict[str, Any] | None:
        """Everything that :meth:`extend` needs, as nested dicts of tensors, numbers and text."""
        progress = self.progress
        if progress is None:
            return None
        state: dict[str, Any] = {
            "kind": self.method,
            "rounds": progress.rounds,
            "draws": progress.num_draws,
            "error": progress.error,
            "gradient": progress.gradient,
            "elbo": torch.tensor(progress.elbo, dtype=torch.float64),
            "jumps": [dict(vars(jump)) for jump in self.jumps],
        }
        problem = progress.problem
        if isinstance(problem, FamilyProblem):
            state["family"] = problem.q.name
            state["member"] = dict(vars(problem.q))
        elif isinstance(problem, GuideProblem):
            state["family"] = None
            state["member"] = {"origin": problem.origin, "basis": problem.basis}
            state["noise"] = problem.noise_dim
        return state

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to where :meth:`state` was taken."""
        workspace, member = self.workspace, state["member"]
        problem: Problem
        if state["family"] is not None:
            problem = FamilyProblem(workspace.joint, FAMILIES[state["family"]](**member))
        else:
            joint = workspace.joint
            with workspace.isolated():
                problem = GuideProblem(
                    workspace.model,
                    workspace.guide,
                    workspace.data,
                    joint,
                    state["noise"],
                    **member,
                )
        self.progress = Progress(
            problem,
            state["rounds"],
            state["draws"],
            state["error"],
            state["gradient"],
            state["elbo"].tolist(),
        )
        self.jumps = [Jump(**jump) for jump in state["jumps"]]
