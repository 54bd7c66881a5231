"""The gate, from which cells are made: activations, stacked weights, and what holds a state still.

The shapes are B rows of a batch, I inputs, H hidden units, G gates. Weights are stored gate upon
gate. Imports the engine, module, layers and init.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import DTypeLike

from tinygrad_seq.creation import Rng, generator, rand, zeros
from tinygrad_seq.elementwise import clip, gelu, relu, sigmoid, silu, softplus, tanh, where
from tinygrad_seq.errors import ShapeError, positive, probability, whole
from tinygrad_seq.nn.init import stacked
from tinygrad_seq.nn.layers import LayerNorm
from tinygrad_seq.nn.module import Module, parameter
from tinygrad_seq.structural import linear
from tinygrad_seq.tensors import Tensor
from tinygrad_seq.trees import structure

Activation = Callable[[Tensor], Tensor]


def identity(z: Tensor) -> Tensor:
    """z itself."""
    return z


def hard_sigmoid(z: Tensor) -> Tensor:
    """z / 6 + 1/2, held between 0 and 1."""
    return clip(z * (1 / 6) + 0.5, 0.0, 1.0)


ACTIVATIONS: dict[str, Activation] = {
    "tanh": tanh,
    "relu": relu,
    "sigmoid": sigmoid,
    "softplus": softplus,
    "silu": silu,
    "gelu": gelu,
    "hard_sigmoid": hard_sigmoid,
    "linear": identity,
}


def find_activation(name: str | Activation, what: str = "nonlinearity") -> Activation:
    """The elementwise function of this name, or a function as it is. ValueError for other names."""
    if callable(name):
        return name
    if name not in ACTIVATIONS:
        raise ValueError(
            f"{what}: {name!r} was given, expected one of {', '.join(ACTIVATIONS)}, or a function "
            "of a tensor"
        )
    return ACTIVATIONS[name]


class Gate(Module):
    """A gate, what every gated cell is made of: Γ = act(W x + U a + b).

    x (B, input_size), a (B, state_size), most often the state before the step; Γ
    (B, hidden_size), from 0 to 1 if act is the sigmoid. ``weight_ih`` is W (H, I), ``weight_hh`` is
    U (H, state_size), which is (H, H) unless ``state_size`` is given, ``bias`` is b (H,).

    With ``count`` = G gates in one, as the cells of this package have them, weights and values are
    stacked: W (G·H, I), U (G·H, H), b (G·H,), Γ (B, G·H), cut with ``tgs.split``. ``recurrent``
    names how U starts: orthogonal, glorot or identity. Raises ShapeError for x and a of other
    shapes. Two options change the sum:

    - ``layer_norm``: LN(W x) + LN(U a) + b, where LN scales to mean 0 and variance 1 over the last
      axis and by a learned γ (Ba, Kiros, Hinton 2016).
    - ``recurrent_dropout`` = p: while training, units of a are dropped with probability p where U
      reads them, the same ones at all steps of a sequence, the others divided by 1 − p (Gal and
      Ghahramani 2016).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        count: int = 1,
        activation: str | Activation = "sigmoid",
        state_size: int | None = None,
        recurrent: str = "orthogonal",
        layer_norm: bool = False,
        recurrent_dropout: float = 0.0,
        dtype: DTypeLike | None = None,
        rng: Rng = None,
    ) -> None:
        name = type(self).__name__
        I, H = whole(input_size, f"{name}: input_size"), whole(hidden_size, f"{name}: hidden_size")
        S = H if state_size is None else whole(state_size, f"{name}: state_size")
        G = whole(count, f"{name}: count")
        self.input_size, self.hidden_size, self.count = I, H, G
        self.activation = find_activation(activation, "activation")
        self.recurrent_dropout = probability(recurrent_dropout, f"{name}: recurrent_dropout")
        rng = generator(rng)
        self.weight_ih = parameter(stacked("glorot", G, H, I, rng), dtype)
        self.weight_hh = parameter(stacked(recurrent, G, H, S, rng), dtype)
        self.bias = parameter(np.zeros(G * H), dtype) if bias else None
        self.norm_ih = LayerNorm(G * H, bias=False, dtype=dtype) if layer_norm else None
        self.norm_hh = LayerNorm(G * H, bias=False, dtype=dtype) if layer_norm else None

    def forward(self, x: Tensor, a: Tensor) -> Tensor:
        for name, value, weight in (("x", x, self.weight_ih), ("a", a, self.weight_hh)):
            if value.ndim != 2 or value.shape[1] != weight.shape[1]:
                raise ShapeError(
                    f"{type(self).__name__}: {name} has shape {value.shape}, expected "
                    f"(B, {weight.shape[1]}): a row for each row of the batch, for one step"
                )
        return self.activation(self.sums(x, a))

    def sums(self, x: Tensor, a: Tensor) -> Tensor:
        """W x + U a + b, (B, G·H)."""
        z = self.from_input(x) + self.from_state(self.dropped(a))
        return z if self.bias is None else z + self.bias

    def from_input(self, x: Tensor) -> Tensor:
        """W x, (B, G·H)."""
        z = linear(x, self.weight_ih)
        return z if self.norm_ih is None else self.norm_ih(z)

    def from_state(self, a: Tensor) -> Tensor:
        """U a, (B, G·H)."""
        z = linear(a, self.weight_hh)
        return z if self.norm_hh is None else self.norm_hh(z)

    def dropped(self, a: Tensor) -> Tensor:
        """a with units dropped for the whole sequence, if training with ``recurrent_dropout``."""
        p = self.recurrent_dropout
        if not p or not self.training:
            return a
        kept = rand(a.shape, per_sequence=True, device=a.device) >= p
        mask = kept.to(a.dtype) * (1 / (1 - p))  # a name, by which explain and draw_cell show it
        return a * mask


class GatedCell(Gate):
    """A cell's gates by name, its zero state, and the options that hold a state still.

    ``names`` are the gates in the order in which they are stacked; ``functions`` names the
    activation of each, and of whatever else the cell applies one to.
    """

    names: tuple[str, ...] = ("h",)
    functions: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool,
        *,
        names: tuple[str, ...] | None = None,
        activations: Mapping[str, str | Activation] | None = None,
        zoneout: float | tuple[float, ...] = 0.0,
        clip: float | None = None,
        **options: Any,
    ) -> None:
        self.gates = self.names if names is None else names
        super().__init__(input_size, hidden_size, bias, count=len(self.gates), **options)
        if activations is not None and not isinstance(activations, Mapping):
            raise ValueError(
                f"{type(self).__name__}: activations is {activations!r}, expected a dict such as "
                f"{dict(self.functions)}"
            )
        given = dict(activations or {})
        if unknown := [name for name in given if name not in self.functions]:
            raise ValueError(
                f"{type(self).__name__}: activations for {', '.join(map(repr, unknown))} were "
                f"given, expected them for {', '.join(self.functions) or 'none'}"
            )
        self.act = {
            name: find_activation(given.get(name, usual), f"activations[{name!r}]")
            for name, usual in self.functions.items()
        }
        each = zoneout if isinstance(zoneout, (tuple, list)) else [zoneout] * len(self.state_sizes)
        if len(each) != len(self.state_sizes):
            raise ValueError(
                f"{type(self).__name__}: zoneout is {zoneout}, expected a probability, or "
                f"{len(self.state_sizes)}, one for each leaf of the state"
            )
        self.zoneout = tuple([probability(p, f"{type(self).__name__}: zoneout") for p in each])
        self.clip = None if clip is None else positive(clip, f"{type(self).__name__}: clip")

    @property
    def state_sizes(self) -> tuple[int, ...]:
        """The width of each leaf of the state, the output's first."""
        return (self.hidden_size,)

    @property
    def output_size(self) -> int:
        return self.state_sizes[0]

    def initial_state(self, batch_size: int) -> Any:
        """Zeros (batch_size, hidden_size), in the dtype of the parameters and on their device."""
        dtype, device = self.weight_hh.dtype, self.weight_hh.device
        leaves = tuple(
            [zeros(batch_size, size, dtype=dtype, device=device) for size in self.state_sizes]
        )
        return leaves[0] if len(leaves) == 1 else leaves

    def clipped(self, state: Tensor) -> Tensor:
        """The state held between ±``clip``."""
        return state if self.clip is None else clip(state, -self.clip, self.clip)

    def held(self, new: Tensor, old: Tensor, leaf: int = 0) -> Tensor:
        """Zoneout: units of the state that keep their value from the step before."""
        p = self.zoneout[leaf]
        if not p:
            return new
        if not self.training:
            return p * old + (1 - p) * new
        return where(rand(new.shape, device=new.device) < p, old, new)

    def check(self, x: Tensor, *state: Tensor) -> None:
        """Raise a ShapeError unless x is (B, I) and the leaves of the state are as they must be."""
        name, I = type(self).__name__, self.input_size
        if x.ndim != 2 or x.shape[1] != I:
            raise ShapeError(
                f"{name}: x of one step has shape {x.shape}, expected (B, {I}), a row for each row "
                f"of the batch; of a sequence, for tgs.scan or a layer, it is (T, B, {I})"
            )
        for leaf, H in zip(state, self.state_sizes, strict=True):
            if not hasattr(leaf, "shape"):
                raise ShapeError(
                    f"{name}: the state is {structure(leaf)}, expected a tensor ({x.shape[0]}, {H})"
                )
            if leaf.shape != (x.shape[0], H):
                raise ShapeError(
                    f"{name}: the state has shape {leaf.shape}, expected ({x.shape[0]}, {H}) for x "
                    f"{x.shape}"
                )
