"""Tracing a cell again, along what it did the last time.

The cell is run in every call of ``scan``, and mostly it does again what it did before. So what it
asked for is kept, and each operation is compared with the one that came at this place: the same
operation, on the same values, beside tensors of the same shapes. While that holds, nothing is
worked out and nothing written: the tensor of the last time is given. At the first difference what
was followed so far becomes an ordinary trace, which goes on. Nothing is taken for granted of a
cell; what it closes over, its numbers and its seeds are those of this call.

A tensor of an earlier call that somebody still holds could not be told from one of this call, so a
precedent is only followed if nobody does. Imports the engine, trace and its own room.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from sys import getrefcount
from typing import Any, NoReturn

import numpy as np

from tinygrad_seq.creation import Rng, new_seed
from tinygrad_seq.recurrence.arguments import Cell, Given
from tinygrad_seq.recurrence.draws import Source, check_drawn_anew, drawn
from tinygrad_seq.recurrence.trace import (
    Event,
    Row,
    Step,
    Trace,
    Traced,
    begin_trace,
    finish_trace,
    power_of,
    product_of_parts,
    trace_cell,
    tracing,
)
from tinygrad_seq.rules import RULES
from tinygrad_seq.structural import MATMUL
from tinygrad_seq.tape import recording
from tinygrad_seq.tensors import Tensor, is_traced, wrap
from tinygrad_seq.trees import leaves, map_leaves, rebuild

MOST = 256  # precedents that are kept
PATIENCE = 8  # how often, one after another, a cell may do something else before it is let be
OF_A_CALL = ("captured", "numbers", "seeds", "captures", "events", "leaves")  # in a trace

_precedents: dict[Any, Precedent | int] = {}  # or how often there was none to follow


def trace_again(cell: Cell, given: Given, dtype: np.dtype[Any], driver: str = "scan") -> Step:
    """What ``trace_cell`` gives, in less time if the cell does what it did before."""
    key = _key(cell, given)
    known = _precedents.pop(key, None)  # whoever follows it has it alone
    failures = 0
    if known is not None:
        failures = known if type(known) is int else known.failures + 1  # type: ignore[union-attr]
    if failures >= PATIENCE:
        _precedents[key] = failures
        return trace_cell(cell, given, dtype, driver)
    if type(known) is Precedent and not known.is_held():
        with tracing(known) as outer:
            step = known.follow(cell, given, driver, outer)
    else:
        step = _noted(cell, given, dtype, driver)
    if step.precedent is None:
        step, kept = _with_precedent(step, failures)
    else:
        kept, step.precedent.failures = step.precedent, 0
    if len(_precedents) >= MOST:
        _precedents.clear()
    _precedents[key] = kept
    return step


def _noted(cell: Cell, given: Given, dtype: np.dtype[Any], driver: str) -> Step:
    """An ordinary trace in which is noted what the cell asks for."""
    trace, x, state = begin_trace(given, dtype, noted=True)
    with tracing(trace) as outer:
        return finish_trace(trace, cell(x, state), cell, given, driver, outer)


def _key(cell: Any, given: Given) -> Any:
    """For whom a precedent may be one. It need not be: every operation is compared."""
    code = getattr(cell, "__code__", None)  # that of a function, which may be made in each call
    who = (id(cell), getattr(cell, "training", None)) if code is None else code
    kind = type(given.x_leaves[0]._data)
    return who, kind, _like(given.xs, 1), _like(given.state, 0)


def _like(tree: Any, axis: int) -> Any:
    """Shapes from an axis on, and dtypes, in the structure of a tree."""
    if type(tree) is Tensor:
        return tree._data.shape[axis:], tree._data.dtype
    if isinstance(tree, dict):
        return dict, *[(key, _like(branch, axis)) for key, branch in tree.items()]
    return type(tree), *[_like(branch, axis) for branch in tree]


def _with_precedent(step: Step, failures: int) -> tuple[Step, Precedent | int]:
    """The step without the tensors that the cell had, and the precedent that it makes, if any."""
    trace = step.trace
    events, trace.events = trace.events or [], None
    returned = rebuild((step.y, step.state), iter(leaves((step.y, step.state))))
    y, state = map_leaves(lambda leaf: wrap(leaf._data, leaf._entry), returned)
    step = step._replace(y=y, state=state)
    try:
        forms = _Forms(trace, events)
        if not {id(leaf) for leaf in leaves(returned)} <= forms.known:
            raise LookupError
    except LookupError:
        trace.leaves, trace.parts = [], {}
        return step, PATIENCE
    return step, Precedent(step, forms.forms, returned, failures)


# What an event must be like to be the same again ----------------------------------------------


class Number:
    """In the place of an input that is a Python number, whatever its value."""

    def fits(self, given: Any, captures: dict[Any, int]) -> bool:
        return type(given) is float or (type(given) is int and abs(given) < 2**53)


class Exactly(Number):
    """In the place of one whose value decides what happens, as that of an exponent does."""

    def __init__(self, value: float) -> None:
        self.value = value

    def fits(self, given: Any, captures: dict[Any, int]) -> bool:
        return type(given) in (int, float) and given == self.value


class Outside:
    """In the place of a tensor that was there before, of this shape and dtype."""

    new = False

    def __init__(self, tensor: Tensor) -> None:
        self.kind, self.shape, self.dtype = type(tensor._data), tensor.shape, tensor.dtype

    def fits(self, given: Any, captures: dict[Any, int]) -> bool:
        if type(given) is not Tensor or type(given._data) is not self.kind:
            return False
        return given._data.shape == self.shape and given._data.dtype is self.dtype


class Captured(Outside):
    """In the place of one that has a row of its own, which it gets at its first use."""

    def __init__(self, tensor: Tensor, slot: int, matrix: bool, new: bool) -> None:
        super().__init__(tensor)
        self.slot, self.matrix, self.new = slot, matrix, new

    def fits(self, given: Any, captures: dict[Any, int]) -> bool:
        slot = captures.get((id(given), self.matrix))
        return (slot is None if self.new else slot == self.slot) and super().fits(given, captures)


class Form:
    """An event, and of what kind its inputs were if they are no values of the step."""

    __slots__ = ("begin", "inputs", "made", "op", "others", "params", "several", "simple")

    def __init__(self, event: Event, inputs: Sequence[Any]) -> None:
        self.op, self.inputs, self.params = event.op, tuple(inputs), event.params
        self.begin, self.made, self.several = event.begin, event.made, event.several
        # Numbers and tensors to note down. What several events are made of has its own.
        kept = [(k, each) for k, each in enumerate(inputs) if isinstance(each, (Number, Captured))]
        self.others = () if event.several else tuple(kept)
        alone = not event.several and all(type(each) is Tensor for each in inputs)
        self.simple = alone and len(getattr(event.op, "inputs", ())) in (1, 2)


END = Form(Event(None, (), (), 0, wrap(np.zeros(0), None)), ())  # nothing is like it


class _Forms:
    """The events of a trace as forms. Raises LookupError if rows came about in another way."""

    def __init__(self, trace: Trace, events: Sequence[Event | Form]) -> None:
        self.trace, self.at = trace, len(trace.leaves)
        self.known = {id(tensor) for tensor in trace.leaves}
        self.forms: list[Form] = []
        begins = [event.begin for event in events] + [trace.body]
        if trace.frozen or begins[0] != self.at:
            raise LookupError
        for event, end in zip(events, begins[1:], strict=True):
            self.forms.append(event if isinstance(event, Form) else self._form(event, end))
            self.known.add(id(event.made))
            self.at = end

    def _form(self, event: Event, end: int) -> Form:
        inputs = [self._input(event, given) for given in event.inputs]
        numbers = sum(isinstance(each, Number) for each in inputs)
        if not _is_plain(event.params) or (event.op is RULES["where"] and numbers > 1):
            raise LookupError
        made, new = event.made._data, numbers + sum(getattr(each, "new", 0) for each in inputs)
        own = self.at + (0 if event.several else new)  # the row of the event itself
        if end == own + 1 and not event.several:
            is_told = made.slot == own
        elif event.several:
            is_told = end == own and event.op in (MATMUL, RULES["scalar_power"])
        else:  # one that has been, in another shape; or none at all
            is_told = end == own and (type(made) is not Traced or made.slot < self.at)
        if not is_told:
            raise LookupError
        return Form(event, inputs)

    def _input(self, event: Event, given: Any) -> Any:
        if id(given) in self.known:
            return given
        if type(given) in (int, float):
            return Exactly(given) if event.op is RULES["scalar_power"] else Number()
        if type(given) is not Tensor or type(given._data) is Traced:
            raise LookupError
        if event.several:
            return Outside(given)
        matrix = event.op is MATMUL
        slot = self.trace.captures[id(given), matrix]
        return Captured(given, slot, matrix, slot >= self.at)


def _is_plain(params: Any) -> bool:
    """Whether ``==`` says of these whether they are the same."""
    if type(params) is tuple:
        return all(map(_is_plain, params))
    if type(params) is slice:
        return _is_plain((params.start, params.stop, params.step))
    return params is None or isinstance(params, (int, float, str, type(...), np.dtype))


# Following ------------------------------------------------------------------------------------


def _references(tensors: Sequence[Any]) -> list[int]:
    return [getrefcount(tensor) for tensor in tensors]


_LOOKING = _references([Number()])[0] - 1  # references that looking adds, beside that of the list


class Precedent(Source):
    """What a cell did; and, while it is followed, what stands in the place of a trace."""

    def __init__(self, step: Step, forms: list[Form], returned: Any, failures: int) -> None:
        trace = step.trace
        self.forms, self.returned, self.failures = [*forms, END], returned, failures
        self.leaves, trace.leaves = trace.leaves, []
        self.shared = {name: value for name, value in vars(trace).items() if name not in OF_A_CALL}
        self.rows: list[Row] = trace.rows
        self.step = step._replace(precedent=self, trace=Trace(0, trace.dtype))  # but for its trace
        self.runners: dict[Any, Any] = {}  # compiled code, by what needs a gradient
        made = [form.made for form in forms if type(form.made._data) is Traced]
        self.symbols = list({id(tensor): tensor for tensor in (*self.leaves, *made)}.values())
        for tensor in self.symbols:
            tensor._data.trace = self
        held = [*self.symbols, *self.leaves, *leaves(returned)]
        for form in forms:
            held += [*form.inputs, form.made]
        for parts in trace.parts.values():
            held += parts
        count = Counter(map(id, held))
        self.references = [count[id(tensor)] + _LOOKING for tensor in self.symbols]

    def _begin(self) -> None:
        self.at = 0
        self.captured: list[Tensor] = []
        self.numbers: list[float] = []
        self.seeds: list[int] = []
        self.captures: dict[Any, int] = {}

    def is_held(self) -> bool:
        """Whether anybody else has one of the tensors."""
        return _references(self.symbols) != self.references

    def follow(self, cell: Cell, given: Given, driver: str, outer: Any) -> Step:
        """The step that the cell writes down in this call."""
        self._begin()
        first = iter(self.leaves)
        returned = cell(rebuild(given.xs, first), rebuild(given.state, first))
        trace = recording.tracer
        if trace is self:
            if self.forms[self.at] is END and _same(returned, self.returned):
                if self.shared["draws"]:
                    check_drawn_anew(outer, driver)
                step: Step = self.step._replace(trace=self._trace())
                return step
            trace = self.depart()
        return finish_trace(trace, returned, cell, given, driver, outer)

    def _trace(self) -> Trace:
        """The trace that this call would have written."""
        trace = Trace.__new__(Trace)
        own = vars(trace)
        own.update(self.shared)
        own.update(captured=self.captured, numbers=self.numbers, seeds=self.seeds)
        own.update(captures=self.captures, events=None, leaves=[])
        self._begin()  # and keep nothing of this call
        return trace

    def apply(self, op: Any, inputs: Sequence[Any], params: tuple[Any, ...]) -> Tensor | None:
        """As ``Trace.apply``."""
        form = self.forms[self.at]
        if form.op is op and form.params == params:
            likes = form.inputs
            if form.simple:  # one or two values of the step
                if inputs[0] is likes[0] and inputs[-1] is likes[-1]:
                    self.at += 1
                    return form.made
            elif self._fit(inputs, likes):
                self._take(form, inputs)
                return self._several(form, inputs) if form.several else form.made
        return self.depart().apply(op, inputs, params) if is_traced(inputs) else None

    def _fit(self, inputs: Sequence[Any], likes: Sequence[Any]) -> bool:
        if len(inputs) != len(likes):
            return False
        for given, like in zip(inputs, likes):  # noqa: B905
            if given is not like and (type(like) is Tensor or not like.fits(given, self.captures)):
                return False
        return True

    def _take(self, form: Form, inputs: Sequence[Any]) -> None:
        self.at += 1
        for k, like in form.others:
            if type(like) is not Captured:
                self.numbers.append(float(inputs[k]))
            elif like.new:
                self.captured.append(inputs[k])
                self.captures[id(inputs[k]), like.matrix] = like.slot

    def _several(self, form: Form, inputs: Sequence[Any]) -> Tensor:
        if form.op is MATMUL:
            parts: tuple[Tensor, ...] = self.shared["parts"][inputs[0]._data.slot]
            return product_of_parts(parts, inputs[1])
        return power_of(*inputs)

    def compare(self, name: str, a: Any, b: Any) -> Tensor:
        form = self.forms[self.at]
        if form.op is not name or not self._fit((a, b), form.inputs):
            return self.depart().compare(name, a, b)
        self._take(form, (a, b))
        return form.made

    def uniform(self, shape: tuple[int, ...], rng: Rng, per_sequence: bool = False) -> Tensor:
        form = self.forms[self.at]
        if form.op != "uniform" or form.params != (shape, per_sequence):
            return self.depart().uniform(shape, rng, per_sequence)
        self.at += 1
        if per_sequence:
            dtype = self.shared["dtype"]
            return drawn(new_seed(rng), 0, 0, shape, dtype).to(self.shared["device"])
        self.seeds.append(new_seed(rng))
        return form.made

    # Doing something else

    def depart(self) -> Trace:
        """From here on an ordinary trace, which has all that was followed so far."""
        if recording.tracer is not self:
            self._refuse()
        shared, at = self.shared, self.at
        form = self.forms[at]
        end = shared["body"] if form is END else form.begin
        trace = Trace(shared["B"], shared["dtype"], shared["device"], noted=True)
        trace.rows, trace.widths = shared["rows"][:end], shared["widths"][:end]
        trace.single = shared["single"][:end]
        trace.starts = {slot: start for slot, start in shared["starts"].items() if slot < end}
        cuts = {base: [s for s in cut if s < end] for base, cut in shared["cuts"].items()}
        trace.cuts = {base: cut for base, cut in cuts.items() if cut}
        trace.parts = {slot: parts for slot, parts in shared["parts"].items() if slot < end}
        trace.matrices = shared["matrices"][: len(self.captured)]
        trace.captured, trace.numbers, trace.seeds = self.captured, self.numbers, self.seeds
        trace.captures, trace.leaves = self.captures, self.leaves
        trace.draws = any(form.op == "uniform" for form in self.forms[:at])
        trace.events = [*self.forms[:at]]
        for tensor in self.symbols:
            if tensor._data.slot < end:
                tensor._data.trace = trace
        recording.tracer = recording.draws = trace
        self.symbols, self.leaves, self.forms, self.returned = [], [], [], None
        return trace

    def _refuse(self) -> NoReturn:
        Trace(0, np.dtype("float32")).refuse_foreign()

    def cast(self, x: Traced, dtype: np.dtype[Any]) -> Traced:
        return x if dtype == x.dtype else self.depart().cast(x, dtype)

    def invert(self, x: Tensor) -> Tensor:
        return self.depart().invert(x)

    def detach(self, x: Tensor) -> Tensor:
        return self.depart().detach(x)


def _same(a: Any, b: Any) -> bool:
    """Whether two structures have the same leaves."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(map(_same, a.values(), b.values()))
    return False
