"""Tensors from nothing: given values, constants, ranges and random numbers.

``device`` is where they are to be, ``"cpu"`` unless it says ``"cuda"``. Random numbers are drawn on
the host and then moved, so that a seed gives the same ones on both.
Imports tape, tensors, structural, devices and errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from tinygrad_seq import devices
from tinygrad_seq.errors import WAY_OUT, TraceError, whole
from tinygrad_seq.structural import check_shape
from tinygrad_seq.tape import recording
from tinygrad_seq.tensors import DEFAULT_FLOAT, FLOATS, Tensor, as_array, check_dtype, wrap

Rng = np.random.Generator | int | None  # what random numbers may be drawn from

_generator = np.random.default_rng()


def manual_seed(seed: int) -> None:
    """Start the random numbers of this package, parameters' and masks' included, at ``seed``."""
    global _generator
    _generator = np.random.default_rng(whole(seed, "manual_seed", least=0))


def generator(rng: Rng = None) -> np.random.Generator:
    """``rng`` itself, one seeded by an integer, or the package's own for None."""
    if recording.tracer is not None:
        raise TraceError(
            "scan: the cell asks for a NumPy generator, whose numbers would be drawn once for all "
            f"steps; take tgs.rand, tgs.randn or nn.Dropout, which are compiled; {WAY_OUT}"
        )
    return _chosen(rng)


def new_seed(rng: Rng) -> int:
    """A seed for one operation that draws inside a cell; from 0 to 2^63 - 1."""
    return int(_chosen(rng).integers(2**63))


def _chosen(rng: Rng) -> np.random.Generator:
    if rng is None:
        return _generator
    if isinstance(rng, np.random.Generator):
        return rng
    if isinstance(rng, (int, np.integer)) and not isinstance(rng, bool):
        return np.random.default_rng(rng)
    raise ValueError(
        f"rng: a {type(rng).__name__} was given, expected a numpy.random.Generator, a seed or None"
    )


def tensor(
    data: Any,
    dtype: DTypeLike | None = None,
    requires_grad: bool = False,
    device: str | None = None,
) -> Tensor:
    """A tensor with a copy of ``data``: a number, nested lists, an array or a tensor.

    An array keeps its dtype; Python floats become float32 and ints int64, unless ``dtype`` is
    given. What is on a GPU stays there, unless ``device`` is given. Raises ShapeError for lists of
    unequal length, ValueError for other dtypes and for an integer tensor that should require a
    gradient.
    """
    made = Tensor(data, dtype, requires_grad)
    return made if device is None else _placed(made, device, requires_grad)


def _placed(made: Tensor, device: str | None, requires_grad: bool = False) -> Tensor:
    """A new tensor moved to its device, a leaf there."""
    if device is not None and device != made.device:
        made = wrap(devices.to_device(made._data, device), None)
    if requires_grad:
        made.requires_grad = True
    return made


def full(
    shape: int | Sequence[int],
    fill_value: complex,
    dtype: DTypeLike | None = None,
    requires_grad: bool = False,
    device: str | None = None,
) -> Tensor:
    """A tensor that holds ``fill_value`` everywhere; dtype as ``tensor(fill_value)`` has it."""
    value = as_array(fill_value, dtype)
    made = np.full(check_shape(shape, "full"), value)
    return _placed(wrap(made, None), device, requires_grad)


def zeros(
    *shape: int | Sequence[int],
    dtype: DTypeLike | None = None,
    requires_grad: bool = False,
    device: str | None = None,
) -> Tensor:
    """Zeros, float32 unless told otherwise: ``zeros(2, 3)`` or ``zeros((2, 3))``."""
    made = np.zeros(check_shape(shape, "zeros"), check_dtype(dtype or DEFAULT_FLOAT))
    return _placed(wrap(made, None), device, requires_grad)


def ones(
    *shape: int | Sequence[int],
    dtype: DTypeLike | None = None,
    requires_grad: bool = False,
    device: str | None = None,
) -> Tensor:
    """Ones, float32 unless told otherwise: ``ones(2, 3)`` or ``ones((2, 3))``."""
    return full(check_shape(shape, "ones"), 1, dtype or DEFAULT_FLOAT, requires_grad, device)


def arange(
    start: float,
    stop: float | None = None,
    step: float = 1,
    dtype: DTypeLike | None = None,
    device: str | None = None,
) -> Tensor:
    """start, start + step, ... up to but without ``stop``; one argument alone is the stop."""
    low, high = (0, start) if stop is None else (start, stop)
    for v in (low, high, step):
        if not isinstance(v, (int, float, np.number)) or not np.isfinite(v):
            raise ValueError(f"arange: {v!r} was given, expected a finite number")
    if not step:
        raise ValueError("arange: a step of 0 was given, expected another number")
    integral = all(isinstance(v, (int, np.integer)) for v in (low, high, step))
    wanted = check_dtype(dtype or (np.int64 if integral else DEFAULT_FLOAT))
    made = np.arange(low, high, step, dtype=np.int64 if integral else np.float64)
    return _placed(wrap(made.astype(wanted), None), device)


def eye(
    n: int, m: int | None = None, dtype: DTypeLike | None = None, device: str | None = None
) -> Tensor:
    """The identity matrix, n × m (m = n unless given), float32 unless told otherwise."""
    rows, columns = check_shape((n, n if m is None else m), "eye")
    made = np.eye(rows, columns, dtype=check_dtype(dtype or DEFAULT_FLOAT))
    return _placed(wrap(made, None), device)


def randn(
    *shape: int | Sequence[int],
    dtype: DTypeLike | None = None,
    requires_grad: bool = False,
    rng: Rng = None,
    per_sequence: bool = False,
    device: str | None = None,
) -> Tensor:
    """Standard normal numbers, float32 unless told otherwise.

    Inside a cell: as ``rand`` says, two of whose numbers make one (Box and Muller 1958).
    """
    if recording.draws is not None:
        made = recording.draws.normal(check_shape(shape, "randn"), rng, per_sequence)
        return _in_a_cell(made, dtype, requires_grad)
    values = generator(rng).standard_normal(check_shape(shape, "randn"))
    return _random(values, dtype, requires_grad, device)


def rand(
    *shape: int | Sequence[int],
    dtype: DTypeLike | None = None,
    requires_grad: bool = False,
    rng: Rng = None,
    per_sequence: bool = False,
    device: str | None = None,
) -> Tensor:
    """Uniform numbers from 0 up to but without 1, float32 unless told otherwise.

    Inside a cell, whose rows of the batch they are for, (B, ...): multiples of 2^-24 in the
    dtype of the states, where they are. Each is a function of its place alone, that is of a seed
    (drawn from ``rng`` in every call of ``scan`` or ``unroll``), the operation, the step, the row
    and the column (Philox 4x32-10, Salmon et al. 2011); so ``scan`` and ``unroll`` draw the same
    after the same ``manual_seed``, however many threads there are. With ``per_sequence`` they are
    drawn once in each call of ``scan`` or ``unroll`` and are the same at all of its steps; outside
    a cell that makes no difference.
    """
    if recording.draws is not None:
        made = recording.draws.uniform(check_shape(shape, "rand"), rng, per_sequence)
        return _in_a_cell(made, dtype, requires_grad)
    wanted = check_dtype(dtype or DEFAULT_FLOAT)
    kind: Any = np.float32 if wanted == np.float32 else np.float64
    values = generator(rng).random(check_shape(shape, "rand"), dtype=kind)
    if wanted == np.float16:  # which would round some up to 1
        values = np.minimum(values, np.nextafter(np.float16(1), np.float16(0)))
    return _random(values, dtype, requires_grad, device)


def _in_a_cell(made: Tensor, dtype: DTypeLike | None, requires_grad: bool) -> Tensor:
    if requires_grad:
        raise ValueError(
            "random numbers: requires_grad=True was given inside a cell, where every step draws "
            "new ones; draw before the scan what is to have a gradient"
        )
    return made if dtype is None else made.to(dtype)


def _random(
    values: np.ndarray, dtype: DTypeLike | None, requires_grad: bool, device: str | None
) -> Tensor:
    wanted = check_dtype(dtype or DEFAULT_FLOAT)
    if wanted not in FLOATS:
        raise ValueError(f"random numbers: dtype {wanted} was given, expected a floating one")
    return _placed(wrap(np.asarray(values, dtype=wanted), None), device, requires_grad)
