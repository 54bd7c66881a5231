"""An encoder and a decoder: from one sequence of symbols to another.

Imports the engine, recurrence, search, module, layers, recurrent, one_step and functional.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from tinygrad_seq import devices
from tinygrad_seq.creation import Rng, generator
from tinygrad_seq.elementwise import tanh
from tinygrad_seq.errors import ShapeError, whole
from tinygrad_seq.nn.functional import dot_attention
from tinygrad_seq.nn.layers import Dropout, Embedding, Linear
from tinygrad_seq.nn.module import Module, in_mode
from tinygrad_seq.nn.one_step import as_cell, cell_states
from tinygrad_seq.nn.recurrent import GRU, LSTM, RNN
from tinygrad_seq.recurrence import Stepper
from tinygrad_seq.search import Hypothesis, beam_search, largest
from tinygrad_seq.structural import concat
from tinygrad_seq.tape import no_grad
from tinygrad_seq.tensors import Tensor, array_of, host_array
from tinygrad_seq.trees import map_leaves

LAYERS: dict[str, Any] = {"rnn": RNN, "lstm": LSTM, "gru": GRU}


class Encoded(NamedTuple):
    """What a decoder starts from."""

    outputs: Tensor  # (S, B, H), of the encoder at each place
    there: np.ndarray  # (S, B), booleans: which places are no padding
    state: Any  # the encoder's last

    @property
    def mask(self) -> Any:
        """``there``, where the outputs are."""
        return devices.to_device(self.there, self.outputs.device)

    def repeated(self, b: int, count: int) -> Encoded:
        """Source b alone, so many times."""
        columns = [b] * count
        state = map_leaves(lambda leaf: leaf[:, columns], self.state)
        return Encoded(self.outputs[:, columns], self.there[:, columns], state)


class Seq2Seq(Module):
    """Encoder and decoder (Sutskever, Vinyals, Le 2014), with attention if asked (Luong 2015).

    The encoder, an embedding and recurrent layers, reads the source; the decoder, others of the
    same kind, starts from its last state and is given the target, shifted by one (teacher forcing),
    to predict its next symbol. With ``attention`` each output o_t = V tanh(W [h_t, c_t]) sees
    c_t = Σ_s a_ts e_s, e_s being the encoder's outputs and a = softmax(h_t · e_s).

    ``logits = model(source, target, lengths)``: source (S, B) and target (T, B), integers, the
    target beginning with a symbol of the start; lengths (B,) of the sources, None if all have S;
    logits (T, B, target_size). ``layer`` is rnn, lstm or gru. ``greedy`` and ``beam`` decode,
    ``hypotheses`` gives what a beam search finds with its scores. ``train.fit`` takes batches
    ``((source, target[:-1]), target[1:], lengths)``, such as those of ``data.Buckets``.
    """

    def __init__(
        self,
        source_size: int,
        target_size: int,
        hidden_size: int,
        *,
        embedding_size: int | None = None,
        layer: str = "lstm",
        num_layers: int = 1,
        attention: bool = True,
        dropout: float = 0.0,
        dtype: DTypeLike | None = None,
        rng: Rng = None,
    ) -> None:
        if layer not in LAYERS:
            raise ValueError(f"Seq2Seq: layer {layer!r} was given, expected rnn, lstm or gru")
        rng, H = generator(rng), whole(hidden_size, "hidden_size")
        E = H if embedding_size is None else whole(embedding_size, "embedding_size")
        more: dict[str, Any] = {"dtype": dtype, "rng": rng}
        self.source_embedding = Embedding(source_size, E, **more)
        self.target_embedding = Embedding(target_size, E, **more)
        between = dropout if whole(num_layers, "num_layers") > 1 else 0.0
        self.encoder = LAYERS[layer](E, H, num_layers, dropout=between, **more)
        self.decoder = LAYERS[layer](E, H, num_layers, dropout=between, **more)
        self.dropout = Dropout(dropout, rng=rng)
        self.combine = Linear(2 * H, H, **more) if attention else None
        self.output = Linear(H, target_size, **more)

    def forward(self, source: Any, target: Any, lengths: Any = None) -> Tensor:
        encoded = self.encode(source, lengths)
        return self.logits(self._decode(target, encoded), encoded)

    def _decode(self, target: Any, encoded: Encoded) -> Tensor:
        """The decoder's outputs (T, B, H), the target (T, B) being given to it."""
        given, B = array_of(target, "Seq2Seq: target").shape, encoded.there.shape[1]
        if len(given) != 2 or given[1] != B:
            raise ShapeError(
                f"Seq2Seq: target has shape {given}, expected (T, {B}), a column for each source"
            )
        hs: Tensor = self.decoder(self.dropout(self.target_embedding(target)), encoded.state)[0]
        return hs

    def encode(self, source: Any, lengths: Any = None) -> Encoded:
        """Read the sources (S, B)."""
        ids = _ids(source)
        if not len(ids):
            raise ShapeError(
                f"Seq2Seq: source has shape {ids.shape}, expected one step at least; give an empty "
                "source its closing symbol"
            )
        outputs, state = self.encoder(self.dropout(self.source_embedding(source)), lengths=lengths)
        there = np.ones(ids.shape, bool)
        if lengths is not None:
            there = np.arange(len(ids))[:, None] < host_array(lengths, "Seq2Seq: lengths")
        return Encoded(outputs, there, state)

    def logits(self, hs: Tensor, encoded: Encoded) -> Tensor:
        """Logits (T, B, V) from the decoder's outputs (T, B, H)."""
        if self.combine is not None:
            seen, _ = dot_attention(hs, encoded.outputs, mask=encoded.mask)
            hs = tanh(self.combine(concat([hs, seen], axis=-1)))
        logits: Tensor = self.output(self.dropout(hs))
        return logits

    def _check_symbols(self, start: int, end: int) -> None:
        size = len(self.target_embedding.weight)
        for name, symbol in {"start": start, "end": end}.items():
            if whole(symbol, f"Seq2Seq: {name}", least=0) >= size:
                raise ValueError(
                    f"Seq2Seq: {name} = {symbol} was given, expected a symbol from 0 to {size - 1}"
                )

    def attention(self, source: Any, target: Any, lengths: Any = None) -> Tensor:
        """Where each output looks, (T, B, S): the weights a_ts for a source and its target.

        Arguments are those of the call. Raises ValueError for a model without attention.
        """
        if self.combine is None:
            raise ValueError("Seq2Seq: the model has no attention, expected attention=True")
        encoded = self.encode(source, lengths)
        hs = self._decode(target, encoded)
        return dot_attention(hs, encoded.outputs, mask=encoded.mask)[1]

    def greedy(
        self, source: Any, lengths: Any = None, *, start: int, end: int, longest: int
    ) -> list[list[int]]:
        """For each source the likeliest symbol at every step, up to ``end`` or so many."""
        self._check_symbols(start, end)
        if not _ids(source).shape[1]:
            return []
        with in_mode(self, training=False), no_grad():
            encoded = self.encode(source, lengths)
            steps = _Steps(self, encoded)
            B = encoded.there.shape[1]
            ids, done = np.full(B, start), np.zeros(B, bool)
            made: list[list[int]] = [[] for _ in range(B)]
            for n in range(whole(longest, "greedy: longest")):
                logits = steps(ids)
                largest(logits[~done], n, "greedy")
                ids = logits.argmax(axis=-1)
                done |= ids == end
                if done.all():
                    break
                for b in np.flatnonzero(~done):
                    made[b].append(int(ids[b]))
        return made

    def beam(
        self,
        source: Any,
        lengths: Any = None,
        *,
        start: int,
        end: int,
        longest: int,
        width: int = 4,
        length_penalty: float = 0.0,
    ) -> list[list[int]]:
        """For each source the best of ``hypotheses``, whose arguments these are: its ids."""
        found = self.hypotheses(
            source,
            lengths,
            start=start,
            end=end,
            longest=longest,
            width=width,
            length_penalty=length_penalty,
        )
        return [each[0].ids for each in found]

    def hypotheses(
        self,
        source: Any,
        lengths: Any = None,
        *,
        start: int,
        end: int,
        longest: int,
        width: int = 4,
        length_penalty: float = 0.0,
    ) -> list[list[Hypothesis]]:
        """For each source what ``tgs.beam_search`` finds, the best first, with scores.

        ``source`` (S, B) of integers, ``lengths`` (B,). Up to ``width`` hypotheses each, with
        ``.ids``, up to ``longest`` of them, ``.score``, the log-probability of the ids and of the
        end in nats, divided by (length)^length_penalty, and ``.ended``. Raises ShapeError for a
        source of another shape, ValueError for unknown symbols and for a width or a length below 1.
        """
        self._check_symbols(start, end)
        ids, width = _ids(host_array(source, "Seq2Seq: source")), whole(width, "beam: width")
        made = []
        with in_mode(self, training=False), no_grad():
            encoded = self.encode(ids, lengths)
            for b in range(ids.shape[1]):
                steps = _Steps(self, encoded.repeated(b, width))
                found = beam_search(
                    steps.from_state,
                    steps.state,
                    start=start,
                    end=end,
                    width=width,
                    longest=longest,
                    length_penalty=length_penalty,
                )
                made.append(found)
        return made


def _ids(source: Any) -> Any:
    """The symbols of the sources, an array (S, B)."""
    ids = array_of(source, "Seq2Seq: source")
    if ids.ndim != 2:
        raise ShapeError(f"Seq2Seq: source has shape {ids.shape}, expected (S, B)")
    return ids


class _Steps:
    """The decoder one step at a time: logits (B, V) from symbols (B,)."""

    def __init__(self, model: Seq2Seq, encoded: Encoded) -> None:
        self.model, self.encoded = model, encoded
        self.table = model.target_embedding.weight.numpy()
        states = cell_states(model.decoder, encoded.state)
        first = np.zeros((encoded.there.shape[1], self.table.shape[1]), self.table.dtype)
        self.stepper = Stepper(as_cell(model.decoder), first, states)

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        hs = self.stepper(self.table[ids])
        logits = self.model.logits(hs.reshape(1, *hs.shape), self.encoded)
        found: np.ndarray = logits.numpy()[0]
        return found

    @property
    def state(self) -> Any:
        return map_leaves(lambda leaf: leaf.numpy(), self.stepper.state)

    def from_state(self, ids: np.ndarray, state: Any) -> tuple[np.ndarray, Any]:
        self.stepper.state = state
        return self(ids), self.state
