"""Cells put together at random, run by ``scan`` and by ``unroll``: ``random_cells.py SEED COUNT``.

With ``NUMBA_DISABLE_JIT=1`` nothing is compiled, so that hundreds of structures take seconds. What
a cell does is printed if the two disagree, or if a kernel writes beyond its memory.
"""

from __future__ import annotations

import gc
import sys
import traceback
from typing import Any

import numpy as np
from tinygrad_seq.kernels import division, gemm, memory

import tinygrad_seq as tgs
from tinygrad_seq.trees import leaves

GUARD = 4096  # bytes on both sides of a block of memory that nobody may write to
MARK = 0xFF  # in numbers NaN, so that what was never written shows where it is read
UNARY = ("tanh", "sigmoid", "sin", "square", "softplus", "negative", "relu", "abs", "exp")
BINARY = ("add", "subtract", "multiply", "maximum", "minimum", "divide", "where", "power")
KINDS = ("unary", "binary", "matmul", "slice", "column", "pick", "concat", "split", "sum", "mean")
KINDS += ("max", "scale", "bias", "rows", "number", "broadcast", "detach", "norm", "x", "state")
KINDS += ("noise", "frozen", "constant", "axes", "axes")
AXES = ("add", "rows", "turn", "sum", "mean", "max", "softmax", "lines", "left", "both", "inner")
AXES += ("outer", "slice", "strided", "pick", "concat", "stack", "pad", "cumsum", "spread", "mask")
LINEAR = ("matmul", "matmul", "matmul", "sum of two", "x", "state", "slice", "concat", "scale")


class Guarded(memory.Block):
    """A block of memory that notices what is written beside it."""

    def __init__(self, size: int) -> None:
        self.size = size
        bytes_ = np.full(size + 2 * GUARD + memory.ALIGNMENT, MARK, np.uint8)
        first = memory.address(bytes_)
        self.address = first + GUARD + -(first + GUARD) % memory.ALIGNMENT
        self._memory = bytes_, first

    def __del__(self) -> None:
        bytes_, first = self._memory
        start = self.address - first
        if (bytes_[:start] != MARK).any() or (bytes_[start + self.size :] != MARK).any():
            OVERRUN.append(self.size)


OVERRUN: list[int] = []  # sizes of blocks beside which something was written


class RandomCell:
    """A list of operations, each on values that were there before; chosen anew by each seed."""

    def __init__(self, rng: np.random.Generator, B: int) -> None:
        self.rng, self.B = rng, B
        self.sizes = [int(n) for n in rng.integers(1, 7, 3)] + [1]
        self.inputs = [self._shape() for _ in range(rng.integers(1, 3))]
        self.states = [self._shape() for _ in range(rng.integers(1, 4))]
        self.captured: dict[Any, tgs.Tensor] = {}
        self.linear = bool(rng.random() < 0.3)
        kinds = LINEAR if self.linear else KINDS
        self.operations = [
            (str(rng.choice(kinds)), int(rng.integers(2**31))) for _ in range(rng.integers(1, 12))
        ]
        self.ends = [int(n) for n in rng.integers(2**31, size=8)]
        self.log: list[str] = []

    def _shape(self) -> tuple[int, ...]:
        axes = 1 if self.rng.random() < 0.75 else int(self.rng.choice([0, 2, 3]))
        return tuple(int(n) for n in self.rng.choice(self.sizes, axes))

    def values(self, shape: tuple[int, ...]) -> np.ndarray:
        return self.rng.standard_normal(shape)

    def capture(self, key: Any, *shape: int) -> tgs.Tensor:
        """The tensor of this name, made when it is first wanted."""
        if key not in self.captured:
            scale = np.sqrt(max(1, shape[0])) if len(shape) == 2 else 1.0
            wanted = bool(self.rng.random() < 0.8)
            self.captured[key] = tgs.tensor(self.values(shape) / scale, requires_grad=wanted)
        return self.captured[key]

    def matrix(self, name: Any, rows: int, columns: int) -> tgs.Tensor:
        """The same matrix for several products, as it lies or the other way round."""
        if rows < columns:
            return self.capture((name, columns, rows), columns, rows).T
        return self.capture((name, rows, columns), rows, columns)

    def __call__(self, x: Any, state: Any) -> tuple[Any, Any]:
        self.log = []
        xs, states = ([flat(leaf) for leaf in leaves(tree)] for tree in (x, state))
        pool: list[tgs.Tensor] = [*xs, *states]
        for k, (kind, seed) in enumerate(self.operations):
            rng = np.random.default_rng(seed)
            made = self.operate(kind, k, rng, pool, xs, states)
            for value in made if isinstance(made, list) else [made]:
                pool.append(value)
        rng = np.random.default_rng(self.ends)
        recent = pool[-4:]
        outputs = [recent[rng.integers(len(recent))] for _ in range(rng.integers(1, 3))]
        if rng.random() < 0.2:
            outputs.append(pool[rng.integers(len(pool))])
        after = []
        for k, shape in enumerate(self.states):
            kind = rng.random()
            source = pool[rng.integers(len(pool))] if rng.random() < 0.5 else recent[-1]
            if kind < 0.1:
                source = states[rng.integers(len(self.states))]
            fitted = self.fit(source, shape, k)
            after.append(fitted if kind < 0.4 or self.linear else tgs.tanh(fitted))
            self.log.append(f"state {k} of {source.shape}, kind {kind:.2f}")
        self.log.append(f"outputs {[o.shape for o in outputs]}")
        return tuple(outputs), tuple(after)

    def fit(self, value: tgs.Tensor, shape: tuple[int, ...], k: int) -> tgs.Tensor:
        if value.shape[1:] == shape:
            return value
        if value.ndim == 1:
            value = value[:, None]
        n = int(np.prod(shape))
        if value.shape[1] != n:
            value = value @ self.matrix("fit", value.shape[1], n)
        if len(shape) > 1:
            return value.reshape(self.B, *shape)
        return value if shape else value[:, 0]

    def operate(
        self,
        kind: str,
        k: int,
        rng: np.random.Generator,
        pool: list[tgs.Tensor],
        xs: list[tgs.Tensor],
        states: list[tgs.Tensor],
    ) -> Any:
        def any_value() -> tgs.Tensor:
            where = rng.integers(max(0, len(pool) - 5), len(pool)) if rng.random() < 0.7 else None
            return pool[rng.integers(len(pool)) if where is None else where]

        a = any_value()
        self.log.append(f"%{len(pool)}: {kind} of {a.shape}")
        wide = a.ndim == 2
        n = a.shape[1] if wide else 1
        if kind == "unary":
            name = str(rng.choice(UNARY))
            self.log[-1] += f" {name}"
            return getattr(tgs, name)(tgs.tanh(a) if name in ("exp", "square") else a)
        if kind == "binary":
            b = any_value()
            if b.ndim != a.ndim or (wide and b.shape != a.shape and 1 not in (n, b.shape[1])):
                b = self.fit(b, a.shape[1:], k)
            name = str(rng.choice(BINARY))
            self.log[-1] += f" {name} {b.shape}"
            if name == "divide":
                return a / (1.5 + tgs.sigmoid(b))
            if name == "power":
                return (0.5 + tgs.sigmoid(a)) ** tgs.tanh(b)
            if name == "where":
                return tgs.where(a > b, a, b * 0.5)
            return getattr(tgs, name)(a, b)
        if kind == "sum of two":
            b = any_value()
            return (a + self.fit(b, a.shape[1:], k)) * 0.5
        if kind == "noise":
            return a + tgs.rand(*a.shape, dtype="float64")
        if kind == "matmul" and wide:
            columns = int(rng.choice(self.sizes))
            if rng.random() < 0.3:
                return tgs.linear(a, self.matrix(int(rng.integers(2)), columns, n))
            return a @ self.matrix(int(rng.integers(2)), n, columns)
        if kind == "slice" and wide:
            low, high = sorted(int(c) for c in rng.integers(0, n + 1, 2))
            return a[:, low : max(high, low + 1)] if low < n else a[:, :]
        if kind == "column" and wide:
            return a[:, int(rng.integers(n))]
        if kind == "pick" and wide:
            return (
                a[:, ::-1] if rng.random() < 0.5 else a[:, rng.integers(0, n, 2 + n % 7).tolist()]
            )
        if kind == "concat" and wide:
            b = any_value()
            return tgs.concat([a, b if b.ndim == 2 else b[:, None]], axis=-1)
        if kind == "split" and wide and n > 1:
            return list(tgs.split(a, [int(rng.integers(1, n))], axis=-1))
        if kind in ("sum", "mean", "max") and wide:
            return getattr(tgs, kind)(a, axis=-1, keepdims=bool(rng.random() < 0.6))
        if kind == "scale":
            return a * self.capture(("scale", 0)) + self.capture(("scale", 1))
        if kind == "bias" and wide:
            return a + self.capture(("bias", n), n) * (a if rng.random() < 0.5 else 1.0)
        if kind == "rows":
            if rng.random() < 0.5:
                return a * self.capture(("rows", a.shape), *a.shape)
            return a * self.capture(("columns", a.shape), *a.shape[::-1]).T
        if kind == "frozen":
            with tgs.no_grad():
                b = tgs.concat([a, a * 2], axis=-1)[:, :n] if wide else a[:, None][:, 0]
                return [b, b[:, :] if wide else b[:]]
        if kind == "constant":
            return self.capture(("rows", a.shape), *a.shape)
        if kind == "number":
            return 0.7 - a * 2
        if kind == "broadcast" and wide:
            column = a[:, :1] if rng.random() < 0.5 else tgs.sum(a, axis=-1, keepdims=True)
            return tgs.broadcast_to(column, (self.B, int(rng.choice(self.sizes))))
        if kind == "detach":
            return tgs.detach(a) * any_value_like(a, pool, rng)
        if kind == "norm" and wide:
            z = a - tgs.mean(a, axis=-1, keepdims=True)
            return z / tgs.sqrt(tgs.mean(z * z, axis=-1, keepdims=True) + 0.1)
        if kind == "axes":
            shape = tuple(int(n) for n in rng.choice(self.sizes, int(rng.choice([2, 2, 3]))))
            value = self.fit(a, shape, k)
            for _ in range(rng.integers(1, 4)):
                name = str(rng.choice(AXES))
                self.log[-1] += f" {name} {value.shape}"
                value = self.along_axes(name, value, rng)
            return flat(value)
        if kind == "x":
            return xs[rng.integers(len(xs))]
        if kind == "state":
            return states[rng.integers(len(states))]
        return tgs.sin(a)

    def along_axes(self, kind: str, value: tgs.Tensor, rng: np.random.Generator) -> tgs.Tensor:
        """An operation on a value (B, a, b) or (B, a, b, c), which gives another one."""
        B, *axes = value.shape
        last, axis = axes[-1], int(rng.integers(1, value.ndim))
        if kind == "add":  # a tensor of which some axes have length 1
            shape = [n if rng.random() < 0.6 else 1 for n in axes]
            return value + self.capture(("axes", *shape), *shape)
        if kind == "rows":
            return value * self.capture(("axes of rows", B, *axes), B, *axes)
        if kind == "turn":
            return tgs.permute_dims(value, (0, *(1 + rng.permutation(len(axes))).tolist()))
        if kind in ("sum", "mean", "max"):
            made = getattr(tgs, kind)(value, axis=axis, keepdims=True)
            return value - made if rng.random() < 0.6 else made
        if kind == "softmax":
            return tgs.softmax(value, axis=axis)
        if kind == "lines":
            W = self.matrix("lines", last, int(rng.choice(self.sizes)))
            return value @ W if rng.random() < 0.6 else tgs.linear(value, W.T)
        if kind == "left":
            return self.matrix("left", int(rng.choice(self.sizes)), axes[-2]) @ value
        order = (*range(value.ndim - 2), value.ndim - 1, value.ndim - 2)
        if kind == "both":
            return value @ tgs.tanh(tgs.permute_dims(value, order)) * 0.3
        if kind == "inner":
            vector = tgs.sum(value, axis=-1, keepdims=True)  # (B, ..., a, 1)
            return tgs.permute_dims(value, order) @ tgs.sin(vector)
        if kind == "outer":
            return tgs.sin(value[..., :1]) * tgs.cos(value[..., :1, :])
        if kind == "slice":
            return value[(slice(None),) * axis + (slice(int(rng.integers(axes[axis - 1])), None),)]
        if kind == "strided":
            return value[..., :: int(rng.choice([-1, 2, -2]))]
        if kind == "pick":
            return value[..., rng.integers(0, axes[-2], 3), :]
        if kind == "concat":
            return tgs.concat([value, tgs.tanh(value)], axis=axis)
        if kind == "stack":
            return tgs.sum(tgs.stack([value, tgs.sin(value)], axis=axis), axis=axis) * 0.5
        if kind == "pad":
            return tgs.pad(value, [(0, 0)] + [(int(rng.integers(2)), 1) for _ in axes], 0.5)
        if kind == "cumsum":
            return tgs.cumsum(value, axis=axis)
        if kind == "mask":
            mask = np.tril(np.ones(axes[-2:], bool))
            return tgs.where(mask, value, -0.5)
        column = tgs.sum(value, axis=axis, keepdims=True)
        return tgs.broadcast_to(column, value.shape) - value


def flat(value: tgs.Tensor) -> tgs.Tensor:
    """Values of several axes as rows."""
    if value.ndim <= 2:
        return value
    return value.reshape(value.shape[0], int(np.prod(value.shape[1:])))


def any_value_like(a: tgs.Tensor, pool: list[tgs.Tensor], rng: np.random.Generator) -> tgs.Tensor:
    same = [value for value in pool if value.shape == a.shape]
    return same[rng.integers(len(same))]


def compare(seed: int) -> str | None:
    """What differs between the two drivers for the cell of this seed; None if nothing does."""
    rng = np.random.default_rng(seed)
    T, B = int(rng.integers(1, 9)), int(rng.integers(1, 5))
    cell = RandomCell(rng, B)
    options: dict[str, Any] = {"reverse": bool(rng.random() < 0.3)}
    if rng.random() < 0.3:
        options["lengths"] = rng.integers(0, T + 1, B)
    if rng.random() < 0.3:
        options["resets"] = rng.random((T, B)) < 0.3
    twice = bool(rng.random() < 0.2)
    checkpoint = int(rng.integers(1, T + 2)) if rng.random() < 0.3 else None

    def leaf(*shape: int) -> tgs.Tensor:
        return tgs.tensor(rng.standard_normal(shape), requires_grad=bool(rng.random() < 0.8))

    xs = tuple(leaf(T, B, *shape) for shape in cell.inputs)
    state = tuple(leaf(B, *shape) for shape in cell.states)
    weights: list[np.ndarray] = []

    def run(drive: Any, more: Any) -> list[np.ndarray | None]:
        tgs.manual_seed(seed)
        with tgs.no_grad():
            plain = leaves(drive(cell, xs, state, **options, **more))
        results = leaves(drive(cell, xs, state, **options, **more))
        if not weights:
            weights.extend(rng.standard_normal(r.shape) for r in results)
        tensors = [*xs, *state, *cell.captured.values()]
        for tensor in tensors:
            tensor.grad = None
        loss = sum(
            (tgs.sum(r * w) for r, w in zip(results, weights, strict=True)),
            tgs.tensor(0.0, "float64"),
        )
        if loss.requires_grad:
            loss.backward(create_graph=twice)
        gradients = [None if t.grad is None else t.grad.numpy() for t in tensors]
        if twice:  # the gradient of the gradients, weighted
            drawn = np.random.default_rng(seed)
            first = [(t.grad, drawn.standard_normal(t.shape)) for t in tensors]
            total = sum(
                (tgs.sum(g * w) for g, w in first if g is not None), tgs.tensor(0.0, "float64")
            )
            for tensor in tensors:
                tensor.grad = None
            if total.requires_grad:
                total.backward()
            gradients += [None if t.grad is None else t.grad.numpy() for t in tensors]
        return [*(r.numpy() for r in results), *(r.numpy() for r in plain), *gradients]

    expected = run(tgs.unroll, {})
    found = run(tgs.scan, {"checkpoint": checkpoint})
    for k, (e, f) in enumerate(zip(expected, found, strict=True)):
        zero = e is None or f is None  # a driver may leave out what is zero
        e, f = (np.zeros(1) if v is None else v for v in (e, f))
        if not np.allclose(e, f, rtol=1e-7, atol=1e-8):
            what = f"value {k} of {len(found)} ({len(weights)} results), {T=} {B=} {options} "
            return f"{what}{checkpoint=} {'one is None ' * zero}\n" + "\n".join(cell.log)
    return None


def main(first: int, count: int) -> int:
    # so that there are several blocks, of rows and of columns, and segments
    division.BLOCK_ROWS, division.NEAR_ROWS, division.FEWEST_DEALT = 4, 64, 2
    gemm.KC, gemm.AT_ONCE = 8, 8
    memory.SMALL, memory.Block = 0, Guarded
    failed = 0
    for seed in range(first, first + count):
        try:
            problem = compare(seed)
        except Exception:
            problem = traceback.format_exc()
        gc.collect()
        if OVERRUN:
            problem = f"written beside blocks of {OVERRUN} bytes; {problem}"
            OVERRUN.clear()
        if problem is not None:
            failed += 1
            print(f"seed {seed}: {problem}\n", flush=True)
    print(f"{count} cells, {failed} disagree")
    return failed


if __name__ == "__main__":
    sys.exit(bool(main(int(sys.argv[1]), int(sys.argv[2]))))
