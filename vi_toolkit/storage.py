"""The file format of a fit: one safetensors file, with JSON in its header.

Nothing is ever unpickled: safetensors holds raw numbers, JSON holds names and text. This module
knows nested dicts of tensors, numbers and text; :meth:`Fit.save <vi_toolkit.Fit.save>` and
:func:`vi_toolkit.load` know what they mean.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vi_toolkit.errors import LoadError

FORMAT = "vi_toolkit fit"
VERSION = 3


def write(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write nested dicts and lists of tensors, numbers and text to a file.

    The file appears whole or not at all.

    Args:
        path: where to; ``.safetensors`` is appended if it is missing.
        content: keys are text or numbers.

    Raises:
        TypeError: a value is neither a tensor nor something that JSON can hold.
    """
    tensors: dict[str, torch.Tensor] = {}
    header = {"format": FORMAT, "version": VERSION}
    header |= {name: _pack(value, name, tensors) for name, value in content.items()}
    text = json.dumps(header)
    metadata = {"vi_toolkit": text, "sha256": _digest(text, tensors)}
    path = _with_suffix(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(tensors, partial, metadata)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What :func:`write` wrote.

    Raises:
        LoadError: the file is missing, corrupt, truncated, or not a fit.
    """
    path = Path(path) if Path(path).exists() else _with_suffix(path)
    if not path.exists():
        raise LoadError(f"There is no file {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise LoadError(
            f"{path} is not a readable safetensors file ({error}): it is truncated, corrupt or "
            "something else."
        ) from error
    if "vi_toolkit" not in metadata:
        raise LoadError(f"{path} is a safetensors file, but not a fit saved by vi_toolkit.")
    if _digest(metadata["vi_toolkit"], tensors) != metadata.get("sha256"):
        raise LoadError(f"{path} is corrupt: its content does not match its checksum.")
    header = json.loads(metadata["vi_toolkit"])
    if header.get("format") != FORMAT or header.get("version") != VERSION:
        raise LoadError(
            f"{path} has format {header.get('format')!r} version {header.get('version')!r}; this "
            f"vi_toolkit reads {FORMAT!r} version {VERSION}."
        )
    return {n: _unpack(v, tensors) for n, v in header.items() if n not in ("format", "version")}


def _pack(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Replace tensors by references to ``tensors``; the rest must be JSON's."""
    if torch.is_tensor(value):
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {"__tensor__": path}
    if isinstance(value, Mapping):
        # Keys may be numbers (the optimiser's), which JSON would turn into text.
        return {"__map__": [[k, _pack(v, f"{path}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return {
            "__list__": [_pack(v, f"{path}/{i}", tensors) for i, v in enumerate(value)],
            "tuple": isinstance(value, tuple),
        }
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": repr(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"{path} is a {type(value).__name__}, which cannot be saved: data may hold tensors, "
        "numbers, text, None, and lists and dicts of these."
    )


def _unpack(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if "__tensor__" in value:
        return tensors[value["__tensor__"]]
    if "__map__" in value:
        return {k: _unpack(v, tensors) for k, v in value["__map__"]}
    if "__float__" in value:
        return float(value["__float__"])
    items = [_unpack(v, tensors) for v in value["__list__"]]
    return tuple(items) if value["tuple"] else items


def _digest(text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _with_suffix(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path.with_name(path.name + ".safetensors")
