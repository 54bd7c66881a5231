"""grad, value_and_grad, vjp, jvp, gradcheck, and gradients of gradients."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinygrad_seq as tgs
from tinygrad_seq import nn
from tinygrad_seq.rules import ARRAY_NAMES, Rule
from tinygrad_seq.tensors import apply


def test_grad_of_grad():
    def cube(x):
        return x**3

    assert tgs.grad(cube)(2.0).item() == 12
    assert tgs.grad(tgs.grad(cube))(2.0).item() == 12
    assert tgs.grad(tgs.grad(tgs.grad(cube)))(2.0).item() == 6


def test_grad_mirrors_structures():
    class Pair(NamedTuple):
        a: object
        b: object

    def f(p, q, r):
        return (p["w"] * q[0]).sum() + (r.a * 2).sum()

    w, q = np.array([1.0, 2.0]), (np.array([3.0, 4.0]), np.array(5.0))
    r = Pair(np.ones(2), [np.ones(3)])
    g = tgs.grad(f, argnums=(0, 1, 2))({"w": w, "unused": np.ones(1)}, q, r)
    assert g[0]["w"].tolist() == [3, 4]
    assert g[0]["unused"].tolist() == [0]
    assert g[1][0].tolist() == [1, 2]
    assert g[1][1].item() == 0
    assert isinstance(g[2], Pair)
    assert g[2].a.tolist() == [2, 2]
    assert g[2].b[0].tolist() == [0, 0, 0]
    value, one = tgs.value_and_grad(f, argnums=-2)({"w": w}, q, r)
    assert value.item() == 15
    assert isinstance(one, tuple)


def test_grad_leaves_no_trace():
    x = tgs.tensor([1.0, 2.0], requires_grad=True)
    w = tgs.tensor([3.0, 4.0], requires_grad=True)
    plain = tgs.tensor([1.0, 2.0])
    assert not tgs.grad(lambda x: (x * x).sum())(plain).requires_grad
    value, _ = tgs.value_and_grad(lambda x: (x * x).sum())(plain)
    assert not value.requires_grad
    g = tgs.grad(lambda x: (x * w).sum())(x)
    assert x.grad is None
    assert w.grad is None
    (g * g).sum().backward()  # what it depends on outside stays connected
    np.testing.assert_allclose(w.grad.numpy(), [6, 8])
    with tgs.no_grad():
        assert not tgs.grad(lambda x: (x * w).sum())(x).requires_grad


def test_nested_grad_leaves_no_trace():
    inner_of_outer = tgs.grad(lambda b: tgs.grad(lambda a: a * a * b)(2.0))
    assert inner_of_outer(1.0).item() == 4
    assert not inner_of_outer(1.0).requires_grad
    assert tgs.grad(lambda a: tgs.grad(lambda b: a * b * b)(1.0))(2.0).item() == 2
    third = tgs.grad(lambda c: tgs.grad(lambda b: tgs.grad(lambda a: a * b * c * c)(2.0))(3.0))
    assert third(5.0).item() == 10
    assert not third(5.0).requires_grad
    moved = tgs.grad(lambda b: tgs.jvp(lambda a: a * a * b, (2.0,), (1.0,))[1])
    assert moved(1.0).item() == 4
    assert not moved(1.0).requires_grad


def test_grad_beside_a_freed_graph():
    x = tgs.tensor(2.0, requires_grad=True)
    h = x * 2
    (h * h).backward()
    assert tgs.grad(lambda a: a * h)(3.0).item() == 4


def test_create_graph():
    x = tgs.tensor([1.0, 2.0, 3.0], dtype="float64", requires_grad=True)
    (x**3).sum().backward(create_graph=True)
    first = x.grad
    np.testing.assert_allclose(first.numpy(), 3 * x.numpy() ** 2)
    x.grad = None
    first.sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), 6 * x.numpy())


def test_gradient_penalty_trains_the_weights(rng):
    w = tgs.tensor(rng.standard_normal((3, 2)), requires_grad=True)

    def penalty(w):
        g = tgs.grad(lambda x: tgs.tanh(x @ w).sum())(np.ones((2, 3)))
        return (g * g).sum()

    assert tgs.gradcheck(penalty, w)


def test_vjp_and_jvp_agree_with_the_matrix(rng):
    A = rng.standard_normal((3, 4))

    def f(x, y):
        return {"ax": A @ x, "prod": x * y["v"]}

    x, v = rng.standard_normal(4), rng.standard_normal(4)
    value, pullback = tgs.vjp(f, x, {"v": v})
    np.testing.assert_allclose(value["ax"], A @ x)
    u, s = rng.standard_normal(3), rng.standard_normal(4)
    for _ in range(2):  # as often as one likes
        gx, gy = pullback({"ax": u, "prod": s})
        np.testing.assert_allclose(gx, A.T @ u + s * v)
        np.testing.assert_allclose(gy["v"], s * x)
    dx, dv = rng.standard_normal(4), rng.standard_normal(4)
    value, moved = tgs.jvp(f, (x, {"v": v}), (dx, {"v": dv}))
    np.testing.assert_allclose(moved["ax"], A @ dx)
    np.testing.assert_allclose(moved["prod"], dx * v + x * dv)


def test_jvp_of_inputs_that_share_their_gradient():
    for xs, vs in (((1.0, 2.0), (10.0, 1.0)), (({"a": 1.0, "b": 2.0},), ({"b": 1.0, "a": 10.0},))):

        def f(*args):
            a, b = args if len(args) == 2 else (args[0]["a"], args[0]["b"])
            return a + b

        assert tgs.jvp(f, xs, vs)[1].item() == 11


def test_powers_of_a_number(rng):
    assert tgs.gradcheck(lambda b: 3**b + 2.5**b, rng.standard_normal(3), order=2)
    assert tgs.grad(tgs.grad(lambda b: 0.0**b))(2.0).item() == 0
    assert tgs.grad(lambda a: a ** tgs.tensor(0.0))(0.0).item() == 0


def test_jvp_where_nothing_moves():
    value, moved = tgs.jvp(lambda x: tgs.tensor([1.0, 2.0]), (np.ones(2),), (np.ones(2),))
    assert value.tolist() == [1, 2]
    assert moved.tolist() == [0, 0]
    _, moved = tgs.jvp(lambda x: tgs.sign(x), (np.ones(2),), (np.ones(2),))
    assert moved.tolist() == [0, 0]


def test_jvp_is_differentiable():
    def along(x):
        return tgs.jvp(lambda x: tgs.sin(x) * x, (x,), (tgs.tensor(1.0, dtype="float64"),))[1]

    x = 0.7
    second = tgs.grad(along)(np.array(x))
    np.testing.assert_allclose(second.item(), 2 * np.cos(x) - x * np.sin(x))


def test_hessian_vector_product(rng):
    A = rng.standard_normal((4, 4))
    A = A + A.T
    x, v = rng.standard_normal(4), rng.standard_normal(4)

    def f(x):
        return 0.5 * (x * (A @ x)).sum()

    np.testing.assert_allclose(tgs.jvp(tgs.grad(f), (x,), (v,))[1], A @ v)


def test_detach():
    layer = tgs.nn.LSTM(2, 3)
    xs, state = np.ones((4, 1, 2), "f4"), None
    for _ in range(2):
        ys, state = layer(xs, state)
        ys.sum().backward()
        carried = state
        state = tgs.detach(state)
    assert tgs.detach(None) is None
    assert not any(leaf.requires_grad for leaf in state)
    ys, _ = layer(xs, carried)
    with pytest.raises(tgs.TapeError, match=r"take tgs\.detach\(state\)"):
        ys.sum().backward()


def test_same_input_twice():
    x = tgs.tensor(3.0, requires_grad=True)
    g = tgs.grad(lambda a, b: a * b, argnums=(0, 1))(x, x)
    assert [t.item() for t in g] == [3, 3]
    _, pullback = tgs.vjp(lambda x: (x, x * 2, x), 1.0)
    assert pullback((1.0, 1.0, 1.0))[0].item() == 4


BAD = {
    "argnums 3 was given for 1": lambda: tgs.grad(lambda x: x, 3)(1.0),
    "0 arguments by position, expected those to": lambda: tgs.grad(lambda x: x)(x=1.0),
    "expected a floating one": lambda: tgs.grad(lambda x: x * 1.0)(3),
    "grad: argument.* a NoneType was given": lambda: tgs.grad(lambda x: x)(None),
    "the function returned a float": lambda: tgs.vjp(lambda x: 3.0, 1.0),
    r"expected \(a tensor, a tensor\)": lambda: tgs.vjp(lambda x: (x, x), 1.0)[1](1.0),
    r"tangent: shape \(3,\)": lambda: tgs.jvp(lambda x: x, (np.ones(2),), (np.ones(3),)),
    r"write \(x,\) for one": lambda: tgs.jvp(lambda x: x, np.ones(2), np.ones(2)),
    r"argnums \[0, 1\] was given": lambda: tgs.grad(lambda a, b: a, [0, 1]),
    r"a Tensor was given as f.*loss\.backward\(\)": lambda: tgs.grad(tgs.ones(1), [tgs.ones(1)]),
    "names an argument twice": lambda: tgs.grad(lambda a: a, (0, -1))(1.0),
    "an input of dtype int64": lambda: tgs.gradcheck(lambda x: x, np.array([1])),
    "order 0": lambda: tgs.gradcheck(lambda x: x, 1.0, order=0),
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input(words):
    with pytest.raises(ValueError, match=words):
        BAD[words]()


def test_grad_wants_one_number():
    with pytest.raises(tgs.TapeError, match="expected one number"):
        tgs.grad(lambda x: x)(np.ones(2))


class TestGradcheckFails:
    """A checker that cannot fail checks nothing."""

    @staticmethod
    def wrong(**derivatives):
        rule = Rule("wrong", "x * x * x", "", **derivatives)
        rule.tensor_vjps = rule.read_vjps(ARRAY_NAMES)  # plain operators suffice here
        return lambda x: apply(rule, (x,))

    def test_on_a_wrong_derivative(self, rng):
        f = self.wrong(x="g * 2.9 * x * x")
        with pytest.raises(AssertionError, match=r"order 1 for input\[0\] of shape \(3,\)"):
            tgs.gradcheck(f, rng.standard_normal(3))

    def test_on_a_derivative_wrong_by_little(self, rng):
        f = self.wrong(x="g * 3.0001 * x * x")
        with pytest.raises(AssertionError):
            tgs.gradcheck(f, rng.standard_normal(3))

    def test_on_a_wrong_second_derivative(self, rng):
        rule = Rule("wrong", "x * x * x", "", x="g * 3 * x * x")
        other = Rule("other", "x", "", x="g * 2 * x * x")
        rule.tensor_vjps = other.read_vjps(ARRAY_NAMES)
        x = rng.standard_normal(3)
        assert tgs.gradcheck(lambda x: apply(rule, (x,)), x)
        with pytest.raises(AssertionError, match="order 2"):
            tgs.gradcheck(lambda x: apply(rule, (x,)), x, order=2)

    def test_on_a_second_input(self, rng):
        f = self.wrong(x="g * 2 * x * x")
        with pytest.raises(AssertionError, match=r"input\[1\]\['b'\]"):
            tgs.gradcheck(
                lambda a, d: a * f(d["b"]), (rng.standard_normal(3), {"b": rng.standard_normal(3)})
            )

    def test_passes_on_the_right_one(self, rng):
        assert tgs.gradcheck(self.wrong(x="g * 3 * x * x"), rng.standard_normal(3), order=2)

    @given(shape=st.lists(st.integers(1, 5), max_size=3), data=st.data())
    def test_it_names_the_element(self, shape, data):
        place = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
        x = np.random.default_rng(0).uniform(0.5, 2, shape)
        where = rf"at \[{', '.join(map(str, place))}\] they give .* and 0$"
        wrong = np.zeros(shape, bool)
        wrong[place] = True
        with pytest.raises(AssertionError, match=where):
            tgs.gradcheck(lambda x: tgs.where(wrong, x.detach(), x) ** 2, x)

    def test_on_chance(self, rng):
        with pytest.raises(AssertionError, match=r"another value .* expected one without chance"):
            tgs.gradcheck(lambda x: x * rng.standard_normal(), np.ones(2))
        with pytest.raises(AssertionError, match=r"give nan, backward"), np.errstate(all="ignore"):
            tgs.gradcheck(tgs.log, -np.ones(2))


class Tied(nn.Module):
    """Two layers over one sequence and a head, whose weight is used twice."""

    def __init__(self, dropout=0.0):
        self.layer = nn.GRU(2, 3, 2, dropout=dropout, rng=0)
        self.head = nn.Linear(3, 3, rng=0)
        self.again = self.head
        self.scale = nn.parameter(2.0)

    def forward(self, x):
        return self.scale * self.again(tgs.tanh(self.head(self.layer(x)[0])))


class TestGradcheckOfAModule:
    def test_all_is_right_and_as_before(self, rng):
        model, x = Tied(), rng.standard_normal((4, 2, 2))
        model.head.bias.requires_grad = False  # a frozen one is checked too
        (model.scale**2).backward()
        before = model.state_dict(), [p.grad for p in model.parameters()]
        assert tgs.gradcheck(lambda: nn.functional.mse_loss(model(x), np.ones((4, 2, 3))), model, 2)
        assert tgs.gradcheck(lambda: model.head.weight, model)
        assert [p.grad for p in model.parameters()] == before[1]
        for name, value in model.state_dict().items():
            assert value.dtype == np.float32
            np.testing.assert_array_equal(value, before[0][name])
        assert [p.requires_grad for p in model.parameters()].count(False) == 1

    def test_it_names_the_parameter_and_the_element(self, rng):
        model, x = Tied(), rng.standard_normal((4, 2, 2))

        def f():
            return model(x).sum() * model.layer.cells[1].weight_hh[4, 2].detach()

        words = r"parameter layer.cells.1.weight_hh of shape \(9, 3\): .*; at \[4, 2\] they give"
        with pytest.raises(AssertionError, match=words):
            tgs.gradcheck(f, model)
        assert model.layer.cells[1].weight_hh.dtype == np.float32

    def test_errors(self, rng):
        model, x = Tied(dropout=0.5), rng.standard_normal((4, 2, 2))
        with pytest.raises(AssertionError, match=r"model.eval\(\) switches dropout off"):
            tgs.gradcheck(lambda: model(x), model)
        with pytest.raises(ValueError, match="f cannot be called without arguments: missing"):
            tgs.gradcheck(lambda x: model(x), model)
        with pytest.raises(ValueError, match="a Dropout without parameters was given"):
            tgs.gradcheck(lambda: x, nn.Dropout(0.5))
        with pytest.raises(ValueError, match="xs is float32 and the state float64, expected"):
            tgs.gradcheck(lambda: model(x.astype("f4")), model)
        assert {p.dtype.name for p in model.parameters()} == {"float32"}
