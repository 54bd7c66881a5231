"""``python -m tinygrad_seq``: what its commands print."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from tinygrad_seq.kernels import build

import tinygrad_seq as tgs
from tinygrad_seq import __main__ as commands
from tinygrad_seq import comparing


def test_cache_shows_and_clears(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TINYGRAD_SEQ_CACHE", str(tmp_path))
    commands.main(["cache"])
    assert capsys.readouterr().out == f"0 entries, 0.0 of 256 MiB, in {tmp_path}\n"
    source = tgs.kernel_source(tgs.nn.RNNCell(2, 3), np.zeros((2, 2, 2), "f4"))
    commands.main(["cache", "show"])
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 2
    assert shown[0].startswith(source.path.parent.name)
    assert shown[1].startswith("1 entries")
    commands.main(["cache", "clear"])
    assert capsys.readouterr().out == f"1 entries deleted from {tmp_path}\n"
    assert not source.path.exists()


def test_clear_says_what_it_could_not_delete(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TINYGRAD_SEQ_CACHE", str(tmp_path))
    build.write_module("nothing", "x = 1\n")
    monkeypatch.setattr(build.shutil, "rmtree", lambda *_, **__: None)  # as where one may not write
    with pytest.raises(SystemExit, match="1 entries could not be deleted"):
        commands.main(["cache", "clear"])
    assert capsys.readouterr().out.startswith("0 entries deleted")


def test_warmup_compiles_what_layers_use(capsys, monkeypatch):
    cell = tgs.nn.RNNCell(3, 4)
    monkeypatch.setattr(commands, "_built_in", lambda dtype: iter([("RNNCell", cell)]))
    commands.main(["warmup"])
    assert capsys.readouterr().out.startswith("RNNCell ")
    monkeypatch.setattr(build, "load", lambda *_, **__: pytest.fail("something is compiled"))
    layer = tgs.nn.RNN(5, 6, num_layers=2)
    layer(np.zeros((3, 2, 5), "f4"))[0].sum().backward()


def test_bench_compares_two_programs(monkeypatch, capsys):
    asked = []

    def alternate(programs, questions, turns):
        asked.extend(questions)
        return {q: {"here": [1.0, 2.0, 4.0], "torch": [3.0, 4.0, 5.0]} for q in questions}

    monkeypatch.setattr(comparing, "alternate", alternate)
    commands.main(["bench"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(asked)
    assert lines[1].endswith("2.00 ms    4.00 ms   2.00")


def test_a_bench_worker_answers(monkeypatch):
    answers = []
    monkeypatch.setattr(comparing, "SHORT_ROWS", ((2, 3, 4, 5),))
    monkeypatch.setattr(comparing, "serve", lambda answer: answers.append(answer("train 0")))
    commands.main(["bench", "--worker", "here"])
    assert answers[0] > 0


def test_who_reads_the_output_may_have_enough():
    code = f"{sys.executable} -m tinygrad_seq cache | true"
    found = subprocess.run(["sh", "-c", code], capture_output=True, text=True, check=True)
    assert found.stderr == ""


def test_unknown_commands():
    with pytest.raises(SystemExit):
        commands.main(["cache", "burn"])
