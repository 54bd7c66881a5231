"""Rows of different lengths: in which order they are run through, and how tasks share them.

Longer rows stand before shorter ones, so that those which have not ended at a step are the first.
What was found for some lengths is kept for a while: the layers of a network ask for the same one
after another. Imports division, memory and NumPy.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise

import numpy as np
from tinygrad_seq.kernels.division import chunk, edges_of
from tinygrad_seq.kernels.memory import address

Array = np.ndarray
MOST_DENSE = 256  # orders of rows that are kept where all are as long
MOST_RAGGED = 16  # and where they are not


@dataclass(eq=False)
class Rows:
    """In which order rows and steps are run through.

    Row r of a run is row ``batch[r]`` of the batch, the longest first. At step s it is at time
    ``begin[r] + s * onward``, and it has ``ends[r]`` steps: the rows below ``active[s]`` have not
    ended. Where rows were dealt to parts of the batch, each part has its longest first, and those
    of its rows that are below ``active[part, s]`` have not ended. ``addresses`` are those of the
    first three arrays, and the distance from a part's ``active`` to the next one's; ``order`` says
    where the rows of the batch stand in a run, None if that is their own order.
    """

    T: int  # steps that arrays have
    B: int
    steps: int  # of the longest row
    batch: Array
    begin: Array
    active: Array
    ends: Array
    onward: int
    ragged: bool  # whether some row has fewer than T steps
    addresses: tuple[int, ...] = field(init=False)
    order: Array | None = field(init=False)

    def __post_init__(self) -> None:
        """Not later, as cached_property has it: its lock in Python 3.11 stays taken in a fork."""
        where = (*map(address, (self.batch, self.begin, self.active)),)
        self.addresses = (*where, self.active.strides[0] if self.active.ndim > 1 else 0)
        self.order = np.argsort(self.batch) if self.ragged else None


def rows_of(T: int, B: int, lengths: Array | None, reverse: bool) -> Rows:
    """The order of rows for lengths (B,) int64, None if all are T."""
    if lengths is None:
        return _dense(T, B, reverse)
    return _ragged(T, lengths.tobytes(), reverse)


@lru_cache(MOST_DENSE)
def _dense(T: int, B: int, reverse: bool) -> Rows:
    begin, onward = np.full(B, T - 1 if reverse else 0), -1 if reverse else 1
    return Rows(T, B, T, np.arange(B), begin, np.full(T + 1, B), np.full(B, T), onward, False)


@lru_cache(MOST_RAGGED)
def _ragged(T: int, given: bytes, reverse: bool) -> Rows:
    lengths = np.frombuffer(given, np.int64)
    batch = np.argsort(-lengths, kind="stable")
    ends = lengths[batch]
    begin = ends - 1 if reverse else np.zeros(len(ends), np.int64)
    onward, ragged = -1 if reverse else 1, bool(ends[-1] < T)
    return Rows(T, len(ends), int(ends[0]), batch, begin, _active(ends, T), ends, onward, ragged)


def _active(ends: Array, T: int) -> Array:
    """How many of the rows, the longest first, there are at each step and after the last."""
    return np.searchsorted(-ends, -np.arange(T + 1), side="left")


@lru_cache(MOST_RAGGED)
def dealt(rows: Rows, parts: int) -> Rows:
    """The same rows in parts of the batch, each with about as much work as the others.

    From the longest on, they go to the parts in turn, to and fro; those that are left, to the
    parts that have room.
    """
    edges = edges_of(rows.B, parts)
    sizes = np.diff(edges)
    least = int(sizes.min())
    turns = np.tile([*range(parts), *reversed(range(parts))], -(-least // 2))[: least * parts]
    part = np.concatenate([turns, np.repeat(np.arange(parts), sizes - least)])
    order = np.argsort(part, kind="stable")
    batch, begin, ends = rows.batch[order], rows.begin[order], rows.ends[order]
    active = np.stack([low + _active(ends[low:high], rows.T) for low, high in pairwise(edges)])
    return replace(rows, batch=batch, begin=begin, active=active, ends=ends)


def task_edges(rows: Rows, tasks: int, steps: int) -> Array:
    """The edges of tasks over rows of different lengths, for each so many steps: (.., tasks + 1).

    Tasks have whole chunks of rows, about the same work each, and as many of them each part.
    """
    parts = np.atleast_2d(rows.active)[:, : max(rows.steps, 1)]
    shares = tasks // len(parts)
    each = [
        _edges_of_part(active, low, high, rows.B, shares, steps)
        for active, (low, high) in zip(parts, pairwise(edges_of(rows.B, len(parts))), strict=True)
    ]
    ends = np.full((len(each[0]), 1), rows.B)
    return np.concatenate([*each, ends], axis=1)


def _edges_of_part(active: Array, low: int, high: int, B: int, tasks: int, steps: int) -> Array:
    """Where each of so many tasks begins among rows low to high, for each so many steps."""
    firsts = np.arange(low, high, chunk(B))
    there = active[:, None] > firsts
    work = np.add.reduceat(there, np.arange(0, len(there), steps), axis=0, dtype=np.int64) + 1
    middles = np.cumsum(work, axis=1) - work / 2
    wanted = np.arange(tasks) * (work.sum(axis=1, keepdims=True) / tasks)
    chunks = (middles[:, None, :] < wanted[:, :, None]).sum(axis=2)
    return np.minimum(low + chunks * chunk(B), high)
