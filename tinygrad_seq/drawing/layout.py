"""Where the boxes of a graph go that is read from left to right. Numbers only: no picture.

After Sugiyama, Tagawa and Toda (1981): a box stands in the column after its last input; a line that
passes a column has a place of its own there; the order within each column is chosen for few
crossings; heights are chosen for straight lines. Imports nothing of this package.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

Route = list[tuple[float, float]]
RESTARTS, SWEEPS, STRAIGHTENINGS = 12, 8, 40


class Box(NamedTuple):
    """What a node takes up: its width, and how far it reaches beyond its middle or its sides."""

    width: float
    beside: float  # to be left free at either side of it
    above: float
    below: float
    side: str = ""  # "left" stands in the first column, "right" in the last one


class Layout(NamedTuple):
    """``places`` are (x, y) of the boxes; ``routes[k]`` the points that edge k runs through.

    Between the points 2j and 2j + 1 of a route it is level, and crosses a column; between 2j + 1
    and 2j + 2 it goes up or down in the gap between two columns.
    """

    places: list[tuple[float, float]]
    routes: list[Route]
    size: tuple[float, float]  # all places and boxes lie within 0 and this


def lay_out(
    boxes: Sequence[Box],
    edges: Sequence[tuple[int, int]],
    between_columns: float = 0.33,
    between_rows: float = 0.16,
) -> Layout:
    """Places for boxes, given as (from, to) with ``from`` before ``to`` in the list."""
    column = _columns(boxes, edges)
    graph = _Graph(boxes, edges, column)
    order = graph.ordered()
    y = graph.heights(order, between_rows)
    middle, half = [], []
    right = 0.0
    for members in order:
        width = max(
            (graph.boxes[n].width + 2 * graph.boxes[n].beside for n in members), default=0.0
        )
        middle.append(right + width / 2)
        half.append(width / 2)
        right += width + between_columns
    low = min(y[n] - box.below for n, box in enumerate(graph.boxes))
    y = [each - low for each in y]
    height = max(y[n] + box.above for n, box in enumerate(graph.boxes))

    routes = []
    for (a, b), chain in zip(edges, graph.chains, strict=True):
        points = [(middle[column[a]] + boxes[a].width / 2, y[a])]
        for n in (a, *chain, b):
            x = middle[graph.column[n]]
            points += [(x - half[graph.column[n]], y[n]), (x + half[graph.column[n]], y[n])]
        del points[1]  # a starts at its right side, b ends at its left one
        points[-1] = (middle[column[b]] - boxes[b].width / 2, y[b])
        routes.append(points)
    places = [(middle[column[n]], y[n]) for n in range(len(boxes))]
    return Layout(places, routes, (right - between_columns, height))


def _columns(boxes: Sequence[Box], edges: Sequence[tuple[int, int]]) -> list[int]:
    column = [0] * len(boxes)
    for b in range(len(boxes)):
        column[b] = max((column[a] + 1 for a, to in edges if to == b), default=0)
    last = max([1, *column])
    for n, box in enumerate(boxes):
        if box.side == "right":
            column[n] = last
        elif box.side != "left" and not any(to == n for _, to in edges):
            column[n] = min((column[to] - 1 for a, to in edges if a == n), default=0)
    return column


class _Graph:
    """Boxes, and a box of no size wherever a line passes a column."""

    def __init__(
        self, boxes: Sequence[Box], edges: Sequence[tuple[int, int]], column: list[int]
    ) -> None:
        self.real = len(boxes)
        self.boxes, self.column = list(boxes), list(column)
        self.chains: list[list[int]] = []  # of each edge, what it passes
        self.links: set[tuple[int, int]] = set()  # between neighbouring columns
        passing: dict[tuple[int, int], int] = {}  # lines from one box run together
        for a, b in edges:
            chain = []
            for c in range(column[a] + 1, column[b]):
                if (a, c) not in passing:
                    passing[a, c] = len(self.boxes)
                    self.boxes.append(Box(0.0, 0.0, 0.06, 0.06))
                    self.column.append(c)
                chain.append(passing[a, c])
            self.chains.append(chain)
            way = [a, *chain, b]
            self.links.update(pairwise(way))
        self.before: list[list[int]] = [[] for _ in self.boxes]
        self.after: list[list[int]] = [[] for _ in self.boxes]
        for a, b in sorted(self.links):
            self.after[a].append(b)
            self.before[b].append(a)

    # The order within each column

    def ordered(self) -> list[list[int]]:
        """The columns from bottom to top, with few crossings."""
        rng = np.random.default_rng(0)
        best: list[list[int]] = []
        fewest = None
        for attempt in range(RESTARTS):
            order: list[list[int]] = [[] for _ in range(max(self.column) + 1)]
            for n, c in enumerate(self.column):
                order[c].insert(0, n)  # what comes first stands on top
            if attempt:
                for members in order:
                    rng.shuffle(members)
            self._sweep(order)
            self._swap(order)
            count = sum(self._crossings(a, b) for a, b in pairwise(order))
            if fewest is None or count < fewest:
                fewest, best = count, order
        return best

    def _sweep(self, order: list[list[int]]) -> None:
        """Each box to the mean place of its neighbours, from left to right and back."""
        for sweep in range(SWEEPS):
            forward = sweep % 2 == 0
            neighbours = self.before if forward else self.after
            for c in range(len(order)) if forward else reversed(range(len(order))):
                place = {n: k for members in order for k, n in enumerate(members)}
                mean = {
                    n: float(np.mean([place[m] for m in neighbours[n]] or [place[n]]))
                    for n in order[c]
                }
                order[c].sort(key=mean.__getitem__)

    def _swap(self, order: list[list[int]]) -> None:
        """Neighbours change places as long as that saves crossings."""
        improved = True
        while improved:
            improved = False
            for c, members in enumerate(order):
                left = order[c - 1] if c else []
                right = order[c + 1] if c + 1 < len(order) else []
                for k in range(len(members) - 1):
                    was = self._crossings(left, members) + self._crossings(members, right)
                    members[k], members[k + 1] = members[k + 1], members[k]
                    now = self._crossings(left, members) + self._crossings(members, right)
                    if now < was:
                        improved = True
                    else:
                        members[k], members[k + 1] = members[k + 1], members[k]

    def _crossings(self, left: list[int], right: list[int]) -> int:
        place = {n: k for k, n in enumerate(right)}
        ends = [sorted(place[m] for m in self.after[n] if m in place) for n in left]
        flat = [end for each in ends for end in each]
        return sum(a > b for k, a in enumerate(flat) for b in flat[k + 1 :])

    # Heights

    def heights(self, order: list[list[int]], gap: float) -> list[float]:
        """A height for each box: in order, apart, with lines as short and straight as that leaves.

        First all boxes of a column go to the mean of their neighbours at once, then each by itself
        to the median, which is exactly as high as one of them. What a line passes goes together.
        """
        y = [0.0] * len(self.boxes)
        runs = self._runs()
        near = [self._around(run) for run in runs]
        of = {n: k for k, run in enumerate(runs) for n in run}
        apart: list[list[float]] = []
        for members in order:
            sides = [(self.boxes[a].above, self.boxes[b].below) for a, b in pairwise(members)]
            apart.append([above + gap + below for above, below in sides])
            for n, height in zip(members, _apart([0.0] * len(members), apart[-1]), strict=True):
                y[n] = height
        for k in range(STRAIGHTENINGS):
            columns = list(zip(order, apart, strict=True))
            for members, distances in columns if k % 2 == 0 else columns[::-1]:
                wanted = [float(np.mean([y[m] for m in near[of[n]]] or [y[n]])) for n in members]
                for n, height in zip(members, _apart(wanted, distances), strict=True):
                    y[n] = height
        room = {}  # for each box, the ones below and above it with the distance to keep
        for members, distances in zip(order, apart, strict=True):
            for k, n in enumerate(members):
                below = (members[k - 1], distances[k - 1]) if k else None
                room[n] = below, (members[k + 1], distances[k]) if distances[k:] else None
        for _ in range(STRAIGHTENINGS):
            for run, neighbours in zip(runs, near, strict=True):
                if neighbours:
                    _move(run, _median([y[m] for m in neighbours]), room, y)
        return y

    def _runs(self) -> list[list[int]]:
        """Boxes by themselves; what the lines from one box pass, together."""
        runs = {n: [n] for n in range(self.real)}
        for n in range(self.real, len(self.boxes)):
            (before,) = self.before[n]
            runs[n] = runs[before] if before >= self.real else []
            runs[n].append(n)
        return [run for n, run in runs.items() if run[0] == n]

    def _around(self, run: list[int]) -> list[int]:
        return [m for n in run for m in (*self.before[n], *self.after[n]) if m not in run]


Room = dict[int, tuple[tuple[int, float] | None, tuple[int, float] | None]]


def _move(run: list[int], wanted: float, room: Room, y: list[float]) -> None:
    """Boxes to the height wanted, or as near as their columns let them, if they can all go."""
    low, high = [], []
    for n in run:
        below, above = room[n]
        low.append(-np.inf if below is None else y[below[0]] + below[1])
        high.append(np.inf if above is None else y[above[0]] - above[1])
    together = max(low) <= min(high)
    for n, lowest, highest in zip(run, low, high, strict=True):
        bounds = (max(low), min(high)) if together else (lowest, highest)
        y[n] = float(min(max(wanted, bounds[0]), bounds[1]))


def _median(heights: list[float]) -> float:
    """Between two in the middle all are as good: the nearest to the first, whence a line comes."""
    ranked = sorted(heights)
    low, high = ranked[(len(ranked) - 1) // 2], ranked[len(ranked) // 2]
    return min(max(heights[0], low), high)


def _apart(wanted: list[float], apart: list[float]) -> list[float]:
    """Rising heights at least ``apart``, nearest to those wanted in the sum of squares.

    Without the distances this is isotonic regression: what is in each other's way moves together,
    to its mean.
    """
    offsets = np.concatenate([[0.0], np.cumsum(apart)])[: len(wanted)]
    groups: list[tuple[float, int]] = []  # mean, count
    for value, offset in zip(wanted, offsets, strict=True):
        mean, count = value - offset, 1
        while groups and groups[-1][0] >= mean:
            below, many = groups.pop()
            mean, count = (below * many + mean * count) / (many + count), many + count
        groups.append((mean, count))
    means = [mean for mean, count in groups for _ in range(count)]
    return [float(mean + offset) for mean, offset in zip(means, offsets, strict=True)]
