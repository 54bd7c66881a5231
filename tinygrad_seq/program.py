"""What is to be done: rows, where their derivative stands, and a program for each direction.

``tracing.py`` and ``derive.py`` write rows, ``plan.py`` makes a plan of them, and the writers and
layouts of the kernels read it. A plan has no sizes and no arrays, and it prints.
Imports nothing of this package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

REDUCTIONS = ("sum", "max", "min")
# What reads all of a row at once: a product, or a choice of units, a product with ones and zeros,
# in runs of units that follow one another, or in runs of one unit each.
CHOICES = ("take", "spread")
_PRODUCTS = [f"{op}{back}" for op in ("matmul", *CHOICES) for back in ("", "_transposed")]
# Products of lines write whole vectors, and what goes beyond a line the next one writes over. None
# of them is added to another, where it would stay.
LINES = ("matmul_lines", "matmul_lines_transposed")
PRODUCTS = (*_PRODUCTS, *(f"add_{op}" for op in _PRODUCTS), *LINES)
JOINTS = ("concat", "assemble")


class Row(NamedTuple):
    """One line of a step tape: what happens in a step, whatever the sizes and numbers.

    ============================================  ==================================================
    op                                            detail
    ============================================  ==================================================
    x, state, capture, matrix, units, number, dy  which one, counted from 0
    dstate                                        the same
    a rule's name, a comparison, copy, broadcast  for each input whether it is repeated along a row
    uniform                                       ()
    matmul, matmul_transposed, and with add_      None; inputs are rows, matrix and, for add_, what
                                                  the product is added to
    matmul_lines, matmul_lines_transposed         None; a row is lines of as many units as the
                                                  matrix has rows, and each line is multiplied; or
                                                  they are of groups, each with a matrix of its
                                                  own, one under the other in the tensor
    take, spread, and as above                    None; the same with the first units of runs for
                                                  a matrix, see ``recurrence/choices.py``
    slice                                         None: ``Trace.starts`` says where it begins;
                                                  ("from", slot): where that slice does;
                                                  ("after", slots): after so many widths
    concat                                        None
    assemble                                      for each input the offset where it stands
    gap                                           0 or 1: as wide as what is before or after a slice
    sum, max, min, detach                         None
    ============================================  ==================================================
    """

    op: str
    inputs: tuple[int, ...] = ()  # the rows it takes
    detail: Any = None


class Derivative(NamedTuple):
    """Where the gradients stand among the rows."""

    dy: tuple[int, ...]  # rows where those of the outputs arrive
    after: tuple[int | None, ...]  # and those of the state after the step, None where not needed
    dx: tuple[int | None, ...]
    before: tuple[int | None, ...]  # of the state before the step
    # (a, g, k): captured matrix k gets aᵀ g; of rows that are lines, summed over the lines, and the
    # matrix of each group over the lines of that group
    outer: tuple[tuple[int, int, int], ...]
    sums: tuple[tuple[int, int], ...]  # (g, k): captured tensor k gets g, summed over rows
    numbers: tuple[float, ...]  # which it adds to the cell's own
    totals: tuple[int | None, ...] = ()  # of the states that a step computes, if asked for


# Of each elementwise operation the names of its inputs and the text of its value.
Rules = Mapping[str, tuple[Sequence[str], str]]


# Programs ------------------------------------------------------------------------------------

# An offset in elements is a sum of terms: ("width", slot) and ("start", slot) are run-time sizes.
Offset = tuple[tuple[str, int], ...]


class Place(NamedTuple):
    """Where a value can be read: a kind of memory, and which one of that kind."""

    # x, dy, state, capture, kept, grads, scratch; after, the state after the step; dstate, the
    # gradient of that; before, the gradient of the state before the step
    kind: str
    which: int


class Target(NamedTuple):
    """Where a computed value is written: a kind of memory, which one, how far into a row."""

    kind: str  # after, before, kept, grads, scratch; y, dx, total, sum
    which: int
    offset: Offset = ()


@dataclass
class Product:
    """A matrix product: rows of ``a`` times a packed matrix, written or added to a place.

    With ``lines`` each line of a row is multiplied, by the matrix of its group if each has one.
    Or it is a choice of units in runs, take or spread: then the tensor has the first of each.
    """

    slot: int
    a: int
    matrix: int  # the number of the captured tensor
    transposed: bool
    into: Place  # scratch, or the gradient of a state
    adds: bool  # to what stands there
    choice: str = ""
    lines: bool = False


@dataclass
class Pass:
    """One way along a row: the values of one for all, then loops over units."""

    singles: list[int] = field(default_factory=list)
    loops: dict[int, list[int]] = field(default_factory=dict)  # width class: slots


@dataclass
class Rowwise:
    """Passes over a row, for each row."""

    passes: list[Pass]


Stage = Product | Rowwise


class Scratch(NamedTuple):
    """A buffer that each task, a share of the rows, has for itself."""

    slot: int
    block: bool  # for all steps of a block, or for one step
    panels: bool  # filled by a product: the width is rounded up to whole panels


@dataclass
class Program:
    """One direction: sections of stages, and where everything is."""

    direction: str
    sections: dict[str, list[Stage]]
    inputs: dict[int, tuple[int, ...]]  # of each row that is computed, copies put in
    places: dict[int, Place]
    targets: dict[int, list[Target]]
    scratch: list[Scratch]
    gathered: list[int]  # leaves (x, dy) copied into scratch at the start of a block
    matrices: list[tuple[int, bool]]  # packed before: (captured tensor, transposed)

    def products(self, *sections: str) -> list[Product]:
        """The products of these sections, of all if none is named; choices among them."""
        stages = [stage for name in sections or self.sections for stage in self.sections[name]]
        return [stage for stage in stages if isinstance(stage, Product)]


@dataclass
class Plan:
    """What is done when, and where values are kept; ``recurrence/plan.py`` makes it."""

    name: str
    dtype: str
    rows: list[Row]
    forward_count: int  # of these, how many are the cell's own
    classes: list[int]  # for each row the row that gives its width
    single: list[bool]  # whether that is 1 whatever the sizes
    numbers: int  # how many numbers are the cell's own
    constants: list[float]  # those that stand in derivatives, counted on from there
    y_slots: tuple[int, ...]
    state_slots: tuple[int, ...]
    forward: Program
    backward: Program | None
    kept: list[int]  # forward values kept for the way back, at each step
    states_kept: set[int]  # states whose value before each step is kept too
    grads: list[int]  # what the large products after each segment of the loop are made of
    derivative: Derivative | None
    wanted_states: tuple[bool, ...]  # initial states that want a gradient
    sums_later: tuple[tuple[int, int], ...] = ()  # (g, k) that are summed after each segment
    divisions: Mapping[str, str] = field(default_factory=dict)  # on a GPU, of each direction
    captured: tuple[str, ...] = ()  # what the cell closes over, in words

    def program(self, direction: str) -> Program:
        """That of one direction, forward or backward."""
        program = self.forward if direction == "forward" else self.backward
        assert program is not None
        return program

    @property
    def gradients(self) -> Derivative:
        """Where they stand among the rows; of a plan with a way back."""
        assert self.derivative is not None
        return self.derivative

    def sums_on_the_way(self) -> list[int]:
        """The captures whose gradients, or shares of them, are added up step by step."""
        assert self.backward is not None
        targets = [t for each in self.backward.targets.values() for t in each]
        return sorted({t.which for t in targets if t.kind == "sum"})

    def __str__(self) -> str:
        return describe(self)


# As text -------------------------------------------------------------------------------------


def describe(plan: Plan) -> str:
    """The plan, to be read."""
    lines = [f"{plan.name}: {plan.forward_count} rows, computed in {plan.dtype}", "a step:"]
    lines += [f"  {row_text(plan, slot)}" for slot in range(plan.forward_count)]
    if plan.captured:
        lines.append(f"closed over: {', '.join(plan.captured)}")
    for program in (plan.forward, plan.backward):
        if program is None:
            continue
        lines.append(f"{program.direction}:")
        if program.direction == "backward":
            arriving = [s for s, row in enumerate(plan.rows) if row.op in ("dy", "dstate")]
            lines.append(f"  arriving: {', '.join(row_text(plan, slot) for slot in arriving)}")
        packed = [f"matrix {k}{' transposed' * transposed}" for k, transposed in program.matrices]
        if packed:
            lines.append(f"  packed before: {', '.join(packed)}")
        for name, stages in program.sections.items():
            if not stages:
                continue
            what = {
                "early": "before the loop, a block of steps at once",
                "loop": "in the loop",
                "late": "after the loop, a block of steps at once",
            }[name]
            lines.append(f"  {what}:")
            for stage in stages:
                lines += [f"    {line}" for line in _describe_stage(plan, program, stage)]
        joints = [slot for slot in sorted(program.inputs) if plan.rows[slot].op in JOINTS]
        if joints:
            shown = [row_text(plan, slot, program.inputs[slot]) for slot in joints]
            lines.append(f"  parts written side by side: {', '.join(shown)}")
        for what, block in (("a block of steps", True), ("one step", False)):
            slots = [f"%{each.slot}" for each in program.scratch if each.block == block]
            if slots:
                lines.append(f"  buffers of each task, for {what}: {', '.join(slots)}")
    kept = [row_text(plan, k) for k in plan.kept]
    kept += [f"state {k}" for k in sorted(plan.states_kept)]
    lines.append(f"kept at each step: {', '.join(kept) or 'nothing'}")
    if plan.grads:
        shared = ", ".join(f"%{slot}" for slot in plan.grads)
        lines.append(f"buffers for a segment of steps, going backward: {shared}")
    if plan.derivative is not None:
        rows = plan.rows[: plan.forward_count]
        of_lines = [(r.inputs[0], rows[r.inputs[1]].detail) for r in rows if r.op in LINES]
        for a, g, k in plan.derivative.outer:
            how = ", line by line" if (a, k) in of_lines else ""
            lines.append(f"after each segment: gradient of matrix {k} += %{a}ᵀ %{g}{how}")
        for g, k in plan.sums_later:
            lines.append(f"after each segment: gradient of capture {k} += Σ %{g}")
        for g, k in plan.derivative.sums:
            if (g, k) not in plan.sums_later:
                lines.append(f"summed on the way: gradient of capture {k} = Σ %{g}")
    lines += [f"on the GPU, {direction}: {text}" for direction, text in plan.divisions.items()]
    return "\n".join(lines)


def _describe_stage(plan: Plan, program: Program, stage: Stage) -> list[str]:
    def described(slot: int) -> str:
        return row_text(plan, slot, program.inputs.get(slot))

    if isinstance(stage, Product):
        into = "" if stage.into.kind == "scratch" else f"  -> {stage.into.kind} {stage.into.which}"
        return [f"{'choice' if stage.choice else 'product'}: {described(stage.slot)}{into}"]
    lines: list[str] = []
    shown = set(program.places)

    def show_cut(slot: int) -> None:
        """Slices are read where they stand, a slice of a slice too."""
        if plan.rows[slot].op == "slice" and slot not in shown:
            shown.add(slot)
            show_cut(program.inputs[slot][0])
            detail = plan.rows[slot].detail
            where = f", where %{detail[1]} begins" if detail and detail[0] == "from" else ""
            lines.append(f"  {described(slot)}{where}")

    for k, each in enumerate(stage.passes):
        slots = [*each.singles, *(slot for loop in each.loops.values() for slot in loop)]
        lines.append(f"pass {k + 1}:")
        for slot in slots:
            for read in program.inputs[slot]:
                show_cut(read)
            stores = [f"{t.kind} {t.which}" for t in program.targets.get(slot, [])]
            arrow = f"  -> {', '.join(stores)}" if stores else ""
            lines.append(f"  {described(slot)}{arrow}")
    return lines


def begins(plan: Plan, slot: int) -> Offset:
    """Where a slice begins in the row that it is cut from, as an offset."""
    detail = plan.rows[slot].detail
    if detail is None or detail[0] == "from":
        return (("start", slot if detail is None else detail[1]),)
    return tuple(("width", before) for before in detail[1])


def row_text(plan: Plan, slot: int, inputs: Sequence[int] | None = None) -> str:
    """A row as the tape would show it."""
    row = plan.rows[slot]
    if row.op in ("x", "state", "capture", "matrix", "units", "dy", "dstate", "number"):
        return f"%{slot} = {row.op} {row.detail}"
    shown = []
    for k in row.inputs if inputs is None else inputs:
        source = plan.rows[k]
        if source.op == "number" and source.detail >= plan.numbers:
            shown.append(f"{plan.constants[source.detail - plan.numbers]:g}")
        elif source.op in ("number", "matrix", "units"):
            shown.append(f"{source.op} {source.detail}")
        else:
            shown.append(f"%{k}")
    return f"%{slot} = {row.op}({', '.join(shown)})"
