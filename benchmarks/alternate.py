"""Run programs by turns, each in a process of its own, and compare them turn by turn.

A worker is a function that takes a line of text and returns a number; ``serve`` turns it into a
process that answers lines. ``alternate`` starts one process a program and asks them by turns, so
that a machine whose speed drifts is as slow for one as for the other.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from statistics import median


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
