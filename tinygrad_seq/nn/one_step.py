"""A model as a cell: one step of everything in it, for running one step at a time.

Imports the engine, module, layers and recurrent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tinygrad_seq.errors import ShapeError, called
from tinygrad_seq.nn.layers import Sequential, takes_state
from tinygrad_seq.nn.module import Module, called_with
from tinygrad_seq.nn.recurrent import Recurrent
from tinygrad_seq.trees import leaves, structure

EXPECTED = (
    "a recurrent layer, an nn.Sequential with one, or a cell, called as y, state = cell(x, state)"
)


class Stack(Module):
    """Cells and layers one upon another, as one cell: ``y, states = stack(x, states)``.

    ``Stack([cell, cell, nn.Linear(H, K)], [True, True, False])``: of each part whether it is a
    cell, which gets and gives a state, or a function of what is below it. The states are a tuple
    with one for each cell, in order.
    """

    def __init__(self, parts: Sequence[Any], are_cells: Sequence[bool]) -> None:
        if len(parts) != len(are_cells) or not any(are_cells):
            raise ValueError(
                f"Stack: {len(parts)} parts and {list(are_cells)} were given, expected of each "
                "part whether it is a cell, and at least one that is"
            )
        self.parts, self.are_cells = list(parts), list(are_cells)
        self.cells = [part for part, is_cell in zip(parts, are_cells, strict=True) if is_cell]

    @property
    def initial_state(self) -> Callable[[int], tuple[Any, ...]]:
        """A function of the size of a batch; an AttributeError if one of the cells has none."""
        each = [cell.initial_state for cell in self.cells]
        return lambda batch_size: tuple([initial(batch_size) for initial in each])

    def forward(self, x: Any, states: Any) -> tuple[Any, Any]:
        if not isinstance(states, tuple) or len(states) != len(self.cells):
            raise ShapeError(
                f"Stack: the state is {structure(states)}, expected a tuple of {len(self.cells)}, "
                "one for each cell"
            )
        remaining, after = iter(states), []
        for part, is_cell in zip(self.parts, self.are_cells, strict=True):
            if is_cell:
                x, h = part(x, next(remaining))
                after.append(h)
            else:
                x = part(x)
        return x, tuple(after)


def as_cell(model: Any) -> Any:
    """One step of a recurrent layer or of an ``nn.Sequential``, as a cell with the same parameters.

    Other callables of ``(x, state)`` are cells already and come back as they are. Raises ValueError
    for a model that runs backward in time, which has no step, for one without a recurrent layer,
    and for what is no cell.
    """
    if not isinstance(model, (Recurrent, Sequential)):
        if not _is_cell(called(model, "as_cell", EXPECTED)):
            raise ValueError(f"as_cell: a {type(model).__name__} was given, expected {EXPECTED}")
        return model
    parts = _parts(model)
    if not any(is_cell for _, is_cell in parts):
        raise ValueError("as_cell: the model has no recurrent layer, expected one at least")
    return Stack([part for part, _ in parts], [is_cell for _, is_cell in parts])


def cell_states(model: Any, state: Any) -> Any:
    """The state of ``as_cell(model)``, from that which the model itself returns.

    That is the state of a recurrent layer, (num_layers, B, H) for those of one kind, or of
    ``with_state`` of an ``nn.Sequential``. What the cells have already, a tuple with the state of
    each, (B, H), comes back as it is, and so does what fits neither, which ``Stepper`` refuses.
    """
    if state is None or not isinstance(model, (Recurrent, Sequential)):
        return state
    initial_state = getattr(as_cell(model), "initial_state", None)
    if initial_state is None or _same_axes(state, initial_state(1)):
        return state
    try:
        return tuple(_states(model, state))
    except ShapeError:
        return state


def _same_axes(a: Any, b: Any) -> bool:
    """Whether two states have the same structure and as many axes, whatever their sizes."""
    axes = [[np.ndim(leaf) for leaf in leaves(state)] for state in (a, b)]
    return structure(a) == structure(b) and axes[0] == axes[1]


def _states(model: Any, state: Any) -> list[Any]:
    """Of each cell in the model; raises ShapeError for what is no state of the model."""
    if isinstance(model, Recurrent):
        return list(model.split_state(state))
    if not isinstance(model, Sequential):
        return [state]
    takers = [layer for layer in model.layers if takes_state(layer)]
    if not isinstance(state, (tuple, list)) or len(state) != len(takers):
        raise ShapeError(f"expected a state of {len(takers)} modules")
    found = [_states(layer, each) for layer, each in zip(takers, state, strict=True)]
    return [each for some in found for each in some]


def _is_cell(model: Any) -> bool:
    """Whether it takes an input and a state; what takes lengths is for many steps, not for one."""
    takes = called_with(model)
    try:
        takes.bind(None, None)
    except TypeError:
        return False
    return "lengths" not in takes.parameters


def _parts(model: Any) -> list[tuple[Any, bool]]:
    if isinstance(model, Sequential):
        return [part for layer in model.layers for part in _parts(layer)]
    if not isinstance(model, Recurrent):
        return [(model, False)]
    if model.looks_ahead:
        raise ValueError(
            f"as_cell: a {type(model).__name__} runs from the last step to the first, and has no "
            "next step; expected layers forward in time"
        )
    parts: list[tuple[Any, bool]] = []
    for k, cell in enumerate(model.cells):
        if k:
            parts.append((model.dropout, False))
        parts.append((cell, True))
    return parts
