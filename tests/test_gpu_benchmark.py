"""The benchmark for a GPU, without one: its processes, its arithmetic, its report; its kernels in
the simulator and compiled; its cells in PyTorch against ours.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import ptx_budget
import pytest
from tinygrad_seq.kernels.cuda_division import Machine, Wanted, Work, divide

import tinygrad_seq as tgs
from tinygrad_seq import devices

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
sys.path.append(str(BENCHMARKS))  # where its modules find one another
gpu, gpu_report = import_module("gpu"), import_module("gpu_report")
gpu_running = import_module("gpu_running")
Outcome, Part, Program = gpu_running.Outcome, gpu_running.Part, gpu_running.Program
H200 = Machine(processors=132, shared_bytes=227 * 1024, threads=256)

WORKER = """
import os, sys, time
sys.path.insert(0, {folder!r})
from gpu_running import MissingError, Records, work

def do(item, note):
    if item == "hang":
        note(before=1)
        time.sleep(60)
    if item == "crash":
        print("the last words", flush=True)
        os._exit(7)
    if item == "raise":
        raise ValueError("of no use")
    if item == "lack":
        raise MissingError("no such thing")
    return {{"process": os.getpid()}}

sys.exit(work(sys.argv[2:], do, Records(sys.argv[1])))
"""


def python(text):
    return [sys.executable, "-c", text]


def run_part(items, tmp_path, worker=None, seconds=20.0, each=5.0):
    worker = worker or WORKER.format(folder=str(BENCHMARKS))
    part = Part(python(worker), items, tmp_path, tmp_path / "log")
    return part.run(seconds, each)


# Processes -----------------------------------------------------------------------------------


def test_a_part_goes_on_after_what_hangs_crashes_and_fails(tmp_path):
    items = ["first", "second", "hang", "third", "crash", "raise", "lack", "last"]
    begin = time.monotonic()
    found = run_part(items, tmp_path, each=1.5)
    assert time.monotonic() - begin < 20
    states = [found[item].state for item in items]
    assert states == "done done stopped done failed failed missing done".split()
    assert found["first"].data == found["second"].data != found["third"].data
    assert found["hang"].data == {"before": 1}
    assert "stopped after" in found["hang"].error
    assert "ended with 7" in found["crash"].error
    assert "the last words" in found["crash"].error
    assert found["raise"].error.endswith("ValueError: of no use")
    assert found["lack"].error == "no such thing"


def test_a_part_ends_in_time(tmp_path):
    begin = time.monotonic()
    found = run_part(["hang", "first"], tmp_path, seconds=1.0, each=30.0)
    assert time.monotonic() - begin < 5
    assert [found[item].state for item in ("hang", "first")] == ["stopped", "not reached"]


def test_all_of_its_processes_are_ended(tmp_path):
    """Also those that the worker started."""
    worker = (
        "import subprocess, sys, time\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid))\n"
        "time.sleep(60)\n"
    )
    run_part(["hang"], tmp_path, worker, seconds=3.0)
    status = Path(f"/proc/{(tmp_path / 'pid').read_text()}/status")
    for _ in range(50):
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.1)
    raise AssertionError("it still runs")


def test_a_worker_that_does_not_begin_is_not_tried_for_ever(tmp_path):
    found = run_part(["a", "b", "c", "d"], tmp_path, "raise ImportError('nothing here')")
    assert [o.state for o in found.values()] == ["failed", "failed", "not reached", "not reached"]
    assert "nothing here" in found["a"].error


ANSWERS = """
import sys, time
sys.path.insert(0, {folder!r})
from gpu_running import answer_questions

def reply(question):
    print("this is no answer")
    what, *more = question.split()
    if what == {hangs!r}:
        time.sleep(60)
    if what == {fails!r}:
        raise ValueError("not this one")
    return {{"first train s": 1.0}} if what == "prepare" else {value}

answer_questions(reply)
"""


def answering(value, hangs="", fails=""):
    return python(ANSWERS.format(folder=str(BENCHMARKS), value=value, hangs=hangs, fails=fails))


def test_programs_answer():
    program = Program("one", answering(2.5, "sleep", "fail"))
    program.ask("anything")
    assert program.answer(20) == 2.5
    program.ask("fail")
    with pytest.raises(gpu_running.LostError, match="one: ValueError: not this one"):
        program.answer(20)
    program = Program("two", answering(1.0, "sleep"))
    program.ask("sleep")
    with pytest.raises(gpu_running.LostError, match="two: no answer in 1 s"):
        program.answer(1)
    assert program.process.poll() is not None


def test_a_row_of_the_table_goes_on_without_a_program_that_is_lost():
    commands = {
        "ours": answering(2.0),
        "torch": answering(50.0),
        "jax": answering(3.0, "", "infer"),
    }
    table, notes = gpu.Table(commands), {}
    notes |= table("peephole 512 16 128", lambda **found: notes.update(found))
    for program in table.running.values():
        program.close()
    outcome = Outcome("done", notes)
    rows = gpu_report.rows_of({"peephole 512 16 128": outcome})
    found = {(row.mode, row.peer): (row.ratio, row.bar) for row in rows}
    assert found == {
        ("train", "torch"): (25.0, 20.0),
        ("train", "jax"): (1.5, 2.0),
        ("infer", "torch"): (25.0, 20.0),
    }
    assert notes["left out"] == {"jax": "jax: ValueError: not this one"}
    text = "\n".join(gpu_report.table_section({"peephole 512 16 128": outcome}))
    assert "| peephole | 16 | 128 | train | 2.000 | JAX | 3.000 | 1.50 | 2 | **missed** |" in text
    assert "left out, jax: jax: ValueError: not this one" in text


# Arithmetic and report -----------------------------------------------------------------------


def test_ratios_and_bars():
    assert gpu_report.ratio([2.0, 9.0, 8.0], [1.0, 3.0, 4.0]) == 2.0
    bars = [gpu_report.bar_of("lstm", "torch", H) for H in (128, 512, 1024)]
    assert bars == [1.0, 1.0, 0.7]
    bars = [gpu_report.bar_of("peephole", peer, 1024) for peer in ("torch", "compile", "jax")]
    assert bars == [20.0, 2.0, 2.0]


def test_parts_share_the_time():
    """And what one leaves goes to the later ones."""
    names, left = list(gpu.PARTS), 480.0
    for k, name in enumerate(names):
        given = gpu.limit(name, names[k + 1 :], left)
        assert 0 < given <= left
        left -= given
    assert left == pytest.approx(0)
    assert gpu.limit("sweep", [], 100.0) == 100.0


def test_items():
    rows = gpu.table_items()
    assert len(rows) == len(set(rows)) == 34
    assert {row.split()[0] for row in rows[:4]} == {"lstm", "gru", "peephole", "minimal_gated"}
    assert len(gpu.correct_items()) == 15


def test_the_sweep_has_every_division_that_can_be_chosen():
    items = gpu.sweep_items()
    assert len(items) == len(set(items))
    for T, B, H in gpu.SWEPT:
        for widths in ((H,) * 4, (H,)):  # as forward and as backward
            wanted = [Wanted(0, H * 4 // len(widths), widths)]
            division = divide(Work(wanted, B, H, 4, H200))
            assert f"{T} {B} {H} {division.rows} {division.parts}" in items
    for item in items:
        T, B, H, *division = item.split()
        if division[0].isdigit():
            rows, parts = map(int, division)
            assert -(-int(B) // rows) * parts <= H200.processors


def test_the_report_is_written_after_each_part(tmp_path, monkeypatch):
    seen = []

    def run(self, seconds, each):
        seen.append((tmp_path / f"{name}.md").read_text(encoding="utf-8"))
        self.outcomes[self.items[0]] = Outcome("failed", {"found": 3}, "the end of it", 1.0)
        return self.outcomes

    monkeypatch.setattr(gpu, "environment", lambda folder: {})
    monkeypatch.setattr(gpu.Part, "run", run)
    name = gpu.Report(tmp_path, [], 1).name
    gpu.run_all(["launch", "correct", "sweep"], 1.0, tmp_path)
    assert seen[0].count("Not reached.") == 3
    assert seen[1].count("Not reached.") == 2
    assert "the end of it" in seen[1]
    raw = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
    assert raw["parts"]["launch"]["5 words"]["data"] == {"found": 3}


def test_a_section_that_cannot_be_written_spoils_no_other(tmp_path):
    report = gpu.Report(tmp_path, ["correct", "launch"], 1.0)
    report.found = {
        "correct": {"lstm 1 2 3": Outcome("done", {})},
        "launch": {"a": Outcome("done")},
    }
    report.seconds = {"correct": 1.0, "launch": 1.0}
    report.write()
    text = (tmp_path / f"{report.name}.md").read_text(encoding="utf-8")
    assert "This section could not be written: KeyError('error')" in text
    assert "- **a**: passed" in text


def test_the_sweep_names_the_best_and_the_chosen():
    def outcome(us, clocks, groups, parts):
        division = {"groups": groups, "parts": parts, "rows": 1, "streamed": 0}
        division["by steps"] = parts == 2
        found = {**division, "model clocks": clocks, "µs a step": us}
        return Outcome("done", {"ms": {"forward": us, "whole": 9.0}, "forward": found})

    outcomes = {
        "128 16 128 chosen": outcome(3.0, 5000, 16, 8),
        "128 16 128 1 8": outcome(3.1, 5000, 16, 8),
        "128 16 128 1 4": outcome(2.0, 6000, 16, 4),
        "128 16 128 1 2": Outcome("done", {"no room": "no room for 16 groups of 2"}),
        "128 16 128 steps": outcome(9.0, 8000, 16, 2),
    }
    lines = gpu_report.sweep_section(outcomes, 2000.0)
    assert "| 16×4 | 1 | 0 | 2 | 4000 | 6000 |  |" in lines
    assert "| 16×8 | 1 | 0 | 3 | 6000 | 5000 | chosen |" in lines
    assert "| 16×2, by steps | 1 | 0 | 9 | 18000 | 8000 |  |" in lines
    assert "chosen / best: 1.50" in lines
    assert "| whole | 9 |" in lines


@pytest.mark.skipif(devices.missing() is None, reason="there is a GPU")
def test_without_a_gpu_the_report_says_so(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--minutes", "4"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path)], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text(encoding="utf-8"))["parts"]
    assert list(found) == list(gpu.PARTS)
    assert found["versions"]["packages"]["state"] == "done"
    for part in list(gpu.PARTS)[1:]:
        assert {o["state"] for o in found[part].values()} == {"missing"}, part
        assert {o["error"][:6] for o in found[part].values()} == {"cuda: "}
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    assert text.count("## ") == len(gpu.PARTS)


def test_unknown_parts():
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--parts", "launch,lunch"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "'launch,lunch' was given, expected some of versions,launch" in done.stderr


# Kernels -------------------------------------------------------------------------------------

SIMULATED = """
import cuda_simulator
import numba.cuda.libdevice

cuda_simulator.install()
import fake_cupy, gpu_measures, cells_on_gpu
from gpu_running import MissingError

for table in (gpu_measures.LAUNCHES, gpu_measures.COSTS):
    for name, measure in table.items():
        found = {}
        try:
            found |= measure(lambda **more: found.update(more))
        except MissingError:
            continue
        print(name, found)
with fake_cupy.installed():
    for name in ("lstm", "gru", "peephole", "minimal_gated", "layer_norm_lstm"):
        found = cells_on_gpu.correct(name, (3, 2, 6), "cuda")
        assert found["error"] < 1e-5, found
        assert set(found["division"]) == {"forward", "backward"}
"""

COMPILED = """
from unittest import mock
from numba import types
from numba.cuda import dispatcher

dispatcher.get_current_device = lambda: mock.Mock(compute_capability=(9, 0))
import gpu_kernels as kernels
import ptx_budget

WORDS = dict(fill=60, mirror=2, rounds=4, exchange=5, grid_rounds=2, chase=3, read_global=6)
WORDS |= dict(read_shared=3, meetings=2, spin=2)
for name, words in WORDS.items():
    signature = types.void(types.UniTuple(types.int64, words))
    report = ptx_budget.report(getattr(kernels, name), signature, launch_bounds=(256, 1))
    assert report.spill_bytes == report.stack_bytes == report.local_operations == 0, name
    assert report.ptx.count("clock64") == 2 or name in ("fill", "mirror", "exchange", "spin"), name
"""


def run_python(text, **more):
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA")}
    paths = [str(BENCHMARKS), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", text],
        env={**inherited, **more, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.skipif(
    find_spec("numba_cuda") is None or find_spec("greenlet") is None,
    reason="the simulator is not installed",
)
def test_kernels_in_the_simulator():
    done = run_python(SIMULATED, NUMBA_ENABLE_CUDASIM="1")
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("5 words", "blocks that wait for one another", "reads of a block"):
        assert name in done.stdout


@pytest.mark.skipif(bool(ptx_budget.missing()), reason=ptx_budget.missing())
def test_kernels_compiled():
    done = run_python(COMPILED)
    assert done.returncode == 0, done.stdout + done.stderr


# PyTorch -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # PyTorch's own
@pytest.mark.parametrize("chunks", [False, True])
@pytest.mark.parametrize("name", ["lstm", "gru", "peephole", "minimal_gated", "layer_norm_lstm"])
def test_peers_compute_the_same(name, chunks):
    pytest.importorskip(
        "torch", reason="PyTorch is not installed; it is an optional second opinion"
    )
    cells_on_gpu = import_module("cells_on_gpu")
    row = (6, 3, 5)
    compiler = (lambda function: function) if chunks else None
    expected = cells_on_gpu.Ours(name, row, "cpu", "float64").results(tgs.unroll)
    found = cells_on_gpu.InTorch(name, row, "cpu", "float64", compiler).results()
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert cells_on_gpu.difference(found[key], value) < 1e-12, key
