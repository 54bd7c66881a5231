"""The paper that pictures are drawn on: boxes, lines and texts, in inches.

Matplotlib is imported when something is drawn. A figure is the caller's own and not pyplot's: it
is saved with ``path=``, shown by a notebook, or drawn in the axes that are given. Imports nothing
of this package.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[float, float]

INK, GREY, PALE = "#333333", "#888888", "#e9e9e9"
BLUE, ORANGE, GREEN, RED, PURPLE = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#a05195"
LIGHT = {BLUE: "#cfe4f3", ORANGE: "#fbe3b5", GREEN: "#c6e9dc", RED: "#f7d3bd", PURPLE: "#e6d2e3"}
DPI = 150


class Canvas:
    """Axes whose unit is an inch, if they have room now; text shrinks with it if they have less."""

    def __init__(self, ax: Axes | None, width: float, height: float) -> None:
        figure = matplotlib_figure()
        if ax is None:
            made = figure(figsize=(width, height), dpi=DPI)
            ax = made.add_axes((0, 0, 1, 1))
        self.ax: Any = ax
        room = ax.get_window_extent()
        self.scale = min(
            1.0,
            room.width / ax.figure.dpi / width,
            room.height / ax.figure.dpi / height,
        )
        ax.set(xlim=(0, width), ylim=(0, height), aspect="equal")
        ax.axis("off")

    def text(self, x: float, y: float, text: str, size: float = 10, **style: Any) -> None:
        style = {"ha": "center", "va": "center", "color": INK, **style}
        self.ax.text(x, y, text, size=size * self.scale, zorder=4, **style)

    def box(
        self,
        x: float,
        y: float,
        text: str = "",
        width: float = 0.36,
        height: float = 0.36,
        *,
        fill: str = "white",
        edge: str = INK,
        round_by: float = 0.05,
        size: float = 10,
        **style: Any,
    ) -> None:
        """A box with its middle at x, y."""
        from matplotlib.patches import FancyBboxPatch

        self.ax.add_patch(
            FancyBboxPatch(
                (x - width / 2, y - height / 2),
                width,
                height,
                boxstyle=f"round,pad=0,rounding_size={round_by}",
                facecolor=fill,
                edgecolor=edge,
                linewidth=1.0 * self.scale,
                zorder=3,
            )
        )
        self.text(x, y, text, size, **style)

    def line(self, points: list[Point], **style: Any) -> None:
        """An arrow, level from point 2j to 2j + 1, and a curve from there to 2j + 2."""
        from matplotlib.path import Path as Way

        vertices, codes = [points[0]], [Way.MOVETO]
        for k, (b, a) in enumerate(zip(points[1:], points, strict=False)):
            if k % 2 == 0:
                vertices.append(b)
                codes.append(Way.LINETO)
            else:
                middle = (a[0] + b[0]) / 2
                vertices += [(middle, a[1]), (middle, b[1]), b]
                codes += [Way.CURVE4] * 3
        self._arrow(path=Way(vertices, codes), **style)

    def arrow(self, start: Point, end: Point, **style: Any) -> None:
        """From one point to another; ``arrowstyle="-"`` has no head."""
        self._arrow(posA=start, posB=end, **style)

    def _arrow(self, **style: Any) -> None:
        from matplotlib.patches import FancyArrowPatch

        style = {"color": INK, "linewidth": 1.0, "arrowstyle": "-|>", **style}
        style["linewidth"] *= self.scale
        drawn = FancyArrowPatch(
            mutation_scale=9 * self.scale, shrinkA=0, shrinkB=0, zorder=2, **style
        )
        self.ax.add_patch(drawn)

    def legend(self, entries: Mapping[str, str], x: float, y: float) -> None:
        """Names with their colours, in a row that begins at x, y."""
        for name, colour in entries.items():
            self.box(x + 0.09, y, width=0.18, height=0.18, fill=colour, round_by=0.03)
            self.text(x + 0.26, y, name, 9, ha="left")
            x += 0.26 + text_width(name, 9) + 0.3


def matplotlib_figure() -> Any:
    """Matplotlib's Figure, or an ImportError that says how to come by it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            'drawing needs matplotlib: pip install "tinygrad-seq[examples]"'
        ) from None
    return Figure


@cache
def text_width(text: str, size: float) -> float:
    """In inches."""
    from matplotlib.textpath import TextPath

    return float(TextPath((0, 0), text, size=size).get_extents().width) / 72 if text else 0.0


def finish(ax: Any, path: str | Path | None) -> Figure:
    """The figure of these axes, written to ``path`` if there is one."""
    figure: Figure = ax.figure
    if path is not None:
        figure.savefig(path, dpi=DPI, facecolor="white")
    return figure
