"""Vectors: what a kernel computes with, and how it reads and writes memory.

``vectors("float32")`` gives a type and its functions: a vector of as many numbers as the processor
takes at once, which adds and multiplies like a number. Nothing is left to a compiler's guess that a
loop might be done in vectors. Memory is an address, an integer in bytes; ``j`` counts elements, and
``n`` says how many of the lanes are meant, which ends a row of any width (more than there are lanes
means all of them).

Conditions are vectors too, of ones and zeros.

With Numba's compiler switched off (NUMBA_DISABLE_JIT=1) the same functions are plain Python over
one lane, so that a kernel can be stepped through. Imports machine, philox, vecmath, NumPy,
Numba and llvmlite.
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, register_model
from tinygrad_seq.kernels import philox, vecmath
from tinygrad_seq.kernels.machine import vector_bits

I64, I32, I1 = ir.IntType(64), ir.IntType(32), ir.IntType(1)
WORD = types.int64  # an address, an index, a size
FLAGS = ()  # operators are neither reordered nor fused: a row has the same bits in every kernel
Build = Any  # an llvmlite IRBuilder


@cache
def lanes(dtype: str) -> int:
    """How many numbers a vector holds on this machine; one if the compiler is switched off."""
    return 1 if config.DISABLE_JIT else max(1, vector_bits() // (8 * np.dtype(dtype).itemsize))


class VectorType(types.Type):  # type: ignore[misc]
    """``float32x16`` as Numba's type system knows it."""

    def __init__(self, dtype: str, count: int) -> None:
        super().__init__(name=f"{dtype}x{count}")
        self.dtype, self.count = dtype, count
        self.scalar = ir.FloatType() if dtype == "float32" else ir.DoubleType()
        self.vector = ir.VectorType(self.scalar, count)
        self.bytes = np.dtype(dtype).itemsize


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, vector: VectorType) -> None:
        super().__init__(manager, vector, vector.vector)


# Pieces of LLVM ------------------------------------------------------------------------------


def splat_ir(build: Build, scalar: Any, count: int) -> Any:
    """One number in every lane."""
    empty = ir.Constant(ir.VectorType(scalar.type, count), ir.Undefined)
    first = build.insert_element(empty, scalar, ir.Constant(I32, 0))
    zeros = ir.Constant(ir.VectorType(I32, count), [0] * count)
    return build.shuffle_vector(first, empty, zeros)


def pointer_ir(build: Build, address: Any, index: Any, to: Any, at: Any) -> Any:
    """A pointer to ``at`` from an address in bytes and an index in elements of type ``to``."""
    first = build.inttoptr(address, to.as_pointer())
    return build.bitcast(build.gep(first, [index]), at.as_pointer())


def first_lanes_ir(build: Build, n: Any, count: int) -> Any:
    """A mask whose first n lanes are set."""
    numbers = ir.Constant(ir.VectorType(I32, count), list(range(count)))
    return build.icmp_signed("<", numbers, splat_ir(build, build.trunc(n, I32), count))


def masked_load_ir(build: Build, at: Any, n: Any, kind: Any, bytes_: int) -> Any:
    """The first n numbers at a pointer to vectors of this kind, zeros after them."""
    count = kind.count
    name = f"llvm.masked.load.v{count}f{8 * bytes_}.p0"
    given = [kind.as_pointer(), I32, ir.VectorType(I1, count), kind]
    function = cgutils.get_or_insert_function(build.module, ir.FunctionType(kind, given), name)
    nothing = ir.Constant(kind, [0.0] * count)
    mask = first_lanes_ir(build, n, count)
    return build.call(function, [at, ir.Constant(I32, bytes_), mask, nothing])


def prefetch_ir(build: Build, at: Any) -> None:
    """Begin to bring the line of a pointer to a byte near, to be read and kept."""
    kind = ir.FunctionType(ir.VoidType(), [at.type, I32, I32, I32])
    function = cgutils.get_or_insert_function(build.module, kind, "llvm.prefetch.p0")
    build.call(function, [at, *(ir.Constant(I32, n) for n in (0, 2, 1))])


class _Lanes:
    """LLVM vectors behind the operators and functions that ``vecmath`` is written with."""

    def __init__(self, build: Build, kind: VectorType) -> None:
        self.build, self.kind, self.dtype = build, kind, kind.dtype
        self.bits = 8 * kind.bytes
        self.integers = ir.VectorType(ir.IntType(self.bits), kind.count)

    def wrap(self, value: Any) -> _Value:
        return _Value(self, value)

    def constant(self, number: float) -> _Value:
        number = float(np.dtype(self.dtype).type(number))
        return self.wrap(ir.Constant(self.kind.vector, [number] * self.kind.count))

    def lift(self, value: Any) -> Any:
        return value.value if isinstance(value, _Value) else self.constant(value).value

    def call(self, name: str, *values: Any) -> _Value:
        kinds = [self.kind.vector] * len(values)
        kind = ir.FunctionType(self.kind.vector, kinds)
        full = f"llvm.{name}.v{self.kind.count}f{self.bits}"
        function = cgutils.get_or_insert_function(self.build.module, kind, full)
        return self.wrap(self.build.call(function, [self.lift(v) for v in values]))

    def each(self, name: str, *values: Any) -> _Value:
        """A function of the C library on every lane: right, but one number at a time."""
        scalar = self.kind.scalar
        kind = ir.FunctionType(scalar, [scalar] * len(values))
        full = name + ("f" if self.dtype == "float32" else "")
        function = cgutils.get_or_insert_function(self.build.module, kind, full)
        made = ir.Constant(self.kind.vector, ir.Undefined)
        for k in range(self.kind.count):
            at = ir.Constant(I32, k)
            one = self.build.call(
                function, [self.build.extract_element(self.lift(v), at) for v in values]
            )
            made = self.build.insert_element(made, one, at)
        return self.wrap(made)

    def fma(self, a: Any, b: Any, c: Any) -> _Value:
        return self.call("fmuladd", a, b, c)  # one instruction where there is one

    def copysign(self, a: Any, b: Any) -> _Value:
        return self.call("copysign", a, b)

    def select(self, condition: Any, a: Any, b: Any) -> _Value:
        return self.wrap(self.build.select(condition, self.lift(a), self.lift(b)))

    def compare(self, sign: str, a: Any, b: Any) -> Any:
        if sign == "!=":
            return self.build.fcmp_unordered(sign, self.lift(a), self.lift(b))
        return self.build.fcmp_ordered(sign, self.lift(a), self.lift(b))

    def to_integer(self, x: Any) -> Any:
        return self.build.fptosi(self.lift(x), self.integers)

    def to_float(self, x: Any) -> _Value:
        return self.wrap(self.build.sitofp(x, self.kind.vector))

    def bits_of(self, x: Any) -> Any:
        return self.build.bitcast(self.lift(x), self.integers)

    def from_bits(self, x: Any) -> _Value:
        return self.wrap(self.build.bitcast(x, self.kind.vector))

    def _integers(self, number: int) -> Any:
        return ir.Constant(self.integers, [number] * self.kind.count)

    def add_integer(self, x: Any, number: Any) -> Any:
        return self.build.add(x, self._integers(number) if isinstance(number, int) else number)

    def subtract_integer(self, x: Any, other: Any) -> Any:
        return self.build.sub(x, other)

    def shift_left(self, x: Any, by: int) -> Any:
        return self.build.shl(x, self._integers(by))

    def shift_right(self, x: Any, by: int) -> Any:
        return self.build.ashr(x, self._integers(by))


class _Value:
    """A vector in the making, with the operators of a number."""

    def __init__(self, on: _Lanes, value: Any) -> None:
        self.on, self.value = on, value

    def _binary(self, name: str, other: Any, swap: bool = False) -> _Value:
        a, b = self.value, self.on.lift(other)
        emit = getattr(self.on.build, name)
        return self.on.wrap(emit(b, a, flags=FLAGS) if swap else emit(a, b, flags=FLAGS))

    def __add__(self, other: Any) -> _Value:
        return self._binary("fadd", other)

    def __sub__(self, other: Any) -> _Value:
        return self._binary("fsub", other)

    def __mul__(self, other: Any) -> _Value:
        return self._binary("fmul", other)

    def __truediv__(self, other: Any) -> _Value:
        return self._binary("fdiv", other)

    def __rsub__(self, other: Any) -> _Value:
        return self._binary("fsub", other, swap=True)

    def __rtruediv__(self, other: Any) -> _Value:
        return self._binary("fdiv", other, swap=True)

    def __neg__(self) -> _Value:
        return self.on.wrap(self.on.build.fneg(self.value))

    __radd__, __rmul__ = __add__, __mul__


class _Words:
    """LLVM vectors of words, of 64 bits each, as Philox is written with."""

    def __init__(self, build: Build, value: Any, count: int) -> None:
        self.build, self.value, self.count = build, value, count

    def _with(self, name: str, other: Any) -> _Words:
        if not isinstance(other, _Words):
            constant = ir.Constant(ir.VectorType(I64, self.count), [other] * self.count)
            other = _Words(self.build, constant, self.count)
        return _Words(self.build, getattr(self.build, name)(self.value, other.value), self.count)

    def __add__(self, other: Any) -> _Words:
        return self._with("add", other)

    def __mul__(self, other: Any) -> _Words:
        return self._with("mul", other)

    def __xor__(self, other: Any) -> _Words:
        return self._with("xor", other)

    def __and__(self, other: Any) -> _Words:
        return self._with("and_", other)

    def __rshift__(self, other: Any) -> _Words:
        return self._with("lshr", other)


# The functions of one dtype ------------------------------------------------------------------

COMPARISONS = {
    "less": "<",
    "less_equal": "<=",
    "greater": ">",
    "greater_equal": ">=",
    "equal": "==",
    "not_equal": "!=",
}
MATH = {
    name: getattr(vecmath, name)
    for name in (
        *("exp", "expm1", "log", "log1p", "tanh", "sigmoid", "sqrt", "abs", "sign", "floor"),
        *("maximum", "minimum", "sin", "cos", "erf", "power", "where", "divisor_scale"),
    )
}


def _one_number(kind: Any, element: Any) -> tuple[Any, Any]:
    """Functions that read and write one number of a kind: the k-th from an address on."""

    @intrinsic
    def get(typingctx: Any, address: Any, k: Any) -> Any:
        def emit(context: Any, build: Build, sig: Any, args: Any) -> Any:
            return build.load(pointer_ir(build, args[0], args[1], element, element))

        return kind(WORD, WORD), emit

    @intrinsic
    def put(typingctx: Any, address: Any, k: Any, value: Any) -> Any:
        def emit(context: Any, build: Build, sig: Any, args: Any) -> Any:
            build.store(args[2], pointer_ir(build, args[0], args[1], element, element))
            return context.get_dummy_value()

        return types.void(WORD, WORD, kind), emit

    return get, put


def _compiled_functions(dtype: str) -> SimpleNamespace:
    kind = VectorType(dtype, lanes(dtype))
    count, vector, element = kind.count, kind.vector, kind.scalar
    _operators(kind)
    masks_are_free = vector_bits() == 512  # elsewhere a masked store takes many times longer

    @intrinsic
    def load(typingctx: Any, address: Any, j: Any, n: Any) -> Any:
        def emit(context: Any, build: Build, sig: Any, args: Any) -> Any:
            address, j, n = args
            at = pointer_ir(build, address, j, element, vector)
            return masked_load_ir(build, at, n, vector, kind.bytes)

        return kind(WORD, WORD, WORD), emit

    def masked(build: Build, value: Any, at: Any, n: Any) -> None:
        mask = ir.VectorType(I1, count)
        function = cgutils.get_or_insert_function(
            build.module,
            ir.FunctionType(ir.VoidType(), [vector, vector.as_pointer(), I32, mask]),
            f"llvm.masked.store.v{count}f{8 * kind.bytes}.p0",
        )
        align = ir.Constant(I32, kind.bytes)
        build.call(function, [value, at, align, first_lanes_ir(build, n, count)])

    @intrinsic
    def store(typingctx: Any, address: Any, j: Any, value: Any, n: Any) -> Any:
        def emit(context: Any, build: Build, sig: Any, args: Any) -> Any:
            address, j, value, n = args
            at = pointer_ir(build, address, j, element, vector)
            if masks_are_free:
                masked(build, value, at, n)
            else:
                whole = build.icmp_signed(">=", n, ir.Constant(I64, count))
                with build.if_else(whole, likely=True) as (then, otherwise):
                    with then:
                        build.store(value, at, align=kind.bytes)
                    with otherwise:
                        masked(build, value, at, n)
            return context.get_dummy_value()

        return types.void(WORD, WORD, kind, WORD), emit

    @intrinsic
    def fetch(typingctx: Any, address: Any, j: Any) -> Any:
        """Begin to bring a line of memory near that will be read soon; any address will do."""

        def emit(context: Any, build: Build, sig: Any, args: Any) -> Any:
            byte = ir.IntType(8)
            prefetch_ir(build, pointer_ir(build, args[0], args[1], element, byte))
            return context.get_dummy_value()

        return types.void(WORD, WORD), emit

    @intrinsic
    def repeat(typingctx: Any, address: Any) -> Any:
        def emit(context: Any, build: Build, sig: Any, args: Any) -> Any:
            number = build.load(build.inttoptr(args[0], element.as_pointer()))
            return splat_ir(build, number, count)

        return kind(WORD), emit

    scalar, put_scalar = _one_number(getattr(types, dtype), element)

    @intrinsic
    def constant(typingctx: Any, number: Any) -> Any:
        def emit(context: Any, build: Build, sig: Any, args: Any) -> Any:
            value = context.cast(build, args[0], sig.args[0], types.float64)
            if dtype == "float32":
                value = build.fptrunc(value, element)
            return splat_ir(build, value, count)

        return kind(number), emit

    def part(combine: str, nothing: float) -> Any:
        @intrinsic
        def take_in(typingctx: Any, sum_: Any, x: Any, n: Any) -> Any:
            """``sum_`` with the first n lanes of x taken in, lane by lane."""

            def emit(context: Any, build: Build, sig: Any, args: Any) -> Any:
                on = _Lanes(build, kind)
                value = on.select(first_lanes_ir(build, args[2], count), on.wrap(args[1]), nothing)
                return _combined(on, combine, on.wrap(args[0]), value).value

            return kind(kind, kind, WORD), emit

        return take_in

    def whole(combine: str) -> Any:
        @intrinsic
        def reduce(typingctx: Any, x: Any) -> Any:
            """All lanes taken together, in every lane; always in the same order."""

            def emit(context: Any, build: Build, sig: Any, args: Any) -> Any:
                on = _Lanes(build, kind)
                value, half = on.wrap(args[0]), count // 2
                while half:  # each lane with the one that is ``half`` away
                    places = [k ^ half for k in range(count)]
                    order = ir.Constant(ir.VectorType(I32, count), places)
                    other = build.shuffle_vector(value.value, value.value, order)
                    value = _combined(on, combine, value, on.wrap(other))
                    half //= 2
                return value.value

            return kind(kind), emit

        return reduce

    def mathematics(function: Callable[..., Any]) -> Any:
        count = vecmath.arity(function)

        def emit(context: Any, build: Build, sig: Any, args: Any) -> Any:
            on = _Lanes(build, kind)
            return function(on, *map(on.wrap, args)).value

        if count == 1:

            @intrinsic
            def made(typingctx: Any, a: Any) -> Any:
                return kind(kind), emit
        elif count == 2:

            @intrinsic
            def made(typingctx: Any, a: Any, b: Any) -> Any:
                return kind(kind, kind), emit
        else:

            @intrinsic
            def made(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
                return kind(kind, kind, kind), emit

        return made

    def comparison(sign: str) -> Any:
        return mathematics(lambda on, a, b: on.select(on.compare(sign, a, b), 1.0, 0.0))

    @intrinsic
    def uniform(typingctx: Any, seed: Any, operation: Any, step: Any, row: Any, j: Any) -> Any:
        def emit(context: Any, build: Build, sig: Any, args: Any) -> Any:
            seed, operation, step, row, j = (splat_ir(build, word, count) for word in args)
            wide = ir.VectorType(I64, count)
            column = build.add(j, ir.Constant(wide, list(range(count))))
            key = build.and_(seed, ir.Constant(wide, [philox.LOW] * count))
            high = build.lshr(seed, ir.Constant(wide, [32] * count))
            words = (column, row, step, operation, key, high)
            made = philox.first_word(*(_Words(build, word, count) for word in words))
            bits = build.trunc((made >> 32 - philox.BITS).value, ir.VectorType(I32, count))
            numbers = build.sitofp(bits, kind.vector)
            return build.fmul(numbers, ir.Constant(kind.vector, [2.0**-philox.BITS] * count))

        return kind(*[WORD] * 5), emit

    return SimpleNamespace(
        LANES=count,
        load=load,
        store=store,
        fetch=fetch,
        uniform=uniform,
        repeat=repeat,
        scalar=scalar,
        put_scalar=put_scalar,
        constant=constant,
        part_sum=part("sum", 0.0),
        part_max=part("maximum", -np.inf),
        part_min=part("minimum", np.inf),
        row_sum=whole("sum"),
        row_max=whole("maximum"),
        row_min=whole("minimum"),
        **{name: mathematics(function) for name, function in MATH.items()},
        **{name: comparison(sign) for name, sign in COMPARISONS.items()},
    )


def _combined(on: _Lanes, combine: str, a: _Value, b: _Value) -> _Value:
    return a + b if combine == "sum" else MATH[combine](on, a, b)  # type: ignore[no-any-return]


def _operators(kind: VectorType) -> None:
    """+ - * / and the minus sign between vectors of this type."""

    def define(op: Any, arity: int, emit: Any) -> None:
        @infer_global(op)
        class Template(AbstractTemplate):  # type: ignore[misc]
            def generic(self, args: Any, kws: Any) -> Any:
                return signature(kind, *args) if args == (kind,) * arity else None

        def lower(context: Any, build: Build, sig: Any, args: Any) -> Any:
            return emit(build, *args)

        lower_builtin(op, *[kind] * arity)(lower)

    define(operator.add, 2, lambda build, a, b: build.fadd(a, b, flags=FLAGS))
    define(operator.sub, 2, lambda build, a, b: build.fsub(a, b, flags=FLAGS))
    define(operator.mul, 2, lambda build, a, b: build.fmul(a, b, flags=FLAGS))
    define(operator.truediv, 2, lambda build, a, b: build.fdiv(a, b, flags=FLAGS))
    define(operator.neg, 1, lambda build, a: build.fneg(a))


def _plain_functions(dtype: str) -> SimpleNamespace:
    """The same functions in plain Python, one lane wide."""
    cell = ctypes.c_float if dtype == "float32" else ctypes.c_double
    number = np.dtype(dtype).type
    size = number().itemsize

    def load(address: int, j: int, n: int) -> Any:
        return number(cell.from_address(address + j * size).value)

    def store(address: int, j: int, value: Any, n: int) -> None:
        cell.from_address(address + j * size).value = value

    on = vecmath.OverNumPy(dtype)
    return SimpleNamespace(
        LANES=1,
        load=load,
        store=store,
        fetch=lambda address, j: None,
        uniform=lambda seed, operation, step, row, j: number(
            (
                philox.first_word(j, row, step, operation, seed & philox.LOW, seed >> 32)
                >> 32 - philox.BITS
            )
            * 2.0**-philox.BITS
        ),
        repeat=lambda address: load(address, 0, 1),
        scalar=lambda address, j: load(address, j, 1),
        put_scalar=lambda address, j, value: store(address, j, value, 1),
        constant=number,
        part_sum=lambda total, x, n: total + x,
        part_max=lambda total, x, n: np.maximum(total, x),
        part_min=lambda total, x, n: np.minimum(total, x),
        row_sum=lambda x: x,
        row_max=lambda x: x,
        row_min=lambda x: x,
        **{
            name: (lambda *args, function=function: number(function(on, *args)))
            for name, function in MATH.items()
        },
        **{
            name: (lambda a, b, sign=sign: number(on.compare(sign, a, b)))
            for name, sign in COMPARISONS.items()
        },
    )


@cache
def vectors(dtype: str) -> SimpleNamespace:
    """The vector functions for ``"float32"`` or ``"float64"``."""
    return _plain_functions(dtype) if config.DISABLE_JIT else _compiled_functions(dtype)


# Words: addresses and sizes ------------------------------------------------------------------


def _put_word(table: int, k: int, value: int) -> None:
    ctypes.c_int64.from_address(table + 8 * k).value = value


def _word_functions() -> tuple[Any, ...]:
    if config.DISABLE_JIT:
        word_at = ctypes.c_int64.from_address
        return (
            lambda table, k: word_at(table + 8 * k).value,
            _put_word,
            lambda table, k: ctypes.c_uint8.from_address(table + k).value,
            lambda: 0,
            lambda saved: None,
        )

    word, put_word = _one_number(WORD, I64)

    @intrinsic
    def flag(typingctx: Any, table: Any, k: Any) -> Any:
        def emit(context: Any, build: Build, sig: Any, args: Any) -> Any:
            byte = ir.IntType(8)
            return build.zext(build.load(pointer_ir(build, args[0], args[1], byte, byte)), I64)

        return WORD(WORD, WORD), emit

    @intrinsic
    def flush_denormals(typingctx: Any) -> Any:
        def emit(context: Any, build: Build, sig: Any, args: Any) -> Any:
            return _control(context, build, None)

        return WORD(), emit

    @intrinsic
    def restore_denormals(typingctx: Any, saved: Any) -> Any:
        def emit(context: Any, build: Build, sig: Any, args: Any) -> Any:
            _control(context, build, args[0])
            return context.get_dummy_value()

        return types.void(WORD), emit

    return word, put_word, flag, flush_denormals, restore_denormals


def _control(context: Any, build: Build, restore: Any) -> Any:
    """Set the processor's control word, or switch on flushing in it; returns what it was.

    Numbers below 1e-38 are many times slower than others, and gradients that vanish become such.
    """
    triple = build.module.triple or ""
    if triple.startswith("x86_64"):
        slot = cgutils.alloca_once(build, I32)
        pointer = build.bitcast(slot, ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type])

        def run(name: str) -> None:
            name = f"llvm.x86.sse.{name}"
            build.call(cgutils.get_or_insert_function(build.module, kind, name), [pointer])

        if restore is not None:
            build.store(build.trunc(restore, I32), slot)
            run("ldmxcsr")
            return restore
        run("stmxcsr")
        saved = build.load(slot)
        build.store(build.or_(saved, ir.Constant(I32, 0x8040)), slot)  # flush to zero, both ways
        run("ldmxcsr")
        return build.zext(saved, I64)
    if triple.startswith(("aarch64", "arm64")):
        put = cgutils.get_or_insert_function(
            build.module, ir.FunctionType(ir.VoidType(), [I64]), "llvm.aarch64.set.fpcr"
        )
        if restore is not None:
            build.call(put, [restore])
            return restore
        get = cgutils.get_or_insert_function(
            build.module, ir.FunctionType(I64, []), "llvm.aarch64.get.fpcr"
        )
        saved = build.call(get, [])
        build.call(put, [build.or_(saved, ir.Constant(I64, 1 << 24))])
        return saved
    return ir.Constant(I64, 0)


word, put_word, flag, flush_denormals, restore_denormals = _word_functions()
