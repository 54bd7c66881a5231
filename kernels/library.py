"""The functions that all kernels share, as source text: products, packing, large products.

They are compiled once for a dtype and called by address, so that a new cell compiles in the time
that its own few lines take. Tables of words are read in the order in which ``cpu.py`` writes them.
Imports gemm, simd.
"""

from __future__ import annotations

from tinygrad_seq.kernels import gemm

# By how many words they take.
FUNCTIONS = {9: ("product", "add_product"), 2: ("pack", "outer")}

_TEXT = '''

def pack(table, task):
    """Matrices as panels, (panels, K, PANEL): this task's share of the panels of each.

    Words: how many matrices, how many tasks; then for each matrix its address, the distance of its
    rows and of its columns in elements, K, N, where to, and how many panels.
    """
    tasks = word(table, 1)
    for i in range(word(table, 0)):
        source, row, column = word(table, 2 + 7 * i), word(table, 3 + 7 * i), word(table, 4 + 7 * i)
        K, N = word(table, 5 + 7 * i), word(table, 6 + 7 * i)
        to, panels = word(table, 7 + 7 * i), word(table, 8 + 7 * i)
        for p in range(panels * task // tasks, panels * (task + 1) // tasks):
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
                        line = source + (p * PANEL + v) * column * ITEM
                        for k in range(K):
                            store(out, k * PANEL + v, load(line, k * row, 1), 1)
                    else:
                        for k in range(K):
                            store(out, k * PANEL + v, zero, 1)


def outer(table, task):
    """out = Pᵀ Q over all rows of all steps: this task's share of the rows of out.

    Blocks of KC rows are packed, P into groups of columns and Q into panels; the sum over them runs
    in the same order whatever the tasks. Words: see cpu.py.
    """
    saved = flush_denormals()
    s0, s1, B, active = word(table, 0), word(table, 1), word(table, 2), word(table, 3)
    batch, begin, onward = word(table, 4), word(table, 5), word(table, 6)
    tasks, scratch, scratch_bytes = word(table, 7), word(table, 8), word(table, 9)
    scratch += task * scratch_bytes
    for i in range(word(table, 10)):
        at = table + 8 * (11 + 14 * i)
        p_base, p_user, p_step, p_row = word(at, 0), word(at, 1), word(at, 2), word(at, 3)
        q_base, q_user, q_step, q_row = word(at, 4), word(at, 5), word(at, 6), word(at, 7)
        M, N, out = word(at, 8), word(at, 9), word(at, 10)
        distance, more = word(at, 11), word(at, 12)
        share = (M + ROWS - 1) // ROWS
        low = min(share * task // tasks * ROWS, M)
        high = min(share * (task + 1) // tasks * ROWS, M)
        panels = (N + PANEL - 1) // PANEL
        p_block = scratch
        q_block = p_block + KC * (high - low + GROUP) * ITEM
        if low < high:
            s, r, first = s0, 0, 1
            going = True
            while going:
                k = 0
                while s < s1 and k < KC:  # the next KC rows
                    rows = word(active, s)
                    while r < rows and k < KC:
                        if p_user:
                            t = word(begin, r) + s * onward
                            line = p_base + t * p_step + word(batch, r) * p_row
                        else:
                            line = p_base + (s - s0) * p_step + r * p_row
                        for m in range(low, high, GROUP):
                            to = p_block + ((m - low) * KC + k * GROUP) * ITEM
                            for v in range(0, GROUP, LANES):
                                store(to, v, load(line, m + v, high - m - v), GROUP - v)
                        if q_user:
                            t = word(begin, r) + s * onward
                            line = q_base + t * q_step + word(batch, r) * q_row
                        else:
                            line = q_base + (s - s0) * q_step + r * q_row
                        for p in range(panels):
                            to = q_block + (p * KC + k) * PANEL * ITEM
                            for v in range(0, PANEL, LANES):
                                store(to, v, load(line, p * PANEL + v, N - p * PANEL - v), LANES)
                        k += 1
                        r += 1
                    if r >= rows:
                        s += 1
                        r = 0
                    if rows == 0:
                        s = s1
                if k == 0 and first == 0:
                    break
                for m in range(low, high, ROWS):
                    block = p_block + ((m - low) // GROUP * GROUP * KC + (m - low) % GROUP) * ITEM
                    count = min(ROWS, high - m)
                    for p in range(panels):
                        panel = q_block + p * KC * PANEL * ITEM
                        to = out + (m * distance + p * PANEL) * ITEM
                        if more == 0 and first == 1:
                            product(block, 1, GROUP, count, panel, k, 1, to, distance)
                        else:
                            add_product(block, 1, GROUP, count, panel, k, 1, to, distance)
                first = 0
                going = s < s1
    restore_denormals(saved)
'''


def text(dtype: str) -> str:
    """The module with these functions for one dtype."""
    item = 4 if dtype == "float32" else 8
    head = f'''"""Functions that all kernels of {dtype} share; see library.py and gemm.py."""

from tinygrad_seq.kernels import gemm
from tinygrad_seq.kernels.build import callable_here
from tinygrad_seq.kernels.simd import flush_denormals, restore_denormals, vectors, word

_v = vectors("{dtype}")
LANES, load, store, constant = _v.LANES, _v.load, _v.store, _v.constant
PANEL, ROWS, ITEM, KC = gemm.panel("{dtype}"), gemm.ROWS, {item}, gemm.KC
GROUP = LANES if LANES % ROWS == 0 else ROWS  # columns of P that are packed together
globals().update(gemm.micro_kernels("{dtype}"))
'''
    products = gemm.source(dtype)
    body = _TEXT.replace(", zero, 1)", ", constant(0.0), 1)")
    calls = body.replace(" product(", " product_here(").replace(
        " add_product(", " add_product_here("
    )
    inline = "\n\nproduct_here, add_product_here = callable_here(product, add_product)\n"
    return head + products + inline + calls
