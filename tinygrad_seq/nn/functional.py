"""Losses, accuracy, and attention.

Each loss averages its elements, or those that a mask selects; 0 if there are none.

``mask`` is boolean and has the shape of the elements, or of their leading axes, and an axis of it
may have length 1. What it leaves out may be anything, NaN too, and gets a gradient of exactly zero.
A loss is float32 or float64.
Predictions, targets and masks are on one device, and so is the loss: nothing waits for a GPU.
Imports the engine and devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tinygrad_seq import devices
from tinygrad_seq.composites import (
    log_softmax,
    shifted_exponentials,
    softmax,
    sums_of_few,
    take_along_axis,
)
from tinygrad_seq.elementwise import abs, minimum, softplus, sqrt, square, where
from tinygrad_seq.errors import ShapeError
from tinygrad_seq.rules import Array, Operation
from tinygrad_seq.structural import permute_dims, sum
from tinygrad_seq.tape import Piece, recording
from tinygrad_seq.tensors import (
    Tensor,
    TensorLike,
    apply,
    array_of,
    as_tensor,
    beside,
    is_traced,
    wrap,
)

__all__ = [
    "accuracy",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "dot_attention",
    "huber_loss",
    "l1_loss",
    "mse_loss",
    "rmse_loss",
]


# |x| up to which exponentials, sums of them and their ratios are ordinary numbers.
MODERATE = {"f": 32.0, "d": 256.0}
ROUNDED = 1e-3  # what targets that were computed may lie beyond 0 and 1


def _check_places(operation: str, names: Sequence[str], a: Array, b: Array) -> None:
    """Raise a DeviceError unless both arrays are on one device, which their types say."""
    if type(a) is not type(b):
        devices.check_one_device(operation, names, (a, b))


def _mask(mask: Any, like: Tensor, loss: str) -> Array | None:
    """The mask as booleans of the shape of ``like``."""
    if mask is None:
        return None
    chosen, shape = array_of(mask, f"{loss}: mask"), like.shape
    _check_places(loss, ("the values", "the mask"), like._data, chosen)
    if chosen.dtype != np.bool_:
        raise ValueError(f"{loss}: a mask of dtype {chosen.dtype} was given, expected booleans")
    pairs = zip(chosen.shape, shape, strict=False)
    if chosen.ndim > len(shape) or any(given not in (1, n) for given, n in pairs):
        raise ShapeError(
            f"{loss}: a mask of shape {chosen.shape} was given, expected {shape} or leading axes "
            "of it, each of its length or of 1"
        )
    with_axes = chosen.reshape((*chosen.shape, *[1] * (len(shape) - chosen.ndim)))
    return np.broadcast_to(with_axes, shape)


def _select(x: Tensor, mask: Array | None) -> Tensor:
    return x if mask is None else where(mask, x, 0)


def _average(elements: Tensor, mask: Array | None) -> Tensor:
    if mask is None or type(mask) is np.ndarray:
        count = elements.size if mask is None else int(mask.sum())
        return sum(elements) * (1.0 / max(count, 1))
    part = 1.0 / np.maximum(mask.sum(), 1)  # stays on the GPU
    return sum(elements) * wrap(part.astype(elements.dtype), None)


def _wide(x: TensorLike, loss: str) -> Tensor:
    """A tensor that squares and sums fit into: at least float32."""
    x = as_tensor(x, loss)
    return x if x.dtype in ("float32", "float64") else x.to("float32")


def _pair(
    prediction: TensorLike, target: TensorLike, mask: Any, loss: str
) -> tuple[Tensor, Tensor, Array | None]:
    """Prediction and target, of equal shapes, and the mask."""
    p, t = _wide(prediction, loss), _wide(beside(target, (prediction,), loss), loss)
    if p.shape != t.shape:
        raise ShapeError(
            f"{loss}: prediction {p.shape} and target {t.shape} were given, expected equal shapes; "
            "nothing is broadcast here, reshape one"
        )
    _check_places(loss, ("prediction", "target"), p._data, t._data)
    return p, t, _mask(mask, p, loss)


def _difference(
    prediction: TensorLike, target: TensorLike, mask: Any, loss: str
) -> tuple[Tensor, Array | None]:
    """prediction − target where the mask selects, else 0; and the mask."""
    p, t, chosen = _pair(prediction, target, mask, loss)
    return _select(p - t, chosen), chosen


def mse_loss(prediction: TensorLike, target: TensorLike, mask: Any = None) -> Tensor:
    """The mean of (prediction − target)², of equal shapes, where the boolean ``mask`` says so."""
    difference, chosen = _difference(prediction, target, mask, "mse_loss")
    return _average(square(difference), chosen)


def rmse_loss(prediction: TensorLike, target: TensorLike, mask: Any = None) -> Tensor:
    """√ of the mean of (prediction − target)², in the unit of the target; gradient 0 at 0.

    Equal shapes; the mean is over where the boolean ``mask`` says so.
    """
    difference, chosen = _difference(prediction, target, mask, "rmse_loss")
    mse = _average(square(difference), chosen)
    if mse.device == devices.CPU:
        return sqrt(mse) if mse._data > 0 else mse
    some = mse > 0
    return where(some, sqrt(where(some, mse, 1.0)), mse)


def l1_loss(prediction: TensorLike, target: TensorLike, mask: Any = None) -> Tensor:
    """The mean of |prediction − target|, of equal shapes, where the boolean ``mask`` says so."""
    difference, chosen = _difference(prediction, target, mask, "l1_loss")
    return _average(abs(difference), chosen)


def huber_loss(
    prediction: TensorLike, target: TensorLike, mask: Any = None, delta: float = 1.0
) -> Tensor:
    """The mean of d²/2 where |d| ≤ delta, else delta·(|d| − delta/2); d = prediction − target.

    Equal shapes; the mean is over where the boolean ``mask`` says so (Huber 1964).
    """
    if not delta > 0:
        raise ValueError(f"huber_loss: delta = {delta} was given, expected more than 0")
    difference, chosen = _difference(prediction, target, mask, "huber_loss")
    size = abs(difference)
    inner = minimum(size, delta)
    return _average(inner * (size - 0.5 * inner), chosen)


def cross_entropy(logits: TensorLike, target: TensorLike, mask: Any = None) -> Tensor:
    """The mean of −log softmax(logits)[target], in nats.

    ``logits`` (..., C): classes are the last axis. ``target`` (...): integers from 0 to C − 1, or
    anything where the boolean ``mask``, (...) or its leading axes, is False. Others raise
    ValueError; on a GPU, where looking at them would mean waiting, they make the loss NaN.
    """
    x, classes, chosen = _classes(logits, target, mask, "cross_entropy")
    at = classes._data if chosen is None else np.where(chosen, classes._data, 0)
    on_gpu = classes.device != devices.CPU
    if at.size and not on_gpu and not 0 <= at.min() <= at.max() < x.shape[-1]:
        raise ValueError(
            f"cross_entropy: targets from {at.min()} to {at.max()} were given, expected 0 to "
            f"{x.shape[-1] - 1}"
        )
    is_here = not on_gpu and (recording.tracer is None or not is_traced((x,)))
    if is_here and x.size:
        rows = None if chosen is None else np.flatnonzero(chosen)  # others need not be computed
        at = at.ravel() if rows is None else at.ravel()[rows]
        each = apply(CROSS_ENTROPY, (x.reshape(classes.size, x.shape[-1]),), (at, rows))
        return _average(each, None)
    if chosen is not None:
        x = _select(x, np.broadcast_to(chosen[..., None], x.shape))
    picked = take_along_axis(log_softmax(x), at[..., None])[..., 0]
    if on_gpu:
        picked = where((at >= 0) & (at < x.shape[-1]), picked, np.nan)
    return _average(_select(-picked, chosen), chosen)


def _exponentials(x: Array) -> tuple[Array, Array, Array | None]:
    """Of each row (n, C) e^(x − s), their sum (n, 1) and s (n, 1): the largest x, or None for 0.

    To look for the largest takes NumPy longer than all the rest, so that is left where x is
    moderate.
    """
    limit = MODERATE[x.dtype.char]
    if x.size and -limit <= x.min() and x.max() <= limit:  # not if one is NaN
        e = np.exp(x)
        return e, sums_of_few(e, (1,)), None
    return shifted_exponentials(x, (1,))


def _cross_entropies(x: Array, at: Array, rows: Array | None) -> Array:
    """−log softmax(x)[at] of each row of x (N, C), or of those that are named; at (n,)."""
    some, each = x if rows is None else x[rows], np.arange(len(at))
    e, total, top = _exponentials(some)
    if top is None:
        return np.log(total[:, 0] / e[each, at])  # of 1 at least, so that no loss is below 0
    return np.log(total[:, 0]) + (top[:, 0] - some[each, at])


def _cross_entropies_vjp(g: Any, x: Any, _: Any, at: Array, rows: Array | None) -> Any:
    """g times softmax(x), less g where the target is."""
    if isinstance(g, Tensor) or isinstance(x, Tensor):
        x = as_tensor(x)
        target = (at[:, None] == np.arange(x.shape[1])).astype(x.dtype)
        some = softmax(x if rows is None else x[rows], axis=-1)
        parts = (some - wrap(target, None)) * g.reshape(len(at), 1)
        return parts if rows is None else Piece((rows,), parts)
    e, total, _ = _exponentials(x if rows is None else x[rows])
    e *= g[:, None] / total
    e[np.arange(len(at)), at] -= g
    if rows is None:
        return e
    made = np.zeros(x.shape, x.dtype)
    made[rows] = e
    return made


CROSS_ENTROPY = Operation(
    "cross_entropy", ("x",), _cross_entropies, (_cross_entropies_vjp,), uses=({"x"},), shown=0
)


def accuracy(logits: TensorLike, target: TensorLike, mask: Any = None) -> Tensor:
    """The share, from 0 to 1, of places where the largest logit is that of the target.

    ``logits`` (..., C), ``target`` (...) of integers and ``mask`` as in ``cross_entropy``, and so
    are the errors; of equal logits the first counts. A number of the logits' dtype, 0 where nothing
    is selected. It is no loss: it has no gradient.
    """
    x, classes, chosen = _classes(logits, target, mask, "accuracy")
    right = as_tensor(x.argmax(axis=-1) == classes, "accuracy").to(x.dtype)
    return _average(_select(right, chosen), chosen)


def _classes(
    logits: TensorLike, target: TensorLike, mask: Any, name: str
) -> tuple[Tensor, Tensor, Array | None]:
    """Logits (..., C), the classes (...) that they are for, and the mask."""
    x, classes = _wide(logits, name), beside(target, (logits,), name)
    if not x.ndim or x.shape[:-1] != classes.shape:
        raise ShapeError(
            f"{name}: logits {x.shape} and target {classes.shape} were given, expected "
            "logits (..., C) with the classes last and target (...)"
        )
    _check_places(name, ("logits", "target"), x._data, classes._data)
    if classes.dtype.kind not in "iu":
        raise ValueError(f"{name}: target of dtype {classes.dtype}, expected integers")
    return x, classes, _mask(mask, classes, name)


def binary_cross_entropy_with_logits(
    logits: TensorLike, target: TensorLike, mask: Any = None
) -> Tensor:
    """The mean of −t log σ(x) − (1 − t) log(1 − σ(x)), in nats; x logits, t targets in [0, 1].

    Equal shapes; the mean is over where the boolean ``mask`` says so. Raises ValueError for other
    targets, such as those of -1 and 1, but not on a GPU, for which it would have to wait.
    """
    x, t, chosen = _pair(logits, target, mask, "binary_cross_entropy_with_logits")
    x, t = _select(x, chosen), _select(t, chosen)
    is_here = t.device == devices.CPU and (recording.tracer is None or not is_traced((t,)))
    if is_here and t.size and (t._data.min() < -ROUNDED or t._data.max() > 1 + ROUNDED):
        raise ValueError(
            "binary_cross_entropy_with_logits: targets from "
            f"{t._data.min():g} to {t._data.max():g} were given, expected 0 to 1"
        )
    return _average(_select(softplus(x) - x * t, chosen), chosen)


def dot_attention(
    queries: TensorLike, keys: TensorLike, values: TensorLike | None = None, mask: Any = None
) -> tuple[Tensor, Tensor]:
    """What each query sees of a sequence: Σ_s a_ts v_s with a = softmax over s of q_t · k_s.

    queries (T, B, H), keys (S, B, H), values (S, B, K), the keys unless given; ``mask`` (S, B),
    booleans, says which places there are. Returns (T, B, K) and the weights a (T, B, S). A row
    without any place sees zeros. (Dot-product attention: Luong, Pham, Manning 2015.)
    """
    q, k = as_tensor(queries, "dot_attention"), as_tensor(keys, "dot_attention")
    v = k if values is None else as_tensor(values, "dot_attention")
    if q.ndim != 3 or k.ndim != 3 or q.shape[1:] != k.shape[1:] or v.shape[:2] != k.shape[:2]:
        raise ShapeError(
            f"dot_attention: queries {q.shape}, keys {k.shape} and values {v.shape} were given, "
            "expected (T, B, H), (S, B, H) and (S, B, K)"
        )
    there = None if mask is None else array_of(mask, "dot_attention: mask")
    if there is not None:
        _check_places("dot_attention", ("queries", "mask"), q._data, there)
        if there.dtype != np.bool_ or there.shape != k.shape[:2]:
            raise ShapeError(
                f"dot_attention: a mask {there.dtype}{there.shape} was given, expected booleans "
                f"{k.shape[:2]}"
            )
        own = v is k
        k = where(there[:, :, None], k, 0.0)  # padding may be anything
        v = k if own else where(there[:, :, None], v, 0.0)
    scores = permute_dims(q, (1, 0, 2)) @ permute_dims(k, (1, 2, 0))  # (B, T, S)
    if there is None:
        weights = softmax(scores, axis=-1)
    else:
        rows = there.T[:, None, :]
        low = float(np.finfo(scores.dtype).min) / 2  # below every score, and still a number
        weights = where(rows, softmax(where(rows, scores, low), axis=-1), 0.0)
    seen = weights @ permute_dims(v, (1, 0, 2))
    return permute_dims(seen, (1, 0, 2)), permute_dims(weights, (1, 0, 2))
