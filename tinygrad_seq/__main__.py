"""``python -m tinygrad_seq``: info, warmup, cache, bench."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from time import perf_counter
from typing import Any


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def info() -> dict[str, str]:
    """What a report of a problem should say about the machine."""
    from tinygrad_seq import devices
    from tinygrad_seq.kernels import machine

    packages = ["tinygrad-seq", "numpy", "numba", "llvmlite", "cupy-cuda13x", "numba-cuda"]
    bits, feature = machine.vector_width()
    return {
        **{package: _installed(package) for package in packages},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": f"{machine.cores()}, the cores that this process may use",
        "vectors": f"{bits} bits ({feature})",
        "tiles": machine.about_tiles(),
        "cuda": (devices.missing() or machine.cuda()).removeprefix("cuda: "),
    }


def _built_in(dtype: str) -> Iterator[tuple[str, Any]]:
    """The built-in cells, in the forms that compile to different code."""
    from tinygrad_seq import nn

    yield "RNNCell", nn.RNNCell(3, 4, dtype=dtype)
    yield "RNNCell, relu", nn.RNNCell(3, 4, nonlinearity="relu", dtype=dtype)
    yield "LSTMCell", nn.LSTMCell(3, 4, dtype=dtype)
    yield "GRUCell", nn.GRUCell(3, 4, dtype=dtype)
    yield "GRUCell, reset_after", nn.GRUCell(3, 4, reset_after=True, dtype=dtype)


def warm_up(dtype: str = "float32") -> Iterator[tuple[str, float]]:
    """Compile the built-in cells: for use, for training, and for training upon another layer.

    Yields the name of each and the seconds that it took; what is in the cache takes almost none.
    """
    import tinygrad_seq as tgs

    for name, cell in _built_in(dtype):
        start = perf_counter()
        x = tgs.ones(2, 2, 3).to(dtype)
        with tgs.no_grad():
            tgs.scan(cell, x)
        for inputs in (x, tgs.tensor(x, requires_grad=True)):
            ys, _ = tgs.scan(cell, inputs)
            ys.sum().backward()
        yield name, perf_counter() - start


def _warmup(dtype: str) -> None:
    for name, seconds in warm_up(dtype):
        print(f"{name:22} {seconds:6.1f} s", flush=True)


def _cache(what: str) -> None:
    from tinygrad_seq.kernels import build

    if what == "clear":
        print(f"{build.clear()} entries deleted from {build.folder()}")
        if left := len(build.entries()):
            raise SystemExit(f"{left} entries could not be deleted; may you write to that folder?")
        return
    found = sorted(build.entries(), key=lambda entry: entry[2])
    for path, size, used in found:
        when = datetime.fromtimestamp(used).strftime("%Y-%m-%d %H:%M")
        print(f"{path.name:48} {size / 2**20:7.2f} MiB   last used {when}")
    total = sum(size for _, size, _ in found)
    most = build.LARGEST / 2**20
    print(f"{len(found)} entries, {total / 2**20:.1f} of {most:.0f} MiB, in {build.folder()}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tinygrad_seq")
    parser.add_argument("--version", action="version", version=_installed("tinygrad-seq"))
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, threads, vector width, CUDA or why not")
    warmup = commands.add_parser("warmup", help="compile the built-in cells")
    warmup.add_argument(
        "--dtype", choices=("float32", "float64"), default="float32", help="of the cells"
    )
    cache = commands.add_parser("cache", help="show what compiled code is kept, or delete it")
    cache.add_argument(
        "what",
        nargs="?",
        choices=("show", "clear"),
        default="show",
        help="show what is kept, or delete it",
    )
    bench = commands.add_parser("bench", help="an LSTM here and in PyTorch, if that is installed")
    bench.add_argument("--worker", choices=("here", "torch"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if find_spec("tinygrad_seq.kernels") is None:
        raise SystemExit(
            "tinygrad_seq.kernels is missing: this is a checkout that is not installed; run "
            "pip install -e . in it"
        )
    if given.command == "warmup":
        _warmup(given.dtype)
    elif given.command == "cache":
        _cache(given.what)
    elif given.command == "bench":
        from tinygrad_seq import comparing

        if given.worker:
            comparing.answer_short(given.worker)
        else:
            print("\n".join(comparing.short()))
    else:
        rows = info()
        width = max(map(len, rows))
        for name, text in rows.items():
            print(f"{name.ljust(width)}  {text}")
    return 0


if __name__ == "__main__":
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # who read the output, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    raise SystemExit(code)
