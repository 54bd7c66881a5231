"""Norms of gradients at every step, against step by step on the tape."""

from __future__ import annotations

import numpy as np
import pytest

import tinygrad_seq as tgs
from tinygrad_seq import nn
from tinygrad_seq.trees import leaves, map_leaves


def step_by_step(cell, xs, weights, dtype="float64"):
    """∂L/∂s_t and each step's share in ∂L/∂W, with parameters of its own for every step."""
    T, B = xs.shape[:2]
    own = [
        {name: tgs.tensor(p.numpy(), requires_grad=True) for name, p in cell.named_parameters()}
        for _ in range(T)
    ]
    nudges = [
        map_leaves(lambda leaf: tgs.zeros(*leaf.shape, dtype=dtype), cell.initial_state(B))
        for _ in range(T)
    ]
    for tree in nudges:
        for leaf in leaves(tree):
            leaf.requires_grad = True
    state, loss = cell.initial_state(B), tgs.tensor(0.0, dtype)
    kept = {name: getattr(cell, name) for name in own[0]}
    for t in range(T):
        for name, tensor in own[t].items():
            setattr(cell, name, tensor)
        _, state = cell(tgs.tensor(xs[t]), state)
        state = map_leaves(lambda a, b: a + b, state, nudges[t])
        loss = loss + tgs.sum(leaves(state)[0] * weights[t])
    loss.backward()
    for name, tensor in kept.items():
        setattr(cell, name, tensor)
    norms = [
        [0 if leaf.grad is None else np.linalg.norm(leaf.grad.numpy()) for leaf in leaves(tree)]
        for tree in nudges
    ]
    return np.array(norms).T, [{n: t.grad.numpy() for n, t in each.items()} for each in own]


CELLS = {
    "rnn": lambda: nn.RNNCell(3, 4, dtype="float64", rng=0),
    "lstm": lambda: nn.LSTMCell(3, 4, peephole=True, dtype="float64", rng=0),
    "gru": lambda: nn.GRUCell(3, 4, dtype="float64", rng=0),  # a matrix captured in two parts
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


def test_errors_say_what_was_given():
    cell = nn.RNNCell(2, 3, rng=0)
    x = np.ones((4, 1, 2), "f4")
    for words, call in {
        "was computed without a scan": lambda: tgs.gradient_flow(
            lambda: tgs.sum(tgs.unroll(cell, x)[0])
        ),
        "expected a loss: one number": lambda: tgs.gradient_flow(lambda: tgs.scan(cell, x)[0]),
        "a int was given, expected a function": lambda: tgs.gradient_flow(3),
        "parameters is a list": lambda: tgs.gradient_flow(lambda: None, [1]),
    }.items():
        with pytest.raises(ValueError, match=words):
            call()
