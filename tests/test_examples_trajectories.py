"""The examples with trajectories, at a small size: what is learned beats what needs no learning."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

import tinygrad_seq as tgs
from tinygrad_seq import data

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> dict:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def rms(error: np.ndarray) -> float:
    return float(np.sqrt(np.mean(error**2)))


class TestBall:
    program = example("ball_in_a_box")

    def test_networks_beat_extrapolation(self, tmp_path, capsys):
        pytest.importorskip("matplotlib")
        picture = tmp_path / "ball.png"
        small = ["--balls", "300", "--epochs", "4", "--output", str(picture)]
        results = self.program["main"](small)
        errors = {name: result.rmse for name, result in results.items()}
        for name in list(errors)[3:]:  # the networks; untrained they are no better than no change
            assert errors[name][0] < 0.4 * errors["no change"][0], name
            assert errors[name][2] < 0.8 * errors["constant velocity"][2], name
        assert errors["LSTM"][0] < 0.8 * errors["constant velocity"][0]
        assert np.median(results["LSTM"].horizons) > 2 * np.median(results["no change"].horizons)
        shown = capsys.readouterr().out
        assert "600 × 30 positions give 22 blocks of 8 + 1 each" in shown
        assert "in sides of the box" in shown
        assert all(f"{name:27}{r.parameters:10}" in shown for name, r in results.items())
        assert picture.stat().st_size > 10_000

    def test_measured_naively(self):
        """Who goes on at constant velocity, by a formula instead of step by step."""
        x = data.bouncing_ball(20, 30, rng=0)
        goes_on = self.program["predictors"](8)["constant velocity"]
        found = self.program["measure"](goes_on, x)
        for k, error in zip((1, 3, 10), found.rmse, strict=True):
            said = x[7:-k] + k * (x[7:-k] - x[6 : -k - 1])
            assert error == pytest.approx(rms(said - x[7 + k :]), rel=1e-4)  # float32
        ahead = np.arange(1, 23)[:, None, None]
        error = np.linalg.norm(x[7] + ahead * (x[7] - x[6]) - x[8:], axis=-1)
        for b, horizon in enumerate(found.horizons):
            assert (error[:horizon, b] <= 0.05).all()
            assert horizon == 22 or error[horizon, b] > 0.05

    @pytest.mark.parametrize("past", [5, 8, 10])
    def test_step_by_step_as_from_the_start(self, past):
        """A state carried on gives what reading everything again gives."""
        x = data.bouncing_ball(3, past, rng=0)
        for name, model in self.program["predictors"](past).items():
            made = self.program["roll_out"](model, x, 4)
            again = x
            for _ in range(4):
                displacement = tgs.train.predict(model, again).numpy()[-1:]
                again = np.concatenate([again, again[-1:] + 0.025 * displacement])
            np.testing.assert_allclose(made, again[past:], rtol=1e-4, atol=1e-6, err_msg=name)


def test_kinds(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "kinds.png"
    small = ["--count", "500", "--epochs", "6", "--hidden", "16", "--output", str(picture)]
    accuracies = example("kind_of_trajectory")["main"](small)
    for name, share in accuracies.items():
        assert share > 0.4, name  # who guesses has a third
    best = max(accuracies, key=accuracies.get)
    assert accuracies[best] > 0.7
    shown = capsys.readouterr().out
    assert f"{best}, rows what it is, columns what was found" in shown
    assert picture.stat().st_size > 10_000
