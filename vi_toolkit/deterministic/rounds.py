"""Deterministic VI: fix the base noise, then optimise as one optimises any smooth function.

With base noise z_1..z_M fixed, the ELBO of a reparameterised guide,

    L_M(lambda) = 1/M sum_m [log p(x, t_lambda(z_m)) - log q_lambda(t_lambda(z_m))],

is an ordinary function of the variational parameters lambda. It has a gradient without noise, so
quasi-Newton methods apply: no learning rate, no schedule, and an optimum one can check. What
fixing the draws costs is a Monte Carlo error of the optimum, which is measured here by solving
again with fresh draws, twice as many, until the solution stays where it was.

The idea is Giordano, Ingram and Broderick, "Black Box Variational Inference with a Deterministic
Objective", JMLR 2024. Added here: quasi-random moment-matched draws (exact for Gaussian
posteriors), whitening by the curvature, full-rank and low-rank families and any reparameterised
Pyro guide, and starts from many places ranked by their ELBO.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from vi_toolkit.deterministic.objective import (
    FamilyProblem,
    GuideProblem,
    Problem,
    first_draws,
    normals,
)
from vi_toolkit.deterministic.solver import GRADIENT_TOLERANCE, solve

ERROR_TOLERANCE = 0.02  # posterior sds: Monte Carlo error of the solution at which doubling stops
MOST_DRAWS = 2**14
POINT = 1e-12  # sd relative to the mean below which a latent is a point
MOST_WORK = 4e8  # draws times observations per evaluation: where doubling stops for want of time


@dataclass
class Progress:
    """Where a deterministic fit stands; one round is one solution at one number of draws."""

    problem: Problem
    rounds: int = 0
    num_draws: int = 0
    error: float = math.inf
    gradient: float = math.inf
    elbo: list[float] = field(default_factory=list)

    @property
    def converged(self) -> bool:
        return self.error <= ERROR_TOLERANCE and self.gradient <= GRADIENT_TOLERANCE


def solve_rounds(
    progress: Progress,
    seed: int,
    observations: int,
    dtype: torch.dtype,
    rounds: int | None,
    report: Callable[[str], None],
    checkpoint: Callable[[Progress], bool | None],
) -> Progress:
    """Solve with ever more fresh draws until two solutions in a row agree.

    Every round is a function of the one before it, the seed and its number only, so that going on
    later gives what not stopping would have given.

    Args:
        progress: where to go on from; changed after each completed round.
        seed: of the draws.
        observations: observed scalars, which with the draws bound the work.
        dtype: floating dtype to work in.
        rounds: stop after that many rounds in all, converged or not; None for no bound but work.
        report: called with lines of progress.
        checkpoint: called after each completed round; ends the fit if it returns True.
    """
    problem = progress.problem
    while True:
        if progress.rounds == 0:
            num_draws = first_draws(problem)
            if isinstance(problem, GuideProblem):
                problem = problem.rewhitened(normals(problem, 64, seed, 10_001, dtype))
        else:
            num_draws = 2 * progress.num_draws
        z = normals(problem, num_draws, seed, progress.rounds, dtype)
        before = problem.moments() if progress.rounds else None

        def each(elbo: float, num_draws: int = num_draws) -> None:
            report(f"{num_draws} draws, ELBO {elbo:.3f}")

        history: list[float] = []
        problem, value, gradient = solve(problem, z, history, each)
        if not math.isfinite(value):
            return progress
        problem = problem.rewhitened(z) if isinstance(problem, FamilyProblem) else problem
        if before is not None:
            mean, sd = problem.moments()
            # Solutions from M/2 and M independent draws: sd of the difference = sqrt(3) x that
            # of the second, if errors fall as 1/sqrt(num_draws) or faster.
            spread = sd > POINT * (1 + mean.abs())  # a guide may hold some latents at a point
            shift = torch.maximum(
                (mean - before[0]).abs() / sd.clamp_min(1e-300), (sd / before[1]).log().abs()
            )[spread]
            progress.error = float(shift.max()) / math.sqrt(3) if len(shift) else 0.0
        if problem.noise_dim == 0:
            progress.error = 0.0
        progress.problem, progress.num_draws, progress.gradient = problem, num_draws, gradient
        progress.rounds += 1
        progress.elbo.extend(history or [value])
        ended = checkpoint(progress)
        if ended or progress.converged or (rounds is not None and progress.rounds >= rounds):
            return progress
        if 2 * num_draws > MOST_DRAWS or 2.0 * num_draws * max(observations, 1) > MOST_WORK:
            return progress
