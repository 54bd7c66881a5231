"""Pictures of recurrent networks, and of what a trained one does with its gates.

    python examples/pictures.py --output pictures

Networks folded and unrolled, windows over a series, the insides of cells, gradients that vanish.
Any cell can be drawn, since it is traced: the minimal gated unit below is known to nobody but this
file. And any cell can show its gates, by returning them: a small LSTM learns to remember the last
symbol that a flag marked, and its gates are drawn beside what it reads.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

import tinygrad_seq as tgs
from tinygrad_seq import nn, optim
from tinygrad_seq.drawing import (
    draw_activations,
    draw_cell,
    draw_correspondences,
    draw_gates,
    draw_gradients,
    draw_unrolled,
    draw_windows,
)

State = tuple[tgs.Tensor, tgs.Tensor]


class MinimalGatedUnit(nn.Module):
    """One gate, f, which both forgets and lets in (Zhou et al. 2016)."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        self.hidden_size = hidden_size
        self.gate = nn.Linear(input_size + hidden_size, hidden_size, rng=0)
        self.new = nn.Linear(input_size + hidden_size, hidden_size, rng=1)

    def initial_state(self, batch_size: int) -> tgs.Tensor:
        return tgs.zeros(batch_size, self.hidden_size)

    def forward(self, x: tgs.Tensor, h: tgs.Tensor) -> tuple[tgs.Tensor, tgs.Tensor]:
        f = tgs.sigmoid(self.gate(tgs.concat([x, h], axis=-1)))
        n = tgs.tanh(self.new(tgs.concat([x, f * h], axis=-1)))
        h = (1 - f) * h + f * n
        return h, h


class OpenLSTM(nn.LSTMCell):
    """An LSTM that returns its gates and its memory beside its output."""

    def forward(self, x: tgs.Tensor, state: State) -> tuple[dict[str, tgs.Tensor], State]:  # type: ignore[override]
        h, c = state
        z = x @ self.weight_ih.T + h @ self.weight_hh.T
        z = z if self.bias is None else z + self.bias
        i, f, g, o = tgs.split(z, 4, axis=-1)
        i, f, o = tgs.sigmoid(i), tgs.sigmoid(f), tgs.sigmoid(o)
        c = f * c + i * tgs.tanh(g)
        h = o * tgs.tanh(c)
        return {"y": h, "input gate": i, "forget gate": f, "output gate": o, "memory": c}, (h, c)


def sequences(rng: np.random.Generator, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Symbols −1 and 1, some of them flagged, (30, B, 2); and the last flagged one, (30, B)."""
    symbols = rng.choice([-1.0, 1.0], (30, batch_size))
    flags = rng.random((30, batch_size)) < 0.12
    last = np.zeros((30, batch_size))  # 0 before the first flag
    for t in range(30):
        last[t] = np.where(flags[t], symbols[t], last[t - 1])
    return np.stack([symbols, flags], axis=-1).astype("float32"), last


def train(cell: OpenLSTM, batches: int) -> float:
    """Learn to tell the last flagged symbol; returns the share of new ones that are right."""
    rng = np.random.default_rng(0)
    head = nn.Linear(cell.hidden_size, 1, rng=0)
    optimizer = optim.Adam([*cell.parameters(), *head.parameters()], lr=0.02)

    def logits(xs: np.ndarray) -> tgs.Tensor:
        ys, _ = tgs.scan(cell, tgs.tensor(xs))
        logits: tgs.Tensor = head(ys["y"])[:, :, 0]
        return logits

    for _ in progress(batches):
        xs, last = sequences(rng, 64)
        loss = nn.functional.binary_cross_entropy_with_logits(logits(xs), last > 0, mask=last != 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    xs, last = sequences(rng, 1000)
    with tgs.no_grad():
        right = (logits(xs).numpy() > 0) == (last > 0)
    return float(right[last != 0].mean())


def progress(batches: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        print('training (pip install "tinygrad-seq[examples]" for a progress bar)')
        return range(batches)
    return tqdm(range(batches), desc="training", unit="batch")


def gradient_norms(cell: Any, T: int = 60) -> np.ndarray:
    """How much the last output would change with the input of each step: (T,)."""
    xs = tgs.tensor(np.random.default_rng(1).standard_normal((T, 8, 2)).astype("float32"))
    xs.requires_grad = True
    ys, _ = tgs.unroll(cell, xs)
    ys[-1].sum().backward()
    assert xs.grad is not None
    norms: np.ndarray = np.linalg.norm(xs.grad.numpy(), axis=(1, 2))
    return norms


def four_steps(cell: nn.LSTMCell, xs: np.ndarray, path: Path) -> None:
    """The same cell four times, with another part of it in colour."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(21, 8.5), dpi=100)
    whole = {"left": 0, "right": 1, "bottom": 0, "top": 1, "wspace": 0.02, "hspace": 0.02}
    axes = figure.subplots(2, 2, gridspec_kw=whole)
    for ax, part in zip(axes.flat, ("forget", "input", "memory", "output"), strict=True):
        draw_cell(cell, xs, highlight=part, title=f"LSTM: {part}", ax=ax)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> list[Path]:
    parser = argparse.ArgumentParser(description="Draw recurrent networks.")
    parser.add_argument("--output", type=Path, default=Path("pictures"), help="a folder")
    parser.add_argument("--batches", type=int, default=400, help="to train the small LSTM with")
    given = parser.parse_args(arguments)
    given.output.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []

    def to(name: str) -> Path:
        written.append(given.output / f"{name}.png")
        return written[-1]

    draw_activations(path=to("activations"))
    draw_correspondences(path=to("correspondences"))
    draw_unrolled(4, path=to("unrolled"))
    draw_unrolled(4, backward=True, path=to("backward"))
    draw_unrolled(5, truncate=2, path=to("truncated"))
    draw_windows(8, 3, path=to("windows"))

    xs, _ = sequences(np.random.default_rng(7), 1)
    lstm = nn.LSTMCell(2, 4, rng=0)
    draw_cell(nn.RNNCell(2, 4, rng=0), xs, path=to("rnn"))
    output = nn.Head(nn.RNNCell(2, 4, rng=0), 1, activation="sigmoid", rng=0)
    title = "the simple recurrent network with its output, one step"
    draw_cell(output, xs, title=title, path=to("rnn_with_output"))
    draw_cell(lstm, xs, path=to("lstm"))
    peephole = nn.LSTMCell(2, 4, peephole=True, coupled=True, rng=0)
    title = "LSTM with peepholes, input and forget gates coupled, one step"
    draw_cell(peephole, xs, title=title, path=to("lstm_peephole_coupled"))
    four_steps(lstm, xs, to("lstm_four_steps"))
    gru_parts = {"reset": ["r"], "update": ["z"], "candidate": ["from_h", "n"]}
    draw_cell(nn.GRUCell(2, 4, rng=0), xs, parts=gru_parts, path=to("gru"))
    draw_cell(MinimalGatedUnit(2, 4), xs, path=to("minimal_gated_unit"))

    models = {
        "RNN": nn.RNNCell(2, 16, rng=0),
        "RNN, ReLU, from the identity": nn.RNNCell(2, 16, "relu", recurrent="identity", rng=0),
        "GRU": nn.GRUCell(2, 16, rng=0),
        "LSTM, forget bias 0": nn.LSTMCell(2, 16, forget_bias=0.0, rng=0),
        "LSTM, forget bias 1": nn.LSTMCell(2, 16, rng=0),
        "LSTM, forget bias 4": nn.LSTMCell(2, 16, forget_bias=4.0, rng=0),
    }
    norms = {name: gradient_norms(model) for name, model in models.items()}
    title = "untrained: gradient of the last output with respect to each step's input"
    draw_gradients(norms, title=title, path=to("gradients"))

    cell = OpenLSTM(2, 3, rng=0)
    right = train(cell, given.batches)
    print(f"an LSTM of {cell.hidden_size} units: {right:.1%} of the last flagged symbols right")
    with tgs.no_grad():
        ys, _ = tgs.scan(cell, xs)
    gates = {name: ys[name][:, 0] for name in ys if name != "y"}
    inputs = {"symbol": xs[:, 0, 0], "flag": xs[:, 0, 1]}
    title = "a trained LSTM of 3 units: at a flag forget gates close, and memory is written anew"
    draw_gates(gates, inputs, title=title, path=to("gates"))
    draw_gates(gates, inputs, lines=True, title=title, path=to("gates_as_lines"))
    for path in written:
        print(f"wrote {path}")
    return written


if __name__ == "__main__":
    main()
