"""Explains what stopped a run, in the user's terms: the site, the data entry and the remedy."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vi_toolkit.errors import PreflightError
from vi_toolkit.preflight import words
from vi_toolkit.preflight.runs import Run, numerical
from vi_toolkit.preflight.sites import missing_discrete
from vi_toolkit.preflight.support import distribution_name
from vi_toolkit.programs.sites import Site, plates

# Pyro's message -> (sentence, remedy). {role} is "model" or "guide"; {who} may name the autoguide.
_PYRO_SAYS = {
    r"Multiple sample sites named '(?P<site>.+)'": (
        "The {role} has two sites named '{site}'.",
        'Give each its own name, e.g. f"{site}_{{i}}" inside a loop.',
    ),
    r"^(?P<site>\S+) is already in the trace as a": (
        "The {role} uses the name '{site}' for a parameter and for a sample site.",
        "Rename one of them.",
    ),
    r"Shape mismatch inside plate\('(?P<plate>.+)'\) at site (?P<site>\S+) "
    r"dim (?P<dim>-\d+), (?P<size>\d+) vs (?P<actual>\d+)": (
        "In the {role}, plate '{plate}' has size {size} but site '{site}' inside it has size "
        "{actual} in dimension {dim}.",
        'Size the plate by the data, pyro.plate("{plate}", {actual}), or move a dimension that is '
        "not the plate's into .to_event(1).",
    ),
    r"not broadcastable with batch_shape\+event_shape|value must match event_shape": (
        "{kind} '{site}' has a value of shape {value}, but its distribution has batch shape "
        "{batch} and event shape {event}{inside}.",
        "{resize}",
    ),
    r'at plates "(?P<site>.+)" and "(?P<other>.+)", collide at dim=(?P<dim>-\d+)': (
        "In the {role}, plates '{site}' and '{other}' both claim dimension {dim}.",
        "Give each its own, e.g. dim=-1 and dim=-2.",
    ),
    r"does not support sequential pyro.plate": (
        "The {who} cannot have a latent inside a loop over a plate.",
        "Write the plate as a context, `with pyro.plate(...):`, or write the guide by hand.",
    ),
    r"size cannot be zero": (
        "Plate '{site}' of the {role} has size 0.",
        "Size it by data that are not empty.",
    ),
    r"does not support sampling": (
        "The {who} draws from the improper prior of '{site}'.",
        "Use AutoNormal or AutoMultivariateNormal, which do not, or a proper prior.",
    ),
}


def cause(
    role: str,
    run: Run,
    data: Mapping[str, Any],
    again: Callable[[dict[str, Any]], Run],
    autoguide: str = "",
    model: Run | None = None,
) -> PreflightError:
    """Explain an exception that the model or guide raised.

    Args:
        role: "model" or "guide".
        run: the run that raised.
        data: the data of that run.
        again: runs the model or guide on other data.
        autoguide: name of the guide's class if it is one of Pyro's autoguides, else "".
        model: a run of the model that succeeded, if there is one.
    """
    error, text, who = run.error, str(run.error), f"{role} {autoguide}".strip()
    # The data are not at fault in an autoguide, because the model has already run on them.
    retry = not (autoguide or run.replayed or numerical(error))
    if retry and (found := _conversion(role, run, data, again)):
        return found
    known = model.sites if model else {}
    improper = [n for n, s in known.items() if distribution_name(s["fn"]) == "ImproperUniform"]
    slots: dict[str, Any] = {"role": role, "who": who, "site": run.last}
    for pattern, (message, remedy) in _PYRO_SAYS.items():
        if match := re.search(pattern, text):
            slots |= match.groupdict()
            if "{kind}" in message:
                if not run.scored:
                    continue  # the model computes this density by itself
                slots |= _sizes(run.sites[run.last])
            if "improper prior" in message:
                slots["site"] = improper[0] if improper else run.last
            elif "has size 0" in message:
                slots["site"] = next(reversed(run.plates), None)
            elif "two sites" in message and slots["site"] in run.plates:
                message = "The {role} makes the plate '{site}' twice."
                remedy = 'Make it once, plate = pyro.plate("{site}", ...), and reuse `with plate:`.'
            return PreflightError(message.format(**slots), slots["site"], remedy.format(**slots))
    if match := re.search(r"cannot handle discrete sample site '(.+?)'", text):
        return missing_discrete(match[1], known.get(match[1]), automatic=True)
    remedy = f"Run {role}(**data) by itself to find the line."
    if "same device" in text:
        remedy = "Put the data and everything the model makes on one device."
    elif run.replayed:
        remedy = "Compare the shapes and values that the guide returns with the model's own."
    after = f" at or after site '{run.last}'" if run.last else ""
    given = ", run on the guide's draws" if run.replayed else ""
    return PreflightError(
        f"The {who} raised {type(error).__name__}{after}{given}: {words.line(error)}",
        run.last,
        remedy,
    )


def _sizes(site: Site) -> dict[str, Any]:
    """The parts of a message about a site's shapes."""
    fn, value, frames = site["fn"], site["value"], plates(site).values()
    resize = 'Size plates and parameters by the data, e.g. pyro.plate("observations", len(y)).'
    if any(f.full_size not in (None, f.size) for f in frames):
        resize = "Index the data by the plate: `with pyro.plate(...) as i:` and obs=y[i]."
    return {
        "resize": resize,
        "kind": "Observed site" if site["is_observed"] else "Site",
        "value": tuple(getattr(value, "shape", ())),
        "batch": tuple(getattr(fn, "batch_shape", ())),
        "event": tuple(getattr(fn, "event_shape", ())),
        "inside": "".join(f", inside plate '{f.name}' of size {f.size}" for f in frames),
    }


def _conversion(
    role: str, run: Run, data: Mapping[str, Any], again: Callable[[dict[str, Any]], Run]
) -> PreflightError | None:
    """Find data entries of the wrong type: the run succeeds once they are converted."""
    default = torch.get_default_dtype()
    other = torch.float32 if default == torch.float64 else torch.float64
    floating = ".double()" if default == torch.float64 else ".float()"
    Group = dict[str, str]  # entry -> expression that makes a tensor of it
    arrays, integers, floats = Group(), Group(), Group()
    for key, value in data.items():
        if isinstance(value, Tensor):
            (floats if value.is_floating_point() else integers)[key] = words.entry(key)
        elif hasattr(value, "to_numpy"):
            arrays[key] = f"torch.as_tensor({words.entry(key)}.to_numpy())"
        elif isinstance(value, np.ndarray | list | tuple):
            arrays[key] = f"torch.as_tensor({words.entry(key)})"
    for group, dtype, needs, suffix in (
        (arrays, None, "needs a tensor", ""),
        (integers, default, "needs floats", floating),
        (arrays, default, "needs a float tensor", floating),
        (floats, default, f"computes in {words.plain(default)}", f".to({default})"),
        (floats, other, f"computes in {words.plain(other)}", f".to({other})"),
    ):
        # All floats share one dtype, so they change together.
        least = len(group) if group is floats else 1
        if keys := _smallest(list(group), least, data, dtype, again):
            values = [data[key] for key in keys]
            types = [words.plain(v.dtype) if isinstance(v, Tensor) else words.a(v) for v in values]
            said = words.line(run.error).partition(". ")[0].rstrip(".")
            return PreflightError(
                f"{' and '.join(map(words.entry, keys))} {'are' if len(keys) > 1 else 'is'} "
                f"{' and '.join(dict.fromkeys(types))} where the {role} {needs} "
                f"({type(run.error).__name__}: {said}).",
                keys[0],
                f"Pass {' and '.join(group[key] + suffix for key in keys)}.",
            )
    return None


def _smallest(
    keys: list[str],
    least: int,
    data: Mapping[str, Any],
    dtype: torch.dtype | None,
    again: Callable[[dict[str, Any]], Run],
) -> list[str]:
    """The smallest set of at least ``least`` entries whose conversion makes the run succeed."""
    for size in range(least, min(len(keys), max(least, 4)) + 1):
        for some in itertools.islice(itertools.combinations(keys, size), 16):
            try:
                changed = {key: _as_tensor(data[key], dtype) for key in some}
            except (TypeError, ValueError, RuntimeError):
                continue
            attempt = again({**data, **changed})
            if attempt.error is None or numerical(attempt.error):
                return list(some)
    return []


def _as_tensor(value: Any, dtype: torch.dtype | None) -> Tensor:
    """A tensor of a list, array or pandas object; floats in the default dtype."""
    tensor = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    if dtype is None and tensor.is_floating_point():
        dtype = torch.get_default_dtype()
    return tensor.to(dtype) if dtype else tensor


def density_error(runs: list[Run]) -> PreflightError:
    """Explain a site whose density is not finite in any run."""
    complete = [run for run in runs if run.error is None]
    last = complete[-1]
    name = next(n for n in last.problems if all(n in run.problems for run in complete))
    fn = distribution_name(last.sites[name]["fn"])
    remedy = f"Check the parameters of its {fn}, or start the guide elsewhere."
    if last.sites[name]["is_observed"]:
        remedy = f"Correct the data, or use another distribution than {fn}."
    if fn == "Unit":
        remedy = "Check what the pyro.factor adds up."
    return PreflightError(
        f"At site '{name}', {last.problems[name]}, at all {len(complete)} draws of the latents "
        "tried.",
        name,
        remedy,
    )
