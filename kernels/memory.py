"""Memory for arrays of a run: taken from what earlier runs gave back, so that its pages are there.

Touching fresh memory for the first time costs as much as computing what goes there. An array is
given back when nobody refers to it any more, neither a tensor nor a view. Imports NumPy.
"""

from __future__ import annotations

import ctypes
import os
import platform
import threading
from collections.abc import Callable
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

MOST = 512 * 2**20  # bytes that may wait to be used again
ALIGNMENT = 64
SMALL = 2**17  # bytes; the C library keeps those by itself
_waiting: dict[int, list[tuple[np.ndarray, int]]] = {}
_bytes = 0
_lock = threading.Lock()


def _forget() -> None:
    """In a forked child nobody is inside, whatever other threads of the parent did."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _find_address() -> Callable[[np.ndarray], int]:
    """The address of an array's memory, read from the object itself where it stands there.

    The public way builds a dict for each array, which takes several times longer.
    """
    offset, word = object.__basicsize__, ctypes.c_size_t.from_address
    made: list[np.ndarray] = [np.empty(3), np.empty((2, 2), np.float32)[1:]]

    def public(array: np.ndarray) -> int:
        return array.__array_interface__["data"][0]

    def quick(array: np.ndarray) -> int:
        return word(id(array) + offset).value

    is_there = platform.python_implementation() == "CPython"
    return quick if is_there and all(quick(a) == public(a) for a in made) else public


address = _find_address()


@lru_cache(1024)
def _size_class(size: int) -> int:
    """Sizes in steps of an eighth, so that a similar array fits the next time."""
    if size <= 4096:
        return 4096
    step = 1 << max(0, (size - 1).bit_length() - 4)
    return -(-size // step) * step


class Block:
    """Bytes from an address on, aligned for vectors; they go back when this object dies."""

    __slots__ = ("_memory", "address", "size")

    def __init__(self, size: int) -> None:
        global _bytes
        self.size = size
        full = _size_class(size + ALIGNMENT)
        memory = None
        with _lock:
            stack = _waiting.get(full)
            if stack:
                _bytes -= full
                memory = stack.pop()
        if memory is None:
            made = np.empty(full, np.uint8)
            memory = made, address(made)
        self._memory = memory
        self.address: int = memory[1] + -memory[1] % ALIGNMENT

    def view(self, offset: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array in this memory; it must not outlive the block."""
        bytes_, first = self._memory
        return np.ndarray(shape, dtype, bytes_, self.address - first + offset)

    def __del__(self) -> None:
        # It has none if memory ran out, and when the interpreter ends nobody may take it.
        if hasattr(self, "_memory") and _give_back is not None:
            _give_back(self._memory)


class _Lent:
    """What keeps a block alive for as long as an array in it is there."""

    __slots__ = ("__array_interface__", "_block")

    def __init__(self, block: Block, shape: tuple[int, ...], kind: str) -> None:
        self._block = block
        self.__array_interface__ = {
            "data": (block.address, False),
            "shape": shape,
            "typestr": kind,
            "version": 3,
        }


def empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """An array that may hold anything. Small ones are NumPy's own."""
    size = prod(shape) * dtype.itemsize
    if size < SMALL:
        return np.empty(shape, dtype)
    return np.asarray(_Lent(Block(size), shape, dtype.str))


def _give_back(memory: tuple[np.ndarray, int]) -> None:
    global _bytes
    if _lock.locked():  # the collector may call this in the middle of anything
        return
    with _lock:  # which no interrupt leaves locked, as it may after acquire
        size = memory[0].size
        if _bytes + size <= MOST:
            stack = _waiting.setdefault(size, [])
            _bytes += size
            stack.append(memory)
