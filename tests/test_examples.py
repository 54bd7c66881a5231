"""The examples at a small size, and the forecast at its own."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> dict:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_every_example_is_tested():
    texts = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_ex*.py")]
    for path in EXAMPLES.glob("*.py"):
        assert any(f'"{path.stem}"' in text for text in texts), path.stem


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("four_steps", ["--epochs", "0"], "--epochs is 1 or more"),
        ("own_cell", ["--repeats", "0"], "--repeats and --epochs are 1 or more"),
        ("own_cell", ["--steps", "9"], "--steps 10 or more"),
        ("long_range", ["--updates", "0"], "--updates is 1 or more"),
        ("character_model", ["--prompt", ""], "--prompt is one character or more"),
        ("written_dates", ["--date", ""], "--date is one character or more"),
    ],
)
def test_what_would_fail_at_the_end_is_refused_at_once(name, arguments, words, capsys):
    with pytest.raises(SystemExit):
        example(name)["main"](arguments)
    assert words in capsys.readouterr().err


def test_four_steps(capsys):
    by_hand, with_fit = example("four_steps")["main"](["--epochs", "3"])
    assert by_hand == with_fit
    assert by_hand[-1] < 0.3 * by_hand[0]
    assert "epoch 2: loss" in capsys.readouterr().out


def test_read_the_tape(capsys):
    shared, by_step = example("read_the_tape")["main"]()
    np.testing.assert_allclose(shared, by_step.sum(axis=0), rtol=1e-12)
    assert (by_step[0] == 0).all()
    shown = capsys.readouterr().out
    assert "linear(%0, %1)" in shown
    assert "linear(x, W) is x Wᵀ" in shown
    assert "gradcheck: True" in shown


def test_pictures(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    written = example("pictures")["main"](["--output", str(tmp_path), "--batches", "2"])
    assert len(written) == 16
    assert all(path.stat().st_size > 10_000 for path in written)
    shown = capsys.readouterr()
    assert "of the last flagged symbols right" in shown.out
    assert "2/2" in shown.err  # the progress bar


class TestForecast:
    main = staticmethod(example("temperature_forecast")["main"])

    def test_the_lstm_beats_what_it_must(self, tmp_path, capsys):
        """The figures that are known for this series, and the bar, over five seeds."""
        pytest.importorskip("matplotlib")
        picture = tmp_path / "forecast.png"
        errors = self.main(["--output", str(picture)])
        at_one = {name: row[0] for name, row in errors.items()}
        assert at_one["persistence"] == pytest.approx(1.17, abs=0.005)
        assert at_one["climatology"] == pytest.approx(0.775, abs=0.005)
        assert at_one["AR(12)"] == pytest.approx(0.513, abs=0.005)
        assert at_one["AR(12) on anomalies"] == pytest.approx(0.455, abs=0.005)
        assert at_one["LSTM"] < min(
            at_one[name] for name in ("persistence", "climatology", "AR(12)", "dense network")
        )
        shown = capsys.readouterr().out
        assert "median of 5 seeds" in shown
        best = min(at_one, key=at_one.get)
        assert f"One step ahead the best is: {best}." in shown
        assert picture.stat().st_size > 10_000

    @pytest.mark.parametrize("cell", ["rnn", "gru"])
    def test_other_cells(self, cell, capsys):
        errors = self.main(
            ["--cell", cell, "--seeds", "1", "--epochs", "1", "--seed", "3", "--no-plot"]
        )
        assert all(np.isfinite(row).all() for row in errors.values())
        assert cell.upper() in capsys.readouterr().out

    def test_somebodys_own_series(self, tmp_path, capsys):
        path = tmp_path / "mine.csv"
        t = np.arange(200)
        rows = [f"{k},{np.sin(0.5 * k) + 0.01 * k:.6f},x" for k in t]
        path.write_text("\n".join(["k,level,note", *rows]), encoding="utf-8")
        small = ["--seeds", "1", "--epochs", "1", "--no-plot", "--held-out", "30"]
        self.main(["--csv", str(path), "--column", "level", "--period", "1", *small])
        shown = capsys.readouterr().out
        assert "200 rows, a season of 1, the last 30 held out" in shown
        assert "RMSE in level over the last 30" in shown
        for wrong, words in (
            (["--csv", str(path), "--column", "depth"], "no column 'depth'"),
            (["--csv", str(path), "--column", "note"], "column 'note' holds 'x'"),
            (["--csv", str(tmp_path / "none.csv")], "No such file"),
            (["--period", "0"], "1 or more"),
        ):
            with pytest.raises(SystemExit):
                self.main([*wrong, *small])
            assert words in capsys.readouterr().err
        with pytest.raises(SystemExit, match="are needed to train"):
            self.main(["--csv", str(path), "--column", "level", "--held-out", "150"])
