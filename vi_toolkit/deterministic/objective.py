"""The ELBO over fixed base noise, as a smooth function of a guide's parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

import pyro.poutine as poutine
import torch

from vi_toolkit.deterministic.families import Family, positive_definite
from vi_toolkit.deterministic.modes import Mode
from vi_toolkit.programs.joint import Joint
from vi_toolkit.programs.leaves import flat, unflat, unique_leaves
from vi_toolkit.programs.noise import FixedNoise, RecordNoise, fixed_normals
from vi_toolkit.programs.vectorise import Batched


class Problem(Protocol):
    """Something whose ELBO over fixed draws can be maximised from x = 0."""

    @property
    def size(self) -> int: ...

    @property
    def noise_dim(self) -> int: ...

    @property
    def trust_radius(self) -> torch.Tensor | None:
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
    def trust_radius(self) -> torch.Tensor:
        return self.q.trust_radius()

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

    trust_radius: torch.Tensor | None = None

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

    def replaced(self, **changes: Any) -> GuideProblem:
        """The same problem with another origin, basis or target."""
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
        moved = self.replaced(origin=self.origin + step)
        moved._write(torch.zeros_like(x))
        return moved

    def rewhitened(self, z: torch.Tensor) -> GuideProblem:
        """Coordinates in which the objective's curvature at the origin is about one."""
        plain = self.replaced(basis=None)
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
            return self.replaced(basis=scale[:, None] * vectors * lam.rsqrt())
        generator = torch.Generator().manual_seed(0)
        diagonal = zero.clone()
        for _ in range(16):
            v = torch.randint(0, 2, zero.shape, generator=generator).to(zero.dtype) * 2 - 1
            diagonal += v * difference(v) / 16
        if not torch.isfinite(diagonal).all():
            return self
        typical = diagonal.abs().median().clamp_min(1e-8)
        return self.replaced(basis=diagonal.abs().clamp_min(1e-2 * typical).rsqrt())

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


def noise_needed(guide: Callable[..., Any], data: Mapping[str, Any]) -> int:
    """How many base random numbers one run of the guide uses.

    Raises:
        UnsupportedNoise: the guide draws from something that cannot be reparameterised.
    """
    with torch.no_grad(), RecordNoise() as record:
        guide(**data)
    return record.total


def first_draws(problem: Problem) -> int:
    """Draws of the first round: enough to match all second moments of the noise."""
    if problem.noise_dim == 0:
        return 1
    return max(128, 8 * problem.noise_dim + 8) if problem.noise_dim <= 2000 else 128


def normals(problem: Problem, num_draws: int, seed: int, offset: int, dtype: torch.dtype):
    if problem.noise_dim == 0:
        return torch.zeros(1, 0, dtype=dtype)
    return fixed_normals(num_draws, problem.noise_dim, seed, offset).to(dtype)
