"""The four steps of training, open to view, beside ``train.fit``.

    python examples/four_steps.py

A small LSTM learns to continue a sum of two sines. The loop below is all there is to training:

    1  take a batch
    2  forward, to the loss
    3  backward, to the gradient of the loss with respect to every weight
    4  update: w ← w − η ∂L/∂w, here with Adam's refinements

``tgs.train.fit`` is the same loop with a progress bar, validation and early stopping around it.
Both start from the same weights and see the same batches, so they must end at the same loss.
"""

from __future__ import annotations

import argparse

import numpy as np

import tinygrad_seq as tgs
from tinygrad_seq import data, nn, optim


class Continue(nn.Module):
    """Reads a series (T, B, 1) and predicts each next value (T, B, 1)."""

    def __init__(self, hidden_size: int, rng: int) -> None:
        self.lstm = nn.LSTM(1, hidden_size, rng=rng)
        self.head = nn.Linear(hidden_size, 1, rng=rng)

    def forward(self, x: tgs.Tensor) -> tgs.Tensor:
        ys, _ = self.lstm(x)
        return self.head(ys)


def batches() -> data.Batches:
    """Windows of 24 steps and the same one step later, steps first: (24, 16, 1) each."""
    t = np.arange(400)
    series = (np.sin(0.3 * t) + 0.5 * np.sin(0.71 * t)).astype(np.float32)[:, None]
    inputs, _ = data.windows(series[:-1], 24)
    targets, _ = data.windows(series[1:], 24)
    return data.Batches(inputs.swapaxes(0, 1), targets.swapaxes(0, 1), batch_size=16, axis=1, rng=0)


def by_hand(epochs: int) -> list[float]:
    model = Continue(16, rng=0)
    optimizer = optim.Adam(model.parameters(), lr=0.01)
    examples, losses = batches(), []
    for epoch in range(epochs):
        total = 0.0
        for inputs, targets in examples:  # 1: take a batch
            prediction = model(tgs.tensor(inputs))  # 2: forward ...
            loss = nn.functional.mse_loss(prediction, tgs.tensor(targets))  # ... to the loss
            optimizer.zero_grad()  # gradients add up unless they are cleared
            loss.backward()  # 3: backward
            optimizer.step()  # 4: update
            total += loss.item() * targets.size
        losses.append(total / examples.arrays[1].size)
        print(f"epoch {epoch}: loss {losses[-1]:.5f}")
    return losses


def with_fit(epochs: int) -> list[float]:
    model = Continue(16, rng=0)
    optimizer = optim.Adam(model.parameters(), lr=0.01)
    history = tgs.train.fit(model, batches(), nn.functional.mse_loss, optimizer, epochs=epochs)
    return history.loss


def main(arguments: list[str] | None = None) -> tuple[list[float], list[float]]:
    parser = argparse.ArgumentParser(description="Train with an open loop, and with fit.")
    parser.add_argument("--epochs", type=int, default=10)
    epochs = parser.parse_args(arguments).epochs
    if epochs < 1:
        parser.error("--epochs is 1 or more")
    print("the four steps, by hand:")
    ours = by_hand(epochs)
    print("the same with tgs.train.fit:")
    theirs = with_fit(epochs)
    print(f"last loss by hand {ours[-1]:.5f}, with fit {theirs[-1]:.5f}")
    return ours, theirs


if __name__ == "__main__":
    main()
