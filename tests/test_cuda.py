"""Kernels for CUDA without a GPU: how steps are divided and what waits for what, the tests of
``on_cuda`` in the simulator, and every kernel compiled and held to a budget.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import cells
import numpy as np
import ptx_budget
import pytest
from tinygrad_seq.kernels import build, cuda_layout, cuda_source
from tinygrad_seq.kernels.cuda_division import (
    RESIDENT,
    Form,
    Machine,
    Wanted,
    Work,
    divide,
    resident,
)
from tinygrad_seq.kernels.cuda_order import chains

import tinygrad_seq as tgs
from tinygrad_seq.recurrence.compiled import plan_of as plan_of_step
from tinygrad_seq.recurrence.compiled import prepare
from tinygrad_seq.rules import RULES

HERE = Path(__file__).parent
REQUIRED = "TINYGRAD_SEQ_REQUIRE_CUDA_COMPILER"  # where it is set, nothing is skipped
H200 = Machine(processors=132, shared_bytes=227 * 1024, threads=256)
MOST_REGISTERS = 255  # a block of 256 threads has a processor for itself
MOST_SECONDS = 60  # to compile a kernel, on a slow machine that does other things beside
TEXTS = {op: (rule.inputs, rule.text) for op, rule in RULES.items()}


def required(reason: str) -> None:
    if reason and not os.environ.get(REQUIRED):
        pytest.skip(reason)
    assert not reason, reason


def plan_of(name, dtype="float32"):
    rng = np.random.default_rng(0)
    cell = cells.CELLS[name](rng, dtype, 3, 4)
    xs = cells.make_inputs(name, rng, 2, 2, 3, dtype)
    call, needs = prepare(cell, xs, None)
    return plan_of_step(call.step, needs, type(cell).__name__, cuda=True)


# In the simulator ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file", ["test_scan_on_cuda.py", "test_flow_on_cuda.py", "test_fuzz_on_cuda.py"]
)
def test_in_the_simulator(file):
    absent = [name for name in ("numba_cuda", "greenlet") if find_spec(name) is None]
    required(f"not installed: {', '.join(absent)}" if absent else "")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "NUMBA"))}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p"),
            *("no:xdist", "-W", "default", str(HERE / "on_cuda" / file)),
        ],
        env={**inherited, "NUMBA_ENABLE_CUDASIM": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


# Compiled ------------------------------------------------------------------------------------

COMPILE = """
import importlib.util, json, sys
from unittest import mock
from numba import types
from numba.cuda import dispatcher
import ptx_budget

path, kernels = sys.argv[1], json.loads(sys.argv[2])
dispatcher.get_current_device = lambda: mock.Mock(compute_capability=(9, 0))
specification = importlib.util.spec_from_file_location("kernels", path)
module = importlib.util.module_from_spec(specification)
specification.loader.exec_module(module)
for name, words in kernels:
    signature = types.void(types.UniTuple(types.int64, words))
    report = ptx_budget.report(getattr(module, name), signature, launch_bounds=(256, 1))
    print(json.dumps({**report._asdict(), "ptx": "", "name": name}))
"""


def reports(plan, direction, form=RESIDENT):
    """What ptxas says of each kernel of a direction; kept with the compiled kernels."""
    kernels = cuda_source.kernel_texts(plan, direction, TEXTS, form)
    if form.by_steps:  # the others are those of a loop in one launch
        kernels = [kernel for kernel in kernels if "_step" in kernel.name]
    text = cuda_source.module_text(plan, kernels)
    budget = Path(ptx_budget.__file__).read_text(encoding="utf-8")
    made = build.made_from() + build.sources("cuda*.py")
    mark = hashlib.sha256((made + text + budget + COMPILE).encode()).hexdigest()[:20]
    kept = build.folder() / f"ptx_budget_{mark}" / "reports.json"
    if kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8"))
    path = build.write_module(f"{plan.name}_{direction}_cuda", f"# {mark}\n{text}")
    names = json.dumps([(kernel.name, len(kernel.words)) for kernel in kernels])
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(path), names],
        env={k: v for k, v in os.environ.items() if not k.startswith("NUMBA")}
        | {"PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(found), encoding="utf-8")
    return found


def check_budget(found):
    assert found
    for report in found:
        assert report["spill_bytes"] == report["stack_bytes"] == 0, report
        assert report["local_operations"] == 0, report
        assert report["double_operations"] == 0, report
        assert report["registers"] <= MOST_REGISTERS, report
        assert report["seconds"] < MOST_SECONDS, report


@pytest.mark.parametrize("name", cells.CELLS)
def test_every_kernel_keeps_to_its_budget(name):
    required(ptx_budget.missing())
    plan = plan_of(name)
    for direction in ("forward", "backward"):
        check_budget(reports(plan, direction))


def test_kernels_that_read_their_weights_at_each_step_too():
    required(ptx_budget.missing())
    plan = plan_of("lstm")
    products = {chain.stages[0].slot for chain in chains(plan, plan.forward)}
    check_budget(reports(plan, "forward", Form(streamed=frozenset(products))))


@pytest.mark.parametrize("name", cells.CELLS)
def test_every_kernel_of_a_loop_by_steps_too(name):
    required(ptx_budget.missing())
    plan = plan_of(name)
    for direction in ("forward", "backward"):
        if chains(plan, getattr(plan, direction)):
            check_budget(reports(plan, direction, Form(by_steps=True)))


# What waits for what -------------------------------------------------------------------------


def loop_of(plan, direction):
    text = cuda_source.kernel_texts(plan, direction, TEXTS, RESIDENT)[0].text
    return text[text.index("for s in range(s") :]


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        ("rnn", 1, 1),
        ("lstm", 1, 1),
        ("peephole", 1, 1),
        ("indrnn", 0, 0),  # every unit is by itself
        ("gru", 2, 2),  # reset gates stand before their product
        ("gru reset after", 1, 1),
        ("minimal gated unit", 2, 2),
        ("layer norm lstm", 5, 7),  # the product, and two sums over a row for each norm
    ],
)
def test_blocks_wait_no_more_often_than_they_must(name, forward, backward):
    plan = plan_of(name)
    for direction, expected in (("forward", forward), ("backward", backward)):
        if expected is not None:
            assert loop_of(plan, direction).count("barrier(") == expected, direction


def test_the_results_of_an_lstms_product_stay_where_they_are_computed():
    text = loop_of(plan_of("lstm"), "forward")
    assert len(re.findall(r"share\(shared, p\d+_out", text)) == 4  # one for each gate


# How a step is divided -----------------------------------------------------------------------


def lstm(H, B, item=4, machine=H200):
    return Work([Wanted(1, H, (H,) * 4)], B, H, item, machine)


@pytest.mark.parametrize("H", [128, 256, 512, 1024])
@pytest.mark.parametrize("B", [16, 64])
def test_the_weights_of_an_lstm_stay_in_shared_memory(H, B):
    division = divide(lstm(H, B))
    assert not division.streamed
    assert division.groups * division.parts <= H200.processors
    assert division.rows * division.groups * division.launches >= B
    assert division.shared_bytes <= H200.shared_bytes
    assert "weights stay in shared memory" in str(division)


def test_weights_without_room_are_read_at_each_step():
    division = resident(lstm(4096, 16))
    assert division.streamed == {1}
    assert "weights of %1 are read at each step, there is no room for them" in str(division)


@pytest.mark.parametrize(("H", "B"), [(4096, 16), (2048, 64), (8192, 1)])
def test_large_products_are_the_vendors(H, B):
    division = divide(lstm(H, B))
    assert division.by_steps
    assert division.groups * division.rows >= B
    assert str(division).startswith("by steps, captured as a graph: products of cuBLAS, and after ")


def test_products_that_may_round_to_tf32_are_the_vendors_sooner():
    rounding = H200._replace(tf32=True)
    assert not divide(lstm(1024, 256)).by_steps
    assert divide(lstm(1024, 256, machine=rounding)).by_steps
    assert not divide(lstm(512, 16, 8, rounding)).by_steps  # of float64 none


def test_large_batches_take_several_launches():
    division = resident(lstm(1024, 8192))
    assert division.launches > 1
    assert division.launches * division.groups * division.rows >= 8192
    assert str(division).startswith(f"{division.launches} launches of {division.groups} groups of ")


def test_a_step_without_products_is_spread_over_the_device():
    division = divide(Work([], 64, 1024, 4, H200))
    assert division.groups * division.parts > 64


def test_a_step_that_no_block_has_room_for():
    small = Machine(processors=1, shared_bytes=1024, threads=256)
    work = lstm(512, 1, machine=small)
    assert resident(work) is None
    assert divide(work).by_steps
    with pytest.raises(MemoryError, match="does not fit a block of the device, which has 1024"):
        divide(work._replace(sums=300))


def test_layouts_say_where_everything_is():
    """No two arrays of a run share memory, and all are aligned for reading four at once."""
    plan = plan_of("layer norm lstm")
    from tinygrad_seq.kernels.layout import Sizes

    widths = tuple(4 for _ in range(plan.forward_count))
    captured = tuple(((4, 16), (64, 4)) for _ in range(20))
    sizes = Sizes(5, True, 1, True, 0, widths, (), captured)
    for direction in ("forward", "backward"):
        layout = cuda_layout.Layout(plan, direction, 3, True, sizes, H200)
        for memory in layout.memory.values():
            ends = 0
            for name, (offset, shape) in memory.arrays.items():
                assert offset % 16 == 0, name
                assert offset >= ends, name
                ends = offset + int(np.prod(shape)) * (1 if name == "counters" else 4)
            assert memory.bytes >= ends


@pytest.mark.parametrize("shared_bytes", [64 * 1024, H200.shared_bytes])
def test_a_block_has_room_for_all_sums_outside_the_loop(shared_bytes):
    """Sums of narrow rows, of which a block would take many at once."""
    from tinygrad_seq.kernels.layout import Sizes

    def cell(x, h):
        for k in range(16):
            h = tgs.tanh(h * tgs.sum(x[:, 2 * k : 2 * k + 2], axis=1, keepdims=True))
        return h, h

    call, _ = prepare(cell, np.zeros((3, 5000, 32)), np.zeros((5000, 1)))
    plan = plan_of_step(call.step, None, "Cell", cuda=True)
    given = call.arrays()
    sizes = Sizes(5000, False, 1, False, 0, given.widths, given.starts, ())
    machine = H200._replace(shared_bytes=shared_bytes)
    layout = cuda_layout.Layout(plan, "forward", 3, True, sizes, machine)
    assert len(layout.sums("early")) == 16
    assert 16 * layout.rows_alone * 8 == layout.shared_alone <= shared_bytes


# Threads and streams -------------------------------------------------------------------------


@pytest.mark.parametrize(("stream", "made"), [(0, 1), (1, 1), (2, 2), (0x7F00, 1)])
def test_the_order_of_rows_is_made_by_each_thread_that_has_a_stream_of_its_own(
    stream, made, monkeypatch
):
    """Stream 2 is another in every thread, and none of them waits for a copy on the others'."""
    required("" if find_spec("numba_cuda") else "not installed: numba_cuda")
    from tinygrad_seq.kernels import cuda, cuda_build
    from tinygrad_seq.kernels.ragged import rows_of

    copies = []
    xp = ModuleType("xp")
    xp.cuda = SimpleNamespace(get_current_stream=lambda: SimpleNamespace(ptr=stream))
    xp.asarray = lambda array: copies.append(array) or array
    rows, nothing = rows_of(3, 2, None, False), {"xs": [], "captured": [], "seeds": []}

    def give():
        run = object.__new__(cuda._Run)
        run.xp, run.words, run.runner = xp, {}, SimpleNamespace(dtype=np.dtype("float32"))
        run.inputs = SimpleNamespace(rows=rows, resets=None, numbers=[], **nothing)
        run._give_inputs()

    monkeypatch.setattr(cuda_build, "address", lambda array: 0)
    with ThreadPoolExecutor(1) as other:
        for _ in range(2):
            give()
            other.submit(give).result()
    assert len(copies) == 3 * made


def test_launches_that_want_less_shared_memory_take_none_from_others(monkeypatch):
    """One thread asks for little just after another has asked for much."""
    required("" if find_spec("numba_cuda") else "not installed: numba_cuda")
    import cuda.core
    from cuda.bindings import driver
    from tinygrad_seq.kernels import cuda_build

    given, launched = [cuda_build.UNASKED_SHARED], []
    function = SimpleNamespace(device=SimpleNamespace(id=0), handle=None, kernel=None)
    library = SimpleNamespace(get_cufunc=lambda: function)
    dispatcher = SimpleNamespace(overloads={0: SimpleNamespace(_codelibrary=library)})
    monkeypatch.setattr(cuda_build.cuda, "jit", lambda *_, **__: lambda _: dispatcher)
    kernel = cuda_build.Compiled(lambda words: None, 1)

    def give(which, count, handle, device):
        given.append(count)
        if len(given) == 2:  # the other thread comes in between
            kernel.launch(1, 100_000, (0,), 0, False)
        return (driver.CUresult.CUDA_SUCCESS,)

    def launch(stream, config, kernel, *words):
        assert config.shmem_size <= given[-1]
        launched.append(config.shmem_size)

    monkeypatch.setattr(driver, "cuKernelSetAttribute", give)
    monkeypatch.setattr(cuda_build, "machine", lambda: H200)
    monkeypatch.setattr(cuda_build, "_stream", lambda handle: None)
    monkeypatch.setattr(cuda.core, "LaunchConfig", SimpleNamespace)
    monkeypatch.setattr(cuda.core, "launch", launch)
    kernel.launch(1, 200_000, (0,), 0, False)
    assert launched == [100_000, 200_000]


def test_kernels_where_they_cannot_be_kept(monkeypatch, tmp_path):
    """What was kept may be damaged, or the disk be full; and others see that it is compiling."""
    required("" if find_spec("numba_cuda") else "not installed: numba_cuda")
    from tinygrad_seq.kernels import build, cuda_build

    text = tmp_path / "kernel.py"
    function = eval(compile("lambda words: None", str(text), "eval"))
    damaged = tmp_path / "__pycache__" / "kernel.<lambda>-1.nbi"
    damaged.parent.mkdir()
    damaged.write_text("damaged")
    asked, said = [], []

    def jit(signatures, cache, **_):
        asked.append((cache, any(build._compiling)))
        if cache:
            raise OSError(28, "No space left on device")
        return lambda _: "a dispatcher"

    monkeypatch.setattr(cuda_build.cuda, "jit", jit)
    monkeypatch.setattr(build, "say_not_kept", said.append)
    assert cuda_build._compiled(function, 1) == "a dispatcher"
    assert not damaged.exists()
    assert cuda_build._compiled(function, 1) == "a dispatcher"
    assert asked == [(True, False), (False, False), (True, True), (False, True)]
    assert [each.errno for each in said] == [28, 28]
    assert not build._compiling


# Errors --------------------------------------------------------------------------------------


def test_numba_cuda_is_asked_for(monkeypatch):
    code = """
import sys
sys.modules["numba_cuda"] = None
try:
    from tinygrad_seq.kernels import cuda
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert 'not installed; pip install "tinygrad-seq[cuda]"' in done.stdout, done.stderr


def test_a_gpu_is_asked_for():
    if tgs.devices.missing() is None:
        pytest.skip("a GPU is there")
    with pytest.raises(tgs.errors.DeviceError, match="cuda: "):
        tgs.zeros(2, 3).to("cuda")
