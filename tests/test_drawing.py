"""Pictures: everything of a trace stands in them, nothing lies upon anything else."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import combinations, pairwise

import numpy as np
import pytest
from cells import CELLS, make_inputs
from hypothesis import given
from hypothesis import strategies as st

import tinygrad_seq as tgs
from tinygrad_seq import nn

pytest.importorskip("matplotlib")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from tinygrad_seq import drawing
from tinygrad_seq.drawing import canvas, layout, reading
from tinygrad_seq.recurrence import naming

XS = np.ones((1, 2, 3), "float32")


def texts(figure) -> list[str]:
    found = [text for ax in figure.axes for text in ax.texts]
    return [text.get_text() for text in found if text.get_text()]


def extents(figure) -> dict[str, list]:
    """Where texts and boxes are, in pixels."""
    renderer = FigureCanvasAgg(figure)
    renderer.draw()
    (ax,) = figure.axes
    shown = [text for text in ax.texts if text.get_text()]
    boxes = [patch for patch in ax.patches if isinstance(patch, FancyBboxPatch)]
    return {
        "texts": [(t.get_text(), t.get_window_extent()) for t in shown],
        "boxes": [(k, patch.get_window_extent()) for k, patch in enumerate(boxes)],
    }


def assert_apart(figure):
    width, height = FigureCanvasAgg(figure).get_width_height()
    for what in extents(figure).values():
        for name, box in what:
            assert np.isfinite(box.extents).all()
            assert 0 <= box.x0 <= box.x1 <= width, name
            assert 0 <= box.y0 <= box.y1 <= height, name
        for (a, first), (b, second) in combinations(what, 2):
            assert not first.overlaps(second), (a, b)


class TestCells:
    @pytest.mark.parametrize("name", CELLS)
    def test_all_of_the_trace_is_there(self, name, rng):
        cell = CELLS[name](rng, "float32", 3, 5)
        xs = make_inputs(name, rng, 1, 2, 3, "float32")
        figure = drawing.draw_cell(cell, xs)
        shown = texts(figure)
        step, nodes = reading.read(cell, xs, None)
        rows = step.trace.rows[: step.length]

        live = {*step.y_slots, *step.state_slots}
        for slot in reversed(range(len(rows))):
            live |= set(rows[slot].inputs) if slot in live else set()
        written = {
            "matrix",
            "capture",
            "units",
            "number",
            "copy",
            "x",
            "state",
        }  # in boxes or at the ends
        lines = [slot for slot in sorted(live) if rows[slot].op not in written]
        assert [node.line for node in nodes if node.kind not in ("input", "output")] == lines
        for node in nodes:
            assert shown.count(node.text) >= sum(each.text == node.text for each in nodes)
        for parameter, _ in cell.named_parameters():
            word = rf"(?<!\w){re.escape(naming.short(parameter))}(?!\w)"
            assert any(re.search(word, text) for text in shown), parameter
        assert_apart(figure)

    def test_values_of_several_axes(self):
        def cell(x, S):
            S = S + x[:, :, None] * x[:, None, :]
            return S.sum(axis=1), S

        shown = texts(drawing.draw_cell(cell, XS, np.zeros((2, 3, 3), "float32")))
        assert {"repeat", "choose units", "sum along an axis", "S′"} <= set(shown)

    def test_lstm(self):
        shown = texts(drawing.draw_cell(nn.LSTMCell(3, 4), XS))
        for text in (
            "x",
            "h",
            "c",
            "y = h′",
            "c′",
            "W_ih ·",
            "W_hh ·",
            "+ b",
            "LSTMCell, one step",
        ):
            assert shown.count(text) == 1
        assert (shown.count("σ"), shown.count("tanh"), shown.count("×")) == (3, 2, 3)
        for gate, cut in zip("ifgo", ("[:H]", "[H:2H]", "[2H:3H]", "[3H:]"), strict=True):
            assert gate in shown
            assert cut in shown

    def test_gru_cuts_its_weights(self):
        shown = texts(drawing.draw_cell(nn.GRUCell(3, 4), XS))
        assert {"W_ih ·", "W_hh[:2H] ·", "W_hh[2H:] ·", "1 −", "r", "z", "n"} <= set(shown)
        assert "W_hh ·" in texts(drawing.draw_cell(nn.GRUCell(3, 4, reset_after=True), XS))

    def test_lstm_has_four_steps(self):
        assert parts_of(nn.LSTMCell(3, 4)) == {
            "forget": ["[H:2H]", "σ", "×"],
            "input": ["[:H]", "[2H:3H]", "σ", "tanh", "×"],
            "memory": ["+"],
            "output": ["[3H:]", "σ", "tanh", "×"],
            "": ["W_ih ·", "W_hh ·", "+", "+ b"],
        }

    def test_cells_that_derive_from_it_have_them_too(self):
        class Peephole(nn.LSTMCell):
            def forward(self, x, state):
                h, c = state
                z = x @ self.weight_ih.T + h @ self.weight_hh.T
                i, f, g, o = tgs.split(z, 4, axis=-1)
                new = tgs.sigmoid(f + 0.1 * c) * c + tgs.sigmoid(i + 0.2 * c) * tgs.tanh(g)
                h = tgs.sigmoid(o + 0.3 * new) * tgs.tanh(new)
                return h, (h, new)

        parts = parts_of(Peephole(3, 4))
        assert parts["forget"] == ["[H:2H]", "+", "σ", "×"]
        assert parts["memory"] == ["+"]
        assert sorted(parts["output"]) == sorted(["[3H:]", "× 0.3", "+", "σ", "tanh", "×"])

        class NoGates(nn.LSTMCell):
            def forward(self, x, state):
                h, c = state
                return h, (h, c + x @ self.weight_ih.T[:, :4])

        assert set(parts_of(NoGates(3, 4))) == {""}
        shown = texts(drawing.draw_cell(NoGates(3, 4), XS))
        assert "W_ih[:H] ·" in shown
        assert "with learned parameters" in shown

    def test_colours_and_legend(self):
        cell = nn.LSTMCell(3, 4)

        def colours(**options):
            figure = drawing.draw_cell(cell, XS, **options)
            boxes = [p for p in figure.axes[0].patches if isinstance(p, FancyBboxPatch)]
            return {to_hex(box.get_facecolor()) for box in boxes}, texts(figure)

        both, shown = colours()
        assert len(both) == 6  # four steps, the ends, the others
        assert {"forget", "input", "memory", "output"} <= set(shown)
        one, shown = colours(highlight="memory")
        assert len(one) == 3
        assert "memory" in shown
        assert "forget" not in shown
        assert "LSTMCell, one step: memory" in shown
        assert "mine" in colours(title="mine")[1]

    def test_parts_by_names_and_lines(self):
        cell = nn.GRUCell(3, 4)
        _, nodes = reading.read(cell, XS, None)
        tanh = next(node.line for node in nodes if node.text == "tanh")
        assert f"%{tanh}" in texts(drawing.draw_cell(cell, XS, lines=True))
        reading.assign_parts(nodes, {"reset": "r", "update": ["z"], "new": [tanh]})
        found = {node.text: node.part for node in nodes}
        assert (found["1 −"], found["W_hh[2H:] ·"], found["tanh"]) == ("update", "reset", "new")
        assert found["W_ih ·"] == found["y = h′"] == ""
        reading.assign_parts(nodes, {"all": ["h′"]})
        assert nodes[-2].part == "all"

    def test_names_of_the_cells_own_code(self):
        class Pair(nn.Module):
            def __init__(self):
                self.inner, self.scale = nn.Linear(3, 4, rng=0), nn.parameter(np.ones(4))

            def forward(self, x, memory):
                candidate = self.scale * self.inner(x)
                return {"seen": candidate, "twice": 2 * memory}, memory - candidate

        shown = texts(drawing.draw_cell(Pair(), XS, np.zeros((2, 4), "float32")))
        wanted = {"x", "memory", "memory′", "seen", "twice", "scale ×", "+ inner.b", "× 2", "a − b"}
        assert wanted <= set(shown)
        assert {"candidate", "a", "b"} <= set(shown)

    def test_a_function_and_what_it_closes_over(self):
        W = tgs.tensor(np.ones((3, 4), "float32"), requires_grad=True)
        mask = tgs.tensor(np.ones((3, 4), "float32"))
        half = tgs.tensor(0.5)

        turned = tgs.tensor(np.ones((4, 3), "float32"), requires_grad=True).T
        turned.sum().backward()

        def leaky(x, h):
            h = (x @ (W * mask) + x @ W[:, 0:4] + x @ turned) * half + h @ tgs.eye(4)
            return h, h

        shown = texts(drawing.draw_cell(leaky, XS, np.zeros((2, 4), "float32")))
        assert {"leaky, one step", "· (from W, mask)", "· W[:]"} <= set(shown)
        assert {"· turned", "× half", "· constant"} <= set(shown)

    def test_a_function_and_modules_that_it_closes_over(self):
        inner, ways = nn.GRUCell(4, 4), {"in": [nn.Linear(3, 4)], "out": nn.Linear(4, 2)}
        ways["all"] = ways

        def cell(x, h):
            y, h = inner(tgs.tanh(ways["in"][0](x)), h)
            return ways["out"](y), h

        shown = texts(drawing.draw_cell(cell, XS, np.zeros((2, 4), "float32")))
        assert {"ways.in.0.W ·", "+ ways.in.0.b", "inner.W_ih ·", "+ ways.out.b"} <= set(shown)
        state = np.zeros((2, 4), "float32")
        for each in (cell, lambda x, h: inner(x, h)):
            xs = XS if each is cell else np.zeros((1, 2, 4), "float32")
            said = str(tgs.explain(each, xs, state))
            assert "is inner.W_ihᵀ" in said
            assert "constant" not in said

    def test_the_mask_of_a_sequence_has_a_name(self):
        cell = nn.GRUCell(3, 4, recurrent_dropout=0.5)
        assert "× mask" in texts(drawing.draw_cell(cell, XS))
        assert "is mask" in str(tgs.explain(cell, XS))

    def test_frozen_parameters_have_names(self):
        cell = nn.LSTMCell(3, 4)
        for parameter in cell.parameters():
            parameter.requires_grad = False
        shown = texts(drawing.draw_cell(cell, XS))
        assert {"W_ih ·", "W_hh ·", "+ b"} <= set(shown)

    def test_states_by_name_and_what_passes_through(self):
        def late(x, state):
            return (state["old"], x), {"old": state["new"], "new": x}

        state = {name: np.zeros((2, 3), "float32") for name in ("old", "new")}
        figure = drawing.draw_cell(late, XS, state)
        assert {"old", "new", "old′", "x", "y[0]"} <= set(texts(figure))
        assert_apart(figure)

    def test_axes_and_files(self, tmp_path):
        whole = Figure(figsize=(8, 3))
        ax = whole.subplots(1, 2)[1]
        assert drawing.draw_cell(nn.RNNCell(3, 4), XS, ax=ax) is whole
        sizes = [text.get_fontsize() for text in ax.texts]
        alone = drawing.draw_cell(nn.RNNCell(3, 4), XS, path=tmp_path / "rnn.png")
        assert max(sizes) < max(text.get_fontsize() for text in alone.axes[0].texts)
        assert (tmp_path / "rnn.png").stat().st_size > 10_000
        assert min(alone.get_size_inches() * canvas.DPI) > 100

    def test_errors(self):
        cell = nn.GRUCell(3, 4)
        with pytest.raises(
            ValueError, match=r"parts\['reset'\] has 'q', expected a line .*: from_x"
        ):
            drawing.draw_cell(cell, XS, parts={"reset": ["q"]})
        with pytest.raises(ValueError, match=r"parts is 'reset', expected a dict"):
            drawing.draw_cell(cell, XS, parts="reset")
        with pytest.raises(ValueError, match=r"has 0, expected a line"):
            drawing.draw_cell(cell, XS, parts={"input": [0]})
        with pytest.raises(ValueError, match=r"highlight='memory' was given, .* has none"):
            drawing.draw_cell(cell, XS, highlight="memory")
        with pytest.raises(ValueError, match=r"expected one of the parts: forget, input, memory"):
            drawing.draw_cell(nn.LSTMCell(3, 4), XS, highlight="f")
        with pytest.raises(ValueError, match=r"draw_cell: the class GRUCell was given as the cell"):
            drawing.draw_cell(nn.GRUCell, XS)
        with pytest.raises(ValueError, match=r"draw_cell: .* no state was given"):
            drawing.draw_cell(lambda x, h: (h, h), XS)
        whole = np.ones((1, 2, 3), int)
        with pytest.raises(ValueError, match="expected a floating one"):
            drawing.draw_cell(lambda x, h: (h, h), whole, whole[0])
        before = sys.getprofile()
        with pytest.raises(tgs.TraceError, match=r"choose with tgs\.where"):
            drawing.draw_cell(
                lambda x, h: (x if x.sum(axis=-1) > 0 else h, h), XS[:, :1], XS[0, :1]
            )
        assert sys.getprofile() is before


def parts_of(cell) -> dict[str, list[str]]:
    step, nodes = reading.read(cell, XS, None)
    reading.assign_parts(nodes, reading.lstm_parts(cell, step, nodes))
    found: dict[str, list[str]] = {}
    for node in nodes:
        if node.kind not in ("input", "output"):
            found.setdefault(node.part, []).append(node.text)
    return found


# Layout --------------------------------------------------------------------------------------


@st.composite
def graphs(draw):
    """Boxes of many sizes; edges from earlier ones to later ones."""
    n = draw(st.integers(1, 14))
    length = st.floats(0.0, 2.0)
    boxes = [layout.Box(*(draw(length) for _ in range(4))) for _ in range(n)]
    pairs = [(a, b) for b in range(n) for a in range(b)]
    edges = draw(st.lists(st.sampled_from(pairs), max_size=24)) if pairs else []
    return boxes, sorted(edges, key=lambda edge: edge[1])


@given(graphs())
def test_layout(graph):
    boxes, edges = graph
    made = layout.lay_out(boxes, edges)
    assert np.isfinite(made.places).all()
    width, height = made.size
    around = []
    for (x, y), box in zip(made.places, boxes, strict=True):
        sides = x - box.width / 2 - box.beside, x + box.width / 2 + box.beside
        ends = y - box.below, y + box.above
        assert -1e-9 <= sides[0] <= sides[1] <= width + 1e-9
        assert -1e-9 <= ends[0] <= ends[1] <= height + 1e-9
        around.append((sides, ends))
    for (a_sides, a_ends), (b_sides, b_ends) in combinations(around, 2):
        beside = a_sides[1] <= b_sides[0] + 1e-9 or b_sides[1] <= a_sides[0] + 1e-9
        assert beside or a_ends[1] < b_ends[0] + 1e-9 or b_ends[1] < a_ends[0] + 1e-9
    for (a, b), route in zip(edges, made.routes, strict=True):
        (x_a, y_a), (x_b, y_b) = made.places[a], made.places[b]
        assert route[0] == pytest.approx((x_a + boxes[a].width / 2, y_a))
        assert route[-1] == pytest.approx((x_b - boxes[b].width / 2, y_b))
        assert all(p[0] <= q[0] + 1e-9 for p, q in pairwise(route))
        for start, end in zip(route[::2], route[1::2], strict=True):
            assert start[1] == end[1]  # level
            middle = (start[0] + end[0]) / 2, start[1]
            for n, (sides, ends) in enumerate(around):
                if n not in (a, b):
                    inside = sides[0] < middle[0] < sides[1] and ends[0] < middle[1] < ends[1]
                    assert not inside, f"the line {a} to {b} runs through {n}"


def test_few_lines_cross():
    for cell, crossings in ((nn.RNNCell(3, 4), 0), (nn.LSTMCell(3, 4), 0), (nn.GRUCell(3, 4), 2)):
        _, nodes = reading.read(cell, XS, None)
        edges = [(a, b) for b, node in enumerate(nodes) for a in node.inputs]
        routes = layout.lay_out([layout.Box(0.4, 0.1, 0.2, 0.2)] * len(nodes), edges).routes
        gaps = {gap for route in routes for gap in zip(route[1::2], route[2::2], strict=False)}
        crossed = [
            (one, two)
            for one, two in combinations(gaps, 2)
            if one[0][0] == two[0][0] and (one[0][1] - two[0][1]) * (one[1][1] - two[1][1]) < -1e-9
        ]
        assert len(crossed) <= crossings, cell


def test_what_is_in_the_way_moves_together():
    assert layout._apart([1.0, 0.0, 5.0], [1.0, 1.0]) == pytest.approx([0.0, 1.0, 5.0])
    assert layout._apart([], []) == []


# Other pictures ------------------------------------------------------------------------------


def arrows(figure, colour: str) -> int:
    patches = figure.axes[0].patches
    drawn = [p for p in patches if isinstance(p, FancyArrowPatch)]
    return sum(to_hex(p.get_edgecolor()) == colour for p in drawn)


class TestUnrolled:
    def test_the_same_letters_at_every_step(self):
        figure = drawing.draw_unrolled(3)
        shown = texts(figure)
        assert all(shown.count(f"${letter}$") == 4 for letter in "UVW")  # folded, and three steps
        assert {"$x$", "$h$", "$o$", "$h_{0}$", "$x_{1}$", "$h_{2}$", "$o_{3}$"} <= set(shown)
        assert arrows(figure, canvas.RED) == 0
        assert_apart(figure)

    def test_backward_and_where_it_is_cut(self):
        assert arrows(drawing.draw_unrolled(5, backward=True), canvas.RED) == 5 + 4
        figure = drawing.draw_unrolled(5, truncate=2)
        assert arrows(figure, canvas.RED) == 3 + 2 + 2  # down, back, and the line of the cut
        assert any("$h_{5}$ stops at $h_{3}$" in text for text in texts(figure))
        assert_apart(figure)
        assert_apart(drawing.draw_unrolled(2, truncate=1))

    def test_errors(self):
        with pytest.raises(ValueError, match=r"draw_unrolled: T: 0 was given"):
            drawing.draw_unrolled(0)
        with pytest.raises(
            ValueError, match=r"truncate=4 was given for T = 4 steps, expected 1 to 3"
        ):
            drawing.draw_unrolled(4, truncate=4)
        with pytest.raises(ValueError, match=r"draw_unrolled: truncate: 0 was given"):
            drawing.draw_unrolled(4, truncate=0)


def test_correspondences(tmp_path):
    path = tmp_path / "kinds.png"
    figure = drawing.draw_correspondences(path=path)
    kinds = ["one to one", "one to sequence", "sequence to one", "sequence to sequence"]
    assert [text for text in texts(figure) if " to " in text and len(text) < 21] == kinds
    assert path.exists()
    assert_apart(figure)


def test_windows(tmp_path):
    """Every block, and predictions that stand in all windows after them."""
    path = tmp_path / "windows.png"
    figure = drawing.draw_windows(7, 3, 2, path=path)
    shown = texts(figure)
    assert "3 blocks of 3 and the one 2 steps ahead" in shown
    for t, times in zip(range(1, 8), (2, 3, 4, 3, 3, 2, 2), strict=True):  # the series, the blocks
        given = {1: 1, 2: 2, 3: 3}.get(t, 0)  # in the roll-out
        assert shown.count(f"$x_{{{t}}}$") == times + given
    assert [shown.count(rf"$\hat x_{{{t}}}$") for t in range(4, 8)] == [4, 3, 2, 1]
    assert arrows(figure, canvas.RED) == 3
    assert_apart(figure)
    assert_apart(drawing.draw_windows(12, 5))
    assert "1 block of 1 and the next one" in texts(drawing.draw_windows(2, 1))
    assert path.exists()
    with pytest.raises(ValueError, match=r"4 positions were given .*, expected at least 5"):
        drawing.draw_windows(4, 3, 2)


def test_activations():
    figure = drawing.draw_activations()
    assert [ax.get_title() for ax in figure.axes] == ["sigmoid", "tanh", "ReLU"]
    for ax, largest in zip(figure.axes, (0.25, 1.0, 1.0), strict=True):
        curve, slope = ax.lines[:2]
        z, y = curve.get_data()
        assert slope.get_ydata().max() == pytest.approx(largest)
        away = np.abs(z[:-1] + z[1:]) > 0.1  # from the bend at 0
        found = np.diff(y)[away] / np.diff(z)[away]
        between = (slope.get_ydata()[:-1] + slope.get_ydata()[1:])[away] / 2
        np.testing.assert_allclose(found, between, atol=1e-4)


class TestGates:
    def test_what_is_drawn_is_what_was_given(self, rng, tmp_path):
        gate, memory = rng.random((9, 4)), rng.standard_normal((9, 4))
        inputs = {"value": rng.random(9), "flag": np.zeros(9)}
        path = tmp_path / "gates.png"
        gates = {"forget": tgs.tensor(gate, requires_grad=True), "memory": memory}
        figure = drawing.draw_gates(gates, inputs, title="here", path=path)
        assert path.stat().st_size > 10_000
        top, forget, _, state, _ = figure.axes
        assert len(top.lines) == 2
        np.testing.assert_array_equal(forget.images[0].get_array(), gate.T)
        assert forget.images[0].get_clim() == (0.0, 1.0)
        assert sum(state.images[0].get_clim()) == 0.0  # around zero
        assert (forget.get_ylabel(), state.get_ylabel()) == ("forget", "memory")
        assert forget.yaxis.get_major_formatter()(1.0) == "unit 1"

    def test_lines_and_other_inputs(self, rng, tmp_path):
        gate = rng.random((9, 4))
        figure = drawing.draw_gates({"g": gate}, rng.random((9, 2)), lines=True)
        top, panel = figure.axes
        assert (len(top.lines), len(panel.lines)) == (2, 4)
        np.testing.assert_array_equal(panel.lines[1].get_ydata(), gate[:, 1])
        named = [text.get_text() for text in panel.get_legend().get_texts()]
        assert named == ["unit 0", "unit 1", "unit 2", "unit 3"]
        (one, _) = drawing.draw_gates({"g": gate[:, :1]}).axes
        assert [tick for tick in one.get_yticks() if -0.5 <= tick <= 0.5] == [0.0]
        many = drawing.draw_gates({"g": rng.random((9, 7))}, lines=True).axes[0]
        assert many.get_legend() is None
        gate[3, 2] = np.nan
        drawing.draw_gates({"g": gate}, path=tmp_path / "nan.png")
        drawing.draw_gates({"g": gate * np.nan}, np.ones(9), path=tmp_path / "nan.png")

    def test_errors(self):
        gate = np.ones((9, 4))
        with pytest.raises(
            ValueError, match=r"draw_gates: an empty dict was given, expected arrays by name"
        ):
            drawing.draw_gates({})
        with pytest.raises(
            ValueError, match=r"draw_gates: a ndarray was given, expected arrays by name"
        ):
            drawing.draw_gates(gate)
        with pytest.raises(tgs.ShapeError, match=r"f has shape \(9, 2, 4\), .* choose one row"):
            drawing.draw_gates({"f": np.ones((9, 2, 4))})
        with pytest.raises(tgs.ShapeError, match=r"g has 8 steps, expected T = 9"):
            drawing.draw_gates({"f": gate, "g": gate[1:]})
        with pytest.raises(tgs.ShapeError, match=r"x\[0\] has 3 steps, expected T = 9"):
            drawing.draw_gates({"f": gate}, np.ones(3))
        with pytest.raises(tgs.ShapeError, match=r"inputs has shape \(9, 2, 1\), expected \(9,\)"):
            drawing.draw_gates({"f": gate}, np.ones((9, 2, 1)))
        with pytest.raises(tgs.ShapeError, match=r"flag has shape \(9, 1\), expected \(T,\)"):
            drawing.draw_gates({"f": gate}, {"flag": np.ones((9, 1))})


class TestGradients:
    def test_logarithms_and_what_has_none(self, tmp_path):
        path = tmp_path / "norms.png"
        norms = {"a": np.logspace(-9, 0, 10), "b": [0, 0, 1e-3, np.nan, np.inf, 1, 1, 1, 1, 1]}
        figure = drawing.draw_gradients(norms, title="vanishing", path=path)
        (ax,) = figure.axes
        assert ax.get_yscale() == "log"
        assert ax.get_ylim() == pytest.approx((1e-9 / 3, 3.0))
        down = [line for line in ax.lines if line.get_marker() == "v"]
        up = [line for line in ax.lines if line.get_marker() == "^"]
        assert [list(line.get_xdata()) for line in down] == [[], [0, 1]]
        assert [list(line.get_xdata()) for line in up] == [[], [3, 4]]
        assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]

    @pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
    def test_nothing_to_draw(self, value, tmp_path):
        ax = Figure().subplots()
        figure = drawing.draw_gradients({"a": np.full(5, value)}, ax=ax, path=tmp_path / "none.png")
        assert figure is ax.figure
        assert np.isfinite(ax.get_ylim()).all()

    def test_errors(self):
        with pytest.raises(ValueError, match=r"a has -1 in it, expected norms"):
            drawing.draw_gradients({"a": [1.0, -1.0]})
        with pytest.raises(tgs.ShapeError, match=r"a has shape \(2, 2\), expected \(T,\)"):
            drawing.draw_gradients({"a": np.ones((2, 2))})
        with pytest.raises(tgs.ShapeError, match=r"a has shape \(0,\), .* T at least 1"):
            drawing.draw_gradients({"a": []})
        with pytest.raises(ValueError, match=r"draw_gradients: a list was given"):
            drawing.draw_gradients([1])


# Without matplotlib --------------------------------------------------------------------------


def test_matplotlib_is_imported_when_something_is_drawn():
    code = "import sys, tinygrad_seq.drawing; print([m for m in sys.modules if 'matplotlib' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "draw",
    [
        lambda: drawing.draw_cell(nn.RNNCell(3, 4), XS),
        drawing.draw_unrolled,
        drawing.draw_correspondences,
        drawing.draw_windows,
        drawing.draw_activations,
        lambda: drawing.draw_gates({"a": np.ones((2, 2))}),
        lambda: drawing.draw_gradients({"a": [1.0]}),
    ],
)
def test_its_absence_says_what_to_install(draw, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "tinygrad-seq\[examples\]"'):
        draw()


def test_states_of_stacked_layers_have_names_of_their_own():
    cell = tgs.nn.as_cell(tgs.nn.LSTM(3, 4, num_layers=2))
    _, nodes = reading.read(cell, tgs.zeros(1, 1, 3), None)
    ends = [node.text for node in nodes if node.kind in ("input", "output")]
    assert ends == ["x", "h", "c", "h₂", "c₂", "y = h₂′", "h′", "c′", "c₂′"]
