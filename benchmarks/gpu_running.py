"""Work that may crash or hang, in processes that can be killed, for ``gpu.py``.

A *part* is a list of items that one worker process does in turn. It writes what it finds, line by
line, to a file, so that an item that hangs, crashes or leaves the device unusable loses itself
alone: the worker is killed with its whole process group, and another goes on with the items that
are left. ``Program`` is a process that answers questions, with a limit for each.
Imports the standard library alone.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LOOK = 0.05  # seconds between two looks at a worker
MOST_LOST_STARTS = 2  # workers that end before they begin an item, until the part is given up
LINES = 12  # of a traceback that a report shows

Note = Callable[..., None]


class MissingError(Exception):
    """What an item needs is not here: a GPU, a package."""


class LostError(Exception):
    """A program that has ended, failed or not answered in time."""


@dataclass
class Outcome:
    """What came of an item. ``state`` is done, failed, missing, stopped or not reached."""

    state: str = "not reached"
    data: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    seconds: float = 0.0


Outcomes = dict[str, Outcome]


def end_of(text: str, lines: int = LINES) -> str:
    """The last lines of a text."""
    return "\n".join(text.rstrip().splitlines()[-lines:])


def end_process(process: subprocess.Popen[Any], group: bool = True) -> None:
    """Kill a process, with all of its group, and wait for it, though not forever."""
    with suppress(ProcessLookupError, PermissionError):
        if group:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    with suppress(subprocess.TimeoutExpired):
        process.wait(10)


# The worker's side ---------------------------------------------------------------------------


class Records:
    """A file of one line for each thing found."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def write(self, item: str, state: str, **more: Any) -> None:
        line = json.dumps({"item": item, "state": state, **more}, default=str)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def work(items: Sequence[str], do: Callable[[str, Note], dict[str, Any]], records: Records) -> int:
    """Do the items in turn; ``do(item, note)`` gives what it found, ``note(**found)`` earlier.

    After a failure nothing more is done in this process: the device may be of no more use to it.
    """
    for item in items:
        records.write(item, "begin")

        def note(item: str = item, **found: Any) -> None:
            records.write(item, "note", data=found)

        try:
            found = do(item, note)
        except MissingError as error:
            records.write(item, "missing", error=str(error))
        except Exception:
            text = traceback.format_exc()
            print(text, flush=True)
            records.write(item, "failed", error=end_of(text))
            return 1
        else:
            records.write(item, "done", data=found)
    return 0


# The side that watches -----------------------------------------------------------------------


class _Reader:
    """The lines that were added to a file since it was last looked at."""

    def __init__(self, path: Path) -> None:
        self.path, self.at = path, 0

    def lines(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.at)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.at += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


class Part:
    """The items of a part, done by one worker after another.

    ``command`` is run with the path of the records and the items that are left as arguments.
    ``each`` is the limit for an item in seconds, and for what comes before the first one.
    """

    def __init__(
        self,
        command: Sequence[str],
        items: Sequence[str],
        folder: Path,
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.command, self.items, self.folder, self.log = list(command), list(items), folder, log
        self.environment = dict(environment) if environment is not None else None
        self.outcomes: Outcomes = {item: Outcome() for item in items}

    def run(self, seconds: float, each: float) -> Outcomes:
        """All items, or as many as there is time for."""
        deadline = time.monotonic() + seconds
        lost = 0
        while left := [i for i in self.items if self.outcomes[i].state == "not reached"]:
            if time.monotonic() >= deadline or lost >= MOST_LOST_STARTS:
                break
            begun = self._one_worker(left, deadline, each)
            lost = 0 if begun else lost + 1
        return self.outcomes

    def _one_worker(self, left: list[str], deadline: float, each: float) -> bool:
        """Whether it began with an item."""
        path = self.folder / f"records_{time.monotonic_ns()}.jsonl"
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"\n--- {' '.join(self.command[1:])} {left[0]} ...\n")
            log.flush()
            before = self.log.stat().st_size
            process = subprocess.Popen(
                [*self.command, str(path), *left],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
            )
        reader = _Reader(path)
        current, begun, since = "", False, time.monotonic()
        try:
            while True:
                ended = process.poll() is not None
                for line in reader.lines():
                    current = self._take(line, since)
                    begun, since = True, time.monotonic()
                now = time.monotonic()
                if ended:
                    break
                if now >= min(deadline, since + each):
                    why = f"stopped after {now - since:.0f} s"
                    self._fail(current or left[0], "stopped", why, now - since, before)
                    return begun
                time.sleep(LOOK)
        finally:
            end_process(process)
        if current or not begun:
            why = f"the process ended with {process.returncode}"
            self._fail(current or left[0], "failed", why, now - since, before)
        return begun

    def _take(self, line: dict[str, Any], since: float) -> str:
        """Take over a line; the item that is being done after it."""
        item, state = line["item"], line["state"]
        outcome = self.outcomes[item]
        if state == "begin":
            return str(item)
        outcome.data.update(line.get("data") or {})
        outcome.seconds += time.monotonic() - since
        if state == "note":
            return str(item)
        outcome.state, outcome.error = state, line.get("error", "")
        return ""

    def _fail(self, item: str, state: str, why: str, seconds: float, before: int) -> None:
        outcome = self.outcomes[item]
        with self.log.open("rb") as file:
            file.seek(before)
            said = end_of(file.read().decode("utf-8", "replace"))
        outcome.state, outcome.error = state, f"{why}\n{said}".rstrip()
        outcome.seconds += seconds


# Programs that answer ------------------------------------------------------------------------


class Program:
    """A process that answers each line with one, in JSON: a value, or an error."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self.process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.answers: queue.Queue[str | None] = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.answers.put(line)
        self.answers.put(None)

    def ask(self, question: str) -> None:
        assert self.process.stdin
        with suppress(BrokenPipeError):
            self.process.stdin.write(question + "\n")
            self.process.stdin.flush()

    def answer(self, seconds: float) -> Any:
        """The next answer. Raises LostError, and the process is gone then."""
        try:
            line = self.answers.get(timeout=max(0.0, seconds))
        except queue.Empty:
            self.close()
            raise LostError(f"{self.name}: no answer in {seconds:.0f} s") from None
        if line is None:
            self.close()
            raise LostError(f"{self.name}: ended with {self.process.returncode}")
        found = json.loads(line)
        if "error" in found:
            self.close()
            raise LostError(f"{self.name}: {found['error']}")
        return found["value"]

    def close(self) -> None:
        end_process(self.process, group=False)
        self.reader.join(5)  # a child of the program may hold its output open
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe and not self.reader.is_alive():
                with suppress(OSError):
                    pipe.close()


def answer_questions(reply: Callable[[str], Any]) -> None:
    """Be a ``Program``. What else is printed goes to where errors go."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    with open(0, encoding="utf-8", closefd=False) as questions:
        while question := questions.readline():
            try:
                found = {"value": reply(question.strip())}
            except Exception as error:
                print(traceback.format_exc(), flush=True)
                found = {"error": f"{type(error).__name__}: {str(error).strip()[:300]}"}
            print(json.dumps(found, default=str), file=channel, flush=True)
