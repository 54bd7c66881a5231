"""``scan`` on the device against ``unroll`` on the host: every cell, values and all gradients."""

from __future__ import annotations

import copy
import sys
from typing import Any

import cells
import numpy as np
import pytest

import tinygrad_seq as tgs
from tinygrad_seq import nn
from tinygrad_seq.errors import DeviceError
from tinygrad_seq.trees import leaves, map_leaves, structure

LENGTHS = np.array([3, 5, 0])
RESETS = np.array([[0, 1, 0], [0, 0, 0], [1, 0, 1], [0, 1, 0], [0, 0, 1]], bool)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lengths": {"lengths": LENGTHS},
    "reverse": {"reverse": True, "lengths": LENGTHS},
    "resets": {"resets": RESETS},
    "checkpoint": {"checkpoint": 2},
    "checkpoint with resets": {"checkpoint": 3, "resets": RESETS, "lengths": LENGTHS},
}


def results(drive, cell, xs, state, options, device, weigh):
    """Outputs, last states and all gradients, as NumPy's arrays."""
    tgs.manual_seed(1)
    cell = cell.to(device)

    def leaf(x):
        return tgs.tensor(x, requires_grad=x.dtype.kind == "f")

    given = map_leaves(leaf, xs), map_leaves(leaf, state)
    xs, state = map_leaves(lambda t: t.to(device), given)
    out = drive(cell, xs, state, **options)
    made = leaves(out)
    loss = sum(
        tgs.sum(y * tgs.tensor(w).to(device)) for y, w in zip(made, weigh(made), strict=True)
    )
    loss.backward()
    wanted = [*(t for t in leaves(given) if t.requires_grad), *cell.parameters()]
    return [y.numpy() for y in made], [None if t.grad is None else t.grad.numpy() for t in wanted]


def agree(name, rng, device, options, dtype="float64", T=5, B=3, I=4, H=6, tolerance=1e-10):
    cell = cells.CELLS[name](rng, dtype, I, H)
    xs = cells.make_inputs(name, rng, T, B, I, dtype)
    state = map_leaves(lambda h: rng.standard_normal(h.shape).astype(dtype), cell.initial_state(B))
    drawn: list[np.ndarray] = []

    def weigh(made):
        if not drawn:
            drawn.extend(rng.standard_normal(y.shape).astype(dtype) for y in made)
        return drawn

    plain = {k: v for k, v in options.items() if k != "checkpoint"}
    expected = results(tgs.unroll, copy.deepcopy(cell), xs, state, plain, "cpu", weigh)
    found = results(tgs.scan, copy.deepcopy(cell), xs, state, options, device, weigh)
    for e, f in zip([*expected[0], *expected[1]], [*found[0], *found[1]], strict=True):
        if e is None or f is None:
            assert not np.any(e if f is None else f)
            continue
        assert f.dtype == e.dtype
        scale = max(1.0, float(np.abs(e).max(initial=0)))
        np.testing.assert_allclose(f, e, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("name", cells.CELLS)
def test_every_cell(name, rng, device, way):
    agree(name, rng, device, {})


@pytest.mark.parametrize("name", ["lstm", "layer norm lstm", "two widths", "noisy"])
@pytest.mark.parametrize("options", OPTIONS)
def test_every_way_to_run(name, options, rng, device, way):
    agree(name, rng, device, OPTIONS[options])


def test_many_steps_by_steps(rng, device, by_steps):
    """So many that most of them are a graph."""
    agree("gru", rng, device, {"lengths": np.array([70, 3, 41])}, T=70, B=3)
    agree("gru", rng, device, {}, dtype="float32", T=40, tolerance=1e-4)


def test_a_matrix_of_every_second_column(rng, device, way):
    """No product of the vendor's reads it as it is."""
    found = []
    given = rng.standard_normal((4, 3, 5)), rng.standard_normal((3, 5))
    values = rng.standard_normal((5, 10))
    for drive, place in ((tgs.unroll, "cpu"), (tgs.scan, device)):
        W = tgs.tensor(values, requires_grad=True)
        moved = W.to(place)

        def cell(x, h, moved=moved):
            h = tgs.tanh(x + h @ moved[:, ::2])
            return h, h

        ys, _ = drive(cell, *(tgs.tensor(array, device=place) for array in given))
        tgs.sum(ys * ys).backward()
        found.append([ys.numpy(), W.grad.numpy()])
    for cpu, cuda in zip(*found, strict=True):
        np.testing.assert_allclose(cuda, cpu, atol=1e-10)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 7, 1, 3), (3, 1, 5, 9), (4, 2, 3, 17)])
@pytest.mark.parametrize("name", ["gru", "minimal gated unit"])
def test_sizes(name, sizes, rng, device, way):
    T, B, I, H = sizes
    agree(name, rng, device, {}, T=T, B=B, I=I, H=H)


@pytest.mark.parametrize("name", ["lstm", "gru", "peephole", "layer norm lstm"])
def test_single_precision(name, rng, device):
    agree(name, rng, device, {}, dtype="float32", T=4, tolerance=1e-5)


def test_a_reset_overwrites_nothing_that_is_still_read(rng, device, divided):
    """One number of a row is read across units at the end of a step, and reset before the next."""
    U = tgs.tensor(rng.standard_normal((6, 6)))
    xs = tgs.tensor(rng.standard_normal((5, 3, 6)))
    state = tgs.tensor(rng.standard_normal((3, 6))), tgs.tensor(rng.standard_normal((3, 1)))
    found = []
    for drive, place in ((tgs.unroll, "cpu"), (tgs.scan, device)):
        W = U.to(place)

        def cell(x, state, W=W):
            h, g = state
            g = tgs.tanh(g + tgs.sum(h, axis=1, keepdims=True))
            h = tgs.tanh((h * g) @ W + x * g)
            return h, (h, g)

        given = map_leaves(lambda t, place=place: t.to(place), (xs, state))
        with tgs.no_grad():
            found.append([t.numpy() for t in leaves(drive(cell, *given, resets=RESETS))])
    for cpu, cuda in zip(*found, strict=True):
        np.testing.assert_allclose(cuda, cpu, atol=1e-10)


def test_what_begins_gradients_comes_before_what_writes_over_it(
    rng, device, laid_out_anew, monkeypatch
):
    """One part sets the gradient of a last state, another puts that of the last step there."""
    from tinygrad_seq.kernels import cuda_division

    def divide(work):
        shared = work.sums * work.B * work.item
        found = cuda_division.by_steps(work)
        return found._replace(groups=1, parts=2, rows=work.B, shared_bytes=shared)

    monkeypatch.setattr(cuda_division, "divide", divide)
    shapes = (4, 3, 6), (3, 6), (3, 1), (6, 6)
    values = [rng.standard_normal(shape) for shape in shapes]
    found = []
    for drive, place in ((tgs.unroll, "cpu"), (tgs.scan, device)):
        given = [tgs.tensor(value, requires_grad=True) for value in values]
        x, h, g, W = (t.to(place) for t in given)

        def cell(x, state, W=W):
            h, g = state
            return x * g, (tgs.tanh(h @ W + x), tgs.sum(h, axis=1, keepdims=True))

        ys, state = drive(cell, x, (h, g))
        tgs.sum(ys * ys + tgs.sum(state[1])).backward()
        found.append([ys.numpy(), *(t.grad.numpy() for t in given)])
    for cpu, cuda in zip(*found, strict=True):
        np.testing.assert_allclose(cuda, cpu, atol=1e-10)


def test_blocks_are_counted_beyond_what_an_int32_counts():
    """As many come to the barriers of some million steps, if all of a device share a row."""
    from tinygrad_seq.kernels.cuda_build import SIMULATED, integers

    if not SIMULATED:
        pytest.skip("the counter is in the host's memory")
    counter = np.array([2**31 - 1])
    integers["add_release"](counter.ctypes.data, 1)
    assert integers["acquire"](counter.ctypes.data) == 2**31


def test_a_cell_asks_where_its_input_is(rng, device):
    """What it makes there is where the step is, and so is an index; a second call follows it."""
    found = []
    given = rng.standard_normal((3, 2, 3)), rng.standard_normal((2, 3))
    for drive, place in ((tgs.unroll, "cpu"), (tgs.scan, device), (tgs.scan, device)):
        order = tgs.tensor([2, 0, 1], device=place)

        def cell(x, h, order=order):
            more = tgs.full((2, 2), 0.5, "float64", device=x.device)
            h = tgs.tanh(x + tgs.concat([h[:, :1], more], axis=-1)[:, order]).to(h.device)
            return h, h

        xs, h = (tgs.tensor(array, requires_grad=True) for array in given)
        ys, _ = drive(cell, xs.to(place), h.to(place))
        tgs.sum(ys * ys).backward()
        found.append([ys.numpy(), xs.grad.numpy(), h.grad.numpy()])
    for again in found[1:]:
        for cpu, cuda in zip(found[0], again, strict=True):
            np.testing.assert_allclose(cuda, cpu, atol=1e-12)


NUMBERS = {
    "a scalar of NumPy's": lambda x, h: h * np.float32(0.5) + x,
    "an integer": lambda x, h: h * np.int8(2) + x,
    "an array without axes": lambda x, h: h * np.array(0.5, "float32") + x,
    "a condition": lambda x, h: h * True + x,
    "two that are chosen from": lambda x, h: tgs.where(h > 0, 1.0, 0.5) * x + h,
    "one that is compared with": lambda x, h: tgs.where(h > np.float32(0.1), h, x),
    "a base": lambda x, h: 2 ** tgs.tanh(h) + np.float32(0.5) ** x,
    "a slope": lambda x, h: tgs.leaky_relu(h, np.float32(0.1)) + x,
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_in_a_cell_go_with_any_device(name, rng, device):
    found = []
    given = [rng.standard_normal(shape).astype("float32") for shape in ((3, 2, 3), (2, 3))]

    def cell(x, h):
        h = NUMBERS[name](x, h)
        return h, h

    for drive, place in ((tgs.unroll, "cpu"), (tgs.scan, device)):
        xs, h = (tgs.tensor(array, requires_grad=True) for array in given)
        ys, _ = drive(cell, xs.to(place), h.to(place))
        tgs.sum(ys * ys).backward()
        found.append([ys.numpy(), xs.grad.numpy(), h.grad.numpy()])
    for cpu, cuda in zip(*found, strict=True):
        np.testing.assert_allclose(cuda, cpu, rtol=1e-5, atol=1e-5)


def test_layers(rng, device):
    """Two layers both ways, with lengths, as ``nn`` runs them."""
    model = nn.LSTM(4, 5, num_layers=2, bidirectional=True, rng=rng, dtype="float64")
    x = rng.standard_normal((5, 3, 4))
    found = []
    for place in ("cpu", device):
        moved = copy.deepcopy(model).to(place)
        moved.backend = "tape" if place == "cpu" else "scan"
        hs, _ = moved(tgs.tensor(x).to(place), lengths=[5, 2, 3])
        assert hs.device == place
        tgs.sum(hs * hs).backward()
        found.append([hs.numpy(), *(p.grad.numpy() for p in moved.parameters())])
    for cpu, cuda in zip(*found, strict=True):
        np.testing.assert_allclose(cuda, cpu, atol=1e-10)


def test_layers_share_the_order_of_rows(rng, device):
    """Sequences of the same lengths are run through in the same order: it is copied once."""
    from tinygrad_seq.kernels import cuda

    layers = nn.GRU(3, 4, num_layers=3, rng=rng).to(device)
    cuda._on_device.cache_clear()
    layers(tgs.ones(4, 2, 3, device=device), lengths=[4, 2])
    assert cuda._on_device.cache_info().misses == 1


def test_nothing_comes_back_to_the_host(rng, device):
    fake = sys.modules.get("fake_cupy")
    if fake is None:
        pytest.skip("copies are counted in the simulator alone")
    cell = nn.LSTMCell(3, 4, rng=rng).to(device)
    x = tgs.tensor(rng.standard_normal((4, 2, 3)).astype("f4")).to(device)

    def step():
        ys, _ = tgs.scan(cell, x)
        tgs.sum(ys).backward()

    step()
    fake.transfers.clear()
    step()
    assert fake.transfers["to_host"] == 0
    assert fake.transfers["to_device"] <= 2  # the initial state's zeros are made there


def test_a_gradient_that_is_one_number_everywhere(rng, device):
    """As a sum's is: it takes the memory of one number, and kernels read whole rows."""
    cell = nn.GRUCell(3, 4, rng=rng, dtype="float64")
    x = rng.standard_normal((4, 2, 3))
    found = []
    for drive, place in ((tgs.unroll, "cpu"), (tgs.scan, device)):
        moved = copy.deepcopy(cell).to(place)
        ys, _ = drive(moved, tgs.tensor(x).to(place))
        tgs.sum(ys).backward()
        found.append([p.grad.numpy() for p in moved.parameters()])
    for cpu, cuda in zip(*found, strict=True):
        np.testing.assert_allclose(cuda, cpu, atol=1e-10)


def test_stepper(rng, device):
    cell = nn.GRUCell(3, 4, rng=rng, dtype="float64").to(device)
    x = tgs.tensor(rng.standard_normal((4, 2, 3))).to(device)
    step = tgs.Stepper(cell, x[0])
    ys = np.stack([step(x[t]).numpy() for t in range(4)])
    np.testing.assert_allclose(ys, tgs.scan(cell, x)[0].numpy(), atol=1e-12)
    with pytest.raises(DeviceError, match="Stepper: x is on cpu, and the stepper on cuda"):
        step(np.zeros((2, 3)))


def test_generation(rng, device):
    model = nn.Sequential(nn.Embedding(5, 3, rng=rng), nn.GRU(3, 4, rng=rng), nn.Linear(4, 5))
    expected = tgs.generate(model, [[1, 2], [3, 4]], 5, temperature=0)
    found = tgs.generate(model.to(device), [[1, 2], [3, 4]], 5, temperature=0)
    np.testing.assert_array_equal(found, expected)


def test_nothing_to_do(rng, device):
    cell = nn.RNNCell(3, 4, rng=rng).to(device)
    for T, B in ((0, 2), (2, 0)):
        ys, state = tgs.scan(cell, tgs.zeros(T, B, 3, device=device))
        assert (ys.shape, state.shape) == ((T, B, 4), (B, 4))
        assert ys.device == state.device == device
    ys, _ = tgs.scan(cell, tgs.ones(2, 2, 3, device=device), lengths=[0, 0])
    assert not ys.numpy().any()


def test_values_of_no_width(rng, device, way):
    """Features that a configuration leaves out, for instance; their gradients are empty."""
    shapes = (4, 2, 0), (2, 0), (2, 3), (0, 3), (0, 3), (2, 0)
    values = [rng.standard_normal(shape) for shape in shapes]
    found = []
    for drive, place in ((tgs.unroll, "cpu"), (tgs.scan, device)):
        given = [tgs.tensor(value, requires_grad=True) for value in values]
        x, s, h, W, U, c = (t.to(place) for t in given)

        def cell(x, state, W=W, U=U, c=c):
            s, h = state
            h = tgs.tanh(x @ W + (s * c) @ U + s @ W + h)
            return h, (s, h)

        ys, _ = drive(cell, x, (s, h), lengths=[4, 2])
        tgs.sum(ys * ys).backward()
        found.append([ys.numpy(), *(t.grad.numpy() for t in given)])
    for cpu, cuda in zip(*found, strict=True):
        np.testing.assert_allclose(cuda, cpu, atol=1e-10)


def test_second_derivatives(rng, device):
    """They run step by step on the tape, on the device too."""
    cell = nn.RNNCell(2, 3, rng=rng, dtype="float64")
    x = rng.standard_normal((3, 2, 2))
    found = []
    for place in ("cpu", device):
        moved = copy.deepcopy(cell).to(place)
        drive = tgs.unroll if place == "cpu" else tgs.scan
        ys, _ = drive(moved, tgs.tensor(x).to(place))
        tgs.sum(ys * ys).backward(create_graph=True)
        g = moved.weight_hh.grad
        moved.zero_grad()
        tgs.sum(g * g).backward()
        found.append(moved.weight_hh.grad.numpy())
    np.testing.assert_allclose(found[1], found[0], atol=1e-10)


def test_errors(rng, device):
    cell = nn.RNNCell(2, 3, rng=rng)
    x = tgs.zeros(3, 2, 2, device=device)
    state = tgs.zeros(2, 3, device=device)
    with pytest.raises(DeviceError, match=r"scan: xs is on cuda, but a tensor of .* on cpu"):
        tgs.scan(cell, x, state)


def test_the_plan_says_how_a_step_is_divided(rng, device):
    cell = nn.LSTMCell(3, 4, rng=rng).to(device)
    x = tgs.tensor(rng.standard_normal((4, 2, 3)).astype("f4")).to(device)
    text = str(tgs.explain(cell, x))
    for direction in ("forward", "backward"):
        assert f"on the GPU, {direction}: " in text
    assert "weights stay in shared memory" in text
    source = tgs.kernel_source(cell, x, backward=True)
    assert "barrier(counter, met, parts)" in source.text
    assert source.path.read_text(encoding="utf-8") == source.text


def test_trees_are_given_back(rng, device):
    """The structure of what a cell returns is kept."""
    cell = cells.CELLS["nested"](rng, "float32", 3, 4).to(device)
    x = tgs.tensor(rng.standard_normal((2, 2, 3)).astype("f4")).to(device)
    on_host = copy.deepcopy(cell).to("cpu")
    y, state = tgs.scan(cell, x)
    expected, last = tgs.unroll(on_host, x.to("cpu"))
    assert structure(y) == structure(expected)
    for a, b in zip(leaves((y, state)), leaves((expected, last)), strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), atol=1e-6)
