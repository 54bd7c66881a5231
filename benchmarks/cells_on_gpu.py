"""Recurrent layers and cells on a GPU, here, in PyTorch and in JAX, for ``gpu.py``.

The cells are those of ``recurrent.py``, written once and run by all three; LSTM and GRU are this
package's own and PyTorch's, the same functions: the GRU is the one with ``reset_after``. Shapes:
T steps, B rows, I = H inputs and units. Everything here takes a device, so that a test can compare
the programs on the host. Imports the package; PyTorch and JAX where they are asked for.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from recurrent import CELLS, data, functions
from recurrent import jax as in_jax

Runs = dict[str, Callable[[], Any]]
LAYERS = ("lstm", "gru")
CHUNK = 8  # steps that torch.compile is given at once, or else one


# Here ----------------------------------------------------------------------------------------


def divided(division: Any) -> dict[str, int]:
    """How a layout divides a run."""
    return {
        "launches": division.launches,
        "groups": division.groups,
        "parts": division.parts,
        "rows": division.rows,
        "streamed": len(division.streamed),
        "by steps": division.by_steps,
    }


def layer_cell(name: str, H: int) -> Any:
    """The package's own LSTM or GRU cell, the same one every time, in float32 on the host."""
    from tinygrad_seq import nn

    rng = np.random.default_rng(1)
    return nn.LSTMCell(H, H, rng=rng) if name == "lstm" else nn.GRUCell(H, H, True, True, rng=rng)


class Ours:
    """A cell of this package, its inputs, and what is to be run."""

    def __init__(
        self, name: str, row: tuple[int, int, int], device: str, dtype: str = "float32"
    ) -> None:
        import tinygrad_seq as tgs

        T, B, H = row
        self.tgs, self.device = tgs, device
        x, dy = (tgs.tensor(a.astype(dtype)).to(device) for a in data(B, T, H, H))
        self.xs, self.dy = tgs.tensor(x, requires_grad=True), dy
        self.state: Any = None
        if name in LAYERS:
            cell = layer_cell(name, H).to(dtype).to(device)
            self.cell: Any = cell
            self.parameters = dict(cell.named_parameters())
            return
        kind, m = CELLS[name], functions()
        self.parameters = {
            k: tgs.tensor(tgs.tensor(v.astype(dtype)).to(device), requires_grad=True)
            for k, v in kind.parameters(H, H).items()
        }
        named = SimpleNamespace(**self.parameters)
        self.state = kind.first(lambda shape: tgs.zeros(shape, dtype=dtype).to(device), B, H)

        def step(x: Any, state: Any) -> Any:
            return kind.step(m, named, x, state)

        step.__name__ = name
        self.cell = step

    def train(self, drive: Any = None) -> Any:
        self.xs.grad = None
        for parameter in self.parameters.values():
            parameter.grad = None
        ys, _ = (drive or self.tgs.scan)(self.cell, self.xs, self.state)
        ys.backward(self.dy)
        return ys

    def infer(self) -> Any:
        with self.tgs.no_grad():
            return self.tgs.scan(self.cell, self.xs, self.state)[0]

    def runs(self) -> Runs:
        return {"train": self.train, "infer": self.infer}

    def results(self, drive: Any = None) -> dict[str, np.ndarray]:
        """Outputs and all gradients, as NumPy's arrays."""
        made: dict[str, Any] = {"y": self.train(drive), "dx": self.xs.grad}
        made |= {f"d{k}": p.grad for k, p in self.parameters.items()}
        return {k: tensor.numpy() for k, tensor in made.items()}


def layouts(clear: bool = False) -> dict[str, Any]:
    """How the runs of this process were divided: a division for each direction."""
    from tinygrad_seq.recurrence import compiled

    found = {}
    for runner in compiled._runners.values():
        for layout in getattr(runner, "_layouts", {}).values():
            if hasattr(layout, "machine"):  # that of a GPU
                found[layout.direction] = layout.division
        if clear and hasattr(runner, "_layouts"):
            runner._layouts.clear()
    return found


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference over the largest value; infinite for what is not finite."""
    error = np.abs(found.astype("f8") - expected).max(initial=0.0)
    worst = float(error / max(float(np.abs(expected).max(initial=0.0)), 1e-30))
    return worst if np.isfinite(worst) else float("inf")


def correct(name: str, row: tuple[int, int, int], device: str) -> dict[str, Any]:
    """float32 on the device by ``scan`` against float64 on the host by ``unroll``.

    ``unroll`` is NumPy on the tape, step by step: another way to the same numbers, with nothing to
    compile.
    """
    import tinygrad_seq as tgs

    begin = time.perf_counter()
    found = Ours(name, row, device).results()
    seconds = time.perf_counter() - begin
    expected = Ours(name, row, "cpu", "float64").results(tgs.unroll)
    errors = {key: difference(found[key], expected[key]) for key in expected}
    worst = max(errors, key=lambda key: errors[key])
    choices = {k: str(v) for k, v in layouts(clear=True).items()}
    found_in = {"worst": worst, "error": errors[worst], "first run s": round(seconds, 2)}
    return {**found_in, "errors": errors, "division": choices}


# In PyTorch ----------------------------------------------------------------------------------


class TorchFunctions:
    """What the cells of ``recurrent.py`` call, as PyTorch's compiler can follow it."""

    def __init__(self) -> None:
        import torch

        self.sigmoid, self.tanh, self.relu = torch.sigmoid, torch.tanh, torch.relu
        self.sqrt, self.exp, self.chunk, self.concat = torch.sqrt, torch.exp, torch.chunk, torch.cat

    def split(self, z: Any, n: int) -> Any:
        return self.chunk(z, n, -1)

    def mean(self, z: Any) -> Any:
        return z.mean(-1, keepdim=True)

    def sum(self, z: Any) -> Any:
        return z.sum(-1)


def without_tf32() -> None:
    import torch

    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


class InTorch:
    """The same cell in PyTorch: its own layer, a loop, or with ``compiler`` a loop over chunks."""

    def __init__(
        self,
        name: str,
        row: tuple[int, int, int],
        device: str,
        dtype: str = "float32",
        compiler: Callable[[Any], Any] | None = None,
        most: int = CHUNK,
    ) -> None:
        import torch

        without_tf32()
        T, B, H = row
        self.torch = torch
        x, self.dy = (torch.tensor(a.astype(dtype), device=device) for a in data(B, T, H, H))
        self.xs = x.requires_grad_()
        # Apart from one another, and in want of a gradient as later states are: PyTorch compiles
        # anew for inputs that differ in this.
        self.zeros = CELLS[name].first(
            lambda shape: torch.zeros(shape, dtype=x.dtype, device=device), B, H
        )
        for each in self.zeros if compiler else []:
            each.requires_grad_()
        self.parameters: dict[str, Any]
        if name in LAYERS:
            self._layer(name, H, device, x.dtype)
        else:
            self._loop(name, H, device, dtype, compiler, most)

    def _layer(self, name: str, H: int, device: str, dtype: Any) -> None:
        from agreement import copy_parameters

        layer = getattr(self.torch.nn, name.upper())(H, H)
        cell = layer_cell(name, H)
        ours = SimpleNamespace(num_layers=1, directions=1, cells=[cell])
        copy_parameters(ours, layer, name == "gru")
        layer = layer.to(device).to(dtype)
        self.parameters = dict(layer.named_parameters())
        self.run: Callable[[], Any] = lambda: layer(self.xs)[0]

    def _loop(self, name: str, H: int, device: str, dtype: str, compiler: Any, most: int) -> None:
        torch, kind, m = self.torch, CELLS[name], TorchFunctions()
        p = {
            k: torch.tensor(v.astype(dtype), device=device).requires_grad_()
            for k, v in kind.parameters(H, H).items()
        }
        self.parameters = p
        T = len(self.xs)
        steps = 1 if compiler is None else next(n for n in range(most, 0, -1) if T % n == 0)

        def chunk(x: Any, state: Any, p: Any) -> Any:
            named = _Named(p)
            ys = []
            for k in range(steps):
                y, state = kind.step(m, named, x[k], state)
                ys.append(y)
            return torch.stack(ys) if steps > 1 else ys[0][None], state

        each = chunk if compiler is None else compiler(chunk)

        def run() -> Any:
            recorded = torch.is_grad_enabled()
            state: Any = tuple(zero if recorded else zero.detach() for zero in self.zeros)
            ys = []
            for t in range(0, T, steps):
                y, state = each(self.xs[t : t + steps], state, p)
                ys.append(y)
            return torch.cat(ys)

        self.run = run

    def train(self) -> Any:
        for leaf in (self.xs, *self.zeros, *self.parameters.values()):
            leaf.grad = None
        ys = self.run()
        ys.backward(self.dy)
        return ys

    def infer(self) -> Any:
        with self.torch.no_grad():
            return self.run()

    def runs(self) -> Runs:
        return {"train": self.train, "infer": self.infer}

    def results(self) -> dict[str, np.ndarray]:
        """As ``Ours.results``, by our names and in our gates' order."""
        ys = self.train()
        found = {"y": ys.detach(), "dx": self.xs.grad}
        found |= {f"d{k}": p.grad for k, p in self.parameters.items()}
        arrays = {k: v.cpu().numpy() for k, v in found.items()}
        if "dweight_ih_l0" not in arrays:
            return arrays
        return _as_our_layer(arrays)


class _Named:
    """Parameters by name."""

    def __init__(self, p: dict[str, Any]) -> None:
        for name, value in p.items():
            setattr(self, name, value)


def _as_our_layer(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    found = {k: arrays[k] for k in ("y", "dx")}
    gru = 3 * found["y"].shape[-1] == len(arrays["dbias_ih_l0"])
    names = {"weight_ih": "dweight_ih", "weight_hh": "dweight_hh", "bias_ih": "dbias"}
    names |= {"bias_hh": "dbias_hh"} if gru else {}
    for theirs, own in names.items():
        value = copy.copy(arrays[f"d{theirs}_l0"])
        if gru:  # the update gate the other way round
            H = len(value) // 3
            value[H : 2 * H] *= -1
        found[own] = value
    return found


# Programs that answer ------------------------------------------------------------------------


class Answers:
    """``prepare CELL T B H`` gives what is known then, ``train`` and ``infer`` milliseconds."""

    def __init__(self, program: str) -> None:
        self.make, self.finish = PROGRAMS[program]()
        self.runs: Runs = {}

    def __call__(self, question: str) -> Any:
        from tinygrad_seq.comparing import milliseconds

        what, *more = question.split()
        if what == "prepare":
            return self._prepare(more[0], tuple(map(int, more[1:])))

        def run() -> None:
            self.runs[what]()
            self.finish()

        return milliseconds(run, 0.1)

    def _prepare(self, name: str, row: tuple[int, ...]) -> dict[str, Any]:
        self.runs = {}
        found: dict[str, Any] = {}
        begin = time.perf_counter()
        self.runs, more = self.make(name, row)
        for mode, run in self.runs.items():
            for turn in ("first", "second"):
                begin = time.perf_counter()
                run()
                self.finish()
                found[f"{turn} {mode} s"] = round(time.perf_counter() - begin, 3)
        found |= more()
        return found


def nothing() -> dict[str, Any]:
    return {}


def program_ours() -> Any:
    from gpu_measures import Device

    device = Device()

    def division() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for direction, division in layouts().items():
            found[direction] = {
                **divided(division),
                "shared_bytes": division.shared_bytes,
                "clocks": round(division.clocks),
                "text": str(division),
            }
        return found

    def make(name: str, row: Any) -> Any:
        layouts(clear=True)
        return Ours(name, row, "cuda").runs(), division

    return make, device.finish


def program_torch() -> Any:
    import torch

    def make(name: str, row: Any) -> Any:
        return InTorch(name, row, "cuda").runs(), nothing

    return make, torch.cuda.synchronize


def program_compile(most: int = CHUNK) -> Any:
    import torch

    def make(name: str, row: Any) -> Any:
        torch._dynamo.reset()
        compiler = torch.compile(dynamic=False, fullgraph=True)
        return InTorch(name, row, "cuda", compiler=compiler, most=most).runs(), nothing

    return make, torch.cuda.synchronize


def program_jax() -> Any:
    import jax

    if jax.default_backend() != "gpu":
        raise RuntimeError(f"jax runs on {jax.default_backend()}, not on a GPU")

    def make(name: str, row: Any) -> Any:
        T, B, H = row
        return in_jax(name, (B, T, H, H)), nothing

    return make, nothing


PROGRAMS = {
    "ours": program_ours,
    "torch": program_torch,
    "compile": program_compile,
    "compile_step": lambda: program_compile(1),
    "jax": program_jax,
}


# The sweep -----------------------------------------------------------------------------------


class Stopwatch:
    """Milliseconds of each thing that a run does on the device, by events around it."""

    def __init__(self, xp: Any) -> None:
        self.xp = xp
        self.events: list[tuple[str, Any, Any]] = []

    def around(self, name: str, run: Callable[[], Any]) -> Any:
        begin, end = self.xp.cuda.Event(), self.xp.cuda.Event()
        begin.record()
        made = run()
        end.record()
        self.events.append((name, begin, end))
        return made

    def taken(self) -> dict[str, float]:
        self.xp.cuda.runtime.deviceSynchronize()
        found: dict[str, float] = {}
        for name, begin, end in self.events:
            ms = self.xp.cuda.get_elapsed_time(begin, end)
            found[name] = found.get(name, 0.0) + ms
        self.events.clear()
        return found

    def watch(self) -> None:
        """Time the launches and products of all runs of this process from now on."""
        from tinygrad_seq.kernels import cuda

        run_class: Any = cuda._Run
        launch, multiply, outer = run_class._launch, run_class._multiply, run_class.outer
        steps = run_class._by_steps

        def timed_launch(run: Any, name: str, *given: Any) -> Any:
            return self.around(name, lambda: launch(run, name, *given))

        def timed_steps(run: Any, count: int) -> Any:
            return self.around(run.layout.direction, lambda: steps(run, count))

        def timed_multiply(run: Any, stage: Any) -> Any:
            name = f"{run.layout.direction} product outside the loop"
            return self.around(name, lambda: multiply(run, stage))

        def timed_outer(run: Any, *given: Any) -> Any:
            return self.around("gradients of matrices", lambda: outer(run, *given))

        run_class._launch = timed_launch
        run_class._by_steps = timed_steps
        run_class._multiply = timed_multiply
        run_class.outer = timed_outer


def forced(rows: int, parts: int) -> Callable[..., Any]:
    """In the place of ``cuda_division.divide``: this division, for both directions."""
    from tinygrad_seq.kernels import cuda_division

    def divide(work: Any) -> Any:
        groups = -(-work.B // rows)
        found = None
        if groups * parts <= work.machine.processors:
            found = cuda_division.weigh(work, groups, parts, rows)
        if found is None:
            raise NoRoomError(f"no room for {groups} groups of {parts}")
        return found

    return divide


class NoRoomError(Exception):
    """A division that the device has no room for."""


class Sweep:
    """Forward and backward of an LSTM under one division after another."""

    def __init__(self) -> None:
        from gpu_measures import Device
        from tinygrad_seq.kernels import cuda_division

        self.device = Device()
        self.room, self.divide = cuda_division, cuda_division.divide
        self.watch = Stopwatch(self.device.xp)
        self.watch.watch()
        self.made: dict[tuple[int, ...], Ours] = {}

    def __call__(self, item: str) -> dict[str, Any]:
        """``T B H`` and how: microseconds a step, and the model's clocks. How is ``chosen``, the
        best that is ``resident``, by ``steps``, or ROWS PARTS of a division."""
        T, B, H, *how = item.split()
        row = int(T), int(B), int(H)
        named = {
            "chosen": self.divide,
            "resident": self.room.resident,
            "steps": self.room.by_steps,
        }
        divide = named.get(how[0])
        if divide is None:
            rows, parts = map(int, how)
            divide = forced(rows, parts)
        setattr(self.room, "divide", divide)  # noqa: B010
        layouts(clear=True)
        if row not in self.made:
            self.made.clear()
            self.made[row] = Ours("lstm", row, "cuda")
        ours = self.made[row]
        try:
            ours.train()
        except NoRoomError as error:
            return {"no room": str(error)}
        self.watch.taken()
        turns = []
        for _ in range(3):
            begin = time.perf_counter()
            ours.train()
            host = time.perf_counter() - begin
            taken = self.watch.taken()
            whole = time.perf_counter() - begin
            turns.append(taken | {"host": host * 1e3, "whole": whole * 1e3})
        best = {key: min(turn[key] for turn in turns) for key in turns[0]}
        found: dict[str, Any] = {"ms": {k: round(v, 4) for k, v in best.items()}}
        for direction, division in layouts().items():
            found[direction] = {
                **divided(division),
                "model clocks": round(division.clocks),
                "µs a step": round(best[direction] * 1e3 / row[0], 3),
            }
        return found
