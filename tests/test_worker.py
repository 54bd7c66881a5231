"""The process that compiles a share of what a first training step needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time

import pytest
from numba import config
from tinygrad_seq.kernels import machine, worker

compiling = pytest.mark.skipif(bool(config.DISABLE_JIT), reason="the compiler is switched off")

FIRST_STEP = """
import sys
import numpy as np
import tinygrad_seq as tgs
from tinygrad_seq.kernels import build, worker

ran_here = []
compiled = build.compiled

def watched(function, *given):
    from pathlib import Path
    if not build.Kept(Path(function.__code__.co_filename), function.__name__).path.is_file():
        ran_here.append(function.__name__)
    return compiled(function, *given)

build.compiled = watched
{prelude}
rng = np.random.default_rng(0)
W = tgs.tensor(rng.standard_normal((4, 4)), requires_grad=True)
x, h = rng.standard_normal((3, 2, 4)), rng.standard_normal((2, 4))

def cell(x, h):
    h = tgs.tanh(x + h @ W)
    return h, h

{long_cell}
found = []
for drive in (tgs.scan, tgs.unroll):
    ys, _ = drive(cell, x, h)
    tgs.sum(ys * ys).backward()
    found.append(W.grad.numpy().copy())
    W.grad = None
np.testing.assert_allclose(*found, rtol=1e-10)
print(*ran_here)
"""


def first_step(folder, prelude="", long_cell=""):
    """The names of the functions that a first step in an empty folder compiles itself."""
    done = subprocess.run(
        [sys.executable, "-c", FIRST_STEP.format(prelude=prelude, long_cell=long_cell)],
        env={**os.environ, "TINYGRAD_SEQ_CACHE": str(folder)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@compiling
@pytest.mark.skipif(machine.cores() < 2, reason="there is one core")
def test_a_first_step_has_a_share_compiled_by_a_worker(tmp_path):
    here = first_step(tmp_path)
    assert "forward" in here
    assert not {"backward", "outer", "serve"} & set(here)
    assert first_step(tmp_path) == []


@compiling
@pytest.mark.skipif(machine.cores() < 2, reason="there is one core")
def test_what_is_long_is_divided_later_too(tmp_path):
    first_step(tmp_path)
    long = "cell = lambda x, h, old=cell: old(tgs.sin(x), tgs.cos(h))"
    assert first_step(tmp_path, long_cell=long) == ["forward", "backward"]
    for folder in tmp_path.glob("_lambda_*"):
        shutil.rmtree(folder)
    assert first_step(tmp_path, "build.LONG = 100", long) == ["forward"]


@compiling
def test_a_first_step_without_a_worker(tmp_path):
    """One that comes to nothing: all is compiled here."""
    here = first_step(tmp_path, "worker.WORK = 'import sys; sys.exit(1)'")
    assert {"forward", "backward", "outer", "serve"} <= set(here)


@pytest.fixture
def alone():
    worker.end()
    yield
    worker.end()


def test_nobody_waits_for_what_no_worker_has(tmp_path, alone):
    begin = time.perf_counter()
    worker.wait(tmp_path / "kernel.py")
    assert time.perf_counter() - begin < 1


def test_a_worker_that_cannot_be_started_is_not_waited_for(tmp_path, alone, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    worker.begin([(tmp_path / "kernel.py", {"kernel": 1})])
    assert not worker._awaited
    assert not worker._process


def test_a_worker_that_hangs_is_stopped(tmp_path, alone, monkeypatch):
    monkeypatch.setattr(worker, "WORK", "import time; time.sleep(600)")
    monkeypatch.setattr(worker, "LONGEST", 0.3)
    worker.begin([(tmp_path / "kernel.py", {"kernel": 1})])
    (process,) = worker._process
    worker.wait(tmp_path / "kernel.py")
    assert process.wait(10) != 0
    assert not worker._awaited


def test_files_are_waited_for_one_by_one(tmp_path, alone, monkeypatch):
    files = [tmp_path / name for name in ("a.py", "b.py")]
    monkeypatch.setattr(worker, "WORK", "import time; print('\\n0', flush=True); time.sleep(600)")
    worker.begin([(file, {"kernel": 1}) for file in files])
    worker.wait(files[0])
    assert not worker._awaited[str(files[1])].is_set()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no process can fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_waits_for_no_worker(tmp_path, alone, monkeypatch):
    monkeypatch.setattr(worker, "WORK", "import time; time.sleep(600)")
    worker.begin([(tmp_path / "kernel.py", {"kernel": 1})])
    child = os.fork()
    if child == 0:
        worker.wait(tmp_path / "kernel.py")
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_inside_another_program_there_is_no_worker(monkeypatch):
    assert worker.possible()
    with monkeypatch.context() as frozen:
        frozen.setattr(sys, "frozen", True, raising=False)
        assert not worker.possible()
    monkeypatch.setenv(worker.INSIDE, "1")
    assert not worker.possible()
    monkeypatch.delenv(worker.INSIDE)
    for name in ("python", "python3.12", "python3.13t", "Python.exe", "pythonw.exe"):
        monkeypatch.setattr(sys, "executable", f"/bin/{name}")
        assert worker.possible()
    for executable in ("/usr/bin/uwsgi", "/opt/MyPythonApp", "pythonservice.exe", "", None):
        monkeypatch.setattr(sys, "executable", executable)
        assert not worker.possible()


def test_two_begin_at_once(tmp_path, alone, monkeypatch):
    """Both wait for the file that both want, whichever worker is done with it."""
    monkeypatch.setattr(worker, "WORK", "import time; time.sleep(1); print('\\n0', flush=True)")
    for _ in range(2):
        worker.begin([(tmp_path / "kernel.py", {"kernel": 1})])
    begin = time.perf_counter()
    worker.wait(tmp_path / "kernel.py")
    assert time.perf_counter() - begin < 20


def test_strange_places_to_import_from(tmp_path, alone, monkeypatch):
    """What is no text is left out, and nothing is imported from where one stands."""
    (tmp_path / "json.py").write_text("raise SystemExit")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, tmp_path])
    work = "import json, sys; json.load(sys.stdin); print('\\n0', flush=True); sys.stdin.read()"
    monkeypatch.setattr(worker, "WORK", work + "; import time; time.sleep(600)")
    worker.begin([(tmp_path / "kernel.py", {"kernel": 1})])
    worker.wait(tmp_path / "kernel.py")
    (process,) = worker._process
    assert process.poll() is None
