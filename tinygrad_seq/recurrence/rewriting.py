"""The rows that a direction computes, brought into better forms before they are laid out.

Three rewrites, each of which leaves what is computed the same. Imports program and trace.
"""

from __future__ import annotations

from collections.abc import Iterable

from tinygrad_seq.program import JOINTS, LINES, PRODUCTS, Place, Target
from tinygrad_seq.recurrence.trace import COMPUTED, Trace


class Rows:
    """What is wanted of a trace, and all that it takes.

    ``leaves`` are in memory before. What a row of ``inputs`` reads is there, which may be another
    row than the trace says: rows are replaced, and new ones are added to the trace.
    """

    def __init__(self, trace: Trace, carried: str) -> None:
        self.trace, self.carried = trace, carried
        self.leaves: dict[int, Place] = {}
        self.outputs: list[tuple[int, Target]] = []
        self.inputs: dict[int, tuple[int, ...]] = {}  # of each row that is computed
        self.rank: dict[int, float] = {}  # where a row stands; copies stand between others
        # The slices of a row, where they follow one another from end to end.
        self.cuts = {k: set(cut) for k, cut in trace.cuts.items() if k not in trace.gaps}
        self.slices: dict[tuple[int, tuple[object, ...], int], int] = {}  # see ``_cut``

    def op(self, slot: int) -> str:
        return self.trace.rows[slot].op

    def write(self, slot: int, target: Target) -> None:
        self.outputs.append((slot, target))

    def rewrite(self) -> None:
        """Collect all that must be computed, and bring it into better forms.

        Of two products that are added, the second is added to the first where it stands:

            %4 = matmul(%0, matrix 0)            %4 = matmul(%0, matrix 0)
            %6 = matmul(%1, matrix 1)      →     %20 = add_matmul(%1, matrix 1, %4)
            %7 = add(%4, %6)

        What is computed of a joint is computed of its parts and joined after, and what is computed
        before a split is computed slice by slice, so that no part waits for another:

            %5 = concat(%3, %4)                  %7 = tanh(%3)
            %6 = tanh(%5)                  →     %8 = tanh(%4)
                                                 %6 = concat(%7, %8)

            %5 = sigmoid(%4)                     %7 = slice(%4),  %8 = sigmoid(%7)
            %6 = slice(%5)                 →     and nobody reads %5
        """
        self._collect([slot for slot, _ in self.outputs])
        self._add_products()
        self._join_after()
        self._cut_before()

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
            if slot in self.inputs or slot in self.leaves:
                continue
            if self.op(slot) in ("number", "matrix", "units"):
                continue
            self.inputs[slot] = tuple(map(self.source, self.trace.rows[slot].inputs))
            self.rank[slot] = slot
            stack.extend(self.inputs[slot])

    def order(self) -> list[int]:
        """The rows by their rank, each after what it reads: among new rows ranks can be equal."""
        order: dict[int, None] = {}
        waiting = sorted(self.inputs, key=self.rank.__getitem__, reverse=True)
        while waiting:
            slot = waiting[-1]
            before = [k for k in self.inputs[slot] if k not in order and k in self.inputs]
            if slot in order or not before:
                order.setdefault(waiting.pop())
            else:
                waiting.extend(before)
        return list(order)

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
                and self.op(k) not in LINES
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
        partly: set[int] = set()  # rows of which nobody reads some slice
        waiting = self.order()
        while waiting:
            slot = waiting.pop()
            readers = self._readers(slot)
            if len(readers) < len(cuts.get(slot, ())):
                partly.add(slot)
            targets = [target for k, target in self.outputs if self.source(k) == slot]
            if (
                self.op(slot) not in COMPUTED
                or self.op(slot) == "uniform"  # whose numbers are those of their columns
                or trace.single[slot]  # one number: there is nothing to cut
                or not readers
                or not cuts.get(slot, set()).issuperset(readers)
                or any(target.kind != "kept" for target in targets)
                or (targets and slot in partly)
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
                        if slot in partly:  # all that is cut of the source are these slices
                            partly.add(source)
                    parts.append(part)
                made = self._new(self.op(slot), tuple(parts), repeated, cut)
                if cut in cuts:  # slices of the slice
                    cuts[made] = cuts.pop(cut)
                    if cut in partly:
                        partly.add(made)
                    waiting.append(made)
                for target in targets:
                    offset = (("start", begins[1]),)
                    self.outputs.append((made, target._replace(offset=target.offset + offset)))
                self._replace(cut, made)
            del self.inputs[slot]
            self.outputs = [each for each in self.outputs if self.source(each[0]) != slot]
