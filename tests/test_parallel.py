"""Work in blocks on several threads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinygrad_seq as tgs
from tinygrad_seq import parallel
from tinygrad_seq.parallel import in_blocks


@given(count=st.integers(0, 40), size=st.integers(1, 50))
def test_each_row_is_done_once(count, size):
    done = np.zeros(count, int)

    def work(low, high):
        assert 0 < high - low <= size
        done[low:high] += 1

    in_blocks(work, count, size)
    assert (done == 1).all()


def test_an_error_comes_back_when_nobody_works_any_more():
    inside, most = [], []

    def work(low, high):
        inside.append(low)
        most.append(threading.current_thread().name)
        try:
            if low == 3:
                raise ValueError("the fourth")
        finally:
            inside.remove(low)

    with pytest.raises(ValueError, match="the fourth"):
        in_blocks(work, 64, 1)
    assert not inside


def test_all_is_done_where_the_system_gives_one_thread_and_no_more(monkeypatch):
    start, begun = threading.Thread.start, threading.Event()
    started: list[str] = []

    def once(thread):
        started.append(thread.name)
        if len(started) > 1:
            raise RuntimeError("can't start new thread")
        start(thread)
        begun.wait(10)

    monkeypatch.setattr(parallel, "_helpers", None)
    monkeypatch.setattr(parallel, "_threads", lambda: 4)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(threading.Thread, "start", once)
    done = np.zeros(64, int)

    def work(low, high):
        begun.set()
        if threading.current_thread().name in started:
            time.sleep(0.2)
        done[low:high] += 1

    in_blocks(work, 64, 1)
    assert len(started) == 2
    assert (done == 1).all()


def test_what_numpy_is_to_say_holds_for_every_thread(rng):
    x = np.full(64, 1e30, np.float32)
    with np.errstate(over="raise"), pytest.raises(FloatingPointError):
        in_blocks(lambda low, high: np.square(x[low:high]), 64, 1)
    with np.errstate(over="ignore"):
        in_blocks(lambda low, high: np.square(x[low:high]), 64, 1)


def test_when_the_interpreter_goes_down():
    script = (
        "import atexit, numpy as np, tinygrad_seq as tgs\n"
        "a = tgs.tensor(np.ones((800, 300), 'f4'))\n"
        "atexit.register(lambda: print(float((a @ a.T).sum())))\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == str(800.0 * 800 * 300)
    assert not done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_multiplies_too(rng):
    a = tgs.tensor(rng.standard_normal((800, 300)))
    expected = (a @ a.T).numpy()
    child = os.fork()
    if not child:
        os._exit(0 if np.array_equal((a @ a.T).numpy(), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
