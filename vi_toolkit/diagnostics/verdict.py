"""The diagnostics in order, and the one verdict that they give."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
import pandas as pd

from vi_toolkit.agreement import DO_NOT_TRUST, MEANS_ONLY, STANDARD_ERRORS, TRUST
from vi_toolkit.diagnostics.bounds import ErrorBounds, bounds_of
from vi_toolkit.diagnostics.chains import WarmChains, warm_chains
from vi_toolkit.diagnostics.convergence import Convergence, convergence
from vi_toolkit.diagnostics.evidence import Evidence, evidence_of
from vi_toolkit.diagnostics.importance import (
    ImportanceMoments,
    draws_from_guide,
    draws_from_t,
    moments_of,
)
from vi_toolkit.diagnostics.linear_response import LinearResponse, linear_response
from vi_toolkit.diagnostics.missed_modes import MissedMode, missed_modes
from vi_toolkit.diagnostics.pareto import ParetoK
from vi_toolkit.figures import COLOURS, MOST_SCALARS, REFERENCE, STYLE, Figure, wrapped
from vi_toolkit.result import Fit

Moments = ImportanceMoments | WarmChains

REPETITIONS = 8  # sets of draws, whose spread gives the standard errors
RICHER = "vi.suggest_guide(fit) fits richer guides and says which one helps, and by how much."
MOST_FOR_COVARIANCE = 400  # latents up to which a proposal with a full covariance is tried
PARETO_NUMBERS = ("k", "k_se", "effective_fraction", "sd_log_weight", "unseen", "num_draws")
EVIDENCE_NUMBERS = ("log_evidence", "log_evidence_se", "elbo", "elbo_se", "gap", "gap_se")


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What :func:`diagnose` found.

    Attributes:
        verdict: "trust", "trust the means only" or "do not trust".
        reasons: sentences behind the verdict.
        next_steps: what to do, the most promising first.
        convergence: of the optimiser.
        pareto_k: of the guide's own weights; None if the fit has not converged.
        linear_response: of a deterministic mean-field fit, else None.
        moments: reliable posterior moments, by importance sampling or by the chains; None if
            neither gave any.
        table: a row per scalar with the guide's mean and sd beside these moments'; None likewise.
        evidence: log evidence and its gap to the ELBO, if the moments are by importance sampling.
        bounds: on the error of every mean and sd, if the guide's own weights can be used.
        missed: other modes that hold mass. The search may miss some.
        chains: short chains from the guide, if importance sampling could not decide.
    """

    verdict: str
    reasons: list[str]
    next_steps: list[str]
    convergence: Convergence
    pareto_k: ParetoK | None = None
    linear_response: LinearResponse | None = None
    moments: Moments | None = None
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
            "missed_modes": [{"share": m.share, "location": m.location} for m in self.missed],
        }
        if self.pareto_k is not None:
            out["pareto_k"] = {name: getattr(self.pareto_k, name) for name in PARETO_NUMBERS}
        if self.moments is not None:
            out["moments_by"] = _method(self.moments)
        if self.evidence is not None:
            out |= {name: getattr(self.evidence, name) for name in EVIDENCE_NUMBERS}
        if self.table is not None:
            out["scalars"] = self.table.to_dict("index")
        return out

    def plot(self) -> Figure:
        """Figure with the error of every mean and sd, the limits, and the verdict's reasons."""
        table = self.table
        with matplotlib.rc_context(STYLE):
            rows = 0 if table is None else min(len(table), MOST_SCALARS)
            figure = Figure(figsize=(9, 1.8 + 0.22 * max(rows, 4)), layout="constrained")
            figure.suptitle(f"Verdict: {self.verdict}", x=0.01, ha="left", fontsize=13)
            if table is None:
                axes = figure.subplots()
                axes.axis("off")
                text = wrapped([*self.reasons, "", *self.next_steps])
                axes.text(0, 1, text, va="top", fontsize=9)
                return figure
            size = table["mean error"].abs() + np.log(table["sd ratio"]).abs()
            shown = table.loc[size.sort_values(ascending=False).index[:rows]].iloc[::-1]
            heights = np.arange(rows)
            left, right = figure.subplots(1, 2, sharey=True)
            for axes, column, label, ideal in (
                (left, "mean error", "error of the mean (posterior sds)", 0.0),
                (right, "sd ratio", "sd, VI / posterior", 1.0),
            ):
                value = shown[column]
                error = shown[f"{column.replace(' ', '_')}_se"]
                ok = shown[f"{column.split()[0]} ok"].to_numpy()
                axes.axvspan(ideal - 0.05, ideal + 0.05, color=REFERENCE, lw=0)
                for pick, colour, legend in (
                    (ok, COLOURS[0], "within the limits"),
                    (~ok, COLOURS[1], "off"),
                ):
                    if pick.any():
                        axes.errorbar(value[pick], heights[pick], xerr=2 * error[pick], fmt="o",
                                      ms=4, lw=1, color=colour, label=legend)  # fmt: skip
                axes.set_xlabel(label)
                axes.margins(x=0.1)
            left.set_yticks(heights, shown.index)
            few = f"{rows} scalar{'s' * (rows > 1)}"
            left.set_title(few if rows == len(table) else f"{rows} worst of {len(table)}")
            k = self.pareto_k
            if k is not None:
                right.set_title(f"k-hat of the guide {k.k:.2f} ± {k.k_se:.2f}")
            right.legend(frameon=False, fontsize=8)
            figure.supxlabel(wrapped(self.reasons), x=0.01, ha="left", fontsize=9)
        return figure


def diagnose(
    fit: Fit,
    mean_tolerance: float = 0.05,
    sd_tolerance: float = 0.05,
    num_draws: int | None = None,
    seed: int = 0,
    chains: bool = True,
) -> Diagnosis:
    """Judge a fit from the fit, the model and the data alone.

    The diagnostics run in this order, and each relies on the ones before:

    1. Has the optimiser converged? If not, the rest is skipped.
    2. Importance weights of draws from the guide: Pareto k-hat and the mass that they do not see.
    3. Importance weights of a second, wider proposal: a multivariate t around the guide's mean,
       whose covariance is the linear response of a mean-field guide, or else the guide's own. If it
       finds a larger evidence, the guide leaves out mass.
    4. If neither proposal has reliable weights, as is common beyond some 50 dimensions: many short
       chains from draws of the guide, whose distribution changes if the guide is wrong
       (:func:`~vi_toolkit.warm_chains`).
    5. If one of these is reliable: its posterior means and sds. The guide's means and sds must
       agree with them within the limits of :func:`~vi_toolkit.compare`.
    6. Other modes, found from new starts (:func:`~vi_toolkit.missed_modes`). Only this step sees
       mass that is far from the fit, and it may miss some.

    If no moments are reliable, nothing confirms the fit. The verdict is then "do not trust", even
    though the fit may be right.

    Args:
        fit: a :class:`~vi_toolkit.Fit`.
        mean_tolerance: largest error of a mean, in posterior sds.
        sd_tolerance: largest relative error of an sd.
        num_draws: number of draws in each set of importance draws; None for as many as are cheap.
        seed: of the draws.
        chains: whether to run the chains if they are needed. They take longest: seconds to a minute
            or two.

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
        >>> vi.diagnose(fit, num_draws=10_000).verdict
        'trust the means only'
    """
    if fit.guide_family == "point":
        raise ValueError("a point estimate has no uncertainty to diagnose: fit another guide")
    optimiser = convergence(fit)
    if not optimiser.converged:
        step = (
            "Call fit.extend() to solve again with more draws."
            if fit.method == "deterministic"
            else "Call fit.extend(steps) to go on. The fit may need a smaller first step size or a "
            "simpler guide."
        )
        if fit.run.jumps:
            step = "Take the score function for that latent, or sum over it."
        reasons = ["The fit has not converged.", optimiser.meaning]
        return Diagnosis(DO_NOT_TRUST, reasons, [step], optimiser)
    if points := fit.workspace.points:
        names = ", ".join(map(repr, points))
        return Diagnosis(
            DO_NOT_TRUST,
            [
                f"The guide holds {names} at a point. It says nothing about the uncertainty of "
                f"{names}, and the sds of the other latents hold for that point only."
            ],
            [f"Give {names} a distribution with a spread in the guide, as AutoNormal does."],
            optimiser,
        )

    guide_draws = draws_from_guide(fit, num_draws, REPETITIONS, seed)
    own = moments_of(fit, guide_draws, "guide")
    response = None
    if fit.guide_family == "mean-field" and fit.method == "deterministic":
        response = linear_response(fit)
    wide = covariance = None
    if fit.joint.dim <= MOST_FOR_COVARIANCE:
        covariance = _covariance(fit, response)
        if covariance is not None:
            wide_draws = draws_from_t(fit, covariance, num_draws, REPETITIONS, seed)
            wide = moments_of(fit, wide_draws, "multivariate t")
    weighted = next((m for m in (wide, own) if m is not None and m.pareto_k.reliable), None)
    missed = missed_modes(fit, weighted.log_evidence if weighted else None, seed=seed)
    short = warm_chains(fit, covariance, seed) if chains and weighted is None else None
    moments: Moments | None = weighted
    if moments is None and short is not None and short.reliable:
        moments = short

    reasons = []
    if missed:
        reasons.append(f"The fit is not the whole posterior: {missed[0].meaning}.")
    if moments is None:
        return Diagnosis(
            DO_NOT_TRUST,
            reasons + _why_unconfirmed(own, wide, short),
            _steps_if_unconfirmed(response),
            optimiser,
            own.pareto_k,
            response,
            missed=missed,
            chains=short,
        )
    table = _table(fit, moments, mean_tolerance, sd_tolerance)
    agreement = _agreement(table, moments)
    verdict, next_steps = TRUST, []
    if not (table["mean ok"].all() and table["sd ok"].all()):
        verdict = MEANS_ONLY if table["mean ok"].all() else DO_NOT_TRUST
        next_steps = _corrections(response, moments)
    if missed:
        verdict = DO_NOT_TRUST
        agreement = [f"Within its own mode: {r[0].lower()}{r[1:]}" for r in agreement]
        next_steps = [
            "If a symmetry of the model (of signs or labels) makes the modes, break it by a "
            "constraint, or use only quantities that are the same in all of them; otherwise use "
            "MCMC from many starts."
        ]
    return Diagnosis(
        verdict,
        reasons + agreement,
        next_steps,
        optimiser,
        own.pareto_k,
        response,
        moments,
        table,
        evidence_of(weighted, guide_draws) if weighted else None,
        bounds_of(fit, guide_draws) if own.pareto_k.reliable else None,
        missed,
        short,
    )


def _method(moments: Moments) -> str:
    return "importance sampling" if isinstance(moments, ImportanceMoments) else "short chains"


def _covariance(fit: Fit, response: LinearResponse | None) -> np.ndarray | None:
    """Covariance of the wider proposal, (d, d); None if it is not positive definite."""
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


def _table(fit: Fit, moments: Moments, mean_tolerance: float, sd_tolerance: float) -> pd.DataFrame:
    u = fit.joint.flatten(fit.sample(100_000, seed=2)).double()
    mean, sd = u.mean(0).numpy(), u.std(0).numpy()
    error = (mean - moments.mean) / moments.sd
    error_se = moments.mean_se / moments.sd
    ratio, ratio_se = sd / moments.sd, moments.sd_se / moments.sd
    mean_limit = np.maximum(mean_tolerance, STANDARD_ERRORS * error_se)
    sd_limit = np.maximum(math.log1p(sd_tolerance), STANDARD_ERRORS * ratio_se)
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
            "mean ok": np.abs(error) <= mean_limit,
            "sd ok": np.abs(np.log(ratio)) <= sd_limit,
        },
        index=pd.Index(moments.names, name="scalar"),
    )


def _agreement(table: pd.DataFrame, moments: Moments) -> list[str]:
    """Sentences that say whether the guide's means and sds are right."""
    errors, ratios = table["mean error"], table["sd ratio"]
    worst, furthest = errors.abs().idxmax(), np.log(ratios).abs().idxmax()
    off = {kind: int((~table[f"{kind} ok"]).sum()) for kind in ("mean", "sd")}
    means = (
        f"According to {_method(moments)}, {off['mean']} of {len(table)} means are off; the "
        f"largest error is {errors[worst]:+.3f} sd ({worst})."
        if off["mean"]
        else f"Every mean agrees with {_method(moments)}: the largest error is "
        f"{errors[worst]:+.3f} sd ({worst})."
    )
    sds = (
        f"{off['sd']} of {len(table)} sds are off: that of {furthest} is "
        f"{ratios[furthest]:.3f} of what it should be."
        if off["sd"]
        else f"Every sd agrees: the ratio furthest from 1 is {ratios[furthest]:.3f} ({furthest})."
    )
    return [means, sds]


def _why_unconfirmed(
    own: ImportanceMoments, wide: ImportanceMoments | None, short: WarmChains | None
) -> list[str]:
    reasons = [
        "Nothing confirms the fit. Importance weights of draws from the guide cannot be used: "
        f"{own.pareto_k.fault}."
    ]
    if wide is not None:
        reasons.append(f"Those of a wider proposal cannot be used either: {wide.pareto_k.fault}.")
    if short is not None:
        far = int(np.abs(short.moved).argmax())
        reasons.append(
            f"Nor can {short.num_chains} short chains from draws of the guide: {short.faults[0]}. "
            f"So far, the mean of {short.names[far]} has moved by {short.moved[far]:+.2f} sd."
        )
    return reasons


def _steps_if_unconfirmed(response: LinearResponse | None) -> list[str]:
    steps = [RICHER]
    if response is not None and response.optimum:
        low = float((response.guide_sd / response.sd).min())
        steps.append(
            "If you need only the means, note that according to linear response the narrowest sd "
            f"is {low:.2f} of what it should be."
        )
    return [
        *steps,
        "Write hierarchical scales non-centred (z ~ Normal(0, 1), theta = mu + tau z): a funnel is "
        "the usual cause.",
        "Run NUTS (vi.Reference.nuts) and compare, if the answer matters.",
    ]


def _corrections(response: LinearResponse | None, moments: Moments) -> list[str]:
    steps = []
    if response is not None and response.optimum:
        ratio, guide_ratio = response.sd / moments.sd, response.guide_sd / moments.sd
        steps.append(
            f"Take the sds of vi.linear_response(fit): they are {ratio.min():.2f} to "
            f"{ratio.max():.2f} times the posterior's, while the guide's sds are "
            f"{guide_ratio.min():.2f} to {guide_ratio.max():.2f} times the posterior's."
        )
    steps.append("Take posterior moments from this diagnosis: .moments.mean and .moments.sd.")
    steps.append(RICHER)
    return steps
