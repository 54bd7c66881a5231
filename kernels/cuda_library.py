"""What kernels for CUDA are made of: a step's products, barriers, and the shares of blocks.

A *group* of blocks has rows of the batch for itself and takes them through all steps; within it
each block, a *part*, has a share of the units. Blocks of a group wait for one another where one
reads what others wrote. Nothing here knows a cell.

``functions(dtype)`` are the functions that generated text calls. Addresses count bytes; what is in
shared memory is counted in numbers. Imports cuda_build, cuda_division, philox, Numba and NumPy.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
from numba import types
from tinygrad_seq.kernels import philox
from tinygrad_seq.kernels.cuda_build import (
    SIMULATED,
    cuda,
    device,
    integers,
    libdevice,
    memory,
    number,
    shared_memory,
)
from tinygrad_seq.kernels.cuda_division import TILE, WARP

ALL = 0xFFFFFFFF  # lanes of a warp
ONE_OVER_PI = Fraction("0.31830988618379067153776752674502872406891929148091289749533468811779")
AHEAD = 8  # numbers of a row that are read before those before them are multiplied
whole = int if SIMULATED else types.int32  # half the registers of a word
Tile = tuple[int, int, int, int]
word, flag = integers["word"], integers["flag"]
_add_release, _acquire, _pause = integers["add_release"], integers["acquire"], integers["pause"]


@device
def thread() -> int:
    return cuda.threadIdx.x


@device
def threads() -> int:
    return cuda.blockDim.x


@device
def block() -> int:
    return cuda.blockIdx.x


@device
def blocks() -> int:
    return cuda.gridDim.x


@device
def meet() -> None:
    """All threads of the block wait for one another."""
    cuda.syncthreads()


# Who does what -------------------------------------------------------------------------------


@device
def barrier(counter: int, met: int, parts: int) -> int:
    """Wait for all blocks of the group: what they wrote before can be read after. ``met`` counts
    how many have come since the kernel began."""
    met += parts
    cuda.syncthreads()
    if parts > 1:
        if cuda.threadIdx.x == 0:
            _add_release(counter, 1)
            while _acquire(counter) < met:
                _pause()
        cuda.syncthreads()
    return met


@device
def begin_of(width: int, part: int, parts: int) -> int:
    """The first unit that is a part's; the next part's first is where it ends."""
    return whole(width * part // parts)


@device
def row_of(count: int, rows: int) -> int:
    """The row of a thread's first number if each row has ``count`` of them; ``rows`` for none."""
    return whole(cuda.threadIdx.x // count) if count else whole(rows)


@device
def unit_of(count: int) -> int:
    return whole(cuda.threadIdx.x % count) if count else whole(0)


@device
def rows_on(count: int) -> int:
    """How many rows on a thread's next number is, all threads taking one each."""
    return whole(cuda.blockDim.x // count) if count else whole(1)


@device
def units_on(count: int) -> int:
    return whole(cuda.blockDim.x % count) if count else whole(0)


# Where a thread is in a product --------------------------------------------------------------


@device
def team_of(workers: int) -> int:
    """Of the teams that share K, the one that a thread's warp belongs to."""
    return whole((cuda.threadIdx.x // WARP) // workers)


@device
def tile_row(workers: int, beside: int, across: int, height: int) -> int:
    """The first row of a thread's first tile."""
    tile = (cuda.threadIdx.x // WARP) % workers
    below = (tile // beside) * (WARP // across) + cuda.threadIdx.x % WARP // across
    return whole(below * height)


@device
def tile_column(workers: int, beside: int, across: int) -> int:
    """And its first column."""
    tile = (cuda.threadIdx.x // WARP) % workers
    return whole(((tile % beside) * across + cuda.threadIdx.x % WARP % across) * TILE)


# Numbers -------------------------------------------------------------------------------------


@cache
def functions(dtype: str) -> SimpleNamespace:
    """The functions that generated kernels of this dtype call, by name."""
    found = {"begin_of": begin_of, "row_of": row_of, "unit_of": unit_of, "rows_on": rows_on}
    found |= {
        "units_on": units_on,
        "barrier": barrier,
        "at": integers["at"],
        "whole": whole,
        "word": word,
        "put_word": integers["put_word"],
        "flag": flag,
    }
    found |= {"team_of": team_of, "tile_row": tile_row, "tile_column": tile_column}
    found |= {"thread": thread, "threads": threads, "block": block, "blocks": blocks, "meet": meet}
    found |= {name: memory(dtype)[name] for name in ("load", "store", "from_bits")}
    found |= _mathematics(dtype) | _sums() | _products(dtype)
    return SimpleNamespace(**found, constant=number(dtype))


def _library() -> dict[str, Any]:
    """The device's own mathematics, at full precision; in the simulator the host's."""
    names = "fabs exp expm1 log log1p sqrt tanh".split()
    on = np if SIMULATED else math
    return {name: getattr(on, name) for name in names}


def _plain_uniform(dtype: str) -> Any:
    """The numbers of ``philox.uniform``, one at a time, in Python's integers."""
    kind = number(dtype)

    def uniform(seed: int, operation: int, step: int, row: int, j: int) -> Any:
        halves = seed & philox.LOW, (seed >> 32) & philox.LOW
        made = philox.first_word(int(j), int(row), int(step), operation, *halves)
        return kind(made >> 32 - philox.BITS) * kind(2.0**-philox.BITS)

    return uniform


def _uniform(dtype: str) -> Any:
    """The same in the device's unsigned integers."""
    kind = number(dtype)
    scale, bits = kind(2.0**-philox.BITS), np.uint64(32 - philox.BITS)
    half, low_half, word64 = np.uint64(32), np.uint64(philox.LOW), types.uint64
    first_times, second_times = map(np.uint64, philox.MULTIPLIERS)
    low_step, high_step = map(np.uint64, philox.KEY_STEPS)
    rounds = philox.ROUNDS

    def uniform(seed: int, operation: int, step: int, row: int, j: int) -> Any:
        a, b, c, d = word64(j), word64(row), word64(step), word64(operation)
        low, high = word64(seed) & low_half, word64(seed) >> half
        for _ in range(rounds):  # as in philox.first_word, which says what it does
            first, second = a * first_times, c * second_times
            a, c = (second >> half) ^ b ^ low, (first >> half) ^ d ^ high
            b, d = second & low_half, first & low_half
            low, high = (low + low_step) & low_half, (high + high_step) & low_half
        return kind(a >> bits) * scale

    return uniform


def _turns(dtype: str) -> Any:
    """How often half a circle goes into x, without whole circles."""
    kind = number(dtype)
    half, two = kind(0.5), kind(2)
    # 1/π in two parts, the second what the first leaves: x / π to twice the digits of x
    high = np.dtype(dtype).type(1 / math.pi)
    low = np.dtype(dtype).type(ONE_OVER_PI - Fraction(float(high)))
    nearest = libdevice.rintf if dtype == "float32" else libdevice.rint

    def turns(x: Any) -> Any:
        much = x * high
        rest = cuda.fma(x, low, cuda.fma(x, high, -much))
        return (much - two * nearest(much * half)) + rest

    return device(turns)


def _circular(dtype: str) -> dict[str, Any]:
    """sin and cos. The device's own reduce large x in doubles and in memory of the thread; these
    are as near as 2 units in the last place of 1 up to |x| of 1e6, and lose digits beyond."""
    if SIMULATED:
        return {"sin": np.sin, "cos": np.cos}
    turns = _turns(dtype)
    single = dtype == "float32"
    sine = libdevice.sinpif if single else libdevice.sinpi
    cosine = libdevice.cospif if single else libdevice.cospi
    return {"sin": lambda x: sine(turns(x)), "cos": lambda x: cosine(turns(x))}


def _floor(dtype: str) -> Any:
    """math.floor makes an integer, in which large numbers have no room."""
    if SIMULATED:
        return np.floor
    floor = libdevice.floorf if dtype == "float32" else libdevice.floor
    return lambda x: floor(x)


def _mathematics(dtype: str) -> dict[str, Any]:
    """The elementwise operations."""
    kind, library = number(dtype), _library()
    zero, half, one = kind(0), kind(0.5), kind(1)
    tanh = library["tanh"]

    def one_number(name: str) -> Any:
        function = library[name]
        return lambda x: kind(function(x))

    found: dict[str, Any] = {
        name: one_number(name) for name in ("exp", "expm1", "log", "log1p", "sqrt", "tanh")
    }
    found |= _circular(dtype)
    found |= {
        "abs": one_number("fabs"),
        "erf": lambda x: kind(math.erf(x)),
        "power": lambda a, b: kind(a**b),
        "sigmoid": lambda x: half * kind(tanh(half * x)) + half,
        "floor": _floor(dtype),
        "sign": lambda x: one if x > zero else (-one if x < zero else x),
        "maximum": lambda a, b: a if a > b or a != a else b,
        "minimum": lambda a, b: a if a < b or a != a else b,
        "where": lambda condition, a, b: a if condition != zero else b,
        "equal": lambda a, b: one if a == b else zero,
        "not_equal": lambda a, b: one if a != b else zero,
        "less": lambda a, b: one if a < b else zero,
        "less_equal": lambda a, b: one if a <= b else zero,
        "greater": lambda a, b: one if a > b else zero,
        "greater_equal": lambda a, b: one if a >= b else zero,
        "uniform": (_plain_uniform if SIMULATED else _uniform)(dtype),
    }
    return {name: device(function) for name, function in found.items()}


def _sums() -> dict[str, Any]:
    """Sums, maxima and minima: of two numbers, and of all lanes of a warp."""
    found: dict[str, Any] = {}

    def both(name: str, combine: Any) -> None:
        combine = device(combine)

        def of_warp(value: Any) -> Any:
            distance = 16
            while distance > 0:
                value = combine(value, cuda.shfl_xor_sync(ALL, value, distance))
                distance //= 2
            return value

        found[f"part_{name}"] = combine
        found[f"warp_{name}"] = device(of_warp)

    both("sum", lambda a, b: a + b)
    both("max", lambda a, b: a if a > b or a != a else b)
    both("min", lambda a, b: a if a < b or a != a else b)
    return found


# Products ------------------------------------------------------------------------------------


def _products(dtype: str) -> dict[str, Any]:
    """A step's product, and how its matrix and its results are laid out.

    Rows (m, K) stand in global memory, ``row_bytes`` apart, and are those of the group. A part's
    columns of the matrix, C of them, a multiple of TILE, stand side by side, (K, C), in shared
    memory (*resident*) or, where they have no room, in global memory (*streamed*).

    The tiles of the result are shared among the warps of a team, and the teams share K. A warp's
    lanes are ``across`` beside one another and 32 // across one below the other. A thread's first
    tile begins at row r and column c; its next one ``dr`` rows and ``dc`` columns on, or, from
    column ``wrap`` on, at the beginning of the tiles ``below``. Each team takes the numbers
    ``first`` to ``end`` of K and leaves its shares of the sums, (R, C), in shared memory at
    ``out``.
    """
    item = np.dtype(dtype).itemsize
    load, store, load4 = (memory(dtype)[name] for name in ("load", "store", "load4"))
    shared4, put_shared4 = (shared_memory(dtype)[name] for name in ("shared4", "put_shared4"))
    kind = number(dtype)
    zero = kind(0)

    @device
    def four_shared(shared: Any, weights: int, at: int) -> Any:
        return shared4(shared, weights + at)

    @device
    def four_streamed(shared: Any, weights: int, at: int) -> Any:
        return load4(weights + at * item)

    @device
    def four_of_row(at: int) -> Any:
        return load4(at)

    @device
    def loose_four_of_row(at: int) -> Any:
        return load(at), load(at + item), load(at + 2 * item), load(at + 3 * item)

    def product(height: int, four: Any, of_row: Any) -> Any:
        """Sums of ``height`` rows by TILE columns in each thread's registers."""

        @device
        def read(into: Any, i: int, at: int) -> None:
            """The numbers of a row that the next turn of the loop multiplies."""
            a, b = of_row(at), of_row(at + TILE * item)
            for n in range(TILE):
                into[i, n] = a[n]
                into[i, TILE + n] = b[n]

        @device
        def multiply(
            shared: Any,
            rows: int,
            row_bytes: int,
            m: int,
            weights: int,
            C: int,
            out: int,
            mine: Tile,
            on: Tile,
        ) -> None:
            (r, c, first, end), (dr, dc, wrap, below) = mine, on
            sums = cuda.local.array((height, TILE), kind)
            now = cuda.local.array((height, AHEAD), kind)  # numbers of the rows, read early
            then = cuda.local.array((height, AHEAD), kind)
            last = first + ((end - first) // AHEAD - 1) * AHEAD
            while r < m:
                if c < C:
                    for i in range(height):
                        for j in range(TILE):
                            sums[i, j] = zero
                    k = first
                    if k <= last:
                        for i in range(height):
                            read(then, i, rows + min(r + i, m - 1) * row_bytes + k * item)
                    while k <= last:
                        ahead = min(k + AHEAD, last)
                        for i in range(height):
                            for n in range(AHEAD):
                                now[i, n] = then[i, n]
                            at = rows + min(r + i, m - 1) * row_bytes + ahead * item
                            read(then, i, at)
                        for n in range(AHEAD):
                            w = four(shared, weights, (k + n) * C + c)
                            for i in range(height):
                                for j in range(TILE):
                                    sums[i, j] += now[i, n] * w[j]
                        k += AHEAD
                    while k < end:
                        w = four(shared, weights, k * C + c)
                        for i in range(height):
                            x1 = load(rows + min(r + i, m - 1) * row_bytes + k * item)
                            for j in range(TILE):
                                sums[i, j] += x1 * w[j]
                        k += 1
                    for i in range(height):
                        if r + i < m:
                            at = out + (r + i) * C + c
                            put_shared4(shared, at, sums[i, 0], sums[i, 1], sums[i, 2], sums[i, 3])
                r, c = whole(r + dr), whole(c + dc)
                if c >= wrap:
                    r, c = whole(r + below), whole(c - wrap)

        return multiply

    def either(four: Any, of_row: Any) -> Any:
        """Tiles of TILE rows, or of one where there are few."""
        tall, low = product(TILE, four, of_row), product(1, four, of_row)

        @device
        def multiply(
            height: int,
            shared: Any,
            rows: int,
            row_bytes: int,
            m: int,
            weights: int,
            C: int,
            out: int,
            mine: Tile,
            on: Tile,
        ) -> None:
            if height > 1:
                tall(shared, rows, row_bytes, m, weights, C, out, mine, on)
            else:
                low(shared, rows, row_bytes, m, weights, C, out, mine, on)

        return multiply

    @device
    def share(shared: Any, at: int, slices: int, numbers: int) -> Any:
        """One result: the sum of what all teams have left."""
        value = shared[at]
        for k in range(1, slices):
            value += shared[at + k * numbers]
        return value

    @device
    def take_in(
        shared: Any, at: int, C: int, matrix: int, row: int, column: int, K: int, n: int
    ) -> None:
        """Columns of a matrix, n of them, into shared memory."""
        i, j = row_of(n, K), unit_of(n)
        di, dj = rows_on(n), units_on(n)
        while i < K:
            shared[at + i * C + j] = load(matrix + i * row + j * column)
            i, j = whole(i + di), whole(j + dj)
            if j >= n:
                i, j = whole(i + 1), whole(j - n)

    @device
    def lay_out(to: int, C: int, matrix: int, row: int, column: int, K: int, n: int) -> None:
        """The same into global memory."""
        i, j = row_of(n, K), unit_of(n)
        di, dj = rows_on(n), units_on(n)
        while i < K:
            store(to + (i * C + j) * item, load(matrix + i * row + j * column))
            i, j = whole(i + di), whole(j + dj)
            if j >= n:
                i, j = whole(i + 1), whole(j - n)

    return {
        "product": either(four_shared, four_of_row),
        "loose_product": either(four_shared, loose_four_of_row),
        "streamed_product": either(four_streamed, four_of_row),
        "loose_streamed_product": either(four_streamed, loose_four_of_row),
        "share": share,
        "take_in": take_in,
        "lay_out": lay_out,
    }
