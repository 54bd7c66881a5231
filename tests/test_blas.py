"""NumPy's product on one thread, and its threads given back."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from tinygrad_seq import blas


@pytest.fixture
def with_threads(monkeypatch):
    monkeypatch.setattr(blas, "_scans_have_threads", lambda: True)


@pytest.mark.parametrize("rows", [10, 3000])
def test_the_product_is_numpys(rng, with_threads, rows):
    a, b = rng.standard_normal((rows, 40)), rng.standard_normal((40, 50))
    np.testing.assert_allclose(blas.matmul(a, b), np.matmul(a, b), rtol=1e-12, atol=1e-12)
    stacked = rng.standard_normal((3, rows, 40))
    np.testing.assert_allclose(blas.matmul(stacked, b), stacked @ b, rtol=1e-12, atol=1e-12)


def test_threads_are_given_back(rng, with_threads):
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
