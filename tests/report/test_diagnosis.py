"""Verdicts on runs: each rule on a run that it is about, and on one that it is not about."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lit_dpo.evaluation.table import PairTable
from lit_dpo.report.curves import Curve
from lit_dpo.report.diagnosis import diagnose
from lit_dpo.report.folder import Run


def curve(*values: float) -> Curve:
    return Curve([float(step) for step in range(len(values))], list(values), 1, 0)


def table(margins: Any, chosen: Any = None, rejected: Any = None) -> PairTable:
    margins = np.asarray(margins, float)
    ones = np.ones(len(margins))
    values = {
        "loss": ones,
        "rewards/margins": margins,
        "rewards/accuracies": np.where(margins == 0, 0.5, margins > 0),
        "lengths/chosen": ones * 10 if chosen is None else np.asarray(chosen, float),
        "lengths/rejected": ones * 10 if rejected is None else np.asarray(rejected, float),
    }
    counts = dict.fromkeys(values, ones)
    return PairTable(values, counts, np.arange(len(margins)), ones * np.nan, (), ())


def run(pairs: PairTable | None = None, **known: Any) -> Run:
    fields: dict[str, Any] = {
        "summary": {"before": {"val/loss": 0.693}, "after": {"val/loss": 0.5, "val/kl": 0.1}, "steps": 10, "epochs": 1},
        "config": {},
        "own_config": {},
        "changed": None,
        "curves": {},
        "facts": {"starts_at_reference": True, "adapters": 4, "adapters_zero": 0},
        "lines": [],
        "tokens": [],
        "warnings": [],
        "audit": {},
    }
    for name, value in known.items():
        fields[name] = {**fields[name], **value} if isinstance(fields[name], dict) else value
    found = Run(Path("runs/x"), "x", **fields)
    found.__dict__["after"] = pairs  # a cached property
    return found


def codes(found: Run) -> list[str]:
    return [one.code for one in diagnose(found)]


LEARNED = table(np.linspace(-0.4, 4, 40))


def test_a_good_run_has_no_verdicts() -> None:
    # half of the chosen responses are the longer ones, and it is sure where it is right
    margins = np.r_[np.full(36, 2.0), np.full(4, -2.0)]
    lengths = np.tile([8.0, 12.0], 20)
    assert codes(run(table(margins, lengths, 20 - lengths))) == []


SUMMARY: dict[str, Any] = {"before": {"val/loss": 0.693, "val/kl": 0.0}}


@pytest.mark.parametrize(
    ("known", "code"),
    [
        ({"facts": {"adapters_zero": 4}}, "dead_adapters"),
        ({"curves": {"train/grad_norm": curve(0.0, 0.0)}}, "dead_adapters"),
        ({"facts": {"adapters_zero": 1, "adapters_zero_names": ["q"]}}, "dead_adapters"),
        ({"summary": {"before": {"val/loss": 0.9, "val/kl": 0.3}}}, "reference_mismatch"),
        ({"summary": {"after": {"val/displacement/chosen": -0.7, "val/kl": 0.1}}}, "displacement"),
        ({"curves": {"val/loss": curve(0.7, 0.6, 0.5, 0.6)}}, "overfitting"),
        ({"summary": {"before": {"val/loss": 0.6}, "after": {"val/loss": 0.8}}}, "loss_rose"),
        ({"summary": {"after": {"val/loss": 0.8, "val/kl": 0.1}}}, "loss_rose"),
        ({"summary": {"after": {"val/kl": 1e-5}}}, "small_step"),
        ({"summary": {"after": {"val/kl": 3.0}}}, "large_step"),
        ({"curves": {"train/loss": Curve([0.0], [1.0], 1, 2)}}, "not_finite"),
        (
            {
                "summary": {"epochs": 3},
                "curves": {"train/rewards/accuracies": curve(*[1.0] * 20), "val/rewards/accuracies": curve(0.5, 0.6)},
            },
            "memorized",
        ),
    ],
)
def test_what_a_run_is_blamed_for(known: dict[str, Any], code: str) -> None:
    assert code in codes(run(**known))
    assert code not in codes(run())


@pytest.mark.parametrize(
    ("pairs", "code"),
    [
        (table([1.0, -1.0] * 20), "chance"),
        (table([-1.0] * 40), "reversed"),
        (table(np.ones(40), np.full(40, 20)), "length_exploitation"),  # the longer one is always chosen
        # right where the chosen one is longer, which is mostly so, and wrong elsewhere
        (table([1.0] * 32 + [-1.0] * 8, [20] * 32 + [5] * 8), "length_exploitation"),
        (table(np.r_[np.linspace(1, 3, 20), np.linspace(0.1, 1, 20)], np.r_[np.full(20, 30), np.full(20, 5)]),
         "length_exploitation"),  # the margin follows the length
        (table([8.0] * 30 + [-8.0] * 12), "calibration"),
    ],
)  # fmt: skip
def test_what_its_held_out_pairs_tell(pairs: PairTable, code: str) -> None:
    assert code in codes(run(pairs))


def test_the_loss_before_training_is_no_checkpoint_to_take() -> None:
    assert "overfitting" not in codes(run(curves={"val/loss": curve(0.5, 0.6)}))


def test_every_verdict_has_a_remedy_and_a_source() -> None:
    found = diagnose(run(table([1.0, -1.0] * 20), facts={"adapters_zero": 4}, summary=SUMMARY))
    assert found
    assert [one.severity for one in found] == sorted(
        (one.severity for one in found), key=["error", "warning", "note"].index
    )
    assert all(one.remedy and one.source for one in found)
