"""Running a plan on a GPU: the mirror of ``cpu.py``.

``Runner(plan, rules)`` compiles the kernels of a plan when they are first needed and runs them over
arrays of the device. The loop is one launch, or a graph of a few for each step; products before and
after it, and the gradients of matrices, are the vendor's, for all steps at once. Shapes: T steps, B
rows.
Imports bases, build, cpu (what a run is given and gives), cuda_blas, cuda_build, cuda_division,
cuda_layout, cuda_order, cuda_source, division, program, ragged and NumPy. ``xp`` is the namespace
of the device's arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
from tinygrad_seq.kernels import build, cuda_blas, cuda_build, cuda_source
from tinygrad_seq.kernels.bases import strided
from tinygrad_seq.kernels.cpu import Gradients, Inputs
from tinygrad_seq.kernels.cuda_division import Form
from tinygrad_seq.kernels.cuda_layout import Layout
from tinygrad_seq.kernels.cuda_order import base_of
from tinygrad_seq.kernels.division import Sizes
from tinygrad_seq.kernels.ragged import Rows

from tinygrad_seq.program import Plan, Product, Rowwise, Rules, begins

Array = Any  # of the device
MOST_LAYOUTS = 256
MOST_ROWS = 64  # orders of rows that are kept on the device


class Kept(NamedTuple):
    """What a forward run leaves for the way back."""

    inputs: Inputs
    block: Array | None  # states and kept values of each step
    saved: Sequence[Array]  # or else the states at each checkpoint, (checkpoints, B, n)


class Runner:
    """A plan and its compiled kernels."""

    def __init__(self, plan: Plan, rules: Rules, xp: Any) -> None:
        self.plan, self.rules, self.xp = plan, rules, xp
        self.dtype = np.dtype(plan.dtype)
        self.item = self.dtype.itemsize
        self._kernels: dict[tuple[str, Form], dict[str, Any]] = {}
        self._layouts: dict[Any, Layout] = {}

    # Compiled code

    def file(self, direction: str, inputs: Inputs) -> tuple[str, Any]:
        """The text of a direction for these inputs and the file that it is compiled from."""
        form = self._layout(direction, inputs, inputs.rows.steps, True).division.form
        kernels = cuda_source.kernel_texts(self.plan, direction, self.rules, form)
        text = cuda_build.marked(cuda_source.module_text(self.plan, kernels))
        return text, build.write_module(f"{self.plan.name}_{direction}_cuda", text)

    def divisions(self, inputs: Inputs) -> dict[str, str]:
        """For each direction how a run with these inputs is divided among blocks."""
        directions = ("forward", "backward") if self.plan.backward is not None else ("forward",)
        return {
            each: str(self._layout(each, inputs, inputs.rows.steps, True).division)
            for each in directions
        }

    def _direction(self, direction: str, form: Form) -> dict[str, Any]:
        """The kernels of a direction, by name, compiled."""
        key = direction, form
        if key not in self._kernels:
            kernels = cuda_source.kernel_texts(self.plan, direction, self.rules, form)
            text = cuda_source.module_text(self.plan, kernels)
            name = f"{self.plan.name}_{direction}_cuda"
            with build.said(name):
                if key not in self._kernels:
                    self._kernels[key] = cuda_build.load(name, text, kernels)
        return self._kernels[key]

    def _layout(self, direction: str, inputs: Inputs, steps: int, keep: bool) -> Layout:
        rows = inputs.rows
        sizes = Sizes(
            *(rows.B, rows.ragged, rows.onward, inputs.resets is not None),
            *(0, inputs.widths, inputs.starts),
            tuple([(array.shape, array.strides) for array in inputs.captured]),
        )
        machine = cuda_build.machine()._replace(tf32=cuda_blas.tf32_allowed(self.xp))
        key = direction, steps, keep, sizes, machine
        layout = self._layouts.get(key)
        if layout is None:
            if len(self._layouts) >= MOST_LAYOUTS:
                self._layouts.clear()
            layout = Layout(self.plan, direction, steps, keep, sizes, machine)
            self._layouts[key] = layout
        return layout

    # Running

    def repeated(self, inputs: Inputs) -> Repeated:
        """A run over one step, again and again."""
        return Repeated(self, inputs)

    def forward(
        self, inputs: Inputs, keep: bool
    ) -> tuple[list[Array], Sequence[Array], Kept | None]:
        """The outputs (T, B, n), the last states (B, n), and what is kept if ``keep``."""
        xp, rows, k = self.xp, inputs.rows, inputs.checkpoint
        make = xp.zeros if rows.ragged else xp.empty
        widths = [inputs.widths[slot] for slot in self.plan.y_slots]
        ys = [make((rows.T, rows.B, n), self.dtype) for n in widths]
        last = [xp.empty(state.shape, self.dtype) for state in inputs.states]
        saved: Sequence[Array] = ()
        if keep and k is not None:
            count = max(-(-rows.steps // k) - 1, 0)  # checkpoints
            # zeros for rows that have ended: nothing writes them, and products read them
            saved = [make((count, *state.shape), self.dtype) for state in inputs.states]
        keep_all = keep and (k is None or not rows.steps)
        layout = self._layout("forward", inputs, rows.steps, keep_all)
        run = _Run(self, layout, inputs)
        run.give_forward(inputs.states, last, ys, k or 0, saved)
        run.steps(0, rows.steps)
        return ys, last, Kept(inputs, run.kept if keep_all else None, saved) if keep else None

    def backward(
        self,
        kept: Kept,
        dys: Sequence[Array],
        dlast: Sequence[Array | None],
        seen: Callable[..., None] | None = None,
    ) -> Gradients:
        """Gradients of everything that wants one; ``dys`` (T, B, n), ``dlast`` (B, n).

        ``seen`` as in ``cpu.py``; the arrays that it is called with are the device's.
        """
        plan, inputs, xp = self.plan, kept.inputs, self.xp
        rows, k = inputs.rows, inputs.checkpoint
        make = xp.zeros if rows.ragged else xp.empty
        dxs: list[Array | None] = [
            None if slot is None else make(x.shape, self.dtype)
            for slot, x in zip(plan.gradients.dx, inputs.xs, strict=True)
        ]
        totals: list[Array | None] = [
            None if slot is None else make((rows.T, *state.shape), self.dtype)
            for slot, state in zip(plan.gradients.totals, inputs.states, strict=False)
        ]
        steps = rows.steps if kept.block is not None or k is None else min(k, rows.steps)
        layout = self._layout("backward", inputs, steps, True)
        back = _Run(self, layout, inputs, kept.block)
        back.give("dy", dys)
        back.give_rows("dlast", dlast)
        back.give("dx", dxs)
        back.give("total", totals)
        captured: dict[int, Array] = {}
        if kept.block is None:
            self._stretches(kept, back, steps, captured)
        elif seen is None or not steps:
            back.words["more"] = 0
            back.steps(0, steps)
            back.outer(captured, 0, steps)
        else:
            return self._gradients(back, dxs, self._each_step(back, steps, seen), totals)
        return self._gradients(back, dxs, back.whole(captured), totals)

    def _each_step(self, back: _Run, steps: int, seen: Callable[..., None]) -> dict[int, Array]:
        """The way back in runs of one step; the gradients of captured arrays."""
        total: dict[int, Array] = {}
        for s in reversed(range(steps)):
            for k in self.plan.sums_on_the_way():
                back.view(f"sum{k}").fill(0)
            back.words["more"] = int(s + 1 < steps)
            back.steps(s, s + 1, 0)
            share: dict[int, Array] = {}
            back.outer(share, s, s + 1)
            for k, array in back.whole(share).items():
                total[k] = array if k not in total else total[k] + array
            seen(s, share)
        return total

    def _stretches(self, kept: Kept, back: _Run, steps: int, captured: dict[int, Array]) -> None:
        """The way back by stretches of steps, one before each checkpoint and one to the end.

        Each is done once more forward, keeping everything, then backward.
        """
        inputs, xp, total = kept.inputs, self.xp, kept.inputs.rows.steps
        layout = self._layout("forward", inputs, steps, True)
        widths = [inputs.widths[slot] for slot in self.plan.y_slots]
        nowhere = [xp.empty((inputs.rows.B, n), self.dtype) for n in widths]
        last = [xp.empty(state.shape, self.dtype) for state in inputs.states]
        for begin in reversed(range(0, total, steps)):
            end, number = min(begin + steps, total), begin // steps
            again = _Run(self, layout, inputs)
            given = inputs.states if number == 0 else [saved[number - 1] for saved in kept.saved]
            again.give_forward(given, last, nowhere)
            again.steps(begin, end)
            back.use(again.kept, layout)
            back.words["more"] = int(end < total)
            back.steps(begin, end)
            back.outer(captured, begin, end)

    def _gradients(
        self,
        run: _Run,
        dxs: list[Array | None],
        captured: dict[int, Array],
        totals: list[Array | None],
    ) -> Gradients:
        """What a way back has left in its memory."""
        plan, inputs = self.plan, run.inputs
        states: list[Array | None] = [None] * len(inputs.states)
        resets = list(states)
        for k, after in enumerate(plan.gradients.after):
            if after is not None and plan.wanted_states[k]:
                ring = run.rows(f"dstate{k}", run.layout.width(plan.state_slots[k]))
                end = ring[: inputs.rows.B]  # step 0 has written into the ring's first place
                states[k] = end.copy() if run.order is None else end[run.order]
            if after is not None and inputs.resets is not None:
                resets[k] = run.view(f"dreset{k}").copy()
        return Gradients(dxs, states, resets, captured, totals)


class Repeated:
    """A forward run over one step, again and again, each from the states that the last one left.

    Callers write into ``xs`` and ``states`` of ``inputs``, and read ``ys`` and ``states``.
    """

    def __init__(self, runner: Runner, inputs: Inputs) -> None:
        self.inputs = inputs
        widths = [inputs.widths[slot] for slot in runner.plan.y_slots]
        self.ys = [runner.xp.empty((1, inputs.rows.B, n), runner.dtype) for n in widths]
        layout = runner._layout("forward", inputs, 1, False)
        self._run = _Run(runner, layout, inputs)
        self._run.give_forward(inputs.states, inputs.states, self.ys)

    def run(self) -> None:
        self._run.steps(0, 1)


class _Run:
    """The words and the memory of one run."""

    def __init__(
        self, runner: Runner, layout: Layout, inputs: Inputs, kept: Array | None = None
    ) -> None:
        self.runner, self.layout, self.inputs, self.xp = runner, layout, inputs, runner.xp
        self.kernels = runner._direction(layout.direction, layout.division.form)
        self.words = dict(layout.values)
        self.places: dict[str, tuple[Array, int, tuple[int, ...]]] = {}
        make = self.xp.zeros if inputs.rows.ragged else self.xp.empty
        self.work = make(layout.memory["work"].bytes, np.uint8)
        self._find(layout, "work", self.work)
        forward = layout.direction == "forward"
        if forward:
            self.kept = make(layout.memory["kept"].bytes, np.uint8)
            self._find(layout, "kept", self.kept)
        elif kept is not None:
            self.use(kept, runner._layout("forward", inputs, layout.steps, True))
        self._give_inputs()

    @cached_property
    def order(self) -> Array | None:
        """Where the rows of the batch stand in the run; None if that is their own order."""
        order = self.inputs.rows.order
        return None if order is None else self.xp.asarray(order)

    def _find(self, layout: Layout, block: str, memory: Array) -> None:
        base = cuda_build.address(memory)
        for name, (offset, shape) in layout.memory[block].arrays.items():
            self.words[name] = base + offset
            self.places[name] = memory, offset, shape

    def use(self, kept: Array, layout: Layout) -> None:
        """Read what a forward run has kept."""
        self._find(layout, "kept", kept)
        for name, value in layout.values.items():
            if name.startswith(("state", "kept")) or name == "slots":
                self.words[name] = value

    def view(self, name: str) -> Array:
        memory, offset, shape = self.places[name]
        size = int(np.prod(shape)) * self.runner.item
        return memory[offset : offset + size].view(self.runner.dtype).reshape(shape)

    def rows(self, name: str, width: int) -> Array:
        """Rows of memory (count, width)."""
        return self.view(name)[:, :width]

    # Words

    def _give_inputs(self) -> None:
        inputs, words = self.inputs, self.words
        queue = cuda_build.queue_of(self.xp)
        self._held = batch, begin, active = _on_device(self.xp, inputs.rows, queue)
        words |= {"batch": cuda_build.address(batch), "begin": cuda_build.address(begin)}
        words["active"] = cuda_build.address(active)
        words["resets"] = 0 if inputs.resets is None else cuda_build.address(inputs.resets)
        for k, bits in enumerate(_bits(inputs.numbers, self.runner.dtype)):
            words[f"number{k}_bits"] = bits
        for k, seed in enumerate(inputs.seeds):  # unsigned, and words are not
            words[f"seed{k}"] = seed - 2**64 if seed >= 2**63 else seed
        self.give("x", inputs.xs)
        self.give_rows("capture", inputs.captured)

    def give_forward(
        self,
        states: Sequence[Array],
        last: Sequence[Array],
        ys: Sequence[Array],
        every: int = 0,
        saved: Sequence[Array] = (),
    ) -> None:
        """Where a forward run begins and what it writes; ``every`` so many steps states are
        ``saved``."""
        self.give_rows("initial", states)
        self.give_rows("reset", self.inputs.reset_states)
        self.give_rows("last", last)
        self.give_rows("checkpoint", saved or [None] * len(last))
        self.words["every"] = every if saved else 0
        self.give("y", ys)

    def give(self, name: str, arrays: Sequence[Array | None]) -> None:
        """Arrays (T, B, n) of the caller, or (B, n) for all steps."""
        for k, array in enumerate(arrays):
            if array is None:
                continue
            step, row = array.strides[:2] if array.ndim == 3 else (0, array.strides[0])
            given = cuda_build.address(array), step, row
            self.words |= zip(strided(f"{name}{k}"), given, strict=True)

    def give_rows(self, name: str, arrays: Sequence[Array | None]) -> None:
        """Arrays that kernels need the address of alone, (B, n) for the most part."""
        for k, array in enumerate(arrays):
            self.words[f"{name}{k}"] = 0 if array is None else cuda_build.address(array)

    # Work

    def steps(self, begin: int, end: int, first: int | None = None) -> None:
        """Everything of steps ``begin`` to ``end``; memory has them from ``first``, or these."""
        self.words |= {"s0": begin, "s1": end, "k0": begin if first is None else first}
        layout, program = self.layout, self.layout.program
        direction = layout.direction
        tiles = (end - begin) * -(-self.inputs.rows.B // layout.rows_alone)
        self.words_alone = {**layout.words_alone, "tiles": tiles}
        # An operation of the arrays' own comes first: it makes the device this thread's.
        self.stream = cuda_build.stream_of(self.xp)
        counters = self.view_bytes("counters")
        counters.fill(0)
        if program.gathered:
            self._launch_alone(f"{direction}_gather")
        self._section("early")
        division, B = layout.division, self.inputs.rows.B
        share = -(-B // division.launches)
        for row in range(0, B, share):  # of the batch one share after another
            if row:
                counters.fill(0)
            self.words |= {"row0": row, "row1": min(row + share, B)}
            if division.by_steps:
                self._by_steps(end - begin)
            else:
                blocks = division.groups * division.parts
                self._launch(direction, blocks, division.shared_bytes, self.words)
        self._section("late")

    def _by_steps(self, count: int) -> None:
        """The loop: after each product of the vendor's a kernel."""
        xp, layout = self.xp, self.layout
        self.view_bytes("clocks").fill(0)
        stages = layout.program.products("loop")
        products = cuda_blas.Products(xp)
        given = []
        for stage in stages:
            matrix = cuda_blas.readable(xp, self._matrix(stage))
            given.append((self.view(f"operand{stage.a}"), matrix, self.view(f"p{stage.slot}_out")))
        after = [self._between(number) for number in range(len(stages) + 1)]

        def step(stream: int) -> None:
            products.on(stream)
            for operands, launch in zip(given, after[1:], strict=True):
                products.product(*operands)
                launch(stream)

        after[0](self.stream)
        cuda_blas.repeat(xp, step, count)

    def _between(self, number: int) -> Callable[[int], None]:
        """The launch of a kernel between two products, on a stream."""
        layout, division = self.layout, self.layout.division
        name = f"{layout.direction}_step{number}"
        if name not in self.kernels:  # these products follow one another
            return lambda stream: None
        kernel, names, divided = self.kernels[name]
        words = {**self.words, "clock": self.words["clocks"] + number * layout.turns}
        given = self._words(names, words)
        blocks = division.groups * (division.parts if divided else 1)

        def launch(stream: int) -> None:
            kernel.launch(blocks, division.shared_bytes, given, stream, False)

        return launch

    def view_bytes(self, name: str) -> Array:
        memory, offset, shape = self.places[name]
        return memory[offset : offset + shape[0]]

    def _section(self, section: str) -> None:
        direction = self.layout.direction
        for number, stage in enumerate(self.layout.program.sections[section]):
            if isinstance(stage, Rowwise):
                self._launch_alone(f"{direction}_{section}{number}")
            else:
                self._multiply(stage)

    def _launch_alone(self, name: str) -> None:
        blocks = max(1, min(8 * self.layout.machine.processors, self.words_alone["tiles"]))
        self._launch(name, blocks, self.layout.shared_alone, {**self.words, **self.words_alone})

    def _launch(self, name: str, blocks: int, shared: int, words: dict[str, int]) -> None:
        kernel, names, _ = self.kernels[name]
        given, layout = self._words(names, words), self.layout
        together = name == layout.direction and layout.division.parts > 1
        kernel.launch(blocks, shared, given, self.stream, together)

    def _words(self, names: list[str], words: dict[str, int]) -> tuple[int, ...]:
        return tuple([words[each] if each in words else self._sum(each, words) for each in names])

    def _sum(self, name: str, words: dict[str, int]) -> int:
        """A word that is a place in a row: ``z7_on_s3``, start3 numbers on from z7."""
        base, *terms = name.split("_on_")
        kinds = {"s": "start", "w": "w"}
        return words[base] + self.runner.item * sum(words[kinds[t[0]] + t[1:]] for t in terms)

    def _steps_rows(self, name: str, width: int, places: int = 1) -> Array:
        """Rows of all steps of the run, (steps × places × B, width)."""
        words, count = self.words, places * self.inputs.rows.B
        begin, end = words["s0"] - words["k0"], words["s1"] - words["k0"]
        return self.rows(name, width)[begin * count : end * count]

    def _operand(self, slot: int) -> Array:
        """The rows of all steps that a product outside the loop reads."""
        layout, program = self.layout, self.layout.program
        base = base_of(layout.plan, program, slot)
        place = program.places[base]
        name = {"scratch": "z", "grads": "grads", "kept": "kept"}[place.kind]
        rows = self._steps_rows(f"{name}{place.which}", layout.width(place.which))
        begin, width = 0, layout.width(slot)
        while slot != base:
            if layout.plan.rows[slot].op == "slice":
                begin += layout.elements(begins(layout.plan, slot))
            slot = program.inputs[slot][0]
        return rows[:, begin : begin + width]

    def _matrix(self, stage: Product) -> Array:
        matrix = self.inputs.captured[stage.matrix]
        return matrix.T if stage.transposed else matrix

    def _multiply(self, stage: Product) -> None:
        xp, layout = self.xp, self.layout
        a, matrix = self._operand(stage.a), self._matrix(stage)
        out = self._steps_rows(f"z{stage.into.which}", layout.width(stage.slot))
        if stage.adds:
            out += a @ matrix
        elif out.flags.c_contiguous:
            xp.matmul(a, matrix, out=out)
        else:
            out[...] = a @ matrix

    def outer(self, captured: dict[int, Array], begin: int, end: int) -> None:
        """Gradients over all rows of all steps: of matrices aᵀ g, of others the sum of g."""
        plan, xp, B = self.layout.plan, self.xp, self.inputs.rows.B
        if end <= begin:
            for k in (*(k for *_, k in plan.gradients.outer), *(k for _, k in plan.sums_later)):
                captured.setdefault(k, xp.zeros(self.inputs.captured[k].shape, self.runner.dtype))
            return
        shares = [(k, self._side(a).T @ self._side(g)) for a, g, k in plan.gradients.outer]
        for g, k in plan.sums_later:
            rows = self._side(g)
            if self.layout.values[f"capture{k}_b"]:
                share = rows.reshape(end - begin, B, rows.shape[1]).sum(axis=0)
                shares.append((k, share if self.order is None else share[self.order]))
            else:  # a product: the vendor's is quicker than a sum along the first axis
                shares.append((k, (xp.ones((1, len(rows)), rows.dtype) @ rows)[0]))
        for k, share in shares:
            captured[k] = captured[k] + share if k in captured else share

    def whole(self, captured: dict[int, Array]) -> dict[int, Array]:
        """These gradients and what was added up on the way, in the shapes of what was captured."""
        plan, inputs = self.layout.plan, self.inputs
        slots = {row.detail: slot for slot, row in enumerate(plan.rows) if row.op == "capture"}
        for k in plan.sums_on_the_way():
            rows = self.rows(f"sum{k}", inputs.widths[slots[k]])
            if self.layout.values[f"capture{k}_b"]:
                share = rows if self.order is None else rows[self.order]
            else:
                share = rows.sum(axis=0)
            captured[k] = share + captured[k] if k in captured else share.copy()
        for k, array in captured.items():
            captured[k] = array.reshape(inputs.captured[k].shape)
        return captured

    def _side(self, slot: int) -> Array:
        """Rows of all steps (steps × B, n), those that have ended zero."""
        layout, inputs = self.layout, self.inputs
        row, width = layout.plan.rows[slot], layout.width(slot)
        steps, B = self.words["s1"] - self.words["s0"], inputs.rows.B  # a width may be 0: no -1
        if row.op == "x":
            if slot in layout.program.gathered:
                return self._steps_rows(f"z{slot}", width)
            return self._in_order(inputs.xs[row.detail]).reshape(steps * B, width)
        if row.op == "state":
            places = self.words["slots"]
            rows = self._steps_rows(f"state{row.detail}", width, places)
            return rows.reshape(steps, places, B, width)[:, 0].reshape(steps * B, width)
        return self._steps_rows(f"grads{slot}", width)

    def _in_order(self, x: Array) -> Array:
        """An input (steps, B, n) in the order of the run, rows that have ended zero."""
        rows, begin, end = self.inputs.rows, self.words["s0"], self.words["s1"]
        if not rows.ragged and rows.onward == 1:
            return x[begin:end]
        steps = np.arange(begin, end)[:, None]
        there = np.arange(rows.B) < rows.active[begin:end, None]
        times = np.where(there, rows.begin + steps * rows.onward, 0)
        xp = self.xp
        found = x[xp.asarray(times), xp.asarray(np.broadcast_to(rows.batch, times.shape).copy())]
        return xp.where(xp.asarray(there)[:, :, None], found, self.runner.dtype.type(0))


def _bits(numbers: Sequence[float], dtype: Any) -> list[int]:
    """Numbers as words."""
    found: list[int] = np.array(numbers, dtype).view(f"i{np.dtype(dtype).itemsize}").tolist()
    return found


@lru_cache(MOST_ROWS)
def _on_device(xp: Any, rows: Rows, queue: tuple[int, int]) -> tuple[Array, ...]:
    """The order of rows on the device, made on this stream: no other waits for it."""
    made = rows.batch, rows.begin, rows.active
    return tuple(xp.asarray(np.ascontiguousarray(each, np.int64)) for each in made)
