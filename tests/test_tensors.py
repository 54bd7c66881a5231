"""Making tensors, what they say of themselves, and how they meet NumPy, pickle and bad input."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

import tinygrad_seq as tgs


def test_dtypes_of_what_is_given():
    assert tgs.tensor(1.5).dtype == np.float32
    assert tgs.tensor([1, 2]).dtype == np.int64
    assert tgs.tensor([1, 2.5]).dtype == np.float32
    assert tgs.tensor(True).dtype == np.bool_
    assert tgs.tensor(np.zeros(2)).dtype == np.float64
    assert tgs.tensor([np.zeros(2), np.ones(2)]).dtype == np.float64
    assert tgs.tensor(np.float64(2)).dtype == np.float64
    assert tgs.tensor(np.zeros(2, "f2")).dtype == np.float16
    assert tgs.tensor([1, 2], dtype="float64").dtype == np.float64
    assert tgs.tensor(tgs.ones(2, dtype="float64")).dtype == np.float64


def test_floats_are_rounded_once():
    assert tgs.tensor(0.1, dtype="float64").item() == 0.1
    assert tgs.tensor([16777217.0], dtype="int64").item() == 16777217
    assert tgs.full(1, 0.1, dtype="float64").item() == 0.1
    t = tgs.zeros(1, dtype="float64", requires_grad=True)
    t.data = [0.1]
    assert t.item() == 0.1
    (t * 1).backward([0.1])
    assert t.grad.item() == 0.1


def test_float32_with_float64_gives_float64():
    a, b = tgs.ones(2, requires_grad=True), tgs.ones(2, dtype="float64", requires_grad=True)
    (a * b).sum().backward()
    assert (a * b).dtype == np.float64
    assert a.grad.dtype == np.float32
    assert b.grad.dtype == np.float64


def test_creation():
    assert tgs.zeros(2, 3).shape == tgs.zeros((2, 3)).shape == (2, 3)
    assert tgs.ones((2,), dtype="float64").tolist() == [1, 1]
    assert tgs.full((2, 1), 7).dtype == np.int64
    assert tgs.full(2, 0.5).tolist() == [0.5, 0.5]
    assert tgs.arange(3).tolist() == [0, 1, 2]
    assert tgs.arange(1, 2, 0.5).dtype == np.float32
    assert tgs.eye(2, 3).shape == (2, 3)
    assert tgs.zeros(0, 3).size == 0
    assert tgs.zeros().shape == ()
    assert tgs.ones(2, requires_grad=True).requires_grad


def test_random_numbers_follow_the_seed():
    tgs.manual_seed(3)
    first = tgs.randn(4), tgs.rand(2, 2)
    tgs.manual_seed(3)
    again = tgs.randn(4), tgs.rand(2, 2)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    by_generator = tgs.randn(4, rng=np.random.default_rng(3))
    np.testing.assert_array_equal(by_generator, first[0])
    assert 0 <= first[1].numpy().min() <= first[1].numpy().max() < 1


def test_what_a_tensor_says():
    t = tgs.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    assert (t.shape, t.ndim, t.size, t.device, len(t)) == ((2, 2), 2, 4, "cpu", 2)
    assert repr(t).endswith("dtype=float32, requires_grad=True)")
    assert [row.tolist() for row in t] == [[1, 2], [3, 4]]
    assert t[1, 1].item() == 4.0
    assert float(t[0, 0]) == 1.0
    assert int(t[0, 1]) == 2
    assert f"{t[1, 0]:.2f}" == "3.00"
    assert f"{t.detach()}" == repr(t.detach())
    assert bool(t[0, 0] > 0)
    assert [10, 20, 30][tgs.tensor(1)] == 20
    assert t.is_leaf
    assert not (t * 2).is_leaf
    assert len({t, t.detach()}) == 2  # hashed by identity


def test_it_owns_its_values():
    given = np.ones(3)
    t = tgs.tensor(given)
    given[0] = 9
    assert t.tolist() == [1, 1, 1]
    for view in (t.data, t.numpy(), np.asarray(t)):
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 5
        assert np.shares_memory(view, t.data)
    writable = np.array(t)
    writable[0] = 5
    assert t.tolist() == [1, 1, 1]
    assert np.asarray(t, dtype="f4").dtype == np.float32
    with pytest.raises(tgs.TapeError, match="do not change in place"):
        t[0] = 2


def test_constants_from_arrays_are_copied():
    x, given = tgs.ones(3, requires_grad=True), np.full(3, 2.0, "f4")
    y = (x * given).sum()
    given[:] = 100
    y.backward()
    assert x.grad.tolist() == [2, 2, 2]
    index = np.array([0, 1])
    x.grad = None
    y = x[index].sum()
    index[:] = 2
    y.backward()
    assert x.grad.tolist() == [1, 1, 0]


def test_data_is_replaced():
    t = tgs.tensor([1.0, 2.0], requires_grad=True)
    before, version = t.data, t.version
    t.data = np.array([3.0, 4.0], "f4")
    assert t.tolist() == [3, 4]
    assert t.version > version
    assert before.tolist() == [1, 2]
    t.data = [5.0, 6.0]
    t.data = tgs.tensor([7.0, 8.0])
    assert t.tolist() == [7, 8]
    assert t.requires_grad
    with pytest.raises(tgs.ShapeError, match=r"data: shape \(3,\) was given, expected \(2,\)"):
        t.data = np.zeros(3, "f4")
    with pytest.raises(ValueError, match="data: dtype float64 was given, expected float32"):
        t.data = np.zeros(2)


def test_grad_can_be_set_and_cleared():
    t = tgs.tensor([1.0, 2.0], requires_grad=True)
    assert t.grad is None
    t.grad = np.ones(2, "f4")
    (t * 2).sum().backward()
    assert t.grad.tolist() == [3, 3]
    t.grad = None
    assert t.grad is None
    with pytest.raises(tgs.ShapeError, match="grad: shape"):
        t.grad = np.ones(3, "f4")
    with pytest.raises(tgs.TapeError, match="only leaves"):
        (t * 2).grad = np.ones(2, "f4")


def test_detach_and_to():
    t = tgs.tensor([1.0, 2.0], requires_grad=True)
    y = t * 2
    assert not y.detach().requires_grad
    with pytest.raises(tgs.TapeError, match=r"make the copy of t\.detach\(\)"):
        tgs.tensor(t)
    with pytest.raises(tgs.TapeError, match=r"make the copy of t\.detach\(\)"):
        tgs.tensor(t * 2, requires_grad=True)
    assert tgs.tensor(t, requires_grad=True).is_leaf
    with tgs.no_grad():
        assert not tgs.tensor(t).requires_grad
    assert t.to("float64").dtype == np.float64
    assert t.to("cpu") is t
    assert t.to(np.int64).dtype == np.int64
    with pytest.raises(ValueError, match="device: 'gpu' was given, expected 'cpu' or 'cuda'"):
        t.to("gpu")
    with pytest.raises(ValueError, match="expected a NumPy dtype"):
        t.to("float33")


def test_freezing():
    t = tgs.tensor([1.0], requires_grad=True)
    t.grad = [2.0]
    t.requires_grad = False
    assert not (t * 2).requires_grad
    t.requires_grad = True
    assert t.grad.tolist() == [2]
    with pytest.raises(tgs.TapeError, match="detach"):
        (t * 2).requires_grad = False


def test_freezing_between_forward_and_backward():
    """What was recorded while it was trainable still finds the tensor."""
    t = tgs.tensor([1.0], requires_grad=True)
    y = t * 3
    t.requires_grad = False
    z = t * 5  # a constant here
    t.requires_grad = True
    (y * z).backward()
    assert t.grad.tolist() == [15]
    y = t * t
    t.requires_grad = False
    t.data = [2.0]
    with pytest.raises(tgs.TapeError, match="assigned since"):
        y.backward()
    linear = tgs.nn.Linear(1, 1)
    y = linear(np.ones((1, 1), "f4"))
    linear.to("float64")
    y.backward()
    assert linear.weight.grad.dtype == np.float64


@pytest.mark.parametrize("dtype", ["int64", "bool", "uint8"])
def test_integers_refuse_gradients(dtype):
    with pytest.raises(ValueError, match="only floating tensors"):
        tgs.tensor([0, 1], dtype=dtype, requires_grad=True)
    with pytest.raises(ValueError, match="only floating tensors"):
        tgs.zeros(2, dtype=dtype, requires_grad=True)
    t = tgs.zeros(2, dtype=dtype)
    with pytest.raises(ValueError, match="only floating tensors"):
        t.requires_grad = True


def test_pickle_and_deepcopy():
    t = tgs.tensor([1.0, 2.0], requires_grad=True)
    (t * 3).sum().backward()
    for made in (copy.deepcopy(t), pickle.loads(pickle.dumps(t))):
        assert made.requires_grad
        assert made.tolist() == [1, 2]
        assert made.grad.tolist() == [3, 3]
        made.data = [0.0, 0.0]
        assert t.tolist() == [1, 2]
    first, second = copy.deepcopy((t, t))
    assert first is second
    with pytest.raises(tgs.TapeError, match="detach"):
        copy.deepcopy(t * 2)


class Foreign:
    """Another library's array."""

    def __array__(self, dtype=None, copy=None):
        return np.ones(2)


def test_another_librarys_array_keeps_its_dtype():
    assert tgs.tensor(Foreign()).dtype == np.float64
    assert tgs.tensor(Foreign(), dtype="float32").dtype == np.float32


def test_the_other_order_of_bytes():
    given = np.arange(3.0, dtype=">f4")
    x = tgs.tensor(given, requires_grad=True)
    assert x.dtype is np.dtype("float32")
    np.testing.assert_array_equal((x + given).numpy(), 2 * given)
    assert tgs.zeros(3, dtype=">i8").dtype.isnative


BAD = {
    "tensor: the rows given differ in length, .*pad_sequences": lambda: tgs.tensor(
        [[1.0], [1.0, 2.0]]
    ),
    "complex128 was given": lambda: tgs.tensor(np.array(1j)),
    r"tensor: \['a'\] was given, expected a number, an array": lambda: tgs.tensor(["a"]),
    "tensor: None was given": lambda: tgs.tensor(None),
    r"add: a \w+\.Foreign was given, .*tgs\.tensor\(": lambda: tgs.ones(2) + Foreign(),
    "arange: nan was given, expected a finite number": lambda: tgs.arange(np.nan),
    "arange: 'a' was given": lambda: tgs.arange("a"),
    "concat: a NoneType was given, expected a list": lambda: tgs.concat(None),
    "softmax: axis -1 was given for a tensor of shape": lambda: tgs.softmax(1.0),
    "vjp: a NoneType was given, expected a function": lambda: tgs.vjp(None, 1.0),
    "tgs.stack or tgs.concat": lambda: tgs.tensor([tgs.ones(2)]),
    "a list of tensors": lambda: tgs.tensor([0.0, tgs.tensor(2.0)]),
    "complex64 was given": lambda: tgs.arange(3, dtype="complex64"),
    "dtype: None was given": lambda: tgs.ones(2).to(None),
    "manual_seed: 'a' was given": lambda: tgs.manual_seed("a"),
    "dtype goes by keyword": lambda: tgs.zeros((2, 3), "float64"),
    "expected integers from 0 on": lambda: tgs.zeros(-1),
    "a step of 0": lambda: tgs.arange(0, 1, 0),
    "expected a floating one": lambda: tgs.randn(2, dtype="int64"),
    "a numpy.random.Generator": lambda: tgs.randn(2, rng="seed"),
    "expected exactly one element": lambda: tgs.zeros(2).item(),
    "neither true nor false": lambda: bool(tgs.zeros(2)),
    "has no length": lambda: len(tgs.tensor(1.0)),
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input(words):
    with pytest.raises(ValueError, match=words):
        BAD[words]()


def test_numpy_functions_do_not_leave_the_tape_unnoticed():
    t = tgs.tensor([[1.0, 2.0]], requires_grad=True)
    for function in (np.sum, np.mean, np.max, np.transpose, lambda t: np.concatenate([t, t])):
        with pytest.raises(tgs.TapeError, match=r"would be off the tape; use tgs\."):
            function(t)
    for function in (np.ravel, np.linalg.norm, lambda t: np.swapaxes(t, 0, 1)):
        with pytest.raises(tgs.TapeError, match=r"would be off the tape; use t\.numpy\(\)"):
            function(t)
        assert isinstance(function(t.detach()), (np.ndarray, np.generic))
    assert np.allclose(t, [[1, 2]])
    assert np.array_equal(t, t)
    assert np.argmax(t) == 1
    with tgs.no_grad():
        assert np.sum(t) == 3


def test_ufuncs_are_this_packages():
    t = tgs.tensor([[0.5, 2.0]], requires_grad=True)
    assert np.tanh(t).requires_grad
    assert np.add(np.ones(2, "f4"), t).requires_grad
    assert np.matmul(t, np.ones((2, 1), "f4")).requires_grad
    np.testing.assert_allclose(np.abs(-t), t.numpy())
    assert (np.float64(2) * t).dtype == np.float32
    assert (np.float32(2) * t).requires_grad
    assert (np.ones(2) < t).tolist() == [[False, True]]
    assert (np.ones((3, 1)) == t).shape == (3, 2)
    with pytest.raises(tgs.TapeError, match=r"np\.arctan: .* off the tape"):
        np.arctan(t)
    with pytest.raises(tgs.TapeError, match=r"off the tape"):
        np.add.reduce(t)
    assert isinstance(np.arctan(t.detach()), np.ndarray)
    assert np.isfinite(t).all()
    assert np.round(t, 1).tolist() == [[0.5, 2.0]]
    assert np.isfinite(t.detach()).all()
    array = np.ones(2, "f4")
    with pytest.raises(tgs.TapeError, match=r"write array = array \+ tensor"):
        array += t


def test_argmax():
    t = tgs.tensor([[1.0, 3.0, 3.0], [2.0, 0.0, 1.0]], requires_grad=True)
    assert tgs.argmax(t, axis=1).tolist() == [1, 0]
    assert t.argmax().item() == 1
    assert tgs.argmin(t, axis=0).tolist() == [0, 1, 1]
    assert tgs.argmax(t[:0], axis=1).shape == (0,)
    with pytest.raises(tgs.ShapeError, match="argmax: shape"):
        tgs.argmax(t[:0])
    with pytest.raises(tgs.ShapeError, match="argmin: axis 2"):
        tgs.argmin(t, axis=2)
