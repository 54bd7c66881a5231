"""Recurrence: driving a cell over a sequence.

``arguments.py`` checks what a driver is given; ``stepwise.py`` is ``unroll``, the reference that
runs the cell step by step on the tape. ``compiled.py`` is ``scan``: ``trace.py`` writes down what
the cell does in a step, ``derive.py`` continues that with its derivative, ``plan.py`` lays it out,
and the kernels do the rest; ``stepping.py`` runs them a step at a time. ``replay.py`` is for
derivatives of derivatives, ``flow.py`` for the size of gradients at each step, ``showing.py`` for
readers.
"""

from tinygrad_seq.recurrence.compiled import scan
from tinygrad_seq.recurrence.flow import gradient_flow
from tinygrad_seq.recurrence.showing import explain, kernel_source
from tinygrad_seq.recurrence.stepping import Stepper
from tinygrad_seq.recurrence.stepwise import unroll

__all__ = ["Stepper", "explain", "gradient_flow", "kernel_source", "scan", "unroll"]
