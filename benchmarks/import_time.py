"""What ``import tinygrad_seq`` takes beyond ``import numpy``: ``python benchmarks/import_time.py``.

Both by turns, each in a fresh process; medians.
"""

from __future__ import annotations

import subprocess
import sys
from statistics import median
from time import perf_counter


def seconds(module: str) -> float:
    begin = perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return perf_counter() - begin


def measure(turns: int = 11) -> tuple[float, float]:
    """Seconds for NumPy, and for this package."""
    pairs = [(seconds("numpy"), seconds("tinygrad_seq")) for _ in range(turns)]
    return median(a for a, _ in pairs), median(b for _, b in pairs)


def main() -> None:
    numpy, ours = measure()
    print(f"import numpy {numpy:.3f} s, import tinygrad_seq {ours:.3f} s: {ours - numpy:+.3f} s")


if __name__ == "__main__":
    main()
