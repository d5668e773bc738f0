"""Every recipe parses and builds module, data module and trainer, without loading a model."""

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.accelerators import CUDAAccelerator

from lit_dpo import DPOModule, PreferenceDataModule
from lit_dpo.cli import DPOCLI
from tests.conftest import REPOSITORY

RECIPES = sorted((REPOSITORY / "configs").glob("*.yaml"))


class Unrun(DPOCLI):
    """Builds everything and runs nothing."""

    def _run_subcommand(self, subcommand: str) -> None: ...


def build(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["lit_dpo"])
    return Unrun(
        ["fit", *arguments], model_class=DPOModule, datamodule_class=PreferenceDataModule, seed_everything_default=1
    )


def test_the_recipes_are_there() -> None:
    assert [path.stem for path in RECIPES] == [
        "quickstart",
        "ultrafeedback_qwen2-0.5b_t4",
        "ultrafeedback_smollm2-135m",
        "ultrafeedback_zephyr-7b",
    ]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_can_be_built(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CUDAAccelerator, "is_available", staticmethod(lambda: False))
    on_cpu = ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
    cli = build(monkeypatch, "--config", str(path), *on_cpu)
    config = yaml.safe_load(path.read_text())
    assert cli.model.base == config["model"]["base"]
    lora = config["model"].get("lora", {}).get("init_args", {})
    assert {key: getattr(cli.model.lora, key) for key in lora if key != "target_modules"} == {
        key: value for key, value in lora.items() if key != "target_modules"
    }
    assert set(lora.get("target_modules", [])) <= set(cli.model.lora.target_modules)
    assert cli.model.quantization.load_in_4bit


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_how_to_run_it_and_why(path: Path) -> None:
    text = path.read_text()
    assert f"python -m lit_dpo fit --config configs/{path.name}" in text
    assert text.count("#") > 6


def test_the_zephyr_recipe_is_the_published_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = yaml.safe_load((REPOSITORY / "configs/ultrafeedback_zephyr-7b.yaml").read_text())
    assert config["trainer"]["accumulate_grad_batches"] * config["data"]["batch_size"] == 16
    config = yaml.safe_load((REPOSITORY / "configs/ultrafeedback_qwen2-0.5b_t4.yaml").read_text())
    assert config["trainer"]["accumulate_grad_batches"] * config["data"]["batch_size"] == 16
