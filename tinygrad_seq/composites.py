"""Functions over axes that are made of primitives, and so need no derivative of their own.

``logsumexp`` alone is, over arrays, an operation with a derivative: losses spend their time there.
Imports tensors, tape, elementwise, structural, rules, devices and errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np

from tinygrad_seq import devices
from tinygrad_seq.elementwise import abs, exp, log, square, where
from tinygrad_seq.errors import ShapeError
from tinygrad_seq.rules import Array, Operation
from tinygrad_seq.structural import (
    GETITEM,
    along,
    check_axes,
    check_axis,
    index_part,
    max,
    sum,
    with_ones,
)
from tinygrad_seq.tape import recording
from tinygrad_seq.tensors import (
    DEFAULT_FLOAT,
    FLOATS,
    Axis,
    Tensor,
    TensorLike,
    apply,
    as_tensor,
    boxed,
    is_traced,
    looked_at,
)

SHORT = 32  # elements of a row along which NumPy finds the largest quicker if rows are columns
FEW = 2**13  # elements that may be added one after the other

# Reductions ----------------------------------------------------------------------------------


def _counted(x: Tensor, axis: Axis, operation: str) -> int:
    n = prod(x.shape[k] for k in check_axes(axis, x.ndim, operation))
    if not n:
        raise ShapeError(
            f"{operation}: shape {x.shape} over axis {axis} has no elements to average; "
            "leave empty batches out"
        )
    return n


def mean(x: TensorLike, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The arithmetic mean over ``axis``. Raises ShapeError if there is nothing to average."""
    x = as_tensor(x, "mean")
    return scaled_sum(x, 1.0 / _counted(x, axis, "mean"), axis, keepdims)


def scaled_sum(x: Tensor, factor: float, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The sum times ``factor``. float16 is summed in float32: it ends at 65,504."""
    if x.dtype == np.float16:
        return (sum(x.to("float32"), axis, keepdims) * factor).to("float16")
    return sum(x, axis, keepdims) * factor


def var(x: TensorLike, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The variance over ``axis``, mean((x − mean(x))²): divided by N, not N − 1."""
    x = as_tensor(x, "var")
    _counted(x, axis, "var")
    if x.dtype == np.float16:  # squares leave its range
        return var(x.to("float32"), axis, keepdims).to("float16")
    return mean(square(x - mean(x, axis, keepdims=True)), axis, keepdims)


def argmax(x: TensorLike, axis: int | None = None) -> Tensor:
    """The index of the largest value along ``axis`` (None: of all, flattened), int64.

    Of equal values the first. Indices have no gradient.
    """
    return _index_of(np.argmax, as_tensor(x, "argmax"), axis, "argmax")


def argmin(x: TensorLike, axis: int | None = None) -> Tensor:
    """The index of the smallest value along ``axis`` (None: of all, flattened), int64."""
    return _index_of(np.argmin, as_tensor(x, "argmin"), axis, "argmin")


def _index_of(find: Any, x: Tensor, axis: int | None, operation: str) -> Tensor:
    count = x.size if axis is None else x.shape[check_axis(axis, x.ndim, operation)]
    if not count:
        raise ShapeError(f"{operation}: shape {x.shape} has no elements along axis {axis}")
    return looked_at((x,), find(x._data, axis=axis))


def _floating(x: TensorLike, operation: str) -> Tensor:
    x = as_tensor(x, operation)
    return x if x.dtype in FLOATS else x.to(DEFAULT_FLOAT)


def logsumexp(x: TensorLike, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """log Σ exp(x) over ``axis`` (as in ``sum``), computed so that nothing overflows.

    Its gradient is exp(x) / Σ exp(x). Floats keep their dtype, others give float32. Raises
    ShapeError for an axis that x does not have, or along which there is nothing.
    It is log Σ exp(x − s) + s for any s. With the largest x for s no exponent is positive, and s
    may stand off the tape: what it adds to the derivative of one term it takes from the other.
    A compiled step does just that; over arrays it is one operation, which needs less memory.
    """
    x = _floating(x, "logsumexp")
    axes = check_axes(axis, x.ndim, "logsumexp")
    if x.dtype == np.float16:  # the sum leaves its range
        return logsumexp(x.to("float32"), axes, keepdims).to("float16")
    if recording.tracer is None or not is_traced((x,)):
        return apply(LOGSUMEXP, (x,), (axes, keepdims))
    shift = max(x.detach(), axes, keepdims=True)
    shift = where(abs(shift) < np.inf, shift, 0.0)
    total = sum(exp(x - shift), axes, keepdims=True)
    nothing = total == 0  # every x is -inf: so is y, and no element has a share
    y = where(nothing, -np.inf, log(where(nothing, 1.0, total))) + shift
    return y if keepdims else squeeze(y, axes)


def shifted_exponentials(x: Array, axes: tuple[int, ...]) -> tuple[Array, Array, Array]:
    """e^(x − s), their sums over ``axes``, which stay as ones, and s, the largest x."""
    top = _largest(x, axes)
    top = np.where(np.isfinite(top), top, 0)
    e = boxed(x - top)
    np.exp(e, out=e)
    return e, sums_of_few(e, axes), top


def _largest(x: Array, axes: tuple[int, ...]) -> Array:
    if type(x) is np.ndarray and axes == (x.ndim - 1,) and x.shape[-1] <= SHORT:
        return np.ascontiguousarray(np.moveaxis(x, -1, 0)).max(axis=0)[..., None]
    return x.max(axis=axes, keepdims=True)


def sums_of_few(e: Array, axes: tuple[int, ...]) -> Array:
    """The sums over ``axes``, which stay as ones, quickly along one axis of few elements."""
    if type(e) is not np.ndarray or len(axes) != 1 or e.shape[axes[0]] > FEW:
        return e.sum(axis=axes, keepdims=True)
    kept = [k for k in range(e.ndim) if k != axes[0]]
    return np.expand_dims(np.einsum(e, [*range(e.ndim)], kept), axes)  # in a quarter of the time


def _logsumexp(x: Array, axes: tuple[int, ...], keepdims: bool) -> Array:
    _, total, top = shifted_exponentials(x, axes)  # so that it is x itself where there is one
    with np.errstate(divide="ignore"):  # where every x is -inf, so is y
        y = np.log(total) + top
    return y.reshape(
        [n for k, n in enumerate(with_ones(x.shape, axes)) if keepdims or k not in axes]
    )


def _logsumexp_vjp(g: Any, x: Any, y: Any, axes: tuple[int, ...], keepdims: bool) -> Any:
    kept = with_ones(x.shape, axes)
    g, y = g.reshape(kept), y.reshape(kept)
    if isinstance(g, Tensor) or isinstance(x, Tensor):
        e = exp(x - where(as_tensor(y) == -np.inf, 0.0, y))
        total = sum(e, axes, keepdims=True)
        return e * (g / where(total == 0, 1.0, total))
    e = boxed(x - np.where(y == -np.inf, 0, y))  # where every x is -inf, no element has a share
    np.exp(e, out=e)
    total = sums_of_few(e, axes)  # 1, but for y's rounding
    e *= g / np.where(total == 0, 1, total)
    return e


LOGSUMEXP = Operation("logsumexp", ("x",), _logsumexp, (_logsumexp_vjp,), uses=({"x", "y"},))


def softmax(x: TensorLike, axis: int = -1) -> Tensor:
    """exp(x) / Σ exp(x) along ``axis``, the shape of x; the largest x is taken from all before."""
    x = _floating(x, "softmax")
    axes = (check_axis(axis, x.ndim, "softmax"),)
    if x.dtype == np.float16:  # the sum leaves its range
        return softmax(x.to("float32"), axis).to("float16")
    e = exp(x - max(x.detach(), axes, keepdims=True))
    return e / sum(e, axes, keepdims=True)


def log_softmax(x: TensorLike, axis: int = -1) -> Tensor:
    """x − log Σ exp(x) along ``axis``, the shape of x; the largest x is taken from all before."""
    x = _floating(x, "log_softmax")
    axes = (check_axis(axis, x.ndim, "log_softmax"),)
    if x.dtype == np.float16:  # the sum leaves its range
        return log_softmax(x.to("float32"), axis).to("float16")
    x = x - max(x.detach(), axes, keepdims=True)  # a small result would be lost beside a large x
    return x - log(sum(exp(x), axes, keepdims=True))


# Shapes and indexing -------------------------------------------------------------------------


def expand_dims(x: TensorLike, axis: int | tuple[int, ...]) -> Tensor:
    """``x`` with axes of length 1 put in at ``axis``, counted in the result."""
    x = as_tensor(x, "expand_dims")
    count = len(axis) if isinstance(axis, (tuple, list)) else 1
    axes = check_axes(axis, x.ndim + count, "expand_dims")
    lengths = iter(x.shape)
    return x.reshape([1 if k in axes else next(lengths) for k in range(x.ndim + count)])


def squeeze(x: TensorLike, axis: Axis = None) -> Tensor:
    """``x`` without the axes of length 1 (all, or those named). Raises ShapeError for others."""
    x = as_tensor(x, "squeeze")
    axes = check_axes(axis, x.ndim, "squeeze")
    if axis is None:
        axes = tuple(k for k in axes if x.shape[k] == 1)
    if any(x.shape[k] != 1 for k in axes):
        raise ShapeError(f"squeeze: axis {axis} of shape {x.shape} does not have length 1")
    return x.reshape([n for k, n in enumerate(x.shape) if k not in axes])


def take(x: TensorLike, indices: TensorLike, axis: int | None = None) -> Tensor:
    """The elements at ``indices`` along ``axis``; None flattens first."""
    x = as_tensor(x, "take")
    if axis is None:
        x, axis = x.reshape(x.size), 0
    return x[along(check_axis(axis, x.ndim, "take"), index_part(indices, x))]


def take_along_axis(x: TensorLike, indices: TensorLike, axis: int = -1) -> Tensor:
    """For each place of ``indices``, the element of ``x`` that it points to along ``axis``.

    ``indices`` is an integer array with as many axes as ``x``; others than ``axis`` broadcast.
    """
    x = as_tensor(x, "take_along_axis")
    at = index_part(indices, x)
    if not devices.is_array(at) or at.ndim != x.ndim:
        raise ShapeError(
            f"take_along_axis: indices of shape {np.shape(at)} were given for a tensor of shape "
            f"{x.shape}, expected as many axes"
        )
    chosen = check_axis(axis, x.ndim, "take_along_axis")
    grid = devices.namespace(x._data).ogrid[tuple(slice(n) for n in x.shape)]
    return x[tuple(at if k == chosen else line for k, line in enumerate(grid))]


def flip(x: TensorLike, axis: Axis = None) -> Tensor:
    """The elements in reverse order along ``axis`` (None: every axis), the shape of x."""
    x = as_tensor(x, "flip")
    axes = check_axes(axis, x.ndim, "flip")
    return x[tuple(slice(None, None, -1 if k in axes else None) for k in range(x.ndim))]


@lru_cache(256)
def _equal_parts(axis: int, length: int, count: int) -> list[tuple[Any]]:
    """The params that take each part, the same objects every time: ``following.py`` looks first
    whether they are."""
    step = length // count
    return [(along(axis, slice(k * step, (k + 1) * step)),) for k in range(count)]


def split(x: TensorLike, sections: int | Sequence[int], axis: int = 0) -> list[Tensor]:
    """``x`` cut along ``axis``: into that many equal parts, or at the indices given.

    Returns a list of tensors. Raises ShapeError if the parts would not be equal.
    """
    x = as_tensor(x, "split")
    at = check_axis(axis, x.ndim, "split")
    length = x.shape[at]
    if isinstance(sections, (int, np.integer)):
        if sections < 1 or length % sections:
            raise ShapeError(
                f"split: axis {axis} of shape {x.shape} cannot be cut into {sections} equal parts; "
                "give the indices at which to cut"
            )
        return [apply(GETITEM, (x,), params) for params in _equal_parts(at, length, int(sections))]
    if not isinstance(sections, (list, tuple, np.ndarray)):
        raise ValueError(
            f"split: {sections!r} was given, expected how many parts, or a list of indices"
        )
    edges = [0, *(int(edge) for edge in sections), length]
    return [apply(GETITEM, (x,), (along(at, slice(*ends)),)) for ends in pairwise(edges)]


for _name, _method in {"argmax": argmax, "mean": mean}.items():
    setattr(Tensor, _name, _method)
