"""Norms of gradients at every step, against step by step on the tape."""

from __future__ import annotations

import numpy as np
import pytest

import tinygrad_seq as tgs
from tinygrad_seq import nn
from tinygrad_seq.structural import ARRAYS
from tinygrad_seq.tape import walk
from tinygrad_seq.tensors import entry_of
from tinygrad_seq.trees import leaves


def step_by_step(cell, xs, weights):
    """∂L/∂s_t and each step's share in ∂L/∂W, with parameters of its own for every step."""
    own = [
        {name: tgs.tensor(p.numpy(), requires_grad=True) for name, p in cell.named_parameters()}
        for _ in xs
    ]
    kept = {name: getattr(cell, name) for name in own[0]}
    state, states, loss = cell.initial_state(xs.shape[1]), [], tgs.tensor(0.0, "float64")
    for t, x in enumerate(xs):
        for name, tensor in own[t].items():
            setattr(cell, name, tensor)
        y, state = cell(tgs.tensor(x), state)
        states.append([entry_of(leaf) for leaf in leaves(state)])
        loss = loss + tgs.sum(y * weights[t])
    for name, tensor in kept.items():
        setattr(cell, name, tensor)

    def norm(entry):
        """That of the gradient, by all ways: the walk ends at this entry, and not before."""
        found = walk({entry_of(loss): np.ones(())}, ARRAYS, [entry], retain_graph=True)
        return np.linalg.norm(found.get(entry, 0))

    norms = np.array([[norm(entry) for entry in entries] for entries in states]).T
    loss.backward()
    return norms, [{n: t.grad.numpy() for n, t in each.items()} for each in own]


class WithHead(nn.RNNCell):
    """The output is made of the new state, and so is another leaf of that."""

    def __init__(self):
        super().__init__(3, 4, dtype="float64", rng=0)
        self.head = nn.parameter(np.ones((4, 4)) + np.eye(4), "float64")

    def initial_state(self, batch_size):
        return tgs.zeros(batch_size, 4, dtype="float64"), tgs.zeros(batch_size, 4, dtype="float64")

    def forward(self, x, state):
        h, mean = state
        _, h = super().forward(x, h + 0.1 * mean)
        return tgs.tanh(h) @ self.head, (h, 0.9 * mean + 0.1 * h)


CELLS = {
    "rnn": lambda: nn.RNNCell(3, 4, dtype="float64", rng=0),
    "lstm": lambda: nn.LSTMCell(3, 4, peephole=True, dtype="float64", rng=0),
    "gru": lambda: nn.GRUCell(3, 4, dtype="float64", rng=0),  # a matrix captured in two parts
    "with a head": WithHead,
}


@pytest.mark.parametrize("name", CELLS)
def test_against_the_tape(name):
    rng = np.random.default_rng(0)
    cell, T, B = CELLS[name](), 6, 3
    for p in cell.parameters():
        p.data = p.numpy() + 0.3 * rng.standard_normal(p.shape)
    xs, weights = rng.standard_normal((T, B, 3)), rng.standard_normal((T, B, 4))
    weights[2] = 0
    (flow,) = tgs.gradient_flow(
        lambda: tgs.sum(tgs.scan(cell, xs, checkpoint=2)[0] * weights), cell, keep_shares=True
    )
    norms, shares = step_by_step(cell, xs, weights)
    for found, expected in zip(flow.states.values(), norms, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9)
    np.testing.assert_allclose(flow.norm, np.sqrt((norms**2).sum(axis=0)), rtol=1e-9)
    assert all(p.grad is None for p in cell.parameters())
    tgs.sum(tgs.scan(cell, xs)[0] * weights).backward()
    for parameter, tensor in cell.named_parameters():
        for t in range(T):
            np.testing.assert_allclose(flow.shares[parameter][t], shares[t][parameter], atol=1e-10)
            assert flow.parameters[parameter][t] == pytest.approx(
                np.linalg.norm(shares[t][parameter])
            )
        total = flow.shares[parameter].sum(axis=0)  # T3 of the notes: the sum over all steps
        np.testing.assert_allclose(total, tensor.grad.numpy(), atol=1e-10)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", CELLS)
def test_rows_that_end_and_begin_anew(name, reverse, rng):
    cell, states = CELLS[name](), []

    def noted(x, state):
        y, state = cell(x, state)
        states.append([entry_of(leaf) for leaf in leaves(state)])
        return y, state

    noted.initial_state = cell.initial_state
    xs = rng.standard_normal((6, 3, 3))
    options = {"lengths": [4, 0, 6], "resets": rng.random((6, 3)) < 0.3, "reverse": reverse}
    ys, _ = tgs.unroll(noted, xs, **options)
    weights = rng.standard_normal(ys.shape)
    loss = tgs.sum(ys * weights)
    states = states[::-1] if reverse else states
    (flow,) = tgs.gradient_flow(lambda: tgs.sum(tgs.scan(cell, xs, **options)[0] * weights))
    for k, found in enumerate(flow.states.values()):
        for t, entries in enumerate(states):
            ended = walk({entry_of(loss): np.ones(())}, ARRAYS, [entries[k]], retain_graph=True)
            expected = np.linalg.norm(ended.get(entries[k], 0))
            np.testing.assert_allclose(found[t], expected, rtol=1e-9, atol=1e-12)


def test_layers_lengths_and_both_directions():
    rng = np.random.default_rng(0)
    layer = nn.GRU(3, 4, 2, bidirectional=True, rng=0)
    xs = rng.standard_normal((5, 3, 3)).astype("f4")
    lengths = [5, 0, 3]

    def loss():
        return tgs.sum(tgs.square(layer(xs, lengths=lengths)[0]))

    flows = tgs.gradient_flow(loss, layer, keep_shares=True)
    assert len(flows) == 4
    assert [next(iter(flow.parameters)).split(".")[1] for flow in flows] == list("0123")
    loss().backward()
    for flow in flows:
        for name, shares in flow.shares.items():
            expected = dict(layer.named_parameters())[name].grad.numpy()
            np.testing.assert_allclose(shares.sum(axis=0), expected, rtol=1e-3, atol=1e-5)


def test_rows_without_a_step():
    cell = nn.RNNCell(2, 3, rng=0)
    x, h = np.ones((4, 2, 2), "f4"), tgs.ones(2, 3, requires_grad=True)
    (flow,) = tgs.gradient_flow(lambda: tgs.sum(tgs.scan(cell, x, h, lengths=[0, 0])[1]), cell)
    np.testing.assert_array_equal(flow.states["state"], np.zeros(4))
    np.testing.assert_array_equal(flow.norm, np.zeros(4))


def test_vanishing_and_exploding_by_a_known_factor():
    """h' = a h: the gradient of the last state shrinks by a at every step back."""
    for a in (0.5, 1.5):
        scale = tgs.tensor(np.full(2, a), requires_grad=True)
        (flow,) = tgs.gradient_flow(
            lambda scale=scale: tgs.sum(
                tgs.scan(lambda x, h: (h, h * scale + x), np.ones((9, 1, 2)), np.ones((1, 2)))[1]
            ),
            {"scale": scale},
        )
        expected = np.sqrt(2) * a ** np.arange(8, -1, -1)
        np.testing.assert_allclose(flow.states["state"], expected)
        assert flow.parameters["scale"].shape == (9,)


@pytest.mark.parametrize("H", [3, 32])  # a panel that is not full, and whole ones
def test_on_through_a_matrix_that_another_scan_made(H, rng):
    def cell_of(matrix):
        def cell(x, h):
            h = tgs.tanh(x + h @ matrix)
            return h, h

        return cell

    W = tgs.tensor(0.1 * rng.standard_normal((H, H)), requires_grad=True)
    xs, others = rng.standard_normal((4, H, H)), rng.standard_normal((5, 2, H))

    def loss():
        _, made = tgs.scan(cell_of(W), xs, np.zeros((H, H)))
        return tgs.sum(tgs.scan(cell_of(made), others, np.zeros((2, H)))[0])

    flow, _ = tgs.gradient_flow(loss, {"W": W}, keep_shares=True)
    loss().backward()
    np.testing.assert_allclose(flow.shares["W"].sum(axis=0), W.grad.numpy(), rtol=1e-9, atol=1e-12)


def test_errors_say_what_was_given():
    cell = nn.RNNCell(2, 3, rng=0)
    x = np.ones((4, 1, 2), "f4")
    before, _ = tgs.scan(cell, x)
    for words, call in {
        "depends on no scan that the function ran": lambda: tgs.gradient_flow(
            lambda: tgs.sum(tgs.unroll(cell, x)[0])
        ),
        "inside of it": lambda: tgs.gradient_flow(lambda: tgs.sum(before)),
        "expected a loss: one number": lambda: tgs.gradient_flow(lambda: tgs.scan(cell, x)[0]),
        "a int was given, expected a function": lambda: tgs.gradient_flow(3),
        "parameters is a list": lambda: tgs.gradient_flow(lambda: None, [1]),
    }.items():
        with pytest.raises(ValueError, match=words):
            call()
