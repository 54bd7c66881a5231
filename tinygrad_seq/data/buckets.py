"""Batches of sequences of about the same length. Imports creation, errors and sequences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from tinygrad_seq.creation import Rng, generator
from tinygrad_seq.data.sequences import as_sequences, pad_sequences
from tinygrad_seq.errors import ShapeError, whole


class Buckets:
    """``for inputs, targets, lengths in Buckets(sequences, targets, batch_size=32)``.

    Each batch has inputs (T, B, ...), padded with ``value`` to its own longest sequence, and
    lengths (B,). ``sequences`` are N arrays (T_b, ...) with equal further axes. ``targets`` are
    N, (N, ...), and come as (B, ...); with ``per_step`` they are N arrays (T_b, ...), as long as
    their sequences, and come as (T, B, ...), padded with ``target_value``.

    For a model of several inputs ``sequences`` is a tuple of such lists, whose sequences may have
    lengths of their own, and inputs is a tuple. ``Buckets((sources, given), targets,
    per_step=True, ...)`` is for ``nn.Seq2Seq``: targets are as long as the last input, and lengths
    are those of the first.

    Each pass is in a new random order with every sequence once. Of this order, ``pool`` batches
    at a time are sorted by length before they are cut, which saves most of the padding; the
    batches come in random order too, and the one that may be smaller can be any of them.
    ``pool=1`` sorts nothing across batches: what padding costs without buckets
    (``1 - mask_of(lengths, T).mean()`` of a batch is its share). The orders follow from ``rng``,
    a seed or a generator, and from the package's seed if it is None.
    """

    def __init__(
        self,
        sequences: Sequence[ArrayLike] | tuple[Sequence[ArrayLike], ...],
        targets: ArrayLike | Sequence[ArrayLike],
        *,
        batch_size: int,
        per_step: bool = False,
        value: float = 0.0,
        target_value: float = 0.0,
        pool: int = 20,
        rng: Rng = None,
    ) -> None:
        self._several = type(sequences) is tuple
        columns: Any = sequences if self._several else (sequences,)
        self.sequences = [as_sequences(column, "Buckets") for column in columns]
        counts = [len(column) for column in self.sequences]
        if len(set(counts)) != 1:
            raise ShapeError(
                f"Buckets: a tuple of {counts} sequences was given, expected as many for each "
                "input; the sequences of one input are a list"
            )
        self._lengths = [np.array([len(each) for each in column]) for column in self.sequences]
        self.lengths, last = self._lengths[0], self._lengths[-1]
        self.targets = _per_step(targets, last) if per_step else _per_sequence(targets, last)
        self.batch_size = whole(batch_size, "Buckets: batch_size")
        self.pool = whole(pool, "Buckets: pool")
        self.value, self.target_value = value, target_value
        self._rng = None if rng is None else generator(rng)

    def __len__(self) -> int:
        """How many batches a pass has."""
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Any, np.ndarray, np.ndarray]]:
        rng = generator(self._rng)
        order = rng.permutation(len(self.lengths))
        span = self.pool * self.batch_size
        pools = [order[k : k + span] for k in range(0, len(order), span)]
        by_length = [p[np.lexsort([n[p] for n in reversed(self._lengths)])] for p in pools]
        order = np.concatenate(by_length)
        for k in rng.permutation(len(self)):
            yield self._batch(order[k * self.batch_size : (k + 1) * self.batch_size])

    def _batch(self, rows: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray]:
        lengths = self.lengths[rows]
        padded = [
            pad_sequences([column[row] for row in rows], self.value)[0] for column in self.sequences
        ]
        inputs = tuple(padded) if self._several else padded[0]
        if isinstance(self.targets, np.ndarray):
            return inputs, self.targets[rows], lengths
        targets, _ = pad_sequences([self.targets[row] for row in rows], self.target_value)
        return inputs, targets, lengths


def _per_sequence(targets: ArrayLike | Sequence[ArrayLike], lengths: np.ndarray) -> np.ndarray:
    try:
        made = np.asarray(targets)
    except ValueError:  # arrays of different lengths
        raise ShapeError(
            "Buckets: targets of different shapes were given, expected one for each sequence, "
            "(N, ...); pass per_step=True if there is one for each step"
        ) from None
    if made.shape[:1] != lengths.shape:
        raise ShapeError(
            f"Buckets: {len(lengths)} sequences and targets of shape {made.shape} were given, "
            "expected one target for each sequence, (N, ...)"
        )
    return made


def _per_step(targets: Any, lengths: np.ndarray) -> list[np.ndarray]:
    made = as_sequences(targets, "Buckets: targets")
    if len(made) != len(lengths):
        raise ShapeError(
            f"Buckets: {len(lengths)} sequences and targets for {len(made)} were given, expected "
            "as many of each"
        )
    for row, (target, length) in enumerate(zip(made, lengths, strict=True)):
        if len(target) != length:
            raise ShapeError(
                f"Buckets: sequence {row} has {length} steps and targets for {len(target)}, "
                "expected a target for each step; where they follow another sequence, which is "
                "given to the model too, pass a tuple (sequences, given)"
            )
    return made
