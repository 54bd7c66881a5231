"""Memory for arrays of a run: taken from what earlier runs gave back, so that its pages are there.

Touching fresh memory for the first time costs as much as computing what goes there. An array is
given back when nobody refers to it any more, neither a tensor nor a view. Imports NumPy.
"""

from __future__ import annotations

import threading
from math import prod
from typing import Any

import numpy as np

MOST = 512 * 2**20  # bytes that may wait to be used again
ALIGNMENT = 64
_waiting: dict[int, list[np.ndarray]] = {}
_bytes = 0
_lock = threading.Lock()


def _size_class(size: int) -> int:
    """Sizes in steps of an eighth, so that a similar array fits the next time."""
    if size <= 4096:
        return 4096
    step = 1 << max(0, (size - 1).bit_length() - 4)
    return -(-size // step) * step


class _Lent:
    """Memory with an owner: it goes back when this object dies."""

    __slots__ = ("__array_interface__", "_memory")

    def __init__(self, memory: np.ndarray, shape: tuple[int, ...], dtype: Any) -> None:
        self._memory = memory
        address = memory.ctypes.data
        self.__array_interface__ = {
            "data": (address + -address % ALIGNMENT, False),
            "shape": shape,
            "typestr": np.dtype(dtype).str,
            "version": 3,
        }

    def __del__(self) -> None:
        _give_back(self._memory)


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array that may hold anything, aligned for vectors."""
    global _bytes
    size = _size_class(prod(shape) * np.dtype(dtype).itemsize + ALIGNMENT)
    memory = None
    with _lock:
        stack = _waiting.get(size)
        if stack:
            memory = stack.pop()
            _bytes -= size
    if memory is None:
        memory = np.empty(size, np.uint8)
    return np.asarray(_Lent(memory, shape, dtype))


def zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    made = empty(shape, dtype)
    made.fill(0)
    return made


def _give_back(memory: np.ndarray) -> None:
    global _bytes
    if not _lock.acquire(blocking=False):  # called by the collector in the middle of ``empty``
        return
    try:
        if _bytes + memory.size <= MOST:
            _waiting.setdefault(memory.size, []).append(memory)
            _bytes += memory.size
    finally:
        _lock.release()
