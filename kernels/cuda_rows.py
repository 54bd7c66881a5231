"""Rows in a GPU's memory, and threads going over them: what kernels' texts are written with.

Rows of the same width lie at the same distances, one word for all. Threads go over the rows of
their group and the units of their part together: r, and i counted from the part's first unit, which
is unit j of the row. Imports cuda_order, program and text.
"""

from __future__ import annotations

from typing import Any

from tinygrad_seq.kernels.cuda_order import Region, base_of, chains
from tinygrad_seq.kernels.text import Writer

from tinygrad_seq.program import Offset, Plan, Program, Rules, begins

RING = 4  # newest steps of a state or its gradient that are there at once


class RowWriter(Writer):
    """Writes addresses, and loops over rows and units."""

    def __init__(self, plan: Plan, program: Program, rules: Rules) -> None:
        super().__init__(plan, program, rules)
        self.captures = {
            row.detail: slot for slot, row in enumerate(plan.rows) if row.op == "capture"
        }
        self.chains = chains(plan, program)
        self.chain_of = {each.stages[-1].slot: each for each in self.chains}
        self.shared_widths: dict[int, None] = {}  # widths whose units are divided

    def units_of(self, slot: int) -> int:
        """The width class of a row, divided among parts."""
        at = int(self.plan.classes[slot])
        self.width(slot)
        self.shared_widths[at] = None
        return at

    # Rows in memory

    def _row(self, kind: str, which: int) -> str:
        row = "first + r"
        if kind == "scratch":
            step = "(s - k0)" if self._buffer(which).block else "(s & 1)"
            return f"{self.word(f'z{which}')} + ({step} * B + {row}) * {self._pitch(which)}"
        if kind in ("dstate", "before"):
            step = f"(s + 1 & {RING - 1})" if kind == "dstate" else f"(s & {RING - 1})"
            pitch = self._pitch(self.plan.state_slots[which])
            return f"{self.word(f'dstate{which}')} + ({step} * B + {row}) * {pitch}"
        if kind in ("kept", "grads"):
            step = f"(s - k0 & {self.word('kept_mask')})" if kind == "kept" else "(s - k0)"
            return f"{self.word(f'{kind}{which}')} + ({step} * B + {row}) * {self._pitch(which)}"
        if kind == "sum":
            return f"{self.word(f'sum{which}')} + ({row}) * {self._pitch(self.captures[which])}"
        return super()._row(kind, which)

    def _pitch(self, slot: int) -> str:
        """From row to row, in bytes: one word for all memory of rows of the same width."""
        self.width(slot)
        return self.word(f"w{self.plan.classes[slot]}_row")

    def _on(self, address: str, offset: Any) -> str:
        """An address further on in a row: where memory begins and how far on are one word, since
        a word costs no register, but their sum, which no step changes, would take one throughout.
        """
        if not offset:
            return address
        terms = [self.plan.classes[slot] if kind == "width" else slot for kind, slot in offset]
        names = [f"{kind[0]}{k}" for (kind, _), k in zip(offset, terms, strict=True)]
        base, rest = address.split(" ", 1)
        return f"{self.word('_on_'.join([base, *names]))} {rest}"

    def _unit(self, address: str) -> str:
        """The address of unit j of a row."""
        base, rest = address.split(" + ", 1)
        return f"at({base}, {rest} + j * {self.item})"

    def _state_row(self, k: int, slot: str) -> str:
        base, mask = self.word(f"state{k}"), self.word(f"state{k}_mask")
        pitch = self._pitch(self.plan.state_slots[k])
        return f"{base} + (({slot} & {mask}) * B + first + r) * {pitch}"

    def _region(self, slot: int, by: str, anywhere: bool = False) -> list[Region]:
        """What is read where a value is."""
        base = base_of(self.plan, self.program, slot)
        place = self.program.places.get(base)
        if base in self.chain_of and self.chain_of[base].local:
            return [Region(("shares", k.slot), (), 0, by) for k in self.chain_of[base].stages]
        if place is None:
            return []
        offset: Offset = ()
        at = slot
        while at != base:  # a slice, or a slice of one
            if self.plan.rows[at].op == "slice":
                offset = (*begins(self.plan, at), *offset)
            at = self.program.inputs[at][0]
        width = None if anywhere else self.plan.classes[slot]
        return [self._place_region(place.kind, place.which, offset, width, by)]

    def _place_region(self, kind: str, which: int, offset: Any, width: int | None, by: str) -> Any:
        names = {"after": "state", "before": "dstate"}
        return Region((names.get(kind, kind), which), tuple(offset), width, by)

    # Going over them

    def _over_units(self, width: int, depth: int, body: Any, rows: str = "m") -> None:
        """Each thread's rows and units: r, j, and i, which is j counted from the part's first."""
        self.add(depth, f"r, i = r{width}, i{width}")
        self.add(depth, f"while r < {rows}:")
        self.add(depth + 1, f"j = u{width} + i")
        self._once(depth + 1, body)
        self.add(depth + 1, f"r, i = whole(r + dr{width}), whole(i + di{width})")
        self.add(depth + 1, f"if i >= n{width}:")
        self.add(depth + 2, f"r, i = whole(r + 1), whole(i - n{width})")

    def _over_state(self, k: int, depth: int, body: Any) -> None:
        self._over_units(self.units_of(self.plan.state_slots[k]), depth, body)

    def _once(self, depth: int, body: Any) -> None:
        """The body, which row of the batch row r is and when it is at step s being read once."""
        at = len(self.lines)
        body(depth)
        used = []
        for name, text in (
            ("bt", "word(batch, first + r)"),
            ("t", "word(begin, first + r) + s * onward"),
        ):
            if any(text in line for line in self.lines[at:]):
                used.append("    " * depth + f"{name} = {text}")
                lines = [line.replace(text, name) for line in self.lines[at:]]
                self.lines[at:] = [line for line in lines if line.strip() != f"{name} = {name}"]
        self.lines[at:at] = used

    def _copy(self, depth: int, source: str, to: str) -> None:
        self.add(depth, f"store({to} + j * {self.item}, load({source} + j * {self.item}))")
