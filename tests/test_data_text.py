"""Vocabularies, and a long text as streams side by side."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinygrad_seq as tgs
from tinygrad_seq.data import Streams, Vocabulary, pad_sequences

SPECIAL = {"padding": "<pad>", "start": "<s>", "end": "</s>", "unknown": "<?>"}
texts = st.text(min_size=1, max_size=20)


class TestCharacters:
    @given(text=texts, special=st.sets(st.sampled_from(sorted(SPECIAL))))
    def test_there_and_back(self, text, special):
        vocabulary = Vocabulary.of_characters(text, **{role: SPECIAL[role] for role in special})
        ids = vocabulary.encode(text)
        assert (ids.shape, ids.dtype) == ((len(text),), np.int64)
        assert vocabulary.decode(ids) == text
        assert [vocabulary.symbols[k] for k in ids] == list(text)
        assert len(vocabulary) == len(set(text)) + len(special)
        assert all(character in vocabulary for character in text)

    def test_the_order_of_unicode(self):
        vocabulary = Vocabulary.of_characters("hello, été\n")
        assert "".join(vocabulary.symbols) == "\n ,ehlot\xe9"
        assert vocabulary.encode("hello").tolist() == [4, 3, 5, 5, 6]
        assert vocabulary == Vocabulary.of_characters(["ol\nhe, ", "été"])
        assert "x" not in vocabulary
        assert (vocabulary.padding, vocabulary.unknown) == (None, None)

    def test_special_symbols_come_first(self):
        v = Vocabulary.of_characters("ba", **SPECIAL)
        assert v.symbols == ("<pad>", "<s>", "</s>", "<?>", "a", "b")
        assert (v.padding, v.start, v.end, v.unknown) == (0, 1, 2, 3)
        assert v.encode("bxa").tolist() == [5, 3, 4]
        assert v.encode(["<s>", "b", "</s>"]).tolist() == [1, 5, 2]
        assert v.encode("").tolist() == []
        padded, _ = pad_sequences([[v.start, *v.encode("ab"), v.end], [v.start, v.end]], v.padding)
        assert padded.T.tolist() == [[1, 4, 5, 2], [1, 2, 0, 0]]
        assert [v.decode(row) for row in padded.T] == ["ab", ""]

    def test_decoding_stops_at_the_end(self):
        v = Vocabulary.of_characters("ab", padding="<pad>", end="</s>")
        assert v.decode([2, 0, 3, 1, 2]) == "ab"
        assert v.decode([]) == ""

    def test_an_end_that_the_text_holds(self):
        v = Vocabulary.of_characters("anna\nbob\n", end="\n")
        assert v.symbols[v.end] == "\n"
        assert len(v) == 5
        assert v.decode(v.encode("bob\nanna")) == "bob"


class TestTokens:
    def test_frequent_first(self):
        v = Vocabulary.of_tokens("the cat and the dog and the bird")
        assert v.symbols == ("the", "and", "bird", "cat", "dog")
        assert v.encode("the  dog\n").tolist() == [0, 4]
        assert v.decode([0, 4]) == "the dog"

    def test_texts_and_lists_of_tokens(self):
        one = Vocabulary.of_tokens(["a b", "b c"])
        assert one == Vocabulary.of_tokens([["a", "b"], ["b", "c"]])
        assert one.symbols == ("b", "a", "c")
        pages = Vocabulary.of_tokens([["log in", "buy"], ["log in"]])
        assert pages.encode(["buy", "log in"]).tolist() == [1, 0]

    def test_rare_ones_are_unknown(self):
        v = Vocabulary.of_tokens("a a b b c", minimum_count=2, unknown="<?>")
        assert v.symbols == ("<?>", "a", "b")
        assert v.encode("a c d").tolist() == [1, 0, 0]
        assert v.decode([1, 0]) == "a <?>"

    def test_an_unknown_that_the_texts_hold(self):
        v = Vocabulary.of_tokens("a <unk> <unk>", unknown="<unk>")
        assert v.symbols == ("<unk>", "a")
        assert v.encode("b <unk>").tolist() == [0, 0]

    @given(texts=st.lists(st.lists(texts, min_size=1), min_size=1, max_size=4))
    def test_against_counting(self, texts):
        v = Vocabulary.of_tokens(texts)
        flat = [token for text in texts for token in text]
        assert sorted(v.symbols) == sorted(set(flat))
        counts = [flat.count(symbol) for symbol in v.symbols]
        assert counts == sorted(counts, reverse=True)


class TestState:
    @pytest.mark.parametrize("special", [{}, SPECIAL], ids=["plain", "special"])
    def test_through_json(self, special):
        v = Vocabulary.of_characters("some text \N{SNOWMAN}\ud800", **special)
        state = json.loads(json.dumps(v.state()))
        again = Vocabulary.from_state(state)
        assert again == v
        assert again.fingerprint == v.fingerprint == state["fingerprint"]
        assert again.encode("text").tolist() == v.encode("text").tolist()
        assert pickle.loads(pickle.dumps(v)) == v

    def test_the_fingerprint_is_of_everything(self):
        made = [
            Vocabulary(("a", "b")),
            Vocabulary(("b", "a")),
            Vocabulary(("a", "c")),
            Vocabulary(("a", "b"), "tokens"),
            Vocabulary(("a", "b"), padding=0),
            Vocabulary(("a", "b"), end=0),
            Vocabulary(("a", "b", "c")),
        ]
        assert len({v.fingerprint for v in made}) == len(made)
        assert made[0].fingerprint == "d4a3621bfa0ee4ff"  # so that saved ones stay good
        assert repr(made[3]) == f"<Vocabulary of 2 tokens, fingerprint {made[3].fingerprint}>"

    def test_a_model_of_another_vocabulary(self):
        v, other = Vocabulary.of_characters("abc"), Vocabulary.of_characters("abd")
        embedding = tgs.nn.Embedding(len(v), 4)
        v.check(len(embedding.weight))
        v.check(3, v.fingerprint)
        with pytest.raises(ValueError, match="it has 3 symbols and the model's embedding 4, exp"):
            v.check(4)
        words = f"fingerprint is {other.fingerprint} and the model's {v.fingerprint}, though both"
        with pytest.raises(ValueError, match=words):
            other.check(3, v.fingerprint)


class TestStreams:
    @given(
        n=st.integers(2, 60),
        batch_size=st.integers(1, 5),
        length=st.integers(1, 8),
        trailing=st.sampled_from([(), (2,)]),
    )
    def test_windows_continue_each_other(self, n, batch_size, length, trailing):
        series = np.arange(n * int(np.prod(trailing))).reshape(n, *trailing)
        steps = (n - 1) // batch_size
        if steps < length:
            with pytest.raises(ValueError, match="too few for windows"):
                Streams(series, batch_size=batch_size, length=length)
            return
        streams = Streams(series, batch_size=batch_size, length=length)
        windows = list(streams)
        assert len(windows) == len(streams) == len(list(streams))
        assert all(len(x) == length for x, _ in windows[:-1])
        whole = np.concatenate([x for x, _ in windows]), np.concatenate([y for _, y in windows])
        for b in range(batch_size):
            start = b * steps
            np.testing.assert_array_equal(whole[0][:, b], series[start : start + steps])
            np.testing.assert_array_equal(whole[1][:, b], series[start + 1 : start + steps + 1])
        np.testing.assert_array_equal(streams.inputs, whole[0])
        np.testing.assert_array_equal(streams.targets, whole[1])
        assert n - batch_size * steps - 1 < batch_size  # no more is left out

    def test_a_text(self):
        v = Vocabulary.of_characters("abcdefghij")
        streams = Streams(v.encode("abcdefghij"), batch_size=2, length=3)
        (x, y), (rest, _) = streams
        assert [v.decode(row) for row in x.T] == ["abc", "efg"]
        assert [v.decode(row) for row in y.T] == ["bcd", "fgh"]
        assert [v.decode(row) for row in rest.T] == ["d", "h"]
        assert not x.flags.writeable

    def test_a_carried_state_makes_windows_one_sequence(self, rng):
        streams = Streams(rng.standard_normal((40, 2)).astype("f4"), batch_size=3, length=5)
        layer = tgs.nn.RNN(2, 4, backend="tape", rng=0)
        at_once, _ = layer(streams.inputs)
        parts, state = [], None
        for x, _ in streams:
            y, state = layer(x, state)
            parts.append(y.numpy())
        np.testing.assert_allclose(np.concatenate(parts), at_once.numpy(), rtol=1e-6, atol=1e-7)


V = Vocabulary.of_characters("abc")
STATE = V.state()
BAD = {
    "of_characters: the text is empty": lambda: Vocabulary.of_characters(""),
    "of_characters: the text is empty, or no": lambda: Vocabulary.of_characters([]),
    "of_tokens: the text is empty": lambda: Vocabulary.of_tokens(" \n"),
    "no symbol is frequent enough; expected tokens": lambda: Vocabulary.of_tokens(
        "a b", minimum_count=2
    ),
    "minimum_count: 0 was given": lambda: Vocabulary.of_tokens("a", minimum_count=0),
    "of_characters: None was given, expected a text": lambda: Vocabulary.of_characters(None),
    "of_characters: 3 was given, expected a text": lambda: Vocabulary.of_characters(3),
    "of_tokens: None was given, expected a str or a list": lambda: Vocabulary.of_tokens(None),
    "of_tokens: 3 was given, expected a str or a list": lambda: Vocabulary.of_tokens([3]),
    "a list was given among the texts, expected a str; of_tokens": lambda: Vocabulary.of_characters(
        [["a"]]
    ),
    "symbol 3 was given 1 times, expected texts": lambda: Vocabulary.of_tokens([[3]]),
    "symbol '' was given 1 times": lambda: Vocabulary.of_characters("a", end=""),
    "'start': '<>'} were given, expected different ones": lambda: Vocabulary.of_characters(
        "a", padding="<>", start="<>"
    ),
    "padding ' ' was given, which the text holds": lambda: Vocabulary.of_characters(
        "a b", padding=" "
    ),
    "'a' was given 2 times": lambda: Vocabulary(("a", "a")),
    "no symbols were given": lambda: Vocabulary(()),
    r"kind 'words' was given, expected one of \['characters', 'tokens'\]": lambda: Vocabulary(
        ("a",), "words"
    ),
    "end = 1 was given, expected 0 to 0": lambda: Vocabulary(("a",), end=1),
    "end: -1 was given, expected an integer from 0": lambda: Vocabulary(("a",), end=-1),
    "'x' was given at place 2, counted from 0, .* vocabulary's 3 characters; build": lambda: (
        V.encode("abxc")
    ),
    "'d' was given at place 1.* 2 tokens": lambda: Vocabulary.of_tokens("a b").encode("a d"),
    "encode: 1 was given at place 0": lambda: Vocabulary.of_tokens("a", unknown="?").encode([1]),
    "encode: None was given, expected a text or a list of symbols": lambda: V.encode(None),
    r"encode: \['a'\] was given at place 0": lambda: V.encode([["a"]]),
    "decode: the rows given differ in length": lambda: V.decode([[0], [0, 1]]),
    "id 3 was given at place 1, expected 0 to 2; use": lambda: V.decode([0, 3]),
    "id -1 was given at place 0": lambda: V.decode([-1, 3]),
    r"ids of shape \(1, 1\) .* take one column": lambda: V.decode([[0]]),
    "dtype float64 were given, expected integers": lambda: V.decode([0.5]),
    r"keys \['symbols'\] were given, expected \['symbols', 'kind'": lambda: Vocabulary.from_state(
        {"symbols": ["a"]}
    ),
    "a NoneType was given, expected the dict that state": lambda: Vocabulary.from_state(None),
    "symbols: None was given, expected a list of them": lambda: Vocabulary.from_state(
        {**STATE, "symbols": None}
    ),
    "the state was changed since it was saved": lambda: Vocabulary.from_state(
        {**STATE, "symbols": ["a", "c", "b"]}
    ),
    "batch_size: 0 was given": lambda: Streams([1, 2], batch_size=0, length=1),
    "Streams: length: 0 was given": lambda: Streams([1, 2], batch_size=1, length=0),
    "a series of 10 makes 3 streams of 3 steps, too few for windows of 4; expected at least 13 v": (
        lambda: Streams(range(10), batch_size=3, length=4)
    ),
    "a series of 0 makes 1 streams of 0 steps": lambda: Streams([], batch_size=1, length=1),
    "Streams: one int was given, expected a series": lambda: Streams(3, batch_size=1, length=1),
    "Streams: one str was given, .* encode a text with vocabulary.encode": lambda: Streams(
        "hello world", batch_size=1, length=1
    ),
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input(words):
    with pytest.raises(ValueError, match=words):
        BAD[words]()


def test_13_values_are_enough():
    assert len(Streams(range(13), batch_size=3, length=4)) == 1
