"""Which model can do what sequences ask for: any length, order, long range. A table.

    python examples/who_can_do_what.py

Three things are asked of a model of sequences, and each has a task:

    (1) any length    is the sum positive? 10 to 30 numbers in training, then also 31 to 60
    (2) order         which of two symbols came first? They may stand anywhere among 30 steps
    (3) long range    two symbols, each X or Y, one early and one in the middle: which were they,
                      in this order? Of 20 steps, then of 60; all others mean nothing

Eight models of about as many parameters learn them from the same examples:

    memoryless        o_t = g(x_t), a hidden layer over each step alone; its last output
    dense, padded     a hidden layer over the whole sequence, filled up with zeros to the longest
    dense, window     the same over 5 steps, moved along the sequence; all windows have a vote
    convolution       two layers, windows of 3, so that it sees 5 steps too; a mean over all places
    dilated           five layers whose windows see 1, 2, 4, 8 and 16 steps apart, in all 63 steps
    RNN, LSTM, GRU    a step after another

Then it prints what is usually said of these models, and where something else was found, that too.
LSTM and GRU start with gates for memories as long as the task (``chrono``). ``--no-chrono`` starts
them as usual: then neither was done with the 60 steps in this time (0.75 and 0.26 were right),
though with three other seeds both were.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import numpy as np

import tinygrad_seq as tgs
from tinygrad_seq import data, nn, optim

Make = Callable[[int, int, int, int], nn.Sequential]
Examples = tuple[np.ndarray, np.ndarray, np.ndarray]  # inputs (T, B, I), classes (B,), lengths (B,)


# Models, from I inputs to C classes; T is the longest sequence to train on ----------------------


def flat(x: tgs.Tensor, lengths: Any) -> tgs.Tensor:
    return tgs.permute_dims(x, (1, 0, 2)).reshape(x.shape[1], -1)


def channels(x: tgs.Tensor) -> tgs.Tensor:
    """(T, B, I) to (B, I, T), as convolutions take it."""
    return tgs.permute_dims(x, (1, 2, 0))


def last_place(x: tgs.Tensor, lengths: Any) -> tgs.Tensor:
    return x[np.arange(len(lengths)), :, lengths - 1]


def last_step(x: tgs.Tensor, lengths: Any) -> tgs.Tensor:
    return x[lengths - 1, np.arange(len(lengths))]


def memoryless(I: int, C: int, width: int, T: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(I, width), tgs.tanh, last_step, nn.Linear(width, C))


def dense(I: int, C: int, width: int, T: int) -> nn.Sequential:
    return nn.Sequential(flat, nn.Linear(T * I, width), tgs.relu, nn.Linear(width, C))


def window(I: int, C: int, width: int, T: int) -> nn.Sequential:
    """A dense network moved along a sequence is a convolution, and its head one of width 1."""
    hidden, head = nn.Conv1d(I, width, 5), nn.Conv1d(width, C, 1)
    return nn.Sequential(channels, hidden, tgs.relu, head, nn.GlobalPool1d("mean"))


def convolution(I: int, C: int, width: int, T: int) -> nn.Sequential:
    first = nn.Conv1d(I, width, 3), nn.BatchNorm1d(width), tgs.relu
    second = nn.Conv1d(width, width, 3), nn.BatchNorm1d(width), tgs.relu
    return nn.Sequential(channels, *first, *second, nn.GlobalPool1d("mean"), nn.Linear(width, C))


def dilated(I: int, C: int, width: int, T: int) -> nn.Sequential:
    """A small temporal convolutional network (Bai, Kolter and Koltun 2018): never looks ahead."""
    layers: list[Any] = []
    for k in range(5):
        size = width if layers else I
        layers += [nn.Conv1d(size, width, 3, padding="causal", dilation=2**k), tgs.relu]
    return nn.Sequential(channels, *layers, last_place, nn.Linear(width, C))


def recurrent(layer: type, chrono: bool, I: int, C: int, width: int, T: int) -> nn.Sequential:
    options = {"chrono": T} if chrono else {}
    return nn.Sequential(layer(I, width, output="last", **options), nn.Linear(width, C))


def models(chrono: bool) -> dict[str, Make]:
    return {
        "memoryless": memoryless,
        "dense, padded": dense,
        "dense, window": window,
        "convolution": convolution,
        "dilated": dilated,
        "RNN": partial(recurrent, nn.RNN, False),
        "LSTM": partial(recurrent, nn.LSTM, chrono),
        "GRU": partial(recurrent, nn.GRU, chrono),
    }


def size(model: nn.Module) -> int:
    return sum(parameter.size for parameter in model.parameters())


def widest(make: Make, I: int, C: int, T: int, parameters: int) -> nn.Sequential:
    """The widest model of no more parameters than these."""
    wider = (width for width in itertools.count(1) if size(make(I, C, width, T)) > parameters)
    return make(I, C, max(1, next(wider) - 1), T)


# Tasks -----------------------------------------------------------------------------------------


class Task(NamedTuple):
    classes: int
    otherwise: float  # the share of right answers without the ability that is asked for
    tests: dict[str, Callable[[int, int], Examples]]  # the first is also what is trained on


def sums(shortest: int, longest: int, count: int, seed: int) -> Examples:
    x, total, lengths = data.sequence_sum(count, longest, shortest=shortest, rng=seed)
    return x, (total[:, 0] > 0).astype(int), lengths


def symbols(task: Callable[..., Any], kinds: int, steps: int, count: int, seed: int) -> Examples:
    x, classes = task(count, steps, rng=seed)
    return np.eye(kinds, dtype=np.float32)[x], classes, np.full(count, steps)


# In the last two, who just counts X and Y is sure of XX and YY and right in half of the others.
TASKS = {
    "sum": Task(2, 0.5, {"10-30": partial(sums, 10, 30), "31-60": partial(sums, 31, 60)}),
    "order": Task(2, 0.5, {"30": partial(symbols, data.order_of_two, 3, 30)}),
    "near": Task(4, 0.75, {"20": partial(symbols, data.temporal_order, 6, 20)}),
    "far": Task(4, 0.75, {"60": partial(symbols, data.temporal_order, 6, 60)}),
}
OTHERWISE = {column: task.otherwise for task in TASKS.values() for column in task.tests}
DECIDES = {"(1) any length": "31-60", "(2) order": "30", "(3) long range": "60"}
SAID = {  # Of dense networks also: larger, or slower to train.
    "memoryless": ("no", "no", "no"),  # it cannot learn relations in time
    "dense, padded": ("no", "yes", "yes"),
    "dense, window": ("yes", "with difficulty", "no"),
    "convolution": ("yes", "with difficulty", "hardly"),
    "dilated": ("yes", "with difficulty", "hardly"),
    "RNN": ("yes", "yes", "hardly"),
    "LSTM": ("yes", "yes", "yes"),
    "GRU": ("yes", "yes", "yes"),
}


def train(make: Make, task: Task, given: argparse.Namespace) -> tuple[nn.Sequential, float]:
    """The model, and the seconds that its training took."""
    x, classes, lengths = next(iter(task.tests.values()))(given.examples, given.seed)
    tgs.manual_seed(given.seed)
    model = widest(make, x.shape[2], task.classes, len(x), given.parameters)
    optimizer = optim.Adam(model.parameters(), lr=0.01)
    begun = time.perf_counter()
    tgs.train.fit(
        model,
        data.Batches(x, classes, lengths, batch_size=25, axis=1),
        nn.functional.cross_entropy,
        optimizer,
        epochs=given.epochs,
        clip_norm=1.0,
        schedule=optim.CosineAnnealingLR(optimizer, given.epochs),
        progress=False,  # there is one bar for all
    )
    return model, time.perf_counter() - begun


def accuracy(model: nn.Sequential, examples: Examples) -> float:
    """The share of right answers; NaN if the model does not take sequences of that length."""
    x, classes, lengths = examples
    try:
        logits = tgs.train.predict(model, x, lengths)
    except tgs.ShapeError:
        return math.nan
    return float((logits.numpy().argmax(axis=-1) == classes).mean())


# What came of it -------------------------------------------------------------------------------


def verdict(share: float, otherwise: float) -> str:
    """In words, how far a share of right answers is on the way from ``otherwise`` to 1."""
    gained = (share - otherwise) / (1 - otherwise)
    return "yes" if gained > 0.75 else "with difficulty" if gained > 0.25 else "hardly"


def table(
    scores: dict[str, dict[str, float]], seconds: dict[str, float], sizes: dict[str, list[int]]
) -> None:
    print("\nshare of right answers to sequences that are new; parameters, of the smallest and the")
    print("largest of a model's networks, one for each task; seconds of training, for all together")
    print(" " * 35 + "(1) sum positive?  (2) order  (3) both, in order")
    print("steps".ljust(15) + "  parameters seconds" + "".join(f"{c:>8}" for c in OTHERWISE))
    print(
        "without the ability".ljust(35) + "".join(f"{share:8.2f}" for share in OTHERWISE.values())
    )
    for name, row in scores.items():
        cells = (row.get(column, math.nan) for column in OTHERWISE)
        shown = "".join("       -" if math.isnan(share) else f"{share:8.2f}" for share in cells)
        count = f"{min(sizes[name])}-{max(sizes[name])}"
        print(f"{name:15}{count:>12}{seconds[name]:8.1f}{shown}")


def compare(scores: dict[str, dict[str, float]]) -> list[str]:
    """Print what is said of each model, and what was found where that is something else."""
    print("\nwhat is said, and -> what was found where it differs")
    print(" " * 15 + "".join(ability.ljust(27) for ability in DECIDES).rstrip())
    contradicted = []
    for name, said in SAID.items():
        cells = []
        for (ability, column), word in zip(DECIDES.items(), said, strict=True):
            if column in scores[name]:
                share = scores[name][column]
                found = "no" if math.isnan(share) else verdict(share, OTHERWISE[column])
                if found != word and not {found, word} <= {"no", "hardly"}:
                    contradicted.append(f"{name} {ability}")
                    word = f"{word} -> {found}"
            cells.append(word.ljust(27))
        print(name.ljust(15) + "".join(cells).rstrip())
    return contradicted


def progress(runs: list[Any]) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        print('training (pip install "tinygrad-seq[examples]" for a progress bar)')
        return runs
    return tqdm(runs, desc="training", unit="model")


def main(arguments: list[str] | None = None) -> tuple[dict[str, dict[str, float]], list[str]]:
    parser = argparse.ArgumentParser(
        description="Compare models of sequences.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--examples", type=int, default=1200, help="to learn each task from")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--parameters", type=int, default=2000, help="at most, of each model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--chrono",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="start the gates of LSTM and GRU for memories as long as the task",
    )
    given = parser.parse_args(arguments)
    if min(given.examples, given.epochs) < 1:
        parser.error("--examples and --epochs are 1 or more")
    made = models(given.chrono)
    scores: dict[str, dict[str, float]] = {name: {} for name in made}
    seconds = dict.fromkeys(made, 0.0)
    sizes: dict[str, list[int]] = {name: [] for name in made}
    for task, name in progress(list(itertools.product(given.tasks, made))):
        model, time_taken = train(made[name], TASKS[task], given)
        seconds[name] += time_taken
        sizes[name].append(size(model))
        for column, draw in TASKS[task].tests.items():
            scores[name][column] = accuracy(model, draw(1000, given.seed + 1))
    table(scores, seconds, sizes)
    contradicted = compare(scores)
    others = median(seconds[name] for name in made if name != "dense, padded")
    print(
        "Of the padded dense network it is also said that it must be larger, or is slower to train."
        f"\nHere it is no larger, and took {seconds['dense, padded']:.1f} s; the others, in the "
        f"median, {others:.1f} s."
    )
    return scores, contradicted


if __name__ == "__main__":
    main()
