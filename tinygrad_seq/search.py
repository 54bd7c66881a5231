"""Beam search: the likeliest sequences of a model that gives one symbol after another.

Imports errors, tensors and trees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tinygrad_seq.errors import ShapeError, whole
from tinygrad_seq.tensors import host_array
from tinygrad_seq.trees import map_leaves

Array = np.ndarray


class Hypothesis(NamedTuple):
    """A sequence that a beam search found."""

    ids: list[int]  # without the symbols of start and end
    score: float  # the sum of log-probabilities, divided by its length to the power of the penalty
    ended: bool  # whether it came to the symbol of the end


def beam_search(
    step: Callable[[Array, Any], tuple[Array, Any]],
    state: Any,
    *,
    start: int,
    end: int,
    width: int,
    longest: int,
    length_penalty: float = 0.0,
) -> list[Hypothesis]:
    """The likeliest sequences, the best first, found with ``width`` hypotheses at a time.

    ``logits, state = step(ids, state)``: ids (width,), logits (width, V), a state whose leaves have
    ``width`` rows, one for each hypothesis. ``state`` is the first one: its leaves have one row,
    which is repeated here, or ``width`` equal ones. A hypothesis is over when it comes to ``end``
    or to ``longest`` symbols. Scores are log-probabilities, divided by (length)^length_penalty.
    With ``width=1`` this is the greedy sequence.
    """
    if not callable(step):
        raise ValueError(
            f"beam_search: {step!r} was given as step, expected a function: logits, state = "
            "step(ids, state)"
        )
    width, longest = whole(width, "beam_search: width"), whole(longest, "beam_search: longest")
    start = whole(start, "beam_search: start", least=0)
    end = whole(end, "beam_search: end", least=0)
    if not isinstance(length_penalty, (int, float, np.number)) or not np.isfinite(length_penalty):
        raise ValueError(
            f"beam_search: length_penalty {length_penalty!r} was given, expected a finite number"
        )
    state = map_leaves(lambda leaf: _first_rows(leaf, width), state)
    ids, sums = np.full(width, start), np.full(width, -np.inf)
    sums[0] = 0.0  # at first all rows are the same one
    so_far: list[list[int]] = [[] for _ in range(width)]
    found: list[Hypothesis] = []

    def over(symbols: list[int], total: float, ended: bool) -> None:
        length = len(symbols) + ended
        found.append(Hypothesis(symbols, float(total) / max(length, 1) ** length_penalty, ended))

    for n in range(longest):
        logits, state = _checked(step(ids, state), width, end)
        peak = largest(logits, n, "beam_search")
        scores = logits - peak - np.log(np.exp(logits - peak).sum(axis=1, keepdims=True))
        total = sums[:, None] + scores
        best = np.argsort(-total, axis=None, kind="stable")[: 2 * width]
        chosen: list[tuple[int, int, float]] = []  # row, symbol and sum of what goes on
        for rank, place in enumerate(best):
            row, symbol = divmod(int(place), total.shape[1])
            value = float(total[row, symbol])
            if value == -np.inf:
                continue
            if symbol == end:
                if rank < width:  # an end that is not among the best is none
                    over(so_far[row], value, True)
            elif len(chosen) < width:
                chosen.append((row, symbol, value))
                if n + 1 == longest:
                    over([*so_far[row], symbol], value, False)
        if not chosen or (not length_penalty and _settled(found, chosen, width)):
            break
        while len(chosen) < width:  # fewer symbols than hypotheses
            chosen.append((*chosen[0][:2], -np.inf))
        so_far = [[*so_far[row], symbol] for row, symbol, _ in chosen]
        rows, ids, sums = (np.array(column) for column in zip(*chosen, strict=True))
        state = map_leaves(lambda leaf, rows=rows: _rows_of(leaf, rows), state)
    return sorted(found, key=lambda each: -each.score)[:width]


def _checked(returned: Any, width: int, end: int) -> tuple[Array, Any]:
    """The logits (width, V) and the state that a step returned."""
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise ValueError(
            f"beam_search: step returned a {type(returned).__name__}, expected a pair "
            "(logits, state)"
        )
    logits, state = host_array(returned[0], "beam_search: logits"), returned[1]
    if logits.ndim != 2 or len(logits) != width or logits.dtype.kind not in "fi":
        raise ShapeError(
            f"beam_search: step gave logits {logits.dtype}{logits.shape}, expected numbers "
            f"({width}, V)"
        )
    if end >= logits.shape[1]:
        raise ValueError(
            f"beam_search: end = {end} was given, expected a symbol from 0 to "
            f"{logits.shape[1] - 1}, of which step gives logits"
        )
    return logits, state


def largest(logits: Array, step: int, name: str) -> Array:
    """The largest of each row of logits, (B, 1); ``step`` and ``name`` are for the error."""
    found: Array = logits.max(axis=-1, keepdims=True)
    if not np.isfinite(found).all():
        raise ValueError(
            f"{name}: the model's logits at step {step} hold NaN, or their largest is infinite, "
            "expected a finite one; tgs.find_nan says where a NaN began"
        )
    return found


def _first_rows(leaf: Any, width: int) -> Any:
    """So many rows of a leaf of the first state, which has one, or as many already."""
    rows = np.shape(leaf)[:1]
    if rows not in ((1,), (width,)):
        raise ShapeError(
            f"beam_search: state has a leaf of shape {np.shape(leaf)}, expected (1, ...), or "
            f"({width}, ...) of equal rows; without a state give ()"
        )
    return leaf if rows == (width,) else leaf[np.zeros(width, int)]


def _rows_of(leaf: Any, rows: Array) -> Any:
    """These rows of a leaf of the state, which has as many."""
    if np.shape(leaf)[:1] != rows.shape:
        raise ShapeError(
            f"beam_search: step returned a state with a leaf of shape {np.shape(leaf)}, expected "
            f"({len(rows)}, ...); without a state pass and return ()"
        )
    return leaf[rows]


def _settled(found: list[Hypothesis], chosen: list[tuple[int, int, float]], width: int) -> bool:
    """Whether nothing that goes on can still be among the best: sums only fall."""
    best = sorted(each.score for each in found)[-width:]
    return len(best) == width and best[0] >= max(value for *_, value in chosen)
