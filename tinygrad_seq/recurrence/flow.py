"""How gradients flow back through time: their size at every step, from the compiled way back.

Imports the engine and its own room.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tinygrad_seq import devices
from tinygrad_seq.recurrence.trace import as_used
from tinygrad_seq.structural import ARRAYS
from tinygrad_seq.tape import Entry, recording, walk
from tinygrad_seq.tensors import Tensor, entry_of
from tinygrad_seq.trees import paths

Array = np.ndarray


@dataclass
class GradientFlow:
    """What ``gradient_flow`` found in one scan of T steps."""

    states: dict[str, Array]  # norm of ∂L/∂s_t for each leaf of the state, (T,)
    parameters: dict[str, Array]  # norm of step t's own share in ∂L/∂W for each parameter, (T,)
    shares: dict[str, Array] = field(default_factory=dict)  # the shares, (T, ...), if kept

    @property
    def norm(self) -> Array:
        """The norm of ∂L/∂s_t over all leaves of the state, (T,)."""
        total: Array = np.sqrt(sum(np.square(norms) for norms in self.states.values()))
        return total


def gradient_flow(
    function: Callable[[], Tensor], parameters: Any = None, *, keep_shares: bool = False
) -> list[GradientFlow]:
    """The norms of a loss's gradients at every step of every scan that it is computed with.

    ``tgs.gradient_flow(lambda: loss(model(x), y), model)``: the function computes a loss L, and is
    called once. ``parameters`` gives names: a module, or a dict of tensors. ``.grad`` of nothing is
    touched. Returns one ``GradientFlow`` for each scan inside the function, in the order in which
    they ran:

    - ``norm`` (T,), and ``states`` (T,) for each leaf of the state, named ``"state"``, or
      ``"state[0]"`` and ``"state[1]"`` where it is a pair: the norm, over all rows of the batch, of
      ∂L/∂s_t, s_t being the state that step t computes: by all ways, through the steps after t,
      through the output of step t, and through another leaf that is computed of it (of an LSTM's
      memory: through h' = o * tanh(c')). Where it shrinks or grows from step to step by a factor,
      gradients vanish or explode.
    - ``parameters["cells.0.weight_hh"]`` (T,): the norm of step t's own share in the gradient, the
      derivative for the parameter as step t uses it; the shares of all steps sum to ∂L/∂W, and
      ``shares`` holds them, (T, ...), with ``keep_shares``.

    Steps are counted in the order of the inputs (shares of rows that run backward from their own
    lengths, from the end of the run). (Norms through time: Pascanu, Mikolov, Bengio
    2013.) It takes several times as long as ``backward``, as each step is done on its own. A scan
    on a GPU is gone back through there; what is found comes to the host at each step, and all
    arrays are NumPy's.

    Raises ValueError if the function gives no loss, or computes it without a compiled scan.
    """
    if not callable(function):
        raise ValueError(
            f"gradient_flow: a {type(function).__name__} was given, expected a function that "
            "computes the loss; write tgs.gradient_flow(lambda: loss(model(x), y), model)"
        )
    watch = _Watch(_names(parameters), keep_shares)
    outer, recording.flow = recording.flow, watch
    try:
        loss = function()
        if not isinstance(loss, Tensor) or loss.size != 1 or not loss.requires_grad:
            found = f"shape {loss.shape}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"gradient_flow: the function returned {found}, expected a loss: one number as a "
                "tensor that requires a gradient"
            )
        walk({entry_of(loss): np.ones_like(loss._data)}, ARRAYS)
    finally:
        recording.flow = outer
    if not watch.scans:
        raise ValueError(
            "gradient_flow: the loss depends on no scan that the function ran, expected tgs.scan "
            "or a recurrent layer inside of it, one step and one sequence at least; a layer with "
            'backend="tape" runs step by step'
        )
    return [each.flow for each in watch.scans]


def _names(parameters: Any) -> dict[Entry, str]:
    if parameters is None:
        return {}
    if isinstance(parameters, Mapping):
        return {entry_of(tensor): name for name, tensor in parameters.items()}
    if not hasattr(parameters, "named_parameters"):
        raise ValueError(
            f"gradient_flow: parameters is a {type(parameters).__name__}, expected a module or a "
            "dict of tensors"
        )
    return {entry_of(tensor): name for name, tensor in parameters.named_parameters()}


class _Watch:
    """What is noted down while a walk goes back through scans."""

    def __init__(self, names: dict[Entry, str], keep_shares: bool) -> None:
        self.names, self.keep_shares = names, keep_shares
        self.scans: list[_Scan] = []

    def of(self, run: Any) -> _Scan:
        """A scan that the walk has come to; the last one comes first."""
        self.scans.insert(0, _Scan(self, run))
        return self.scans[0]


class _Scan:
    """What is noted down of one scan."""

    def __init__(self, watch: _Watch, run: Any) -> None:
        self.watch, self.call, self.rows = watch, run.call, run.kept.inputs.rows
        names = [f"state{path}" for path, _ in paths(run.call.given.state)]
        self.flow = GradientFlow({name: np.zeros(self.rows.T) for name in names}, {})
        self.captured = [entry_of(tensor) for tensor in run.call.step.captured]

    def put_states(self, totals: list[Array | None]) -> None:
        """The gradients (T, B, n) of the states, None where nothing comes back."""
        for name, gradient in zip(self.flow.states, totals, strict=True):
            if gradient is not None:
                squares = np.square(devices.to_host(gradient), dtype=float)
                self.flow.states[name] = np.sqrt(squares.sum(axis=(1, 2)))

    def see(self, s: int, share: dict[int, Array]) -> None:
        """Step s of the run, and its own share in the gradients of what the cell closes over."""
        flow, watch, T = self.flow, self.watch, self.rows.T
        roots: dict[Entry, Array] = {}
        for k, array in share.items():  # one tensor may be there twice, in a product and beside
            gradient = as_used(array, self.call.step.trace.roles[k])
            before = roots.get(self.captured[k])
            roots[self.captured[k]] = gradient if before is None else before + gradient
        # A matrix may come from a scan: what goes through it here is not the loss's way back.
        watching, recording.flow = recording.flow, None
        try:
            found = walk(roots, ARRAYS, retain_graph=True) if roots else {}
        finally:
            recording.flow = watching
        t = s if self.rows.onward > 0 else T - 1 - s
        for entry, gradient in found.items():
            gradient = devices.to_host(gradient)
            name = watch.names.setdefault(entry, f"parameter {len(watch.names)}")
            if name not in flow.parameters:
                flow.parameters[name] = np.zeros(T)
                if watch.keep_shares:
                    flow.shares[name] = np.zeros((T, *gradient.shape), gradient.dtype)
            flow.parameters[name][t] = np.sqrt(np.square(gradient, dtype=float).sum())
            if watch.keep_shares:
                flow.shares[name][t] = gradient
