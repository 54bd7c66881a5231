"""``scan``: a cell traced, differentiated, planned and run as compiled code.

The cell is traced on every call, unless it is certain that it would do again what it did
(``settled.py``), so nothing that it closes over can be out of date. Its rows are looked up; only if
they were never seen is anything derived, planned and compiled. Imports the engine and its own room.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tinygrad_seq import devices
from tinygrad_seq.errors import WAY_OUT, DeviceError, TraceError, whole
from tinygrad_seq.kernels.forking import alone
from tinygrad_seq.recurrence.arguments import Cell, Given, check_arguments
from tinygrad_seq.recurrence.derive import Needs, differentiate
from tinygrad_seq.recurrence.following import trace_again
from tinygrad_seq.recurrence.ready import capture_ready, sequence_ready, state_ready
from tinygrad_seq.recurrence.recorded import Run, recorded
from tinygrad_seq.recurrence.repeating import Pattern, keep, likeness, repeated
from tinygrad_seq.recurrence.stepwise import no_steps, run_steps
from tinygrad_seq.recurrence.trace import BESIDE, UNITS, Step, as_used
from tinygrad_seq.recurrence.tracing import trace_cell
from tinygrad_seq.rules import RULES
from tinygrad_seq.tape import recording
from tinygrad_seq.tensors import FLOATS, Tensor, is_traced, wrap
from tinygrad_seq.trees import leaves, map_leaves, rebuild

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

    The cell is traced without values, once in a call, or not at all where all that it can read is
    what it was. It may use the package's elementwise operations, products, cuts, joins and
    reductions, and random numbers (``rand``, ``randn``, ``nn.Dropout``), in float32 or float64.
    Axis 0 of each value of a step is the batch, and rows do not mix: (B, n) and (B, k, n) may be
    multiplied with a tensor (n, m) that the cell closes over, (B, g, k, n) with one (g, n, m), and
    (B, k, n) with (B, n, m), but (B, n) not with another value of two axes. Whatever else it does,
    a branch on a value for instance, raises a TraceError that names the line, and ``tgs.unroll``
    runs it.

    ``cumsum`` is a product with a matrix that holds zeros, so that a value that is not finite
    spoils all of the sums along its axis. On a GPU such products are also those of (B, k, n) with a
    tensor (n, m), and what puts units in another order, ``x[:, order]`` of more than 4 pieces, a
    transpose, what of a value of several axes is cut, joined or padded, repeated along an axis or
    summed along one of them: there such a value spoils its row.

    Compiled code is kept on disk; ``tgs.explain`` shows the plan, ``tgs.kernel_source`` the source.

    Raises ShapeError or ValueError for arguments that do not fit.
    """
    return _scan(cell, xs, state, (), lengths, resets, reverse, checkpoint)


def scan_layer(cell: Cell, xs: Any, state: Any, **options: Any) -> tuple[Any, Any]:
    """``scan``, but for the last states, which are those of a stack of one: (1, B, ...)."""
    return _scan(cell, xs, state, (1,), **options)


def _scan(
    cell: Cell,
    xs: Any,
    state: Any,
    leading: tuple[int, ...],
    lengths: Any,
    resets: Any,
    reverse: bool,
    checkpoint: int | None = None,
) -> tuple[Any, Any]:
    """``scan``; ``leading`` are the lengths of axes that last states have before (B, ...)."""
    if checkpoint is not None:
        checkpoint = whole(checkpoint, "scan: checkpoint")
    like = None
    if lengths is None and resets is None and not recording.tapes and recording.flow is None:
        like = likeness(xs, state, bool(reverse), checkpoint, leading)
        call = repeated(cell, xs, state, like)
        if call is not None:
            return call.run()
    given = check_arguments(cell, xs, state, lengths, resets, "scan")
    if recording.tracer is not None:
        _check_no_loop((*given.x_leaves, *given.state_leaves))
    if not given.T or not given.B or any(tape.by_steps for tape in recording.tapes):
        ys, last = _by_steps(cell, given, reverse)
        if leading:
            last = map_leaves(lambda leaf: leaf.reshape(*leading, *leaf.shape), last)
        return ys, last
    call = Call(cell, given, reverse, checkpoint, leading)
    made = call.run()
    if like is not None:
        keep(call, like, state is None)
    return made


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
    if not given.T:
        return no_steps(cell, given), given.state
    if not given.B or given.x_leaves[0].device != devices.CPU:
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
        leading: tuple[int, ...] = (),
        trace: Callable[..., Step] = trace_again,
    ) -> None:
        self.cell, self.given, self.reverse, self.checkpoint = cell, given, reverse, checkpoint
        self.leading = leading  # the lengths of axes that last states have before (B, ...)
        self.dtype = _dtype(given)
        self.step = trace(cell, given, self.dtype)
        self.xs, self.states = given.x_leaves, given.state_leaves
        # Whether rows are reset to a state that is another than the first.
        self.own_resets = given.resets is not None and given.reset_state is not given.state
        self.reset_states = leaves(given.reset_state) if self.own_resets else self.states
        self.pattern: Pattern | None = None  # of the calls that this one is like
        if self.step.precedent is None:  # otherwise tensors are on the device that they were on
            self._check_device()

    def _check_device(self) -> None:
        device = self.xs[0].device
        for tensor in self.step.captured:
            if tensor.device != device:
                raise DeviceError(
                    f"scan: xs is on {device}, but a tensor of {tensor.shape} that the cell reads "
                    f"on {tensor.device}; move one with cell.to({device!r}), xs.to(...)"
                )

    def inputs(self) -> list[Tensor]:
        """All tensors that the results depend on."""
        given = [*self.xs, *self.states, *self.step.captured]
        if self.own_resets:
            given += self.reset_states
        return given

    def needs(self) -> Needs:
        """What wants a gradient; a state does if rows are reset to something that does."""
        xs_end = len(self.xs)
        states_end = xs_end + len(self.states)
        captured_end = states_end + len(self.step.captured)
        wants = tuple(
            [(entry := t._entry) is not None and entry.requires_grad for t in self.inputs()]
        )
        of_states, of_resets = wants[xs_end:states_end], wants[captured_end:]
        if of_resets:
            pairs = zip(of_states, of_resets, strict=True)
            of_states = tuple([first or second for first, second in pairs])
        totals = recording.flow is not None
        of_captured = wants[states_end:captured_end]
        return Needs(wants[:xs_end], of_states, of_captured, totals=totals)

    def runner(self, needs: Needs | None) -> Any:
        """The compiled code, with a way back if something needs one."""
        runners = {} if self.step.precedent is None else self.step.precedent.runners
        runner = runners.get(needs)
        if runner is None:
            runner = runners[needs] = _runner(self.step, needs, self.cell, self.xs[0]._data)
        return runner

    def arrays(self, read: Any = None) -> Any:
        """What the compiled code reads; ``read`` is what it has read in a call like this one."""
        from tinygrad_seq.kernels import cpu, ragged

        given, step, dtype = self.given, self.step, self.dtype
        xs = [sequence_ready(x._data, dtype) for x in self.xs]
        states = [state_ready(s._data, dtype) for s in self.states]
        captured = [
            t._data
            if role is UNITS
            else capture_ready(as_used(t._data, role), dtype, role is not BESIDE)
            for t, role in zip(self.step.captured, step.trace.roles, strict=True)
        ]
        if read is not None:
            return read.again(xs, states, captured)
        xp, resets, reset_states = devices.namespace(xs[0]), given.resets, states
        if self.own_resets:
            reset_states = [state_ready(s._data, dtype) for s in self.reset_states]
        return cpu.Inputs(
            rows=ragged.rows_of(given.T, given.B, given.lengths, self.reverse),
            xs=xs,
            states=states,
            resets=None if resets is None else xp.asarray(resets, order="C"),
            reset_states=reset_states,
            captured=captured,
            numbers=step.numbers,
            seeds=step.seeds,
            widths=step.widths,
            starts=step.starts,
            checkpoint=None if recording.flow is not None else self.checkpoint,
        )

    def run(self) -> tuple[Any, Any]:
        step, given = self.step, self.given
        needs = self.needs() if recording.enabled else None
        if needs is not None and not needs.something:
            needs = None
        record = needs is not None
        runner = self.runner(needs)
        arrays = self.arrays() if self.pattern is None else self.pattern.arrays(self, needs)
        y_leaves = leaves(step.y)
        try:
            ys, last, kept = runner.forward(arrays, record)
        except Exception as error:  # those of cuda.core and numba-cuda are no RuntimeErrors
            devices.raise_explained(error, "scan")
        if self.pattern is not None:
            self.pattern.note(needs, arrays)
        values = [  # which were rows (T, B, n)
            y if len(shape := like._data.shape) == 2 else y.reshape(*y.shape[:-2], *shape)
            for y, like in zip(ys, y_leaves, strict=True)
        ]
        leading = self.leading
        for h, like in zip(last, self.states, strict=True):
            shape = like._data.shape
            values.append(h.reshape(*leading, *shape) if leading or len(shape) != 2 else h)
        if not record:
            tensors = [wrap(value, None) for value in values]
        else:
            inputs = self.inputs()
            tensors = recorded(Run(self, runner, kept, inputs, values), inputs, values)
        made = iter(tensors)
        return rebuild(step.y, made), rebuild(given.state, made)


def prepare(cell: Cell, xs: Any, state: Any) -> tuple[Call, Needs]:
    """A call with these arguments, and what needs a gradient: all that can, if nothing asks."""
    given = check_arguments(cell, xs, state, None, None, "scan")
    call = Call(cell, given, trace=trace_cell)  # from scratch, for who wants to see how
    needs = call.needs()
    if not needs.something:
        floating = [x.dtype in FLOATS for x in call.xs]
        needs = Needs(tuple(floating), needs.state, (True,) * len(call.step.captured))
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
    """The plan of these rows, to be compiled at its first run."""
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
