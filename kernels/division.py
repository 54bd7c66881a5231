"""Division: into which pieces a run is cut, its rows among threads and its steps one after another.

The rows of the batch, in the order of the run: *chunks*, whose sums are made together; *parts*, a
few, over which gradients of matrices are summed apart; *tasks*, each some whole chunks, which
threads take. The steps: *segments*, after each of which the large products take in what it has left
for them; in these, *blocks*, whose products outside the loop are made at once.

Where sums are made together depends on sizes alone, never on threads: so they have the same bits.
Imports program, gemm, tiles and NumPy.
"""

from __future__ import annotations

from math import lcm
from typing import NamedTuple

import numpy as np
from tinygrad_seq.kernels import gemm, tiles

from tinygrad_seq.program import Plan, Program

Array = np.ndarray
MOST_CHUNKS = 16  # of the batch
PARTS = 2  # of the batch
MOST_IN_PARTS = 2**19  # bytes of all sums of a part; more would not stay near
MOST_IF_DEALT = 2**23  # the same where rows are dealt: not to wait is worth more there
FEWEST_DEALT = 16  # rows of different lengths from which on each part has some of every length
FAR_SUMS = 2**22  # bytes of sums from which on they are far away
ALL_STEPS = 2**62  # more than any run has
WORTH_THREADS = 4e6  # arithmetic operations below which one thread is quicker
BLOCK_ROWS = 32  # rows that a product outside the loop should have at least
FAR_BLOCK_ROWS = 96  # if its matrix does not fit the second cache
NEAR_MATRIX = 2**19  # bytes of a matrix that does
NEAR_ROWS = 2**19  # bytes of rows, and all that a step has of them, that do


class Sizes(NamedTuple):
    """All that a layout depends on, beside the plan."""

    B: int
    ragged: bool  # whether some row has fewer steps than there are
    onward: int  # 1, or -1 for a run from the last step to the first
    resets: bool
    threads: int
    widths: tuple[int, ...]  # of each row of the step
    starts: tuple[tuple[int, int], ...]  # of its slices
    captured: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]  # shapes and strides


class Division(NamedTuple):
    """How the run of one direction is divided."""

    threads: int
    tasks: int
    parts: int
    edges: Array  # rows where tasks begin, and where the last one ends, if all are as long
    by_lengths: bool  # they are not: tasks begin where each has about the same work
    edge_steps: int  # steps for which the edges of tasks hold
    rows: int  # of a task, at most
    regions: int  # 1, or parts if rows of a part lie together in memory
    alone: bool  # whether tasks have whole parts, and need not wait for each other
    segment: int  # steps
    block: int  # steps
    slabs: int  # of KC rows, that the large products take in at once
    in_tiles: bool  # whether products are done by tiles where that is quicker


def divide(plan: Plan, direction: str, steps: int, parts: int, sizes: Sizes) -> Division:
    """Divide a run over so many steps, its batch into as many parts as were counted."""
    B, backward = sizes.B, direction == "backward"
    in_tiles = tiles.used(plan.dtype) and B * steps >= tiles.WORTH_PACKING
    threads = _count_threads(plan, steps, sizes)
    tasks = _count_tasks(plan, threads, parts, sizes)
    alone = parts % tasks == 0
    by_lengths = sizes.ragged and not alone
    slabs, segment = 1, steps
    if backward:  # a segment fills the slabs of a part, and leaves no few rows for one more
        far = bytes_of_sums(plan, sizes) >= FAR_SUMS and not in_tiles
        slabs = gemm.FAR_SLABS if far else 1
        rows = -(-B // parts) * _fewest_lines(plan, sizes)  # of a step
        segment = max(1, min(steps, gemm.KC * slabs // rows))
    return Division(
        threads=threads,
        tasks=tasks,
        parts=parts,
        edges=edges_of(B, tasks),
        by_lengths=by_lengths,
        # Where all wait for each other after a segment, rows have ended, and each segment has
        # edges of its own.
        edge_steps=segment if backward and by_lengths else ALL_STEPS,
        rows=int(np.diff(edges_of(B, parts if sizes.ragged else tasks)).max(initial=0)),
        regions=1 if tasks % parts else parts,  # no task is of two parts
        alone=alone,
        segment=segment,
        block=steps_of_block(plan, direction, tasks, segment, sizes),
        slabs=slabs,
        in_tiles=in_tiles,
    )


# Rows ------------------------------------------------------------------------------------------


def chunk(B: int) -> int:
    """Rows of a chunk."""
    return max(1, -(-B // MOST_CHUNKS))


def _chunks(B: int) -> int:
    return -(-B // chunk(B))


def edges_of(B: int, count: int) -> Array:
    """Rows where so many parts or tasks begin, whole chunks each, and where the last one ends."""
    return np.minimum(np.arange(count + 1) * _chunks(B) // count * chunk(B), B)


def count_parts(plan: Plan, sizes: Sizes) -> int:
    """In how many parts the batch is where gradients of matrices are summed over its rows.

    A core that does the steps of its part can sum over them without another's, and need not wait
    for it. Rows of different lengths are dealt to the parts, which have about the same work then.
    """
    fewest, most = (FEWEST_DEALT, MOST_IF_DEALT) if sizes.ragged else (PARTS, MOST_IN_PARTS)
    return PARTS if fewest <= sizes.B and bytes_of_sums(plan, sizes) <= most else 1


def bytes_of_sums(plan: Plan, sizes: Sizes) -> int:
    """Bytes of the gradients of matrices."""
    if plan.derivative is None:
        return 0
    matrices = [sizes.captured[k][0] for *_, k in plan.gradients.outer]
    return sum(K * N for K, N in matrices) * np.dtype(plan.dtype).itemsize


def count_groups(plan: Plan, sizes: Sizes) -> dict[int, int]:
    """Of each captured tensor that lines are multiplied by, how many matrices it is.

    Each group of lines has one. a is L lines of K units, what comes of them L lines of N, and the
    tensor (groups K, N).
    """
    found, widths = {}, sizes.widths
    for slot, row in enumerate(plan.rows[: plan.forward_count]):
        if row.op == "matmul_lines":
            a, matrix = row.inputs
            k = plan.rows[matrix].detail
            K = widths[a] // (widths[slot] // widths[matrix])
            found[k] = sizes.captured[k][0][0] // K
    return found


def lines_of(a: int, matrix: tuple[int, ...]) -> int:
    """How many lines a row of ``a`` units has for a matrix of this shape, 1 if it is no lines.

    Where matrices are one under the other, and this is the shape of all, those of each group.
    """
    return max(1, a // max(1, matrix[0]))


def _fewest_lines(plan: Plan, sizes: Sizes) -> int:
    """Of those that a row has for the gradients of matrices, which are summed over them."""
    outer = plan.gradients.outer
    return min((lines_of(sizes.widths[a], sizes.captured[k][0]) for a, _, k in outer), default=1)


def _count_threads(plan: Plan, steps: int, sizes: Sizes) -> int:
    flops = 0
    for row in plan.rows[: plan.forward_count]:
        if row.op in ("matmul", "matmul_lines"):
            flops += 2 * sizes.widths[row.inputs[0]] * sizes.widths[row.inputs[1]]
    work = (flops + 50 * sum(sizes.widths)) * sizes.B * steps
    return min(sizes.threads, _chunks(sizes.B)) if work > WORTH_THREADS else 1


def _count_tasks(plan: Plan, threads: int, parts: int, sizes: Sizes) -> int:
    """One for each thread; where rows were dealt to parts, as many for each part.

    More where rows are so wide that those of a task would not stay near, if no product in a loop
    is the quicker the more rows it has; one of lines is not, as a single row has many of them. The
    same forward and backward, which share what is kept.
    """
    most, count = _chunks(sizes.B), threads
    if sizes.ragged and parts > 1:
        each = lcm(threads, parts)
        count = each if each <= most else threads // parts * parts
    programs = [plan.forward] if plan.backward is None else [plan.forward, plan.backward]
    products = [each for program in programs for each in program.products("loop")]
    if all(each.choice or each.lines for each in products):
        row = max(_bytes_of_row(plan, program, sizes) for program in programs)
        while 2 * count <= most and -(-sizes.B // count) * row > NEAR_ROWS:
            count *= 2
    return count


def _bytes_of_row(plan: Plan, program: Program, sizes: Sizes) -> int:
    """What a step in the loop reads and writes of a row: the states, and values in memory."""
    slots = [buffer.slot for buffer in program.scratch if not buffer.block]
    classes = [plan.classes[slot] for slot in (*slots, *plan.state_slots, *plan.state_slots)]
    widths = [sizes.widths[at] for at in classes if at < plan.forward_count]
    return sum(widths) * np.dtype(plan.dtype).itemsize


# Steps -----------------------------------------------------------------------------------------


def steps_of_block(plan: Plan, direction: str, tasks: int, segment: int, sizes: Sizes) -> int:
    """Steps of a block: enough rows for a product outside the loop, if so many tasks share them."""
    program = plan.program(direction)
    if not program.sections["early"] and not program.sections["late"]:
        return 1
    products = program.products("early", "late")
    counts = [int(np.prod(sizes.captured[each.matrix][0])) for each in products]
    far = max(counts, default=0) * np.dtype(plan.dtype).itemsize > NEAR_MATRIX
    rows = FAR_BLOCK_ROWS if far else BLOCK_ROWS
    return max(1, min(segment, -(-rows * tasks // sizes.B)))
