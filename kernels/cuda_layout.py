"""Layout for CUDA: how a run is divided among blocks, and where everything is.

The batch is divided among groups of blocks, a step's units among the blocks of a group, its parts.
The fewer parts, the less they wait for one another; the more, the less each has to multiply, and
the more of its columns of the matrices fit its shared memory. ``choose`` weighs that by a model of
a step's time. Matrices that do not fit are read from global memory at each step; or the loop is
taken *by steps*, its products the vendor's, which divides them as it likes.

Memory is two blocks of bytes, one that the way back needs (``kept``) and one that it does not
(``work``). ``values`` are the words that sizes alone decide.
Imports cuda_order, cuda_rows, cuda_source, cuda_text, division, program and NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from tinygrad_seq.kernels.cuda_order import Chain, chains, slots_of
from tinygrad_seq.kernels.cuda_rows import RING
from tinygrad_seq.kernels.cuda_source import Form
from tinygrad_seq.kernels.cuda_text import COUNTER
from tinygrad_seq.kernels.division import Sizes

from tinygrad_seq.program import REDUCTIONS, Plan, Rowwise

TILE = 4  # a thread adds up TILE × TILE results of a product, or 1 × TILE
WARP = 32
ALIGNMENT = 256
MOST_LAUNCHES = 256
WORD = 8  # bytes
ROWS_ALONE = 4096  # numbers that a block takes at once outside the loop


class Machine(NamedTuple):
    """What a layout depends on of the device."""

    processors: int
    shared_bytes: int  # of a block
    threads: int  # of a block
    tf32: bool = False  # whether the vendor's products of float32 may round to TF32


class Costs(NamedTuple):
    """What a step's time is made of, in clocks; estimates for sm_90 until they are measured."""

    barrier: float = 1500.0
    meeting: float = 60.0
    product: float = 500.0  # from its first load to its last sum, whatever its size
    passing: float = 250.0
    issue: float = 4.0  # instructions of warps in a clock
    near: float = 20.0  # bytes in a clock to one block from the device's cache
    shared: float = 128.0  # and from its own memory
    streams: float = 30.0
    node: float = 3600.0  # of a graph, from the end of the one before it to its own
    vendor: float = 100.0  # multiplications in a clock on each processor, in products by steps
    vendor_tf32: float = 500.0


COSTS = Costs()


def padded(count: int) -> int:
    """Numbers of a row in memory: whole tiles, so that four can be read at once."""
    return -(-count // TILE) * TILE


# How a run is divided ------------------------------------------------------------------------


class Shape(NamedTuple):
    """A product of the loop as one part computes it."""

    K: int
    C: int  # columns
    height: int  # rows of a thread's tile
    across: int  # lanes of a warp beside one another
    beside: int  # tiles of warps beside one another
    workers: int  # warps that share the tiles
    slices: int  # teams of them that share K
    depth: int  # of K, of each team
    clocks: float  # that it is thought to take


class Choice(NamedTuple):
    """Groups of blocks and what they do."""

    groups: int
    parts: int  # blocks of a group
    rows: int  # rows of a group
    streamed: frozenset[int]  # products whose matrix does not stay in shared memory
    shapes: dict[int, Shape]  # of each product
    shared_bytes: int
    clocks: float  # that a step is thought to take
    launches: int = 1  # one after another, of a share of the batch each
    by_steps: bool = False

    @property
    def form(self) -> Form:
        return Form(self.streamed, self.by_steps)

    def __str__(self) -> str:
        if self.by_steps:
            return (
                f"by steps, captured as a graph: products of cuBLAS, and after each a kernel of "
                f"{self.groups} groups of {self.parts} blocks, {self.rows} rows each"
            )
        where = "weights stay in shared memory"
        if self.streamed:
            products = ", ".join(f"%{slot}" for slot in sorted(self.streamed))
            where = f"weights of {products} are read at each step, there is no room for them"
        launches = f"{self.launches} launches of " if self.launches > 1 else ""
        return (
            f"{launches}{self.groups} groups of {self.parts} blocks, {self.rows} rows each; "
            f"{self.shared_bytes} bytes of shared memory a block; {where}"
        )


class Wanted(NamedTuple):
    """A product that is to be divided: its depth, and the widths that its columns are."""

    slot: int
    K: int
    widths: tuple[int, ...]


def choose(
    wanted: Sequence[Wanted], B: int, widest: int, item: int, machine: Machine, meetings: int = 0
) -> Choice:
    """The division with the least time for a step.

    Units of the widest value are shared by the parts, numbers have ``item`` bytes, and blocks meet
    before each product and ``meetings`` times besides.
    """
    sizes = B, widest, item, machine, meetings
    found = [each for each in (resident(wanted, *sizes), by_steps(wanted, *sizes)) if each]
    if not found:
        raise MemoryError(
            f"scan: a step with {meetings} sums along its rows does not fit a block of the device, "
            f"which has {machine.shared_bytes} bytes of shared memory; expected a smaller cell"
        )
    return min(found, key=lambda each: each.clocks)


def by_steps(
    wanted: Sequence[Wanted], B: int, widest: int, item: int, machine: Machine, meetings: int = 0
) -> Choice | None:
    """A step at a time, products of the vendor's; None without products, or without room."""
    room = machine.shared_bytes // max(1, meetings * item)  # each sum is of all rows
    if not wanted or not room:
        return None
    rows = min(room, max(1, -(-B // (8 * machine.processors))))
    groups = -(-B // rows)
    parts = max(1, min(2 * machine.processors // groups, -(-widest // machine.threads)))
    speed = COSTS.vendor_tf32 if machine.tf32 and item == 4 else COSTS.vendor
    clocks = COSTS.passing + (2 * len(wanted)) * COSTS.node
    for each in wanted:
        numbers = each.K * sum(each.widths)
        clocks += COSTS.product + max(
            B * numbers / (speed * machine.processors),
            numbers * item / (COSTS.streams * machine.processors),
        )
    shared = meetings * rows * item
    return Choice(groups, parts, rows, frozenset(), {}, shared, clocks, by_steps=True)


def resident(
    wanted: Sequence[Wanted], B: int, widest: int, item: int, machine: Machine, meetings: int = 0
) -> Choice | None:
    """All steps in a launch, or in several of a share of the batch; None without room."""
    best = None
    launches = 1
    while launches <= min(B, MOST_LAUNCHES):
        share, rows = -(-B // launches), 1
        while True:
            groups = -(-share // rows)
            if groups <= machine.processors:
                for parts in _counts(machine.processors // groups, widest):
                    sizes = groups, parts, rows, widest, item
                    found = divided(wanted, *sizes, machine, meetings, launches)
                    if found is not None and (best is None or found.clocks < best.clocks):
                        best = found
            if rows >= share:
                break
            rows = min(2 * rows, share)
        launches *= 2
    return best


def _counts(most: int, widest: int) -> list[int]:
    """Numbers of parts to be tried: none whose shares are not smaller than those of fewer."""
    most = max(1, min(most, widest))
    tried = {2**k for k in range(most.bit_length())} | {most}
    fewest: dict[int, int] = {}
    for parts in sorted(tried):
        fewest.setdefault(-(-widest // parts), parts)
    return list(fewest.values())


def _shape(K: int, C: int, rows: int, item: int, machine: Machine) -> Shape:
    """How the warps of a block divide a product: by the tiles that take less time."""
    return min(
        (_of_height(height, K, C, rows, item, machine) for height in (TILE, 1)),
        key=lambda shape: shape.clocks,
    )


def _of_height(height: int, K: int, C: int, rows: int, item: int, machine: Machine) -> Shape:
    warps, columns = machine.threads // WARP, C // TILE
    across = min(WARP, 1 << max(0, columns - 1).bit_length())
    beside = max(1, -(-columns // across))
    below = -(-rows // (height * (WARP // across)))
    workers = min(warps, beside * below)
    slices = max(1, min(warps // workers, -(-K // TILE)))
    depth = padded(-(-K // slices))
    busy = max(0.25, min(1.0, workers * slices / 4))  # of the four schedulers
    instructions = height * TILE + 2 + height / TILE  # of a warp, for each k of a tile
    clocks = max(
        beside * below * K * instructions / COSTS.issue / busy,
        below * K * C * item / COSTS.shared,
        rows * K * item * beside / COSTS.near,
    )
    return Shape(K, C, height, across, beside, workers, slices, depth, clocks)


def divided(
    wanted: Sequence[Wanted],
    groups: int,
    parts: int,
    rows: int,
    widest: int,
    item: int,
    machine: Machine,
    meetings: int = 0,
    launches: int = 1,
) -> Choice | None:
    """What such a division takes; None if there is no room for it."""
    waiting = COSTS.barrier + 5.0 * parts if parts > 1 else COSTS.meeting
    shapes = {}
    clocks = COSTS.passing * (1 + rows * -(-widest // parts) // machine.threads)
    clocks += waiting * (len(wanted) + meetings)
    room = machine.shared_bytes - meetings * rows * item
    for each in wanted:
        C = sum(padded(-(-width // parts)) for width in each.widths)
        shape = shapes[each.slot] = _shape(each.K, C, rows, item, machine)
        room -= shape.slices * rows * C * item
        clocks += COSTS.product + shape.clocks
    if room < 0:
        return None
    streamed, used = set(), machine.shared_bytes - room
    for each in sorted(wanted, key=lambda w: shapes[w.slot].K * shapes[w.slot].C):
        shape = shapes[each.slot]
        size = shape.K * shape.C * item
        if size <= room:
            room, used = room - size, used + size
        else:
            streamed.add(each.slot)
            clocks += size / COSTS.streams
    return Choice(
        *(groups, parts, rows, frozenset(streamed), shapes, used, clocks * launches, launches)
    )


# Where everything is -------------------------------------------------------------------------


@dataclass
class Memory:
    """A block of bytes that is filled from its beginning."""

    bytes: int = 0
    arrays: dict[str, tuple[int, tuple[int, ...]]] = field(default_factory=dict)

    def take(self, name: str, shape: tuple[int, ...], item: int) -> None:
        self.arrays[name] = self.bytes, shape
        size = int(np.prod(shape)) * item
        self.bytes += -(-max(size, item) // ALIGNMENT) * ALIGNMENT


class Layout:
    """The layout of one direction for some sizes."""

    def __init__(
        self, plan: Plan, direction: str, steps: int, keep: bool, sizes: Sizes, machine: Machine
    ) -> None:
        self.plan, self.sizes, self.steps, self.keep = plan, sizes, steps, keep
        self.direction, self.machine = direction, machine
        self.program = plan.program(direction)
        self.item = np.dtype(plan.dtype).itemsize
        self.values: dict[str, int] = {}
        self.memory = {"work": Memory(), "kept": Memory()}
        self.chains: list[Chain] = chains(plan, self.program)
        self.choice = self._choose()
        self._sizes()
        self._states()
        self._products()
        self._buffers()
        if direction == "backward":
            self._results()

    def width(self, slot: int) -> int:
        at = self.plan.classes[slot]
        return self.sizes.widths[at] if at < self.plan.forward_count else 1

    def elements(self, offset: Any) -> int:
        """Where in a row an offset is."""
        starts = dict(self.sizes.starts)
        return sum(self.width(k) if kind == "width" else starts[k] for kind, k in offset)

    def _choose(self) -> Choice:
        wanted = [
            Wanted(
                stage.slot,
                self.width(stage.a),
                tuple(self.width(each.slot) for each in chain.segments),
            )
            for chain in self.chains
            for stage in chain.stages
        ]
        widest = max((self.width(slot) for slot in self.program.inputs), default=1)
        B, machine = self.sizes.B, self.machine
        sums = len(self.sums("loop"))
        return choose(wanted, B, max(1, widest), self.item, machine, sums)

    def sums(self, section: str) -> list[int]:
        """The rows of a section that are sums along a row, or its largest or smallest number."""
        return [
            slot
            for stage in self.program.sections[section]
            if isinstance(stage, Rowwise)
            for each in stage.passes
            for slot in slots_of(each)
            if self.plan.rows[slot].op in REDUCTIONS
        ]

    def _sizes(self) -> None:
        plan, values, sizes = self.plan, self.values, self.sizes
        values |= {
            "B": sizes.B,
            "onward": sizes.onward,
            "slots": 2 if sizes.resets else 1,
            "parts": self.choice.parts,
            "rows": self.choice.rows,
            "kept_mask": -1 if self.keep else 1,
        }
        for slot in set(plan.classes):
            values[f"w{slot}"] = self.width(slot)
            values[f"w{slot}_row"] = padded(self.width(slot)) * self.item
        values |= {f"start{slot}": start for slot, start in sizes.starts}
        for k, (shape, strides) in enumerate(sizes.captured):
            shared = len(shape) != 2 or (shape[0] == 1 and sizes.B != 1)  # by all rows
            values[f"capture{k}_b"] = 0 if shared else strides[0]

    def _rows(self, block: str, name: str, count: int, width: int) -> None:
        """Memory for so many rows, one after another."""
        self.memory[block].take(name, (count, padded(width)), self.item)

    def _states(self) -> None:
        plan, B, block = self.plan, self.sizes.B, "kept" if self.keep else "work"
        for k, slot in enumerate(plan.state_slots):
            all_steps = self.keep and k in plan.states_kept
            count = self.steps * self.values["slots"] + 1 if all_steps else RING
            self._rows(block, f"state{k}", count * B, self.width(slot))
            self.values[f"state{k}_mask"] = -1 if all_steps else RING - 1
        for slot in plan.kept:
            count = self.steps if self.keep else 2
            self._rows(block, f"kept{slot}", count * B, self.width(slot))

    def _products(self) -> None:
        """Where the matrices of the loop and what comes of them are, in shared memory or not."""
        values, choice, at = self.values, self.choice, 0
        for chain in () if choice.by_steps else self.chains:
            for stage in chain.stages:
                p, shape = f"p{stage.slot}", choice.shapes[stage.slot]
                column = 0
                for n, segment in enumerate(chain.segments):
                    values[f"{p}_segment{n}"] = column
                    column += padded(-(-self.width(segment.slot) // choice.parts))
                given = self.sizes.captured[stage.matrix][1]
                row, column_bytes = given[::-1] if stage.transposed else given
                values |= {f"{p}_row": row, f"{p}_column": column_bytes, f"{p}_C": shape.C}
                for name in ("height", "across", "beside", "workers", "slices", "depth"):
                    values[f"{p}_{name}"] = getattr(shape, name)
                span, below = shape.across * TILE, WARP // shape.across * shape.height
                values |= {f"{p}_wrap": shape.beside * span, f"{p}_below": below}
                values[f"{p}_dr"] = shape.workers // shape.beside * below
                values[f"{p}_dc"] = shape.workers % shape.beside * span
                values[f"{p}_out"] = at
                at += shape.slices * choice.rows * shape.C
                if stage.slot in choice.streamed:
                    shape_all = (choice.parts, shape.K, shape.C)
                    self.memory["work"].take(f"{p}_at", shape_all, self.item)
                else:
                    values[f"{p}_at"] = at
                    at += shape.K * shape.C
        for slot in self.sums("loop"):
            values[f"total{slot}"] = at
            at += choice.rows
        if choice.by_steps:
            self._operands()

    def _operands(self) -> None:
        """What products read and write if the loop is taken by steps, the same at each of them."""
        B, work, item = self.sizes.B, self.memory["work"], self.item
        stages = [stage for chain in self.chains for stage in chain.stages]
        for stage in stages:
            work.take(f"p{stage.slot}_out", (B, self.width(stage.slot)), item)
        for slot in {stage.a: None for stage in stages}:
            work.take(f"operand{slot}", (B, self.width(slot)), item)
        self.turns = WORD * self.choice.groups * self.choice.parts  # bytes of a kernel's clock
        work.take("clocks", ((len(stages) + 1) * self.turns,), 1)

    def _buffers(self) -> None:
        B, choice = self.sizes.B, self.choice
        for buffer in self.program.scratch:
            steps = self.steps if buffer.block else 2
            self._rows("work", f"z{buffer.slot}", steps * B, self.width(buffer.slot))
        blocks = choice.groups * choice.parts
        widest = max((self.width(slot) for slot in self.program.inputs), default=1)
        self.rows_alone = max(1, min(B, ROWS_ALONE // max(1, widest)))
        self.tiles = max(1, self.steps) * -(-B // self.rows_alone)
        self.blocks_alone = min(self.tiles, 8 * self.machine.processors)
        for slot in self.sums("loop"):
            self.memory["work"].take(f"partial{slot}", (2 * blocks * choice.rows,), self.item)
        alone = [*self.sums("early"), *self.sums("late")]
        self.words_alone = {"rows": self.rows_alone}
        self.words_alone |= {f"total{slot}": k * self.rows_alone for k, slot in enumerate(alone)}
        self.words_alone |= {f"partial{slot}": 0 for slot in alone}
        self.shared_alone = len(alone) * self.rows_alone * self.item
        self.memory["work"].take("counters", (choice.groups * COUNTER,), 1)

    def _results(self) -> None:
        """Memory for gradients, of all steps and those that are added up on the way."""
        plan, B = self.plan, self.sizes.B
        for slot in plan.grads:
            self._rows("work", f"grads{slot}", self.steps * B, self.width(slot))
        for k, after in enumerate(plan.gradients.after):
            if after is not None:
                self._rows("work", f"dstate{k}", RING * B, self.width(plan.state_slots[k]))
                self.values[f"dreset{k}"] = 0
                if self.sizes.resets:
                    shape = (B, self.width(plan.state_slots[k]))
                    self.memory["work"].take(f"dreset{k}", shape, self.item)
        slots = {row.detail: slot for slot, row in enumerate(plan.rows) if row.op == "capture"}
        for k in plan.sums_on_the_way():
            self._rows("work", f"sum{k}", B, self.sizes.widths[slots[k]])
