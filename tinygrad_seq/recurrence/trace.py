"""Tracing: a cell run once on tensors without values, which writes down what it does in one step.

The step tape that comes of it is a list of rows, each an operation on earlier rows. Only its
structure is in the rows: how many steps, rows of a batch and units there are, and what Python
numbers are involved, is kept beside them, so that a change of any of these is no other cell.
Operations on tensors that were there before (a weight transposed, a bias cut) happen as always, on
the tape, once.

A value inside a step is (B, n), or (B,), which counts as n = 1; axis 0 is the batch, and rows do
not mix. Imports the engine, arguments and draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, NamedTuple, NoReturn

import numpy as np

from tinygrad_seq import devices
from tinygrad_seq.creation import Rng, new_seed
from tinygrad_seq.errors import WAY_OUT, ShapeError, TraceError
from tinygrad_seq.program import Row
from tinygrad_seq.recurrence.arguments import Cell, Given, check_returned, check_state
from tinygrad_seq.recurrence.draws import Source, check_drawn_anew, drawn
from tinygrad_seq.rules import RULES, Operation, Rule
from tinygrad_seq.structural import concat, linear
from tinygrad_seq.tape import recording
from tinygrad_seq.tensors import FLOATS, Tensor, as_tensor, is_traced, wrap
from tinygrad_seq.trees import leaves, rebuild

COMPARISONS = ("less", "less_equal", "greater", "greater_equal", "equal", "not_equal")
PIECES = 4  # slices that a choice of units may be joined from


# What a cell uses a tensor as that it closes over: beside values of the step, as the right side of
# a product, or as that of a product with its transpose. Products have the last two by their names.
BESIDE, MATRIX, TRANSPOSED = "beside", "matrix", "transposed"
ROLES = {"matmul": MATRIX, "linear": TRANSPOSED}

DOUBLE = np.dtype("float64")
_ALL = slice(None)
_ONE, _TWO = (False,), (False, False)
_new = tuple.__new__  # a NamedTuple in half the time
_new_tensor = Tensor.__new__


def as_used(array: Any, role: str) -> Any:
    """An array, or a tensor, as the step reads it."""
    return array.T if role is TRANSPOSED else array


def exact_up_to(dtype: np.dtype[Any]) -> int:
    """The whole numbers from its negative to this one are all in a floating dtype."""
    return 1 << (int(np.finfo(dtype).nmant) + 1)


class Event(NamedTuple):
    """Something that a cell asked its trace for, and what it got; for ``following.py``."""

    op: Any  # an Operation, the name of a comparison, or "uniform"
    inputs: Sequence[Any]
    params: tuple[Any, ...]
    begin: int  # how many rows there were
    made: Tensor
    several: bool = False  # whether it was made of what comes next


class Traced:
    """In the place of an array: the shape and dtype of a row, and no values."""

    __slots__ = ("dtype", "shape", "slot", "trace")
    __array_ufunc__ = None

    def __init__(self, trace: Trace, slot: int, shape: tuple[int, ...], dtype: Any) -> None:
        self.trace, self.slot, self.shape, self.dtype = trace, slot, shape, dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    def astype(self, dtype: Any, copy: Any = None) -> Traced:
        if copy is not None:
            _no_value(self, "a copy of it was asked for")
        return self.trace.cast(self, np.dtype(dtype))

    def _value_wanted(self, *_: Any, **__: Any) -> NoReturn:
        _no_value(self, "its value was asked for")

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):
            raise AttributeError(name)
        _no_value(self, f"its {name} was asked for")

    view = item = tolist = __array__ = __bool__ = __float__ = __int__ = __index__ = _value_wanted


def _stand_in(trace: Trace, slot: int, shape: tuple[int, ...], dtype: Any) -> Tensor:
    """A tensor whose value is a row of the step tape."""
    tensor = _new_tensor(Tensor)
    tensor._data = Traced(trace, slot, shape, dtype)
    tensor._entry = None
    return tensor


def _no_value(traced: Traced, what: str) -> NoReturn:
    raise TraceError(
        f"scan: at line %{traced.slot} of the step ({traced.trace.rows[traced.slot].op}) {what} "
        "(data, numpy(), item(), bool(), print, an index), but a cell is traced without values: "
        "choose with tgs.where instead of if, look rows of a table up (an embedding) before the "
        f"scan, and look at values outside the cell; {WAY_OUT}"
    )


class Trace(Source):
    """A step tape in the making: rows, and beside them what the rows leave open."""

    def __init__(
        self, batch_size: int, dtype: np.dtype[Any], device: str = "cpu", noted: bool = False
    ) -> None:
        self.B, self.dtype, self.device = batch_size, dtype, device
        self.events: list[Any] | None = [] if noted else None  # what was asked for, in order
        self.leaves: list[Tensor] = []  # inputs and states
        self.body = 0  # rows when the cell had returned
        self.of_cell: tuple[Any, Any] = (), ()  # all widths, and starts of slices, at the end
        self.rows: list[Row] = []
        self.widths: list[int] = []  # of each row, the length of its last axis
        self.single: list[bool] = []  # whether that is 1 whatever the sizes
        self.starts: dict[int, int] = {}  # where a slice begins
        self.captured: list[Tensor] = []
        self.roles: list[str] = []  # of each what it is used as, see ROLES
        self.numbers: list[float] = []
        self.captures: dict[tuple[int, str], int] = {}  # rows, by whose they are and the role
        self.cuts: dict[int, list[int]] = {}  # the slices of a row
        self.parts: dict[int, tuple[Tensor, ...]] = {}  # what a row was joined from
        self.shares: Shares = {}  # pieces of matrices
        self.products: dict[tuple[int, int, bool], int] = {}  # rows, by the two that they multiply
        self.gaps: dict[int, list[tuple[int, int]]] = {}  # rows as wide as what they leave out
        self.frozen: set[int] = set()  # rows through which no gradient goes
        self.draws = False  # whether any random numbers are drawn
        self.seeds: list[int] = []  # of each operation that draws them at every step
        self.copies: dict[int, int] = {}  # of rows that are given back and not computed
        self.like: dict[int, int] = {}  # rows that have the width of another by what they mean

    def copied(self) -> Trace:
        """The same rows, to go on from without this trace being changed."""
        made = Trace(self.B, self.dtype, self.device)
        kept = {name: getattr(self, name) for name in vars(made) if name != "events"}
        vars(made).update({name: copy(value) for name, value in kept.items()})
        made.cuts = {base: list(cuts) for base, cuts in self.cuts.items()}
        return made

    # Rows

    def add(
        self,
        op: str,
        inputs: tuple[int, ...] = (),
        detail: Any = None,
        width: int = 1,
        single: bool = False,
    ) -> int:
        self.rows.append(_new(Row, (op, inputs, detail)))
        self.widths.append(width)
        self.single.append(single)
        return len(self.rows) - 1

    def leaf(self, op: str, k: int, shape: tuple[int, ...], dtype: Any) -> Tensor:
        """A row for the k-th leaf of the inputs or of the state."""
        if len(shape) > 2:
            raise TraceError(
                f"scan: {op} leaf {k} has shape {shape} in a step, expected (B, n) or (B,): "
                f"only those are compiled; {WAY_OUT}"
            )
        slot = self.add(op, (), k, shape[1] if len(shape) == 2 else 1)
        made = _stand_in(self, slot, shape, dtype)
        if self.events is not None:
            self.leaves.append(made)
        return made

    def capture(self, tensor: Tensor, role: str = BESIDE) -> int:
        """The row of a tensor that the cell closes over, numbered at its first use in a role."""
        key = (id(tensor), role)
        slot = self.captures.get(key)
        if slot is None:
            if tensor.dtype != self.dtype and tensor.dtype in FLOATS:
                raise TraceError(
                    f"scan: a tensor of dtype {tensor.dtype} and shape {tensor.shape} is used in a "
                    f"step of dtype {self.dtype}, at its line %{len(self.rows)}, expected one "
                    f"dtype; convert it with t.to('{self.dtype}'), or the cell with cell.to(...); "
                    f"{WAY_OUT}"
                )
            shape = as_used(tensor._data, role).shape
            slot = self.add(
                "capture" if role is BESIDE else "matrix",
                (),
                len(self.captured),
                shape[-1] if shape else 1,
                single=not shape,
            )
            self.captured.append(tensor)
            self.roles.append(role)
            self.captures[key] = slot
        return slot

    def constant(self, array: np.ndarray) -> Tensor:
        """An array that the step reads, where its inputs are."""
        return wrap(devices.to_device(array, self.device), None)

    def number(self, value: float) -> int:
        self.numbers.append(float(value))
        return self.add("number", (), len(self.numbers) - 1, single=True)

    def uniform(self, shape: tuple[int, ...], rng: Rng, per_sequence: bool = False) -> Tensor:
        if len(shape) not in (1, 2) or shape[0] != self.B:
            raise TraceError(
                f"scan: random numbers of shape {shape} are drawn at line %{len(self.rows)} of the "
                f"step, expected (B, n) or (B,) with B = {self.B}: each row of the batch has its "
                f"own; {WAY_OUT}"
            )
        self.draws, begin = True, len(self.rows)
        if per_sequence:
            made = drawn(new_seed(rng), 0, 0, shape, self.dtype).to(self.device)
        else:
            self.seeds.append(new_seed(rng))
            slot = self.add("uniform", (), (), shape[1] if len(shape) == 2 else 1)
            made = _stand_in(self, slot, shape, self.dtype)
        if self.events is not None:
            self.events.append(Event("uniform", (), (shape, per_sequence), begin, made))
        return made

    def cast(self, x: Traced, dtype: np.dtype[Any]) -> Traced:
        """Kernels compute in one floating dtype; conditions are ones and zeros in it."""
        if dtype == x.dtype:
            return x
        whole = x.dtype.kind in "biu" and (dtype.kind == "f" or np.can_cast(x.dtype, dtype))
        if whole and dtype.kind in "iuf":  # floats become those of the step
            dtype = self.dtype if dtype.kind == "f" else dtype
            return Traced(self, x.slot, x.shape, dtype)
        if dtype.kind == "b":
            zero = self.number(0.0)
            slot = self.add("not_equal", (x.slot, zero), (False, True), self.widths[x.slot])
            return Traced(self, slot, x.shape, dtype)
        raise TraceError(
            f"scan: line %{x.slot} of the step is converted from {x.dtype} to {dtype}, but the "
            f"step computes in {self.dtype} alone; convert outside the cell; {WAY_OUT}"
        )

    # What an operation becomes

    def apply(self, op: Operation, inputs: Sequence[Any], params: tuple[Any, ...]) -> Tensor | None:
        """Write an operation down; None if it is one on tensors that were there before."""
        if self.events is None:
            return self._written(op, inputs, params)
        begin, before = len(self.rows), len(self.events)
        made = self._written(op, inputs, params)
        if made is not None:
            event = Event(op, inputs, params, begin, made, len(self.events) > before)
            self.events.insert(before, event)
        return made

    def _written(
        self, op: Operation, inputs: Sequence[Any], params: tuple[Any, ...]
    ) -> Tensor | None:
        first = inputs[0]
        data = first._data if type(first) is Tensor else None
        if type(op) is Rule:
            if type(data) is Traced and data.trace is self:  # quickly, for the commonest cases
                if len(inputs) == 1:
                    if data.dtype is self.dtype:
                        return self._like(op.name, (data.slot,), _ONE, data)
                elif len(inputs) == 2 and type(inputs[1]) is Tensor:
                    other = inputs[1]._data
                    if (
                        type(other) is Traced
                        and other.trace is self
                        and data.shape == other.shape
                        and data.dtype is self.dtype is other.dtype
                        and self.single[data.slot] is self.single[other.slot]
                    ):
                        return self._like(op.name, (data.slot, other.slot), _TWO, data)
                    if (
                        type(other) is np.ndarray
                        and other.shape == data.shape[1:] != ()
                        and data.dtype is self.dtype is other.dtype
                        and not self.single[data.slot]
                    ):  # a bias
                        slots = data.slot, self.capture(inputs[1])
                        return self._like(op.name, slots, _TWO, data)
            elif not is_traced(inputs):
                return None
            return self._elementwise(op.name, inputs, None)
        if type(data) is not Traced or data.trace is not self or len(inputs) > 1:
            if not is_traced(inputs):
                return None
            self._check_own(inputs)
        handler = _HANDLERS.get(op.name)
        if handler is None:
            self._unknown(op.name, inputs)
        return handler(self, inputs, params)

    def _like(
        self, name: str, slots: tuple[int, ...], repeated: tuple[bool, ...], data: Traced
    ) -> Tensor:
        """A row of the shape of its first input."""
        first, widths, single = slots[0], self.widths, self.single
        slot = len(widths)
        self.rows.append(_new(Row, (name, slots, repeated)))
        widths.append(widths[first])
        single.append(single[first])
        if not recording.enabled:
            self.frozen.add(slot)
        tensor = _new_tensor(Tensor)
        tensor._data, tensor._entry = Traced(self, slot, data.shape, data.dtype), None
        return tensor

    def compare(self, name: str, a: Any, b: Any) -> Tensor:
        """A condition: ones and zeros in the kernel."""
        begin, given, asked = len(self.rows), (a, b), name
        a, b = (
            v if isinstance(v, (Tensor, int, float)) else as_tensor(v, name, self.dtype)
            for v in (a, b)
        )
        if name in ("bitwise_and", "bitwise_or"):
            if any(getattr(value, "dtype", None) != np.bool_ for value in (a, b)):
                self._unknown(name, (a, b), ": both must be conditions")
            name = "minimum" if name == "bitwise_and" else "maximum"
        made = self._elementwise(name, (a, b), np.dtype(bool))
        if self.events is not None:
            self.events.append(Event(asked, given, (), begin, made))
        return made

    def invert(self, x: Tensor) -> Tensor:
        if x.dtype != np.bool_:
            self._unknown("~", (x,), ": it must be a condition")
        return self._elementwise("equal", (x, 0.0), np.dtype(bool))

    def _check_own(self, inputs: Sequence[Any]) -> None:
        for value in inputs:
            data = value._data if type(value) is Tensor else None
            if type(data) is Traced and data.trace is not self:
                self.refuse_foreign()

    def refuse_foreign(self) -> NoReturn:
        raise TraceError(
            f"scan: at line %{len(self.rows)} of the step stands a value from another call of the "
            "cell, or from a cell around it; what goes from step to step belongs into the state, "
            "not into an attribute or a global, and what an inner scan reads into its xs; "
            f"{WAY_OUT}"
        )

    def _unknown(self, name: str, inputs: Sequence[Any], why: str = "") -> NoReturn:
        given = ", ".join(_described(value) for value in inputs)
        raise TraceError(
            f"scan: {name} of {given} at line %{len(self.rows)} of the step cannot be compiled"
            f"{why}; {WAY_OUT}"
        )

    def _mixes(self, name: str, inputs: Sequence[Any]) -> NoReturn:
        self._unknown(
            name,
            inputs,
            ": it would mix rows; axis 0 is the batch, and each row goes its own way, so reduce "
            "along the last axis, axis=-1, and choose row by row, with tgs.where",
        )

    def _elementwise(self, name: str, inputs: Sequence[Any], dtype: Any) -> Tensor:
        traced = [v._data for v in inputs if type(v) is Tensor and type(v._data) is Traced]
        self._check_own(inputs)
        shape = traced[0].shape
        if len(traced) == len(inputs):
            slots = [each.slot for each in traced]
            for other in traced[1:]:
                if other.shape != shape:
                    shape = self._broadcast(name, inputs, shape, other.shape)
        else:
            if name == "scalar_power" and inputs[1] in (2, 3, 4):  # x³ = x · x · x
                return power_of(*inputs)
            for other in traced[1:]:
                if other.shape != shape:
                    shape = self._broadcast(name, inputs, shape, other.shape)
            for value in inputs:
                if type(value) is Tensor and type(value._data) is not Traced:
                    shape = self._beside(name, inputs, shape, value)
                elif type(value) is int and traced[0].dtype.kind in "iu":
                    self._check_exact(value)
            slots = [self._operand(value, len(shape)) for value in inputs]
        width = shape[1] if len(shape) == 2 else 1
        widths, single = self.widths, self.single
        alone = True
        for slot in slots:
            if not single[slot]:
                alone = False
        repeated = [widths[slot] != width or (single[slot] and not alone) for slot in slots]
        if dtype is None:
            dtype = traced[0].dtype
            if dtype is not self.dtype or name == "where":
                dtype = self._dtype_of(name, inputs)
        slot = len(widths)
        self.rows.append(_new(Row, (name, tuple(slots), tuple(repeated))))
        widths.append(width)
        single.append(alone)
        if not recording.enabled:
            self.frozen.add(slot)
        return _stand_in(self, slot, shape, dtype)

    def _operand(self, value: Any, ndim: int) -> int:
        """The row of an operand of any kind."""
        if isinstance(value, (int, float, np.number)):
            return self._weak(value)
        if type(value._data) is Traced:
            slot: int = value._data.slot
            return slot
        tracked = value._entry is not None and value._entry.requires_grad
        if not value.ndim and not tracked and value.dtype not in (self.dtype, DOUBLE):
            return self._weak(value._data)  # most likely made of a Python number
        if ndim == 1 and value.ndim == 1:  # (B,) counts as (B, 1)
            value = value.reshape(value.shape[0], 1)
        return self.capture(value)

    def _check_exact(self, value: int) -> None:
        if abs(value) > exact_up_to(self.dtype):
            raise ValueError(
                f"scan: the integer {value} stands beside integers at line %{len(self.rows)} of "
                f"the step, which computes in {self.dtype} and does not hold it exactly; {WAY_OUT}"
            )

    def _weak(self, value: Any) -> int:
        try:
            return self.number(float(value))
        except OverflowError:
            raise ValueError(
                f"scan: the number at line %{len(self.rows)} of the step is larger than a float"
            ) from None

    def _dtype_of(self, name: str, inputs: Sequence[Any]) -> Any:
        for value in inputs[1:] if name == "where" else inputs:
            if type(value) is float or (type(value) is Tensor and value.dtype in FLOATS):
                return self.dtype
        return self._unknown(
            name, inputs, ": the step computes with floats; convert with t.to(...) first"
        )

    def _broadcast(
        self, name: str, inputs: Sequence[Any], a: tuple[int, ...], b: tuple[int, ...]
    ) -> tuple[int, ...]:
        """The shape of two traced values together."""
        if len(a) != len(b):
            self._mixes(name, inputs)
        if a[1] != b[1] and 1 not in (a[1], b[1]):
            raise ShapeError(
                f"{name}: shapes {a} and {b} were given at line %{len(self.rows)} of the step, "
                "their axes, aligned at the last, must be equal or 1"
            )
        return (a[0], b[1] if a[1] == 1 else a[1])

    def _beside(
        self, name: str, inputs: Sequence[Any], shape: tuple[int, ...], value: Tensor
    ) -> tuple[int, ...]:
        """The shape of a traced value together with a tensor that was there before."""
        other = value.shape
        if other == shape or not other:
            return shape
        if len(other) > 2 or (len(shape) == 1 and len(other) == 2):
            self._mixes(name, inputs)
        if len(shape) == 1:  # (B,): axis 0 of the other one is the batch too, or 1
            if other[0] not in (1, self.B):
                self._mixes(name, inputs)
            return shape
        if len(other) == 2 and other[0] not in (1, self.B):
            self._mixes(name, inputs)
        n, m = shape[1], other[-1]
        if n != m and 1 not in (n, m):
            raise ShapeError(
                f"{name}: shapes {shape} and {other} were given at line %{len(self.rows)} of the "
                "step, their axes, aligned at the last, must be equal or 1"
            )
        return (shape[0], m if n == 1 else n)

    def _result(
        self,
        op: str,
        inputs: tuple[int, ...],
        shape: tuple[int, ...],
        dtype: Any,
        detail: Any = None,
        single: bool = False,
    ) -> Tensor:
        """A row that the cell computes, as a value of the step."""
        slot = self.add(op, inputs, detail, shape[1] if len(shape) == 2 else 1, single)
        if not recording.enabled:
            self.frozen.add(slot)
        return _stand_in(self, slot, shape, dtype)

    def _product(self, name: str, inputs: Sequence[Tensor]) -> Tensor:
        a, b = inputs[0]._data, inputs[1]._data
        if type(b) is Traced:
            self._unknown(
                name, inputs, ": its right side must be a tensor that the cell closes over"
            )
        if len(a.shape) != 2 or b.ndim != 2:
            self._mixes(name, inputs)
        parts = self.parts.get(a.slot)
        if parts is not None and a.slot not in self.frozen:
            computed = [self._computed(part) for part in parts]
            return product_of_parts(name, computed, inputs[1], self.shares)
        matrix = self.capture(inputs[1], ROLES[name])
        shape = self.B, self.widths[matrix]
        key = a.slot, matrix, recording.enabled
        if key in self.products:
            return _stand_in(self, self.products[key], shape, self.dtype)
        made = self._result("matmul", (a.slot, matrix), shape, self.dtype)
        self.products[key] = made._data.slot
        return made

    def _computed(self, part: Tensor) -> Tensor:
        """A part of what was joined, as a value of the step."""
        if type(part._data) is Traced and part.dtype is self.dtype:
            return part
        traced = type(part._data) is Traced
        slot = part._data.slot if traced else self.as_row(self.capture(part))
        return _stand_in(self, slot, part.shape, self.dtype)

    def as_row(self, capture: int) -> int:
        """What was captured, as a value of the step: 0 + x."""
        inputs = self.number(0.0), capture
        return self.add("add", inputs, (True, False), self.widths[capture])

    def _same(self, x: Traced, shape: tuple[int, ...]) -> Tensor:
        """The same numbers in a shape that a row may have as well."""
        if recording.enabled:
            return _stand_in(self, x.slot, shape, x.dtype)
        frozen: Traced = self.detach(wrap(x, None))._data
        return _stand_in(self, frozen.slot, shape, x.dtype)

    def _reduce(self, name: str, inputs: Sequence[Tensor], params: Any) -> Tensor:
        x, axes, keepdims = inputs[0]._data, params[0], params[1]
        if axes != (1,):
            if not axes:
                return self._same(x, x.shape)
            self._mixes(name, inputs)
        if name != "sum" and not x.shape[1]:
            raise ShapeError(f"{name}: shape {x.shape} has no values along its last axis")
        if name == "sum" and x.dtype.kind in "bu":
            x = Traced(self, x.slot, x.shape, np.dtype(np.int64))
        shape = (self.B, 1) if keepdims else (self.B,)
        return self._result(name, (x.slot,), shape, x.dtype, single=True)

    def _reshape(self, inputs: Sequence[Tensor], params: Any) -> Tensor:
        x, shape = inputs[0]._data, params[0]
        if shape == x.shape or {shape, x.shape} == {(self.B,), (self.B, 1)}:
            return self._same(x, shape)
        return self._unknown("reshape", inputs, f" to {shape}: values of a step are (B, n) or (B,)")

    def _permute(self, inputs: Sequence[Tensor], params: Any) -> Tensor:
        if params[0] == tuple(range(inputs[0].ndim)):
            return self._same(inputs[0]._data, inputs[0].shape)
        return self._mixes("permute_dims", inputs)

    def _broadcast_to(self, inputs: Sequence[Tensor], params: Any) -> Tensor:
        x, shape = inputs[0]._data, params[0]
        if shape == x.shape:
            return self._same(x, shape)
        if len(shape) != 2 or x.ndim != 2 or shape[0] != self.B:
            self._mixes("broadcast_to", inputs)
        return self._result("broadcast", (x.slot,), shape, x.dtype, (True,))

    def _astype(self, inputs: Sequence[Tensor], params: Any) -> Tensor:
        return wrap(self.cast(inputs[0]._data, params[0]), None)

    def detach(self, x: Tensor) -> Tensor:
        data = x._data
        single = self.single[data.slot]
        made = self._result("detach", (data.slot,), data.shape, data.dtype, single=single)
        self.frozen.add(made._data.slot)
        return made

    def _getitem(self, inputs: Sequence[Tensor], params: Any) -> Tensor:
        x, index = inputs[0], params[0]
        data = x._data
        if len(index) == 2 == len(data.shape) and _is_all(index[0]) and type(index[1]) is slice:
            begin, end, n = index[1].start, index[1].stop, data.shape[1]
            if index[1].step is None and type(begin) is type(end) is int and 0 <= begin <= end <= n:
                return self._slice(data, begin, end, (self.B, end - begin))
        parts = _spelled_out(index, data.ndim)
        if sum(part is not None for part in parts) > data.ndim:
            raise IndexError(
                f"indexing: {len(index)} indices were given for a value of {data.ndim} axes, at "
                f"line %{len(self.rows)} of the step"
            )
        if not parts or not _is_all(parts[0]):
            self._mixes("indexing", inputs)
        if any(part is None for part in parts):
            if len(parts) == 2 and parts[1] is None and data.ndim == 1:
                return self._same(data, (self.B, 1))
            self._unknown("indexing", inputs, ": values of a step are (B, n) or (B,)")
        part, n = parts[-1], data.shape[-1]
        if data.ndim == 1 or _is_all(part):
            return self._same(data, data.shape)
        if isinstance(part, slice):
            start, stop, step = part.indices(n)
            if step == 1:
                stop = max(start, stop)
                return self._slice(data, start, stop, (self.B, stop - start))
            chosen = np.arange(n)[part]
        else:
            try:
                chosen = np.arange(n)[part]
            except IndexError:
                raise IndexError(
                    f"indexing: {part} was given for an axis of {n} elements, at line "
                    f"%{len(self.rows)} of the step"
                ) from None
            if isinstance(part, int):
                return self._slice(data, int(chosen), int(chosen) + 1, (self.B,))
            if chosen.ndim != 1:
                self._unknown("indexing", inputs, ": values of a step are (B, n) or (B,)")
        starts = np.flatnonzero(np.diff(chosen, prepend=-2) != 1)  # of pieces that are slices
        if 0 < len(starts) <= PIECES:
            ends = [*starts[1:], len(chosen)]
            pieces = [
                (int(chosen[k]), int(chosen[end - 1]) + 1)
                for k, end in zip(starts, ends, strict=True)
            ]
            return concat([self._slice(data, a, b, (self.B, b - a)) for a, b in pieces], axis=1)
        # Any other choice of units is a product with a matrix of ones and zeros.
        numbers = wrap(Traced(self, data.slot, data.shape, self.dtype), None)
        made = numbers @ self.constant((np.arange(n)[:, None] == chosen).astype(self.dtype))
        return wrap(Traced(self, made._data.slot, made.shape, data.dtype), None)

    def _slice(self, x: Traced, start: int, stop: int, shape: tuple[int, ...]) -> Tensor:
        for slot in self.cuts.get(x.slot, ()):
            where = self.starts[slot], self.starts[slot] + self.widths[slot]
            if where == (start, stop) and (slot in self.frozen) is not recording.enabled:
                return _stand_in(self, slot, shape, x.dtype)  # read again, it is the same row
        slot = self.add("slice", (x.slot,), None, stop - start)
        self.starts[slot] = start
        self.cuts.setdefault(x.slot, []).append(slot)
        if not recording.enabled:
            self.frozen.add(slot)
        return _stand_in(self, slot, shape, x.dtype)

    def depart(self) -> Trace:
        """Whatever happens, this trace writes it down; see ``following.py``."""
        return self

    def find_gaps(self) -> None:
        """Where the slices of a row do not follow one another from end to end, say what is left.

        They may be read in any order.
        """
        for base, cuts in self.cuts.items():
            width, end = self.widths[base], 0
            for slot in sorted(cuts, key=lambda slot: (self.starts[slot], self.widths[slot])):
                if self.starts[slot] != end:
                    break
                end += self.widths[slot]
            else:
                if end == width:
                    continue
            self.gaps[base] = []
            for slot in cuts:
                after = width - self.starts[slot] - self.widths[slot]
                left = self.add("gap", (base,), 0, self.starts[slot])
                right = self.add("gap", (base,), 1, after)
                self.gaps[base].append((left, right))

    def _concat(self, inputs: Sequence[Tensor], params: Any) -> Tensor:
        if params[0] != 1:
            self._mixes("concat", inputs)
        slots = []
        for value in inputs:
            data = value._data
            if type(data) is Traced:
                slots.append(data.slot)
            elif data.shape[0] != self.B:
                self._mixes("concat", inputs)
            else:
                slots.append(self.capture(value))
        width = params[1][-1]
        dtypes = {value.dtype for value in inputs}
        dtype = dtypes.pop() if len(dtypes) == 1 else self.dtype
        made = self._result("concat", tuple(slots), (self.B, width), dtype)
        self.parts[made._data.slot] = tuple(inputs)
        return made

    def _stack(self, inputs: Sequence[Tensor], params: Any) -> Tensor:
        """Numbers (B,) side by side: (B, n)."""
        if params[0] != 1 or inputs[0].ndim != 1:
            self._unknown(
                "stack",
                inputs,
                ": values of a step are (B, n) or (B,); those of shape (B,) may be stacked along "
                "axis -1, others be joined there with tgs.concat",
            )
        slots = tuple([self._operand(value, 1) for value in inputs])
        dtype = np.result_type(*(value.dtype for value in inputs))
        return self._result("concat", slots, (self.B, len(slots)), dtype)

    def _pad(self, inputs: Sequence[Tensor], params: Any) -> Tensor:
        x, (widths, value) = inputs[0], params
        if x.ndim != 2 or widths[0] != (0, 0):
            self._mixes("pad", inputs)
        before, after = (self.constant(np.full((self.B, n), value, self.dtype)) for n in widths[1])
        return concat([before, x, after], axis=1)

    def _cumsum(self, inputs: Sequence[Tensor], params: Any) -> Tensor:
        if inputs[0].ndim != 2 or params[0] != 1:
            self._mixes("cumsum", inputs)
        n = inputs[0].shape[1]
        return inputs[0] @ self.constant(np.triu(np.ones((n, n), self.dtype)))


def power_of(x: Tensor, n: float) -> Tensor:
    """x times itself, n times."""
    total = x
    for _ in range(int(n) - 1):
        total = total * x
    return total


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


_HANDLERS: dict[str, Callable[..., Tensor]] = {
    "matmul": lambda trace, inputs, params: trace._product("matmul", inputs),
    "linear": lambda trace, inputs, params: trace._product("linear", inputs),
    "sum": lambda trace, inputs, params: trace._reduce("sum", inputs, params),
    "max": lambda trace, inputs, params: trace._reduce("max", inputs, params),
    "min": lambda trace, inputs, params: trace._reduce("min", inputs, params),
    "reshape": Trace._reshape,
    "permute_dims": Trace._permute,
    "broadcast_to": Trace._broadcast_to,
    "astype": Trace._astype,
    "getitem": Trace._getitem,
    "concat": Trace._concat,
    "stack": Trace._stack,
    "pad": Trace._pad,
    "cumsum": Trace._cumsum,
}


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


def _described(value: Any) -> str:
    if type(value) is not Tensor:
        return f"{value!r}"
    traced = type(value._data) is Traced
    line = f"%{value._data.slot} " if traced else ""
    return f"{line}{value.dtype}{value.shape}"


class Step(NamedTuple):
    """What tracing a cell gives: the step tape, and where its outputs and next state stand."""

    trace: Trace
    y: Any  # the structure of y with its shapes (B, ...), as traced tensors
    state: Any
    y_slots: tuple[int, ...]
    state_slots: tuple[int, ...]
    length: int  # rows of the cell itself; its derivative's may follow
    precedent: Any = None  # what it was traced along, see ``following.py``


def trace_cell(cell: Cell, given: Given, dtype: np.dtype[Any]) -> Step:
    """Run the cell once on tensors without values."""
    trace, x, state = begin_trace(given, dtype)
    with tracing(trace) as outer:
        return finish_trace(trace, cell(x, state), cell, given, outer)


def begin_trace(given: Given, dtype: np.dtype[Any], noted: bool = False) -> tuple[Trace, Any, Any]:
    """A trace with its leaves, and these as x and state."""
    trace = Trace(given.B, dtype, given.x_leaves[0].device, noted)
    xs = [trace.leaf("x", k, t.shape[1:], t.dtype) for k, t in enumerate(given.x_leaves)]
    before = [trace.leaf("state", k, t.shape, t.dtype) for k, t in enumerate(given.state_leaves)]
    return trace, rebuild(given.xs, iter(xs)), rebuild(given.state, iter(before))


class tracing:  # noqa: N801
    """``with tracing(trace) as outer:`` operations are written down there; outer: where before."""

    def __init__(self, trace: Any) -> None:
        self._trace = trace

    def __enter__(self) -> Any:
        self._outside = recording.tracer, recording.draws, recording.enabled
        recording.tracer, recording.draws, recording.enabled = self._trace, self._trace, True
        return self._outside[0]

    def __exit__(self, *_: object) -> None:
        recording.tracer, recording.draws, recording.enabled = self._outside


def finish_trace(trace: Trace, returned: Any, cell: Cell, given: Given, outer: Any) -> Step:
    """The step that is written down, when the cell has returned this."""
    trace.body = len(trace.rows)
    y, after = check_returned(returned, cell, given)
    check_state(after, given.state, given.xs, f"{given.driver}: the cell returned a state that")
    y_slots = tuple([trace_slot(trace, leaf, "y") for leaf in leaves(y)])
    state_slots = tuple([trace_slot(trace, leaf, "state") for leaf in leaves(after)])
    trace.find_gaps()
    if trace.draws:
        check_drawn_anew(outer, given.driver)
    trace.of_cell = tuple(trace.widths), tuple(trace.starts.items())
    if trace.events is None:
        trace.parts = {}  # they hold the trace, and it would hold them
    return Step(trace, y, after, y_slots, state_slots, len(trace.rows))


# What a pass over a row computes, as against what is there already or comes from a product.
COMPUTED = {"copy", "broadcast", "uniform", *RULES, *COMPARISONS}


def trace_slot(trace: Trace, leaf: Tensor, what: str) -> int:
    """The row of an output; what is not computed in the step becomes a copy of its own."""
    data = leaf._data
    if type(data) is Traced:
        if data.trace is not trace:
            trace.refuse_foreign()
        if data.dtype != trace.dtype:
            raise TraceError(
                f"scan: the cell returned {what} of dtype {data.dtype}, line %{data.slot} of the "
                f"step, expected {trace.dtype}; convert it with .to('{trace.dtype}') in the cell; "
                f"{WAY_OUT}"
            )
        if trace.rows[data.slot].op in COMPUTED:
            return data.slot
        if data.slot not in trace.copies:  # one for y and state, as if the step had computed it
            trace.copies[data.slot] = copied(trace, data.slot)
        return trace.copies[data.slot]
    if len(leaf.shape) > 2 or leaf.dtype != trace.dtype:
        raise TraceError(
            f"scan: the cell returned {what} of {leaf.dtype}{leaf.shape}, expected "
            f"{trace.dtype} (B, n) or (B,); {WAY_OUT}"
        )
    if leaf.ndim == 1:  # (B,) counts as (B, 1)
        leaf = leaf.reshape(len(leaf), 1)
    return trace.as_row(trace.capture(leaf))


def copied(trace: Trace, slot: int) -> int:
    made = trace.add("copy", (slot,), (False,), trace.widths[slot], trace.single[slot])
    trace.like[made] = slot
    return made
