"""What the figures of results share: palette, style and a figure that leaves pyplot alone."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import matplotlib
import matplotlib.figure
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

if TYPE_CHECKING:
    from vi_toolkit.comparison import Comparison

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
REFERENCE, REFERENCE_CORE, INK, PALE = "#D9D9D9", "#B3B3B3", "#333333", "#E9E9E9"
GREY = "#777777"
LIMIT: dict[str, Any] = {"color": GREY, "lw": 0.8, "ls": ":"}  # a line that marks a limit
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
    """A figure outside pyplot's registry; notebooks show it because it can draw itself as PNG."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
        return buffer.getvalue()


def hide_y_axis(axes: Axes) -> None:
    """Remove the y axis of a histogram, whose heights mean nothing."""
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)


def wrapped(sentences: Iterable[str], width: int = 110) -> str:
    """The sentences as text, each beginning on a line of its own."""
    return "\n".join(line for s in sentences for line in (textwrap.wrap(s, width) or [""]))


def plot_comparisons(
    comparisons: Mapping[str, Comparison],
    standardise: bool | None = None,
    title: str | None = None,
) -> Figure:
    """Several fits against one reference: intervals on the left, sd ratios on the right.

    The reference's 90 % and 50 % intervals are grey bars, the fits' are coloured lines with a dot
    at the mean. On the right a filled dot is the sd ratio found, an open diamond the one theory
    expects of the family; the band is the tolerance around 1.

    Args:
        comparisons: label -> comparison, all with the same reference.
        standardise: show (value - reference mean) / reference sd; None: where the scalars' scales
            are too far apart to share an axis.
        title: of the figure.

    Raises:
        ValueError: no comparison, or references that are not the same.
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
    names = [reference.names[i] for i in rows]
    levels = {"5%": -1.645, "25%": -0.674, "75%": 0.674, "95%": 1.645}
    # Where the reference has no quantiles those of the Normal with its moments stand in.
    bars = reference.quantiles or {k: reference.mean + z * reference.sd for k, z in levels.items()}
    if standardise is None:
        widths = (bars["95%"] - bars["5%"])[rows]
        span = bars["95%"][rows].max() - bars["5%"][rows].min()
        standardise = bool(widths.max() > 12 * widths.min() or span > 30 * np.median(widths))

    def place(x: np.ndarray) -> np.ndarray:
        return ((x - reference.mean) / reference.sd if standardise else x)[rows]

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
        left.barh(y, place(bars["95%"]) - place(bars["5%"]), left=place(bars["5%"]), height=0.74,
                  color=REFERENCE, lw=0)  # fmt: skip
        left.barh(y, place(bars["75%"]) - place(bars["25%"]), left=place(bars["25%"]), height=0.74,
                  color=REFERENCE_CORE, lw=0)  # fmt: skip
        left.plot(place(reference.mean), y, "|", color="white", ms=min(10, 45 * pitch), mew=1.4)
        tolerance = first.sd_tolerance
        right.axvspan(1 / (1 + tolerance), 1 + tolerance, color=REFERENCE, lw=0, alpha=0.7)
        right.axvline(1, color="white", lw=1.2)
        for k, comparison in enumerate(comparisons.values()):
            colour, at = COLOURS[k % len(COLOURS)], y + offsets[k]
            q = comparison.quantiles
            left.hlines(at, place(q["5%"]), place(q["95%"]), color=colour, lw=1.1)
            left.hlines(at, place(q["25%"]), place(q["75%"]), color=colour, lw=2.6)
            mean = comparison.table["VI mean"].to_numpy()
            left.plot(place(mean), at, "o", color=colour, ms=3.6, mec="white", mew=0.5)
            table = comparison.table.iloc[rows]
            right.plot(table["expected sd ratio"], at, "D", mfc="none", mec=colour, ms=6, mew=0.9)
            right.plot(table["sd ratio"], at, "o", color=colour, ms=3.6)
        left.set_title("Posterior intervals")
        right.set_title("Width")
        left.use_sticky_edges = False
        left.margins(x=0.03)
        left.set_yticks(y, names)
        left.set_ylim(len(rows) - 0.4, -0.6)
        for axes in (left, right):
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
            axes.grid(axis="x", color=PALE, lw=0.7)
            axes.set_axisbelow(True)
        right.tick_params(axis="y", labelleft=False)
        left.set_xlabel("(value - reference mean) / reference sd" if standardise else "value")
        if not standardise and left.get_xlim()[0] < 0 < left.get_xlim()[1]:
            left.axvline(0, color="#AAAAAA", lw=0.8, zorder=0.5)
        ratios = [
            c.table[["sd ratio", "expected sd ratio"]].iloc[rows] for c in comparisons.values()
        ]
        largest = max(float(r.to_numpy().max()) for r in ratios)
        right.set_xlim(0, max(1.15, 1.08 * largest))
        right.set_xlabel("sd ratio, VI / reference")
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


def _rows(comparisons: Mapping[str, Comparison]) -> np.ndarray:
    """Which scalars are drawn: all of them, or the worst where there are too many to read."""
    worst = np.zeros(len(next(iter(comparisons.values())).table))
    for comparison in comparisons.values():
        table = comparison.table
        with np.errstate(divide="ignore"):
            stretch = np.abs(np.log(table["sd ratio"].to_numpy())).clip(max=9)
        worst = np.maximum(worst, np.maximum(np.abs(table["mean error"].to_numpy()), stretch))
    if len(worst) <= MOST_SCALARS:
        return np.arange(len(worst))
    return np.sort(np.argsort(-worst)[:MOST_SCALARS])
