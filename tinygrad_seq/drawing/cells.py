"""``draw_cell``: any cell, drawn from its own trace. Imports its own room."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinygrad_seq.drawing.canvas import (
    BLUE,
    GREEN,
    GREY,
    INK,
    LIGHT,
    ORANGE,
    PALE,
    PURPLE,
    RED,
    Canvas,
    finish,
    matplotlib_figure,
    text_width,
)
from tinygrad_seq.drawing.layout import Box, Route, lay_out
from tinygrad_seq.drawing.reading import Node, Parts, assign_parts, lstm_parts, read
from tinygrad_seq.recurrence.arguments import Cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Sizes are in inches, those of text in points.
HEIGHT, PORT, ARROW, MARGIN = 0.34, 0.17, 0.09, 0.2
TEXT, NAME, END, LINE = 10.0, 9.0, 7.0, 6.5
KINDS = {
    "learned": ("with learned parameters", LIGHT[ORANGE]),
    "function": ("function", LIGHT[BLUE]),
    "arithmetic": ("arithmetic", LIGHT[GREEN]),
    "cut": ("cut or joined", "white"),
}
COLOURS = [LIGHT[each] for each in (RED, GREEN, BLUE, PURPLE, ORANGE)]


def draw_cell(
    cell: Cell,
    xs: Any,
    state: Any = None,
    *,
    parts: Parts | None = None,
    highlight: str | None = None,
    lines: bool = False,
    title: str | None = None,
    ax: Axes | None = None,
    path: str | Path | None = None,
) -> Figure:
    """One step of a cell as a graph, read from left to right: what ``tgs.scan`` sees of it.

    ``cell``, ``xs`` and ``state`` are those of ``tgs.scan``; nothing is computed. On the left
    stand the input and the state before, on the right y and the next state, marked with a prime. A
    box is an operation, with the weights, biases and numbers that it uses: ``W_ih ·`` is a product
    with the parameter ``weight_ih``, ``[H:2H]`` a cut through the values of the second of several
    stacked gates. Above it stands what the cell's own code calls the value.

    ``parts`` names steps of the cell, such as ``{"reset": ["r"], "candidate": ["n"]}``, each by
    values, which are named as in the picture or by their lines on the step tape; ``lines=True``
    shows those. What is computed from one part alone belongs to it. The four steps of an LSTM are
    found without that. ``highlight`` leaves only one part in its colour.

    Raises TraceError for a cell that cannot be traced, ValueError for parts that it does not have.
    """
    matplotlib_figure()
    step, nodes = read(cell, xs, state)
    parts = lstm_parts(cell, step, nodes) if parts is None else parts
    assign_parts(nodes, parts)
    if highlight is not None and highlight not in parts:
        raise ValueError(
            f"draw_cell: highlight={highlight!r} was given, expected one of the parts: "
            f"{', '.join(parts) or 'this cell has none, so name them with parts='}"
        )
    if title is None:
        title = getattr(cell, "__name__", type(cell).__name__) + ", one step"
        title += f": {highlight}" if highlight else ""

    boxes = [_box(node, lines) for node in nodes]
    layout = lay_out(boxes, [(a, b) for b, node in enumerate(nodes) for a in node.inputs])
    legend = _legend(nodes, parts, highlight)
    left, low = MARGIN, MARGIN + 0.4 * bool(legend)
    width, height = layout.size
    needed = max(text_width(title, 12), sum(text_width(n, 9) + 0.56 for n in legend))
    left += max(0.0, needed - width) / 2
    canvas = Canvas(ax, width + 2 * left, height + low + MARGIN + 0.4)
    canvas.text(left + width / 2, low + height + 0.25, title, 12)
    canvas.legend(legend, MARGIN, MARGIN + 0.05)

    routes = iter(layout.routes)
    for node, (x, y) in zip(nodes, layout.places, strict=True):
        _draw_node(canvas, node, left + x, low + y, _fill(node, parts, highlight), lines)
        for end, route in _arrivals(node, [next(routes) for _ in node.inputs]):
            points = [(left + a, low + b) for a, b in route]
            canvas.line(points)
            canvas.text(points[-1][0] - 0.07, points[-1][1] + 0.07, end, END, ha="right")
    return finish(canvas.ax, path)


def _size(node: Node) -> tuple[float, float]:
    """Width and height of the box itself."""
    ports = len(node.inputs) * PORT if len(node.inputs) > 2 or node.ends else 0.0
    return max(HEIGHT, text_width(node.text, TEXT) + 0.18), max(HEIGHT, ports + 0.06)


def _box(node: Node, lines: bool) -> Box:
    """What it takes up, with the texts around it."""
    width, height = _size(node)
    beside = max([ARROW, *(text_width(end, END) + 0.12 for end in node.ends)])
    beside = max(beside, (text_width(node.name, NAME) - width) / 2)
    above = height / 2 + (0.2 if node.name else 0.0)
    below = height / 2 + (0.16 if lines and node.line >= 0 else 0.0)
    side = {"input": "left", "output": "right"}.get(node.kind, "")
    return Box(width, beside, above, below, side)


def _arrivals(node: Node, routes: list[Route]) -> list[tuple[str, Route]]:
    """The lines into a node, each with its word: one above the other, as they come."""
    arrived = []
    order = sorted(range(len(routes)), key=lambda k: routes[k][-3][1])
    for place, k in enumerate(order):
        up = (place - (len(routes) - 1) / 2) * PORT
        route = [*routes[k][:-2], *((x, y + up) for x, y in routes[k][-2:])]
        arrived.append((node.ends[k] if node.ends else "", route))
    return arrived


def _draw_node(canvas: Canvas, node: Node, x: float, y: float, fill: str, lines: bool) -> None:
    width, height = _size(node)
    bare = node.kind in ("input", "output")
    canvas.box(
        x,
        y,
        node.text,
        width,
        height,
        fill=fill,
        round_by=height / 2 if node.kind in ("function", "arithmetic") else 0.05,
        size=TEXT if node.kind != "cut" else TEXT - 2,
        edge=fill if bare else GREY if node.kind == "cut" else INK,
        weight="bold" if bare else "normal",
    )
    canvas.text(x, y + height / 2 + 0.1, node.name, NAME, style="italic", color=BLUE)
    if lines and node.line >= 0:
        canvas.text(x, y - height / 2 - 0.09, f"%{node.line}", LINE, color=GREY)


def _fill(node: Node, parts: Parts, highlight: str | None) -> str:
    if node.kind in ("input", "output"):
        return PALE
    if not parts:
        return KINDS[node.kind][1]
    shown = node.part and highlight in (None, node.part)
    return COLOURS[list(parts).index(node.part) % len(COLOURS)] if shown else "white"


def _legend(nodes: list[Node], parts: Parts, highlight: str | None) -> dict[str, str]:
    """What the colours mean that are in the picture."""
    if not parts:
        kinds = {node.kind for node in nodes}
        return {text: colour for kind, (text, colour) in KINDS.items() if kind in kinds}
    colours = (COLOURS[k % len(COLOURS)] for k in range(len(parts)))
    return {p: c for p, c in zip(parts, colours, strict=True) if highlight in (None, p)}
