"""Backward, and what is made of it: grad, value_and_grad, vjp, jvp, gradcheck.

Everything is the one walk of ``tape.py``, over arrays, or over tensors where the derivatives must
themselves be differentiable. Forward mode is the derivative of the pullback.
Imports every room of the engine below it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tinygrad_seq.errors import ShapeError, TapeError
from tinygrad_seq.rules import Operation
from tinygrad_seq.structural import OVER_ARRAYS, OVER_TENSORS
from tinygrad_seq.tape import Entry, Leaf, reachable, recording, walk
from tinygrad_seq.tensors import FLOATS, Tensor, TensorLike, as_tensor, wrap
from tinygrad_seq.trees import check_same, leaves, map_leaves, rebuild

Function = Callable[..., Any]
_accumulating = threading.Lock()
INPUT = Operation("input", ("x",), lambda x: x, (lambda g: g,))


class _recorded:  # noqa: N801
    """Records inside the block, whatever the thread's setting outside is."""

    def __enter__(self) -> None:
        self._before = recording.enabled
        recording.enabled = True

    def __exit__(self, *_: object) -> None:
        recording.enabled = self._before


def backward(
    tensor: Tensor,
    gradient: TensorLike | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
) -> None:
    """Add to ``.grad`` of every leaf the gradient of this tensor with respect to it.

    ``gradient`` (shape of the tensor) is the gradient that arrives at the tensor itself; only a
    tensor of one element may leave it out, it is 1 then. The graph is freed on the way unless
    ``retain_graph``; ``create_graph`` records the backward itself, so that gradients have
    gradients, and retains the graph unless told otherwise. Raises TapeError for a tensor that is
    not on the tape, for a freed graph, and for values that changed since they were recorded.
    """
    entry = tensor._entry
    if entry is None or not entry.requires_grad:
        raise TapeError(
            "backward: this tensor does not require a gradient: nothing it was computed from was "
            "made with requires_grad=True, or it was computed inside no_grad or after detach"
        )
    if gradient is None:
        if tensor.size != 1:
            raise TapeError(
                f"backward: a tensor of shape {tensor.shape} was given, expected one element; "
                "reduce it with .sum() or .mean(), or pass gradient= of its shape"
            )
        start = wrap(np.ones(entry.shape, entry.dtype), None)
    else:
        start = _cotangent(gradient, tensor, "backward: gradient")
    if create_graph:
        with _recorded():
            found = walk({entry: start}, OVER_TENSORS, None, retain_graph is not False)
            _accumulate(found)
    else:
        found = walk({entry: start._data}, OVER_ARRAYS, None, bool(retain_graph))
        _accumulate({leaf: wrap(np.asarray(g), None) for leaf, g in found.items()})


def _accumulate(found: dict[Entry, Tensor]) -> None:
    with _accumulating:
        for leaf, gradient in found.items():
            assert isinstance(leaf, Leaf)
            leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient


def _cotangent(given: TensorLike, like: Tensor, what: str) -> Tensor:
    made = given if isinstance(given, Tensor) else Tensor(given)
    if made.shape != like.shape:
        raise ShapeError(f"{what}: shape {made.shape} was given, expected {like.shape}")
    return made.to(like.dtype)


setattr(Tensor, "backward", backward)  # noqa: B010


# Functional transforms -----------------------------------------------------------------------


def _fresh(x: Any) -> Tensor:
    """An input of its own for a transform, linked to ``x`` if ``x`` is on the tape already."""
    x = as_tensor(x, "transform")
    if x.dtype not in FLOATS:
        raise ValueError(
            f"transform: an argument of dtype {x.dtype} was given to differentiate for, expected "
            "a floating one; write 3.0 for 3, or leave it out of argnums"
        )
    if x.requires_grad and recording.enabled:
        assert x._entry is not None
        return wrap(x._data, Entry(INPUT, (x._entry,), (), x.shape, x.dtype))
    return wrap(x._data, Leaf(x.shape, x.dtype, True))


class _Linearised:
    """A function run once at some inputs, with its graph kept for pulling gradients back."""

    def __init__(self, f: Function, xs: Any, also_tracked: bool = False) -> None:
        differentiable = recording.enabled
        self.inputs = map_leaves(_fresh, xs)
        self.fresh = [leaf._entry for _, leaf in leaves(self.inputs)]
        with _recorded():
            self.output = f(*self.inputs)
        self.outputs = [leaf for _, leaf in leaves(self.output)]
        for path, leaf in leaves(self.output):
            if not isinstance(leaf, Tensor):
                raise ValueError(
                    f"transform: the function returned a {type(leaf).__name__} at output{path}, "
                    "expected tensors"
                )
        roots = [t._entry for t in self.outputs if t.requires_grad]
        reached = reachable([e for e in roots if e is not None], self.fresh)
        # Whether somebody outside may want the derivative of what this transform returns.
        self.tracked = differentiable and (
            also_tracked
            or any(entry.parents for entry in self.fresh)
            or any(e.op is None and e.requires_grad and e not in set(self.fresh) for e in reached)
        )

    def pull(
        self, cotangents: Sequence[Tensor], over_tensors: bool, retain: bool
    ) -> list[Tensor | None]:
        roots: dict[Entry, Any] = {}
        for tensor, given in zip(self.outputs, cotangents, strict=True):
            entry = tensor._entry
            if entry is not None and entry.requires_grad:
                value = given if over_tensors else given._data
                roots[entry] = roots[entry] + value if entry in roots else value
        if not roots:
            return [None] * len(self.fresh)
        if over_tensors:
            with _recorded():
                found = walk(roots, OVER_TENSORS, self.fresh, True)
            return [found.get(entry) for entry in self.fresh]
        found = walk(roots, OVER_ARRAYS, self.fresh, retain)
        return [
            wrap(np.asarray(found[entry]), None) if entry in found else None for entry in self.fresh
        ]

    def value(self) -> Any:
        return self.output if self.tracked else map_leaves(lambda t: t.detach(), self.output)

    def filled(self, gradients: Sequence[Tensor | None]) -> Any:
        """The gradients in the structure of the inputs, zeros where unconnected."""
        filled = [
            wrap(np.zeros(entry.shape, entry.dtype), None) if g is None else g
            for g, entry in zip(gradients, self.fresh, strict=True)
        ]
        return rebuild(self.inputs, iter(filled))


def vjp(f: Function, *xs: Any) -> tuple[Any, Function]:
    """``(y, pullback)``: the value f(*xs), and the function that takes gradients back through it.

    ``pullback(g)``, with g in the structure and shapes of y, returns a tuple with the gradient for
    each of ``xs``. It may be called many times. Arguments and y are tensors or structures of them.
    """
    run = _Linearised(f, xs)

    def pullback(cotangent: Any) -> tuple[Any, ...]:
        check_same(run.output, cotangent, "pullback")
        given = [
            _cotangent(g, t, f"pullback: gradient{path}")
            for (path, g), t in zip(leaves(cotangent), run.outputs, strict=True)
        ]
        tracked = run.tracked or (recording.enabled and any(g.requires_grad for g in given))
        return run.filled(run.pull(given, tracked, retain=True))  # type: ignore[no-any-return]

    return run.value(), pullback


def jvp(f: Function, xs: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
    """``(y, y_dot)``: the value f(*xs) and its derivative along ``tangents``.

    ``tangents`` has the structure and shapes of ``xs``, a tuple with one entry an argument. The
    pullback u ↦ uJ is linear in u, and its own pullback is v ↦ Jv.
    """
    xs, tangents = tuple(xs), tuple(tangents)
    check_same(xs, tangents, "jvp: tangents")
    moving = [leaf for _, leaf in leaves(tangents)]
    run = _Linearised(f, xs, any(isinstance(v, Tensor) and v.requires_grad for v in moving))
    like = [leaf for _, leaf in leaves(run.inputs)]
    moving = [_cotangent(v, x, "jvp: tangent") for v, x in zip(moving, like, strict=True)]
    probes = [wrap(np.ones(t.shape, t.dtype), Leaf(t.shape, t.dtype, True)) for t in run.outputs]
    pulled = run.pull(probes, True, retain=True)
    roots = {
        g._entry: (v if run.tracked else v._data)
        for g, v in zip(pulled, moving, strict=True)
        if g is not None and g._entry is not None
    }
    ends = [probe._entry for probe in probes]
    found: dict[Any, Any] = {}
    if roots:
        with _recorded():
            arithmetic = OVER_TENSORS if run.tracked else OVER_ARRAYS
            found = walk(roots, arithmetic, ends, run.tracked)  # type: ignore[arg-type]
    moved = [
        found.get(end, np.zeros(probe.shape, probe.dtype))
        for end, probe in zip(ends, probes, strict=True)
    ]
    out = [v if isinstance(v, Tensor) else wrap(np.asarray(v), None) for v in moved]
    return run.value(), rebuild(run.output, iter(out))


def value_and_grad(f: Function, argnums: int | tuple[int, ...] = 0) -> Function:
    """The function that returns ``(f(*args), gradient)``; see ``grad``."""
    positions = argnums if isinstance(argnums, tuple) else (argnums,)

    def function(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if any(not -len(args) <= k < len(args) for k in positions):
            raise ValueError(f"grad: argnums {argnums} was given for {len(args)} arguments")
        chosen = [k % len(args) for k in positions]

        def of_chosen(*picked: Any) -> Any:
            full = list(args)
            for k, x in zip(chosen, picked, strict=True):
                full[k] = x
            return f(*full, **kwargs)

        run = _Linearised(of_chosen, tuple(args[k] for k in chosen))
        y = run.output
        if not isinstance(y, Tensor) or y.size != 1:
            shape = y.shape if isinstance(y, Tensor) else type(y).__name__
            raise TapeError(
                f"grad: the function returned {shape}, expected one number as a tensor; "
                "reduce it with .sum() or .mean(), or use tgs.vjp"
            )
        one = wrap(np.ones(y.shape, y.dtype), None)
        gradients = run.filled(run.pull([one], run.tracked, retain=False))
        return run.value(), gradients if isinstance(argnums, tuple) else gradients[0]

    return function


def grad(f: Function, argnums: int | tuple[int, ...] = 0) -> Function:
    """The gradient of a function that returns one number.

    ``grad(f)(*args)`` has the structure of the argument that ``argnums`` names: a tensor for a
    tensor, a dict for a dict; a tuple of these for a tuple of argnums. What f does not depend on
    gets zeros. Nothing is stored in ``.grad``. May be nested: ``grad(grad(f))``.
    """
    both = value_and_grad(f, argnums)

    def function(*args: Any, **kwargs: Any) -> Any:
        return both(*args, **kwargs)[1]

    return function


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

    ``inputs`` is a tuple of arguments (or one argument that is not a tuple); floating ones are
    taken to float64 first. For each input and a random direction v in it, and a random weight u on
    the output, (u·f(x + εv) − u·f(x − εv)) / 2ε must equal the gradient along v. ``order=2`` also
    checks the derivative of the gradient. Returns True, or raises AssertionError saying where.
    """
    if order < 1:
        raise ValueError(f"gradcheck: order {order} was given, expected 1 or more")
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    xs = map_leaves(lambda x: Tensor(as_tensor(x, "gradcheck"), dtype="float64"), given)
    rng = np.random.default_rng(seed)
    for n in range(1, order + 1):
        y, pullback = vjp(f, *xs)
        weights = map_leaves(lambda t: wrap(rng.standard_normal(t.shape), None), y)
        _check_along_directions(f, xs, weights, pullback(weights), n, rng, (eps, rtol, atol))
        f = _weighted_gradient(f, weights)
    return True


def _weighted_gradient(f: Function, weights: Any) -> Function:
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
    points = [x for _, x in leaves(xs)]
    paths = [path for path, _ in leaves(xs)]

    def weighted(k: int, moved: Any) -> float:
        at = [*points[:k], wrap(moved, None), *points[k + 1 :]]
        values = leaves(f(*rebuild(xs, iter(at))))
        pairs = zip(values, leaves(weights), strict=True)
        return float(np.sum([np.sum(t._data * u._data) for (_, t), (_, u) in pairs]))

    for k, (x, (_, g)) in enumerate(zip(points, leaves(gradients), strict=True)):
        if not x.size:
            continue
        for _ in range(2):
            v = rng.standard_normal(x.shape)
            step = eps * max(1.0, float(np.abs(x._data).max()))
            ends = [weighted(k, x._data + sign * step * v) for sign in (1, -1)]
            expected = (ends[0] - ends[1]) / (2 * step)
            found = float(np.sum(g._data * v))
            if not abs(expected - found) <= atol * max(1.0, abs(ends[0])) + rtol * abs(expected):
                raise AssertionError(
                    f"gradcheck: derivative of order {order} for input{paths[k]} of shape "
                    f"{x.shape}: central differences give {expected:.10g}, backward gives "
                    f"{found:.10g}"
                )
