"""Programs that run by turns, each in a process of its own, compared turn by turn.

A worker is a function that takes a line of text and returns a number; ``serve`` turns it into a
process that answers lines. ``alternate`` starts one process a program and asks them by turns, so
that a machine whose speed drifts is as slow for one as for the other. ``short`` compares an LSTM
with PyTorch's in this way; the programs in benchmarks/ do it at length.
Imports NumPy, and in a worker what it measures.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np


def serve(answer: Callable[[str], float]) -> None:
    """Answer each line of standard input with a number, until there are no more."""
    print("ready", flush=True)
    for line in sys.stdin:
        print(answer(line.strip()), flush=True)


def alternate(
    commands: Mapping[str, Sequence[str]], questions: Sequence[str], turns: int = 7
) -> dict[str, dict[str, list[float]]]:
    """``{question: {program: [answers]}}``; a program that does not start is left out."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OPENBLAS_")}
    running = {}
    for name, command in commands.items():
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert process.stdin
        assert process.stdout
        if process.stdout.readline().strip() == "ready":
            running[name] = process
        else:
            print(f"{name} is not installed here and is left out")
    answers: dict[str, dict[str, list[float]]] = {}
    for question in questions:
        rows = answers[question] = {name: [] for name in running}
        for _ in range(turns):
            for name, process in running.items():
                assert process.stdin
                assert process.stdout
                process.stdin.write(question + "\n")
                process.stdin.flush()
                rows[name].append(float(process.stdout.readline()))
    for process in running.values():
        assert process.stdin
        process.stdin.close()
        process.wait()
    return answers


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """The median of their time over our time, turn by turn."""
    return median(a / b for a, b in zip(theirs, ours, strict=True))


def milliseconds(run: Callable[[], object], seconds: float = 0.3) -> float:
    """How long a run takes: the median of as many as fit in that time, at least five."""
    times: list[float] = []
    start = perf_counter()
    while len(times) < 5 or perf_counter() - start < seconds:
        before = perf_counter()
        run()
        times.append(perf_counter() - before)
    return median(times) * 1e3


# A short comparison --------------------------------------------------------------------------

SHORT_ROWS = ((8, 100, 32, 64), (32, 100, 64, 128), (32, 50, 256, 512))  # B T I H


def short() -> list[str]:
    """Lines of a table: milliseconds of LSTMs here and in PyTorch, if that is installed."""
    start = [sys.executable, "-W", "ignore", "-m", "tinygrad_seq", "bench", "--worker"]
    questions = [f"{mode} {k}" for mode in ("train", "infer") for k in range(len(SHORT_ROWS))]
    answers = alternate({name: [*start, name] for name in WORKERS}, questions, turns=5)
    lines = [f"{'LSTM, float32':24}{'here':>10}{'PyTorch':>10}   PyTorch / here"]
    for question in questions:
        mode, k = question.split()
        times = answers[question]
        line = f"{mode} B T I H = {' '.join(map(str, SHORT_ROWS[int(k)])):<14}"[:34]
        line = f"{line:<34}{median(times['here']):8.2f} ms"
        if "torch" in times:
            line += f"{median(times['torch']):8.2f} ms   {ratio(times['torch'], times['here']):.2f}"
        lines.append(line)
    return lines


def answer_short(program: str) -> None:
    """Be the worker for ``short``: time an LSTM of this program."""
    try:
        make = WORKERS[program]()
    except ModuleNotFoundError:
        return
    made: dict[str, Callable[[], object]] = {}

    def answer(question: str) -> float:
        mode, k = question.split()
        if question not in made:
            made[question] = make(mode == "train", SHORT_ROWS[int(k)])
            made[question]()
        return milliseconds(made[question])

    serve(answer)


def _data(row: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    (B, T, I, H), rng = row, np.random.default_rng(0)
    return rng.standard_normal((T, B, I), "f4"), rng.standard_normal((T, B, H), "f4")


def _run(layer: Any, x: Any, dy: Any, no_grad: Any) -> Callable[[], object]:
    """One training step, or with ``no_grad`` one use; layers of both programs are called alike."""

    def training() -> None:
        layer.zero_grad()
        layer(x)[0].backward(dy)

    return training if no_grad is None else no_grad()(lambda: layer(x))


def _here() -> Any:
    import tinygrad_seq as tgs

    def make(train: bool, row: tuple[int, ...]) -> Callable[[], object]:
        x, dy = map(tgs.tensor, _data(row))
        return _run(tgs.nn.LSTM(row[2], row[3]), x, dy, None if train else tgs.no_grad)

    return make


def _torch() -> Any:
    import torch  # type: ignore[import-not-found, unused-ignore]

    def make(train: bool, row: tuple[int, ...]) -> Callable[[], object]:
        x, dy = map(torch.tensor, _data(row))
        return _run(torch.nn.LSTM(*row[2:]), x, dy, None if train else torch.no_grad)

    return make


WORKERS = {"here": _here, "torch": _torch}
