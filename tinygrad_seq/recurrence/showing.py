"""What a scan would run: its plan and its source. Imports its own room and the kernels' sources."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tinygrad_seq import devices
from tinygrad_seq.recurrence.arguments import Cell
from tinygrad_seq.recurrence.compiled import prepare
from tinygrad_seq.recurrence.naming import Names, Widths, captured_text
from tinygrad_seq.recurrence.trace import BESIDE, UNITS

if TYPE_CHECKING:
    from tinygrad_seq.program import Plan


class KernelSource(NamedTuple):
    """Generated source, and the file that it was compiled from."""

    text: str
    path: Path

    def __str__(self) -> str:
        return self.text


def kernel_source(
    cell: Cell, xs: Any, state: Any = None, *, backward: bool = False
) -> KernelSource:
    """The source that ``tgs.scan`` compiles for a cell, and the path of the file.

    ``backward`` asks for the way back. Gradients are those that a scan of the same arguments would
    give; if nothing requires one, those of the inputs and of all that the cell closes over. The
    line of the step tape stands above each statement. For inputs on a GPU it is the source for
    their sizes.
    """
    call, needs = prepare(cell, xs, state)
    runner = call.runner(needs)
    direction = "backward" if backward else "forward"
    on_host = call.xs[0].device == devices.CPU
    return KernelSource(*runner.file(direction, *(() if on_host else (call.arrays(),))))


def explain(cell: Cell, xs: Any, state: Any = None) -> Plan:
    """The plan of ``tgs.scan`` for a cell; print it.

    It shows what is computed before the loop, in it and after it, for both directions, what the
    cell closes over, what is kept at each step, and where gradients are added up; for inputs on a
    GPU also how the batch and a step are divided among its blocks. Gradients as in
    ``kernel_source``.
    """
    names = Names(cell)
    with names:
        call, needs = prepare(cell, xs, state)
    trace = call.step.trace
    names.values(trace)
    captured = tuple(
        f"{ {BESIDE: 'capture', UNITS: 'units'}.get(role, 'matrix') } {k} is "
        f"{captured_text(k, call.step, names.tensors, Widths(0, 0))}"
        for k, role in enumerate(trace.roles)
    )
    runner = call.runner(needs)
    plan: Plan = replace(runner.plan, captured=captured)
    if call.xs[0].device == devices.CPU:
        return plan
    return replace(plan, divisions=runner.divisions(call.arrays()))
