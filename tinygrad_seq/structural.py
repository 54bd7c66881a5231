"""Operations that know axes: products, reductions, shapes, indexing; and the one unbroadcast.

A primitive here is an ``Operation`` whose derivatives are written with nothing but methods and
functions that arrays and tensors share, so that one text serves the backward and its own
derivative. Everything else is composed of primitives and needs no derivative.
Imports rules, tape, tensors and elementwise.
"""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from tinygrad_seq.elementwise import abs, exp, log, square, where
from tinygrad_seq.errors import ShapeError
from tinygrad_seq.rules import Array, Operation
from tinygrad_seq.tape import Arithmetic, Entry, Piece
from tinygrad_seq.tensors import (
    FLOATS,
    Axis,
    Tensor,
    TensorLike,
    apply,
    as_tensor,
    check_dtype,
    promote,
    wrap,
)


class _EachInput:
    """The derivatives of an operation with any number of inputs: ``vjp(k, g, ...)`` for input k."""

    def __init__(self, vjp: Any) -> None:
        self.vjp = vjp

    def __getitem__(self, k: int) -> Any:
        return partial(self.vjp, k)


def _axes(axis: Axis, ndim: int, operation: str) -> tuple[int, ...]:
    """``axis`` as a tuple of distinct axes from 0 on; None means all of them."""
    if axis is None:
        return tuple(range(ndim))
    given = axis if isinstance(axis, (tuple, list)) else (axis,)
    for a in given:
        if isinstance(a, bool) or not isinstance(a, (int, np.integer)):
            raise ValueError(f"{operation}: axis {axis!r} was given, expected integers or None")
        if not -ndim <= a < ndim:
            raise ShapeError(
                f"{operation}: axis {a} was given for a tensor with {ndim} axes, expected "
                f"{-ndim} to {ndim - 1}"
            )
    axes = tuple(int(a) % ndim for a in given)
    if len(set(axes)) < len(axes):
        raise ShapeError(f"{operation}: axis {axis!r} names an axis twice")
    return axes


def _with_ones(shape: Sequence[int], axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(1 if k in axes else n for k, n in enumerate(shape))


def _spread(g: Any, shape: tuple[int, ...], axes: tuple[int, ...]) -> Any:
    """The gradient of a reduction over ``axes``, broadcast back to ``shape``."""
    return _broadcast_any(g.reshape(_with_ones(shape, axes)), shape)


def _broadcast_any(x: Any, shape: tuple[int, ...]) -> Any:
    return broadcast_to(x, shape) if isinstance(x, Tensor) else np.broadcast_to(x, shape)


# Products ------------------------------------------------------------------------------------


def _transposed(x: Any) -> Any:
    return x.T if x.ndim == 2 else x.transpose((*range(x.ndim - 2), x.ndim - 1, x.ndim - 2))


MATMUL = Operation(
    "matmul",
    ("a", "b"),
    np.matmul,
    (lambda g, a, b, y: g @ _transposed(b), lambda g, a, b, y: _transposed(a) @ g),
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
    if len(right) == 2:  # many matrices times one: a single product over all rows
        y = apply(MATMUL, (x.reshape(prod(left[:-1]), rows), w))
        return y.reshape(*left[:-1], right[1])
    return apply(MATMUL, (x, w))


# Reductions ----------------------------------------------------------------------------------


def _max_vjp(g: Any, x: Any, y: Any, axes: tuple[int, ...], keepdims: bool) -> Any:
    """Equal maxima share the gradient equally."""
    kept = _with_ones(x.shape, axes)
    tied = x == y.reshape(kept)
    count = tied.sum(axis=axes, keepdims=True)
    return tied * (g.reshape(kept) / (count + (count == 0)))  # none are equal where one is NaN


SUM = Operation(
    "sum",
    ("x",),
    lambda x, axes, keepdims, shape: x.sum(axis=axes, keepdims=keepdims),
    (lambda g, axes, keepdims, shape: _spread(g, shape, axes),),
    shown=2,
)
MAX = Operation(
    "max",
    ("x",),
    lambda x, axes, keepdims: x.max(axis=axes, keepdims=keepdims),
    (_max_vjp,),
    uses=({"x", "y"},),
)


def sum(x: TensorLike, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The sum over ``axis`` (an integer, a tuple, or None for all axes)."""
    x = as_tensor(x, "sum")
    return apply(SUM, (x,), (_axes(axis, x.ndim, "sum"), keepdims, x.shape))


def _counted(x: Tensor, axis: Axis, operation: str) -> int:
    n = prod(x.shape[k] for k in _axes(axis, x.ndim, operation))
    if not n:
        raise ShapeError(
            f"{operation}: shape {x.shape} over axis {axis} has no elements to average; "
            "leave empty batches out"
        )
    return n


def mean(x: TensorLike, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The arithmetic mean over ``axis``. Raises ShapeError if there is nothing to average."""
    x = as_tensor(x, "mean")
    return sum(x, axis, keepdims) * (1.0 / _counted(x, axis, "mean"))


def var(x: TensorLike, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The variance over ``axis``, mean((x − mean(x))²): divided by N, not N − 1."""
    x = as_tensor(x, "var")
    return mean(square(x - mean(x, axis, keepdims=True)), axis, keepdims)


def max(x: TensorLike, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The largest values over ``axis``; equal ones share the gradient equally."""
    x = as_tensor(x, "max")
    return apply(MAX, (x,), (_axes(axis, x.ndim, "max"), keepdims))


def min(x: TensorLike, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The smallest values over ``axis``; equal ones share the gradient equally."""
    return -max(-as_tensor(x, "min"), axis, keepdims)


def logsumexp(x: TensorLike, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """log Σ exp(x) over ``axis``, computed so that nothing overflows."""
    x = as_tensor(x, "logsumexp")
    axes = _axes(axis, x.ndim, "logsumexp")
    shift = max(x.detach(), axes, keepdims=True)
    shift = where(abs(shift) < np.inf, shift, 0.0)
    y = log(sum(exp(x - shift), axes, keepdims=True)) + shift
    return y if keepdims else squeeze(y, axes)


def softmax(x: TensorLike, axis: int = -1) -> Tensor:
    """exp(x) / Σ exp(x) along ``axis``."""
    x = as_tensor(x, "softmax")
    axes = _axes(axis, x.ndim, "softmax")
    e = exp(x - max(x.detach(), axes, keepdims=True))
    return e / sum(e, axes, keepdims=True)


def log_softmax(x: TensorLike, axis: int = -1) -> Tensor:
    """x − log Σ exp(x) along ``axis``."""
    x = as_tensor(x, "log_softmax")
    return x - logsumexp(x, axis, keepdims=True)


CUMSUM = Operation(
    "cumsum",
    ("x",),
    lambda x, axis: x.cumsum(axis=axis),
    (lambda g, axis: _backwards(_backwards(g, axis).cumsum(axis), axis),),
)


def _backwards(x: Any, axis: int) -> Any:
    return x[(slice(None),) * axis + (slice(None, None, -1),)]


def cumsum(x: TensorLike, axis: int | None = None) -> Tensor:
    """Running sums along ``axis``; None flattens first."""
    x = as_tensor(x, "cumsum")
    if axis is None:
        x, axis = x.reshape(x.size), 0
    return apply(CUMSUM, (x,), _axes(axis, x.ndim, "cumsum"))


# Shapes --------------------------------------------------------------------------------------

RESHAPE = Operation(
    "reshape",
    ("x",),
    lambda x, shape, before: x.reshape(shape),
    (lambda g, shape, before: g.reshape(before),),
    shown=1,
)
PERMUTE_DIMS = Operation(
    "permute_dims",
    ("x",),
    lambda x, axes, back: x.transpose(axes),
    (lambda g, axes, back: g.transpose(back),),
    shown=1,
)
BROADCAST_TO = Operation(
    "broadcast_to",
    ("x",),
    lambda x, shape, before: np.broadcast_to(x, shape),
    (lambda g, shape, before: unbroadcast(g, before),),
    shown=1,
)
ASTYPE = Operation(
    "astype",
    ("x",),
    lambda x, dtype, before: x.astype(dtype),
    (lambda g, dtype, before: g.astype(before),),
    shown=1,
)


def reshape(x: TensorLike, shape: int | Sequence[int]) -> Tensor:
    """The same elements in another shape; one length may be -1, to be worked out."""
    x = as_tensor(x, "reshape")
    wanted = tuple(shape) if isinstance(shape, Sequence) else (shape,)
    known = prod(n for n in wanted if n != -1)
    if -1 in wanted and known:
        wanted = tuple(x.size // known if n == -1 else n for n in wanted)
    if prod(wanted) != x.size or builtins.min(wanted, default=0) < 0:
        raise ShapeError(f"reshape: {x.size} elements of shape {x.shape} do not fill {shape}")
    return apply(RESHAPE, (x,), (wanted, x.shape))


def permute_dims(x: TensorLike, axes: Sequence[int] | None = None) -> Tensor:
    """The axes in another order; None reverses them."""
    x = as_tensor(x, "permute_dims")
    order = (
        tuple(range(x.ndim))[::-1] if axes is None else _axes(tuple(axes), x.ndim, "permute_dims")
    )
    if len(order) != x.ndim:
        raise ShapeError(f"permute_dims: axes {axes} were given for a tensor of shape {x.shape}")
    back = [0] * x.ndim
    for k, axis in enumerate(order):
        back[axis] = k
    return apply(PERMUTE_DIMS, (x,), (order, tuple(back)))


def expand_dims(x: TensorLike, axis: int | tuple[int, ...]) -> Tensor:
    """``x`` with axes of length 1 put in at ``axis``, counted in the result."""
    x = as_tensor(x, "expand_dims")
    count = len(axis) if isinstance(axis, tuple) else 1
    axes = _axes(axis, x.ndim + count, "expand_dims")
    lengths = iter(x.shape)
    return x.reshape([1 if k in axes else next(lengths) for k in range(x.ndim + count)])


def squeeze(x: TensorLike, axis: Axis = None) -> Tensor:
    """``x`` without the axes of length 1 (all, or those named). Raises ShapeError for others."""
    x = as_tensor(x, "squeeze")
    axes = _axes(axis, x.ndim, "squeeze")
    if axis is None:
        axes = tuple(k for k in axes if x.shape[k] == 1)
    if any(x.shape[k] != 1 for k in axes):
        raise ShapeError(f"squeeze: axis {axis} of shape {x.shape} does not have length 1")
    return x.reshape([n for k, n in enumerate(x.shape) if k not in axes])


def broadcast_to(x: TensorLike, shape: Sequence[int]) -> Tensor:
    """``x`` repeated along axes of length 1, and along new ones in front, to fill ``shape``."""
    x = as_tensor(x, "broadcast_to")
    shape = tuple(shape)
    try:
        return apply(BROADCAST_TO, (x,), (shape, x.shape))
    except ShapeError:
        raise ShapeError(f"broadcast_to: shape {x.shape} does not broadcast to {shape}") from None


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
    return g.sum(axis=repeated, keepdims=True).reshape(shape)


def astype(x: TensorLike, dtype: DTypeLike) -> Tensor:
    """``x`` in another dtype; between floating dtypes the gradient goes back in its own."""
    x = as_tensor(x, "astype")
    wanted = check_dtype(dtype)
    if wanted == x.dtype:
        return x
    if wanted not in FLOATS:
        return wrap(x._data.astype(wanted), None)
    return apply(ASTYPE, (x,), (wanted, x.dtype))


# Indexing and joining ------------------------------------------------------------------------

GETITEM = Operation(
    "getitem", ("x",), lambda x, index: x[index], (lambda g, index: Piece(index, g),)
)


def _put(*values: Any) -> Array:
    """Zeros of a shape with each gradient added at its index; indices may repeat."""
    *gradients, indices, shape, dtype = values
    made = np.zeros(shape, dtype)
    for index, gradient in zip(indices, gradients, strict=True):
        if any(isinstance(i, np.ndarray) and i.dtype != np.bool_ for i in index):
            np.add.at(made, index, gradient)
        else:
            made[index] += gradient
    return made


SCATTER = Operation(
    "scatter",
    (),
    _put,
    _EachInput(lambda k, g, indices, shape, dtype: g[indices[k]]),  # type: ignore[arg-type]
)


def _index_part(part: Any) -> Any:
    if isinstance(part, Tensor):
        part = part._data
    if part is None or part is Ellipsis or isinstance(part, slice):
        return part
    if isinstance(part, (int, np.integer)) and not isinstance(part, bool):
        return int(part)
    array = np.array(part)
    if not array.size and array.dtype.kind == "f":
        array = array.astype(np.int64)
    if array.dtype.kind not in "iub":
        raise ValueError(
            f"indexing: an index of dtype {array.dtype} was given, expected integers, slices or "
            "booleans"
        )
    return array


def getitem(x: Tensor, index: Any) -> Tensor:
    """``x[index]`` with NumPy's meaning: integers, slices, None, ..., integer and boolean arrays.

    An integer that is out of range raises IndexError, as NumPy's does.
    """
    parts = tuple(_index_part(part) for part in (index if type(index) is tuple else (index,)))
    return apply(GETITEM, (x,), (parts,))


def take(x: TensorLike, indices: TensorLike, axis: int | None = None) -> Tensor:
    """The elements at ``indices`` along ``axis``; None flattens first."""
    x = as_tensor(x, "take")
    if axis is None:
        x, axis = x.reshape(x.size), 0
    return x[(slice(None),) * _axes(axis, x.ndim, "take")[0] + (_index_part(indices),)]


def take_along_axis(x: TensorLike, indices: TensorLike, axis: int = -1) -> Tensor:
    """For each place of ``indices``, the element of ``x`` that it points to along ``axis``.

    ``indices`` is an integer array with as many axes as ``x``; others than ``axis`` broadcast.
    """
    x, at = as_tensor(x, "take_along_axis"), _index_part(indices)
    if not isinstance(at, np.ndarray) or at.ndim != x.ndim:
        raise ShapeError(
            f"take_along_axis: indices of shape {np.shape(at)} were given for a tensor of shape "
            f"{x.shape}, expected as many axes"
        )
    (along,) = _axes(axis, x.ndim, "take_along_axis")
    grid = np.ogrid[tuple(slice(n) for n in x.shape)]
    return x[tuple(at if k == along else line for k, line in enumerate(grid))]


def flip(x: TensorLike, axis: Axis = None) -> Tensor:
    """The elements in reverse order along ``axis`` (None: every axis)."""
    x = as_tensor(x, "flip")
    axes = _axes(axis, x.ndim, "flip")
    return x[tuple(slice(None, None, -1 if k in axes else None) for k in range(x.ndim))]


def split(x: TensorLike, sections: int | Sequence[int], axis: int = 0) -> list[Tensor]:
    """``x`` cut along ``axis``: into that many equal parts, or at the indices given."""
    x = as_tensor(x, "split")
    (along,) = _axes(axis, x.ndim, "split")
    length = x.shape[along]
    if isinstance(sections, int):
        if sections < 1 or length % sections:
            raise ShapeError(
                f"split: axis {axis} of shape {x.shape} cannot be cut into {sections} equal parts; "
                "give the indices at which to cut"
            )
        step = length // sections
        bounds = [(k * step, (k + 1) * step) for k in range(sections)]
    else:
        edges = [0, *sections, length]
        bounds = list(pairwise(edges))
    front = (slice(None),) * along
    return [x[(*front, slice(low, high))] for low, high in bounds]


CONCAT = Operation(
    "concat",
    (),
    lambda *values: np.concatenate(values[:-2], axis=values[-2]),
    _EachInput(  # type: ignore[arg-type]
        lambda k, g, axis, edges: g[(slice(None),) * axis + (slice(edges[k], edges[k + 1]),)]
    ),
)
STACK = Operation(
    "stack",
    (),
    lambda *values: np.stack(values[:-1], axis=values[-1]),
    _EachInput(lambda k, g, axis: g[(slice(None),) * axis + (k,)]),  # type: ignore[arg-type]
)


def _several(tensors: Sequence[TensorLike], operation: str) -> list[Tensor]:
    if isinstance(tensors, Tensor) or not len(tensors):
        raise ValueError(f"{operation}: a sequence of at least one tensor was expected")
    return promote([as_tensor(t, operation) for t in tensors])


def concat(tensors: Sequence[TensorLike], axis: int = 0) -> Tensor:
    """The tensors joined along an axis that they have; their other axes are equal."""
    parts = _several(tensors, "concat")
    (along,) = _axes(axis, parts[0].ndim, "concat")
    shapes = [t.shape for t in parts]
    if len({(*s[:along], *s[along + 1 :], len(s)) for s in shapes}) > 1:
        raise ShapeError(
            f"concat: shapes {_few(shapes)} were given, expected equal ones but for axis {axis}"
        )
    edges = tuple(np.cumsum([0, *(s[along] for s in shapes)]).tolist())
    return apply(CONCAT, parts, (along, edges))


def stack(tensors: Sequence[TensorLike], axis: int = 0) -> Tensor:
    """Tensors of one shape side by side along a new axis."""
    parts = _several(tensors, "stack")
    shapes = [t.shape for t in parts]
    if len(set(shapes)) > 1:
        raise ShapeError(f"stack: shapes {_few(shapes)} were given, expected equal ones")
    return apply(STACK, parts, _axes(axis, parts[0].ndim + 1, "stack"))


def _few(shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join(map(str, dict.fromkeys(shapes[:1000])))[:200]


def _pad_forward(x: Array, widths: tuple[tuple[int, int], ...], value: float) -> Array:
    shape = [n + before + after for n, (before, after) in zip(x.shape, widths, strict=True)]
    made = np.full(shape, value, x.dtype)
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
    return apply(PAD, (x,), (tuple((int(a), int(b)) for a, b in pairs), constant_values))


# The walk's arithmetic -----------------------------------------------------------------------


def _saved_as_tensors(entry: Entry) -> tuple[Any, ...]:
    assert entry.op is not None
    assert entry.saved is not None
    values = entry.op.values
    sources = (*entry.parents, entry)
    return (
        *(
            wrap(value, source) if isinstance(value, np.ndarray) and source is not None else value
            for value, source in zip(entry.saved[:values], sources[:values], strict=True)
        ),
        *entry.saved[values:],
    )


def _scatter_tensors(entry: Entry, pieces: Sequence[Piece]) -> Tensor:
    indices = tuple(piece.index for piece in pieces)
    gradients = [piece.gradient for piece in pieces]
    return apply(SCATTER, gradients, (indices, entry.shape, entry.dtype))


OVER_ARRAYS = Arithmetic(
    fit=lambda g, entry: unbroadcast(g, entry.shape).astype(entry.dtype, copy=False),
    scatter=lambda entry, pieces: _put(
        *(p.gradient for p in pieces), [p.index for p in pieces], entry.shape, entry.dtype
    ),
    tensors=None,
)
OVER_TENSORS = Arithmetic(
    fit=lambda g, entry: astype(unbroadcast(g, entry.shape), entry.dtype),
    scatter=_scatter_tensors,
    tensors=_saved_as_tensors,
)


# Methods -------------------------------------------------------------------------------------


def _shape_given(shape: tuple[Any, ...]) -> Any:
    return shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape


def _to(x: Tensor, target: Any) -> Tensor:
    """``x`` in another dtype, or on another device (``"cpu"``)."""
    if target == "cpu":
        return x
    if isinstance(target, str) and target.split(":")[0] in ("cuda", "gpu"):
        raise ValueError(
            f"to: device {target!r} was given; this version computes on the CPU alone, so expected "
            "'cpu' or a dtype"
        )
    return astype(x, target)


_METHODS: dict[str, Any] = {
    "T": property(lambda x: permute_dims(x)),
    "__getitem__": getitem,
    "__matmul__": matmul,
    "__rmatmul__": lambda b, a: matmul(a, b),
    "astype": astype,
    "cumsum": cumsum,
    "max": max,
    "mean": mean,
    "min": min,
    "reshape": lambda x, *shape: reshape(x, _shape_given(shape)),
    "sum": sum,
    "to": _to,
    "transpose": lambda x, *axes: permute_dims(x, _shape_given(axes) or None),
}
for _name, _method in _METHODS.items():
    setattr(Tensor, _name, _method)
