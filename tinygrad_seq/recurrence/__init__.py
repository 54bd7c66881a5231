"""Recurrence: driving a cell over a sequence.

``arguments.py`` checks what a driver is given and is shared by all drivers; ``stepwise.py`` is
``unroll``, the reference that runs the cell step by step on the tape.
"""

from tinygrad_seq.recurrence.compiled import scan
from tinygrad_seq.recurrence.stepwise import unroll

__all__ = ["scan", "unroll"]
