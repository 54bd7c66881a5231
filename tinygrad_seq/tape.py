"""The tape: what was recorded, and the walk back along it.

Every recorded operation is an ``Entry``. A counter gives it its index, and since an entry is made
after its inputs, falling index is a valid order for going backward. There is no global list: an
output owns its entry and an entry owns its inputs' entries, so a graph that nobody holds is gone.
A ``Tape`` is a list of what its thread records while it is open, to print and to check.
No arithmetic lives here and no tensor: the walk takes the functions that know them.
Imports rules and errors.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

import numpy as np

from tinygrad_seq.errors import TapeError
from tinygrad_seq.rules import Array, Operation

F = TypeVar("F", bound=Callable[..., Any])
next_index = itertools.count(1).__next__


class Entry:
    """One recorded operation: what it was, where its inputs came from, what backward needs."""

    __slots__ = ("dtype", "index", "op", "parents", "saved", "shape", "written")
    requires_grad = True

    def __init__(
        self,
        op: Operation | None,
        parents: tuple[Entry | None, ...],
        saved: Sequence[Any] | None,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
    ) -> None:
        self.op = op
        self.parents = parents  # None stands for a Python number
        self.saved = saved  # None once backward has freed it
        self.shape = shape
        self.dtype = dtype
        self.written = 0  # the index at which the tensor's data was last replaced
        self.index = next_index()


class Leaf(Entry):
    """A tensor that no recorded operation made. It holds the gradient that accumulates."""

    __slots__ = ("grad", "requires_grad")

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], requires_grad: bool) -> None:
        super().__init__(None, (), (), shape, dtype)
        self.requires_grad = requires_grad
        self.grad: Any = None  # a Tensor of the same shape and dtype


class _Recording(threading.local):
    """Each thread's own state."""

    enabled = True
    tapes: tuple[Tape, ...] = ()


recording = _Recording()
last_write = 0  # the index of the newest write to any tensor's data


def mark_written(entry: Entry) -> None:
    """The value of the entry's tensor was replaced: what was recorded before is now older."""
    global last_write
    entry.written = last_write = next_index()


class no_grad:  # noqa: N801
    """``with no_grad():`` records nothing in this thread; also a decorator for functions."""

    def __enter__(self) -> None:
        self._before = recording.enabled
        recording.enabled = False

    def __exit__(self, *_: object) -> None:
        recording.enabled = self._before

    def __call__(self, function: F) -> F:
        @wraps(function)
        def without_recording(*args: Any, **kwargs: Any) -> Any:
            with no_grad():
                return function(*args, **kwargs)

        return without_recording  # type: ignore[return-value]


# Going backward ------------------------------------------------------------------------------


class Piece(NamedTuple):
    """A gradient that is zero but at ``index``; many of them for one input are put together once.

    Without this, reading T steps out of a sequence would cost T sequences on the way back.
    """

    index: Any
    gradient: Any
    shape: None = None  # unlike any array's: the walk looks closer


class Arithmetic(NamedTuple):
    """The few things the walk does to a gradient, over arrays or over tensors."""

    fit: Callable[[Any, Entry], Any]  # undo broadcasting and promotion
    scatter: Callable[[Entry, Sequence[Piece]], Any]  # the pieces as one gradient
    tensors: Callable[[Entry], Sequence[Any]] | None  # what was saved as tensors; None: as arrays


def reachable(roots: Iterable[Entry], stops: Iterable[Entry] = ()) -> list[Entry]:
    """The entries that the roots depend on, up to the stops, in rising order."""
    seen = set(roots)
    stack = list(seen)
    ends = set(stops)
    while stack:
        entry = stack.pop()
        if entry in ends:
            continue
        if entry.saved is None:
            raise TapeError(
                "backward: a part of this graph was freed by an earlier backward; pass "
                "retain_graph=True to the earlier one, or compute the forward pass again"
            )
        for parent in entry.parents:
            if parent is not None and parent.requires_grad and parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return sorted(seen, key=attrgetter("index"))


def walk(
    roots: dict[Entry, Any],
    arithmetic: Arithmetic,
    wanted: Sequence[Entry] | None = None,
    retain_graph: bool = False,
) -> dict[Entry, Any]:
    """Backward from the roots' gradients to the ``wanted`` entries, or else to every leaf.

    Returns the gradient of each that was reached. Unless ``retain_graph``, each entry lets go of
    what it kept as soon as it has been passed.
    """
    order = reachable(roots, wanted or ())
    if last_write > next((entry.index for entry in order if entry.op is not None), last_write):
        check_unwritten(order)
    on_the_way = _leading_to(wanted, order) if wanted is not None else None
    ends = set(wanted or ())
    fit, scatter, as_tensors = arithmetic
    gradients = dict(roots)
    pieces: dict[Entry, list[Piece]] = {}
    ours: set[Entry] = set()  # whose gradient is a sum made here, so that nobody else sees it
    result: dict[Entry, Any] = {}
    while order:
        entry = order.pop()
        gradient = gradients.pop(entry, None)
        if pieces and entry in pieces:
            scattered = scatter(entry, pieces.pop(entry))
            gradient = scattered if gradient is None else gradient + scattered
        if gradient is None:
            continue
        if entry.op is None or entry in ends:
            result[entry] = gradient
            continue
        saved: Any = entry.saved
        vjps = entry.op.vjps
        if as_tensors is not None:
            saved, vjps = as_tensors(entry), entry.op.vjps_over_tensors
        for k, parent in enumerate(entry.parents):
            if parent is None or not parent.requires_grad:
                continue
            if on_the_way is not None and parent not in on_the_way:
                continue
            part = vjps[k](gradient, *saved)
            if part.shape != parent.shape or part.dtype is not parent.dtype:
                if type(part) is Piece:
                    pieces.setdefault(parent, []).append(part)
                    continue
                part = fit(part, parent)
            if parent not in gradients:
                gradients[parent] = part
            elif parent in ours and as_tensors is None:
                gradients[parent] += part
            else:
                gradients[parent] = gradients[parent] + part
                ours.add(parent)
        if not retain_graph:
            entry.saved, entry.parents = None, ()
    return result


def _leading_to(wanted: Sequence[Entry], order: Iterable[Entry]) -> set[Entry]:
    found = set(wanted)
    for entry in order:
        if not found.isdisjoint(entry.parents):
            found.add(entry)
    return found


def check_unwritten(entries: Iterable[Entry]) -> None:
    """Raise a TapeError if a kept value belongs to a tensor whose data was replaced since."""
    for entry in entries:
        if entry.op is None or not entry.op.values or entry.saved is None:
            continue
        for kept, source in zip(entry.saved, (*entry.parents, entry), strict=False):
            if kept is not None and source is not None and _written_since(source, entry.index):
                raise TapeError(
                    f"backward: {entry.op.name} needs the value that a tensor of shape "
                    f"{source.shape} had when it was recorded, but `.data` was assigned since; "
                    "call backward before changing data, or compute the forward pass again"
                )


def _written_since(entry: Entry, index: int) -> bool:
    """Whether the entry's data, or the data that it is a view of, was replaced after ``index``."""
    while True:
        if entry.written > index:
            return True
        if entry.op is None or entry.op.name not in VIEWS or entry.parents[0] is None:
            return False
        entry = entry.parents[0]


VIEWS = frozenset({"broadcast_to", "getitem", "permute_dims", "reshape"})


# Looking at it -------------------------------------------------------------------------------


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


class Tape:
    """``with Tape() as tape:`` lists what this thread records while the block runs.

    A line is a recorded operation, or a leaf (a tensor made outside) at its first use. What needs
    no gradient is not recorded and not listed. Keyword arguments give tensors names to be listed
    under: ``Tape(W=weight)``. The tape keeps the entries it lists alive.
    """

    def __init__(self, **names: Any) -> None:
        self._names = {id(tensor): name for name, tensor in names.items()}
        self._named = tuple(names.values())  # keeps the ids from being used again
        self._lines: list[Line] = []
        self._slots: dict[Entry, int] = {}

    def __enter__(self) -> Tape:
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

    def add(self, entry: Entry, inputs: Sequence[Any]) -> None:
        """List ``entry``; its inputs are tensors and Python numbers. Called by the recorder."""
        texts, slots = [], []
        for given, parent in zip(inputs, entry.parents, strict=True):
            if parent is None:
                texts.append(f"{given!r}")
                continue
            if parent not in self._slots:
                name = self._names.get(id(given), "leaf" if parent.requires_grad else "constant")
                self._append(parent, name, (), name)
            slots.append(self._slots[parent])
            texts.append(f"%{slots[-1]}")
        assert entry.op is not None
        params = [_short(p) for p in (entry.saved or ())[entry.op.values :][: entry.op.shown]]
        arguments = ", ".join(_abridged(texts) + params)
        self._append(entry, entry.op.name, tuple(slots), f"{entry.op.name}({arguments})")

    def _append(self, entry: Entry, op: str, inputs: tuple[int, ...], text: str) -> None:
        index = self._slots[entry] = len(self._lines)
        self._lines.append(Line(index, op, inputs, entry.shape, entry.dtype, text, entry))

    def __str__(self) -> str:
        if not self._lines:
            return "an empty tape: nothing was recorded, since no input required a gradient"
        rows = [("slot", "operation", "inputs", "shape", "dtype")]
        for line in self._lines:
            inputs = ", ".join(_abridged([f"%{i}" for i in line.inputs]))
            operation = line.text if line.inputs else line.op
            rows.append((f"%{line.index}", operation, inputs, f"{line.shape}", f"{line.dtype}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )

    def __repr__(self) -> str:
        return f"<Tape of {len(self)} lines>"

    def check(self) -> None:
        """Raise a TapeError naming the first line that is wrong.

        A line's inputs stand before it, it has as many as its operation takes, its shape and dtype
        are those that the operation gives for its inputs, and no kept value was changed since.
        """
        for line in self._lines:
            self._check_line(line)
        check_unwritten(line.entry for line in self._lines)

    def _check_line(self, line: Line) -> None:
        where = f"tape line %{line.index}, {line.text}"
        if self._lines[line.index] is not line or self._slots.get(line.entry) != line.index:
            raise TapeError(f"{where}: it is not at its own index")
        if any(not 0 <= i < line.index for i in line.inputs):
            raise TapeError(f"{where}: inputs {line.inputs} do not all stand before it")
        entry = line.entry
        if entry.op is None or entry.saved is None:
            return
        parents = [p for p in entry.parents if p is not None]
        if [self._lines[i].entry for i in line.inputs] != parents:
            raise TapeError(f"{where}: its inputs are not the entries that it was made from")
        if entry.index <= max((p.index for p in parents), default=0):
            raise TapeError(f"{where}: it was recorded before one of its inputs")
        if len(parents) < len(entry.parents):
            return  # a Python number may be anything, and weak
        params = entry.saved[entry.op.values :]
        blanks = [np.ones(p.shape, p.dtype) for p in parents]
        made: Array = np.asarray(entry.op.forward(*blanks, *params))
        if (made.shape, made.dtype) != (line.shape, line.dtype):
            raise TapeError(
                f"{where}: {line.dtype}{line.shape} is listed, its inputs make "
                f"{made.dtype}{made.shape}"
            )


def _abridged(texts: list[str]) -> list[str]:
    return texts if len(texts) <= 6 else [*texts[:3], "…", texts[-1]]


def _short(param: Any) -> str:
    if isinstance(param, np.ndarray):
        return f"{param.dtype}{param.shape}"
    if isinstance(param, slice):
        ends = ["" if v is None else str(v) for v in (param.start, param.stop)]
        return ":".join(ends if param.step is None else [*ends, str(param.step)])
    if isinstance(param, tuple):
        inner = ", ".join(_abridged([_short(p) for p in param]))
        return f"({inner},)" if len(param) == 1 else f"({inner})"
    return "…" if param is Ellipsis else str(param)
