"""``gradient_flow`` on the device against the host, number for number."""

from __future__ import annotations

import copy

import cells
import numpy as np
import pytest
from test_scan_on_cuda import OPTIONS

import tinygrad_seq as tgs
from tinygrad_seq import nn
from tinygrad_seq.trees import leaves, map_leaves


def flows_of(model, place, given, run, weights):
    """The flows of a loss that weighs all that a run gives, and the gradients of ``backward``."""
    tgs.manual_seed(1)
    model = copy.deepcopy(model).to(place)
    given = map_leaves(lambda array: tgs.tensor(array).to(place), given)

    def loss():
        tgs.manual_seed(2)
        made = leaves(run(model, *given))
        while len(weights) < len(made):
            drawn = np.cos(len(weights) + np.arange(made[len(weights)].size))
            weights.append(drawn.reshape(made[len(weights)].shape))
        return sum(
            tgs.sum(y * tgs.tensor(w.astype(y.dtype)).to(place))
            for y, w in zip(made, weights, strict=True)
        )

    found = tgs.gradient_flow(loss, model, keep_shares=True)
    assert all(p.grad is None for p in model.parameters())
    loss().backward()
    return found, {name: p.grad for name, p in model.named_parameters()}


def agree(model, given, run, device, tolerance=1e-10):
    weights: list[np.ndarray] = []
    expected, _ = flows_of(model, "cpu", given, run, weights)
    found, gradients = flows_of(model, device, given, run, weights)
    total: dict[str, np.ndarray] = {}
    for e, f in zip(expected, found, strict=True):
        for there, here in (
            (e.states, f.states),
            (e.parameters, f.parameters),
            (e.shares, f.shares),
        ):
            assert list(there) == list(here)
            for name, values in there.items():
                assert type(here[name]) is np.ndarray
                assert here[name].dtype == values.dtype
                scale = tolerance * max(1.0, float(np.abs(values).max()))
                np.testing.assert_allclose(here[name], values, rtol=0, atol=scale, err_msg=name)
        for name, shares in f.shares.items():
            total[name] = total.get(name, 0) + shares.sum(axis=0)
    assert set(total) <= set(gradients)
    for name, gradient in gradients.items():
        whole = np.zeros(1) if gradient is None else gradient.numpy()
        scale = tolerance * max(1.0, float(np.abs(whole).max()))
        np.testing.assert_allclose(total.get(name, 0), whole, rtol=0, atol=scale, err_msg=name)
    return found


def flow_of_a_cell(name, options, rng, device, dtype="float64", T=5, B=3, I=4, H=6, **more):
    cell = cells.CELLS[name](rng, dtype, I, H)
    xs = cells.make_inputs(name, rng, T, B, I, dtype)
    state = map_leaves(lambda h: rng.standard_normal(h.shape).astype(dtype), cell.initial_state(B))

    def run(cell, xs, state):
        return tgs.scan(cell, xs, state, **options)

    return agree(cell, (xs, state), run, device, **more)


@pytest.mark.parametrize("name", cells.CELLS)
def test_every_cell(name, rng, device, divided):
    (flow,) = flow_of_a_cell(name, {}, rng, device)
    assert flow.norm.shape == (5,)


@pytest.mark.parametrize("name", ["lstm", "gru", "layer norm lstm", "noisy"])
@pytest.mark.parametrize("options", [each for each in OPTIONS if each != "plain"])
def test_every_way_to_run(name, options, rng, device, divided):
    flow_of_a_cell(name, OPTIONS[options], rng, device)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 7, 1, 3), (6, 1, 5, 9), (5, 2, 3, 17)])
def test_sizes(sizes, rng, device, divided):
    T, B, I, H = sizes
    flow_of_a_cell("minimal gated unit", {}, rng, device, T=T, B=B, I=I, H=H)


def test_single_precision(rng, device):
    flow_of_a_cell("gru", {}, rng, device, dtype="float32", tolerance=1e-5)


def test_layers(rng, device):
    """Two layers both ways: four scans, of which each has shares of its own."""
    model = nn.LSTM(3, 4, num_layers=2, bidirectional=True, rng=rng, dtype="float64")
    x = rng.standard_normal((5, 3, 3))
    found = agree(model, (x,), lambda m, x: m(x, lengths=[5, 0, 3])[0], device)
    assert [next(iter(flow.parameters)).split(".")[1] for flow in found] == list("0123")


@pytest.mark.parametrize("options", OPTIONS)
def test_outputs_computed_from_the_state(options, rng, device):
    """Through which the gradient goes back step by step, there too."""
    cell = nn.Head(nn.LSTMCell(4, 6, zoneout=0.3, dtype="float64", rng=rng), 2, dtype="float64")
    xs, state = rng.standard_normal((5, 3, 4)), tuple(rng.standard_normal((2, 3, 6)))

    def run(cell, xs, state):
        return tgs.scan(cell, xs, state, **OPTIONS[options])

    agree(cell, (xs, state), run, device)


def test_rows_without_a_step(rng, device):
    (flow,) = flow_of_a_cell("lstm", {"lengths": [0, 0, 0]}, rng, device)
    np.testing.assert_array_equal(flow.norm, np.zeros(5))


def test_parts_and_rows_of_the_batch_that_are_captured(rng, device, divided):
    """Captured in slices, by every row for itself, and in no product: summed on the way."""

    class Odd(nn.Module):
        def __init__(self):
            self.W = nn.parameter(rng.standard_normal((8, 4)), "float64")
            self.each = nn.parameter(rng.standard_normal((3, 4)), "float64")
            self.scale = nn.parameter(rng.standard_normal(()), "float64")

        def forward(self, x, h):
            h = tgs.tanh(x @ self.W[:4] + (h * self.each) @ self.W[4:] + self.scale * h)
            return h, h

    for lengths in (None, [4, 2, 5]):
        given = rng.standard_normal((5, 3, 4)), rng.standard_normal((3, 4))

        def run(cell, x, h, lengths=lengths):
            return tgs.scan(cell, x, h, lengths=lengths)

        agree(Odd(), given, run, device)
