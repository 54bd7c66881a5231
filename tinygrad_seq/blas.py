"""NumPy's matrix product, large ones divided among threads that wait asleep.

OpenBLAS, which NumPy's wheels contain, divides a product among threads of its own, and these go on
spinning after it. The threads of a scan want the same cores: a training step of a layer and a small
product took half as long again. So each product is done by the thread that asks for it, and blocks
of a large one by several; which blocks depends on the shapes alone.
Imports parallel and NumPy.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinygrad_seq.parallel import in_blocks

ALONE_ANYWAY = 2**18  # multiplications up to which OpenBLAS takes one thread by itself
WORTH_TWO = 2**23  # from here on there are two blocks: to wake a thread costs some 50 µs
BLOCK = 2**25  # and of this size where there are more
NARROWEST = 48  # rows or columns of a block at least

# OpenBLAS computes with what stands beyond the ends of small matrices too, and NumPy then warns of
# an invalid value that is in none of them (as in its issues 13173 and 24067).
_matmul = np.errstate(invalid="ignore")(np.matmul)


class _Library(NamedTuple):
    get_threads: Any
    set_threads: Any


@cache
def _library() -> _Library | None:
    """The OpenBLAS in NumPy's wheel; None where NumPy has another library."""
    home = Path(np.__file__).parent
    places = [home.parent / "numpy.libs", home / ".dylibs"]
    for path in (found for place in places for found in sorted(place.glob("*openblas*"))):
        try:
            library = ctypes.CDLL(str(path))
        except OSError:
            continue
        for prefix in ("scipy_openblas", "openblas"):
            for suffix in ("64_", ""):
                found = getattr(library, f"{prefix}_set_num_threads{suffix}", None)
                if found is not None:
                    return _Library(getattr(library, f"{prefix}_get_num_threads{suffix}"), found)
    return None


_lock = threading.Lock()
_inside = 0
_before = 1


def _forget() -> None:
    """In a forked child nobody is in the middle of a product."""
    global _lock, _inside
    if _inside and (library := _library()) is not None:
        library.set_threads(_before)
    _lock, _inside = threading.Lock(), 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@contextmanager
def _one_thread(library: _Library) -> Iterator[None]:
    global _inside, _before
    with _lock:
        if not _inside:
            _before = library.get_threads()
            library.set_threads(1)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                library.set_threads(_before)


def matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``np.matmul(a, b)``: a (..., n, k) and b (..., k, m) of any dtypes give (..., n, m).

    Arrays on a GPU are multiplied there, which NumPy leaves to them.
    """
    work = a.size * b.shape[-1]
    if work <= ALONE_ANYWAY or type(a) is not np.ndarray:
        return _matmul(a, b)  # type: ignore[no-any-return]
    if a.shape[-1] == 1 and a.ndim == 2 == b.ndim and len(b) == 1:
        return np.multiply(a, b)  # type: ignore[no-any-return]  # in a quarter of the time
    library = _library()
    if library is None:
        return _matmul(a, b)  # type: ignore[no-any-return]
    with _one_thread(library):
        fits = a.ndim == 2 == b.ndim and a.dtype == b.dtype and a.shape[1] == b.shape[0]
        if work < WORTH_TWO or not fits:
            return _matmul(a, b)  # type: ignore[no-any-return]
        return _by_blocks(a, b, max(2, work // BLOCK))


def _by_blocks(a: np.ndarray, b: np.ndarray, most: int) -> np.ndarray:
    """The product in up to so many blocks, of rows or, where these are few, of columns."""
    (n, m), y = (len(a), b.shape[1]), np.empty((len(a), b.shape[1]), a.dtype)
    by_rows = n >= min(m, 4 * NARROWEST)

    def block(low: int, high: int) -> None:
        if by_rows:
            _matmul(a[low:high], b, out=y[low:high])
        else:
            _matmul(a, b[:, low:high], out=y[:, low:high])

    count = n if by_rows else m
    in_blocks(block, count, max(NARROWEST, -(-count // most)))
    return y
