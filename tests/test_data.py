"""Windows, padding, batches, held-out parts and CSV columns."""

from __future__ import annotations

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


def test_padding():
    padded, lengths = data.pad_sequences([[1.0, 2.0], [], [3.0]], value=-1)
    assert padded.T.tolist() == [[1, 2], [-1, -1], [3, -1]]
    assert lengths.tolist() == [2, 0, 1]
    padded, _ = data.pad_sequences([np.ones((2, 3)), np.ones((1, 3))], batch_first=True)
    assert padded.shape == (2, 2, 3)
    assert padded.dtype == np.float64


class TestBatches:
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

    def test_empty(self):
        assert list(data.Batches(np.zeros((0, 2)), batch_size=2)) == []


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
    "expected a series": lambda: data.windows(3.0, 1),
    "no sequences": lambda: data.pad_sequences([]),
    "equal further axes": lambda: data.pad_sequences([np.ones((2, 3)), np.ones((2, 2))]),
    "batch_size: 0 was given": lambda: data.Batches([1, 2], batch_size=0),
    r"have \[2, 3\] examples": lambda: data.Batches([1, 2], [1, 2, 3], batch_size=1),
    "batch_size: 2.7": lambda: data.Batches([1, 2], batch_size=2.7),
    "as many axes as arrays": lambda: data.Batches(np.ones((2, 2)), batch_size=1, axis=5),
    "-1 was given to pad uint8": lambda: data.pad_sequences([np.ones(2, np.uint8)], value=-1),
    "pad int64 with": lambda: data.pad_sequences([[1, 2], [1]], value=np.nan),
    "no arrays": lambda: data.Batches(batch_size=1),
    "held_out = 2 of 2": lambda: data.train_test_split([1, 2], held_out=2),
    r"\[2, 1\] examples": lambda: data.train_test_split([1, 2], [1], held_out=1),
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input(words):
    with pytest.raises(ValueError, match=words):
        BAD[words]()
