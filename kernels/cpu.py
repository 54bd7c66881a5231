"""Running a plan on the CPU.

``Runner(plan, rules)`` compiles a plan when it is first needed and runs it over arrays: a layout
says where everything is, its words are filled in, threads are sent. Nothing of one run is left for
the next but compiled code and layouts. Shapes: T steps, B rows.
Imports bases, build, cpu_text, division, layout, memory, program, ragged, threads and NumPy; it
sees arrays, never a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from tinygrad_seq.kernels import bases, build, cpu_text, memory, threads
from tinygrad_seq.kernels.division import Sizes, count_parts
from tinygrad_seq.kernels.layout import Layout, in_turns
from tinygrad_seq.kernels.memory import address
from tinygrad_seq.kernels.ragged import Rows, dealt, task_edges
from tinygrad_seq.kernels.threads import BEGUN, FROM_STEP, PHASE_WORDS, TO_STEP

from tinygrad_seq.program import Plan, Rules

Array = np.ndarray
MOST_LAYOUTS = 1024  # that are kept, some 20 kB each
_SHARED = "pack", "outer", "join"  # functions of library.py
_BACK = "backward", "outer", "join"  # what is done for each segment, and in the end
MOST_STRETCHES = 256  # of steps between checkpoints, that threads are sent through at once


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
    starts: tuple[tuple[int, int], ...]  # of its slices
    checkpoint: int | None = None
    addresses: list[int] = field(default_factory=list)  # what the words of both directions need
    edges: dict[Any, Array] = field(default_factory=dict)  # of tasks, if rows are ragged
    sizes: Sizes | None = None  # all that layouts depend on, found when the first is needed
    parts: int = 1  # of the batch; rows of different lengths are dealt to them then
    layouts: dict[Any, Layout] = field(default_factory=dict)  # by direction, steps, keep

    def again(self, xs: list[Array], states: list[Array], captured: list[Array]) -> Inputs:
        """Others of the same shapes and strides, without resets."""
        made: Inputs = object.__new__(Inputs)
        made.__dict__.update(self.__dict__)
        made.xs, made.states, made.reset_states, made.captured = xs, states, states, captured
        made.addresses = []
        if made.sizes is not None and made.sizes.threads != threads.get_num_threads():
            made.sizes = None
        return made


class _Layouts(NamedTuple):
    """What was made for some sizes."""

    parts: int
    made: dict[Any, Layout]


class Kept(NamedTuple):
    """What a forward run leaves for the way back."""

    inputs: Inputs
    block: memory.Block | None  # states and kept values of each step
    saved: Sequence[Array]  # or else the states at each checkpoint, (checkpoints, B, n)


class Gradients(NamedTuple):
    """What a backward run gives; None where nothing was wanted."""

    xs: list[Array | None]  # (T, B, n)
    states: list[Array | None]  # (B, n)
    reset_states: list[Array | None]  # (B, n)
    captured: dict[int, Array]
    totals: list[Array | None]  # (T, B, n), of states at each step, where they were asked for


class Runner:
    """A plan and its compiled functions."""

    def __init__(self, plan: Plan, rules: Rules) -> None:
        self.plan, self.rules = plan, rules
        self.dtype = np.dtype(plan.dtype)
        back = plan.derivative is not None
        sums, after = (plan.gradients.sums, plan.gradients.after) if back else ((), ())
        # States on which something depends that wants a gradient.
        self.influential = [k for k, slot in enumerate(after) if slot is not None]
        # Captured arrays whose gradients are added up on the way.
        self.summed = tuple(dict.fromkeys(k for _, k in sums))
        self.functions: dict[str, Any] = {}
        self._words: dict[str, list[str]] = {}
        self._layouts: dict[Sizes, _Layouts] = {}

    # Compiled code

    def source(self, direction: str) -> str:
        """The text of a direction."""
        source, self._words[direction] = cpu_text.module_text(self.plan, self.rules, direction)
        return source

    def file(self, direction: str) -> tuple[str, Any]:
        """The text of a direction and the file that it is compiled from."""
        source = self.source(direction)
        return source, build.write_module(f"{self.plan.name}_{direction}", source)

    def _function(self, direction: str) -> Any:
        """The compiled function of a direction."""
        if direction not in self.functions:
            with build.said(f"{self.plan.name}, {direction}"):
                if direction not in self.functions:
                    self.functions[direction] = self._compiled(direction)
        return self.functions[direction]

    def _compiled(self, direction: str) -> Any:
        if direction == "forward" and self.plan.backward is not None:
            build.divide(self.plan.dtype, [self._module("backward")])
        return build.load(*self._module(direction))[direction]

    def _module(self, direction: str) -> build.Module:
        name = f"{self.plan.name}_{direction}"
        return build.Module(name, self.source(direction), {direction: 3})

    def _layout(self, direction: str, inputs: Inputs, steps: int, keep: bool) -> Layout:
        """The layout of a run over so many steps, made if these sizes are new."""
        kind = direction, steps, keep
        sizes = inputs.sizes or self._find_layouts(inputs)
        layout = inputs.layouts.get(kind)
        if layout is None:
            own = self._function(direction)
            layout = Layout(self.plan, self._words[direction], *kind, inputs.parts, sizes)
            shared = {name: build.shared(name, self.plan.dtype) for name in _SHARED}
            layout.link(lambda name: build.address_of(shared.get(name, own)))
            if sum(len(each.made) for each in list(self._layouts.values())) >= MOST_LAYOUTS:
                self._layouts.clear()
            inputs.layouts[kind] = layout
        return layout

    def _find_layouts(self, inputs: Inputs) -> Sizes:
        """Sizes, and the layouts that were made for them, whatever the inputs."""
        rows = inputs.rows
        sizes = inputs.sizes = Sizes(
            *(rows.B, rows.ragged, rows.onward, inputs.resets is not None),
            *(threads.get_num_threads(), inputs.widths, inputs.starts),
            tuple([(array.shape, array.strides) for array in inputs.captured]),
        )
        found = self._layouts.get(sizes)
        if found is None:
            found = self._layouts[sizes] = _Layouts(count_parts(self.plan, sizes), {})
        inputs.parts, inputs.layouts = found
        if rows.ragged and inputs.parts > 1:
            inputs.rows = dealt(rows, inputs.parts)
        return sizes

    # Running

    def repeated(self, inputs: Inputs) -> Repeated:
        """A run over one step, again and again."""
        return Repeated(self, inputs)

    def _bases(
        self,
        layout: Layout,
        inputs: Inputs,
        work: memory.Block,
        kept: memory.Block | None,
        more: list[int],
    ) -> list[int]:
        """The numbers of ``layout.bases``, the last of which are ``more``."""
        rows, division = inputs.rows, layout.division
        edges = division.edges
        if division.by_lengths:
            kind = division.tasks, division.edge_steps
            if kind not in inputs.edges:
                inputs.edges[kind] = task_edges(rows, *kind)
            edges = inputs.edges[kind]
        if not inputs.addresses:
            numbers = np.asarray(inputs.numbers, self.dtype)
            inputs.numbers = numbers  # type: ignore[assignment]
            inputs.addresses = bases.of_inputs(
                numbers, inputs.resets, inputs.seeds, inputs.xs, inputs.captured
            )
        kept_address = 0 if kept is None else kept.address
        first = bases.of_run(work.address, kept_address, edges, rows.addresses)
        return first + inputs.addresses + more

    def forward(
        self, inputs: Inputs, keep: bool
    ) -> tuple[list[Array], Sequence[Array], Kept | None]:
        """The outputs (T, B, n), the last states (B, n), and what is kept if ``keep``."""
        rows, k, dtype = inputs.rows, inputs.checkpoint, self.dtype
        T, B, widths = rows.T, rows.B, inputs.widths
        ys = [memory.empty((T, B, widths[slot]), dtype) for slot in self.plan.y_slots]
        last = [np.empty(state.shape, dtype) for state in inputs.states]
        saved: Sequence[Array] = ()
        if keep and k is not None:
            count = max(-(-rows.steps // k) - 1, 0)  # checkpoints
            saved = [np.empty((count, *state.shape), self.dtype) for state in inputs.states]
        keep_all = keep and k is None
        layout = self._layout("forward", inputs, rows.steps, keep_all)
        work = memory.Block(layout.bytes["work"])
        block = memory.Block(layout.bytes["kept"]) if keep_all else None
        more = bases.of_forward(
            inputs.reset_states, inputs.states, last, ys, _beyond(rows), k or 0, saved
        )
        words = layout.fill(self._bases(layout, inputs, work, block, more))
        threads.run(words, layout.phases, layout.threads)
        return ys, last, Kept(inputs, block, saved) if keep else None

    def backward(
        self,
        kept: Kept,
        dys: Sequence[Array],
        dlast: Sequence[Array | None],
        seen: Callable[[int, dict[int, Array]], None] | None = None,
    ) -> Gradients:
        """Gradients of everything that wants one; ``dys`` (T, B, n), ``dlast`` (B, n).

        With ``seen`` the steps are done one at a time, from the last to the first, and it is called
        for each with the step and its own share in the gradients of captured arrays. All steps must
        have been kept.
        """
        inputs, gradients, dtype = kept.inputs, self.plan.gradients, self.dtype
        rows, k = inputs.rows, inputs.checkpoint
        dxs: list[Array | None] = [
            None if slot is None else memory.empty((rows.T, rows.B, x.shape[2]), dtype)
            for slot, x in zip(gradients.dx, inputs.xs, strict=True)
        ]
        totals: list[Array | None] = [
            None if slot is None else memory.empty((rows.T, *state.shape), dtype)
            for slot, state in zip(gradients.totals, inputs.states, strict=False)
        ]
        steps = rows.steps if k is None else min(k, rows.steps)
        layout = self._layout("backward", inputs, steps, True)
        work = memory.Block(layout.bytes["work"])
        made = *dxs, *(totals or [None] * len(inputs.states))
        outs = [memory.empty((m.groups * m.shape[0], m.distance), dtype) for m in layout.matrices]
        more = bases.of_backward(dlast, dys, _beyond(rows), made, outs)
        captured: dict[int, Array] = {}
        if kept.block is None and steps:
            self._run_stretches(kept, layout, work, more)
        else:
            words = layout.fill(self._bases(layout, inputs, work, kept.block, more))
            if seen is None or not steps:
                threads.run(words, layout.phases, layout.threads)
            else:
                captured = self._each_step(layout, inputs, work, words, outs, seen)
        captured = captured or self._captured(layout, inputs, work, outs)
        return self._gradients(layout, inputs, work, dxs, captured, totals)

    def _each_step(
        self,
        layout: Layout,
        inputs: Inputs,
        work: memory.Block,
        words: Array,
        outs: Sequence[Array],
        seen: Callable[[int, dict[int, Array]], None],
    ) -> dict[int, Array]:
        """The way back in runs of one step; the gradients of captured arrays."""
        phases = words[: layout.phases * PHASE_WORDS].reshape(-1, PHASE_WORDS)
        if layout.functions[0] == "pack":
            threads.run(words, 1, layout.threads)
        which = [layout.functions.index(n) for n in _BACK if n in layout.functions]
        templates = layout.template[: layout.phases * PHASE_WORDS].reshape(-1, PHASE_WORDS)[which]
        total: dict[int, Array] = {}
        sums = [layout.view(f"sum{k}", work) for k in self.summed]
        for s in reversed(range(layout.steps)):
            for view in sums:
                view.fill(0)
            phases[: len(which)] = templates
            phases[: len(which), FROM_STEP] = s
            phases[: len(which), TO_STEP] = s + 1
            phases[: len(which), BEGUN] = [s + 1 < layout.steps, False, False][: len(which)]
            threads.run(words, len(which), layout.threads)
            share = self._captured(layout, inputs, work, outs)
            for k, array in share.items():  # in memory that the next step writes over
                total[k] = array.copy() if k not in total else total[k] + array
            seen(s, share)
        return total

    def _run_stretches(
        self, kept: Kept, backward: Layout, work: memory.Block, more: list[int]
    ) -> None:
        """The way back by stretches of steps, one before each checkpoint and one to the end.

        Each is done once more forward, keeping everything, then backward.
        """
        inputs, steps = kept.inputs, backward.steps
        rows = inputs.rows
        forward = self._layout("forward", inputs, steps, True)
        block, again_work = (
            memory.Block(forward.bytes["kept"]),
            memory.Block(forward.bytes["work"]),
        )
        nowhere = [np.empty((rows.B, n), self.dtype) for n in self._y_widths(inputs)]
        last = [np.empty_like(state) for state in inputs.states]
        again = bases.of_forward(inputs.reset_states, inputs.states, last, nowhere)
        both = (
            self._bases(forward, inputs, again_work, block, again),
            self._bases(backward, inputs, work, block, more),
        )
        initial = forward.bases.index("initial0") if inputs.states else 0
        stretches = -(-rows.steps // steps)
        for low in reversed(range(0, stretches, MOST_STRETCHES)):
            numbers = np.arange(low, min(low + MOST_STRETCHES, stretches))[::-1]
            filled = []
            for layout, each in zip((forward, backward), both, strict=True):
                table = np.tile(np.array(each, np.int64), (len(numbers), 1))
                table[:, layout.bases.index("k0")] = numbers * steps
                filled.append(table)
            for k, (state, saved) in enumerate(zip(inputs.states, kept.saved, strict=True)):
                later = address(saved) + (numbers - 1) * state.nbytes
                filled[0][:, initial + k] = np.where(numbers == 0, address(state), later)
            first = low + len(numbers) == stretches
            words, phases = in_turns((forward, backward), filled, rows.steps, first, low == 0)
            threads.run(words, phases, max(forward.threads, backward.threads))

    def _gradients(
        self,
        layout: Layout,
        inputs: Inputs,
        work: memory.Block,
        dxs: list[Array | None],
        captured: dict[int, Array],
        totals: list[Array | None],
    ) -> Gradients:
        """What a way back has left in its memory."""
        plan, order = self.plan, inputs.rows.order
        states: list[Array | None] = [None] * len(inputs.states)
        resets = list(states)
        for k in self.influential:
            # A ring has two places, and step s writes into place s & 1.
            if plan.wanted_states[k]:
                width = layout.width(plan.state_slots[k])
                rows = layout.first_places if order is None else layout.first_places[order]
                states[k] = layout.view(f"dstate{k}", work)[rows, :width]
            if inputs.resets is not None:
                resets[k] = np.array(layout.view(f"dreset{k}", work))
        return Gradients(dxs, states, resets, captured, totals)

    def _captured(
        self, layout: Layout, inputs: Inputs, work: memory.Block, outs: Sequence[Array]
    ) -> dict[int, Array]:
        """The gradients of captured arrays that a way back has left."""
        captured: dict[int, Array] = {}
        order = inputs.rows.order
        for k in self.summed:
            sums = layout.view(f"sum{k}", work)  # of rows, or of chunks of them
            if layout.values[f"sum{k}_b"]:
                found = np.array(sums if order is None else sums[order])
            else:
                found = sums[0].copy() if len(sums) == 1 else np.add.reduce(sums)
            shape = inputs.captured[k].shape
            captured[k] = found if found.shape == shape else found.reshape(shape)
        for matrix, out in zip(layout.matrices, outs, strict=True):
            k, width = matrix.k, matrix.shape[1]
            found = out if matrix.distance == width else np.ascontiguousarray(out[:, :width])
            if matrix.g_first and matrix.groups == 1:
                found = found.T
            elif matrix.g_first:
                turned = found.reshape(matrix.groups, *matrix.shape).swapaxes(1, 2)
                found = turned.reshape(-1, matrix.shape[0])
            captured[k] = found if k not in captured else captured[k] + found
        return captured

    def _y_widths(self, inputs: Inputs) -> list[int]:
        return [inputs.widths[slot] for slot in self.plan.y_slots]


class Repeated:
    """A forward run over one step, again and again, each from the states that the last one left.

    Words are filled in and matrices packed once. Callers write into ``xs`` and ``states`` of
    ``inputs``, which are this object's own, and read ``ys`` and ``states``.
    """

    def __init__(self, runner: Runner, inputs: Inputs) -> None:
        self.inputs = inputs
        self.ys = [np.empty((1, inputs.rows.B, n), runner.dtype) for n in runner._y_widths(inputs)]
        self.layout = layout = runner._layout("forward", inputs, 1, False)
        self._work = memory.Block(layout.bytes["work"])
        more = bases.of_forward(inputs.reset_states, inputs.states, inputs.states, self.ys)
        self._words = layout.fill(runner._bases(layout, inputs, self._work, None, more))
        end = layout.phases * PHASE_WORDS
        self._step = self._words[end - PHASE_WORDS : end].copy()  # the phase of the step itself
        if layout.phases > 1:
            threads.run(self._words, layout.phases - 1, layout.threads)

    def run(self) -> None:
        self._words[:PHASE_WORDS] = self._step
        threads.run(self._words, 1, self.layout.threads)


_FLUSHING = '''"""A thread takes numbers below the normal range for zero, or no more."""

from tinygrad_seq.kernels.simd import flush_denormals, put_word, restore_denormals, word


def begin(saved):
    put_word(saved, 0, flush_denormals())


def end(saved):
    restore_denormals(word(saved, 0))
'''


@cache
def _flushing() -> dict[str, Any]:
    return build.load("flushing", _FLUSHING, {"begin": 1, "end": 1})


@contextmanager
def flushing() -> Iterator[None]:
    """In the block NumPy computes as kernels do: numbers below the normal range are zero."""
    functions, saved = _flushing(), np.zeros(1, np.int64)
    functions["begin"](address(saved))
    try:
        yield
    finally:
        functions["end"](address(saved))


def _beyond(rows: Rows) -> int:
    """Up to which step arrays (T, B, n) are zeroed from each row's end on."""
    return rows.T if rows.ragged else 0
