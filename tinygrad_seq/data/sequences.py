"""Sequences cut into windows and padded to one length. Arrays in, arrays out; imports errors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from tinygrad_seq.errors import ShapeError, whole


def windows(series: ArrayLike, length: int, horizon: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Every window of a series and the value ``horizon`` steps after its end.

    ``series`` (N, ...) gives inputs (N − length − horizon + 1, length, ...) and targets
    (N − length − horizon + 1, ...), in the order of time; both are read-only views of the series.
    Raises ValueError if the series is too short for one window.
    """
    values = np.asarray(series)
    length, horizon = whole(length, "windows: length"), whole(horizon, "windows: horizon")
    if not values.ndim:
        raise ShapeError("windows: a single number was given, expected a series (N, ...)")
    count = len(values) - length - horizon + 1
    if count < 1:
        raise ValueError(
            f"windows: a series of {len(values)} is too short for windows of {length} with a "
            f"horizon of {horizon}; expected at least {length + horizon}"
        )
    view = np.lib.stride_tricks.sliding_window_view(values, length, axis=0)
    inputs = np.moveaxis(view, -1, 1)[:count]
    targets = values[length + horizon - 1 :].view()
    targets.flags.writeable = False
    return inputs, targets


def pad_sequences(
    sequences: Sequence[ArrayLike], value: float = 0.0, batch_first: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Sequences of different lengths in one array, filled up with ``value`` at the end.

    Each sequence is (T_b, ...) with the same further axes. Returns (T, B, ...), or (B, T, ...) with
    ``batch_first``, where T is the greatest length, and the lengths (B,).
    """
    arrays = [np.asarray(sequence) for sequence in sequences]
    if not arrays:
        raise ValueError("pad_sequences: no sequences were given")
    if any(not a.ndim for a in arrays) or len({a.shape[1:] for a in arrays}) > 1:
        shapes = ", ".join(str(shape) for shape in dict.fromkeys(a.shape for a in arrays[:8]))
        raise ShapeError(
            f"pad_sequences: shapes {shapes} were given, expected (T_b, ...) with equal "
            "further axes"
        )
    lengths = np.array([len(a) for a in arrays])
    shape = (len(arrays), int(lengths.max()), *arrays[0].shape[1:])
    dtype = np.result_type(*arrays)
    if dtype.kind in "iub" and not np.can_cast(np.min_scalar_type(value), dtype):
        raise ValueError(
            f"pad_sequences: {value} was given to pad {dtype} with, which cannot hold it"
        )
    padded = np.full(shape, value, dtype)
    for row, array in zip(padded, arrays, strict=True):
        row[: len(array)] = array
    return padded if batch_first else np.ascontiguousarray(padded.swapaxes(0, 1)), lengths
