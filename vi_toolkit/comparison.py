"""A variational fit beside a reference posterior: what agrees, and what theory expects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from vi_toolkit.agreement import (
    DO_NOT_TRUST,
    MEANS_ONLY,
    TRUST,
    caveats,
    compare_correlations,
    compare_means,
    compare_sds,
)
from vi_toolkit.figures import (
    COLOURS,
    INK,
    MOST_SCALARS,
    PALE,
    REFERENCE,
    REFERENCE_CORE,
    STYLE,
    Figure,
)
from vi_toolkit.fit_protocol import FitLike
from vi_toolkit.reference.reference import Reference
from vi_toolkit.reference.summary import LEVELS


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """What :func:`compare` found.

    Attributes:
        table: one row per scalar on the unconstrained scale: mean and sd of the reference and of
            the fit, mean error (in reference sds) and its standard error, sd ratio (fit over
            reference) and its standard error, the sd ratio expected of the guide's family, and
            ``ok``.
        verdict: "trust" (means, sds and correlations agree with the reference), "trust the means
            only", or "do not trust".
        reasons: sentences behind the verdict.
        ok: whether every row is ok and the correlations are right, if the family can have any;
            False for every comparison with a refused reference.
        reference: what the fit was compared with.
        guide_family: the guide's family: "mean-field", "full-rank", "low-rank", "point" or None.
        quantiles: the fit's quantiles "5%", "25%", "50%", "75%", "95%", each (d,).
        mean_tolerance, sd_tolerance: as given to :func:`compare`.
    """

    table: pd.DataFrame
    verdict: str
    reasons: list[str]
    ok: bool
    reference: Reference
    guide_family: str | None
    quantiles: dict[str, np.ndarray]
    mean_tolerance: float
    sd_tolerance: float

    def assert_ok(self) -> None:
        """Raise AssertionError with the rows at fault unless the fit is as good as it can be.

        The fit must have the reference's means, and the sds that the guide's family can give. A
        mean-field fit that is too narrow exactly as theory predicts passes, although its verdict is
        "trust the means only".
        """
        if not self.ok:
            bad = self.table[~self.table["ok"]]
            rows = f"\n{_text(bad)}" if len(bad) else ""
            raise AssertionError("\n".join(self.reasons) + rows)

    def plot(self, **options: Any) -> Figure:
        """Intervals and sd ratios; the options are those of :func:`plot_comparisons`."""
        return plot_comparisons({self.guide_family or "VI": self}, **options)

    def __repr__(self) -> str:
        lines = [_text(self.table), "", f"Verdict: {self.verdict}."]
        return "\n".join(lines + [f"- {reason}" for reason in self.reasons])


def compare(
    fit: FitLike,
    reference: Reference,
    mean_tolerance: float = 0.05,
    sd_tolerance: float = 0.05,
    correlation_tolerance: float = 0.05,
    num_draws: int = 100_000,
    seed: int = 0,
) -> Comparison:
    r"""Compare a fit with a reference posterior, scalar by scalar on the unconstrained scale.

    m and s are a scalar's mean and sd in the reference, m' and s' those of ``num_draws`` draws of
    the fit, and se is the standard error of what is compared, from the draws of both sides.

    - A mean is right if \|m' - m\| / s <= max(``mean_tolerance``, 4 se).
    - An sd is right if \|log(s' / (r s))\| <= max(log(1 + ``sd_tolerance``), 4 se). r is the ratio
      that the best guide of the family has: 0 for a point estimate;
      (Lambda_ii Sigma_ii)^(-1/2) for a mean-field guide, which theory says is too narrow
      (Lambda = Sigma^(-1); see ``Reference.mean_field_sd_ratio``); 1 for all others. So a
      mean-field fit that fails to underestimate is *not* ok.
    - A correlation is right if it is within max(``correlation_tolerance``, 4 se) of the
      reference's. Mean-field guides and point estimates have none, which is not counted as wrong.

    The optimiser's error is not part of se and excuses nothing. 4 se exceeds a tolerance of 0.05 sd
    only if the reference has fewer than 6,400 effective draws; the limit then grows so that chance
    alone does not fail a right fit, and the reasons say so. Nothing else widens a limit: the limits
    are the same for a posterior that is not near-Gaussian, although the r of a mean-field guide is
    approximate there.

    A refused reference (``error.reference`` of an InvalidReferenceError) confirms nothing: you can
    read the rows, but the verdict is "do not trust".

    Args:
        fit: a :class:`~vi_toolkit.Fit`.
        reference: reference posterior of the same model and data.
        mean_tolerance: tolerance of means, in reference sds.
        sd_tolerance: relative tolerance of sds.
        correlation_tolerance: absolute tolerance of correlations.
        num_draws: number of draws of the fit; at least 100,000, so that their sampling error
            (0.003 sd) does not matter.
        seed: seed of these draws.

    Raises:
        TypeError: ``reference`` is not a :class:`~vi_toolkit.Reference`.
        ValueError: the fit and the reference do not have the same scalars, a draw is not finite,
            or ``num_draws`` is too small.

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
        raise ValueError(f"num_draws is {num_draws}; compare needs at least 100,000")
    own = fit.sample(num_draws, seed=seed)
    # Sums over 100,000 numbers need more precision than the fit's dtype may have.
    z = fit.joint.flatten({k: v.detach().cpu().double() for k, v in own.items()}).numpy()
    for name, column in zip(reference.names, z.T, strict=True):
        if not np.isfinite(column).all():
            raise ValueError(f"the fit's draws of {name} are not all finite")
    sds = compare_sds(z, fit.guide_family, reference, sd_tolerance)
    means = compare_means(z, sds.value, reference, mean_tolerance)
    correlations_ok, sentence = compare_correlations(z, sds, reference, correlation_tolerance)
    table = pd.DataFrame(
        {
            "reference mean": reference.mean,
            "reference sd": reference.sd,
            "VI mean": means.value,
            "VI sd": sds.value,
            "mean error": means.error,
            "mean_error_se": means.error_se,
            "sd ratio": sds.ratio,
            "sd_ratio_se": sds.ratio_se,
            "expected sd ratio": sds.expected,
            "ok": means.ok & sds.ok,
        },
        index=pd.Index(reference.names, name="scalar"),
    )
    reasons = [means.sentence(), *sds.sentences()]
    refused = reference.made.get("refused")
    if refused:
        reasons.insert(0, f"The reference was refused, so it confirms nothing: {refused}.")
    if sentence:
        reasons.append(sentence)
    if not fit.converged:
        reasons.append(f"The optimiser did not report convergence: {fit.convergence}")
    reasons += caveats(means, sds, reference)

    if refused or not means.ok.all() or sds.impossible:
        verdict = DO_NOT_TRUST
    elif (sds.ok & sds.equal).all() and correlations_ok and fit.guide_family != "point":
        verdict = TRUST
    else:
        verdict = MEANS_ONLY
    return Comparison(
        table=table,
        verdict=verdict,
        reasons=reasons,
        ok=bool(not refused and table["ok"].all() and correlations_ok),
        reference=reference,
        guide_family=fit.guide_family,
        quantiles={k: np.quantile(z, p, axis=0) for k, p in LEVELS.items()},
        mean_tolerance=mean_tolerance,
        sd_tolerance=sd_tolerance,
    )


def plot_comparisons(
    comparisons: Mapping[str, Comparison],
    standardise: bool | None = None,
    title: str | None = None,
) -> Figure:
    """Draw several fits against one reference: intervals on the left, sd ratios on the right.

    Grey bars are the reference's 90 % and 50 % intervals; coloured lines are those of the fits,
    with a dot at the mean. On the right, a filled dot is the sd ratio that was found and an open
    diamond the one that theory expects of the guide's family; the band is the tolerance around 1.

    Args:
        comparisons: label -> comparison, all with the same reference.
        standardise: whether to show (value - reference mean) / reference sd; None does so if the
            scalars' scales are too different to share an axis.
        title: title of the figure.

    Raises:
        ValueError: there is no comparison, or the references are not the same.

    Example:
        >>> import pyro, pyro.distributions as dist, vi_toolkit as vi
        >>> from pyro.infer.autoguide import AutoDelta, AutoNormal
        >>> def model():
        ...     pyro.sample("z", dist.Normal(1.0, 2.0))
        >>> exact = vi.Reference.exact(["z"], mean=[1.0], covariance=[[4.0]])
        >>> guides = {"mean field": AutoNormal, "MAP": AutoDelta}
        >>> fits = {k: vi.fit(model, guide, {}, progress=False) for k, guide in guides.items()}
        >>> figure = plot_comparisons({k: vi.compare(fit, exact) for k, fit in fits.items()})
        >>> [axes.get_title(loc="left") for axes in figure.axes]
        ['Posterior intervals', 'Width']
    """
    if not comparisons:
        raise ValueError("nothing to plot: comparisons is empty")
    first = next(iter(comparisons.values()))
    reference = first.reference
    for label, comparison in comparisons.items():
        other = comparison.reference
        if other.names != reference.names or not np.array_equal(other.mean, reference.mean):
            raise ValueError(f"{label} was compared with another reference")
    rows = _rows(comparisons)
    count = len(comparisons)
    pitch = 0.17 + 0.11 * count  # inches per scalar
    if len(rows) > 30:
        pitch = 0.13 + 0.075 * count
    height = pitch * len(rows) + 1.15 + 0.17 * count
    y = np.arange(len(rows))
    offsets = (np.arange(count) - (count - 1) / 2) * 0.72 / max(count, 2)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.2, max(height, 2.3)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2.3, 1))
        _draw_intervals(left, comparisons, rows, offsets, standardise, min(10, 45 * pitch))
        _draw_sd_ratios(right, comparisons, rows, offsets)
        left.set_yticks(y, [reference.names[i] for i in rows])
        left.set_ylim(len(rows) - 0.4, -0.6)
        for axes in (left, right):
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
            axes.grid(axis="x", color=PALE, lw=0.7)
            axes.set_axisbelow(True)
        right.tick_params(axis="y", labelleft=False)
        sampler = {"nuts": "NUTS"}.get(reference.kind, reference.kind)
        handles = [
            (Patch(color=REFERENCE_CORE), f"reference ({sampler}): 50 % and 90 % intervals"),
            *(
                (Line2D([], [], color=COLOURS[k % len(COLOURS)], marker="o", ms=4, lw=1.6),
                 f"{label}: {comparison.verdict}")
                for k, (label, comparison) in enumerate(comparisons.items())
            ),
            (Line2D([], [], color=INK, marker="D", mfc="none", ms=5.5, lw=0),
             "sd ratio that theory expects of the family"),
        ]  # fmt: skip
        if len(rows) < len(reference.names):
            note = f"the {len(rows)} of {len(reference.names)} scalars with the largest errors"
            title = f"{title}: {note}" if title else note.capitalize()
        figure.legend(
            *zip(*handles, strict=True),
            loc="outside upper left",
            alignment="left",
            frameon=False,
            fontsize=8.5,
            ncols=2,
            title=title,
            title_fontsize=11,
        )
    return figure


def _draw_intervals(
    axes: Axes,
    comparisons: Mapping[str, Comparison],
    rows: np.ndarray,
    offsets: np.ndarray,
    standardise: bool | None,
    marker_size: float,
) -> None:
    """The left half of :func:`plot_comparisons`."""
    reference = next(iter(comparisons.values())).reference
    levels = {"5%": -1.645, "25%": -0.674, "75%": 0.674, "95%": 1.645}
    # A reference without quantiles is drawn with those of the Normal that has its moments.
    bars = reference.quantiles or {k: reference.mean + z * reference.sd for k, z in levels.items()}
    if standardise is None:
        widths = (bars["95%"] - bars["5%"])[rows]
        span = bars["95%"][rows].max() - bars["5%"][rows].min()
        standardise = bool(widths.max() > 12 * widths.min() or span > 30 * np.median(widths))

    def shown(x: np.ndarray) -> np.ndarray:
        return ((x - reference.mean) / reference.sd if standardise else x)[rows]

    y = np.arange(len(rows))
    for low, high, colour in (("5%", "95%", REFERENCE), ("25%", "75%", REFERENCE_CORE)):
        start = shown(bars[low])
        axes.barh(y, shown(bars[high]) - start, left=start, height=0.74, color=colour, lw=0)
    axes.plot(shown(reference.mean), y, "|", color="white", ms=marker_size, mew=1.4)
    for k, comparison in enumerate(comparisons.values()):
        colour, at, q = COLOURS[k % len(COLOURS)], y + offsets[k], comparison.quantiles
        axes.hlines(at, shown(q["5%"]), shown(q["95%"]), color=colour, lw=1.1)
        axes.hlines(at, shown(q["25%"]), shown(q["75%"]), color=colour, lw=2.6)
        mean = comparison.table["VI mean"].to_numpy()
        axes.plot(shown(mean), at, "o", color=colour, ms=3.6, mec="white", mew=0.5)
    axes.set_title("Posterior intervals")
    axes.use_sticky_edges = False
    axes.margins(x=0.03)
    axes.set_xlabel("(value - reference mean) / reference sd" if standardise else "value")
    if not standardise and axes.get_xlim()[0] < 0 < axes.get_xlim()[1]:
        axes.axvline(0, color="#AAAAAA", lw=0.8, zorder=0.5)


def _draw_sd_ratios(
    axes: Axes, comparisons: Mapping[str, Comparison], rows: np.ndarray, offsets: np.ndarray
) -> None:
    """The right half of :func:`plot_comparisons`."""
    tolerance = next(iter(comparisons.values())).sd_tolerance
    axes.axvspan(1 / (1 + tolerance), 1 + tolerance, color=REFERENCE, lw=0, alpha=0.7)
    axes.axvline(1, color="white", lw=1.2)
    largest = 0.0
    for k, comparison in enumerate(comparisons.values()):
        colour, at = COLOURS[k % len(COLOURS)], np.arange(len(rows)) + offsets[k]
        ratios = comparison.table[["expected sd ratio", "sd ratio"]].iloc[rows]
        axes.plot(ratios["expected sd ratio"], at, "D", mfc="none", mec=colour, ms=6, mew=0.9)
        axes.plot(ratios["sd ratio"], at, "o", color=colour, ms=3.6)
        largest = max(largest, float(ratios.to_numpy().max()))
    axes.set_title("Width")
    axes.set_xlim(0, max(1.15, 1.08 * largest))
    axes.set_xlabel("sd ratio, VI / reference")


def _rows(comparisons: Mapping[str, Comparison]) -> np.ndarray:
    """The scalars to draw: all of them, or the worst if there are too many to read."""
    worst = np.zeros(len(next(iter(comparisons.values())).table))
    for comparison in comparisons.values():
        table = comparison.table
        with np.errstate(divide="ignore"):
            stretch = np.abs(np.log(table["sd ratio"].to_numpy())).clip(max=9)
        worst = np.maximum(worst, np.maximum(np.abs(table["mean error"].to_numpy()), stretch))
    if len(worst) <= MOST_SCALARS:
        return np.arange(len(worst))
    return np.sort(np.argsort(-worst)[:MOST_SCALARS])


def _check_reference(reference: Any) -> None:
    if isinstance(reference, Reference):
        return
    raise TypeError(
        "compare needs a vi.Reference to compare the fit with; it was given "
        f"{type(reference).__name__}. Make one by vi.Reference.nuts(model, data), of a posterior "
        "known in closed form by vi.Reference.exact(names, mean, covariance), or read one by "
        "vi.Reference.load(path). Without a reference, use vi.diagnose(fit)."
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
