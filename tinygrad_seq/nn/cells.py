"""Recurrent cells: one step, ``y, state = cell(x, state)``, written from primitives.

A cell is a module, but any callable of that form will do wherever a cell is wanted. The shapes are
B rows of a batch, I inputs, H hidden units, G gates. Weights are stored gate upon gate.
Imports the engine and module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from tinygrad_seq.composites import split
from tinygrad_seq.creation import Rng, generator
from tinygrad_seq.elementwise import gelu, relu, sigmoid, silu, softplus, tanh
from tinygrad_seq.errors import ShapeError, whole
from tinygrad_seq.nn.init import stacked
from tinygrad_seq.nn.module import Module, parameter
from tinygrad_seq.tensors import Tensor, wrap
from tinygrad_seq.trees import structure

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": tanh,
    "relu": relu,
    "sigmoid": sigmoid,
    "softplus": softplus,
    "silu": silu,
    "gelu": gelu,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The elementwise function of this name. Raises ValueError for other names."""
    if name not in ACTIVATIONS:
        raise ValueError(
            f"nonlinearity: {name!r} was given, expected one of {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


class _Cell(Module):
    """Weights of G gates for the input and for the state, and the zero state."""

    gates = 1

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool,
        recurrent: str,
        dtype: DTypeLike | None,
        rng: Rng,
    ) -> None:
        I, H = whole(input_size, "input_size"), whole(hidden_size, "hidden_size")
        self.input_size, self.hidden_size = I, H
        rng = generator(rng)
        self.weight_ih = parameter(stacked("glorot", self.gates, H, I, rng), dtype)
        self.weight_hh = parameter(stacked(recurrent, self.gates, H, H, rng), dtype)
        self.bias = parameter(np.zeros(self.gates * H), dtype) if bias else None

    def initial_state(self, batch_size: int) -> Any:
        """Zeros (batch_size, hidden_size) in the dtype of the parameters."""
        return wrap(np.zeros((batch_size, self.hidden_size), self.weight_hh.dtype), None)

    def _check(self, x: Tensor, *state: Tensor) -> None:
        """Raise a ShapeError unless x is (B, I) and each leaf of the state (B, H)."""
        name, I, H = type(self).__name__, self.input_size, self.hidden_size
        if x.ndim != 2 or x.shape[1] != I:
            raise ShapeError(
                f"{name}: x has shape {x.shape}, expected (B, {I}): a row for each row of the "
                "batch, for one step; over a sequence (T, B, I) run tgs.unroll"
            )
        for leaf in state:
            if leaf.shape != (x.shape[0], H):
                raise ShapeError(
                    f"{name}: the state has shape {leaf.shape}, expected ({x.shape[0]}, {H}) for x "
                    f"{x.shape}"
                )

    def _plus_bias(self, z: Tensor) -> Tensor:
        return z if self.bias is None else z + self.bias


class RNNCell(_Cell):
    """The simple recurrent network (Elman 1990).

        h' = act(W x + U h + b)

    x (B, input_size), h (B, hidden_size); y = h'. ``weight_ih`` is W (H, I), ``weight_hh`` is
    U (H, H), ``bias`` is b (H,). ``nonlinearity`` names the activation: tanh, relu, sigmoid,
    softplus, silu or gelu. ``recurrent`` names how U starts: orthogonal, glorot or identity, the
    last for ReLU (Le, Jaitly, Hinton 2015).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        nonlinearity: str = "tanh",
        bias: bool = True,
        *,
        recurrent: str = "orthogonal",
        dtype: DTypeLike | None = None,
        rng: Rng = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, recurrent, dtype, rng)
        self.nonlinearity = nonlinearity
        activation(nonlinearity)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        self._check(x, h)
        act = activation(self.nonlinearity)
        h = act(self._plus_bias(x @ self.weight_ih.T + h @ self.weight_hh.T))
        return h, h


class LSTMCell(_Cell):
    """Long short-term memory (Hochreiter and Schmidhuber 1997; forget gate: Gers et al. 2000).

        i = σ(W_i x + U_i h + b_i)      input gate: take the input in?
        f = σ(W_f x + U_f h + b_f)      forget gate: keep what memory holds?
        g = tanh(W_g x + U_g h + b_g)   candidate, C̃ in many texts
        o = σ(W_o x + U_o h + b_o)      output gate: emit?
        c' = f * c + i * g              memory
        h' = o * tanh(c')

    x (B, input_size), state (h, c), each (B, hidden_size); y = h'. ``weight_ih`` (4H, I),
    ``weight_hh`` (4H, H), ``bias`` (4H,), gates in the order i, f, g, o. ``forget_bias`` is the
    value that b_f starts from (Jozefowicz et al. 2015).
    """

    gates = 4

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        forget_bias: float = 1.0,
        *,
        recurrent: str = "orthogonal",
        dtype: DTypeLike | None = None,
        rng: Rng = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, recurrent, dtype, rng)
        if self.bias is not None:
            start = np.zeros((4, hidden_size))
            start[1] = forget_bias
            self.bias = parameter(start.reshape(-1), dtype)

    def initial_state(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Zeros (h, c), each (batch_size, hidden_size)."""
        return super().initial_state(batch_size), super().initial_state(batch_size)

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if not isinstance(state, tuple) or len(state) != 2:
            raise ShapeError(f"LSTMCell: the state is {structure(state)}, expected a pair (h, c)")
        h, c = state
        self._check(x, h, c)
        z = self._plus_bias(x @ self.weight_ih.T + h @ self.weight_hh.T)
        i, f, g, o = split(z, 4, axis=-1)
        c = sigmoid(f) * c + sigmoid(i) * tanh(g)
        h = sigmoid(o) * tanh(c)
        return h, (h, c)


class GRUCell(_Cell):
    """The gated recurrent unit (Cho et al. 2014), with z as in Chung et al. 2014.

        r = σ(W_r x + U_r h + b_r)            reset gate
        z = σ(W_z x + U_z h + b_z)            update gate
        n = tanh(W_n x + U_n (r * h) + b_n)   candidate, h̃ in many texts
        h' = (1 − z) * h + z * n

    x (B, input_size), h (B, hidden_size); y = h'. ``weight_ih`` (3H, I), ``weight_hh`` (3H, H),
    ``bias`` (3H,), gates in the order r, z, n. Cho et al., PyTorch, Keras and ONNX use z the other
    way round: their z is 1 − z here. With ``reset_after`` the reset gate acts after the product, as
    cuDNN has it, with a bias of its own, ``bias_hh`` (3H,), and r and z add both biases:

        n = tanh(W_n x + b_n + r * (U_n h + b_hh_n))
    """

    gates = 3

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        reset_after: bool = False,
        *,
        recurrent: str = "orthogonal",
        dtype: DTypeLike | None = None,
        rng: Rng = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, recurrent, dtype, rng)
        self.reset_after = reset_after
        self.bias_hh = parameter(np.zeros(3 * hidden_size), dtype) if bias and reset_after else None

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        self._check(x, h)
        step = self._reset_after if self.reset_after else self._reset_before
        z, n = step(self._plus_bias(x @ self.weight_ih.T), h)
        h = (1 - z) * h + z * n
        return h, h

    def _reset_before(self, from_x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        H = self.hidden_size
        U_gates, U_n = split(self.weight_hh, [2 * H])
        r, z = split(sigmoid(from_x[:, : 2 * H] + h @ U_gates.T), 2, axis=-1)
        return z, tanh(from_x[:, 2 * H :] + (r * h) @ U_n.T)

    def _reset_after(self, from_x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        H = self.hidden_size
        from_h = h @ self.weight_hh.T
        if self.bias_hh is not None:
            from_h = from_h + self.bias_hh
        r, z = split(sigmoid(from_x[:, : 2 * H] + from_h[:, : 2 * H]), 2, axis=-1)
        return z, tanh(from_x[:, 2 * H :] + r * from_h[:, 2 * H :])
