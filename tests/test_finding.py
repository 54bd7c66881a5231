"""``find_nan``: the step, the line and the source of the first NaN."""

from __future__ import annotations

import numpy as np
import pytest
from numba import config

import tinygrad_seq as tgs
from tinygrad_seq.errors import TapeError

W = tgs.tensor(np.array([0.5], "f4"), requires_grad=True)
START = np.zeros((2, 1), "f4")


def root(x, h):
    h = tgs.sqrt(x + h * W)
    return h, h


@pytest.mark.parametrize("driver", [tgs.scan, tgs.unroll])
def test_a_value(driver):
    xs = np.ones((6, 2, 1), "f4")
    assert tgs.find_nan(lambda: driver(root, xs, START)[0].sum()) is None
    xs[3, 1] = -9
    found = tgs.find_nan(lambda: driver(root, xs, START)[0].sum())
    assert (found.of, found.step, found.line.op) == ("value", 3, "sqrt")
    assert "test_finding.py, line" in found.source
    assert found.source.endswith("in root")
    assert "the first at (1, 0)" in str(found)


def test_a_value_in_reverse_and_with_lengths():
    xs = np.ones((6, 2, 1), "f4")
    xs[[1, 4], 1] = -9
    options = {"reverse": True, "lengths": [6, 4]}  # step 4 is beyond the second row's end
    found = tgs.find_nan(lambda: tgs.scan(root, xs, START, **options)[0].sum())
    assert found.step == 1


def test_a_step_of_a_sequence_in_a_sequence():
    def inside(x, h):
        return h + x * W, h

    def cell(x, h):
        zs, _ = tgs.unroll(inside, np.ones((3, 2, 1), "f4"), h)
        h = tgs.sqrt(x + zs[-1])
        return h, h

    xs = np.ones((6, 2, 1), "f4")
    xs[4, 1] = -9
    found = tgs.find_nan(lambda: tgs.unroll(cell, xs, START)[0].sum())
    assert (found.step, found.line.op) == (4, "sqrt")


def test_a_gradient():
    def cell(x, h):
        h = tgs.sqrt(x * W) * 0.0 + h
        return h, h

    xs = np.ones((5, 2, 1), "f4")
    xs[2, 0] = 0  # the derivative of the root is infinite there, and 0 comes back
    found = tgs.find_nan(lambda: tgs.scan(cell, xs, START)[0].sum())
    assert (found.of, found.step, found.line.op) == ("gradient", 2, "sqrt")
    assert "1 of 2 are NaN, the first at (0, 0)" in str(found)


@pytest.mark.skipif(bool(config.DISABLE_JIT), reason="the compiler is switched off")
@pytest.mark.parametrize("of", ["value", "gradient"])
def test_numbers_so_small_that_kernels_take_them_for_zero(of):
    def cell(x, h):
        small = x * W
        h = tgs.sqrt(small * 1e10 - 1e-31) if of == "value" else tgs.sqrt(small) * 0.0 + h
        return h, h

    xs = np.ones((6, 2, 1), "f4")
    xs[3, 1] = 1e-40

    def total():
        return tgs.scan(cell, xs, START)[0].sum()

    W.grad = None
    total().backward()
    assert np.isnan(W.grad.item())
    found = tgs.find_nan(total)
    assert (found.of, found.step) == (of, 3)
    assert np.float32(1e-40) * np.float32(0.5) > 0  # which is as ever afterwards
    assert tgs.find_nan(lambda: tgs.unroll(cell, xs, START)[0].sum()) is None


def test_what_was_given():
    layer = tgs.nn.LSTM(3, 4)
    xs = np.ones((5, 2, 3), "f4")
    assert tgs.find_nan(lambda: layer(xs)) is None
    xs[4, 1, 2] = np.nan
    found = tgs.find_nan(layer, xs)
    assert (found.of, found.step, found.line.op) == ("value", 4, "constant")
    layer.cells[0].bias.data = np.full(16, np.nan, "f4")
    found = tgs.find_nan(layer, np.ones((5, 2, 3), "f4"))
    assert (found.line.op, found.step) == ("leaf", 0)


def test_nothing_to_look_at():
    with pytest.raises(ValueError, match="a Tensor was given, expected a function"):
        tgs.find_nan((W * 2).sum())
    with pytest.raises(ValueError, match="nothing was recorded"):
        tgs.find_nan(lambda: tgs.zeros(3) + 1)

    def trains():
        loss = (W * 2).sum()
        loss.backward()
        return loss

    with pytest.raises(TapeError, match="return the loss instead"):
        tgs.find_nan(trains)

    def looks_aside():
        (W * 2).sum().backward()
        return (W * 3).sum()

    assert tgs.find_nan(looks_aside) is None
