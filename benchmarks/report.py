"""Run the programs about the engine and write what they print to benchmarks/results/engine.md."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from tinygrad_seq.__main__ import info

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
