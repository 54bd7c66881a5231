"""Windows, padding, masks, batches, buckets, held-out parts and CSV columns."""

from __future__ import annotations

import tracemalloc
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinygrad_seq as tgs
from tinygrad_seq import data


@given(n=st.integers(2, 12), length=st.integers(1, 5), horizon=st.integers(1, 4))
def test_windows(n, length, horizon):
    series = np.arange(n * 2.0).reshape(n, 2)
    count = n - length - horizon + 1  # the notes' N − n for horizon 1
    if count < 1:
        with pytest.raises(ValueError, match="too short"):
            data.windows(series, length, horizon)
        return
    inputs, targets = data.windows(series, length, horizon)
    assert inputs.shape == (count, length, 2)
    assert targets.shape == (count, 2)
    for k in range(count):
        np.testing.assert_array_equal(inputs[k], series[k : k + length])
        np.testing.assert_array_equal(targets[k], series[k + length + horizon - 1])


def test_windows_of_one_column():
    inputs, targets = data.windows([1.0, 2.0, 3.0, 4.0], 2)
    assert inputs.tolist() == [[1, 2], [2, 3]]
    assert targets.tolist() == [3, 4]


@given(
    steps=st.integers(1, 9),
    count=st.integers(1, 4),
    n=st.integers(1, 4),
    horizon=st.integers(1, 3),
)
def test_windows_of_many_series(steps, count, n, horizon):
    """N − n blocks of each trajectory, N − n − k + 1 for k steps ahead; the naive way twice."""
    series = np.arange(steps * count * 2.0).reshape(steps, count, 2)
    blocks = [
        (series[k : k + n, b].ravel(), series[k + n + horizon - 1, b])
        for b in range(count)
        for k in range(steps - n - horizon + 1)
    ]
    if not blocks:
        with pytest.raises(ValueError, match="too short for windows"):
            data.dense_windows(series, n, horizon)
        return
    inputs, targets = data.dense_windows(series, n, horizon)
    assert len(inputs) == count * (steps - n - horizon + 1)
    np.testing.assert_array_equal(inputs, [x for x, _ in blocks])
    np.testing.assert_array_equal(targets, [y for _, y in blocks])


@given(lengths=st.lists(st.integers(0, 5), max_size=4), more=st.integers(0, 2))
def test_mask(lengths, more):
    T = max(lengths, default=0) + more
    mask = data.mask_of(lengths, T)
    assert (mask.shape, mask.dtype) == ((T, len(lengths)), bool)
    assert mask.T.tolist() == [[t < length for t in range(T)] for length in lengths]


def test_padding():
    padded, lengths = data.pad_sequences([[1.0, 2.0], [], [3.0]], value=-1)
    assert padded.T.tolist() == [[1, 2], [-1, -1], [3, -1]]
    assert lengths.tolist() == [2, 0, 1]
    padded, _ = data.pad_sequences([np.ones((2, 3)), np.ones((1, 3))], batch_first=True)
    assert padded.shape == (2, 2, 3)
    assert padded.dtype == np.float64
    padded, _ = data.pad_sequences([[1, 2], [3]])
    assert padded.T.tolist() == [[1, 2], [3, 0]]
    assert padded.dtype == np.int64
    padded, _ = data.pad_sequences([np.ones(2, np.int8), np.ones(1, np.int8)], value=-128)
    assert padded.T.tolist() == [[1, 1], [1, -128]]
    padded, _ = data.pad_sequences([["a", "b"], ["c"]], value="")
    assert padded.T.tolist() == [["a", "b"], ["c", ""]]
    padded, _ = data.pad_sequences([[True, True], [True]])
    assert padded.T.tolist() == [[True, True], [True, False]]


class TestBatches:
    @pytest.mark.parametrize("axis", [0, 1])
    def test_of_windows_no_more_is_copied_than_a_batch(self, axis):
        windows, targets = data.windows(np.arange(4000.0), 500)  # 14 MB, if they were copied
        inputs = windows if axis == 0 else windows.T
        batches = data.Batches(inputs, targets, batch_size=8, axis=axis, rng=0)
        tracemalloc.start()
        found, wanted = next(iter(batches))
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert most < 500_000
        assert found.flags.c_contiguous
        last = found[:, -1] if axis == 0 else found[-1]
        np.testing.assert_array_equal(last + 1, wanted)

    def test_every_example_once_in_a_new_order_each_pass(self):
        x = np.arange(10)
        batches = data.Batches(x, x * 10, batch_size=3, rng=0)
        passes = [list(batches) for _ in range(2)]
        for batch in passes:
            assert [len(a) for a, _ in batch] == [3, 3, 3, 1]
            assert sorted(np.concatenate([a for a, _ in batch])) == list(range(10))
            assert all((b == a * 10).all() for a, b in batch)
        orders = [np.concatenate([a for a, _ in p]).tolist() for p in passes]
        assert orders[0] != orders[1]
        again = data.Batches(x, x * 10, batch_size=3, rng=0)
        assert [np.concatenate([a for a, _ in again]).tolist() for _ in range(2)] == orders
        assert len(batches) == 4
        assert len(data.Batches(x, batch_size=3, drop_last=True)) == 3

    def test_the_packages_seed(self):
        tgs.manual_seed(1)
        first = np.concatenate(list(data.Batches(np.arange(20), batch_size=4)))
        tgs.manual_seed(1)
        again = np.concatenate(list(data.Batches(np.arange(20), batch_size=4)))
        np.testing.assert_array_equal(first, again)

    def test_steps_first(self):
        x, y = np.zeros((7, 5, 2)), np.arange(5)
        batches = data.Batches(x, y, batch_size=2, axis=1, shuffle=False)
        assert next((a.shape, b.tolist()) for a, b in batches) == ((7, 2, 2), [0, 1])

    def test_an_axis_for_each_array(self):
        x, y = np.arange(8).reshape(2, 4, 1), np.arange(16).reshape(4, 4)
        for a, b in data.Batches(x, y, batch_size=3, axis=(1, 0), shuffle=False):
            np.testing.assert_array_equal(a[0, :, 0] * 4, b[:, 0])
        (_, a), (_, b) = data.train_test_split(x, y, held_out=1, axis=(1, 0))
        assert a.shape == (2, 1, 1)
        assert b.shape == (1, 4)

    @given(B=st.integers(1, 7), size=st.integers(1, 4), seed=st.integers(0, 9))
    def test_several_inputs(self, B, size, seed):
        """Each as if it were given by itself, in the structure that it was given in."""
        a, b = np.arange(3 * B).reshape(3, B), np.arange(2 * B).reshape(B, 2)
        y, n = np.arange(B)[None], np.arange(B)
        options = {"batch_size": size, "rng": seed}
        flat = data.Batches(a, b, y, n, axis=(1, 0, 1, 0), **options)
        pair = data.Batches((a, b), y, n, axis=(1, 0, 1, 0), **options)
        named = data.Batches({"x": b, "a": a}, y, n.tolist(), axis=(1, 0, 1, 0), **options)
        for one, two, three in zip(flat, pair, named, strict=True):
            assert [len(two), len(two[0]), list(three[0])] == [3, 2, ["x", "a"]]
            again = (*two[0], *two[1:]), (three[0]["a"], three[0]["x"], *three[1:])
            for found in again:
                for x, expected in zip(found, one, strict=True):
                    np.testing.assert_array_equal(x, expected)

    def test_empty(self):
        assert list(data.Batches(np.zeros((0, 2)), batch_size=2)) == []


def ragged(lengths, rng):
    return [rng.standard_normal((n, 2)).astype("f4") for n in lengths]


def share_of_padding(buckets) -> float:
    seen = [(lengths.sum(), x.shape[0] * x.shape[1]) for x, _, lengths in buckets]
    return 1 - sum(n for n, _ in seen) / sum(n for _, n in seen)


class TestBuckets:
    @given(
        lengths=st.lists(st.integers(1, 9), min_size=1, max_size=25),
        batch_size=st.integers(1, 6),
        pool=st.integers(1, 4),
        per_step=st.booleans(),
        seed=st.integers(0, 99),
    )
    def test_every_sequence_once_and_whole(self, lengths, batch_size, pool, per_step, seed):
        rng = np.random.default_rng(seed)
        sequences = ragged(lengths, rng)
        targets = [x[:, 0] for x in sequences] if per_step else np.arange(len(lengths))
        buckets = data.Buckets(
            sequences,
            targets,
            batch_size=batch_size,
            per_step=per_step,
            value=7,
            target_value=-9,
            pool=pool,
            rng=seed,
        )
        batches = list(buckets)
        assert len(batches) == len(buckets) == -(-len(lengths) // batch_size)
        assert sorted(x.shape[1] for x, _, _ in batches)[1:] == [batch_size] * (len(batches) - 1)
        left = {x.tobytes(): k for k, x in enumerate(sequences)}
        for inputs, wanted, of_each in batches:
            assert inputs.dtype == np.float32
            assert len(inputs) == of_each.max()
            assert (inputs[~data.mask_of(of_each, len(inputs))] == 7).all()
            for b, length in enumerate(of_each):
                k = left.pop(inputs[:length, b].tobytes())
                if per_step:
                    np.testing.assert_array_equal(wanted[:length, b], targets[k])
                    assert (wanted[length:, b] == -9).all()
                else:
                    assert wanted[b] == k
        assert not left

    @given(
        lengths=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5)), min_size=1, max_size=25),
        batch_size=st.integers(1, 6),
        pool=st.integers(1, 4),
    )
    def test_pairs_of_different_lengths(self, lengths, batch_size, pool):
        rng = np.random.default_rng(0)
        sources = [np.r_[k, rng.integers(0, 99, n)] for k, (n, _) in enumerate(lengths)]
        targets = [rng.integers(0, 99, n + 1) for _, n in lengths]
        buckets = data.Buckets(
            ([*map(np.array, sources)], [t[:-1] for t in targets]),
            [t[1:] for t in targets],
            batch_size=batch_size,
            per_step=True,
            target_value=-1,
            pool=pool,
            rng=0,
        )
        seen = []
        for (source, given_to_it), wanted, of_each in buckets:
            assert source.shape == (of_each.max(), len(of_each))
            assert given_to_it.shape == wanted.shape
            assert len(wanted) == (wanted >= 0).sum(axis=0).max()
            for b, k in enumerate(source[0]):
                np.testing.assert_array_equal(source[: of_each[b], b], sources[k])
                n = len(targets[k]) - 1
                assert [*given_to_it[:n, b], wanted[n - 1, b]] == targets[k].tolist()
                assert not given_to_it[n:, b].any()
                np.testing.assert_array_equal(wanted[:n, b], targets[k][1:])
                assert (wanted[n:, b] == -1).all()
                seen.append(k)
        assert sorted(seen) == list(range(len(lengths)))
        if pool * batch_size >= len(lengths):  # sorted by the first, then by the second
            pairs = [sorted(lengths[k] for k in s[0]) for (s, _), _, _ in buckets]
            assert list(chain(*sorted(pairs))) == sorted(lengths)

    def test_targets_for_each_of_several_inputs(self):
        ((inputs, y, lengths),) = data.Buckets(([[1, 2]], [[3.0]]), [[7, 8]], batch_size=1)
        assert [x.tolist() for x in inputs] == [[[1], [2]], [[3.0]]]
        assert (y.tolist(), lengths.tolist()) == ([[7, 8]], [2])

    def test_about_the_same_length(self, rng):
        lengths = rng.integers(1, 100, 400)
        args = ragged(lengths, rng), np.zeros(400)
        bucketed = share_of_padding(data.Buckets(*args, batch_size=8, rng=0))
        plain = share_of_padding(data.Buckets(*args, batch_size=8, pool=1, rng=0))
        assert bucketed < 0.08  # of the range, 1/20 a batch and half of it padding: 1/20 of all
        assert plain > 0.35  # of 8, the longest is at 8/9 of the range and the mean at a half

    def test_all_of_one_pool_is_sorted(self):
        lengths = np.arange(1, 13)[::-1]
        buckets = data.Buckets([np.zeros(n) for n in lengths], lengths, batch_size=3, rng=0)
        found = sorted(sorted(part.tolist()) for _, _, part in buckets)
        assert found == [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]]

    def test_a_new_order_each_pass_and_the_same_from_a_seed(self, rng):
        sequences = ragged(rng.integers(1, 9, 30), rng)

        def passes(rng=None):
            buckets = data.Buckets(sequences, np.arange(30), batch_size=4, rng=rng)
            return [np.concatenate([y for _, y, _ in buckets]).tolist() for _ in range(2)]

        one, two = passes(0)
        assert one != two
        assert [one, two] == passes(0) == passes(np.random.default_rng(0))
        tgs.manual_seed(0)
        assert [one, two] == passes()

    def test_an_empty_list_does_not_make_integers_floats(self):
        assert data.pad_sequences([[1, 2], []])[0].dtype.kind == "i"

    def test_padding_of_integers_is_0(self):
        ((x, y, lengths),) = data.Buckets([[1, 2], [3]], [[4, 5], [6]], batch_size=2, per_step=True)
        order = np.argsort(-lengths)
        assert x.T[order].tolist() == [[1, 2], [3, 0]]
        assert y.T[order].tolist() == [[4, 5], [6, 0]]

    def test_fit_takes_them(self, rng):
        class Model(tgs.nn.Module):
            def __init__(self):
                self.layer = tgs.nn.RNN(2, 3, backend="tape", rng=0)
                self.head = tgs.nn.Linear(3, 1, rng=1)

            def forward(self, x, lengths=None):
                _, state = self.layer(x, lengths=lengths)
                return self.head(state[0])

        sequences = ragged([3, 1, 2, 3], rng)
        sums = np.array([[x.sum()] for x in sequences])
        model = Model()
        buckets = data.Buckets(sequences, sums, batch_size=2, rng=0)
        optimizer = tgs.optim.Adam(model.parameters(), lr=0.1)
        loss = tgs.nn.functional.mse_loss
        history = tgs.train.fit(model, buckets, loss, optimizer, epochs=8, progress=False)
        assert history.loss[-1] < history.loss[0]


def test_held_out_part():
    x = np.arange(10)
    ((train, test),) = data.train_test_split(x, held_out=3)
    assert (train.tolist(), test.tolist()) == (list(range(7)), [7, 8, 9])
    (a, b), (c, d) = data.train_test_split(x, x * 2, held_out=0.2, shuffle=True, rng=0)
    assert len(b) == 2
    np.testing.assert_array_equal(c, a * 2)
    np.testing.assert_array_equal(d, b * 2)


def write(tmp_path, text: str):
    path = tmp_path / "table.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_csv(tmp_path):
    path = write(tmp_path, "\ufeffmonth, celsius\n2000-01,1.5\n\n2000-02,-2e1\n")
    assert data.read_column(path, "celsius").tolist() == [1.5, -20]
    values, labels = data.read_column(path, with_labels=True)
    assert values.tolist() == [1.5, -20]
    assert labels == ["2000-01", "2000-02"]
    values, labels = data.read_column(write(tmp_path, "\nx\n3\n4\n"), with_labels=True)
    assert labels == ["3", "4"]
    values, labels = data.read_column(write(tmp_path, "x\n3\n4\n"), with_labels=True)
    assert labels == ["2", "3"]


def test_csv_that_is_no_utf8(tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes("T °C\n1\n".encode("cp1252"))
    with pytest.raises(ValueError, match=r"table\.csv: not UTF-8 text .* save it as UTF-8"):
        data.read_column(path)


BAD_CSV = {
    "line 2: 3 cells, expected 2": ("date,v\n2020,1,234\n", "v"),
    "the header names 'v' twice": ("v,v\n1,2\n", "v"),
    "no header line": ("", "v"),
    r"no column 'b', expected one of \['a'\]": ("a\n1\n", "b"),
    "line 3: column 'a' holds nothing": ("a,b\n1,2\n,3\n", "a"),
    "line 3: column 'b' holds nothing": ("a,b\n1,2\n4\n", "b"),
    "line 2: column 'a' holds 'warm'": ("a\nwarm\n", "a"),
    "line 3: column 'a' holds 'nan', expected a finite number": ("a\n1\nnan\n", "a"),
    "no rows below the header": ("a\n", "a"),
    "no header": ("", None),
    "name one": ("a,b\n1,2\n", None),
    "of which none hold numbers": ("a\nx\n", None),
}


@pytest.mark.parametrize("words", BAD_CSV)
def test_bad_csv(words, tmp_path):
    text, column = BAD_CSV[words]
    with pytest.raises(ValueError, match=words):
        data.read_column(write(tmp_path, text), column)


BAD = {
    "length: 0 was given": lambda: data.windows([1.0, 2.0], 0),
    "horizon: 1.5 was given": lambda: data.windows([1.0, 2.0], 1, 1.5),
    "windows: one float was given, expected a series": lambda: data.windows(3.0, 1),
    "windows: one str was given, .* encode a text with vocabulary.encode": lambda: data.windows(
        "abc", 1
    ),
    r"windows: one NoneType was given, expected a series \(N, \.\.\.\)$": lambda: data.windows(
        None, 1
    ),
    "dense_windows: one str was given": lambda: data.dense_windows("abc", 1),
    "windows: the rows given differ in length, .* pad_sequences makes one": lambda: data.windows(
        [[1], [1, 2]], 1
    ),
    "mask_of: the rows given differ in length": lambda: data.mask_of([[1], [1, 2]], 2),
    "Batches: the rows given differ in length": lambda: data.Batches([[1], [1, 2]], batch_size=1),
    "train_test_split: the rows given differ": lambda: data.train_test_split(
        [[1], [1, 2]], held_out=1
    ),
    "pad_sequences: None was given, expected a list of seq": lambda: data.pad_sequences(None),
    "pad_sequences: sequence 1: one str was given": lambda: data.pad_sequences([[1], "ab"]),
    "pad_sequences: sequence 0: the rows given differ": lambda: data.pad_sequences([[[1], [1, 2]]]),
    "Buckets: None was given, expected a list of sequences": lambda: data.Buckets(
        None, [1], batch_size=1
    ),
    "no sequences": lambda: data.pad_sequences([]),
    "equal further axes": lambda: data.pad_sequences([np.ones((2, 3)), np.ones((2, 2))]),
    "batch_size: 0 was given": lambda: data.Batches([1, 2], batch_size=0),
    r"have \[2, 3\] examples": lambda: data.Batches([1, 2], [1, 2, 3], batch_size=1),
    "batch_size: 2.7": lambda: data.Batches([1, 2], batch_size=2.7),
    "as many axes as arrays": lambda: data.Batches(np.ones((2, 2)), batch_size=1, axis=5),
    "-1 was given to pad uint8": lambda: data.pad_sequences([np.ones(2, np.uint8)], value=-1),
    "pad int64 with": lambda: data.pad_sequences([[1, 2], [1]], value=np.nan),
    "300 was given to pad uint8": lambda: data.pad_sequences([np.ones(2, np.uint8)], value=300),
    "0.5 was given to pad int64": lambda: data.pad_sequences([[1, 2], [1]], value=0.5),
    "None was given to pad float64": lambda: data.pad_sequences([[1.0]], value=None),
    "None was given to pad int64": lambda: data.pad_sequences([[1]], value=None),
    "0.0 was given to pad <U4": lambda: data.pad_sequences([["look", "here"], ["up"]]),
    "'a' was given to pad float64": lambda: data.pad_sequences([[1.0]], value="a"),
    "2 was given to pad bool": lambda: data.pad_sequences([[True]], value=2),
    r"shape \(3, 2\) was given, expected \(T, B, F\)": lambda: data.dense_windows(
        np.ones((3, 2)), 1
    ),
    "a series of 3 is too short for windows of 3": lambda: data.dense_windows(
        np.ones((3, 2, 1)), 3
    ),
    "lengths from 1 to 4 were given, expected 0 to T = 3": lambda: data.mask_of([1, 4], 3),
    "lengths from -1 to 1": lambda: data.mask_of([1, -1], 3),
    "dtype float64 were given, expected integers": lambda: data.mask_of([1.0], 3),
    r"lengths of shape \(1, 1\)": lambda: data.mask_of([[1]], 3),
    "mask_of: T: -1 was given": lambda: data.mask_of([], -1),
    "Buckets: no sequences": lambda: data.Buckets([], [], batch_size=1),
    "Buckets: batch_size: 0 was given, expected an integer from 1": lambda: data.Buckets(
        [[1]], [1], batch_size=0
    ),
    "Buckets: pool: 0 was given": lambda: data.Buckets([[1]], [1], batch_size=1, pool=0),
    r"Buckets: shapes \(1, 2\), \(1, 3\) were given": lambda: data.Buckets(
        [np.ones((1, 2)), np.ones((1, 3))], [1, 2], batch_size=1
    ),
    r"2 sequences and targets of shape \(3,\) were given": lambda: data.Buckets(
        [[1], [2]], [1, 2, 3], batch_size=1
    ),
    "pass per_step=True if": lambda: data.Buckets([[1], [2, 3]], [[1], [2, 3]], batch_size=1),
    "2 sequences and targets for 1 were given": lambda: data.Buckets(
        [[1], [2]], [[1]], batch_size=1, per_step=True
    ),
    "sequence 1 has 2 steps and targets for 1, expected a target for each": lambda: data.Buckets(
        [[1], [2, 3]], [[1], [2]], batch_size=1, per_step=True
    ),
    r"pass a tuple \(sequences, given\)": lambda: data.Buckets(
        [[1], [2, 3]], [[1], [2]], batch_size=1, per_step=True
    ),
    r"a tuple of \[2, 1\] sequences was given, expected as many": lambda: data.Buckets(
        ([[1], [2, 3]], [[1]]), [1, 2], batch_size=1
    ),
    "sequence 0 has 1 steps and targets for 2": lambda: data.Buckets(
        ([[1, 2]], [[1]]), [[1, 2]], batch_size=1, per_step=True
    ),
    "a tuple is as many arrays, a list is one": lambda: data.Batches((1, 2, 3), batch_size=1),
    "axis None were given": lambda: data.Batches([1, 2], batch_size=1, axis=None),
    "axis 'a' were given": lambda: data.Batches([1, 2], batch_size=1, axis="a"),
    "no arrays": lambda: data.Batches(batch_size=1),
    "held_out = 2 of 2": lambda: data.train_test_split([1, 2], held_out=2),
    r"\[2, 1\] examples": lambda: data.train_test_split([1, 2], [1], held_out=1),
}


@pytest.mark.parametrize("held_out", [True, "3", None, "a", np.nan, np.inf, 0, 1.5, -0.5])
def test_no_number_and_no_fraction(held_out):
    with pytest.raises(ValueError, match=f"held_out, unless .*: {held_out!r} was given, expected"):
        data.train_test_split([1, 2, 3, 4], held_out=held_out)


@pytest.mark.parametrize("words", BAD)
def test_bad_input(words):
    with pytest.raises(ValueError, match=words):
        BAD[words]()
