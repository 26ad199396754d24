"""Checks of the shapes of sites: their batch and event dimensions, and their plates."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist

from vi_toolkit.errors import PreflightError
from vi_toolkit.preflight import words
from vi_toolkit.preflight.runs import Run
from vi_toolkit.programs.sites import Site, core, plates


def _undeclared(site: Site, shape: Any) -> dict[int, int]:
    """Batch dimension, counted from the right -> size, of those that belong to no plate."""
    declared = {f.dim for f in plates(site).values()}
    sizes = {i - len(shape): n for i, n in enumerate(shape)}
    return {dim: n for dim, n in sizes.items() if n > 1 and dim not in declared}


def check_broadcast(model: Run) -> None:
    """Check that broadcasting does not count an observation more than once.

    An observation of shape (n,) with a mean of shape (n, 1) counts n^2 terms.
    """
    for name, site in model.observed.items():
        if "log_prob" not in site or isinstance(site["fn"], dist.Unit):
            continue
        fn, shape = site["fn"], tuple(site["value"].shape)
        _check_observation(name, site)
        batch = (1,) * 20 + shape[: len(shape) - fn.event_dim]
        for dim, size in _undeclared(site, site["log_prob"].shape).items():
            if batch[dim] == 1 and max(batch) > 1:
                raise PreflightError(
                    f"Observed site '{name}' has a value of shape {shape}, but its distribution "
                    f"has batch shape {tuple(fn.batch_shape)}, so that every observation is "
                    f"counted {size} times.",
                    name,
                    "Give the distribution's parameters the observation's shape, e.g. "
                    "mean.squeeze(-1).",
                )


def _check_observation(name: str, site: dict[str, Any]) -> None:
    """Check that an observation of shape (n, 1) or (1,) does not meet a plate of n rows."""
    fn, value = site["fn"], site["value"]
    observed = tuple(value.shape[: value.dim() - fn.event_dim])
    expected = tuple(fn.batch_shape)
    plates = {frame.dim: frame for frame in site["cond_indep_stack"] if frame.vectorized}
    if not observed or not plates:
        return
    for dim, frame in plates.items():
        if frame.size == -1:  # pyro.plate("name") takes the size of what stands in it
            continue
        have = observed[dim] if len(observed) >= -dim else None
        want = expected[dim] if len(expected) >= -dim else 1
        if (have == 1 and want > 1) or (have is not None and have > 1 and want == 1):
            column = len(observed) > len(expected) and have == 1 and observed[0] == want
            raise PreflightError(
                f"Observed site '{name}' has a value of shape {tuple(value.shape)}, but "
                f"plate '{frame.name}' holds {want} of them: broadcasting would count "
                f"{max(observed) * want if column else max(have, want)} terms.",
                name,
                f"Pass {name}.squeeze(-1) (one entry per row)."
                if column
                else f"Give it {want} rows along dimension {dim}.",
            )


def check_enumerable(model: Run) -> None:
    """Check that every batch dimension has a plate.

    Enumeration adds dimensions to the left of all plates, and takes others there for its own.
    """
    for name, site in (model.latents | model.observed).items():
        batch = tuple(site["fn"].batch_shape)
        for dim, size in _undeclared(site, batch).items():
            raise PreflightError(
                f"Site '{name}' has batch shape {batch} but no plate for dimension {dim}, which "
                "enumeration needs.",
                name,
                f'Sample it inside pyro.plate("...", {size}, dim={dim}), or call .to_event(1) if '
                "the entries are one event.",
            )


def check_subsample(model: Run, subsample: Mapping[str, int]) -> None:
    """Check that ``subsample`` names plates of the model, with minibatch sizes that fit them."""
    for name, batch in subsample.items():
        if name not in model.plates:
            twin = words.nearest(name, model.plates)
            raise PreflightError(
                f"subsample names the plate '{name}', which the model does not have (it has "
                f"{words.listed(model.plates) or 'none'}).",
                name,
                f"Write '{twin}'." if twin else "Name a plate of the model.",
            )
        size = model.plates[name][0]
        try:
            good = not isinstance(batch, bool) and 1 <= operator.index(batch) <= size
        except TypeError:
            good = False
        if not good:
            raise PreflightError(
                f"subsample asks for {batch!r} of the {size} in plate '{name}'.",
                name,
                f"Give a whole number from 1 to {size}.",
            )


def check_plates(model: Run, guide: Run, automatic: bool) -> None:
    """Check that plates of one name have one size in model and guide (``automatic``: of Pyro)."""
    for name in guide.plates.keys() & model.plates.keys():
        remedy = f'Write pyro.plate("{name}", {model.plates[name][0]}) in the guide too.'
        sizes = zip(model.plates[name], guide.plates[name], strict=True)
        for what, (ours, theirs) in zip(("size", "subsample_size"), sizes, strict=True):
            if automatic:
                remedy = "The autoguide was set up on other data: build a new one."
            elif what == "subsample_size":
                remedy = "Use the same in both."
            if None not in (ours, theirs) and ours != theirs:
                raise PreflightError(
                    f"Plate '{name}' has {what} {ours} in the model and {theirs} in the guide.",
                    name,
                    remedy,
                )


def check_shape(name: str, model: Site, guide: Site, set_up: bool) -> None:
    """Check that a latent has the same plates and shape in model and guide.

    Args:
        name: of the latent.
        model, guide: its sites.
        set_up: whether the guide's shapes come from an autoguide's earlier run.
    """
    p, q = model["fn"], guide["fn"]
    missing = p.event_dim - q.event_dim
    for plate, frame in plates(model).items():
        if plate not in plates(guide):
            twin = words.nearest(plate, plates(guide))
            size = frame.full_size or frame.size
            remedy = f'Sample it inside `with pyro.plate("{plate}", {size}):` in the guide'
            if missing < 0:
                remedy = (
                    'Draw them jointly at a site marked infer={"is_auxiliary": True}, and pass the '
                    f'entries to dist.Delta inside `with pyro.plate("{plate}", {size}):`'
                )
            raise PreflightError(
                f"The model samples '{name}' inside plate '{plate}', the guide does not"
                f"{f' (it is inside {twin!r})' if twin else ''}.",
                name,
                f"{remedy}.",
            )
    # Leading dimensions of size 1 do not matter, because broadcasting adds and drops them.
    batch, guide_batch = (
        list(itertools.dropwhile(lambda n: n == 1, fn.batch_shape)) for fn in (p, q)
    )
    if p.event_shape == q.event_shape and batch == guide_batch:
        return
    if set_up:
        remedy = "The autoguide was set up on other data or another model: build a new one."
    elif missing > 0 and isinstance(core(q), dist.Delta):
        remedy = f"Write dist.Delta(..., event_dim={p.event_dim}) in the guide."
    elif missing > 0 and q.shape()[-p.event_dim :] == p.event_shape:
        remedy = f"Call .to_event({missing}) on the guide's distribution."
    else:
        event = f"with .to_event({p.event_dim})" if p.event_dim else "without .to_event"
        remedy = f"Give the guide's parameters the shape {tuple(p.shape())}"
        remedy += f", {event}." if missing else "."
    raise PreflightError(
        f"Site '{name}' has batch shape {tuple(p.batch_shape)} and event shape "
        f"{tuple(p.event_shape)} in the model, {tuple(q.batch_shape)} and {tuple(q.event_shape)} "
        "in the guide.",
        name,
        remedy,
    )
