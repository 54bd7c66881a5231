"""From a plan to source text for CUDA: a kernel for a direction's loop, and small ones around it.

The loop's kernel takes all steps in one launch. A group of blocks has rows of the batch for itself,
and in it a part has a share of the units of every width: it computes what stands at its own units,
and the columns of each product that are read there. So the results of such a product stay in its
shared memory, and blocks wait for one another (``barrier``) only before something reads across
units what others have written: a product its rows, a sum its shares. Where threads of one block
read what others of it wrote, they ``meet``. ``cuda_order.py`` finds both.

What needs no loop (*early* and *late*) is done for all steps at once: products are the caller's,
passes between them are kernels in which each block takes rows of one step after another.

Names are those of ``text.py`` and ``cuda_rows.py``; u7 and n7 are the first of a part's units of
width w7, and how many it has. Imports cuda_order, cuda_rows and program.
"""

from __future__ import annotations

from typing import Any

from tinygrad_seq.kernels.cuda_order import (
    ALL_BLOCKS,
    ROWS_BY_THREADS,
    ROWS_BY_WARPS,
    THE_BLOCK,
    TILES,
    UNITS,
    Chain,
    Item,
    Region,
    Segment,
    base_of,
    slots_of,
    waits,
)
from tinygrad_seq.kernels.cuda_rows import RING, RowWriter

from tinygrad_seq.program import REDUCTIONS, Plan, Product, Program, Rules, Stage, begins

PART = ["group = whole(block() // parts)", "part = whole(block() - group * parts)"]
GROUP = [
    "first = whole(row0 + group * rows)  # rows first to first + R are this group's",
    "R = whole(min(rows, row1 - first))",
    "if R <= 0:",
    "    return",
]
SHARED = "shared = cuda.shared.array(0, number, 16)"
HERE = "m = whole(min(word(active, s) - first, R))  # rows that have not ended"
COUNTER = 128  # bytes that each group's counter has for itself
NEVER = {"x", "dy", "y", "dx", "total", "capture"}  # the caller's: nobody waits for them


class CudaWriter(RowWriter):
    """Writes one kernel."""

    shares_far = False  # whether results of products are in global memory, not the block's own

    def __init__(
        self, plan: Plan, program: Program, rules: Rules, streamed: frozenset[int] = frozenset()
    ) -> None:
        super().__init__(plan, program, rules)
        self.streamed = streamed  # products whose matrices do not fit shared memory

    # Kernels

    def loop(self) -> str:
        """The kernel of all steps."""
        direction = self.program.direction
        for name in ("counters", "parts", "rows", "row0", "row1", "s0", "s1", "k0", "B", "active"):
            self.word(name)
        for name in ("batch", "begin", "onward"):
            self.word(name)
        items = self._step_items()
        needs = waits(items)
        for each in self.chains:
            for stage in each.stages:
                self._take_in(each, stage)
        self._prologue()
        self.add(1, "met = barrier(counter, 0, parts)")
        steps = "range(s0, s1)" if self.forward else "range(s1 - 1, s0 - 1, -1)"
        self.add(1, f"for s in {steps}:")
        self.add(2, HERE)
        if self.forward:
            self.add(2, "if m <= 0:")
            self.add(3, "break")
        for item, need in zip(items, needs, strict=True):
            if need == ALL_BLOCKS:
                self.add(2, "met = barrier(counter, met, parts)")
            elif need == THE_BLOCK:
                self.add(2, "meet()")
            item.write(2)
        counter = f"counter = counters + group * {COUNTER}"
        return self._whole(direction, [*PART, *GROUP, counter, SHARED])

    def alone(self, section: str, number: int) -> str:
        """The kernel of passes that all steps have done at once."""
        stage = self.program.sections[section][number]
        items = self._stage_items(stage)
        return self._tiles(f"{self.program.direction}_{section}{number}", items)

    def gathered(self) -> str:
        """The kernel that copies the caller's rows in the order of the run."""
        item = Item(self._gather_all)
        return self._tiles(f"{self.program.direction}_gather", [item])

    def _tiles(self, name: str, items: list[Item]) -> str:
        """A kernel whose blocks take rows of one step after another."""
        for each in ("rows", "s0", "k0", "B", "active", "batch", "begin", "onward", "tiles"):
            self.word(each)
        self.add(1, "chunks = (B + rows - 1) // rows")
        self.add(1, "for tile in range(block(), tiles, blocks()):")
        self.add(2, "s = s0 + tile // chunks")
        self.add(2, "first = whole(tile % chunks * rows)")
        self.add(2, "R = whole(min(rows, B - first))")
        self.add(2, HERE)
        for item, need in zip(items, waits(items), strict=True):
            if need:
                self.add(2, "meet()")
            item.write(2)
        if len(items) > 1:
            self.add(2, "meet()")
        return self._whole(name, ["parts, part = 1, 0", SHARED])

    def _whole(self, name: str, head: list[str]) -> str:
        body = self.taken()
        self.add(0, f"def {name}(words):")
        bits = [self.word(f"number{k}_bits") for k in self.numbers]
        for k, word in enumerate(self.words):
            self.add(1, f"{word} = words[{k}]")
        for constant, variable in self.constants.items():
            self.add(1, f"{variable} = constant({str(constant).replace('inf', '1e999')})")
        for variable, word in zip(self.numbers.values(), bits, strict=True):
            self.add(1, f"{variable} = from_bits({word})")
        for line in head:
            self.add(1, line)
        for k in self.shared_widths:
            self.add(1, f"u{k} = begin_of(w{k}, part, parts)  # units u{k} to u{k} + n{k}")
            self.add(1, f"n{k} = whole(begin_of(w{k}, part + 1, parts) - u{k})")
            self.add(1, f"r{k}, i{k} = row_of(n{k}, rows), unit_of(n{k})  # a thread's first")
            self.add(1, f"dr{k}, di{k} = rows_on(n{k}), units_on(n{k})  # and how far the next is")
        self.lines += body
        return "\n".join(self.lines) + "\n"

    # A step

    def _step_items(self) -> list[Item]:
        items = [self._resets_item()] if self.forward and self.plan.state_slots else []
        for stage in self.program.sections["loop"]:
            items += self._stage_items(stage)
        return [*items, *self._end_items()]

    def _stage_items(self, stage: Stage) -> list[Item]:
        if isinstance(stage, Product):
            return self._product_items(stage)
        computed = {slot for each in stage.passes for slot in slots_of(each)}
        items = []
        for each in stage.passes:
            items += [self._single_item(slot, computed) for slot in each.singles]
            for slots in each.loops.values():
                items.append(self._loop_item(slots, computed))
                sums = [slot for slot in slots if self.plan.rows[slot].op in REDUCTIONS]
                items += [self._total_item(slot) for slot in sums]
                items += [self._single_item(slot, computed) for slot in sums]
        return [item for item in items if item is not None]

    # Products

    def _take_in(self, chain: Chain, stage: Product) -> None:
        """A part's columns of a matrix, where the product reads them."""
        p, k = f"p{stage.slot}", stage.matrix
        row, column = self.word(f"{p}_row"), self.word(f"{p}_column")
        C, K, at = self.word(f"{p}_C"), self.width(stage.a), self.word(f"{p}_at")
        self._comment(1, stage.slot)
        streamed = stage.slot in self.streamed
        names = ("workers", "beside", "across", "height", "slices", "depth")
        words = [self.word(f"{p}_{each}") for each in names]
        workers, beside, across, height, slices, depth = words
        self.add(1, f"{p}_team = team_of({workers})")
        self.add(1, f"{p}_r = tile_row({workers}, {beside}, {across}, {height})")
        self.add(1, f"{p}_c = tile_column({workers}, {beside}, {across})")
        self.add(1, f"if {p}_team >= {slices}:")
        self.add(2, f"{p}_r = whole(rows)  # a warp too many")
        self.add(1, f"{p}_first = whole({p}_team * {depth})")
        self.add(1, f"{p}_end = whole(min({K}, {p}_first + {depth}))")
        self.add(1, f"{p}_share = whole({self.word(f'{p}_out')} + {p}_team * rows * {C})")
        if streamed:
            self.add(1, f"{at} += part * {K} * {C} * {self.item}")
        for n, segment in enumerate(chain.segments):
            at_units = self.units_of(segment.slot)
            columns = f"{self._columns(chain, segment)}u{at_units}"
            beside = self.word(f"{p}_segment{n}")
            source = f"{self.word(f'capture{k}')} + ({columns}) * {column}"
            given = f"{C}, {source}, {row}, {column}, {K}, n{at_units}"
            if streamed:
                self.add(1, f"lay_out({at} + {beside} * {self.item}, {given})")
            else:
                self.add(1, f"take_in(shared, {at} + {beside}, {given})")

    def _columns(self, chain: Chain, segment: Segment) -> str:
        """Where a segment begins in the whole product, as the beginning of a sum."""
        terms = []
        slot = segment.slot
        while slot != chain.stages[-1].slot:  # a slice, or a slice of one
            for kind, k in begins(self.plan, slot):
                terms.append(self.width(k) if kind == "width" else self.word(f"start{k}"))
            (slot,) = self.program.inputs[slot]
        return "".join(f"{term} + " for term in terms)

    def _product_items(self, stage: Product) -> list[Item]:
        chain = self._chain(stage)
        items = self._sums_items(stage)
        if chain.local:
            return items
        shares = Region(("shares", stage.slot), (), 0, UNITS)
        kind, which = stage.into
        for n, segment in enumerate(chain.segments):
            into = self._place_region(kind, which, (), segment.width, UNITS)
            reads = [shares, *([into] if stage.adds else [])]

            def write(depth: int, n: int = n, segment: Segment = segment) -> None:
                self._put_together(chain, stage, n, segment, depth)

            items.append(Item(write, reads, [into]))
        return items

    def _sums_items(self, stage: Product) -> list[Item]:
        """The sums of a product, from the operand to where ``_share`` finds them."""
        reads = self._region(stage.a, TILES, anywhere=True)
        writes = [Region(("shares", stage.slot), (), 0, TILES)]
        return [Item(lambda depth: self._multiply(stage, depth), reads, writes)]

    def _chain(self, stage: Product) -> Chain:
        return next(each for each in self.chains if stage in each.stages)

    def _multiply(self, stage: Product, depth: int) -> None:
        p = f"p{stage.slot}"
        base = base_of(self.plan, self.program, stage.a)
        place = self.program.places[base]
        kind, which = place.kind, place.which
        states = self.plan.state_slots
        slot = states[which] if kind in ("state", "after", "dstate", "before") else which
        distance = self._pitch(slot)
        name = "loose_" * (base != stage.a) + "streamed_" * (stage.slot in self.streamed)
        height, at, C = (self.word(f"{p}_{each}") for each in ("height", "at", "C"))
        on = ", ".join(self.word(f"{p}_{each}") for each in ("dr", "dc", "wrap", "below"))
        self._comment(depth, stage.slot)
        self.add(depth, "r = 0")
        self.add(depth, f"operand = {self._read(stage.a)}")
        self.add(depth, f"mine, on = ({p}_r, {p}_c, {p}_first, {p}_end), ({on})")
        given = f"{height}, shared, operand, {distance}, m, {at}, {C}, {p}_share, mine, on"
        self.add(depth, f"{name}product({given})")

    def _put_together(
        self, chain: Chain, stage: Product, n: int, segment: Segment, depth: int
    ) -> None:
        row = self._row(*stage.into)

        def body(depth: int) -> None:
            self.add(depth, f"to = {row} + j * {self.item}")
            value = self._share(stage, n)
            if stage.adds:
                value = f"load(to) + {value}"
            self.add(depth, f"store(to, {value})")

        self._over_units(self.units_of(segment.slot), depth, body)

    def _share(self, stage: Product, n: int) -> str:
        """A thread's result of a product."""
        p = f"p{stage.slot}"
        out, C, slices = (self.word(f"{p}_{name}") for name in ("out", "C", "slices"))
        at = f"{out} + r * {C} + {self.word(f'{p}_segment{n}')} + i"
        return f"share(shared, {at}, {slices}, rows * {C})"

    # Passes

    def _value_reads(self, slot: int, repeated: bool, inside: set[int], by: str) -> list[Region]:
        if self.plan.rows[slot].op == "number" or (slot in inside and not repeated):
            return []
        return self._region(slot, by, anywhere=repeated)

    def _single_regions(self, slot: int, computed: set[int]) -> list[Region]:
        """What a value of one number a row is made from."""
        op = self.plan.rows[slot].op
        if op == "number":
            return []
        if slot in computed and op in REDUCTIONS:
            return [Region(("total", slot), (), 0, ROWS_BY_THREADS)]
        if slot in computed and self.plan.single[slot]:
            inputs = self.program.inputs[slot]
            return [region for k in inputs for region in self._single_regions(k, computed)]
        return self._region(slot, ROWS_BY_THREADS, anywhere=True)

    def _single(self, slot: int, computed: set[int], known: set[int], depth: int) -> None:
        """Have the one number of a row in a register."""
        op = self.plan.rows[slot].op
        if slot in known or op == "number":
            return
        known.add(slot)
        if slot in computed and op in REDUCTIONS:
            value = f"shared[{self.word(f'total{slot}')} + r]"
        elif slot in computed and self.plan.single[slot]:
            for k in self.program.inputs[slot]:
                self._single(k, computed, known, depth)
            if op == "uniform":
                self._where(depth, "0")
            value = self._expression(slot)
        else:
            value = f"load({self._read(slot)})"
        self.add(depth, f"v{slot} = {value}")

    def _where(self, depth: int, unit: str | None = None) -> None:
        """Step and row that a random number belongs to."""
        self.add(depth, "t = word(begin, first + r) + s * onward")
        self.add(depth, "row = word(batch, first + r)")
        if unit is not None:
            self.add(depth, f"j = {unit}")

    def _single_item(self, slot: int, computed: set[int]) -> Item | None:
        """A row's one number, written down by the first part."""
        targets = self._targets(slot)
        if not targets:
            return None

        def write(depth: int) -> None:
            self._comment(depth, slot)
            self.add(depth, "if part == 0:")
            self.add(depth + 1, "for r in range(thread(), m, threads()):")
            self._single(slot, computed, set(), depth + 2)
            for target in targets:
                to = self._on(self._row(target.kind, target.which), target.offset)
                self._put(depth + 2, to, f"v{slot}", target.kind == "sum")

        reads = self._single_regions(slot, computed)
        writes = [
            self._place_region(t.kind, t.which, t.offset, None, ROWS_BY_THREADS) for t in targets
        ]
        return Item(write, reads, [region for region in writes if region.memory[0] not in NEVER])

    def _put(self, depth: int, to: str, value: str, adds: bool) -> None:
        self.add(depth, f"to = {to}")
        self.add(depth, f"store(to, {f'load(to) + {value}' if adds else value})")

    def _loop_item(self, slots: list[int], computed: set[int]) -> Item:
        """Values along a row, and sums of them."""
        plan, program = self.plan, self.program
        reductions = [slot for slot in slots if plan.rows[slot].op in REDUCTIONS]
        along = program.inputs[slots[0]][0] if slots[0] in reductions else slots[0]
        inside = set(slots) - set(reductions)
        by = ROWS_BY_WARPS if reductions else UNITS
        reads: list[Region] = []
        writes = [Region(("partial", slot), (), plan.classes[along], by) for slot in reductions]
        writes += [Region(("total", slot), (), 0, ROWS_BY_WARPS) for slot in reductions]
        for slot in slots:
            for k, repeated in zip(program.inputs[slot], self._repeated(slot), strict=True):
                if repeated or self._known_single(k, computed):
                    reads += self._single_regions(k, computed)
                else:
                    reads += self._value_reads(k, False, inside, by)
            if slot in inside:
                for t in self._targets(slot):
                    region = self._place_region(t.kind, t.which, t.offset, plan.classes[slot], by)
                    writes.append(region)
                    if t.kind == "sum":
                        reads.append(region)
        item = Item(None, reads, [each for each in writes if each.memory[0] not in NEVER])

        def values(depth: int) -> None:
            self._values(slots, reductions, computed, depth)

        def write(depth: int) -> None:
            width = self.units_of(along)
            if reductions:
                self._over_rows(reductions, width, depth, values)
            else:
                self._over_units(width, depth, values)

        item.write = write
        return item

    def _known_single(self, slot: int, computed: set[int]) -> bool:
        return slot in computed and (
            self.plan.single[slot] or self.plan.rows[slot].op in REDUCTIONS
        )

    def _over_rows(self, reductions: list[int], width: int, depth: int, body: Any) -> None:
        """A warp for each row, its lanes along the units, and then their sums."""
        self.add(depth, "for r in range(thread() // 32, m, threads() // 32):")
        for slot in reductions:
            nothing = {"sum": 0.0, "max": float("-inf"), "min": float("inf")}
            value = self.constant(nothing[self.plan.rows[slot].op])
            self.add(depth + 1, f"v{slot} = {value}")
        self.add(depth + 1, f"for i in range(thread() % 32, n{width}, 32):")
        self.add(depth + 2, f"j = u{width} + i")
        self._once(depth + 2, body)
        for slot in reductions:
            name = self.plan.rows[slot].op
            self.add(depth + 1, f"v{slot} = warp_{name}(v{slot})")
        self.add(depth + 1, "if thread() % 32 == 0:")
        for slot in reductions:
            self.add(depth + 2, "if parts == 1:")
            self.add(depth + 3, f"shared[{self.word(f'total{slot}')} + r] = v{slot}")
            self.add(depth + 2, "else:")
            self.add(depth + 3, f"store({self._partial(slot, 'part')}, v{slot})")

    def _partial(self, slot: int, part: str) -> str:
        """The address of what a part has for row r of a sum along it."""
        at = f"(((s & 1) * blocks() + block() - part + {part}) * rows + r) * {self.item}"
        return f"{self.word(f'partial{slot}')} + {at}"

    def _total_item(self, slot: int) -> Item:
        """The sum of what all parts have: a warp for each row, its lanes along the parts."""
        name = self.plan.rows[slot].op

        def write(depth: int) -> None:
            self.add(depth, "if parts > 1:")
            self.add(depth + 1, "for r in range(thread() // 32, m, threads() // 32):")
            nothing = {"sum": 0.0, "max": float("-inf"), "min": float("inf")}
            self.add(depth + 2, f"v{slot} = {self.constant(nothing[name])}")
            self.add(depth + 2, "for k in range(thread() % 32, parts, 32):")
            self.add(depth + 3, f"v{slot} = part_{name}(v{slot}, load({self._partial(slot, 'k')}))")
            self.add(depth + 2, f"v{slot} = warp_{name}(v{slot})")
            self.add(depth + 2, "if thread() % 32 == 0:")
            self.add(depth + 3, f"shared[{self.word(f'total{slot}')} + r] = v{slot}")

        reads = [Region(("partial", slot), (), None, ROWS_BY_WARPS)]
        return Item(write, reads, [Region(("total", slot), (), 0, ROWS_BY_WARPS)])

    def _values(
        self, slots: list[int], reductions: list[int], computed: set[int], depth: int
    ) -> None:
        plan, known = self.plan, set(slots) - set(reductions)
        have: set[int] = set()
        if any(plan.rows[slot].op == "uniform" for slot in slots):
            self._where(depth)
        at = len(self.lines)
        for slot in slots:
            self._comment(depth, slot)
            for k, repeated in zip(self.program.inputs[slot], self._repeated(slot), strict=True):
                if plan.rows[k].op == "number" or k in known or k in have:
                    continue
                if repeated or self._known_single(k, computed):
                    self._single(k, computed, have, depth)
                else:
                    have.add(k)
                    at = self._load(k, depth, at)
            if slot in reductions:
                name, source = plan.rows[slot].op, self.program.inputs[slot][0]
                self.add(depth, f"v{slot} = part_{name}(v{slot}, {self.value(source)})")
                continue
            self.add(depth, f"v{slot} = {self._expression(slot)}")
            for target in self._targets(slot):
                for to in self._rows_of(target):
                    self._put(depth, self._unit(to), f"v{slot}", target.kind == "sum")

    def _load(self, slot: int, depth: int, at: int) -> int:
        """A value at the thread's own row and unit. What is in memory is read at line ``at``,
        before anything is computed or stored: many reads are on their way at once then. Gives the
        line after it."""
        base = base_of(self.plan, self.program, slot)
        chain = self.chain_of.get(base)
        early: list[str] = []
        late: list[str] = []
        if chain is None or not chain.local or chain.goes_on:
            early.append(f"load({self._unit(self._read(slot))})")
        if chain is not None and chain.local:
            shares = [self._share(stage, chain.at(slot)) for stage in chain.stages]
            (early if self.shares_far else late).extend(shares)
        alone = len(early) + len(late) == 1
        names = [f"v{slot}" if alone else f"m{slot}_{n}" for n in range(len(early))]
        loads = [f"{name} = {load}" for name, load in zip(names, early, strict=True)]
        self.lines[at:at] = ["    " * depth + line for line in loads]
        if late or not alone:
            self.add(depth, f"v{slot} = {' + '.join([*names, *late])}")
        return at + len(loads)

    def _rows_of(self, target: Any) -> list[str]:
        """Where in memory a value goes."""
        return [self._on(self._row(target.kind, target.which), target.offset)]

    # The edges of a run

    def _prologue(self) -> None:
        if self.forward:
            self._first_states()
        else:
            self._first_gradients()

    def _first_states(self) -> None:
        """States before the first step; rows that have no step end with them."""
        for k, slot in enumerate(self.plan.state_slots):

            def body(depth: int, k: int = k, slot: int = slot) -> None:
                self.add(depth, f"p = {self._batch_row(f'initial{k}', slot)}")
                self._copy(depth, "p", self._state_row(k, "(s0 - k0)"))
                self.add(depth, "if word(active, s0) <= first + r:")
                self._copy(depth + 1, "p", self._batch_row(f"last{k}", slot))

            self.add(1, "m = R")
            self._over_state(k, 1, body)

    def _carried(self) -> list[int]:
        return [k for k, after in enumerate(self.plan.gradients.after) if after is not None]

    def _first_gradients(self) -> None:
        """Gradients of the last states, and zeros where gradients are added up."""
        plan, zero = self.plan, self.constant(0.0)
        self.add(1, f"if not {self.word('more')}:  # nothing has come back yet")
        self.add(2, "m = R")
        for k in self._carried():
            slot = plan.state_slots[k]

            def body(depth: int, k: int = k, slot: int = slot) -> None:
                base, bytes_ = self.word(f"dstate{k}"), self._pitch(slot)
                given = self.word(f"dlast{k}")
                self.add(depth, f"v = {zero}")
                self.add(depth, f"if {given}:")
                address = f"{self._batch_row(f'dlast{k}', slot)} + j * {self.item}"
                self.add(depth + 1, f"v = load({address})")
                self.add(depth, f"for k in range({RING}):")
                to = f"{base} + (k * B + first + r) * {bytes_} + j * {self.item}"
                self.add(depth + 1, f"store({to}, v)")
                self.add(depth, f"if {self.word('resets')}:")
                to = f"{self._batch_row(f'dreset{k}', slot)} + j * {self.item}"
                self.add(depth + 1, f"store({to}, {zero})")

            self._over_state(k, 2, body)
        for k in plan.sums_on_the_way():

            def clear(depth: int, k: int = k) -> None:
                self.add(depth, f"store({self._row('sum', k)} + j * {self.item}, {zero})")

            self._over_units(self.units_of(self.captures[k]), 2, clear)

    def _resets_item(self) -> Item:
        """Rows that begin anew, before a step."""
        slots = self.plan.state_slots
        regions = [
            Region(("state", k), (), self.plan.classes[s], UNITS) for k, s in enumerate(slots)
        ]

        def write(depth: int) -> None:
            resets, places = self.word("resets"), self.word("slots")
            self.add(depth, f"if {resets}:  # rows that begin anew, before this step")
            for k, slot in enumerate(slots):

                def body(depth: int, k: int = k, slot: int = slot) -> None:
                    now = self._state_row(k, f"((s - k0) * {places})")
                    self.add(depth, "t = word(begin, first + r) + s * onward")
                    self.add(depth, f"if flag({resets}, t * B + word(batch, first + r)):")
                    self._copy(depth + 1, self._batch_row(f"reset{k}", slot), now)
                    self.add(depth, f"elif {places} == 2 and s > k0:")
                    old = self._state_row(k, f"((s - k0) * {places} - 1)")
                    self._copy(depth + 1, old, now)

                self._over_state(k, depth + 1, body)

        return Item(write, regions, regions)

    def _end_items(self) -> list[Item]:
        if self.forward:
            return self._ends() if self.plan.state_slots else []
        return [self._back_item(k) for k in self._carried()]

    def _ends(self) -> list[Item]:
        """Rows that end here leave their last state; at a checkpoint all do."""
        items = []
        for k, slot in enumerate(self.plan.state_slots):

            def write(depth: int, k: int = k, slot: int = slot) -> None:
                every, width = self.word("every"), self.width(slot)
                self.add(depth, "going = 0")
                self.add(depth, "if s + 1 < s1:")
                self.add(depth + 1, "going = min(max(word(active, s + 1) - first, 0), R)")
                self.add(depth, f"if going < m or ({every} and (s + 1) % {every} == 0):")

                def body(depth: int) -> None:
                    self.add(depth, f"p = {self._row('after', k)}")
                    self.add(depth, "if r >= going:  # the row ends here")
                    self._copy(depth + 1, "p", self._batch_row(f"last{k}", slot))
                    self.add(depth, f"elif {every}:  # perhaps a checkpoint")
                    row = f"((s + 1) // {every} - 1) * B + word(batch, first + r)"
                    self.add(depth + 1, f"if (s + 1) % {every} == 0:")
                    to = f"{self.word(f'checkpoint{k}')} + ({row}) * {width} * {self.item}"
                    self._copy(depth + 2, "p", to)

                self._over_state(k, depth + 1, body)

            region = Region(("state", k), (), self.plan.classes[slot], UNITS)
            items.append(Item(write, [region]))
        return items

    def _back_item(self, k: int) -> Item:
        """What goes back to where rows began anew; zero where no gradient goes back."""
        slot, zero = self.plan.state_slots[k], self.constant(0.0)
        region = Region(("dstate", k), (), self.plan.classes[slot], UNITS)
        unwritten = self.plan.gradients.before[k] is None

        def write(depth: int) -> None:
            if unwritten:

                def clear(depth: int) -> None:
                    self.add(depth, f"store({self._row('before', k)} + j * {self.item}, {zero})")

                self._over_state(k, depth, clear)
            resets = self.word("resets")
            self.add(depth, f"if {resets}:  # what goes back to where rows began anew")

            def body(depth: int) -> None:
                self.add(depth, "t = word(begin, first + r) + s * onward")
                self.add(depth, f"if flag({resets}, t * B + word(batch, first + r)):")
                self.add(depth + 1, f"p = {self._row('before', k)} + j * {self.item}")
                self.add(depth + 1, f"to = {self._batch_row(f'dreset{k}', slot)} + j * {self.item}")
                self.add(depth + 1, "store(to, load(to) + load(p))")
                self.add(depth + 1, f"store(p, {zero})")

            self._over_state(k, depth + 1, body)

        return Item(write, [region], [region])

    def _gather_all(self, depth: int) -> None:
        for slot in self.program.gathered:
            row = self.plan.rows[slot]

            def body(depth: int, slot: int = slot, row: Any = row) -> None:
                to = f"{self._row('scratch', slot)} + j * {self.item}"
                self.add(depth, f"to = {to}")
                self.add(depth, "if r < m:")
                source = self._user_row(f"{row.op}{row.detail}")
                self.add(depth + 1, f"store(to, load({source} + j * {self.item}))")
                self.add(depth, "else:")
                self.add(depth + 1, f"store(to, {self.constant(0.0)})")

            self.add(depth, f"# %{slot} = {row.op} {row.detail}, in the order of the run")
            self._over_units(self.units_of(slot), depth, body, rows="R")
