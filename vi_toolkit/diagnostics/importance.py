"""Posterior moments by importance sampling: a check of a fit that needs no MCMC."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch

from vi_toolkit.diagnostics.pareto import ParetoK, affordable_draws, pareto_k, smoothed
from vi_toolkit.programs.isolation import seeded_state

DEGREES_OF_FREEDOM = 7.0  # of the proposal: tails that cover, at a small cost in the middle


@dataclass(frozen=True, eq=False)
class ImportanceMoments:
    """Posterior moments of every scalar on the unconstrained scale, from weighted draws.

    Attributes:
        names: of the scalars, (d,).
        mean, sd: of the posterior, (d,).
        mean_se, sd_se: their Monte Carlo standard errors, from independent repetitions, (d,).
        log_evidence: log p(x), in nats.
        log_evidence_se: its standard error.
        pareto_k: of the weights. Where it is not ``reliable``, nothing else here is.
        proposal: what was sampled: "guide", or a multivariate t around it.
    """

    names: list[str]
    mean: np.ndarray
    sd: np.ndarray
    mean_se: np.ndarray
    sd_se: np.ndarray
    log_evidence: float
    log_evidence_se: float
    pareto_k: ParetoK
    proposal: str

    def __repr__(self) -> str:
        return (
            f"Importance moments of {len(self.names)} scalars, proposal {self.proposal}\n"
            f"  {self.pareto_k!r}\n"
            f"  log evidence {self.log_evidence:.3f} ± {self.log_evidence_se:.3f} nats"
        )


def importance_moments(
    fit: Any,
    covariance: np.ndarray | None = None,
    num_draws: int | None = None,
    repetitions: int = 8,
    seed: int = 0,
) -> ImportanceMoments:
    r"""Moments of the posterior from Pareto-smoothed weights of draws around a fit.

    Without ``covariance`` the guide itself is the proposal. With it, a multivariate t with seven
    degrees of freedom around the guide's mean, on the unconstrained scale, with that covariance
    (say, the linear response of a mean-field fit): its tails are heavier than a Gaussian guide's,
    so it shows mass that the guide leaves out, as long as that is near.

    .. math:: E[f(u) \mid x] \approx \sum_s w_s f(u_s), \quad w_s \propto p(x, u_s) / q(u_s)

    Args:
        fit: a :class:`~vi_toolkit.Fit` on full data, without discrete latents.
        covariance: of the proposal, (d, d); None to sample the guide.
        num_draws: per repetition; None for as many as is cheap, at most 50,000.
        repetitions: independent sets of draws, from whose spread the standard errors come.
        seed: of the draws.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, vi_toolkit as vi
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model():
        ...     pyro.sample("z", dist.StudentT(5.0, 0.0, 1.0))
        >>> fit = vi.fit(model, AutoNormal, {}, progress=False)
        >>> moments = vi.importance_moments(fit, draws=20_000)
        >>> abs(moments.log_evidence) < 0.05
        True
    """
    sample = weighted_draws(fit, covariance, num_draws, repetitions, seed)
    return moments_of(fit, sample, "guide" if covariance is None else "multivariate t")


Sample = list[tuple[torch.Tensor, torch.Tensor]]
"""Per repetition, draws (S, d) on the unconstrained scale and their log weights (S,), float64."""


def weighted_draws(
    fit: Any, covariance: np.ndarray | None, num_draws: int | None, repetitions: int, seed: int
) -> Sample:
    """The draws behind :func:`importance_moments`."""
    joint = fit.joint
    count = num_draws or affordable_draws(joint, repetitions)
    sample: Sample = []
    if covariance is None:
        for r in range(repetitions):
            values, log_weights = fit.weighted_sample(count, seed + r)
            sample.append((joint.flatten(values).double(), log_weights.double()))
        return sample
    target = torch.as_tensor(np.asarray(covariance), dtype=torch.float64)
    nu = DEGREES_OF_FREEDOM
    # A t's covariance is nu / (nu - 2) times that of its scale.
    tril = torch.linalg.cholesky(target) * math.sqrt((nu - 2) / nu)
    df = torch.tensor(nu, dtype=torch.float64)
    proposal = dist.MultivariateStudentT(df, _guide_mean(fit), tril)
    with fit.workspace.isolated(seeded_state(fit.derived_seed(seed, 4))), torch.no_grad():
        for _ in range(repetitions):
            u = proposal.sample((count,))
            log_p = joint.log_densities(u.to(joint.start.dtype)).double()
            finite = torch.isfinite(log_p)
            sample.append((u, torch.where(finite, log_p - proposal.log_prob(u), -math.inf)))
    return sample


def moments_of(fit: Any, sample: Sample, proposal: str) -> ImportanceMoments:
    """Moments and evidence from weighted draws."""
    means, sds, evidences = [], [], []
    for u, log_weights in sample:
        w = smoothed(log_weights)
        x = u.numpy()
        mean = w @ x
        means.append(mean)
        sds.append(np.sqrt(w @ (x - mean) ** 2))
        evidences.append(float(torch.logsumexp(log_weights, 0)) - math.log(len(w)))
    root = math.sqrt(len(sample))
    return ImportanceMoments(
        names=list(fit.joint.names),
        mean=np.mean(means, 0),
        sd=np.mean(sds, 0),
        mean_se=np.std(means, 0, ddof=1) / root,
        sd_se=np.std(sds, 0, ddof=1) / root,
        log_evidence=float(np.mean(evidences)),
        log_evidence_se=float(np.std(evidences, ddof=1) / root),
        pareto_k=pareto_k(torch.stack([w for _, w in sample])),
        proposal=proposal,
    )


def _guide_mean(fit: Any) -> torch.Tensor:
    return fit.joint.flatten(fit.sample(20_000, seed=0)).double().mean(0)
