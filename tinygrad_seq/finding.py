"""``find_nan``: where a NaN began.

A function is run while a tape looks at every value that is recorded, and scans go step by step as
``unroll`` does, so that a step and a line of the cell can be named. If all values are numbers, the
way back is gone through in the same manner.
Imports listing, structural, tape, tensors, trees and errors, and the kernels when asked.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from tinygrad_seq.errors import TapeError
from tinygrad_seq.kernels.forking import alone
from tinygrad_seq.listing import Line, Tape
from tinygrad_seq.structural import ARRAYS, EachInput
from tinygrad_seq.tape import Entry, Piece, reachable, recording, walk
from tinygrad_seq.tensors import FLOATS, Tensor, entry_of
from tinygrad_seq.trees import leaves

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Nan:
    """Where a NaN began. ``print`` it."""

    of: str  # "value" or "gradient"
    line: Line  # of the tape: the operation that it came from
    step: int | None  # of the scan or unroll that the operation stands in, from 0 on
    source: str  # file and line, outside this package, from which the operation was called
    report: str

    def __str__(self) -> str:
        return self.report


class _Stop(BaseException):
    """Ends the run of the function; no handler of the user's should hold it up."""

    def __init__(self, found: Nan) -> None:
        self.found = found


def find_nan(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Nan | None:
    """Run ``function(*args, **kwargs)`` and say which operation made the first NaN, and when.

    ``tgs.find_nan(lambda: loss_of(model, batch))``: the function returns a loss, or any structure
    of tensors, and does not call ``backward`` itself. Values are looked at first, in the order in
    which they are computed; then gradients, in the order of the way back from ones. Layers and
    scans run step by step, as ``tgs.unroll`` does, but numbers below the normal range are zero in
    scans, as in kernels: the result names the step, the line of the tape and the line of the
    program. None means that there is no NaN.

    Only what is recorded can be seen: something must require a gradient. Raises ValueError if
    nothing is recorded or no function was given, TapeError if the function went backward.
    """
    if not callable(function):
        raise ValueError(
            f"find_nan: a {type(function).__name__} was given, expected a function that computes "
            "the loss; write tgs.find_nan(lambda: loss_of(model, batch))"
        )
    watch = _Watch()
    try:
        with watch, np.errstate(all="ignore"):
            result = function(*args, **kwargs)
            if not len(watch):
                raise ValueError(
                    "find_nan: nothing was recorded; expected a function that computes with "
                    "tensors that require a gradient, such as a model's parameters"
                )
        with np.errstate(all="ignore"):
            watch.go_back([t for t in leaves(result) if isinstance(t, Tensor)])
    except _Stop as stop:
        return stop.found
    return None


class _Watch(Tape):
    """A tape that looks at values as they are recorded, and then at gradients."""

    by_steps = True

    def __init__(self) -> None:
        super().__init__()
        self._context: dict[Entry, tuple[int | None, str, Sequence[Any]]] = {}
        self._flushed: set[Entry] = set()

    def add(self, entry: Entry, inputs: Sequence[Any], value: Any) -> None:
        super().add(entry, inputs, value)
        self._context[entry] = recording.step, _called_from(), inputs
        if recording.flushes:
            self._flushed.add(entry)
        for given in inputs:
            if isinstance(given, Tensor) and _is_nan(given._data):
                self._stop("value", given._entry or entry, given._data, "was given as it is")
        if _is_nan(value):
            self._stop("value", entry, value, f"was computed from {self._described(inputs)}")

    def go_back(self, outputs: Sequence[Tensor]) -> None:
        """Gradients of all lines, from ones at the outputs."""
        given = [t for t in outputs if t.requires_grad and t.dtype in FLOATS]
        roots = {entry_of(t): np.ones_like(t._data) for t in given}
        made_before = [line.entry for line in self if not line.inputs]
        try:
            reachable(roots, set(made_before))
        except TapeError:
            raise TapeError(
                "find_nan: the function went backward itself, and its graph is gone; let it "
                "return the loss instead"
            ) from None
        walk(roots, ARRAYS._replace(derivatives=self._watched), made_before, retain_graph=True)

    def _watched(self, entry: Entry, parents: Any, saved: Sequence[Any]) -> Any:
        """The entry's derivatives, which look at what they give."""
        assert entry.op is not None
        vjps = entry.op.vjps

        def watched(k: int, gradient: Any, *saved: Any) -> Any:
            with self._as_recorded(entry):
                part = vjps[k](gradient, *saved)
            values = part.gradient if type(part) is Piece else part
            if _is_nan(values):
                was = _range(gradient)
                self._stop("gradient", entry, values, f"came back; the gradient {was} went in")
            return part

        return EachInput(watched), saved

    def _as_recorded(self, entry: Entry) -> AbstractContextManager[None]:
        """Compute as the line of this entry was computed."""
        if entry not in self._flushed:
            return nullcontext()
        with alone():
            from tinygrad_seq.kernels import cpu

        flushing: AbstractContextManager[None] = cpu.flushing()
        return flushing

    def _stop(self, of: str, entry: Entry, values: Any, how: str) -> NoReturn:
        line = next((each for each in self if each.entry is entry), self[len(self) - 1])
        step, source, inputs = self._context.get(entry, (recording.step, _called_from(), ()))
        places = np.argwhere(np.isnan(values)).tolist()
        count, first = len(places), tuple(places[0])
        text = f"the first NaN is in a {of}, of line %{line.index} of the tape: {line.text}\n"
        text += f"  {count} of {values.size} are NaN, the first at {first}; it {how}\n"
        if of == "gradient":
            text += f"  its inputs: {self._described(inputs)}\n"
        if step is not None:
            text += f"  at step {step} of the sequence\n"
        raise _Stop(Nan(of, line, step, source, text + f"  called from {source}"))

    def _described(self, inputs: Sequence[Any]) -> str:
        texts = []
        for given in inputs:
            if isinstance(given, Tensor):
                slot = self._slots.get(given._entry) if given._entry is not None else None
                name = "a tensor" if slot is None else f"%{slot}"
                texts.append(f"{name} {_range(given._data)}")
            else:
                texts.append(repr(given))
        return "; ".join(texts)


def _is_nan(values: Any) -> bool:
    return values.dtype.kind == "f" and bool(np.isnan(values).any())


def _range(values: Any) -> str:
    """An array in a few words: dtype, shape, from where to where."""
    text = f"{values.dtype}{values.shape}"
    return (
        f"{text} from {float(values.min()):.3g} to {float(values.max()):.3g}"
        if values.size
        else text
    )


def _called_from() -> str:
    """The innermost line of the program that is not this package's."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _HERE in Path(frame.f_code.co_filename).parents:
        frame = frame.f_back
    return f"{frame.f_code.co_filename}, line {frame.f_lineno}, in {frame.f_code.co_name}"
