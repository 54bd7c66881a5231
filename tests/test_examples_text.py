"""Examples about text and long sequences, at a small size."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def main(name: str):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def test_character_model(capsys):
    small = ["--characters", "60000", "--hidden", "64", "--epochs", "2", "--length", "30"]
    found = main("character_model")(small)
    assert found["GRU"] < min(found["uniform"], found["unigram"])
    shown = capsys.readouterr().out
    assert "characters a second" in shown
    assert shown.count("The statement ") >= 3
    with pytest.raises(SystemExit):
        main("character_model")(["--characters", "60000", "--prompt", "\u2603"])
    assert "is not among the vocabulary's" in capsys.readouterr().err


def test_written_dates(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "dates.png"
    small = ["--dates", "2000", "--held-out", "60", "--epochs", "6", "--output", str(picture)]
    found = main("written_dates")(small)
    assert found["all"] > 0.05  # once in 73,049 times by chance
    assert found["beam"] >= found["greedy"] - 0.1
    assert "Sunday, May 3rd, 1987: " in capsys.readouterr().out
    assert picture.stat().st_size > 5_000


def test_truncation(capsys):
    found = main("truncation")(["--distances", "4", "--batches", "25", "--no-plot"])
    reached = [row[4] for name, row in found.items() if name.startswith("whole")]
    assert max(reached) > 0.5  # 0.25 by chance
