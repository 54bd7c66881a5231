"""Kernels by themselves: accuracy, other processors, no compiler, the cache, threads, forks."""

from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from functools import cache
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba import config
from numba.core import codegen
from tinygrad_seq.kernels import (
    build,
    cpu,
    division,
    forking,
    gemm,
    layout,
    machine,
    memory,
    philox,
    ragged,
    simd,
    vecmath,
)
from tinygrad_seq.kernels import threads as pool
from tinygrad_seq.kernels.threads import FROM_STEP, PHASE_WORDS, TASKS, TO_STEP

import tinygrad_seq as tgs
from tinygrad_seq import nn
from tinygrad_seq.recurrence import compiled, following

# Accuracy --------------------------------------------------------------------------------------

LARGEST_ERRORS = {"exp": 2, "expm1": 3, "tanh": 4, "sigmoid": 3, "log": 3, "log1p": 4, "floor": 0}
TRUTHS = {
    "exp": np.exp,
    "expm1": np.expm1,
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "log": np.log,
    "log1p": np.log1p,
    "floor": np.floor,
}
EVERYWHERE = '''"""Every function of vecmath over an array, in {dtype}."""

from tinygrad_seq.kernels.simd import vectors

_v = vectors("{dtype}")
LANES, load, store = _v.LANES, _v.load, _v.store
'''
ONE = """

{name} = _v.{name}


def all_{name}(x, y, n):
    for j in range(0, n, LANES):
        store(y, j, {name}(load(x, j, n - j)), n - j)
"""


def everywhere(name, dtype):
    """Numbers of all magnitudes at which a function has a normal value."""
    rng, limits = np.random.default_rng(0), np.finfo(dtype)
    top = np.log(float(limits.max))
    sizes = np.exp(rng.uniform(np.log(float(limits.tiny)), top * 0.999, 40_000))
    x = np.concatenate([sizes, rng.uniform(0, 1.2 * top, 40_000), rng.uniform(0, 3, 40_000)])
    if name != "log":
        x = np.concatenate([x, -x])
    return x[x > -1].astype(dtype) if name == "log1p" else x.astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_errors_of_functions_in_ulp(dtype):
    text = EVERYWHERE.format(dtype=dtype) + "".join(ONE.format(name=n) for n in TRUTHS)
    compiled = build.load(f"everywhere_{dtype}", text, {f"all_{n}": 3 for n in TRUTHS})
    tiny, huge = np.finfo(dtype).tiny, np.finfo(dtype).max
    for name, truth in TRUTHS.items():
        x = everywhere(name, dtype)
        with np.errstate(all="ignore"):
            true = truth(x.astype(np.longdouble))
            plain = getattr(vecmath, name)(vecmath.OverNumPy(dtype), x)
        y = np.empty_like(x)
        compiled[f"all_{name}"](memory.address(x), memory.address(y), len(x))
        normal = (abs(true) >= tiny) & (abs(true) <= huge)
        unit = np.spacing(abs(true[normal]).astype(dtype)).astype(np.longdouble)
        for found in (y, plain):
            worst = (abs(found[normal].astype(np.longdouble) - true[normal]) / unit).max()
            assert worst <= LARGEST_ERRORS[name], (name, float(worst))
        special = np.array([np.nan, np.inf, -np.inf, 0.0], dtype)
        made = np.empty_like(special)
        compiled[f"all_{name}"](memory.address(special), memory.address(made), 4)
        with np.errstate(all="ignore"):
            # what is below the smallest normal number is 0 in a kernel
            np.testing.assert_allclose(made, truth(special), rtol=0, atol=tiny)


def test_philox():
    """Known answers of Philox 4x32-10, from the tests of Random123; then plain and NumPy's."""
    digits_of_pi = 0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0
    assert philox.first_word(*[0] * 6) == 0x6627E8D5
    assert philox.first_word(*[philox.LOW] * 6) == 0x408F276D
    assert philox.first_word(*digits_of_pi) == 0xD16CFE09
    seed = 2**62 + 12345
    table = philox.uniform(seed, 3, 70_000, 4, 5)
    plain = simd._plain_functions("float32").uniform
    assert [plain(seed, 3, 70_000, 2, j) for j in range(5)] == table[2].tolist()


# Other processors, and none at all -------------------------------------------------------------

AGREE = """
import numpy as np
import tinygrad_seq as tgs
from tinygrad_seq.kernels import machine
rng = np.random.default_rng(0)
for dtype in {dtypes}:
    for cell in (tgs.nn.{cell}(3, 5, dtype=dtype, rng=rng),):
        xs = rng.standard_normal((4, 3, 3)).astype(dtype)
        found = []
        for driver in (tgs.scan, tgs.unroll):
            x = tgs.tensor(xs, requires_grad=True)
            cell.zero_grad()
            ys, _ = driver(cell, x, lengths=[4, 2, 0])
            (ys * ys).sum().backward()
            found.append([ys.detach(), x.grad, *(p.grad for p in cell.parameters())])
        for a, b in zip(*found, strict=True):
            tolerance = 1e-5 if dtype == "float32" else 1e-12
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
print(machine.vector_bits())
"""


def run(program, **environment):
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def agrees(cell="RNNCell", dtypes=("float32",), **environment):
    """The vector width in bits that a process with this environment computed rightly with."""
    done = run(AGREE.format(cell=cell, dtypes=dtypes), **environment)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_with_the_compiler_switched_off():
    assert agrees("LSTMCell", ("float32", "float64"), NUMBA_DISABLE_JIT="1") == (
        machine.vector_bits()
    )


X86 = pytest.mark.skipif(
    "avx2" not in machine.features(), reason="needs an x86 processor with AVX2"
)


@X86
@pytest.mark.parametrize(
    ("name", "features", "bits"),
    [
        ("haswell", "+sse2,+avx,+avx2,+fma", 256),
        ("x86-64", "+sse2", 128),
        ("x86-64", "-avx", 64),  # no vectors: two float32 or a float64 at a time
    ],
)
def test_on_older_processors(name, features, bits, tmp_path):
    environment = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features}
    assert agrees(TINYGRAD_SEQ_CACHE=str(tmp_path), **environment) == bits


NEON = """
import re
from tinygrad_seq.kernels import machine
machine.features = lambda: frozenset(["neon"])
import numpy as np
import tinygrad_seq as tgs
from tinygrad_seq.kernels import build, gemm, worker
from tinygrad_seq.recurrence import compiled, following
import llvmlite.binding as llvm

worker.possible = lambda: False  # what another process compiles cannot be inspected

cell = tgs.nn.RNNCell(3, 5)
ys, _ = tgs.scan(cell, np.ones((2, 2, 3), "f4"))
ys.sum().backward()
functions = [f for r in compiled._runners.values() for f in r.functions.values()]
functions.append(build.shared("product", "float32"))
llvm.initialize_all_targets()
llvm.initialize_all_asmprinters()
target = llvm.Target.from_triple("aarch64-unknown-linux-gnu")
neon = target.create_target_machine(cpu="cortex-a72", features="+neon", opt=3)
for function in functions:
    text = function.keep.inspect_llvm()
    text = re.sub(r'target (triple|datalayout) = ".*"', "", text)
    # the control word of an x86 processor has another name there
    text = re.sub(r".*(call|declare) void @llvm.x86.*", "", text)
    text = re.sub(r'"target-(cpu|features)"="[^"]*"', "", text)
    module = llvm.parse_assembly(text)
    module.triple, module.data_layout = neon.triple, str(neon.target_data)
    module.verify()
    made = neon.emit_assembly(module)
    assert re.search(r"\\tfm(la|ul)\\tv\\d+\\.4s", made), made[:2000]
    assert ".2d" not in re.sub(r"\\t(mov|movi|ldr|str|dup|ins|zip1|zip2|uzp1)\\t.*", "", made)
print("good")
"""


@X86
def test_compiled_for_neon(tmp_path):
    done = run(NEON, TINYGRAD_SEQ_CACHE=str(tmp_path))
    assert done.stdout == "good\n", done.stderr


# What is kept on disk --------------------------------------------------------------------------


def start(folder, program=None):
    return subprocess.Popen(
        [sys.executable, "-c", program or AGREE.format(cell="RNNCell", dtypes=("float32",))],
        env={**os.environ, "TINYGRAD_SEQ_CACHE": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_several_processes_compile_at_once_and_one_is_killed(tmp_path):
    killed = start(tmp_path)
    while not list(tmp_path.glob("*/*.code")) and killed.poll() is None:
        time.sleep(0.01)
    others = [start(tmp_path) for _ in range(2)]
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    for process in others:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    damaged = sorted(tmp_path.glob("*/*.code"))
    assert damaged
    for number, path in enumerate(damaged):
        path.write_bytes(path.read_bytes()[: 0 if number % 2 else 1000])
    assert agrees(TINYGRAD_SEQ_CACHE=str(tmp_path)) == machine.vector_bits()


@pytest.mark.skipif(bool(config.DISABLE_JIT), reason="the compiler is switched off")
def test_damaged_code_is_not_run(monkeypatch, tmp_path):
    monkeypatch.setenv("TINYGRAD_SEQ_CACHE", str(tmp_path))
    build.load("put", PUT, {"put": 2})
    (path,) = tmp_path.glob("*/put.code")
    good = path.read_bytes()
    machine_code = good.index(b"\x7fELF")
    for at in (0, machine_code + 64, len(good) - 1):  # in the digest, in the code, at the end
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        assert build.load("put", PUT, {"put": 2})["put"].keep.cache_hits == 0
        assert build.load("put", PUT, {"put": 2})["put"].keep.cache_hits == 1


@pytest.mark.skipif(bool(config.DISABLE_JIT), reason="the compiler is switched off")
def test_an_interrupt_while_compiled_code_is_handed_over(monkeypatch, tmp_path):
    monkeypatch.setenv("TINYGRAD_SEQ_CACHE", str(tmp_path))
    hand_over = codegen.CPUCodeLibrary.serialize_using_object_code

    def lost(library):  # for ctypes loses what a callback raises
        library._compiled_object = None
        return hand_over(library)

    with monkeypatch.context() as interrupted:
        interrupted.setattr(codegen.CPUCodeLibrary, "serialize_using_object_code", lost)
        put = build.load("put", PUT, {"put": 2})["put"]
    word = np.zeros(1, np.int64)
    put(memory.address(word), 6)
    assert word[0] == 6
    assert build.load("put", PUT, {"put": 2})["put"].keep.cache_hits == 0
    assert build.load("put", PUT, {"put": 2})["put"].keep.cache_hits == 1


@pytest.mark.skipif(bool(config.DISABLE_JIT), reason="the compiler is switched off")
def test_where_numba_keeps_what_is_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("TINYGRAD_SEQ_CACHE", str(tmp_path / "ours"))
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path / "numba"))
    monkeypatch.setattr(config, "CACHE_LOCATOR_CLASSES", "UserWideCacheLocator")
    assert build.load("put", PUT, {"put": 2})["put"].keep.cache_hits == 0
    assert build.load("put", PUT, {"put": 2})["put"].keep.cache_hits == 1
    assert len(list(tmp_path.glob("ours/*/put.code"))) == 1
    assert not (tmp_path / "numba").exists()


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TINYGRAD_SEQ_CACHE", str(tmp_path / "file" / "below"))
    with pytest.warns(RuntimeWarning, match="Set TINYGRAD_SEQ_CACHE to a folder"):
        path = build.write_module("nothing", "x = 1\n")
    assert path.read_text() == "x = 1\n"
    build.write_module("nothing_more", "x = 1\n")  # said once, and a warning is an error here
    monkeypatch.setattr(build, "LATER", 0.01)
    monkeypatch.setattr(build, "_compiling", ["a function"])
    with build.said("some cell"):
        time.sleep(0.3)
    assert "compiling some cell, for this process alone\n" in capsys.readouterr().err


def test_a_full_disk(monkeypatch, tmp_path):
    monkeypatch.setenv("TINYGRAD_SEQ_CACHE", str(tmp_path))
    write = build._write

    def full(path, content):
        if tmp_path in path.parents:
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(build, "_write", full)
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        path = build.write_module("nothing", "x = 2\n")
    assert path.read_text() == "x = 2\n"


@pytest.mark.parametrize("folders", [True, False], ids=["folders", "no folders"])
def test_nothing_can_be_written_anywhere(monkeypatch, tmp_path, folders):
    monkeypatch.setenv("TINYGRAD_SEQ_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "_temporary", cache(build._temporary.__wrapped__))

    def refused(*_, **options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(build, "_write", refused)
    if not folders:
        monkeypatch.setattr(build.tempfile, "mkdtemp", refused)
    with pytest.warns(RuntimeWarning, match="cannot be kept in .*Read-only file system"):
        put = build.load("put", PUT, {"put": 2})["put"]
    word = np.zeros(1, np.int64)
    put(memory.address(word), 7)
    assert word[0] == 7


PUT = """from tinygrad_seq.kernels.threads import set_word


def put(address, value):
    set_word(address, value)
"""


@pytest.mark.skipif(bool(config.DISABLE_JIT), reason="the compiler is switched off")
def test_a_disk_that_is_full_once_something_is_compiled(monkeypatch, tmp_path):
    monkeypatch.setenv("TINYGRAD_SEQ_CACHE", str(tmp_path))
    write = build._write

    def full(path, content):
        if path.suffix == ".code":
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(build, "_write", full)
    with pytest.warns(RuntimeWarning, match="cannot be kept in .*No space left"):
        put = build.load("put", PUT, {"put": 2})["put"]
    word = np.zeros(1, np.int64)
    put(memory.address(word), 5)
    assert word[0] == 5
    monkeypatch.undo()
    monkeypatch.setenv("TINYGRAD_SEQ_CACHE", str(tmp_path))
    build.load("put", PUT, {"put": 2})
    monkeypatch.setattr(build, "_write", full)  # what is kept there is used all the same
    assert build.load("put", PUT, {"put": 2})["put"].keep.cache_hits == 1


def test_kept_sources_that_are_no_text(monkeypatch, tmp_path):
    monkeypatch.setenv("TINYGRAD_SEQ_CACHE", str(tmp_path))
    path = build.write_module("nothing", "x = 3\n")
    path.write_bytes(b"\xff\xfe")
    assert build.write_module("nothing", "x = 3\n") == path
    assert path.read_text() == "x = 3\n"


def test_a_user_without_a_home(monkeypatch):
    for name in ("TINYGRAD_SEQ_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    assert build.write_module("nothing", "x = 4\n").read_text() == "x = 4\n"


def test_the_folder_is_bounded(monkeypatch, tmp_path):
    monkeypatch.setenv("TINYGRAD_SEQ_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "LARGEST", 2500)
    for number in range(5):
        path = build.write_module(f"entry{number}", "#" * 1000)
        os.utime(path.parent, (number, number))
    assert sorted(p.name.split("_")[0] for p, _, _ in build.entries()) == ["entry3", "entry4"]


def test_what_else_is_in_the_folder_is_let_be(monkeypatch, tmp_path):
    monkeypatch.setenv("TINYGRAD_SEQ_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "LARGEST", 10)
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "mine.txt").write_text("of much use")
    build.write_module("first", "x = 5\n")
    second = build.write_module("second", "x = 6\n")
    assert [home for home, *_ in build.entries()] == [second.parent]
    assert build.clear() == 1
    assert (tmp_path / "papers" / "mine.txt").read_text() == "of much use"


def test_files_that_go_while_they_are_counted(monkeypatch, tmp_path):
    """Another process gives what it has written its name, or deletes it."""
    monkeypatch.setenv("TINYGRAD_SEQ_CACHE", str(tmp_path))
    made = [build.write_module(name, "x = 7\n") for name in ("one", "two")]
    unnamed = [str(path.with_name("unnamed")) for path in made]
    for each in unnamed:
        Path(each).touch()
    there = os.stat

    def then_gone(path, *given, **options):
        found = there(path, *given, **options)
        if str(path) in unnamed:
            os.unlink(path)
        return found

    monkeypatch.setattr(os, "stat", then_gone)
    assert [size for _, size, _ in build.entries()] == [6, 6]


@pytest.mark.parametrize("changed", ["numba", "processor", "sources"])
def test_what_code_depends_on_is_in_the_name_of_what_is_kept(monkeypatch, tmp_path, changed):
    monkeypatch.setenv("TINYGRAD_SEQ_CACHE", str(tmp_path))
    before = build.write_module("nothing", "x = 8\n")
    made_from = cache(build.made_from.__wrapped__)
    monkeypatch.setattr(build, "made_from", made_from)
    assert build.write_module("nothing", "x = 8\n") == before
    made_from.cache_clear()
    if changed == "numba":
        monkeypatch.setattr(build.numba, "__version__", "9.9")
    elif changed == "processor":
        monkeypatch.setattr(machine, "features", lambda: frozenset({"sse2"}))
    else:
        monkeypatch.setattr(build, "sources", lambda *_: "of the next version")
    assert build.write_module("nothing", "x = 8\n") != before


def test_a_compile_says_that_it_takes_long(monkeypatch, capsys):
    monkeypatch.setattr(build, "LATER", 0.01)
    with build.said("what is kept"):  # and takes its time to load
        time.sleep(0.3)
    assert not capsys.readouterr().err
    monkeypatch.setattr(build, "_compiling", ["a function"])
    with build.said("some cell"):
        time.sleep(0.3)
    assert "compiling some cell, once; kept in" in capsys.readouterr().err
    with build.said("a quick one"):
        pass
    assert not capsys.readouterr().err


# Threads, forks, the processor's state ---------------------------------------------------------


def work(rng):
    cell = tgs.nn.RNNCell(40, 70, rng=rng)
    xs = rng.standard_normal((30, 40, 40)).astype("f4")

    def answer():
        x = tgs.tensor(xs, requires_grad=True)
        ys, _ = tgs.scan(cell, x)
        (ys * ys).sum().backward()
        return np.concatenate([np.ravel(ys.detach()), np.ravel(x.grad)])

    return answer


def test_python_threads_scan_at_once(rng):
    works = [work(rng) for _ in range(4)]
    expected = [each() for each in works]
    found: dict[int, list[np.ndarray]] = {k: [] for k in range(4)}

    def many(k):
        for _ in range(10):
            found[k].append(works[k]())

    threads = [threading.Thread(target=many, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    for k, answers in found.items():
        # parameters' gradients are shared, these are not
        assert all(np.array_equal(each, expected[k]) for each in answers)


def test_threads_that_want_the_same_code_compile_it_once(monkeypatch, rng):
    monkeypatch.setattr(compiled, "_runners", {})
    monkeypatch.setattr(following, "_precedents", {})
    cell, xs = tgs.nn.RNNCell(2, 3, rng=rng), np.ones((2, 2, 2), "f4")
    load, loaded, together = build.load, [], threading.Barrier(4)

    def slowly(name, *given):
        loaded.append(name)
        time.sleep(0.2)
        return load(name, *given)

    def scans():
        together.wait()
        tgs.scan(cell, xs)

    monkeypatch.setattr(build, "load", slowly)
    threads = [threading.Thread(target=scans) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loaded.count("RNNCell_forward") == 1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("I", "H"), [(3, 17), (40, 64), (1, 33), (70, 96), (9, 160)])
@pytest.mark.parametrize("far", [False, True])
def test_gradients_of_matrices_divided_by_either_side(monkeypatch, rng, dtype, I, H, far):
    """x (B, I) times W (I, 4H), as cells of one's own have it: the same bits, by many tasks.

    ``far``: several blocks of rows are taken in together, as if sums were very large.
    """
    monkeypatch.setattr(division, "WORTH_THREADS", 0)
    if far:
        monkeypatch.setattr(division, "FAR_SUMS", 0)
        monkeypatch.setattr(gemm, "FAR_SLABS", 4)
        monkeypatch.setattr(division, "MOST_IN_PARTS", 0)
        monkeypatch.setattr(compiled, "_runners", {})  # which have layouts
    T, B = 9, 37
    W, U = (nn.parameter(rng.standard_normal(s) / 8, dtype) for s in ((I, 4 * H), (H, 4 * H)))
    x, dy = (tgs.tensor(rng.standard_normal((T, B, n)).astype(dtype)) for n in (I, H))

    def cell(x, h):
        i, f, g, o = tgs.split(x @ W + h @ U, 4, axis=-1)
        h = tgs.sigmoid(f) * h + tgs.sigmoid(i) * tgs.tanh(g) * tgs.tanh(o)
        return h, h

    def gradients(drive):
        W.grad = U.grad = None
        drive(cell, x, tgs.zeros(B, H, dtype=dtype))[0].backward(dy)
        return W.grad.numpy(), U.grad.numpy()

    before, found = tgs.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            tgs.set_num_threads(threads)
            found.append(gradients(tgs.scan))
    finally:
        tgs.set_num_threads(before)
    for each, expected in zip(zip(*found, strict=True), gradients(tgs.unroll), strict=True):
        assert all(np.array_equal(one, each[0]) for one in each)
        size = np.abs(expected).max()
        np.testing.assert_allclose(
            each[0], expected, atol=size * (2e-5 if dtype == "float32" else 1e-13)
        )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:This process")
def test_a_fork_waits_for_a_compile_in_another_thread():
    begun, done = threading.Event(), []

    def compiles():
        with forking.alone():
            begun.set()
            time.sleep(0.3)
            done.append(True)

    thread = threading.Thread(target=compiles)
    thread.start()
    begun.wait()
    child = os.fork()
    if not child:
        os._exit(0 if done and forking.alone().acquire(timeout=1) else 1)
    assert os.waitpid(child, 0)[1] == 0
    thread.join()
    assert forking.alone().acquire(timeout=1)
    forking.alone().release()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:This process")
def test_a_forked_child_finds_no_lock_taken(rng):
    """Whatever other threads of the parent are doing just then."""
    work(rng)()  # which imports all that takes part
    kind = type(threading.Lock())
    modules = [sys.modules[name] for name in sys.modules if name.startswith("tinygrad_seq")]
    locks = [(m, name) for m in modules for name, each in vars(m).items() if type(each) is kind]
    assert len(locks) > 3
    with ExitStack() as others:
        for module, name in locks:
            others.enter_context(getattr(module, name))
        child = os.fork()
        if not child:
            os._exit(sum(not getattr(m, name).acquire(blocking=False) for m, name in locks))
        assert os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_fork_while_another_thread_imports_the_kernels():
    """Whose modules the child finds imported, and not for ever in the hands of nobody."""
    code = """
import os, sys, threading, time, numpy as np, tinygrad_seq as tgs
def scan():
    return tgs.scan(tgs.nn.RNNCell(2, 3, rng=0), np.ones((3, 2, 2), "float32"))[0].numpy()
thread = threading.Thread(target=scan)
thread.start()
while "numba" not in sys.modules:
    time.sleep(0.001)
child = os.fork()
if not child:
    scan()
    os._exit(0)
thread.join()
assert os.waitpid(child, 0)[1] == 0
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], timeout=100)
    assert done.returncode == 0


def test_a_system_that_gives_no_threads(monkeypatch, rng):
    answer = work(rng)
    expected = answer()

    def start(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    monkeypatch.setattr(pool, "_pool", None)
    monkeypatch.setattr(compiled, "_runners", {})  # a thread says what is compiled
    monkeypatch.setattr(following, "_precedents", {})
    np.testing.assert_array_equal(answer(), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:This process")
def test_a_forked_child_scans(rng):
    answer = work(rng)
    expected = answer()
    with memory._lock:  # as if another thread were taking memory just now
        child = os.fork()
        if not child:
            os._exit(0 if np.array_equal(answer(), expected) else 1)
    for _ in range(600):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        pytest.fail("the child hangs")
    assert status == 0
    assert np.array_equal(answer(), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:This process")
def test_a_forked_child_orders_rows(monkeypatch):
    """While another thread of the parent is in the middle of that."""
    begun, forked, address = threading.Event(), threading.Event(), memory.address

    def slow(array):
        if threading.current_thread() is thread:
            begun.set()
            forked.wait(60)
        return address(array)

    def orders(first):
        return ragged.rows_of(9, 3, np.array([first, 4, 2]), False).addresses

    monkeypatch.setattr(ragged, "address", slow)
    thread = threading.Thread(target=orders, args=(1,))
    thread.start()
    begun.wait(60)
    child = os.fork()
    if not child:
        signal.alarm(10)  # which ends it if it hangs
        os._exit(0 if orders(3) else 1)
    status = os.waitpid(child, 0)[1]
    forked.set()
    thread.join()
    assert status == 0


def test_small_numbers_are_flushed_in_kernels_alone():
    def cell(x, h):
        h = h * 0.01
        return h, h

    ys, _ = tgs.scan(cell, np.zeros((25, 2, 1), "f4"), np.ones((2, 3), "f4"))
    assert (np.asarray(ys)[-1] == 0).all()  # 1e-50, by way of 1e-40
    assert np.float32(1e-40) * np.float32(0.5) > 0  # and here they still exist


def test_memory_is_used_again_and_never_shared():
    first = memory.empty((300, 300), np.dtype("f4"))
    second = memory.empty((300, 300), np.dtype("f4"))
    assert memory.address(first) == first.ctypes.data
    assert memory.address(first) != memory.address(second)
    address, view = memory.address(first), first[1:]
    del first
    third = memory.empty((300, 300), np.dtype("f4"))
    assert memory.address(third) != address  # a view of it is still there
    del view
    assert memory.address(memory.empty((300, 300), np.dtype("f4"))) == address


LIVES_LONGER = """
import sys, threading
import tinygrad_seq as tgs
from tinygrad_seq.kernels import memory

sys.kept = lambda: memory  # so that the interpreter empties the module before it lets go of it
threading.kept = memory.Block(10**6)
"""


def test_memory_that_lives_longer_than_its_module_says_nothing(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(LIVES_LONGER)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert done.stderr == ""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timers")
def test_an_interrupt_leaves_no_lock_behind(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(memory, "_waiting", {})
    monkeypatch.setattr(memory, "_bytes", 0)
    piece = np.empty(4096, np.uint8), 0
    before = signal.signal(signal.SIGALRM, interrupt)

    def give_back_until_interrupted(seconds):
        signal.setitimer(signal.ITIMER_REAL, seconds)
        while True:
            memory._give_back(piece)

    try:
        for number in range(2000):
            with pytest.raises(KeyboardInterrupt):
                give_back_until_interrupted(1e-6 + 1e-7 * (number % 99))
            assert not memory._lock.locked()
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_block_for_which_there_is_no_memory(monkeypatch):
    said: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    with pytest.raises(MemoryError):
        memory.Block(2**62)
    gc.collect()
    assert not said


def test_layouts_of_many_lengths_are_not_all_kept(monkeypatch):
    monkeypatch.setattr(cpu, "MOST_LAYOUTS", 5)
    monkeypatch.setattr(compiled, "_runners", {})
    cell = nn.RNNCell(2, 3)
    for T in range(1, 12):
        ys, _ = tgs.scan(cell, np.ones((T, 1, 2), "f4"))
        ys.sum().backward()
    (runner,) = compiled._runners.values()
    assert 0 < sum(len(each.made) for each in runner._layouts.values()) <= 5


ONE_SHORT = [*[400] * 7, 1]


@pytest.mark.parametrize("fewest", [8, 9])
@pytest.mark.parametrize(
    ("lengths", "threads"),
    [(None, 1), (None, 2), (None, 3), (ONE_SHORT, 1), (ONE_SHORT, 2), (ONE_SHORT, 3)],
)
def test_tasks_wait_for_each_other_only_where_they_share_sums(
    monkeypatch, rng, lengths, threads, fewest
):
    monkeypatch.setattr(division, "WORTH_THREADS", 0)
    monkeypatch.setattr(division, "FEWEST_DEALT", fewest)
    monkeypatch.setattr(compiled, "_runners", {})
    before = tgs.get_num_threads()
    tgs.set_num_threads(threads)
    try:
        ys, _ = tgs.scan(nn.LSTMCell(2, 3), rng.random((400, 8, 2), "f4"), lengths=lengths)
        ys.sum().backward()
    finally:
        tgs.set_num_threads(before)
    (runner,) = compiled._runners.values()
    found = {each.direction: each for each in runner._layouts.popitem()[1].made.values()}
    back, forward = found["backward"], found["forward"]
    first = back.functions.index("backward")
    table = back.template[: back.phases * PHASE_WORDS].reshape(-1, PHASE_WORDS)[first:]
    if back.division.parts > 1:  # whose sums are joined in the end, by all
        assert back.functions[-1] == "join"
        assert table[-1, TASKS] == back.division.tasks
        table = table[:-1]
    dealt = lengths is not None and fewest <= 8
    tasks = {1: 2, 2: 2, 3: 6}[threads] if dealt else threads
    assert back.division.parts == (1 if lengths is not None and not dealt else 2)
    later = pool.AFTER if back.division.parts % tasks == 0 else tasks
    assert table[:, TASKS].tolist() == [tasks, *[later] * (len(table) - 1)]
    steps = table[:, [FROM_STEP, TO_STEP]].tolist()
    assert steps == sorted(steps, reverse=True)
    assert len(table) > 4  # of some segments
    assert back.threads == threads
    if tasks > 1:  # rows fetched beyond the last one of a task are not another's
        longest = max(v for name, v in forward.values.items() if re.fullmatch(r"z\d+_row", name))
        assert forward.values["scratch_bytes"] > layout.FETCHED_AHEAD * longest * 4


@pytest.mark.parametrize(
    ("limit", "lengths"), [("MOST_IN_PARTS", None), ("MOST_IF_DEALT", ONE_SHORT)]
)
def test_rows_are_dealt_with_larger_sums_too(monkeypatch, rng, limit, lengths):
    """Each limit is that of its own kind of batch: W (12, 2) and U (12, 3) in float32 are 240 B."""
    monkeypatch.setattr(division, "FEWEST_DEALT", 8)
    assert division.MOST_IN_PARTS < division.MOST_IF_DEALT
    for most, parts in ((240, 2), (239, 1)):
        monkeypatch.setattr(compiled, "_runners", {})
        monkeypatch.setattr(division, limit, most)
        ys, _ = tgs.scan(nn.LSTMCell(2, 3), rng.random((400, 8, 2), "f4"), lengths=lengths)
        ys.sum().backward()
        (runner,) = compiled._runners.values()
        assert [each.parts for each in runner._layouts.values()] == [parts]


def test_lanes_of_this_machine():
    assert simd.lanes("float32") == 2 * simd.lanes("float64") == machine.vector_bits() // 32
    assert Path(build.folder()).name


@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=40),
    tasks=st.integers(1, 5),
    parts=st.integers(1, 3),
    steps=st.sampled_from([1, 7, division.ALL_STEPS]),
)
def test_edges_of_tasks_cover_all_rows_in_every_segment(lengths, tasks, parts, steps):
    B, tasks = len(lengths), tasks * parts
    rows, starts = ragged.rows_of(30, B, np.array(lengths), False), division.edges_of(B, parts)
    if parts > 1:
        rows = ragged.dealt(rows, parts)
    edges = ragged.task_edges(rows, tasks, steps)
    assert edges.shape == (-(-max(rows.steps, 1) // steps), tasks + 1)
    assert (edges[:, :: tasks // parts] == starts).all()
    assert (np.diff(edges) >= 0).all()
    assert not (edges[:, 1:-1] % division.chunk(B))[edges[:, 1:-1] < B].any()


@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=70),
    parts=st.integers(2, 3),
    reverse=st.booleans(),
)
def test_parts_of_the_batch_have_rows_of_every_length(lengths, parts, reverse):
    B, lengths = len(lengths), np.array(lengths)
    together = ragged.rows_of(30, B, lengths, reverse)
    edges = division.edges_of(B, parts)
    rows = ragged.dealt(together, parts)
    assert sorted(rows.batch) == list(range(B))
    assert (rows.ends == lengths[rows.batch]).all()
    assert (rows.begin == (rows.ends - 1 if reverse else 0)).all()
    assert (rows.steps, rows.ragged) == (together.steps, together.ragged)
    assert rows.addresses[-1] == 8 * 31
    least = int(np.diff(edges).min())
    work = []
    for active, (low, high) in zip(rows.active, pairwise(edges), strict=True):
        assert (np.diff(rows.ends[low:high]) <= 0).all()
        for s in range(31):
            assert active[s] == low + (rows.ends[low:high] > s).sum()
        work.append(rows.ends[low : low + least].sum())
    assert max(work) - min(work) <= max(lengths)


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    reverse=st.booleans(),
    checkpoint=st.sampled_from([None, 1, 4]),
    states=st.booleans(),
    fewest=st.sampled_from([4, 16]),
)
def test_arrays_are_zero_where_rows_have_ended(lengths, reverse, checkpoint, states, fewest):
    compiled._runners.clear()  # whose layouts may be for other parts
    W = tgs.tensor(np.ones((3, 5)))

    def cell(x, h):
        y = tgs.tanh(x @ W + 1)
        return (y, y[:, 2]), y + h if states else ()

    xs = tgs.tensor(np.ones((9, len(lengths), 3)), requires_grad=True)
    h0 = np.zeros((len(lengths), 5)) if states else ()
    with (
        mock.patch.object(division, "FEWEST_DEALT", fewest),
        mock.patch.object(memory, "empty", lambda shape, dtype: np.full(shape, np.nan, dtype)),
    ):
        (ys, single), _ = tgs.scan(
            cell, xs, h0, lengths=lengths, reverse=reverse, checkpoint=checkpoint
        )
        (tgs.sum(ys) + tgs.sum(single)).backward()
    for b, length in enumerate(lengths):
        for array in (ys, single, xs.grad):
            assert not array.numpy()[length:, b].any()
            assert array.numpy()[:length, b].all()
            assert np.isfinite(array.numpy()).all()
