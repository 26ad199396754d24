"""A model's log joint density as a function of one unconstrained vector."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer.autoguide.utils import helpful_support_errors
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch.distributions import biject_to, constraints

from vi_toolkit.programs.prototype import trace_that_runs
from vi_toolkit.programs.sites import latent_sites, observed_sites
from vi_toolkit.programs.vectorise import BAD_POINT, Batched


@dataclass(frozen=True)
class Site:
    """One continuous latent of a model.

    Attributes:
        name: the sample site.
        shape: shape of its value, batch and event together.
        transform: bijection from the unconstrained to the model's own scale.
        unconstrained_shape: shape of the unconstrained value.
        slice: where it stands in the flat vector.
        scale_name: how the unconstrained scale is called: "" (same scale), "log", "logit", "u".
    """

    name: str
    shape: torch.Size
    transform: Any
    unconstrained_shape: torch.Size
    slice: slice
    scale_name: str

    def scalar_names(self) -> list[str]:
        """One name per unconstrained scalar: ``w[3]``, ``log(sigma)``, ``u(theta)[0]``."""
        base = f"{self.scale_name}({self.name})" if self.scale_name else self.name
        return [base + index for index in indices(self.unconstrained_shape)]


def indices(shape: torch.Size) -> list[str]:
    """Subscripts of a tensor's entries in C order, e.g. ``["[0,0]", "[0,1]"]``; ``[""]`` for ()."""
    if not shape:
        return [""]
    grid = torch.cartesian_prod(*(torch.arange(n) for n in shape)).reshape(-1, len(shape))
    return ["[" + ",".join(str(int(i)) for i in row) + "]" for row in grid]


class MachineCode(Protocol):
    """Gradients and values of a log density, by machine code.

    Attributes:
        rows: number of points per call.
    """

    rows: int

    def __call__(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients (rows, d) and values (rows,) at points (rows, d)."""

    def many(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients (S, d) and values (S,) at any number of points (S, d)."""


class _Evaluate(Messenger):
    """Give latents their values and add up log p(x, z), without the cost of keeping a trace."""

    def __init__(self, values: Mapping[str, torch.Tensor]):
        super().__init__()
        self.values = values
        self.total: torch.Tensor | float = 0.0

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]
            msg["is_observed"] = True
            msg["done"] = True

    def _pyro_post_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg):
            log_prob = msg["fn"].log_prob(msg["value"])
            self.total = self.total + scale_and_mask(log_prob, msg["scale"], msg["mask"]).sum()


class Joint:
    """log p(x, z(u)) + log |dz/du| of a Pyro model, at an unconstrained vector u.

    Args:
        model: Pyro model without discrete latents.
        data: keyword arguments of the model.

    Attributes:
        sites: name -> :class:`Site`, in the model's order.
        names: the d scalar names on the unconstrained scale.
        dim: d.
        observations: number of observed scalars.
        forward_mode: whether the model's operators have forward derivatives, as far as is known.
        compiled: evaluates gradients by machine code if it is not None; see
            :func:`vi_toolkit.machine_code.compile_joint`.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model(y):
        ...     sigma = pyro.sample("sigma", dist.Exponential(1.0))
        ...     with pyro.plate("observations", len(y)):
        ...         pyro.sample("y", dist.Normal(0.0, sigma), obs=y)
        >>> joint = Joint(model, {"y": torch.ones(3)})
        >>> joint.names
        ['log(sigma)']
    """

    def __init__(self, model: Callable[..., Any], data: Mapping[str, Any]):
        self.model = model
        self.data = dict(data)
        trace = trace_that_runs(model, data)
        self.sites: dict[str, Site] = {}
        position = 0
        for name, site in latent_sites(trace).items():
            with helpful_support_errors(site):
                transform = biject_to(site["fn"].support)
            value = site["value"]
            shape = transform.inv(value).shape
            size = shape.numel()
            self.sites[name] = Site(
                name,
                value.shape,
                transform,
                shape,
                slice(position, position + size),
                _scale_name(site["fn"].support),
            )
            position += size
        self.dim = position
        self.names = [n for site in self.sites.values() for n in site.scalar_names()]
        observed = observed_sites(trace)
        self.observations = sum(site["value"].numel() for site in observed.values())
        self.start = self.flatten({n: trace.nodes[n]["value"][None] for n in self.sites})[0]
        # A draw's work is at least its observations; beyond this many numbers at once a batch
        # leaves the cache and only costs memory.
        self.chunk = max(8, int(1e6 // max(self.observations + self.dim, 1)))
        self.forward_mode = True
        self.compiled: MachineCode | None = None
        nan = torch.full((), float("nan"), dtype=self.start.dtype)
        self.many = Batched(self.log_density, self.chunk, bad_point=lambda: nan)
        self.many_with_gradient = Batched(
            torch.func.grad_and_value(self.log_density),
            self.chunk,
            bad_point=lambda: (torch.full_like(self.start, float("nan")), nan),
        )

    def log_density(self, u: torch.Tensor, data: Mapping[str, Any] | None = None) -> torch.Tensor:
        """Log joint density at one point.

        Args:
            u: shape (d,).
            data: other data of the same shapes; None for its own.

        Returns:
            A scalar, differentiable in u.
        """
        values, log_jacobian = {}, u.new_zeros(())
        for site in self.sites.values():
            part = u[site.slice].reshape(site.unconstrained_shape)
            values[site.name] = value = site.transform(part)
            log_jacobian = log_jacobian + site.transform.log_abs_det_jacobian(part, value).sum()
        with _Evaluate(values) as evaluate:
            self.model(**(self.data if data is None else data))
        return evaluate.total + log_jacobian

    def log_densities(self, u: torch.Tensor) -> torch.Tensor:
        """Log joint density at S points, NaN where the model raises. (S, d) -> (S,)."""
        with torch.no_grad():
            return self.many(u)

    def gradients(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients (S, d) and values (S,) of the log density at S points (S, d)."""
        # A few points would pay for the rows that they leave empty.
        if self.compiled is not None and 2 * len(u) >= self.compiled.rows:
            with contextlib.suppress(*BAD_POINT):  # one bad point fails them all
                return self.compiled.many(u)
        gradient, value = self.many_with_gradient(u)
        return gradient.detach(), value.detach()

    def flatten(self, draws: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Draws on the model's scale, sample dimension first, to unconstrained vectors (S, d)."""
        parts = []
        for name, site in self.sites.items():
            value = draws[name]
            lead = value.shape[: value.dim() - len(site.shape)]
            parts.append(site.transform.inv(value).reshape(*lead, -1))
        return torch.cat(parts, -1)

    def unflatten(self, u: torch.Tensor) -> dict[str, torch.Tensor]:
        """Unconstrained vectors (S, d) to draws on the model's own scale."""
        return {
            name: site.transform(
                u[..., site.slice].reshape((*u.shape[:-1], *site.unconstrained_shape))
            )
            for name, site in self.sites.items()
        }


def _scale_name(support: Any) -> str:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    kind = type(support)
    if support is constraints.real or kind is type(constraints.real):
        return ""
    if kind in (constraints.greater_than, constraints.greater_than_eq):
        return "log" if not torch.as_tensor(support.lower_bound).any() else "log excess"
    if kind in (constraints.interval, constraints.half_open_interval):
        unit = torch.equal(torch.as_tensor(support.lower_bound).float(), torch.tensor(0.0))
        unit = unit and torch.equal(torch.as_tensor(support.upper_bound).float(), torch.tensor(1.0))
        return "logit" if unit else "scaled logit"
    return "u"
