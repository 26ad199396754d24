"""Variational simulation-based calibration: is the fit biased on data the model itself makes?"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyro.poutine as poutine
import scipy.stats
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from tqdm.auto import tqdm

from vi_toolkit.deterministic.replications import fit_replications
from vi_toolkit.errors import ConvergenceWarning, PreflightError
from vi_toolkit.fitting import fit
from vi_toolkit.programs.isolation import isolated_pyro_state, seeded_state
from vi_toolkit.programs.joint import Joint
from vi_toolkit.programs.sites import latent_sites, observed_sites
from vi_toolkit.programs.vectorise import BAD_POINT

if TYPE_CHECKING:
    from vi_toolkit.figures import Figure

Replication = tuple[Mapping[str, Any], Mapping[str, torch.Tensor]]

LEVEL = 0.05  # chance of a false alarm, all scalars together
DRAWS = 2_000  # per fit, where the guide's distribution function is not known


@dataclass(frozen=True, eq=False)
class VSBC:
    """What :func:`vsbc` found, per scalar on the unconstrained scale.

    Attributes:
        names: of the scalars, (d,).
        p: q(u < true u) in every replication, (replications, d). For an exact posterior uniform.
        p_values: of the test that a column of p is symmetric about 1/2, (d,).
        batched: whether the fits were made all at once, or one by one with ``vi.fit``.
        unconverged: how many fits did not converge.
    """

    names: list[str]
    p: np.ndarray
    p_values: np.ndarray
    batched: bool
    unconverged: int

    @property
    def table(self) -> pd.DataFrame:
        """A row per scalar.

        ``mean p`` with its standard error under symmetry: below 1/2 the guide lies too high, above
        too low. ``spread``: sd of p over that of a uniform variable: above 1 the guide is too
        narrow, below too wide (on average over data sets; its standard error is about
        sqrt(0.2 / replications)). ``p value``: of symmetry. ``biased``: p value below 0.05 over the
        number of scalars (Bonferroni).
        """
        spread = self.p.std(0) * np.sqrt(12)
        return pd.DataFrame(
            {
                "mean p": self.p.mean(0),
                "mean p se": np.sqrt(((self.p - 0.5) ** 2).mean(0) / len(self.p)),
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
        """The scalars whose p are not symmetric."""
        return [n for n, b in zip(self.names, self._biased, strict=True) if b]

    @property
    def meaning(self) -> str:
        """In plain words."""
        count = len(self.p)
        if not self.biased:
            return (
                f"no bias seen in {count} replications: the p of all {len(self.names)} scalars are "
                "symmetric (widths are not tested; see .table)"
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
        """Histograms of p with their mirror images, the least symmetric scalars first."""
        from vi_toolkit.figures import plot_vsbc

        return plot_vsbc(self)


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

    In each replication latents :math:`u^0` are drawn from the prior, data from the model at them,
    the guide is fitted to these data, and :math:`p = q(u_i < u_i^0)` is noted for every scalar. If
    the guide's centre is unbiased p and 1 - p have the same distribution, however wrong its width.
    That symmetry is tested (Butler's test, exact for any sample size). A too narrow guide gives a
    U-shaped histogram, which is symmetric and passes: look at ``spread``.

    It says how the guide does on average over the prior, not on your data. What averages out is not
    seen: an error away from (or towards) zero under a prior symmetric about zero, for one. Mean
    field passes on the logistic regression recipe, where :func:`~vi_toolkit.diagnose` finds 21 of
    31 means off.

    Gaussian autoguides (mean field and full rank) are fitted to all replications at once, with
    steps of a natural gradient to the optimum that ``vi.fit`` finds too; fits that do not get there
    and every other guide, or any ``options``, go through ``vi.fit`` one by one.

    Args:
        model: called as ``model(**data)``.
        guide: as for :func:`~vi_toolkit.fit`.
        data: arguments of the model. Those that hold observations are replaced by simulated ones.
        replications: how many.
        simulate: instead of the model's own prior predictive, a function of the replication's
            number that returns (data, latents); all data of the same shapes.
        seed: of the simulations.
        progress: show a progress bar where fits are made one by one.
        options: of ``vi.fit``.

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
    runs = [simulate(r) for r in range(replications)]
    first = dict(runs[0][0])
    with isolated_pyro_state(rng_state=seeded_state(seed), dtype=torch.float64):
        every = None
        try:
            joint = Joint(model, _in_double(first))
            if not options:
                every = _all_at_once(joint, guide, [_in_double(data) for data, _ in runs], seed)
        except BAD_POINT:  # a single-precision tensor of the model's own does not mix with double
            with isolated_pyro_state(dtype=torch.float32):
                joint = Joint(model, first)
        dtype = joint.start.dtype
        truth = torch.stack(
            [
                joint.flatten({n: torch.as_tensor(t[n]).to(dtype)[None] for n in joint.sites})[0]
                for _, t in runs
            ]
        )
    p = np.full(truth.shape, np.nan)
    left = np.arange(replications)
    if every is not None:
        p = torch.special.ndtr((truth - every.mean) / every.sd).numpy()
        left = np.flatnonzero(~every.converged.numpy())
    unconverged = 0
    for r in tqdm(left, disable=not progress or not len(left), desc="vsbc", unit="fit"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            one = fit(model, guide, runs[r][0], seed=seed, progress=False, **options)
        unconverged += not one.converged
        u = joint.flatten({n: v.to(dtype) for n, v in one.sample(DRAWS, seed=int(r)).items()})
        # The middle of what the draws leave open: never 0 or 1.
        p[r] = ((u < truth[r]).sum(0).numpy() + 0.5) / (DRAWS + 1)
    p_values = np.array([symmetry_test(column) for column in p.T])
    return VSBC(list(joint.names), p, p_values, every is not None, unconverged)


def _in_double(data: Mapping[str, Any]) -> dict[str, Any]:
    return {
        k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in data.items()
    }


def _all_at_once(joint: Joint, guide: Any, runs: list[dict[str, Any]], seed: int) -> Any:
    """All fits together, or None where guide, data or model do not allow it."""
    kind = guide if isinstance(guide, type) else type(guide)
    if kind not in (AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal):
        return None
    entries = {}
    for name, value in runs[0].items():
        if torch.is_tensor(value):
            if any(not torch.equal(data[name], value) for data in runs):
                entries[name] = torch.stack([data[name] for data in runs])
        elif any(data[name] is not value and data[name] != value for data in runs):
            return None
    if not entries:
        return None
    try:
        return fit_replications(joint, entries, kind is AutoMultivariateNormal, seed)
    except BAD_POINT:  # structure that depends on the data's values, say
        return None


class PriorPredictive:
    """Replications of a model's own data: latents from the prior, data from the model at them.

    Args:
        model, data: the observed sites' values are replaced where they stand among the data.
        seed: of the draws.

    Raises:
        PreflightError: an improper prior, a ``pyro.factor``, no observed site, observations that
            are no argument of the model, or that it uses elsewhere too.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("observations", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> data, latents = PriorPredictive(model, {"y": torch.zeros(5)})(0)
        >>> data["y"].shape, latents["mu"].shape
        (torch.Size([5]), torch.Size([]))
    """

    def __init__(self, model: Callable[..., Any], data: Mapping[str, Any], seed: int = 0):
        self.model, self.data, self.seed = model, dict(data), seed
        own = "Or give simulate=, a function of a number that returns (data, latents)."
        with self._isolated(0), torch.no_grad():
            try:
                drawn: Any = poutine.trace(model).get_trace(**self.data)
            except NotImplementedError as error:
                raise PreflightError(
                    f"The model cannot be drawn from its prior: {error or 'a prior is improper'}.",
                    remedy="Give every latent a proper prior. " + own,
                ) from error
            factors = [
                n for n, s in drawn.nodes.items()
                if s["type"] == "sample" and type(s["fn"]).__name__ == "Unit"
            ]  # fmt: skip
            if factors:
                raise PreflightError(
                    f"The factor {factors[0]!r} changes the density but not the draws.",
                    site=factors[0],
                    remedy="Write it as a distribution. " + own,
                )
            observed = observed_sites(drawn)
            if not observed:
                raise PreflightError("The model observes no site.", remedy="Write obs=. " + own)
            self.entry_of = {}
            for name, site in observed.items():
                value = site["value"]
                held = [k for k, v in self.data.items() if _holds(v, value)]
                # Of several with the same numbers it is the tensor itself.
                if len(held) > 1:
                    held = [k for k in held if self.data[k].data_ptr() == value.data_ptr()]
                if not held:
                    raise PreflightError(
                        f"The observations of {name!r} are not an argument of the model.",
                        site=name,
                        remedy="Pass them in data as they are. " + own,
                    )
                self.entry_of[name] = held[0]
            self._check_that_nothing_else_uses_them(drawn, own)

    def _isolated(self, number: int) -> Any:
        state = np.random.SeedSequence([self.seed, number]).generate_state(1)[0]
        dtype = next(
            (v.dtype for v in self.data.values() if torch.is_tensor(v) and v.is_floating_point()),
            None,
        )
        return isolated_pyro_state(rng_state=seeded_state(int(state)), dtype=dtype)

    def _draw(self, data: Mapping[str, Any]) -> Any:
        return poutine.trace(poutine.uncondition(self.model)).get_trace(**data)

    def _check_that_nothing_else_uses_them(self, drawn: Any, own: str) -> None:
        """An autoregression, say, would be simulated from the real past."""
        latents = {n: s["value"] for n, s in latent_sites(drawn).items()}
        densities = []
        for change in (False, True):
            data = dict(self.data)
            for name, entry in self.entry_of.items():
                value = drawn.nodes[name]["value"]
                order = torch.arange(value.numel()).flip(0) if change else slice(None)
                data[entry] = value.reshape(-1)[order].reshape(value.shape)
            values = latents | {n: drawn.nodes[n]["value"] for n in self.entry_of}
            trace: Any = poutine.trace(poutine.condition(self.model, values)).get_trace(**data)
            trace.compute_log_prob()
            densities.append({n: trace.nodes[n]["log_prob"] for n in self.entry_of})
        for name, before in densities[0].items():
            if not torch.allclose(before, densities[1][name], equal_nan=True):
                raise PreflightError(
                    f"The distribution of {name!r} depends on the observations themselves.",
                    site=name,
                    remedy="The model cannot make such data by itself. " + own,
                )

    def __call__(self, number: int) -> Replication:
        with self._isolated(number + 1), torch.no_grad():
            trace = self._draw(self.data)
        data = dict(self.data)
        for name, entry in self.entry_of.items():
            value = trace.nodes[name]["value"]
            if not torch.isfinite(value).all():
                raise PreflightError(
                    f"Data drawn from the model are not finite at {name!r} (replication {number}).",
                    site=name,
                    remedy="Its priors allow more than the likelihood can hold: tighten them.",
                )
            data[entry] = value.to(self.data[entry].dtype)
        names = [n for n in latent_sites(trace) if n not in self.entry_of]
        return data, {n: trace.nodes[n]["value"] for n in names}


def _holds(entry: Any, value: torch.Tensor) -> bool:
    return (
        torch.is_tensor(entry)
        and entry.shape == value.shape
        and torch.equal(torch.nan_to_num(entry.to(value.dtype)), torch.nan_to_num(value))
    )


def symmetry_test(p: np.ndarray) -> float:
    """P value of Butler's test that p (n,) is symmetric about 1/2.

    The statistic is max_x |#(p <= x) - #(p >= 1 - x)|: with the p ordered by their distance from
    1/2, the largest excursion of a walk that steps up for a small p and down for a large one. Under
    symmetry the steps are fair coins, so its distribution is known exactly whatever that of p.

    Example:
        >>> symmetry_test(np.linspace(0.01, 0.99, 99)) > 0.9
        True
        >>> symmetry_test(np.linspace(0.01, 0.70, 99)) < 0.001
        True
    """
    off = np.asarray(p, dtype=np.float64) - 0.5
    off = off[off != 0]  # neither side
    if not len(off):
        return 1.0
    walk = np.cumsum(np.where(off < 0, 1, -1)[np.argsort(-np.abs(off))])
    reached = int(np.abs(walk).max())
    # P(a fair walk of n steps stays strictly inside +-reached), by reflection:
    # sum over k of (-1)^k P(S_n = j + 2 k reached) for every end j inside.
    n = len(off)
    ends = np.arange(-reached + 1, reached)
    turns = np.arange(-(n // (2 * reached)) - 2, n // (2 * reached) + 3)
    positions = ends[:, None] + 2 * reached * turns
    ups, odd = np.divmod(positions + n, 2)
    mass = np.where(odd == 0, scipy.stats.binom.pmf(ups, n, 0.5), 0.0)
    inside = float((mass * np.where(turns % 2, -1, 1)).sum())
    return min(1.0, max(0.0, 1.0 - inside))


__all__ = ["VSBC", "PriorPredictive", "symmetry_test", "vsbc"]
