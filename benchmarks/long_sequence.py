"""An LSTM over thousands of steps, time and memory: ``python benchmarks/long_sequence.py``.

Memory is what Python and NumPy hold (tracemalloc): before, at the end of the forward pass, and
after backward and ``del``. The garbage collector is off, so what is freed is freed at once.
"""

from __future__ import annotations

import gc
import sys
import tracemalloc
from time import perf_counter

import tinygrad_seq as tgs
from tinygrad_seq import nn


def measure(steps: int, hidden_size: int = 16) -> dict[str, float]:
    """Seconds forward and backward; megabytes held by the graph, and left when it is gone."""
    layer = nn.LSTM(4, hidden_size, rng=0, backend="tape")
    xs = tgs.randn(steps, 2, 4, rng=0)
    begin = perf_counter()
    ys, _ = layer(xs)
    middle = perf_counter()
    (ys * ys).sum().backward()
    end = perf_counter()
    layer.zero_grad()
    del ys, _
    gc.collect()
    gc.disable()
    tracemalloc.start()
    start = tracemalloc.get_traced_memory()[0]
    ys, state = layer(xs)
    loss = (ys * ys).sum()
    held = tracemalloc.get_traced_memory()[0] - start
    loss.backward()
    layer.zero_grad()
    del ys, state, loss
    left = tracemalloc.get_traced_memory()[0] - start
    tracemalloc.stop()
    gc.enable()
    return {
        "forward s": middle - begin,
        "backward s": end - middle,
        "held MB": held / 1e6,
        "left MB": left / 1e6,
    }


def main() -> None:
    print(f"recursion limit {sys.getrecursionlimit()}")
    for steps in (100, 1000, 2500, 5000, 10_000):
        row = measure(steps)
        text = ", ".join(f"{name} {value:.3f}" for name, value in row.items())
        print(f"T {steps}: {text}, {1e6 * row['held MB'] / steps:.0f} bytes a step")


if __name__ == "__main__":
    main()
