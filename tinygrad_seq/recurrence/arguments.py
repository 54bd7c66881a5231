"""What a driver is given: inputs, state, lengths, resets; checked and brought into one form.

Shapes: T steps, B rows of a batch. Imports the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tinygrad_seq import devices
from tinygrad_seq.errors import DeviceError, ShapeError, TraceError
from tinygrad_seq.tensors import FLOATS, Tensor, as_tensor, host_array
from tinygrad_seq.trees import leaves, map_leaves, paths, rebuild, structure

Cell = Callable[[Any, Any], tuple[Any, Any]]


class Given(NamedTuple):
    """The arguments of a driver, checked."""

    xs: Any  # leaves (T, B, ...)
    state: Any  # leaves (B, ...)
    reset_state: Any  # what a reset returns to; leaves (B, ...)
    x_leaves: list[Tensor]
    state_leaves: list[Tensor]
    T: int
    B: int
    lengths: np.ndarray | None  # (B,) int64, or None if every row has T steps
    resets: np.ndarray | None  # (T, B) bool, or None if there are none
    driver: str  # who was given them, for errors


def check_arguments(
    cell: Cell, xs: Any, state: Any, lengths: Any, resets: Any, driver: str
) -> Given:
    """The arguments as tensors and arrays; raises ShapeError or ValueError naming what is wrong."""
    if not callable(cell) or isinstance(cell, type):
        what = f"the class {cell.__name__}" if isinstance(cell, type) else f"a {_name(cell)}"
        raise ValueError(
            f"{driver}: {what} was given as the cell, expected a function or an object that is "
            f"called as y, state = cell(x, state): {driver}(cell, xs, state)"
        )
    xs, T, B = _inputs(xs, driver)
    initial = getattr(cell, "initial_state", None)
    start = initial(B) if initial is not None else None
    x_leaves = leaves(xs)
    device = x_leaves[0].device
    if start is not None and device != devices.CPU:  # a state made here goes where xs is
        start = map_leaves(lambda leaf: as_tensor(leaf, driver).to(device), start)
    if state is None:
        if initial is None:
            layer = (
                ", or call the layer itself; its step is the cell nn.as_cell(layer)"
                if hasattr(cell, "cells")
                else ""
            )
            raise ValueError(
                f"{driver}: the cell {_name(cell)} has no initial_state(batch_size) and no state "
                f"was given; give it that, or pass state={layer}"
            )
        state = start
    own = f"{_name(cell)}.initial_state({B})"
    same = start is None or state is start
    state = _state(state, B, own if state is start else "state", driver)
    if same:
        reset_state = state
    else:
        reset_state = _state(start, B, own, driver)
        hint = "; tgs.zeros is float32 unless given the parameters' dtype=, or convert the state"
        _check_like(state, reset_state, f"{driver}: state", "initial_state gives", hint)
    state_leaves = leaves(state)
    _check_devices(x_leaves, state_leaves, driver)
    if reset_state is not state:
        _check_devices(x_leaves, leaves(reset_state), driver)
    return Given(
        xs,
        state,
        reset_state,
        x_leaves,
        state_leaves,
        T,
        B,
        _lengths(lengths, T, B, driver),
        _resets(resets, T, B, driver),
        driver,
    )


def _check_devices(xs: list[Tensor], states: list[Tensor], driver: str) -> None:
    if {type(leaf._data) for leaf in (*xs, *states)} == {np.ndarray}:
        return  # quickly, for the commonest case
    device = xs[0].device
    for k, leaf in enumerate((*xs, *states)):
        if leaf.device != device:
            raise DeviceError(
                f"{driver}: xs is on {device}, but "
                f"{'a leaf of it' if k < len(xs) else 'the state'} on {leaf.device}; move one "
                "with .to(...)"
            )


def _name(cell: Any) -> str:
    return getattr(cell, "__name__", type(cell).__name__)


def _where(cell: Any) -> str:
    """The line where a cell that is a function, a module or another object begins."""
    forward = getattr(type(cell), "forward", type(cell).__call__)
    code = getattr(cell, "__code__", getattr(forward, "__code__", None))
    return "" if code is None else f" ({code.co_filename}, line {code.co_firstlineno})"


def _inputs(xs: Any, driver: str) -> tuple[Any, int, int]:
    if type(xs) is Tensor and xs.ndim >= 2:  # quickly, for the commonest case
        return xs, xs.shape[0], xs.shape[1]
    flat = list(paths(xs))
    if isinstance(xs, list) or not flat:
        raise ValueError(
            f"{driver}: xs is a {type(xs).__name__}{'' if flat else ' without a tensor'}, expected "
            "a tensor (T, B, ...), or a tuple or dict of them; tgs.stack makes one tensor of a "
            "list of steps"
        )
    tensors = [as_tensor(leaf, f"{driver}: xs{path}") for path, leaf in flat]
    for (path, _), tensor in zip(flat, tensors, strict=True):
        if tensor.ndim < 2:
            raise ShapeError(
                f"{driver}: xs{path} has shape {tensor.shape}, expected (T, B, ...): steps first, "
                "then the batch"
            )
        if tensor.shape[:2] != tensors[0].shape[:2]:
            raise ShapeError(
                f"{driver}: xs{path} has shape {tensor.shape}, but xs{flat[0][0]} has "
                f"{tensors[0].shape}: T and B must agree"
            )
    T, B = tensors[0].shape[:2]
    return rebuild(xs, iter(tensors)), T, B


def _state(state: Any, B: int, what: str, driver: str) -> Any:
    for leaf in leaves(state):
        if type(leaf) is not Tensor or leaf.dtype not in FLOATS or leaf.shape[:1] != (B,):
            break
    else:
        return state

    def check(path: str, leaf: Any) -> Tensor:
        tensor = as_tensor(leaf, f"{driver}: {what}{path}")
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f"{driver}: {what}{path} has dtype {tensor.dtype}, expected a floating one"
            )
        if not tensor.ndim or tensor.shape[0] != B:
            raise ShapeError(
                f"{driver}: {what}{path} has shape {tensor.shape}, expected ({B}, ...): one row "
                "for each row of the batch"
            )
        return tensor

    return rebuild(state, iter([check(path, leaf) for path, leaf in paths(state)]))


def _lengths(lengths: Any, T: int, B: int, driver: str) -> np.ndarray | None:
    if lengths is None:
        return None
    given = host_array(lengths, f"{driver}: lengths")
    if given.size == 0 and B == 0:
        return None
    if given.shape != (B,):
        raise ShapeError(
            f"{driver}: lengths has shape {given.shape}, expected ({B},): one for each row"
        )
    if given.dtype.kind not in "iu":
        raise ValueError(f"{driver}: lengths has dtype {given.dtype}, expected integers")
    if given.min() < 0 or given.max() > T:
        raise ValueError(
            f"{driver}: lengths from {given.min()} to {given.max()} were given, expected 0 to "
            f"T = {T}"
        )
    return None if given.min() == T else given.astype(np.int64)


def _resets(resets: Any, T: int, B: int, driver: str) -> np.ndarray | None:
    if resets is None:
        return None
    given = host_array(resets, f"{driver}: resets")
    if given.shape != (T, B):
        raise ShapeError(f"{driver}: resets has shape {given.shape}, expected (T, B) = {(T, B)}")
    if given.dtype != np.bool_:
        raise ValueError(f"{driver}: resets has dtype {given.dtype}, expected booleans")
    return given.copy() if given.any() else None  # the way back reads them too


# What a cell returns --------------------------------------------------------------------------


def check_returned(returned: Any, cell: Cell, given: Given) -> tuple[Any, Any]:
    """The ``(y, state)`` of one step, y as tensors with a row for each row of the batch."""
    B, driver = given.B, given.driver
    if not isinstance(returned, tuple) or len(returned) != 2:
        of = f" of {len(returned)}" if isinstance(returned, tuple) else ""
        raise TraceError(
            f"{driver}: the cell {_name(cell)}{_where(cell)} returned a {type(returned).__name__}"
            f"{of}, expected a pair (y, state)"
        )
    y, state = returned
    if type(y) is Tensor and y.shape[:1] == (B,):
        return y, state
    if isinstance(y, list) or not leaves(y):
        what = f"a {type(y).__name__}" if leaves(y) else f"{y!r}, without a tensor,"
        raise TraceError(
            f"{driver}: the cell {_name(cell)}{_where(cell)} returned {what} as y, expected a "
            "tensor, or a tuple or dict of them"
        )

    def check(path: str, leaf: Any) -> Tensor:
        try:
            tensor = as_tensor(leaf, f"y{path}")
        except ValueError as error:
            raise TraceError(
                f"{driver}: the cell {_name(cell)}{_where(cell)} returned what is no output; "
                f"{error}"
            ) from None
        if not tensor.ndim or tensor.shape[0] != B:
            raise TraceError(
                f"{driver}: the cell {_name(cell)}{_where(cell)} returned y{path} of shape "
                f"{tensor.shape}, expected ({B}, ...): axis 0 is the batch, and rows do not mix"
            )
        return tensor

    return rebuild(y, iter([check(path, leaf) for path, leaf in paths(y)])), state


def check_state(state: Any, before: Any, cell: Cell, given: Given, at: str = "") -> None:
    """Raise unless a state has the structure, shapes and dtypes of the state before it."""
    if alike(state, before):
        return
    what = f"{given.driver}: {at}the cell {_name(cell)}{_where(cell)} returned a state that"
    for path, leaf in paths(state):
        if not isinstance(leaf, Tensor):
            raise TraceError(f"{what}{path} is a {type(leaf).__name__}, expected a tensor")
    kinds = sorted({leaf.dtype.name for leaf in given.x_leaves if leaf.dtype in FLOATS})
    about = f", and xs is {' and '.join(kinds)}" if kinds else ""
    _check_like(
        state,
        before,
        what,
        "it was given",
        f"; inputs, state and parameters share one dtype{about}: convert one with "
        "xs.astype(...), cell.to(...)",
    )


def alike(a: Any, b: Any) -> bool:
    """Whether two states are surely alike, found quickly."""
    if type(a) is not type(b):
        return False
    if type(a) is Tensor:
        return bool(a.shape == b.shape and a.dtype == b.dtype)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    return False


def _check_like(given: Any, like: Any, what: str, source: str, about_dtypes: str = "") -> None:
    if alike(given, like):
        return
    if structure(given) != structure(like):
        raise ShapeError(f"{what} is {structure(given)}, but {source} {structure(like)}")
    for (path, new), old in zip(paths(given), leaves(like), strict=True):
        slot = getattr(new._data, "slot", None)  # where a step is traced
        line = "" if slot is None else f", line %{slot} of the step"
        at = f" at {path}" if path else ""
        if new.shape != old.shape:
            raise ShapeError(
                f"{what}{at} is {new.dtype}{new.shape}{line}, but {source} {old.dtype}{old.shape}; "
                "a state keeps its shape from step to step"
            )
        if new.dtype != old.dtype:
            raise ValueError(
                f"{what}{at} is {new.dtype}{new.shape}{line}, but {source} {old.dtype}{old.shape}"
                f"{about_dtypes}"
            )
