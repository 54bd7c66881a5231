"""What the threads of a CUDA kernel must wait for, and how its products are divided.

A part computes what stands at its own units. Where something reads across units what others have
written, blocks wait for one another; where threads of a block read what others of it wrote, they
meet. ``waits`` finds both from the regions of memory that the items of a step read and write.
``chains`` finds the columns of each product that a part computes: those that are read at its own
units, so that their sums can stay with it. Imports program.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tinygrad_seq.program import Place, Plan, Product, Program, Rowwise

JOINTS = ("concat", "assemble")
REWRITTEN = ("shares", "total")  # memory of a block that every step writes over
# How threads are divided among the numbers of rows.
UNITS, TILES = "a thread each unit", "a thread each tile of a product"
ROWS_BY_WARPS, ROWS_BY_THREADS = "a warp each row", "a thread each row"
# Who must come before something can be done, the nearer the less.
NOBODY, THE_BLOCK, ALL_BLOCKS = 0, 1, 2  # by itself; its threads meet; blocks of the group do


# What is read and written --------------------------------------------------------------------


class Region(NamedTuple):
    """A stretch of a row in some memory, and which threads are at work there."""

    memory: tuple[str, int]  # kind and number
    offset: Any  # where it begins in the row
    width: int | None  # units by whose shares it is divided; None: read or written anywhere
    by: str  # how threads are divided


@dataclass
class Item:
    """Something that is done at a step by all threads of a group."""

    write: Any  # writes its text
    reads: list[Region] = field(default_factory=list)
    writes: list[Region] = field(default_factory=list)


def _distance(written: Region, read: Region) -> int:
    """Who must come before this is read: nobody where the same thread has written it."""
    if written.width is None or (written.offset, written.width) != (read.offset, read.width):
        return ALL_BLOCKS
    return THE_BLOCK if written.by != read.by or written.by == TILES else NOBODY


class _Order:
    """What must be waited for before each item of a step.

    What others have read may be written over: all but what is REWRITTEN has a place of its own for
    two steps at least, and what is read across blocks is waited for in the step between.
    """

    def __init__(self) -> None:
        self.waiting: list[tuple[int, Region]] = []  # written, and who has come since
        self.read: list[Region] = []  # read since threads last met

    def before(self, item: Item) -> int:
        """Who must come before it."""
        need = NOBODY
        for region in item.reads:
            for come, written in self.waiting:
                if written.memory == region.memory and _distance(written, region) > come:
                    need = max(need, _distance(written, region))
        for region in item.writes:  # what is overwritten must have been read
            for earlier in self.read:
                if earlier.memory == region.memory and earlier.memory[0] in REWRITTEN:
                    need = max(need, THE_BLOCK)
        if need == ALL_BLOCKS:
            self.waiting, self.read = [], []
        elif need == THE_BLOCK:
            self.waiting = [(THE_BLOCK, region) for _, region in self.waiting]
            self.read = []
        self.waiting += [(NOBODY, region) for region in item.writes]
        self.read += item.reads
        return need


def waits(items: list[Item], again: bool = True) -> list[int]:
    """Who must come before each item, every step following another, or only these."""
    order, found = _Order(), [NOBODY] * len(items)
    for _ in range(3 if again else 1):  # what one step leaves, the next one finds
        found = [max(old, order.before(item)) for old, item in zip(found, items, strict=True)]
        order.waiting = list(dict.fromkeys(order.waiting))
        order.read = list(dict.fromkeys(order.read))
    return found


# Products ------------------------------------------------------------------------------------


class Segment(NamedTuple):
    """Columns of a product that are read at the same units."""

    slot: int  # the slice that they are, or the product itself
    width: int  # whose units


@dataclass
class Chain:
    """Products in the loop that add up to one value, its columns divided among parts."""

    stages: list[Product]
    segments: list[Segment]
    local: bool  # whether each part reads its own columns alone
    goes_on: bool  # from what stands where the value goes

    def at(self, slot: int) -> int:
        """Which segment a value is."""
        return next((n for n, each in enumerate(self.segments) if each.slot == slot), 0)


def chains(plan: Plan, program: Program) -> list[Chain]:
    """The products of a loop."""
    found: dict[Place, list[Product]] = {}
    for stage in program.sections["loop"]:
        if isinstance(stage, Product):
            found.setdefault(stage.into, []).append(stage)
    return [_chain(plan, program, stages) for stages in found.values()]


def _chain(plan: Plan, program: Program, stages: list[Product]) -> Chain:
    """Divided as it is read: in slices, each at its own units, or as a whole."""
    last = stages[-1].slot
    whole = [Segment(last, plan.classes[last])]
    apart = Chain(stages, whole, False, stages[0].adds)
    if stages[0].into.kind != "scratch":
        return apart
    along = {  # computed along units, not one number a row, which any part may read
        slot
        for stage in program.sections["loop"]
        if isinstance(stage, Rowwise)
        for each in stage.passes
        for loop in each.loops.values()
        for slot in loop
    }
    read: dict[int, None] = {}
    for reader, inputs in program.inputs.items():
        if plan.rows[reader].op in ("slice", "detach"):
            continue
        for k, repeated in zip(inputs, _repeated(plan, reader, inputs), strict=True):
            if base_of(plan, program, k) == last:
                if reader not in along or repeated:
                    return apart
                read[k] = None
    if list(read) == [last]:
        return Chain(stages, whole, True, stages[0].adds)
    if not read or last in read:
        return apart
    segments = [Segment(k, plan.classes[k]) for k in read]
    return Chain(stages, segments, True, stages[0].adds)


def _repeated(plan: Plan, slot: int, inputs: tuple[int, ...]) -> tuple[bool, ...]:
    """Which inputs have one number for all units."""
    row = plan.rows[slot]
    if isinstance(row.detail, tuple) and len(row.detail) == len(inputs) and row.op not in JOINTS:
        return tuple(map(bool, row.detail))
    return (False,) * len(inputs)


def slots_of(each: Any) -> list[int]:
    """The rows that a pass computes."""
    return [*each.singles, *(slot for loop in each.loops.values() for slot in loop)]


def base_of(plan: Plan, program: Program, slot: int) -> int:
    """The row that a slice is cut from, or the row itself."""
    while slot not in program.places and plan.rows[slot].op in ("slice", "detach"):
        slot = program.inputs.get(slot, plan.rows[slot].inputs)[0]
    return slot
