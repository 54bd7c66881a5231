"""What a scan costs beside its kernels, and in special cases: one table.

    python benchmarks/scan.py

Programs alternate, each in a process of its own; times are medians, ratios are taken turn by turn.
PyTorch's training step is left out where it is not installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from report import Run, answer, heading, pairs

from tinygrad_seq.comparing import milliseconds

EVERY = 150  # steps between checkpoints at T = 10,000


def _arrays(*shapes: tuple[int, ...], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape, "f4") for shape in shapes]


def _training(layer: Any, x: Any, dy: Any, **options: Any) -> Run:
    def step() -> None:
        x.grad = None
        layer.zero_grad()
        layer(x, **options)[0].backward(dy)

    return step


def _layer(sizes: tuple[int, ...], scale: float = 1.0, **options: Any) -> Run:
    import tinygrad_seq as tgs

    B, T, I, H = sizes
    x, dy = _arrays((T, B, I), (T, B, H))
    layer = tgs.nn.LSTM(I, H)
    if scale != 1:
        for parameter in layer.parameters():
            parameter.data = parameter.data * np.float32(scale)
    return _training(layer, tgs.tensor(x, requires_grad=True), tgs.tensor(dy), **options)


def custom(sizes: tuple[int, ...]) -> Run:
    """The LSTM's equations as a function of one's own."""
    import tinygrad_seq as tgs

    B, T, I, H = sizes
    x, dy, *weights = _arrays((T, B, I), (T, B, H), (I, 4 * H), (H, 4 * H), (4 * H,))
    W, U, b = (tgs.tensor(each * np.float32(H**-0.5), requires_grad=True) for each in weights)
    xs, gradient = tgs.tensor(x, requires_grad=True), tgs.tensor(dy)

    def cell(x: Any, state: Any) -> Any:
        h, c = state
        i, f, g, o = tgs.split(x @ W + h @ U + b, 4, axis=-1)
        c = tgs.sigmoid(f) * c + tgs.sigmoid(i) * tgs.tanh(g)
        h = tgs.sigmoid(o) * tgs.tanh(c)
        return h, (h, c)

    def step() -> None:
        for tensor in (xs, W, U, b):
            tensor.grad = None
        ys, _ = tgs.scan(cell, xs, (tgs.zeros(B, H), tgs.zeros(B, H)))
        ys.backward(gradient)

    return step


def padded(sizes: tuple[int, ...]) -> Run:
    B, T = sizes[:2]
    return _layer(sizes, lengths=np.linspace(T // 2, T, B).astype(int))


def long(checkpoint: int | None) -> Run:
    """T = 10,000, all of it kept or only every so many steps."""
    import tinygrad_seq as tgs

    B, T, I, H = 8, 10_000, 16, 64
    x, dy = _arrays((T, B, I), (T, B, H))
    cell = tgs.nn.LSTMCell(I, H)
    xs, gradient = tgs.tensor(x, requires_grad=True), tgs.tensor(dy)

    def step() -> None:
        xs.grad = None
        cell.zero_grad()
        tgs.scan(cell, xs, checkpoint=checkpoint)[0].backward(gradient)

    return step


def whole_here(sizes: tuple[int, ...]) -> Run:
    """LSTM, Linear, cross-entropy, clipping by norm, Adam."""
    import tinygrad_seq as tgs

    B, T, I, H = sizes
    (x,) = _arrays((T, B, I))
    labels = np.random.default_rng(0).integers(0, 10, (T, B))
    layer, head = tgs.nn.LSTM(I, H), tgs.nn.Linear(H, 10)
    parameters = [*layer.parameters(), *head.parameters()]
    optimizer = tgs.optim.Adam(parameters, 1e-3)
    xs = tgs.tensor(x)

    def step() -> None:
        optimizer.zero_grad()
        logits = head(layer(xs)[0]).reshape(T * B, 10)
        loss = tgs.nn.functional.cross_entropy(logits, labels.ravel())
        loss.backward()
        tgs.optim.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step


def whole_torch(sizes: tuple[int, ...]) -> Run:
    import torch

    B, T, I, H = sizes
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    (x,) = (torch.tensor(each) for each in _arrays((T, B, I)))
    labels = torch.tensor(np.random.default_rng(0).integers(0, 10, (T, B)))
    layer, head = torch.nn.LSTM(I, H), torch.nn.Linear(H, 10)
    parameters = [*layer.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, 1e-3)

    def step() -> None:
        optimizer.zero_grad()
        logits = head(layer(x)[0]).reshape(T * B, 10)
        loss = torch.nn.functional.cross_entropy(logits, labels.ravel())
        loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step


MIDDLE, LARGE, SLOW = (32, 100, 64, 128), (64, 50, 128, 256), (8, 1000, 32, 64)
PROGRAMS: dict[str, Callable[[], Run]] = {
    "layer": lambda: _layer(MIDDLE),
    "layer, large": lambda: _layer(LARGE),
    "custom": lambda: custom(MIDDLE),
    "custom, large": lambda: custom(LARGE),
    "padded": lambda: padded(MIDDLE),
    "full lengths": lambda: _layer(MIDDLE, lengths=[100] * 31 + [99]),
    "long": lambda: long(None),
    "long, checkpoint": lambda: long(EVERY),
    "ordinary": lambda: _layer(SLOW),
    "vanishing": lambda: _layer(SLOW, scale=0.01),
    "saturated": lambda: _layer(SLOW, scale=40.0),
    "whole step": lambda: whole_here(MIDDLE),
    "whole step, torch": lambda: whole_torch(MIDDLE),
}
PAIRS = [  # one, another, the bar for the ratio of their times, whether it is a least
    ("custom", "layer", 1.05, False),
    ("custom, large", "layer, large", 1.05, False),
    ("padded", "layer", 1.0, False),
    ("full lengths", "layer", 1.0, False),
    ("long, checkpoint", "long", 1.5, False),
    ("vanishing", "ordinary", 1.0, False),
    ("saturated", "ordinary", 1.0, False),
    ("whole step, torch", "whole step", 1.5, True),
]


def overhead() -> list[str]:
    """What the framework adds to a training step: all but the time inside compiled code."""
    from tinygrad_seq.kernels import threads

    inside, native = [0.0], threads._native()
    compiled = native["take_part"]  # one row of a batch is for one thread

    def timed(*given: Any) -> None:
        before = perf_counter()
        compiled(*given)
        inside[0] += perf_counter() - before

    native["take_part"] = timed
    added = []
    for step in (_layer((1, 100, 32, 64)), custom((1, 100, 32, 64))):
        found = []
        for _ in range(300):
            inside[0], before = 0.0, perf_counter()
            step()
            found.append(perf_counter() - before - inside[0])
        added.append(median(found[50:]) * 1e6)
    native["take_part"] = compiled
    return [
        f"The framework adds {added[0]:.0f} µs to a training step of nn.LSTM (bar 100), "
        f"{added[1]:.0f} µs to one of a custom cell."
    ]


def memory_kept() -> list[str]:
    """What is kept for the way back with a checkpoint, in steps' worth, and what else is taken."""
    from tinygrad_seq.kernels import cpu, memory

    import tinygrad_seq as tgs

    sizes: list[int] = []
    kept: list[Any] = []
    made, forward = memory.Block.__init__, cpu.Runner.forward

    def noted(self: Any, size: int) -> None:
        sizes.append(size)
        made(self, size)

    def watched(self: Any, *given: Any) -> Any:
        found = forward(self, *given)
        kept.append(found[2])
        return found

    B, T, I, H = 8, 10_000, 16, 64
    x, dy = _arrays((T, B, I), (T, B, H))
    xs, gradient = tgs.tensor(x, requires_grad=True), tgs.tensor(dy)
    cell = tgs.nn.LSTMCell(I, H)
    step = 6 * H * B * 4  # bytes: four gates, h and c
    memory.Block.__init__ = noted
    cpu.Runner.forward = watched
    ys, _ = tgs.scan(cell, xs, checkpoint=EVERY)
    ys.backward(gradient)
    memory.Block.__init__ = made
    cpu.Runner.forward = forward
    blocks = [size for size in sizes if size not in (x.nbytes, dy.nbytes)]  # and the arrays given
    states = sum(array.nbytes for each in kept for array in each.saved) / step
    segment, others = max(blocks) / step, (sum(blocks) - max(blocks)) / step
    return [
        f"checkpoint={EVERY} at T = {T}: {states + segment:.0f} steps' worth are kept for the way "
        f"back, {states:.0f} as states at the checkpoints and {segment:.0f} of one stretch; 2√T is "
        f"{2 * T**0.5:.0f}. Kernels work in {others:.0f} more, whatever T is."
    ]


def on_all_cores(make: Callable[[], Callable[[], object]], operations: float) -> float:
    """GF/s of all cores together, each of which has a run of its own."""
    cores = len(os.sched_getaffinity(0))
    together = threading.Barrier(cores)

    def one(_: int) -> float:
        run = make()
        run()
        together.wait()
        return operations / milliseconds(run) / 1e6

    with ThreadPoolExecutor(cores) as pool:
        return sum(pool.map(one, range(cores)))


def peak() -> float:
    """GF/s of all cores in multiply-adds of vectors that stay in registers."""
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic
    from tinygrad_seq.kernels import build, memory, simd

    lanes, chains, times = simd.lanes("float32"), 12, 20_000
    vector = ir.VectorType(ir.FloatType(), lanes)

    def typed(typingctx: Any, to: Any, times: Any) -> Any:
        def emit(context: Any, ops: Any, sig: Any, args: Any) -> Any:
            kind = ir.FunctionType(vector, [vector] * 3)
            fma = cgutils.get_or_insert_function(ops.module, kind, f"llvm.fma.v{lanes}f32")
            half = ir.Constant(vector, [0.5] * lanes)
            starts = (ir.Constant(vector, [float(k)] * lanes) for k in range(chains))
            sums = [cgutils.alloca_once_value(ops, start) for start in starts]
            with cgutils.for_range(ops, args[1]):
                for each in sums:
                    ops.store(ops.call(fma, [ops.load(each), half, half]), each)
            for k, each in enumerate(sums):
                at = ops.inttoptr(ops.add(args[0], simd.I64(4 * lanes * k)), vector.as_pointer())
                ops.store(ops.load(each), at, align=4)
            return context.get_dummy_value()

        return types.void(simd.WORD, simd.WORD), emit

    multiply_and_add = intrinsic(typed)

    def run(to: int, times: int) -> None:
        multiply_and_add(to, times)

    compiled = build.compiled(run, 2, keep=False)

    def make() -> Callable[[], object]:
        block = memory.Block(4 * lanes * chains)
        return lambda: compiled(block.address, times)

    return on_all_cores(make, 2.0 * lanes * chains * times)


def products() -> list[str]:
    """The rate of products inside the loop on all cores, beside the cores' own limit."""
    from tinygrad_seq.kernels import build, gemm, tiles
    from tinygrad_seq.kernels.memory import Block, address

    product, panel = build.shared("product", "float32"), gemm.panel("float32")

    def rate(M: int, K: int, N: int, in_tiles: bool) -> float:
        panels = -(-N // panel)
        wide = panels * gemm.VECTORS
        (b,) = _arrays((K, panels * panel))
        packed, whole = address(b), None  # vectors read any numbers
        if in_tiles:
            whole = Block(tiles.matrix_bytes(*b.shape))
            packed = whole.address
            build.shared("pack_in_tiles", "float32")(
                *(address(b), b.shape[1], 1, *b.shape, packed, 0, panels)
            )

        def make() -> Callable[[], object]:
            a, c = _arrays((M, K), (M, panels * panel))
            split = Block(tiles.split_bytes(K, M)) if in_tiles else None
            given = address(a), K, M, packed, K, wide, address(c), panels * panel, 0
            held = a, b, c, whole, split

            def run() -> object:
                product(*given, 0 if split is None else split.address)
                return held

            return run

        return on_all_cores(make, 2.0 * M * K * panels * panel)

    best = peak()
    lines = [f"Multiply-adds of vectors in registers: {best:.0f} GF/s on all cores."]
    for name in ("vectors", "tiles") if tiles.used("float32") else ("vectors",):
        for H in (256, 512, 1024):
            there = [rate(16, K, N, name == "tiles") for K, N in ((H, 4 * H), (4 * H, H))]
            lines.append(
                f"Products by {name}, H = {H}, 16 rows a core: forward {there[0]:.0f} GF/s, "
                f"backward {there[1]:.0f}; {min(there) / best:.0%} of that (bar 70%)."
            )
    return lines


FIRST = """
import time
start = time.perf_counter()
import numpy as np
import tinygrad_seq as tgs

W = tgs.tensor(np.ones((3, 4), "f4"), requires_grad=True)
U = tgs.tensor(np.ones((4, 4), "f4"), requires_grad=True)

def cell(x, h):
    f = tgs.sigmoid(x @ W + h @ U)
    h = (1 - f) * h + f * tgs.tanh(x @ W + (f * h) @ U)
    return h, h

ys, _ = tgs.scan(cell, np.ones((5, 2, 3), "f4"), np.zeros((2, 4), "f4"))
ys.sum().backward()
print(time.perf_counter() - start)
"""


def first_step() -> list[str]:
    """A new cell's first training step in a fresh process, import included."""
    cold: list[float] = []
    warm: list[float] = []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder:
            for times in (cold, warm, warm):
                environment = {**os.environ, "TINYGRAD_SEQ_CACHE": folder}
                command = [sys.executable, "-c", FIRST]
                done = subprocess.run(
                    command, env=environment, capture_output=True, text=True, check=True
                )
                times.append(float(done.stdout))
    return [
        f"First step of a new cell in a fresh process: {median(cold):.1f} s with an empty cache "
        f"(bar 6), {median(warm):.2f} s with a warm one (bar 1.2)."
    ]


def main() -> None:
    if len(sys.argv) > 2 and sys.argv[1] == "--worker":
        answer(PROGRAMS, sys.argv[2])
        return
    lines = []
    for part in (overhead, memory_kept, products, first_step):
        lines += [*part(), ""]
        print("\n".join(lines[-4:]), flush=True)
    parts = [*heading("What a scan costs"), "", *lines, *pairs(__file__, PAIRS)]
    path = Path(__file__).parent / "results/scan.md"
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
