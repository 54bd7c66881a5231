"""What the machine offers to compiled code: vectors, tiles, cores, CUDA.

Imports Numba when asked.
"""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache
from importlib.util import find_spec

_WIDTHS = (("avx512f", 512), ("avx2", 256), ("avx", 256), ("sse2", 128), ("neon", 128))


@cache
def cores() -> int:
    """The cores that this process may use, when it was first asked; to ask again takes 5 µs."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=cores.cache_clear)


@cache
def features() -> frozenset[str]:
    """What the processor that Numba compiles for can do: this one, or NUMBA_CPU_FEATURES."""
    import llvmlite.binding as llvm
    from numba import config

    if config.CPU_FEATURES is not None:
        given = config.CPU_FEATURES.split(",")
        return frozenset(name[1:] for name in given if name.startswith("+"))
    return frozenset(name for name, there in llvm.get_host_cpu_features().items() if there)


def vector_width() -> tuple[int, str]:
    """The widest vectors that compiled code uses here: bits, and the feature they come from."""
    there = features()
    for name, bits in _WIDTHS:
        if name in there:
            return bits, name
    return 64, "scalar"


def vector_bits() -> int:
    return vector_width()[0]


# A process asks Linux for the memory of tiles by arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA).
_ARCH_PRCTL, _ASK, _TILE_DATA = 158, 0x1023, 18


@cache
def about_tiles() -> str:
    """Whether compiled code may use tiles, which multiply bfloat16 (``tiles.py``), or why not."""
    if not {"amx-tile", "amx-bf16", "avx512f"} <= features():
        return "no: the processor has none"
    if os.environ.get("TINYGRAD_SEQ_TILES") == "0":
        return "no: TINYGRAD_SEQ_TILES=0"
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "no: they are asked for on Linux alone"
    if ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ASK, _TILE_DATA):
        return "no: the system does not lend them"
    return "yes (AMX, bfloat16)"


def tiles() -> bool:
    return about_tiles().startswith("yes")


def cuda() -> str:
    """Whether kernels can be compiled for the GPU that is there, or why not, in one sentence."""
    if find_spec("numba_cuda") is None:
        return "no: the package numba-cuda is not installed"
    return "a GPU is there"
