"""Posteriors of up to three scalars by the trapezoidal rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import scipy.optimize
import scipy.special
import torch
from torch.distributions.transforms import IndependentTransform

from vi_toolkit.deterministic.modes import find_modes
from vi_toolkit.errors import InvalidReferenceError
from vi_toolkit.programs.isolation import isolated_pyro_state, seeded_state
from vi_toolkit.programs.joint import Joint, indices
from vi_toolkit.reference.data import in_double
from vi_toolkit.reference.summary import LEVELS, SITE_LEVELS, site_rows

# The finest grid that is tried.
MOST_PER_AXIS, MOST_POINTS = 2**15, 4_000_000
NEGLIGIBLE = 37  # nats below the highest density; e^-37 is less than double precision resolves


def integrate(
    model: Callable[..., Any], data: Mapping[str, Any], tolerance: float
) -> dict[str, Any]:
    """Moments, quantiles and evidence of a posterior, on a grid refined until none of them moves.

    See :meth:`vi_toolkit.Reference.quadrature` for the arguments and the method.

    Returns:
        The fields of a :class:`~vi_toolkit.Reference` from ``names`` to ``log_evidence``, and
        ``made`` with the number of points and the change on the last halving of the grid.

    Raises:
        InvalidReferenceError: the model has no or more than three latent scalars, its density is
            nowhere finite, or no grid reaches the tolerance.
    """
    with isolated_pyro_state(rng_state=seeded_state(0), dtype=torch.float64):
        joint = Joint(model, in_double(data))
        if not 1 <= joint.dim <= 3:
            raise InvalidReferenceError(
                f"quadrature needs one to three latent scalars; this model has {joint.dim}. "
                "Use Reference.nuts."
            )
        return {"names": list(joint.names), **_refine(joint, *_box(joint), tolerance)}


def _box(joint: Joint) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A box that holds the posterior, and the finest structure in it: low, high, finest, (d,)."""
    modes = find_modes(joint)
    if not modes:
        raise InvalidReferenceError("the model's log density is not finite at any start")
    highest = modes[0].log_density
    modes = [m for m in modes if highest - m.log_density < NEGLIGIBLE]
    centres = np.stack([m.location.numpy() for m in modes])
    # The conditional sds at the modes are the finest structure that a grid must resolve.
    precisions = np.stack([m.precision.diagonal().abs().clamp_min(1e-300).numpy() for m in modes])
    scales = precisions**-0.5
    low, high = (centres - 8 * scales).min(0), (centres + 8 * scales).max(0)
    for _ in range(100):  # grow until the density on every face is negligible
        coarse = _evaluate(joint, [np.linspace(a, b, 33) for a, b in zip(low, high, strict=True)])
        width, grown = high - low, False
        for i in range(joint.dim):
            for edge, end, sign in ((0, low, -1), (-1, high, 1)):
                if np.take(coarse, edge, axis=i).max() > highest - NEGLIGIBLE:
                    end[i] += sign * 0.25 * width[i]
                    grown = True
        if not grown:
            return low, high, scales.min(0)
    raise InvalidReferenceError(
        "the tails of the posterior are too heavy for a grid; use Reference.nuts"
    )


def _refine(
    joint: Joint, low: np.ndarray, high: np.ndarray, finest: np.ndarray, tolerance: float
) -> dict[str, Any]:
    """The results on a grid whose spacing is halved until they move by less than the tolerance."""
    previous: tuple[dict[str, Any], list[np.ndarray], np.ndarray] | None = None
    count = 64
    while count <= MOST_PER_AXIS and (count + 1) ** joint.dim <= MOST_POINTS:
        axes = [np.linspace(a, b, count + 1) for a, b in zip(low, high, strict=True)]
        log_density = _evaluate(joint, axes)
        spacing = np.array([axis[1] - axis[0] for axis in axes])
        log_sum = float(scipy.special.logsumexp(log_density))
        weights = np.exp(log_density - log_sum)
        points = _points(axes)
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
                    "sites": _own_scale(joint, points, weights.ravel(), quantiles),
                    "made": {
                        "points": len(points),
                        "change_on_last_halving": float(f"{change:.2g}"),
                    },
                }
        previous = now, axes, weights
        count *= 2
    raise InvalidReferenceError(
        f"no grid of {count // 2} points per axis reaches a tolerance of {tolerance:g} for this "
        "posterior; raise the tolerance or use Reference.nuts"
    )


def _points(axes: list[np.ndarray]) -> np.ndarray:
    """The grid's points in C order, (points, d)."""
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))


def _evaluate(joint: Joint, axes: list[np.ndarray]) -> np.ndarray:
    """Log density on the grid, one dimension per axis; -inf where it is not finite."""
    values = joint.log_densities(torch.from_numpy(_points(axes))).numpy()
    values = np.where(np.isfinite(values), values, -np.inf)
    return values.reshape([len(axis) for axis in axes])


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


def _weighted_quantiles(points: np.ndarray, weights: np.ndarray, p: list[float]) -> np.ndarray:
    """Smallest value in each column of points (n, k) with at least mass p below or at it."""
    out = []
    for column in points.T:
        order = np.argsort(column)
        mass = np.cumsum(weights[order])
        at = np.searchsorted(mass, np.array(p) * mass[-1])
        out.append(column[order[np.minimum(at, len(column) - 1)]])
    return np.stack(out, -1)


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


def _own_scale(
    joint: Joint, points: np.ndarray, weights: np.ndarray, quantiles: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Rows of ``Reference.sites``: the same sums on the model's own scale."""
    rows = []
    with torch.no_grad():
        own = joint.unflatten(torch.from_numpy(points))
        own_quantiles = joint.unflatten(
            torch.from_numpy(np.stack([quantiles[k] for k in SITE_LEVELS]))
        )
    for site in joint.sites.values():
        value = own[site.name].reshape(len(points), -1).numpy()
        mean = weights @ value
        sd = np.sqrt(weights @ (value - mean) ** 2)
        if _elementwise(site.transform):
            # A monotone transform maps quantiles to quantiles; a falling one reverses their order.
            q = np.sort(own_quantiles[site.name].reshape(3, -1).numpy(), axis=0)
        else:
            q = _weighted_quantiles(value, weights, [LEVELS[k] for k in SITE_LEVELS])
        names = [site.name + index for index in indices(site.shape)]
        rows += site_rows(names, mean, sd, q, np.zeros(len(names)))
    return rows


def _elementwise(transform: Any) -> bool:
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    return transform.domain.event_dim == 0 and transform.codomain.event_dim == 0
