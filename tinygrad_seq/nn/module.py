"""Modules: objects that hold parameters, buffers and other modules.

A tensor that requires a gradient is a parameter of the module that it is assigned to, and stays
one when it is frozen. Modules may stand in attributes, and in lists, tuples and dicts of them.
Imports the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import Signature, signature
from reprlib import recursive_repr
from types import FunctionType
from typing import Any

from numpy.typing import DTypeLike

from tinygrad_seq import devices
from tinygrad_seq.errors import ShapeError, TraceError
from tinygrad_seq.structural import is_device
from tinygrad_seq.tensors import (
    FLOATS,
    Tensor,
    TensorLike,
    as_array,
    as_tensor,
    check_dtype,
    is_traced,
    renew_leaf,
    replace_data,
    wrap,
)


class Module:
    """The base of everything that holds parameters. Subclasses define ``forward``.

    Parameters are the tensors in its attributes that require a gradient (``nn.parameter``), and
    those of the modules in its attributes. Modules may stand in lists, tuples and dicts too; a
    parameter there raises ValueError, it needs an attribute of its own. Arrays are no parameters:
    ``nn.init`` gives arrays. There is no need to call ``super().__init__()``.
    ``training`` is True until ``eval()``; dropout is one that asks.
    """

    training: bool = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} does not define forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    # Registering

    def __setattr__(self, name: str, value: Any) -> None:
        parameters, buffers = self._registered()
        where = f"{type(self).__name__}.{name}"
        if isinstance(value, Tensor) and is_traced((value,)):
            raise TraceError(
                f"{where}: a value of a step was assigned, which is gone when the call is over; "
                "let the cell return it with its output, y = {'h': h, 'gate': gate}, and the scan "
                "gives it for all steps"
            )
        if isinstance(value, Tensor) and value.requires_grad:
            if not value.is_leaf:
                raise ValueError(
                    f"{where}: a tensor computed from others was assigned, which would be neither "
                    "trained nor saved; write nn.parameter(values) for a parameter, or detach() it"
                )
            buffers.discard(name)
            parameters.add(name)
        elif value is None:
            parameters.discard(name)
            buffers.discard(name)
        elif name in parameters or (name in buffers and not isinstance(value, Tensor)):
            kind = "tensor off the tape" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"{where}: a {kind} was assigned to a parameter or buffer; replace its values with "
                f"module.{name}.data = array, set it to None first, or hold a frozen tensor with "
                f"module.register_parameter({name!r}, tensor)"
            )
        _modules_in(name, value)  # raises for parameters in lists
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        for names in self._registered():
            names.discard(name)
        object.__delattr__(self, name)

    def _registered(self) -> tuple[set[str], set[str]]:
        own = self.__dict__
        return own.setdefault("_parameters", set()), own.setdefault("_buffers", set())

    def __copy__(self) -> Module:
        made, (parameters, buffers) = object.__new__(type(self)), self._registered()
        vars(made).update(vars(self), _parameters={*parameters}, _buffers={*buffers})
        return made

    def register_parameter(self, name: str, tensor: Tensor) -> None:
        """Hold ``tensor`` as a parameter even if it starts frozen."""
        if not isinstance(tensor, Tensor) or not tensor.is_leaf or tensor.dtype not in FLOATS:
            raise ValueError(
                f"register_parameter: {name} is {tensor!r:.60}, expected a floating tensor not "
                "computed from others; make one with nn.parameter(values)"
            )
        parameters, buffers = self._registered()
        parameters.add(name)
        buffers.discard(name)
        object.__setattr__(self, name, tensor)

    def register_buffer(self, name: str, tensor: TensorLike) -> None:
        """Hold ``tensor`` as state that is saved and moved but not trained."""
        parameters, buffers = self._registered()
        buffers.add(name)
        parameters.discard(name)
        object.__setattr__(self, name, as_tensor(tensor, "register_buffer"))

    # Walking

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """This module and every one inside, each once, with its dotted path."""
        paths = {id(self): prefix}
        for module in self.modules():
            path = paths[id(module)]
            yield path, module
            for name, value in reversed(vars(module).items()):
                if isinstance(value, HOLDERS):
                    inner = _modules_in(f"{path}.{name}" if path else name, value)
                    # Of several paths to a module the walk takes the one noted last.
                    paths.update((id(child), place) for place, child in reversed(inner))

    def modules(self) -> Iterator[Module]:
        """This module and every one inside, each once."""
        seen: set[int] = set()
        waiting: list[Any] = [self]
        while waiting:
            holder = waiting.pop()
            if id(holder) in seen:
                continue
            seen.add(id(holder))
            if isinstance(holder, Module):
                yield holder
                values: Any = holder.__dict__.values()
            else:
                values = holder.values() if isinstance(holder, dict) else holder
            for value in reversed(values):
                if type(value) not in NO_HOLDERS and isinstance(value, HOLDERS):
                    waiting.append(value)

    def _named(self, kind: int, once: bool) -> Iterator[tuple[str, Tensor]]:
        seen: set[int] = set()
        for path, module in self.named_modules():
            names = module._registered()[kind]
            if not names:
                continue
            for name, value in vars(module).items():
                if name in names and not (once and id(value) in seen):
                    seen.add(id(value))
                    yield (f"{path}.{name}" if path else name), value

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter with its dotted name; one that is tied comes once, frozen ones too."""
        return self._named(0, once=True)

    def parameters(self) -> Iterator[Tensor]:
        """Every parameter, each once, frozen ones too."""
        return (parameter for _, parameter in self.named_parameters())

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Every buffer with its dotted name."""
        return self._named(1, once=True)

    def buffers(self) -> Iterator[Tensor]:
        """Every buffer, each once."""
        return (buffer for _, buffer in self.named_buffers())

    # State

    def _named_state(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, tensor in (*self._named(0, once=False), *self._named(1, once=False)):
            if name in found:
                raise ValueError(
                    f"{type(self).__name__}: two tensors have the name {name!r}; keys of dicts of "
                    "modules must not make the same path"
                )
            found[name] = tensor
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """The values of all parameters and buffers now; later training does not change them.

        They are where the module is; ``pickle`` and ``np.savez`` write host arrays to a file.
        """
        return {name: tensor.detach() for name, tensor in self._named_state().items()}

    def load_state_dict(self, state: Mapping[str, TensorLike]) -> None:
        """Take over the values of a ``state_dict``; arrays will do as well.

        Values are moved to where the module is and converted to its dtype, floating ones to
        floating ones, integers to integers. Raises ValueError for another kind and for names that
        are missing or unknown, ShapeError for other shapes; nothing is changed then.
        """
        own = self._named_state()
        _check_dict(state, "load_state_dict")
        missing = [name for name in own if name not in state]
        unknown = [name for name in state if name not in own]
        if missing or unknown:
            raise ValueError(
                f"load_state_dict: missing {missing or 'nothing'}, unknown {unknown or 'nothing'}; "
                f"expected exactly {list(own)}"
            )
        values = {}
        for name, tensor in own.items():
            value = _in_the_place_of(tensor, state[name], f"load_state_dict: {name}")
            moved = devices.to_device(value._data, tensor.device)
            values[name] = moved.astype(tensor.dtype)
        for name, tensor in own.items():
            replace_data(tensor, values[name])

    def train(self, mode: bool = True) -> Module:
        """Set training behaviour here and in every module inside."""
        for module in self.modules():
            module.training = mode
        return self

    def eval(self) -> Module:
        """Set the behaviour of use, not training, here and in every module inside."""
        return self.train(False)

    def zero_grad(self) -> None:
        """Forget the gradients of all parameters."""
        for module in self.modules():
            own = module.__dict__
            for name in own.get("_parameters", ()):
                own[name].grad = None

    def to(self, target: DTypeLike) -> Module:
        """Convert or move parameters and buffers, in place; returns the module.

        A dtype is for the floating ones; a device, ``"cpu"`` or ``"cuda"``, for all of them and
        their gradients. An optimiser made before goes on with them there. Raises DeviceError where
        there is no GPU.
        """
        for tensor in self._named_state().values():
            if not is_device(target) and tensor.dtype not in FLOATS:
                continue
            changed = tensor.detach().to(target)
            if changed.dtype.kind != tensor.dtype.kind:
                raise ValueError(f"to: {check_dtype(target)} was given, expected a float dtype")
            if changed._data is not tensor._data:
                gradient = tensor.grad
                tensor._data = changed._data
                renew_leaf(tensor, tensor.requires_grad)
                tensor.grad = None if gradient is None else gradient.detach().to(target)
        return self

    @recursive_repr()
    def __repr__(self) -> str:
        shown = {k: v for k, v in vars(self).items() if isinstance(v, (int, float, str))}
        shown = {k: v for k, v in shown.items() if k != "training" and not k.startswith("_")}
        lines = [f"{type(self).__name__}(" + ", ".join(f"{k}={v!r}" for k, v in shown.items())]
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                lines.append(f"  {name}: {value.dtype}{value.shape}")
            kinds = (*HOLDERS, Callable) if isinstance(value, (list, tuple)) else HOLDERS
            for path, child in _modules_in(name, value, kinds):
                text = str(getattr(child, "__name__", child))
                lines.append(f"  {path}: " + text.replace("\n", "\n  "))
        return lines[0] + ")" if len(lines) == 1 else "\n".join([*lines, ")"])


def functional_call(
    module: Module,
    tensors: Mapping[str, TensorLike],
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """``module(*args, **kwargs)`` with these tensors in the place of parameters and buffers.

    ``tensors`` have the names of ``state_dict`` and may be computed from others, so that gradients
    go on to what they were computed from: weights after a step of gradient descent (MAML: Finn,
    Abbeel, Levine 2017), weights that were dropped or normalised, or averages of them. What is not
    named stays as it is, unless it is tied to what is. ``args`` is a tuple, or the only argument.
    So a module becomes a function of its parameters, which ``grad``, ``vjp`` and ``jvp`` take::

        def of(p):
            return loss(nn.functional_call(model, p, x), y)

        gradients = tgs.grad(of)(dict(model.named_parameters()))

    Raises ValueError for unknown names and another kind of dtype, ShapeError for other shapes.
    Buffers that the module itself updates are updated in what is given. The module holds what is
    given until the call is over: other threads must not use it meanwhile.
    """
    if not isinstance(module, Module):
        kind = type(module).__name__
        raise ValueError(f"functional_call: a {kind} was given, expected a module")
    own = module._named_state()
    _check_dict(tensors, "functional_call")
    unknown = [name for name in tensors if name not in own]
    if unknown:
        raise ValueError(f"functional_call: unknown {unknown}, expected any of {list(own)}")
    given = {
        name: _in_the_place_of(own[name], value, f"functional_call: {name}")
        for name, value in tensors.items()
    }
    tied = {id(own[name]): tensor for name, tensor in given.items()}
    replaced: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for path, each in module.named_modules():
            attributes = vars(each)
            for name in set().union(*each._registered()):
                held = attributes[name]
                if id(held) in tied:
                    replaced.append((attributes, name, held))
                    full = f"{path}.{name}" if path else name
                    attributes[name] = given.get(full, tied[id(held)])
        return module(*(args if isinstance(args, tuple) else (args,)), **(kwargs or {}))
    finally:
        for attributes, name, held in replaced:
            attributes[name] = held


def _check_dict(given: Any, name: str) -> None:
    if not hasattr(given, "keys"):
        raise ValueError(f"{name}: a {type(given).__name__} was given, expected a dict")


def _in_the_place_of(tensor: Tensor, given: TensorLike, where: str) -> Tensor:
    """What was given, as a tensor of the shape and of the kind of dtype of another."""
    value = as_tensor(given, where, tensor.dtype)
    if value.shape != tensor.shape:
        raise ShapeError(f"{where} has shape {value.shape}, expected {tensor.shape}")
    if value.dtype.kind != tensor.dtype.kind:
        raise ValueError(f"{where} has dtype {value.dtype}, expected {tensor.dtype}")
    return value


HOLDERS = (Module, list, tuple, dict)  # what modules may stand in
NO_HOLDERS = {Tensor, int, float, bool, str, set, type(None), FunctionType}  # told quickly


def _modules_in(
    name: str, value: Any, kinds: tuple[Any, ...] = HOLDERS, around: tuple[int, ...] = ()
) -> list[tuple[str, Any]]:
    """The modules in an attribute, with their paths. Raises ValueError for parameters in lists, and
    for modules in sets, which have no order.

    ``around`` are the lists that this one stands in, one of which may be itself.
    """
    if isinstance(value, (set, frozenset)) and any(isinstance(item, Module) for item in value):
        raise ValueError(
            f"{name}: a set of modules was given, which would be neither trained nor saved; "
            "assign a list or a dict of them"
        )
    if not isinstance(value, (list, tuple, dict)):
        return [(name, value)] if isinstance(value, kinds) else []
    found: list[tuple[str, Any]] = []
    if id(value) not in around:
        around = (*around, id(value))
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(item, kinds):
                found += _modules_in(f"{name}.{key}", item, kinds, around)
            elif isinstance(item, Tensor) and item.requires_grad and item.is_leaf:
                raise ValueError(
                    f"{name}: a {type(value).__name__} holds a parameter, which would be neither "
                    "trained nor saved; assign each parameter to an attribute of its own"
                )
    return found


def parameter(values: TensorLike, dtype: DTypeLike | None = None) -> Tensor:
    """A parameter that starts from these values, float32 unless told otherwise.

    ``self.weight = nn.parameter(nn.init.orthogonal(4, 4))``: a tensor that requires a gradient and
    was not computed from others. Raises ValueError for a ``dtype`` that is not floating.
    """
    wanted = check_dtype(dtype or "float32")
    if wanted not in FLOATS:
        raise ValueError(f"dtype: {wanted} was given for parameters, expected a floating one")
    made = wrap(as_array(values, wanted, copy=True), None)
    made.requires_grad = True
    return made


def first_parameter(model: Any) -> Tensor | None:
    """The one whose dtype and device inputs are brought to; None for what has no parameters."""
    return next(model.parameters(), None) if isinstance(model, Module) else None


def called_with(model: Any) -> Signature:
    """What a module, or any other function, is called with."""
    return signature(model.forward if isinstance(model, Module) else model)


@contextmanager
def in_mode(model: Any, training: bool) -> Iterator[None]:
    """The model in one mode inside the block; then every module in the mode that it was in."""
    before = [(m, m.training) for m in model.modules()] if isinstance(model, Module) else []
    for module, _ in before:
        module.training = training
    try:
        yield
    finally:
        for module, was in before:
            module.training = was
