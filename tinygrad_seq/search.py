"""Beam search: the likeliest sequences of a model that gives one symbol after another.

Imports errors and trees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tinygrad_seq.errors import ShapeError, whole
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
    ``width`` rows; ``state`` is the first one, of one row repeated. A hypothesis is over when it
    comes to ``end`` or to ``longest`` symbols. Scores are log-probabilities, divided by
    (length)^length_penalty. With ``width=1`` this is the greedy sequence.
    """
    width, longest = whole(width, "beam_search: width"), whole(longest, "beam_search: longest")
    ids, sums = np.full(width, start), np.full(width, -np.inf)
    sums[0] = 0.0  # at first all rows are the same one
    so_far: list[list[int]] = [[] for _ in range(width)]
    found: list[Hypothesis] = []

    def over(symbols: list[int], total: float, ended: bool) -> None:
        length = len(symbols) + ended
        found.append(Hypothesis(symbols, float(total) / max(length, 1) ** length_penalty, ended))

    for n in range(longest):
        logits, state = step(ids, state)
        if np.ndim(logits) != 2 or len(logits) != width:
            raise ShapeError(
                f"beam_search: step gave logits {np.shape(logits)}, expected ({width}, V)"
            )
        peak = logits.max(axis=1, keepdims=True)
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
        state = map_leaves(lambda leaf, rows=rows: leaf[rows], state)
    return sorted(found, key=lambda each: -each.score)[:width]


def _settled(found: list[Hypothesis], chosen: list[tuple[int, int, float]], width: int) -> bool:
    """Whether nothing that goes on can still be among the best: sums only fall."""
    best = sorted(each.score for each in found)[-width:]
    return len(best) == width and best[0] >= max(value for *_, value in chosen)
