"""Sequences cut into windows, padded to one length and masked beyond their own.

Arrays in, arrays out. Imports errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from tinygrad_seq.errors import ShapeError, whole


def windows(series: ArrayLike, length: int, horizon: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Every window of a series and the value ``horizon`` steps after its end.

    ``series`` (N, ...) gives inputs (N − length − horizon + 1, length, ...) and targets
    (N − length − horizon + 1, ...), in the order of time; both are read-only views of the series.
    Windows come first, so a recurrent layer takes them with ``batch_first=True``, and it takes
    (N, length, features): give a series of one feature as ``series[:, None]``.
    Raises ValueError if the series is too short for one window.
    """
    values = as_series(series, "windows")
    length, horizon = whole(length, "windows: length"), whole(horizon, "windows: horizon")
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


def dense_windows(
    series: ArrayLike, length: int, horizon: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """The windows of many series of one length, flat, as a network without memory takes them.

    ``series`` (T, B, F), such as trajectories, gives inputs (B · M, length · F) and targets
    (B · M, F), the values ``horizon`` steps after each window, where M = T − length − horizon + 1.
    The first M rows are those of the first series in the order of time, so that series held out
    are the last rows. For a convolution reshape the inputs to (B · M, length, F).
    """
    values = as_series(series, "dense_windows")
    if values.ndim != 3:
        raise ShapeError(
            f"dense_windows: a series of shape {values.shape} was given, expected (T, B, F); add "
            "the missing axis, or take windows for a single series"
        )
    inputs, targets = windows(values, length, horizon)
    by_series, after = np.moveaxis(inputs, 2, 0), np.moveaxis(targets, 1, 0)
    rows = inputs.shape[0] * inputs.shape[2]
    return by_series.reshape(rows, length * values.shape[2]), after.reshape(rows, values.shape[2])


def mask_of(lengths: ArrayLike, T: int) -> np.ndarray:
    """Which steps belong to each sequence: lengths (B,) give booleans (T, B), False in padding.

    A loss takes it as ``mask=``. ``1 - mask_of(lengths, T).mean()`` is the share of padding.
    """
    steps, given = whole(T, "mask_of: T", least=0), as_values(lengths, "mask_of")
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        raise ShapeError(
            f"mask_of: lengths of shape {given.shape} and dtype {given.dtype} were given, expected "
            "integers (B,)"
        )
    if given.size and not 0 <= given.min() <= given.max() <= steps:
        raise ValueError(
            f"mask_of: lengths from {given.min()} to {given.max()} were given, expected 0 to "
            f"T = {steps}"
        )
    made: np.ndarray = np.arange(steps)[:, None] < given
    return made


def pad_sequences(
    sequences: Sequence[ArrayLike], value: float = 0.0, batch_first: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Sequences of different lengths in one array, filled up with ``value`` at the end.

    Each sequence is (T_b, ...) with the same further axes. Returns (T, B, ...), or (B, T, ...) with
    ``batch_first``, where T is the greatest length, and the lengths (B,).
    """
    arrays = as_sequences(sequences, "pad_sequences")
    lengths = np.array([len(a) for a in arrays])
    shape = (len(arrays), int(lengths.max()), *arrays[0].shape[1:])
    dtype = np.result_type(*([a for a in arrays if a.size] or arrays))  # [] says nothing of it
    if not _holds(dtype, value):
        raise ValueError(
            f"pad_sequences: {value!r} was given to pad {dtype} with, which cannot hold it"
        )
    padded = np.full(shape, value, dtype)
    for row, array in zip(padded, arrays, strict=True):
        row[: len(array)] = array
    return padded if batch_first else np.ascontiguousarray(padded.swapaxes(0, 1)), lengths


def _holds(dtype: np.dtype, value: float) -> bool:
    """Whether an array of this dtype can hold ``value``; the default 0.0 fits integers too."""
    if dtype.kind in "fc":
        return isinstance(value, (int, float, np.number, np.bool_))
    try:
        with np.errstate(invalid="ignore"):
            made = np.array(value, dtype)
    except (TypeError, ValueError, OverflowError):
        return False
    return bool(made == value or made != made)  # NaT, as NaN, is equal to nothing


def as_values(data: ArrayLike, name: str) -> np.ndarray:
    """``data`` as an array; ``name`` is for the errors, here and below."""
    try:
        return np.asarray(data)
    except ValueError:
        raise ShapeError(
            f"{name}: the rows given differ in length, expected an array; pad_sequences makes one"
        ) from None


def as_series(series: ArrayLike, name: str) -> np.ndarray:
    """``series`` as an array (N, ...)."""
    values = as_values(series, name)
    if not values.ndim:
        hint = "; encode a text with vocabulary.encode first" if isinstance(series, str) else ""
        raise ShapeError(
            f"{name}: one {type(series).__name__} was given, expected a series (N, ...){hint}"
        )
    return values


def several(values: Any, name: str, expected: str) -> Any:
    """``values``, of which one can take each; a ValueError names what was ``expected``."""
    if not np.iterable(values):
        raise ValueError(f"{name}: {values!r} was given, expected {expected}")
    return values


def as_sequences(sequences: Sequence[ArrayLike], name: str) -> list[np.ndarray]:
    """Each sequence as an array (T_b, ...), the further axes equal."""
    given = several(sequences, name, "a list of sequences")
    arrays = [as_series(each, f"{name}: sequence {k}") for k, each in enumerate(given)]
    if not arrays:
        raise ValueError(f"{name}: no sequences were given")
    if len({a.shape[1:] for a in arrays}) > 1:
        shapes = ", ".join(str(shape) for shape in dict.fromkeys(a.shape for a in arrays[:8]))
        raise ShapeError(
            f"{name}: shapes {shapes} were given, expected (T_b, ...) with equal further axes"
        )
    return arrays


def random_lengths(
    draw: np.random.Generator, count: int, shortest: int, longest: int, name: str, least: int = 1
) -> np.ndarray:
    """Lengths (count,) from ``shortest`` to ``longest``, each as likely; for the generators.

    Raises ValueError for a count below 1 and for lengths below ``least``.
    """
    whole(count, f"{name}: count")
    whole(longest, f"{name}: longest", least)
    whole(shortest, f"{name}: shortest", least)
    if longest < shortest:
        raise ValueError(
            f"{name}: shortest = {shortest} and longest = {longest} were given, expected the "
            "longest to be no less"
        )
    return draw.integers(shortest, longest + 1, count)
