"""Primitives that know axes: products, reductions, shapes, indexing; and the one unbroadcast.

Each is an ``Operation`` whose derivatives are written with methods and operators that arrays and
tensors share, so that one text serves the backward and its own derivative. What can be made of
these without a derivative of its own is in ``composites.py``.
Imports rules, tape, tensors, blas, devices and errors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache, partial
from math import prod
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from tinygrad_seq import blas, devices
from tinygrad_seq.errors import DeviceError, ShapeError
from tinygrad_seq.rules import Array, Operation
from tinygrad_seq.tape import Arithmetic, Entry, Piece
from tinygrad_seq.tensors import (
    FLOATS,
    Axis,
    Tensor,
    TensorLike,
    apply,
    as_tensor,
    beside,
    check_dtype,
    float_dtype,
    is_traced,
    looked_at,
    promote,
    wrap,
)

TOGETHER = 512  # rows whose sums are added up
MANY = 16  # rows of one place that are added up by themselves
# Numbers of sums and of what is summed up to which NumPy's reduceat is quick: it goes down column
# after column.
MOST_SUMS, MOST_SUMMED = 2**15, 2**18


class EachInput:
    """The derivatives of an operation with any number of inputs: ``vjp(k, g, ...)`` of input k."""

    def __init__(self, vjp: Any) -> None:
        self.vjp = vjp

    def __getitem__(self, k: int) -> Any:
        return partial(self.vjp, k)


def check_axes(axis: Axis, ndim: int, operation: str) -> tuple[int, ...]:
    """``axis`` as a tuple of distinct axes from 0 on; None means all of them."""
    if axis is None:
        return tuple(range(ndim))
    given = axis if isinstance(axis, (tuple, list)) else (axis,)
    for a in given:
        if isinstance(a, bool) or not isinstance(a, (int, np.integer)):
            raise ValueError(f"{operation}: axis {axis!r} was given, expected integers or None")
        if not -ndim <= a < ndim:
            expected = (
                f"with {ndim} axes, expected {-ndim} to {ndim - 1}" if ndim else "of shape ()"
            )
            raise ShapeError(f"{operation}: axis {a} was given for a tensor {expected}")
    axes = tuple(int(a) % ndim for a in given)
    if len(set(axes)) < len(axes):
        raise ShapeError(f"{operation}: axis {axis!r} names an axis twice")
    return axes


def check_axis(axis: Any, ndim: int, operation: str) -> int:
    """``axis`` as one axis from 0 on."""
    if type(axis) is int and -ndim <= axis < ndim:
        return axis % ndim
    if isinstance(axis, bool) or not isinstance(axis, (int, np.integer)):
        raise ValueError(f"{operation}: axis {axis!r} was given, expected an integer")
    return check_axes(int(axis), ndim, operation)[0]


def check_shape(shape: Any, operation: str, least: int = 0) -> tuple[int, ...]:
    """``shape``, an integer or a sequence of them, as a tuple; ``((2, 3),)`` is (2, 3)."""
    given = shape
    if type(shape) is not tuple:
        given = tuple(shape) if isinstance(shape, (Sequence, np.ndarray)) else (shape,)
    if len(given) == 1 and isinstance(given[0], (tuple, list)):
        shape = given = tuple(given[0])
    strange = False
    for n in given:
        if type(n) is int and n >= least:  # quickly, for the commonest case
            continue
        strange = True
        if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < least:
            hint = "" if isinstance(n, (int, float)) else "; a dtype goes by keyword"
            raise ShapeError(
                f"{operation}: shape {shape!r} was given, expected integers from {least} on{hint}"
            )
    return tuple(map(int, given)) if strange else given


def along(axis: int, index: Any) -> tuple[Any, ...]:
    """The index that takes ``index`` along ``axis`` and everything along the others before."""
    return (slice(None),) * axis + (index,)


def with_ones(shape: Sequence[int], axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(1 if k in axes else n for k, n in enumerate(shape))


def _spread(g: Any, shape: tuple[int, ...], axes: tuple[int, ...]) -> Any:
    """The gradient of a sum over ``axes``, repeated to fill ``shape``."""
    g = g.reshape(with_ones(shape, axes))
    return broadcast_to(g, shape) if isinstance(g, Tensor) else np.broadcast_to(g, shape)


# Products ------------------------------------------------------------------------------------


def _transposed(x: Any) -> Any:
    return x.T if x.ndim == 2 else x.transpose((*range(x.ndim - 2), x.ndim - 1, x.ndim - 2))


def _times(a: Any, b: Any) -> Any:
    return a @ b if isinstance(a, Tensor) or isinstance(b, Tensor) else blas.matmul(a, b)


MATMUL = Operation(
    "matmul",
    ("a", "b"),
    blas.matmul,
    (
        lambda g, a, b, y: _times(g, _transposed(b)),
        lambda g, a, b, y: _times(_transposed(a), g),
    ),
    uses=({"b"}, {"a"}),
)


def matmul(a: TensorLike, b: TensorLike) -> Tensor:
    """The matrix product of the last two axes; earlier axes broadcast.

    a (..., n, k) and b (..., k, m) give (..., n, m). A vector counts as one row on the left and as
    one column on the right, and that axis is dropped from the result. Raises ShapeError.
    """
    x, w = as_tensor(a, "matmul"), as_tensor(b, "matmul")
    if x._data.dtype is not w._data.dtype:
        x, w = promote((x, w))
    left, right = x._data.shape, w._data.shape
    if len(left) == 2 == len(right) and left[1] == right[0]:
        return apply(MATMUL, (x, w))
    if not left or not right:
        raise ShapeError(
            f"matmul: a {left} and b {right} were given, expected at least one axis each; "
            "multiply by a number with *"
        )
    rows = right[-2 if len(right) > 1 else 0]
    if left[-1] != rows:
        raise ShapeError(
            f"matmul: a {left} and b {right} were given: a's last axis has {left[-1]} elements "
            f"and must equal b's {'second last' if len(right) > 1 else 'only'} one, {rows}; "
            "transpose one of them?"
        )
    if len(right) == 1:
        return matmul(x, w.reshape(rows, 1)).reshape(left[:-1])
    if len(left) == 1:
        y = matmul(x.reshape(1, rows), w)
        return y.reshape(y.shape[:-2] + y.shape[-1:])
    if len(right) == 2 and not is_traced((x, w)):  # many times one: a single product over all rows
        y = apply(MATMUL, (x.reshape(prod(left[:-1]), rows), w))
        return y.reshape(*left[:-1], right[1])
    return apply(MATMUL, (x, w))


LINEAR = Operation(
    "linear",
    ("x", "weight"),
    lambda x, weight: blas.matmul(x, weight.T),
    (
        lambda g, x, weight, y: _times(g, weight),
        lambda g, x, weight, y: _times(g.T, x),
    ),
    uses=({"weight"}, {"x"}),
)


def linear(x: TensorLike, weight: TensorLike, bias: TensorLike | None = None) -> Tensor:
    """x Wᵀ + b: x (..., in), weight (out, in) and, if given, bias (out,) give (..., out).

    The same as ``x @ weight.T + bias``, dtypes too, with one line less on the tape. Raises
    ShapeError for other shapes.
    """
    a, w = as_tensor(x, "linear"), as_tensor(weight, "linear")
    if a._data.dtype is not w._data.dtype:
        a, w = promote((a, w))
    shape, of = a._data.shape, w._data.shape
    if len(of) != 2 or not shape or shape[-1] != of[1]:
        raise ShapeError(
            f"linear: x {shape} and weight {of} were given, expected x (..., in) and weight "
            "(out, in)"
        )
    if len(shape) == 2 or is_traced((a, w)):
        y = apply(LINEAR, (a, w))
    else:  # one product over all rows
        y = apply(LINEAR, (a.reshape(prod(shape[:-1]), of[1]), w)).reshape(*shape[:-1], of[0])
    return y if bias is None else y + bias


# Reductions ----------------------------------------------------------------------------------


def _extremum_vjp(g: Any, x: Any, y: Any, axes: tuple[int, ...], keepdims: bool) -> Any:
    """Equal extrema share the gradient equally."""
    kept = with_ones(x.shape, axes)
    tied = x == y.reshape(kept)
    count = tied.sum(axis=axes, keepdims=True)
    count = (count + (count == 0)).astype(g.dtype)  # none are equal where one is NaN
    return tied * (g.reshape(kept) / count)


def _sum(x: Array, axes: tuple[int, ...], keepdims: bool, shape: tuple[int, ...]) -> Array:
    """The sum over ``axes``; NumPy's, but for many rows, of which its error is large."""
    if type(x) is np.ndarray and len(axes) < x.ndim and sorted(axes) == [*range(len(axes))]:
        rows, columns = prod(shape[: len(axes)]), prod(shape[len(axes) :])
        if rows > TOGETHER and columns and x.dtype in FLOATS[1:]:
            kept = with_ones(shape, axes) if keepdims else shape[len(axes) :]
            return _column_sums(x.reshape(rows, columns)).reshape(kept)
    return x.sum(axis=axes, keepdims=keepdims)


SUM = Operation(
    "sum",
    ("x",),
    _sum,
    (lambda g, axes, keepdims, shape: _spread(g, shape, axes),),
    shown=2,
)


MAX, MIN = (
    Operation(name, ("x",), forward, (_extremum_vjp,), uses=({"x", "y"},))
    for name, forward in {
        "max": lambda x, axes, keepdims: x.max(axis=axes, keepdims=keepdims),
        "min": lambda x, axes, keepdims: x.min(axis=axes, keepdims=keepdims),
    }.items()
)


def sum(x: TensorLike, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The sum over ``axis``: an integer, a tuple of them, or None for all axes.

    These axes are dropped from the shape, or have length 1 with ``keepdims``. Floats keep their
    dtype, integers and booleans give int64. Raises ShapeError for an axis that x does not have.
    """
    x = as_tensor(x, "sum")
    return apply(SUM, (x,), (check_axes(axis, x.ndim, "sum"), keepdims, x.shape))


def max(x: TensorLike, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The largest values over ``axis``, as in ``sum``; equal ones share the gradient equally.

    Raises ShapeError where there is no value.
    """
    x = as_tensor(x, "max")
    return apply(MAX, (x,), (check_axes(axis, x.ndim, "max"), keepdims))


def min(x: TensorLike, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The smallest values over ``axis``, as in ``sum``; equal ones share the gradient equally.

    Raises ShapeError where there is no value.
    """
    x = as_tensor(x, "min")
    return apply(MIN, (x,), (check_axes(axis, x.ndim, "min"), keepdims))


CUMSUM = Operation(
    "cumsum",
    ("x",),
    lambda x, axis: x.cumsum(axis=axis),
    (lambda g, axis: _backwards(_backwards(g, axis).cumsum(axis), axis),),
)


def _backwards(x: Any, axis: int) -> Any:
    return x[along(axis, slice(None, None, -1))]


def cumsum(x: TensorLike, axis: int | None = None) -> Tensor:
    """Running sums along ``axis``, the shape of x; None flattens first."""
    x = as_tensor(x, "cumsum")
    if axis is None:
        x, axis = x.reshape(x.size), 0
    return apply(CUMSUM, (x,), (check_axis(axis, x.ndim, "cumsum"),))


# Shapes --------------------------------------------------------------------------------------

RESHAPE = Operation(
    "reshape",
    ("x",),
    lambda x, shape, before: x.reshape(shape),
    (lambda g, shape, before: g.reshape(before),),
    shown=1,
    view=True,
)


@cache
def _inverse(axes: tuple[int, ...]) -> tuple[int, ...]:
    """The order of axes that undoes this one."""
    return tuple([axes.index(k) for k in range(len(axes))])


PERMUTE_DIMS = Operation(
    "permute_dims",
    ("x",),
    lambda x, axes: x.transpose(axes),
    (lambda g, axes: g.transpose(_inverse(axes)),),
    view=True,
)
# What these two do to a shape and a dtype, the walk undoes for every gradient; see `fit`.
BROADCAST_TO = Operation("broadcast_to", ("x",), np.broadcast_to, (lambda g, shape: g,), view=True)
ASTYPE = Operation("astype", ("x",), lambda x, dtype: x.astype(dtype), (lambda g, dtype: g,))


def reshape(x: TensorLike, shape: int | Sequence[int]) -> Tensor:
    """The same elements in another shape; one length may be -1, to be worked out."""
    x = as_tensor(x, "reshape")
    shape = wanted = check_shape(shape, "reshape", least=-1)
    if -1 in wanted:
        known = prod([n for n in wanted if n != -1])
        if wanted.count(-1) == 1 and known:
            wanted = tuple([x.size // known if n == -1 else n for n in wanted])
    if prod(wanted) != x.size or -1 in wanted:
        raise ShapeError(
            f"reshape: {x.size} elements of shape {x.shape} do not fill {shape}, expected a shape "
            "of as many"
        )
    return apply(RESHAPE, (x,), (wanted, x.shape))


def permute_dims(x: TensorLike, axes: Sequence[int] | None = None) -> Tensor:
    """The axes in another order; None reverses them."""
    x = as_tensor(x, "permute_dims")
    order = tuple(range(x.ndim - 1, -1, -1))
    if axes is not None:
        order = check_axes(tuple(np.atleast_1d(axes).tolist()), x.ndim, "permute_dims")
        if len(order) != x.ndim:
            raise ShapeError(
                f"permute_dims: axes {axes} were given for a tensor of shape {x.shape}, expected "
                f"all {x.ndim} of them in their new order"
            )
    return apply(PERMUTE_DIMS, (x,), (order,))


def broadcast_to(x: TensorLike, shape: int | Sequence[int]) -> Tensor:
    """``x`` repeated along axes of length 1, and along new ones in front, to fill ``shape``."""
    x = as_tensor(x, "broadcast_to")
    shape = check_shape(shape, "broadcast_to")
    try:
        return apply(BROADCAST_TO, (x,), (shape,))
    except ValueError:
        raise ShapeError(f"broadcast_to: shape {x.shape} does not broadcast to {shape}") from None


def astype(x: TensorLike, dtype: DTypeLike) -> Tensor:
    """``x`` in another dtype; between floating dtypes the gradient goes back in its own."""
    x = as_tensor(x, "astype")
    wanted = check_dtype(dtype)
    if wanted == x.dtype:
        return x
    if wanted not in FLOATS and not is_traced((x,)):
        return looked_at((x,), x._data.astype(wanted))
    return apply(ASTYPE, (x,), (wanted,))


# Indexing and joining ------------------------------------------------------------------------

GETITEM = Operation(
    "getitem", ("x",), lambda x, index: x[index], (lambda g, index: Piece(index, g),), view=True
)


def _put(*values: Any) -> Array:
    """Zeros of a shape with each gradient added at its index; indices may repeat."""
    *gradients, indices, shape, dtype = values
    xp = devices.namespace(gradients[0])
    made = xp.zeros(shape, dtype)
    for index, gradient in zip(indices, gradients, strict=True):
        if not any(devices.is_array(i) and i.dtype != np.bool_ for i in index):
            made[index] += gradient
        elif xp is np and all(isinstance(i, np.ndarray) and i.dtype != np.bool_ for i in index):
            _add_rows(made, index, gradient)
        else:
            xp.add.at(made, index, gradient)
    return made


def _add_rows(made: np.ndarray, index: tuple[np.ndarray, ...], gradient: np.ndarray) -> None:
    """``np.add.at`` for integer arrays alone: sorted, rows of the same place are summed at once."""
    axes = made.shape[: len(index)]
    given = [part.astype(np.intp, copy=False) for part in np.broadcast_arrays(*index)]
    places = np.ravel_multi_index(given, axes, mode="wrap").ravel()
    if not places.size or not gradient.size:
        return
    rows, added = made.reshape(prod(axes), -1), gradient.reshape(places.size, -1)
    if (places[1:] <= places[:-1]).any():
        small = places.astype(np.uint16) if len(rows) <= 2**16 else places  # sorted by radix
        order = np.argsort(small, kind="stable")
        places, added = places[order], added[order]
        firsts = np.flatnonzero(np.diff(places, prepend=-1))
        if len(firsts) < len(places):
            places, added = places[firsts], _sums_of_runs(added, firsts)
    rows[places] += added


def _sums_of_runs(rows: np.ndarray, firsts: np.ndarray) -> np.ndarray:
    """The sums of the rows from each of ``firsts`` to the next.

    Of many: all second rows of short runs at once, then all third ones; long runs one by one.
    """
    if len(firsts) * rows.shape[1] <= MOST_SUMS and rows.size <= MOST_SUMMED:
        return np.asarray(np.add.reduceat(rows, firsts, axis=0))
    counts = np.diff(firsts, append=len(rows))
    sums: np.ndarray = rows[firsts]
    short = np.where(counts < MANY, counts, 0)
    for k in range(1, short.max()):
        of = np.flatnonzero(short > k)
        sums[of] += rows[firsts[of] + k]
    for run in np.flatnonzero(counts >= MANY).tolist():
        those = rows[firsts[run] : firsts[run] + counts[run]]
        if len(those) > TOGETHER and rows.dtype in FLOATS[1:]:
            those = _column_sums(those)
        np.add.reduce(those, axis=0, out=sums[run])
    return sums


SCATTER = Operation(
    "scatter",
    (),
    _put,
    EachInput(lambda k, g, indices, shape, dtype: g[indices[k]]),
)


def index_part(part: Any, x: Tensor) -> Any:
    """One part of an index of x: an int, a slice, None, ... or an array of its own.

    A list goes to the device of x; where a cell is traced, a list or an array is read on the host.
    Raises DeviceError for an array elsewhere, and ValueError for what is no index.
    """
    if isinstance(part, Tensor):
        part = part._data
    if part is None or part is Ellipsis or isinstance(part, slice):
        return part
    if isinstance(part, (int, np.integer)) and not isinstance(part, bool):
        return int(part)
    xp = np if type(part) in (list, np.ndarray) else devices.namespace(part)
    array = xp.array(part)
    if not array.size and array.dtype.kind == "f":
        array = array.astype(np.int64)
    if array.dtype.kind not in "iub":
        raise ValueError(
            f"indexing: an index of dtype {array.dtype} was given, expected integers, slices or "
            "booleans"
        )
    if is_traced((x,)):
        return devices.to_host(array)
    if type(array) is not type(x._data) and x.device != devices.device_of(array):
        if devices.is_array(part) and part.ndim:
            raise DeviceError(
                f"indexing: an index on {devices.device_of(part)} was given for a tensor on "
                f"{x.device}; make a tensor of it and move it with .to({x.device!r})"
            )
        array = devices.to_device(array, x.device)
    return array


def getitem(x: Tensor, index: Any) -> Tensor:
    """``x[index]`` with NumPy's meaning: integers, slices, None, ..., integer and boolean arrays.

    An integer that is out of range raises IndexError, as NumPy's does. In arrays on a GPU it is
    not noticed: CuPy counts on from the other end.
    """
    given = index if type(index) is tuple else (index,)
    parts = tuple([part if type(part) is slice else index_part(part, x) for part in given])
    return apply(GETITEM, (x,), (parts,))


CONCAT = Operation(
    "concat",
    (),
    lambda *values: np.concatenate(values[:-2], axis=values[-2]),
    EachInput(lambda k, g, axis, edges: g[along(axis, slice(edges[k], edges[k + 1]))]),
)
STACK = Operation(
    "stack",
    (),
    lambda *values: np.stack(values[:-1], axis=values[-1]),
    EachInput(lambda k, g, axis: g[along(axis, k)]),
)


def _several(tensors: Iterable[TensorLike], operation: str) -> list[Tensor]:
    if isinstance(tensors, Tensor) or not isinstance(tensors, Iterable):
        raise ValueError(
            f"{operation}: a {type(tensors).__name__} was given, expected a list of tensors"
        )
    given = list(tensors)
    if not given:
        raise ValueError(f"{operation}: no tensors were given, expected at least one in a list")
    like = float_dtype(given)
    return promote([beside(t, given, operation, like) for t in given])


def concat(tensors: Iterable[TensorLike], axis: int = 0) -> Tensor:
    """The tensors joined along an axis that they have; their other axes are equal.

    (2, 3) and (2, 1) along axis 1 give (2, 4), in the dtype that they combine to. Raises ShapeError
    for other shapes.
    """
    parts = _several(tensors, "concat")
    at = check_axis(axis, parts[0].ndim, "concat")
    shapes = [t.shape for t in parts]
    if len({(*s[:at], *s[at + 1 :], len(s)) for s in shapes}) > 1:
        raise ShapeError(
            f"concat: shapes {_few(shapes)} were given, expected equal ones but for axis {axis}"
        )
    edges = tuple(np.cumsum([0, *(s[at] for s in shapes)]).tolist())
    return apply(CONCAT, parts, (at, edges))


def stack(tensors: Iterable[TensorLike], axis: int = 0) -> Tensor:
    """Tensors of one shape side by side along a new axis, counted in the result.

    n tensors (a, b) stacked along axis 0 give (n, a, b). Raises ShapeError for other shapes.
    """
    parts = _several(tensors, "stack")
    shapes = [t.shape for t in parts]
    if len(set(shapes)) > 1:
        raise ShapeError(f"stack: shapes {_few(shapes)} were given, expected equal ones")
    return apply(STACK, parts, (check_axis(axis, parts[0].ndim + 1, "stack"),))


def _few(shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join(map(str, dict.fromkeys(shapes[:1000])))[:200]


def _pad_forward(x: Array, widths: tuple[tuple[int, int], ...], value: float) -> Array:
    shape = [n + before + after for n, (before, after) in zip(x.shape, widths, strict=True)]
    made = devices.namespace(x).full(shape, value, x.dtype)
    made[_inside(widths)] = x
    return made


def _inside(widths: tuple[tuple[int, int], ...]) -> tuple[slice, ...]:
    return tuple(slice(before, -after or None) for before, after in widths)


PAD = Operation("pad", ("x",), _pad_forward, (lambda g, widths, value: g[_inside(widths)],))


def pad(x: TensorLike, pad_width: Any, constant_values: float = 0) -> Tensor:
    """``x`` with constants around it.

    ``pad_width`` is how many to put before and after: one number, one pair for every axis, or a
    pair for each axis.
    """
    x = as_tensor(x, "pad")
    try:
        pairs = np.broadcast_to(np.asarray(pad_width), (x.ndim, 2))
    except ValueError:
        raise ShapeError(
            f"pad: pad_width {pad_width!r} was given for shape {x.shape}, expected a number, a "
            "pair, or a pair for each axis"
        ) from None
    if pairs.dtype.kind not in "iu" or (pairs < 0).any():
        raise ValueError(f"pad: pad_width {pad_width!r} was given, expected integers from 0 on")
    if x.dtype.kind != "f" and int(constant_values) != constant_values:
        raise ValueError(
            f"pad: {constant_values} was given to put around a tensor of dtype {x.dtype}, which "
            "cannot hold it"
        )
    return apply(PAD, (x,), (tuple((int(a), int(b)) for a, b in pairs), constant_values))


# The walk's arithmetic -----------------------------------------------------------------------


def unbroadcast(g: Any, shape: tuple[int, ...]) -> Any:
    """Undo broadcasting: the sum of ``g`` over the axes along which ``shape`` was repeated.

    ``g`` is an array or a tensor. This is the only place where broadcasting is undone.
    """
    if g.shape == shape:
        return g
    new = g.ndim - len(shape)
    repeated = tuple(
        k for k, n in enumerate(g.shape) if k < new or (shape[k - new] == 1 and n != 1)
    )
    if type(g) is np.ndarray and repeated == tuple(range(len(repeated))) and g.dtype in FLOATS[1:]:
        rows = prod(g.shape[: len(repeated)])
        return _column_sums(g.reshape(rows, g.size // rows if rows else prod(shape))).reshape(shape)
    return g.sum(axis=repeated, keepdims=True).reshape(shape)


def _column_sums(g: np.ndarray) -> np.ndarray:
    """The sums of the columns.

    NumPy adds row after row to the same numbers, and the error grows with the rows. Here the sums
    of ``TOGETHER`` rows each are added up; and a product makes them in less time.
    """
    whole = len(g) // TOGETHER * TOGETHER
    if whole <= TOGETHER:
        return blas.matmul(np.ones((1, len(g)), g.dtype), g)
    each = g[:whole].reshape(-1, TOGETHER, g.shape[1])
    sums = blas.matmul(np.ones((1, TOGETHER), g.dtype), each)[:, 0]
    return _column_sums(np.concatenate([sums, g[whole:]]))


def _reattached(entry: Entry, parents: Sequence[Any], saved: Sequence[Any]) -> Any:
    """An entry's derivatives over tensors, and what it kept as tensors in their old places.

    An input is put back on the entry that made it and the output on this one, so that derivatives
    computed from them are recorded as depending on what they depended on.
    """
    assert entry.op is not None
    count = entry.op.value_count
    sources = (*parents, entry)[:count]
    tensors = [
        value if value is None or source is None else wrap(value, source)
        for value, source in zip(saved[:count], sources, strict=True)
    ]
    return entry.op.tensor_vjps, (*tensors, *saved[count:])


def _fit_array(g: Array, entry: Entry) -> Array:
    return unbroadcast(g, entry.shape).astype(entry.dtype, copy=False)


def _fit_tensor(g: Tensor, entry: Entry) -> Tensor:
    return astype(unbroadcast(g, entry.shape), entry.dtype)


def _assemble_arrays(entry: Entry, pieces: Sequence[Piece]) -> Array:
    gradients, places = [p.gradient for p in pieces], [p.place for p in pieces]
    return _put(*gradients, places, entry.shape, entry.dtype)


def _assemble_tensors(entry: Entry, pieces: Sequence[Piece]) -> Tensor:
    gradients, places = [p.gradient for p in pieces], tuple(p.place for p in pieces)
    return apply(SCATTER, gradients, (places, entry.shape, entry.dtype))


ARRAYS = Arithmetic(_fit_array, _assemble_arrays, derivatives=None)
TENSORS = Arithmetic(_fit_tensor, _assemble_tensors, _reattached)


# Methods -------------------------------------------------------------------------------------


def _transpose(x: Tensor, *axes: Any) -> Tensor:
    several = len(axes) != 1 or not isinstance(axes[0], (tuple, list))
    return permute_dims(x, (axes if several else axes[0]) or None)


def is_device(target: Any) -> bool:
    """Whether ``target`` of a ``to`` names a device, not a dtype."""
    return isinstance(target, str) and target.split(":")[0] in ("cpu", "cuda", "gpu")


def _moved(g: Any, device: str) -> Any:
    return g.to(device) if isinstance(g, Tensor) else devices.to_device(g, device)


TO = Operation(
    "to",
    ("x",),
    lambda x, device, before: devices.to_device(x, device),
    (lambda g, device, before: _moved(g, before),),
    shown=1,
)


def to(x: TensorLike, target: Any) -> Tensor:
    """``x`` in another dtype, or on another device: ``"cpu"``, or ``"cuda"`` for the GPU.

    The gradient comes back in the dtype and on the device of x. What is there already is x itself.
    """
    x = as_tensor(x, "to")
    if not is_device(target):
        return astype(x, target)
    device = devices.device_named(target)
    return x if device == x.device else apply(TO, (x,), (device, x.device))


_METHODS: dict[str, Any] = {
    "T": property(permute_dims),
    "__getitem__": getitem,
    "__matmul__": matmul,
    "__rmatmul__": lambda b, a: matmul(a, b),
    "astype": astype,
    "cumsum": cumsum,
    "max": max,
    "min": min,
    "reshape": lambda x, *shape: reshape(x, shape),
    "sum": sum,
    "to": to,
    "transpose": _transpose,
}
for _name, _method in _METHODS.items():
    setattr(Tensor, _name, _method)
