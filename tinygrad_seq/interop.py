"""What NumPy's own functions do with tensors.

A ufunc that this package has too (``np.exp``, ``array * tensor``) is this package's, recorded as
such. Other functions see arrays, unless that would lose a gradient.
Imports tensors, elementwise, structural, tape and errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tinygrad_seq import elementwise
from tinygrad_seq.errors import TapeError, TraceError
from tinygrad_seq.structural import matmul
from tinygrad_seq.tape import recording
from tinygrad_seq.tensors import Tensor, as_tensor, is_traced

# NumPy's functions whose results nobody would differentiate.
HARMLESS = frozenset(
    "all allclose any argmax argmin argpartition argsort around array2string array_equal "
    "array_equiv array_repr array_str can_cast ceil common_type count_nonzero empty_like "
    "flatnonzero floor full_like isclose iscomplexobj isfinite isinf isnan isneginf isposinf "
    "isrealobj logical_and logical_not logical_or logical_xor may_share_memory min_scalar_type "
    "ndim nonzero ones_like result_type rint round save savetxt savez savez_compressed "
    "searchsorted shape shares_memory signbit size trunc zeros_like".split()
)
# Functions that this package has too, under NumPy's name or another.
COUNTERPARTS = {
    name: name
    for name in (
        "broadcast_to clip concat cumsum expand_dims flip matmul max mean min pad permute_dims "
        "reshape split squeeze stack sum take take_along_axis var where"
    ).split()
} | {
    "amax": "max",
    "amin": "min",
    "concatenate": "concat",
    "dot": "matmul",
    "hstack": "concat",
    "transpose": "permute_dims",
    "vstack": "concat",
}


def array_function(self: Tensor, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """Call a NumPy function with arrays in the place of tensors.

    Raises TapeError where a tensor requires a gradient, unless the result has none anyhow: it would
    be off the tape unnoticed. Raises TraceError for values of a cell that is traced.
    """
    name, tensors = function.__name__, list(_tensors_in((args, kwargs)))
    instead = f"use tgs.{COUNTERPARTS[name]}, or " if name in COUNTERPARTS else "use "
    for tensor in tensors:
        if is_traced([tensor]):
            raise TraceError(
                f"scan: np.{name} was given line %{tensor._data.slot} of the step and is not "
                f"compiled; {instead}tgs.unroll, where NumPy's functions work on values, and no "
                "gradient goes back through them"
            )
    if recording.enabled and name not in HARMLESS and any(t.requires_grad for t in tensors):
        raise TapeError(
            f"np.{name}: a tensor that requires a gradient was given, and the result would be off "
            f"the tape; {instead}t.numpy() if that is meant"
        )
    return function(*_arrays_in(args), **_arrays_in(kwargs))


UFUNCS: dict[str, Any] = {
    name: getattr(elementwise, name)
    for name in (
        "add cos divide exp expm1 floor log log1p maximum minimum multiply negative power sign sin "
        "sqrt square subtract tanh"
    ).split()
} | {
    "absolute": elementwise.abs,
    "equal": lambda a, b: as_tensor(a) == b,
    "greater": lambda a, b: as_tensor(a) > b,
    "greater_equal": lambda a, b: as_tensor(a) >= b,
    "less": lambda a, b: as_tensor(a) < b,
    "less_equal": lambda a, b: as_tensor(a) <= b,
    "matmul": matmul,
    "not_equal": lambda a, b: as_tensor(a) != b,
}


def array_ufunc(self: Tensor, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
    """NumPy's ufunc on tensors, and NumPy's arrays on the left of an operator."""
    name = ufunc.__name__
    if "out" in options:
        raise TapeError(
            f"np.{name}: an array cannot hold the result of an operation on tensors, as in "
            "array += tensor; write array = array + tensor"
        )
    if method == "__call__" and name in UFUNCS and not options:
        return UFUNCS[name](*inputs)
    function = ufunc if method == "__call__" else getattr(ufunc, method)
    return array_function(self, function, (), inputs, options)


def _tensors_in(values: Any) -> Iterator[Tensor]:
    if isinstance(values, (tuple, list, dict)):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _tensors_in(value)
    elif isinstance(values, Tensor):
        yield values


def _arrays_in(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _arrays_in(value) for key, value in values.items()}
    if isinstance(values, (tuple, list)):
        inner = [_arrays_in(value) for value in values]
        return tuple(inner) if isinstance(values, tuple) else inner
    return values.data if isinstance(values, Tensor) else values


setattr(Tensor, "__array_function__", array_function)  # noqa: B010
setattr(Tensor, "__array_ufunc__", array_ufunc)  # noqa: B010
