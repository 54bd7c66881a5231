"""Pictures, drawn with matplotlib: ``pip install "tinygrad-seq[examples]"``.

``cells.py`` draws any cell: ``reading.py`` makes boxes and lines of its trace, ``naming.py`` knows
what they are called, ``layout.py`` where they go. ``pictures.py`` has the other pictures and
``canvas.py`` what all are drawn on. Each function returns the figure, and writes it to ``path`` if
that is given. Imports its own room.
"""

from tinygrad_seq.drawing.cells import draw_cell
from tinygrad_seq.drawing.pictures import (
    draw_activations,
    draw_correspondences,
    draw_gates,
    draw_gradients,
    draw_unrolled,
    draw_windows,
)

__all__ = [
    "draw_activations",
    "draw_cell",
    "draw_correspondences",
    "draw_gates",
    "draw_gradients",
    "draw_unrolled",
    "draw_windows",
]
