"""``scan`` against ``unroll``: results, and the gradients of everything."""

from __future__ import annotations

import numpy as np
import pytest
from cells import CELLS, make_inputs
from hypothesis import given, settings
from hypothesis import strategies as st

import tinygrad_seq as tgs
from tinygrad_seq.trees import leaves, map_leaves

TOLERANCE = {"float32": 2e-4, "float64": 1e-11}  # relative to the largest value of an array


def results(driver, cell, xs, state, weights, **options):
    """Outputs, last states, and gradients of inputs, initial states and parameters."""
    tracked = map_leaves(
        lambda a: tgs.tensor(a, requires_grad=np.asarray(a).dtype.kind == "f"), (xs, state)
    )
    for parameter in cell.parameters():
        parameter.grad = None
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
        H = max(H, 2)
    dtype = data.draw(st.sampled_from(["float64", "float32"]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    options = {"reverse": data.draw(st.booleans())}
    if data.draw(st.booleans()):
        options["lengths"] = rng.integers(0, T + 1, B)
    if data.draw(st.booleans()):
        options["resets"] = rng.random((T, B)) < 0.3
    if data.draw(st.booleans()):
        options["checkpoint"] = data.draw(st.integers(1, T + 1))
    compare(name, dtype, rng, T, B, I, H, **options)
