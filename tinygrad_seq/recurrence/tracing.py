"""Tracing: a cell run once on tensors without values, which writes down what it does in one step.

Operations on values of the step become rows of a trace; axis 0 of each is the batch, and rows of
that do not mix. Operations on tensors that were there before (a weight transposed, a bias cut)
happen as always, on the tape, once. What elementwise operations become is here, what all others
become in ``lowering.py``. Imports the engine, program, arguments, choices, draws, lowering and
trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple, NoReturn

import numpy as np

from tinygrad_seq import devices
from tinygrad_seq.creation import Rng, new_seed
from tinygrad_seq.errors import WAY_OUT, ShapeError, TraceError
from tinygrad_seq.program import Row
from tinygrad_seq.recurrence.arguments import Cell, Given, check_returned, check_state
from tinygrad_seq.recurrence.choices import as_row, full_shape, repeated_to
from tinygrad_seq.recurrence.draws import Source, check_drawn_anew, drawn
from tinygrad_seq.recurrence.lowering import LOWERED, Shares
from tinygrad_seq.recurrence.trace import (
    BESIDE,
    COMPUTED,
    UNITS,
    Step,
    Trace,
    Traced,
    as_used,
    exact_up_to,
    new_row,
    stand_in,
)
from tinygrad_seq.rules import Operation, Rule
from tinygrad_seq.tape import recording
from tinygrad_seq.tensors import FLOATS, Tensor, beside, is_traced, wrap
from tinygrad_seq.trees import leaves, rebuild

DOUBLE = np.dtype("float64")
# What makes integers of integers, which are exact among floats up to a size.
OF_INTEGERS = {"abs", "add", "maximum", "minimum", "multiply", "negative", "relu", "sign", "square"}
OF_INTEGERS |= {"subtract", "where"}


class Event(NamedTuple):
    """Something that a cell asked its tracer for, and what it got; for ``following.py``."""

    op: Any  # an Operation, the name of a comparison, "uniform" or "detach"
    inputs: Sequence[Any]
    params: tuple[Any, ...]
    begin: int  # how many rows there were
    end: int  # and then
    made: Tensor
    several: bool = False  # whether it was made of what comes next


class Tracer(Source):
    """A trace in the making, and what of the call is no part of it."""

    def __init__(self, trace: Trace, noted: bool = False) -> None:
        self.trace = trace
        self.captured: list[Tensor] = []
        self.numbers: list[float] = []
        self.seeds: list[int] = []  # of each operation that draws at every step
        self.draws = False  # whether any random numbers are drawn
        # Rows, by the id of whose they are and the role, or what that was broadcast to.
        self.captures: dict[tuple[int, Any], int] = {}
        self.originals: list[Tensor] = []  # of what was broadcast, or else an id may be another's
        self.parts: dict[int, tuple[Tensor, ...]] = {}  # what a row was joined from
        self.shares: Shares = {}
        # Rows of products, by the operation, its two rows, their width (the same units can begin
        # runs of several lengths), and whether gradients go through.
        self.products: dict[tuple[str, int, int, int, bool], int] = {}
        self.constants: dict[Any, Tensor] = {}  # of arrays, by what is in them, dtype and shape
        self.events: list[Any] | None = [] if noted else None  # what was asked for, in order
        self.leaves: list[Tensor] = []  # inputs and states, if it is noted
        self.body = 0  # rows when the cell had returned

    # Rows

    def leaf(self, op: str, k: int, shape: tuple[int, ...], dtype: Any) -> Tensor:
        """A row for the k-th leaf of the inputs or of the state."""
        slot = self.trace.add(op, (), k, prod(shape[1:]))
        made = stand_in(self, slot, shape, dtype)
        if self.events is not None:
            self.leaves.append(made)
        return made

    def capture(
        self, tensor: Tensor, role: str = BESIDE, full: tuple[int, ...] | None = None
    ) -> int:
        """The row of a tensor that the cell closes over, numbered at its first use in a role.

        ``full`` is what it is broadcast to if it is no row as it is.
        """
        key = id(tensor), full or role
        if key in self.captures:
            return self.captures[key]
        if full is not None:
            self.originals.append(tensor)
            tensor = as_row(tensor, full)
        trace, shape = self.trace, as_used(tensor._data, role).shape
        if tensor.dtype != trace.dtype and tensor.dtype in FLOATS:
            raise TraceError(
                f"scan: a tensor of dtype {tensor.dtype} and shape {tensor.shape} is used in a "
                f"step of dtype {trace.dtype}, at its line %{len(trace.rows)}, expected one "
                f"dtype; convert it with t.to('{trace.dtype}'), or the cell with cell.to(...); "
                f"{WAY_OUT}"
            )
        op = {BESIDE: "capture", UNITS: "units"}.get(role, "matrix")
        width = shape[-1] if shape else 1
        slot = self.captures[key] = trace.add(op, (), len(self.captured), width, single=not shape)
        self.captured.append(tensor)
        trace.roles.append(role)
        return slot

    def constant(self, array: np.ndarray, role: str = BESIDE) -> Tensor:
        """An array that the step reads, where its inputs are; numbers of units are integers."""
        array = array.astype(np.int64 if role is UNITS else self.trace.dtype)
        key = array.tobytes(), array.dtype, array.shape
        if key not in self.constants:
            self.constants[key] = wrap(devices.to_device(array, self.trace.device), None)
        return self.constants[key]

    def product(
        self, op: str, x: Traced, operand: int, shape: tuple[int, ...], dtype: Any
    ) -> Tensor:
        """The row of x times a matrix, or that of a choice of its units; the same again if asked
        for again."""
        key = op, x.slot, operand, prod(shape[1:]), recording.enabled
        if key in self.products:
            return stand_in(self, self.products[key], shape, dtype)
        made = self.row(op, (x.slot, operand), shape, dtype)
        self.products[key] = made._data.slot
        return made

    def number(self, value: float) -> int:
        self.numbers.append(float(value))
        return self.trace.add("number", (), len(self.numbers) - 1, single=True)

    def uniform(self, shape: tuple[int, ...], rng: Rng, per_sequence: bool = False) -> Tensor:
        trace = self.trace
        if shape[:1] != (trace.B,):
            raise TraceError(
                f"scan: random numbers of shape {shape} are drawn at line %{len(trace.rows)} of "
                f"the step, expected (B, ...) with B = {trace.B}: each row of the batch has "
                f"its own; {WAY_OUT}"
            )
        self.draws, begin = True, len(trace.rows)
        if per_sequence:
            made = drawn(new_seed(rng), 0, 0, shape, trace.dtype).to(trace.device)
        else:
            self.seeds.append(new_seed(rng))
            slot = trace.add("uniform", (), (), prod(shape[1:]))
            made = stand_in(self, slot, shape, trace.dtype)
        if self.events is not None:
            end = len(trace.rows)
            self.events.append(Event("uniform", (), (shape, per_sequence), begin, end, made))
        return made

    def cast(self, x: Traced, dtype: np.dtype[Any]) -> Traced:
        """Kernels compute in one floating dtype; conditions are ones and zeros in it."""
        if dtype == x.dtype:
            return x
        trace = self.trace
        whole = x.dtype.kind in "biu" and (dtype.kind == "f" or np.can_cast(x.dtype, dtype))
        if whole and dtype.kind in "iuf":  # floats become those of the step
            dtype = trace.dtype if dtype.kind == "f" else dtype
            return Traced(self, x.slot, x.shape, dtype)
        if dtype.kind == "b":
            zero = self.number(0.0)
            slot = trace.add("not_equal", (x.slot, zero), (False, True), trace.widths[x.slot])
            return Traced(self, slot, x.shape, dtype)
        raise TraceError(
            f"scan: line %{x.slot} of the step is converted from {x.dtype} to {dtype}, but the "
            f"step computes in {trace.dtype} alone; convert outside the cell; {WAY_OUT}"
        )

    # What an operation becomes

    def apply(self, op: Operation, inputs: Sequence[Any], params: tuple[Any, ...]) -> Tensor | None:
        """Write an operation down; None if it is one on tensors that were there before."""
        if self.events is None:
            return self._written(op, inputs, params)
        begin, before = len(self.trace.rows), len(self.events)
        made = self._written(op, inputs, params)
        if made is not None:
            end, several = len(self.trace.rows), len(self.events) > before
            self.events.insert(before, Event(op, inputs, params, begin, end, made, several))
        return made

    def note(self, *made: Any) -> None:
        """What an operation has made of tensors that were there before: a Precedent asks."""

    def _written(
        self, op: Operation, inputs: Sequence[Any], params: tuple[Any, ...]
    ) -> Tensor | None:
        if type(op) is Rule:
            made = self._quickly(op.name, inputs)
            if made is None and is_traced(inputs):
                made = self._elementwise(op.name, inputs, None)
            return made
        if not is_traced(inputs):
            return None
        self._check_own(inputs)
        if op.name not in LOWERED:
            self.refuse(op.name, inputs)
        return LOWERED[op.name](self, inputs, params)

    def _quickly(self, name: str, inputs: Sequence[Any]) -> Tensor | None:
        """What ``_elementwise`` gives of the commonest inputs: a value, two that are alike, a value
        and a bias. None for all others."""
        data = inputs[0]._data if type(inputs[0]) is Tensor else None
        dtype, single = self.trace.dtype, self.trace.single
        if type(data) is not Traced or data.tracer is not self or data.dtype is not dtype:
            return None
        if len(inputs) == 1:
            return self._row_like(data, name, (data.slot,), (False,))
        if len(inputs) > 2 or type(inputs[1]) is not Tensor or inputs[1]._data.dtype is not dtype:
            return None
        other, shape = inputs[1]._data, data.shape
        if type(other) is Traced:
            alike = other.tracer is self and other.shape == shape
            second = other.slot if alike and single[other.slot] is single[data.slot] else None
        else:
            bias = type(other) is np.ndarray and len(shape) == 2 and other.shape == shape[1:]
            second = self.capture(inputs[1]) if bias and not single[data.slot] else None
        if second is None:
            return None
        return self._row_like(data, name, (data.slot, second), (False, False))

    def _row_like(
        self, first: Traced, name: str, slots: tuple[int, ...], repeated: tuple[bool, ...]
    ) -> Tensor:
        """An elementwise row of the shape of its first input."""
        trace = self.trace
        slot = len(trace.rows)
        trace.rows.append(new_row(Row, (name, slots, repeated)))
        trace.widths.append(trace.widths[first.slot])
        trace.single.append(trace.single[first.slot])
        if not recording.enabled:
            trace.frozen.add(slot)
        return stand_in(self, slot, first.shape, first.dtype)

    def compare(self, name: str, a: Any, b: Any) -> Tensor:
        """A condition: ones and zeros in the kernel."""
        begin, given, asked = len(self.trace.rows), (a, b), name
        a, b = (
            v if isinstance(v, (Tensor, int, float)) else beside(v, (a, b), name, self.trace.dtype)
            for v in (a, b)
        )
        if name in ("bitwise_and", "bitwise_or"):
            if any(getattr(value, "dtype", None) != np.bool_ for value in (a, b)):
                self.refuse(name, (a, b), ": both must be conditions")
            name = "minimum" if name == "bitwise_and" else "maximum"
        made = self._elementwise(name, (a, b), np.dtype(bool))
        if self.events is not None:
            self.events.append(Event(asked, given, (), begin, len(self.trace.rows), made))
        return made

    def invert(self, x: Tensor) -> Tensor:
        if x.dtype != np.bool_:
            self.refuse("~", (x,), ": it must be a condition")
        return self.compare("equal", x, 0.0)

    def _check_own(self, inputs: Sequence[Any]) -> None:
        for value in inputs:
            data = value._data if type(value) is Tensor else None
            if type(data) is Traced and data.tracer is not self:
                self.refuse_foreign()

    def refuse_foreign(self) -> NoReturn:
        raise TraceError(
            f"scan: at line %{len(self.trace.rows)} of the step stands a value from another call "
            "of the cell, or from a cell around it; what goes from step to step belongs into the "
            "state, not into an attribute or a global, and what an inner scan reads into its xs; "
            f"{WAY_OUT}"
        )

    def refuse(self, name: str, inputs: Sequence[Any], why: str = "") -> NoReturn:
        given = ", ".join(_described(value) for value in inputs)
        raise TraceError(
            f"scan: {name} of {given} at line %{len(self.trace.rows)} of the step cannot be "
            f"compiled{why}; {WAY_OUT}"
        )

    def refuse_mixing(self, name: str, inputs: Sequence[Any]) -> NoReturn:
        self.refuse(
            name,
            inputs,
            ": it would mix rows; axis 0 is the batch, and each row goes its own way, so reduce "
            "along the last axis, axis=-1, and choose row by row, with tgs.where",
        )

    def _elementwise(self, name: str, inputs: Sequence[Any], dtype: Any) -> Tensor:
        self._check_own(inputs)
        if name == "scalar_power" and inputs[1] in (2, 3, 4):  # x³ = x · x · x
            return power_of(*inputs)
        traced = [v._data for v in inputs if type(v) is Tensor and type(v._data) is Traced]
        shape = traced[0].shape
        for value in inputs:
            if type(value) is Tensor:
                if value._data.shape != shape:
                    shape = self._broadcast(name, inputs, shape, value._data)
            elif type(value) is int and traced[0].dtype.kind in "iu":
                self._check_exact(value)
        slots, width = [self.operand(value, shape) for value in inputs], prod(shape[1:])
        trace = self.trace
        widths, single = trace.widths, trace.single
        alone = all(map(single.__getitem__, slots))
        repeated = [widths[slot] != width or (single[slot] and not alone) for slot in slots]
        if dtype is None:
            dtype = traced[0].dtype
            if dtype is not trace.dtype or name == "where":
                dtype = self._dtype_of(name, inputs)
        slot = len(widths)
        trace.rows.append(new_row(Row, (name, tuple(slots), tuple(repeated))))
        widths.append(width)
        single.append(alone)
        if not recording.enabled:
            trace.frozen.add(slot)
        return stand_in(self, slot, shape, dtype)

    def operand(self, value: Any, shape: tuple[int, ...]) -> int:
        """The row of an operand of any kind, of something that has this shape."""
        if type(value) is not Tensor:
            return self._weak(value)
        data = value._data
        if type(data) is Traced:
            if data.shape != shape and prod(data.shape[1:]) != 1:  # one unit is repeated by kernels
                data = repeated_to(self, data, shape)._data
            slot: int = data.slot
            return slot
        if is_number(value, self.trace.dtype):
            return self._weak(data)
        return self.capture(value, full=full_shape(value.shape, shape))

    def _check_exact(self, value: int) -> None:
        trace = self.trace
        if abs(value) > exact_up_to(trace.dtype):
            raise ValueError(
                f"scan: the integer {value} stands beside integers at line %{len(trace.rows)} of "
                f"the step, which computes in {trace.dtype} and does not hold it exactly; {WAY_OUT}"
            )

    def _weak(self, value: Any) -> int:
        try:
            return self.number(float(value))
        except OverflowError:
            raise ValueError(
                f"scan: the number at line %{len(self.trace.rows)} of the step is larger than a "
                "float"
            ) from None

    def _dtype_of(self, name: str, inputs: Sequence[Any]) -> Any:
        given = inputs[1:] if name == "where" else inputs
        dtypes = [value.dtype for value in given if type(value) is Tensor]
        if float in map(type, given) or any(dtype in FLOATS for dtype in dtypes):
            return self.trace.dtype
        dtype = np.result_type(*dtypes) if dtypes else np.dtype(np.int64)
        if name in OF_INTEGERS and dtype in (np.int32, np.int64):  # others end sooner than floats
            return dtype
        return self.refuse(
            name, inputs, ": the step computes with floats; convert with t.to(...) first"
        )

    def _broadcast(
        self, name: str, inputs: Sequence[Any], a: tuple[int, ...], other: Any
    ) -> tuple[int, ...]:
        """The shape ``a`` of values of the step together with that of another, or of an array."""
        b = other.shape
        # NumPy's alignment at the last axis, but of two values of the step axis 0 is the batch.
        aligned = b if type(other) is Traced else (1,) * (len(a) - len(b)) + b
        if len(a) == len(aligned):
            made = tuple([m if n == 1 else n for n, m in zip(a, aligned, strict=True)])
            fit = [m in (1, n) for n, m in zip(made, aligned, strict=True)]
            if all(fit) and made[0] == self.trace.B:
                return made
        try:
            axes = len(np.broadcast_shapes(a, b))
        except ValueError:
            hint = "; keepdims=True keeps the axis of a sum" if len(a) != len(b) else ""
            raise ShapeError(
                f"{name}: shapes {a} and {b} were given at line %{len(self.trace.rows)} of the "
                f"step, their axes, aligned at the last, must be equal or 1{hint}"
            ) from None
        if type(other) is not Traced and axes > len(a):
            self.refuse(
                name,
                inputs,
                ": it has more axes than the value of the step; a tensor (T, B, n), of which each "
                "step reads its own part, belongs into xs, scan(cell, (xs, more)), and one that "
                "every step reads all of has the batch first, memory * h[:, None] with (B, S, n)",
            )
        if type(other) is Traced and len(a) != len(b):
            self.refuse(
                name,
                inputs,
                ": axes are aligned at the last, which would mix rows; give the one the axes that "
                "it lacks, as h[:, None] does",
            )
        return self.refuse_mixing(name, inputs)

    def row(
        self,
        op: str,
        inputs: tuple[int, ...],
        shape: tuple[int, ...],
        dtype: Any,
        detail: Any = None,
        single: bool = False,
    ) -> Tensor:
        """A row that the cell computes, as a value of the step."""
        slot = self.trace.add(op, inputs, detail, prod(shape[1:]), single)
        if not recording.enabled:
            self.trace.frozen.add(slot)
        return stand_in(self, slot, shape, dtype)

    def detach(self, x: Tensor) -> Tensor:
        self._check_own((x,))
        begin, made = len(self.trace.rows), self.freeze(x)
        if self.events is not None:
            self.events.append(Event("detach", (x,), (), begin, begin + 1, made))
        return made

    def freeze(self, x: Tensor) -> Tensor:
        """The same value, through which no gradient goes."""
        data, trace = x._data, self.trace
        single = trace.single[data.slot]
        made = self.row("detach", (data.slot,), data.shape, data.dtype, single=single)
        trace.frozen.add(made._data.slot)
        return made

    def depart(self) -> Tracer:
        """Whatever happens, this one writes it down; see ``following.py``."""
        return self

    def plus_zero(self, capture: int) -> int:
        """What was captured, as a row that the step computes: 0 + x."""
        inputs = self.number(0.0), capture
        return self.trace.add("add", inputs, (True, False), self.trace.widths[capture])


def is_number(value: Tensor, dtype: np.dtype[Any]) -> bool:
    """Whether what a step of this dtype reads was most likely made of a Python number."""
    tracked = value._entry is not None and value._entry.requires_grad
    return not value.ndim and not tracked and value.dtype not in (dtype, DOUBLE)


def power_of(x: Tensor, n: float) -> Tensor:
    """x times itself, n times."""
    total = x
    for _ in range(int(n) - 1):
        total = total * x
    return total


def _described(value: Any) -> str:
    if type(value) is not Tensor:
        return f"{value!r}"
    traced = type(value._data) is Traced
    line = f"%{value._data.slot} " if traced else ""
    return f"{line}{value.dtype}{value.shape}"


def trace_cell(cell: Cell, given: Given, dtype: np.dtype[Any]) -> Step:
    """Run the cell once on tensors without values."""
    tracer, x, state = begin_trace(given, dtype)
    with tracing(tracer) as outer:
        return finish_trace(tracer, cell(x, state), cell, given, outer)


def begin_trace(given: Given, dtype: np.dtype[Any], noted: bool = False) -> tuple[Tracer, Any, Any]:
    """A tracer with the leaves of the step, and these as x and state."""
    tracer = Tracer(Trace(given.B, dtype, given.x_leaves[0].device), noted)
    xs = [tracer.leaf("x", k, t.shape[1:], t.dtype) for k, t in enumerate(given.x_leaves)]
    before = [tracer.leaf("state", k, t.shape, t.dtype) for k, t in enumerate(given.state_leaves)]
    return tracer, rebuild(given.xs, iter(xs)), rebuild(given.state, iter(before))


class tracing:  # noqa: N801
    """``with tracing(tracer) as outer:`` it is asked for operations; outer: who was before."""

    def __init__(self, tracer: Any) -> None:
        self._tracer = tracer

    def __enter__(self) -> Any:
        self._outside = recording.tracer, recording.draws, recording.enabled
        recording.tracer, recording.draws, recording.enabled = self._tracer, self._tracer, True
        return self._outside[0]

    def __exit__(self, *_: object) -> None:
        recording.tracer, recording.draws, recording.enabled = self._outside


def finish_trace(tracer: Tracer, returned: Any, cell: Cell, given: Given, outer: Any) -> Step:
    """The step that is written down, when the cell has returned this."""
    trace = tracer.trace
    tracer.body = len(trace.rows)
    y, after = check_returned(returned, cell, given)
    check_state(after, given.state, cell, given)
    copies: dict[int, int] = {}
    y_slots = tuple([_slot(tracer, leaf, "y", copies) for leaf in leaves(y)])
    state_slots = tuple([_slot(tracer, leaf, "state", copies) for leaf in leaves(after)])
    trace.find_gaps()
    if tracer.draws:
        check_drawn_anew(outer, given.driver)
    if tracer.events is None:
        tracer.parts = {}  # they hold the tracer, and it would hold them
    return Step(
        trace,
        y,
        after,
        y_slots,
        state_slots,
        length=len(trace.rows),
        widths=tuple(trace.widths),
        starts=tuple(trace.starts.items()),
        draws=tracer.draws,
        captured=tracer.captured,
        numbers=tracer.numbers,
        seeds=tracer.seeds,
    )


def _slot(tracer: Tracer, leaf: Tensor, what: str, copies: dict[int, int]) -> int:
    """The row of an output; what is not computed in the step becomes a copy of its own."""
    data, trace = leaf._data, tracer.trace
    if type(data) is Traced:
        if data.tracer is not tracer:
            tracer.refuse_foreign()
        if data.dtype != trace.dtype:
            raise TraceError(
                f"scan: the cell returned {what} of dtype {data.dtype}, line %{data.slot} of the "
                f"step, expected {trace.dtype}; convert it with .to('{trace.dtype}') in the cell; "
                f"{WAY_OUT}"
            )
        if trace.rows[data.slot].op in COMPUTED:
            return data.slot
        if data.slot not in copies:  # one for y and state, as if the step had computed it
            copies[data.slot] = trace.copy_of(data.slot)
        return copies[data.slot]
    if leaf.dtype != trace.dtype:
        raise TraceError(
            f"scan: the cell returned {what} of {leaf.dtype}{leaf.shape}, expected "
            f"{trace.dtype}; convert it with .to('{trace.dtype}'); {WAY_OUT}"
        )
    return tracer.plus_zero(tracer.capture(leaf, full=full_shape(leaf.shape, leaf.shape)))
