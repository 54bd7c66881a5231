"""What things in a cell are called: its parameters, their views, and the values of its own code.

Imports the engine and trace.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy as np

from tinygrad_seq.recurrence.trace import TRANSPOSED, Step, Trace, Traced
from tinygrad_seq.tape import Entry
from tinygrad_seq.tensors import Tensor


class Names:
    """What a cell calls its tensors, and, of the time inside ``with``, the values of its step.

    Python reports each function that returns. If its code stands in a module of the cell, or of a
    module inside, its variables are looked at.
    """

    def __init__(self, cell: Any) -> None:
        modules = [cell, *(cell.modules() if hasattr(cell, "modules") else ())]
        types = [base for each in modules for base in type(each).__mro__]
        self._of_cell = {getattr(each, "__module__", None) for each in (cell, *types)}
        self._frames: list[dict[str, Any]] = [getattr(cell, "__dict__", {})]
        self.tensors = _held(cell)

    def __enter__(self) -> None:
        self._before = sys.getprofile()
        sys.setprofile(self._look)

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self._before)

    def _look(self, frame: Any, event: str, _: Any) -> None:
        if event == "return" and frame.f_globals.get("__name__") in self._of_cell:
            seen = {n: frame.f_globals.get(n) for n in frame.f_code.co_names}
            self._frames.insert(
                0, {**seen, **frame.f_locals}
            )  # callers return later, and come first

    def of(self, slot: int, trace: Trace) -> list[tuple[int, str]]:
        """All names of a line of the trace, each with how far inside it was found."""
        return [
            (k, name)
            for k, frame in enumerate(self._frames)
            for name, value in frame.items()
            if isinstance(value, Tensor)
            and type(data := value._data) is Traced
            and data.tracer.trace is trace
            and data.slot == slot
        ]

    def values(self, trace: Trace) -> dict[int, str]:
        """Lines of the trace by name, no name twice.

        The tensors that were found with them are added to ``tensors``, and so are those of modules.
        """
        lines: dict[int, str] = {}
        for frame in self._frames:
            for name, value in frame.items():
                self.tensors += _held(value, f"{name}.")
                data = value._data if isinstance(value, Tensor) else None
                if (
                    type(data) is Traced
                    and data.tracer.trace is trace
                    and data.slot not in lines
                    and name not in lines.values()
                ):
                    lines[data.slot] = name
        return lines


def _held(value: Any, before: str = "", above: tuple[Any, ...] = ()) -> list[tuple[str, Tensor]]:
    """Tensors, alone or of a module, in lists, tuples and dicts too, and what to call them."""
    if isinstance(value, Tensor):
        return [] if type(value._data) is Traced else [(short(before[:-1]), value)]
    if isinstance(value, (list, tuple, dict)):
        if any(value is each for each in above):
            return []  # it holds itself
        items = value.items() if isinstance(value, dict) else enumerate(value)
        inside = [_held(each, f"{before}{key}.", (*above, value)) for key, each in items]
        return [pair for pairs in inside for pair in pairs]
    if isinstance(value, type) or not hasattr(value, "named_parameters"):
        return []
    named = [*value.named_parameters(), *value.named_buffers()]
    return [(short(before + name), tensor) for name, tensor in named]


def short(name: str) -> str:
    """weight_ih as W_ih, gate.bias as gate.b."""
    *path, last = name.split(".")
    for word, letter in (("weight", "W"), ("bias", "b")):
        if last == word or last.startswith(word + "_"):
            last = letter + last.removeprefix(word)
    return ".".join([*path, last])


class Widths(NamedTuple):
    """Places along an axis, in words: H for the state's width and I for the input's."""

    H: int
    I: int

    def cut(self, start: int, stop: int, width: int) -> str:
        first = self._place(start) if start else ""
        return f"{first}:" if stop == width else f"{first}:{self._place(stop)}"

    def _place(self, n: int) -> str:
        if self.H > 1 and n and n % self.H == 0:
            return "H" if n == self.H else f"{n // self.H}H"
        return "I" if n == self.I > 1 else str(n)


def captured_text(k: int, step: Step, names: list[tuple[str, Tensor]], widths: Widths) -> str:
    """The k-th tensor that a cell closes over, in words, as the step reads it."""
    text = tensor_text(step.captured[k], names, widths)
    if step.trace.roles[k] is not TRANSPOSED:
        return text
    return text.removesuffix("ᵀ") if text.endswith("ᵀ") else text + "ᵀ"


def tensor_text(tensor: Tensor, names: list[tuple[str, Tensor]], widths: Widths) -> str:
    """What a tensor is that was there before the step, in words."""
    by_entry = {t._entry: name for name, t in reversed(names) if t._entry is not None}
    way = [tensor._entry] if tensor._entry is not None else []  # the views it was taken through
    while way and way[-1].op is not None and way[-1].op.view and way[-1].parents:
        way.append(way[-1].parents[0])  # type: ignore[arg-type]
    for k in reversed(range(len(way))):
        if way[k] in by_entry:
            return _viewed(by_entry[way[k]], way[k - 1 :: -1] if k else [], widths)
    for name, t in names:  # off the tape, a view is known by its memory
        on_host = type(t._data) is type(tensor._data) is np.ndarray
        if on_host and t.size and np.may_share_memory(t._data, tensor._data):
            return name + "ᵀ" * (t.ndim == 2 and t._data.strides == tensor._data.strides[::-1])
    waiting, seen = way[-1:], set(way[-1:])
    for entry in waiting:  # which grows
        parents = [each for each in entry.parents if each is not None and each not in seen]
        waiting += parents
        seen.update(parents)
    origins = [by_entry[entry] for entry in waiting if entry in by_entry]
    if origins:
        return f"(from {', '.join(dict.fromkeys(origins))})"
    return "constant" if tensor.ndim else f"{float(tensor._data):.3g}"


def _viewed(name: str, way: list[Entry], widths: Widths) -> str:
    """A name with the cuts and the transposition that follow, the cuts on its own axes."""
    transposed = False
    for entry in way:
        assert entry.op is not None
        assert entry.parents[0] is not None
        if entry.op.name == "permute_dims":
            transposed = not transposed
        elif entry.op.name == "getitem":
            index, shape = (entry.saved or ((),))[-1], entry.parents[0].shape
            if all(isinstance(part, slice) and part.step in (None, 1) for part in index):
                cuts = [":"] * len(shape)
                for k, (part, n) in enumerate(zip(index, shape, strict=False)):
                    start, stop, _ = part.indices(n)
                    cuts[k] = widths.cut(start, stop, n)
                text = ", ".join(cuts[::-1] if transposed else cuts)
                name += f"[{text.removesuffix(', :')}]"
            else:
                name += "[…]"
    return name + "ᵀ" * transposed
