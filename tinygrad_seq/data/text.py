"""Text as integers: vocabularies, and one long text as parallel streams.

Imports errors and sequences.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from tinygrad_seq.data.sequences import as_series, as_values, several
from tinygrad_seq.errors import ShapeError, whole

_SEPARATORS = {"characters": "", "tokens": " "}
_ROLES = ("padding", "start", "end", "unknown")


@dataclass(frozen=True, repr=False)
class Vocabulary:
    """Symbols, characters or tokens, and an integer for each: its place in ``symbols``.

    ``Vocabulary.of_characters(text)`` and ``Vocabulary.of_tokens(texts)`` build one. Of the
    special symbols ``padding``, ``start``, ``end`` and ``unknown`` those that were asked for come
    first, in this order, so that padding is 0; the attributes of these names are their integers,
    or None. A text with both its ends is ``[v.start, *v.encode(text), v.end]``.

    ``len(v)`` is the size that an embedding needs, ``symbol in v`` says whether it is known.
    """

    symbols: tuple[str, ...]
    kind: str = "characters"  # or "tokens"
    padding: int | None = None
    start: int | None = None
    end: int | None = None
    unknown: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in _SEPARATORS:
            raise ValueError(
                f"Vocabulary: kind {self.kind!r} was given, expected one of {list(_SEPARATORS)}"
            )
        if not self.symbols:
            raise ValueError("Vocabulary: no symbols were given, expected at least one")
        for symbol, times in Counter(self.symbols).items():
            if not isinstance(symbol, str) or not symbol or times > 1:
                raise ValueError(
                    f"Vocabulary: symbol {symbol!r} was given {times} times, expected texts that "
                    "are not empty, each once"
                )
        for role in _ROLES:
            at = getattr(self, role)
            if at is not None and whole(at, f"Vocabulary: {role}", least=0) >= len(self):
                raise ValueError(
                    f"Vocabulary: {role} = {at} was given, expected 0 to {len(self) - 1}"
                )

    @classmethod
    def of_characters(
        cls,
        texts: str | Iterable[str],
        *,
        padding: str | None = None,
        start: str | None = None,
        end: str | None = None,
        unknown: str | None = None,
    ) -> Vocabulary:
        """The characters of a text, or of several, in the order of Unicode.

        A special symbol may be of several characters, ``padding="<padding>"``. One that the texts
        hold themselves, such as a line break for ``end``, is one symbol with them. Raises
        ValueError for texts without a character, and for a padding that they hold.
        """
        found: set[str] = set()
        given = [texts] if isinstance(texts, str) else texts
        for text in several(given, "Vocabulary.of_characters", "a text or several"):
            if not isinstance(text, str):
                raise ValueError(
                    f"Vocabulary.of_characters: a {type(text).__name__} was given among the texts, "
                    "expected a str; of_tokens takes lists of tokens"
                )
            found.update(text)
        special = {"padding": padding, "start": start, "end": end, "unknown": unknown}
        return cls._built("characters", sorted(found), special)

    @classmethod
    def of_tokens(
        cls,
        texts: str | Iterable[str | Sequence[str]],
        *,
        minimum_count: int = 1,
        padding: str | None = None,
        start: str | None = None,
        end: str | None = None,
        unknown: str | None = None,
    ) -> Vocabulary:
        """The tokens of a text, or of several, the frequent ones first.

        A text is a str, which is split at white space, or a list of tokens. Tokens found fewer
        than ``minimum_count`` times are left out; they become ``unknown`` when encoded. Equally
        frequent ones are in the order of Unicode. Raises ValueError if no token is left, and for
        a padding that the texts hold.
        """
        minimum_count = whole(minimum_count, "Vocabulary.of_tokens: minimum_count")
        counts: Counter[str] = Counter()
        given = [texts] if isinstance(texts, str) else texts
        what = "Vocabulary.of_tokens", "a str or a list of tokens for each text"
        for text in several(given, *what):
            counts.update(text.split() if isinstance(text, str) else several(text, *what))
        ranked = sorted(counts, key=lambda token: (-counts[token], token))
        found = [token for token in ranked if counts[token] >= minimum_count]
        special = {"padding": padding, "start": start, "end": end, "unknown": unknown}
        return cls._built("tokens", found, special)

    @classmethod
    def _built(cls, kind: str, found: list[str], special: dict[str, str | None]) -> Vocabulary:
        if not found:
            raise ValueError(
                f"Vocabulary.of_{kind}: the text is empty, or no symbol is frequent enough; "
                f"expected {kind}"
            )
        names = {role: symbol for role, symbol in special.items() if symbol is not None}
        if len(set(names.values())) < len(names):
            raise ValueError(
                f"Vocabulary.of_{kind}: special symbols {names} were given, expected different ones"
            )
        if special["padding"] in found:
            raise ValueError(
                f"Vocabulary.of_{kind}: padding {special['padding']!r} was given, which the text "
                "holds; choose a symbol that it does not"
            )
        first = tuple(names.values())
        rest = tuple(symbol for symbol in found if symbol not in first)
        return cls((*first, *rest), kind, **{role: first.index(s) for role, s in names.items()})

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {symbol: k for k, symbol in enumerate(self.symbols)}

    def __len__(self) -> int:
        return len(self.symbols)

    def __contains__(self, symbol: object) -> bool:
        return symbol in self._ids

    def __repr__(self) -> str:
        return f"<Vocabulary of {len(self)} {self.kind}, fingerprint {self.fingerprint}>"

    def encode(self, text: str | Sequence[str]) -> np.ndarray:
        """The integers (L,) of a text, cut as the vocabulary was, or of a list of symbols.

        A symbol that is not known becomes ``unknown``; without one it raises ValueError.
        """
        given = several(text, "encode", "a text or a list of symbols")
        symbols = given.split() if isinstance(text, str) and self.kind == "tokens" else list(given)
        ids = [self._ids.get(s, self.unknown) if isinstance(s, str) else None for s in symbols]
        for place, (symbol, k) in enumerate(zip(symbols, ids, strict=True)):
            if k is None:
                raise ValueError(
                    f"encode: {symbol!r} was given at place {place}, counted from 0, which is "
                    f"not among the vocabulary's {len(self)} {self.kind}; build it from texts that "
                    'hold all, or with unknown="<unknown>"'
                )
        return np.array(ids, np.int64)

    def decode(self, ids: ArrayLike) -> str:
        """The text of integers (L,): what stands before the first ``end``, if there is one.

        Padding and start are left out; tokens are joined by spaces. To see every symbol:
        ``[v.symbols[k] for k in ids]``.
        """
        given = as_values(ids, "decode")
        if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
            raise ShapeError(
                f"decode: ids of shape {given.shape} and dtype {given.dtype} were given, expected "
                "integers (L,); take one column of (T, B), and argmax of logits"
            )
        outside = np.flatnonzero((given < 0) | (given >= len(self)))
        if outside.size:
            raise ValueError(
                f"decode: id {given[outside[0]]} was given at place {outside[0]}, expected 0 to "
                f"{len(self) - 1}; use the vocabulary that the model was trained with"
            )
        symbols = []
        for k in given.tolist():
            if k == self.end:
                break
            if k not in (self.padding, self.start):
                symbols.append(self.symbols[k])
        return _SEPARATORS[self.kind].join(symbols)

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that differ if a symbol, its place or its role does."""
        import hashlib  # seldom needed, and slow to import
        import json

        text = json.dumps([self.kind, self.symbols, *(getattr(self, role) for role in _ROLES)])
        return hashlib.sha256(text.encode("ascii")).hexdigest()[:16]

    def check(self, size: int, fingerprint: str | None = None) -> None:
        """Raise ValueError if a model of ``size`` symbols was not trained with this vocabulary.

        ``size`` is how many its embedding or its last layer has, ``v.check(len(weight))``.
        ``fingerprint`` is that of the vocabulary that the model was trained with, if it was kept.
        """
        if size != len(self):
            raise ValueError(
                f"Vocabulary: it has {len(self)} symbols and the model's embedding {size}, "
                "expected as many; use the vocabulary that the model was trained with"
            )
        if fingerprint is not None and fingerprint != self.fingerprint:
            raise ValueError(
                f"Vocabulary: its fingerprint is {self.fingerprint} and the model's {fingerprint}, "
                f"though both have {size} symbols; use the vocabulary that the model was trained "
                "with"
            )

    def state(self) -> dict[str, Any]:
        """All there is to know as a dict that ``json.dump`` takes; ``from_state`` reads it."""
        return {
            **asdict(self),
            "symbols": list(self.symbols),
            "fingerprint": self.fingerprint,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Vocabulary:
        """The vocabulary whose ``state`` this is. Raises ValueError if it was changed since."""
        expected = ["symbols", "kind", *_ROLES, "fingerprint"]
        if not isinstance(state, Mapping):
            raise ValueError(
                f"Vocabulary.from_state: a {type(state).__name__} was given, expected the dict "
                "that state() gave"
            )
        if set(state) != set(expected):
            raise ValueError(
                f"Vocabulary.from_state: keys {list(state)} were given, expected {expected}"
            )
        symbols = several(state["symbols"], "Vocabulary.from_state: symbols", "a list of them")
        given = {**state, "symbols": tuple(symbols)}
        kept = given.pop("fingerprint")
        made = cls(**given)
        if made.fingerprint != kept:
            raise ValueError(
                f"Vocabulary.from_state: the fingerprint kept is {kept} and that of the symbols "
                f"{made.fingerprint}; the state was changed since it was saved, use the original"
            )
        return made


class Streams:
    """One long series as ``batch_size`` streams side by side, in windows that continue each other.

    ``for inputs, targets in Streams(ids, batch_size=32, length=50)``: inputs (length, B, ...) and
    the values one step later, targets of the same shape. Row b of a window goes on where row b of
    the window before it ended, so that the state may be carried over, and starts anew only with a
    pass. The last window may be shorter. ``series`` (N, ...) is an encoded text, or measurements.

    ``streams.inputs`` and ``streams.targets`` (T, B, ...) are the whole, T = (N − 1) // B; the
    remainder, fewer than B values at the end, is left out. All are read-only.
    """

    def __init__(self, series: ArrayLike, *, batch_size: int, length: int) -> None:
        values = as_series(series, "Streams")
        batch_size = whole(batch_size, "Streams: batch_size")
        self.length = whole(length, "Streams: length")
        steps = max(len(values) - 1, 0) // batch_size
        if steps < self.length:
            raise ValueError(
                f"Streams: a series of {len(values)} makes {batch_size} streams of {steps} steps, "
                f"too few for windows of {length}; expected at least {batch_size * length + 1} "
                "values"
            )
        self.inputs = _side_by_side(values[:-1], steps, batch_size)
        self.targets = _side_by_side(values[1:], steps, batch_size)

    def __len__(self) -> int:
        """How many windows a pass has."""
        return -(-len(self.inputs) // self.length)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for k in range(0, len(self.inputs), self.length):
            yield self.inputs[k : k + self.length], self.targets[k : k + self.length]


def _side_by_side(values: np.ndarray, steps: int, batch_size: int) -> np.ndarray:
    """(N, ...) as (steps, batch_size, ...), read-only: the first column is the first stream."""
    rows = values[: steps * batch_size].reshape(batch_size, steps, *values.shape[1:])
    made = rows.swapaxes(0, 1).copy()
    made.flags.writeable = False
    return made
