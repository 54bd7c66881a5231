"""The lock under which kernels are imported, planned and compiled, for which a fork waits.

Python's imports, Numba and LLVM have locks of their own. A child that is forked while another
thread has them finds them taken for ever. Imports nothing, so that it is there before all these.
"""

from __future__ import annotations

import os
import threading

_lock = threading.RLock()


def alone() -> threading.RLock:  # type: ignore[valid-type]
    """``with alone():`` no other thread is in such a block, and no process forks."""
    return _lock


def _forget() -> None:
    """In a forked child nobody is inside, whatever other threads of the parent did."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=lambda: _lock.acquire(),
        after_in_parent=lambda: _lock.release(),
        after_in_child=_forget,
    )
