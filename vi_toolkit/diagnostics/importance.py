"""Posterior moments by importance sampling around a fit, which needs no MCMC."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pyro.distributions as dist
import torch

from vi_toolkit.diagnostics.pareto import ParetoK, affordable_draws, pareto_k, smoothed
from vi_toolkit.programs.isolation import seeded_state
from vi_toolkit.result import Fit

DEGREES_OF_FREEDOM = 7.0  # of the proposal: tails heavy enough to cover the posterior's

WeightedDraws = list[tuple[torch.Tensor, torch.Tensor]]
"""Per repetition, draws (S, d) on the unconstrained scale and their log weights (S,), float64."""


@dataclass(frozen=True, eq=False)
class ImportanceMoments:
    """Posterior moments of every scalar on the unconstrained scale, from weighted draws.

    Attributes:
        names: names of the scalars, (d,).
        mean, sd: posterior means and sds, (d,).
        mean_se, sd_se: their Monte Carlo standard errors, from independent repetitions, (d,).
        log_evidence: log p(x), in nats.
        log_evidence_se: its standard error.
        pareto_k: of the weights. Where it is not ``reliable``, nothing else here is.
        proposal: the distribution of the draws: "guide", or "multivariate t" around it.
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


def draws_from_guide(fit: Fit, num_draws: int | None, repetitions: int, seed: int) -> WeightedDraws:
    """Draws from the guide with log weights log p(x, u) - log q(u).

    Args:
        fit: on full data, without discrete latents.
        num_draws: number of draws per repetition; None for as many as are cheap, at most 50,000.
        repetitions: number of independent sets of draws.
        seed: of the draws.
    """
    count = num_draws or affordable_draws(fit.joint, repetitions)
    found: WeightedDraws = []
    for r in range(repetitions):
        values, log_weights = fit.weighted_sample(count, seed + r)
        found.append((fit.joint.flatten(values).double(), log_weights.double()))
    return found


def draws_from_t(
    fit: Fit, covariance: np.ndarray, num_draws: int | None, repetitions: int, seed: int
) -> WeightedDraws:
    """Draws from a multivariate t around the guide's mean, with log weights.

    It has seven degrees of freedom. Its tails are heavier than a Gaussian guide's, so the draws
    reach mass that the guide leaves out, as long as that mass is near.

    Args:
        fit, num_draws, repetitions, seed: as in :func:`draws_from_guide`.
        covariance: of the t distribution on the unconstrained scale, (d, d).
    """
    joint = fit.joint
    count = num_draws or affordable_draws(joint, repetitions)
    nu = DEGREES_OF_FREEDOM
    # The covariance of a t distribution is nu / (nu - 2) times the square of its scale.
    scale = torch.linalg.cholesky(torch.as_tensor(covariance, dtype=torch.float64))
    scale = scale * math.sqrt((nu - 2) / nu)
    mean = joint.flatten(fit.sample(20_000, seed=0)).double().mean(0)
    proposal = dist.MultivariateStudentT(torch.tensor(nu, dtype=torch.float64), mean, scale)
    found: WeightedDraws = []
    with fit.workspace.isolated(seeded_state(fit.derived_seed(seed, 4))), torch.no_grad():
        for _ in range(repetitions):
            u = proposal.sample((count,))
            log_p = joint.log_densities(u.to(joint.start.dtype)).double()
            log_weights = log_p - proposal.log_prob(u)
            found.append((u, torch.where(torch.isfinite(log_p), log_weights, -math.inf)))
    return found


def moments_of(fit: Fit, draws: WeightedDraws, proposal: str) -> ImportanceMoments:
    r"""Moments and evidence by Pareto-smoothed weights.

    .. math:: E[f(u) \mid x] \approx \sum_s w_s f(u_s), \quad w_s \propto p(x, u_s) / q(u_s)
    """
    means, sds, evidences = [], [], []
    for u, log_weights in draws:
        w = smoothed(log_weights)
        x = u.numpy()
        mean = w @ x
        means.append(mean)
        sds.append(np.sqrt(w @ (x - mean) ** 2))
        evidences.append(float(torch.logsumexp(log_weights, 0)) - math.log(len(w)))
    root = math.sqrt(len(draws))
    return ImportanceMoments(
        names=list(fit.joint.names),
        mean=np.mean(means, 0),
        sd=np.mean(sds, 0),
        mean_se=np.std(means, 0, ddof=1) / root,
        sd_se=np.std(sds, 0, ddof=1) / root,
        log_evidence=float(np.mean(evidences)),
        log_evidence_se=float(np.std(evidences, ddof=1) / root),
        pareto_k=pareto_k(torch.stack([w for _, w in draws])),
        proposal=proposal,
    )
