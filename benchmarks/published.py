"""Published results on long range, run again: tables in benchmarks/results/published.md.

    python benchmarks/published.py --parts adding copy order --minutes 10

Three parts, each with ``--minutes`` of its own, or with as many ``--updates`` as are given:

    adding  the adding problem: tanh RNN, IRNN, LSTM, GRU (Le, Jaitly and Hinton 2015)
    copy    copy memory: an LSTM with forget bias 1 and one with chrono (Tallec and Ollivier 2018)
    order   temporal order: a tanh RNN with its gradient's norm clipped, and without (Pascanu,
            Mikolov and Bengio 2013)

The networks of a part take turns, so that all have had as many updates when the time is over; with
``--updates`` the numbers depend on the seeds alone. Who has solved the task stops, and so does a
network whose loss is not finite. What comes out is written as it is, with the loss along the way;
parts that are not run stay in the file as they were.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from report import heading

import tinygrad_seq as tgs
from tinygrad_seq import data, nn, optim

Batch = tuple[np.ndarray, np.ndarray]
QUOTED = (
    'Settings and outcomes under "Published" are quoted from memory of the papers, '
    "which were not at hand."
)
TURN = 25  # updates before the next network's turn
MEAN = 100  # updates that a loss is averaged over
POINTS = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)  # where along the way it is shown


class Variant(NamedTuple):
    """One row of a table: a layer and how it is trained."""

    layer: Callable[..., Any]
    options: Callable[[int], dict[str, Any]]  # of the layer, at a number of steps
    optimizer: Callable[[Any], optim.Optimizer]
    clip: float  # of the gradient's norm


class Part(NamedTuple):
    title: str
    paper: str
    settings: str
    inputs: int
    outputs: int
    draw: Callable[[int, int, np.random.Generator], Batch]  # batch size, steps
    loss: Callable[[tgs.Tensor, np.ndarray], tgs.Tensor]  # of the outputs (T, B, O) and targets
    baseline: Callable[[int], float]  # the loss of who knows nothing
    solved: float  # of the baseline: a mean loss below that is a solution
    variants: dict[str, Variant]
    steps: tuple[int, ...]
    hidden: int
    batch: int
    seeds: int


def _adding(count: int, steps: int, rng: np.random.Generator) -> Batch:
    return data.adding_problem(count, steps, rng=rng)


def _copy(count: int, delay: int, rng: np.random.Generator) -> Batch:
    symbols, targets = data.copy_memory(count, delay, rng=rng)
    return np.eye(10, dtype=np.float32)[symbols], targets


def _order(count: int, steps: int, rng: np.random.Generator) -> Batch:
    symbols, classes = data.temporal_order(count, steps, rng=rng)
    return np.eye(6, dtype=np.float32)[symbols], classes


def _nothing(steps: int) -> dict[str, Any]:
    return {}


def _adam(lr: float) -> Callable[[Any], optim.Optimizer]:
    return lambda parameters: optim.Adam(parameters, lr)


def _sgd(lr: float) -> Callable[[Any], optim.Optimizer]:
    return lambda parameters: optim.SGD(parameters, lr)


def _rmsprop(lr: float) -> Callable[[Any], optim.Optimizer]:
    return lambda parameters: optim.RMSprop(parameters, lr, alpha=0.9)


RELU = {"nonlinearity": "relu", "recurrent": "identity"}
PARTS = {
    "adding": Part(
        title="The adding problem",
        paper="Le, Jaitly and Hinton 2015 (arXiv 1504.00941): T = 150, 200, 300, 400, "
        "100 units, SGD with clipping, batches of 16. A tanh RNN struggles from T = 150 on; LSTM "
        "and IRNN solve all four, T = 400 with difficulty. The GRU is not in the paper. A constant "
        "1 has a mean squared error of 1/6 = 0.1667.",
        settings="Adam, learning rate 0.005, norm clipped to 1. RNN and gates start orthogonal, "
        "the IRNN at the identity, its input weights as Glorot has it (in the paper Gaussian, 0.001"
        " wide). LSTM with forget bias 1.",
        inputs=2,
        outputs=1,
        draw=_adding,
        loss=lambda outputs, y: nn.functional.mse_loss(outputs[-1], tgs.tensor(y)),
        baseline=lambda steps: 1 / 6,
        solved=0.06,
        variants={
            "RNN, tanh": Variant(nn.RNN, _nothing, _adam(0.005), 1.0),
            "IRNN": Variant(nn.RNN, lambda steps: RELU, _adam(0.005), 1.0),
            "LSTM": Variant(nn.LSTM, _nothing, _adam(0.005), 1.0),
            "GRU": Variant(nn.GRU, _nothing, _adam(0.005), 1.0),
        },
        steps=(100, 200, 300, 400),
        hidden=32,
        batch=20,
        seeds=2,
    ),
    "copy": Part(
        title="Copy memory",
        paper="Tallec and Ollivier 2018 (arXiv 1804.11188): an LSTM of 128 units, T = "
        "500 and 2000, RMSprop, learning rate 0.001. With forget gates started by chrono it learns "
        "far sooner than with a forget bias of 1. Without memory the cross-entropy is 10 ln 8 / "
        "(T + 20), 0.1733 at T = 100 (Arjovsky, Shah and Bengio 2016).",
        settings="RMSprop, learning rate 0.001, α = 0.9, norm clipped to 1; chrono with 3 T / 2.",
        inputs=10,
        outputs=9,
        draw=_copy,
        loss=nn.functional.cross_entropy,
        baseline=lambda steps: 10 * np.log(8) / (steps + 20),
        solved=0.05,
        variants={
            "LSTM, forget bias 1": Variant(nn.LSTM, _nothing, _rmsprop(0.001), 1.0),
            "LSTM, chrono": Variant(
                nn.LSTM, lambda steps: {"chrono": 3 * steps // 2}, _rmsprop(0.001), 1.0
            ),
        },
        steps=(100, 500),
        hidden=64,
        batch=16,
        seeds=1,
    ),
    "order": Part(
        title="Temporal order",
        paper="Pascanu, Mikolov and Bengio 2013 (arXiv 1211.5063): a tanh RNN of 50 "
        "units, SGD, T from 50 to 250, five runs each. Plain SGD fails as T grows, with the norm "
        "clipped more runs succeed, and with their regulariser beside it all up to T = 200. Who "
        "knows nothing has a cross-entropy of ln 4 = 1.3863.",
        settings="SGD, recurrent weights started orthogonal.",
        inputs=6,
        outputs=4,
        draw=_order,
        loss=lambda outputs, y: nn.functional.cross_entropy(outputs[-1], y),
        baseline=lambda steps: float(np.log(4)),
        solved=0.03,
        variants={
            "clipped to 1, rate 0.1": Variant(nn.RNN, _nothing, _sgd(0.1), 1.0),
            "not clipped, rate 0.1": Variant(nn.RNN, _nothing, _sgd(0.1), np.inf),
            "clipped to 1, rate 0.01": Variant(nn.RNN, _nothing, _sgd(0.01), 1.0),
            "not clipped, rate 0.01": Variant(nn.RNN, _nothing, _sgd(0.01), np.inf),
        },
        steps=(20, 50, 100),
        hidden=50,
        batch=20,
        seeds=3,
    ),
}


class Run:
    """One network in training."""

    def __init__(self, part: Part, variant: Variant, steps: int, seed: int) -> None:
        self.part, self.variant, self.steps = part, variant, steps
        self.layer = variant.layer(part.inputs, part.hidden, rng=seed, **variant.options(steps))
        self.head = nn.Linear(part.hidden, part.outputs, rng=seed + 1000)
        self.parameters = [*self.layer.parameters(), *self.head.parameters()]
        self.optimizer = variant.optimizer(self.parameters)
        self.rng = np.random.default_rng(seed)
        self.losses: list[float] = []
        self.milliseconds: list[float] = []  # an update, on average over each turn
        self.solved = self.broken = False

    def go_on(self, updates: int) -> None:
        """So many updates more, unless it has come to an end."""
        start, before = perf_counter(), len(self.losses)
        while len(self.losses) < before + updates and not self.solved and not self.broken:
            self._update()
        if done := len(self.losses) - before:
            self.milliseconds.append(1000 * (perf_counter() - start) / done)

    def _update(self) -> None:
        x, y = self.part.draw(self.part.batch, self.steps, self.rng)
        ys, _ = self.layer(tgs.tensor(x))
        loss = self.part.loss(self.head(ys), y)
        self.losses.append(loss.item())
        self.optimizer.zero_grad()
        loss.backward()
        norm = float(optim.clip_grad_norm_(self.parameters, self.variant.clip))
        self.broken = not np.isfinite([self.losses[-1], norm]).all()
        if not self.broken:
            self.optimizer.step()
        bound = self.part.solved * self.part.baseline(self.steps)
        self.solved = len(self.losses) >= MEAN and self.loss_after(len(self.losses)) < bound

    def loss_after(self, updates: int) -> float:
        """The mean loss of the updates before this one; the last known if it ended earlier."""
        last = min(updates, len(self.losses))
        return float(np.mean(self.losses[max(0, last - MEAN) : last]))


Runs = dict[tuple[int, str], list[Run]]  # steps and variant: one for each seed


def train(part: Part, minutes: float, updates: int | None) -> tuple[Runs, int]:
    """All networks of a part in turns; the networks, and the updates that were given to each."""
    runs = {
        (steps, name): [Run(part, variant, steps, seed) for seed in range(part.seeds)]
        for steps in part.steps
        for name, variant in part.variants.items()
    }
    everyone = [run for each in runs.values() for run in each]
    start, done = perf_counter(), 0
    while updates is None or done < updates:
        turn = TURN if updates is None else min(TURN, updates - done)
        for run in everyone:
            run.go_on(turn)
        done += turn
        left = [run for run in everyone if not run.solved and not run.broken]
        passed = (perf_counter() - start) / 60
        print(f"\r{part.title}: {done} updates, {passed:.1f} minutes, {len(left)} left", end="")
        if not left or (updates is None and passed >= minutes):
            break
    print()
    return runs, done


def _median(values: Iterable[float]) -> str:
    found = list(values)
    return f"{median(found):.4f}" if found else "–"


def table(part: Part, runs: Runs, updates: int) -> list[str]:
    points = [max(1, round(updates * point)) for point in POINTS]
    lines = [
        "| T | network | " + " | ".join(f"after {p}" for p in points) + " | solved | ms |",
        "| ---: | --- " + "| ---: " * len(points) + "| --- | ---: |",
    ]
    for steps in part.steps:
        known = " | ".join([f"{part.baseline(steps):.4f}"] * len(points))
        lines.append(f"| {steps} | *knows nothing* | {known} | | |")
        for name in part.variants:
            each = runs[steps, name]
            going = [run for run in each if not run.broken]
            losses = " | ".join(_median(run.loss_after(p) for run in going) for p in points)
            ended = [len(run.losses) for run in each if run.solved]
            solved = f"{len(ended)} of {len(each)}"
            if ended:
                solved += f", after {', '.join(map(str, sorted(ended)))}"
            if broken := [len(run.losses) for run in each if run.broken]:
                solved += f"; not finite: {len(broken)}, after {', '.join(map(str, broken))}"
            took = median(ms for run in each for ms in run.milliseconds)
            lines.append(f"| {steps} | {name} | {losses} | {solved} | {took:.1f} |")
    return lines


def section(name: str, part: Part, minutes: float, updates: int | None) -> str:
    """What is known, what was done, on what machine, and the table."""
    runs, done = train(part, minutes, updates)
    lines = [f"#{line}" if line.startswith("#") else line for line in heading(part.title)]
    again = f"--parts {name} --updates {done}"
    for option in ("steps", "hidden", "batch", "seeds"):
        if (value := getattr(part, option)) != getattr(PARTS[name], option):
            again += f" --{option} {' '.join(map(str, value)) if option == 'steps' else value}"
    whose = "those of seed 0"
    if part.seeds > 1:
        whose = f"medians over {part.seeds} seeds, from 0 on, without those not finite"
    lines += [
        "",
        f"Published: {part.paper}",
        "",
        f"Here: {part.hidden} units, {part.batch} new sequences an update. {part.settings}",
        "",
        f"Losses are {whose}, each the mean of the last {MEAN} updates. Solved: that mean is "
        f"below {part.solved:.0%} of the loss of who knows nothing; such a network stops, and its "
        f"loss stays. ms are those of an update, threads: {tgs.get_num_threads()}. "
        f"`{again}` does the same again.",
        "",
        *table(part, runs, done),
    ]
    return "\n".join(lines)


def write(path: Path, sections: dict[str, str]) -> None:
    """Put sections in the place of those with the same title, and leave the others."""
    found = path.read_text(encoding="utf-8").split("\n## ")[1:] if path.exists() else []
    for part in PARTS.values():
        if part.title not in sections:
            for text in found:
                if text.startswith(f"{part.title}, "):
                    sections[part.title] = f"## {text.rstrip()}"
    ordered = [sections[part.title] for part in PARTS.values() if part.title in sections]
    text = "\n\n".join(["# Published results on long range", QUOTED, *ordered])
    path.write_text(f"{text}\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> dict[str, str]:
    """The section of each part that was run, by title."""
    parser = argparse.ArgumentParser(description="Run published experiments again.")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=10.0, help="for each part")
    parser.add_argument("--updates", type=int, help="for each network, in place of --minutes")
    parser.add_argument("--steps", type=int, nargs="+", help="sequence lengths, for all parts")
    parser.add_argument("--hidden", type=int, help="units, for all parts")
    parser.add_argument("--batch", type=int, help="sequences in an update, for all parts")
    parser.add_argument("--seeds", type=int, help="how many, for all parts")
    parser.add_argument("--threads", type=int, help="1 where other programs run beside it")
    path = Path(__file__).parent / "results" / "published.md"
    parser.add_argument("--output", type=Path, default=path)
    given = parser.parse_args(arguments)
    if given.threads is not None:
        tgs.set_num_threads(given.threads)
    changed = {k: getattr(given, k) for k in ("steps", "hidden", "batch", "seeds")}
    changed = {k: v for k, v in changed.items() if v is not None}
    sections: dict[str, str] = {}
    for name in given.parts:
        part = PARTS[name]._replace(**changed)
        sections[part.title] = section(name, part, given.minutes, given.updates)
        print(sections[part.title], flush=True)
        write(given.output, dict(sections))
    print(f"wrote {given.output}")
    return sections


if __name__ == "__main__":
    main()
