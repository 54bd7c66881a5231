"""The errors this package raises about shapes, traces, tapes, devices, and one check for all.

Each message names the operation and the argument, what was given, what was expected and what to
do. Any other bad value raises a plain ``ValueError``. Imports nothing of this package.
"""

from __future__ import annotations

from operator import index
from typing import Any

__all__ = ["DeviceError", "ShapeError", "TapeError", "TraceError", "whole"]


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
