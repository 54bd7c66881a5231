"""From a plan to source text: what the texts for the CPU and for CUDA have in common.

Names: s step of the run, t the time that it is for a row, r row of those that are at work, j unit,
m rows that have not ended. %k is line k of the step tape, v7 its value, z7 where its rows are in
scratch, w7 its width. Everything that a kernel must be told, addresses and sizes, is a *word*,
decided here by name; a layout fills them in. Words ending in _t and _b are bytes from step to step
and from row to row, those in _bytes are sizes, those in _row how far rows are apart, in bytes or,
for scratch and matrices, in elements; state0_mask wraps the number of a step into the ring of that
state.

``Writer`` knows rows in memory and expressions; ``cpu_text.py`` and ``cuda_text.py`` know who does
what and when. Imports program.
"""

from __future__ import annotations

import ast

from tinygrad_seq.program import (
    REDUCTIONS,
    Offset,
    Plan,
    Program,
    Rules,
    Scratch,
    Target,
    begins,
    row_text,
)

INFIX = {"add": "{} + {}", "subtract": "{} - {}", "multiply": "{} * {}", "divide": "{} / {}"}
INFIX |= {"negative": "-{}", "copy": "{}", "broadcast": "{}"}
COMPARISONS = {
    ast.Lt: "less",
    ast.LtE: "less_equal",
    ast.Gt: "greater",
    ast.GtE: "greater_equal",
    ast.Eq: "equal",
    ast.NotEq: "not_equal",
}
# Operations that are functions of vectors; others are infix, or written as the text of their rule.
MATHEMATICS = (
    "abs cos equal erf exp expm1 floor greater greater_equal less less_equal log log1p maximum "
    "minimum not_equal power sigmoid sign sin sqrt tanh where"
).split()


class Writer:
    """Writes one kernel."""

    def __init__(self, plan: Plan, program: Program, rules: Rules) -> None:
        self.plan, self.program, self.rules = plan, program, rules
        self.words: list[str] = []
        self.constants: dict[float, str] = {}
        self.numbers: dict[int, str] = {}
        self.item = 4 if plan.dtype == "float32" else 8
        self.lines: list[str] = []
        self.forward = program.direction == "forward"

    # Words and lines

    def word(self, name: str) -> str:
        if name not in self.words:
            self.words.append(name)
        return name

    def width(self, slot: int) -> str:
        return self.word(f"w{self.plan.classes[slot]}")

    def add(self, depth: int, line: str) -> None:
        self.lines.append("    " * depth + line)

    def taken(self) -> list[str]:
        """The lines so far, which are begun anew."""
        lines, self.lines = self.lines, []
        return lines

    def _on(self, address: str, offset: Offset) -> str:
        """An address further on in a row."""
        return address + self.offset(offset)

    def offset(self, offset: Offset) -> str:
        """An offset into a row, in bytes: a sum of sizes."""
        terms = [
            self.width(slot) if kind == "width" else self.word(f"start{slot}")
            for kind, slot in offset
        ]
        if not terms:
            return ""
        joined = terms[0] if len(terms) == 1 else f"({' + '.join(terms)})"
        return f" + {joined} * {self.item}"

    # Rows in memory

    def _user_row(self, name: str) -> str:
        """The address of row r of an array (T, B, ...) of the caller."""
        step, batch = self.word(f"{name}_t"), self.word(f"{name}_b")
        return (
            f"{self.word(name)} + (word(begin, first + r) + s * onward) * {step}"
            f" + word(batch, first + r) * {batch}"
        )

    def _row(self, kind: str, which: int) -> str:
        """The address of row r at step s in a kind of memory."""
        if kind in ("dy", "y", "dx", "total"):
            return self._user_row(f"{kind}{which}")
        if kind in ("state", "after"):
            slot = f"(s - k0) * {self.word('slots')}" + (" + 1" if kind == "after" else "")
            return self._state_row(which, f"({slot})")
        assert kind == "capture", kind
        array, rows = self.word(f"capture{which}"), self.word(f"capture{which}_b")
        return f"{array} + word(batch, first + r) * {rows}"

    def _state_row(self, k: int, slot: str) -> str:
        """The address of row r of a state, of which ``slot`` have been before."""
        raise NotImplementedError

    def _batch_row(self, name: str, slot: int) -> str:
        """The address of the row of an array (B, n) of the caller, at any step."""
        width = self.width(slot)
        return f"{self.word(name)} + word(batch, first + r) * {width} * {self.item}"

    def _buffer(self, slot: int) -> Scratch:
        return next(buffer for buffer in self.program.scratch if buffer.slot == slot)

    def _read(self, slot: int) -> str:
        """The address of row r of a value in memory; a slice begins inside its base."""
        row = self.plan.rows[slot]
        if slot in self.program.places:
            place = self.program.places[slot]
            return self._row(place.kind, place.which)
        assert row.op in ("slice", "detach"), row
        address = self._read(self.program.inputs[slot][0])
        if row.op == "detach":
            return address
        return self._on(address, begins(self.plan, slot))

    def _comment(self, depth: int, slot: int) -> None:
        self.add(depth, f"# {row_text(self.plan, slot, self.program.inputs.get(slot))}")

    def _targets(self, slot: int) -> list[Target]:
        """Where a value goes; scratch too, if it is read from there."""
        targets = list(self.program.targets.get(slot, []))
        place = self.program.places.get(slot)
        if place is not None and place.kind == "scratch":
            targets.append(Target("scratch", place.which))
        return targets

    def _repeated(self, slot: int) -> tuple[bool, ...]:
        row = self.plan.rows[slot]
        return (False,) if row.op in REDUCTIONS else row.detail

    # Expressions

    def constant(self, value: float) -> str:
        if value not in self.constants:
            text = f"{value:g}" if value == value and abs(value) < 1e6 else repr(value)
            name = "c" + text.replace("-", "m").replace(".", "_").replace("+", "")
            self.constants[value] = (
                name
                if name.isidentifier() and name not in self.constants.values()
                else f"c_{len(self.constants)}"
            )
        return self.constants[value]

    def value(self, slot: int) -> str:
        row = self.plan.rows[slot]
        if row.op != "number":
            return f"v{slot}"
        if row.detail >= self.plan.numbers:
            return self.constant(self.plan.constants[row.detail - self.plan.numbers])
        return self.numbers.setdefault(row.detail, f"number{row.detail}")

    def _expression(self, slot: int) -> str:
        op = self.plan.rows[slot].op
        values = [self.value(k) for k in self.program.inputs[slot]]
        if op == "uniform":
            k = sum(row.op == op for row in self.plan.rows[:slot])
            return f"uniform({self.word(f'seed{k}')}, {k}, t, row, j)"
        if op in INFIX:
            return INFIX[op].format(*values)
        if op in MATHEMATICS:
            return f"{op}({', '.join(values)})"
        names, text = self.rules[op]
        tree = ast.parse(text, mode="eval")
        return ast.unparse(_Substitute(self, dict(zip(names, values, strict=True))).visit(tree))


class _Substitute(ast.NodeTransformer):
    """The text of a rule, its names replaced by values and its numbers by vectors."""

    def __init__(self, writer: Writer, values: dict[str, str]) -> None:
        self.writer, self.values = writer, values

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Name(self.values.get(node.id, node.id), ast.Load())

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        assert isinstance(node.value, (int, float))
        return ast.Name(self.writer.constant(float(node.value)), ast.Load())

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        name = ast.Name(COMPARISONS[type(node.ops[0])], ast.Load())
        return self.generic_visit(ast.Call(name, [node.left, node.comparators[0]], []))

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        if isinstance(node.op, ast.Pow):
            name = ast.Name("power", ast.Load())
            return self.generic_visit(ast.Call(name, [node.left, node.right], []))
        return self.generic_visit(node)
