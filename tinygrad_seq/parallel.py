"""How many threads there may be, and long work in NumPy divided among some.

Compiled code has threads of its own (``kernels/threads.py``). Here are those for what NumPy does:
it lets go of Python's lock while it works, so blocks of a large array can be worked on at once.
They sleep while there is nothing to do, and so are in nobody's way.
Imports errors, and the kernels when asked.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextvars import copy_context
from typing import TYPE_CHECKING

from tinygrad_seq.errors import whole
from tinygrad_seq.kernels.forking import alone

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

_helpers: ThreadPoolExecutor | None = None


def set_num_threads(n: int) -> None:
    """Let this package use up to ``n`` threads from now on; results do not depend on it.

    Raises ValueError for what is no integer from 1 on.
    """
    with alone():
        from tinygrad_seq.kernels import threads

    threads.set_num_threads(whole(n, "set_num_threads"))


def get_num_threads() -> int:
    """How many threads there may be: as set, or the cores that this process may use."""
    with alone():
        from tinygrad_seq.kernels import threads

    count: int = threads.get_num_threads()
    return count


def _threads() -> int:
    """The same without importing the compiler: who sets a number has imported it."""
    if "tinygrad_seq.kernels.threads" in sys.modules:
        return get_num_threads()
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_blocks(work: Callable[[int, int], object], count: int, size: int) -> None:
    """``work(low, high)`` for each block of up to ``size`` of ``count`` rows, several at a time.

    The blocks must not depend on each other. Which thread does one changes nothing in its result.
    What ``work`` raises is raised here, when nobody works any more.
    """
    blocks = iter([(low, min(low + size, count)) for low in range(0, count, size)])

    def take_some() -> None:
        for low, high in blocks:
            work(low, high)

    asked = _ask(take_some, min(_threads(), -(-count // size)) - 1)
    try:
        take_some()
    finally:
        for each in asked:
            if not each.cancel():  # it has begun
                each.result()


def _ask(work: Callable[[], None], helpers: int) -> list[Future[None]]:
    """Let so many helpers do this too, beside the caller."""
    global _helpers
    asked: list[Future[None]] = []
    if helpers < 1:
        return asked
    pool = _helpers
    try:
        if pool is None:
            from concurrent.futures import ThreadPoolExecutor  # with logging, which takes its time

            _helpers = pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 1), "tinygrad_seq")
        for _ in range(helpers):
            asked.append(pool.submit(copy_context().run, work))
    except RuntimeError:  # no thread is to be had, or the interpreter is going down
        if pool is not None:
            # What was refused is queued all the same, and a helper may have begun it.
            pool.shutdown(cancel_futures=True)
        _helpers = None
    return asked


def _forget() -> None:
    """In a forked child there are no helpers, whatever the parent had."""
    global _helpers
    _helpers = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
