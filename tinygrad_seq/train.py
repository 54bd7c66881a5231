"""The training loop: ``fit``, ``evaluate``, ``predict`` and the history.

The same four steps stand open in examples/four_steps.py. Imports nn, optim and truncation.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from tinygrad_seq.errors import ShapeError, called, positive, whole
from tinygrad_seq.nn.module import Module, first_parameter, in_mode
from tinygrad_seq.optim import Optimizer, Schedule, clip_grad_norm_
from tinygrad_seq.tape import no_grad
from tinygrad_seq.tensors import FLOATS, Tensor, as_tensor, host_array
from tinygrad_seq.transforms import detach
from tinygrad_seq.trees import leaves, map_arrays
from tinygrad_seq.truncation import (
    LOSS,
    MODEL,
    Block,
    arguments,
    bind,
    check_forward,
    check_time_first,
    run_with_state,
    tbptt,
)

__all__ = ["Block", "History", "evaluate", "fit", "predict", "tbptt"]
Loss = Callable[[Any, Any], Tensor]
Metric = Callable[[Any, Any], Any]


@dataclass
class History:
    """What happened, one entry an epoch: also as ``history["loss"]``.

    ``validation`` is empty without validation batches, ``norm`` (the mean norm of the gradient
    before clipping) without ``clip_norm``. ``metrics["accuracy"]`` has the metric of that name on
    the training batches, ``validation_metrics["accuracy"]`` on those of validation. Epochs are
    counted from 0, in ``best_epoch`` too.
    """

    loss: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    norm: list[float] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    validation_metrics: dict[str, list[float]] = field(default_factory=dict)
    best_epoch: int | None = None  # counted from 0, by validation loss, else by training loss
    stopped_early: bool = False
    interrupted: bool = False

    def __getitem__(self, name: str) -> Any:
        if name not in (known := list(self.__dataclass_fields__)):
            raise ValueError(f"history: {name!r} was asked for, expected one of {known}")
        return getattr(self, name)

    def __len__(self) -> int:
        return len(self.loss)


def fit(
    model: Any,
    batches: Iterable[Any],
    loss: Loss,
    optimizer: Optimizer,
    *,
    epochs: int,
    clip_norm: float | None = None,
    tbptt: tuple[int, int] | None = None,
    carry_state: bool = False,
    validation: Iterable[Any] | None = None,
    metrics: Mapping[str, Metric] | None = None,
    patience: int | None = None,
    schedule: Schedule | None = None,
    progress: bool | str = True,
) -> History:
    """Train ``model``: for each batch forward, ``loss(prediction, targets)``, backward, update.

    ``batches`` is iterated once an epoch and yields ``(inputs, targets)``, for ``model(inputs)``,
    or ``(inputs, targets, lengths)``, for ``model(inputs, lengths=lengths)``. A tuple of inputs is
    as many arguments, ``model(source, given)`` for ``((source, given), targets)``; a dict or a
    named tuple is one. Arrays become tensors, floating ones in the dtype of the model's parameters,
    and all are moved to where these are; lengths stay on the host. ``clip_norm`` bounds the norm of
    the gradient. ``validation`` are batches to measure on after each epoch, in ``eval`` mode. With
    ``patience`` training stops when the validation loss (without validation, the training loss)
    has not improved for that many epochs, and the best weights are put back. ``schedule.step()`` is
    called after each epoch. Epoch losses are means over batches, weighted by how many targets each
    has, padding left out where lengths are given and the targets have the shape (T, B) of the first
    input.

    ``metrics={"accuracy": nn.functional.accuracy}`` are functions of (prediction, targets), as the
    loss is, that give one number to look at. Like the loss it is averaged over the batches of an
    epoch, those of training as they were trained on, before each update, and those of validation;
    the progress bar shows it and the history has it.

    ``tbptt=(k1, k2)`` trains by truncated backpropagation through time, as ``train.tbptt`` says: an
    update every k1 steps, before which the error has gone back over k2 steps at most. With
    ``carry_state`` a batch goes on from the state that the one before it ended with, off the tape;
    each epoch begins anew. Either takes inputs (T, B, ...), steps first, and a model that has
    ``with_state(x, state)`` (``nn.Sequential``) or returns (prediction, state) from
    ``model(x, state)``.

    ``progress`` shows a bar; a text is its label.

    Ctrl-C ends training and returns the history so far, with ``interrupted`` set. A loss or a
    clipped gradient that is not finite raises ValueError before it reaches the weights; so does a
    validation loss that is not finite, after its epoch. To see that, each update waits for a GPU
    once, for its loss, once more for the norm if it is clipped, and once for each metric.
    """
    _check_given("fit", model, batches=batches, validation=() if validation is None else validation)
    epochs = whole(epochs, "fit: epochs", least=0)
    if patience is not None:
        patience = whole(patience, "fit: patience")
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"fit: optimizer is {optimizer!r:.60}, expected an optim.Optimizer")
    if not isinstance(schedule, Schedule | None):
        raise ValueError(f"fit: schedule is {schedule!r:.60}, expected an optim.Schedule")
    if schedule is not None and schedule.optimizer is not optimizer:
        raise ValueError("fit: the schedule is that of another optimiser, expected this one's")
    if clip_norm is not None:
        clip_norm = positive(clip_norm, "fit: clip_norm")
    blocks = None
    if tbptt is not None:
        if not isinstance(tbptt, (tuple, list)) or len(tbptt) != 2:
            raise ValueError(f"fit: tbptt is {tbptt!r}, expected a pair (k1, k2) of steps")
        blocks = whole(tbptt[0], "fit: tbptt k1"), whole(tbptt[1], "fit: tbptt k2")
    if blocks is not None or carry_state:
        check_forward(model, "fit")
    if blocks is not None:
        check_time_first(model, "fit: tbptt")
    how = _How(_Measured(loss, metrics, "fit"), blocks, carry_state)
    history, best = History(), _Best(model if patience is not None else None)
    bar = _progress_bar(epochs, progress if isinstance(progress, str) else "") if progress else None
    try:
        for epoch in range(epochs):
            with in_mode(model, training=True):
                _train_epoch(model, batches, how, optimizer, clip_norm, history, epoch)
            if validation is not None:
                found = _evaluate(model, validation, how, "fit: validation")
                how.note(found, history.validation, history.validation_metrics)
                if not math.isfinite(history.validation[-1]):
                    raise ValueError(
                        f"fit: epoch {epoch}: the validation loss is {history.validation[-1]}. "
                        "Look for NaN in the validation data, or lower the learning rate"
                    )
            if schedule is not None:
                schedule.step()
            watched = history.validation or history.loss
            if best.improved(watched[-1]):
                history.best_epoch = epoch
            if bar is not None:
                bar.report(history)
            if patience is not None and epoch - (history.best_epoch or 0) >= patience:
                history.stopped_early = True
                break
    except KeyboardInterrupt:
        history.interrupted = True
    finally:
        best.restore()
        if bar is not None:
            bar.close()
    return history


def evaluate(
    model: Any, batches: Iterable[Any], loss: Metric, *, carry_state: bool = False
) -> float:
    """The mean loss over batches in ``eval`` mode, without recording.

    The loss may be any function of (prediction, targets) that gives a number, such as a metric.
    Batches, their inputs and ``carry_state`` are as in ``fit``.
    """
    _check_given("evaluate", model, batches=batches)
    if carry_state:
        check_forward(model, "evaluate")
    how = _How(_Measured(loss, None, "evaluate"), None, carry_state)
    return _evaluate(model, batches, how, "evaluate")[0]


def _evaluate(model: Any, batches: Iterable[Any], how: _How, caller: str) -> list[float]:
    """The mean loss, and the mean of each metric."""
    mean, state = _Mean(), None
    with in_mode(model, training=False), no_grad():
        for batch in batches:
            given = _checked(model, batch, caller)
            prediction, after = _forward(model, given, how, state, caller)
            state = after if how.carry_state else None
            value = _loss_of(prediction, given, how, "carry_state=True")
            number = _number(value, f"{caller}: the loss")
            mean.add([number, *how.loss.numbers], given.size)
    return mean.value(f"{caller}: the batches")


def predict(model: Any, inputs: Any, lengths: Any = None, **more: Any) -> Any:
    """What the model makes of ``inputs`` in ``eval`` mode, without recording.

    ``lengths`` and ``more`` are passed on to the model: ``predict(layer, x, state=state)``. A tuple
    of inputs is as many arguments. Arrays become tensors, floating ones in the dtype of the model's
    parameters, and go to where these are, as in ``fit``.
    """
    _check_given("predict", model)
    with in_mode(model, training=False), no_grad():
        given = _as_tensors(inputs, model, "predict")
        more = more if lengths is None else {**more, "lengths": lengths}
        return _called(model, given, more, "predict")


def _check_given(caller: str, model: Any, **batches: Any) -> None:
    """Raise a ValueError for what is no model, and for batches that cannot be iterated."""
    called(model, f"{caller}: model", MODEL)
    for name, given in batches.items():
        if not isinstance(given, Iterable):
            raise ValueError(
                f"{caller}: {name}: {given!r:.60} was given, expected a list of (inputs, targets) "
                "or data.Batches"
            )


class _Measured:
    """The loss, which also measures what it is called with: ``tbptt`` calls it, block by block."""

    def __init__(self, loss: Metric, metrics: Mapping[str, Metric] | None, caller: str) -> None:
        metrics = {} if metrics is None else metrics
        if not isinstance(metrics, Mapping) or not all(map(callable, metrics.values())):
            raise ValueError(
                f"fit: metrics is {metrics!r:.60}, expected a dict of functions of (prediction, "
                'targets), such as {"accuracy": nn.functional.accuracy}'
            )
        self.loss, self.metrics = called(loss, f"{caller}: loss", LOSS), dict(metrics)
        self.numbers: list[float] = []  # of the last call, one for each metric

    def __call__(self, prediction: Any, targets: Any) -> Any:
        with no_grad():
            self.numbers = [
                _number(metric(prediction, targets), f"fit: the metric {name!r}")
                for name, metric in self.metrics.items()
            ]
        return self.loss(prediction, targets)


class _How(NamedTuple):
    """How a model is run over a batch."""

    loss: _Measured
    blocks: tuple[int, int] | None  # k1 and k2 of truncated backpropagation
    carry_state: bool

    @property
    def with_state(self) -> bool:
        return self.blocks is not None or self.carry_state

    def note(
        self, found: list[float], losses: list[float], metrics: dict[str, list[float]]
    ) -> None:
        """Put what an epoch gave into the history."""
        losses.append(found[0])
        for name, number in zip(self.loss.metrics, found[1:], strict=True):
            metrics.setdefault(name, []).append(number)


class _Batch(NamedTuple):
    inputs: Any
    targets: Any
    lengths: Any
    size: int  # how many targets there are


def _train_epoch(
    model: Any,
    batches: Iterable[Any],
    how: _How,
    optimizer: Optimizer,
    clip_norm: float | None,
    history: History,
    epoch: int,
) -> None:
    mean, norms, state = _Mean(), [], None
    for k, batch in enumerate(batches):
        where = f"fit: epoch {epoch}, batch {k}"
        optimizer.zero_grad()
        for number, size, after in _gradients(model, batch, how, state, where):
            if clip_norm is not None:
                norms.append(float(clip_grad_norm_(optimizer.parameters(), clip_norm)))
                if not math.isfinite(norms[-1]):
                    raise ValueError(
                        f"{where}: the norm of the gradient is {norms[-1]}; this batch has not "
                        "touched the weights. Lower the learning rate or shorten the sequences; "
                        "tgs.find_nan says in which step and line a NaN began"
                    )
            optimizer.step()
            optimizer.zero_grad()
            mean.add([number, *how.loss.numbers], size)
            state = after if how.carry_state else None
    found = mean.value(f"fit: in epoch {epoch} the batches")
    how.note(found, history.loss, history.metrics)
    if norms:
        history.norm.append(sum(norms) / len(norms))


def _gradients(
    model: Any, batch: Any, how: _How, state: Any, where: str
) -> Iterator[tuple[float, int, Any]]:
    """Loss, number of targets and state for each update, whose gradients are in the parameters."""
    given = _checked(model, batch, "fit")
    if how.blocks is not None:
        with _carrying(state):
            steps = tbptt(
                *(model, given.inputs, given.targets, how.loss, *how.blocks),
                state=state,
                lengths=given.lengths,
            )
            for block in steps:
                yield block.loss, block.size, block.state
        return
    prediction, after = _forward(model, given, how, state, "fit")
    value = _loss_of(prediction, given, how, "carry_state=True or tbptt=(k1, k2)")
    if not isinstance(value, Tensor):
        raise ValueError(
            f"fit: the loss returned a {type(value).__name__}, expected one number as a tensor, "
            "such as those of nn.functional"
        )
    number = _number(value, "fit: the loss")
    if not math.isfinite(number):
        raise ValueError(
            f"{where}: the loss is {number}; this batch has not touched the weights. Look for NaN "
            "in the data, lower the learning rate, or pass clip_norm=; tgs.find_nan says in which "
            "step and line a NaN began"
        )
    value.backward()
    yield number, given.size, detach(after) if how.carry_state else None


def _loss_of(prediction: Any, batch: _Batch, how: _How, carrying: str) -> Any:
    """The loss; its errors say, where the model returned a tuple, which arguments carry a state."""
    try:
        return how.loss(prediction, batch.targets)
    except ValueError as error:
        if type(prediction) is not tuple:
            raise
        raise ValueError(
            f"{error}; the model returned a tuple of {len(prediction)}, all of which the loss got: "
            f"if it is (prediction, state), pass {carrying}"
        ) from error


def _checked(model: Any, batch: Any, caller: str) -> _Batch:
    """A batch as tensors."""
    if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
        found = len(batch) if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise ValueError(
            f"{caller}: a batch of {found} was given, expected (inputs, targets) or "
            "(inputs, targets, lengths); data.Batches(inputs, targets, batch_size=32) cuts arrays "
            "into such"
        )
    inputs, targets = _as_tensors(batch[0], model, caller), _as_tensors(batch[1], model, caller)
    size = sum(t.size for t in leaves(targets))
    if len(batch) == 2 or batch[2] is None:
        return _Batch(inputs, targets, None, size)
    lengths = host_array(batch[2], f"{caller}: lengths")
    if lengths.size and lengths.dtype.kind not in "iu":
        raise ValueError(f"{caller}: lengths has dtype {lengths.dtype}, expected integers")
    steps_and_rows = [x.shape[:2] for x in leaves(inputs)]  # of several inputs any may be meant
    if len(steps_and_rows) == 1 and any(t.shape[:2] in steps_and_rows for t in leaves(targets)):
        size = int(lengths.sum())
    return _Batch(inputs, targets, lengths, size)


def _forward(model: Any, batch: _Batch, how: _How, state: Any, caller: str) -> tuple[Any, Any]:
    """The prediction, and the state after it if the model is run with one."""
    if how.with_state:
        with _carrying(state):
            return run_with_state(model, batch.inputs, state, batch.lengths, caller)
    more = {} if batch.lengths is None else {"lengths": batch.lengths}
    return _called(model, batch.inputs, more, caller), None


@contextmanager
def _carrying(state: Any) -> Iterator[None]:
    """Errors in shapes say where the state came from, if it is that of the batch before."""
    try:
        yield
    except ShapeError as error:
        if state is None:
            raise
        raise ShapeError(
            f"{error}; with carry_state=True the state is that of the batch before, expected one "
            "of as many rows: drop_last=True of data.Batches leaves out a smaller last one"
        ) from error


def _called(model: Any, inputs: Any, more: dict[str, Any], caller: str) -> Any:
    """What the model makes of its inputs."""
    given = arguments(inputs)
    if given is inputs or more:  # one input alone fits any model
        try:
            lengths = bind(model, given, more).get("lengths")
            # The last of several inputs may have got into the place of the lengths.
            if isinstance(lengths, Tensor) and (lengths.dtype in FLOATS or lengths.ndim != 1):
                raise TypeError(f"an input of shape {lengths.shape} would be its lengths")
        except TypeError as error:
            what, hint = "one input", "leave out what it does not take"
            if given is inputs:
                what = f"a tuple of {len(given)} inputs"
                hint = "such a tuple is as many arguments, a dict or a named tuple is one"
            names = "".join(f" and {name}=..." for name in more)
            raise ValueError(
                f"{caller}: the model {type(model).__name__} cannot be called with {what}{names}: "
                f"{error}; {hint}"
            ) from None
    return model(*given, **more)


def _as_tensors(values: Any, model: Any, caller: str) -> Any:
    """Arrays and lists of numbers as tensors, in the dtype and on the device of the parameters.

    Tuples and dicts are structures of them.
    """
    like = first_parameter(model)

    def made(array: Any) -> Tensor:
        tensor = as_tensor(array, f"{caller}: batch", None if like is None else like.dtype)
        if like is None:
            return tensor
        return (tensor.to(like.dtype) if tensor.dtype in FLOATS else tensor).to(like.device)

    return map_arrays(made, values)


def _number(value: Any, what: str) -> float:
    """One number, as a tensor or an array or plainly."""
    found = as_tensor(value, what, np.dtype("float64"))
    if found.size != 1:
        raise ValueError(f"{what} returned shape {found.shape}, expected one number")
    return float(found.item())


class _Mean:
    """Means over batches of different weights."""

    def __init__(self) -> None:
        self.total, self.weight = np.zeros(1), 0

    def add(self, values: list[float], weight: int) -> None:
        self.total = self.total + np.multiply(values, weight)
        self.weight += weight

    def value(self, what: str) -> list[float]:
        if not self.weight:
            raise ValueError(
                f"{what} gave no examples; an iterator can be passed only once, and data.Batches "
                "of no examples, or of fewer than a batch with drop_last, are none: give a list or "
                "data.Batches of some"
            )
        found: list[float] = (self.total / self.weight).tolist()
        return found


class _Best:
    """The smallest value so far, and the model's weights when it was reached."""

    def __init__(self, model: Any) -> None:
        self.model = model if isinstance(model, Module) else None
        self.value = math.inf
        self.state: dict[str, Tensor] | None = None

    def improved(self, value: float) -> bool:
        if not value < self.value:
            return False
        self.value = value
        self.state = None if self.model is None else self.model.state_dict()
        return True

    def restore(self) -> None:
        if self.model is not None and self.state is not None:
            self.model.load_state_dict(self.state)


class _Lines:
    """Progress without tqdm: a line an epoch."""

    def __init__(self, epochs: int, label: str) -> None:
        self.epochs, self.label = epochs, f"{label}: " if label else ""
        print("fit: a line an epoch; pip install tqdm for a progress bar", file=sys.stderr)

    def report(self, history: History) -> None:
        text = ", ".join(f"{name} {value}" for name, value in _shown(history).items())
        print(f"{self.label}epoch {len(history)}/{self.epochs}: {text}", file=sys.stderr)

    def close(self) -> None: ...


class _Bar:
    """Progress with tqdm."""

    def __init__(self, tqdm: Any, epochs: int, label: str) -> None:
        self.bar = tqdm(total=epochs, unit="epoch", desc=label or None)

    def report(self, history: History) -> None:
        self.bar.set_postfix(_shown(history))
        self.bar.update()

    def close(self) -> None:
        self.bar.close()


def _shown(history: History) -> dict[str, str]:
    columns = {"loss": history.loss, **history.metrics}
    if history.validation:
        columns["validation"] = history.validation
    columns |= {f"validation {k}": column for k, column in history.validation_metrics.items()}
    return {name: f"{column[-1]:.4g}" for name, column in columns.items()}


def _progress_bar(epochs: int, label: str) -> _Bar | _Lines:
    try:
        from tqdm import tqdm
    except ImportError:
        return _Lines(epochs, label)
    return _Bar(tqdm, epochs, label)
