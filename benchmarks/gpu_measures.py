"""What a GPU's launches, barriers and memory cost, and which versions are there, for ``gpu.py``.

Each item is a function of ``VERSIONS``, ``LAUNCHES`` or ``COSTS`` that gives what it found.
``Device`` is how they reach the device, or in a test the simulator.
Imports NumPy, and the kernels when they are first needed.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from importlib import import_module, metadata
from statistics import median
from typing import Any

import numpy as np
from gpu_running import MissingError, Note

PACKAGES = (
    "numpy numba llvmlite numba-cuda cuda-core cuda-bindings cuda-pathfinder cuda-toolkit "
    "nvidia-cuda-nvcc nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-nvvm nvidia-nvjitlink "
    "cupy-cuda13x torch nvidia-cudnn-cu13 triton jax jaxlib jax-cuda13-plugin pytest pytest-xdist "
    "hypothesis"
).split()
WORDS = (5, 60)
PARTS = (2, 4, 8, 16, 32, 66, 132)
Found = dict[str, Any]


class Device:
    """The GPU, or in the simulator the host."""

    def __init__(self) -> None:
        if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
            self.xp: Any = np
            self.times, self.processors = 2, 4
        else:
            from tinygrad_seq import devices

            why = devices.missing()
            if why is not None:
                raise MissingError(why)
            self.xp = devices.load()
            self.times = 2000
            self.processors = self.xp.cuda.runtime.getDeviceProperties(0)["multiProcessorCount"]
        self.on_gpu = self.xp is not np

    def finish(self) -> None:
        if self.on_gpu:
            self.xp.cuda.runtime.deviceSynchronize()

    def zeros(self, count: int, dtype: str) -> Any:
        return self.xp.zeros(count, dtype)

    def host(self, array: Any) -> Any:
        return array.get() if self.on_gpu else array

    def need(self, what: str) -> None:
        if not self.on_gpu:
            raise MissingError(f"{what} is not in the simulator")


def at(array: Any) -> int:
    from tinygrad_seq.kernels import cuda_build

    return int(cuda_build.address(array))


def clocks_of(device: Device, array: Any, times: int) -> float:
    """The median over blocks of clocks a time."""
    return float(median(device.host(array).tolist())) / times


# Versions ------------------------------------------------------------------------------------


def packages(note: Note) -> Found:
    found = {"python": platform.python_version(), "platform": platform.platform()}
    found["processors of the host"] = str(os.cpu_count())
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def driver(note: Note) -> Found:
    """What nvidia-smi says."""
    wanted = "name driver_version memory.total clocks.sm clocks.max.sm clocks.mem power.limit"
    names = wanted.split()
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except FileNotFoundError:
        raise MissingError("nvidia-smi is not installed") from None
    if done.returncode:
        raise MissingError(f"nvidia-smi: {done.stdout.strip()} {done.stderr.strip()}")
    return dict(zip(names, done.stdout.splitlines()[0].split(", "), strict=True))


def device_of_cupy(note: Note) -> Found:
    device = Device()
    device.need("CuPy")
    runtime = device.xp.cuda.runtime
    properties = runtime.getDeviceProperties(0)
    wanted = (
        "multiProcessorCount sharedMemPerBlock sharedMemPerBlockOptin sharedMemPerMultiprocessor "
        "regsPerBlock l2CacheSize clockRate totalGlobalMem major minor cooperativeLaunch"
    )
    found = {name: properties[name] for name in wanted.split() if name in properties}
    found |= {"driver for CUDA": runtime.driverGetVersion()}
    return found | {"runtime of CuPy": runtime.runtimeGetVersion()}


def device_of_numba(note: Note) -> Found:
    Device().need("numba-cuda's device")
    from tinygrad_seq.kernels import cuda_build

    found = cuda_build.cuda.get_current_device()
    return {
        "machine": str(cuda_build.machine()),
        "compute capability": str(found.compute_capability),
        "clock, kHz": found.CLOCK_RATE,
    }


def device_of(package: str) -> Callable[[Note], Found]:
    def look(note: Note) -> Found:
        try:
            module = import_module(package)
        except ImportError as error:
            raise MissingError(f"{package} cannot be imported ({error})") from None
        if package == "jax":
            return {"devices": str(module.devices()), "backend": module.default_backend()}
        if not module.cuda.is_available():
            raise MissingError("torch sees no GPU")
        return {
            "device": module.cuda.get_device_name(0),
            "CUDA": module.version.cuda,
            "cuDNN": module.backends.cudnn.version(),
        }

    return look


VERSIONS: dict[str, Callable[[Note], Found]] = {
    "packages": packages,
    "driver": driver,
    "device, CuPy": device_of_cupy,
    "device, numba-cuda": device_of_numba,
    "torch": device_of("torch"),
    "jax": device_of("jax"),
}


# Launches ------------------------------------------------------------------------------------


def words_for(out: Any, count: int) -> tuple[int, ...]:
    return (at(out), 7, *range(count - 2))


def expect(found: Any, expected: Any) -> None:
    """Raise if the numbers are not exactly these."""
    if not np.array_equal(found, expected):
        raise AssertionError(f"found {np.asarray(found)[:8]}, expected {np.asarray(expected)[:8]}")


def launch_plain(count: int) -> Callable[[Note], Found]:
    def launch(note: Note) -> Found:
        device = Device()
        import gpu_kernels as kernels

        out = device.zeros(3 * kernels.threads, "float32")
        begin = time.perf_counter()
        kernel = kernels.compiled(kernels.fill, count)
        seconds = time.perf_counter() - begin
        kernel.launch(3, 0, words_for(out, count), 0, False)
        device.finish()
        expect(device.host(out), 7 + np.arange(3 * kernels.threads))
        return {"seconds to compile": round(seconds, 2)}

    return launch


def launch_shared(note: Note) -> Found:
    """With more shared memory than comes unasked, and again with all there is."""
    device = Device()
    import gpu_kernels as kernels
    from tinygrad_seq.kernels import cuda_build

    kernel = kernels.compiled(kernels.mirror, 2)
    most = cuda_build.machine().shared_bytes
    for bytes_ in sorted({min(64 * 1024, most), most}):
        n = bytes_ // 4
        out = device.zeros(n, "float32")
        kernel.launch(1, bytes_, (at(out), n), 0, False)
        device.finish()
        expect(device.host(out), np.arange(n)[::-1])
        note(**{f"{bytes_} bytes": "right"})
    return {}


def launch_together(note: Note) -> Found:
    """Blocks that wait for one another, in one group and in several."""
    device = Device()
    import gpu_kernels as kernels

    kernel = kernels.compiled(kernels.exchange, 5)
    most, times = device.processors, 50 if device.on_gpu else 3
    for groups, parts in ((1, 2), (2, 2), (1, most), (most, 1)):
        blocks = groups * parts
        counters = device.zeros(groups * 128, "uint8")
        numbers, out = device.zeros(2 * blocks, "float32"), device.zeros(blocks, "float32")
        words = (at(counters), parts, times, at(numbers), at(out))
        kernel.launch(blocks, 0, words, 0, True)
        device.finish()
        beside = (np.arange(blocks) % parts + 1) % parts
        expect(device.host(out), times * beside + sum(range(times)))
        note(**{f"{groups} groups of {parts}": "right"})
    return {}


def launch_by_numba(note: Note) -> Found:
    device = Device()
    device.need("numba-cuda's own launch")
    import gpu_kernels as kernels
    from numba import types
    from tinygrad_seq.kernels.cuda_build import cuda

    signature = types.void(types.UniTuple(types.int64, 5))
    kernel: Any = cuda.jit([signature])(kernels.fill)
    out = device.zeros(kernels.threads, "float32")
    kernel[1, kernels.threads](words_for(out, 5))
    device.finish()
    expect(device.host(out), 7 + np.arange(kernels.threads))
    return {}


def launch_by_driver(note: Note) -> Found:
    """The same through ``cuda.bindings``, should ``cuda.core`` not do."""
    device = Device()
    device.need("the driver")
    import gpu_kernels as kernels

    out = device.zeros(kernels.threads, "float32")
    DriverLaunch(kernels.compiled(kernels.fill, 5), 5).launch(words_for(out, 5))
    device.finish()
    expect(device.host(out), 7 + np.arange(kernels.threads))
    return {}


class DriverLaunch:
    """A launch of one block by ``cuLaunchKernel``."""

    def __init__(self, kernel: Any, count: int) -> None:
        import ctypes

        from cuda.bindings import driver

        self.driver, self.types = driver, (ctypes.c_int64,) * count
        status, self.function = driver.cuKernelGetFunction(kernel._function.handle)
        if status != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"cuKernelGetFunction: {status.name}")

    def launch(self, words: tuple[int, ...]) -> None:
        (status,) = self.driver.cuLaunchKernel(
            self.function, 1, 1, 1, 256, 1, 1, 0, 0, (words, self.types), 0
        )
        if status != self.driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"cuLaunchKernel: {status.name}")


LAUNCHES: dict[str, Callable[[Note], Found]] = {
    "5 words": launch_plain(5),
    "60 words": launch_plain(60),
    "more than 48 KB of shared memory": launch_shared,
    "blocks that wait for one another": launch_together,
    "through numba-cuda's kernel[...]": launch_by_numba,
    "through cuLaunchKernel": launch_by_driver,
}


# Costs ---------------------------------------------------------------------------------------


def cost_of(run: Callable[[], object], device: Device) -> Found:
    """Microseconds of a launch: for the host alone, and back to back until all are done."""
    for _ in range(10):
        run()
    device.finish()
    few, many = (200, 2000) if device.on_gpu else (2, 4)
    hosts = []
    for _ in range(7):
        begin = time.perf_counter()
        for _ in range(few):
            run()
        hosts.append((time.perf_counter() - begin) / few)
        device.finish()
    begin = time.perf_counter()
    for _ in range(many):
        run()
    device.finish()
    both = (time.perf_counter() - begin) / many
    return {"host µs": round(median(hosts) * 1e6, 2), "back to back µs": round(both * 1e6, 2)}


def cost_of_ours(count: int, together: bool = False) -> Callable[[Note], Found]:
    def measure(note: Note) -> Found:
        device = Device()
        import gpu_kernels as kernels

        kernel = kernels.compiled(kernels.fill, count)
        out = device.zeros(4 * kernels.threads, "float32")
        words = words_for(out, count)
        return cost_of(lambda: kernel.launch(4, 0, words, 0, together), device)

    return measure


def cost_of_numbas(count: int) -> Callable[[Note], Found]:
    def measure(note: Note) -> Found:
        device = Device()
        device.need("numba-cuda's own launch")
        import gpu_kernels as kernels
        from numba import types
        from tinygrad_seq.kernels.cuda_build import cuda

        signature = types.void(types.UniTuple(types.int64, count))
        kernel: Any = cuda.jit([signature])(kernels.fill)
        out = device.zeros(4 * kernels.threads, "float32")
        words, configured = words_for(out, count), kernel[4, kernels.threads]
        return cost_of(lambda: configured(words), device)

    return measure


def cost_of_drivers(note: Note) -> Found:
    device = Device()
    device.need("the driver")
    import gpu_kernels as kernels

    out = device.zeros(4 * kernels.threads, "float32")
    kernel, words = DriverLaunch(kernels.compiled(kernels.fill, 60), 60), words_for(out, 60)
    return cost_of(lambda: kernel.launch(words), device)


def cost_of_cupys(count: int) -> Callable[[Note], Found]:
    def measure(note: Note) -> Found:
        device = Device()
        device.need("CuPy")
        given = ", ".join(f"long long a{k}" for k in range(count))
        text = f'extern "C" __global__ void fill({given}) {{ ((float*) a0)[threadIdx.x] = a1; }}'
        kernel = device.xp.RawKernel(text, "fill")
        out = device.zeros(256, "float32")
        words = words_for(out, count)
        return cost_of(lambda: kernel((1,), (256,), words), device)

    return measure


def cost_of_elementwise(note: Note) -> Found:
    device = Device()
    device.need("CuPy")
    a, out = device.zeros(256, "float32"), device.zeros(256, "float32")
    return cost_of(lambda: device.xp.add(a, a, out=out), device)


def graph(together: bool) -> Callable[[Note], Found]:
    """A launch of ours captured a hundred times, and replayed."""

    def measure(note: Note) -> Found:
        device = Device()
        device.need("a graph")
        import gpu_kernels as kernels

        kernel = kernels.compiled(kernels.fill, 60)
        out = device.zeros(4 * kernels.threads, "float32")
        words = words_for(out, 60)
        stream = device.xp.cuda.Stream(non_blocking=True)
        kernel.launch(4, 0, words, stream.ptr, together)
        device.finish()
        found = {}
        with stream:
            for count in (1, 100):
                stream.begin_capture()
                for _ in range(count):
                    kernel.launch(4, 0, words, stream.ptr, together)
                captured = stream.end_capture()
                out.fill(0)
                captured.launch(stream)
                stream.synchronize()
                expect(device.host(out), 7 + np.arange(4 * kernels.threads))
                cost = cost_of(lambda each=captured: each.launch(stream), device)  # type: ignore[misc]
                found[f"replay of {count}"] = cost
        return found

    return measure


def products_by_steps(note: Note) -> Found:
    """cuBLAS in a graph, as a loop by steps has it: that it can be captured, and what it takes."""
    device = Device()
    device.need("a graph")
    from tinygrad_seq.kernels import cuda_blas
    from tinygrad_seq.kernels.cuda_division import COSTS

    xp, found, rng = device.xp, {}, np.random.default_rng(0)
    for B, K, C in ((1, 128, 512), (16, 1024, 4096), (64, 1024, 4096), (64, 2048, 8192)):
        a, matrix = (xp.asarray(rng.random(shape, "f4")) for shape in ((B, K), (K, C)))
        for way, given in (("", matrix), (", transposed", matrix.T.copy().T)):
            out = xp.zeros((B, C), "f4")
            products = cuda_blas.Products(xp)

            def step(stream: int, given: Any = given, a: Any = a, out: Any = out) -> None:
                products.on(stream)  # noqa: B023
                products.product(a, given, out)  # noqa: B023

            steps = 1 + 16 * cuda_blas.STEPS_CAPTURED
            cuda_blas.repeat(xp, step, steps)
            expected = device.host(a) @ device.host(matrix)
            np.testing.assert_allclose(device.host(out), expected, rtol=1e-4)
            begin, end = xp.cuda.Event(), xp.cuda.Event()
            begin.record()
            cuda_blas.repeat(xp, step, steps)
            end.record()
            end.synchronize()
            us = xp.cuda.get_elapsed_time(begin, end) * 1e3 / steps
            found[f"µs of {B} × {K} × {C}{way}"] = round(us, 2)
            found[f"billion multiplications a second{way}"] = round(B * K * C / us / 1e3)
    return found | {"assumed node": COSTS.node, "assumed vendor": COSTS.vendor}


def clock(note: Note) -> Found:
    """How fast the clock of the kernels runs, after it has had a moment to speed up."""
    device = Device()
    import gpu_kernels as kernels

    kernel = kernels.compiled(kernels.spin, 2)
    wanted = 200_000_000 if device.on_gpu else 1000
    out = device.zeros(1, "float64")
    for _ in range(3):
        device.finish()
        begin = time.perf_counter()
        kernel.launch(1, 0, (wanted, at(out)), 0, False)
        device.finish()
        seconds = time.perf_counter() - begin
    return {"MHz": round(float(device.host(out)[0]) / seconds / 1e6, 1)}


def barrier_of_groups(note: Note) -> Found:
    """Clocks of a barrier of our own, by how many blocks wait: one group, and all that fit."""
    device = Device()
    import gpu_kernels as kernels
    from tinygrad_seq.kernels.cuda_division import COSTS

    kernel, times = kernels.compiled(kernels.rounds, 4), device.times
    for parts in [p for p in PARTS if p <= device.processors]:
        found: Found = {"assumed": COSTS.barrier + 5.0 * parts}
        for groups in sorted({1, device.processors // parts}):
            counters = device.zeros(groups * 128, "uint8")
            clocks = device.zeros(groups * parts, "float64")
            for _ in range(2):  # the first may meet a slow clock
                counters[...] = 0
                words = (at(counters), parts, times, at(clocks))
                device.finish()
                begin = time.perf_counter()
                kernel.launch(groups * parts, 0, words, 0, True)
                device.finish()
                seconds = time.perf_counter() - begin
            each = {"clocks": round(clocks_of(device, clocks, times))}
            found[f"{groups} groups"] = each | {"µs": round(seconds / times * 1e6, 3)}
        note(**{f"{parts} blocks": found})
    return {}


def barrier_of_the_grid(note: Note) -> Found:
    """numba-cuda's barrier of all blocks."""
    device = Device()
    device.need("a barrier of the grid")
    import gpu_kernels as kernels
    from numba import types
    from tinygrad_seq.kernels.cuda_build import cuda

    signature = types.void(types.UniTuple(types.int64, 2))
    kernel: Any = cuda.jit([signature])(kernels.grid_rounds)
    for blocks in [p for p in PARTS if p <= device.processors]:
        clocks = device.zeros(blocks, "float64")
        for _ in range(2):
            kernel[blocks, kernels.threads]((device.times, at(clocks)))
            device.finish()
        note(**{f"{blocks} blocks": {"clocks": round(clocks_of(device, clocks, device.times))}})
    return {}


def meeting(note: Note) -> Found:
    device = Device()
    import gpu_kernels as kernels
    from tinygrad_seq.kernels.cuda_division import COSTS

    clocks = device.zeros(1, "float64")
    kernel = kernels.compiled(kernels.meetings, 2)
    for _ in range(2):
        kernel.launch(1, 0, (device.times, at(clocks)), 0, False)
        device.finish()
    return {"clocks": clocks_of(device, clocks, device.times), "assumed": COSTS.meeting}


def latency(note: Note) -> Found:
    """Clocks of one read after another, from the block's own cache, the device's, and memory."""
    device = Device()
    import gpu_kernels as kernels

    kernel, out = kernels.compiled(kernels.chase, 3), device.zeros(2, "float64")
    sizes = {"16 KB": 2**14, "8 MB": 2**23, "256 MB": 2**28} if device.on_gpu else {"1 KB": 2**10}
    times = 20_000 if device.on_gpu else 4
    for name, size in sizes.items():
        count = size // 128
        order = np.random.default_rng(0).permutation(count)
        words = np.zeros(size // 8, np.int64)
        array = device.zeros(size // 8, "int64")
        words[order * 16] = at(array) + np.roll(order, -1) * 128
        array[...] = device.xp.asarray(words)
        for _ in range(2):
            kernel.launch(1, 0, (at(array), times, at(out)), 0, False)
            device.finish()
        note(**{name: {"clocks": round(float(device.host(out)[0]) / times, 1)}})
    return {}


def bandwidth(note: Note) -> Found:
    """Bytes in a clock to a block: all blocks reading the same, and each its own."""
    device = Device()
    import gpu_kernels as kernels
    from tinygrad_seq.kernels.cuda_division import COSTS

    kernel = kernels.compiled(kernels.read_global, 6)
    least = 64 * kernels.threads
    sizes = [2**16, 2**18, 2**20] if device.on_gpu else [least]
    times = 50 if device.on_gpu else 1
    found: Found = {"assumed near": COSTS.near, "assumed streams": COSTS.streams}
    for size in sizes:
        for blocks in sorted({1, device.processors}):
            for name, apart in {"the same": 0, "its own": size}.items():
                if blocks == 1 and apart:
                    continue
                memory = device.zeros(blocks * size, "uint8")
                clocks = device.zeros(blocks, "float64")
                out = device.zeros(blocks * kernels.threads, "float32")
                words = (at(memory), apart, size, times, at(clocks), at(out))
                for _ in range(2):
                    kernel.launch(blocks, 0, words, 0, False)
                    device.finish()
                rate = size / clocks_of(device, clocks, times)
                what = f"{size // 1024} KB, {blocks} blocks, {name}"
                note(**{what: {"bytes in a clock": round(rate, 1)}})
    return found


def bandwidth_of_shared(note: Note) -> Found:
    device = Device()
    import gpu_kernels as kernels

    kernel = kernels.compiled(kernels.read_shared, 3)
    clocks, out = device.zeros(1, "float64"), device.zeros(kernels.threads, "float32")
    for _ in range(2):
        words = (device.times, at(clocks), at(out))
        kernel.launch(1, 4 * kernels.SHARED_NUMBERS, words, 0, False)
        device.finish()
    each = clocks_of(device, clocks, device.times)
    return {"bytes in a clock": round(32 * kernels.threads / each, 1)}


COSTS: dict[str, Callable[[Note], Found]] = {
    "clock": clock,
    "barrier of a group, ours": barrier_of_groups,
    "barrier of the grid, numba-cuda's": barrier_of_the_grid,
    "launch, ours, 5 words": cost_of_ours(5),
    "launch, ours, 60 words": cost_of_ours(60),
    "launch, ours, 60 words, together": cost_of_ours(60, together=True),
    "launch, cuLaunchKernel, 60 words": cost_of_drivers,
    "launch, numba-cuda's, 5 words": cost_of_numbas(5),
    "launch, numba-cuda's, 60 words": cost_of_numbas(60),
    "launch, CuPy's RawKernel, 5 words": cost_of_cupys(5),
    "launch, CuPy's RawKernel, 60 words": cost_of_cupys(60),
    "launch, CuPy's add": cost_of_elementwise,
    "graph of launches": graph(together=False),
    "graph of launches together": graph(together=True),
    "products by steps": products_by_steps,
    "meeting of a block": meeting,
    "read after read": latency,
    "reads of a block": bandwidth,
    "shared memory of a block": bandwidth_of_shared,
}
