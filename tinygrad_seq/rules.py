"""Every elementwise primitive, one entry each: its name, its value, its derivatives.

An entry is text, and the text has three readings. Over arrays it is the eager operation and its
backward (where NumPy has a ufunc of the same name, that computes the value; it leaves arrays on a
GPU to CuPy). Over tensors it is the derivative of the derivative. Over scalars it is what a
generated kernel is to be made of.

A derivative is a vector-Jacobian product: ``g`` is the gradient that arrives from the output ``y``,
and the inputs go by their own names. The names that a derivative mentions are the values that the
tape keeps for the way back. That is why tanh is differentiated as ``g * (1 - y * y)``: ``y`` exists
anyhow, and ``x`` may be dropped.

To add a primitive, add an entry here and name it in ``elementwise.py``; its tests are generated.
Structural operations (products, reductions, shapes) are in ``structural.py``.
Imports NumPy and ``special.py``, nothing else of this package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from tinygrad_seq.special import erf

Array = Any  # np.ndarray, or cupy.ndarray on a GPU
Function = Callable[..., Any]


class Vjps(Protocol):
    """The derivatives of an operation: ``vjps[k]`` is that of input k."""

    def __getitem__(self, k: int, /) -> Function: ...


class Operation:
    """What the tape must know of an operation to run it and to go back through it.

    ``forward(*inputs, *params)`` computes the value from arrays, and ``vjps[k](g, *saved)`` the
    gradient of input k: an array that ``unbroadcast`` can sum to the input's shape, or a ``Piece``.
    ``saved`` is what the tape keeps: the inputs and the output y, with None for those that nobody
    will use, then the params. Where no derivative uses any value it is the params alone.
    ``tensor_vjps`` are the derivatives as recorded operations over tensors.

    ``inputs`` are the names of the inputs, none where there may be any number. ``uses[k]`` names
    the inputs, and ``"y"``, that the derivative of input k mentions. The first ``shown`` params say
    what is done; the others are there for the derivatives. ``view`` says that y may share memory
    with the first input.
    """

    __slots__ = (
        *("forward", "inputs", "name", "shown", "tensor_vjps", "unused", "value_count", "view"),
        "vjps",
    )

    def __init__(
        self,
        name: str,
        inputs: Sequence[str],
        forward: Function,
        vjps: Vjps,
        uses: Sequence[set[str]] = (),
        shown: int | None = None,
        view: bool = False,
    ) -> None:
        self.name, self.inputs, self.forward = name, tuple(inputs), forward
        self.shown, self.view = shown, view
        self.vjps = self.tensor_vjps = vjps
        # How many values stand before the params in `saved`: the inputs and y, or none.
        self.value_count = len(inputs) + 1 if any(uses) else 0
        # unused[needs]: the places of the values to drop, where bit k of `needs` says whether
        # input k wants a gradient.
        self.unused: list[list[int]] = []
        for needs in range(2 ** len(inputs) if self.value_count else 0):
            used = set().union(*(names for k, names in enumerate(uses) if needs >> k & 1))
            values = enumerate((*inputs, "y"))
            self.unused.append([place for place, value in values if value not in used])

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(self.inputs)})"


class Rule(Operation):
    """An elementwise operation, defined by text: its value, and a derivative for each input."""

    __slots__ = ("arguments", "derivatives", "doc", "text")

    def __init__(self, name: str, text: str, doc: str, **derivatives: str) -> None:
        self.text, self.doc, self.derivatives = text, doc, derivatives
        inputs = tuple(derivatives)
        uses = [names_in(vjp) & {*inputs, "y"} for vjp in derivatives.values()]
        self.arguments = ("g", *inputs, "y") if any(uses) else ("g",)
        forward = UFUNCS.get(name) or read(text, inputs, ARRAY_NAMES)
        super().__init__(name, inputs, forward, self.read_vjps(ARRAY_NAMES), uses)

    def read_vjps(self, namespace: dict[str, Any]) -> list[Function]:
        """The derivatives as functions, the names in them looked up in ``namespace``."""
        return [read(vjp, self.arguments, namespace) for vjp in self.derivatives.values()]


def names_in(text: str) -> set[str]:
    """The names that a line of rule text mentions."""
    return set(compile(text, "<rule>", "eval").co_names)


def read(text: str, arguments: Sequence[str], namespace: dict[str, Any]) -> Function:
    """A line of rule text as a function of ``arguments``."""
    code = compile(f"lambda {', '.join(arguments)}: {text}", f"<rule {text}>", "eval")
    return eval(code, namespace)  # type: ignore[no-any-return]


UFUNCS: dict[str, Function] = {
    name: getattr(np, name)
    for name in (
        *("abs", "add", "cos", "divide", "exp", "expm1", "floor", "log", "log1p", "maximum"),
        *("minimum", "multiply", "negative", "power", "sign", "sin", "sqrt", "square", "subtract"),
        "tanh",
    )
}
ARRAY_NAMES: dict[str, Any] = {**UFUNCS, "erf": erf, "where": np.where}
RULES: dict[str, Rule] = {}


def rule(name: str, text: str, doc: str, **derivatives: str) -> None:
    """Enter an operation: its value as text, what it is, and for each input its derivative."""
    RULES[name] = made = Rule(name, text, doc, **derivatives)
    ARRAY_NAMES.setdefault(name, made.forward)


rule("add", "a + b", "a + b", a="g", b="g")
rule("subtract", "a - b", "a - b", a="g", b="-g")
rule("multiply", "a * b", "a * b", a="g * b", b="g * a")
rule("divide", "a / b", "a / b", a="g / b", b="-g * y / b")
rule("negative", "-x", "-x", x="-g")
rule(
    "power",
    "a ** b",
    "a to the power b; where b wants a gradient, a must not be negative",
    # a⁰ is flat, at a = 0 too; elsewhere the exponent is b − 1, also for b = 0, so that this line
    # has the right derivative by b.
    a="g * b * a ** (b - ((a != 0) | (b != 0)))",
    b="g * y * log(a + (a == 0))",  # and so is 0ᵇ
)
rule(
    "scalar_power",
    "x ** n",
    "x to the power n, a Python number",
    x="g * n * x ** (n - (n != 0))",
    n="0 * g",  # a number wants no gradient
)
rule("square", "x * x", "x²", x="g * (2 * x)")
rule("sqrt", "sqrt(x)", "√x", x="g * 0.5 / y")
rule("exp", "exp(x)", "eˣ", x="g * y")
rule("expm1", "expm1(x)", "eˣ − 1, exact near 0", x="g * (y + 1)")
rule("log", "log(x)", "the natural logarithm of x", x="g / x")
rule("log1p", "log1p(x)", "log(1 + x), exact near 0", x="g / (1 + x)")
rule("abs", "abs(x)", "|x|; its derivative at 0 is 0", x="g * sign(x)")
rule("sign", "sign(x)", "−1, 0 or 1; its derivative is 0", x="0 * g")
rule("floor", "floor(x)", "the largest whole number up to x; its derivative is 0", x="0 * g")
rule("sin", "sin(x)", "sine of x, in radians", x="g * cos(x)")
rule("cos", "cos(x)", "cosine of x, in radians", x="-g * sin(x)")
rule("tanh", "tanh(x)", "the hyperbolic tangent of x", x="g * (1 - y * y)")
rule(
    "sigmoid",
    "exp(minimum(x, 0)) / (1 + exp(-abs(x)))",  # no exponent is positive: nothing overflows
    "σ(x) = 1/(1 + e⁻ˣ)",
    x="g * (y * (1 - y))",
)
rule("relu", "maximum(x, 0)", "max(0, x); its derivative at 0 is 0", x="where(y > 0, g, 0)")
rule(
    "leaky_relu",
    "where(x > 0, x, slope * x)",
    "x where x > 0, else slope·x",
    x="where(x > 0, g, slope * g)",
    slope="where(x > 0, 0, g * x)",
)
rule(
    "elu",
    "where(x > 0, x, alpha * expm1(minimum(x, 0)))",
    "x where x > 0, else alpha·(eˣ − 1)",
    x="where(x > 0, g, g * (y + alpha))",
    alpha="where(x > 0, 0, g * expm1(minimum(x, 0)))",
)
rule("softplus", "maximum(x, 0) + log1p(exp(-abs(x)))", "log(1 + eˣ)", x="g * sigmoid(x)")
rule("silu", "x * sigmoid(x)", "x·σ(x)", x="g * (sigmoid(x) * (1 + (x - y)))")
# 1.128… = 2/√π, 0.707… = 1/√2, 0.398… = 1/√(2π)
rule("erf", "erf(x)", "erf(x) = 2/√π ∫₀ˣ e^(−t²) dt", x="g * (1.1283791670955126 * exp(-x * x))")
rule(
    "gelu",
    "x * (0.5 + 0.5 * erf(x * 0.7071067811865476))",
    "x·Φ(x), the exact one; Φ is the normal distribution function",
    x="g * (0.5 + 0.5 * erf(x * 0.7071067811865476) + x * exp(-0.5 * x * x) * 0.3989422804014327)",
)
rule(
    "maximum",
    "maximum(a, b)",
    "the larger of a and b; where they are equal they share the gradient equally",
    a="where(a > b, g, where(a == b, 0.5 * g, 0))",
    b="where(b > a, g, where(a == b, 0.5 * g, 0))",
)
rule(
    "minimum",
    "minimum(a, b)",
    "the smaller of a and b; where they are equal they share the gradient equally",
    a="where(a < b, g, where(a == b, 0.5 * g, 0))",
    b="where(b < a, g, where(a == b, 0.5 * g, 0))",
)
rule(
    "where",
    "where(condition, a, b)",
    "a where the condition holds, else b",
    condition="0 * g",  # booleans want no gradient; it is here to give the input its name
    a="where(condition, g, 0)",
    b="where(condition, 0, g)",
)


def read_over_tensors(functions: Mapping[str, Function]) -> None:
    """Give every rule its derivatives over tensors; ``functions`` are the recorded operations."""
    namespace = dict(functions)
    for each in RULES.values():
        each.tensor_vjps = each.read_vjps(namespace)
