"""What a step is written down as: nothing twice, nothing in the way of what follows.

Each of these cells once had a plan with needless rows; their gradients must be those on the tape.
"""

from __future__ import annotations

import numpy as np
import pytest
from tinygrad_seq.kernels import memory

import tinygrad_seq as tgs


@pytest.fixture
def tensors():
    """xs (4, 2, 3), W and U (3, 6), which want gradients."""
    rng = np.random.default_rng(0)
    shapes = (4, 2, 3), (3, 6), (3, 6)
    return [tgs.tensor(rng.standard_normal(shape), requires_grad=True) for shape in shapes]


H0 = np.zeros((2, 3))


def assert_as_on_the_tape(cell, xs, state, tensors, loss=tgs.sum, **options):
    """The gradients of a scan, and of the one after it, which is traced along the first."""
    found = []
    for drive in (tgs.scan, tgs.scan, tgs.unroll):
        for tensor in tensors:
            tensor.grad = None
        loss(drive(cell, xs, state, **options)[0]).backward()
        found.append([tensor.grad.numpy() for tensor in tensors])
    for each in found:
        for a, b in zip(each, found[-1], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_what_is_read_again_and_again_before_a_split_is_cut_once(tensors):
    xs, W, U = tensors

    def cell(times):
        def step(x, h):
            z = x @ W + h @ U
            for _ in range(times):
                z = z + 0.1 * z * (1 - z)
            a, b = tgs.split(z, 2, axis=-1)
            h = tgs.sigmoid(a) * tgs.tanh(b) + h
            return h, h

        return step

    few, more, most = (len(tgs.explain(cell(k), xs, H0).rows) for k in (6, 12, 18))
    assert most - more == more - few
    assert_as_on_the_tape(cell(6), xs, H0, tensors)


def test_slices_that_are_read_in_another_order_leave_no_gap(tensors):
    """Only where they stand tells the two cells apart: the rows that they ask for are the same."""
    xs, W, U = tensors

    def cell(first, second):
        def step(x, h):
            z = x @ W + h @ U
            h = tgs.sigmoid(z[:, first]) * tgs.tanh(z[:, second]) + h
            return h, h

        return step

    halves = slice(0, 3), slice(3, 6)
    cells = cell(*halves), cell(*halves[::-1])
    plans = [tgs.explain(each, xs, H0) for each in cells]
    assert len(plans[0].rows) == len(plans[1].rows)
    assert "gap" not in str(plans[1])
    for each in cells:
        assert_as_on_the_tape(each, xs, H0, tensors)


def test_a_slice_that_nobody_reads_leaves_nothing_unwritten(tensors, monkeypatch):
    """The way back goes through all of a value that is cut, also where nobody reads it."""

    class Full(memory.Block):
        def __init__(self, size):
            super().__init__(size)
            self._memory[0].fill(0xFF)  # NaN, in any dtype

    monkeypatch.setattr(memory, "Block", Full)
    xs, W, _ = tensors

    def cell(x, h):
        first, _, last = tgs.split(x / (1.5 + tgs.sigmoid(h @ W[:, :3])), [1, 2], axis=-1)
        return first * last, tgs.concat([first, last, h[:, :1]], axis=-1)

    assert_as_on_the_tape(cell, xs, H0, [xs, W])


def test_a_slice_that_is_read_twice_is_one(tensors):
    xs, W, U = tensors

    def cell(x, h):
        z = x @ W + h @ U
        with tgs.no_grad():
            size = abs(z[:, :3])  # no gradient goes through this one
        h = tgs.sigmoid(z[:, :3]) * tgs.tanh(z[:, 3:]) + 0.1 * z[:, :3] * size
        return (h, z[:, 0], z[:, :1]), h

    slices = [row for row in tgs.explain(cell, xs, H0).rows if row.op == "slice" and not row.detail]
    assert len(slices) == 4
    assert_as_on_the_tape(cell, xs, H0, tensors, lambda ys: sum(y.sum() for y in ys))


def test_a_weight_that_is_used_again_is_cut_once(tensors):
    xs, _, _ = tensors
    W = tgs.tensor(np.random.default_rng(1).standard_normal((6, 3)), requires_grad=True)

    def cell(x, h):  # three steps of Euler's to one of the sequence
        for _ in range(3):
            h = h + 0.1 * tgs.tanh(tgs.concat([x, h], axis=-1) @ W)
        with tgs.no_grad():
            size = (tgs.concat([x, h], axis=-1) @ W) ** 2
        return h + size, h

    plan = str(tgs.explain(cell, xs, H0))
    assert plan.count(" = matrix ") == 3  # two pieces, and what is off the tape is W whole
    before_the_loop = plan[plan.index("before the loop") : plan.index("in the loop")]
    assert before_the_loop.count("= matmul(") == 1
    assert_as_on_the_tape(cell, xs, H0, [xs, W])


def test_numbers_side_by_side(tensors):
    """Scores of a few places, for instance, of which a softmax is taken."""
    xs, W, _ = tensors
    v = tgs.tensor([0.5, -1.0], dtype="float64", requires_grad=True)

    def cell(x, h):
        z = (x @ W)[:, :3]
        scores = [(z * h).sum(axis=-1), (z * z).sum(axis=-1), z[:, 0], v]
        a = tgs.softmax(tgs.stack(scores, axis=-1), axis=-1)
        h = tgs.tanh(z * a[:, :1] + h * a[:, 1:2] + a[:, 2:].sum(axis=-1, keepdims=True))
        return (h, a), h

    def loss(ys):
        return ys[0].sum() + (ys[1] * ys[1]).sum()

    assert_as_on_the_tape(cell, xs, H0, [xs, W, v], loss, lengths=[4, 2])


def test_a_joint_in_a_joint_waits_for_the_state_it_is_computed_of(rng):
    """The product of what is taken apart and joined twice stood before the loop, whose gradient of
    the state it depends on."""
    xs, h0, W = (
        tgs.tensor(rng.standard_normal(shape), requires_grad=True)
        for shape in ((5, 2, 1), (2, 4), (4, 4))
    )

    def cell(x, h):
        z = h @ W
        whole = z[:, 0:4][:, 0:4]
        gates = tgs.concat([tgs.tanh(whole[:, :2]), tgs.tanh(whole[:, 2:])], axis=-1)
        return z, gates * x

    assert_as_on_the_tape(cell, xs, h0, [xs, h0, W], lambda ys: tgs.sum(tgs.sin(ys)))


def test_what_is_detached_is_kept(tensors):
    """The product was computed a second time on the way back, and what was equal to it before could
    differ in a last bit: the larger of the two had another gradient."""
    xs, _, U = tensors

    def cell(x, h):
        z = (h @ U)[:, :3]
        with tgs.no_grad():
            same = (h @ U)[:, :3][:, :]
        h = tgs.tanh(x + z)
        return tgs.maximum(z, same), h

    plan = tgs.explain(cell, xs, H0)
    ops = [plan.rows[slot].op for slot in plan.backward.inputs]
    assert "matmul" not in ops
    assert_as_on_the_tape(cell, xs, H0, [xs, U])
