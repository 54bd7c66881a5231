"""Values of several axes: how (B, a, b) is a row of a·b units, and what its axes come to.

A step tape knows rows (B, n) alone. The shape of a value is kept beside its row, its units in the
order in which NumPy has them, and only where axes matter is anything done: units are *chosen*, or a
product goes along the last axis, line by line (``lowering.product_of_lines``). A
value repeated along an axis is a choice in which units stand several times, a transposed one is
another order. A sum along some axes is such a choice gone back through: each unit is added to the
one that it would have been chosen from.

A choice is written in runs, all of one length: ``take`` has runs of units that follow one another,
``spread`` runs of one unit each, and both read the first units of their runs from an array. On a
GPU a choice is a product with a matrix of ones and zeros. Imports the engine and trace.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from tinygrad_seq import devices
from tinygrad_seq.recurrence.trace import MATRIX, UNITS, Traced, stand_in
from tinygrad_seq.structural import broadcast_to, reshape
from tinygrad_seq.tape import recording
from tinygrad_seq.tensors import Tensor

if TYPE_CHECKING:
    from tinygrad_seq.recurrence.tracing import Tracer

Shape = tuple[int, ...]
# Where kernels choose units, and multiply line by line; elsewhere both are products of whole rows.
UNIT_BY_UNIT = [devices.CPU]


def units_of(shape: Shape) -> np.ndarray:
    """The number of each unit of a value (B, ...), as they stand along its axes."""
    return np.arange(prod(shape[1:])).reshape(shape[1:])


def runs(units: np.ndarray) -> tuple[str, np.ndarray]:
    """A choice as ``take`` or ``spread``, whichever has longer runs, and the first units of these.

    [0, 1, 2, 0, 1, 2] is take of [0, 0], [0, 0, 1, 1] is spread of [0, 1].
    """
    steps, found = np.diff(units), []
    for op, step in (("take", 1), ("spread", 0)):
        breaks = np.flatnonzero(steps != step) + 1
        found.append((int(np.gcd.reduce(np.append(breaks, len(units)))), op))
    length, op = max(found, key=lambda each: each[0])
    return op, units[:: max(length, 1)]


def unrolled(op: str, starts: np.ndarray, count: int) -> np.ndarray:
    """The units of a choice in runs; ``count`` of them."""
    length = count // max(len(starts), 1)
    inside = np.arange(length) if op == "take" else np.zeros(length, int)
    units: np.ndarray = starts.astype(int)[:, None] + inside
    return units.ravel()


def chosen(tracer: Tracer, x: Traced, units: np.ndarray, shape: Shape) -> Tensor:
    """The value of this shape whose units are those of x with these numbers."""
    return _choice(tracer, x, units.ravel(), shape, x.dtype, "")


def added_up(tracer: Tracer, x: Traced, units: np.ndarray, shape: Shape, dtype: Any) -> Tensor:
    """The value of this shape to whose unit ``units[j]`` each unit j of x is added."""
    return _choice(tracer, x, units.ravel(), shape, dtype, "_transposed")


def _choice(
    tracer: Tracer, x: Traced, units: np.ndarray, shape: Shape, dtype: Any, back: str
) -> Tensor:
    trace, here, there = tracer.trace, prod(x.shape[1:]), prod(shape[1:])
    if here == there and np.array_equal(units, np.arange(here)):
        return same_units(tracer, x, shape, dtype)
    if trace.device in UNIT_BY_UNIT:
        op, starts = runs(units)
        array, role = starts, UNITS
    else:
        op, role = "matmul", MATRIX
        array = np.arange(there) == units[:, None] if back else np.arange(here)[:, None] == units
        back = ""
    operand = tracer.capture(tracer.constant(array, role), role)
    return tracer.product(op + back, x, operand, shape, dtype)


def same_units(tracer: Tracer, x: Traced, shape: Shape, dtype: Any) -> Tensor:
    """The same row as a value of another shape or dtype."""
    made = stand_in(tracer, x.slot, shape, dtype)
    stays = recording.enabled or x.slot in tracer.trace.frozen
    return made if stays else tracer.freeze(made)


def repeated_to(tracer: Tracer, x: Traced, shape: Shape) -> Tensor:
    """A value repeated along axes of length 1."""
    return chosen(tracer, x, np.broadcast_to(units_of(x.shape), shape[1:]), shape)


# Tensors from outside of the cell -------------------------------------------------------------


def full_shape(given: Shape, shape: Shape) -> Shape | None:
    """What a tensor must be broadcast to, to stand as a row beside values of a shape.

    None if it is one as it is: (), (n,), (1, n) or (B, n) beside (B, n), () beside all others.
    """
    if not given or len(shape) == 2:
        return None
    aligned = (1,) * (len(shape) - len(given)) + given
    return aligned if prod(aligned[1:]) == 1 else (aligned[0], *shape[1:])


def as_row(tensor: Tensor, full: Shape) -> Tensor:
    """A tensor as a row: (1, n) for all, or (B, n). It happens once, on the tape outside."""
    outer, recording.enabled = recording.enabled, True  # who else reads it may want its gradient
    try:
        return reshape(broadcast_to(tensor, full), (full[0], prod(full[1:])))
    finally:
        recording.enabled = outer
