"""What the figures of results share: palette, style and a figure that leaves pyplot alone."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable
from typing import Any

import matplotlib
import matplotlib.figure
from matplotlib.axes import Axes

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
