"""Cells of random operations, and the built-in ones with random options, in the simulator.

The cells of ``random_cells.py`` and ``cell_options.py``; what ran compiled on the host there runs
as simulated kernels here, divided among blocks at random.
"""

from __future__ import annotations

import cell_options
import numpy as np
import pytest
import random_cells

from tinygrad_seq.recurrence import choices, compiled

pytest.importorskip("numba_cuda")

from tinygrad_seq.kernels import cuda, cuda_build


@pytest.fixture(autouse=True)
def on_simulated_kernels(monkeypatch):
    if not cuda_build.SIMULATED:
        pytest.skip("kernels read the host's memory in the simulator alone")

    def new_runner(step, needs, name, x):
        plan = compiled.plan_of(step, needs, name, cuda=True)
        texts = {op: (rule.inputs, rule.text) for op, rule in compiled.RULES.items()}
        return cuda.Runner(plan, texts, np)

    monkeypatch.setattr(compiled, "_new_runner", new_runner)
    monkeypatch.setattr(compiled, "_runners", {})
    monkeypatch.setattr(choices, "UNIT_BY_UNIT", [])


@pytest.mark.parametrize("seed", range(100, 112))
def test_random_cells(seed, divided):
    assert random_cells.compare(seed) is None


@pytest.mark.parametrize("seed", range(6))
def test_random_options(seed, divided):
    assert cell_options.compare(seed) is None
