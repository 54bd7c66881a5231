"""Running a plan on the CPU: memory laid out, matrices packed, tables filled, threads sent.

``Runner(plan, rules)`` compiles a plan when it is first needed and runs it over arrays. Nothing of
one run is left for the next but compiled code. Shapes: T steps, B rows.
Imports build, threads, text, memory, gemm, simd and NumPy; it sees arrays, never a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from tinygrad_seq.kernels import build, gemm, memory, simd, text, threads
from tinygrad_seq.kernels.threads import Phase

Array = np.ndarray
MOST_CHUNKS = 16  # in so many parts, at most, sums over the batch are made
WORTH_THREADS = 4e6  # arithmetic operations below which one thread is quicker
BLOCK_ROWS = 32  # rows that a product outside the loop should have at least
FAR_BLOCK_ROWS = 96  # if its matrix does not fit the second cache
NEAR = 2**19  # bytes of a matrix that does


class Rows(NamedTuple):
    """In which order rows and steps are run through.

    Row r of a run is row ``batch[r]`` of the batch, the longest first. At step s it is at time
    ``begin[r] + s * onward``, and rows 0 to ``active[s]`` have not ended.
    """

    T: int
    B: int
    steps: int
    batch: Array
    begin: Array
    active: Array
    onward: int

    @property
    def ragged(self) -> bool:
        """Whether some row has fewer than T steps."""
        return self.steps < self.T or self.active[self.steps - 1] < self.B


@cache
def _dense_rows(T: int, B: int, reverse: bool) -> Rows:
    begin = np.full(B, T - 1 if reverse else 0)
    return Rows(T, B, T, np.arange(B), begin, np.full(T + 1, B), -1 if reverse else 1)


def rows_of(T: int, B: int, lengths: Array | None, reverse: bool) -> Rows:
    """The order of rows for lengths (B,), None if all are T."""
    if lengths is None:
        return _dense_rows(T, B, reverse)
    batch = np.argsort(-lengths, kind="stable")
    ordered = lengths[batch]
    active = np.searchsorted(-ordered, -np.arange(T + 1), side="left")
    begin = ordered - 1 if reverse else np.zeros(B, np.int64)
    return Rows(T, B, int(ordered[0]), batch, begin, active, -1 if reverse else 1)


@dataclass
class Inputs:
    """The arrays of a run."""

    rows: Rows
    xs: Sequence[Array]  # (T, B, n) or (T, B), any strides but in the last axis
    states: Sequence[Array]  # (B, n), in the order of the batch
    resets: Array | None  # (T, B) bool
    reset_states: Sequence[Array]
    captured: Sequence[Array]  # matrices (K, N), others () to (B, n)
    numbers: Any  # of the cell, in the order of its rows
    widths: Sequence[int]  # of each row of the step
    starts: Mapping[int, int]  # of its slices
    checkpoint: int | None = None
    addresses: dict[str, int] = field(default_factory=dict)  # found when first needed


class Kept(NamedTuple):
    """What a forward run leaves for the way back."""

    inputs: Inputs
    block: memory.Block | None  # states and kept values of each step
    checkpoints: list[Sequence[Array]]  # or else the states at the start of each segment


class Gradients(NamedTuple):
    """What a backward run gives; None where nothing was wanted."""

    xs: list[Array | None]  # (T, B, n)
    states: list[Array | None]  # (B, n)
    reset_states: list[Array | None]  # (B, n)
    captured: dict[int, Array]


class Matrix(NamedTuple):
    """A gradient of a captured matrix: aᵀ g, summed over all rows of all steps."""

    k: int  # which
    a: int  # the rows of the step whose values these are
    g: int
    shape: tuple[int, int]
    distance: int  # from row to row in memory: whole panels
    g_first: bool  # whether it is made as gᵀ a, which is its transpose


class Layout:
    """Where everything is in the memory of a run, and the table that says so, but for addresses.

    It depends on sizes alone, so runs of the same sizes share it. A word is a size, an offset into
    one of the two blocks of memory (what is kept, what is not), or an address of the caller's.
    """

    def __init__(self) -> None:
        self.values: dict[str, int] = {}
        self.inner: dict[str, str] = {}  # words that are offsets, and into which block
        self.bytes = {"work": 0, "kept": 0}
        self.names: list[str] = []
        self.tables: dict[str, int] = {}  # where the table of each function begins
        self.tasks = 1
        self.pack_tasks = 0
        self.views: dict[str, tuple[int, tuple[int, ...]]] = {}  # arrays that the run looks into
        self.zeroed = (0, 0)
        self.matrices: list[Matrix] = []
        self.held: list[Any] = []
        self.segment = 1  # steps that are done before the large products take them in

    def take(self, name: str, size: int, block: str = "work") -> int:
        """Reserve bytes; the word of this name is where they begin."""
        offset = self.bytes[block]
        self.values[name], self.inner[name] = offset, block
        self.bytes[block] = offset + -(-size // memory.ALIGNMENT) * memory.ALIGNMENT
        return offset

    def table(self, function: str, names: Sequence[str]) -> None:
        self.tables[function] = len(self.names)
        self.names += names

    def finish(self) -> None:
        """Nothing is added any more: make the table and note which words change."""
        self.template = np.array([self.values.get(name, 0) for name in self.names], np.int64)
        blocks: dict[str, list[int]] = {"work": [], "kept": []}
        places = []
        for k, name in enumerate(self.names):
            if name in self.inner:
                blocks[self.inner[name]].append(k)
            elif name not in self.values:
                places.append(k)
        self.places = np.array(places, np.int64)
        self.wanted = [self.names[k] for k in places]
        self.shifted = {block: np.array(found, np.int64) for block, found in blocks.items()}

    def named(self, name: str) -> list[int]:
        """Where a word stands."""
        return [k for k, each in enumerate(self.names) if each == name]

    def fill(
        self, work: memory.Block, kept: memory.Block | None, addresses: Mapping[str, int]
    ) -> Array:
        """The table of one run."""
        table = self.template.copy()
        table[self.shifted["work"]] += work.address
        if kept is not None:
            table[self.shifted["kept"]] += kept.address
        table[self.places] = [addresses[name] for name in self.wanted]
        return table

    def view(self, name: str, block: memory.Block, dtype: Any) -> Array:
        offset, shape = self.views[name]
        return block.view(offset, shape, dtype)


def address(array: Array) -> int:
    """Where an array's memory begins."""
    return array.__array_interface__["data"][0]


class Runner:
    """A plan and its compiled functions."""

    def __init__(self, plan: Any, rules: Any) -> None:
        self.plan, self.rules = plan, rules
        self.dtype = np.dtype(plan.dtype)
        self.item = self.dtype.itemsize
        self.functions: dict[str, Any] = {}
        self._words: dict[str, list[str]] = {}
        self._layouts: dict[Any, Layout] = {}

    # Compiled code

    def source(self, direction: str) -> str:
        """The text of a direction."""
        program = getattr(self.plan, direction)
        source, words = text.module_text(self.plan, self.rules, {direction: program})
        self._words[direction] = words[direction]
        return source

    def file(self, direction: str) -> tuple[str, Any]:
        """The text of a direction and the file that it is compiled from."""
        source = self.source(direction)
        return source, build.write_module(f"{self.plan.name}_{direction}", source)

    def _function(self, direction: str) -> Any:
        """The compiled function of a direction."""
        if direction not in self.functions:
            with build.said(f"{self.plan.name}, {direction}"):
                source = self.source(direction)
                name = f"{self.plan.name}_{direction}"
                self.functions[direction] = build.load(name, source, (direction,))[direction]
        return self.functions[direction]

    # Layout

    def _layout(self, direction: str, inputs: Inputs, s0: int, s1: int, keep: bool) -> Layout:
        """The layout of a run over steps s0 to s1, made if these sizes are new."""
        rows = inputs.rows
        if direction not in self._words:
            self.source(direction)
        key = None
        if not rows.ragged:
            key = (
                *(direction, rows.T, rows.B, s0, s1, rows.onward, keep, inputs.resets is None),
                *(threads.get_num_threads(), inputs.checkpoint is None),
                *(tuple(inputs.widths), tuple(inputs.starts.values())),
                *[x.strides for x in inputs.xs],
                *[(c.shape, c.strides) for c in inputs.captured],
            )
            found = self._layouts.get(key)
            if found is not None:
                return found
        layout = self._make_layout(direction, inputs, s0, s1, keep)
        if key is not None:
            if len(self._layouts) > 256:
                self._layouts.clear()
            self._layouts[key] = layout
        return layout

    def _make_layout(self, direction: str, inputs: Inputs, s0: int, s1: int, keep: bool) -> Layout:
        plan, rows = self.plan, inputs.rows
        program = getattr(plan, direction)
        layout = Layout()
        edges = self._tasks(inputs)
        layout.tasks = len(edges) - 1
        layout.held = [edges, rows.batch, rows.begin, rows.active]
        slots = 2 if keep and inputs.resets is not None else 1
        layout.segment = s1 - s0
        if direction == "backward":  # so many rows as a large product takes in at once
            layout.segment = max(1, min(s1 - s0, -(-gemm.KC // rows.B)))
        block = self._block(program, inputs, edges, layout.segment)
        layout.values = {
            "B": rows.B,
            "k0": s0,
            "s0": s0,
            "s1": s1,
            "more": 0,
            "onward": rows.onward,
            "slots": slots,
            "block": block,
            "chunk": self.chunk(rows.B),
            "tasks": address(edges),
            "batch": address(rows.batch),
            "begin": address(rows.begin),
            "active": address(rows.active),
            "kept_rows": rows.B if keep else 0,
        }
        self._sizes(inputs, layout)
        self._keep(inputs, s1 - s0, slots, keep, layout)
        self._scratch(program, inputs, edges, block, layout)
        layout.table(direction, self._words[direction])
        self._pack(program, inputs, layout)
        if direction == "backward":
            self._results(inputs, layout)
            self._record(plan.grads, "grads", "work", inputs, layout.segment, layout)
            self._outer(inputs, slots, layout)
        layout.finish()
        return layout

    def _sizes(self, inputs: Inputs, layout: Layout) -> None:
        """Words that are sizes and strides of what is given."""
        plan, values = self.plan, layout.values
        for slot in plan.classes:
            values[f"w{slot}"] = inputs.widths[slot] if slot < plan.forward_count else 1
        for slot, start in inputs.starts.items():
            values[f"start{slot}"] = start
        for k, x in enumerate(inputs.xs):
            values[f"x{k}_t"], values[f"x{k}_b"] = x.strides[:2]
        for k, array in enumerate(inputs.captured):
            values[f"capture{k}_b"] = self._batch_stride(array, inputs.rows.B)

    def _width(self, slot: int, inputs: Inputs) -> int:
        at = self.plan.classes[slot]
        return inputs.widths[at] if at < self.plan.forward_count else 1

    @staticmethod
    def _batch_stride(array: Array, B: int) -> int:
        """How far it is from row to row of a captured array, 0 if all rows share one."""
        if array.ndim != 2 or (array.shape[0] == 1 and B != 1):
            return 0
        return array.strides[0]

    def _tasks(self, inputs: Inputs) -> Array:
        """The edges of the tasks: rows in whole chunks, about the same work for each."""
        rows = inputs.rows
        chunk = self.chunk(rows.B)
        chunks = -(-rows.B // chunk)
        flops = 0
        for slot, row in enumerate(self.plan.rows[: self.plan.forward_count]):
            if row.op == "matmul":
                flops += 2 * inputs.widths[row.inputs[0]] * inputs.widths[slot]
        work = (flops + 50 * sum(inputs.widths)) * float(rows.active[: rows.steps].sum())
        count = min(threads.get_num_threads(), chunks) if work > WORTH_THREADS else 1
        if count == 1:
            return np.array([0, rows.B])
        if not rows.ragged:
            edges = np.arange(count + 1) * chunks // count
        else:
            lengths = (rows.active[:-1, None] > np.arange(0, rows.B, chunk)).sum(axis=0)
            done = np.concatenate([[0], np.cumsum(lengths + 1)])
            edges = np.searchsorted(done, np.arange(count + 1) * (done[-1] / count))
            edges[0], edges[-1] = 0, chunks
        return np.minimum(edges * chunk, rows.B)

    @staticmethod
    def chunk(B: int) -> int:
        """Rows whose sums are made together; by the shape alone, so that sums are the same."""
        return max(1, -(-B // MOST_CHUNKS))

    def _block(self, program: Any, inputs: Inputs, edges: Array, steps: int) -> int:
        """How many steps early and late products take together."""
        if not program.sections["early"] and not program.sections["late"]:
            return 1
        most = max(1, int(np.diff(edges).max(initial=0)))
        rows = self._rows_of_blocks(program, inputs)
        return max(1, min(steps, -(-rows // most)))

    def _rows_of_blocks(self, program: Any, inputs: Inputs) -> int:
        """Rows that a product outside the loop should have: more if its matrix is far away."""
        sizes = [
            inputs.captured[stage.matrix].size
            for name in ("early", "late")
            for stage in program.sections[name]
            if hasattr(stage, "matrix")
        ]
        return FAR_BLOCK_ROWS if max(sizes, default=0) * self.item > NEAR else BLOCK_ROWS

    def _keep(self, inputs: Inputs, steps: int, slots: int, keep: bool, layout: Layout) -> None:
        """Memory for states and kept values: of all steps, or of the newest ones only."""
        B = inputs.rows.B
        block = "kept" if keep else "work"
        for k, slot in enumerate(self.plan.state_slots):
            all_steps = keep and k in self.plan.states_kept
            width = self._width(slot, inputs)
            count = steps * slots + 1 if all_steps else 2
            layout.take(f"state{k}", count * B * width * self.item, block)
            layout.values[f"state{k}_mask"] = -1 if all_steps else 1
            layout.views[f"state{k}"] = layout.values[f"state{k}"], (B, width)
        self._record(self.plan.kept, "kept", block, inputs, steps if keep else 1, layout)

    def _record(
        self,
        slots: Sequence[int],
        name: str,
        block: str,
        inputs: Inputs,
        steps: int,
        layout: Layout,
    ) -> None:
        """Memory for so many values of each row and step, one beside the other."""
        offset, lanes = 0, simd.lanes(str(self.dtype))
        for slot in slots:
            layout.values[f"{name}{slot}"] = offset * self.item
            offset += -(-self._width(slot, inputs) // lanes) * lanes
        layout.values[f"{name}_bytes"] = offset * self.item
        layout.take(name, (steps * inputs.rows.B * offset + lanes) * self.item, block)

    def _scratch(
        self, program: Any, inputs: Inputs, edges: Array, block: int, layout: Layout
    ) -> None:
        """The buffers of all tasks, side by side."""
        most = int(np.diff(edges).max(initial=0))
        panel, lanes = gemm.panel(str(self.dtype)), simd.lanes(str(self.dtype))
        total = 0
        for buffer in program.scratch:
            unit = panel if buffer.panels else lanes
            distance = -(-max(1, self._width(buffer.slot, inputs)) // unit) * unit
            if distance * self.item % 4096 == 0:
                distance += lanes  # rows must not all fall into the same lines of the cache
            layout.values[f"z{buffer.slot}"] = total
            layout.values[f"z{buffer.slot}_row"] = distance
            rows = most * (block if buffer.block else 1)
            total += -(-rows * distance * self.item // 64) * 64
        layout.values["scratch_bytes"] = total + 64
        layout.take("scratch", (total + 64) * layout.tasks)

    def _pack(self, program: Any, inputs: Inputs, layout: Layout) -> None:
        """Memory for packed matrices, and the table of the packing."""
        panel, values, work = gemm.panel(str(self.dtype)), layout.values, 0
        names = ["pack_count", "pack_tasks"]
        for k, transposed in program.matrices:
            matrix = inputs.captured[k].T if transposed else inputs.captured[k]
            K, N = matrix.shape
            panels = -(-N // panel)
            name = f"m{k}" + ("t" if transposed else "")
            values[f"{name}_row"], values[f"{name}_column"] = (
                s // self.item for s in matrix.strides
            )
            values[f"{name}_K"], values[f"{name}_N"], values[f"{name}_panels"] = K, N, panels
            layout.take(name, panels * K * panel * self.item)
            names += [f"capture{k}", f"{name}_row", f"{name}_column", f"{name}_K", f"{name}_N"]
            names += [name, f"{name}_panels"]
            work += K * N
        if program.matrices:
            layout.pack_tasks = layout.tasks if work > 20_000 else 1
            values["pack_count"], values["pack_tasks"] = len(program.matrices), layout.pack_tasks
            layout.table("pack", names)

    def _results(self, inputs: Inputs, layout: Layout) -> None:
        """Memory for gradients that are added up on the way: all of it begins as zeros."""
        plan, B = self.plan, inputs.rows.B
        first = layout.bytes["work"]

        def take(name: str, shape: tuple[int, ...]) -> None:
            offset = layout.take(name, int(np.prod(shape)) * self.item)
            layout.views[name] = offset, shape

        for k, after in enumerate(plan.derivative.after):
            if after is not None:
                width = self._width(plan.state_slots[k], inputs)
                take(f"dstate{k}", (2, B, width))  # now, and a step later
                if inputs.resets is None:
                    layout.values[f"dreset{k}"] = 0
                else:
                    take(f"dreset{k}", (B, width))
        chunk = self.chunk(B)
        slots = {row.detail: slot for slot, row in enumerate(plan.rows) if row.op == "capture"}
        for k in {k for _, k in plan.derivative.sums}:
            per_row = layout.values[f"capture{k}_b"] != 0
            width = inputs.widths[slots[k]]
            row = width * self.item
            take(f"sum{k}", (B if per_row else -(-B // chunk), width))
            layout.values[f"sum{k}_chunk"] = row * chunk if per_row else row
            layout.values[f"sum{k}_b"] = row if per_row else 0
        layout.zeroed = first, layout.bytes["work"]

    def _outer(self, inputs: Inputs, slots: int, layout: Layout) -> None:
        """The table of the large products: those that share g stand together."""
        values, panel = layout.values, gemm.panel(self.plan.dtype)
        groups: dict[tuple[int, bool], list[Matrix]] = {}
        for a, g, k in self.plan.derivative.outer:
            matrix = self._matrix(a, g, k, inputs)
            groups.setdefault((g, matrix.g_first), []).append(matrix)
        names = ["s0", "s1", "B", "active", "batch", "begin", "onward"]
        names += ["outer_tasks", "outer_scratch", "outer_bytes", "outer_count", "more"]
        most = 0
        for (g, g_first), matrices in groups.items():
            G, name = self._width(g, inputs), f"outer{g}_{int(g_first)}"
            names += self._operand(name, g, inputs, slots, layout)
            values[f"{name}_width"], values[f"{name}_first"] = G, int(g_first)
            values[f"{name}_count"] = len(matrices)
            names += [f"{name}_width", f"{name}_first", f"{name}_count"]
            widest = max(matrix.shape[int(g_first)] for matrix in matrices)
            most = max(most, -(-G // panel) + -(-widest // panel) + 4)
            for matrix in matrices:
                name = f"outer_m{len(layout.matrices)}"
                layout.matrices.append(matrix)
                names += self._operand(name, matrix.a, inputs, slots, layout)
                values[f"{name}_width"] = matrix.shape[int(g_first)]
                values[f"{name}_distance"] = matrix.distance
                names += [f"{name}_width", f"{name}_out", f"{name}_distance"]
        if layout.matrices:
            values["outer_tasks"], values["outer_count"] = layout.tasks, len(groups)
            values["outer_bytes"] = gemm.KC * (most * panel * self.item + 16) + 64
            layout.take("outer_scratch", values["outer_bytes"] * layout.tasks)
            layout.table("outer", names)

    def _matrix(self, a: int, g: int, k: int, inputs: Inputs) -> Matrix:
        """A gradient in the order in which the matrix lies, or in the one that costs much less."""
        panel = gemm.panel(self.plan.dtype)

        def cost(m: int, n: int) -> int:
            return max(m, 4) * (-(-n // panel) * panel)

        (K, N), strides = inputs.captured[k].shape, inputs.captured[k].strides
        g_first = strides[0] < strides[1]
        if 2 * cost(K, N) < cost(N, K) or 2 * cost(N, K) < cost(K, N):
            g_first = cost(N, K) < cost(K, N)
        shape = (N, K) if g_first else (K, N)
        return Matrix(k, a, g, shape, -(-shape[1] // panel) * panel, g_first)

    def _operand(
        self, name: str, slot: int, inputs: Inputs, slots: int, layout: Layout
    ) -> list[str]:
        """Words for where a side is: address, whether it is the caller's, distances, first step."""
        origin = "s0"
        row, values, B = self.plan.rows[slot], layout.values, inputs.rows.B
        base = f"grads{slot}_base"
        if row.op == "x":
            base = f"x{row.detail}"
            user, (step, distance) = 1, inputs.xs[row.detail].strides[:2]
        elif row.op == "state":
            base, origin = f"state{row.detail}", "k0"
            distance = self._width(slot, inputs) * self.item
            user, step = 0, distance * B * slots
        else:
            values[base] = values["grads"] + values[f"grads{slot}"]
            layout.inner[base] = "work"
            user, distance = 0, values["grads_bytes"]
            step = distance * B
        values[f"{name}_user"], values[f"{name}_step"], values[f"{name}_row"] = user, step, distance
        return [base, f"{name}_user", f"{name}_step", f"{name}_row", origin]

    def _addresses(self, inputs: Inputs) -> dict[str, int]:
        """Of what is given."""
        if inputs.addresses:
            return dict(inputs.addresses)
        found = inputs.addresses
        inputs.numbers = np.array(inputs.numbers, self.dtype)
        found["numbers"] = address(inputs.numbers)
        found |= {f"x{k}": address(x) for k, x in enumerate(inputs.xs)}
        found |= {f"capture{k}": address(array) for k, array in enumerate(inputs.captured)}
        found["resets"] = 0 if inputs.resets is None else address(inputs.resets)
        return dict(found)

    def _run_segments(self, layout: Layout, table: Array, s0: int, s1: int) -> None:
        """The way back, and after every segment its share of the large products.

        What they are made of is still near then, and its memory is used again.
        """
        starts = np.arange(s0, max(s1, s0 + 1), layout.segment)[::-1]
        tables = np.tile(table, (len(starts), 1))
        for name, values in (
            ("s0", starts),
            ("s1", np.minimum(starts + layout.segment, s1)),
            ("more", np.arange(len(starts)) > 0),
        ):
            tables[:, layout.named(name)] = values[:, None]
        first, row = address(tables), tables.strides[0]
        phases = self._packing(layout, first)
        function, outer = self._function("backward"), build.shared("outer", self.plan.dtype)
        for k in range(len(starts)):
            phases.append(Phase(function, first + k * row, layout.tasks))
            if "outer" in layout.tables:
                at = first + k * row + 8 * layout.tables["outer"]
                phases.append(Phase(outer, at, layout.tasks))
        threads.run(phases, layout.tasks)

    def _packing(self, layout: Layout, table: int) -> list[Phase]:
        if "pack" not in layout.tables:
            return []
        pack = build.shared("pack", self.plan.dtype)
        return [Phase(pack, table + 8 * layout.tables["pack"], layout.pack_tasks)]

    # Forward

    def forward(
        self, inputs: Inputs, y_widths: Sequence[int], keep: bool
    ) -> tuple[list[Array], list[Array], Kept | None]:
        """The outputs (T, B, n), the last states (B, n), and what is kept if ``keep``."""
        rows = inputs.rows
        make = memory.zeros if rows.ragged else memory.empty
        ys = [make((rows.T, rows.B, n), self.dtype) for n in y_widths]
        k = inputs.checkpoint
        if k is None or not keep:
            last, block = self._forward(inputs, ys, 0, rows.steps, inputs.states, keep)
            return ys, last, Kept(inputs, block, []) if keep else None
        states, kept = list(inputs.states), Kept(inputs, None, [])
        for s0 in range(0, rows.steps, k):
            kept.checkpoints.append(states)
            states, _ = self._forward(inputs, ys, s0, min(s0 + k, rows.steps), states, False)
        return ys, states, kept

    def _forward(
        self,
        inputs: Inputs,
        ys: Sequence[Array],
        s0: int,
        s1: int,
        starts: Sequence[Array],
        keep: bool,
    ) -> tuple[list[Array], memory.Block | None]:
        """Steps s0 to s1 from the states ``starts``; the states after them, and what is kept."""
        rows = inputs.rows
        layout = self._layout("forward", inputs, s0, s1, keep)
        work = memory.Block(layout.bytes["work"])
        kept = memory.Block(layout.bytes["kept"]) if keep else None
        last = [np.array(state) for state in starts]
        addresses = self._addresses(inputs)
        for k, y in enumerate(ys):
            addresses[f"y{k}"] = address(y)
            addresses[f"y{k}_t"], addresses[f"y{k}_b"] = y.strides[:2]
        for k, state in enumerate(last):
            addresses[f"last{k}"] = address(state)
            addresses[f"reset{k}"] = address(inputs.reset_states[k])
            first = layout.view(f"state{k}", work if kept is None else kept, self.dtype)
            first[:] = state[rows.batch] if rows.ragged else state
        table = layout.fill(work, kept, addresses)
        phases = self._packing(layout, address(table))
        phases.append(Phase(self._function("forward"), address(table), layout.tasks))
        threads.run(phases, layout.tasks)
        return last, kept

    # Backward

    def backward(
        self, kept: Kept, dys: Sequence[Array], dlast: Sequence[Array | None]
    ) -> Gradients:
        """Gradients of everything that wants one; ``dys`` (T, B, n), ``dlast`` (B, n)."""
        plan, inputs = self.plan, kept.inputs
        rows, derivative = inputs.rows, plan.derivative
        make = memory.zeros if rows.ragged else memory.empty
        dxs = [
            None if slot is None else make((rows.T, rows.B, self._width(slot, inputs)), self.dtype)
            for slot in derivative.dx
        ]
        total = _Total(dys, dxs, list(dlast), [None] * len(dlast), {})
        if inputs.checkpoint is None:
            self._backward(inputs, kept.block, total, 0, rows.steps)
        elif not kept.checkpoints:  # no row has a step
            self._backward(inputs, self._again(kept, total, 0, 0, inputs.states), total, 0, 0)
        for number, states in reversed(list(enumerate(kept.checkpoints))):
            s0 = number * (inputs.checkpoint or 0)
            s1 = min(s0 + (inputs.checkpoint or 0), rows.steps)
            self._backward(inputs, self._again(kept, total, s0, s1, states), total, s0, s1)
        captured = {
            k: array.reshape(inputs.captured[k].shape) for k, array in total.captured.items()
        }
        return Gradients(dxs, total.states, total.resets, captured)

    def _again(
        self, kept: Kept, total: _Total, s0: int, s1: int, states: Sequence[Array]
    ) -> memory.Block | None:
        """The forward run of a segment once more, this time keeping everything."""
        nowhere = [np.broadcast_to(np.empty(dy.shape[2], self.dtype), dy.shape) for dy in total.dys]
        return self._forward(kept.inputs, nowhere, s0, s1, states, keep=True)[1]

    def _backward(
        self, inputs: Inputs, kept: memory.Block | None, total: _Total, s0: int, s1: int
    ) -> None:
        """Steps s1 to s0, backward, and the large products over them; all added to ``total``."""
        plan, rows = self.plan, inputs.rows
        layout = self._layout("backward", inputs, s0, s1, True)
        work = memory.Block(layout.bytes["work"])
        low, high = layout.zeroed
        work.view(low, (high - low,), np.uint8).fill(0)
        carried = [k for k, after in enumerate(plan.derivative.after) if after is not None]
        rings = {k: layout.view(f"dstate{k}", work, self.dtype) for k in carried}
        for k, ring in rings.items():
            given = total.states[k]
            if given is not None:
                ring[:] = given[rows.batch] if rows.ragged else given
        addresses = self._addresses(inputs)
        for k, dy in enumerate(total.dys):
            addresses[f"dy{k}"] = address(dy)
            addresses[f"dy{k}_t"], addresses[f"dy{k}_b"] = dy.strides[:2]
        for k, dx in enumerate(total.xs):
            if dx is not None:
                addresses[f"dx{k}"] = address(dx)
                addresses[f"dx{k}_t"], addresses[f"dx{k}_b"] = dx.strides[:2]
        outs = []
        for number, matrix in enumerate(layout.matrices):
            out = memory.empty((matrix.shape[0], matrix.distance), self.dtype)
            addresses[f"outer_m{number}_out"] = address(out)
            outs.append(out)
        self._run_segments(layout, layout.fill(work, kept, addresses), s0, s1)
        order = np.argsort(rows.batch) if rows.ragged else None
        for k, ring in rings.items():
            # A ring has two places, and step s writes into place s & 1.
            if s0 > 0 or plan.wanted_states[k]:
                end = ring[s0 & 1]
                total.states[k] = np.array(end if order is None else end[order])
            if inputs.resets is not None:
                reset = layout.view(f"dreset{k}", work, self.dtype)
                before = total.resets[k]
                total.resets[k] = np.array(reset) if before is None else before + reset
        for k in {k for _, k in plan.derivative.sums}:
            parts = layout.view(f"sum{k}", work, self.dtype)
            if layout.values[f"sum{k}_b"]:
                self._add(total, k, np.array(parts if order is None else parts[order]))
            else:
                self._add(total, k, parts.sum(axis=0))
        for matrix, out in zip(layout.matrices, outs, strict=True):
            width = matrix.shape[1]
            found = out if matrix.distance == width else np.ascontiguousarray(out[:, :width])
            self._add(total, matrix.k, found.T if matrix.g_first else found)

    @staticmethod
    def _add(total: _Total, k: int, gradient: Array) -> None:
        before = total.captured.get(k)
        total.captured[k] = gradient if before is None else before + gradient


class _Total(NamedTuple):
    """What a way back has so far, whatever its segments."""

    dys: Sequence[Array]
    xs: Sequence[Array | None]
    states: list[Array | None]  # the gradient of the states before the steps that are done
    resets: list[Array | None]
    captured: dict[int, Array]
