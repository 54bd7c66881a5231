"""numba-cuda's simulator with all blocks of a launch running at once, for tests without a GPU.

numba-cuda runs the blocks one after another, each thread of one a thread of the system. Here each
simulated thread is a greenlet, and all of them share one thread of the system: a barrier, a
shuffle or a wait hands over to the next. So a block may wait for another, launches are quick, the
order is the same every time, and a launch that cannot go on is known at once:

    NUMBA_ENABLE_CUDASIM=1 python -c "import cuda_simulator; cuda_simulator.install(); ..."

`install()` comes before the modules with kernels are imported. It changes `numba.cuda` itself, so
kernels and device functions of any module find their thread; and arrays are handed to kernels as
they are, without a copy, as on the device.

What it is stricter in than the device: a barrier that some threads never reach, a read of a lane
that is not there and too much shared memory are errors, and shared and local memory start as NaN
(all bits set). What it cannot show: races within what a thread does between two handovers
(`install(seed)` runs the threads in an order of its own, which shows many of them), speed, and
the dtypes of the compiled kernel. A loop that waits for another thread must hand over in its body:
by `cuda.nanosleep`, an atomic operation or `cuda.ldcv`; one that reads plain memory never ends.

Imports numba and greenlet, nothing of the package.
"""

from __future__ import annotations

import os
import random
import sys
import threading
import types
from collections import Counter, deque
from collections.abc import Callable
from functools import cache, partial
from itertools import product
from math import prod
from typing import Any

import numpy as np
from greenlet import GreenletExit, getcurrent, greenlet
from numba import cuda
from numba.cuda.np.numpy_support import as_dtype
from numba.cuda.simulator import api, kernel, kernelapi
from numba.cuda.simulator.args import ArgHint
from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray
from numba.cuda.types import Type

WARP = 32
MOST_THREADS = 1024  # in a block
MOST_SHARED = 227 * 1024  # bytes of a block, on compute capability 9.0
MOST_STATIC = 48 * 1024  # bytes of it that need not be asked for at the launch
PATIENCE = 10_000  # times that everybody may find nothing new before a launch is given up

_one_launch = threading.Lock()


class DeadlockError(RuntimeError):
    """No thread of a launch can go on."""


class Barrier:
    """Where a number of threads meet, again and again, each with a value for the others."""

    def __init__(self, launch: Launch, name: str, size: int) -> None:
        self.launch, self.name, self.size = launch, name, size
        self.waiting: list[Thread] = []
        self.values: dict[int, Any] = {}

    def meet(self, place: int = 0, value: Any = None) -> dict[int, Any]:
        """Wait for all; what each brought, by its place."""
        values = self.values
        values[place] = value
        if len(self.waiting) + 1 == self.size:
            released, self.waiting, self.values = self.waiting, [], {}
            self.launch.release(released)
        else:
            thread = getcurrent()
            self.waiting.append(thread)
            thread.waits_for = self.name
            self.launch.hand_over()
            thread.waits_for = ""
        return values


class Block:
    """What the threads of a block share."""

    def __init__(self, launch: Launch, index: kernelapi.Dim3, size: int) -> None:
        self.launch, self.index, self.size = launch, index, size
        self.barrier = Barrier(launch, "syncthreads", size)
        self.warps: dict[tuple[int, int], Barrier] = {}
        self.dynamic = _poisoned(launch.shared_bytes, np.dtype(np.uint8))
        self.static: dict[tuple[int, int], np.ndarray] = {}

    def warp(self, number: int, mask: int) -> Barrier:
        """The barrier of those threads of a warp that the mask names."""
        found = self.warps.get((number, mask))
        if found is None:
            lanes = min(WARP, self.size - number * WARP)
            members = (mask & ((1 << lanes) - 1)).bit_count()
            found = self.warps[number, mask] = Barrier(self.launch, "its warp", members)
        return found

    def allocate(self, site: tuple[int, int], shape: Any, dtype: np.dtype) -> np.ndarray:
        """The static array of one place in the source, made by whoever gets there first."""
        found = self.static.get(site)
        if found is None:
            found = self.static[site] = _poisoned(shape, dtype)
            static = sum(array.nbytes for array in self.static.values())
            _check_at_most(MOST_STATIC, static, "bytes of static shared memory")
            _check_at_most(MOST_SHARED, static + self.dynamic.size, "bytes of shared memory")
        return found


class Thread(greenlet):
    """One simulated thread."""

    def __init__(self, block: Block, index: kernelapi.Dim3, number: int) -> None:
        super().__init__()
        self.block, self.index = block, index
        self.number = number  # in the block; x changes fastest
        self.warp, self.lane = divmod(number, WARP)
        self.waits_for = ""

    def run(self) -> None:
        launch = self.block.launch
        try:
            with np.errstate(all="ignore"):  # the device has no warnings
                result = launch.function(*launch.arguments)
            if result is not None:
                raise TypeError(f"a kernel returns nothing; this one returned {result!r}")
        except Exception as error:
            error.add_note(f"in {self}")
            raise

    def meet_warp(self, mask: int, value: Any = None) -> dict[int, Any]:
        if not mask >> self.lane & 1:
            raise ValueError(f"mask {mask:#x} leaves out lane {self.lane}, which calls with it")
        return self.block.warp(self.warp, mask).meet(self.lane, value)

    def place(self) -> str:
        """The line of the kernel or device function where a waiting thread stands."""
        frame = self.gr_frame
        while frame is not None and frame.f_code.co_filename == __file__:
            frame = frame.f_back
        return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else "?"

    def __repr__(self) -> str:
        return f"thread {self.index} of block {self.block.index}"


class Launch:
    """One run of a kernel: hands over from thread to thread until all are through."""

    def __init__(
        self,
        function: Callable[..., None],
        arguments: tuple[Any, ...],
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
        order: random.Random | None,
    ) -> None:
        size = prod(block)
        _check_at_most(MOST_THREADS, size, "threads in a block")
        _check_at_most(MOST_SHARED, shared_bytes, "bytes of shared memory")
        self.function, self.arguments, self.shared_bytes = function, arguments, shared_bytes
        self.grid_size, self.block_size = kernelapi.Dim3(*grid), kernelapi.Dim3(*block)
        self.order = order
        self.barrier = Barrier(self, "grid sync", prod(grid) * size)
        self.home = getcurrent()
        self.pauses = 0  # since something happened
        indices = list(enumerate(_indices(block)))
        blocks = (Block(self, index, size) for index in _indices(grid))
        self.threads = [Thread(b, index, number) for b in blocks for number, index in indices]
        self.ready: deque[Thread] = deque()

    def run(self) -> None:
        ready = self.ready
        self.release(self.threads)
        try:
            while ready:
                ready.popleft().switch()  # until one is through, one is to begin or none is ready
                self.pauses = 0
            if not all(thread.dead for thread in self.threads):
                raise DeadlockError(f"no thread can go on: {self.state()}")
        finally:
            for thread in self.threads:
                if not thread.dead:
                    thread.throw(GreenletExit)

    def release(self, threads: list[Thread]) -> None:
        self.pauses = 0
        if self.order is not None:
            threads = self.order.sample(threads, len(threads))
        self.ready.extend(threads)

    def hand_over(self) -> None:
        """To the next, or home: there threads begin, each at the same depth of the stack."""
        ready = self.ready
        (ready.popleft() if ready and ready[0] else self.home).switch()

    def pause(self) -> None:
        """Let all others that can run have their turn."""
        self.pauses += 1
        if self.pauses > PATIENCE * (len(self.ready) + 1):
            raise DeadlockError(
                f"{getcurrent()} and {len(self.ready)} more wait for memory that nobody changes; "
                f"the others: {self.state()}"
            )
        if self.ready:
            self.ready.append(getcurrent())
            self.hand_over()

    def state(self) -> str:
        through = sum(thread.dead for thread in self.threads)
        waiting = Counter(
            f"wait for {thread.waits_for} at {thread.place()}"
            for thread in self.threads
            if thread.waits_for
        )
        parts = [f"{count} {what}" for what, count in waiting.items()]
        return ", ".join([f"{through} of {len(self.threads)} threads are through", *parts])


class Module(types.ModuleType, kernelapi.FakeCUDAModule):
    """What `numba.cuda` becomes: its functions for kernels find the thread that calls them."""

    __init__ = types.ModuleType.__init__

    threadIdx = property(lambda self: _thread().index)  # noqa: N815
    blockIdx = property(lambda self: _thread().block.index)  # noqa: N815
    blockDim = property(lambda self: _thread().block.launch.block_size)  # noqa: N815
    gridDim = property(lambda self: _thread().block.launch.grid_size)  # noqa: N815
    laneid = property(lambda self: _thread().lane)

    def syncthreads(self) -> None:
        _thread().block.barrier.meet()

    def syncthreads_count(self, predicate: Any) -> int:
        thread = _thread()
        return sum(map(bool, thread.block.barrier.meet(thread.number, predicate).values()))

    def syncthreads_and(self, predicate: Any) -> int:
        return int(self.syncthreads_count(predicate) == _thread().block.size)

    def syncthreads_or(self, predicate: Any) -> int:
        return int(self.syncthreads_count(predicate) > 0)

    def syncwarp(self, mask: int = 0xFFFFFFFF) -> None:
        _thread().meet_warp(int(mask))

    def shfl_sync(self, mask: int, value: Any, lane: int) -> Any:
        return _shuffle(mask, value, lambda own: lane % WARP)

    def shfl_xor_sync(self, mask: int, value: Any, lane_mask: int) -> Any:
        return _shuffle(mask, value, lambda own: own ^ lane_mask)

    def shfl_up_sync(self, mask: int, value: Any, delta: int) -> Any:
        return _shuffle(mask, value, lambda own: own - delta)

    def shfl_down_sync(self, mask: int, value: Any, delta: int) -> Any:
        return _shuffle(mask, value, lambda own: own + delta)

    def ballot_sync(self, mask: int, predicate: Any) -> int:
        values = _thread().meet_warp(int(mask), predicate)
        return sum(1 << lane for lane, value in values.items() if value)

    def all_sync(self, mask: int, predicate: Any) -> bool:
        return all(_thread().meet_warp(int(mask), predicate).values())

    def any_sync(self, mask: int, predicate: Any) -> bool:
        return any(_thread().meet_warp(int(mask), predicate).values())

    def nanosleep(self, nanoseconds: int) -> None:
        pause()

    def _load(self, array: np.ndarray, index: Any) -> Any:
        return array[index]

    def _store(self, array: np.ndarray, index: Any, value: Any) -> None:
        array[index] = value

    ldca = ldcg = ldcs = ldlu = _load
    stcg = stcs = stwb = stwt = _store

    def ldcv(self, array: np.ndarray, index: Any) -> Any:
        """Reads what others may have written since; so it lets them."""
        pause()
        return array[index]


class Shared:
    def array(self, shape: Any, dtype: Any, alignment: int | None = None) -> np.ndarray:
        block, dtype = _thread().block, _dtype(dtype)
        if shape in (0, (0,)):  # the launch's; all views of it are of the same bytes
            whole = block.dynamic.size // dtype.itemsize * dtype.itemsize
            return block.dynamic[:whole].view(dtype)
        caller = sys._getframe(1)
        return block.allocate((id(caller.f_code), caller.f_lasti), shape, dtype)


class Local:
    def array(self, shape: Any, dtype: Any, alignment: int | None = None) -> np.ndarray:
        return _poisoned(shape, _dtype(dtype))


class Groups:
    """`cuda.cg`"""

    def this_grid(self) -> Groups:
        return self

    def sync(self) -> None:
        _thread().block.launch.barrier.meet()


class Atomic:
    """Each returns the old value, and lets others run after it."""

    def add(self, array: np.ndarray, index: Any, value: Any) -> Any:
        return _exchange(array, index, lambda old: old + value)

    def sub(self, array: np.ndarray, index: Any, value: Any) -> Any:
        return _exchange(array, index, lambda old: old - value)

    def max(self, array: np.ndarray, index: Any, value: Any) -> Any:
        return _exchange(array, index, lambda old: max(old, value))

    def min(self, array: np.ndarray, index: Any, value: Any) -> Any:
        return _exchange(array, index, lambda old: min(old, value))

    def and_(self, array: np.ndarray, index: Any, value: Any) -> Any:
        return _exchange(array, index, lambda old: old & value)

    def or_(self, array: np.ndarray, index: Any, value: Any) -> Any:
        return _exchange(array, index, lambda old: old | value)

    def xor(self, array: np.ndarray, index: Any, value: Any) -> Any:
        return _exchange(array, index, lambda old: old ^ value)

    def exch(self, array: np.ndarray, index: Any, value: Any) -> Any:
        return _exchange(array, index, lambda old: value)

    def inc(self, array: np.ndarray, index: Any, value: Any) -> Any:
        return _exchange(array, index, lambda old: 0 if old >= value else old + 1)

    def dec(self, array: np.ndarray, index: Any, value: Any) -> Any:
        return _exchange(array, index, lambda old: value if old in (0,) or old > value else old - 1)

    def cas(self, array: np.ndarray, index: Any, old: Any, value: Any) -> Any:
        return _exchange(array, index, lambda there: value if there == old else there)

    def compare_and_swap(self, array: np.ndarray, old: Any, value: Any) -> Any:
        return self.cas(array, (0,) * array.ndim, old, value)


class Launcher:
    """A kernel with a grid, a block and the bytes of dynamic shared memory."""

    def __init__(self, function: Callable[..., None], configuration: tuple[Any, ...]) -> None:
        if not 2 <= len(configuration) <= 4:
            raise ValueError(f"expected kernel[grid, block, stream, bytes], not {configuration}")
        grid, block, _, shared_bytes = (*configuration, 0, 0)[:4]
        self.function, self.shared_bytes = function, shared_bytes
        self.grid, self.block = kernel.normalize_kernel_dimensions(grid, block)

    def __call__(self, *arguments: Any) -> None:
        write_back: list[Callable[[], Any]] = []
        given = tuple(_argument(argument, write_back) for argument in arguments)
        if isinstance(getcurrent(), Thread):
            raise RuntimeError("a launch from within a kernel: it is not supported")
        with _one_launch:
            order = None if _seed is None else random.Random(_seed)
            Launch(self.function, given, self.grid, self.block, self.shared_bytes, order).run()
        for write in write_back:
            write()


_seed: int | None = None


def install(seed: int | None = None) -> None:
    """Make `numba.cuda` this simulator.

    Without a seed the threads run in the order of their numbers, otherwise in one that the seed
    draws anew at each barrier. It may be called again, to go on with another seed.
    """
    global _seed
    if os.environ.get("NUMBA_ENABLE_CUDASIM") != "1":
        raise RuntimeError("set NUMBA_ENABLE_CUDASIM=1 before numba is imported")
    _seed = seed
    if isinstance(cuda, Module):
        return
    for name in ("ldca", "ldcg", "ldcs", "ldlu", "ldcv", "stcg", "stcs", "stwb", "stwt"):
        delattr(cuda, name)  # they are None; the methods take their place
    cuda.__class__ = Module
    cuda._shared, cuda._local, cuda._cg, cuda._atomic = Shared(), Local(), Groups(), Atomic()
    cuda._const, cuda._fp16 = kernelapi.FakeCUDAConst(), kernelapi.FakeCUDAFp16()
    kernel.FakeCUDAKernel.__getitem__ = lambda self, configuration: Launcher(self.fn, configuration)
    kernel.FakeCUDAKernel.__call__ = _call
    kernel.FakeOverload.max_cooperative_grid_blocks = lambda self, block, bytes_=0: 132
    cuda.jit = partial(_jit, api.jit)


def pause() -> None:
    """Let all other threads of the launch run: the body of a loop that waits for them."""
    _thread().block.launch.pause()


def _jit(jit: Callable[..., Any], function: Any = None, **options: Any) -> Any:
    """`cuda.jit` with the options that only a compiler can use."""
    for name in "max_registers launch_bounds lineinfo forceinline lto extensions".split():
        options.pop(name, None)
    return jit(function, **options)


def _call(self: kernel.FakeCUDAKernel, *arguments: Any) -> Any:
    """From a thread: a device function."""
    if not isinstance(getcurrent(), Thread):
        what = "call it from a kernel" if self._device else "launch it as kernel[grid, block](...)"
        raise RuntimeError(f"{self.fn.__name__} runs on the device: {what}")
    return self.fn(*arguments)


def _thread() -> Thread:
    thread = getcurrent()
    if not isinstance(thread, Thread):
        raise RuntimeError("this is known only in a kernel that runs")
    return thread


def _shuffle(mask: int, value: Any, source: Callable[[int], int]) -> Any:
    thread = _thread()
    values = thread.meet_warp(int(mask), value)
    lane = source(thread.lane)
    if not 0 <= lane < WARP:
        return value
    if lane not in values:
        raise LookupError(f"lane {thread.lane} reads lane {lane}, which is not there")
    return values[lane]


def _exchange(array: np.ndarray, index: Any, rule: Callable[[Any], Any]) -> Any:
    launch = _thread().block.launch
    old = array[index]
    array[index] = rule(old)
    if array[index] != old:
        launch.pauses = 0
    launch.pause()
    return old


def _argument(argument: Any, write_back: list[Callable[[], Any]]) -> Any:
    if isinstance(argument, ArgHint):
        argument = argument.to_device(write_back)
    return argument._ary if isinstance(argument, FakeCUDAArray) else argument


def _poisoned(shape: Any, dtype: np.dtype) -> np.ndarray:
    """An array of NaN, or of -1: what nobody wrote."""
    shape = shape if isinstance(shape, tuple) else (int(shape),)
    return np.full(prod(shape) * dtype.itemsize, 0xFF, np.uint8).view(dtype).reshape(shape)


@cache
def _dtype(given: Any) -> np.dtype:
    return as_dtype(given) if isinstance(given, Type) else np.dtype(given)


def _indices(size: tuple[int, int, int]) -> list[kernelapi.Dim3]:
    return [kernelapi.Dim3(x, y, z) for z, y, x in product(*map(range, reversed(size)))]


def _check_at_most(most: int, given: int, what: str) -> None:
    if given > most:
        raise ValueError(f"{given} {what}; at most {most} are there")
