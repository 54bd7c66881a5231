"""One step at a time, sampling, roll-out, beam search, sequence to sequence."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import tinygrad_seq as tgs
from tinygrad_seq import nn
from tinygrad_seq.trees import leaves


def language_model(rng=0, V=7):
    return nn.Sequential(
        nn.Embedding(V, 3, rng=rng), nn.GRU(3, 5, 2, dropout=0.5, rng=rng), nn.Linear(5, V, rng=rng)
    )


def model_of(logits):
    """A language model whose logits are these, whatever it reads."""
    V = len(logits)
    model = nn.Sequential(nn.Embedding(V, 2, rng=0), nn.RNN(2, 3, rng=0), nn.Linear(3, V))
    model.layers[2].weight.data = np.zeros((V, 3), "f4")
    model.layers[2].bias.data = np.array(logits, "f4")
    return model


class TestStepper:
    @pytest.mark.parametrize("B", [1, 3])
    def test_it_does_what_scan_does(self, B):
        rng = np.random.default_rng(0)
        cell = nn.Head(nn.LSTMCell(3, 5, rng=rng), 2, activation="tanh", rng=rng)
        xs = rng.standard_normal((6, B, 3)).astype("f4")
        ys, last = tgs.scan(cell, xs)
        step = tgs.Stepper(cell, xs[0])
        for x, y in zip(xs, ys.numpy(), strict=True):
            np.testing.assert_array_equal(step(x).numpy(), y)
        for a, b in zip(step.state, last, strict=True):
            np.testing.assert_array_equal(a.numpy(), b.numpy())
        step.state = cell.initial_state(B)
        np.testing.assert_array_equal(step(tgs.tensor(xs[0])).numpy(), ys.numpy()[0])

    def test_structures(self):
        def cell(x, state):
            total = state[0] + x["a"] * tgs.sum(x["b"], axis=-1, keepdims=True)
            return {"total": total, "first": total[:, 0]}, (total,)

        step = tgs.Stepper(cell, {"a": np.ones((2, 3)), "b": np.ones((2, 2))}, (np.zeros((2, 3)),))
        step({"a": np.ones((2, 3)), "b": np.ones((2, 2))})
        y = step({"a": np.full((2, 3), 2.0), "b": np.ones((2, 2))})
        assert y["total"].numpy().tolist() == [[6.0] * 3] * 2
        assert y["first"].shape == (2,)
        assert step.state[0].numpy().tolist() == [[6.0] * 3] * 2

    def test_an_output_is_not_written_again(self):
        step = tgs.Stepper(lambda x, h: (h + x, h + x), np.ones((1, 2)), np.zeros((1, 2)))
        first = step(np.ones((1, 2)))
        step(np.ones((1, 2)))
        assert first.numpy().tolist() == [[1.0, 1.0]]

    def test_errors(self):
        cell = nn.RNNCell(3, 4, zoneout=0.5, rng=0)
        with pytest.raises(tgs.TraceError, match=r"draws random numbers.*model.eval\(\)"):
            tgs.Stepper(cell, np.ones((1, 3), "f4"))
        cell.eval()
        step = tgs.Stepper(cell, np.ones((1, 3), "f4"))
        with pytest.raises(tgs.ShapeError, match=r"x has shape \(2, 3\), expected \(1, 3\)"):
            step(np.ones((2, 3), "f4"))
        with pytest.raises(tgs.ShapeError, match=r"a state of \(1, 3\) given, expected \(1, 4\)"):
            step.state = tgs.zeros(1, 3)
        with pytest.raises(tgs.ShapeError, match="state is "):
            step.state = (tgs.zeros(1, 4), tgs.zeros(1, 4))
        with pytest.raises(tgs.ShapeError, match=r"x of one step has shape \(7, 1, 3\)"):
            tgs.Stepper(cell, np.ones((7, 1, 3), "f4"))
        with pytest.raises(tgs.ShapeError, match="x has no rows"):
            tgs.Stepper(cell, np.ones((0, 3), "f4"))


class TestGenerate:
    def test_the_likeliest_are_those_of_the_whole_sequence(self):
        """Feeding back one at a time is running the model over all that there is so far."""
        model, prompt = language_model(), [[1, 2], [3, 0], [5, 5]]
        made = tgs.generate(model, prompt, 6, temperature=0)
        assert model.training
        model.eval()
        so_far = np.array(prompt)
        for row in made:
            best = model(so_far).numpy()[-1].argmax(axis=-1)
            assert row.tolist() == best.tolist()
            so_far = np.concatenate([so_far, best[None]])
        assert tgs.generate(model, [1, 3, 5], 6, temperature=0).tolist() == made[:, 0].tolist()

    def test_from_a_state(self):
        """One to a sequence: the first state may be made of the one."""
        model, so_far = language_model(), np.array([[1, 2], [3, 0]])
        states = np.random.default_rng(0).standard_normal((2, 2, 5)).astype("f4")  # of each layer
        made = tgs.generate(model, so_far, 5, temperature=0, state=tuple(states))
        model.eval()
        for row in made:
            logits, _ = model.with_state(so_far, (states,))
            assert row.tolist() == logits.numpy()[-1].argmax(axis=-1).tolist()
            so_far = np.concatenate([so_far, row[None]])
        with pytest.raises(tgs.ShapeError, match=r"initial_state gives \(a tensor, a tensor\)"):
            tgs.generate(model, so_far, 5, state=tuple(states[:1]))

    @pytest.mark.parametrize("layers", [1, 2])
    def test_going_on_from_where_the_model_was(self, layers):
        """From the state that with_state gives, of layers of any kind and in any nesting."""
        recurrent = nn.Sequential(
            nn.LSTM(4, 5, layers), nn.Recurrent([nn.GRUCell(5 - k, 4) for k in range(layers)])
        )
        model = nn.Sequential(nn.Embedding(6, 4), recurrent, nn.RNN(4, 5, layers), nn.Linear(5, 6))
        ids = np.array([[1, 2], [3, 0], [5, 5]])
        _, state = model.with_state(ids[:2])
        made = tgs.generate(model, ids[2:], 5, temperature=0, state=state)
        np.testing.assert_array_equal(made, tgs.generate(model, ids, 5, temperature=0))
        layer, xs = nn.LSTM(2, 2, layers), np.random.default_rng(0).standard_normal((3, 2, 2))
        _, state = layer(xs.astype("f4")[:2])
        for given in (state, tuple((h, c) for h, c in zip(*state, strict=True))):
            made = tgs.roll_out(layer, xs[2:], 4, state=given)
            np.testing.assert_allclose(made, tgs.roll_out(layer, xs, 4), rtol=1e-5)

    def test_symbols_are_drawn_as_their_logits_say(self):
        V, logits = 4, np.array([0.0, 1.0, 2.0, -1.0], "f4")
        model = model_of(logits)
        for temperature in (1.0, 2.0):
            drawn = tgs.generate(model, np.zeros((1, 400), int), 10, temperature=temperature, rng=0)
            expected = np.exp(logits / temperature)
            found = np.bincount(drawn.ravel(), minlength=V) / drawn.size
            np.testing.assert_allclose(found, expected / expected.sum(), atol=0.02)
        drawn = tgs.generate(model, np.zeros((1, 50), int), 10, top_k=2, rng=0)
        assert set(drawn.ravel().tolist()) == {1, 2}
        again = tgs.generate(model, np.zeros((1, 50), int), 10, top_k=2, rng=0)
        assert (again == drawn).all()

    @pytest.mark.parametrize("temperature", [1e-3, 1e-40, 1e-320, np.float32(1e-40)])
    def test_a_temperature_near_0_is_one_of_0(self, temperature):
        drawn = tgs.generate(model_of([1, 2, 3, 2.5]), [0], 20, temperature=temperature, rng=0)
        assert set(drawn.tolist()) == {2}

    @pytest.mark.parametrize("k", [1, 2, 3, 6, 9])
    def test_as_many_stay_as_top_k_says(self, k):
        """Of equal logits the first."""
        model = model_of([1, 2, 2, 3, 2, 0])
        for temperature in (3.0, np.inf):
            drawn = tgs.generate(
                model, np.zeros((1, 200), int), 5, temperature=temperature, top_k=k, rng=0
            )
            assert set(drawn.ravel().tolist()) == set([3, 1, 2, 4, 0, 5][:k])

    def test_a_symbol_of_minus_infinity_is_never_drawn(self):
        drawn = tgs.generate(model_of([0, -np.inf, 1]), np.zeros((1, 50), int), 5, rng=0)
        assert set(drawn.ravel().tolist()) == {0, 2}

    def test_roll_out(self):
        model = nn.Sequential(nn.LSTM(2, 4, rng=0), nn.Linear(4, 2, rng=0))
        start = np.random.default_rng(0).standard_normal((3, 2, 2)).astype("f4")
        made = tgs.roll_out(model, start, 4)
        so_far = start
        for row in made:
            y = model(so_far).numpy()[-1]
            np.testing.assert_allclose(row, y, atol=1e-6)
            so_far = np.concatenate([so_far, y[None]])
        with pytest.raises(tgs.ShapeError, match=r"predicts \(2, 3\), expected \(2, 2\)"):
            tgs.roll_out(nn.Sequential(nn.RNN(2, 3)), start, 2)
        with pytest.raises(ValueError, match="as_cell: a Linear was given, expected a recurrent"):
            tgs.roll_out(nn.Linear(2, 2), start, 2)

    def test_a_model_of_ones_own_is_that_of_its_layers(self):
        model = language_model()

        class Own(nn.Module):
            def __init__(self):
                self.layers = nn.Sequential(*model.layers)

            def forward(self, ids, state=None):
                return self.layers.with_state(ids, state)

        own, prompt = Own(), np.array([[1, 2], [3, 0]])
        a, b = (tgs.generate(each, prompt, 20, rng=0) for each in (model, own))
        np.testing.assert_array_equal(a, b)
        assert own.training
        _, state = own(prompt)
        a = tgs.generate(own, prompt[:1], 5, temperature=0, state=state)
        b = tgs.generate(own, np.concatenate([prompt, prompt[:1]]), 5, temperature=0)
        np.testing.assert_array_equal(a, b)

    def test_errors(self):
        model = language_model()
        bad = {
            "ids from 7 to 7 were given.*vocabulary that of another": lambda: tgs.generate(
                model, [7], 2
            ),
            "ids from -1 to -1 were given": lambda: tgs.generate(model, [-1], 2),
            r"expected integers \(T,\) or \(T, B\)": lambda: tgs.generate(model, [], 2),
            "generate: prompt: the rows .*pad_seq": lambda: tgs.generate(model, [[1], [1, 2]], 2),
            "roll_out: start: the rows given": lambda: tgs.roll_out(nn.GRU(1, 1), [[1], [1, 2]], 2),
            "temperature -1 was given": lambda: tgs.generate(model, [1], 2, temperature=-1),
            "temperature 'hot' was given": lambda: tgs.generate(model, [1], 2, temperature="hot"),
            r"GRU: x has shape \(1, 1\), expected": lambda: tgs.generate(nn.GRU(3, 4), [1], 2),
            "generate: model: .* was given, .* not a class": lambda: tgs.generate(nn.GRU, [1], 2),
            r"logits \(1, 4\) of symbols \(1, 1\), expected \(T, B, V\)": lambda: tgs.generate(
                lambda ids, state: (tgs.zeros(1, 4), state), [1], 2
            ),
            "generate: the model has a GRU that runs from the last": lambda: tgs.generate(
                nn.Sequential(nn.Linear(1, 1), nn.GRU(1, 1, bidirectional=True)), [1], 2
            ),
            "generate: the model's logits at step 0 hold NaN": lambda: tgs.generate(
                model_of([0, np.nan, 1]), [0], 2
            ),
            "step 0 hold NaN, or their largest is infinite": lambda: tgs.generate(
                model_of([-np.inf, -np.inf]), [0], 2, temperature=0
            ),
            "top_k: 0 was given": lambda: tgs.generate(model, [1], 2, top_k=0),
            "the model has no recurrent layer": lambda: tgs.generate(
                nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 3)), [1], 2
            ),
            "as_cell: a Linear was given, expected a": lambda: nn.as_cell(nn.Linear(2, 2)),
            "as_cell: a Conv1d was given": lambda: nn.as_cell(nn.Conv1d(2, 2, 1)),
            "as_cell: None was given": lambda: nn.as_cell(None),
            "as_cell: .* was given.*, not a class": lambda: nn.as_cell(nn.GRU),
            "runs from the last step": lambda: nn.as_cell(nn.GRU(2, 3, bidirectional=True)),
        }
        for words, call in bad.items():
            with pytest.raises(ValueError, match=words):
                call()


def every_sequence(table, start, end, longest):
    """All sequences with the sum of their log-probabilities, the best first.

    ``table[n, a, b]`` are those of what comes at place n after a symbol b that followed a.
    """
    found = []
    symbols = [v for v in range(len(table)) if v != end]
    for n in range(longest + 1):
        for ids in itertools.product(symbols, repeat=n):
            line = [0, start, *ids] + [end] * (n < longest)
            total = sum(table[(k, *line[k : k + 3])] for k in range(len(line) - 2))
            found.append((total, list(ids)))
    return sorted(found, key=lambda each: -each[0])


@pytest.mark.parametrize("seed", range(5))
def test_beam_search_finds_the_likeliest(seed):
    """Wide enough it is exhaustive, and with a width of 1 greedy."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.standard_normal((4, 4, 4, 4))
    table = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    def step(ids, state):
        before, place = state["before"], state["place"]
        assert len(before) == len(ids)
        return logits[place, before, ids], {"before": ids, "place": place + 1}

    def search(width):
        first = {"before": np.zeros(width, int), "place": np.zeros(width, int)}
        return tgs.beam_search(step, first, start=0, end=3, width=width, longest=4)

    expected = every_sequence(table, 0, 3, 4)
    for hypothesis, (score, ids) in zip(search(120)[:20], expected, strict=False):
        assert hypothesis.score == pytest.approx(score)
        assert hypothesis.ids == ids
        assert hypothesis.ended == (len(ids) < 4)
    ids, line = [], [0, 0]
    while len(ids) < 4 and (symbol := int(logits[len(ids), line[-2], line[-1]].argmax())) != 3:
        ids.append(symbol)
        line.append(symbol)
    assert search(1)[0].ids == ids
    assert search(2)[0].score >= search(1)[0].score
    with pytest.raises(ValueError, match="beam_search: width: 0 was given"):
        search(0)


LOGITS = np.log([[0.5, 0.3, 0.2]] * 2)


def search(logits=LOGITS, state=(), **options):
    def step(ids, state):
        return logits, state

    given = {"start": 0, "end": 2, "width": 2, "longest": 3, "step": step, **options}
    return tgs.beam_search(given.pop("step"), state, **given)


def test_the_first_state_may_be_one_row():
    def step(ids, state):
        seen.append(state["h"].shape)
        return LOGITS[[0, 0, 0]] + state["h"], {"h": state["h"] + 1}

    for make in (np.asarray, tgs.tensor):
        seen = []
        one = search(step=step, state={"h": make([[1.0, 2.0, 0.0]])}, width=3)
        assert seen == [(3, 3)] * 3
        assert one == search(step=step, state={"h": make([[1.0, 2.0, 0.0]] * 3)}, width=3)


@pytest.mark.parametrize("kind", [np.ndarray.tolist, tgs.tensor], ids=["list", "tensor"])
def test_logits_may_be_a_list_or_a_tensor(kind):
    assert search(kind(LOGITS)) == search()


BAD_SEARCH = {
    "the model's logits at step 0 hold NaN": lambda: search(LOGITS * np.nan),
    "end = 99 was given, expected a symbol from 0 to 2": lambda: search(end=99),
    "end: 'a' was given, expected an integer from 0": lambda: search(end="a"),
    "start: 'a' was given, expected an integer from 0": lambda: search(start="a"),
    "length_penalty nan was given, expected a finite": lambda: search(length_penalty=np.nan),
    "length_penalty 'a' was given": lambda: search(length_penalty="a"),
    "None was given as step, expected a function": lambda: search(step=None),
    r"step returned a ndarray, expected a pair \(l": lambda: search(step=lambda ids, state: LOGITS),
    r"step gave logits <U2\(\), expected numbers \(2, V\)": lambda: search("ab"),
    r"step gave logits float64\(1, 3\), expected numbers \(2, V\)": lambda: search(LOGITS[:1]),
    r"state has a leaf of shape \(\), expected \(1, ...\), or \(2": lambda: search(state=None),
    r"state has a leaf of shape \(3,\), expected": lambda: search(state={"h": np.zeros(3)}),
    r"a leaf of shape \(\), expected \(2, ...\); without a state": lambda: search(
        step=lambda ids, state: (LOGITS, None)
    ),
    r"returned a state with a leaf of shape \(1,\), expected": lambda: search(
        step=lambda ids, state: (LOGITS, {"h": np.zeros(1)})
    ),
}


@pytest.mark.parametrize("words", BAD_SEARCH)
def test_bad_search(words):
    with pytest.raises(ValueError, match=f"beam_search: .*{words}"):
        BAD_SEARCH[words]()


class TestAttention:
    def test_against_loops(self):
        rng = np.random.default_rng(0)
        T, S, B, H, K = 3, 4, 2, 5, 2
        q, k, v = (rng.standard_normal(shape) for shape in ((T, B, H), (S, B, H), (S, B, K)))
        mask = np.array([[1, 1], [1, 1], [1, 0], [0, 0]], bool)
        k[~mask] = v[~mask] = np.nan
        tracked = tgs.tensor(q, requires_grad=True)
        seen, weights = nn.functional.dot_attention(tracked, k, v, mask)
        seen.sum().backward()
        assert np.isfinite(tracked.grad.numpy()).all()
        for t, b in np.ndindex(T, B):
            places = np.flatnonzero(mask[:, b])
            a = np.exp([q[t, b] @ k[s, b] for s in places])
            a /= a.sum()
            np.testing.assert_allclose(weights.numpy()[t, b, places], a)
            np.testing.assert_allclose(
                seen.numpy()[t, b], sum(w * v[s, b] for w, s in zip(a, places, strict=True))
            )
        assert not weights.numpy()[:, 1, 2:].any()

    def test_scores_far_below_zero(self):
        q, k = np.full((1, 1, 1), 1e6), np.array([-1e6, -2e6, 5.0]).reshape(3, 1, 1)
        _, weights = nn.functional.dot_attention(q, k, mask=np.array([[True], [True], [False]]))
        assert weights.tolist() == [[[1.0, 0.0, 0.0]]]

    def test_derivative_and_nothing_to_see(self):
        rng = np.random.default_rng(0)
        q, k = rng.standard_normal((2, 2, 3)), rng.standard_normal((3, 2, 3))
        mask = np.array([[1, 0], [1, 0], [0, 0]], bool)
        attend = lambda q, k: nn.functional.dot_attention(q, k, mask=mask)[0]  # noqa: E731
        assert tgs.gradcheck(attend, (tgs.tensor(q), tgs.tensor(k)))
        assert not attend(q, k).numpy()[:, 1].any()
        with pytest.raises(tgs.ShapeError, match=r"a mask bool\(2, 3\) was given"):
            nn.functional.dot_attention(q, k, mask=mask.T)


class TestSeq2Seq:
    @pytest.mark.parametrize("layer", ["lstm", "gru"])
    @pytest.mark.parametrize("attention", [True, False])
    def test_decoding_is_teacher_forcing_with_its_own_symbols(self, layer, attention):
        rng = np.random.default_rng(1)
        model = nn.Seq2Seq(6, 5, 4, layer=layer, attention=attention, dropout=0.3, rng=rng)
        source, lengths = rng.integers(0, 6, (7, 3)), [7, 2, 4]
        made = model.greedy(source, lengths, start=0, end=4, longest=6)
        wide = model.beam(source, lengths, start=0, end=4, longest=6, width=1)
        assert made == wide
        model.eval()
        for b, ids in enumerate(made):
            target = np.array([0, *ids])[:, None]
            logits = model(source[:, b : b + 1], target, [lengths[b]]).numpy()[:, 0]
            assert logits[: len(ids)].argmax(axis=-1).tolist() == ids
            if len(ids) < 6:
                assert logits[len(ids)].argmax() == 4

    def test_padding_changes_nothing(self):
        rng = np.random.default_rng(1)
        model = nn.Seq2Seq(6, 5, 4, rng=rng)
        source, target = rng.integers(0, 6, (5, 1)), rng.integers(0, 5, (3, 1))
        plain = model(source, target).numpy()
        padded = np.concatenate([source, rng.integers(0, 6, (4, 1))])
        np.testing.assert_allclose(model(padded, target, [5]).numpy(), plain, atol=1e-6)

    def test_it_learns_to_turn_a_sequence_around(self):
        rng = np.random.default_rng(0)
        model = nn.Seq2Seq(7, 7, 32, rng=rng)
        optimizer = tgs.optim.Adam(model.parameters(), 1e-2)
        for _ in range(120):
            ids = rng.integers(2, 7, (4, 32))
            target = np.concatenate([np.zeros((1, 32), int), ids[::-1], np.ones((1, 32), int)])
            loss = nn.functional.cross_entropy(model(ids, target[:-1]), target[1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ids = rng.integers(2, 7, (4, 50))
        made = model.greedy(ids, start=0, end=1, longest=6)
        right = sum(m == ids[::-1, b].tolist() for b, m in enumerate(made))
        assert right >= 40

    @pytest.mark.parametrize("penalty", [0.0, 0.7])
    def test_scores_are_the_models_log_probabilities(self, penalty):
        rng = np.random.default_rng(1)
        model = nn.Seq2Seq(6, 5, 4, dropout=0.3, rng=rng)
        source, lengths = rng.integers(0, 6, (7, 3)), [7, 0, 4]
        options = {"start": 0, "end": 4, "longest": 5, "width": 6, "length_penalty": penalty}
        found = model.hypotheses(source, lengths, **options)
        assert [each[0].ids for each in found] == model.beam(source, lengths, **options)
        model.eval()
        for b, each in enumerate(found):
            assert 1 < len(each) <= 6
            assert [h.score for h in each] == sorted((h.score for h in each), reverse=True)
            for h in each:
                wanted = [*h.ids, 4] if h.ended else h.ids
                given = np.array([0, *wanted[:-1]])[:, None]
                logits = model(source[:, b : b + 1], given, [lengths[b]])
                p = tgs.log_softmax(logits, axis=-1).numpy()[np.arange(len(wanted)), 0, wanted]
                assert h.score == pytest.approx(p.sum() / len(wanted) ** penalty, rel=1e-4)

    def test_where_it_looks(self):
        rng = np.random.default_rng(1)
        model = nn.Seq2Seq(6, 5, 4, rng=rng)
        source, target = rng.integers(0, 6, (7, 3)), rng.integers(0, 5, (4, 3))
        weights = model.attention(source, target, [7, 2, 4]).numpy()
        assert weights.shape == (4, 3, 7)
        np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-6)
        assert not weights[:, 1, 2:].any()

    def test_sources_without_a_symbol(self):
        model = nn.Seq2Seq(6, 5, 4, rng=0)
        source = np.ones((3, 2), int)
        options = {"start": 0, "end": 4, "longest": 3}
        greedy = model.greedy(source, [0, 2], **options)
        assert greedy == model.beam(source, [0, 2], width=1, **options)
        assert model.greedy(source[:, :0], **options) == []

    def test_errors(self):
        def without_numbers():
            model = nn.Seq2Seq(3, 3, 4)
            model.output.bias.data = np.full(3, np.nan, "f4")
            return model

        bad = {
            "no attention, expected attention=True": lambda: nn.Seq2Seq(
                3, 3, 4, attention=False
            ).attention(np.array([[1]]), np.array([[0]])),
            "start = 9 was given, expected a symbol from 0 to 2": lambda: nn.Seq2Seq(
                3, 3, 4
            ).greedy(np.array([[1]]), start=9, end=1, longest=3),
            "Seq2Seq: end: 'a' was given, expected an integer": lambda: nn.Seq2Seq(3, 3, 4).beam(
                np.array([[1]]), start=0, end="a", longest=3
            ),
            "greedy: the model's logits at step 0 hold NaN": lambda: without_numbers().greedy(
                np.array([[1]]), start=0, end=1, longest=3
            ),
            r"target has shape \(1, 2\), expected \(T, 1\)": lambda: nn.Seq2Seq(3, 3, 4)(
                np.array([[1]]), np.array([[0, 0]])
            ),
            r"source has shape \(0, 1\), expected one step at least": lambda: nn.Seq2Seq(3, 3, 4)(
                np.zeros((0, 1), int), np.array([[0]])
            ),
            "Seq2Seq: source: the rows given differ": lambda: nn.Seq2Seq(3, 3, 4).greedy(
                [[1], [1, 2]], start=0, end=1, longest=3
            ),
        }
        for words, call in bad.items():
            with pytest.raises(ValueError, match=words):
                call()
        with pytest.raises(ValueError, match="layer 'cnn' was given"):
            nn.Seq2Seq(3, 3, 4, layer="cnn")
        with pytest.raises(tgs.ShapeError, match=r"source has shape \(3,\), expected \(S, B\)"):
            nn.Seq2Seq(3, 3, 4)(np.array([1, 2, 0]), np.array([[0]]))
        with pytest.raises(tgs.ShapeError, match=r"source has shape \(3,\), expected \(S, B\)"):
            nn.Seq2Seq(3, 3, 4).beam(np.array([1, 2, 0]), start=0, end=1, longest=3)
        with pytest.raises(ValueError, match="beam: width: 0 was given"):
            nn.Seq2Seq(3, 3, 4).beam(np.array([[1]]), start=0, end=1, longest=3, width=0)


def test_a_model_as_a_cell():
    model = nn.Sequential(nn.LSTM(3, 4, 2, rng=0), tgs.tanh, nn.Linear(4, 2, rng=0))
    x = np.random.default_rng(0).standard_normal((5, 2, 3)).astype("f4")
    ys, states = tgs.unroll(nn.as_cell(model), x)
    np.testing.assert_allclose(ys.numpy(), model(x).numpy(), atol=1e-6)
    assert [leaf.shape for leaf in leaves(states)] == [(2, 4)] * 4
    cell = nn.RNNCell(2, 3)
    assert nn.as_cell(cell) is cell
    with pytest.raises(tgs.ShapeError, match="expected a tuple of 2, one for each cell"):
        nn.as_cell(model)(tgs.tensor(x[0]), None)


def test_a_cell_of_functions_is_given_its_state():
    layer = nn.Recurrent([lambda x, h: (h + x, h + x)] * 2)
    x, states = np.ones((3, 2, 1), "f4"), (np.zeros((2, 1), "f4"), np.ones((2, 1), "f4"))
    ys, _ = tgs.scan(nn.as_cell(layer), x, states)
    np.testing.assert_array_equal(ys.numpy(), layer(x, states)[0].numpy())
    assert tgs.roll_out(layer, x, 2, state=states)[:, 0, 0].tolist() == [7.0, 17.0]
    with pytest.raises(ValueError, match=r"no initial_state\(batch_size\) and no state"):
        tgs.roll_out(layer, x, 2)
