"""What NumPy's own functions do with tensors: they see arrays, unless that would lose a gradient.

Imports tensors, tape and errors.
"""

from __future__ import annotations

from typing import Any

from tinygrad_seq.errors import TapeError
from tinygrad_seq.tape import recording
from tinygrad_seq.tensors import Tensor

# NumPy's functions that have a counterpart here, most of them by the same name.
_SAME = (
    *("broadcast_to", "clip", "concat", "cumsum", "expand_dims", "flip", "max", "mean", "min"),
    *("pad", "permute_dims", "reshape", "split", "squeeze", "stack", "sum", "take", "var"),
    *("take_along_axis", "where"),
)
_OTHER = {
    "amax": "max",
    "amin": "min",
    "concatenate": "concat",
    "dot": "matmul",
    "hstack": "concat",
    "transpose": "permute_dims",
    "vstack": "concat",
}
COUNTERPARTS = {**{name: name for name in _SAME}, **_OTHER}


def array_function(self: Tensor, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """Call a NumPy function with arrays in the place of tensors.

    Raises TapeError where a tensor requires a gradient and this package has the function too:
    NumPy's would take the result off the tape unnoticed.
    """
    name = function.__name__
    if recording.enabled and name in COUNTERPARTS and _requires_grad((args, kwargs)):
        raise TapeError(
            f"np.{name}: a tensor that requires a gradient was given, and the result would be off "
            f"the tape; use tgs.{COUNTERPARTS[name]}, or t.numpy() if that is meant"
        )
    return function(*_arrays_in(args), **_arrays_in(kwargs))


def _requires_grad(values: Any) -> bool:
    if isinstance(values, (tuple, list, dict)):
        inner = values.values() if isinstance(values, dict) else values
        return any(_requires_grad(value) for value in inner)
    return isinstance(values, Tensor) and values.requires_grad


def _arrays_in(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _arrays_in(value) for key, value in values.items()}
    if isinstance(values, (tuple, list)):
        return type(values)(_arrays_in(value) for value in values)
    return values.data if isinstance(values, Tensor) else values


setattr(Tensor, "__array_function__", array_function)  # noqa: B010
