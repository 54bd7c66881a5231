"""``gradcheck``: derivatives against central differences, of functions and of models.

Imports transforms and below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
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
    of them, taken to float64 first. Or it is a module, for the derivatives with respect to its
    parameters, ``tgs.gradcheck(lambda: loss(model(x), y), model)``: f takes no arguments then, and
    while it runs the parameters are float64, so that data must be too; afterwards they are as
    before.

    For each input and a random direction v in it, and a random weight u on the output,
    (u·f(x + εv) − u·f(x − εv)) / 2ε must equal the gradient along v, within ``rtol`` of it plus
    ``atol`` (times |u·f| where that is above 1); ε is ``eps`` times the largest |x| above 1. Two
    directions are tried, drawn by ``seed``. ``order=2`` also checks the derivative of the gradient,
    and so on. Returns True, or raises AssertionError naming the input or parameter and an element
    of it where they differ. f must not be random: ``model.eval()`` where there is dropout. It
    happens where the inputs are. Raises ValueError for inputs that are not floating, a module
    without parameters, and a module with an f that takes arguments.
    """
    if isinstance(order, bool) or not isinstance(order, int) or order < 1:
        raise ValueError(
            f"gradcheck: order {order!r} was given, expected an integer from 1 on; several inputs "
            "go in one tuple, gradcheck(f, (a, b))"
        )
    if hasattr(inputs, "named_parameters"):
        f, given, names = _of_parameters(f, inputs)
    else:
        given = inputs if isinstance(inputs, tuple) else (inputs,)
        names = [f"input{path}" for path, _ in paths(given)]
    xs = map_leaves(_to_float64, given)
    rng = np.random.default_rng(seed)
    for n in range(1, order + 1):
        y, pullback = vjp(f, *xs)
        weights = map_leaves(lambda t: _placed(rng.standard_normal(t.shape), t), y)
        with no_grad():
            gradients = pullback(weights)
        _Comparison(f, xs, weights, gradients, (eps, rtol, atol)).check(names, n, rng)
        recorded = pullback(weights)  # may be computed in another way
        for name, a, b in zip(names, leaves(gradients), leaves(recorded), strict=True):
            if not np.allclose(a._data, b._data, rtol, atol):
                raise AssertionError(
                    f"gradcheck: derivative of order {n} for {name} is another one where it "
                    f"is recorded: it differs by up to {float(abs(a._data - b._data).max()):.3g}"
                )
        f = _weighted_gradient(f, weights)
    return True


def _of_parameters(f: Function, module: Any) -> tuple[Function, tuple[Tensor, ...], list[str]]:
    """f as a function of the module's parameters, these, and their names."""
    named = dict(module.named_parameters())
    if not named:
        raise ValueError(
            f"gradcheck: a {type(module).__name__} without parameters was given, expected one with "
            "some; gradcheck(f, x) checks the derivatives with respect to an input"
        )
    try:
        signature(f).bind()
    except TypeError as error:
        raise ValueError(
            f"gradcheck: f cannot be called without arguments: {error}; expected a function of the "
            "module's parameters alone, gradcheck(lambda: loss(model(x), y), model)"
        ) from None
    parameters = tuple(named.values())

    def function(*values: Tensor) -> Any:
        before = [(p._data, p._entry) for p in parameters]
        try:
            for p, value in zip(parameters, values, strict=True):
                p._data, p._entry = value._data, value._entry
            return map_leaves(_again, f())
        finally:
            for p, (data, entry) in zip(parameters, before, strict=True):
                p._data, p._entry = data, entry

    return function, parameters, [f"parameter {name}" for name in named]


def _again(y: Any) -> Any:
    """The same value and entry in a tensor of its own: f may return a parameter as it is."""
    return wrap(y._data, y._entry) if isinstance(y, Tensor) else y


def _to_float64(x: Any) -> Tensor:
    x = as_tensor(x, "gradcheck: input")
    if x.dtype not in FLOATS:
        raise ValueError(f"gradcheck: an input of dtype {x.dtype} was given, expected a float")
    return wrap(x._data.astype("float64"), None)


def _placed(values: Any, like: Tensor) -> Tensor:
    """Numbers drawn on the host, where ``like`` is."""
    return wrap(devices.to_device(np.asarray(values), like.device), None)


def _weighted_gradient(f: Function, weights: Any) -> Function:
    """The gradient of u·f as a function of f's arguments: what the next order is checked on."""
    return lambda *xs: vjp(f, *xs)[1](weights)


class _Comparison:
    """u·f at a point, and what is said to be its gradient there."""

    def __init__(
        self, f: Function, xs: Any, weights: Any, gradients: Any, tolerances: tuple[float, ...]
    ) -> None:
        self.f, self.xs, self.weights = f, xs, leaves(weights)
        self.points, self.gradients = leaves(xs), leaves(gradients)
        self.eps, self.rtol, self.atol = tolerances

    def check(self, names: Sequence[str], order: int, rng: np.random.Generator) -> None:
        for k, (name, x) in enumerate(zip(names, self.points, strict=True)):
            for _ in range(2 if x.size else 0):
                v = np.asarray(rng.standard_normal(x.shape))
                expected, found, size = self.slopes(k, v)
                near = self.atol * max(1.0, size) + self.rtol * abs(expected)
                if abs(expected - found) <= near:
                    continue
                values = self.weighted(k, x._data), self.weighted(k, x._data)
                if abs(values[0] - values[1]) > self.rtol * abs(values[0]):
                    raise AssertionError(
                        "gradcheck: f gave another value when it was called again, expected one "
                        "without chance; model.eval() switches dropout off"
                    )
                place = self.worst(k, v)
                one, other, _ = self.slopes(k, _only(np.ones(x.shape), np.array([place])))
                where = [int(i) for i in np.unravel_index(place, x.shape)]
                raise AssertionError(
                    f"gradcheck: derivative of order {order} for {name} of shape {x.shape}: "
                    f"central differences give {expected:.10g}, backward gives {found:.10g} along "
                    f"a random direction; at {where} they give {one:.10g} and {other:.10g}"
                )

    def weighted(self, k: int, moved: Any) -> float:
        """u·f with input k moved."""
        at = [*self.points[:k], wrap(moved, None), *self.points[k + 1 :]]
        pairs = zip(leaves(self.f(*rebuild(self.xs, iter(at)))), self.weights, strict=True)
        return sum(float((y._data * u._data).sum()) for y, u in pairs)

    def slopes(self, k: int, v: np.ndarray) -> tuple[float, float, float]:
        """Along v in input k: by central differences, by the gradient; and |u·f|."""
        x, along = self.points[k]._data, _placed(v, self.points[k])._data
        step = self.eps * max(1.0, float(abs(x).max()))
        ends = [self.weighted(k, x + sign * step * along) for sign in (1, -1)]
        found = float((self.gradients[k]._data * along).sum())
        return (ends[0] - ends[1]) / (2 * step), found, abs(ends[0])

    def worst(self, k: int, v: np.ndarray) -> int:
        """The number of an element with much of the error: by halves, the one with more of it."""

        def error(places: np.ndarray) -> float:
            expected, found, _ = self.slopes(k, _only(v, places))
            return float(np.nan_to_num(abs(expected - found), nan=np.inf))

        left = np.arange(v.size)
        while left.size > 1:
            left = max(np.array_split(left, 2), key=error)
        return int(left[0])


def _only(v: np.ndarray, places: np.ndarray) -> np.ndarray:
    """v at these places, zeros elsewhere."""
    made = np.zeros_like(v)
    made.flat[places] = v.flat[places]
    return made
