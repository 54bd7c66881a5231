"""The errors this package raises about shapes, traces and tapes.

Each message names the operation and the argument, what was given, what was expected and what to
do. Any other bad value raises a plain ``ValueError``. Imports nothing.
"""

__all__ = ["ShapeError", "TapeError", "TraceError"]


class ShapeError(ValueError):
    """Shapes, ranks or structures that do not fit together."""


class TraceError(RuntimeError):
    """A cell does something that a recurrence cannot follow."""


class TapeError(RuntimeError):
    """A gradient was asked for that the tape cannot give."""
