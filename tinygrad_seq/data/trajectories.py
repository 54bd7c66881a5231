"""Trajectories in the unit square: a ball to predict, and kinds to tell apart.

Imports creation, errors and sequences.
"""

from __future__ import annotations

import math

import numpy as np

from tinygrad_seq.creation import Rng, generator
from tinygrad_seq.data.sequences import mask_of, random_lengths
from tinygrad_seq.errors import number, positive, whole

KINDS = ("circle", "line", "parabola")  # a class is a place here
_PIECE = 0.01  # the longest time in which the ball meets a wall no more than once


def bouncing_ball(
    count: int,
    steps: int,
    *,
    interval: float = 0.05,
    gravity: float = 1.0,
    restitution: float = 0.9,
    friction: float = 0.1,
    rng: Rng = None,
) -> np.ndarray:
    """Balls in the unit square, bouncing off its walls: positions (steps, count, 2), float32.

    The last axis is (x, y), y upward; positions are ``interval`` apart in time. A ball starts at a
    random place with a velocity between −1 and 1 in x and y. ``gravity`` pulls down; a wall gives
    back ``restitution`` (from 0 to 1) of the speed towards it; ``friction`` is the rate at which
    the air takes speed, dv/dt = −friction · v. With restitution 1 and friction 0 no energy is lost.
    Raises ValueError for numbers below 0, an interval of 0 or above 100 and a restitution above 1.

    The prediction task of the lecture notes: from 5 to 10 positions the next, where 3 tell the
    acceleration; ``dense_windows`` cuts them. Who knows nothing says the last position again, a
    root mean square error of 0.026 at the defaults and 60 steps; who goes straight on through the
    last two positions, of 0.010 (gravity · interval² = 0.0025 in free flight, the rest at walls).
    """
    count = whole(count, "bouncing_ball: count")
    steps = whole(steps, "bouncing_ball: steps")
    interval = positive(interval, "bouncing_ball: interval")
    gravity = number(gravity, "bouncing_ball: gravity")
    restitution = number(restitution, "bouncing_ball: restitution")
    friction = number(friction, "bouncing_ball: friction")
    if interval > 100 or restitution > 1:
        raise ValueError(
            f"bouncing_ball: interval = {interval} and restitution = {restitution} were given, "
            "expected at most 100 and 1"
        )
    pieces = math.ceil(interval / _PIECE)
    draw, time = generator(rng), interval / pieces
    position, velocity = draw.random((count, 2)), draw.uniform(-1, 1, (count, 2))
    pull, kept = np.array([0.0, -gravity]), math.exp(-friction * time / 2)
    positions = np.empty((steps, count, 2), np.float32)
    for k in range(steps):
        positions[k] = position
        for _ in range(pieces):
            position, velocity = _flight(position, velocity * kept, pull, time, restitution)
            velocity = velocity * kept
    return positions


def _flight(
    p: np.ndarray, v: np.ndarray, a: np.ndarray, time: float, restitution: float
) -> tuple[np.ndarray, np.ndarray]:
    """Position and velocity after ``time`` at constant acceleration, with one bounce at most.

    Each axis for itself. The speed at the wall follows from the energy, v² + 2 a (wall − p), and
    the time of the hit from the mean of both speeds. Who falls through the wall in what is left of
    the time, since it hardly bounces, lies still on it.
    """
    q, w = p + v * time + a * time**2 / 2, v + a * time
    wall = np.where(q < 0, 0.0, 1.0)
    hit = (q < 0) | (q > 1)
    at_wall = np.sqrt(np.maximum(v**2 + 2 * a * (wall - p), 0)) * np.where(q < 0, -1, 1)
    both = v + at_wall
    until = np.divide(2 * (wall - p), both, out=np.zeros_like(p), where=both != 0)
    rest = np.clip(time - until, 0, time)
    back = -restitution * at_wall
    after, speed = wall + back * rest + a * rest**2 / 2, back + a * rest
    stays = (after < 0) | (after > 1)
    q = np.where(hit, np.where(stays, wall, after), q)
    return q, np.where(hit, np.where(stays, 0, speed), w)


def kinds_of_trajectory(
    count: int,
    *,
    shortest: int = 20,
    longest: int = 60,
    noise: float = 0.01,
    rng: Rng = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Circles, lines and parabolas: points (T, B, 2), classes (B,), lengths (B,).

    B is ``count``, T ``longest``; a class is a place in ``KINDS``. Circles are run through from
    half to wholly, in either direction; parabolas are the flight of what is thrown up and falls
    back. Each has from ``shortest`` to ``longest`` points, at regular times whatever the kind, so
    that the length tells nothing; beyond them are zeros. Normal ``noise`` of this deviation is
    added to each coordinate, and may lead out of the unit square. Points are float32.

    The classification task of the lecture notes. Who knows nothing: one in three right, a
    cross-entropy of ln 3 = 1.0986.
    """
    noise = number(noise, "kinds_of_trajectory: noise")
    draw = generator(rng)
    lengths = random_lengths(draw, count, shortest, longest, "kinds_of_trajectory", least=3)
    classes = draw.integers(len(KINDS), size=count)
    time = np.arange(longest)[:, None] / (lengths - 1)  # (T, B), 1 at the last point
    of_each = np.stack([shape(time, draw) for shape in (_circle, _line, _parabola)])
    points = of_each[classes, :, np.arange(count)].swapaxes(0, 1)
    points = points + noise * draw.standard_normal(points.shape)
    seen = mask_of(lengths, longest)[..., None]
    return np.where(seen, points, 0).astype(np.float32), classes, lengths


def _circle(time: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    count = time.shape[1]
    radius, start = draw.uniform(0.1, 0.4, count), draw.uniform(0, 2 * np.pi, count)
    turns = draw.uniform(0.5, 1, count) * draw.choice([-1, 1], count)
    angle = start + 2 * np.pi * turns * time
    middle = draw.uniform(radius, 1 - radius, (2, count))
    return np.stack(
        [middle[0] + radius * np.cos(angle), middle[1] + radius * np.sin(angle)], axis=-1
    )


def _line(time: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    count = time.shape[1]
    length, angle = draw.uniform(0.3, 0.9, count), draw.uniform(0, 2 * np.pi, count)
    way = length * np.stack([np.cos(angle), np.sin(angle)])  # (2, B)
    middle = draw.uniform(np.abs(way) / 2, 1 - np.abs(way) / 2)
    return np.moveaxis(middle[:, None] + way[:, None] * (time - 0.5), 0, -1)


def _parabola(time: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    count = time.shape[1]
    width, height = draw.uniform(0.4, 0.9, count), draw.uniform(0.3, 0.9, count)
    way = width * draw.choice([-1, 1], count)
    middle, ground = draw.uniform(width / 2, 1 - width / 2), draw.uniform(0, 1 - height)
    return np.stack([middle + way * (time - 0.5), ground + height * 4 * time * (1 - time)], axis=-1)
