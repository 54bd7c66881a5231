"""Cells of many kinds, made of the engine's operations, for the tests of ``scan``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import tinygrad_seq as tgs
from tinygrad_seq import nn


class Cell(nn.Module):
    """Weights by name and shape, drawn at random."""

    def __init__(self, rng: np.random.Generator, dtype: str, **shapes: tuple[int, ...]) -> None:
        for name, shape in shapes.items():
            values = rng.standard_normal(shape) / np.sqrt(max(1, np.prod(shape[-1:])))
            setattr(self, name, nn.parameter(values, dtype))
        self.hidden = 0
        self.dtype = dtype

    def initial_state(self, batch_size: int) -> Any:
        return tgs.zeros(batch_size, self.hidden, dtype=self.dtype)


class IndRNN(Cell):
    def forward(self, x, h):
        h = tgs.relu(x @ self.W + self.u * h + self.b)
        return h, h


class MinimalGatedUnit(Cell):
    def forward(self, x, h):
        f = tgs.sigmoid(tgs.concat([x, h], axis=-1) @ self.F + self.bf)
        n = tgs.tanh(tgs.concat([x, f * h], axis=-1) @ self.N)
        h = (1 - f) * h + f * n
        return h, h


class Peephole(Cell):
    def initial_state(self, batch_size):
        return tuple(tgs.zeros(batch_size, self.hidden, dtype=self.dtype) for _ in range(2))

    def forward(self, x, state):
        h, c = state
        i, f, g, o = tgs.split(x @ self.W + h @ self.U + self.b, 4, axis=-1)
        i, f = tgs.sigmoid(i + self.pi * c), tgs.sigmoid(f + self.pf * c)
        c = f * c + i * tgs.tanh(g)
        h = tgs.sigmoid(o + self.po * c) * tgs.tanh(c)
        return h, (h, c)


class State(NamedTuple):
    h: Any
    c: Any


class MultiplicativeLSTM(Cell):
    """A state by name, a product between two others."""

    def initial_state(self, batch_size):
        return State(*(tgs.zeros(batch_size, self.hidden, dtype=self.dtype) for _ in range(2)))

    def forward(self, x, state):
        m = (x @ self.Wm) * (state.h @ self.Um)
        z = x @ self.W + m @ self.U + self.b
        H = self.hidden
        i, f, o = tgs.split(tgs.sigmoid(z[:, : 3 * H]), 3, axis=-1)
        c = f * state.c + i * z[:, 3 * H :]
        h = tgs.tanh(c) * o
        return h, State(h, c)


def layer_norm(z, weight, bias):
    z = z - tgs.mean(z, axis=-1, keepdims=True)
    return z / tgs.sqrt(tgs.mean(z * z, axis=-1, keepdims=True) + 1e-5) * weight + bias


class LayerNormLSTM(Cell):
    def initial_state(self, batch_size):
        return tuple(tgs.zeros(batch_size, self.hidden, dtype=self.dtype) for _ in range(2))

    def forward(self, x, state):
        h, c = state
        z = layer_norm(x @ self.W, self.gx, self.b) + layer_norm(h @ self.U, self.gh, self.b)
        i, f, g, o = tgs.split(z, 4, axis=-1)
        c = tgs.sigmoid(f) * c + tgs.sigmoid(i) * tgs.tanh(g)
        h = tgs.sigmoid(o) * tgs.tanh(layer_norm(c, self.gc, self.bc))
        return h, (h, c)


class RecurrentHighway(Cell):
    """Two products one after the other in a step."""

    def forward(self, x, s):
        for R, b in ((self.R1, self.b1), (self.R2, self.b2)):
            z = s @ R + b
            if R is self.R1:
                z = z + x @ self.W
            h, t = tgs.split(z, 2, axis=-1)
            t = tgs.sigmoid(t)
            s = tgs.tanh(h) * t + s * (1 - t)
        return s, s


class TwoWidths(Cell):
    """Two states of different widths; the output is neither; it is a product of the new state."""

    def initial_state(self, batch_size):
        widths = (self.hidden, self.V.shape[0])
        return tuple(tgs.zeros(batch_size, n, dtype=self.dtype) for n in widths)

    def forward(self, x, state):
        a, b = state
        a_new = tgs.tanh(x @ self.W + a @ self.A + b @ self.B.T)
        b_new = tgs.sigmoid(b * self.d + (a_new @ self.V.T))
        return {"y": tgs.softplus(a_new @ self.O), "b": b_new}, (a_new, b_new)


class StateSpace(Cell):
    """Linear: products of the state before and after the step, a delay line, the input as state."""

    def initial_state(self, batch_size):
        widths = (self.hidden, self.E.shape[1], self.A.shape[0])
        h, late, seen = (tgs.zeros(batch_size, n, dtype=self.dtype) for n in widths)
        return {"h": h, "late": late, "seen": (seen,)}

    def forward(self, x, state):
        h, late, (seen,) = state["h"], state["late"], state["seen"]
        after = h @ self.A + late @ self.D + x @ self.B
        y = h @ self.C + after @ self.C + late * (after @ self.C)
        return (y, seen), {"h": after, "late": x @ self.E, "seen": (h,)}


class Odd(Cell):
    """Slices that overlap and leave gaps, powers, where, maxima, softmax, logs, a scalar."""

    def forward(self, x, h):
        H = self.hidden
        left, middle = h[:, : H - 1], h[:, 1:]
        p = tgs.softmax(x @ self.W + h, axis=-1)
        q = tgs.where(left > 0.2, left**3, tgs.minimum(left, middle) * self.scale)
        m = h.max(axis=-1)
        h = tgs.concat([q, tgs.log1p(m * m)[:, None]], axis=-1)
        h = tgs.clip(h * 0.5 + p * 2.0, -0.8, 0.9) + abs(x[:, 0])[:, None] * 0.1
        return h[:, ::-1] * (~(h > 0.5)).to(self.dtype), tgs.elu(h) / (1.5 + tgs.exp(-h.detach()))


class Switched(Cell):
    """Conditions joined, an integer input, a counter in the state, whole numbers of a period."""

    def initial_state(self, batch_size):
        h = tgs.zeros(batch_size, self.hidden, dtype=self.dtype)
        return h, tgs.zeros(batch_size, dtype=self.dtype)

    def forward(self, x, state):
        h, age = state
        value, kind = x["value"], x["kind"]
        third = age - 3.0 * tgs.floor(age / 3.0) >= 2.0  # as a clock has it
        fresh = (kind == 1) | ((kind == 2) & third)
        candidate = tgs.gelu(value @ self.W + tgs.silu(h) @ self.U)
        h = tgs.where(fresh[:, None], candidate, h * tgs.exp(-self.rate * age)[:, None])
        age = tgs.where(fresh, 0.0, age + 1.0)
        with tgs.no_grad():
            size = tgs.sqrt((h * h).sum(axis=-1) + 1.0)
        return (h / size[:, None]).sum(axis=-1), (h, age)


class Noisy(Cell):
    """Dropout of the input, zoneout of the state, noise; numbers of three operations."""

    def forward(self, x, h):
        new = tgs.tanh(nn.Dropout(0.3)(x) @ self.W + h @ self.U)
        h = tgs.where(tgs.rand(*h.shape) < 0.4, h, new + 0.1 * tgs.randn(h.shape[0], 1))
        return h * tgs.rand(len(h))[:, None], h


class Nested(Cell):
    """A cell that calls another one."""

    def __init__(self, rng, dtype, I, H):
        super().__init__(rng, dtype, V=(H, H))
        self.inner = nn.GRUCell(I, H, dtype=dtype, rng=rng)

    def forward(self, x, h):
        y, h = self.inner(x, h)
        return tgs.tanh(y @ self.V) + y, h


def _built_in(kind: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    def make(rng, dtype, I, H):
        cell = kind(I, H, dtype=dtype, rng=rng, **options)
        for parameter in cell.parameters():
            parameter.data = rng.standard_normal(parameter.shape).astype(dtype) * 0.7
        cell.hidden = H
        return cell

    return make


def _made(kind: type[Cell], shapes: Callable[[int, int], dict[str, tuple[int, ...]]]) -> Any:
    def make(rng, dtype, I, H):
        cell = kind(rng, dtype, **shapes(I, H))
        cell.hidden = H
        return cell

    return make


def _nested(rng, dtype, I, H):
    cell = Nested(rng, dtype, I, H)
    cell.hidden = H
    return cell


CELLS: dict[str, Callable[..., Any]] = {
    "rnn": _built_in(nn.RNNCell),
    "rnn relu": _built_in(nn.RNNCell, nonlinearity="relu", bias=False),
    "lstm": _built_in(nn.LSTMCell),
    "gru": _built_in(nn.GRUCell),
    "gru reset after": _built_in(nn.GRUCell, reset_after=True),
    "indrnn": _made(IndRNN, lambda I, H: {"W": (I, H), "u": (H,), "b": (H,)}),
    "minimal gated unit": _made(
        MinimalGatedUnit, lambda I, H: {"F": (I + H, H), "N": (I + H, H), "bf": (H,)}
    ),
    "peephole": _made(
        Peephole,
        lambda I, H: {
            "W": (I, 4 * H),
            "U": (H, 4 * H),
            "b": (4 * H,),
            "pi": (H,),
            "pf": (H,),
            "po": (H,),
        },
    ),
    "multiplicative lstm": _made(
        MultiplicativeLSTM,
        lambda I, H: {
            "Wm": (I, H),
            "Um": (H, H),
            "W": (I, 4 * H),
            "U": (H, 4 * H),
            "b": (4 * H,),
        },
    ),
    "layer norm lstm": _made(
        LayerNormLSTM,
        lambda I, H: {
            "W": (I, 4 * H),
            "U": (H, 4 * H),
            "b": (4 * H,),
            "gx": (4 * H,),
            "gh": (4 * H,),
            "gc": (H,),
            "bc": (H,),
        },
    ),
    "recurrent highway": _made(
        RecurrentHighway,
        lambda I, H: {
            "W": (I, 2 * H),
            "R1": (H, 2 * H),
            "R2": (H, 2 * H),
            "b1": (2 * H,),
            "b2": (2 * H,),
        },
    ),
    "two widths": _made(
        TwoWidths,
        lambda I, H: {
            "W": (I, H),
            "A": (H, H),
            "B": (H, H + 2),
            "d": (H + 2,),
            "V": (H + 2, H),
            "O": (H, 3),
        },
    ),
    "state space": _made(
        StateSpace,
        lambda I, H: {"A": (H, H), "B": (I, H), "C": (H, 3), "D": (3, H), "E": (I, 3)},
    ),
    "odd": _made(Odd, lambda I, H: {"W": (I, H), "scale": ()}),
    "switched": _made(Switched, lambda I, H: {"W": (I, H), "U": (H, H), "rate": ()}),
    "noisy": _made(Noisy, lambda I, H: {"W": (I, H), "U": (H, H)}),
    "nested": _nested,
}


def make_inputs(name: str, rng: np.random.Generator, T: int, B: int, I: int, dtype: str) -> Any:
    """What the cell takes: an array (T, B, I), or a dict of arrays."""
    value = rng.standard_normal((T, B, I)).astype(dtype)
    if name == "switched":
        return {"value": value, "kind": rng.integers(0, 4, (T, B))}
    return value
