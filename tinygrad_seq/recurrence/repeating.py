"""Calls of ``scan`` that are like an earlier one: a settled cell, and inputs of the same kinds.

What was checked, found and decided in the earlier one holds for them too, so it is kept, without
its inputs. Imports the engine, arguments, derive, reach, settled and trace.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from tinygrad_seq.recurrence.arguments import Given, alike
from tinygrad_seq.recurrence.derive import Needs
from tinygrad_seq.recurrence.reach import kinds
from tinygrad_seq.recurrence.settled import settled
from tinygrad_seq.recurrence.trace import as_used
from tinygrad_seq.tensors import Tensor
from tinygrad_seq.trees import leaves

if TYPE_CHECKING:
    from tinygrad_seq.recurrence.compiled import Call


def likeness(xs: Any, state: Any, *options: Any) -> Any:
    """What calls have in common if they are alike but for values; None if that is not simple."""
    states = () if state is None else state if type(state) is tuple else (state,)
    given = xs, *states
    for each in given:
        if type(each) is not Tensor:
            return None
    return kinds(given), type(state), options


def repeated(cell: Any, xs: Any, state: Any, like: Any) -> Call | None:
    """The call, made after one like it that was kept; None if there is none."""
    found = settled(cell)
    pattern: Pattern | None = None if found is None else found.calls.get(like)
    if found is None or pattern is None:
        return None
    if found.reach.is_own:
        state = pattern.state if state is None else state
    elif hasattr(cell, "initial_state"):  # it may be learned, or drawn, which counts in any case
        first = cell.initial_state(pattern.call.given.B)
        if state is None:
            state = first
            if not alike(state, pattern.state) or kinds(leaves(state)) != kinds(
                leaves(pattern.state)
            ):
                return None
    return pattern.again(cell, xs, state)


def keep(call: Call, like: Any, from_start: bool) -> None:
    """Keep a call for others that are like it; ``from_start``: no state was given."""
    found = settled(call.cell)
    if found is None or not found.has(call.step.known):  # but what another thread has changed
        return
    if type(call.xs[0]._data) is np.ndarray:
        found.remember_call(like, Pattern(call, call.given.state if from_start else ()))


class Pattern:
    """A call without its inputs, after which others like it are made."""

    def __init__(self, call: Call, state: Any) -> None:
        """``state`` is the one to begin with where none is given."""
        self.plain = _is_plain(call)  # whether kernels read the very arrays of tensors
        self.state = state
        self.read: dict[Needs | None, Any] = {}  # what they have read, without arrays
        self.call = self.again(None, None, state, call)

    def again(self, cell: Any, xs: Any, state: Any, like: Call | None = None) -> Call:
        """The same call for other tensors of the same kinds."""
        like = self.call if like is None else like
        made: Call = object.__new__(type(like))
        made.__dict__.update(like.__dict__)
        states = leaves(state)
        made.step = like.step.known.again()
        made.given = Given(xs, state, state, [xs], states, *like.given[5:])
        made.cell, made.xs, made.states, made.reset_states = cell, [xs], states, states
        made.pattern = self
        return made

    def arrays(self, call: Call, needs: Needs | None) -> Any:
        """What kernels read in a call."""
        read = self.read.get(needs)
        if read is None or not self.plain:
            return call.arrays(read)
        return read.again(*_plain_arrays(call))

    def note(self, needs: Needs | None, arrays: Any) -> None:
        """What they have read, when all is found that depends on sizes."""
        if needs not in self.read:
            self.read[needs] = arrays.again([], [], [])


def _plain_arrays(call: Call) -> tuple[list[Any], list[Any], list[Any]]:
    """The arrays of inputs, states and captured tensors as they are."""
    step = call.step
    captured = [as_used(t._data, r) for t, r in zip(step.captured, step.trace.roles, strict=True)]
    return [x._data for x in call.xs], [s._data for s in call.states], captured


def _is_plain(call: Call) -> bool:
    """Whether kernels read the very arrays of the tensors."""
    from tinygrad_seq.kernels.memory import address

    read = call.arrays()
    there = chain(read.xs, read.states, read.captured)
    return all(
        (address(a), a.shape, a.strides) == (address(b), b.shape, b.strides)
        for a, b in zip(there, chain(*_plain_arrays(call)), strict=True)
    )
