"""Kernels that test launches and measure what ``kernels/cuda_division.py`` assumes.

Each takes a tuple of words, as generated kernels do, and is made by ``compiled(kernel, words)``.
Under numba-cuda's simulator they run as plain Python. Imports numba-cuda.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from numba import types
from tinygrad_seq.kernels import cuda_build
from tinygrad_seq.kernels.cuda_build import (
    I64,
    SIMULATED,
    SIMULATED_MACHINE,
    THREADS,
    cuda,
    integers,
    memory,
    number,
    shared_memory,
)
from tinygrad_seq.kernels.cuda_library import barrier
from tinygrad_seq.kernels.cuda_text import COUNTER

single, double = number("float32"), number("float64")
load4 = memory("float32")["load4"]
store, load = memory("float32")["store"], memory("float32")["load"]
store_double = memory("float64")["store"]
shared4 = shared_memory("float32")["shared4"]
word = integers["word"]
CLOCKS = 8  # bytes of a number of clocks
threads = SIMULATED_MACHINE.threads if SIMULATED else THREADS


def _clock() -> Any:
    if SIMULATED:
        return time.perf_counter_ns

    def clock(builder: Any) -> Any:
        call = cuda_build._assembly("mov.u64 $0, %clock64;", "=l,~{memory}", I64)
        return builder.call(call, [])

    return cuda_build._instruction(clock, types.int64, ())


clock = _clock()


def compiled(kernel: Callable[..., None], words: int) -> Any:
    """What has ``launch(blocks, shared, words, stream, together)``."""
    kind = cuda_build.Simulated if SIMULATED else cuda_build.Compiled
    return kind(kernel, words)


def fill(words: Any) -> None:
    """Words: out, first, and any number more. Each thread writes one number of float32."""
    i = cuda.threadIdx.x + cuda.blockIdx.x * cuda.blockDim.x
    store(words[0] + 4 * i, single(words[1] + i))


def mirror(words: Any) -> None:
    """Words: out, n. Through n numbers of shared memory, which come out the other way round."""
    shared = cuda.shared.array(0, single)
    i = cuda.threadIdx.x
    while i < words[1]:
        shared[i] = single(i)
        i += cuda.blockDim.x
    cuda.syncthreads()
    i = cuda.threadIdx.x
    while i < words[1]:
        store(words[0] + 4 * i, shared[words[1] - 1 - i])
        i += cuda.blockDim.x


def rounds(words: Any) -> None:
    """Words: counters, parts, how often, clocks. Barriers of groups, one after another."""
    counter = words[0] + cuda.blockIdx.x // words[1] * COUNTER
    met = barrier(counter, 0, words[1])
    begin = clock()
    for _ in range(words[2]):
        met = barrier(counter, met, words[1])
    end = clock()
    if cuda.threadIdx.x == 0:
        store_double(words[3] + CLOCKS * cuda.blockIdx.x, double(end - begin))


def exchange(words: Any) -> None:
    """Words: counters, parts, how often, numbers (2 × blocks), out (blocks).

    After each barrier a block reads what its neighbour in the group wrote before it.
    """
    block, parts = cuda.blockIdx.x, words[1]
    group, part = block // parts, block % parts
    counter = words[0] + group * COUNTER
    met = barrier(counter, 0, parts)
    total = single(0)
    for t in range(words[2]):
        side = words[3] + 4 * (t % 2) * cuda.gridDim.x
        if cuda.threadIdx.x == 0:
            store(side + 4 * block, single(part + t))
        met = barrier(counter, met, parts)
        if cuda.threadIdx.x == 0:
            total += load(side + 4 * (group * parts + (part + 1) % parts))
    if cuda.threadIdx.x == 0:
        store(words[4] + 4 * block, total)


def grid_rounds(words: Any) -> None:
    """Words: how often, clocks. Barriers of the whole grid, as numba-cuda has them."""
    grid = cuda.cg.this_grid()
    grid.sync()
    begin = clock()
    for _ in range(words[0]):
        grid.sync()
    end = clock()
    if cuda.threadIdx.x == 0:
        store_double(words[1] + CLOCKS * cuda.blockIdx.x, double(end - begin))


def chase(words: Any) -> None:
    """Words: first, how often, clocks. Each word read says where the next one is."""
    at = words[0]
    begin = clock()
    for _ in range(words[1]):
        at = word(at, 0)
    end = clock()
    store_double(words[2], double(end - begin))
    store_double(words[2] + CLOCKS, double(at))


def read_global(words: Any) -> None:
    """Words: base, bytes from one block's region to the next, bytes, how often, clocks, out.

    All threads read 16 bytes four times before they use any; bytes are a multiple of 64 a thread.
    """
    begin_at = words[0] + cuda.blockIdx.x * words[1] + 16 * cuda.threadIdx.x
    apart = 16 * cuda.blockDim.x
    total = single(0)
    cuda.syncthreads()
    begin = clock()
    for _ in range(words[3]):
        at = begin_at
        while at < begin_at + words[2]:
            a, b = load4(at), load4(at + apart)
            c, d = load4(at + 2 * apart), load4(at + 3 * apart)
            total += a[0] + a[1] + a[2] + a[3] + b[0] + b[1] + b[2] + b[3]
            total += c[0] + c[1] + c[2] + c[3] + d[0] + d[1] + d[2] + d[3]
            at += 4 * apart
    cuda.syncthreads()
    end = clock()
    if cuda.threadIdx.x == 0:
        store_double(words[4] + CLOCKS * cuda.blockIdx.x, double(end - begin))
    store(words[5] + 4 * (cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x), total)


SHARED_NUMBERS = 8192  # that read_shared goes through


def read_shared(words: Any) -> None:
    """Words: how often, clocks, out. All threads read 16 bytes of shared memory."""
    shared = cuda.shared.array(0, single, 16)
    i = cuda.threadIdx.x
    while i < SHARED_NUMBERS:
        shared[i] = single(i)
        i += cuda.blockDim.x
    total = single(0)
    cuda.syncthreads()
    begin = clock()
    for k in range(words[0]):
        at = (4 * cuda.threadIdx.x + 4096 * k) % SHARED_NUMBERS
        a = shared4(shared, at)
        b = shared4(shared, (at + 1024) % SHARED_NUMBERS)
        total += a[0] + a[1] + a[2] + a[3] + b[0] + b[1] + b[2] + b[3]
    cuda.syncthreads()
    end = clock()
    if cuda.threadIdx.x == 0:
        store_double(words[1] + CLOCKS * cuda.blockIdx.x, double(end - begin))
    store(words[2] + 4 * cuda.threadIdx.x, total)


def meetings(words: Any) -> None:
    """Words: how often, clocks. All threads of a block wait for one another."""
    cuda.syncthreads()
    begin = clock()
    for _ in range(words[0]):
        cuda.syncthreads()
    end = clock()
    if cuda.threadIdx.x == 0:
        store_double(words[1], double(end - begin))


def spin(words: Any) -> None:
    """Words: clocks to wait, clocks that it took."""
    begin = clock()
    end = clock()
    while end - begin < words[0]:
        end = clock()
    if cuda.threadIdx.x == 0:
        store_double(words[1] + CLOCKS * cuda.blockIdx.x, double(end - begin))
