"""PyTorch as a second opinion, where it is installed: ``pip install torch``."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
pytest.importorskip("torch", reason="PyTorch is not installed; it is an optional second opinion")
agreement = runpy.run_path(str(BENCHMARKS / "agreement.py"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, about NumPy 2
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_layers_agree(kind, both):
    for shape in ((4, 3, 2, 5), (1, 1, 1, 1), (9, 2, 3, 4)):
        assert agreement["compare"](kind, shape, 2, both) < 1e-9


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_weights_are_taken_over(capsys):
    """As docs/pytorch.md has it."""
    text = (BENCHMARKS.parent / "docs" / "pytorch.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    exec(code, {})
    assert capsys.readouterr().out == "RNN True\nLSTM True\nGRU True\n"


def test_a_small_operation_costs_no_more():
    """The better of three runs: one may meet a busy machine."""
    for _ in range(3):
        command = [sys.executable, str(BENCHMARKS / "eager.py")]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        ratios = [float(line.split()[-1]) for line in out.splitlines()]
        assert len(ratios) == 2
        if min(ratios) >= 1:
            return
    raise AssertionError(out)
