"""A cell's trace as boxes and lines: what each operation is called, and what its values are.

Weights, biases and numbers stand inside the boxes of the operations that use them. Names and
structure alone: no picture. Imports the engine, recurrence and nn.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from inspect import Parameter, signature
from typing import Any

from tinygrad_seq.errors import TraceError
from tinygrad_seq.nn import LSTMCell
from tinygrad_seq.recurrence.arguments import Cell, check_arguments
from tinygrad_seq.recurrence.naming import Names, Widths, captured_text
from tinygrad_seq.recurrence.trace import Step
from tinygrad_seq.recurrence.tracing import trace_cell
from tinygrad_seq.tensors import FLOATS
from tinygrad_seq.trees import leaves, paths

Parts = Mapping[str, Collection[int | str]]

# Operations that are written between their operands, and what others are called in a picture.
INFIX = {
    "add": "+",
    "subtract": "−",
    "multiply": "×",
    "divide": "÷",
    "power": "^",
    "scalar_power": "^",
    "less": "<",
    "less_equal": "≤",
    "greater": ">",
    "greater_equal": "≥",
    "equal": "=",
    "not_equal": "≠",
}
CALLED = {
    "sigmoid": "σ",
    "relu": "ReLU",
    "negative": "−x",
    "square": "x²",
    "sqrt": "√x",
    "exp": "eˣ",
    "abs": "|x|",
    "maximum": "max",
    "minimum": "min",
    "uniform": "random",
    "broadcast": "repeat",
    "take": "choose units",
    "spread": "repeat",
    "take_transposed": "sum along an axis",
    "spread_transposed": "sum along an axis",
    "detach": "no gradient",
    "sum": "sum of units",
    "max": "max of units",
    "min": "min of units",
}
COMMUTES = {"add", "multiply", "equal", "not_equal", "maximum", "minimum"}
SUBSCRIPTS = "₀₁₂₃₄₅₆₇₈₉"
SUBSCRIPT = str.maketrans("0123456789", SUBSCRIPTS)
OPERANDS = {"number", "capture", "matrix", "units"}  # rows that stand inside the boxes of others


@dataclass
class Node:
    """A box of the picture."""

    text: str
    kind: str  # input, output, learned, function, arithmetic or cut
    line: int = -1  # of the step tape
    inputs: list[int] = field(default_factory=list)  # indices of earlier nodes
    ends: list[str] = field(default_factory=list)  # a word for each input, if order matters
    name: str = ""  # what the cell's code calls the value
    part: str = ""


def read(cell: Cell, xs: Any, state: Any) -> tuple[Step, list[Node]]:
    """Trace a cell; a node for each line that its outputs or its next state depend on."""
    given = check_arguments(cell, xs, state, None, None, "draw_cell")
    held = [leaf.dtype for leaf in (*leaves(given.state), *leaves(given.xs))]
    dtype = next((each for each in held if each in FLOATS), None)
    if dtype is None:
        raise TraceError("draw_cell: neither xs nor the state is floating, expected float32")
    names = Names(cell)
    with names:
        step = trace_cell(cell, given, dtype)
    return step, _Reader(cell, step, names, given.xs, given.state).nodes()


class _Reader:
    """One traced cell on the way to its nodes."""

    def __init__(self, cell: Any, step: Step, names: Names, xs: Any, state: Any) -> None:
        self.step, self.trace = step, step.trace
        self.rows = step.trace.rows[: step.length]
        self.names, self.lines = names, names.values(step.trace)
        self.tensors = names.tensors
        self._name_gates(getattr(cell, "gates", None))
        self.x_names = self._input_names("x", xs, cell)
        self.state_names = self._input_names("state", state, cell)
        of = {row.op: k for k, row in reversed(list(enumerate(self.rows)))}
        widths = {self.trace.widths[k] for k, row in enumerate(self.rows) if row.op == "state"}
        H = getattr(cell, "hidden_size", widths.pop() if len(widths) == 1 else 0)
        self.widths = Widths(H if isinstance(H, int) else 0, self.trace.widths[of["x"]])

    def nodes(self) -> list[Node]:
        nodes: list[Node] = []
        place: dict[int, int] = {}  # of a row in nodes
        live = self._live()
        for slot, row in enumerate(self.rows):
            if row.op in ("x", "state"):
                names = self.x_names if row.op == "x" else self.state_names
                place[slot] = len(nodes)
                nodes.append(Node(names[row.detail], "input", slot))
            elif row.op == "copy" and slot in live:
                place[slot] = place[row.inputs[0]]
            elif row.op not in OPERANDS and slot in live:
                place[slot] = len(nodes)
                nodes.append(self._node(slot, place))
        self._name(nodes)
        outputs: dict[int, list[str]] = {}
        for slot, name in self._outputs():
            outputs.setdefault(place[slot], []).append(name)
        for source, wanted in outputs.items():
            nodes.append(Node(" = ".join(wanted), "output", inputs=[source]))
        return nodes

    def _live(self) -> set[int]:
        live: set[int] = set()
        waiting = [*self.step.y_slots, *self.step.state_slots]
        while waiting:
            slot = waiting.pop()
            if slot not in live:
                live.add(slot)
                waiting += self.rows[slot].inputs
        return live

    def _node(self, slot: int, place: dict[int, int]) -> Node:
        row = self.rows[slot]
        fixed = {k: self._operand(k) for k in row.inputs if self.rows[k].op in OPERANDS}
        inputs = [k for k in row.inputs if k not in fixed]
        learned = any(self.rows[k].op != "number" and fixed[k] != "constant" for k in fixed)
        infix, called = INFIX.get(row.op), CALLED.get(row.op, row.op)
        ends: list[str] = []
        if row.op in ("matmul", "matmul_lines"):
            matrix = fixed[row.inputs[1]]
            text = f"{matrix[:-1]} ·" if matrix.endswith("ᵀ") else f"· {matrix}"
        elif row.op == "slice":
            start = self.trace.starts[slot]
            stop, whole = start + self.trace.widths[slot], self.trace.widths[row.inputs[0]]
            text = f"[{self.widths.cut(start, stop, whole)}]"
        elif any(self.rows[k].op == "units" for k in fixed):
            text = called
        elif infix and fixed:
            text = f" {infix} ".join(fixed.get(k, "") for k in row.inputs).strip()
        elif infix:
            text = infix if row.op in COMMUTES else f"a {infix} b"
        elif fixed:
            text = f"{called}({', '.join(fixed.get(k, '·') for k in row.inputs)})"
        else:
            text = called
        if len(inputs) > 1 and row.op not in COMMUTES:
            words = [str(n) for n in range(1, len(row.inputs) + 1)]
            words = ["a", "b"] if infix else ["if", "a", "b"] if row.op == "where" else words
            ends = [word for k, word in zip(row.inputs, words, strict=True) if k in inputs]
        kind = "arithmetic" if infix else "function"
        kind = "cut" if row.op in ("slice", "concat") else kind
        return Node(text, "learned" if learned else kind, slot, [place[k] for k in inputs], ends)

    def _operand(self, slot: int) -> str:
        row = self.rows[slot]
        if row.op == "number":
            return f"{self.step.numbers[row.detail]:.3g}"
        return captured_text(row.detail, self.step, self.tensors, self.widths)

    # What values are called

    def _name_gates(self, gates: Any) -> None:
        """A cell with a tuple ``gates`` of names cuts what is stacked into these, in order."""
        for cuts in self.trace.cuts.values() if isinstance(gates, tuple) else ():
            if len(cuts) == len(gates) and len({self.trace.widths[slot] for slot in cuts}) == 1:
                self.lines = {slot: n for slot, n in self.lines.items() if n not in gates}
                self.lines |= zip(
                    sorted(cuts, key=self.trace.starts.__getitem__), gates, strict=True
                )
                return

    def _input_names(self, op: str, tree: Any, cell: Any) -> list[str]:
        """Of each leaf its name in its structure, or what the cell's code calls it."""
        slots = [slot for slot, row in enumerate(self.rows) if row.op == op]
        names: list[str] = []
        for k, (slot, (path, _)) in enumerate(zip(slots, paths(tree), strict=True)):
            called = self.names.of(slot, self.trace)
            if op == "state":  # code may use its name again, for the next state
                after = _origin(self.step, self.step.state_slots[k])
                if self.rows[after].op not in ("x", "state"):
                    called += self.names.of(after, self.trace)
                called = [each for each in called if each[1] not in self.x_names]
            called.sort(key=lambda each: each[0])
            name = _key(path) if path else _argument(cell, op)
            name = name or (called[0][1] if called else f"{op}{path}")
            before = [each.rstrip(SUBSCRIPTS) for each in names].count(name)
            names.append(name + str(before + 1).translate(SUBSCRIPT) if before else name)
        return names

    def _outputs(self) -> list[tuple[int, str]]:
        """Rows that the cell returns, each with a name; a prime marks the next state."""
        step = self.step
        y_names = [_key(path) or f"y{path}" for path, _ in paths(step.y)]
        after = [f"{name}′" for name in self.state_names]
        return [
            *zip(step.y_slots, y_names, strict=True),
            *zip(step.state_slots, after, strict=True),
        ]

    def _name(self, nodes: list[Node]) -> None:
        """What stands at the left or at the right already has its name there."""
        outputs = self._outputs()
        taken = {*self.x_names, *self.state_names, *(name for _, name in outputs)}
        ends = {_origin(self.step, slot) for slot in self.step.state_slots}
        for node in nodes:
            name = self.lines.get(node.line, "")
            if node.kind != "input" and node.line not in ends and name not in taken:
                node.name = name


def _origin(step: Step, slot: int) -> int:
    """The row of which a row is a copy, or a copy of a copy; itself if it is none."""
    while step.trace.rows[slot].op == "copy":
        (slot,) = step.trace.rows[slot].inputs
    return slot


def _key(path: str) -> str:
    """The name of a leaf in a NamedTuple or a dict: ``h`` for ``.h``, ``['h']`` or ``[0].h``."""
    if path.endswith("']"):
        return path[:-2].rpartition("['")[2]
    return path.rpartition(".")[2] if "." in path and not path.endswith("]") else ""


def _argument(cell: Any, op: str) -> str:
    """What a cell calls its first argument, x, or its second, the state."""
    arguments = list(signature(getattr(cell, "forward", cell)).parameters.values())
    if len(arguments) < 2 or Parameter.VAR_POSITIONAL in (each.kind for each in arguments[:2]):
        return ""
    return arguments[op == "state"].name


# Parts ---------------------------------------------------------------------------------------


def assign_parts(nodes: list[Node], parts: Parts) -> None:
    """Mark the nodes that each part names, and what is computed from one part alone.

    A node is named by its line or by what it is called. Raises ValueError for others.
    """
    if not isinstance(parts, Mapping):
        raise ValueError(
            f"draw_cell: parts is {parts!r}, expected a dict of steps of the cell, such as "
            '{"reset": ["r"]}'
        )
    known: dict[int | str, int] = {}
    for k, node in enumerate(nodes):
        if node.kind == "output":
            known |= dict.fromkeys(node.text.split(" = "), node.inputs[0])
        elif node.kind != "input":
            known |= {node.line: k, node.name: k}
    known.pop("", None)
    seeds: dict[int, str] = {}
    for part, wanted in parts.items():
        for each in [wanted] if isinstance(wanted, (str, int)) else wanted:
            if each not in known:
                names = [node.name for node in nodes if node.name]
                raise ValueError(
                    f"draw_cell: parts[{part!r}] has {each!r}, expected a line of the step, which "
                    f"lines=True shows, or a value by its name: {', '.join(names) or 'none here'}"
                )
            seeds[known[each]] = part
    for node, made_of in zip(nodes, _spread(nodes, seeds), strict=True):
        if len(made_of) == 1 and node.kind not in ("input", "output"):
            (node.part,) = made_of


def _spread(nodes: list[Node], seeds: Mapping[int, str]) -> list[set[str]]:
    """The parts that each node is computed from, those before another seed apart."""
    made_of: list[set[str]] = []
    for k, node in enumerate(nodes):
        own = {seeds[k]} if k in seeds else set().union(*(made_of[i] for i in node.inputs))
        made_of.append(own)
    return made_of


def lstm_parts(cell: Any, step: Step, nodes: list[Node]) -> dict[str, list[int | str]]:
    """The four steps of an LSTM, found by the names of its gates; none if it is no LSTM.

    What mixes forget and input on the way to the next c is memory, and what else is made of both
    is output.
    """
    named = {node.name: k for k, node in enumerate(nodes)}
    pair = isinstance(cell, LSTMCell) and len(step.state_slots) == 2
    if not pair or not {"f", "g", "o"} <= named.keys():
        return {}
    gates = {"f": "forget", "i": "input", "g": "input", "o": "output"}
    seeds = {named[name]: part for name, part in gates.items() if name in named}
    slot = _origin(step, step.state_slots[1])
    to_memory = _leading_to({k for k, node in enumerate(nodes) if node.line == slot}, nodes)
    mixed = [k for k, of in enumerate(_spread(nodes, seeds)) if of >= {"forget", "input"}]
    for k in mixed:
        if nodes[k].kind != "output":
            seeds[k] = "memory" if k in to_memory else "output"
    order = ("forget", "input", "memory", "output")
    return {part: [nodes[k].line for k in seeds if seeds[k] == part] for part in order}


def _leading_to(ends: set[int], nodes: list[Node]) -> set[int]:
    found, waiting = set[int](), list(ends)
    while waiting:
        k = waiting.pop()
        found.add(k)
        waiting += nodes[k].inputs
    return found
