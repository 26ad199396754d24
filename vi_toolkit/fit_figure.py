"""The figure of a fit: the ELBO's history beside the posterior marginals."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes

from vi_toolkit.figures import COLOURS, GREY, PALE, STYLE, Figure, hide_y_axis
from vi_toolkit.fit_protocol import FitLike

NUM_DRAWS = 4_000  # behind the histograms
MOST_MARGINALS = 12


def plot_fit(fit: FitLike) -> Figure:
    """Plot the ELBO's history and the marginals of the first 12 scalars on the model's own scale.

    Args:
        fit: a :class:`~vi_toolkit.Fit`.
    """
    columns = _scalars(fit.sample(NUM_DRAWS, seed=0))
    names = list(columns)[:MOST_MARGINALS]
    across = 4 if len(names) > 6 else 3 if len(names) > 4 else 2 if len(names) > 1 else 1
    down = -(-len(names) // across)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4 + 1.65 * across, max(3.2, 1.45 * down)), layout="constrained")
        halves = figure.add_gridspec(1, 2, width_ratios=(4.4, 1.65 * across))
        left, right = figure.add_subfigure(halves[0]), figure.add_subfigure(halves[1])
        _draw_elbo(left.subplots(), fit)
        grid = right.subplots(down, across, squeeze=False).ravel()
        for axes, name in zip(grid, names, strict=False):
            _draw_marginal(axes, name, columns[name])
        for axes in grid[len(names) :]:
            axes.set_axis_off()
        more = f", first {len(names)} of {len(columns)}" if len(columns) > len(names) else ""
        right.suptitle(f"Posterior marginals{more}", x=0.02, ha="left", fontsize=9.5)
    return figure


def _scalars(draws: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Site -> (draws, *shape) as scalar name -> (draws,)."""
    out = {}
    for site, value in draws.items():
        array = value.detach().cpu().numpy()
        for index in np.ndindex(array.shape[1:]):
            label = f"{site}[{','.join(map(str, index))}]" if index else site
            out[label] = array[(slice(None), *index)]
    return out


def _draw_elbo(axes: Axes, fit: FitLike) -> None:
    elbo = np.asarray(fit.elbo, dtype=float)
    steps = np.arange(1, len(elbo) + 1)
    noisy = len(elbo) >= 200
    axes.plot(steps, elbo, color=COLOURS[0], lw=0.6 if noisy else 1.4, alpha=0.35 if noisy else 1)
    if noisy:
        window = max(len(elbo) // 50, 2)
        mean = np.convolve(elbo, np.ones(window) / window, mode="valid")
        axes.plot(steps[window - 1 :], mean, color=COLOURS[0], lw=1.4)
    finite = elbo[np.isfinite(elbo)]
    if len(finite) > 2:
        # A start a million nats down would flatten the rest of the curve, so it is cut off.
        settled = finite[len(finite) // 3 :]
        low, high = settled.min(), finite.max()
        # Without this, differences far below one nat would fill the axis.
        low = min(low, high - 1)
        if high - finite.min() < 3 * (high - low):
            low = min(low, finite.min())
        margin = 0.06 * (high - low)
        axes.set_ylim(low - margin, high + margin)
        hidden = int((finite < low - margin).sum())
        if hidden:
            axes.annotate(
                f"{hidden} early step{'s' * (hidden > 1)} below, down to {finite.min():.4g}",
                (0.99, 0.02),
                xycoords="axes fraction",
                ha="right",
                fontsize=7.5,
                color=GREY,
            )
    axes.ticklabel_format(useOffset=False, style="plain")
    axes.set_xlabel("step")
    axes.set_ylabel("ELBO (nats)")
    state = "converged" if fit.converged else "not converged"
    axes.set_title(f"{fit.method.capitalize()}, {len(elbo):,} steps, {state}")
    axes.grid(axis="y", color=PALE, lw=0.7)
    axes.set_axisbelow(True)


def _draw_marginal(axes: Axes, name: str, values: np.ndarray) -> None:
    values = values[np.isfinite(values)]
    if len(values) and values.min() < values.max():
        # The outermost thousandths would stretch the axis of a heavy-tailed posterior.
        low, high = np.quantile(values, (0.001, 0.999))
        axes.hist(values, bins=40, range=(low, high), density=True, color=COLOURS[0], alpha=0.75)
    elif len(values):
        axes.axvline(values[0], color=COLOURS[0])
    axes.set_title(name, fontsize=8.5)
    hide_y_axis(axes)
    axes.locator_params(axis="x", nbins=3)
