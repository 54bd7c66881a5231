"""Cells and calls that few think of, ``scan`` against ``unroll``.

Run as a program with the JIT off (NUMBA_DISABLE_JIT=1), so that nothing is compiled for them.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import tinygrad_seq as tgs

BOTH = (tgs.unroll, tgs.scan)
rng = np.random.default_rng(0)
W = tgs.tensor(rng.standard_normal((3, 3)), requires_grad=True)
xs, h0 = tgs.tensor(rng.standard_normal((5, 2, 3))), tgs.tensor(rng.standard_normal((2, 3)))


def plain(x: Any, h: Any) -> Any:
    h = tgs.tanh(x + h @ W)
    return h, h


def gradient(drive: Any, cell: Any, x: Any = xs, create_graph: bool = False, **options: Any) -> Any:
    W.grad = None
    y, _ = drive(cell, x, h0, **options)
    (y[0] if isinstance(y, tuple) else y).sum().backward(create_graph=create_graph)
    return W.grad.numpy()  # type: ignore[union-attr]


def raises(kind: type[Exception], text: str, f: Any, *given: Any) -> None:
    with pytest.raises(kind, match=re.escape(text)):
        f(*given)


def check_transforms_in_a_cell() -> None:
    def cell(x: Any, h: Any) -> Any:
        _, pull = tgs.vjp(lambda q: tgs.tanh(q @ W), h)
        return pull(np.ones((2, 3)))[0], h + x

    tgs.unroll(cell, xs, h0)
    raises(tgs.TraceError, "vjp: inside a cell", tgs.scan, cell, xs, h0)


def check_integers_twice_differentiated() -> None:
    x = tgs.tensor(np.full((2, 2, 3), 200, "uint8"))

    def cell(x: Any, h: Any) -> Any:
        v = x.to("float64")
        h = tgs.tanh(h @ W + v * v * 1e-5)
        return h, h

    want = gradient(tgs.unroll, cell, x)
    for create_graph in (False, True):
        found = gradient(tgs.scan, cell, x, create_graph)
        np.testing.assert_allclose(found, want, rtol=1e-10)


def check_resets_written_over_before_the_way_back() -> None:
    for drive in BOTH:
        resets = np.zeros((5, 2), bool)
        resets[2] = True
        want = gradient(drive, plain, resets=resets)
        W.grad = None
        ys, _ = drive(plain, xs, h0, resets=resets)
        resets[:] = False
        ys.sum().backward()
        np.testing.assert_array_equal(W.grad.numpy(), want)  # type: ignore[union-attr]


def check_an_infinite_output_that_nobody_uses() -> None:
    def cell(x: Any, h: Any) -> Any:
        h, _ = plain(x, h)
        return (h, h + np.array([0.0, -np.inf, 0.0])), h

    want = gradient(tgs.unroll, cell)
    for create_graph in (False, True):
        np.testing.assert_allclose(gradient(tgs.scan, cell, xs, create_graph), want, rtol=1e-10)


def check_the_largest_of_a_row_with_nan() -> None:
    x = xs.numpy().copy()
    x[1, 1, 0] = np.nan

    def cell(x: Any, h: Any) -> Any:
        m = (x + tgs.tanh(W[0])).max(axis=-1, keepdims=True)
        h = tgs.tanh(tgs.where(m == m, m + h, h))
        return h, h

    want = gradient(tgs.unroll, cell, tgs.tensor(x))
    np.testing.assert_allclose(gradient(tgs.scan, cell, tgs.tensor(x)), want, rtol=1e-10)


def check_the_flow_into_a_state_that_is_a_joint() -> None:
    def cell(x: Any, h: Any) -> Any:
        h = tgs.concat([tgs.tanh(x + h @ W)[:, :2], x[:, 2:] * h[:, 2:]], axis=-1)
        return h, h

    def again(x: Any, h: Any) -> Any:
        h = cell(x, h)[0] * 1.0
        return h, h

    norms = [tgs.gradient_flow(lambda c=c: tgs.scan(c, xs, h0)[0].sum())[0] for c in (cell, again)]
    np.testing.assert_allclose(norms[0].norm, norms[1].norm, rtol=1e-12)


def check_draws_in_an_inner_scan() -> None:
    for inner in BOTH:

        def cell(x: Any, h: Any, inner: Any = inner) -> Any:
            noise, _ = inner(lambda v, s: (v * tgs.rand(2, 3), s), xs.detach(), h0)
            return h + noise[0], h + x

        raises(tgs.TraceError, "random numbers are drawn inside a cell", tgs.scan, cell, xs, h0)
        tgs.unroll(cell, xs, h0)


def check_indices_conditions_and_lists() -> None:
    def flipped(x: Any, h: Any) -> Any:
        return tgs.where((h > 0)[:, ::-1], h, -h), h + x

    def joined(x: Any, h: Any) -> Any:
        c = tgs.concat([h[:, :1] > 0, x[:, 1:] > 0], axis=-1)
        return tgs.where(c, h, x) * [0.1, 0.2, 0.3], h + x

    for cell in (flipped, joined):
        (a, _), (b, _) = (drive(cell, xs, h0) for drive in BOTH)
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-12)

    def gathered(x: Any, h: Any) -> Any:
        return h[np.arange(2), [0, 1]], h + x

    raises(tgs.TraceError, "it would mix rows", tgs.scan, gathered, xs, h0)

    def larger(x: Any, h: Any) -> Any:
        return (x > np.float64(0.1)).to("float32"), h

    x = tgs.tensor(np.full((1, 1, 1), 0.1, "f4"))
    for drive in BOTH:  # a number of NumPy's is as weak as one of Python's
        assert not drive(larger, x, np.zeros((1, 1), "f4"))[0].numpy().any()


def check_a_column_with_an_axis_of_its_own() -> None:
    def cell(x: Any, h: Any) -> Any:
        mixed = h[:, 0, None] * tgs.tanh(x @ W) + h[:, None, -1] * x[:, 1][..., None]
        return mixed.sum(axis=-1)[:, None], tgs.tanh(mixed)

    np.testing.assert_allclose(*(gradient(drive, cell) for drive in BOTH), rtol=1e-10)
    whole = slice(None)
    for index in ((whole, None), (whole, 0, None, None), (whole, [0], None), (whole, True)):
        a, b = (drive(lambda x, h, at=index: (x[at] * 2, h), xs, h0)[0] for drive in BOTH)
        np.testing.assert_array_equal(a.numpy(), b.numpy())
    for index in ((whole, [0, 2], None, [0, 0]), (None,), ([0, 1],), (slice(None, None, -1),)):

        def mixed(x: Any, h: Any, at: Any = index) -> Any:
            return x.reshape(2, 3, 1)[at], h

        raises(tgs.TraceError, "mix rows", tgs.scan, mixed, xs, h0)


def check_joints_that_are_cut_at_different_places() -> None:
    A, B, C, D = (tgs.tensor(rng.standard_normal((3, n))) for n in (1, 2, 2, 1))

    def cell(x: Any, h: Any) -> Any:
        p = tgs.concat([tgs.tanh(x @ A), tgs.tanh(h @ B)], axis=-1) * h
        q = tgs.concat([tgs.tanh(x @ C), tgs.tanh(h @ D)], axis=-1) * h
        h = tgs.tanh(p @ W + q @ W.T)
        return h, h

    np.testing.assert_allclose(*(gradient(drive, cell) for drive in BOTH), rtol=1e-10)


def check_a_stepper_in_a_cell() -> None:
    def cell(x: Any, h: Any) -> Any:
        return tgs.Stepper(plain, x, h)(x), h

    raises(tgs.TraceError, "Stepper: x is a value of a cell", tgs.scan, cell, xs, h0)


def check_a_tape_lists_a_scan() -> None:
    with tgs.Tape(W=W, xs=xs) as tape:
        tgs.scan(plain, xs, h0)[0].sum()
    text = str(tape)
    assert "scan(%0, %1, %2)" in text, text
    assert "output(%3, 0)" in text, text
    assert "earlier" not in text, text


if __name__ == "__main__":
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            with np.errstate(all="ignore"):
                check()
            print(name)
