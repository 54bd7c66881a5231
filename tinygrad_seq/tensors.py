"""A tensor: a value and its place on the tape. Also how an operation is run and recorded.

No mathematics lives here. Operators and methods are hung on the class by the files that define
them: ``elementwise.py``, ``structural.py`` (products, reductions, shapes, indexing),
``composites.py``, ``transforms.py`` (backward) and ``interop.py`` (NumPy's functions).
Imports rules, tape, devices and errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import index
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from tinygrad_seq import devices
from tinygrad_seq.errors import WAY_OUT, DeviceError, ShapeError, TapeError, TraceError
from tinygrad_seq.rules import Array, Operation
from tinygrad_seq.tape import Entry, Leaf, mark_written, recording

ndarray = np.ndarray
FLOATS = (np.dtype("float16"), np.dtype("float32"), np.dtype("float64"))
DEFAULT_FLOAT = np.dtype("float32")
ADVICE = {  # what to do, by what NumPy says
    "zero-size array": "expected one element at least; leave empty batches out",
    "negative integer powers": "convert one of them with t.to('float32')",
}


class Tensor:
    """An array that gradients can flow through.

    Made by ``tgs.tensor``, by the other creation functions and by operations. The value never
    changes in place: assigning ``.data`` puts another array in its stead. float16,
    float32 and float64 carry gradients; integers and booleans carry indices and masks.
    """

    __slots__ = ("__weakref__", "_data", "_entry")
    __hash__ = object.__hash__

    _data: Array
    _entry: Entry | None  # None until something about the tensor must be remembered

    def __init__(
        self, data: Any, dtype: DTypeLike | None = None, requires_grad: bool = False
    ) -> None:
        tracked = isinstance(data, Tensor) and data.requires_grad and recording.enabled
        if tracked and not (requires_grad and data.is_leaf):  # a leaf of a leaf's values is fine
            raise TapeError(
                "tensor: a tensor that requires a gradient was given, and the copy would be off "
                "the tape; use it as it is, or make the copy of t.detach()"
            )
        self._data = as_array(data, dtype, copy=True)
        self._entry = None
        if requires_grad:
            self.requires_grad = True

    def __init_subclass__(cls) -> None:
        raise TypeError("Tensor: it cannot be subclassed; hold a tensor in an nn.Module instead")

    # What it is

    @property
    def shape(self) -> tuple[int, ...]:
        return self._data.shape  # type: ignore[no-any-return]

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._data.dtype  # type: ignore[no-any-return]

    @property
    def ndim(self) -> int:
        return self._data.ndim  # type: ignore[no-any-return]

    @property
    def size(self) -> int:
        return self._data.size  # type: ignore[no-any-return]

    @property
    def device(self) -> str:
        """``"cpu"`` or ``"cuda"``; ``t.to(...)`` moves a tensor."""
        if type(self._data) is ndarray:
            return "cpu"
        if is_traced((self,)):  # where the step that it is of will be
            return self._data.tracer.trace.device  # type: ignore[no-any-return]
        return devices.device_of(self._data)

    @property
    def requires_grad(self) -> bool:
        return self._entry is not None and self._entry.requires_grad

    @requires_grad.setter
    def requires_grad(self, wanted: bool) -> None:
        refuse_traced(self, "requires_grad was assigned")
        if wanted == self.requires_grad:
            return
        if not self.is_leaf:
            raise TapeError(
                "requires_grad: this tensor is the result of recorded operations and cannot be "
                "taken off the tape; use t.detach() for one that is not on it"
            )
        if wanted and self.dtype not in FLOATS:
            raise ValueError(
                f"requires_grad: a tensor of dtype {self.dtype} was given, only floating tensors "
                "carry gradients; convert it with t.to('float32')"
            )
        renew_leaf(self, bool(wanted))

    @property
    def is_leaf(self) -> bool:
        """Whether no recorded operation made this tensor."""
        return self._entry is None or self._entry.op is None

    @property
    def grad(self) -> Tensor | None:
        """The gradient accumulated by ``backward``: same shape and dtype, or None."""
        return self._entry.grad if isinstance(self._entry, Leaf) else None

    @grad.setter
    def grad(self, value: Tensor | ArrayLike | None) -> None:
        if value is not None:
            refuse_traced(self, "a gradient was assigned")
            value = _same_kind(value, self, "grad")
        entry = entry_of(self)
        if isinstance(entry, Leaf):
            entry.grad = value
        elif value is not None:
            raise TapeError("grad: only leaves hold a gradient; this tensor was computed")

    @property
    def data(self) -> Array:
        """The value as a read-only array that shares memory.

        On a GPU it is CuPy's array, which cannot be protected: do not write to it.
        """
        view = self._data.view()
        if type(view) is ndarray:
            view.flags.writeable = False
        return view

    @data.setter
    def data(self, value: Tensor | ArrayLike) -> None:
        refuse_traced(self, "data were assigned")
        if recording.tracer is not None:
            raise TraceError(
                f"scan: the cell assigned data of a tensor {self.shape} that it closes over, which "
                "would happen once in a call, not at each step; let what changes from step to step "
                f"be state of the cell; {WAY_OUT}"
            )
        replace_data(self, _same_kind(value, self, "data")._data)

    @property
    def version(self) -> int:
        """Rises with every assignment to ``.data``; 0 before the first."""
        return 0 if self._entry is None else self._entry.written

    # As something else

    def numpy(self) -> Array:
        """The value as a read-only NumPy array; ``.copy()`` it to write.

        It shares memory; that of a tensor on a GPU is a copy, made when everything before is done.
        """
        array = self.data
        if type(array) is not ndarray:
            array = devices.to_host(array)
            array.flags.writeable = False
        return array

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> Array:
        """``np.asarray(t)``: as ``numpy()``, but a tensor on a GPU raises DeviceError.

        NumPy and others convert what they are given without being asked, and moving it would go
        unnoticed.
        """
        if devices.device_of(self._data) != devices.CPU:
            raise DeviceError(
                f"np.asarray: a tensor on {self.device} was given where an array on the host is "
                "wanted; t.numpy() copies it there"
            )
        if copy or (dtype is not None and np.dtype(dtype) != self.dtype):
            return np.array(self._data, dtype=dtype)
        return self.data

    def item(self) -> Any:
        """The only element, as a Python number, copied to the host if need be."""
        if self.size != 1 and not is_traced((self,)):
            raise ShapeError(f"item: shape {self.shape} was given, expected exactly one element")
        return devices.to_host(self._data).item()

    def tolist(self) -> Any:
        return devices.to_host(self._data).tolist()

    def detach(self) -> Tensor:
        """The same value off the tape."""
        if recording.tracer is not None and is_traced((self,)):
            return recording.tracer.detach(self)  # type: ignore[no-any-return]
        return wrap(self._data, None)

    def __len__(self) -> int:
        if not self.ndim:
            raise ShapeError("len: a tensor without axes has no length")
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[k] for k in range(len(self)))

    def __bool__(self) -> bool:
        if self.size != 1 and not is_traced((self,)):
            raise ShapeError(
                f"bool: a tensor of shape {self.shape} is neither true nor false; "
                "ask t.numpy().any() or t.numpy().all(), or choose elementwise with tgs.where"
            )
        return bool(devices.to_host(self._data))

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __index__(self) -> int:
        return index(devices.to_host(self._data))

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if spec else repr(self)

    def __repr__(self) -> str:
        values = devices.to_host(self._data)
        text = np.array2string(values, separator=", ", prefix="tensor(")
        place = "" if self.device == devices.CPU else f", device={self.device!r}"
        grad = ", requires_grad=True" if self.requires_grad else ""
        return f"tensor({text}, dtype={self.dtype}{place}{grad})"

    def __setitem__(self, index: Any, value: Any) -> NoReturn:
        raise TapeError(
            "t[...] = value: tensors do not change in place; build the new value with tgs.where, "
            "tgs.concat or tgs.stack, or replace all of it with t.data = array"
        )

    def __reduce__(self) -> Any:
        """What pickle keeps: values on the host, where they come back too."""
        data, *more = self._parts()
        return _restore, (devices.to_host(data), *more)

    def __copy__(self) -> Tensor:
        return _restore(*self._parts())

    def __deepcopy__(self, memo: Any) -> Tensor:
        data, requires_grad, grad = self._parts()
        grad = None if grad is None else grad.__deepcopy__(memo)
        return _restore(data.copy(), requires_grad, grad)

    def _parts(self) -> tuple[Array, bool, Tensor | None]:
        refuse_traced(self, "a copy was asked for")
        if not self.is_leaf:
            raise TapeError(
                "copy, deepcopy or pickle: this tensor is the result of recorded operations, which "
                "cannot be copied; take t.detach() instead, or t.numpy(), to plot for example"
            )
        return self._data, self.requires_grad, None if self.grad is None else self.grad.detach()

    if TYPE_CHECKING:  # hung on the class by other files; see the top of the file
        T: Tensor

        def __add__(self, other: TensorLike) -> Tensor: ...
        def __radd__(self, other: TensorLike) -> Tensor: ...
        def __sub__(self, other: TensorLike) -> Tensor: ...
        def __rsub__(self, other: TensorLike) -> Tensor: ...
        def __mul__(self, other: TensorLike) -> Tensor: ...
        def __rmul__(self, other: TensorLike) -> Tensor: ...
        def __truediv__(self, other: TensorLike) -> Tensor: ...
        def __rtruediv__(self, other: TensorLike) -> Tensor: ...
        def __pow__(self, other: TensorLike) -> Tensor: ...
        def __rpow__(self, other: TensorLike) -> Tensor: ...
        def __matmul__(self, other: TensorLike) -> Tensor: ...
        def __rmatmul__(self, other: TensorLike) -> Tensor: ...
        def __neg__(self) -> Tensor: ...
        def __pos__(self) -> Tensor: ...
        def __abs__(self) -> Tensor: ...
        def __lt__(self, other: TensorLike) -> Tensor: ...
        def __le__(self, other: TensorLike) -> Tensor: ...
        def __gt__(self, other: TensorLike) -> Tensor: ...
        def __ge__(self, other: TensorLike) -> Tensor: ...
        def __eq__(self, other: TensorLike) -> Tensor: ...  # type: ignore[override]
        def __ne__(self, other: TensorLike) -> Tensor: ...  # type: ignore[override]
        def __invert__(self) -> Tensor: ...
        def __and__(self, other: TensorLike) -> Tensor: ...
        def __or__(self, other: TensorLike) -> Tensor: ...
        def __getitem__(self, index: Any) -> Tensor: ...
        def sum(self, axis: Axis = None, keepdims: bool = False) -> Tensor: ...
        def argmax(self, axis: int | None = None) -> Tensor: ...
        def astype(self, dtype: DTypeLike) -> Tensor: ...
        def cumsum(self, axis: int | None = None) -> Tensor: ...
        def mean(self, axis: Axis = None, keepdims: bool = False) -> Tensor: ...
        def max(self, axis: Axis = None, keepdims: bool = False) -> Tensor: ...
        def min(self, axis: Axis = None, keepdims: bool = False) -> Tensor: ...
        def reshape(self, *shape: int | Sequence[int]) -> Tensor: ...
        def transpose(self, *axes: int | Sequence[int]) -> Tensor: ...
        def exp(self) -> Tensor: ...
        def log(self) -> Tensor: ...
        def tanh(self) -> Tensor: ...
        def sigmoid(self) -> Tensor: ...
        def relu(self) -> Tensor: ...
        def to(self, target: Any) -> Tensor: ...
        def backward(
            self,
            gradient: TensorLike | None = None,
            retain_graph: bool | None = None,
            create_graph: bool = False,
        ) -> None: ...


TensorLike = Tensor | ArrayLike
Axis = int | tuple[int, ...] | None
_new = Tensor.__new__


def wrap(data: Array, entry: Entry | None) -> Tensor:
    """A tensor around an array, without copying or checking."""
    tensor = _new(Tensor)
    tensor._data = data
    tensor._entry = entry
    return tensor


def refuse_traced(tensor: Tensor, what: str) -> None:
    """Raise a TraceError for a value of a cell that is traced: it is what the cell computes."""
    if type(tensor._data) is not ndarray and is_traced((tensor,)):
        raise TraceError(
            f"scan: at line %{tensor._data.slot} of the step {what}, for a value of the step; a "
            f"cell computes new values from those that it is given, and returns them; {WAY_OUT}"
        )


def _restore(data: Array, requires_grad: bool, grad: Tensor | None) -> Tensor:
    tensor = wrap(data, Leaf(data.shape, data.dtype, requires_grad))
    if grad is not None:
        tensor.grad = grad
    return tensor


def entry_of(tensor: Tensor) -> Entry:
    """The tensor's entry; a tensor that has none becomes a leaf."""
    entry = tensor._entry
    if entry is None:
        entry = tensor._entry = Leaf(tensor._data.shape, tensor._data.dtype, False)
    return entry


def renew_leaf(tensor: Tensor, requires_grad: bool) -> None:
    """Give a leaf that changes what it requires, its dtype or its device an entry of its own.

    What was recorded before keeps the old one, which passes on what it gets.
    """
    old = tensor._entry
    tensor._entry = new = Leaf(tensor.shape, tensor.dtype, requires_grad)
    new.device = tensor.device
    if isinstance(old, Leaf):
        new.grad, new.written = old.grad, old.written
        old.grad, old.successor = None, new


def replace_data(tensor: Tensor, array: Array) -> None:
    """Let the tensor hold ``array``, which nobody may write to. What is recorded keeps the old."""
    tensor._data = boxed(array)
    mark_written(entry_of(tensor))


def alike(value: Any, like: Tensor, what: str) -> Tensor:
    """``value`` as a tensor of the shape and device of ``like``; arrays are copied.

    Raises ShapeError or DeviceError if it is not; ``what`` is for the error.
    """
    if type(value) is Tensor and type(value._data) is ndarray is type(like._data):
        made = value  # quickly, for the commonest case
    else:
        made = beside(value, (like,), what, like.dtype)
    if made.shape != like.shape:
        raise ShapeError(f"{what}: shape {made.shape} was given, expected {like.shape}")
    if made.device != like.device:
        raise DeviceError(
            f"{what}: one on {made.device} was given for a tensor on {like.device}; make a tensor "
            f"of it and move it with .to({like.device!r})"
        )
    return made


def _same_kind(value: Any, like: Tensor, what: str) -> Tensor:
    """The same, of one dtype too."""
    made = alike(value, like, what)
    if made.dtype != like.dtype:
        raise ValueError(
            f"{what}: dtype {made.dtype} was given, expected {like.dtype}; convert it first"
        )
    return made


def boxed(value: Any) -> Array:
    """An array: NumPy turns those without axes into scalars, and this undoes it."""
    if type(value) is ndarray or not isinstance(value, np.generic):
        return value
    return np.asarray(value)


def array_of(value: Any, what: str) -> Array:
    """The array in a tensor, an array as it is, on its device, or one made of a list or number.

    Raises ShapeError for rows of unequal length; ``what`` is for the error.
    """
    if isinstance(value, Tensor):
        return value._data
    if devices.device_of(value) != devices.CPU:
        return value
    try:
        return np.asarray(value)
    except ValueError:
        raise ShapeError(
            f"{what}: the rows given differ in length, expected an array; data.pad_sequences "
            "makes one of sequences"
        ) from None


def host_array(value: Any, what: str) -> np.ndarray:
    """A NumPy array of what is read on the host: lengths, for example, which say what to do."""
    made = array_of(value, what)
    if not isinstance(made, ndarray):
        raise DeviceError(
            f"{what}: given on {devices.device_of(made)}, expected on the host, where it is read; "
            "take .to('cpu') of it, once, before"
        )
    return made


def as_array(
    data: Any,
    dtype: DTypeLike | None = None,
    copy: bool = False,
    weak: np.dtype[Any] = DEFAULT_FLOAT,
) -> Array:
    """``data`` as an array of ``dtype``.

    Without one arrays keep their own, Python floats become ``weak``, ints int64. Raises ShapeError
    for rows of unequal length and ValueError for what makes no floating, integer or boolean array.
    """
    wanted = None if dtype is None else check_dtype(dtype)
    if isinstance(data, (list, tuple)) and _holds(data, Tensor):
        raise ValueError(
            f"tensor: a {type(data).__name__} of tensors was given, expected one; tgs.stack or "
            "tgs.concat join tensors and keep them on the tape (a recurrent layer returns a "
            "pair, (ys, state))"
        )
    array = array_of(data, "tensor")
    if array is not data and array.dtype.kind not in "fiub":
        raise ValueError(
            f"tensor: {data!r:.60} was given, expected a number, an array, or lists of numbers"
        )
    own = check_dtype(array.dtype)
    if own == np.float64 and not hasattr(data, "__array__"):
        own = own if _holds(data, (np.ndarray, np.generic)) else weak
    return array.astype(wanted or own, copy=copy)


def _holds(data: Any, kinds: Any) -> bool:
    """Whether nested lists hold something of these kinds, or ``data`` itself is."""
    if isinstance(data, (list, tuple)):
        return any(_holds(item, kinds) for item in data)
    return isinstance(data, kinds)


def check_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    """A dtype that tensors may have, in the order of bytes of this machine.

    Raises ValueError for others.
    """
    if dtype is DEFAULT_FLOAT:
        return dtype
    try:
        if dtype is None:
            raise TypeError
        made = np.dtype(dtype)
    except TypeError:
        raise ValueError(
            f"dtype: {dtype!r} was given, expected a NumPy dtype such as 'float32'"
        ) from None
    if made.newbyteorder("=") not in FLOATS and made.kind not in "iub":
        raise ValueError(
            f"dtype: {made} was given, expected float16, float32, float64, an integer or bool"
        )
    return made if made.isnative else np.dtype(made.type)


def as_tensor(value: Any, operation: str = "tensor", like: np.dtype[Any] | None = None) -> Tensor:
    """``value`` itself if it is a tensor, otherwise a constant made of it.

    Python floats, alone or in lists, take the dtype ``like``, float32 if that is None.
    """
    if isinstance(value, Tensor):
        return value
    known = isinstance(value, (np.ndarray, np.generic, int, float, list, tuple))
    if known or devices.is_array(value):
        is_fresh = isinstance(value, (int, float, list, tuple))
        return wrap(as_array(value, copy=not is_fresh, weak=like or DEFAULT_FLOAT), None)
    kind = type(value)
    home = kind.__module__.partition(".")[0]
    name = kind.__name__ if home == "builtins" else f"{home}.{kind.__name__}"
    hint = "; make a tensor of it, tgs.tensor(...)" if hasattr(value, "__array__") else ""
    raise ValueError(
        f"{operation}: a {name} was given, expected a tensor, an array or a number{hint}"
    )


def beside(
    value: Any,
    others: Sequence[Any],
    operation: str = "tensor",
    like: np.dtype[Any] | None = None,
) -> Tensor:
    """``as_tensor`` for what meets others: a number goes to the device of the tensors there."""
    made = as_tensor(value, operation, like)
    if made is not value and not made.ndim and made.device == devices.CPU:
        for other in others:
            if isinstance(other, Tensor) and other.device != devices.CPU:
                return wrap(devices.to_device(made._data, other.device), None)
    return made


# Running and recording -----------------------------------------------------------------------


def apply(op: Operation, inputs: Sequence[Any], params: tuple[Any, ...] = ()) -> Tensor:
    """Run ``op`` on tensors and Python numbers, and record it if an input requires a gradient.

    This is the one way in which an operation happens. ``params`` are what else it takes: axes,
    shapes, an index. It happens where the inputs are, and the dtype is NumPy's for them. Raises
    what ``refusal`` makes of NumPy's error.
    """
    tracer = recording.tracer
    if tracer is not None:
        traced = tracer.apply(op, inputs, params)
        if traced is not None:
            return traced  # type: ignore[no-any-return]
    arrays: list[Any] = []
    parents: list[Entry | None] = []
    needs, bit = 0, 1  # bit k of needs: input k wants a gradient
    for given in inputs:
        if type(given) is Tensor:
            arrays.append(given._data)
            entry = given._entry
            parents.append(entry)
            if entry is not None and entry.requires_grad:
                needs |= bit
        else:
            arrays.append(given)
            parents.append(None)
        bit <<= 1
    try:
        y = op.forward(*arrays, *params)
    except (ValueError, OverflowError) as error:
        raise refusal(op.name, op.inputs, arrays, error) from None
    except IndexError as error:
        raise IndexError(f"{op.name}: x {arrays[0].shape} given: {error}") from None
    except (TypeError, MemoryError, RuntimeError, ImportError) as error:
        devices.check_one_device(op.name, op.inputs, arrays)
        raise devices.explained(error, op.name) from None
    if type(y) is not ndarray:  # a NumPy scalar, or on a GPU
        y = boxed(y)
        if type(y) is not ndarray:
            devices.check_one_device(op.name, op.inputs, arrays)
    if not needs or not recording.enabled:
        made = wrap(y, None)
        if tracer is not None:
            tracer.note(op, inputs, params, made)
        return made
    if None in parents:  # constants get an entry too, by which a change of their data is noticed
        parents = [entry_of(t) if type(t) is Tensor else None for t in inputs]
    saved: Sequence[Any] = params
    if op.value_count:
        arrays.append(y)
        for place in op.unused[needs]:
            arrays[place] = None
        saved = (*arrays, *params)
    entry = Entry(op, tuple(parents), saved, y.shape, y.dtype)
    for tape in recording.tapes:
        tape.add(entry, inputs, y)
    made = wrap(y, entry)
    if tracer is not None:
        tracer.note(op, inputs, params, made)
    return made


def looked_at(inputs: Sequence[Any], found: Any) -> Tensor:
    """What was found, by no operation, by looking at values: conditions, indices, integers.

    A tracer is told, for other values may lead to something else.
    """
    made = wrap(boxed(found), None)
    if recording.tracer is not None:
        recording.tracer.note(None, inputs, (), made)
    return made


def is_traced(inputs: Sequence[Any]) -> bool:
    """Whether one of the inputs stands for a value that a compiled kernel will have."""
    for t in inputs:
        if type(t) is Tensor and type(t._data) is not ndarray and hasattr(t._data, "slot"):
            return True
    return False


def refusal(
    name: str, inputs: Sequence[str], arrays: Sequence[Any], error: Exception
) -> ValueError:
    """What to say when NumPy or CuPy refuses an operation."""
    devices.check_one_device(name, inputs, arrays)
    given = ", ".join(
        f"{k} {a.shape if hasattr(a, 'shape') else a!r}"
        for k, a in zip(inputs, arrays, strict=False)
    )
    try:
        np.broadcast_shapes(*(a.shape if hasattr(a, "shape") else np.shape(a) for a in arrays))
    except ValueError:
        what = "their axes, aligned at the last, must be equal or 1; reshape or expand_dims one"
        return ShapeError(f"{name}: {given} were given, {what}")
    kind = ShapeError if "size" in str(error) else ValueError
    advice = next((f"; {what}" for said, what in ADVICE.items() if said in str(error)), "")
    return kind(f"{name}: {given} given: {error}{advice}")


def float_dtype(values: Sequence[Any]) -> np.dtype[Any] | None:
    """The dtype that the floating tensors and arrays among ``values`` combine to, if any."""
    held = [v._data if isinstance(v, Tensor) else v for v in values]
    floats = [a.dtype for a in held if isinstance(a, ndarray) and a.dtype in FLOATS]
    if not floats:  # looked for where they are seldom: on a GPU, and in a cell that is traced
        several = [v for v in values if isinstance(v, Tensor) or devices.is_array(v)]
        floats = [v.dtype for v in several if v.dtype in FLOATS]
    return np.result_type(*floats) if floats else None


def promote(tensors: Sequence[Any]) -> list[Any]:
    """Inputs of one operation brought to dtypes that NumPy combines as this package promises.

    A floating tensor beside an integer one decides the dtype, and so does the default float for
    integers that meet a Python float; NumPy would choose float64 for both.
    """
    target = float_dtype(tensors)
    if target is None and any(isinstance(t, float) for t in tensors):
        target = DEFAULT_FLOAT
    if target is None:
        return list(tensors)
    return [
        converted(t, target) if type(t) is Tensor and t.dtype.kind in "iub" else t for t in tensors
    ]


def converted(x: Tensor, dtype: DTypeLike) -> Tensor:
    """Integers or booleans in another dtype, through which no gradient goes."""
    # A tracer is asked, so that it can be asked for the same again.
    return x.astype(dtype) if is_traced((x,)) else wrap(x._data.astype(dtype), None)
