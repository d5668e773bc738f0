"""Value and gradient of each objective equal TRL's, on random and on extreme log-probs.

The recorded values are those of ``record_trl_objectives.py``; the slow test records them anew.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.closeness import assert_same
from tests.objectives.examples import from_tokens
from tests.parity.objectives import Case, cases
from tests.parity.record_trl_objectives import record

RECORD = json.loads((Path(__file__).parent / "trl_objectives.json").read_text())
# Where TRL's value or gradient is not a number, ours is.
TRL_FAILS = {("sigmoid_forward_kl", "extreme")}


def run(case: Case, example: dict[str, Any]) -> tuple[float, list[float]]:
    tokens = torch.tensor(example["policy"], dtype=case.dtype, requires_grad=True)
    reference = torch.tensor(example["reference"], dtype=case.dtype)
    squares = torch.tensor(example["log_sum_squares"], dtype=case.dtype)
    policy = from_tokens(tokens, example["lengths"], log_sum_squares=squares)
    losses = case.objective(policy, from_tokens(reference, example["lengths"]))
    if case.trainer == "orpo":  # the odds alone
        losses = losses + policy.chosen / policy.chosen_lengths
    losses.mean().backward()
    assert tokens.grad is not None
    return losses.mean().item(), tokens.grad.tolist()


def assert_equal(results: dict[str, Any]) -> None:
    assert results.keys() == cases().keys()
    for name, case in cases().items():
        for example, values in RECORD["examples"].items():
            loss, gradient = run(case, values)
            expected = results[name][example]
            finite = all(map(math.isfinite, [expected["loss"], *expected["gradient"]]))
            assert finite == ((name, example) not in TRL_FAILS), (name, example)
            if finite:
                tolerance = {"rel": case.tolerance, "abs": case.tolerance / 100}
                assert loss == pytest.approx(expected["loss"], **tolerance), (name, example)
                if case.dtype == torch.float32:
                    both = ({f"{name}, {example}": torch.tensor(g)} for g in (gradient, expected["gradient"]))
                    assert_same(*both, case.tolerance)
                else:
                    assert gradient == pytest.approx(expected["gradient"], **tolerance), (name, example)
            assert all(map(math.isfinite, [loss, *gradient])), (name, example)


def test_recorded() -> None:
    assert_equal(RECORD["results"])


@pytest.mark.slow
def test_live() -> None:
    assert_equal(record()["results"])
