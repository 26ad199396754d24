"""Checks that run nothing: of the data, and of the arguments of model and guide."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from vi_toolkit.errors import PreflightError
from vi_toolkit.preflight import words
from vi_toolkit.pyro_private import unwrap


def numbers(data: Mapping[str, Any]) -> Iterator[tuple[str, str, Any, Tensor]]:
    """Everything numeric in the data, also inside lists, tuples and dicts.

    Yields:
        (key in the data, expression that reaches the value, the value, the value as a tensor).
    """

    def walk(key: str, label: str, value: Any) -> Iterator[tuple[str, str, Any, Tensor]]:
        if isinstance(value, Tensor):
            if value.layout is torch.strided:
                yield key, label, value, value
        elif isinstance(value, np.ndarray) or hasattr(value, "to_numpy"):
            array = np.asarray(value)
            if array.dtype.kind in "fiub":
                yield key, label, value, torch.from_numpy(np.array(array, dtype=float))
        elif isinstance(value, Mapping | list | tuple):
            parts = value.items() if isinstance(value, Mapping) else enumerate(value)
            for name, part in parts:
                if not isinstance(part, int | float | str):
                    yield from walk(key, f"{label}[{name!r}]", part)

    for key, value in data.items():
        yield from walk(key, words.entry(key), value)


def tensors(data: Mapping[str, Any]) -> list[tuple[str, str, Tensor]]:
    """The tensors in the data, as (key, expression that reaches it, tensor)."""
    return [
        (key, label, value) for key, label, value, _ in numbers(data) if isinstance(value, Tensor)
    ]


def check_data(data: Any) -> None:
    """Check that data is a dict of non-empty, finite entries of one device and one float dtype.

    Raises:
        PreflightError: it is not.
    """
    if not isinstance(data, Mapping):
        raise PreflightError(
            f"data is {words.a(data)}, but model and guide are called as model(**data).",
            remedy='Pass a dict of arguments, e.g. {"X": X, "y": y}.',
        )
    for key in data:
        if not isinstance(key, str):
            raise PreflightError(
                f"data has the key {key!r}, which is {words.a(key)}.",
                str(key),
                "Its keys are names of the model's arguments: make them strings.",
            )
    for key, label, _, value in numbers(data):
        if value.numel() == 0:
            raise PreflightError(
                f"{label} is empty (shape {tuple(value.shape)}).",
                key,
                "Look at the filter or split that made it, or leave it out.",
            )
    # A scalar on the CPU works with any device, and a scalar of any float dtype with any other.
    sized = [entry for entry in tensors(data) if entry[2].dim()]
    floats = [entry for entry in sized if entry[2].is_floating_point()]
    for attribute, group in (("device", sized), ("dtype", floats)):
        for key, label, value in group[1:]:
            one, other = getattr(group[0][2], attribute), getattr(value, attribute)
            if one != other:
                on, to = ("on ", f'"{one}"') if attribute == "device" else ("", str(one))
                raise PreflightError(
                    f"{group[0][1]} is {on}{words.plain(one)} but {label} is "
                    f"{on}{words.plain(other)}.",
                    key,
                    f"Use one {attribute}, e.g. {label}.to({to}).",
                )
    for key, label, _, value in numbers(data):
        bad = ~torch.isfinite(value)
        if value.is_floating_point() and not value.is_meta and bad.any():
            count = int(bad.sum())
            values = f"{count} values that are not finite, the first" if count > 1 else "the value"
            raise PreflightError(
                f"{label} has {values} {words.item(value, bad)}.",
                key,
                "Drop or impute what is missing, or fill it with any valid number and leave "
                "it out of the density with poutine.mask.",
            )


def named_arguments(model: Callable[..., Any], data: Any) -> Any:
    """Turn positional arguments, a tuple or a single tensor, into a dict by the model's names.

    Raises:
        PreflightError: there are more of them than the model has named arguments.

    Example:
        >>> named_arguments(lambda X, y=None: None, (1, 2))
        {'X': 1, 'y': 2}
    """
    if isinstance(data, Tensor):
        data = (data,)
    if not isinstance(data, tuple):
        return data
    known = signature(model)
    names = [
        p.name
        for p in (known.parameters.values() if known else ())
        if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    if len(data) > len(names):
        raise PreflightError(
            f"data has {len(data)} positional arguments, but the model names {len(names)}"
            + (f" ({', '.join(names)})." if names else "."),
            remedy='Pass a dict of arguments, e.g. {"X": X, "y": y}.',
        )
    return dict(zip(names, data, strict=False))


def signature(fn: Callable[..., Any]) -> inspect.Signature | None:
    """The signature of a model or guide inside its handlers; None if it has none to check."""
    fn = unwrap(fn)
    if isinstance(fn, Messenger):  # a guide that is a handler passes everything to its model
        return None
    try:
        return inspect.signature(fn.forward if isinstance(fn, torch.nn.Module) else fn)
    except (TypeError, ValueError):
        return None


def check_arguments(role: str, fn: Callable[..., Any], data: Mapping[str, Any]) -> None:
    """Check that the data are the arguments of the model or guide.

    Args:
        role: "model" or "guide", for the message.
        fn: the model or guide.

    Raises:
        PreflightError: an argument is missing or unknown.
    """
    known = signature(fn)
    if known is None:
        return
    parameters = known.parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    names = [p.name for p in named]
    unknown = [key for key in data if key not in names]
    for p in named:
        if p.default is p.empty and p.name not in data:
            twin = words.nearest(p.name, unknown)
            keys = f"its keys: {', '.join(data)}" if data else "it is empty"
            add = f"Add {words.entry(p.name)}."
            raise PreflightError(
                f"The {role} needs the argument '{p.name}', which data does not have ({keys}).",
                p.name,
                f'Rename {words.entry(twin)} to "{p.name}".' if twin else add,
            )
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        key = unknown[0]
        remedy = f"Remove {words.entry(key)} or add the argument."
        if role == "guide":
            remedy = f"Give the guide the model's arguments: def guide({', '.join(data)})."
        elif twin := words.nearest(key, [n for n in names if n not in data]):
            remedy = f'Rename {words.entry(key)} to "{twin}".'
        raise PreflightError(
            f"The {role} has no argument '{key}' (it takes {', '.join(names) or 'none'}).",
            key,
            remedy,
        )
