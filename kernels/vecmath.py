"""exp, tanh, sigmoid, log and others, written so that they run on many numbers at once.

A function is given ``on``, the ground it runs on: vectors of the processor (``simd.py``), or NumPy
arrays (``OverNumPy``), on which its error can be measured. There are no branches and no tables.
exp, expm1, tanh and sigmoid reduce to eˣ − 1 = 2ᵏ(eʳ − 1) + (2ᵏ − 1) with |r| ≤ ½ ln 2, a power
series in r, and the exponent bits of a float; log and log1p to those bits and the series of artanh.
Largest errors, in units in the last place over all magnitudes (measured by tests/test_kernels.py):

    exp 2   expm1 3   tanh 4   sigmoid 3   log 3   log1p 4      (float32 and float64)

sin, cos, erf and power are the C library's, one number at a time.
Imports NumPy alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from inspect import signature
from math import e, factorial, log2
from math import erf as scalar_erf
from typing import Any, ClassVar

import numpy as np
from numpy.polynomial.chebyshev import cheb2poly

Value = Any
LOG2_E = log2(e)
# ln 2 in two parts: the first has so few digits that k times it is exact.
LN2 = {
    "float32": (0.693359375, -2.12194440e-4),
    "float64": (6.93147180369123816490e-01, 1.90821492927058770002e-10),
}
TERMS = {"float32": 5, "float64": 11}  # of the series of (eʳ − 1 − r)/r²
LOG_TERMS = {"float32": 5, "float64": 11}
MANTISSA = {"float32": 23, "float64": 52}
BIAS = {"float32": 127, "float64": 1023}
LARGEST = {"float32": 104.0, "float64": 746.0}  # |x| beyond which eˣ is 0 or infinite
# Between these eˣ is a normal number, and its inverse below the smallest one at the upper end.
NORMAL = {"float32": (-87.3, 88.37), "float64": (-708.3, 709.4)}
LARGE_DIVISOR = {"float32": 2.0**125, "float64": 2.0**1021}
SATURATED = {"float32": 10.0, "float64": 20.0}  # beyond which tanh is ±1


def arity(function: Callable[..., Any]) -> int:
    """How many values a function takes, besides the ground it runs on."""
    return len(signature(function).parameters) - 1


@cache
def _series(count: int) -> list[float]:
    """So many coefficients of (eʳ − 1 − r)/r² = 1/2 + r/6 + ... for |r| ≤ ½ ln 2.

    One more of Taylor's is spread over them by a Chebyshev polynomial, which is the smallest with
    that leading coefficient (economised, Lanczos 1938).
    """
    taylor = np.array([1.0 / factorial(n) for n in range(2, count + 3)])
    smallest = cheb2poly([0.0] * count + [1.0]) / (0.5 / LOG2_E) ** np.arange(count + 1)
    return (taylor - taylor[-1] / smallest[-1] * smallest)[:-1].tolist()


def _reduced(on: Any, x: Value, sign: float = 1.0) -> tuple[Value, Value, Value]:
    """k, 2ᵏ and eʳ − 1, where x, or −x with the sign −1, is k ln 2 + r.

    2ᵏ holds where a float's exponent can hold k.
    """
    # So large a number has no fraction, and its lowest bits are those of k and the bias.
    mantissa = MANTISSA[on.dtype]
    large = on.constant(1.5 * 2**mantissa + BIAS[on.dtype])
    sum_ = on.fma(x, sign * LOG2_E, large)
    k = sum_ - large
    power = on.from_bits(on.shift_left(on.bits_of(sum_), mantissa))
    high, low = LN2[on.dtype]
    r = on.fma(k, -sign * low, on.fma(k, -sign * high, x))  # times the sign
    square = r * r
    # two terms at a time: half as many steps wait for one another
    terms = [on.constant(c * sign**n) for n, c in enumerate(_series(TERMS[on.dtype]))]
    series = terms[-1]
    for n in range(len(terms) - 3, -1, -2):
        series = on.fma(series, square, on.fma(r, terms[n + 1], terms[n]))
    return k, power, on.fma(square, series, r if sign > 0 else -r)


def _two_to(on: Any, k: Value) -> Value:
    """2ᵏ for a whole k that a float's exponent can hold."""
    return on.from_bits(
        on.shift_left(on.add_integer(on.to_integer(k), BIAS[on.dtype]), MANTISSA[on.dtype])
    )


def _held(on: Any, x: Value, limit: float) -> Value:
    """x between −limit and limit; NaN stays NaN."""
    x = on.select(on.compare("<", x, -limit), -limit, x)
    return on.select(on.compare(">", x, limit), limit, x)


def exp(on: Any, x: Value) -> Value:
    k, _, small = _reduced(on, _held(on, x, LARGEST[on.dtype]))
    half = on.call("floor", k * 0.5)  # 2ᵏ in two factors, each of which exists
    return (small + 1.0) * _two_to(on, half) * _two_to(on, k - half)


def expm1(on: Any, x: Value) -> Value:
    k, _, small = _reduced(on, _held(on, x, LARGEST[on.dtype]))
    half = on.call("floor", k * 0.5)
    first, second = _two_to(on, half), _two_to(on, k - half)
    whole = (small * first) * second + (first * second - 1.0)
    return on.select(
        on.compare(">", k, BIAS[on.dtype] - 1.0), (small + 1.0) * first * second, whole
    )


def tanh(on: Any, x: Value) -> Value:
    size, limit = abs(on, x), SATURATED[on.dtype]
    size = on.select(on.compare(">", size, limit), limit, size)
    _, scale, small = _reduced(on, size + size)
    m = on.fma(small, scale, scale - 1.0)  # e^(2|x|) − 1
    return on.copysign(m / (m + 2.0), x)


def sigmoid(on: Any, x: Value) -> Value:
    low, high = NORMAL[on.dtype]  # beyond these it is 0 or 1
    x = on.select(on.compare("<", x, -high), -high, x)
    x = on.select(on.compare(">", x, -low), -low, x)
    _, scale, small = _reduced(on, x, sign=-1.0)
    return 1.0 / (on.fma(small, scale, scale) + 1.0)


def log(on: Any, x: Value) -> Value:
    """ln x = k ln 2 + 2 artanh((m − 1)/(m + 1)), x = 2ᵏ m, m between √½ and √2."""
    mantissa = MANTISSA[on.dtype]
    root_half = int(np.sqrt(np.dtype(on.dtype).type(0.5)).view(f"i{np.dtype(on.dtype).itemsize}"))
    bits = on.bits_of(x)
    k = on.shift_right(on.add_integer(bits, -root_half), mantissa)
    m = on.from_bits(on.subtract_integer(bits, on.shift_left(k, mantissa)))
    k = on.to_float(k)
    d = m - 1.0
    s = d / (d + 2.0)
    square = s * s
    series = on.constant(2.0 / (2 * LOG_TERMS[on.dtype] + 1))
    for n in range(LOG_TERMS[on.dtype] - 1, 0, -1):
        series = on.fma(series, square, on.constant(2.0 / (2 * n + 1)))
    high, low = LN2[on.dtype]
    # 2 artanh(s) = d − s (d − s² series), in which nothing cancels
    y = on.fma(k, high, d - (s * (d - square * series) - k * low))
    y = on.select(on.compare("==", x, np.inf), np.inf, y)
    y = on.select(on.compare("==", x, 0.0), -np.inf, y)
    return on.select(on.compare(">=", x, 0.0), y, np.nan)


def log1p(on: Any, x: Value) -> Value:
    """ln(1 + x) as ln(u) x / (u − 1), u the float nearest to 1 + x, whose error cancels."""
    u = x + 1.0
    near = on.compare("==", u, 1.0)
    y = log(on, u) * (x / on.select(near, 1.0, u - 1.0))
    y = on.select(near, x, y)
    return on.select(
        on.compare("==", x, np.inf), np.inf, on.select(on.compare("==", u, 0.0), -np.inf, y)
    )


def sqrt(on: Any, x: Value) -> Value:
    return on.call("sqrt", x)


def abs(on: Any, x: Value) -> Value:
    return on.call("fabs", x)


def sign(on: Any, x: Value) -> Value:
    y = on.select(on.compare("<", x, 0.0), -1.0, on.select(on.compare(">", x, 0.0), 1.0, x))
    return on.select(on.compare("==", x, 0.0), 0.0, y)


def floor(on: Any, x: Value) -> Value:
    return on.call("floor", x)


def maximum(on: Any, a: Value, b: Value) -> Value:
    return on.call("maximum", a, b)


def minimum(on: Any, a: Value, b: Value) -> Value:
    return on.call("minimum", a, b)


def where(on: Any, condition: Value, a: Value, b: Value) -> Value:
    return on.select(on.compare("!=", condition, 0.0), a, b)


def divisor_scale(on: Any, x: Value) -> Value:
    """1, or a power of two so small that the inverse of x times it is a normal number."""
    return on.select(on.compare(">", abs(on, x), LARGE_DIVISOR[on.dtype]), 2.0**-64, 1.0)


def sin(on: Any, x: Value) -> Value:
    return on.each("sin", x)


def cos(on: Any, x: Value) -> Value:
    return on.each("cos", x)


def erf(on: Any, x: Value) -> Value:
    return on.each("erf", x)


def power(on: Any, a: Value, b: Value) -> Value:
    return on.each("pow", a, b)


class OverNumPy:
    """The ground of NumPy: what ``simd.py`` does with vectors, done with arrays."""

    _CALLS: ClassVar[dict[str, Any]] = {
        "floor": np.floor,
        "sqrt": np.sqrt,
        "fabs": np.abs,
        "maximum": np.maximum,
        "minimum": np.minimum,
    }
    _EACH: ClassVar[dict[str, Any]] = {
        "sin": np.sin,
        "cos": np.cos,
        "pow": np.power,
        "erf": np.vectorize(scalar_erf, otypes=[np.float64]),
    }
    _COMPARE: ClassVar[dict[str, Any]] = {
        "<": np.less,
        "<=": np.less_equal,
        ">": np.greater,
        ">=": np.greater_equal,
        "==": np.equal,
        "!=": np.not_equal,
    }

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self.number = np.dtype(dtype).type
        self.integer = np.dtype(f"i{self.number().itemsize}").type

    def constant(self, number: float) -> Value:
        return self.number(number)

    def call(self, name: str, *values: Value) -> Value:
        return self._CALLS[name](*values)

    def each(self, name: str, *values: Value) -> Value:
        return self._EACH[name](*values).astype(self.dtype)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        return self.number(a) * self.number(b) + c if np.ndim(a) == 0 else a * self.number(b) + c

    def select(self, condition: Value, a: Value, b: Value) -> Value:
        return np.asarray(np.where(condition, a, b)).astype(self.dtype)

    def compare(self, sign: str, a: Value, b: Value) -> Value:
        return self._COMPARE[sign](a, b)

    def copysign(self, a: Value, b: Value) -> Value:
        return np.copysign(a, b)

    def to_integer(self, x: Value) -> Value:
        return np.asarray(x).astype(self.integer)

    def to_float(self, x: Value) -> Value:
        return np.asarray(x).astype(self.dtype)

    def bits_of(self, x: Value) -> Value:
        return np.asarray(x).view(self.integer)

    def from_bits(self, x: Value) -> Value:
        return np.asarray(x).view(self.number)

    def add_integer(self, x: Value, number: Any) -> Value:
        return x + self.integer(number)

    def subtract_integer(self, x: Value, other: Value) -> Value:
        return x - other

    def shift_left(self, x: Value, by: int) -> Value:
        return x << self.integer(by)

    def shift_right(self, x: Value, by: int) -> Value:
        return x >> self.integer(by)
