"""Products, reductions, shapes and indexing against NumPy, and their derivatives checked."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, basic_indices

import tinygrad_seq as tgs

A = (3, 4, 2)
# name: (function over tensors, the same over arrays, shapes of the inputs)
CASES = {
    "matmul 2-D": (lambda a, b: a @ b, np.matmul, [(3, 4), (4, 2)]),
    "matmul vector right": (tgs.matmul, np.matmul, [(3, 4), (4,)]),
    "matmul vector left": (tgs.matmul, np.matmul, [(3,), (3, 4)]),
    "matmul vectors": (tgs.matmul, np.matmul, [(3,), (3,)]),
    "matmul rows": (tgs.matmul, np.matmul, [(5, 3, 4), (4, 2)]),
    "matmul batch": (tgs.matmul, np.matmul, [(5, 1, 3, 4), (2, 4, 2)]),
    "matmul right batch": (tgs.matmul, np.matmul, [(3, 4), (5, 4, 2)]),
    "matmul batch vector": (tgs.matmul, np.matmul, [(5, 3, 4), (4,)]),
    "matmul empty": (tgs.matmul, np.matmul, [(3, 0), (0, 2)]),
    "linear": (tgs.linear, lambda x, w: x @ w.T, [(3, 4), (2, 4)]),
    "linear bias": (tgs.linear, lambda x, w, b: x @ w.T + b, [(3, 4), (2, 4), (2,)]),
    "linear rows": (tgs.linear, lambda x, w, b: x @ w.T + b, [(5, 3, 4), (2, 4), (2,)]),
    "linear vector": (tgs.linear, lambda x, w: x @ w.T, [(4,), (2, 4)]),
    "linear empty": (tgs.linear, lambda x, w: x @ w.T, [(3, 0), (2, 0)]),
    "linear no rows": (tgs.linear, lambda x, w: x @ w.T, [(0, 3, 4), (2, 4)]),
    "matmul no rows": (tgs.matmul, np.matmul, [(0, 3, 4), (4, 2)]),
    "sum": (lambda x: x.sum(), np.sum, [A]),
    "sum axis": (lambda x: x.sum(1), lambda x: x.sum(1), [A]),
    "sum axes": (
        lambda x: tgs.sum(x, (0, -1), keepdims=True),
        lambda x: x.sum((0, -1), keepdims=True),
        [A],
    ),
    "mean": (lambda x: x.mean(-1), lambda x: x.mean(-1), [A]),
    "var": (lambda x: tgs.var(x, (0, 2)), lambda x: x.var((0, 2)), [A]),
    "max": (lambda x: x.max(1), lambda x: x.max(1), [A]),
    "max all": (lambda x: tgs.max(x), np.max, [A]),
    "min": (lambda x: x.min((0, 1), True), lambda x: x.min((0, 1), keepdims=True), [A]),
    "logsumexp": (
        lambda x: tgs.logsumexp(x, axis=1),
        lambda x: np.log(np.exp(x).sum(1)),
        [A],
    ),
    "logsumexp all": (tgs.logsumexp, lambda x: np.log(np.exp(x).sum()), [A]),
    "softmax": (
        lambda x: tgs.softmax(x, axis=0),
        lambda x: np.exp(x) / np.exp(x).sum(0),
        [A],
    ),
    "log_softmax": (
        tgs.log_softmax,
        lambda x: np.log(np.exp(x) / np.exp(x).sum(-1, keepdims=True)),
        [A],
    ),
    "cumsum": (lambda x: tgs.cumsum(x, axis=1), lambda x: np.cumsum(x, 1), [A]),
    "cumsum flat": (tgs.cumsum, np.cumsum, [A]),
    "reshape": (lambda x: x.reshape(2, -1), lambda x: x.reshape(2, -1), [A]),
    "reshape function": (lambda x: tgs.reshape(x, (4, 6)), lambda x: x.reshape(4, 6), [A]),
    "transpose": (lambda x: x.transpose(2, 0, 1), lambda x: x.transpose(2, 0, 1), [A]),
    "permute_dims": (lambda x: tgs.permute_dims(x, (1, 2, 0)), lambda x: x.transpose(1, 2, 0), [A]),
    "T": (lambda x: x.T, lambda x: x.T, [A]),
    "expand_dims": (lambda x: tgs.expand_dims(x, (0, -1)), lambda x: x[None, ..., None], [A]),
    "squeeze": (lambda x: tgs.squeeze(x), np.squeeze, [(1, 3, 1)]),
    "squeeze axis": (lambda x: tgs.squeeze(x, 0), lambda x: x[0], [(1, 3, 1)]),
    "broadcast_to": (
        lambda x: tgs.broadcast_to(x, (5, 3, 4)),
        lambda x: np.broadcast_to(x, (5, 3, 4)),
        [(3, 1)],
    ),
    "concat": (
        lambda a, b, c: tgs.concat([a, b, c], axis=1),
        lambda a, b, c: np.concatenate([a, b, c], 1),
        [(2, 3), (2, 0), (2, 1)],
    ),
    "stack": (
        lambda a, b: tgs.stack([a, b], axis=-1),
        lambda a, b: np.stack([a, b], -1),
        [(2, 3), (2, 3)],
    ),
    "split": (
        lambda x: tgs.split(x, 2, axis=1)[1] * tgs.split(x, [1, 3], axis=1)[0],
        lambda x: np.split(x, 2, 1)[1] * np.split(x, [1, 3], 1)[0],
        [A],
    ),
    "flip": (lambda x: tgs.flip(x, (0, 2)), lambda x: np.flip(x, (0, 2)), [A]),
    "flip all": (tgs.flip, np.flip, [A]),
    "pad": (
        lambda x: tgs.pad(x, [(1, 0), (0, 2), (0, 0)], 7.0),
        lambda x: np.pad(x, [(1, 0), (0, 2), (0, 0)], constant_values=7.0),
        [A],
    ),
    "pad number": (lambda x: tgs.pad(x, 1), lambda x: np.pad(x, 1), [A]),
    "take": (
        lambda x: tgs.take(x, np.array([[2, 0], [2, 2]]), axis=0),
        lambda x: np.take(x, np.array([[2, 0], [2, 2]]), 0),
        [A],
    ),
    "take flat": (lambda x: tgs.take(x, [5, 5]), lambda x: np.take(x, [5, 5]), [A]),
    "take_along_axis": (
        lambda x: tgs.take_along_axis(x, np.array([[[3, 0]], [[1, 1]], [[0, 2]]]), axis=1),
        lambda x: np.take_along_axis(x, np.array([[[3, 0]], [[1, 1]], [[0, 2]]]), 1),
        [A],
    ),
    "integer index": (lambda x: x[[2, 0, 2], :, 1], lambda x: x[[2, 0, 2], :, 1], [A]),
    "negative step": (lambda x: x[::-2, None, ..., -1], lambda x: x[::-2, None, ..., -1], [A]),
    "tensor index": (
        lambda x: x[tgs.tensor([1, 1, 0])],
        lambda x: x[np.array([1, 1, 0])],
        [A],
    ),
    "boolean index": (
        lambda x: x[np.array([True, False, True])],
        lambda x: x[np.array([True, False, True])],
        [A],
    ),
    "astype": (lambda x: tgs.astype(x, "float64"), lambda x: x.astype("float64"), [A]),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_value(name, dtype, rng):
    function, oracle, shapes = CASES[name]
    arrays = [np.asarray(rng.standard_normal(shape), dtype) for shape in shapes]
    y = function(*(tgs.tensor(a, requires_grad=True) for a in arrays))
    expected = oracle(*(a.astype("float64") for a in arrays))
    tolerance = 1e-5 if dtype == "float32" else 1e-13
    assert y.shape == np.shape(expected)
    assert y.dtype == ("float64" if name == "astype" else dtype)
    assert y.requires_grad
    np.testing.assert_allclose(y.numpy(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_derivatives(name, order, rng):
    function, _, shapes = CASES[name]
    inputs = tuple(rng.standard_normal(shape) for shape in shapes)
    assert tgs.gradcheck(lambda *xs: tgs.tanh(function(*xs)), inputs, order)


@pytest.mark.parametrize("name", CASES)
def test_float32_gradient_keeps_its_dtype(name, rng):
    function, _, shapes = CASES[name]
    xs = [tgs.tensor(rng.standard_normal(s).astype("f4"), requires_grad=True) for s in shapes]
    y = function(*xs)
    y.backward(rng.standard_normal(y.shape))
    for x in xs:
        assert x.grad.dtype == "float32"
        assert x.grad.shape == x.shape


@given(data=st.data())
def test_any_basic_index(data):
    shape = data.draw(array_shapes(min_side=0, max_dims=4))
    index = data.draw(basic_indices(shape, allow_newaxis=True))
    values = np.arange(np.prod(shape), dtype="f8").reshape(shape)
    x = tgs.tensor(values, requires_grad=True)
    y = x[index]
    np.testing.assert_array_equal(y.numpy(), values[index])
    y.backward(np.full(y.shape, 2.0))
    expected = np.zeros(shape)
    expected[index] += 2
    np.testing.assert_array_equal(x.grad.numpy(), expected)


@given(
    m=st.integers(0, 3), k=st.integers(0, 3), n=st.integers(0, 3), b=st.integers(0, 2),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_products_of_any_size(m, k, n, b, seed):
    rng = np.random.default_rng(seed)
    x = tgs.tensor(rng.standard_normal((b, m, k)), requires_grad=True)
    w = tgs.tensor(rng.standard_normal((k, n)), requires_grad=True)
    y = x @ w
    g = rng.standard_normal((b, m, n))
    y.backward(g)
    np.testing.assert_allclose(
        y.numpy(), np.einsum("bmk,kn->bmn", x.numpy(), w.numpy()), atol=1e-12
    )
    np.testing.assert_allclose(x.grad.numpy(), np.einsum("bmn,kn->bmk", g, w.numpy()), atol=1e-12)
    np.testing.assert_allclose(w.grad.numpy(), np.einsum("bmk,bmn->kn", x.numpy(), g), atol=1e-12)


def test_ties_of_max_share_equally():
    x = tgs.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]], requires_grad=True)
    x.max(axis=1).sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), [[0, 0.5, 0.5], [1 / 3] * 3], rtol=1e-6)


def test_logsumexp_does_not_overflow():
    x = tgs.tensor([[1000.0, 1000.0], [-1000.0, -1001.0]], requires_grad=True)
    y = tgs.logsumexp(x, axis=1)
    np.testing.assert_allclose(y.numpy(), [1000 + np.log(2), -1000 + np.log1p(np.exp(-1))])
    y.sum().backward()
    np.testing.assert_allclose(x.grad.numpy().sum(axis=1), 1, rtol=1e-6)
    hidden = tgs.logsumexp(tgs.tensor([-np.inf, 0.0]))
    assert hidden.item() == 0


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_log_softmax_of_large_numbers(dtype):
    """Its error is that of the differences, which are exact here, however large the numbers."""
    large = np.finfo(dtype).max / 2
    x = np.array([[large, large], [-large, -large], [1024, 1025], [-np.inf, large]], dtype)
    expected = np.log([[0.5, 0.5], [0.5, 0.5], 1 / (1 + np.exp([1, -1])), [1, 1]])
    expected[3, 0] = -np.inf
    tolerance = 2 * np.finfo(dtype).eps
    np.testing.assert_allclose(tgs.log_softmax(x), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("axis", [0, (1, 0)])
def test_sums_of_many_rows(axis):
    """NumPy's own sum of these float32 is wrong by 1 %."""
    x = np.full((10**6, 2), 0.1, "f4")
    x = x if axis == 0 else x.reshape(1000, 1000, 2)
    for keepdims in (False, True):
        total = tgs.sum(x, axis, keepdims)
        assert total.shape == x.sum(axis=axis, keepdims=keepdims).shape
        np.testing.assert_allclose(total, 1e5, rtol=2e-6)
    np.testing.assert_allclose(tgs.var(x + 1000, axis), 0, atol=1e-4)  # NumPy's is 97
    for columns in (0, 3):
        assert tgs.sum(np.ones((1000, columns)), 0).tolist() == [1000] * columns
    assert tgs.sum(np.ones((600, 2, 3)), (2, 1)).tolist() == [6] * 600


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
@pytest.mark.parametrize(
    ("count", "width", "places"),  # few and many sums, short and long runs, some of each
    [(50, 3, 7), (3000, 130, 40), (3000, 130, 1500), (5000, 64, 3), (40_000, 8, 9000)],
)
def test_gradients_of_places_that_are_read_again_and_again(rng, dtype, count, width, places):
    at = np.minimum(rng.integers(0, places, count), rng.integers(0, places, count))
    g = rng.integers(-3, 4, (count, width)).astype(dtype)  # sums are exact
    x = tgs.tensor(np.zeros((places, width), dtype), requires_grad=True)
    g[at == 0, 1] = np.nan
    x[at].backward(g)
    expected = np.zeros((places, width))
    np.add.at(expected, at, g.astype("f8"))
    assert np.isnan(x.grad.numpy()).sum() == (at == 0).any()
    np.testing.assert_array_equal(x.grad, expected)


def test_softmax_of_more_than_float16_can_count():
    many = np.zeros(100_000, np.float16)
    for function, wanted in (
        (tgs.logsumexp, np.log(1e5)),
        (tgs.log_softmax, -np.log(1e5)),
        (tgs.softmax, 1e-5),
    ):
        y = function(many, axis=-1)  # Σ exp(x) is beyond float16, the result is not
        assert y.dtype == np.float16
        assert np.all(y.numpy() == np.float16(wanted))
    share = tgs.grad(tgs.logsumexp)(many)
    assert share.dtype == np.float16
    assert np.all(share.numpy() == np.float16(1e-5))


def test_small_integers():
    small = np.array([0, 5], np.uint8)
    assert tgs.min(small).item() == 0
    assert tgs.min(tgs.tensor([True, False])).item() is False
    np.testing.assert_allclose(tgs.softmax(np.array([-128, 127], np.int8)), [0, 1], atol=1e-6)
    assert tgs.mean(np.ones(100_000, np.float16)).item() == 1
    assert tgs.var(np.array([0] * 9 + [300], np.float16)).item() == 8100
    assert tgs.logsumexp(tgs.tensor(1.0)).item() == 1
    assert tgs.rand(10**5, dtype="float16", rng=0).numpy().max() < 1
    assert tgs.logsumexp([-np.inf, -np.inf]).item() == -np.inf
    assert tgs.grad(tgs.logsumexp)(np.full(2, -np.inf)).tolist() == [0, 0]
    recorded = tgs.tensor(np.full(2, -np.inf), requires_grad=True)
    tgs.logsumexp(recorded).backward(create_graph=True)
    assert recorded.grad.tolist() == [0, 0]
    assert tgs.stack([tgs.zeros(1, dtype="float64"), [0.1]]).numpy()[1, 0] == 0.1
    assert tgs.concat(tgs.ones(1) for _ in range(3)).shape == (3,)


@given(
    st.lists(st.integers(0, 3), max_size=4), st.integers(0, 4), st.sampled_from(["f4", "f8", "f2"])
)
def test_gradients_of_what_was_repeated(shape, axes, kind):
    """Whatever axes are new or were 1, sums over them are the gradient."""
    shape = tuple(shape)
    small = tuple(1 if k < axes else n for k, n in enumerate(shape))
    for source in (small, small[min(axes, len(small)) :]):
        x = tgs.tensor(np.zeros(source, kind), requires_grad=True)
        g = np.random.default_rng(0).integers(-3, 4, shape).astype(kind)
        tgs.broadcast_to(x, shape).backward(g)
        expected = g.sum(axis=tuple(range(len(shape) - len(source)))) if g.ndim else g
        repeated = tuple(k for k, n in enumerate(source) if n != expected.shape[k])
        np.testing.assert_array_equal(x.grad.numpy(), expected.sum(axis=repeated, keepdims=True))


def test_a_long_sum_keeps_its_digits():
    layer = tgs.nn.Linear(1, 2)
    layer(np.zeros((10**6, 1), "f4")).backward(np.full((10**6, 2), 0.1, "f4"))
    np.testing.assert_allclose(layer.bias.grad.numpy(), 1e5, rtol=1e-4)


def test_many_slices_cost_their_own_size():
    """Reading T steps out of a sequence makes one gradient of its size, not T."""
    x = tgs.randn(2000, 2, requires_grad=True)
    y = tgs.stack([x[t] * float(t) for t in range(2000)])
    y.sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), np.arange(2000.0)[:, None] * np.ones(2))


BAD = {
    "reshape: 1 elements": lambda x: tgs.ones(1).reshape(-1, -1),
    "reshape: shape .*expected integers": lambda x: x.reshape(x.size / 2, 2),
    "broadcast_to: shape 'a'": lambda x: tgs.broadcast_to(x, "a"),
    r"matmul: a \(2, 3\) and b \(2, 3\).*transpose": lambda x: x @ x,
    "matmul: .*at least one axis": lambda x: x @ tgs.tensor(1.0),
    r"linear: x \(2, 3\) and weight \(3, 2\).*\(out, in\)": lambda x: tgs.linear(x, x.T),
    r"linear: x \(\) and weight \(2, 3\)": lambda x: tgs.linear(1.0, x),
    r"linear: x \(2, 3\) and weight \(3,\)": lambda x: tgs.linear(x, x[0]),
    "sum: axis 2 was given for a tensor with 2 axes": lambda x: x.sum(2),
    "names an axis twice": lambda x: x.sum((0, 0)),
    "reshape: 6 elements": lambda x: x.reshape(4, 2),
    "reshape: 6 elements of": lambda x: x.reshape(-1, 4),
    "broadcast_to": lambda x: tgs.broadcast_to(x, (4,)),
    "concat: shapes": lambda x: tgs.concat([x, tgs.zeros(3, 2)]),
    "stack: shapes": lambda x: tgs.stack([x, x.T]),
    "split: axis 1": lambda x: tgs.split(x, 2, axis=1),
    "squeeze: axis 0": lambda x: tgs.squeeze(x, 0),
    "mean: .*no elements": lambda x: x[:0].mean(),
    "pad: pad_width": lambda x: tgs.pad(x, [(1, 2), (1, 2), (1, 2)]),
    "take_along_axis: indices": lambda x: tgs.take_along_axis(x, [0, 1], axis=0),
    "permute_dims: axes .* expected all 2 of them in": lambda x: tgs.permute_dims(x, (0,)),
    "max: .*zero-size": lambda x: x[:0].max(),
}


@pytest.mark.parametrize("words", BAD)
def test_bad_shapes_say_what_was_given(words):
    with pytest.raises(tgs.ShapeError, match=words):
        BAD[words](tgs.zeros(2, 3))


def test_other_bad_input():
    x = tgs.zeros(2, 3)
    with pytest.raises(ValueError, match="index of dtype float32"):
        x[tgs.tensor([0.5])]
    with pytest.raises(IndexError):
        x[5]
    with pytest.raises(ValueError, match="expected integers or None"):
        x.sum("rows")
    with pytest.raises(ValueError, match="no tensors were given, expected at least one"):
        tgs.stack([])
    for function in (tgs.concat, tgs.stack):
        with pytest.raises(ValueError, match="axis None was given, expected an integer"):
            function([x, x], axis=None)
    with pytest.raises(ValueError, match=r"axis \(0, 1\) was given, expected an integer"):
        tgs.cumsum(x, (0, 1))
    with pytest.raises(ValueError, match=r"permute_dims: axis \(0\.5,\) was given"):
        tgs.permute_dims(x, 0.5)
    with pytest.raises(ValueError, match="how many parts, or a list of indices"):
        tgs.split(x, 2.0)
    with pytest.raises(ValueError, match=r"cannot hold it"):
        tgs.pad(tgs.tensor([1]), 1, 0.5)
    assert tgs.expand_dims(x, [0, 1]).shape == (1, 1, 2, 3)
    with pytest.raises(tgs.TapeError, match=r"tgs\.where"):
        x[0] = 1.0
