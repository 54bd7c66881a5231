"""The derivative of a step: the rows of a step tape walked backward, which writes more rows.

The rules are the engine's: for an elementwise row the derivative over tensors is called with traced
ones, and what it does is written down like the cell itself. Products, cuts and sums, whose rows
leave sizes open, have their few lines here.

A gradient has the width of what it is the gradient of. Imports the engine, program, trace and
tracing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from tinygrad_seq.elementwise import maximum
from tinygrad_seq.program import CHOICES, Derivative
from tinygrad_seq.recurrence.trace import COMPARISONS, COMPUTED, Step, stand_in
from tinygrad_seq.recurrence.tracing import Tracer, tracing
from tinygrad_seq.rules import RULES
from tinygrad_seq.structural import sum
from tinygrad_seq.tensors import Tensor


class Needs(NamedTuple):
    """What wants a gradient, leaf by leaf."""

    x: tuple[bool, ...]
    state: tuple[bool, ...]
    captured: tuple[bool, ...]
    unused: tuple[int, ...] = ()  # outputs at which no gradient arrives
    totals: bool = False  # whether the gradients of states are wanted at each step

    @property
    def something(self) -> bool:
        """Whether anything does."""
        return any(self.x) or any(self.state) or any(self.captured)


def differentiate(step: Step, needs: Needs) -> Derivative:
    """Continue the step tape with the rows of its derivative."""
    tracer = Tracer(step.trace)
    tracer.captured, tracer.numbers = [*step.captured], [*step.numbers]
    with tracing(tracer):
        return _Walk(step, needs, tracer).run()


class _Walk:
    def __init__(self, step: Step, needs: Needs, tracer: Tracer) -> None:
        self.step, self.trace, self.needs, self.tracer = step, step.trace, needs, tracer
        self.count = len(step.trace.rows)
        self.gradients: dict[int, Tensor] = {}
        self.pieces: dict[int, dict[int, Tensor]] = {}  # of a row, by the slice that was taken
        self.outer: list[tuple[int, int, int]] = []
        self.sums: list[tuple[int, int]] = []

    def run(self) -> Derivative:
        trace, step = self.trace, self.step
        moving, carried = self._moving()
        dy = tuple(self._arriving("dy", k, slot) for k, slot in enumerate(step.y_slots))
        after = tuple(
            self._arriving("dstate", k, slot) if carried[k] else None
            for k, slot in enumerate(step.state_slots)
        )
        arriving = [
            (slot, arrived)
            for k, (slot, arrived) in enumerate(zip(step.y_slots, dy, strict=True))
            if k not in self.needs.unused
        ]
        for slot, arrived in [*arriving, *zip(step.state_slots, after, strict=True)]:
            if arrived is not None and slot in moving:
                self._give(slot, self.value(arrived))
        found: dict[tuple[str, int], int] = {}
        totals: dict[int, int] = {}
        for slot in range(self.count - 1, -1, -1):
            if slot not in moving:
                continue
            if slot in self.pieces:
                self._assemble(slot)
            gradient = self.gradients.pop(slot, None)
            if gradient is None:
                continue
            if self.needs.totals and slot in step.state_slots:
                totals[slot] = self._computed(gradient)
            row = trace.rows[slot]
            if row.op in ("x", "state"):
                found[row.op, row.detail] = self._computed(gradient)
            elif row.op == "capture":
                self.sums.append((gradient._data.slot, row.detail))
            else:
                self._through(slot, gradient, moving)
        return Derivative(
            dy,
            after,
            tuple(found.get(("x", k)) for k in range(len(self.needs.x))),
            tuple(found.get(("state", k)) for k in range(len(carried))),
            tuple(self.outer),
            tuple(self.sums),
            tuple(self.tracer.numbers[len(step.numbers) :]),
            tuple(map(totals.get, step.state_slots)) if self.needs.totals else (),
        )

    def _moving(self) -> tuple[set[int], list[bool]]:
        """The rows that depend on what wants a gradient; a state does if its next value does."""
        carried = list(self.needs.state)
        rows, frozen = self.trace.rows, self.trace.frozen
        while True:
            wanted = {"x": self.needs.x, "state": carried}
            captured = self.needs.captured
            moving: set[int] = set()
            for slot, row in enumerate(rows[: self.count]):
                if row.op in wanted:
                    moves = wanted[row.op][row.detail]
                elif row.op in ("capture", "matrix"):
                    moves = captured[row.detail]
                else:
                    moves = slot not in frozen and not moving.isdisjoint(row.inputs)
                if moves:
                    moving.add(slot)
            again = [
                c or slot in moving for c, slot in zip(carried, self.step.state_slots, strict=True)
            ]
            if again == carried:
                return moving, carried
            carried = again

    def value(self, slot: int) -> Tensor:
        trace = self.trace
        return stand_in(self.tracer, slot, (trace.B, trace.widths[slot]), trace.dtype)

    def _arriving(self, op: str, k: int, slot: int) -> int:
        trace = self.trace
        made = trace.add(op, (), k, trace.widths[slot], trace.single[slot])
        trace.like[made] = slot
        return made

    def _row(self, op: str, inputs: tuple[int, ...], detail: Any, like: int) -> Tensor:
        trace = self.trace
        slot = trace.add(op, inputs, detail, trace.widths[like], trace.single[like])
        trace.like[slot] = like
        return self.value(slot)

    def _computed(self, x: Tensor) -> int:
        slot: int = x._data.slot
        return slot if self.trace.rows[slot].op in COMPUTED else self.trace.copy_of(slot)

    def _give(self, slot: int, gradient: Tensor) -> None:
        before = self.gradients.get(slot)
        self.gradients[slot] = gradient if before is None else before + gradient

    def _through(self, slot: int, g: Tensor, moving: set[int]) -> None:
        """Give the inputs of a row their parts of its gradient."""
        op, inputs, detail = self.trace.rows[slot]
        if op in RULES:
            rule = RULES[op]
            saved = [self.value(k) for k in (*inputs, slot)] if rule.value_count else []
            if op == "where":
                saved[0]._data.dtype = np.dtype(bool)
            for k, source in enumerate(inputs):
                if source not in moving:
                    continue
                part = rule.tensor_vjps[k](g, *saved)
                if detail[k]:  # it was repeated along the last axis
                    part = sum(part, 1, keepdims=True)
                self._give(source, part)
            return
        source = inputs[0]
        x = self.value(source)
        if op.endswith("_transposed"):  # a choice gone back through
            forth = op.removesuffix("_transposed")
            self._give(source, self._row(forth, (g._data.slot, inputs[1]), None, source))
        elif op in ("matmul", "matmul_lines", *CHOICES):
            matrix = inputs[1]
            if source in moving:
                back = self._row(f"{op}_transposed", (g._data.slot, matrix), None, source)
                self._give(source, back)
            if matrix in moving:
                self.outer.append((source, g._data.slot, self.trace.rows[matrix].detail))
        elif op == "slice":
            self.pieces.setdefault(source, {})[slot] = g
        elif op == "concat":
            for k, part in enumerate(inputs):
                if part in moving:
                    cut = ("after", inputs[:k])
                    self._give(part, self._row("slice", (g._data.slot,), cut, part))
        elif op == "sum":
            self._give(source, self._row("broadcast", (g._data.slot,), (True,), source))
        elif op == "broadcast":
            self._give(source, sum(g, 1, keepdims=True))
        elif op in ("max", "min"):  # equal ones share the gradient equally
            tied = x == self.value(slot)
            count = maximum(sum(tied * 1.0, 1, keepdims=True), 1.0)  # none where one is NaN
            self._give(source, tied * (g / count))
        elif op == "copy":
            self._give(source, g)
        else:
            assert op in COMPARISONS, op

    def _assemble(self, slot: int) -> None:
        """The gradients of the slices of a row as one gradient of the row, zero elsewhere."""
        trace, pieces = self.trace, self.pieces.pop(slot)
        cuts = trace.cuts[slot]
        if slot not in trace.gaps:  # one follows the other, from end to end
            parts = [pieces[k] if k in pieces else self._zeros(k) for k in cuts]
            self._joined(slot, parts, tuple((("start", k),) for k in cuts))
            return
        for k, (before, after) in zip(cuts, trace.gaps[slot], strict=True):
            if k in pieces:
                parts = [self._zeros(before), pieces[k], self._zeros(after)]
                self._joined(slot, parts, ((), (("start", k),), (("start", k), ("width", k))))

    def _joined(self, slot: int, parts: list[Tensor], places: tuple[Any, ...]) -> None:
        inputs = tuple(part._data.slot for part in parts)
        self._give(slot, self._row("assemble", inputs, places, slot))

    def _zeros(self, like: int) -> Tensor:
        zero = self.tracer.number(0.0)
        return self._row("broadcast", (zero,), (True,), like)
