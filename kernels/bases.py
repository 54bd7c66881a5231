"""Bases: what words are counted from and is known only when a run begins.

A layout knows them by name, a run gives their numbers, each of these lists of numbers in the order
of the names above it: first those that every run has anew, then those of its inputs, then those of
one direction. An array (T, B, n) of the caller is three, its address and its first two strides.
Imports memory, program and NumPy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from tinygrad_seq.kernels.memory import address

from tinygrad_seq.program import Plan

Array = np.ndarray


def names(plan: Plan, direction: str, captured: int) -> list[str]:
    """All bases of a direction, for a cell that closes over so many arrays."""
    of_direction = _forward_names(plan) if direction == "forward" else _backward_names(plan)
    return [*RUN_NAMES, *_input_names(plan, captured), *of_direction]


def strided(name: str) -> list[str]:
    """The words of an array (T, B, n) of the caller."""
    return [name, f"{name}_t", f"{name}_b"]


def _all_strided(name: str, count: int) -> Iterable[str]:
    return (word for k in range(count) for word in strided(f"{name}{k}"))


def _all(name: str, count: int) -> Iterable[str]:
    return (f"{name}{k}" for k in range(count))


RUN_NAMES = ["", "work block", "kept block", "edges"]  # no base: the word is a number
RUN_NAMES += ["batch", "begin", "active", "active_bytes", "k0"]


def of_run(work: int, kept: int, edges: Array, rows: tuple[int, ...]) -> list[int]:
    """Addresses of blocks of memory, of edges of tasks and of ``Rows``; the first step is 0."""
    return [0, work, kept, address(edges), *rows, 0]


def _input_names(plan: Plan, captured: int) -> list[str]:
    seeds, xs = (sum(row.op == op for row in plan.rows) for op in ("uniform", "x"))
    arrays = *_all_strided("x", xs), *_all("capture", captured)
    return ["numbers", "resets", *_all("seed", seeds), *arrays]


def of_inputs(
    numbers: Array,
    resets: Array | None,
    seeds: Sequence[int],
    xs: Sequence[Array],
    captured: Sequence[Array],
) -> list[int]:
    made = [address(numbers), 0 if resets is None else address(resets), *seeds]
    for x in xs:
        made += address(x), *x.strides[:2]
    return made + [address(array) for array in captured]


def _forward_names(plan: Plan) -> list[str]:
    states, ys = len(plan.state_slots), len(plan.y_slots)
    made = [*_all("reset", states), *_all("initial", states), *_all("last", states)]
    return [*made, "every", *_all("checkpoint", states), "T", *_all_strided("y", ys)]


def of_forward(
    reset_states: Sequence[Array],
    states: Sequence[Array],
    last: Sequence[Array],
    ys: Sequence[Array],  # (T, B, n), or (B, n) for all steps
    T: int = 0,
    every: int = 0,
    saved: Sequence[Array] = (),
) -> list[int]:
    """``every`` so many steps states are saved; arrays are zeroed up to step T."""
    initial = [address(state) for state in states]
    resets = initial if reset_states is states else [address(state) for state in reset_states]
    made = resets + initial + [address(state) for state in last]
    made += [every, *map(address, saved)] if saved else [0] * (1 + len(last))
    made.append(T)
    for y in ys:
        made += address(y), *(y.strides[:2] if y.ndim == 3 else (0, y.strides[0]))
    return made


def _backward_names(plan: Plan) -> list[str]:
    states, ys, xs = len(plan.state_slots), len(plan.y_slots), len(plan.gradients.dx)
    made = [*_all("dlast", states), *_all_strided("dy", ys), "T"]
    made += [*_all_strided("dx", xs), *_all_strided("total", states)]
    return [*made, *(f"outer_m{k}_out" for k in range(len(plan.gradients.outer)))]


def of_backward(
    dlast: Sequence[Array | None],
    dys: Sequence[Array],
    T: int,
    made: Iterable[Array | None],
    outs: Sequence[Array],
) -> list[int]:
    """``made``: gradients of inputs, and of states at each step; None where nothing is wanted."""
    found = [0 if state is None else address(state) for state in dlast]
    for dy in dys:
        found += address(dy), *dy.strides[:2]
    found.append(T)
    for array in made:
        found += (0, 0, 0) if array is None else (address(array), *array.strides[:2])
    found += map(address, outs)
    return found
