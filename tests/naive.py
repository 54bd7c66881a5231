"""Oracles so plain that they are obviously right: loops over rows and units, float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

Array = np.ndarray


def sigmoid(v: float) -> float:
    return 1.0 / (1.0 + math.exp(-v))


def affine(W: Array, x: Array, U: Array, h: Array, b: Array, k: int) -> float:
    """(W x + U h + b)[k], one multiplication at a time."""
    total = float(b[k])
    for j in range(len(x)):
        total += float(W[k, j]) * float(x[j])
    for j in range(len(h)):
        total += float(U[k, j]) * float(h[j])
    return total


def rnn_step(p: dict[str, Array], x: Array, h: Array, act: Callable[[float], float]) -> Array:
    W, U, b = p["weight_ih"], p["weight_hh"], p["bias"]
    return np.array([act(affine(W, x, U, h, b, k)) for k in range(len(h))])


def lstm_step(p: dict[str, Array], x: Array, h: Array, c: Array) -> tuple[Array, Array]:
    W, U, b = p["weight_ih"], p["weight_hh"], p["bias"]
    H = len(h)
    h_new, c_new = np.zeros(H), np.zeros(H)
    for k in range(H):
        i = sigmoid(affine(W, x, U, h, b, k))
        f = sigmoid(affine(W, x, U, h, b, H + k))
        g = math.tanh(affine(W, x, U, h, b, 2 * H + k))
        o = sigmoid(affine(W, x, U, h, b, 3 * H + k))
        c_new[k] = f * c[k] + i * g
        h_new[k] = o * math.tanh(c_new[k])
    return h_new, c_new


def gru_step(p: dict[str, Array], x: Array, h: Array) -> Array:
    W, U, b = p["weight_ih"], p["weight_hh"], p["bias"]
    H = len(h)
    r = np.array([sigmoid(affine(W, x, U, h, b, k)) for k in range(H)])
    z = np.array([sigmoid(affine(W, x, U, h, b, H + k)) for k in range(H)])
    n = np.array([math.tanh(affine(W, x, U, r * h, b, 2 * H + k)) for k in range(H)])
    return (1 - z) * h + z * n


def gru_reset_after_step(p: dict[str, Array], x: Array, h: Array) -> Array:
    W, U, b, b_hh = p["weight_ih"], p["weight_hh"], p["bias"], p["bias_hh"]
    H = len(h)
    none = np.zeros(0)
    empty = np.zeros((3 * H, 0))
    from_x = [affine(W, x, empty, none, b, k) for k in range(3 * H)]
    from_h = [affine(U, h, empty, none, b_hh, k) for k in range(3 * H)]
    new = np.zeros(H)
    for k in range(H):
        r = sigmoid(from_x[k] + from_h[k])
        z = sigmoid(from_x[H + k] + from_h[H + k])
        n = math.tanh(from_x[2 * H + k] + r * from_h[2 * H + k])
        new[k] = (1 - z) * h[k] + z * n
    return new


State = tuple[Array, ...]


def run_rows(
    step: Callable[[Array, State], State],
    xs: Array,
    state: State,
    start: State,
    lengths: Sequence[int],
    resets: Array,
    reverse: bool,
) -> tuple[Array, State]:
    """Each row on its own, over its own steps: outputs (T, B, H) and last states (B, H).

    ``state`` is what the rows start from, ``start`` what a reset returns to.
    """
    T, B = xs.shape[:2]
    H = state[0].shape[1]
    ys = np.zeros((T, B, H))
    last = tuple(leaf.copy() for leaf in state)
    for b in range(B):
        now = tuple(leaf[b] for leaf in state)
        steps = range(lengths[b])
        for t in reversed(steps) if reverse else steps:
            if resets[t, b]:
                now = tuple(leaf[b] for leaf in start)
            now = step(xs[t, b], now)
            ys[t, b] = now[0]
        for leaf, value in zip(last, now, strict=True):
            leaf[b] = value
    return ys, last


def unbroadcast(g: Array, shape: tuple[int, ...]) -> Array:
    """Sum over what was repeated, index by index."""
    out = np.zeros(shape)
    for index in np.ndindex(*g.shape):
        tail = index[len(index) - len(shape) :]
        out[tuple(0 if n == 1 else i for i, n in zip(tail, shape, strict=True))] += g[index]
    return out
