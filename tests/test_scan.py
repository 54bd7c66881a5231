"""``scan`` against ``unroll``: results, and the gradients of everything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from cells import CELLS, make_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from tinygrad_seq.kernels import division

import tinygrad_seq as tgs
from tinygrad_seq import nn
from tinygrad_seq.recurrence.compiled import plan_of, prepare
from tinygrad_seq.trees import leaves, map_leaves

TOLERANCE = {"float32": 2e-4, "float64": 1e-11}  # relative to the largest value of an array


def results(driver, cell, xs, state, weights, **options):
    """Outputs, last states, and gradients of inputs, initial states and parameters."""
    tracked = map_leaves(
        lambda a: tgs.tensor(a, requires_grad=np.asarray(a).dtype.kind == "f"), (xs, state)
    )
    for parameter in cell.parameters():
        parameter.grad = None
    tgs.manual_seed(0)  # of the cells that draw random numbers
    ys, last = driver(cell, *tracked, **options)
    outputs = [*leaves(ys), *leaves(last)]
    loss = sum((y * w).sum() for y, w in zip(outputs, weights(outputs), strict=True))
    loss.backward()
    found = [t.grad for t in (*leaves(tracked), *cell.parameters())]
    return list(map(np.asarray, outputs)), [None if g is None else np.asarray(g) for g in found]


def check_same(first, second, dtype):
    for found, expected in zip(first, second, strict=True):
        if expected is None:
            assert found is None or not found.any()
            continue
        assert found.shape == expected.shape
        assert found.dtype == expected.dtype
        if expected.size:
            size = max(1.0, np.abs(expected).max())
            np.testing.assert_allclose(found, expected, atol=TOLERANCE[dtype] * size, rtol=0)


def compare(name, dtype, rng, T, B, I, H, **options):
    cell = CELLS[name](rng, dtype, I, H)
    xs = make_inputs(name, rng, T, B, I, dtype)
    state = map_leaves(
        lambda t: 0.5 * rng.standard_normal(t.shape).astype(dtype), cell.initial_state(B)
    )
    seed = int(rng.integers(2**31))

    def weights(outputs):
        drawn = np.random.default_rng(seed)
        return [drawn.standard_normal(y.shape).astype(dtype) for y in outputs]

    checkpoint = options.pop("checkpoint", None)
    expected = results(tgs.unroll, cell, xs, state, weights, **options)
    found = results(tgs.scan, cell, xs, state, weights, **options, checkpoint=checkpoint)
    check_same(found[0], expected[0], dtype)
    check_same(found[1], expected[1], dtype)


@pytest.mark.parametrize("name", CELLS)
@settings(max_examples=25)
@given(data=st.data())
def test_against_unroll(name, data):
    T, B = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 7))
    I, H = data.draw(st.sampled_from([1, 2, 5, 17])), data.draw(st.sampled_from([1, 2, 3, 16, 33]))
    if name == "odd":
        H = max(H, 5)  # so that what is turned round is no few pieces, which would be joined
    dtype = data.draw(st.sampled_from(["float64", "float32"]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    options = {"reverse": data.draw(st.booleans())}
    if data.draw(st.booleans()):
        options["lengths"] = rng.integers(0, T + 1, B)
    if data.draw(st.booleans()):
        options["resets"] = rng.random((T, B)) < 0.3
    if data.draw(st.booleans()):
        options["checkpoint"] = data.draw(st.integers(1, T + 1))
    with mock.patch.object(division, "FEWEST_DEALT", 4):  # few rows are dealt to parts here
        compare(name, dtype, rng, T, B, I, H, **options)


@pytest.mark.parametrize("program", ["random_cells.py 0 100", "odd_cells.py"])
def test_cells_that_nobody_thought_of(program, tmp_path):
    """Cells put together at random, with several blocks and segments in a few steps; and others."""
    name, *arguments = program.split()
    command = [sys.executable, str(Path(__file__).with_name(name)), *arguments]
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1", "TINYGRAD_SEQ_CACHE": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.parametrize("options", [{}, {"checkpoint": 3}, {"lengths": [9, 0, 4]}])
def test_states_that_are_read_after_the_loop(options):
    """Where nothing is kept, a state lasts for a step; where rows are sorted, a factor is too."""
    rng = np.random.default_rng(0)
    cell = CELLS["state space"](rng, "float64", 2, 5)
    scale = rng.standard_normal((3, 2))
    run = (lambda x, state: cell(x * scale, state), rng.standard_normal((9, 3, 2)))
    start = cell.initial_state(3)
    expected = tgs.unroll(*run, start, lengths=options.get("lengths"))
    with tgs.no_grad():
        found = tgs.scan(*run, start, **options)
    for a, b in zip(leaves(found), leaves(expected), strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), atol=1e-12)


@pytest.mark.parametrize("inner", [lambda x, h: h[:, ::-1], lambda x, h: tgs.concat([h, x], -1)])
def test_states_that_are_joined_after_the_loop_in_a_joint(rng, inner):
    """The state that a row had in its own step, not the newest one."""
    xs, state = rng.standard_normal((5, 2, 2)), rng.standard_normal((2, 2))
    W = tgs.tensor(rng.standard_normal((2, 3)))

    def cell(x, h):
        joined = tgs.concat([h @ W, inner(x, h)], axis=-1)
        return (tgs.sin(joined), joined.sum(axis=-1)), tgs.sin(h + x)

    found, _ = tgs.scan(cell, xs, state)
    expected, _ = tgs.unroll(cell, xs, state)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_what_is_chosen_and_counted():
    """Pieces are joined without arithmetic; a number of conditions is no condition."""
    xs = np.array([[[0.5, -np.inf, 2.0, np.nan]]])
    order = [3, 1, 2, 0]

    def cell(x, h):
        known = (x > 0).sum(axis=1)
        late = (x[:, 0] > 0) | np.array([False])
        return (x[:, ::-1], x[:, order], known.to(bool).to("float64"), late.to("float64")), h

    for drive in (tgs.scan, tgs.unroll):
        (back, chosen, known, late), _ = drive(cell, xs, np.zeros((1, 2)))
        np.testing.assert_array_equal(back.numpy(), xs[..., ::-1])
        np.testing.assert_array_equal(chosen.numpy(), xs[..., order])
        assert known.numpy() == 1.0
        assert late.numpy() == 1.0


def test_a_choice_of_two_numbers_is_in_the_default_dtype():
    def cell(x, h):
        h = h * tgs.where(x > 0, 0.1, 0.7) + x
        return h, h

    x, h = np.linspace(-1, 1, 24).reshape(4, 2, 3), np.ones((2, 3))
    ys, _ = tgs.scan(cell, x, h)
    assert ys.dtype == np.float64
    np.testing.assert_allclose(ys.numpy(), tgs.unroll(cell, x, h)[0].numpy(), rtol=1e-15)


def test_what_is_computed_of_a_joint_is_computed_of_its_parts(rng):
    """Of the gradient that the GRU's gates get, only the reset gate's waits for a product."""
    for reset_after, passes in ((False, [1, 1, 1]), (True, [1, 1])):
        cell = nn.GRUCell(3, 4, reset_after=reset_after)
        call, needs = prepare(cell, rng.standard_normal((2, 2, 3)).astype("f4"), None)
        plan = plan_of(call.step, needs, "GRU")
        stages = plan.backward.sections["loop"]
        assert [len(stage.passes) for stage in stages if hasattr(stage, "passes")] == passes


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_row_divided_by_one_number(dtype):
    """By its inverse, whatever its size."""
    limits = np.finfo(dtype)
    huge, tiny = float(limits.max), float(limits.tiny)
    below = [3.0, -0.7, huge, huge / 3, tiny, 2 * tiny, 0.0, np.inf, -np.inf, np.nan]
    above = [1.0, -3.0, huge, huge / 7, 4 * tiny, 0.0, np.inf, np.nan]
    below, xs = np.array(below, dtype)[:, None], np.tile(np.array(above, dtype), (1, 10, 1))

    def cell(x, h):
        return {"row": x / h, "sum": x * 0.125 / (x.sum(axis=-1, keepdims=True))}, h

    with np.errstate(all="ignore"):
        found, _ = tgs.scan(cell, xs, below)
        expected, _ = tgs.unroll(cell, xs, below)
        for key, true in expected.items():
            true = np.where(abs(np.asarray(true)) < tiny, 0, true)  # as kernels have it
            np.testing.assert_allclose(found[key], true, rtol=2 * limits.eps, atol=tiny)


def test_logsumexp_of_nothing_but_minus_infinity():
    rows = np.array([[-np.inf, -np.inf], [-np.inf, 1.0], [np.nan, 1.0]])
    xs = tgs.tensor(rows[None], requires_grad=True)

    def cell(x, h):
        return tgs.logsumexp(x, axis=-1) + h, h

    for drive in (tgs.scan, tgs.unroll):
        ys, _ = drive(cell, xs, np.zeros(3))
        np.testing.assert_array_equal(ys[0], [-np.inf, 1, np.nan])
        xs.grad = None
        ys.sum().backward()
        np.testing.assert_array_equal(xs.grad[0], [[0, 0], [0, 1], [np.nan, np.nan]])


def test_integers_that_a_float_does_not_hold():
    xs = np.full((2, 1, 3), 2**24 + 1)
    with pytest.raises(ValueError, match=r"16777217.*float32.*unroll"):
        tgs.scan(lambda x, h: (h * (x == 2**24), h), xs, np.zeros((1, 3), "f4"))
    with pytest.raises(ValueError, match="16777217 stands beside integers at line"):
        tgs.scan(lambda x, h: (h * (x == 2**24 + 1), h), xs - 1, np.zeros((1, 3), "f4"))
    ids = tgs.tensor(xs[0, 0])
    with pytest.raises(ValueError, match=r"16777217.*float32.*unroll"):
        tgs.scan(lambda x, h: (h * (x == ids), h), np.ones((2, 1, 3), "f4"), np.zeros((1, 3), "f4"))


def test_numbers_that_change_are_looked_at_each_time():
    """What is followed from an earlier call, too."""
    xs, start = np.full((2, 1, 1), 2**24), np.zeros((1, 1), "f4")
    for number in (3, 4, 2**24):
        ys, _ = tgs.scan(lambda x, h: (h + (x == number), h), xs, start)  # noqa: B023
        assert ys.numpy().all() == (number == 2**24)
    with pytest.raises(ValueError, match="16777217 stands beside integers"):
        tgs.scan(lambda x, h: (h + (x == 2**24 + 1), h), xs, start)


@pytest.mark.parametrize("t", [tgs.tensor(0.1, "float64"), np.array(0.1)])
def test_a_double_without_axes_is_no_python_number(t):
    xs, start = np.full((2, 1, 1), 0.1, "f4"), np.zeros((1, 1), "f4")
    with pytest.raises(
        tgs.TraceError, match=r"float64 and shape \(\) is used in a step of dtype f"
    ):
        tgs.scan(lambda x, h: (tgs.where(x > t, 1.0, 0.0) + 0 * h, h), xs, start)


def test_what_nothing_depends_on_gets_no_gradient():
    x = tgs.tensor(np.ones((2, 1, 1)), requires_grad=True)
    h = tgs.tensor(np.ones((1, 1)), requires_grad=True)
    for driver in (tgs.unroll, tgs.scan):
        ys, _ = driver(lambda x, h: (h * 2, h), x, h)
        ys.sum().backward()
        assert x.grad is None
        assert h.grad.item() == 4
        h.grad = None
    assert tgs.grad(lambda x: tgs.scan(lambda x, h: (h * 2, h), x, h)[0].sum())(x).shape == x.shape


def test_a_cell_with_a_long_name():
    def cell(x, h):
        return h + x, h

    cell.__name__ = "c" * 300
    tgs.scan(cell, np.ones((2, 1, 1)), np.zeros((1, 1)))


def test_gradcheck_takes_the_compiled_way(monkeypatch):
    from tinygrad_seq.recurrence import recorded

    W = tgs.tensor(np.eye(2), requires_grad=True)
    xs = np.random.default_rng(0).standard_normal((3, 2, 2))

    def f(x):
        return tgs.scan(lambda x, h: (tgs.tanh(x @ W + h), h), x, np.zeros((2, 2)))[0]

    assert tgs.gradcheck(f, xs)
    right = recorded.Run.pull
    monkeypatch.setattr(
        recorded.Run, "pull", lambda *a: [g if g is None else g * 1.1 for g in right(*a)]
    )
    with pytest.raises(AssertionError, match="central differences"):
        tgs.gradcheck(f, xs)


def test_a_cell_without_state():
    W = tgs.tensor(np.ones((2, 3), "f4"), requires_grad=True)
    xs = np.ones((4, 5, 2), "f4")
    ys, state = tgs.scan(lambda x, s: (tgs.tanh(x @ W), s), xs, ())
    assert state == ()
    np.testing.assert_allclose(ys.numpy(), np.full((4, 5, 3), np.tanh(2)), rtol=1e-6)
    ys.sum().backward()
    np.testing.assert_allclose(W.grad.numpy(), np.full((2, 3), 20 * (1 - np.tanh(2) ** 2)), 1e-4)


# What a reader sees ----------------------------------------------------------------------------


def test_the_lstms_plan():
    """Gates are one product for x, before the loop, and one for h in it; nothing else is."""
    cell = tgs.nn.LSTMCell(3, 5)
    text = str(tgs.explain(cell, np.zeros((4, 2, 3), "f4")))
    lines = text.splitlines()
    assert lines[:3] == ["LSTMCell: 23 rows, computed in float32", "a step:", "  %0 = x 0"]
    assert lines[25:33] == [
        "closed over: matrix 0 is W_ihᵀ, matrix 1 is W_hhᵀ, capture 2 is b",
        "forward:",
        "  packed before: matrix 0, matrix 1",
        "  before the loop, a block of steps at once:",
        "    product: %4 = matmul(%0, matrix 0)",
        "  in the loop:",
        "    product: %57 = add_matmul(%1, matrix 1, %4)",
        "    pass 1:",
    ]
    assert "  buffers of each task, for a block of steps: %4, %0\n" in text
    named = {int(name) for name in re.findall(r"%(\d+)", text)}
    defined = {int(name) for name in re.findall(r"%(\d+) =", text)}
    plan = tgs.explain(cell, tgs.zeros(4, 2, 3).to("float32"))
    arriving = {k for k, row in enumerate(plan.rows) if row.op in ("dy", "dstate", "assemble")}
    assert named <= defined | arriving
    assert [plan.rows[k].op for k in plan.kept] == ["sigmoid", "sigmoid", "tanh", "sigmoid"]
    forward, backward = plan.forward.sections, plan.backward.sections
    products = {
        (p.direction, name): [s.slot for s in stages if not hasattr(s, "passes")]
        for p in (plan.forward, plan.backward)
        for name, stages in p.sections.items()
    }
    counts = {key: len(slots) for key, slots in products.items()}
    assert counts == {
        ("forward", "early"): 1,  # W x
        ("forward", "loop"): 1,  # U h
        ("forward", "late"): 0,
        ("backward", "early"): 0,
        ("backward", "loop"): 1,  # the gradient of h
        ("backward", "late"): 0,  # the inputs require no gradient here
    }
    assert len(plan.derivative.outer) == 2  # weights: one large product each, after the loop
    assert len(plan.derivative.sums) == 1  # the bias
    assert [len(stage.passes) for stage in forward["loop"] if hasattr(stage, "passes")] == [1]
    assert [len(stage.passes) for stage in backward["loop"] if hasattr(stage, "passes")] == [1]


def test_parameters_in_a_dict_have_names():
    p = {"W": tgs.ones(3, 4), "gates": [tgs.ones(4, 4), tgs.ones(4)]}

    def cell(x, h):
        h = tgs.tanh(x @ p["W"] + h @ p["gates"][0] + p["gates"][1])
        return h, h

    text = str(tgs.explain(cell, np.zeros((4, 2, 3), "f4"), np.zeros((2, 4), "f4")))
    assert "matrix 0 is p.W, matrix 1 is p.gates.0, capture 2 is p.gates.1\n" in text


@pytest.mark.parametrize("options", [{}, {"peephole": True}, {"coupled": True}])
def test_gate_math_is_one_pass(options):
    """What becomes the state is as wide as what it is computed from."""
    cell = tgs.nn.LSTMCell(3, 5, **options) if options else tgs.nn.RNNCell(3, 5)
    xs = np.zeros((4, 2, 3), "f4")
    with tgs.no_grad():
        call, needs = prepare(cell, xs, None)
    for plan in (plan_of(call.step, None, "f"), plan_of(call.step, needs, "f")):
        stages = [s for s in plan.forward.sections["loop"] if hasattr(s, "passes")]
        assert [[len(each.loops) for each in stage.passes] for stage in stages] == [[1]]


def test_source_is_a_file_with_tape_lines():
    cell = tgs.nn.GRUCell(3, 5)
    xs = np.zeros((4, 2, 3), "f4")
    forward, backward = tgs.kernel_source(cell, xs), tgs.kernel_source(cell, xs, backward=True)
    assert forward.path.read_text(encoding="utf-8") == forward.text == str(forward)
    assert "def forward(table, task, phase):" in forward.text
    assert "def backward(table, task, phase):" in backward.text
    assert re.search(r"# %(\d+) = sigmoid\(%(\d+)\)\n.*v\1 = sigmoid\(v\2\)", forward.text)
    compile(forward.text, str(forward.path), "exec")


def test_compiled_float32_holds_no_double(monkeypatch, tmp_path):
    from tinygrad_seq.kernels import build, library, tiles, worker

    from tinygrad_seq.recurrence import compiled

    monkeypatch.setenv("TINYGRAD_SEQ_CACHE", str(tmp_path))  # what was kept cannot be inspected
    monkeypatch.setattr(worker, "possible", lambda: False)  # nor what another process compiles
    monkeypatch.setattr(compiled, "_runners", {})
    for name in ("lstm", "odd", "layer norm lstm"):
        rng = np.random.default_rng(0)
        cell = CELLS[name](rng, "float32", 3, 5)
        xs = tgs.tensor(make_inputs(name, rng, 4, 2, 3, "float32"))
        ys, _ = tgs.scan(cell, xs)
        ys.sum().backward()
    functions = [f for r in compiled._runners.values() for f in r.functions.values()]
    assert all("x float>" in function.keep.inspect_llvm() for function in functions)
    monkeypatch.setenv("TINYGRAD_SEQ_CACHE", str(tmp_path / "once more"))
    for module, counts in library.MODULES.items():
        if module != "tiles" or tiles.used("float32"):
            text = library.text("float32", module)
            functions += build.load(f"{module}_float32", text, counts).values()
    for function in functions:
        assert "double" not in function.keep.inspect_llvm().replace("double*", "")


# Sizes, threads, order --------------------------------------------------------------------------


def bits(driver, cell, xs, dy, **options):
    x = tgs.tensor(xs, requires_grad=True)
    cell.zero_grad()
    ys, last = driver(cell, x, **options)
    (ys * dy).sum().backward()
    found = [ys, *leaves(last), x.grad, *(p.grad for p in cell.parameters())]
    return [np.asarray(v).copy() for v in found]


@pytest.mark.parametrize("name", ["lstm", "layer norm lstm", "recurrent highway"])
def test_threads_change_no_bit(name, rng):
    T, B, I, H = 33, 37, 40, 70  # some segments on the way back, and a shorter one
    cell = CELLS[name](rng, "float32", I, H)
    xs, dy = rng.standard_normal((T, B, I), "f4"), rng.standard_normal((T, B, H), "f4")
    before = tgs.get_num_threads()
    try:
        lengths = {"lengths": rng.integers(0, T + 1, B)}
        for options in ({}, lengths, {"checkpoint": 20}, lengths | {"checkpoint": 20}):
            results = []
            for threads in (1, 2, 3, 7, 2):
                tgs.set_num_threads(threads)
                results.append(bits(tgs.scan, cell, xs, dy, **options))
            for other in results[1:]:
                for a, b in zip(results[0], other, strict=True):
                    np.testing.assert_array_equal(a, b)
    finally:
        tgs.set_num_threads(before)


def test_threads_change_no_bit_of_what_is_summed_before_the_loop(rng, monkeypatch):
    """Tasks with fewer rows do more steps at once there."""
    monkeypatch.setattr(division, "WORTH_THREADS", 0)
    W, U, bias = (
        tgs.tensor(rng.standard_normal(shape, "f4"), requires_grad=True)
        for shape in ((5, 4), (4, 4), (5,))
    )

    def cell(x, h):
        h = tgs.tanh(tgs.tanh(x * bias) @ W + h @ U)
        return h, h

    x, state, found = rng.standard_normal((40, 16, 5), "f4"), np.zeros((16, 4), "f4"), []
    before = tgs.get_num_threads()
    try:
        for threads in (1, 2, 3):
            tgs.set_num_threads(threads)
            bias.grad = None
            tgs.scan(cell, x, state)[0].sum().backward()
            found.append(bias.grad.numpy())
    finally:
        tgs.set_num_threads(before)
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], found[0])


def test_recording_changes_no_bit(rng):
    cell = CELLS["lstm"](rng, "float32", 5, 19)
    xs = rng.standard_normal((9, 4, 5), "f4")
    with tgs.no_grad():
        plain, _ = tgs.scan(cell, xs)
    recorded, _ = tgs.scan(cell, xs)
    assert recorded.requires_grad
    assert not plain.requires_grad
    np.testing.assert_array_equal(plain, recorded.detach())


def test_nothing_that_varies_compiles_again(rng):
    from tinygrad_seq.recurrence import compiled

    slope = 0.1

    def cell(x, h):
        h = tgs.tanh(x @ W + h @ U) * slope + x[:, :k] * 0.5
        return h, h

    def run(T, B, I, H, **options):
        nonlocal W, U, k
        W = tgs.tensor(rng.standard_normal((I, H), "f4"), requires_grad=True)
        U = tgs.tensor(rng.standard_normal((H, H), "f4"), requires_grad=True)
        k = H
        state = np.zeros((B, H), "f4")
        ys, _ = tgs.scan(cell, rng.standard_normal((T, B, I), "f4"), state, **options)
        ys.sum().backward()

    W = U = k = None
    run(5, 3, 9, 4)
    before = set(compiled._runners)
    slope = 0.3
    run(7, 2, 6, 5)
    run(1, 1, 9, 2, lengths=[1], reverse=True)
    run(3, 2, 8, 7, resets=rng.random((3, 2)) < 0.5, checkpoint=2)
    assert set(compiled._runners) == before


@pytest.mark.parametrize("name", ["lstm", "odd", "switched", "layer norm lstm"])
def test_second_derivative(name, rng):
    T, B, I, H = 3, 2, 2, 3
    cell = CELLS[name](rng, "float64", I, H)
    xs = make_inputs(name, rng, T, B, I, "float64")
    lengths = [3, 1]

    def gradient_size(driver):
        tracked = map_leaves(lambda a: tgs.tensor(a, requires_grad=a.dtype.kind == "f"), xs)
        cell.zero_grad()
        ys, _ = driver(cell, tracked, lengths=lengths)
        first = leaves(tracked)[-1]  # floating: the only one, or "value"
        loss = sum((y * y).sum() for y in leaves(ys))
        loss.backward(create_graph=True)
        size = (first.grad * first.grad).sum()
        gradient = first.grad
        cell.zero_grad()
        first.grad = None
        size.backward()
        found = [gradient.detach(), first.grad, *(p.grad for p in cell.parameters())]
        return [None if g is None else np.asarray(g) for g in found]

    for a, b in zip(gradient_size(tgs.scan), gradient_size(tgs.unroll), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            np.testing.assert_allclose(a, b, atol=1e-10)


def test_gradcheck(rng):
    cell = CELLS["peephole"](rng, "float64", 2, 3)
    state = tuple(rng.standard_normal((2, 3)) for _ in range(2))
    assert tgs.gradcheck(
        lambda x, s: tgs.scan(cell, x, s, lengths=[4, 2]), (rng.standard_normal((4, 2, 2)), state)
    )


def test_what_is_kept_is_used_again(rng):
    """Two ways back through one scan give the same; then it is gone."""
    cell = CELLS["gru"](rng, "float32", 3, 4)
    x = tgs.tensor(rng.standard_normal((5, 2, 3), "f4"), requires_grad=True)
    ys, _ = tgs.scan(cell, x)
    loss = (ys * ys).sum()
    loss.backward(retain_graph=True)
    first = x.grad.numpy().copy()
    x.grad = None
    loss.backward()
    np.testing.assert_array_equal(first, x.grad)
    with pytest.raises(tgs.TapeError, match="freed"):
        loss.backward()


def test_a_value_that_was_replaced_is_noticed(rng):
    cell = CELLS["rnn"](rng, "float32", 3, 4)
    ys, _ = tgs.scan(cell, rng.standard_normal((5, 2, 3), "f4"))
    cell.weight_hh.data = cell.weight_hh.data * 2
    with pytest.raises(tgs.TapeError, match=r"\.data"):
        ys.sum().backward()


def test_non_commuting_jacobians(rng):
    """Rotations about different axes, step after step: the order of the products matters."""
    turns = [np.linalg.qr(rng.standard_normal((3, 3)))[0] for _ in range(2)]
    A, C = (tgs.tensor(t, requires_grad=True) for t in turns)

    def cell(x, h):
        h = tgs.where(x > 0, h @ A, h @ C)
        return h, h

    xs = np.array([1.0, -1, -1, 1, -1, 1])[:, None, None] * np.ones((6, 2, 1))
    start = rng.standard_normal((2, 3))
    h = tgs.tensor(start, requires_grad=True)
    _, last = tgs.scan(cell, xs, h)
    weights = rng.standard_normal((2, 3))
    (last * weights).sum().backward()
    product = np.eye(3)
    for x in xs[:, 0, 0]:
        product = product @ (turns[0] if x > 0 else turns[1])
    np.testing.assert_allclose(last.detach(), start @ product, atol=1e-12)
    np.testing.assert_allclose(h.grad, weights @ product.T, atol=1e-12)


def test_single_numbers_cut_and_chains_of_products(rng):
    W, U = (tgs.tensor(rng.standard_normal(s, "f4"), requires_grad=True) for s in ((3, 4), (4, 4)))

    def single(x, h):
        s = tgs.sum(h, axis=1, keepdims=True) * 2
        h = tgs.tanh(s[:, :1] * h + x @ W)
        return h, h

    def chain(x, h):
        p, q = x @ W, h @ U
        z = p + q + (h * p) @ U
        a, b = tgs.split(tgs.exp(-z * z), 2, axis=-1)
        return p + q, tgs.concat([a + b, a - b], axis=-1)

    xs, start = rng.standard_normal((5, 3, 3), "f4"), rng.standard_normal((3, 4), "f4")
    for cell in (single, chain):
        found = []
        for driver in (tgs.scan, tgs.unroll):
            x, h = (tgs.tensor(each, requires_grad=True) for each in (xs, start))
            W.grad = U.grad = None
            ys, last = driver(cell, x, h)
            ((ys * ys).sum() + last.sum()).backward()
            found.append([ys.detach(), last.detach(), x.grad, h.grad, W.grad])
        for a, b in zip(*found, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_value_kept_from_another_call(rng):
    kept = []

    def cell(x, h):
        h = tgs.tanh(x + h)
        kept.append(h)
        return h, h + kept[0]

    x = rng.standard_normal((3, 2, 4), "f4")
    tgs.scan(cell, x, np.zeros((2, 4), "f4"))
    with pytest.raises(tgs.TraceError, match=r"from another call of the cell.*tgs.unroll"):
        tgs.scan(cell, x, np.zeros((2, 4), "f4"))


# Random numbers ---------------------------------------------------------------------------------


def test_random_numbers_are_those_of_their_place():
    def cell(x, h):
        return (tgs.rand(*x.shape), tgs.randn(*x.shape, rng=7)), h + x

    def drawn(driver, T, B, n, **options):
        tgs.manual_seed(3)
        (u, z), _ = driver(cell, np.zeros((T, B, n)), np.zeros((B, n)), **options)
        return u.numpy(), z.numpy()

    u, z = drawn(tgs.scan, 50, 40, 30)
    assert len(np.unique(u)) > 0.99 * u.size  # other steps, rows and columns have other numbers
    assert abs(u.mean() - 0.5) < 0.01
    assert abs(u.var() - 1 / 12) < 0.01
    assert abs(z.mean()) < 0.02
    assert abs(z.std() - 1) < 0.02
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(np.corrcoef(u[1:].ravel(), u[:-1].ravel())[0, 1]) < 0.02
    for options in ({}, {"reverse": True}, {"checkpoint": 7}):
        for driver in (tgs.scan, tgs.unroll):
            if driver is tgs.scan or "checkpoint" not in options:
                again = drawn(driver, 50, 40, 30, **options)
                np.testing.assert_array_equal(again[0], u)
                np.testing.assert_allclose(again[1], z, atol=1e-12)
    part = drawn(tgs.scan, 7, 5, 3)[0]
    np.testing.assert_array_equal(part, u[:7, :5, :3])
    first, second = (tgs.scan(cell, np.zeros((2, 2, 2)), np.zeros((2, 2)))[0] for _ in range(2))
    assert not np.array_equal(first[0], second[0])  # a new seed in each call
    np.testing.assert_array_equal(first[1], second[1])  # but for a generator that is given


def test_random_numbers_in_second_derivatives(rng):
    h0, x = rng.standard_normal((2, 3)), rng.standard_normal((4, 2, 3))

    def cell(x, h):
        h = tgs.tanh(h + x) * tgs.rand(*h.shape)
        return h, h

    def first(driver):
        def loss(h):
            tgs.manual_seed(1)
            return (driver(cell, x, h)[0] ** 2).sum()

        return lambda h: (tgs.grad(loss)(h) ** 2).sum()

    found, expected = (tgs.grad(first(driver))(tgs.tensor(h0)) for driver in (tgs.scan, tgs.unroll))
    np.testing.assert_allclose(found, expected, atol=1e-12)


# Bad input -------------------------------------------------------------------------------------

X = np.ones((3, 2, 4), "f4")
H0 = np.zeros((2, 4), "f4")
MATRIX = tgs.tensor(np.eye(4, dtype="f4"))


def branch(x, h):
    if h.sum(axis=-1)[:1].sum() > 0:
        h = h + x
    return h, h


def branches_on_all_rows(x, h):
    return x, h if (h > 0) else h + x


def loops(x, h):
    while h.max(axis=-1) < 3:
        h = h + x
    return x, h


def formats(x, h):
    return x, h * len(f"{h:.3f}")


def outside(x, h):
    h = h + tgs.tensor(np.asarray(h))
    return h, h


def item(x, h):
    return h * float(h[:, 0].item() if h.shape[0] == 1 else h[:, :1].numpy()[0, 0]), h


def grows(x, h):
    return x, tgs.concat([h, x], axis=-1)


def other_structure(x, h):
    return x, (h, h)


def forgets_the_state(x, h):
    return x, None


class CalledObject:
    def __call__(self, x, h):
        return x, (h, h)


def other_dtype(x, h):
    return x, h.to("float64")


def no_state(x, h):
    return h


def mixes(x, h):
    return x, h - h.mean(axis=0)


def transposes(x, h):
    return x, (h.T @ h) @ h.T


def multiplies_from_the_left(x, h):
    return x, (MATRIX @ h.T).T


def unknown(x, h):
    return tgs.stack([x, h]), h


def stacks_rows(x, h):
    return x, h * tgs.stack([h[:, 0], x[:, 0]], axis=0).sum()


def of_numpy(x, h):
    return x, np.concatenate([x, h], axis=-1)[:, :4]


def of_numpy_alone(x, h):
    return x, np.roll(h, 1, axis=-1) + x


def scans(x, h):
    return x, tgs.scan(lambda y, g: (g, g * y), H0[None], h)[1]


def no_output(x, h):
    return None, h


def rows_of_halves(x, h):
    return x, (h.reshape(4, 2) * 2.0).reshape(2, 4)


def adds_lines(x, h):
    return x, h + tgs.sum(h.reshape(2, 2, 2) * x.reshape(2, 2, 2)[:, 0], axis=-1)


def goes_back(x, h):
    (h * x).sum(axis=-1).backward()
    return h, h


def assigns(x, h):
    h.data = np.zeros((2, 4), "f4")
    return h, h


COUNTER = tgs.zeros()


def assigns_outside(x, h):
    COUNTER.data = COUNTER.data + 1
    return h + COUNTER, h


def returns_a_condition(x, h):
    return h > 0, h


def draws_for_all_rows(x, h):
    return x, h * tgs.rand(4)


def draws_a_leaf(x, h):
    return x, h * tgs.randn(2, 4, requires_grad=True)


def draws_elsewhere(x, h):
    return x, h * tgs.nn.Linear(4, 4)(x)


def forgets_keepdims(x, h):
    return x, h - h.max(axis=-1)


def adds_other_rows(x, h):
    return x, h + tgs.ones(3, 4)


def adds_all_steps(x, h):
    return x, h + tgs.ones(5, 2, 4)


def a_vector_times_a_matrix(x, h):
    return x, h @ (h[:, :, None] * x[:, None, :])


def another_dtype_inside(x, h):
    return x, h @ tgs.tensor(np.eye(4))


BAD = [
    (branch, tgs.TraceError, "mix rows"),
    (branches_on_all_rows, tgs.TraceError, r"line %\d+ of the step \(greater\).*tgs.unroll"),
    (loops, tgs.TraceError, r"line %\d+ of the step \(less\).*tgs.unroll"),
    (formats, tgs.TraceError, r"line %\d+ of the step \(state\).*tgs.unroll"),
    (outside, tgs.TraceError, "its value was asked for.*tgs.unroll"),
    (item, tgs.TraceError, "line %"),
    (grows, tgs.ShapeError, r"\(2, 8\), line %2 of the step, but .* keeps its shape from step to"),
    (other_dtype, tgs.TraceError, "float32 to float64.*tgs.unroll"),
    (other_structure, tgs.ShapeError, r"structure \(.*_scan.py, line \d+\) .*, but it was given"),
    (forgets_the_state, tgs.TraceError, r"state \(.*_scan.py, line \d+\) .* is a NoneType"),
    (CalledObject(), tgs.ShapeError, r"CalledObject \(.*_scan.py, line \d+\) returned a state"),
    (no_state, tgs.TraceError, r"no_state \(.*test_scan.py, line \d+\) .* a pair \(y, state\)"),
    (mixes, tgs.TraceError, "mix rows.*tgs.unroll"),
    (transposes, tgs.TraceError, "mix rows"),
    (multiplies_from_the_left, tgs.TraceError, r"permute_dims of %1 .* h @ W.T.*tgs.unroll"),
    (unknown, tgs.TraceError, "stack of %0 float32.*cannot be compiled.*tgs.concat.*tgs.unroll"),
    (stacks_rows, tgs.TraceError, r"mix rows.* stack .*along axis 1 or -1.*tgs.unroll"),
    (of_numpy, tgs.TraceError, "np.concatenate was given line %0 .*use tgs.concat, or tgs.unroll"),
    (of_numpy_alone, tgs.TraceError, "np.roll was given line %1 .*tgs.unroll, .* no gradient"),
    (scans, tgs.TraceError, "a scan inside of the cell was given line %1 .*tgs.unroll"),
    (no_output, tgs.TraceError, r"no_output \(.*_scan.py, line \d+\) .*; y: a NoneType was given"),
    (rows_of_halves, tgs.TraceError, "reshape of %1 .*mix rows"),
    (adds_lines, tgs.TraceError, r"multiply of %1 float32\(2, 2, 2\), %\d.* as h\[:, None\] does"),
    (goes_back, tgs.TraceError, r"line %3 of the step backward was called.*tgs.unroll"),
    (assigns, tgs.TraceError, r"line %1 of the step data were assigned.*tgs.unroll"),
    (assigns_outside, tgs.TraceError, r"assigned data of a tensor \(\) .* be state.*tgs.unroll"),
    (returns_a_condition, tgs.TraceError, r"y of dtype bool, line %3 of the step.*tgs.unroll"),
    (draws_for_all_rows, tgs.TraceError, r"random numbers of shape \(4,\).*B = 2.*tgs.unroll"),
    (draws_a_leaf, ValueError, "requires_grad=True was given inside a cell"),
    (draws_elsewhere, tgs.TraceError, "a NumPy generator.*tgs.rand.*tgs.unroll"),
    (forgets_keepdims, tgs.ShapeError, r"subtract: .*\(2, 4\) and \(2,\).*line %3.*keepdims=True"),
    (adds_other_rows, tgs.ShapeError, r"add: .*\(2, 4\) and \(3, 4\) .* line %2 .*equal or 1$"),
    (adds_all_steps, tgs.TraceError, r"\(T, B, n\).*belongs into xs.*tgs.unroll"),
    (a_vector_times_a_matrix, tgs.TraceError, r"mix rows.* h\[:, None, :\] on the left.*unroll"),
    (another_dtype_inside, tgs.TraceError, r"float64 and shape \(4, 4\).*line %2.*unroll"),
]


@pytest.mark.parametrize(("cell", "kind", "words"), BAD, ids=lambda v: getattr(v, "__name__", ""))
def test_cells_that_cannot_be_compiled(cell, kind, words):
    with pytest.raises(kind, match=f"(?s){words}"):
        tgs.scan(cell, X, H0)
    tgs.scan(lambda x, h: (h, h), X, H0)  # nothing of the failed trace is left


def test_a_value_of_a_step_is_gone_when_the_call_is_over():
    kept = []

    def keeps(x, h):
        kept.append(h)
        return h + x, h + x

    tgs.scan(keeps, X, H0)
    h = kept[0]
    for use in (lambda: h + 1, lambda: H0 * h, lambda: tgs.tanh(h), lambda: h.sum(), h.numpy):
        with pytest.raises(tgs.TraceError, match=r"%1 .* call of the cell is over.* let the cell"):
            use()


def test_a_choice_of_units_leaves_the_others_alone(rng):
    """Values that are not finite stay where they are; a unit that is taken twice adds both up."""
    order, twice = rng.permutation(9), rng.integers(0, 9, 9)
    start = rng.standard_normal((2, 9))
    start[0, 3], start[1, 5] = -np.inf, np.nan

    def cell(x, h):
        h = h[:, order] + x[:, ::-2][:, [0, 4, 2, 1, 3, 0, 1, 2, 3]]
        return h[:, twice], h

    found, kept = [], rng.standard_normal((4, 2, 9))
    for drive in (tgs.unroll, tgs.scan):
        x, h = tgs.tensor(kept, requires_grad=True), tgs.tensor(start, requires_grad=True)
        ys, last = drive(cell, x, h)
        (ys[:, :, :4] * kept[:, :, :4]).sum().backward()
        found.append([ys.numpy(), last.numpy(), x.grad.numpy(), h.grad.numpy()])
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    assert np.isinf(found[1][1]).sum() == np.isnan(found[1][1]).sum() == 1
    plan = str(tgs.explain(cell, kept, start))
    assert "choice: %" in plan
    assert "packed before" not in plan


def test_layers_with_checkpoints(rng, monkeypatch):
    x, lengths = rng.standard_normal((7, 2, 3)), [7, 4]
    layers = [
        nn.LSTM(3, 4, 2, bidirectional=True, rng=0, dtype="f8", checkpoint=k) for k in (None, 3)
    ]
    scan, seen = nn.recurrent.BACKENDS["scan"], []

    def noted(*given, **options):
        seen.append(options.get("checkpoint"))
        return scan(*given, **options)

    monkeypatch.setitem(nn.recurrent.BACKENDS, "scan", noted)
    made = []
    for layer in layers:
        ys, _ = layer(x, lengths=lengths)
        (ys * ys).sum().backward()
        made.append([ys.numpy(), *(p.grad.numpy() for p in layer.parameters())])
    for a, b in zip(*made, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13)
    assert seen == [None] * 4 + [3] * 4
    with pytest.raises(ValueError, match="GRU: checkpoint was given beside backend='tape'"):
        nn.GRU(2, 3, backend="tape", checkpoint=2)
    with pytest.raises(ValueError, match="RNN: checkpoint: 0 was given"):
        nn.RNN(2, 3, checkpoint=0)


def test_bad_arguments():
    def cell(x, h):
        return h + x, h

    with pytest.raises(ValueError, match="checkpoint: 0 was given"):
        tgs.scan(cell, X, H0, checkpoint=0)
    with pytest.raises(tgs.ShapeError, match=r"lengths has shape \(3,\), expected \(2,\)"):
        tgs.scan(cell, X, H0, lengths=[1, 2, 3])
    with pytest.raises(ValueError, match="set_num_threads: 0 was given"):
        tgs.set_num_threads(0)
    with pytest.raises(tgs.TraceError, match="float16"):
        tgs.scan(cell, X.astype("f2"), H0.astype("f2"))
    for xs in (X, X[:0], X[:, :0]):  # compiled, without steps, without rows
        with pytest.raises(tgs.TraceError, match=r"scan: .* returned a list, expected a p"):
            tgs.scan(lambda x, h: [h, h], xs, H0[: xs.shape[1]])
    with pytest.raises(ValueError, match=r"xs is float64 and the state float32, .* NumPy makes f"):
        tgs.scan(cell, X.astype("f8"), H0.astype("f4"))
    with pytest.raises(ValueError, match="xs is float32 and float64 and the state float32, expec"):
        tgs.scan(cell, (X.astype("f4"), X.astype("f8")), H0.astype("f4"))
    with pytest.raises(ValueError, match="share one dtype: convert one"):
        tgs.scan(lambda x, h: (h, h.to("float64")), X[:, :0].astype(int), H0[:0])


def test_gradients_over_many_rows_are_sums_of_short_sums():
    """A float32 that is added to 100,000 others one after another would be off by 1e-3."""
    T, B = 2000, 50
    W = tgs.tensor(np.eye(3, dtype="f4"), requires_grad=True)
    ys, _ = tgs.scan(lambda x, h: (x @ W, h), np.full((T, B, 3), 0.1, "f4"), np.zeros((B, 1), "f4"))
    (ys * 0.1).sum().backward()
    exact = T * B * float(np.float32(0.1) * np.float32(0.1))
    np.testing.assert_allclose(W.grad, np.full((3, 3), exact), rtol=1e-5)


@pytest.mark.parametrize("used", [("h",), ("far", "h"), ("far",), ()])
def test_outputs_that_nothing_depends_on(used):
    """What is infinite there does not matter, as it does not on the tape."""
    xs = tgs.tensor(np.array([0.0, 4.0, 1.0]).reshape(3, 1, 1), requires_grad=True)
    W = tgs.tensor([[2.0]], dtype="float64", requires_grad=True)

    def cell(x, h):
        h = h * 0.5 + x @ W
        norm = tgs.sqrt((h * h).sum(axis=-1))  # its derivative at 0 is infinite
        return {"h": h, "norm": norm, "far": h - 3}, h

    found = []
    for drive in (tgs.scan, tgs.scan, tgs.unroll):
        xs.grad = W.grad = None
        ys, state = drive(cell, xs, np.zeros((1, 1)))
        loss = sum(ys[name].sum() for name in used) + state.sum()
        loss.backward(retain_graph=True)
        (ys["far"] ** 2).sum().backward(retain_graph=True)  # of other outputs
        loss.backward()
        found.append([xs.grad.numpy(), W.grad.numpy()])
    for each in found:
        for a, b in zip(each, found[-1], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9)
    assert np.isfinite(found[0][0]).all()


def test_outputs_that_nothing_depends_on_of_rows_that_begin_anew():
    """What goes back to the state that rows are reset to is looked at too."""
    x = tgs.tensor([[[2.0]], [[3.0]]], dtype="float64", requires_grad=True)
    h0 = tgs.tensor([[0.0]], dtype="float64", requires_grad=True)

    def cell(x, h):
        return (x * h, tgs.sqrt(h)), x * x

    found = []
    for drive in (tgs.scan, tgs.unroll):
        x.grad = h0.grad = None
        ys, _ = drive(cell, x, h0, resets=[[True], [False]])
        ys[0].sum().backward()
        found.append((x.grad.numpy().ravel().tolist(), h0.grad.item()))
    assert found[0] == found[1] == ([12.0, 4.0], 2.0)


def test_outputs_that_nothing_depends_on_in_second_derivatives():
    """A gradient that is on the tape is no more NaN than one that is not."""
    found = []
    for drive in (tgs.scan, tgs.unroll):

        def total(x, drive=drive):
            ys, _ = drive(lambda x, h: ((x**3, tgs.sqrt(x - 1.0)), h), x, np.zeros((1, 1)))
            return ys[0].sum()

        x = tgs.tensor(np.ones((2, 1, 1)), requires_grad=True)
        first = tgs.grad(total)
        second = tgs.grad(lambda x, first=first: first(x).sum())
        found.append((first(x).numpy().tolist(), second(x).numpy().tolist()))
    assert found[0] == found[1] == ([[[3.0]], [[3.0]]], [[[6.0]], [[6.0]]])
