"""The matrix product c = a b, by blocks that stay in registers.

b does not change while a sequence runs, so it is packed once: into panels of PANEL columns, in
each of which the K rows follow one another, (panels, K, PANEL), the last panel filled up with
zeros. a is read as it stands, any stride. A block of ROWS rows of a times one panel is held in
registers while k runs: for each k one load of the panel's row, and one number of a for each row.
Of a last panel that is filled by one vector at most, the other half is left out.

The sum over k runs in the same order for every row and every number of rows, so a row's result does
not depend on which rows it is computed with.

Imports machine, simd, NumPy, Numba and llvmlite.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic
from tinygrad_seq.kernels.machine import vector_bits
from tinygrad_seq.kernels.simd import I64, WORD, lanes, prefetch_ir, splat_ir, vectors

CACHE_LINE = 64  # bytes of a line of the cache
KC = 256  # rows of a slab, of which the large products take in one or more at once
ONWARD, APART = 1, 2  # how a product is added to what is there
NEAREST = 2**15  # bytes of a panel that are gone over again and again: the nearest cache
VECTORS = 2  # of which a panel is wide
# Rows held at once: ROWS * VECTORS sums, VECTORS of the panel and one of a fit in the registers.
ROWS = 8 if vector_bits() == 512 else 6
# Columns of a side that the large products take in at once: whole panels, and whole blocks of ROWS.
AT_ONCE = 256 if vector_bits() == 512 else 192
# Where sums are far away, so many slabs of KC rows, and so many times fewer columns.
FAR_SLABS = 4 if vector_bits() == 512 else 1  # with shorter vectors that gains nothing
# With few rows the sums are too few to keep the multipliers busy: several panels at once.
PANELS_AT_ONCE = {1: 4, 2: 4, 3: 3, 4: 3} if vector_bits() == 512 else {1: 3, 2: 2}


@cache
def panel(dtype: str) -> int:
    """The columns of a panel."""
    columns: int = VECTORS * lanes(dtype)
    return columns


@cache
def strip(dtype: str) -> int:
    """The columns of a strip: those of a, packed together where a product is summed over rows."""
    count = lanes(dtype)
    return count if count % ROWS == 0 else ROWS


def packed_bytes(dtype: str, columns: int) -> int:
    """The memory of KC packed rows, in panels or in strips, and what is stored beyond them."""
    whole = max(-(-columns // unit) * unit for unit in (panel(dtype), strip(dtype)))
    return -(-(KC + 1) * whole * np.dtype(dtype).itemsize // CACHE_LINE) * CACHE_LINE


def micro_kernel(dtype: str, rows: int, wide: int) -> Any:
    """``(a, row, column, b, K, c, ldc, add, ahead, step)``: rows of a times panels, to c.

    As many panels as have ``wide`` vectors together, or the first vector alone of one.
    Addresses in bytes; ``row`` and ``column`` are a's strides and ``ldc`` that of c's rows, in
    elements. Where ``add`` is ONWARD the sum goes on from c, number after number, so that it does
    not matter where it was interrupted; where it is APART its own sum is added to c, so that the
    error of a long sum is that of many short ones. For each k ``step`` bytes more from
    ``ahead`` on are fetched, which will be needed next: a matrix that does not fit the cache comes
    in while the multipliers work, evenly, for one that is asked for too much waits.
    """
    count = lanes(dtype)
    panels = -(-wide // VECTORS)
    element = ir.FloatType() if dtype == "float32" else ir.DoubleType()
    bytes_ = np.dtype(dtype).itemsize
    vector = ir.VectorType(element, count)

    def constant(number: int) -> Any:
        return ir.Constant(I64, number)

    @intrinsic
    def kernel(
        typingctx: Any,
        a: Any,
        row: Any,
        column: Any,
        b: Any,
        K: Any,
        c: Any,
        ldc: Any,
        add: Any,
        ahead: Any,
        step: Any,
    ) -> Any:
        def emit(context: Any, build: Any, sig: Any, args: Any) -> Any:
            a, row, column, b, K, c, ldc, add, ahead, step = args
            pointer = element.as_pointer()
            A, B, C = (build.inttoptr(p, pointer) for p in (a, b, c))
            fma = cgutils.get_or_insert_function(
                build.module,
                ir.FunctionType(vector, [vector] * 3),
                f"llvm.fmuladd.v{count}f{8 * bytes_}",
            )
            a_rows = [build.gep(A, [build.mul(row, constant(m))]) for m in range(rows)]
            size = build.mul(K, constant(VECTORS * count))  # of a panel
            b_panels = [build.gep(B, [build.mul(size, constant(p))]) for p in range(panels)]

            def at(m: int, v: int) -> Any:
                start = build.gep(C, [build.add(build.mul(ldc, constant(m)), constant(v * count))])
                return build.bitcast(start, vector.as_pointer())

            sums = [(m, v) for m in range(rows) for v in range(wide)]  # vectors of c

            def merged(*ways: tuple[Any, dict[Any, Any]]) -> dict[Any, Any]:
                """The sums as they are after whichever way was taken: last block, and sums."""
                found = {t: build.phi(vector) for t in sums}
                for last, values in ways:
                    for t in sums:
                        found[t].add_incoming(values[t], last)
                return found

            fresh, zeros = build.block, dict.fromkeys(sums, ir.Constant(vector, [0.0] * count))
            present, entry, loop, done, apart, end = (
                build.append_basic_block(name)
                for name in ("present", "entry", "k", "done", "apart", "end")
            )
            build.cbranch(build.icmp_signed("==", add, constant(ONWARD)), present, entry)

            build.position_at_end(present)
            already = {t: build.load(at(*t), align=bytes_) for t in sums}
            build.branch(entry)

            build.position_at_end(entry)
            start = merged((fresh, zeros), (present, already))
            build.cbranch(build.icmp_signed(">", K, constant(0)), loop, done)

            build.position_at_end(loop)
            k = build.phi(I64)
            k.add_incoming(constant(0), entry)
            so_far = merged((entry, start))
            offset = build.mul(k, constant(VECTORS * count))
            of_b = []
            for v in range(wide):
                place = build.add(offset, constant(v % VECTORS * count))
                first = build.gep(b_panels[v // VECTORS], [place])
                of_b.append(build.load(build.bitcast(first, vector.as_pointer()), align=bytes_))
            line = build.add(ahead, build.mul(k, step))
            prefetch_ir(build, build.inttoptr(line, ir.IntType(8).as_pointer()))
            new = {}
            along = build.mul(k, column)
            for m in range(rows):
                of_a = splat_ir(build, build.load(build.gep(a_rows[m], [along])), count)
                for v in range(wide):
                    new[m, v] = build.call(fma, [of_a, of_b[v], so_far[m, v]])
            k_next = build.add(k, constant(1))
            k.add_incoming(k_next, loop)
            for t in sums:
                so_far[t].add_incoming(new[t], loop)
            build.cbranch(build.icmp_signed("<", k_next, K), loop, done)

            build.position_at_end(done)
            made = merged((entry, start), (loop, new))
            build.cbranch(build.icmp_signed("==", add, constant(APART)), apart, end)

            build.position_at_end(apart)
            whole = {t: build.fadd(build.load(at(*t), align=bytes_), made[t]) for t in sums}
            build.branch(end)

            build.position_at_end(end)
            for t, value in merged((done, made), (apart, whole)).items():
                build.store(value, at(*t), align=bytes_)
            return context.get_dummy_value()

        return types.void(*[WORD] * 10), emit

    return kernel


def _plain_micro_kernel(dtype: str, rows: int, wide: int) -> Any:
    """The same in plain Python, one number at a time."""
    f = vectors(dtype)

    def kernel(
        a: int, row: int, column: int, b: int, K: int, c: int, ldc: int, add: int, *_: int
    ) -> None:
        for m in range(rows):
            for v in range(wide):
                total = f.load(c, m * ldc + v, 1) if add == ONWARD else f.constant(0)
                for k in range(K):
                    of_b = f.load(b, (v // VECTORS * K + k) * VECTORS + v % VECTORS, 1)
                    total = total + f.load(a, m * row + k * column, 1) * of_b
                if add == APART:
                    total = f.load(c, m * ldc + v, 1) + total
                f.store(c, m * ldc + v, total, 1)

    return kernel


def block_text() -> str:
    """``block(a, row, column, rows, b, K, c, ldc, add, ahead, step)`` as text.

    So many rows, at most ROWS, times one panel; ``half_block`` times the first vector of one.
    """
    text = ""
    for name, wide in (("block", VECTORS), ("half_block", 1)):
        text += f"\n\n\ndef {name}(a, row, column, rows, b, K, c, ldc, add, ahead, step):\n"
        for rows in range(ROWS, 0, -1):
            text += f"    {'if' if rows == ROWS else 'elif'} rows == {rows}:\n"
            text += f"        micro_{rows}x{wide}(a, row, column, b, K, c, ldc, add, ahead, step)\n"
    return text


def product_text(dtype: str) -> str:
    """``product(a, row, M, b, K, wide, c, ldc, add, in_tiles)`` as text.

    b is ``wide`` vectors wide, two to a panel. Of no rows nothing is made. Panel by panel, and a
    panel in parts along K: a part stays in the nearest cache while all rows go over it, in blocks
    of about the same size, and so does the panel of c until its sums are complete. Meanwhile the
    next part is fetched. Few rows take several panels at once. Where ``in_tiles`` is not 0 the
    matrix was packed for tiles, which have memory there (``tiles.py``).
    """
    item = np.dtype(dtype).itemsize
    bytes_ = panel(dtype) * item
    few = ""
    for rows, together in PANELS_AT_ONCE.items():
        few += f"""    if M == {rows}:
        p = 0
        while panels - p >= {together}:
            here, to, after = b + p * size, c + p * {bytes_}, b + (p + {together}) * size
            micro_{rows}x{together * VECTORS}(a, row, 1, here, K, to, ldc, add, after, {CACHE_LINE})
            p += {together}
        while p < panels:
            here, to, after = b + p * size, c + p * {bytes_}, b + (p + 1) * size
            block(a, row, 1, {rows}, here, K, to, ldc, add, after, {CACHE_LINE})
            p += 1
        if half:
            here, to = b + p * size, c + p * {bytes_}
            half_block(a, row, 1, {rows}, here, K, to, ldc, add, here, 0)
        return
"""
    return f"""


def sweep(a, row, M, here, K, c, ldc, add, half):
    blocks = (M + {ROWS - 1}) // {ROWS}
    after, step = here + K * {bytes_}, ({bytes_ - 1} + blocks) // blocks
    for i in range(blocks):
        m = M * i // blocks
        rows = M * (i + 1) // blocks - m
        from_, to, ahead = a + m * row * {item}, c + m * ldc * {item}, after + i * K * step
        if half:
            half_block(from_, row, 1, rows, here, K, to, ldc, add, ahead, step)
        else:
            block(from_, row, 1, rows, here, K, to, ldc, add, ahead, step)


def product(a, row, M, b, K, wide, c, ldc, add, in_tiles):
    if M <= 0:
        return
    if in_tiles:
        product_in_tiles(a, row, M, b, K, (wide + 1) // {VECTORS}, c, ldc, add, in_tiles)
        return
    size, panels, half = K * {bytes_}, wide // {VECTORS}, wide % {VECTORS}
{few}    most = {NEAREST // bytes_}
    for p in range(panels + half):
        here, to, last = b + p * size, c + p * {bytes_}, int(p == panels)
        sweep(a, row, M, here, min(K, most), to, ldc, add, last)
        for k in range(most, K, most):
            part, rest = here + k * {bytes_}, min(most, K - k)
            # not the number 1, for which sweep would be compiled once more
            sweep(a + k * {item}, row, M, part, rest, to, ldc, add | 1, last)
"""


def micro_kernels(dtype: str) -> dict[str, Any]:
    """The micro-kernels that ``block`` and ``product`` call, by name."""
    make = _plain_micro_kernel if config.DISABLE_JIT else micro_kernel
    sizes = [(rows, wide) for wide in (1, VECTORS) for rows in range(1, ROWS + 1)]
    sizes += [(rows, together * VECTORS) for rows, together in PANELS_AT_ONCE.items()]
    return {f"micro_{rows}x{wide}": make(dtype, rows, wide) for rows, wide in sizes}
