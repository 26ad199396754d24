"""The ladder of diagnostics and its one verdict."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from vi_toolkit.agreement import DO_NOT_TRUST, MEANS_ONLY, STANDARD_ERRORS, TRUST
from vi_toolkit.diagnostics.bounds import ErrorBounds, bounds_of
from vi_toolkit.diagnostics.chains import WarmChains, warm_chains
from vi_toolkit.diagnostics.convergence import Convergence, convergence
from vi_toolkit.diagnostics.evidence import Evidence, evidence_of
from vi_toolkit.diagnostics.importance import ImportanceMoments, moments_of, weighted_draws
from vi_toolkit.diagnostics.linear_response import LinearResponse, linear_response
from vi_toolkit.diagnostics.missed_modes import MissedMode, missed_modes
from vi_toolkit.diagnostics.pareto import ParetoK

if TYPE_CHECKING:
    from vi_toolkit.figures import Figure

REPETITIONS = 8  # sets of draws, from whose spread standard errors come
RICHER = "vi.suggest_guide(fit) fits richer guides and says which one helps, and by how much."
MOST_FOR_COVARIANCE = 400  # latents up to which a proposal with a full covariance is tried


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What :func:`diagnose` found.

    Attributes:
        verdict: "trust", "trust the means only" or "do not trust".
        reasons: sentences behind it.
        next_steps: what to do, the most promising first.
        convergence: the first rung.
        pareto_k: of the guide's own weights; None if the ladder ended before.
        linear_response: of a mean-field guide by the deterministic method, else None.
        moments: reliable posterior moments, by importance sampling or by the chains; None where
            neither gave any.
        table: a row per scalar with the guide's mean and sd beside these moments'; None likewise.
        evidence: log evidence and its gap to the ELBO, where importance sampling gave them.
        bounds: on the error of every mean and sd, where the guide's own weights can be used.
        chains: short chains from the guide, where importance sampling could not decide.
        missed: other modes that hold mass; found by chance, so that none is no proof.
    """

    verdict: str
    reasons: list[str]
    next_steps: list[str]
    convergence: Convergence
    pareto_k: ParetoK | None = None
    linear_response: LinearResponse | None = None
    moments: ImportanceMoments | WarmChains | None = None
    table: pd.DataFrame | None = None
    evidence: Evidence | None = None
    bounds: ErrorBounds | None = None
    missed: list[MissedMode] = field(default_factory=list)
    chains: WarmChains | None = None

    def __repr__(self) -> str:
        lines = [f"Verdict: {self.verdict}."] + [f"- {reason}" for reason in self.reasons]
        if self.next_steps:
            lines += ["What to do next:"] + [f"- {step}" for step in self.next_steps]
        lines += ["Measured:", f"  convergence: {self.convergence.meaning}"]
        if self.pareto_k is not None:
            lines.append(f"  guide's weights: {self.pareto_k!r}")
        if isinstance(self.moments, ImportanceMoments) and self.moments.proposal != "guide":
            lines.append(f"  {self.moments.proposal}'s weights: {self.moments.pareto_k!r}")
        if self.chains is not None:
            lines.append(f"  chains: {self.chains!r}")
        if self.linear_response is not None:
            lines.append(f"  linear response: {self.linear_response.meaning}")
        if self.evidence is not None:
            lines.append(f"  evidence: {self.evidence.meaning}")
        if self.bounds is not None:
            lines.append(f"  bounds: {self.bounds.meaning}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Numbers and sentences as plain Python values, for JSON."""
        out: dict[str, Any] = {
            "verdict": self.verdict,
            "reasons": self.reasons,
            "next_steps": self.next_steps,
            "converged": bool(self.convergence.converged),
            "monte_carlo_error": float(self.convergence.monte_carlo_error),
        }
        if self.pareto_k is not None:
            out["pareto_k"] = {
                key: getattr(self.pareto_k, key)
                for key in (
                    "k", "k_se", "effective_fraction", "sd_log_weight", "unseen", "draws"
                )
            }  # fmt: skip
        if self.moments is not None:
            out["moments_by"] = _by(self.moments)
        out["missed_modes"] = [
            {"share": mode.share, "location": mode.location} for mode in self.missed
        ]
        if self.evidence is not None:
            for key in ("log_evidence", "log_evidence_se", "elbo", "elbo_se", "gap", "gap_se"):
                out[key] = getattr(self.evidence, key)
        if self.table is not None:
            out["scalars"] = self.table.to_dict("index")
        return out

    def plot(self) -> Figure:
        """One page: errors of means and sds per scalar, and the verdict."""
        from vi_toolkit.figures import plot_diagnosis

        return plot_diagnosis(self)


def diagnose(
    fit: Any,
    mean_tolerance: float = 0.05,
    sd_tolerance: float = 0.05,
    num_draws: int | None = None,
    seed: int = 0,
    chains: bool = True,
) -> Diagnosis:
    """Whether to believe a fit, from the fit, the model and the data alone.

    The ladder, each rung standing on the one before:

    1. Has the optimiser arrived? If not, nothing else matters.
    2. The guide's own importance weights: Pareto k-hat and the mass that they leave unseen.
    3. A second, wider proposal around the guide: a multivariate t whose covariance is the linear
       response of a mean-field guide, or the guide's own. If the evidence seen from there is
       larger, the guide leaves out mass.
    4. Where neither proposal's weights are reliable, as in some 50 dimensions and more, many
       short chains from the guide's draws (:func:`~vi_toolkit.warm_chains`): do they stay?
    5. Where one of these is reliable, the posterior means and sds that it found, and the guide's
       beside them, held to the limits of :func:`~vi_toolkit.compare`.
    6. Other modes, looked for from new starts (:func:`~vi_toolkit.missed_modes`): the only rung
       that sees mass far from where the fit is, and it may miss some.

    If nothing is reliable, nothing confirms the fit, and the verdict is "do not trust" even though
    it may be right.

    Args:
        fit: a :class:`~vi_toolkit.Fit`.
        mean_tolerance: largest error of a mean, in posterior sds.
        sd_tolerance: largest relative error of an sd.
        num_draws: per set of importance draws; None for as many as is cheap.
        seed: of the draws.
        chains: False to leave out the chains, which take longest (seconds to a minute or two).

    Returns:
        A :class:`Diagnosis`: ``verdict``, ``reasons``, ``next_steps``, a table, ``.plot()``.

    Raises:
        ValueError: the model has discrete latents, or the fit is a point estimate.

    References:
        Yao et al., "Yes, but Did It Work?", ICML 2018; Giordano et al., JMLR 2018.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, vi_toolkit as vi
        >>> from pyro.infer.autoguide import AutoNormal
        >>> tril = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
        >>> def model():
        ...     pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), scale_tril=tril))
        >>> fit = vi.fit(model, AutoNormal, {}, progress=False)
        >>> vi.diagnose(fit, draws=10_000).verdict
        'trust the means only'
    """
    if fit.guide_family == "point":
        raise ValueError("a point estimate has no uncertainty to diagnose: fit another guide")
    arrived = convergence(fit)
    if not arrived.converged:
        step = (
            "fit.extend() solves again with more draws"
            if fit.method == "deterministic"
            else "fit.extend(steps) goes on; a smaller first step or a simpler guide may be needed"
        )
        reasons = ["The fit has not converged.", arrived.meaning]
        return Diagnosis(DO_NOT_TRUST, reasons, [step], arrived)

    sample = weighted_draws(fit, None, num_draws, REPETITIONS, seed)
    own = moments_of(fit, sample, "guide")
    response = None
    if fit.guide_family == "mean-field" and fit.method == "deterministic":
        response = linear_response(fit)
    wide = covariance = None
    if fit.joint.dim <= MOST_FOR_COVARIANCE:
        covariance = _covariance(fit, response)
        if covariance is not None:
            wider = weighted_draws(fit, covariance, num_draws, REPETITIONS, seed)
            wide = moments_of(fit, wider, "multivariate t")
    weighted = [m for m in (wide, own) if m is not None and m.pareto_k.reliable]
    missed = missed_modes(fit, weighted[0].log_evidence if weighted else None, seed=seed)
    reasons, next_steps = [], []
    if missed:
        reasons.append(f"It is not the whole posterior: {missed[0].meaning}.")
    run = None if weighted or not chains else warm_chains(fit, covariance, seed)
    moments: ImportanceMoments | WarmChains
    if weighted:
        moments = weighted[0]
    elif run is not None and run.reliable:
        moments = run
    else:
        reasons.append(f"Nothing confirms it: of the guide's weights {own.pareto_k.fault}.")
        if wide is not None:
            reasons.append(f"Nor does a wider proposal: {wide.pareto_k.fault}.")
        if run is not None:
            reasons.append(_astray(run))
        next_steps = _unconfirmed(fit, response)
        return Diagnosis(
            DO_NOT_TRUST,
            reasons,
            next_steps,
            arrived,
            own.pareto_k,
            response,
            missed=missed,
            chains=run,
        )
    table = _table(fit, moments, mean_tolerance, sd_tolerance)
    errors = table["mean error"]
    ratios = table["sd ratio"]
    means_right, sds_right = bool(table["mean ok"].all()), bool(table["sd ok"].all())
    worst = errors.abs().idxmax()
    off = int((~table["mean ok"]).sum())
    reasons.append(
        f"Every mean agrees with {_by(moments)}: the largest error is "
        f"{errors[worst]:+.3f} sd ({worst})."
        if means_right
        else f"By {_by(moments)} {off} of {len(table)} means are off, {worst} by "
        f"{errors[worst]:+.3f} sd."
    )
    narrow = (ratios.map(math.log)).abs().idxmax()
    reasons.append(
        f"Every sd agrees: the ratio furthest from 1 is {ratios[narrow]:.3f} ({narrow})."
        if sds_right
        else f"{int((~table['sd ok']).sum())} of {len(table)} sds are off: that of {narrow} is "
        f"{ratios[narrow]:.3f} of what it should be."
    )
    verdict = TRUST if means_right and sds_right else MEANS_ONLY if means_right else DO_NOT_TRUST
    if verdict != TRUST:
        next_steps = _corrections(fit, response, moments)
    if missed:
        verdict = DO_NOT_TRUST
        reasons[1:] = [f"Within its own mode: {r[0].lower()}{r[1:]}" for r in reasons[1:]]
        next_steps = [
            "If a symmetry of the model (signs, labels) makes the modes, break it by a constraint, "
            "or use only what is the same in all of them; else use MCMC from many starts."
        ]
    return Diagnosis(
        verdict,
        reasons,
        next_steps,
        arrived,
        own.pareto_k,
        response,
        moments,
        table,
        evidence_of(moments, sample) if isinstance(moments, ImportanceMoments) else None,
        bounds_of(fit, sample) if own.pareto_k.reliable else None,
        missed,
        run,
    )


def _by(moments: ImportanceMoments | WarmChains) -> str:
    return "importance sampling" if isinstance(moments, ImportanceMoments) else "short chains"


def _astray(run: WarmChains) -> str:
    """What chains that did not arrive show all the same, and as no more than that."""
    far = int(np.abs(run.moved).argmax())
    return (
        f"Nor do {run.chains} short chains from its draws: {run.faults[0]}; the mean of "
        f"{run.names[far]} has moved by {run.moved[far]:+.2f} sd so far."
    )


def _covariance(fit: Any, response: LinearResponse | None) -> np.ndarray | None:
    if response is not None and response.optimum:
        covariance = response.covariance
    else:
        u = fit.joint.flatten(fit.sample(50_000, seed=1)).double().numpy()
        covariance = np.cov(u.T).reshape(u.shape[1], u.shape[1])
    try:
        np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:
        return None
    return covariance


def _table(
    fit: Any, moments: ImportanceMoments | WarmChains, mean_limit: float, sd_limit: float
) -> Any:
    u = fit.joint.flatten(fit.sample(100_000, seed=2)).double()
    mean, sd = u.mean(0).numpy(), u.std(0).numpy()
    error = (mean - moments.mean) / moments.sd
    error_se = moments.mean_se / moments.sd
    ratio, ratio_se = sd / moments.sd, moments.sd_se / moments.sd
    return pd.DataFrame(
        {
            "posterior mean": moments.mean,
            "posterior sd": moments.sd,
            "VI mean": mean,
            "VI sd": sd,
            "mean error": error,
            "mean_error_se": error_se,
            "sd ratio": ratio,
            "sd_ratio_se": ratio_se,
            "mean ok": np.abs(error) <= np.maximum(mean_limit, STANDARD_ERRORS * error_se),
            "sd ok": np.abs(np.log(ratio))
            <= np.maximum(math.log1p(sd_limit), STANDARD_ERRORS * ratio_se),
        },
        index=pd.Index(moments.names, name="scalar"),
    )


def _unconfirmed(fit: Any, response: LinearResponse | None) -> list[str]:
    steps = [RICHER]
    if response is not None and response.optimum:
        low = float((response.guide_sd / response.sd).min())
        steps.append(
            f"If you need no more than means, note that linear response finds the narrowest sd "
            f"{low:.2f} of what it should be."
        )
    steps.append(
        "Write hierarchical scales non-centred (z ~ Normal(0, 1), theta = mu + tau z): a funnel is "
        "the usual reason."
    )
    steps.append("Run NUTS (vi.Reference.nuts) and compare, if the answer matters.")
    return steps


def _corrections(
    fit: Any, response: LinearResponse | None, moments: ImportanceMoments | WarmChains
) -> list[str]:
    steps = []
    if response is not None and response.optimum:
        ratio = response.sd / moments.sd
        steps.append(
            f"Take the sds of vi.linear_response(fit): they are {ratio.min():.2f} to "
            f"{ratio.max():.2f} of the posterior's, the guide's "
            f"{(response.guide_sd / moments.sd).min():.2f} to "
            f"{(response.guide_sd / moments.sd).max():.2f}."
        )
    steps.append("Take posterior moments from this diagnosis: .moments.mean and .moments.sd.")
    steps.append(RICHER)
    return steps
