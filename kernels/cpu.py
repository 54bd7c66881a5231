"""Running a plan on the CPU.

``Runner(plan, rules)`` compiles a plan when it is first needed and runs it over arrays: a layout
says where everything is, its words are filled in, threads are sent. Nothing of one run is left for
the next but compiled code and layouts. Shapes: T steps, B rows.
Imports build, layout, memory, text, threads and NumPy; it sees arrays, never a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from tinygrad_seq.kernels import build, memory, text, threads
from tinygrad_seq.kernels.layout import Layout, Sizes, chunk
from tinygrad_seq.kernels.memory import address

Array = np.ndarray
MOST_LAYOUTS = 256  # sizes whose layouts are kept


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
    addresses: tuple[int, int, int]  # of these arrays
    ragged: bool  # whether some row has fewer than T steps


def _rows(T: int, steps: int, batch: Array, begin: Array, active: Array, onward: int) -> Rows:
    B = len(batch)
    ragged = steps < T or bool(active[steps - 1] < B)
    where = address(batch), address(begin), address(active)
    return Rows(T, B, steps, batch, begin, active, onward, where, ragged)


@cache
def _dense_rows(T: int, B: int, reverse: bool) -> Rows:
    begin = np.full(B, T - 1 if reverse else 0)
    return _rows(T, T, np.arange(B), begin, np.full(T + 1, B), -1 if reverse else 1)


def rows_of(T: int, B: int, lengths: Array | None, reverse: bool) -> Rows:
    """The order of rows for lengths (B,), None if all are T."""
    if lengths is None:
        return _dense_rows(T, B, reverse)
    batch = np.argsort(-lengths, kind="stable")
    ordered = lengths[batch]
    active = np.searchsorted(-ordered, -np.arange(T + 1), side="left")
    begin = ordered - 1 if reverse else np.zeros(B, np.int64)
    return _rows(T, int(ordered[0]), batch, begin, active, -1 if reverse else 1)


@dataclass
class Inputs:
    """The arrays of a run."""

    rows: Rows
    xs: Sequence[Array]  # (T, B, n), any strides but in the last axis
    states: Sequence[Array]  # (B, n), in the order of the batch
    resets: Array | None  # (T, B) bool
    reset_states: Sequence[Array]
    captured: Sequence[Array]  # matrices (K, N), others () to (B, n)
    numbers: Sequence[float]  # of the cell, in the order of its rows
    seeds: Sequence[int]  # of what it draws
    widths: tuple[int, ...]  # of each row of the step
    starts: Mapping[int, int]  # of its slices
    checkpoint: int | None = None
    addresses: list[int] = field(default_factory=list)  # what the words of both directions need
    sizes: Sizes | None = None  # all that layouts depend on, found when the first is needed
    layouts: dict[Any, Layout] = field(default_factory=dict)  # by direction, steps, keep


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


class _Total(NamedTuple):
    """What a way back has so far, whatever its segments."""

    dys: Sequence[Array]
    xs: list[Array | None]
    states: list[Array | None]  # the gradient of the states before the steps that are done
    resets: list[Array | None]
    captured: dict[int, Array]


class Runner:
    """A plan and its compiled functions."""

    def __init__(self, plan: Any, rules: Any) -> None:
        self.plan, self.rules = plan, rules
        self.dtype = np.dtype(plan.dtype)
        self.functions: dict[str, Any] = {}
        self._words: dict[str, list[str]] = {}
        self._layouts: dict[Sizes, dict[Any, Layout]] = {}

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
                made = build.load(name, source, {direction: 3})
                self.functions[direction] = made[direction]
        return self.functions[direction]

    def _layout(self, direction: str, inputs: Inputs, steps: int, keep: bool) -> Layout:
        """The layout of a run over so many steps, made if these sizes are new."""
        kind = direction, steps, keep
        if inputs.sizes is None:
            self._find_layouts(inputs)
        layout = inputs.layouts.get(kind)
        if layout is None:
            own = self._function(direction)
            layout = Layout(self.plan, self._words[direction], *kind, inputs.sizes)
            shared = {name: build.shared(name, self.plan.dtype) for name in ("pack", "outer")}
            layout.link(lambda name: build.address_of(shared.get(name, own)))
            inputs.layouts[kind] = layout
        return layout

    def _find_layouts(self, inputs: Inputs) -> None:
        """Sizes, and the layouts that were made for them, whatever the inputs."""
        rows = inputs.rows
        sizes = inputs.sizes = Sizes(
            *(rows.B, rows.ragged, rows.onward, inputs.resets is not None),
            *(threads.get_num_threads(), inputs.widths, tuple(inputs.starts.items())),
            tuple([(array.shape, array.strides) for array in inputs.captured]),
        )
        found = self._layouts.get(sizes)
        if found is None:
            if len(self._layouts) >= MOST_LAYOUTS:
                self._layouts.clear()
            found = self._layouts[sizes] = {}
        inputs.layouts = found

    # Running

    def _run(
        self,
        layout: Layout,
        inputs: Inputs,
        s0: int,
        work: memory.Block,
        kept: memory.Block | None,
        more: list[int],
    ) -> None:
        """Fill in the words, in the order of ``layout.bases``, and send the threads."""
        rows, edges = inputs.rows, layout.edges
        if rows.ragged:
            edges = _ragged_edges(rows, layout.tasks)
        if not inputs.addresses:
            numbers = np.array(inputs.numbers, self.dtype)
            inputs.numbers = numbers  # type: ignore[assignment]
            given = [address(numbers), 0 if inputs.resets is None else address(inputs.resets)]
            given += inputs.seeds
            for x in inputs.xs:
                given += address(x), *x.strides[:2]
            inputs.addresses = given + [address(array) for array in inputs.captured]
        kept_address = 0 if kept is None else kept.address
        first = [0, work.address, kept_address, address(edges), *rows.addresses, s0]
        threads.run(layout.fill(first + inputs.addresses + more), layout.phases, layout.tasks)

    def forward(
        self, inputs: Inputs, keep: bool
    ) -> tuple[list[Array], Sequence[Array], Kept | None]:
        """The outputs (T, B, n), the last states (B, n), and what is kept if ``keep``."""
        rows, k = inputs.rows, inputs.checkpoint
        make = memory.zeros if rows.ragged else memory.empty
        widths = [inputs.widths[slot] for slot in self.plan.y_slots]
        ys = [make((rows.T, rows.B, n), self.dtype) for n in widths]
        if k is None or not keep:
            last, block = self._forward(inputs, ys, 0, rows.steps, inputs.states, keep)
            return ys, last, Kept(inputs, block, []) if keep else None
        count = max(rows.steps - 1, 0) // k  # segments after the first
        saved = [np.empty((count, *state.shape), self.dtype) for state in inputs.states]
        last, _ = self._forward(inputs, ys, 0, rows.steps, inputs.states, False, k, saved)
        begins = [inputs.states, *([each[n] for each in saved] for n in range(count))]
        return ys, last, Kept(inputs, None, begins if rows.steps else [])

    def _forward(
        self,
        inputs: Inputs,
        ys: Sequence[Array],
        s0: int,
        s1: int,
        initial: Sequence[Array],
        keep: bool,
        every: int = 0,
        saved: Sequence[Array] = (),
    ) -> tuple[Sequence[Array], memory.Block | None]:
        """Steps s0 to s1 from the states ``initial``; the states after them, and what is kept.

        States before every so many steps go to ``saved``, (segments, B, n) each.
        """
        layout = self._layout("forward", inputs, s1 - s0, keep)
        work = memory.Block(layout.bytes["work"])
        kept = memory.Block(layout.bytes["kept"]) if keep else None
        last = [np.empty(state.shape, self.dtype) for state in initial]
        more = [address(state) for state in (*inputs.reset_states, *initial, *last)]
        more += [every, *(map(address, saved) if every else [0] * len(initial))]
        for y in ys:
            more += address(y), *y.strides[:2]
        self._run(layout, inputs, s0, work, kept, more)
        return last, kept

    def backward(
        self, kept: Kept, dys: Sequence[Array], dlast: Sequence[Array | None]
    ) -> Gradients:
        """Gradients of everything that wants one; ``dys`` (T, B, n), ``dlast`` (B, n)."""
        plan, inputs = self.plan, kept.inputs
        rows, k = inputs.rows, inputs.checkpoint or 0
        make = memory.zeros if rows.ragged else memory.empty
        dxs: list[Array | None] = [
            None if slot is None else make(x.shape, self.dtype)
            for slot, x in zip(plan.derivative.dx, inputs.xs, strict=True)
        ]
        ends = [
            None if after is None else given
            for after, given in zip(plan.derivative.after, dlast, strict=True)
        ]
        total = _Total(dys, dxs, ends, [None] * len(ends), {})
        if inputs.checkpoint is None:
            self._backward(inputs, kept.block, total, 0, rows.steps)
        elif not kept.checkpoints:  # no row has a step
            self._backward(inputs, self._again(kept, total, 0, 0, inputs.states), total, 0, 0)
        for number, states in reversed(list(enumerate(kept.checkpoints))):
            s0, s1 = number * k, min(number * k + k, rows.steps)
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
        layout = self._layout("backward", inputs, s1 - s0, True)
        work = memory.Block(layout.bytes["work"])
        more = [0 if state is None else address(state) for state in total.states]
        for dy in total.dys:
            more += address(dy), *dy.strides[:2]
        for dx in total.xs:
            more += (0, 0, 0) if dx is None else (address(dx), *dx.strides[:2])
        outs = [memory.empty((m.shape[0], m.distance), self.dtype) for m in layout.matrices]
        self._run(layout, inputs, s0, work, kept, more + [address(out) for out in outs])
        order = np.argsort(rows.batch) if rows.ragged else None
        for k, after in enumerate(plan.derivative.after):
            # A ring has two places, and step s writes into place s & 1.
            if after is not None and (s0 > 0 or plan.wanted_states[k]):
                width = layout.width(plan.state_slots[k])
                end = layout.view(f"dstate{k}", work)[s0 & 1, :, :width]
                total.states[k] = np.array(end if order is None else end[order])
            if after is not None and inputs.resets is not None:
                reset, before = layout.view(f"dreset{k}", work), total.resets[k]
                total.resets[k] = np.array(reset) if before is None else before + reset
        for k in {k for _, k in plan.derivative.sums}:
            parts = layout.view(f"sum{k}", work)
            if layout.values[f"sum{k}_b"]:
                _add(total, k, np.array(parts if order is None else parts[order]))
            else:
                _add(total, k, np.add.reduce(parts))
        for matrix, out in zip(layout.matrices, outs, strict=True):
            width = matrix.shape[1]
            found = out if matrix.distance == width else np.ascontiguousarray(out[:, :width])
            _add(total, matrix.k, found.T if matrix.g_first else found)


def _add(total: _Total, k: int, gradient: Array) -> None:
    before = total.captured.get(k)
    total.captured[k] = gradient if before is None else before + gradient


def _ragged_edges(rows: Rows, tasks: int) -> Array:
    """The edges of tasks over rows of different lengths: whole chunks, about the same work each."""
    per_chunk = chunk(rows.B)
    firsts = np.arange(0, rows.B, per_chunk)
    lengths = (rows.active[:-1, None] > firsts).sum(axis=0)
    done = np.concatenate([[0], np.cumsum(lengths + 1)])
    edges = np.searchsorted(done, np.arange(tasks + 1) * (done[-1] / tasks))
    edges[0], edges[-1] = 0, len(firsts)
    return np.minimum(edges * per_chunk, rows.B)
