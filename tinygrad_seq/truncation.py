"""Truncated backpropagation through time: long sequences in blocks, the error cut off behind them.

Imports the engine and nn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from tinygrad_seq.errors import ShapeError, called, whole
from tinygrad_seq.nn.module import Module, called_with
from tinygrad_seq.nn.recurrent import Recurrent
from tinygrad_seq.structural import concat
from tinygrad_seq.tensors import Tensor, as_tensor, host_array
from tinygrad_seq.transforms import detach
from tinygrad_seq.trees import leaves, map_columns, map_leaves, paths

MODEL = "a module or a function of the inputs"
LOSS = "a function of (prediction, targets), such as nn.functional.mse_loss"


class Block(NamedTuple):
    """What ``tbptt`` gives after each block of k1 steps; its gradients stand in the parameters."""

    loss: float  # of the block's steps
    size: int  # how many steps of how many rows these were
    state: Any  # after the block, off the tape
    first: int  # the first step of the block
    last: int  # the step after its last one


def tbptt(
    model: Any,
    inputs: Any,
    targets: Any,
    loss: Callable[[Any, Any], Tensor],
    k1: int,
    k2: int,
    *,
    state: Any = None,
    lengths: Any = None,
) -> Iterator[Block]:
    """Truncated backpropagation through time, block by block (Williams and Peng 1990).

    Every k1 steps there is an update, before which the error of these k1 steps has gone back
    through time, but never over more than k2 steps::

        for block in train.tbptt(model, x, y, loss, k1=20, k2=50):
            optimizer.step()
            optimizer.zero_grad()

    ``k2 >= k1``: the last k2 steps are run again from the state before them, and the error of the
    newest k1 goes back through all of them; each step's error reaches k2 − k1 + 1 to k2 steps.
    ``k2 < k1``: the block is run in pieces of k2 steps, between which the error stops; with k1 = T
    there is one update at the end and the error of step n stops at most k2 steps before it. The
    price of both: what lies further back is not learned.

    ``inputs`` (T, B, ...) and ``targets`` (T, B, ...) are tensors or structures of them, a target
    for each step, a tuple of inputs being as many arguments of the model, ``model(a, b, state)``;
    ``lengths`` (B,) as in ``tgs.scan``. ``loss(prediction, targets)`` gets those of
    a whole block, whatever mean or sum it makes of them, masks included. The model is run as
    ``model.with_state(x, state)``, if it has that (``nn.Sequential``), or as ``model(x, state)``,
    which returns (prediction, state) like a recurrent layer; with ``lengths=`` if there are any.
    ``state`` is the first one, None for the model's own. The state goes from block to block off the
    tape. Inputs and targets are on the model's device, lengths on the host; each block waits for a
    GPU once, for its loss.

    Yields a ``Block`` each k1 steps, the last of fewer steps if k1 does not divide T. Gradients are
    added to what the parameters have. Raises ValueError for k1 or k2 below 1 and for a model that
    runs backward in time or has the batch first, ShapeError for targets that do not fit.
    """
    k1, k2 = whole(k1, "tbptt: k1"), whole(k2, "tbptt: k2")
    called(model, "tbptt: model", MODEL)
    called(loss, "tbptt: loss", LOSS)
    check_forward(model, "tbptt")
    check_time_first(model, "tbptt")
    return _blocks(_Sequence(model, inputs, targets, lengths), loss, k1, k2, state)


def _blocks(sequence: _Sequence, loss: Any, k1: int, k2: int, state: Any) -> Iterator[Block]:
    """The generator itself, so that wrong arguments raise at the call."""
    T = sequence.T
    window, begin = state, 0  # the state before the steps that are run for the block, and where
    for a in range(0, T, k1):
        b = min(a + k1, T)
        if k2 >= k1:  # the next window begins k1 steps after this one, where a state is left behind
            following = max(0, b + k1 - k2)
            cuts, stops = [begin, following, b], False
        else:
            following = b
            cuts, stops = [*range(a, b, k2), b], True
        predictions, state = [], window
        for s, e in pairwise(cuts):
            if s < e:
                prediction, state = sequence.run(s, e, state)
                predictions.append(prediction)
                state = detach(state) if stops else state
            if e == following:
                window = None if state is None else detach(state)
        joined = predictions[0] if len(predictions) == 1 else map_columns(concat, predictions)
        newest = sequence.last_steps(joined, b - cuts[0], b - a)
        value = loss(newest, sequence.targets_of(a, b))
        number = _backward(value)
        begin = following
        yield Block(number, sequence.size(a, b), detach(state), a, b)


def _backward(value: Any) -> float:
    """Go backward from a loss, which must be a finite number; returns it."""
    if not isinstance(value, Tensor) or value.size != 1:
        found = f"shape {value.shape}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ValueError(
            f"tbptt: the loss returned {found}, expected one number as a tensor, such as those of "
            "nn.functional"
        )
    number = float(value.item())
    if not np.isfinite(number):
        raise ValueError(
            f"tbptt: the loss is {number}; this block has added nothing to the gradients. "
            "Look for NaN in the data, lower the learning rate, or clip the gradient's norm"
        )
    value.backward()
    return number


class _Sequence:
    """A model, and the sequences that it is run over in parts."""

    def __init__(self, model: Any, inputs: Any, targets: Any, lengths: Any) -> None:
        self.model = model
        self.inputs = map_leaves(lambda leaf: as_tensor(leaf, "tbptt: inputs"), inputs)
        self.targets = map_leaves(lambda leaf: as_tensor(leaf, "tbptt: targets"), targets)
        shapes = [leaf.shape for leaf in leaves(self.inputs)]
        if not shapes or any(len(shape) < 2 for shape in shapes):
            found = f"a {type(inputs).__name__} of shapes" if len(shapes) != 1 else "shape"
            some = f"{shapes[0] if len(shapes) == 1 else shapes[:3]}"
            raise ShapeError(
                f"tbptt: inputs: {found} {some} was given, expected (T, B, ...); a list or a tuple "
                "is as many inputs, np.asarray makes one of lists of numbers"
            )
        self.T, self.B = shapes[0][:2]
        for path, leaf in [*paths(self.inputs), *paths(self.targets)]:
            if leaf.shape[:2] != (self.T, self.B):
                raise ShapeError(
                    f"tbptt: inputs are {shapes[0]}, but {path or 'there'} is {leaf.shape}, "
                    f"expected {(self.T, self.B)} first in all of inputs and targets: one for each "
                    "step"
                )
        self.lengths = None if lengths is None else host_array(lengths, "tbptt: lengths")
        if self.lengths is not None and self.lengths.shape != (self.B,):
            raise ShapeError(
                f"tbptt: lengths has shape {self.lengths.shape}, expected ({self.B},): one for "
                "each row"
            )
        if self.lengths is not None and self.B:
            low, high = self.lengths.min(), self.lengths.max()
            if self.lengths.dtype.kind not in "iu" or low < 0 or high > self.T:
                raise ValueError(
                    f"tbptt: lengths from {low} to {high}, {self.lengths.dtype}, were given, "
                    f"expected integers from 0 to T = {self.T}"
                )
            self.lengths = self.lengths.astype(np.int64)  # unsigned ones have no difference

    def lengths_of(self, s: int, e: int) -> np.ndarray | None:
        return None if self.lengths is None else np.clip(self.lengths - s, 0, e - s)

    def size(self, s: int, e: int) -> int:
        """How many steps there are of all rows."""
        lengths = self.lengths_of(s, e)
        return (e - s) * self.B if lengths is None else int(lengths.sum())

    def targets_of(self, s: int, e: int) -> Any:
        return map_leaves(lambda leaf: leaf[s:e], self.targets)

    def last_steps(self, predictions: Any, steps: int, count: int) -> Any:
        """Those of the last ``count`` of so many steps."""
        if count == steps:
            return predictions
        for path, leaf in paths(predictions):
            if leaf.shape[:2] != (steps, self.B):
                raise ShapeError(
                    f"tbptt: the model's prediction{path} for {steps} steps of {self.B} rows has "
                    f"shape {leaf.shape}, expected ({steps}, {self.B}, ...), of which those of the "
                    f'newest {count} steps can be taken; a layer with output="last" gives no such'
                )
        return map_leaves(lambda leaf: leaf[steps - count :], predictions)

    def run(self, s: int, e: int, state: Any) -> tuple[Any, Any]:
        part = map_leaves(lambda leaf: leaf[s:e], self.inputs)
        return run_with_state(self.model, part, state, self.lengths_of(s, e), "tbptt")


def run_with_state(
    model: Any, inputs: Any, state: Any, lengths: Any, caller: str
) -> tuple[Any, Any]:
    """(prediction, state) of a model that takes a state."""
    run = getattr(model, "with_state", model)
    given, more = (*arguments(inputs), state), {} if lengths is None else {"lengths": lengths}
    try:
        bind(run, given, more)
    except TypeError as error:
        names = "x, " if len(given) == 2 else "".join(f"x{k}, " for k in range(1, len(given)))
        raise ValueError(
            f"{caller}: the model {type(model).__name__} cannot be called as model({names}state"
            f"{', lengths=...' if more else ''}): {error}; expected a recurrent layer, an "
            "nn.Sequential with one, or a model of your own that returns (prediction, state)"
        ) from None
    made = run(*given, **more)
    if not isinstance(made, tuple) or len(made) != 2:
        raise ValueError(
            f"{caller}: the model {type(model).__name__} returned a {type(made).__name__}, "
            "expected a pair (prediction, state), by which the state goes from block to block; "
            "let it return that, as recurrent layers do, or use nn.Sequential"
        )
    return made


def arguments(inputs: Any) -> tuple[Any, ...]:
    """What a model is called with: a tuple of inputs is as many arguments, anything else is one."""
    return inputs if type(inputs) is tuple else (inputs,)


def bind(run: Any, given: tuple[Any, ...], more: dict[str, Any]) -> dict[str, Any]:
    """What ``run(*given, **more)`` takes each for, by name; a TypeError if it does not fit."""
    return called_with(run).bind(*given, **more).arguments


def check_forward(model: Any, caller: str) -> None:
    """Raise a ValueError for a model in which something runs from the last step to the first."""
    for module in model.modules() if isinstance(model, Module) else ():
        if isinstance(module, Recurrent) and module.looks_ahead:
            raise ValueError(
                f"{caller}: the model has a {type(module).__name__} that runs from the last step "
                "to the first, which has no state to carry on from; expected one forward in time"
            )


def check_time_first(model: Any, caller: str) -> None:
    """Raise a ValueError for a model in which something has the batch before the steps."""
    for module in model.modules() if isinstance(model, Module) else ():
        if isinstance(module, Recurrent) and module.batch_first:
            raise ValueError(
                f"{caller}: {type(module).__name__} in the model has batch_first, but blocks "
                "are cut along axis 0; expected a model and inputs with time first, (T, B, ...)"
            )
