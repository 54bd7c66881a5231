"""Each optimiser against steps worked out by hand; groups, state, schedules, clipping."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest

import tinygrad_seq as tgs
from tinygrad_seq import optim

GRADIENTS = [2.0, -1.0, 0.5]


def run(make, start: float = 1.0, gradients=GRADIENTS) -> list[float]:
    w = tgs.tensor([start], dtype="float64", requires_grad=True)
    optimizer, seen = make([w]), []
    for g in gradients:
        w.grad = np.array([g])
        optimizer.step()
        seen.append(w.item())
    return seen


def test_sgd():
    assert run(lambda p: optim.SGD(p, lr=0.1)) == pytest.approx([0.8, 0.9, 0.85])


def test_sgd_with_momentum():
    # v: 2, 0.9·2 − 1 = 0.8, 0.9·0.8 + 0.5 = 1.22
    expected = [1 - 0.2, 0.8 - 0.08, 0.72 - 0.122]
    assert run(lambda p: optim.SGD(p, lr=0.1, momentum=0.9)) == pytest.approx(expected)


def test_sgd_with_nesterov():
    # g + 0.9 v: 2 + 1.8, −1 + 0.72, 0.5 + 1.098
    expected = [1 - 0.38, 0.62 + 0.028, 0.648 - 0.1598]
    make = lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True)  # noqa: E731
    assert run(make) == pytest.approx(expected)


def test_sgd_with_weight_decay():
    # 1 − 0.1 (2 + 0.5·1) = 0.75; 0.75 − 0.1 (−1 + 0.375) = 0.8125
    assert run(lambda p: optim.SGD(p, lr=0.1, weight_decay=0.5))[:2] == pytest.approx(
        [0.75, 0.8125]
    )


def adam_by_hand(decay: float, decoupled: bool) -> list[float]:
    w, m, v, seen = 1.0, 0.0, 0.0, []
    for t, g in enumerate(GRADIENTS, 1):
        if decoupled:
            w -= 0.1 * decay * w
        else:
            g += decay * w
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g * g
        w -= 0.1 * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.999**t)) + 1e-8)
        seen.append(w)
    return seen


def test_adam():
    assert run(lambda p: optim.Adam(p, lr=0.1)) == pytest.approx(adam_by_hand(0, False), rel=1e-12)
    # The first step is lr in size, whatever the gradient.
    assert run(lambda p: optim.Adam(p, lr=0.1), gradients=[1e-3]) == pytest.approx([0.9], rel=1e-4)
    with_decay = run(lambda p: optim.Adam(p, lr=0.1, weight_decay=0.3))
    assert with_decay == pytest.approx(adam_by_hand(0.3, False), rel=1e-12)


def test_adamw():
    made = run(lambda p: optim.AdamW(p, lr=0.1, weight_decay=0.3))
    assert made == pytest.approx(adam_by_hand(0.3, True), rel=1e-12)


def test_rmsprop():
    # v: 0.1·4 = 0.4; w: 1 − 0.1·2/√0.4. Then v: 0.36 + 0.1; w + 0.1/√0.46.
    first = 1 - 0.1 * 2 / math.sqrt(0.4)
    second = first + 0.1 / math.sqrt(0.46)
    made = run(lambda p: optim.RMSprop(p, lr=0.1, alpha=0.9))
    assert made[:2] == pytest.approx([first, second], rel=1e-7)
    s1, s2 = 2 / math.sqrt(0.4), -1 / math.sqrt(0.46)
    with_momentum = run(lambda p: optim.RMSprop(p, lr=0.1, alpha=0.9, momentum=0.5))
    assert with_momentum[1] == pytest.approx(1 - 0.1 * s1 - 0.1 * (0.5 * s1 + s2), rel=1e-7)


def test_float32_stays_float32():
    for kind in (optim.SGD, optim.Adam, optim.AdamW, optim.RMSprop):
        w = tgs.ones(3, requires_grad=True)
        w.grad = np.ones(3, "f4")
        kind([w], lr=0.1).step()
        assert w.dtype == np.float32


def test_groups_and_frozen_parameters():
    a, b, frozen = (tgs.ones(1, requires_grad=True) for _ in range(3))
    frozen.requires_grad = False
    optimizer = optim.SGD([{"params": [a]}, {"params": [b, frozen], "lr": 1.0}], lr=0.1)
    for t in (a, b, frozen):
        t.grad = [1.0]  # one of the frozen may be left from before
    optimizer.step()
    assert [t.item() for t in (a, b, frozen)] == pytest.approx([0.9, 0.0, 1.0])
    optimizer.zero_grad()
    assert a.grad is None


def test_a_step_without_gradients_raises():
    a, b = tgs.ones(1, requires_grad=True), tgs.ones(1, requires_grad=True)
    optimizer = optim.Adam([a, b])
    with pytest.raises(tgs.TapeError, match=r"no parameter has a gradient; call loss\.backward"):
        optimizer.step()
    a.grad = [1.0]
    optimizer.step()  # one is enough


@pytest.mark.parametrize("kind", [optim.SGD, optim.Adam, optim.RMSprop])
def test_state_goes_on_where_it_was(kind):
    options = {"momentum": 0.9} if kind is optim.SGD else {}

    def steps(optimizer, w, count):
        for k in range(count):
            w.grad = np.array([1.0 + k])
            optimizer.step()

    w = tgs.tensor([1.0], dtype="float64", requires_grad=True)
    optimizer = kind([w], lr=0.1, **options)
    steps(optimizer, w, 3)
    start = w.numpy().copy()
    saved = optimizer.state_dict()
    both, copied = copy.deepcopy((w, optimizer))
    assert copied.parameters()[0] is both
    for o, t in ((optimizer, w), (copied, both)):
        steps(o, t, 2)
    assert w.item() == both.item()
    for given in (pickle.loads(pickle.dumps(saved)), saved, saved):  # which no step changes
        twin = tgs.tensor(start, requires_grad=True)
        resumed = kind([twin], lr=99.0, **options)
        resumed.load_state_dict(given)
        steps(resumed, twin, 2)
        assert twin.item() == w.item()
    with pytest.raises(ValueError, match="2 groups and 1 parameters were given, expected 1 and 1"):
        resumed.load_state_dict({**saved, "param_groups": saved["param_groups"] * 2})
    with pytest.raises(ValueError, match="expected 1 and 1"):
        resumed.load_state_dict({"kind": kind.__name__, "param_groups": [], "states": []})
    with pytest.raises(ValueError, match=r"shape \(2,\) was given"):
        resumed.load_state_dict(
            {"kind": kind.__name__, "param_groups": [{}], "states": [{"mean": np.zeros(2)}]}
        )
    with pytest.raises(ValueError, match="that of Other was given"):
        resumed.load_state_dict({"kind": "Other", "param_groups": [], "states": []})
    with pytest.raises(ValueError, match=r"expected what an optimiser's state_dict\(\) returned"):
        resumed.load_state_dict({"groups": []})


def test_schedules():
    def rates(make, steps=4):
        optimizer = optim.SGD([tgs.ones(1, requires_grad=True)], lr=1.0)
        schedule, seen = make(optimizer), []
        for _ in range(steps):
            seen.append(optimizer.param_groups[0]["lr"])
            schedule.step()
        return seen

    assert rates(lambda o: optim.StepLR(o, 2, 0.5)) == [1, 1, 0.5, 0.5]
    assert rates(lambda o: optim.ExponentialLR(o, 0.5)) == [1, 0.5, 0.25, 0.125]
    assert rates(lambda o: optim.WarmupLR(o, 2)) == [0.5, 1, 1, 1]
    cosine = rates(lambda o: optim.CosineAnnealingLR(o, 2, final=0.2))
    assert cosine == pytest.approx([1, 0.6, 0.2, 0.2])
    assert rates(lambda o: optim.LambdaLR(o, lambda n: 1 / (n + 1))) == [1, 1 / 2, 1 / 3, 1 / 4]
    optimizer = optim.SGD([tgs.ones(1, requires_grad=True)], lr=1.0)
    schedule = optim.ExponentialLR(optimizer, 0.5)
    schedule.load_state_dict({"count": 3})
    assert optimizer.param_groups[0]["lr"] == 0.125
    assert schedule.state_dict() == {"count": 3}
    warmup = optim.WarmupLR(optimizer, 2)  # schedules multiply
    assert optimizer.param_groups[0]["lr"] == 0.0625
    schedule.step()  # whichever goes on
    assert optimizer.param_groups[0]["lr"] == 0.03125
    schedule.load_state_dict({"count": 3})
    warmup.step()
    assert optimizer.param_groups[0]["lr"] == 0.125
    copied = pickle.loads(pickle.dumps(schedule))
    copied.step()
    assert copied.optimizer.param_groups[0]["lr"] == 0.0625
    assert optimizer.param_groups[0]["lr"] == 0.125


def test_numbers_without_axes_train():
    """A parameter of shape () and settings that are NumPy scalars keep shape and dtype."""
    lr = np.float64(0.1)
    for make in (
        lambda p: optim.SGD(p, lr=lr, momentum=np.float64(0.9), nesterov=True, weight_decay=lr),
        lambda p: optim.Adam(p, lr=lr),
        lambda p: optim.AdamW(p, lr=lr),
        lambda p: optim.RMSprop(p, lr=lr, momentum=0.5),
    ):
        w = tgs.tensor(1.0, requires_grad=True)
        optimizer = make([w])
        optim.LambdaLR(optimizer, lambda n: np.cos(n))
        for _ in range(3):
            optimizer.zero_grad()
            (w * w).backward()
            optim.clip_grad_norm_([w], np.float64(0.5))
            optim.clip_grad_value_([w], np.float64(0.4))
            optimizer.step()
        assert w.numpy().shape == ()
        assert w.dtype == np.float32
        assert w.grad.numpy().dtype == np.float32
        assert w.item() < 1


def test_half_precision_rows_without_gradient_stay():
    for kind in (optim.Adam, optim.AdamW, optim.RMSprop, optim.SGD):
        w = tgs.tensor([1.0, 2.0], dtype="float16", requires_grad=True)
        w.grad = np.array([1.0, 0.0], "f2")
        kind([w], lr=0.1, weight_decay=0.0).step()
        assert w.dtype == np.float16
        assert w[1].item() == 2
        assert w[0].item() < 1


def test_a_learning_rate_set_by_hand():
    w = tgs.ones(1, requires_grad=True)
    optimizer = optim.SGD([w])
    optimizer.param_groups[0]["lr"] = np.linspace(0.1, 0.5, 3)[2]
    w.grad = [1.0]
    optimizer.step()
    assert w.item() == 0.5
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr = -1"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"write optimizer.param_groups\[0\]\['lr'\] = 0.5"):
        optimizer.lr = 0.5


def test_groups_are_not_added_to():
    w = tgs.ones(1, requires_grad=True)
    optimizer = optim.SGD([w])
    optimizer.param_groups[0]["params"].append(tgs.ones(1, requires_grad=True))
    with pytest.raises(ValueError, match="2 parameters, made for 1; make another optimiser"):
        optimizer.step()


def test_an_optimiser_with_a_schedule_goes_at_once():
    import gc
    import weakref

    gc.collect()
    gc.disable()
    try:
        w = tgs.ones(1, requires_grad=True)
        optimizer = optim.Adam([w])
        schedule = optim.StepLR(optimizer, 3)
        gone = weakref.ref(w)
        del w, optimizer, schedule
        assert gone() is None
    finally:
        gc.enable()


def test_converting_a_model_converts_the_state():
    layer = tgs.nn.Linear(2, 2)
    optimizer = optim.Adam(layer.parameters())
    layer(np.ones((1, 2), "f4")).sum().backward()
    optimizer.step()
    layer.to("float64")
    optimizer.zero_grad()
    layer(np.ones((1, 2))).sum().backward()
    optimizer.step()
    assert layer.weight.dtype == np.float64


def test_an_optimiser_of_ones_own():
    class Sign(optim.Optimizer):
        def __init__(self, parameters, lr=0.1):
            super().__init__(parameters, {"lr": lr})
            self.note = "mine"

        def update(self, value, gradient, group, state):
            return value - group["lr"] * np.sign(gradient)

    class Wrong(Sign):
        def update(self, value, gradient, group, state):
            return value.astype("f8")

    w = tgs.ones(2, requires_grad=True)
    w.grad = [3.0, -2.0]
    Sign([w]).step()
    assert w.tolist() == pytest.approx([0.9, 1.1])
    assert copy.deepcopy(Sign([w])).note == "mine"
    with pytest.raises(ValueError, match=r"made float64\(2,\) of a parameter float32\(2,\)"):
        Wrong([w]).step()


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
@pytest.mark.parametrize("shape", [(20_000,), (200, 100), (1, 20_000), (20_000, 1), (30, 7, 90)])
@pytest.mark.parametrize("turned", [False, True])
def test_the_norm_of_large_gradients(rng, dtype, shape, turned):
    g = (rng.standard_normal(shape) * 3).astype(dtype)
    g = g.T if turned else g
    w = tgs.tensor(np.zeros_like(g), requires_grad=True)
    w.grad = g
    norm = np.sqrt(np.square(g, dtype="f8").sum())
    assert optim.clip_grad_norm_([w], 1.0) == pytest.approx(norm, rel=1e-6)
    assert np.sqrt(np.square(w.grad.numpy(), dtype="f8").sum()) == pytest.approx(1, rel=2e-3)


def test_clipping():
    a, b, none = (tgs.ones(1, requires_grad=True) for _ in range(3))
    a.grad, b.grad = [3.0], [-4.0]
    assert optim.clip_grad_norm_([a, b, none], 10.0) == pytest.approx(5)
    assert a.grad.item() == 3
    assert optim.clip_grad_norm_([a, b, none], 1.0) == pytest.approx(5)
    assert (a.grad.item(), b.grad.item()) == pytest.approx((0.6, -0.8))
    optim.clip_grad_value_([a, b], 0.7)
    assert (a.grad.item(), b.grad.item()) == pytest.approx((0.6, -0.7))
    assert optim.clip_grad_norm_(none, 1.0) == 0
    for kind, size in (("f2", 1e-4), ("f4", 1e-30)):  # whose squares are none
        tiny = tgs.zeros(100, dtype=kind, requires_grad=True)
        tiny.grad = np.full(100, size, kind)
        assert optim.clip_grad_norm_(tiny, 1.0) == pytest.approx(10 * size, rel=1e-2, abs=0)
    with pytest.raises(ValueError, match="no parameters were given; an iterator"):
        optim.clip_grad_norm_(iter([]), 1.0)
    a.grad = [1e30]  # its square overflows float32
    assert optim.clip_grad_norm_(a, 1.0) == pytest.approx(1e30)
    assert a.grad.item() == pytest.approx(1)
    a.grad = [np.nan]
    assert math.isnan(optim.clip_grad_norm_(a, 1.0))
    a.grad, b.grad = [np.inf], [2.0]
    assert optim.clip_grad_norm_([a, b], 1.0) == math.inf
    assert (a.grad.item(), b.grad.item()) == (math.inf, 2)  # as they were


W = tgs.ones(1, requires_grad=True)
BAD = {
    "no parameters were given; .* nn.parameter made of arrays": lambda: optim.SGD([]),
    "expected tensors; pass model.parameters": lambda: optim.SGD([np.ones(1)]),
    "was given twice": lambda: optim.SGD([W, W]),
    r"pass model\.parameters\(\)": lambda: optim.SGD(tgs.nn.Linear(1, 1)),
    "lr = inf": lambda: optim.SGD([W], lr=math.inf),
    r"pass model\.parameters\(\), with": lambda: optim.SGD(tgs.nn.Linear(1, 1).parameters),
    "lr = None": lambda: optim.SGD([W], lr=None),
    "lr = '0.1'": lambda: optim.SGD([W], lr="0.1"),
    r"betas = '01' was given, expected two": lambda: optim.Adam([W], betas="01"),
    r"betas = \(0\.9,\) was given, expected two": lambda: optim.Adam([W], betas=(0.9,)),
    "max_norm: None was given": lambda: optim.clip_grad_norm_([W], None),
    "StepLR: a list was given": lambda: optim.StepLR([W], 1),
    "lr = -1": lambda: optim.SGD([W], lr=-1),
    "momentum = 1 was given": lambda: optim.SGD([W], momentum=1),
    "nesterov was given without": lambda: optim.SGD([{"params": [W], "nesterov": True}]),
    "expected what a schedule's": lambda: optim.StepLR(optim.SGD([W]), 1).load_state_dict({}),
    "nesterov was given without momentum": lambda: optim.SGD([W], nesterov=True),
    r"betas = \(0\.9, 1\.0\) was given": lambda: optim.Adam([W], betas=(0.9, 1.0)),
    "expected 'params' and any of": lambda: optim.SGD([{"params": [W], "learning_rate": 1}]),
    "max_norm: 0 was given": lambda: optim.clip_grad_norm_([W], 0),
    "limit: -1 was given": lambda: optim.clip_grad_value_([W], -1),
    "step_size: 0": lambda: optim.StepLR(optim.SGD([W]), 0),
    "steps: 0": lambda: optim.CosineAnnealingLR(optim.SGD([W]), 0),
    "dtype int64 was given, expected floating ones": lambda: optim.SGD([tgs.arange(3)]),
    "SGD: a NoneType was given": lambda: optim.SGD([{"params": None}]),
    "clip_grad_norm_: a ndarray was given": lambda: optim.clip_grad_norm_([np.ones(2)], 1.0),
    "clip_grad_norm_: a int was given": lambda: optim.clip_grad_norm_(3, 1.0),
    "clip_grad_value_: a str was given": lambda: optim.clip_grad_value_("abc", 1),
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input(words):
    with pytest.raises(ValueError, match=words):
        BAD[words]()


BAD_SCHEDULES = {
    "StepLR: gamma: 'a' was given, expected a finite number": lambda o: optim.StepLR(o, 3, "a"),
    "ExponentialLR: gamma: None was given": lambda o: optim.ExponentialLR(o, None),
    "ExponentialLR: gamma: nan was given": lambda o: optim.ExponentialLR(o, math.nan),
    "ExponentialLR: gamma: -1.0 was given": lambda o: optim.ExponentialLR(o, -1.0),
    "LambdaLR: function: None was given": lambda o: optim.LambdaLR(o, None),
    r"LambdaLR: factor\(0\): None was given": lambda o: optim.LambdaLR(o, lambda n: None),
    "CosineAnnealingLR: final: 'x'": lambda o: optim.CosineAnnealingLR(o, 5, "x"),
}


@pytest.mark.parametrize("words", BAD_SCHEDULES)
def test_a_bad_schedule_leaves_its_optimiser_alone(words):
    optimizer = optim.SGD([W])
    with pytest.raises(ValueError, match=words):
        BAD_SCHEDULES[words](optimizer)
    assert optimizer.factors == []
    assert "initial_lr" not in optimizer.param_groups[0]


def test_one_tensor_will_do():
    optimizer = optim.SGD(W, lr=0.5)
    assert optimizer.parameters()[0] is W
    assert repr(optimizer).startswith("SGD({'lr': 0.5")


def test_computed_tensors_are_refused():
    with pytest.raises(tgs.TapeError, match="expected leaves"):
        optim.SGD([W * 2])


@pytest.mark.parametrize("shape", [(700, 1600), (2_000_003,), (1, 1_200_000), (70, 120, 140)])
def test_large_parameters_are_updated_as_small_ones_are(rng, shape):
    """By blocks of rows, the largest on several threads, and not a bit differently."""
    values, gradient = rng.standard_normal((2, *shape)).astype("f4")
    whole, rows = tgs.nn.parameter(values), [tgs.nn.parameter(row) for row in values[:70]]
    by_rows = len(shape) > 1
    optimizers = [optim.Adam([whole], 0.01), optim.Adam(rows if by_rows else [whole], 0.01)]
    for _ in range(3):
        whole.grad = tgs.tensor(gradient)
        optimizers[0].step()
        if by_rows:
            for row, g in zip(rows, gradient, strict=False):
                row.grad = tgs.tensor(g)
            optimizers[1].step()
    if by_rows:
        assert all(np.array_equal(w, r) for w, r in zip(whole.data, (r.data for r in rows)))  # noqa: B905
    else:
        m, v, w = np.zeros(shape), np.zeros(shape), values.astype(float)
        for t in range(1, 4):
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * np.square(gradient, dtype=float)
            w -= 0.01 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        np.testing.assert_allclose(whole.data, w, atol=1e-5)


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_rmsprop_by_blocks(rng, momentum):
    values, gradient = rng.standard_normal((2, 700, 1600)).astype("f4")
    whole, row = tgs.nn.parameter(values), tgs.nn.parameter(values[5])
    for parameter, g in ((whole, gradient), (row, gradient[5])):
        optimizer = optim.RMSprop([parameter], 0.01, momentum=momentum, weight_decay=0.1)
        for _ in range(3):
            parameter.grad = tgs.tensor(g)
            optimizer.step()
    np.testing.assert_array_equal(whole.data[5], row.data)
