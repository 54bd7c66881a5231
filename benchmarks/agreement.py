"""Layers against PyTorch's, float64: ``python benchmarks/agreement.py``.

Prints the largest difference of outputs, last states and gradients (inputs, initial states, all
parameters), relative to the largest value, for stacked and bidirectional layers. The GRU is
PyTorch's with the update gate the other way round. Exits with 1 if one is above 1e-9.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

import tinygrad_seq as tgs
from tinygrad_seq import nn

LIMIT = 1e-9
CASES = [(3, 2, 4, 5), (1, 1, 1, 1), (20, 7, 3, 6), (100, 3, 8, 16)]  # T B I H


def copy_parameters(ours: Any, theirs: Any, reset_after: bool) -> None:
    """Give PyTorch's layer the weights of ours; bias_hh is zero unless we have one."""
    import torch

    suffixes = [
        f"l{layer}{'_reverse' if d else ''}"
        for layer in range(ours.num_layers)
        for d in range(ours.directions)
    ]
    for cell, suffix in zip(ours.cells, suffixes, strict=True):
        H = cell.hidden_size
        values = {
            "weight_ih": np.array(cell.weight_ih),
            "weight_hh": np.array(cell.weight_hh),
            "bias_ih": np.array(cell.bias),
            "bias_hh": np.array(cell.bias_hh) if reset_after else 0 * np.array(cell.bias),
        }
        for name, value in values.items():
            if reset_after:  # sigmoid(-a) = 1 - sigmoid(a)
                value[H : 2 * H] *= -1
            getattr(theirs, f"{name}_{suffix}").data = torch.tensor(value)


def compare(kind: str, shape: tuple[int, int, int, int], layers: int, both: bool) -> float:
    """The largest relative difference in one case."""
    import torch

    T, B, I, H = shape
    rng = np.random.default_rng(sum(shape))
    options: dict[str, Any] = {"num_layers": layers, "bidirectional": both}
    gru = kind == "GRU"
    more = {"reset_after": True} if gru else {}
    ours = getattr(nn, kind)(I, H, dtype="float64", rng=rng, **options, **more)
    for p in ours.parameters():
        p.data = rng.standard_normal(p.shape) * 0.5
    theirs = getattr(torch.nn, kind)(I, H, dtype=torch.float64, **options)
    copy_parameters(ours, theirs, gru)
    count = 2 if kind == "LSTM" else 1
    x = rng.standard_normal((T, B, I))
    states = rng.standard_normal((count, len(ours.cells), B, H))
    g = rng.standard_normal((T, B, H * ours.directions))
    gs = rng.standard_normal(states.shape)

    x1 = tgs.tensor(x, requires_grad=True)
    s1 = [tgs.tensor(s, requires_grad=True) for s in states]
    y1, end1 = ours(x1, tuple(s1) if count == 2 else s1[0])
    ends1 = list(end1) if count == 2 else [end1]
    loss1 = (y1 * g).sum()
    for end, weight in zip(ends1, gs, strict=True):
        loss1 = loss1 + (end * weight).sum()
    loss1.backward()

    x2 = torch.tensor(x, requires_grad=True)
    s2 = [torch.tensor(s, requires_grad=True) for s in states]
    y2, end2 = theirs(x2, tuple(s2) if count == 2 else s2[0])
    ends2 = list(end2) if count == 2 else [end2]
    loss2 = (y2 * torch.tensor(g)).sum()
    for end, weight in zip(ends2, gs, strict=True):
        loss2 = loss2 + (end * torch.tensor(weight)).sum()
    loss2.backward()

    pairs = [(y1, y2.detach()), (x1.grad, x2.grad)]
    pairs += [(a, b.detach()) for a, b in zip(ends1, ends2, strict=True)]
    pairs += [(a.grad, b.grad) for a, b in zip(s1, s2, strict=True)]
    pairs += gradient_pairs(ours, theirs, gru)
    return max(difference(np.asarray(a), np.asarray(b)) for a, b in pairs)


def gradient_pairs(ours: Any, theirs: Any, gru: bool) -> list[tuple[Any, Any]]:
    pairs = []
    names = [name for name, _ in theirs.named_parameters() if name.startswith("weight_ih")]
    for cell, name in zip(ours.cells, names, strict=True):
        suffix = name[len("weight_ih_") :]
        own = {"weight_ih": cell.weight_ih, "weight_hh": cell.weight_hh, "bias_ih": cell.bias}
        if gru:
            own["bias_hh"] = cell.bias_hh
        for part, parameter in own.items():
            gradient = np.array(getattr(theirs, f"{part}_{suffix}").grad)
            if gru:
                gradient[cell.hidden_size : 2 * cell.hidden_size] *= -1
            pairs.append((parameter.grad, gradient))
    return pairs


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / max(1.0, np.abs(b).max()))


def main() -> int:
    worst = 0.0
    for kind in ("RNN", "LSTM", "GRU"):
        for layers, both in ((1, False), (2, False), (2, True)):
            found = max(compare(kind, shape, layers, both) for shape in CASES)
            directions = "both directions" if both else "one direction"
            print(f"{kind}, {layers} layers, {directions}: largest difference {found:.1e}")
            worst = max(worst, found)
    print(f"largest of all {worst:.1e}, limit {LIMIT:.0e}")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
