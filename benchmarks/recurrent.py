"""Recurrent layers and cells against PyTorch and JAX: ratios of times, one table for each cell.

    python benchmarks/recurrent.py                      every cell, every row
    python benchmarks/recurrent.py --cells lstm gru     some of them
    python benchmarks/recurrent.py --rows 0 2           some of the rows B T I H

Training is forward, then backward from a gradient of all outputs to inputs and parameters. The
programs alternate, each in a process of its own; what is not installed is left out. A cell is
written once here, over a module ``m`` of functions, and runs in all three. LSTM, GRU and RNN are
layers, PyTorch's fused ones and ours, other cells of PyTorch a loop; JAX runs every cell as
``lax.scan`` under ``jit``. Our GRU is the default one; PyTorch's has ``reset_after=True``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
from report import heading, summary

from tinygrad_seq.comparing import alternate, milliseconds, ratio, serve

ROWS = [  # B T I H
    *((1, 100, 32, 64), (8, 100, 32, 64), (32, 100, 64, 128), (64, 50, 128, 256)),
    *((32, 100, 256, 512), (128, 28, 28, 128), (16, 1000, 2, 100), (64, 35, 512, 1024)),
]
FIRST_FIVE = range(5)


def lstm(m: Any, p: Any, x: Any, state: Any) -> Any:
    h, c = state
    i, f, g, o = m.split(x @ p.W + h @ p.U + p.b, 4)
    c = m.sigmoid(f) * c + m.sigmoid(i) * m.tanh(g)
    h = m.sigmoid(o) * m.tanh(c)
    return h, (h, c)


def gru(m: Any, p: Any, x: Any, state: Any) -> Any:
    (h,) = state
    a = x @ p.W + p.b
    H = p.U.shape[0]
    r, z = m.split(m.sigmoid(a[:, : 2 * H] + h @ p.U), 2)
    h = (1 - z) * h + z * m.tanh(a[:, 2 * H :] + (r * h) @ p.V)
    return h, (h,)


def rnn(m: Any, p: Any, x: Any, state: Any) -> Any:
    h = m.tanh(x @ p.W + state[0] @ p.U + p.b)
    return h, (h,)


def peephole(m: Any, p: Any, x: Any, state: Any) -> Any:
    h, c = state
    i, f, g, o = m.split(x @ p.W + h @ p.U + p.b, 4)
    i, f = m.sigmoid(i + p.pi * c), m.sigmoid(f + p.pf * c)
    c = f * c + i * m.tanh(g)
    h = m.sigmoid(o + p.po * c) * m.tanh(c)
    return h, (h, c)


def minimal_gated(m: Any, p: Any, x: Any, state: Any) -> Any:
    (h,) = state
    f = m.sigmoid(x @ p.W + h @ p.U + p.b)
    h = (1 - f) * h + f * m.tanh(x @ p.Wn + (f * h) @ p.Un)
    return h, (h,)


def multiplicative(m: Any, p: Any, x: Any, state: Any) -> Any:
    h, c = state
    i, f, g, o = m.split(x @ p.W + ((x @ p.Wm) * (h @ p.Um)) @ p.U + p.b, 4)
    c = m.sigmoid(f) * c + m.sigmoid(i) * m.tanh(g)
    h = m.sigmoid(o) * m.tanh(c)
    return h, (h, c)


def indrnn(m: Any, p: Any, x: Any, state: Any) -> Any:
    h = m.relu(x @ p.W + p.u * state[0] + p.b)
    return h, (h,)


def _norm(m: Any, z: Any, gain: Any) -> Any:
    z = z - m.mean(z)
    return z / m.sqrt(m.mean(z * z) + 1e-5) * gain


def layer_norm_lstm(m: Any, p: Any, x: Any, state: Any) -> Any:
    h, c = state
    i, f, g, o = m.split(_norm(m, x @ p.W, p.gx) + _norm(m, h @ p.U, p.gh) + p.b, 4)
    c = m.sigmoid(f) * c + m.sigmoid(i) * m.tanh(g)
    h = m.sigmoid(o) * m.tanh(_norm(m, c, p.gc))
    return h, (h, c)


def highway(m: Any, p: Any, x: Any, state: Any) -> Any:
    (s,) = state
    for U, b, first in ((p.U, p.b, True), (p.V, p.bv, False)):
        z = s @ U + b + (x @ p.W if first else 0.0)
        h, t = m.split(z, 2)
        t = m.sigmoid(t)
        s = m.tanh(h) * t + s * (1 - t)
    return s, (s,)


def delta_rule(m: Any, p: Any, x: Any, state: Any) -> Any:
    """Eight heads, each with a matrix as memory (Schlag, Irie, Schmidhuber 2021)."""
    (S,) = state
    k, v, q = (z.reshape(S.shape[:3]) for z in m.split(x @ p.W, 3))
    e = m.exp(k)
    k = e / m.sum(e)[:, :, None]
    change = m.sigmoid(x @ p.r)[:, :, None] * (v - m.sum(S * k[:, :, None, :]))
    S = S + change[:, :, :, None] * k[:, :, None, :]
    return m.sum(S * q[:, :, None, :]).reshape((len(x), -1)), (S,)


def heads(m: Any, p: Any, x: Any, state: Any) -> Any:
    """An LSTM of four heads, each with a matrix for its own units (Beck et al. 2024)."""
    h, c = state
    z = (x @ p.W + p.b).reshape((len(x), 4, -1)) + (h[:, :, None] @ p.U)[:, :, 0]
    i, f, g, o = m.split(z, 4)
    c = m.sigmoid(f) * c + m.sigmoid(i) * m.tanh(g)
    h = m.sigmoid(o) * m.tanh(c)
    return h.reshape((len(x), -1)), (h, c)


def convolution(m: Any, p: Any, x: Any, state: Any) -> Any:
    """A convolutional LSTM, windows of three places in a circle (Shi et al. 2015)."""
    h, c = state
    places = h.shape[1]
    circle = m.concat([h[:, -1:], h, h[:, :1]], 1)
    near = m.concat([circle[:, k : k + places] for k in range(3)], -1)
    z = (x @ p.W).reshape((len(x), places, -1)) + near @ p.U + p.b
    i, f, g, o = m.split(z, 4)
    c = m.sigmoid(f) * c + m.sigmoid(i) * m.tanh(g)
    h = m.sigmoid(o) * m.tanh(c)
    return h.reshape((len(x), -1)), (h, c)


def functions() -> Any:
    """What the cells call, here."""
    import tinygrad_seq as tgs

    return SimpleNamespace(
        sigmoid=tgs.sigmoid,
        tanh=tgs.tanh,
        relu=tgs.relu,
        sqrt=tgs.sqrt,
        exp=tgs.exp,
        concat=tgs.concat,
        split=lambda z, n: tgs.split(z, n, axis=-1),
        mean=lambda z: tgs.mean(z, axis=-1, keepdims=True),
        sum=lambda z: tgs.sum(z, axis=-1),
    )


class CellOf:
    """A cell, its states and the shapes of its parameters."""

    def __init__(
        self, step: Callable[..., Any], states: int, state: str = "(B, H)", **shapes: str
    ) -> None:
        self.step, self.states, self.state, self.shapes = step, states, state, shapes

    def first(self, zeros: Callable[[tuple[int, ...]], Any], B: int, H: int) -> tuple[Any, ...]:
        """The states that it begins with."""
        return tuple(zeros(eval(self.state, {"B": B, "H": H})) for _ in range(self.states))

    def parameters(self, I: int, H: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(1)
        made = {}
        for name, text in self.shapes.items():
            shape = tuple(eval(text, {"I": I, "H": H}))
            made[name] = (rng.standard_normal(shape) / np.sqrt(shape[-2:][0])).astype("f4")
        return made


_GATES = {"W": "(I, 4*H)", "U": "(H, 4*H)", "b": "(4*H,)"}
CELLS = {
    "lstm": CellOf(lstm, 2, **_GATES),
    "gru": CellOf(gru, 1, W="(I, 3*H)", U="(H, 2*H)", V="(H, H)", b="(3*H,)"),
    "rnn": CellOf(rnn, 1, W="(I, H)", U="(H, H)", b="(H,)"),
    "peephole": CellOf(peephole, 2, **_GATES, pi="(H,)", pf="(H,)", po="(H,)"),
    "minimal_gated": CellOf(
        minimal_gated, 1, W="(I, H)", U="(H, H)", b="(H,)", Wn="(I, H)", Un="(H, H)"
    ),
    "multiplicative": CellOf(multiplicative, 2, **_GATES, Wm="(I, H)", Um="(H, H)"),
    "indrnn": CellOf(indrnn, 1, W="(I, H)", u="(H,)", b="(H,)"),
    "layer_norm_lstm": CellOf(layer_norm_lstm, 2, **_GATES, gx="(4*H,)", gh="(4*H,)", gc="(H,)"),
    "highway": CellOf(
        highway, 1, W="(I, 2*H)", U="(H, 2*H)", V="(H, 2*H)", b="(2*H,)", bv="(2*H,)"
    ),
    "delta_rule": CellOf(delta_rule, 1, "(B, 8, H//8, H//8)", W="(I, 3*H)", r="(I, 8)"),
    "heads": CellOf(heads, 2, "(B, 4, H//4)", W="(I, 4*H)", U="(4, H//4, H)", b="(4*H,)"),
    "convolution": CellOf(
        convolution, 2, "(B, H//16, 16)", W="(I, 4*H)", U="(3*16, 4*16)", b="(4*16,)"
    ),
}
FUSED = ("lstm", "gru", "rnn")
PEERS = {
    "lstm": ("torch", "jax"),
    **dict.fromkeys(("gru", "rnn"), ("torch",)),
    "peephole": ("torch", "jax"),
    **dict.fromkeys(("minimal_gated", "multiplicative", "indrnn"), ("jax",)),
    **dict.fromkeys(("layer_norm_lstm", "highway", "delta_rule"), ("jax",)),
    **dict.fromkeys(("heads", "convolution"), ("jax",)),
}


def data(B: int, T: int, I: int, H: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((T, B, I), "f4"), rng.standard_normal((T, B, H), "f4")


Runs = dict[str, Callable[[], Any]]


def ours(name: str, row: tuple[int, ...]) -> Runs:
    import tinygrad_seq as tgs
    from tinygrad_seq import nn

    B, _, I, H = row
    x, dy = data(*row)
    xs, gradient = tgs.tensor(x, requires_grad=True), tgs.tensor(dy)
    if name in FUSED:
        layer = getattr(nn, name.upper())(I, H)
        parameters = list(layer.parameters())

        def run() -> Any:
            return layer(xs)[0]
    else:
        kind = CELLS[name]
        p = {k: tgs.tensor(v, requires_grad=True) for k, v in kind.parameters(I, H).items()}
        m, named = functions(), SimpleNamespace(**p)
        parameters = list(p.values())
        state = kind.first(tgs.zeros, B, H)

        def cell(x: Any, state: Any) -> Any:
            return kind.step(m, named, x, state)

        def run() -> Any:
            return tgs.scan(cell, xs, state)[0]

    def train() -> None:
        xs.grad = None
        for parameter in parameters:
            parameter.grad = None
        run().backward(gradient)

    def infer() -> None:
        with tgs.no_grad():
            run()

    return {"train": train, "infer": infer}


def torch(name: str, row: tuple[int, ...]) -> Runs:
    import torch

    torch.set_num_threads(2)
    B, _, I, H = row
    x, dy = (torch.tensor(a) for a in data(*row))
    x.requires_grad_()
    if name in FUSED:
        layer = getattr(torch.nn, name.upper())(I, H)
        parameters = list(layer.parameters())

        def run() -> Any:
            return layer(x)[0]
    else:
        kind = CELLS[name]
        p = {k: torch.tensor(v).requires_grad_() for k, v in kind.parameters(I, H).items()}
        m = SimpleNamespace(
            sigmoid=torch.sigmoid,
            tanh=torch.tanh,
            relu=torch.relu,
            sqrt=torch.sqrt,
            split=lambda z, n: torch.chunk(z, n, -1),
            mean=lambda z: z.mean(-1, keepdim=True),
            sum=lambda z: z.sum(-1),
            exp=torch.exp,
            concat=torch.cat,
        )
        named, parameters = SimpleNamespace(**p), list(p.values())

        def run() -> Any:
            state: Any = kind.first(torch.zeros, B, H)
            ys = []
            for t in range(len(x)):
                y, state = kind.step(m, named, x[t], state)
                ys.append(y)
            return torch.stack(ys)

    def train() -> None:
        x.grad = None
        for parameter in parameters:
            parameter.grad = None
        run().backward(dy)

    def infer() -> None:
        with torch.no_grad():
            run()

    return {"train": train, "infer": infer}


def jax(name: str, row: tuple[int, ...]) -> Runs:
    import jax
    import jax.numpy as jnp

    ready: Callable[[Any], Any] = getattr(jax, "block_until_ready")  # noqa: B009
    B, _, I, H = row
    x, dy = (jnp.asarray(a) for a in data(*row))
    kind = CELLS[name]
    p = {k: jnp.asarray(v) for k, v in kind.parameters(I, H).items()}
    m = SimpleNamespace(
        sigmoid=jax.nn.sigmoid,
        tanh=jnp.tanh,
        relu=jax.nn.relu,
        sqrt=jnp.sqrt,
        split=lambda z, n: jnp.split(z, n, -1),
        mean=lambda z: z.mean(-1, keepdims=True),
        sum=lambda z: z.sum(-1),
        exp=jnp.exp,
        concat=jnp.concatenate,
    )

    def run(p: Any, x: Any) -> Any:
        state = kind.first(jnp.zeros, B, H)

        def step(state: Any, x: Any) -> Any:
            y, state = kind.step(m, SimpleNamespace(**p), x, state)
            return state, y

        return jax.lax.scan(step, state, x)[1]

    def gradients(p: Any, x: Any) -> Any:
        ys, back = jax.vjp(run, p, x)
        return ys, back(dy)

    forward, both = jax.jit(run), jax.jit(gradients)
    return {
        "train": lambda: ready(both(p, x)),
        "infer": lambda: ready(forward(p, x)),
    }


def worker(program: str, name: str) -> None:
    make = {"ours": ours, "torch": torch, "jax": jax}[program]
    if program != "ours":
        __import__(program)
    made: dict[int, Runs] = {}

    def answer(line: str) -> float:
        mode, number = line.split()
        if int(number) not in made:
            made.clear()
            made[int(number)] = make(name, ROWS[int(number)])
            for run in made[int(number)].values():
                run()
        return milliseconds(made[int(number)][mode])

    serve(answer)


def table(name: str, rows: list[int], turns: int) -> list[str]:
    """Times and ratios of one cell as lines of a Markdown table."""
    peers = PEERS[name]
    commands = {
        program: [sys.executable, "-W", "ignore", __file__, "--worker", program, name]
        for program in ("ours", *peers)
    }
    lines: list[str] = []
    for mode in ("train", "infer"):
        begin = len(lines)
        answers = alternate(commands, [f"{mode} {row}" for row in rows], turns)
        shown = [peer for peer in peers if peer in answers[f"{mode} {rows[0]}"]]
        head = ["B T I H", "tinygrad_seq ms"]
        head += [f"{peer} {what}" for peer in shown for what in ("ms", "/ ours")]
        lines += [f"{name}, {mode}:", "", " | ".join(["", *head, ""]).strip()]
        lines.append("|" + " --- |" * len(head))
        ratios: dict[str, list[float]] = {peer: [] for peer in shown}
        for row in rows:
            times = answers[f"{mode} {row}"]
            cells = [" ".join(map(str, ROWS[row])), f"{median(times['ours']):.2f}"]
            for peer in shown:
                ratios[peer].append(ratio(times[peer], times["ours"]))
                cells += [f"{median(times[peer]):.2f}", f"{ratios[peer][-1]:.2f}"]
            lines.append("| " + " | ".join(cells) + " |")
        for peer, found in ratios.items():
            lines += ["", summary(peer, found)]
        lines.append("")
        print("\n".join(lines[begin:]), flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--cells", nargs="+", default=[c for c in PEERS if PEERS[c]])
    parser.add_argument("--rows", nargs="+", type=int)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--output", default=str(Path(__file__).parent / "results/recurrent.md"))
    parser.add_argument("--worker", nargs=2, metavar=("PROGRAM", "CELL"))
    given = parser.parse_args()
    if given.worker:
        worker(*given.worker)
        return
    parts = heading("Recurrent layers and cells")
    parts += ["", "Milliseconds, medians; ratios are their time over ours, turn by turn.", ""]
    for name in given.cells:
        rows = given.rows or list(range(8) if name in FUSED else FIRST_FIVE)
        parts += table(name, rows, given.turns)
    Path(given.output).write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")
    print(f"wrote {given.output}")


if __name__ == "__main__":
    main()
