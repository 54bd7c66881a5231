"""Examples that put models and cells to tasks, at a small size."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def main(name: str):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def test_digits_by_pixel(tmp_path, capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    picture = tmp_path / "digits.png"
    small = ["--digits", "500", "--hidden", "32", "--epochs", "16", "--output", str(picture)]
    found = main("digits_by_pixel")(small)
    assert found["reader, test images"] > 0.5  # 0.1 by chance
    assert found["nearest neighbour, test images"] > 0.9
    assert found["artist's nats"] < found["nats by place"] - 0.05
    assert 0 <= found["drawn, and read as asked"] <= 1  # more takes more training
    assert picture.stat().st_size > 5_000
    shown = capsys.readouterr().out
    assert "375 digits to learn from, 125 held out" in shown
    assert "norm of the gradient before it is clipped to 1" in shown
    assert "share that is right, by digit" in shown
    with pytest.raises(SystemExit):
        main("digits_by_pixel")(["--digits", "10"])
    assert "400 or more" in capsys.readouterr().err


def test_who_can_do_what(capsys):
    small = ["--examples", "750", "--epochs", "5", "--parameters", "1000"]
    scores, contradicted = main("who_can_do_what")(["--tasks", "order", "sum", *small])
    shown = capsys.readouterr().out
    assert "dense, padded  no      " in shown
    assert "without the ability" + " " * 20 + "0.50" in shown
    by_order = {name: row["30"] for name, row in scores.items()}
    for name in ("dense, padded", "RNN", "LSTM", "GRU"):  # 0.5 by chance
        assert by_order[name] > 0.8, name
    for name in ("dense, window", "convolution"):  # both symbols are seldom within 5 steps
        assert 0.6 < by_order[name] < 0.9, name
    assert by_order["memoryless"] < 0.65
    lengths = {name: row["31-60"] for name, row in scores.items()}
    assert math.isnan(lengths["dense, padded"])  # too long for it
    assert min(lengths["LSTM"], lengths["GRU"]) > 0.8
    assert "dilated (2) order" in contradicted
    assert "with difficulty -> yes" in shown


def test_own_cell(capsys):
    found = main("own_cell")(["--steps", "20", "--repeats", "2", "--epochs", "4"])
    assert found["gradient error"] < 1e-6
    losses = {name: loss for name, (_, loss) in found["speed"].items()}
    for cell in ("this cell", "nn.LSTMCell"):
        assert losses[f"{cell}, tgs.scan"] == pytest.approx(losses[f"{cell}, tgs.unroll"], rel=1e-4)
    assert found["right"]["this cell"] > 0.9  # 0.25 by chance, 0.75 by counting alone
    shown = capsys.readouterr().out
    for part in (
        "def forward",
        "softplus(",
        "in the loop:",
        "for j in range(",
        "inputs and state: True",
    ):
        assert part in shown, part
