"""Write docs/reference.md: every public name with its arguments and the first sentence about it.

    python docs/reference.py

The sentences are those of the docstrings, which ``help(name)`` shows in full.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import tinygrad_seq as tgs
from tinygrad_seq import data, drawing, nn, optim, train

PAGE = Path(__file__).with_name("reference.md")
HEADINGS = {
    "tgs": ("tinygrad_seq", tgs),
    "nn": ("Modules, cells and layers", nn),
    "nn.functional": ("Losses and attention", nn.functional),
    "nn.init": ("How weights start", nn.init),
    "optim": ("Optimisers, schedules, clipping", optim),
    "train": ("The training loop", train),
    "data": ("Data", data),
    "drawing": ("Pictures, with the extra `examples`", drawing),
}


def public(module: ModuleType) -> list[str]:
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and name[0] != "_"
    ]
    return sorted(name for name in names if callable(getattr(module, name)))


def arguments(value: Any) -> str:
    """The names of what it takes, in brackets; defaults as they are."""
    try:
        given = inspect.signature(value).parameters.values()
    except ValueError:  # an exception class
        return ""
    shown = [str(p.replace(annotation=p.empty)) for p in given]
    first_keyword = [p.kind is p.KEYWORD_ONLY for p in given]
    if any(first_keyword) and not any(p.kind is p.VAR_POSITIONAL for p in given):
        shown.insert(first_keyword.index(True), "*")
    return f"({', '.join(shown)})".replace("=<factory>", "")


def sentence(value: Any) -> str:
    """The first sentence of the docstring, on one line."""
    text = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.!?])\s+(?=[A-Z`])", text)[0].replace("|", "\\|")


def page() -> str:
    lines = ["# Reference", "", "Every public name. `help(tgs.scan)` says more about each.", ""]
    for prefix, (heading, module) in HEADINGS.items():
        lines += [f"## {heading}", "", "| name | what it is |", "| --- | --- |"]
        for name in public(module):
            value = getattr(module, name)
            lines.append(f"| `{prefix}.{name}{arguments(value)}` | {sentence(value)} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
