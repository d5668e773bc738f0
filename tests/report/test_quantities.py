"""Curves, histograms and calibration."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_calibration_error

from lit_dpo.report.curves import MOST_POINTS, read_curves
from lit_dpo.report.quantities import calibration, histogram


def write_csv(path: Path, rows: list[dict[str, object]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [",".join(names), *(",".join(str(row.get(name, "")) for name in names) for row in rows)]
    path.write_text("\n".join(lines) + "\n")


def test_curves_of_a_run(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"step": 0, "val/loss": 0.7}]
    rows += [{"step": step, "train/loss": 1 / (step + 1), "epoch": 0} for step in range(4)]
    write_csv(tmp_path / "metrics.csv", [*rows, {"step": 3, "val/loss": 0.2}])
    curves = read_curves(tmp_path)
    assert curves["train/loss"].steps == [0, 1, 2, 3]
    assert curves["val/loss"].steps == [0, 4], "an evaluation comes after the step that it is logged with"
    assert "epoch" not in curves


def test_a_long_curve_is_thinned_to_means(tmp_path: Path) -> None:
    write_csv(tmp_path / "metrics.csv", [{"step": step, "train/loss": float(step)} for step in range(4 * MOST_POINTS)])
    curve = read_curves(tmp_path)["train/loss"]
    assert (len(curve.steps), curve.mean_of) == (MOST_POINTS, 4)
    assert curve.values[0] == curve.steps[0] == 1.5
    assert np.mean(curve.values) == pytest.approx((4 * MOST_POINTS - 1) / 2)


def test_numbers_that_are_not_finite_are_counted(tmp_path: Path) -> None:
    values = [1.0, float("nan"), float("inf"), 2.0]
    write_csv(tmp_path / "metrics.csv", [{"step": step, "train/loss": value} for step, value in enumerate(values)])
    curve = read_curves(tmp_path)["train/loss"]
    assert (curve.values, curve.not_finite) == ([1.0, 2.0], 2)


def test_a_run_that_was_resumed_in_its_folder_has_one_curve(tmp_path: Path) -> None:
    write_csv(tmp_path / "metrics_1.csv", [{"step": step, "train/loss": 1.0} for step in range(4)])
    write_csv(tmp_path / "metrics.csv", [{"step": step, "train/loss": 2.0} for step in range(2, 6)])
    assert read_curves(tmp_path)["train/loss"].values == [1.0, 1.0, 2.0, 2.0, 2.0, 2.0]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    write_csv(tmp_path / "metrics.csv", [{"step": 0, "train/loss": "x"}])
    with pytest.raises(ValueError, match=r"metrics\.csv, line 2: train/loss is no number: 'x'"):
        read_curves(tmp_path)
    assert read_curves(tmp_path / "nothing") == {}


def test_every_pair_is_in_the_histogram() -> None:
    before, after = np.zeros(50), np.r_[np.linspace(-1, 1, 49), 1e6]
    found = histogram(before, after)
    assert sum(found.after) == sum(found.before or []) == 50
    assert found.above[1] == 1
    alone = histogram(None, np.array([2.0]))
    assert (alone.before, sum(alone.after)) == (None, 1)


def test_calibration_is_that_of_torchmetrics() -> None:
    generator = np.random.default_rng(0)
    margins = generator.normal(0.5, 2, 500)
    found = calibration(margins)
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    # Its bins span [0, 1], of which confidences have the upper half.
    theirs = binary_calibration_error(torch.tensor(confidence), torch.tensor((margins > 0).astype(int)), n_bins=20)
    assert found.error == pytest.approx(float(theirs), abs=1e-6)
    assert sum(found.counts) == 500


def test_sure_and_right_is_calibrated() -> None:
    assert calibration(np.full(40, 12.0)).error < 1e-4
    assert calibration(np.full(40, -12.0)).error == pytest.approx(1.0, abs=1e-4)
    assert calibration(np.zeros(3)).error == pytest.approx(0.0)
