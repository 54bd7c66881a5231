"""PyTorch as a second opinion, where it is installed: ``pip install torch``."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from importlib import import_module
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import tinygrad_seq as tgs
from tinygrad_seq import optim

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
torch = pytest.importorskip(
    "torch", reason="PyTorch is not installed; it is an optional second opinion"
)
agreement = runpy.run_path(str(BENCHMARKS / "agreement.py"))
sys.path.append(str(BENCHMARKS))  # where its modules find one another
cells_on_gpu, recurrent = import_module("cells_on_gpu"), import_module("recurrent")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, about NumPy 2
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_layers_agree(kind, both):
    for shape in ((4, 3, 2, 5), (1, 1, 1, 1), (9, 2, 3, 4)):
        assert agreement["compare"](kind, shape, 2, both) < 1e-9


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_weights_are_taken_over(capsys):
    """As docs/pytorch.md has it."""
    text = (BENCHMARKS.parent / "docs" / "pytorch.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    exec(code, {})
    assert capsys.readouterr().out == "RNN True\nLSTM True\nGRU True\n"


def test_arguments_with_other_names_are_listed():
    """Those of optimisers, schedules and clipping, in docs/pytorch.md."""
    text = (BENCHMARKS.parent / "docs" / "pytorch.md").read_text(encoding="utf-8")
    places = (torch.optim, torch.optim.lr_scheduler, torch.nn.utils)
    for name in set(optim.__all__) - {"Optimizer"}:
        theirs = next((getattr(place, name) for place in places if hasattr(place, name)), None)
        if theirs is not None:
            ours = signature(getattr(optim, name)).parameters
            for argument in set(ours) - set(signature(theirs).parameters):
                assert f"`{argument}=`" in text, (name, argument)


# Cells of one's own, each written once and run in both ------------------------------------------


def leaky(m, p, x, state):
    h = 0.7 * state[0] + 0.3 * m.tanh(x @ p.W + state[0] @ p.U + p.b)
    return h, (h,)


def update_gate(m, p, x, state):
    """Collins et al. 2017."""
    g, n = m.split(x @ p.W + state[0] @ p.U + p.b, 2)
    g = m.sigmoid(g)
    h = g * state[0] + (1 - g) * m.tanh(n)
    return h, (h,)


def fast_and_slow(m, p, x, state):
    a, s = state
    a = m.tanh(x @ p.W + a @ p.U + s @ p.V + p.b)
    s = 0.9 * s + 0.1 * a * a
    return a - s, (a, s)


def in_turn(m, p, x, state):
    """Linear in the state: products that do not commute, chosen by the input."""
    g = m.sigmoid(x @ p.W)
    h = g * (state[0] @ p.U @ p.V) + (1 - g) * (state[0] @ p.V)
    return h @ p.U, (h,)


SQUARE = {"W": "(I, H)", "U": "(H, H)"}
CellOf = recurrent.CellOf
OWN = recurrent.CELLS | {
    "leaky": CellOf(leaky, 1, **SQUARE, b="(H,)"),
    "update_gate": CellOf(update_gate, 1, W="(I, 2*H)", U="(H, 2*H)", b="(2*H,)"),
    "fast_and_slow": CellOf(fast_and_slow, 2, **SQUARE, V="(H, H)", b="(H,)"),
    "in_turn": CellOf(in_turn, 1, **SQUARE, V="(H, H)"),
}


def of_torch(kind, values, lengths, reverse):
    """Outputs, last states and gradients, each row by itself to its own end."""
    import torch

    x, dy, *rest = (torch.tensor(a, requires_grad=True) for a in values["arrays"])
    states, weights = rest[: kind.states], rest[kind.states :]
    p = {k: torch.tensor(v, requires_grad=True) for k, v in values["parameters"].items()}
    m, named = cells_on_gpu.TorchFunctions(), SimpleNamespace(**p)
    ys, ends, loss = torch.zeros_like(dy), [], 0.0
    for b, length in enumerate(lengths):
        state = tuple(s[b : b + 1] for s in states)
        for t in reversed(range(length)) if reverse else range(length):
            y, state = kind.step(m, named, x[t, b : b + 1], state)
            ys.data[t, b] = y.data
            loss = loss + (y * dy[t, b].detach()).sum()
        ends.append([s.data for s in state])
        loss = loss + sum((s * w[b].detach()).sum() for s, w in zip(state, weights, strict=True))
    loss.backward()
    last = [torch.cat(each) for each in zip(*ends, strict=True)]
    found = [ys.data, *last, x.grad, *(s.grad for s in states), *(v.grad for v in p.values())]
    return [each.numpy() for each in found]


def of_scan(kind, values, lengths, reverse, checkpoint):
    x, dy, *rest = (tgs.tensor(a, requires_grad=True) for a in values["arrays"])
    states, weights = tuple(rest[: kind.states]), rest[kind.states :]
    p = {k: tgs.tensor(v, requires_grad=True) for k, v in values["parameters"].items()}
    m, named = recurrent.functions(), SimpleNamespace(**p)

    def cell(x, state):
        return kind.step(m, named, x, state)

    ys, last = tgs.scan(cell, x, states, lengths=lengths, reverse=reverse, checkpoint=checkpoint)
    loss = (ys * dy.detach()).sum()
    for s, w in zip(last, weights, strict=True):
        loss = loss + (s * w.detach()).sum()
    loss.backward()
    found = [ys.detach(), *(s.detach() for s in last), x.grad]
    found += [*(s.grad for s in states), *(v.grad for v in p.values())]
    return [each.numpy() for each in found]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", OWN)
def test_cells_agree(name, dtype):
    kind, tolerance = OWN[name], 1e-4 if dtype == "float32" else 1e-11
    cases = [
        ((5, 3, 2, 7), [5, 0, 3], False, None),
        ((5, 3, 2, 7), [2, 5, 4], True, 2),
        ((3, 1, 1, 1), [3], False, None),
    ]
    for (T, B, I, H), lengths, reverse, checkpoint in cases:
        H = H if kind.state == "(B, H)" else 32  # or it is divided into heads or places
        rng = np.random.default_rng(0)
        states = kind.first(tuple, B, H)
        shapes = [(T, B, I), (T, B, H), *states, *states]
        values = {
            "arrays": [rng.standard_normal(shape).astype(dtype) for shape in shapes],
            "parameters": {k: v.astype(dtype) for k, v in kind.parameters(I, H).items()},
        }
        found = of_scan(kind, values, lengths, reverse, checkpoint)
        for a, b in zip(found, of_torch(kind, values, lengths, reverse), strict=True):
            np.testing.assert_allclose(a, b, atol=tolerance * max(1, abs(b).max()), rtol=0)


def test_a_small_operation_costs_no_more():
    """The better of three runs: one may meet a busy machine."""
    for _ in range(3):
        command = [sys.executable, str(BENCHMARKS / "eager.py")]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        ratios = [float(line.split()[-1]) for line in out.splitlines()]
        assert len(ratios) == 2
        if min(ratios) >= 1:
            return
    raise AssertionError(out)
