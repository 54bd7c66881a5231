"""Values of several axes in a step: a matrix for each row as state, attention, heads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import tinygrad_seq as tgs
from tinygrad_seq.recurrence import choices, compiled, lowering
from tinygrad_seq.trees import leaves


def parameter(rng, *shape):
    return tgs.tensor(rng.standard_normal(shape) * 0.4, requires_grad=True)


def delta_rule(rng, features, d):
    """A matrix as memory, from which what a key gave before is taken out (Schlag et al. 2021)."""
    W = [parameter(rng, features, d) for _ in range(3)]
    rate, decay = parameter(rng, features, 1), parameter(rng, d, 1)

    def cell(x, S):
        k, v, q = (x @ each for each in W)
        k = tgs.softmax(k, axis=-1)
        before = tgs.sum(S * k[:, None, :], axis=-1)
        change = tgs.sigmoid(x @ rate) * (v - before)
        S = S * tgs.sigmoid(decay) + change[:, :, None] * k[:, None, :]
        return (S @ q[:, :, None])[:, :, 0], S

    return cell, [*W, rate, decay]


def attention(rng, B, S, H):
    """A decoder that looks at all of a memory in each step (Bahdanau, Cho, Bengio 2015)."""
    memory = parameter(rng, B, S, H)
    W, U, C, v = parameter(rng, H, H), parameter(rng, H, H), parameter(rng, H, H), parameter(rng, H)

    def cell(x, h):
        scores = tgs.tanh(memory @ W + (h @ U)[:, None, :]) @ v  # (B, S)
        share = tgs.softmax(scores, axis=-1)
        context = tgs.sum(share[:, :, None] * memory, axis=1)
        h = tgs.tanh(x + context @ C)
        return (h, share), h

    return cell, [memory, W, U, C, v]


def heads(rng, n, d):
    """Two heads that look at each other, along both axes; and shapes of all kinds."""
    mixed, lines, bias = parameter(rng, 2, 2), parameter(rng, d, d), parameter(rng, 2, 1)

    def cell(x, h):
        a = x.reshape(len(x), 2, d) + h @ lines + bias
        share = tgs.softmax(a @ tgs.permute_dims(h, (0, 2, 1)) * 0.3, axis=1)
        b = tgs.concat([share @ a, mixed @ h], axis=-1)[:, :, 1 : d + 1]
        top = tgs.max(b, axis=1, keepdims=True) - tgs.min(b, axis=1, keepdims=True)
        c = tgs.pad(tgs.cumsum(b, axis=-1)[..., ::-1], ((0, 0), (0, 0), (1, 0)))[..., :d]
        h = tgs.tanh(tgs.where(b > 0, c, b) + top * tgs.stack([b[:, 1], c[:, 0]], axis=1))
        return {"sum": h.sum(axis=(1, 2)), "turned": tgs.permute_dims(h, (0, 2, 1))}, h

    return cell, [mixed, lines, bias]


def found(drive, cell, parameters, x, state, **options):
    tensors = [tgs.tensor(x, requires_grad=True), tgs.tensor(state, requires_grad=True)]
    ys, last = drive(cell, *tensors, **options)
    results, weights = [*leaves(ys), last], np.random.default_rng(3)
    for tensor in parameters:
        tensor.grad = None
    sum(tgs.sum(each * weights.standard_normal(each.shape)) for each in results).backward()
    return [each.numpy() for each in [*results, *(t.grad for t in (*tensors, *parameters))]]


CELLS = {
    "delta rule": lambda rng, n: (*delta_rule(rng, 3, n), (3,), (n, n)),
    "attention": lambda rng, n: (*attention(rng, 4, n, 3), (3,), (3,)),
    "heads": lambda rng, n: (*heads(rng, 2 * n, n), (2 * n,), (2, n)),
}


@pytest.mark.parametrize("name", CELLS)
def test_axes_as_unroll_has_them(name, rng):
    """And other lengths of axes compile nothing, but for those of 1."""
    T, B, known = 5, 4, None
    for n in (5, 7, 1):
        cell, parameters, x, state = CELLS[name](rng, n)
        x, state = rng.standard_normal((T, B, *x)), rng.standard_normal((B, *state))
        resets = rng.random((T, B)) < 0.3
        for options in ({}, {"lengths": [5, 0, 2, 4]}, {"reverse": True, "resets": resets}):
            pairs = zip(
                found(tgs.unroll, cell, parameters, x, state, **options),
                found(tgs.scan, cell, parameters, x, state, **options),
                strict=True,
            )
            for expected, here in pairs:
                assert expected.shape == here.shape
                np.testing.assert_allclose(here, expected, rtol=1e-9, atol=1e-11)
        if known is None:
            known = set(compiled._runners)
        elif n > 1:
            assert set(compiled._runners) == known


def test_a_matrix_for_each_row_with_checkpoints_and_from_before(rng):
    cell, parameters = delta_rule(rng, 3, 6)
    x, state = rng.standard_normal((9, 4, 3)), rng.standard_normal((4, 6, 6))
    want = found(tgs.scan, cell, parameters, x, state)
    for here, expected in zip(
        found(tgs.scan, cell, parameters, x, state, checkpoint=2), want, strict=True
    ):
        np.testing.assert_allclose(here, expected, rtol=1e-12)  # sums are divided otherwise
    first, middle = tgs.scan(cell, x[:4], state)
    rest, _ = tgs.scan(cell, x[4:], middle)
    np.testing.assert_array_equal(tgs.concat([first, rest]).numpy(), want[0])
    flow = tgs.gradient_flow(
        lambda: tgs.sum(tgs.scan(cell, x, state)[0] ** 2), {"values": parameters[1]}
    )
    assert flow[0].norm.shape == (9,)


@pytest.mark.parametrize("how", ["of lines", "of blocks", "of numbers"])
def test_a_matrix_for_each_head(rng, monkeypatch, how):
    """On the right and on the left, of more heads than the values have and of fewer.

    Where units are not chosen, as on a GPU, a matrix of blocks stands for all of the lines, and
    where that would be large, all numbers are multiplied that meet.
    """
    if how != "of lines":
        monkeypatch.setattr(choices, "UNIT_BY_UNIT", [])
        monkeypatch.setattr(lowering, "MOST_IN_BLOCKS", 2**20 * (how == "of blocks"))
    W, U, V = parameter(rng, 2, 5, 5), parameter(rng, 2, 4, 5), parameter(rng, 2, 3, 3)
    both = parameter(rng, 3, 3)

    def cell(x, h):
        h = tgs.tanh(h @ W + V @ h + (x[:, None, None] @ U) * (both @ h))
        return h, h

    x, h = rng.standard_normal((3, 2, 4)), rng.standard_normal((2, 2, 3, 5))
    shown = str(tgs.explain(cell, x, h))
    assert ("matmul_lines" in shown) == (how == "of lines")
    assert shown.count(", line by line") == 4 * (how == "of lines")
    with pytest.raises(tgs.ShapeError, match="axes before the last two"):
        tgs.scan(cell, x, rng.standard_normal((2, 3, 3, 5)))
    for here, expected in zip(
        found(tgs.scan, cell, [W, U, V, both], x, h),
        found(tgs.unroll, cell, [W, U, V, both], x, h),
        strict=True,
    ):
        np.testing.assert_allclose(here, expected, rtol=1e-9, atol=1e-11)


LINE = st.sampled_from([2, 3, 8, 16, 17, 31, 33, 64])


@given(
    *(st.sampled_from([2, 3]), st.sampled_from([2, 5, 20]), LINE, LINE),
    *(st.sampled_from([1, 2, 9]), st.sampled_from(["float32", "float64"])),
    st.sampled_from(["plain", "lengths", "resets", "checkpoint", "reverse"]),
)
@example(1, 1, 1, 1, 1, "float64", "resets")
@example(2, 1, 300, 2, 2, "float32", "plain")
@example(2, 1, 8, 8, 2, "float64", "plain")
def test_lines_times_a_matrix(groups, m, k, n, B, dtype, options):
    """One for all, or one for each group, on the right and on the left, in and before the loop."""
    T, rng = 7, np.random.default_rng([groups, m, k, n, B])
    shapes = (n, k), (groups, k, n), (groups, m, m), (k, n), (k, groups * m * n)
    parameters = [
        tgs.tensor((rng.standard_normal(shape) * 0.4).astype(dtype), requires_grad=True)
        for shape in shapes
    ]
    one, each, left, of_x, of_all = parameters

    def cell(x, h):
        both = (x[:, 0, 0] @ of_all).reshape(B, groups, m, n) + h @ each  # of one gradient
        h = tgs.tanh(left @ both + x @ of_x) / np.sqrt(k)
        return h, tgs.linear(h, one.T) * 0.5

    x = rng.standard_normal((T, B, groups, m, k)).astype(dtype)
    h = rng.standard_normal((B, groups, m, k)).astype(dtype)
    chosen = {
        "plain": {},
        "lengths": {"lengths": rng.integers(0, T + 1, B)},
        "resets": {"resets": rng.random((T, B)) < 0.3},
        "checkpoint": {"checkpoint": 3},
        "reverse": {"reverse": True},
    }[options]
    tolerance = (
        {"rtol": 2e-3, "atol": 2e-4} if dtype == "float32" else {"rtol": 1e-8, "atol": 1e-10}
    )
    compiled_ones = found(tgs.scan, cell, parameters, x, h, **chosen)
    chosen.pop("checkpoint", None)
    for here, expected in zip(
        compiled_ones,
        found(tgs.unroll, cell, parameters, x, h, **chosen),
        strict=True,
    ):
        np.testing.assert_allclose(here, expected, **tolerance)


@pytest.mark.parametrize("groups", [(), (3,), (2, 3)])
def test_second_derivatives_through_lines(rng, groups):
    W, U = parameter(rng, *groups, 4, 5), parameter(rng, *groups, 5, 4)

    def cell(x, h):
        h = tgs.tanh(h @ W @ U + x)
        return h, h

    x, h = parameter(rng, 3, 2, 2, 3, 2, 4), parameter(rng, 2, 2, 3, 2, 4)

    def size_of_gradient(drive):
        def loss(*given):
            nonlocal W, U
            W, U, *arguments = given
            return tgs.sum(tgs.square(drive(cell, *arguments)[0]))

        def size(*given):
            return sum(tgs.sum(g * g) for g in tgs.grad(loss, (0, 1, 2, 3))(*given))

        return tgs.grad(size, (0, 1, 2, 3))(*tensors)

    tensors = W, U, x, h
    found = size_of_gradient(tgs.scan), size_of_gradient(tgs.unroll)
    for here, expected in zip(*found, strict=True):
        np.testing.assert_allclose(here.numpy(), expected.numpy(), rtol=1e-9, atol=1e-10)


def test_lines_do_not_touch_each_other(rng):
    """What a product leaves behind a line is written over by the next: NaN, too."""
    W = parameter(rng, 5, 3)

    def cell(x, h):
        return x @ W, h

    x = rng.standard_normal((4, 3, 6, 5))
    x[1, 2, 3, 1], x[2, 0, 5, 4] = np.nan, np.inf
    here, there = (drive(cell, x, np.ones((3, 1)))[0] for drive in (tgs.scan, tgs.unroll))
    np.testing.assert_allclose(here.numpy(), there.numpy(), rtol=1e-12)
    assert np.isfinite(here.numpy()[1, 2]).sum() == 15


def test_lines_have_the_same_bits_whatever_is_beside_them(rng):
    W = parameter(rng, 40, 48)

    def cell(x, h):
        h = tgs.tanh(x @ W + h)
        return h, h

    x, h = rng.standard_normal((4, 9, 6, 40)), rng.standard_normal((9, 6, 48))
    whole, _ = tgs.scan(cell, x, h)
    threads = tgs.get_num_threads()
    try:
        for count in (1, 2, 3):
            tgs.set_num_threads(count)
            np.testing.assert_array_equal(tgs.scan(cell, x, h)[0].numpy(), whole.numpy())
    finally:
        tgs.set_num_threads(threads)
    for row in (0, 8):  # alone, all lines of a row are multiplied at once
        alone, _ = tgs.scan(cell, x[:, row : row + 1], h[row : row + 1])
        np.testing.assert_array_equal(alone.numpy()[:, 0], whole.numpy()[:, row])


def test_a_matrix_for_lines_and_for_what_was_joined(rng):
    """For the one it is taken whole, for the other cut."""
    W = parameter(rng, 4, 3)

    def cell(x, h):
        a, b = x[:, :2], x[:, 2:]
        lines = tgs.stack([x, tgs.sin(x)], axis=1) @ W
        return lines[:, 0] * lines[:, 1] + tgs.concat([a, b * h], axis=-1) @ W, h

    x, h = rng.standard_normal((3, 2, 4)), rng.standard_normal((2, 2))
    for here, expected in zip(
        found(tgs.scan, cell, [W], x, h), found(tgs.unroll, cell, [W], x, h), strict=True
    ):
        np.testing.assert_allclose(here, expected, rtol=1e-10)


def test_what_is_repeated_along_two_axes_is_not_what_is_along_one(rng):
    """Runs of both begin with the same units, and are of other lengths."""

    def cell(x, S):
        S = x[:, :, None, None] * S
        n = x[:, :, None] * tgs.sum(S, axis=-1) + x[:, :, None]
        return n, S

    x, S = rng.standard_normal((3, 2, 2)), rng.standard_normal((2, 2, 3, 4))
    for here, expected in zip(
        found(tgs.scan, cell, [], x, S), found(tgs.unroll, cell, [], x, S), strict=True
    ):
        np.testing.assert_allclose(here, expected, rtol=1e-10)


def test_ties_along_an_axis_share_the_gradient_equally(rng):
    x = np.zeros((1, 2, 3, 2))
    x[0, 0, 2], x[0, 1, 1, 0] = np.nan, -np.inf

    def cell(x, h):
        return tgs.max(x, axis=1) + h[:, None], h

    gradients = []
    for drive in (tgs.unroll, tgs.scan):
        given = tgs.tensor(x, requires_grad=True)
        drive(cell, given, np.zeros(2))[0].sum().backward()
        gradients.append(given.grad.numpy())
    np.testing.assert_array_equal(*gradients)
    assert gradients[1][0, 1].tolist() == [[0.5, 1 / 3], [0.0, 1 / 3], [0.5, 1 / 3]]


@pytest.mark.parametrize("top", [np.inf, -np.inf])
def test_an_infinite_extremum_along_an_axis_has_its_gradient(top, rng):
    x = rng.standard_normal((1, 2, 3, 2))
    x[0, :, :2, 0], x[0, 1, :, 1] = top, top

    def cell(x, h):
        ys = [extremum(x, axis=axis) for extremum in (tgs.max, tgs.min) for axis in (1, 2)]
        return tuple(ys), h

    gradients = []
    for drive in (tgs.unroll, tgs.scan):
        given = tgs.tensor(x, requires_grad=True)
        ys = drive(cell, given, np.zeros((2, 1)))[0]
        sum(tgs.sum(k * y) for k, y in enumerate(ys, 1)).backward()
        gradients.append([*(y.numpy() for y in ys), given.grad.numpy()])
    for here, expected in zip(*gradients, strict=True):
        np.testing.assert_allclose(here, expected, rtol=1e-15)


def test_a_tensor_read_off_the_tape_keeps_its_gradient(rng):
    """One that is broadcast for a step is no constant because it was first read in no_grad."""
    W = parameter(rng, 3, 1)

    def cell(x, S):
        with tgs.no_grad():
            scaled = S * W
        return S * W + scaled, S

    tgs.scan(cell, np.ones((2, 2, 1)), np.ones((2, 3, 2)))[0].sum().backward()
    np.testing.assert_allclose(W.grad.numpy(), np.full((3, 1), 8.0))


def test_choices_of_equal_bytes_and_other_shapes(rng, monkeypatch):
    """As matrices, [0, 1] repeated and a sum by threes are the same numbers one after another."""

    def cell(x, h):
        repeated = tgs.broadcast_to(x[:, None, :], (2, 3, 2))  # (2, 6) as a matrix
        by_threes = tgs.concat([h, h, h], axis=-1).reshape(2, 2, 3).sum(axis=-1)  # (6, 2)
        h = tgs.tanh(repeated[:, 0] + by_threes)
        return h, h

    monkeypatch.setattr(choices, "UNIT_BY_UNIT", [])
    xs, h0 = rng.standard_normal((3, 2, 2)), np.ones((2, 2))
    wanted, _ = tgs.unroll(cell, xs, h0)
    got, _ = tgs.scan(cell, xs, h0)
    np.testing.assert_allclose(got.numpy(), wanted.numpy(), rtol=1e-12)


def test_a_sum_of_conditions_along_no_axis_counts(rng):
    def cell(x, h):
        assert tgs.sum(x > 0, axis=()).dtype == np.int64
        return h, h

    xs, h0 = rng.standard_normal((2, 2, 3)), np.ones((2, 3))
    for driver in (tgs.unroll, tgs.scan):
        driver(cell, xs, h0)


def test_units_are_chosen_of_more_than_float32_can_count():
    n = 2**24 + 12
    x, order = np.zeros((1, 1, n), "float32"), [n - 1, n - 3, n - 5, n - 7, n - 9]
    x[0, 0, order] = np.arange(1, 6)
    given = tgs.tensor(x, requires_grad=True)
    ys, _ = tgs.scan(lambda x, h: (x[:, order], h), given, np.zeros((1, 1), "float32"))
    np.testing.assert_array_equal(ys.numpy(), [[np.arange(1, 6)]])
    tgs.sum(ys * ys).backward()
    np.testing.assert_array_equal(given.grad.numpy(), 2 * x)


def test_what_is_padded_keeps_its_dtype(rng):
    def cell(x, h):
        around = [(0, 0), (1, 0), (0, 2)]
        inside = tgs.pad(x > 0, around, 5)  # any number but 0 is True
        beside = tgs.pad(x[:, 0] > 0, [(0, 0), (0, 1)])
        whole = tgs.pad((x > 0).to("int64"), around, 3)
        parts = tgs.where(~inside, 0.5, whole.to("float64")), tgs.where(beside, 1.0, h)
        return (*parts, tgs.pad(tgs.sum(x, axis=(1, 2)), [(0, 0)])), h

    x, h = rng.standard_normal((3, 2, 2, 3)), rng.standard_normal((2, 4))
    for here, expected in zip(
        found(tgs.scan, cell, [], x, h), found(tgs.unroll, cell, [], x, h), strict=True
    ):
        np.testing.assert_allclose(here, expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_conditions_and_whole_numbers_are_added_and_multiplied(dtype, rng):
    def cell(given, h):
        x, k = given
        on, whole = x > 0, tgs.where(x > h, 2, k)
        h = h * (1 - on) + 0.1 * x * (on * (h > 0)) + (2 * on - (h > 0) + k * k) * 0.25
        return (h * abs(-whole), tgs.maximum(k, 1 + on) + h, (on + k) * x), h

    x, k = rng.standard_normal((3, 2, 4)).astype(dtype), rng.integers(-5, 5, (3, 2, 4))
    results = []
    for drive in (tgs.scan, tgs.scan, tgs.unroll):
        given = tgs.tensor(x, requires_grad=True), tgs.tensor(k)
        ys, h = drive(cell, given, tgs.zeros(2, 4, dtype=dtype))
        (sum((y * y).sum() for y in ys) + h.sum()).backward()
        assert [y.dtype for y in (*ys, h)] == [np.dtype(dtype)] * 4
        results.append([*(y.numpy() for y in ys), h.numpy(), given[0].grad.numpy()])
    for expected, *here in zip(*reversed(results), strict=True):
        for each in here:
            np.testing.assert_allclose(each, expected, rtol=1e-5 if dtype == "float32" else 1e-12)


def test_integers_that_end_sooner_are_refused(rng):
    k = rng.integers(0, 200, (3, 2, 4)).astype(np.uint8)
    with pytest.raises(tgs.TraceError, match=r"uint8.*convert with t.to"):
        tgs.scan(lambda k, h: (h, h + (k + k)), k, np.zeros((2, 4), "f4"))


def test_the_largest_of_conditions_and_whole_numbers_along_one_of_several_axes(rng):
    def cell(given, h):
        x, k = given
        some, most, least = tgs.max(x > 0, axis=1), tgs.max(k, axis=2), tgs.min(k, axis=1)
        return tgs.where(some, 1.0, h) * most.sum(axis=1, keepdims=True) + least, h

    x, k = rng.standard_normal((3, 2, 3, 4)), rng.integers(-5, 5, (3, 2, 3, 4))
    h = rng.standard_normal((2, 4))
    for here, expected in zip(
        leaves(tgs.scan(cell, (x, k), h)), leaves(tgs.unroll(cell, (x, k), h)), strict=True
    ):
        np.testing.assert_array_equal(here.numpy(), expected.numpy())
