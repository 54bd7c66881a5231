"""``Tape``: the list of what is recorded, to print and to check.

Recording itself needs no list; see ``tape.py``. Imports tape, devices and errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinygrad_seq.devices import device_of, is_array, to_device
from tinygrad_seq.errors import TapeError
from tinygrad_seq.tape import Bundle, Entry, check_unwritten, recording


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a tape; ``inputs`` are the indices of earlier lines."""

    index: int
    op: str
    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    text: str  # the operation with its inputs and numbers, to be read
    entry: Entry
    device: str = "cpu"


class Tape:
    """``with Tape() as tape:`` lists what this thread records while the block runs.

    A line is a recorded operation, or at its first use a tensor that was made before: a leaf, a
    constant, or an earlier result. What needs no gradient is not recorded and not listed. Keyword
    arguments give tensors names to be listed under: ``Tape(W=weight)``. The tape keeps the entries
    it lists alive.
    """

    by_steps = False  # whether scans run step by step while the tape is open

    def __init__(self, *unnamed: Any, **names: Any) -> None:
        if unnamed:
            raise ValueError("Tape: a tensor was given without a name; write Tape(x=x)")
        for name, tensor in names.items():
            if not hasattr(tensor, "requires_grad"):
                raise ValueError(
                    f"Tape: {name} is a {type(tensor).__name__}, expected a tensor to list by name"
                )
        self._names = names
        self._lines: list[Line] = []
        self._slots: dict[Entry, int] = {}

    def __enter__(self) -> Tape:
        if any(tape is self for tape in recording.tapes):
            raise TapeError("Tape: it is open already; make another one")
        recording.tapes = (*recording.tapes, self)
        return self

    def __exit__(self, *_: object) -> None:
        recording.tapes = tuple(tape for tape in recording.tapes if tape is not self)

    def __len__(self) -> int:
        return len(self._lines)

    def __iter__(self) -> Iterator[Line]:
        return iter(self._lines)

    def __getitem__(self, index: int) -> Line:
        return self._lines[index]

    def add(self, entry: Entry, inputs: Sequence[Any], value: Any) -> None:
        """List ``entry``; its inputs are tensors and Python numbers. Called by the recorder."""
        texts, slots = [], []
        for given, parent in zip(inputs, entry.parents, strict=True):
            if parent is None:
                texts.append(f"{given!r}")
                continue
            if parent not in self._slots:
                self._add_made_before(parent, given.device)
            slots.append(self._slots[parent])
            texts.append(f"%{slots[-1]}")
        assert entry.op is not None
        params = [_short(p) for p in (entry.saved or ())[entry.op.value_count :][: entry.op.shown]]
        arguments = ", ".join(_abridged(texts) + params)
        text = f"{entry.op.name}({arguments})"
        self._append(entry, entry.op.name, tuple(slots), text, device_of(value))

    def _add_made_before(self, entry: Entry, device: str) -> None:
        """List what was made before it was used: a leaf, or a transform's input with its origin."""
        if entry.op is not None and entry.op.name == "input" and entry.parents[0] is not None:
            origin = entry.parents[0]
            if origin not in self._slots:
                self._add_made_before(origin, device)
            slot = self._slots[origin]
            self._append(entry, "input", (slot,), f"input(%{slot})", device)
            return
        names = [name for name, tensor in self._names.items() if tensor._entry is entry]
        name = names[-1] if names else _kind(entry)
        self._append(entry, name, (), name, device)

    def _append(
        self, entry: Entry, op: str, inputs: tuple[int, ...], text: str, device: str
    ) -> None:
        index = self._slots[entry] = len(self._lines)
        self._lines.append(Line(index, op, inputs, entry.shape, entry.dtype, text, entry, device))

    def __str__(self) -> str:
        if not self._lines:
            return "an empty tape: nothing was recorded, since no input required a gradient"
        rows = [("slot", "operation", "inputs", "shape", "dtype")]
        for line in self._lines:
            inputs = ", ".join(_abridged([f"%{i}" for i in line.inputs]))
            rows.append((f"%{line.index}", line.text, inputs, f"{line.shape}", f"{line.dtype}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )

    def __repr__(self) -> str:
        return f"<Tape of {len(self)} lines>"

    def check(self) -> None:
        """Raise a TapeError naming the first line that is wrong.

        A line stands at its index and after its inputs, and these are the entries that it was made
        from. Its shape and dtype are those that the operation gives for inputs like these (not
        checked once backward has freed what was kept). No kept value was replaced since.
        """
        for line in self._lines:
            self._check_line(line)
        check_unwritten(sorted(self._slots, key=lambda entry: entry.index))

    def _check_line(self, line: Line) -> None:
        where = f"tape line %{line.index}, {line.text}"
        if self._lines[line.index] is not line or self._slots.get(line.entry) != line.index:
            raise TapeError(f"{where}: it is not at its own index")
        if any(not 0 <= i < line.index for i in line.inputs):
            raise TapeError(f"{where}: inputs {line.inputs} do not all stand before it")
        entry = line.entry
        if entry.op is None or entry.saved is None or not line.inputs:
            return  # a leaf of this tape: made before it, or freed since
        parents = [p for p in entry.parents if p is not None]
        if [self._lines[i].entry for i in line.inputs] != parents:
            raise TapeError(f"{where}: its inputs are not the entries that it was made from")
        if entry.index <= max((p.index for p in parents), default=0):
            raise TapeError(f"{where}: it was recorded before one of its inputs")
        if any(type(each.op) is Bundle for each in (entry, *parents)):
            return  # a scan: what it gives depends on more than its inputs' shapes
        blanks = [1 if p is None else self._blank(p) for p in entry.parents]
        made = entry.op.forward(*blanks, *entry.saved[entry.op.value_count :])
        if (made.shape, made.dtype) != (line.shape, line.dtype):
            raise TapeError(
                f"{where}: {line.dtype}{line.shape} is listed, its inputs make "
                f"{made.dtype}{made.shape}"
            )

    def _blank(self, entry: Entry) -> Any:
        ones = np.ones(entry.shape, entry.dtype)
        return to_device(ones, self._lines[self._slots[entry]].device)


def _kind(entry: Entry) -> str:
    """What a tensor is that was made before this tape."""
    if entry.op is not None:
        return "earlier"  # the result of an operation recorded before
    return "leaf" if entry.requires_grad else "constant"


def _abridged(texts: list[str]) -> list[str]:
    return texts if len(texts) <= 6 else [*texts[:3], "…", texts[-1]]


def _short(param: Any) -> str:
    """A param as it is written in Python, arrays by dtype and shape."""
    if is_array(param):
        return f"{param.dtype}{param.shape}"
    if isinstance(param, slice):
        ends = ["" if v is None else str(v) for v in (param.start, param.stop)]
        return ":".join(ends if param.step is None else [*ends, str(param.step)])
    if isinstance(param, tuple):
        inner = ", ".join(_abridged([_short(p) for p in param]))
        return f"({inner},)" if len(param) == 1 else f"({inner})"
    return "…" if param is Ellipsis else str(param)
