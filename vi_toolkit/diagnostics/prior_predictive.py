"""Data sets that a model simulates from its own prior."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyro.poutine as poutine
import torch

from vi_toolkit.errors import PreflightError
from vi_toolkit.programs.isolation import isolated_pyro_state, seeded_state
from vi_toolkit.programs.sites import is_factor, latent_sites, observed_sites

Replication = tuple[Mapping[str, Any], Mapping[str, torch.Tensor]]  # data and latents


class PriorPredictive:
    """Data sets that a model simulates: latents from the prior, and data from the model at them.

    An instance is a function of a number that returns (data, latents), one simulated data set.

    Args:
        model: called as ``model(**data)``.
        data: the model's arguments; those that hold observations are replaced by simulated ones.
        seed: of the draws.

    Raises:
        PreflightError: the model has an improper prior, a ``pyro.factor`` or no observed site, or
            its observations are not an argument, or are used elsewhere in the model too.

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
        own = "Or pass simulate=, a function of a number that returns (data, latents)."
        with self._isolated(0), torch.no_grad():
            try:
                drawn: Any = poutine.trace(model).get_trace(**self.data)
            except NotImplementedError as error:
                raise PreflightError(
                    f"The model cannot be drawn from its prior: {error or 'a prior is improper'}.",
                    remedy="Give every latent a proper prior. " + own,
                ) from error
            factors = [name for name, site in drawn.nodes.items() if is_factor(site)]
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
                # Several arguments may hold the same numbers; only one is the same tensor.
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

    def _check_that_nothing_else_uses_them(self, drawn: Any, own: str) -> None:
        """Raise if the data's distribution depends on the data, as in an autoregression.

        New data would then be simulated from the observed past.
        """
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
                    remedy="The model cannot simulate such data by itself. " + own,
                )

    def __call__(self, number: int) -> Replication:
        with self._isolated(number + 1), torch.no_grad():
            trace: Any = poutine.trace(poutine.uncondition(self.model)).get_trace(**self.data)
        data = dict(self.data)
        for name, entry in self.entry_of.items():
            value = trace.nodes[name]["value"]
            if not torch.isfinite(value).all():
                raise PreflightError(
                    f"Data drawn from the model are not finite at {name!r} (replication {number}).",
                    site=name,
                    remedy="Use tighter priors, whose draws the likelihood can hold.",
                )
            data[entry] = value.to(self.data[entry].dtype)
        names = [n for n in latent_sites(trace) if n not in self.entry_of]
        return data, {n: trace.nodes[n]["value"] for n in names}


def _holds(entry: Any, value: torch.Tensor) -> bool:
    """Whether an argument has the same numbers as an observed site."""
    return (
        torch.is_tensor(entry)
        and entry.shape == value.shape
        and torch.equal(torch.nan_to_num(entry.to(value.dtype)), torch.nan_to_num(value))
    )
