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
symbols came among 20, with the gradient's norm clipped to 1 (Pascanu, Mikolov, Bengio 2013), with
each of its elements held between ±0.1, and without either.

A second picture, *_gates.png, has one example of the longest sums: its marks, the forget gates of
the trained LSTM that was started with long memories, which are open all the way, and the gradient
that comes back through them, beside that of the trained RNN, which has no gates.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
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


Clip = Callable[[list[Any]], Any]
CLIPPING: dict[str, Clip] = {
    "norm": partial(optim.clip_grad_norm_, max_norm=1.0),
    "each element": partial(optim.clip_grad_value_, limit=0.1),
    "nothing": lambda parameters: None,
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

    def train(self, method: Any, lr: float, clip: Clip, updates: int) -> list[float]:
        """The loss at each update."""
        optimizer, losses = method(self.parameters, lr=lr), []
        for _ in range(updates):
            loss = self.loss()
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            clip(self.parameters)
            optimizer.step()
        return losses

    def flow(self, of_model: Callable[[Any], Any] | None = None) -> np.ndarray:
        """The norm of a loss's gradient for the state after each step, (T,), in parts of the last.

        ``of_model(model)`` is the loss; unless given, that of a new batch.
        """
        loss = self.loss if of_model is None else partial(of_model, self.model)
        (found,) = tgs.gradient_flow(loss)
        norms = np.linalg.norm(list(found.states.values()), axis=0)
        return np.asarray(norms / norms[-1])


def forget_gates(cell: nn.LSTMCell, x: np.ndarray) -> np.ndarray:
    """From (T, 1, I), those of each step, (T, H)."""

    def opened(x: Any, state: Any) -> Any:
        _, forget, _, _ = tgs.split(tgs.sigmoid(cell.sums(x, state[0])), 4, axis=-1)
        return forget, cell(x, state)[1]

    with tgs.no_grad():
        gates, _ = tgs.scan(opened, x, cell.initial_state(1))
    found: np.ndarray = gates.numpy()[:, 0]
    return found


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


def picture_of_gates(trials: dict[str, Trial], T: int, path: Path) -> None:
    """One example: what is marked, what is kept, and the gradient with gates and without."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    from tinygrad_seq.drawing import draw_gradients

    x, _ = data.adding_problem(1, T, rng=0)
    gates = forget_gates(trials["LSTM, chrono"].layer.cells[0], x)
    norms = {
        name: trials[name].flow(lambda model: model(x)[-1].sum())
        for name in ("RNN", "LSTM, chrono")
    }
    figure = Figure(figsize=(8.5, 7), dpi=110, layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(0.6, 1.6, 2.2))
    top.step(np.arange(T), x[:, 0, 1], where="mid", color="black")
    top.set(title=f"adding {T}: the two numbers that are marked", yticks=(0, 1))
    shown = middle.imshow(gates.T, aspect="auto", vmin=0, vmax=1, interpolation="nearest")
    middle.set(title="forget gates of the trained LSTM, chrono: 1 keeps all", ylabel="unit")
    figure.colorbar(shown, ax=middle, pad=0.01)
    draw_gradients(norms, title="the gradient of the answer, by step", ax=bottom)
    bottom.set_ylabel("norm of the gradient, last step = 1")
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
    before, after, trials = {}, {}, {}
    for task, T, name in with_progress([(*column, name) for column in columns for name in LAYERS]):
        trial = Trial(name, task, T, given)
        if (task, T) == ("adding", longest):
            before[name] = trial.flow()
        found = trial.train(optim.Adam, 0.005, CLIPPING["norm"], given.updates)
        losses[task, T, name] = float(np.mean(found[-50:]))
        if (task, T) == ("adding", longest):
            after[name], trials[name] = trial.flow(), trial

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
    runs = {
        name: with_large_weights(1.5, given).train(optim.SGD, 0.3, clip, given.updates)
        for name, clip in CLIPPING.items()
    }
    print("order 20: the same, for an RNN whose recurrent weights U start larger")
    for name, flow in exploding.items():
        print(f"{name:16}{flow[0]:12.0e} before")
    ends = (f"{np.mean(run[-50:]):.4f} ({name})" for name, run in runs.items())
    print(
        f"RNN, 1.5 U: a loss of {np.log(4):.4f} nats becomes, by what is clipped,", ", ".join(ends)
    )
    if not given.no_plot:
        curves = {f"adding {longest}, untrained": before, f"after {given.updates} updates": after}
        picture({**curves, "order 20, untrained": exploding}, given.output)
        named = given.output.with_stem(f"{given.output.stem}_gates")
        picture_of_gates(trials, longest, named)
    flows = {"before": before, "after": after, "exploding": exploding}
    return {"losses": losses, "clipping": runs, **flows}


if __name__ == "__main__":
    main()
