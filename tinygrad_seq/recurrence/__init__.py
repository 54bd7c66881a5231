"""Recurrence: driving a cell over a sequence.

``arguments.py`` checks what a driver is given; ``stepwise.py`` is ``unroll``, the reference that
runs the cell step by step on the tape. ``compiled.py`` is ``scan``: ``tracing.py`` writes down what
the cell does in a step, as rows (``trace.py``; those of products, cuts and joins come from
``lowering.py``), ``derive.py`` continues that with its derivative, as more rows, ``plan.py`` says
when and where each is computed, after ``rewriting.py`` has brought them into better forms, and the
kernels do the rest. What a plan consists of is in ``tinygrad_seq/program.py``. ``docs/scan.md``
goes that way with a small cell.

``ready.py`` brings arrays into the form that kernels read, ``recorded.py`` is a scan on the tape.

``following.py`` makes tracing faster, ``settled.py`` with ``reach.py`` says when there need be
none, and ``repeating.py`` when a call need not be checked. They may be skipped: without them
everything is the same.

``choices.py`` says what values of several axes are as rows, ``draws.py`` is random numbers in a
cell, ``stepping.py`` runs the kernels a step at a time, ``replay.py`` is for derivatives of
derivatives, ``flow.py`` for the size of gradients at each step, ``naming.py`` and ``showing.py``
are for readers.
"""

from tinygrad_seq.recurrence.compiled import scan
from tinygrad_seq.recurrence.flow import gradient_flow
from tinygrad_seq.recurrence.showing import explain, kernel_source
from tinygrad_seq.recurrence.stepping import Stepper
from tinygrad_seq.recurrence.stepwise import unroll

__all__ = ["Stepper", "explain", "gradient_flow", "kernel_source", "scan", "unroll"]
