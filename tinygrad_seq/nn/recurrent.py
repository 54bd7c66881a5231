"""Layers of cells: stacked, in both directions, over sequences of different lengths.

Imports the engine, recurrence, cells, layers and module.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from inspect import signature
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from tinygrad_seq import devices
from tinygrad_seq.creation import Rng, generator
from tinygrad_seq.errors import ShapeError, probability, whole
from tinygrad_seq.nn.cells import GRUCell, LSTMCell, RNNCell
from tinygrad_seq.nn.layers import Dropout
from tinygrad_seq.nn.module import Module
from tinygrad_seq.recurrence import scan, unroll
from tinygrad_seq.recurrence.compiled import scan_layer
from tinygrad_seq.structural import concat, permute_dims, stack, sum
from tinygrad_seq.tensors import Tensor, TensorLike, as_tensor, host_array
from tinygrad_seq.trees import (
    leaves,
    map_arrays,
    map_columns,
    map_leaves,
    paths,
    structure,
)

BACKENDS: dict[str, Any] = {"scan": scan, "tape": unroll}
OF_LAYER = ("input_size", "hidden_size", "bias", "dtype", "rng")  # a layer gives them to its cells


class Recurrent(Module):
    """Cells over a sequence: layer upon layer, and in both directions if asked.

    ``cells`` has D cells for each layer, D = 2 if ``bidirectional``; ``cells[l * D + d]`` is layer
    l, d = 1 the backward direction. The outputs of both directions are joined along the last axis
    and are the input of the next layer, with ``dropout`` between layers while training.

    ``ys, state = layer(x, state=None, lengths=None, resets=None)``: x (T, B, I), or (B, T, I) with
    ``batch_first``, and ys likewise; state is a tuple with the state of each cell. lengths and
    resets are those of ``tgs.unroll``, but resets too are (B, T) with ``batch_first``. Where the
    first cells take more than one input, x is a tuple or dict of tensors (T, B, ...).
    With ``output="last"`` ys is (B, D·H): for each row the output of its last step, and of its
    first one in the backward direction; zeros for a row of length 0. That is what a classifier of
    sequences goes on from.
    ``reverse=True`` runs each cell from the last step to the first (not with ``bidirectional``).
    Cells run compiled, by ``tgs.scan``, with its ``checkpoint`` if that is given, which takes less
    memory for long sequences; ``backend="tape"`` runs ``tgs.unroll`` instead.
    """

    def __init__(
        self,
        cells: Sequence[Any],
        *,
        bidirectional: bool = False,
        batch_first: bool = False,
        dropout: float = 0.0,
        reverse: bool = False,
        output: str = "sequence",
        backend: str = "scan",
        checkpoint: int | None = None,
        rng: Rng = None,
    ) -> None:
        name, directions = type(self).__name__, 2 if bidirectional else 1
        if output not in ("sequence", "last"):
            raise ValueError(f"{name}: output {output!r} was given, expected sequence or last")
        if not isinstance(cells, (list, tuple)):
            raise ValueError(
                f"{name}: a {type(cells).__name__} was given, expected a list of cells"
            )
        for k, cell in enumerate(cells):
            if isinstance(cell, type) or not callable(cell):
                found = f"class {cell.__name__}" if isinstance(cell, type) else repr(cell)[:60]
                raise ValueError(
                    f"{name}: cells[{k}]: {found} was given, expected a cell that is made already "
                    "and called as y, state = cell(x, state)"
                )
        if not len(cells) or len(cells) % directions:
            raise ValueError(
                f"{name}: {len(cells)} cells were given, expected {directions} for each layer"
            )
        if reverse and bidirectional:
            raise ValueError(f"{name}: reverse was given beside bidirectional, expected one")
        if backend not in BACKENDS:
            raise ValueError(
                f"{name}: backend {backend!r} was given, expected one of {', '.join(BACKENDS)}"
            )
        if checkpoint is not None:
            checkpoint = whole(checkpoint, f"{name}: checkpoint")
            if backend != "scan":
                raise ValueError(
                    f"{name}: checkpoint was given beside backend={backend!r}, expected one: the "
                    "tape keeps every step"
                )
        self.cells = list(cells)
        self.directions, self.batch_first, self.reverse = directions, batch_first, reverse
        self.backend, self.output, self.checkpoint = backend, output, checkpoint
        self.dropout = Dropout(probability(dropout, f"{name}: dropout"), rng=rng)
        if dropout and len(cells) == directions:
            warnings.warn(
                f"{name}: dropout={dropout} was given for one layer; it is between "
                "layers, so nothing is dropped",
                stacklevel=2 + (type(self) is not Recurrent),
            )

    @property
    def num_layers(self) -> int:
        """How many layers there are, each of one cell or, in both directions, two."""
        return len(self.cells) // self.directions

    @property
    def looks_ahead(self) -> bool:
        """Whether it runs from the last step to the first, alone or beside the other direction."""
        return self.reverse or self.directions == 2

    def forward(
        self, x: Any, state: Any = None, lengths: Any = None, resets: Any = None
    ) -> tuple[Tensor, Any]:
        ys = self._as_tensors(x)
        if self.batch_first:
            if resets is not None:
                resets = host_array(resets, "resets")
                shape = leaves(ys)[0].shape[:2]
                if resets.shape != shape:
                    raise ShapeError(
                        f"{type(self).__name__}: resets has shape {resets.shape}, expected (B, T) "
                        f"= {shape}"
                    )
                resets = resets.T
            ys = map_leaves(_swapped, ys)
        drive = self._drive()
        more = {} if self.checkpoint is None else {"checkpoint": self.checkpoint}
        states, last = self.split_state(state), []
        for layer in range(self.num_layers):
            if layer:
                ys = self.dropout(ys)
            outputs = []
            for d in range(self.directions):
                k = layer * self.directions + d
                y, end = drive(
                    self.cells[k],
                    ys,
                    states[k],
                    lengths=lengths,
                    resets=resets,
                    reverse=self.reverse or d == 1,
                    **more,
                )
                self._check_output(y, k)
                outputs.append(y)
                last.append(end)
            if self.output == "last" and layer == self.num_layers - 1:
                outputs = [
                    _last_output(y, lengths, self.reverse or d == 1) for d, y in enumerate(outputs)
                ]
            ys = outputs[0] if self.directions == 1 else concat(outputs, axis=-1)
        if self.batch_first and self.output == "sequence":
            ys = _swapped(ys)
        return ys, self._join_states(last)

    def _as_tensors(self, x: Any) -> Any:
        """The inputs as tensors; raises a ShapeError if one has no axes of steps and rows."""
        name = type(self).__name__
        made = map_arrays(lambda leaf: as_tensor(leaf, name), x)
        for path, leaf in paths(made):
            if leaf.ndim < 2:
                axes = "(B, T, ...)" if self.batch_first else "(T, B, ...)"
                raise ShapeError(f"{name}: x{path} has shape {leaf.shape}, expected {axes}")
        return made

    def _check_output(self, y: Any, k: int) -> None:
        """Raise a ShapeError if what cell k gives cannot be joined, read by the next one or cut.

        A layer that does none of these returns whatever structure its cell does.
        """
        last = k >= len(self.cells) - self.directions
        if isinstance(y, Tensor):
            if y.ndim > 2 or self.directions == 1:
                return
            given = f"a tensor {y.shape}"
        else:
            as_it_is = last and self.output == "sequence" and not self.batch_first
            if as_it_is and self.directions == 1:
                return
            given = structure(y)
        raise ShapeError(
            f"{type(self).__name__}: the outputs of cell {k} ({type(self.cells[k]).__name__}) are "
            f"{given}, expected a tensor (T, B, H); let the cell return (B, H), or run it by "
            "tgs.scan"
        )

    def split_state(self, state: Any) -> Sequence[Any]:
        """The state of each cell."""
        if state is None:
            return [None] * len(self.cells)
        if not isinstance(state, (tuple, list)) or len(state) != len(self.cells):
            raise ShapeError(
                f"{type(self).__name__}: state is {structure(state)}, expected a tuple "
                f"of {len(self.cells)}, one for each cell"
            )
        return state

    def _drive(self) -> Any:
        """What runs a cell over a sequence."""
        return BACKENDS[self.backend]

    def _join_states(self, states: Sequence[Any]) -> Any:
        return tuple(states)


def _swapped(x: Tensor) -> Tensor:
    """Steps and rows of the batch change places."""
    return permute_dims(x, (1, 0, *range(2, x.ndim)))


def _last_output(ys: Tensor, lengths: Any, reverse: bool) -> Tensor:
    """The output (B, H) that a direction ends with."""
    if not len(ys):
        return sum(ys, axis=0)
    if reverse or lengths is None:
        return ys[0 if reverse else -1]
    rows = host_array(lengths, "lengths")  # a row of length 0 has zeros at any step
    at = np.maximum(rows, 1) - 1, np.arange(len(rows))
    return ys[tuple(devices.to_device(index, ys.device) for index in at)]


class _Stacked(Recurrent):
    """Cells of one kind, whose states are stacked into tensors (num_layers·D, B, H)."""

    cell: type[RNNCell] | type[LSTMCell] | type[GRUCell]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        reverse: bool = False,
        output: str = "sequence",
        backend: str = "scan",
        checkpoint: int | None = None,
        dtype: DTypeLike | None = None,
        rng: Rng = None,
        **cell_options: Any,
    ) -> None:
        directions = 2 if bidirectional else 1
        rng = None if rng is None else generator(rng)  # one for all, or the package's own each time
        self.input_size, self.hidden_size = input_size, hidden_size
        options = {"bias": bias, "dtype": dtype, "rng": rng, **cell_options}
        taken = [name for name in signature(self.cell).parameters if name not in OF_LAYER]
        for name in cell_options:
            if name not in taken:
                raise TypeError(
                    f"{type(self).__name__}: {name}= was given, expected options of the layer or "
                    f"those of {self.cell.__name__}: {', '.join(taken)}"
                )
        cells: list[Any] = []
        for _ in range(whole(num_layers, f"{type(self).__name__}: num_layers")):
            size = directions * cells[0].output_size if cells else input_size
            cells += [self.cell(size, hidden_size, **options) for _ in range(directions)]
        super().__init__(
            cells,
            bidirectional=bidirectional,
            batch_first=batch_first,
            dropout=dropout,
            reverse=reverse,
            output=output,
            backend=backend,
            checkpoint=checkpoint,
            rng=rng,
        )

    def _as_tensors(self, x: TensorLike) -> Tensor:
        x = as_tensor(x, type(self).__name__)
        shape = x.shape
        if len(shape) != 3:
            axes = "(B, T, I)" if self.batch_first else "(T, B, I)"
            raise ShapeError(f"{type(self).__name__}: x has shape {shape}, expected {axes}")
        if shape[-1] != self.input_size:
            raise ShapeError(
                f"{type(self).__name__}: x has shape {shape}, expected {self.input_size} "
                "elements in the last axis (input_size)"
            )
        return x

    def split_state(self, state: Any) -> Sequence[Any]:
        if state is None:
            return [None] * len(self.cells)
        expected = self.cells[0].initial_state(1)
        name, count = type(self).__name__, len(self.cells)
        if structure(state) != structure(expected):
            shapes = [f"({count}, B, {leaf.shape[1]})" for leaf in leaves(expected)]
            raise ShapeError(
                f"{name}: state is {structure(state)}, expected {structure(expected)} with leaves "
                f"{' and '.join(dict.fromkeys(shapes))}"
            )
        state = map_leaves(lambda leaf: as_tensor(leaf, f"{name}: state"), state)
        for (path, leaf), like in zip(paths(state), leaves(expected), strict=True):
            if leaf.ndim != 3 or (leaf.shape[0], leaf.shape[2]) != (count, like.shape[1]):
                raise ShapeError(
                    f"{name}: state{path} has shape {leaf.shape}, expected "
                    f"({count}, B, {like.shape[1]}): layers times directions first"
                )
        return [map_leaves(lambda leaf, k=k: leaf[k], state) for k in range(len(self.cells))]

    def _drive(self) -> Any:
        quick = len(self.cells) == 1 and self.backend == "scan"
        return scan_layer if quick else super()._drive()

    def _join_states(self, states: Sequence[Any]) -> Any:
        if len(states) == 1 and self.backend == "scan":
            return states[0]  # a stack of one already
        return map_columns(stack, list(states))


class RNN(_Stacked):
    """Simple recurrent layers: ``RNN(input_size, hidden_size, num_layers=1, ...)``.

    ``RNNCell`` has the equation and the further keywords, ``Recurrent`` the call.
    x (T, B, input_size), ys (T, B, D·hidden_size) or, with ``output="last"``, (B, D·hidden_size),
    state (num_layers·D, B, hidden_size).
    """

    cell = RNNCell


class LSTM(_Stacked):
    """LSTM layers: ``LSTM(input_size, hidden_size, num_layers=1, ...)``.

    ``LSTMCell`` has the equations and the further keywords, ``Recurrent`` the call.
    x (T, B, input_size), ys (T, B, D·hidden_size), state (h, c), each
    (num_layers·D, B, hidden_size). With ``projection_size`` that is the width of ys and h.
    """

    cell = LSTMCell


class GRU(_Stacked):
    """GRU layers: ``GRU(input_size, hidden_size, num_layers=1, ...)``.

    ``GRUCell`` has the equations and the further keywords, ``Recurrent`` the call.
    x (T, B, input_size), ys (T, B, D·hidden_size), state (num_layers·D, B, hidden_size).
    """

    cell = GRUCell
