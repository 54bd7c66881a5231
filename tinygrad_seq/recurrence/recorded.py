"""A scan on the tape: one entry, followed by one for each of its outputs.

A derivative of its derivative is had by running the rows step by step on the tape (``replay.py``).
Imports the engine, ready, replay and trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from tinygrad_seq import devices
from tinygrad_seq.recurrence.ready import sequence_ready, state_ready
from tinygrad_seq.recurrence.trace import as_used
from tinygrad_seq.rules import Operation
from tinygrad_seq.tape import Bundle, Entry, Piece, recording
from tinygrad_seq.tensors import Tensor, entry_of, wrap

if TYPE_CHECKING:
    from tinygrad_seq.recurrence.compiled import Call


class Run:
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
            g if g is None or g.shape == shape else g.reshape(shape)
            for g, shape in zip(self._of_inputs(found), self.shapes, strict=True)
        ]

    def _arriving(self, gradients: dict[int, Any]) -> tuple[list[Any], list[Any]]:
        """What arrives at outputs, zeros where nothing does, and at last states, as rows."""
        call, dtype = self.call, self.call.dtype
        dys = []
        for k, shape in enumerate(self.y_shapes):
            dy = gradients.get(k)
            if dy is None:
                xp, rows = devices.namespace(call.xs[0]._data), (*shape[:2], prod(shape[2:]))
                dy = xp.broadcast_to(xp.zeros(rows[2:], dtype), rows)
            dys.append(sequence_ready(dy, dtype))
        dlast = [
            None
            if (g := gradients.get(len(dys) + k)) is None
            else state_ready(g.reshape(state._data.shape), dtype)
            for k, state in enumerate(call.states)
        ]
        return dys, dlast

    def _backward(self, dys: list[Any], dlast: list[Any], unused: list[int]) -> Any:
        """The way back through compiled code, watched if somebody watches."""
        # A scan from before is not watched: its states are not among what is written.
        watched = recording.flow is not None and self.watched
        flow = recording.flow.of(self) if watched else None
        if self.left_out and not set(self.left_out) <= set(unused):  # in an earlier backward
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
    """A scan of so many inputs; what is saved ends with its run."""
    return Bundle(
        "scan",
        inputs,
        lambda gradients, *saved: saved[-1].pull(gradients),
        lambda gradients, *saved: saved[-1].pull_recorded(gradients, saved[:-2]),
    )


def recorded(run: Run, inputs: Sequence[Tensor], values: Sequence[np.ndarray]) -> list[Tensor]:
    """The outputs as tensors: the scan's entry, and one for each that takes it out of there."""
    op = _operation(len(inputs))
    parents = tuple([t._entry or entry_of(t) for t in inputs])
    saved = (*[t._data for t in inputs], None, run)  # None: the entry has no value of its own
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
