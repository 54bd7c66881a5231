"""``gradcheck``: derivatives against central differences. Imports transforms and below."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tinygrad_seq import devices
from tinygrad_seq.tape import no_grad
from tinygrad_seq.tensors import FLOATS, Tensor, as_tensor, wrap
from tinygrad_seq.transforms import vjp
from tinygrad_seq.trees import leaves, map_leaves, paths, rebuild

Function = Callable[..., Any]


def gradcheck(
    f: Function,
    inputs: Any,
    order: int = 1,
    *,
    eps: float = 1e-6,
    rtol: float = 1e-5,
    atol: float = 1e-7,
    seed: int = 0,
) -> bool:
    """Compare f's derivatives with central differences along random directions, in float64.

    ``inputs`` is a tuple of arguments (or one argument that is not a tuple), tensors or structures
    of them, taken to float64 first. For each input and a random direction v in it, and a random
    weight u on the output, (u·f(x + εv) − u·f(x − εv)) / 2ε must equal the gradient along v, within
    ``rtol`` of it plus ``atol`` (times |u·f| where that is above 1); ε is ``eps`` times the largest
    |x| above 1. Two directions are tried, drawn by ``seed``. ``order=2`` also checks the derivative
    of the gradient, and so on. Returns True, or raises AssertionError saying where. f must not be
    random. It happens where the inputs are.
    """
    if isinstance(order, bool) or not isinstance(order, int) or order < 1:
        raise ValueError(
            f"gradcheck: order {order!r} was given, expected an integer from 1 on; several inputs "
            "go in one tuple, gradcheck(f, (a, b))"
        )
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    xs = map_leaves(_to_float64, given)
    rng = np.random.default_rng(seed)
    for n in range(1, order + 1):
        y, pullback = vjp(f, *xs)
        weights = map_leaves(lambda t: wrap(_direction(rng, t), None), y)
        with no_grad():
            gradients = pullback(weights)
        _check_along_directions(f, xs, weights, gradients, n, rng, (eps, rtol, atol))
        recorded = pullback(weights)  # may be computed in another way
        for (path, a), b in zip(paths(gradients), leaves(recorded), strict=True):
            if not np.allclose(a._data, b._data, rtol, atol):
                raise AssertionError(
                    f"gradcheck: derivative of order {n} for input{path} is another one where it "
                    f"is recorded: it differs by up to {float(abs(a._data - b._data).max()):.3g}"
                )
        f = _weighted_gradient(f, weights)
    return True


def _to_float64(x: Any) -> Tensor:
    x = as_tensor(x, "gradcheck: input")
    if x.dtype not in FLOATS:
        raise ValueError(f"gradcheck: an input of dtype {x.dtype} was given, expected a float")
    return wrap(x._data.astype("float64"), None)


def _direction(rng: np.random.Generator, x: Tensor) -> Any:
    """Standard normal numbers of the shape of x, drawn on the host, where x is."""
    return devices.to_device(np.asarray(rng.standard_normal(x.shape)), x.device)


def _weighted_gradient(f: Function, weights: Any) -> Function:
    """The gradient of u·f as a function of f's arguments: what the next order is checked on."""
    return lambda *xs: vjp(f, *xs)[1](weights)


def _check_along_directions(
    f: Function,
    xs: Any,
    weights: Any,
    gradients: Any,
    order: int,
    rng: np.random.Generator,
    tolerances: tuple[float, float, float],
) -> None:
    eps, rtol, atol = tolerances
    points = leaves(xs)

    def weighted(k: int, moved: Any) -> float:
        """u·f with input k moved."""
        at = [*points[:k], wrap(moved, None), *points[k + 1 :]]
        pairs = zip(leaves(f(*rebuild(xs, iter(at)))), leaves(weights), strict=True)
        return sum(float((y._data * u._data).sum()) for y, u in pairs)

    for k, ((path, x), g) in enumerate(zip(paths(xs), leaves(gradients), strict=True)):
        if not x.size:
            continue
        for _ in range(2):
            v = _direction(rng, x)
            step = eps * max(1.0, float(abs(x._data).max()))
            ends = [weighted(k, x._data + sign * step * v) for sign in (1, -1)]
            expected = (ends[0] - ends[1]) / (2 * step)
            found = float((g._data * v).sum())
            if not abs(expected - found) <= atol * max(1.0, abs(ends[0])) + rtol * abs(expected):
                raise AssertionError(
                    f"gradcheck: derivative of order {order} for input{path} of shape "
                    f"{x.shape}: central differences give {expected:.10g}, backward gives "
                    f"{found:.10g}"
                )
