"""What structural operations on values of a step become: products, cuts, joins, reductions.

Each function takes the tracer that asks, the inputs of the operation and its params, and gives the
value. Imports the engine and trace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from tinygrad_seq import devices
from tinygrad_seq.errors import ShapeError
from tinygrad_seq.recurrence.trace import ROLES, UNITS, Traced, stand_in
from tinygrad_seq.structural import concat, linear
from tinygrad_seq.tape import recording
from tinygrad_seq.tensors import Tensor

if TYPE_CHECKING:
    from tinygrad_seq.recurrence.tracing import Tracer

PIECES = 4  # slices that a choice of units may be joined from
_ALL = slice(None)


# Products ------------------------------------------------------------------------------------

# The pieces that a matrix was cut into in a call, with the matrix, whose id may be another's later.
Shares = dict[tuple[int, str, int, int, bool], tuple[Tensor, Tensor]]


def product_of_parts(name: str, parts: Sequence[Tensor], matrix: Tensor, shares: Shares) -> Tensor:
    """What was joined from parts, times a matrix: each part times its own share of it."""
    total: Tensor | None = None
    first = 0
    for part in parts:
        after = first + part.shape[1]
        key = id(matrix), name, first, after, recording.enabled
        if key not in shares:  # a matrix that is used again is cut once
            cut = matrix[first:after] if name == "matmul" else matrix[:, first:after]
            shares[key] = matrix, cut
        share = shares[key][1]
        product = part @ share if name == "matmul" else linear(part, share)
        total = product if total is None else total + product
        first = after
    assert total is not None
    return total


def _product(name: str, tracer: Tracer, inputs: Sequence[Tensor], params: Any) -> Tensor:
    trace, a, b = tracer.trace, inputs[0]._data, inputs[1]._data
    if type(b) is Traced:
        tracer.refuse(name, inputs, ": its right side must be a tensor that the cell closes over")
    if len(a.shape) != 2 or b.ndim != 2:
        tracer.refuse_mixing(name, inputs)
    parts = tracer.parts.get(a.slot)
    if parts is not None and a.slot not in trace.frozen:
        computed = [_computed(tracer, part) for part in parts]
        return product_of_parts(name, computed, inputs[1], tracer.shares)
    matrix = tracer.capture(inputs[1], ROLES[name])
    shape = trace.B, trace.widths[matrix]
    key = a.slot, matrix, recording.enabled
    if key in tracer.products:
        return stand_in(tracer, tracer.products[key], shape, trace.dtype)
    made = tracer.row("matmul", (a.slot, matrix), shape, trace.dtype)
    tracer.products[key] = made._data.slot
    return made


def _computed(tracer: Tracer, part: Tensor) -> Tensor:
    """A part of what was joined, as a value of the step."""
    dtype = tracer.trace.dtype
    if type(part._data) is not Traced:
        return stand_in(tracer, tracer.as_row(tracer.capture(part)), part.shape, dtype)
    return part if part.dtype is dtype else stand_in(tracer, part._data.slot, part.shape, dtype)


# Along the last axis -------------------------------------------------------------------------


def _reduce(name: str, tracer: Tracer, inputs: Sequence[Tensor], params: Any) -> Tensor:
    x, axes, keepdims = inputs[0]._data, params[0], params[1]
    if axes != (1,):
        if not axes:
            return _same(tracer, x, x.shape)
        tracer.refuse_mixing(name, inputs)
    if name != "sum" and not x.shape[1]:
        raise ShapeError(f"{name}: shape {x.shape} has no values along its last axis")
    B, dtype = tracer.trace.B, x.dtype
    if name == "sum" and dtype.kind in "bu":
        dtype = np.dtype(np.int64)
    return tracer.row(name, (x.slot,), (B, 1) if keepdims else (B,), dtype, single=True)


def _cumsum(tracer: Tracer, inputs: Sequence[Tensor], params: Any) -> Tensor:
    if inputs[0].ndim != 2 or params[0] != 1:
        tracer.refuse_mixing("cumsum", inputs)
    n = inputs[0].shape[1]
    return inputs[0] @ tracer.constant(np.triu(np.ones((n, n), tracer.trace.dtype)))


def _broadcast_to(tracer: Tracer, inputs: Sequence[Tensor], params: Any) -> Tensor:
    x, shape = inputs[0]._data, params[0]
    if shape == x.shape:
        return _same(tracer, x, shape)
    if len(shape) != 2 or x.ndim != 2 or shape[0] != tracer.trace.B:
        tracer.refuse_mixing("broadcast_to", inputs)
    return tracer.row("broadcast", (x.slot,), shape, x.dtype, (True,))


# The same numbers ----------------------------------------------------------------------------


def _same(tracer: Tracer, x: Traced, shape: tuple[int, ...]) -> Tensor:
    """The same numbers in a shape that a row may have as well."""
    made = stand_in(tracer, x.slot, shape, x.dtype)
    return made if recording.enabled else tracer.detach(made)


def _reshape(tracer: Tracer, inputs: Sequence[Tensor], params: Any) -> Tensor:
    x, shape, B = inputs[0]._data, params[0], tracer.trace.B
    if shape == x.shape or {shape, x.shape} == {(B,), (B, 1)}:
        return _same(tracer, x, shape)
    return tracer.refuse("reshape", inputs, f" to {shape}: values of a step are (B, n) or (B,)")


def _permute(tracer: Tracer, inputs: Sequence[Tensor], params: Any) -> Tensor:
    if params[0] == tuple(range(inputs[0].ndim)):
        return _same(tracer, inputs[0]._data, inputs[0].shape)
    return tracer.refuse(
        "permute_dims",
        inputs,
        ": it would mix rows; axis 0 is the batch and stays where it is, so what an equation "
        "writes as W h is h @ W.T here, or tgs.linear(h, W)",
    )


def _astype(tracer: Tracer, inputs: Sequence[Tensor], params: Any) -> Tensor:
    x = tracer.cast(inputs[0]._data, params[0])
    return stand_in(tracer, x.slot, x.shape, x.dtype)


# Cuts ----------------------------------------------------------------------------------------


def _getitem(tracer: Tracer, inputs: Sequence[Tensor], params: Any) -> Tensor:
    x, index, B = inputs[0]._data, params[0], tracer.trace.B
    if len(index) == 2 == len(x.shape) and _is_all(index[0]) and type(index[1]) is slice:
        begin, end = index[1].start, index[1].stop  # quickly, for the commonest case
        plain = index[1].step is None and type(begin) is type(end) is int
        if plain and 0 <= begin <= end <= x.shape[1]:
            return _slice(tracer, x, begin, end, (B, end - begin))
    parts = _spelled_out(index, x.ndim)
    if sum(part is not None for part in parts) > x.ndim:
        raise IndexError(
            f"indexing: {len(index)} indices were given for a value of {x.ndim} axes, at "
            f"line %{len(tracer.trace.rows)} of the step"
        )
    if not parts or not _is_all(parts[0]):
        tracer.refuse_mixing("indexing", inputs)
    named = [part for part in parts if part is not None]
    part, n = named[-1], x.shape[-1]
    one_each = x.ndim == 1 or isinstance(part, int)  # a number for each row, (B,) or (B, 1)
    if len(parts) - len(named) > one_each:
        tracer.refuse("indexing", inputs, ": values of a step are (B, n) or (B,)")
    shape = (B,) if len(parts) == len(named) else (B, 1)
    if x.ndim == 1:
        return _same(tracer, x, shape)
    if _is_all(part):
        return _same(tracer, x, x.shape)
    if isinstance(part, slice):
        start, stop, step = part.indices(n)
        if step == 1:
            stop = max(start, stop)
            return _slice(tracer, x, start, stop, (B, stop - start))
        return _chosen(tracer, x, np.arange(n)[part])
    try:
        chosen = np.arange(n)[part]
    except IndexError:
        raise IndexError(
            f"indexing: {part} was given for an axis of {n} elements, at line "
            f"%{len(tracer.trace.rows)} of the step"
        ) from None
    if isinstance(part, int):
        return _slice(tracer, x, int(chosen), int(chosen) + 1, shape)
    if chosen.ndim != 1:
        tracer.refuse("indexing", inputs, ": values of a step are (B, n) or (B,)")
    return _chosen(tracer, x, chosen)


def _slice(tracer: Tracer, x: Traced, start: int, stop: int, shape: tuple[int, ...]) -> Tensor:
    trace = tracer.trace
    for slot in trace.cuts.get(x.slot, ()):
        where = trace.starts[slot], trace.starts[slot] + trace.widths[slot]
        if where == (start, stop) and (slot in trace.frozen) is not recording.enabled:
            return stand_in(tracer, slot, shape, x.dtype)  # read again, it is the same row
    slot = trace.add("slice", (x.slot,), None, stop - start)
    trace.starts[slot] = start
    trace.cuts.setdefault(x.slot, []).append(slot)
    if not recording.enabled:
        trace.frozen.add(slot)
    return stand_in(tracer, slot, shape, x.dtype)


def _chosen(tracer: Tracer, x: Traced, units: np.ndarray) -> Tensor:
    """Any choice of units: slices joined, or taken one by one.

    On a GPU the latter is a product with a matrix of ones and zeros.
    """
    trace, n = tracer.trace, x.shape[1]
    starts = np.flatnonzero(np.diff(units, prepend=-2) != 1)  # of pieces that are slices
    if 0 < len(starts) <= PIECES:
        ends = [*starts[1:], len(units)]
        pieces = [
            (int(units[k]), int(units[end - 1]) + 1) for k, end in zip(starts, ends, strict=True)
        ]
        return concat([_slice(tracer, x, a, b, (trace.B, b - a)) for a, b in pieces], axis=1)
    if trace.device == devices.CPU:
        taken = tracer.capture(tracer.constant(units.astype(trace.dtype)), UNITS)
        return tracer.row("take", (x.slot, taken), (trace.B, len(units)), x.dtype)
    numbers = stand_in(tracer, x.slot, x.shape, trace.dtype)
    made = numbers @ tracer.constant((np.arange(n)[:, None] == units).astype(trace.dtype))
    return stand_in(tracer, made._data.slot, made.shape, x.dtype)


def _is_all(part: Any) -> bool:
    return type(part) is slice and part == _ALL


def _spelled_out(index: tuple[Any, ...], ndim: int) -> list[Any]:
    """An index with ... and what is left out written as full slices."""
    named = sum(part is not None and part is not Ellipsis for part in index)
    rest = [slice(None)] * (ndim - named)
    parts: list[Any] = []
    for part in index:
        if part is Ellipsis:
            parts += rest
            rest = []
        else:
            parts.append(part)
    return parts + rest


# Joins ---------------------------------------------------------------------------------------


def _concat(tracer: Tracer, inputs: Sequence[Tensor], params: Any) -> Tensor:
    trace = tracer.trace
    if params[0] != 1:
        tracer.refuse_mixing("concat", inputs)
    slots = []
    for value in inputs:
        data = value._data
        if type(data) is Traced:
            slots.append(data.slot)
        elif data.shape[0] != trace.B:
            tracer.refuse_mixing("concat", inputs)
        else:
            slots.append(tracer.capture(value))
    dtypes = {value.dtype for value in inputs}
    dtype = dtypes.pop() if len(dtypes) == 1 else trace.dtype
    made = tracer.row("concat", tuple(slots), (trace.B, params[1][-1]), dtype)
    tracer.parts[made._data.slot] = tuple(inputs)
    return made


def _stack(tracer: Tracer, inputs: Sequence[Tensor], params: Any) -> Tensor:
    """Numbers (B,) side by side: (B, n)."""
    if params[0] != 1 or inputs[0].ndim != 1:
        tracer.refuse(
            "stack",
            inputs,
            ": values of a step are (B, n) or (B,); those of shape (B,) may be stacked along "
            "axis -1, others be joined there with tgs.concat",
        )
    slots = tuple([tracer.operand(value, 1) for value in inputs])
    dtype = np.result_type(*(value.dtype for value in inputs))
    return tracer.row("concat", slots, (tracer.trace.B, len(slots)), dtype)


def _pad(tracer: Tracer, inputs: Sequence[Tensor], params: Any) -> Tensor:
    x, (widths, value) = inputs[0], params
    if x.ndim != 2 or widths[0] != (0, 0):
        tracer.refuse_mixing("pad", inputs)
    B, dtype = tracer.trace.B, tracer.trace.dtype
    before, after = (tracer.constant(np.full((B, n), value, dtype)) for n in widths[1])
    return concat([before, x, after], axis=1)


LOWERED: dict[str, Callable[[Tracer, Sequence[Tensor], Any], Tensor]] = {
    "matmul": partial(_product, "matmul"),
    "linear": partial(_product, "linear"),
    "sum": partial(_reduce, "sum"),
    "max": partial(_reduce, "max"),
    "min": partial(_reduce, "min"),
    "cumsum": _cumsum,
    "broadcast_to": _broadcast_to,
    "reshape": _reshape,
    "permute_dims": _permute,
    "astype": _astype,
    "getitem": _getitem,
    "concat": _concat,
    "stack": _stack,
    "pad": _pad,
}
