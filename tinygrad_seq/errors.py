"""The errors this package raises about shapes, traces, tapes, devices, and checks for all.

Each message names the operation and the argument, what was given, what was expected and what to
do. Any other bad value raises a plain ``ValueError``. Imports nothing of this package.
"""

from __future__ import annotations

from math import inf, nan
from operator import index
from typing import Any

WAY_OUT = "tgs.unroll runs any cell, step by step on the tape"  # where a cell cannot be compiled


class ShapeError(ValueError):
    """Shapes, ranks or structures that do not fit together."""


class TraceError(RuntimeError):
    """A cell does something that a recurrence cannot follow."""


class TapeError(RuntimeError):
    """A gradient was asked for that the tape cannot give."""


class DeviceError(RuntimeError):
    """Tensors on different devices met, or a GPU was asked for that cannot be used."""


def whole(value: Any, name: str, least: int = 1) -> int:
    """``value`` as an integer of at least ``least``; a ValueError names what it is for."""
    try:
        made = index(value)
    except TypeError:
        made = least - 1
    if isinstance(value, bool) or made < least:
        raise ValueError(f"{name}: {value!r} was given, expected an integer from {least} on")
    return made


def number(
    value: Any, name: str, below: float = inf, expected: str = "a finite number from 0 on"
) -> float:
    """``value`` as a float from 0 up to but without ``below``; a ValueError as above for others."""
    made = _float(value)
    if not 0 <= made < below:
        raise ValueError(f"{name}: {value!r} was given, expected {expected}")
    return made


def positive(value: Any, name: str) -> float:
    """``value`` as a float above 0, inf included; a ValueError as above for others."""
    made = _float(value)
    if not made > 0:
        raise ValueError(f"{name}: {value!r} was given, expected a number above 0")
    return made


def _float(value: Any) -> float:
    """``value`` as a float, NaN for what is no number."""
    try:
        return nan if isinstance(value, (bool, str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError):
        return nan


def probability(value: Any, name: str) -> float:
    """A number from 0 up to but without 1, for what is divided by 1 − p."""
    return number(value, name, 1.0, "a probability, 0 ≤ p < 1")


def called(value: Any, name: str, expected: str) -> Any:
    """``value`` itself if it can be called and is no class; a ValueError as above for others."""
    if isinstance(value, type) or not callable(value):
        hint = ", not a class" if isinstance(value, type) else ""
        raise ValueError(f"{name}: {value!r:.60} was given, expected {expected}{hint}")
    return value
