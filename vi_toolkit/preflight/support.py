"""Checks of supports: whether the guide draws only values that the model allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoCallable, AutoGuide, AutoGuideList
from torch import Tensor
from torch.distributions import TransformedDistribution, biject_to, transforms

from vi_toolkit.errors import PreflightError
from vi_toolkit.preflight import words
from vi_toolkit.programs.sites import Site, core

# Constraints under which the entries of a value depend on each other -> their names in messages.
# The first that matches is taken, so a smaller set comes before one that contains it.
_JOINT = {
    "simplex": "the simplex",
    "positive_ordered_vector": "positive ordered vectors",
    "ordered_vector": "ordered vectors",
    "corr_cholesky": "Cholesky factors of correlation matrices",
    "unit_lower_cholesky": "unit lower-triangular matrices",
    "lower_cholesky": "lower Cholesky factors",
    "lower_triangular": "lower-triangular matrices",
    "corr_matrix": "correlation matrices",
    "positive_definite": "positive definite matrices",
    "sphere": "the unit sphere",
    "one_hot": "one-hot vectors",
}
_USUAL = {
    "the simplex": "dist.Dirichlet(concentration)",
    "(0, inf)": "dist.LogNormal(loc, scale)",
    "(0, 1)": "dist.Beta(concentration1, concentration0)",
}


def distribution_name(fn: Any) -> str:
    """Name of a distribution's class, without wrappers."""
    return type(core(fn)).__name__


def stated(fn: Any) -> Any:
    """The support that a distribution states, of single entries if possible; None if none."""
    try:
        return _strip(fn.support)
    except (AttributeError, NotImplementedError):
        return None


def _strip(support: Any) -> Any:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def is_discrete(fn: Any) -> bool:
    """Whether a distribution is known to be discrete."""
    try:
        return bool(stated(fn).is_discrete)
    except (AttributeError, NotImplementedError):
        return False


def _joint(fn: Any) -> str | None:
    """Name of the constraint if the entries of an event depend on each other, else None."""
    support = stated(fn)
    return next((n for n in _JOINT if isinstance(support, type(getattr(constraints, n)))), None)


@dataclass
class Box:
    """Bounds of a scalar, or of entries that do not depend on each other."""

    lower: Any = -torch.inf
    upper: Any = torch.inf
    discrete: bool = False

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Lower and upper bound, as tensors."""
        return torch.as_tensor(self.lower).float(), torch.as_tensor(self.upper).float()

    def inside(self, other: Box) -> bool:
        """Whether this box lies in another."""
        (lower, upper), (least, most) = self.bounds(), other.bounds()
        try:  # with a tolerance, since a bound computed twice may differ in the last digit
            return bool(
                (lower >= least - 1e-5 * least.abs().nan_to_num(0, 0).clamp_min(1)).all()
                and (upper <= most + 1e-5 * most.abs().nan_to_num(0, 0).clamp_min(1)).all()
            )
        except RuntimeError:  # the bounds do not broadcast, which another check reports
            return True

    def __str__(self) -> str:
        lower, upper = (_text(bound) for bound in self.bounds())
        if self.discrete:
            return f"integers from {lower}" + ("" if upper == "inf" else f" to {upper}")
        return f"({lower}, {upper})"


def _text(bound: Tensor) -> str:
    ends = [bound.min().item(), bound.max().item()]
    # The range of a sigmoid starts at the smallest positive float, which is to be written as 0.
    texts = [f"{end if abs(end) > 1e-30 else 0.0:.4g}" for end in ends]
    return texts[0] if texts[0] == texts[1] else f"{texts[0]}...{texts[1]}"


def _box(support: Any) -> Box | None:
    if isinstance(support, constraints.MixtureSameFamilyConstraint):
        box = _box(_strip(support.base_constraint))
        # Bounds that differ between components have one dimension more than values.
        return box if box and all(bound.numel() == 1 for bound in box.bounds()) else None
    if isinstance(support, type(constraints.real)):
        return Box()
    if isinstance(support, type(constraints.boolean)):
        return Box(0, 1, discrete=True)
    ends = [getattr(support, f"{end}_bound", None) for end in ("lower", "upper")]
    if ends == [None, None] or support.event_dim:
        return None
    lower, upper = ends
    return Box(
        -torch.inf if lower is None else lower,
        torch.inf if upper is None else upper,
        support.is_discrete,
    )


def support_box(fn: Any) -> Box | None:
    """The box of all values that a distribution can draw; None if it is not known.

    A TransformedDistribution states the codomain of its last transform. For an affine map that is
    the whole line, whatever the base distribution, so the bounds are carried through the transforms
    instead. Subclasses such as LogNormal and Gumbel state their support themselves.
    """
    fn = core(fn)
    if getattr(type(fn), "support", None) is not TransformedDistribution.support:
        return _box(stated(fn))
    box = support_box(fn.base_dist)
    if box is None:
        return None
    try:  # entry by entry, a transform is monotone and maps bounds to bounds
        ends = [transforms.ComposeTransform(fn.transforms)(end) for end in box.bounds()]
        if not any(torch.isnan(end).any() for end in ends):
            return Box(torch.minimum(*ends), torch.maximum(*ends))
    except (IndexError, RuntimeError, TypeError, ValueError):  # it mixes the entries of a vector
        pass
    # Such a transform may still keep the bounds, as a permutation does, and state the whole line.
    return _box(stated(fn)) if Box().inside(box) else None


def describe(fn: Any) -> str:
    """The support in words, for a message."""
    return str(support_box(fn) or _JOINT.get(_joint(fn) or "") or stated(fn))


def entry_dims(fn: Any) -> int:
    """Number of event dimensions in the result of :func:`outside`: all for a box, else none."""
    return fn.event_dim if _box(stated(fn)) else 0


def outside(fn: Any, value: Tensor, edge: bool = False) -> Tensor | None:
    """Which values lie outside a distribution's support by more than rounding.

    Args:
        fn: the distribution.
        value: shape (*batch shape, *event shape), or one that broadcasts to it.
        edge: whether the ends of an interval count as outside. For a draw they should not, because
            exp underflows to 0 and a sigmoid rounds to 1.

    Returns:
        Flags for each entry if the support is a box, else for each event; None if it is not known.
    """
    support = stated(fn)
    box = _box(support)
    if box and not box.discrete and not edge:
        return ~((value >= box.lower) & (value <= box.upper))
    if _joint(fn) == "simplex":  # torch's tolerance, 1e-6, is too small for a long float32 sum
        return (value < 0).any(-1) | ((value.sum(-1) - 1).abs() > 1e-3)
    if isinstance(support, constraints.MixtureSameFamilyConstraint):
        if box is None:  # torch's check is wrong: it asks for a value inside every component
            return None
        support = _strip(support.base_constraint)
    try:
        return ~(support if box else fn.support).check(value)
    except (AttributeError, NotImplementedError, RuntimeError, ValueError):
        return None


def _replacement(fn: Any) -> str:
    """A distribution to recommend for the guide of a latent with this prior."""
    if describe(fn) in _USUAL:
        return _USUAL[describe(fn)]
    box, constraint = support_box(fn), _joint(fn)
    if box and not (box.discrete or Box().inside(box)):
        ends = [_text(bound) for bound in box.bounds()]
        lower, upper = ("bound" if "..." in end else end for end in ends)
        constraint = f"interval({lower}, {upper})"
        if upper == "inf":
            constraint = f"greater_than({lower})"
        elif lower == "-inf":
            constraint = f"less_than({upper})"
    try:
        biject_to(stated(fn))
    except NotImplementedError:
        constraint = None
    if constraint is None:
        return f"the model's kind of distribution, {distribution_name(fn)},"
    return (
        "dist.TransformedDistribution(dist.Normal(loc, scale), "
        f"torch.distributions.biject_to(constraints.{constraint}))"
    )


def set_up_on(guide: Any) -> Mapping[str, Any]:
    """Site -> the prior from which an autoguide took the support when it was set up."""
    parts = guide.modules() if isinstance(guide, AutoGuide) else ()
    return {
        name: site["fn"]
        for part in parts
        if isinstance(part, AutoGuide) and not isinstance(part, AutoGuideList | AutoCallable)
        if part.prototype_trace is not None
        for name, site in part.prototype_trace.nodes.items()
        if site.get("type") == "sample" and not site["is_observed"]
    }


def check_support(name: str, model: Site, guide: Site, prototype: Any, autoguide: str) -> None:
    """Check that the guide's draws of a latent lie in the model's support.

    Args:
        name: of the latent.
        model, guide: its sites.
        prototype: the prior that an autoguide was set up on, whose support it maps to; else None.
        autoguide: name of the autoguide's class, else "".
    """
    p, q = model["fn"], guide["fn"]
    if isinstance(core(p), dist.Delta):
        return
    at_fault, remedy = distribution_name(q), f"Use {_replacement(p)} in the guide."
    ours, theirs, discrete = support_box(p), support_box(q), is_discrete(q)
    if isinstance(core(q), dist.Delta):
        theirs = None  # a point mass: check its value instead
    if prototype is not None:
        theirs, discrete = _box(stated(prototype)), is_discrete(prototype)
        at_fault, remedy = autoguide, "Build it anew from this model."
        if type(core(p)).support is TransformedDistribution.support:
            remedy = "Sample the base distribution and transform the draw in the model."
    fits = not theirs or (ours and theirs.inside(ours) and ours.discrete == discrete)
    if (ours or _joint(p)) and not fits:
        raise PreflightError(
            f"At site '{name}' the guide's {at_fault} has support {theirs}, which is not inside "
            f"that of the model's {distribution_name(p)}, {describe(p)}.",
            name,
            remedy,
        )
    same = _joint(p) and _joint(p) == _joint(q) and not isinstance(core(q), dist.Delta)
    out = None if prototype is not None or same else outside(p, guide["value"])
    if out is not None and out.any():
        raise PreflightError(
            f"The guide's draw {words.item(guide['value'], out)} of '{name}' lies outside the "
            f"support of the model's {distribution_name(p)}, {describe(p)}.",
            name,
            "Constrain what the guide returns there, e.g. with pyro.param(..., constraint=...) or "
            "biject_to(the model's support).",
        )


def check_fixed_support(name: str, one: Site, other: Site, autoguide: str) -> None:
    """Check that the support of a latent does not depend on others if an autoguide fixes it.

    Args:
        one, other: the latent's site in two runs of the model.
    """
    if any(f.full_size not in (None, f.size) for f in one["cond_indep_stack"]):
        return  # two different minibatches
    first, second = (_box(stated(site["fn"])) for site in (one, other))
    if first and second and not (first.inside(second) and second.inside(first)):
        raise PreflightError(
            f"The support of '{name}' depends on other latents, {first} in one draw and {second} "
            f"in another, but {autoguide} fixes it at set-up.",
            name,
            f"Sample a '{name}_unit' of fixed support and compute '{name}' from it, or write the "
            "guide by hand.",
        )
