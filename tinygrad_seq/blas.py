"""NumPy's matrix product, on one thread where others would only be in the way.

OpenBLAS, which NumPy's wheels contain, divides a product among threads of its own, and these go on
spinning after it. The threads of a scan want the same cores: a training step of a layer and a small
product took half as long again. So once scans run on several threads, products of middling size
stay on the thread that asks for them; large ones take all threads as ever.
Imports NumPy alone.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ALONE_ANYWAY = 2**18  # multiplications up to which OpenBLAS takes one thread by itself
WORTH_THREADS = 2**27  # and from which a second one saves more than it costs


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


def _scans_have_threads() -> bool:
    threads = sys.modules.get("tinygrad_seq.kernels.threads")
    return threads is not None and threads.started()


def matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``np.matmul(a, b)``: a (..., n, k) and b (..., k, m) of any dtypes give (..., n, m).

    Arrays on a GPU are multiplied there, which NumPy leaves to them.
    """
    work = a.size * b.shape[-1]
    if ALONE_ANYWAY < work <= WORTH_THREADS and type(a) is np.ndarray and _scans_have_threads():
        library = _library()
        if library is not None:
            with _one_thread(library):
                return np.matmul(a, b)  # type: ignore[no-any-return]
    return np.matmul(a, b)  # type: ignore[no-any-return]
