"""RunReport: what it keeps in any kind of run, and that it never spoils one."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file

from lit_dpo import DPOModule, PreferenceDataModule
from lit_dpo.callbacks import RunReport
from lit_dpo.cli.app import main
from lit_dpo.report.evidence import read_lines
from tests.cli.test_cli import tiny  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:.*")


class Warns(Callback):
    """Warns twice of the same, once of something else."""

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        warnings.simplefilter("always")
        warnings.warn(f"strange {min(trainer.global_step, 1)}", stacklevel=1)


def test_warnings_are_kept_with_their_step(tiny: list[str]) -> None:  # noqa: F811
    shown = warnings.showwarning
    run = ["fit", *tiny, "--trainer.max_steps", "3", "--trainer.callbacks+=tests.callbacks.test_report.Warns"]
    main([*run, "--run_name", "w"])
    assert warnings.showwarning is shown, "put back"
    kept = {line["message"]: line for line in read_lines(Path("runs/w/version_0/evidence/warnings.jsonl"))}
    assert (kept["strange 0"]["count"], kept["strange 0"]["step"]) == (1, 0)
    assert (kept["strange 1"]["count"], kept["strange 1"]["step"]) == (2, 1)
    assert "strange 1" in Path("runs/w/version_0/report.html").read_text()


@pytest.mark.parametrize(
    "options",
    [
        ["--model.objective", "SimPO"],
        ["--model.objective", "IPO", "--model.reference", "live", "--trainer.accumulate_grad_batches", "2"],
        ["--model.lora", "null", "--model.quantization", "null"],
        ["--trainer.limit_val_batches", "1", "--trainer.num_sanity_val_steps", "0"],
    ],
)
def test_any_kind_of_run_has_a_report(tiny: list[str], options: list[str]) -> None:  # noqa: F811
    main(["fit", *tiny, "--trainer.max_steps", "2", "--run_name", "k", "--guard.max_drop", "null", *options])
    content = json.loads(Path("runs/k/version_0/report.json").read_text())["runs"][0]
    assert content["histograms"]["rewards/margins"]["after"]
    assert content["tokens"]
    assert "reference_mismatch" not in {one["code"] for one in content["verdicts"]}
    if "SimPO" in options:
        assert content["tokens"][0]["chosen"]["reference"][0] is None
    if "--trainer.num_sanity_val_steps" in options:
        assert content["histograms"]["rewards/margins"]["before"] is None


@pytest.mark.ci
@pytest.mark.slow
def test_the_training_is_the_same_with_it(tiny: list[str]) -> None:  # noqa: F811
    run = ["fit", *tiny, "--trainer.max_steps", "3", "--model.lora.lora_dropout", "0.1"]
    main([*run, "--run_name", "with"])
    main([*run, "--run_name", "without", "--report.num_pairs", "0", "--report.audit", "false"])
    first, second = (
        load_file(f"runs/{name}/version_0/adapter/adapter_model.safetensors") for name in ("with", "without")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not Path("runs/without/version_0/evidence/audit.json").exists()
    assert read_lines(Path("runs/without/version_0/evidence/tokens.jsonl")) == []


def test_a_run_that_goes_on_keeps_what_was_measured_before(tiny: list[str]) -> None:  # noqa: F811
    main(["fit", *tiny, "--trainer.max_steps", "2", "--run_name", "r"])
    ckpt = "runs/r/version_0/checkpoints/last.ckpt"
    main(["fit", *tiny, "--trainer.max_steps", "4", "--run_name", "r", "--ckpt_path", ckpt])
    first, second = (read_lines(Path(f"runs/r/version_{n}/evidence/held_out.jsonl")) for n in (0, 1))
    assert [line["before"] for line in second] == [line["before"] for line in first]
    assert second[0]["before"] is not None
    assert [line["after"] for line in second] != [line["after"] for line in first]
    assert json.loads(Path("runs/r/version_1/evidence/run.json").read_text())["margins_from_step"] == 2
    with pytest.raises(ValueError, match="the run went on from step 2"):
        main(["suspects", "--ckpt_path", "runs/r/version_1/checkpoints/last.ckpt", "--method", "dynamics"])


def test_in_a_script_of_ones_own(tiny_base: str, pairs_file: str, tmp_path: Path) -> None:
    trainer = Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=CSVLogger(tmp_path, name="own"),
        callbacks=[RunReport(num_pairs=1)],
        enable_progress_bar=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
    )
    trainer.fit(DPOModule(tiny_base), PreferenceDataModule(pairs_file, val_size=4, batch_size=4))
    page = (tmp_path / "own/version_0/report.html").read_text()
    assert "the run was not started from the command line" in page
    assert "no summary" in page
    assert "train/loss" in page


def test_a_report_that_fails_spoils_nothing(tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    def fails(*_: Any) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr("lit_dpo.callbacks.report.write_report", fails)
    with pytest.warns(UserWarning, match=r"report\.html cannot be written: RuntimeError: no room"):
        main(["fit", *tiny, "--trainer.max_steps", "1", "--run_name", "f"])
    assert Path("runs/f/version_0/adapter").exists()


def test_a_dry_run_leaves_nothing(tiny: list[str]) -> None:  # noqa: F811
    main(["fit", *tiny, "--trainer.fast_dev_run", "1", "--run_name", "d"])
    assert not list(Path().rglob("evidence"))
    assert not list(Path().rglob("report.html"))
