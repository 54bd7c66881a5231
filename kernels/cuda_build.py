"""Build for CUDA: the one module that imports numba-cuda, and where all of its options are.

Kernels take a tuple of words (addresses and sizes) and nothing else. Under numba-cuda's simulator
(``NUMBA_ENABLE_CUDASIM=1``) what is written as instructions for the device has a twin in plain
Python, which reads and writes the host's memory. Imports build (files), cuda_division, NumPy,
llvmlite, Numba and numba-cuda.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, types
from numba.core.errors import NumbaError
from tinygrad_seq.kernels import build
from tinygrad_seq.kernels.cuda_division import Machine

try:
    import numba_cuda  # numba's own numba.cuda is no longer kept up
    from numba import cuda
except ImportError as error:
    raise ImportError(
        'kernels for CUDA need numba-cuda, which is not installed; pip install "tinygrad-seq[cuda]"'
    ) from error

SIMULATED = bool(config.ENABLE_CUDASIM)
libdevice = None if SIMULATED else cuda.libdevice
THREADS = 256  # of a block
OPTIONS: dict[str, Any] = {"fastmath": False, "lto": False, "launch_bounds": (THREADS, 1)}
PER_THREAD = 2  # a stream of each thread's own, by the same handle in all of them
UNASKED_SHARED = 48 * 1024  # bytes that a block may have without being asked for
SIMULATED_MACHINE = Machine(processors=4, shared_bytes=48 * 1024, threads=64)
I32, I64 = ir.IntType(32), ir.IntType(64)
NUMBERS = {"float32": types.float32, "float64": types.float64}
KINDS = {"float32": ir.FloatType(), "float64": ir.DoubleType()}


def device(function: Callable[..., Any]) -> Any:
    """A function that kernels call."""
    return cuda.jit(device=True, forceinline=True)(function)


def number(dtype: str) -> Any:
    """The type of a number, to be called with one in a kernel."""
    return np.dtype(dtype).type if SIMULATED else NUMBERS[dtype]


# Instructions --------------------------------------------------------------------------------


def _instruction(emit: Callable[..., Any], result: Any, arguments: tuple[Any, ...]) -> Any:
    """A function of kernels written as instructions; ``emit(builder, *values)`` writes them."""
    from numba.cuda.extending import intrinsic

    def typed(typingctx: Any, *given: Any) -> Any:
        def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            made = emit(builder, *values)
            if result is types.void:
                return context.get_dummy_value()
            if isinstance(result, types.UniTuple):
                parts = [
                    builder.extract_element(made, ir.Constant(I32, k)) for k in range(result.count)
                ]
                return context.make_tuple(builder, result, parts)
            return made

        return result(*arguments), lower

    names = ", ".join(f"value{k}" for k in range(len(arguments)))  # Numba wants them by name
    space = {"typed": typed}
    exec(f"def call(typingctx, {names}):\n    return typed(typingctx, {names})\n", space)
    return intrinsic(space["call"])


def _at(builder: Any, address: Any, kind: Any) -> Any:
    """A pointer into global memory."""
    return builder.inttoptr(address, ir.PointerType(kind, 1))


def _assembly(text: str, constraints: str, result: Any, *arguments: Any) -> Any:
    kind = ir.FunctionType(result, list(arguments))
    return ir.InlineAsm(kind, text, constraints, side_effect=True)


@cache
def memory(dtype: str) -> dict[str, Any]:
    """load, store, load4 for numbers of this dtype at an address; from_bits for one in a word."""
    if SIMULATED:
        return _plain_memory(dtype)
    kind, number_type = KINDS[dtype], NUMBERS[dtype]
    four = ir.VectorType(kind, 4)
    address = types.int64

    def load(builder: Any, at: Any) -> Any:
        return builder.load(_at(builder, at, kind))

    def load4(builder: Any, at: Any) -> Any:
        return builder.load(_at(builder, at, four), align=16)

    def store(builder: Any, at: Any, value: Any) -> None:
        builder.store(value, _at(builder, at, kind))

    def from_bits(builder: Any, word: Any) -> Any:
        bits = builder.trunc(word, I32) if dtype == "float32" else word
        return builder.bitcast(bits, kind)

    return {
        "from_bits": _instruction(from_bits, number_type, (types.int64,)),
        "load": _instruction(load, number_type, (address,)),
        "load4": _instruction(load4, types.UniTuple(number_type, 4), (address,)),
        "store": _instruction(store, types.void, (address, number_type)),
    }


def _plain_memory(dtype: str) -> dict[str, Any]:
    cell = ctypes.c_float if dtype == "float32" else ctypes.c_double
    kind, size = np.dtype(dtype).type, np.dtype(dtype).itemsize

    def load(at: int) -> Any:
        return kind(cell.from_address(int(at)).value)

    def store(at: int, value: Any) -> None:
        cell.from_address(int(at)).value = float(value)

    def load4(at: int) -> Any:
        assert at % 16 == 0, at
        return tuple(load(at + k * size) for k in range(4))

    def from_bits(word: int) -> Any:
        return np.array([word], np.int64).view(kind)[0]  # the low half comes first

    return {"load": load, "load4": load4, "store": store, "from_bits": from_bits}


def _plain_integers() -> dict[str, Any]:
    word_at = ctypes.c_int64.from_address

    def add_release(at: int, count: int) -> None:
        word_at(int(at)).value += count

    def put_word(table: int, k: int, value: int) -> None:
        word_at(int(table + 8 * k)).value = value

    return {
        "word": lambda table, k: word_at(int(table + 8 * k)).value,
        "flag": lambda table, k: ctypes.c_uint8.from_address(int(table + k)).value,
        "put_word": put_word,
        "add_release": add_release,
        "acquire": lambda at: word_at(int(at)).value,
        "pause": lambda: cuda.nanosleep(0),
        "at": lambda base, offset: base + offset,
    }


def _integers() -> dict[str, Any]:
    """word and flag read whole numbers at an address, put_word writes one; add_release and acquire
    are for barriers.

    ``at`` adds an offset to an address, there and then: the sum of all that a loop does not change
    would else be made before it, for dozens of arrays, and kept in registers throughout.
    """
    if SIMULATED:
        return _plain_integers()
    address, byte = types.int64, ir.IntType(8)

    def word(builder: Any, table: Any, k: Any) -> Any:
        at = builder.add(table, builder.mul(k, ir.Constant(I64, 8)))
        return builder.load(_at(builder, at, I64))

    def put_word(builder: Any, table: Any, k: Any, value: Any) -> None:
        at = builder.add(table, builder.mul(k, ir.Constant(I64, 8)))
        builder.store(value, _at(builder, at, I64))

    def flag(builder: Any, table: Any, k: Any) -> Any:
        return builder.zext(builder.load(_at(builder, builder.add(table, k), byte)), I64)

    def add_release(builder: Any, at: Any, count: Any) -> None:
        text = "red.release.gpu.global.add.u64 [$0], $1;"
        call = _assembly(text, "l,l,~{memory}", ir.VoidType(), I64, I64)
        builder.call(call, [at, count])

    def acquire(builder: Any, at: Any) -> Any:
        call = _assembly("ld.acquire.gpu.global.s64 $0, [$1];", "=l,l,~{memory}", I64, I64)
        return builder.call(call, [at])

    def at(builder: Any, base: Any, offset: Any) -> Any:
        call = _assembly("add.s64 $0, $1, $2;", "=l,l,l", I64, I64, I64)
        return builder.call(call, [base, offset])

    return {
        "at": _instruction(at, types.int64, (address, types.int64)),
        "word": _instruction(word, types.int64, (address, types.int64)),
        "flag": _instruction(flag, types.int64, (address, types.int64)),
        "put_word": _instruction(put_word, types.void, (address, types.int64, types.int64)),
        "add_release": _instruction(add_release, types.void, (address, types.int64)),
        "acquire": _instruction(acquire, types.int64, (address,)),
        "pause": device(lambda: None),
    }


integers = _integers()


def _plain_shared_memory() -> dict[str, Any]:
    def shared4(shared: Any, at: int) -> Any:
        return tuple(shared[at + k] for k in range(4))

    def put_shared4(shared: Any, at: int, a: Any, b: Any, c: Any, d: Any) -> None:
        for k, value in enumerate((a, b, c, d)):
            shared[at + k] = value

    return {"shared4": shared4, "put_shared4": put_shared4}


@cache
def shared_memory(dtype: str) -> dict[str, Any]:
    """Four numbers of shared memory at once: shared4, put_shared4."""
    if SIMULATED:
        return _plain_shared_memory()
    from numba.cuda.extending import intrinsic

    kind, number_type = KINDS[dtype], NUMBERS[dtype]
    four = ir.VectorType(kind, 4)

    def pointer(context: Any, builder: Any, array: Any, value: Any, at: Any) -> Any:
        data = context.make_array(array)(context, builder, value).data
        begin = builder.addrspacecast(data, ir.PointerType(kind, 3))
        return builder.bitcast(builder.gep(begin, [at]), ir.PointerType(four, 3))

    @intrinsic
    def shared4(typingctx: Any, shared: Any, at: Any) -> Any:
        result = types.UniTuple(number_type, 4)

        def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            place = pointer(context, builder, shared, *values)
            made = builder.load(place, align=16)
            parts = [builder.extract_element(made, ir.Constant(I32, k)) for k in range(4)]
            return context.make_tuple(builder, result, parts)

        return result(shared, types.int64), lower

    @intrinsic
    def put_shared4(typingctx: Any, shared: Any, at: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
        def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            place = pointer(context, builder, shared, *values[:2])
            made: Any = ir.Constant(four, ir.Undefined)
            for k, value in enumerate(values[2:]):
                made = builder.insert_element(made, value, ir.Constant(I32, k))
            builder.store(made, place, align=16)
            return context.get_dummy_value()

        return types.void(shared, types.int64, *[number_type] * 4), lower

    return {"shared4": shared4, "put_shared4": put_shared4}


# Kernels -------------------------------------------------------------------------------------


def address(array: Any) -> int:
    """Where an array of the device begins; in the simulator the host's arrays will do."""
    if SIMULATED and isinstance(array, np.ndarray):
        return int(array.ctypes.data)
    return int(array.data.ptr)


def stream_of(xp: Any) -> int:
    """The stream that the arrays' own operations go to."""
    return 0 if SIMULATED else int(xp.cuda.get_current_stream().ptr)


def queue_of(xp: Any) -> tuple[int, int]:
    """That stream, and the thread whose it is: 0 if its handle names one stream for all threads."""
    stream = stream_of(xp)
    return stream, threading.get_ident() if stream == PER_THREAD else 0


@cache
def machine() -> Machine:
    """The device that kernels run on."""
    if SIMULATED:
        return SIMULATED_MACHINE
    found = cuda.get_current_device()
    shared = found.MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    return Machine(found.MULTIPROCESSOR_COUNT, shared, THREADS)


def marked(text: str) -> str:
    """A text with what compiles it and what it is compiled with, so that nothing old is used."""
    return f"# numba-cuda {numba_cuda.__version__}, {build.sources('cuda*.py')[:20]}\n{text}"


def load(name: str, text: str, kernels: list[Any]) -> dict[str, tuple[Any, list[str], bool]]:
    """The kernels of a text, compiled, the names of their words, and whether they are divided."""
    module = build.module(name, marked(text))
    made = Simulated if SIMULATED else Compiled
    return {
        each.name: (made(getattr(module, each.name), len(each.words)), each.words, each.divided)
        for each in kernels
    }


class Simulated:
    """A kernel under the simulator."""

    def __init__(self, function: Callable[..., Any], words: int) -> None:
        self._kernel = cuda.jit(function)

    def launch(
        self, blocks: int, shared: int, words: tuple[int, ...], stream: int, together: bool
    ) -> None:
        self._kernel[blocks, SIMULATED_MACHINE.threads, 0, shared](words)


def _compiled(function: Callable[..., Any], words: int) -> Any:
    """A kernel, compiled or loaded; compiled for this process alone where it cannot be kept."""
    home = Path(function.__code__.co_filename).parent
    kept = [*home.rglob(f"*.{function.__name__}-*.nb[ic]")]
    signature = types.void(types.UniTuple(types.int64, words))

    def made(keep: bool) -> Any:
        return cuda.jit([signature], cache=keep, **OPTIONS)(function)

    with build.compiling(bool(kept)):
        try:
            return made(keep=True)
        except NumbaError:
            raise  # the text is wrong, not what was kept of it
        except Exception as error:  # a full disk; or what was kept is damaged, in whatever way
            for file in kept:
                file.unlink(missing_ok=True)
            build.say_not_kept(error)
            return made(keep=False)


class Compiled:
    """A kernel of a tuple of words, compiled for the device that is there."""

    def __init__(self, function: Callable[..., Any], words: int) -> None:
        (kernel,) = _compiled(function, words).overloads.values()
        self._function = kernel._codelibrary.get_cufunc()
        self._asked = False

    def launch(
        self, blocks: int, shared: int, words: tuple[int, ...], stream: int, together: bool
    ) -> None:
        """Run it. ``shared`` bytes for each block; ``together`` if blocks wait for one another, so
        that none may begin before there is room for all.

        Words go to the driver as they are: numba-cuda's own way takes 0.1 ms for sixty of them.
        """
        from cuda.core import LaunchConfig, launch

        if shared > UNASKED_SHARED and not self._asked:
            self._ask()
        config = LaunchConfig(
            grid=blocks, block=THREADS, shmem_size=shared, is_cooperative=together
        )
        launch(_stream(stream), config, self._function.kernel, *words)

    def _ask(self) -> None:
        """More shared memory than a kernel may take unasked: all that a block can have, so that
        threads whose launches want different amounts take nothing from one another."""
        from cuda.bindings import driver

        which = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        device, most = self._function.device.id, machine().shared_bytes
        (status,) = driver.cuKernelSetAttribute(which, most, self._function.handle, device)
        if status != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(
                f"cuda: {most} bytes of shared memory were asked for and refused ({status.name})"
            )
        self._asked = True


@cache
def _stream(handle: int) -> Any:
    from cuda.core import Stream

    return Stream.from_handle(handle)
