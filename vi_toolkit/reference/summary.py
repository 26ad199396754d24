"""What every reference reports, however it was made: quantiles, table rows, versions."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import numpy as np

LEVELS = {"5%": 0.05, "25%": 0.25, "50%": 0.50, "75%": 0.75, "95%": 0.95}
"""The quantiles of a reference: label -> probability."""

SITE_LEVELS = ("5%", "50%", "95%")
"""The quantiles in the rows of ``Reference.sites``."""


def site_rows(
    names: list[str], mean: np.ndarray, sd: np.ndarray, quantiles: np.ndarray, mean_se: np.ndarray
) -> list[dict[str, Any]]:
    """Rows of ``Reference.sites``: one per scalar on the model's own scale.

    Args:
        names: the k scalars.
        mean, sd, mean_se: (k,).
        quantiles: (3, k), at :data:`SITE_LEVELS`.
    """
    columns = np.stack([mean, sd, *quantiles, mean_se], -1).tolist()
    keys = ("mean", "sd", *SITE_LEVELS, "mean_se")
    return [
        {"name": name, **dict(zip(keys, row, strict=True))}
        for name, row in zip(names, columns, strict=True)
    ]


def versions(*packages: str) -> dict[str, str]:
    """The versions of Python and of the packages, by name."""
    found = {package: importlib.metadata.version(package) for package in packages}
    return {"python": platform.python_version(), **found}
