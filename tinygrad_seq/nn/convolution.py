"""Layers over (B, channels, length): convolution, pooling, batch normalisation.

Each takes ``lengths`` (B,), for rows of different lengths: what stands beyond a row's length may be
anything, NaN too; it counts for nothing, gets a gradient of exactly zero, and outputs there are 0.
Shapes: B rows of a batch, C channels in and O out, W elements in a row, N windows of K places.
All of it is made of the engine's operations, so nothing here has a derivative of its own.
Lengths are read on the host. Imports the engine, devices and module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from tinygrad_seq import devices
from tinygrad_seq.composites import mean, scaled_sum
from tinygrad_seq.creation import Rng, generator
from tinygrad_seq.elementwise import sqrt, square, where
from tinygrad_seq.errors import ShapeError, number, whole
from tinygrad_seq.nn.module import Module, parameter
from tinygrad_seq.rules import Array
from tinygrad_seq.structural import max, pad, stack, sum
from tinygrad_seq.tensors import (
    DEFAULT_FLOAT,
    FLOATS,
    Tensor,
    TensorLike,
    as_tensor,
    host_array,
    replace_data,
)


def _floating(x: TensorLike, layer: str) -> Tensor:
    x = as_tensor(x, layer)
    return x if x.dtype in FLOATS else x.to(DEFAULT_FLOAT)


def _rows(x: TensorLike, layer: str) -> Tensor:
    x = _floating(x, layer)
    if x.ndim != 3:
        raise ShapeError(
            f"{layer}: x has shape {x.shape}, expected (B, channels, length); one row alone goes "
            "in as x[None]"
        )
    return x


def _inside(lengths: Any, x: Tensor, layer: str) -> Array | None:
    """(B, 1, W) booleans, where x is: what is within its row's length. None if everything is."""
    if lengths is None:
        return None
    B, W = x.shape[0], x.shape[2]
    given = host_array(lengths, f"{layer}: lengths")
    if given.shape != (B,):
        raise ShapeError(
            f"{layer}: lengths has shape {given.shape}, expected ({B},): one for each row"
        )
    if given.dtype.kind not in "iu" and B:
        raise ValueError(f"{layer}: lengths has dtype {given.dtype}, expected integers")
    if B and not 0 <= given.min() <= given.max() <= W:
        raise ValueError(
            f"{layer}: lengths from {given.min()} to {given.max()} were given, expected 0 to {W}, "
            "the length of x; after a layer that changes it give layer.output_lengths(lengths)"
        )
    if (given == W).all():
        return None
    ends = devices.to_device(given.reshape(B, 1, 1), x.device)
    return devices.namespace(ends).arange(W) < ends


def _within(inside: Array | None, x: Tensor, other: float = 0.0) -> Tensor:
    return x if inside is None else where(inside, x, other)


# Windows ---------------------------------------------------------------------------------------


class _Windowed(Module):
    """A layer that slides a window along the rows: K places, ``dilation`` apart.

    ``around`` is how many places of ``outside`` are put before and after each row.
    """

    around: tuple[int, int]
    outside = 0.0

    def __init__(self, kernel_size: int, stride: int, dilation: int = 1) -> None:
        name = type(self).__name__
        self.kernel_size = whole(kernel_size, f"{name}: kernel_size")
        self.stride = whole(stride, f"{name}: stride")
        self.dilation = whole(dilation, f"{name}: dilation")

    def output_length(self, length: int) -> int:
        """How many windows fit along ``length`` elements: N = ⌊(W − F + 2P) / S⌋ + 1.

        F is the width of the window, dilation · (kernel_size − 1) + 1, 2P the padding on both sides
        together, S the stride. Raises ShapeError if there is none.
        """
        N = int(self.output_lengths(whole(length, f"{type(self).__name__}: length", least=0)))
        if not N:
            width = self.dilation * (self.kernel_size - 1) + 1
            raise ShapeError(
                f"{type(self).__name__}: rows of length {length} were given, to which padding adds "
                f"{self.around[0] + self.around[1]}, expected at least the {width} that a window "
                "spans, and one element; take a smaller kernel_size or dilation, or pad more"
            )
        return N

    def output_lengths(self, lengths: Any) -> np.ndarray:
        """``output_length`` for each of an array of lengths; 0 for those where no window fits."""
        W = host_array(lengths, f"{type(self).__name__}: lengths").astype(np.int64)
        spare = W + self.around[0] + self.around[1] - self.dilation * (self.kernel_size - 1) - 1
        return np.where((W > 0) & (spare >= 0), spare // self.stride + 1, 0)

    def forward(self, x: TensorLike, lengths: Any = None) -> Tensor:
        name = type(self).__name__
        x = _rows(x, name)
        N = self.output_length(x.shape[2])
        inside = _inside(lengths, x, name)
        x = _within(inside, x, self.outside)
        if any(self.around):
            x = pad(x, ((0, 0), (0, 0), self.around), self.outside)
        starts = range(0, self.dilation * self.kernel_size, self.dilation)
        y = self._combine([x[:, :, k : k + self.stride * N : self.stride] for k in starts])
        if inside is None:
            return y
        return _within(_inside(self.output_lengths(lengths), y, name), y)

    def _combine(self, places: Sequence[Tensor]) -> Tensor:
        """The outputs, from what stands in each place of all windows: K tensors (B, C, N)."""
        raise NotImplementedError


class Conv1d(_Windowed):
    """y[b, o, n] = Σ_c Σ_k weight[o, c, k] · x[b, c, S n + dilation k − P] + bias[o].

    x (B, in_channels, W), y (B, out_channels, N), N as ``output_length(W)`` says; S is the stride,
    and x is 0 outside. ``padding`` is how many zeros P to put on each side, or

    - ``"valid"``: none;
    - ``"same"``: as many as keep the length, half of them on each side, the odd one after; the
      stride must be 1;
    - ``"causal"``: all before, so that no output looks ahead; stride 1 keeps the length
      (van den Oord et al. 2016).

    ``weight`` (out_channels, in_channels, kernel_size) starts as Glorot has it, uniform in
    ±√(6 / ((in_channels + out_channels) · kernel_size)); ``bias`` (out_channels,) starts at zero.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int | str = 0,
        dilation: int = 1,
        *,
        bias: bool = True,
        dtype: DTypeLike | None = None,
        rng: Rng = None,
    ) -> None:
        C = whole(in_channels, "Conv1d: in_channels")
        O = whole(out_channels, "Conv1d: out_channels")
        super().__init__(kernel_size, stride, dilation)
        self.padding = padding
        self.around = self._zeros_around(padding)
        shape = O, C, self.kernel_size
        bound = np.sqrt(6.0 / ((O + C) * self.kernel_size))
        self.weight = parameter(generator(rng).uniform(-bound, bound, shape), dtype)
        self.bias = parameter(np.zeros(O), dtype) if bias else None

    def _zeros_around(self, padding: int | str) -> tuple[int, int]:
        if not isinstance(padding, str):
            P = whole(padding, "Conv1d: padding", least=0)
            return P, P
        total = self.dilation * (self.kernel_size - 1)
        if padding == "same" and self.stride > 1:
            raise ValueError(
                f"Conv1d: padding 'same' was given with stride {self.stride}, expected stride 1; "
                f"for ⌈W / {self.stride}⌉ outputs give padding='causal'"
            )
        kinds = {
            "valid": (0, 0),
            "same": (total // 2, total - total // 2),
            "causal": (total, 0),
        }
        if padding not in kinds:
            raise ValueError(
                f"Conv1d: padding {padding!r} was given, expected an integer from 0 on, 'valid', "
                "'same' or 'causal'"
            )
        return kinds[padding]

    def forward(self, x: TensorLike, lengths: Any = None) -> Tensor:
        x, C = _rows(x, "Conv1d"), self.weight.shape[1]
        if x.shape[1] != C:
            hint = "; permute_dims(x, (0, 2, 1)) puts channels first" if x.shape[2] == C else ""
            raise ShapeError(
                f"Conv1d: x has shape {x.shape}, expected (B, {C}, length): {C} channels "
                f"(in_channels) in axis 1{hint}"
            )
        return super().forward(x, lengths)

    def _combine(self, places: Sequence[Tensor]) -> Tensor:
        (B, C, N), K = places[0].shape, len(places)
        windows = stack(places, axis=2).reshape(B, C * K, N)
        y = self.weight.reshape(-1, C * K) @ windows
        return y if self.bias is None else y + self.bias.reshape(-1, 1)


class _Pool1d(_Windowed):
    """A pool of windows side by side, or ``stride`` apart."""

    def __init__(self, kernel_size: int, stride: int | None = None, padding: int = 0) -> None:
        super().__init__(kernel_size, kernel_size if stride is None else stride)
        name, most = type(self).__name__, self.kernel_size // 2
        self.padding = whole(padding, f"{name}: padding", least=0)
        if self.padding > most:
            raise ValueError(
                f"{name}: padding = {padding} was given with kernel_size = {kernel_size}, expected "
                f"at most half of that, {most}: a window would hold nothing but padding"
            )
        self.around = self.padding, self.padding


class MaxPool1d(_Pool1d):
    """The largest value of each window; ``padding`` never is. Equal ones share the gradient.

    x (B, C, W), y (B, C, N), N as ``output_length(W)`` says. ``stride`` is ``kernel_size`` unless
    given: windows side by side.
    """

    outside = -np.inf

    def _combine(self, places: Sequence[Tensor]) -> Tensor:
        return max(stack(places), axis=0)


class AvgPool1d(_Pool1d):
    """The mean of each window, zeros of the ``padding`` counted in.

    x (B, C, W), y (B, C, N), N as ``output_length(W)`` says. ``stride`` is ``kernel_size`` unless
    given: windows side by side.
    """

    def _combine(self, places: Sequence[Tensor]) -> Tensor:
        return mean(stack(places), axis=0)


class GlobalPool1d(Module):
    """The largest value (``"max"``) or the mean (``"mean"``) of each channel over its whole row.

    x (B, C, W), y (B, C): rows of any length become vectors of one. With ``lengths`` (B,) each row
    is pooled over its own elements alone. A row without elements gives 0.
    """

    def __init__(self, kind: str = "max") -> None:
        if kind not in ("max", "mean"):
            raise ValueError(f"GlobalPool1d: {kind!r} was given, expected 'max' or 'mean'")
        self.kind = kind

    def output_lengths(self, lengths: Any) -> None:
        """None: the outputs have no length any more."""

    def forward(self, x: TensorLike, lengths: Any = None) -> Tensor:
        x = _rows(x, "GlobalPool1d")
        inside = _inside(lengths, x, "GlobalPool1d")
        counts: Any = x.shape[2] if inside is None else inside.sum(2)
        if self.kind == "max" and x.shape[2]:  # otherwise the sum of nothing, 0, will do
            y = max(_within(inside, x, -np.inf), axis=2)
            return _within(None if inside is None else counts > 0, y)
        factor = 1.0 / np.maximum(counts, 1)
        wide = x.to("float32") if x.dtype == np.float16 else x  # float16 ends at 65,504
        total = sum(_within(inside, wide), axis=2)
        part = float(factor) if inside is None else as_tensor(factor).to(wide.dtype)
        return (total * part).to(x.dtype)


# Normalisation ---------------------------------------------------------------------------------


class BatchNorm1d(Module):
    """γ (x − μ) / √(σ² + ε) + β for each channel (Ioffe and Szegedy 2015).

    x (B, num_features) or (B, num_features, W). While training, μ and σ² (divided by n) are those
    of the n values that the batch has of the channel; in ``eval`` mode they are ``running_mean``
    and ``running_var``. Each training batch moves these towards its own, σ² divided by n − 1, by
    ``momentum``; None makes them the averages of all batches. They are buffers (num_features,), at
    first float32 or wider, and ``num_batches_tracked`` is another. ``weight`` is γ and ``bias`` is
    β, each (num_features,), or None without ``affine``. Its place is before the non-linearity.

    Raises ShapeError when there is one value for each channel while training.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        dtype: DTypeLike | None = None,
    ) -> None:
        C = whole(num_features, "BatchNorm1d: num_features")
        if momentum is not None and number(momentum, "BatchNorm1d: momentum") > 1:
            raise ValueError(
                f"BatchNorm1d: momentum = {momentum} was given, expected 0 to 1, or None"
            )
        self.eps, self.momentum = number(eps, "BatchNorm1d: eps"), momentum
        start = parameter(np.ones(C), dtype)
        self.weight = start if affine else None
        self.bias = parameter(np.zeros(C), dtype) if affine else None
        wide = np.result_type(start.dtype, np.float32)
        self.register_buffer("running_mean", np.zeros(C, wide))
        self.register_buffer("running_var", np.ones(C, wide))
        self.register_buffer("num_batches_tracked", np.asarray(0))

    def forward(self, x: TensorLike, lengths: Any = None) -> Tensor:
        x, C = _floating(x, "BatchNorm1d"), self.running_mean.size
        if x.ndim not in (2, 3) or x.shape[1] != C:
            raise ShapeError(
                f"BatchNorm1d: x has shape {x.shape}, expected (B, {C}) or (B, {C}, length): {C} "
                "channels (num_features) in axis 1"
            )
        if x.ndim == 2 and lengths is not None:
            raise ShapeError(
                f"BatchNorm1d: lengths were given for x of shape {x.shape}, expected none: "
                "(B, channels) has no length"
            )
        dtype = x.dtype if self.weight is None else np.result_type(x.dtype, self.weight.dtype)
        inside = _inside(lengths, x, "BatchNorm1d")
        x = _within(inside, x.to("float32") if x.dtype == np.float16 else x)  # room for squares
        column = (C,) + (1,) * (x.ndim - 2)
        if self.training:
            n = x.size // C if inside is None else int(np.sum(lengths))
            centred, variance = self._centred(x, inside, n)
        else:
            centred = x - self.running_mean.reshape(column)
            variance = self.running_var.reshape(column)
        if self.weight is None or self.bias is None:
            y = centred / sqrt(variance + self.eps)
        else:
            scale = self.weight.reshape(column) / sqrt(variance + self.eps)
            y = centred * scale + self.bias.reshape(column)
        return _within(inside, y).to(dtype)

    def _centred(self, x: Tensor, inside: Array | None, n: int) -> tuple[Tensor, Tensor]:
        """x − μ and σ² of this batch of n values a channel, which also moves the running ones."""
        if n < 2:
            raise ShapeError(
                f"BatchNorm1d: x of shape {x.shape} has {n} value{'s' if n != 1 else ''} for each "
                "channel, expected at least 2 while training: one alone has no variance; give "
                "larger batches or call eval()"
            )
        axes = (0, 2)[: x.ndim - 1]
        average = scaled_sum(x, 1.0 / n, axes, keepdims=True)
        centred = _within(inside, x - average)
        variance = scaled_sum(square(centred), 1.0 / n, axes, keepdims=True)
        self._track(average._data.ravel(), variance._data.ravel() * (n / (n - 1)))
        return centred, variance

    def _track(self, average: Array, variance: Array) -> None:
        batches = self.num_batches_tracked._data + 1
        replace_data(self.num_batches_tracked, batches)
        for running, new in (self.running_mean, average), (self.running_var, variance):
            if self.momentum is not None:
                step, left = self.momentum, 1.0 - self.momentum
            else:  # on a GPU it stays there
                step = (1.0 / batches).astype(new.dtype)
                left = (1.0 - 1.0 / batches).astype(running.dtype)
            moved = left * running._data + step * new
            replace_data(running, moved.astype(running.dtype, copy=False))
