"""A memory that is a matrix: what goes with what, told once and asked for afterwards.

    python examples/matrix_memory.py

n pairs of a key and a value come one after another, chosen anew for each sequence, then the keys
alone, in another order; each is to be answered with its value. An LSTM and a GRU have a vector as
memory, in which they must find a place for each pair. The third cell has a matrix S (d, d):

    k, v, q = W x                    what to write under, what to write, what to read
    S' = S + β (v − S k) kᵀ          what k gave is replaced by v, β = σ(w x) of it
    y = S' q

This is the delta rule (Widrow and Hoff 1960) as a recurrent cell (Schlag, Irie and Schmidhuber
2021, arXiv 2102.11174); ``--rule sum`` leaves S k out, as fast weights and linear attention do. k
and q have length 1, so that S k gives back what was written under k, if the keys of the others are
at right angles to it: up to d of them can be. It is written below as it stands here, on values
(B, d, d), and ``tgs.scan`` compiles it.

What was measured, with seeds 0 to 2, after 600 updates: the matrix gives 0.91 to 1.00 of the
answers, the LSTM 0.18 to 0.35 with seven times its parameters, the GRU 0.19 to 0.34; 0.06 is
chance. Against the expectation, the sum is as good (0.79 to 1.00): among 32 directions 16 keys
find room, and none is told twice.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import tinygrad_seq as tgs
from tinygrad_seq import nn, optim

SYMBOLS, MEMORY, HIDDEN = 16, 32, 64


class MatrixMemory(nn.Module):
    """x (B, inputs), a state S (B, size, size), y (B, size), in the dtype of the parameters."""

    def __init__(self, inputs: int, size: int, rule: str = "delta", rng: Any = None) -> None:
        self.size, self.rule = size, rule
        self.project = nn.Linear(inputs, 3 * size, bias=False, rng=rng)
        self.rate = nn.Linear(inputs, 1, rng=rng)

    def initial_state(self, batch_size: int) -> tgs.Tensor:
        return tgs.zeros(batch_size, self.size, self.size, dtype=self.rate.weight.dtype)

    def forward(self, x: tgs.Tensor, S: tgs.Tensor) -> tuple[tgs.Tensor, tgs.Tensor]:
        k, v, q = tgs.split(self.project(x), 3, axis=-1)
        k, q = (z / tgs.sqrt(tgs.sum(z * z, axis=-1, keepdims=True) + 1e-6) for z in (k, q))
        if self.rule == "delta":
            v = v - (S @ k[:, :, None])[:, :, 0]
        S = S + (tgs.sigmoid(self.rate(x)) * v)[:, :, None] * k[:, None, :]
        return (S @ q[:, :, None])[:, :, 0], S


def batch(pairs: int, rows: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (2 n, B, 2 symbols), a key and its value or none; targets (2 n, B), -1 for none."""
    keys = rng.permuted(np.tile(np.arange(SYMBOLS), (rows, 1)), axis=1).T[:pairs]
    values = rng.integers(0, SYMBOLS, (pairs, rows))
    order = rng.permuted(np.tile(np.arange(pairs), (rows, 1)), axis=1).T
    asked, answers = (np.take_along_axis(each, order, axis=0) for each in (keys, values))
    one_hot = np.eye(SYMBOLS, dtype=np.float32)
    told = np.concatenate([one_hot[keys], one_hot[values]], axis=-1)
    questions = np.concatenate([one_hot[asked], np.zeros_like(one_hot[asked])], axis=-1)
    targets = np.concatenate([np.full((pairs, rows), -1), answers])
    return np.concatenate([told, questions]), targets


def loss(prediction: tgs.Tensor, targets: tgs.Tensor) -> tgs.Tensor:
    return nn.functional.cross_entropy(prediction, targets, mask=np.asarray(targets) >= 0)


def accuracy(model: nn.Sequential, inputs: np.ndarray, targets: np.ndarray) -> float:
    answers = tgs.train.predict(model, inputs).numpy().argmax(axis=-1)
    return float((answers == targets)[targets >= 0].mean())


def networks(rule: str, seed: int) -> dict[str, Callable[[], nn.Sequential]]:
    inputs = 2 * SYMBOLS

    def with_output(layer: nn.Module, size: int) -> nn.Sequential:
        return nn.Sequential(layer, nn.Linear(size, SYMBOLS, rng=seed))

    return {
        "LSTM": lambda: with_output(nn.LSTM(inputs, HIDDEN, rng=seed), HIDDEN),
        "GRU": lambda: with_output(nn.GRU(inputs, HIDDEN, rng=seed), HIDDEN),
        f"matrix, {rule}": lambda: with_output(
            nn.Recurrent([MatrixMemory(inputs, MEMORY, rule, rng=seed)]), MEMORY
        ),
    }


def train(model: nn.Sequential, pairs: int, updates: int, seed: int) -> list[float]:
    """Losses of all updates."""
    rng, losses = np.random.default_rng(seed), []
    optimizer = optim.Adam(model.parameters(), lr=0.01)
    for _ in range(updates):
        inputs, targets = batch(pairs, 32, rng)
        model.zero_grad()
        value = loss(model(inputs), tgs.tensor(targets))
        value.backward()
        optim.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(value.item())
    return losses


def progress(runs: list[Any]) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        print('training (pip install "tinygrad-seq[examples]" for a progress bar)')
        return runs
    return tqdm(runs, desc="training", unit="model")


def picture(losses: dict[tuple[str, int], list[float]], path: Path) -> None:
    """Losses over updates, a panel for each number of pairs."""
    try:
        import matplotlib
    except ImportError:
        print('no picture: pip install "tinygrad-seq[examples]" for matplotlib')
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    counts = list(dict.fromkeys(pairs for _, pairs in losses))
    size = (3 * len(counts) + 1, 3)
    figure, axes = plt.subplots(
        1, len(counts), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for axis, pairs in zip(axes[0], counts, strict=True):
        for (name, n), values in losses.items():
            if n == pairs:
                width = min(20, len(values))
                mean = np.convolve(values, np.full(width, 1 / width), mode="valid")
                axis.plot(np.arange(len(mean)) + width, mean, label=name)
        axis.axhline(np.log(SYMBOLS), color="grey", linewidth=0.8, linestyle=":")
        axis.set_title(f"{pairs} pairs", loc="left")
        axis.set_xlabel("updates")
    axes[0, 0].set_ylabel("cross-entropy (dotted: chance)")
    axes[0, -1].legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"saved {path}")


def main(arguments: list[str] | None = None) -> dict[str, dict[int, float]]:
    parser = argparse.ArgumentParser(
        description="Vectors and a matrix as memory of what goes with what.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--pairs", type=int, nargs="+", default=[4, 8, 16], metavar="N")
    parser.add_argument("--updates", type=int, default=600)
    parser.add_argument("--rule", choices=["delta", "sum"], default="delta")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-plot", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("matrix_memory.png"))
    given = parser.parse_args(arguments)
    if given.updates < 1 or not all(0 < n <= SYMBOLS for n in given.pairs):
        parser.error(f"--updates is 1 or more, --pairs are from 1 to {SYMBOLS}")
    made = networks(given.rule, given.seed)
    found: dict[str, dict[int, float]] = {name: {} for name in made}
    losses: dict[tuple[str, int], list[float]] = {}
    seconds, sizes = dict.fromkeys(made, 0.0), dict.fromkeys(made, 0)
    for name, n in progress([(name, n) for n in given.pairs for name in made]):
        model, start = made[name](), time.perf_counter()
        losses[name, n] = train(model, n, given.updates, given.seed)
        seconds[name] += time.perf_counter() - start
        sizes[name] = sum(parameter.size for parameter in model.parameters())
        found[name][n] = accuracy(model, *batch(n, 512, np.random.default_rng(given.seed + 1)))
    print(f"{'answers right':16}{'parameters':>12}", end="")
    print("".join(f"{f'{n} pairs':>10}" for n in given.pairs) + f"{'time':>10}")
    for name, row in found.items():
        cells = "".join(f"{right:10.2f}" for right in row.values())
        print(f"{name:16}{sizes[name]:12,}{cells}{seconds[name]:8.1f} s")
    print(f"({1 / SYMBOLS:.2f} is chance)")
    if not given.no_plot:
        picture(losses, given.output)
    return found


if __name__ == "__main__":
    main()
