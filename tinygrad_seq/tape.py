"""The tape: what is recorded, and the walk back along it.

Every recorded operation is an ``Entry``. A counter gives it its index, and since an entry is made
after its inputs, falling index is a valid order for going backward. There is no global list: an
output owns its entry and an entry owns its inputs' entries, so a graph that nobody holds is gone.
``listing.py`` has the list that one can look at.

No arithmetic lives here and no tensor: the walk is given the functions that know them.
Imports rules and errors.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from inspect import isasyncgenfunction, iscoroutinefunction, isgeneratorfunction
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

import numpy as np

from tinygrad_seq.errors import TapeError
from tinygrad_seq.rules import Function, Operation, Vjps

F = TypeVar("F", bound=Callable[..., Any])
next_index = itertools.count(1).__next__
_index = attrgetter("index")
RUN_LATER = (isgeneratorfunction, iscoroutinefunction, isasyncgenfunction)


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
        self.saved = saved  # as in Operation; None once backward has freed it
        self.shape = shape
        self.dtype = dtype
        self.written = 0  # the index at which the tensor's data was last replaced
        self.index = next_index()


class Leaf(Entry):
    """A tensor that no recorded operation made. It holds the gradient that accumulates."""

    __slots__ = ("device", "grad", "requires_grad", "successor")

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], requires_grad: bool) -> None:
        super().__init__(None, (), (), shape, dtype)
        self.requires_grad = requires_grad
        self.grad: Any = None  # a Tensor of the same shape and dtype
        self.device: str | None = None  # where its tensor was moved to, if it was
        # The tensor's next leaf, once it was frozen, thawed, converted or moved.
        self.successor: Leaf | None = None

    def newest(self) -> Leaf:
        leaf = self
        while leaf.successor is not None:
            leaf = leaf.successor
        return leaf


class _Recording(threading.local):
    """Each thread's own state."""

    def __init__(self) -> None:  # once in each thread
        self.enabled = True
        self.before: list[bool] = []  # what `enabled` was outside each open set_recording
        self.tapes: tuple[Any, ...] = ()  # the open Tapes of listing.py
        # While a cell is traced, the Tracer of recurrence/tracing.py, or what stands in its place.
        self.tracer: Any = None
        self.flow: Any = None  # while gradients are watched, the Watch of recurrence/flow.py
        self.draws: Any = None  # while a cell runs, where its random numbers come from
        self.step: int | None = None  # of the sequence, while a cell runs step by step
        self.flushes = False  # whether numbers below the normal range count as zero


recording = _Recording()


class set_recording:  # noqa: N801
    """``with set_recording(False):`` records nothing in this thread inside the block."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled

    def __enter__(self) -> None:
        recording.before.append(recording.enabled)
        if recording.tracer is not None:
            recording.tracer.depart()
        recording.enabled = self._enabled

    def __exit__(self, *_: object) -> None:
        if recording.tracer is not None:
            recording.tracer.depart()
        recording.enabled = recording.before.pop()


class no_grad(set_recording):  # noqa: N801
    """``with no_grad():`` records nothing in this thread; also a decorator for functions."""

    def __init__(self, *given: Any) -> None:
        if given:
            raise ValueError("no_grad: an argument was given; write @tgs.no_grad(), with ()")
        super().__init__(False)

    def __call__(self, function: F) -> F:
        if any(runs_later(function) for runs_later in RUN_LATER):
            raise ValueError(
                "no_grad: a generator or an async function was given, which runs after the call "
                "has returned; write with tgs.no_grad(): inside it"
            )

        @wraps(function)
        def without_recording(*args: Any, **kwargs: Any) -> Any:
            with no_grad():
                return function(*args, **kwargs)

        return without_recording  # type: ignore[return-value]


# Going backward ------------------------------------------------------------------------------


FREED = (
    "backward: a part of this graph was freed by an earlier backward. If a state is carried over "
    "from there, take tgs.detach(state); otherwise pass retain_graph=True to the earlier backward, "
    "or compute the forward pass again"
)


class Piece(NamedTuple):
    """A gradient that is zero but at ``place``. All pieces for one input are put together at once.

    Without this, reading T steps out of a sequence would cost T whole sequences on the way back.
    """

    place: Any  # an index
    gradient: Any


class Bundle(Operation):
    """An operation with several outputs: its gradient is a dict, from output to gradient.

    Each output is an entry of its own whose derivative is a ``Piece`` at its number. The gradients
    of all inputs are had at once: ``pull(gradients, *saved)``, a list, None where nothing arrives.
    """

    __slots__ = ("pull", "tensor_pull")

    def __init__(self, name: str, inputs: int, pull: Function, tensor_pull: Function) -> None:
        super().__init__(name, (), lambda *_: None, (), shown=0)
        self.pull, self.tensor_pull = pull, tensor_pull
        self.value_count = inputs + 1


class Arithmetic(NamedTuple):
    """What the walk does to gradients, over arrays or over tensors (which records it)."""

    fit: Callable[[Any, Entry], Any]  # undo broadcasting and promotion
    assemble: Callable[[Entry, Sequence[Piece]], Any]  # the pieces as one gradient
    # The derivatives of an entry's operation, and what they are given, from the entry, its parents
    # and `saved`; None: the operation's own, and `saved` as it is.
    derivatives: Callable[[Entry, Any, Any], tuple[Vjps, Sequence[Any]]] | None


def walk(
    roots: dict[Entry, Any],
    arithmetic: Arithmetic,
    wanted: Sequence[Entry] | None = None,
    retain_graph: bool = False,
) -> dict[Entry, Any]:
    """Backward from ``roots``, entries with the gradients that arrive there, to ``wanted``.

    Without ``wanted``, to every leaf that requires a gradient. Returns the gradients of those that
    were reached. Unless ``retain_graph``, an entry lets go of what it kept as soon as it is passed.
    Raises TapeError for a part that was freed, and for a kept value that was replaced since.
    """
    ends = set(wanted or ())
    order = reachable(roots, ends)
    if wanted is not None:
        order = _leading_to(ends, order)
    check_unwritten(order)
    on_the_way = set(order)
    fit, assemble, derivatives = arithmetic
    gradients = dict(roots)
    pieces: dict[Entry, list[Piece]] = {}
    owned: set[Entry] = set()  # whose gradient is a sum made here, which nobody else can see
    result: dict[Entry, Any] = {}
    while order:
        entry = order.pop()  # so that a freed entry goes at once
        op = entry.op
        gradient = gradients.pop(entry, None)
        if pieces and entry in pieces:
            parts = pieces.pop(entry)
            whole = dict(parts) if type(op) is Bundle else assemble(entry, parts)
            gradient = whole if gradient is None else gradient + whole
        if gradient is None:
            continue  # a bundle on which it has no influence after all
        if op is None or entry in ends:
            result[entry] = gradient
            continue
        # Parents are read before `saved`, and freeing clears `saved` before parents: so another
        # thread's backward is noticed.
        parents, saved, vjps = entry.parents, entry.saved, op.vjps
        if saved is None:
            raise TapeError(FREED)
        if derivatives is not None:
            vjps, saved = derivatives(entry, parents, saved)
        together: Sequence[Any] | None = None
        if type(op) is Bundle:
            together = (op.pull if derivatives is None else op.tensor_pull)(gradient, *saved)
        for k, parent in enumerate(parents):
            if parent is None or parent not in on_the_way:  # a number, or a constant
                continue
            part = vjps[k](gradient, *saved) if together is None else together[k]
            if part is None:
                continue
            if type(part) is Piece:
                pieces.setdefault(parent, []).append(part)
                continue
            if part.shape != parent.shape or part.dtype is not parent.dtype:
                part = fit(part, parent)
            if parent not in gradients:
                gradients[parent] = part
            elif parent in owned:
                gradients[parent] += part  # arrays in place; tensors have no such operation
            else:
                gradients[parent] = gradients[parent] + part
                owned.add(parent)
        if not retain_graph:
            entry.saved = None
            entry.parents = ()
    return result


def reachable(roots: Iterable[Entry], ends: set[Entry]) -> list[Entry]:
    """The entries that the roots depend on and that require a gradient, in rising order.

    It does not go beyond ``ends``, nor beyond entries that are older than all of them; those
    themselves are in the list. Raises TapeError for a part that was freed.
    """
    oldest = min([end.index for end in ends]) if ends else 0
    seen = set(roots)
    stack = list(seen)
    while stack:
        entry = stack.pop()
        if ends and (entry in ends or entry.index < oldest):
            continue
        if entry.saved is None:
            raise TapeError(FREED)
        for parent in entry.parents:
            if parent is not None and parent.requires_grad and parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return sorted(seen, key=_index)


def _leading_to(ends: set[Entry], order: Iterable[Entry]) -> list[Entry]:
    """The part of ``order`` from which the ends can be reached, the ends included."""
    found = set(ends)
    leading = []
    for entry in order:
        if entry in ends or not found.isdisjoint(entry.parents):
            found.add(entry)
            leading.append(entry)
    return leading


# Values that were replaced -------------------------------------------------------------------
#
# An array is never written to, so what an entry kept is still what it was. But a gradient at values
# that the tensor no longer has is seldom what is meant, and never noticed: so backward refuses.

last_write = 0  # the index of the newest replacement of any tensor's data


def mark_written(entry: Entry) -> None:
    """The value of the entry's tensor was replaced: what was recorded before is now older."""
    global last_write
    entry.written = last_write = next_index()


def check_unwritten(entries: Iterable[Entry]) -> None:
    """Raise a TapeError if a kept value belongs to a tensor whose data was replaced since.

    ``entries`` are in rising order.
    """
    newest: dict[Entry, int] = {}  # the newest write to each source, or to what it is a view of
    for entry in entries:
        if entry.index > last_write:
            return  # nothing was replaced since this one and the rest were recorded
        if entry.op is None or not entry.op.value_count or entry.saved is None:
            continue
        for kept, source in zip(entry.saved, (*entry.parents, entry), strict=False):
            if kept is None or source is None:
                continue
            if _newest_write(source, newest) > entry.index:
                raise TapeError(
                    f"backward: {entry.op.name} needs the value that a tensor of shape "
                    f"{source.shape} had when it was recorded, but `.data` was assigned since; "
                    "call backward before changing data, or compute the forward pass again"
                )


def _newest_write(entry: Entry, known: dict[Entry, int]) -> int:
    """When the entry's data, or the data that it is a view of, was last replaced; 0 for never."""
    chain: list[Entry] = []
    now: Entry | None = entry
    while now is not None and now not in known:
        chain.append(now)
        is_view = now.op is not None and now.op.view and now.parents
        now = now.parents[0] if is_view else None
    written = 0 if now is None else known[now]
    for link in reversed(chain):
        own = link.newest().written if isinstance(link, Leaf) else link.written
        written = known[link] = max(written, own)
    return written
