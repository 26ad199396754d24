"""Modes of a log joint density, from many starts: where deterministic VI begins.

The starts are prior draws and random points in boxes of several widths; each is taken uphill by
a trust-region Newton method in coordinates scaled by the curvature's own diagonal, so that a
predictor measured in dollars and one measured in inches do no harm. All starts go up together,
one batched Hessian per iteration. Beyond a few hundred latents the Hessian is never formed:
SciPy's trust-region method works with Hessian-vector products.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.optimize
import torch
from pyro.infer.autoguide.initialization import init_to_sample

from vi_toolkit.programs.joint import Joint
from vi_toolkit.programs.prototype import prototype, start_value
from vi_toolkit.programs.vectorise import BAD_POINT, vmap

DENSE = 300  # latents up to which a dense Hessian is cheaper than products with it


@dataclass
class Mode:
    """A stationary point of the log joint density, or as near to one as a start came.

    Attributes:
        location: (d,).
        log_density: the log joint density there.
        precision: (d, d) minus the Hessian there, or its diagonal (d,) beyond ``DENSE`` latents.
        converged: whether the gradient vanished there and the curvature is that of a maximum.
    """

    location: torch.Tensor
    log_density: float
    precision: torch.Tensor
    converged: bool


def start_points(joint: Joint, count: int, generator: torch.Generator) -> torch.Tensor:
    """Up to ``count`` points with a finite density, best first within each kind.

    Kinds: the model's own start (prior medians), the origin, prior draws, and points uniform in
    boxes of half-width 1, 3 and 10 on the unconstrained scale.
    """

    def prior_draw(site):
        try:
            return init_to_sample(site)
        except NotImplementedError:
            box = 4 * torch.rand(site["fn"].shape(), generator=generator) - 2
            transform = torch.distributions.biject_to(site["fn"].support)
            flat = transform.inv(start_value(site))
            return transform(flat + box.reshape(-1)[: flat.numel()].reshape(flat.shape))

    prior = []
    for _ in range(4 * count):
        try:
            trace = prototype(joint.model, joint.data, prior_draw)
            draw = {name: trace.nodes[name]["value"][None] for name in joint.sites}
            prior.append(joint.flatten(draw)[0])
        except BAD_POINT:
            continue
    boxes = [
        radius * (2 * torch.rand(4 * count, joint.dim, generator=generator) - 1)
        for radius in (1.0, 3.0, 10.0)
    ]
    fixed = torch.stack([joint.start, torch.zeros_like(joint.start)])
    groups = [fixed, torch.stack(prior) if prior else fixed[:0], *boxes]
    share = max(1, (count - 2) // 5)
    chosen: list[torch.Tensor] = []
    for number, group in enumerate(groups):
        density = joint.log_densities(group)
        good = torch.isfinite(density) & torch.isfinite(group).all(-1)
        group, density = group[good], density[good]
        if number == 0:
            chosen.extend(group)
            continue
        order = density.argsort(descending=True)
        # Half of each kind by density, half as they come: the densest start is not always
        # uphill of the best mode.
        take = 2 * share if number == 1 else share
        best = order[: (take + 1) // 2]
        rest = [i for i in range(len(group)) if i not in best.tolist()][: take - len(best)]
        chosen.extend(group[best])
        chosen.extend(group[rest])
    return torch.stack(chosen[:count]) if chosen else fixed[:0]


def find_modes(
    joint: Joint,
    starts: int = 16,
    seed: int = 0,
    iterations: int = 75,
    report: Callable[[str], None] = lambda message: None,
) -> list[Mode]:
    """Distinct modes reached from many starts, the highest density first.

    Args:
        joint: the log joint density.
        starts: number of starts.
        seed: of the random starts.
        iterations: Newton iterations per start, at most.
        report: called with a line of progress.

    Returns:
        One :class:`Mode` per distinct end point. Empty if no start has a finite density.
    """
    generator = torch.Generator().manual_seed(seed)
    dense = joint.dim <= DENSE
    points = start_points(joint, starts if dense else min(starts, 4), generator)
    if not len(points):
        return []
    if dense:
        ends = _newton(joint, points, iterations, report)
    else:
        ends = [_newton_krylov(joint, u, iterations, report) for u in points]
    ends = [m for m in ends if math.isfinite(m.log_density) and torch.isfinite(m.precision).all()]
    ends.sort(key=lambda m: (-m.converged, -m.log_density))
    distinct: list[Mode] = []
    for mode in ends:
        if not any(_same(mode, other) for other in distinct):
            distinct.append(mode)
    return distinct


def _same(a: Mode, b: Mode) -> bool:
    step = a.location - b.location
    curvature = b.precision.diagonal() if b.precision.dim() == 2 else b.precision
    return float((step.abs() * curvature.abs().sqrt()).max()) < 0.05


def hessians(joint: Joint, u: torch.Tensor) -> torch.Tensor:
    """Hessians (S, d, d) of the log density at S points (S, d), NaN where the model raises.

    Forward over reverse differentiation; central differences of the gradient where an operator
    of the model has no forward derivative (relative error about 1e-9 in float64).
    """
    if joint.many.vectorises is not False and joint.forward_mode:
        chunk = max(1, joint.chunk // joint.dim)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's own: resize notices, deprecations
                every = vmap(torch.func.hessian(joint.log_density), joint.many.writes)
                return torch.cat([every(part).detach() for part in u.split(chunk)])
        except torch.linalg.LinAlgError:
            pass  # one bad point fails the batch; differences treat the points one by one
        except (RuntimeError, NotImplementedError):
            joint.forward_mode = False
    step = 1e-4 * (1 + u.abs()) if u.dtype == torch.float64 else 1e-2 * (1 + u.abs())
    offsets = torch.diag_embed(step)  # (S, d, d)
    points = torch.cat([u[:, None] + offsets, u[:, None] - offsets], 1).reshape(-1, u.shape[-1])
    gradient = joint.gradients(points)[0].reshape(len(u), 2, u.shape[-1], u.shape[-1])
    hessian = (gradient[:, 0] - gradient[:, 1]) / (2 * step[:, :, None])
    return (hessian + hessian.mT) / 2


def _newton(
    joint: Joint, u: torch.Tensor, iterations: int, report: Callable[[str], None]
) -> list[Mode]:
    """Trust-region Newton from all rows of ``u`` at once (minimising minus the log density)."""
    count, d = u.shape
    u = u.clone()
    f = torch.full((count,), math.inf, dtype=u.dtype)
    g, h = torch.zeros_like(u), torch.zeros(count, d, d, dtype=u.dtype)
    lam, q, scale = torch.zeros_like(u), torch.zeros_like(h), torch.ones_like(u)
    radius = torch.zeros(count, dtype=u.dtype)
    fresh = torch.ones(count, dtype=torch.bool)  # moved since its derivatives were computed
    active = torch.ones(count, dtype=torch.bool)
    converged = torch.zeros(count, dtype=torch.bool)
    begun = time.monotonic()
    for iteration in range(iterations):
        rows = (active & fresh).nonzero().flatten()
        if len(rows):
            gradient, value = joint.gradients(u[rows])
            g[rows], f[rows], h[rows] = -gradient, -value, -hessians(joint, u[rows])
            finite = torch.isfinite(g[rows]).all(-1) & torch.isfinite(h[rows]).flatten(1).all(-1)
            active[rows[~finite]] = False
            rows = rows[finite]
            s = h[rows].diagonal(dim1=-2, dim2=-1).abs().clamp_min(1e-8).sqrt()
            scale[rows] = s
            lam[rows], q[rows] = torch.linalg.eigh(h[rows] / s[:, :, None] / s[:, None, :])
            unset = rows[radius[rows] == 0]
            radius[unset] = 10 * (g[unset] / scale[unset]).norm(dim=-1) + 1
            fresh[rows] = False
        rows = active.nonzero().flatten()
        if not len(rows):
            break
        b = (q[rows].mT @ (g[rows] / scale[rows])[:, :, None]).squeeze(-1)
        p = _trust_region_step(b, lam[rows], radius[rows])
        predicted = -(b * p + 0.5 * lam[rows] * p * p).sum(-1)
        trial = u[rows] + (q[rows] @ p[:, :, None]).squeeze(-1) / scale[rows]
        actual = f[rows] + joint.log_densities(trial)
        length = p.norm(dim=-1)
        flat = (predicted < 1e-9) & (actual.abs() < 1e-7)
        accept = torch.isfinite(actual) & ((actual > 1e-4 * predicted) | flat)
        good = accept & (actual > 0.75 * predicted)
        radius[rows] = torch.where(
            accept,
            torch.where(good, torch.maximum(radius[rows], 3 * length), radius[rows]),
            0.25 * torch.minimum(radius[rows], length),
        )
        u[rows[accept]] = trial[accept]
        fresh[rows[accept]] = True
        done = accept & (lam[rows, 0] > 0) & (predicted < 1e-9)
        converged[rows[done]] = True
        active[rows[done]] = False
        active[rows[radius[rows] < 1e-10]] = False
        if time.monotonic() - begun > 2:
            report(f"{int(converged.sum())} of {count} starts converged, iteration {iteration + 1}")
    stale = fresh.nonzero().flatten()
    if len(stale):
        gradient, value = joint.gradients(u[stale])
        f[stale], h[stale] = -value, -hessians(joint, u[stale])
    return [Mode(u[i], -float(f[i]), h[i], bool(converged[i])) for i in range(count)]


def _trust_region_step(b: torch.Tensor, lam: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Minimise b.p + lam p.p / 2 subject to |p| <= radius, row by row (eigenbasis coordinates)."""
    low = (-lam[:, :1]).clamp_min(0) + torch.where(lam[:, :1] <= 1e-9, 1e-9, 0.0)
    p = -b / (lam + low)
    outside = p.norm(dim=-1) > radius
    if outside.any():
        r = radius[outside][:, None]
        lam, b, low = lam[outside], b[outside], low[outside]
        high = low + b.norm(dim=-1, keepdim=True) / r + 1
        while bool(((b / (lam + high)).norm(dim=-1, keepdim=True) > r).any()):
            high = 2 * high
        for _ in range(60):
            middle = 0.5 * (low + high)
            short = (b / (lam + middle)).norm(dim=-1, keepdim=True) <= r
            low, high = torch.where(short, low, middle), torch.where(short, middle, high)
        p[outside] = -b / (lam + high)
    return p


def _newton_krylov(
    joint: Joint, start: torch.Tensor, iterations: int, report: Callable[[str], None]
) -> Mode:
    """One start for many latents: Hessian-vector products, scaled by the Hessian's diagonal."""
    u, converged = start.clone(), False
    diagonal = hessian_diagonal(joint, u)
    # The scaling is that of the start, where curvature can be far from the mode's: so renew it.
    for _ in range(3):
        scale = diagonal.abs().clamp_min(1e-8).sqrt()

        def value_and_gradient(x: np.ndarray, u=u, scale=scale) -> tuple[float, np.ndarray]:
            gradient, value = joint.gradients((u + torch.as_tensor(x) / scale)[None])
            if not (torch.isfinite(value).all() and torch.isfinite(gradient).all()):
                return 1e100, np.zeros_like(x)
            return -float(value), (-gradient[0] / scale).numpy().astype(np.float64)

        def product(x: np.ndarray, v: np.ndarray, u=u, scale=scale) -> np.ndarray:
            point, direction = u + torch.as_tensor(x) / scale, torch.as_tensor(v) / scale
            out = -hessian_product(joint, point, direction) / scale
            return out.numpy().astype(np.float64)

        result = scipy.optimize.minimize(
            value_and_gradient,
            np.zeros(joint.dim),
            jac=True,
            hessp=product,
            method="trust-ncg",
            options={"maxiter": iterations, "gtol": 1e-5, "max_trust_radius": 1e6},
        )
        report(f"mode of {joint.dim} latents: log density {-result.fun:.2f}")
        moved = float(np.abs(result.x).max())
        u = u + torch.as_tensor(result.x) / scale
        diagonal = hessian_diagonal(joint, u)
        converged = bool(result.success)
        if moved < 1e-3:
            break
    return Mode(u, float(joint.log_densities(u[None])[0]), -diagonal, converged)


def hessian_product(joint: Joint, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Product of the log density's Hessian at ``u`` (d,) with ``v`` (d,), reverse over reverse."""
    with torch.enable_grad():
        point = u.detach().requires_grad_()
        gradient = torch.autograd.grad(joint.log_density(point), point, create_graph=True)[0]
        return torch.autograd.grad(gradient @ v, point)[0].detach()


def hessian_diagonal(joint: Joint, u: torch.Tensor, probes: int = 32) -> torch.Tensor:
    """Diagonal of the log density's Hessian at ``u``, by Hutchinson's probes.

    Bekas, Kokiopoulou and Saad, "An estimator for the diagonal of a matrix", 2007. Only a scale
    is wanted, so a few probes do.
    """
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros_like(u)
    for _ in range(probes):
        v = torch.randint(0, 2, u.shape, generator=generator).to(u.dtype) * 2 - 1
        total += v * hessian_product(joint, u, v)
    return total / probes
