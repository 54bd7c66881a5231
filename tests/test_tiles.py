"""Products of float32 by tiles of bfloat16: plain everywhere, compiled where there are any."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tinygrad_seq.kernels import build, cpu, layout, machine, memory, tiles

import tinygrad_seq as tgs
from tinygrad_seq.recurrence import compiled

TILES = pytest.mark.skipif(not machine.tiles(), reason="this processor has no tiles for bfloat16")
sizes = st.sampled_from([1, 2, 15, 16, 17, 31, 32, 33, 63, 65, 100])


def product(a, b, c=None):
    """a b, or c + a b, by the functions of tiles."""
    (M, K), N = a.shape, b.shape[1]
    panels = -(-N // tiles.COLUMNS)
    packed = memory.Block(tiles.matrix_bytes(K, N))
    split = memory.Block(tiles.split_bytes(K, M))
    out = np.full((M, panels * tiles.COLUMNS), np.nan, "f4")
    if c is not None:
        out[:] = 0
        out[:, :N] = c
    row, column = (stride // 4 for stride in b.strides)
    pack, multiply = (build.shared(f"{each}_in_tiles", "float32") for each in ("pack", "product"))
    pack(memory.address(b), row, column, K, N, packed.address, 0, panels)
    given = memory.address(a), K, M, packed.address, K, panels
    multiply(*given, memory.address(out), out.shape[1], int(c is not None), split.address)
    return out[:, :N]


@given(st.integers(1, 9000), st.integers(1, 300), st.data())
def test_split_rows_fit_their_memory(K, rows, data):
    """As ``product_in_tiles`` divides them, fewer rows than were foreseen too."""
    fewer = data.draw(st.integers(1, min(rows, tiles.MOST_ROWS)))
    blocks = -(-fewer // tiles.LINES)
    most = max(1, tiles.MOST_SPLIT // tiles.A_SPAN // blocks)
    used = tiles.CONFIGURATION + blocks * min(most, tiles.spans(K)) * tiles.A_SPAN
    assert used <= tiles.split_bytes(K, rows)


def arrays(seed, M, K, N, transposed=False):
    rng = np.random.default_rng(seed)
    a, b, c = (
        (rng.standard_normal(shape) * np.exp(rng.uniform(-9, 9, shape))).astype("f4")
        for shape in ((M, K), (K, N), (M, N))
    )
    return a, np.asfortranarray(b) if transposed else b, c


def check_product(seed, M, K, N, transposed, adds, places=()):
    """Within the worst error of sums in float32; what is not finite as NumPy has it."""
    a, b, c = arrays(seed, M, K, N, transposed)
    rng = np.random.default_rng(seed + 1)
    for which, value in places:
        array = (a, b)[which]
        array[rng.integers(len(array)), rng.integers(array.shape[1])] = value
    found = product(a, b, c if adds else None)
    with np.errstate(all="ignore"):
        a, b, c = (each.astype("f8") for each in (a, b, c * adds))
        expected = c + a @ b
        bound = (abs(c) + abs(a) @ abs(b)) * 2.0**-24 * (2 + 6 * K)  # six sums for each k
        finite = abs(expected) < 3e38
        assert (abs(found - expected)[finite] <= bound[finite]).all()
        np.testing.assert_array_equal(found[~finite], expected.astype("f4")[~finite])


NAN, INF = np.nan, np.inf
ODD = [(), ((0, INF),), ((0, NAN),), ((1, -INF),), ((0, 3.4e38),), ((1, NAN),)]
ODD += [((0, NAN), (0, INF), (0, INF)), ((1, NAN), (0, -INF)), ((1, INF), (1, NAN))]


@TILES
@given(st.integers(0, 99), sizes, sizes, sizes, st.booleans(), st.booleans(), st.sampled_from(ODD))
@settings(max_examples=200)
def test_products(seed, M, K, N, transposed, adds, places):
    check_product(seed, M, K, N, transposed, adds, places)


@TILES
@pytest.mark.parametrize("K", [64, 512])
def test_the_error_is_no_larger_than_that_of_vectors(K, rng):
    a, b = rng.standard_normal((64, K), "f4"), rng.standard_normal((K, 64), "f4")
    true = a.astype("f8") @ b.astype("f8")
    ours, theirs = (np.sqrt(np.mean((found - true) ** 2)) for found in (product(a, b), a @ b))
    assert ours < 1.5 * theirs


@TILES
@pytest.mark.parametrize("x", [0.1, 1 / 3, 1.7])
def test_the_error_of_sums_of_equal_numbers(x):
    a, b = np.full((32, 256), x, "f4"), np.full((256, 32), x, "f4")
    np.testing.assert_allclose(product(a, b), 256 * float(a[0, 0]) ** 2, rtol=2e-5)


def test_gradients_that_would_leave_tiles_empty_are_for_vectors():
    assert tiles.filled([(64, 256), (2, 256)])
    assert tiles.filled([(16, 16), (9, 30)])
    assert not tiles.filled([(3, 3)])
    assert not tiles.filled([(1, 80), (20, 80)])


@TILES
@given(st.integers(0, 99), st.integers(1, 70), sizes)
@settings(max_examples=50)
def test_a_row_has_the_same_bits_in_any_company(seed, M, K):
    a, b, _ = arrays(seed, M, K, 70)
    together = product(a, b)
    for m in {0, M // 2, M - 1}:
        assert np.array_equal(product(a[m : m + 1].copy(), b), together[m : m + 1])
        assert np.array_equal(product(a[m:].copy(), b), together[m:])
    a[0, 0] = np.inf
    assert np.array_equal(product(a, b)[1:], together[1:])


PLAIN = """
import numpy as np
import sys
sys.path.insert(0, {folder!r})
from tinygrad_seq.kernels import tiles
tiles.used = lambda dtype: dtype == "float32"
import test_tiles
for number, places in enumerate(test_tiles.ODD):
    test_tiles.check_product(number, 17 + 2 * number, 33, 35, number % 2 == 0, True, places)
test_tiles.check_product(9, 1, 1, 1, False, False)
test_tiles.check_product(9, 3, 40, 65, True, False)
print("good")
"""


def test_with_the_compiler_switched_off(tmp_path):
    folder = os.path.dirname(__file__)
    done = subprocess.run(
        [sys.executable, "-c", PLAIN.format(folder=folder)],
        env={**os.environ, "NUMBA_DISABLE_JIT": "1", "TINYGRAD_SEQ_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout == "good\n", done.stderr


@TILES
def test_they_can_be_done_without():
    program = "from tinygrad_seq.kernels import machine; print(machine.about_tiles())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TINYGRAD_SEQ_TILES": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "no: TINYGRAD_SEQ_TILES=0\n"


@TILES
def test_plain_functions_and_compiled_ones_have_the_same_pieces(rng):
    plain = tiles._plain()
    text = '''"""Functions of tiles by themselves."""

from tinygrad_seq.kernels import tiles
from tinygrad_seq.kernels.simd import put_word

globals().update(vars(tiles.functions()))


def pieces(x, nx, y, ny, to, odd):
    put_word(odd, 0, split(x, nx, y, ny, to, 1024))


def turn(tile):
    transpose(tile)
'''
    compiled = build.load("pieces", text, {"pieces": 6, "turn": 1})
    x = (rng.standard_normal(32) * np.exp(rng.uniform(-60, 60, 32))).astype("f4")
    for value in (None, np.nan, np.inf, -np.inf, -3.4e38, 0.0):
        if value is not None:
            x[rng.integers(32)] = value
        made = []
        for split in (compiled["pieces"], None):
            block = memory.Block(3 * tiles.TILE)
            view = block.view(0, (3, 256), np.dtype("u4"))
            view[:] = 0
            at, odd = memory.address(x), np.zeros(1, np.int64)
            if split is None:
                odd[0] = plain.split(at, 16, at + 64, 13, block.address, tiles.TILE)
            else:
                split(at, 16, at + 64, 13, block.address, memory.address(odd))
            made.append((view[:, :16].copy(), int(odd[0])))
        assert np.array_equal(made[0][0], made[1][0])
        assert made[0][1] == made[1][1]
    tile = memory.Block(tiles.TILE)
    view = tile.view(0, (16, 16), np.dtype("u4"))
    view[:] = rng.integers(0, 2**32, (16, 16))
    before = view.copy()
    compiled["turn"](tile.address)
    assert np.array_equal(view, before.T)
    plain.transpose(tile.address)
    assert np.array_equal(view, before)


@pytest.mark.parametrize("kind", [tgs.nn.LSTMCell, tgs.nn.GRUCell])
@pytest.mark.parametrize("B", [16, 49])
def test_a_scan_large_enough_for_tiles(kind, B, rng):
    """Against unroll in float64; the same bits on any number of threads."""
    T, I, H = 35, 19, 37
    cell = kind(I, H, rng=rng)
    x = rng.standard_normal((T, B, I)).astype("f4")
    dy = rng.standard_normal((T, B, H)).astype("f4")
    options = {"lengths": rng.integers(0, T + 1, B), "resets": rng.random((T, B)) < 0.1}

    def run(driver, dtype, **more):
        own = cell.to(dtype)
        own.zero_grad()
        xs = tgs.tensor(x.astype(dtype), requires_grad=True)
        ys, _ = driver(own, xs, **options, **more)
        ys.backward(dy.astype(dtype))
        return [np.array(t) for t in (ys.detach(), xs.grad, *(p.grad for p in own.parameters()))]

    threads = tgs.get_num_threads()
    try:
        found = []
        for n in (1, 2, 3):
            tgs.set_num_threads(n)
            found.append(run(tgs.scan, "float32"))
    finally:
        tgs.set_num_threads(threads)
    for other in found[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(found[0], other, strict=True))
    found.append(run(tgs.scan, "float32", checkpoint=4))
    expected = run(tgs.unroll, "float64")
    for each in (found[0], found[-1]):
        for a, b in zip(each, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6 * abs(b).max())


@pytest.mark.parametrize(("I", "H"), [(3, 64), (8, 16), (16, 64)])
def test_which_matrices_are_in_tiles_does_not_depend_on_threads(monkeypatch, I, H):
    made = []

    def noted(*given):
        made.append(given)
        return layout.Layout(*given)

    monkeypatch.setattr(cpu, "Layout", noted)
    monkeypatch.setattr(compiled, "_runners", {})  # which have layouts
    x = tgs.tensor(np.zeros((60, 40, I), "f4"), requires_grad=True)
    tgs.sum(tgs.scan(tgs.nn.LSTMCell(I, H, rng=0), x)[0]).backward()
    assert len(made) == 2  # forward and backward
    monkeypatch.setattr(tiles, "used", lambda dtype: True)
    for *others, sizes in made:
        found = [layout.Layout(*others, sizes._replace(threads=n)).values for n in (1, 2, 4, 8, 16)]
        names = [name for name in found[0] if name.startswith("m") and name.endswith("_tiles")]
        assert len(names) == 2
        assert len({tuple(values[name] for name in names) for values in found}) == 1
