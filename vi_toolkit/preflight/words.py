"""How the messages write types, indices, names and what others say."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor


def a(value: Any) -> str:
    """The value's type, with an article and the package it is from."""
    module, name = type(value).__module__.partition(".")[0], type(value).__name__
    name = name if module in ("builtins", "__main__") else f"{module}.{name}"
    return f"an {name}" if name[0] in "aeiouAEIOU" else f"a {name}"


def at(index: tuple[int, ...]) -> str:
    return f" at index {index[0] if len(index) == 1 else index}" if index else ""


def entry(key: Any) -> str:
    return f'data["{key}"]'


def first(flags: Tensor) -> tuple[int, ...]:
    """Index of the first true entry."""
    return tuple(int(i) for i in flags.nonzero()[0])


def item(value: Tensor, flags: Tensor) -> str:
    """The first entry, or event, of a value that is flagged, and its index."""
    index, event = first(flags), value.shape[flags.dim() :] if flags.dim() < value.dim() else ()
    chosen = value.expand(flags.shape + event)[index]
    text = f"{chosen.item():g}" if chosen.numel() == 1 else str(chosen.flatten().tolist()[:4])
    return text + at(index)


def line(error: BaseException | None) -> str:
    """What an exception says, on one short line that ends with a stop."""
    text = " ".join(str(error).split()).partition(" Trace Shapes:")[0] or "no message"
    # torch spells out the distribution and the whole of its parameter.
    text = re.sub(r" \(Tensor of shape .*?\) of distribution (\w+)\(.*\) to", r" of \1 to", text)
    text = text if len(text) <= 160 else text[:157] + "..."
    return text if text[-1] in ".!?" else text + "."


def listed(names: Iterable[str]) -> str:
    quoted = [f"'{n}'" for n in names]
    return ", ".join(quoted[:4]) + (f" and {len(quoted) - 4} more" if len(quoted) > 4 else "")


def nearest(name: str, names: Iterable[Any]) -> str | None:
    """The name that a misspelt one was meant to be."""
    # difflib rates case as heavily as any other letter.
    lower = {str(n).lower(): str(n) for n in names}
    close = difflib.get_close_matches(name.lower(), list(lower), n=1, cutoff=0.6)
    return lower[close[0]] if close else None


def plain(value: Any) -> str:
    """A dtype or device without torch's prefix."""
    return str(value).removeprefix("torch.")
