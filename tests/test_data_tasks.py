"""Examples made to order: right by a naive account, the same from a seed, and hard as stated."""

from __future__ import annotations

import math
import re
from datetime import date

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinygrad_seq as tgs
from tinygrad_seq import data
from tinygrad_seq.data import trajectories

counts = st.integers(1, 6)
seeds = st.integers(0, 2**32 - 1)
cross_entropy = tgs.nn.functional.cross_entropy

ALL = {
    "adding_problem": lambda rng: data.adding_problem(4, 10, rng=rng),
    "copy_memory": lambda rng: data.copy_memory(4, 5, rng=rng),
    "temporal_order": lambda rng: data.temporal_order(4, 10, rng=rng),
    "first_symbol": lambda rng: data.first_symbol(4, 10, rng=rng),
    "order_of_two": lambda rng: data.order_of_two(4, 10, rng=rng),
    "parity": lambda rng: data.parity(4, 10, rng=rng),
    "sequence_sum": lambda rng: data.sequence_sum(4, 10, rng=rng),
    "bouncing_ball": lambda rng: (data.bouncing_ball(4, 10, rng=rng),),
    "kinds_of_trajectory": lambda rng: data.kinds_of_trajectory(4, rng=rng),
    "written_dates": lambda rng: data.written_dates(4, rng=rng),
}


@pytest.mark.parametrize("name", ALL)
def test_the_same_from_a_seed(name):
    def drawn(rng=None):
        return [np.asarray(part) for part in ALL[name](rng)]

    def same(one, two):
        return all((a == b).all() for a, b in zip(one, two, strict=True))

    first = drawn(3)
    assert same(first, drawn(3))
    assert same(first, drawn(np.random.default_rng(3)))
    assert not same(first, drawn(4))
    tgs.manual_seed(3)
    assert same(first, drawn())
    assert not same(first, drawn())
    assert {part.dtype.str[1:] for part in first if part.dtype.kind not in "U"} <= {"f4", "i8"}


def guess(classes: np.ndarray, number: int) -> float:
    """The cross-entropy of one who gives every class the same share; the shares are right."""
    found = np.bincount(classes, minlength=number) / len(classes)
    spread = 4 * math.sqrt((1 - 1 / number) / number / len(classes))
    np.testing.assert_allclose(found, 1 / number, atol=spread)
    return cross_entropy(np.zeros((len(classes), number), "f4"), classes).item()


class TestAdding:
    @given(count=counts, steps=st.integers(2, 11), seed=seeds)
    def test_naively(self, count, steps, seed):
        inputs, targets = data.adding_problem(count, steps, rng=seed)
        assert inputs.shape == (steps, count, 2)
        assert targets.shape == (count, 1)
        for b in range(count):
            marked = [t for t in range(steps) if inputs[t, b, 1] == 1]
            assert len(marked) == 2
            assert marked[0] < steps // 2 <= marked[1]
            assert targets[b, 0] == inputs[marked[0], b, 0] + inputs[marked[1], b, 0]
        assert set(np.unique(inputs[..., 1])) <= {0, 1}
        assert inputs[..., 0].min() >= 0
        assert inputs[..., 0].max() <= 1

    def test_every_place_is_marked(self):
        inputs, _ = data.adding_problem(300, 7, rng=0)
        assert (inputs[..., 1].sum(axis=1) > 50).all()

    def test_knowing_nothing(self):
        _, targets = data.adding_problem(50_000, 2, rng=0)
        # (y − 1)² has the mean 1/6 and the variance 1/15 − 1/36; four of its mean's deviations
        spread = 4 * math.sqrt((1 / 15 - 1 / 36) / 50_000)
        assert np.mean((targets - 1) ** 2) == pytest.approx(1 / 6, abs=spread)


class TestCopy:
    @given(count=counts, delay=st.integers(1, 30), seed=seeds)
    def test_naively(self, count, delay, seed):
        inputs, targets = data.copy_memory(count, delay, rng=seed)
        for given_, wanted in zip(inputs.T.tolist(), targets.T.tolist(), strict=True):
            symbols = given_[:10]
            assert set(symbols) <= set(range(8))
            assert given_[10:] == [8] * (delay - 1) + [9] + [8] * 10
            assert wanted == [8] * (delay + 10) + symbols

    def test_remembering_nothing(self):
        _, targets = data.copy_memory(20, 100, rng=0)
        sure = np.full((120, 20, 10), -100, "f4")
        sure[:-10, :, 8], sure[-10:, :, :8] = 0, 0
        found = cross_entropy(sure, targets).item()
        assert found == pytest.approx(10 * math.log(8) / 120, rel=1e-5)  # float32
        assert round(found, 4) == 0.1733
        _, targets = data.copy_memory(2000, 1, rng=0)
        guess(targets[-10:].ravel(), 8)


class TestTemporalOrder:
    @given(count=counts, steps=st.integers(10, 45), seed=seeds)
    def test_naively(self, count, steps, seed):
        inputs, classes = data.temporal_order(count, steps, rng=seed)
        for column, k in zip(inputs.T.tolist(), classes.tolist(), strict=True):
            (first, one), (second, two) = [(t, s) for t, s in enumerate(column) if s < 2]
            assert steps // 10 <= first < 2 * steps // 10
            assert 5 * steps // 10 <= second < 6 * steps // 10
            assert "XX XY YX YY".split()[k] == "XY"[one] + "XY"[two]
            assert max(column) <= 5

    def test_task_6a(self):
        inputs, _ = data.temporal_order(2000, 100, rng=0)
        places = np.flatnonzero((inputs < 2).any(axis=1))
        assert places.tolist() == [*range(10, 20), *range(50, 60)]
        assert np.unique(inputs).tolist() == [0, 1, 2, 3, 4, 5]

    def test_knowing_nothing(self):
        _, classes = data.temporal_order(4000, 10, rng=0)
        assert round(guess(classes, 4), 4) == 1.3863


class TestFirstSymbol:
    @given(count=counts, steps=st.integers(1, 9), symbols=st.integers(2, 6), seed=seeds)
    def test_naively(self, count, steps, symbols, seed):
        inputs, classes = data.first_symbol(count, steps, symbols=symbols, rng=seed)
        assert inputs.shape == (steps, count)
        assert [column[0] for column in inputs.T] == classes.tolist()
        assert 0 <= inputs.min() <= inputs.max() < symbols

    def test_knowing_nothing(self):
        inputs, classes = data.first_symbol(4000, 3, rng=0)
        assert round(guess(classes, 4), 4) == 1.3863
        guess(4 * inputs[2] + classes, 16)  # what comes after tells nothing


class TestOrderOfTwo:
    @given(count=counts, steps=st.integers(2, 9), seed=seeds)
    def test_naively(self, count, steps, seed):
        inputs, classes = data.order_of_two(count, steps, rng=seed)
        for column, k in zip(inputs.T.tolist(), classes.tolist(), strict=True):
            assert sorted(column) == [0] * (steps - 2) + [1, 2]
            assert k == (0 if column.index(1) < column.index(2) else 1)

    def test_knowing_nothing(self):
        inputs, classes = data.order_of_two(4000, 5, rng=0)
        assert round(guess(classes, 2), 4) == 0.6931
        pairs = 5 * (inputs == 1).argmax(axis=0) + (inputs == 2).argmax(axis=0)
        assert len(np.unique(pairs)) == 5 * 4  # any two places


class TestParity:
    @given(count=counts, longest=st.integers(1, 9), seed=seeds, data_=st.data())
    def test_naively(self, count, longest, seed, data_):
        shortest = data_.draw(st.integers(1, longest))
        bits, classes, lengths = data.parity(count, longest, shortest=shortest, rng=seed)
        assert bits.shape == (longest, count, 1)
        for b in range(count):
            assert shortest <= lengths[b] <= longest
            odd = False
            for t in range(longest):
                assert bits[t, b, 0] in ((0, 1) if t < lengths[b] else (0,))
                odd ^= bits[t, b, 0] == 1
            assert classes[b] == odd

    def test_knowing_nothing(self):
        _, classes, lengths = data.parity(4000, 3, rng=0)
        assert round(guess(classes, 2), 4) == 0.6931
        guess(lengths - 1, 3)


class TestSum:
    @given(count=counts, longest=st.integers(1, 9), seed=seeds)
    def test_naively(self, count, longest, seed):
        inputs, targets, lengths = data.sequence_sum(count, longest, rng=seed)
        for b in range(count):
            total = sum(inputs[t, b, 0].item() for t in range(lengths[b]))
            assert targets[b, 0] == pytest.approx(total, abs=1e-5)  # float32, nine of them
            assert (inputs[lengths[b] :, b] == 0).all()
        assert np.abs(inputs).max() <= 1

    def test_knowing_nothing(self):
        _, targets, _ = data.sequence_sum(50_000, 10, shortest=4, rng=0)
        assert np.mean(targets**2) == pytest.approx(14 / 6, rel=0.03)


def by_tiny_steps(count, steps, interval, gravity, restitution, friction, seed):
    """The ball by Euler's rule in steps so small that it hardly matters how."""
    rng, n = np.random.default_rng(seed), 2000
    p, v = rng.random((count, 2)), rng.uniform(-1, 1, (count, 2))
    positions = []
    for _ in range(steps):
        positions.append(p)
        for _ in range(n):
            v = v + np.array([0, -gravity]) * interval / n - friction * v * interval / n
            p = p + v * interval / n
            hit = (p < 0) | (p > 1)
            p, v = np.clip(p, 0, 1), np.where(hit, -restitution * v, v)
    return np.array(positions)


class TestBall:
    @pytest.mark.parametrize(
        "physics", [(0, 1, 0), (1, 0.9, 0.1), (2, 0.6, 0), (0.5, 1, 1)], ids=str
    )
    def test_against_tiny_steps(self, physics):
        gravity, restitution, friction = physics
        found = data.bouncing_ball(
            30,
            12,
            interval=0.1,
            gravity=gravity,
            restitution=restitution,
            friction=friction,
            rng=5,
        )
        expected = by_tiny_steps(30, 12, 0.1, gravity, restitution, friction, 5)
        assert (found.shape, found.dtype) == ((12, 30, 2), np.float32)
        # Euler's rule clips at walls and errs by a part of speed · interval / 2000 at each bounce
        np.testing.assert_allclose(found, expected, atol=5e-4)

    def test_bouncing_without_loss_is_folding(self):
        """No gravity, nothing lost: the straight line, folded at the walls."""
        rng = np.random.default_rng(1)
        p, v = rng.random((50, 2)), rng.uniform(-1, 1, (50, 2))
        line = p + v * np.arange(100)[:, None, None] * 0.05
        folded = 1 - np.abs(1 - line % 2)
        ball = data.bouncing_ball(50, 100, gravity=0, restitution=1, friction=0, rng=1)
        np.testing.assert_allclose(ball, folded, atol=1e-6)  # float32

    def test_no_energy_is_lost_or_won(self):
        """Without loss a ball comes back to where it could be at rest: the top stays as high."""
        ball = data.bouncing_ball(40, 2000, gravity=4, restitution=1, friction=0, rng=2)[..., 1]
        rng = np.random.default_rng(2)
        p, v = rng.random((40, 2))[:, 1], rng.uniform(-1, 1, (40, 2))[:, 1]
        reached = p + v**2 / 8
        free = reached < 1  # the others meet the ceiling
        assert free.sum() > 10
        for part in (ball[:1000], ball[1000:]):
            assert (part.max(axis=0)[free] <= reached[free] + 1e-6).all()
            np.testing.assert_allclose(part.max(axis=0)[free], reached[free], atol=1e-3)

    def test_three_positions_tell_the_acceleration(self):
        ball = data.bouncing_ball(200, 40, gravity=1, friction=0, rng=0).astype("f8")
        second = np.diff(ball, 2, axis=0)
        free = np.isclose(second, [0, -0.0025], atol=1e-6)  # gravity · interval², float32
        assert free.all(axis=-1).mean() > 0.8
        assert not free.all()  # walls

    def test_it_comes_to_rest_on_the_floor(self):
        ball = data.bouncing_ball(20, 400, gravity=5, restitution=0.5, friction=1, rng=0)
        assert (ball[-1, :, 1] == 0).all()
        np.testing.assert_allclose(ball[-1, :, 0], ball[-20, :, 0], atol=1e-6)

    @given(
        gravity=st.floats(0, 20),
        restitution=st.floats(0, 1),
        friction=st.floats(0, 5),
        interval=st.floats(0.001, 0.3),
        seed=seeds,
    )
    def test_it_stays_inside(self, gravity, restitution, friction, interval, seed):
        ball = data.bouncing_ball(
            5,
            20,
            interval=interval,
            gravity=gravity,
            restitution=restitution,
            friction=friction,
            rng=seed,
        )
        assert np.isfinite(ball).all()
        assert ((ball >= 0) & (ball <= 1)).all()

    def test_knowing_nothing(self):
        ball = data.bouncing_ball(4000, 60, rng=0)
        inputs, targets = data.dense_windows(ball, 2)
        assert inputs.shape == (4000 * 58, 4)
        before, last = inputs[:, :2], inputs[:, 2:]

        def error(prediction):
            return np.sqrt(np.mean((prediction - targets) ** 2))

        assert round(error(last), 3) == 0.026
        assert round(error(2 * last - before), 3) == 0.010

    def test_blocks_of_a_trajectory(self):
        """N points give N − n blocks of n + 1, N − n − k + 1 for k steps ahead."""
        ball = data.bouncing_ball(3, 30, rng=0)
        for n in range(5, 11):
            inputs, _ = data.windows(ball[:, 0], n)
            assert len(inputs) == 30 - n
            for k in (1, 2, 5):
                inputs, targets = data.dense_windows(ball, n, k)
                assert inputs.shape == (3 * (30 - n - k + 1), 2 * n)
                assert targets.shape == (3 * (30 - n - k + 1), 2)


def line_fits(points):
    """How far points are from the straight line that fits best."""
    centred = points - points.mean(axis=0)
    return np.linalg.svd(centred, compute_uv=False)[1] / math.sqrt(len(points))


def circle_fits(points):
    """How far points are from the circle that fits best: x² + y² = ax + by + c."""
    a = np.c_[points, np.ones(len(points))]
    squares = (points**2).sum(axis=1)
    x, y, c = np.linalg.lstsq(a, squares, rcond=None)[0]
    radii = np.hypot(points[:, 0] - x / 2, points[:, 1] - y / 2)
    return np.abs(radii - math.sqrt(max(c + (x / 2) ** 2 + (y / 2) ** 2, 0))).max()


def parabola_fits(points):
    """How far points are from y = ax² + bx + c."""
    x, y = points.T
    return np.abs(np.polyval(np.polyfit(x, y, 2), x) - y).max()


class TestKinds:
    def test_each_is_what_it_is_called_and_no_other(self):
        points, classes, lengths = data.kinds_of_trajectory(150, noise=0, rng=0)
        assert data.KINDS == ("circle", "line", "parabola")
        for b in range(150):
            mine = points[: lengths[b], b].astype("f8")
            fits = circle_fits(mine), line_fits(mine), parabola_fits(mine)
            if classes[b] == 1:  # a line is a parabola of curvature 0, and a circle's limit
                assert fits[1] < 1e-6
            else:
                assert fits[classes[b]] < 1e-5
                assert fits[1] > 0.02
                assert fits[2 - classes[b]] > 0.005

    @given(count=counts, shortest=st.integers(3, 9), more=st.integers(0, 5), seed=seeds)
    def test_shapes(self, count, shortest, more, seed):
        longest = shortest + more
        points, classes, lengths = data.kinds_of_trajectory(
            count, shortest=shortest, longest=longest, noise=0, rng=seed
        )
        assert (points.shape, points.dtype) == ((longest, count, 2), np.float32)
        assert classes.shape == lengths.shape == (count,)
        assert ((lengths >= shortest) & (lengths <= longest)).all()
        seen = data.mask_of(lengths, longest)
        assert (points[~seen] == 0).all()
        assert points.min() >= -1e-6
        assert points.max() <= 1 + 1e-6
        steps = np.diff(points.astype("f8"), axis=0)[seen[1:]]
        assert (np.abs(steps).sum(axis=-1) > 0).all()

    def test_noise(self):
        same = dict(rng=1, shortest=30, longest=30)
        clean, _, _ = data.kinds_of_trajectory(500, noise=0, **same)
        noisy, _, _ = data.kinds_of_trajectory(500, noise=0.02, **same)
        assert np.std(noisy - clean) == pytest.approx(0.02, rel=0.02)

    def test_knowing_nothing(self):
        _, classes, lengths = data.kinds_of_trajectory(6000, shortest=3, longest=4, rng=0)
        assert round(guess(classes, 3), 4) == 1.0986
        guess(2 * classes + lengths - 3, 6)  # the length tells nothing


MONTHS = "jan feb mar apr may jun jul aug sep oct nov dec".split()
DAYS = "mon tue wed thu fri sat sun".split()


def read(text: str) -> date:
    """A date in English with a month by its name, naively; the day of the week must be right."""
    (year,) = re.findall(r"\b\d{4}\b", text)
    ((day, ending),) = re.findall(r"\b(\d\d?)(st|nd|rd|th)?\b", text)
    words = [word[:3].lower() for word in re.findall(r"[A-Za-z]{3,}", text)]
    (month,) = [MONTHS.index(word) + 1 for word in words if word in MONTHS]
    found = date(int(year), month, int(day))
    assert all(DAYS.index(word) == found.weekday() for word in words if word in DAYS)
    if ending:
        ordinals = {1: "st", 21: "st", 31: "st", 2: "nd", 22: "nd", 3: "rd", 23: "rd"}
        assert ending == ordinals.get(found.day, "th")
    return found


class TestDates:
    def test_sources_say_what_targets_say(self):
        sources, targets = data.written_dates(3000, rng=0)
        assert [read(source).isoformat() for source in sources] == targets
        assert {len(target) for target in targets} == {10}
        assert {target[:2] for target in targets} == {"19", "20"}

    def test_every_form(self):
        from tinygrad_seq.data.dates import _FORMS

        forms = [form(date(1987, 5, 3)) for form in _FORMS]
        assert len(set(forms)) == 15
        assert {"3rd of May 1987", "May 3, 1987", "Sunday 3 May 1987"} <= set(forms)
        assert not any(re.search(r"\d/\d", form) for form in forms)
        sources, _ = data.written_dates(600, first_year=1987, last_year=1987, rng=1)
        shapes = {re.sub(r"[A-Z]+", "A", re.sub(r"[a-z]+", "a", s)) for s in sources}
        assert len({re.sub(r"\d+", "9", s) for s in shapes}) >= 11

    def test_knowing_nothing(self):
        days = (date(2099, 12, 31) - date(1900, 1, 1)).days + 1
        assert days == 73049
        assert round(math.log(days), 2) == 11.2
        _, targets = data.written_dates(3000, first_year=2000, last_year=2000, rng=0)
        assert len(set(targets)) > 360  # of 366, each missed once in 3600
        assert min(targets) >= "2000-01-01"
        assert max(targets) <= "2000-12-31"

    def test_as_input_for_a_model(self):
        sources, targets = data.written_dates(5, rng=0)
        v = data.Vocabulary.of_characters(sources, padding="<pad>", end="<end>")
        x, lengths = data.pad_sequences([v.encode(s) for s in sources], v.padding)
        assert [v.decode(row) for row in x.T] == sources
        assert lengths.tolist() == [len(s) for s in sources]
        assert len(targets) == 5


BAD = {
    "adding_problem: count: 0 was given": lambda: data.adding_problem(0, 9),
    "adding_problem: steps: 1 was given, expected an integer from 2": lambda: data.adding_problem(
        1, 1
    ),
    "copy_memory: delay: 0 was given": lambda: data.copy_memory(1, 0),
    "copy_memory: count: 1.0 was given": lambda: data.copy_memory(1.0, 1),
    "temporal_order: steps: 9 was given, expected an integer from 10": lambda: data.temporal_order(
        1, 9
    ),
    "first_symbol: symbols: 1 was given, expected an integer from 2": lambda: data.first_symbol(
        1, 1, symbols=1
    ),
    "order_of_two: steps: 1 was given": lambda: data.order_of_two(1, 1),
    "parity: count: -1 was given": lambda: data.parity(-1, 1),
    "parity: longest: 2.5 was given": lambda: data.parity(1, 2.5),
    "parity: shortest: 0 was given": lambda: data.parity(1, 5, shortest=0),
    "parity: shortest = 6 and longest = 5 were given, expected the longest": lambda: data.parity(
        1, 5, shortest=6
    ),
    "sequence_sum: shortest = 6": lambda: data.sequence_sum(1, 5, shortest=6),
    "bouncing_ball: count: 0 was given": lambda: data.bouncing_ball(0, 1),
    "bouncing_ball: steps: 0 was given": lambda: data.bouncing_ball(1, 0),
    "restitution = 1.1 were given, expected at most 100 and 1": lambda: data.bouncing_ball(
        1, 1, restitution=1.1
    ),
    "gravity: -1 was given, expected a finite number from 0 on": lambda: data.bouncing_ball(
        1, 1, gravity=-1
    ),
    "friction: nan was given": lambda: data.bouncing_ball(1, 1, friction=math.nan),
    "interval: 0 was given, expected a number above 0": lambda: data.bouncing_ball(
        1, 1, interval=0
    ),
    "interval = 1000000000.0 and .* expected at most 100 and 1": lambda: data.bouncing_ball(
        3, 5, interval=1e9
    ),
    "interval = inf and": lambda: data.bouncing_ball(1, 1, interval=math.inf),
    "noise: 'much' was given": lambda: data.kinds_of_trajectory(1, noise="much"),
    "kinds_of_trajectory: shortest: 2 was given, expected an integer from 3": lambda: (
        data.kinds_of_trajectory(1, shortest=2)
    ),
    "kinds_of_trajectory: shortest = 20 and longest = 5": lambda: data.kinds_of_trajectory(
        1, longest=5
    ),
    "written_dates: count: 0 was given": lambda: data.written_dates(0),
    "first_year = 2000 and last_year = 1999 were given": lambda: data.written_dates(
        1, first_year=2000, last_year=1999
    ),
    "first_year = 900 and last_year = 2099 .* expected years from 1000 to 9999": lambda: (
        data.written_dates(1, first_year=900)
    ),
    "rng: a str was given": lambda: data.parity(1, 1, rng="0"),
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input(words):
    with pytest.raises(ValueError, match=words):
        BAD[words]()


def test_a_ball_at_a_wall_without_speed():
    """The time of a hit is 0/0 there; it must stay, whichever wall, with no warning."""
    p = np.array([[0.0, 0.0], [1.0, 0.0]])
    found, speed = trajectories._flight(p, np.zeros((2, 2)), np.array([0.0, -1.0]), 0.01, 0.9)
    np.testing.assert_array_equal(found, p)
    np.testing.assert_array_equal(speed, 0)
