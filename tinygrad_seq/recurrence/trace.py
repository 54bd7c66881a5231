"""The step tape: what a cell does in one step, and what is made of that.

A trace is a list of rows, each an operation on earlier rows. Only its structure is in the rows: how
many steps, rows of a batch and units there are is kept beside them, and what Python numbers and
tensors are involved is no part of it, so that a change of any of these is no other cell.

``tracing.py`` writes a trace, ``derive.py`` and ``plan.py`` add rows to a copy of it. A row is
(B, n); a value (B,) counts as n = 1, and one of more axes, (B, a, b), as n = a·b units, see
``choices.py``. Imports the engine and program.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from tinygrad_seq.errors import WAY_OUT, TraceError
from tinygrad_seq.program import Row
from tinygrad_seq.rules import RULES
from tinygrad_seq.tape import recording
from tinygrad_seq.tensors import Tensor

if TYPE_CHECKING:
    from tinygrad_seq.recurrence.tracing import Tracer

COMPARISONS = ("less", "less_equal", "greater", "greater_equal", "equal", "not_equal")
# What a pass over a row computes, as against what is there already or comes from a product.
COMPUTED = {"copy", "broadcast", "uniform", *RULES, *COMPARISONS}

# What a cell uses a tensor as that it closes over: beside values of the step, as the right side of
# a product, or as that of a product with its transpose; or as the numbers of units that are chosen.
BESIDE, MATRIX, TRANSPOSED, UNITS = "beside", "matrix", "transposed", "units"
ROLES = {"matmul": MATRIX, "linear": TRANSPOSED}  # by the names of products
CAPTURED = ("capture", "matrix", "units")  # rows of these tensors

new_row = tuple.__new__  # a NamedTuple in half the time
new_tensor = Tensor.__new__


def as_used(array: Any, role: str) -> Any:
    """An array, or a tensor, as the step reads it."""
    return array.T if role is TRANSPOSED else array


def exact_up_to(dtype: np.dtype[Any]) -> int:
    """The whole numbers from its negative to this one are all in a floating dtype."""
    return 1 << (int(np.finfo(dtype).nmant) + 1)


class Trace:
    """A step tape: rows, and beside them what the rows leave open."""

    def __init__(self, batch_size: int, dtype: np.dtype[Any], device: str = "cpu") -> None:
        self.B, self.dtype, self.device = batch_size, dtype, device
        self.rows: list[Row] = []
        self.widths: list[int] = []  # of each row, how many units it has
        self.single: list[bool] = []  # whether that is 1 whatever the sizes
        self.roles: list[str] = []  # what each tensor is used as that is closed over, see BESIDE
        self.starts: dict[int, int] = {}  # where a slice begins
        self.cuts: dict[int, list[int]] = {}  # the slices of a row
        self.gaps: dict[int, list[tuple[int, int]]] = {}  # as wide as what is beside each slice
        self.frozen: set[int] = set()  # rows through which no gradient goes
        self.like: dict[int, int] = {}  # rows that have the width of another by what they mean

    def up_to(self, end: int) -> Trace:
        """The first rows, to go on from without this trace being changed."""
        made = Trace(self.B, self.dtype, self.device)
        made.rows, made.widths, made.single = self.rows[:end], self.widths[:end], self.single[:end]
        made.roles = self.roles[: sum(row.op in CAPTURED for row in made.rows)]
        made.starts = {slot: start for slot, start in self.starts.items() if slot < end}
        cuts = {base: [slot for slot in cut if slot < end] for base, cut in self.cuts.items()}
        made.cuts = {base: cut for base, cut in cuts.items() if cut}
        made.gaps = {base: [*gaps] for base, gaps in self.gaps.items() if gaps[-1][-1] < end}
        made.frozen = {slot for slot in self.frozen if slot < end}
        made.like = {slot: other for slot, other in self.like.items() if slot < end}
        return made

    def copied(self) -> Trace:
        """The same rows, to go on from without this trace being changed."""
        return self.up_to(len(self.rows))

    def add(
        self,
        op: str,
        inputs: tuple[int, ...] = (),
        detail: Any = None,
        width: int = 1,
        single: bool = False,
    ) -> int:
        """Write a row down; its slot, which is its place in ``rows``."""
        self.rows.append(new_row(Row, (op, inputs, detail)))
        self.widths.append(width)
        self.single.append(single)
        return len(self.rows) - 1

    def copy_of(self, slot: int) -> int:
        """A row that computes the same as another one."""
        made = self.add("copy", (slot,), (False,), self.widths[slot], self.single[slot])
        self.like[made] = slot
        return made

    def find_gaps(self) -> None:
        """Where the slices of a row do not follow one another from end to end, say what is left.

        They may be read in any order.
        """
        for base, cuts in self.cuts.items():
            width, end = self.widths[base], 0
            for slot in sorted(cuts, key=lambda slot: (self.starts[slot], self.widths[slot])):
                if self.starts[slot] != end:
                    break
                end += self.widths[slot]
            else:
                if end == width:
                    continue
            self.gaps[base] = []
            for slot in cuts:
                after = width - self.starts[slot] - self.widths[slot]
                left = self.add("gap", (base,), 0, self.starts[slot])
                right = self.add("gap", (base,), 1, after)
                self.gaps[base].append((left, right))


class Traced:
    """In the place of an array: the shape and dtype of a row, and no values.

    ``tracer`` is who writes down what is done with it: a Tracer, or a Precedent in its place.
    """

    __slots__ = ("dtype", "shape", "slot", "tracer")

    def __init__(self, tracer: Tracer, slot: int, shape: tuple[int, ...], dtype: Any) -> None:
        self.tracer, self.slot, self.shape, self.dtype = tracer, slot, shape, dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    def astype(self, dtype: Any, copy: Any = None) -> Traced:
        if copy is not None:
            _no_value(self, "a copy of it was asked for")
        return self.tracer.cast(self, np.dtype(dtype))

    def __array_ufunc__(self, ufunc: np.ufunc, *_: Any, **__: Any) -> NoReturn:
        _no_value(self, f"its {ufunc.__name__} was asked for")

    def _value_wanted(self, *_: Any, **__: Any) -> NoReturn:
        _no_value(self, "its value was asked for")

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):
            raise AttributeError(name)
        _no_value(self, f"its {name} was asked for")

    view = item = tolist = __array__ = __bool__ = __float__ = __int__ = __index__ = _value_wanted


def stand_in(tracer: Tracer, slot: int, shape: tuple[int, ...], dtype: Any) -> Tensor:
    """A tensor whose value is a row of the step tape."""
    tensor = new_tensor(Tensor)
    tensor._data = Traced(tracer, slot, shape, dtype)
    tensor._entry = None
    return tensor


def _no_value(traced: Traced, what: str) -> NoReturn:
    op = traced.tracer.trace.rows[traced.slot].op
    if recording.tracer is None:
        raise TraceError(
            f"scan: at line %{traced.slot} of the step ({op}) {what}, but the call of the cell is "
            "over, and its values are gone; let the cell return what is wanted with its output, "
            "y = {'h': h, 'gate': gate}, and the scan gives it for all steps"
        )
    raise TraceError(
        f"scan: at line %{traced.slot} of the step ({op}) {what} "
        "(data, numpy(), item(), bool(), print, an index), but a cell is traced without values: "
        "choose with tgs.where instead of if, look rows of a table up (an embedding) before the "
        f"scan, and look at values outside the cell; {WAY_OUT}"
    )


class Step(NamedTuple):
    """What tracing a cell gives: the step tape, where outputs and next state stand, and what of the
    call is no part of the tape."""

    trace: Trace
    y: Any  # the structure of y with its shapes (B, ...), as traced tensors
    state: Any
    y_slots: tuple[int, ...]
    state_slots: tuple[int, ...]
    length: int  # rows of the cell itself; its derivative's may follow
    widths: tuple[int, ...]  # of these
    starts: tuple[tuple[int, int], ...]  # of their slices
    draws: bool  # whether any random numbers are drawn
    captured: list[Tensor]  # what the cell closes over, in the order of ``Trace.roles``
    numbers: list[float]
    seeds: list[int]  # of each operation that draws at every step
    precedent: Any = None  # what it was traced along, see ``following.py``
    known: Any = None  # what gives it without the cell being run, see ``settled.py``
