"""A second process that compiles some of what the first training step of all needs.

Numba compiles one function after another, whatever the number of cores. Where nothing is kept yet,
some of what a step needs is therefore compiled by a worker, which leaves it where kernels are kept
(``build.py``); who needs it waits for it there. If a worker cannot be started, or does not do what
it was asked for, everything is compiled where it is needed, as ever.
Imports nothing of this package.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

LONGEST = 30.0  # seconds that anybody waits for a sign of it, and a millisecond for each byte
WORK = """
import json, sys
given = json.load(sys.stdin)
sys.path[:] = given["path"]
from tinygrad_seq.kernels import build
build.work_on(given["modules"])
"""
PYTHON = re.compile(r"python[\d.]*[a-z]?(-dbg)?(\.exe)?")
INSIDE = "TINYGRAD_SEQ_WORKER"  # set in a worker, which has none of its own

Modules = Sequence[tuple[Path, Mapping[str, int]]]
_awaited: dict[str, threading.Event] = {}
_process: list[subprocess.Popen[str]] = []


def possible() -> bool:
    """Whether there is a Python that it can run in; inside another program there may be none."""
    name = Path(sys.executable or "").name.lower()
    inside = INSIDE in os.environ or getattr(sys, "frozen", False)
    return PYTHON.fullmatch(name) is not None and not inside


def begin(modules: Modules) -> None:
    """Have the functions of these files compiled, in this order; see ``build.load``."""
    given = {
        "path": [place for place in sys.path if isinstance(place, str)],
        "modules": [(str(path), dict(functions)) for path, functions in modules],
    }
    text = json.dumps(given)
    events = [_awaited.setdefault(str(path), threading.Event()) for path, _ in modules]
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", WORK],  # nothing is imported from where one stands
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, INSIDE: "1"},
        )
        _process.append(process)
        follow = threading.Thread(target=_follow, args=(process, text, events), daemon=True)
        follow.start()
    except (OSError, RuntimeError, ValueError):  # no process or thread is to be had
        end()


def _follow(process: subprocess.Popen[str], given: str, events: list[threading.Event]) -> None:
    """Tell those who wait what is done, by number; at the end, that all is."""
    with process, suppress(OSError, ValueError):
        assert process.stdin
        assert process.stdout
        process.stdin.write(given)
        process.stdin.close()
        for line in process.stdout:
            if line.strip().isdecimal() and int(line) < len(events):
                events[int(line)].set()
    for event in events:
        event.set()


def wait(path: Path) -> None:
    """Until the worker, if it is to compile this file, has done so or is not there any more."""
    event = _awaited.get(str(path))
    while event is not None and not event.is_set():
        before, size = _done(), 0
        with suppress(OSError):
            size = path.stat().st_size
        if not event.wait(LONGEST + size / 1000) and _done() == before:
            end()


def _done() -> int:
    return sum(event.is_set() for event in list(_awaited.values()))


def end() -> None:
    """Stop the worker; what it has not done is compiled where it is needed."""
    for event in list(_awaited.values()):
        event.set()
    _awaited.clear()
    while _process:
        with suppress(OSError):
            _process.pop().kill()


def _forget() -> None:
    """In a forked child, which has no worker."""
    _awaited.clear()
    _process.clear()


atexit.register(end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
