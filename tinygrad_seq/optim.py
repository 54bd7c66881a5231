"""Optimisers, schedules of their learning rate, and clipping of gradients.

An update computes new values and puts them in the parameter's place; nothing that is recorded or
that somebody looks at changes under them. All of it happens where the parameters are, and nothing
waits for a GPU. Imports the engine, devices, parallel and nn's Module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from tinygrad_seq import devices
from tinygrad_seq.errors import TapeError, called, number, positive, whole
from tinygrad_seq.nn.module import Module
from tinygrad_seq.parallel import in_blocks
from tinygrad_seq.tensors import FLOATS, Tensor, array_of, boxed, replace_data, wrap

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "CosineAnnealingLR",
    "ExponentialLR",
    "LambdaLR",
    "Optimizer",
    "RMSprop",
    "Schedule",
    "StepLR",
    "WarmupLR",
    "clip_grad_norm_",
    "clip_grad_value_",
]
BLOCK = 2**16  # elements of each of some arrays that go together through a second cache
WORTH_EINSUM = 2**14  # elements of which a sum of squares takes it half the time, and no memory
WORTH_THREADS = 2**20  # elements from which on several threads are quicker
Group = dict[str, Any]
State = dict[str, Any]


class Optimizer:
    """The base: parameter groups, each with its own settings, and the state of each parameter.

    ``parameters`` are tensors, or groups: dicts with ``"params"`` and settings of their own.
    ``param_groups`` are these dicts, to read and to change: ``param_groups[0]["lr"] = 0.01``.
    Subclasses define ``update(value, gradient, group, state)``, which returns the new value and
    may keep arrays in ``state``.
    """

    def __init__(self, parameters: Iterable[Any], settings: Group) -> None:
        given = _listed(parameters, type(self).__name__)
        if not given:
            raise ValueError(
                f"{type(self).__name__}: no parameters were given; those of a module are what "
                "nn.parameter made of arrays, such as those of nn.init"
            )
        groups: list[Any] = given if isinstance(given[0], Mapping) else [{"params": given}]
        self.param_groups: list[Group] = []
        seen: set[int] = set()
        for group in groups:
            unknown = set(group) - set(settings) - {"params"}
            if unknown or "params" not in group:
                raise ValueError(
                    f"{type(self).__name__}: a group with {sorted(group)} was given, expected "
                    f"'params' and any of {sorted(settings)}"
                )
            made = {**settings, **group}
            made["params"] = _listed(group["params"], type(self).__name__)
            for parameter in made["params"]:
                self._check(parameter, seen)
            made.update(checked_settings(made, type(self).__name__))
            self.param_groups.append(made)
        self._states: list[State] = [{} for _ in seen]  # in the order of parameters()
        self.factors: list[float] = []  # what each schedule multiplies the learning rates by now

    def _check(self, parameter: Any, seen: set[int]) -> None:
        name = type(self).__name__
        _check_tensor(parameter, name)
        if parameter.dtype not in FLOATS:
            raise ValueError(
                f"{name}: a tensor of dtype {parameter.dtype} was given, expected floating ones, "
                "which have gradients"
            )
        if not parameter.is_leaf:
            raise TapeError(f"{name}: a computed tensor was given, expected leaves")
        if id(parameter) in seen:
            raise ValueError(f"{name}: a parameter of shape {parameter.shape} was given twice")
        seen.add(id(parameter))

    def __setattr__(self, name: str, value: Any) -> None:
        groups = vars(self).get("param_groups")
        if groups and name in groups[0]:  # nobody would read it
            raise ValueError(
                f"{type(self).__name__}: .{name} was assigned, which is a setting of each group; "
                f"write optimizer.param_groups[0][{name!r}] = {value!r:.40}"
            )
        super().__setattr__(name, value)

    def parameters(self) -> list[Tensor]:
        """The parameters of all groups, in order."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def zero_grad(self) -> None:
        """Forget the gradients, which otherwise add up."""
        for parameter in self.parameters():
            parameter.grad = None

    def step(self) -> None:
        """Update every parameter that has a gradient. Raises TapeError if none has."""
        if len(self.parameters()) != len(self._states):
            raise ValueError(
                f"{type(self).__name__}.step: there are {len(self.parameters())} parameters, made "
                f"for {len(self._states)}; make another optimiser instead of changing the groups"
            )
        done, states = 0, iter(self._states)
        for group in self.param_groups:
            settings = {**group, **checked_settings(group, type(self).__name__)}
            for parameter in group["params"]:
                state = next(states)
                if parameter.grad is None or not parameter.requires_grad:
                    continue
                done += 1
                replace_data(parameter, self._updated(parameter, settings, state))
        if not done:
            raise TapeError(
                f"{type(self).__name__}.step: no parameter has a gradient; call loss.backward() "
                "first, and check that the loss depends on these parameters"
            )

    def _updated(self, parameter: Tensor, settings: Group, state: State) -> Any:
        """What ``update`` makes of a parameter that has a gradient, checked."""
        assert parameter.grad is not None
        # float16 is updated in float32: ε would be 0 in it, and small steps be lost.
        dtype = np.promote_types(parameter.dtype, np.float32)
        value = parameter._data.astype(dtype, copy=False)
        g = parameter.grad._data.astype(dtype, copy=False)
        for name, kept in state.items():
            if type(kept) is int or (type(kept) is type(value) and kept.dtype == dtype):
                continue
            if devices.is_array(kept):  # the model was moved or converted
                state[name] = devices.to_device(kept, parameter.device).astype(dtype)
        name = f"{type(self).__name__}.update"
        try:
            new = array_of(self.update(value, g, settings, state), name)
        except MemoryError as error:
            raise devices.explained(error, f"{type(self).__name__}.step") from None
        if new.shape != value.shape or new.dtype != dtype:
            raise ValueError(
                f"{name} made {new.dtype}{new.shape} of a parameter {dtype}{value.shape}, "
                "expected the same"
            )
        devices.check_one_device(name, (), (value, new))
        return new.astype(parameter.dtype, copy=False)

    def update(self, value: Any, gradient: Any, group: Group, state: State) -> Any:
        """The new value, an array made anew; ``state`` is this parameter's own, to be changed."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Kind, settings and the state of each parameter, by position; arrays copied to the host.

        It is nested: save it with pickle, not ``np.savez``.
        """
        return {
            "kind": type(self).__name__,
            "param_groups": [_settings(group) for group in self.param_groups],
            "states": [_copied(state) for state in self._states],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state_dict`` of an optimiser of this kind with as many parameters.

        With the next step its arrays go to where their parameters are. Raises ValueError for one of
        another kind or size; nothing is changed then.
        """
        parameters, name = self.parameters(), type(self).__name__
        if not hasattr(state, "keys") or set(state) != {"kind", "param_groups", "states"}:
            raise ValueError("load_state_dict: expected what an optimiser's state_dict() returned")
        groups, states = state["param_groups"], state["states"]
        if state["kind"] != name:
            raise ValueError(f"load_state_dict: that of {state['kind']} was given, expected {name}")
        if len(states) != len(parameters) or len(groups) != len(self.param_groups):
            raise ValueError(
                f"load_state_dict: {len(groups)} groups and {len(states)} parameters were given, "
                f"expected {len(self.param_groups)} and {len(parameters)}"
            )
        for parameter, saved in zip(parameters, states, strict=True):
            for key, value in saved.items():
                if devices.is_array(value) and value.shape != parameter.shape:
                    raise ValueError(
                        f"load_state_dict: {key} of shape {value.shape} was given for a parameter "
                        f"of shape {parameter.shape}"
                    )
        checked = [checked_settings(saved, name) for saved in groups]
        for group, settings in zip(self.param_groups, checked, strict=True):
            group.update(settings)
        self._states = [_copied(saved) for saved in states]

    def __getstate__(self) -> dict[str, Any]:
        """What pickle keeps: like a tensor, a state comes back on the host."""
        return {**vars(self), "_states": [_copied(state) for state in self._states]}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(str(_settings(g)) for g in self.param_groups)})"


def _listed(parameters: Any, name: str) -> list[Any]:
    """What is given as parameters, as a list."""
    if not isinstance(parameters, Iterable):
        raise ValueError(
            f"{name}: a {type(parameters).__name__} was given, expected parameters; pass "
            "model.parameters(), with ()"
        )
    return [parameters] if isinstance(parameters, Tensor) else list(parameters)


def _check_tensor(parameter: Any, name: str) -> None:
    if not isinstance(parameter, Tensor):
        raise ValueError(
            f"{name}: a {type(parameter).__name__} was given, expected tensors; pass "
            "model.parameters()"
        )


def _copied(state: Mapping[str, Any]) -> State:
    """A state on the host."""
    return {k: np.array(devices.to_host(v)) if devices.is_array(v) else v for k, v in state.items()}


def _settings(group: Group) -> Group:
    return {k: v for k, v in group.items() if k != "params"}


_BELOW = {  # what each setting that is a number from 0 on must be less than; betas are two
    "alpha": 1.0,
    "betas": 1.0,
    "eps": math.inf,
    "initial_lr": math.inf,
    "lr": math.inf,
    "momentum": 1.0,
    "weight_decay": math.inf,
}


def checked_settings(group: Group, name: str) -> Group:
    """The settings with their numbers as Python floats, which are weak.

    Raises ValueError for what is no number, negative, not finite, or 1 where it must be less.
    """
    checked = _settings(group)
    for key in _BELOW.keys() & checked:
        given, limit = checked[key], _BELOW[key]
        several = key == "betas"
        try:
            numbers = tuple([number(v, key, limit) for v in (given if several else [given])])
        except (TypeError, ValueError):
            numbers = ()
        if len(numbers) != 1 + several:
            raise ValueError(
                f"{name}: {key} = {given!r} was given, expected "
                f"{'two numbers' if several else 'a number'}, at least 0 and less than {limit:g}"
            )
        checked[key] = numbers if several else numbers[0]
    return checked


class SGD(Optimizer):
    """Gradient descent, w ← w − η g, with momentum v ← μ v + g and w ← w − η v.

    With ``nesterov`` w ← w − η (g + μ v) (Sutskever et al. 2013). ``weight_decay`` λ adds λ w to
    the gradient.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float = 0.01,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
    ) -> None:
        settings = dict(lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)
        super().__init__(parameters, settings)
        if any(group["nesterov"] and not group["momentum"] for group in self.param_groups):
            raise ValueError("SGD: nesterov was given without momentum, expected momentum > 0")

    def update(self, value: Any, gradient: Any, group: Group, state: State) -> Any:
        if group["weight_decay"]:
            gradient = gradient + group["weight_decay"] * value
        step = _with_momentum(gradient, group["momentum"], state)
        if group["nesterov"]:
            step = gradient + group["momentum"] * step
        return value - group["lr"] * step


def _with_momentum(step: Any, momentum: float, state: State) -> Any:
    """v ← μ v + step, kept in ``state``; the step itself if μ is 0."""
    if not momentum:
        return step
    if "velocity" not in state:
        state["velocity"] = np.zeros_like(step)
    velocity = state["velocity"]
    velocity *= momentum
    velocity += step
    return velocity


class Adam(Optimizer):
    """Adam (Kingma and Ba 2015).

        m ← β₁ m + (1 − β₁) g        m̂ = m / (1 − β₁ᵗ)
        v ← β₂ v + (1 − β₂) g²       v̂ = v / (1 − β₂ᵗ)
        w ← w − η m̂ / (√v̂ + ε)

    ``weight_decay`` λ adds λ w to the gradient; ``AdamW`` decays the weights themselves.
    """

    decoupled = False

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float = 0.001,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        settings = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(parameters, settings)

    def update(self, value: Any, gradient: Any, group: Group, state: State) -> Any:
        lr, (beta1, beta2), decay = group["lr"], group["betas"], group["weight_decay"]
        if not state:
            state.update(step=0, mean=np.zeros_like(value), square=np.zeros_like(value))
        coupled, own = (0.0, decay) if self.decoupled else (decay, 0.0)
        state["step"] += 1
        m, v, new = state["mean"], state["square"], np.empty_like(value)
        correction1, correction2 = (1 - beta ** state["step"] for beta in (beta1, beta2))
        root = math.sqrt(correction2)  # √v̂ + ε = (√v + ε root) / root

        def some(w: Any, g: Any, m: Any, v: Any, new: Any) -> None:
            if own:
                w = w - lr * own * w
            if coupled:
                g = g + coupled * w
            m *= beta1
            np.multiply(g, 1 - beta1, out=new)  # `new` is room for what is on the way
            m += new
            v *= beta2
            np.multiply(g, g, out=new)
            new *= 1 - beta2
            v += new
            np.sqrt(v, out=new)
            new += group["eps"] * root
            np.divide(m, new, out=new)
            new *= lr * root / correction1
            np.subtract(w, new, out=new)

        _by_rows(some, value, gradient, m, v, new)
        return new


def _by_rows(work: Callable[..., None], *arrays: Any) -> None:
    """Work on arrays of one shape, large ones some rows at a time on several threads."""
    size, first = arrays[0].size, arrays[0]
    if size < WORTH_THREADS or type(first) is not np.ndarray:
        return work(*arrays)

    def block(low: int, high: int) -> None:
        work(*(array[low:high] for array in arrays))

    return in_blocks(block, len(first), max(1, BLOCK * len(first) // size))


class AdamW(Adam):
    """Adam with w ← w − η λ w beside its step (Loshchilov and Hutter 2019)."""

    decoupled = True

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float = 0.001,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(parameters, lr, betas, eps, weight_decay)


class RMSprop(Optimizer):
    """v ← α v + (1 − α) g²; w ← w − η g / (√v + ε) (Hinton 2012), with momentum on the step."""

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float = 0.01,
        alpha: float = 0.99,
        eps: float = 1e-8,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        settings = dict(lr=lr, alpha=alpha, eps=eps, momentum=momentum, weight_decay=weight_decay)
        super().__init__(parameters, settings)

    def update(self, value: Any, gradient: Any, group: Group, state: State) -> Any:
        lr, alpha, momentum = group["lr"], group["alpha"], group["momentum"]
        if not state:
            state["square"] = np.zeros_like(value)
        if momentum and "velocity" not in state:
            state["velocity"] = np.zeros_like(value)
        velocities = [state["velocity"]] if momentum else []

        def some(w: Any, g: Any, square: Any, new: Any, *velocities: Any) -> None:
            if group["weight_decay"]:
                g = g + group["weight_decay"] * w
            square *= alpha
            np.multiply(g, g, out=new)  # `new` is room for what is on the way
            new *= 1 - alpha
            square += new
            np.sqrt(square, out=new)
            new += group["eps"]
            np.divide(g, new, out=new)
            for velocity in velocities:
                velocity *= momentum
                velocity += new
            np.multiply(velocities[0] if velocities else new, lr, out=new)
            np.subtract(w, new, out=new)

        new = np.empty_like(value)
        _by_rows(some, value, gradient, state["square"], new, *velocities)
        return new


# Schedules -----------------------------------------------------------------------------------


class Schedule:
    """A learning rate that changes: each group's own, as first given, times ``factor(n)``.

    n counts the calls of ``step()``: after each epoch, or after each update if the factor counts
    those. It sets ``optimizer.param_groups[k]["lr"]``, whatever that was set to by hand. Several
    schedules of one optimiser multiply. Subclasses define ``factor``.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, Optimizer):
            raise ValueError(
                f"{type(self).__name__}: a {type(optimizer).__name__} was given, expected an "
                "optimiser"
            )
        self.optimizer, self.count, self._place = optimizer, 0, len(optimizer.factors)
        self._set()

    def factor(self, n: int) -> float:
        """What the learning rate is multiplied by after n steps."""
        raise NotImplementedError

    def step(self) -> None:
        """One step further along the schedule."""
        self.count += 1
        self._set()

    def _set(self) -> None:
        now = number(self.factor(self.count), f"{type(self).__name__}: factor({self.count})")
        self.optimizer.factors[self._place : self._place + 1] = [now]  # the first time it is added
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
            group["lr"] = group["initial_lr"] * math.prod(self.optimizer.factors)

    def state_dict(self) -> dict[str, Any]:
        """How many steps were taken."""
        return {"count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        if not hasattr(state, "keys") or set(state) != {"count"}:
            raise ValueError("load_state_dict: expected what a schedule's state_dict() returned")
        self.count = whole(state["count"], "load_state_dict: count", least=0)
        self._set()


class LambdaLR(Schedule):
    """Multiplies the learning rate by ``function(n)``."""

    def __init__(self, optimizer: Optimizer, function: Callable[[int], float]) -> None:
        called(function, "LambdaLR: function", "a function of a number of steps")
        self.function = function
        super().__init__(optimizer)

    def factor(self, n: int) -> float:
        return self.function(n)


class StepLR(Schedule):
    """Multiplies the learning rate by ``gamma`` every ``step_size`` steps."""

    def __init__(self, optimizer: Optimizer, step_size: int, gamma: float = 0.1) -> None:
        self.step_size = whole(step_size, "StepLR: step_size")
        self.gamma = number(gamma, "StepLR: gamma")
        super().__init__(optimizer)

    def factor(self, n: int) -> float:
        return self.gamma ** (n // self.step_size)


class ExponentialLR(Schedule):
    """Multiplies the learning rate by ``gamma`` every step."""

    def __init__(self, optimizer: Optimizer, gamma: float) -> None:
        self.gamma = number(gamma, "ExponentialLR: gamma")
        super().__init__(optimizer)

    def factor(self, n: int) -> float:
        return self.gamma**n


class CosineAnnealingLR(Schedule):
    """Half a cosine from the learning rate to ``final`` times it in ``steps`` steps, then stays.

    (Loshchilov and Hutter 2017, without restarts.)
    """

    def __init__(self, optimizer: Optimizer, steps: int, final: float = 0.0) -> None:
        self.steps = whole(steps, "CosineAnnealingLR: steps")
        self.final = number(final, "CosineAnnealingLR: final")
        super().__init__(optimizer)

    def factor(self, n: int) -> float:
        turned = 0.5 * (1 + math.cos(math.pi * min(n / self.steps, 1.0)))
        return self.final + (1 - self.final) * turned


class WarmupLR(Schedule):
    """Rises in a straight line from lr/steps to the learning rate lr in ``steps``, then stays.

    The factor is min((n + 1)/steps, 1) after n steps of the schedule.
    """

    def __init__(self, optimizer: Optimizer, steps: int) -> None:
        self.steps = whole(steps, "WarmupLR: steps")
        super().__init__(optimizer)

    def factor(self, n: int) -> float:
        return min((n + 1) / self.steps, 1.0)


# Clipping ------------------------------------------------------------------------------------


def _with_gradients(
    parameters: Tensor | Module | Iterable[Tensor], name: str
) -> list[tuple[Tensor, Any]]:
    """The tensors that have a gradient, each with that as an array."""
    if isinstance(parameters, Module):
        parameters = parameters.parameters()
    given = _listed(parameters, name)
    if not given:
        raise ValueError(
            f"{name}: no parameters were given; an iterator such as model.parameters() can be "
            "used only once, pass it anew"
        )
    for tensor in given:
        _check_tensor(tensor, name)
    return [(tensor, tensor.grad._data) for tensor in given if tensor.grad is not None]


def clip_grad_norm_(
    parameters: Tensor | Module | Iterable[Tensor], max_norm: float
) -> float | Tensor:
    """Scale all gradients together so that their norm is at most ``max_norm``.

    Returns √Σ g² over all of them before clipping (Pascanu, Mikolov, Bengio 2013): a float, or on a
    GPU a tensor without axes, for which nothing has to wait until ``float(norm)`` is asked for. A
    norm that is not finite leaves the gradients as they are; whoever gets it decides.
    """
    max_norm = positive(max_norm, "clip_grad_norm_: max_norm")
    pairs = _with_gradients(parameters, "clip_grad_norm_")
    if {type(g) for _, g in pairs} - {np.ndarray}:
        devices.check_one_device("clip_grad_norm_", (), [g for _, g in pairs])
        return _clip_there(pairs, max_norm)
    with np.errstate(over="ignore"):
        norm = math.sqrt(sum(_sum_of_squares(g) for _, g in pairs))
    if math.isinf(norm) or not norm:  # squares leave float32's range long before the gradient does
        norm = math.sqrt(sum(float(np.sum(np.square(g, dtype=np.float64))) for _, g in pairs))
    if max_norm < norm < math.inf:
        for tensor, g in pairs:
            tensor.grad = wrap(boxed(g * (max_norm / norm)), None)
    return norm


def _sum_of_squares(g: np.ndarray) -> float:
    """Σ g², of float16 in float32. Those of a row are added up as they are made."""
    wide = g.astype(np.promote_types(g.dtype, np.float32), copy=False)
    if g.ndim < 2 or g.size < WORTH_EINSUM:
        return float(np.square(wide).sum())
    axes = [*range(g.ndim)]
    return float(np.einsum(wide, axes, wide, axes, axes[:1]).sum(dtype=np.float64))


def _clip_there(pairs: list[tuple[Tensor, Any]], max_norm: float) -> Tensor:
    """The same on a GPU, where there is no looking at a number without waiting for it."""
    norm = np.sqrt(sum(np.square(g, dtype=np.float64).sum() for _, g in pairs))
    clips = (norm > max_norm) & np.isfinite(norm)
    factor = np.where(clips, max_norm / norm, 1.0)
    for tensor, g in pairs:
        tensor.grad = wrap(g * factor.astype(g.dtype), None)
    return wrap(norm, None)


def clip_grad_value_(parameters: Tensor | Module | Iterable[Tensor], limit: float) -> None:
    """Bound every element of every gradient to ±``limit``."""
    limit = positive(limit, "clip_grad_value_: limit")
    for tensor, g in _with_gradients(parameters, "clip_grad_value_"):
        tensor.grad = wrap(boxed(np.clip(g, -limit, limit)), None)
