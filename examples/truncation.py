"""The price of truncated backpropagation through time: what lies too far back is not learned.

    python examples/truncation.py

A stream of symbols, and two signs. One says "remember the symbol that stands here", the other, d
steps later, "which was it?". Symbols of the same kinds stand between them, from all of which the
one must be kept. The same LSTM learns this for several d, each time from the same batches:

    whole        the error goes back through all 64 steps; one update a batch
    k2 < k1      the 64 steps in pieces of k2, between which the error stops; one update a batch
    k2 >= k1     an update every k1 steps, for which the error goes back k2 steps

The state is carried through all 64 steps in each of them: what happened is there to be used, but
only as far as the error goes back is it learned what to keep. The table has the part of the answers
that are right, on streams never seen; 0.25 is chance. In brackets stands for how many questions the
error comes back to the symbol. Pieces are cut at fixed places, so that two steps that are d apart
lie in one piece only if the later one is among its last k2 - d.

What was measured, with seeds 0 to 2:

- Of the models trained on one d, 0.25 to 0.48 of the answers are right where the brackets say 0 %,
  and 0.93 to 1.00 everywhere else. To reach half of the questions is enough, for what is learned
  there serves the others. What is above chance at 0 % is what an LSTM keeps without having learned
  to.
- Against the expectation: one model trained on all d together, in pieces of 8 steps, answers 0.98
  or more for d = 16 too, which its error never reached. Keeping a symbol is learned where that is
  near, and is the same thing further on. Truncation costs what is to be found only far away.
- Truncation saves no time here. The whole sequence is the fastest, since each piece has costs of
  its own. It is for streams that do not end, or do not fit into memory.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import tinygrad_seq as tgs
from tinygrad_seq import nn, optim

T, SYMBOLS = 64, 4


class Setting(NamedTuple):
    k1: int  # steps for each update
    k2: int  # steps that the error goes back
    together: bool = False  # one model for all distances

    def __str__(self) -> str:
        name = "whole" if self == WHOLE else f"k1 = {self.k1}, k2 = {self.k2}"
        return name + (", all d" if self.together else "")

    def reached(self, distance: int) -> float:
        """The part of the questions whose error comes back to the symbol they ask for."""
        asked = np.arange(distance, T)
        block = asked // self.k1 * self.k1  # where the block begins
        pieces = block + (asked - block) // self.k2 * self.k2
        first = pieces if self.k2 < self.k1 else block + self.k1 - self.k2
        return float((first <= asked - distance).mean())


WHOLE = Setting(T, T)
SETTINGS = [
    *(Setting(T, 4), Setting(T, 8), Setting(T, 16), Setting(T, 32), WHOLE),
    *(Setting(16, 16), Setting(16, 32)),
]
TOGETHER = Setting(T, 8, together=True)
Stream = tuple[np.ndarray, np.ndarray]
Found = dict[Setting, dict[int, float]]  # accuracy by setting and distance


def stream(distances: list[int], rows: int, rng: np.random.Generator) -> Stream:
    """Inputs (T, B, 6), a symbol and two signs; targets (T, B), -1 where nothing is asked.

    Each row has one of the distances, and a place of its own to begin at.
    """
    symbols, d = rng.integers(0, SYMBOLS, (T, rows)), rng.choice(distances, rows)
    steps = np.arange(T)[:, None]
    place = (steps - rng.integers(0, d + 1)) % (d + 1)
    signs = np.stack([place == 0, place == d], axis=-1)
    inputs = np.concatenate([np.eye(SYMBOLS)[symbols], signs], axis=-1)
    before = np.take_along_axis(symbols, np.maximum(steps - d, 0), axis=0)
    targets = np.where((place == d) & (steps >= d), before, -1)
    return inputs.astype(np.float32), targets


def loss(prediction: tgs.Tensor, targets: tgs.Tensor) -> tgs.Tensor:
    """The cross-entropy where something is asked and 0 elsewhere, as a mean over all steps.

    Over all, so that an update for few questions does not count as much as one for many.
    """
    asked = np.asarray(targets) >= 0
    return nn.functional.cross_entropy(prediction, targets, mask=asked) * float(asked.mean())


def train(batches: list[Stream], setting: Setting, seed: int) -> nn.Sequential:
    model = nn.Sequential(nn.LSTM(SYMBOLS + 2, 32, rng=seed), nn.Linear(32, SYMBOLS, rng=seed))
    optimizer = optim.Adam(model.parameters(), lr=0.02)
    tbptt = None if setting == WHOLE else (setting.k1, setting.k2)
    tgs.train.fit(
        model, batches, loss, optimizer, epochs=1, tbptt=tbptt, clip_norm=1.0, progress=False
    )
    return model


def accuracy(model: nn.Sequential, inputs: np.ndarray, targets: np.ndarray) -> float:
    answers = tgs.train.predict(model, inputs).numpy().argmax(axis=-1)
    return float((answers == targets)[targets >= 0].mean())


def progress(runs: list[Any]) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        print('training (pip install "tinygrad-seq[examples]" for a progress bar)')
        return runs
    return tqdm(runs, desc="training", unit="model")


def table(found: Found, seconds: dict[Setting, float]) -> None:
    header = "".join(f"{f'd = {d}':>14}" for d in found[WHOLE])
    print("part of answers right".ljust(24) + header + f"{'time':>10}")
    for setting, row in found.items():
        cells = (f"{right:.2f} ({setting.reached(d):4.0%})" for d, right in row.items())
        time = f"{seconds[setting]:8.1f} s"
        print(str(setting).ljust(24) + "".join(f"{cell:>14}" for cell in cells) + time)
    print(f"({1 / SYMBOLS} is chance; in brackets for how many questions the error reaches the")
    print("symbol; the time is that of all models of a row, one for each d, or one for all d)")


def picture(found: Found, path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print('no picture: pip install "tinygrad-seq[examples]" for matplotlib')
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    values = np.array([list(row.values()) for row in found.values()])
    figure, axis = plt.subplots(figsize=(5, 5), layout="constrained")
    axis.imshow(values, vmin=1 / SYMBOLS, vmax=1, cmap="Blues", aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if value > 0.65 else "black"
        axis.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour)
    axis.set_yticks(range(len(found)), list(map(str, found)))
    axis.set_xticks(range(values.shape[1]), [f"d = {d}" for d in found[WHOLE]])
    axis.set_title(f"part of answers right, {1 / SYMBOLS} is chance", loc="left")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"saved {path}")


def main(arguments: list[str] | None = None) -> dict[str, dict[int, float]]:
    parser = argparse.ArgumentParser(
        description="What truncated backpropagation through time learns, and what not.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--distances", type=int, nargs="+", default=[4, 8, 16], metavar="D")
    parser.add_argument("--batches", type=int, default=70)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-plot", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("truncation.png"))
    given = parser.parse_args(arguments)
    if given.batches < 1 or not all(0 < d < T for d in given.distances):
        parser.error(f"--batches is 1 or more, --distances are from 1 to {T - 1}")
    runs = [(setting, [d]) for d in given.distances for setting in SETTINGS]
    runs.append((TOGETHER, given.distances))
    found: Found = {setting: {} for setting in [*SETTINGS, TOGETHER]}
    seconds = dict.fromkeys(found, 0.0)
    for setting, distances in progress(runs):
        rng = np.random.default_rng(given.seed)
        batches = [stream(distances, 128, rng) for _ in range(given.batches)]
        start = time.perf_counter()
        model = train(batches, setting, given.seed)
        seconds[setting] += time.perf_counter() - start
        for d in distances:
            found[setting][d] = accuracy(model, *stream([d], 512, rng))
    table(found, seconds)
    if not given.no_plot:
        picture(found, given.output)
    return {str(setting): row for setting, row in found.items()}


if __name__ == "__main__":
    main()
