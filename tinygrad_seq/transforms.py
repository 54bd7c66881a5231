"""Backward, and what is made of it: grad, value_and_grad, vjp, jvp.

Everything is the one walk of ``tape.py``, over arrays, or over tensors where the derivatives must
themselves be differentiable. Forward mode is the derivative of the pullback.
Imports rules, tape, tensors, structural (for the walk's arithmetic), devices, trees and errors.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np

from tinygrad_seq import devices
from tinygrad_seq.errors import TapeError, TraceError
from tinygrad_seq.rules import Operation
from tinygrad_seq.structural import ARRAYS, TENSORS
from tinygrad_seq.tape import Entry, Leaf, reachable, recording, set_recording, walk
from tinygrad_seq.tensors import (
    FLOATS,
    Tensor,
    TensorLike,
    alike,
    as_tensor,
    boxed,
    entry_of,
    is_traced,
    refuse_traced,
    wrap,
)
from tinygrad_seq.trees import check_same, leaves, map_leaves, paths, rebuild

Function = Callable[..., Any]
INPUT = Operation("input", ("x",), lambda x: x, (lambda g: g,), view=True)
_accumulating = threading.Lock()


def _forget() -> None:
    """In a forked child nobody is adding to gradients, whatever other threads of the parent did."""
    global _accumulating
    _accumulating = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


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
    gradients, and retains the graph unless ``retain_graph=False``. A gradient with a graph refers
    to its leaf, and the leaf to it: set ``.grad`` to None to let go of both at once.

    Raises TapeError for a tensor that is not on the tape, for a freed graph, and for values that
    changed since they were recorded.
    """
    entry = tensor._entry
    if entry is None or not entry.requires_grad:
        refuse_traced(tensor, "backward was called")
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
        start = _ones_like(tensor)
    else:
        start = alike(gradient, tensor, "backward: gradient")
        if start.dtype != tensor.dtype:
            start = start.to(tensor.dtype)
    retain = create_graph if retain_graph is None else retain_graph
    if create_graph:
        with set_recording(True):
            _accumulate(_walk({entry: start}, None, True, retain))
    else:
        _accumulate(_walk({entry: start}, None, False, retain))


setattr(Tensor, "backward", backward)  # noqa: B010


def _walk(
    roots: dict[Entry, Tensor], ends: Sequence[Entry] | None, recorded: bool, retain_graph: bool
) -> dict[Entry, Tensor]:
    """The walk over arrays, or over tensors where it is recorded."""
    try:
        if recorded:
            return walk(roots, TENSORS, ends, retain_graph)
        found = walk({e: g._data for e, g in roots.items()}, ARRAYS, ends, retain_graph)
    except MemoryError as error:  # a GPU's
        raise devices.explained(error, "backward") from None
    return {end: wrap(boxed(g), None) for end, g in found.items()}


def _accumulate(found: dict[Entry, Tensor]) -> None:
    with _accumulating:
        for leaf, gradient in found.items():
            assert isinstance(leaf, Leaf)
            home = leaf if leaf.successor is None else leaf.newest()
            if gradient.dtype is not home.dtype:  # the tensor was converted since
                gradient = gradient.to(home.dtype)
            if home is not leaf and home.device is not None:  # or moved
                gradient = gradient.to(home.device)
            home.grad = gradient if home.grad is None else home.grad + gradient


def _ones_like(tensor: Tensor) -> Tensor:
    return wrap(np.ones_like(tensor._data), None)


def detach(tree: Any) -> Any:
    """The tensors of a structure, such as the state of a layer, with their values off the tape.

    What is computed from them does not go back to what they were computed from: a state carried
    from one part of a long sequence to the next is detached between them. None, the state that a
    layer begins with, stays None.
    """
    return None if tree is None else map_leaves(lambda t: as_tensor(t, "detach").detach(), tree)


# A function linearised at a point ------------------------------------------------------------


class OwnLeaf(Leaf):
    """A transform's own input. Only while its function runs can others depend on it."""

    __slots__ = ("running",)

    def __init__(self, x: Tensor) -> None:
        super().__init__(x.shape, x.dtype, True)
        self.running = True


def _own_input(x: Any, path: str, transform: str) -> Tensor:
    """A tensor of the transform's own in the place of ``x``, linked to it if ``x`` is on the tape.

    The walk ends at these, so it neither touches ``.grad`` of anything nor goes beyond.
    """
    x = as_tensor(x, f"{transform}: argument{path}")
    if x.dtype not in FLOATS:
        raise ValueError(
            f"{transform}: argument{path} of dtype {x.dtype} was given to differentiate for, "
            "expected a floating one; write 3.0 for 3, or leave it out of argnums"
        )
    if x.requires_grad and recording.enabled:
        assert x._entry is not None
        return wrap(x._data, Entry(INPUT, (x._entry,), (), x.shape, x.dtype))
    return wrap(x._data, OwnLeaf(x))


class _Linearised:
    """A function run once, recorded, from inputs of its own."""

    def __init__(self, f: Function, xs: Any, transform: str, moving: Iterable[Any] = ()) -> None:
        """``moving``: other tensors that the result will depend on, such as tangents."""
        if not callable(f):
            raise ValueError(f"{transform}: a {type(f).__name__} was given, expected a function")
        outside = recording.enabled
        own = [_own_input(x, path, transform) for path, x in paths(xs)]
        self.inputs = rebuild(xs, iter(own))
        self.ends = [entry_of(x) for x in own]
        with set_recording(True):
            self.output = f(*self.inputs)
        for end in self.ends:
            if isinstance(end, OwnLeaf):
                end.running = False
        for path, leaf in paths(self.output):
            if not isinstance(leaf, Tensor):
                raise ValueError(
                    f"{transform}: the function returned a {type(leaf).__name__}"
                    f"{f' at {path}' if path else ''}, expected tensors"
                )
        self.outputs: list[Tensor] = leaves(self.output)
        if recording.tracer is not None and is_traced((*leaves(xs), *self.outputs)):
            raise TraceError(
                f"{transform}: inside a cell that is traced there are no values to go back from; "
                "write the derivative down as operations, or run the cell with tgs.unroll"
            )
        # Whether what the transform returns is itself to be recorded: an input was linked to a
        # tensor outside, or the function closed over one that requires a gradient.
        self.recorded = outside and (
            any(entry.parents for entry in self.ends)
            or any(isinstance(v, Tensor) and v.requires_grad for v in moving)
            or self._depends_on_others()
        )

    def _depends_on_others(self) -> bool:
        """Whether the output depends on what is older than the inputs, or on a leaf made since."""
        ends = set(self.ends)
        oldest = min((end.index for end in ends), default=0)
        roots = [t._entry for t in self.outputs if t._entry is not None and t.requires_grad]
        return any(
            entry.index < oldest
            or (entry.op is None and (not isinstance(entry, OwnLeaf) or entry.running))
            for entry in reachable(roots, ends)
            if entry not in ends
        )

    def value(self) -> Any:
        return self.output if self.recorded else map_leaves(lambda t: t.detach(), self.output)

    def pull(self, given: Sequence[Tensor], recorded: bool, retain: bool = True) -> list[Any]:
        """The gradient for each input, None where unconnected, from those for each output."""
        with set_recording(True) if recorded else nullcontext():
            found = _walk(_by_entry(self.outputs, given), self.ends, recorded, retain)
        return [found.get(end) for end in self.ends]

    def like_inputs(self, gradients: Sequence[Tensor | None]) -> Any:
        """The gradients in the structure of the inputs, zeros where unconnected."""
        return rebuild(self.inputs, iter(_filled(gradients, leaves(self.inputs))))


def _by_entry(tensors: Iterable[Tensor | None], given: Sequence[Tensor]) -> dict[Entry, Tensor]:
    """Where a walk starts: a tensor that stands in several places gets the sum of its own."""
    roots: dict[Entry, Tensor] = {}
    for tensor, gradient in zip(tensors, given, strict=True):
        if tensor is not None and tensor.requires_grad:
            entry = entry_of(tensor)
            roots[entry] = roots[entry] + gradient if entry in roots else gradient
    return roots


def _filled(gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    return [
        wrap(np.zeros_like(t._data), None) if g is None else g
        for g, t in zip(gradients, like, strict=True)
    ]


# Transforms ----------------------------------------------------------------------------------


def vjp(f: Function, *xs: Any) -> tuple[Any, Function]:
    """``(y, pullback)``: the value f(*xs), and the function that takes gradients back through it.

    ``pullback(g)``, with g in the structure and shapes of y, returns a tuple with the gradient for
    each of ``xs``. It may be called many times. Arguments and y are tensors or structures of them:
    tuples, lists and dicts. Raises ShapeError for a g of another structure or shape, and
    ValueError for arguments that are not floating.
    """
    run = _Linearised(f, xs, "vjp")

    def pullback(cotangent: Any) -> tuple[Any, ...]:
        check_same(run.output, cotangent, "pullback")
        given = [
            alike(g, t, f"pullback: gradient{path}").to(t.dtype)
            for (path, g), t in zip(paths(cotangent), run.outputs, strict=True)
        ]
        recorded = recording.enabled and (run.recorded or any(g.requires_grad for g in given))
        return run.like_inputs(run.pull(given, recorded))  # type: ignore[no-any-return]

    return run.value(), pullback


def jvp(f: Function, xs: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
    """``(y, y_dot)``: the value f(*xs) and its derivative along ``tangents``.

    ``xs`` is the tuple of arguments, and ``tangents`` has its structure and shapes; y_dot has
    those of y. The pullback u ↦ uJ is linear in u, and its own pullback is v ↦ Jv. Raises
    ShapeError for tangents of another structure or shape, and ValueError for what is no tuple.
    """
    for name, given in (("xs", xs), ("tangents", tangents)):
        if not isinstance(given, (tuple, list)):
            raise ValueError(
                f"jvp: {name} is a {type(given).__name__}, expected a tuple with one entry for "
                "each argument: write (x,) for one"
            )
    xs, tangents = tuple(xs), tuple(tangents)
    check_same(xs, tangents, "jvp: tangents")
    along = leaves(tangents)
    run = _Linearised(f, xs, "jvp", moving=along)
    along = [
        alike(v, x, "jvp: tangent").to(x.dtype)
        for v, x in zip(along, leaves(run.inputs), strict=True)
    ]
    # uJ at any u, recorded as a function of u.
    probes = [
        wrap(_ones_like(t)._data, Leaf(t.shape, t.dtype, requires_grad=True)) for t in run.outputs
    ]
    ends = [entry_of(probe) for probe in probes]
    with set_recording(True):
        found = _walk(_by_entry(run.pull(probes, True), along), ends, True, run.recorded)
    moved = _filled([found.get(end) for end in ends], run.outputs)
    if not run.recorded:
        moved = [v.detach() for v in moved]
    return run.value(), rebuild(run.output, iter(moved))


def value_and_grad(f: Function, argnums: int | tuple[int, ...] = 0) -> Function:
    """The function that returns ``(f(*args), gradient)``; see ``grad``."""
    if not callable(f):
        raise ValueError(
            f"grad: a {type(f).__name__} was given as f, expected a function that returns one "
            "number; of a loss that is there already, loss.backward() writes the gradients to .grad"
        )
    positions = argnums if isinstance(argnums, tuple) else (argnums,)
    if any(isinstance(k, bool) or not isinstance(k, int) for k in positions):
        raise ValueError(
            f"grad: argnums {argnums!r:.60} was given, expected an integer or a tuple of integers"
        )

    def function(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if any(not -len(args) <= k < len(args) for k in positions):
            places = f"expected {-len(args)} to {len(args) - 1}"
            raise ValueError(
                f"grad: argnums {argnums} was given for {len(args)} arguments by position, "
                f"{places if args else 'expected those to differentiate for to be given so'}"
            )
        chosen = [k % len(args) for k in positions]
        if len(set(chosen)) < len(chosen):
            raise ValueError(f"grad: argnums {argnums} names an argument twice")

        def of_chosen(*picked: Any) -> Any:
            full = list(args)
            for k, x in zip(chosen, picked, strict=True):
                full[k] = x
            return f(*full, **kwargs)

        run = _Linearised(of_chosen, tuple(args[k] for k in chosen), "grad")
        y = run.output
        if not isinstance(y, Tensor) or y.size != 1:
            shape = y.shape if isinstance(y, Tensor) else type(y).__name__
            raise TapeError(
                f"grad: the function returned {shape}, expected one number as a tensor; "
                "reduce it with .sum() or .mean(), or use tgs.vjp"
            )
        start = [_ones_like(y)]
        gradients = run.like_inputs(run.pull(start, run.recorded, retain=run.recorded))
        return run.value(), gradients if isinstance(argnums, tuple) else gradients[0]

    return function


def grad(f: Function, argnums: int | tuple[int, ...] = 0) -> Function:
    """The gradient of a function that returns one number.

    ``grad(f)(*args)`` has the structure of the argument that ``argnums`` names: a tensor for a
    tensor, a dict for a dict; a tuple of these for a tuple of argnums. What f does not depend on
    gets zeros. Nothing is stored in ``.grad``. May be nested: ``grad(grad(f))``. Raises TapeError
    if f returns more than one number, and ValueError for arguments that are not floating.
    """
    both = value_and_grad(f, argnums)

    def function(*args: Any, **kwargs: Any) -> Any:
        return both(*args, **kwargs)[1]

    return function
