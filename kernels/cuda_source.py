"""The kernels of a plan for CUDA, and the module that they stand in.

Imports cuda_division, cuda_order, cuda_steps, cuda_text and program.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from tinygrad_seq.kernels.cuda_division import Form
from tinygrad_seq.kernels.cuda_order import chains
from tinygrad_seq.kernels.cuda_steps import StepWriter
from tinygrad_seq.kernels.cuda_text import CudaWriter

from tinygrad_seq.program import Plan, Rowwise, Rules


class Kernel(NamedTuple):
    """A kernel's text, and the names of the words that it is called with."""

    name: str
    text: str
    words: list[str]
    divided: bool = False  # by steps: whether rows are shared by the parts of a group


def kernel_texts(plan: Plan, direction: str, rules: Rules, form: Form) -> list[Kernel]:
    """All kernels of a direction: the loop's first, then in the order in which they run."""
    program = plan.program(direction)
    found = []

    def keep(by: CudaWriter, text: str | None) -> None:
        if text is not None:
            divided = isinstance(by, StepWriter) and by.divided
            found.append(Kernel(text[4 : text.index("(")], text, by.words, divided))

    def writer() -> CudaWriter:
        return CudaWriter(plan, program, rules, form.streamed)

    if form.by_steps:
        products = [stage for each in chains(plan, program) for stage in each.stages]
        for number in range(len(products) + 1):
            step = StepWriter(plan, program, rules)
            keep(step, step.step(number))
    else:
        loop = writer()
        keep(loop, loop.loop())
    if program.gathered:
        gather = writer()
        keep(gather, gather.gathered())
    for section in ("early", "late"):
        for number, stage in enumerate(program.sections[section]):
            if isinstance(stage, Rowwise):
                alone = writer()
                keep(alone, alone.alone(section, number))
    return found


CALLED = (
    "abs at barrier begin_of block blocks cos equal erf exp expm1 flag floor from_bits greater "
    "greater_equal lay_out less less_equal load log log1p loose_product loose_streamed_product "
    "maximum meet minimum not_equal part_max part_min part_sum power product put_word row_of "
    "rows_on share sigmoid sign sin sqrt store streamed_product take_in tanh team_of thread "
    "threads tile_column tile_row uniform unit_of units_on warp_max warp_min warp_sum where "
    "whole word"
).split()


def module_text(plan: Plan, kernels: list[Kernel]) -> str:
    """The module of some kernels."""
    body = "\n\n".join(kernel.text for kernel in kernels)
    head = f'"""{plan}\n"""\n\nfrom tinygrad_seq.kernels.cuda_library import cuda, functions\n\n'
    head += f'_f = functions("{plan.dtype}")\nnumber = constant = _f.constant\n'
    for name in CALLED:
        if re.search(rf"\b{name}\(", body):
            head += f"{name} = _f.{name}\n"
    return head + "\n\n" + body
