"""Checks made before step one: do model, guide and data fit together?

Pyro reports most of these mistakes late and from deep inside torch, and some of them never. Here
each is one :class:`~vi_toolkit.errors.PreflightError` that names the site and what to change.
A correct model must pass, so a check that depends on where the latents happen to be (a density
that is not finite, a matrix that is not positive definite) raises only if it fails everywhere.
"""

from __future__ import annotations

import copy
import difflib
import functools
import inspect
import itertools
import operator
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.distributions.util import scale_and_mask
from pyro.infer.autoguide import AutoCallable, AutoGuide, AutoGuideList
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to, transforms

from vi_toolkit.errors import PreflightError
from vi_toolkit.scope import borrowed_globals, seeded_state

Site = Any  # a message of Pyro's trace: its name, fn, value, plates, ...

GUIDE_DRAWS = 10  # a density must be non-finite at all of them, and at the prior draws
PRIOR_DRAWS = 5


def preflight(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Mapping[str, Any],
    subsample: Mapping[str, int] | None = None,
    reparameterised: bool | None = None,
    enumerate: bool = False,
) -> None:
    """Raise :class:`PreflightError` if model, guide and data do not fit together.

    Runs the model twice or three times and the guide once (more only when something is wrong),
    with Pyro's validation on and in its own parameter store, random state and default dtype, so
    that nothing of the caller's changes.

    Args:
        model: Pyro model, called as ``model(**data)``. If it carries ``model.LATENTS``, or is the
            ``model`` of a module with ``LATENTS`` (site name -> tuple of dims: () for a global
            scalar, a string for a plate or a named dimension, an int for a size), its latents are
            checked against that.
        guide: Pyro guide, called as ``guide(**data)``; an autoguide class means ``guide(model)``.
        data: keyword arguments. Their float tensors must be finite: fill in what is missing and
            mask it in the model. They must also share one dtype, which becomes the default dtype
            for the checks, so that a model's own constants follow its data.
        subsample: plate name -> minibatch size.
        reparameterised: True if the estimator needs gradients through the guide's draws.
        enumerate: whether latents marked ``infer={"enumerate": "parallel"}`` are summed out, and
            so may be missing in the guide.

    Raises:
        PreflightError: with ``site`` and ``remedy``.

    Warns:
        UserWarning: if there are data but no observed site. This is no error, because a density
            written without observations (a known target, say) is a legitimate model whose data
            are its constants; an argument left at None, however, is a forgotten observation and
            raises.

    Example:
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("observations", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> preflight(model, lambda y: pyro.sample("mean", dist.Normal(0.0, 1.0)),
        ...           {"y": torch.zeros(3)})
        Traceback (most recent call last):
        vi_toolkit.errors.PreflightError: The guide does not sample the model's latent 'mu'. ...
    """
    for role, fn in (("model", model), ("guide", guide)):
        if not callable(fn):
            raise PreflightError(
                f"The {role} is {_a(fn)}, which cannot be called.",
                remedy=f"Pass a function or PyroModule to be called as {role}(**data).",
            )
    _check_data(data)
    data = dict(data)
    guide = private_guide(model, guide)
    _check_signature("model", model, data)
    _check_signature("guide", guide, data)
    floats = {v.dtype for _, v in _tensors(data) if v.is_floating_point() and v.dim()}
    usual = floats & {torch.float32, torch.float64}
    with (
        borrowed_globals(
            rng_state=seeded_state(0), dtype=usual.pop() if usual else None, validate=True
        ),
        warnings.catch_warnings(),
        poutine.block(),
    ):
        warnings.simplefilter("ignore")  # the fit itself will show them
        checks = _Checks(model, guide, data, reparameterised, enumerate)
        unobserved = checks.run(subsample or {})
    if unobserved:
        warnings.warn(unobserved, UserWarning, stacklevel=2)


# --- the data -------------------------------------------------------------------------------------


def _tensors(data: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Every strided tensor or float array in the data, with the expression that reaches it."""

    def walk(label: str, value: Any) -> Iterator[tuple[str, Tensor]]:
        if isinstance(value, Tensor):
            if value.layout is torch.strided:
                yield label, value
        elif isinstance(value, Mapping):
            for key, part in value.items():
                yield from walk(f"{label}[{key!r}]", part)
        elif isinstance(value, list | tuple):
            for i, part in zip(itertools.count(), value):
                if not isinstance(part, int | float | str):
                    yield from walk(f"{label}[{i}]", part)

    for key, value in data.items():
        yield from walk(_entry(key), value)


def _entry(key: Any) -> str:
    return f'data["{key}"]'


def _arrays(data: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Numpy arrays and pandas objects among the data, as tensors where they hold numbers."""
    for key, value in data.items():
        if isinstance(value, np.ndarray) or hasattr(value, "to_numpy"):
            array = np.asarray(value)
            if array.dtype.kind in "fiub":
                yield _entry(key), torch.from_numpy(np.array(array))


def _check_data(data: Any) -> None:
    if not isinstance(data, Mapping):
        raise PreflightError(
            f"data is {_a(data)}, but model and guide are called as model(**data).",
            remedy='Pass a dict of arguments, e.g. {"X": X, "y": y}.',
        )
    for key in data:
        if not isinstance(key, str):
            raise PreflightError(
                f"data has the key {key!r}, which is {_a(key)}.",
                site=str(key),
                remedy="Its keys are names of the model's arguments: make them strings.",
            )
    tensors = list(_tensors(data))
    for label, value in [*tensors, *_arrays(data)]:
        if value.numel() == 0:
            raise PreflightError(
                f"{label} is empty (shape {_shape(value.shape)}).",
                site=label,
                remedy="Look at the filter or split that made it, or leave it out.",
            )
    # A scalar on the CPU mixes with any device, and a scalar of any float dtype with any other.
    sized = [(label, value) for label, value in tensors if value.dim()]
    floats = [(label, value) for label, value in sized if value.is_floating_point()]
    for what, group, attribute in (("device", sized, "device"), ("dtype", floats, "dtype")):
        first: dict[Any, str] = {}
        for label, value in group:
            first.setdefault(getattr(value, attribute), label)
        if len(first) > 1:
            (one, label), (other, culprit) = list(first.items())[:2]
            target = str(one).removeprefix("torch.")
            move = f'.to("{target}")' if what == "device" else f".to(torch.{target})"
            raise PreflightError(
                f"{label} is {_on(what, one)} but {culprit} is {_on(what, other)}.",
                site=culprit,
                remedy=f"Use one {what}, e.g. {culprit}{move}.",
            )
    for label, value in [*tensors, *_arrays(data)]:
        if not value.is_floating_point() or value.is_meta:
            continue
        bad = ~torch.isfinite(value)
        if bad.any():
            index = _first(bad)
            count, at = int(bad.sum()), f"{value[index].item()}{_at(index)}"
            values = f"{count} values that are not finite, the first" if count > 1 else "the value"
            raise PreflightError(
                f"{label} has {values} {at}.",
                site=label,
                remedy="Drop or impute what is missing, or fill it with any valid number and leave "
                "it out of the density with poutine.mask.",
            )


def _on(what: str, value: Any) -> str:
    return f"on {value}" if what == "device" else str(value).removeprefix("torch.")


# --- the signatures -------------------------------------------------------------------------------


def _handler(fn: Any) -> tuple[Messenger | None, Any]:
    """The outermost effect handler of a callable such as ``poutine.block(model)``, and the rest."""
    inner = fn.func if isinstance(fn, functools.partial) else None
    if isinstance(inner, functools.partial) and len(inner.args) == 2:
        handler, rest = inner.args
        if isinstance(handler, Messenger):
            return handler, rest
    return None, fn


def _unwrap(fn: Any) -> Any:
    """The function inside all effect handlers."""
    handler, inner = _handler(fn)
    return fn if handler is None else _unwrap(inner)


def _signature(fn: Any) -> inspect.Signature | None:
    fn = _unwrap(fn)
    if isinstance(fn, Messenger):  # a guide made of effects passes everything to its model
        return None
    if isinstance(fn, torch.nn.Module):
        fn = fn.forward
    try:
        return inspect.signature(fn)
    except (TypeError, ValueError):
        return None


def _check_signature(role: str, fn: Any, data: Mapping[str, Any]) -> None:
    signature = _signature(fn)
    if signature is None:
        return
    parameters = signature.parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    names = [p.name for p in named]
    missing = [p.name for p in named if p.default is p.empty and p.name not in data]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    extra = [] if takes_any else [key for key in data if key not in names]
    if missing:
        name = missing[0]
        twin = _nearest(name, extra or [key for key in data if key not in names])
        raise PreflightError(
            f"The {role} needs the argument '{name}', which data does not have"
            + (f" (its keys: {', '.join(data)})." if data else " (it is empty)."),
            site=name,
            remedy=f'Rename {_entry(twin)} to "{name}".' if twin else f"Add {_entry(name)}.",
        )
    if extra:
        name = extra[0]
        takes = f"it takes {', '.join(names)}" if names else "it takes none"
        free = [n for n in names if n not in data]
        twin = _nearest(name, free)
        if role == "guide":
            remedy = f"Give the guide the model's arguments: def guide({', '.join(data)})."
        elif twin:
            remedy = f'Rename {_entry(name)} to "{twin}".'
        else:
            remedy = f"Remove {_entry(name)} or add the argument."
        raise PreflightError(
            f"The {role} has no argument '{name}' ({takes}).", site=name, remedy=remedy
        )


# --- running model and guide ----------------------------------------------------------------------


@dataclass
class _Run:
    """One run of the model or guide: its sample sites so far, and what stopped it."""

    sites: dict[str, Site] = field(default_factory=dict)
    minibatches: dict[str, Site] = field(default_factory=dict)
    plates: dict[str, tuple[int, int | None]] = field(default_factory=dict)  # size, subsample size
    error: Exception | None = None
    last: str | None = None  # the last site begun
    problems: dict[str, str] = field(default_factory=dict)  # site -> density not finite, why

    def latents(self) -> dict[str, Site]:
        return {name: site for name, site in self.sites.items() if not site["is_observed"]}

    def observed(self) -> dict[str, Site]:
        return {
            name: site
            for name, site in self.sites.items()
            if site["is_observed"] and not site["infer"].get("_deterministic")
        }


class _Record(Messenger):
    """Note each site before it is drawn, so that a run that fails says how far it came."""

    def __init__(self, run: _Run):
        super().__init__()
        self.run = run

    def _pyro_sample(self, msg: Site) -> None:
        if not site_is_subsample(msg):
            self.run.last = msg["name"]
        else:
            batch = msg["fn"].subsample_size
            batch = None if batch is None else int(batch)
            self.run.plates[msg["name"]] = (int(msg["fn"].size), batch)


class _Start(Messenger):
    """Values for latents: the middle of the unconstrained space, or draws from the prior.

    An improper prior cannot be drawn from; a standard Normal on the unconstrained scale stands in.
    """

    def __init__(self, data: Mapping[str, Any], prior: bool = False):
        super().__init__()
        self.prior = prior
        self.device = next((value.device for _, value in _tensors(data)), None)

    def _pyro_sample(self, msg: Site) -> None:
        if msg["done"] or msg["is_observed"] or msg["value"] is not None or site_is_subsample(msg):
            return
        fn = msg["fn"]
        try:
            with torch.no_grad():
                draw = fn(*msg["args"], **msg["kwargs"])
        except NotImplementedError:
            draw = None
        if draw is None or not self.prior:
            try:
                transform = biject_to(fn.support)
                if draw is None:
                    shape = transform.inverse_shape(fn.shape())
                    make = torch.randn if self.prior else torch.zeros
                    draw = transform(make(shape, device=self.device))
                else:
                    draw = transform(torch.zeros_like(transform.inv(draw)))
            except (AttributeError, NotImplementedError):  # discrete, or no bijection known
                if draw is None:
                    raise
        msg["value"] = draw


class _Replay(Messenger):
    """The guide's values and minibatches for the model's latents."""

    def __init__(self, guide: _Run):
        super().__init__()
        self.guide = guide

    def _pyro_sample(self, msg: Site) -> None:
        sites = self.guide.minibatches if site_is_subsample(msg) else self.guide.sites
        site = sites.get(msg["name"])
        if site is not None and not msg["is_observed"] and not site["is_observed"]:
            msg["value"] = site["value"]
            msg["done"] = True


def _run(fn: Callable[..., Any], data: Mapping[str, Any], *handlers: Messenger) -> _Run:
    """Trace ``fn(**data)``; an exception ends up in the result with the sites before it."""
    run = _Run()
    tracer = poutine.trace()
    try:
        with ExitStack() as stack:
            for handler in (tracer, _Record(run), *handlers):
                stack.enter_context(handler)
            fn(**data)
    except Exception as error:
        run.error = error
    nodes = tracer.trace.nodes
    messenger = _unwrap(fn)
    if isinstance(messenger, GuideMessenger) and run.error is None:
        # Such a guide runs the model; its own trace holds only what the guide samples.
        nodes = messenger.get_traces()[1].nodes
    for name, site in nodes.items():
        if site["type"] == "sample":
            (run.minibatches if site_is_subsample(site) else run.sites)[name] = site
    return run


def _run_model(model: Callable[..., Any], data: Mapping[str, Any], *handlers: Messenger) -> _Run:
    """As ``_run``, and the density of every site."""
    run = _run(model, data, *handlers)
    if run.error is None:
        for name, site in run.sites.items():
            run.last = name
            try:
                problem = _density_problem(site)
            except Exception as error:
                run.error = error
                break
            if problem:
                run.problems[name] = problem
    return run


def _density_problem(site: Site) -> str | None:
    """Why the log density at a site is not finite, or None if it is. Sets site["log_prob"]."""
    fn, value, mask = site["fn"], site["value"], site["mask"]
    if site["infer"].get("_deterministic") or isinstance(value, int | float):
        return None
    if not isinstance(value, Tensor):
        raise TypeError(f"the observation is {_a(value)}, not a tensor")
    try:
        log_prob = fn.log_prob(value, *site["args"], **site["kwargs"])
    except ValueError:
        if _clash(site):
            raise
        # Outside the support somewhere: that may be masked, or no more than rounding.
        try:
            log_prob = _unvalidated(fn).log_prob(value, *site["args"], **site["kwargs"])
        except (RuntimeError, ValueError, IndexError):
            log_prob = torch.full(fn.batch_shape, torch.nan)
        outside = _outside(_support(fn), value)
        if outside is not None:
            log_prob = torch.where(_per_event(outside, fn), -torch.inf, log_prob)
    site["log_prob"] = log_prob
    bad = ~torch.isfinite(scale_and_mask(log_prob, site["scale"], mask))
    if not bad.any():
        return None
    if site["is_observed"]:
        outside = _outside(_support(fn), value, edge=True)
        if outside is not None and (outside := outside & _per_entry(bad, outside)).any():
            index = _first(outside)
            return (
                f"the observation {_entry_text(value, index)}{_at(index)} lies outside the support "
                f"of {_name(fn)}, {_support_text(fn)}"
            )
    index = _first(bad)
    return f"its log density is {log_prob.expand(bad.shape)[index].item():g}{_at(index)}"


def _per_event(outside: Tensor, fn: Any) -> Tensor:
    """From entries to events: whether any entry of an event is outside."""
    extra = outside.dim() - len(fn.batch_shape)
    return outside.flatten(-extra).any(-1) if 0 < extra == fn.event_dim else outside


def _per_entry(bad: Tensor, entries: Tensor) -> Tensor:
    """From events to entries: the events' flags, broadcast over their entries."""
    return bad.reshape(bad.shape + (1,) * (entries.dim() - bad.dim()))


def _unvalidated(fn: Any) -> Any:
    """A distribution that does not check the values whose density it is asked for."""
    fn = copy.copy(fn)
    fn._validate_args = False
    for part in ("base_dist", "_component_distribution"):
        if hasattr(fn, part):
            setattr(fn, part, _unvalidated(getattr(fn, part)))
    return fn


def _numerical(error: Exception | None) -> bool:
    """Whether an error depends on where the latents are, so that other draws may do without it."""
    if isinstance(error, torch.linalg.LinAlgError | ArithmeticError):
        return not isinstance(error, ZeroDivisionError)  # Pyro's complaint about an empty plate
    text = str(error)
    return isinstance(error, ValueError | RuntimeError) and any(
        part in text
        for part in (
            "to satisfy the constraint",
            "to be within the support",
            "positive-definite",
            "positive definite",
            "singular",
            "contains either `inf`, `nan` or element < 0",
        )
    )


# --- shapes, supports, names ----------------------------------------------------------------------


def _a(value: Any) -> str:
    name = type(value).__name__
    return f"an {name}" if name[0] in "aeiouAEIOU" else f"a {name}"


def _name(fn: Any) -> str:
    while isinstance(fn, dist.Independent | dist.MaskedDistribution | dist.ExpandedDistribution):
        fn = fn.base_dist
    return type(fn).__name__


def _shape(shape: Any) -> str:
    return str(tuple(shape))


def _index(index: tuple[int, ...]) -> str:
    return str(index[0] if len(index) == 1 else index)


def _at(index: tuple[int, ...]) -> str:
    return f" at index {_index(index)}" if index else ""


def _first(bad: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in bad.nonzero()[0])


def _entry_text(value: Tensor, index: tuple[int, ...]) -> str:
    entry = value[index] if value.dim() >= len(index) else value
    return f"{entry.item():g}" if entry.numel() == 1 else str(entry.tolist()[:4])


def _line(error: BaseException | None) -> str:
    text = " ".join(str(error).split()).partition(" Trace Shapes:")[0] or "no message"
    return text if len(text) <= 200 else text[:197] + "..."


def _nearest(name: str, names: Any) -> str | None:
    close = difflib.get_close_matches(name, [str(n) for n in names], n=1, cutoff=0.6)
    if close:
        return close[0]
    # difflib rates case as heavily as any other letter.
    lower = {str(n).lower(): str(n) for n in names}
    close = difflib.get_close_matches(name.lower(), list(lower), n=1, cutoff=0.6)
    return lower[close[0]] if close else None


def _list(names: Any) -> str:
    names = [f"'{n}'" for n in names]
    shown = ", ".join(names[:4])
    return shown + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _plates(site: Site) -> dict[str, Any]:
    """Vectorised plates around a site, by name."""
    return {f.name: f for f in site["cond_indep_stack"] if f.vectorized}


def _batch(fn: Any) -> tuple[int, ...]:
    """Batch shape without leading ones, which broadcasting does not count."""
    shape = tuple(fn.batch_shape)
    while shape[:1] == (1,):
        shape = shape[1:]
    return shape


def _clash(site: Site) -> bool:
    """Whether a value cannot be one of its distribution, by shape alone."""
    fn, value = site["fn"], site["value"]
    if not isinstance(value, Tensor):
        return False
    split = value.dim() - fn.event_dim
    if split < 0 or value.shape[split:] != fn.event_shape:
        return True
    sizes = zip(reversed(value.shape[:split]), reversed(fn.batch_shape), strict=False)
    return any(a != b and 1 not in (a, b) for a, b in sizes)


def _support(fn: Any) -> Any:
    try:
        return fn.support
    except (AttributeError, NotImplementedError):
        return None


def _strip(support: Any) -> Any:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


# Sets whose entries depend on each other, so that no box lies inside: name -> constraint.
_JOINT_KINDS = {
    "the simplex": "simplex",
    "positive ordered vectors": "positive_ordered_vector",
    "ordered vectors": "ordered_vector",
    "Cholesky factors of correlation matrices": "corr_cholesky",
    "unit lower-triangular matrices": "unit_lower_cholesky",
    "lower Cholesky factors": "lower_cholesky",
    "lower-triangular matrices": "lower_triangular",
    "correlation matrices": "corr_matrix",
    "positive definite matrices": "positive_definite",
    "the unit sphere": "sphere",
    "one-hot vectors": "one_hot",
}
_BOXES = (
    constraints.greater_than,
    constraints.greater_than_eq,
    constraints.less_than,
    constraints.interval,
    constraints.half_open_interval,
    constraints.integer_interval,
    type(constraints.nonnegative_integer),
)


def _kind(support: Any) -> str | None:
    support = _strip(support)
    for kind, name in _JOINT_KINDS.items():
        if isinstance(support, type(getattr(constraints, name))):
            return kind
    return None


@dataclass
class _Box:
    """Entry-wise bounds; a scalar's support, or that of independent entries."""

    lower: Any = -torch.inf
    upper: Any = torch.inf
    discrete: bool = False

    def bounds(self) -> tuple[Tensor, Tensor]:
        # Single precision and a slack, since a bound computed twice may differ in the last digit.
        return torch.as_tensor(self.lower).float(), torch.as_tensor(self.upper).float()

    def inside(self, other: _Box) -> bool:
        (lower, upper), (other_lower, other_upper) = self.bounds(), other.bounds()
        try:
            return bool(
                (lower >= other_lower - 1e-5 * (1 + _finite(other_lower))).all()
                and (upper <= other_upper + 1e-5 * (1 + _finite(other_upper))).all()
            )
        except RuntimeError:  # bounds that do not broadcast: shapes are another check's matter
            return True

    def constraint(self) -> str:
        lower, upper = (_number(bound) for bound in self.bounds())
        if upper == "inf":
            return f"constraints.greater_than({lower})"
        if lower == "-inf":
            return f"constraints.less_than({upper})"
        return f"constraints.interval({lower}, {upper})"

    def __str__(self) -> str:
        lower, upper = self.bounds()
        if self.discrete:
            return f"integers from {_number(lower)} to {_number(upper)}"
        return f"({_number(lower)}, {_number(upper)})"


def _finite(bound: Tensor) -> Tensor:
    return torch.where(torch.isfinite(bound), bound.abs(), torch.zeros_like(bound))


def _number(bound: Tensor) -> str:
    return f"{bound.min().item():g}" + ("" if bound.min() == bound.max() else ", ...")


def _box(support: Any) -> _Box | None:
    support = _strip(support)
    if isinstance(support, constraints.MixtureSameFamilyConstraint):
        box = _box(support.base_constraint)
        # Bounds that differ between components have a dimension that values do not have.
        return box if box and all(bound.numel() == 1 for bound in box.bounds()) else None
    if isinstance(support, type(constraints.real)):
        return _Box()
    if isinstance(support, type(constraints.boolean)):
        return _Box(0, 1, discrete=True)
    if isinstance(support, _BOXES):
        return _Box(
            getattr(support, "lower_bound", -torch.inf),
            getattr(support, "upper_bound", torch.inf),
            support.is_discrete,
        )
    return None


def _reach(fn: Any) -> _Box | None:
    """The box a distribution's draws fill, through its transforms; None if that is not known.

    ``TransformedDistribution.support`` is the last codomain, which for an affine map is the whole
    line whatever went in.
    """
    while isinstance(fn, dist.Independent | dist.MaskedDistribution | dist.ExpandedDistribution):
        fn = fn.base_dist
    if not isinstance(fn, torch.distributions.TransformedDistribution):
        return _box(_support(fn))
    box = _reach(fn.base_dist)
    for transform in fn.transforms:
        box = _image(transform, box)
    return box


def _image(transform: Any, box: _Box | None) -> _Box | None:
    """Image of a box under an increasing or decreasing map of each entry."""
    if isinstance(transform, transforms.ComposeTransform):
        for part in transform.parts:
            box = _image(part, box)
        return box
    if isinstance(transform, transforms.IndependentTransform):
        return _image(transform.base_transform, box)
    codomain = _box(transform.codomain)
    entrywise = transform.domain.event_dim == 0 and transform.codomain.event_dim == 0
    if box is None or not entrywise or not transform.bijective:
        return None if isinstance(transform, transforms.AffineTransform) else codomain
    domain = _box(transform.domain)
    if domain and domain.inside(box):
        return codomain
    try:
        ends = [transform(end) for end in box.bounds()]
    except (RuntimeError, ValueError):
        return codomain
    if any(torch.isnan(end).any() for end in ends):
        return codomain
    return _Box(torch.minimum(*ends), torch.maximum(*ends))


def _support_text(fn: Any) -> str:
    box = _reach(fn)
    return str(box) if box else _kind(_support(fn)) or str(_support(fn))


def _outside(support: Any, value: Tensor, edge: bool = False) -> Tensor | None:
    """What lies outside a support by more than rounding; None if that is not known.

    Entry by entry for bounds, else event by event. The edge of an interval counts as outside only
    if asked: exp underflows to 0 and a sigmoid rounds to 1.
    """
    if support is None:
        return None
    box = _box(support)
    if box and not box.discrete and not edge:
        return ~((value >= box.lower) & (value <= box.upper))
    if _kind(support) == "the simplex":  # torch allows 1e-6, which a long float32 sum exceeds
        return (value < 0).any(-1) | ((value.sum(-1) - 1).abs() > 1e-3)
    try:
        return ~(_strip(support) if box else support).check(value)
    except (NotImplementedError, RuntimeError, ValueError):
        return None


def _replacement(support: Any) -> str:
    """A distribution for a guide of a latent with this support."""
    box, kind = _box(support), _kind(support)
    if _is_discrete(support) or not (box or kind):
        return "the model's own kind of distribution"
    if kind == "the simplex":
        return "dist.Dirichlet(concentration)"
    if str(box) == "(0, inf)":
        return "dist.LogNormal(loc, scale)"
    if str(box) == "(0, 1)":
        return "dist.Beta(concentration1, concentration0)"
    constraint = f"constraints.{_JOINT_KINDS[kind]}" if kind else box.constraint()  # type: ignore
    return (
        "dist.TransformedDistribution(dist.Normal(loc, scale), "
        f"torch.distributions.biject_to({constraint}))"
    )


def _is_delta(fn: Any) -> bool:
    while isinstance(fn, dist.Independent | dist.MaskedDistribution | dist.ExpandedDistribution):
        fn = fn.base_dist
    return isinstance(fn, dist.Delta)


# --- the guide ------------------------------------------------------------------------------------


def private_guide(model: Callable[..., Any], guide: Any) -> Any:
    """A copy of the guide that a fit or a check may set up and change.

    Functions are returned as they are; an autoguide class is built on the model. Two shortcomings
    of Pyro's autoguides are mended: copying makes the copy and the original forget their model,
    and their starting values are drawn from the prior, which an improper prior does not allow.
    """
    if isinstance(guide, type) and issubclass(guide, AutoGuide):
        guide = guide(model)
    if not isinstance(guide, torch.nn.Module):
        return guide
    autos = [m for m in guide.modules() if isinstance(m, AutoGuide)]
    kept = [(auto._model, auto.master) for auto in autos]
    try:
        twin = copy.deepcopy(guide)
    finally:
        for auto, (its_model, master) in zip(autos, kept, strict=True):
            auto._model, auto.master = its_model, master
    copies = [m for m in twin.modules() if isinstance(m, AutoGuide)]
    for auto, ((fn,), _) in zip(copies, kept, strict=True):
        handler, inner = _handler(fn)
        if isinstance(handler, InitMessenger):
            fn = InitMessenger(functools.partial(_first_value, handler.init_fn))(inner)
        auto._model = (fn,)
    return twin


def _first_value(init: Callable[[Site], Tensor], site: Site) -> Tensor:
    try:
        return init(site)
    except NotImplementedError:  # no draws from an improper prior
        transform = biject_to(site["fn"].support)
        return transform(torch.zeros(transform.inverse_shape(site["fn"].shape())))


def _fixed_transforms(guide: Any) -> set[str]:
    """Sites whose support an autoguide has fixed when it was set up."""
    if not isinstance(guide, AutoGuide):
        return set()
    parts = [m for m in guide.modules() if isinstance(m, AutoGuide)]
    return {
        name
        for part in parts
        if not isinstance(part, AutoGuideList | AutoCallable) and part.prototype_trace is not None
        for name, site in part.prototype_trace.nodes.items()
        if site.get("type") == "sample" and not site["is_observed"]
    }


# --- the checks -----------------------------------------------------------------------------------


class _Checks:
    """The checks that need model and guide to run."""

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        data: dict[str, Any],
        reparameterised: bool | None,
        enumerated: bool,
    ):
        self.model = model
        self.guide = guide
        self.data = data
        self.reparameterised = reparameterised
        self.enumerated = enumerated
        self.known: dict[str, Site] = {}  # the model's sites, once it has run
        self.guide_name = "guide"
        if isinstance(guide, AutoGuide):
            self.guide_name = f"guide {type(guide).__name__}"

    def run(self, subsample: Mapping[str, int]) -> str | None:
        """All checks; returns a warning, if there is one."""
        runs = []
        for prior in (False, True, True):
            alone = _run_model(self.model, self.data, _Start(self.data, prior))
            runs.append(alone)
            if alone.error is None:
                self.known = alone.sites
                self._check_model(alone, subsample)
                break
            if not _numerical(alone.error):
                raise self._explained("model", alone) from alone.error
        guide = self._run_guide()
        self._check_guide(guide)
        replayed = self._replay(guide)
        runs.append(replayed)
        known = alone
        if alone.error is not None:
            self._check_densities(runs)
            known = next(run for run in runs if run.error is None)
            self._check_model(known, subsample)
        self._check_sites(known, guide)
        self._check_plates(known, guide)
        for name, site in guide.latents().items():
            # Bounds may depend on other latents: the model's at the guide's values, where reached.
            if name in known.sites:
                self._check_site(name, replayed.sites.get(name, known.sites[name]), site)
        if replayed.error is not None and not _numerical(replayed.error):
            raise self._explained("model", replayed, " on the guide's draws") from replayed.error
        if fixed := _fixed_transforms(self.guide):
            prior_run = _run_model(self.model, self.data, _Start(self.data, prior=True))
            if prior_run.error is None:
                runs.append(prior_run)
                self._check_fixed_supports(fixed, known, prior_run)
        self._check_densities(runs)
        return self._unobserved(known)

    def _run_guide(self) -> _Run:
        guide = _Run()
        for validate in (True, False, False):
            # An autoguide runs the model; fits do so without validation.
            with pyro.validation_enabled(validate):
                guide = _run(self.guide, self.data)
            if not _numerical(guide.error):
                break
        if guide.error is not None:
            raise self._explained("guide", guide) from guide.error
        return guide

    def _replay(self, guide: _Run) -> _Run:
        return _run_model(self.model, self.data, _Start(self.data, prior=True), _Replay(guide))

    # -- errors of a run

    def _explained(self, role: str, run: _Run, when: str = "") -> PreflightError:
        """The sentence for an exception that the model or guide raised."""
        error, text = run.error, str(run.error)
        label = self.guide_name if role == "guide" else role
        if match := re.search(r"Multiple sample sites named '(.+)'", text):
            name = match[1]
            if name in run.plates:
                return PreflightError(
                    f"The {role} makes the plate '{name}' twice.",
                    site=name,
                    remedy=f'Make it once, plate = pyro.plate("{name}", ...), and enter it again '
                    "with `with plate:`.",
                )
            return PreflightError(
                f"The {role} has two sites named '{name}'.",
                site=name,
                remedy=f'Give each its own name, e.g. f"{name}_{{i}}" inside a loop.',
            )
        if match := re.search(r"^(\S+) is already in the trace as a (\w+)", text):
            return PreflightError(
                f"The {role} uses the name '{match[1]}' for a parameter and for a sample site.",
                site=match[1],
                remedy="Rename one of them.",
            )
        if match := re.search(
            r"Shape mismatch inside plate\('(.+)'\) at site (\S+) dim (-\d+), (\d+) vs (\d+)", text
        ):
            plate, site, dim, size, actual = match.groups()
            return PreflightError(
                f"In the {role}, plate '{plate}' has size {size} but site '{site}' inside it has "
                f"size {actual} in dimension {dim}.",
                site=site,
                remedy=f'Size the plate by the data, pyro.plate("{plate}", {actual}), or move a '
                "dimension that is not the plate's into .to_event(1).",
            )
        if match := re.search(r'at plates "(.+)" and "(.+)", collide at dim=(-\d+)', text):
            return PreflightError(
                f"In the {role}, plates '{match[1]}' and '{match[2]}' both claim dimension "
                f"{match[3]}.",
                site=match[1],
                remedy=f"Give one of them another, e.g. dim={int(match[3]) - 1}.",
            )
        if "size cannot be zero" in text and run.plates:
            name = list(run.plates)[-1]
            return PreflightError(
                f"Plate '{name}' of the {role} has size 0.",
                site=name,
                remedy="Size it by data that are not empty.",
            )
        if role == "model" and run.last in run.sites and _clash(run.sites[run.last]):
            return self._clash_error(run.last, run.sites[run.last])
        if match := re.search(r"cannot handle discrete sample site '(.+?)'", text):
            return self._missing_discrete(match[1])
        if "does not support sequential pyro.plate" in text:
            return PreflightError(
                f"The {label} cannot have a latent inside a loop over a plate.",
                site=run.last,
                remedy="Write the plate as a context, `with pyro.plate(...):`, or write the guide "
                "by hand.",
            )
        if "does not support sampling" in text:
            improper = [n for n, s in self.known.items() if _name(s["fn"]) == "ImproperUniform"]
            return PreflightError(
                f"The {label} draws from the prior of {_list(improper)}, which is improper.",
                site=improper[0] if improper else None,
                remedy="Use AutoNormal or AutoMultivariateNormal, which do not, or a proper prior.",
            )
        by_hand = role == "model" or not isinstance(self.guide, AutoGuide)
        if (
            by_hand
            and not when
            and not _numerical(error)
            and (conversion := self._conversion(role, run))
        ):
            return conversion
        after = f", at or after site '{run.last}'" if run.last else ""
        remedy = f"Run {role}(**data) by itself to find the line."
        if "same device" in text:
            remedy = "Put the data and everything the model makes on one device."
        elif when:
            remedy = "Compare the shapes and values that the guide returns with the model's own."
        return PreflightError(
            f"The {label} raised {type(error).__name__} when run on the data{when}{after}: "
            f"{_line(error)}" + ("" if _line(error).endswith((".", "!", "?")) else "."),
            site=run.last,
            remedy=remedy,
        )

    def _clash_error(self, name: str, site: Site) -> PreflightError:
        fn, shape = site["fn"], tuple(site["value"].shape)
        what = "Observed site" if site["is_observed"] else "Site"
        inside = "".join(
            f", inside plate '{f.name}' of size {f.size}" for f in _plates(site).values()
        )
        return PreflightError(
            f"{what} '{name}' has a value of shape {_shape(shape)}, but its distribution has batch "
            f"shape {_shape(fn.batch_shape)} and event shape {_shape(fn.event_shape)}{inside}.",
            site=name,
            remedy="Size plates and parameters by the data, e.g. "
            'pyro.plate("observations", len(y)), and index the data by the plate if it subsamples.',
        )

    def _conversion(self, role: str, run: _Run) -> PreflightError | None:
        """Which entries of the data would have to be of another type for the run to go through."""
        fn = self.model if role == "model" else self.guide

        def works(data: dict[str, Any]) -> bool:
            if role == "model":
                error = _run_model(fn, data, _Start(self.data)).error
            else:
                error = _run(fn, data).error
            return error is None or _numerical(error)

        default = torch.get_default_dtype()
        to_float = ".double()" if default == torch.float64 else ".float()"
        other = torch.float32 if default == torch.float64 else torch.float64
        foreign = [k for k, v in self.data.items() if _is_array_like(v)]
        integers = [
            k
            for k, v in self.data.items()
            if isinstance(v, Tensor) and not v.is_floating_point() and not v.is_complex()
        ]
        floats = [
            k for k, v in self.data.items() if isinstance(v, Tensor) and v.is_floating_point()
        ]
        told = f"{type(run.error).__name__}: {_line(run.error)}"

        def as_float(value: Any) -> Tensor:
            return _as_tensor(value).to(default)

        if keys := self._smallest(works, foreign, _as_tensor):
            make = " and ".join(_recipe(k, self.data[k]) for k in keys)
            return PreflightError(
                f"{_entries(keys)} {_is_are(keys)} {_types(self.data, keys)} where the {role} "
                f"needs {'tensors' if len(keys) > 1 else 'a tensor'} ({told}).",
                site=keys[0],
                remedy=f"Pass {make}.",
            )
        if keys := self._smallest(works, integers, as_float):
            make = " and ".join(_entry(k) + to_float for k in keys)
            return PreflightError(
                f"{_entries(keys)} {_is_are(keys)} {_types(self.data, keys)} where the {role} "
                f"needs floats ({told}).",
                site=keys[0],
                remedy=f"Pass {make}.",
            )
        if keys := self._smallest(works, foreign, as_float):
            make = " and ".join(_recipe(k, self.data[k]) + to_float for k in keys)
            return PreflightError(
                f"{_entries(keys)} {_is_are(keys)} {_types(self.data, keys)} where the {role} "
                f"needs float tensors ({told}).",
                site=keys[0],
                remedy=f"Pass {make}.",
            )
        if keys := self._smallest(works, floats, lambda v: v.to(other)):
            name, back = str(other).removeprefix("torch."), str(default).removeprefix("torch.")
            return PreflightError(
                f"{_entries(keys)} {_is_are(keys)} {back}, but the {role} computes in {name} "
                f"({told}).",
                site=keys[0],
                remedy="Pass " + " and ".join(f"{_entry(k)}.to({other})" for k in keys) + ".",
            )
        return None

    def _smallest(
        self,
        works: Callable[[dict[str, Any]], bool],
        keys: list[str],
        convert: Callable[[Any], Any],
    ) -> list[str] | None:
        """The smallest set of entries whose conversion lets the run go through."""
        sets = itertools.chain.from_iterable(
            itertools.combinations(keys, size) for size in range(1, len(keys) + 1)
        )
        for some in itertools.islice(sets, 64):
            try:
                converted = {key: convert(self.data[key]) for key in some}
            except (TypeError, ValueError, RuntimeError):
                continue
            if works({**self.data, **converted}):
                return list(some)
        return None

    # -- the model by itself

    def _check_model(self, run: _Run, subsample: Mapping[str, int]) -> None:
        if not run.latents():
            observed = f" (observed: {_list(run.observed())})" if run.observed() else ""
            raise PreflightError(
                f"The model has no latent variable{observed}.",
                remedy="Sample what is to be inferred with pyro.sample(name, prior), without obs.",
            )
        for name, site in run.sites.items():
            if site["is_observed"] and "log_prob" in site:
                self._check_broadcast(name, site)
            if self.enumerated and not site["infer"].get("_deterministic"):
                self._check_declared(name, site)
        self._check_subsample(run, subsample)
        self._check_latents(run)

    def _unobserved(self, run: _Run) -> str | None:
        """A warning for data that are not observed; an observation left out is an error."""
        if run.observed():
            return None
        signature = _signature(self.model)
        for p in signature.parameters.values() if signature else ():
            if p.default is None and self.data.get(p.name) is None:
                raise PreflightError(
                    f"The model observes nothing: its argument '{p.name}' is None.",
                    site=p.name,
                    remedy=f"Add {_entry(p.name)}.",
                )
        if not self.data:
            return None
        return (
            "The model observes nothing, so the posterior is the prior; if the data are meant as "
            "observations, pass them with obs= in pyro.sample."
        )

    def _check_broadcast(self, name: str, site: Site) -> None:
        """An observation of shape (n,) against a mean of shape (n, 1) counts n^2 terms."""
        fn, value = site["fn"], site["value"]
        if type(fn).__name__ == "Unit" or not isinstance(value, Tensor):
            return
        batch = value.shape[: value.dim() - fn.event_dim]
        declared = {f.dim for f in _plates(site).values()}
        sizes = itertools.zip_longest(
            reversed(batch), reversed(site["log_prob"].shape), fillvalue=1
        )
        for i, (size, actual) in zip(itertools.count(1), sizes):
            if size == 1 < actual and -i not in declared and batch.numel() > 1:
                raise PreflightError(
                    f"Observed site '{name}' has a value of shape {_shape(value.shape)}, but its "
                    f"distribution has batch shape {_shape(fn.batch_shape)}, so that every "
                    f"observation is counted {actual} times.",
                    site=name,
                    remedy="Give the distribution's parameters the observation's shape, e.g. "
                    "mean.squeeze(-1).",
                )

    def _check_declared(self, name: str, site: Site) -> None:
        """Enumeration takes every batch dimension outside a plate for one of its own."""
        declared = {f.dim for f in _plates(site).values()}
        batch = tuple(site["fn"].batch_shape)
        for i, size in zip(itertools.count(1), reversed(batch)):
            if size > 1 and -i not in declared:
                raise PreflightError(
                    f"Site '{name}' has batch shape {_shape(batch)} but no plate for dimension "
                    f"{-i}, which enumeration needs.",
                    site=name,
                    remedy=f'Sample it inside pyro.plate("...", {size}, dim={-i}), or call '
                    ".to_event(1) if the entries are one event.",
                )

    def _check_subsample(self, run: _Run, subsample: Mapping[str, int]) -> None:
        for name, batch in subsample.items():
            if name not in run.plates:
                twin = _nearest(name, run.plates)
                has = f"it has {_list(run.plates)}" if run.plates else "it has none"
                raise PreflightError(
                    f"subsample names the plate '{name}', which the model does not have ({has}).",
                    site=name,
                    remedy=f"Write '{twin}'." if twin else "Name a plate of the model.",
                )
            size = run.plates[name][0]
            try:
                whole = not isinstance(batch, bool) and operator.index(batch) is not None
            except TypeError:
                whole = False
            if not whole or not 1 <= batch <= size:
                raise PreflightError(
                    f"subsample asks for {batch!r} of the {size} in plate '{name}'.",
                    site=name,
                    remedy=f"Give a whole number from 1 to {size}.",
                )

    def _check_latents(self, run: _Run) -> None:
        declared = _declared_latents(self.model)
        latents = run.latents()
        for name, dims in (declared or {}).items():
            if name not in run.sites:
                twin = _nearest(name, latents)
                raise PreflightError(
                    f"LATENTS names '{name}', which is no site of the model (its latents: "
                    f"{_list(latents)}).",
                    site=name,
                    remedy=f"Write '{twin}' there." if twin else "Remove it there.",
                )
            if name not in latents:
                continue  # made deterministic or observed by an effect handler
            site = latents[name]
            if not isinstance(dims, tuple | list):
                raise PreflightError(
                    f"LATENTS['{name}'] is {_a(dims)}.",
                    site=name,
                    remedy='Give a tuple of dims: () for a scalar, ("groups",) for a plate.',
                )
            for plate in _plates(site):
                if plate not in dims:
                    what = "a global scalar" if not dims else f"of dims {tuple(dims)}"
                    raise PreflightError(
                        f"LATENTS declares '{name}' {what}, but the model samples it inside plate "
                        f"'{plate}'.",
                        site=name,
                        remedy=f"Move its pyro.sample out of the plate, or add '{plate}' to its "
                        "dims if each member has its own.",
                    )
            # A plate at dim=-2 leaves a dimension of size 1 on its right that nobody declared.
            shape = tuple(site["fn"].shape())
            batch = len(site["fn"].batch_shape)
            in_plates = {f.dim for f in _plates(site).values()}
            kept = tuple(
                n
                for i, n in zip(range(len(shape)), shape, strict=True)
                if i >= batch or n > 1 or i - batch in in_plates
            )
            actual = shape if len(shape) == len(dims) else kept
            sizes_fit = all(
                d == n for d, n in zip(dims, actual, strict=False) if isinstance(d, int)
            )
            if len(actual) != len(dims) or not sizes_fit:
                raise PreflightError(
                    f"LATENTS declares '{name}' with dims {tuple(dims)}, but the model samples it "
                    f"with shape {_shape(actual)}.",
                    site=name,
                    remedy="Correct the one or the other: a name or size for each dimension.",
                )

    # -- the guide, and the two together

    def _check_guide(self, guide: _Run) -> None:
        for name, site in guide.sites.items():
            infer = site["infer"]
            if site["is_observed"]:
                if not infer.get("_deterministic") and not infer.get("is_auxiliary"):
                    raise PreflightError(
                        f"The guide observes '{name}'.",
                        site=name,
                        remedy="Remove its obs=: data enter through the model, and a guide only "
                        "samples latents.",
                    )
                continue
            value = site["value"]
            if isinstance(value, Tensor) and torch.isnan(value).any():
                raise PreflightError(
                    f"The guide's draw of '{name}' is nan{_at(_first(torch.isnan(value)))}.",
                    site=name,
                    remedy="Check the initial values of the parameters it depends on.",
                )
            enumerated = self.enumerated and infer.get("enumerate")
            if self.reparameterised and not enumerated and not site["fn"].has_rsample:
                raise PreflightError(
                    f"The guide's {_name(site['fn'])} at site '{name}' has no reparameterised "
                    "draws, which this estimator needs.",
                    site=name,
                    remedy="Use a reparameterised distribution there, or a score-function "
                    "estimator.",
                )

    def _missing_discrete(self, name: str) -> PreflightError:
        return PreflightError(
            f"The model's latent '{name}' is discrete and the guide does not sample it.",
            site=name,
            remedy='Mark it infer={"enumerate": "parallel"}, hide it from an autoguide with '
            f'poutine.block(model, hide=["{name}"]) and use an enumerating estimator, or sum it '
            "out of the model, e.g. with dist.MixtureSameFamily.",
        )

    def _check_sites(self, model: _Run, guide: _Run) -> None:
        latents, sampled = model.latents(), guide.latents()
        extra = [
            name
            for name, site in sampled.items()
            if name not in latents and not site["infer"].get("is_auxiliary")
        ]
        missing = []
        for name, site in latents.items():
            if name in sampled:
                continue
            if self.enumerated and site["infer"].get("enumerate") == "parallel":
                continue
            missing.append(name)
        for name in missing:
            site = latents[name]
            if site["fn"].has_enumerate_support or _is_discrete(_support(site["fn"])):
                if self.enumerated and site["infer"].get("enumerate") == "sequential":
                    raise PreflightError(
                        f"The model's latent '{name}' asks for sequential enumeration, which works "
                        "only for sites of the guide.",
                        site=name,
                        remedy='Use infer={"enumerate": "parallel"}.',
                    )
                raise self._missing_discrete(name)
        if missing:
            name = missing[0]
            twin = _nearest(name, extra)
            also = f" (nor {_list(missing[1:])})" if missing[1:] else ""
            remedy = f'Add pyro.sample("{name}", ...) to the guide.'
            if twin:
                remedy = f"Rename the guide's '{twin}' to '{name}'."
            elif isinstance(self.guide, AutoGuide):
                remedy = "Build the autoguide from this model, without hiding the site."
            raise PreflightError(
                f"The guide does not sample the model's latent '{name}'{also}.",
                site=name,
                remedy=remedy,
            )
        for name in extra:
            if name in model.sites:
                how = "observes"
                if model.sites[name]["infer"].get("_deterministic"):
                    how = "computes (pyro.deterministic)"
                raise PreflightError(
                    f"The guide samples '{name}', which the model {how}.",
                    site=name,
                    remedy="Remove it from the guide.",
                )
            twin = _nearest(name, latents)
            hint = f"; did you mean '{twin}'?" if twin else "."
            raise PreflightError(
                f"The guide samples '{name}', which is no site of the model{hint}",
                site=name,
                remedy='Remove or rename it, or mark it infer={"is_auxiliary": True}.',
            )

    def _check_plates(self, model: _Run, guide: _Run) -> None:
        for name in guide.plates.keys() & model.plates.keys():
            (size, batch), (guide_size, guide_batch) = model.plates[name], guide.plates[name]
            if size != guide_size:
                remedy = f'Write pyro.plate("{name}", {size}) in the guide too.'
                if isinstance(self.guide, AutoGuide):
                    remedy = "The autoguide was set up on other data: build a new one."
                raise PreflightError(
                    f"Plate '{name}' has size {size} in the model and {guide_size} in the guide.",
                    site=name,
                    remedy=remedy,
                )
            if None not in (batch, guide_batch) and batch != guide_batch:
                raise PreflightError(
                    f"Plate '{name}' has subsample_size {batch} in the model and {guide_batch} in "
                    "the guide.",
                    site=name,
                    remedy="Use the same in both.",
                )

    def _check_site(self, name: str, model: Site, guide: Site) -> None:
        """Shape, plates and support of one latent."""
        p, q = model["fn"], guide["fn"]
        for plate, frame in _plates(model).items():
            if plate not in _plates(guide):
                twin = _nearest(plate, _plates(guide))
                called = f" (it is inside '{twin}')" if twin else ""
                raise PreflightError(
                    f"The model samples '{name}' inside plate '{plate}', the guide does not"
                    f"{called}.",
                    site=name,
                    remedy=f'Sample it inside `with pyro.plate("{plate}", '
                    f"{frame.full_size or frame.size}):` in the guide, as in the model.",
                )
        if p.event_shape != q.event_shape or _batch(p) != _batch(q):
            if p.event_dim > q.event_dim:
                remedy = f"Call .to_event({p.event_dim - q.event_dim}) on the guide's distribution."
                if p.event_shape != q.shape()[len(q.shape()) - p.event_dim :]:
                    remedy = (
                        f"Give its parameters the shape {_shape(p.shape())} and call "
                        f".to_event({p.event_dim - q.event_dim})."
                    )
                if _is_delta(q):
                    remedy = f"Write dist.Delta(..., event_dim={p.event_dim}) in the guide."
            elif p.event_dim < q.event_dim:
                remedy = (
                    f"Sample it with .to_event({p.event_dim}) in the guide"
                    if p.event_dim
                    else "Sample it without .to_event in the guide"
                )
                remedy += ", inside the model's plates; a joint draw over a plate is an auxiliary "
                remedy += "site whose entries go to dist.Delta inside the plate."
            else:
                remedy = (
                    f"Give the guide's parameters the shape {_shape(p.shape())}, and put it inside "
                    "the model's plates."
                )
            raise PreflightError(
                f"Site '{name}' has batch shape {_shape(p.batch_shape)} and event shape "
                f"{_shape(p.event_shape)} in the model, {_shape(q.batch_shape)} and "
                f"{_shape(q.event_shape)} in the guide.",
                site=name,
                remedy=remedy,
            )
        # An autoguide maps onto the supports it has seen; see _check_fixed_supports.
        if not _is_delta(p) and name not in _fixed_transforms(self.guide):
            self._check_support(name, model, guide)

    def _check_support(self, name: str, model: Site, guide: Site) -> None:
        p, q, value = model["fn"], guide["fn"], guide["value"]
        support = _support(p)
        box, kind = _box(support), _kind(support)
        reach, guide_kind = _reach(q), _kind(_support(q))
        if not _is_delta(q):
            if kind and kind == guide_kind:
                return
            wrong = (kind and reach and not guide_kind) or (
                box
                and reach
                and (not reach.inside(box) or box.discrete != _is_discrete(_support(q)))
            )
            if wrong:
                raise PreflightError(
                    f"At site '{name}' the guide's {_name(q)} has support {_support_text(q)}, "
                    f"which is not inside that of the model's {_name(p)}, {_support_text(p)}.",
                    site=name,
                    remedy=f"Use {_replacement(support)} in the guide.",
                )
        outside = _outside(support, value)
        if outside is not None and outside.any():
            index = _first(outside)
            raise PreflightError(
                f"The guide's draw {_entry_text(value, index)} of '{name}'{_at(index)} lies outside "
                f"the support of the model's {_name(p)}, {_support_text(p)}.",
                site=name,
                remedy="Constrain what the guide returns there, e.g. with "
                "pyro.param(..., constraint=...) or biject_to(the model's support).",
            )

    def _check_fixed_supports(self, fixed: set[str], one: _Run, other: _Run) -> None:
        for name in fixed & one.sites.keys() & other.sites.keys():
            sites = one.sites[name], other.sites[name]
            if any(f.full_size not in (None, f.size) for f in _plates(sites[0]).values()):
                continue  # two different minibatches
            a, b = (_box(_support(site["fn"])) for site in sites)
            if a and b and not (a.inside(b) and b.inside(a)):
                raise PreflightError(
                    f"The support of '{name}' depends on other latents ({a} in one draw, {b} in "
                    f"another), but {type(self.guide).__name__} fixes it when it is set up.",
                    site=name,
                    remedy=f"Sample a '{name}_unit' with a fixed support and compute '{name}' from "
                    "it with pyro.deterministic, or write the guide by hand.",
                )

    def _check_densities(self, runs: list[_Run]) -> None:
        """A density that is finite nowhere. Starts are many, so one good draw is enough."""
        if _passed(runs):
            return
        for i in range(GUIDE_DRAWS + PRIOR_DRAWS):
            if i < PRIOR_DRAWS:
                runs.append(_run_model(self.model, self.data, _Start(self.data, prior=True)))
            else:
                guide = _run(self.guide, self.data)
                if guide.error is None:
                    runs.append(self._replay(guide))
            if _passed(runs):
                return
        complete = [run for run in runs if run.error is None]
        if not complete:
            raise self._explained("model", runs[-1]) from runs[-1].error
        name = next(n for n in complete[-1].problems if all(n in r.problems for r in complete))
        what = "observed" if complete[-1].sites[name]["is_observed"] else "latent"
        fn = _name(complete[-1].sites[name]["fn"])
        remedy = f"Correct the data, or use another distribution than {fn}."
        if what == "latent":
            remedy = f"Check the parameters of its {fn}, or start the guide elsewhere."
        if fn == "Unit":
            remedy = "Check what the pyro.factor adds up."
        raise PreflightError(
            f"At the {what} site '{name}', {complete[-1].problems[name]}, in every one of "
            f"{len(complete)} draws of the prior and the guide.",
            site=name,
            remedy=remedy,
        )


def _passed(runs: list[_Run]) -> bool:
    complete = [run.problems.keys() for run in runs if run.error is None]
    return bool(complete) and not set.intersection(*(set(keys) for keys in complete))


def _declared_latents(model: Any) -> Mapping[str, Any] | None:
    """``LATENTS`` of the model or of its module, where ``model`` is the module's model."""
    fn = _unwrap(model)
    while isinstance(fn, functools.partial):
        fn = fn.func
    if isinstance(latents := getattr(fn, "LATENTS", None), Mapping):
        return latents
    module = sys.modules.get(getattr(fn, "__module__", None) or "")
    latents = getattr(module, "LATENTS", None)
    # A module may hold several models; its LATENTS are those of `model`.
    if isinstance(latents, Mapping) and getattr(module, "model", fn) is fn:
        return latents
    return None


def _is_discrete(support: Any) -> bool:
    try:
        return bool(support.is_discrete)
    except (AttributeError, NotImplementedError):
        return False


def _is_array_like(value: Any) -> bool:
    if isinstance(value, Tensor | str | bytes | Mapping):
        return False
    return isinstance(value, np.ndarray | list | tuple) or hasattr(value, "to_numpy")


def _as_tensor(value: Any) -> Tensor:
    """A tensor of a list, array or pandas object; floats in the default dtype."""
    tensor = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    return tensor.to(torch.get_default_dtype()) if tensor.is_floating_point() else tensor


def _recipe(key: str, value: Any) -> str:
    if isinstance(value, Tensor):
        return _entry(key)
    return f"torch.as_tensor({_entry(key)}{'.to_numpy()' if hasattr(value, 'to_numpy') else ''})"


def _entries(keys: list[str]) -> str:
    return " and ".join(_entry(key) for key in keys)


def _is_are(keys: list[str]) -> str:
    return "are" if len(keys) > 1 else "is"


def _types(data: Mapping[str, Any], keys: list[str]) -> str:
    def kind(value: Any) -> str:
        if isinstance(value, Tensor):
            return str(value.dtype).removeprefix("torch.")
        module = type(value).__module__.partition(".")[0]
        name = type(value).__name__
        return f"a {name}" if module == "builtins" else f"a {module}.{name}"

    return " and ".join(dict.fromkeys(kind(data[key]) for key in keys))
