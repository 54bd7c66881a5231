"""Layers without a recurrence: Linear, Embedding, Dropout, LayerNorm, Sequential.

Imports the engine, module and init.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from tinygrad_seq import devices
from tinygrad_seq.composites import mean
from tinygrad_seq.creation import Rng, generator, rand
from tinygrad_seq.elementwise import sqrt, square, where
from tinygrad_seq.errors import ShapeError, called, number, probability, whole
from tinygrad_seq.nn.init import glorot
from tinygrad_seq.nn.module import Module, parameter
from tinygrad_seq.structural import linear
from tinygrad_seq.tensors import FLOATS, Tensor, TensorLike, as_tensor
from tinygrad_seq.trees import structure


class Linear(Module):
    """y = x Wᵀ + b. x (..., in_features), y (..., out_features).

    ``weight`` is W (out_features, in_features), started as Glorot has it; ``bias`` is b
    (out_features,), started at zero.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        dtype: DTypeLike | None = None,
        rng: Rng = None,
    ) -> None:
        columns = whole(in_features, "Linear: in_features")
        rows = whole(out_features, "Linear: out_features")
        self.weight = parameter(glorot(rows, columns, rng), dtype)
        self.bias = parameter(np.zeros(rows), dtype) if bias else None

    def forward(self, x: TensorLike) -> Tensor:
        x = as_tensor(x, "Linear")
        if not x.ndim or x.shape[-1] != self.weight.shape[1]:
            raise ShapeError(
                f"Linear: x has shape {x.shape}, expected {self.weight.shape[1]} elements in the "
                "last axis (in_features)"
            )
        return linear(x, self.weight, self.bias)


class Embedding(Module):
    """A vector for each integer: (...) integers from 0 to num_embeddings − 1 to (..., D).

    ``weight`` (num_embeddings, embedding_dim) starts with standard normal numbers. An integer out
    of range raises ValueError; on a GPU, where looking at it would mean waiting, its vector is NaN.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        dtype: DTypeLike | None = None,
        rng: Rng = None,
    ) -> None:
        rows = whole(num_embeddings, "Embedding: num_embeddings")
        columns = whole(embedding_dim, "Embedding: embedding_dim")
        self.weight = parameter(generator(rng).standard_normal((rows, columns)), dtype)

    def forward(self, indices: TensorLike) -> Tensor:
        at = as_tensor(indices, "Embedding")
        count = self.weight.shape[0]
        if at.dtype.kind not in "iu":
            raise ValueError(f"Embedding: indices of dtype {at.dtype} given, expected integers")
        if at.device != devices.CPU:
            known = (at >= 0) & (at < count)
            return where(known.reshape(*at.shape, 1), self.weight[at], np.nan)
        if at.size and not 0 <= (low := at._data.min()) <= (high := at._data.max()) < count:
            raise ValueError(
                f"Embedding: indices from {low} to {high} were given, expected 0 to {count - 1}"
                if low >= 0
                else f"Embedding: index {low} was given, expected 0 to {count - 1}"
            )
        return self.weight[at]


class Dropout(Module):
    """Each element is dropped with probability ``p``, kept with 1 − p, while training.

    What is kept is divided by 1 − p, so that nothing need change in use (Srivastava et al. 2014).
    """

    def __init__(self, p: float = 0.5, *, rng: Rng = None) -> None:
        self.p = probability(p, "Dropout: p")
        self.rng = None if rng is None else generator(rng)

    def forward(self, x: TensorLike) -> Tensor:
        x = as_tensor(x, "Dropout")
        if not self.training or not self.p:
            return x
        if x.dtype not in FLOATS:
            x = x.to("float32")
        kept = rand(x.shape, rng=self.rng, device=x.device) >= self.p
        return x * (kept.to(x.dtype) * (1 / (1 - self.p)))


class LayerNorm(Module):
    """γ (x − μ) / √(σ² + ε) + β, with μ and σ² over the last axis (Ba, Kiros, Hinton 2016).

    x (..., size); ``weight`` is γ and ``bias`` is β, each (size,), β unless ``bias`` is False.
    """

    def __init__(
        self, size: int, eps: float = 1e-5, bias: bool = True, *, dtype: DTypeLike | None = None
    ) -> None:
        self.eps = number(eps, "LayerNorm: eps")
        self.weight = parameter(np.ones(whole(size, "LayerNorm: size")), dtype)
        self.bias = parameter(np.zeros(size), dtype) if bias else None

    def forward(self, x: TensorLike) -> Tensor:
        x = as_tensor(x, "LayerNorm")
        if not x.ndim or x.shape[-1] != self.weight.size:
            raise ShapeError(
                f"LayerNorm: x has shape {x.shape}, expected {self.weight.size} elements in the "
                "last axis"
            )
        dtype = x.dtype
        if dtype == np.float16:  # squares leave its range
            x = x.to("float32")
        x = x - mean(x, -1, keepdims=True)
        x = x / sqrt(mean(square(x), -1, keepdims=True) + self.eps)
        y = self.weight * (x.to(dtype) if dtype == np.float16 else x)
        return y if self.bias is None else y + self.bias


def _takes(layer: Any, argument: str) -> bool:
    if isinstance(layer, Sequential):  # which takes whatever something in it does
        return any(_takes(each, argument) for each in layer.layers)
    if isinstance(layer, Module):
        kind: Any = type(layer)
        return argument in _arguments(kind)
    return argument in inspect.signature(layer).parameters


@cache
def _arguments(kind: Any) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def takes_state(layer: Any) -> bool:
    """Whether ``Sequential.with_state`` gives a module a state."""
    if isinstance(layer, Sequential):
        return any(map(takes_state, layer.layers))
    return hasattr(layer, "with_state") or (isinstance(layer, Module) and _takes(layer, "state"))


def _lengths_after(layer: Any, lengths: Any) -> Any:
    """The lengths of a layer's outputs: those given, unless it has ``output_lengths``."""
    change = getattr(layer, "output_lengths", None)
    return lengths if change is None or lengths is None else change(lengths)


class Sequential(Module):
    """Modules one after another, each given what the one before returned.

    Recurrent layers return ``(ys, state)``; ys is passed on. ``lengths`` and ``resets`` go to every
    module that takes them; ValueError if none does. What changes lengths, a convolution say, has
    ``output_lengths(lengths)``, and those go to the modules after it. ``model[k]`` is one of them,
    ``model[:-1]`` a Sequential of some, which are the same ones.
    """

    def __init__(self, *modules: Any) -> None:
        expected = "modules or functions, one by one"
        self.layers = [called(module, "Sequential", expected) for module in modules]

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: int | slice) -> Any:
        found = self.layers[index]
        return Sequential(*found) if isinstance(index, slice) else found

    def forward(self, x: Any, lengths: Any = None, resets: Any = None) -> Any:
        return self._run(x, {"lengths": lengths, "resets": resets}, None)[0]

    def with_state(
        self, x: Any, state: Any = None, lengths: Any = None, resets: Any = None
    ) -> tuple[Any, Any]:
        """The output, and the state to go on from at the next call: ``(y, state)``.

        The state is a tuple with that of each module in it that takes one, in order; None stands
        for the modules' own. Raises ShapeError for a state of other modules.
        """
        count = sum(map(takes_state, self.layers))
        states = (None,) * count if state is None else state
        if not count or not isinstance(states, (tuple, list)) or len(states) != count:
            raise ShapeError(
                f"Sequential: the state is {structure(state)}, expected a tuple of {count}, one "
                "for each module in it that takes a state"
                if count
                else "Sequential: no module in it takes a state, expected a recurrent layer"
            )
        y, after = self._run(x, {"lengths": lengths, "resets": resets}, iter(states))
        return y, tuple(after)

    def _run(
        self, x: Any, options: dict[str, Any], states: Iterator[Any] | None
    ) -> tuple[Any, list[Any]]:
        """The output of all modules, and, if ``states`` are those before, the states after it."""
        after: list[Any] = []
        given = {name: value for name, value in options.items() if value is not None}
        takes = [[name for name in given if _takes(layer, name)] for layer in self.layers]
        for name in given:
            if not any(name in names for names in takes):
                raise ValueError(f"Sequential: {name} were given, but no module in it takes them")
        for layer, names in zip(self.layers, takes, strict=True):
            # A module before it may have left no lengths.
            more = {name: given[name] for name in names if given[name] is not None}
            if states is not None and takes_state(layer):
                run = getattr(layer, "with_state", layer)
                x, state = run(x, next(states), **more)
                after.append(state)
            else:
                x = layer(x, **more)
            if "lengths" in given:
                given["lengths"] = _lengths_after(layer, given["lengths"])
            if isinstance(x, tuple):
                x = x[0]
        return x, after

    def output_lengths(self, lengths: Any) -> Any:
        """The lengths (B,) of what comes out; None if it has none any more."""
        for layer in self.layers:
            lengths = _lengths_after(layer, lengths)
        return lengths
