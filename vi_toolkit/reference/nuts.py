"""Draws from a posterior by Pyro's NUTS on a compiled log density.

Most of the time of a leapfrog step in Pyro goes into effect handlers. Here the log density and its
gradient are compiled once (:mod:`vi_toolkit.machine_code`); NUTS itself and its adaptation are
Pyro's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from pyro.infer import MCMC, NUTS
from torch.distributions import biject_to

from vi_toolkit import machine_code
from vi_toolkit.errors import InvalidReferenceError
from vi_toolkit.programs.isolation import isolated_pyro_state, seeded_state
from vi_toolkit.programs.joint import Joint, MachineCode
from vi_toolkit.programs.prototype import ATTEMPTS
from vi_toolkit.reference.data import checked
from vi_toolkit.reference.summary import versions

LONG_RUN = 4_000  # transitions from which compiling saves time


def nuts_draws(
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
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Draws from a posterior by Pyro's NUTS, in float64, and a record of how they were made.

    :meth:`vi_toolkit.Reference.nuts` summarises such draws; call this function if you need the
    draws themselves. They are returned whether or not the chains have converged.

    The chains run one after the other, each from its own seed and its own start, uniform on
    (-2, 2) on the unconstrained scale. The caller's random state and parameter store do not
    change.

    Args:
        model: Pyro model without discrete latents.
        data: its keyword arguments, checked as :func:`~vi_toolkit.fit` checks them; floating
            tensors are converted to float64.
        chains: number of chains.
        num_draws: number of draws per chain; at least 4.
        warmup: number of warm-up transitions per chain, which are discarded.
        seed: seed from which each chain's seed is derived.
        progress: whether to show Pyro's progress bar for each chain.
        full_mass: whether to adapt a dense mass matrix; it pays off if the posterior is strongly
            correlated.
        target_accept: target acceptance probability of NUTS; raise it against divergences.
        compile: whether to compile the log density. ``True`` insists, ``False`` never compiles,
            and ``"auto"`` compiles if there are at least 4,000 transitions in all, and warns and
            continues without if the density cannot be compiled. Compiled and eager chains differ
            because their rounding differs, but have the same distribution.

    Returns:
        The draws, site -> (chains, num_draws, *site shape), on the model's own scale; and the
        record, which is the ``made`` that :meth:`vi_toolkit.Reference.from_draws` takes: method,
        settings, seeds, number of divergent transitions, versions.

    Raises:
        PreflightError: the data cannot be passed to the model, or the model raises on them.
        CompileError: ``compile=True``, and the log density cannot be compiled.
        InvalidReferenceError: ``num_draws`` is below 4, or no start with a finite density was
            found.

    References:
        Hoffman and Gelman, "The No-U-Turn Sampler", 2014.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> y = torch.tensor(1.0)
        >>> draws, made = nuts_draws(model, {"y": y}, 2, 10, 10, progress=False)
        >>> draws["mu"].shape, made["compiled"]
        (torch.Size([2, 10]), False)
    """
    if num_draws < 4:
        raise InvalidReferenceError("the diagnostics of a chain need at least 4 draws")
    data = checked(model, data)
    with isolated_pyro_state(rng_state=seeded_state(seed), dtype=torch.float64):
        joint = Joint(model, data)
        density = None
        if compile is True or (compile == "auto" and chains * (num_draws + warmup) >= LONG_RUN):
            density = machine_code.density(
                joint.log_density, _start(joint)[None], state=model, insist=compile is True
            )
    seeds = [int(s) for s in np.random.SeedSequence(seed).generate_state(chains)]
    collected: list[dict[str, torch.Tensor]] = []
    diverged = 0
    options: dict[str, Any] = {"full_mass": full_mass, "target_accept_prob": target_accept}
    for chain_seed in seeds:
        with isolated_pyro_state(rng_state=seeded_state(chain_seed), dtype=torch.float64):
            if density is None:
                # Pyro would find the plates' nesting by a draw from the prior, which an improper
                # prior does not allow. Only enumeration needs the nesting.
                kernel = NUTS(model, init_strategy=_uniform_start, max_plate_nesting=0, **options)
                arguments, start = data, None
            else:
                kernel = NUTS(potential_fn=_potential(density), **options)
                arguments, start = {}, {"u": _start(joint)}
            sampler = MCMC(
                kernel, num_draws, warmup, initial_params=start, disable_progbar=not progress
            )
            sampler.run(**arguments)
            found = sampler.get_samples()
            collected.append(found if density is None else joint.unflatten(found["u"]))
            diverged += len(sampler.diagnostics()["divergences"]["chain 0"])
    made = {
        "method": "NUTS, Pyro's",
        "chains": chains,
        "num_draws": num_draws,
        "warmup": warmup,
        "seed": seed,
        "chain_seeds": seeds,
        "full_mass": full_mass,
        "target_accept": target_accept,
        "compiled": density is not None,
        "divergences": diverged,
        "versions": versions("pyro-ppl", "torch", "arviz", "numpy"),
    }
    return {s: torch.stack([c[s] for c in collected]) for s in joint.sites}, made


def _potential(density: MachineCode) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    def potential(at: dict[str, torch.Tensor]) -> torch.Tensor:
        return _MinusDensity.apply(at["u"], density)

    return potential


class _MinusDensity(torch.autograd.Function):
    """Minus a log density, for a density that returns its gradient together with its value."""

    @staticmethod
    def forward(ctx: Any, u: torch.Tensor, density: MachineCode) -> torch.Tensor:
        gradient, value = density(u[None])
        ctx.save_for_backward(gradient[0])
        return -value[0]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return -grad * ctx.saved_tensors[0], None


def _start(joint: Joint) -> torch.Tensor:
    """A point uniform on (-2, 2) in every coordinate, as in Stan, with a finite density."""
    for _ in range(ATTEMPTS):
        u = 4 * torch.rand(joint.dim) - 2
        gradient, value = joint.gradients(u[None])
        if math.isfinite(value[0]) and bool(torch.isfinite(gradient).all()):
            return u
    raise InvalidReferenceError(
        f"none of {ATTEMPTS} starts, uniform on (-2, 2) on the unconstrained scale, has a finite "
        "density: rescale the data, or change the model so that such values are possible"
    )


def _uniform_start(site: dict[str, Any]) -> torch.Tensor:
    """A start as in :func:`_start`, as an initialiser of Pyro's NUTS.

    Pyro's ``init_to_uniform`` draws from the prior first, which an improper prior does not allow.
    """
    transform = biject_to(site["fn"].support)
    return transform(4 * torch.rand(transform.inverse_shape(site["fn"].shape())) - 2)
