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
    header, lines = _read(path)
    if not header:
        raise ValueError(f"{path}: no header line; the file is empty")
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
    if header.count(column) > 1:
        raise ValueError(f"{path}: the header names {column!r} twice; rename one")
    at = header.index(column)
    values = []
    for number, row in lines:
        if len(row) > len(header):
            raise ValueError(
                f"{path}, line {number}: {len(row)} cells, expected {len(header)} as in the "
                "header; quote a cell that holds a comma, and write decimals with a point"
            )
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


def _read(path: str | PathLike[str]) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The names in the header, and every other line that is not empty with its number."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file)
            lines = [(rows.line_num, row) for row in rows if row]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8") from None
    except csv.Error as error:
        raise ValueError(f"{path}: not a CSV file ({error})") from None
    header = [name.strip() for name in lines[0][1]] if lines else []
    return header, lines[1:]


def _is_number(cell: str) -> bool:
    try:
        return bool(np.isfinite(float(cell)))
    except ValueError:
        return False
