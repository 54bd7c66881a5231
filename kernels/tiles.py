"""Products of float32 on a processor whose tiles multiply bfloat16 (Intel's AMX), without loss.

A tile multiplies numbers with 8 significant bits and the range of a float32, 16 times as many at
once as vectors do. A float32 has 24 significant bits, so it is the sum of three such pieces,

    x = x₀ + x₁ + x₂,   x y ≈ x₀y₀ + x₀y₁ + x₁y₀ + x₁y₁ + x₀y₂ + x₂y₀,

and the three products that are left out are below 2⁻²⁴ of x y, half a unit in the last place of
float32. Sums are float32. The error is that of multiply-add, but where all numbers have one sign:
small products are added to sums that are large already, and of 256 equal products the sum is off by
up to 2e-5 of it. The time is less than half (Henry, Tang and Heinecke 2019, "Leveraging the
bfloat16 artificial intelligence datatype for higher-precision computations"). Pieces below 1e-38
count as zero, so that numbers below some 1e-33 have fewer bits. NaN is a piece of its own, but
infinity times the pieces of a number is NaN, too: for rows of a and for matrices that hold
infinities vectors do the work.

A *tile* is 16 lines of 64 bytes. The sum over k goes by *spans* of 32: number j of a line holds the
pieces for k = j and k = 16 + j, side by side. Split rows of a are (M / 16, spans, 3 pieces, tile),
where a line is a row of a; a packed matrix b is (panels, spans, 3 pieces, 2 tiles), where a line is
a k and a panel has 32 columns, and after it a word for each panel, 0 if nothing in it is infinite.

The order of every sum depends on nothing but K, so that a row has the same bits in any company.
With Numba's compiler switched off the functions are plain Python. Imports machine, simd, NumPy,
Numba and llvmlite.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic
from tinygrad_seq.kernels import machine
from tinygrad_seq.kernels.simd import I32, I64, WORD, VectorType, masked_load_ir, prefetch_ir

LINES, SPAN, COLUMNS = 16, 32, 32  # of a tile; of k; of a panel
LINE, TILE = 64, 1024  # bytes
A_SPAN, B_SPAN = 3 * TILE, 6 * TILE  # bytes of a span of 16 rows of a, of a panel of b
CONFIGURATION = 64  # bytes that say what the tiles' shapes are, before the split rows
MOST_SPLIT, MOST_ROWS = 2**18, 96  # bytes and rows that are split at once; they stay near
AHEAD_LINES = 4  # of a span that will be needed soon: the processor does not foresee new pages
LEAST_ROWS = 16  # of a product with fewer, or that fills less of its tiles, vectors are as quick
WORTH_PACKING = 512  # rows of all steps from which on matrices are split
# The pieces of a and of b that are multiplied, the small products first; one of both changes.
PRODUCTS = ((0, 2), (0, 1), (1, 1), (1, 0), (2, 0), (0, 0))


def used(dtype: str) -> bool:
    """Whether products of this dtype are done by tiles here."""
    return dtype == "float32" and not config.DISABLE_JIT and machine.tiles()


def worth(rows: int, K: int, N: int) -> bool:
    """Whether a product with so many rows in all is quicker by tiles, filled up as they are."""
    filled = K * N / (spans(K) * SPAN * -(-N // COLUMNS) * COLUMNS)
    return rows * filled >= LEAST_ROWS


def filled(matrices: Iterable[tuple[int, int]]) -> bool:
    """Whether products that give matrices of these sizes fill their tiles by half at least."""
    numbers = places = 0
    for K, N in matrices:
        numbers += K * N
        places += -(-K // LINES) * LINES * -(-N // COLUMNS) * COLUMNS
    return 2 * numbers >= places


def spans(K: int) -> int:
    return -(-K // SPAN)


def matrix_bytes(K: int, N: int) -> int:
    """The memory of a packed matrix."""
    return -(-N // COLUMNS) * (spans(K) * B_SPAN + 8)


def block_bytes(count: int, columns: int) -> int:
    """The memory of ``count`` rows that are summed over, split, on either side of the product."""
    return spans(count) * B_SPAN * -(-columns // COLUMNS)


def split_bytes(K: int, rows: int) -> int:
    """The memory in which ``product_in_tiles`` splits up to so many rows."""
    blocks = -(-min(rows, MOST_ROWS) // LINES)
    return CONFIGURATION + min(blocks * spans(K), max(blocks, MOST_SPLIT // A_SPAN)) * A_SPAN


# Texts of the functions, for library.py ---------------------------------------------------------

FUNCTIONS = {"pack_in_tiles": 8, "product_in_tiles": 10, "gram_in_tiles": 10}
HELPERS = (
    *("split_row", "clear_row", "in_vectors", "shape_tiles", "by_panels"),
    *("find_rows", "split_tile", "split_strips", "split_panels"),
)
TEXT = f'''


def pack_in_tiles(source, row, column, K, N, to, first, end):
    """Panels first to end of a matrix whose numbers are side by side in one direction."""
    spans = (K + {SPAN - 1}) // {SPAN}
    flags = to + (N + {COLUMNS - 1}) // {COLUMNS} * spans * {B_SPAN}
    for p in range(first, end):
        odd = 0
        for s in range(spans):
            for v in range(2):
                tile = to + (p * spans + s) * {B_SPAN} + v * {TILE}
                n = {COLUMNS} * p + {LINES} * v
                for j in range({LINES}):
                    line, k, left = tile + {LINE} * j, {SPAN} * s + j, N - n
                    if column == 1:
                        x = source + 4 * (k * row + n)
                        nx, ny = left if k < K else 0, left if k + {LINES} < K else 0
                        odd |= split(x, nx, x + {LINE} * row, ny, line, {2 * TILE})
                    else:
                        x = source + 4 * ((n + j) * column + {SPAN} * s)
                        nx = K - {SPAN} * s if j < left else 0
                        odd |= split(x, nx, x + {LINE}, nx - {LINES}, line, {2 * TILE})
                if column != 1:
                    for piece in range(3):
                        transpose(tile + 2 * piece * {TILE})
        put_word(flags, p, odd & 1)


def split_row(x, K, line):
    """A row of a as pieces; 1 if there are infinities in it, and no NaN."""
    odd = 0
    for s in range(0, K, {SPAN}):
        odd |= split(x + 4 * s, K - s, x + 4 * s + {LINE}, K - s - {LINES}, line, {TILE})
        line += {A_SPAN}
    return 1 if odd == 1 else 0


def clear_row(K, line):
    """Zeros in the place of a row's pieces."""
    for s in range(0, K, {SPAN}):
        for piece in range(3):
            for k in range({LINE // 8}):
                put_word(line + piece * {TILE}, k, 0)
        line += {A_SPAN}


def in_vectors(x, K, b, size, panels, c, add):
    """A row of a times a packed matrix, whose pieces are put together again."""
    for n in range(0, panels * {COLUMNS}, LANES):
        line = b + n // {COLUMNS} * size + n % {COLUMNS} // {LINES} * {TILE} + 4 * (n % {LINES})
        total = constant(0.0)
        if add:
            total = load(c, n, LANES)
        for k in range(K):
            at = line + k // {SPAN} * {B_SPAN} + k % {LINES} * {LINE}
            total = total + repeat(x + 4 * k) * together(at, {2 * TILE}, k // {LINES} % 2)
        store(c, n, total, LANES)


def shape_tiles(at, first, second):
    """So many rows in the first and in the second tiles of a."""
    put_word(at, 0, 1)
    put_word(at, 1, 0)
    for k in range(2):
        put_word(at, 2 + k, {LINE * 0x0001000100010001})
        put_word(at, 4 + k, 0)
    rows = first + (first << 8) + (second << 16) + (second << 24) + (first << 32)
    if second:
        rows += (second << 40) + ({LINES} << 48)
    else:  # all of a's three pieces are held
        rows = first * 0x01010101010101
    put_word(at, 6, rows + ({LINES} << 56))
    put_word(at, 7, 0)
    configure(at)


def by_panels(a, M, b, size, spans, panels, c, ldc, add, at):
    """Split rows times packed panels, 32 rows and columns at a time, or 16 rows and 64 columns.

    ``size`` bytes are from panel to panel, of which as many spans are done as rows were split.
    """
    m = 0
    while m < M:
        rows = min(M - m, {2 * LINES})
        here, to = a + m // {LINES} * spans * {A_SPAN}, c + 4 * m * ldc
        if m == 0 or rows < {2 * LINES}:
            shape_tiles(at, min(rows, {LINES}), max(rows - {LINES}, 0))
        m += {2 * LINES}
        p = 0
        if rows <= {LINES}:
            while p + 1 < panels:
                multiply_1x2(here, 0, b + p * size, size, spans, to + {4 * COLUMNS} * p, ldc, add)
                p += 2
            if p < panels:
                multiply_1x1(here, 0, b + p * size, size, spans, to + {4 * COLUMNS} * p, ldc, add)
        else:
            for p in range(panels):
                here_b, to_c = b + p * size, to + {4 * COLUMNS} * p
                multiply_2x1(here, spans * {A_SPAN}, here_b, size, spans, to_c, ldc, add)
    release()


def product_in_tiles(a, row, M, b, K, panels, c, ldc, add, memory):
    """``product`` with a matrix of ``pack_in_tiles``; rows are split in ``memory``.

    So many of the spans at once that the pieces of all rows stay near while panels go by.
    """
    spans = (K + {SPAN - 1}) // {SPAN}
    size, pieces, odd_b = spans * {B_SPAN}, memory + {CONFIGURATION}, 0
    for p in range(panels):
        odd_b |= word(b + panels * size, p)
    for first in range(0, M, {MOST_ROWS}):
        rows, to = min({MOST_ROWS}, M - first), c + 4 * first * ldc
        most = max(1, {MOST_SPLIT // A_SPAN} // ((rows + {LINES - 1}) // {LINES}))
        for s in range(0, spans, most):
            count, from_, here = min(most, spans - s), a + 4 * first * row, b + s * {B_SPAN}
            x, k, adds, odd = from_ + 4 * {SPAN} * s, min(K, {SPAN} * (s + count)), add | s, 0
            k -= {SPAN} * s
            for m in range(rows):
                line = pieces + m // {LINES} * count * {A_SPAN} + m % {LINES} * {LINE}
                odd_row = split_row(x + 4 * m * row, k, line)
                odd |= odd_row
                if odd_row:
                    clear_row(k, line)
            if odd_b == 0:
                by_panels(pieces, rows, here, size, count, panels, to, ldc, adds, memory)
            if odd | odd_b:  # rows that were left out, or all
                for m in range(rows):
                    at = x + 4 * m * row
                    if odd_b or split_row(at, k, pieces):
                        in_vectors(at, k, here, size, panels, to + 4 * m * ldc, adds | 1 - odd_b)


def gram_in_tiles(p_slab, q_slab, low, high, N, count, out, distance, add, at):
    """``gram`` of blocks of ``split_strips`` and ``split_panels``."""
    panels, to = (N + {COLUMNS - 1}) // {COLUMNS}, out + 4 * low * distance
    spans = (count + {SPAN - 1}) // {SPAN}
    size = spans * {B_SPAN}
    by_panels(p_slab, high - low, q_slab, size, spans, panels, to, distance, add, at)
'''
# Beside the packing of the large products, whose ``row_address`` they use.
PACKING = f'''


def find_rows(strides, listed, first, count, rows):
    """The addresses of the rows of a span, 0 for those that are not there."""
    for k in range({SPAN}):
        at = 0
        if first + k < count:
            at = row_address(strides, listed, first + k)
        put_word(rows, k, at)


def split_tile(rows, n, left, tile, distance):
    """The ``left`` columns from n on, of all rows of a span, as the pieces of a tile."""
    for j in range({LINES}):
        x, y = word(rows, j), word(rows, {LINES} + j)
        nx, ny = left if x else 0, left if y else 0
        split(x + 4 * n, nx, y + 4 * n, ny, tile + {LINE} * j, distance)


def split_strips(operand, listed, count, low, high, to, s0, part):
    """Columns low to high of ``count`` rows, split, as the side of a."""
    spans, rows = (count + {SPAN - 1}) // {SPAN}, listed + LISTED
    strides = strides_of(operand, s0, part)
    for s in range(spans):
        find_rows(strides, listed, {SPAN} * s, count, rows)
        for m in range(low, high, {LINES}):
            tile = to + ((m - low) // {LINES} * spans + s) * {A_SPAN}
            split_tile(rows, m, high - m, tile, {TILE})
            for piece in range(3):
                transpose(tile + piece * {TILE})


def split_panels(operand, listed, count, N, to, s0, part):
    """All columns of ``count`` rows, split, as the side of b."""
    spans, rows = (count + {SPAN - 1}) // {SPAN}, listed + LISTED
    strides = strides_of(operand, s0, part)
    for s in range(spans):
        find_rows(strides, listed, {SPAN} * s, count, rows)
        for n in range(0, N, {COLUMNS}):
            tile = to + (n // {COLUMNS} * spans + s) * {B_SPAN}
            split_tile(rows, n, N - n, tile, {2 * TILE})
            split_tile(rows, n + {LINES}, N - n - {LINES}, tile + {TILE}, {2 * TILE})
'''


# The functions that they are made of ------------------------------------------------------------

HIGH = -0x10000  # the upper half of a number: a bfloat16
HALF = 0x8000  # rounds to it
NOT_FINITE, NOT_SPLIT = 0xFF000000, 0xFEFF0000  # bits of |x|, shifted by the sign, from which on
BYTE = ir.IntType(8)
INTS = ir.VectorType(I32, LINES)
FLOATS = ir.VectorType(ir.FloatType(), LINES)


def _all(number: int) -> Any:
    return ir.Constant(INTS, [number] * LINES)


def _word(number: int) -> Any:
    return ir.Constant(I64, number)


def _sum(build: Any, address: Any, *distances: tuple[Any, int]) -> Any:
    """An address so many times each distance further on."""
    for distance, times in distances:
        address = build.add(address, build.mul(distance, _word(times)))
    return address


def _pointer(build: Any, address: Any, to: Any = INTS) -> Any:
    return build.inttoptr(address, to.as_pointer())


def _call(build: Any, name: str, *values: Any) -> Any:
    kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
    return build.call(cgutils.get_or_insert_function(build.module, kind, name), values)


class _Split:
    """Sixteen numbers in the making of their pieces."""

    def __init__(self, build: Any, x: Any) -> None:
        self.build, self.x = build, x
        self.bits = build.bitcast(x, INTS)
        self.size = build.shl(self.bits, _all(1))
        self.odd = build.icmp_unsigned(">=", self.size, _all(NOT_SPLIT))

    @property
    def nan(self) -> Any:
        return self.build.icmp_unsigned(">", self.size, _all(NOT_FINITE))

    @property
    def large(self) -> Any:
        """Infinite, or of a first piece that would be."""
        return self.build.and_(self.odd, self.build.not_(self.nan))

    def pieces(self, finite: bool) -> list[Any]:
        """The numbers whose upper halves are the pieces."""
        build = self.build
        first = build.and_(build.add(self.bits, _all(HALF)), _all(HIGH))
        if not finite:  # largest numbers are cut, not rounded; what is not finite is one piece
            quiet = build.or_(self.bits, build.select(self.nan, _all(0x400000), _all(0)))
            first = build.select(self.odd, build.and_(quiet, _all(HIGH)), first)
        rest = build.fsub(self.x, build.bitcast(first, FLOATS))
        if not finite:
            whole = build.icmp_unsigned(">=", self.size, _all(NOT_FINITE))
            rest = build.select(whole, ir.Constant(FLOATS, [0.0] * LINES), rest)
        second = build.and_(build.bitcast(rest, INTS), _all(HIGH))
        third = build.fsub(rest, build.bitcast(second, FLOATS))
        return [first, second, build.bitcast(third, INTS)]


def _store_pairs(build: Any, x: _Split, y: _Split, to: Any, distance: Any, finite: bool) -> None:
    for piece, (low, high) in enumerate(zip(x.pieces(finite), y.pieces(finite), strict=True)):
        both = build.or_(build.lshr(low, _all(16)), build.and_(high, _all(HIGH)))
        build.store(both, _pointer(build, _sum(build, to, (distance, piece))), align=LINE)


def _any(build: Any, one: Any, other: Any) -> Any:
    """Whether a lane of either of two conditions is set."""
    both = build.bitcast(build.or_(one, other), ir.IntType(LINES))
    return build.icmp_unsigned("!=", both, ir.Constant(both.type, 0))


def _transposed(build: Any, lines: list[Any]) -> list[Any]:
    """Sixteen vectors transposed: at each stage blocks of twice the size change places."""
    width = 1
    while width < LINES:
        made = list(lines)
        for k in range(LINES):
            if k & width:
                continue
            a, b = lines[k], lines[k + width]
            one = [c - width + LINES if c & width else c for c in range(LINES)]
            two = [c + LINES if c & width else c + width for c in range(LINES)]
            made[k] = build.shuffle_vector(a, b, ir.Constant(INTS, one))
            made[k + width] = build.shuffle_vector(a, b, ir.Constant(INTS, two))
        lines, width = made, 2 * width
    return lines


class _Tiles:
    """The processor's eight tiles, in a function in the making."""

    def __init__(self, build: Any) -> None:
        self.build = build

    def load(self, tile: int, at: Any, distance: Any) -> None:
        self._run("tileloadd64", tile, _pointer(self.build, at, to=BYTE), distance)

    def store(self, tile: int, at: Any, distance: Any) -> None:
        self._run("tilestored64", tile, _pointer(self.build, at, to=BYTE), distance)

    def clear(self, tile: int) -> None:
        self._run("tilezero", tile)

    def take_in(self, c: int, a: int, b: int) -> None:
        self._run("tdpbf16ps", c, a, b)

    def _run(self, name: str, *given: Any) -> None:
        values = [ir.Constant(BYTE, g) if isinstance(g, int) else g for g in given]
        _call(self.build, f"llvm.x86.{name}", *values)


def _multiply(rows: int, panels: int) -> Any:
    """``(a, a_distance, b, b_distance, spans, c, ldc, add)``: so many tiles of rows and panels.

    ``a_distance`` and ``b_distance`` are from tile to tile of rows and from panel to panel. With
    one tile of rows all three of its pieces are held, else one piece of both; and so of b.
    """
    sums = [(m, n) for m in range(rows) for n in range(2 * panels)]  # tiles from 0 on
    held_a = 3 if rows == 1 else rows
    of_b = [7] * 4 if rows == 1 else [6, 7]

    @intrinsic
    def multiply(
        typingctx: Any, a: Any, ad: Any, b: Any, bd: Any, spans: Any, c: Any, ldc: Any, add: Any
    ) -> Any:
        def emit(context: Any, build: Any, sig: Any, args: Any) -> Any:
            a, ad, b, bd, spans, c, ldc, add = args
            tiles, line, c_line = _Tiles(build), _word(LINE), build.mul(ldc, _word(4))
            places = [_sum(build, c, (c_line, LINES * m), (line, n)) for m, n in sums]

            def load_a(m: int, piece: int, tile: int) -> None:
                at = _sum(build, a, (ad, m), (loop.index, A_SPAN), (_word(TILE), piece))
                tiles.load(tile, at, line)

            def load_b(n: int, piece: int, tile: int) -> None:
                near = _word(TILE), 2 * piece + n % 2
                tiles.load(tile, _sum(build, b, (bd, n // 2), (loop.index, B_SPAN), near), line)

            with build.if_else(build.icmp_signed("!=", add, _word(0))) as (then, otherwise):
                with then:
                    for tile, place in enumerate(places):
                        tiles.load(tile, place, c_line)
                with otherwise:
                    for tile in range(len(sums)):
                        tiles.clear(tile)
            first_a = len(sums)
            with cgutils.for_range(build, spans) as loop:
                for panel in range(panels):
                    for k in range(AHEAD_LINES):
                        ahead = (bd, panel), (loop.index, B_SPAN), (line, k), (_word(B_SPAN), 2)
                        prefetch_ir(build, _pointer(build, _sum(build, b, *ahead), to=BYTE))
                if rows == 1:
                    for piece in range(held_a):
                        load_a(0, piece, first_a + piece)
                    for piece in (2, 1, 0):
                        for tile, (_, n) in enumerate(sums):
                            load_b(n, piece, of_b[n])
                            for with_a in [i for i, j in PRODUCTS if j == piece]:
                                tiles.take_in(tile, first_a + with_a, of_b[n])
                else:
                    before: tuple[int, int] = (-1, -1)
                    for with_a, with_b in PRODUCTS:
                        for m in range(held_a if before[0] != with_a else 0):
                            load_a(m, with_a, first_a + m)
                        for n in range(len(of_b) if before[1] != with_b else 0):
                            load_b(n, with_b, of_b[n])
                        before = with_a, with_b
                        for tile, (m, n) in enumerate(sums):
                            tiles.take_in(tile, first_a + m, of_b[n])
            for tile, place in enumerate(places):
                tiles.store(tile, place, c_line)
            return context.get_dummy_value()

        return types.void(*[WORD] * 8), emit

    return multiply


def _compiled() -> SimpleNamespace:
    @intrinsic
    def split(typingctx: Any, x: Any, nx: Any, y: Any, ny: Any, to: Any, distance: Any) -> Any:
        """The first nx and ny of 16 numbers each as three lines of pairs.

        Returns 1 if one of them is infinite, or so large that its first piece would be, 2 if one
        is NaN, 3 for both, else 0.
        """

        def emit(context: Any, build: Any, sig: Any, args: Any) -> Any:
            x, nx, y, ny, to, distance = args
            first, second = (
                _Split(build, masked_load_ir(build, _pointer(build, at, FLOATS), n, FLOATS, 4))
                for at, n in ((x, nx), (y, ny))
            )
            with build.if_else(_any(build, first.odd, second.odd), likely=False) as (then, rest):
                with then:
                    _store_pairs(build, first, second, to, distance, False)
                    found = build.or_(
                        build.zext(_any(build, first.large, second.large), I64),
                        build.shl(build.zext(_any(build, first.nan, second.nan), I64), _word(1)),
                    )
                    odd_end = build.block
                with rest:
                    _store_pairs(build, first, second, to, distance, True)
                    even_end = build.block
            result = build.phi(I64)
            result.add_incoming(found, odd_end)
            result.add_incoming(_word(0), even_end)
            return result

        return WORD(*[WORD] * 6), emit

    @intrinsic
    def transpose(typingctx: Any, tile: Any) -> Any:
        """Lines and columns of a tile change places."""

        def emit(context: Any, build: Any, sig: Any, args: Any) -> Any:
            places = [_pointer(build, build.add(args[0], _word(LINE * k))) for k in range(LINES)]
            lines = _transposed(build, [build.load(at, align=LINE) for at in places])
            for line, at in zip(lines, places, strict=True):
                build.store(line, at, align=LINE)
            return context.get_dummy_value()

        return types.void(WORD), emit

    @intrinsic
    def together(typingctx: Any, line: Any, distance: Any, high: Any) -> Any:
        """The numbers whose pieces stand in the lower or upper halves of three lines."""

        def emit(context: Any, build: Any, sig: Any, args: Any) -> Any:
            line, distance, high = args
            upper = build.icmp_signed("!=", high, _word(0))
            pieces = []
            for piece in range(3):
                at = _sum(build, line, (distance, piece))
                both = build.load(_pointer(build, at), align=4)
                lower = build.shl(both, _all(16))
                one = build.select(upper, build.and_(both, _all(HIGH)), lower)
                pieces.append(build.bitcast(one, FLOATS))
            return build.fadd(pieces[0], build.fadd(pieces[1], pieces[2]))

        return VectorType("float32", LINES)(WORD, WORD, WORD), emit

    @intrinsic
    def configure(typingctx: Any, at: Any) -> Any:
        def emit(context: Any, build: Any, sig: Any, args: Any) -> Any:
            _call(build, "llvm.x86.ldtilecfg", _pointer(build, args[0], to=BYTE))
            return context.get_dummy_value()

        return types.void(WORD), emit

    @intrinsic
    def release(typingctx: Any) -> Any:
        def emit(context: Any, build: Any, sig: Any, args: Any) -> Any:
            _call(build, "llvm.x86.tilerelease")
            return context.get_dummy_value()

        return types.void(), emit

    return SimpleNamespace(
        split=split,
        transpose=transpose,
        together=together,
        configure=configure,
        release=release,
        multiply_1x1=_multiply(1, 1),
        multiply_1x2=_multiply(1, 2),
        multiply_2x1=_multiply(2, 1),
    )


def _plain() -> SimpleNamespace:
    """The same in plain Python, over NumPy's views of memory."""

    def view(address: int, dtype: Any, count: int) -> np.ndarray:
        size = count * np.dtype(dtype).itemsize
        return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype)

    def floats(bits: np.ndarray) -> np.ndarray:
        return bits.astype(np.uint32).view(np.float32)

    def pieces(x: np.ndarray) -> list[np.ndarray]:
        bits = x.view(np.uint32)
        size = bits << np.uint32(1)
        first = (bits + np.uint32(HALF)) >> 16 << 16
        quiet = np.where(size > NOT_FINITE, bits | 0x400000, bits)
        first = np.where(size >= NOT_SPLIT, quiet >> 16 << 16, first)
        with np.errstate(invalid="ignore"):
            rest = np.where(size >= NOT_FINITE, np.float32(0), x - floats(first))
        second = rest.view(np.uint32) >> 16 << 16
        return [first, second, (rest - floats(second)).view(np.uint32)]

    def split(x: int, nx: int, y: int, ny: int, to: int, distance: int) -> int:
        given = np.zeros((2, LINES), np.float32)
        for row, (at, n) in enumerate(((x, nx), (y, ny))):
            n = min(max(n, 0), LINES)
            if n:
                given[row, :n] = view(at, np.float32, n)
        for piece, (low, high) in enumerate(zip(pieces(given[0]), pieces(given[1]), strict=True)):
            view(to + piece * distance, np.uint32, LINES)[:] = low >> 16 | high >> 16 << 16
        size = given.view(np.uint32) << np.uint32(1)
        nan = size > NOT_FINITE
        return int(((size >= NOT_SPLIT) & ~nan).any()) + 2 * int(nan.any())

    def transpose(tile: int) -> None:
        lines = view(tile, np.uint32, LINES * LINES).reshape(LINES, LINES)
        lines[:] = lines.T.copy()

    def together(line: int, distance: int, high: int) -> Any:
        both = [int(view(line + piece * distance, np.uint32, 1)[0]) for piece in range(3)]
        one = [b >> 16 << 16 if high else b << 16 & 0xFFFFFFFF for b in both]
        first, second, third = floats(np.array(one))
        return first + (second + third)

    shape: list[int] = [0] * 8

    def configure(at: int) -> None:
        shape[:] = view(at + 48, np.uint8, 8).tolist()

    def multiply(rows: int, panels: int) -> Any:
        def parts(at: int, lines: int) -> np.ndarray:
            both = view(at, np.uint32, LINES * LINES).reshape(LINES, LINES)[:lines]
            return np.stack([floats(both << 16), floats(both >> 16 << 16)], -1)

        def run(a: int, ad: int, b: int, bd: int, spans: int, c: int, ldc: int, add: int) -> None:
            for m in range(rows):
                count = shape[2 * m]
                for n in range(2 * panels):
                    to = c + 4 * LINES * m * ldc + LINE * n
                    total = np.zeros((count, LINES), np.float32)
                    for r in range(count if add else 0):
                        total[r] = view(to + 4 * r * ldc, np.float32, LINES)
                    for s in range(spans):
                        for i, j in PRODUCTS:
                            of_a = parts(a + m * ad + s * A_SPAN + i * TILE, count)
                            at = b + n // 2 * bd + s * B_SPAN + (2 * j + n % 2) * TILE
                            total += np.einsum("mkh,knh->mn", of_a, parts(at, LINES))
                    for r in range(count):
                        view(to + 4 * r * ldc, np.float32, LINES)[:] = total[r]

        return run

    return SimpleNamespace(
        split=split,
        transpose=transpose,
        together=together,
        configure=configure,
        release=lambda: None,
        multiply_1x1=multiply(1, 1),
        multiply_1x2=multiply(1, 2),
        multiply_2x1=multiply(2, 1),
    )


def functions() -> SimpleNamespace:
    """What the texts call."""
    return _plain() if config.DISABLE_JIT else _compiled()
