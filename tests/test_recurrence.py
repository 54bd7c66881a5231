"""Cells against naive oracles, and unroll with lengths, resets, reverse and odd sizes."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from naive import gru_reset_after_step, gru_step, lstm_step, rnn_step, run_rows, sigmoid

import tinygrad_seq as tgs
from tinygrad_seq import nn

KINDS = {
    "rnn": (
        lambda I, H, **k: nn.RNNCell(I, H, **k),
        lambda p, x, s: (rnn_step(p, x, s[0], math.tanh),),
    ),
    "rnn relu": (
        lambda I, H, **k: nn.RNNCell(I, H, "relu", **k),
        lambda p, x, s: (rnn_step(p, x, s[0], lambda v: max(v, 0.0)),),
    ),
    "rnn sigmoid": (
        lambda I, H, **k: nn.RNNCell(I, H, nonlinearity="sigmoid", **k),
        lambda p, x, s: (rnn_step(p, x, s[0], sigmoid),),
    ),
    "lstm": (lambda I, H, **k: nn.LSTMCell(I, H, **k), lambda p, x, s: lstm_step(p, x, *s)),
    "gru": (lambda I, H, **k: nn.GRUCell(I, H, **k), lambda p, x, s: (gru_step(p, x, s[0]),)),
    "gru reset after": (
        lambda I, H, **k: nn.GRUCell(I, H, reset_after=True, **k),
        lambda p, x, s: (gru_reset_after_step(p, x, s[0]),),
    ),
}


def build(kind: str, I: int, H: int, rng: np.random.Generator):
    """A float64 cell with random weights, its parameters as arrays, and the oracle's step."""
    make, step = KINDS[kind]
    cell = make(I, H, dtype="float64", rng=rng)
    for parameter in cell.parameters():
        parameter.data = rng.standard_normal(parameter.shape)
    values = {name: np.asarray(p) for name, p in cell.named_parameters()}
    return cell, lambda x, state: step(values, x, state)


def leaves(state) -> tuple:
    return state if isinstance(state, tuple) else (state,)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_against_the_oracle(kind, data):
    T, B = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 4))
    I, H = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    reverse = data.draw(st.booleans())
    lengths = data.draw(st.none() | st.lists(st.integers(0, T), min_size=B, max_size=B))
    resets = rng.random((T, B)) < 0.3 if data.draw(st.booleans()) else None
    cell, step = build(kind, I, H, rng)
    zero = tuple(np.zeros((B, H)) for _ in leaves(cell.initial_state(B)))
    state = zero
    if data.draw(st.booleans()):
        state = tuple(rng.standard_normal((B, H)) for _ in zero)
    xs = rng.standard_normal((T, B, I))
    given_state = None
    if state is not zero:
        given_state = state if len(state) > 1 else state[0]
    ys, last = tgs.unroll(cell, xs, given_state, lengths=lengths, resets=resets, reverse=reverse)
    expected_ys, expected_last = run_rows(
        step,
        xs,
        state,
        zero,
        [T] * B if lengths is None else lengths,
        np.zeros((T, B), bool) if resets is None else resets,
        reverse,
    )
    assert ys.shape == (T, B, H)
    np.testing.assert_allclose(ys.numpy(), expected_ys, atol=1e-12)
    for leaf, expected in zip(leaves(last), expected_last, strict=True):
        np.testing.assert_allclose(leaf.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind, rng):
    cell, _ = build(kind, 2, 3, rng)
    names = [name for name, _ in cell.named_parameters()]
    state = tuple(rng.standard_normal((2, 3)) for _ in leaves(cell.initial_state(2)))
    resets = np.zeros((4, 2), bool)
    resets[2, 0] = True

    def run(xs, state, *weights):
        for name, weight in zip(names, weights, strict=True):
            object.__setattr__(cell, name, weight)
        start = state if len(state) > 1 else state[0]
        ys, last = tgs.unroll(cell, xs, start, lengths=[4, 2], resets=resets, reverse=True)
        return ys, last

    weights = [np.array(p) for p in cell.parameters()]
    assert tgs.gradcheck(run, (rng.standard_normal((4, 2, 2)), state, *weights), order=2)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind, reverse, rng):
    """Whatever stands beyond a row's length, NaN too: same outputs, zero gradient there."""
    cell, _ = build(kind, 3, 4, rng)
    lengths = np.array([5, 0, 2, 4])
    xs = rng.standard_normal((5, 4, 3))
    beyond = np.arange(5)[:, None] >= lengths
    spoilt = np.where(beyond[..., None], np.nan, xs)
    results = []
    for values in (xs, spoilt):
        x = tgs.tensor(values, requires_grad=True)
        cell.zero_grad()
        ys, last = tgs.unroll(cell, x, lengths=lengths, reverse=reverse)
        sum((leaf * leaf).sum() for leaf in (ys, *leaves(last))).backward()
        results.append([ys, *leaves(last), x.grad, *(p.grad for p in cell.parameters())])
        assert (x.grad.numpy()[beyond] == 0).all()
        assert (ys.numpy()[beyond] == 0).all()
    for clean, dirty in zip(*results, strict=True):
        np.testing.assert_array_equal(clean, dirty)
    # Each row alone, cut to its length, gives the same.
    ys = results[0][0].numpy()
    for b, length in enumerate(lengths):
        alone, _ = tgs.unroll(cell, xs[:length, b : b + 1], reverse=reverse)
        np.testing.assert_allclose(ys[:length, b : b + 1], alone, atol=1e-13)


@pytest.mark.parametrize("driver", [tgs.unroll, tgs.scan])
def test_a_row_without_steps_whose_state_is_nan(driver, rng):
    w = tgs.tensor(rng.standard_normal((2, 2)), requires_grad=True)

    def cell(x, h):
        return h @ w, tgs.tanh(h @ w + x)

    start = tgs.tensor([[np.nan, 1], [1, 2]], dtype="float64", requires_grad=True)
    ys, _ = driver(cell, rng.standard_normal((3, 2, 2)), start, lengths=[0, 3])
    ys.sum().backward()
    assert np.isfinite(w.grad.numpy()).all()
    assert not start.grad.numpy()[0].any()


def test_padding_reaches_no_weight_of_a_cell_that_is_singular_at_zero(rng):
    w = tgs.tensor(rng.standard_normal((2, 1)), requires_grad=True)

    def cell(x, h):
        unit = x / tgs.sqrt((x * x).sum(axis=-1, keepdims=True)) + tgs.log(x)
        h = h + unit @ w
        return h, h

    xs = rng.uniform(0.5, 1, (4, 3, 2))
    xs[1:, 1] = np.nan
    xs[:, 2] = 0
    for reverse in (False, True):
        w.grad = None
        start = np.zeros((3, 1))
        ys, _ = tgs.unroll(cell, xs, start, lengths=[4, 1, 0], reverse=reverse)
        ys.sum().backward()
        together, w.grad = w.grad.numpy(), None
        for b, length in ((0, 4), (1, 1)):
            rows = xs[:length, b : b + 1]
            tgs.unroll(cell, rows, start[:1], reverse=reverse)[0].sum().backward()
        np.testing.assert_allclose(together, w.grad.numpy(), rtol=1e-12)


def test_a_row_that_ended_is_not_computed_from_where_it_ended():
    h0 = tgs.tensor([[2.0], [5.0]], dtype="float64", requires_grad=True)

    def cell(x, h):  # the first row ends at 0, where log has no derivative
        return tgs.log(h), h - x

    ys, _ = tgs.unroll(cell, np.ones((3, 2, 1)), h0, lengths=[2, 3])
    ys.sum().backward()
    np.testing.assert_allclose(h0.grad.numpy(), [[1 / 2 + 1], [1 / 5 + 1 / 4 + 1 / 3]])


def test_no_steps_stay_on_the_tape():
    layer = nn.GRU(2, 3)
    ys, _ = layer(np.zeros((0, 4, 2), "f4"))
    assert ys.shape == (0, 4, 3)
    ys.sum().backward()
    assert (layer.cells[0].weight_ih.grad.numpy() == 0).all()
    embedding = nn.Embedding(1, 2)
    ys, _ = tgs.unroll(
        lambda x, s: (embedding(x) + s, s), np.zeros((0, 3), int), np.zeros((3, 2), "f4")
    )
    assert ys.shape == (0, 3, 2)


def test_initial_states_have_gradients_and_may_be_trained(rng):
    class Started(nn.LSTMCell):
        """Starts from a row that is learned."""

        def __init__(self, *sizes: int) -> None:
            super().__init__(*sizes, dtype="float64", rng=0)
            self.start = tgs.tensor(np.zeros((1, self.hidden_size)), requires_grad=True)

        def initial_state(self, batch_size: int):
            h = tgs.broadcast_to(self.start, (batch_size, self.hidden_size))
            return h, h * 0.5

    cell = Started(2, 3)
    optimizer = tgs.optim.Adam(cell.parameters(), lr=0.1)
    xs, target = rng.standard_normal((3, 4, 2)), rng.standard_normal((3, 4, 3)) * 0.3
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(tgs.unroll(cell, xs)[0], target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert np.abs(cell.start.numpy()).max() > 0.1
    h0 = tgs.tensor(np.zeros((4, 3)), requires_grad=True)
    tgs.unroll(nn.GRUCell(2, 3, dtype="float64"), xs, h0)[0].sum().backward()
    assert np.abs(h0.grad.numpy()).min() > 0


def test_any_callable_and_any_structure(rng):
    class Memory(NamedTuple):
        fast: tgs.Tensor
        slow: tgs.Tensor

    w = tgs.tensor(rng.standard_normal((2, 3)), requires_grad=True)

    def cell(x, state):
        fast = tgs.tanh(x["a"] @ w + state.fast)
        slow = 0.9 * state.slow + 0.1 * x["b"]
        return {"sum": fast.sum(axis=-1), "both": (fast, slow)}, Memory(fast, slow)

    xs = {"a": rng.standard_normal((4, 2, 2)), "b": rng.standard_normal((4, 2, 1))}
    start = Memory(np.zeros((2, 3)), np.zeros((2, 1)))
    ys, last = tgs.unroll(cell, xs, start)
    assert ys["sum"].shape == (4, 2)
    assert ys["both"][1].shape == (4, 2, 1)
    assert isinstance(last, Memory)
    np.testing.assert_array_equal(ys["both"][0][3], last.fast)
    ys, _ = tgs.unroll(cell, xs, start, lengths=[1, 4])
    assert (ys["sum"].numpy()[1:, 0] == 0).all()
    ys["sum"].sum().backward()
    assert w.grad is not None
    ys, last = tgs.unroll(cell, {k: v[:0] for k, v in xs.items()}, start)
    assert ys["both"][0].shape == (0, 2, 3)
    assert last.fast.shape == (2, 3)


def test_resets_without_initial_state_return_to_the_state_passed_in():
    xs = np.ones((4, 2, 1))
    resets = np.zeros((4, 2), bool)
    resets[2, 1] = True
    ys, _ = tgs.unroll(lambda x, s: (s + x, s + x), xs, np.full((2, 1), 10.0), resets=resets)
    assert ys.numpy()[:, :, 0].T.tolist() == [[11, 12, 13, 14], [11, 12, 11, 12]]
    ys, _ = tgs.unroll(
        lambda x, s: (s + x, s + x), xs, np.full((2, 1), 10.0), resets=resets, reverse=True
    )
    assert ys.numpy()[:, :, 0].T.tolist() == [[14, 13, 12, 11], [13, 12, 11, 11]]


def test_backward_through_many_steps_has_the_sum_of_their_gradients(rng):
    """T3: the gradient of shared weights is the sum over the steps."""
    cell = nn.RNNCell(2, 3, dtype="float64", rng=rng)
    xs = rng.standard_normal((6, 2, 2))
    tgs.unroll(cell, xs)[0][-1].sum().backward()
    copies = [tgs.tensor(cell.weight_hh.detach(), requires_grad=True) for _ in range(6)]
    h = cell.initial_state(2)
    for t, own in enumerate(copies):
        h = tgs.tanh(xs[t] @ cell.weight_ih.T + h @ own.T + cell.bias)
    h.sum().backward()
    total = sum(own.grad.numpy() for own in copies)
    np.testing.assert_allclose(cell.weight_hh.grad.numpy(), total, rtol=1e-12)


CELL = nn.GRUCell(2, 3, rng=0)
X = np.zeros((4, 5, 2), "f4")
BAD = {
    r"no initial_state\(batch_size\) and no state": lambda: tgs.unroll(lambda x, s: (x, s), X),
    r"xs has shape \(4,\), expected \(T, B, ...\)": lambda: tgs.unroll(CELL, X[:, 0, 0]),
    r"lengths has shape \(4,\), expected \(5,\)": lambda: tgs.unroll(CELL, X, lengths=[1] * 4),
    "lengths from 0 to 5 were given, expected 0 to T = 4": lambda: tgs.unroll(
        CELL, X, lengths=[0, 1, 2, 3, 5]
    ),
    "lengths from -1 to": lambda: tgs.unroll(CELL, X, lengths=[-1] * 5),
    "lengths has dtype float64": lambda: tgs.unroll(CELL, X, lengths=[1.0] * 5),
    r"resets has shape \(5, 4\), expected \(T, B\) = \(4, 5\)": lambda: tgs.unroll(
        CELL, X, resets=np.zeros((5, 4), bool)
    ),
    "lengths: the rows given differ": lambda: tgs.unroll(CELL, X, lengths=[[1], [1, 2]]),
    "resets has dtype int64": lambda: tgs.unroll(CELL, X, resets=np.zeros((4, 5), int)),
    r"state has shape \(3, 3\), expected \(5, ...\)": lambda: tgs.unroll(
        CELL, X, np.zeros((3, 3), "f4")
    ),
    r"state is \(a tensor, a tensor\), but initial_state gives a tensor": lambda: tgs.unroll(
        CELL, X, (np.zeros((5, 3), "f4"),) * 2
    ),
    r"state is float32\(5, 4\), but initial_state gives float32\(5, 3\)": lambda: tgs.unroll(
        CELL, X, np.zeros((5, 4), "f4")
    ),
    r"state at \[1\] is float32\(5, 4\), but initial_state gives": lambda: tgs.unroll(
        nn.LSTMCell(2, 3), X, (np.zeros((5, 3), "f4"), np.zeros((5, 4), "f4"))
    ),
    "state has dtype int64": lambda: tgs.unroll(CELL, X, np.zeros((5, 3), int)),
    "share one dtype, and xs is float64: convert": lambda: tgs.unroll(CELL, X.astype("f8")),
    r"x of one step has shape \(3,\), expected \(B, 3\).*\(T, B, 3\)": lambda: tgs.unroll(
        nn.LSTMCell(3, 4), np.ones((7, 3), "f4")
    ),
    r"GRUCell: the state is \(a tensor, a tensor\), expected a tensor \(1, 3\)": lambda: nn.GRUCell(
        2, 3
    )(tgs.zeros(1, 2), (tgs.zeros(1, 3), tgs.zeros(1, 3))),
    r"GRU: resets has shape \(5, 2\), expected \(B, T\) = \(2, 5\)": lambda: nn.GRU(
        3, 4, batch_first=True
    )(np.ones((2, 5, 3), "f4"), resets=np.zeros((5, 2), bool)),
    r"RNNCell: the state has shape \(20, 3\), expected \(1, 3\)": lambda: nn.RNNCell(2, 3)(
        tgs.zeros(1, 2), tgs.zeros(20, 3)
    ),
    r"LSTMCell: the state is a tensor, expected a pair": lambda: nn.LSTMCell(2, 3)(
        tgs.zeros(1, 2), tgs.zeros(1, 3)
    ),
    r"Recurrent: cells\[1\]: class GRUCell was given, expected a cell that is made": (
        lambda: nn.Recurrent([nn.GRUCell(2, 3), nn.GRUCell])
    ),
    r"Recurrent: cells\[0\]: 1 was given, expected a cell": lambda: nn.Recurrent([1]),
    r"no initial_state\(batch_size\) and no state was given; give it that, or pass": (
        lambda: tgs.scan(lambda x, h: (x, h), X)
    ),
    "given as the cell": lambda: tgs.unroll(nn.GRUCell, X),
    "expected a list of cells": lambda: nn.Recurrent(CELL),
    "tgs.stack makes one tensor": lambda: tgs.unroll(CELL, [X[0], X[1]]),
    "T and B must agree": lambda: tgs.unroll(CELL, (X, X[:2])),
    "nonlinearity: 'than' was given": lambda: nn.RNNCell(2, 3, "than"),
    "hidden_size: 0 was given": lambda: nn.LSTMCell(2, 0),
    "initialiser: 'zeros' was given": lambda: nn.RNNCell(2, 3, recurrent="zeros"),
    "x has shape .* expected 7 elements": lambda: nn.LSTM(7, 3)(X),
    r"x has shape \(4, 5\), expected \(T, B, I\)": lambda: nn.LSTM(2, 3)(X[:, :, 0]),
    r"state is a tensor, expected \(a tensor, a tensor\) with leaves": lambda: nn.LSTM(2, 3)(
        X, np.zeros((1, 5, 3), "f4")
    ),
    "layers times directions first": lambda: nn.GRU(2, 3)(X, np.zeros((2, 5, 3), "f4")),
    "one for each cell": lambda: nn.Recurrent([CELL])(X, (X, X)),
    "expected 2 for each layer": lambda: nn.Recurrent([CELL], bidirectional=True),
    "backend 'gpu' was given": lambda: nn.RNN(2, 3, backend="gpu"),
    "expected one": lambda: nn.RNN(2, 3, bidirectional=True, reverse=True),
    "RNN: num_layers: 0": lambda: nn.RNN(2, 3, num_layers=0),
    "RNN: backend 'tapes'": lambda: nn.RNN(2, 3, backend="tapes"),
    "GRUCell: hidden_size: -1 was given": lambda: nn.GRU(2, -1),
    "p: None": lambda: nn.Dropout(None),
    "LSTM: dropout: 1.5 was given": lambda: nn.LSTM(2, 3, dropout=1.5),
}


@pytest.mark.parametrize("words", BAD)
def test_bad_arguments(words):
    with pytest.raises(ValueError, match=words):
        BAD[words]()


class Outputs(nn.Module):
    """A cell whose y is what a function makes of the state."""

    def __init__(self, of):
        self.of = of

    def initial_state(self, batch_size):
        return tgs.zeros(batch_size, 3)

    def forward(self, x, h):
        h = tgs.tanh(x + h)
        return self.of(h), h


@pytest.mark.parametrize(
    ("of", "options", "layers", "given"),
    [
        (lambda h: (h, h), {"output": "last"}, 1, r"\(a tensor, a tensor\)"),
        (lambda h: (h, h), {"bidirectional": True, "output": "last"}, 1, r"\(a tensor, a tensor\)"),
        (lambda h: {"h": h}, {}, 2, "{'h': a tensor}"),
        (lambda h: h.sum(axis=-1), {"bidirectional": True}, 1, r"a tensor \(7, 5\)"),
    ],
)
def test_outputs_that_a_layer_cannot_go_on_from(of, options, layers, given):
    count = layers * (2 if "bidirectional" in options else 1)
    layer = nn.Recurrent([Outputs(of) for _ in range(count)], backend="tape", **options)
    words = (
        rf"Recurrent: the outputs of cell 0 \(Outputs\) are {given}, expected a tensor \(T, B, H\)"
    )
    with pytest.raises(tgs.ShapeError, match=words):
        layer(np.ones((7, 5, 3), "f4"))


def test_outputs_of_one_layer_may_be_anything():
    x = np.ones((7, 5, 3), "f4")
    ys, _ = nn.Recurrent([Outputs(lambda h: (h, h[:, 0]))], backend="tape")(x)
    assert [y.shape for y in ys] == [(7, 5, 3), (7, 5)]
    cell = Outputs(lambda h: h[:, 0])
    assert nn.Recurrent([cell], backend="tape", output="last")(x)[0].shape == (5,)
    several = nn.Recurrent([cell, lambda x, h: (x + h, h)], backend="tape")
    assert several(x, (np.zeros((5, 3), "f4"), np.zeros(5, "f4")))[0].shape == (7, 5)


BAD_CELLS = {
    "expected a pair": lambda x, s: x,
    "a tuple of 3": lambda x, s: (x, s, s),
    r"at step 0 the cell <lambda> \(.*, line \d+\) returned a state that is a NoneType": (
        lambda x, s: (x, None)
    ),
    "axis 0 is the batch": lambda x, s: (x.sum(axis=0), s),
    "expected a tensor, or a tuple": lambda x, s: ([x], s),
    r"y\['b'\]: a NoneType was given": lambda x, s: ({"a": x, "b": None}, s),
}


@pytest.mark.parametrize("words", BAD_CELLS)
def test_bad_cells(words):
    with pytest.raises(tgs.TraceError, match=words):
        tgs.unroll(BAD_CELLS[words], X, np.zeros((5, 2), "f4"))


@pytest.mark.parametrize("drive", [tgs.unroll, tgs.scan])
def test_a_cell_without_inputs_or_outputs(drive):
    start = np.zeros((5, 2), "f4")
    with pytest.raises(tgs.TraceError, match=r"cell <lambda> .* no output; y: a NoneType was"):
        drive(lambda x, s: (None, s), X, start)
    with pytest.raises(ValueError, match=r"xs is a dict without a tensor, expected"):
        drive(lambda x, s: (s, s), {}, start)


def test_a_state_that_changes():
    start = np.zeros((5, 2), "f4")
    with pytest.raises(tgs.ShapeError, match=r"at step 0 .* state that is float32\(5, 1\)"):
        tgs.unroll(lambda x, s: (x, s[:, :1]), X, start)
    with pytest.raises(
        tgs.ShapeError, match=r"that is \(a tensor, a tensor\), but it was given a tensor"
    ):
        tgs.unroll(lambda x, s: (x, (s, s)), X, start)


class TestLayers:
    def oracle(self, layer, x, states, lengths):
        """Layer by layer, direction by direction, with unroll."""
        last, D = [], layer.directions
        for level in range(layer.num_layers):
            outs = []
            for d in range(D):
                cell = layer.cells[level * D + d]
                y, end = tgs.unroll(cell, x, states[level * D + d], lengths=lengths, reverse=d == 1)
                outs.append(y.numpy())
                last.append(end)
            x = np.concatenate(outs, axis=-1)
        return x, last

    @pytest.mark.parametrize("lengths", [None, [4, 0, 2]])
    @pytest.mark.parametrize("bidirectional", [False, True])
    @pytest.mark.parametrize("batch_first", [False, True])
    @pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
    def test_stacked(self, kind, batch_first, bidirectional, lengths, rng):
        D = 2 if bidirectional else 1
        layer = kind(
            2, 3, num_layers=2, batch_first=batch_first, bidirectional=bidirectional,
            dtype="float64", rng=rng,
        )  # fmt: skip
        x = rng.standard_normal((4, 3, 2))
        parts = 2 if kind is nn.LSTM else 1
        values = rng.standard_normal((parts, 2 * D, 3, 3))
        state = tuple(values) if parts == 2 else values[0]
        per_cell = [tuple(v[k] for v in values) for k in range(2 * D)]
        states = [s if parts == 2 else s[0] for s in per_cell]
        ys, last = layer(x.swapaxes(0, 1) if batch_first else x, state, lengths=lengths)
        expected, ends = self.oracle(layer, x, states, lengths)
        got = ys.numpy().swapaxes(0, 1) if batch_first else ys.numpy()
        np.testing.assert_allclose(got, expected, atol=1e-13)
        for k, end in enumerate(ends):
            for leaf, part in zip(leaves(end), leaves(last), strict=True):
                assert part.shape == (2 * D, 3, 3)
                np.testing.assert_allclose(part.numpy()[k], leaf.numpy(), atol=1e-13)
        ys.sum().backward()
        assert all(p.grad is not None for p in layer.parameters())

    def test_an_unknown_option_is_answered_with_those_there_are(self):
        for wrong in ("peephol", "proj_size", "activation"):
            words = f"LSTM: {wrong}= was given, expected .* LSTMCell: forget_bias, peephole, "
            with pytest.raises(TypeError, match=words):
                nn.LSTM(2, 3, **{wrong: 1})
        with pytest.raises(TypeError, match=r"GRU: peephole= was given, expected .* reset_after"):
            nn.GRU(2, 3, peephole=True)

    def test_recurrent_takes_anybodys_cells(self, rng):
        cells = [nn.LSTMCell(2, 3, rng=0), nn.GRUCell(3, 4, rng=0)]
        layer = nn.Recurrent(cells, batch_first=True)
        ys, state = layer(np.ones((5, 7, 2), "f4"), resets=np.zeros((5, 7), bool))
        assert ys.shape == (5, 7, 4)
        assert isinstance(state, tuple)
        assert state[0][1].shape == (5, 3)
        assert state[1].shape == (5, 4)
        again, _ = layer(np.ones((5, 7, 2), "f4"), state)
        assert np.abs(again.numpy() - ys.numpy()).max() > 0

    def test_reverse(self, rng):
        x = rng.standard_normal((4, 2, 3)).astype("f4")
        forward, back = nn.GRU(3, 2, rng=1), nn.GRU(3, 2, rng=1, reverse=True)
        np.testing.assert_allclose(forward(x[::-1])[0].numpy()[::-1], back(x)[0], rtol=1e-6)

    def test_dropout_between_layers_while_training(self):
        tgs.manual_seed(0)
        layer = nn.RNN(2, 8, num_layers=2, dropout=0.5)
        x = np.ones((3, 2, 2), "f4")
        assert np.abs(layer(x)[0].numpy() - layer(x)[0].numpy()).max() > 0
        outputs = []
        for _ in range(2):
            tgs.manual_seed(5)
            outputs.append(layer(x)[0].tolist())
        assert outputs[0] == outputs[1]
        layer.eval()
        np.testing.assert_array_equal(layer(x)[0], layer(x)[0])
        seeded = nn.RNN(2, 8, num_layers=2, dropout=0.5, rng=0)
        assert np.abs(seeded(x)[0].numpy() - seeded(x)[0].numpy()).max() > 0

    def test_empty(self):
        layer = nn.LSTM(2, 3, num_layers=2, bidirectional=True)
        ys, (h, _) = layer(np.zeros((0, 4, 2), "f4"))
        assert ys.shape == (0, 4, 6)
        assert h.shape == (4, 4, 3)
        ys, (h, _) = layer(np.zeros((5, 0, 2), "f4"))
        assert ys.shape == (5, 0, 6)
        assert h.shape == (4, 0, 3)
        ys.sum().backward()
        assert (layer.cells[0].weight_ih.grad.numpy() == 0).all()

    def test_parameters_by_name(self):
        layer = nn.GRU(2, 3, num_layers=2, reset_after=True)
        shapes = {name: p.shape for name, p in layer.named_parameters()}
        assert shapes == {
            "cells.0.weight_ih": (9, 2),
            "cells.0.weight_hh": (9, 3),
            "cells.0.bias": (9,),
            "cells.0.bias_hh": (9,),
            "cells.1.weight_ih": (9, 3),
            "cells.1.weight_hh": (9, 3),
            "cells.1.bias": (9,),
            "cells.1.bias_hh": (9,),
        }
        lstm = nn.LSTMCell(2, 3, forget_bias=2.0)
        assert lstm.bias.tolist() == [0] * 3 + [2] * 3 + [0] * 6
        assert nn.LSTMCell(2, 3, bias=False).bias is None
        assert (
            nn.RNNCell(2, 3, "relu", recurrent="identity").weight_hh.tolist() == np.eye(3).tolist()
        )


def test_ten_thousand_steps_train_and_leave_nothing():
    benchmark = Path(__file__).parent.parent / "benchmarks" / "long_sequence.py"
    measure = runpy.run_path(str(benchmark))["measure"]
    measure(100, hidden_size=4)
    short, long = (measure(steps, hidden_size=4) for steps in (1000, 10_000))
    assert 9 * short["held MB"] < long["held MB"] < 11 * short["held MB"]  # linear
    assert long["left MB"] < 0.01 * long["held MB"]  # Python's own free lists, whatever the length


@pytest.mark.parametrize("batch_first", [False, True])
def test_layers_of_cells_with_several_inputs(rng, batch_first):
    def timed(inputs, h):  # an input, and the time since the last one
        h = h * tgs.exp(-inputs["since"])[:, None] + inputs["x"]
        return h, h

    cells = [timed, nn.GRUCell(3, 4, dtype="float64", rng=0)]
    layer = nn.Recurrent(cells, batch_first=batch_first)
    xs = {"x": rng.standard_normal((6, 2, 3)), "since": rng.random((6, 2))}
    state, lengths = np.zeros((2, 3)), [6, 4]
    first, _ = tgs.unroll(timed, xs, state, lengths=lengths)
    expected, _ = tgs.unroll(cells[1], first, lengths=lengths)
    given = {name: x.swapaxes(0, 1) if batch_first else x for name, x in xs.items()}
    ys, _ = layer(given, (state, tgs.zeros(2, 4, dtype="float64")), lengths=lengths)
    found = ys.numpy().swapaxes(0, 1) if batch_first else ys
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    with pytest.raises(tgs.ShapeError, match=r"Recurrent: x\['since'\] has shape \(6,\), expected"):
        layer({**given, "since": np.zeros(6)})
