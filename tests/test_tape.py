"""Recording, the walk back, what is freed when, and the tape that prints and checks itself."""

from __future__ import annotations

import gc
import sys
import threading
import weakref

import numpy as np
import pytest

import tinygrad_seq as tgs
from tinygrad_seq.tape import Entry, walk
from tinygrad_seq.tensors import entry_of


def leaf(*values: float) -> tgs.Tensor:
    return tgs.tensor(list(values), requires_grad=True)


def test_a_tape_lists_what_is_recorded():
    x, c = leaf(1.0, 2.0), tgs.tensor([3.0, 4.0])
    with tgs.Tape() as tape:
        y = tgs.tanh(x * c + 1)
        with tgs.no_grad():
            x * x
        c * c  # needs no gradient
    x * x  # outside
    assert [line.op for line in tape] == ["leaf", "constant", "multiply", "add", "tanh"]
    assert [line.index for line in tape] == [0, 1, 2, 3, 4]
    assert [line.inputs for line in tape] == [(), (), (0, 1), (2,), (3,)]
    assert all(line.shape == (2,) and line.dtype == np.float32 for line in tape)
    assert len(tape) == 5
    assert tape[4].op == "tanh"
    tape.check()
    y.sum().backward()
    tape.check()


def test_print_is_an_aligned_table():
    W, x = tgs.zeros(2, 3, requires_grad=True), tgs.zeros(3, 1)
    with tgs.Tape(W=W, x=x) as tape:
        (W @ x * 0.5)[0].T.sum(axis=0)
    assert str(tape).splitlines() == [
        "slot  operation               inputs  shape   dtype",
        "%0    W                               (2, 3)  float32",
        "%1    x                               (3, 1)  float32",
        "%2    matmul(%0, %1)          %0, %1  (2, 1)  float32",
        "%3    multiply(%2, 0.5)       %2      (2, 1)  float32",
        "%4    getitem(%3, (0,))       %3      (1,)    float32",
        "%5    permute_dims(%4, (0,))  %4      (1,)    float32",
        "%6    sum(%5, (0,), False)    %5      ()      float32",
    ]
    assert repr(tape) == "<Tape of 7 lines>"
    with tgs.Tape() as empty:
        pass
    assert "nothing was recorded" in str(empty)
    with tgs.Tape() as many:
        tgs.stack([x + W[0] for _ in range(50)])
    assert "…" in str(many)


def test_tapes_nest_and_forget_nothing():
    x = leaf(1.0)
    with tgs.Tape() as outer:
        a = x * 2
        with tgs.Tape() as inner:
            b = a * 3
    assert [line.op for line in outer] == ["leaf", "multiply", "multiply"]
    assert [line.op for line in inner] == ["earlier", "multiply"]  # a was made before it
    assert inner[0].entry is a._entry
    assert inner[0].op == "earlier"
    assert b.requires_grad


def test_a_scan_is_checked_too():
    layer = tgs.nn.LSTM(2, 3)
    with tgs.Tape() as tape:
        layer(np.ones((4, 1, 2), "f4"))[0].sum()
    assert [line.op for line in tape if line.op in ("scan", "output")] == ["scan", *["output"] * 3]
    tape.check()


def test_names_reach_into_transforms():
    x = leaf(1.0, 2.0)
    with tgs.Tape(x=x) as tape:
        tgs.grad(lambda z: (z**3).sum())(x)
    assert [line.op for line in tape][:3] == ["x", "input", "scalar_power"]
    tape.check()


def test_check_finds_what_is_wrong():
    def tape() -> tgs.Tape:
        x = leaf(1.0, 2.0)
        with tgs.Tape() as made:
            tgs.tanh(x * x)
        return made

    from dataclasses import replace

    wrong = tape()
    wrong._lines[2] = replace(wrong._lines[2], inputs=(2,))
    wrong._slots[wrong._lines[2].entry] = 2
    with pytest.raises(tgs.TapeError, match="do not all stand before it"):
        wrong.check()
    wrong = tape()
    wrong._lines[2] = replace(wrong._lines[2], shape=(3,))
    with pytest.raises(tgs.TapeError, match=r"float32\(3,\) is listed"):
        wrong.check()
    wrong = tape()
    wrong._lines[2] = replace(wrong._lines[2], inputs=(0,))
    with pytest.raises(tgs.TapeError, match="not the entries"):
        wrong.check()
    wrong = tape()
    wrong._lines[1], wrong._lines[2] = wrong._lines[2], wrong._lines[1]
    with pytest.raises(tgs.TapeError, match="own index"):
        wrong.check()
    for change in ({"shape": (3,)}, {"dtype": np.dtype("f8")}):
        x = leaf(1.0)
        with tgs.Tape() as numbers:
            x + 2
        numbers._lines[1] = replace(numbers._lines[1], **change)
        with pytest.raises(tgs.TapeError, match="its inputs make"):
            numbers.check()
    with pytest.raises(ValueError, match="expected a tensor to list by name"):
        tgs.Tape(x=np.ones(2))
    x = leaf(1.0)
    with tgs.Tape() as stale:
        y = x * x
    x.data = [2.0]
    with pytest.raises(tgs.TapeError, match="assigned since"):
        stale.check()
    assert y.item() == 1


def test_gradients_accumulate():
    x = leaf(2.0)
    (x * x).backward()
    (x * 3).backward()
    assert x.grad.tolist() == [7]


def test_backward_errors():
    x = leaf(1.0, 2.0)
    with pytest.raises(tgs.TapeError, match=r"shape \(2,\) was given, expected one element"):
        (x * 2).backward()
    with pytest.raises(tgs.TapeError, match="does not require a gradient"):
        tgs.ones(1).backward()
    with tgs.no_grad():
        y = x.sum()
    with pytest.raises(tgs.TapeError, match="no_grad"):
        y.backward()
    with pytest.raises(tgs.ShapeError, match=r"gradient: shape \(3,\) was given, expected \(2,\)"):
        (x * 2).backward(np.ones(3))
    with pytest.raises(tgs.TapeError, match="requires_grad=True"):
        tgs.tensor(2.0).backward()


def test_backward_twice():
    x = leaf(1.0, 2.0)
    y = (x * x).sum()
    y.backward()
    with pytest.raises(tgs.TapeError, match="retain_graph=True"):
        y.backward()
    h = x * x
    a, b = h.sum(), (h * 2).sum()
    a.backward()
    with pytest.raises(tgs.TapeError, match="freed by an earlier backward"):
        b.backward()
    x.grad = None
    y = (x * x).sum()
    y.backward(retain_graph=True)
    y.backward()
    assert x.grad.tolist() == [4, 8]


def test_the_gradient_given_is_copied():
    x, g = leaf(1.0, 2.0), np.ones(2, "f4")
    (x + 0).backward(g)
    g[:] = 50
    assert x.grad.tolist() == [1, 1]


class TestChangedData:
    """A backward that needs an older value raises; one that does not need it goes on."""

    def test_input(self):
        x = leaf(1.0)
        y = x * x
        x.data = [5.0]
        with pytest.raises(tgs.TapeError, match="multiply needs the value"):
            y.backward()

    def test_output(self):
        x = leaf(1.0)
        y = tgs.tanh(x)
        z = y * 1.0
        y.data = [5.0]
        with pytest.raises(tgs.TapeError, match="tanh needs"):
            z.backward()

    def test_constant(self):
        x, c = leaf(1.0), tgs.tensor([2.0])
        y = x * c
        c.data = [3.0]
        with pytest.raises(tgs.TapeError, match="multiply needs"):
            y.backward()

    def test_through_views(self):
        x = leaf(1.0, 2.0)
        y = (x.reshape(2, 1).T[0] * x.reshape(1, 2)[0]).sum()
        x.data = [5.0, 6.0]
        with pytest.raises(tgs.TapeError, match="needs the value"):
            y.backward()

    def test_not_needed(self):
        x = leaf(1.0)
        y = x + 2
        x.data = [5.0]
        y.backward()
        assert x.grad.tolist() == [1]

    def test_changed_before(self):
        x = leaf(1.0)
        x.data = [5.0]
        (x * x).backward()
        assert x.grad.tolist() == [10]


def test_memory_goes_at_once():
    """No cycles: with the collector off, a graph dies with its last user, and in backward."""
    gc.collect()
    gc.disable()
    try:
        x = leaf(1.0, 2.0)
        h = tgs.tanh(x)
        kept = weakref.ref(h._data)
        y = (h * h).sum()
        del h
        assert kept() is not None
        y.backward()
        assert kept() is None  # y is still there
        h = tgs.tanh(x)
        kept = weakref.ref(h._data)
        y = (h * h).sum()
        del h, y
        assert kept() is None
        y = tgs.exp(x).sum()
        y.backward(create_graph=True)
        second = weakref.ref(x.grad._data)
        x.grad = None
        del y
        assert second() is None
    finally:
        gc.enable()


def test_only_what_is_needed_is_kept():
    x = leaf(1.0, 2.0)
    h = x * 2
    data = weakref.ref(h._data)
    y = tgs.tanh(h)  # tanh keeps its output, not its input
    del h
    assert data() is None
    y.sum().backward()
    c = tgs.tensor([1.0, 1.0])
    y = x * c
    assert y._entry.saved[0] is None  # c's gradient is not wanted, so x is not kept


def test_a_forgotten_no_grad_leaks_nothing():
    x = leaf(1.0)
    gc.collect()
    gc.disable()
    try:
        before = sum(type(o) is Entry for o in gc.get_objects())
        for _ in range(100):
            tgs.tanh(x * x).item()
        assert sum(type(o) is Entry for o in gc.get_objects()) == before
    finally:
        gc.enable()


@pytest.mark.parametrize("steps", [100_000])
def test_deep_graphs_need_no_recursion(steps):
    assert sys.getrecursionlimit() < steps
    w = leaf(1.0)
    h = w
    for _ in range(steps):
        h = h * 1.0
    h.backward()
    assert w.grad.tolist() == [1]
    h = w
    for _ in range(steps):
        h = h * 1.0
    del h  # as deep on the way down


def test_recording_is_per_thread():
    x = leaf(1.0)
    seen = {}

    def other() -> None:
        seen["recorded"] = (x * 2).requires_grad
        with tgs.no_grad():
            seen["off"] = (x * 2).requires_grad

    with tgs.no_grad(), tgs.Tape() as tape:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert not (x * 2).requires_grad
    assert seen == {"recorded": True, "off": False}
    assert len(tape) == 0


def test_threads_accumulate_into_one_leaf():
    x = leaf(1.0)

    def work() -> None:
        for _ in range(300):
            (x * 2).backward()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert x.grad.tolist() == [2 * 4 * 300]


def test_check_after_a_part_was_freed():
    x = leaf(1.0, 2.0)
    with tgs.Tape() as tape:
        y = x.reshape(2, 1)
        a, b = (y * y).sum(), y * y
    a.backward()
    x.data = [3.0, 4.0]
    tape._lines = tape._lines[:]
    with pytest.raises(tgs.TapeError, match="freed"):
        b.sum().backward()
    tape.check()


def test_check_of_a_tape_that_starts_in_the_middle():
    w = leaf(2.0)
    h = w * 2
    with tgs.Tape() as tape:
        h * 3
        tgs.grad(lambda w: (w * w).sum())(w)
    tape.check()
    with tgs.Tape() as once, pytest.raises(tgs.TapeError, match="open already"), once:
        pass


def test_no_grad_shared_by_threads():
    off, inside, leave = tgs.no_grad(), threading.Event(), threading.Event()
    seen = {}

    def other() -> None:
        with off:
            inside.set()
            leave.wait()
        seen["recorded"] = (leaf(1.0) * 2).requires_grad

    thread = threading.Thread(target=other)
    with off:
        with off:
            thread.start()
            inside.wait()
        assert not (leaf(1.0) * 2).requires_grad
    leave.set()
    thread.join()
    assert (leaf(1.0) * 2).requires_grad
    assert seen == {"recorded": True}


def test_changed_data_off_the_way_does_not_matter():
    w = leaf(2.0)
    _, pullback = tgs.vjp(lambda a: (a * 3, (w * w).sum()), np.ones(2))
    w.data = [5.0]
    assert pullback((np.ones(2), 0.0))[0].tolist() == [3, 3]


def test_no_grad_wants_parentheses():
    with pytest.raises(ValueError, match=r"write @tgs\.no_grad\(\), with \(\)"):

        @tgs.no_grad
        def f() -> None: ...

    with pytest.raises(ValueError, match="a generator or an async function was given"):

        @tgs.no_grad()
        def g():
            yield 1

    with pytest.raises(ValueError, match=r"write Tape\(x=x\)"):
        tgs.Tape(leaf(1.0))


def test_no_grad_nests():
    x, off = leaf(1.0), tgs.no_grad()
    with off, off:
        pass
    assert (x * 2).requires_grad


def test_two_threads_through_one_graph():
    """Who finishes has added the whole gradient, who comes too late is told; one finishes."""

    def chain() -> tuple[tgs.Tensor, tgs.Tensor]:
        x = leaf(1.0, 2.0)
        h = x
        for _ in range(100):
            h = tgs.tanh(h * 1.01) + 0.1 * h
        return x, h.sum()

    def go(y: tgs.Tensor, together: threading.Barrier, told: list[str], create: bool) -> None:
        together.wait()
        try:
            y.backward(retain_graph=False, create_graph=create)
        except tgs.TapeError as error:
            told.append(str(error))

    alone, y = chain()
    y.backward()
    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for create in (False, True) * 15:
            x, y = chain()
            told: list[str] = []
            arguments = (y, threading.Barrier(2), told, create)
            threads = [threading.Thread(target=go, args=arguments) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            finished = 2 - len(told)
            assert finished >= 1
            assert all("freed" in words for words in told)
            np.testing.assert_allclose(x.grad.numpy(), finished * alone.grad.numpy(), rtol=1e-5)
    finally:
        sys.setswitchinterval(switching)


def test_no_grad_decorates():
    x = leaf(1.0)

    @tgs.no_grad()
    def f() -> tgs.Tensor:
        """Doubles."""
        return x * 2

    assert not f().requires_grad
    assert f.__doc__ == "Doubles."
    assert (x * 2).requires_grad


def test_walk_returns_only_what_is_wanted():
    a, b = leaf(1.0), leaf(2.0)
    y = a * b
    from tinygrad_seq.structural import ARRAYS

    found = walk({y._entry: np.ones(1, "f4")}, ARRAYS, [entry_of(a)])
    assert list(found) == [a._entry]
