"""Answers while training: to whatever loggers are on, and without a trace in the training."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
from safetensors.torch import load_file

from lit_dpo.callbacks import answers
from lit_dpo.cli.app import main
from lit_dpo.policy.generation import Comparison
from tests.cli.test_cli import tiny  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:.*")
OPTIONS = ["--answers.num_prompts", "2", "--answers.max_new_tokens", "5", "--answers.temperature", "1"]


@pytest.mark.ci
@pytest.mark.slow
def test_the_run_is_the_same_with_them(tiny: list[str]) -> None:  # noqa: F811
    run = [
        "fit",
        *tiny,
        "--trainer.max_steps",
        "3",
        "--trainer.val_check_interval",
        "1",
        "--model.lora.lora_dropout",
        "0.1",
    ]
    main([*run, "--run_name", "without"])
    main([*run, *OPTIONS, "--run_name", "with"])
    first, second = (
        load_file(f"runs/{name}/version_0/adapter/adapter_model.safetensors") for name in ("without", "with")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    rows = [json.loads(line) for line in Path("runs/with/version_0/answers.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len({(row["prompt"], row["base"]) for row in rows}) == 2, "the base answers once"
    assert all(row["base"] == row["aligned"] for row in rows[:2])
    assert not Path("runs/without/version_0/answers.jsonl").exists()


def test_each_logger_gets_its_own_form() -> None:
    calls: list[Any] = []

    class Client:
        def log_table(self, *args: Any, **kwargs: Any) -> None:
            calls.append((args, kwargs))

    class Table(WandbLogger):
        def __init__(self) -> None:
            """Starts nothing."""

        def log_table(self, *args: Any, **kwargs: Any) -> None:
            calls.append((args, kwargs))

    class Runs(MLFlowLogger):
        experiment, run_id = Client(), "7"  # type: ignore[assignment]

        def __init__(self) -> None:
            """Starts nothing."""

    rows = [Comparison("p", "b", "a")]
    answers.log(Table(), 3, rows)
    answers.log(Runs(), 3, rows)
    assert calls[0] == (("answers",), {"columns": answers.COLUMNS, "data": [[3, "p", "b", "a"]], "step": 3})
    assert calls[1][0] == ("7", {"step": [3], "prompt": ["p"], "base": ["b"], "aligned": ["a"]})


def test_settings_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"answers\.max_new_tokens"):
        answers.HeldOutAnswers(max_new_tokens=0)
