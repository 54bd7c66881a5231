"""A column of numbers from a CSV file. Imports nothing of this package."""

from __future__ import annotations

import csv
from os import PathLike
from typing import Any

import numpy as np


def read_column(
    path: str | PathLike[str], column: str | None = None, *, with_labels: bool = False
) -> Any:
    """The numbers of one column of a CSV file with a header line, float64 (N,).

    ``column`` is its name; it may be left out if only one column holds numbers in the first row.
    ``with_labels`` returns ``(numbers, texts)``, the texts those of the first column (dates,
    usually), or line numbers if that is the column read. Raises ValueError for a missing column, a
    hole, text or a value that is not finite, naming the line.
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
    if column not in header:
        raise ValueError(f"{path}: no column {column!r}, expected one of {header}")
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
    if not with_labels:
        return np.array(values)
    return np.array(values), [str(number) if at == 0 else row[0] for number, row in lines]


def _is_number(cell: str) -> bool:
    try:
        return bool(np.isfinite(float(cell)))
    except ValueError:
        return False
