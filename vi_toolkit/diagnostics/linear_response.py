"""Linear-response covariance: the sds that mean field gets wrong, from how its means move."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, cg

from vi_toolkit.deterministic.objective import normals
from vi_toolkit.deterministic.run import DeterministicRun
from vi_toolkit.deterministic.solver import solve
from vi_toolkit.errors import ConvergenceWarning, NotDeterministicError
from vi_toolkit.programs.isolation import seeded_state
from vi_toolkit.result import Fit

DENSE = 1_000  # variational parameters up to which the Hessian is formed


@dataclass(frozen=True, eq=False)
class LinearResponse:
    """The linear-response covariance of a fit.

    Attributes:
        names: names of the scalars on the unconstrained scale, (d,).
        mean: the guide's means, (d,).
        covariance: corrected covariance, (d, d).
        sd: corrected sds, (d,).
        guide_sd: the guide's own sds, (d,).
        optimum: whether the ELBO's curvature at the fit is that of a maximum. If not, the fit has
            not converged and the correction means nothing.
    """

    names: list[str]
    mean: np.ndarray
    covariance: np.ndarray
    guide_sd: np.ndarray
    optimum: bool

    @property
    def sd(self) -> np.ndarray:
        return np.sqrt(np.diag(self.covariance))

    @property
    def meaning(self) -> str:
        """The result in one sentence."""
        if not self.optimum:
            return "the fit is not at a maximum of the ELBO: these sds mean nothing"
        ratio = self.guide_sd / self.sd
        worst = int(ratio.argmin())
        return (
            f"the guide's sds are {ratio.min():.2f} to {ratio.max():.2f} times the corrected ones; "
            f"the narrowest is that of {self.names[worst]}"
        )

    def __repr__(self) -> str:
        return f"Linear response of {len(self.names)} scalars: {self.meaning}"


def linear_response(fit: Fit, scalars: list[str] | None = None) -> LinearResponse:
    r"""Posterior covariance from how far the fit's means move when the model is perturbed.

    Add a small term :math:`t^\top u` to the log joint density. The derivative of the posterior mean
    of u with respect to t is the posterior covariance. Linear response takes instead the
    derivative of the means of the best q in the family,

    .. math:: \hat\Sigma = J\, (-H)^{-1} J^\top, \qquad
              J = \frac{\partial E_q[u]}{\partial \lambda}, \quad
              H = \frac{\partial^2 \mathcal L}{\partial \lambda\, \partial \lambda^\top}

    at the optimum of the ELBO. The result is exact for mean field on a Gaussian posterior. The
    ELBO is that of the fit's fixed draws, which is first solved to convergence.

    Args:
        fit: a deterministic fit of any guide whose means can move freely.
        scalars: names of the scalars wanted (from ``fit.joint.names``), which saves time if there
            are very many latents; None for all.

    Returns:
        A :class:`LinearResponse`.

    Raises:
        NotDeterministicError: the fit is stochastic; fit again with ``method="deterministic"``.
        ValueError: unknown scalars.

    References:
        Giordano, Broderick and Jordan, "Covariances, Robustness, and Variational Bayes",
        JMLR 2018; with fixed draws: Giordano, Ingram and Broderick, JMLR 2024.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, vi_toolkit as vi
        >>> from pyro.infer.autoguide import AutoNormal
        >>> tril = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
        >>> def model():
        ...     pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), scale_tril=tril))
        >>> fit = vi.fit(model, AutoNormal, {}, progress=False)
        >>> response = vi.linear_response(fit)
        >>> response.guide_sd.round(2), response.sd.round(2)
        (array([0.6, 0.6]), array([1., 1.]))
    """
    run = fit.run
    if not isinstance(run, DeterministicRun) or run.progress is None:
        raise NotDeterministicError(
            "Linear response needs the curvature of a converged, deterministic ELBO: fit with "
            "method='deterministic' on the full data."
        )
    joint = fit.joint
    names = list(joint.names) if scalars is None else list(scalars)
    unknown = [n for n in names if n not in joint.names]
    if unknown:
        raise ValueError(f"no scalar {unknown[0]!r}; the scalars are {', '.join(joint.names[:8])}")
    rows = [joint.names.index(n) for n in names]
    progress = run.progress
    with fit.workspace.isolated(seeded_state(run.seed)):
        problem = progress.problem
        dtype = joint.start.dtype
        z = normals(problem, progress.num_draws, run.seed, max(progress.rounds - 1, 0), dtype)
        try:
            problem, _, _ = solve(problem, z)
            jacobian = problem.mean_jacobian()[rows]
            zero = torch.zeros(problem.size, dtype=dtype)
            # The coordinates are whitened, so the curvature is of order 1. One-sided differences
            # then have an error of about ``step`` and cost half of central ones.
            step = 1e-5 if dtype == torch.float64 else 1e-2
            here = problem.value_and_gradient(zero, z)[1]

            def curvature(v: torch.Tensor) -> torch.Tensor:
                """-H v, by differences of the gradient."""
                size = step / max(float(v.norm()), 1e-300)
                return (here - problem.value_and_gradient(zero + size * v, z)[1]) / size

            if problem.size <= DENSE:
                solved, optimum = _dense(curvature, jacobian)
            else:
                solved, optimum = _conjugate_gradients(curvature, jacobian)
            covariance = (jacobian @ solved).double().numpy()
            mean, sd = (m.double().numpy()[rows] for m in problem.moments())
        finally:
            run.write_solution()
    covariance = (covariance + covariance.T) / 2
    if not optimum:
        warnings.warn(
            "The fit is not at a maximum of the ELBO, so its linear response means nothing.",
            ConvergenceWarning,
            stacklevel=2,
        )
    return LinearResponse(names, mean, covariance, sd, optimum)


Curvature = Callable[[torch.Tensor], torch.Tensor]  # v -> -H v


def _dense(curvature: Curvature, jacobian: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """Solve -H x = J^T by forming H; whether -H is positive definite."""
    identity = torch.eye(jacobian.shape[1], dtype=jacobian.dtype)
    hessian = torch.stack([curvature(e) for e in identity])
    hessian = (hessian + hessian.T) / 2
    factor, info = torch.linalg.cholesky_ex(hessian)
    if int(info):
        return torch.linalg.pinv(hessian) @ jacobian.T, False
    return torch.cholesky_solve(jacobian.T, factor), True


class _NotAMaximumError(ArithmeticError):
    """The ELBO does not fall in some direction from the fit."""


def _conjugate_gradients(
    curvature: Curvature, jacobian: torch.Tensor, iterations: int = 200, tolerance: float = 1e-4
) -> tuple[torch.Tensor, bool]:
    """Solve -H x = J^T column by column; whether -H was positive in every direction searched."""

    def product(v: np.ndarray) -> np.ndarray:
        direction = torch.as_tensor(v).to(jacobian)
        image = curvature(direction)
        if float(direction @ image) <= 0:
            raise _NotAMaximumError
        return image.numpy()

    operator = LinearOperator(
        (jacobian.shape[1],) * 2, matvec=product, dtype=jacobian.numpy().dtype
    )
    solved, optimum = torch.zeros_like(jacobian), True
    for x, b in zip(solved.numpy(), jacobian.numpy(), strict=True):
        keep = functools.partial(np.copyto, x)
        try:
            cg(operator, b, rtol=tolerance, maxiter=iterations, callback=keep)
        except _NotAMaximumError:
            optimum = False
    return solved.T, optimum
