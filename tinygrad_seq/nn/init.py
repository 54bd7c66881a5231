"""Values for parameters to start from. Imports creation's generator alone."""

from __future__ import annotations

import numpy as np

from tinygrad_seq.creation import Rng, generator
from tinygrad_seq.errors import ShapeError, whole


def _shape(name: str, rows: int, columns: int) -> tuple[int, int]:
    return whole(rows, f"{name}: rows", least=0), whole(columns, f"{name}: columns", least=0)


def glorot(rows: int, columns: int, rng: Rng = None) -> np.ndarray:
    """Uniform in ±√(6 / (rows + columns)), float64 (Glorot and Bengio 2010)."""
    rows, columns = _shape("glorot", rows, columns)
    bound = np.sqrt(6.0 / max(rows + columns, 1))
    return generator(rng).uniform(-bound, bound, (rows, columns))


def orthogonal(rows: int, columns: int, rng: Rng = None) -> np.ndarray:
    """A random matrix with orthonormal rows or columns, float64 (Saxe et al. 2014)."""
    rows, columns = _shape("orthogonal", rows, columns)
    if not rows or not columns:
        return np.zeros((rows, columns))
    square = generator(rng).standard_normal((max(rows, columns), min(rows, columns)))
    q, r = np.linalg.qr(square)
    q *= np.where(np.diag(r) < 0, -1.0, 1.0)  # makes the distribution uniform
    return q if rows >= columns else q.T


def identity(rows: int, columns: int, scale: float = 1.0) -> np.ndarray:
    """The identity matrix times ``scale``, float64: for the recurrent weights of a ReLU network.

    With W_hh = 1 and b = 0 the state is kept as it is (Le, Jaitly, Hinton 2015).
    """
    rows, columns = _shape("identity", rows, columns)
    if rows != columns:
        raise ShapeError(f"identity: shape ({rows}, {columns}) was given, expected a square one")
    return scale * np.eye(rows)


def stacked(kind: str, gates: int, rows: int, columns: int, rng: Rng = None) -> np.ndarray:
    """One matrix for each gate, by name of initialiser, on top of each other."""
    made = generator(rng)
    if kind == "identity":
        return np.tile(identity(rows, columns), (gates, 1))
    if kind not in ("glorot", "orthogonal"):
        raise ValueError(
            f"initialiser: {kind!r} was given, expected 'glorot', 'orthogonal' or 'identity'"
        )
    fill = glorot if kind == "glorot" else orthogonal
    return np.concatenate([fill(rows, columns, made) for _ in range(gates)])
