"""Random numbers without a state: Philox 4x32-10 (Salmon, Moraes, Dror, Shaw 2011).

A number is a function of what it is for: the seed of an operation, and the operation, step, row and
column where it stands. So it is the same whoever computes it, when, and beside which others.
Imports NumPy.
"""

from __future__ import annotations

from typing import Any

import numpy as np

ROUNDS = 10
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_STEPS = 0x9E3779B9, 0xBB67AE85
LOW = 0xFFFFFFFF  # the low half of a word
BITS = 24  # as many as a float32 between 0 and 1 can hold


def first_word(column: Any, row: Any, step: Any, operation: Any, low: Any, high: Any) -> Any:
    """The first of the four words of 32 bits that a counter gives under a key.

    The arguments are words of 64 bits with the high half zero, in whatever form has + * ^ & >>.
    """
    for _ in range(ROUNDS):
        first, second = column * MULTIPLIERS[0], step * MULTIPLIERS[1]
        column, step = (second >> 32) ^ row ^ low, (first >> 32) ^ operation ^ high
        row, operation = second & LOW, first & LOW
        low, high = (low + KEY_STEPS[0]) & LOW, (high + KEY_STEPS[1]) & LOW
    return column


def uniform(seed: int, operation: int, step: int, rows: int, columns: int) -> np.ndarray:
    """Numbers from 0 up to, not including, 1: (rows, columns) float64, multiples of 2^-24."""
    at = np.arange(columns, dtype=np.uint64), np.arange(rows, dtype=np.uint64)[:, None]
    others = np.array([[step], [operation], [seed & LOW], [seed >> 32]], np.uint64)
    made = first_word(*at, *others)
    numbers: np.ndarray = (made >> np.uint64(32 - BITS)) * 2.0**-BITS
    return numbers
