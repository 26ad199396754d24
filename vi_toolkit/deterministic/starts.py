"""Where a deterministic fit starts: the best by ELBO of many modes and of points that know none."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from vi_toolkit.deterministic.families import FAMILY_OF, Family, LowRank, positive_definite
from vi_toolkit.deterministic.modes import Mode, find_modes
from vi_toolkit.deterministic.objective import (
    FamilyProblem,
    GuideProblem,
    Problem,
    first_draws,
    normals,
)
from vi_toolkit.deterministic.solver import maximise
from vi_toolkit.programs.joint import Joint
from vi_toolkit.programs.leaves import unflat

POLISHED_STARTS = 3


def first_problem(
    joint: Joint,
    family: Callable[[torch.Tensor, torch.Tensor], Family],
    isotropic: Callable[[torch.Tensor], Family] | None,
    starts: int,
    seed: int,
    report: Callable[[str], None],
) -> FamilyProblem | None:
    """The family's member to start from: best by ELBO over modes reached from many starts."""
    report("looking for modes")
    modes = find_modes(joint, starts, seed, report=report)
    at_modes = [FamilyProblem(joint, family(m.location, m.precision)) for m in modes]
    elsewhere = []
    if isotropic is not None:
        generator = torch.Generator().manual_seed(seed)
        spread = torch.randn(2, joint.dim, generator=generator, dtype=joint.start.dtype)
        for centre in (joint.start, torch.zeros_like(joint.start), *spread):
            elsewhere.append(FamilyProblem(joint, isotropic(centre)))
    if not at_modes + elsewhere:
        return None
    z = normals(
        (at_modes + elsewhere)[0],
        first_draws((at_modes + elsewhere)[0]),
        seed,
        10_000,
        joint.start.dtype,
    )
    # A density may rise without bound towards a place of no mass and take every mode with it, so
    # the best of the starts that know nothing of modes always competes with the best of the modes.
    kept = [ranked(at_modes, z)[:POLISHED_STARTS], ranked(elsewhere, z)[:1]]
    finalists = [polished(group, z, 25, report) for group in kept if group]
    return polished(finalists or (at_modes + elsewhere)[:1], z, 100, report)


def polished(
    problems: list[FamilyProblem], z: torch.Tensor, iterations: int, report: Callable[[str], None]
) -> FamilyProblem:
    """The best of ``problems``, moved, after so many iterations of each."""
    if len(problems) == 1:
        return problems[0]
    best, best_value = problems[0], -math.inf
    for number, problem in enumerate(problems):
        report(f"start {number + 1} of {len(problems)}")
        end, value, _ = maximise(problem, z, iterations)
        # Equal optima differ by rounding; the first, from the better start, is then kept.
        if value > best_value + 1e-6 * abs(value):
            best, best_value = end, value
    return best


def ranked(problems: list[FamilyProblem], z: torch.Tensor) -> list[FamilyProblem]:
    """Those with a finite ELBO over the draws z, the best first."""
    scored = [(elbo_or_minus_infinity(p, z), i) for i, p in enumerate(problems)]
    return [problems[i] for elbo, i in sorted(scored, reverse=True) if elbo > -math.inf]


def elbo_or_minus_infinity(problem: Problem, z: torch.Tensor) -> float:
    """The ELBO over the draws z; minus infinity if it or its gradient is not finite."""
    try:
        value, gradient = problem.value_and_gradient(torch.zeros(problem.size, dtype=z.dtype), z)
    except (ArithmeticError, RuntimeError, ValueError):
        return -math.inf
    return value if math.isfinite(value) and torch.isfinite(gradient).all() else -math.inf


def warm_started(problem: GuideProblem, modes: list[Mode], seed: int) -> GuideProblem:
    """The better start of a guide: as it is, or fitted to the Laplace approximation at a mode."""
    dtype = problem.origin.dtype
    z = normals(problem, 128, seed, 10_000, dtype)
    best, best_value = problem, elbo_or_minus_infinity(problem, z)
    for mode in modes[:POLISHED_STARTS]:
        if mode.precision.dim() == 2:
            precision = positive_definite(mode.precision)
        else:
            precision = mode.precision.abs().clamp_min(1e-12)
        target = Mode(mode.location, mode.log_density, precision, True)
        unflat(problem.origin, problem.leaves)
        stand_in = problem.replaced(target=target).rewhitened(z)
        for _ in range(2):
            stand_in = maximise(stand_in, z, 100)[0].rewhitened(z)
        candidate = stand_in.replaced(target=None)
        candidate, value, _ = maximise(candidate, z, 50)
        if value > best_value:
            best, best_value = candidate, value
    unflat(best.origin, best.leaves)
    return best


def family_starter(guide_class: type, rank: int | None) -> tuple[Callable, Callable | None]:
    """Functions that make a member of the guide's family around a mode, and around a point.

    The second is None for a family that needs a curvature.
    """
    family = FAMILY_OF[guide_class]
    if family is LowRank:
        return (lambda m, p: LowRank.around(m, p, rank or 1)), None
    gaussian: Any = family
    return gaussian.around, lambda m: gaussian.isotropic(m, 0.1)
