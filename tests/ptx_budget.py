"""What a kernel costs a thread, as ptxas reports it, on a machine without a GPU.

`report` compiles a Python function with numba-cuda for compute capability 9.0 to PTX, and that
with ptxas. A test holds the report to a budget: no spills, no local memory, no doubles, and as
many registers as the number of resident blocks allows.

It needs numba-cuda and, from `cuda-toolkit[nvcc,nvrtc]==13.0.*`, NVVM with libdevice, NVRTC and
ptxas; `missing()` says what is not there. Keep both at one version: ptxas refuses PTX of a newer
NVVM. Not for a process with the simulator. Imports numba, and that when it is asked to compile.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

CAPABILITY = (9, 0)
INSTALL = "pip install 'numba-cuda==0.30.*' 'cuda-toolkit[nvcc,nvrtc]==13.0.*' 'numpy<2.5'"

# An instruction stands after its predicate; declarations start with a dot.
_INSTRUCTION = r"^\s*(?:@!?%\w+\s+)?[a-z]\w*(?:\.\w+)*"
_LOCAL = re.compile(r"^\s*(?:@!?%\w+\s+)?(?:ld|st)(?:\.\w+)*\.local\b", re.MULTILINE)
_DOUBLE = re.compile(_INSTRUCTION + r"\.f64\b", re.MULTILINE)


class CompilerMissingError(ImportError):
    """A package that compiling for CUDA takes is not installed."""


class Report(NamedTuple):
    """A thread's share of the machine, and what its instructions are."""

    registers: int
    spill_bytes: int  # stored and loaded again
    stack_bytes: int
    local_operations: int  # loads and stores of memory that should have been registers
    double_operations: int
    shared_bytes: int  # static, of a block
    seconds: float  # to compile
    ptx: str


def missing() -> str:
    """What is not installed, and how to install it; empty where all is there."""
    absent = []
    if find_spec("numba_cuda") is None:
        absent.append("numba-cuda")
    if find_spec("cuda") is None or find_spec("cuda.pathfinder") is None:
        absent.append("cuda-pathfinder")
    else:
        from cuda import pathfinder

        if pathfinder.find_nvidia_binary_utility("ptxas") is None:
            absent.append("ptxas")
        try:
            pathfinder.find_bitcode_lib("device")
        except RuntimeError:
            absent.append("NVVM's libdevice")
    return f"{', '.join(absent)} not found: {INSTALL}" if absent else ""


def report(
    function: Callable[..., None],
    signature: Any,
    *,
    fastmath: bool = False,
    launch_bounds: int | tuple[int, ...] | None = None,
    max_registers: int | None = None,
) -> Report:
    """Compile a kernel, plain or decorated, for a tuple of argument types or a signature.

    Where launch bounds are given, ptxas takes the registers from them and leaves `max_registers`
    alone; so does the device's compiler.
    """
    if launch_bounds is not None and max_registers is not None:
        raise ValueError("give launch_bounds or max_registers: with both, only the bounds count")
    begin = time.perf_counter()
    ptx = _compile(getattr(function, "py_func", function), signature, fastmath, launch_bounds)
    said = _assemble(ptx, max_registers)

    def number(pattern: str) -> int:
        return sum(map(int, re.findall(pattern, said)))

    return Report(
        registers=number(r"Used (\d+) registers"),
        spill_bytes=number(r"(\d+) bytes spill"),
        stack_bytes=number(r"(\d+) bytes stack frame"),
        local_operations=len(_LOCAL.findall(ptx)),
        double_operations=len(_DOUBLE.findall(ptx)),
        shared_bytes=number(r"(\d+) bytes smem"),
        seconds=time.perf_counter() - begin,
        ptx=ptx,
    )


def _compile(function: Callable[..., None], signature: Any, fastmath: bool, bounds: Any) -> str:
    absent = missing()
    if absent:
        raise CompilerMissingError(absent)
    import numpy as np
    from cuda.pathfinder import DynamicLibNotFoundError
    from numba import cuda
    from numba.cuda import dispatcher
    from numba.cuda.core import config

    if config.ENABLE_CUDASIM:
        raise RuntimeError("the simulator compiles nothing: unset NUMBA_ENABLE_CUDASIM")
    if not hasattr(np, "row_stack"):  # gone from NumPy 2.5, and numba-cuda 0.30 asks for it
        np.row_stack = np.vstack
    # Device functions are compiled for the device that is there, whatever is asked for.
    device = type("Device", (), {"compute_capability": CAPABILITY})
    try:
        with mock.patch.object(dispatcher, "get_current_device", device):
            ptx, _ = cuda.compile_ptx(
                function, signature, cc=CAPABILITY, fastmath=fastmath, launch_bounds=bounds
            )
    except DynamicLibNotFoundError as error:
        raise CompilerMissingError(f"{str(error).splitlines()[0]}; {INSTALL}") from error
    return ptx


def _assemble(ptx: str, max_registers: int | None) -> str:
    """What ptxas says of it."""
    from cuda import pathfinder

    options = ["-arch=sm_{}{}".format(*CAPABILITY), "-v"]
    if max_registers:
        options.append(f"-maxrregcount={max_registers}")
    if "cudaCG" in ptx:
        options.append("-c")  # a grid sync is a function that only the linker has
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [pathfinder.find_nvidia_binary_utility("ptxas"), *options, str(source)]
        done = subprocess.run(
            [*command, "-o", str(source.with_suffix(".cubin"))],
            capture_output=True,
            text=True,
            timeout=300,
        )
    if done.returncode:
        raise RuntimeError(f"ptxas refuses the PTX:\n{done.stderr}\n{ptx}")
    return done.stderr
