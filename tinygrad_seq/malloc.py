"""What becomes of the memory of arrays that are let go.

A C library gives large pieces back to the system at once, and has to ask for fresh pages, which the
system fills with zeros, for the next array: a step of training that makes the same arrays again and
again spends half of its time outside of scans on that. glibc is told to keep what is freed, unless
somebody has told it otherwise. Imports nothing of this package.
"""

from __future__ import annotations

import ctypes
import os

KEPT = 512 * 2**20  # bytes that may wait to be used again
LARGEST = 32 * 2**20  # of a piece that may be kept, which is as much as glibc allows
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")


def keep_freed() -> bool:
    """Let glibc keep freed memory for the next array; returns whether it does."""
    if any(name in os.environ for name in _SETTINGS):
        return False
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):
        return False
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    change = library.mallopt
    return bool(change(_MMAP_THRESHOLD, LARGEST) and change(_TRIM_THRESHOLD, KEPT))
