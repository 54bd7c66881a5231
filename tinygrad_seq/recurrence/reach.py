"""What a cell can read, and whether all of it is what it was.

A cell reads its inputs and what it can come to from itself: attributes of its modules, what a
function closes over, globals. Code of this package is known to read nothing else. That of others is
gone through, instruction by instruction: it may call, compute and choose, but not assign to what
outlives the call, and each of its names must lead to a tensor, a number, a string, a container or a
module of such, or to a function of this package, of ``math``, or one that is gone through in its
turn. Of a cell that does more a LookupError says that nothing is known. Imports tensors.
"""

from __future__ import annotations

import builtins
import dis
import math
import sys
from collections.abc import Sequence
from functools import lru_cache
from operator import is_
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from tinygrad_seq.tensors import FLOATS, Tensor

MOST = 1000  # values in containers; to look at more takes longer than to run the cell
HERE = __name__.partition(".")[0]
# Modules of this package whose functions compute, and do nothing else.
COMPUTING = {"composites", "creation", "elementwise", "structural", "trees"}
COMPUTING |= {"nn.functional", "nn.gates"}
COMPUTING = {f"{HERE}.{name}" for name in COMPUTING}
# What never changes; and generators, which matter only where something is drawn. Not what others
# derive of them, which may do anything, nor records of NumPy, which change in place.
CONSTANT = (int, float, str, type(None), type(...), np.dtype, np.generic, np.random.Generator)
# Instructions that leave alone whatever is there when the call is over, by how they begin.
HARMLESS = tuple(
    "BINARY_ BUILD_ CACHE CALL COMPARE_ CONTAINS_ CONVERT_ COPY DICT_ END_FOR EXTENDED_ARG FORMAT_ "
    "FOR_ITER GET_ITER IS_OP JUMP KW_NAMES LIST_ LOAD_ASSERTION LOAD_CLOSURE LOAD_CONST LOAD_DEREF "
    "LOAD_FAST LOAD_SMALL_INT MAKE_ MAP_ADD NOP NOT_TAKEN POP_ PRECALL PUSH_NULL RAISE_ RERAISE "
    "RESUME RETURN_ SET_ADD SET_FUNCTION SET_UPDATE STORE_DEREF STORE_FAST SWAP TO_BOOL UNARY_ "
    "UNPACK_ YIELD_VALUE".split()
)
BUILTINS = {"abs", "bool", "dict", "enumerate", "float", "int", "isinstance", "len", "list", "map"}
BUILTINS |= {"max", "min", "range", "reversed", "round", "sorted", "str", "sum", "tuple", "zip"}
# Of tensors, and of modules that compute, but what a step cannot have: they look at values, at how
# a tensor is trained, or change something.
REFUSED = {"backward", "data", "grad", "is_leaf", "item", "manual_seed", "numpy", "requires_grad"}
REFUSED |= {"tolist", "version"}
OF_TENSORS = {name for name in dir(Tensor) if not name.startswith("_")}
OF_OTHERS = {"format", "get", "index", "items", "join", "keys", "kind", "name", "values"}
SHOWING = "__repr__"  # asked for, without its name, by what makes a text
# What changes one of these, or draws from it, if a cell can come to one.
CHANGING = {
    kind: {*dir(kind)} - OF_OTHERS - {SHOWING} for kind in (list, dict, np.random.Generator)
}
REGISTERS = {"_buffers", "_parameters"}  # sets of names, see module.py, that no step looks at
REFUSED |= REGISTERS
# What this package asks for of any module, so that code of others need not name it.
ENTRIES = {"__call__", "forward", "initial_state", "training"}
# What a class may have whose names begin and end so; others may be operators, called without one.
SPECIAL = {"__annotations__", "__call__", "__dict__", "__doc__", "__firstlineno__", "__init__"}
SPECIAL |= {"__module__", "__repr__", "__static_attributes__", "__weakref__"}
OF_DATACLASSES = {"__dataclass_fields__", "__dataclass_params__", "__eq__", "__hash__"}
OF_DATACLASSES |= {"__match_args__", "__post_init__", "__replace__"}


class _Record(NamedTuple):
    """What every NamedTuple has beside its fields."""


class Used(NamedTuple):
    """The names in a function's code."""

    globals: set[str]
    attributes: set[str]


@lru_cache(1024)
def _used(code: CodeType) -> Used | None:
    """The names that a function uses, None if it may change something."""
    used = Used(set(), set())
    for each in dis.get_instructions(code):
        if each.opname == "LOAD_GLOBAL":
            used.globals.add(each.argval)
        elif each.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            used.attributes.add(each.argval)
        elif not each.opname.startswith(HARMLESS):
            return None
        if each.opname == "BINARY_OP" and each.argrepr.endswith("="):  # x += y
            return None
        text = each.opname.startswith("FORMAT_") or each.argval in ("str", "format")
        if text or (each.opname == "BINARY_OP" and each.argrepr == "%"):
            used.attributes.add(SHOWING)
        if each.opname == "STORE_DEREF" and each.argval in code.co_freevars:  # nonlocal
            return None
    for constant in code.co_consts:  # comprehensions, functions inside
        if isinstance(constant, CodeType):
            inner = _used(constant)
            if inner is None:
                return None
            used.globals.update(inner.globals)
            used.attributes.update(inner.attributes)
    return used


@lru_cache(256)
def _asked(kind: type) -> frozenset[str]:
    """Names that a class of this package has, and those that its code asks for."""
    names = {*vars(kind)}
    found = [_in_class(value) for value in vars(kind).values()]
    codes = [value.__code__ for value in found if type(value) is FunctionType]
    while codes:
        code = codes.pop()
        names.update(code.co_names)
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return frozenset(names)


def _in_class(value: Any) -> Any:
    """What code comes to by the name of something in a class: a property's function, for one.

    Not of what is derived of a property, which may do more than call it.
    """
    if type(value) is property:
        return value.fget
    return value.__func__ if type(value) in (staticmethod, classmethod) else value


def _is_own(home: Any) -> bool:
    """Whether a module of this name is one of this package."""
    return type(home) is str and (home == HERE or home.startswith(f"{HERE}."))


def _home(function: FunctionType) -> Any:
    """The module in which it was written; ``functools.wraps`` may say another."""
    return function.__globals__.get("__name__")


def kinds(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """What is fixed of tensors while values change: where arrays are, dtypes, shapes, strides."""
    arrays = [tensor._data for tensor in tensors]
    return tuple([(type(each), each.dtype.char, each.shape, each.strides) for each in arrays])


class Reach:
    """All that a cell can read."""

    def __init__(self, cell: Any) -> None:
        """Raises LookupError if it may read something else, or change something."""
        # Containers, with the names and the values in them; only a dict has names.
        self._holders: list[tuple[Any, list[str], list[Any]]] = []
        # Objects, with their classes and dicts, and what others wrote: functions, with code and
        # defaults; globals and variables around them, with their values; and classes. None stands
        # for the cell itself, or it never goes.
        self._objects: list[tuple[Any, type, dict[str, Any]]] = []
        self._functions: list[tuple[Any, CodeType, Any]] = []
        self._globals: list[tuple[dict[str, Any], str, Any]] = []
        self._closures: list[tuple[Any, Any]] = []
        self._classes: list[type] = []
        self._orders: list[tuple[type, Any]] = []  # in which their bases are looked through
        self._records: list[type] = []
        self._names, self._refused = {*ENTRIES}, {*REFUSED}  # of attributes that code asks for
        self._known_names = ENTRIES | OF_TENSORS | OF_OTHERS | {SHOWING}
        # For the time of reading: the cell, tensors by id, the ids of functions gone through, and
        # how much there is in containers.
        self._cell, self._found, self._seen = cell, dict[int, Tensor](), set[int]()
        self._count = 0
        self._read(cell)
        self._read_names()
        self.tensors = [*self._found.values()]
        self._kinds = kinds(self.tensors)
        self._fixed = [(tensor, tensor._data) for tensor in self.tensors if self.may_decide(tensor)]
        del self._cell, self._found, self._seen, self._count

    @property
    def is_own(self) -> bool:
        """Whether all code is of this package."""
        return not self._functions and not self._classes

    def may_decide(self, tensor: Tensor) -> bool:
        """Whether values may say what is done: as a number, a condition, or which elements to take.

        No code of this package asks for that of a parameter with one element.
        """
        single = tensor.size == 1 and not self.is_own
        return single or not tensor.ndim or tensor.dtype not in FLOATS

    def _read(self, value: Any) -> None:
        """Note everything that can be come to from a value."""
        kind = type(value)
        if value is self._cell and (self._objects or self._functions):
            raise LookupError  # what leads back to the cell would keep it alive
        self._refused |= CHANGING.get(kind, set())
        if kind is Tensor:
            if not value.is_leaf:  # of this call alone, with the tape that led to it
                raise LookupError
            self._found[id(value)] = value
        elif kind is FunctionType:
            if _is_own(_home(value)):
                _check_computes(value)
            else:
                self._read_function(value)
        elif kind in (list, tuple, dict):
            self._read_all(value)
        elif _is_record(kind):
            self._known_names.update(kind._fields)
            if kind not in self._records:
                self._records.append(kind)
                self._holders.append((vars(kind), [*vars(kind)], [*vars(kind).values()]))
            self._read_all((*value,))
        elif kind in (ModuleType, BuiltinFunctionType):
            home = value.__name__ if kind is ModuleType else value.__module__
            if home != "math" and not _is_own(home):
                raise LookupError
        elif hasattr(value, "__dict__"):
            for each in kind.__mro__[:-1]:
                if not _is_own(each.__module__) and each is not SimpleNamespace:
                    self._read_class(each)
                    for base in kind.__mro__[:-1]:  # code of this package may ask for these
                        if _is_own(base.__module__) and base.__base__ is not object:
                            own = {name for name in vars(each) if not _is_special(name)}
                            self._names |= _asked(base) & own
            own = value.__dict__
            self._objects.append((None if value is self._cell else value, kind, own))
            self._read_all(own)
        elif not _is_constant(value):
            raise LookupError

    def _read_all(self, holder: Any) -> None:
        if any(holder is known for known, *_ in self._holders):
            return
        is_dict = type(holder) is dict
        names, held = ([*holder], [*holder.values()]) if is_dict else ([], [*holder])
        self._count += len(held)
        if self._count > MOST or not all(type(name) is str for name in names):
            raise LookupError
        if type(holder) is not tuple:
            self._holders.append((holder, names, held))
        for name, value in zip(names or [""] * len(held), held, strict=True):
            if name not in REGISTERS:
                self._read(value)

    def _read_class(self, kind: type) -> None:
        """One that somebody else wrote. What is in it is read where its name is used."""
        held = vars(kind)
        special = {name for name in held if _is_special(name)}
        if special - SPECIAL - (OF_DATACLASSES if _is_dataclass(held) else set()):
            raise LookupError
        if kind not in self._classes:
            self._classes.append(kind)
            self._orders.append((kind, kind.__mro__))
            self._holders.append((held, [*held], [*held.values()]))

    def _read_function(self, function: FunctionType) -> None:
        """One that somebody else wrote."""
        if id(function) in self._seen:
            return
        self._seen.add(id(function))
        used = _used(function.__code__)
        if used is None or function.__dict__ or function.__kwdefaults__:
            raise LookupError
        held = None if function is self._cell else function
        self._functions.append((held, function.__code__, function.__defaults__))
        self._names |= used.attributes
        self._read(function.__defaults__)
        around = function.__globals__
        for name in used.globals:
            value = around.get(name)
            self._globals.append((around, name, value))
            if name in around:
                self._read(value)
                continue
            value = vars(builtins).get(name)
            self._globals.append((vars(builtins), name, value))
            known = name in BUILTINS or _is_error(value)
            if not known or value.__module__ != "builtins":  # somebody put another in its place
                raise LookupError
        for closed in function.__closure__ or ():
            try:
                value = closed.cell_contents
            except ValueError:  # it is empty
                raise LookupError from None
            self._closures.append((closed, value))
            self._read(value)

    def _read_names(self) -> None:
        """Read what names of attributes lead to, in classes; refuse those that are not known."""
        read: set[tuple[type, str]] = set()
        while (
            waiting := {
                (kind, name) for kind in self._classes for name in self._names & vars(kind).keys()
            }
            - read
        ):
            read |= waiting
            for kind, name in waiting:
                value = _in_class(vars(kind)[name])
                if name != SHOWING or _home(value) not in ("dataclasses", "reprlib"):
                    self._read(value)
        there = {name for _, name in read}
        for name in self._names:
            if name in self._refused or not (
                name in there
                or name in self._known_names
                or any(name in names for _, names, _ in self._holders)
                or self._is_in_a_module(name)
            ):
                raise LookupError

    def _is_in_a_module(self, name: str) -> bool:
        """Whether a name is one in a module of Python that was come to, or in one inside of it."""
        values = [each[-1] for each in (*self._globals, *self._closures)]
        modules = {value for value in values if type(value) is ModuleType}
        if modules - {math}:
            modules |= {module for home, module in [*sys.modules.items()] if _is_own(home)}
        found = [module for module in modules if hasattr(module, name)]
        for module in found:
            value = getattr(module, name)
            _check_computes(value)
            if _is_constant(value):
                self._globals.append((vars(module), name, value))
        return bool(found)

    def is_still_so(self, cell: Any) -> bool:
        """Whether nothing has changed but values of tensors, of which none decides anything."""
        for holder, names, held in self._holders:
            if len(holder) != len(held) or (names and [*holder] != names):
                return False
            if not all(map(is_, holder.values() if names else holder, held)):
                return False
        for each, kind, own in self._objects:
            each = cell if each is None else each
            if type(each) is not kind or each.__dict__ is not own:
                return False
        for kind, order in self._orders:
            if kind.__mro__ is not order:
                return False
        for around, name, value in self._globals:
            if around.get(name) is not value:
                return False
        for function, code, defaults in self._functions:
            function = function or cell
            if function.__code__ is not code or function.__defaults__ is not defaults:
                return False
        for closed, value in self._closures:
            try:
                if closed.cell_contents is not value:
                    return False
            except ValueError:  # it is empty by now
                return False
        for tensor, data in self._fixed:
            if tensor._data is not data:
                return False
        return kinds(self.tensors) == self._kinds


def _is_constant(value: Any) -> bool:
    """Whether it never changes, nor what is done with it."""
    home = type(value).__module__.partition(".")[0]
    known = isinstance(value, CONSTANT) and not isinstance(value, np.void)
    return known and home in ("builtins", "numpy")


def _is_special(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _is_dataclass(held: Any) -> bool:
    """Whether this is in one, and what compares two was not written by hand."""
    compared = [held[name] for name in ("__eq__", "__hash__") if held.get(name) is not None]
    codes = [getattr(value, "__code__", None) for value in compared]
    made = all(code is not None and code.co_filename == "<string>" for code in codes)
    return made and "__dataclass_fields__" in held


def _is_record(kind: type) -> bool:
    """Whether this is a NamedTuple that has fields and no more."""
    if kind.__bases__ != (tuple,) or not hasattr(kind, "_fields"):
        return False
    held, fields = vars(kind), {*kind._fields}
    own = {name for name, value in held.items() if callable(value) or hasattr(value, "fget")}
    written = [_home(value) for value in held.values() if type(value) is FunctionType]
    made = all(home == "collections" or home == f"namedtuple_{kind.__name__}" for home in written)
    return (
        made and own <= {*vars(_Record)} and held.keys() <= vars(_Record).keys() | fields | SPECIAL
    )


def _is_error(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Exception)


def _check_computes(value: Any) -> None:
    """Raise LookupError for what stands in a module if it is no function that only computes.

    Modules of this package, and what never changes, are let through.
    """
    kind = type(value)
    if kind is FunctionType:
        known = _home(value) in COMPUTING and value.__name__ not in REFUSED
    elif kind is ModuleType:
        known = value is math or _is_own(value.__name__)
    else:
        known = _is_constant(value) or (kind is BuiltinFunctionType and value.__module__ == "math")
    if not known:
        raise LookupError
