"""Whole numbers from a caller, of any integer type."""

from __future__ import annotations

import operator
from typing import Any


def as_integer(name: str, value: Any, least: int) -> int:
    """``value`` as an int.

    Raises:
        ValueError: it is not a whole number of at least ``least``.

    Example:
        >>> import numpy as np
        >>> as_integer("steps", np.int64(3), 1)
        3
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
    return number
