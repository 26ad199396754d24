"""A variational fit beside a reference posterior: what is right, and what theory expects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.stats

from vi_toolkit.reference.reference import LEVELS, Reference

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vi_toolkit.result import Fit

STANDARD_ERRORS = 4.0
"""A limit is never set closer than this many Monte Carlo standard errors."""

TRUST, MEANS_ONLY, DO_NOT_TRUST = "trust", "trust the means only", "do not trust"


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """What :func:`compare` found.

    Attributes:
        table: one row per scalar on the unconstrained scale: reference mean and sd, VI mean and sd,
            mean error (in reference sds) and its standard error, sd ratio (VI over reference), its
            standard error, the sd ratio expected of the guide's family, and ``ok``.
        verdict: "trust" (means, sds and correlations agree with the reference), "trust the means
            only", or "do not trust".
        reasons: sentences behind the verdict.
        ok: every row is ok and, where the family can have correlations, so are they; never against
            a reference that was refused.
        reference: what the fit was compared with.
        family: the guide's family: "mean-field", "full-rank", "low-rank", "point" or None.
        quantiles: VI quantiles "5%", "25%", "50%", "75%", "95%", each (d,).
        mean_tolerance, sd_tolerance: as given to :func:`compare`.
    """

    table: pd.DataFrame
    verdict: str
    reasons: list[str]
    ok: bool
    reference: Reference
    family: str | None
    quantiles: dict[str, np.ndarray]
    mean_tolerance: float
    sd_tolerance: float

    def assert_ok(self) -> None:
        """Raise AssertionError, listing the rows at fault, unless the fit is what it should be.

        That is: means equal to the reference's, and sds equal to what the guide's family can give.
        A mean-field fit that is too narrow exactly as theory says passes; its verdict still is
        "trust the means only".
        """
        if not self.ok:
            bad = self.table[~self.table["ok"]]
            rows = f"\n{_text(bad)}" if len(bad) else ""
            raise AssertionError("\n".join(self.reasons) + rows)

    def plot(self, **options: Any) -> Figure:
        """Intervals and sd ratios; see :func:`~vi_toolkit.figures.plot_comparisons`."""
        from vi_toolkit.figures import plot_comparisons  # matplotlib only where it is wanted

        return plot_comparisons({self.family or "VI": self}, **options)

    def __repr__(self) -> str:
        lines = [_text(self.table), "", f"Verdict: {self.verdict}."]
        return "\n".join(lines + [f"- {reason}" for reason in self.reasons])


def compare(
    fit: Fit,
    reference: Reference,
    mean_tolerance: float = 0.05,
    sd_tolerance: float = 0.05,
    correlation_tolerance: float = 0.05,
    num_draws: int = 100_000,
    seed: int = 0,
) -> Comparison:
    r"""Compare a fit with a reference posterior, scalar by scalar on the unconstrained scale.

    With m, s the reference's mean and sd, and m', s' those of ``draws`` draws of the fit:

    - a mean is right if \|m' - m\| / s <= max(``mean_tolerance``, 4 se);
    - an sd is right if \|log(s' / (r s))\| <= max(log(1 + ``sd_tolerance``), 4 se), where r is what
      the family can give: r_i = (Lambda_ii Sigma_ii)^(-1/2) for a mean-field guide, whose variances
      are too small by theory (Lambda = Sigma^(-1); see ``Reference.mean_field_sd_ratio``); 0 for a
      point estimate; 1 for all others. So a mean-field fit that fails to underestimate is *not* ok;
    - where the family has correlations, every one is within
      max(``correlation_tolerance``, 4 se) of the reference's.

    se joins the Monte Carlo errors of the two sides' draws; the optimiser's error is not part of it
    and excuses nothing. 4 se exceeds a tolerance of 0.05 sd only where the reference has fewer than
    6,400 effective draws; the limit then grows so that chance alone does not fail a right fit, and
    the reasons say so. Nothing else widens a limit: a posterior that is not near-Gaussian is held
    to the same numbers, although the r of a mean-field guide is only approximate there.

    A refused reference (``error.reference`` of a InvalidReferenceError) confirms nothing: its rows can be
    read, but the verdict is "do not trust".

    Args:
        fit: has ``joint`` (``names``, ``flatten``), ``family`` and ``sample(n, seed=...)``.
        reference: of the same model and data.
        mean_tolerance: in reference sds.
        sd_tolerance: relative.
        correlation_tolerance: absolute.
        num_draws: of the fit; at least 100,000, so that its sampling error (0.003 sd) does not matter.
        seed: of these draws.

    Raises:
        TypeError: ``reference`` is no :class:`~vi_toolkit.Reference`.
        ValueError: fit and reference do not have the same scalars, or a draw is not finite.

    Example:
        >>> import pyro, pyro.distributions as dist, torch, vi_toolkit as vi
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("observations", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> y = torch.tensor([1.0, 2.0, 3.0])
        >>> fit = vi.fit(model, AutoNormal, {"y": y}, progress=False)
        >>> exact = vi.Reference.exact(["mu"], mean=[6 / 4], covariance=[[1 / 4]])
        >>> vi.compare(fit, exact).verdict
        'trust'
    """
    _check_reference(reference)
    _check_names(list(fit.joint.names), reference.names)
    if num_draws < 100_000:
        raise ValueError(f"draws is {num_draws}; compare needs at least 100,000 of them")
    own = fit.sample(num_draws, seed=seed)
    # The user's dtype may be too coarse for sums over 100,000 numbers.
    z = fit.joint.flatten({k: v.detach().cpu().double() for k, v in own.items()}).numpy()
    for name, column in zip(reference.names, z.T, strict=True):
        if not np.isfinite(column).all():
            raise ValueError(f"the fit's draws of {name} are not all finite")
    m, s = reference.mean, reference.sd
    mean, sd = z.mean(0), z.std(0)
    varies = sd > 1e-9 * (np.abs(mean) + s)
    sd = np.where(varies, sd, 0.0)

    error = (mean - m) / s
    error_se = np.hypot(reference.mean_se, sd / np.sqrt(num_draws)) / s
    mean_limit = np.maximum(mean_tolerance, STANDARD_ERRORS * error_se)
    mean_ok = np.abs(error) <= mean_limit

    expected = _expected_sd_ratio(fit.guide_family, reference)
    ratio = sd / s
    mean_field = fit.guide_family == "mean-field" and reference.covariance is not None
    # What a mean-field sd is held against is the reference's conditional sd.
    noise = reference.conditional_sd_se / (expected * s) if mean_field else reference.sd_se / s
    kurtosis = np.zeros_like(sd)
    kurtosis[varies] = scipy.stats.kurtosis(z[:, varies])
    with np.errstate(divide="ignore", invalid="ignore"):
        # se of log sd is sqrt((kurtosis + 2) / 4n), with the excess kurtosis.
        own_se = np.sqrt(np.maximum(kurtosis + 2, 0) / (4 * num_draws))
        log_se = np.hypot(noise, own_se)
        sd_limit = np.maximum(np.log1p(sd_tolerance), STANDARD_ERRORS * log_se)
        excess = np.log(ratio / expected)
        sd_ok = np.where(expected == 0, ~varies, np.abs(excess) <= sd_limit)
        # The same against the reference itself, which decides whether an sd can be used as it is.
        as_it_is = np.abs(np.log(ratio)) <= np.maximum(
            np.log1p(sd_tolerance),
            STANDARD_ERRORS * np.hypot(reference.sd_se / s, own_se),
        )

    table = pd.DataFrame(
        {
            "reference mean": m,
            "reference sd": s,
            "VI mean": mean,
            "VI sd": sd,
            "mean error": error,
            "mean_error_se": error_se,
            "sd ratio": ratio,
            "sd_ratio_se": ratio * log_se,
            "expected sd ratio": expected,
            "ok": mean_ok & sd_ok,
        },
        index=pd.Index(reference.names, name="scalar"),
    )

    names, reasons = reference.names, []
    refused = reference.made.get("refused")
    if refused:
        reasons.append(f"The reference was refused, so it confirms nothing: {refused}.")
    # Means
    if mean_ok.all():
        i = int(np.argmax(np.abs(error)))
        reasons.append(
            f"Every mean agrees: the largest error is {error[i]:+.3f} reference sd ({names[i]})."
        )
    else:
        i = int(np.argmax(np.abs(error) / mean_limit))
        reasons.append(
            f"{_count(~mean_ok, 'mean')} off: {names[i]} by {error[i]:+.3f} reference sd "
            f"(limit {mean_limit[i]:.3f})."
        )
    # Sds
    bug = False
    if fit.guide_family == "point":
        reasons.append("A point estimate has no sds, intervals or correlations.")
    elif sd_ok.all() and as_it_is.all():
        i = int(np.argmax(np.abs(np.log(ratio))))
        reasons.append(
            f"Every sd agrees: the ratio furthest from 1 is {ratio[i]:.3f} ({names[i]})."
        )
    elif sd_ok.all():
        i = int(np.argmin(ratio))
        reasons.append(
            "The sds are too small exactly as theory says of a mean-field guide: that of "
            f"{names[i]} is {ratio[i]:.3f} of the reference, where {expected[i]:.3f} is expected. "
            "For intervals use a guide with correlations, such as AutoMultivariateNormal."
        )
    else:
        i = int(np.argmax(np.abs(excess) / sd_limit))
        reasons.append(
            f"{_count(~sd_ok, 'sd')} off: that of {names[i]} is {ratio[i]:.3f} of the reference's, "
            f"where {expected[i]:.3f} is expected (limit {100 * np.expm1(sd_limit[i]):.1f} %)."
        )
        wide = mean_field & (expected < 0.95) & (excess > sd_limit)
        if wide.any() and reference.near_gaussian:
            bug = True
            reasons.append(
                "A mean-field guide cannot be that wide on a near-Gaussian posterior: suspect the "
                "optimiser, the guide or its family's name."
            )
    # Correlations
    correlations_ok = True
    if reference.covariance is not None and len(names) > 1:
        correlations_ok, sentence = _correlations(
            z, varies, reference, fit.guide_family, correlation_tolerance, num_draws
        )
        if sentence:
            reasons.append(sentence)
    # What the reader must know about the comparison itself
    if not getattr(fit, "converged", True):
        reasons.append(f"The optimiser did not report convergence: {fit.convergence}")
    widened = (mean_limit > mean_tolerance) | (sd_limit > np.log1p(sd_tolerance))
    if widened.any():
        reasons.append(
            f"The reference's Monte Carlo error sets the limits of {widened.sum()} of {len(names)} "
            f"scalars, up to {mean_limit.max():.3f} sd for a mean and "
            f"{100 * np.expm1(sd_limit.max()):.1f} % for an sd; a longer reference sharpens them."
        )
    if not reference.near_gaussian:
        i = int(np.argmax(np.maximum(np.abs(reference.skewness) / 0.25,
                                     np.abs(reference.excess_kurtosis) / 0.35)))  # fmt: skip
        reasons.append(
            "The posterior is not near-Gaussian "
            f"({names[i]}: skewness {reference.skewness[i]:.2f}, "
            f"excess kurtosis {reference.excess_kurtosis[i]:.2f}), so no Gaussian guide fits it "
            "exactly"
            + (", and the expected mean-field sd ratios are approximate." if mean_field else ".")
        )
    if fit.guide_family == "mean-field" and reference.covariance is None:
        reasons.append(
            "The reference has no covariance, so the sds of this mean-field fit are held against "
            "the reference's own."
        )

    if refused or not mean_ok.all() or bug:
        verdict = DO_NOT_TRUST
    elif sd_ok.all() and as_it_is.all() and correlations_ok and fit.guide_family != "point":
        verdict = TRUST
    else:
        verdict = MEANS_ONLY
    return Comparison(
        table=table,
        verdict=verdict,
        reasons=reasons,
        ok=bool(not refused and table["ok"].all() and correlations_ok),
        reference=reference,
        family=fit.guide_family,
        quantiles={k: np.quantile(z, p, axis=0) for k, p in LEVELS.items()},
        mean_tolerance=mean_tolerance,
        sd_tolerance=sd_tolerance,
    )


def _expected_sd_ratio(family: str | None, reference: Reference) -> np.ndarray:
    """The sd ratio that the best member of the family has, (d,)."""
    if family == "point":
        return np.zeros(len(reference.names))
    ratio = reference.mean_field_sd_ratio if family == "mean-field" else None
    return np.ones(len(reference.names)) if ratio is None else ratio


def _correlations(
    z: np.ndarray,
    varies: np.ndarray,
    reference: Reference,
    family: str | None,
    tolerance: float,
    num_draws: int,
) -> tuple[bool, str]:
    """Whether the correlations are right (as far as the family has any), and a sentence on them."""
    names = reference.names
    theirs = reference.covariance / np.outer(reference.sd, reference.sd)
    if family in ("mean-field", "point"):
        gap = np.abs(np.triu(theirs, 1))
        i, j = np.unravel_index(int(np.argmax(gap)), gap.shape)
        if gap[i, j] <= tolerance:
            return True, ""
        return True, (
            f"Correlations are absent by construction; the reference's largest is "
            f"{theirs[i, j]:+.2f} ({names[i]}, {names[j]})."
        )
    ours = np.zeros_like(theirs)
    ours[np.ix_(varies, varies)] = np.atleast_2d(np.corrcoef(z[:, varies], rowvar=False))
    # A correlation is made of second moments, so its effective draws are those of the sds:
    # sd_se / sd = (2 n)^(-1/2).
    relative = 2 * (reference.sd_se / reference.sd) ** 2
    variance = np.maximum.outer(relative, relative) + 1 / num_draws
    limit = np.maximum(tolerance, STANDARD_ERRORS * (1 - theirs**2) * np.sqrt(variance))
    gap = np.triu(np.abs(ours - theirs), 1) / limit
    i, j = np.unravel_index(int(np.argmax(gap)), gap.shape)
    if gap[i, j] <= 1:
        return True, ""
    return False, (
        f"Correlations are off: that of {names[i]} and {names[j]} is {ours[i, j]:+.2f}, the "
        f"reference's {theirs[i, j]:+.2f}."
    )


def _check_reference(reference: Any) -> None:
    if isinstance(reference, Reference):
        return
    raise TypeError(
        "compare needs a vi.Reference to compare the fit with; it was given "
        f"{type(reference).__name__}. Make one by vi.Reference.nuts(model, data), of a posterior "
        "known in closed form by vi.Reference.exact(names, mean, covariance), or read one by "
        "vi.Reference.load(path). Without any, vi.diagnose(fit) judges the fit by itself."
    )


def _check_names(fit: list[str], reference: list[str]) -> None:
    if fit == reference:
        return
    if sorted(fit) == sorted(reference):
        message = "The fit and the reference have the same scalars in another order"
    else:
        message = "The fit and the reference are not of the same model"
    pairs = [
        f"{i}: {a or 'nothing'} / {b or 'nothing'}"
        for i, (a, b) in enumerate(_longest(fit, reference))
        if a != b
    ]
    raise ValueError(
        f"{message} ({len(fit)} and {len(reference)} scalars). First differences (position: fit / "
        f"reference): {'; '.join(pairs[:3])}."
    )


def _longest(a: list[str], b: list[str]) -> list[tuple[str, str]]:
    n = max(len(a), len(b))
    return list(zip(a + [""] * (n - len(a)), b + [""] * (n - len(b)), strict=True))


def _count(bad: np.ndarray, noun: str) -> str:
    n = int(bad.sum())
    return f"{n} of {len(bad)} {noun}s {'is' if n == 1 else 'are'}"


def _text(table: pd.DataFrame) -> str:
    """The table as text, four significant digits for moments and three decimals for ratios."""
    shown = pd.DataFrame(index=table.index)
    for column in table:
        if column == "ok":
            shown[column] = np.where(table[column], "yes", "NO")
        elif column.endswith(("mean", "sd")):
            shown[column] = [f"{x:.4g}" for x in table[column]]
        else:
            shown[column] = [f"{x:.3f}" for x in table[column]]
    with pd.option_context("display.max_rows", None, "display.width", None):
        return shown.to_string()
