"""A model, its guide and its data in a parameter store of their own."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.infer.autoguide import AutoGuide
from pyro.params.param_store import ParamStoreDict

from vi_toolkit import torch_private
from vi_toolkit.programs.isolation import isolated_pyro_state, seeded_state
from vi_toolkit.programs.joint import Joint
from vi_toolkit.programs.minibatches import FAILURES, PlatePlan, plan_of_large_plate
from vi_toolkit.programs.private_guide import private_guide
from vi_toolkit.programs.sites import is_drawn, is_partial_plate, latent_sites
from vi_toolkit.programs.vectorise import Batched

Draws = dict[str, torch.Tensor]
MOST_NUMBERS = 1e7  # held at once when many draws run together


class Workspace:
    """Everything that running one model and its guide needs, apart from how it is fitted.

    The checks of :func:`~vi_toolkit.preflight.preflight` create it, ``fit`` optimises the guide in
    it, and the fit keeps it to sample, predict and diagnose.

    Args:
        model: called as ``model(**data)``.
        guide: as it was given to ``fit``; the workspace makes its own copy.
        data: keyword arguments of model and guide.
        seed: for the first values of the parameters.
        subsample: plate name -> minibatch size.

    Attributes:
        guide: the workspace's own copy.
        data: the arguments, floating tensors at the working precision ``dtype``.
        given_data, given_dtype: the same as the caller gave them.
        store: Pyro's parameters while :meth:`isolated` is active.
        values: parameter name -> unconstrained value.
        initial: the same before any step.
        large_plate: how a large subsampled plate is cut; None if the traces hold all rows.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Any,
        data: Mapping[str, Any],
        seed: int = 0,
        subsample: Mapping[str, int] | None = None,
    ):
        self.model, self.given_guide, self.given_data = model, guide, dict(data)
        self.given_dtype = float_dtype(data)
        self.seed = seed
        self.subsample = dict(subsample) if subsample else None
        self.reset(self.given_dtype)

    def reset(self, dtype: torch.dtype) -> None:
        """A fresh guide and parameter store at this precision; neither has run yet."""
        self.dtype = dtype
        self.data = cast(self.given_data, dtype)
        self.large_plate: PlatePlan | None = None
        self._joint: Joint | None = None
        self._renew_guide()

    def _renew_guide(self) -> None:
        self.guide = private_guide(self.model, self.given_guide)
        if isinstance(self.guide, torch.nn.Module):
            self.guide.to(self.dtype)
        self.store = ParamStoreDict()
        self.values: dict[str, torch.Tensor] = {}
        self._own: set[int] = set()
        self._traces: tuple[Any, Any] | None = None
        self._whole_traces: tuple[Any, Any] | None = None
        self._points: list[str] | None = None

    # ---------------------------------------------------------------- first run

    def set_up(self) -> None:
        """Run guide and model once, so that every parameter exists.

        A large plate that is subsampled is run on one minibatch, unless the guide holds parameters
        for each of its rows.
        """
        with self.isolated(seeded_state(self.seed)):
            self.large_plate = plan_of_large_plate(self.model, self.data, self.subsample)
        try:
            traces = self.trace(self.large_plate)
            if self.large_plate and isinstance(self.guide, AutoGuide):
                for site in latent_sites(traces[1]).values():
                    if any(f.name == self.large_plate.name for f in site["cond_indep_stack"]):
                        raise ValueError("an autoguide's own rows start at values of all the data")
        except FAILURES:
            if self.large_plate is None:
                raise
            self.large_plate = None
            self._renew_guide()
            traces = self.trace()
        self.keep_traces(*traces)

    def keep_traces(self, guide_trace: Any, model_trace: Any) -> None:
        """Take the traces of the first run, and the parameters that it registered."""
        self._traces = guide_trace, model_trace
        own = self.guide.parameters() if isinstance(self.guide, torch.nn.Module) else ()
        self._own = {id(p) for p in own}
        self.values = {n: p.detach().clone() for n, p in self.store.named_parameters()}
        self.initial = dict(self.values)

    def unused(self, seed: int | None = None) -> Workspace:
        """The same model, guide and data in a workspace in which nothing has run yet."""
        seed = self.seed if seed is None else seed
        other = Workspace(self.model, self.given_guide, self.given_data, seed, self.subsample)
        if other.dtype != self.dtype:
            other.reset(self.dtype)
        return other

    # ---------------------------------------------------------------- running

    @contextlib.contextmanager
    def isolated(
        self, rng_state: torch.Tensor | None = None, validate: bool = False
    ) -> Iterator[None]:
        """The workspace's own parameter store, dtype and random state while the block runs.

        Parameters that belong to the caller (a network that the guide closes over, a tensor given
        to ``pyro.param``) hold the workspace's values inside the block only.

        Args:
            rng_state: state of torch's generators to start from; the caller's if None.
            validate: whether Pyro checks the arguments and samples of distributions.
        """
        with isolated_pyro_state(self.store, rng_state, self.dtype, validate):
            leaves = {n: p for n, p in self.store.named_parameters() if id(p) not in self._own}
            theirs = {n: p.detach().clone() for n, p in leaves.items()}
            with torch.no_grad():
                for name, leaf in leaves.items():
                    if name in self.values:
                        leaf.copy_(self.values[name])
            try:
                yield
            finally:
                with torch.no_grad():
                    for name, leaf in leaves.items():
                        leaf.copy_(theirs[name])

    @contextlib.contextmanager
    def in_store(self) -> Iterator[None]:
        """:meth:`isolated` for parameters that are all the workspace's own, with live values."""
        with isolated_pyro_state(self.store, None, self.dtype):
            yield

    def snapshot_params(self) -> None:
        """Take the store's present values as the workspace's own; inside :meth:`isolated`."""
        self.values = {n: p.detach().clone() for n, p in pyro.get_param_store().named_parameters()}

    def load_params(self, values: Mapping[str, torch.Tensor]) -> None:
        """Set every parameter to these unconstrained values."""
        self.values = dict(values)
        with self.isolated(), torch.no_grad():
            for name, leaf in self.store.named_parameters():
                leaf.copy_(values[name])

    def trace(self, plan: PlatePlan | None = None) -> tuple[Any, Any]:
        """Traces of guide and model, on the first minibatch of a plan or on all the data."""
        data: Mapping[str, Any] = self.data
        handler: contextlib.AbstractContextManager = contextlib.nullcontext()
        if plan is not None:
            data, handler = plan.apply(self.data, torch.arange(plan.batch))
        with self.isolated(seeded_state(self.seed)), torch.no_grad(), handler:
            trace: Any = poutine.trace(self.guide).get_trace(**data)
            replayed = poutine.replay(self.model, trace=trace)
            return trace, poutine.trace(replayed).get_trace(**data)

    @property
    def joint(self) -> Joint:
        """The model's log joint density on the unconstrained scale; built when first asked for."""
        if self._joint is None:
            with self.isolated(seeded_state(self.seed)):
                self._joint = Joint(self.model, self.data)
        return self._joint

    # ---------------------------------------------------------------- what is known of the sites

    @property
    def first_traces(self) -> tuple[Any, Any]:
        """(guide, model) of the first run: of one minibatch where a large plate is subsampled."""
        if self._traces is None:
            self.set_up()
        assert self._traces is not None
        return self._traces

    def _on_all_rows(self) -> tuple[Any, Any]:
        if self.large_plate is None:
            return self.first_traces
        if self._whole_traces is None:
            self._whole_traces = self.trace()
        return self._whole_traces

    @property
    def guide_trace(self) -> Any:
        """Trace of the guide on all the data."""
        return self._on_all_rows()[0]

    @property
    def model_trace(self) -> Any:
        """Trace of the model on all the data, at the guide's draw."""
        return self._on_all_rows()[1]

    def shape(self, site: Any) -> tuple[int, ...]:
        """Shape of a site's value on all the data, from its message in ``first_traces``."""
        shape = list(site["value"].shape)
        plate = self.large_plate
        for frame in site["cond_indep_stack"]:
            if plate and frame.name == plate.name and frame.dim is not None:
                dim = frame.dim - site["fn"].event_dim
                if len(shape) >= -dim and shape[dim] == plate.batch:
                    shape[dim] = plate.size
        return tuple(shape)

    @property
    def latents(self) -> list[str]:
        """Latents that the guide draws: all but those that the estimator sums out."""
        guide, model = self.first_traces
        return [n for n in latent_sites(model) if n in guide.nodes]

    @property
    def draws_nothing(self) -> bool:
        """Whether every site of the guide is a point mass, so that it draws no random number."""
        return not any(is_drawn(site) for site in self.first_traces[0].nodes.values())

    @property
    def points(self) -> list[str]:
        """Latents that the guide holds at a point: every run gives them the same value."""
        if self._points is None:
            # A Delta may hold a random value, as in Pyro's autoguides, so only runs can tell.
            values = []
            for seed in range(2):
                with self.isolated(seeded_state(seed)), torch.no_grad():
                    trace = poutine.trace(self.guide).get_trace(**self.data)
                values.append({name: trace.nodes[name]["value"] for name in self.latents})
            first, second = values
            self._points = [n for n in first if torch.equal(first[n], second[n])]
        return self._points

    @property
    def summed_out(self) -> list[str]:
        """Latents without draws, because the estimator sums over them (enumeration)."""
        guide, model = self.first_traces
        return [n for n in latent_sites(model) if n not in guide.nodes]

    def require_guide_density(self, what: str) -> None:
        """Raise ValueError if the guide does not draw every latent."""
        if self.summed_out:
            raise ValueError(
                f"{what} needs a density of {self.summed_out[0]!r}, which was summed out and "
                "which the guide does not draw. Give the guide a site for it, or write the sum "
                "into the model's likelihood."
            )

    def require_whole_plates(self) -> None:
        """Raise ValueError if the model itself subsamples a plate: each run holds other rows."""
        for name, site in self.first_traces[1].nodes.items():
            if self.large_plate is not None and name == self.large_plate.name:
                continue
            if is_partial_plate(site):
                raise ValueError(
                    f"The plate {name!r} holds {len(site['value'])} of its {site['fn'].size} rows, "
                    "others on every run, because the model gives it a subsample_size. Leave that "
                    f"out and fit with subsample={{{name!r}: {len(site['value'])}}}: the fit then "
                    "knows the rows, and uses all of them afterwards."
                )

    # ---------------------------------------------------------------- many draws

    @property
    def chunk(self) -> int:
        """Draws that run at once, so that their sites' values stay within MOST_NUMBERS."""
        size = sum(
            math.prod(self.shape(s))
            for trace in self.first_traces
            for s in trace.nodes.values()
            if s["type"] == "sample" and torch.is_tensor(s["value"])
        )
        return max(1, int(MOST_NUMBERS // max(size, 1)))

    def many(self, one: Callable[..., Any], *draws: torch.Tensor, random: bool, seed: int) -> Any:
        """``one`` at every draw, without gradients, from the random state that ``seed`` names.

        Args:
            one: function of one draw's tensors, returning a pytree of tensors.
            draws: tensors with the draws in front.
            random: whether ``one`` draws random numbers.
        """
        with self.isolated(seeded_state(seed)), torch.no_grad():
            out = Batched(one, self.chunk, random)(*draws)
            # A site's value may be a parameter itself, which changes when the block ends.
            return torch_private.tree_map(lambda t: t.detach().clone(), out)

    def over_draws(
        self, one: Callable[[Draws], Draws], draws: Draws, *, random: bool, seed: int
    ) -> Draws:
        """``one`` at every posterior draw; results in the caller's precision."""
        names = [n for n in draws if n in latent_sites(self.first_traces[1])]
        own = cast(draws, self.dtype)
        out = self.many(
            lambda *values: one(dict(zip(names, values, strict=True))),
            *(own[name] for name in names),
            random=random,
            seed=seed,
        )
        return {k: self.to_user_dtype(v) for k, v in out.items()}

    def to_user_dtype(self, value: torch.Tensor) -> torch.Tensor:
        """Results come in the caller's precision, whatever was used inside."""
        return value.to(self.given_dtype) if value.is_floating_point() else value


def float_dtype(data: Any) -> torch.dtype:
    """Of the first floating tensor among the data; torch's default if there is none."""
    if isinstance(data, Mapping):
        for value in data.values():
            if torch.is_tensor(value) and value.is_floating_point():
                return value.dtype
    return torch.get_default_dtype()


def cast(data: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The data with every floating tensor at this precision."""
    return {
        k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in data.items()
    }
