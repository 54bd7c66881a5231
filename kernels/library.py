"""The functions that all kernels share, as source text: products, packing, large products.

They are compiled once for a dtype and called by address, so that a new cell compiles in the time
that its own few lines take. Tables of words are read in the order in which ``layout.py`` writes
them.

A *line* is one of those that a row consists of where each is multiplied by itself, a *group* the
lines that have a matrix in common (``matmul_lines`` in program.py). Where products are summed over
rows, a *slab* is KC of these, packed: *strips* of columns of one side, panels of the other.
Imports gemm, tiles and NumPy.
"""

from __future__ import annotations

import re

import numpy as np
from tinygrad_seq.kernels import gemm, tiles

# The functions, and how many arguments each takes, all integers. Those of a module may call those
# of the modules before it, by address, so that each is compiled once, whoever calls it.
MODULES = {
    "blocks": {"block": 11, "half_block": 11, "copy_row": 3, "add_row": 3, "zero_row": 2},
    "choices": {"take": 9, "take_back": 10, "spread": 9, "spread_back": 10},
    "tiles": tiles.FUNCTIONS,  # where there are any
    "packing": {"pack": 3, "pack_strips": 9, "pack_panels": 9},
    "products": {"product": 10, "gram": 10},
    "lines": {"product_of_lines": 11},
    "outer": {"outer": 3, "join": 3},
}

# Words of the table of the large products: of all, of each part of the batch, of each g and of each
# a that goes with it. An operand is an array of the caller (``user``) or a record of the run.
T_WORDS = "active active_bytes tasks scratch bytes g_bytes a_bytes slabs tiles count parts".split()
P_WORDS = "k0 batch begin onward first last low rows".split()
O_WORDS = "base user step row kept places width".split()
G_WORDS = [*O_WORDS, "lines", "how", "count"]
A_WORDS = [*O_WORDS, "out", "out_row", "parts", "packed"]
BY_A, TURNED, BY_G = range(3)  # how the products of a g are made and divided; see outer


def _numbers() -> str:
    """Where each word stands, P_LOW for example, and how many there are, P_WORDS, as text."""
    text = ""
    kinds = {"T": T_WORDS, "P": P_WORDS, "O": O_WORDS, "G": G_WORDS, "A": A_WORDS}
    for kind, words in kinds.items():
        names = ", ".join(f"{kind}_{word.upper()}" for word in [*words, "words"])
        text += f"{names} = range({len(words) + 1})\n"
    return text


_ROWS = """


def copy_row(source, to, n):
    for j in range(0, n, LANES):
        store(to, j, load(source, j, n - j), n - j)


def add_row(source, to, n):
    for j in range(0, n, LANES):
        store(to, j, load(to, j, n - j) + load(source, j, n - j), n - j)


def zero_row(to, n):
    for j in range(0, n, LANES):
        store(to, j, constant(0.0), n - j)
"""

_CHOICES = '''


def take(a, row, M, units, runs, N, c, ldc, add):
    """Runs of L = N // runs: c[:, k L + i] = a[:, units[k] + i], or added to it.

    Rows of a and of c are so many elements apart.
    """
    L = N // max(runs, 1)
    for r in range(M):
        source, to = a + r * row * ITEM, c + r * ldc * ITEM
        if L == 1:
            for k in range(runs):
                x = scalar(source, word(units, k))
                put_scalar(to, k, scalar(to, k) + x if add else x)
        else:
            for k in range(runs):
                x, y = source + word(units, k) * ITEM, to + k * L * ITEM
                for i in range(0, L, LANES):
                    v = load(x, i, L - i)
                    store(y, i, load(y, i, L - i) + v if add else v, L - i)


def take_back(a, row, M, units, runs, N, c, ldc, K, add):
    """c[:, units[k] + i] += a[:, k L + i]; unless added to, c, of K columns, begins as zeros."""
    L = N // max(runs, 1)
    for r in range(M):
        source, to = a + r * row * ITEM, c + r * ldc * ITEM
        if not add:
            zero_row(to, K)
        if L == 1:
            for k in range(runs):
                j = word(units, k)
                put_scalar(to, j, scalar(to, j) + scalar(source, k))
        else:
            k = 0
            while k < runs:  # those one after another that go to the same place, at once
                first, j = k, word(units, k)
                while k < runs and word(units, k) == j:
                    k += 1
                x, y = source + first * L * ITEM, to + j * ITEM
                for i in range(0, L, LANES):
                    total = load(y, i, L - i)
                    for q in range(k - first):
                        total = total + load(x + q * L * ITEM, i, L - i)
                    store(y, i, total, L - i)


def spread(a, row, M, units, runs, N, c, ldc, add):
    """c[:, k L + i] = a[:, units[k]], or added to it."""
    L = N // max(runs, 1)
    for r in range(M):
        source, to = a + r * row * ITEM, c + r * ldc * ITEM
        for k in range(runs):
            x, y = repeat(source + word(units, k) * ITEM), to + k * L * ITEM
            for i in range(0, L, LANES):
                store(y, i, load(y, i, L - i) + x if add else x, L - i)


def spread_back(a, row, M, units, runs, N, c, ldc, K, add):
    """c[:, units[k]] += Σ_i a[:, k L + i]; unless added to, c, of K columns, begins as zeros."""
    L = N // max(runs, 1)
    for r in range(M):
        source, to = a + r * row * ITEM, c + r * ldc * ITEM
        if not add:
            zero_row(to, K)
        for k in range(runs):
            x, total = source + k * L * ITEM, constant(0.0)
            for i in range(0, L, LANES):
                total = part_sum(total, load(x, i, L - i), L - i)
            y = to + word(units, k) * ITEM
            store(y, 0, load(y, 0, 1) + row_sum(total), 1)
'''

_PACKING = '''


def pack(table, task, phase):
    """Matrices as panels, (panels, K, PANEL): this task's share of the panels of each.

    Words: how many matrices, how many tasks; then for each matrix its address, the distance of its
    rows and of its columns in elements, K, N, where to, how many panels, and whether for tiles.
    """
    tasks = word(table, 1)
    for i in range(word(table, 0)):
        at = table + 8 * (2 + 8 * i)
        source, row, column, K, N = word(at, 0), word(at, 1), word(at, 2), word(at, 3), word(at, 4)
        to, panels = word(at, 5), word(at, 6)
        in_tiles = word(at, 7)
        first, end = panels * task // tasks, panels * (task + 1) // tasks
        if in_tiles:
            pack_in_tiles(source, row, column, K, N, to, first, end)
            end = first
        for p in range(first, end):
            out = to + p * K * PANEL * ITEM
            left = N - p * PANEL
            if column == 1:
                for k in range(K):
                    for v in range(0, PANEL, LANES):
                        n = max(left - v, 0)
                        value = load(source + (k * row + p * PANEL) * ITEM, v, n)
                        store(out, k * PANEL + v, value, LANES)
            else:
                for v in range(PANEL):
                    if v < left:
                        from_ = source + (p * PANEL + v) * column * ITEM
                        for k in range(K):
                            store(out, k * PANEL + v, load(from_, k * row, 1), 1)
                    else:
                        for k in range(K):
                            store(out, k * PANEL + v, constant(0.0), 1)



def strides_of(operand, s0, part):
    """How an operand's rows are found: where they begin, bytes from step to step, row to row and
    line to line, and for an array of the caller where its rows and steps are, 0 for a record.

    What is kept has all steps of the run, another record those from s0 on. The rows of a part that
    lie together begin with ``low``; of each step there are ``rows``.
    """
    base, step, distance = word(operand, O_BASE), word(operand, O_STEP), word(operand, O_ROW)
    line = word(operand, O_WIDTH) * ITEM
    if word(operand, O_USER):
        batch, begin, onward = word(part, P_BATCH), word(part, P_BEGIN), word(part, P_ONWARD)
        return base, step, distance, line, batch, begin, onward
    if word(operand, O_KEPT):
        s0 = word(part, P_K0)
    low, rows = word(part, P_LOW), word(part, P_ROWS)
    base += (low * (word(operand, O_PLACES) - 1) - s0 * step * rows) * distance
    return base, step * rows * distance, distance, line, 0, 0, 0


def row_address(strides, listed, k):
    """The address of the k-th row that is listed: two words, its step, and its row and line."""
    base, step, distance, line, batch, begin, onward = strides
    s, r = word(listed, 2 * k), word(listed, 2 * k + 1) & LOW
    if batch:
        s, r = word(begin, r) + s * onward, word(batch, r)
    return base + s * step + r * distance + (word(listed, 2 * k + 1) >> HALF) * line


def pack_strips(operand, listed, count, low, high, to, s0, part, in_tiles):
    """Columns low to high of ``count`` rows, STRIP of them side by side, row after row.

    Whole vectors are stored: what goes beyond a row is written over by the next one, and there is
    room for that of the last.
    """
    if in_tiles:
        split_strips(operand, listed, count, low, high, to, s0, part)
        return
    strides = strides_of(operand, s0, part)
    for k in range(count):
        row = row_address(strides, listed, k)
        for m in range(low, high, STRIP):
            out = to + ((m - low) * (KC + 1) + k * STRIP) * ITEM
            for v in range(0, STRIP, LANES):
                store(out, v, load(row, m + v, high - m - v), LANES)


def pack_panels(operand, listed, count, low, high, to, s0, part, in_tiles):
    """Columns low to high of ``count`` rows as panels; in tiles low is 0."""
    if in_tiles:
        split_panels(operand, listed, count, high, to, s0, part)
        return
    strides = strides_of(operand, s0, part)
    for k in range(count):
        row = row_address(strides, listed, k)
        for n in range(low, high, PANEL):
            out = to + ((n - low) * KC + k * PANEL) * ITEM
            for v in range(0, PANEL, LANES):
                store(out, v, load(row, n + v, high - n - v), LANES)
'''

_GRAM = '''


def gram(p_slab, q_slab, low, high, N, count, out, distance, add, in_tiles):
    """out[low:high] = PᵀQ over one slab of rows, or added to it."""
    if in_tiles:
        gram_in_tiles(p_slab, q_slab, low, high, N, count, out, distance, add, in_tiles)
        return
    step = STRIP * ITEM
    for n in range(0, N, PANEL):
        panel = q_slab + n * KC * ITEM
        for m in range(low, high, ROWS):
            strip = p_slab + ((m - low) // STRIP * STRIP * (KC + 1) + (m - low) % STRIP) * ITEM
            ahead = strip + STRIP * (KC + 1) * ITEM
            rows = min(ROWS, high - m)
            to = out + (m * distance + n) * ITEM
            for r in range(rows):  # where the next block's sums are, too far apart to be foreseen
                fetch(to, (ROWS + r) * distance)
            adds = add * APART
            if N - n <= LANES:
                half_block(strip, 1, STRIP, rows, panel, count, to, distance, adds, ahead, step)
            else:
                block(strip, 1, STRIP, rows, panel, count, to, distance, adds, ahead, step)
'''

_LINES = '''


def product_of_lines(a, row, M, width, b, K, N, groups, size, c, ldc):
    """Each line of a row of a times b: lines of K numbers, ``width`` in all, to lines of N.

    They are of so many groups, as many lines each, and the packed matrix of a group is ``size``
    bytes after that of the one before. Whole vectors are written: what goes beyond a line is
    written over by the next one, and there is room for that of the last.
    """
    lines, wide = width // K // groups, (N + LANES - 1) // LANES
    for group in range(groups):
        source, to = a + group * lines * K * ITEM, c + group * lines * N * ITEM
        matrix = b + group * size
        if lines > M and N == wide * LANES:  # nothing goes beyond: the lines of a row at once
            for r in range(M):
                product(source, K, lines, matrix, K, wide, to, N, 0, 0)
                source += row * ITEM
                to += ldc * ITEM
        else:
            for _ in range(lines):
                product(source, row, M, matrix, K, wide, to, ldc, 0, 0)
                source += K * ITEM
                to += N * ITEM
'''

_OUTER = '''


def share_of(columns, unit, share, shares):
    """From which column to which this share goes, in whole units."""
    units = (columns + unit - 1) // unit
    low, high = units * share // shares * unit, units * (share + 1) // shares * unit
    return min(low, columns), min(high, columns)


def columns_of(a, how, unit, share, shares):
    """The same of an a, through all of which every share goes unless it is what is divided."""
    if how != BY_A:
        share, shares = 0, 1
    return share_of(word(a, A_WIDTH), unit, share, shares)


def next_rows(listed, most, active, first, last, lines, s, r, line, s1):
    """Write down steps, rows and lines from these on; how many, and where the next ones begin."""
    total = 0
    while s < s1 and total < most:
        rows = min(word(active, s), last)
        if rows <= first:
            s = s1
        while r < rows and total < most:
            put_word(listed, 2 * total, s)
            put_word(listed, 2 * total + 1, r + (line << HALF))
            total += 1
            line += 1
            if line == lines:
                line = 0
                r += 1
        if r >= rows:
            s += 1
            r = first
    return total, s, r, line


def products_with(table, task, phase, number, share, shares, g):
    """The products that share g, over the rows of a part: this one of so many shares of them."""
    s0, s1, add = word(phase, FROM_STEP), word(phase, TO_STEP), word(phase, BEGUN)
    active = word(table, T_ACTIVE) + number * word(table, T_ACTIVE_BYTES)
    part = table + 8 * (T_WORDS + P_WORDS * number)
    bytes_, slabs = word(table, T_BYTES), word(table, T_SLABS)
    g_bytes, a_bytes = word(table, T_G_BYTES), word(table, T_A_BYTES)  # of a packed slab
    listed = word(table, T_SCRATCH) + task * bytes_
    g_packed = listed + LISTED * slabs + 8 * KC  # after what says which rows, and addresses of some
    a_packed = g_packed + g_bytes * slabs
    in_tiles = word(table, T_TILES)  # not 0: with tiles, whose shapes are written down there
    in_tiles += task * bytes_ if in_tiles else 0
    unit = ROWS if in_tiles == 0 else TILE_LINES  # columns that tasks are given together
    g_columns = AT_ONCE // slabs if in_tiles == 0 else ALL  # at once
    q_columns = PANEL if slabs > 1 else ALL  # whose sums stay near from one slab to the next
    first, last = word(part, P_FIRST), word(part, P_LAST)  # rows
    G, lines, how, a_count = word(g, G_WIDTH), word(g, G_LINES), word(g, G_HOW), word(g, G_COUNT)
    begin, end = 0, G
    if how != BY_A:
        begin, end = share_of(G, unit if how == TURNED else PANEL, share, shares)
    s, r, line, going = s0, first, 0, begin < end
    while going:
        most = KC * slabs
        total, s, r, line = next_rows(listed, most, active, first, last, lines, s, r, line, s1)
        count = min(max((total + KC - 1) // KC, 1 - add), slabs)  # one without rows is zeros
        for i in range(a_count * count):
            a, slab = g + 8 * (G_WORDS + A_WORDS * (i // count)), i % count
            low, high = columns_of(a, how, unit, share, shares)
            of, K = listed + LISTED * slab, min(total - KC * slab, KC)
            to = a_packed + word(a, A_PACKED) + slab * a_bytes
            if how == TURNED:
                pack_panels(a, of, K, 0, high, to, s0, part, in_tiles)
            elif low < high:
                pack_strips(a, of, K, low, high, to, s0, part, in_tiles)
        for n in range(begin, end * (count > 0), g_columns):
            rest = min(n + g_columns, end)
            for slab in range(count):
                of, K = listed + LISTED * slab, min(total - KC * slab, KC)
                to = g_packed + slab * g_bytes
                if how == TURNED:
                    pack_strips(g, of, K, n, rest, to, s0, part, in_tiles)
                else:
                    pack_panels(g, of, K, n, rest, to, s0, part, in_tiles)
            for i in range(a_count):
                a = g + 8 * (G_WORDS + A_WORDS * i)
                low, high = columns_of(a, how, unit, share, shares)
                A, out, distance = word(a, A_WIDTH), word(a, A_OUT), word(a, A_OUT_ROW)
                if number > 0:
                    size = (G if how == TURNED else A) * distance * ITEM
                    out = word(a, A_PARTS) + (number - 1) * size
                p, p_bytes, N = g_packed, g_bytes, A
                q, q_bytes = a_packed + word(a, A_PACKED), a_bytes
                if how == TURNED:
                    low, high = n, rest
                else:
                    p, p_bytes, q, q_bytes, N = q, q_bytes, p, p_bytes, rest - n
                    out += n * ITEM
                for c in range(0, N, q_columns):
                    here, to, C = q + c * KC * ITEM, out + c * ITEM, min(q_columns, N - c)
                    for slab in range(count):
                        K, too = min(total - KC * slab, KC), add | (slab > 0)
                        P, Q = p + slab * p_bytes, here + slab * q_bytes
                        gram(P, Q, low, high, C, K, to, distance, too, in_tiles)
        add = 1
        going = s < s1


def outer(table, task, phase):
    """Gradients of matrices: g times each of several a, over all rows of a segment of steps.

    The rows of the batch are in parts, each with sums of its own, which a task makes alone, or
    shares with others. For each g, by its word ``how``: BY_A, out = aᵀ g for every a, divided among
    the tasks by columns of a; BY_G, the same divided by columns of g; TURNED, out = gᵀ a, divided
    by columns of g. Some slabs of KC rows are packed, all of a and some columns of g after the
    other, so that they stay near; and the sum over slabs runs in the same order whatever the tasks.
    """
    saved = flush_denormals()
    tasks, parts = word(table, T_TASKS), word(table, T_PARTS)
    for part in range(parts):
        low = part * tasks // parts
        high = max(low + 1, (part + 1) * tasks // parts)
        if low <= task < high:
            g = table + 8 * (T_WORDS + P_WORDS * parts)
            for _ in range(word(table, T_COUNT)):
                products_with(table, task, phase, part, task - low, high - low, g)
                g += 8 * (G_WORDS + A_WORDS * word(g, G_COUNT))
    restore_denormals(saved)


def join(table, task, phase):
    """Add the sums of the other parts of the batch to those of the first: this task's share.

    Words: how many tasks, other parts and gradients; then for each where the sums of the first part
    are, where the others', and how many numbers these are for each part.
    """
    tasks, others = word(table, 0), word(table, 1)
    for i in range(word(table, 2)):
        at = table + 8 * (3 + 3 * i)
        out, part, size = word(at, 0), word(at, 1), word(at, 2)
        low, high = size // LANES * task // tasks, size // LANES * (task + 1) // tasks
        for _ in range(others):
            for j in range(low * LANES, high * LANES, LANES):
                store(out, j, load(out, j, LANES) + load(part, j, LANES), LANES)
            part += size * ITEM
'''


def _without_tiles(source: str) -> str:
    """The text without what it does in tiles, where there are none."""
    return re.sub(r"\n( +)if in_tiles:\n(?:\1 +.*\n)+", "\n", source)


# Called by the functions of the same module alone.
HELPERS = "sweep strides_of row_address share_of columns_of next_rows products_with".split()
HELPERS += tiles.HELPERS


def text(dtype: str, module: str) -> str:
    """The text of one of the modules, for one dtype."""
    used = tiles.used(dtype)
    made = f'''"""{module}: functions that kernels of {dtype} share; see library.py and gemm.py."""

from tinygrad_seq.kernels import gemm, tiles
from tinygrad_seq.kernels.build import callable_here, external
from tinygrad_seq.kernels.simd import flush_denormals, put_word, restore_denormals, vectors, word
from tinygrad_seq.kernels.threads import BEGUN, FROM_STEP, TO_STEP

_v = vectors("{dtype}")
LANES, load, store, constant, fetch = _v.LANES, _v.load, _v.store, _v.constant, _v.fetch
scalar, put_scalar, part_sum, row_sum = _v.scalar, _v.put_scalar, _v.part_sum, _v.row_sum
PANEL, ROWS, ITEM, KC = gemm.panel("{dtype}"), gemm.ROWS, {np.dtype(dtype).itemsize}, gemm.KC
APART, AT_ONCE, ALL = gemm.APART, gemm.AT_ONCE, 2**62
BY_A, TURNED, BY_G = range(3)
{_numbers()}STRIP, TILE_LINES, repeat = gemm.strip("{dtype}"), tiles.LINES, _v.repeat
LISTED = 16 * KC  # bytes that say which rows of a slab, and lines of these, in half a word each
HALF, LOW = 32, 2**32 - 1
globals().update(gemm.micro_kernels("{dtype}"))
'''
    if used:
        made += "globals().update(vars(tiles.functions()))\n"
    for each, functions in MODULES.items():
        if each == module:
            break
        if each != "tiles" or used:
            for name in functions:
                made += f'{name} = external("{name}", "{dtype}")\n'
    source = {"blocks": gemm.block_text() + _ROWS, "products": gemm.product_text(dtype) + _GRAM}
    source |= {"choices": _CHOICES, "tiles": tiles.TEXT, "packing": _PACKING}
    source |= {"lines": _LINES, "outer": _OUTER}
    if used:
        source["packing"] = tiles.PACKING + _PACKING
    else:
        source = {name: _without_tiles(each) for name, each in source.items()}
    for function in source[module].split("\n\n\ndef ")[1:]:
        name = function[: function.index("(")]
        for helper in HELPERS:
            if helper != name:
                function = function.replace(f" {helper}(", f" {helper}_here(")
        made += f"\n\ndef {function.rstrip()}\n"
        if name not in MODULES[module]:
            made += f"\n\n({name}_here,) = callable_here({name})\n"
    return made
