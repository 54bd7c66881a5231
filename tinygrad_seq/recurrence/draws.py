"""Random numbers inside a cell: the same in ``unroll``, in ``scan`` and when a step is repeated.

A draw is keyed by the seed of its operation, drawn anew in each call of a driver, by the number of
the operation in the cell, and by step, row and column. Imports the engine and philox.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from math import pi, prod
from typing import Any

import numpy as np

from tinygrad_seq.creation import Rng, new_seed
from tinygrad_seq.elementwise import cos, log, sqrt
from tinygrad_seq.errors import TraceError
from tinygrad_seq.kernels import philox
from tinygrad_seq.tape import recording
from tinygrad_seq.tensors import Tensor, wrap


class Source(ABC):
    """Where the random numbers of a cell come from."""

    @abstractmethod
    def uniform(self, shape: tuple[int, ...], rng: Rng, per_sequence: bool = False) -> Tensor:
        """Numbers from 0 up to 1 for the next operation; axis 0 are the rows of the batch."""

    def normal(self, shape: tuple[int, ...], rng: Rng, per_sequence: bool = False) -> Tensor:
        """Standard normal numbers: √(−2 ln(1 − u)) cos(2π v)."""
        u, v = self.uniform(shape, rng, per_sequence), self.uniform(shape, rng, per_sequence)
        return sqrt(log(1.0 - u) * -2.0) * cos(v * (2 * pi))


def drawn(seed: int, operation: int, step: int, shape: tuple[int, ...], dtype: Any) -> Tensor:
    """The numbers of one operation at one step."""
    rows = shape[0] if shape else 1
    values = philox.uniform(seed, operation, step, rows, prod(shape[1:]))
    return wrap(values.reshape(shape).astype(dtype), None)


class Draws(Source):
    """What a cell draws while its steps run one after another."""

    def __init__(
        self, dtype: np.dtype[Any], seeds: list[int] | None = None, device: str = "cpu"
    ) -> None:
        self.dtype, self.device = dtype, device
        self.seeds = [] if seeds is None else seeds  # of each operation that draws at every step
        self.held: list[Tensor] = []  # what operations drew that draw once
        self.step = self.operation = self.held_operation = 0

    def begin(self, step: int) -> None:
        self.step, self.operation, self.held_operation = step, 0, 0

    def uniform(self, shape: tuple[int, ...], rng: Rng, per_sequence: bool = False) -> Tensor:
        if per_sequence:
            k, self.held_operation = self.held_operation, self.held_operation + 1
            if k == len(self.held):
                self.held.append(self._drawn(new_seed(rng), 0, 0, shape))
            return self.held[k]
        k, self.operation = self.operation, self.operation + 1
        if k == len(self.seeds):
            self.seeds.append(new_seed(rng))
        return self._drawn(self.seeds[k], k, self.step, shape)

    def _drawn(self, seed: int, operation: int, step: int, shape: tuple[int, ...]) -> Tensor:
        return drawn(seed, operation, step, shape, self.dtype).to(self.device)


def check_drawn_anew(outer: Any, driver: str) -> None:
    """Raise a TraceError if what drew random numbers runs once, while an outer cell is traced."""
    if outer is not None:
        raise TraceError(
            f"{driver}: random numbers are drawn inside a cell that is traced itself, where they "
            "would be the same at every step; draw them in the outer cell, or run that with "
            "tgs.unroll"
        )


@contextmanager
def drawing(source: Source) -> Iterator[None]:
    """Let ``rand`` and what is made of it take their numbers from there."""
    recording.draws, outer = source, recording.draws
    try:
        yield
    finally:
        recording.draws = outer
