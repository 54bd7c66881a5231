"""``scan``: a cell traced, differentiated, planned and run as compiled code.

The cell is traced on every call, so nothing that it closes over can be out of date. Its rows are
looked up; only if they were never seen is anything derived, planned and compiled. On the tape a
scan is one entry, followed by one for each of its outputs. A derivative of its derivative is had by
running the rows step by step there. Imports the engine and its own room.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from tinygrad_seq import devices
from tinygrad_seq.errors import WAY_OUT, DeviceError, TraceError, whole
from tinygrad_seq.kernels.forking import alone
from tinygrad_seq.recurrence.arguments import Cell, Given, check_arguments
from tinygrad_seq.recurrence.derive import Needs, differentiate
from tinygrad_seq.recurrence.following import trace_again
from tinygrad_seq.recurrence.stepwise import no_steps, run_steps
from tinygrad_seq.recurrence.trace import BESIDE, UNITS, Step, as_used, exact_up_to
from tinygrad_seq.recurrence.tracing import trace_cell
from tinygrad_seq.rules import RULES, Operation
from tinygrad_seq.tape import Bundle, Entry, Piece, recording
from tinygrad_seq.tensors import FLOATS, Tensor, entry_of, is_traced, wrap
from tinygrad_seq.trees import leaves, rebuild

if TYPE_CHECKING:
    from tinygrad_seq.program import Plan

SINGLE_OR_DOUBLE = (np.dtype("float32"), np.dtype("float64"))
LONGEST_NAME = 40  # characters
_runners: dict[Any, Any] = {}


def scan(
    cell: Cell,
    xs: Any,
    state: Any = None,
    *,
    lengths: Any = None,
    resets: Any = None,
    reverse: bool = False,
    checkpoint: int | None = None,
) -> tuple[Any, Any]:
    """Run ``y, state = cell(x, state)`` over a sequence as compiled code.

    Arguments and results are those of ``tgs.unroll``: xs (T, B, ...), a state (B, ...), lengths
    (B,), resets (T, B). Gradients flow to inputs, initial states and every tensor that the cell
    closes over. ``checkpoint=k`` keeps states only every k steps and computes the rest again on the
    way back: less memory, a third more time.

    Kernels compute in the one dtype of the step, integers and conditions too, which are exact up to
    2²⁴ in float32 and 2⁵³ in float64, and take numbers below its normal range (1e-38, 2e-308) for
    zero, which ``unroll`` does not. A last state that nothing depends on has a gradient of 0, and 0
    times an infinite derivative, such as that of a square root at 0, is NaN, where ``unroll`` has
    no product at all.

    The cell is traced without values, once in each call. It may use the package's elementwise
    operations, products, cuts, joins and reductions, and random numbers (``rand``, ``randn``,
    ``nn.Dropout``), in float32 or float64. Axis 0 of each value of a step is the batch, and rows do
    not mix: (B, n) and (B, k, n) may be multiplied with a tensor (n, m) that the cell closes over,
    (B, g, k, n) with one (g, n, m), and (B, k, n) with (B, n, m), but (B, n) not with another value
    of two axes. Whatever else it does, a branch on a value for instance, raises a TraceError that
    names the line, and ``tgs.unroll`` runs it.

    ``cumsum`` is a product with a matrix that holds zeros, so that a value that is not finite
    spoils all of the sums along its axis. On a GPU such products are also those of (B, k, n) with a
    tensor (n, m), and what puts units in another order, ``x[:, order]`` of more than 4 pieces, a
    transpose, what of a value of several axes is cut, joined or padded, repeated along an axis or
    summed along one of them: there such a value spoils its row.

    Compiled code is kept on disk; ``tgs.explain`` shows the plan, ``tgs.kernel_source`` the source.

    Raises ShapeError or ValueError for arguments that do not fit.
    """
    if checkpoint is not None:
        checkpoint = whole(checkpoint, "scan: checkpoint")
    given = check_arguments(cell, xs, state, lengths, resets, "scan")
    if recording.tracer is not None:
        _check_no_loop((*given.x_leaves, *given.state_leaves))
    if given.T == 0:
        return no_steps(cell, given), given.state
    if given.B == 0:
        return run_steps(cell, given, reverse)
    if any(tape.by_steps for tape in recording.tapes):
        return _by_steps(cell, given, reverse)
    return Call(cell, given, reverse, checkpoint).run()


def _check_no_loop(leaves: Sequence[Tensor]) -> None:
    """Raise a TraceError if inputs or states are values of a step of another cell."""
    for leaf in leaves:
        if is_traced([leaf]):
            raise TraceError(
                f"scan: a scan inside of the cell was given line %{leaf._data.slot} of the step, "
                "and a loop in a step is not compiled; let what goes on from step to step be state "
                f"of the cell; {WAY_OUT}"
            )


def _by_steps(cell: Cell, given: Given, reverse: bool) -> tuple[Any, Any]:
    """What kernels would compute, step by step on the tape."""
    if given.x_leaves[0].device != devices.CPU:
        return run_steps(cell, given, reverse)
    with alone():
        from tinygrad_seq.kernels import cpu

    outer, recording.flushes = recording.flushes, True
    try:
        with cpu.flushing():
            return run_steps(cell, given, reverse)
    finally:
        recording.flushes = outer


def _floats(leaves: list[Tensor]) -> str:
    """The floating dtypes of these, in words."""
    names = dict.fromkeys(leaf.dtype.name for leaf in leaves if leaf.dtype in FLOATS)
    return " and ".join(names) or "of integers"


def _dtype(given: Given) -> np.dtype[Any]:
    """The one dtype of a step, which its states and inputs share."""
    held: list[np.dtype[Any]] = [t._data.dtype for t in (*given.state_leaves, *given.x_leaves)]
    if held[0] in SINGLE_OR_DOUBLE and held.count(held[0]) == len(held):
        return held[0]  # quickly, for the commonest case
    dtypes = [dtype for dtype in dict.fromkeys(held) if dtype in FLOATS]
    if not dtypes:
        raise TraceError("scan: neither xs nor the state is floating, expected float32 or float64")
    if len(dtypes) > 1:
        raise ValueError(
            f"scan: xs is {_floats(given.x_leaves)} and the state {_floats(given.state_leaves)}, "
            "expected one floating dtype, which is the parameters' too; convert one with "
            "xs.astype(...), cell.to(...). NumPy makes float64 unless told otherwise, and zeros of "
            "a cell's initial_state are float32 unless made with dtype="
        )
    dtype: np.dtype[Any] = dtypes[0]
    if dtype == np.float16:
        raise TraceError(
            "scan: float16 is not compiled; convert to float32, or use tgs.unroll, which runs any "
            "cell step by step on the tape"
        )
    return dtype


class Call:
    """One call of ``scan``."""

    def __init__(
        self,
        cell: Cell,
        given: Given,
        reverse: bool = False,
        checkpoint: int | None = None,
        trace: Callable[..., Step] = trace_again,
    ) -> None:
        self.cell, self.given, self.reverse, self.checkpoint = cell, given, reverse, checkpoint
        self.dtype = _dtype(given)
        self.step = trace(cell, given, self.dtype)
        self.xs, self.states = given.x_leaves, given.state_leaves
        # Whether rows are reset to a state that is another than the first.
        self.own_resets = given.resets is not None and given.reset_state is not given.state
        self.reset_states = leaves(given.reset_state) if self.own_resets else self.states
        self.captured = self.step.captured
        if self.step.precedent is None:  # otherwise they are where they were then
            self._check_device()

    def _check_device(self) -> None:
        device = self.xs[0].device
        for tensor in self.captured:
            if tensor.device != device:
                raise DeviceError(
                    f"scan: xs is on {device}, but a tensor of {tensor.shape} that the cell reads "
                    f"on {tensor.device}; move one with cell.to({device!r}), xs.to(...)"
                )

    def inputs(self) -> list[Tensor]:
        """All tensors that the results depend on."""
        given = [*self.xs, *self.states, *self.captured]
        if self.own_resets:
            given += self.reset_states
        return given

    def needs(self) -> Needs:
        """What wants a gradient; a state does if rows are reset to something that does."""

        def wants(tensors: Sequence[Tensor]) -> tuple[bool, ...]:
            return tuple([t._entry is not None and t._entry.requires_grad for t in tensors])

        states = wants(self.states)
        if self.own_resets:
            pairs = zip(states, wants(self.reset_states), strict=True)
            states = tuple([first or second for first, second in pairs])
        totals = recording.flow is not None
        return Needs(wants(self.xs), states, wants(self.captured), totals=totals)

    def runner(self, needs: Needs | None) -> Any:
        """The compiled code, with a way back if something needs one."""
        known = {} if self.step.precedent is None else self.step.precedent.runners
        runner = known.get(needs)
        if runner is None:
            runner = known[needs] = _runner(self.step, needs, self.cell, self.xs[0]._data)
        return runner

    def arrays(self) -> Any:
        """What the compiled code reads."""
        from tinygrad_seq.kernels import cpu, ragged

        given, step = self.given, self.step
        xp = devices.namespace(self.xs[0]._data)
        states = [_ready(s._data, self.dtype) for s in self.states]
        return cpu.Inputs(
            rows=ragged.rows_of(given.T, given.B, given.lengths, self.reverse),
            xs=[_rows_ready(x._data, self.dtype) for x in self.xs],
            states=states,
            resets=None if given.resets is None else xp.asarray(given.resets, order="C"),
            reset_states=states
            if not self.own_resets
            else [_ready(s._data, self.dtype) for s in self.reset_states],
            captured=[
                t._data
                if role is UNITS
                else _capture_ready(as_used(t._data, role), self.dtype, role is not BESIDE)
                for t, role in zip(self.captured, step.trace.roles, strict=True)
            ],
            numbers=step.numbers,
            seeds=step.seeds,
            widths=step.widths,
            starts=step.starts,
            checkpoint=None if recording.flow is not None else self.checkpoint,
        )

    def run(self) -> tuple[Any, Any]:
        step, given = self.step, self.given
        needs = self.needs() if recording.enabled else None
        record = needs is not None and needs.something
        runner = self.runner(needs if record else None)
        arrays = self.arrays()
        y_leaves = leaves(step.y)
        try:
            ys, last, kept = runner.forward(arrays, record)
        except Exception as error:  # those of cuda.core and numba-cuda are no RuntimeErrors
            devices.raise_explained(error, "scan")
        likes = [*y_leaves, *self.states]  # (B, ...), which were rows (B, n)
        values = [
            v if len(like._data.shape) == 2 else v.reshape(*v.shape[:-2], *like._data.shape)
            for v, like in zip([*ys, *last], likes, strict=True)
        ]
        if not record:
            tensors = [wrap(value, None) for value in values]
        else:
            inputs = self.inputs()
            tensors = _recorded(_Run(self, runner, kept, inputs, values), inputs, values)
        made = iter(tensors)
        return rebuild(step.y, made), rebuild(given.state, made)


def prepare(cell: Cell, xs: Any, state: Any) -> tuple[Call, Needs]:
    """A call with these arguments, and what needs a gradient: all that can, if nothing asks."""
    given = check_arguments(cell, xs, state, None, None, "scan")
    call = Call(cell, given, trace=trace_cell)  # from scratch, for who wants to see how
    needs = call.needs()
    if not needs.something:
        floating = [x.dtype in FLOATS for x in call.xs]
        needs = Needs(tuple(floating), needs.state, (True,) * len(call.captured))
    return call, needs


def _name(cell: Any) -> str:
    """What files and functions of a cell are called."""
    name = str(getattr(cell, "__name__", type(cell).__name__))[:LONGEST_NAME]
    return "".join(c if c.isalnum() else "_" for c in name)


def _runner(step: Step, needs: Needs | None, cell: Any, x: Any) -> Any:
    """The compiled code for these rows where x is, made if they were never seen."""
    trace = step.trace
    structure = (
        trace.dtype.char,
        tuple(trace.rows),
        step.y_slots,
        step.state_slots,
        frozenset(trace.frozen),
    )
    key = (structure, needs, devices.device_of(x))
    runner = _runners.get(key)
    if runner is None:
        with alone():
            runner = _runners.get(key)
            if runner is None:
                runner = _runners[key] = _new_runner(step, needs, _name(cell), x)
    return runner


def _new_runner(step: Step, needs: Needs | None, name: str, x: Any) -> Any:
    texts = {op: (rule.inputs, rule.text) for op, rule in RULES.items()}
    if devices.device_of(x) == devices.CPU:
        from tinygrad_seq.kernels import cpu

        return cpu.Runner(plan_of(step, needs, name), texts)
    try:
        from tinygrad_seq.kernels import cuda
    except ImportError as error:
        raise DeviceError(f"scan: {error}") from None
    return cuda.Runner(plan_of(step, needs, name, cuda=True), texts, devices.namespace(x))


def plan_of(step: Step, needs: Needs | None, name: str, cuda: bool = False) -> Plan:
    """The plan of a traced step, with a way back if something needs one."""
    from tinygrad_seq.recurrence.plan import make_plan  # when something is compiled at all

    step = step._replace(trace=step.trace.copied())
    derivative = None if needs is None else differentiate(step, needs)
    states = needs.state if needs is not None else ()
    return make_plan(step, derivative, name, states, sums_apart=cuda)


# Arrays as kernels read them -----------------------------------------------------------------


def _shaped(array: Any, shape: tuple[int, ...]) -> Any:
    return array if array.shape == shape else array.reshape(shape)


def _ready(array: Any, dtype: np.dtype[Any]) -> Any:
    """(B, ...) as rows (B, n), one after the other."""
    if array.ndim != 2:
        array = array.reshape(len(array), prod(array.shape[1:]))
    elif array.dtype is dtype and type(array) is np.ndarray and array.flags.c_contiguous:
        return array
    return devices.namespace(array).asarray(array, dtype, order="C")


def _rows_ready(x: Any, dtype: np.dtype[Any]) -> Any:
    """(T, B, ...) as rows (T, B, n) in the kernel's dtype, the numbers of a row side by side."""
    if x.ndim == 3 and x.dtype is dtype and x.strides[2] == x.itemsize:
        return x  # quickly, for the commonest case
    _check_exact(x, dtype)
    x = x.astype(dtype, copy=False)
    if x.ndim != 3:
        x = x.reshape(*x.shape[:2], prod(x.shape[2:]))
    if x.shape[2] < 2 or x.strides[2] == x.itemsize:
        return x
    return devices.namespace(x).asarray(x, order="C")


def _check_exact(x: Any, dtype: np.dtype[Any]) -> None:
    """Raise a ValueError for integers that the step's dtype does not hold."""
    if x.dtype.kind not in "iu" or not x.size:
        return
    low, high = int(x.min()), int(x.max())
    if max(-low, high) > exact_up_to(dtype):
        raise ValueError(
            f"scan: integers from {low} to {high} were given, expected such as {dtype} holds "
            "exactly, in which the step computes; tgs.unroll keeps them integers"
        )


def _capture_ready(array: Any, dtype: np.dtype[Any], matrix: bool) -> Any:
    """A matrix at any whole strides, others row after row."""
    if array.dtype is dtype and type(array) is np.ndarray:  # quickly, for the commonest cases
        flags = array.flags
        if flags.c_contiguous or (matrix and flags.f_contiguous):
            return array
    if array.dtype != dtype:
        _check_exact(array, dtype)
        array = array.astype(dtype)
    if matrix and not any(stride % array.itemsize for stride in array.strides):
        return array
    return devices.namespace(array).asarray(array, order="C")


# On the tape ---------------------------------------------------------------------------------


class _Run:
    """A recorded scan: what it kept, and the way back through it."""

    def __init__(
        self, call: Call, runner: Any, kept: Any, inputs: Sequence[Tensor], values: Sequence[Any]
    ) -> None:
        self.runner, self.kept, self.call = runner, kept, call
        self.shapes = [t._data.shape for t in inputs]
        self.y_shapes = [v.shape for v in values[: len(call.step.y_slots)]]
        self.left_out: tuple[int, ...] = ()  # outputs at which the way back does not begin
        self.watched = recording.flow is not None

    def pull(self, gradients: dict[int, np.ndarray]) -> list[Any]:
        """The gradients of all inputs from those of the outputs; None where nothing arrives."""
        dys, dlast = self._arriving(gradients)
        unused = [k for k in range(len(dys)) if gradients.get(k) is None]
        try:
            found = self._backward(dys, dlast, unused)
        except Exception as error:
            devices.raise_explained(error, "scan")
        return [
            None if g is None else _shaped(g, shape)
            for g, shape in zip(self._of_inputs(found), self.shapes, strict=True)
        ]

    def _arriving(self, gradients: dict[int, Any]) -> tuple[list[Any], list[Any]]:
        """What arrives at outputs, zeros where nothing does, and at last states, as rows."""
        call = self.call
        dtype, xp = call.dtype, devices.namespace(call.xs[0]._data)
        dys = []
        for k, shape in enumerate(self.y_shapes):
            dy = gradients.get(k)
            if dy is None:
                rows = *shape[:2], prod(shape[2:])
                dy = xp.broadcast_to(xp.zeros(rows[2:], dtype), rows)
            dys.append(_rows_ready(dy, dtype))
        dlast = [
            None if (g := gradients.get(len(dys) + k)) is None else _ready(g, dtype)
            for k in range(len(call.states))
        ]
        return dys, dlast

    def _backward(self, dys: list[Any], dlast: list[Any], unused: list[int]) -> Any:
        """The way back through compiled code, watched if somebody watches."""
        # A scan from before is not watched: its states are not among what is written.
        watched = recording.flow is not None and self.watched
        flow = recording.flow.of(self) if watched else None
        if not set(self.left_out) <= set(unused):  # in an earlier backward
            self._leave_out(())
        found = self.runner.backward(self.kept, dys, dlast, None if flow is None else flow.see)
        if flow is not None:
            flow.put_states(found.totals)
        elif unused and _hold_nan(found):
            # Zero times an infinite derivative, perhaps, where there is to be no product.
            self._leave_out(tuple(unused))
            found = self.runner.backward(self.kept, dys, dlast)
        return found

    def _of_inputs(self, found: Any) -> list[Any]:
        """The gradients that were found, in the order of ``Call.inputs``."""
        call, states = self.call, found.states
        if call.given.resets is not None and not call.own_resets:
            pairs = zip(states, found.reset_states, strict=True)
            states = [None if a is None else a + b for a, b in pairs]
        captured = [
            None if (g := found.captured.get(k)) is None else as_used(g, role)
            for k, role in enumerate(call.step.trace.roles)
        ]
        given = [*found.xs, *states, *captured]
        if call.own_resets:
            given += found.reset_states
        return given

    def _leave_out(self, unused: tuple[int, ...]) -> None:
        """Keep what a way back needs that does not begin at these outputs."""
        call, self.left_out = self.call, unused
        self.runner = call.runner(call.needs()._replace(unused=unused))
        *_, self.kept = self.runner.forward(call.arrays(), True)

    def pull_recorded(self, gradients: dict[int, Tensor], inputs: Sequence[Tensor]) -> list[Any]:
        """The same as ``pull``, on the tape."""
        from tinygrad_seq.recurrence.replay import pull

        return pull(self.call, gradients, inputs)


def _hold_nan(found: Any) -> bool:
    """Whether a NaN is among gradients: one is in their sum then."""
    arrays = (*found.xs, *found.states, *found.reset_states, *found.captured.values())
    return any(a is not None and bool(np.isnan(a.sum())) for a in arrays)


OUTPUT = Operation("output", (), lambda *_: None, [lambda g, k: Piece(k, g)], view=True)


@cache
def _operation(inputs: int) -> Bundle:
    return Bundle(
        "scan",
        inputs,
        lambda gradients, *saved: saved[-1].pull(gradients),
        lambda gradients, *saved: saved[-1].pull_recorded(gradients, saved[:-2]),
    )


def _recorded(run: _Run, inputs: Sequence[Tensor], values: Sequence[np.ndarray]) -> list[Tensor]:
    """The outputs as tensors: the scan's entry, and one for each that takes it out of there."""
    op = _operation(len(inputs))
    parents = tuple([entry_of(t) for t in inputs])
    saved = (*[t._data for t in inputs], None, run)
    entry = Entry(op, parents, saved, (), values[0].dtype)
    for tape in recording.tapes:
        tape.add(entry, inputs, values[0])
    tensors = []
    for k, value in enumerate(values):
        output = Entry(OUTPUT, (entry,), (k,), value.shape, value.dtype)
        tensors.append(wrap(value, output))
        for tape in recording.tapes:
            tape.add(output, (None,), value)
    return tensors
