"""Figures of fits and diagnostics. Each function returns a figure and leaves pyplot alone."""

from __future__ import annotations

import io
import itertools
import textwrap
from typing import TYPE_CHECKING, Any

import matplotlib
import matplotlib.figure
import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from vi_toolkit.diagnostics import (
        VSBC,
        Diagnosis,
        ErrorBounds,
        GuideSuggestion,
        LocalParetoK,
        PredictiveCheck,
        WarmChains,
    )

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
REFERENCE, REFERENCE_CORE, INK, PALE = "#D9D9D9", "#B3B3B3", "#333333", "#E9E9E9"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}
MOST_SCALARS = 60


class Figure(matplotlib.figure.Figure):
    """A figure outside pyplot's registry, which a notebook shows all the same."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
        return buffer.getvalue()


def plot_diagnosis(diagnosis: Diagnosis) -> Figure:
    """One page: the error of every mean and sd, with its limits, above the verdict's reasons.

    Args:
        diagnosis: from :func:`~vi_toolkit.diagnose`.
    """
    table = diagnosis.table
    with matplotlib.rc_context(STYLE):
        rows = 0 if table is None else min(len(table), MOST_SCALARS)
        figure = Figure(figsize=(9, 1.8 + 0.22 * max(rows, 4)), layout="constrained")
        figure.suptitle(f"Verdict: {diagnosis.verdict}", x=0.01, ha="left", fontsize=13)
        if table is None:
            axis = figure.subplots()
            axis.axis("off")
            text = [*diagnosis.reasons, "", *diagnosis.next_steps]
            axis.text(0, 1, "\n".join(_wrapped(text)), va="top", fontsize=9)
            return figure
        size = table["mean error"].abs() + np.log(table["sd ratio"]).abs()
        shown = table.loc[size.sort_values(ascending=False).index[:rows]].iloc[::-1]
        left, right = figure.subplots(1, 2, sharey=True)
        where = np.arange(rows)
        quantities = (
            (left, "mean", "error of the mean (posterior sds)", 0.0),
            (right, "sd", "sd, VI / posterior", 1.0),
        )
        for axis, kind, label, ideal in quantities:
            value = shown["mean error" if kind == "mean" else "sd ratio"]
            error = shown["mean_error_se" if kind == "mean" else "sd_ratio_se"]
            ok = shown[f"{kind} ok"].to_numpy()
            axis.axvspan(ideal - 0.05, ideal + 0.05, color=REFERENCE, lw=0)
            for good, colour in ((True, COLOURS[0]), (False, COLOURS[1])):
                pick = ok == good
                if pick.any():
                    axis.errorbar(
                        value[pick],
                        where[pick],
                        xerr=2 * error[pick],
                        fmt="o",
                        ms=4,
                        lw=1,
                        color=colour,
                        label="within the limits" if good else "off",
                    )
            axis.set_xlabel(label)
            axis.margins(x=0.1)
        left.set_yticks(where, shown.index)
        left.set_title(
            f"{len(table)} scalars" if rows == len(table) else f"{rows} worst of {len(table)}"
        )
        k = diagnosis.pareto_k
        if k is not None:
            right.set_title(f"k-hat of the guide {k.k:.2f} ± {k.k_se:.2f}")
        right.legend(frameon=False, fontsize=8)
        figure.supxlabel("\n".join(_wrapped(diagnosis.reasons)), x=0.01, ha="left", fontsize=9)
    return figure


def _wrapped(sentences: list[str], width: int = 110) -> list[str]:
    return [line for s in sentences for line in (textwrap.wrap(s, width) or [""])]


def plot_chains(found: WarmChains, scalars: int = 6) -> Figure:
    """The chains' means on their way from the guide's, in posterior sds, and R-hat per scalar.

    The grey band is two standard errors of a mean over the chains and a slice of time. The means of
    a right guide start inside it, near zero.

    Args:
        found: from :func:`~vi_toolkit.warm_chains`.
        scalars: at most so many lines, those that moved furthest first.
    """
    from vi_toolkit.diagnostics.chains import WARMUP

    order = np.argsort(-np.abs(found.moved))[:scalars]
    edges = [0]
    while edges[-1] < len(found.path):  # slices that grow, since most happens at the beginning
        edges.append(min(max(edges[-1] + 1, int(1.5 * edges[-1])), len(found.path)))
    slices = [np.arange(a, b) for a, b in itertools.pairwise(edges)]
    when = [0.6, *(float(np.sqrt((s[0] + 1) * (s[-1] + 1))) for s in slices)]
    means = np.stack([found.guide_mean, *(found.path[s].mean(0) for s in slices)])
    moved = (means - found.mean) / found.sd
    rate = found.bulk_ess.min() / (
        found.chains * found.num_draws
    )  # effective draws of a transition
    counts = np.array([1, *(len(s) for s in slices)])
    noise = 2 / np.sqrt(found.chains * np.maximum(1, min(rate, 1) * counts))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(2, 1))
        left.fill_between(when, -noise, noise, color=REFERENCE, lw=0)
        left.axvline(sum(WARMUP), color="#777777", lw=0.8, ls=":")
        for k, i in enumerate(order):
            left.plot(when, moved[:, i], color=COLOURS[k], lw=1.3, label=found.names[i])
            left.plot(when[:1], moved[:1, i], "o", ms=4, color=COLOURS[k])
        left.annotate(
            "kept from here", (sum(WARMUP), 0.02), (3, 0), xycoords=("data", "axes fraction"),
            textcoords="offset points", fontsize=7.5, color="#777777",
        )  # fmt: skip
        left.set_xscale("log")
        left.set_xticks([0.6, 1, 10, 100, 1000], ["guide", "1", "10", "100", "1000"])
        left.minorticks_off()
        left.set_xlim(0.5, len(found.path))
        left.set_xlabel("transition")
        left.set_ylabel("mean of the chains (posterior sds)")
        left.set_title("Do the chains leave the guide?")
        figure.legend(frameon=False, fontsize=8, loc="outside lower left", ncols=scalars)
        right.plot(found.bulk_ess, found.r_hat, "o", ms=3.5, alpha=0.7, color=COLOURS[0])
        right.axhline(1.01, color="#777777", lw=0.8, ls=":")
        right.axvline(1_000, color="#777777", lw=0.8, ls=":")
        right.set_xscale("log")
        right.set_xlabel("bulk ESS")
        right.set_ylabel("rank R-hat")
        right.set_title("usable" if found.reliable else "not usable")
    return figure


def plot_bounds(found: ErrorBounds) -> Figure:
    """Bounds on the errors of means and sds, in the guide's sds, for every scalar.

    Args:
        found: from :func:`~vi_toolkit.error_bounds`.
    """
    mean, sd = found.mean / found.guide_sd, found.sd / found.guide_sd
    order = np.argsort(-mean, kind="stable")[:MOST_SCALARS][::-1]
    where = np.arange(len(order))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 1.3 + 0.2 * max(len(order), 4)), layout="constrained")
        axes = figure.subplots()
        if np.isfinite(mean).all():
            for k, (label, bound) in enumerate((("mean", mean), ("sd", sd))):
                axes.plot(bound[order], where, "o", ms=4.5, color=COLOURS[k], label=label)
            axes.axvspan(0, 0.05, color=REFERENCE, lw=0)
            axes.set_yticks(where, [found.names[i] for i in order])
            axes.set_xlim(0, 1.08 * max(mean.max(), sd.max(), 0.05))
            axes.set_xlabel("the error is at most (guide's sds)")
            axes.legend(frameon=False, fontsize=8, loc="lower right")
            hidden = len(mean) - len(order)
            axes.set_title("Bounds" + (f", without the {hidden} smallest" if hidden else ""))
            axes.grid(axis="x", color=PALE, lw=0.7)
            axes.set_axisbelow(True)
        else:
            axes.axis("off")
            axes.text(0, 1, "\n".join(_wrapped([found.meaning], 80)), va="top", fontsize=9)
    return figure


def plot_local_psis(found: LocalParetoK, named: int = 5) -> Figure:
    """k-hat of every datum, with two standard errors.

    Args:
        found: from :func:`~vi_toolkit.local_psis`.
        named: at most so many of the worst data are numbered.
    """
    where, bad = np.arange(len(found.k)), np.zeros(len(found.k), dtype=bool)
    bad[found.bad] = True
    error = 2 * np.nan_to_num(found.k_se)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 2.8), layout="constrained")
        axes = figure.subplots()
        for pick, colour in ((~bad, COLOURS[0]), (bad, COLOURS[1])):
            axes.errorbar(where[pick], found.k[pick], yerr=error[pick], fmt="o", ms=3.5, lw=0.8,
                          color=colour)  # fmt: skip
        for i in found.bad[:named]:
            axes.annotate(str(i), (i, found.k[i]), (4, 3), textcoords="offset points", fontsize=8)
        axes.axhline(0.7, color="#777777", lw=0.8, ls=":")
        axes.margins(y=0.12)
        axes.set_xlabel(found.plate)
        axes.set_ylabel("k-hat")
        sites = ", ".join(found.sites)
        axes.set_title(f"{sites}: {len(found.bad)} of {len(found.k)} with k-hat of 0.7 or more")
    return figure


def plot_suggestion(found: GuideSuggestion) -> Figure:
    """What every candidate gains, in nats, and its k-hat.

    Args:
        found: from :func:`~vi_toolkit.suggest_guide`.
    """
    table = found.table.iloc[::-1]
    where = np.arange(len(table))
    labels = ["\n".join(textwrap.wrap(str(name), 34)) for name in table.index]
    colours = [COLOURS[2 if name == found.best else 0] for name in table.index]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.2, 1.2 + 0.5 * len(table)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
        left.barh(where, table["gain"], height=0.5, color=colours)
        left.errorbar(table["gain"], where, xerr=2 * table["gain_se"], fmt="none", ecolor=INK, lw=1)
        left.axvline(0, color="#777777", lw=0.8)
        left.set_yticks(where, labels)
        left.set_ylim(-0.6, len(table) - 0.4)
        left.set_xlabel("ELBO over that of the fit (nats)")
        left.set_title(f"Best: {found.best}" if found.best else "None is better")
        right.scatter(table["k-hat"], where, c=colours, s=22)
        right.axvline(0.7, color="#777777", lw=0.8, ls=":")
        right.set_xlim(min(0, 1.1 * float(table["k-hat"].min())),
                       max(1, 1.1 * float(table["k-hat"].max())))  # fmt: skip
        right.tick_params(axis="y", length=0)
        right.set_xlabel("k-hat")
    return figure


def plot_vsbc(found: VSBC, scalars: int = 12) -> Figure:
    """Histograms of p with their mirror images; a lopsided one is a bias.

    Args:
        found: from :func:`~vi_toolkit.vsbc`.
        scalars: at most so many, the least symmetric first.
    """
    table = found.table
    order = np.argsort(found.p_values, kind="stable")[:scalars]
    across = min(4, len(order))
    down = -(-len(order) // across)
    bins = np.linspace(0, 1, 11)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1 + 2 * across, 1.1 + 1.6 * down), layout="constrained")
        grid = figure.subplots(down, across, squeeze=False, sharex=True).ravel()
        for axes, i in zip(grid, order, strict=False):
            p, off = found.p[:, i], bool(table["biased"].iloc[i])
            axes.hist(p, bins, color=COLOURS[1 if off else 0], alpha=0.8)
            axes.hist(1 - p, bins, histtype="step", color=INK, lw=1)
            axes.axhline(len(p) / 10, color="#AAAAAA", lw=0.8, ls=":")
            side = f": guide {table['guide is'].iloc[i]}" if off else ""
            axes.set_title(f"{found.names[i]}{side}", fontsize=8.5)
            axes.set_yticks([])
            axes.spines["left"].set_visible(False)
            axes.set_xticks([0, 0.5, 1])
        for axes in grid[len(order) :]:
            axes.set_axis_off()
        more = (
            f", the {len(order)} least symmetric of {len(table)}" if len(order) < len(table) else ""
        )
        figure.suptitle(
            f"q(latent < its true value) in {len(found.p)} replications{more}",
            x=0.01, ha="left", fontsize=9.5,
        )  # fmt: skip
        figure.supxlabel(
            "outline: the mirror image. Lopsided: biased. U: too narrow. Hump: too wide.",
            x=0.01, ha="left", fontsize=8.5,
        )  # fmt: skip
    return figure


def plot_predictive(found: PredictiveCheck, curves: int = 50) -> Figure:
    """Data beside replicated data, the test statistics, calibration, and k-hat per datum.

    Args:
        found: from :func:`~vi_toolkit.predictive_check`.
        curves: replicated data sets drawn.
    """
    statistics = list(found.table.index)[:4]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 5.2), layout="constrained")
        rows: Any = figure.subfigures(2, 1)
        first, second, third = rows[0].subplots(1, 3)
        _draw_replicated(first, found, curves)
        _draw_calibration(second, found)
        k = found.pareto_k
        bad = found.lost
        where = np.arange(len(k))
        third.plot(where[~bad], k[~bad], ".", ms=3, color=COLOURS[0])
        third.plot(where[bad], k[bad], ".", ms=5, color=COLOURS[1])
        third.axhline(0.7, color="#777777", lw=0.8, ls=":")
        third.set_title(f"k-hat of leaving one out: {int(bad.sum())} lost")
        third.set_xlabel("datum")
        for axes, name in zip(
            rows[1].subplots(1, max(len(statistics), 3)), statistics, strict=False
        ):
            row = found.table.loc[name]
            made = found.statistic_values[name]
            low, high = np.quantile(made, (0.001, 0.999))
            inside = made[(made >= low) & (made <= high)]
            axes.hist(inside, 30, color=REFERENCE_CORE)
            axes.axvline(row["data"], color=COLOURS[1 if name in found.failed else 0], lw=1.8)
            axes.set_title(f"{name}: p = {row['p value']:.3f}")
            axes.set_yticks([])
            axes.spines["left"].set_visible(False)
        for axes in rows[1].axes[len(statistics) :]:
            axes.set_axis_off()
        figure.suptitle(
            f"{found.site}: data (colour) beside replicated data (grey)",
            x=0.01, ha="left", fontsize=10.5,
        )  # fmt: skip
    return figure


def _draw_replicated(axes: Axes, found: PredictiveCheck, curves: int) -> None:
    """Distribution functions: steps for counts and curves for the rest need no bandwidth."""
    n = len(found.observed)
    heights = (np.arange(n) + 0.5) / n
    for y in found.replicated[:curves]:
        axes.plot(np.sort(y), heights, drawstyle="steps", color=REFERENCE_CORE, lw=0.5, alpha=0.6)
    axes.plot(np.sort(found.observed), heights, drawstyle="steps", color=COLOURS[0], lw=1.6)
    low, high = np.quantile(np.concatenate([found.replicated[:curves].ravel(), found.observed]),
                            (0.002, 0.998))  # fmt: skip
    low, high = min(low, found.observed.min()), max(high, found.observed.max())
    margin = 0.05 * (high - low) or 1.0
    axes.set_xlim(low - margin, high + margin)
    axes.set_title("Distribution function")
    axes.set_xlabel(found.site)


def _draw_calibration(axes: Axes, found: PredictiveCheck) -> None:
    if found.probability is not None:
        p, y = found.probability, found.observed
        axes.plot([0, 1], [0, 1], color="#AAAAAA", lw=0.8)
        groups = np.array_split(np.argsort(p, kind="stable"), min(10, max(2, len(p) // 10)))
        mean = np.array([p[g].mean() for g in groups])
        seen = np.array([y[g].mean() for g in groups])
        se = np.array([np.sqrt((p[g] * (1 - p[g])).sum()) / len(g) for g in groups])
        axes.errorbar(mean, seen, yerr=2 * se, fmt="o", ms=4, lw=1, color=COLOURS[0])
        axes.set_xlabel("predicted, left out")
        axes.set_ylabel("observed frequency")
    elif found.pit is not None:
        bins = min(20, max(5, len(found.pit) // 10))
        axes.hist(found.pit, np.linspace(0, 1, bins + 1).tolist(), color=COLOURS[0])
        expected = len(found.pit) / bins
        spread = 2 * np.sqrt(expected * (1 - 1 / bins))
        axes.axhspan(max(expected - spread, 0), expected + spread, color=REFERENCE, lw=0, zorder=0)
        axes.set_xlabel("PIT, left out")
        axes.set_yticks([])
    else:
        axes.set_axis_off()
        return
    axes.set_title(f"Calibration: p = {found.calibration_p_value:.3f}")
