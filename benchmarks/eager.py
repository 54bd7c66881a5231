"""What one small eager operation costs, beside PyTorch: ``python benchmarks/eager.py``.

The chain h = tanh(h @ w * 0.5 + h) on 4×8 tensors, forward and backward, as a slope: the time of
220 operations less that of 20, over 200. And one separate small backward.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from statistics import median
from time import perf_counter
from typing import Any

from tinygrad_seq.comparing import alternate, ratio, serve

QUESTIONS = {"chain": "one operation in a chain", "backward": "a separate small backward"}


def measure(library: str) -> Callable[[str], float]:
    lib: Any = import_module(library)
    w, start = lib.randn(8, 8, requires_grad=True), lib.randn(4, 8)
    x = lib.randn(4, 8, requires_grad=True)

    def chain(operations: int) -> float:
        begin = perf_counter()
        h = start
        for _ in range(operations // 4):
            h = lib.tanh(h @ w * 0.5 + h)
        h.sum().backward()
        w.grad = None
        return perf_counter() - begin

    def small_backward() -> float:
        y = (x * x).sum()
        begin = perf_counter()
        y.backward()
        spent = perf_counter() - begin
        x.grad = None
        return spent

    def answer(question: str) -> float:
        """Microseconds."""
        if question == "backward":
            return 1e6 * median(small_backward() for _ in range(1000))
        slope = median(chain(220) for _ in range(100)) - median(chain(20) for _ in range(100))
        return 1e6 * slope / 200

    for question in QUESTIONS:
        answer(question)
    return answer


def main() -> None:
    commands = {name: [sys.executable, __file__, name] for name in ("tinygrad_seq", "torch")}
    answers = alternate(commands, list(QUESTIONS), turns=9)
    for question, rows in answers.items():
        text = ", ".join(f"{name} {median(times):.2f} µs" for name, times in rows.items())
        if len(rows) > 1:
            text += f", torch / tinygrad_seq {ratio(rows['torch'], rows['tinygrad_seq']):.2f}"
        print(f"{QUESTIONS[question]}: {text}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        try:
            serve(measure(sys.argv[1]))
        except ImportError:
            sys.exit(1)
    else:
        main()
