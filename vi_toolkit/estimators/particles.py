"""The base class of the Monte Carlo estimators: draws from the guide, and the ELBO's terms at them.

The ELBO is a sum of terms: log p of the model's sites and -log q of the guide's. All estimators
compute this number in the same way, and differ only in its gradient. ``differentiable_loss``
returns the number with the estimator's gradient attached, as tensor code that a tracer can follow;
``loss_and_grads`` calls it.

Particles are vectorised with ``torch.func.vmap``, so a model written for one draw
(``X @ coefficients``) needs no change. If ``vmap`` fails, because the model's structure depends on
values, the particles run one after the other.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from pyro.util import check_model_guide_match, warn_if_nan
from torch.distributions import Independent

from vi_toolkit import torch_private
from vi_toolkit.errors import PreflightError
from vi_toolkit.programs.isolation import kept_random_state
from vi_toolkit.programs.noise import FunctionalNoise
from vi_toolkit.programs.sites import Site, is_drawn, is_term, plate_dims
from vi_toolkit.programs.vectorise import Batched

Tensors = dict[str, Any]


class Given(Messenger):
    """Gives some sample sites their values, and leaves the others to be drawn."""

    def __init__(self, values: Mapping[str, torch.Tensor]):
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Site) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"], msg["done"] = self.values[msg["name"]], True


class SameMinibatch(Messenger):
    """Gives all particles of a step one minibatch, where Pyro would draw one for each."""

    def __init__(self, distributions: Mapping[str, Any]):
        super().__init__()
        self.distributions = distributions
        self.drawn = {name: fn.sample() for name, fn in distributions.items()}

    def _pyro_sample(self, msg: Site) -> None:
        fn = self.distributions.get(msg["name"])
        if fn is None or msg["value"] is not None or not site_is_subsample(msg):
            return
        if (fn.size, fn.subsample_size) == (msg["fn"].size, msg["fn"].subsample_size):
            msg["value"] = self.drawn[msg["name"]]


class Detach(Messenger):
    """Detaches the values drawn at some sites from the guide's parameters.

    Args:
        names: the sites; None for all.
    """

    def __init__(self, names: set[str] | None):
        super().__init__()
        self.names = names

    def _pyro_post_sample(self, msg: Site) -> None:
        if is_drawn(msg) and (self.names is None or msg["name"] in self.names):
            msg["value"] = msg["value"].detach()


# ------------------------------------------------------------------ one draw


def trace_model_and_guide(
    model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any, *handlers: Any
) -> tuple[Any, Any]:
    """Trace the guide under ``handlers``, and the model at the guide's values.

    Returns:
        The model's trace, then the guide's.
    """
    with contextlib.ExitStack() as stack:
        for handler in handlers:
            stack.enter_context(handler)
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    if is_validation_enabled():
        check_model_guide_match(model_trace, guide_trace)
    return model_trace, guide_trace


def pointwise(site: Site) -> tuple[torch.Tensor, int]:
    """Log density of each independent coordinate, and the number of their dimensions.

    Returns:
        The log density, neither scaled nor masked, of shape (*batch shape, *independent
        dimensions); and how many independent dimensions there are.
    """
    fn, dims = site["fn"], 0
    while isinstance(fn, Independent):
        dims += fn.reinterpreted_batch_ndims
        fn = fn.base_dist
    return fn.log_prob(site["value"]), dims


@dataclass
class Term:
    """One term of the ELBO: log p or -log q of one site.

    Attributes:
        owner: "model" or "guide".
        name: of the site.
        plates: name -> dimension of the plates around it.
    """

    owner: str
    name: str
    plates: dict[str, int]


# ------------------------------------------------------------------ the estimators' base


class ParticleELBO(ELBO):
    """Base class of the estimators, with vectorised particles and a gradient apart from the value.

    A subclass defines :meth:`one`, which computes the tensors of one particle, and
    :meth:`surrogate`, which makes of them, with a particle dimension in front, the number to
    differentiate.
    """

    def __init__(self, particles: int = 1):
        if not isinstance(particles, int) or isinstance(particles, bool) or particles < 1:
            raise ValueError(f"particles must be a positive whole number, not {particles!r}")
        super().__init__(num_particles=particles)
        self._batched = Batched(lambda _: {}, random=True)
        self._prepared_for: tuple[Any, Any] | None = None
        self._subsamples: dict[str, Any] = {}
        self._minibatch = SameMinibatch({})

    # -- what subclasses define

    def one(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Tensors, dict[str, Any]]:
        """Tensors of one particle, and other facts about the run that :meth:`surrogate` needs."""
        raise NotImplementedError

    def surrogate(
        self, elbo: torch.Tensor, tensors: Tensors, about: dict[str, Any], data: Mapping[str, Any]
    ) -> torch.Tensor:
        """The number to differentiate in place of the ELBO: shape (S,), or () if summed."""
        raise NotImplementedError

    def prepare(self, model: Any, guide: Any, args: Any, kwargs: Any) -> None:
        """Run model and guide once without gradients, before they are first used."""
        with kept_random_state(), torch.no_grad():
            # This also registers every parameter outside vmap.
            model_trace, guide_trace = trace_model_and_guide(model, guide, args, kwargs)
        self._subsamples = {
            name: site["fn"]
            for name, site in (*guide_trace.nodes.items(), *model_trace.nodes.items())
            if site["type"] == "sample"
            and site_is_subsample(site)
            and site["fn"].subsample_size not in (None, -1, site["fn"].size)
        }

    # -- state: everything that an estimator learns from step to step

    def state(self) -> dict[str, torch.Tensor]:
        """The estimator's own tensors, which it updates in place at each step."""
        return {}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Use these tensors as the state; they are not copied."""
        if state:
            raise ValueError(f"{self!r} keeps no state, but was given {sorted(state)}")

    def fresh(self) -> ParticleELBO:
        """The same estimator, before it has learnt anything or seen a model."""
        return type(self)(**self.options())

    def options(self) -> dict[str, Any]:
        """The arguments that the estimator was made with."""
        return {"particles": self.num_particles}

    def __repr__(self) -> str:
        default = inspect.signature(type(self).__init__).parameters
        given = [
            f"{name}={value!r}"
            for name, value in self.options().items()
            if name == "particles" or value != default[name].default
        ]
        return f"{type(self).__name__}({', '.join(given)})"

    # -- what users and optimisers call

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """Minus an ELBO estimate, shape (), with the gradient of this estimator.

        This updates the estimator's state, if it has one.
        """
        tensors, about = self._draw(model, guide, args, kwargs)
        elbo = total(tensors, about["terms"])
        surrogate = self.surrogate(elbo, tensors, about, kwargs)
        loss = -elbo.sum() / self.num_particles
        if surrogate is elbo:
            return loss
        surrogate = surrogate.sum() / self.num_particles
        return loss.detach() + (surrogate.detach() - surrogate)

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Minus an ELBO estimate; adds its gradient to the parameters' ``.grad``."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        warn_if_nan(loss, "loss")
        return loss.item()

    @torch.no_grad()
    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Minus an ELBO estimate, without a gradient. The estimator's state does not change."""
        tensors, about = self._draw(model, guide, args, kwargs)
        return -(total(tensors, about["terms"]).sum() / self.num_particles).item()

    # -- machinery

    def _draw(
        self, model: Any, guide: Any, args: Any, kwargs: Any
    ) -> tuple[Tensors, dict[str, Any]]:
        if self._prepared_for is None or self._prepared_for != (model, guide):
            self.prepare(model, guide, args, kwargs)
            self._prepared_for = (model, guide)
        about: dict[str, Any] = {}
        self._minibatch = SameMinibatch(self._subsamples)
        if self.num_particles == 1:
            tensors, about = self.one(model, guide, args, kwargs)
            return torch_private.tree_map(lambda t: t.unsqueeze(0), tensors), about

        def one(_: torch.Tensor) -> Tensors:
            nonlocal about
            with FunctionalNoise():
                tensors, about = self.one(model, guide, args, kwargs)
            return tensors

        self._batched.f = one
        try:
            return self._batched(torch.zeros(self.num_particles)), about
        finally:
            self._batched.f = lambda _: {}  # keeps no hold on the data

    def _run(self, model: Any, guide: Any, args: Any, kwargs: Any, *handlers: Any) -> Any:
        with self._minibatch:
            return trace_model_and_guide(model, guide, args, kwargs, *handlers)

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        return trace_model_and_guide(model, guide, args, kwargs)  # abstract in Pyro's class


def terms_of(model_trace: Any, guide_trace: Any) -> tuple[Tensors, list[Term]]:
    """The scaled and masked log density of every site, and a description of each term.

    Raises:
        PreflightError: a ``pyro.factor`` of the guide does not have ``has_rsample=True``.
    """
    tensors, terms = {}, []
    for owner, trace in (("model", model_trace), ("guide", guide_trace)):
        for name, site in trace.nodes.items():
            if not is_term(site):
                continue
            if owner == "guide" and site["is_observed"] and not site["fn"].has_rsample:
                raise PreflightError(
                    f"The guide's factor {name!r} is not has_rsample=True: it may be part of a "
                    "density whose score is unknown.",
                    site=name,
                    remedy="Set has_rsample=True if it comes from a reparameterised draw. If not, "
                    "write the density as a distribution with log_prob.",
                )
            tensors[f"{owner}/{name}"] = log_density(site)
            terms.append(Term(owner, name, plate_dims(site)))
    return tensors, terms


def log_density(site: Site) -> torch.Tensor:
    """Scaled and masked log density of a site, shape (*batch shape)."""
    if "log_prob" in site:
        return site["log_prob"]
    if site["mask"] is False:
        return torch.zeros(site["fn"].batch_shape)
    log_prob = site["fn"].log_prob(site["value"])
    return torch.as_tensor(scale_and_mask(log_prob, site["scale"], site["mask"]))


def total(tensors: Tensors, terms: list[Term]) -> torch.Tensor:
    """Sum of the terms per particle, shape (S,)."""
    parts = []
    for term in terms:
        log_prob = tensors["terms"][f"{term.owner}/{term.name}"]
        log_prob = log_prob.reshape(len(log_prob), -1).sum(1) if log_prob.dim() > 1 else log_prob
        parts.append(log_prob if term.owner == "model" else -log_prob)
    return sum(parts[1:], parts[0])
