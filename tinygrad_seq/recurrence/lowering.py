"""What structural operations on values of a step become: products, cuts, joins, reductions.

Each function takes the tracer that asks, the inputs of the operation and its params, and gives the
value. Imports the engine, choices and trace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from tinygrad_seq import structural
from tinygrad_seq.composites import expand_dims
from tinygrad_seq.creation import eye
from tinygrad_seq.elementwise import maximum, minimum, where
from tinygrad_seq.errors import ShapeError
from tinygrad_seq.recurrence import choices
from tinygrad_seq.recurrence.choices import added_up, chosen, repeated_to, same_units, units_of
from tinygrad_seq.recurrence.trace import ROLES, Traced, stand_in
from tinygrad_seq.structural import along, linear, with_ones
from tinygrad_seq.tape import recording
from tinygrad_seq.tensors import Tensor, apply

if TYPE_CHECKING:
    from tinygrad_seq.recurrence.tracing import Tracer

PIECES = 4  # slices that a choice of units may be joined from
MOST_IN_BLOCKS = 2**26  # numbers of a matrix that stands for the products of many lines
_ALL = slice(None)


# Products ------------------------------------------------------------------------------------

# What was made of matrices in a call, and the matrix, whose id may be another's later.
Shares = dict[tuple[Any, ...], tuple[Tensor, Tensor]]
IN_GROUPS = ("in groups",)  # params of a product of lines whose matrices are one under the other


def _once(
    shares: Shares, how: tuple[Any, ...], matrix: Tensor, make: Callable[[], Tensor]
) -> Tensor:
    """What is made of a matrix, once for all who want it."""
    key = id(matrix), how, recording.enabled
    if key not in shares:
        shares[key] = matrix, make()
    return shares[key][1]


def product_of_parts(name: str, parts: Sequence[Tensor], matrix: Tensor, shares: Shares) -> Tensor:
    """What was joined from parts, times a matrix: each part times its own share of it."""
    total: Tensor | None = None
    first = 0
    for part in parts:
        after = first + part.shape[1]
        cut = slice(first, after) if name == "matmul" else (_ALL, slice(first, after))
        share = _once(shares, (name, first, after), matrix, partial(matrix.__getitem__, cut))
        product = part @ share if name == "matmul" else linear(part, share)
        total = product if total is None else total + product
        first = after
    assert total is not None
    return total


def product_of_lines(name: str, inputs: Sequence[Tensor], shares: Shares) -> Tensor:
    """A product of values of several axes: of lines with a matrix, or with one for each group.

    x (B, m, k) times W (k, n) is a row of the step, the product of its lines, and so is
    x (B, g, m, k) times W (g, k, n), heads that have a matrix each. W x is (xᵀ Wᵀ)ᵀ. On a GPU they
    are the row of all lines times a matrix of blocks, I ⊗ W and Wᵀ ⊗ I. Between values of the step,
    with a matrix of one column, and where one of blocks would be large, all numbers are multiplied
    that meet, (B, m, k, 1) times (B, 1, k, n), and summed along k.
    """
    a, b = inputs
    left = type(a._data) is not Traced  # the matrix is
    matrix, x = (a, b) if left else (b, a)
    b = b.T if name == "linear" else b
    groups, lines = x.shape[1:-2], x.shape[-1 if left else -2]
    closed_over = type(matrix._data) is not Traced and matrix.ndim < x.ndim
    if closed_over:
        try:
            groups = np.broadcast_shapes(groups, matrix.shape[:-2])
        except ValueError:
            raise ShapeError(
                f"{name}: {a.shape} and {inputs[1].shape} were given at line "
                f"%{len(x._data.tracer.trace.rows)} of the step, their axes before the last two, "
                "aligned at the last, must be equal or 1"
            ) from None
    k, n = matrix.shape[-2:] if name != "linear" else matrix.shape[::-1]
    count = prod(groups) * lines
    of_lines = x.device in choices.UNIT_BY_UNIT
    if closed_over and of_lines and k * n * count and (left or n > 1):
        if left:
            return _matrix_times(x, matrix, shares)
        return _lines(name, x, matrix) if matrix.ndim == 2 else _groups(x, matrix, groups, shares)
    if not closed_over or of_lines or k * n * count**2 > MOST_IN_BLOCKS:
        return structural.sum(expand_dims(a, -1) * expand_dims(b, -3), axis=-2)
    key = f"blocks of {name}", left, groups, lines
    make = partial(_blocks, a if left else b, groups, lines, left)
    blocks = _once(shares, key, matrix, make)
    x = _with_groups(x, groups)
    made = x.reshape(len(x), prod(x.shape[1:])) @ blocks
    return made.reshape((len(x), *groups, k, lines) if left else (*x.shape[:-1], n))


def _lines(name: str, x: Tensor, matrix: Tensor) -> Tensor:
    """Each line of x times a matrix, or times that of its group."""
    tracer: Tracer = x._data.tracer
    operand = tracer.capture(matrix, ROLES[name])
    shape = (*x.shape[:-1], tracer.trace.widths[operand])
    return tracer.product("matmul_lines", x._data, operand, shape, tracer.trace.dtype)


def _groups(x: Tensor, matrix: Tensor, groups: tuple[int, ...], shares: Shares) -> Tensor:
    """x (B, *groups, m, k) times a matrix (k, n) for each group."""

    def one_under_the_other() -> Tensor:
        k, n = matrix.shape[-2:]
        return structural.broadcast_to(matrix, (*groups, k, n)).reshape(prod(groups) * k, n)

    under = _once(shares, ("one under the other", groups), matrix, one_under_the_other)
    return apply(structural.MATMUL, (_with_groups(x, groups), under), IN_GROUPS)


def _matrix_times(x: Tensor, matrix: Tensor, shares: Shares) -> Tensor:
    """W x = (xᵀ Wᵀ)ᵀ, a matrix for all or one for each group."""
    if matrix.ndim == 2:
        return _transposed(linear(_transposed(x), matrix))
    transposed = _once(shares, ("transposed",), matrix, partial(_transposed, matrix))
    return _transposed(_transposed(x) @ transposed)


def _transposed(x: Tensor) -> Tensor:
    """The last two axes the other way round."""
    return structural.permute_dims(x, (*range(x.ndim - 2), x.ndim - 1, x.ndim - 2))


def _with_groups(x: Tensor, groups: tuple[int, ...]) -> Tensor:
    """x with all of the groups, repeated where it has fewer than the matrices."""
    if x.shape[1:-2] == groups:
        return x
    return structural.broadcast_to(x, (len(x), *groups, *x.shape[-2:]))


def _blocks(matrix: Tensor, groups: tuple[int, ...], lines: int, left: bool) -> Tensor:
    """What so many lines of each group are multiplied by, as one matrix for all of them."""
    g, k, n = prod(groups), *matrix.shape[-2:]
    matrix = structural.broadcast_to(matrix, (*groups, k, n)).reshape(g, k, n)
    own, once = (eye(m, dtype=matrix.dtype).to(matrix.device) for m in (g, lines))
    own = own.reshape(g, 1, 1, g, 1, 1)
    if left:  # W (k, n) times lines that are columns
        each = matrix.transpose(0, 2, 1).reshape(g, n, 1, 1, k, 1)
        made = own * once.reshape(1, 1, lines, 1, 1, lines) * each
        return made.reshape(g * n * lines, g * k * lines)
    each = matrix.reshape(g, 1, k, 1, 1, n)
    made = own * once.reshape(1, lines, 1, 1, lines, 1) * each
    return made.reshape(g * lines * k, g * lines * n)


def _product(name: str, tracer: Tracer, inputs: Sequence[Tensor], params: Any) -> Tensor:
    trace, a, b = tracer.trace, inputs[0]._data, inputs[1]._data
    if params == IN_GROUPS:
        return _lines(name, *inputs)
    if max(a.ndim, b.ndim) > 2:
        if any(type(each) is Traced and each.ndim == 2 for each in (a, b)):
            tracer.refuse(
                name,
                inputs,
                ": it would mix rows; axis 0 is the batch, so a vector for each row, beside a "
                "matrix for each row, is h[:, None, :] on the left and h[:, :, None] on the right",
            )
        return product_of_lines(name, inputs, tracer.shares)
    if type(b) is Traced:
        tracer.refuse(name, inputs, ": its right side must be a tensor that the cell closes over")
    if a.ndim != 2:
        tracer.refuse_mixing(name, inputs)
    parts = tracer.parts.get(a.slot)
    if parts is not None and a.slot not in trace.frozen:
        computed = [_computed(tracer, part) for part in parts]
        return product_of_parts(name, computed, inputs[1], tracer.shares)
    matrix = tracer.capture(inputs[1], ROLES[name])
    return tracer.product("matmul", a, matrix, (trace.B, trace.widths[matrix]), trace.dtype)


def _computed(tracer: Tracer, part: Tensor) -> Tensor:
    """A part of what was joined, as a value of the step."""
    dtype = tracer.trace.dtype
    if type(part._data) is not Traced:
        return stand_in(tracer, tracer.plus_zero(tracer.capture(part)), part.shape, dtype)
    return part if part.dtype is dtype else stand_in(tracer, part._data.slot, part.shape, dtype)


# Along axes ----------------------------------------------------------------------------------


def _reduce(name: str, tracer: Tracer, inputs: Sequence[Tensor], params: Any) -> Tensor:
    x, axes, keepdims = inputs[0]._data, params[0], params[1]
    if 0 in axes:
        tracer.refuse_mixing(name, inputs)
    count = prod([x.shape[k] for k in axes])
    if name != "sum" and not count:
        raise ShapeError(f"{name}: shape {x.shape} has no values along axis {axes}")
    kept = with_ones(x.shape, axes)
    shape = kept if keepdims else tuple([n for k, n in enumerate(x.shape) if k not in axes])
    dtype = np.dtype(np.int64) if name == "sum" and x.dtype.kind in "bu" else x.dtype
    if not axes:
        return same_units(tracer, x, shape, dtype)
    if len(axes) == x.ndim - 1:
        return tracer.row(name, (x.slot,), shape, dtype, single=True)
    if name != "sum":
        if x.dtype.kind == "f":
            return extremum(name, inputs[0], axes, keepdims)
        # Whole numbers and conditions are floats in the step.
        value = tracer.freeze(stand_in(tracer, x.slot, x.shape, tracer.trace.dtype))
        made = extremum(name, value, axes, keepdims)
        return stand_in(tracer, made._data.slot, shape, dtype)
    return added_up(tracer, x, np.broadcast_to(units_of(kept), x.shape[1:]), shape, dtype)


def extremum(name: str, x: Tensor, axes: tuple[int, ...], keepdims: bool) -> Tensor:
    """The largest or smallest values along some axes, by halves; ties share the gradient equally.

    What it is off the tape, and on it something that has the derivative and changes nothing: a
    zero, or beside an infinite one the same again.
    """
    fold, value = maximum if name == "max" else minimum, x.detach()
    for axis in axes:
        while (n := value.shape[axis]) > 1:
            half = -(-n // 2)  # which may overlap
            parts = slice(0, half), slice(n - half, n)
            value = fold(*(value[along(axis, part)] for part in parts))
    if x.dtype.kind == "f" and x._data.slot not in x._data.tracer.trace.frozen:
        tied = x == value
        more = where(tied, where(abs(x) < np.inf, x - x.detach(), x), 0.0)
        count = structural.sum(tied.astype(x.dtype), axes, True)  # none are where one is NaN
        value = value + structural.sum(more, axes, True) / maximum(count, 1.0)
    return value if keepdims else value.reshape([n for k, n in enumerate(x.shape) if k not in axes])


def _cumsum(tracer: Tracer, inputs: Sequence[Tensor], params: Any) -> Tensor:
    x, (axis,) = inputs[0], params
    if not axis:
        tracer.refuse_mixing("cumsum", inputs)
    n, order = x.shape[axis], list(range(x.ndim))
    if n < 2 or not x.size:
        return same_units(tracer, x._data, x.shape, x.dtype)
    order[axis], order[-1] = order[-1], order[axis]
    turned = _permute(tracer, [x], (order,)) if axis < x.ndim - 1 else x
    made = _product("matmul", tracer, [turned, tracer.constant(np.triu(np.ones((n, n))))], ())
    made = _permute(tracer, [made], (order,)) if axis < x.ndim - 1 else made
    return stand_in(tracer, made._data.slot, x.shape, x.dtype)


def _broadcast_to(tracer: Tracer, inputs: Sequence[Tensor], params: Any) -> Tensor:
    x, shape = inputs[0]._data, params[0]
    if len(shape) != x.ndim or shape[0] != tracer.trace.B:
        tracer.refuse_mixing("broadcast_to", inputs)
    if prod(x.shape[1:]) == 1 and shape != x.shape:
        return tracer.row("broadcast", (x.slot,), shape, x.dtype, (True,))
    return repeated_to(tracer, x, shape)


def _reshape(tracer: Tracer, inputs: Sequence[Tensor], params: Any) -> Tensor:
    x, shape = inputs[0]._data, params[0]
    if shape[:1] != (tracer.trace.B,):
        tracer.refuse_mixing("reshape", inputs)
    return same_units(tracer, x, shape, x.dtype)


def _permute(tracer: Tracer, inputs: Sequence[Tensor], params: Any) -> Tensor:
    x, axes = inputs[0]._data, params[0]
    if axes[0] != 0:
        tracer.refuse(
            "permute_dims",
            inputs,
            ": it would mix rows; axis 0 is the batch and stays where it is, so what an equation "
            "writes as W h is h @ W.T here, or tgs.linear(h, W)",
        )
    units = units_of(x.shape).transpose([k - 1 for k in axes[1:]])
    return chosen(tracer, x, units, (x.shape[0], *units.shape))


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
    if not parts or not _is_all(parts[0]):
        tracer.refuse_mixing("indexing", inputs)
    here = units_of(x.shape)
    try:
        two_rows = np.stack([here, here + here.size])[tuple(parts)]
    except IndexError as error:
        raise IndexError(
            f"indexing: {error}, in a value of shape {x.shape} at line %{len(tracer.trace.rows)} "
            "of the step"
        ) from None
    if len(two_rows) != 2 or not np.array_equal(two_rows[0] + here.size, two_rows[1]):
        tracer.refuse_mixing("indexing", inputs)  # arrays apart put their axes first
    return _cut(tracer, x, np.asarray(two_rows[0]))


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


def _cut(tracer: Tracer, x: Traced, units: np.ndarray) -> Tensor:
    """The units of x with these numbers: a slice, a few slices joined, or a choice."""
    shape, flat = (x.shape[0], *units.shape), units.ravel()
    begins = np.flatnonzero(np.diff(flat, prepend=-2) != 1)  # of pieces that are slices
    ends = [*begins[1:], len(flat)]
    all_of_it = len(begins) == 1 and len(flat) == prod(x.shape[1:])
    if all_of_it or not 0 < len(begins) <= (PIECES if x.ndim == 2 else 1):
        return chosen(tracer, x, units, shape)
    slices = [(int(flat[k]), int(flat[end - 1]) + 1) for k, end in zip(begins, ends, strict=True)]
    if len(slices) == 1:
        return _slice(tracer, x, *slices[0], shape)
    pieces = [_slice(tracer, x, k, end, (shape[0], end - k)) for k, end in slices]
    return _join(tracer, pieces, shape)


def _is_all(part: Any) -> bool:
    return type(part) is slice and part == _ALL


def _axes_of(part: Any) -> int:
    """How many axes a part of an index stands for."""
    if part is None or part is Ellipsis:
        return 0
    return part.ndim if isinstance(part, np.ndarray) and part.dtype == np.bool_ else 1


def _spelled_out(index: tuple[Any, ...], ndim: int) -> list[Any]:
    """An index with ... and what is left out written as full slices."""
    rest = [_ALL] * (ndim - sum(map(_axes_of, index)))
    parts: list[Any] = []
    for part in index:
        if part is Ellipsis:
            parts += rest
            rest = []
        else:
            parts.append(part)
    return parts + rest


# Joins ---------------------------------------------------------------------------------------


def _join(tracer: Tracer, inputs: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Values of the step, and tensors with a row for each of its rows, side by side."""
    slots = tuple([tracer.operand(value, value.shape) for value in inputs])
    dtypes = {value.dtype for value in inputs}
    dtype = dtypes.pop() if len(dtypes) == 1 else tracer.trace.dtype
    return tracer.row("concat", slots, shape, dtype)


def _numbered(inputs: Sequence[Tensor]) -> list[np.ndarray]:
    """The units of several values, each counted on from those before it."""
    units = [units_of(value.shape) for value in inputs]
    return [each + sum(u.size for u in units[:k]) for k, each in enumerate(units)]


def _concat(tracer: Tracer, inputs: Sequence[Tensor], params: Any) -> Tensor:
    B, axis = tracer.trace.B, params[0]
    if not axis or any(len(value) != B for value in inputs):
        tracer.refuse_mixing("concat", inputs)
    order = np.concatenate(_numbered(inputs), axis - 1)
    made = _join(tracer, inputs, (B, order.size))
    if inputs[0].ndim == 2:
        tracer.parts[made._data.slot] = tuple(inputs)
    return chosen(tracer, made._data, order, (B, *order.shape))


def _stack(tracer: Tracer, inputs: Sequence[Tensor], params: Any) -> Tensor:
    B, axis = tracer.trace.B, params[0]
    if not axis or any(len(value) != B for value in inputs):
        tracer.refuse(
            "stack",
            inputs,
            ": it would mix rows; axis 0 is the batch, so stack values along axis 1 or -1, or join "
            "them there with tgs.concat",
        )
    order = np.stack(_numbered(inputs), axis - 1)
    return chosen(tracer, _join(tracer, inputs, (B, order.size))._data, order, (B, *order.shape))


def _pad(tracer: Tracer, inputs: Sequence[Tensor], params: Any) -> Tensor:
    x, (widths, value) = inputs[0], params
    B = tracer.trace.B
    if widths[0] != (0, 0):
        tracer.refuse_mixing("pad", inputs)
    if x.ndim == 1:  # the batch is all it has
        return same_units(tracer, x._data, x.shape, x.dtype)
    value = np.asarray(value).astype(x.dtype)  # of a condition any number but 0 is True
    if x.ndim == 2:
        before, after = (tracer.constant(np.full((B, n), value)) for n in widths[1])
        made = _join(tracer, [before, x, after], (B, x.shape[1] + sum(widths[1])))
    else:
        units, beside = units_of(x.shape), tracer.constant(np.full((B, 1), value))
        order = np.pad(units, widths[1:], constant_values=units.size)
        joined = _join(tracer, [x, beside], (B, units.size + 1))
        made = chosen(tracer, joined._data, order, (B, *order.shape))
    return stand_in(tracer, made._data.slot, made.shape, x.dtype)


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
