"""Division for CUDA: how a run is divided among blocks.

The batch is divided among groups of blocks, a step's units among the blocks of a group, its parts.
The fewer parts, the less they wait for one another; the more, the less each has to multiply, and
the more of its columns of the matrices fit its shared memory. ``divide`` weighs that by a model of
a step's time. Matrices that do not fit are read from global memory at each step; or the loop is
taken *by steps*, its products the vendor's, which divides them as it likes. Imports nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

TILE = 4  # a thread adds up TILE × TILE results of a product, or 1 × TILE
WARP = 32
MOST_LAUNCHES = 256


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


class Form(NamedTuple):
    """What of a division the text of a loop depends on."""

    streamed: frozenset[int] = frozenset()  # products whose matrices do not fit shared memory
    by_steps: bool = False


RESIDENT = Form()


class Division(NamedTuple):
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


class Work(NamedTuple):
    """What there is to do at a step, and on which machine."""

    products: Sequence[Wanted]
    B: int
    widest: int  # units of the widest value, which are shared by parts
    item: int  # bytes of a number
    machine: Machine
    sums: int = 0  # along rows: blocks meet before each of them, as before each product


def divide(work: Work) -> Division:
    """The division with the least time for a step."""
    found = [each for each in (resident(work), by_steps(work)) if each is not None]
    if not found:
        raise MemoryError(
            f"scan: a step with {work.sums} sums along its rows does not fit a block of the "
            f"device, which has {work.machine.shared_bytes} bytes of shared memory; expected a "
            "smaller cell"
        )
    return min(found, key=lambda each: each.clocks)


def by_steps(work: Work) -> Division | None:
    """A step at a time, products of the vendor's; None without products, or without room."""
    machine, item = work.machine, work.item
    room = machine.shared_bytes // max(1, work.sums * item)  # each sum is of all rows
    if not work.products or not room:
        return None
    rows = min(room, max(1, -(-work.B // (8 * machine.processors))))
    groups = -(-work.B // rows)
    parts = max(1, min(2 * machine.processors // groups, -(-work.widest // machine.threads)))
    speed = COSTS.vendor_tf32 if machine.tf32 and item == 4 else COSTS.vendor
    clocks = COSTS.passing + (2 * len(work.products)) * COSTS.node
    for each in work.products:
        numbers = each.K * sum(each.widths)
        clocks += COSTS.product + max(
            work.B * numbers / (speed * machine.processors),
            numbers * item / (COSTS.streams * machine.processors),
        )
    shared = work.sums * rows * item
    return Division(groups, parts, rows, frozenset(), {}, shared, clocks, by_steps=True)


def resident(work: Work) -> Division | None:
    """All steps in a launch, or in several of a share of the batch; None without room."""
    found = []
    launches = 1
    while launches <= min(work.B, MOST_LAUNCHES):
        share = -(-work.B // launches)
        for rows in _powers(share):
            groups = -(-share // rows)
            if groups <= work.machine.processors:
                for parts in _counts(work.machine.processors // groups, work.widest):
                    found.append(weigh(work, groups, parts, rows, launches))
        launches *= 2
    there = [each for each in found if each is not None]
    return min(there, key=lambda each: each.clocks, default=None)


def _powers(most: int) -> list[int]:
    """1, 2, 4 and so on, and at last the most."""
    return [*(2**k for k in range((most - 1).bit_length())), most]


def _counts(most: int, widest: int) -> list[int]:
    """Numbers of parts to be tried: none whose shares are not smaller than those of fewer."""
    most = max(1, min(most, widest))
    fewest: dict[int, int] = {}
    for parts in _powers(most):
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


def weigh(work: Work, groups: int, parts: int, rows: int, launches: int = 1) -> Division | None:
    """This division and what a step takes with it; None if there is no room for it."""
    machine, item = work.machine, work.item
    waiting = COSTS.barrier + 5.0 * parts if parts > 1 else COSTS.meeting
    shapes = {}
    clocks = COSTS.passing * (1 + rows * -(-work.widest // parts) // machine.threads)
    clocks += waiting * (len(work.products) + work.sums)
    room = machine.shared_bytes - work.sums * rows * item
    for each in work.products:
        C = sum(padded(-(-width // parts)) for width in each.widths)
        shape = shapes[each.slot] = _shape(each.K, C, rows, item, machine)
        room -= shape.slices * rows * C * item
        clocks += COSTS.product + shape.clocks
    if room < 0:
        return None
    streamed, used = set(), machine.shared_bytes - room
    for each in sorted(work.products, key=lambda w: shapes[w.slot].K * shapes[w.slot].C):
        shape = shapes[each.slot]
        size = shape.K * shape.C * item
        if size <= room:
            room, used = room - size, used + size
        else:
            streamed.add(each.slot)
            clocks += size / COSTS.streams
    return Division(
        *(groups, parts, rows, frozenset(streamed), shapes, used, clocks * launches, launches)
    )
