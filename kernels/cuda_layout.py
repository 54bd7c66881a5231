"""Layout for CUDA: where everything of a run is in memory.

Memory is two blocks of bytes, one that the way back needs (``kept``) and one that it does not
(``work``). ``values`` are the words that sizes alone decide.
Imports cuda_division, cuda_order, cuda_rows, cuda_text, division, program and NumPy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tinygrad_seq.kernels import cuda_division
from tinygrad_seq.kernels.cuda_division import TILE, WARP, Division, Machine, Wanted, Work, padded
from tinygrad_seq.kernels.cuda_order import Chain, chains, slots_of
from tinygrad_seq.kernels.cuda_rows import RING
from tinygrad_seq.kernels.cuda_text import COUNTER
from tinygrad_seq.kernels.division import Sizes

from tinygrad_seq.program import REDUCTIONS, Plan, Rowwise

ALIGNMENT = 256
WORD = 8  # bytes
NUMBERS_ALONE = 4096  # that a block takes at once outside the loop


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
        self.widest = max((self.width(slot) for slot in self.program.inputs), default=0) or 1
        self.division = self._divide()
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

    def _divide(self) -> Division:
        wanted = [
            Wanted(
                stage.slot,
                self.width(stage.a),
                tuple(self.width(each.slot) for each in chain.segments),
            )
            for chain in self.chains
            for stage in chain.stages
        ]
        sums = len(self.sums("loop"))
        work = Work(wanted, self.sizes.B, self.widest, self.item, self.machine, sums)
        return cuda_division.divide(work)

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
            "parts": self.division.parts,
            "rows": self.division.rows,
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
        values, division, at = self.values, self.division, 0
        for chain in () if division.by_steps else self.chains:
            for stage in chain.stages:
                p, shape = f"p{stage.slot}", division.shapes[stage.slot]
                column = 0
                for n, segment in enumerate(chain.segments):
                    values[f"{p}_segment{n}"] = column
                    column += padded(-(-self.width(segment.slot) // division.parts))
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
                at += shape.slices * division.rows * shape.C
                if stage.slot in division.streamed:
                    shape_all = (division.parts, shape.K, shape.C)
                    self.memory["work"].take(f"{p}_at", shape_all, self.item)
                else:
                    values[f"{p}_at"] = at
                    at += shape.K * shape.C
        for slot in self.sums("loop"):
            values[f"total{slot}"] = at
            at += division.rows
        if division.by_steps:
            self._operands()

    def _operands(self) -> None:
        """What products read and write if the loop is taken by steps, the same at each of them."""
        B, work, item = self.sizes.B, self.memory["work"], self.item
        stages = [stage for chain in self.chains for stage in chain.stages]
        for stage in stages:
            work.take(f"p{stage.slot}_out", (B, self.width(stage.slot)), item)
        for slot in {stage.a: None for stage in stages}:
            work.take(f"operand{slot}", (B, self.width(slot)), item)
        self.turns = WORD * self.division.groups * self.division.parts  # bytes of a kernel's clock
        work.take("clocks", ((len(stages) + 1) * self.turns,), 1)

    def _buffers(self) -> None:
        B, division = self.sizes.B, self.division
        for buffer in self.program.scratch:
            steps = self.steps if buffer.block else 2
            self._rows("work", f"z{buffer.slot}", steps * B, self.width(buffer.slot))
        blocks = division.groups * division.parts
        for slot in self.sums("loop"):
            self.memory["work"].take(f"partial{slot}", (2 * blocks * division.rows,), self.item)
        alone = [*self.sums("early"), *self.sums("late")]
        # a block has room for the sums of all its rows
        room = self.machine.shared_bytes // (max(1, len(alone)) * self.item)
        self.rows_alone = max(1, min(B, NUMBERS_ALONE // self.widest, room))
        # outside the loop words have other values
        self.words_alone = {"rows": self.rows_alone}
        self.words_alone |= {f"total{slot}": k * self.rows_alone for k, slot in enumerate(alone)}
        self.words_alone |= {f"partial{slot}": 0 for slot in alone}
        self.shared_alone = len(alone) * self.rows_alone * self.item
        self.memory["work"].take("counters", (division.groups * COUNTER,), 1)

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
