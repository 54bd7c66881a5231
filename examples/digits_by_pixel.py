"""Read and draw handwritten digits one pixel at a time: sequence to one, and one to sequence.

    python examples/digits_by_pixel.py

The 1,797 real digits that come with scikit-learn have 8 by 8 pixels, each from 0 to 16. Here they
are sequences of 64 numbers, row by row, and the networks never see two of them at once.

    reader, sequence to one    an LSTM takes the pixels one by one; its last output says which digit
                               it was
    artist, one to sequence    an LSTM is told a digit and gives the chances of each value of the
                               next pixel; one is drawn by lot and fed back in, 64 times

Both are trained with dropout and clipped gradients. At the end the reader, which has never seen
them, is shown what the artist drew: is it the digit that was asked for? The table says so for each
digit, beside the test images that were read right and what comparing all pixels at once gives (the
nearest neighbour). The picture shows digits from the data and drawn ones.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import tinygrad_seq as tgs
from tinygrad_seq import data, nn, optim

STEPS, LEVELS, DIGITS = 64, 17, 10


def load(count: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pixels (64, N), integers from 0 to 16, and digits (N,), each as (training, test) part."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SystemExit("the digits come with scikit-learn: pip install scikit-learn") from None
    images, digits = load_digits(return_X_y=True)
    pixels = images[:count].T.astype(int)
    return data.train_test_split(
        pixels, digits[:count], held_out=0.25, shuffle=True, axis=1, rng=seed
    )


def train(model: nn.Module, inputs: np.ndarray, targets: np.ndarray, epochs: int) -> None:
    optimizer = optim.Adam(model.parameters(), lr=0.02)
    history = tgs.train.fit(
        model,
        data.Batches(inputs, targets, batch_size=32, axis=1),
        nn.functional.cross_entropy,
        optimizer,
        epochs=epochs,
        clip_norm=1.0,
        schedule=optim.CosineAnnealingLR(optimizer, epochs),
    )
    print(
        f"loss {history.loss[0]:.2f} in the first epoch, {history.loss[-1]:.2f} in the last; norm "
        f"of the gradient before it is clipped to 1: {history.norm[0]:.1f}, {history.norm[-1]:.1f}"
    )


# Sequence to one -------------------------------------------------------------------------------


def as_numbers(pixels: np.ndarray) -> np.ndarray:
    """Pixels (T, B) as numbers (T, B, 1) from 0 to 1."""
    return (pixels[..., None] / (LEVELS - 1)).astype(np.float32)


def reader(hidden_size: int) -> nn.Sequential:
    """Pixels (64, B, 1) to logits (B, 10)."""
    return nn.Sequential(
        nn.LSTM(1, hidden_size, output="last"), nn.Dropout(0.2), nn.Linear(hidden_size, DIGITS)
    )


def read(model: nn.Sequential, pixels: np.ndarray) -> np.ndarray:
    found: np.ndarray = tgs.train.predict(model, as_numbers(pixels)).numpy().argmax(axis=-1)
    return found


# One to sequence -------------------------------------------------------------------------------


def one_later(pixels: np.ndarray) -> np.ndarray:
    """The pixel before each, and before the first a zero."""
    return np.concatenate([np.zeros_like(pixels[:1]), pixels[:-1]])


def told(pixels: np.ndarray, digits: np.ndarray) -> np.ndarray:
    """What the artist is given at each step: a pixel and, one-hot, the digit, (T, B, 11)."""
    one_hot = np.eye(DIGITS, dtype=np.float32)[digits]
    return np.concatenate([as_numbers(pixels), np.tile(one_hot, (len(pixels), 1, 1))], axis=-1)


def artist(hidden_size: int) -> nn.Sequential:
    """The pixel before and the digit (T, B, 11) to logits of the next pixel (T, B, 17)."""
    return nn.Sequential(
        nn.LSTM(1 + DIGITS, hidden_size), nn.Dropout(0.1), nn.Linear(hidden_size, LEVELS)
    )


def draw(model: nn.Sequential, digits: np.ndarray, seed: int) -> np.ndarray:
    """Pixels (64, B) for the digits (B,), each drawn by lot and fed back in."""
    lots = np.random.default_rng(seed)
    pixel, state, drawn = np.zeros(len(digits), int), None, []
    model.eval()  # no dropout
    with tgs.no_grad():
        for _ in range(STEPS):
            logits, state = model.with_state(told(pixel[None], digits), state)
            # Twice the logits square the chances, so that unlikely values come up less often.
            chances = tgs.softmax(2.0 * logits[0], axis=-1).numpy()
            below = np.cumsum(chances[:, :-1], axis=-1)  # the chance to be no more than each value
            pixel = (below < lots.random((len(digits), 1))).sum(axis=-1)
            drawn.append(pixel)
    return np.stack(drawn)


def nats(model: nn.Sequential, pixels: np.ndarray, digits: np.ndarray) -> float:
    """How surprised the artist is by each pixel, the mean of -log of the chance that it gave."""
    batch = told(one_later(pixels), digits), pixels
    return tgs.train.evaluate(model, [batch], nn.functional.cross_entropy)


def nats_by_place(pixels: np.ndarray, new_pixels: np.ndarray) -> float:
    """The same for one who only knows how often each value stands in each of the 64 places."""
    counts = 1 + (pixels[..., None] == np.arange(LEVELS)).sum(axis=1)
    chances = counts / counts.sum(axis=1, keepdims=True)
    return float(-np.log(np.take_along_axis(chances, new_pixels, axis=1)).mean())


# What came of it -------------------------------------------------------------------------------


def table(rows: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Print for each row (found, expected) the share found by digit and in all, and return that."""
    print("share that is right, by digit")
    print(" " * 32 + "".join(f"{digit:>6}" for digit in range(DIGITS)) + "   all")
    for name, (found, expected) in rows.items():
        shares = [(found == expected)[expected == digit].mean() for digit in range(DIGITS)]
        shares.append((found == expected).mean())
        print(name.ljust(32) + "".join(f"{share:6.2f}" for share in shares))
    return {name: float((found == expected).mean()) for name, (found, expected) in rows.items()}


def picture(rows: dict[str, np.ndarray], path: Path) -> None:
    """A strip of images for each title: pixels (64, N) as N digits of 8 by 8, ten in a line."""
    try:
        import matplotlib
    except ImportError:
        print('no picture: pip install "tinygrad-seq[examples]" for matplotlib')
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    between = {"wspace": 0.08}
    figure, axes = plt.subplots(
        1, len(rows), figsize=(9, 3), layout="constrained", gridspec_kw=between
    )
    for axis, (title, pixels) in zip(axes, rows.items(), strict=True):
        images = np.pad(pixels.T.reshape(-1, DIGITS, 8, 8), ((0, 0), (0, 0), (1, 1), (1, 1)))
        axis.imshow(np.block([list(line) for line in images]), cmap="gray_r")
        axis.set_title(title)
        axis.set_axis_off()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"saved {path}")


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(
        description="Read and draw digits pixel by pixel.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--digits", type=int, default=1797, help="how many of them to use")
    parser.add_argument("--hidden", type=int, default=64, help="hidden units of each LSTM")
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-plot", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("digits_by_pixel.png"))
    given = parser.parse_args(arguments)
    if given.digits < 400 or given.epochs < 1:
        parser.error("--digits is 400 or more, so that each is held out, and --epochs 1 or more")
    tgs.manual_seed(given.seed)
    (pixels, new_pixels), (digits, new_digits) = load(given.digits, given.seed)

    print(f"reader: {len(digits)} digits to learn from, {len(new_digits)} held out")
    reads = reader(given.hidden)
    train(reads, as_numbers(pixels), digits, given.epochs)
    print("artist: the same digits, the next pixel to be predicted from those before")
    draws = artist(given.hidden)
    train(draws, told(one_later(pixels), digits), pixels, given.epochs)
    surprise = nats(draws, new_pixels, new_digits)
    by_place = nats_by_place(pixels, new_pixels)
    print(f"nats for each pixel held out: {surprise:.3f}; from the place alone {by_place:.3f}\n")
    asked = np.tile(np.arange(DIGITS), 20)
    drawn = draw(draws, asked, given.seed)

    distances = ((new_pixels[:, :, None] - pixels[:, None]) ** 2).sum(axis=0)
    shares = table(
        {
            "reader, training images": (read(reads, pixels), digits),
            "reader, test images": (read(reads, new_pixels), new_digits),
            "nearest neighbour, test images": (digits[distances.argmin(axis=1)], new_digits),
            "drawn, and read as asked": (read(reads, drawn), asked),
        }
    )
    if not given.no_plot:
        measured = [np.flatnonzero(digits == digit)[:6] for digit in range(DIGITS)]
        by_line = pixels[:, np.stack(measured, axis=1).ravel()]
        picture({"from the data": by_line, "drawn": drawn[:, : 6 * DIGITS]}, given.output)
    return shares | {"artist's nats": surprise, "nats by place": by_place}


if __name__ == "__main__":
    main()
