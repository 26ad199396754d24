"""L-BFGS on the fixed-draw ELBO, in coordinates whitened by its curvature."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import scipy.optimize
import torch

from vi_toolkit.deterministic.objective import P, Problem

GRADIENT_TOLERANCE = 5e-3  # whitened coordinates: about the distance to the optimum in sds


def maximise(
    problem: P,
    z: torch.Tensor,
    iterations: int,
    history: list[float] | None = None,
    each: Callable[[float], None] = lambda elbo: None,
) -> tuple[P, float, float]:
    """L-BFGS on the fixed-draw ELBO.

    A point where the ELBO is not finite, or where the model raises, is a rejected point of the
    line search. The coordinates stay within the problem's trust radius, and are renewed if they end
    on its border: a quasi-Newton method may otherwise jump, in one step, to where a log density
    is nothing but rounding error.

    Returns:
        The problem moved to the best point found, the ELBO there and the largest entry of its
        gradient.
    """
    value, gradient, left = -math.inf, math.inf, iterations
    while left > 0:
        x, value, gradient, used = _maximise_within_reach(problem, z, left, history, each)
        trust_radius = problem.trust_radius
        problem = problem.moved(x)
        left -= max(used, 1)
        if trust_radius is None or not bool((x.abs() > 0.999 * trust_radius).any()):
            break
    return problem, value, gradient


def _maximise_within_reach(
    problem: Problem,
    z: torch.Tensor,
    iterations: int,
    history: list[float] | None,
    each: Callable[[float], None],
) -> tuple[torch.Tensor, float, float, int]:
    best_x = torch.zeros(problem.size, dtype=z.dtype)
    best_value, best_gradient = -math.inf, math.inf

    def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal best_x, best_value, best_gradient
        point = torch.as_tensor(x).to(z.dtype)
        try:
            value, gradient = problem.value_and_gradient(point, z)
        except (ArithmeticError, RuntimeError, ValueError):
            return 1e100, np.zeros_like(x)
        if not (math.isfinite(value) and torch.isfinite(gradient).all()):
            return 1e100, np.zeros_like(x)
        if value > best_value:
            best_x, best_value = point.clone(), value
            best_gradient = float(gradient.abs().max()) if len(gradient) else 0.0
        return -value, -gradient.numpy().astype(np.float64)

    def after_iteration(x: np.ndarray) -> None:
        if history is not None:
            history.append(best_value)
        each(best_value)

    trust_radius = problem.trust_radius
    result = scipy.optimize.minimize(
        objective,
        np.zeros(problem.size),
        jac=True,
        method="L-BFGS-B",
        bounds=None
        if trust_radius is None
        else np.stack([-trust_radius.numpy(), trust_radius.numpy()], 1),
        callback=after_iteration,
        options={
            "maxiter": iterations,
            "maxfun": 2 * iterations,
            "maxcor": 30,
            "ftol": 1e-13 if z.dtype == torch.float64 else 1e-8,
            "gtol": 1e-5,
        },
    )
    return best_x, best_value, best_gradient, int(result.nit)


def solve(
    problem: Problem,
    z: torch.Tensor,
    history: list[float] | None = None,
    each: Callable[[float], None] = lambda elbo: None,
) -> tuple[Problem, float, float]:
    """Maximise to convergence, renewing the whitening where it no longer fits."""
    value, gradient = -math.inf, math.inf
    for _ in range(5):
        problem, value, gradient = maximise(problem, z, 300, history, each)
        if gradient <= GRADIENT_TOLERANCE or not math.isfinite(value):
            break
        problem = problem.rewhitened(z)
    return problem, value, gradient
