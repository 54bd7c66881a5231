"""Optimisers, schedules of their learning rate, and clipping of gradients.

An update computes new values and puts them in the parameter's place; nothing that is recorded or
that somebody looks at changes under them. Imports the engine and nn's Module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from tinygrad_seq.errors import TapeError
from tinygrad_seq.nn.module import Module
from tinygrad_seq.tensors import Tensor, replace_data, wrap

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "CosineAnnealingLR",
    "ExponentialLR",
    "Optimizer",
    "RMSprop",
    "Schedule",
    "StepLR",
    "WarmupLR",
    "clip_grad_norm_",
    "clip_grad_value_",
]
Group = dict[str, Any]
State = dict[str, Any]


class Optimizer:
    """The base: parameter groups, each with its own settings, and the state of each parameter.

    ``parameters`` are tensors, or groups: dicts with ``"params"`` and settings of their own.
    Subclasses define ``update(value, gradient, group, state)``, which returns the new value and
    may keep arrays in ``state``.
    """

    def __init__(self, parameters: Iterable[Any], settings: Group) -> None:
        if isinstance(parameters, Module):
            raise ValueError(
                f"{type(self).__name__}: a module was given, expected its parameters; pass "
                "model.parameters()"
            )
        given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        if not given:
            raise ValueError(f"{type(self).__name__}: no parameters were given")
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
            params = group["params"]
            made = {**settings, **group}
            made["params"] = [params] if isinstance(params, Tensor) else list(params)
            for parameter in made["params"]:
                self._check(parameter, seen)
            check_settings(made, type(self).__name__)
            self.param_groups.append(made)
        self._states: dict[int, State] = {}

    def _check(self, parameter: Any, seen: set[int]) -> None:
        name = type(self).__name__
        if not isinstance(parameter, Tensor):
            raise ValueError(
                f"{name}: a {type(parameter).__name__} was given, expected tensors; pass "
                "model.parameters()"
            )
        if not parameter.is_leaf:
            raise TapeError(f"{name}: a computed tensor was given, expected leaves")
        if id(parameter) in seen:
            raise ValueError(f"{name}: a parameter of shape {parameter.shape} was given twice")
        seen.add(id(parameter))

    def parameters(self) -> list[Tensor]:
        """The parameters of all groups, in order."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def zero_grad(self) -> None:
        """Forget the gradients, which otherwise add up."""
        for parameter in self.parameters():
            parameter.grad = None

    def step(self) -> None:
        """Update every parameter that has a gradient. Raises TapeError if none has."""
        done = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None or not parameter.requires_grad:
                    continue
                done += 1
                state = self._states.setdefault(id(parameter), {})
                new = self.update(parameter._data, gradient._data, group, state)
                replace_data(parameter, new)
        if not done:
            raise TapeError(
                f"{type(self).__name__}.step: no parameter has a gradient; call loss.backward() "
                "first, and check that the loss depends on these parameters"
            )

    def update(self, value: Any, gradient: Any, group: Group, state: State) -> Any:
        """The new value, an array made anew; ``state`` is this parameter's own, to be changed."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Settings and the state of each parameter, by position: numbers and copies of arrays."""
        return {
            "groups": [{k: v for k, v in g.items() if k != "params"} for g in self.param_groups],
            "states": [_copied(self._states.get(id(p), {})) for p in self.parameters()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state_dict`` of an optimiser with as many groups and parameters."""
        parameters = self.parameters()
        if len(state["states"]) != len(parameters) or len(state["groups"]) != len(
            self.param_groups
        ):
            raise ValueError(
                f"load_state_dict: {len(state['groups'])} groups and {len(state['states'])} "
                f"parameters were given, expected {len(self.param_groups)} and {len(parameters)}"
            )
        for parameter, saved in zip(parameters, state["states"], strict=True):
            for name, value in saved.items():
                if isinstance(value, np.ndarray) and value.shape != parameter.shape:
                    raise ValueError(
                        f"load_state_dict: {name} of shape {value.shape} was given for a "
                        f"parameter of shape {parameter.shape}"
                    )
        for group, saved in zip(self.param_groups, state["groups"], strict=True):
            group.update(saved)
        pairs = zip(parameters, state["states"], strict=True)
        self._states = {id(p): _copied(s) for p, s in pairs}

    def __reduce__(self) -> Any:
        # The state is found by the parameter's identity, which another process does not share.
        return _restore, (type(self), self.param_groups, self.state_dict())

    def __repr__(self) -> str:
        groups = [{k: v for k, v in g.items() if k != "params"} for g in self.param_groups]
        return f"{type(self).__name__}({', '.join(map(str, groups))})"


def _copied(state: Mapping[str, Any]) -> State:
    return {k: np.copy(v) if isinstance(v, np.ndarray) else v for k, v in state.items()}


def _restore(kind: type[Optimizer], groups: list[Group], state: dict[str, Any]) -> Optimizer:
    made = kind.__new__(kind)
    made.param_groups, made._states = groups, {}
    made.load_state_dict(state)
    return made


_LIMITS = {"momentum": 1.0, "alpha": 1.0, "betas": 1.0}  # the others may be anything finite


def check_settings(group: Group, name: str) -> None:
    """Raise a ValueError for a setting that is negative, not finite, or 1 where it must be less."""
    for key in ("lr", "momentum", "weight_decay", "eps", "alpha", "betas"):
        given = group.get(key, 0.0)
        limit = _LIMITS.get(key, math.inf)
        for value in given if isinstance(given, (tuple, list)) else (given,):
            if not 0 <= value < limit:
                raise ValueError(
                    f"{name}: {key} = {given} was given, expected at least 0 and less than "
                    f"{limit:g}"
                )


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
        if nesterov and not momentum:
            raise ValueError("SGD: nesterov was given without momentum, expected momentum > 0")
        settings = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
        }
        super().__init__(parameters, settings)

    def update(self, value: Any, gradient: Any, group: Group, state: State) -> Any:
        if group["weight_decay"]:
            gradient = gradient + group["weight_decay"] * value
        if group["momentum"]:
            if "velocity" not in state:
                state["velocity"] = np.zeros_like(value)
            velocity = state["velocity"]
            velocity *= group["momentum"]
            velocity += gradient
            gradient = gradient + group["momentum"] * velocity if group["nesterov"] else velocity
        return value - group["lr"] * gradient


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
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(parameters, settings)

    def update(self, value: Any, gradient: Any, group: Group, state: State) -> Any:
        lr, (beta1, beta2), decay = group["lr"], group["betas"], group["weight_decay"]
        if not state:
            state.update(step=0, mean=np.zeros_like(value), square=np.zeros_like(value))
        if decay and self.decoupled:
            value = value - lr * decay * value
        elif decay:
            gradient = gradient + decay * value
        state["step"] += 1
        m, v = state["mean"], state["square"]
        m *= beta1
        m += (1 - beta1) * gradient
        v *= beta2
        v += (1 - beta2) * (gradient * gradient)
        m_hat = m / (1 - beta1 ** state["step"])
        v_hat = v / (1 - beta2 ** state["step"])
        return value - lr * m_hat / (np.sqrt(v_hat) + group["eps"])


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
        settings = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "momentum": momentum,
            "weight_decay": weight_decay,
        }
        super().__init__(parameters, settings)

    def update(self, value: Any, gradient: Any, group: Group, state: State) -> Any:
        if not state:
            state.update(square=np.zeros_like(value), velocity=np.zeros_like(value))
        if group["weight_decay"]:
            gradient = gradient + group["weight_decay"] * value
        square = state["square"]
        square *= group["alpha"]
        square += (1 - group["alpha"]) * (gradient * gradient)
        step = gradient / (np.sqrt(square) + group["eps"])
        if group["momentum"]:
            velocity = state["velocity"]
            velocity *= group["momentum"]
            velocity += step
            step = velocity
        return value - group["lr"] * step


# Schedules -----------------------------------------------------------------------------------


class Schedule:
    """The learning rate of each group is what it started from times ``factor(n)`` after n steps.

    Call ``step()`` after each epoch, or after each update if the factor counts those.
    """

    def __init__(self, optimizer: Optimizer, factor: Callable[[int], float]) -> None:
        self.optimizer, self.factor, self.count = optimizer, factor, 0
        self.start = [group["lr"] for group in optimizer.param_groups]
        self._set()

    def step(self) -> None:
        """One step further along the schedule."""
        self.count += 1
        self._set()

    def _set(self) -> None:
        for group, lr in zip(self.optimizer.param_groups, self.start, strict=True):
            group["lr"] = lr * self.factor(self.count)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "start": list(self.start)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count, self.start = state["count"], list(state["start"])
        self._set()


class StepLR(Schedule):
    """Multiplies the learning rate by ``gamma`` every ``step_size`` steps."""

    def __init__(self, optimizer: Optimizer, step_size: int, gamma: float = 0.1) -> None:
        if step_size < 1:
            raise ValueError(f"StepLR: step_size = {step_size} was given, expected 1 or more")
        super().__init__(optimizer, lambda n: gamma ** (n // step_size))


class ExponentialLR(Schedule):
    """Multiplies the learning rate by ``gamma`` every step."""

    def __init__(self, optimizer: Optimizer, gamma: float) -> None:
        super().__init__(optimizer, lambda n: gamma**n)


class CosineAnnealingLR(Schedule):
    """Half a cosine from the learning rate to ``final`` times it in ``steps`` steps, then stays.

    (Loshchilov and Hutter 2017, without restarts.)
    """

    def __init__(self, optimizer: Optimizer, steps: int, final: float = 0.0) -> None:
        if steps < 1:
            raise ValueError(f"CosineAnnealingLR: steps = {steps} was given, expected 1 or more")
        super().__init__(
            optimizer,
            lambda n: final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(n / steps, 1.0))),
        )


class WarmupLR(Schedule):
    """Rises in a straight line to the learning rate in ``steps`` steps, then stays."""

    def __init__(self, optimizer: Optimizer, steps: int) -> None:
        if steps < 1:
            raise ValueError(f"WarmupLR: steps = {steps} was given, expected 1 or more")
        super().__init__(optimizer, lambda n: min((n + 1) / steps, 1.0))


# Clipping ------------------------------------------------------------------------------------


def _with_gradients(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    given = [parameters] if isinstance(parameters, Tensor) else parameters
    return [parameter for parameter in given if parameter.grad is not None]


def clip_grad_norm_(parameters: Tensor | Iterable[Tensor], max_norm: float) -> float:
    """Scale all gradients together so that their norm is at most ``max_norm``.

    Returns √Σ g² over all of them before clipping (Pascanu, Mikolov, Bengio 2013). A norm that is
    not finite leaves the gradients as they are; whoever gets it decides.
    """
    if not max_norm > 0:
        raise ValueError(f"clip_grad_norm_: max_norm = {max_norm} was given, expected more than 0")
    tensors = _with_gradients(parameters)
    arrays = [tensor.grad._data for tensor in tensors if tensor.grad is not None]
    norm = math.sqrt(sum(float(np.vdot(g, g)) for g in arrays))
    if math.isinf(norm):  # float32 overflows long before the gradient does
        norm = math.sqrt(sum(float(np.sum(np.square(g, dtype=np.float64))) for g in arrays))
    if max_norm < norm < math.inf:
        for tensor, g in zip(tensors, arrays, strict=True):
            tensor.grad = wrap(g * (max_norm / norm), None)
    return norm


def clip_grad_value_(parameters: Tensor | Iterable[Tensor], limit: float) -> None:
    """Bound every element of every gradient to ±``limit``."""
    if not limit > 0:
        raise ValueError(f"clip_grad_value_: limit = {limit} was given, expected more than 0")
    for tensor in _with_gradients(parameters):
        assert tensor.grad is not None
        tensor.grad = wrap(np.clip(tensor.grad._data, -limit, limit), None)
