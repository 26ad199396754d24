"""Gaussian families on the unconstrained scale, in coordinates in which fitting them is easy.

Each family is a member q = N(m, S S^T) that knows how to move: ``moved(x)`` is the member at
coordinates x, where x = 0 is the member itself and the coordinates are whitened by a Cholesky
factor of the (approximate) posterior covariance, so that one unit is about one posterior
standard deviation in every direction whatever the units of the predictors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuide,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from torch.distributions import transform_to

from vi_toolkit.programs.joint import Joint
from vi_toolkit.pyro_private import unconstrained_parameter


def positive_definite(precision: torch.Tensor, floor: float = 1e-6) -> torch.Tensor:
    """The nearest thing to ``precision`` (d, d) that is one: eigenvalues by absolute value.

    Done in coordinates scaled by the diagonal, so that the floor means the same for every latent.
    """
    scale = precision.diagonal().abs().clamp_min(1e-12).sqrt()
    lam, q = torch.linalg.eigh(precision / scale[:, None] / scale)
    return (q * lam.abs().clamp_min(floor)) @ q.T * scale[:, None] * scale


def cholesky_of_inverse(precision: torch.Tensor) -> torch.Tensor:
    """Lower L with L L^T = precision^-1, through scaled coordinates."""
    precision = positive_definite(precision)
    scale = precision.diagonal().sqrt()
    covariance = torch.linalg.inv(precision / scale[:, None] / scale)
    return torch.linalg.cholesky((covariance + covariance.T) / 2) / scale[:, None]


# How far one solution may go before its coordinates are renewed: shifts in sds, logs of scales,
# and entries of a factor relative to its diagonal.
SHIFT, LOG_SCALE, FACTOR = 100.0, 2.0, 3.0


def trust_radii(shifts: int, scales: int, factors: int = 0) -> torch.Tensor:
    """One trust radius for each coordinate: so many shifts, log scales and entries of a factor."""
    parts = ((shifts, SHIFT), (scales, LOG_SCALE), (factors, FACTOR))
    return torch.cat([torch.full((n,), limit, dtype=torch.float64) for n, limit in parts])


def half_log_two_pi_e(d: int) -> float:
    """Entropy of a standard normal in d dimensions, in nats."""
    return 0.5 * d * (1 + math.log(2 * math.pi))


@dataclass(frozen=True)
class FullRank:
    """N(m, L L^T). Coordinates: d shifts in units of L, d log diagonals, the rest of C in L C."""

    location: torch.Tensor
    tril: torch.Tensor
    name = "full-rank"

    @classmethod
    def around(cls, location: torch.Tensor, precision: torch.Tensor) -> FullRank:
        if precision.dim() == 1:
            precision = precision.abs().clamp_min(1e-12).diag()
        return cls(location, cholesky_of_inverse(precision))

    @classmethod
    def isotropic(cls, location: torch.Tensor, scale: float) -> FullRank:
        return cls(location, scale * torch.eye(len(location), dtype=location.dtype))

    @property
    def noise_dim(self) -> int:
        return len(self.location)

    @property
    def size(self) -> int:
        d = len(self.location)
        return 2 * d + d * (d - 1) // 2

    def trust_radius(self) -> torch.Tensor:
        d = len(self.location)
        return trust_radii(d, d, self.size - 2 * d)

    def _factor(self, x: torch.Tensor) -> torch.Tensor:
        d = len(self.location)
        factor = torch.zeros(d, d, dtype=x.dtype)
        i, j = torch.tril_indices(d, d, -1)
        factor[i, j] = x[2 * d :]
        return factor + x[d : 2 * d].exp().diag()

    def moved(self, x: torch.Tensor) -> FullRank:
        d = len(self.location)
        return replace(
            self, location=self.location + self.tril @ x[:d], tril=self.tril @ self._factor(x)
        )

    def draws(self, z: torch.Tensor) -> torch.Tensor:
        """Base noise (S, noise_dim) to draws (S, d)."""
        return self.location + z @ self.tril.T

    def entropy(self) -> float:
        d = len(self.location)
        return half_log_two_pi_e(d) + float(self.tril.diagonal().abs().log().sum())

    def gradient(self, x: torch.Tensor, z: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        """Gradient of the ELBO over x, from g (S, d), the log density's gradients at the draws."""
        d = len(self.location)
        white = g @ self.tril
        outer = white.T @ z / len(z)
        i, j = torch.tril_indices(d, d, -1)
        diagonal = outer.diagonal() * x[d : 2 * d].exp() + 1
        return torch.cat([white.mean(0), diagonal, outer[i, j]])

    def mean_jacobian(self) -> torch.Tensor:
        """Derivative (d, size) of the mean over the coordinates, at x = 0."""
        shift = self.tril
        return torch.cat([shift, shift.new_zeros(len(shift), self.size - len(shift))], 1)

    def sd(self) -> torch.Tensor:
        return self.tril.norm(dim=-1)

    def rewhitened(self, z: torch.Tensor, g: torch.Tensor) -> FullRank:
        return self  # its own factor is the whitening


@dataclass(frozen=True)
class Diagonal:
    """N(m, diag(s^2)). Coordinates: d shifts in units of the whitening, d logs of s."""

    location: torch.Tensor
    scale: torch.Tensor
    whitening: torch.Tensor  # (d, d) lower, or (d,) for many latents
    name = "mean-field"

    @classmethod
    def around(cls, location: torch.Tensor, precision: torch.Tensor) -> Diagonal:
        if precision.dim() == 1:
            scale = precision.abs().clamp_min(1e-12).rsqrt()
            return cls(location, scale, scale)
        precision = positive_definite(precision)
        # The best diagonal approximation of a Gaussian has the conditional, not marginal, sds.
        return cls(location, precision.diagonal().rsqrt(), cholesky_of_inverse(precision))

    @classmethod
    def isotropic(cls, location: torch.Tensor, scale: float) -> Diagonal:
        full = torch.full_like(location, scale)
        return cls(location, full, full)

    @property
    def noise_dim(self) -> int:
        return len(self.location)

    @property
    def size(self) -> int:
        return 2 * len(self.location)

    def trust_radius(self) -> torch.Tensor:
        return trust_radii(len(self.location), len(self.location))

    def _shift(self, a: torch.Tensor) -> torch.Tensor:
        return self.whitening @ a if self.whitening.dim() == 2 else self.whitening * a

    def moved(self, x: torch.Tensor) -> Diagonal:
        d = len(self.location)
        return replace(
            self, location=self.location + self._shift(x[:d]), scale=self.scale * x[d:].exp()
        )

    def draws(self, z: torch.Tensor) -> torch.Tensor:
        return self.location + z * self.scale

    def entropy(self) -> float:
        return half_log_two_pi_e(len(self.location)) + float(self.scale.log().sum())

    def gradient(self, x: torch.Tensor, z: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        d = len(self.location)
        mean = g.mean(0)
        shift = mean @ self.whitening if self.whitening.dim() == 2 else mean * self.whitening
        return torch.cat([shift, (g * z).mean(0) * self.scale * x[d:].exp() + 1])

    def mean_jacobian(self) -> torch.Tensor:
        """Derivative (d, size) of the mean over the coordinates, at x = 0."""
        shift = self.whitening if self.whitening.dim() == 2 else self.whitening.diag()
        return torch.cat([shift, shift.new_zeros(len(shift), self.size - len(shift))], 1)

    def sd(self) -> torch.Tensor:
        return self.scale

    def rewhitened(self, z: torch.Tensor, g: torch.Tensor) -> Diagonal:
        """Whitening from E_q of the Hessian, which E_q[grad z^T] / s gives for free (Stein)."""
        if self.whitening.dim() == 1 or len(z) < 4 * len(self.location):
            return self
        hessian = (g.T @ z / len(z)) / self.scale
        precision = -(hessian + hessian.T) / 2
        if not torch.isfinite(precision).all():
            return self
        return replace(self, whitening=cholesky_of_inverse(precision))


@dataclass(frozen=True)
class LowRank:
    """N(m, diag(s^2) + diag(s) W W^T diag(s)), Pyro's parametrisation; noise (d + rank).

    Coordinates: d shifts in units of the whitening, d logs of s, and one such shift for every
    column of diag(s) W, which is a direction in the space of the latents too.
    """

    location: torch.Tensor
    scale: torch.Tensor
    factor: torch.Tensor  # (d, rank)
    whitening: torch.Tensor
    name = "low-rank"

    @classmethod
    def around(cls, location: torch.Tensor, precision: torch.Tensor, rank: int) -> LowRank:
        start = Diagonal.around(location, precision)
        factor = torch.zeros(len(location), rank, dtype=location.dtype)
        if precision.dim() == 2:  # the directions in which the posterior exceeds the diagonal
            tril = cholesky_of_inverse(precision) / start.scale[:, None]
            lam, q = torch.linalg.eigh(tril @ tril.T)
            factor = q[:, -rank:] * (lam[-rank:] - 1).clamp_min(1e-4).sqrt()
        else:
            generator = torch.Generator().manual_seed(0)
            factor = 0.1 * torch.randn(factor.shape, generator=generator, dtype=location.dtype)
        return cls(location, start.scale, factor, start.whitening)

    @property
    def noise_dim(self) -> int:
        return len(self.location) + self.factor.shape[1]

    @property
    def size(self) -> int:
        return 2 * len(self.location) + self.factor.numel()

    def trust_radius(self) -> torch.Tensor:
        return trust_radii(len(self.location), len(self.location), self.factor.numel())

    def _shift(self, a: torch.Tensor) -> torch.Tensor:
        """Coordinates (d, columns) to shifts of the latents (d, columns)."""
        return self.whitening @ a if self.whitening.dim() == 2 else self.whitening[:, None] * a

    def _pulled_back(self, gradient: torch.Tensor) -> torch.Tensor:
        """Gradients over such shifts (d, columns) to gradients over the coordinates."""
        if self.whitening.dim() == 2:
            return self.whitening.T @ gradient
        return self.whitening[:, None] * gradient

    def moved(self, x: torch.Tensor) -> LowRank:
        d = len(self.location)
        columns = self._shift(x[2 * d :].reshape(self.factor.shape))
        return replace(
            self,
            location=self.location + self._shift(x[:d, None])[:, 0],
            scale=self.scale * x[d : 2 * d].exp(),
            factor=self.factor + columns / self.scale[:, None],
        )

    def draws(self, z: torch.Tensor) -> torch.Tensor:
        d = len(self.location)
        return self.location + self.scale * (z[:, :d] + z[:, d:] @ self.factor.T)

    def _capacitance(self) -> torch.Tensor:
        rank = self.factor.shape[1]
        return torch.eye(rank, dtype=self.factor.dtype) + self.factor.T @ self.factor

    def entropy(self) -> float:
        log_det = self.scale.log().sum() + 0.5 * torch.logdet(self._capacitance())
        return half_log_two_pi_e(len(self.location)) + float(log_det)

    def gradient(self, x: torch.Tensor, z: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        d = len(self.location)
        here = self.moved(x)
        white = z[:, :d] + z[:, d:] @ here.factor.T
        scale = (g * white).mean(0) * here.scale + 1
        factor = (g * here.scale).T @ z[:, d:] / len(z)
        factor = factor + here.factor @ torch.linalg.inv(here._capacitance())
        factor = self._pulled_back(factor / self.scale[:, None])
        shift = self._pulled_back(g.mean(0)[:, None])
        return torch.cat([shift[:, 0], scale, factor.reshape(-1)])

    def mean_jacobian(self) -> torch.Tensor:
        """Derivative (d, size) of the mean over the coordinates, at x = 0."""
        shift = self.whitening if self.whitening.dim() == 2 else self.whitening.diag()
        return torch.cat([shift, shift.new_zeros(len(shift), self.size - len(shift))], 1)

    def sd(self) -> torch.Tensor:
        return self.scale * (1 + self.factor.pow(2).sum(-1)).sqrt()

    def rewhitened(self, z: torch.Tensor, g: torch.Tensor) -> LowRank:
        """Whitening from E_q of the Hessian = E_q[grad (u - m)^T] Sigma^-1 (Stein)."""
        if self.whitening.dim() == 1 or len(z) < 4 * len(self.location):
            return self
        scaled = self.factor * self.scale[:, None]
        covariance = self.scale.square().diag() + scaled @ scaled.T
        hessian = torch.linalg.solve(covariance, (self.draws(z) - self.location).T @ g / len(z))
        precision = -(hessian + hessian.T) / 2
        if not torch.isfinite(precision).all():
            return self
        return replace(self, whitening=cholesky_of_inverse(precision))


Family = FullRank | Diagonal | LowRank

FAMILY_OF: dict[Any, type[FullRank] | type[Diagonal] | type[LowRank]] = {
    AutoMultivariateNormal: FullRank,
    AutoDiagonalNormal: Diagonal,
    AutoNormal: Diagonal,
    AutoLowRankMultivariateNormal: LowRank,
}

FAMILIES = {family.name: family for family in (FullRank, Diagonal, LowRank)}


def guide_family(guide: object) -> str | None:
    """ "mean-field", "full-rank", "low-rank", "point", or what the guide declares; None if unknown.

    A guide of the user's own declares it as an attribute: ``guide.guide_family = "full-rank"``.
    """
    declared = getattr(guide, "guide_family", None)
    if isinstance(declared, str):
        return declared
    if type(guide) is AutoDelta:
        return "point"
    family = FAMILY_OF.get(type(guide))
    return family.name if family else None


def set_parameter(module: Any, name: str, value: torch.Tensor) -> None:
    """Set a parameter of a Pyro module in place, through its constraint if it has one."""
    leaf, constraint = unconstrained_parameter(module, name)
    with torch.no_grad():
        leaf.copy_(transform_to(constraint).inv(value))


def write_to_guide(guide: AutoGuide, joint: Joint, q: Family) -> None:
    """Put a member of a family into the parameters of the Pyro guide it belongs to."""
    if isinstance(guide, AutoNormal):
        assert isinstance(q, Diagonal)
        for name, site in joint.sites.items():
            for kind, value in (("locs", q.location), ("scales", q.scale)):
                part = value[site.slice].reshape(site.unconstrained_shape)
                set_parameter(guide, f"{kind}.{name}", part)
        return
    set_parameter(guide, "loc", q.location)
    if isinstance(q, FullRank):
        diagonal = q.tril.diagonal()
        set_parameter(guide, "scale", diagonal)
        set_parameter(guide, "scale_tril", q.tril / diagonal[:, None])
    elif isinstance(q, LowRank):
        set_parameter(guide, "scale", q.scale)
        set_parameter(guide, "cov_factor", q.factor)
    else:
        set_parameter(guide, "scale", q.scale)
