"""Convolution, pooling and batch normalisation: against plain loops, and against PyTorch."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinygrad_seq as tgs
from tinygrad_seq import nn

# Oracles: one row, one output at a time ------------------------------------------------------


def around(layer, length):
    """How many places of padding stand before and after a row."""
    padding = layer.padding
    if padding == "valid":
        return 0, 0
    if padding == "causal":
        return layer.dilation * (layer.kernel_size - 1), 0
    if padding == "same":
        total = layer.dilation * (layer.kernel_size - 1)
        return total // 2, total - total // 2
    return padding, padding


def windows(layer, row):
    """What each window holds of one channel, a list for each; None stands for padding."""
    before, after = around(layer, len(row))
    padded = [None] * before + list(row) + [None] * after
    found = []
    start = 0
    while len(row):
        places = [start + k * layer.dilation for k in range(layer.kernel_size)]
        if places[-1] >= len(padded):
            break
        found.append([padded[place] for place in places])
        start += layer.stride
    return found


def naive_conv(layer, x):
    W, b = np.asarray(layer.weight), np.asarray(layer.bias)
    y = np.zeros((len(x), len(W), len(windows(layer, x[0, 0]))))
    for row, o, n in np.ndindex(*y.shape):
        y[row, o, n] = b[o]
        for c in range(W.shape[1]):
            for k, value in enumerate(windows(layer, x[row, c])[n]):
                y[row, o, n] += 0 if value is None else W[o, c, k] * value
    return y


def naive_max(layer, x):
    return [
        [[max(v for v in w if v is not None) for w in windows(layer, channel)] for channel in row]
        for row in x
    ]


def naive_average(layer, x):
    return [
        [[sum(v or 0 for v in w) / len(w) for w in windows(layer, channel)] for channel in row]
        for row in x
    ]


def naive_batch_norm(layer, x, lengths=None):
    """(y, means, unbiased variances) of x (B, C, L), row by row; 0 beyond the lengths."""
    B, C, L = x.shape
    lengths = [L] * B if lengths is None else lengths
    y, means, variances = np.zeros(x.shape), [], []
    for c in range(C):
        values = [x[b, c, t] for b in range(B) for t in range(lengths[b])]
        mu = sum(values) / len(values)
        squares = sum((v - mu) ** 2 for v in values)
        gamma, beta = float(layer.weight[c]), float(layer.bias[c])
        for b in range(B):
            for t in range(lengths[b]):
                sigma = math.sqrt(squares / len(values) + layer.eps)
                y[b, c, t] = gamma * (x[b, c, t] - mu) / sigma + beta
        means.append(mu)
        variances.append(squares / (len(values) - 1))
    return y, means, variances


# Windows -------------------------------------------------------------------------------------


@st.composite
def convolutions(draw):
    """A convolution in float64 and how long a row it is given."""
    kind = draw(st.sampled_from([0, 1, 3, "valid", "same", "causal"]))
    layer = nn.Conv1d(
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 4)),
        1 if kind == "same" else draw(st.integers(1, 3)),
        kind,
        draw(st.integers(1, 3)),
        dtype="float64",
        rng=draw(st.integers(0, 99)),
    )
    layer.bias.data = np.linspace(-1, 1, layer.bias.size)
    return layer, draw(st.integers(1, 9))


@st.composite
def pools(draw):
    size = draw(st.integers(1, 4))
    kind = draw(st.sampled_from([nn.MaxPool1d, nn.AvgPool1d]))
    stride, padding = draw(st.sampled_from([None, 1, 2, 5])), draw(st.integers(0, size // 2))
    return kind(size, stride, padding), draw(st.integers(1, 9))


def fits_or_raises(layer, W):
    """Whether a window fits into a row; the layer says so where none does."""
    if windows(layer, [0.0] * W):
        return True
    channels = getattr(layer, "weight", np.zeros((1, 1))).shape[1]
    with pytest.raises(tgs.ShapeError, match=f"rows of length {W} were given, to which padding"):
        layer(np.zeros((2, channels, W)))
    with pytest.raises(tgs.ShapeError, match="pad more"):
        layer.output_length(W)
    return False


@given(convolutions(), st.integers(1, 3))
def test_convolution(drawn, B):
    layer, W = drawn
    if fits_or_raises(layer, W):
        x = np.random.default_rng(W).standard_normal((B, layer.weight.shape[1], W))
        y = layer(x)
        assert y.dtype == np.float64
        assert y.shape[2] == layer.output_length(W)
        np.testing.assert_allclose(y, naive_conv(layer, x), rtol=1e-12, atol=1e-12)


@given(pools(), st.integers(1, 3), st.integers(1, 2))
def test_pools(drawn, B, C):
    layer, W = drawn
    naive = naive_max if isinstance(layer, nn.MaxPool1d) else naive_average
    if fits_or_raises(layer, W):
        x = np.random.default_rng(W).standard_normal((B, C, W))
        np.testing.assert_allclose(layer(x), naive(layer, x), rtol=1e-12, atol=1e-15)


@given(st.one_of(convolutions(), pools()))
def test_output_lengths(drawn):
    layer, _ = drawn
    lengths = np.arange(12)
    expected = [len(windows(layer, [0.0] * n)) for n in lengths]
    for kind in ("i8", "u1", "i1"):
        assert layer.output_lengths(lengths.astype(kind)).tolist() == expected
    for n, N in zip(lengths, expected, strict=True):
        if N:
            assert layer.output_length(n) == N
        if layer.padding in ("same", "causal") and layer.stride == 1:
            assert n == N


@given(st.one_of(convolutions(), pools()), st.integers(0, 99))
def test_rows_of_different_lengths_are_as_if_alone(drawn, seed):
    layer, W = drawn
    rng = np.random.default_rng(seed)
    if not fits_or_raises(layer, W):
        return
    lengths = rng.integers(0, W + 1, 3)
    channels = layer.weight.shape[1] if isinstance(layer, nn.Conv1d) else 2
    values = rng.standard_normal((3, channels, W))
    outside = np.broadcast_to(np.arange(W) >= lengths[:, None, None], values.shape)
    x = tgs.tensor(np.where(outside, np.nan, values), requires_grad=True)
    y = layer(x, lengths=lengths)
    weights = rng.standard_normal(y.shape)
    y.backward(weights)
    assert (x.grad.numpy()[outside] == 0).all()
    gradients = [p.grad.numpy() for p in layer.parameters()]
    layer.zero_grad()
    for b, (n, N) in enumerate(zip(lengths, layer.output_lengths(lengths), strict=True)):
        assert (y.numpy()[b, :, N:] == 0).all()
        if N:
            row = tgs.tensor(values[b : b + 1, :, :n], requires_grad=True)
            alone = layer(row)
            alone.backward(weights[b : b + 1, :, :N])
            np.testing.assert_allclose(y[b : b + 1, :, :N], alone, rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(x.grad[b : b + 1, :, :n], row.grad, rtol=1e-12, atol=1e-12)
    for p, g in zip(layer.parameters(), gradients, strict=True):  # the sum over the rows
        expected = np.zeros(p.shape) if p.grad is None else p.grad
        np.testing.assert_allclose(g, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dilation", [1, 2])
def test_a_causal_convolution_does_not_look_ahead(dilation):
    layer = nn.Conv1d(1, 1, 3, padding="causal", dilation=dilation, rng=0)
    layer.weight.data = np.ones((1, 1, 3), "f4")
    for t in range(6):
        x = tgs.zeros(1, 1, 6, requires_grad=True)
        layer(x)[0, 0, t].backward()
        seen = [k for k in range(6) if x.grad[0, 0, k].item()]
        assert seen == [k for k in (t - 2 * dilation, t - dilation, t) if k >= 0]


def called_with(layer, *names):
    """The layer as a function of x and of its parameters of these names."""

    def function(x, *values):
        made = copy.copy(layer)
        vars(made).update(zip(names, values, strict=True))
        return made(x)

    return function


@pytest.mark.parametrize("padding", [0, 2, "same", "causal"])
def test_convolution_derivatives(padding, rng):
    stride = 1 if padding == "same" else 2
    layer = nn.Conv1d(2, 3, 3, stride, padding, dilation=2, dtype="float64", rng=rng)
    x, bias = rng.standard_normal((2, 2, 7)), rng.standard_normal(3)
    f = called_with(layer, "weight", "bias")
    assert tgs.gradcheck(f, (x, layer.weight.detach(), bias), order=2)
    lengths = np.array([3, 7])
    assert tgs.gradcheck(lambda x: layer(x, lengths) ** 3, x, order=2)


def test_pool_derivatives(rng):
    x, lengths = rng.standard_normal((3, 2, 7)), np.array([0, 4, 7])
    for layer in (nn.MaxPool1d(3, 2, 1), nn.AvgPool1d(3, 2, 1)):
        assert tgs.gradcheck(lambda x, layer=layer: layer(x) ** 3, x, order=2)
        assert tgs.gradcheck(lambda x, layer=layer: layer(x, lengths) ** 3, x, order=2)
    for kind in ("max", "mean"):
        layer = nn.GlobalPool1d(kind)
        assert tgs.gradcheck(lambda x, layer=layer: layer(x, lengths) ** 3, x, order=2)


def test_equal_largest_values_share_the_gradient():
    x = tgs.tensor([[[1.0, 2.0, 2.0, 0.0]]], requires_grad=True)
    nn.MaxPool1d(4)(x).sum().backward()
    assert x.grad.tolist() == [[[0, 0.5, 0.5, 0]]]


@given(st.integers(1, 3), st.integers(1, 2), st.integers(0, 4), st.integers(0, 99))
def test_global_pools(B, C, W, seed):
    rng = np.random.default_rng(seed)
    values, lengths = rng.standard_normal((B, C, W)), rng.integers(0, W + 1, B)
    outside = np.broadcast_to(np.arange(W) >= lengths[:, None, None], values.shape)
    for kind, pooled in (("max", np.max), ("mean", np.mean)):
        layer = nn.GlobalPool1d(kind)
        x = tgs.tensor(np.where(outside, np.nan, values), requires_grad=True)
        y = layer(x, lengths=lengths)
        expected = [
            pooled(values[b, :, :n], axis=1) if n else np.zeros(C) for b, n in enumerate(lengths)
        ]
        np.testing.assert_allclose(y, expected, rtol=1e-12)
        y.backward(np.ones((B, C)))
        assert (x.grad.numpy()[outside] == 0).all()
        assert x.grad.numpy().sum() == pytest.approx(C * (lengths > 0).sum())
        full = layer(values)
        np.testing.assert_allclose(full, pooled(values, axis=2) if W else np.zeros((B, C)))
    assert layer.output_lengths(lengths) is None


# Batch normalisation -------------------------------------------------------------------------


def batch_norm(C, rng, **options):
    layer = nn.BatchNorm1d(C, dtype="float64", **options)
    layer.weight.data = rng.standard_normal(C)
    layer.bias.data = rng.standard_normal(C)
    return layer


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(0, 99))
def test_batch_norm(B, C, L, seed):
    rng = np.random.default_rng(seed)
    layer, x = batch_norm(C, rng), rng.standard_normal((B, C, L)) * 3 + 1
    if B * L == 1:
        with pytest.raises(tgs.ShapeError, match="has 1 value for each channel, expected at least"):
            layer(x)
        assert layer.num_batches_tracked.item() == 0
        return
    y, means, variances = naive_batch_norm(layer, x)
    np.testing.assert_allclose(layer(x), y, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(layer.running_mean, 0.1 * np.array(means))
    np.testing.assert_allclose(layer.running_var, 0.9 + 0.1 * np.array(variances))
    assert layer.num_batches_tracked.item() == 1
    if L == 1:
        np.testing.assert_allclose(layer(x[:, :, 0]), y[:, :, 0], rtol=1e-10, atol=1e-10)


@given(st.integers(1, 3), st.integers(0, 99))
def test_batch_norm_leaves_padding_out(B, seed):
    rng = np.random.default_rng(seed)
    layer, values = batch_norm(2, rng), rng.standard_normal((B, 2, 4))
    lengths = rng.integers(0, 5, B)
    lengths[0] = 3
    outside = np.broadcast_to(np.arange(4) >= lengths[:, None, None], values.shape)
    x = tgs.tensor(np.where(outside, np.nan, values), requires_grad=True)
    y = layer(x, lengths=lengths)
    expected, means, variances = naive_batch_norm(layer, values, lengths)
    np.testing.assert_allclose(y, expected, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(layer.running_mean, 0.1 * np.array(means))
    np.testing.assert_allclose(layer.running_var, 0.9 + 0.1 * np.array(variances))
    y.backward(rng.standard_normal(y.shape))
    assert (x.grad.numpy()[outside] == 0).all()
    assert np.isfinite(x.grad.numpy()).all()
    used = layer.eval()(x, lengths=lengths).numpy()
    assert (used[outside] == 0).all()
    np.testing.assert_allclose(used[~outside], layer(values).numpy()[~outside])


def test_batch_norm_in_use_has_the_running_values(rng):
    layer = batch_norm(2, rng, momentum=0.25)
    mean, var = np.zeros(2), np.ones(2)
    for _ in range(3):
        x = rng.standard_normal((4, 2, 3))
        layer(x)
        mean = 0.75 * mean + 0.25 * x.mean((0, 2))
        var = 0.75 * var + 0.25 * x.var((0, 2), ddof=1)
    layer.eval()
    x = rng.standard_normal((1, 2))  # one value for each channel is enough here
    normed = (x - mean) / np.sqrt(var + 1e-5)
    expected = np.asarray(layer.weight) * normed + np.asarray(layer.bias)
    np.testing.assert_allclose(layer(x), expected)
    assert layer.num_batches_tracked.item() == 3
    np.testing.assert_allclose(layer.running_var, var)


def test_batch_norm_momentum_none_averages_all_batches(rng):
    layer = nn.BatchNorm1d(2, momentum=None, affine=False, dtype="float64")
    assert list(layer.parameters()) == []
    batches = rng.standard_normal((5, 4, 2))
    for x in batches:
        layer(x)
    np.testing.assert_allclose(layer.running_mean, batches.mean((0, 1)))
    np.testing.assert_allclose(layer.running_var, batches.var(1, ddof=1).mean(0))


def test_batch_norm_derivatives(rng):
    layer = batch_norm(2, rng)
    given = rng.standard_normal((3, 2, 4)), rng.standard_normal(2), rng.standard_normal(2)
    f = called_with(layer, "weight", "bias")
    assert tgs.gradcheck(f, given, order=2)
    assert tgs.gradcheck(f, (given[0][:, :, 0], *given[1:]), order=2)
    assert tgs.gradcheck(lambda x: layer(x, np.array([0, 4, 2])), given[0], order=2)
    layer.eval()
    assert tgs.gradcheck(f, given, order=2)


def test_batch_norm_stays_off_the_tape(rng):
    """Running values have no gradient, and a backward may follow another batch's forward."""
    layer = batch_norm(2, rng)
    first = layer(rng.standard_normal((4, 2)))
    layer(rng.standard_normal((4, 2)))
    first.sum().backward()
    assert not layer.running_mean.requires_grad
    assert {name for name, _ in layer.named_parameters()} == {"weight", "bias"}


def test_batch_norm_works_in_a_compiled_cell(rng):
    norm = batch_norm(3, rng).eval()
    norm.running_mean.data = rng.standard_normal(3)

    def cell(x, h):
        h = tgs.tanh(norm(x + h))
        return h, h

    xs, h = rng.standard_normal((4, 2, 3)), np.zeros((2, 3))
    np.testing.assert_allclose(tgs.scan(cell, xs, h)[0], tgs.unroll(cell, xs, h)[0], rtol=1e-12)
    norm.train()
    with pytest.raises(tgs.TraceError, match="it would mix rows"):
        tgs.scan(cell, xs, h)
    assert norm.num_batches_tracked.item() == 0


# All of them ---------------------------------------------------------------------------------


def test_half_precision():
    x = np.full((2, 1, 4), 60_000, np.float16)
    assert nn.AvgPool1d(4)(x).tolist() == [[[60_000]], [[60_000]]]
    assert nn.GlobalPool1d("mean")(x, lengths=[4, 3]).tolist() == [[60_000], [60_000]]
    for layer in (nn.MaxPool1d(2, padding=1), nn.GlobalPool1d()):
        assert layer(x).dtype == np.float16
    norm = nn.BatchNorm1d(2, dtype="float16")
    y = norm(np.array([[0, 0], [60_000, 1000]], np.float16))
    assert y.dtype == np.float16
    np.testing.assert_allclose(y, [[-1, -1], [1, 1]], rtol=1e-3)
    np.testing.assert_allclose(norm.running_mean, [3000, 50], rtol=1e-6)
    assert np.isfinite(norm.running_var.numpy()).all()
    conv = nn.Conv1d(1, 1, 2, rng=0).to("float16")
    assert conv(np.ones((1, 1, 3), np.float16)).dtype == np.float16


def test_integers_are_taken_as_floats():
    x = np.arange(4).reshape(1, 1, 4)
    assert nn.MaxPool1d(2, padding=1)(x).tolist() == [[[0, 2, 3]]]
    assert nn.AvgPool1d(2)(x).tolist() == [[[0.5, 2.5]]]
    assert nn.GlobalPool1d("mean")(x).tolist() == [[1.5]]
    conv = nn.Conv1d(1, 1, 2, bias=False, rng=0)
    conv.weight.data = np.ones((1, 1, 2), "f4")
    assert conv(x).tolist() == [[[1, 3, 5]]]
    assert nn.BatchNorm1d(1)(x).dtype == np.float32


def test_an_empty_batch():
    assert nn.Conv1d(2, 3, 2)(np.zeros((0, 2, 5)), lengths=[]).shape == (0, 3, 4)
    assert nn.MaxPool1d(2)(np.zeros((0, 2, 5))).shape == (0, 2, 2)
    assert nn.GlobalPool1d()(np.zeros((0, 2, 5)), lengths=[]).shape == (0, 2)
    with pytest.raises(tgs.ShapeError, match="has 0 values for each channel"):
        nn.BatchNorm1d(2)(np.zeros((0, 2, 5)))


def network(rng=0):
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, stride=2, padding=1, rng=rng),
        nn.BatchNorm1d(4),
        tgs.relu,
        nn.Sequential(nn.MaxPool1d(2), nn.Conv1d(4, 3, 2, padding="causal", rng=rng)),
        nn.GlobalPool1d("mean"),
        nn.Linear(3, 2, rng=rng),
    )


def test_a_network_over_rows_of_different_lengths(rng):
    model, lengths = network(), np.array([9, 4, 6])
    x = rng.standard_normal((3, 2, 9)).astype("f4")
    for _ in range(3):
        y = model(x, lengths=lengths)
    y.sum().backward()
    assert all(np.isfinite(p.grad.numpy()).all() for p in model.parameters())
    model.eval()
    together = model(x, lengths=lengths)
    for b, n in enumerate(lengths):
        np.testing.assert_allclose(together[b : b + 1], model(x[b : b + 1, :, :n]), rtol=1e-4)
    assert model[3].output_lengths(lengths).tolist() == [4, 2, 3]
    assert model.output_lengths(lengths) is None
    normed = nn.Sequential(nn.GlobalPool1d(), nn.BatchNorm1d(2))
    assert normed(x, lengths=lengths).shape == (3, 2)  # no lengths behind the pool


def test_state_dict_round_trip(rng):
    model, other = network(), network(1)
    x = rng.standard_normal((3, 2, 9)).astype("f4")
    model(x)
    names = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert list(model[1].state_dict()) == names
    other.load_state_dict(model.state_dict())
    np.testing.assert_array_equal(model.eval()(x), other.eval()(x))
    assert other[1].num_batches_tracked.item() == 1
    assert other.to("float64")[1].num_batches_tracked.dtype == np.int64
    assert other[1].running_var.dtype == np.float64


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(copied, rng):
    model = network()
    x = rng.standard_normal((3, 2, 9)).astype("f4")
    model(x)
    twin = copied(model)
    twin(x)
    assert model[1].num_batches_tracked.item() == 1
    assert twin[1].num_batches_tracked.item() == 2
    assert model.eval()(x).shape == (3, 2)
    twin.load_state_dict(model.state_dict())
    np.testing.assert_array_equal(model(x), twin.eval()(x))


def test_starting_values():
    layer = nn.Conv1d(30, 50, 4, rng=0)
    bound = math.sqrt(6 / (80 * 4))
    assert np.abs(layer.weight.numpy()).max() <= bound
    assert layer.weight.numpy().std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    np.testing.assert_array_equal(layer.weight, nn.Conv1d(30, 50, 4, rng=0).weight)
    assert not layer.bias.numpy().any()
    assert nn.Conv1d(1, 1, 1, bias=False).bias is None
    assert "padding='same'" in repr(nn.Conv1d(1, 1, 3, padding="same"))


BAD = {
    r"x has shape \(2, 3\), expected \(B, channels, length\); one row alone goes in as x\[None\]": (
        lambda: nn.Conv1d(3, 1, 1)(np.zeros((2, 3)))
    ),
    r"Conv1d: x has shape \(2, 5, 3\), expected \(B, 3, length\).*permute_dims\(x, \(0, 2, 1\)\)": (
        lambda: nn.Conv1d(3, 1, 1)(np.zeros((2, 5, 3)))
    ),
    r"3 channels \(in_channels\) in axis 1$": lambda: nn.Conv1d(3, 1, 1)(np.zeros((2, 5, 4))),
    "rows of length 4 were given, to which padding adds 0, expected at least the 5": (
        lambda: nn.Conv1d(1, 1, 3, dilation=2)(np.zeros((1, 1, 4)))
    ),
    "rows of length 0 were given": lambda: nn.MaxPool1d(2, padding=1)(np.zeros((1, 1, 0))),
    "Conv1d: kernel_size: 0 was given": lambda: nn.Conv1d(1, 1, 0),
    "Conv1d: stride: 1.5 was given": lambda: nn.Conv1d(1, 1, 1, 1.5),
    "Conv1d: dilation: 0 was given": lambda: nn.Conv1d(1, 1, 1, dilation=0),
    "Conv1d: padding: -1 was given": lambda: nn.Conv1d(1, 1, 1, padding=-1),
    "Conv1d: in_channels: 0 was given": lambda: nn.Conv1d(0, 1, 1),
    "padding 'same' was given with stride 2, expected stride 1": (
        lambda: nn.Conv1d(1, 1, 3, stride=2, padding="same")
    ),
    "padding 'full' was given, expected an integer from 0 on, 'valid', 'same' or 'causal'": (
        lambda: nn.Conv1d(1, 1, 3, padding="full")
    ),
    "MaxPool1d: padding = 2 was given with kernel_size = 3, expected at most half of that, 1": (
        lambda: nn.MaxPool1d(3, padding=2)
    ),
    r"AvgPool1d: x has shape \(4,\)": lambda: nn.AvgPool1d(1)(np.zeros(4)),
    r"GlobalPool1d: lengths has shape \(1,\), expected \(2,\)": (
        lambda: nn.GlobalPool1d()(np.zeros((2, 1, 3)), lengths=[3])
    ),
    "GlobalPool1d: lengths has dtype float64, expected integers": (
        lambda: nn.GlobalPool1d()(np.zeros((2, 1, 3)), lengths=[1.0, 2.0])
    ),
    r"lengths from 1 to 4 were given, expected 0 to 3.*give layer\.output_lengths\(lengths\)": (
        lambda: nn.GlobalPool1d()(np.zeros((2, 1, 3)), lengths=[1, 4])
    ),
    "GlobalPool1d: 'sum' was given, expected 'max' or 'mean'": lambda: nn.GlobalPool1d("sum"),
    r"x has shape \(2, 3\), expected \(B, 4\) or \(B, 4, length\): 4 channels": (
        lambda: nn.BatchNorm1d(4)(np.zeros((2, 3)))
    ),
    r"lengths were given for x of shape \(2, 4\), expected none": (
        lambda: nn.BatchNorm1d(4)(np.zeros((2, 4)), lengths=[1, 1])
    ),
    r"x of shape \(1, 4\) has 1 value for each channel.*larger batches or call eval": (
        lambda: nn.BatchNorm1d(4)(np.zeros((1, 4)))
    ),
    "BatchNorm1d: eps: 'a' was given": lambda: nn.BatchNorm1d(4, eps="a"),
    "BatchNorm1d: momentum: 'a' was given": lambda: nn.BatchNorm1d(4, momentum="a"),
    "momentum = 2 was given, expected 0 to 1, or None": lambda: nn.BatchNorm1d(1, momentum=2),
    "expected a floating one": lambda: nn.BatchNorm1d(1, affine=False, dtype="int64"),
}


@pytest.mark.parametrize("words", BAD)
def test_errors(words):
    with pytest.raises(ValueError, match=words):
        BAD[words]()


# PyTorch -------------------------------------------------------------------------------------


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="PyTorch is not installed; a second opinion")


def agrees(torch, ours, theirs, x):
    """The outputs, the gradients of x and of the parameters, and the state after the call."""
    theirs.double()
    state = {name: t.detach().numpy() for name, t in theirs.state_dict().items()}
    if state:
        ours.to("float64").load_state_dict(state)
    a, b = tgs.tensor(x, requires_grad=True), torch.tensor(x, requires_grad=True)
    y, expected = ours(a), theirs(b)
    weights = np.random.default_rng(0).standard_normal(y.shape)
    y.backward(weights)
    expected.backward(torch.tensor(weights))
    tight = {"rtol": 1e-10, "atol": 1e-12}
    np.testing.assert_allclose(y, expected.detach().numpy(), **tight)
    np.testing.assert_allclose(a.grad, b.grad.numpy(), **tight)
    gradients = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        np.testing.assert_allclose(p.grad, gradients[name], **tight)
    for name, value in theirs.state_dict().items():
        np.testing.assert_allclose(ours.state_dict()[name], value.numpy(), **tight)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, about NumPy 2
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 3},
        {"dilation": 2, "padding": 1, "bias": False},
        {"padding": "same", "dilation": 3},
        {"padding": "valid", "stride": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_convolution_is_pytorchs(torch, options, size, rng):
    x = rng.standard_normal((2, 3, 8))
    ours, theirs = nn.Conv1d(3, 4, size, **options), torch.nn.Conv1d(3, 4, size, **options)
    agrees(torch, ours, theirs, x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["MaxPool1d", "AvgPool1d"])
@pytest.mark.parametrize("given", [(1,), (2,), (3, 1), (3, 2, 1), (4, 3, 2)], ids=str)
def test_pools_are_pytorchs(torch, name, given, rng):
    ours, theirs = getattr(nn, name)(*given), getattr(torch.nn, name)(*given)
    agrees(torch, ours, theirs, rng.standard_normal((2, 3, 8)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"momentum": None}, {"eps": 0.1}])
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (1, 3, 2)], ids=str)
def test_batch_norm_is_pytorchs(torch, options, shape, rng):
    ours, theirs = nn.BatchNorm1d(3, **options), torch.nn.BatchNorm1d(3, **options)
    for _ in range(2):
        agrees(torch, ours, theirs, rng.standard_normal(shape) * 2 + 1)
        ours.zero_grad()
        theirs.zero_grad()
    agrees(torch, ours.eval(), theirs.eval(), rng.standard_normal(shape))
