"""Products of cuBLAS that a graph can capture.

CuPy refuses to call cuBLAS while a stream captures (https://github.com/cupy/cupy/issues/6290),
although cuBLAS can be captured where it has a workspace of its own
(https://docs.nvidia.com/cuda/cublas/, "CUDA Graphs Support"). So it is called here, by its C
interface, of the library that CuPy has loaded. Under the simulator products are the arrays' own.
Imports cuda_build, ctypes and NumPy.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np
from tinygrad_seq.kernels import cuda_build

Array = Any  # of the device
WORKSPACE = 32 << 20  # bytes; what cuBLAS takes for itself on sm_90
DEFAULT_MATH, TF32_MATH = 0, 3
PLAIN, TRANSPOSED = 0, 1
NO_MEMORY = 3  # CUBLAS_STATUS_ALLOC_FAILED
GEMM = {
    "float32": ("cublasSgemm_v2", ctypes.c_float),
    "float64": ("cublasDgemm_v2", ctypes.c_double),
}
STEPS_CAPTURED = 8  # steps of a graph

_own = threading.local()  # handles, which have one stream at a time, and streams to capture


class Products:
    """Products of matrices on streams of one thread, float32 and float64."""

    def __init__(self, xp: Any) -> None:
        self._xp = xp
        self._stream: int | None = None
        if not cuda_build.SIMULATED:
            self._library = library()
            self._handle = _handle(self._library, int(xp.cuda.Device().id))
            self._workspace = xp.empty(WORKSPACE, np.uint8)  # of the pool: no stream shares it
            mode = TF32_MATH if tf32_allowed(xp) else DEFAULT_MATH
            _check(self._library.cublasSetMathMode(self._handle, mode))

    def on(self, stream: int) -> None:
        """Products from now on go to this stream."""
        if not cuda_build.SIMULATED and stream != self._stream:
            workspace = ctypes.c_void_p(cuda_build.address(self._workspace))
            _check(self._library.cublasSetStream_v2(self._handle, ctypes.c_void_p(stream)))
            # a stream that is set takes the workspace away
            size = ctypes.c_size_t(WORKSPACE)
            _check(self._library.cublasSetWorkspace_v2(self._handle, workspace, size))
            self._stream = stream

    def product(self, a: Array, matrix: Array, out: Array) -> None:
        """out (B, C) = a (B, K) matrix (K, C). ``a`` and ``out`` are contiguous, rows or columns
        of the matrix are (``readable``)."""
        if cuda_build.SIMULATED:
            self._xp.matmul(a, matrix, out=out)
            return
        (B, K), C = a.shape, out.shape[1]
        name, number = GEMM[np.dtype(out.dtype).name]
        by_rows = _distance(matrix) is not None
        distance = _distance(matrix if by_rows else matrix.T)
        one, zero = number(1), number(0)
        # cuBLAS counts along columns: to it every row is a column, outᵀ = matrixᵀ aᵀ
        _check(
            getattr(self._library, name)(
                *(self._handle, PLAIN if by_rows else TRANSPOSED, PLAIN, C, B, K),
                *(ctypes.byref(one), _pointer(matrix), distance, _pointer(a), K),
                *(ctypes.byref(zero), _pointer(out), C),
            )
        )


def readable(xp: Any, matrix: Array) -> Array:
    """The matrix, or a copy of it, as a product can read it."""
    if _distance(matrix) is None and _distance(matrix.T) is None:
        return xp.ascontiguousarray(matrix)
    return matrix


def _distance(matrix: Array) -> int | None:
    """From row to row, in numbers; None if the numbers of a row are not side by side."""
    (rows, columns), (row, column), item = matrix.shape, matrix.strides, matrix.dtype.itemsize
    if column != item and columns > 1:
        return None
    if rows == 1:
        return int(columns)
    return row // item if row % item == 0 and row // item >= columns else None


def _pointer(array: Array) -> ctypes.c_void_p:
    return ctypes.c_void_p(cuda_build.address(array))


def repeat(xp: Any, step: Callable[[int], None], count: int) -> None:
    """``step(stream)`` so often on the current stream: some as they are, the others as a graph.

    The first one loads what a graph must find loaded.
    """
    stream = cuda_build.stream_of(xp)
    graphs, rest = divmod(max(count - 1, 0), STEPS_CAPTURED)
    if cuda_build.SIMULATED or graphs < 2:  # a graph of which there is one saves nothing
        graphs, rest = 0, count - 1
    for _ in range(min(count, 1) + rest):
        step(stream)
    if graphs:
        graph = _captured(xp, step)
        for _ in range(graphs):
            graph.launch()


def _captured(xp: Any, step: Callable[[int], None]) -> Any:
    """A graph of some steps."""
    streams = _own.__dict__.setdefault("streams", {})
    device = int(xp.cuda.Device().id)
    if device not in streams:  # the default stream cannot be captured
        streams[device] = xp.cuda.Stream(non_blocking=True)
    stream = streams[device]
    try:
        stream.begin_capture()
        for _ in range(STEPS_CAPTURED):
            step(int(stream.ptr))
    except BaseException:
        del streams[device]
        with suppress(Exception):  # what was captured is of no use, nor what is said of it
            stream.end_capture()
        raise
    return stream.end_capture()


# The library ---------------------------------------------------------------------------------


@cache
def library() -> Any:
    """cuBLAS, the one that is loaded or else the one that is installed."""
    from cuda import pathfinder

    try:
        found = pathfinder.load_nvidia_dynamic_lib("cublas")
    except Exception as error:
        raise RuntimeError(
            f'cuda: cuBLAS cannot be loaded ({error}); pip install "tinygrad-seq[cuda]"'
        ) from None
    return ctypes.CDLL(found.abs_path, handle=found._handle_uint)


def _handle(library: Any, device: int) -> Any:
    handles = _own.__dict__.setdefault("handles", {})
    if device not in handles:
        handles[device] = _Handle(library)
    return handles[device].handle


class _Handle:
    """A handle of cuBLAS, which goes with its thread."""

    def __init__(self, library: Any) -> None:
        self.library, self.handle = library, ctypes.c_void_p()
        _check(library.cublasCreate_v2(ctypes.byref(self.handle)))

    def __del__(self) -> None:
        if self.handle and not sys.is_finalizing():
            self.library.cublasDestroy_v2(self.handle)


def tf32_allowed(xp: Any) -> bool:
    """Whether products may round what they multiply to TF32, as CuPy was told."""
    if cuda_build.SIMULATED:
        return False
    products = xp._core._routines_linalg
    return bool(products.get_compute_type(np.dtype(np.float32)) == products.COMPUTE_TYPE_TF32)


def _check(status: int) -> None:
    if status == NO_MEMORY:
        raise MemoryError("cuda: no memory is left on the GPU for cuBLAS; take smaller batches")
    if status:
        raise RuntimeError(f"cuda: cuBLAS could not do what it was asked for (status {status})")
