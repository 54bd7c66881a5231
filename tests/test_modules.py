"""Modules: registering, naming, saving, freezing, tying, copying; layers and losses."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinygrad_seq as tgs
from tinygrad_seq import nn

F = nn.functional


class Tied(nn.Module):
    """An embedding whose weights are the output's too, a frozen weight and a buffer."""

    def __init__(self) -> None:
        self.embedding = nn.Embedding(5, 3, rng=0)
        self.output = nn.Linear(3, 5, rng=0)
        self.output.weight = self.embedding.weight
        self.blocks = [nn.Linear(3, 3, rng=0), {"inner": nn.LayerNorm(3)}]
        self.register_buffer("count", tgs.zeros(1))
        self.blocks[0].bias.requires_grad = False

    def forward(self, at):
        x = self.blocks[0](self.embedding(at))
        return self.output(self.blocks[1]["inner"](x))


def test_names():
    model = Tied()
    names = [name for name, _ in model.named_parameters()]
    assert names == [
        "embedding.weight",
        "output.bias",
        "blocks.0.weight",
        "blocks.0.bias",
        "blocks.1.inner.weight",
        "blocks.1.inner.bias",
    ]
    assert [name for name, _ in model.named_buffers()] == ["count"]
    assert len(list(model.modules())) == 5
    assert "output.weight" in model.state_dict()  # tied ones are saved under both names
    assert "embedding: Embedding(" in repr(model)


def test_tied_and_frozen_train():
    model = Tied()
    before = model.state_dict()
    optimizer = tgs.optim.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model(np.array([0, 1])), np.array([1, 2])).backward()
    optimizer.step()
    after = model.state_dict()
    changed = {k for k in before if not np.array_equal(before[k], after[k])}
    assert "blocks.0.bias" not in changed
    assert {"embedding.weight", "output.weight"} <= changed
    assert model.output.weight is model.embedding.weight


def test_state_dict_is_a_snapshot_and_loads(tmp_path):
    model, other = Tied(), Tied()
    saved = model.state_dict()
    for p in model.parameters():
        p.data = np.asarray(p) + 1
    assert not np.array_equal(saved["output.bias"], model.output.bias)
    np.savez(tmp_path / "weights.npz", **saved)
    with np.load(tmp_path / "weights.npz") as arrays:
        other.load_state_dict(arrays)
    model.load_state_dict(saved)
    for name, value in other.state_dict().items():
        np.testing.assert_array_equal(value, model.state_dict()[name])
    with pytest.raises(ValueError, match=r"missing \['count'\], unknown \['extra'\]"):
        model.load_state_dict({**{k: v for k, v in saved.items() if k != "count"}, "extra": 1.0})
    with pytest.raises(tgs.ShapeError, match=r"count has shape \(2,\), expected \(1,\)"):
        model.load_state_dict({**saved, "count": np.zeros(2, "f4")})
    with pytest.raises(ValueError, match="count has dtype int64"):
        model.load_state_dict({**saved, "count": np.zeros(1, int)})


def test_loading_keeps_the_dtype():
    norm = nn.BatchNorm1d(2, dtype="float64")
    counted = np.array(3, np.int32)  # as JAX has it
    norm.load_state_dict({**nn.BatchNorm1d(2).state_dict(), "num_batches_tracked": counted})
    assert (norm.weight.dtype, norm.num_batches_tracked.dtype) == ("float64", "int64")
    assert norm.num_batches_tracked.item() == 3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent_and_keep_ties(copied):
    model = Tied()
    model(np.array([0])).sum().backward()
    twin = copied(model)
    assert twin.output.weight is twin.embedding.weight
    assert not twin.blocks[0].bias.requires_grad
    assert [n for n, _ in twin.named_parameters()] == [n for n, _ in model.named_parameters()]
    np.testing.assert_array_equal(twin(np.array([3])), model(np.array([3])))
    twin.output.bias.data = np.ones(5, "f4")
    assert model.output.bias.tolist() == [0] * 5


def test_to_dtype():
    model = Tied().to("float64")
    assert {p.dtype.name for p in model.parameters()} == {"float64"}
    assert model.count.dtype == np.float64
    assert not model.blocks[0].bias.requires_grad
    assert model.output.weight is model.embedding.weight
    with pytest.raises(ValueError, match="expected a float dtype"):
        model.to("int32")


class TestFunctionalCall:
    """A module with tensors that were computed in the place of its parameters."""

    at = np.array([[0, 1, 4]])

    def test_gradients_go_to_what_weights_were_computed_from(self):
        model, w = Tied(), nn.parameter(np.full((3, 3), 2.0))
        kept = dict(model.named_parameters())
        y = nn.functional_call(model, {"blocks.0.weight": w * w}, self.at)
        assert dict(model.named_parameters()) == kept
        y.sum().backward()
        assert kept["blocks.0.weight"].grad is None
        model.blocks[0].weight.data = np.full((3, 3), 4.0, "float32")
        assert np.array_equal(model(self.at).numpy(), y.numpy())
        model.zero_grad()
        model(self.at).sum().backward()
        assert np.allclose(w.grad, 2 * w * model.blocks[0].weight.grad)

    def test_what_is_tied_is_replaced_at_all_places(self):
        model, other = Tied(), Tied()
        other.load_state_dict({k: v + 1 for k, v in other.state_dict().items()})
        state = other.state_dict()
        expected = other(self.at).numpy()
        for call in (state, {k: v for k, v in state.items() if k != "output.weight"}):
            assert np.array_equal(nn.functional_call(model, call, (self.at,)).numpy(), expected)
        call = {**state, "output.weight": tgs.zeros(5, 3)}
        y = nn.functional_call(model, call, (), {"at": self.at})
        assert np.array_equal(y[0, 0].numpy(), other.output.bias.numpy())

    @pytest.mark.parametrize("backend", ["scan", "tape"])
    def test_the_gradient_after_a_step_of_descent(self, rng, backend):
        """MAML (Finn et al. 2017): the loss where a step of the gradient leads, differentiated."""
        layer = nn.GRU(2, 3, backend=backend, dtype="float64", rng=0)
        xs = rng.standard_normal((4, 2, 2))

        def loss(p):
            return (nn.functional_call(layer, p, xs)[0] ** 2).mean()

        def after_a_step(p):
            return loss({k: p[k] - 0.5 * g for k, g in tgs.grad(loss)(p).items()})

        assert tgs.gradcheck(after_a_step, dict(layer.named_parameters()))

    def test_what_was_there_is_put_back_after_an_error(self):
        model = Tied()
        kept = dict(model.named_parameters())
        with pytest.raises(ValueError, match="Embedding: indices"):
            nn.functional_call(model, model.state_dict(), np.array([9]))
        assert dict(model.named_parameters()) == kept

    def test_bad_names_and_shapes(self):
        layer = nn.Linear(2, 3)
        with pytest.raises(ValueError, match=r"unknown \['w'\], .* \['weight', 'bias'\]"):
            nn.functional_call(layer, {"w": 1.0}, np.ones(2))
        with pytest.raises(tgs.ShapeError, match=r"weight has shape \(2, 3\), expected \(3, 2\)"):
            nn.functional_call(layer, {"weight": layer.weight.T}, np.ones(2))
        with pytest.raises(ValueError, match="bias has dtype int64, expected float32"):
            nn.functional_call(layer, {"bias": np.arange(3)}, np.ones(2))
        with pytest.raises(ValueError, match="functional_call: a list was given, expected a dict"):
            nn.functional_call(layer, [layer.weight], np.ones(2))
        with pytest.raises(ValueError, match="a function was given, expected a module"):
            nn.functional_call(lambda x: x, {}, np.ones(2))


def test_registering():
    module = nn.Module()
    module.w = tgs.ones(2, requires_grad=True)
    module.register_parameter("frozen", tgs.ones(3))
    module.plain = tgs.ones(4)
    assert [n for n, _ in module.named_parameters()] == ["w", "frozen"]
    module.w = tgs.zeros(2, requires_grad=True)
    assert len(list(module.parameters())) == 2
    with pytest.raises(ValueError, match="a tensor computed from others was assigned"):
        module.w = module.w * 2
    with pytest.raises(ValueError, match="a list holds a parameter"):
        module.ws = [tgs.ones(1, requires_grad=True)]
    with pytest.raises(ValueError, match=r"a set of modules was given, .* assign a list"):
        module.cells = {nn.Linear(1, 1)}
    with pytest.raises(ValueError, match="a ndarray was assigned to a parameter"):
        module.w = np.ones(2)
    with pytest.raises(ValueError, match=r"write nn\.parameter\(values\)"):
        module.u = 0.1 * tgs.randn(2, requires_grad=True)
    module.u = nn.parameter(0.1 * tgs.randn(2))
    assert module.u.requires_grad
    assert nn.parameter(nn.init.identity(2, 2)).dtype == np.float32
    with pytest.raises(ValueError, match="expected a floating one"):
        nn.parameter([1], "int64")
    module.u = None
    module.inner = []
    module.inner.append({"p": nn.parameter([1.0])})
    with pytest.raises(ValueError, match=r"inner\.0: a dict holds a parameter"):
        module.state_dict()
    module.inner = None
    with tgs.no_grad(), pytest.raises(ValueError, match="a tensor off the tape was assigned"):
        module.w = module.w * 0.5
    module.register_buffer("frozen", tgs.ones(3))  # no parameter any more
    assert list(module.state_dict()) == ["w", "frozen"]
    module.register_parameter("frozen", tgs.ones(3))
    assert [n for n, _ in module.named_buffers()] == []
    with pytest.raises(ValueError, match="register_parameter: k is array"):
        module.register_parameter("k", np.ones(1))
    with pytest.raises(ValueError, match="a list was given, expected a dict"):
        module.load_state_dict([])
    twin = copy.copy(module)
    twin.w = None
    assert [n for n, _ in module.named_parameters()] == ["w", "frozen"]
    twin.child = nn.Module()
    twin.child.parent = twin
    assert "..." in repr(twin)
    clash = nn.Module()
    clash.a = {"x.y": nn.LayerNorm(1), "x": {"y": nn.LayerNorm(1)}}
    with pytest.raises(ValueError, match="two tensors have the name"):
        clash.state_dict()
    del module.w
    assert [n for n, _ in module.named_parameters()] == ["frozen"]
    module.frozen = None
    assert list(module.parameters()) == []
    with pytest.raises(NotImplementedError, match="does not define forward"):
        module(1)


def test_a_list_that_holds_itself():
    module = nn.Module()
    module.inner = [nn.Linear(1, 1)]
    module.inner += [module.inner, {"again": module.inner}]
    assert [name for name, _ in module.named_modules()] == ["", "inner.0"]
    assert list(module.modules()) == [module, module.inner[0]]
    assert list(module.state_dict()) == ["inner.0.weight", "inner.0.bias"]


def test_names_follow_the_walk():
    """A module that stands in several places has the name of the first."""
    shared, module = nn.LayerNorm(1), nn.Module()
    module.outer = nn.Module()
    module.outer.two = [shared, shared]
    module.direct, module.last = shared, nn.LayerNorm(2)
    names, modules = zip(*module.named_modules("at"), strict=True)
    assert names == ("at", "at.outer", "at.outer.two.0", "at.last")
    assert list(modules) == list(module.modules())


def test_functions_among_modules_are_shown():
    shown = repr(nn.Sequential(nn.Dropout(0.5), tgs.tanh, nn.Sequential(tgs.relu))).splitlines()
    assert shown == [
        "Sequential(",
        "  layers.0: Dropout(p=0.5)",
        "  layers.1: tanh",
        "  layers.2: Sequential(",
        "    layers.0: relu",
        "  )",
        ")",
    ]


def test_train_and_eval_reach_every_module():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(0.5)))
    model.eval()
    assert not any(m.training for m in model.modules())
    x = np.ones((3, 2), "f4")
    np.testing.assert_array_equal(model(x), model(x))
    model.train()
    assert all(m.training for m in model.modules())


# Layers --------------------------------------------------------------------------------------


def test_linear(rng):
    layer = nn.Linear(3, 2, dtype="float64", rng=rng)
    x = rng.standard_normal((4, 5, 3))
    expected = x @ np.asarray(layer.weight).T + np.asarray(layer.bias)
    np.testing.assert_allclose(layer(x), expected)
    assert nn.Linear(3, 2, bias=False).bias is None
    with pytest.raises(tgs.ShapeError, match="expected 3 elements in the last axis"):
        layer(np.zeros((3, 4)))


def test_embedding(rng):
    layer = nn.Embedding(4, 3, rng=rng)
    at = np.array([[1, 3], [1, 1]])
    y = layer(at)
    np.testing.assert_array_equal(y, np.asarray(layer.weight)[at])
    y.sum().backward()
    assert layer.weight.grad.numpy()[:, 0].tolist() == [0, 3, 0, 1]
    assert layer(np.zeros((0, 2), int)).shape == (0, 2, 3)
    for bad in ([4], [-1], [-1, 9]):
        with pytest.raises(ValueError, match="expected 0 to 3"):
            layer(np.array(bad))
    with pytest.raises(ValueError, match="expected integers"):
        layer(np.array([1.0]))


def test_layer_norm(rng):
    layer = nn.LayerNorm(4, dtype="float64")
    layer.weight.data = rng.standard_normal(4)
    layer.bias.data = rng.standard_normal(4)
    x = rng.standard_normal((3, 4))
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(layer(x), np.asarray(layer.weight) * normed + np.asarray(layer.bias))
    assert tgs.gradcheck(layer, x, order=2)


def test_dropout(rng):
    layer = nn.Dropout(0.25, rng=rng)
    y = layer(tgs.ones(100, 100)).numpy()
    assert set(np.unique(y)) <= {np.float32(0), np.float32(1 / 0.75)}
    assert abs((y == 0).mean() - 0.25) < 0.02
    assert abs(y.mean() - 1) < 0.02
    x = tgs.ones(4)
    assert layer.eval()(x) is x
    seeded = nn.Dropout(0.5, rng=0)
    first, second = seeded(tgs.ones(64)), seeded(tgs.ones(64))
    assert first.tolist() != second.tolist()
    assert nn.Dropout(0.5, rng=0)(tgs.ones(64)).tolist() == first.tolist()
    assert repr(layer) == "Dropout(p=0.25)"


def test_sequential_passes_the_sequence_on():
    model = nn.Sequential(nn.LSTM(2, 3), nn.Linear(3, 1), tgs.tanh)
    assert model(np.zeros((4, 5, 2), "f4")).shape == (4, 5, 1)
    assert len(model) == 3
    assert isinstance(model[1], nn.Linear)
    assert list(model[:-1]) == list(model)[:-1]
    assert model[:-1](np.zeros((4, 5, 2), "f4")).shape == (4, 5, 1)
    with pytest.raises(ValueError, match="modules or functions"):
        nn.Sequential(3)
    with pytest.raises(ValueError, match="no module in it takes them"):
        nn.Sequential(nn.Linear(2, 1))(np.zeros((4, 5, 2), "f4"), lengths=[4] * 5)


def test_sequential_gives_lengths_and_resets_to_who_takes_them(rng):
    """As the layer alone; a Sequential in it takes them if something in that does."""
    layer, head = nn.GRU(2, 3, rng=0), nn.Sequential(nn.Linear(3, 1, rng=0), tgs.tanh)
    model, x = nn.Sequential(nn.Sequential(layer), head), rng.standard_normal((5, 2, 2), "f4")
    given = {"lengths": [5, 4], "resets": np.arange(10).reshape(5, 2) == 6}
    for names in (["lengths"], ["resets"], ["lengths", "resets"]):
        options = {name: given[name] for name in names}
        ys, state = layer(x, **options)
        np.testing.assert_array_equal(model(x, **options), head(ys))
        y, ((after,), *_) = model.with_state(x, **options)
        np.testing.assert_array_equal(y, head(ys))
        np.testing.assert_array_equal(after, state)
    with pytest.raises(ValueError, match="resets were given, but no module in it takes them"):
        nn.Sequential(head)(x, resets=given["resets"])


BAD_LAYERS = {
    "Linear: in_features: 0 was given": lambda: nn.Linear(0, 2),
    "Linear: out_features: 2.5 was given": lambda: nn.Linear(1, 2.5),
    "Embedding: num_embeddings: 0 was given": lambda: nn.Embedding(0, 2),
    "Embedding: embedding_dim: 0 was given": lambda: nn.Embedding(1, 0),
    "Dropout: p: True was given, expected a probability": lambda: nn.Dropout(True),
    "LayerNorm: size: 0 was given": lambda: nn.LayerNorm(0),
    "LayerNorm: eps: -1 was given, expected a finite number from 0": lambda: nn.LayerNorm(3, -1),
    "LayerNorm: eps: True was given": lambda: nn.LayerNorm(3, True),
    "Sequential: <class .*Linear'> was given.*, not a class": lambda: nn.Sequential(nn.Linear),
    r"Sequential: \[.* was given, expected modules or functions, one by": lambda: nn.Sequential([]),
    "glorot: rows: -1 was given": lambda: nn.init.glorot(-1, 2),
    "glorot: rows: 'a' was given": lambda: nn.init.glorot("a", 2),
    "orthogonal: rows: 2.5 was given": lambda: nn.init.orthogonal(2.5, 2),
    "identity: columns: -1 was given": lambda: nn.init.identity(1, -1),
}


@pytest.mark.parametrize("words", BAD_LAYERS)
def test_bad_layers(words):
    with pytest.raises(ValueError, match=words):
        BAD_LAYERS[words]()


def test_half_precision(rng):
    half = np.ones(100_000, np.float16)
    assert F.mse_loss(half, half * 0).item() == 1
    assert F.rmse_loss(half[:1] * 1000, half[:1] * 600).item() == 400
    y = nn.LayerNorm(2).to("float16")(np.array([[0, 1000]], np.float16))
    np.testing.assert_allclose(y, [[-1, 1]], rtol=1e-3)
    assert y.dtype == np.float16
    assert tgs.gelu(np.array([4, 5, -6], np.float16)).tolist() == [4, 5, 0]
    assert tgs.erf(np.array([2.9, 9], np.float16)).tolist() == [1, 1]


def test_small_integers_in_losses():
    zero, three = np.array([0], np.uint8), np.array([3], np.uint8)
    assert F.l1_loss(zero, three).item() == 3
    assert F.mse_loss(zero, three).item() == 9
    assert F.huber_loss(zero, three).item() == 2.5
    kept = nn.Dropout(0.5, rng=0)(np.full(64, 3))
    assert set(kept.tolist()) == {0.0, 6.0}


def test_initialisers(rng):
    q = nn.init.orthogonal(5, 3, rng)
    np.testing.assert_allclose(q.T @ q, np.eye(3), atol=1e-12)
    wide = nn.init.orthogonal(3, 5, rng)
    np.testing.assert_allclose(wide @ wide.T, np.eye(3), atol=1e-12)
    w = nn.init.glorot(200, 100, rng)
    assert np.abs(w).max() <= np.sqrt(6 / 300)
    assert w.std() == pytest.approx(np.sqrt(2 / 300), rel=0.05)
    assert nn.init.identity(2, 2, 0.5).tolist() == [[0.5, 0], [0, 0.5]]
    with pytest.raises(tgs.ShapeError, match="expected a square one"):
        nn.init.identity(2, 3)
    assert nn.init.orthogonal(0, 2).shape == (0, 2)
    np.testing.assert_array_equal(nn.init.glorot(2, 2, 5), nn.init.glorot(2, 2, 5))


# Losses --------------------------------------------------------------------------------------


def naive_losses(p, t):
    d = p - t
    return {
        "mse_loss": d**2,
        "l1_loss": abs(d),
        "huber_loss": d**2 / 2 if abs(d) <= 1 else abs(d) - 0.5,
        "binary_cross_entropy_with_logits": np.log1p(np.exp(-p)) * t
        + np.log1p(np.exp(p)) * (1 - t),
    }


@pytest.mark.parametrize("name", list(naive_losses(0.0, 0.0)))
@given(data=st.data())
def test_elementwise_losses(name, data):
    shape = data.draw(st.sampled_from([(0,), (1,), (4, 3), (2, 1, 3)]))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    p, t = rng.standard_normal(shape) * 2, rng.random(shape)
    mask = data.draw(st.sampled_from(["none", "full", "leading", "ones", "nothing"]))
    chosen = np.ones(shape, bool)
    given_mask = None
    if mask == "full":
        given_mask = chosen = rng.random(shape) < 0.5
    elif mask == "leading":
        given_mask = rng.random(shape[:1]) < 0.5
        chosen = np.broadcast_to(given_mask.reshape(-1, *[1] * (len(shape) - 1)), shape)
    elif mask == "ones":
        given_mask = rng.random((*shape[:-1], 1)) < 0.5
        chosen = np.broadcast_to(given_mask, shape)
    elif mask == "nothing":
        given_mask = chosen = np.zeros(shape, bool)
    terms = [naive_losses(a, b)[name] for a, b in zip(p[chosen], t[chosen], strict=True)]
    spoilt_p = tgs.tensor(np.where(chosen, p, np.nan), requires_grad=True)
    loss = getattr(F, name)(spoilt_p, np.where(chosen, t, np.inf), given_mask)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(np.mean(terms) if terms else 0.0)
    loss.backward()
    assert (spoilt_p.grad.numpy()[~chosen] == 0).all()
    assert np.isfinite(spoilt_p.grad.numpy()).all()


@pytest.mark.parametrize(
    "name", ["mse_loss", "rmse_loss", "l1_loss", "huber_loss", "binary_cross_entropy_with_logits"]
)
def test_loss_derivatives(name, rng):
    t, mask = rng.random((3, 2)), np.array([True, False, True])
    loss = getattr(F, name)
    assert tgs.gradcheck(lambda p: loss(p, t, mask), rng.standard_normal((3, 2)) * 2, order=2)


def test_rmse_at_zero():
    p = tgs.ones(3, requires_grad=True)
    loss = F.rmse_loss(p, tgs.ones(3))
    loss.backward()
    assert loss.item() == 0
    assert p.grad.tolist() == [0, 0, 0]
    assert F.rmse_loss(tgs.tensor([3.0, 0.0]), tgs.zeros(2)).item() == pytest.approx(np.sqrt(4.5))


def test_cross_entropy(rng):
    x, t = rng.standard_normal((4, 3, 5)), rng.integers(0, 5, (4, 3))
    mask = rng.random((4, 3)) < 0.5
    log_p = x - np.log(np.exp(x).sum(-1, keepdims=True))
    picked = np.array([[-log_p[i, j, t[i, j]] for j in range(3)] for i in range(4)])
    assert F.cross_entropy(x, t).item() == pytest.approx(picked.mean())
    spoilt = tgs.tensor(np.where(mask[..., None], x, np.nan), requires_grad=True)
    loss = F.cross_entropy(spoilt, np.where(mask, t, -100), mask)
    assert loss.item() == pytest.approx(picked[mask].mean())
    loss.backward()
    assert (spoilt.grad.numpy()[~mask] == 0).all()
    assert tgs.gradcheck(lambda x: F.cross_entropy(x, t, mask), x, order=2)
    assert F.cross_entropy(x * 1e4, t).item() >= 0


@pytest.mark.parametrize("classes", [1, 5, 40])
@pytest.mark.parametrize("masked", [False, True])
def test_cross_entropy_of_few_and_many_classes(rng, classes, masked):
    x, t = rng.standard_normal((4, 3, classes)) * 5, rng.integers(0, classes, (4, 3))
    mask = rng.random((4, 3)) < 0.6 if masked else np.ones((4, 3), bool)
    leaf = tgs.tensor(x, requires_grad=True)
    loss = F.cross_entropy(leaf, t, mask if masked else None) * 3.0
    loss.backward()
    p = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    target = t[..., None] == np.arange(classes)
    count = max(1, mask.sum())
    assert loss.item() == pytest.approx(3 * -np.log(p[target].reshape(4, 3)[mask]).sum() / count)
    np.testing.assert_allclose(leaf.grad, 3 * (p - target) * mask[..., None] / count, atol=1e-12)
    assert tgs.gradcheck(lambda x: F.cross_entropy(x, t, mask if masked else None), x, order=2)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("largest", [0.0, 5.0, 31.9, 32.1, 100.0, 255.0, 257.0, 2000.0])
@pytest.mark.parametrize("classes", [1, 2, 33, 96, 9000])  # some are summed in another way
def test_cross_entropy_of_logits_of_any_size(rng, dtype, largest, classes):
    x = (largest * rng.uniform(-1, 1, (20, classes))).astype(dtype)
    t = rng.integers(0, classes, 20)
    x[:5] = np.where(t[:5, None] == np.arange(classes), largest, -largest)  # nothing is left open
    leaf = tgs.tensor(x, requires_grad=True)
    tgs.sum(loss := F.cross_entropy(leaf, t)).backward()
    wide = x.astype(np.longdouble)
    e = np.exp(wide - wide.max(1, keepdims=True))
    p = e / e.sum(1, keepdims=True)
    picked = wide[np.arange(20), t] - wide.max(1) - np.log(e.sum(1))
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(float(loss), float(-picked.mean()), rtol=16 * eps, atol=16 * eps)
    assert float(loss) >= 0
    expected = (p - (t[:, None] == np.arange(classes))) / 20
    np.testing.assert_allclose(leaf.grad, expected.astype("f8"), rtol=32 * eps, atol=2 * eps)
    y = tgs.logsumexp(tgs.tensor(x), axis=1)
    assert y.dtype == dtype
    sums = (wide.max(1) + np.log(e.sum(1))).astype("f8")
    np.testing.assert_allclose(y, sums, rtol=16 * eps, atol=16 * eps)


def test_cross_entropy_of_what_is_impossible():
    x = tgs.tensor([[0.0, -np.inf, 0.0], [-np.inf, 1.0, 2.0]], requires_grad=True)
    loss = F.cross_entropy(x, np.array([0, 2]))
    loss.backward()
    assert loss.item() == pytest.approx((np.log(2) + np.log1p(np.exp(-1))) / 2)
    np.testing.assert_allclose(x.grad[0], [-0.25, 0, 0.25], atol=1e-6)
    assert F.cross_entropy(x, np.array([1, 0])).item() == np.inf


def test_accuracy(rng):
    x, t = rng.standard_normal((4, 3, 5)), rng.integers(0, 5, (4, 3))
    mask = rng.random((4, 3)) < 0.5
    right = np.array([[x[i, j].argmax() == t[i, j] for j in range(3)] for i in range(4)])
    assert F.accuracy(x, t).item() == pytest.approx(right.mean())
    found = F.accuracy(np.where(mask[..., None], x, np.nan), np.where(mask, t, -100), mask)
    assert found.item() == pytest.approx(right[mask].mean())
    assert F.accuracy(x, t, np.zeros(4, bool)).item() == 0
    assert not F.accuracy(tgs.tensor(x, requires_grad=True), t).requires_grad


BAD_LOSSES = {
    r"accuracy: logits \(2, 3\) and target \(3,\) were given": lambda: F.accuracy(
        tgs.zeros(2, 3), np.zeros(3, int)
    ),
    r"prediction \(2, 1\) and target \(2,\).*nothing is broadcast": lambda: F.mse_loss(
        tgs.zeros(2, 1), tgs.zeros(2)
    ),
    "dtype int64 was given, expected booleans": lambda: F.mse_loss(
        tgs.zeros(2), tgs.zeros(2), np.ones(2, int)
    ),
    r"mask of shape \(3,\)": lambda: F.mse_loss(tgs.zeros(2), tgs.zeros(2), np.ones(3, bool)),
    "expected logits .* with the classes last": lambda: F.cross_entropy(
        tgs.zeros(2, 3), np.zeros((2, 1), int)
    ),
    "targets from 0 to 3": lambda: F.cross_entropy(tgs.zeros(2, 3), np.array([0, 3])),
    "expected integers": lambda: F.cross_entropy(tgs.zeros(2, 3), np.zeros(2)),
    "delta = 0": lambda: F.huber_loss(tgs.zeros(2), tgs.zeros(2), delta=0),
    "expected equal shapes": lambda: F.binary_cross_entropy_with_logits(tgs.zeros(2), tgs.zeros(3)),
    "with_logits: targets from -1 to 1 were given, expected 0 to 1": (
        lambda: F.binary_cross_entropy_with_logits(tgs.zeros(2), [-1, 1])
    ),
    "with_logits: targets from 0 to 2 were given": (
        lambda: F.binary_cross_entropy_with_logits(
            tgs.zeros(3), [1, 2, -1], mask=[True, True, False]
        )
    ),
}


@pytest.mark.parametrize("words", BAD_LOSSES)
def test_bad_losses(words):
    with pytest.raises(ValueError, match=words):
        BAD_LOSSES[words]()


def test_losses_of_one_example_without_axes():
    logits, target = tgs.tensor([1.0, 2.0, 3.0]), np.int64(1)
    expected = np.log(np.exp([1.0, 2.0, 3.0]).sum()) - 2
    for mask, value in ((None, expected), (np.array(True), expected), (np.array(False), 0)):
        loss = nn.functional.cross_entropy(logits, target, mask=mask)
        np.testing.assert_allclose(loss.numpy(), value, rtol=1e-6)
    assert float(nn.functional.mse_loss(tgs.tensor(1.0), tgs.tensor(2.0), mask=np.array(True))) == 1


def test_a_mask_with_axes_of_length_one():
    target, mask = (
        np.arange(24.0).reshape(3, 2, 4),
        np.array([[True, False], [False] * 2, [True] * 2]),
    )
    expected = np.square(target[mask]).mean()
    for given_mask in (mask, mask[..., None]):
        loss = F.mse_loss(tgs.zeros(3, 2, 4, dtype="float64"), target, given_mask)
        assert loss.item() == pytest.approx(expected)
    columns = F.l1_loss(
        tgs.zeros(3, 2, 4, dtype="float64"), target, np.array([[[True, *[False] * 3]]])
    )
    assert columns.item() == pytest.approx(target[..., 0].mean())
    with pytest.raises(tgs.ShapeError, match="each of its length or of 1"):
        F.mse_loss(tgs.zeros(3, 2), np.zeros((3, 2)), np.ones((3, 3), bool))


def test_cross_entropy_of_selected_rows_has_second_derivatives(rng):
    x, target = rng.standard_normal((2, 3, 4)), rng.integers(0, 4, (2, 3))
    mask = np.array([[True, False, True], [False, False, True]])
    assert tgs.gradcheck(
        lambda t: nn.functional.cross_entropy(t, target, mask=mask), tgs.tensor(x), order=2
    )
