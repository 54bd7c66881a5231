"""Cells that are not run again: whatever they could read, a change of it is noticed."""

from __future__ import annotations

import builtins
import gc
import threading
import weakref
from dataclasses import dataclass
from functools import wraps
from math import pi, sqrt
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
from cells import CELLS as ALL
from cells import make_inputs

import tinygrad_seq as tgs
from tinygrad_seq import nn
from tinygrad_seq.recurrence import compiled, following, settled
from tinygrad_seq.recurrence.arguments import check_arguments
from tinygrad_seq.recurrence.following import trace_again
from tinygrad_seq.recurrence.tracing import trace_cell
from tinygrad_seq.trees import leaves, map_leaves

F8 = {"dtype": "float64"}
CELLS = {
    "rnn": lambda: nn.RNNCell(3, 4, **F8),
    "lstm": lambda: nn.LSTMCell(3, 4, **F8),
    "gru": lambda: nn.GRUCell(3, 4, **F8),
    "gru, reset after": lambda: nn.GRUCell(3, 4, reset_after=True, **F8),
    "no bias": lambda: nn.LSTMCell(3, 4, bias=False, **F8),
    "peephole": lambda: nn.LSTMCell(3, 4, peephole=True, **F8),
    "coupled": lambda: nn.LSTMCell(3, 4, coupled=True, **F8),
    "projection": lambda: nn.LSTMCell(3, 4, projection_size=2, **F8),
    "layer norm": lambda: nn.LSTMCell(3, 4, layer_norm=True, **F8),
    "layer norm, gru": lambda: nn.GRUCell(3, 4, layer_norm=True, **F8),
    "clip": lambda: nn.LSTMCell(3, 4, clip=0.5, **F8),
    "activations": lambda: nn.LSTMCell(3, 4, activations={"g": "softplus"}, **F8),
    "head": lambda: nn.Head(nn.GRUCell(3, 4, **F8), 2, "sigmoid", **F8),
    "stack": lambda: nn.as_cell(nn.LSTM(3, 4, 2, **F8)),
}


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(settled, "_settled", {})


@pytest.fixture
def runs(monkeypatch):
    """How often cells were run."""
    counted = []
    call = nn.Module.__call__

    def counting(module, *given, **more):
        counted.append(type(module).__name__)
        return call(module, *given, **more)

    monkeypatch.setattr(nn.Module, "__call__", counting)
    return counted


def settle(cell, xs, state=None, **options):
    with tgs.no_grad():  # less to compile
        for _ in range(4):
            tgs.scan(cell, xs, state, **options)
    return cell


def results(drive, cell, xs, state=None, **options):
    """Outputs, last state, and all gradients."""
    for p in cell.parameters():
        p.grad = None
    xs = tgs.tensor(xs, requires_grad=True)
    ys, last = drive(cell, xs, state, **options)
    made = [*leaves(ys), *leaves(last)]
    sum((np.cos(np.arange(1.0, y.size + 1)).reshape(y.shape) * y).sum() for y in made).backward()
    grads = [xs.grad, *(p.grad for p in cell.parameters())]
    return [*(m.numpy() for m in made), *(None if g is None else g.numpy() for g in grads)]


def agrees(cell, xs, state=None):
    """The same as step by step, without gradients, for which less is compiled."""
    with tgs.no_grad():
        found = [drive(cell, xs, state) for drive in (tgs.scan, tgs.unroll)]
    for mine, theirs in zip(*map(leaves, found), strict=True):
        np.testing.assert_allclose(mine.numpy(), theirs.numpy(), rtol=1e-9, atol=1e-12)


def is_traced_anew(cell, xs, state=None):
    """What is known of a cell is what tracing it gives; for which nothing is compiled."""
    given = check_arguments(cell, xs, state, None, None, "scan")
    found, expected = (
        trace(cell, given, np.dtype("float64")) for trace in (trace_again, trace_cell)
    )
    assert vars(found.trace) == vars(expected.trace)
    assert found.numbers == expected.numbers
    for mine, theirs in zip(found.captured, expected.captured, strict=True):
        np.testing.assert_array_equal(mine.numpy(), theirs.numpy())
        assert mine.requires_grad == theirs.requires_grad
    return expected


def settle_traced(cell, xs, state=None):
    for _ in range(3):
        is_traced_anew(cell, xs, state)
    assert settled.settled(cell)
    return cell


def is_right(cell, xs, state=None, **options):
    """The same as step by step, which runs the cell; twice, for the second may be a repetition."""
    stepwise = {key: value for key, value in options.items() if key != "checkpoint"}
    expected = results(tgs.unroll, cell, xs, state, **stepwise)
    for _ in range(3):
        found = results(tgs.scan, cell, xs, state, **options)
        for mine, theirs in zip(found, expected, strict=True):
            if theirs is None:
                assert mine is None
            else:
                np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_of_this_package_is_not_run_again(name, rng, runs):
    cell = settle(CELLS[name](), rng.standard_normal((5, 2, 3)))
    runs.clear()
    with tgs.no_grad():
        for T in (5, 7, 7, 7):  # of other lengths too
            tgs.scan(cell, rng.standard_normal((T, 2, 3)))
    assert not runs
    agrees(cell, rng.standard_normal((5, 2, 3)))


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"checkpoint": 2}], ids=str)
def test_values_are_those_of_now(name, options, rng):
    cell = settle(CELLS[name](), rng.standard_normal((5, 2, 3)), **options)
    for _ in range(3):
        for parameter in cell.parameters():
            parameter.data = rng.standard_normal(parameter.shape)
        is_right(cell, rng.standard_normal((5, 2, 3)), **options)


def _frozen(cell):
    cell.weight_ih.requires_grad = False


def _without_bias(cell):
    cell.bias = None


def _another_parameter(cell):
    cell.weight_hh = nn.parameter(np.full(cell.weight_hh.shape, 0.1), "float64")


def _strided(cell):
    cell.weight_hh.data = np.asfortranarray(cell.weight_hh.numpy() * 2)


def _clipped(cell):
    cell.clip = 0.01


def _other_activation(cell):
    cell.act["g"] = tgs.relu


def _own_activation(cell):
    cell.act["g"] = lambda x: x * tgs.sigmoid(x)


def _peephole(cell):
    cell.weight_peephole = nn.parameter(np.full(12, 0.3), "float64")


def _normalised(cell):
    cell.norm_ih = nn.LayerNorm(16, **F8)


CHANGES = [
    _frozen,
    _without_bias,
    _another_parameter,
    _strided,
    _clipped,
    _other_activation,
    _own_activation,
    _peephole,
    _normalised,
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_is_noticed(change, rng):
    xs = rng.standard_normal((5, 2, 3))
    cell = settle_traced(nn.LSTMCell(3, 4, **F8), xs)
    change(cell)
    for _ in range(3):
        is_traced_anew(cell, xs)


@pytest.mark.parametrize("change", [_frozen, _strided])
def test_a_repeated_call_notices_what_no_trace_says(change, rng):
    cell, xs = nn.LSTMCell(3, 4, **F8), rng.standard_normal((5, 2, 3))
    for _ in range(2):
        is_right(cell, xs)
    assert settled.settled(cell).calls
    change(cell)
    is_right(cell, xs)


def test_what_is_changed_inside_of_a_stack_is_noticed(rng):
    xs = rng.standard_normal((5, 2, 3))
    cell = settle_traced(nn.as_cell(nn.LSTM(3, 4, 2, **F8)), xs)
    cell.cells[1].act["o"] = tgs.tanh
    is_traced_anew(cell, xs)
    cell.parts[0], cell.cells[0] = (nn.LSTMCell(3, 4, clip=0.1, **F8),) * 2
    is_traced_anew(cell, xs)


def test_training_and_use(rng):
    xs = rng.standard_normal((5, 2, 3))
    cell = settle(nn.LSTMCell(3, 4, zoneout=0.5, recurrent_dropout=0.5, **F8), xs)
    first, second = (tgs.scan(cell, xs)[0].numpy() for _ in range(2))
    assert (first != second).any()
    agrees(settle(cell.eval(), xs), xs)
    first, second = (tgs.scan(cell.train(), xs)[0].numpy() for _ in range(2))
    assert (first != second).any()


def test_a_conversion_is_noticed(rng):
    xs = rng.standard_normal((5, 2, 3))
    cell = settle(nn.GRUCell(3, 4, **F8), xs)
    cell.to("float32")
    with pytest.raises(ValueError, match="float64"):
        tgs.scan(cell, xs)
    assert tgs.scan(cell, xs.astype("f4"))[0].dtype == np.float32
    settle(cell, xs.astype("f4"))
    is_right(cell.to("float64"), xs)


def test_parameters_of_a_call(rng):
    xs = rng.standard_normal((5, 2, 3))
    layer = nn.LSTM(3, 4, **F8)
    for _ in range(4):
        before = layer(xs)[0].numpy()
    given = {name: p * 2 for name, p in layer.named_parameters()}
    twice = nn.functional_call(layer, given, xs)[0]
    assert (twice.numpy() != before).any()
    twice.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    np.testing.assert_array_equal(layer(xs)[0].numpy(), before)


class Sub(nn.LSTMCell):
    factor = 1.0

    def forward(self, x, state):
        y, state = super().forward(x, state)
        return y * self.factor, state


FACTOR = 1.0


@pytest.mark.parametrize("kind", ["class", "function", "held"])
def test_what_somebody_else_wrote_is_run_again(kind, rng, monkeypatch):
    def scaled(x):
        return x * FACTOR

    xs = rng.standard_normal((5, 2, 3))
    cell = {
        "class": lambda: Sub(3, 4, **F8),
        "function": lambda: nn.LSTMCell(3, 4, activations={"h": scaled}, **F8),
        "held": lambda: nn.Head(nn.LSTMCell(3, 4, **F8), 2, scaled, **F8),
    }[kind]()
    settle(cell, xs)
    before = tgs.scan(cell, xs)[0].numpy()
    monkeypatch.setattr(Sub, "factor", 3.0)
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    assert (tgs.scan(cell, xs)[0].numpy() != before).any()
    agrees(cell, xs)


def test_other_shapes_and_states(rng, runs):
    cell = nn.LSTMCell(3, 4, **F8)
    for _ in range(3):
        for B in (2, 1, 3):
            settle(cell, rng.standard_normal((5, B, 3)))
    runs.clear()
    for B in (1, 2, 3):
        xs = rng.standard_normal((5, B, 3))
        for state in (None, tuple(tgs.tensor(rng.standard_normal((B, 4))) for _ in range(2))):
            is_right(cell, xs, state)
    assert set(runs) == {"LSTMCell"}  # by unroll
    with pytest.raises(tgs.ShapeError, match=r"\(B, 3\)"):
        tgs.scan(cell, rng.standard_normal((5, 2, 7)))
    with pytest.raises(tgs.ShapeError, match=r"pair|structure|state"):
        tgs.scan(cell, xs, tgs.zeros(3, 4, dtype="float64"))
    for T, B in ((0, 2), (5, 0), (1, 1)):
        ys, (h, c) = tgs.scan(cell, tgs.zeros(T, B, 3, dtype="float64"))
        assert (ys.shape, h.shape, c.shape) == ((T, B, 4), (B, 4), (B, 4))


def test_gradients_of_states_and_lengths(rng):
    cell = settle(nn.GRUCell(3, 4, **F8), xs := rng.standard_normal((5, 2, 3)))
    h = tgs.tensor(rng.standard_normal((2, 4)), requires_grad=True)
    for _ in range(3):
        found = []
        for drive in (tgs.scan, tgs.unroll):
            h.grad = None
            drive(cell, xs, h)[0].sum().backward()
            found.append(h.grad.numpy())
        np.testing.assert_allclose(*found, rtol=1e-9)
    is_right(cell, xs, lengths=[5, 2])
    is_right(cell, xs, resets=rng.random((5, 2)) < 0.5)
    is_right(cell, xs)


def test_inputs_that_lie_otherwise(rng):
    cell = nn.LSTMCell(3, 4, **F8)
    whole = rng.standard_normal((2, 5, 6))
    for xs in (whole[..., :3], whole[..., ::2]):
        for _ in range(4):
            found = tgs.scan(cell, tgs.permute_dims(tgs.tensor(whole), (1, 0, 2))[..., :3])[0]
            plain = tgs.scan(cell, np.ascontiguousarray(whole[..., :3].transpose(1, 0, 2)))[0]
            np.testing.assert_array_equal(found.numpy(), plain.numpy())
        is_right(cell, xs.transpose(1, 0, 2))


def test_without_gradients_and_with_them_in_turn(rng):
    cell, xs = nn.GRUCell(3, 4, **F8), rng.standard_normal((5, 2, 3))
    for _ in range(4):
        with tgs.no_grad():
            assert not tgs.scan(cell, xs)[0].requires_grad
        assert tgs.scan(cell, xs)[0].requires_grad
        is_right(cell, xs)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_layers_give_stacks_of_states(name, rng):
    layer = getattr(nn, name)(3, 4, **F8)
    slow = getattr(nn, name)(3, 4, backend="tape", **F8)
    slow.load_state_dict(layer.state_dict())
    for T in (5, 5, 5, 5, 0):
        xs = tgs.tensor(rng.standard_normal((T, 2, 3)), requires_grad=True)
        found = []
        for each in (layer, slow):
            xs.grad = None
            each.zero_grad()
            ys, state = each(xs)
            assert all(leaf.shape == (1, 2, 4) for leaf in leaves(state))
            total = sum((leaf * leaf).sum() for leaf in leaves(state)) + ys.sum()
            total.backward()
            grads = [xs.grad, *(p.grad for p in each.parameters())] if T else []
            values = [leaf.numpy() for leaf in leaves(state)]
            found.append(values + [g.numpy() for g in grads])
        for mine, theirs in zip(*found, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-12)


def test_the_last_state_of_no_steps_is_the_first():
    state = tgs.zeros(2, 4, dtype="float64")
    assert tgs.scan(lambda x, h: (h, tgs.tanh(x @ W + h)), np.ones((0, 2, 3)), state)[1] is state


def test_second_derivatives_through_last_states(rng):
    layer = nn.LSTM(2, 3, **F8)
    xs = tgs.tensor(rng.standard_normal((4, 1, 2)))
    for _ in range(4):
        layer(xs)

    def last(x):
        _, (h, c) = layer(x)
        return tgs.tanh(h) + c[0, :, :1]

    assert tgs.gradcheck(last, xs)
    assert tgs.gradcheck(lambda x: tgs.grad(lambda x: (last(x) ** 2).sum())(x), xs)


def test_what_is_gone_is_forgotten(rng):
    layer = nn.LSTM(3, 4)
    xs = rng.standard_normal((5, 2, 3)).astype("f4")
    for _ in range(4):
        layer(xs)
    assert len(settled._settled) == 1
    gone = [weakref.ref(layer.cells[0]), weakref.ref(layer.cells[0].weight_hh)]
    del layer
    gc.collect()
    assert not settled._settled
    assert all(each() is None for each in gone)


class Closing(nn.Module):
    """Has a function that closes over it."""

    def __init__(self):
        self.gain = nn.parameter(np.ones(4))
        self.act = lambda z: tgs.tanh(z * self.gain)

    def forward(self, x, h):
        h = self.act(x + h)
        return h, h


class Attending(nn.Module):
    def forward(self, x, h):
        h = tgs.tanh(x + h + self.memory[:, 0])
        return h, h


def _calling_itself():
    def cell(x, h, again=True):
        return cell(x, h, False) if again else (h, tgs.tanh(x + h))

    return cell


@pytest.mark.parametrize("make", [Closing, _calling_itself])
def test_a_cell_that_leads_back_to_itself_goes(make):
    cell = settle(make(), np.ones((5, 2, 4), "f4"), np.zeros((2, 4), "f4"))
    gone = weakref.ref(cell)
    del cell
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("computed", [True, False])
def test_a_memory_goes_when_the_cell_has_another(computed):
    cell, gone = Attending(), []
    xs, h = tgs.ones(5, 2, 4), tgs.zeros(2, 4)
    for _ in range(12):
        cell.memory = tgs.ones(2, 3, 4)
        if computed:
            object.__setattr__(cell, "memory", nn.parameter(np.ones((2, 3, 4))) * 2)
        gone.append(weakref.ref(cell.memory))
        tgs.scan(cell, xs, h)
    cell.memory = None
    if not computed:  # until the next call
        cell.memory = tgs.ones(2, 3, 4)
        tgs.scan(cell, xs, h)
    gc.collect()
    assert not any(each() is not None for each in gone)


def test_what_is_long_to_look_at_is_not_looked_at(rng):
    words = [0.5] * 2000

    def cell(x, h):
        h = tgs.tanh(x @ W + h * words[3])
        return h, h

    settle(cell, rng.standard_normal((5, 2, 3)), tgs.zeros(2, 4, dtype="float64"))
    assert not settled._settled


def test_only_so_many_are_remembered(rng, monkeypatch):
    monkeypatch.setattr(settled, "MOST", 3)
    monkeypatch.setattr(settled, "MOST_CALLS", 3)
    cells = [settle(nn.RNNCell(1, 1), np.ones((2, 1, 1), "f4")) for _ in range(5)]
    for T in range(1, 9):
        for _ in range(3):
            tgs.scan(cells[-1], np.ones((T, T, 1), "f4"))
    assert len(settled._settled) <= 3
    for each in settled._settled.values():
        assert len(each.steps) <= 3
        assert len(each.calls) <= 3


def test_threads_repeat_calls_at_once(rng):
    cell = settle(nn.LSTMCell(3, 4, **F8), rng.standard_normal((5, 2, 3)))
    inputs = [rng.standard_normal((5, 2, 3)) for _ in range(4)]
    expected = [tgs.unroll(cell, xs)[0].numpy() for xs in inputs]
    wrong = []

    def work(k):
        for _ in range(50):
            ys = tgs.scan(cell, inputs[k])[0].numpy()
            if not np.allclose(ys, expected[k], rtol=1e-9):
                wrong.append(k)

    workers = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    assert not wrong


def test_another_number_of_threads(rng):
    cell = settle(nn.LSTMCell(3, 40), xs := rng.standard_normal((50, 16, 3)).astype("f4"))
    before = tgs.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 1):
            tgs.set_num_threads(threads)
            found += [tgs.scan(cell, xs)[0].numpy() for _ in range(2)]
    finally:
        tgs.set_num_threads(before)
    for each in found[1:]:
        np.testing.assert_array_equal(each, found[0])


# Cells that somebody wrote ---------------------------------------------------------------------

W, U, b = (
    nn.parameter(np.random.default_rng(k).standard_normal(s), "float64")
    for k, s in enumerate([(3, 4), (4, 4), (4,)])
)
SCALE, NAMES, FACTORS = 0.5, ["a", "b"], {"a": 1.0, "b": 2.0}


def squashed(z, by=1.0):
    return tgs.tanh(z * by)


def plain(x, h):
    h = squashed(x @ W + h @ U + b) * SCALE
    return h, h


def with_containers(x, h):
    z = sum(FACTORS[name] * (h @ U) for name in NAMES) + tgs.nn.functional.softplus(x @ W)
    if not z.ndim == 2:
        raise ValueError(f"{z.shape}")
    parts = [part * k for k, part in enumerate(tgs.split(z, 2, axis=-1), 1)]
    h = tgs.concat(parts, axis=-1)
    return {"h": h, "twice": h * 2}, h


def make_closure(gain=2.0):
    V = nn.parameter(np.full((3, 4), 0.1), "float64")

    def set_gain(value):
        nonlocal gain
        gain = value

    def cell(x, h, offset=0.1):
        h = tgs.tanh(x @ V * gain + h) + offset
        return h, h

    cell_parameters[cell] = [V]
    return cell, set_gain


cell_parameters = {plain: [W, U, b], with_containers: [W, U]}


class Layers(nn.Module):
    factor = 0.5

    def __init__(self):
        self.W = nn.parameter(np.full((3, 4), 0.2), "float64")
        self.gates = [nn.Linear(4, 4, **F8) for _ in range(2)]
        self.table = {"scale": 1.5}

    @property
    def scale(self):
        return self.table["scale"] * self.factor

    @staticmethod
    def squashed(z):
        return tgs.sigmoid(z)

    def initial_state(self, batch_size):
        return tgs.zeros(batch_size, 4, dtype="float64")

    def mixed(self, z):
        for gate in self.gates:
            z = self.squashed(gate(z))
        return z

    def forward(self, x, h):
        half = self.W[:, :2]
        h = self.mixed(h + x @ tgs.concat([half, half * 2], axis=1)) * self.scale
        return h, h


class Tripled(Layers):
    def mixed(self, z):
        return z * 3


class Pair(NamedTuple):
    W: tgs.Tensor
    gain: float


@dataclass
class Weights:
    pair: Pair
    U: tgs.Tensor


class Plain:
    """Neither a module nor a function."""

    def __init__(self):
        V = nn.parameter(np.full((3, 4), 0.2), "float64")
        self.weights = Weights(Pair(V, 0.5), nn.parameter(np.eye(4), "float64"))
        self.named = SimpleNamespace(act=lambda z: tgs.tanh(z), bias=0.1)

    def parameters(self):
        return [self.weights.pair.W, self.weights.U]

    def __call__(self, x, h):
        pair = self.weights.pair
        h = self.named.act(x @ pair.W * pair.gain + h @ self.weights.U + self.named.bias)
        return h, h


@pytest.mark.parametrize("name", ["plain", "with_containers", "closure", "layers", "no module"])
def test_what_somebody_wrote_is_known_if_it_can_be_read(name, rng, runs):
    cell = {
        "plain": lambda: plain,
        "with_containers": lambda: with_containers,
        "closure": lambda: make_closure()[0],
        "layers": Layers,
        "no module": Plain,
    }[name]()
    xs, state = tgs.tensor(rng.standard_normal((5, 2, 3))), tgs.zeros(2, 4, dtype="float64")
    settle(cell, xs, state)
    assert len(settled._settled) == 1
    (known,) = settled._settled.values()
    assert known.calls
    runs.clear()
    tgs.scan(cell, xs, state)
    assert not runs
    agrees(cell, xs, state)
    parameters = cell_parameters.get(cell) or list(cell.parameters())
    for parameter in parameters:
        before, parameter.data = parameter.numpy(), rng.standard_normal(parameter.shape)
        agrees(cell, xs, state)
        parameter.data = before
        for drive in (tgs.unroll, tgs.scan):
            parameter.grad = None
            sum(y.sum() for y in leaves(drive(cell, xs, state)[0])).backward()
            if drive is tgs.unroll:
                expected = parameter.grad.numpy()
        np.testing.assert_allclose(parameter.grad.numpy(), expected, rtol=1e-9)


def test_what_others_change_is_noticed(rng, monkeypatch):
    xs, state = rng.standard_normal((5, 2, 3)), tgs.zeros(2, 4, dtype="float64")

    def after(cell, change):
        settle_traced(cell, xs, state)
        before = is_traced_anew(cell, xs, state)
        change()
        after = is_traced_anew(cell, xs, state)
        assert (before.trace.rows, before.numbers) != (after.trace.rows, after.numbers) or any(
            mine._data is not theirs._data
            for mine, theirs in zip(before.captured, after.captured, strict=True)
        )
        is_traced_anew(cell, xs, state)

    after(plain, lambda: monkeypatch.setitem(globals(), "SCALE", 0.25))
    other = nn.parameter(np.full((4, 4), 0.3), "float64")
    after(plain, lambda: monkeypatch.setitem(globals(), "U", other))
    after(plain, lambda: monkeypatch.setitem(globals(), "squashed", tgs.sigmoid))
    monkeypatch.undo()
    after(plain, lambda: monkeypatch.setattr(squashed, "__defaults__", (3.0,)))
    code = (lambda z, by=1.0: z / (1 + z * z)).__code__
    after(plain, lambda: monkeypatch.setattr(squashed, "__code__", code))
    after(with_containers, lambda: monkeypatch.setitem(FACTORS, "a", 0.1))
    after(with_containers, lambda: NAMES.append("a"))
    NAMES.pop()
    cell, set_gain = make_closure()
    after(cell, lambda: set_gain(0.3))
    after(cell, lambda: monkeypatch.setattr(cell, "__defaults__", (0.7,)))
    layers = Layers()
    after(layers, lambda: layers.table.update(scale=0.1))
    after(layers, lambda: layers.gates.append(nn.Linear(4, 4, **F8)))
    after(layers, lambda: layers.gates[0].weight.__setattr__("data", rng.standard_normal((4, 4))))
    after(layers, lambda: monkeypatch.setattr(Layers, "factor", 0.9))
    after(layers, lambda: monkeypatch.setattr(Layers, "squashed", staticmethod(tgs.tanh)))
    after(layers, lambda: setattr(layers, "squashed", tgs.relu))
    after(layers, lambda: setattr(layers, "__class__", Tripled))
    cell = Plain()
    after(cell, lambda: setattr(cell.named, "bias", 0.3))
    after(cell, lambda: setattr(cell.weights, "pair", cell.weights.pair._replace(gain=2.0)))
    after(cell, lambda: setattr(cell.weights, "U", nn.parameter(np.ones((4, 4)), "float64")))
    after(cell, lambda: setattr(cell, "__dict__", vars(Plain())))


def test_a_variable_that_is_deleted(rng):
    def make(gain):
        def cell(x, h):
            return h, h + x @ W * gain

        def delete():
            nonlocal gain
            del gain

        return cell, delete

    xs, state = rng.standard_normal((5, 2, 3)), tgs.zeros(2, 4, dtype="float64")
    cell, delete = make(2.0)
    settle(cell, xs, state)
    assert settled.settled(cell)
    delete()
    with pytest.raises(NameError, match="gain"):
        tgs.scan(cell, xs, state)


class Learned(Layers):
    def __init__(self, spread):
        super().__init__()
        self.first, self.spread = nn.parameter(np.full((1, 4), 0.2), "float64"), spread

    def initial_state(self, batch_size):
        if self.spread:
            return tgs.broadcast_to(self.first, (batch_size, 4))
        return self.first * tgs.ones(batch_size, 4, dtype="float64")


@pytest.mark.parametrize("spread", [False, True])
def test_a_first_state_that_is_learned(spread, rng, runs):
    cell, xs = Learned(spread), tgs.tensor(rng.standard_normal((5, 2, 3)))
    settle(cell, xs)
    for _ in range(3):
        runs.clear()
        tgs.scan(cell, xs)
        assert not runs
        is_right(cell, xs.numpy())
        agrees(cell, xs, None)
        cell.first.data = rng.standard_normal((1, 4))


class Clipped(nn.LSTMCell):
    def clipped(self, state):  # which forward of the package calls
        return state * SCALE


class Scaling:
    def __call__(self, z):
        return z * SCALE


SCORES = tgs.tensor(np.arange(4.0))
LOOKING = {
    "argmax": lambda x, h: (h[:, SCORES.argmax()], h + x @ W),
    "int": lambda x, h: (h * int(SCORES.argmax()), h + x @ W),
    "mask": lambda x, h: (h, h + x @ W[:, SCORES > 0.5] @ U[SCORES > 0.5]),
    "not": lambda x, h: (h, h + x @ W[:, ~(SCORES > 0.5)] @ U[~(SCORES > 0.5)]),
    "integers": lambda x, h: (h[:, SCORES.astype("int64")], h + x @ W),
}


@pytest.mark.parametrize("name", LOOKING)
def test_values_that_say_what_is_done_are_those_of_now(name, rng):
    cell, xs = LOOKING[name], rng.standard_normal((5, 2, 3))
    state, before = tgs.ones(2, 4, dtype="float64"), SCORES.numpy()
    settle(cell, xs, state)
    try:
        SCORES.data = before[[0, 1, 3, 2]]
        agrees(cell, xs, state)
        SCORES.data = before[[3, 1, 0, 2]]
        agrees(cell, xs, state)
    finally:
        SCORES.data = before


@wraps(tgs.tanh)
def scaled_tanh(z):
    return tgs.tanh(z) * SCALE


def wrapping(x, h):
    h = scaled_tanh(x @ W + h)
    return h, h


class Held(Layers):
    scaling = Scaling()

    def forward(self, x, h):
        h = tgs.tanh(self.scaling(x @ self.W) + h)
        return h, h


@pytest.mark.parametrize("make", [lambda: Clipped(3, 4, **F8), Held])
def test_code_that_is_called_without_its_name(make, rng, monkeypatch):
    cell, xs = make(), rng.standard_normal((5, 2, 3))
    settle(cell, xs)
    assert settled.settled(cell)
    monkeypatch.setitem(globals(), "SCALE", 0.1)
    agrees(cell, xs, None)


class Drawn(Layers):
    def initial_state(self, batch_size):
        return tgs.randn(batch_size, 4, dtype="float64")


@pytest.mark.parametrize("given", [False, True])
def test_a_first_state_that_is_drawn_counts_even_if_another_is_given(given, rng):
    cell, xs, found = Drawn(), tgs.tensor(rng.standard_normal((5, 2, 3))), []
    for drive in (tgs.unroll, tgs.scan):
        tgs.manual_seed(0)
        for _ in range(6):
            ys, _ = drive(cell, xs, tgs.zeros(2, 4, dtype="float64") if given else None)
        found.append((ys.numpy(), tgs.rand(3).numpy()))
    for mine, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-9)


def test_a_function_in_the_guise_of_one_of_this_package(rng, monkeypatch):
    xs, state = rng.standard_normal((5, 2, 3)), tgs.zeros(2, 4, dtype="float64")
    settle(wrapping, xs, state)
    monkeypatch.setitem(globals(), "SCALE", 0.1)
    agrees(wrapping, xs, state)


def test_another_thread_changes_a_cell_while_it_is_run(rng, monkeypatch):
    cell, xs = Layers(), rng.standard_normal((5, 2, 3))
    settles = following.Precedent._settle

    def late(*given):
        cell.table["scale"] *= 1.5
        settles(*given)

    with monkeypatch.context() as patched:
        patched.setattr(following.Precedent, "_settle", late)
        settle(cell, xs)
    for _ in range(3):
        agrees(cell, xs, None)


def test_another_thread_changes_a_cell_before_its_call_is_remembered(rng, monkeypatch):
    cell, xs = Layers(), tgs.tensor(rng.standard_normal((7, 2, 3)))
    settle(cell, xs[:5])
    run = compiled.Call.run

    def then_changed(call):
        monkeypatch.setattr(compiled.Call, "run", run)
        made = run(call)
        cell.table["scale"] *= 1.5
        settle(cell, xs[:5])
        return made

    monkeypatch.setattr(compiled.Call, "run", then_changed)
    tgs.scan(cell, xs)
    assert settled.settled(cell)
    agrees(cell, xs, None)


def test_two_functions_of_one_code(rng):
    def make(gain):
        def scaled(z):
            return tgs.tanh(z * gain)

        def set_gain(value):
            nonlocal gain
            gain = value

        return scaled, set_gain

    (one, _), (two, set_two) = make(1.0), make(2.0)

    def cell(x, h):
        h = one(x @ W) + two(h @ U)
        return h, h

    xs, state = tgs.tensor(rng.standard_normal((5, 2, 3))), tgs.ones(2, 4, dtype="float64")
    settle(cell, xs, state)
    assert settled.settled(cell)
    set_two(0.1)
    agrees(cell, xs, state)


def test_a_cell_that_asks_whether_it_is_trained(rng):
    class Asks(Layers):
        def forward(self, x, h):
            h = tgs.tanh(x @ self.W + h) * (sqrt(4) if self.training else pi)
            return h, h

    cell, xs = Asks(), tgs.tensor(rng.standard_normal((5, 2, 3)))
    settle(cell, xs)
    assert settled.settled(cell).calls
    before = tgs.scan(cell, xs)[0].numpy()
    cell.eval()
    assert (tgs.scan(cell, xs)[0].numpy() != before).any()
    agrees(cell, xs, None)


class Steps(NamedTuple):
    W: tgs.Tensor

    def double(self, x):
        return x @ self.W * SCALE * 2


STEPS = Steps(W)


def steps(x, h):
    return h, h + STEPS.double(x)


SEEN, COUNT, SHAPES, OPTIONS = [], 0, set(), {"skip"}
UNITS = tgs.tensor([1, 0, 2, 3])


def appends(x, h):
    SEEN.append(x.shape)
    return h, h + tgs.tanh(x @ W)


def adds(x, h):
    SHAPES.add(x.shape)
    return h, h + tgs.tanh(x @ W)


def skips(x, h):
    return h + x @ W if "skip" in OPTIONS else h, h + tgs.tanh(x @ W)


def counts(x, h):
    global COUNT
    COUNT += 1
    return h * COUNT, h + tgs.tanh(x @ W)


def _counting():
    count = 0

    def cell(x, h):
        nonlocal count
        count = count + 1
        return h * count, h + tgs.tanh(x @ W)

    return cell


counts_outside = _counting()


def adds_in_place(x, h):
    seen = SEEN
    seen += [1]
    return h, h + tgs.tanh(x @ W)


def looks(x, h):
    return h, h + tgs.tanh(x @ W) * float(W.numpy().mean())


def asks(x, h):
    return h, h + tgs.tanh(x @ W) * (1.0 if W.mean() > 0 else 2.0)


def draws(x, h):
    return h, h + tgs.tanh(x @ W) + tgs.rand(*h.shape)


def makes(x, h):
    return h, h + tgs.tanh(x @ W) * tgs.tensor(np.full(4, COUNT + 1.0))


def prints(x, h):
    print("step")
    return h, h + tgs.tanh(x @ W)


def tries(x, h):
    try:
        return h, h + tgs.tanh(x @ W)
    finally:
        SEEN.clear()


class Remembers(Layers):
    def forward(self, x, h):
        self.last = x.shape
        return h, h + x @ self.W


class Updates(Layers):
    def update(self, x, h):
        return h + x @ self.W

    def forward(self, x, h):
        self.table.update(shape=x.ndim)  # a dict's, not the method above
        return h, self.update(x, h)


class Compares(Layers):
    def __eq__(self, other):
        return False

    __hash__ = nn.Module.__hash__


OTHERS = [
    appends,
    adds,
    skips,
    counts,
    counts_outside,
    adds_in_place,
    looks,
    asks,
    draws,
    makes,
    prints,
    tries,
    steps,
]


@pytest.mark.parametrize(
    "cell", [*OTHERS, Remembers(), Updates(), Compares()], ids=lambda cell: str(cell)[:20]
)
def test_others_are_run_in_each_call(cell, rng):
    settle(cell, rng.standard_normal((5, 2, 3)), tgs.zeros(2, 4, dtype="float64"))
    assert not settled._settled


def test_units_that_are_chosen_are_those_of_now(rng):
    def chosen(x, h):
        return h[:, UNITS], h + tgs.tanh(x @ W)

    xs, state = rng.standard_normal((5, 2, 3)), tgs.zeros(2, 4, dtype="float64")
    before = UNITS.numpy()
    try:
        for order in ([1, 0, 2, 3], [3, 1, 2, 0], [3, 1, 2, 0]):
            UNITS.data = np.array(order)
            for _ in range(4):
                agrees(chosen, xs, state)
    finally:
        UNITS.data = before


def test_a_function_that_is_made_in_each_call(rng):
    xs, state = rng.standard_normal((5, 2, 3)), tgs.zeros(2, 4, dtype="float64")
    for k in range(30):
        gain = float(k)

        def cell(x, h, gain=gain):
            h = tgs.tanh(x @ W * gain + h)
            return h, h

        agrees(cell, xs, state)
        assert len(settled._settled) <= 1
    for k in range(12):

        def outer(x, h, k=k):
            h = tgs.tanh(x @ W + h * k)
            return h, h

        for _ in range(4):
            agrees(outer, xs, state)


@pytest.mark.parametrize("name", sorted(ALL.keys() - {"noisy"}))
def test_all_kinds_of_cells(name, rng):
    cell = ALL[name](rng, "float64", 3, 4)

    def inputs():
        return map_leaves(tgs.tensor, make_inputs(name, rng, 4, 2, 3, "float64"))

    for _ in range(4):
        tgs.scan(cell, inputs())
    for parameter in cell.parameters():
        parameter.data = parameter.numpy() * rng.uniform(0.5, 1.5, parameter.shape)
    xs = inputs()
    found = [leaves(drive(cell, xs)) for drive in (tgs.scan, tgs.unroll)]
    for mine, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(mine.numpy(), theirs.numpy(), rtol=1e-9, atol=1e-12)


def test_inputs_and_states_of_several_axes(rng):
    V = nn.parameter(rng.standard_normal((2, 4)), "float64")

    def cell(x, h):
        h = tgs.tanh(x @ V + h)
        return h, h

    state = tgs.tensor(rng.standard_normal((3, 5, 4)))
    for _ in range(6):
        x = tgs.tensor(rng.standard_normal((7, 3, 5, 2)), requires_grad=True)
        found = []
        for drive in (tgs.scan, tgs.unroll):
            x.grad = V.grad = None
            (drive(cell, x, state)[0] ** 2).sum().backward()
            found.append((x.grad.numpy(), V.grad.numpy()))
        for mine, theirs in zip(*found, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-9)
    assert settled.settled(cell).calls


# Code that is run without its name, and values that change without another in their place ------


class Scaler:
    gain = 2.0

    def scaled(self, z):
        return z * self.gain


class Mixin:
    def clipped(self, state):  # which forward of the package calls
        return state * SCALE


class Mixed(Mixin, nn.LSTMCell):
    pass


class Limited(nn.LSTMCell):
    @property
    def clip(self):  # which code of the package alone asks for
        return SCALE

    @clip.setter
    def clip(self, value):
        pass


class ScaledLinear(nn.Linear):
    @property
    def weight(self):
        return vars(self)["raw"] * SCALE

    @weight.setter
    def weight(self, value):
        self.raw = value


class WithLinear(Layers):
    def __init__(self):
        super().__init__()
        self.linear = ScaledLinear(4, 4, **F8)

    def forward(self, x, h):
        h = tgs.tanh(self.linear(h) + x @ self.W)
        return h, h


class times_scale(property):  # noqa: N801
    def __get__(self, of, kind=None):
        return self.fget(of) * SCALE


class Derived(Layers):
    @times_scale
    def ratio(self):
        return 1.0

    def forward(self, x, h):
        h = tgs.tanh(x @ self.W + h) * self.ratio
        return h, h


@pytest.mark.parametrize(
    "make", [lambda: Mixed(3, 4, **F8), lambda: Limited(3, 4, **F8), WithLinear, Derived]
)
def test_what_code_of_the_package_comes_to_in_a_class(make, rng, monkeypatch):
    cell, xs = make(), rng.standard_normal((5, 2, 3))
    settle(cell, xs)
    monkeypatch.setitem(globals(), "SCALE", 0.01)
    agrees(cell, xs)


def test_a_method_of_another_object_in_a_class(rng):
    scaler = Scaler()

    class Has(Layers):
        gain = 1.0  # a name that is known
        scaled = scaler.scaled

        def forward(self, x, h):
            h = tgs.tanh(x @ self.W + h)
            return self.scaled(h) * self.gain, h

    cell, xs = Has(), rng.standard_normal((5, 2, 3))
    settle(cell, xs)
    scaler.gain = 0.1
    agrees(cell, xs)


def test_other_bases_of_a_class(rng):
    class First(Layers):
        def squashed(self, z):
            return tgs.tanh(z)

    class Second(Layers):
        def squashed(self, z):
            return tgs.relu(z)

    class Cell(First):
        pass

    cell, xs = Cell(), rng.standard_normal((5, 2, 3))
    settle(cell, xs)
    assert settled.settled(cell)
    Cell.__bases__ = (Second,)
    agrees(cell, xs)


class Mode:
    def __repr__(self):
        return "a" if SCALE > 0.3 else "b"


@dataclass
class Compared:
    number: int

    def __eq__(self, other):
        return SCALE > 0.3


class Factor(float):
    __slots__ = ()

    def __mul__(self, other):
        return other * SCALE


MODE, COMPARED, FACTOR_OF_SCALE = Mode(), Compared(1), Factor(2.0)
UNWRITTEN = {
    "str": lambda x, h: (h, h + x @ W * FACTORS[str(MODE)]),
    "format": lambda x, h: (h, h + x @ W * FACTORS[f"{MODE}"]),
    "percent": lambda x, h: (h, h + x @ W * FACTORS["%s" % MODE]),  # noqa: UP031
    "equal": lambda x, h: (h, h + x @ W * (1.0 if COMPARED == 1 else 2.0)),
    "times": lambda x, h: (h, FACTOR_OF_SCALE * (h + x @ W)),
}


@pytest.mark.parametrize("name", UNWRITTEN)
def test_code_that_is_run_by_an_operator_or_to_make_a_text(name, rng, monkeypatch):
    xs, state = rng.standard_normal((5, 2, 3)), tgs.zeros(2, 4, dtype="float64")
    settle(UNWRITTEN[name], xs, state)
    monkeypatch.setitem(globals(), "SCALE", 0.1)
    agrees(UNWRITTEN[name], xs, state)


def test_a_record_of_numpy_changes_in_place(rng):
    record = np.zeros(1, [("gain", "f8")])[0]
    record["gain"] = 0.5

    def cell(x, h):
        return h, h + x @ W * record["gain"]

    xs, state = rng.standard_normal((5, 2, 3)), tgs.zeros(2, 4, dtype="float64")
    settle(cell, xs, state)
    record["gain"] = 2.0
    agrees(cell, xs, state)


@pytest.mark.parametrize("value", [2.0, property(lambda self: 2.0)])
def test_the_class_of_a_named_tuple(value, rng, monkeypatch):
    class Weighted(NamedTuple):
        W: tgs.Tensor
        gain: float

        factor = 1.0

    weighted, named = Weighted(W, 0.5), SimpleNamespace(factor=1.0)

    def cell(x, h):
        return h, h + x @ weighted.W * weighted.gain * weighted.factor * named.factor

    def plain(x, h):
        pair = PAIR
        return h, h + x @ pair.W * pair.gain

    xs, state = rng.standard_normal((5, 2, 3)), tgs.zeros(2, 4, dtype="float64")
    settle(cell, xs, state)
    Weighted.factor = value
    agrees(cell, xs, state)
    settle(plain, xs, state)
    assert settled.settled(plain)
    monkeypatch.setattr(Pair, "gain", value)
    agrees(plain, xs, state)


PAIR = Pair(W, 0.5)


def test_values_in_modules_of_the_package(rng, monkeypatch):
    xs, state = rng.standard_normal((5, 2, 3)), tgs.zeros(2, 4, dtype="float64")

    def by_name(x, h):
        return h, nn.gates.ACTIVATIONS["silu"](x @ W + h)

    def of_package(x, h):
        return h, h + x @ W * tgs.own_factor

    monkeypatch.setattr(tgs, "own_factor", 0.5, raising=False)
    settle(by_name, xs, state)
    settle(of_package, xs, state)
    monkeypatch.setitem(nn.gates.ACTIVATIONS, "silu", tgs.tanh)
    monkeypatch.setattr(tgs, "own_factor", 2.0)
    agrees(by_name, xs, state)
    agrees(of_package, xs, state)


def test_another_function_in_the_place_of_a_builtin(rng, monkeypatch):
    def cell(x, h):
        return h, h + x @ W * round(0.7)

    xs, state = rng.standard_normal((5, 2, 3)), tgs.zeros(2, 4, dtype="float64")
    settle(cell, xs, state)
    assert settled.settled(cell)
    before = tgs.scan(cell, xs, state)[1].numpy()
    with monkeypatch.context() as patched:
        patched.setattr(builtins, "round", lambda number: SCALE)
        found = [tgs.scan(cell, xs, state)[1].numpy() for _ in range(6)]
        patched.setitem(globals(), "SCALE", 0.1)
        found.append(tgs.scan(cell, xs, state)[1].numpy())
    for factor, each in zip([0.5] * 6 + [0.1], found, strict=True):
        np.testing.assert_allclose(each, before * factor)
