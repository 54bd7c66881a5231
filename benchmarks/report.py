"""Run the programs about the engine and write what they print to benchmarks/results/engine.md.

What other benchmarks share is here too: the head of a report, and tables of pairs of programs.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import geometric_mean, median

from tinygrad_seq.__main__ import info
from tinygrad_seq.comparing import alternate, milliseconds, ratio, serve

Run = Callable[[], object]

HERE = Path(__file__).parent
PROGRAMS = ("eager.py", "agreement.py", "long_sequence.py", "import_time.py")


def cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")


def heading(title: str) -> list[str]:
    """Lines for the head of a report: when it was measured and on what."""
    lines = [f"# {title}, measured on {datetime.now(UTC):%Y-%m-%d}", ""]
    return lines + [f"- {name}: {text}" for name, text in {"cpu": cpu(), **info()}.items()]


def summary(peer: str, ratios: Sequence[float]) -> str:
    """What all ratios of a peer's times to ours come to."""
    return f"{peer} / ours: worst {min(ratios):.2f}, geometric mean {geometric_mean(ratios):.2f}"


def answer(programs: Mapping[str, Callable[[], Run]], name: str) -> None:
    """Be the worker of ``pairs`` for one program; nothing if what it needs is not installed."""
    try:
        run = programs[name]()
    except ModuleNotFoundError:
        return
    for _ in range(3):
        run()
    serve(lambda _: milliseconds(run, 0.4))


def pairs(file: str, which: Sequence[tuple[str, str, float, bool]], turns: int = 9) -> list[str]:
    """A table of programs in pairs, which alternate, each in a process of its own.

    A pair is one program, another, the bar for the ratio of their times and whether it is a least.
    ``file`` is run with ``--worker NAME``.
    """
    lines = ["| program | ms | beside | ms | ratio | bar |", "| --- " * 6 + "|"]
    for one, other, bar, least in which:
        names = (one, other)
        commands = {n: [sys.executable, "-W", "ignore", file, "--worker", n] for n in names}
        times = alternate(commands, ["go"], turns=turns)["go"]
        if len(times) == 2:
            found = ratio(times[one], times[other])
            lines.append(
                f"| {one} | {median(times[one]):.2f} | {other} | {median(times[other]):.2f} | "
                f"{found:.2f} | {'≥' if least else '≤'} {bar} |"
            )
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    parts = heading("The engine")
    for program in PROGRAMS:
        print(f"{program} ...", flush=True)
        command = [sys.executable, "-W", "ignore", str(HERE / program)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        output = done.stdout if not done.returncode else done.stdout + done.stderr
        parts += ["", f"## `python benchmarks/{program}`", "", "```text", output.rstrip(), "```"]
    path = HERE / "results" / "engine.md"
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
