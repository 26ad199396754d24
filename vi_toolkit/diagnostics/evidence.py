"""The log evidence by importance sampling, and how far below it the ELBO is."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vi_toolkit.diagnostics.importance import (
    ImportanceMoments,
    WeightedDraws,
    draws_from_guide,
    moments_of,
)
from vi_toolkit.diagnostics.pareto import ParetoK
from vi_toolkit.result import Fit


@dataclass(frozen=True)
class Evidence:
    """Log evidence and ELBO, in nats.

    Attributes:
        log_evidence, log_evidence_se: log p(x) and its Monte Carlo standard error.
        elbo, elbo_se: of the guide, from fresh draws.
        pareto_k: of the weights behind the evidence. If it is not ``reliable``, the estimate is
            probably too low: the mean of an importance estimate is the evidence, but most estimates
            from heavy-tailed weights are below the mean.
    """

    log_evidence: float
    log_evidence_se: float
    elbo: float
    elbo_se: float
    pareto_k: ParetoK

    @property
    def gap(self) -> float:
        """log p(x) - ELBO = KL(q || posterior)."""
        return self.log_evidence - self.elbo

    @property
    def gap_se(self) -> float:
        return math.hypot(self.log_evidence_se, self.elbo_se)

    @property
    def meaning(self) -> str:
        """The result in one sentence."""
        said = (
            f"log evidence {self.log_evidence:.3f} ± {self.log_evidence_se:.3f} nats; the ELBO is "
            f"{self.gap:.3f} ± {self.gap_se:.3f} nats below it"
        )
        k = self.pareto_k
        # Unseen mass is missing from the evidence; below the standard error that does no harm.
        if k.reliable or (k.k < k.limit and k.unseen <= self.log_evidence_se):
            return said
        return f"{said}, but the evidence is probably too low: {k.fault}"

    def __repr__(self) -> str:
        return f"Evidence: {self.meaning}"


def log_evidence(
    fit: Fit, num_draws: int | None = None, repetitions: int = 8, seed: int = 0
) -> Evidence:
    r"""Log evidence from draws of the guide, and its gap to the ELBO.

    .. math:: \log p(x) \approx \log \frac1S \sum_s \frac{p(x, z_s)}{q(z_s)}, \qquad
              \log p(x) - \mathcal L = \mathrm{KL}(q \,\|\, p(z \mid x))

    The gap is the most that a richer guide could gain in the ELBO.

    Args:
        fit: a :class:`~vi_toolkit.Fit` on full data.
        num_draws: number of draws per repetition; None for as many as are cheap.
        repetitions: number of sets of draws, whose spread gives the standard error.
        seed: of the draws.

    Example:
        >>> import pyro, pyro.distributions as dist, vi_toolkit as vi
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> abs(vi.log_evidence(vi.fit(model, AutoNormal, {}, progress=False)).gap) < 0.01
        True
    """
    draws = draws_from_guide(fit, num_draws, repetitions, seed)
    return evidence_of(moments_of(fit, draws, "guide"), draws)


def evidence_of(moments: ImportanceMoments, guide_draws: WeightedDraws) -> Evidence:
    """The evidence by any proposal, beside the ELBO by the guide's own draws."""
    total = sum(len(w) for _, w in guide_draws)
    elbo = sum(float(w.sum()) for _, w in guide_draws) / total
    square = sum(float(((w - elbo) ** 2).sum()) for _, w in guide_draws) / total
    return Evidence(
        moments.log_evidence,
        moments.log_evidence_se,
        elbo,
        math.sqrt(square / total),
        moments.pareto_k,
    )
