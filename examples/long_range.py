"""How far back can a network learn from? Two tasks that ask for memory, and the gradient's size.

    python examples/long_range.py

The adding problem marks two of T numbers and asks for their sum, copy memory shows ten symbols and
asks for them after a delay. Batches are made as they are used: nothing is seen twice, and the loss
in training is that on new examples. A table shows it, beside what is reached without memory, for

    RNN           h' = tanh(W x + U h + b)
    IRNN          the same with ReLU, U started at the identity (Le, Jaitly and Hinton 2015)
    LSTM          gates, memory c' = f * c + i * g, with a forget bias of 1
    LSTM, chrono  its gates started for memories as long as the task (Tallec and Ollivier 2018)
    GRU           gates, h' = (1 − z) * h + z * n

The picture shows why: the size of ∂L/∂h_t, or of ∂L/∂(h, c)_t, at each step t. Where it shrinks by
a factor at every step back, what stood there long ago has no say in the update. Before training
that is so of all but those which start with a memory; after it, of those that have learned nothing.
(A GRU starts no better than an RNN, but it has gates to close: it learns from the nearest marks
first, and the gradient then reaches further.) Where it grows by a factor, one update throws away
what many have learned: an RNN started with 1.5 times its weights U is to say in which order two
symbols came among 20, with the gradient's norm clipped to 1 and without (Pascanu, Mikolov, Bengio
2013).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import tinygrad_seq as tgs
from tinygrad_seq import data, nn, optim

LAYERS: dict[str, Callable[..., Any]] = {  # of inputs, units and steps
    "RNN": lambda I, H, T: nn.RNN(I, H),
    "IRNN": lambda I, H, T: nn.RNN(I, H, nonlinearity="relu", recurrent="identity"),
    "LSTM": lambda I, H, T: nn.LSTM(I, H),
    "LSTM, chrono": lambda I, H, T: nn.LSTM(I, H, chrono=T),
    "GRU": lambda I, H, T: nn.GRU(I, H),
}


def adding(model: Any, count: int, steps: int, rng: np.random.Generator) -> tgs.Tensor:
    x, sums = data.adding_problem(count, steps, rng=rng)
    return nn.functional.mse_loss(model(x)[-1], sums)


def copy(model: Any, count: int, delay: int, rng: np.random.Generator) -> tgs.Tensor:
    x, targets = data.copy_memory(count, delay, rng=rng)
    return nn.functional.cross_entropy(model(np.eye(10, dtype=np.float32)[x]), targets)


def order(model: Any, count: int, steps: int, rng: np.random.Generator) -> tgs.Tensor:
    x, classes = data.temporal_order(count, steps, rng=rng)
    return nn.functional.cross_entropy(model(np.eye(6, dtype=np.float32)[x])[-1], classes)


TASKS: dict[str, tuple[Any, int, int, Any]] = {  # loss, inputs, outputs, loss without memory
    "adding": (adding, 2, 1, lambda steps: 1 / 6),
    "order": (order, 6, 4, lambda steps: np.log(4)),
    "copy": (copy, 10, 9, lambda delay: 10 * np.log(8) / (delay + 20)),
}


class Trial:
    """A network and a task, so many steps long."""

    def __init__(self, name: str, task: str, steps: int, given: argparse.Namespace) -> None:
        tgs.manual_seed(given.seed)
        self.of_batch, inputs, outputs, _ = TASKS[task]
        self.layer = LAYERS[name](inputs, given.hidden, steps)
        self.head = nn.Linear(given.hidden, outputs)
        self.parameters = [*self.layer.parameters(), *self.head.parameters()]
        self.draw = (given.batch, steps, np.random.default_rng(given.seed))

    def model(self, x: np.ndarray) -> Any:
        ys, _ = self.layer(x)
        return self.head(ys)

    def loss(self) -> Any:
        """That of a new batch."""
        return self.of_batch(self.model, *self.draw)

    def train(self, method: Any, lr: float, clip: float, updates: int) -> list[float]:
        """The loss at each update."""
        optimizer, losses = method(self.parameters, lr=lr), []
        for _ in range(updates):
            loss = self.loss()
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optim.clip_grad_norm_(self.parameters, clip)
            optimizer.step()
        return losses

    def flow(self) -> np.ndarray:
        """The norm of the gradient for the state after each step, (T,), in parts of the last."""
        (found,) = tgs.gradient_flow(self.loss)
        norms = np.linalg.norm(list(found.states.values()), axis=0)
        return np.asarray(norms / norms[-1])


def with_large_weights(factor: float, given: argparse.Namespace) -> Trial:
    """An RNN whose recurrent weights start larger than they should."""
    trial = Trial("RNN", "order", 20, given)
    weight = trial.layer.cells[0].weight_hh
    weight.data = factor * weight.data
    return trial


def picture(curves: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print('no picture: pip install "tinygrad-seq[examples]" for matplotlib')
        return
    from tinygrad_seq.drawing import draw_gradients

    figure = Figure(figsize=(15, 4.2), dpi=110, layout="constrained")
    for ax, (title, norms) in zip(figure.subplots(1, len(curves)), curves.items(), strict=True):
        draw_gradients(norms, title=title, ax=ax)
        ax.set_ylabel("norm of the gradient, last step = 1")
    figure.savefig(path)
    print(f"saved {path}")


def with_progress(runs: list[tuple[str, int, str]]) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        print('training (pip install "tinygrad-seq[examples]" for a progress bar)')
        return runs
    return tqdm(runs, desc="training", unit="network")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="Who learns over how many steps, and why.")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 30, 100], help="of adding")
    parser.add_argument("--delays", type=int, nargs="*", default=[5, 20], help="of copying")
    parser.add_argument("--updates", type=int, default=800, help="of each network")
    parser.add_argument("--hidden", type=int, default=32, help="units")
    parser.add_argument("--batch", type=int, default=32, help="examples in an update")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("long_range.png"))
    parser.add_argument("--no-plot", action="store_true")
    given = parser.parse_args(arguments)
    if given.updates < 1:
        parser.error("--updates is 1 or more")

    longest = max(given.steps)
    columns = [("adding", T) for T in given.steps] + [("copy", T) for T in given.delays]
    losses: dict[tuple[str, int, str], float] = {}
    before, after = {}, {}
    for task, T, name in with_progress([(*column, name) for column in columns for name in LAYERS]):
        trial = Trial(name, task, T, given)
        if (task, T) == ("adding", longest):
            before[name] = trial.flow()
        found = trial.train(optim.Adam, 0.005, 1.0, given.updates)
        losses[task, T, name] = float(np.mean(found[-50:]))
        if (task, T) == ("adding", longest):
            after[name] = trial.flow()

    print(f"mean loss of the last 50 of {given.updates} updates: of adding the squared error,")
    print("of copy the cross-entropy, in nats for each step")
    print(" " * 16 + "".join(f"{f'{task} {T}':>12}" for task, T in columns))
    print("no memory       " + "".join(f"{TASKS[task][3](T):12.4f}" for task, T in columns))
    for name in LAYERS:
        print(f"{name:16}" + "".join(f"{losses[task, T, name]:12.4f}" for task, T in columns))
    print(f"adding {longest}: the gradient at the first step, in parts of that at the last")
    for name in LAYERS:
        print(f"{name:16}{before[name][0]:12.0e} before{after[name][0]:12.0e} after training")
    exploding = {f"RNN, {f} U": with_large_weights(f, given).flow() for f in (1.0, 1.5, 2.0, 3.0)}
    clipped, free = (
        with_large_weights(1.5, given).train(optim.SGD, 0.3, clip, given.updates)
        for clip in (1.0, np.inf)
    )
    print("order 20: the same, for an RNN whose recurrent weights U start larger")
    for name, flow in exploding.items():
        print(f"{name:16}{flow[0]:12.0e} before")
    print(f"RNN, 1.5 U: a loss of {np.log(4):.4f} nats becomes", end=" ")
    print(f"{np.mean(clipped[-50:]):.4f} with clipping, {np.mean(free[-50:]):.4f} without")
    if not given.no_plot:
        curves = {f"adding {longest}, untrained": before, f"after {given.updates} updates": after}
        picture({**curves, "order 20, untrained": exploding}, given.output)
    flows = {"before": before, "after": after, "exploding": exploding}
    return {"losses": losses, "clipping": (clipped, free), **flows}


if __name__ == "__main__":
    main()
