"""From dates as people write them to ISO 8601: an encoder, a decoder and attention.

    python examples/written_dates.py

"Sunday, May 3rd, 1987" becomes "1987-05-03". One LSTM reads what is written, character by
character; another writes the date, starting from the state that the first ended with, and looks
back at each step at what was read (``nn.Seq2Seq``). Who writes one day of the 200 years at random
is right once in 73,049 times.

In training the decoder is given the right date so far and learns to continue it, whatever it would
have written itself: teacher forcing. In use it is given its own characters: at each step the
likeliest one (greedy), or several beginnings are followed up at once (beam search).

Printed are, for days that were not trained on in any form, how many dates are right in all ten
characters, a few of those that are wrong, and greedy and beam search side by side. Greedy search
has 99.7 % right with seed 0 and 99.9 % with seed 1, and beam search hardly more: two of the three
that greedy has wrong with seed 0. With --dates 3000 --epochs 3 it has 92.5 % to 90.0 %, of 200.

The picture shows where the decoder looks when it writes each character of one date, which is yours
with --date "...".
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import tinygrad_seq as tgs
from tinygrad_seq import data, nn, optim

LONGEST = 12  # what is decoded at most
Ids = list[np.ndarray]


def train(
    model: nn.Seq2Seq, sources: Ids, targets: Ids, padding: int, epochs: int, seed: int
) -> None:
    """``targets`` begin with the symbol of the start and end with that of the end."""
    # Teacher forcing: the decoder is given the right symbols up to one and says the next. Sources
    # of about the same length come in one batch; their lengths keep padding from the encoder and
    # from attention, the mask keeps that of targets from the loss.
    given, wanted = [ids[:-1] for ids in targets], [ids[1:] for ids in targets]
    bucketed = partial(data.Buckets, (sources, given), wanted, batch_size=64, rng=seed)
    batches, apart = (bucketed(per_step=True, target_value=padding, pool=pool) for pool in (20, 1))
    print(f"padding: {padded(batches):.1%} of what is read, {padded(apart):.1%} without buckets")

    def loss(logits: tgs.Tensor, wanted: tgs.Tensor) -> tgs.Tensor:
        return nn.functional.cross_entropy(logits, wanted, mask=wanted != padding)

    optimizer = optim.Adam(model.parameters(), lr=0.005)
    schedule = optim.CosineAnnealingLR(optimizer, epochs, 0.05)
    tgs.train.fit(
        *(model, batches, loss, optimizer), epochs=epochs, clip_norm=1.0, schedule=schedule
    )


def padded(batches: data.Buckets) -> float:
    """The share of padding in what one pass reads."""
    sizes = [(source.size, lengths.sum()) for (source, _), _, lengths in batches]
    size, used = np.sum(sizes, axis=0)
    return float(1 - used / size)


def picture(weights: np.ndarray, source: str, target: str, path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print('no picture: pip install "tinygrad-seq[examples]" for matplotlib')
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(1.5 + 0.3 * len(source), 4.2), layout="constrained")
    shown = axis.imshow(weights, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    axis.set_xticks(range(len(source)), list(source))
    axis.set_yticks(range(len(target) + 1), [*target, "end"])
    axis.set_xlabel("read")
    axis.set_ylabel("written")
    axis.set_title("where the decoder looks", loc="left")
    figure.colorbar(shown, label="weight")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"saved {path}")


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(
        description="Translate written dates to ISO dates with an encoder and a decoder.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--date", default="Sunday, May 3rd, 1987", help="the one in the picture")
    parser.add_argument("--dates", type=int, default=10_000, help="how many to train on")
    parser.add_argument("--held-out", type=int, default=1000, help="how many to test on, at most")
    parser.add_argument("--beam", type=int, default=4, help="beginnings that are followed up")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-plot", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("written_dates.png"))
    given = parser.parse_args(arguments)
    if not given.date:
        parser.error("--date is one character or more")

    written, iso = data.written_dates(given.dates + given.held_out, rng=given.seed)
    read = data.Vocabulary.of_characters(written, padding="<padding>")
    wrote = data.Vocabulary.of_characters(iso, padding="<padding>", start="<start>", end="<end>")
    assert wrote.padding is not None
    assert wrote.start is not None
    assert wrote.end is not None
    try:
        own = read.encode(given.date)
    except ValueError as error:
        parser.error(str(error))
    sources = [read.encode(text) for text in written]
    targets = [np.array([wrote.start, *wrote.encode(text), wrote.end]) for text in iso]
    known = set(iso[: given.dates])
    test = [k for k in range(given.dates, len(iso)) if iso[k] not in known]

    model = nn.Seq2Seq(len(read), len(wrote), 64, embedding_size=32, rng=given.seed)
    count, ends = given.dates, {"start": wrote.start, "end": wrote.end, "longest": LONGEST}
    train(model, sources[:count], targets[:count], wrote.padding, given.epochs, given.seed)

    def decode(search: Any, numbers: list[int]) -> tuple[list[str], float, str]:
        """The dates of so many sources, the part that is right, and how long it took."""
        start = time.perf_counter()
        source, lengths = data.pad_sequences([sources[k] for k in numbers])
        texts = [wrote.decode(ids) for ids in search(source, lengths, **ends)]
        right = float(np.mean([iso[k] == t for k, t in zip(numbers, texts, strict=True)]))
        return texts, right, f"{time.perf_counter() - start:.2f} s"

    texts, right, _ = decode(model.greedy, test)
    print(f"{right:.2%} of {len(test)} dates, on days not trained on, are right")
    wrong = [(k, text) for k, text in zip(test, texts, strict=True) if iso[k] != text]
    for k, text in wrong[:5]:
        print(f"    {written[k]} is {iso[k]}, not {text}")
    found = {"all": right}
    beam = partial(model.beam, width=given.beam)
    for name, search in {"greedy": model.greedy, "beam": beam}.items():
        _, found[name], seconds = decode(search, test[:200])
        print(f"{name:<8}{found[name]:.1%} of {len(test[:200])} right, {seconds}")
    if wrong:
        _, found["beam where greedy is wrong"], _ = decode(beam, [k for k, _ in wrong])
        print(f"of what greedy has wrong beam has {found['beam where greedy is wrong']:.0%} right")

    (ids,) = model.greedy(own[:, None], **ends)
    print(f"{given.date}: {wrote.decode(ids)}")
    if not given.no_plot:
        with tgs.no_grad():  # what it has written so far is given to it, and it looks again
            weights = model.attention(own[:, None], np.array([[wrote.start], *([k] for k in ids)]))
        picture(weights.numpy()[:, 0], given.date, wrote.decode(ids), given.output)
    return found


if __name__ == "__main__":
    main()
