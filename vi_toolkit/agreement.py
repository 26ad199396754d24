"""How far means, sds and correlations of a fit's draws agree with those of a reference.

Every check gives numbers and a sentence. :func:`vi_toolkit.compare` documents the rules.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.stats

from vi_toolkit.reference.reference import (
    NEAR_GAUSSIAN_KURTOSIS,
    NEAR_GAUSSIAN_SKEWNESS,
    Reference,
)

STANDARD_ERRORS = 4.0
"""A limit is never closer than this many Monte Carlo standard errors."""

TRUST, MEANS_ONLY, DO_NOT_TRUST = "trust", "trust the means only", "do not trust"


@dataclass(frozen=True, eq=False)
class Means:
    """Means of a fit beside those of a reference; every array is (d,).

    Attributes:
        names: the d scalars.
        value: the fit's means.
        error: fit minus reference, in reference sds.
        error_se: its Monte Carlo standard error.
        tolerance: the tolerance that was asked for.
        limit: the largest error that is accepted.
    """

    names: list[str]
    value: np.ndarray
    error: np.ndarray
    error_se: np.ndarray
    tolerance: float
    limit: np.ndarray

    @property
    def ok(self) -> np.ndarray:
        return np.abs(self.error) <= self.limit

    def sentence(self) -> str:
        if self.ok.all():
            i = int(np.argmax(np.abs(self.error)))
            return (
                f"Every mean agrees: the largest error is {self.error[i]:+.3f} reference sd "
                f"({self.names[i]})."
            )
        i = int(np.argmax(np.abs(self.error) / self.limit))
        return (
            f"{_count(~self.ok, 'mean')} off: {self.names[i]} by {self.error[i]:+.3f} reference sd "
            f"(limit {self.limit[i]:.3f})."
        )


def compare_means(z: np.ndarray, sd: np.ndarray, reference: Reference, tolerance: float) -> Means:
    """The means of draws z, (draws, d), with sds (d,), beside the reference's."""
    mean = z.mean(0)
    error = (mean - reference.mean) / reference.sd
    error_se = np.hypot(reference.mean_se, sd / np.sqrt(len(z))) / reference.sd
    limit = np.maximum(tolerance, STANDARD_ERRORS * error_se)
    return Means(reference.names, mean, error, error_se, tolerance, limit)


@dataclass(frozen=True, eq=False)
class Sds:
    """Sds of a fit beside those of a reference; every array is (d,).

    Attributes:
        names: the d scalars.
        guide_family: the family of the guide.
        value: the fit's sds; 0 for a scalar whose draws do not vary.
        ratio: fit over reference.
        ratio_se: Monte Carlo standard error of the ratio.
        expected: the ratio that the best member of the family has.
        excess: log(ratio / expected).
        tolerance: the tolerance on a log ratio that was asked for.
        limit: the largest absolute excess that is accepted.
        ok: whether the sds are what the family can give.
        equal: whether the sds equal the reference's, so that they can be used as they are.
        impossible: whether an sd exceeds what a mean-field guide can have on this posterior.
    """

    names: list[str]
    guide_family: str | None
    value: np.ndarray
    ratio: np.ndarray
    ratio_se: np.ndarray
    expected: np.ndarray
    excess: np.ndarray
    tolerance: float
    limit: np.ndarray
    ok: np.ndarray
    equal: np.ndarray
    impossible: bool

    def sentences(self) -> list[str]:
        names, ratio, expected = self.names, self.ratio, self.expected
        if self.guide_family == "point":
            return ["A point estimate has no sds, intervals or correlations."]
        if self.ok.all() and self.equal.all():
            i = int(np.argmax(np.abs(np.log(ratio))))
            return [f"Every sd agrees: the ratio furthest from 1 is {ratio[i]:.3f} ({names[i]})."]
        if self.ok.all():
            i = int(np.argmin(ratio))
            return [
                "The sds are too small, exactly as theory predicts for a mean-field guide: that of "
                f"{names[i]} is {ratio[i]:.3f} of the reference's, where {expected[i]:.3f} is "
                "expected. For intervals use a guide with correlations, such as "
                "AutoMultivariateNormal."
            ]
        i = int(np.argmax(np.abs(self.excess) / self.limit))
        found = [
            f"{_count(~self.ok, 'sd')} off: that of {names[i]} is {ratio[i]:.3f} of the "
            f"reference's, where {expected[i]:.3f} is expected "
            f"(limit {100 * np.expm1(self.limit[i]):.1f} %)."
        ]
        if self.impossible:
            found.append(
                "A mean-field guide cannot be that wide on a near-Gaussian posterior: suspect the "
                "optimiser, the guide or the name of its family."
            )
        return found


def compare_sds(
    z: np.ndarray, guide_family: str | None, reference: Reference, tolerance: float
) -> Sds:
    """The sds of draws z, (draws, d), beside the reference's and what the family can give."""
    mean, sd = z.mean(0), z.std(0)
    varies = sd > 1e-9 * (np.abs(mean) + reference.sd)
    sd = np.where(varies, sd, 0.0)
    expected = np.full_like(sd, guide_family != "point")
    reference_se = reference.sd_se / reference.sd
    theory = reference.mean_field_sd_ratio if guide_family == "mean-field" else None
    if theory is not None:
        # The best mean-field sd is the reference's conditional sd.
        expected, reference_se = theory, reference.conditional_sd_se / (theory * reference.sd)
    ratio = sd / reference.sd
    kurtosis = np.zeros_like(sd)
    kurtosis[varies] = scipy.stats.kurtosis(z[:, varies])
    tolerance = float(np.log1p(tolerance))
    with np.errstate(divide="ignore", invalid="ignore"):
        # The standard error of log sd is sqrt((kurtosis + 2) / 4n), with the excess kurtosis.
        own_se = np.sqrt(np.maximum(kurtosis + 2, 0) / (4 * len(z)))
        log_se = np.hypot(reference_se, own_se)
        limit = np.maximum(tolerance, STANDARD_ERRORS * log_se)
        excess = np.log(ratio / expected)
        ok = np.where(expected == 0, ~varies, np.abs(excess) <= limit)
        equal = np.abs(np.log(ratio)) <= np.maximum(
            tolerance, STANDARD_ERRORS * np.hypot(reference.sd_se / reference.sd, own_se)
        )
    wide = (expected < 0.95) & (excess > limit)
    impossible = bool(theory is not None and wide.any() and reference.near_gaussian)
    return Sds(
        reference.names, guide_family, sd, ratio, ratio * log_se, expected, excess, tolerance,
        limit, ok, equal, impossible,
    )  # fmt: skip


def compare_correlations(
    z: np.ndarray, sds: Sds, reference: Reference, tolerance: float
) -> tuple[bool, str]:
    """Whether the correlations of draws z, (draws, d), are right, and a sentence if it is needed.

    Those that the guide's family cannot have are not counted as wrong.
    """
    names = reference.names
    if reference.covariance is None or len(names) == 1:
        return True, ""
    theirs = reference.covariance / np.outer(reference.sd, reference.sd)
    if sds.guide_family in ("mean-field", "point"):
        gap = np.abs(np.triu(theirs, 1))
        i, j = np.unravel_index(int(np.argmax(gap)), gap.shape)
        if gap[i, j] <= tolerance:
            return True, ""
        return True, (
            f"Correlations are absent by construction; the reference's largest is "
            f"{theirs[i, j]:+.2f} ({names[i]}, {names[j]})."
        )
    varies = sds.value > 0
    ours = np.zeros_like(theirs)
    ours[np.ix_(varies, varies)] = np.atleast_2d(np.corrcoef(z[:, varies], rowvar=False))
    # Correlations and sds are both made of second moments, so their effective sample sizes are
    # the same, and that of an sd follows from sd_se / sd = (2 n)^(-1/2).
    relative = 2 * (reference.sd_se / reference.sd) ** 2
    variance = np.maximum.outer(relative, relative) + 1 / len(z)
    limit = np.maximum(tolerance, STANDARD_ERRORS * (1 - theirs**2) * np.sqrt(variance))
    gap = np.triu(np.abs(ours - theirs), 1) / limit
    i, j = np.unravel_index(int(np.argmax(gap)), gap.shape)
    if gap[i, j] <= 1:
        return True, ""
    return False, (
        f"Correlations are off: that of {names[i]} and {names[j]} is {ours[i, j]:+.2f}, the "
        f"reference's {theirs[i, j]:+.2f}."
    )


def caveats(means: Means, sds: Sds, reference: Reference) -> list[str]:
    """Sentences on what limits the comparison itself."""
    found = []
    mean_field = sds.guide_family == "mean-field"
    widened = (means.limit > means.tolerance) | (sds.limit > sds.tolerance)
    if widened.any():
        found.append(
            f"The reference's Monte Carlo error sets the limits of {widened.sum()} of "
            f"{len(widened)} scalars, up to {means.limit.max():.3f} sd for a mean and "
            f"{100 * np.expm1(sds.limit.max()):.1f} % for an sd; a longer reference sharpens them."
        )
    if not reference.near_gaussian:
        skewness, kurtosis = reference.skewness, reference.excess_kurtosis
        worst = np.maximum(
            np.abs(skewness) / NEAR_GAUSSIAN_SKEWNESS, np.abs(kurtosis) / NEAR_GAUSSIAN_KURTOSIS
        )
        i = int(np.argmax(worst))
        approximate = mean_field and reference.covariance is not None
        found.append(
            f"The posterior is not near-Gaussian ({reference.names[i]}: skewness "
            f"{skewness[i]:.2f}, excess kurtosis {kurtosis[i]:.2f}), so no Gaussian guide fits it "
            "exactly"
            + (", and the expected mean-field sd ratios are approximate." if approximate else ".")
        )
    if mean_field and reference.covariance is None:
        found.append(
            "The reference has no covariance, so the sds of this mean-field fit are compared with "
            "the reference's own."
        )
    return found


def _count(bad: np.ndarray, noun: str) -> str:
    n = int(bad.sum())
    return f"{n} of {len(bad)} {noun}s {'is' if n == 1 else 'are'}"
