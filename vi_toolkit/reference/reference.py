"""A posterior to compare a variational fit with, and how it was made.

A reference is exact (closed form), nearly so (quadrature), or long MCMC that passed the admission
rules of :mod:`vi_toolkit.reference.draws`. Its moments are on the unconstrained scale, scalar by
scalar, under the names of :class:`vi_toolkit.programs.joint.Joint`. Gaussian guides live on that
scale, and it is there that theory predicts their errors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats
import torch

from vi_toolkit.errors import InvalidReferenceError, LoadError
from vi_toolkit.programs.isolation import isolated_pyro_state, seeded_state
from vi_toolkit.programs.joint import Joint
from vi_toolkit.reference import storage
from vi_toolkit.reference.data import in_double
from vi_toolkit.reference.draws import summarise
from vi_toolkit.reference.nuts import nuts_draws
from vi_toolkit.reference.quadrature import integrate
from vi_toolkit.reference.summary import LEVELS, versions

KINDS = ("exact", "quadrature", "nuts")

# A posterior is called near-Gaussian if its |skewness| and |excess kurtosis| stay below these; a
# Gaussian guide can then be compared with what theory predicts.
NEAR_GAUSSIAN_SKEWNESS, NEAR_GAUSSIAN_KURTOSIS = 0.25, 0.35

_VECTORS = (
    "mean", "sd", "mean_se", "sd_se", "conditional_sd_se", "skewness", "excess_kurtosis"
)  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class Reference:
    """Moments and quantiles of a posterior, their standard errors, and how they were made.

    Make one with :meth:`exact`, :meth:`quadrature`, :meth:`nuts` or :meth:`from_draws`, or read
    one with :meth:`load`. d is the number of latent scalars on the unconstrained scale.

    Attributes:
        kind: "exact", "quadrature" or "nuts".
        names: the d scalars, as in ``Joint.names``: "coefficients[3]", "log(sigma)", ...
        mean, sd: (d,) float64.
        covariance: (d, d) float64, or None if unknown.
        mean_se, sd_se: (d,) standard errors of mean and sd: Monte Carlo standard errors for NUTS,
            numerical errors for quadrature, zero for an exact reference.
        conditional_sd_se: (d,) standard error of each scalar's conditional sd given the others,
            (Lambda_ii)^(-1/2) with Lambda the inverse covariance. The best mean-field guide of a
            Gaussian posterior has these sds.
        quantiles, quantiles_se: dict of (d,) for "5%", "25%", "50%", "75%", "95%", and their
            standard errors; empty if unknown.
        skewness, excess_kurtosis: (d,).
        sites: one row per scalar on the model's own scale: name, mean, sd, 5%, 50%, 95%, mean_se.
        log_evidence: log p(data) in nats, or None if unknown.
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
            constant = self.names[int(np.argmin(self.sd))]
            raise InvalidReferenceError(f"{constant} does not vary: its sd is {self.sd.min()}")
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
        Learning, 2006, section 10.1.2). Shape (d,); None if the covariance is unknown.
        """
        if self.covariance is None:
            return None
        # The ratio does not depend on the scalars' units, so invert the correlation matrix.
        correlation = self.covariance / np.outer(self.sd, self.sd)
        return np.linalg.inv(correlation).diagonal() ** -0.5

    @property
    def table(self) -> pd.DataFrame:
        """Mean, sd and quantiles with the standard errors of mean and sd, one row per scalar."""
        columns = {"mean": self.mean, "mean_se": self.mean_se, "sd": self.sd}
        columns |= {"sd_se": self.sd_se, **self.quantiles}
        return pd.DataFrame(columns, index=pd.Index(self.names, name="scalar"))

    def __repr__(self) -> str:
        shape = "near-Gaussian" if self.near_gaussian else "not near-Gaussian"
        d = len(self.names)
        return f"Reference({self.kind}, {d} scalar{'s' * (d > 1)}, {shape})"

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
            quantiles: "5%", "25%", "50%", "75%", "95%" -> (d,). If left out, they are those of the
                Normal if skewness and excess kurtosis are zero, and unknown otherwise.
            skewness, excess_kurtosis: (d,); zero if left out, which is right for a Gaussian.
            sites: rows on the model's own scale.
            log_evidence: log p(data).
            made: where the formula comes from.

        Raises:
            InvalidReferenceError: a shape does not fit, or a number is not finite.

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
    def quadrature(
        cls, model: Callable[..., Any], data: Mapping[str, Any], tolerance: float = 1e-8
    ) -> Reference:
        """A posterior of at most three scalars, by the trapezoidal rule on the unconstrained scale.

        The rule converges geometrically for smooth densities with both tails inside the grid
        (Trefethen and Weideman, SIAM Review 56, 2014). The grid covers all modes found from many
        starts and grows until the density on its faces is e^-37 of the highest. Its spacing is
        halved until no moment moves by more than ``tolerance`` sd; the last movement is recorded
        as the standard error.

        Args:
            model: Pyro model with one to three continuous latent scalars.
            data: its keyword arguments; floating tensors are converted to float64.
            tolerance: in posterior sds.

        Raises:
            InvalidReferenceError: the model has too many scalars or no finite density, or no grid
                reaches the tolerance.

        Example:
            >>> import pyro, pyro.distributions as dist
            >>> def model(y):
            ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
            ...     pyro.sample("y", dist.Bernoulli(logits=2 * z), obs=y)
            >>> r = Reference.quadrature(model, {"y": torch.tensor(1.0)})
            >>> print(f"{r.mean[0]:.6f} {r.sd[0]:.6f} {r.log_evidence:.6f}")
            0.605706 0.795689 -0.693147
        """
        found = integrate(model, data, tolerance)
        found["made"] |= {
            "method": "trapezoidal rule on the unconstrained scale",
            "versions": versions("pyro-ppl", "torch", "numpy", "scipy"),
            "command": f"vi_toolkit.Reference.quadrature(model, data, tolerance={tolerance:g})",
        }
        return cls(kind="quadrature", **found)

    @classmethod
    def from_draws(
        cls, joint: Joint, draws: Mapping[str, torch.Tensor], made: Mapping[str, Any]
    ) -> Reference:
        """A posterior from MCMC draws, refused unless they pass the admission rules.

        Moments, quantiles and Monte Carlo standard errors are ArviZ's. The rules are those of
        :meth:`nuts`.

        Args:
            joint: names the scalars and maps draws to the unconstrained scale.
            draws: site -> (chains, n, *site shape), on the model's own scale.
            made: how the draws were made; ``"divergences"``, the number of divergent transitions,
                is required. R-hat and effective sample sizes are added.

        Raises:
            InvalidReferenceError: the draws are refused; the message names the scalar and the
                number at fault. ``error.reference`` holds the draws' summary if there is one.
        """
        if "divergences" not in made:
            raise InvalidReferenceError(
                'a NUTS reference must say how many transitions diverged: made={"divergences": ...}'
            )
        found, convergence, faults = summarise(joint, draws, made["divergences"])
        found |= {"kind": "nuts", "log_evidence": None, "made": {**made, **convergence}}
        if not faults:
            return cls(**found)
        found["made"]["refused"] = "; ".join(faults)
        try:
            refused = cls(**found)
        except InvalidReferenceError:  # the draws do not even give finite standard errors
            refused = None
        raise InvalidReferenceError(
            f"These draws are not admitted as a reference: {found['made']['refused']}. Run longer "
            "chains (num_draws=, warmup=), set full_mass=True if the posterior is correlated, "
            "raise target_accept against divergences, or reparameterise the model."
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
        """A posterior by Pyro's NUTS, refused unless the draws pass the admission rules.

        The rules: for every scalar, rank-normalised split R-hat is below 1.01 and bulk and tail
        effective sample sizes are at least 1,000; and no transition diverged. The default of 4 x
        1,000 draws may be too few for that. Expect to need more draws, ``full_mass`` or both if
        scalars are correlated, tails are heavy or scales differ. A refused run is not lost:
        ``error.reference`` is the reference that it would have been.

        Args:
            model: Pyro model without discrete latents.
            data: its keyword arguments, checked as :func:`~vi_toolkit.fit` checks them; floating
                tensors are converted to float64.
            chains: number of chains, run one after the other; at least 2.
            num_draws: number of draws per chain.
            warmup: number of warm-up transitions per chain, which are discarded.
            seed: seed from which each chain's seed is derived.
            progress: whether to show Pyro's progress bar for each chain.
            full_mass: whether to adapt a dense mass matrix; it pays off if the posterior is
                strongly correlated.
            target_accept: target acceptance probability of NUTS; raise it against divergences.
            compile: whether to compile the log density, as in
                :func:`~vi_toolkit.reference.nuts_draws`.
            command: command that makes this reference again; a call of this function if None.

        Raises:
            PreflightError: the data cannot be passed to the model, or the model raises on them.
            CompileError: ``compile=True``, and the log density cannot be compiled.
            InvalidReferenceError: an admission rule fails (``error.reference`` has the refused
                numbers), or NUTS finds no start with a finite density.

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
        draws, made = nuts_draws(
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
        made["command"] = command or (
            f"vi_toolkit.Reference.nuts(model, data, chains={chains}, num_draws={num_draws}, "
            f"warmup={warmup}, seed={seed}, full_mass={full_mass}, target_accept={target_accept})"
        )
        with isolated_pyro_state(rng_state=seeded_state(seed), dtype=torch.float64):
            return cls.from_draws(Joint(model, in_double(data)), draws, made)

    def save(self, path: str | Path) -> None:
        """Write the reference as JSON: sorted keys, one line per row, floats without rounding."""
        storage.write(path, {field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def load(cls, path: str | Path) -> Reference:
        """Read what :meth:`save` wrote; every number comes back bit for bit.

        Raises:
            LoadError: the file is truncated, not JSON, not a reference, or inconsistent.
        """
        content = storage.read(path)
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
