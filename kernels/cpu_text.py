"""From a plan to source text for the CPU: one function for each direction, meant to be read.

A function is called with the address of a table of words, the number of its task, which says which
rows of the batch are its own, and the address of the words of its phase, which say from which step
to which it goes. It takes its rows through these steps by itself.

Names are those of ``text.py``; besides, n are the units that are left, p7 is the address of a row,
k0, s0 and b0 are the first steps of the run, of the phase and of the block; the task has rows first
to first + R, its part of the batch those from low to low + P; z7_row counts elements; inverse7 is
1 / (scale7 v7), where scale7 keeps it from being too small.
Imports text and program.
"""

from __future__ import annotations

from collections.abc import Sequence

from tinygrad_seq.kernels.text import MATHEMATICS, Writer

from tinygrad_seq.program import (
    REDUCTIONS,
    Pass,
    Place,
    Plan,
    Product,
    Program,
    Rowwise,
    Rules,
    Scratch,
    Stage,
)

IMPORTS = (  # what a text may take of the vectors of its dtype
    *MATHEMATICS,
    *"constant divisor_scale fetch load part_max part_min part_sum repeat".split(),
    *"row_max row_min row_sum store uniform".split(),
)
SHARED = {  # functions of library.py, and what they are given
    "add_row": "source, to, n",
    "copy_row": "source, to, n",
    "product": "a, row, M, b, K, wide, c, ldc, add, in_tiles",  # as gemm.product_text says
    "product_of_lines": "a, row, M, width, b, K, N, groups, size, c, ldc",  # as there
    "take": "a, row, M, units, runs, N, c, ldc, add",
    "take_back": "a, row, M, units, runs, N, c, ldc, K, add",
    "spread": "a, row, M, units, runs, N, c, ldc, add",
    "spread_back": "a, row, M, units, runs, N, c, ldc, K, add",
    "zero_row": "to, n",
}


class CpuWriter(Writer):
    """Writes the function of a direction."""

    def __init__(self, plan: Plan, program: Program, rules: Rules) -> None:
        super().__init__(plan, program, rules)
        self.distances: dict[str, str] = {}
        self.of_parts: list[tuple[str, str, str]] = []  # memory, its places, bytes of a row
        # The steps of a block, in the direction in which blocks follow one another: so the order of
        # a sum does not depend on how long blocks are.
        self.steps = "range(b0, b1)" if self.forward else "range(b1 - 1, b0 - 1, -1)"

    def text(self) -> str:
        direction = self.program.direction
        self._body()
        body = self.taken()
        self.add(0, f"def {direction}(table, task, phase):")
        self.add(1, "s0, s1 = word(phase, FROM_STEP), word(phase, TO_STEP)")
        if not self.forward:
            self.add(1, "begun = word(phase, BEGUN)")
        self.add(1, "# words of this run, as layout.py filled them in")
        for k, name in enumerate(self.words):
            self.add(1, f"{name} = word(table, {k})")
        for constant, name in self.constants.items():
            self.add(1, f"{name} = constant({str(constant).replace('inf', '1e999')})")
        for k, name in self.numbers.items():
            self.add(1, f"{name} = repeat(numbers + {k * self.item})")
        self.add(1, "saved = flush_denormals()")
        self.add(1, "# which rows are this task's, and its places in memory")
        self.add(1, "edges += s0 // edges_steps * edges_bytes  # of tasks, in these steps")
        self.add(1, "first = word(edges, task)  # rows first to first + R are this task's")
        self.add(1, "R = word(edges, task + 1) - first")
        self.add(1, "part = task // part_tasks  # of the batch, of which these rows are")
        self.add(1, "active += part * active_bytes")
        self.add(1, "low = word(edges, part * part_tasks)  # where it begins")
        self.add(
            1, "P = word(edges, (part + 1) * part_tasks) - low  # its rows, which lie together"
        )
        self.add(1, "scratch += task * scratch_bytes")
        if self.program.matrices:
            self.add(1, "split += task * split_bytes")
        for buffer in self.program.scratch:
            self.add(1, f"z{buffer.slot} += scratch")
        for name, places, row in self.of_parts:
            self.add(1, f"{name} += (low * {places} + first - low) * {row}")
        for distance, name in self.distances.items():
            self.add(1, f"{name} = {distance}  # from a step's record to the next one's")
        self.lines += body
        self.add(1, "restore_denormals(saved)")
        return "\n".join(self.lines) + "\n"

    def _body(self) -> None:
        """All that is done once the task knows its rows: block after block of steps."""
        for name in ("edges", "edges_steps", "edges_bytes", "scratch", "scratch_bytes"):
            self.word(name)
        for name in ("k0", "block", "active", "active_bytes", "part_tasks", "B"):
            self.word(name)
        for name in ("batch", "begin", "onward", "kept_on"):
            self.word(name)
        if self.plan.numbers:
            self.word("numbers")
        if self.program.matrices:
            self.word("split")
            self.word("split_bytes")
        for buffer in self.program.scratch:
            self.word(f"z{buffer.slot}")
        self._first_states() if self.forward else self._first_gradients()
        sections = self.program.sections
        self.add(1, "b0 = s0" if self.forward else "b1 = s1")
        self.add(1, "while b0 < s1:" if self.forward else "while b1 > s0:")
        if self.forward:
            self.add(2, "b1 = min(b0 + block, s1)  # steps b0 to b1 are a block")
            self.add(2, "if word(active, b0) <= first:")
            self.add(3, "break  # all rows of this task have ended")
        else:
            self.add(2, "b0 = max(b1 - block, s0)  # steps b0 to b1 are a block")
            self.add(2, "if word(active, b0) <= first:")
            self.add(3, "b1 = b0")
            self.add(3, "continue  # all rows of this task end before")
        self.add(2, "full = min(word(active, b1 - 1) - first, R) == R")
        for slot in self.program.gathered:
            self._gather(slot)
        if sections["early"]:
            self.add(2, "# before the loop")
            self._block_section(sections["early"])
        self.add(2, f"for s in {self.steps}:")
        self.add(3, "m = min(word(active, s) - first, R)  # rows that have not ended")
        if self.forward:
            self._resets()
        for stage in sections["loop"]:
            self._stage(stage)
        if self.forward:
            self._last_states()
        else:
            self._gradients_before()
        if sections["late"]:
            self.add(2, "# after the loop")
            self._block_section(sections["late"])
        self.add(2, "b0 = b1" if self.forward else "b1 = b0")

    def _block_section(self, stages: Sequence[Stage]) -> None:
        for stage in stages:
            if isinstance(stage, Rowwise):
                self.add(2, f"for s in {self.steps}:")
                self.add(3, "m = min(word(active, s) - first, R)")
                self._stage(stage)
            else:
                self._block_product(stage)

    # Rows in memory

    def _row(self, kind: str, which: int) -> str:
        """The address of row r at step s in a kind of memory."""
        if kind == "scratch":
            buffer = self._buffer(which)
            row = "((s - b0) * R + r)" if buffer.block else "r"
            return f"z{which} + {row} * {self._distance(buffer)} * {self.item}"
        if kind in ("dstate", "before"):
            return self._dstate_row(which, "(s + 1 & 1)" if kind == "dstate" else "(s & 1)")
        if kind in ("kept", "grads"):
            bytes_, offset = self.word(f"{kind}_bytes"), self.word(f"{kind}{which}")
            record = self._of_part(kind, self.word(f"{kind}_steps"), bytes_)
            step = "(s - k0) * kept_on" if kind == "kept" else "(s - s0)"
            return f"{record} + ({step} * P + r) * {bytes_} + {offset}"
        if kind != "sum":
            return super()._row(kind, which)
        chunk, chunks = self.word("chunk"), self.word(f"sum{which}_chunk")
        array, rows = self.word(f"sum{which}"), self.word(f"sum{which}_b")
        return f"{array} + (first + r) // {chunk} * {chunks} + (first + r) % {chunk} * {rows}"

    def _state_row(self, k: int, slot: str) -> str:
        width, mask = self.width(self.plan.state_slots[k]), self.word(f"state{k}_mask")
        row = f"{width} * {self.item}"
        base = self._of_part(f"state{k}", self.word(f"state{k}_places"), row)
        return f"{base} + (({slot} & {mask}) * P + r) * {row}"

    def _dstate_row(self, k: int, place: str) -> str:
        """The address of row r of a gradient of a state, which has two places."""
        row = self.word(f"dstate{k}_row")
        return f"{self._of_part(f'dstate{k}', '2', row)} + ({place} * P + r) * {row}"

    def _of_part(self, name: str, places: str, row: str) -> str:
        """Memory in which each part of the batch has its rows of all places together."""
        if (name, places, row) not in self.of_parts:
            self.of_parts.append((name, places, row))
        return self.word(name)

    def _distance(self, buffer: Scratch) -> str:
        """From row to row of a scratch buffer, in elements."""
        return self.word(f"z{buffer.slot}_row")

    def _place(self, slot: int) -> Place:
        """Where a value is, or what it is a slice of."""
        while slot not in self.program.places:
            slot = self.program.inputs[slot][0]
        return self.program.places[slot]

    def _step_distance(self, slot: int) -> str:
        """How far the record of the step that comes next lies before this one's, going backward.

        The processor fetches ahead by itself where addresses rise; here it must be told.
        """
        kind, which = self._place(slot)
        distance = ""
        if not self.forward and kind == "kept":
            distance = f"kept_on * P * {self.word('kept_bytes')}"
        elif not self.forward and kind in ("state", "after"):
            width = self.width(self.plan.state_slots[which])
            distance = f"{self.word('slots')} * P * {width} * {self.item}"
        elif not self.forward and kind == "dy":
            distance = f"onward * {self.word(f'dy{which}_t')}"
        return distance and self.distances.setdefault(distance, f"step{len(self.distances)}")

    # The edges of a run

    def _zero_beyond_ends(self, depth: int, arrays: dict[str, int]) -> None:
        """Zeros in arrays of the caller, of these widths, from where each row has ended on."""
        if not arrays:
            return
        # T is 0 where no row ends earlier; what lies beyond is written in the order of memory
        self.add(depth, f"for t in range({self.word('T')}):  # zeros for rows that have ended")
        self.add(depth + 1, "for r in range(max(word(active, t) - first, 0), R):")
        for name, slot in arrays.items():
            step, row = self.word(f"{name}_t"), self.word(f"{name}_b")
            address = f"{self.word(name)} + t * {step} + word(batch, first + r) * {row}"
            self.add(depth + 2, f"to = {address}")
            self.add(depth + 2, f"zero_row(to, {self.width(slot)})")

    def _first_states(self) -> None:
        """States before the first step; rows that have no step end with them."""
        self._zero_beyond_ends(1, {f"y{k}": slot for k, slot in enumerate(self.plan.y_slots)})
        if not self.plan.state_slots:
            return
        self.add(1, "for r in range(R):")
        for k, slot in enumerate(self.plan.state_slots):
            self.add(2, f"p = {self._batch_row(f'initial{k}', slot)}")
            self.add(2, f"to = {self._state_row(k, '0')}")
            self.add(2, f"copy_row(p, to, {self.width(slot)})")
            self.add(2, "if word(active, s0) <= first + r:")
            self.add(3, f"to = {self._batch_row(f'last{k}', slot)}")
            self.add(3, f"copy_row(p, to, {self.width(slot)})")

    def _first_gradients(self) -> None:
        """Gradients of the last states, and zeros where gradients are added up."""
        plan = self.plan
        carried = [k for k, after in enumerate(plan.gradients.after) if after is not None]
        sums = sorted({k for _, k in plan.gradients.sums})
        captures = {row.detail: slot for slot, row in enumerate(plan.rows) if row.op == "capture"}
        written = {"dx": plan.gradients.dx, "total": plan.gradients.totals}
        arrays = {
            f"{name}{k}": slot
            for name, slots in written.items()
            for k, slot in enumerate(slots)
            if slot is not None
        }
        if not carried and not sums and not arrays:
            return
        self.add(1, "if not begun:  # nothing has come back yet")
        self._zero_beyond_ends(2, arrays)
        if not carried and not sums:
            return
        self.add(2, "for r in range(R):")
        for k in carried:
            slot = plan.state_slots[k]
            width = self.width(slot)
            for place in ("0", "1"):
                self.add(3, f"to = {self._dstate_row(k, place)}")
                self.add(3, f"if {self.word(f'dlast{k}')}:")
                self.add(4, f"p = {self._batch_row(f'dlast{k}', slot)}")
                self.add(4, f"copy_row(p, to, {width})")
                self.add(3, "else:")
                self.add(4, f"zero_row(to, {width})")
            self.add(3, f"if {self.word('resets')}:")
            self.add(4, f"to = {self._batch_row(f'dreset{k}', slot)}")
            self.add(4, f"zero_row(to, {width})")
        for k in sums:
            self.add(3, f"to = {self._row('sum', k)}")
            self.add(3, f"zero_row(to, {self.width(captures[k])})")

    # The edges of a step

    def _gather(self, slot: int) -> None:
        row = self.plan.rows[slot]
        self.add(2, f"# %{slot} = {row.op} {row.detail}, of all steps of the block")
        self.add(2, "for s in range(b0, b1):")
        self.add(3, "m = min(word(active, s) - first, R)")
        self.add(3, "for r in range(m):")
        self.add(4, f"p = {self._user_row(f'{row.op}{row.detail}')}")
        buffer = self._buffer(slot)
        self.add(4, f"to = z{slot} + ((s - b0) * R + r) * {self._distance(buffer)} * {self.item}")
        self.add(4, f"copy_row(p, to, {self.width(slot)})")

    def _resets(self) -> None:
        if not self.plan.state_slots:
            return
        resets, slots = self.word("resets"), self.word("slots")
        self.add(3, f"if {resets}:  # rows that begin anew, before this step")
        self.add(4, "for r in range(m):")
        self.add(5, "t = word(begin, first + r) + s * onward")
        self.add(5, f"anew = flag({resets}, t * B + word(batch, first + r))")
        for k, slot in enumerate(self.plan.state_slots):
            self.add(5, f"p = {self._state_row(k, f'((s - k0) * {slots})')}")
            self.add(5, "if anew:")
            self.add(6, f"fresh = {self._batch_row(f'reset{k}', slot)}")
            self.add(6, f"copy_row(fresh, p, {self.width(slot)})")
            self.add(5, f"elif {slots} == 2 and s > k0:")
            self.add(6, f"old = {self._state_row(k, f'((s - k0) * {slots} - 1)')}")
            self.add(6, f"copy_row(old, p, {self.width(slot)})")

    def _last_states(self) -> None:
        """After a step forward: the last states of rows that end, the states at a checkpoint."""
        if not self.plan.state_slots:
            return
        self.add(3, "going = 0  # rows that have a next step")
        self.add(3, "if s + 1 < s1:")
        self.add(4, "going = min(max(word(active, s + 1) - first, 0), R)")
        self.add(3, "for r in range(going, m):  # rows that end here: their last state")
        for k, slot in enumerate(self.plan.state_slots):
            self.add(4, f"p = {self._row('after', k)}")
            self.add(4, f"to = {self._batch_row(f'last{k}', slot)}")
            self.add(4, f"copy_row(p, to, {self.width(slot)})")
        every = self.word("every")
        self.add(3, f"if {every} and (s + 1) % {every} == 0:  # a checkpoint")
        self.add(4, "for r in range(going):")
        for k, slot in enumerate(self.plan.state_slots):
            width = self.width(slot)
            row = f"((s + 1) // {every} - 1) * B + word(batch, first + r)"
            self.add(5, f"p = {self._row('after', k)}")
            self.add(5, f"to = {self.word(f'checkpoint{k}')} + ({row}) * {width} * {self.item}")
            self.add(5, f"copy_row(p, to, {width})")

    def _gradients_before(self) -> None:
        """After a step backward: what does not go back to the state before it."""
        gradients = self.plan.gradients
        carried = [k for k, after in enumerate(gradients.after) if after is not None]
        if not carried:
            return
        resets = self.word("resets")
        unwritten = [k for k in carried if gradients.before[k] is None]
        if unwritten:
            self.add(3, "for r in range(m):  # no gradient goes back to these states")
            for k in unwritten:
                self.add(4, f"p = {self._row('before', k)}")
                width = self.width(self.plan.state_slots[k])
                self.add(4, f"zero_row(p, {width})")
        self.add(3, f"if {resets}:  # what goes back to where rows began anew")
        self.add(4, "for r in range(m):")
        self.add(5, "t = word(begin, first + r) + s * onward")
        self.add(5, f"if flag({resets}, t * B + word(batch, first + r)):")
        for k in carried:
            width = self.width(self.plan.state_slots[k])
            self.add(6, f"p = {self._row('before', k)}")
            self.add(6, f"to = {self._batch_row(f'dreset{k}', self.plan.state_slots[k])}")
            self.add(6, f"add_row(p, to, {width})")
            self.add(6, f"zero_row(p, {width})")

    # Stages

    def _stage(self, stage: Stage) -> None:
        """A stage in one step, for the rows that have not ended."""
        if isinstance(stage, Product):
            self._comment(3, stage.slot)
            self._product(stage, 3, "m")
            return
        self.add(3, "for r in range(m):")
        known: set[int | str] = set()  # single values of this row, by line; inverses, by name
        for each in stage.passes:
            self._pass(each, 4, known)

    def _operand(self, stage: Product) -> tuple[str, str]:
        """Address, for r = 0, and distance of the rows that a product reads."""
        place, address = self._place(stage.a), self._read(stage.a)
        if place.kind == "scratch":
            buffer = self._buffer(place.which)
            distance = self._distance(buffer)
        elif place.kind in ("kept", "grads"):
            distance = f"{self.word(place.kind + '_bytes')} // {self.item}"
        elif place.kind == "dstate":
            distance = f"{self.word(f'dstate{place.which}_row')} // {self.item}"
        else:
            distance = self.width(self.plan.state_slots[place.which])
        return address, distance

    def _units(self, which: int) -> int:
        """The row of the units of a choice."""
        rows = self.plan.rows
        return next(k for k, row in enumerate(rows) if row.op == "units" and row.detail == which)

    def _product(self, stage: Product, depth: int, rows: str) -> None:
        address, distance = self._operand(stage)
        matrix = f"m{stage.matrix}" + ("t" if stage.transposed else "")
        self.add(depth, "r = 0")
        self.add(depth, f"p = {address}")
        kind, which = stage.into
        self.add(depth, f"to = {self._row(kind, which)}")
        if kind == "scratch":
            out = self._distance(self._buffer(which))
        else:
            out = f"{self.word(f'dstate{which}_row')} // {self.item}"
        add = int(stage.adds)
        if stage.choice:
            units = self.word(f"capture{stage.matrix}")
            what = f"p, {distance}, {rows}, {units}, {self.width(self._units(stage.matrix))}"
            if stage.transposed:
                N, K = self.width(stage.a), self.width(stage.slot)
                self.add(depth, f"{stage.choice}_back({what}, {N}, to, {out}, {K}, {add})")
            else:
                N = self.width(stage.slot)
                self.add(depth, f"{stage.choice}({what}, {N}, to, {out}, {add})")
            return
        if stage.lines:
            what = f"p, {distance}, {rows}, {self.width(stage.a)}, {self.word(matrix)}"
            sizes = [self.word(f"{matrix}_{each}") for each in ("K", "N", "groups", "bytes")]
            self.add(depth, f"product_of_lines({what}, {', '.join(sizes)}, to, {out})")
            return
        wide = self.word(f"{matrix}_wide")
        b = f"{self.word(matrix)}, {self.width(stage.a)}, {wide}"
        in_tiles = f"{self.word(f'{matrix}_tiles')} * split"  # 0, or memory for tiles
        self.add(depth, f"product(p, {distance}, {rows}, {b}, to, {out}, {add}, {in_tiles})")

    def _block_product(self, stage: Product) -> None:
        """All steps of a block at once if their rows follow one another."""
        alone = "" if self._place(stage.a).kind == "scratch" else " and R == P"
        self._comment(2, stage.slot)
        self.add(2, f"if full{alone}:")
        self.add(3, "s = b0")
        self._product(stage, 3, "(b1 - b0) * R")
        self.add(2, "else:")
        self.add(3, "for s in range(b0, b1):")
        self.add(4, "m = min(word(active, s) - first, R)")
        self._product(stage, 4, "m")

    # Passes

    def _pass(self, each: Pass, depth: int, known: set[int | str]) -> None:
        for slot in each.singles:
            self._comment(depth, slot)
            for k in self.program.inputs[slot]:
                self._fetch_single(k, depth, known)
            self.add(depth, f"v{slot} = {self._expression(slot)}")
            known.add(slot)
            self._store_single(slot, depth)
        for slots in each.loops.values():
            self._loop(slots, depth, known)

    def _fetch_single(self, slot: int, depth: int, known: set[int | str]) -> None:
        """Have one number of a row in every lane."""
        if slot in known or self.plan.rows[slot].op == "number":
            return
        self.add(depth, f"v{slot} = repeat({self._read(slot)})")
        known.add(slot)

    def _store_single(self, slot: int, depth: int) -> None:
        for target in self._targets(slot):
            self.add(
                depth, f"to = {self._row(target.kind, target.which)}{self.offset(target.offset)}"
            )
            value = f"v{slot}"
            if target.kind == "sum":
                value = f"load(to, 0, 1) + {value}"
            self.add(depth, f"store(to, 0, {value}, 1)")

    def _by_inverse(self, slot: int) -> bool:
        """Whether all of a row is divided by one number of it: one division then, not many."""
        repeated = self._repeated(slot)
        return self.plan.rows[slot].op == "divide" and repeated[1] and not repeated[0]

    def _invert(self, slot: int, depth: int, known: set[int | str]) -> None:
        """The inverse of what a row is divided by, before the loop over the row."""
        k = self.program.inputs[slot][1]
        self._fetch_single(k, depth, known)
        if f"inverse{k}" not in known:
            known.add(f"inverse{k}")
            self.add(depth, f"scale{k} = divisor_scale({self.value(k)})")
            self.add(depth, f"inverse{k} = {self.constant(1.0)} / ({self.value(k)} * scale{k})")

    def _in_loop(self, slot: int) -> str:
        """The expression of a value of which there is one for each unit."""
        if not self._by_inverse(slot):
            return self._expression(slot)
        above, below = self.program.inputs[slot]
        return f"{self.value(above)} * scale{below} * inverse{below}"

    def _loop(self, slots: list[int], depth: int, known: set[int | str]) -> None:
        """A loop over the units of a row; in the end what rows are reduced to is known, too."""
        rows = self.plan.rows
        reductions = [slot for slot in slots if rows[slot].op in REDUCTIONS]
        along = self.program.inputs[slots[0]][0] if slots[0] in reductions else slots[0]
        width = self.width(along)
        loads = self._before_loop(slots, reductions, depth, known)
        self.add(depth, f"for j in range(0, {width}, LANES):")
        self.add(depth + 1, f"n = {width} - j")
        for slot in slots:
            self._comment(depth + 1, slot)
            for k in self.program.inputs[slot]:
                if k in loads:
                    self.add(depth + 1, f"v{k} = load(p{k}, j, n)")
                    if distance := loads.pop(k):
                        self.add(depth + 1, f"fetch(p{k} - {distance}, j)")
            if slot in reductions:
                of = self.value(self.program.inputs[slot][0])
                self.add(depth + 1, f"v{slot} = part_{rows[slot].op}(v{slot}, {of}, n)")
            else:
                self._unit(slot, depth + 1)
        for slot in reductions:
            self.add(depth, f"v{slot} = row_{rows[slot].op}(v{slot})")
            known.add(slot)
            self._store_single(slot, depth)

    def _before_loop(
        self, slots: list[int], reductions: list[int], depth: int, known: set[int | str]
    ) -> dict[int, str]:
        """Single values and addresses. What is left to load in the loop: each with how far before
        it the next step's is, if that must be fetched, else ""."""
        loads: dict[int, str] = {}
        made = set(slots).difference(reductions)
        for slot in slots:
            if self._by_inverse(slot):
                self._invert(slot, depth, known)
            for k, repeated in zip(self.program.inputs[slot], self._repeated(slot), strict=True):
                if self.plan.rows[k].op == "number" or k in made:
                    continue
                if repeated or k in known:
                    self._fetch_single(k, depth, known)
                elif k not in loads:
                    self.add(depth, f"p{k} = {self._read(k)}")
                    loads[k] = self._step_distance(k)
        for slot in slots:
            for number, target in enumerate(self._targets(slot)):
                if slot not in reductions:
                    address = self._row(target.kind, target.which) + self.offset(target.offset)
                    self.add(depth, f"to{slot}_{number} = {address}")
        if any(self.plan.rows[slot].op == "uniform" for slot in slots):
            self.add(depth, "t, row = word(begin, first + r) + s * onward, word(batch, first + r)")
        for slot in reductions:
            op = self.plan.rows[slot].op
            nothing = {"sum": 0.0, "max": float("-inf"), "min": float("inf")}[op]
            self.add(depth, f"v{slot} = {self.constant(nothing)}")
        return loads

    def _unit(self, slot: int, depth: int) -> None:
        """The value of a unit, and where it goes."""
        self.add(depth, f"v{slot} = {self._in_loop(slot)}")
        for number, target in enumerate(self._targets(slot)):
            to, value = f"to{slot}_{number}", f"v{slot}"
            if target.kind == "sum":
                value = f"load({to}, j, n) + {value}"
            self.add(depth, f"store({to}, j, {value}, n)")


def module_text(plan: Plan, rules: Rules, direction: str) -> tuple[str, list[str]]:
    """The module with the function of a direction, and the names of the words of its table."""
    writer = CpuWriter(plan, plan.program(direction), rules)
    body = writer.text()
    head = f'"""{plan}\n"""\n\n'
    head += "from tinygrad_seq.kernels.build import external\n"
    head += "from tinygrad_seq.kernels.simd import (\n"
    head += "    flag, flush_denormals, restore_denormals, vectors, word,\n)\n"
    head += "from tinygrad_seq.kernels.threads import BEGUN, FROM_STEP, TO_STEP\n\n"
    head += f'_v = vectors("{plan.dtype}")\nLANES = _v.LANES\n'
    for name, given in SHARED.items():
        if f" {name}(" in body:
            head += f'{name} = external("{name}", "{plan.dtype}")  # ({given})\n'
    for name in IMPORTS:
        if f"{name}(" in body:
            head += f"{name} = _v.{name}\n"
    return head + "\n\n" + body, writer.words
