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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import pyro
import pyro.poutine as poutine
import scipy.optimize
import torch

from vi_toolkit.families import Family, LowRank, positive_definite
from vi_toolkit.joint import Joint
from vi_toolkit.modes import Mode, find_modes
from vi_toolkit.noise import FixedNoise, RecordNoise, fixed_normals
from vi_toolkit.vectorise import Batched

ERROR_TOLERANCE = 0.02  # posterior sds: Monte Carlo error of the solution at which doubling stops
GRADIENT_TOLERANCE = 5e-3  # whitened coordinates: about the distance to the optimum in sds
MOST_DRAWS = 2**14
MOST_WORK = 4e8  # draws times observations per evaluation: where doubling stops for want of time
POLISHED_STARTS = 3


class Problem(Protocol):
    """Something whose ELBO over fixed draws can be maximised from x = 0."""

    @property
    def size(self) -> int: ...

    @property
    def noise_dim(self) -> int: ...

    @property
    def reach(self) -> torch.Tensor | None:
        """How far (size,) each coordinate may go before the origin is moved; None: anywhere."""

    def value_and_gradient(self, x: torch.Tensor, z: torch.Tensor) -> tuple[float, torch.Tensor]:
        """ELBO over the draws z (M, noise_dim) at coordinates x, and its gradient (size,)."""

    def moved(self, x: torch.Tensor) -> Self:
        """The same problem with x as its origin."""

    def rewhitened(self, z: torch.Tensor) -> Self:
        """The same problem in coordinates that fit the curvature at its origin."""

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and sd of every unconstrained latent scalar under the guide, (d,) each."""

    def mean_jacobian(self) -> torch.Tensor:
        """Derivative (d, size) of these means over the coordinates, at x = 0."""


P = TypeVar("P", bound=Problem)


@dataclass
class FamilyProblem:
    """A Gaussian family against a log joint density."""

    joint: Joint
    q: Family

    @property
    def size(self) -> int:
        return self.q.size

    @property
    def noise_dim(self) -> int:
        return self.q.noise_dim

    @property
    def reach(self) -> torch.Tensor:
        return self.q.reach()

    def value_and_gradient(self, x: torch.Tensor, z: torch.Tensor) -> tuple[float, torch.Tensor]:
        here = self.q.moved(x)
        gradient, value = self.joint.gradients(here.draws(z))
        return float(value.mean()) + here.entropy(), self.q.gradient(x, z, gradient)

    def moved(self, x: torch.Tensor) -> FamilyProblem:
        return FamilyProblem(self.joint, self.q.moved(x))

    def rewhitened(self, z: torch.Tensor) -> FamilyProblem:
        gradient, _ = self.joint.gradients(self.q.draws(z))
        return FamilyProblem(self.joint, self.q.rewhitened(z, gradient))

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.q.location, self.q.sd()

    def mean_jacobian(self) -> torch.Tensor:
        return self.q.mean_jacobian()


class GuideProblem:
    """Any reparameterised Pyro guide, through its unconstrained parameters.

    The parameters live in Pyro's parameter store (and in modules), where the guide reads them;
    evaluating at x writes them there. Coordinates: parameters = origin + basis @ x.
    """

    reach: torch.Tensor | None = None

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        data: Mapping[str, Any],
        joint: Joint,
        noise_dim: int,
        origin: torch.Tensor | None = None,
        basis: torch.Tensor | None = None,
        target: Mode | None = None,
    ):
        self.model, self.guide, self.data, self.joint = model, guide, data, joint
        self.noise_dim = noise_dim
        self.target = target
        self.leaves = unique_leaves()
        self.origin = flat(self.leaves) if origin is None else origin
        self.basis = torch.ones_like(self.origin) if basis is None else basis
        self.size = len(self.origin)
        self.per_draw = Batched(self._against_target if target else self._elbo, joint.chunk)

    def _replace(self, **changes: Any) -> GuideProblem:
        settings: dict[str, Any] = {"origin": self.origin, "basis": self.basis}
        settings |= {"target": self.target} | changes
        return GuideProblem(
            self.model, self.guide, self.data, self.joint, self.noise_dim, **settings
        )

    def _guide_trace(self, z: torch.Tensor) -> Any:
        with FixedNoise(z):
            return poutine.trace(self.guide).get_trace(**self.data)

    def _elbo(self, z: torch.Tensor) -> torch.Tensor:
        guide_trace = self._guide_trace(z)
        model_trace = poutine.trace(poutine.replay(self.model, trace=guide_trace)).get_trace(
            **self.data
        )
        return model_trace.log_prob_sum() - guide_trace.log_prob_sum()

    def _unconstrained(self, guide_trace: Any) -> torch.Tensor:
        return self.joint.flatten({n: guide_trace.nodes[n]["value"] for n in self.joint.sites})

    def _against_target(self, z: torch.Tensor) -> torch.Tensor:
        """The same with the posterior replaced by its Laplace approximation."""
        assert self.target is not None
        guide_trace = self._guide_trace(z)
        u = self._unconstrained(guide_trace)
        step, precision = u - self.target.location, self.target.precision
        quadratic = step @ precision @ step if precision.dim() == 2 else (step**2 * precision).sum()
        log_jacobian = sum(
            site.transform.log_abs_det_jacobian(
                u[site.slice].reshape(site.unconstrained_shape), guide_trace.nodes[name]["value"]
            ).sum()
            for name, site in self.joint.sites.items()
        )
        return -0.5 * quadratic - guide_trace.log_prob_sum() - log_jacobian

    def _write(self, x: torch.Tensor) -> None:
        step = self.basis @ x if self.basis.dim() == 2 else self.basis * x
        unflat(self.origin + step, self.leaves)

    def value_and_gradient(self, x: torch.Tensor, z: torch.Tensor) -> tuple[float, torch.Tensor]:
        self._write(x)
        chunk = self.joint.chunk
        total, gradient = 0.0, torch.zeros_like(self.origin)
        try:
            for part in z.split(chunk):
                elbo = self.per_draw(part).sum() / len(z)
                grads = torch.autograd.grad(elbo, self.leaves, allow_unused=True)
                total += float(elbo.detach())
                gradient += torch.cat(
                    [
                        (torch.zeros_like(p) if g is None else g).reshape(-1)
                        for p, g in zip(self.leaves, grads, strict=True)
                    ]
                )
        finally:
            self._write(torch.zeros_like(x))
        return total, self.basis.T @ gradient if self.basis.dim() == 2 else self.basis * gradient

    def moved(self, x: torch.Tensor) -> GuideProblem:
        step = self.basis @ x if self.basis.dim() == 2 else self.basis * x
        moved = self._replace(origin=self.origin + step)
        moved._write(torch.zeros_like(x))
        return moved

    def rewhitened(self, z: torch.Tensor) -> GuideProblem:
        """Coordinates in which the objective's curvature at the origin is about one."""
        plain = self._replace(basis=None)
        zero = torch.zeros_like(self.origin)
        step = 1e-4 if self.origin.dtype == torch.float64 else 1e-2
        if self.noise_dim:
            z = z[: len(z) // 2][:32]
            z = torch.cat([z, -z])

        def difference(direction: torch.Tensor) -> torch.Tensor:
            forward = plain.value_and_gradient(zero + step * direction, z)[1]
            backward = plain.value_and_gradient(zero - step * direction, z)[1]
            return (backward - forward) / (2 * step)

        if self.size <= 200:
            curvature = torch.stack([difference(e) for e in torch.eye(self.size, dtype=zero.dtype)])
            if not torch.isfinite(curvature).all():
                return self
            curvature = positive_definite((curvature + curvature.T) / 2, floor=1e-4)
            scale = curvature.diagonal().rsqrt()
            lam, vectors = torch.linalg.eigh(curvature * scale[:, None] * scale)
            return self._replace(basis=scale[:, None] * vectors * lam.rsqrt())
        generator = torch.Generator().manual_seed(0)
        diagonal = zero.clone()
        for _ in range(16):
            v = torch.randint(0, 2, zero.shape, generator=generator).to(zero.dtype) * 2 - 1
            diagonal += v * difference(v) / 16
        if not torch.isfinite(diagonal).all():
            return self
        typical = diagonal.abs().median().clamp_min(1e-8)
        return self._replace(basis=diagonal.abs().clamp_min(1e-2 * typical).rsqrt())

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.noise_dim == 0:
            z = torch.zeros(1, 0, dtype=self.origin.dtype)
        else:
            z = fixed_normals(512, self.noise_dim, 0).to(self.origin.dtype)
        with torch.no_grad():
            u = Batched(lambda z: self._unconstrained(self._guide_trace(z)), self.joint.chunk)(z)
        return u.mean(0), u.std(0, correction=0)

    def mean_jacobian(self) -> torch.Tensor:
        z = torch.zeros(1, 0, dtype=self.origin.dtype)
        if self.noise_dim:
            z = fixed_normals(512, self.noise_dim, 0).to(self.origin.dtype)
        self._write(torch.zeros_like(self.origin))
        mean = Batched(lambda z: self._unconstrained(self._guide_trace(z)), self.joint.chunk)(z)
        rows = []
        for entry in mean.mean(0):
            grads = torch.autograd.grad(entry, self.leaves, retain_graph=True, allow_unused=True)
            pairs = zip(self.leaves, grads, strict=True)
            rows.append(
                torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in pairs])
            )
        plain = torch.stack(rows)
        return plain @ self.basis if self.basis.dim() == 2 else plain * self.basis


def unique_leaves() -> list[torch.Tensor]:
    """The unconstrained parameters in the store, each tensor once (some guides register twice)."""
    found: dict[int, torch.Tensor] = {}
    for _, leaf in pyro.get_param_store().named_parameters():
        found.setdefault(id(leaf), leaf)
    return list(found.values())


def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def unflat(vector: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    with torch.no_grad():
        position = 0
        for t in tensors:
            t.copy_(vector[position : position + t.numel()].reshape(t.shape))
            position += t.numel()


def noise_needed(guide: Callable[..., Any], data: Mapping[str, Any]) -> int:
    """How many base random numbers one run of the guide uses.

    Raises:
        UnsupportedNoise: the guide draws from something that cannot be reparameterised.
    """
    with torch.no_grad(), RecordNoise() as record:
        guide(**data)
    return record.total


@dataclass
class Progress:
    """Where a deterministic fit stands; one round is one solution at one number of draws."""

    problem: Problem
    rounds: int = 0
    draws: int = 0
    error: float = math.inf
    gradient: float = math.inf
    elbo: list[float] = field(default_factory=list)

    @property
    def converged(self) -> bool:
        return self.error <= ERROR_TOLERANCE and self.gradient <= GRADIENT_TOLERANCE


def first_draws(problem: Problem) -> int:
    """Draws of the first round: enough to match all second moments of the noise."""
    if problem.noise_dim == 0:
        return 1
    return max(128, 8 * problem.noise_dim + 8) if problem.noise_dim <= 2000 else 128


def normals(problem: Problem, draws: int, seed: int, offset: int, dtype: torch.dtype):
    if problem.noise_dim == 0:
        return torch.zeros(1, 0, dtype=dtype)
    return fixed_normals(draws, problem.noise_dim, seed, offset).to(dtype)


def maximise(
    problem: P,
    z: torch.Tensor,
    iterations: int,
    history: list[float] | None = None,
    each: Callable[[float], None] = lambda elbo: None,
) -> tuple[P, float, float]:
    """L-BFGS on the fixed-draw ELBO.

    A point where the ELBO is not finite, or where the model raises, is a rejected point of the
    line search. The coordinates stay within the problem's reach, and are renewed where they end
    on its border: a quasi-Newton method may otherwise jump, in one step, to where a log density
    is nothing but rounding error.

    Returns:
        The problem moved to the best point found, the ELBO there and the largest entry of its
        gradient.
    """
    value, gradient, left = -math.inf, math.inf, iterations
    while left > 0:
        x, value, gradient, used = _maximise_within_reach(problem, z, left, history, each)
        reach = problem.reach
        problem = problem.moved(x)
        left -= max(used, 1)
        if reach is None or not bool((x.abs() > 0.999 * reach).any()):
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

    reach = problem.reach
    result = scipy.optimize.minimize(
        objective,
        np.zeros(problem.size),
        jac=True,
        method="L-BFGS-B",
        bounds=None if reach is None else np.stack([-reach.numpy(), reach.numpy()], 1),
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
    try:
        value, gradient = problem.value_and_gradient(torch.zeros(problem.size, dtype=z.dtype), z)
    except (ArithmeticError, RuntimeError, ValueError):
        return -math.inf
    return value if math.isfinite(value) and torch.isfinite(gradient).all() else -math.inf


def warm_started(problem: GuideProblem, modes: list[Mode], seed: int) -> GuideProblem:
    """The guide fitted to the Laplace approximation of the best mode, and its better start."""
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
        stand_in = problem._replace(target=target).rewhitened(z)
        for _ in range(2):
            stand_in = maximise(stand_in, z, 100)[0].rewhitened(z)
        candidate = stand_in._replace(target=None)
        candidate, value, _ = maximise(candidate, z, 50)
        if value > best_value:
            best, best_value = candidate, value
    unflat(best.origin, best.leaves)
    return best


def run(
    progress: Progress,
    seed: int,
    observations: int,
    dtype: torch.dtype,
    rounds: int | None,
    report: Callable[[str], None],
    checkpoint: Callable[[Progress], None],
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
        checkpoint: called after each completed round.
    """
    problem = progress.problem
    while True:
        if progress.rounds == 0:
            draws = first_draws(problem)
            if isinstance(problem, GuideProblem):
                problem = problem.rewhitened(normals(problem, 64, seed, 10_001, dtype))
        else:
            draws = 2 * progress.draws
        z = normals(problem, draws, seed, progress.rounds, dtype)
        before = problem.moments() if progress.rounds else None

        def each(elbo: float, draws: int = draws) -> None:
            report(f"{draws} draws, ELBO {elbo:.3f}")

        history: list[float] = []
        problem, value, gradient = solve(problem, z, history, each)
        if not math.isfinite(value):
            return progress
        problem = problem.rewhitened(z) if isinstance(problem, FamilyProblem) else problem
        if before is not None:
            mean, sd = problem.moments()
            # Solutions from M/2 and M independent draws: sd of the difference = sqrt(3) x that
            # of the second, if errors fall as 1/sqrt(draws) or faster.
            shift = torch.maximum(
                (mean - before[0]).abs() / sd.clamp_min(1e-300), (sd / before[1]).log().abs()
            )
            progress.error = float(shift.max()) / math.sqrt(3)
        if problem.noise_dim == 0:
            progress.error = 0.0
        progress.problem, progress.draws, progress.gradient = problem, draws, gradient
        progress.rounds += 1
        progress.elbo.extend(history or [value])
        checkpoint(progress)
        if progress.converged or (rounds is not None and progress.rounds >= rounds):
            return progress
        if 2 * draws > MOST_DRAWS or 2.0 * draws * max(observations, 1) > MOST_WORK:
            return progress


def family_starter(guide_class: type, rank: int | None) -> tuple[Callable, Callable | None]:
    """How to make a member of the guide's family around a mode, and around a bare point."""
    from vi_toolkit.families import FAMILY_OF

    family = FAMILY_OF[guide_class]
    if family is LowRank:
        return (lambda m, p: LowRank.around(m, p, rank or 1)), None
    gaussian: Any = family
    return gaussian.around, lambda m: gaussian.isotropic(m, 0.1)
