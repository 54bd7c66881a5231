"""Tensors on a GPU against the same on the host: values, gradients, places, and nothing moved.

Each test runs twice from one text: on the stand-in of ``fake_cupy.py``, which needs no GPU, and,
marked ``gpu``, on a GPU if there is one. Operations come from the tables of the other tests.
"""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import fake_cupy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import mutually_broadcastable_shapes
from test_elementwise import PUBLIC, inputs_for
from test_structural import CASES

import tinygrad_seq as tgs
from tinygrad_seq import data, devices, nn, optim
from tinygrad_seq.rules import RULES
from tinygrad_seq.tensors import wrap
from tinygrad_seq.trees import leaves

F = nn.functional
# Sums in another order differ by some units in the last place; the stand-in has NumPy's order.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


REAL = devices.load
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # CuPy's, as it is imported
    NO_GPU = devices.missing()


@pytest.mark.gpu
@pytest.mark.skipif(NO_GPU is not None, reason=NO_GPU or "")
def test_a_gpu_is_there():
    assert tgs.ones(2).to("cuda").device == "cuda"


PLACES = [] if NO_GPU else [pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=["fake", *PLACES])
def place(request):
    """A device to call "cuda"."""
    if request.param == "cuda":
        yield "cuda"
    else:
        with fake_cupy.installed():
            yield "fake"


@contextmanager
def waiting(times: int = 0):
    """The block copies so many arrays to the host (which the stand-in counts)."""
    before = fake_cupy.transfers["to_host"]
    yield
    assert devices.load is REAL or fake_cupy.transfers["to_host"] == before + times


@contextmanager
def nothing_moving():
    """Nor does it copy any to the device."""
    before = fake_cupy.transfers["to_device"]
    with waiting():
        yield
    assert devices.load is REAL or fake_cupy.transfers["to_device"] == before


def values(tree) -> list[np.ndarray]:
    return [leaf.numpy() for leaf in leaves(tree)]


def assert_equal(there, here) -> None:
    assert len(there) == len(here)
    for a, b in zip(there, here, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, **CLOSE)


def run(function, arrays, device: str, moving=nothing_moving) -> list[np.ndarray]:
    """The value and the gradients of what is floating, computed on one device."""
    xs = [tgs.tensor(a, requires_grad=a.dtype.kind == "f", device=device) for a in arrays]
    with moving():
        ys = leaves(function(*xs))
        assert {y.device for y in ys} == {device}
    rng = np.random.default_rng(0)
    upstream = [np.asarray(rng.standard_normal(y.shape), y.dtype) for y in ys]
    gs = [tgs.tensor(g, device=device) for g in upstream]
    with nothing_moving():
        for y, g in zip(ys, gs, strict=True):
            if y.requires_grad:
                y.backward(g, retain_graph=True)
    gradients = [x.grad for x in xs if x.grad is not None]
    assert all(each.device == device for each in gradients)
    return values([*ys, *gradients])


def compare(function, *arrays, moving=nothing_moving) -> None:
    """A function of tensors gives the same on both devices."""
    assert_equal(run(function, arrays, "cuda", moving), run(function, arrays, "cpu", moving))


# Operations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", PUBLIC)
def test_rules(place, name, dtype, rng):
    arity = len(RULES[name].inputs)
    arrays = inputs_for(name, ((3, 1), (1, 4), (4,))[:arity], dtype, rng)
    with pytest.MonkeyPatch.context() as patch:
        if dtype == "float32":  # the functions of the host and of a GPU round differently
            patch.setitem(CLOSE, "rtol", 1e-5)
            patch.setitem(CLOSE, "atol", 1e-6)
        compare(getattr(tgs, name), *arrays)


@pytest.mark.parametrize("name", [n for n in PUBLIC if len(RULES[n].inputs) > 1])
@settings(max_examples=8)
@given(data=st.data())
def test_broadcasting(place, name, data):
    arity = len(RULES[name].inputs)
    shapes = data.draw(mutually_broadcastable_shapes(num_shapes=arity, min_side=0, max_dims=3))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    compare(getattr(tgs, name), *inputs_for(name, shapes.input_shapes, "float64", rng))


@pytest.mark.parametrize(
    "number", [2, -1, 0.5, True, np.float64(1.5), np.float32(3), np.array(1.5)]
)
@pytest.mark.parametrize("name", [n for n in PUBLIC if len(RULES[n].inputs) == 2])
def test_numbers_go_with_any_device(place, name, number, rng):
    function, positive = getattr(tgs, name), abs(number)
    x = rng.uniform(0.5, 2, (3,))
    compare(lambda x: (function(x, number), function(positive, x)), x, moving=waiting)


NUMBERS = {
    "both sides of a choice": lambda x: tgs.where(x > 0, 1.0, 0.5) * x,
    "NumPy's, both sides": lambda x: tgs.where(x > 0, np.float32(1), np.float32(2)) * x,
    "a condition": lambda x: tgs.where(True, x, -x),
    "NumPy's condition": lambda x: tgs.where(np.bool_(False), x, -x),
    "beside others": lambda x: tgs.stack([x.sum(), 0.5, np.float64(2)]),
    "bounds": lambda x: tgs.clip(x, False, np.float32(0.5)),
    "a bias": lambda x: tgs.linear(x, x, 0.5),
    "a target": lambda x: F.mse_loss(x.sum(), 1.0) + F.l1_loss(x.sum(), np.float64(2)),
    "a target between 0 and 1": lambda x: F.binary_cross_entropy_with_logits(x.sum(), 1),
    "a class": lambda x: F.cross_entropy(x[0], 1),
    "a cotangent": lambda x: tgs.vjp(lambda y: (y * y).sum(), x)[1](2.0)[0],
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_go_anywhere_else_too(place, name, rng):
    compare(NUMBERS[name], rng.standard_normal((2, 3)), moving=waiting)


def test_numbers_are_put_in_the_place_of_a_value(place):
    t = tgs.tensor(3.0, requires_grad=True, device="cuda")
    (t * t).backward(0.5)
    t.data = 2.0
    assert (t.grad.item(), t.item(), t.device) == (3.0, 2.0, "cuda")


# These are given an index, which is to be where the tensor is.
INDEXED = {
    "take": lambda x: tgs.take(x, tgs.tensor([[2, 0], [2, 2]], device=x.device), axis=0),
    "take flat": lambda x: tgs.take(x, [5, 5]),
    "take_along_axis": lambda x: tgs.take_along_axis(
        x, tgs.tensor([[[3, 0]], [[1, 1]], [[0, 2]]], device=x.device), axis=1
    ),
    "tensor index": lambda x: x[tgs.tensor([1, 1, 0], device=x.device)],
    "boolean index": lambda x: x[tgs.tensor([True, False, True], device=x.device)],
}


@pytest.mark.parametrize("name", CASES)
def test_structural(place, name, rng):
    function, _, shapes = CASES[name]
    indexed = name in INDEXED or name == "integer index"  # the index goes there
    moving = waiting if indexed else nothing_moving
    arrays = [rng.standard_normal(shape) for shape in shapes]
    compare(INDEXED.get(name, function), *arrays, moving=moving)


OTHERS = {
    "clip": lambda x: tgs.clip(x, -0.5, 0.5),
    "argmax": lambda x: tgs.argmax(x, 1),
    "argmin": lambda x: tgs.argmin(x),
    "comparisons": lambda x: [x < 0.1, x <= x.T.T, x > 0, x <= 0, x == x, x != 0.5],
    "logic": lambda x: [~(x > 0), (x > 0) & (x < 1), (x > 1) | (x < 0)],
    "iteration": lambda x: list(x)[1],
    "integers": lambda x: [(x > 0).sum(), (x > 0).to("int64") * 2 + 1, (x > 0).to("int32") / 2],
    "power": lambda x: [(x * x) ** x, x**3, x**-1, 2.0**x, x**2, x**0],
    "ties": lambda x: [(x * 0).max(0), tgs.maximum(x * 0, 0.0)],
    "many indices": lambda x: x[1:, [0, 2, 0]][:, tgs.tensor([[0], [1]], device=x.device)],
    "two indices": lambda x: x[[0, 1, 1], [3, 3, 0]],
    "mask": lambda x: x[x > 0],
    "no elements": lambda x: [x[:0].sum(0), tgs.concat([x[:0], x]), x[[]]],
    "one number": lambda x: [x[0, 0] * 2, x[0, 0].reshape(1), x[-1, -1] + x],
    "float16": lambda x: x.to("float16").mean(0).to("float64"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_others(place, name, rng):
    moving = waiting if "ind" in name or name == "no elements" else nothing_moving
    compare(OTHERS[name], rng.standard_normal((3, 4)), moving=moving)


@pytest.mark.parametrize("name", ["gelu", "where", "power", "maximum", "matmul", "take", "softmax"])
def test_gradcheck(place, name, rng):
    functions = {
        "where": lambda a, b: tgs.where(a > b, a * b, b),
        "take": lambda x: x[[1, 1, 0]] * x[0],
        "matmul": lambda a, b: a @ b.T,
    }
    arity = 2 if name in ("where", "power", "maximum", "matmul") else 1
    xs = tuple(tgs.tensor(rng.uniform(0.2, 2, (2, 3)), device="cuda") for _ in range(arity))
    assert tgs.gradcheck(functions.get(name) or getattr(tgs, name), xs, order=2)
    with pytest.raises(AssertionError, match="central differences give"):
        tgs.gradcheck(lambda x: x * x.detach(), xs[:1])


def test_transforms(place, rng):
    a, b = rng.standard_normal((3, 2)), rng.standard_normal(3)

    def f(a, b):
        return (tgs.tanh(a).T @ b).sum() * b[0]

    for name in ("grad", "vjp", "jvp", "hessian"):
        found = []
        for device in ("cuda", "cpu"):
            x, y = tgs.tensor(a, device=device), tgs.tensor(b, device=device)
            with waiting():
                if name == "grad":
                    made = tgs.value_and_grad(f, (0, 1))(x, y)
                elif name == "vjp":
                    _, pull = tgs.vjp(f, x, y)
                    made = pull(tgs.ones((), dtype="float64", device=device))
                elif name == "jvp":
                    made = tgs.jvp(f, (x, y), (x, y))
                else:
                    made = tgs.grad(lambda y, x=x: (tgs.grad(f, 1)(x, y) * y).sum())(y)
            assert {leaf.device for leaf in leaves(made)} == {device}
            found.append(values(made))
        assert_equal(*found)
    unconnected = tgs.grad(lambda x: tgs.tensor(1.0, device="cuda") * 1)(tgs.ones(2, device="cuda"))
    assert unconnected.device == "cuda"


# Moving ---------------------------------------------------------------------------------------


def test_to_is_differentiable(place):
    x = tgs.tensor([1.0, 2.0], dtype="float64", requires_grad=True)
    there = x.to("cuda")
    assert (there.device, x.device) == ("cuda", "cpu")
    assert x.to("cpu") is x
    assert there.to("cuda") is there
    assert there.to("cuda:0") is there
    back = (there * there).to("cpu") * x
    assert back.device == "cpu"
    back.sum().backward()
    np.testing.assert_array_equal(x.grad, [3.0, 12.0])
    assert x.grad.device == "cpu"
    second = tgs.grad(lambda x: tgs.grad(lambda x: (x.to("cuda") ** 3).sum().to("cpu"))(x).sum())
    np.testing.assert_array_equal(second(x), [6.0, 12.0])
    assert tgs.gradcheck(lambda x: (x.to("cuda") ** 2).to("cpu"), x)


def test_what_a_tensor_says(place):
    t = tgs.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True, device="cuda")
    assert (t.device, t.shape, t.ndim, t.size, len(t)) == ("cuda", (2, 2), 2, 4, 2)
    assert repr(t).endswith("dtype=float32, device='cuda', requires_grad=True)")
    with waiting(1):
        assert t.tolist() == [[1, 2], [3, 4]]
    with waiting(1):
        array = t.numpy()
    assert type(array) is np.ndarray
    assert not array.flags.writeable
    with waiting(4):
        assert t[0, 1].item() == float(t[0, 1]) == int(t[0, 1]) == 2
        assert bool(t[0, 0] > 0)
    assert f"{t[1, 1]:.1f}" == "4.0"
    assert [10, 20, 30][tgs.tensor(1, device="cuda")] == 20
    assert devices.namespace(t.data).__name__ == ("cupy" if place == "cuda" else "fake_cupy")
    assert devices.device_of(t.data) == "cuda"
    assert isinstance(t.data.data.ptr, int)


def test_numpys_functions_stay_there(place):
    t = tgs.tensor([[1.0, 2.0], [3.0, 4.0]], device="cuda")
    with waiting():
        assert np.exp(t).device == "cuda"
        assert (np.float32(2) * t).device == "cuda"
        assert devices.device_of(np.isnan(t)) == "cuda"
        assert devices.device_of(np.clip(t, 0, 1)) == "cuda"
        assert (t.data * t).device == "cuda"  # CuPy's array on the left
        assert (t.data < t).device == "cuda"
    with pytest.raises(tgs.DeviceError, match=r"np\.asarray: .* on cuda .*t\.numpy\(\) copies"):
        np.asarray(t)
    with pytest.raises(tgs.DeviceError, match=r"t\.numpy\(\)"):
        np.testing.assert_allclose(tgs.ones(2).numpy(), t[0])


def test_cupys_arrays_make_tensors_there(place):
    array = tgs.arange(3, device="cuda").data
    t = tgs.tensor(array)
    assert (t.device, t.dtype) == ("cuda", np.int64)
    assert t.data.data.ptr != array.data.ptr  # a copy
    assert tgs.tensor(array, dtype="float64", device="cpu").device == "cpu"
    assert (tgs.ones(3, device="cuda") * array).device == "cuda"
    assert nn.parameter(tgs.ones(3, device="cuda").data).device == "cuda"


def test_creation(place):
    makers = {
        "tensor": lambda **k: tgs.tensor([1.0, 2.0], **k),
        "zeros": lambda **k: tgs.zeros(2, 3, **k),
        "ones": lambda **k: tgs.ones((2,), dtype="float64", **k),
        "full": lambda **k: tgs.full((2, 1), 7, **k),
        "arange": lambda **k: tgs.arange(1, 2, 0.25, **k),
        "eye": lambda **k: tgs.eye(2, 3, **k),
        "rand": lambda **k: tgs.rand(3, 2, **k),
        "randn": lambda **k: tgs.randn(3, 2, rng=5, **k),
    }
    for make in makers.values():
        made = []
        for device in ("cuda", "cpu"):
            tgs.manual_seed(1)
            made.append(make(device=device))
            assert made[-1].device == device
        assert_equal(values(made[:1]), values(made[1:]))
    leaf = tgs.ones(2, requires_grad=True, device="cuda")
    assert leaf.is_leaf
    assert leaf.requires_grad
    weights = tgs.ones(2, requires_grad=True)
    assert tgs.tensor(weights, requires_grad=True, device="cuda").is_leaf


def test_data_and_grad_stay_on_their_device(place):
    t = tgs.ones(2, requires_grad=True, device="cuda")
    new = tgs.tensor([3.0, 4.0], device="cuda")
    t.data = new
    t.grad = new
    assert t.tolist() == t.grad.tolist() == [3, 4]
    host = np.ones(2, "float32")
    with pytest.raises(
        tgs.DeviceError, match=r"data: one on cpu .* tensor on cuda.*\.to\('cuda'\)"
    ):
        t.data = host
    with pytest.raises(tgs.DeviceError, match="grad: one on cpu"):
        t.grad = host
    with pytest.raises(tgs.DeviceError, match="backward: gradient: one on cpu"):
        (t * 2).backward(host)
    with pytest.raises(tgs.DeviceError, match="data: one on cuda was given for a tensor on cpu"):
        tgs.ones(2).data = new


def test_copies_stay_and_pickles_come_back_on_the_host(place):
    t = tgs.tensor([1.0, 2.0], requires_grad=True, device="cuda")
    (t * t).sum().backward()
    with waiting():
        for made in (copy.copy(t), copy.deepcopy(t)):
            assert made.device == made.grad.device == "cuda"
            assert made.requires_grad
    assert copy.deepcopy(t).data.data.ptr != t.data.data.ptr
    text = pickle.dumps(t)
    assert b"cupy" not in text
    back = pickle.loads(text)
    assert back.device == back.grad.device == "cpu"
    assert back.requires_grad
    assert back.grad.tolist() == [2, 4]
    with pytest.raises(tgs.TapeError, match="cannot be copied"):
        copy.copy(t * 2)


def test_the_tape_lists_and_checks(place):
    w = tgs.tensor([[1.0, 2.0]], requires_grad=True)
    with tgs.Tape(w=w) as tape:
        y = tgs.tanh(w.to("cuda"))[:, [1, 0]] * 2
        y.sum().to("cpu")
    assert "to(%0, cuda)" in str(tape)
    assert [line.device for line in tape] == ["cpu", "cuda", "cuda", "cuda", "cuda", "cuda", "cpu"]
    tape.check()


# Mixing ---------------------------------------------------------------------------------------


MIXED = {
    "add": lambda h, d: h + d,
    "multiply": lambda h, d: d * h.numpy(),
    "subtract": lambda h, d: h.numpy() - d,
    "matmul": lambda h, d: h @ d,
    "where": lambda h, d: tgs.where(d > 0, h, d),
    "concat": lambda h, d: tgs.concat([d, h]),
    "stack": lambda h, d: tgs.stack([h, d]),
    "greater": lambda h, d: d > h,
    "less": lambda h, d: d < tgs.tensor(0.5),  # no axes, but a tensor that has its place
    "maximum": lambda h, d: tgs.maximum(d, tgs.tensor(0.5)),
    "indexing": lambda h, d: d[np.array([0, 1])],
    "take_along_axis|indexing": lambda h, d: tgs.take_along_axis(h, (d * 0).to("int64")),
    "mse_loss": lambda h, d: nn.functional.mse_loss(d, h),
    "cross_entropy": lambda h, d: nn.functional.cross_entropy(d, [0, 1]),
    "binary_cross": lambda h, d: nn.functional.binary_cross_entropy_with_logits(h, d),
    "huber_loss": lambda h, d: nn.functional.huber_loss(d, d, mask=[True, False]),
    "dot_attention": lambda h, d: nn.functional.dot_attention(
        d.reshape(1, 2, 2), d.reshape(1, 2, 2), mask=[[True, True]]
    ),
}


@pytest.mark.parametrize("name", MIXED)
def test_mixing_names_the_operation_and_the_places(place, name):
    host = tgs.tensor([[0.5, 1.0], [2.0, 3.0]], requires_grad=True)
    there = tgs.tensor([[0.5, 1.0], [2.0, 3.0]], requires_grad=True, device="cuda")
    with waiting(), pytest.raises(tgs.DeviceError, match=rf"(?s)^({name}).*\.to\('c") as raised:
        MIXED[name](host.detach(), there)
    assert "cpu" in str(raised.value)
    assert "cuda" in str(raised.value)


def test_other_errors_are_what_they_are_on_the_host(place):
    a = tgs.ones(2, 3, device="cuda")
    with pytest.raises(tgs.ShapeError, match=r"add: a \(2, 3\), b \(2,\) were given"):
        a + tgs.ones(2, device="cuda")
    with pytest.raises(tgs.ShapeError, match="max"):
        a[:0].max(0)
    with pytest.raises(IndexError):
        a[2]
    with pytest.raises(tgs.ShapeError, match="does not broadcast"):
        tgs.broadcast_to(a, (4, 2))
    with pytest.raises(tgs.TapeError, match="does not require"):
        a.sum().backward()


# Layers, losses -------------------------------------------------------------------------------


def sequences(rng, T=5, B=3, I=2):
    return rng.standard_normal((T, B, I)).astype("f4")


def ids(rng, *shape):
    return rng.integers(0, 7, shape)


LENGTHS, RESETS = np.array([5, 0, 3]), np.array([[False, True, False]] * 5)
TAPE = {"backend": "tape"}
LAYERS = {
    "Linear": (lambda: nn.Linear(2, 3), sequences, {}),
    "Embedding": (lambda: nn.Embedding(7, 3), lambda rng: ids(rng, 4, 2), {}),
    "Dropout": (lambda: nn.Dropout(0.4), sequences, {}),
    "LayerNorm": (lambda: nn.LayerNorm(2), sequences, {}),
    "Sequential": (lambda: nn.Sequential(nn.Linear(2, 4), tgs.gelu), sequences, {}),
    "Conv1d": (lambda: nn.Conv1d(3, 2, 2, padding="same"), sequences, {"lengths": [2, 1, 0, 2, 1]}),
    "MaxPool1d": (lambda: nn.MaxPool1d(2, 1), sequences, {}),
    "AvgPool1d": (lambda: nn.AvgPool1d(2, 1, padding=1), sequences, {}),
    "GlobalPool1d max": (lambda: nn.GlobalPool1d(), sequences, {"lengths": [2, 1, 0, 2, 1]}),
    "GlobalPool1d mean": (lambda: nn.GlobalPool1d("mean"), sequences, {"lengths": [2, 1, 0, 2, 1]}),
    "GlobalPool1d all": (lambda: nn.GlobalPool1d("mean"), sequences, {}),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(3), sequences, {"lengths": [2, 1, 0, 2, 1]}),
    "BatchNorm1d average": (lambda: nn.BatchNorm1d(3, momentum=None), sequences, {}),
    "BatchNorm1d eval": (lambda: nn.BatchNorm1d(3).eval(), sequences, {}),
    "RNN": (lambda: nn.RNN(2, 3, bidirectional=True, **TAPE), sequences, {"lengths": LENGTHS}),
    "LSTM": (
        lambda: nn.LSTM(2, 3, 2, dropout=0.3, **TAPE),
        sequences,
        {"lengths": LENGTHS, "resets": RESETS},
    ),
    "LSTM options": (
        lambda: nn.LSTM(
            *(2, 4), peephole=True, layer_norm=True, zoneout=0.2, recurrent_dropout=0.2, clip=1.0,
            projection_size=3, **TAPE,
        ),
        sequences,
        {},
    ),
    "LSTM eval": (lambda: nn.LSTM(2, 3, zoneout=0.2, coupled=True, **TAPE).eval(), sequences, {}),
    "GRU": (
        lambda: nn.GRU(2, 3, reset_after=True, reverse=True, batch_first=True, **TAPE),
        sequences,
        {"resets": np.zeros((5, 3), bool)},
    ),
    "GRU last": (
        lambda: nn.GRU(2, 3, bidirectional=True, output="last", **TAPE),
        sequences,
        {"lengths": LENGTHS},
    ),
    "no steps": (lambda: nn.GRU(2, 3, **TAPE), lambda rng: sequences(rng, T=0), {}),
    "all empty": (lambda: nn.GRU(2, 3, **TAPE), sequences, {"lengths": [0, 0, 0]}),
    "Seq2Seq": (lambda: seq2seq(), lambda rng: ids(rng, 5, 3), {"lengths": LENGTHS}),
}  # fmt: skip


def seq2seq():
    model = nn.Seq2Seq(7, 7, 4, layer="gru")
    model.encoder.backend = model.decoder.backend = "tape"
    return lambda_module(model)


class lambda_module(nn.Module):  # noqa: N801
    """A Seq2Seq whose target is its source."""

    def __init__(self, model):
        self.model = model

    def forward(self, x, lengths):
        return self.model(x, x, lengths)


@pytest.mark.parametrize("name", LAYERS)
def test_layers(place, name, rng, monkeypatch):
    monkeypatch.setitem(CLOSE, "rtol", 1e-5)  # float32
    monkeypatch.setitem(CLOSE, "atol", 1e-6)
    make, inputs, more = LAYERS[name]
    found, model, x = [], make(), inputs(rng)
    start = copy.deepcopy(model)
    for device in ("cuda", "cpu"):
        model = copy.deepcopy(start).to(device)
        tgs.manual_seed(4)
        with waiting():
            given = tgs.tensor(x, requires_grad=x.dtype.kind == "f", device=device)
            ys = leaves(model(given, **more))
            loss = sum((y.to("float32") * y).sum() for y in ys)
            if loss.requires_grad and loss.size:
                loss.backward()
        gradients = [p.grad for p in (*model.parameters(), given) if p.grad is not None]
        made = [*ys, *gradients, *model.buffers()]
        assert {t.device for t in made} == {device}
        found.append(values(made))
    assert_equal(*found)


LOSSES = {
    "mse": lambda p, t, c, m: F.mse_loss(p, t),
    "mse masked": lambda p, t, c, m: F.mse_loss(p, t, mask=m),
    "rmse": lambda p, t, c, m: F.rmse_loss(p, t, mask=m),
    "rmse of nothing": lambda p, t, c, m: F.rmse_loss(p, p.detach()),
    "l1": lambda p, t, c, m: F.l1_loss(p, t, mask=m),
    "huber": lambda p, t, c, m: F.huber_loss(p, t, mask=m, delta=0.5),
    "cross_entropy": lambda p, t, c, m: F.cross_entropy(p, c),
    "cross_entropy masked": lambda p, t, c, m: F.cross_entropy(
        p, c - (~m).to("int64") * 50, mask=m
    ),
    "accuracy": lambda p, t, c, m: p.sum() + F.accuracy(p, c, mask=m),
    "nothing left": lambda p, t, c, m: F.cross_entropy(p, c, mask=m & ~m),
    "binary": lambda p, t, c, m: F.binary_cross_entropy_with_logits(p, tgs.sigmoid(t), mask=m),
    "attention": lambda p, t, c, m: F.dot_attention(
        tgs.stack([p, t]), tgs.stack([p, t, p]), mask=tgs.stack([m, m, ~m])
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(place, name, rng):
    p, t = rng.standard_normal((2, 4, 3))
    compare(LOSSES[name], p, t, rng.integers(0, 3, 4), rng.random(4) < 0.5)


def test_what_is_out_of_range_makes_nan(place):
    """Looking would mean waiting; on the host these raise."""
    embedding = nn.Embedding(3, 2).to("cuda")
    with waiting():
        y = embedding(tgs.tensor([0, 3, -1], device="cuda"))
        y.sum().backward()
    assert np.isnan(y.numpy()).tolist() == [[False] * 2, [True] * 2, [True] * 2]
    assert embedding.weight.grad.tolist() == [[1, 1], [0, 0], [0, 0]]
    logits = tgs.zeros(2, 3, device="cuda")
    with waiting():
        loss = F.cross_entropy(logits, tgs.tensor([0, 3], device="cuda"))
    assert np.isnan(loss.item())


def test_random_numbers_in_a_cell_are_those_of_the_host(place):
    def cell(x, h):
        h = h + tgs.rand(h.shape) + tgs.randn(h.shape, per_sequence=True) * x
        return h, h

    found = []
    for device in ("cuda", "cpu"):
        tgs.manual_seed(2)
        xs = tgs.ones(3, 2, 4, device=device, dtype="float64")
        ys, _ = tgs.unroll(cell, xs, xs[0] * 0)
        found.append(values(ys))
    assert_equal(*found)


def test_lengths_and_resets_stay_on_the_host(place):
    xs = tgs.ones(3, 2, 4, device="cuda")
    layer = nn.GRU(4, 2, backend="tape").to("cuda")
    lengths = tgs.tensor([1, 2], device="cuda")
    with pytest.raises(tgs.DeviceError, match=r"unroll: lengths: given on cuda.*\.to\('cpu'\)"):
        layer(xs, lengths=lengths)
    with pytest.raises(tgs.DeviceError, match="unroll: resets: given on cuda"):
        tgs.unroll(layer.cells[0], xs, resets=tgs.zeros(3, 2, device="cuda") > 0)
    with pytest.raises(tgs.DeviceError, match="Conv1d: lengths"):
        nn.Conv1d(2, 1, 1).to("cuda")(tgs.ones(2, 2, 3, device="cuda"), lengths=lengths)
    with pytest.raises(tgs.DeviceError, match="unroll: xs is on cuda, but the state on cpu; move"):
        tgs.unroll(nn.GRUCell(4, 2).to("cuda"), xs, tgs.zeros(2, 2))


# Modules --------------------------------------------------------------------------------------


def small():
    tgs.manual_seed(3)
    # A bias before the normalisation would have a gradient of rounding alone, and Adam follow it.
    first = nn.Linear(3, 4, bias=False)
    return nn.Sequential(first, nn.BatchNorm1d(4), tgs.tanh, nn.Linear(4, 2))


def test_modules_move_with_their_gradients(place):
    model = small()
    model.layers[3].weight.requires_grad = False
    weight, shared = model.layers[0].weight, model.layers[3]
    model.again = shared  # tied
    x = np.ones((4, 3), "f4")
    x[2] = 0.3
    (model(x) ** 2).sum().backward()
    expected = weight.grad.numpy()
    assert model.to("cuda") is model
    assert {t.device for t in (*model.parameters(), *model.buffers())} == {"cuda"}
    assert {p.grad.device for p in model.parameters() if p.grad is not None} == {"cuda"}
    assert model.layers[0].weight is weight
    assert not shared.weight.requires_grad
    assert model.again.weight is model.layers[3].weight
    assert model.layers[1].num_batches_tracked.dtype == np.int64
    np.testing.assert_array_equal(weight.grad.numpy(), expected)
    assert model.to("float64").to("cpu").layers[0].weight.dtype == np.float64
    assert weight.device == weight.grad.device == "cpu"
    with pytest.raises(ValueError, match="expected a float dtype"):
        model.to("int64")


def test_a_graph_from_before_the_move_still_gives_gradients(place):
    model = nn.Linear(2, 1)
    loss = model(np.ones((1, 2), "f4")).sum()
    model.to("cuda")
    loss.backward()
    assert model.weight.grad.device == "cuda"
    assert model.weight.grad.tolist() == [[1, 1]]


def test_state_dicts_go_between_devices(place, tmp_path):
    here, there = small(), small().to("cuda")
    for parameter in here.parameters():
        parameter.data = parameter.numpy() * 2
    there.load_state_dict(here.state_dict())
    assert there.layers[0].weight.device == "cuda"
    assert_equal(values(there.state_dict()), values(here.state_dict()))
    with waiting():
        assert there.state_dict()["layers.0.weight"].device == "cuda"
    np.savez(tmp_path / "weights.npz", **there.state_dict())
    with np.load(tmp_path / "weights.npz") as saved:
        fresh = small().to("cuda")
        fresh.load_state_dict(saved)
        here.load_state_dict(saved)
    assert_equal(values(fresh.state_dict()), values(here.state_dict()))
    assert fresh.layers[0].weight.device == "cuda"
    here.load_state_dict(there.state_dict())
    assert here.layers[0].weight.device == "cpu"
    text = pickle.dumps(there.state_dict())
    assert b"cupy" not in text
    assert {t.device for t in pickle.loads(text).values()} == {"cpu"}
    assert {
        p.device for p in pickle.loads(pickle.dumps(nn.Linear(2, 2).to("cuda"))).parameters()
    } == {"cpu"}
    with waiting():
        assert copy.deepcopy(there).layers[0].weight.device == "cuda"


# Training -------------------------------------------------------------------------------------

OPTIMIZERS = {
    "SGD": lambda p: optim.SGD(p, lr=0.1),
    "SGD momentum": lambda p: optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adam": lambda p: optim.Adam(p, lr=0.05, weight_decay=0.1),
    "AdamW": lambda p: optim.AdamW(p, lr=0.05),
    "RMSprop": lambda p: optim.RMSprop(p, lr=0.01, momentum=0.5, weight_decay=0.1),
}
CLIPS = {
    "none": lambda parameters: None,
    "norm": lambda parameters: optim.clip_grad_norm_(parameters, 0.1),
    "large norm": lambda parameters: optim.clip_grad_norm_(parameters, 1e6),
    "value": lambda parameters: optim.clip_grad_value_(parameters, 0.01),
}


def trained(make, clip, device, early, steps=3):
    model = small().to("float64")
    optimizer = make(model.parameters()) if early else None
    model.to(device)
    optimizer = optimizer or make(model.parameters())
    schedule = optim.CosineAnnealingLR(optimizer, 5)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        x, y = (tgs.tensor(rng.standard_normal((6, n)), device=device) for n in (3, 2))
        with nothing_moving():
            loss = F.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            clip(model.parameters())
            optimizer.step()
            schedule.step()
    return model, optimizer


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimisers(place, name, early, clip):
    found = []
    for device in ("cuda", "cpu"):
        model, _ = trained(OPTIMIZERS[name], CLIPS[clip], device, early)
        assert {p.device for p in model.parameters()} == {device}
        found.append(values(model.state_dict()))
    assert_equal(*found)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimisers_follow_their_parameters(place, name):
    """A state goes where the parameter went, and a saved one to where the parameter is."""
    found = []
    for devices_of_steps in (("cuda", "cpu", "cuda"), ("cpu", "cpu", "cpu")):
        model, optimizer = trained(OPTIMIZERS[name], CLIPS["none"], "cpu", True)
        for device in devices_of_steps:
            model.to(device)
            loss = (model(tgs.ones(2, 3, dtype="float64", device=device)) ** 2).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            saved = pickle.dumps(optimizer.state_dict())
            assert b"cupy" not in saved
            optimizer.load_state_dict(pickle.loads(saved))
        found.append(values(model.state_dict()))
    assert_equal(*found)
    assert b"cupy" not in pickle.dumps(optimizer)


def test_an_optimiser_of_ones_own(place):
    class Own(optim.Optimizer):
        def update(self, value, gradient, group, state):
            return tgs.tensor(value - gradient) if group["there"] else np.ones(2, "f4")

    t = tgs.zeros(2, requires_grad=True, device="cuda")
    t.grad = tgs.ones(2, device="cuda")
    Own([t], {"there": True}).step()
    assert (t.device, t.tolist()) == ("cuda", [-1, -1])
    with pytest.raises(
        tgs.DeviceError, match=r"Own\.update: input 0 is on cuda, input 1 is on cpu"
    ):
        Own([t], {"there": False}).step()


def test_a_clipped_norm_stays_on_the_device(place):
    t = tgs.zeros(2, requires_grad=True, device="cuda")
    t.grad = tgs.tensor([3.0, 4.0], device="cuda")
    with waiting():
        norm = optim.clip_grad_norm_([t], 1.0)
    assert (norm.device, norm.shape) == ("cuda", ())
    assert float(norm) == 5.0
    np.testing.assert_allclose(t.grad.numpy(), [0.6, 0.8], rtol=1e-6)
    for bad in (np.inf, np.nan):
        t.grad = tgs.tensor([bad, 4.0], device="cuda")
        assert not np.isfinite(float(optim.clip_grad_norm_([t], 1.0)))
        assert t.grad.tolist()[1] == 4.0
    t.grad = tgs.tensor([3e30, 4e30], device="cuda")  # whose squares leave float32
    assert float(optim.clip_grad_norm_([t], 1.0)) == pytest.approx(5e30)
    other = tgs.ones(1, requires_grad=True)
    other.grad = np.ones(1, "f4")
    with pytest.raises(tgs.DeviceError, match="clip_grad_norm_: input 0 is on cuda, input 1 is on"):
        optim.clip_grad_norm_([t, other], 1.0)


def tagger():
    tgs.manual_seed(1)
    return nn.Sequential(nn.Embedding(7, 4), nn.GRU(4, 5, backend="tape"), nn.Linear(5, 3))


def test_fit_moves_its_batches(place):
    """The same history and weights; of a batch its loss and the norm come back, and no more."""
    rng = np.random.default_rng(0)
    xs, ys, lengths = ids(rng, 5, 8), rng.integers(0, 3, (5, 8)), rng.integers(1, 6, 8)
    found = []
    for device in ("cuda", "cpu"):
        model = tagger().to(device)
        batches = data.Batches(xs, ys, lengths, batch_size=4, axis=1, rng=0)
        optimizer = optim.Adam(model.parameters(), 0.05)
        with waiting(2 * (2 + 2) + 2 if device == "cuda" else 0):
            history = tgs.train.fit(
                model,
                batches,
                F.cross_entropy,
                optimizer,
                epochs=2,
                clip_norm=0.5,
                validation=[(xs, ys, lengths)],
                patience=5,
                progress=False,
            )
        assert tgs.train.evaluate(model, batches, F.cross_entropy) < 2
        made = tgs.train.predict(model, xs, lengths)
        assert made.device == device
        found.append([*values(model.state_dict()), *values(made), np.array(history.loss)])
        found[-1] += [np.array(history.validation), np.array(history.norm)]
    np.testing.assert_equal([len(f) for f in found], [len(found[0])] * 2)
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_truncated_backpropagation(place):
    rng = np.random.default_rng(0)
    xs, ys = ids(rng, 9, 2), rng.integers(0, 3, (9, 2))
    found = []
    for device in ("cuda", "cpu"):
        model = tagger().to(device)
        history = tgs.train.fit(
            model,
            [(xs, ys)],
            F.cross_entropy,
            optim.SGD(model.parameters(), 0.1),
            epochs=2,
            tbptt=(3, 5),
            carry_state=True,
            progress=False,
        )
        given = (tgs.tensor(each, device=device) for each in (xs, ys))
        with waiting(3 if device == "cuda" else 0):
            blocks = list(tgs.train.tbptt(model, *given, F.cross_entropy, 3, 3))
        assert {leaf.device for leaf in leaves(blocks[-1].state)} == {device}
        found.append([*values(model.state_dict()), np.array([*history.loss, blocks[-1].loss])])
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_tf32_is_off_unless_it_is_asked_for(place):
    if place != "fake":
        pytest.skip("looks into the stand-in")
    chosen = fake_cupy._core._routines_linalg.chosen
    tgs.allow_tf32()
    assert chosen == {"float32": 7}
    tgs.allow_tf32(False)
    assert chosen == {"float32": 1}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access", "works no more for this process"),
        ("cudaErrorIllegalInstruction: an illegal instruction", "works no more for this process"),
        ("cudaErrorInvalidValue: invalid argument", r"scan: CUDA refused \(cudaErrorInvalid"),
    ],
)
def test_what_cuda_reports_is_told_in_a_sentence(text, words):
    error = devices.explained(fake_cupy.CUDARuntimeError(700, text), "scan")
    with pytest.raises(tgs.DeviceError, match=words):
        raise error


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_what_a_launch_reports_is_told_in_a_sentence(way, monkeypatch, rng):
    """What cuda.core raises is an Exception, and no RuntimeError as CuPy's are."""
    from tinygrad_seq.kernels import cpu

    cell = nn.RNNCell(2, 3, rng=rng)
    ys, _ = tgs.scan(cell, tgs.zeros(3, 2, 2))

    class CUDAError(Exception):
        pass

    def refuse(*_):
        raise CUDAError("CUDA_ERROR_INVALID_VALUE: an argument is out of range")

    monkeypatch.setattr(cpu.Runner, way, refuse)
    run = {"forward": lambda: tgs.scan(cell, tgs.zeros(3, 2, 2)), "backward": tgs.sum(ys).backward}
    with pytest.raises(tgs.DeviceError, match=r"scan: CUDA refused \(CUDA_ERROR_INVALID_VALUE"):
        run[way]()


def test_what_went_wrong_before_is_told_where_it_comes_to_light(monkeypatch):
    """A kernel that fails is noticed by whoever waits for it first, as copies to the host do."""

    def get(self):
        raise fake_cupy.CUDARuntimeError(700, "cudaErrorIllegalAddress: an illegal memory access")

    with fake_cupy.installed():
        x = tgs.ones(2, device="cuda")
        monkeypatch.setattr(fake_cupy.ndarray, "get", get)
        for use in (x.numpy, x.tolist, lambda: x.to("cpu"), lambda: bool(x[0] > 0)):
            with pytest.raises(tgs.DeviceError, match="a kernel did not end as it should"):
                use()


def test_find_nan(place):
    x = tgs.tensor([1.0, -1.0], requires_grad=True, device="cuda")
    found = tgs.find_nan(lambda: tgs.sqrt(x).sum())
    assert found.of == "value"
    assert "1 of 2 are NaN, the first at (1,)" in str(found)
    assert "from -1 to 1" in str(found)
    zero = tgs.zeros(2, requires_grad=True, device="cuda")
    assert tgs.find_nan(lambda: (tgs.sqrt(zero * zero) * 0).sum()).of == "gradient"
    assert tgs.find_nan(lambda: (x * x).sum()) is None


# What cannot be --------------------------------------------------------------------------------


def test_devices_that_are_none(place):
    t = tgs.ones(2)
    with pytest.raises(tgs.DeviceError, match=r"'cuda:1' was given, but one GPU.*VISIBLE_DEVICES"):
        t.to("cuda:1")
    with pytest.raises(tgs.DeviceError, match="'cuda:7'"):
        tgs.zeros(2, device="cuda:7")
    with pytest.raises(ValueError, match="device: 'gpu' was given, expected 'cpu' or 'cuda'"):
        t.to("gpu")
    with pytest.raises(ValueError, match="device: 'tpu' was given"):
        tgs.ones(2, device="tpu")
    assert tgs.zeros(2, device="cuda:0").device == "cuda"


def fake_machine(monkeypatch, **what):
    for name, value in what.items():
        monkeypatch.setattr(fake_cupy.cuda.runtime, name, value)
    monkeypatch.setattr(devices, "_started", None)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ({"devices": 0, "status": 35, "driver": 0}, "no NVIDIA driver on this machine"),
        ({"devices": 0, "status": 35, "driver": 12040}, r"one for CUDA 12\.4, too old for.*13\.2"),
        ({"devices": 0, "status": 100}, "finds no GPU; look at nvidia-smi"),
        ({"devices": 0, "status": 0}, "finds no GPU"),
        ({"devices": 0, "status": 999}, "CUDA does not start .*status 999"),
    ],
)
def test_a_machine_without(monkeypatch, what, words):
    with fake_cupy.installed():
        fake_machine(monkeypatch, **what)
        with pytest.raises(tgs.DeviceError, match=f"^cuda: .*{words}"):
            tgs.ones(2).to("cuda")
        assert devices.missing()
        with pytest.raises(tgs.DeviceError):
            small().to("cuda")


def test_memory_that_is_used_up(monkeypatch):
    with fake_cupy.installed():
        x = tgs.ones(8, 8, requires_grad=True, device="cuda")
        y = x * 2
        wide = tgs.broadcast_to(x.reshape(8, 1, 8), (8, 8, 8))
        loss = (wide * 2).sum()
        monkeypatch.setattr(fake_cupy.memory, "limit", 8 * 8 * 4)
        with pytest.raises(tgs.DeviceError, match=r"^multiply: no memory is left.*smaller batches"):
            wide * 2
        with pytest.raises(tgs.DeviceError, match=r"^backward: no memory is left"):
            loss.backward()
        with pytest.raises(tgs.DeviceError, match=r"^to: no memory is left"):
            tgs.ones(9, 8).to("cuda")
        y.backward(y.detach())
        optimizer = optim.Adam([x])
        monkeypatch.setattr(fake_cupy.memory, "limit", 0)
        with pytest.raises(tgs.DeviceError, match=r"^Adam\.step: no memory is left"):
            optimizer.step()


def test_what_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)  # importing it raises ImportError
    monkeypatch.setattr(np, "__version__", "2.4.6")
    with pytest.raises(tgs.DeviceError, match=r'pip install "tinygrad-seq\[cuda\]"'):
        tgs.ones(2).to("cuda")
    monkeypatch.setattr(np, "__version__", "2.5.0")
    with pytest.raises(tgs.DeviceError, match=r'NumPy 2\.5\.0 .*pip install "numpy<2\.5"'):
        tgs.ones(2).to("cuda")


def test_a_library_that_is_not_there(monkeypatch):
    def matmul(a, b):
        raise ImportError('Failure finding "libcublas.so.13"')

    with fake_cupy.installed():
        monkeypatch.setitem(fake_cupy._functions, "matmul", matmul)
        x = tgs.ones(2, 2, device="cuda")
        with pytest.raises(
            tgs.DeviceError, match=r"^matmul: CuPy does not find .*libcublas.*cuda\]"
        ):
            x @ x


def test_a_forked_process(tmp_path):
    """In a process of its own: the child of one that used the device is told to be spawned."""
    if not hasattr(__import__("os"), "fork"):
        pytest.skip("no fork here")
    code = (
        "import os, fake_cupy, tinygrad_seq as tgs\n"
        "with fake_cupy.installed():\n"
        "    if not os.fork(): os._exit(0 if tgs.ones(1).to('cuda').device == 'cuda' else 1)\n"
        "    assert os.wait()[1] == 0\n"  # nothing had been used yet
        "    t = tgs.ones(1).to('cuda')\n"
        "    if not os.fork():\n"
        "        uses = [lambda: tgs.ones(1).to('cuda'), t.numpy, t.item, lambda: t.to('cpu')]\n"
        "        for use in uses:\n"
        "            try: use()\n"
        "            except tgs.DeviceError as error: print(error, flush=True)\n"
        "        os._exit(0)\n"
        "    os.wait(); tgs.ones(1).to('cuda')\n"
    )
    here = Path(__file__).parent
    made = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=here,
        capture_output=True,
        text=True,
        check=True,
    )
    assert 'multiprocessing.get_context("spawn")' in made.stdout
    assert made.stdout.count("forked") == 4


def test_arrays_of_other_libraries_are_what_they_were():
    class Torchs:  # has the interface of a GPU's arrays wherever it is
        __cuda_array_interface__ = property(lambda self: {})

        def __array__(self, dtype=None, copy=None):
            return np.ones(2, "float32")

    assert devices.device_of(Torchs()) == "cpu"
    assert tgs.tensor(Torchs()).tolist() == [1, 1]
    ys, _ = tgs.unroll(nn.GRUCell(1, 1), tgs.ones(1, 2, 1), lengths=np.ones(2, int))
    assert F.mse_loss(ys[0, :, 0], ys[0, :, 0], mask=tgs.tensor(Torchs()) > 0).item() == 0


def test_importing_does_not_import_cupy():
    code = (
        "import sys, tinygrad_seq as tgs; tgs.ones(2).to('cpu'); "
        "print([m for m in sys.modules if 'cupy' in m])"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert made.stdout.strip() == "[]"


def test_one_place_imports_cupy():
    package = Path(tgs.__file__).parent
    for path in package.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "import cupy" not in text, path
        assert path.name == "devices.py" or not re.search(r'"cupy"|cupyx', text), path


# The stand-in ----------------------------------------------------------------------------------


def test_the_stand_in_has_nothing_that_cupy_has_not():
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed", exc_type=ImportError)
    for name in fake_cupy.UFUNCS:
        assert type(getattr(cupy, name)).__name__ == "ufunc", name
    for name, parameters in {**fake_cupy.FUNCTIONS, **fake_cupy.OTHER_FUNCTIONS}.items():
        found = getattr(cupy, name)
        if parameters:
            assert set(parameters.split()) <= set(fake_cupy.parameters_of(found)), name
    for name, parameters in fake_cupy.METHODS.items():
        found = fake_cupy.parameters_of(getattr(cupy.ndarray, name))
        assert set(parameters.split()) <= set(found), name
    for name in [*fake_cupy.OTHER_METHODS, *fake_cupy.OTHER_ATTRIBUTES]:
        assert hasattr(cupy.ndarray, name), name
    special = [n for n in vars(fake_cupy.ndarray) if n.startswith("__")]
    own = {"__weakref__", "__slots__", "__dict__", "__annotations__", "__repr__"}
    own |= {"__firstlineno__", "__static_attributes__"}
    for name in set(special) - own:
        assert hasattr(cupy.ndarray, name), name
    assert cupy.ndarray.__module__ == "cupy"
    assert cupy.ndarray.__array_priority__ == fake_cupy.ndarray.__array_priority__
    for error in (cupy.cuda.memory.OutOfMemoryError, cupy.cuda.runtime.CUDARuntimeError):
        assert issubclass(getattr(fake_cupy, error.__name__), error.__mro__[1])


# Some of CuPy's own work can be tried without a GPU: an array over host memory, up to the point
# where something is to be run. What CuPy does not have raises another error before.


def over_host_memory(array):
    cupy = sys.modules["cupy"]
    array = np.array(array)
    memory = cupy.cuda.memory.UnownedMemory(array.ctypes.data, max(array.nbytes, 1), array, 0)
    pointer = cupy.cuda.memory.MemoryPointer(memory, 0)
    return wrap(cupy.ndarray(array.shape, array.dtype, memptr=pointer), None)


def assert_no_mixing(said: str) -> None:
    assert "bring them" not in said


@pytest.fixture
def reaches_the_driver():
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed", exc_type=ImportError)
    if not NO_GPU:
        pytest.skip("there is a GPU, on which everything runs anyhow")
    stops = (cupy.cuda.runtime.CUDARuntimeError, ImportError)  # no cuBLAS, perhaps

    def check(function, *arguments):
        try:
            made = function(*arguments)
        except stops:
            return
        except tgs.DeviceError as error:  # something was to be moved there, or cuBLAS is missing
            made = []
            assert_no_mixing(str(error))
        for leaf in leaves(made):  # a view, which needs no driver
            assert devices.device_of(getattr(leaf, "_data", leaf)) == "cuda"

    return check


@pytest.mark.parametrize("name", RULES)
def test_cupy_takes_every_rule(reaches_the_driver, name, rng):
    rule = RULES[name]
    arrays = inputs_for(name, ((2, 3),) * len(rule.inputs), "float32", rng)
    xs = [over_host_memory(a) for a in arrays]
    if name == "scalar_power":
        xs[1] = 3.0
    else:
        reaches_the_driver(getattr(tgs, name), *xs)
    values = [x if isinstance(x, float) else x._data for x in xs]
    reaches_the_driver(rule.forward, *values)
    g = over_host_memory(np.ones((2, 3), "f4"))._data
    for vjp in rule.vjps:
        reaches_the_driver(vjp, g, *(values + [g] if len(rule.arguments) > 1 else []))


@pytest.mark.parametrize("name", CASES)
def test_cupy_takes_every_structure(reaches_the_driver, name, rng):
    function, _, shapes = CASES[name]
    xs = [over_host_memory(rng.standard_normal(shape)) for shape in shapes]
    reaches_the_driver(INDEXED.get(name, function), *xs)


@pytest.mark.parametrize("name", OTHERS)
def test_cupy_takes_the_others(reaches_the_driver, name, rng):
    reaches_the_driver(OTHERS[name], over_host_memory(rng.standard_normal((3, 4))))


def test_cupys_arrays_are_known(reaches_the_driver):
    x = over_host_memory(np.ones((2, 3), "f4"))
    assert x.device == "cuda"
    assert devices.namespace(x._data) is sys.modules["cupy"]
    assert x.dtype is np.dtype("float32")
    assert x[1].data.data.ptr == x.data.data.ptr + 12
    assert tgs.broadcast_to(x, (4, 2, 3)).T.shape == (3, 2, 4)
    for mix in (lambda: x + tgs.ones(2, 3), lambda: np.ones(3) * x, lambda: tgs.ones(2, 2) @ x):
        with pytest.raises(tgs.DeviceError, match="bring them to one device"):
            mix()
    with pytest.raises(tgs.DeviceError, match=r"t\.numpy\(\)"):
        np.asarray(x)


def test_the_stand_in_is_strict():
    with fake_cupy.installed() as cupy:
        x = cupy.asarray(np.arange(6.0).reshape(2, 3))
        for forbidden in (
            lambda: np.asarray(x),
            lambda: x + np.ones(3),
            lambda: np.ones(3) + x,
            lambda: cupy.add(x, np.ones(3)),
            lambda: np.where(np.ones(3) > 0, x, x),
            lambda: np.concatenate([x, np.ones((1, 3))]),
            lambda: np.sort(x),
            lambda: np.sum(x, where=x > 0),
            lambda: x.sum(axis=0, where=x > 0),
            lambda: x[np.array([0])],
            lambda: x.__setitem__(0, np.ones(3)),
            lambda: x.__iadd__(np.ones(3)),
        ):
            with pytest.raises(TypeError):
                forbidden()
        with pytest.raises(AttributeError):
            x.flags.writeable = False
        with pytest.raises(AttributeError):
            x.diagonal()
        assert type(x.sum()) is type(x[0, 0]) is cupy.ndarray
        x[0, 0] += 5  # a view, not a number
        assert fake_cupy.transfers == {"to_device": 1}
        assert x[0, 0].item() == 5
        assert x[cupy.asarray([3, -1])]._host.tolist() == x._host[[1, 1]].tolist()  # round the end
        assert x.data.ptr == x._host.ctypes.data == x.__cuda_array_interface__["data"][0]
        assert x[1].data.ptr == x.data.ptr + 24
        assert devices.namespace(x) is cupy
        assert devices.namespace(x._host) is devices.namespace(1.0) is np
        assert (fake_cupy.transfers["to_host"], x.device.id) == (1, 0)
