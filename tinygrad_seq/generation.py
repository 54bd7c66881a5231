"""Sequences made by a model: its own output fed back in, drawn by chance or as it is.

Imports the engine, recurrence, search, nn and truncation.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygrad_seq.creation import Rng, generator
from tinygrad_seq.errors import ShapeError, called, whole
from tinygrad_seq.nn.layers import Embedding, Sequential
from tinygrad_seq.nn.module import first_parameter, in_mode
from tinygrad_seq.nn.one_step import as_cell, cell_states
from tinygrad_seq.recurrence import Stepper
from tinygrad_seq.search import largest
from tinygrad_seq.tape import no_grad
from tinygrad_seq.tensors import Tensor, as_tensor, host_array
from tinygrad_seq.truncation import MODEL, check_forward, check_time_first, run_with_state

Array = np.ndarray


class ModelSteps:
    """A model run one step at a time: ``y = steps(x)``, x (B, ...), y an array (B, n).

    ``model`` is a cell, a recurrent layer or an ``nn.Sequential``, which may begin with an
    ``nn.Embedding``: x are integers (B,) then. ``x`` is an example of an input. The model is used
    as it is now, in ``eval`` mode. ``state`` is the first one, that of the model or a tuple with
    that of each cell in it. On a GPU each x is copied there and each y back.
    """

    def __init__(self, model: Any, x: Any, state: Any = None) -> None:
        self.table: Array | None = None
        if isinstance(model, Sequential) and len(model) and isinstance(model[0], Embedding):
            self.table, model = model[0].weight.numpy(), model[1:]
        with in_mode(model, training=False):
            cell = as_cell(model)
            first = np.asarray(x) if self.table is None else self._look_up(x)
            own = first_parameter(model)
            if own is not None and first.dtype.kind == "f":
                first = first.astype(own.dtype)
            self.device = "cpu" if own is None else own.device
            self.stepper = Stepper(cell, self._there(first), cell_states(model, state))

    def _there(self, x: Any) -> Any:
        """Where the model is."""
        return x if self.device == "cpu" else as_tensor(x, "generate: x").to(self.device)

    def _look_up(self, ids: Any) -> Array:
        assert self.table is not None
        at = np.asarray(ids)
        if at.dtype.kind not in "iu":
            raise ValueError(f"generate: ids of dtype {at.dtype} were given, expected integers")
        ids64 = at.astype(np.int64, copy=False)
        if at.size and ids64.view(np.uint64).max() >= len(self.table):  # negative ones are huge
            raise ValueError(
                f"generate: ids from {at.min()} to {at.max()} were given, but the model's "
                f"embedding has {len(self.table)}: is the vocabulary that of another model?"
            )
        found: Array = self.table.take(ids64, axis=0)
        return found

    def __call__(self, x: Any) -> Array:
        made: Tensor = self.stepper(self._there(x if self.table is None else self._look_up(x)))
        y: Array = made.numpy()
        return y

    @property
    def state(self) -> Any:
        return self.stepper.state

    @state.setter
    def state(self, state: Any) -> None:
        self.stepper.state = state


class CalledSteps:
    """A model of one's own run one step at a time: ``logits = steps(ids)``, ids (B,).

    It is called as ``train.tbptt`` calls it, with one step, in ``eval`` mode.
    """

    def __init__(self, model: Any, state: Any = None) -> None:
        check_forward(model, "generate")
        check_time_first(model, "generate")
        self.model, self.state = model, state
        own = first_parameter(model)
        self.device = "cpu" if own is None else own.device

    def __call__(self, ids: Array) -> Array:
        x = as_tensor(ids[None]).to(self.device)
        with in_mode(self.model, training=False), no_grad():
            y, self.state = run_with_state(self.model, x, self.state, None, "generate")
        if y.ndim != 3 or y.shape[:2] != x.shape:
            raise ShapeError(
                f"generate: the model gave logits {y.shape} of symbols {x.shape}, expected "
                "(T, B, V) of (T, B), and the state after them"
            )
        logits: Array = y.numpy()[0]
        return logits


def generate(
    model: Any,
    prompt: Any,
    steps: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    state: Any = None,
    rng: Rng = None,
) -> Array:
    """Go on from ``prompt`` for so many steps: each symbol is drawn and is the next input.

    ``prompt`` (T,) or (T, B), integers, at least one step. ``model`` gives logits for V symbols:
    an ``nn.Sequential`` that begins with an ``nn.Embedding``, which runs compiled, a step at a
    time, with the cell that it was trained with, or any other that ``train.tbptt`` trains, called
    as ``logits, state = model(ids, state)`` with ids (1, B) and logits (1, B, V). A symbol k is
    drawn with probability proportional to exp(logit_k / temperature), the likeliest one taken if
    the temperature is 0; with ``top_k`` only so many of the likeliest have a chance, of equal ones
    the first. Returns the new symbols, (steps,) or (steps, B), int64. Raises ValueError for logits
    that hold NaN.

    ``state`` is the first one: what ``model.with_state(ids)`` gave, to go on from there, or a tuple
    with that of each cell in the model, (B, H) or a pair of these, ``initial_state(B)`` of each
    unless given; a model of the other kind is given its own, at first None. One to a sequence, an
    image to its caption: let a state be computed from the one, and the prompt be the symbol of the
    start.
    """
    ids = host_array(prompt, "generate: prompt")
    if ids.ndim not in (1, 2) or not ids.size or ids.dtype.kind not in "iu":
        raise ShapeError(
            f"generate: the prompt is {ids.dtype}{ids.shape}, expected integers (T,) or (T, B), "
            "one step and one sequence at least; vocabulary.encode(text) makes them of a text"
        )
    steps = whole(steps, "generate: steps", least=0)
    if not isinstance(temperature, (int, float, np.number)) or not temperature >= 0:
        raise ValueError(f"generate: temperature {temperature!r} was given, expected 0 or more")
    if top_k is not None:
        top_k = whole(top_k, "generate: top_k")
    rows = ids if ids.ndim == 2 else ids[:, None]
    run: Any
    if isinstance(model, Sequential) and len(model) and isinstance(model[0], Embedding):
        run = ModelSteps(model, rows[0], state)
    else:
        run = CalledSteps(called(model, "generate: model", MODEL), state)
    chance = generator(rng)
    for row in rows:
        logits = run(row)
    made = np.empty((steps, rows.shape[1]), np.int64)
    for s in range(steps):
        peak = largest(logits, s, "generate")
        made[s] = _drawn(logits, peak, temperature, top_k, chance)
        if s + 1 < steps:
            logits = run(made[s])
    return made if ids.ndim == 2 else made[:, 0]


def _drawn(
    logits: Array, peak: Array, temperature: float, top_k: int | None, rng: np.random.Generator
) -> Any:
    """A symbol for each row of logits (B, V), the largest of which are ``peak`` (B, 1)."""
    if temperature == 0:
        return logits.argmax(axis=-1)
    with np.errstate(over="ignore"):  # near 0 all but the largest tend to -inf
        scaled = (logits - peak).astype(np.float64) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = np.partition(logits, -top_k, axis=-1)[:, -top_k, None]
        above, equal = logits > least, logits == least
        room = top_k - above.sum(axis=-1, keepdims=True)
        stays = above | (equal & (equal.cumsum(axis=-1) <= room))
        scaled = np.where(stays, scaled, -np.inf)
    # The largest of logits with Gumbel's noise is distributed as the softmax of the logits.
    return (scaled + rng.gumbel(size=logits.shape)).argmax(axis=-1)


def roll_out(model: Any, start: Any, steps: int, state: Any = None) -> Array:
    """Feed a model's predictions back in: (steps, B, F) after ``start`` (T, B, F).

    ``model`` predicts from each step's input (B, F) the next one's: a recurrent layer, an
    ``nn.Sequential`` with one, or a cell, ``y, state = cell(x, state)``. ``state`` is the first
    one, what the layer, or ``with_state`` of the Sequential, returned, or a tuple with that of each
    cell in it; ``initial_state(B)`` of each unless given.
    """
    begun = host_array(start, "roll_out: start")
    if begun.ndim != 3 or not len(begun):
        raise ShapeError(f"roll_out: start is {begun.shape}, expected (T, B, F), one step at least")
    steps = whole(steps, "roll_out: steps", least=0)
    run = ModelSteps(model, begun[0], state)
    for x in begun:
        y = run(x)
    if y.shape != begun.shape[1:]:
        raise ShapeError(
            f"roll_out: the model predicts {y.shape}, expected {begun.shape[1:]}, the next input"
        )
    made = np.empty((steps, *y.shape), y.dtype)
    for s in range(steps):
        made[s] = y
        if s + 1 < steps:
            y = run(y)
    return made
