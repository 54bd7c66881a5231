"""Pictures of recurrent networks: unrolled, their gates, their gradients.

Imports the engine and canvas.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from tinygrad_seq.creation import tensor
from tinygrad_seq.drawing.canvas import (
    BLUE,
    DPI,
    GREEN,
    GREY,
    LIGHT,
    ORANGE,
    PALE,
    PURPLE,
    RED,
    Canvas,
    finish,
    matplotlib_figure,
)
from tinygrad_seq.elementwise import relu, sigmoid, tanh
from tinygrad_seq.errors import ShapeError, whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (BLUE, RED, GREEN, PURPLE, ORANGE, GREY)
BESIDE = 0.08  # half the distance between the ways there and back, in inches
NAMED = 6  # so many lines of units get a legend


def draw_unrolled(
    T: int = 4,
    *,
    backward: bool = False,
    truncate: int | None = None,
    ax: Axes | None = None,
    path: str | Path | None = None,
) -> Figure:
    """The simple recurrent network, folded and unrolled over T steps.

        h_t = tanh(W x_t + U h_{t-1} + b)    o_t = f(V h_t + c)

    The same W, U and V stand at every step. ``backward`` adds the way of the gradient, from each
    output down and back through time. ``truncate=k`` cuts it as truncated backpropagation does: the
    error of h_T stops at h_{T-k}.
    """
    T = whole(T, "draw_unrolled: T")
    if truncate is not None and whole(truncate, "draw_unrolled: truncate") >= T:
        raise ValueError(
            f"draw_unrolled: truncate={truncate} was given for T = {T} steps, expected 1 to "
            f"{T - 1}: that many steps back, and then the cut"
        )
    backward = backward or truncate is not None
    first = T - truncate if truncate is not None else 1  # the step at which the gradient ends
    left, apart, low = 4.0, 1.4, 0.5 if backward else 0.0
    x_y, h_y, o_y = low + 0.6, low + 1.75, low + 2.9
    canvas = Canvas(ax, left + apart * T, low + 3.6)

    def step(x: float, t: str, shift: float) -> None:
        for y, letter, colour in ((x_y, "x", PALE), (h_y, "h", LIGHT[BLUE]), (o_y, "o", PALE)):
            text = f"${letter}_{{{t}}}$" if t else f"${letter}$"
            canvas.box(x, y, text, 0.5, 0.5, fill=colour, round_by=0.25, size=12)
        for a, b, weight in ((x_y, h_y, "W"), (h_y, o_y, "V")):
            canvas.arrow((x - shift, a + 0.25), (x - shift, b - 0.25))
            canvas.text(x - shift - 0.16, (a + b) / 2, f"${weight}$", 12, color=BLUE)

    step(0.8, "", 0.0)
    canvas.arrow((1.04, h_y - 0.1), (1.04, h_y + 0.1), connectionstyle="arc3,rad=4")
    canvas.text(1.6, h_y, "$U$", 12, color=BLUE)
    canvas.arrow((1.95, h_y), (2.6, h_y), linewidth=2.5, color=GREY)
    canvas.text(2.27, h_y + 0.2, "unrolled", 9, color=GREY)

    shift = BESIDE if backward else 0.0
    columns = [left - apart / 2 + apart * t for t in range(T + 1)]
    columns[0] += 0.25
    canvas.box(columns[0], h_y, "$h_{0}$", 0.42, 0.42, edge=GREY, round_by=0.21, size=11)
    for t in range(1, T + 1):
        x, before = columns[t], columns[t - 1]
        step(x, str(t), shift)
        canvas.arrow((before + 0.22, h_y + shift), (x - 0.25, h_y + shift))
        canvas.text((x + before) / 2, h_y + shift + 0.14, "$U$", 12, color=BLUE)
        if backward and t >= first:
            canvas.arrow((x + shift, o_y - 0.25), (x + shift, h_y + 0.25), color=RED)
        if backward and t > first:
            canvas.arrow((x - 0.25, h_y - shift), (before + 0.25, h_y - shift), color=RED)
    if truncate is not None:
        cut = (columns[first] + columns[first - 1]) / 2
        for ends in ((low + 0.3, h_y - 0.22), (h_y + 0.38, low + 3.2)):
            points = [(cut, y) for y in ends]
            canvas.arrow(*points, arrowstyle="-", color=RED, linestyle="--")
        canvas.text(cut, h_y - 0.1, "✂", 16, color=RED)
        canvas.text(
            0.4,
            0.35,
            f"the error of $h_{{{T}}}$ stops at $h_{{{first}}}$: influences from before are not "
            "learned",
            10,
            color=RED,
            ha="left",
        )
    elif backward:
        text = "the gradient of $W$, $U$ and $V$ is the sum over the steps"
        canvas.text(0.4, 0.35, text, 10, color=RED, ha="left")
    return finish(canvas.ax, path)


def draw_correspondences(*, ax: Axes | None = None, path: str | Path | None = None) -> Figure:
    """What may correspond to what: one or a sequence, to one or a sequence."""
    # A name, an example, the steps of the network, those with an input and those with an output.
    kinds = (
        ("one to one", "no recurrence", 1, [0], [0]),
        ("one to sequence", "an image to its caption", 3, [0], [0, 1, 2]),
        ("sequence to one", "a trajectory to its class", 3, [0, 1, 2], [2]),
        ("sequence to sequence", "a sentence to its translation", 5, [0, 1, 2], [2, 3, 4]),
    )
    apart, between = 0.6, 1.25
    width = sum((n - 1) * apart + between for _, _, n, _, _ in kinds) + 0.4
    canvas = Canvas(ax, width, 3.6)
    x = 0.2 + between / 2
    for name, example, steps, inputs, outputs in kinds:
        for k in range(steps):
            at = x + k * apart
            canvas.box(at, 1.8, width=0.34, height=0.5, fill=LIGHT[BLUE])
            if k:
                canvas.arrow((at - apart + 0.17, 1.8), (at - 0.17, 1.8))
            if k in inputs:
                canvas.box(at, 0.9, width=0.34, height=0.5, fill=PALE)
                canvas.arrow((at, 1.15), (at, 1.55))
            if k in outputs:
                canvas.box(at, 2.7, width=0.34, height=0.5, fill=LIGHT[ORANGE])
                canvas.arrow((at, 2.05), (at, 2.45))
        middle = x + (steps - 1) * apart / 2
        canvas.text(middle, 3.4, name, 11, weight="bold")
        canvas.text(middle, 3.16, example, 8, color=GREY)
        x += (steps - 1) * apart + between
    canvas.legend({"input": PALE, "state": LIGHT[BLUE], "output": LIGHT[ORANGE]}, 0.3, 0.25)
    return finish(canvas.ax, path)


def draw_windows(
    N: int = 8,
    length: int = 3,
    horizon: int = 1,
    *,
    ax: Axes | None = None,
    path: str | Path | None = None,
) -> Figure:
    """Windows over a series of N positions, and predictions that are fed back in.

    Above are all blocks that ``data.windows`` cuts, N − n − k + 1 of them: n = ``length`` positions
    and the target, k = ``horizon`` steps after their end. Below is a roll-out, as of
    ``tgs.roll_out``: the first n positions are given, and each prediction is an input of those
    after it. Raises ValueError for a series that is shorter than a block.
    """
    N, n = whole(N, "draw_windows: N"), whole(length, "draw_windows: length")
    k = whole(horizon, "draw_windows: horizon")
    count = N - n - k + 1
    if count < 1:
        raise ValueError(
            f"draw_windows: {N} positions were given for windows of {n} with a horizon of {k}, "
            f"expected at least {n + k}"
        )
    made = min(N - n, 4)
    left, apart, size, high, down = 0.1, 0.6, 0.4, 0.34, 0.56
    rolled = 0.75 + down * (made - 1)  # the first row of the roll-out, and of the blocks
    first = rolled + 0.9 + down * (count - 1)
    canvas = Canvas(ax, 2 * left + apart * max(N + 0.3, 8), first + 1.45)

    def box(t: int, y: float, fill: str, letter: str = "x") -> None:
        canvas.box(left + apart * t, y, f"${letter}_{{{t}}}$", size, high, fill=fill, size=10)

    def arrow(a: int, b: int, y: float) -> None:
        canvas.arrow((left + apart * a + size / 2, y), (left + apart * b - size / 2, y))

    def heading(y: float, text: str) -> None:
        canvas.text(left + apart - size / 2, y, text, 10, color=GREY, ha="left")

    heading(first + 1.2, f"a series of {N} positions")
    for t in range(1, N + 1):
        box(t, first + 0.85, "white")
    ahead = "the next one" if k == 1 else f"the one {k} steps ahead"
    blocks = "1 block" if count == 1 else f"{count} blocks"
    heading(first + 0.4, f"{blocks} of {n} and {ahead}")
    for row in range(count):
        y = first - down * row
        for t in range(row + 1, row + n + 1):
            box(t, y, PALE)
        box(row + n + k, y, LIGHT[BLUE])
        arrow(row + n, row + n + k, y)
    heading(rolled + 0.4, "roll-out: a prediction is fed back in")
    for row in range(made):
        y = rolled - down * row
        for t in range(row + 1, row + n + 1):
            box(t, y, *((PALE,) if t <= n else (LIGHT[ORANGE], r"\hat x")))
        box(row + n + 1, y, LIGHT[ORANGE], r"\hat x")
        arrow(row + n, row + n + 1, y)
        if row:
            x = left + apart * (row + n)
            canvas.arrow((x, y + down - high / 2), (x, y + high / 2), color=RED)
    canvas.legend({"input": PALE, "target": LIGHT[BLUE], "prediction": LIGHT[ORANGE]}, 0.4, 0.3)
    return finish(canvas.ax, path)


def draw_activations(*, path: str | Path | None = None) -> Figure:
    """Sigmoid, tanh and ReLU with their derivatives, which are this package's own gradients."""
    figure = matplotlib_figure()(figsize=(10, 3.2), dpi=DPI, layout="constrained")
    functions = (
        (sigmoid, "sigmoid", "$1/(1+e^{-z})$"),
        (tanh, "tanh", r"$\tanh z$"),
        (relu, "ReLU", r"$\max(0, z)$"),
    )
    for (function, name, formula), ax in zip(functions, figure.subplots(1, 3), strict=True):
        z = tensor(np.linspace(-4, 4, 401), requires_grad=True)
        y = function(z)
        y.backward(np.ones(y.shape))
        assert z.grad is not None
        ax.plot(z.numpy(), y.numpy(), color=BLUE, label=formula)
        ax.plot(z.numpy(), z.grad.numpy(), color=RED, linestyle="--", label="derivative")
        ax.set(title=name, xlabel="z")
        if name == "ReLU":
            ax.set_ylim(-0.2, 2.2)
        ax.axhline(0, color=GREY, linewidth=0.5)
        ax.axvline(0, color=GREY, linewidth=0.5)
        ax.legend(loc="upper left", fontsize=8)
    return finish(figure.axes[0], path)


def draw_gates(
    gates: Mapping[str, ArrayLike],
    inputs: ArrayLike | Mapping[str, ArrayLike] | None = None,
    *,
    lines: bool = False,
    title: str = "",
    path: str | Path | None = None,
) -> Figure:
    """Gates over time, one sequence: a heat map for each, or with ``lines`` a line for each unit.

    A legend says whose the lines are if a gate has no more than six units.
    ``gates`` are arrays or tensors (T, H) by name: a cell returns them if its y is a dict.
    ``inputs`` are drawn above: (T,), (T, I), or a dict of (T,) by name. Raises ShapeError.
    """
    new_figure = matplotlib_figure()
    shown = _arrays("draw_gates", gates, 2)
    T = len(next(iter(shown.values())))
    above = _inputs(inputs, T)
    for name, values in (*shown.items(), *above.items()):
        if len(values) != T:
            raise ShapeError(f"draw_gates: {name} has {len(values)} steps, expected T = {T}")

    heights = [1.0] * bool(above) + [1.3] * len(shown)
    size = (min(14.0, 4.0 + 0.14 * T), 0.9 + 1.15 * sum(heights))
    figure = new_figure(figsize=size, dpi=DPI, layout="constrained")
    grid = figure.add_gridspec(len(heights), 2, width_ratios=(40, 1), height_ratios=heights)
    ax = None
    for k, name in enumerate([*(["input"] if above else []), *shown]):
        ax = figure.add_subplot(grid[k, 0], sharex=ax)
        ax.set_ylabel(name)
        if above and not k:
            for each, values in above.items():
                ax.step(np.arange(T), values, where="mid", label=each)
            if len(above) > 1:
                _legend_above(ax, len(above))
        elif lines:
            H = shown[name].shape[1]
            ax.plot(shown[name], label=[f"unit {unit}" for unit in range(H)])
            if k == bool(above) and H <= NAMED:
                _legend_above(ax, H)
        else:
            figure.colorbar(_heat_map(ax, shown[name]), cax=figure.add_subplot(grid[k, 1]))
        ax.tick_params(labelbottom=k == len(heights) - 1)
    assert ax is not None
    ax.set(xlabel="step", xlim=(-0.5, T - 0.5))
    figure.suptitle(title)
    return finish(ax, path)


def _legend_above(ax: Any, columns: int) -> None:
    at = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0.1}
    ax.legend(fontsize=8, ncols=columns, frameon=False, **at)


def _heat_map(ax: Any, values: np.ndarray) -> Any:
    """Units upward, steps to the right; gates from 0 to 1, what may be negative around 0."""
    ax.locator_params(axis="y", integer=True, min_n_ticks=1)
    ax.yaxis.set_major_formatter("unit {x:.0f}")
    finite = values[np.isfinite(values)]
    if finite.size and finite.min() < 0:
        largest = float(np.abs(finite).max())
        colours = {"cmap": "RdBu_r", "vmin": -largest, "vmax": largest}
    else:
        colours = {"cmap": "viridis", "vmin": 0.0, "vmax": finite.max(initial=1.0)}
    return ax.imshow(values.T, aspect="auto", origin="lower", interpolation="nearest", **colours)


def _inputs(inputs: Any, T: int) -> dict[str, np.ndarray]:
    if inputs is None:
        return {}
    if isinstance(inputs, Mapping):
        return {name: _array("draw_gates", name, each, 1) for name, each in inputs.items()}
    values = np.asarray(inputs, dtype=float)
    columns = values.reshape(len(values), -1) if values.ndim in (1, 2) else values
    if columns.ndim != 2:
        raise ShapeError(
            f"draw_gates: inputs has shape {values.shape}, expected ({T},) or ({T}, I): one "
            "sequence, such as xs[:, 0]"
        )
    return {f"x[{k}]": column for k, column in enumerate(columns.T)}


def draw_gradients(
    norms: Mapping[str, ArrayLike],
    *,
    title: str = "",
    label: str = "norm of the gradient",
    ax: Axes | None = None,
    path: str | Path | None = None,
) -> Figure:
    """How large the gradient is at each step, on a logarithmic scale: (T,) arrays by name.

    What is exactly zero has no logarithm and stands at the lower edge as a triangle that points
    down; what is not finite stands at the upper one. Raises ShapeError, or ValueError for negative
    numbers.
    """
    new_figure = matplotlib_figure()
    arrays = _arrays("draw_gradients", norms, 1)
    for name, values in arrays.items():
        if (values < 0).any():
            raise ValueError(
                f"draw_gradients: {name} has {values.min():.3g} in it, expected norms, which are "
                "not negative"
            )
    if ax is None:
        ax = new_figure(figsize=(7, 4), dpi=DPI, layout="constrained").subplots()
    edges = ax.get_xaxis_transform()  # steps along x, from 0 to 1 along y
    for (name, values), colour in zip(arrays.items(), COLOURS * len(arrays), strict=False):
        steps = np.arange(len(values))
        drawn = np.isfinite(values) & (values > 0)
        ax.plot(steps, np.where(drawn, values, np.nan), color=colour, label=name)
        for chosen, y, marker in ((values == 0, 0.02, "v"), (~np.isfinite(values), 0.98, "^")):
            at = steps[chosen]
            ax.plot(at, np.full(len(at), y), marker, color=colour, transform=edges, markersize=4)
    everything = np.concatenate(list(arrays.values()))
    positive = everything[np.isfinite(everything) & (everything > 0)]
    low, high = (positive.min(), positive.max()) if positive.size else (1e-3, 1.0)
    ax.set(yscale="log", ylim=(low / 3, high * 3), xlabel="step", title=title)
    ax.set_ylabel(label)
    ax.locator_params(axis="x", integer=True)
    ax.grid(alpha=0.3)
    ax.legend()
    return finish(ax, path)


def _arrays(who: str, given: Any, ndim: int) -> dict[str, np.ndarray]:
    """Arrays of so many axes by name, one at least."""
    if not isinstance(given, Mapping) or not given:
        what = "an empty dict" if isinstance(given, Mapping) else f"a {type(given).__name__}"
        raise ValueError(f"{who}: {what} was given, expected arrays by name, a dict")
    return {name: _array(who, name, values, ndim) for name, values in given.items()}


def _array(who: str, name: str, values: Any, ndim: int) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    if array.ndim != ndim or not len(array):
        wanted = {1: "(T,)", 2: "(T, H)"}[ndim]
        raise ShapeError(
            f"{who}: {name} has shape {array.shape}, expected {wanted}, T at least 1; of a batch, "
            "choose one row"
        )
    return array
