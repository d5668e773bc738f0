"""Runs that train all weights: reference, resume, export, two processes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lit_dpo.cli.app import main
from tests.closeness import TINY, assert_same
from tests.tiny import made_up_rows, write_jsonl

pytestmark = pytest.mark.filterwarnings("ignore:.*")
STEPS = 8  # of two epochs: each adds rounding of its own
COMMON = ["--model.lora", "null", "--model.quantization", "null", "--trainer.accelerator", "cpu"]
COMMON += ["--trainer.enable_progress_bar", "false", "--data.batch_size", "4", "--trainer.max_epochs", "2"]
COMMON += ["--data.val_size", "4", "--model.lr_scheduler", "constant", "--model.warmup", "0"]
COMMON += ["--model.optimizer.lr", "0.001"]


@pytest.fixture
def arguments(tiny_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    source = write_jsonl(tmp_path / "pairs.jsonl", made_up_rows(20))
    return ["fit", "--model.base", tiny_base, "--data.source", source, *COMMON, "--samples.num_prompts", "1"]


def weights(run: str) -> dict[str, torch.Tensor]:
    state: dict[str, Any] = torch.load(f"runs/{run}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    return state


@pytest.mark.ci
@pytest.mark.slow
def test_references_resume_and_export(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main([*arguments, "--run_name", "whole"])
    summary = json.loads(Path("runs/whole/version_0/summary.json").read_text())
    assert summary["before"]["val/loss"] == pytest.approx(0.693147, abs=1e-5), "the reference is the initial policy"
    assert summary["after"]["val/loss"] < 0.69
    main([*arguments, "--run_name", "live", "--model.reference", "live"])
    assert_same(weights("live/version_0"), weights("whole/version_0"), STEPS * TINY)

    main([*arguments, "--run_name", "cut", "--trainer.max_steps", "3"])
    main([*arguments, "--run_name", "cut", "--ckpt_path", "last"])
    own, again = weights("whole/version_0"), weights("cut/version_1")
    assert own.keys() == again.keys()
    assert all(torch.equal(own[name], again[name]) for name in own), "to the last bit"

    saved = load_file("runs/whole/version_0/model/model.safetensors")
    assert torch.equal(saved["model.norm.weight"], own["policy.model.base.model.norm.weight"].bfloat16())
    checkpoint = ["--ckpt_path", "runs/whole/version_0/checkpoints/last.ckpt", "--progress_bar", "false"]
    with pytest.raises(ValueError, match="--merge is for adapters: all weights of this model were trained"):
        main(["export", *checkpoint, "--output", "out", "--merge", "original"])
    capsys.readouterr()
    main(["export", *checkpoint, "--output", "out", "--num_pairs", "0"])
    assert "all weights, in float32" in Path("out/README.md").read_text()
    main(["generate", *checkpoint[:2], "--held_out", "1", "--max_new_tokens", "4"])
    assert "aligned" in capsys.readouterr().out


@pytest.mark.ci
@pytest.mark.slow
def test_two_processes_train_what_one_does(arguments: list[str]) -> None:
    main([*arguments, "--run_name", "one"])
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp_fork", "--data.batch_size", "2"]
    main([*arguments, *two, "--run_name", "two"])
    assert_same(weights("two/version_0"), weights("one/version_0"), 2 * STEPS * TINY)
