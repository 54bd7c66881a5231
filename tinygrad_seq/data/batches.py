"""Mini-batches in a new random order each epoch, and a part held out.

Imports creation, trees, errors and sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from tinygrad_seq.creation import Rng, generator
from tinygrad_seq.data.sequences import as_values
from tinygrad_seq.errors import ShapeError, whole
from tinygrad_seq.trees import leaves, map_arrays, rebuild


class Batches:
    """Arrays cut into batches: ``for inputs, targets in Batches(inputs, targets, batch_size=32)``.

    The examples lie along ``axis`` of each array: 0, or 1 for arrays (T, B, ...), where steps come
    first; a tuple gives each array its own, ``axis=(1, 0)`` for inputs (T, B, I) and targets
    (B, K). Arrays of one axis, such as lengths (B,), are cut along that. One array gives arrays,
    several give tuples. A tuple or dict of arrays in the place of one is cut to a tuple or dict,
    ``Batches((source, target), targets, ...)`` for a model of two inputs; ``axis`` counts its
    arrays one by one, those of a dict by the order of their keys. Each pass is in a new random
    order unless ``shuffle`` is False; the order inside an example is kept. The orders follow from
    ``rng``, a seed or a generator, and from the package's seed if it is None. The last batch may be
    smaller, unless ``drop_last``.
    """

    def __init__(
        self,
        *arrays: Any,
        batch_size: int,
        shuffle: bool = True,
        drop_last: bool = False,
        axis: int | tuple[int, ...] = 0,
        rng: Rng = None,
    ) -> None:
        self._given = map_arrays(lambda each: as_values(each, "Batches"), arrays)
        self.arrays: list[np.ndarray] = leaves(self._given)
        self.batch_size = whole(batch_size, "Batches: batch_size")
        self._axes, self.count = _examples(self.arrays, axis, "Batches")
        self.shuffle = shuffle
        self.drop_last, self._rng = drop_last, None if rng is None else generator(rng)

    def __len__(self) -> int:
        """How many batches a pass has."""
        if self.drop_last:
            return self.count // self.batch_size
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        order = np.arange(self.count)
        if self.shuffle:
            generator(self._rng).shuffle(order)
        for k in range(len(self)):
            rows = order[k * self.batch_size : (k + 1) * self.batch_size]
            pairs = zip(self.arrays, self._axes, strict=True)
            batch = rebuild(self._given, (_taken(array, rows, axis) for array, axis in pairs))
            yield batch[0] if len(batch) == 1 else batch


def train_test_split(
    *arrays: ArrayLike,
    held_out: int | float,
    shuffle: bool = False,
    axis: int | tuple[int, ...] = 0,
    rng: Rng = None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each array as a pair (training part, part held out), cut alike along ``axis``.

    ``axis`` is that of ``Batches``.

    ``held_out`` is a number of examples, or a fraction of them between 0 and 1. The last ones are
    held out, as fits a series in time, or random ones with ``shuffle``.
    """
    made = [as_values(array, "train_test_split") for array in arrays]
    axes, count = _examples(made, axis, "train_test_split")
    if isinstance(held_out, (float, np.floating)) and 0 < held_out < 1:
        number = round(float(held_out) * count)
    else:
        number = whole(held_out, "train_test_split: held_out, unless a fraction below 1")
    if not 0 < number < count:
        raise ValueError(
            f"train_test_split: held_out = {held_out} of {count} examples was given, expected a "
            "part of them"
        )
    order = np.arange(count)
    if shuffle:
        generator(rng).shuffle(order)
    train, test = order[: count - number], order[count - number :]
    return [
        (_taken(array, train, k), _taken(array, test, k))
        for array, k in zip(made, axes, strict=True)
    ]


def _taken(array: np.ndarray, rows: np.ndarray, axis: int) -> np.ndarray:
    """A copy of these rows along ``axis``."""
    if array.flags.c_contiguous:
        return np.take(array, rows, axis)
    # Of a view, such as windows are, take would copy all before.
    return np.ascontiguousarray(array[(slice(None),) * axis + (rows,)])


def _examples(
    arrays: list[np.ndarray], axis: int | tuple[int, ...], name: str
) -> tuple[list[int], int]:
    """Along which axis the examples of each array lie, and how many there are."""
    if not arrays:
        raise ValueError(f"{name}: no arrays were given")
    given = axis if isinstance(axis, tuple) else (axis,) * len(arrays)
    shapes = [array.shape for array in arrays]
    fits = len(given) == len(arrays) and all(
        a.ndim and isinstance(k, (int, np.integer)) and 0 <= k < max(a.ndim, 2)
        for a, k in zip(arrays, given, strict=True)
    )
    if not fits:
        raise ShapeError(
            f"{name}: arrays of shapes {shapes} and axis {axis!r} were given, expected arrays with "
            "examples along an axis from 0 on, and as many axes as arrays; a tuple is as many "
            "arrays, a list is one"
        )
    axes = [k if a.ndim > 1 else 0 for a, k in zip(arrays, given, strict=True)]
    counts = [shape[k] for shape, k in zip(shapes, axes, strict=True)]
    if len(set(counts)) > 1:
        raise ShapeError(
            f"{name}: arrays of shapes {shapes} have {counts} examples along axes {axes}, expected "
            "as many of each; for arrays (T, B, ...) pass axis=1, or a tuple with an axis for each"
        )
    return axes, counts[0]
