"""The log evidence by importance sampling, and how far below it the ELBO is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from vi_toolkit.diagnostics.importance import (
    ImportanceMoments,
    Sample,
    moments_of,
    weighted_draws,
)
from vi_toolkit.diagnostics.pareto import ParetoK


@dataclass(frozen=True)
class Evidence:
    """Log evidence and ELBO, in nats. Two numbers and their errors, so it has no ``.plot()``.

    Attributes:
        log_evidence, log_evidence_se: log p(x) and its Monte Carlo standard error.
        elbo, elbo_se: of the guide, from fresh draws.
        pareto_k: of the weights behind the evidence. Where it is not ``reliable``, the evidence is
            at best a lower bound on average, as every importance estimate is.
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
        """In plain words."""
        said = (
            f"log evidence {self.log_evidence:.3f} ± {self.log_evidence_se:.3f} nats, the ELBO "
            f"{self.gap:.3f} ± {self.gap_se:.3f} below it"
        )
        k = self.pareto_k
        # Mass unseen is missing from the evidence, and no worse than noise of that size.
        if k.reliable or (k.k < k.limit and k.unseen <= self.log_evidence_se):
            return said
        return f"{said}; but the evidence is probably too low: {k.fault}"

    def __repr__(self) -> str:
        return f"Evidence: {self.meaning}"


def log_evidence(
    fit: Any, num_draws: int | None = None, repetitions: int = 8, seed: int = 0
) -> Evidence:
    r"""Log evidence from draws of the guide, and its gap to the ELBO.

    .. math:: \log p(x) \approx \log \frac1S \sum_s \frac{p(x, z_s)}{q(z_s)}, \qquad
              \log p(x) - \mathcal L = \mathrm{KL}(q \,\|\, p(z \mid x))

    The gap says how much a richer guide could gain at most, in the ELBO's own units.

    Args:
        fit: a :class:`~vi_toolkit.Fit` on full data.
        num_draws: per repetition; None for as many as is cheap.
        repetitions: sets of draws, from whose spread the standard error comes.
        seed: of the draws.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, vi_toolkit as vi
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> abs(vi.log_evidence(vi.fit(model, AutoNormal, {}, progress=False)).gap) < 0.01
        True
    """
    sample = weighted_draws(fit, None, num_draws, repetitions, seed)
    return evidence_of(moments_of(fit, sample, "guide"), sample)


def evidence_of(moments: ImportanceMoments, of_the_guide: Sample) -> Evidence:
    """Evidence by any proposal, and the ELBO by the guide's own draws."""
    total = sum(len(w) for _, w in of_the_guide)
    elbo = sum(float(w.sum()) for _, w in of_the_guide) / total
    square = sum(float(((w - elbo) ** 2).sum()) for _, w in of_the_guide) / total
    return Evidence(
        moments.log_evidence,
        moments.log_evidence_se,
        elbo,
        math.sqrt(square / total),
        moments.pareto_k,
    )
