"""``unroll``: a cell run step by step on the tape. The reference for every other driver.

Imports the engine and arguments.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from tinygrad_seq.elementwise import where
from tinygrad_seq.recurrence.arguments import (
    Cell,
    Sequence,
    check_output,
    check_rows,
    check_sequence,
    check_step,
    one_step_shapes,
)
from tinygrad_seq.structural import stack
from tinygrad_seq.tape import no_grad
from tinygrad_seq.tensors import Tensor, wrap
from tinygrad_seq.trees import check_same, leaves, map_leaves, rebuild


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
    (B, ...). A state is a tensor (B, ...), or a tuple or NamedTuple of them; without ``state`` it
    is ``cell.initial_state(B)``. Returns ``(ys, state)``: the outputs of all steps, (T, B, ...) in
    the structure of y, and the last state. Backpropagation through time is nothing but
    ``backward`` through what was recorded.

    ``lengths`` (B,), integers from 0 to T: beyond its length a row's state stays and its output is
    zero; what stands there in ``xs`` may be anything and gets a gradient of zero (the cell sees
    zeros). ``reverse`` goes from the last step to the first, each row from its own last one;
    outputs stay in the order of the inputs. ``resets`` (T, B), booleans: before that step's input
    is processed the row's state returns to ``cell.initial_state``, or to the state passed in if
    the cell has none.

    Raises ShapeError or ValueError for arguments that do not fit, and TraceError for a cell that
    does not return ``(y, state)``.
    """
    given = check_sequence(cell, xs, state, lengths, resets, "unroll")
    if given.T == 0:
        with no_grad():
            y = one_step_shapes(cell, given, "unroll")
        ys = map_leaves(lambda t: Tensor(np.zeros((0, *t.shape), t.dtype)), y)
        return ys, given.state
    with _collector_waits():
        return _run(cell, given, reverse)


def _run(cell: Cell, given: Sequence, reverse: bool) -> tuple[Any, Any]:
    state = given.state
    steps: list[Any] = []
    for t in reversed(range(given.T)) if reverse else range(given.T):
        x = map_leaves(lambda leaf, t=t: leaf[t], given.xs)
        active = None if given.lengths is None else given.lengths > t
        if active is not None and active.all():
            active = None
        before = state
        if given.resets is not None and given.resets[t].any():
            state = _select(given.resets[t], given.reset_state, state)
        if active is not None:
            x = map_leaves(lambda leaf, rows=active: _zero_unless(rows, leaf), x)
        y, state = check_output(cell(x, state), cell, "unroll")
        check_step(state, before, f"unroll: at step {t} the cell returned a state that")
        y = check_rows(y, given.B, "unroll")
        if steps:
            check_same(steps[0], y, f"unroll: y at step {t}")
        if active is not None:
            y = map_leaves(lambda leaf, rows=active: _zero_unless(rows, leaf), y)
            state = _select(active, state, before)
        steps.append(y)
    if reverse:
        steps.reverse()
    columns = zip(*([leaf for _, leaf in leaves(y)] for y in steps), strict=True)
    return rebuild(steps[0], iter([stack(column) for column in columns])), state


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
    return wrap(chosen.reshape(-1, *([1] * (like.ndim - 1))), None)


def _select(chosen: np.ndarray, state: Any, other: Any) -> Any:
    return map_leaves(lambda a, b: where(_rows(chosen, a), a, b), state, other)


def _zero_unless(chosen: np.ndarray, leaf: Tensor) -> Tensor:
    return where(_rows(chosen, leaf), leaf, wrap(np.zeros((), leaf.dtype), None))
