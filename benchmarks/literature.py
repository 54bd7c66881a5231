"""Cells of the literature, each written once, in plain Python: compiled here, and in JAX.

    python benchmarks/literature.py                        every cell
    python benchmarks/literature.py --cells slstm ntm      some of them

A cell is a function of a module ``m`` of functions, its parameters ``p``, an input and a state.
Each is compared with ``tgs.unroll`` in float64 at small sizes, outputs, last states and all
gradients, and timed beside ``lax.scan`` under ``jit`` in float32: forward, then backward from the
sum of the squares of all outputs to all parameters, T = 100 steps of B = 32 rows. The programs
alternate, each in a process of its own. The first step includes imports, tracing and compiling,
where only the functions are kept that the kernels of all cells share.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from report import heading, summary

from tinygrad_seq.comparing import alternate, milliseconds, ratio, serve

T, B = 100, 32
SMALL_T, SMALL_B = 6, 3
# A key and a value of a row, or what a cell computes of them, have these heads.
HEADS = {"I": 128, "h": 4, "d": 32}, {"I": 5, "h": 2, "d": 3}


class CellOf(NamedTuple):
    """A cell, where it is from, its sizes here and in the check, and shapes as text of these."""

    step: Callable[..., Any]
    source: str
    sizes: tuple[dict[str, int], dict[str, int]]
    states: Sequence[str]
    x: str
    shapes: dict[str, str]


CELLS: dict[str, CellOf] = {}


def cell(
    source: str,
    sizes: tuple[dict[str, int], dict[str, int]],
    *states: str,
    x: str = "I,",
    **shapes: str,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def put(step: Callable[..., Any]) -> Callable[..., Any]:
        CELLS[step.__name__] = CellOf(step, source, sizes, states, x, shapes)
        return step

    return put


def heads(z: Any, count: int) -> Any:
    return z.reshape(z.shape[0], count, z.shape[1] // count)


def flat(z: Any) -> Any:
    return z.reshape(z.shape[0], z.shape[1] * z.shape[2])


def unit(m: Any, z: Any) -> Any:
    """Vectors of length 1."""
    return z / m.sqrt(m.sum(z * z, axis=-1, keepdims=True) + 1e-6)


def lstm_gates(m: Any, z: Any, c: Any) -> tuple[Any, Any]:
    i, f, o, g = m.split(z, 4)
    c = m.sigmoid(f) * c + m.sigmoid(i) * m.tanh(g)
    return m.sigmoid(o) * m.tanh(c), c


def gru_gates(m: Any, z: Any, g: Any, h: Any) -> Any:
    H = h.shape[-1]
    r, u = m.sigmoid(z[:, :H] + g[:, :H]), m.sigmoid(z[:, H : 2 * H] + g[:, H : 2 * H])
    return (1 - u) * m.tanh(z[:, 2 * H :] + r * g[:, 2 * H :]) + u * h


# Gates ---------------------------------------------------------------------------------------

WIDE = {"I": 256, "H": 256}, {"I": 3, "H": 5}
PLAIN = {"I": 32, "H": 128}, {"I": 3, "H": 8}


@cell("Feng et al. 2024", WIDE, "H,", z="I, H", h="I, H")
def min_gru(m: Any, p: Any, x: Any, state: Any) -> Any:
    z = m.sigmoid(x @ p.z)
    h = (1 - z) * state[0] + z * (x @ p.h)
    return h, (h,)


@cell("Feng et al. 2024", WIDE, "H,", f="I, H", i="I, H", h="I, H")
def min_lstm(m: Any, p: Any, x: Any, state: Any) -> Any:
    f, i = m.sigmoid(x @ p.f), m.sigmoid(x @ p.i)
    h = (f * state[0] + i * (x @ p.h)) / (f + i)
    return h, (h,)


@cell("De et al. 2024", ({"I": 256}, {"I": 5}), "I,", a="I, I", ba="I,", x_="I, I", bx="I,", L="I,")
def rg_lru(m: Any, p: Any, x: Any, state: Any) -> Any:
    r, i = m.sigmoid(x @ p.a + p.ba), m.sigmoid(x @ p.x_ + p.bx)
    log_a = -8.0 * m.softplus(p.L) * r
    h = m.exp(log_a) * state[0] + m.sqrt(-m.expm1(2 * log_a)) * (i * x)
    return h, (h,)


@cell("Koutník et al. 2014", PLAIN, "H,", "1,", W="I, H", R="H, H")
def clockwork(m: Any, p: Any, x: Any, state: Any) -> Any:
    h, t = state[0], m.floor(state[1])
    group = np.repeat(np.arange(4), h.shape[1] // 4)
    period, slower = m.const(2.0**group, x), m.const(group[:, None] >= group, x)
    new = m.tanh(x @ p.W + h @ (p.R * slower))
    h = m.where(t - m.floor(t / period) * period == 0, new, h)
    return h, (h, t + 1)


@cell("Neil et al. 2016", PLAIN, "H,", "H,", W="I + H, 4 * H", b="4 * H,", tau="H,", shift="H,")
def phased_lstm(m: Any, p: Any, x: Any, state: Any) -> Any:
    h, c = state
    new_h, new_c = lstm_gates(m, m.concat([x, h], axis=-1) @ p.W + p.b, c)
    phase = (10 * x[:, :1] - p.shift) / m.exp(p.tau)
    phase = phase - m.floor(phase)
    rising, open_ = phase < 0.15, phase < 0.3
    k = m.where(rising, phase / 0.15, m.where(open_, 2 - phase / 0.15, 0.001 * phase))
    h, c = k * new_h + (1 - k) * h, k * new_c + (1 - k) * c
    return h, (h, c)


@cell(
    "Ha et al. 2016", ({"I": 32, "H": 128, "K": 32, "E": 8}, {"I": 3, "H": 5, "K": 4, "E": 2}),
    "H,", "H,", "K,", "K,",
    W="I, 4 * H", R="H, 4 * H", V="I + H + K, 4 * K", vb="4 * K,", zx="K, 4 * E", zh="K, 4 * E",
    zb="K, 4 * E", dx="4, E, H", dh="4, E, H", db="4, E, H",
)  # fmt: skip
def hyper_lstm(m: Any, p: Any, x: Any, state: Any) -> Any:
    h, c, small_h, small_c = state
    small_h, small_c = lstm_gates(m, m.concat([x, h, small_h], axis=-1) @ p.V + p.vb, small_c)

    def scale(z: Any, d: Any) -> Any:  # of each gate, by a matrix of its own
        gates = (small_h @ z).reshape(x.shape[0], 4, 1, d.shape[1])
        return (gates @ d).reshape(x.shape[0], 4 * d.shape[2])

    z = scale(p.zx, p.dx) * (x @ p.W) + scale(p.zh, p.dh) * (h @ p.R) + scale(p.zb, p.db)
    h, c = lstm_gates(m, z, c)
    return h, (h, c, small_h, small_c)


@cell("Beck et al. 2024", HEADS, *["h, d"] * 4, W="I, 4*h*d", R="h, d, 4*d", b="4*h*d,")
def slstm(m: Any, p: Any, x: Any, state: Any) -> Any:
    c, n, most, hidden = state
    z = heads(x @ p.W + p.b, c.shape[1]) + (hidden[:, :, None, :] @ p.R)[:, :, 0]
    z, i, f, o = m.split(z, 4)
    f = -m.softplus(-f)
    new = m.maximum(f + most, i)
    i, f = m.exp(i - new), m.exp(f + most - new)
    c, n = f * c + i * m.tanh(z), f * n + i
    hidden = m.sigmoid(o) * c / m.maximum(n, 1e-6)
    return flat(hidden), (c, n, new, hidden)


# Linear recurrences --------------------------------------------------------------------------

MODES = {"D": 128, "N": 16}, {"D": 5, "N": 3}


@cell(
    "Gu, Dao 2023", MODES, "D, N", x="D,",
    dt="D, D", b="D,", B="D, N", C="D, N", A="D, N", skip="D,",
)  # fmt: skip
def mamba(m: Any, p: Any, x: Any, state: Any) -> Any:
    dt = m.softplus(x @ p.dt + p.b)
    decay = m.exp(dt[:, :, None] * -m.exp(p.A))
    h = decay * state[0] + (dt * x)[:, :, None] * (x @ p.B)[:, None, :]
    return m.sum(h * (x @ p.C)[:, None, :], axis=-1) + p.skip * x, (h,)


@cell(
    "Gu et al. 2022", MODES, "D, N", "D, N", x="D,",
    dt="D, 1", re="D, N", im="D, N", cr="D, N", ci="D, N", skip="D,",
)  # fmt: skip
def s4d(m: Any, p: Any, x: Any, state: Any) -> Any:
    r, i = state
    dt = m.exp(p.dt)
    size, angle = m.exp(-m.exp(p.re) * dt), p.im * dt
    a, b = size * m.cos(angle), size * m.sin(angle)
    r, i = a * r - b * i + x[:, :, None] * dt, a * i + b * r
    return 2 * m.sum(p.cr * r - p.ci * i, axis=-1) + p.skip * x, (r, i)


@cell(
    "Orvieto et al. 2023", ({"I": 128, "N": 128}, {"I": 5, "N": 4}), "N,", "N,",
    nu="N,", theta="N,", br="I, N", bi="I, N", cr="N, I", ci="N, I", skip="I,",
)  # fmt: skip
def lru(m: Any, p: Any, x: Any, state: Any) -> Any:
    r, i = state
    size = m.exp(-m.exp(p.nu))
    a, b, gain = size * m.cos(p.theta), size * m.sin(p.theta), m.sqrt(1 - size * size)
    r, i = a * r - b * i + gain * (x @ p.br), a * i + b * r + gain * (x @ p.bi)
    return r @ p.cr - i @ p.ci + p.skip * x, (r, i)


@cell(
    "Voelker et al. 2019", ({"I": 32, "H": 128, "M": 64}, {"I": 3, "H": 5, "M": 4}), "H,", "M,",
    A="M, M", b="M,", ex="I, 1", eh="H, 1", em="M, 1", Wx="I, H", Wh="H, H", Wm="M, H",
)  # fmt: skip
def lmu(m: Any, p: Any, x: Any, state: Any) -> Any:
    h, memory = state
    u = x @ p.ex + h @ p.eh + memory @ p.em
    memory = memory @ p.A.T + u * p.b
    h = m.tanh(x @ p.Wx + h @ p.Wh + memory @ p.Wm)
    return h, (h, memory)


@cell("Gu et al. 2020", ({"I": 32, "M": 32}, {"I": 3, "M": 4}), "I, M", A="M, M", b="M,")
def hippo(m: Any, p: Any, x: Any, state: Any) -> Any:
    memory = state[0] @ p.A.T + x[:, :, None] * p.b
    return memory, (memory,)


# A matrix for each row -----------------------------------------------------------------------

QKV = {"q": "I, h*d", "k": "I, h*d", "v": "I, h*d"}


@cell("Sun et al. 2023", HEADS, "h, d, d", **QKV)
def retnet(m: Any, p: Any, x: Any, state: Any) -> Any:
    h = state[0].shape[1]
    q, k, v = (heads(x @ W, h) for W in (p.q, p.k, p.v))
    decay = m.const(1 - 2.0 ** (-5.0 - np.arange(h)), x)[:, None, None]
    M = decay * state[0] + k[:, :, :, None] * v[:, :, None, :]
    return flat((q[:, :, None, :] @ M)[:, :, 0]), (M,)


@cell("Katharopoulos et al. 2020", HEADS, "h, d, d", "h, d", **QKV)
def linear_attention(m: Any, p: Any, x: Any, state: Any) -> Any:
    M, n = state
    q, k, v = (heads(x @ W, M.shape[1]) for W in (p.q, p.k, p.v))
    q, k = m.elu(q) + 1, m.elu(k) + 1
    M, n = M + k[:, :, :, None] * v[:, :, None, :], n + k
    y = m.sum(q[:, :, :, None] * M, axis=2) / (m.sum(q * n, axis=-1, keepdims=True) + 1e-6)
    return flat(y), (M, n)


@cell("Schlag et al. 2021", HEADS, "h, d, d", **QKV, b="I, h")
def delta_net(m: Any, p: Any, x: Any, state: Any) -> Any:
    M, h = state[0], state[0].shape[1]
    q, k = (unit(m, heads(m.silu(x @ W), h)) for W in (p.q, p.k))
    rate = m.sigmoid(x @ p.b)[:, :, None]
    change = rate * (heads(x @ p.v, h) - (M @ k[:, :, :, None])[:, :, :, 0])
    M = M + change[:, :, :, None] * k[:, :, None, :]
    return flat((M @ q[:, :, :, None])[:, :, :, 0]), (M,)


@cell("Yang et al. 2024", HEADS, "h, d, d", **QKV, b="I, h", a="I, h", o="I, h*d")
def gated_delta_net(m: Any, p: Any, x: Any, state: Any) -> Any:
    M, h = state[0], state[0].shape[1]
    q, k = (unit(m, heads(m.silu(x @ W), h)) for W in (p.q, p.k))
    M = M * m.exp(-m.softplus(x @ p.a))[:, :, None, None]
    rate = m.sigmoid(x @ p.b)[:, :, None]
    change = rate * (heads(x @ p.v, h) - (M @ k[:, :, :, None])[:, :, :, 0])
    M = M + change[:, :, :, None] * k[:, :, None, :]
    y = (M @ q[:, :, :, None])[:, :, :, 0]
    y = y / m.sqrt(m.mean(y * y, axis=-1, keepdims=True) + 1e-5)
    return flat(y) * m.silu(x @ p.o), (M,)


@cell("Beck et al. 2024", HEADS, "h, d, d", "h, d", "h,", **QKV, o="I, h*d", i="I, h", f="I, h")
def mlstm(m: Any, p: Any, x: Any, state: Any) -> Any:
    C, n, most = state
    q, k, v = (heads(x @ W, n.shape[1]) for W in (p.q, p.k, p.v))
    k = k * n.shape[2] ** -0.5
    i, f = x @ p.i, -m.softplus(-(x @ p.f + 3.0))
    new = m.maximum(f + most, i)
    i, f = m.exp(i - new)[:, :, None], m.exp(f + most - new)[:, :, None]
    C = f[:, :, :, None] * C + i[:, :, :, None] * (v[:, :, :, None] * k[:, :, None, :])
    n = f * n + i * k
    below = m.maximum(m.abs(m.sum(n * q, axis=-1, keepdims=True)), m.exp(-new)[:, :, None])
    y = (C @ q[:, :, :, None])[:, :, :, 0] / below
    return m.sigmoid(x @ p.o) * flat(y), (C, n, new)


MIXED = dict.fromkeys("rkvg", "I, h*d") | {"w0": "h*d,", "A": "I, 8", "Bw": "8, h*d"}


@cell("Peng et al. 2024", HEADS, "I,", "h, d, d", **MIXED, mu="5, I", u="h, d")
def rwkv6(m: Any, p: Any, x: Any, state: Any) -> Any:
    last, M = state
    r, k, v, g, w = (x + (last - x) * m.sigmoid(p.mu[n]) for n in range(5))
    r, k, v = (heads(each @ W, M.shape[1]) for each, W in ((r, p.r), (k, p.k), (v, p.v)))
    w = heads(m.exp(-m.exp(p.w0 + m.tanh(w @ p.A) @ p.Bw)), M.shape[1])
    kv = k[:, :, :, None] * v[:, :, None, :]
    y = (r[:, :, None, :] @ (M + p.u[:, :, None] * kv))[:, :, 0]
    return flat(y) * m.silu(g @ p.g), (x, w[:, :, :, None] * M + kv)


@cell("Peng et al. 2025", HEADS, "I,", "h, d, d", **MIXED, mu="6, I", a="I, h*d", kk="h, d")
def rwkv7(m: Any, p: Any, x: Any, state: Any) -> Any:
    last, M = state
    h = M.shape[1]
    r, k, v, g, w, a = (x + (last - x) * p.mu[n] for n in range(6))
    r, k, v = (heads(each @ W, h) for each, W in ((r, p.r), (k, p.k), (v, p.v)))
    g, a = m.sigmoid(g @ p.g), heads(m.sigmoid(a @ p.a), h)
    w = heads(m.exp(-0.6 * m.sigmoid(p.w0 + m.tanh(w @ p.A) @ p.Bw)), h)
    key = unit(m, k * p.kk)
    old = M @ key[:, :, :, None]
    M = M * w[:, :, None, :] - old * (a * key)[:, :, None, :]
    M = M + v[:, :, :, None] * k[:, :, None, :]
    return flat((M @ r[:, :, :, None])[:, :, :, 0]) * g, (x, M)


@cell("Kalman 1960", ({"n": 8}, {"n": 3}), "n,", "n, n", x="1,", F="n, n", q="n,", H="n,", r="1,")
def kalman(m: Any, p: Any, x: Any, state: Any) -> Any:
    mean, P = state
    mean = mean @ p.F.T
    P = p.F @ P @ p.F.T + m.diag(m.exp(p.q))
    PH = P @ p.H
    gain = PH / ((PH @ p.H) + m.exp(p.r)[0])[:, None]
    mean = mean + gain * (x - (mean @ p.H)[:, None])
    return mean, (mean, P - gain[:, :, None] * PH[:, None, :])


# Memories ------------------------------------------------------------------------------------

PLACES = {"I": 16, "H": 100, "n": 32, "w": 20}, {"I": 3, "H": 5, "n": 6, "w": 4}
MEMORY = {"I": 64, "H": 64, "S": 30}, {"I": 3, "H": 5, "S": 6}


@cell(
    "Graves et al. 2014", PLACES, "H,", "n, w", "n,", "n,",
    W="I + w, H", U="H, H", b="H,", r="H, w + 6", wr="H, 3*w + 6",
)  # fmt: skip
def ntm(m: Any, p: Any, x: Any, state: Any) -> Any:
    h, M, reads, writes = state
    w = M.shape[2]
    found = m.sum(reads[:, :, None] * M, axis=1)
    h = m.tanh(m.concat([x, found], axis=-1) @ p.W + h @ p.U + p.b)

    def address(z: Any, old: Any) -> Any:
        k, strength, gate = z[:, :w], m.softplus(z[:, w : w + 1]), m.sigmoid(z[:, w + 1 : w + 2])
        shift, sharp = m.softmax(z[:, w + 2 : w + 5]), 1 + m.softplus(z[:, w + 5 : w + 6])
        near = m.sum(unit(m, M) * unit(m, k)[:, None, :], axis=-1)
        a = gate * m.softmax(strength * near) + (1 - gate) * old
        up = m.concat([a[:, 1:], a[:, :1]], axis=-1)
        down = m.concat([a[:, -1:], a[:, :-1]], axis=-1)
        a = shift[:, 0:1] * up + shift[:, 1:2] * a + shift[:, 2:3] * down
        a = m.abs(a + 1e-6) ** sharp
        return a / m.sum(a, axis=-1, keepdims=True)

    z = h @ p.wr
    writes = address(z[:, : w + 6], m.softmax(writes))
    erase, add = m.sigmoid(z[:, w + 6 : 2 * w + 6]), m.tanh(z[:, 2 * w + 6 :])
    M = M * (1 - writes[:, :, None] * erase[:, None, :]) + writes[:, :, None] * add[:, None, :]
    reads = address(h @ p.r, m.softmax(reads))
    y = m.concat([h, m.sum(reads[:, :, None] * M, axis=1)], axis=-1)
    return y, (h, M, reads, writes)


@cell(
    "Joulin, Mikolov 2015", PLACES, "H,", "n, w", W="I, H", U="H, H", P="w, H", A="H, 3", D="H, w"
)
def stack_rnn(m: Any, p: Any, x: Any, state: Any) -> Any:
    h, stack = state
    h = m.sigmoid(x @ p.W + h @ p.U + stack[:, 0] @ p.P)
    push, pop, stay = (m.softmax(h @ p.A)[:, k : k + 1, None] for k in range(3))
    new = m.sigmoid(h @ p.D)[:, None]
    pushed = m.concat([new, stack[:, :-1]], axis=1)
    popped = m.concat([stack[:, 1:], 0 * new], axis=1)
    return h, (h, push * pushed + pop * popped + stay * stack)


@cell(
    "Grefenstette et al. 2015", PLACES, "H,", "n, w", "n,",
    W="I + w, H", U="H, H", d="H, 1", u="H, 1", v="H, w",
)  # fmt: skip
def neural_stack(m: Any, p: Any, x: Any, state: Any) -> Any:
    """In a window of n places, of which the last is the top."""
    h, V, strength = state

    def above(s: Any) -> Any:
        return m.flip(m.cumsum(m.flip(s, 1), 1), 1) - s

    read = m.minimum(m.relu(strength), m.relu(1 - above(strength)))
    found = m.sum(read[:, :, None] * V, axis=1)
    h = m.tanh(m.concat([x, found], axis=-1) @ p.W + h @ p.U)
    d, u, v = m.sigmoid(h @ p.d), m.sigmoid(h @ p.u), m.tanh(h @ p.v)
    strength = m.relu(strength - m.relu(u - above(strength)))
    V = m.concat([V[:, 1:], v[:, None, :]], axis=1)
    return h, (h, V, m.concat([strength[:, 1:], d], axis=1))


@cell(
    "Bahdanau et al. 2015", MEMORY, "H,",
    memory="B, S, H", U="H, H", K="H, H", v="H,", W="I + H, 3 * H", R="H, 3 * H",
)  # fmt: skip
def attention(m: Any, p: Any, x: Any, state: Any) -> Any:
    (h,) = state
    scores = m.tanh(p.memory @ p.K + (h @ p.U)[:, None, :]) @ p.v
    context = m.sum(m.softmax(scores)[:, :, None] * p.memory, axis=1)
    h = gru_gates(m, m.concat([x, context], axis=-1) @ p.W, h @ p.R, h)
    return m.concat([h, context], axis=-1), (h,)


@cell(
    "Vinyals et al. 2015", MEMORY, "H,", "H,", "S,",
    memory="B, S, H", U="H, H", K="H, H", v="H, 1", W="I + H, 4 * H", b="4 * H,",
)  # fmt: skip
def pointer(m: Any, p: Any, x: Any, state: Any) -> Any:
    """What was pointed to before is in the state."""
    h, c, seen = state
    h, c = lstm_gates(m, m.concat([x, h], axis=-1) @ p.W + p.b, c)
    scores = (m.tanh(p.memory @ p.K + (h @ p.U)[:, None, :]) @ p.v)[:, :, 0] - 5 * seen
    logs = m.log_softmax(scores)
    return logs, (h, c, m.minimum(seen + m.exp(logs), 1.0))


@cell(
    "Ramsauer et al. 2021", ({"I": 32, "H": 64, "M": 100}, {"I": 3, "H": 5, "M": 6}), "H,",
    W="I, H", U="H, H", X="M, H",
)  # fmt: skip
def hopfield(m: Any, p: Any, x: Any, state: Any) -> Any:
    h = m.tanh(x @ p.W + state[0] @ p.U)
    for _ in range(3):
        h = m.softmax(2.0 * h @ p.X.T) @ p.X
    return h, (h,)


@cell(
    "Cheng et al. 2016", ({"I": 64, "H": 64}, {"I": 3, "H": 8}), "H,", "8, H",
    W="I + H, 3 * H", R="H, 3 * H", q="H, H", k="H, H", v="H, H", o="H, H",
)  # fmt: skip
def own_attention(m: Any, p: Any, x: Any, state: Any) -> Any:
    """A GRU that attends to its last eight states, by four heads (Vaswani et al. 2017)."""
    h, before = state
    rows, n, H = before.shape

    def turned(z: Any) -> Any:
        return m.transpose(z.reshape(rows, n, 4, H // 4), (0, 2, 1, 3))

    q = (h @ p.q).reshape(rows, 4, 1, H // 4)
    k, v = turned(before @ p.k), turned(before @ p.v)
    share = m.softmax(q @ m.transpose(k, (0, 1, 3, 2)) * (H // 4) ** -0.5)
    context = (share @ v).reshape(rows, H) @ p.o
    h = gru_gates(m, m.concat([x, context], axis=-1) @ p.W, h @ p.R, h)
    return h, (h, m.concat([before[:, 1:], h[:, None]], axis=1))


# In space ------------------------------------------------------------------------------------

IN_SPACE = {"L": 32, "C": 4, "H": 16}, {"L": 6, "C": 2, "H": 3}


@cell("Shi et al. 2015", IN_SPACE, "L, H", "L, H", x="L, C", W="3 * (C + H), 4 * H", b="4 * H,")
def conv_lstm(m: Any, p: Any, x: Any, state: Any) -> Any:
    h, c = state
    z = m.pad(m.concat([x, h], axis=-1), ((0, 0), (1, 1), (0, 0)))
    near = m.concat([z[:, k : k + h.shape[1]] for k in range(3)], axis=-1)
    h, c = lstm_gates(m, near @ p.W + p.b, c)
    return h, (h, c)


@cell(
    "Li et al. 2018", ({"n": 20, "F": 8, "H": 16}, {"n": 4, "F": 2, "H": 3}), "n, H", x="n, F",
    A="n, n", z="F + H, H", r="F + H, H", g="F + H, H",
)  # fmt: skip
def graph_gru(m: Any, p: Any, x: Any, state: Any) -> Any:
    (h,) = state
    near = p.A @ m.concat([x, h], axis=-1)
    z, r = m.sigmoid(near @ p.z), m.sigmoid(near @ p.r)
    h = (1 - z) * h + z * m.tanh(p.A @ m.concat([x, r * h], axis=-1) @ p.g)
    return h, (h,)


# Programs ------------------------------------------------------------------------------------


def ours_functions() -> Any:
    import tinygrad_seq as tgs

    names = "abs concat cos cumsum elu exp expm1 flip floor log_softmax maximum mean minimum pad"
    names += " relu sigmoid silu sin softmax softplus sqrt sum tanh where"
    return SimpleNamespace(
        **{name: getattr(tgs, name) for name in names.split()},
        transpose=tgs.permute_dims,
        split=lambda z, n: tgs.split(z, n, axis=-1),
        const=lambda array, like: tgs.tensor(array.astype(like.dtype.name)),
        diag=lambda v: tgs.eye(len(v), dtype=v.dtype) * v,
    )


def jax_functions() -> Any:
    import jax
    import jax.numpy as jnp

    names = "abs cos cumsum diag exp expm1 flip floor maximum mean minimum pad sin sqrt sum tanh"
    names += " transpose where"
    of_networks = "elu log_softmax relu sigmoid silu softmax softplus"
    return SimpleNamespace(
        **{name: getattr(jnp, name) for name in names.split()},
        **{name: getattr(jax.nn, name) for name in of_networks.split()},
        concat=jnp.concatenate,
        split=lambda z, n: jnp.split(z, n, axis=-1),
        const=lambda array, like: jnp.asarray(array.astype("f4")),
    )


Values = tuple[dict[str, np.ndarray], np.ndarray, tuple[np.ndarray, ...]]


def values(kind: CellOf, small: bool) -> Values:
    """Parameters, inputs (T, B, ...) and first states (B, ...)."""
    rng, rows, steps = np.random.default_rng(0), *((SMALL_B, SMALL_T) if small else (B, T))
    sizes = kind.sizes[small] | {"B": rows}

    def shape(text: str) -> tuple[int, ...]:
        return tuple(eval(f"({text})" if "," in text else f"({text},)", dict(sizes)))

    p = {}
    for name, text in kind.shapes.items():
        at = shape(text)
        scale = 0.7 / np.sqrt(at[-2]) if len(at) > 1 else 0.3
        p[name] = rng.standard_normal(at) * scale
    x = 0.7 * rng.standard_normal((steps, rows, *shape(kind.x)))
    return p, x, tuple(0.1 * rng.standard_normal((rows, *shape(text))) for text in kind.states)


def _step(kind: CellOf, m: Any, named: Any) -> Callable[[Any, Any], Any]:
    def step(x: Any, state: Any) -> Any:
        return kind.step(m, named, x, state)

    step.__name__ = kind.step.__name__
    return step


def difference(name: str) -> float:
    """Of ``scan`` from ``unroll`` in float64: the largest, by the largest value of an array."""
    import tinygrad_seq as tgs

    kind, m, found = CELLS[name], ours_functions(), []
    for drive in (tgs.unroll, tgs.scan):
        arrays, x, state = values(kind, small=True)
        p = {k: tgs.tensor(v, requires_grad=True) for k, v in arrays.items()}
        named, xs = SimpleNamespace(**p), tgs.tensor(x, requires_grad=True)
        first = tuple(tgs.tensor(each, requires_grad=True) for each in state)
        ys, last = drive(_step(kind, m, named), xs, first)
        results, weights = [ys, *last], np.random.default_rng(1)
        loss = tgs.tensor(0.0, dtype="float64")
        for y in results:
            loss = loss + tgs.sum(y * weights.standard_normal(y.shape))
        loss.backward()
        leaves = [leaf.grad for leaf in (xs, *first, *p.values())]
        found.append([each.numpy() for each in (*results, *leaves) if each is not None])
    assert len(found[0]) == len(found[1])
    errors = []
    for a, b in zip(*found, strict=True):
        errors.append(np.abs(a - b).max() / max(np.abs(a).max(), 1e-300))  # some are zeros
    return float(np.max(errors))


def single(given: Values) -> Values:
    p, x, state = given
    return (
        {k: v.astype("f4") for k, v in p.items()},
        x.astype("f4"),
        tuple(each.astype("f4") for each in state),
    )


def ours(name: str) -> Callable[[], Any]:
    import tinygrad_seq as tgs

    kind, m = CELLS[name], ours_functions()
    arrays, x, state = single(values(kind, small=False))
    p = {k: tgs.tensor(v, requires_grad=True) for k, v in arrays.items()}
    named, xs, first = SimpleNamespace(**p), tgs.tensor(x), tuple(map(tgs.tensor, state))

    step = _step(kind, m, named)

    def train() -> None:
        for parameter in p.values():
            parameter.grad = None
        ys = tgs.scan(step, xs, first)[0]
        tgs.sum(ys * ys).backward()

    return train


def jax(name: str) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp

    kind, m = CELLS[name], jax_functions()
    arrays, x, state = single(values(kind, small=False))

    def loss(p: Any, x: Any, first: Any) -> Any:
        def step(s: Any, x: Any) -> Any:
            y, s = kind.step(m, SimpleNamespace(**p), x, s)
            return s, y

        ys = jax.lax.scan(step, first, x)[1]
        return jnp.sum(ys * ys)

    gradient = jax.jit(jax.value_and_grad(loss))
    given = {k: jnp.asarray(v) for k, v in arrays.items()}, jnp.asarray(x)
    first = tuple(map(jnp.asarray, state))
    ready: Callable[[Any], Any] = getattr(jax, "block_until_ready")  # noqa: B009
    return lambda: ready(gradient(*given, first))


def _compile_shared() -> float:
    """The functions that the kernels of all cells share."""
    import tinygrad_seq as tgs

    for dtype in ("float32", "float64"):
        W, x = tgs.tensor(np.eye(4, dtype=dtype), requires_grad=True), np.ones((2, 2, 4), dtype)
        kind = CellOf(lambda m, p, x, h: (h @ p, x[:, ::-1] + h @ p), "", ({}, {}), (), "", {})
        tgs.sum(tgs.scan(_step(kind, None, W), x, x[0])[0]).backward()
    return 0.0


def worker(program: str, name: str) -> None:
    begin = perf_counter()
    if program == "shared":
        serve(lambda _: _compile_shared())
        return
    if program == "unroll":
        serve(lambda _: difference(name))
        return
    try:
        train = {"ours": ours, "jax": jax}[program](name)
    except ModuleNotFoundError:
        return
    train()
    first = perf_counter() - begin
    train()
    serve(lambda asked: first if asked == "first" else milliseconds(train, 0.2))


def _command(program: str, name: str) -> list[str]:
    return [sys.executable, "-W", "ignore", __file__, "--worker", program, name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--output", default=str(Path(__file__).parent / "results/literature.md"))
    parser.add_argument("--worker", nargs=2, metavar=("PROGRAM", "CELL"))
    given = parser.parse_args()
    if given.worker:
        worker(*given.worker)
        return
    lines = heading("Cells of the literature")
    lines += [
        "",
        f"Training, T = {T}, B = {B}, float32: milliseconds, medians; ratios turn by turn.",
    ]
    lines += ["The difference is that from `unroll` in float64; the first step includes compiling."]
    lines += ["", "| cell | from | ours ms | jax ms | jax / ours | difference | first step s |"]
    lines += ["| --- " * 7 + "|"]
    ratios = []
    folder = tempfile.TemporaryDirectory()
    os.environ["TINYGRAD_SEQ_CACHE"] = folder.name
    alternate({"shared": _command("shared", "")}, ["go"], 1)
    for name in given.cells:
        commands = {program: _command(program, name) for program in ("ours", "jax")}
        answers = alternate(commands, ["first", "train"], given.turns)
        error = alternate({"unroll": _command("unroll", name)}, ["go"], 1)["go"]["unroll"][0]
        times = answers["train"]
        row = [name, CELLS[name].source, f"{median(times['ours']):.2f}", "", ""]
        if "jax" in times:
            ratios.append(ratio(times["jax"], times["ours"]))
            row[3:] = [f"{median(times['jax']):.2f}", f"{ratios[-1]:.2f}"]
        row += [f"{error:.0e}", f"{answers['first']['ours'][0]:.1f}"]
        lines.append("| " + " | ".join(row) + " |")
        print(lines[-1], flush=True)
    if ratios:
        lines += ["", summary("jax", ratios)]
        print(lines[-1])
    Path(given.output).write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"wrote {given.output}")
    folder.cleanup()


if __name__ == "__main__":
    main()
