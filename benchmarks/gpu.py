"""Everything that a machine with a GPU can tell, in one run that nobody watches.

    python benchmarks/gpu.py                                all parts, within 8 minutes
    python benchmarks/gpu.py --parts launch,correct --minutes 3
    python benchmarks/gpu.py --output somewhere

Parts, in this order: versions; launch (does a launch work, with much shared memory, with blocks
that wait); barrier (what launches, barriers and reads cost, beside what the model of
``kernels/cuda_division.py`` assumes); tests (``pytest -m gpu``); correct (float32 on the GPU
against float64 on the host); table (training and inference beside PyTorch and JAX); sweep (each
way to divide a run, beside what the model thinks of it).

Each part runs in a process of its own, with a limit for it and for each of its items; what hangs or
crashes is killed, and the next process goes on with what is left. Time that a part leaves goes to
the later ones. The report, ``gpu_<date>.md`` and ``.json``, is written anew after each part; all
that the parts printed is in ``gpu_<date>.log``. Where there is no GPU the report says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import gpu_report
from gpu_running import (
    LostError,
    MissingError,
    Note,
    Outcome,
    Outcomes,
    Part,
    Program,
    Records,
    answer_questions,
    end_of,
    work,
)

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESERVE = 8.0  # seconds for killing and writing
TURNS = 3
LAYERS = ("lstm", "gru")
CUSTOM = ("peephole", "minimal_gated")
SIZES = [(16, 512), (16, 128), (64, 1024), (64, 256), (16, 1024), (64, 512), (16, 256), (64, 128)]
CORRECT_SIZES = [(16, 128), (64, 512), (16, 1024)]
SWEPT = [(128, 16, 128), (128, 64, 512), (128, 16, 1024), (128, 1, 32)]  # T B H
STEPPED = [(128, 64, 512), (128, 64, 1024), (128, 64, 2048)]  # where loops by steps may be best
PROCESSORS = 132
PREPARE = {
    "ours": 60.0,
    "torch": 30.0,
    "jax": 40.0,
    "compile": 60.0,
    "compile_step": 60.0,
}  # seconds


# The items of each part ----------------------------------------------------------------------


def table_items() -> list[str]:
    cells = [LAYERS[0], CUSTOM[0], LAYERS[1], CUSTOM[1]]
    items = [f"{cell} 512 {B} {H}" for B, H in SIZES for cell in cells]
    compiled = [f"{cell} 512 {B} {H} compile" for B, H in SIZES[:1] for cell in CUSTOM]
    return items[:8] + compiled + items[8:]  # torch.compile takes long, and may take all the time


def correct_items() -> list[str]:
    cells = [*LAYERS, *CUSTOM, "layer_norm_lstm"]
    return [f"{cell} 64 {B} {H}" for B, H in CORRECT_SIZES for cell in cells]


def sweep_items() -> list[str]:
    """All divisions of each shape, the chosen ones first, then by turns from many blocks to few."""
    columns = []
    for T, B, H in SWEPT:
        rows, found = 1, []
        while True:
            groups = -(-B // rows)
            parts = 1
            while groups * parts <= PROCESSORS and parts <= H:
                found.append((groups * parts, rows, parts))
                parts *= 2
            most = min(PROCESSORS // groups, H)
            if most and most & (most - 1):
                found.append((groups * most, rows, most))
            if rows >= B:
                break
            rows = min(2 * rows, B)
        found.sort(reverse=True)
        columns.append([f"{T} {B} {H} {rows} {parts}" for _, rows, parts in found])
    items = [f"{T} {B} {H} chosen" for T, B, H in SWEPT]
    for T, B, H in STEPPED:
        items += [f"{T} {B} {H} steps", f"{T} {B} {H} resident"]
    return items + [item for column in columns for item in column]


def measures() -> Any:
    import gpu_measures

    return gpu_measures


class Kind(NamedTuple):
    """A part: its heading, what its items are, its share of the time, the most for an item."""

    title: str
    items: Callable[[], list[str]]
    share: float
    each: float
    section: Callable[[Outcomes], list[str]]


PARTS = {
    "versions": Kind(
        "Versions and device",
        lambda: list(measures().VERSIONS),
        *(20, 20, gpu_report.items_section),
    ),
    "launch": Kind("Launches", lambda: list(measures().LAUNCHES), 35, 25, gpu_report.items_section),
    "barrier": Kind(
        "What things cost",
        lambda: list(measures().COSTS),
        *(60, 20, gpu_report.items_section),
    ),
    "tests": Kind("The GPU tests", lambda: ["pytest"], 120, 180, gpu_report.tests_section),
    "correct": Kind("Correctness", correct_items, 50, 45, gpu_report.correct_section),
    "table": Kind("Beside PyTorch and JAX", table_items, 150, 110, gpu_report.table_section),
    "sweep": Kind("Divisions", sweep_items, 35, 20, gpu_report.sweep_section),
}


# Workers -------------------------------------------------------------------------------------


def doer(part: str, seconds: float) -> Callable[[str, Note], dict[str, Any]]:
    """What does an item of a part."""
    if part in ("versions", "launch", "barrier"):
        tables = {"versions": "VERSIONS", "launch": "LAUNCHES", "barrier": "COSTS"}
        table = getattr(measures(), tables[part])
        return lambda item, note: dict(table[item](note))
    measures().Device()  # or say that there is none
    if part == "tests":
        return lambda item, note: run_tests(seconds, note)
    if part == "table":
        return Table()
    import cells_on_gpu

    if part == "correct":
        return lambda item, note: cells_on_gpu.correct(*cell_and_row(item), "cuda")
    sweep = cells_on_gpu.Sweep()
    return lambda item, note: sweep(item)


def cell_and_row(item: str) -> tuple[str, tuple[int, int, int]]:
    cell, T, B, H = item.split()[:4]
    return cell, (int(T), int(B), int(H))


def run_worker(part: str, seconds: float, records: str, items: Sequence[str]) -> int:
    """Do the items; if there is no GPU, say so of each."""
    found = Records(records)
    try:
        do = doer(part, seconds)
    except MissingError as error:
        for item in items:
            found.write(item, "missing", error=str(error))
        return 0
    return work(items, do, found)


def run_tests(seconds: float, note: Note) -> dict[str, Any]:
    """The tests that are marked for a GPU; interrupted before the time is up, so as to report."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-x", "--maxfail=25"]
    command += ["--tb=short", "-ra", "-W", "default", "-p", "no:cacheprovider"]
    command += ["-o", "faulthandler_timeout=45", "--durations=10"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(max(1, min(6, (os.cpu_count() or 2) // 2)))]
    command += ["tests/on_cuda", "tests/test_devices.py"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONSAFEPATH": "1"},  # the package as all parts have it
    )
    late = False
    try:
        out, _ = process.communicate(timeout=max(10.0, seconds - 15))
    except subprocess.TimeoutExpired:
        late = True
        process.send_signal(signal.SIGINT)
        try:
            out, _ = process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            out, _ = process.communicate()
    print(out)
    lines = out.rstrip().splitlines()
    begin = next(
        (k for k, line in enumerate(lines) if "= FAILURES" in line or "= ERR" in line), -30
    )
    text = "\n".join(lines[begin:])
    found = {
        "returned": process.returncode,
        "stopped early": late,
        "last line": lines[-1] if lines else "",
        "command": " ".join(command[1:]),
        "summary": text if len(text) < 16_000 else f"{text[:10_000]}\n...\n{text[-6_000:]}",
    }
    note(**found)
    if process.returncode:
        raise RuntimeError(f"pytest returned {process.returncode}: {found['last line']}")
    return found


class Table:
    """Rows of the table: programs that prepare at the same time and are timed by turns."""

    def __init__(self, commands: dict[str, list[str]] | None = None) -> None:
        me = [sys.executable, "-W", "ignore", str(HERE / "gpu.py"), "--program"]
        names = ("ours", "torch", "jax", "compile", "compile_step")
        self.commands = commands or {name: [*me, name] for name in names}
        self.running: dict[str, Program] = {}
        self.losses: dict[str, int] = {}

    def wanted(self, item: str) -> list[str]:
        cell, *_, last = item.split()
        if last == "compile":
            return ["ours", "compile", "compile_step"]
        return ["ours", "torch"] if cell in LAYERS else ["ours", "torch", "jax"]

    def program(self, name: str) -> Program:
        if name not in self.running:
            self.running[name] = Program(name, self.commands[name])
        return self.running[name]

    def __call__(self, item: str, note: Note) -> dict[str, Any]:
        cell, row = cell_and_row(item)
        out: dict[str, str] = {}
        names = []
        for name in self.wanted(item):
            if name != "ours" and self.losses.get(name, 0) >= 2:
                out[name] = "lost twice before"
            else:
                names.append(name)
        for name in names:
            self.program(name).ask(f"prepare {cell} {' '.join(map(str, row))}")
        begin, known = time.monotonic(), {}
        for name in names:
            left = PREPARE[name] - (time.monotonic() - begin)
            if (found := self.answer(name, max(1.0, left), out)) is not None:
                known[name] = found
        note(**{"known": known, "left out": out})
        for mode in ("train", "infer"):
            note(**{mode: self.turns(mode, [n for n in names if n in self.running], out)})
        return {"left out": out}

    def turns(self, mode: str, names: list[str], out: dict[str, str]) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(TURNS):
            for name in [n for n in names if n in self.running]:
                self.running[name].ask(mode)
                found = self.answer(name, 20.0, out)
                if found is None:
                    del times[name]
                else:
                    times[name].append(found)
        return times

    def answer(self, name: str, seconds: float, out: dict[str, str]) -> Any:
        """The program's answer; None if it is lost, and why in ``out``."""
        try:
            return self.running[name].answer(seconds)
        except LostError as error:
            del self.running[name]
            self.losses[name] = self.losses.get(name, 0) + 1
            out[name] = str(error)
            return None


def run_program(name: str) -> None:
    import cells_on_gpu

    found: list[Any] = []

    def reply(question: str) -> Any:
        if not found:
            found.append(cells_on_gpu.Answers(name))
        return found[0](question)

    answer_questions(reply)


# The whole -----------------------------------------------------------------------------------


def environment(folder: Path) -> dict[str, str]:
    """What all processes are given: this package, and nothing that changes its numbers."""
    dropped = ("CUPY_TF32", "NUMBA_ENABLE_CUDASIM", "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
    found = {k: v for k, v in os.environ.items() if k not in dropped}
    found |= {
        "NUMBA_CUDA_LOW_OCCUPANCY_WARNINGS": "0",
        "NUMBA_CUDA_ARRAY_INTERFACE_SYNC": "0",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
    }
    package = package_folder(folder)
    if package:
        given = [str(package), *filter(None, [found.get("PYTHONPATH")])]
        found["PYTHONPATH"] = os.pathsep.join(given)
    return found


def package_folder(folder: Path) -> Path | None:
    """A folder with this checkout's package, where it is not the one that is installed."""
    question = "import tinygrad_seq, tinygrad_seq.kernels as k; print(k.__path__[0])"
    done = subprocess.run(
        [sys.executable, "-c", question], capture_output=True, text=True, check=False, cwd=folder
    )
    if not done.returncode and Path(done.stdout.strip()).resolve() == ROOT / "kernels":
        return None
    home = folder / "package"
    (home / "tinygrad_seq").mkdir(parents=True)
    for entry in (ROOT / "tinygrad_seq").iterdir():
        (home / "tinygrad_seq" / entry.name).symlink_to(entry)
    (home / "tinygrad_seq" / "kernels").symlink_to(ROOT / "kernels")
    return home


class Report:
    """The files that are written anew after each part."""

    def __init__(self, folder: Path, parts: Sequence[str], minutes: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.name = f"gpu_{datetime.now(UTC):%Y-%m-%d}"
        self.folder, self.parts, self.minutes = folder, list(parts), minutes
        self.log = folder / f"{self.name}.log"
        self.log.write_text("", encoding="utf-8")
        self.found: dict[str, Outcomes] = {}
        self.seconds: dict[str, float] = {}

    def write(self) -> None:
        lines = [f"# On a GPU, measured on {datetime.now(UTC):%Y-%m-%d}", ""]
        lines += [f"`{' '.join(['python benchmarks/gpu.py', *sys.argv[1:]])}`", "", *self.summary()]
        for part in self.parts:
            lines += ["", f"## {PARTS[part].title}", ""]
            if part not in self.found:
                lines.append("Not reached.")
                continue
            lines.append(f"{self.seconds[part]:.0f} seconds.")
            try:
                lines += ["", *self.section(part)]
            except Exception as error:  # the numbers are in the other file
                lines += ["", f"This section could not be written: {error!r}"]
        raw = {part: {k: asdict(v) for k, v in found.items()} for part, found in self.found.items()}
        more = {"seconds": self.seconds, "minutes": self.minutes, "parts": raw}
        _replace(self.folder / f"{self.name}.md", "\n".join(lines).rstrip() + "\n")
        _replace(self.folder / f"{self.name}.json", json.dumps(more, indent=1, default=str) + "\n")

    def section(self, part: str) -> list[str]:
        if part == "sweep":
            clock = self.found.get("barrier", {}).get("clock", Outcome())
            return gpu_report.sweep_section(self.found[part], clock.data.get("MHz"))
        return PARTS[part].section(self.found[part])

    def summary(self) -> list[str]:
        """How many items of each part went through."""
        rows = []
        for part, found in self.found.items():
            states = [outcome.state for outcome in found.values()]
            counts = {s: states.count(s) for s in dict.fromkeys(states)}
            shown = ", ".join(f"{n} {state}" for state, n in counts.items())
            rows.append([part, shown, f"{self.seconds[part]:.0f}"])
        return gpu_report.markdown(["part", "items", "seconds"], rows)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(path.suffix + ".new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def limit(part: str, later: Sequence[str], left: float) -> float:
    """Seconds for a part: its share of the time that is left for it and the later ones."""
    return left * PARTS[part].share / sum(PARTS[p].share for p in (part, *later))


def run_all(parts: Sequence[str], minutes: float, output: Path) -> Path:
    begin = time.monotonic()
    end = begin + 60 * minutes - RESERVE
    report = Report(output, parts, minutes)
    report.write()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        given = environment(folder)
        for k, part in enumerate(parts):
            since = time.monotonic()
            seconds = limit(part, parts[k + 1 :], end - since)
            if seconds < 1:
                break
            print(f"{part}: at most {seconds:.0f} s ...", flush=True)
            command = [sys.executable, "-W", "ignore", str(HERE / "gpu.py")]
            command += ["--worker", part, f"{seconds:.0f}"]
            work = Part(command, PARTS[part].items(), folder, report.log, given)
            report.found[part] = work.run(seconds, PARTS[part].each)
            report.seconds[part] = time.monotonic() - since
            report.write()
            print("\n".join(report.summary()[-1:]), flush=True)
    path = output / f"{report.name}.md"
    print(f"wrote {path} in {time.monotonic() - begin:.0f} s")
    return path


def parts_named(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in PARTS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"{text!r} was given, expected some of {','.join(PARTS)}")
    return [name for name in PARTS if name in names]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--parts", type=parts_named, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--program", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        part, seconds, records, *items = given.worker
        return run_worker(part, float(seconds), records, items)
    if given.program:
        with suppress(KeyboardInterrupt):
            run_program(given.program)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that workers are ended too
    path = run_all(given.parts, given.minutes, given.output)
    print(end_of(path.read_text(encoding="utf-8"), 20_000))
    return 0


if __name__ == "__main__":
    sys.exit(main())
