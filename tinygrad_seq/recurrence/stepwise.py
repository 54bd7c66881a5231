"""``unroll``: a cell run step by step on the tape. The reference for every other driver.

Imports the engine, devices, arguments and draws.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from tinygrad_seq import devices
from tinygrad_seq.elementwise import where
from tinygrad_seq.recurrence.arguments import (
    Cell,
    Given,
    check_arguments,
    check_returned,
    check_state,
)
from tinygrad_seq.recurrence.draws import Draws, check_drawn_anew, drawing
from tinygrad_seq.structural import stack
from tinygrad_seq.tape import recording
from tinygrad_seq.tensors import DEFAULT_FLOAT, FLOATS, Tensor, wrap
from tinygrad_seq.trees import check_same, leaves, map_columns, map_leaves


def unroll(
    cell: Cell,
    xs: Any,
    state: Any = None,
    *,
    lengths: Any = None,
    resets: Any = None,
    reverse: bool = False,
) -> tuple[Any, Any]:
    """Run ``y, state = cell(x, state)`` over a sequence, step by step, recording each step.

    ``xs`` is a tensor (T, B, ...), or a tuple or dict of them; the cell sees one step of it,
    (B, ...). A state is a floating tensor (B, ...), or a structure of them: a tuple, NamedTuple,
    list or dict; without ``state`` it is ``cell.initial_state(B)``. Returns ``(ys, state)``: the
    outputs of all steps, (T, B, ...) in the structure of y, and the last state. Backpropagation
    through time is nothing but ``backward`` through what was recorded; ``tgs.detach(state)`` ends
    it between two calls.

    ``lengths`` (B,), integers from 0 to T: beyond its length a row's state stays and its output is
    zero; what stands there in ``xs`` may be anything and gets a gradient of zero (the cell is shown
    the row's last step again). ``reverse`` goes from the last step to the first, each row from its
    own last one; outputs stay in the order of the inputs. ``resets`` (T, B), booleans: before that
    step's input is processed the row's state returns to ``cell.initial_state``, or to the state
    passed in if the cell has none.

    On a GPU xs, state and the cell's tensors are there, lengths and resets on the host.

    Raises ShapeError or ValueError for arguments that do not fit, and TraceError for a cell that
    does not return ``(y, state)``.
    """
    given = check_arguments(cell, xs, state, lengths, resets, "unroll")
    if given.T == 0:
        return no_steps(cell, given), given.state
    return run_steps(cell, given, reverse)


def run_steps(
    cell: Cell, given: Given, reverse: bool, seeds: list[int] | None = None
) -> tuple[Any, Any]:
    """``unroll`` with arguments that are checked; ``seeds`` of what the cell draws, if known."""
    states = leaves(given.state)
    floating = (leaf.dtype for leaf in states if leaf.dtype in FLOATS)
    draws = Draws(next(floating, DEFAULT_FLOAT), seeds, states[0].device if states else "cpu")
    outer = recording.step
    with _collector_waits(), drawing(draws):
        try:
            found = _run(cell, given, reverse, draws)
            if draws.seeds or draws.held:
                check_drawn_anew(recording.tracer, given.driver)
            return found
        finally:
            recording.step = outer


def _run(cell: Cell, given: Given, reverse: bool, draws: Draws) -> tuple[Any, Any]:
    state = given.state
    stand_in = None if given.lengths is None else _last_steps(given)
    ys: list[Any] = []
    for t in reversed(range(given.T)) if reverse else range(given.T):
        recording.step = t
        draws.begin(t)
        y, state, stand_in = _step(cell, given, stand_in, t, state)
        if ys:
            check_same(ys[0], y, f"{given.driver}: y at step {t}")
        ys.append(y)
    return map_columns(stack, ys[::-1] if reverse else ys), state


class StandIn(NamedTuple):
    """What the cell is shown for a row that has ended: its last step once more.

    What stands beyond a row's end may be NaN, and even a state may be where the cell cannot go on
    from. Nothing comes of it, but 0 · NaN on the way back would spread; this was computed before.
    """

    x: Any
    state: Any


def _step(
    cell: Cell, given: Given, stand_in: StandIn | None, t: int, before: Any
) -> tuple[Any, Any, StandIn | None]:
    """The cell on step t, with resets before it and the rows that have ended held still.

    Returns y, the state, and the stand-in for the next step.
    """
    x = map_leaves(lambda leaf: leaf[t], given.xs)
    state, going = before, None
    if given.resets is not None and given.resets[t].any():
        state = _select(given.resets[t], given.reset_state, state)
    if given.lengths is not None and stand_in is not None:
        going = given.lengths > t
        if not going.all():
            x, state = _select(going, x, stand_in.x), _select(going, state, stand_in.state)
        stand_in = StandIn(stand_in.x, map_leaves(lambda leaf: leaf.detach(), state))
    y, after = check_returned(cell(x, state), cell, given)
    check_state(after, before, cell, given, f"at step {t} ")
    if going is not None and not going.all():
        y = map_leaves(lambda leaf: _zero_unless(going, leaf), y)
        after = _select(going, after, before)  # a row that has ended is not reset either
    return y, after, stand_in


def _last_steps(given: Given) -> StandIn:
    """For each row the input of its own last step, and its first state.

    With these the cell can surely compute. A row of length 0 gets those of the longest row; ones
    and zeros, if all are empty.
    """
    assert given.lengths is not None
    longest = int(given.lengths.argmax())
    if not given.lengths[longest]:
        return StandIn(map_leaves(_plain, given.xs), map_leaves(_zeros, given.state))
    rows = np.where(given.lengths > 0, np.arange(given.B), longest)
    steps = given.lengths[rows] - 1
    x = map_leaves(lambda leaf: leaf.detach()[_on(steps, leaf), _on(rows, leaf)], given.xs)
    return StandIn(x, map_leaves(lambda leaf: leaf.detach()[_on(rows, leaf)], given.state))


def _plain(leaf: Tensor) -> Tensor:
    """One step of ones, or of index 0 where integers are looked up."""
    xp = devices.namespace(leaf._data)
    make = xp.ones if leaf.dtype.kind == "f" else xp.zeros
    return wrap(make(leaf.shape[1:], leaf.dtype), None)


def _zeros(leaf: Tensor) -> Tensor:
    return wrap(devices.namespace(leaf._data).zeros(leaf.shape, leaf.dtype), None)


def _on(array: np.ndarray, like: Tensor) -> Tensor:
    """What is known on the host, as a tensor where ``like`` is."""
    return wrap(devices.to_device(array, like.device), None)


def no_steps(cell: Cell, given: Given) -> Any:
    """Outputs of no steps: those of one, of which none is taken."""
    x = map_leaves(_plain, given.xs)
    y, _ = check_returned(cell(x, given.state), cell, given)
    return map_leaves(lambda leaf: stack([leaf])[:0], y)


@contextmanager
def _collector_waits() -> Iterator[None]:
    """Hold Python's cycle collector while a graph grows.

    The graph has no cycles, but the collector would walk through all of it again and again: at
    T = 10,000 that takes twice as long as the steps themselves.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _rows(chosen: np.ndarray, like: Tensor) -> Tensor:
    """A choice of rows in a shape that broadcasts against ``like``."""
    return _on(chosen.reshape(-1, *([1] * (like.ndim - 1))), like)


def _select(chosen: np.ndarray, tree: Any, other: Any) -> Any:
    """The chosen rows of one tree, the others of another."""
    return map_leaves(lambda a, b: where(_rows(chosen, a), a, b), tree, other)


def _zero_unless(chosen: np.ndarray, leaf: Tensor) -> Tensor:
    zero = devices.namespace(leaf._data).zeros((), leaf.dtype)
    return where(_rows(chosen, leaf), leaf, wrap(zero, None))
