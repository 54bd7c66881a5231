"""A cell of one's own, from its equations to compiled code: checked, looked at, timed, trained.

    python examples/own_cell.py

The cell is the sLSTM of Beck et al. 2024 (xLSTM). From the sums Z, I, F, O = W x + U h + b it makes

    z = tanh(Z)          candidate
    i = exp(I)           the candidate's weight, which may outweigh all that memory holds
    f = σ(F)             how much memory keeps
    c' = f * c + i * z   candidates so far, weighted
    n' = f * n + i       their weights
    h' = σ(O) * c' / n'  so that h' is a weighted mean, gated

c and n would overflow. Both are therefore kept divided by exp(m), m' = max(log f + m, I) being the
logarithm of the largest weight among them; h' stays what it was. So the state has four parts.

Read this file beside what it prints. ``--full`` prints plan and kernel whole.
"""

from __future__ import annotations

import argparse
import inspect
import textwrap
import time
from statistics import median
from typing import Any

import numpy as np

import tinygrad_seq as tgs
from tinygrad_seq import data, nn, optim

State = tuple[tgs.Tensor, tgs.Tensor, tgs.Tensor, tgs.Tensor]


class SLSTMCell(nn.Module):
    """x (B, inputs), state (h, c, n, m), each (B, hidden); y = h."""

    def __init__(self, inputs: int, hidden: int, dtype: str = "float32", rng: Any = None) -> None:
        self.sums = nn.Gate(
            inputs, hidden, bias=False, count=4, activation="linear", dtype=dtype, rng=rng
        )
        self.bias = nn.parameter(np.repeat([0.0, 0.0, 3.0, 0.0], hidden), dtype)  # F: memory keeps

    def initial_state(self, batch_size: int) -> State:
        zero = tgs.zeros(batch_size, self.sums.hidden_size, dtype=self.bias.dtype)
        return zero, zero, zero, zero

    def forward(self, x: tgs.Tensor, state: State) -> tuple[tgs.Tensor, State]:
        h, c, n, m = state
        Z, I, F, O = tgs.split(self.sums(x, h) + self.bias, 4, axis=-1)
        log_f = -tgs.softplus(-F)
        new_m = tgs.maximum(log_f + m, I)
        f, i = tgs.exp(log_f + m - new_m), tgs.exp(I - new_m)
        c = f * c + i * tgs.tanh(Z)
        n = f * n + i
        h = tgs.sigmoid(O) * c / n
        return h, (h, c, n, new_m)


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}")


def check() -> float:
    """The largest relative difference between a parameter's gradient and central differences."""
    heading("2. Its gradient beside central differences, in float64")
    rng = np.random.default_rng(0)
    cell = SLSTMCell(3, 4, "float64", rng)
    xs = rng.standard_normal((6, 2, 3))  # (T, B, inputs)
    state = tuple(rng.uniform(0.5, 1.0, (2, 4)) for _ in range(4))
    print("inputs and state:", tgs.gradcheck(lambda x, s: tgs.scan(cell, x, s), (xs, state)))

    def loss() -> Any:
        return (tgs.scan(cell, xs, state)[0] ** 2).sum()

    # A step ε v away in a random direction v, the loss changes by ε times gradient · v.
    loss().backward()
    print(f"{'parameter':18} {'shape':>8} {'differences':>15} {'backward':>15} {'relative':>9}")
    worst, ε = 0.0, 1e-6
    for name, parameter in cell.named_parameters():
        start, v = parameter.numpy().copy(), rng.standard_normal(parameter.shape)
        found = float((np.asarray(parameter.grad) * v).sum())
        parameter.data = start + ε * v
        above = loss().item()
        parameter.data = start - ε * v
        expected = (above - loss().item()) / (2 * ε)
        parameter.data = start
        error = abs(found - expected) / abs(expected)
        print(f"{name:18} {parameter.shape!s:>8} {expected:15.9f} {found:15.9f} {error:9.0e}")
        worst = max(worst, error)
    return worst


def tape() -> None:
    heading("3. One step on the tape, line by line")
    cell, x = SLSTMCell(3, 4), tgs.randn(2, 3)
    state = tuple(tgs.rand(2, 4) for _ in range(4))
    weights = {"W": cell.sums.weight_ih, "U": cell.sums.weight_hh, "b": cell.bias}
    with tgs.Tape(x=x, **weights, **dict(zip("hcnm", state, strict=True))) as tape:
        cell(x, state)
    print(tape)


def plan(full: bool) -> None:
    heading("4. What tgs.scan makes of it: the plan")
    text = str(tgs.explain(SLSTMCell(3, 4), tgs.randn(6, 2, 3)))
    forward, backward, kept = (text.index(f"\n{k}") for k in ("forward:", "backward:", "kept at"))
    step = "a step: the tape above, in numbers of its own (--full)"
    way_back = "backward: in the same manner (--full)"
    short = text[: text.index("\n")], step + text[forward:backward], way_back + text[kept:]
    print(text if full else "\n".join(short))


def kernel(full: bool) -> None:
    heading("5. The kernel that is compiled from it")
    source = tgs.kernel_source(SLSTMCell(3, 4), tgs.randn(6, 2, 3))
    print(source.path)
    lines = source.text.splitlines()
    heart = next(k for k, line in enumerate(lines) if line.lstrip().startswith("for j in range("))
    print(f"{len(lines)} lines; from line {heart + 1} on, the loop over the units of one row:\n")
    short = textwrap.dedent("\n".join(lines[heart : heart + 31])) + "\n    ... (--full)"
    print(source.text if full else short)


class Classifier(nn.Module):
    """A cell over a sequence (T, B, 6), and four classes from its last output."""

    def __init__(self, cell: nn.Module, hidden: int, backend: str = "scan") -> None:
        self.layer = nn.Recurrent([cell], output="last", backend=backend)
        self.head = nn.Linear(hidden, 4, rng=2)

    def forward(self, x: tgs.Tensor) -> Any:
        return self.head(self.layer(x)[0])


def drawn(count: int, steps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two symbols among others, one early, one in the middle: which, in this order?"""
    x, classes = data.temporal_order(count, steps, rng=seed)
    return np.eye(6, dtype=np.float32)[x], classes


def speed(steps: int, repeats: int) -> dict[str, tuple[float, float]]:
    """For this cell and an LSTM, in both ways: median ms of a training step, loss of the last."""
    heading(f"6. A training step: {steps} time steps, a batch of 32, 64 hidden units")
    x, classes = drawn(32, steps, 0)
    models = {
        "this cell, tgs.scan": Classifier(SLSTMCell(6, 64, rng=1), 64),
        "this cell, tgs.unroll": Classifier(SLSTMCell(6, 64, rng=1), 64, "tape"),
        "nn.LSTMCell, tgs.scan": Classifier(nn.LSTMCell(6, 64, rng=1), 64),
        "nn.LSTMCell, tgs.unroll": Classifier(nn.LSTMCell(6, 64, rng=1), 64, "tape"),
    }
    optimizers = {name: optim.Adam(m.parameters(), lr=0.01) for name, m in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    losses = {}
    for _ in range(repeats + 1):  # the first is not counted: it compiles
        for name, model in models.items():  # in turns, so that all have the same conditions
            begun = time.perf_counter()
            loss = nn.functional.cross_entropy(model(tgs.tensor(x)), tgs.tensor(classes))
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
            times[name].append(1000 * (time.perf_counter() - begun))
            losses[name] = loss.item()
    medians = {name: median(measured[1:]) for name, measured in times.items()}
    print(f"{'':26}{'median ms':>10}{'parameters':>12}{'loss of the last':>18}")
    for name, model in models.items():
        count = sum(parameter.size for parameter in model.parameters())
        print(f"{name:26}{medians[name]:10.1f}{count:12}{losses[name]:18.6f}")
    print("scan and unroll take the same steps: losses are the same, but for rounding that grows.")
    return {name: (medians[name], losses[name]) for name in models}


def learning(steps: int, epochs: int) -> dict[str, float]:
    heading(f"7. Does it learn? Two symbols and their order, {steps} steps")
    print("By chance one in four are right, by counting alone three in four.")
    shares = {}
    for name, cell in {
        "this cell": SLSTMCell(6, 24, rng=1),
        "LSTM": nn.LSTMCell(6, 24, rng=1),
    }.items():
        model = Classifier(cell, 24)
        optimizer = optim.Adam(model.parameters(), lr=0.01)
        batches = data.Batches(*drawn(1000, steps, 1), batch_size=25, axis=(1, 0), rng=0)
        loss = nn.functional.cross_entropy
        tgs.train.fit(model, batches, loss, optimizer, epochs=epochs, clip_norm=1.0)
        x, classes = drawn(500, steps, 2)
        found = tgs.train.predict(model, x).numpy().argmax(axis=-1)
        shares[name] = float((found == classes).mean())
        print(f"{name}: {shares[name]:.3f} of 500 new ones are right")
    return shares


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="A cell of one's own.")
    parser.add_argument("--steps", type=int, default=60, help="length of the sequences")
    parser.add_argument("--repeats", type=int, default=15, help="how many steps to time")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--full", action="store_true", help="print plan and kernel whole")
    given = parser.parse_args(arguments)
    if min(given.repeats, given.epochs) < 1 or given.steps < 10:
        parser.error("--repeats and --epochs are 1 or more, --steps 10 or more")
    tgs.manual_seed(0)
    heading("1. The cell")
    print(textwrap.dedent(inspect.getsource(SLSTMCell.forward)), end="")
    result: dict[str, Any] = {"gradient error": check()}
    tape()
    plan(given.full)
    kernel(given.full)
    result["speed"] = speed(given.steps, given.repeats)
    result["right"] = learning(given.steps, given.epochs)
    return result


if __name__ == "__main__":
    main()
