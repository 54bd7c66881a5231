"""The rules as functions over tensors, and the operators of a tensor.

Each function takes tensors, arrays and Python numbers, broadcasts them as NumPy does, and gives a
tensor. Python numbers are weak: they take the dtype of what they meet. NumPy's own float64 scalars
(``np.sqrt(2)``) are Python floats too, and as weak.
Imports rules, tape and tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tinygrad_seq.rules import RULES, Rule, read_over_tensors
from tinygrad_seq.tape import Entry, recording
from tinygrad_seq.tensors import (
    DEFAULT_FLOAT,
    Tensor,
    TensorLike,
    apply,
    as_tensor,
    ndarray,
    promote,
    record,
    shape_error,
    wrap,
)

Unary = Callable[[TensorLike], Tensor]
Binary = Callable[[TensorLike, TensorLike], Tensor]
_KEEP_INTEGERS = {"abs", "negative", "sign", "square", "relu"}


def _operand(value: Any, operation: str) -> Any:
    """A tensor, or a Python number left weak."""
    if isinstance(value, (float, int)) and not isinstance(value, bool):
        return float(value) if isinstance(value, float) else value
    return as_tensor(value, operation)


def _general(rule: Rule, *inputs: Any) -> Tensor:
    """What the short ways below leave out: arrays, numbers alone, mixed and integer dtypes."""
    operands = [_operand(value, rule.name) for value in inputs]
    if not any(isinstance(operand, Tensor) for operand in operands):
        operands = [as_tensor(operand) for operand in operands]
    out = apply(rule, promote(operands))
    if out.dtype == np.float64 and not any(
        isinstance(t, Tensor) and t.dtype == np.float64 for t in operands
    ):
        out = wrap(out._data.astype(DEFAULT_FLOAT), None)  # a float made of integers alone
    return out


def _unary(rule: Rule) -> Any:
    forward = rule.forward
    keep_x, keep_y = (rule.values > 0 and place not in rule.drops[-1] for place in (0, 1))
    takes_integers = rule.name in _KEEP_INTEGERS

    def function(x: TensorLike) -> Tensor:
        if type(x) is not Tensor:
            return _general(rule, x)
        array, entry = x._data, x._entry
        if entry is None or not entry.requires_grad or not recording.enabled:
            if array.dtype.kind != "f" and not takes_integers:
                return _general(rule, x)
            y = forward(array)
            return wrap(y if type(y) is ndarray else np.asarray(y), None)
        y = forward(array)
        if type(y) is not ndarray:
            y = np.asarray(y)
        if recording.tapes:
            return record(rule, (x,), (array,), y, 1)
        saved = (array if keep_x else None, y if keep_y else None) if keep_x or keep_y else ()
        return wrap(y, Entry(rule, (entry,), saved, y.shape, y.dtype))

    return _named(function, rule)


def _binary(rule: Rule) -> Any:
    forward = rule.forward

    def function(a: TensorLike, b: TensorLike) -> Tensor:
        needs = 0
        if type(a) is Tensor:
            u, entry = a._data, a._entry
            if entry is not None and entry.requires_grad:
                needs = 1
            if type(b) is Tensor:
                v, entry = b._data, b._entry
                if u.dtype is not v.dtype:
                    return _general(rule, a, b)
                if entry is not None and entry.requires_grad:
                    needs += 2
            elif type(b) is float or type(b) is int:
                v = b
            else:
                return _general(rule, a, b)
        elif type(b) is Tensor and (type(a) is float or type(a) is int):
            u, v, entry = a, b._data, b._entry
            if entry is not None and entry.requires_grad:
                needs = 2
        else:
            return _general(rule, a, b)
        if not needs and (u if v is b else v).dtype.kind != "f":
            return _general(rule, a, b)
        try:
            y = forward(u, v)
        except ValueError as error:
            raise shape_error(rule, (u, v), error) from None
        if type(y) is not ndarray:
            y = np.asarray(y)
        if needs and recording.enabled:
            return record(rule, (a, b), (u, v), y, needs)
        return wrap(y, None)

    return _named(function, rule)


def _named(function: Any, rule: Rule) -> Any:
    function.__name__ = function.__qualname__ = rule.name
    gradients = "".join(f"\n\n    d{k} = {text}" for k, text in rule.derivatives.items())
    function.__doc__ = (
        f"{rule.doc}, elementwise.\n\n"
        f"Takes tensors, arrays or numbers of shapes that broadcast; integers give float32 where\n"
        f"the result is not whole. With g the gradient of the output y:{gradients}\n"
    )
    return function


add: Binary = _binary(RULES["add"])
subtract: Binary = _binary(RULES["subtract"])
multiply: Binary = _binary(RULES["multiply"])
divide: Binary = _binary(RULES["divide"])
maximum: Binary = _binary(RULES["maximum"])
minimum: Binary = _binary(RULES["minimum"])
_power: Binary = _binary(RULES["power"])
negative: Unary = _unary(RULES["negative"])
exp: Unary = _unary(RULES["exp"])
expm1: Unary = _unary(RULES["expm1"])
log: Unary = _unary(RULES["log"])
log1p: Unary = _unary(RULES["log1p"])
sqrt: Unary = _unary(RULES["sqrt"])
square: Unary = _unary(RULES["square"])
abs: Unary = _unary(RULES["abs"])
sign: Unary = _unary(RULES["sign"])
sin: Unary = _unary(RULES["sin"])
cos: Unary = _unary(RULES["cos"])
tanh: Unary = _unary(RULES["tanh"])
sigmoid: Unary = _unary(RULES["sigmoid"])
relu: Unary = _unary(RULES["relu"])
softplus: Unary = _unary(RULES["softplus"])
silu: Unary = _unary(RULES["silu"])
gelu: Unary = _unary(RULES["gelu"])
erf: Unary = _unary(RULES["erf"])


def power(a: TensorLike, b: TensorLike) -> Tensor:
    """a to the power b, elementwise; where b requires a gradient, a must not be negative."""
    return square(a) if type(b) is int and b == 2 else _power(a, b)


def leaky_relu(x: TensorLike, slope: TensorLike = 0.01) -> Tensor:
    """x where x > 0, else slope·x, elementwise."""
    return _general(RULES["leaky_relu"], as_tensor(_operand(x, "leaky_relu")), slope)


def elu(x: TensorLike, alpha: TensorLike = 1.0) -> Tensor:
    """x where x > 0, else alpha·(eˣ − 1), elementwise (Clevert, Unterthiner, Hochreiter 2016)."""
    return _general(RULES["elu"], as_tensor(_operand(x, "elu")), alpha)


def clip(x: TensorLike, low: TensorLike | None = None, high: TensorLike | None = None) -> Tensor:
    """x held between ``low`` and ``high``, elementwise; None leaves that side open."""
    if low is not None:
        x = maximum(x, low)
    return as_tensor(x, "clip") if high is None else minimum(x, high)


def where(condition: TensorLike, a: TensorLike, b: TensorLike) -> Tensor:
    """a where the boolean ``condition`` holds, else b, elementwise.

    It selects: what is not selected may be anything, NaN too, and gets a gradient of zero.
    """
    chosen = as_tensor(condition, "where")
    if chosen.dtype != np.bool_:
        raise ValueError(
            f"where: a condition of dtype {chosen.dtype} was given, expected booleans; "
            "write a comparison such as x > 0"
        )
    pair = promote([_operand(a, "where"), _operand(b, "where")])
    if not any(isinstance(operand, Tensor) for operand in pair):
        pair = [as_tensor(operand) for operand in pair]
    return apply(RULES["where"], [chosen, *pair])


def _comparison(ufunc: Any) -> Callable[[Any, Any], Tensor]:
    def compare(a: Any, b: Any) -> Tensor:
        arrays = [t._data if isinstance(t, Tensor) else t for t in (a, b)]
        try:
            return wrap(np.asarray(ufunc(*arrays)), None)
        except ValueError:
            shapes = " and ".join(str(np.shape(array)) for array in arrays)
            raise shape_error(RULES["subtract"], arrays, ValueError(shapes)) from None

    return compare


def _where_read(condition: Any, a: Any, b: Any) -> Any:
    """``where`` in a rule's text: there a condition on a Python number picks a Python number."""
    if isinstance(condition, bool):
        return a if condition else b
    return where(condition, a, b)


read_over_tensors(
    {
        **{name: globals()[name] for name in RULES if name in globals()},
        "where": _where_read,
    }
)

for _name, _ufunc in {
    "__lt__": np.less,
    "__le__": np.less_equal,
    "__gt__": np.greater,
    "__ge__": np.greater_equal,
    "__eq__": np.equal,
    "__ne__": np.not_equal,
    "__and__": np.bitwise_and,
    "__or__": np.bitwise_or,
}.items():
    setattr(Tensor, _name, _comparison(_ufunc))


def _reflected(function: Binary) -> Binary:
    def operator(a: TensorLike, b: TensorLike) -> Tensor:
        return function(b, a)

    return operator


_OPERATORS: dict[str, Any] = {
    "__add__": add,
    "__radd__": add,
    "__sub__": subtract,
    "__rsub__": _reflected(subtract),
    "__mul__": multiply,
    "__rmul__": multiply,
    "__truediv__": divide,
    "__rtruediv__": _reflected(divide),
    "__pow__": power,
    "__rpow__": _reflected(power),
    "__neg__": negative,
    "__abs__": abs,
    "__invert__": lambda x: wrap(np.invert(x._data), None),
    "exp": exp,
    "log": log,
    "tanh": tanh,
    "sigmoid": sigmoid,
    "relu": relu,
}
for _name, _function in _OPERATORS.items():
    setattr(Tensor, _name, _function)
