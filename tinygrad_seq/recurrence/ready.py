"""Arrays as kernels read them.

Shapes: T steps, B rows of a batch. Imports the engine and trace.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from tinygrad_seq import devices
from tinygrad_seq.recurrence.trace import exact_up_to


def state_ready(array: Any, dtype: np.dtype[Any]) -> Any:
    """A floating (B, ...) as rows (B, n) in the kernel's dtype, one after the other."""
    if array.ndim != 2:
        array = array.reshape(len(array), prod(array.shape[1:]))
    elif array.dtype is dtype and type(array) is np.ndarray and array.flags.c_contiguous:
        return array
    return devices.namespace(array).asarray(array, dtype, order="C")


def sequence_ready(x: Any, dtype: np.dtype[Any]) -> Any:
    """(T, B, ...) as rows (T, B, n) in the kernel's dtype, the numbers of a row side by side."""
    if x.ndim == 3 and x.dtype is dtype and x.strides[2] == x.itemsize:
        return x  # quickly, for the commonest case
    _check_exact(x, dtype)
    x = x.astype(dtype, copy=False)
    if x.ndim != 3:
        x = x.reshape(*x.shape[:2], prod(x.shape[2:]))
    if x.shape[2] < 2 or x.strides[2] == x.itemsize:
        return x
    return devices.namespace(x).asarray(x, order="C")


def _check_exact(x: Any, dtype: np.dtype[Any]) -> None:
    """Raise a ValueError for integers that the step's dtype does not hold."""
    if x.dtype.kind not in "iu" or not x.size:
        return
    low, high = int(x.min()), int(x.max())
    if max(-low, high) > exact_up_to(dtype):
        raise ValueError(
            f"scan: integers from {low} to {high} were given, expected such as {dtype} holds "
            "exactly, in which the step computes; tgs.unroll keeps them integers"
        )


def capture_ready(array: Any, dtype: np.dtype[Any], matrix: bool) -> Any:
    """What a cell closes over in the kernel's dtype: a matrix at any whole strides, others row
    after row."""
    if array.dtype is dtype and type(array) is np.ndarray:  # quickly, for the commonest cases
        flags = array.flags
        if flags.c_contiguous or (matrix and flags.f_contiguous):
            return array
    if array.dtype != dtype:
        _check_exact(array, dtype)
        array = array.astype(dtype)
    if matrix and not any(stride % array.itemsize for stride in array.strides):
        return array
    return devices.namespace(array).asarray(array, order="C")
