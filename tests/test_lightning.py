"""A Lightning team's own tools, beside our two parts."""

import contextlib
import io
import logging
import os
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.tuner import Tuner

from lit_dpo import DPOModule, PreferenceDataModule
from lit_dpo.callbacks import AdapterAverage, AdapterExport, LastCheckpoint, ParameterSummary
from lit_dpo.callbacks.model_summary import count
from lit_dpo.cli.app import DPOCLI, main
from lit_dpo.cli.config_file import without_secrets
from lit_dpo.cli.defaults import default_loggers
from tests.cli.test_cli import metrics, tiny  # noqa: F401
from tests.conftest import REPOSITORY
from tests.test_module import QUIET, adapters, data, fit, module
from tests.tiny import made_up_rows, write_jsonl

pytestmark = [
    pytest.mark.usefixtures("in_tmp"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# --- an average of the adapters ---------------------------------------------------------------------------------------


class History(Callback):
    """The trained adapters after each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        self.steps.append({name: value.clone() for name, value in adapters(module).items()})


def averaged(base: str, pairs: str, root: Path, epochs: int, ckpt: Path | None = None) -> tuple[DPOModule, History]:
    model, history = module(base, quantization="nf4"), History()
    average = AdapterAverage(decay=0.5)
    callbacks = [history, average, AdapterExport(), LastCheckpoint()]
    options = {"max_epochs": epochs, "default_root_dir": root, "callbacks": callbacks, "enable_checkpointing": True}
    if ckpt is None:
        fit(model, data(pairs), **options)
    else:
        Trainer(**{**QUIET, "accelerator": "cpu", **options}).fit(model, data(pairs), ckpt_path=ckpt, weights_only=True)
    return model, history


def test_the_average_is_evaluated_saved_and_exported(tiny_base: str, pairs_file: str, tmp_path: Path) -> None:
    """Of a base in 4 bits, whose packed codes no average touches."""
    before = module(tiny_base, quantization="nf4")
    fit(before, data(pairs_file), max_epochs=1, limit_train_batches=0)
    start = adapters(before)
    model, history = averaged(tiny_base, pairs_file, tmp_path, 2)
    expected = {name: value.clone() for name, value in start.items()}
    for number, step in enumerate(history.steps):
        decay = min(0.5, (1 + number) / (10 + number))
        expected = {name: decay * value + (1 - decay) * step[name] for name, value in expected.items()}
    assert len(history.steps) == 8
    for name, value in adapters(model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)
    packed = [p for p in model.parameters() if p.dtype == torch.uint8]
    assert packed
    assert all(map(torch.equal, packed, [p for p in before.parameters() if p.dtype == torch.uint8]))

    checkpoint = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    loaded = DPOModule.load_from_checkpoint(tmp_path / "checkpoints/last.ckpt", base=tiny_base, weights_only=True)
    loaded.configure_model()
    for name, value in adapters(loaded).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)
    assert torch.equal(checkpoint["adapter_average"]["current"][name], history.steps[-1][name])


def test_an_average_resumes_bit_for_bit(tiny_base: str, pairs_file: str, tmp_path: Path) -> None:
    whole, _ = averaged(tiny_base, pairs_file, tmp_path / "whole", 2)
    averaged(tiny_base, pairs_file, tmp_path / "first", 1)
    resumed, _ = averaged(tiny_base, pairs_file, tmp_path / "then", 2, tmp_path / "first/checkpoints/last.ckpt")
    expected = adapters(whole)
    assert all(torch.equal(value, expected[name]) for name, value in adapters(resumed).items())
    with pytest.warns(UserWarning, match="weights are those of AdapterAverage, and this run averages none"):
        Trainer(**{**QUIET, "accelerator": "cpu", "max_epochs": 2}).fit(
            module(tiny_base, quantization="nf4"),
            data(pairs_file),
            ckpt_path=tmp_path / "first/checkpoints/last.ckpt",
            weights_only=True,
        )


def test_an_average_in_the_wrong_place_is_refused(tiny_base: str, pairs_file: str) -> None:
    for callbacks, message in (
        ([AdapterExport(), AdapterAverage()], "AdapterAverage must come before AdapterExport"),
        ([AdapterAverage(), ModelCheckpoint(save_weights_only=True)], "would leave AdapterAverage's average out"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(module(tiny_base), data(pairs_file), callbacks=callbacks, enable_checkpointing=True)


def test_an_average_begins_anew_in_a_second_fit(tiny_base: str, pairs_file: str) -> None:
    """Trained weights, evaluations and averages do not change places."""
    average, seen = AdapterAverage(decay=0.5), []
    model = module(tiny_base)
    for _ in range(2):
        history = History()
        fit(model, data(pairs_file), callbacks=[history, average], val_check_interval=0.5)
        seen.append(history.steps)
    alone = module(tiny_base)
    first = History()
    fit(alone, data(pairs_file), callbacks=[first, AdapterAverage(decay=0.5)])
    second = History()
    fit(alone, data(pairs_file), callbacks=[second, AdapterAverage(decay=0.5)])
    for steps, expected in zip(seen, (first.steps, second.steps), strict=True):
        for one, other in zip(steps, expected, strict=True):
            assert all(torch.equal(value, other[name]) for name, value in one.items())


# --- the Trainer's tools ----------------------------------------------------------------------------------------------


class Rows(Callback):
    """Rows of each batch."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        self.batches.append([row for _, row in batch.origins])


def test_overfit_batches_are_the_same_in_each_epoch(tiny_base: str, pairs_file: str) -> None:
    rows = Rows()
    fit(module(tiny_base), data(pairs_file), overfit_batches=2, max_epochs=3, callbacks=[rows])
    assert len(rows.batches) == 6
    assert rows.batches[:2] == rows.batches[2:4] == rows.batches[4:]


@pytest.mark.ci
@pytest.mark.slow
def test_the_tuner_finds_a_rate_and_a_size_of_batches(tiny_base: str, pairs_file: str) -> None:
    adam = {"optimizer": torch.optim.AdamW}
    model, pairs = module(tiny_base, **adam), data(pairs_file, batch_size=1)
    trainer = Trainer(**{**QUIET, "accelerator": "cpu", "max_epochs": 3})
    found = Tuner(trainer).lr_find(model, datamodule=pairs, num_training=24, min_lr=1e-6, early_stop_threshold=None)
    assert found is not None
    assert model.lr == found.suggestion()
    trainer.fit(model, pairs)
    assert trainer.optimizers[0].param_groups[0]["lr"] == model.lr, "the schedule is constant"

    model, pairs = module(tiny_base), data(pairs_file, batch_size=1)
    trainer = Trainer(**{**QUIET, "accelerator": "cpu", "max_epochs": 1})
    assert Tuner(trainer).scale_batch_size(model, datamodule=pairs, max_trials=2, steps_per_trial=1) == 4
    rows = Rows()
    trainer.callbacks.append(rows)  # type: ignore[attr-defined]
    trainer.fit(model, pairs)
    assert [len(batch) for batch in rows.batches] == [4] * 4


def test_parameters_are_counted_as_what_they_stand_for(
    tiny_base: str, pairs_file: str, caplog: pytest.LogCaptureFixture
) -> None:
    counts = []
    for quantization in ("nf4", None):
        model = module(tiny_base, quantization=quantization)
        with caplog.at_level(logging.INFO):
            fit(
                model,
                data(pairs_file),
                limit_train_batches=1,
                limit_val_batches=0,
                enable_model_summary=True,
                callbacks=[ParameterSummary(max_depth=3)],
            )
        counts.append(count(model))
    assert counts[0] == counts[1] == sum(p.numel() for p in model.parameters())
    assert "Total estimated model params size (MB)" in caplog.text


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:When using the `ThroughputMonitor`")  # which cannot know the FLOPs of a batch
def test_many_tools_at_once(tiny: list[str]) -> None:  # noqa: F811
    """Beside the callbacks of a file."""
    listed = [{"class_path": "LearningRateMonitor"}]
    Path("file.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": listed}}), encoding="utf-8")
    monitors = [
        *("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "val/loss"),
        *("--trainer.callbacks.min_delta", "9"),
        *("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitor", "val/rewards/accuracies"),
        *("--trainer.callbacks.mode", "max", "--trainer.callbacks+=DeviceStatsMonitor"),
        *("--trainer.callbacks+=lit_dpo.callbacks.AdapterAverage", "--trainer.max_time", "00:01:00:00"),
        *("--trainer.callbacks+=Timer", "--trainer.callbacks.interval", "step"),
        *("--trainer.callbacks+=ThroughputMonitor", "--trainer.callbacks.batch_size_fn", "builtins.len"),
        *("--trainer.val_check_interval", "0.5", "--trainer.max_epochs", "50", "--trainer.detect_anomaly", "true"),
        *("--trainer.enable_model_summary", "true", "--trainer.profiler", "simple"),
    ]
    main(["fit", "--config", "file.yaml", *tiny, "--run_name", "many", *monitors])
    folder = Path("runs/many/version_0")
    rows = metrics(folder)
    assert any("lr-AdamW" in row for row in rows)
    last = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] < 100, "it stopped early, in the middle of an epoch or not"
    assert last["global_step"] == max(row["step"] for row in rows if "val/loss" in row) + 1
    assert len(list((folder / "checkpoints").glob("*.ckpt"))) == 3
    for command in ("validate", "test"):
        main([command, "--config", str(folder / "config.yaml"), "--ckpt_path", str(folder / "checkpoints/last.ckpt")])


def test_barebones(tiny: list[str]) -> None:  # noqa: F811
    main(["fit", *tiny, "--trainer.barebones", "true"])
    assert not Path("runs").exists()


def test_a_dry_run_leaves_the_working_folder_as_it_is(tiny: list[str]) -> None:  # noqa: F811
    Path("config.yaml").write_text("trainer: {fast_dev_run: true}\n")
    main(["fit", *tiny, "--config", "config.yaml"])
    assert [path.name for path in Path().iterdir()] == ["config.yaml"]


def test_environment_variables(tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setenv("PL_FIT__TRAINER__MAX_STEPS", "1")
    monkeypatch.setenv("PL_FIT__MODEL__OBJECTIVE", "{class_path: IPO, init_args: {tau: 0.3}}")
    main(["fit", *tiny, "--seed_everything", "7"])
    config = yaml.safe_load(Path("runs/dpo/version_0/config.yaml").read_text())
    assert config["trainer"]["max_steps"] == 1
    assert config["model"]["objective"]["init_args"]["tau"] == 0.3
    assert config["data"]["seed"] == 7, "the seed of everything is that of the data, too"
    main(["fit", *tiny, "--seed_everything", "7", "--data.seed", "42"])
    assert yaml.safe_load(Path("runs/dpo/version_1/config.yaml").read_text())["data"]["seed"] == 42, (
        "unless it is given"
    )
    with monkeypatch.context() as environment:
        environment.setenv("PL_FIT__CKPT_PATH", "runs/dpo/version_0/checkpoints/last.ckpt")
        environment.setenv("PL_FIT__TRAINER__MAX_STEPS", "2")
        main(["fit", *tiny, "--seed_everything", "7"])
    assert torch.load("runs/dpo/version_2/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2
    monkeypatch.setenv("PL_FIT__TRAINER__MAX_STEP", "1")
    with pytest.raises(ValueError, match="PL_FIT__TRAINER__MAX_STEP is no option of fit. Did you mean PL_FIT"):
        main(["fit", *tiny])
    monkeypatch.delenv("PL_FIT__TRAINER__MAX_STEP")
    with monkeypatch.context() as nested:
        nested.setenv("PL_FIT__MODEL__OBJECTIVE__BETA", "0.2")
        with pytest.raises(ValueError, match="An argument of a class is given in the variable of the class, as YAML"):
            main(["fit", *tiny])
    monkeypatch.setenv("PL_TRAINER__MAX_STEPS", "1")
    with pytest.raises(ValueError, match="PL_TRAINER__MAX_STEPS belongs to no command. Did you mean PL_FIT__"):
        main(["fit", *tiny])


def test_runs_that_start_at_the_same_time_have_folders_of_their_own() -> None:
    versions = [default_loggers("same")[0] for _ in range(2)]
    first, second = (str(logger.log_dir) for logger in versions)
    assert (first, second) == ("runs/same/version_0", "runs/same/version_1")


def test_a_logger_of_a_fixed_version_goes_on_with_its_own_run(tiny: list[str]) -> None:  # noqa: F811
    logger = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "a", "--trainer.logger.version", "b"]
    main(["fit", *tiny, *logger])
    folder = Path("a/lightning_logs/b")
    before = (folder / "metrics.csv").read_text()
    with pytest.raises(ValueError, match="belongs to another run"):
        main(["fit", *tiny, *logger])
    resumed = ["--ckpt_path", str(folder / "checkpoints/last.ckpt"), "--trainer.max_epochs", "2"]
    main(["fit", *tiny, *logger, *resumed])
    assert (folder / "metrics_1.csv").read_text() == before
    assert (folder / "config_1.yaml").exists()
    assert max(row["step"] for row in metrics(folder)) == 7


# --- security ---------------------------------------------------------------------------------------------------------


class KeyLogger(__import__("lightning.pytorch.loggers").pytorch.loggers.CSVLogger):  # type: ignore[misc]
    """A logger that takes a key."""

    def __init__(self, save_dir: str, api_key: str | None = None) -> None:
        super().__init__(save_dir)


def test_secrets_are_written_nowhere(tiny: list[str]) -> None:  # noqa: F811
    logger = ["--trainer.logger", "tests.test_lightning.KeyLogger", "--trainer.logger.save_dir", "a"]
    with pytest.warns(UserWarning, match=r"does not hold the secret trainer\.logger\.init_args\.api_key"):
        main(["fit", *tiny, *logger, "--trainer.logger.api_key", "very-secret"])
    assert Path("a/lightning_logs/version_0/config.yaml").exists()
    assert not [path for path in Path().rglob("*") if path.is_file() and b"very-secret" in path.read_bytes()]


def test_what_counts_as_a_secret() -> None:
    found = {
        "access_token": "a",
        "tokenizer": "b",
        "max_tokens": 3,
        "pad_token": "<pad>",
        "uri": "https://me:pw@host/x",
        "list": [{"password": "c"}],
    }
    with pytest.warns(UserWarning, match="does not hold the secret access_token, list.password, uri"):
        kept = without_secrets(Namespace(**found))
    assert (kept.access_token, kept.pad_token) == (None, "<pad>")
    assert (kept.tokenizer, kept.max_tokens, kept.uri) == ("b", 3, "https://***@host/x")
    assert kept.list[0]["password"] is None
    assert found["list"][0]["password"] == "c"  # type: ignore[index]


def test_a_base_that_is_a_pickle_is_refused_unless_asked(
    tiny_base: str, pairs_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    folder = tmp_path / "pickle"
    folder.mkdir()
    for path in Path(tiny_base).iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    torch.save(load_file(f"{tiny_base}/model.safetensors"), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"A \.bin file is a pickle.*LIT_DPO_ALLOW_PICKLE=1"):
        fit(module(str(folder)), data(pairs_file), limit_train_batches=1)
    monkeypatch.setenv("LIT_DPO_ALLOW_PICKLE", "1")
    fit(module(str(folder)), data(pairs_file), limit_train_batches=1)


# --- a team's own programs --------------------------------------------------------------------------------------------


class OwnModule(DPOModule):
    """A module with an argument of its own."""

    def __init__(self, base: str, bonus: float = 0.0, **options: Any) -> None:
        super().__init__(base, **options)
        self.bonus = bonus

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) + self.bonus


class OwnerModule(OwnModule):
    """A second one, with a function that no checkpoint can hold."""

    def __init__(self, base: str, folder: Path = Path("x"), rate: Any = None, **options: Any) -> None:
        super().__init__(base, **options)
        self.folder, self.rate = folder, rate


def test_arguments_of_all_derived_classes_are_stored(tiny_base: str) -> None:
    with pytest.warns(UserWarning, match="OwnerModule: the argument rate is no plain value"):
        made = OwnerModule(tiny_base, bonus=0.5, folder=Path("y"), rate=lambda step: step)
    assert (made.hparams["bonus"], made.hparams["folder"]) == (0.5, "y")
    assert "rate" not in made.hparams


class OwnData(PreferenceDataModule):
    """A data module with an argument of its own."""

    def __init__(self, source: str, note: str = "none", **options: Any) -> None:
        super().__init__(source, **options)
        self.note = note


def test_classes_of_ones_own_in_our_command_line(tiny: list[str]) -> None:  # noqa: F811
    DPOCLI(OwnModule, OwnData, args=["fit", *tiny, "--model.bonus", "0.25", "--data.note", "mine"])
    checkpoint = torch.load("runs/dpo/version_0/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["bonus"] == 0.25
    loaded = OwnModule.load_from_checkpoint("runs/dpo/version_0/checkpoints/last.ckpt", weights_only=True)
    assert loaded.bonus == 0.25


def test_our_classes_in_a_command_line_of_ones_own(tiny: list[str]) -> None:  # noqa: F811
    class OwnCLI(LightningCLI):
        def add_arguments_to_parser(self, parser: Any) -> None:
            parser.link_arguments("model.base", "data.tokenizer")

    arguments = [argument for argument in tiny if True]
    for key in ("--samples.num_prompts", "--samples.max_new_tokens", "--guard.max_drop"):
        place = arguments.index(key)
        del arguments[place : place + 2]
    arguments += ["--trainer.logger", "false", "--trainer.enable_checkpointing", "false", "--trainer.max_steps", "1"]
    place = arguments.index("--model.optimizer.lr")
    del arguments[place : place + 2]
    cli = OwnCLI(
        DPOModule,
        PreferenceDataModule,
        args=["fit", *arguments],
        auto_configure_optimizers=False,
        save_config_callback=None,
    )
    assert cli.trainer.global_step == 1
    by_path = ["--model", "tests.test_lightning.OwnModule", "--data", "tests.test_lightning.OwnData"]
    options = [argument for argument in arguments if not argument.startswith("--trainer.enable_progress")]
    LightningCLI(
        DPOModule,
        PreferenceDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        args=["fit", *by_path, *_without_value(arguments, options), "--trainer.enable_progress_bar", "false"],
        auto_configure_optimizers=False,
        save_config_callback=None,
    )


def _without_value(arguments: list[str], options: list[str]) -> list[str]:
    place = arguments.index("--trainer.enable_progress_bar")
    return arguments[:place] + arguments[place + 2 :] if options != arguments else arguments


def example(heading: str) -> str:
    """The Python of a heading of the page about configuration."""
    page = (REPOSITORY / "configs/README.md").read_text(encoding="utf-8")
    return re.search(rf"^#+ {heading}$.*?```python\n(.*?)```", page, re.M | re.S)[1]  # type: ignore[index]


@pytest.mark.parametrize("heading", ["Your own command line", "Your own loop with Fabric"])
def test_the_examples_run(tiny_base: str, heading: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(Path("pairs.jsonl"), made_up_rows(20))
    Path("own.py").write_text(example(heading).replace("Qwen/Qwen2-0.5B-Instruct", tiny_base), encoding="utf-8")
    assert len(Path("own.py").read_text().splitlines()) <= 32
    command = [
        "own.py",
        "fit",
        "--model.base",
        tiny_base,
        "--model.quantization",
        "null",
        "--data.source",
        "pairs.jsonl",
    ]
    command += ["--data.val_size", "4", "--trainer.max_steps", "2", "--trainer.accelerator", "cpu"]
    command += ["--trainer.precision", "32-true", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
    monkeypatch.setattr(sys, "argv", command if "command" in heading else ["own.py"])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        runpy.run_path("own.py", run_name="__main__")
    assert "loss" in printed.getvalue()


@pytest.mark.slow
def test_the_example_of_ray(tiny_base: str) -> None:
    """A real run on a local Ray."""
    ray = pytest.importorskip("ray")
    write_jsonl(Path("pairs.jsonl"), made_up_rows(20))
    code = example("Ray").replace("Qwen/Qwen2-0.5B-Instruct", tiny_base)
    code = code.replace('"pairs.jsonl"', repr(str(Path("pairs.jsonl").absolute())))
    Path("own.py").write_text(code.replace("use_gpu=True", "use_gpu=False"), encoding="utf-8")
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": path}})
    try:
        runpy.run_path("own.py", run_name="__main__")
    finally:
        ray.shutdown()


def test_model_and_data_may_have_different_revisions(tiny: list[str]) -> None:  # noqa: F811
    """Lightning merges the hyper-parameters of both for the loggers."""
    main(["fit", *tiny, "--model.revision", "main", "--trainer.max_steps", "1"])
    assert Path("runs/dpo/version_0/adapter").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (["--model.adapter", "nowhere"], r"model\.adapter nowhere: there is no adapter of this name"),
        (["--model.lora.lora_dropout", "1e9"], r"model\.lora does not fit the base: dropout probability"),
        (["--model.optimizer.lr", "null"], r"model\.optimizer does not take its settings"),
    ],
)
def test_settings_that_libraries_refuse(tiny: list[str], setting: list[str], message: str) -> None:  # noqa: F811
    with pytest.raises(ValueError, match=message):
        main(["fit", *tiny, *setting])
