"""Tracing a cell again, along what it did the last time.

The cell is run in every call of ``scan`` unless it is settled (``settled.py``), and mostly it does
again what it did before. So what it asked for is kept, and in the next call it is given the tensors
of the step, the very objects, that it had then. Each operation is compared with the one that came
at this place: the same operation on the same objects, beside tensors that were there before of the
same shapes. While that holds, nothing is worked out and nothing written, and it gives the object of
the last time. At the first difference what was followed so far becomes an ordinary tracer, which
goes on.

Nothing is taken for granted of a cell: what it closes over, its numbers and its seeds are those of
this call. All rests on this, that one of these objects means the same value in every call. So a
call is followed only if nobody has kept one of them (or a weak reference to one) from an earlier
call; and they cannot be changed. Shapes and dtypes of inputs and states, by which a precedent is
looked up, are part of what must be the same.

Imports the engine, trace and its own room.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from operator import is_
from sys import getrefcount
from typing import Any, NamedTuple
from weakref import getweakrefcount, ref

import numpy as np

from tinygrad_seq.creation import Rng, new_seed
from tinygrad_seq.recurrence.arguments import Cell, Given
from tinygrad_seq.recurrence.choices import as_row, full_shape
from tinygrad_seq.recurrence.draws import Source, check_drawn_anew, drawn
from tinygrad_seq.recurrence.lowering import (
    Shares,
    extremum,
    product_of_lines,
    product_of_parts,
)
from tinygrad_seq.recurrence.settled import Known, Made, Settled, settle, settled
from tinygrad_seq.recurrence.trace import BESIDE, CAPTURED, ROLES, Step, Trace, Traced
from tinygrad_seq.recurrence.tracing import (
    Event,
    Tracer,
    begin_trace,
    finish_trace,
    is_number,
    power_of,
    trace_cell,
    tracing,
)
from tinygrad_seq.rules import RULES
from tinygrad_seq.structural import CONCAT, LINEAR, MATMUL, MAX, MIN, STACK
from tinygrad_seq.tape import recording
from tinygrad_seq.tensors import Tensor, is_traced, wrap
from tinygrad_seq.trees import leaves, map_leaves, rebuild

MOST = 256  # precedents that are kept
EXACT = 2**24  # whole numbers up to here are float32's too
PATIENCE = 8  # how often, one after another, a cell may do something else before it is let be

# What several events may be made of, see ``_several``.
SEVERAL = (MATMUL, LINEAR, MAX, MIN, RULES["scalar_power"])

_NOWHERE = Tracer(Trace(0, np.dtype("float32")))
_precedents: dict[Any, Precedent] = {}
_let_be: set[Any] = set()  # for whom there will be none


def trace_again(cell: Cell, given: Given, dtype: np.dtype[Any]) -> Step:
    """What ``trace_cell`` gives, in less time if the cell does what it did before."""
    key = _key(cell, given)
    found = settled(cell)
    known = None if found is None else found.steps.get((given.B, key))
    if known is not None:
        return known.again()
    precedent = _precedents.pop(key, None)  # whoever follows it has it alone
    if key is None or key in _let_be:
        return trace_cell(cell, given, dtype)
    if precedent is not None and not precedent.is_held():
        with tracing(precedent) as outer:
            step, tracer = precedent.follow(cell, given, outer, key)
    else:
        if precedent is not None:
            precedent.let_go()
        tracer, x, state = begin_trace(given, dtype, noted=True)
        with tracing(tracer) as outer:
            step = finish_trace(tracer, cell(x, state), cell, given, outer)
    if tracer is None:  # the cell did what it did before, to the end
        step.precedent.failures = 0
        _precedents[key] = step.precedent
        return step
    failures = 0 if precedent is None else precedent.failures + 1
    step, made = _with_precedent(step, tracer, failures)
    if len(_precedents) + len(_let_be) >= MOST:
        _precedents.clear()
        _let_be.clear()
    if made is not None and made.failures < PATIENCE:
        _precedents[key] = made
    else:
        _let_be.add(key)
    return step


def _key(cell: Any, given: Given) -> Any:
    """What a precedent is looked up by; None if there cannot be one.

    Which cell it is need not be certain, for every operation is compared. But structures, shapes,
    dtypes and the device of inputs and states must be: they are not looked at again.
    """
    code = getattr(cell, "__code__", None)  # that of a function, which may be made in each call
    if code is None:
        code = id(cell), getattr(cell, "__dict__", {}).get("training") is False
    xs, state = _shapes_in(given.xs, 1), _shapes_in(given.state, 0)
    if xs is None or state is None:
        return None
    return code, type(given.x_leaves[0]._data), xs, state


def _shapes_in(tree: Any, axis: int) -> Any:
    """Shapes from an axis on, and dtypes, in the structure of a tree; None for strange keys."""
    if type(tree) is Tensor:
        return tree._data.shape[axis:], tree._data.dtype
    branches = tree
    if isinstance(tree, dict):
        if any(type(key) is not str for key in tree):
            return None
        branches = tree.values()
    made = [_shapes_in(branch, axis) for branch in branches]
    return None if None in made else (type(tree), tuple(tree) * isinstance(tree, dict), *made)


def _with_precedent(step: Step, tracer: Tracer, failures: int) -> tuple[Step, Precedent | None]:
    """The step without the tensors that the cell had, and the precedent that it makes, if any."""
    returned = rebuild((step.y, step.state), iter(leaves((step.y, step.state))))
    y, state = map_leaves(_of_no_tracer, returned)
    step = step._replace(y=y, state=state)
    try:
        forms = _Forms(tracer)
        if not {id(leaf) for leaf in leaves(returned)} <= forms.known:
            raise LookupError
        made = Precedent(step, tracer, forms.forms, returned, failures)
    except LookupError:
        made = None
    tracer.events, tracer.leaves, tracer.parts = None, [], {}  # which hold the tracer
    return step, made


def _of_no_tracer(leaf: Tensor) -> Tensor:
    """Another tensor of the same shape and dtype, so that the step holds none that the cell had."""
    data = leaf._data
    if type(data) is Traced:
        data = Traced(_NOWHERE, data.slot, data.shape, data.dtype)
    return wrap(data, leaf._entry)


# What an event must be like to be the same again ----------------------------------------------


class Number:
    """In the place of an input that is a Python number, whatever its value."""

    new = True  # it has a row of its own

    def fits(self, given: Any, captures: dict[Any, int]) -> bool:
        return type(given) is float or (type(given) is int and abs(given) <= EXACT)


class Scalar(Number):
    """In the place of a tensor of no axes that was taken for a number."""

    def __init__(self, tensor: Tensor, of_step: np.dtype[Any]) -> None:
        self.dtype, self.of_step = tensor.dtype, of_step

    def fits(self, given: Any, captures: dict[Any, int]) -> bool:
        if type(given) is not Tensor or type(given._data) is Traced:
            return False
        return given.dtype is self.dtype and is_number(given, self.of_step)


class Exactly(Number):
    """In the place of one whose value decides what happens, as that of an exponent does."""

    def __init__(self, value: float) -> None:
        self.value = value

    def fits(self, given: Any, captures: dict[Any, int]) -> bool:
        return type(given) is type(self.value) and given == self.value


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
    """In the place of one that has a row, which it gets at its first use: ``new`` says so.

    ``full`` is what it is broadcast to there, if it is no row as it is.
    """

    def __init__(self, tensor: Tensor, slot: int, role: str, full: Any, new: bool) -> None:
        super().__init__(tensor)
        self.slot, self.key, self.full, self.new = slot, full or role, full, new

    def fits(self, given: Any, captures: dict[Any, int]) -> bool:
        slot = captures.get((id(given), self.key))
        return (slot is None if self.new else slot == self.slot) and super().fits(given, captures)


PLAIN = {int, float, bool, str, type(None), type(...)}


def _plain(params: Any) -> Any:
    """Params that ``_equal`` can compare and nobody changes; raises LookupError for others."""
    if type(params) is np.ndarray:
        return params.copy()
    if type(params) is tuple:
        made = tuple([_plain(each) for each in params])
        return params if all(map(is_, made, params)) else made
    parts = (params.start, params.stop, params.step) if type(params) is slice else (params,)
    if not all(type(each) in PLAIN or isinstance(each, np.dtype) for each in parts):
        raise LookupError
    return params


def _equal(a: Any, b: Any) -> bool:
    """Whether params are the same, types and all; b is plain."""
    if a is b:
        return True
    kind = type(b)
    if type(a) is not kind:
        return False
    if kind is tuple:
        return len(a) == len(b) and all(map(_equal, a, b))
    if kind is np.ndarray:
        return a.dtype == b.dtype and np.array_equal(a, b)
    if kind is slice:
        return _equal(a.start, b.start) and _equal(a.stop, b.stop) and _equal(a.step, b.step)
    return bool(a == b)


class Constant(NamedTuple):
    """What the step reads besides: a tensor that the tracer made, not the cell."""

    tensor: Tensor
    slot: int
    role: str


class Form:
    """An event, and of what kind its inputs were if they are no values of the step."""

    __slots__ = ("begin", "inputs", "made", "new", "op", "operands", "params", "several", "simple")

    def __init__(
        self, event: Event, inputs: Sequence[Any], operands: Sequence[int | Constant] = ()
    ) -> None:
        self.op, self.inputs, self.params = event.op, tuple(inputs), _plain(event.params)
        self.begin, self.several = event.begin, event.several
        self.made = event.made if type(event.made._data) is Traced else None
        self.operands = operands  # see ``_Forms``; what is made of several events has none
        self.new = [k for k in operands if type(k) is int]
        alone = not event.several and not operands and all(type(each) is Tensor for each in inputs)
        self.simple = alone and len(getattr(event.op, "inputs", ())) in (1, 2)


END = Form(Event(None, (), (), 0, 0, wrap(np.zeros(0), None)), ())  # nothing is like it


class _Forms:
    """What a tracer noted, as forms. Raises LookupError, of which KeyError is one, if that does not
    account for all rows, or if one could not be told from another."""

    def __init__(self, tracer: Tracer) -> None:
        self.captures, self.at = tracer.captures, len(tracer.leaves)
        self.rows, self.roles = tracer.trace.rows, tracer.trace.roles
        self.dtype = tracer.trace.dtype
        self.captured = tracer.captured
        self.known = {id(tensor) for tensor in tracer.leaves}  # the values of the step so far
        self.forms: list[Form] = []
        events = tracer.events or []
        begins = [event.begin for event in events] + [tracer.body]
        detached = {event.made._data.slot for event in events if event.op == "detach"}
        if tracer.trace.frozen != detached or begins[0] != self.at:
            raise LookupError  # what no_grad freezes is no event
        for event, end in zip(events, begins[1:], strict=True):
            form = event if isinstance(event, Form) else self._form(event, end)
            self.forms.append(form)
            if form.made is not None:
                self.known.add(id(form.made))
            self.at = end

    def _form(self, event: Event, end: int) -> Form:
        inputs = [self._input(event, given) for given in event.inputs]
        if event.several:  # its rows are those of the events that follow
            if end > self.at or event.op not in SEVERAL:
                raise LookupError
            return Form(event, inputs)
        if end != event.end or (end > self.at and type(event.made._data) is not Traced):
            raise LookupError
        return Form(event, inputs, self._operands(inputs, end))

    def _operands(self, inputs: Sequence[Any], end: int) -> list[int | Constant]:
        """What gets one of the rows up to ``end``: inputs, by where they stand, and constants."""
        new = {like.slot: k for k, like in enumerate(inputs) if type(like) is Captured and like.new}
        numbers = [k for k, like in enumerate(inputs) if isinstance(like, Number)]
        operands: list[int | Constant] = []
        for slot in range(self.at, end):
            row = self.rows[slot]
            if row.op == "number":
                operands.append(numbers.pop(0))  # an IndexError is a LookupError too
            elif row.op in CAPTURED:
                k = row.detail
                constant = Constant(self.captured[k], slot, self.roles[k])
                operands.append(new.pop(slot, constant))
        wanted = [k for k, like in enumerate(inputs) if type(like) is not Tensor and like.new]
        if sorted(k for k in operands if type(k) is int) != wanted:
            raise LookupError  # one stands there twice
        return operands

    def _input(self, event: Event, given: Any) -> Any:
        if id(given) in self.known:
            return given
        if type(given) in (int, float):
            return Exactly(given) if event.op is RULES["scalar_power"] else Number()
        if type(given) is not Tensor or type(given._data) is Traced:
            raise LookupError
        if event.several:
            return Outside(given)
        if event.op in (CONCAT, STACK):  # whose parts may be taken apart again
            raise LookupError
        role = BESIDE if type(event.op) is str else ROLES.get(event.op.name, BESIDE)
        if role is BESIDE and is_number(given, self.dtype):
            return Scalar(given, self.dtype)
        full = full_shape(given.shape, event.made.shape) if role is BESIDE else None
        slot = self.captures[id(given), full or role]
        return Captured(given, slot, role, full, slot >= self.at)


# Following ------------------------------------------------------------------------------------


def _references(objects: Sequence[Any]) -> list[int]:
    return [getrefcount(each) for each in objects]


# References that looking adds to that of the list; too many of them would say that all is held.
_LOOKING = _references([Number()])[0] - 1


class Precedent(Source):
    """What a cell asked for; and, while it is followed, what stands in the place of a tracer.

    Once it has departed, it passes on to the tracer that it became what it may still be asked for.
    """

    def __init__(
        self, step: Step, tracer: Tracer, forms: list[Form], returned: Any, failures: int
    ) -> None:
        self.forms, self.returned, self.failures = [*forms, END], returned, failures
        self.trace = step.trace  # the steps of all calls share it, and nobody writes to it
        self.step = step._replace(captured=[], numbers=[], seeds=[])
        self.leaves, self.parts, self.products = tracer.leaves, tracer.parts, tracer.products
        self.constants = tracer.constants
        self.body = tracer.body
        self.runners: dict[Any, Any] = {}  # compiled code, by what needs a gradient
        self.chances = PATIENCE  # how often the cell may still be settled, see ``_settle``
        self.known: ref[Known] | None = None  # what came of the last time
        made = [form.made for form in forms if form.made is not None]
        self.symbols = list({id(tensor): tensor for tensor in (*self.leaves, *made)}.values())
        for tensor in self.symbols:
            tensor._data.tracer = self
        self.watched = [*self.symbols, *{id(t._data): t._data for t in self.symbols}.values()]
        self.references = self._own_references()
        self._begin()

    def _own_references(self) -> list[int]:
        """How many references there are if only this object has any."""
        held = [*self.watched, *self.symbols, *self.leaves, *leaves(self.returned)]
        for form in self.forms:
            held += [*form.inputs, form.made]
        for parts in self.parts.values():
            held += parts
        held += [tensor._data for tensor in self.symbols]
        count = Counter(map(id, held))
        return [count[id(each)] + _LOOKING for each in self.watched]

    def is_held(self) -> bool:
        """Whether anybody else has one of the tensors, or what is in one."""
        held = _references(self.watched) != self.references
        return held or any(map(getweakrefcount, self.symbols))

    def _begin(self) -> None:
        """Nothing of any call."""
        self.at = 0
        self.departed: Tracer | None = None
        self.captured: list[Tensor] = []
        self.numbers: list[float] = []
        self.seeds: list[int] = []
        self.beside: list[Made] = []  # what was made of tensors that are no values of the step
        self.captures: dict[Any, int] = {}
        self.originals: list[Tensor] = []
        self.shares: Shares = {}

    def follow(self, cell: Cell, given: Given, outer: Any, key: Any) -> tuple[Step, Tracer | None]:
        """The step that the cell writes down in this call, and who wrote it, if it departed."""
        first = iter(self.leaves)
        readable = self._readable(cell)
        try:
            returned = cell(rebuild(given.xs, first), rebuild(given.state, first))
            tracer = self.departed
            if tracer is None:
                if self.forms[self.at] is END and _same_leaves(returned, self.returned):
                    if self.step.draws:
                        check_drawn_anew(outer, given.driver)
                    step = self.step._replace(
                        captured=self.captured,
                        numbers=self.numbers,
                        seeds=self.seeds,
                        precedent=self,
                    )
                    if readable is not None:
                        self._settle(readable, cell, (given.B, key), step)
                    return step, None
                tracer = self.depart()
            return finish_trace(tracer, returned, cell, given, outer), tracer
        except BaseException:
            self.let_go()
            raise
        finally:
            self._begin()

    # What a cell asks a tracer for

    def apply(self, op: Any, inputs: Sequence[Any], params: tuple[Any, ...]) -> Tensor | None:
        form = self.forms[self.at]
        if form.op is op and (form.params is params or _equal(params, form.params)):
            likes = form.inputs
            if form.simple:  # one or two values of the step
                if inputs[0] is likes[0] and inputs[-1] is likes[-1]:
                    self.at += 1
                    return form.made
            elif self._fit(form, inputs):
                self._take(form, inputs)
                return self._several(form, inputs) if form.several else form.made
        return self.depart().apply(op, inputs, params) if is_traced(inputs) else None

    def _fit(self, form: Form, inputs: Sequence[Any]) -> bool:
        if len(inputs) != len(form.inputs):
            return False
        for given, like in zip(inputs, form.inputs):  # noqa: B905
            if given is not like and (type(like) is Tensor or not like.fits(given, self.captures)):
                return False
        return len(form.new) < 2 or len({id(inputs[k]) for k in form.new}) == len(form.new)

    def _take(self, form: Form, inputs: Sequence[Any]) -> None:
        self.at += 1
        for k in form.operands:
            if isinstance(k, Constant):
                self.captured.append(k.tensor)
                self.captures[id(k.tensor), k.role] = k.slot
                continue
            like, given = form.inputs[k], inputs[k]
            if type(like) is not Captured:
                self.numbers.append(float(given))
                continue
            self.captures[id(given), like.key] = like.slot
            if like.full is not None:
                self.originals.append(given)
                given = as_row(given, like.full)
            self.captured.append(given)

    def _several(self, form: Form, inputs: Sequence[Any]) -> Tensor:
        """What is made of several events, which come next: asked for again, one by one."""
        if form.op is RULES["scalar_power"]:
            return power_of(*inputs)
        name = form.op.name
        if form.op in (MAX, MIN):
            return extremum(name, inputs[0], *form.params)
        if max(each.ndim for each in inputs) > 2:
            return product_of_lines(name, inputs, self.shares)
        parts: tuple[Tensor, ...] = self.parts[inputs[0]._data.slot]
        return product_of_parts(name, parts, inputs[1], self.shares)

    def note(self, *made: Any) -> None:
        """What an operation has made of tensors that were there before."""
        if self.chances:
            self.beside.append(Made(*made))

    def _readable(self, cell: Cell) -> Settled | None:
        """What is known of a cell before it is run, for another thread may change it meanwhile."""
        if not self.chances:
            return None
        try:
            return settled(cell) or Settled(cell)
        except LookupError:
            self.chances = 0
            return None

    def _settle(self, readable: Settled, cell: Cell, key: Any, step: Step) -> None:
        """From now on the cell need not be run, if all that it can read is known.

        That is given up if something has changed again and again before it was of use.
        """
        last = None if self.known is None else self.known()
        try:
            known = settle(readable, cell, key, step, self.beside)
        except LookupError:
            self.chances = 0
            return
        self.known = None if known is None else ref(known)  # which holds parameters of the cell
        self.chances = PATIENCE if last is not None and last.used else self.chances - 1

    def compare(self, name: str, a: Any, b: Any) -> Tensor:
        form = self.forms[self.at]
        if form.op is not name or not self._fit(form, (a, b)):
            return self.depart().compare(name, a, b)
        self._take(form, (a, b))
        assert form.made is not None
        return form.made

    def uniform(self, shape: tuple[int, ...], rng: Rng, per_sequence: bool = False) -> Tensor:
        form = self.forms[self.at]
        if form.op != "uniform" or not _equal((shape, per_sequence), form.params):
            return self.depart().uniform(shape, rng, per_sequence)
        seed = new_seed(rng)
        self.at += 1
        if form.made is None:  # once for the whole sequence
            return drawn(seed, 0, 0, shape, self.trace.dtype).to(self.trace.device)
        self.seeds.append(seed)
        return form.made

    # Doing something else

    def depart(self) -> Tracer:
        """From here on an ordinary tracer, which has all that was followed so far."""
        if self.departed is not None:
            return self.departed
        at, form = self.at, self.forms[self.at]
        end = self.body if form is END else form.begin
        tracer = Tracer(self.trace.up_to(end), noted=True)
        if recording.tracer is not self:  # a value of this call in another cell
            tracer.refuse_foreign()
        tracer.captured, tracer.numbers, tracer.seeds = self.captured, self.numbers, self.seeds
        tracer.captures, tracer.shares, tracer.leaves = self.captures, self.shares, self.leaves
        tracer.originals = self.originals
        tracer.parts = {slot: parts for slot, parts in self.parts.items() if slot < end}
        tracer.products = {key: slot for key, slot in self.products.items() if slot < end}
        read = {id(tensor) for tensor in self.captured}
        tracer.constants = {key: t for key, t in self.constants.items() if id(t) in read}
        tracer.draws = any(form.op == "uniform" for form in self.forms[:at])
        tracer.events = [*self.forms[:at]]
        for tensor in self.symbols:
            if tensor._data.slot < end:
                tensor._data.tracer = tracer
        recording.tracer = self.departed = tracer
        if recording.draws is self:
            recording.draws = tracer
        self.let_go()
        return tracer

    def let_go(self) -> None:
        """Hold none of the tensors any more."""
        self.symbols, self.watched, self.leaves, self.forms = [], [], [], [END]
        self.parts = {}
        self.at, self.returned = 0, None

    def cast(self, x: Traced, dtype: np.dtype[Any]) -> Traced:
        return x if dtype == x.dtype else self.depart().cast(x, dtype)

    def invert(self, x: Tensor) -> Tensor:
        return self.compare("equal", x, 0.0) if x.dtype == np.bool_ else self.depart().invert(x)

    def detach(self, x: Tensor) -> Tensor:
        form = self.forms[self.at]
        if form.op != "detach" or form.inputs[0] is not x:
            return self.depart().detach(x)
        self.at += 1
        assert form.made is not None
        return form.made


def _same_leaves(a: Any, b: Any) -> bool:
    """Whether two structures have the same leaves, and keys of the same types."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same_leaves, a, b))
    if isinstance(a, dict):
        keys = list(a) == list(b) and list(map(type, a)) == list(map(type, b))
        return keys and all(map(_same_leaves, a.values(), b.values()))
    return False
