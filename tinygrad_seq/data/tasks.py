"""Tasks that tell sequence models apart: memory over many steps, order, any length.

Each is drawn from a seed and says what is reached by knowing nothing. Symbols are integers, for an
embedding; ``np.eye(size, dtype="float32")[inputs]`` makes vectors of them. Imports creation,
errors and sequences.
"""

from __future__ import annotations

import numpy as np

from tinygrad_seq.creation import Rng, generator
from tinygrad_seq.data.sequences import mask_of, random_lengths
from tinygrad_seq.errors import whole


def adding_problem(count: int, steps: int, *, rng: Rng = None) -> tuple[np.ndarray, np.ndarray]:
    """Add the two numbers that are marked: inputs (T, B, 2), targets (B, 1), float32.

    T is ``steps``, B ``count``. The inputs are numbers from 0 to 1 and marks, which are 1 at one
    place of the first half and one of the second, else 0; an odd step belongs to the second.

    Hochreiter and Schmidhuber 1997, in the form of Le, Jaitly and Hinton 2015. Who knows nothing
    says 1: the mean squared error is 1/6 = 0.1667, the variance of the sum of two such numbers.
    """
    count = whole(count, "adding_problem: count")
    steps = whole(steps, "adding_problem: steps", least=2)
    draw, rows = generator(rng), np.arange(count)
    half = steps // 2
    places = np.stack([draw.integers(0, half, count), draw.integers(half, steps, count)])
    inputs = np.zeros((steps, count, 2), np.float32)
    inputs[..., 0] = draw.random((steps, count), np.float32)
    inputs[places, rows, 1] = 1
    return inputs, inputs[places, rows, 0].sum(axis=0)[:, None]


def copy_memory(count: int, delay: int, *, rng: Rng = None) -> tuple[np.ndarray, np.ndarray]:
    """Repeat ten symbols after a delay: inputs and targets (delay + 20, B), integers.

    B is ``count``. The inputs are 10 symbols from 0 to 7, ``delay`` − 1 blanks (8), the sign to
    begin (9) and 10 more blanks; the targets are blanks and, in the last 10 steps, the symbols.

    Hochreiter and Schmidhuber 1997, in the form of Arjovsky, Shah and Bengio 2016. Who remembers
    nothing says blanks and then guesses: a cross-entropy of 10 ln 8 / (delay + 20), 0.1733 at a
    delay of 100.
    """
    count, delay = whole(count, "copy_memory: count"), whole(delay, "copy_memory: delay")
    symbols = generator(rng).integers(0, 8, (10, count))
    inputs = np.full((delay + 20, count), 8)
    targets = inputs.copy()
    inputs[:10], targets[-10:] = symbols, symbols
    inputs[delay + 9] = 9
    return inputs, targets


def temporal_order(count: int, steps: int, *, rng: Rng = None) -> tuple[np.ndarray, np.ndarray]:
    """In which order came X and Y: inputs (T, B), integers from 0 to 5, classes (B,) from 0 to 3.

    T is ``steps`` (10 or more), B ``count``. X is 0, Y is 1; one of them stands in the second tenth
    of the sequence, one in the sixth, and all else are 2 to 5, which mean nothing. The classes are
    XX, XY, YX and YY.

    Hochreiter and Schmidhuber 1997, task 6a, of any length as in Pascanu, Mikolov and Bengio 2013.
    Who knows nothing: one in four right, a cross-entropy of ln 4 = 1.3863.
    """
    count = whole(count, "temporal_order: count")
    steps = whole(steps, "temporal_order: steps", least=10)
    draw = generator(rng)
    inputs = draw.integers(2, 6, (steps, count))
    marks = draw.integers(0, 2, (2, count))
    first = draw.integers(steps // 10, 2 * steps // 10, count)
    second = draw.integers(5 * steps // 10, 6 * steps // 10, count)
    inputs[np.stack([first, second]), np.arange(count)] = marks
    return inputs, 2 * marks[0] + marks[1]


def first_symbol(
    count: int, steps: int, *, symbols: int = 4, rng: Rng = None
) -> tuple[np.ndarray, np.ndarray]:
    """Which symbol came first: inputs (T, B), integers below ``symbols``, classes (B,).

    T is ``steps``, B ``count``; the symbols after the first are random and of the same kinds, so
    that the first must be kept from all of them. Long range, and nothing else.

    After the two-sequence problem of Bengio, Simard and Frasconi 1994. Who knows nothing: one in
    ``symbols`` right, a cross-entropy of ln(symbols), 1.3863 for 4.
    """
    count, steps = whole(count, "first_symbol: count"), whole(steps, "first_symbol: steps")
    inputs = generator(rng).integers(0, whole(symbols, "first_symbol: symbols", 2), (steps, count))
    return inputs, inputs[0].copy()


def order_of_two(count: int, steps: int, *, rng: Rng = None) -> tuple[np.ndarray, np.ndarray]:
    """Which of two symbols came first: inputs (T, B), integers from 0 to 2, classes (B,), 0 or 1.

    T is ``steps`` (2 or more), B ``count``. Every sequence holds a 1 and a 2, at any two places
    among zeros; the class is 0 where the 1 comes first. Which symbols there are says nothing, their
    order everything.

    The smallest form of the temporal order problem. Who knows nothing: one in two right, a
    cross-entropy of ln 2 = 0.6931.
    """
    count, steps = whole(count, "order_of_two: count"), whole(steps, "order_of_two: steps", least=2)
    draw, rows = generator(rng), np.arange(count)
    one = draw.integers(0, steps, count)
    two = (one + draw.integers(1, steps, count)) % steps  # any other place
    inputs = np.zeros((steps, count), np.int64)
    inputs[one, rows], inputs[two, rows] = 1, 2
    return inputs, (two < one).astype(np.int64)


def parity(
    count: int, longest: int, *, shortest: int = 1, rng: Rng = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Is the number of ones odd: bits (T, B, 1), float32, classes (B,), 0 or 1, lengths (B,).

    T is ``longest``, B ``count``; lengths from ``shortest`` to it, zeros beyond. Two states do for
    any length, and every bit counts: train on short ones, measure on longer ones.

    Minsky and Papert 1969; for recurrent networks Bengio, Simard and Frasconi 1994. Who knows
    nothing, or all bits but one: one in two right, a cross-entropy of ln 2 = 0.6931.
    """
    draw = generator(rng)
    lengths = random_lengths(draw, count, shortest, longest, "parity")
    bits = draw.integers(0, 2, (longest, count)) * mask_of(lengths, longest)
    return bits[..., None].astype(np.float32), bits.sum(axis=0) % 2, lengths


def sequence_sum(
    count: int, longest: int, *, shortest: int = 1, rng: Rng = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Add all numbers: inputs (T, B, 1) from −1 to 1, targets (B, 1), float32, lengths (B,).

    T is ``longest``, B ``count``; lengths from ``shortest`` to it, zeros beyond. The easiest task
    that has sequences of every length: one linear unit that keeps its state does it.

    Who knows nothing says 0: the mean squared error is a third of the mean length,
    (shortest + longest)/6.
    """
    draw = generator(rng)
    lengths = random_lengths(draw, count, shortest, longest, "sequence_sum")
    values = draw.uniform(-1, 1, (longest, count)) * mask_of(lengths, longest)
    inputs = values[..., None].astype(np.float32)
    return inputs, inputs.sum(axis=0), lengths
