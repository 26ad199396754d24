"""The file format of references: JSON that people can read and version control can compare."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vi_toolkit.errors import LoadError

FORMAT = "vi_toolkit reference posterior"
FORMAT_VERSION = 2


def write(path: str | Path, fields: Mapping[str, Any]) -> None:
    """Write the fields as JSON: sorted keys, one line per row, floats without rounding."""
    content = {"format": FORMAT, "format_version": FORMAT_VERSION, **_plain(fields)}
    Path(path).write_text(_layout(content) + "\n", encoding="utf-8")


def read(path: str | Path) -> dict[str, Any]:
    """Read what :func:`write` wrote, with arrays as lists.

    Raises:
        LoadError: the file is truncated, is not JSON, is not a reference, or has another version.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = json.loads(text)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise LoadError(f"{path} is not JSON, or is cut short: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise LoadError(f"{path} is JSON, but not a reference posterior")
    version = content.get("format_version")
    if version == 1:  # which called the standard errors mcse_mean, mcse_sd, ...
        return json.loads(re.sub(r'"mcse_(\w+)"', r'"\1_se"', text))
    if version != FORMAT_VERSION:
        raise LoadError(
            f"{path} has format version {version!r}; this vi_toolkit reads versions 1 and "
            f"{FORMAT_VERSION}. Make the reference again."
        )
    return content


def _plain(x: Any) -> Any:
    """The same value in JSON's types: NumPy arrays as lists, NumPy scalars as Python's."""
    if isinstance(x, np.ndarray):
        return x.tolist()
    if isinstance(x, Mapping):
        return {str(k): _plain(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(v) for v in x]
    return x.item() if isinstance(x, np.generic) else x


def _layout(x: Any, depth: int = 0) -> str:
    """JSON with sorted keys, in which every innermost list or dict stands on one line."""
    flat = not isinstance(x, dict | list) or not any(
        isinstance(v, dict | list) for v in (x.values() if isinstance(x, dict) else x)
    )
    if flat and depth:
        return json.dumps(x, sort_keys=True, ensure_ascii=False, allow_nan=False)
    pad = "\n" + " " * (depth + 1)
    if isinstance(x, dict):
        items = [f"{json.dumps(k)}: {_layout(x[k], depth + 1)}" for k in sorted(x)]
        return "{" + pad + f",{pad}".join(items) + "\n" + " " * depth + "}"
    items = [_layout(v, depth + 1) for v in x]
    return "[" + pad + f",{pad}".join(items) + "\n" + " " * depth + "]"
