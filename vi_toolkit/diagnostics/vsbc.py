"""Variational simulation-based calibration: bias of the fit on data that the model simulates."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import scipy.stats
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from tqdm.auto import tqdm

from vi_toolkit.deterministic.replications import Replicated, fit_replications
from vi_toolkit.diagnostics.prior_predictive import PriorPredictive, Replication
from vi_toolkit.errors import ConvergenceWarning
from vi_toolkit.figures import COLOURS, INK, STYLE, Figure, hide_y_axis
from vi_toolkit.fitting import fit
from vi_toolkit.programs.isolation import isolated_pyro_state, seeded_state
from vi_toolkit.programs.joint import Joint
from vi_toolkit.programs.vectorise import BAD_POINT
from vi_toolkit.programs.workspace import cast

LEVEL = 0.05  # probability of a false alarm, over all scalars together
NUM_DRAWS = 2_000  # per fit, if the guide's distribution function is not known
MOST_HISTOGRAMS = 12


@dataclass(frozen=True, eq=False)
class VSBC:
    """What :func:`vsbc` found, per scalar on the unconstrained scale.

    Attributes:
        names: names of the scalars, (d,).
        p: q(u < true u) in every replication, (replications, d); uniform for an exact posterior.
        p_values: p value of the test that a column of p is symmetric about 1/2, (d,).
        batched: whether the fits ran as one batch, instead of one by one with ``vi.fit``.
        unconverged: number of fits that did not converge.
    """

    names: list[str]
    p: np.ndarray
    p_values: np.ndarray
    batched: bool
    unconverged: int

    @property
    def table(self) -> pd.DataFrame:
        """A row per scalar.

        ``mean p`` is below 1/2 if the guide is too high and above if it is too low; ``mean_p_se``
        is its standard error under symmetry. ``spread`` is the sd of p over that of a uniform
        variable: above 1 the guide is too narrow, and below 1 too wide, on average over data sets.
        The standard error of ``spread`` is about sqrt(0.2 / replications). ``p value`` is that of
        symmetry, and a scalar is ``biased`` if it is below 0.05 / number of scalars (Bonferroni).
        """
        spread = self.p.std(0) * np.sqrt(12)
        return pd.DataFrame(
            {
                "mean p": self.p.mean(0),
                "mean_p_se": np.sqrt(((self.p - 0.5) ** 2).mean(0) / len(self.p)),
                "spread": spread,
                "p value": self.p_values,
                "guide is": [
                    ("too high" if m < 0.5 else "too low") if b else ""
                    for m, b in zip(self.p.mean(0), self._biased, strict=True)
                ],
                "biased": self._biased,
            },
            index=pd.Index(self.names, name="scalar"),
        )

    @property
    def _biased(self) -> np.ndarray:
        return self.p_values < LEVEL / len(self.names)

    @property
    def biased(self) -> list[str]:
        """Names of the scalars whose p is not symmetric."""
        return [n for n, b in zip(self.names, self._biased, strict=True) if b]

    @property
    def meaning(self) -> str:
        """The result in one sentence."""
        count = len(self.p)
        if not self.biased:
            return (
                f"no bias found in {count} replications: p is symmetric for all "
                f"{len(self.names)} scalars (widths are not tested; see .table)"
            )
        worst = int(self.p_values.argmin())
        side = "too high" if self.p[:, worst].mean() < 0.5 else "too low"
        return (
            f"{len(self.biased)} of {len(self.names)} scalars are biased in {count} replications, "
            f"most clearly {self.names[worst]}, where the guide is {side} "
            f"(mean p {self.p[:, worst].mean():.2f}, p value {self.p_values[worst]:.1e})"
        )

    def __repr__(self) -> str:
        left = f" ({self.unconverged} fits did not converge)" if self.unconverged else ""
        return f"VSBC: {self.meaning}{left}"

    def plot(self) -> Figure:
        """Figure of histograms of p with their mirror images, for the 12 least symmetric scalars.

        A lopsided histogram shows a bias.
        """
        table = self.table
        order = np.argsort(self.p_values, kind="stable")[:MOST_HISTOGRAMS]
        across = min(4, len(order))
        down = -(-len(order) // across)
        bins = np.linspace(0, 1, 11)
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(1 + 2 * across, 1.1 + 1.6 * down), layout="constrained")
            grid = figure.subplots(down, across, squeeze=False, sharex=True).ravel()
            for axes, i in zip(grid, order, strict=False):
                p, off = self.p[:, i], bool(table["biased"].iloc[i])
                axes.hist(p, bins, color=COLOURS[1 if off else 0], alpha=0.8)
                axes.hist(1 - p, bins, histtype="step", color=INK, lw=1)
                axes.axhline(len(p) / 10, color="#AAAAAA", lw=0.8, ls=":")
                side = f": guide {table['guide is'].iloc[i]}" if off else ""
                axes.set_title(f"{self.names[i]}{side}", fontsize=8.5)
                hide_y_axis(axes)
                axes.set_xticks([0, 0.5, 1])
            for axes in grid[len(order) :]:
                axes.set_axis_off()
            hidden = len(order) < len(table)
            more = f", the {len(order)} least symmetric of {len(table)}" if hidden else ""
            figure.suptitle(
                f"q(latent < its true value) in {len(self.p)} replications{more}",
                x=0.01, ha="left", fontsize=9.5,
            )  # fmt: skip
            figure.supxlabel(
                "outline: the mirror image. Lopsided: biased. U: too narrow. Hump: too wide.",
                x=0.01, ha="left", fontsize=8.5,
            )  # fmt: skip
        return figure


def vsbc(
    model: Callable[..., Any],
    guide: Any,
    data: Mapping[str, Any] | None = None,
    replications: int = 200,
    simulate: Callable[[int], Replication] | None = None,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> VSBC:
    r"""Bias of a model's variational posterior over data that the model simulates.

    Each replication draws latents :math:`u^0` from the prior and data from the model at them, fits
    the guide to these data, and computes :math:`p = q(u_i < u_i^0)` for every scalar. If the
    guide's centre is unbiased, p and 1 - p have the same distribution, however wrong the guide's
    width is. That symmetry is tested (Butler's test, which is exact for any number of
    replications). A guide that is too narrow gives a U-shaped histogram, which is symmetric and
    passes; ``spread`` in the table shows it.

    The result describes the guide on average over the prior, not on your data. Errors that average
    out are not found, such as an error away from zero under a prior that is symmetric about zero.
    Mean field passes on the logistic regression recipe, where :func:`~vi_toolkit.diagnose` finds 21
    of 31 means off.

    Gaussian autoguides (mean field and full rank) are fitted to all replications in one batch, by
    natural-gradient steps to the optimum that ``vi.fit`` finds too. Fits that do not converge there
    and all other guides go through ``vi.fit`` one by one, and so does everything if there are
    ``options``.

    Args:
        model: called as ``model(**data)``.
        guide: as for :func:`~vi_toolkit.fit`.
        data: arguments of the model. Those that hold observations are replaced by simulated ones.
        replications: number of replications.
        simulate: function of the replication's number that returns (data, latents), with data of
            the same shapes each time; None for the model's own prior predictive distribution.
        seed: of the simulations.
        progress: show a progress bar if fits are made one by one.
        options: options of ``vi.fit``.

    Raises:
        PreflightError: the model's prior cannot be drawn from, or its data are not an argument.

    References:
        Yao, Vehtari, Simpson and Gelman, "Yes, but Did It Work?", ICML 2018; for the test of
        symmetry (their two-sample test of p against 1 - p takes dependent samples for independent)
        Butler, "A Test for Symmetry Using the Sample Distribution Function", 1969.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, vi_toolkit as vi
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("observations", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> vi.vsbc(model, AutoNormal, {"y": torch.zeros(5)}).biased
        []
    """
    if simulate is None:
        simulate = PriorPredictive(model, data or {}, seed)
    simulated = [simulate(r) for r in range(replications)]
    first = dict(simulated[0][0])
    with isolated_pyro_state(rng_state=seeded_state(seed), dtype=torch.float64):
        batch = None
        try:
            joint = Joint(model, cast(first, torch.float64))
            if not options:
                data_sets = [cast(data, torch.float64) for data, _ in simulated]
                batch = _fit_batch(joint, guide, data_sets, seed)
        except BAD_POINT:  # the model holds a single-precision tensor, which does not mix
            with isolated_pyro_state(dtype=torch.float32):
                joint = Joint(model, first)
        dtype = joint.start.dtype
        truth = torch.stack(
            [
                joint.flatten({n: torch.as_tensor(t[n]).to(dtype)[None] for n in joint.sites})[0]
                for _, t in simulated
            ]
        )
    p = np.full(truth.shape, np.nan)
    left = np.arange(replications)
    if batch is not None:
        p = torch.special.ndtr((truth - batch.mean) / batch.sd).numpy()
        left = np.flatnonzero(~batch.converged.numpy())
    unconverged = 0
    for r in tqdm(left, disable=not progress or not len(left), desc="vsbc", unit="fit"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            one = fit(model, guide, simulated[r][0], seed=seed, progress=False, **options)
        unconverged += not one.converged
        draws = one.sample(NUM_DRAWS, seed=int(r))
        u = joint.flatten({n: v.to(dtype) for n, v in draws.items()})
        # The middle of the interval that the draws leave open, which is never 0 or 1.
        p[r] = ((u < truth[r]).sum(0).numpy() + 0.5) / (NUM_DRAWS + 1)
    p_values = np.array([symmetry_test(column) for column in p.T])
    return VSBC(list(joint.names), p, p_values, batch is not None, unconverged)


def _fit_batch(
    joint: Joint, guide: Any, data_sets: list[dict[str, Any]], seed: int
) -> Replicated | None:
    """All fits in one batch, or None if guide, data or model do not allow it."""
    kind = guide if isinstance(guide, type) else type(guide)
    if kind not in (AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal):
        return None
    entries = {}
    for name, value in data_sets[0].items():
        if torch.is_tensor(value):
            if any(not torch.equal(data[name], value) for data in data_sets):
                entries[name] = torch.stack([data[name] for data in data_sets])
        elif any(data[name] is not value and data[name] != value for data in data_sets):
            return None
    if not entries:
        return None
    try:
        return fit_replications(joint, entries, kind is AutoMultivariateNormal, seed)
    except BAD_POINT:  # the model's structure depends on the data's values, for example
        return None


def symmetry_test(p: np.ndarray) -> float:
    """P value of Butler's test that p (n,) is symmetric about 1/2.

    The statistic is max_x |#(p <= x) - #(p >= 1 - x)|. Order the p by their distance from 1/2, the
    largest first, and let a walk step up for each p below 1/2 and down for each one above: the
    statistic is the walk's largest excursion. Under symmetry the steps are fair coin flips, so the
    distribution of the statistic is known exactly, whatever that of p.

    Example:
        >>> symmetry_test(np.linspace(0.01, 0.99, 99)) > 0.9
        True
        >>> symmetry_test(np.linspace(0.01, 0.70, 99)) < 0.001
        True
    """
    off = np.asarray(p, dtype=np.float64) - 0.5
    off = off[off != 0]  # on neither side
    if not len(off):
        return 1.0
    walk = np.cumsum(np.where(off < 0, 1, -1)[np.argsort(-np.abs(off))])
    furthest = int(np.abs(walk).max())
    # P(a fair walk of n steps stays strictly inside +-furthest), by reflection:
    # sum over k of (-1)^k P(S_n = j + 2 k furthest) for every end j inside.
    n = len(off)
    ends = np.arange(-furthest + 1, furthest)
    turns = np.arange(-(n // (2 * furthest)) - 2, n // (2 * furthest) + 3)
    positions = ends[:, None] + 2 * furthest * turns
    ups, odd = np.divmod(positions + n, 2)
    mass = np.where(odd == 0, scipy.stats.binom.pmf(ups, n, 0.5), 0.0)
    inside = float((mass * np.where(turns % 2, -1, 1)).sum())
    return min(1.0, max(0.0, 1.0 - inside))
