"""A column of numbers from a CSV file. Imports nothing of this package."""

from __future__ import annotations

import csv
from os import PathLike

import numpy as np


def read_column(
    path: str | PathLike[str], column: str | None = None, labels: str | None = None
) -> np.ndarray | tuple[np.ndarray, list[str]]:
    """The numbers of one column of a CSV file with a header line, float64 (N,).

    ``column`` is its name; it may be left out if only one column holds numbers in the first row.
    With ``labels``, the name of another column, returns ``(numbers, texts)``. Raises ValueError
    for a missing column, a hole, text or a value that is not finite, naming the line.
    """
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file)
        header = [name.strip() for name in next(rows, [])]
        lines = [(rows.line_num, row) for row in rows if row]
    if not lines:
        raise ValueError(f"{path}: no rows below the header {header}")
    if column is None:
        found = [name for name, cell in zip(header, lines[0][1], strict=False) if _is_number(cell)]
        if len(found) != 1:
            raise ValueError(
                f"{path}: columns {header}, of which {found or 'none'} hold numbers; name one"
            )
        column = found[0]
    for name in (column, labels):
        if name is not None and name not in header:
            raise ValueError(f"{path}: no column {name!r}, expected one of {header}")
    at = header.index(column)
    values = []
    for number, row in lines:
        cell = row[at].strip() if at < len(row) else ""
        if not _is_number(cell):
            what = f"{cell!r}" if cell else "nothing"
            raise ValueError(
                f"{path}, line {number}: column {column!r} holds {what}, expected a finite "
                "number; fill the hole or leave the line out"
            )
        values.append(float(cell))
    series = np.array(values)
    if labels is None:
        return series
    where = header.index(labels)
    return series, [row[where] if where < len(row) else "" for _, row in lines]


def _is_number(cell: str) -> bool:
    try:
        return bool(np.isfinite(float(cell)))
    except ValueError:
        return False
