"""The simulator and the budget of kernels that the tests of CUDA stand on, without a GPU.

Cases named `simulated_...` run in a process with the simulator, `compiled_...` in one with the
compiler: what numba's CUDA is, is settled when it is imported, so no case imports it for others.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib.util import find_spec

import numpy as np
import ptx_budget
import pytest

REQUIRED = "TINYGRAD_SEQ_REQUIRE_CUDA_COMPILER"  # where it is set, nothing is skipped
ALL = 0xFFFFFFFF


def run_cases(prefix: str, **environment: str) -> None:
    """Those functions of this file as tests, in a process of their own."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "NUMBA"))}
    options = "-q --noconftest -p no:cacheprovider -p no:xdist -o".split()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, f"python_functions={prefix}_*", __file__],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def skip_unless_required(reason: str) -> None:
    if reason and not os.environ.get(REQUIRED):
        pytest.skip(reason)
    assert not reason, reason


def test_the_simulator():
    absent = [name for name in ("numba_cuda", "greenlet") if find_spec(name) is None]
    skip_unless_required(f"not installed: {', '.join(absent)}" if absent else "")
    run_cases("simulated", NUMBA_ENABLE_CUDASIM="1")


def test_the_budget_of_kernels():
    skip_unless_required(ptx_budget.missing())
    run_cases("compiled")


def test_what_is_missing_is_told(monkeypatch):
    monkeypatch.setattr(ptx_budget, "find_spec", lambda name: None)
    assert "numba-cuda, cuda-pathfinder not found: pip install" in ptx_budget.missing()
    with pytest.raises(ptx_budget.CompilerMissingError, match="numba-cuda"):
        ptx_budget.report(print, ())


def simulator(seed=None):
    """`numba.cuda`, simulated."""
    import cuda_simulator
    from numba import cuda

    cuda_simulator.install(seed)
    return cuda


@pytest.mark.parametrize("block", [32, 64, 40, (8, 4, 2)])
def simulated_threads_know_their_place(block):
    cuda = simulator()

    @cuda.jit
    def kernel(seen):
        t, b, size, grid = cuda.threadIdx, cuda.blockIdx, cuda.blockDim, cuda.gridDim
        number = t.x + size.x * (t.y + size.y * t.z)
        where = number + size.x * size.y * size.z * (b.x + grid.x * b.y)
        seen[where] += 1
        assert cuda.laneid == number % 32

    seen = np.zeros(3 * 2 * np.prod(block), int)
    kernel[(3, 2), block](seen)
    assert (seen == 1).all()


def simulated_barriers_are_quick():
    cuda = simulator()

    @cuda.jit
    def kernel(out):
        for _ in range(30):
            cuda.syncthreads()
        out[cuda.blockIdx.x] = 1

    def seconds():
        begin = time.perf_counter()
        out = np.zeros(2)
        kernel[2, 32](out)
        assert out.all()
        return time.perf_counter() - begin

    assert min(seconds() for _ in range(5)) < 0.1


def simulated_shuffles_stay_within_their_warp():
    cuda = simulator()

    @cuda.jit
    def kernel(x, out):
        t = cuda.threadIdx.x
        for i in range(1 + t // 32):  # each warp as often as it likes
            out[0, t] = cuda.shfl_xor_sync(ALL, x[t], 1)
            out[1, t] = cuda.shfl_down_sync(ALL, x[t], 2)
            out[2, t] = cuda.shfl_up_sync(ALL, x[t], 2)
            out[3, t] = cuda.shfl_sync(ALL, x[t], 5 + i)
        out[4, t] = cuda.ballot_sync(ALL, t % 2)
        cuda.syncwarp()
        total = x[t]
        for distance in (16, 8, 4, 2, 1):
            total += cuda.shfl_xor_sync(ALL, total, distance)
        out[5, t] = total

    x = np.random.default_rng(0).standard_normal(96)
    out = np.full((6, 96), np.nan)
    kernel[1, 96](x, out)
    warps, lane = x.reshape(3, 32), np.arange(32)
    expected = [
        warps[:, lane ^ 1],
        warps[:, np.where(lane + 2 < 32, lane + 2, lane)],
        warps[:, np.where(lane - 2 >= 0, lane - 2, lane)],
        np.stack([np.full(32, warps[w, 5 + w]) for w in range(3)]),
        np.full((3, 32), 0xAAAAAAAA),
        np.repeat(warps.sum(1, keepdims=True), 32, axis=1),
    ]
    for got, wanted in zip(out, expected, strict=True):
        np.testing.assert_allclose(got.reshape(3, 32), wanted, rtol=1e-14)


def simulated_half_a_warp_shuffles_by_itself():
    cuda = simulator()

    @cuda.jit
    def kernel(out):
        t = cuda.threadIdx.x
        if t < 16:
            out[t] = cuda.shfl_xor_sync(0xFFFF, t, 1)

    out = np.zeros(16, int)
    kernel[1, 32](out)
    assert (out == np.arange(16) ^ 1).all()


def simulated_lanes_that_are_not_there_are_told():
    cuda = simulator()

    @cuda.jit
    def beyond(out):
        out[cuda.threadIdx.x] = cuda.shfl_down_sync(ALL, 1, 1)

    @cuda.jit
    def left_out(out):
        cuda.syncwarp(0xFFFF)

    with pytest.raises(LookupError, match="lane 19 reads lane 20, which is not there"):
        beyond[1, 20](np.zeros(20))
    with pytest.raises(ValueError, match="mask 0xffff leaves out lane 16"):
        left_out[1, 32](np.zeros(1))


@pytest.mark.parametrize("how", ["atomic", "nanosleep", "ldcv"])
def simulated_blocks_wait_for_each_other(how):
    """A barrier of the grid as a kernel has it: a counter in global memory that grows."""
    cuda = simulator()
    blocks, size, steps = 3, 64, 4

    @cuda.jit(device=True)
    def arrive_and_wait(counter, goal):
        cuda.syncthreads()
        if cuda.threadIdx.x == 0:
            cuda.threadfence()
            cuda.atomic.add(counter, 0, 1)
            if how == "atomic":
                while cuda.atomic.add(counter, 0, 0) < goal:
                    pass
            elif how == "ldcv":
                while cuda.ldcv(counter, 0) < goal:
                    pass
            else:
                while counter[0] < goal:
                    cuda.nanosleep(20)
            cuda.threadfence()
        cuda.syncthreads()

    @cuda.jit
    def kernel(x, y, counter):
        i = cuda.grid(1)
        for step in range(steps):
            source, target = (x, y) if step % 2 == 0 else (y, x)
            target[i] = source[i] + source[(i + size) % x.size]  # of the next block
            arrive_and_wait(counter, (step + 1) * cuda.gridDim.x)

    x = np.random.default_rng(0).standard_normal(blocks * size)
    expected = x
    for _ in range(steps):
        expected = expected + np.roll(expected, -size)
    kernel[blocks, size](x, np.empty_like(x), np.zeros(1, np.int32))
    np.testing.assert_allclose(x, expected, rtol=1e-13)


def simulated_grid_sync_holds_all_blocks():
    cuda = simulator()

    @cuda.jit
    def kernel(x, y):
        i = cuda.grid(1)
        y[i] = 2 * x[i]
        cuda.cg.this_grid().sync()
        x[i] = y[x.size - 1 - i]

    x = np.arange(96.0)
    kernel[3, 32](x, np.zeros(96))
    assert (x == 2 * np.arange(96.0)[::-1]).all()


def simulated_shared_memory_is_a_blocks_own():
    cuda = simulator()
    from numba import float32, int32

    @cuda.jit
    def kernel(out, same, unwritten):
        first, second = cuda.shared.array(32, float32), cuda.shared.array((4, 8), float32)
        own = cuda.local.array((2, 2), float32)
        whole = cuda.shared.array(0, float32)
        bits, late = cuda.shared.array(0, int32), cuda.shared.array(shape=0, dtype=float32)[2:]
        t, b = cuda.threadIdx.x, cuda.blockIdx.x
        if t == 0 and b == 0:
            unwritten[0], unwritten[1], unwritten[2] = first[3], own[1, 1], whole[3]
            same[0] = whole.size == 32 and bits.size == 32
        cuda.syncthreads()
        first[t] = t + 100 * b
        second[t // 8, t % 8] = -1
        whole[t] = 1 + b
        cuda.syncthreads()
        same[1 + b] = bits[31] == np.float32(1 + b).view(np.int32) and late[29] == 1 + b
        out[b, t] = first[31 - t]

    out, same, unwritten = np.zeros((2, 32)), np.zeros(3, bool), np.zeros(3)
    kernel[2, 32, 0, 32 * 4](out, same, unwritten)
    assert (out == np.arange(32)[::-1] + [[0], [100]]).all()
    assert same.all()
    assert np.isnan(unwritten).all()  # what nobody wrote does not look like a result


def simulated_sizes_beyond_the_device_are_told():
    cuda = simulator()
    from numba import float32

    @cuda.jit
    def kernel(x):
        cuda.shared.array(64 * 256, float32)

    with pytest.raises(ValueError, match="65536 bytes of static shared memory; at most 49152"):
        kernel[1, 32](np.zeros(1))
    with pytest.raises(ValueError, match="2048 threads in a block; at most 1024"):
        kernel[1, 2048](np.zeros(1))
    with pytest.raises(ValueError, match="300000 bytes of shared memory; at most"):
        kernel[1, 32, 0, 300_000](np.zeros(1))


def simulated_tuples_and_scalars_are_arguments():
    cuda = simulator()

    @cuda.jit("void(UniTuple(int64, 3), float32, float32[:])", launch_bounds=(32, 1), fastmath=True)
    def kernel(words, scale, out):
        if cuda.threadIdx.x < len(words):
            out[cuda.threadIdx.x] = words[cuda.threadIdx.x] * scale

    out = np.zeros(3, np.float32)
    kernel[1, 32]((1 << 40, -2, 3), np.float32(0.5), out)
    assert out.tolist() == [2.0**39, -1, 1.5]


def simulated_device_functions_come_from_other_modules(tmp_path, monkeypatch):
    cuda = simulator()
    (tmp_path / "lowest_part.py").write_text(
        "from numba import cuda as device, float32\n"
        "@device.jit(device=True, forceinline=True)\n"
        "def warp_sum(x):\n"
        "    for distance in (16, 8, 4, 2, 1):\n"
        "        x = x + device.shfl_xor_sync(0xFFFFFFFF, x, distance)\n"
        "    return x\n"
        "@device.jit(device=True)\n"
        "def lane_zero():\n"
        "    return device.threadIdx.x % 32 == 0\n"
    )
    (tmp_path / "middle_part.py").write_text(
        "from lowest_part import lane_zero, warp_sum\n"
        "import numba.cuda, numba\n"
        "@numba.cuda.jit(device=True)\n"
        "def block_sum(x):\n"
        "    parts = numba.cuda.shared.array(32, numba.float32)\n"
        "    x = warp_sum(x)\n"
        "    if lane_zero():\n"
        "        parts[numba.cuda.threadIdx.x // 32] = x\n"
        "    numba.cuda.syncthreads()\n"
        "    total = numba.float32(0)\n"
        "    for warp in range(numba.cuda.blockDim.x // 32):\n"
        "        total += parts[warp]\n"
        "    return total\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from middle_part import block_sum

    @cuda.jit
    def kernel(x, out):
        out[cuda.grid(1)] = block_sum(x[cuda.grid(1)])

    x = np.arange(128, dtype=np.float32)
    out = np.zeros_like(x)
    kernel[2, 64](x, out)
    assert out.dtype == np.float32
    assert (out.reshape(2, 64) == x.reshape(2, 64).sum(1, keepdims=True)).all()
    with pytest.raises(RuntimeError, match="block_sum runs on the device: call it from a kernel"):
        block_sum(x)


def simulated_errors_end_the_launch_at_once():
    cuda = simulator()
    left = []

    class OddError(Exception):
        def __init__(self, one, two):
            super().__init__(one, two)

    @cuda.jit
    def kernel(flag):
        try:
            if cuda.threadIdx.x == 7 and cuda.blockIdx.x == 1:
                raise OddError("that", "is it")
            if cuda.blockIdx.x == 0:
                while flag[0] == 0:  # never set
                    cuda.nanosleep(100)
            cuda.syncthreads()
        finally:
            left.append(1)

    begin = time.perf_counter()
    with pytest.raises(OddError) as caught:
        kernel[2, 32](np.zeros(1, np.int32))
    assert time.perf_counter() - begin < 2
    assert caught.value.args == ("that", "is it")
    assert caught.value.__notes__ == ["in thread (7, 0, 0) of block (1, 0, 0)"]
    assert len(left) == 32 + 8  # each thread that had begun

    @cuda.jit
    def sound(x):
        cuda.syncthreads()
        x[cuda.threadIdx.x] = 1

    x = np.zeros(32)
    sound[1, 32](x)  # nothing is left of the launch that failed
    assert x.all()


def simulated_deadlocks_are_told():
    cuda = simulator()
    from cuda_simulator import DeadlockError

    @cuda.jit
    def leaves(x):
        if cuda.threadIdx.x != 3:
            cuda.syncthreads()

    @cuda.jit
    def waits(x):
        if cuda.threadIdx.x == 0:
            while cuda.atomic.add(x, 0, 0) < 3:
                pass
        cuda.syncthreads()

    @cuda.jit
    def splits(x):
        if cuda.threadIdx.x < 32:
            cuda.syncthreads()
        else:
            cuda.cg.this_grid().sync()

    begin = time.perf_counter()
    with pytest.raises(DeadlockError, match="2 of 64 threads are through, 62 wait for syncthreads"):
        leaves[2, 32](np.zeros(1))
    with pytest.raises(DeadlockError, match=r"block \(\d, 0, 0\) and 1 more wait for memory"):
        waits[2, 32](np.ones(1, np.int32))
    with pytest.raises(DeadlockError, match=r"32 wait for syncthreads at .*32 wait for grid sync"):
        splits[1, 64](np.zeros(1))
    assert time.perf_counter() - begin < 5


def simulated_a_missing_barrier_shows_under_some_order():
    cuda = simulator()

    @cuda.jit
    def kernel(x, out, synchronized):
        shared = cuda.shared.array(64, np.float32)
        t = cuda.threadIdx.x
        shared[t] = x[t]
        if synchronized:
            cuda.syncthreads()
        out[t] = shared[63 - t]

    def right(seed, synchronized):
        simulator(seed)
        x, out = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
        kernel[1, 64](x, out, synchronized)
        return (out == x[::-1]).all()

    try:
        assert all(right(seed, True) for seed in (None, 0, 1, 2))
        assert not any(right(seed, False) for seed in (None, 0, 1, 2))
    finally:
        simulator()


def simulated_atomics_return_the_old_value():
    cuda = simulator()

    @cuda.jit
    def kernel(x, order):
        order[cuda.atomic.add(x, 0, 1)] += 1
        cuda.atomic.max(x, 1, cuda.threadIdx.x)
        cuda.atomic.cas(x, 2, 0, 5)
        cuda.atomic.inc(x, 3, 9)

    x, order = np.zeros(4, np.int32), np.zeros(64, int)
    kernel[2, 32](x, order)
    assert x.tolist() == [64, 31, 5, 64 % 10]
    assert (order == 1).all()


def simulated_what_belongs_in_a_kernel_is_refused_outside():
    cuda = simulator()

    @cuda.jit
    def kernel(x):
        x[0] = 1

    with pytest.raises(RuntimeError, match="known only in a kernel"):
        cuda.syncthreads()
    with pytest.raises(RuntimeError, match=r"launch it as kernel\[grid, block\]"):
        kernel(np.zeros(1))

    @cuda.jit
    def returns(x):
        return 3

    with pytest.raises(TypeError, match="a kernel returns nothing; this one returned 3"):
        returns[1, 1](np.zeros(1))


def compiled_accumulators_stay_in_registers():
    from numba import cuda, float32, int64, types

    def kernel(words, a, b, out):
        tile = cuda.shared.array((4, 64), float32)
        sums = cuda.local.array((4, 4), float32)
        t = cuda.threadIdx.x
        for i in range(4):
            for j in range(4):
                sums[i, j] = float32(0)
        for k in range(words[3]):
            tile[t % 4, t // 4] = a[k * 256 + t]
            cuda.syncthreads()
            for i in range(4):
                for j in range(4):
                    sums[i, j] += tile[i, t % 64] * b[k * 4 + j]
            cuda.syncthreads()
        for i in range(4):
            for j in range(4):
                out[(t * 4 + i) * 4 + j] = sums[i, j]

    vector = types.Array(float32, 1, "C")
    signature = (types.UniTuple(int64, 60), vector, vector, vector)
    found = ptx_budget.report(kernel, signature, launch_bounds=(256, 2))
    assert found.local_operations == found.spill_bytes == found.stack_bytes == 0
    assert found.double_operations == 0
    assert 16 < found.registers <= 128
    assert found.shared_bytes == 4 * 64 * 4
    assert "fma.rn.f32" in found.ptx  # contracted, and denormals kept: no fast math
    assert ".ftz" not in found.ptx
    assert ".maxntid" in found.ptx
    assert found.seconds < 20


def compiled_local_memory_is_caught():
    from numba import cuda, float32, types

    def kernel(x, n):
        sums = cuda.local.array(64, float32)
        t = cuda.threadIdx.x
        for i in range(n):  # an index that is known only when it runs
            sums[(i * t) % 64] = x[i]
        x[t] = sums[n % 64]

    found = ptx_budget.report(kernel, (types.Array(float32, 1, "C"), types.int32))
    assert found.local_operations > 0
    assert found.stack_bytes == 64 * 4


def compiled_spills_are_caught():
    from numba import cuda, float32, types

    def kernel(x):
        t, many = cuda.threadIdx.x, cuda.local.array(96, float32)
        for i in range(96):
            many[i] = x[i * 32 + t]
        for i in range(96):
            for j in range(96):
                many[i] = many[i] * many[j] + many[(i + j) % 96]
        for i in range(96):
            x[i * 32 + t] = many[i]

    vector = (types.Array(float32, 1, "C"),)
    assert ptx_budget.report(kernel, vector, max_registers=32).spill_bytes > 0
    with pytest.raises(ValueError, match="only the bounds count"):
        ptx_budget.report(kernel, vector, launch_bounds=32, max_registers=32)


def compiled_doubles_are_caught():
    from numba import cuda, float32, types

    def kernel(x):
        x[cuda.threadIdx.x] = x[cuda.threadIdx.x] * 0.1  # a Python number is a double

    def single(x):
        x[cuda.threadIdx.x] = x[cuda.threadIdx.x] * float32(0.1)

    vector = (types.Array(float32, 1, "C"),)
    assert ptx_budget.report(kernel, vector).double_operations > 0
    assert ptx_budget.report(single, vector).double_operations == 0


def compiled_device_functions_are_compiled_with_their_kernel():
    from numba import cuda

    @cuda.jit(device=True)
    def twice(x):
        return x + x

    @cuda.jit
    def kernel(x):
        x[cuda.threadIdx.x] = twice(x[cuda.threadIdx.x])

    found = ptx_budget.report(kernel, "void(float32[::1])")
    assert "add.f32" in found.ptx
    assert "call" not in found.ptx


def compiled_fast_math_is_asked_for():
    from numba import cuda, float32, types

    def kernel(x):
        x[cuda.threadIdx.x] = x[cuda.threadIdx.x] / x[0]

    vector = (types.Array(float32, 1, "C"),)
    assert "div.rn.f32" in ptx_budget.report(kernel, vector).ptx
    assert "div.approx.ftz.f32" in ptx_budget.report(kernel, vector, fastmath=True).ptx


def compiled_a_grid_sync_can_be_reported():
    from numba import cuda, float32, types

    def kernel(x):
        x[cuda.threadIdx.x] += x[0]
        cuda.cg.this_grid().sync()
        x[cuda.threadIdx.x] += x[1]

    assert ptx_budget.report(kernel, (types.Array(float32, 1, "C"),)).registers > 0
