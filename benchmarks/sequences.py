"""What sequence work costs: options of a cell, text, lengths, one step at a time. One table.

    python benchmarks/sequences.py

Programs alternate, each in a process of its own; times are medians, ratios are taken turn by turn.
PyTorch's are left out where it is not installed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from report import Run, answer, heading, pairs

MIDDLE = (32, 100, 64, 128)  # B, T, I, H
TEXT = (32, 100, 64, 256, 96)  # B, T, embedding, H, vocabulary
COUNT, SHORTEST, LONGEST = 128, 10, 400  # sequences of different lengths, in batches of 32
OPTIONS = {"peephole": True, "layer_norm": True, "zoneout": 0.1, "projection_size": 64}


def cell(**options: Any) -> Run:
    """A training step of an LSTM with these options."""
    import tinygrad_seq as tgs

    B, T, I, H = MIDDLE
    rng = np.random.default_rng(0)
    layer = tgs.nn.LSTM(I, H, rng=0, **options)
    x = tgs.tensor(rng.standard_normal((T, B, I), "f4"), requires_grad=True)
    dy = tgs.tensor(rng.standard_normal((T, B, layer.cells[0].output_size), "f4"))

    def step() -> None:
        x.grad = None
        layer.zero_grad()
        layer(x)[0].backward(dy)

    return step


def text_here(kind: str) -> Run:
    """Embedding, recurrent layer, Linear, cross-entropy, clipping by norm, Adam."""
    import tinygrad_seq as tgs
    from tinygrad_seq import nn

    B, T, E, H, V = TEXT
    ids = np.random.default_rng(0).integers(0, V, (T + 1, B))
    layer = {"lstm": nn.LSTM, "gru": nn.GRU}[kind](E, H)
    model = nn.Sequential(nn.Embedding(V, E), layer, nn.Linear(H, V))
    parameters = list(model.parameters())
    optimizer = tgs.optim.Adam(parameters, 1e-3)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(ids[:-1]), ids[1:]).backward()
        tgs.optim.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step


def text_torch(kind: str) -> Run:
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    B, T, E, H, V = TEXT
    ids = torch.tensor(np.random.default_rng(0).integers(0, V, (T + 1, B)))
    embedding, head = torch.nn.Embedding(V, E), torch.nn.Linear(H, V)
    layer = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[kind](E, H)
    parameters = [*embedding.parameters(), *layer.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, 1e-3)

    def step() -> None:
        optimizer.zero_grad()
        logits = head(layer(embedding(ids[:-1]))[0]).reshape(T * B, V)
        loss = torch.nn.functional.cross_entropy(logits, ids[1:].reshape(-1))
        loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step


def lengths_of(skewed: bool) -> np.ndarray:
    """As many of each length, or, as in collections of text, of each order of magnitude."""
    rng = np.random.default_rng(0)
    if not skewed:
        return rng.integers(SHORTEST, LONGEST + 1, COUNT)
    drawn = np.exp(rng.uniform(np.log(SHORTEST), np.log(LONGEST), COUNT))
    return np.rint(drawn).astype(int)


def rows_there(skewed: bool) -> str:
    """How many rows batches in the order of the sequences have, and how many of them are there."""
    lengths = lengths_of(skewed)
    batches = lengths.reshape(-1, MIDDLE[0])
    padded = int((batches.max(axis=1) * MIDDLE[0]).sum())
    return f"{padded} rows with padding, {lengths.sum()} without ({padded / lengths.sum():.2f})"


def epoch(with_lengths: bool, bucketed: bool, skewed: bool = False) -> Run:
    """Training on all sequences once, an LSTM with a loss at each step."""
    import tinygrad_seq as tgs
    from tinygrad_seq import data, nn

    B, _, I, H = MIDDLE
    rng = np.random.default_rng(0)
    lengths = lengths_of(skewed)
    sequences = [rng.standard_normal((n, I), "f4") for n in lengths]
    targets = [rng.integers(0, 10, n) for n in lengths]
    pool = 20 if bucketed else 1
    batches = data.Buckets(sequences, targets, batch_size=B, per_step=True, pool=pool, rng=0)
    given = [(tgs.tensor(x), y, n) for x, y, n in batches]
    layer, head = nn.LSTM(I, H), nn.Linear(H, 10)
    optimizer = tgs.optim.SGD([*layer.parameters(), *head.parameters()], 0.01)

    def step() -> None:
        for x, y, n in given:
            optimizer.zero_grad()
            mask = data.mask_of(n, len(y))
            ys, _ = layer(x, lengths=n if with_lengths else None)
            nn.functional.cross_entropy(head(ys), y, mask=mask).backward()
            optimizer.step()

    return step


PROGRAMS: dict[str, Callable[[], Run]] = {
    "plain": cell,
    "options": lambda: cell(**OPTIONS),
    "text, GRU": lambda: text_here("gru"),
    "text, GRU, torch": lambda: text_torch("gru"),
    "text, LSTM": lambda: text_here("lstm"),
    "text, LSTM, torch": lambda: text_torch("lstm"),
    "padded, whole": lambda: epoch(False, False),
    "padded, lengths": lambda: epoch(True, False),
    "bucketed": lambda: epoch(True, True),
    "skewed, whole": lambda: epoch(False, False, True),
    "skewed, lengths": lambda: epoch(True, False, True),
    "skewed, bucketed": lambda: epoch(True, True, True),
}
PAIRS = [  # one, another, the bar for the ratio of their times, whether it is a least
    ("options", "plain", 1.6, False),
    ("text, GRU, torch", "text, GRU", 3.0, True),
    ("text, LSTM, torch", "text, LSTM", 1.3, True),
    ("padded, whole", "padded, lengths", 1.7, True),
    ("padded, whole", "bucketed", 2.0, True),
    ("skewed, whole", "skewed, lengths", 1.7, True),
    ("skewed, whole", "skewed, bucketed", 2.0, True),
]


def stepping() -> list[str]:
    """One character at a time: embedding looked up, LSTM with H = 256 and its Linear."""
    from tinygrad_seq import nn
    from tinygrad_seq.generation import ModelSteps

    _, _, E, H, V = TEXT
    model = nn.Sequential(nn.Embedding(V, E), nn.LSTM(E, H), nn.Linear(H, V))
    run, times = ModelSteps(model, np.zeros(1, int)), []
    for k in range(3000):
        ids = np.array([k % V])
        before = perf_counter()
        run(ids)
        times.append(perf_counter() - before)
    return [
        f"One character at a time, LSTM H = {H} and Linear to {V}, B = 1: "
        f"{median(times) * 1e6:.0f} µs a step (bar 60).",
        "",
    ]


def characters(table: list[str]) -> list[str]:
    """How many characters a second the programs of text train on."""
    found = []
    for row in table:
        one, ms, other, other_ms, *_ = row.strip("| ").split(" | ")
        found += [
            (name, t) for name, t in ((one, ms), (other, other_ms)) if name.startswith("text")
        ]
    per_second = [f"{name} {TEXT[0] * TEXT[1] / float(ms):.0f}" for name, ms in found]
    return ["", f"Thousands of characters a second: {'; '.join(per_second)}."]


def main() -> None:
    if len(sys.argv) > 2 and sys.argv[1] == "--worker":
        answer(PROGRAMS, sys.argv[2])
        return
    lines = stepping()
    print(lines[0], flush=True)
    B, T, I, H = MIDDLE
    lines += [
        f"Options: {', '.join(OPTIONS)}, B = {B}, T = {T}, I = {I}, H = {H}, a training step. Text:"
        f" B = {TEXT[0]}, T = {TEXT[1]}, embedding {TEXT[2]}, H = {TEXT[3]}, {TEXT[4]} symbols, a "
        f"whole step with clipping and Adam. Lengths: {COUNT} sequences of {SHORTEST} to {LONGEST} "
        f"steps in batches of {B}, once through all, as many of each length: {rows_there(False)}; "
        f"skewed: as many of each order of magnitude: {rows_there(True)}.",
        "",
    ]
    table = pairs(__file__, PAIRS)
    parts = [*heading("What sequence work costs"), "", *lines, *table, *characters(table)]
    path = Path(__file__).parent / "results/sequences.md"
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
