"""The examples on long range and memory, and the benchmark of published results, in small."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


def main_of(name: str):
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"))["main"]


def test_long_range(tmp_path, capsys):
    """Short sums are learned, gradients fade and grow as they must, clipping saves a run."""
    pytest.importorskip("matplotlib")
    picture = tmp_path / "long_range.png"
    small = "--steps 6 60 --delays 2 --updates 120 --output".split()
    found = main_of("long_range")([*small, str(picture)])

    losses = found["losses"]
    assert len(losses) == 3 * 5
    assert np.isfinite(list(losses.values())).all()
    assert losses["adding", 6, "GRU"] < 0.5 / 6
    assert losses["adding", 6, "LSTM"] < 0.5 / 6
    assert losses["adding", 60, "RNN"] > 0.8 / 6

    before = found["before"]
    assert all(flow.shape == (60,) and flow[-1] == 1 for flow in before.values())
    assert before["RNN"][0] < 1e-2
    assert before["IRNN"][0] > 0.3
    assert before["LSTM, chrono"][0] > 5 * before["LSTM"][0]
    factors = [flow[0] for flow in found["exploding"].values()]
    assert factors == sorted(factors)
    assert factors[0] < 1
    assert factors[-1] > 100
    runs = {name: np.mean(run[-50:]) for name, run in found["clipping"].items()}
    assert runs["norm"] < 0.8 * np.log(4)
    assert runs["nothing"] > 1.2 * runs["norm"]

    shown = capsys.readouterr().out
    assert "of adding the squared error" in shown
    assert "no memory             0.1667      0.1667      0.9452" in shown
    assert f"becomes, by what is clipped, {runs['norm']:.4f} (norm), " in shown
    assert f"{runs['each element']:.4f} (each element)" in shown
    assert picture.stat().st_size > 10_000
    assert (tmp_path / "long_range_gates.png").stat().st_size > 10_000


def test_matrix_memory(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "matrix_memory.png"
    small = ["--pairs", "3", "16", "--updates", "180", "--output", str(path)]
    found = main_of("matrix_memory")(small)
    assert found["matrix, delta"][16] > 0.9 > 0.3 > found["LSTM"][16]
    assert path.is_file()
    assert "matrix, delta          3,633" in capsys.readouterr().out
    found = main_of("matrix_memory")("--pairs 2 --updates 2 --rule sum --no-plot".split())
    assert [*found] == ["LSTM", "GRU", "matrix, sum"]
    module = runpy.run_path(str(ROOT / "examples" / "matrix_memory.py"))
    assert module["MatrixMemory"](4, 3).to("float64").initial_state(2).dtype == np.float64


class TestPublished:
    @pytest.fixture
    def published(self, monkeypatch):
        monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
        return runpy.run_path(str(ROOT / "benchmarks" / "published.py"))

    def test_all_parts_and_one_again(self, published, tmp_path):
        path = tmp_path / "published.md"
        small = "--steps 12 --hidden 4 --batch 2 --seeds 2 --output".split()
        published["main"](["--updates", "8", *small, str(path)])
        first = path.read_text(encoding="utf-8").split("\n## ")
        assert [text.split(",")[0] for text in first[1:]] == [
            "The adding problem",
            "Copy memory",
            "Temporal order",
        ]
        assert "| after 1 | after 2 | after 4 | after 6 | after 8 |" in first[1]
        assert "| 12 | *knows nothing* | 0.6498 |" in first[2]
        assert "`--parts copy --updates 8 --steps 12 --hidden 4 --batch 2 --seeds 2`" in first[2]

        published["main"](["--parts", "copy", "--minutes", "0", *small, str(path)])
        second = path.read_text(encoding="utf-8").split("\n## ")
        assert [second[0], second[1], second[3]] == [first[0], first[1], first[3]]
        assert "--parts copy --updates 25 " in second[2]

    def test_who_has_solved_it_stops_and_who_is_lost(self, published):
        easy = published["PARTS"]["adding"]._replace(
            hidden=8, batch=8, seeds=1, steps=(2,), solved=0.9
        )
        easy = easy._replace(variants={"GRU": easy.variants["GRU"]})
        runs, updates = published["train"](easy, 0.0, 400)
        (run,) = runs[2, "GRU"]
        assert run.solved
        assert 100 <= len(run.losses) <= updates < 400
        assert run.loss_after(400) == np.mean(run.losses[-100:])
        assert "1 of 1, after" in published["table"](easy, runs, updates)[-1]

        run = published["Run"](easy, easy.variants["GRU"], 2, 0)
        run.head.bias.data = run.head.bias.data + np.float32(1e30)
        with np.errstate(all="ignore"):
            run.go_on(5)
        assert run.broken
        assert len(run.losses) == 1
        assert "not finite: 1, after 1" in published["table"](easy, {(2, "GRU"): [run]}, 8)[-1]
