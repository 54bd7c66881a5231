"""Cells: their options, gates, heads. The plain cells are tested in test_recurrence.py."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tinygrad_seq as tgs
from tinygrad_seq import nn
from tinygrad_seq.nn.cells import chrono_bias
from tinygrad_seq.trees import leaves


def test_options_in_any_combination(tmp_path):
    """Against plain NumPy in use, scan against unroll in training, with all gradients."""
    program = Path(__file__).with_name("cell_options.py")
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1", "TINYGRAD_SEQ_CACHE": str(tmp_path)}
    command = [sys.executable, str(program), "0", "60"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


FULL = {"layer_norm": True, "recurrent_dropout": 0.3, "zoneout": 0.2, "clip": 0.8}
EVERYTHING = {
    "rnn": lambda **k: nn.RNNCell(5, 9, "relu", **FULL, **k),
    "lstm": lambda **k: nn.LSTMCell(5, 9, peephole=True, projection_size=4, **FULL, **k),
    "coupled": lambda **k: nn.LSTMCell(5, 9, coupled=True, peephole=True, chrono=20, **k),
    "gru": lambda **k: nn.GRUCell(5, 9, **FULL, **k),
}


@pytest.mark.parametrize("name", EVERYTHING)
def test_all_options_at_once_compiled(name):
    rng = np.random.default_rng(1)
    cell = EVERYTHING[name](rng=rng)
    xs = tgs.tensor(rng.standard_normal((6, 3, 5)).astype("f4"), requires_grad=True)
    found = []
    for drive in (tgs.unroll, tgs.scan):
        tgs.manual_seed(5)
        cell.zero_grad()
        xs.grad = None
        ys, state = drive(cell, xs, lengths=[6, 0, 4])
        (tgs.sum(ys * ys) + sum(tgs.sum(leaf) for leaf in leaves(state))).backward()
        moved = [xs, *cell.parameters()]
        found.append([ys.numpy(), *(t.grad.numpy() for t in moved if t.grad is not None)])
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


class TestRandom:
    def test_recurrent_dropout_is_one_mask_a_sequence(self):
        """A state that is dropped at one step is dropped at all, and masks differ by call."""
        cell = nn.Gate(2, 50, recurrent_dropout=0.4, dtype="float64", rng=0)
        masks = []

        def step(x, h):
            masks.append(cell.dropped(tgs.ones(3, 50, dtype="float64")).numpy())
            return h, h

        for _ in range(2):
            tgs.unroll(step, np.zeros((4, 3, 2)), tgs.zeros(3, 50, dtype="float64"))
        for mask in masks[1:4]:
            assert (mask == masks[0]).all()
        assert (masks[4] != masks[0]).any()
        assert set(np.unique(masks[0])) == {0.0, 1 / 0.6}
        assert 0.2 < (masks[0] == 0).mean() < 0.6

    def test_a_mask_of_the_sequence_is_compiled(self):
        tgs.manual_seed(3)
        h0 = tgs.zeros(2, 40)

        def cell(x, h):
            u, v = tgs.rand(2, 40, per_sequence=True), tgs.randn(2, 40, per_sequence=True)
            return {"u": u, "v": v, "each": tgs.rand(2, 40)}, h + u * 0

        ys, _ = tgs.scan(cell, np.zeros((3, 2, 1), "f4"), h0)
        for name in "uv":
            drawn = ys[name].numpy()
            assert (drawn == drawn[0]).all()
            assert drawn.std() > 0.1
        assert (ys["each"].numpy()[0] != ys["each"].numpy()[1]).any()

    def test_zoneout_keeps_units_while_training(self):
        plain = nn.LSTMCell(3, 40, dtype="float64", rng=0)
        cell = nn.LSTMCell(3, 40, zoneout=(0.3, 0.6), dtype="float64", rng=0)
        rng = np.random.default_rng(0)
        x = tgs.tensor(rng.standard_normal((5, 3)))
        state = tuple(tgs.tensor(rng.standard_normal((5, 40))) for _ in range(2))
        new, found = plain(x, state)[1], cell(x, state)[1]
        for leaf, p in enumerate((0.3, 0.6)):
            old, new_leaf, value = (s[leaf].numpy() for s in (state, new, found))
            kept = value == old
            assert (kept | (value == new_leaf)).all()
            assert abs(kept.mean() - p) < 0.12

    def test_nothing_is_random_in_use(self):
        cell = EVERYTHING["lstm"](rng=0)
        cell.eval()
        x = np.random.default_rng(0).standard_normal((5, 2, 5)).astype("f4")
        first, again = tgs.unroll(cell, x)[0], tgs.unroll(cell, x)[0]
        assert (first.numpy() == again.numpy()).all()


class TestGate:
    def test_it_is_what_it_says(self):
        gate = nn.Gate(3, 4, activation="tanh", dtype="float64", rng=0)
        rng = np.random.default_rng(0)
        x, a = rng.standard_normal((2, 3)), rng.standard_normal((2, 4))
        gate.bias.data = b = rng.standard_normal(4)
        expected = np.tanh(x @ gate.weight_ih.numpy().T + a @ gate.weight_hh.numpy().T + b)
        np.testing.assert_allclose(gate(tgs.tensor(x), tgs.tensor(a)).numpy(), expected)

    def test_a_cell_made_of_gates_runs_compiled(self):
        class Minimal(nn.Module):
            def __init__(self):
                self.forget, self.new = nn.Gate(3, 4, rng=0), nn.Gate(3, 4, activation=tgs.tanh)

            def forward(self, x, h):
                f = self.forget(x, h)
                h = (1 - f) * h + f * self.new(x, f * h)
                return h, h

        cell, x = Minimal(), np.random.default_rng(1).standard_normal((5, 2, 3)).astype("f4")
        a, b = (drive(cell, x, tgs.zeros(2, 4))[0] for drive in (tgs.unroll, tgs.scan))
        np.testing.assert_allclose(a.numpy(), b.numpy(), atol=1e-6)


class TestHead:
    def test_an_output_at_every_step(self):
        """o_t = f(V h_t + b), whatever the cell."""
        cell = nn.RNNCell(2, 3, dtype="float64", rng=0)
        head = nn.Head(cell, 5, activation="sigmoid", dtype="float64", rng=1)
        x = np.random.default_rng(0).standard_normal((4, 2, 2))
        h, last = tgs.unroll(cell, x)
        o, state = tgs.unroll(head, x)
        z = h.numpy() @ head.linear.weight.numpy().T + head.linear.bias.numpy()
        np.testing.assert_allclose(o.numpy(), 1 / (1 + np.exp(-z)))
        assert (state.numpy() == last.numpy()).all()
        names = {name for name, _ in head.named_parameters()}
        assert names == {
            "cell.weight_ih",
            "cell.weight_hh",
            "cell.bias",
            "linear.weight",
            "linear.bias",
        }

    def test_on_a_cell_that_is_a_function(self):
        head = nn.Head(lambda x, h: (h + x, h + x), 2, size=3)
        assert not hasattr(head, "initial_state")
        assert tgs.unroll(head, np.ones((4, 2, 3), "f4"), tgs.zeros(2, 3))[0].shape == (4, 2, 2)
        twice = pickle.loads(pickle.dumps(copy.deepcopy(nn.Head(nn.LSTMCell(2, 3), 4))))
        assert twice.initial_state(2)[0].shape == (2, 3)
        twice.cell = nn.RNNCell(2, 5)
        assert twice.initial_state(2).shape == (2, 5)


class TestStart:
    def test_chrono_covers_the_time_it_is_given(self):
        drawn = chrono_bias(20_000, 100, 0)
        assert drawn.min() >= 0
        assert drawn.max() <= np.log(99)
        assert abs(np.exp(drawn).mean() - 50) < 1  # u is uniform from 1 to T - 1
        i, f, g, o = nn.LSTMCell(2, 40, chrono=100, rng=0).bias.numpy().reshape(4, -1)
        assert (i == -f).all()
        assert 0 < f.min() < f.max() < np.log(99)
        assert not g.any()
        assert not o.any()
        r, z, n = nn.GRUCell(2, 40, chrono=100, rng=0).bias.numpy().reshape(3, -1)
        assert -np.log(99) < z.min() < z.max() < 0
        assert not r.any()
        assert not n.any()
        coupled = nn.LSTMCell(2, 4, coupled=True, forget_bias=2.0)
        assert coupled.bias.numpy().reshape(3, -1)[:, 0].tolist() == [2.0, 0.0, 0.0]

    def test_layers_take_the_options_of_their_cells(self):
        layer = nn.LSTM(3, 8, 2, bidirectional=True, projection_size=5, peephole=True)
        ys, (h, c) = layer(np.zeros((4, 2, 3), "f4"))
        assert ys.shape == (4, 2, 10)
        assert h.shape == (4, 2, 5)
        assert c.shape == (4, 2, 8)
        again, _ = layer(np.zeros((4, 2, 3), "f4"), (h, c))
        assert again.shape == ys.shape
        with pytest.raises(tgs.ShapeError, match=r"state\[0\] has shape \(4, 2, 8\), expected"):
            layer(np.zeros((4, 2, 3), "f4"), (c, c))
        with pytest.raises(tgs.ShapeError, match=r"leaves \(4, B, 5\) and \(4, B, 8\)"):
            layer(np.zeros((4, 2, 3), "f4"), h)
        assert nn.LSTMCell(2, 3, zoneout=[0.1, 0.2]).zoneout == (0.1, 0.2)


BAD = {
    "zoneout: 1.0 was given, expected a probability": lambda: nn.RNNCell(2, 3, zoneout=1.0),
    "recurrent_dropout: -0.1 was given": lambda: nn.GRUCell(2, 3, recurrent_dropout=-0.1),
    "zoneout is .*expected a probability, or 2": lambda: nn.LSTMCell(2, 3, zoneout=(0.1,) * 3),
    "clip: 0 was given, expected a number above 0": lambda: nn.LSTMCell(2, 3, clip=0),
    "forget_bias=nan was given": lambda: nn.LSTMCell(2, 3, forget_bias=float("nan")),
    "clip: True was given": lambda: nn.LSTMCell(2, 3, clip=True),
    "activations for 'q' were given, expected them for i, f, g, o, h": lambda: nn.LSTMCell(
        2, 3, activations={"q": "tanh"}
    ),
    r"activations\['z'\]: 'than' was given": lambda: nn.GRUCell(2, 3, activations={"z": "than"}),
    "activations is 'relu', expected a dict": lambda: nn.LSTMCell(2, 3, activations="relu"),
    "chrono: 1 was given": lambda: nn.LSTMCell(2, 3, chrono=1),
    "chrono was given without a bias": lambda: nn.GRUCell(2, 3, False, chrono=10),
    "projection_size: 0 was given": lambda: nn.LSTMCell(2, 3, projection_size=0),
    "Head: .* expected one that is called as y, state": lambda: nn.Head(nn.LSTMCell, 3),
    "has neither output_size nor hidden_size; pass size=": lambda: nn.Head(lambda x, h: x, 3),
}


@pytest.mark.parametrize("words", BAD)
def test_errors_say_what_was_given(words):
    with pytest.raises(ValueError, match=words):
        BAD[words]()


def test_a_gate_wants_rows():
    gate = nn.Gate(3, 4)
    with pytest.raises(tgs.ShapeError, match=r"Gate: x has shape \(3,\), expected \(B, 3\)"):
        gate(tgs.zeros(3), tgs.zeros(2, 4))
    with pytest.raises(tgs.ShapeError, match=r"Gate: a has shape \(2, 3\), expected \(B, 4\)"):
        gate(tgs.zeros(2, 3), tgs.zeros(2, 3))


@pytest.mark.parametrize("drive", [tgs.scan, tgs.unroll])
def test_values_of_a_step_do_not_stay_in_the_cell(drive):
    class Cell(nn.GRUCell):
        def forward(self, x, h):
            y, h = super().forward(x, h)
            self.last = y
            return y, h

    refused = pytest.raises((tgs.TraceError, ValueError), match=r"Cell.last: a (value of|tensor c)")
    with refused:
        drive(Cell(2, 3), tgs.zeros(4, 1, 2))


def test_steppers_take_no_mask_that_would_never_change():
    cell = nn.GRUCell(2, 3, recurrent_dropout=0.5)
    with pytest.raises(tgs.TraceError, match="Stepper: the cell draws random numbers"):
        tgs.Stepper(cell, np.ones((1, 2), "f4"))
    tgs.Stepper(cell.eval(), np.ones((1, 2), "f4"))
