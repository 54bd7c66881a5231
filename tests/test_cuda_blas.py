"""Products of cuBLAS and graphs of them, without either: what they are asked to do."""

from __future__ import annotations

import ctypes
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
from tinygrad_seq.kernels import cuda_blas, cuda_build

SMALL = st.integers(1, 5)
ORDERS = ("rows", "columns", "cut")


class Library:
    """cuBLAS over the host's memory: columns of a matrix lie one after another."""

    def __init__(self, status=0):
        self.calls, self.status = [], status

    def cublasCreate_v2(self, handle):  # noqa: N802
        handle._obj.value = 1
        self.calls.append("create")
        return self.status

    def cublasDestroy_v2(self, handle):  # noqa: N802
        self.calls.append("destroy")
        return 0

    def cublasSetMathMode(self, handle, mode):  # noqa: N802
        self.calls.append(f"mode {mode}")
        return 0

    def cublasSetStream_v2(self, handle, stream):  # noqa: N802
        self.calls.append(f"stream {stream.value}")
        return 0

    def cublasSetWorkspace_v2(self, handle, memory, size):  # noqa: N802
        assert memory.value
        self.calls.append(f"workspace {size.value >> 20}")
        return 0

    def gemm(self, number, how, m, n, k, a, lda, b, ldb, c, ldc):
        def matrix(pointer, rows, columns, distance):
            assert distance >= max(1, rows)
            numbers = (number * (distance * (columns - 1) + rows)).from_address(pointer.value)
            flat = np.frombuffer(numbers, number)
            strides = flat.itemsize, flat.itemsize * distance
            return np.lib.stride_tricks.as_strided(flat, (rows, columns), strides)

        left = matrix(a, k, m, lda).T if how else matrix(a, m, k, lda)
        matrix(c, m, n, ldc)[...] = left @ matrix(b, k, n, ldb)
        self.calls.append("product")
        return self.status

    def cublasSgemm_v2(self, handle, how, plain, m, n, k, one, a, lda, b, ldb, zero, c, ldc):  # noqa: N802
        assert (plain, one._obj.value, zero._obj.value) == (0, 1, 0)
        return self.gemm(ctypes.c_float, how, m, n, k, a, lda, b, ldb, c, ldc)

    def cublasDgemm_v2(self, handle, how, plain, m, n, k, one, a, lda, b, ldb, zero, c, ldc):  # noqa: N802
        assert (plain, one._obj.value, zero._obj.value) == (0, 1, 0)
        return self.gemm(ctypes.c_double, how, m, n, k, a, lda, b, ldb, c, ldc)


class Stream:
    """A stream that writes down what it is asked for."""

    ptr = 77

    def __init__(self, log):
        self.log = log

    def begin_capture(self):
        self.log.append("begin")

    def end_capture(self):
        self.log.append("end")
        return SimpleNamespace(launch=lambda: self.log.append("launch"))


@pytest.fixture(scope="module")
def library():
    """The package's calls of cuBLAS come to a stand-in."""
    if cuda_build.SIMULATED:
        pytest.skip("under the simulator products are the arrays' own")
    found = Library()
    patch = pytest.MonkeyPatch()
    patch.setattr(cuda_blas, "library", lambda: found)
    patch.setattr(cuda_build, "address", lambda array: array.ctypes.data)
    patch.setattr(cuda_blas, "_own", SimpleNamespace())
    yield found
    patch.undo()


def namespace(log, tf32=False):
    """What is needed of CuPy."""
    products = SimpleNamespace(COMPUTE_TYPE_TF32=7, get_compute_type=lambda dtype: 7 if tf32 else 1)
    return SimpleNamespace(
        empty=np.empty,
        ascontiguousarray=np.ascontiguousarray,
        _core=SimpleNamespace(_routines_linalg=products),
        cuda=SimpleNamespace(
            Device=lambda: SimpleNamespace(id=0),
            Stream=lambda non_blocking: Stream(log),
            get_current_stream=lambda: SimpleNamespace(ptr=5),
        ),
    )


@given(SMALL, SMALL, SMALL, st.sampled_from(["f4", "f8"]), st.sampled_from(ORDERS))
def test_products(library, B, K, C, dtype, order):
    rng = np.random.default_rng(B * 100 + K * 10 + C)
    a, out = rng.standard_normal((B, K)).astype(dtype), np.empty((B, C), dtype)
    matrix = rng.standard_normal((K + 1, 2 * C)).astype(dtype)[:K, :C]  # inside a larger one
    if order == "columns":
        matrix = rng.standard_normal((C, K)).astype(dtype).T
    elif order == "cut":
        matrix = rng.standard_normal((K, 2 * C)).astype(dtype)[:, ::2]
    xp = namespace([])
    matrix = cuda_blas.readable(xp, matrix)
    products = cuda_blas.Products(xp)
    products.on(3)
    products.product(a, matrix, out)
    np.testing.assert_allclose(out, a @ matrix, rtol=1e-5, atol=1e-5)


def test_matrices_that_can_be_read_are_not_copied(rng):
    matrix = rng.standard_normal((4, 6))
    for each in (matrix, matrix.T, matrix[:, 1:3], matrix[1:3].T, matrix[:1], matrix[:, :1]):
        assert cuda_blas.readable(np, each) is each
    for each in (matrix[::-1], matrix[:, ::2], np.broadcast_to(matrix[:1], (4, 6))):
        assert cuda_blas.readable(np, each) is not each


def test_a_workspace_goes_with_every_stream(library):
    library.calls.clear()
    products = cuda_blas.Products(namespace([]))
    for stream in (1, 1, 2):
        products.on(stream)
    streams = ["stream 1", "workspace 32", "stream 2", "workspace 32"]
    assert [call for call in library.calls if call != "create"] == ["mode 0", *streams]
    library.calls.clear()
    cuda_blas.Products(namespace([], tf32=True))
    assert library.calls == ["mode 3"]  # the handle is there already


def test_a_handle_goes_with_its_thread(library):
    library.calls.clear()
    thread = threading.Thread(target=cuda_blas._Handle, args=(library,))
    thread.start()
    thread.join()
    assert library.calls == ["create", "destroy"]


def test_a_refusal_is_said():
    with pytest.raises(
        RuntimeError, match=r"cuBLAS could not do what it was asked for \(status 13"
    ):
        cuda_blas._check(13)
    with pytest.raises(MemoryError, match="no memory is left on the GPU for cuBLAS"):
        cuda_blas._check(3)


@pytest.mark.parametrize("count", [0, 1, 2, 16, 17, 40, 512])
def test_every_step_is_taken_once(count, monkeypatch):
    monkeypatch.setattr(cuda_blas, "_own", SimpleNamespace())
    if cuda_build.SIMULATED:
        pytest.skip("under the simulator nothing is captured")
    log: list[str] = []
    streams = []

    def step(stream):
        streams.append(stream)
        log.append("step")

    cuda_blas.repeat(namespace(log), step, count)
    launches = log.count("launch")
    captured = streams.count(Stream.ptr)
    assert captured == (cuda_blas.STEPS_CAPTURED if launches else 0)
    assert streams.count(5) + launches * cuda_blas.STEPS_CAPTURED == count
    assert bool(launches) == (count > 2 * cuda_blas.STEPS_CAPTURED)
    if launches:
        assert log[log.index("begin") + 1 :][: captured + 1] == ["step"] * captured + ["end"]


def test_what_fails_while_it_is_captured_ends_the_capture(monkeypatch):
    monkeypatch.setattr(cuda_blas, "_own", SimpleNamespace())
    if cuda_build.SIMULATED:
        pytest.skip("under the simulator nothing is captured")
    log: list[str] = []

    def step(stream):
        if stream == Stream.ptr:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cuda_blas.repeat(namespace(log), step, 100)
    assert log == ["begin", "end"]
