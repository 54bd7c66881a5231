"""Tracing along an earlier call: the trace is the one that a cell would have had without it."""

from __future__ import annotations

import contextlib
import copy
import gc
import threading
import weakref

import numpy as np
import pytest
from cells import CELLS, make_inputs
from random_cells import RandomCell

import tinygrad_seq as tgs
from tinygrad_seq import nn
from tinygrad_seq.recurrence import following
from tinygrad_seq.recurrence.arguments import check_arguments
from tinygrad_seq.recurrence.following import PATIENCE, trace_again
from tinygrad_seq.recurrence.tracing import trace_cell
from tinygrad_seq.trees import leaves, map_leaves

F8 = np.dtype("float64")


@pytest.fixture(autouse=True)
def no_precedents(monkeypatch):
    monkeypatch.setattr(following, "_precedents", {})
    monkeypatch.setattr(following, "_let_be", set())


def given_to(cell, xs, state):
    return check_arguments(cell, xs, state, None, None, "scan")


def is_traced_as_ever(cell, given, dtype, seed=0):
    """Compare with a trace of its own; whether an earlier one was followed to its end."""
    tgs.manual_seed(seed)
    found = trace_again(cell, given, dtype)
    tgs.manual_seed(seed)
    expected = trace_cell(cell, given, dtype)
    assert vars(found.trace) == vars(expected.trace)
    for mine, theirs in zip(found.captured, expected.captured, strict=True):
        assert np.array_equal(mine.data, theirs.data)
        assert mine.requires_grad == theirs.requires_grad
    for name in (
        "y_slots",
        "state_slots",
        "length",
        "widths",
        "starts",
        "draws",
        "numbers",
        "seeds",
    ):
        assert getattr(found, name) == getattr(expected, name), name
    for mine, theirs in zip(leaves(found[1:3]), leaves(expected[1:3]), strict=True):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
    return found.precedent is not None


@pytest.mark.parametrize("name", CELLS)
def test_cells_are_followed(name, rng):
    cell = CELLS[name](rng, "float64", 3, 4)
    followed = []
    for seed in range(4):
        xs, state = make_inputs(name, rng, 3, 2, 3, "float64"), cell.initial_state(2)
        followed.append(is_traced_as_ever(cell, given_to(cell, xs, state), F8, seed))
    assert followed[0] is False
    assert followed[1:] in ([True] * 3, [False] * 3)
    if name in ("peephole", "indrnn", "multiplicative", "minimal_gated", "layer_norm"):
        assert all(followed[1:])


@pytest.mark.parametrize(
    "cell",
    [
        nn.RNNCell(3, 4, dtype="float64"),
        nn.GRUCell(3, 4, dtype="float64"),
        nn.GRUCell(3, 4, reset_after=True, dtype="float64"),
        nn.LSTMCell(3, 4, dtype="float64"),
        nn.LSTMCell(
            *(3, 4), peephole=True, projection_size=2, layer_norm=True, coupled=True, clip=2.0,
            zoneout=0.1, recurrent_dropout=0.2, dtype="float64",
        ),
    ],
)  # fmt: skip
def test_the_packages_own_cells_are_followed(cell, rng):
    xs = rng.standard_normal((3, 2, 3))
    followed = [is_traced_as_ever(cell, given_to(cell, xs, None), F8, k) for k in range(3)]
    assert followed == [False, True, True]


def test_random_cells(rng):
    followed = 0
    for seed in range(300):
        drawn = np.random.default_rng(seed)
        T, B = 2, int(drawn.integers(1, 5))
        cell = RandomCell(drawn, B)
        for _ in range(3):
            xs = tuple(tgs.tensor(rng.standard_normal((T, B, *s))) for s in cell.inputs)
            state = tuple(tgs.tensor(rng.standard_normal((B, *s))) for s in cell.states)
            followed += is_traced_as_ever(cell, given_to(cell, xs, state), F8, seed)
    assert followed > 250  # most of the cells, twice each; not those that cast, freeze, pad ...


def test_choices_of_units_are_those_of_this_call(rng):
    """Also if somebody wrote into the array that says which."""
    order, state = np.array([3, 1, 4, 8, 5, 0, 2, 6, 7]), rng.standard_normal((2, 9))

    def cell(x, h):
        h = tgs.tanh(h[:, order] + x[:, ::-1] + h[:, [0, 2, 4, 6, 8, 1, 3, 5, 7]])
        return h[:, order[:6]], h

    xs, followed = rng.standard_normal((3, 2, 9)), []
    for k in range(6):
        followed.append(is_traced_as_ever(cell, given_to(cell, xs, state), F8))
        found, expected = tgs.scan(cell, xs, state)[1], tgs.unroll(cell, xs, state)[1]
        np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-12)
        if k == 2:
            order[:] = order[::-1].copy()
    assert followed == [False, True, True, False, True, True]


def test_what_is_detached(rng):
    """A softmax takes the largest value off the tape, along a row or along one of several axes."""
    detached = [0, 1, 1, 0, 0, 1]

    def cell(x, h):
        h = tgs.tanh(x + h)
        if detached[0]:
            h = h + h.detach()
        wide = tgs.softmax(h[:, None] * x[:, :, None], axis=1).max(axis=2)
        h = tgs.softmax(h, axis=-1) + wide
        return h, h

    followed = []
    for _ in range(len(detached)):
        xs, state = rng.standard_normal((3, 2, 4)), rng.standard_normal((2, 4))
        followed.append(is_traced_as_ever(cell, given_to(cell, xs, state), F8))
        found = [drive(cell, xs, state)[1].numpy() for drive in (tgs.scan, tgs.unroll)]
        np.testing.assert_allclose(*found, rtol=1e-12)
        detached.append(detached.pop(0))
    assert followed == [False, False, True, False, True, False]


def test_conditions_and_what_they_choose_among(rng):
    """Numbers are those of this call, though where() had made tensors of them."""
    held, followed = {}, []

    def cell(x, h):
        up = x > held["above"]
        gate = tgs.where(up, held["high"], 0.0) + up * 0.5 + (~up).to("int64") * h
        return gate + up * h + (up & (h > 0)), tgs.tanh(gate)

    for k in (1, 2, 3, np.float32(1.5), 4):
        held.update(above=0.1 * float(k), high=k)
        xs, state = rng.standard_normal((4, 2, 3)), rng.standard_normal((2, 3))
        followed.append(is_traced_as_ever(cell, given_to(cell, xs, state), F8))
        here, there = (drive(cell, xs, state)[0].numpy() for drive in (tgs.scan, tgs.unroll))
        np.testing.assert_allclose(here, there, rtol=1e-12)
    assert followed == [False, True, True, False, False]  # an array is no number


def test_products_of_lines_are_with_the_matrices_of_this_call(rng):
    held, followed = {}, []

    def cell(x, h):
        h = tgs.tanh(held["left"] @ (h @ held["each"]) + tgs.linear(x, held["one"]))
        return held["turned"] @ h, h

    for groups in (2, 2, 2, 1, 2):
        shapes = {"each": (groups, 5, 5), "left": (3, 3), "one": (5, 4), "turned": (2, 3, 3)}
        for name, shape in shapes.items():
            held[name] = tgs.tensor(rng.standard_normal(shape), requires_grad=True)
        xs, state = rng.standard_normal((4, 2, 2, 3, 4)), rng.standard_normal((2, 2, 3, 5))
        followed.append(is_traced_as_ever(cell, given_to(cell, xs, state), F8))
        gradients = []
        for drive in (tgs.scan, tgs.unroll):
            for tensor in held.values():
                tensor.grad = None
            drive(cell, xs, state)[0].sum().backward()
            gradients.append([tensor.grad.numpy() for tensor in held.values()])
        for here, expected in zip(*gradients, strict=True):
            np.testing.assert_allclose(here, expected, rtol=1e-10)
    assert followed == [False, True, True, False, False]


def test_what_a_cell_closes_over_is_that_of_this_call(rng):
    held = {"W": None, "b": None, "n": 0.0}

    def cell(x, h):
        h = tgs.tanh(x @ held["W"] + held["b"] + h * held["n"])
        return h, h

    x, h0 = rng.standard_normal((4, 2, 3)), np.zeros((2, 5))
    for k in range(4):
        held["W"], held["n"] = tgs.tensor(rng.standard_normal((3, 5)), requires_grad=k > 1), 0.5 * k
        held["b"] = tgs.tensor(rng.standard_normal(5), requires_grad=True)
        found, expected = tgs.scan(cell, x, h0)[0], tgs.unroll(cell, x, h0)[0]
        np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-12)
        gradients = []
        for ys in (found, expected):
            held["b"].grad = held["W"].grad = None
            ys.sum().backward()
            gradients.append([held["b"].grad, held["W"].grad])
        np.testing.assert_allclose(gradients[0][0], gradients[1][0], rtol=1e-10)
        assert (gradients[0][1] is None) == (k < 2)


def test_a_cell_that_does_something_else(rng):
    """In the middle, at the end, or in what it returns; and later the first thing again."""
    W = [tgs.tensor(rng.standard_normal((3, 3))) for _ in range(3)]
    says = {"kind": 0}

    def cell(x, h):
        kind = says["kind"]
        f = tgs.sigmoid(tgs.concat([x, h], axis=1) @ (tgs.concat([W[0], W[1]]) * 0.5))
        if kind == 1:
            f = f * f
        n = tgs.tanh(x @ (W[0] if kind == 2 else W[2]) + f ** (3 if kind == 3 else 2))
        h = f * h + n * (0.25 if kind == 4 else x)
        if kind == 5:
            h = h + 1.0
        return (h if kind != 6 else n), (h if kind != 7 else n)

    x, h0 = rng.standard_normal((4, 2, 3)), np.zeros((2, 3))
    followed = []
    for kind in (0, 0, 1, 1, 2, 2, 0, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 0, 0):
        says["kind"] = kind
        followed.append(is_traced_as_ever(cell, given_to(cell, x, h0), F8))
        np.testing.assert_allclose(
            tgs.scan(cell, x, h0)[0].numpy(), tgs.unroll(cell, x, h0)[0].numpy(), rtol=1e-12
        )
    assert followed[1]
    assert followed[-1]


A, B4 = (tgs.tensor(np.arange(4.0) + k, requires_grad=True) for k in range(2))
ROW, ONE = tgs.tensor(np.ones((1, 4))), tgs.tensor(np.ones(1))
WIDE, SQUARE = tgs.tensor(np.ones((8, 4))), tgs.tensor(np.eye(4))
COUNTS = np.array([1, 0] * 6)


def off_the_tape(x, enabled):
    with contextlib.nullcontext() if enabled else tgs.no_grad():
        return tgs.tanh(x) * A


# What a cell does with (x, h), and then what it does instead: nearly the same.
NEARLY = {
    "a shape beside": (lambda x, h: x + A, lambda x, h: x + ONE),
    "axes beside": (lambda x, h: x + A, lambda x, h: x + ROW),
    "a tensor again": (lambda x, h: x * A + x * B4, lambda x, h: x * A + x * A),
    "another again": (
        lambda x, h: x * A + x * B4 + h * A,
        lambda x, h: x * A + x * B4 + h * B4,
    ),
    "one where there were two": (
        lambda x, h: tgs.where(x > h, A, B4),
        lambda x, h: tgs.where(x > h, A, A),
    ),
    "counts for a mask": (
        lambda x, h: tgs.concat([x, h, x], axis=1)[:, COUNTS == 1],
        lambda x, h: tgs.concat([x, h, x], axis=1)[:, COUNTS],
    ),
    "off the tape": (lambda x, h: off_the_tape(x, False), lambda x, h: off_the_tape(x, True)),
    "less": (lambda x, h: (tgs.tanh(x), x * A)[0], lambda x, h: tgs.tanh(x)),
    "after a draw": (lambda x, h: x * tgs.rand(2, 4) + 1.0, lambda x, h: x * tgs.rand(2, 4) * 2.0),
    "no joint": (
        lambda x, h: tgs.concat([x, h], axis=1) @ WIDE,
        lambda x, h: tgs.tanh(x) @ SQUARE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NEARLY)
def test_a_cell_that_does_nearly_the_same(name, rng):
    x, h0 = tgs.tensor(rng.standard_normal((3, 2, 4))), tgs.zeros(2, 4, dtype="float64")
    works, does = NEARLY[name], [None]

    def cell(x, h):
        return does[0](x, h), h

    for first, second in (works, works[::-1]):
        following._precedents.clear()
        for work in (first, first, second, second, first):
            does[0] = work
            is_traced_as_ever(cell, given_to(cell, x, h0), F8)


# What is done with whole numbers and values of the step, and then what is refused.
REFUSED = {
    "a large integer": (lambda i, h, n: tgs.where(i > n, h, -h), 3, 2**24 + 1),
    "another dtype": (lambda i, h, n: h * n, *(tgs.tensor(np.ones(4, d)) for d in ("f4", "f8"))),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_of_a_cell_that_is_followed(name):
    work, fine, wrong = REFUSED[name]
    x, h0 = tgs.tensor(np.ones((3, 2, 4), int)), tgs.zeros(2, 4)
    n = [fine]

    def cell(x, h):
        h = work(x, h, n[0])
        return h, h

    given = given_to(cell, x, h0)
    for _ in range(2):
        followed = is_traced_as_ever(cell, given, np.dtype("float32"))
    assert followed
    n[0] = wrong
    for trace in (trace_cell, trace_again):
        with pytest.raises((tgs.TraceError, ValueError), match=r"of the step|in a step"):
            trace(cell, given, np.dtype("float32"))


@pytest.mark.parametrize("departs", [False, True])
def test_draws_inside_of_a_cell_that_is_traced(departs):
    xs, h0, also = np.ones((3, 2, 4)), np.ones((2, 4)), [False]

    def inner(x, h):
        made = x * tgs.rand(2, 4)
        return (tgs.tanh(made) if also[0] else made), h

    def outer(x, h):
        return x + tgs.scan(inner, xs, h0)[0][-1], h

    for _ in range(2):
        tgs.scan(inner, xs, h0)
    also[0] = departs
    with pytest.raises(tgs.TraceError, match="drawn inside a cell that is traced itself"):
        tgs.scan(outer, xs, h0)


def test_what_is_remembered_is_bounded(monkeypatch):
    """Also of cells for whom nothing is kept."""
    monkeypatch.setattr(following, "MOST", 4)
    monkeypatch.setattr(following, "PATIENCE", 0)
    for n in range(1, 10):
        tgs.scan(lambda x, h: (x + h, h), np.ones((2, 1, n)), np.ones((1, n)))
        assert len(following._let_be) + len(following._precedents) <= 4


def test_a_cell_that_never_does_the_same_is_let_be(rng):
    calls = [0]

    def cell(x, h):
        calls[0] += 1
        for _ in range(calls[0] % 3):
            h = tgs.tanh(h)
        return h + x, h

    x, h0 = rng.standard_normal((2, 2, 3)), np.zeros((2, 3))
    for _ in range(PATIENCE + 3):
        tgs.scan(cell, x, h0)
    assert calls[0] == PATIENCE + 3  # once in each call, whatever it does
    assert len(following._let_be) == 1
    assert not following._precedents


@pytest.mark.parametrize("where", ["list", "tuple", "view", "tensor of the step"])
def test_who_keeps_a_value_is_told(rng, where):
    """Not only in the next call: a value of any call before is none of this one."""
    kept, calls = [], [0]

    def cell(x, h):
        calls[0] += 1
        made = tgs.tanh(x + h)
        after = (h, made) if where == "tuple" else [made]
        if calls[0] == 2:
            kept.append({"view": made[:, :2], "tensor of the step": x}.get(where, after))
        old = kept[0] if kept and calls[0] > 3 else None
        if old is not None:
            made = made + (old if isinstance(old, tgs.Tensor) else old[-1]).sum(axis=-1)[:, None]
        return made, made

    x, h0 = rng.standard_normal((3, 2, 4)), np.zeros((2, 4))
    for _ in range(3):
        tgs.scan(cell, x, h0)
    with pytest.raises(tgs.TraceError, match="from another call of the cell"):
        tgs.scan(cell, x, h0)


def test_after_an_error_a_cell_is_traced_anew(rng):
    fails = [False]

    def cell(x, h):
        h = tgs.tanh(x + h)
        if fails[0]:
            h.numpy()
        return h, h

    x, h0 = rng.standard_normal((3, 2, 4)), np.zeros((2, 4))
    for fails[0] in (False, False, True, False, False):
        if fails[0]:
            with pytest.raises(tgs.TraceError, match="at line %3 of the step"):
                tgs.scan(cell, x, h0)
        else:
            np.testing.assert_allclose(
                tgs.scan(cell, x, h0)[0].numpy(), tgs.unroll(cell, x, h0)[0].numpy(), rtol=1e-12
            )


def test_operations_off_the_tape(rng):
    off = [False]

    def cell(x, h):
        z = x * h
        if off[0]:
            with tgs.no_grad():
                z = z * 2.0 + x
        return tgs.tanh(z + x), h + tgs.detach(x) if off[0] else h + x

    h0 = tgs.tensor(rng.standard_normal((2, 4)), requires_grad=True)
    x = tgs.tensor(rng.standard_normal((3, 2, 4)), requires_grad=True)
    for off[0] in (False, False, True, True, False, False):
        is_traced_as_ever(cell, given_to(cell, x, h0), F8)
        found = []
        for drive in (tgs.scan, tgs.unroll):
            x.grad = h0.grad = None
            ys, last = drive(cell, x, h0)
            (ys.sum() + last.sum()).backward()
            found.append((x.grad.numpy(), h0.grad.numpy()))
        np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-10)
        np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-10)


def test_second_derivatives(rng):
    cell = nn.LSTMCell(3, 4, dtype="float64")
    x = tgs.tensor(rng.standard_normal((4, 2, 3)), requires_grad=True)
    found = []
    for drive in (tgs.scan, tgs.scan, tgs.scan, tgs.unroll):
        x.grad = None
        drive(cell, x)[0].sum().backward(create_graph=True)
        first, x.grad = x.grad, None
        (first * first).sum().backward()
        found.append(x.grad.numpy())
        cell.zero_grad()
    for each in found[:3]:
        np.testing.assert_allclose(each, found[3], rtol=1e-9)


def test_scans_inside_of_each_other_and_in_threads(rng):
    inner = nn.RNNCell(3, 3, dtype="float64")
    table = rng.standard_normal((2, 3, 3))

    def cell(x, h):
        with_inner = tgs.scan(inner, table)[0][-1].sum(axis=0)  # of what was there before
        h = tgs.tanh(x + h * with_inner)
        return h, h

    x, h0 = rng.standard_normal((3, 2, 3)), np.zeros((2, 3))
    expected = tgs.unroll(cell, x, h0)[0].numpy()
    wrong = []

    def many():
        for _ in range(20):
            if not np.allclose(tgs.scan(cell, x, h0)[0].numpy(), expected, rtol=1e-10):
                wrong.append(1)

    workers = [threading.Thread(target=many) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def both(cell, calls=3):
    """What ``scan`` and ``unroll`` give in each of some calls: values, or the kind of error."""
    rng = np.random.default_rng(0)
    x, h0 = rng.standard_normal((3, 2, 4)), rng.standard_normal((2, 4))
    for k in range(calls):
        found = []
        for drive in (tgs.scan, tgs.unroll):
            tgs.manual_seed(k)
            try:
                found.append(drive(lambda x, h, k=k: (cell(k, x, h), h), x, h0)[0].numpy())
            except (TypeError, IndexError, ValueError) as error:
                found.append(type(error))
        assert type(found[0]) is type(found[1]), (k, found)
        if type(found[0]) is not type:
            assert found[0].shape == found[1].shape
            np.testing.assert_allclose(found[0], found[1], rtol=1e-12)
        else:
            assert found[0] is found[1]


def test_parts_that_were_there_before(rng):
    V, U = (tgs.tensor(rng.standard_normal((2, 4)), requires_grad=True) for _ in range(2))
    M = tgs.tensor(rng.standard_normal((8, 4)))
    both(lambda k, x, h: tgs.concat([x, V], 1) * 2.0 if k < 1 else tgs.concat([x, U], 1) @ M)


@pytest.mark.parametrize(
    "indices",
    [
        (1, [1]),
        (slice(0, 2), [0, 2]),
        (slice(0, 2), slice(0, 2.0)),
        (slice(0, 2), slice(1, 3), slice(None, 2)),
        (np.array([True, False, True, False]), slice(0, 3), [0, 2]),
    ],
)
def test_indices_that_are_equal_and_not_the_same(indices):
    both(lambda k, x, h: x[:, indices[k % len(indices)]], calls=6)


@pytest.mark.parametrize("index", [True, np.array(1)])
def test_indices_that_equal_one(index):
    both(lambda k, x, h: x[:, index if k % 2 else 1], calls=4)


def test_too_many_indices_of_one_number_a_row():
    both(lambda k, x, h: x.sum(axis=1)[:, [0]])


def test_a_cell_within_that_departs():
    def inner(a, b):
        with tgs.no_grad():
            c = tgs.tanh(a + b)
        return c, c

    xs, h0 = np.ones((3, 2, 4)), np.ones((2, 4))

    def cell(k, x, h):
        z = tgs.unroll(inner, xs, h0)[0][-1] if k != 1 else 1.0
        return x * tgs.rand(2, 4) + z

    both(cell, calls=6)


def test_random_numbers_that_are_refused():
    def cell(k, x, h):
        try:
            z = tgs.rand(2, 4, rng="bad" if k == 2 else None)
        except ValueError:
            z = x
        return z * x

    both(cell, calls=5)


def test_an_operation_that_fails_half_way():
    V = tgs.tensor(np.ones((2, 4)))

    def cell(k, x, h):
        tgs.rand(2, 4, per_sequence=True)
        with contextlib.suppress(ValueError, OverflowError):
            tgs.where(x > h, V, 10**400)
        return x * h

    both(cell)


def test_values_of_the_step_are_not_changed_or_copied(rng):
    x, h0 = rng.standard_normal((3, 2, 4)), np.zeros((2, 4))

    def assigned(name, value):
        def cell(x, h):
            made = tgs.tanh(x)
            setattr(made, name, value)
            return made, h

        return cell

    for cell in (
        assigned("data", np.zeros((2, 4))),
        assigned("grad", np.zeros((2, 4))),
        assigned("requires_grad", True),
        lambda x, h: (copy.copy(x), h),
    ):
        with pytest.raises(tgs.TraceError, match="for a value of the step"):
            tgs.scan(cell, x, h0)


def test_a_weight_that_is_used_again(rng):
    """It is cut once in each call, also where the cell does something else half way."""
    W = tgs.tensor(rng.standard_normal((7, 4)), requires_grad=True)
    turns = [2]

    def cell(x, h):
        for _ in range(turns[0]):
            h = tgs.tanh(tgs.concat([x, h], axis=-1) @ W)
        return h, h

    followed = []
    for turns[0] in (2, 2, 3, 3, 2, 2):
        given = given_to(cell, tgs.tensor(rng.standard_normal((3, 2, 3))), np.zeros((2, 4)))
        followed.append(is_traced_as_ever(cell, given, F8))
    assert followed == [False, True, False, True, False, True]


def test_weak_references_to_values_of_the_step(rng):
    """They die with the call, as without a precedent."""
    x, h0 = rng.standard_normal((3, 2, 4)), np.zeros((2, 4))
    memo, seen = weakref.WeakValueDictionary(), []

    def cell(x, h):
        made = memo.get("t")
        seen.append(made is None)
        if made is None:
            memo["t"] = made = tgs.tanh(x)
        return made + h, h

    for _ in range(4):
        tgs.scan(cell, x, h0)
    assert all(seen)


def test_a_cell_with_strange_attributes(rng):
    class Cell:
        training: object = None

        def __call__(self, x, h):
            return x + h, h

    for value in ({"a": 1}, [1], np.ones(2), 0):
        cell = Cell()
        cell.training = value
        tgs.scan(cell, rng.standard_normal((3, 2, 4)), np.zeros((2, 4)))


def test_keys_of_outputs_are_those_of_this_call():
    for key in (1, True, 1.0):
        ys, _ = tgs.scan(
            lambda x, h, key=key: ({key: x + h}, h), np.ones((2, 1, 1)), np.ones((1, 1))
        )
        assert type(*ys) is type(key)


def test_one_tensor_where_there_were_two(rng):
    V, U = (tgs.tensor(rng.standard_normal((2, 4)), requires_grad=True) for _ in range(2))
    x, h0 = rng.standard_normal((3, 2, 4)), np.zeros((2, 4))
    flows = []
    for other in (U, U, V, V):

        def cell(x, h, other=other):
            h = tgs.tanh(tgs.where(x > h, V, other) * x + h)
            return h, h

        (flow,) = tgs.gradient_flow(
            lambda cell=cell: (tgs.scan(cell, x, h0)[0] ** 2).sum(), {"V": V}, keep_shares=True
        )
        V.grad = None
        (tgs.unroll(cell, x, h0)[0] ** 2).sum().backward()
        np.testing.assert_allclose(flow.shares["V"].sum(axis=0), V.grad, rtol=1e-10)
        flows.append(flow)


def test_shares_of_a_tensor_that_is_in_a_product_and_beside(rng):
    w = tgs.tensor(rng.standard_normal((1, 4)), requires_grad=True)
    x = rng.standard_normal((5, 2, 1))

    def cell(x, h):
        h = tgs.tanh(x @ w + w + h)
        return h, h

    (flow,) = tgs.gradient_flow(
        lambda: (tgs.scan(cell, x, np.zeros((2, 4)))[0] ** 2).sum(), {"w": w}, keep_shares=True
    )
    (tgs.unroll(cell, x, np.zeros((2, 4)))[0] ** 2).sum().backward()
    np.testing.assert_allclose(flow.shares["w"].sum(axis=0), w.grad, rtol=1e-10)


@pytest.mark.parametrize("kind", ["followed", "departing", "let be", "concat", "mask", "failing"])
def test_what_a_call_had_goes_with_it(rng, kind, monkeypatch):
    """At once, without the collector."""
    if kind == "let be":
        monkeypatch.setattr(following, "PATIENCE", 0)
    x, h0 = rng.standard_normal((3, 2, 3)), np.zeros((2, 4))
    masks, at = [], [0]

    def cell(x, h):
        h = tgs.tanh(x @ W + h)
        if kind == "departing":
            for _ in range(at[0] % 2):
                h = h * 2.0
        if kind == "concat":
            h = tgs.concat([h, V], axis=1)[:, 2:6]
        if kind == "mask":
            mask = tgs.rand(2, 4, per_sequence=True)
            masks.append(weakref.ref(mask))
            h = h * mask
        if kind == "failing" and at[0] % 2:
            raise KeyError
        return h, h

    def call():
        nonlocal W, V
        W = tgs.tensor(rng.standard_normal((3, 4)), requires_grad=True)
        V = tgs.tensor(rng.standard_normal((2, 4)), requires_grad=True)
        seen = [weakref.ref(W), weakref.ref(W._data), weakref.ref(V), weakref.ref(V._data)]
        with contextlib.suppress(KeyError):
            tgs.scan(cell, x, h0)[0].sum().backward()
        W = V = None
        return [*seen, *masks]

    W = V = None
    for at[0] in range(2):  # compile, which leaves things to the collector
        call()
    following._precedents.clear()
    masks.clear()
    gc.collect()
    gc.disable()
    try:
        for at[0] in range(5):
            assert all(each() is None for each in call()), at
    finally:
        gc.enable()


def test_a_graph_that_lives_on_keeps_its_own_alone(rng):
    x, h0, graphs, alive = rng.standard_normal((3, 2, 4)), np.zeros((2, 4)), [], []

    def cell(x, h):
        h = tgs.tanh(x @ W + h)
        return (h * 2.0 if k == 2 else h), h

    for k in range(4):
        W = tgs.tensor(np.ones((4, 4)), requires_grad=True)
        ys, seen = tgs.scan(cell, x, h0)[0], weakref.ref(W)
        if k == 1:
            graphs.append(ys)
        W = ys = None
        gc.collect()
        alive.append(seen() is not None)
    assert alive == [False, True, False, False]


def test_structures_of_inputs_and_states(rng):
    def cell(x, state):
        h = tgs.tanh(x["a"] + state["h"] * x["b"])
        return {"y": h, "z": (h, x["b"])}, {"h": h, "n": state["n"] + 1.0}

    for k in range(3):
        xs = {"a": rng.standard_normal((3, 2, 4)), "b": rng.standard_normal((3, 2, 4))}
        state = {"h": np.zeros((2, 4)), "n": np.zeros((2,))}
        state = map_leaves(tgs.tensor, state)
        assert is_traced_as_ever(cell, given_to(cell, xs, state), F8) is (k > 0)
        found, expected = tgs.scan(cell, xs, state), tgs.unroll(cell, xs, state)
        for a, b in zip(leaves(found), leaves(expected), strict=True):
            np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-12)
