"""One Gaussian guide fitted to many data sets of the same shapes, in one batch.

Only ``vsbc`` uses it, because fitting each data set by itself is much slower. For 40 replications,
the CPU time of ``vi.fit(..., method="deterministic")`` per data set is 18 times as long as here for
the logistic regression with 31 scalars, 69 to 85 times for the centred eight schools and 120 to 140
times for the non-centred ones. Without the search for modes it is still 16 to 78 times as long.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vi_toolkit.deterministic.families import Diagonal, FullRank, half_log_two_pi_e
from vi_toolkit.deterministic.objective import FamilyProblem
from vi_toolkit.deterministic.rounds import Progress, solve_rounds
from vi_toolkit.programs.joint import Joint
from vi_toolkit.programs.noise import fixed_normals
from vi_toolkit.programs.vectorise import BAD_POINT, vmap

TOLERANCE = 0.02  # largest gradient per posterior sd at convergence
# Monte Carlo error in posterior sds. Two hundred replications detect a bias of about 0.2 sd.
ERROR_TOLERANCE = 0.05
ITERATIONS = 300
DOUBLINGS = 2  # of the number of draws, before a fit is solved by itself
SLACK = 1e-4  # nats by which a step may lower the ELBO, because of rounding and sampling noise
FLOOR = 1e-4  # smallest eigenvalue of a precision scaled to a unit diagonal


@dataclass(frozen=True, eq=False)
class Replicated:
    """Gaussians fitted to R data sets, on the unconstrained scale.

    Attributes:
        mean, sd: means and sds, (R, d).
        elbo: ELBO over the fixed draws, in nats, (R,).
        converged: whether each fit is at its optimum, to 0.05 posterior sds, (R,).
    """

    mean: torch.Tensor
    sd: torch.Tensor
    elbo: torch.Tensor
    converged: torch.Tensor


def fit_replications(
    joint: Joint, entries: Mapping[str, torch.Tensor], full_rank: bool, seed: int = 0
) -> Replicated:
    r"""Fit the best Gaussian to each of R data sets.

    The ELBO is that of fixed, moment-matched draws, as in :mod:`vi_toolkit.deterministic`. The
    number of draws is doubled until two solutions in a row agree. The optimum is where
    :math:`E_q[\nabla \log p] = 0` and :math:`\Lambda = -E_q[\nabla^2 \log p]` (its diagonal,
    for mean field). The fits take natural-gradient steps towards it,

    .. math:: \Lambda \leftarrow (1 - \rho) \Lambda - \rho E_q[\nabla^2 \log p], \qquad
              m \leftarrow m + \rho \Lambda^{-1} E_q[\nabla \log p],

    where each data set has a step size :math:`\rho` of its own, which is cut if the ELBO falls. The
    expected Hessian is :math:`E_q[\nabla \log p\, z^\top] L^{-1}` by Stein's lemma. It needs only
    gradients and is exact for a quadratic log density. All fits start at the joint density's own
    start. Those that do not converge are then solved one by one.

    Args:
        joint: log joint density of the model at one of the data sets.
        entries: name of an argument that differs between the data sets -> its values, (R, *shape).
        full_rank: whether the covariance is full or diagonal.
        seed: of the fixed draws.

    Raises:
        RuntimeError, ValueError: the model cannot be run for many data sets at once.

    References:
        Khan and Lin, "Conjugate-Computation Variational Inference", AISTATS 2017.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> joint = Joint(model, {"y": torch.tensor(0.0)})
        >>> fits = fit_replications(joint, {"y": torch.ones(3)}, full_rank=True)
        >>> fits.mean.shape, round(float(fits.mean[0]), 2), round(float(fits.sd[0]), 2)
        (torch.Size([3, 1]), 0.5, 0.71)
    """
    count, d = len(next(iter(entries.values()))), joint.dim
    state = _State(
        joint.start.expand(count, d).clone(),
        0.1 * torch.eye(d, dtype=joint.start.dtype).expand(count, d, d).clone(),
    )
    converged = torch.zeros(count, dtype=torch.bool)
    left = torch.arange(count)
    # The first stage comes near the optimum with few draws, enough to match second moments. The
    # second has as many as vi.fit begins with, and the number doubles from there.
    first = max(128, 8 * d + 8)
    stages = [(2 * d + 32, 0.1), *((first << k, TOLERANCE) for k in range(DOUBLINGS + 1))]
    for number, (num_draws, tolerance) in enumerate(stages):
        if not len(left):
            break
        mean, sd = state.mean[left], state.sd()[left]
        z = fixed_normals(num_draws, d, seed, number).to(joint.start.dtype)
        _ascend(state, left, _Objective(joint, entries, z), full_rank, tolerance)
        if number < 2:
            continue
        now = state.sd()[left]
        shift = torch.maximum((state.mean[left] - mean).abs() / now, (now / sd).log().abs())
        # As in solve_rounds, the sd of the difference is sqrt(3) times that of the second.
        close = shift.amax(1) / math.sqrt(3) < ERROR_TOLERANCE
        converged[left] = close & state.converged[left]
        left = left[~converged[left]]
    for r in left.tolist():
        converged[r] = _solved_alone(state, r, joint, entries, full_rank, seed)
    elbo = state.value + half_log_two_pi_e(d)
    return Replicated(state.mean, state.sd(), elbo, converged)


class _State:
    """State of R fits: mean (R, d), factor of the covariance (R, d, d) and ELBO (R,)."""

    def __init__(self, mean: torch.Tensor, factor: torch.Tensor):
        self.mean, self.factor = mean, factor
        self.value = torch.full((len(mean),), -torch.inf, dtype=mean.dtype)
        self.converged = torch.zeros(len(mean), dtype=torch.bool)

    def sd(self) -> torch.Tensor:
        return self.factor.norm(dim=-1)


def _solved_alone(
    state: _State,
    r: int,
    joint: Joint,
    entries: Mapping[str, torch.Tensor],
    full_rank: bool,
    seed: int,
) -> bool:
    """Continue fit r by the quasi-Newton method of ``vi.fit``; whether it converged."""
    own = Joint(joint.model, joint.data | {name: every[r] for name, every in entries.items()})
    factor = state.factor[r]
    whitening = factor if full_rank else state.sd()[r]
    family = (
        FullRank(state.mean[r], factor)
        if full_rank
        else Diagonal(state.mean[r], state.sd()[r], whitening)
    )
    progress = solve_rounds(
        Progress(FamilyProblem(own, family)),
        seed,
        own.observations,
        joint.start.dtype,
        None,
        lambda message: None,
        lambda progress: None,
    )
    assert isinstance(progress.problem, FamilyProblem)
    end: Any = progress.problem.q
    state.mean[r] = end.location
    state.factor[r] = end.tril if full_rank else end.scale.diag()
    state.value[r] = (
        progress.elbo[-1] - half_log_two_pi_e(joint.dim) if progress.elbo else -math.inf
    )
    return progress.converged


def _ascend(
    state: _State, which: torch.Tensor, objective: _Objective, full_rank: bool, tolerance: float
) -> None:
    """Take natural-gradient steps of the fits ``which`` until each has converged or is stuck."""
    mean, factor = state.mean, state.factor
    count, d = mean.shape
    gradient, cross = torch.zeros_like(mean), torch.zeros_like(factor)
    state.value[which], gradient[which], cross[which] = objective(which, mean[which], factor[which])
    state.converged[which] = False
    rate = torch.ones(count, dtype=mean.dtype)
    active = torch.zeros(count, dtype=torch.bool)
    active[which] = torch.isfinite(state.value[which])
    for _ in range(ITERATIONS):
        rows = active.nonzero().flatten()
        if not len(rows):
            break
        L, g, C = factor[rows], gradient[rows], cross[rows]
        inverse = torch.linalg.inv(L)
        precision = _definite(-C @ inverse)
        # Distance to the optimum, in posterior sds for the mean and relative for the scale.
        shift = (torch.linalg.solve(precision, g) * g).sum(-1).clamp_min(0).sqrt()
        wrong = L.mT @ C
        wrong = (wrong + wrong.mT) / 2 + torch.eye(d, dtype=mean.dtype)
        wrong = wrong if full_rank else wrong.diagonal(dim1=1, dim2=2)[..., None]
        done = torch.maximum(shift, wrong.abs().flatten(1).amax(1)) < tolerance
        state.converged[rows[done]] = True
        active[rows[done]] = False
        rows, g, inverse, precision = (x[~done] for x in (rows, g, inverse, precision))
        if not len(rows):
            break
        rho = rate[rows][:, None]
        now = inverse.mT @ inverse
        if full_rank:
            precision = (1 - rho[..., None]) * now + rho[..., None] * precision
            trial_factor = torch.linalg.cholesky(_inverse(precision))
        else:
            old, new = (x.diagonal(dim1=1, dim2=2) for x in (now, precision))
            trial_factor = torch.diag_embed(((1 - rho) * old + rho * new).rsqrt())
        trial = mean[rows] + rho * torch.linalg.solve(precision, g)
        value, trial_gradient, trial_cross = objective(rows, trial, trial_factor)
        better = value > state.value[rows] - SLACK
        rate[rows] = torch.where(better, (2 * rate[rows]).clamp_max(1), rate[rows] / 4)
        active[rows[rate[rows] < 1e-6]] = False
        kept = rows[better]
        mean[kept], factor[kept] = trial[better], trial_factor[better]
        state.value[kept] = value[better]
        gradient[kept], cross[kept] = trial_gradient[better], trial_cross[better]


class _Objective:
    """ELBO, E_q[grad log p] and E_q[grad log p z^T] of each data set, over shared draws z."""

    def __init__(self, joint: Joint, entries: Mapping[str, torch.Tensor], z: torch.Tensor):
        self.joint, self.entries, self.z = joint, entries, z
        self.chunk = max(1, joint.chunk // len(z))
        self.writes: bool | None = None

    def __call__(
        self, rows: torch.Tensor, mean: torch.Tensor, factor: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        parts = [
            self._chunk(rows[part], mean[part], factor[part])
            for part in torch.arange(len(rows)).split(self.chunk)
        ]
        value, gradient, cross = (torch.cat(p) for p in zip(*parts, strict=True))
        return value, gradient, cross

    def _chunk(
        self, rows: torch.Tensor, mean: torch.Tensor, factor: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        u = mean[:, None] + self.z @ factor.mT
        names = list(self.entries)
        values = [self.entries[name][rows] for name in names]

        def one(u: torch.Tensor, *values: torch.Tensor) -> Any:
            data = self.joint.data | dict(zip(names, values, strict=True))

            def log_density(point: torch.Tensor) -> torch.Tensor:
                return self.joint.log_density(point, data)

            return vmap(torch.func.grad_and_value(log_density), bool(self.writes))(u)

        if self.writes is None:  # whether the model writes into its own tensors is not known yet
            self.writes = False
            try:
                g, log_p = vmap(one)(u, *values)
            except BAD_POINT:
                self.writes = True
        g, log_p = vmap(one, self.writes)(u, *values)
        g, log_p = g.detach(), log_p.detach()
        entropy = factor.diagonal(dim1=1, dim2=2).log().sum(1)
        value = log_p.mean(1) + entropy
        value = torch.where(
            torch.isfinite(value) & torch.isfinite(g).all(2).all(1), value, -torch.inf
        )
        return value, g.mean(1), g.mT @ self.z / len(self.z)


def _definite(precision: torch.Tensor) -> torch.Tensor:
    """Positive definite matrices near these (S, d, d): absolute eigenvalues after scaling."""
    precision = (precision + precision.mT) / 2
    scale = precision.diagonal(dim1=1, dim2=2).abs().clamp_min(1e-12).sqrt()
    both = scale[:, :, None] * scale[:, None]
    lam, q = torch.linalg.eigh(precision / both)
    return (q * lam.abs().clamp_min(FLOOR)[:, None]) @ q.mT * both


def _inverse(precision: torch.Tensor) -> torch.Tensor:
    scale = precision.diagonal(dim1=1, dim2=2).sqrt()
    both = scale[:, :, None] * scale[:, None]
    covariance = torch.linalg.inv(precision / both) / both
    return (covariance + covariance.mT) / 2
