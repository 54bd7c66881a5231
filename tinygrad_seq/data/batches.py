"""Mini-batches in a new random order each epoch, and a part held out. Imports creation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from tinygrad_seq.creation import generator
from tinygrad_seq.errors import ShapeError


class Batches:
    """Arrays cut into batches: ``for inputs, targets in Batches(inputs, targets, batch_size=32)``.

    The arrays share the length of ``axis``: examples along axis 0, or 1 where steps come first. One
    array gives arrays, several give tuples. Each pass is in a new random order unless ``shuffle``
    is False; the order inside an example is kept. The orders follow from ``rng``, a seed or a
    generator, and from the package's seed if it is None. The last batch may be smaller, unless
    ``drop_last``.
    """

    def __init__(
        self,
        *arrays: ArrayLike,
        batch_size: int,
        shuffle: bool = True,
        drop_last: bool = False,
        axis: int = 0,
        rng: np.random.Generator | int | None = None,
    ) -> None:
        self.arrays = [np.asarray(array) for array in arrays]
        if not self.arrays:
            raise ValueError("Batches: no arrays were given")
        if isinstance(batch_size, bool) or batch_size < 1:
            raise ValueError(f"Batches: batch_size = {batch_size} was given, expected 1 or more")
        # lengths (B,) go with sequences (T, B, ...): an array of one axis is cut along that.
        self._axes = [axis if array.ndim > axis else 0 for array in self.arrays]
        counts = [a.shape[k] if a.ndim else 0 for a, k in zip(self.arrays, self._axes, strict=True)]
        if len(set(counts)) > 1 or any(not a.ndim for a in self.arrays):
            raise ShapeError(
                f"Batches: arrays with {counts} examples were given, expected as many of each"
            )
        self.count, self.batch_size, self.shuffle = counts[0], int(batch_size), shuffle
        self.drop_last, self._rng = drop_last, None if rng is None else generator(rng)

    def __len__(self) -> int:
        """How many batches a pass has."""
        whole, rest = divmod(self.count, self.batch_size)
        return whole + (1 if rest and not self.drop_last else 0)

    def __iter__(self) -> Iterator[Any]:
        order = np.arange(self.count)
        if self.shuffle:
            generator(self._rng).shuffle(order)
        for k in range(len(self)):
            rows = order[k * self.batch_size : (k + 1) * self.batch_size]
            batch = tuple(
                np.take(array, rows, axis=axis)
                for array, axis in zip(self.arrays, self._axes, strict=True)
            )
            yield batch[0] if len(batch) == 1 else batch


def train_test_split(
    *arrays: ArrayLike, held_out: int | float, shuffle: bool = False, rng: Any = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each array as a pair (training part, part held out), cut alike along axis 0.

    ``held_out`` is a number of examples, or a fraction of them between 0 and 1. The last ones are
    held out, as fits a series in time, or random ones with ``shuffle``.
    """
    made = [np.asarray(array) for array in arrays]
    counts = {len(array) for array in made}
    if len(counts) != 1:
        raise ShapeError(f"train_test_split: {sorted(counts)} examples were given, expected equal")
    count = counts.pop()
    number = round(held_out * count) if isinstance(held_out, float) else held_out
    if not 0 < number < count:
        raise ValueError(
            f"train_test_split: held_out = {held_out} of {count} examples was given, expected a "
            "part of them"
        )
    order = np.arange(count)
    if shuffle:
        generator(rng).shuffle(order)
    train, test = order[: count - number], order[count - number :]
    return [(array[train], array[test]) for array in made]
