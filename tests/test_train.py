"""fit: what it does each epoch, when it stops, and what is left when something goes wrong."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest

import tinygrad_seq as tgs
from tinygrad_seq import data, nn, optim, train

mse = nn.functional.mse_loss


def problem(rng, n=40):
    x = rng.standard_normal((n, 3))
    return x, x @ np.array([[1.0], [-2.0], [0.5]])


def model_and_optimizer(lr=0.05):
    model = nn.Linear(3, 1, rng=0)
    return model, optim.Adam(model.parameters(), lr=lr)


def test_it_learns(rng):
    x, y = problem(rng)
    model, optimizer = model_and_optimizer()
    history = train.fit(
        model,
        data.Batches(x, y, batch_size=8, rng=0),
        mse,
        optimizer,
        epochs=60,
        clip_norm=10.0,
        validation=[(x, y)],
        progress=False,
    )
    assert history.loss[-1] < 1e-3 * history.loss[0]
    assert len(history) == len(history.validation) == len(history.norm) == 60
    assert history["loss"] is history.loss
    assert history.validation[-1] == pytest.approx(train.evaluate(model, [(x, y)], mse))
    np.testing.assert_allclose(model.weight.numpy(), [[1, -2, 0.5]], atol=0.05)
    with pytest.raises(ValueError, match="'losses' was asked for"):
        history["losses"]


def test_it_is_the_open_loop(rng):
    x, y = problem(rng)
    by_fit, optimizer = model_and_optimizer()
    history = train.fit(
        by_fit, data.Batches(x, y, batch_size=16, rng=1), mse, optimizer, epochs=3, progress=False
    )
    by_hand, optimizer = model_and_optimizer()
    batches = data.Batches(x, y, batch_size=16, rng=1)
    losses = []
    for _ in range(3):
        total = 0.0
        for inputs, targets in batches:
            loss = mse(by_hand(inputs.astype("f4")), targets.astype("f4"))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * targets.size
        losses.append(total / y.size)
    assert history.loss == losses
    np.testing.assert_array_equal(by_fit.weight, by_hand.weight)


def test_gradients_from_before_are_no_part_of_an_update(rng):
    x, y = problem(rng)
    found = []
    for before in (0.0, 5.0):
        model, optimizer = model_and_optimizer()
        (model.weight * before).sum().backward()
        train.fit(model, [(x, y)], mse, optimizer, epochs=1, progress=False)
        found.append(model.weight.numpy())
    np.testing.assert_array_equal(*found)


def test_the_norm_is_the_mean_over_updates(rng):
    x, y = problem(rng)
    model, _ = model_and_optimizer()
    still = optim.SGD(model.parameters(), 1e-12)
    parts = [(x[:8], y[:8]), (x[8:], y[8:] + 50)]
    each = [
        train.fit(model, [part], mse, still, epochs=1, clip_norm=1.0, progress=False).norm[0]
        for part in parts
    ]
    both = train.fit(model, parts, mse, still, epochs=1, clip_norm=1.0, progress=False)
    assert both.norm == pytest.approx([sum(each) / 2])
    assert each[0] != pytest.approx(each[1], rel=0.1)


def test_lengths_go_to_the_model(rng):
    class Last(nn.Module):
        def __init__(self):
            self.rnn = nn.GRU(2, 4, rng=0)
            self.head = nn.Linear(4, 1, rng=0)

        def forward(self, x, lengths):
            return self.head(self.rnn(x, lengths=lengths)[1][0])

    x, y = rng.standard_normal((5, 12, 2)), rng.standard_normal((12, 1))
    lengths = rng.integers(0, 6, 12)
    model = Last()
    batches = data.Batches(x, y.T, lengths, batch_size=4, axis=1, rng=0)
    turned = [(a, b.T, c) for a, b, c in batches]
    optimizer = optim.Adam(model.parameters())
    history = train.fit(model, turned, mse, optimizer, epochs=2, progress=False)
    assert history.loss[1] < history.loss[0]


def test_padding_has_no_weight_in_the_mean_loss(rng):
    """The mean over two batches is the mean over their steps as one batch."""

    class PerStep(nn.Module):
        def __init__(self):
            self.head = nn.Linear(2, 1, rng=0)

        def forward(self, x, lengths):
            return self.head(x)

    def loss(p, t):
        return mse(p, t, t > -1e8)

    x, y = rng.standard_normal((5, 6, 2)), rng.standard_normal((5, 6, 1))
    lengths = np.array([5, 4, 1, 0, 2, 5])
    y[np.arange(5)[:, None] >= lengths] = -1e9
    model = PerStep()
    halves = [(x[:, k : k + 3], y[:, k : k + 3], lengths[k : k + 3]) for k in (0, 3)]
    whole = train.evaluate(model, [(x, y, lengths)], loss)
    assert train.evaluate(model, halves, loss) == pytest.approx(whole, rel=1e-6)


def test_of_several_inputs_lengths_weigh_no_targets():
    """Those of the first input say nothing of targets that follow the second."""

    def model(source, given, lengths):
        return given

    def batch(T, value):
        return (np.ones((T, 2, 1)), np.full((T, 2, 1), value)), np.zeros((T, 2, 1)), [1, 1]

    batches = [batch(3, 1.0), batch(1, 2.0)]  # of 6 and 2 targets
    assert train.evaluate(model, batches, mse) == pytest.approx((6 * 1 + 2 * 4) / 8)


def test_predict(rng):
    model = nn.Sequential(nn.Dropout(0.5, rng=0), nn.Linear(3, 1, rng=0))
    x, _ = problem(rng)
    y = train.predict(model, x)
    assert not y.requires_grad
    assert y.dtype == np.float32
    assert model.training
    np.testing.assert_array_equal(y, train.predict(model, x))
    model[0].eval()
    train.predict(model, [[1.0, 2.0, 3.0]])
    assert not model[0].training  # every module is in the mode that it was in
    assert model.training
    assert train.evaluate(model, [([[1.0, 2.0, 3.0]], [[0.5]])], mse) > 0
    layer = nn.GRU(3, 2)
    ys, state = train.predict(layer, np.ones((4, 1, 3)))
    again, _ = train.predict(layer, np.ones((1, 1, 3)), state=state)
    assert again[0].tolist() != ys[0].tolist()


class Weighted(nn.Module):
    """Of inputs x (B, 3) and w (B, 1): a product, and whatever ``more`` there is added."""

    def __init__(self):
        self.head = nn.Linear(3, 1, rng=0)

    def forward(self, x, w, more=0.0):
        return self.head(x) * w + more


class TestSeveralInputs:
    def test_a_tuple_is_as_many_arguments(self, rng):
        x, y = problem(rng)
        w = rng.random((40, 1))
        model, optimizer = model_and_optimizer()
        batches = data.Batches(x * w, y * w, batch_size=8, rng=0)
        model.bias.data = np.zeros(1, "f4")
        model.bias.requires_grad = False
        expected = train.fit(model, batches, mse, optimizer, epochs=2, progress=False)
        other = Weighted()
        other.head.load_state_dict(other.head.state_dict() | {"bias": np.zeros(1)})
        other.head.bias.requires_grad = False
        batches = data.Batches((x, w), y * w, batch_size=8, rng=0)
        optimizer = optim.Adam(other.parameters(), lr=0.05)
        found = train.fit(other, batches, mse, optimizer, epochs=2, progress=False)
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        made = train.predict(other, (x, w))
        np.testing.assert_allclose(made, train.predict(model, x * w), atol=1e-5)
        np.testing.assert_allclose(train.predict(other, (x, w), more=1.0) - 1, made, atol=1e-6)
        whole = train.evaluate(other, [((x, w), y * w)], mse)
        assert whole == pytest.approx(mse(made, (y * w).astype("f4")).item())

    def test_a_dict_is_one(self, rng):
        class Sum(nn.Module):
            def __init__(self):
                self.scale = nn.parameter(1.0)

            def forward(self, given):
                return self.scale * (given["a"] + given["b"])

        x, y = problem(rng)
        batches = data.Batches({"a": x[:, :1], "b": x[:, 1:2]}, y, batch_size=8)
        model = Sum()
        optimizer = optim.Adam(model.parameters(), lr=0.1)
        history = train.fit(model, batches, mse, optimizer, epochs=2, progress=False)
        assert history.loss[1] < history.loss[0]

    @pytest.mark.parametrize("more", [{"carry_state": True}, {"tbptt": (3, 5)}])
    def test_with_a_state(self, rng, more):
        class Two(nn.Module):
            def __init__(self):
                self.layer = nn.GRU(3, 2, backend="tape", rng=0)

            def forward(self, a, b, state=None, lengths=None):
                return self.layer(tgs.concat([a, b], axis=-1), state, lengths)

        a, b = rng.standard_normal((7, 4, 2)), rng.standard_normal((7, 4, 1))
        y, lengths, losses = rng.standard_normal((7, 4, 2)), np.array([7, 2, 4, 0]), []
        whole = np.concatenate([a, b], axis=-1)
        for model, inputs in ((Two(), (a, b)), (nn.GRU(3, 2, backend="tape", rng=0), whole)):
            optimizer = optim.SGD(model.parameters(), 0.1)
            batches = [(inputs, y, lengths)] * 2
            history = train.fit(model, batches, mse, optimizer, epochs=2, progress=False, **more)
            losses.append(history.loss)
        assert losses[0] == losses[1]

    def test_sequence_to_sequence_is_the_open_loop(self):
        rng = np.random.default_rng(0)
        sources = [rng.integers(2, 7, n) for n in rng.integers(1, 7, 24)]
        targets = [np.array([0, *ids[::2], 1]) for ids in sources]
        columns = (sources, [ids[:-1] for ids in targets]), [ids[1:] for ids in targets]
        options = {"batch_size": 8, "per_step": True, "target_value": -1}

        def loss(logits, wanted):
            return nn.functional.cross_entropy(logits, wanted, mask=wanted >= 0)

        by_fit, by_hand = (nn.Seq2Seq(7, 7, 8, rng=0) for _ in range(2))
        batches = data.Buckets(*columns, rng=1, **options)
        optimizer = optim.Adam(by_fit.parameters(), lr=0.01)
        history = train.fit(by_fit, batches, loss, optimizer, epochs=3, progress=False)
        assert history.loss[-1] < history.loss[0]
        optimizer = optim.Adam(by_hand.parameters(), lr=0.01)
        batches = data.Buckets(*columns, rng=1, **options)
        for _ in range(3):
            for (source, given), wanted, lengths in batches:
                optimizer.zero_grad()
                loss(by_hand(source, given, lengths), tgs.tensor(wanted)).backward()
                optimizer.step()
        for a, b in zip(by_fit.parameters(), by_hand.parameters(), strict=True):
            np.testing.assert_array_equal(a, b)

    def test_errors(self, rng):
        x, y = problem(rng)
        model, optimizer = model_and_optimizer()
        words = "model Linear cannot be called with a tuple of 2 inputs: too many .* a dict or a"
        with pytest.raises(ValueError, match="fit: the " + words):
            train.fit(model, [((x, x), y)], mse, optimizer, epochs=1, progress=False)
        with pytest.raises(ValueError, match="evaluate: the " + words):
            train.evaluate(model, [((x, x), y)], mse)
        with pytest.raises(ValueError, match=r"predict: .* a tuple of 1 inputs and lengths=\.\.\."):
            train.predict(model, (x,), lengths=[1])
        with pytest.raises(ValueError, match=r"cannot be called as model\(x1, x2, state\): too"):
            train.fit(model, [((x, x), y)], mse, optimizer, epochs=1, carry_state=True)


class TestMetrics:
    def test_the_history_has_them(self, rng):
        x = rng.standard_normal((40, 3))
        classes = (x.sum(axis=1) > 0).astype(int)
        model = nn.Sequential(nn.Linear(3, 2, rng=0), nn.Dropout(0.0))
        known, held_out = (x[:30], classes[:30]), (x[30:], classes[30:])
        seen = []

        def errors(prediction, targets):  # a plain number, an array or a tensor
            assert not (prediction * 1.0).requires_grad
            seen.append(model.training)
            return int((prediction.numpy().argmax(axis=-1) != targets.numpy()).sum())

        history = train.fit(
            model,
            data.Batches(*known, batch_size=8, rng=0),
            nn.functional.cross_entropy,
            optim.Adam(model.parameters(), 0.1),
            epochs=5,
            validation=[held_out],
            metrics={"accuracy": nn.functional.accuracy, "errors": errors},
            progress=False,
        )
        assert list(history.metrics) == list(history.validation_metrics) == ["accuracy", "errors"]
        assert [len(v) for v in history.metrics.values()] == [5, 5]
        assert history.metrics["accuracy"][-1] > 0.9
        last = history.validation_metrics["accuracy"][-1]
        assert last == train.evaluate(model, [held_out], nn.functional.accuracy)
        assert history.validation_metrics["errors"][-1] == pytest.approx(10 * (1 - last))
        assert seen == [*[True] * 4, False] * 5

    def test_means_are_weighted_as_the_loss_is(self, rng):
        """The mean over batches of any sizes is the mean over their targets."""
        x, y = problem(rng)
        model, _ = model_and_optimizer()
        still = optim.SGD(model.parameters(), 1e-12)
        for size in (7, 40):
            batches = data.Batches(x, y, batch_size=size)
            history = train.fit(
                model, batches, mse, still, epochs=1, metrics={"again": mse}, progress=False
            )
            assert history.metrics["again"] == history.loss
            assert history.loss == pytest.approx([train.evaluate(model, [(x, y)], mse)])
        assert history.validation_metrics == {}

    def test_with_truncation(self, rng):
        model = nn.Sequential(nn.GRU(2, 3, backend="tape", rng=0))
        x, y = rng.standard_normal((7, 4, 2)), rng.standard_normal((7, 4, 3))
        still, metrics = optim.SGD(model.parameters(), 1e-12), {"l1": nn.functional.l1_loss}
        history = train.fit(
            model, [(x, y)], mse, still, epochs=1, tbptt=(3, 4), metrics=metrics, progress=False
        )
        whole = train.evaluate(model, [(x, y)], nn.functional.l1_loss)
        assert history.metrics["l1"] == pytest.approx([whole])

    def test_they_are_shown(self, rng, capsys, monkeypatch):
        x, y = problem(rng)
        model, optimizer = model_and_optimizer()
        monkeypatch.setitem(sys.modules, "tqdm", None)
        metrics = {"two": lambda p, t: np.float32(2)}
        train.fit(model, [(x, y)], mse, optimizer, epochs=1, validation=[(x, y)], metrics=metrics)
        shown = capsys.readouterr().err
        assert re.search(r": loss [\d.]+, two 2, validation [\d.]+, validation two 2\n", shown)

    def test_errors(self, rng):
        x, y = problem(rng)
        model, optimizer = model_and_optimizer()
        bad = {
            "metrics is .* expected a dict of functions of": [mse],
            "metrics is .*'mse'": {"mse": "mse"},
            r"fit: the metric 'off' returned shape \(40, 1\), expected one number": {
                "off": lambda p, t: p - t
            },
            "fit: the metric 'none'": {"none": lambda p, t: None},
        }
        for words, metrics in bad.items():
            with pytest.raises(ValueError, match=words):
                train.fit(model, [(x, y)], mse, optimizer, epochs=1, metrics=metrics)


def test_losses_of_another_kind(rng):
    x, y = problem(rng)
    model, optimizer = model_and_optimizer()
    for loss, words in (
        (lambda p, t: 1.0, "fit: the loss returned a float, expected one number"),
        (lambda p, t: p - t, r"fit: the loss returned shape \(40, 1\)"),
    ):
        with pytest.raises(ValueError, match=words):
            train.fit(model, [(x, y)], loss, optimizer, epochs=1, progress=False)


def test_early_stopping_restores_the_best(rng):
    x, y = problem(rng)
    model, optimizer = model_and_optimizer(lr=0.3)
    values = iter([3.0, 1.0, 1.0, 2.5, 2.6, 0.0])
    seen = []

    def loss(p, t):
        if model.training:
            return mse(p, t)
        seen.append(model.state_dict())
        return tgs.tensor(next(values))

    history = train.fit(
        model, [(x, y)], loss, optimizer, epochs=50, validation=[(x, y)], patience=2,
        progress=False,
    )  # fmt: skip
    assert history.validation == [3.0, 1.0, 1.0, 2.5]
    assert history.best_epoch == 1  # to be as good again is no better
    assert history.stopped_early
    np.testing.assert_array_equal(model.weight, seen[1]["weight"])
    assert model.training


def test_schedule_and_eval_mode(rng):
    x, y = problem(rng)
    model = nn.Sequential(nn.Dropout(0.5, rng=0), nn.Linear(3, 1, rng=0))
    optimizer = optim.SGD(model.parameters(), lr=1.0)
    schedule = optim.ExponentialLR(optimizer, 0.1)
    model.eval()
    train.fit(
        model, [(x, y)], mse, optimizer, epochs=2, schedule=schedule, validation=[(x, y)],
        progress=False,
    )  # fmt: skip
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    assert not model.training  # as it was before
    assert train.evaluate(model, [(x, y)], mse) == train.evaluate(model, [(x, y)], mse)


def test_interrupt_keeps_the_history(rng):
    x, y = problem(rng)
    model, optimizer = model_and_optimizer()
    count = 0

    def batches():
        nonlocal count
        while True:
            count += 1
            if count == 7:
                raise KeyboardInterrupt
            yield x, y
            if count % 2 == 0:
                return

    class Loader:
        def __iter__(self):
            return batches()

    history = train.fit(model, Loader(), mse, optimizer, epochs=50, progress=False)
    assert history.interrupted
    assert len(history) == 3


def test_nan_is_stopped_before_the_weights(rng):
    x, y = problem(rng)
    model, optimizer = model_and_optimizer()
    before = model.state_dict()
    x[5, 1] = np.nan
    with pytest.raises(ValueError, match="epoch 0, batch 0: the loss is nan; this batch has not"):
        train.fit(model, [(x, y)], mse, optimizer, epochs=2, progress=False)
    np.testing.assert_array_equal(model.weight, before["weight"])

    clean = np.nan_to_num(x)
    with pytest.raises(ValueError, match="epoch 0: the validation loss is nan"):
        train.fit(
            model, [(clean, y)], mse, optimizer, epochs=2, validation=[(x, y)], progress=False
        )
    model.load_state_dict(before)

    def steep(p, t):
        return tgs.sqrt(((p - p.detach()) ** 2).sum())  # 0, with a gradient of 0/0

    with (
        pytest.raises(ValueError, match="norm of the gradient is nan"),
        np.errstate(all="ignore"),
    ):
        train.fit(
            model, [(np.ones((2, 3)), y[:2])], steep, optimizer, epochs=1, clip_norm=1.0,
            progress=False,
        )  # fmt: skip
    np.testing.assert_array_equal(model.weight, before["weight"])


def test_lengths_pass_through_sequential(rng):
    x, lengths = rng.standard_normal((4, 3, 2)), np.array([4, 0, 2])

    class Encoder(nn.Module):
        def __init__(self):
            self.layer = nn.GRU(2, 3, rng=0)

        def forward(self, x, lengths=None):
            return self.layer(x, lengths=lengths)

    model = nn.Sequential(Encoder(), tgs.tanh, nn.Linear(3, 1, rng=0))
    optimizer = optim.Adam(model.parameters())
    batch = (x, np.zeros((4, 3, 1)), lengths)
    assert len(train.fit(model, [batch], mse, optimizer, epochs=1, progress=False)) == 1
    ys = model[0](tgs.tensor(x, dtype="float32"), lengths=lengths)[0]
    assert (ys.numpy()[:, 1] == 0).all()
    np.testing.assert_array_equal(train.predict(model, x, lengths), model[2](tgs.tanh(ys)))


X, Y = np.ones((4, 3)), np.ones((4, 1))
LAYER, PAIR = nn.Linear(3, 1), nn.Sequential(nn.GRU(3, 1))


def fit_once(model=LAYER, batches=((X, Y),), loss=mse, **options):
    optimizer = optim.SGD(LAYER.parameters())
    return train.fit(model, batches, loss, optimizer, epochs=1, progress=False, **options)


BAD = {
    r"fit: the model Linear cannot be called with one input and lengths=\.\.\.: got an": (
        lambda: fit_once(batches=[(X, Y, [1] * 4)])
    ),
    "fit: the model function cannot be called with one input and lengths": lambda: fit_once(
        lambda x: x, [(X, Y, [1] * 4)]
    ),
    r"the model Linear .* one input and state=\.\.\.: .*; leave out": lambda: train.predict(
        LAYER, X, state=None
    ),
    r"Sequential .* with a tuple of 2 inputs: an input of shape \(4, 3\) would be its lengths": (
        lambda: train.predict(PAIR, (X, X))
    ),
    "fit: loss: 'mse' was given, expected a function of": lambda: fit_once(loss="mse"),
    "fit: loss: None was given": lambda: fit_once(loss=None),
    "evaluate: loss: None was given": lambda: train.evaluate(LAYER, [(X, Y)], None),
    "fit: batches: None was given, expected a list of": lambda: fit_once(batches=None),
    "fit: validation: 3 was given": lambda: fit_once(validation=3),
    "fit: validation: a batch of ndarray was given": lambda: fit_once(validation=(X, Y)),
    "fit: validation: the batches gave no examples": lambda: fit_once(validation=iter(())),
    "fit: validation: the model Linear cannot be called with a tuple of 2 inputs": (
        lambda: fit_once(validation=[((X, X), Y)])
    ),
    "tuple of 2, all of which the loss got: .*, pass carry_state=True$": (
        lambda: train.evaluate(nn.GRU(3, 1), [(X[None], Y[None])], mse)
    ),
    "evaluate: batches: None was given": lambda: train.evaluate(LAYER, None, mse),
    "fit: model: None was given, expected a module or a function": lambda: fit_once(None),
    "fit: model: <class .*Linear'> was given.*, not a class": lambda: fit_once(nn.Linear),
    "evaluate: model: 'm' was given": lambda: train.evaluate("m", [(X, Y)], mse),
    "predict: model: None was given": lambda: train.predict(None, X),
    "fit: lengths has dtype <U1, expected integers": lambda: fit_once(PAIR, [(X, Y, "a")]),
    "a tuple of 0 inputs and lengths": lambda: fit_once(PAIR, [((), Y, [1] * 4)]),
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input(words):
    with pytest.raises(ValueError, match=words):
        BAD[words]()


def test_lengths_of_none_are_none():
    assert train.evaluate(LAYER, [(X, Y, None)], mse) == train.evaluate(LAYER, [(X, Y)], mse)


def test_arguments_of_another_kind(rng):
    x, y = problem(rng)
    model, optimizer = model_and_optimizer()
    for wrong in (mse, optim.Adam, None):
        with pytest.raises(ValueError, match=r"fit: optimizer is .* expected an optim\.Optimizer"):
            train.fit(model, [(x, y)], mse, wrong, epochs=1, progress=False)
    with pytest.raises(ValueError, match=r"fit: schedule is .* expected an optim\.Schedule"):
        train.fit(model, [(x, y)], mse, optimizer, epochs=1, schedule=optim.StepLR, progress=False)
    _, other = model_and_optimizer()
    schedule = optim.StepLR(other, 1)
    with pytest.raises(ValueError, match="that of another optimiser"):
        train.fit(model, [(x, y)], mse, optimizer, epochs=1, schedule=schedule, progress=False)


def test_bad_batches(rng):
    x, y = problem(rng)
    model, optimizer = model_and_optimizer()
    common = {"loss": mse, "optimizer": optimizer, "progress": False}
    with pytest.raises(ValueError, match="in epoch 1 the batches gave no examples; an iterator"):
        train.fit(model, iter([(x, y)]), epochs=2, **common)
    with pytest.raises(ValueError, match="in epoch 0 the batches gave no examples"):
        train.fit(model, [], epochs=2, **common)
    few = tgs.data.Batches(x, y, batch_size=len(x) + 1, drop_last=True)
    with pytest.raises(ValueError, match="of fewer than a batch with drop_last, are none"):
        train.fit(model, few, epochs=2, **common)
    with pytest.raises(ValueError, match=r"a batch of 1 was given, expected \(inputs, targets\)"):
        train.fit(model, [(x,)], epochs=1, **common)
    with pytest.raises(
        ValueError, match=r"a batch of ndarray was given.* data.Batches.* cuts arrays"
    ):
        train.fit(model, [x], epochs=1, **common)
    with pytest.raises(ValueError, match="epochs: -1 was given"):
        train.fit(model, [(x, y)], epochs=-1, **common)
    with pytest.raises(ValueError, match="patience: 0 was given"):
        train.fit(model, [(x, y)], epochs=1, patience=0, **common)
    with pytest.raises(ValueError, match="gave no examples"):
        train.evaluate(model, [], mse)
    for wrong in (0, -1.0, "1", float("nan")):
        with pytest.raises(ValueError, match=f"fit: clip_norm: {wrong!r} was given, expected a"):
            train.fit(model, [], epochs=1, clip_norm=wrong, **common)
    assert len(train.fit(model, [(x, y)], epochs=0, **common)) == 0


def test_progress(rng, capsys, monkeypatch):
    x, y = problem(rng)
    model, optimizer = model_and_optimizer()
    pytest.importorskip("tqdm")
    train.fit(model, [(x, y)], mse, optimizer, epochs=2, validation=[(x, y)])
    assert "2/2" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    train.fit(model, [(x, y)], mse, optimizer, epochs=2)
    shown = capsys.readouterr().err
    assert "pip install tqdm" in shown
    assert "epoch 2/2: loss" in shown


@pytest.mark.parametrize("lengths", [[0, 3, 0], [0, 0, 0]])
def test_rows_without_a_step_train_without_nan(lengths):
    """Rows of length 0, masks that leave nothing, in every kind of model that takes lengths."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 3, 4)).astype("f4")
    x[~data.mask_of(lengths, 5)] = np.nan
    labels, classes = rng.integers(0, 2, (5, 3)), rng.integers(0, 2, 3)
    mask = data.mask_of(lengths, 5)
    entropy = nn.functional.cross_entropy
    tagger = nn.Sequential(nn.LSTM(4, 3, layer_norm=True, rng=rng), nn.Linear(3, 2, rng=rng))
    judge = nn.Sequential(
        nn.GRU(4, 3, bidirectional=True, output="last", rng=rng), nn.Linear(6, 2, rng=rng)
    )
    convolution = nn.Sequential(
        nn.Conv1d(4, 3, 2, padding="causal", rng=rng),
        nn.BatchNorm1d(3),
        nn.GlobalPool1d(),
        nn.Linear(3, 2, rng=rng),
    )
    convolution[1].eval()  # no batch has statistics of nothing
    translator = nn.Seq2Seq(4, 2, 3, rng=rng)
    source = rng.integers(0, 4, (5, 3))
    losses = {
        "tagger": (tagger, lambda: entropy(tagger(x, lengths=lengths), labels, mask=mask)),
        "judge": (judge, lambda: entropy(judge(x, lengths=lengths), classes, mask=mask[0])),
        "convolution": (
            convolution,
            lambda: entropy(
                convolution(x.transpose(1, 2, 0), lengths=lengths), classes, mask=mask[0]
            ),
        ),
        "translator": (
            translator,
            lambda: entropy(translator(source, labels, lengths), labels, mask=mask),
        ),
    }
    for name, (model, loss) in losses.items():
        optimizer = optim.Adam(model.parameters(), 0.01)
        for _ in range(2):
            optimizer.zero_grad()
            value = loss()
            value.backward()
            optimizer.step()
            assert np.isfinite(value.item()), name
        for parameter in model.parameters():
            assert np.isfinite(parameter.numpy()).all(), name
