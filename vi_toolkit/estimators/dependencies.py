"""Finds which terms of the ELBO involve which latent, for Rao-Blackwellisation.

The score of :math:`z_i` need only multiply those terms of log p - log q that involve :math:`z_i`
or a latent that the guide draws given :math:`z_i`. By the law of total expectation, its product
with any other term has mean zero. Nobody declares these dependencies; they are found by running
model and guide:

* *between sites*, by provenance, which records the inputs that a tensor was computed from (Wingate
  et al., 2011), and by the autograd graph, which also sees through custom functions;
* *within a plate*, index by index: the latent's values at some indices are exchanged for others. A
  term that then changes at another index mixes the indices, and is not split along that plate.

Where this is impossible, because the program branches on a latent's value or fills tensors in
place, every term is taken to depend on every latent, which is always correct.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.ops.provenance import ProvenanceTensor, detach_provenance, get_provenance
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch.distributions import Independent, biject_to
from torch.overrides import TorchFunctionMode

from vi_toolkit.estimators.particles import Given, log_density, trace_model_and_guide
from vi_toolkit.programs.isolation import kept_random_state
from vi_toolkit.programs.sites import Site, is_drawn, is_point, is_term, plate_dims

# Shares of a plate's indices whose values are exchanged; 0 stands for a single index. Two changes
# can cancel in a sum, one cannot. Many reach more terms than one.
EXCHANGED = (0.0, 0.0, 0.25, 0.5, 0.5)
Key = tuple[str, str]  # owner ("model" or "guide"), site
# Functions whose results depend on values but are no longer tracked.
_UNTRACKED = {
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "__array__",
    "item",
    "tolist",
    "numpy",
    "nonzero",
    "unique",
    "masked_select",
}


@dataclass
class Dependencies:
    """Which terms of the ELBO involve which latent.

    Attributes:
        latents: sites that the guide draws, in its order.
        involved: (latent, term) -> the plates along which each entry of the term involves only the
            entry of the latent with the same index. If a pair is absent, the term does not involve
            the latent.
        parents: term -> latents that it is computed from directly.
        descendants: latent -> the latent itself, and those whose distribution in the guide depends
            on it.
        coordinatewise: latent -> its prior in the model, where both are products over the same
            independent coordinates.
        unreadable: why every term is taken to depend on every latent; empty if it is not.
    """

    latents: list[str]
    involved: dict[tuple[str, Key], frozenset[str]] = field(default_factory=dict)
    parents: dict[Key, set[str]] = field(default_factory=dict)
    descendants: dict[str, set[str]] = field(default_factory=dict)
    coordinatewise: dict[str, str] = field(default_factory=dict)
    unreadable: str = ""


def trace(model: Any, guide: Any, args: Any, kwargs: Any) -> Dependencies:
    """Run model and guide a few times, and find their dependencies.

    The caller's random state does not change.
    """
    with kept_random_state(), pyro.validation_enabled(False):
        with torch.no_grad():
            traces = trace_model_and_guide(model, guide, args, kwargs)
        dependencies = Dependencies([n for n, s in traces[1].nodes.items() if is_drawn(s)])
        tracker = _Tracker()
        try:
            with torch.enable_grad(), _LostProvenance() as lost:
                model_trace, guide_trace = trace_model_and_guide(
                    model, guide, args, kwargs, tracker
                )
                dependencies.parents = {
                    (owner, name): tracker.parents(log_density(site))
                    for owner, trace in (("model", model_trace), ("guide", guide_trace))
                    for name, site in trace.nodes.items()
                    if is_term(site)
                }
            dependencies.unreadable = lost.reason
        except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
            dependencies.unreadable = f"provenance tracking failed: {error}".split("\n")[0]
        if dependencies.unreadable:
            keys = [
                (owner, name)
                for owner, trace in zip(("model", "guide"), traces, strict=True)
                for name, site in trace.nodes.items()
                if is_term(site)
            ]
            everything = set(dependencies.latents)
            dependencies.parents = {key: set(everything) for key in keys}
            dependencies.descendants = {name: set(everything) for name in dependencies.latents}
            dependencies.involved = {
                (name, key): frozenset() for name in dependencies.latents for key in keys
            }
            return dependencies
        with torch.no_grad():
            _connect(dependencies, model, guide, args, kwargs, traces)
        return dependencies


class _Tracker(Messenger):
    """Marks every value that the guide draws, and nothing else, with the name of its site."""

    def __init__(self) -> None:
        super().__init__()
        self.leaves: dict[str, torch.Tensor] = {}

    def _pyro_post_sample(self, msg: Site) -> None:
        if not is_drawn(msg):
            return
        value = detach_provenance(msg["value"]).detach().clone()
        if value.is_floating_point():
            value.requires_grad_()
            self.leaves[msg["name"]] = value
        msg["value"] = ProvenanceTensor(value, frozenset({msg["name"]}))

    def parents(self, log_prob: torch.Tensor) -> set[str]:
        """The latents that a log density was computed from."""
        found = set(get_provenance(log_prob))
        plain = detach_provenance(log_prob)
        if plain.requires_grad and self.leaves:
            grads = torch.autograd.grad(
                plain.sum(), list(self.leaves.values()), retain_graph=True, allow_unused=True
            )
            found |= {n for n, g in zip(self.leaves, grads, strict=True) if g is not None}
        return found


class _LostProvenance(TorchFunctionMode):
    """Records where a marked value escapes tracking: in a branch, or by filling a tensor in place.

    Attributes:
        reason: the last such place, as part of a sentence; empty if there is none.
    """

    reason = ""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _UNTRACKED and get_provenance([args, kwargs]):
            sites = ", ".join(sorted(get_provenance([args, kwargs])))
            self.reason = f"the value of {sites} steers the program (Tensor.{name})"
        in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        if in_place and args:
            lost = get_provenance([list(args[1:]), kwargs]) - get_provenance(args[0])
            if lost:
                self.reason = f"a tensor is filled in place with {', '.join(sorted(lost))}"
        return func(*args, **kwargs)


def _connect(
    dependencies: Dependencies,
    model: Any,
    guide: Any,
    args: Any,
    kwargs: Any,
    traces: tuple[Any, Any],
) -> None:
    """Follow dependencies through the guide, and find the plates along which indices match."""
    model_trace, guide_trace = traces
    sites = {("model", n): s for n, s in model_trace.nodes.items() if is_term(s)}
    sites |= {("guide", n): s for n, s in guide_trace.nodes.items() if is_term(s)}
    around = {
        name: set(plate_dims(guide_trace.nodes[name]).items()) for name in dependencies.latents
    }
    mixes = _mixing(dependencies, model, guide, args, kwargs, traces)

    def matched(latent: str, key: Key, via: str, kept: set[Any]) -> set[Any]:
        """Plates along which indices match from ``latent`` through ``via`` to the term."""
        return kept & set(plate_dims(sites[key]).items()) - mixes.get((via, key), set())

    for latent in dependencies.latents:
        kept = {latent: around[latent]}  # descendants of the latent, with the plates that match
        for name in dependencies.latents:
            ways = dependencies.parents.get(("guide", name), set()) & set(kept) - {name}
            if name != latent and ways:
                plate_sets = [matched(latent, ("guide", name), via, kept[via]) for via in ways]
                kept[name] = set.intersection(*plate_sets)
        dependencies.descendants[latent] = set(kept)
        for key in sites:
            ways = dependencies.parents[key] & set(kept)
            if key == ("guide", latent):
                ways = ways | {latent}
            if ways:
                plate_sets = [matched(latent, key, via, kept[via]) for via in ways]
                names = {name for name, _ in set.intersection(*plate_sets)}
                dependencies.involved[latent, key] = frozenset(names)
        prior = _own_prior(latent, guide, guide_trace, model_trace)
        if prior and dependencies.parents["model", prior] & set(kept) == {latent}:
            dependencies.coordinatewise[latent] = prior


def _mixing(
    dependencies: Dependencies,
    model: Any,
    guide: Any,
    args: Any,
    kwargs: Any,
    traces: tuple[Any, Any],
) -> dict[tuple[str, Key], set[tuple[str, int]]]:
    """(latent, term) -> the plates, as (name, dim), along which the term mixes indices."""
    found: dict[tuple[str, Key], set[tuple[str, int]]] = {}
    guide_trace = traces[1]
    values = {name: guide_trace.nodes[name]["value"] for name in dependencies.latents}
    subsamples = {
        n: s["value"]
        for n, s in (*traces[0].nodes.items(), *guide_trace.nodes.items())
        if site_is_subsample(s)
    }

    def densities(given: Mapping[str, torch.Tensor]) -> dict[Key, torch.Tensor]:
        with Given(subsamples):
            model_trace, guide_trace = trace_model_and_guide(
                model, guide, args, kwargs, Given(given)
            )
        return {
            (owner, n): log_density(s)
            for owner, trace in (("model", model_trace), ("guide", guide_trace))
            for n, s in trace.nodes.items()
            if is_term(s)
        }

    base = densities(values)
    for latent in dependencies.latents:
        site = guide_trace.nodes[latent]
        event_dim = site["fn"].event_dim
        for plate, dim in plate_dims(site).items():
            axis = dim - event_dim
            if values[latent].dim() < -axis or values[latent].shape[axis] < 2:
                continue
            size = values[latent].shape[axis]
            for count in EXCHANGED:
                chosen = torch.zeros(size, dtype=torch.bool)
                chosen[torch.randperm(size)[: max(1, int(count * size))]] = True
                mask = chosen.reshape(-1, *[1] * (-axis - 1))
                other = torch.where(mask, _another(site), values[latent])
                changed = densities({**values, latent: other})
                for key, before in base.items():
                    if latent not in dependencies.parents[key]:
                        continue
                    same = (before == changed[key]) | (before.isnan() & changed[key].isnan())
                    if same.dim() >= -dim and same.shape[dim] == size:
                        same = same | chosen.reshape(-1, *[1] * (-dim - 1))
                    if not bool(same.all()):
                        found.setdefault((latent, key), set()).add((plate, dim))
    return found


def _another(site: Site) -> torch.Tensor:
    """Another possible value of a latent, different at every index if it can be."""
    fn, value = site["fn"], site["value"]
    if fn.has_enumerate_support:
        support = fn.enumerate_support(expand=False)
        flat = support.reshape(len(support), -1)
        if flat.shape[1] == 1:
            position = (value[..., None] == flat[:, 0]).int().argmax(-1)
            return flat[:, 0][(position + 1) % len(flat)].reshape(value.shape).to(value.dtype)
    if getattr(fn.support, "is_discrete", False):
        return value + 1
    return fn.sample().expand_as(value)


def _own_prior(latent: str, guide: Any, guide_trace: Any, model_trace: Any) -> str:
    """Name of the latent's prior in the model if both are products over the same coordinates.

    Otherwise "".
    """
    name, fn = latent, guide_trace.nodes[latent]["fn"]
    if isinstance(guide, AutoNormal):
        name = latent.removesuffix("_unconstrained")
    prior = model_trace.nodes.get(name)
    if prior is None or not is_term(prior) or is_point(prior):
        return ""
    dims = []
    for one in (fn, prior["fn"]):
        count = 0
        while isinstance(one, Independent):
            count += one.reinterpreted_batch_ndims
            one = one.base_dist
        if one.event_shape:
            return ""
        dims.append(count)
    if dims[0] != dims[1] or fn.event_shape != prior["fn"].event_shape:
        return ""
    if name != latent:
        support = prior["fn"].support
        while hasattr(support, "base_constraint"):
            support = support.base_constraint
        transform = biject_to(support)
        if transform.domain.event_dim or transform.codomain.event_dim:
            return ""
    return name
