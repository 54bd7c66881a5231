"""Layout: where everything of a run is in memory, and the words that tell the kernels.

A run has two blocks of memory, one that the way back needs (``kept``) and one that it does not
(``work``), and arrays of the caller. Kernels find all of it through words, one table of them for
each function. A word is a number, or a number counted from a *base*: the address of a block or of
an array, the first step, whatever else is known only when a run begins (``bases.py``). A layout
depends on sizes alone, so that runs of the same sizes share it.

Before the tables stand the phases of the run, as ``threads.py`` reads them.
Imports program, bases, division, gemm, library, memory, simd, threads, tiles and NumPy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from tinygrad_seq.kernels import gemm, library, memory, simd, tiles
from tinygrad_seq.kernels.bases import names, strided
from tinygrad_seq.kernels.division import (
    Sizes,
    chunk,
    count_groups,
    divide,
    edges_of,
    lines_of,
    steps_of_block,
)
from tinygrad_seq.kernels.threads import (
    AFTER,
    BEGUN,
    FROM_STEP,
    FUNCTION,
    PHASE_WORDS,
    TABLE,
    TASKS,
    TO_STEP,
)

from tinygrad_seq.program import Place, Plan, Product

Array = np.ndarray
WORTH_PACKING = 20_000  # numbers in matrices from which on all threads pack
# A processor that sees every eighth row asked for fetches rows far beyond the last: to write them,
# which takes them from another core if they are its own. So far apart are the buffers of tasks.
FETCHED_AHEAD = 64  # rows
MOST_APART = 2**18  # bytes; where rows are longer, it is not felt


class MatrixGradient(NamedTuple):
    """That of a captured matrix: aᵀ g, summed over all rows of all steps."""

    k: int  # which
    a: int  # the rows of the step whose values these are
    g: int
    groups: int  # of lines, each with a matrix of its own, and a gradient
    lines: int  # of each group in a row
    shape: tuple[int, int]  # of the gradient of one group's matrix, as it is made
    distance: int  # from row to row in memory: whole panels
    g_first: bool  # whether it is made as gᵀ a, which is its transpose

    @property
    def a_width(self) -> int:
        """Columns of a."""
        return self.shape[1 if self.g_first else 0]

    @property
    def g_width(self) -> int:
        return self.shape[0 if self.g_first else 1]


class Shared(NamedTuple):
    """What gradients of matrices share that are made of the same g."""

    g: int
    groups: int
    lines: int
    group: int  # which
    g_first: bool
    width: int  # columns of g


def _first_places(edges: Array) -> Array:
    """Where rows stand in their first place, in memory of two places for each part."""
    parts = [np.arange(low, high) + low for low, high in pairwise(edges)]
    return np.concatenate(parts)


class Layout:
    """The layout of one direction for some sizes.

    ``words`` are the names in the table of the direction's kernel, ``bases`` those of what ``fill``
    is given.
    """

    def __init__(
        self,
        plan: Plan,
        words: Sequence[str],
        direction: str,
        steps: int,
        keep: bool,  # whether the way back will need what is computed
        parts: int,  # of the batch, as counted for these sizes
        sizes: Sizes,
    ) -> None:
        self.plan, self.direction, self.program = plan, direction, plan.program(direction)
        self.steps, self.keep, self.sizes = steps, keep, sizes
        self.division = divide(plan, direction, steps, parts, sizes)
        self.groups = count_groups(plan, sizes)
        self.threads = self.division.threads
        self.first_places = _first_places(edges_of(sizes.B, self.division.regions))
        self.dtype = np.dtype(plan.dtype)
        self.item = self.dtype.itemsize
        self.bytes = {"work": 0, "kept": 0}
        self.values: dict[str, int] = {}  # of each word
        self.counted_from: dict[str, str] = {}  # the base of a word, if it has another name
        self.views: dict[str, tuple[int, tuple[int, ...]]] = {}  # arrays that the run looks into
        self.matrices: list[MatrixGradient] = []
        self._tables: dict[str, tuple[int, Sequence[str]]] = {}
        self._names: list[str] = []
        self._table(direction, words)
        # Memory is taken in this order.
        self._sizes()
        self._states()
        self._scratch()
        self._pack()
        if direction == "backward":
            self._results()
            self._record(plan.grads, "grads", "work", self.division.segment)
            self._outer()  # which asks where the record begins
        self.bases = names(plan, direction, len(sizes.captured))
        self._finish()

    # Words

    def take(self, name: str, size: int, block: str = "work") -> int:
        """Reserve bytes; the word of this name is where they begin."""
        offset = self.bytes[block]
        self._counted(name, offset, f"{block} block")
        self.bytes[block] = offset + -(-size // memory.ALIGNMENT) * memory.ALIGNMENT
        return offset

    def _counted(self, name: str, number: int, base: str) -> None:
        """The word of this name is a number counted from a base."""
        self.values[name], self.counted_from[name] = number, base

    def _take_array(self, name: str, shape: tuple[int, ...]) -> None:
        """Reserve memory for an array that the run looks into."""
        self.views[name] = self.take(name, int(np.prod(shape)) * self.item), shape

    def _table(self, function: str, names: Sequence[str]) -> None:
        self._tables[function] = (len(self._names), names)
        self._names += names

    def view(self, name: str, block: memory.Block) -> Array:
        offset, shape = self.views[name]
        return block.view(offset, shape, self.dtype)

    def _finish(self) -> None:
        """Nothing is added any more: phases and tables, and what each word is counted from."""
        number = {name: k for k, name in enumerate(self.bases)}
        phases = self._find_phases()
        self.phases = len(phases)
        first = self.phases * PHASE_WORDS
        template = [0] * first
        source = [0] * first
        for k, (function, tasks, s0, s1) in enumerate(phases):
            at, table = k * PHASE_WORDS, 8 * (first + self._tables[function][0])
            template[at + TABLE], template[at + TASKS] = table, tasks
            template[at + FROM_STEP], template[at + TO_STEP] = s0, s1
            template[at + BEGUN] = int(s1 < self.steps)
            source[at + FROM_STEP] = source[at + TO_STEP] = number["k0"]
        for name in self._names:
            base = name if name in number else self.counted_from.get(name, "")
            assert name in number or name in self.values, f"nothing says what {name} is"
            template.append(self.values.get(name, 0))
            source.append(number[base])
        self.functions = [function for function, *_ in phases]
        self.template, self.source = np.array(template, np.int64), np.array(source, np.int64)

    def link(self, addresses: Callable[[str], int]) -> None:
        """Write down where the compiled functions are."""
        found = {name: addresses(name) for name in dict.fromkeys(self.functions)}
        for k, name in enumerate(self.functions):
            self.template[k * PHASE_WORDS + FUNCTION] = found[name]

    def _find_phases(self) -> list[tuple[str, int, int, int]]:
        """Function, tasks, first and last step of what is done, one after another.

        The way back goes by segments, and after each come its shares of the large products: what
        they are made of is still near then, and its memory is used again. Where these are made of
        no more rows than the task itself has done, it goes on at once, segment after segment.
        """
        phases: list[tuple[str, int, int, int]] = []
        if "pack" in self._tables:
            phases.append(("pack", self.values["pack_tasks"], 0, 0))
        if self.direction == "forward":
            return [*phases, ("forward", self.division.tasks, 0, self.steps)]
        tasks, segment = self.division.tasks, self.division.segment
        for s0 in range(0, max(self.steps, 1), segment)[::-1]:
            s1 = min(s0 + segment, self.steps)
            phases.append(("backward", tasks, s0, s1))
            tasks = AFTER if self.division.alone else tasks
            if "outer" in self._tables:
                phases.append(("outer", tasks, s0, s1))
        if "join" in self._tables:
            phases.append(("join", self.division.tasks, 0, 0))
        return phases

    def fill(self, bases: Sequence[int] | Array) -> Array:
        """The words of one run, or of several, (..., words) from bases (..., bases)."""
        given = np.asarray(bases, np.int64)
        # Of a single run without the dots, with which it takes 1 µs more.
        found = given[self.source] if given.ndim == 1 else given[..., self.source]
        words: Array = self.template + found
        return words

    # Sizes

    def width(self, slot: int) -> int:
        at = self.plan.classes[slot]
        return self.sizes.widths[at] if at < self.plan.forward_count else 1

    def _sizes(self) -> None:
        """Words that are sizes."""
        plan, values, sizes, division = self.plan, self.values, self.sizes, self.division
        values |= {
            "B": sizes.B,
            "onward": sizes.onward,
            "slots": 2 if self.keep and sizes.resets else 1,
            "block": division.block,
            "chunk": chunk(sizes.B),
            "edges_steps": division.edge_steps,
            "edges_bytes": 8 * (division.tasks + 1),
            "part_tasks": division.tasks // division.regions,
            "kept_on": int(self.keep),  # 0: each step writes over the one before
        }
        for slot in plan.classes:
            values[f"w{slot}"] = sizes.widths[slot] if slot < plan.forward_count else 1
        for slot, start in sizes.starts:
            values[f"start{slot}"] = start
        for k, (shape, strides) in enumerate(sizes.captured):
            shared = len(shape) != 2 or (shape[0] == 1 and sizes.B != 1)  # by all rows
            values[f"capture{k}_b"] = 0 if shared else strides[0]

    # Memory

    def _states(self) -> None:
        """Memory for states and kept values: of all steps, or of the newest ones only."""
        sizes, plan = self.sizes, self.plan
        block = "kept" if self.keep else "work"
        for k, slot in enumerate(plan.state_slots):
            all_steps = self.keep and k in plan.states_kept
            count = self.steps * self.values["slots"] + 1 if all_steps else 2
            self.values[f"state{k}_places"] = count
            self.take(f"state{k}", count * sizes.B * self.width(slot) * self.item, block)
            self.values[f"state{k}_mask"] = -1 if all_steps else 1
        self._record(plan.kept, "kept", block, self.steps if self.keep else 1)

    def _record(self, slots: Sequence[int], name: str, block: str, steps: int) -> None:
        """Memory for so many values of each row and step, one beside the other."""
        offset, lanes = 0, simd.lanes(self.plan.dtype)
        for slot in slots:
            self.values[f"{name}{slot}"] = offset * self.item
            offset += -(-self.width(slot) // lanes) * lanes
        self.values[f"{name}_bytes"], self.values[f"{name}_steps"] = offset * self.item, steps
        self.take(name, (steps * self.sizes.B * offset + lanes) * self.item, block)

    def _scratch(self) -> None:
        """The buffers of all tasks, side by side."""
        panel, lanes = gemm.panel(self.plan.dtype), simd.lanes(self.plan.dtype)
        total, longest, division = 0, 0, self.division
        for buffer in self.program.scratch:
            unit = panel if buffer.panels else lanes
            width = self.width(buffer.slot) + self._behind(Place("scratch", buffer.slot))
            distance = -(-max(1, width) // unit) * unit
            if distance * self.item % 4096 == 0:
                distance += lanes  # rows must not all fall into the same lines of the cache
            self.values[f"z{buffer.slot}"] = total
            self.values[f"z{buffer.slot}_row"] = distance
            longest = max(longest, distance * self.item)
            rows = division.rows * (division.block if buffer.block else 1)
            total += -(-rows * distance * self.item // 64) * 64
        apart = min(FETCHED_AHEAD * longest, MOST_APART) if division.tasks > 1 else 64
        self.values["scratch_bytes"] = total + apart
        self.take("scratch", (total + apart) * division.tasks)

    def _behind(self, place: Place) -> int:
        """Room behind rows of a place: products of lines write whole vectors, beyond the last."""
        of_lines = any(each.lines and each.into == place for each in self.program.products())
        return simd.lanes(self.plan.dtype) if of_lines else 0

    # The shared functions

    def _pack(self) -> None:
        """Memory for packed matrices, and the table of the packing."""
        panel, values, division = gemm.panel(self.plan.dtype), self.values, self.division
        count = work = split = 0
        names = ["pack_count", "pack_tasks"]
        for k, transposed in self.program.matrices:
            shape, strides = self.sizes.captured[k]
            (K, N), (row, column) = shape, (s // self.item for s in strides)
            groups = self.groups.get(k, 1)
            K //= groups
            apart = K * strides[0]  # bytes from the matrix of a group to that of the next
            if transposed:
                K, N, row, column = N, K, column, row
            panels = -(-N // panel)
            name = f"m{k}" + ("t" if transposed else "")
            in_tiles = (row == 1 or column == 1) and self._in_tiles(k, transposed, K, N)
            values[f"{name}_tiles"] = int(in_tiles)
            values |= {f"{name}_row": row, f"{name}_column": column}
            values |= {f"{name}_K": K, f"{name}_N": N, f"{name}_panels": panels}
            values[f"{name}_wide"] = -(-N // simd.lanes(self.plan.dtype))  # vectors
            values[f"{name}_groups"] = groups
            packed = panels * K * panel * self.item
            if in_tiles:
                packed = tiles.matrix_bytes(K, N)
                split = max(split, tiles.split_bytes(K, division.rows * division.block))
            values[f"{name}_bytes"] = packed
            at = self.take(name, packed * groups)
            for group in range(groups):
                source, to = f"capture{k}_{group}", f"{name}_{group}"
                self._counted(source, group * apart, f"capture{k}")
                self._counted(to, at + group * packed, "work block")
                names += [source, f"{name}_row", f"{name}_column", f"{name}_K", f"{name}_N"]
                names += [to, f"{name}_panels", f"{name}_tiles"]
            count += groups
            work += groups * K * N
        if self.program.matrices:
            values["pack_count"] = count
            values["pack_tasks"] = division.tasks if work > WORTH_PACKING else 1
            self._table("pack", names)
            values["split_bytes"] = split
            self.take("split", split * division.tasks)

    def _in_tiles(self, k: int, transposed: bool, K: int, N: int) -> bool:
        """Whether a matrix is packed for tiles: by shapes alone, so that sums are the same."""
        if not self.division.in_tiles:
            return False

        def those(*sections: str) -> list[Product]:
            products = self.program.products(*sections)
            return [p for p in products if (p.matrix, p.transposed) == (k, transposed)]

        if any(each.lines for each in those()):  # tiles write further beyond
            return False
        given = self.plan, self.direction, 1, self.division.segment, self.sizes  # 1: by one task
        return tiles.worth(self.sizes.B * (1 if those("loop") else steps_of_block(*given)), K, N)

    def _results(self) -> None:
        """Memory for gradients that are added up on the way."""
        plan, B = self.plan, self.sizes.B

        for k, after in enumerate(plan.gradients.after):
            if after is not None:
                width, panel = self.width(plan.state_slots[k]), gemm.panel(plan.dtype)
                distance = -(-(width + self._behind(Place("before", k))) // panel) * panel
                self.values[f"dstate{k}_row"] = distance * self.item
                self._take_array(f"dstate{k}", (2 * B, distance))  # now, and a step later
                self.values[f"dreset{k}"] = 0  # nowhere
                if self.sizes.resets:
                    self._take_array(f"dreset{k}", (B, width))
        slots = {row.detail: slot for slot, row in enumerate(plan.rows) if row.op == "capture"}
        for k in {k for _, k in plan.gradients.sums}:
            per_row = self.values[f"capture{k}_b"] != 0
            width = self.sizes.widths[slots[k]]
            row, rows = width * self.item, chunk(B)
            self._take_array(f"sum{k}", (B if per_row else -(-B // rows), width))
            self.values[f"sum{k}_chunk"] = row * rows if per_row else row
            self.values[f"sum{k}_b"] = row if per_row else 0

    def _outer(self) -> None:
        """The table of the large products: those that share g stand together."""
        self.matrices = [self._matrix(*each) for each in self.plan.gradients.outer]
        if not self.matrices:
            return
        rows = -(-self.sizes.B // self.division.parts) * self.division.segment
        rows = min(gemm.KC, rows * max(matrix.lines for matrix in self.matrices))  # at once
        sizes = [(matrix.a_width, matrix.g_width) for matrix in self.matrices]
        in_tiles = self.division.in_tiles and rows >= tiles.SPAN and tiles.filled(sizes)

        def packed(columns: int) -> int:
            if in_tiles:
                return tiles.block_bytes(rows, columns)
            return gemm.packed_bytes(self.plan.dtype, columns)

        names = [*_named("outer", library.T_WORDS), *self._outer_parts()]
        shared = self._shared()
        for which, (of, numbers) in enumerate(shared.items()):
            names += self._outer_of(f"outer_g{which}", of, numbers, packed, in_tiles)
        G = max(of.width for of in shared)
        widths = [[self.matrices[n].a_width for n in numbers] for numbers in shared.values()]
        a_bytes = max(sum(map(packed, each)) for each in widths)
        self.values["outer_count"] = len(shared)
        self._outer_scratch(packed(G if in_tiles else min(G, gemm.AT_ONCE)), a_bytes, in_tiles)
        self._table("outer", names)
        if self.division.parts > 1:
            self._join([f"outer_m{n}_{of.group}" for of, each in shared.items() for n in each])

    def _shared(self) -> dict[Shared, list[int]]:
        """The numbers of the matrices whose gradients are made of the same g."""
        found: dict[Shared, list[int]] = {}
        for n, m in enumerate(self.matrices):
            for group in range(m.groups):
                of = Shared(m.g, m.groups, m.lines, group, m.g_first, m.g_width)
                found.setdefault(of, []).append(n)
        return found

    def _outer_parts(self) -> list[str]:
        """The names of the words of each part of the batch: which rows, and where they lie."""
        division, names = self.division, []
        self.values["outer_parts"], self.values["outer_slabs"] = division.parts, division.slabs
        for part, (first, last) in enumerate(pairwise(edges_of(self.sizes.B, division.parts))):
            low, high = (first, last) if division.regions > 1 else (0, self.sizes.B)
            found = {"first": first, "last": last, "low": low, "rows": high - low}
            self.values |= {f"part{part}_{name}": int(value) for name, value in found.items()}
            names += _named(f"part{part}", library.P_WORDS)
        return names

    def _outer_of(
        self,
        name: str,
        of: Shared,
        numbers: Sequence[int],
        packed: Callable[[int], int],
        in_tiles: bool,
    ) -> list[str]:
        """The names of the words of a g, and of each a that goes with it, and memory for sums."""
        values, before = self.values, of.group * of.lines
        names = self._operand(name, of.g, of.width, before, library.G_WORDS)
        by = library.BY_A
        if not in_tiles:
            by = self._by_wide_side(of.width, [self.matrices[n].a_width for n in numbers])
        values[f"{name}_lines"], values[f"{name}_count"] = of.lines, len(numbers)
        values[f"{name}_how"] = library.TURNED if of.g_first else by
        begin = 0  # where each a is packed, one after the other
        for n in numbers:
            matrix, name = self.matrices[n], f"outer_m{n}_{of.group}"
            names += self._operand(name, matrix.a, matrix.a_width, before, library.A_WORDS)
            size = matrix.shape[0] * matrix.distance
            self._counted(f"{name}_out", of.group * size * self.item, f"outer_m{n}_out")
            values[f"{name}_out_row"], values[f"{name}_size"] = matrix.distance, size
            self.take(f"{name}_parts", (self.division.parts - 1) * size * self.item)
            values[f"{name}_packed"] = begin
            begin += packed(matrix.a_width)
        return names

    def _outer_scratch(self, g_bytes: int, a_bytes: int, in_tiles: bool) -> None:
        """Memory of each task for what it packs: a slab of g, and of all that goes with it."""
        values, division = self.values, self.division
        values["outer_tasks"] = division.tasks
        values["outer_g_bytes"], values["outer_a_bytes"] = g_bytes, a_bytes
        listed = (16 * division.slabs + 8) * gemm.KC
        values["outer_bytes"] = listed + (g_bytes + a_bytes) * division.slabs + gemm.CACHE_LINE
        at = self.take("outer_scratch", values["outer_bytes"] * division.tasks)
        values["outer_tiles"] = 0
        if in_tiles:  # the last line of a task's scratch says what shape the tiles have
            tiles_at = at + values["outer_bytes"] - gemm.CACHE_LINE
            self._counted("outer_tiles", tiles_at, "work block")

    def _join(self, names: Sequence[str]) -> None:
        """The table for adding the sums of other parts to those of the first, in the end."""
        self.values["join_others"], self.values["join_count"] = self.division.parts - 1, len(names)
        words = [f"{name}_{word}" for name in names for word in ("out", "parts", "size")]
        self._table("join", ["outer_tasks", "join_others", "join_count", *words])

    def _by_wide_side(self, G: int, widths: Sequence[int]) -> int:
        """How products aᵀ g are better divided: by columns of g, of which each task packs its own,
        or by those of each a. Packing a column is taken for as long as 11 of its products.
        """
        shares = max(1, self.division.tasks // self.division.parts)

        def share(columns: int, unit: int) -> int:
            units = -(-columns // unit)
            return min(-(-units // shares) * unit, columns)

        A, mine = sum(widths), share(G, gemm.panel(self.plan.dtype))
        others = sum(share(width, gemm.ROWS) for width in widths)
        by_g = mine * A + 11 * (mine + A) < G * others + 11 * (G + others)
        return library.BY_G if by_g else library.BY_A

    def _matrix(self, a: int, g: int, k: int) -> MatrixGradient:
        """A gradient in the order in which the matrix lies, or in the one that costs much less."""
        panel, lanes = gemm.panel(self.plan.dtype), simd.lanes(self.plan.dtype)

        def cost(m: int, n: int) -> int:
            return max(m, 4) * (-(-n // lanes) * lanes)

        (K, N), strides = self.sizes.captured[k]
        lines, groups = lines_of(self.width(a), (K, N)), self.groups.get(k, 1)
        K //= groups
        g_first = strides[0] < strides[1]
        if 2 * cost(K, N) < cost(N, K) or 2 * cost(N, K) < cost(K, N):
            g_first = cost(N, K) < cost(K, N)
        shape = (N, K) if g_first else (K, N)
        distance = -(-shape[1] // panel) * panel
        return MatrixGradient(k, a, g, groups, lines, shape, distance, g_first)

    def _operand(
        self, name: str, slot: int, width: int, before: int, words: Sequence[str]
    ) -> list[str]:
        """The names of an operand's words, the first of which say where its rows are: those of an
        array of the caller by step and row; those of a record by place, some to a step, and row.

        Of each row it is lines of ``width`` units, after the ``before`` lines of earlier groups.
        """
        row, values = self.plan.rows[slot], self.values
        found = {"user": 0, "kept": 0, "places": 0, "width": width}
        begin, where = before * width * self.item, f"{row.op}{row.detail}"
        at: dict[str, str] = {}  # words that the kernels of the loop have too
        if row.op == "x":
            found["user"] = 1
            at = dict(zip(("step", "row"), strided(where)[1:], strict=True))
        elif row.op == "state":
            at = {"places": f"{where}_places", "step": "slots"}
            found |= {"kept": 1, "row": self.width(slot) * self.item}
        else:
            where, begin = "grads", begin + values[f"grads{slot}"]
            at = {"places": "grads_steps", "row": "grads_bytes"}
            found["step"] = 1
        values |= {f"{name}_{word}": value for word, value in found.items()}
        base = self.counted_from.get(where, where)  # x is a base itself
        self._counted(f"{name}_base", begin + values.get(where, 0), base)
        return [at.get(word, f"{name}_{word}") for word in words]


def _named(name: str, words: Sequence[str]) -> list[str]:
    """The names of words: those that many tables have, or this one's own."""
    shared = {"active", "active_bytes", "k0", "batch", "begin", "onward"}
    return [word if word in shared else f"{name}_{word}" for word in words]


def in_turns(
    layouts: Sequence[Layout], bases: Sequence[Array], steps: int, pack: bool, join: bool
) -> tuple[Array, int]:
    """One run made of many: for each stretch of steps the phases of each layout. Words, and phases.

    A stretch goes from one checkpoint to the next. ``bases`` (stretches, bases) for each layout. It
    ends at ``steps`` if that is earlier, and phases that begin later fall out. Matrices are packed
    in the first stretch if ``pack``, sums of parts joined after the last one if ``join``.
    """
    words = [layout.fill(each) for layout, each in zip(layouts, bases, strict=True)]
    heads, tables, functions = [], [], []
    for layout, each in zip(layouts, words, strict=True):
        end = layout.phases * PHASE_WORDS
        heads.append(each[:, :end].reshape(len(each), layout.phases, PHASE_WORDS))
        tables.append(each[:, end:])
        functions += layout.functions
    phases = np.concatenate(heads, axis=1)
    packs, joins = (np.array([name == each for name in functions]) for each in ("pack", "join"))
    wanted = (phases[:, :, FROM_STEP] < steps) & ~packs & ~joins
    wanted[0] |= packs & pack
    wanted[-1] |= joins & join
    count, at, first = int(wanted.sum()), 0, 0
    for layout, table in zip(layouts, tables, strict=True):
        done = slice(first, first + layout.phases)
        begin = first + (wanted & ~packs)[:, done].argmax(axis=1)  # where each stretch begins
        phases[np.arange(len(phases)), begin, TASKS] = layout.division.tasks
        begins = 8 * (count - layout.phases) * PHASE_WORDS + 8 * at
        begins += 8 * table.shape[1] * np.arange(len(table))
        phases[:, done, TABLE] += begins[:, None]
        first += layout.phases
        at += table.size
    phases[:, :, TO_STEP] = np.minimum(phases[:, :, TO_STEP], steps)
    phases[:, :, BEGUN] = phases[:, :, TO_STEP] < steps
    return np.concatenate([phases[wanted].ravel(), *(table.ravel() for table in tables)]), count
