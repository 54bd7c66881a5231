"""CuPy without a GPU: a strict stand-in over the host's memory, for tests on any machine.

It does what CuPy 14 does, with NumPy's arithmetic, and refuses what CuPy refuses: a conversion to
NumPy that nobody asked for, NumPy's arrays as operands, functions and keywords that CuPy has not
(the tables below, which a test compares with CuPy where that is installed). Reductions give arrays
without axes, integers in index arrays count round the end, as there. Memory that nobody has written
holds NaN, as the device's may. What goes from the host to the device and back is counted in
``transfers``. Addresses are real ones, of host memory.

``with installed():`` puts it in CuPy's place.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np

from tinygrad_seq import devices

every, total = all, sum  # which are CuPy's own below
transfers: Counter[str] = Counter()  # "to_device" and "to_host"
memory = SimpleNamespace(limit=None)  # in bytes of one array; None: there is always enough


class OutOfMemoryError(MemoryError):
    """CuPy's, of the same name."""


class CUDARuntimeError(RuntimeError):
    """CuPy's, of the same name."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


# What CuPy has and this package uses --------------------------------------------------------

UFUNCS = (
    "absolute add bitwise_and bitwise_or copysign cos divide equal exp expm1 floor greater "
    "greater_equal invert isfinite isinf isnan less less_equal log log1p logical_and logical_not "
    "logical_or maximum minimum multiply negative not_equal power sign sin sqrt square subtract "
    "tanh"
).split()
# Functions that are NumPy's under the same name, with the parameters that CuPy's have.
FUNCTIONS = {
    "all": "a axis out keepdims",
    "allclose": "a b rtol atol equal_nan",
    "any": "a axis out keepdims",
    "arange": "start stop step dtype",
    "argmax": "a axis dtype out keepdims",
    "argmin": "a axis dtype out keepdims",
    "argwhere": "a",
    "ascontiguousarray": "a dtype",
    "broadcast_to": "array shape",
    "clip": "a a_min a_max out",
    "concatenate": "tup axis out dtype casting",
    "count_nonzero": "a axis",
    "empty": "shape dtype order",
    "full": "shape fill_value dtype order",
    "empty_like": "prototype dtype order subok shape",
    "isclose": "a b rtol atol equal_nan",
    "ones": "shape dtype order",
    "ones_like": "a dtype order subok shape",
    "stack": "tup axis out dtype casting",
    "sum": "a axis dtype out keepdims",
    "where": "condition x y",
    "zeros": "shape dtype order",
    "zeros_like": "a dtype order subok shape",
}
METHODS = {
    "all": "axis out keepdims",
    "any": "axis out keepdims",
    "argmax": "axis out dtype keepdims",
    "argmin": "axis out dtype keepdims",
    "copy": "order",
    "cumsum": "axis dtype out",
    "max": "axis out keepdims",
    "mean": "axis dtype out keepdims",
    "min": "axis out keepdims",
    "ravel": "order",
    "squeeze": "axis",
    "sum": "axis dtype out keepdims",
}
OTHER_FUNCTIONS = {
    "array": "obj dtype copy order subok ndmin",
    "asarray": "a dtype order",
    "matmul": "",
    "ndim": "a",
    "ogrid": "",
    "save": "file arr",
    "savez": "file",
    "shape": "a",
}
OTHER_METHODS = "astype fill get item reshape tolist transpose view".split()
OTHER_ATTRIBUTES = "T base data device dtype flags itemsize nbytes ndim shape size strides".split()
ALLOWED_UFUNC_OPTIONS = {"dtype", "out"}
_SCALARS = (bool, int, float, complex, np.generic)


def _host(value: Any) -> Any:
    """What NumPy is to be given for an operand, or CuPy's TypeError."""
    if isinstance(value, ndarray):
        return value._host
    if isinstance(value, np.ndarray) or not isinstance(value, _SCALARS):
        raise TypeError(f"Unsupported type {type(value)}")
    return value


def _argument(value: Any) -> Any:
    """The same for an argument, which may also be None, a dtype, a text, a shape, arrays."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(_argument, value))
    if value is None or isinstance(value, (str, type, np.dtype, slice)):
        return value
    return _host(value)


def _own(value: Any) -> Any:
    """A result as this module's array, without axes where NumPy gives a number."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(_own, value))
    made = np.asarray(value)
    if memory.limit is not None and made.nbytes > memory.limit:
        raise OutOfMemoryError(f"Out of memory allocating {made.nbytes:,} bytes")
    array = object.__new__(ndarray)
    array._host = made
    return array


def _checked(name: str, parameters: str, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    known = parameters.split()
    if len(args) > len(known) or not set(options) <= set(known):
        raise TypeError(f"{name}() got arguments that CuPy's has not: {len(args)}, {list(options)}")


class Flags:
    """CuPy's flags, of which nothing can be set."""

    __slots__ = ("c_contiguous", "f_contiguous", "owndata")

    def __init__(self, array: np.ndarray) -> None:
        object.__setattr__(self, "c_contiguous", array.flags.c_contiguous)
        object.__setattr__(self, "f_contiguous", array.flags.f_contiguous)
        object.__setattr__(self, "owndata", array.flags.owndata)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"flags.{name} cannot be set")


class ndarray:  # noqa: N801
    """An array "on the device"."""

    __slots__ = ("__weakref__", "_host")
    __array_priority__ = 100
    __hash__ = None  # type: ignore[assignment]
    _host: np.ndarray

    def __init__(self, shape: Any, dtype: Any = float) -> None:
        self._host = np.empty(shape, dtype)

    dtype = property(lambda self: self._host.dtype)
    shape = property(lambda self: self._host.shape)
    strides = property(lambda self: self._host.strides)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    nbytes = property(lambda self: self._host.nbytes)
    itemsize = property(lambda self: self._host.itemsize)
    base = property(lambda self: None if self._host.base is None else _own(self._host.base))
    T = property(lambda self: _own(self._host.T))
    flags = property(lambda self: Flags(self._host))
    device = property(lambda self: SimpleNamespace(id=0))
    data = property(lambda self: SimpleNamespace(ptr=self._host.ctypes.data, device_id=0))

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self._host.ctypes.data, False),
            "strides": None if self._host.flags.c_contiguous else self.strides,
            "version": 3,
        }

    # To the host: counted, or refused

    def __array__(self, dtype: Any = None) -> np.ndarray:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. "
            "Please use `.get()` to construct a NumPy array explicitly."
        )

    def get(self) -> np.ndarray:
        transfers["to_host"] += 1
        return self._host.copy()

    def item(self) -> Any:
        return self.get().item()

    def tolist(self) -> Any:
        return self.get().tolist()

    def __bool__(self) -> bool:
        return bool(self.get())

    def __int__(self) -> int:
        return int(self.get())

    def __float__(self) -> float:
        return float(self.get())

    def __format__(self, spec: str) -> str:
        return format(self.get(), spec)

    def __repr__(self) -> str:
        return repr(self.get())

    def __reduce__(self) -> Any:
        return asarray, (self.get(),)

    def __deepcopy__(self, memo: Any) -> ndarray:
        return self.copy()

    # Shapes

    def astype(
        self,
        dtype: Any,
        order: str = "K",
        casting: Any = None,
        subok: Any = None,
        copy: bool = True,
    ) -> ndarray:
        made = self._host.astype(dtype, order=order, copy=copy)
        return self if made is self._host else _own(made)

    def reshape(self, *shape: Any, order: str = "C") -> ndarray:
        return _own(self._host.reshape(*shape, order=order))

    def transpose(self, *axes: Any) -> ndarray:
        return _own(self._host.transpose(*axes))

    def view(self, dtype: Any = None) -> ndarray:
        return _own(self._host.view() if dtype is None else self._host.view(dtype))

    def fill(self, value: Any) -> None:
        self._host.fill(_host(value))

    def __len__(self) -> int:
        return len(self._host)

    def __iter__(self) -> Iterator[ndarray]:
        return (self[k] for k in range(len(self)))

    # Indexing

    def _index(self, index: Any) -> tuple[Any, ...]:
        """NumPy's index for CuPy's: integers in arrays count round the end."""
        parts = index if isinstance(index, tuple) else (index,)
        taken = [
            0 if part is None or part is Ellipsis else _axes_of(part) if _is_own(part) else 1
            for part in parts
        ]
        axis, made, views = 0, [], True
        for part, count in zip(parts, taken, strict=True):
            if part is Ellipsis:
                count = self.ndim - total(taken)
            if _is_own(part):
                views = False
                whole = part._host
                if whole.dtype.kind not in "iub":
                    raise IndexError("arrays used as indices must be of integer or boolean type")
                if whole.dtype.kind != "b" and self.shape[axis]:
                    whole = whole % self.shape[axis]
                made.append(whole)
            elif part is None or part is Ellipsis or isinstance(part, (slice, int, np.integer)):
                made.append(part)
            else:
                raise TypeError(f"an index of type {type(part)}: move it to the device first")
            axis += count
        if views and Ellipsis not in parts:
            made.append(Ellipsis)  # otherwise NumPy gives a number, which is no view
        return tuple(made)

    def __getitem__(self, index: Any) -> ndarray:
        return _own(self._host[self._index(index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        self._host[self._index(index)] = _host(value)

    # NumPy's protocols, as CuPy has them

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        if "out" in options:
            options["out"] = options["out"][0]
        function = _functions.get(ufunc.__name__)
        if function is None or method not in ("__call__", "at"):
            return NotImplemented
        for x in inputs:
            if not isinstance(x, (*_SCALARS, ndarray, np.ndarray)):
                return NotImplemented
        if ufunc.__name__ in _COMPARISONS:
            zero_d = [isinstance(x, np.ndarray) and x.ndim == 0 for x in inputs]
            inputs = tuple(x.item() if z else x for x, z in zip(inputs, zero_d, strict=True))
        called = function if method == "__call__" else getattr(function, method)
        return called(*inputs, **options)

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        found = _functions.get(function.__name__) if function.__module__ == "numpy" else None
        if found is None or not every(issubclass(t, (ndarray, np.ndarray)) for t in types):
            return NotImplemented
        return found(*args, **kwargs)


_COMPARISONS = "less less_equal greater greater_equal equal not_equal".split()


def _is_own(value: Any) -> bool:
    return isinstance(value, ndarray)


def _axes_of(part: ndarray) -> int:
    return part.ndim if part.dtype == np.bool_ else 1


# Operators and functions ----------------------------------------------------------------------


class Ufunc:
    """CuPy's ufunc of a name."""

    def __init__(self, name: str) -> None:
        self.__name__, self._numpys = name, getattr(np, name)

    def __call__(self, *args: Any, **options: Any) -> ndarray:
        if not set(options) <= ALLOWED_UFUNC_OPTIONS:
            raise TypeError(f"{self.__name__}: CuPy takes no {set(options)}")
        out = options.pop("out", None)
        operands = [_host(a) for a in args]
        if out is None:
            return _own(self._numpys(*operands, **options))
        if not isinstance(out, ndarray):
            raise TypeError("Output arguments type must be cupy.ndarray")
        self._numpys(*operands, out=out._host, **options)
        return out

    def at(self, a: ndarray, indices: Any, b: Any = None) -> None:
        if self.__name__ not in ("add", "subtract", "maximum", "minimum"):
            raise NotImplementedError(f"`cupy_{self.__name__}.at` is not supported yet")
        self._numpys.at(a._host, a._index(indices), _host(b))


def _function(name: str, parameters: str) -> Any:
    numpys = getattr(np, name)

    def function(*args: Any, **kwargs: Any) -> Any:
        _checked(name, parameters, args, kwargs)
        if name == "where" and not isinstance(args[0], ndarray):
            raise TypeError(f"Unsupported type {type(args[0])}")
        given = [_argument(a) for a in args]
        made = _own(numpys(*given, **{k: _argument(v) for k, v in kwargs.items()}))
        if name in ("empty", "empty_like"):
            made._host.ravel("K").view(np.uint8).fill(255)
        return made

    function.__name__ = name
    return function


def _method(name: str, parameters: str) -> Any:
    def method(self: ndarray, *args: Any, **kwargs: Any) -> ndarray:
        _checked(name, parameters, args, kwargs)
        return _own(getattr(self._host, name)(*args, **kwargs))

    return method


def _operator(name: str, reflected: bool = False) -> Any:
    """CuPy's own operation for its own arrays, NumPy's ufunc and its protocol for others."""
    numpys = getattr(np, name)

    def operator(self: ndarray, other: Any) -> Any:
        if getattr(other, "__array_ufunc__", self) is None:
            return NotImplemented
        if name in _COMPARISONS and isinstance(other, np.ndarray) and other.ndim == 0:
            other = other.item()
        return numpys(other, self) if reflected else numpys(self, other)

    return operator


def _in_place(name: str) -> Any:
    def operator(self: ndarray, other: Any) -> ndarray:
        getattr(np, name)(self._host, _host(other), out=self._host, casting="same_kind")
        return self

    return operator


_BINARY = "add:add sub:subtract mul:multiply truediv:divide pow:power and:bitwise_and or:bitwise_or"
_ORDER = "lt:less le:less_equal gt:greater ge:greater_equal eq:equal ne:not_equal"
for _name, _ufunc in (pair.split(":") for pair in [*_BINARY.split(), "matmul:matmul"]):
    setattr(ndarray, f"__{_name}__", _operator(_ufunc))
    setattr(ndarray, f"__r{_name}__", _operator(_ufunc, reflected=True))
    if _name != "matmul":
        setattr(ndarray, f"__i{_name}__", _in_place(_ufunc))
for _name, _ufunc in (pair.split(":") for pair in _ORDER.split()):
    setattr(ndarray, f"__{_name}__", _operator(_ufunc))
for _name, _ufunc in {"neg": "negative", "abs": "absolute", "invert": "invert"}.items():
    setattr(ndarray, f"__{_name}__", lambda self, ufunc=_ufunc: getattr(np, ufunc)(self))
for _name, _parameters in METHODS.items():
    setattr(ndarray, _name, _method(_name, _parameters))


def asarray(a: Any, dtype: Any = None, order: Any = None) -> ndarray:
    if isinstance(a, ndarray):
        return a.astype(a.dtype if dtype is None else dtype, order or "K", copy=False)
    if isinstance(a, np.ndarray):
        transfers["to_device"] += 1
    return _own(np.array(a, dtype, order=order or "K"))


def array(obj: Any, dtype: Any = None, copy: bool = True, order: str = "K") -> ndarray:
    made = asarray(obj, dtype)
    return made.copy() if copy and made is obj else made


def matmul(a: Any, b: Any, out: Any = None) -> ndarray:
    made = _own(np.matmul(_host(a), _host(b)))
    if out is None:
        return made
    out[...] = made
    return out


def save(file: Any, arr: ndarray) -> None:
    np.save(file, arr.get())


def savez(file: Any, *args: Any, **kwds: Any) -> None:
    def asnumpy(a: Any) -> Any:
        return a.get() if isinstance(a, ndarray) else a

    np.savez(file, *map(asnumpy, args), **{k: asnumpy(v) for k, v in kwds.items()})


class _OpenGrid:
    def __getitem__(self, key: Any) -> list[ndarray]:
        return [_own(line) for line in np.ogrid[key]]


ogrid = _OpenGrid()
_functions: dict[str, Any] = {
    **{name: Ufunc(name) for name in UFUNCS},
    **{name: _function(name, parameters) for name, parameters in FUNCTIONS.items()},
    "matmul": matmul,
    "ndim": lambda a: a.ndim,
    "shape": lambda a: a.shape,
    "save": save,
    "savez": savez,
}
globals().update(_functions)


def _erf(x: ndarray) -> ndarray:
    wide = np.float64 if x.dtype == np.float16 else x.dtype
    return _own(np.vectorize(math.erf, otypes=[wide])(x._host.astype(float)).reshape(x.shape))


special = SimpleNamespace(erf=_erf)  # cupyx.scipy.special


class _Runtime:
    """What CUDA says of the machine; tests change it."""

    devices, driver, status = 1, 13000, 100

    def getDeviceCount(self) -> int:  # noqa: N802
        if not self.devices and self.status:
            raise CUDARuntimeError(self.status, f"cudaError: status {self.status}")
        return self.devices

    def driverGetVersion(self) -> int:  # noqa: N802
        return self.driver

    def runtimeGetVersion(self) -> int:  # noqa: N802
        return 13020


cuda = SimpleNamespace(
    runtime=_Runtime(), memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError)
)


class _Products:
    """In which type products are computed, by the dtype of what they multiply."""

    COMPUTE_TYPE_DEFAULT, COMPUTE_TYPE_TF32 = 1, 7

    def __init__(self) -> None:
        self.chosen: dict[Any, int] = {}

    def set_compute_type(self, dtype: Any, compute_type: int) -> None:
        self.chosen[np.dtype(dtype).name] = compute_type


_core = SimpleNamespace(_routines_linalg=_Products())


@contextmanager
def installed() -> Iterator[Any]:
    """This module in the place of CuPy inside the block; gives the module."""
    here = sys.modules[__name__]
    real = devices.load
    devices.load = lambda name="cupy": special if name == "cupyx.scipy.special" else here
    transfers.clear()
    try:
        yield here
    finally:
        devices.load = real


def parameters_of(documented: Any) -> list[str]:
    """The parameters of a function of CuPy's; of a method, as its docstring has them."""
    try:
        names = list(inspect.signature(documented).parameters)
    except ValueError:
        line = documented.__doc__.strip().splitlines()[0]
        inside = line[line.index("(") + 1 : line.rindex(")")]
        names = [part.split("=")[0].split()[-1].lstrip("*") for part in inside.split(",")]
    return [name for name in names if name != "self"]
