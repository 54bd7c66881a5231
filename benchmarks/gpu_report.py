"""The report of ``gpu.py``, in Markdown: what its parts found. Imports gpu_running."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import geometric_mean, median

from gpu_running import Outcome, Outcomes

BARS = {"torch": 20.0, "compile": 2.0, "compile_step": 2.0, "jax": 2.0}  # of a cell of one's own
LAYERS = ("lstm", "gru")
CLOCK_PART = "barrier"


def bar_of(cell: str, peer: str, H: int) -> float:
    """What the ratio of a peer's time to ours should be at least."""
    if cell in LAYERS:
        return 1.0 if H <= 512 else 0.7
    return BARS[peer]


def peer_named(cell: str, peer: str) -> str:
    if peer == "torch":
        return "cuDNN" if cell in LAYERS else "loop"
    names = {"compile": "torch.compile, 8 steps", "compile_step": "torch.compile, a step"}
    return {**names, "jax": "JAX"}.get(peer, peer)


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """The median of their time over ours, turn by turn."""
    return median(a / b for a, b in zip(theirs, ours, strict=True))


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return lines + ["| " + " | ".join(map(_shown, row)) + " |" for row in rows]


def _shown(value: object) -> str:
    if isinstance(value, float):
        return "inf" if math.isinf(value) else f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_shown(v)}" for k, v in value.items())
    return str(value).replace("|", "/").replace("\n", " ")


def state_of(outcome: Outcome) -> str:
    return {"done": "passed"}.get(outcome.state, outcome.state)


def failures(outcomes: Outcomes) -> list[str]:
    """What did not go through, and the end of what it said."""
    lines: list[str] = []
    missing: dict[str, list[str]] = {}
    for item, outcome in outcomes.items():
        if outcome.state == "missing":
            missing.setdefault(outcome.error, []).append(item)
        elif outcome.error:
            lines += ["", f"**{item}** {outcome.state}:", "", "```text", outcome.error, "```"]
    for why, items in missing.items():
        these = ", ".join(items) if len(items) < 6 else f"{len(items)} items"
        lines += ["", f"Missing for {these}: {why}"]
    late = [item for item, outcome in outcomes.items() if outcome.state == "not reached"]
    if late:
        lines += ["", f"Not reached: {', '.join(late)}"]
    return lines


def items_section(outcomes: Outcomes) -> list[str]:
    """Every item with what it found, one after another."""
    lines: list[str] = []
    for item, outcome in outcomes.items():
        if outcome.state in ("missing", "not reached"):
            continue
        lines.append(f"- **{item}**: {state_of(outcome)} ({outcome.seconds:.1f} s)")
        lines += [f"  - {key}: {_shown(value)}" for key, value in outcome.data.items()]
    return lines + failures(outcomes)


def tests_section(outcomes: Outcomes) -> list[str]:
    lines = []
    for item, outcome in outcomes.items():
        lines.append(f"- **{item}**: {state_of(outcome)} ({outcome.seconds:.1f} s)")
        for key in ("last line", "command", "log"):
            if key in outcome.data:
                lines.append(f"  - {key}: {outcome.data[key]}")
        if outcome.data.get("summary"):
            lines += ["", "```text", str(outcome.data["summary"]), "```"]
    return lines + failures(outcomes)


def correct_section(outcomes: Outcomes) -> list[str]:
    rows = []
    for item, outcome in outcomes.items():
        if outcome.state == "done":
            found = outcome.data
            verdict = "right" if found["error"] <= 1e-5 else "WRONG"
            rows.append([item, found["worst"], f"{found['error']:.1e}", verdict])
            rows[-1].append(found["first run s"])
    lines = ["The largest difference over the largest value, of the worst array; at most 1e-5.", ""]
    head = ["cell T B H", "worst array", "error", "", "first run, s"]
    return (lines + markdown(head, rows) if rows else []) + failures(outcomes)


# The table -----------------------------------------------------------------------------------


class Row:
    """A time of ours beside a peer's."""

    def __init__(self, item: str, mode: str, peer: str, outcome: Outcome) -> None:
        self.cell, _, B, H = item.split()[:4]
        self.B, self.H, self.mode, self.peer, self.outcome = int(B), int(H), mode, peer, outcome
        times = outcome.data[mode]
        self.ours, self.theirs = median(times["ours"]), median(times[peer])
        self.ratio = ratio(times[peer], times["ours"])
        self.bar = bar_of(self.cell, peer, self.H)


def rows_of(outcomes: Outcomes) -> list[Row]:
    """Items begin with ``CELL T B H``; their data ``train`` and ``infer``: times by program."""
    found = []
    for item, outcome in outcomes.items():
        for mode in ("train", "infer"):
            times = outcome.data.get(mode, {})
            if "ours" not in times:
                continue
            turns = len(times["ours"])
            for peer, each in times.items():
                if peer != "ours" and len(each) == turns:
                    found.append(Row(item, mode, peer, outcome))
    return found


def division_of(outcome: Outcome) -> str:
    """What each direction of our run was divided into."""
    known = outcome.data.get("known", {}).get("ours", {})
    shown = []
    for direction in ("forward", "backward"):
        if direction in known:
            c = known[direction]
            streamed = f", {c['streamed']} streamed" if c["streamed"] else ""
            streamed += ", by steps" if c["by steps"] else ""
            shown.append(f"{direction} {c['groups']}×{c['parts']}, {c['rows']} rows{streamed}")
    return "; ".join(shown)


def table_section(outcomes: Outcomes) -> list[str]:
    found = rows_of(outcomes)
    lines = ["Milliseconds, medians; the ratio is the peer's time over ours, turn by turn.", ""]
    head = [
        "cell",
        "B",
        "H",
        "",
        "ours ms",
        "peer",
        "peer ms",
        "peer / ours",
        "bar",
        "",
        "division",
    ]
    shown = []
    for row in found:
        meets = "met" if row.ratio >= row.bar else "**missed**"
        shown.append(
            [
                *(row.cell, row.B, row.H, row.mode, f"{row.ours:.3f}"),
                *(peer_named(row.cell, row.peer), f"{row.theirs:.3f}", f"{row.ratio:.2f}"),
                *(f"{row.bar:g}", meets, division_of(row.outcome)),
            ]
        )
    lines += markdown(head, shown) if shown else []
    lines += _means(found) + _alone(outcomes) + _first(outcomes) + _left_out(outcomes)
    return lines + failures(outcomes)


def _means(found: Sequence[Row]) -> list[str]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in found:
        group = "LSTM and GRU" if row.cell in LAYERS else "cells of one's own"
        bar = f"{row.bar:g}"
        groups.setdefault((group, peer_named(row.cell, row.peer), row.mode, bar), []).append(row)
    shown = []
    for (group, peer, mode, bar), rows in sorted(groups.items()):
        ratios = [row.ratio for row in rows]
        shown.append([group, peer, mode, bar, len(rows), f"{min(ratios):.2f}"])
        shown[-1].append(f"{geometric_mean(ratios):.2f}")
    head = ["", "beside", "", "bar", "rows", "worst", "geometric mean"]
    return ["", *markdown(head, shown)] if shown else []


def _alone(outcomes: Outcomes) -> list[str]:
    """Times of ours that no peer stands beside."""
    lines = []
    for item, outcome in outcomes.items():
        for mode in ("train", "infer"):
            times = outcome.data.get(mode, {})
            if set(times) == {"ours"}:
                lines.append(f"- {item}, {mode}: ours {median(times['ours']):.3f} ms, no peer")
    return ["", *lines] if lines else []


def _first(outcomes: Outcomes) -> list[str]:
    """How long the first runs took, in which everything is compiled."""
    rows = []
    for item, outcome in outcomes.items():
        for program, known in outcome.data.get("known", {}).items():
            both = [known.get(f"first {mode} s", "") for mode in ("train", "infer")]
            rows.append([item, program, *both])
    head = ["cell T B H", "program", "first training, s", "first inference, s"]
    return ["", "First runs, in which everything is compiled:", "", *markdown(head, rows)] * bool(
        rows
    )


def _left_out(outcomes: Outcomes) -> list[str]:
    found: dict[str, list[str]] = {}
    for item, outcome in outcomes.items():
        for program, why in outcome.data.get("left out", {}).items():
            found.setdefault(f"{program}: {why}", []).append(item)
    lines = [f"- left out, {why} ({'; '.join(items)})" for why, items in found.items()]
    return ["", *lines] if lines else []


# The sweep -----------------------------------------------------------------------------------


def sweep_section(outcomes: Outcomes, mhz: float | None = None) -> list[str]:
    """By shape and direction: each division, best first, and the one that was chosen."""
    shapes: dict[str, dict[str, Outcome]] = {}
    for item, outcome in outcomes.items():
        T, B, H, *division = item.split()
        if "ms" in outcome.data:
            shapes.setdefault(f"T {T}, B {B}, H {H}", {})[" ".join(division)] = outcome
    lines: list[str] = []
    for shape, found in shapes.items():
        for direction in ("forward", "backward"):
            lines += _sweep_table(shape, direction, found, mhz)
        lines += _breakdown(shape, found.get("chosen"))
    return lines + failures(outcomes)


def _sweep_table(
    shape: str, direction: str, found: dict[str, Outcome], mhz: float | None
) -> list[str]:
    rows = []
    for division, outcome in found.items():
        each = outcome.data.get(direction)
        if each:
            rows.append((each["µs a step"], division == "chosen", each))
    if not rows:
        return []
    rows.sort(key=lambda row: row[0])
    shown = []
    for us, chosen, each in rows:
        clocks = round(us * mhz) if mhz else ""
        division = f"{each['groups']}×{each['parts']}" + ", by steps" * each["by steps"]
        shown.append([division, each["rows"], each["streamed"], us, clocks])
        shown[-1] += [each["model clocks"], "chosen" if chosen else ""]
    lines = ["", f"{shape}, {direction}:", ""]
    head = ["groups×parts", "rows", "streamed", "µs a step", "clocks", "the model's clocks", ""]
    chosen_us = next((us for us, chosen, _ in rows if chosen), None)
    lines += markdown(head, shown)
    if chosen_us is not None:
        lines += ["", f"chosen / best: {chosen_us / rows[0][0]:.2f}"]
    return lines


def _breakdown(shape: str, outcome: Outcome | None) -> list[str]:
    if outcome is None:
        return []
    rows = sorted(outcome.data["ms"].items(), key=lambda pair: -pair[1])
    lines = ["", f"{shape}, where a training step of the chosen division goes:", ""]
    return lines + markdown(["", "ms"], rows)
