"""A scan run again on the tape, from its rows, where its derivative must have a derivative.

Compiled code gives gradients as numbers. A gradient that is itself on the tape is had by running
the rows of the step one by one with tensors, as ``unroll`` runs a cell, and going back through it.
Imports the engine, transforms and its own room.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import eq, ge, gt, le, lt, ne
from typing import TYPE_CHECKING, Any

from tinygrad_seq import devices, elementwise
from tinygrad_seq.composites import take
from tinygrad_seq.program import CHOICES
from tinygrad_seq.recurrence.choices import unrolled
from tinygrad_seq.recurrence.stepwise import run_steps
from tinygrad_seq.recurrence.trace import CAPTURED, COMPARISONS, Step, as_used
from tinygrad_seq.rules import RULES
from tinygrad_seq.structural import SCATTER, broadcast_to, concat, matmul, max, min, sum
from tinygrad_seq.tape import recording, set_recording
from tinygrad_seq.tensors import FLOATS, Tensor, apply
from tinygrad_seq.transforms import vjp
from tinygrad_seq.trees import leaves, rebuild

if TYPE_CHECKING:
    from tinygrad_seq.recurrence.compiled import Call


def pull(call: Call, gradients: dict[int, Tensor], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradient of each input of a scan, recorded, from those of some of its outputs."""
    moving = [k for k, t in enumerate(inputs) if t.dtype in FLOATS]

    def function(*given: Tensor) -> list[Tensor]:
        full = list(inputs)
        for k, tensor in zip(moving, given, strict=True):
            full[k] = tensor
        outputs = _replayed(call, full)
        # Those that are last states may have axes before theirs.
        return [outputs[k].reshape(gradient.shape) for k, gradient in gradients.items()]

    with set_recording(True):
        _, back = vjp(function, *(inputs[k] for k in moving))
        found = back(list(gradients.values()))
    made: list[Tensor | None] = [None] * len(inputs)
    for k, gradient in zip(moving, found, strict=True):
        made[k] = gradient
    return made


def _replayed(call: Call, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs and the last states, from inputs, states, captured tensors, reset states."""
    given, remaining = call.given, iter(inputs)
    xs = rebuild(given.xs, remaining)
    state = rebuild(given.state, remaining)
    captured = [next(remaining) for _ in call.step.captured]
    reset_state = state
    if call.own_resets:
        reset_state = rebuild(given.reset_state, remaining)
    again = given._replace(xs=xs, state=state, reset_state=reset_state)

    def cell(x: Any, state: Any) -> tuple[Any, Any]:
        return run_rows(call.step, captured, x, state)

    ys, last = run_steps(cell, again, call.reverse, call.step.seeds)
    return [*leaves(ys), *leaves(last)]


def run_rows(step: Step, captured: Sequence[Tensor], x: Any, state: Any) -> tuple[Any, Any]:
    """One step: the rows, computed one after another with tensors."""
    trace = step.trace
    sources = {"x": leaves(x), "state": leaves(state), **dict.fromkeys(CAPTURED, captured)}
    values: list[Any] = []
    for slot, (op, inputs, detail) in enumerate(trace.rows[: step.length]):
        if op in sources:
            value = sources[op][detail]
            if op != "units":
                value = value.to(trace.dtype)  # integers too, as in the kernel
            if op == "matrix":
                value = as_used(value, trace.roles[detail])
            if op in ("x", "state") and value.ndim != 2:
                value = value.reshape(trace.B, trace.widths[slot])
            values.append(value)
        elif op == "number":
            values.append(step.numbers[detail])
        elif op == "gap":
            values.append(None)
        else:
            operands = [values[k] for k in inputs]
            value = _compute(op, operands, trace, slot)
            values.append(value.detach() if slot in trace.frozen else value)

    def shaped(like: Any, slots: Sequence[int]) -> Any:
        places = zip(slots, leaves(like), strict=True)
        return rebuild(like, iter([values[k].reshape(leaf.shape) for k, leaf in places]))

    return shaped(step.y, step.y_slots), shaped(step.state, step.state_slots)


_COMPARISONS = dict(zip(COMPARISONS, (lt, le, gt, ge, eq, ne), strict=True))
_REDUCTIONS: dict[str, Any] = {"sum": sum, "max": max, "min": min}


def _compute(op: str, operands: list[Any], trace: Any, slot: int) -> Tensor:
    if op in _COMPARISONS:  # conditions are ones and zeros, as in the kernel
        return _COMPARISONS[op](*operands).to(trace.dtype)  # type: ignore[no-any-return]
    if op == "where":
        return elementwise.where(operands[0] != 0, *operands[1:])
    if op == "scalar_power":
        return operands[0] ** operands[1]  # type: ignore[no-any-return]
    if op in RULES:
        return getattr(elementwise, op)(*operands)  # type: ignore[no-any-return]
    if op == "uniform":
        return recording.draws.uniform((trace.B, trace.widths[slot]), None)  # type: ignore[no-any-return]
    x = operands[0]
    if op == "matmul":
        return matmul(x, operands[1])
    if op == "matmul_lines":
        return _of_lines(x, operands[1], trace.widths[slot])
    if op.startswith(CHOICES):
        choice, width = op.removesuffix("_transposed"), trace.widths[slot]
        starts = devices.to_host(operands[1]._data)
        if op == choice:
            return take(x, unrolled(choice, starts, width), axis=1)
        where = (slice(None), unrolled(choice, starts, x.shape[1]))
        return apply(SCATTER, (x,), ((where,), (trace.B, width), trace.dtype))
    if op in _REDUCTIONS:
        return _REDUCTIONS[op](x, 1, keepdims=True)  # type: ignore[no-any-return]
    if op == "slice":
        start = trace.starts[slot]
        return x[:, start : start + trace.widths[slot]]  # type: ignore[no-any-return]
    if op == "concat":
        return concat([_full(part, trace.B) for part in operands], axis=1)
    if op == "broadcast":
        return broadcast_to(x, (trace.B, trace.widths[slot]))
    assert op in ("copy", "detach"), op
    return x  # type: ignore[no-any-return]


def _of_lines(x: Tensor, matrix: Tensor, width: int) -> Tensor:
    """Lines of K units times a matrix (groups K, N), to a row of so many units."""
    (B, units), (rows, n) = x.shape, matrix.shape
    k = units // (width // n)
    if rows == k:  # one for all lines, in a single product
        return matmul(x.reshape(B, units // k, k), matrix).reshape(B, width)
    groups = rows // k
    lines = x.reshape(B, groups, units // rows, k)
    return matmul(lines, matrix.reshape(groups, k, n)).reshape(B, width)


def _full(part: Tensor, B: int) -> Tensor:
    return part if part.shape[0] == B else broadcast_to(part, (B, part.shape[1]))
