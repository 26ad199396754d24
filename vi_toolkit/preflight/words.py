"""Words for messages: types, indices, names and the text of other errors."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor


def a(value: Any) -> str:
    """Type of a value, with an article and its package: "a numpy.ndarray"."""
    module, name = type(value).__module__.partition(".")[0], type(value).__name__
    name = name if module in ("builtins", "__main__") else f"{module}.{name}"
    return f"an {name}" if name[0] in "aeiouAEIOU" else f"a {name}"


def at(index: tuple[int, ...]) -> str:
    """Where an entry is, such as ``at index 3``; nothing for a scalar."""
    return f" at index {index[0] if len(index) == 1 else index}" if index else ""


def entry(key: Any) -> str:
    """Expression for an entry of the data."""
    return f'data["{key}"]'


def first(flags: Tensor) -> tuple[int, ...]:
    """Index of the first true entry."""
    return tuple(int(i) for i in flags.nonzero()[0])


def item(value: Tensor, flags: Tensor) -> str:
    """The first flagged entry or event of a value, and its index."""
    index, event = first(flags), value.shape[flags.dim() :] if flags.dim() < value.dim() else ()
    chosen = value.expand(flags.shape + event)[index]
    text = f"{chosen.item():g}" if chosen.numel() == 1 else str(chosen.flatten().tolist()[:4])
    return text + at(index)


def line(error: BaseException | None) -> str:
    """Message of an exception on one short line that ends with a full stop."""
    text = " ".join(str(error).split()).partition(" Trace Shapes:")[0] or "no message"
    # torch writes out the distribution and all entries of its parameter.
    text = re.sub(r" \(Tensor of shape .*?\) of distribution (\w+)\(.*\) to", r" of \1 to", text)
    text = text if len(text) <= 160 else text[:157] + "..."
    return text if text[-1] in ".!?" else text + "."


def listed(names: Iterable[str]) -> str:
    """The first four names in quotes, and how many more there are."""
    quoted = [f"'{n}'" for n in names]
    return ", ".join(quoted[:4]) + (f" and {len(quoted) - 4} more" if len(quoted) > 4 else "")


def nearest(name: str, names: Iterable[Any]) -> str | None:
    """The name that a misspelt one probably stands for; None if none is close."""
    # Lower case, because to difflib "X" and "x" are as different as any two letters.
    lower = {str(n).lower(): str(n) for n in names}
    close = difflib.get_close_matches(name.lower(), list(lower), n=1, cutoff=0.6)
    return lower[close[0]] if close else None


def plain(value: Any) -> str:
    """A dtype or device without torch's prefix."""
    return str(value).removeprefix("torch.")
