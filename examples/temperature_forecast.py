"""Forecast sea temperatures with a recurrent network, beside what it has to beat.

    python examples/temperature_forecast.py

reads 61 years of monthly means, trains on all but the last 132 months, and prints the root mean
square error of the forecasts for those, 1, 3, 6 and 12 months ahead:

    persistence     it stays as it is
    climatology     the mean of that month over the training years
    AR(12)          linear in the last 12 values, fitted by least squares
    AR(12) on anomalies   the same on values less month means
    dense network   a layer of 32 units on the last 12 anomalies
    LSTM            reads the anomalies and the time of year one by one; --cell rnn or gru
                    for others

The networks are trained to predict the next month; further ahead, predictions are fed back in.
Each is the median of several seeds. A validation part at the end of the training years decides
when to stop. The picture shows measurements and forecasts of the months held out.

Your own series: --csv FILE --column NAME, with --period for the rows in a season (1 for none) and
--held-out for the rows to test on.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import tinygrad_seq as tgs
from tinygrad_seq import data, nn, optim

CSV = Path(__file__).parent / "data" / "sea_surface_temperature.csv"
HORIZONS = (1, 3, 6, 12)
LAGS = 12  # what AR and the dense network see
STEPS = 36  # how long a sequence the recurrent network is trained on
MEMORY = 60  # how much history it reads before it forecasts
Forecasts = dict[str, list[np.ndarray]]  # by method, one for each seed
LAYERS = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


class Series:
    """The values, their training part, and the anomalies in units of their standard deviation."""

    def __init__(self, values: np.ndarray, period: int, held_out: int) -> None:
        self.values, self.period, self.held_out = values, period, held_out
        self.train = len(values) - held_out
        least = 2 * max(STEPS, MEMORY, period) + LAGS
        if held_out < max(HORIZONS) or self.train < least:
            raise SystemExit(
                f"{len(values)} values with {held_out} held out: at least {least} are needed to "
                f"train and {max(HORIZONS)} to test"
            )
        self.season = np.arange(len(values) + max(HORIZONS)) % period
        known = values[: self.train]
        self.means = np.array([known[k::period].mean() for k in range(period)])
        anomalies = values - self.means[self.season[: len(values)]]
        self.scale = float(anomalies[: self.train].std()) or 1.0
        self.anomalies = anomalies / self.scale

    def to_values(self, forecasts: np.ndarray) -> Any:
        """Anomalies (origins, horizon) back to the unit of the measurements."""
        ahead = self.origins[:, None] + 1 + np.arange(forecasts.shape[1])
        return forecasts * self.scale + self.means[self.season[ahead]]

    @property
    def origins(self) -> np.ndarray:
        """The months from which to forecast: the last known month of each."""
        return np.arange(self.train - max(HORIZONS), len(self.values) - 1)

    def rmse(self, forecasts: np.ndarray, horizon: int) -> float:
        """Over all months held out, each forecast ``horizon`` months before."""
        target = self.origins + horizon
        chosen = (target >= self.train) & (target < len(self.values))
        error = forecasts[chosen, horizon - 1] - self.values[target[chosen]]
        return float(np.sqrt(np.mean(error**2)))


def roll_out(
    values: np.ndarray, origins: np.ndarray, predict: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Forecasts (origins, 12) of a model that predicts the next value from the last LAGS."""
    window = np.stack([values[t - LAGS + 1 : t + 1] for t in origins])
    forecasts = []
    for _ in range(max(HORIZONS)):
        forecasts.append(predict(window))
        window = np.concatenate([window[:, 1:], forecasts[-1][:, None]], axis=1)
    return np.stack(forecasts, axis=1)


def fit_linear(values: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """AR(12): least squares on the last LAGS values and a constant."""
    x, y = data.windows(values, LAGS)
    weights = np.linalg.lstsq(np.column_stack([x, np.ones(len(x))]), y, rcond=None)[0]
    return lambda window: window @ weights[:-1] + weights[-1]


def train(model: nn.Module, x: np.ndarray, y: np.ndarray, axis: int, seed: int, epochs: int) -> int:
    """Fit, with the last 60 examples for validation and none that share a month with them."""
    rows, overlap = np.arange(x.shape[axis]), x.shape[1 - axis]
    known, later = rows[: -60 - overlap], rows[-60:]
    batches = data.Batches(
        np.take(x, known, axis), np.take(y, known, axis), batch_size=64, axis=axis, rng=seed
    )
    validation = [(np.take(x, later, axis), np.take(y, later, axis))]
    optimizer = optim.AdamW(model.parameters(), lr=0.005, weight_decay=0.1)
    history = tgs.train.fit(
        model,
        batches,
        nn.functional.mse_loss,
        optimizer,
        epochs=epochs,
        clip_norm=1.0,
        validation=validation,
        patience=8,
        progress=False,
    )
    return len(history)


def fit_dense(series: Series, seed: int, epochs: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    model = nn.Sequential(nn.Linear(LAGS, 32, rng=rng), tgs.tanh, nn.Linear(32, 1, rng=rng))
    x, y = data.windows(series.anomalies[: series.train], LAGS)
    train(model, x, y[:, None], 0, seed, epochs)

    def predict(window: np.ndarray) -> Any:
        with tgs.no_grad():
            return model(window.astype(np.float32)).numpy()[:, 0]

    return roll_out(series.anomalies, series.origins, predict)


class Forecaster(nn.Module):
    """Reads anomalies and the time of year (T, B, 3); predicts each next anomaly (T, B, 1)."""

    def __init__(self, cell: str, hidden_size: int, rng: np.random.Generator) -> None:
        self.recurrent = LAYERS[cell](3, hidden_size, rng=rng)
        self.head = nn.Linear(hidden_size, 1, rng=rng)

    def forward(self, x: tgs.Tensor) -> tgs.Tensor:
        return self.step(x, None)[0]

    def step(self, x: tgs.Tensor, state: object) -> tuple[tgs.Tensor, object]:
        ys, state = self.recurrent(x, state)
        # What it adds to persistence: little at first, so that training starts from that.
        return x[:, :, :1] + 0.1 * self.head(ys), state


def fit_recurrent(series: Series, cell: str, seed: int, epochs: int) -> np.ndarray:
    angle = 2 * np.pi * series.season / series.period
    time_of_year = np.stack([np.sin(angle), np.cos(angle)], axis=1)
    inputs = np.column_stack([series.anomalies, time_of_year[: len(series.anomalies)]])
    x, _ = data.windows(inputs[: series.train - 1], STEPS, 1)
    y, _ = data.windows(series.anomalies[1 : series.train, None], STEPS, 1)
    model = Forecaster(cell, 16, np.random.default_rng(seed))
    train(model, x.swapaxes(0, 1), y.swapaxes(0, 1), 1, seed, epochs)

    origins, forecasts = series.origins, []
    past = np.stack([inputs[t - MEMORY + 1 : t + 1] for t in origins], axis=1)
    with tgs.no_grad():
        predicted, state = model.step(tgs.tensor(past, dtype="float32"), None)
        for k in range(1, max(HORIZONS) + 1):
            forecasts.append(predicted.numpy()[-1, :, 0])
            now = np.column_stack([forecasts[-1], time_of_year[origins + k]])[None]
            predicted, state = model.step(tgs.tensor(now, dtype="float32"), state)
    return np.stack(forecasts, axis=1)


def forecast_all(series: Series, cell: str, seeds: list[int], epochs: int) -> Forecasts:
    """For each method its forecasts (origins, 12) in the unit of the series, one for each seed."""
    origins, ahead = series.origins, np.arange(1, max(HORIZONS) + 1)
    values, known = series.values, slice(series.train)
    last = np.repeat(values[origins][:, None], len(ahead), axis=1)
    linear = roll_out(values, origins, fit_linear(values[known]))
    on_anomalies = roll_out(series.anomalies, origins, fit_linear(series.anomalies[known]))
    dense, recurrent = [], []
    for seed in progress(seeds):
        dense.append(series.to_values(fit_dense(series, seed, epochs)))
        recurrent.append(series.to_values(fit_recurrent(series, cell, seed, epochs)))
    return {
        "persistence": [last],
        "climatology": [series.to_values(np.zeros_like(last))],
        "AR(12)": [linear],
        "AR(12) on anomalies": [series.to_values(on_anomalies)],
        "dense network": dense,
        cell.upper(): recurrent,
    }


def progress(seeds: list[int]) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        print('training (pip install "tinygrad-seq[examples]" for a progress bar)')
        return seeds
    return tqdm(seeds, desc="training", unit="seed")


def table(series: Series, forecasts: Forecasts, unit: str) -> dict[str, list[float]]:
    """Print RMSE by method and horizon, the best of each column marked, and who wins."""
    errors = {
        name: [median(series.rmse(f, h) for f in runs) for h in HORIZONS]
        for name, runs in forecasts.items()
    }
    best = [min((row[k], name) for name, row in errors.items())[1] for k in range(len(HORIZONS))]
    count = max(len(runs) for runs in forecasts.values())
    print(f"RMSE in {unit} over the last {series.held_out}, networks the median of {count} seeds")
    print("steps ahead".ljust(22) + "".join(f"{h:>9}" for h in HORIZONS))
    for name, row in errors.items():
        marks = ("*" if best[k] == name else " " for k in range(len(HORIZONS)))
        print(name.ljust(22) + "".join(f"{e:8.3f}{m}" for e, m in zip(row, marks, strict=True)))
    print(f"* best. One step ahead the best is: {best[0]}.")
    return errors


def picture(
    series: Series, forecasts: Forecasts, cell: str, unit: str, labels: list[str], path: Path
) -> None:
    try:
        import matplotlib
    except ImportError:
        print('no picture: pip install "tinygrad-seq[examples]" for matplotlib')
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    name = cell.upper()
    runs = sorted(forecasts[name], key=lambda f: series.rmse(f, 1))
    chosen = runs[len(runs) // 2]
    months = np.arange(series.train, len(series.values))
    figure, axes = plt.subplots(2, 1, figsize=(11, 6.5), sharex=True, layout="constrained")
    for axis, horizon in zip(axes, (1, 12), strict=True):
        start = np.searchsorted(series.origins, months - horizon)
        axis.plot(months, series.values[months], color="black", label="measured")
        axis.plot(months, chosen[start, horizon - 1], color="tab:blue", label=f"{name} forecast")
        error = series.rmse(chosen, horizon)
        axis.set_title(
            f"{horizon} step{'s' * (horizon > 1)} ahead: RMSE {error:.2f} {unit}", loc="left"
        )
        axis.set_ylabel(unit)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, ncols=2, loc="upper right")
    ticks = months[:: max(1, len(months) // 11)]
    axes[1].set_xticks(ticks, [labels[t] for t in ticks])
    seed = "; the seed with the median error one step ahead" if len(runs) > 1 else ""
    axes[1].set_xlabel(f"none of these were trained on{seed}")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"saved {path}")


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(
        description="Forecast a series with a recurrent network.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--cell", choices=sorted(LAYERS), default="lstm")
    parser.add_argument("--csv", type=Path, default=CSV, help="a CSV file with a header line")
    parser.add_argument("--column", help="its column of numbers")
    parser.add_argument("--period", type=int, default=12, help="rows in a season, 1 for none")
    parser.add_argument(
        "--held-out", type=int, help="rows at the end to test on (132; of your own series a fifth)"
    )
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=5, help="how many to take the median of")
    parser.add_argument("--epochs", type=int, default=60, help="at most; validation stops earlier")
    parser.add_argument("--no-plot", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("temperature_forecast.png"))
    given = parser.parse_args(arguments)
    if given.period < 1 or given.seeds < 1 or given.epochs < 1:
        parser.error("--period, --seeds and --epochs are 1 or more")
    try:
        values, labels = data.read_column(given.csv, given.column, with_labels=True)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    unit = "°C" if given.csv == CSV else (given.column or "the series' unit")
    held_out = given.held_out or (132 if given.csv == CSV else len(values) // 5)
    print(f"{len(values)} rows, a season of {given.period}, the last {held_out} held out")
    series = Series(values, given.period, held_out)
    seeds = list(range(given.seed, given.seed + given.seeds))
    forecasts = forecast_all(series, given.cell, seeds, given.epochs)
    errors = table(series, forecasts, unit)
    if not given.no_plot:
        picture(series, forecasts, given.cell, unit, labels, given.output)
    return errors


if __name__ == "__main__":
    main()
