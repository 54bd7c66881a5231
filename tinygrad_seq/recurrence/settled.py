"""Cells of which it is known, without running them, that they would do again what they did.

Where everything that a cell can read is the very object that it was (``reach.py``), it is not run
again, and a call like an earlier one is not checked again. Of a cell of which that is not known
nothing is taken for granted, and ``following.py`` runs it. Imports rules, tensors, reach and
trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import ref

from tinygrad_seq.recurrence.reach import Reach
from tinygrad_seq.recurrence.trace import Step
from tinygrad_seq.rules import Operation
from tinygrad_seq.tensors import Tensor, apply

MOST = 256  # cells that are remembered
MOST_CALLS = 64  # of each; and steps of each


class Made(NamedTuple):
    """A tensor that the cell made of what was there before, such as a part of a parameter."""

    op: Operation
    inputs: Sequence[Any]
    params: tuple[Any, ...]
    tensor: Tensor


class Known:
    """A step that a cell would do again."""

    def __init__(self, step: Step, made: list[Made]) -> None:
        self.step = step._replace(known=self)
        self.made = made  # what the step reads that the cell makes, in the order of making
        self.used = False  # whether a call was spared the cell

    def again(self) -> Step:
        """The step, with tensors that are made anew of the values of now."""
        self.used = True
        if not self.made:
            return self.step
        new: dict[int, Tensor] = {}
        for op, inputs, params, tensor in self.made:
            new[id(tensor)] = apply(op, [new.get(id(each), each) for each in inputs], params)
        captured = [new.get(id(tensor), tensor) for tensor in self.step.captured]
        return self.step._replace(captured=captured)


class Settled:
    """A cell, what it can read, and its steps and calls while all of that is the same."""

    def __init__(self, cell: Any) -> None:
        """Raises LookupError for a cell of which it is not known what it can read."""
        self.reach = Reach(cell)
        self.steps: dict[Any, Known] = {}  # by shapes of what the cell was given
        self.calls: dict[Any, Any] = {}  # by what is alike in them, see ``repeating.py``
        key, forget = id(cell), _settled.pop  # names that may be gone when the interpreter ends
        self._cell = ref(cell, lambda _: forget(key, None))  # nobody reads it, but it must live

    def remember(self, key: Any, step: Step, made: Sequence[Made]) -> Known:
        """That this is what the cell does with these shapes; raises LookupError if it may not."""
        tensors = self.reach.tensors
        if step.draws or any(self.reach.may_decide(each.tensor) for each in made):
            raise LookupError
        there = {*map(id, tensors), *map(id, step.precedent.constants.values())}
        wanted = {*map(id, step.captured)} - there
        needed: list[Made] = []
        for each in reversed(made):
            if id(each.tensor) in wanted:
                wanted.discard(id(each.tensor))
                wanted |= {id(given) for given in each.inputs if type(given) is Tensor} - there
                needed.insert(0, each)
        if wanted:
            raise LookupError  # of something that no operation has made
        if len(self.steps) >= MOST_CALLS:
            self.steps.clear()
        known = self.steps[key] = Known(step, needed)
        return known

    def has(self, known: Known | None) -> bool:
        """Whether this is what the cell does, and not what it did before something changed."""
        return known is not None and any(each is known for each in [*self.steps.values()])

    def remember_call(self, like: Any, call: Any) -> None:
        if len(self.calls) >= MOST_CALLS:
            self.calls.clear()
        self.calls[like] = call


_settled: dict[int, Settled] = {}


def settled(cell: Any) -> Settled | None:
    """What is known of a cell, if nothing has changed since; otherwise it is let go."""
    found = _settled.get(id(cell))
    if found is None or found.reach.is_still_so(cell):
        return found
    _settled.pop(id(cell), None)
    return None


def settle(found: Settled, cell: Any, key: Any, step: Step, made: Sequence[Made]) -> Known | None:
    """Remember what a cell did; None if something has changed while it was run.

    ``found`` is what it could read before. Raises LookupError for a cell of which it is not known
    what it will do the next time.
    """
    known = found.remember(key, step, made)
    if not found.reach.is_still_so(cell):
        return None
    if len(_settled) >= MOST:
        _settled.clear()
    _settled[id(cell)] = found
    return known
