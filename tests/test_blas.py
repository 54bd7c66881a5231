"""NumPy's product, by several threads too, and OpenBLAS's own threads given back."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import tinygrad_seq as tgs
from tinygrad_seq import blas


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("n", "k", "m"),
    [
        (10, 40, 50),
        (3000, 40, 50),
        (3000, 40, 100),
        (40, 100, 3000),
        (300, 3000, 10),
        (49, 4000, 50),
    ],
)
def test_the_product_is_numpys(rng, dtype, n, k, m):
    a, b = rng.standard_normal((n, k)).astype(dtype), rng.standard_normal((k, m)).astype(dtype)
    close = 1e-12 if dtype == "float64" else 1e-3
    for x, y in [
        (a, b),
        (np.asfortranarray(a), b),
        (a, np.asfortranarray(b)),
        (a[::2], b[:, ::-1]),
    ]:
        made = blas.matmul(x, y)
        assert made.dtype == dtype
        np.testing.assert_allclose(made, np.matmul(x, y), rtol=close, atol=close)
    stacked = rng.standard_normal((3, n, k))
    np.testing.assert_allclose(blas.matmul(stacked, b), stacked @ b, rtol=1e-12, atol=1e-12)


def test_products_are_the_same_for_any_number_of_threads(rng):
    a, b = rng.standard_normal((700, 300)), rng.standard_normal((300, 200))
    before, made = tgs.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            tgs.set_num_threads(n)
            made.append(blas.matmul(a, b))
    finally:
        tgs.set_num_threads(before)
    assert all(np.array_equal(made[0], each) for each in made)


def test_threads_are_given_back(rng):
    library = blas._library()
    if library is None:
        pytest.skip("NumPy has another library here")
    before = library.get_threads()
    a, b = rng.standard_normal((3000, 40)), rng.standard_normal((40, 50))
    with pytest.raises(ValueError, match="matmul"):
        blas.matmul(a, b[1:])
    threads = [threading.Thread(target=lambda: [blas.matmul(a, b) for _ in range(50)])]
    threads += [threading.Thread(target=lambda: [blas.matmul(a, b) for _ in range(50)])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert library.get_threads() == before
