"""The examples of text, of sequence to sequence and of truncation, at a small size."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> dict:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


class TestCharacterModel:
    small = ("--characters", "80000", "--epochs", "2", "--hidden", "48", "--length", "50")

    def test_it_beats_pairs_of_characters_and_writes(self, capsys):
        found = example("character_model")["main"]([*self.small, "--prompt", "The class "])
        assert found["GRU"] < found["bigram"] - 0.2
        assert found["bigram"] < found["unigram"] < found["uniform"]
        shown = capsys.readouterr().out
        assert "80,000 characters" in shown
        written = shown.split("--- temperature 0.4 ---\n")[1].split("\n\n--- temperature")[0]
        assert written.startswith("The class ")
        assert len(written) == 60
        assert "characters a second" in shown

    def test_what_is_held_out_is_new(self):
        text = example("character_model")["documentation"]()
        paragraphs = [" ".join(p.split()) for p in text.split("\n\n")]
        assert len(text) > 200_000
        assert len(set(paragraphs)) == len(paragraphs)

    def test_baselines_against_counts(self):
        train, held_out = np.array([0, 1, 0, 1, 2]), np.array([0, 1, 2])
        found = example("character_model")["baselines"](train, held_out, 3)
        assert found["uniform"] == pytest.approx(np.log2(3))
        assert found["unigram"] == pytest.approx(-np.log2([3 / 8, 2 / 8]).mean())
        assert found["bigram"] == pytest.approx(-np.log2([3 / 5, 2 / 5]).mean())

    def test_somebodys_own_text(self, tmp_path, capsys):
        main, path = example("character_model")["main"], tmp_path / "mine.txt"
        path.write_text("höher und weiter, " * 700, encoding="utf-8")
        own = ["--text", str(path), "--hidden", "16", "--length", "9"]
        found = main([*own, "--epochs", "40", "--prompt", "weiter"])
        assert found["GRU"] < 0.5 < found["bigram"]
        assert "weiter, höher u\n" in capsys.readouterr().out
        for wrong, words in (
            (["--prompt", "Zeit"], "'Z' was given at place 0"),
            (["--characters", "500", "--prompt", "h"], "a series of 450 makes 32 streams"),
        ):
            with pytest.raises(SystemExit):
                main([*own, *wrong])
            assert words in capsys.readouterr().err


class TestWrittenDates:
    def test_it_reads_dates(self, tmp_path, capsys):
        pytest.importorskip("matplotlib")
        path = tmp_path / "attention.png"
        small = ["--dates", "5000", "--held-out", "100", "--epochs", "3", "--output", str(path)]
        found = example("written_dates")["main"](small)
        assert found["all"] > 0.85
        assert found["greedy"] == found["all"]  # there are fewer than 200
        assert found["beam"] >= found["greedy"] - 0.02
        assert "Sunday, May 3rd, 1987: 1987-0" in capsys.readouterr().out
        assert path.stat().st_size > 10_000

    def test_a_date_of_unknown_characters(self, capsys):
        with pytest.raises(SystemExit):
            example("written_dates")["main"](["--date", "1987年5月3日"])
        assert "'年' was given at place 4" in capsys.readouterr().err


class TestTruncation:
    def test_what_the_error_reaches_is_learned(self, tmp_path, capsys):
        pytest.importorskip("matplotlib")
        path = tmp_path / "truncation.png"
        small = ["--distances", "4", "--batches", "25", "--output", str(path)]
        found = {name: row[4] for name, row in example("truncation")["main"](small).items()}
        assert found["k1 = 64, k2 = 4"] < 0.6
        assert min(found["whole"], found["k1 = 64, k2 = 16"], found["k1 = 16, k2 = 32"]) > 0.9
        shown = capsys.readouterr().out
        assert "k1 = 64, k2 = 8            " in shown
        assert "0.25 is chance" in shown
        assert "the time is that of all models of a row" in shown
        assert path.stat().st_size > 10_000

    def test_a_stream(self):
        """What is asked is the symbol at the last mark, d steps before."""
        module, rng = example("truncation"), np.random.default_rng(0)
        inputs, targets = module["stream"]([3, 5], 50, rng)
        symbols, marked, asked = inputs[..., :4].argmax(axis=-1), inputs[..., 4], inputs[..., 5]
        assert (inputs[..., :4].sum(axis=-1) == 1).all()
        distances = set()
        for b in range(50):
            last = None
            for t in range(64):
                expected = -1
                if asked[t, b] and last is not None:
                    expected = symbols[last, b]
                    distances.add(t - last)
                assert targets[t, b] == expected
                last = t if marked[t, b] else last
        assert distances == {3, 5}

    @pytest.mark.parametrize("setting", [(64, 8), (64, 64), (8, 8), (8, 20), (16, 24)])
    def test_how_many_are_reached(self, setting):
        """Against one step after another; the error of a step never leaves its piece."""
        k1, k2 = setting
        reached = []
        for t in range(5, 64):
            end = (t // k1 + 1) * k1
            pieces = range(end - k1, end, k2) if k2 < k1 else [end - k2]
            reached.append(t - 5 >= max(s for s in pieces if s <= t))
        assert example("truncation")["Setting"](k1, k2).reached(5) == np.mean(reached)
