"""From a plan to source text for CUDA where the loop is taken by steps.

The loop is the caller's then, and so are its products. A kernel is what a step does between two of
them: from the sums of the last, which the caller left at ``p7_out``, to the operand of the next,
which it finds at ``operand5``, the same at every step. Nothing is waited for within a kernel; where
blocks would have to wait for one another, each has whole rows.

A graph runs the same kernels with the same words at every step. So each block counts, at ``clock``,
how many steps have been. Imports cuda_order, cuda_text and program.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tinygrad_seq.kernels.cuda_order import ALL_BLOCKS, UNITS, Item, Region, slots_of, waits
from tinygrad_seq.kernels.cuda_text import GROUP, HERE, PART, SHARED, CudaWriter

from tinygrad_seq.program import Plan, Product, Program, Rules

WHOLE_ROWS = ["parts, part, group = 1, 0, whole(block())"]
CUT = Item(None)  # in the place of a product of the caller's


class StepWriter(CudaWriter):
    """Writes one kernel."""

    shares_far = True

    def __init__(self, plan: Plan, program: Program, rules: Rules) -> None:
        super().__init__(plan, program, rules)
        self.divided = False  # whether rows are shared by the parts of a group
        self.copied: set[int] = set()  # operands that a step has copied
        self.written: dict[tuple[str, int], int] = {}  # and those written where a value is, too

    def step(self, number: int) -> str | None:
        """What a step does after so many of its products, up to the next one; None for nothing.

        After none is before the first step: after the last one a step ends, and the next one goes
        as far as its first product.
        """
        for name in ("rows", "row0", "row1", "s0", "s1", "k0", "B", "active"):
            self.word(name)
        for name in ("batch", "begin", "onward"):
            self.word(name)
        pieces = self._pieces()
        items = pieces[number]
        if number == 0:
            begun = self._prologue_item()
            later = [_after(begun, item) for item in items]
            items = [begun, Item(self._first_step), *later]
        elif number == len(pieces) - 1:
            items = [*items, Item(self._next_step), *pieces[0]]
        if not items:
            return None
        needs = waits(items, again=False)
        self.divided = max(needs) < ALL_BLOCKS
        if number:
            turn, forward = f"word({self.word('clock')}, block())", self.forward
            self.add(1, f"turn = {turn}  # how many steps have been")
            self.add(1, "s = s0 + turn" if forward else "s = s1 - 1 - turn")
            self.add(1, HERE)
        for item, need in zip(items, needs, strict=True):
            if need:
                self.add(1, "meet()")
            item.write(1)
        if number:
            self.add(1, "meet()")
            self.add(1, "if thread() == 0:")
            self.add(2, "put_word(clock, block(), turn + 1)")
        if self.divided:
            self.word("parts")
        head = [*(PART if self.divided else WHOLE_ROWS), *GROUP, SHARED]
        return self._whole(f"{self.program.direction}_step{number}", head)

    def _pieces(self) -> list[list[Item]]:
        """What a step does, cut at its products."""
        pieces: list[list[Item]] = [[]]
        for item in self._step_items():
            if item is CUT:
                pieces.append([])
            else:
                pieces[-1].append(item)
        return pieces

    def _prologue_item(self) -> Item:
        slots = {("state", k): slot for k, slot in enumerate(self.plan.state_slots)}
        if not self.forward:
            slots = {("dstate", k): self.plan.state_slots[k] for k in self._carried()}
            slots |= {("sum", k): self.captures[k] for k in self.plan.sums_on_the_way()}
        at = self.plan.classes
        writes = [Region(memory, (), at[slot], UNITS) for memory, slot in slots.items()]
        return Item(lambda depth: self._prologue(), [], writes)

    def _first_step(self, depth: int) -> None:
        self.add(depth, "s = s0" if self.forward else "s = s1 - 1")
        self.add(depth, "m = 0")
        self.add(depth, "if s0 < s1:")
        self.add(depth + 1, HERE)

    def _next_step(self, depth: int) -> None:
        self.add(depth, "s = s + 1" if self.forward else "s = s - 1")
        self.add(depth, "m = 0")
        self.add(depth, "if s < s1:" if self.forward else "if s >= s0:")
        self.add(depth + 1, HERE)

    # Products

    def _sums_items(self, stage: Product) -> list[Item]:
        return [*self._operand_items(stage.a), CUT]

    def _share(self, stage: Product, n: int) -> str:
        chain = self._chain(stage)
        row = f"(first + r) * {self.width(stage.slot)}"
        column = self._columns(chain, chain.segments[n])
        out = self.word(f"p{stage.slot}_out")
        return f"load(at({out}, ({row} + {column}j) * {self.item}))"

    def _operand_items(self, slot: int) -> list[Item]:
        """Rows that the caller's product reads, where it finds them at every step."""
        if slot in self.copied:
            return []
        self.copied.add(slot)
        place = self.program.places.get(slot)
        if place is not None and self._only_values(place):
            self.written[place.kind, place.which] = slot
            return []

        def write(depth: int) -> None:
            def body(depth: int) -> None:
                to = self._unit(self._operand_row(slot))
                self.add(depth, f"store({to}, load({self._unit(self._read(slot))}))")

            self.add(depth, f"# %{slot}, for a product")
            self._over_units(self.units_of(slot), depth, body)

        return [Item(write, self._region(slot, UNITS))]

    def _operand_row(self, slot: int) -> str:
        return f"{self.word(f'operand{slot}')} + (first + r) * {self.width(slot)} * {self.item}"

    def _only_values(self, place: Any) -> bool:
        """Whether all that is in some memory is values along units, of the step itself."""
        memory = place.kind, place.which
        if place.kind not in ("grads", "kept", "scratch"):
            return False
        for section, stages in self.program.sections.items():
            for stage in stages:
                if isinstance(stage, Product):
                    if (stage.into.kind, stage.into.which) == memory:
                        return False
                    continue
                for slot in (slot for each in stage.passes for slot in slots_of(each)):
                    for target in self._targets(slot):
                        if (target.kind, target.which) == memory and (
                            section != "loop" or self.plan.single[slot]
                        ):
                            return False
        return place.which not in self.program.gathered

    def _rows_of(self, target: Any) -> list[str]:
        rows = super()._rows_of(target)
        operand = self.written.get((target.kind, target.which))
        if operand is not None:
            rows.append(self._on(self._operand_row(operand), target.offset))
        return rows


def _after(earlier: Item, item: Item) -> Item:
    """The item, which waits for an earlier one even where it writes over what that has written."""
    written = {region.memory for region in earlier.writes}
    over = [region for region in item.writes if region.memory in written]
    return replace(item, reads=[*item.reads, *over])
