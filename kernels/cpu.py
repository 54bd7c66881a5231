"""Running a plan on the CPU: memory laid out, matrices packed, tables filled, threads sent.

``Runner(plan, rules)`` compiles a plan when it is first needed and runs it over arrays. Nothing of
one run is left for the next but compiled code. Shapes: T steps, B rows.
Imports build, threads, text, memory, gemm, simd and NumPy; it sees arrays, never a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from tinygrad_seq.kernels import build, gemm, memory, simd, text, threads
from tinygrad_seq.kernels.threads import Phase

Array = np.ndarray
MOST_CHUNKS = 16  # in so many parts, at most, sums over the batch are made
WORTH_THREADS = 4e6  # arithmetic operations below which one thread is quicker
BLOCK_ROWS = 32  # rows that a product outside the loop should have at least


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
    numbers: Sequence[float]
    widths: Sequence[int]  # of each row of the step
    starts: Mapping[int, int]  # of its slices
    checkpoint: int | None = None


class Kept:
    """What a forward run leaves for the way back."""

    def __init__(
        self, inputs: Inputs, states: list[Array], slots: int, record: Array | None
    ) -> None:
        self.inputs, self.states, self.slots, self.record = inputs, states, slots, record
        self.checkpoints: list[Sequence[Array]] = []


class Runner:
    """A plan and its compiled functions."""

    def __init__(self, plan: Any, rules: Any) -> None:
        self.plan, self.rules = plan, rules
        self.dtype = np.dtype(plan.dtype)
        self.item = self.dtype.itemsize
        self._functions: dict[str, Any] = {}
        self._words: dict[str, list[str]] = {}

    # Compiled code

    def source(self, direction: str) -> str:
        program = getattr(self.plan, direction)
        source, words = text.module_text(self.plan, self.rules, {direction: program})
        self._words[direction] = words[direction]
        return source

    def function(self, direction: str) -> Any:
        """The compiled function of a direction."""
        if direction not in self._functions:
            with build.said(f"{self.plan.name}, {direction}"):
                source = self.source(direction)
                name = f"{self.plan.name}_{direction}"
                self._functions[direction] = build.load(name, source, (direction,))[direction]
        return self._functions[direction]

    def _table(self, direction: str, values: Mapping[str, int]) -> Array:
        return np.array([values[name] for name in self._words[direction]], np.int64)

    # Layout

    def _width(self, slot: int, inputs: Inputs) -> int:
        at = self.plan.classes[slot]
        return inputs.widths[at] if at < self.plan.forward_count else 1

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
        if rows.active[rows.steps - 1] == rows.B:
            edges = np.arange(count + 1) * chunks // count
        else:  # rows of different lengths
            lengths = (rows.active[:-1, None] > np.arange(0, rows.B, chunk)).sum(axis=0)
            done = np.concatenate([[0], np.cumsum(lengths + 1)])
            edges = np.searchsorted(done, np.arange(count + 1) * (done[-1] / count))
            edges[0], edges[-1] = 0, chunks
        return np.minimum(edges * chunk, rows.B)

    @staticmethod
    def chunk(B: int) -> int:
        """Rows whose sums are made together; by the shape alone, so that sums are the same."""
        return max(1, -(-B // MOST_CHUNKS))

    def _block(self, program: Any, tasks: Array, steps: int) -> int:
        if not program.sections["early"] and not program.sections["late"]:
            return 1
        most = max(1, int(np.diff(tasks).max(initial=0)))
        return max(1, min(steps, -(-BLOCK_ROWS // most)))

    def _scratch(
        self, program: Any, inputs: Inputs, tasks: Array, block: int, values: dict[str, int]
    ) -> Array:
        """The buffers of all tasks, side by side."""
        most = int(np.diff(tasks).max(initial=0))
        panel, lanes = gemm.panel(str(self.dtype)), simd.lanes(str(self.dtype))
        total = 0
        for buffer in program.scratch:
            unit = panel if buffer.panels else lanes
            distance = -(-max(1, self._width(buffer.slot, inputs)) // unit) * unit
            if distance * self.item % 4096 == 0:
                distance += lanes  # rows must not all fall into the same lines of the cache
            values[f"z{buffer.slot}"], values[f"z{buffer.slot}_row"] = total, distance
            rows = most * (block if buffer.block else 1)
            total += -(-rows * distance * self.item // 64) * 64
        values["scratch_bytes"] = total + 64
        made = memory.empty(((total + 64) * (len(tasks) - 1),), np.uint8)
        values["scratch"] = made.ctypes.data
        return made

    def _common(self, inputs: Inputs, s0: int, s1: int, held: list[Any]) -> dict[str, int]:
        """The words that both directions have."""
        plan, rows = self.plan, inputs.rows
        values = {
            "B": rows.B,
            "batch": rows.batch.ctypes.data,
            "begin": rows.begin.ctypes.data,
            "active": rows.active.ctypes.data,
            "onward": rows.onward,
            "resets": 0 if inputs.resets is None else inputs.resets.ctypes.data,
            "s0": s0,
            "s1": s1,
            "chunk": self.chunk(rows.B),
        }
        for slot in {*plan.classes[: plan.forward_count]}:
            values[f"w{slot}"] = inputs.widths[slot]
        for slot in plan.classes[plan.forward_count :]:
            if slot >= plan.forward_count:
                values[f"w{slot}"] = 1
        for slot, start in inputs.starts.items():
            values[f"start{slot}"] = start
        if plan.numbers:
            numbers = np.array(inputs.numbers, self.dtype)
            held.append(numbers)
            values["numbers"] = numbers.ctypes.data
        for k, x in enumerate(inputs.xs):
            self._user_array(f"x{k}", x, values)
        for row in plan.rows[: plan.forward_count]:
            if row.op == "capture":
                array = inputs.captured[row.detail]
                values[f"capture{row.detail}"] = array.ctypes.data
                values[f"capture{row.detail}_b"] = self._batch_stride(array, rows.B)
        return values

    @staticmethod
    def _batch_stride(array: Array, B: int) -> int:
        """How far it is from row to row of a captured array, 0 if all rows share one."""
        shape = array.shape
        if len(shape) == 2:
            return 0 if shape[0] == 1 and B != 1 else array.strides[0]
        return 0

    def _pack(
        self, program: Any, inputs: Inputs, values: dict[str, int], held: list[Any], count: int
    ) -> Phase | None:
        """Lay out memory for packed matrices and describe the packing."""
        if not program.matrices:
            return None
        dtype = str(self.dtype)
        panel = gemm.panel(dtype)
        words = [len(program.matrices), count]
        work = 0
        for k, transposed in program.matrices:
            matrix = inputs.captured[k].T if transposed else inputs.captured[k]
            K, N = matrix.shape
            panels = -(-N // panel)
            packed = memory.empty((max(1, panels * K * panel),), self.dtype)
            held.append(packed)
            row, column = (stride // self.item for stride in matrix.strides)
            words += [matrix.ctypes.data, row, column, K, N, packed.ctypes.data, panels]
            name = f"m{k}" + ("t" if transposed else "")
            values[name], values[name + "_panels"] = packed.ctypes.data, panels
            work += K * N
        table = np.array(words, np.int64)
        if work < 20_000:
            table[1] = 1
        held.append(table)
        return Phase(build.shared("pack", dtype), table.ctypes.data, int(table[1]))

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
            last, kept = self._forward(inputs, ys, 0, rows.steps, inputs.states, keep)
            return ys, last, kept
        starts, states = list(range(0, rows.steps, k)), list(inputs.states)
        kept = Kept(inputs, [], 1, None)
        for s0 in starts:
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
    ) -> tuple[list[Array], Kept | None]:
        """Steps s0 to s1 from the states ``starts``; the states after them."""
        plan, rows = self.plan, inputs.rows
        last = [np.array(state) for state in starts]
        slots = 2 if keep and inputs.resets is not None else 1
        function = self.function("forward")
        held: list[Any] = []
        values = self._common(inputs, s0, s1, held)
        tasks = self._tasks(inputs)
        values["tasks"], values["slots"] = tasks.ctypes.data, slots
        block = values["block"] = self._block(plan.forward, tasks, s1 - s0)
        held.append(self._scratch(plan.forward, inputs, tasks, block, values))
        pack = self._pack(plan.forward, inputs, values, held, len(tasks) - 1)
        for k, y in enumerate(ys):
            self._user_array(f"y{k}", y, values)
        for k, state in enumerate(last):
            values[f"last{k}"] = state.ctypes.data
            values[f"reset{k}"] = inputs.reset_states[k].ctypes.data
        states = self._state_memory(inputs, starts, s1 - s0 if keep else 0, slots, values)
        record = self._record(plan.kept, "kept", inputs, s1 - s0 if keep else 1, values)
        values["kept_rows"] = rows.B if keep else 0
        table = self._table("forward", values)
        phases = [] if pack is None else [pack]
        phases.append(Phase(function, table.ctypes.data, len(tasks) - 1))
        threads.run(phases, len(tasks) - 1)
        return last, Kept(inputs, states, slots, record) if keep else None

    @staticmethod
    def _user_array(name: str, array: Array, values: dict[str, int]) -> None:
        """Address and distances of steps and rows of an array (T, B, n)."""
        values[name] = array.ctypes.data
        values[f"{name}_t"], values[f"{name}_b"] = array.strides[0], array.strides[1]

    def _state_memory(
        self,
        inputs: Inputs,
        starts: Sequence[Array],
        steps: int,
        slots: int,
        values: dict[str, int],
    ) -> list[Array]:
        """For each state its value before every step that is kept, or the newest two only."""
        states = []
        for k, start in enumerate(starts):
            all_steps = steps and k in self.plan.states_kept
            made = memory.empty((steps * slots + 1 if all_steps else 2, *start.shape), self.dtype)
            made[0] = start[inputs.rows.batch]
            values[f"state{k}"], values[f"state{k}_mask"] = made.ctypes.data, -1 if all_steps else 1
            states.append(made)
        return states

    def _record(
        self, slots: Sequence[int], name: str, inputs: Inputs, steps: int, values: dict[str, int]
    ) -> Array | None:
        """Memory for so many values of each row and step, one beside the other."""
        offset, lanes = 0, simd.lanes(str(self.dtype))
        for slot in slots:
            values[f"{name}{slot}"] = offset * self.item
            offset += -(-self._width(slot, inputs) // lanes) * lanes
        values[f"{name}_bytes"] = offset * self.item
        made = memory.empty((steps * inputs.rows.B * offset + lanes,), self.dtype)
        values[name] = made.ctypes.data
        return made

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
        rings: list[Array | None] = []  # gradients of the states, now and a step later
        dresets: list[Array | None] = []
        for k, after in enumerate(derivative.after):
            if after is None:
                rings.append(None)
                dresets.append(None)
                continue
            shape = inputs.states[k].shape
            ring = memory.empty((2, *shape), self.dtype)
            given = dlast[k]
            ring[:] = 0 if given is None else given[rows.batch]
            rings.append(ring)
            dresets.append(np.zeros(shape, self.dtype))
        sums = self._sums(inputs)
        matrices = self._matrices(inputs)
        way = _Way(dys, dxs, rings, dresets, sums, matrices)
        if inputs.checkpoint is None:
            self._backward(kept, way, 0, rows.steps)
        elif not kept.checkpoints:  # all rows are empty
            for matrix in matrices:
                matrix.out.fill(0)
        k = inputs.checkpoint or rows.steps
        for number, states in reversed(list(enumerate(kept.checkpoints))):
            s0 = number * k
            s1 = min(s0 + k, rows.steps)
            ys = [np.broadcast_to(np.empty(dy.shape[2], self.dtype), dy.shape) for dy in dys]
            _, again = self._forward(inputs, ys, s0, s1, states, keep=True)
            assert again is not None
            self._backward(again, way, s0, s1)
        order = np.empty_like(rows.batch)
        order[rows.batch] = np.arange(rows.B)
        captured: dict[int, Array] = {}
        for k, total in sums.items():
            whole = total.parts[order] if total.per_row else total.parts.sum(axis=0)
            captured[k] = whole.reshape(inputs.captured[k].shape)
        for matrix in matrices:
            found = matrix.out[:, : matrix.N]
            found = np.ascontiguousarray(found)
            found = found if matrix.by_rows else found.T
            captured[matrix.k] = captured[matrix.k] + found if matrix.k in captured else found
        dstates = [None if ring is None else ring[0][order] for ring in rings]
        return Gradients(dxs, dstates, dresets, captured)

    def _backward(self, kept: Kept, way: _Way, s0: int, s1: int) -> None:
        """Steps s1 to s0, backward, and the large products over them."""
        plan, inputs = self.plan, kept.inputs
        rows = inputs.rows
        function = self.function("backward")
        held: list[Any] = []
        values = self._common(inputs, s0, s1, held)
        tasks = self._tasks(inputs)
        values["tasks"] = tasks.ctypes.data
        values["slots"], values["kept_rows"] = kept.slots, rows.B
        block = values["block"] = self._block(plan.backward, tasks, s1 - s0)
        held.append(self._scratch(plan.backward, inputs, tasks, block, values))
        pack = self._pack(plan.backward, inputs, values, held, len(tasks) - 1)
        for k, dy in enumerate(way.dys):
            self._user_array(f"dy{k}", dy, values)
        for k, dx in enumerate(way.dxs):
            if dx is not None:
                self._user_array(f"dx{k}", dx, values)
        for k, (ring, dreset) in enumerate(zip(way.rings, way.dresets, strict=True)):
            if ring is not None and dreset is not None:
                values[f"dstate{k}"], values[f"dreset{k}"] = ring.ctypes.data, dreset.ctypes.data
        for k, state in enumerate(kept.states):
            values[f"state{k}"] = state.ctypes.data
            values[f"state{k}_mask"] = -1 if k in plan.states_kept else 1
        self._record(plan.kept, "kept", inputs, 0, values)
        if kept.record is not None:
            values["kept"] = kept.record.ctypes.data
        held.append(self._record(plan.grads, "grads", inputs, s1 - s0, values))
        for k, total in way.sums.items():
            row = total.parts.strides[0]
            values[f"sum{k}"] = total.parts.ctypes.data
            values[f"sum{k}_chunk"] = row * self.chunk(rows.B) if total.per_row else row
            values[f"sum{k}_b"] = row if total.per_row else 0
        table = self._table("backward", values)
        phases = [] if pack is None else [pack]
        phases.append(Phase(function, table.ctypes.data, len(tasks) - 1))
        if way.matrices:
            more = int(s1 < rows.steps)
            phases.append(self._outer(kept, way.matrices, values, len(tasks) - 1, more, held))
        threads.run(phases, len(tasks) - 1)

    def _sums(self, inputs: Inputs) -> dict[int, _Sum]:
        """Memory for gradients that are sums over the batch, one for each chunk of rows."""
        B, made = inputs.rows.B, {}
        chunks = -(-B // self.chunk(B))
        slots = {row.detail: slot for slot, row in enumerate(self.plan.rows) if row.op == "capture"}
        for k in {k for _, k in self.plan.derivative.sums}:
            per_row = self._batch_stride(inputs.captured[k], B) != 0
            width = inputs.widths[slots[k]]
            made[k] = _Sum(np.zeros((B if per_row else chunks, width), self.dtype), per_row)
        return made

    def _matrices(self, inputs: Inputs) -> list[_Matrix]:
        """Memory for gradients of matrices, in the order in which the matrix itself lies."""
        panel = gemm.panel(self.plan.dtype)

        def cost(m: int, n: int) -> int:
            return max(m, 4) * (-(-n // panel) * panel)

        made = []
        for a, g, k in self.plan.derivative.outer:
            (K, N), strides = inputs.captured[k].shape, inputs.captured[k].strides
            by_rows = strides[0] >= strides[1]
            if cost(K, N) != cost(N, K):
                by_rows = cost(K, N) < cost(N, K)
            M, N = (K, N) if by_rows else (N, K)
            out = memory.empty((M, -(-N // panel) * panel), self.dtype)
            made.append(_Matrix(k, a if by_rows else g, g if by_rows else a, M, N, out, by_rows))
        return made

    def _outer(
        self,
        kept: Kept,
        matrices: Sequence[_Matrix],
        values: dict[str, int],
        count: int,
        more: int,
        held: list[Any],
    ) -> Phase:
        """The large products; with ``more`` they are added to what is there."""
        rows = kept.inputs.rows
        most, words = 0, []
        for matrix in matrices:
            p, q = (self._operand(slot, kept, values) for slot in (matrix.p, matrix.q))
            distance = matrix.out.shape[1]
            words += [*p, *q, matrix.M, matrix.N, matrix.out.ctypes.data, distance, more, 0]
            most = max(most, gemm.KC * (matrix.M + 64 + distance))
        size = most * self.item + 64
        scratch = memory.empty((size * count,), np.uint8)
        head = [values["s0"], values["s1"], rows.B, values["active"], values["batch"]]
        head += [values["begin"], rows.onward, count, scratch.ctypes.data, size, len(matrices)]
        table = np.array(head + words, np.int64)
        held += [table, scratch]
        return Phase(build.shared("outer", self.plan.dtype), table.ctypes.data, count)

    def _operand(self, slot: int, kept: Kept, values: dict[str, int]) -> list[int]:
        """Address, whether it is the caller's, and the distances of its steps and rows."""
        plan, inputs = self.plan, kept.inputs
        row = plan.rows[slot]
        if row.op == "x":
            x = inputs.xs[row.detail]
            return [x.ctypes.data, 1, *x.strides[:2]]
        if row.op == "state":
            state = kept.states[row.detail]
            return [state.ctypes.data, 0, state.strides[0] * kept.slots, state.strides[1]]
        step = values["grads_bytes"] * inputs.rows.B
        return [values["grads"] + values[f"grads{slot}"], 0, step, values["grads_bytes"]]


class Gradients(NamedTuple):
    """What a backward run gives; None where nothing was wanted."""

    xs: list[Array | None]  # (T, B, n)
    states: list[Array | None]  # (B, n)
    reset_states: list[Array | None]  # (B, n)
    captured: dict[int, Array]


class _Sum(NamedTuple):
    """A gradient that is summed over the batch."""

    parts: Array  # (chunks, n), or (B, n) where each row has its own
    per_row: bool


class _Matrix(NamedTuple):
    """A gradient out = Pᵀ Q of a captured matrix."""

    k: int  # which
    p: int  # the rows whose values P and Q are
    q: int
    M: int
    N: int
    out: Array  # (M, N rounded up to panels)
    by_rows: bool  # whether P is the left side of the product, so that out is not transposed


class _Way(NamedTuple):
    """What a way back reads and writes, whatever its segments."""

    dys: Sequence[Array]
    dxs: Sequence[Array | None]
    rings: Sequence[Array | None]
    dresets: Sequence[Array | None]
    sums: dict[int, _Sum]
    matrices: list[_Matrix]
