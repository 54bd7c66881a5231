"""Truncated backpropagation through time, and the state that goes from batch to batch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tinygrad_seq as tgs
from tinygrad_seq import nn, optim, train
from tinygrad_seq.trees import leaves

mse = nn.functional.mse_loss


def data(rng, T, B, I=2, K=3):
    return rng.standard_normal((T, B, I)), rng.standard_normal((T, B, K))


def model_of(rng, backend="tape"):
    return nn.Sequential(
        nn.GRU(2, 4, dtype="float64", rng=rng, backend=backend),
        nn.Linear(4, 3, dtype="float64", rng=rng),
    )


def gradients(model):
    found = [p.grad.numpy().copy() for p in model.parameters()]
    model.zero_grad()
    return found


def naive(model, x, y, k1, k2):
    """The gradient of each block: step by step, the state cut where the error must stop."""
    T = len(x)
    found = []
    for a in range(0, T, k1):
        b = min(a + k1, T)
        windows = [(max(0, a + k1 - k2), b, a)]
        if k2 < k1:
            windows = [(s, min(s + k2, b), s) for s in range(a, b, k2)]
        for s, e, first in windows:
            _, state = model.with_state(tgs.tensor(x[:s])) if s else (None, None)
            prediction, _ = model.with_state(tgs.tensor(x[s:e]), tgs.detach(state) if s else None)
            part = prediction[first - s :]
            loss = tgs.sum(tgs.square(part - y[first:e])) * (1 / y[a:b].size)
            loss.backward()
        found.append(gradients(model))
    return found


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 10), st.integers(1, 10), st.integers(1, 3))
def test_the_error_goes_as_far_as_it_is_said(T, k1, k2, B):
    rng = np.random.default_rng(T * 100 + k1 * 10 + k2)
    model, (x, y) = model_of(rng), data(rng, T, B)
    expected = naive(model, x, y, k1, k2)
    ends, states = [], []
    for block, wanted in zip(train.tbptt(model, x, y, mse, k1, k2), expected, strict=True):
        for a, b in zip(gradients(model), wanted, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12)
        ends.append((block.first, block.last, block.size))
        states.append(block.state)
    assert ends == [(a, min(a + k1, T), (min(a + k1, T) - a) * B) for a in range(0, T, k1)]
    _, last = model.with_state(tgs.tensor(x))
    for a, b in zip(leaves(states[-1]), leaves(last), strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), atol=1e-12)
        assert not a.requires_grad


def test_k2_of_all_steps_is_the_whole_gradient():
    """The notes' own form: one update at the end; k2 = T leaves nothing out."""
    rng = np.random.default_rng(0)
    model, (x, y) = model_of(rng, "scan"), data(rng, 12, 3)
    mse(model(x), y).backward()
    whole = gradients(model)
    (block,) = train.tbptt(model, x, y, mse, k1=12, k2=12)
    for a, b in zip(gradients(model), whole, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
    assert block.loss == pytest.approx(mse(model(x), y).item())
    (_,) = train.tbptt(model, x, y, mse, k1=12, k2=3)
    assert not np.allclose(gradients(model)[0], whole[0])


def test_lengths():
    """Rows that have ended count in no block, and the mean is over the steps that there are."""
    rng = np.random.default_rng(0)
    model, (x, y) = model_of(rng), data(rng, 9, 3)
    lengths = np.array([9, 0, 4])
    mask = np.arange(9)[:, None] < lengths
    target = np.concatenate([y, mask[:, :, None]], axis=-1)

    def loss(prediction, target):
        return mse(prediction, target[..., :3], mask=target.numpy()[..., 3] > 0)

    for k1, k2 in ((9, 9), (9, 2), (3, 5)):
        blocks = []
        for block in train.tbptt(model, x, target, loss, k1, k2, lengths=lengths):
            blocks.append(block)
        assert sum(block.size for block in blocks) == 13
        if k1 == 9:
            whole = loss(model(x, lengths=lengths), tgs.tensor(target)).item()
            assert blocks[0].loss == pytest.approx(whole)
        assert all(np.isfinite(g).all() for g in gradients(model))
    found = [
        [block.size for block in train.tbptt(model, x, target, loss, 3, 3, lengths=given)]
        for given in (lengths, lengths.astype("u1"))
    ]
    assert found == [[6, 4, 3]] * 2


@pytest.mark.parametrize("k2", [8, 4, 3, 1])
def test_a_masked_loss_is_that_of_the_whole_block(k2):
    """Where pieces have different numbers of targets, or none, the mean is still over all."""
    rng = np.random.default_rng(0)
    model, (x, y) = model_of(rng), data(rng, 8, 2)
    mask = np.zeros((8, 2, 1))
    mask[-1], mask[2, 0] = 1, 1

    def loss(prediction, target):
        return mse(prediction, target[..., :3], mask=target.numpy()[..., 3] > 0)

    (block,) = train.tbptt(model, x, np.concatenate([y, mask], axis=-1), loss, 8, k2)
    expected = mse(model(x), y, mask=mask[..., 0] > 0)
    assert block.loss == pytest.approx(expected.item())
    head = model[1].weight.grad.numpy().copy()  # which no state lies before
    model.zero_grad()
    expected.backward()
    np.testing.assert_allclose(head, model[1].weight.grad.numpy(), atol=1e-12)


def test_fit_goes_by_blocks():
    """Each block is an update, as in a loop by hand."""
    x, y = data(np.random.default_rng(1), 10, 2)
    found = []
    for by_hand in (True, False):
        model = model_of(np.random.default_rng(0))
        optimizer = optim.SGD(model.parameters(), 0.1)
        if by_hand:
            for _ in range(2):
                for _ in train.tbptt(model, x, y, mse, 4, 6):
                    optimizer.step()
                    optimizer.zero_grad()
        else:
            history = train.fit(
                *(model, [(x, y)], mse, optimizer),
                epochs=2,
                tbptt=(4, 6),
                validation=[(x, y)],
                progress=False,
            )
            assert history.loss[1] < history.loss[0]
            assert len(history.validation) == 2
        found.append([p.numpy() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_state_goes_from_batch_to_batch():
    """Two halves with the state carried give the losses of the whole; each epoch begins anew."""
    rng = np.random.default_rng(0)
    x, y = data(rng, 10, 2)
    halves = [(x[:5], y[:5]), (x[5:], y[5:])]
    model = model_of(rng)
    whole = train.evaluate(model, [(x, y)], mse, carry_state=True)
    assert train.evaluate(model, halves, mse, carry_state=True) == pytest.approx(whole)
    assert train.evaluate(model, halves, mse) != pytest.approx(whole)
    still = optim.SGD(model.parameters(), 1e-12)
    for more in ({}, {"tbptt": (2, 3)}):
        history = train.fit(
            model, halves, mse, still, epochs=2, carry_state=True, progress=False, **more
        )
        assert history.loss == pytest.approx([whole, whole])


@pytest.mark.parametrize("more", [{}, {"tbptt": (2, 3)}])
def test_a_smaller_batch_after_a_larger_one(more):
    rng = np.random.default_rng(0)
    x, y = data(rng, 6, 3)
    model, batches = model_of(rng), [(x, y), (x[:, :2], y[:, :2])]
    optimizer = optim.SGD(model.parameters(), 0.1)
    with pytest.raises(tgs.ShapeError, match=r"the state is that of the batch before.* drop_last"):
        train.fit(
            model, batches, mse, optimizer, epochs=1, carry_state=True, progress=False, **more
        )


class TestSequential:
    def test_with_state(self):
        rng = np.random.default_rng(0)
        model = nn.Sequential(
            nn.LSTM(2, 3, rng=rng), nn.Sequential(nn.Linear(3, 3, rng=rng), nn.RNN(3, 2, rng=rng))
        )
        x = rng.standard_normal((6, 2, 2)).astype("f4")
        y, state = model.with_state(x)
        np.testing.assert_array_equal(y.numpy(), model(x).numpy())
        first, middle = model.with_state(x[:4])
        second, _ = model.with_state(x[4:], middle)
        np.testing.assert_allclose(np.concatenate([first.numpy(), second.numpy()]), y.numpy())
        assert len(state) == 2

    def test_errors(self):
        with pytest.raises(tgs.ShapeError, match="expected a tuple of 1, one for each module"):
            nn.Sequential(nn.RNN(2, 3)).with_state(np.ones((2, 1, 2), "f4"), (None, None))
        with pytest.raises(tgs.ShapeError, match="no module in it takes a state"):
            nn.Sequential(nn.Linear(2, 3)).with_state(np.ones((2, 2), "f4"))


class TestLastOutput:
    @pytest.mark.parametrize("lengths", [None, [5, 0, 2]])
    def test_both_directions(self, lengths):
        rng = np.random.default_rng(0)
        x = rng.standard_normal((5, 3, 2)).astype("f4")
        layers = [
            nn.GRU(2, 4, 2, bidirectional=True, output=output, rng=0)
            for output in ("sequence", "last")
        ]
        ys, last = (layer(x, lengths=lengths)[0].numpy() for layer in layers)
        assert last.shape == (3, 8)
        for b in range(3):
            n = 5 if lengths is None else lengths[b]
            if n:
                np.testing.assert_array_equal(last[b, :4], ys[n - 1, b, :4])
                np.testing.assert_array_equal(last[b, 4:], ys[0, b, 4:])
            else:
                assert not last[b].any()

    def test_of_no_steps(self):
        layer = nn.RNN(2, 4, output="last", batch_first=True)
        assert layer(np.ones((3, 0, 2), "f4"))[0].numpy().tolist() == [[0.0] * 4] * 3
        assert layer(np.ones((3, 5, 2), "f4"))[0].shape == (3, 4)
        with pytest.raises(ValueError, match="output 'all' was given, expected sequence or last"):
            nn.RNN(2, 4, output="all")


X, Y = data(np.random.default_rng(0), 6, 2)
PLAIN = model_of(np.random.default_rng(0))
BAD = {
    "tbptt: model: None was given": lambda: train.tbptt(None, X, Y, mse, 2, 2),
    "tbptt: loss: 'mse' was given": lambda: train.tbptt(PLAIN, X, Y, "mse", 2, 2),
    "tbptt: k1: 0 was given": lambda: train.tbptt(PLAIN, X, Y, mse, 0, 2),
    "tbptt: k2: -1 was given": lambda: train.tbptt(PLAIN, X, Y, mse, 2, -1),
    r"expected \(6, 2\) first in all of inputs and targets": lambda: train.tbptt(
        PLAIN, X, Y[:5], mse, 2, 2
    ),
    r"inputs: shape \(\d+,\) was given, expected \(T, B, ...\)": lambda: train.tbptt(
        PLAIN, X[0, 0], Y, mse, 2, 2
    ),
    r"inputs: a list of shapes \[\(\), \(\), \(\)\] was .*np.asarray makes one": lambda: (
        train.tbptt(PLAIN, X.tolist(), Y, mse, 2, 2)
    ),
    r"lengths has shape \(3,\), expected \(2,\)": lambda: train.tbptt(
        PLAIN, X, Y, mse, 2, 2, lengths=[1, 2, 3]
    ),
    "lengths from -1 to 2, int64, were given": lambda: train.tbptt(
        PLAIN, X, Y, mse, 2, 2, lengths=[-1, 2]
    ),
    "lengths from 2 to 7, int64, were given": lambda: train.tbptt(
        PLAIN, X, Y, mse, 2, 2, lengths=[7, 2]
    ),
    "Linear cannot be called as model": lambda: list(
        train.tbptt(nn.Linear(2, 3, dtype="float64"), X, Y, mse, 2, 2)
    ),
    "runs from the last step to the first": lambda: train.tbptt(
        nn.GRU(2, 3, bidirectional=True), X, Y, mse, 2, 2
    ),
    "evaluate: the model has a GRU that runs from the last": lambda: train.evaluate(
        nn.GRU(2, 3, bidirectional=True), [(X, Y)], mse, carry_state=True
    ),
    r"expected a pair \(prediction, state\)": lambda: list(
        train.tbptt(lambda x, s: x, X, Y, mse, 2, 2)
    ),
    r"prediction for 4 steps of 2 rows has shape \(4, 3\), expected \(4, 2, ...\)": lambda: list(
        train.tbptt(nn.GRU(2, 3, output="last", dtype="float64"), X, Y, lambda p, t: p.sum(), 2, 4)
    ),
    "the loss returned shape": lambda: list(train.tbptt(PLAIN, X, Y, lambda p, t: p - t, 2, 2)),
    "the loss is nan": lambda: list(train.tbptt(PLAIN, X * np.nan, Y, mse, 2, 2)),
    r"tbptt is 5, expected a pair \(k1, k2\)": lambda: train.fit(
        PLAIN, [(X, Y)], mse, optim.SGD(PLAIN.parameters(), 0.1), epochs=1, tbptt=5
    ),
    "fit: tbptt k2: 0 was given": lambda: train.fit(
        PLAIN, [(X, Y)], mse, optim.SGD(PLAIN.parameters(), 0.1), epochs=1, tbptt=(2, 0)
    ),
}


@pytest.mark.parametrize("words", BAD)
def test_errors_say_what_was_given(words):
    with pytest.raises(ValueError, match=words):
        BAD[words]()


def test_blocks_are_not_cut_from_the_batch():
    layer, x = tgs.nn.LSTM(3, 4, batch_first=True), np.zeros((5, 6, 3), "f4")
    with pytest.raises(ValueError, match=r"batch_first.*expected a model and inputs with time"):
        tgs.train.tbptt(layer, x, x[..., :1], nn.functional.mse_loss, 2, 2)
    optimizer = tgs.optim.SGD(layer.parameters(), 0.1)
    with pytest.raises(ValueError, match="fit: tbptt: LSTM in the model has batch_first"):
        tgs.train.fit(layer, [], nn.functional.mse_loss, optimizer, epochs=1, tbptt=(2, 2))
