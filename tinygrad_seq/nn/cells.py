"""Recurrent cells: one step, ``y, state = cell(x, state)``, written from gates and primitives.

A cell is a module, but any callable of that form will do wherever a cell is wanted. The shapes are
B rows of a batch, I inputs, H hidden units, G gates. Weights are stored gate upon gate.
Imports the engine, gates, init, layers and module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import DTypeLike

from tinygrad_seq.composites import split
from tinygrad_seq.creation import Rng, generator
from tinygrad_seq.errors import ShapeError, whole
from tinygrad_seq.nn.gates import Activation, GatedCell, find_activation
from tinygrad_seq.nn.init import glorot
from tinygrad_seq.nn.layers import LayerNorm, Linear
from tinygrad_seq.nn.module import Module, parameter
from tinygrad_seq.structural import linear
from tinygrad_seq.tensors import Tensor
from tinygrad_seq.trees import structure


class RNNCell(GatedCell):
    """The simple recurrent network (Elman 1990).

        h' = act(W x + U h + b)

    x (B, input_size), h (B, hidden_size); y = h'. ``weight_ih`` is W (H, I), ``weight_hh`` is
    U (H, H), ``bias`` is b (H,). ``nonlinearity`` names the activation: tanh, relu, sigmoid,
    softplus, silu, gelu, hard_sigmoid or linear, or is a function of a tensor. ``recurrent`` names
    how U starts: orthogonal, glorot or identity, the last for ReLU (Le, Jaitly, Hinton 2015).

    The options of all cells: ``layer_norm`` and ``recurrent_dropout``, as ``nn.Gate`` has them;
    ``zoneout`` = p (Krueger et al. 2017): while training each unit of the state keeps its value
    with probability p, in use h' becomes p h + (1 − p) h'; ``clip`` = c: the state is held between
    −c and c.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        nonlinearity: str | Activation = "tanh",
        bias: bool = True,
        *,
        recurrent: str = "orthogonal",
        layer_norm: bool = False,
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
        clip: float | None = None,
        dtype: DTypeLike | None = None,
        rng: Rng = None,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            bias,
            zoneout=zoneout,
            clip=clip,
            recurrent=recurrent,
            layer_norm=layer_norm,
            recurrent_dropout=recurrent_dropout,
            dtype=dtype,
            rng=rng,
        )
        self.nonlinearity = nonlinearity
        self.activation = find_activation(nonlinearity)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        self.check(x, h)
        h = self.held(self.clipped(self.activation(self.sums(x, h))), h)
        return h, h


class LSTMCell(GatedCell):
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

    Options, which go together in any way:

    - ``peephole``: gates see the memory, i and f that of before, o the new one: p * c is added to
      their sums (Gers and Schmidhuber 2000). ``weight_peephole`` (3H,), in the order i, f, o.
    - ``coupled``: i = 1 − f (Greff et al. 2017). There is no input gate then: (3H, ...), f, g, o.
    - ``projection_size`` = P: h' = W_hr (o * tanh(c')), (B, P) (Sak et al. 2014). ``weight_hr``
      (P, H), and ``weight_hh`` is (4H, P).
    - ``layer_norm``, ``recurrent_dropout``, as ``nn.Gate`` has them; with ``layer_norm`` also
      h' = o * tanh(LN(c')).
    - ``zoneout`` = p, or one for h and one for c, as ``nn.RNNCell`` has it, and ``clip``, of c'.
    - ``activations``: for each of i, f, g, o, and h for the one of c', another function or its
      name.
    - ``chrono`` = T: b_f starts at ln u, u uniform from 1 to T − 1, and b_i at −b_f, for memories
      up to T steps long (Tallec and Ollivier 2018), in place of ``forget_bias``.
    """

    names = ("i", "f", "g", "o")
    functions: ClassVar = {"i": "sigmoid", "f": "sigmoid", "g": "tanh", "o": "sigmoid", "h": "tanh"}

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        forget_bias: float = 1.0,
        *,
        peephole: bool = False,
        coupled: bool = False,
        projection_size: int | None = None,
        layer_norm: bool = False,
        recurrent_dropout: float = 0.0,
        zoneout: float | tuple[float, float] = 0.0,
        clip: float | None = None,
        activations: Mapping[str, str | Activation] | None = None,
        chrono: int | None = None,
        recurrent: str = "orthogonal",
        dtype: DTypeLike | None = None,
        rng: Rng = None,
    ) -> None:
        P = projection_size
        P = None if P is None else whole(P, f"{type(self).__name__}: projection_size")
        rng = generator(rng)
        self.projection_size = P
        super().__init__(
            input_size,
            hidden_size,
            bias,
            names=self.names[1:] if coupled else None,
            activations=activations,
            zoneout=zoneout,
            clip=clip,
            state_size=P,
            recurrent=recurrent,
            layer_norm=layer_norm,
            recurrent_dropout=recurrent_dropout,
            dtype=dtype,
            rng=rng,
        )
        if not isinstance(forget_bias, (int, float, np.floating)) or not np.isfinite(forget_bias):
            raise ValueError(f"LSTMCell: forget_bias={forget_bias!r} was given, expected a number")
        H, self.coupled = hidden_size, coupled
        if self.bias is not None:
            forget = np.full(H, forget_bias) if chrono is None else chrono_bias(H, chrono, rng)
            start = dict.fromkeys(self.gates, np.zeros(H))
            start["f"] = forget
            if chrono is not None and not coupled:
                start["i"] = -forget
            self.bias = parameter(np.concatenate([start[name] for name in self.gates]), dtype)
        elif chrono is not None:
            raise ValueError("LSTMCell: chrono was given without a bias, expected bias=True")
        made = np.zeros((len(self.gates) - 1) * H)
        self.weight_peephole = parameter(made, dtype) if peephole else None
        self.weight_hr = None if P is None else parameter(glorot(P, H, rng), dtype)
        self.norm_c = LayerNorm(H, dtype=dtype) if layer_norm else None

    @property
    def state_sizes(self) -> tuple[int, ...]:
        return (self.projection_size or self.hidden_size, self.hidden_size)

    def forward(  # type: ignore[override]
        self, x: Tensor, state: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if not isinstance(state, tuple) or len(state) != 2:
            raise ShapeError(f"LSTMCell: the state is {structure(state)}, expected a pair (h, c)")
        h, c = state
        self.check(x, h, c)
        act, p = self.act, self.weight_peephole
        if self.coupled:
            i, (f, g, o) = None, split(self.sums(x, h), 3, axis=-1)
        else:
            i, f, g, o = split(self.sums(x, h), 4, axis=-1)
        if p is not None:
            *p_i, p_f, p_o = split(p, self.count - 1)
            if i is not None:
                i = i + p_i[0] * c
            f = f + p_f * c
        f = act["f"](f)
        new_c = self.clipped(f * c + (1 - f if i is None else act["i"](i)) * act["g"](g))
        if p is not None:
            o = o + p_o * new_c
        seen = new_c if self.norm_c is None else self.norm_c(new_c)
        new_h = act["o"](o) * act["h"](seen)
        if self.weight_hr is not None:
            new_h = linear(new_h, self.weight_hr)
        h, c = self.held(new_h, h, 0), self.held(new_c, c, 1)
        return h, (h, c)


class GRUCell(GatedCell):
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

    Options, which go together in any way: ``layer_norm`` (of W x, and of the products with U gates
    and candidate apart unless ``reset_after``) and ``recurrent_dropout``, as ``nn.Gate`` has them;
    ``zoneout`` and ``clip``, as ``nn.RNNCell`` has them; ``activations`` for r, z and n; ``chrono``
    = T: b_z starts at −ln u, u uniform from 1 to T − 1 (Tallec and Ollivier 2018).
    """

    names = ("r", "z", "n")
    functions: ClassVar = {"r": "sigmoid", "z": "sigmoid", "n": "tanh"}

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        reset_after: bool = False,
        *,
        layer_norm: bool = False,
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
        clip: float | None = None,
        activations: Mapping[str, str | Activation] | None = None,
        chrono: int | None = None,
        recurrent: str = "orthogonal",
        dtype: DTypeLike | None = None,
        rng: Rng = None,
    ) -> None:
        rng = generator(rng)
        super().__init__(
            input_size,
            hidden_size,
            bias,
            activations=activations,
            zoneout=zoneout,
            clip=clip,
            recurrent=recurrent,
            layer_norm=layer_norm,
            recurrent_dropout=recurrent_dropout,
            dtype=dtype,
            rng=rng,
        )
        H, self.reset_after = hidden_size, reset_after
        self.bias_hh = parameter(np.zeros(3 * H), dtype) if bias and reset_after else None
        self.norm_n = None
        if layer_norm and not reset_after:
            self.norm_hh = LayerNorm(2 * H, bias=False, dtype=dtype)
            self.norm_n = LayerNorm(H, bias=False, dtype=dtype)
        if chrono is not None:
            if self.bias is None:
                raise ValueError("GRUCell: chrono was given without a bias, expected bias=True")
            start = np.zeros(3 * H)
            start[H : 2 * H] = -chrono_bias(H, chrono, rng)
            self.bias = parameter(start, dtype)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        self.check(x, h)
        step = self._reset_after if self.reset_after else self._reset_before
        from_x = self.from_input(x)
        z, n = step(from_x if self.bias is None else from_x + self.bias, self.dropped(h))
        h = self.held(self.clipped((1 - z) * h + z * n), h)
        return h, h

    def _reset_before(self, from_x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        H = self.hidden_size
        U_gates, U_n = split(self.weight_hh, [2 * H])
        from_h = linear(h, U_gates)
        if self.norm_hh is not None:
            from_h = self.norm_hh(from_h)
        r, z = self._gates(from_x[:, : 2 * H] + from_h)
        from_h = linear(r * h, U_n)
        if self.norm_n is not None:
            from_h = self.norm_n(from_h)
        return z, self.act["n"](from_x[:, 2 * H :] + from_h)

    def _reset_after(self, from_x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        H = self.hidden_size
        from_h = self.from_state(h)
        if self.bias_hh is not None:
            from_h = from_h + self.bias_hh
        r, z = self._gates(from_x[:, : 2 * H] + from_h[:, : 2 * H])
        return z, self.act["n"](from_x[:, 2 * H :] + r * from_h[:, 2 * H :])

    def _gates(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        if self.act["r"] is self.act["z"]:
            r, z = split(self.act["r"](sums), 2, axis=-1)
            return r, z
        r, z = split(sums, 2, axis=-1)
        return self.act["r"](r), self.act["z"](z)


def chrono_bias(size: int, steps: int, rng: Rng) -> np.ndarray:
    """ln u, u uniform from 1 to steps − 1, (size,): how a forget gate starts that keeps so long."""
    longest = whole(steps, "chrono", least=2)
    return np.log(generator(rng).uniform(1, max(longest - 1, 1), size))


class Head(Module):
    """A cell with an output of its own: o = f(V y + b), y being what the cell returns.

    ``cell`` is any cell; its y (B, output_size of the cell) becomes o (B, output_size), the state
    is the cell's. ``activation`` is f, chosen by the problem: linear (logits, positions), sigmoid,
    softmax by way of ``nn.functional.cross_entropy``, or any function of a tensor. ``size`` is the
    width of y where the cell does not say it, in ``output_size`` or ``hidden_size``.
    """

    def __init__(
        self,
        cell: Callable[[Any, Any], tuple[Any, Any]],
        output_size: int,
        activation: str | Activation = "linear",
        bias: bool = True,
        *,
        size: int | None = None,
        dtype: DTypeLike | None = None,
        rng: Rng = None,
    ) -> None:
        if not callable(cell) or isinstance(cell, type):
            raise ValueError(
                f"Head: {cell!r:.60} was given as the cell, expected one that is called as "
                "y, state = cell(x, state)"
            )
        width = size or getattr(cell, "output_size", None) or getattr(cell, "hidden_size", None)
        if width is None:
            raise ValueError(
                f"Head: the cell {type(cell).__name__} has neither output_size nor hidden_size; "
                "pass size=, the width of what it returns as y"
            )
        self.cell = cell
        self.linear = Linear(width, output_size, bias, dtype=dtype, rng=rng)
        self.activation = find_activation(activation, "activation")
        self.output_size = output_size

    @property
    def initial_state(self) -> Any:
        """The cell's function of that name; an AttributeError if it has none."""
        return self.cell.initial_state  # type: ignore[attr-defined]

    def forward(self, x: Any, state: Any) -> tuple[Tensor, Any]:
        y, state = self.cell(x, state)
        return self.activation(self.linear(y)), state
