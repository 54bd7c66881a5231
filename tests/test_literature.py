"""Cells of the literature, as the benchmark has them."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def literature(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return runpy.run_path(str(BENCHMARKS / "literature.py"))


@pytest.mark.parametrize("name", ["clockwork", "slstm", "graph_gru"])
def test_a_cell_is_the_same_compiled(literature, name):
    assert 0 < literature["difference"](name) < 1e-13


def test_every_cell_says_where_it_is_from(literature):
    cells = literature["CELLS"]
    assert all(kind.source.split()[-1].isdigit() for kind in cells.values())
    written = (BENCHMARKS / "results/literature.md").read_text(encoding="utf-8")
    assert [line.split(" | ")[0][2:] for line in written.splitlines() if "e-1" in line] == [*cells]
