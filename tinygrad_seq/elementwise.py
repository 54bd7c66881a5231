"""The rules as functions over tensors, and the operators of a tensor.

Each function takes tensors, arrays and Python numbers, broadcasts them as NumPy does, and gives a
tensor. Python numbers are weak: they take the dtype of what they meet. NumPy's own float64 scalars
(``np.sqrt(2)``) are Python floats too, and as weak.
Imports rules, tape, tensors, devices and errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tinygrad_seq import devices
from tinygrad_seq.errors import TapeError
from tinygrad_seq.rules import RULES, Rule, read_over_tensors
from tinygrad_seq.tape import recording
from tinygrad_seq.tensors import (
    DEFAULT_FLOAT,
    Tensor,
    TensorLike,
    apply,
    as_tensor,
    beside,
    converted,
    float_dtype,
    is_traced,
    looked_at,
    promote,
    refusal,
)

Unary = Callable[[TensorLike], Tensor]
Binary = Callable[[TensorLike, TensorLike], Tensor]


# Of integers these make integers; all others are computed in float32.
INTEGRAL = {"abs", "add", "maximum", "minimum", "multiply", "negative", "relu", "scalar_power"}
INTEGRAL |= {"power", "sign", "square", "subtract", "where"}


def _function(name: str) -> Any:
    """The rule of this name as a function over tensors.

    Floating tensors of one dtype, and Python numbers beside them, go straight to ``apply``;
    whatever needs more thought goes to ``_general``.
    """
    rule = RULES[name]

    def unary(x: Any) -> Tensor:
        if type(x) is Tensor and x._data.dtype.kind == "f":
            return apply(rule, (x,))
        return _general(rule, x)

    def binary(a: Any, b: Any) -> Tensor:
        first, second = type(a), type(b)
        if first is Tensor:
            dtype = a._data.dtype
            fits = second is float or second is int or (second is Tensor and b._data.dtype is dtype)
        elif second is Tensor:
            dtype = b._data.dtype
            fits = first is float or first is int
        else:
            return _general(rule, a, b)
        return apply(rule, (a, b)) if fits and dtype.kind == "f" else _general(rule, a, b)

    function = unary if len(rule.inputs) == 1 else binary
    function.__name__ = function.__qualname__ = name
    function.__doc__ = _documentation(rule)
    return function


def _documentation(rule: Rule, more: str = "") -> str:
    """A docstring from the rule: what it is, what it takes, its derivatives."""
    several = len(rule.inputs) > 1
    takes = (
        "Takes tensors, arrays and numbers whose shapes broadcast, and gives a tensor of the\n"
        "broadcast shape; floating dtypes combine as NumPy's do. Raises ShapeError if they do not."
        if several
        else "Takes a tensor, an array or a number, and gives a tensor of the same shape and dtype."
    )
    integers = "stay integers" if rule.name in INTEGRAL else "are taken as float32"
    vjps = [(k, vjp) for k, vjp in rule.derivatives.items() if not (several and vjp == "0 * g")]
    gradients = "\n".join(f"    d{k} = {vjp}" for k, vjp in vjps)
    return (
        f"{rule.doc}, elementwise.{more}\n\n{takes}\nIntegers {integers}.\n"
        f"With g the gradient of the output y:\n\n{gradients}\n"
    )


def _operands(values: Sequence[Any], operation: str, others: Sequence[Any] = ()) -> list[Any]:
    """Tensors and, beside them, Python numbers left weak; brought to dtypes that go together.

    ``others`` are what the values meet that has no part in their dtype.
    """
    like, met = float_dtype(values), (*values, *others)
    operands: list[Any] = []
    for value in values:
        if type(value) is Tensor:
            operands.append(value)
        elif isinstance(value, (float, int)) and not isinstance(value, bool):
            operands.append(float(value) if isinstance(value, float) else value)
        else:
            operands.append(beside(value, met, operation, like))
    if not any(isinstance(operand, Tensor) for operand in operands):
        operands = [beside(operand, others) for operand in operands]
    return promote(operands)


def _general(rule: Rule, *inputs: Any) -> Tensor:
    """Any operands: arrays, lists, numbers alone, mixed and integer dtypes."""
    operands = _operands(inputs, rule.name)
    made_float = rule.name not in INTEGRAL
    for k, operand in enumerate(operands):
        if isinstance(operand, Tensor) and operand.dtype.kind in "iub":
            if made_float:
                operands[k] = converted(operand, DEFAULT_FLOAT)
            elif operand.dtype.kind == "b" and rule.name not in ("maximum", "minimum"):
                operands[k] = converted(operand, np.int64)
    return apply(rule, operands)


add: Binary = _function("add")
subtract: Binary = _function("subtract")
multiply: Binary = _function("multiply")
divide: Binary = _function("divide")
maximum: Binary = _function("maximum")
minimum: Binary = _function("minimum")
_power: Binary = _function("power")
_scalar_power: Binary = _function("scalar_power")
negative: Unary = _function("negative")
exp: Unary = _function("exp")
expm1: Unary = _function("expm1")
log: Unary = _function("log")
log1p: Unary = _function("log1p")
sqrt: Unary = _function("sqrt")
square: Unary = _function("square")
abs: Unary = _function("abs")
sign: Unary = _function("sign")
floor: Unary = _function("floor")
sin: Unary = _function("sin")
cos: Unary = _function("cos")
tanh: Unary = _function("tanh")
sigmoid: Unary = _function("sigmoid")
relu: Unary = _function("relu")
softplus: Unary = _function("softplus")
silu: Unary = _function("silu")
gelu: Unary = _function("gelu")
erf: Unary = _function("erf")


def power(a: TensorLike, b: TensorLike) -> Tensor:
    if isinstance(b, (float, int)) and not isinstance(b, bool):
        return square(a) if type(b) is int and b == 2 else _scalar_power(a, b)
    if isinstance(a, (float, int)) and isinstance(b, Tensor) and b.dtype.kind == "f":
        # A tensor, so that log(a) is taken in b's dtype.
        a = beside(devices.namespace(b._data).asarray(a, b.dtype), (b,))
    return _power(a, b)


def _with_number(rule: Rule, x: TensorLike, number: TensorLike) -> Tensor:
    """A rule that chooses by x, which therefore is a tensor in any case."""
    x = float(x) if isinstance(x, float) else x
    return _general(rule, beside(x, [number], rule.name, float_dtype([number])), number)


def leaky_relu(x: TensorLike, slope: TensorLike = 0.01) -> Tensor:
    return _with_number(RULES["leaky_relu"], x, slope)


def elu(x: TensorLike, alpha: TensorLike = 1.0) -> Tensor:
    return _with_number(RULES["elu"], x, alpha)


def where(condition: TensorLike, a: TensorLike, b: TensorLike) -> Tensor:
    chosen = beside(condition, (a, b), "where")
    if chosen.dtype != np.bool_:
        raise ValueError(
            f"where: a condition of dtype {chosen.dtype} was given, expected booleans; "
            "write a comparison such as x > 0"
        )
    return apply(RULES["where"], [chosen, *_operands([a, b], "where", [chosen])])


power.__doc__ = _documentation(
    RULES["power"], f" With a Python number for b,\nda = {RULES['scalar_power'].derivatives['x']}."
)
leaky_relu.__doc__ = _documentation(RULES["leaky_relu"])
elu.__doc__ = _documentation(RULES["elu"], " (Clevert, Unterthiner, Hochreiter 2016)")
where.__doc__ = _documentation(
    RULES["where"],
    "\n\nThe condition is boolean, or a ValueError is raised. It selects: what is not selected\n"
    "may be anything, NaN too, and gets a gradient of zero. But where that came from a function\n"
    "without a derivative there, zero times it is NaN: give the function a safe argument, as in\n"
    "where(x > 0, sqrt(where(x > 0, x, 1)), 0).",
)


def clip(x: TensorLike, low: TensorLike | None = None, high: TensorLike | None = None) -> Tensor:
    """x held between ``low`` and ``high``, elementwise; None leaves that side open.

    It is minimum(maximum(x, low), high), with their gradients.
    """
    if low is not None:
        x = maximum(x, low)
    return as_tensor(x, "clip") if high is None else minimum(x, high)


read_over_tensors({name: globals()[name] for name in RULES if name in globals()})


# Operators -----------------------------------------------------------------------------------


def _comparison(ufunc: Any) -> Callable[[Any, Any], Tensor]:
    name = ufunc.__name__

    def compare(a: Any, b: Any) -> Tensor:
        if recording.tracer is not None and is_traced((a, b)):
            return recording.tracer.compare(name, a, b)  # type: ignore[no-any-return]
        arrays = [t._data if isinstance(t, Tensor) else t for t in (a, b)]
        arrays = [float(v) if isinstance(v, float) else v for v in arrays]  # NumPy's own are weak
        try:
            made = looked_at((a, b), ufunc(*arrays))
        except (TypeError, ValueError) as error:
            for operand in (a, b):
                as_tensor(operand, name)  # says so if it is no number and no array
            raise refusal(name, "ab", arrays, error) from None
        if type(made._data) is not np.ndarray and isinstance(a, Tensor) and isinstance(b, Tensor):
            devices.check_one_device(name, "ab", arrays)
        return made

    return compare


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


def _invert(x: Tensor) -> Tensor:
    if recording.tracer is not None and is_traced((x,)):
        return recording.tracer.invert(x)  # type: ignore[no-any-return]
    if x.dtype.kind == "f":
        raise ValueError(f"~t: dtype {x.dtype} was given, expected booleans or integers")
    return looked_at((x,), np.invert(x._data))


def _reflected(function: Binary) -> Binary:
    """``2 - t`` asks t; a sum and a product are the same from both sides."""
    return function if function in (add, multiply) else lambda a, b: function(b, a)


def _in_place(function: Binary, symbol: str) -> Any:
    """``h += x`` is h = h + x. On a parameter that would leave the parameter as it was."""

    def operator(a: Tensor, b: TensorLike) -> Tensor:
        if a.requires_grad and a.is_leaf:
            raise TapeError(
                f"t {symbol}= value: tensors do not change in place, so this would leave the leaf "
                f"as it is and make another tensor; write t.data = t.data {symbol} value to update "
                f"it, or t = t {symbol} value to compute with it"
            )
        return function(a, b)

    return operator


for _name, _symbol, _operator in (
    ("add", "+", add),
    ("sub", "-", subtract),
    ("mul", "*", multiply),
    ("truediv", "/", divide),
    ("pow", "**", power),
):
    setattr(Tensor, f"__{_name}__", _operator)
    setattr(Tensor, f"__r{_name}__", _reflected(_operator))
    setattr(Tensor, f"__i{_name}__", _in_place(_operator, _symbol))

_METHODS: dict[str, Any] = {
    "__neg__": negative,
    "__pos__": lambda x: x,
    "__abs__": abs,
    "__invert__": _invert,
    "exp": exp,
    "log": log,
    "tanh": tanh,
    "sigmoid": sigmoid,
    "relu": relu,
}
for _name, _method in _METHODS.items():
    setattr(Tensor, _name, _method)
