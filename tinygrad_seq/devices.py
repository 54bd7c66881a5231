"""Where arrays are: on the host, as NumPy's, or on a GPU, as CuPy's.

An array's type says where it is, and nothing else does. What NumPy's functions do with CuPy's
arrays is CuPy's own work; ``namespace`` is for what is made from nothing. This is the one place
that imports CuPy, and only when a GPU is first asked for. Nothing is moved unless ``to_device`` or
``to_host`` is called. Imports errors.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

import numpy as np

from tinygrad_seq.errors import DeviceError

CPU, CUDA = "cpu", "cuda"
NO_DRIVER_FOR_THIS = 35  # cudaErrorInsufficientDriver, also where there is no driver at all
NO_DEVICE = 100  # cudaErrorNoDevice

CUDA_ERRORS = ("CUDAError", "CUDARuntimeError", "CUDADriverError", "CudaAPIError", "CUBLASError")
# Errors after which nothing more can be done in a process, as the driver names them.
LASTING = (
    *("ILLEGAL_ADDRESS", "IllegalAddress", "LAUNCH_FAILED", "LaunchFailure", "LAUNCH_TIMEOUT"),
    *("LaunchTimeout", "ILLEGAL_INSTRUCTION", "IllegalInstruction"),
    *("MISALIGNED_ADDRESS", "MisalignedAddress", "INVALID_PC", "InvalidPc"),
    *("INVALID_ADDRESS_SPACE", "InvalidAddressSpace", "HARDWARE_STACK_ERROR"),
    *("HardwareStackError", "ECC_UNCORRECTABLE", "ECCUncorrectable"),
)

_started: Any = None  # CuPy, once it has answered in this process
_forked = False  # whether this process is the child of one in which it had


def device_of(array: Any) -> str:
    """``"cuda"`` for an array on the GPU, ``"cpu"`` for everything else."""
    kind = type(array)
    return CPU if kind is np.ndarray or not _is_cupys(kind) else CUDA


def is_array(value: Any) -> bool:
    """Whether ``value`` is NumPy's array or CuPy's. NumPy's scalars are numbers."""
    return isinstance(value, np.ndarray) or _is_cupys(type(value))


def _is_cupys(kind: type) -> bool:
    """Whether this is CuPy's type of array: known by what it can, so that nothing is imported.

    PyTorch's tensors have the first too, on the host as well.
    """
    return hasattr(kind, "__cuda_array_interface__") and hasattr(kind, "__array_function__")


def namespace(array: Any) -> Any:
    """NumPy or CuPy, whichever the array is of. Numbers are NumPy's."""
    return np if device_of(array) == CPU else sys.modules[type(array).__module__]


def device_named(device: Any) -> str:
    """``"cpu"`` or ``"cuda"``, of which ``"cuda:0"`` is another name."""
    if device in (CPU, CUDA):
        return str(device)
    if device == "cuda:0":
        return CUDA
    if isinstance(device, str) and device.startswith("cuda:"):
        raise DeviceError(
            f"device: {device!r} was given, but one GPU is used, 'cuda'; choose which by the "
            "environment variable CUDA_VISIBLE_DEVICES before Python starts"
        )
    raise ValueError(f"device: {device!r} was given, expected 'cpu' or 'cuda'")


def to_device(array: Any, device: Any) -> Any:
    """``array`` itself if it is there, otherwise a copy. Raises DeviceError where there is no GPU.

    The copy to the GPU does not wait for it.
    """
    wanted = device_named(device)
    if wanted == device_of(array):
        return array
    if wanted == CPU:
        return to_host(array)
    cupy = _start()
    try:
        return cupy.asarray(array)
    except (MemoryError, RuntimeError) as error:
        raise explained(error, "to") from None


def to_host(array: Any) -> Any:
    """``array`` itself if it is NumPy's, otherwise a copy that is, when all before it is done."""
    if device_of(array) == CPU:
        return array
    if _forked:
        raise _after_a_fork()
    try:
        return array.get()
    except Exception as error:  # what went wrong before comes to light here
        raise_explained(error, "a copy to the host")


def erf(x: Any) -> Any:
    """The error function of an array on the GPU, in its dtype."""
    return load("cupyx.scipy.special").erf(x).astype(x.dtype, copy=False)


# Whether there is one -------------------------------------------------------------------------


def load(name: str = "cupy") -> Any:
    """CuPy, or a part of it. Raises DeviceError if what a GPU needs is not installed."""
    if tuple(int(part) for part in np.__version__.split(".")[:2]) >= (2, 5):
        raise DeviceError(
            f"cuda: NumPy {np.__version__} is installed, which numba-cuda 0.30 cannot compile "
            'with; pip install "numpy<2.5"'
        )
    try:
        return import_module(name)
    except ImportError as error:
        raise DeviceError(
            f'cuda: CuPy cannot be imported ({error}); pip install "tinygrad-seq[cuda]"'
        ) from None


def allow_tf32(allow: bool = True) -> None:
    """Let large products of float32 on the GPU round what they multiply to TF32, or not.

    TF32 has 10 bits of a number behind the point, float32 23: such products are several times
    faster, and right to three digits. It is off unless it is asked for, here or by the environment
    variable CUPY_TF32=1. Products inside the loop of ``scan`` stay in float32 while its weights
    stay on the processors; those of a loop that is taken by steps (``explain`` tells) do not.
    """
    products = load()._core._routines_linalg
    _start()
    kind = products.COMPUTE_TYPE_TF32 if allow else products.COMPUTE_TYPE_DEFAULT
    products.set_compute_type(np.dtype(np.float32), kind)


def missing() -> str | None:
    """Why no GPU can be used here, in a sentence; None if one can."""
    try:
        _start()
    except DeviceError as error:
        return str(error)
    return None


def _start() -> Any:
    """CuPy, which has a GPU to work with."""
    global _started
    if _forked:
        raise _after_a_fork()
    cupy = load()
    if _started is not cupy:
        _check_driver(cupy.cuda.runtime)
        if _started is None and hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=_after_fork)
        _started = cupy
    return cupy


def _check_driver(runtime: Any) -> None:
    status, text = NO_DEVICE, ""
    try:
        if runtime.getDeviceCount():
            return
    except RuntimeError as error:
        status, text = getattr(error, "status", 0), str(error)
    if status == NO_DEVICE:
        raise DeviceError(
            "cuda: the NVIDIA driver finds no GPU; look at nvidia-smi and at the environment "
            "variable CUDA_VISIBLE_DEVICES, or compute on 'cpu'"
        )
    if status != NO_DRIVER_FOR_THIS:
        raise DeviceError(f"cuda: CUDA does not start ({text}); look at nvidia-smi")
    driver, wanted = runtime.driverGetVersion(), runtime.runtimeGetVersion()
    if not driver:
        raise DeviceError(
            "cuda: there is no NVIDIA driver on this machine, nor a GPU that one could see; "
            "compute on 'cpu'"
        )
    raise DeviceError(
        f"cuda: the NVIDIA driver is one for CUDA {_version(driver)}, too old for the CUDA "
        f"{_version(wanted)} that CuPy was built with; update the driver"
    )


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _after_fork() -> None:
    global _forked
    _forked = True


def _after_a_fork() -> DeviceError:
    return DeviceError(
        "cuda: this process was forked from one that used the GPU, where CUDA does not work; "
        'start it by multiprocessing.get_context("spawn")'
    )


# What went wrong ------------------------------------------------------------------------------


def check_one_device(operation: str, names: Sequence[str], arrays: Sequence[Any]) -> None:
    """Raise a DeviceError if the arrays are not all on one device. Numbers go with any.

    ``names`` are those of the inputs, fewer or none where there may be any number.
    """
    if len(set(map(type, arrays))) < 2:
        return
    places = [(k, device_of(a)) for k, a in enumerate(arrays) if is_array(a)]
    if len({place for _, place in places}) < 2:
        return
    each = [f"{names[k] if k < len(names) else f'input {k}'} is on {p}" for k, p in places]
    raise DeviceError(
        f"{operation}: {', '.join(each[:6])}; bring them to one device with .to('cuda') or "
        ".to('cpu')"
    )


def raise_explained(error: Exception, operation: str) -> NoReturn:
    """Raise what ``explained`` makes of an error that is being handled."""
    said = explained(error, operation)
    if said is error:
        raise error
    raise said from None


def explained(error: Exception, operation: str) -> Exception:
    """What to raise in the place of an error of CuPy's; other errors are themselves."""
    kind = type(error).__name__
    if kind == "OutOfMemoryError":
        return DeviceError(
            f"{operation}: no memory is left on the GPU ({error}); take smaller batches or shorter "
            "sequences, or let go of tensors that hold a graph"
        )
    if isinstance(error, ImportError):
        return DeviceError(
            f"{operation}: CuPy does not find a part of CUDA ({error}); "
            'pip install "tinygrad-seq[cuda]"'
        )
    if kind not in CUDA_ERRORS:
        return error
    if _forked:
        return _after_a_fork()
    if any(name in str(error) for name in LASTING):
        return DeviceError(
            f"{operation}: a kernel did not end as it should ({error}), after which the GPU works "
            "no more for this process; start it anew, and report what it did if it does so again"
        )
    return DeviceError(f"{operation}: CUDA refused ({error})")
