"""Reference posteriors: what a variational fit is held against, and how each was made.

A reference is exact (closed form, enumeration), nearly so (quadrature), or long MCMC that has
passed the rules in :data:`MAX_R_HAT`, :data:`MIN_ESS`. All moments stand on the unconstrained
scale, scalar by scalar under the names of :class:`vi_toolkit.programs.joint.Joint`, because that is where
Gaussian guides live and where theory says what they get wrong.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.optimize
import scipy.special
import scipy.stats
import torch
from pyro import poutine
from torch.distributions.transforms import IndependentTransform

from vi_toolkit.arviz_adapter import ess, mean_se, quantile_se, rhat, sd_se
from vi_toolkit.deterministic.modes import find_modes
from vi_toolkit.errors import InvalidReferenceError, LoadError
from vi_toolkit.preflight.causes import cause
from vi_toolkit.preflight.data import check_arguments, check_data
from vi_toolkit.preflight.runs import numerical, run_model
from vi_toolkit.programs.isolation import isolated_pyro_state, seeded_state
from vi_toolkit.programs.joint import Joint, indices
from vi_toolkit.reference.nuts import nuts_draws

KINDS = ("exact", "enumeration", "quadrature", "nuts")
LEVELS = {"5%": 0.05, "25%": 0.25, "50%": 0.50, "75%": 0.75, "95%": 0.95}

MAX_R_HAT = 1.01
"""Rank-normalised split R-hat must be below this (Vehtari et al., Bayesian Analysis 16, 2021)."""
MIN_ESS = 1000
"""Bulk and tail effective sample sizes must reach this: the error of a mean is then 0.03 sd."""

# The finest grid that quadrature tries.
MOST_PER_AXIS, MOST_POINTS = 2**15, 4_000_000

FORMAT = "vi_toolkit reference posterior"
FORMAT_VERSION = 1

# |skewness| and |excess kurtosis| below these: a Gaussian guide can be held to its own theory.
NEAR_GAUSSIAN_SKEWNESS, NEAR_GAUSSIAN_KURTOSIS = 0.25, 0.35


@dataclass(frozen=True, eq=False, repr=False)
class Reference:
    """Moments and quantiles of a posterior, with their errors and their making.

    d is the number of latent scalars on the unconstrained scale.

    Attributes:
        kind: "exact", "enumeration", "quadrature" or "nuts".
        names: the d scalars, as in ``Joint.names``: "coefficients[3]", "log(sigma)", ...
        mean, sd: (d,) float64.
        covariance: (d, d) float64, or None where unknown.
        mean_se, sd_se: (d,) Monte Carlo standard errors (numerical errors for quadrature;
            zero for exact and enumeration).
        conditional_sd_se: (d,) standard error of each scalar's conditional sd given the others,
            (Lambda_ii)^(-1/2) with Lambda the inverse covariance: the sd a mean-field guide has.
        quantiles, quantiles_se: dict of (d,) for "5%", "25%", "50%", "75%", "95%"; empty where
            unknown.
        skewness, excess_kurtosis: (d,).
        sites: one row per scalar on the model's own scale: name, mean, sd, 5%, 50%, 95%, mean_se.
        log_evidence: log p(data), or None where unknown.
        made: how it was made: method, seeds, R-hat, effective sample sizes, divergences, versions
            and the command, but no date, so that a rerun writes the same file.

    Raises:
        InvalidReferenceError: a field has the wrong shape, a non-finite number, or an sd of zero.

    Example:
        >>> import numpy as np
        >>> Reference.exact(["a", "b"], mean=[0.0, 1.0], covariance=np.eye(2))
        Reference(exact, 2 scalars, near-Gaussian)
    """

    kind: str
    names: list[str]
    mean: np.ndarray
    sd: np.ndarray
    covariance: np.ndarray | None
    mean_se: np.ndarray
    sd_se: np.ndarray
    conditional_sd_se: np.ndarray
    quantiles: dict[str, np.ndarray]
    quantiles_se: dict[str, np.ndarray]
    skewness: np.ndarray
    excess_kurtosis: np.ndarray
    sites: list[dict[str, Any]]
    log_evidence: float | None
    made: dict[str, Any]

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvalidReferenceError(
                f"kind is {self.kind!r}; it must be one of {', '.join(KINDS)}"
            )
        d = len(self.names)
        if len(set(self.names)) < d or not d:
            raise InvalidReferenceError("names must be distinct and at least one")
        arrays = {f: getattr(self, f) for f in _VECTORS}
        for group in ("quantiles", "quantiles_se"):
            arrays |= {f"{group}[{level!r}]": x for level, x in getattr(self, group).items()}
        for field, value in arrays.items():
            _check_array(field, value, (d,), self.names)
        for level in (*self.quantiles, *self.quantiles_se):
            if level not in LEVELS:
                raise InvalidReferenceError(f"unknown quantile {level!r}; use {', '.join(LEVELS)}")
        if (self.sd <= 0).any():
            still = self.names[int(np.argmin(self.sd))]
            raise InvalidReferenceError(f"{still} does not vary: its sd is {self.sd.min()}")
        if self.covariance is not None:
            _check_array("covariance", self.covariance, (d, d), self.names)
            scale = np.outer(self.sd, self.sd)
            asymmetry = np.abs(self.covariance - self.covariance.T) / scale
            if asymmetry.max() > 1e-8:
                raise InvalidReferenceError("covariance is not symmetric")
            if not np.allclose(self.covariance.diagonal(), self.sd**2, rtol=1e-6, atol=0):
                raise InvalidReferenceError("covariance has a diagonal that is not sd squared")

    @property
    def near_gaussian(self) -> bool:
        """Every |skewness| < 0.25 and every |excess kurtosis| < 0.35 (unconstrained scale)."""
        return bool(
            (np.abs(self.skewness) < NEAR_GAUSSIAN_SKEWNESS).all()
            and (np.abs(self.excess_kurtosis) < NEAR_GAUSSIAN_KURTOSIS).all()
        )

    @property
    def mean_field_sd_ratio(self) -> np.ndarray | None:
        """r_i = (Lambda_ii Sigma_ii)^(-1/2): the sd of the best mean-field Gaussian over the sd.

        KL(q || p) between a factorised Gaussian q and a Gaussian p with covariance Sigma is least
        at variances 1 / Lambda_ii, Lambda = Sigma^(-1) (Bishop, Pattern Recognition and Machine
        Learning, 2006, section 10.1.2). Shape (d,); None where the covariance is unknown.
        """
        if self.covariance is None:
            return None
        # With the correlation matrix instead of Sigma the units of the scalars drop out.
        correlation = self.covariance / np.outer(self.sd, self.sd)
        return np.linalg.inv(correlation).diagonal() ** -0.5

    @property
    def table(self) -> pd.DataFrame:
        """Mean, sd and quantiles with their standard errors, one row per scalar."""
        columns = {"mean": self.mean, "mean_se": self.mean_se, "sd": self.sd}
        columns |= {"sd_se": self.sd_se, **self.quantiles}
        return pd.DataFrame(columns, index=pd.Index(self.names, name="scalar"))

    def __repr__(self) -> str:
        shape = "near-Gaussian" if self.near_gaussian else "not near-Gaussian"
        d = len(self.names)
        return f"Reference({self.kind}, {d} scalar{'s' * (d > 1)}, {shape})"

    # How references are made ---------------------------------------------------------------

    @classmethod
    def exact(
        cls,
        names: Sequence[str],
        mean: Any,
        covariance: Any,
        quantiles: Mapping[str, Any] | None = None,
        skewness: Any = None,
        excess_kurtosis: Any = None,
        sites: Sequence[Mapping[str, Any]] = (),
        log_evidence: float | None = None,
        made: Mapping[str, Any] | None = None,
    ) -> Reference:
        """A posterior known in closed form.

        Args:
            names: the d scalars on the unconstrained scale.
            mean: (d,).
            covariance: (d, d).
            quantiles: "5%", "25%", "50%", "75%", "95%" -> (d,). If left out they are those of the
                Normal where skewness and excess kurtosis are zero, and unknown otherwise.
            skewness, excess_kurtosis: (d,); zero if left out, which is right for a Gaussian.
            sites: rows on the model's own scale.
            log_evidence: log p(data).
            made: where the formula comes from.

        Example:
            >>> r = Reference.exact(["a", "b"], [0.0, 0.0], [[1.0, 0.6], [0.6, 1.0]])
            >>> r.mean_field_sd_ratio
            array([0.8, 0.8])
        """
        mean, covariance = _float64(mean), _float64(covariance)
        sd = np.sqrt(covariance.diagonal())
        zero = np.zeros(len(names))
        skewness = zero if skewness is None else _float64(skewness)
        excess_kurtosis = zero if excess_kurtosis is None else _float64(excess_kurtosis)
        if quantiles is None:
            gaussian = not skewness.any() and not excess_kurtosis.any()
            normal = {k: mean + sd * scipy.stats.norm.ppf(p) for k, p in LEVELS.items()}
            quantiles = normal if gaussian else {}
        return cls(
            kind="exact",
            names=list(names),
            mean=mean,
            sd=sd,
            covariance=covariance,
            mean_se=zero,
            sd_se=zero,
            conditional_sd_se=zero,
            quantiles={k: _float64(v) for k, v in quantiles.items()},
            quantiles_se=dict.fromkeys(quantiles, zero),
            skewness=skewness,
            excess_kurtosis=excess_kurtosis,
            sites=[dict(row) for row in sites],
            log_evidence=None if log_evidence is None else float(log_evidence),
            made={"method": "closed form", **(made or {})},
        )

    @classmethod
    def enumeration(
        cls,
        names: Sequence[str],
        values: Any,
        log_joint: Any,
        made: Mapping[str, Any] | None = None,
    ) -> Reference:
        """A discrete posterior, by adding up every configuration.

        Args:
            names: the d scalars.
            values: (configurations, d), every configuration once.
            log_joint: (configurations,), log p(data, configuration).
            made: what was enumerated.

        Example:
            >>> r = Reference.enumeration(["z"], [[0.0], [1.0]], np.log([0.1, 0.3]))
            >>> round(float(r.mean[0]), 6), round(float(np.exp(r.log_evidence)), 6)
            (0.75, 0.4)
        """
        values, log_joint = _float64(values), _float64(log_joint)
        log_evidence = float(scipy.special.logsumexp(log_joint))
        weights = np.exp(log_joint - log_evidence)
        moments = _weighted_moments(values, weights)
        quantiles = {k: _weighted_quantile(values, weights, p) for k, p in LEVELS.items()}
        columns = [moments["mean"], moments["sd"], *(quantiles[k] for k in ("5%", "50%", "95%"))]
        rows = np.stack(columns, -1)
        zero = np.zeros(len(names))
        return cls(
            kind="enumeration",
            names=list(names),
            **moments,
            mean_se=zero,
            sd_se=zero,
            conditional_sd_se=zero,
            quantiles=quantiles,
            quantiles_se=dict.fromkeys(LEVELS, zero),
            sites=[_site_row(n, row, 0.0) for n, row in zip(names, rows, strict=True)],
            log_evidence=log_evidence,
            made={"method": "enumeration", "configurations": len(values), **(made or {})},
        )

    @classmethod
    def quadrature(
        cls,
        model: Callable[..., Any],
        data: Mapping[str, Any],
        tolerance: float = 1e-8,
        command: str | None = None,
    ) -> Reference:
        """A posterior of at most three scalars, by the trapezoidal rule on the unconstrained scale.

        The rule converges geometrically for smooth densities with both tails inside the grid
        (Trefethen and Weideman, SIAM Review 56, 2014). The grid covers all modes found from many
        starts, grows until the density on its faces is e^-37 of the highest, and is halved until
        no moment moves by more than ``tolerance`` sd; the last movement is kept as the error.

        Args:
            model: Pyro model with one to three continuous latent scalars.
            data: its keyword arguments; floating tensors are taken to float64.
            tolerance: in posterior sds.
            command: how to make this reference again; a call of this function if None.

        Raises:
            InvalidReferenceError: too many scalars, no finite density, or the tolerance is out of reach.

        Example:
            >>> import pyro, pyro.distributions as dist
            >>> def model(y):
            ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
            ...     pyro.sample("y", dist.Bernoulli(logits=2 * z), obs=y)
            >>> r = Reference.quadrature(model, {"y": torch.tensor(1.0)})
            >>> print(f"{r.mean[0]:.6f} {r.sd[0]:.6f} {r.log_evidence:.6f}")
            0.605706 0.795689 -0.693147
        """
        with isolated_pyro_state(rng_state=seeded_state(0), dtype=torch.float64):
            joint = Joint(model, _in_double(data))
            if not 1 <= joint.dim <= 3:
                raise InvalidReferenceError(
                    f"quadrature needs one to three latent scalars; this model has {joint.dim}. "
                    "Use Reference.nuts."
                )
            fine = _integrate(joint, tolerance)
        made = {
            "method": "trapezoidal rule on the unconstrained scale",
            "points": fine.pop("points"),
            "change_on_last_halving": fine.pop("change"),
            "versions": _versions("pyro-ppl", "torch", "numpy", "scipy"),
            "command": command
            or f"vi_toolkit.Reference.quadrature(model, data, tolerance={tolerance:g})",
        }
        return cls(kind="quadrature", names=list(joint.names), made=made, **fine)

    @classmethod
    def from_draws(
        cls,
        joint: Joint,
        draws: Mapping[str, torch.Tensor],
        kind: str = "nuts",
        made: Mapping[str, Any] | None = None,
    ) -> Reference:
        """Moments, quantiles and Monte Carlo errors (ArviZ's) of draws in chains.

        Args:
            joint: names the scalars and maps draws to the unconstrained scale.
            draws: site -> (chains, n, *site shape), on the model's own scale.
            kind: "nuts" puts the draws through the admission rules, for which ``made`` must say
                how many transitions diverged (``"divergences"``); the other kinds are taken as is.
            made: how the draws were made. R-hat and effective sample sizes are added to it.

        Raises:
            InvalidReferenceError: refused: the message names the scalar and the number at fault. Where the
                draws could be summarised but are not admitted, ``error.reference`` has them.
        """
        made = dict(made or {})
        first = next(iter(joint.sites.values()))
        chains, n = draws[first.name].shape[:2]
        if kind == "nuts" and (chains < 2 or n < 4):
            raise InvalidReferenceError(
                f"R-hat needs two chains of four draws; there are {chains} of {n}"
            )
        own = {
            name: torch.as_tensor(draws[name]).detach().cpu().double().flatten(0, 1)
            for name in joint.sites
        }
        flat = joint.flatten(own).numpy()
        by_chain = flat.reshape(chains, n, joint.dim)
        for name, column in zip(joint.names, flat.T, strict=True):
            if not np.isfinite(column).all():
                raise InvalidReferenceError(f"the draws of {name} are not all finite")
            if column.min() == column.max():
                raise InvalidReferenceError(f"{name} does not vary: every draw is {column[0]:.6g}")
        r_hat = rhat(by_chain)
        bulk = ess(by_chain, "bulk")
        tail = ess(by_chain, "tail")
        faults: list[str] = []
        if kind == "nuts":
            if "divergences" not in made:
                raise InvalidReferenceError(
                    "a NUTS reference must say how many transitions diverged: "
                    'made={"divergences": ...}'
                )
            faults = admission_faults(joint.names, r_hat, bulk, tail, made["divergences"])
        covariance = np.atleast_2d(np.cov(flat, rowvar=False))
        sd = np.sqrt(covariance.diagonal())
        # Given the others, scalar i deviates from its regression on them by (Lambda z)_i divided by
        # Lambda_ii. The sd of that deviation is the conditional sd, and an error of the regression
        # matters to second order only, so the standard error is that of the sd of the deviations.
        precision = np.linalg.pinv(covariance / np.outer(sd, sd), hermitian=True)
        residuals = (by_chain - flat.mean(0)) / sd @ precision / precision.diagonal() * sd
        made |= {
            "r_hat": _rounded(r_hat.max(), 6),
            "bulk_ess": _rounded(bulk.min(), 6),
            "tail_ess": _rounded(tail.min(), 6),
        }
        if faults:
            made["refused"] = "; ".join(faults)
        own_scale = []
        for site in joint.sites.values():
            value = own[site.name].reshape(chains, n, -1).numpy()
            labels = [site.name + index for index in indices(site.shape)]
            own_scale += [_draws_row(label, value[:, :, j]) for j, label in enumerate(labels)]
        content: dict[str, Any] = {
            "kind": kind,
            "names": list(joint.names),
            "mean": _rounded(flat.mean(0)),
            "sd": _rounded(sd),
            "covariance": _rounded(covariance),
            "mean_se": _rounded(mean_se(by_chain), 4),
            "sd_se": _rounded(sd_se(by_chain), 4),
            "conditional_sd_se": _rounded(sd_se(residuals), 4),
            "quantiles": {k: _rounded(np.quantile(flat, p, axis=0)) for k, p in LEVELS.items()},
            "quantiles_se": {k: _rounded(quantile_se(by_chain, p), 4) for k, p in LEVELS.items()},
            "skewness": _rounded(scipy.stats.skew(flat), 4),
            "excess_kurtosis": _rounded(scipy.stats.kurtosis(flat), 4),
            "sites": own_scale,
            "log_evidence": None,
            "made": made,
        }
        if not faults:
            return cls(**content)
        try:
            refused = cls(**content)
        except InvalidReferenceError:  # so degenerate that not even its errors are numbers
            refused = None
        raise InvalidReferenceError(
            f"These draws are not admitted as a reference: {made['refused']}. Run longer "
            "chains (draws=, warmup=), set full_mass=True where the posterior is correlated, raise "
            "target_accept against divergences, or reparameterise the model."
            + (" error.reference has the refused numbers." if refused else ""),
            refused,
        )

    @classmethod
    def nuts(
        cls,
        model: Callable[..., Any],
        data: Mapping[str, Any],
        chains: int = 4,
        num_draws: int = 1000,
        warmup: int = 1000,
        seed: int = 0,
        progress: bool = True,
        full_mass: bool = False,
        target_accept: float = 0.8,
        compile: str | bool = "auto",
        command: str | None = None,
    ) -> Reference:
        """A posterior by Pyro's NUTS, refused unless it passes the admission rules.

        Admitted are draws with rank-normalised split R-hat below 1.01 and bulk and tail effective
        sample sizes of at least 1,000 for every scalar, and with no divergent transition. The
        default 4 x 1,000 draws may be too few for that: where scalars are correlated, the tails
        are heavy or the scales differ, expect to need more draws, ``full_mass`` or both. A refused
        run is not lost: ``error.reference`` is the Reference that it would have been.

        The chains run one after the other, each from its own seed and its own start, uniform on
        (-2, 2) on the unconstrained scale; floating data are taken to float64. The caller's
        random state and parameter store are left as they were.

        Args:
            model: Pyro model without discrete latents.
            data: its keyword arguments, tensors where the model computes with them; checked as
                :func:`~vi_toolkit.fit` checks them.
            chains, num_draws, warmup: numbers per run and per chain.
            seed: the chains' seeds are derived from it.
            progress: show Pyro's progress bar for each chain.
            full_mass: adapt a dense mass matrix; worth it for strongly correlated posteriors.
            target_accept: NUTS' target acceptance probability; raise it against divergences.
            compile: whether the log density is compiled, see :func:`~vi_toolkit.reference.nuts.nuts_draws`.
            command: how to make this reference again; a call of this function if None.

        Raises:
            PreflightError: the data cannot be passed to the model, or the model raises on them.
            CompileError: ``compile=True``, and the log density cannot be compiled.
            InvalidReferenceError: rank R-hat, bulk or tail effective sample size, or divergences fail;
                ``error.reference`` has the refused numbers.

        Example:
            >>> import pyro, pyro.distributions as dist
            >>> def model(y):
            ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
            ...     with pyro.plate("observations", len(y)):
            ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
            >>> r = Reference.nuts(model, {"y": torch.zeros(4)}, progress=False, warmup=300)
            >>> bool(abs(r.sd[0] - 0.5) < 5 * r.sd_se[0])
            True
        """
        if chains < 2:
            raise InvalidReferenceError("R-hat compares chains, so a reference needs at least two")
        data = _checked(model, data)
        by_chain, made = nuts_draws(
            model,
            data,
            chains=chains,
            num_draws=num_draws,
            warmup=warmup,
            seed=seed,
            progress=progress,
            full_mass=full_mass,
            target_accept=target_accept,
            compile=compile,
        )
        made |= {
            "versions": _versions("pyro-ppl", "torch", "arviz", "numpy"),
            "command": command
            or f"vi_toolkit.Reference.nuts(model, data, chains={chains}, draws={num_draws}, "
            f"warmup={warmup}, seed={seed}, full_mass={full_mass}, target_accept={target_accept})",
        }
        with isolated_pyro_state(rng_state=seeded_state(seed), dtype=torch.float64):
            return cls.from_draws(Joint(model, data), by_chain, "nuts", made)

    # On disk -------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the reference as JSON: sorted keys, one line per row, every float as it is."""
        content: dict[str, Any] = {"format": FORMAT, "format_version": FORMAT_VERSION}
        for field in fields(self):
            content[field.name] = _plain(getattr(self, field.name))
        Path(path).write_text(_layout(content) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Reference:
        """Read what :meth:`save` wrote; every number comes back bit for bit.

        Raises:
            LoadError: the file is truncated, not JSON, not a reference, or inconsistent.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
            raise LoadError(f"{path} is not JSON, or is cut short: {error}") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise LoadError(f"{path} is JSON, but not a reference posterior")
        if content.get("format_version") != FORMAT_VERSION:
            raise LoadError(
                f"{path} has format version {content.get('format_version')!r}; this vi_toolkit "
                f"reads version {FORMAT_VERSION}. Make the reference again."
            )
        if missing := {f.name for f in fields(cls)} - set(content):
            raise LoadError(f"{path} lacks {', '.join(sorted(missing))}")
        values = {f.name: content[f.name] for f in fields(cls)}
        try:
            for field in _VECTORS:
                values[field] = _float64(values[field])
            for field in ("quantiles", "quantiles_se"):
                values[field] = {k: _float64(v) for k, v in values[field].items()}
            if values["covariance"] is not None:
                values["covariance"] = _float64(values["covariance"])
            return cls(**values)
        except (InvalidReferenceError, TypeError, ValueError, AttributeError) as error:
            raise LoadError(f"{path} is not a valid reference posterior: {error}") from error


_VECTORS = (
    "mean", "sd", "mean_se", "sd_se", "conditional_sd_se", "skewness", "excess_kurtosis"
)  # fmt: skip


def _check_array(field: str, value: Any, shape: tuple[int, ...], names: list[str]) -> None:
    if not isinstance(value, np.ndarray) or value.shape != shape:
        found = getattr(value, "shape", type(value).__name__)
        raise InvalidReferenceError(
            f"{field} must have shape {shape}, one per name; it has {found}"
        )
    if not np.isfinite(value).all():
        i = int(np.argwhere(~np.isfinite(value))[0][0])
        raise InvalidReferenceError(f"{field} of {names[i]} is not a finite number")


def _float64(x: Any) -> np.ndarray:
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu().numpy()
    return np.array(x, dtype=np.float64)


def _in_double(data: Mapping[str, Any]) -> dict[str, Any]:
    """Data on the CPU, numbers in float64: NUTS takes small steps one after the other."""

    def moved(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return x.cpu().double() if x.is_floating_point() else x.cpu()

    return {name: moved(x) for name, x in data.items()}


def _checked(model: Callable[..., Any], data: Any) -> dict[str, Any]:
    """``data`` in float64; PreflightError if they do not suit the model, as before a fit."""
    if isinstance(data, Mapping):
        data = _in_double(data)  # first: data of mixed precision are none of NUTS's trouble
    check_data(data)
    check_arguments("model", model, data)
    with (
        isolated_pyro_state(rng_state=seeded_state(0), dtype=torch.float64, validate=True),
        warnings.catch_warnings(),
        poutine.block(),
    ):
        warnings.simplefilter("ignore")
        attempt = run_model(model, data)
        # A density that is not finite at one draw of the prior says nothing of the posterior.
        if attempt.error is not None and not numerical(attempt.error):
            again = partial(run_model, model)
            raise cause("model", attempt, data, again) from attempt.error
    return dict(data)


def _versions(*packages: str) -> dict[str, str]:
    versions = {package: importlib.metadata.version(package) for package in packages}
    return {"python": platform.python_version(), **versions}


def _rounded(x: Any, digits: int = 12) -> Any:
    """``x`` to so many significant digits: far inside the Monte Carlo error, and short on disk."""
    if np.ndim(x):
        return np.array([_rounded(value, digits) for value in x])
    return float(f"{float(x):.{digits}g}")


# Draws -------------------------------------------------------------------------------------


def admission_faults(
    names: list[str], r_hat: np.ndarray, bulk: np.ndarray, tail: np.ndarray, divergences: int
) -> list[str]:
    """Every admission rule that fails, with the worst scalar and its number; empty if none does."""
    faults = []
    # Written so that a NaN fails.
    worst = int(np.argmax(np.where(np.isnan(r_hat), np.inf, r_hat)))
    if not r_hat[worst] < MAX_R_HAT:
        faults.append(
            f"rank R-hat of {names[worst]} is {r_hat[worst]:.4f} (must be below {MAX_R_HAT})"
        )
    for label, sizes in (("bulk", bulk), ("tail", tail)):
        worst = int(np.argmin(np.where(np.isnan(sizes), -np.inf, sizes)))
        if not sizes[worst] >= MIN_ESS:
            faults.append(
                f"{label} ESS of {names[worst]} is {sizes[worst]:.0f} (must be at least {MIN_ESS})"
            )
    if divergences != 0:
        faults.append(f"{divergences} transitions diverged (none may)")
    return faults


def _site_row(name: str, numbers: Iterable[Any], mean_se: Any) -> dict[str, Any]:
    """Row of ``sites``; numbers are mean, sd, 5 %, 50 % and 95 % on the model's own scale."""
    columns = dict(zip(("mean", "sd", "5%", "50%", "95%"), map(float, numbers), strict=True))
    return {"name": name, **columns, "mean_se": float(mean_se)}


def _draws_row(name: str, value: np.ndarray) -> dict[str, Any]:
    """Row of ``sites`` for one scalar's draws (chains, n) on the model's own scale."""
    low = value.min()
    if low == value.max():  # a structural constant, such as a corner of a Cholesky factor
        return _site_row(name, (low, 0.0, low, low, low), 0.0)
    numbers = (value.mean(), value.std(ddof=1), *np.quantile(value, (0.05, 0.5, 0.95)))
    return _site_row(name, _rounded(numbers), _rounded(mean_se(value), 4))


# Sums over points --------------------------------------------------------------------------


def _weighted_moments(points: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """Mean, sd, covariance, skewness and excess kurtosis of points (n, d) with weights (n,)."""
    mean = weights @ points
    centred = points - mean
    covariance = (centred * weights[:, None]).T @ centred
    sd = np.sqrt(covariance.diagonal())
    standardised = centred / np.where(sd > 0, sd, 1.0)
    return {
        "mean": mean,
        "sd": sd,
        "covariance": covariance,
        "skewness": weights @ standardised**3,
        "excess_kurtosis": weights @ standardised**4 - 3,
    }


def _weighted_quantile(points: np.ndarray, weights: np.ndarray, p: float) -> np.ndarray:
    """Smallest value of each column of points (n, d) below or at which there is mass p."""
    out = []
    for column in points.T:
        order = np.argsort(column)
        mass = np.cumsum(weights[order])
        out.append(column[order[min(np.searchsorted(mass, p * mass[-1]), len(column) - 1)]])
    return np.array(out)


def _integrate(joint: Joint, tolerance: float) -> dict[str, Any]:
    """All that :meth:`Reference.quadrature` needs, on a grid refined until nothing moves."""
    modes = find_modes(joint)
    if not modes:
        raise InvalidReferenceError("the model's log density is not finite at any start")
    d, best = joint.dim, modes[0]
    modes = [m for m in modes if best.log_density - m.log_density < 37]
    centres = np.stack([m.location.numpy() for m in modes])
    # Conditional sds at the modes: the finest structure that a grid must resolve.
    precisions = np.stack([m.precision.diagonal().abs().clamp_min(1e-300).numpy() for m in modes])
    scales = precisions**-0.5
    low = (centres - 8 * scales).min(0)
    high = (centres + 8 * scales).max(0)
    finest = scales.min(0)

    def evaluate(per_axis: list[np.ndarray]) -> np.ndarray:
        points = np.stack(np.meshgrid(*per_axis, indexing="ij"), -1).reshape(-1, d)
        values = joint.log_densities(torch.from_numpy(points)).numpy()
        # Where the model raises or overflows there is no density.
        values = np.where(np.isfinite(values), values, -np.inf)
        return values.reshape([len(axis) for axis in per_axis])

    for _ in range(100):  # grow until the faces are empty
        coarse = evaluate([np.linspace(a, b, 33) for a, b in zip(low, high, strict=True)])
        width, grown = high - low, False
        for i in range(d):
            for edge, end, sign in ((0, low, -1), (-1, high, 1)):
                if np.take(coarse, edge, axis=i).max() > best.log_density - 37:
                    end[i] += sign * 0.25 * width[i]
                    grown = True
        if not grown:
            break
    else:
        raise InvalidReferenceError(
            "the posterior has so heavy a tail that no grid holds it; use Reference.nuts"
        )

    previous: tuple[dict[str, Any], list[np.ndarray], np.ndarray] | None = None
    count = 64
    while count <= MOST_PER_AXIS and (count + 1) ** d <= MOST_POINTS:
        axes = [np.linspace(a, b, count + 1) for a, b in zip(low, high, strict=True)]
        log_density = evaluate(axes)
        spacing = np.array([axis[1] - axis[0] for axis in axes])
        log_sum = float(scipy.special.logsumexp(log_density))
        weights = np.exp(log_density - log_sum)
        points = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, d)
        now = _weighted_moments(points, weights.ravel())
        now["log_evidence"] = log_sum + float(np.log(spacing).sum())
        if previous is not None:
            before, sd = previous[0], now["sd"]
            moved = {f: np.abs(now[f] - before[f]) for f in ("mean", "sd", "covariance")}
            change = max(
                (moved["mean"] / sd).max(),
                (moved["sd"] / sd).max(),
                (moved["covariance"] / np.outer(sd, sd)).max(),
                abs(now["log_evidence"] - before["log_evidence"]),
            )
            if change < tolerance and (spacing <= finest).all():
                quantiles = _axis_quantiles(axes, weights)
                coarser = _axis_quantiles(*previous[1:])
                return now | {
                    "quantiles": quantiles,
                    "mean_se": moved["mean"],
                    "sd_se": moved["sd"],
                    "conditional_sd_se": moved["sd"],
                    "quantiles_se": {k: np.abs(v - coarser[k]) for k, v in quantiles.items()},
                    "sites": _quadrature_rows(joint, points, weights.ravel(), quantiles),
                    "points": len(points),
                    "change": float(f"{change:.2g}"),
                }
        previous = now, axes, weights
        count *= 2
    raise InvalidReferenceError(
        f"no grid of {count // 2} points per axis reaches a tolerance of {tolerance:g} for this "
        "posterior; raise the tolerance or use Reference.nuts"
    )


def _axis_quantiles(axes: list[np.ndarray], weights: np.ndarray) -> dict[str, np.ndarray]:
    return {
        k: np.array([_axis_quantile(axis, weights, i, p) for i, axis in enumerate(axes)])
        for k, p in LEVELS.items()
    }


def _axis_quantile(axis: np.ndarray, weights: np.ndarray, i: int, p: float) -> float:
    """Quantile of the i-th coordinate from the grid's weights.

    The distribution function is the integral of the sinc interpolant of the marginal density,
    sum_k w_k (1/2 + Si(pi (x - x_k) / h) / pi), which converges as fast as the trapezoidal rule.
    """
    marginal = weights.sum(tuple(j for j in range(weights.ndim) if j != i))
    h = axis[1] - axis[0]

    def excess(x: float) -> float:
        sine_integral = scipy.special.sici(np.pi * (x - axis) / h)[0]
        return float(marginal @ (0.5 + sine_integral / np.pi)) - p

    return float(
        scipy.optimize.brentq(excess, axis[0], axis[-1], xtol=1e-12 * (axis[-1] - axis[0]))
    )


def _quadrature_rows(
    joint: Joint, points: np.ndarray, weights: np.ndarray, quantiles: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Rows of ``sites``: the same sums on the model's own scale."""
    rows = []
    with torch.no_grad():
        own = joint.unflatten(torch.from_numpy(points))
        levels = np.stack([quantiles[k] for k in ("5%", "50%", "95%")])
        own_levels = joint.unflatten(torch.from_numpy(levels))
    for site in joint.sites.values():
        value = own[site.name].reshape(len(points), -1).numpy()
        mean = weights @ value
        sd = np.sqrt(weights @ (value - mean) ** 2)
        if _elementwise(site.transform):
            # Monotone in each scalar: quantiles go through (a falling transform swaps them).
            q = np.sort(own_levels[site.name].reshape(3, -1).numpy(), axis=0)
        else:
            q = np.stack([_weighted_quantile(value, weights, p) for p in (0.05, 0.5, 0.95)])
        for j, index in enumerate(indices(site.shape)):
            rows.append(_site_row(site.name + index, (mean[j], sd[j], *q[:, j]), 0.0))
    return rows


def _elementwise(transform: Any) -> bool:
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    return transform.domain.event_dim == 0 and transform.codomain.event_dim == 0


# JSON --------------------------------------------------------------------------------------


def _plain(x: Any) -> Any:
    """NumPy containers as JSON's."""
    if isinstance(x, np.ndarray):
        return x.tolist()
    if isinstance(x, Mapping):
        return {str(k): _plain(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(v) for v in x]
    return x.item() if isinstance(x, np.generic) else x


def _layout(x: Any, depth: int = 0) -> str:
    """JSON with sorted keys in which every innermost list or row stands on one line."""
    flat = not isinstance(x, dict | list) or not any(
        isinstance(v, dict | list) for v in (x.values() if isinstance(x, dict) else x)
    )
    if flat and depth:
        return json.dumps(x, sort_keys=True, ensure_ascii=False, allow_nan=False)
    pad = "\n" + " " * (depth + 1)
    if isinstance(x, dict):
        items = [f"{json.dumps(k)}: {_layout(x[k], depth + 1)}" for k in sorted(x)]
        return "{" + pad + f",{pad}".join(items) + "\n" + " " * depth + "}"
    items = [_layout(v, depth + 1) for v in x]
    return "[" + pad + f",{pad}".join(items) + "\n" + " " * depth + "]"
