"""How many threads compiled code may use. Imports errors, and the kernels when asked."""

from __future__ import annotations

from tinygrad_seq.errors import whole


def set_num_threads(n: int) -> None:
    """Let compiled code use up to ``n`` threads from now on; results do not depend on it.

    Raises ValueError for what is no integer from 1 on.
    """
    from tinygrad_seq.kernels import threads

    threads.set_num_threads(whole(n, "set_num_threads"))


def get_num_threads() -> int:
    """How many threads compiled code may use: as set, or the cores that this process may use."""
    from tinygrad_seq.kernels import threads

    count: int = threads.get_num_threads()
    return count
