"""A cell run one step at a time, compiled: for generation, control, anything that must answer now.

Imports the engine and its own room.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygrad_seq import devices
from tinygrad_seq.errors import DeviceError, ShapeError, TraceError
from tinygrad_seq.recurrence.arguments import Cell, check_arguments
from tinygrad_seq.recurrence.compiled import Call
from tinygrad_seq.tape import no_grad
from tinygrad_seq.tensors import Tensor, as_tensor, is_traced, wrap
from tinygrad_seq.trees import leaves, map_leaves, paths, rebuild, structure


class Stepper:
    """A cell step by step: ``y = step(x)``, the state being kept inside.

    ``x`` is an example of one step's input, (B, ...) or a structure of them, whose shapes every
    call must have; ``state`` is the first state, ``cell.initial_state(B)`` unless given. What runs
    is the code that ``tgs.scan`` runs, without gradients, with everything looked up, checked and
    packed when the stepper is made: a step of a small cell takes some ten microseconds more than
    its arithmetic. Parameters count as they were then; after training make a new one.

    ``step.state`` is the state now, a copy; assign to it to go on from another one.

    Raises what ``tgs.scan`` raises, TraceError for a cell that draws random numbers, which one with
    dropout does unless it is in ``eval`` mode, and DeviceError for a cell on a GPU: steps run on
    the host.
    """

    def __init__(self, cell: Cell, x: Any, state: Any = None) -> None:
        x = map_leaves(lambda leaf: as_tensor(leaf, "Stepper: x"), x)
        if is_traced(leaves(x)):
            raise TraceError(
                "Stepper: x is a value of a cell that is traced, expected an example; inside of a "
                "cell call the other cell itself, y, state = cell(x, state)"
            )
        if any(not leaf.ndim for leaf in leaves(x)):
            raise ShapeError("Stepper: x is a number, expected an input of one step, (B, ...)")
        steps = map_leaves(lambda leaf: wrap(leaf._data[None], None), x)
        with no_grad():
            given = check_arguments(cell, steps, state, None, None, "Stepper")
            if given.B == 0:
                raise ShapeError("Stepper: x has no rows, expected (B, ...) with B from 1 on")
            call = Call(cell, given)
            if call.step.draws:
                raise TraceError(
                    "Stepper: the cell draws random numbers, and these would never change; "
                    "call model.eval() before, or run tgs.scan over one step at a time"
                )
            runner = call.runner(None)
            inputs = call.arrays()
        inputs.xs = [array.copy() for array in inputs.xs]
        inputs.states = [array.copy() for array in inputs.states]
        inputs.reset_states = inputs.states
        self._step, self._given = call.step, given
        self._shapes = [leaf.shape for leaf in leaves(x)]
        self._run = runner.repeated(inputs)
        self._y_shapes = [leaf.shape for leaf in leaves(call.step.y)]
        self._single = type(call.step.y) is Tensor and type(x) is Tensor

    def __call__(self, x: Any) -> Any:
        """The output (B, ...) of the next step."""
        run = self._run
        given = (x,) if self._single else leaves(x)
        if len(given) != len(self._shapes):
            raise ShapeError(
                f"Stepper: x is {structure(x)}, expected {structure(self._given.xs)} as when it "
                "was made"
            )
        for value, buffer, shape in zip(given, run.inputs.xs, self._shapes, strict=True):
            array = value._data if type(value) is Tensor else np.asarray(value)
            if type(array) is not type(buffer):
                raise DeviceError(
                    f"Stepper: x is on {devices.device_of(array)}, and the stepper on "
                    f"{devices.device_of(buffer)}; move x with .to(...)"
                )
            if array.shape != shape:
                raise ShapeError(
                    f"Stepper: x has shape {array.shape}, expected {shape} as when it was made"
                )
            buffer[0] = array.reshape(buffer.shape[1:])
        run.run()
        if self._single:
            return wrap(run.ys[0].reshape(self._y_shapes[0]).copy(), None)
        made = [
            wrap(y.reshape(shape).copy(), None)
            for y, shape in zip(run.ys, self._y_shapes, strict=True)
        ]
        return rebuild(self._step.y, iter(made))

    @property
    def state(self) -> Any:
        held = zip(self._run.inputs.states, leaves(self._given.state), strict=True)
        made = [wrap(array.reshape(like.shape).copy(), None) for array, like in held]
        return rebuild(self._given.state, iter(made))

    @state.setter
    def state(self, state: Any) -> None:
        given = self._given.state
        if structure(state) != structure(given):
            raise ShapeError(f"Stepper: state is {structure(state)}, expected {structure(given)}")
        new = [as_tensor(leaf, f"Stepper: state{path}") for path, leaf in paths(state)]
        for leaf, like in zip(new, leaves(given), strict=True):
            if leaf.shape != like.shape:
                raise ShapeError(f"Stepper: a state of {leaf.shape} given, expected {like.shape}")
        for leaf, array in zip(new, self._run.inputs.states, strict=True):
            array[...] = leaf._data.reshape(array.shape)
