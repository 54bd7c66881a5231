"""Every elementwise primitive, one entry each: its name, its value, its derivatives.

An entry is text, and the text has three readings. Over NumPy arrays it is the eager operation and
its backward. Over tensors it is the derivative of the derivative. Over scalars it is the body of a
generated kernel. A derivative is a vector-Jacobian product: ``g`` is the gradient that arrives from
the output ``y``, the inputs go by their own names, and the names that a derivative mentions are the
values that the tape keeps for the way back. That is why tanh is differentiated as
``g * (1 - y * y)``: ``y`` exists anyhow, and ``x`` may be dropped.

To add a primitive, add an entry here and name it in ``elementwise.py``; its tests are generated.
Structural operations (products, reductions, shapes) are in ``structural.py``.
Imports NumPy and ``special.py``, nothing else of this package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tinygrad_seq.special import erf

Array = Any  # np.ndarray; on a device, that device's array
Function = Callable[..., Any]


class Operation:
    """What the tape must know of an operation to run it and to go back through it.

    ``forward(*inputs, *params)`` computes the value from arrays. ``vjps[k](g, *saved)`` is the
    gradient of input ``k``, where ``saved`` holds the inputs and the output that some derivative
    uses (``None`` for the others) followed by the params. If no derivative uses any value,
    ``values`` is 0 and ``saved`` holds the params alone. ``vjps_over_tensors`` are the same
    derivatives as recorded operations. The first ``shown`` params say what is done, the others are
    there for the derivatives.
    """

    __slots__ = (
        "drops",
        "forward",
        "inputs",
        "name",
        "shown",
        "values",
        "vjps",
        "vjps_over_tensors",
    )

    def __init__(
        self,
        name: str,
        inputs: Sequence[str],
        forward: Function,
        vjps: Sequence[Function],
        uses: Sequence[set[str]] = (),
        shown: int | None = None,
    ) -> None:
        self.shown = shown
        self.name, self.inputs, self.forward, self.vjps = name, tuple(inputs), forward, vjps
        self.vjps_over_tensors: Sequence[Function] = vjps
        self.values = len(inputs) + 1 if any(uses) else 0
        # drops[needs]: the places in (*inputs, y) of the values that no derivative uses when the
        # inputs in the bit set `needs` want a gradient.
        self.drops = [
            [
                place
                for place, name in enumerate((*self.inputs, "y"))
                if not any(name in used for k, used in enumerate(uses) if needs >> k & 1)
            ]
            for needs in range(2 ** len(inputs) if self.values else 1)
        ]

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(self.inputs)})"


class Rule(Operation):
    """An elementwise operation, defined by text."""

    __slots__ = ("derivatives", "doc", "text")

    def __init__(self, name: str, inputs: str, text: str, doc: str, **derivatives: str) -> None:
        self.text, self.doc, self.derivatives = text, doc, derivatives
        arguments = inputs.split()
        uses = [_names(derivatives.get(k, "")) & {*arguments, "y"} for k in arguments]
        super().__init__(name, arguments, _reading(text, arguments, OVER_ARRAYS), (), uses)
        self.forward = _AS_UFUNC.get(name, self.forward)
        self.vjps = self.read_vjps(OVER_ARRAYS)

    def read_vjps(self, namespace: dict[str, Any]) -> list[Function]:
        """The derivatives as functions, their names looked up in ``namespace``."""
        arguments = ["g", *self.inputs, "y"] if self.values else ["g"]
        return [
            _reading(self.derivatives.get(name, "0 * g"), arguments, namespace)
            for name in self.inputs
        ]


def _names(text: str) -> set[str]:
    return set(compile(text or "0", "<rule>", "eval").co_names)


def _reading(text: str, arguments: Sequence[str], namespace: dict[str, Any]) -> Function:
    return eval(f"lambda {', '.join(arguments)}: {text}", namespace)  # type: ignore[no-any-return]


def _where(condition: Array, a: Array, b: Array) -> Array:
    """A condition on a Python number picks a Python number, which stays weak."""
    if isinstance(condition, bool):
        return a if condition else b
    return np.where(condition, a, b)


OVER_ARRAYS: dict[str, Any] = {
    "abs": np.abs,
    "cos": np.cos,
    "erf": erf,
    "exp": np.exp,
    "expm1": np.expm1,
    "log": np.log,
    "log1p": np.log1p,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "sign": np.sign,
    "sin": np.sin,
    "sqrt": np.sqrt,
    "tanh": np.tanh,
    "where": _where,
}
_AS_UFUNC: dict[str, Function] = {  # one call instead of a lambda around it
    name: getattr(np, name)
    for name in (
        *("add", "subtract", "multiply", "divide", "negative", "power", "square", "abs", "cos"),
        *("exp", "expm1", "log", "log1p", "maximum", "minimum", "sign", "sin", "sqrt", "tanh"),
    )
}
RULES: dict[str, Rule] = {}


def rule(name: str, inputs: str, text: str, doc: str, **derivatives: str) -> None:
    RULES[name] = made = Rule(name, inputs, text, doc, **derivatives)
    OVER_ARRAYS.setdefault(name, made.forward)


# Equal values share the gradient of maximum and minimum equally; relu'(0) = abs'(0) = 0.
rule("add", "a b", "a + b", "a + b", a="g", b="g")
rule("subtract", "a b", "a - b", "a - b", a="g", b="-g")
rule("multiply", "a b", "a * b", "a * b", a="g * b", b="g * a")
rule("divide", "a b", "a / b", "a / b", a="g / b", b="-g * y / b")
rule("negative", "x", "-x", "-x", x="-g")
rule(
    "power",
    "a b",
    "a ** b",
    "a to the power b; b's own derivative needs a ≥ 0",
    a="g * b * a ** where(b == 0, 1, b - 1)",
    b="g * y * log(where(a == 0, 1, a))",
)
rule("square", "x", "x * x", "x²", x="g * (2 * x)")
rule("sqrt", "x", "sqrt(x)", "√x", x="g * 0.5 / y")
rule("exp", "x", "exp(x)", "eˣ", x="g * y")
rule("expm1", "x", "expm1(x)", "eˣ − 1, exact near 0", x="g * (y + 1)")
rule("log", "x", "log(x)", "the natural logarithm of x", x="g / x")
rule("log1p", "x", "log1p(x)", "log(1 + x), exact near 0", x="g / (1 + x)")
rule("abs", "x", "abs(x)", "|x|", x="g * sign(x)")
rule("sign", "x", "sign(x)", "−1, 0 or 1; its derivative is 0", x="0 * g")
rule("sin", "x", "sin(x)", "sine of x, in radians", x="g * cos(x)")
rule("cos", "x", "cos(x)", "cosine of x, in radians", x="-g * sin(x)")
rule("tanh", "x", "tanh(x)", "the hyperbolic tangent of x", x="g * (1 - y * y)")
rule(
    "sigmoid",
    "x",
    "1 / (1 + exp(-maximum(x, -87)))",  # beyond e⁸⁸ float32 overflows
    "σ(x) = 1/(1 + e⁻ˣ)",
    x="g * (y * (1 - y))",
)
rule("relu", "x", "maximum(x, 0)", "max(0, x)", x="where(x > 0, g, 0)")
rule(
    "leaky_relu",
    "x slope",
    "where(x > 0, x, slope * x)",
    "x where x > 0, else slope·x",
    x="where(x > 0, g, slope * g)",
    slope="where(x > 0, 0, g * x)",
)
rule(
    "elu",
    "x alpha",
    "where(x > 0, x, alpha * expm1(minimum(x, 0)))",
    "x where x > 0, else alpha·(eˣ − 1)",
    x="where(x > 0, g, g * (y + alpha))",
    alpha="where(x > 0, 0, g * expm1(minimum(x, 0)))",
)
rule(
    "softplus",
    "x",
    "maximum(x, 0) + log1p(exp(-abs(x)))",
    "log(1 + eˣ)",
    x="g * sigmoid(x)",
)
rule("silu", "x", "x * sigmoid(x)", "x·σ(x)", x="g * (sigmoid(x) * (1 - y) + y)")
rule(
    "erf", "x", "erf(x)", "erf(x) = 2/√π ∫₀ˣ e^(−t²) dt", x="g * (1.1283791670955126 * exp(-x * x))"
)
rule(
    "gelu",
    "x",
    "x * (0.5 + 0.5 * erf(x * 0.7071067811865476))",
    "x·Φ(x), the exact one; Φ is the normal distribution function",
    x="g * (0.5 + 0.5 * erf(x * 0.7071067811865476) + x * exp(-0.5 * x * x) * 0.3989422804014327)",
)
rule(
    "maximum",
    "a b",
    "maximum(a, b)",
    "the larger of a and b",
    a="where(a > b, g, where(a == b, 0.5 * g, 0))",
    b="where(b > a, g, where(a == b, 0.5 * g, 0))",
)
rule(
    "minimum",
    "a b",
    "minimum(a, b)",
    "the smaller of a and b",
    a="where(a < b, g, where(a == b, 0.5 * g, 0))",
    b="where(b < a, g, where(a == b, 0.5 * g, 0))",
)
rule(
    "where",
    "condition a b",
    "where(condition, a, b)",
    "a where the condition holds, else b",
    a="where(condition, g, 0)",
    b="where(condition, 0, g)",
)


def read_over_tensors(functions: Mapping[str, Function]) -> None:
    """Give every rule its derivatives over tensors; ``functions`` are the recorded operations."""
    namespace = dict(functions)
    for each in RULES.values():
        each.vjps_over_tensors = each.read_vjps(namespace)
