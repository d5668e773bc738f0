import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_dpo.cli.app import main
from lit_dpo.cli.overrides import _comparable
from lit_dpo.module import DPOModule
from lit_dpo.training.throughput import NAMES
from tests.closeness import LOSS, TINY, assert_same
from tests.conftest import REPOSITORY
from tests.objectives.test_properties import NAMES as OBJECTIVES
from tests.tiny import made_up_rows, write_jsonl

STEPS = 4  # of an epoch of the tiny run: each adds rounding of its own
QUICKSTART = str(REPOSITORY / "configs/quickstart.yaml")
pytestmark = pytest.mark.filterwarnings(
    "ignore:The '.*dataloader' does not have many workers",
    "ignore:The number of training batches",
    "ignore:You're resuming",
)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit_dpo"])
    return iter(())


@pytest.fixture
def tiny(tiny_base: str, pairs_file: str) -> list[str]:
    """Arguments of a run of seconds: four optimizer steps of four pairs."""
    return [
        *("--model.base", tiny_base, "--model.quantization", "null", "--model.optimizer.lr", "0.01"),
        *("--data.source", pairs_file, "--data.val_size", "4", "--data.batch_size", "4"),
        *("--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--trainer.enable_progress_bar", "false"),
        *("--samples.num_prompts", "2", "--samples.max_new_tokens", "4"),
        *("--guard.max_drop", "null"),  # at this rate it would have to warn
    ]


def metrics(folder: Path) -> list[dict[str, float]]:
    """The logged metrics, without those of the clock and of the memory."""
    header, *lines = (folder / "metrics.csv").read_text().splitlines()
    names = header.split(",")
    rows = [dict(zip(names, line.split(","), strict=True)) for line in lines]
    return [{n: float(v) for n, v in row.items() if v and n.removeprefix("train/") not in NAMES} for row in rows]


def logged(folder: Path) -> dict[str, torch.Tensor]:
    """All that was logged, by family: a quantile of rewards may lie near zero, and is off by what the rewards are."""
    families: dict[str, list[float]] = {}
    for row in metrics(folder):
        for name, value in row.items():
            families.setdefault(name.rsplit("/", 1)[0], []).append(value)
    return {family: torch.tensor(values) for family, values in families.items()}


def test_fit_leaves_everything_behind(tiny: list[str], tiny_base: str, capfd: pytest.CaptureFixture[str]) -> None:
    main(["fit", *tiny, "--run_name", "first"])
    folder = Path("runs/first/version_0")
    found = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "metrics.csv", "checkpoints", "adapter", "samples.md"} <= found
    assert any(name.startswith("events.out") for name in found)
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"last.ckpt", "best-step4.ckpt"}
    adapter = json.loads((folder / "adapter/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == tiny_base
    assert {"adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"} <= {
        path.name for path in (folder / "adapter").iterdir()
    }
    rows = metrics(folder)
    before = next(row for row in rows if "val/loss" in row)
    assert before["step"] == 0
    assert before["val/loss"] == pytest.approx(math.log(2), abs=LOSS)
    assert before["val/rewards/accuracies"] == 0.5
    assert [row for row in rows if "val/loss" in row][-1]["val/loss"] != before["val/loss"]
    printed = capfd.readouterr().out
    assert "rewards/accuracies" in printed
    assert "base" in printed
    assert str(folder) in printed

    # A second run overwrites nothing, and the saved configuration repeats the first.
    main(["fit", "--config", str(folder / "config.yaml")])
    assert Path("runs/first/version_1/adapter").exists()
    assert metrics(Path("runs/first/version_1")) == rows


def test_peft_loads_the_adapter_as_it_is(tiny: list[str]) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    main(["fit", *tiny])
    folder = "runs/dpo/version_0/adapter"
    model, tokenizer = AutoPeftModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template
    trained = torch.load("runs/dpo/version_0/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    loaded = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert len(loaded) == len(trained) == 28
    for name, parameter in loaded.items():
        assert torch.equal(parameter, trained[f"policy.model.{name}"]), name


@pytest.mark.ci
@pytest.mark.slow
def test_validate_test_and_predict(tiny: list[str], pairs_file: str, capfd: pytest.CaptureFixture[str]) -> None:
    main(["fit", *tiny])
    saved = Path("runs/dpo/version_0/config.yaml").read_text()
    checkpoint = ["--ckpt_path", "runs/dpo/version_0/checkpoints/last.ckpt"]
    main(["validate", *tiny, *checkpoint])
    main(["test", *tiny, *checkpoint])
    assert "rewards/accuracies, lengths controlled" in capfd.readouterr().out
    main(["predict", *tiny, *checkpoint])
    lines = [json.loads(line) for line in Path("runs/dpo/version_3/predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    assert lines[0].keys() == {"source", "row", "reward_chosen", "reward_rejected", "margin"}
    assert lines[0]["source"] == pairs_file
    final = [row for row in metrics(Path("runs/dpo/version_0")) if "val/loss" in row][-1]
    assert sum(line["margin"] for line in lines) / 4 == pytest.approx(final["val/rewards/margins"], abs=2 * LOSS)
    assert Path("runs/dpo/version_0/config.yaml").read_text() == saved
    assert not list(Path("runs/dpo").glob("version_[123]/config.yaml"))


@pytest.mark.ci
@pytest.mark.slow
def test_the_command_line_beats_the_checkpoint(tiny: list[str]) -> None:
    main(["fit", *tiny, "--model.objective.beta", "0.5"])
    checkpoint = ["--ckpt_path", "runs/dpo/version_0/checkpoints/last.ckpt"]
    with pytest.warns(UserWarning, match=r"model\.objective\.beta is 0\.9, as given; .* stored 0\.5"):
        main(["fit", *tiny, *checkpoint, "--model.objective.beta", "0.9", "--trainer.max_epochs", "2"])
    config = yaml.safe_load(Path("runs/dpo/version_1/config.yaml").read_text())
    assert config["model"]["objective"]["init_args"]["beta"] == 0.9

    main(["fit", *tiny, *checkpoint, "--trainer.max_epochs", "2"])
    config = yaml.safe_load(Path("runs/dpo/version_2/config.yaml").read_text())
    assert config["model"]["objective"]["init_args"]["beta"] == 0.5, "what is not given comes from the checkpoint"


@pytest.mark.ci
@pytest.mark.slow
def test_the_same_configuration_overrides_nothing(tiny: list[str], recwarn: pytest.WarningsRecorder) -> None:
    main(["fit", *tiny, "--model.quantization", "nf4"])
    run = "runs/dpo/version_0"
    checkpoint = ["--ckpt_path", f"{run}/checkpoints/last.ckpt"]
    main(["fit", "--config", f"{run}/config.yaml", *checkpoint, "--trainer.max_epochs", "2"])
    assert [str(warning.message) for warning in recwarn if "as given" in str(warning.message)] == []


def learning_rates(version: int) -> list[float]:
    return [row["lr-AdamW"] for row in metrics(Path(f"runs/dpo/version_{version}")) if "lr-AdamW" in row]


@pytest.mark.ci
@pytest.mark.slow
def test_the_optimizers_settings_follow_the_same_rule(tiny: list[str]) -> None:
    constant = [
        *(*tiny, "--model.lr_scheduler", "constant", "--model.warmup", "0"),
        "--trainer.callbacks+=LearningRateMonitor",
    ]
    main(["fit", *constant])
    rate = constant.index("--model.optimizer.lr")
    silent = constant[:rate] + constant[rate + 2 :]
    again = ["--ckpt_path", "runs/dpo/version_0/checkpoints/last.ckpt", "--trainer.max_epochs", "2"]
    main(["fit", *silent, *again])
    assert learning_rates(1) == [0.01] * 4, "not given: from the checkpoint"
    with pytest.warns(UserWarning, match=r"model\.optimizer\.lr is 0\.002, as given; .* stored 0\.01"):
        main(["fit", *silent, *again, "--model.optimizer.lr", "0.002"])
    assert learning_rates(2) == [0.002] * 4


def test_a_checkpoint_that_is_not_there_is_noticed_first(tiny: list[str]) -> None:
    with pytest.raises(FileNotFoundError, match="--ckpt_path nowhere.ckpt"):
        main(["fit", *tiny, "--ckpt_path", "nowhere.ckpt"])


@pytest.mark.ci
@pytest.mark.slow
def test_other_batches_after_an_epoch_are_told_of(tiny: list[str]) -> None:
    main(["fit", *tiny])
    arguments = ["--ckpt_path", "runs/dpo/version_0/checkpoints/last.ckpt", "--data.batch_size", "2"]
    with pytest.warns(UserWarning, match="pairs in a batch over all processes was 4 and is now 2.* begins an epoch"):
        main(["fit", *tiny, *arguments, "--trainer.max_epochs", "2"])


@pytest.mark.ci
@pytest.mark.slow
def test_without_a_logger_and_for_a_dry_run(tiny: list[str]) -> None:
    for _ in range(2):
        main(["fit", *tiny, "--trainer.logger", "false"])
    assert Path("runs/dpo/version_1/adapter").exists()
    main(["fit", *tiny, "--trainer.fast_dev_run", "true"])
    assert {path.name for path in Path().iterdir()} == {"runs"}


@pytest.mark.ci
@pytest.mark.slow
def test_generate_from_a_checkpoint_and_from_an_adapter(tiny: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    main(["fit", *tiny])
    capfd.readouterr()
    run = "runs/dpo/version_0"
    short = ["--max_new_tokens", "5"]
    main(
        [
            "generate",
            "--ckpt_path",
            f"{run}/checkpoints/last.ckpt",
            "--held_out",
            "2",
            "--prompt",
            "the cat?",
            *short,
        ]
    )
    printed = capfd.readouterr().out
    assert "the cat?" in printed
    assert printed.count("aligned") == 3
    Path("prompts.txt").write_text("the cat?\non a mat?\n")
    for option in (
        ["--ckpt_path", f"{run}/checkpoints/last.ckpt"],
        ["--adapter", f"{run}/adapter", "--quantization", "null"],
    ):
        output = f"{len(option)}.jsonl"
        main(["generate", *option, "--prompts", "prompts.txt", "--output", output, *short])
    rows = [[json.loads(line) for line in Path(name).read_text().splitlines()] for name in ("2.jsonl", "4.jsonl")]
    assert rows[0] == rows[1], "a checkpoint and the adapter of the same run answer alike"
    assert [row["prompt"] for row in rows[0]] == ["the cat?", "on a mat?"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.objective.betta", "1"], "Did you mean beta?"),
        (["--model.grad_checkpointing", "true"], "Did you mean model.gradient_checkpointing?"),
        (["--trainer.max_epoch", "1"], "Did you mean trainer.max_epochs?"),
        (["--data.batchsize", "1"], "Did you mean data.batch_size?"),
        (["--model.compile", "maybe"], "expected one of bool, 'auto', not maybe"),
        (["--model.reference", "chached"], "'live', 'none', AnotherModel, MovingReference, not chached"),
    ],
)
def test_a_misspelled_key_or_value_gets_one_line(
    tiny: list[str], capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        main(["fit", *tiny, *arguments])
    printed = capfd.readouterr().err.strip()
    assert message in printed
    assert len(printed.splitlines()) == 1


def test_a_misspelled_key_of_a_file_gets_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    Path("x.yaml").write_text("data:\n  batchsize: 3\n")
    with pytest.raises(SystemExit):
        main(["fit", "--config", "x.yaml"])
    printed = capfd.readouterr().err.strip()
    assert "Did you mean" in printed
    assert "batch_size" in printed
    assert len(printed.splitlines()) == 1


def test_bad_values_name_key_and_remedy(tiny: list[str]) -> None:
    with pytest.raises((ValueError, SystemExit)):
        main(["fit", *tiny, "--model.objective.beta", "-1"])
    with pytest.raises(ValueError, match=r"trainer\.precision=bf16-true is not supported"):
        main(["fit", *tiny, "--trainer.precision", "bf16-true"])
    with pytest.raises(ValueError, match="Give either --ckpt_path CHECKPOINT or --adapter FOLDER"):
        main(["generate", "--prompt", "x"])


def test_callbacks_and_loggers_by_class_path(tiny: list[str]) -> None:
    main(
        [
            *("fit", *tiny, "--trainer.enable_checkpointing", "false"),
            *("--trainer.logger", "lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir", "elsewhere"),
            "--trainer.callbacks+=LearningRateMonitor",
        ]
    )
    folder = Path("elsewhere/lightning_logs/version_0")
    assert (folder / "adapter").exists()
    assert not (folder / "checkpoints").exists()
    assert any("lr-AdamW" in row for row in metrics(folder))


def test_max_steps_in_the_middle_of_an_epoch_still_ends_with_an_evaluation(tiny: list[str]) -> None:
    main(["fit", *tiny, "--trainer.max_steps", "3"])
    assert [row["step"] for row in metrics(Path("runs/dpo/version_0")) if "val/loss" in row][-1] >= 2


@pytest.mark.ci
@pytest.mark.slow
def test_the_quickstart_shortened(embedded_base: str) -> None:
    main(
        [
            *("fit", "--config", QUICKSTART, "--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1"),
            *("--data.batch_size", "2", "--data.max_response_length", "12", "--samples.num_prompts", "1"),
            *("--samples.max_new_tokens", "4", "--trainer.enable_progress_bar", "false"),
        ]
    )
    folder = Path("runs/quickstart/version_0")
    rows = metrics(folder)
    assert rows[0]["val/loss"] == pytest.approx(math.log(2), abs=LOSS)
    assert next(row["train/loss"] for row in rows if "train/loss" in row) == pytest.approx(math.log(2), abs=LOSS)
    assert (folder / "checkpoints/last.ckpt").stat().st_size < 80e6, "adapters and optimizer, never the base"


@pytest.mark.slow
def test_the_quickstart_teaches_what_it_promises(capfd: pytest.CaptureFixture[str]) -> None:
    start = time.perf_counter()
    main(["fit", "--config", QUICKSTART])
    assert time.perf_counter() - start < 300
    held_out = [row for row in metrics(Path("runs/quickstart/version_0")) if "val/loss" in row]
    assert held_out[-1]["val/rewards/accuracies"] >= 0.9


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(REPOSITORY)}


def test_top_level_help_is_quick() -> None:
    start = time.perf_counter()
    printed = subprocess.run(
        [sys.executable, "-m", "lit_dpo", "--help"], env=environment(), capture_output=True, text=True, check=True
    ).stdout
    assert time.perf_counter() - start < 8
    assert all(name in printed for name in ("fit", "validate", "test", "predict", "generate"))


def scored(folder: Path, rows: list[dict[str, Any]]) -> str:
    """The rows with scores of their own, as a file."""
    scores = [{"score_chosen": 8.0, "score_rejected": float(row % 8)} for row in range(len(rows))]
    return write_jsonl(folder / "scored.jsonl", [{**row, **score} for row, score in zip(rows, scores, strict=True)])


# Of each file of objectives one by default, and all others with ``-m slow``
FIRST = ("Sigmoid", "IPO", "APOZero", "BCOPair", "LDDPO", "Mixture", "PlackettLuce", "SimPO", "ODPO", "AOT")
FRONT_DOOR = [
    *([name] for name in FIRST),
    "WPO --model.objective.objective LDDPO --model.objective.objective.objective=IPO".split(),
    "Sigmoid --model.reference AnotherModel --model.reference.base BASE --model.reference.quantization null".split(),
    [
        *("Mixture", "--model.objective.weights", "[1.0, 0.1]", "--model.objective.objectives"),
        '[{"class_path": "SigmoidNorm", "init_args": {"beta": 3.0}}, {"class_path": "SFT"}]',
    ],
]
FRONT_DOOR_SLOW = [
    *([name] for name in OBJECTIVES if name not in FIRST),
    *("IPO --model.objective.tau 0.1".split(), "BCOPair --model.objective.shift none".split()),
    "Sigmoid --model.objective.divergence ForwardKL".split(),
    "Sigmoid --model.objective.divergence AlphaDivergence --model.objective.divergence.alpha 0.3".split(),
    "Sigmoid --model.reference live".split(),
    "Sigmoid --model.reference MovingReference --model.reference.alpha 1.0 --model.reference.tau 2".split(),
]


@pytest.mark.filterwarnings("ignore:PlackettLuce ranks only two")
@pytest.mark.parametrize(
    "objective",
    [*FRONT_DOOR, *(pytest.param(one, marks=pytest.mark.slow) for one in FRONT_DOOR_SLOW)],
    ids=lambda arguments: " ".join(arguments)[:60],
)
def test_every_objective_through_the_front_door(tiny: list[str], tiny_base: str, objective: list[str]) -> None:
    objective = [tiny_base if argument == "BASE" else argument for argument in objective]
    source = ["--data.source", scored(Path(), made_up_rows(12)), "--data.max_response_length", "null"]
    arguments = [*tiny, *source, "--trainer.max_steps", "2", "--samples.num_prompts", "0", "--run_name", "door"]
    main(["fit", "--config", QUICKSTART, *arguments, "--model.objective", *objective])
    rows = [row for row in metrics(Path("runs/door/version_0")) if "train/loss" in row]
    assert len(rows) == 2
    assert all(math.isfinite(value) for row in rows for value in row.values())
    checkpoint = "runs/door/version_0/checkpoints/last.ckpt"
    stored = torch.load(checkpoint, weights_only=True)["hyper_parameters"]["objective"]["class_path"]
    assert stored.endswith(f".{objective[0]}")
    if "WPO" in objective or "Mixture" in objective:
        main(["validate", "--ckpt_path", checkpoint, *arguments])  # the objective comes from the checkpoint


NORM = {"beta": 5.0, "label_smoothing": 0.0, "divergence": None}
WRAPPED = {"class_path": "WPO", "init_args": {"objective": {"class_path": "Sigmoid", "init_args": {"beta": 0.7}}}}


@pytest.mark.parametrize(
    ("files", "arguments", "expected"),
    [
        ([], ["--model.objective", "SigmoidNorm"], NORM),
        ([], ["--model.objective.class_path", "SigmoidNorm"], NORM),
        ([], ["--model.objective=IPO", "--model.objective.tau=0.3"], {"tau": 0.3, "divergence": None}),
        ([], ["--model.objective.beta", "0.3"], {"beta": 0.3, "label_smoothing": 0.0, "divergence": None}),
        (["SigmoidNorm"], [], NORM),
        ([{"class_path": "SigmoidNorm"}], [], NORM),
        ([{"class_path": "SigmoidNorm", "init_args": {"label_smoothing": 0.1}}], [], {**NORM, "label_smoothing": 0.1}),
        ([{"class_path": "Sigmoid", "init_args": {"beta": 0.7}}, "SigmoidNorm"], [], NORM),
        ([{"class_path": "Sigmoid", "init_args": {"beta": 0.7}}], ["--model.objective.class_path=SigmoidNorm"], NORM),
        ([WRAPPED], ["--model.objective.objective", "SigmoidNorm"], {"objective": NORM}),
        (
            [{"class_path": "LDDPO", "init_args": {"objective": WRAPPED["init_args"]["objective"]}}, "SimPO"],
            [],
            {"beta": 2.0, "gamma": 1.0, "label_smoothing": 0.0},
        ),
    ],
)
def test_an_objective_that_takes_anothers_place_brings_its_own_parameters(
    capsys: pytest.CaptureFixture[str], files: list[Any], arguments: list[str], expected: dict[str, Any]
) -> None:
    """A β of 0.1, or 0.7, is DPO's; SigmoidNorm's own is 5."""
    configs = []
    for index, objective in enumerate(files):
        Path(f"{index}.yaml").write_text(yaml.safe_dump({"model": {"base": "x", "objective": objective}}))
        configs += ["--config", f"{index}.yaml"]
    with pytest.raises(SystemExit):
        main(["fit", *(configs or ["--config", QUICKSTART]), *arguments, "--print_config"])
    found = yaml.safe_load(capsys.readouterr().out)["model"]["objective"]["init_args"]
    found = {name: value.get("init_args") if isinstance(value, dict) else value for name, value in found.items()}
    assert found == expected


def test_a_reference_that_takes_anothers_place_does_so_too(capsys: pytest.CaptureFixture[str]) -> None:
    another = {"class_path": "AnotherModel", "init_args": {"base": "y", "cached": True}}
    Path("x.yaml").write_text(yaml.safe_dump({"model": {"base": "x", "reference": another}}))
    with pytest.raises(SystemExit):
        main(["fit", "--config", "x.yaml", "--model.reference", "MovingReference", "--print_config"])
    found = yaml.safe_load(capsys.readouterr().out)["model"]["reference"]["init_args"]
    assert found == {"alpha": 0.6, "tau": 1, "cached": False}


def test_another_optimizer_keeps_the_learning_rate(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config", QUICKSTART, "--model.optimizer", "torch.optim.SGD", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["model"]["optimizer"]["init_args"]["lr"] == 4e-4


@pytest.mark.parametrize(
    ("objective", "given", "expected"),
    [
        ("SimPO --model.objective.beta 5.0", "gamma 0.9", "SimPO(beta=5.0, gamma=0.9, label_smoothing=0.0)"),
        ("RPO", "alpha 2", "RPO(\n  beta=0.1, alpha=2.0"),
        ("Mixture", "weights [2,3,1]", "Mixture(\n  weights=[2.0, 3.0, 1.0]"),
        ("WPO --model.objective.objective LDDPO", "objective.alpha 0.9", "alpha=0.9"),
        ("IPO --model.objective.tau 0.3", "divergence JensenShannon", "IPO(tau=0.3, divergence=JensenShannon())"),
    ],
)
def test_the_command_line_goes_over_what_the_checkpoint_stored(
    tiny: list[str], objective: str, given: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [*tiny, "--trainer.max_steps", "1", "--samples.num_prompts", "0"]
    main(["fit", *few, "--model.objective", *objective.split()])
    seen = []
    configured = DPOModule.configure_model
    monkeypatch.setattr(
        DPOModule, "configure_model", lambda self: seen.append(repr(self.objective)) or configured(self)
    )
    name, value = given.split()
    checkpoint = ["--ckpt_path", "runs/dpo/version_0/checkpoints/last.ckpt"]
    with pytest.warns(UserWarning, match=rf"model\.objective\.{name} is .*, as given; the checkpoint stored"):
        main(["validate", *few, *checkpoint, f"--model.objective.{name}", value])
    assert expected in seen[0]


@pytest.fixture
def checkpoint(tiny: list[str]) -> str:
    """The checkpoint of a run of one step."""
    main(["fit", *tiny, "--trainer.max_steps", "1", "--samples.num_prompts", "0", "--model.objective.beta", "0.5"])
    return "runs/dpo/version_0/checkpoints/last.ckpt"


@pytest.mark.ci
@pytest.mark.slow
def test_which_checkpoint_is_meant_is_never_guessed(tiny: list[str], checkpoint: str) -> None:
    saved = "runs/dpo/version_0/config.yaml"
    with pytest.raises(ValueError, match="ckpt_path is .* at first and None in the end: give it after the files"):
        main(["fit", "--ckpt_path", checkpoint, "--config", saved])
    for name in ("last", "best"):
        with pytest.raises(FileNotFoundError, match=f"--ckpt_path {name}: no run of the name 'other' has left one"):
            main(["validate", *tiny, "--ckpt_path", name, "--run_name", "other"])
    main(["validate", *tiny, "--ckpt_path", "null"])
    main(["predict", *tiny, "--ckpt_path", checkpoint, "--run_name", "test"])
    Path("both.yaml").write_text(f"validate:\n  ckpt_path: {checkpoint}\n")
    main(["--config", "both.yaml", "validate", *tiny])


@pytest.mark.ci
@pytest.mark.slow
def test_a_run_goes_on_where_its_name_left_off(tiny: list[str], caplog: pytest.LogCaptureFixture) -> None:
    Path("mine.yaml").write_text("ckpt_path: auto\ntrainer:\n  max_epochs: 1\n")
    options = [*tiny, "--samples.num_prompts", "0"]
    main(["fit", "--config", "mine.yaml", *options])
    assert "there is none under runs/mine yet, so the run starts" in caplog.text
    main(["fit", "--config", "mine.yaml", *options, "--trainer.max_epochs", "2"])
    first, second = (f"runs/mine/version_{number}/checkpoints" for number in (0, 1))
    assert f"--ckpt_path auto: {first}/last.ckpt" in caplog.text
    steps = [torch.load(f"{folder}/last.ckpt", weights_only=True)["global_step"] for folder in (first, second)]
    assert steps == [4, 8]
    main(["validate", *tiny, "--run_name", "mine", "--ckpt_path", "best"])
    assert f"--ckpt_path best: {second}/best-step" in caplog.text
    main(["fit", *options, "--run_name=mine", "--ckpt_path=last", "--trainer.max_epochs", "3"])
    assert f"--ckpt_path last: {second}/last.ckpt" in caplog.text
    assert yaml.safe_load(Path("runs/mine/version_3/config.yaml").read_text())["ckpt_path"] == f"{second}/last.ckpt"


def test_a_damaged_file_is_told_in_a_line(
    tiny: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("broken.yaml").write_text("model:\n  base: [x\n")
    Path("bad.ckpt").write_text("garbage")
    for arguments, message in (
        (["--config", "broken.yaml"], "error: --config broken.yaml is not valid YAML: while parsing"),
        (["--ckpt_path", "bad.ckpt"], "error: --ckpt_path bad.ckpt: the file is no checkpoint, or it is damaged"),
    ):
        monkeypatch.setattr(sys, "argv", ["lit_dpo", "fit", *tiny, *arguments])
        with pytest.raises(SystemExit):
            main()
        printed = capfd.readouterr().err
        assert message in printed
        assert "Traceback" not in printed


def test_adapters_of_another_rank_are_refused_in_words(tiny: list[str], checkpoint: str) -> None:
    with (
        pytest.warns(UserWarning, match=r"model\.lora\.r is 4, as given; the checkpoint stored 16"),
        pytest.raises(ValueError, match=r"0 of them fit the 28 of this model \(.* does not\)\. Was its model\.lora"),
    ):
        main(["validate", *tiny, "--ckpt_path", checkpoint, "--model.lora.r", "4"])


def test_another_optimizer_starts_afresh(tiny: list[str], checkpoint: str) -> None:
    other = ["--model.optimizer", "torch.optim.Adagrad", "--trainer.max_epochs", "2"]
    with (
        pytest.warns(UserWarning, match=r"optimizer is torch\.optim\.adamw\.AdamW\. .*Adagrad starts afresh"),
        pytest.warns(UserWarning, match=r"model\.optimizer is Adagrad\(.*, as given; .* stored AdamW"),
    ):
        main(["fit", *tiny, "--ckpt_path", checkpoint, *other])


def test_a_class_of_ones_own_takes_no_parameters_over_either(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "from lit_dpo import objectives\n"
    for name, beta in (("Gentle", 2.0), ("Harsh", 0.9)):
        text += (
            f"class {name}(objectives.Sigmoid):\n def __init__(self, beta: float = {beta}): super().__init__(beta)\n"
        )
    Path("of_ones_own.py").write_text(text)
    monkeypatch.syspath_prepend(".")
    first = ["--model.objective", "of_ones_own.Gentle", "--model.objective.beta", "0.7"]
    for last in ([], ["--model.objective", "of_ones_own.Harsh"], ["--model.objective", "Robust"]):
        with pytest.raises(SystemExit):
            main(["fit", *tiny, *first, *last, "--print_config"])
        beta = yaml.safe_load(capsys.readouterr().out)["model"]["objective"]["init_args"]["beta"]
        assert beta == {"": 0.7, "of_ones_own.Harsh": 0.9, "Robust": 0.01}[last[-1] if last else ""]


def test_a_class_is_the_same_whichever_module_names_it() -> None:
    one, same, other = (
        {"class_path": f"lit_dpo.{path}"} for path in ("objectives.IPO", "objectives.margins.IPO", "IPO")
    )
    assert _comparable(one) == _comparable(same)
    assert _comparable(one) != _comparable(other)


def test_half_a_quantization_is_refused(tiny: list[str]) -> None:
    arguments = ["--model.quantization", "nf4", "--model.quantization.bnb_4bit_compute_dtype", "float16"]
    with pytest.raises(ValueError, match="neither load_in_4bit nor load_in_8bit. A configuration replaces nf4"):
        main(["fit", *tiny, *arguments])


def test_a_configuration_file_may_name_the_checkpoint(tiny: list[str]) -> None:
    main(["fit", *tiny, "--model.objective", "SimPO", "--trainer.max_steps", "1"])
    Path("v.yaml").write_text("ckpt_path: runs/dpo/version_0/checkpoints/last.ckpt\n")
    main(["validate", "--config", "v.yaml", *tiny])
    values = metrics(Path("runs/v/version_0"))[-1]
    assert values["val/loss"] != pytest.approx(math.log(2), abs=1e-3), "SimPO's, not the default's"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model.objective.beta -1", "error: objective.beta must be positive and finite, not -1.0."),
        ("--model.objective WPO --model.objective.objective AOT", "error: WPO cannot wrap AOT"),
        ("--model.objective Mixture --model.objective.weights [1.0]", "error: objective.weights has 1 numbers for 3"),
        ("--model.reference MovingReference --model.reference.cached true", "error: model.reference.cached: a moving"),
        ("--model.objective Sigmoidd", "Did you mean Sigmoid?"),
        ("--model.objective DPO", "expected one of AOT, CPO, IPO"),
        ("--model.objective nowhere.Squared", "not nowhere.Squared: No module named 'nowhere'"),
        ("--model.objective.divergence JensenShanon", "Did you mean JensenShannon?"),
        ("--model.objective IPO --model.objective.beta 0.2", "'beta' is not accepted by the class that is chosen"),
    ],
)
def test_what_an_objective_refuses_is_told_in_a_line(
    tiny: list[str], arguments: str, message: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["lit_dpo", "fit", *tiny, *arguments.split()])
    with pytest.raises(SystemExit):
        main()
    (line,) = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("Seed set")]
    assert message in line


@pytest.mark.ci
@pytest.mark.slow
def test_part_of_a_stored_objective_can_be_given_anew(tiny: list[str]) -> None:
    parts = ["--model.objective.divergence", "AlphaDivergence", "--model.objective.divergence.alpha", "0.3"]
    main(["fit", *tiny, "--model.objective.beta", "0.5", *parts])
    again = ["fit", *tiny, "--ckpt_path", "runs/dpo/version_0/checkpoints/last.ckpt", "--trainer.max_epochs", "2"]
    with pytest.warns(UserWarning, match=r"model\.objective\.divergence\.alpha is 0\.4, as given; .* stored 0\.3"):
        main([*again, *parts[:-1], "0.4"])
    with pytest.warns(UserWarning, match=r"model\.objective\.divergence is .*JensenShannon"):
        main([*again, "--model.objective.divergence", "JensenShannon"])
    for version, name, beta in ((1, "AlphaDivergence", 0.5), (2, "JensenShannon", 0.5)):
        config = yaml.safe_load(Path(f"runs/dpo/version_{version}/config.yaml").read_text())
        found = config["model"]["objective"]["init_args"]
        assert found["beta"] == beta
        assert found["divergence"]["class_path"].endswith(name)


def ranked(number: int) -> list[dict[str, Any]]:
    """Rows as in the original UltraFeedback."""
    return [
        {
            "instruction": row["prompt"],
            "completions": [
                {"response": f"{text} {place}", "fine-grained_score": 5.0 - place}
                for place, text in enumerate(("a mat", "the cat", "rain", "green hills"))
            ],
        }
        for row in made_up_rows(number)
    ]


def test_ranked_lists_are_laid_beside_one_prompt(tiny: list[str], tmp_path: Path) -> None:
    source = ["--data.source", write_jsonl(tmp_path / "ranked.jsonl", ranked(12)), "--data.max_responses", "4"]
    main(["fit", *tiny, *source, "--model.objective", "PlackettLuce"])
    rows = [row for row in metrics(Path("runs/dpo/version_0")) if "train/loss" in row]
    assert rows[0]["train/loss"] == pytest.approx(math.log(24), abs=LOSS), "each of 4! orders is as likely"
    assert rows[0]["train/rewards/accuracies"] == 0.5
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]
    main(["predict", *tiny, *source, "--ckpt_path", "runs/dpo/version_0/checkpoints/last.ckpt"])


def test_what_the_data_cannot_give_is_refused_at_the_start(tiny: list[str], tmp_path: Path, pairs_file: str) -> None:
    lists = ["--data.source", write_jsonl(tmp_path / "ranked.jsonl", ranked(12)), "--data.max_responses", "3"]
    with pytest.raises(ValueError, match=r"data\.max_responses=3: Sigmoid compares two responses"):
        main(["fit", *tiny, *lists])
    with pytest.warns(UserWarning, match="PlackettLuce ranks only two responses per row"):
        main(["fit", *tiny, "--model.objective", "PlackettLuce", "--trainer.max_steps", "1"])
    with pytest.raises(ValueError, match=rf"{pairs_file}, row \d+: the row has no scores, but ODPO needs them"):
        main(["fit", *tiny, "--model.objective", "ODPO"])
    wrong = [{**row, "score_chosen": 2.0, "score_rejected": 3.0} for row in made_up_rows(12)]
    source = write_jsonl(tmp_path / "wrong.jsonl", wrong)
    with pytest.raises(ValueError, match=r"wrong\.jsonl, row \d+: the chosen response has the score 2 .* contradict"):
        main(["fit", *tiny, "--data.source", source, "--model.objective", "ScoreWeighted"])


def test_a_guard_that_stops_leaves_a_whole_run_behind(tiny: list[str]) -> None:
    guard = ["--guard.max_kl", "1e-9", "--guard.action", "stop", "--trainer.max_epochs", "3"]
    with pytest.warns(UserWarning, match=r"KL divergence .* The run stops\."):
        main(["fit", *tiny, *guard])
    folder = Path("runs/dpo/version_0")
    assert {"adapter", "checkpoints", "config.yaml", "metrics.csv", "samples.md"} <= {p.name for p in folder.iterdir()}
    steps = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert 0 < steps < 12


# Compilation would pay over so many epochs, and take longer than all else here.
LONG = ["--trainer.max_epochs", "400", "--samples.num_prompts", "0", "--model.compile", "false"]


def interrupt_once_it_trains(process: int, number: signal.Signals) -> None:
    path = Path("runs/dpo/version_0/metrics.csv").absolute()
    deadline = time.monotonic() + 90
    while not (path.exists() and len(path.read_text().splitlines()) > 4) and time.monotonic() < deadline:
        time.sleep(0.2)
    os.kill(process, number)


def assert_saved_and_goes_on(tiny: list[str]) -> None:
    assert Path("runs/dpo/version_0/adapter/adapter_model.safetensors").exists()
    step = torch.load("runs/dpo/version_0/checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert 0 < step < 1600
    arguments: list[Any] = ["--ckpt_path", "runs/dpo/version_0/checkpoints/last.ckpt"]
    epochs = str(step // 4 + 2)
    main(["fit", *tiny, *arguments, "--trainer.max_epochs", epochs, "--samples.num_prompts", "0"])
    assert torch.load("runs/dpo/version_1/checkpoints/last.ckpt", weights_only=True)["global_step"] == int(epochs) * 4


def end_by_signal(arguments: list[str], number: signal.Signals) -> int:
    """Sends a signal to a run in another process once it trains; gives its exit status."""
    process = os.fork()  # all libraries are imported already
    if not process:
        try:
            main(arguments)
        except SystemExit as end:
            os._exit(end.code)  # type: ignore[arg-type]
        finally:
            os._exit(99)
    interrupt_once_it_trains(process, number)
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status)


def test_a_run_that_is_interrupted_saves_and_goes_on_from_there(tiny: list[str]) -> None:
    assert end_by_signal(["fit", *tiny, *LONG], signal.SIGTERM) == 143
    assert_saved_and_goes_on(tiny)


@pytest.mark.ci
@pytest.mark.slow
def test_slurm_requeues_a_job_which_then_goes_on(tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    job = {"NTASKS": "1", "JOB_ID": "17", "PROCID": "0", "LOCALID": "0", "NODEID": "0", "JOB_NAME": "dpo"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    Path("bin").mkdir()
    scontrol = Path("bin/scontrol")
    scontrol.write_text('#!/bin/sh\necho "$@" > asked\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{Path('bin').absolute()}:{os.environ['PATH']}")
    assert end_by_signal(["fit", *tiny, *LONG], signal.SIGUSR1) == 138
    assert Path("asked").read_text() == "requeue 17\n"
    assert not list(Path().glob("hpc*"))
    step = torch.load("runs/dpo/version_0/checkpoints/last.ckpt", weights_only=True)["global_step"]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    more = ["--trainer.max_epochs", str(step // 4 + 2), "--samples.num_prompts", "0"]
    with monkeypatch.context() as other:
        other.setenv("SLURM_JOB_ID", "18")  # a job of the same name takes nothing of it
        main(["fit", *tiny, "--run_name", "other", "--trainer.max_steps", "1"])
        assert torch.load("runs/other/version_0/checkpoints/last.ckpt", weights_only=True)["global_step"] == 1
    main(["fit", *tiny, *more])
    last = torch.load("runs/dpo/version_1/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == (step // 4 + 2) * 4
    assert Path("runs/.slurm/17").read_text().endswith("runs/dpo/version_1/checkpoints/last.ckpt")
    first = min(row["step"] for row in metrics(Path("runs/dpo/version_1")) if "train/loss" in row)
    ends_an_epoch = step % 4 == 0  # whose last row Lightning writes again
    assert first in (step, step + 1, step - ends_an_epoch), "the steps before are not repeated"


def test_ctrl_c_saves_and_goes_on_from_there(tiny: list[str], caplog: pytest.LogCaptureFixture) -> None:
    threading.Thread(target=interrupt_once_it_trains, args=(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(SystemExit) as ended:
        main(["fit", *tiny, *LONG])
    assert ended.value.code == 1
    assert "Resume with: --ckpt_path runs/dpo/version_0/checkpoints/last.ckpt" in caplog.text
    assert_saved_and_goes_on(tiny)


def in_two_processes(arguments: list[str], strategy: str, capfd: pytest.CaptureFixture[str]) -> str:
    """Trains in two processes, and gives what they print as errors. Those that are forked need no start."""
    two = ["--trainer.devices", "2", "--trainer.strategy", strategy, "--data.batch_size", "2"]
    if strategy == "ddp":
        command = [sys.executable, "-m", "lit_dpo", "fit", *arguments, *two]
        return subprocess.run(
            command, env=environment(), check=True, capture_output=True, timeout=240, text=True
        ).stderr
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = lambda message, *_, **__: print(message, file=sys.stderr)
        main(["fit", *arguments, *two])
    return capfd.readouterr().err


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_fork", pytest.param("ddp", marks=pytest.mark.slow)])
def test_two_processes_give_one_process_numbers(
    tiny: list[str], strategy: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of an objective and a reference that keep running numbers, too."""
    running = ["--model.objective", "BCOPair", "--model.objective.beta", "0.5", "--model.reference", "MovingReference"]
    common = [*tiny, *running, "--guard.max_kl", "1e-9", "--trainer.max_epochs", "2"]
    printed = in_two_processes(common, strategy, capfd)
    assert printed.count("the KL divergence from the reference is") == 1, "both processes agree, one tells"
    with pytest.warns(UserWarning, match="the KL divergence from the reference is"):
        main(["fit", *common])
    states = [torch.load(f"runs/dpo/version_{v}/checkpoints/last.ckpt", weights_only=True) for v in (0, 1)]
    seen = [state["state_dict"]["objective.seen"].tolist() for state in states]
    assert seen[0] == pytest.approx(seen[1], rel=2 * STEPS * TINY)
    assert seen[0][1] == 2 * 2 * 16, "the rewards of two epochs of 16 pairs"
    assert_same(*(logged(Path(f"runs/dpo/version_{version}")) for version in (0, 1)), 2 * STEPS * TINY)
