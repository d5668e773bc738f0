"""``metrics.csv`` ──► curves, thinned to what a chart can show."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

MOST_POINTS = 400  # of a curve; a point of a longer one is the mean of several steps


class Curve(NamedTuple):
    """A logged number over the optimizer steps."""

    steps: list[float]
    values: list[float]
    mean_of: int  # how many logged numbers a point is the mean of
    not_finite: int  # numbers left out because they are NaN or infinite
    epochs: Sequence[float] = ()  # epoch of each point, counted from 0; NaN if it is not known

    def last(self, share: float = 0.1) -> float:
        """The mean of the last share of the points; NaN without points."""
        many = max(1, round(share * len(self.values)))
        return float(np.mean(self.values[-many:])) if self.values else math.nan


def read_curves(folder: Path) -> dict[str, Curve]:
    """The curves of all numbers under ``train/`` and ``val/`` that a run logged; none without ``metrics.csv``.

    Steps count from 0: a number of training at step n is that of the policy after n updates. If a run was resumed in
    the same folder, the files of its earlier starts are read first, and a later file's numbers replace theirs.

    Raises:
        ValueError: If a file is no CSV file of numbers.
    """
    found: dict[str, dict[float, float]] = {}
    epochs: dict[tuple[str, float], float] = {}
    # The first file is metrics_1.csv, and the last one metrics.csv.
    earlier = sorted(folder.glob("metrics_*.csv"), key=lambda path: (len(path.name), path.name))
    for path in [*earlier, *folder.glob("metrics.csv")]:
        trained = False
        with path.open(encoding="utf-8", newline="") as file:
            for number, row in enumerate(csv.DictReader(file), 2):
                trained |= bool(row.get("train/loss"))
                for name, text in row.items():
                    if text and name and name.startswith(("train/", "val/")):
                        try:
                            step, value = float(row["step"]), float(text)
                        except (KeyError, ValueError, TypeError) as error:
                            raise ValueError(f"{path}, line {number}: {name} is no number: {text!r}") from error
                        # An evaluation is logged with the step that it follows, but for the one before training.
                        step += name.startswith("val/") and trained
                        found.setdefault(name, {})[step] = value
                        if row.get("epoch"):
                            epochs[name, step] = float(row["epoch"])
    curves = {name: _thinned(sorted(points.items())) for name, points in found.items()}
    return {
        name: curve._replace(epochs=[epochs.get((name, step), math.nan) for step in curve.steps])
        for name, curve in curves.items()
    }


def _thinned(points: Sequence[tuple[float, float]]) -> Curve:
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    every = max(1, math.ceil(len(finite) / MOST_POINTS))
    parts = [np.array(finite[start : start + every]) for start in range(0, len(finite), every)]
    means = [part.mean(0).tolist() for part in parts]
    return Curve([step for step, _ in means], [value for _, value in means], every, len(points) - len(finite))
