"""The plan: how the rows of a step, and of its derivative, are laid out in time and memory.

A program (one for each direction) has three sections. What needs no state is done *early*, for a
block of steps at once, if it is a product; what the next state needs stands in the *loop*; products
that nobody in the loop reads come *late*, again for a block of steps. In a section, products stand
between passes: a pass goes over the units of a row once and computes everything that can be had in
one go. A value stays in registers unless somebody reads it from elsewhere.

Of the forward pass only what the way back cannot compute from the rest is kept, step by step.
Gradients of matrices are no part of the loop: both sides of each product stand in memory for a
segment of steps, of which one large product is made, added to those of the segments before.

A plan has no sizes and no tensors. ``print(plan)`` shows it. Imports trace, derive, and text for
how a row is printed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from tinygrad_seq.kernels.text import row_text
from tinygrad_seq.recurrence.derive import Derivative
from tinygrad_seq.recurrence.trace import COMPUTED, Row, Step, Trace, copied

REDUCTIONS = ("sum", "max", "min")
PRODUCTS = ("matmul", "matmul_transposed", "add_matmul", "add_matmul_transposed")
JOINTS = ("concat", "assemble")

# An offset in elements is a sum of terms: ("width", slot) and ("start", slot) are run-time sizes.
Offset = tuple[tuple[str, int], ...]


class Place(NamedTuple):
    """Where a value can be read: a kind of memory, which one of that kind, how far into a row."""

    # x, dy, state, capture, kept, grads, scratch; after, the state after the step; dstate, the
    # gradient of that; before, the gradient of the state before the step
    kind: str
    which: int
    offset: Offset = ()


class Target(NamedTuple):
    """Where a computed value is written."""

    kind: str  # after, before, kept, grads, scratch; y, dx, sum
    which: int
    offset: Offset = ()


@dataclass
class Product:
    """A matrix product: rows of ``a`` times a packed matrix, written or added to a place."""

    slot: int
    a: int
    matrix: int  # the number of the captured tensor
    transposed: bool
    into: Place  # scratch, or the gradient of a state
    adds: bool  # to what stands there


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


@dataclass
class Plan:
    """What is done when; see the top of the file."""

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

    def sums_on_the_way(self) -> list[int]:
        """The captures whose gradients, or shares of them, are added up step by step."""
        assert self.backward is not None
        targets = [t for each in self.backward.targets.values() for t in each]
        return sorted({t.which for t in targets if t.kind == "sum"})

    def __str__(self) -> str:
        return describe(self)


def make_plan(
    step: Step,
    derivative: Derivative | None,
    name: str,
    wanted_states: tuple[bool, ...] = (),
    sums_apart: bool = False,
) -> Plan:
    """Lay out a traced step and its derivative.

    With ``sums_apart`` sums along a row stand outside the loop if they can, as products do: on a
    GPU all blocks of a row wait for one another before one.
    """
    trace, forward_count = step.trace, step.length
    for slot, row in enumerate(trace.rows[:forward_count]):
        if row.op == "state":  # which keeps its shape from step to step
            trace.like.setdefault(step.state_slots[row.detail], slot)
    cells_numbers = sum(row.op == "number" for row in trace.rows[:forward_count])
    kept: list[int] = []
    grads: list[int] = []
    later: tuple[tuple[int, int], ...] = ()
    backward = None
    if derivative is not None:
        kept = _to_keep(step, derivative, forward_count)
        grads = _to_store(trace, derivative)
        if sums_apart:  # what is stored of all steps can be summed from there
            later = tuple(each for each in derivative.sums if each[0] in grads)
        backward, more = _backward(step, derivative, kept, grads, later, sums_apart)
        grads = sorted({*grads, *(g for g, _ in more)})
        later += more
    forward = _forward(step, kept, sums_apart)
    return Plan(
        name=name,
        dtype=str(trace.dtype),
        rows=list(trace.rows),
        forward_count=forward_count,
        classes=width_classes(trace),
        single=list(trace.single),
        numbers=cells_numbers,
        constants=list(trace.numbers[cells_numbers:]),
        y_slots=step.y_slots,
        state_slots=step.state_slots,
        forward=forward,
        backward=backward,
        derivative=derivative,
        wanted_states=wanted_states,
        kept=kept,
        states_kept=_states_to_keep(trace, derivative, backward),
        grads=grads,
        sums_later=later,
    )


def _states_to_keep(
    trace: Trace, derivative: Derivative | None, backward: Program | None
) -> set[int]:
    if derivative is None or backward is None:
        return set()
    found = {trace.rows[a].detail for a, _, _ in derivative.outer if trace.rows[a].op == "state"}
    for inputs in backward.inputs.values():
        for slot in inputs:
            while trace.rows[slot].op in ("slice", "detach") and slot not in backward.places:
                slot = backward.inputs.get(slot, trace.rows[slot].inputs)[0]
            place = backward.places.get(slot)
            if place is not None and place.kind in ("state", "after"):
                found.add(place.which)
    return found


def width_classes(trace: Trace) -> list[int]:
    """For each row the first one that has its width whatever the sizes."""
    parent = list(range(len(trace.rows)))

    def root(slot: int) -> int:
        while parent[slot] != slot:
            slot = parent[slot]
        return slot

    def join(a: int, b: int) -> None:
        a, b = root(a), root(b)
        parent[max(a, b)] = min(a, b)

    ones = [slot for slot, single in enumerate(trace.single) if single]
    for slot in ones[1:]:
        join(ones[0], slot)
    for slot, row in enumerate(trace.rows):
        if slot in trace.like:
            join(slot, trace.like[slot])
        if row.op == "detach":
            join(slot, row.inputs[0])
        elif row.op in COMPUTED and row.op != "broadcast":
            for source, repeated in zip(row.inputs, row.detail, strict=True):
                if not repeated:
                    join(slot, source)
    return [root(slot) for slot in range(len(parent))]


# What to keep --------------------------------------------------------------------------------


def _to_keep(step: Step, derivative: Derivative, count: int) -> list[int]:
    """The forward values to keep. What can be computed elementwise from the rest is not kept."""
    rows = step.trace.rows
    wanted = [slot for slot in (*derivative.dx, *derivative.before) if slot is not None]
    wanted += [slot for a, g, _ in derivative.outer for slot in (a, g)]
    wanted += [g for g, _ in derivative.sums]
    needed: set[int] = set()  # what the rows of the derivative read
    while wanted:
        slot = wanted.pop()
        if slot not in needed:
            needed.add(slot)
            if slot >= count:
                wanted.extend(rows[slot].inputs)
    there: set[int] = set(step.state_slots)  # ``_states_to_keep`` sees to these
    kept = []
    for slot, row in enumerate(rows[:count]):
        elementwise = row.op in COMPUTED or row.op in ("slice", "detach")
        if row.op in ("x", "state", "capture", "matrix", "number") or (
            elementwise and there.issuperset(row.inputs)
        ):
            there.add(slot)
        elif slot in needed and slot not in there:
            kept.append(slot)
            there.add(slot)
    return kept


def _to_store(trace: Trace, derivative: Derivative) -> list[int]:
    """What the backward program writes for a segment: both sides of the large products."""
    stored = set()
    for a, g, _ in derivative.outer:
        stored.add(g)
        if trace.rows[a].op not in ("x", "state"):
            stored.add(a)
    return sorted(stored)


# One direction -------------------------------------------------------------------------------


def _forward(step: Step, kept: list[int], sums_apart: bool) -> Program:
    build = _Builder(step.trace, "forward", "state", sums_apart)
    for slot, row in enumerate(step.trace.rows):
        if row.op in ("x", "state", "capture"):
            build.leaves[slot] = Place(row.op, row.detail)
    for k, slot in enumerate(step.state_slots):
        build.write(slot, Target("after", k))
    for slot in kept:
        build.write(slot, Target("kept", slot))
    for k, slot in enumerate(step.y_slots):
        build.write(slot, Target("y", k))
    return build.program()


def _backward(
    step: Step,
    derivative: Derivative,
    kept: list[int],
    grads: list[int],
    sums_later: tuple[tuple[int, int], ...],
    sums_apart: bool,
) -> tuple[Program, tuple[tuple[int, int], ...]]:
    """The program, and what else is stored of all steps to be summed later."""
    build = _Builder(step.trace, "backward", "dstate", sums_apart)
    for slot, row in enumerate(step.trace.rows):
        if row.op in ("x", "state", "capture", "dy", "dstate"):
            build.leaves[slot] = Place(row.op, row.detail)
    for k, slot in enumerate(step.state_slots):
        build.leaves.setdefault(slot, Place("after", k))
    for slot in kept:
        build.leaves[slot] = Place("kept", slot)
    for slot in grads:
        build.write(slot, Target("grads", slot))
    for gradient, k in derivative.sums:
        if (gradient, k) not in sums_later:
            build.write(gradient, Target("sum", k))
    for k, dx in enumerate(derivative.dx):
        if dx is not None:
            build.write(dx, Target("dx", k))
    for k, state in enumerate(derivative.before):
        if state is not None and derivative.after[k] is not None:
            build.write(state, Target("before", k))
    return build.program(), tuple(build.later)


class _Builder:
    """From the rows that are wanted to sections, stages and passes.

    First sums of products become one, and what is only read in slices is computed slice by slice.
    Everything gets its section. Copies are put in, so that states are read and written in the loop
    alone, whatever is written is computed, whatever a product reads is in memory, and whatever is
    joined is written part by part. Then everything gets its stage and its pass, and what is read in
    another pass than its own gets memory.
    """

    def __init__(self, trace: Trace, direction: str, carried: str, sums_apart: bool) -> None:
        self.trace, self.direction, self.carried = trace, direction, carried
        self.sums_apart = sums_apart
        self.later: list[tuple[int, int]] = []  # sums of what is not computed in the loop
        self.apart = (*PRODUCTS, *(REDUCTIONS if sums_apart else ()))  # better outside the loop
        self.leaves: dict[int, Place] = {}  # what is in memory before
        self.outputs: list[tuple[int, Target]] = []
        self.inputs: dict[int, tuple[int, ...]] = {}  # of each row that is computed
        self.rank: dict[int, float] = {}  # where a row stands; copies stand between others
        self.targets: dict[int, list[Target]] = {}
        self.places: dict[int, Place] = {}
        self.scratch: dict[int, Scratch] = {}
        self.gathered: list[int] = []
        self.section: dict[int, str] = {}
        # The slices of a row, where they follow one another from end to end.
        self.cuts = {k: set(cut) for k, cut in trace.cuts.items() if k not in trace.gaps}
        self.slices: dict[tuple[int, tuple[object, ...], int], int] = {}  # see ``_cut``

    def op(self, slot: int) -> str:
        return self.trace.rows[slot].op

    def write(self, slot: int, target: Target) -> None:
        self.outputs.append((slot, target))

    def program(self) -> Program:
        self._collect([slot for slot, _ in self.outputs])
        self._add_products()
        self._join_after()
        self._cut_before()
        self._put_in_sections()
        self._hold_states()
        self._write_outputs()
        self._feed_products()
        self._fill_joints()
        self.classes = width_classes(self.trace)
        sections = {name: self._stages(name) for name in ("early", "loop", "late")}
        products = [s for stages in sections.values() for s in stages if isinstance(s, Product)]
        return Program(
            direction=self.direction,
            sections=sections,
            inputs=self.inputs,
            places={**self.leaves, **self.places},
            targets=self.targets,
            scratch=self._finished_buffers(),
            gathered=self.gathered,
            matrices=list(dict.fromkeys((s.matrix, s.transposed) for s in products)),
        )

    # The rows

    def source(self, slot: int) -> int:
        """A row, looked through ``detach``, which computes nothing."""
        while self.op(slot) == "detach":
            slot = self.trace.rows[slot].inputs[0]
        return slot

    def base(self, slot: int) -> int:
        """The row that a slice is cut from, or the row itself."""
        while self.op(slot) == "slice" and slot not in self.leaves:
            slot = self.source(self.inputs[slot][0])
        return slot

    def bases(self, slot: int) -> list[int]:
        return [self.base(k) for k in self.inputs.get(slot, ())]

    def _collect(self, roots: Iterable[int]) -> None:
        """Everything that must be computed; slices compute nothing, but are looked through."""
        stack = [self.source(slot) for slot in roots]
        while stack:
            slot = stack.pop()
            if slot in self.inputs or slot in self.leaves or self.op(slot) in ("number", "matrix"):
                continue
            self.inputs[slot] = tuple(map(self.source, self.trace.rows[slot].inputs))
            self.rank[slot] = slot
            stack.extend(self.inputs[slot])

    def order(self) -> list[int]:
        return sorted(self.inputs, key=self.rank.__getitem__)

    def _copy(self, slot: int, section: str, rank: float) -> int:
        made = copied(self.trace, slot)
        self.inputs[made], self.rank[made], self.section[made] = (slot,), rank, section
        return made

    # Rows in other forms

    def _replace(self, old: int, new: int) -> None:
        """Let everybody read ``new`` where they read ``old``, which is gone."""
        del self.inputs[old]
        for slot, inputs in self.inputs.items():
            if old in inputs:
                self.inputs[slot] = tuple([new if k == old else k for k in inputs])
        self.outputs = [
            (new if self.source(slot) == old else slot, target) for slot, target in self.outputs
        ]

    def _new(self, op: str, inputs: tuple[int, ...], detail: object, like: int) -> int:
        trace = self.trace
        made = trace.add(op, inputs, detail, trace.widths[like], trace.single[like])
        trace.like[made] = like
        self.inputs[made], self.rank[made] = inputs, self.rank.get(like, like)
        return made

    def _moved(self) -> set[int]:
        """What depends on the state that is carried."""
        moved = {slot for slot in self.leaves if self.op(slot) == self.carried}
        for slot in self.order():
            if not moved.isdisjoint(self.inputs[slot]):
                moved.add(slot)
        return moved

    def _add_products(self) -> None:
        """The sum of two products that nobody else reads: the second goes on from the first."""
        for slot in self.order():
            if self.op(slot) != "add" or any(self.trace.rows[slot].detail):
                continue
            moved, read = self._moved(), [slot for slot, _ in self.outputs]
            terms = sorted(self.inputs[slot], key=lambda k: (k in moved, self.rank.get(k, 0)))
            alone = [
                self.op(k) in PRODUCTS
                and k not in read
                and [r for r in self.inputs if k in self.inputs[r]] == [slot]
                for k in terms
            ]
            first, second = terms
            if not all(alone) or first == second or len(self.inputs[second]) > 2:
                continue
            operand, matrix = self.inputs.pop(second)
            op = f"add_{self.op(second)}"
            self._replace(slot, self._new(op, (operand, matrix, first), None, slot))

    def _cut(self, source: int, begins: tuple[object, ...], like: int, reader: int) -> int:
        """A slice of a row, as wide as another, for a reader; one for all that want the same."""
        width = like  # what it is as wide as in the end: others may begin there and end elsewhere
        while width in self.trace.like:
            width = self.trace.like[width]
        made = self.slices.get((source, begins, width))
        if made is None or made not in self.inputs:
            made = self.slices[source, begins, width] = self._new("slice", (source,), begins, like)
            self.rank[made] = self.rank[reader]
            self.cuts.setdefault(source, set()).add(made)
        # before its readers, for it may be computed there in turn
        self.rank[made] = min(self.rank[made], self.rank[reader] - 1e-6)
        return made

    def _join_after(self) -> None:
        """What is computed of a joint is computed of its parts, and joined after.

        A part that is there early need not wait for the others: of what the GRU's gates pass on,
        one goes through the next product and the other does not.
        """
        trace = self.trace
        waiting = [slot for slot in self.order() if self.op(slot) in JOINTS]
        while waiting:
            slot = waiting.pop()
            if slot not in self.inputs:
                continue
            begins, parts = self._begins(slot), self.inputs[slot]
            if not begins or not self._goes_on_in_parts(slot):
                continue
            for reader in self._readers(slot):
                op, repeated = self.op(reader), trace.rows[reader].detail
                made = []
                for part, where in zip(parts, begins, strict=True):
                    inputs = []
                    for source, once in zip(self.inputs[reader], repeated, strict=True):
                        if source == slot:
                            inputs.append(part)
                        else:
                            cut = source if once else self._cut(source, where, part, reader)
                            inputs.append(cut)
                    made.append(self._new(op, tuple(inputs), repeated, part))
                    self.rank[made[-1]] = self.rank[reader]
                joint = self._new(self.op(slot), tuple(made), trace.rows[slot].detail, reader)
                self._replace(reader, joint)
                waiting.append(joint)
            del self.inputs[slot]

    def _begins(self, slot: int) -> list[tuple[object, ...]]:
        """Where the parts of a joint begin, as slices say it; none if they leave a gap."""
        row, parts = self.trace.rows[slot], self.inputs[slot]
        if row.op == "concat":
            return [("after", parts[:k]) for k in range(len(parts))]
        if all(len(offset) == 1 and offset[0][0] == "start" for offset in row.detail):
            return [("from", offset[0][1]) for offset in row.detail]
        return []

    def _readers(self, slot: int) -> list[int]:
        return [k for k in self.order() if slot in self.inputs[k]]

    def _goes_on_in_parts(self, joint: int) -> bool:
        """Whether rows are computed along a joint, it is read by these alone, they end in products,
        in joints and in what is stored or summed, and all else that they read may be read in parts.
        """
        along: list[int] = []
        waiting = [joint]
        while waiting:
            slot = waiting.pop()
            for reader in self._readers(slot):
                row = self.trace.rows[reader]
                if row.op in JOINTS or row.op in PRODUCTS:
                    continue
                if row.op not in COMPUTED or row.op == "uniform":
                    return False
                if (slot, True) in zip(self.inputs[reader], row.detail, strict=True):
                    return False
                if reader not in along:
                    along.append(reader)
                    waiting.append(reader)
        written = [(self.source(k), target.kind) for k, target in self.outputs]
        return (
            bool(along)
            and set(along).issuperset(self._readers(joint))
            and all(k != joint for k, _ in written)
            and all(kind in ("grads", "sum") for k, kind in written if k in along)
            and all(self._reads_in_parts(k, {joint, *along}) for k in along)
        )

    def _reads_in_parts(self, slot: int, along: set[int]) -> bool:
        """Whether what a row reads is there before, or computed for it and for those along."""
        for k, once in zip(self.inputs[slot], self.trace.rows[slot].detail, strict=True):
            if once or k in along or self.base(k) in self.leaves:
                continue
            if self.op(k) not in COMPUTED or not along.issuperset(self._readers(k)):
                return False
            if not self._reads_in_parts(k, {k, *along}):
                return False
        return True

    def _cut_before(self) -> None:
        """What is read only in slices that follow one another is computed slice by slice."""
        trace, cuts = self.trace, self.cuts
        waiting = self.order()
        while waiting:
            slot = waiting.pop()
            readers = self._readers(slot)
            targets = [target for k, target in self.outputs if self.source(k) == slot]
            if (
                self.op(slot) not in COMPUTED
                or self.op(slot) == "uniform"  # whose numbers are those of their columns
                or trace.single[slot]  # one number: there is nothing to cut
                or not readers
                or not cuts.get(slot, set()).issuperset(readers)
                or any(target.kind != "kept" for target in targets)
                or (targets and len(readers) < len(cuts[slot]))
            ):
                continue
            inputs, repeated = self.inputs[slot], trace.rows[slot].detail
            for cut in readers:
                begins = trace.rows[cut].detail or ("from", cut)
                parts = []
                for source, once in zip(inputs, repeated, strict=True):
                    part = source
                    if not once:
                        part = self._cut(source, begins, cut, cut)
                    parts.append(part)
                made = self._new(self.op(slot), tuple(parts), repeated, cut)
                if cut in cuts:  # slices of the slice
                    cuts[made] = cuts.pop(cut)
                    waiting.append(made)
                for target in targets:
                    offset = (("start", begins[1]),)
                    self.outputs.append((made, target._replace(offset=target.offset + offset)))
                self._replace(cut, made)
            del self.inputs[slot]
            self.outputs = [each for each in self.outputs if self.source(each[0]) != slot]

    # Sections

    def _closure(self, roots: Iterable[int]) -> set[int]:
        """The rows to compute for these."""
        found: set[int] = set()
        stack = [self.source(slot) for slot in roots]
        while stack:
            slot = stack.pop()
            if slot not in found and slot in self.inputs:
                found.add(slot)
                stack.extend(self.inputs[slot])
        return found

    def _put_in_sections(self) -> None:
        order = self.order()
        moved = self._moved()
        apart = [slot for slot in order if self.op(slot) in self.apart]
        early = self._closure(slot for slot in apart if slot not in moved)
        looped = self._closure(
            slot for slot, target in self.outputs if target.kind in ("after", "before")
        )
        late: set[int] = set()
        for slot in order:
            if slot in early or slot in looped:
                continue
            if self.op(slot) in self.apart or not late.isdisjoint(self.inputs[slot]):
                late.add(slot)
        for slot in order:
            self.section[slot] = "early" if slot in early else "late" if slot in late else "loop"

    # Copies

    def _hold_states(self) -> None:
        """A state lasts until the next step alone: those that read it later read a copy."""
        copies: dict[int, int] = {}
        for slot in self.order():
            if self.section[slot] != "late" or self.op(slot) == "slice":
                continue
            read = list(self.inputs[slot])
            for at, k in enumerate(read):
                if self.op(self.base(k)) == self.carried:
                    if k not in copies:
                        copies[k] = self._copy(k, "loop", self.rank.get(k, k) + 0.5)
                    read[at] = copies[k]
            self.inputs[slot] = tuple(read)

    def _write_outputs(self) -> None:
        for slot, target in self.outputs:
            self._write(self.source(slot), target)

    def _write(self, slot: int, target: Target) -> None:
        outside = self.section.get(self.base(slot), "loop") != "loop"
        if self.sums_apart and target.kind == "sum" and outside:
            self.later.append((slot, target.which))
            target = Target("grads", slot)
        if self.op(slot) in JOINTS and slot in self.inputs:
            if target.kind == "grads":
                self.places[slot] = Place("grads", target.which)
                return
            if target.kind == "sum":
                for part, offset in self._parts(slot):
                    self._write(part, target._replace(offset=target.offset + offset))
                return
        product = self._copied_product(slot) if target.kind == "before" else None
        if product is not None:
            del self.inputs[slot]
            for link in self._chain(product):
                self.places[link] = Place("before", target.which)
            return
        computed = slot in self.inputs and self.op(slot) in (*COMPUTED, *REDUCTIONS)
        section = self.section.get(self.base(slot), "loop")
        if target.kind in ("after", "before"):  # which hold the newest steps alone
            computed, section = computed and section == "loop", "loop"
        if not computed:
            slot = self._copy(slot, section, max(self.rank.values(), default=0) + 1)
        self.targets.setdefault(slot, []).append(target)

    def _chain(self, slot: int) -> list[int]:
        """A product and those that it goes on from."""
        links = [slot]
        while len(self.inputs[links[-1]]) > 2:
            links.append(self.inputs[links[-1]][2])
        return links

    def _copied_product(self, slot: int) -> int | None:
        """The product that a row is a copy of, if it may as well be written where the copy goes."""
        if self.op(slot) != "copy" or self.op(self.inputs[slot][0]) not in PRODUCTS:
            return None
        (product,) = self.inputs[slot]
        outputs = [k for k, _ in self.outputs if self.source(k) in (slot, product)]
        readers = [k for k in self.inputs if slot in self.inputs[k] or product in self.inputs[k]]
        in_loop = {self.section[k] for k in self._chain(product)} == {"loop"}
        return product if outputs == [slot] == readers and in_loop else None

    def _parts(self, slot: int) -> list[tuple[int, Offset]]:
        """The parts of a joint, and where each begins; a joint in a joint by its own parts."""
        row, parts = self.trace.rows[slot], self.inputs[slot]
        if row.op == "concat":
            offsets = [tuple(("width", before) for before in parts[:k]) for k in range(len(parts))]
        else:
            offsets = list(row.detail)
        found: list[tuple[int, Offset]] = []
        for part, offset in zip(parts, offsets, strict=True):
            if self.op(part) in JOINTS and part in self.inputs:
                found += [(inner, offset + more) for inner, more in self._parts(part)]
            else:
                found.append((part, offset))
        return found

    def _feed_products(self) -> None:
        """What a product reads stands in memory, its rows at equal distances."""
        for slot in self.order():
            if self.op(slot) not in PRODUCTS:
                continue
            section = self.section[slot]
            operand, matrix, *first = self.inputs[slot]
            base = self.base(operand)
            if slot not in self.places:
                into = self.places[first[0]].which if first else slot
                self._buffer(into, panels=True)
                self.places[slot] = Place("scratch", into)
            leaf = self.leaves.get(base)
            if leaf is not None and leaf.kind in ("x", "dy"):
                self._gather(base)
            elif leaf is not None and (section != "loop" or leaf.kind == "capture"):
                made = self._copy(operand, section, self.rank[slot] - 0.5)
                self.inputs[slot] = (made, matrix, *first)
                self._buffer(made)
            elif leaf is None and self._writes(base, "grads") is not None:
                self.places[base] = Place("grads", self._writes(base, "grads") or 0)
            elif leaf is None:
                place = self.places.setdefault(base, Place("scratch", base))
                if place.kind == "scratch":
                    self._buffer(place.which)
        for slot, leaf in self.leaves.items():
            if leaf.kind == "x" and any(slot in self.bases(k) for k in self.inputs):
                self._gather(slot)

    def _writes(self, slot: int, kind: str) -> int | None:
        targets = self.targets.get(slot, [])
        return next((t.which for t in targets if t.kind == kind and not t.offset), None)

    def _gather(self, slot: int) -> None:
        if slot not in self.gathered:
            self.gathered.append(slot)
            self._buffer(slot)

    def _buffer(self, slot: int, panels: bool = False) -> None:
        """Scratch for a row; for how many steps is seen when everybody who uses it is known."""
        old = self.scratch.get(slot)
        panels = panels or (old is not None and old.panels)
        self.scratch[slot] = Scratch(slot, False, panels)
        self.places[slot] = Place("scratch", slot)

    def _finished_buffers(self) -> list[Scratch]:
        """What is written or read outside the loop is there for all steps of a block."""
        block = set(self.gathered)
        for slot, section in self.section.items():
            if section == "loop" or slot not in self.inputs or self.op(slot) == "slice":
                continue
            places: list[Place | Target | None] = [*self.targets.get(slot, [])]
            places += [self.places.get(k) for k in (slot, *self.inputs[slot], *self.bases(slot))]
            block |= {p.which for p in places if p is not None and p.kind == "scratch"}
        return [each._replace(block=each.slot in block) for each in self.scratch.values()]

    def _fill_joints(self) -> None:
        """A joint has memory of its own; its parts are written there where they are computed."""
        joints = {slot: self._parts(slot) for slot in self.order() if self.op(slot) in JOINTS}
        copies: dict[tuple[int, str], int] = {}  # of parts that are computed elsewhere
        for slot, found in joints.items():
            section = self.section[slot]
            if slot not in self.places:
                self._buffer(slot)
            place = self.places[slot]
            parts = []
            for part, offset in found:
                made = part
                if self.op(part) not in COMPUTED or self.section.get(part) != section:
                    if (part, section) not in copies:
                        copy = self._copy(part, section, self.rank[slot] - 0.5)
                        copies[part, section] = copy
                    made = copies[part, section]
                target = Target(place.kind, place.which, place.offset + offset)
                self.targets.setdefault(made, []).append(target)
                parts.append(made)
            self.inputs[slot] = tuple(parts)

    # Stages and passes

    def _stages(self, section: str) -> list[Stage]:
        order = [slot for slot in self.order() if self.section[slot] == section]
        level: dict[int, int] = {}
        for slot in order:
            read = (*self.inputs[slot], *self.bases(slot))  # a slice may be of another section
            before = max((level.get(k, 0) for k in read), default=0)
            level[slot] = before + (self.op(slot) in PRODUCTS)
        for slot in reversed(order):  # as late as its readers allow: fewer values wait in memory
            readers = [k for k in order if self.op(k) != "slice" and slot in self.bases(k)]
            if self.op(slot) in COMPUTED and readers:
                level[slot] = min(level[k] - (self.op(k) in PRODUCTS) for k in readers)
        stages: list[Stage] = []
        for height in range(max(level.values(), default=-1) + 1):
            here = [slot for slot in order if level[slot] == height]
            for slot in here:
                if self.op(slot) in PRODUCTS:
                    operand, matrix, *first = self.inputs[slot]
                    transposed = self.op(slot).endswith("transposed")
                    detail, into = self.trace.rows[matrix].detail, self.places[slot]
                    stages.append(Product(slot, operand, detail, transposed, into, bool(first)))
            computed = [s for s in here if self.op(s) in COMPUTED or self.op(s) in REDUCTIONS]
            if computed:
                stages.append(Rowwise(self._passes(computed)))
        return stages

    def _is_single(self, slot: int) -> bool:
        """Whether a row is one number for each row of the batch, whatever the sizes."""
        return self.trace.single[slot] and self.op(slot) not in REDUCTIONS

    def _loop_of(self, slot: int) -> int:
        """The width class along which a row is computed."""
        at = self.inputs[slot][0] if self.op(slot) in REDUCTIONS else slot
        return self.classes[at]

    def _passes(self, slots: list[int]) -> list[Pass]:
        """Each row in the first pass in which what it reads is there."""
        number: dict[int, int] = {}

        def there(reader: int, slot: int) -> int:
            """The first pass in which ``reader`` can read ``slot``."""
            at = self.base(slot)
            if self.op(at) in JOINTS and at in self.inputs:
                return max((number[k] + 1 for k in self.inputs[at] if k in number), default=0)
            if at not in number:
                return 0
            if self.op(at) in REDUCTIONS:
                return number[at] + 1
            return number[at] + (not self._stays(reader, slot, at))

        for slot in slots:
            number[slot] = max((there(slot, k) for k in self.inputs[slot]), default=0)
        passes = [Pass() for _ in range(max(number.values()) + 1)]
        for slot in slots:
            each = passes[number[slot]]
            if self._is_single(slot):
                each.singles.append(slot)
            else:
                each.loops.setdefault(self._loop_of(slot), []).append(slot)
        for slot in slots:
            if slot not in self.places and self._is_read_elsewhere(slot, number):
                self._give_memory(slot)
        return passes

    def _stays(self, reader: int, slot: int, at: int) -> bool:
        """Whether a reader in the same pass finds the value in a register."""
        if self._is_single(at):
            return True
        return (
            slot == at
            and not self._is_single(reader)
            and self._loop_of(reader) == self._loop_of(at)
        )

    def _is_read_elsewhere(self, slot: int, number: dict[int, int]) -> bool:
        for reader in self.inputs:
            if slot not in self.bases(reader) or self.op(reader) in JOINTS:
                continue
            if reader not in number:
                return True
            if self._is_single(slot) or self.op(slot) in REDUCTIONS:
                continue
            if number[reader] != number[slot] or slot not in self.inputs[reader]:
                return True
            if not self._stays(reader, slot, slot):
                return True
        return False

    def _give_memory(self, slot: int) -> None:
        """What is written for other ends can be read there; if not, scratch."""
        readers = {self.section[k] for k in self.inputs if slot in self.bases(k)}
        for kind in ("grads", "kept", "after"):
            which = self._writes(slot, kind)
            if which is not None and (
                kind == "grads" or readers == {self.section[slot]} == {"loop"}
            ):
                self.places[slot] = Place(kind, which)
                return
        self._buffer(slot)


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
        for a, g, k in plan.derivative.outer:
            lines.append(f"after each segment: gradient of matrix {k} += %{a}ᵀ %{g}")
        for g, k in plan.sums_later:
            lines.append(f"after each segment: gradient of capture {k} += Σ %{g}")
        for g, k in plan.derivative.sums:
            if (g, k) not in plan.sums_later:
                lines.append(f"summed on the way: gradient of capture {k} = Σ %{g}")
    lines += [f"on the GPU, {direction}: {text}" for direction, text in plan.divisions.items()]
    return "\n".join(lines)


def _describe_stage(plan: Plan, program: Program, stage: Stage) -> list[str]:
    def described(slot: int) -> str:
        text: str = row_text(plan, slot, program.inputs.get(slot))
        return text

    if isinstance(stage, Product):
        into = "" if stage.into.kind == "scratch" else f"  -> {stage.into.kind} {stage.into.which}"
        return [f"product: {described(stage.slot)}{into}"]
    lines: list[str] = []
    shown: set[int] = set()
    for k, each in enumerate(stage.passes):
        slots = [*each.singles, *(slot for loop in each.loops.values() for slot in loop)]
        lines.append(f"pass {k + 1}:")
        for slot in slots:
            for cut in program.inputs[slot]:  # slices are read where they stand
                if plan.rows[cut].op == "slice" and cut not in (*program.places, *shown):
                    shown.add(cut)
                    detail = plan.rows[cut].detail
                    where = f", where %{detail[1]} begins" if detail and detail[0] == "from" else ""
                    lines.append(f"  {described(cut)}{where}")
            stores = [f"{t.kind} {t.which}" for t in program.targets.get(slot, [])]
            arrow = f"  -> {', '.join(stores)}" if stores else ""
            lines.append(f"  {described(slot)}{arrow}")
    return lines
