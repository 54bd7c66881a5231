"""``python -m tinygrad_seq info``: versions, threads, vector width, CUDA or why not."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version


def info() -> dict[str, str]:
    """What a report of a problem should say about the machine."""
    try:
        from tinygrad_seq.kernels import machine
    except ModuleNotFoundError:
        raise SystemExit(
            "tinygrad_seq.kernels is missing: this is a checkout that is not installed; run "
            "pip install -e . in it"
        ) from None

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    packages = ["tinygrad-seq", "numpy", "numba", "llvmlite"]
    bits, feature = machine.vector_width()
    return {
        **{package: installed(package) for package in packages},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": f"{machine.cores()}, the cores that this process may use",
        "vectors": f"{bits} bits ({feature})",
        "cuda": machine.cuda(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tinygrad_seq")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, threads, vector width, CUDA or why not")
    parser.parse_args(arguments)
    rows = info()
    width = max(map(len, rows))
    for name, text in rows.items():
        print(f"{name.ljust(width)}  {text}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
