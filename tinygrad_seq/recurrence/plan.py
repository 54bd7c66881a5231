"""The plan: how the rows of a step, and of its derivative, are laid out in time and memory.

A program (one for each direction) has three sections. What needs no state is done *early*, for a
block of steps at once, if it is a product; what the next state needs stands in the *loop*; products
that nobody in the loop reads come *late*, again for a block of steps. In a section, products stand
between passes: a pass goes over the units of a row once and computes everything that can be had in
one go. A value stays in registers unless somebody reads it from elsewhere.

Of the forward pass only what the way back cannot compute from the rest is kept, step by step.
Gradients of matrices are no part of the loop: both sides of each product stand in memory for a
segment of steps, of which one large product is made, added to those of the segments before.

What a plan consists of is in ``tinygrad_seq/program.py``. Imports program, rewriting and trace.
"""

from __future__ import annotations

from collections.abc import Iterable

from tinygrad_seq.program import (
    CHOICES,
    JOINTS,
    LINES,
    PRODUCTS,
    REDUCTIONS,
    Derivative,
    Offset,
    Pass,
    Place,
    Plan,
    Product,
    Program,
    Rowwise,
    Scratch,
    Stage,
    Target,
)
from tinygrad_seq.recurrence.rewriting import Rows
from tinygrad_seq.recurrence.trace import CAPTURED, COMPUTED, Step, Trace


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
        numbers=len(step.numbers),
        constants=[] if derivative is None else list(derivative.numbers),
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
    """The forward values to keep. What is elementwise, or chosen, from the rest is not kept."""
    rows = step.trace.rows
    results = (*derivative.dx, *derivative.before, *derivative.totals)
    wanted = [slot for slot in results if slot is not None]
    wanted += [slot for a, g, _ in derivative.outer for slot in (a, g)]
    wanted += [g for g, _ in derivative.sums]
    needed: set[int] = set()  # what the rows of the derivative read
    while wanted:
        slot = wanted.pop()
        if rows[slot].op == "detach":  # looked through, as everybody who reads it does
            wanted.extend(rows[slot].inputs)
        elif slot not in needed:
            needed.add(slot)
            if slot >= count or rows[slot].op in CHOICES:
                wanted.extend(rows[slot].inputs)
    there: set[int] = set(step.state_slots)  # ``_states_to_keep`` sees to these
    kept = []
    for slot, row in enumerate(rows[:count]):
        elementwise = row.op in COMPUTED or row.op in ("slice", "detach", *CHOICES)
        if row.op in ("x", "state", "number", *CAPTURED) or (
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
    for k, total in enumerate(derivative.totals):
        if total is not None:
            build.write(total, Target("total", k))
    for k, state in enumerate(derivative.before):
        if state is not None and derivative.after[k] is not None:
            build.write(state, Target("before", k))
    return build.program(), tuple(build.later)


class _Builder(Rows):
    """From the rows that are wanted to sections, stages and passes.

    First the rows are rewritten. Everything gets its section. Copies are put in, so that states are
    read and written in the loop alone, whatever is written is computed, whatever a product reads is
    in memory, and whatever is joined is written part by part. Then everything gets its stage and
    its pass, and what is read in another pass than its own gets memory.
    """

    def __init__(self, trace: Trace, direction: str, carried: str, sums_apart: bool) -> None:
        super().__init__(trace, carried)
        self.direction, self.sums_apart = direction, sums_apart
        self.later: list[tuple[int, int]] = []  # sums of what is not computed in the loop
        # Better outside the loop. A choice of units takes no less time there.
        self.apart = {"matmul", "matmul_transposed", "add_matmul", "add_matmul_transposed", *LINES}
        self.apart |= set(REDUCTIONS if sums_apart else ())
        self.targets: dict[int, list[Target]] = {}
        self.places: dict[int, Place] = {}
        self.scratch: dict[int, bool] = {}  # rows with a buffer, and whether a product fills it
        self.gathered: list[int] = []
        self.section: dict[int, str] = {}

    def program(self) -> Program:
        self.rewrite()
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
            matrices=list(
                dict.fromkeys((s.matrix, s.transposed) for s in products if not s.choice)
            ),
        )

    def _copy(self, slot: int, section: str, rank: float) -> int:
        made = self.trace.copy_of(slot)
        self.inputs[made], self.rank[made], self.section[made] = (slot,), rank, section
        return made

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
        late = {slot for slot, section in self.section.items() if section == "late"}
        for slot in reversed(self.order()):  # what is joined late is the parts of joints in it
            if slot in late and self.op(slot) in JOINTS:
                late |= {k for k in self.inputs[slot] if self.op(k) in JOINTS}
        for slot in self.order():
            if slot not in late or self.op(slot) == "slice":
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
        """What a product reads stands in memory, its rows at equal distances.

        Rows of x are copied there for whoever reads them.
        """
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
            leaf, written = self.leaves.get(base), self._writes(base, "grads")
            if leaf is not None and leaf.kind in ("x", "dy"):
                self._gather(base)
            elif leaf is not None and (section != "loop" or leaf.kind == "capture"):
                made = self._copy(operand, section, self.rank[slot] - 0.5)
                self.inputs[slot] = (made, matrix, *first)
                self._buffer(made)
            elif leaf is None and written is not None:
                self.places[base] = Place("grads", written)
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
        self.scratch[slot] = panels or self.scratch.get(slot, False)
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
        return [Scratch(slot, slot in block, panels) for slot, panels in self.scratch.items()]

    def _fill_joints(self) -> None:
        """A joint has memory of its own; its parts are written there where they are computed.

        One that stands in other joints alone is nowhere: its parts are written there.
        """
        joints = {slot: self._parts(slot) for slot in self.order() if self.op(slot) in JOINTS}
        inner = []
        for slot in joints:
            readers = [k for k in self.inputs if slot in self.bases(k)]
            if slot not in self.places and readers and set(readers) <= set(joints):
                inner.append(slot)
        for slot in inner:
            del self.inputs[slot], joints[slot]
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
                target = Target(place.kind, place.which, offset)
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
                    op, which = self.op(slot), self.trace.rows[matrix].detail
                    choice = next((each for each in CHOICES if each in op), "")
                    how = op.endswith("transposed"), self.places[slot], bool(first), choice
                    stages.append(Product(slot, operand, which, *how, op in LINES))
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
        """Each row in the first pass in which what it reads is there, or else where it is read."""
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
        self._put_off(slots, number)
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

    def _put_off(self, slots: list[int], number: dict[int, int]) -> None:
        """Compute in the pass where it is read what waits in memory until then, if no more has to
        wait for it."""
        for slot in reversed(slots):
            written = slot in self.targets or slot in self.places
            if written or self._is_single(slot) or self.op(slot) not in COMPUTED:
                continue
            readers = [k for k in self.inputs if slot in self.bases(k)]
            if not all(
                k in number and slot in self.inputs[k] and self._stays(k, slot, slot)
                for k in readers
            ):
                continue
            waiting = [k for k in self.inputs[slot] if self._would_wait(k, number)]
            if readers and len(waiting) <= 1:
                number[slot] = min(number[k] for k in readers)

    def _would_wait(self, slot: int, number: dict[int, int]) -> bool:
        """Whether a row, read in another pass than its own, needs memory that it does not have."""
        if slot not in number or slot in self.places:
            return False
        if self._is_single(slot) or self.op(slot) in REDUCTIONS:
            return False
        return not self._is_read_elsewhere(slot, number)

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
