"""The error function for NumPy arrays, which NumPy itself lacks. Imports devices.

Rational approximations of W. J. Cody, "Rational Chebyshev approximations for the error function",
Mathematics of Computation 23 (1969); in float64 within 4 ulp of the C library's ``erf``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygrad_seq import devices

_SMALL = (
    (
        1.85777706184603153e-1,
        3.16112374387056560e0,
        1.13864154151050156e2,
        3.77485237685302021e2,
        3.20937758913846947e3,
    ),
    (
        1.0,
        2.36012909523441209e1,
        2.44024637934444173e2,
        1.28261652607737228e3,
        2.84423683343917062e3,
    ),
)
_MIDDLE = (
    (
        2.15311535474403846e-8,
        5.64188496988670089e-1,
        8.88314979438837594e0,
        6.61191906371416295e1,
        2.98635138197400131e2,
        8.81952221241769090e2,
        1.71204761263407058e3,
        2.05107837782607147e3,
        1.23033935479799725e3,
    ),
    (
        1.0,
        1.57449261107098347e1,
        1.17693950891312499e2,
        5.37181101862009858e2,
        1.62138957456669019e3,
        3.29079923573345963e3,
        4.36261909014324716e3,
        3.43936767414372164e3,
        1.23033935480374942e3,
    ),
)


def _ratio(coefficients: tuple[tuple[float, ...], tuple[float, ...]], x: Any) -> Any:
    above, below = coefficients
    return np.polyval(np.asarray(above, x.dtype), x) / np.polyval(np.asarray(below, x.dtype), x)


def erf(x: Any) -> Any:
    """erf(x) = 2/√π ∫₀ˣ exp(−t²) dt, elementwise, in the dtype of ``x``."""
    if devices.device_of(x) != devices.CPU:
        return devices.erf(x)
    if x.dtype == np.float16:  # the polynomials leave its range
        return erf(x.astype(np.float32)).astype(np.float16)
    size = np.abs(x)
    small = np.minimum(size, 0.46875)
    middle = np.minimum(np.maximum(size, 0.46875), 6.0)  # erf(6) rounds to 1
    near = small * _ratio(_SMALL, small * small)
    far = 1 - np.exp(-middle * middle) * _ratio(_MIDDLE, middle)
    return np.copysign(np.where(size <= 0.46875, near, far), x)
