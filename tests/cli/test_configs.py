"""Every recipe parses and builds module, data module and trainer, without loading a model."""

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.accelerators import CUDAAccelerator

from lit_dpo.cli.app import DPOCLI, OPTIONS
from tests.conftest import REPOSITORY

RECIPES = sorted((REPOSITORY / "configs").glob("*.yaml"))


class Unrun(DPOCLI):
    """Builds everything and runs nothing."""

    def _run_subcommand(self, subcommand: str) -> None: ...


def build(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["lit_dpo"])
    return Unrun(args=["fit", *arguments], **OPTIONS)


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
    assert cli.model.quantization == "nf4"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_how_to_run_it_and_why(path: Path) -> None:
    text = path.read_text()
    assert f"python -m lit_dpo fit --config configs/{path.name}" in text
    assert text.count("#") > 6


def recipe(name: str) -> tuple[Any, Any, Any]:
    config = yaml.safe_load((REPOSITORY / f"configs/{name}.yaml").read_text())
    assert config["trainer"]["accumulate_grad_batches"] * config["data"]["batch_size"] == 16
    return config["trainer"], config["model"], config["data"]


def test_the_zephyr_recipe_is_the_published_one() -> None:
    _, model, data = recipe("ultrafeedback_zephyr-7b")
    lora = model["lora"]["init_args"]
    assert (lora["r"], lora["lora_alpha"]) == (128, 128)
    assert model["objective"]["init_args"]["beta"] == 0.01
    assert model["optimizer"]["init_args"]["lr"] == 5e-6
    assert (model["lr_scheduler"], model["warmup"], data["max_length"]) == ("cosine", 0.1, 1024)


def test_the_t4_recipe_fits_a_t4() -> None:
    trainer, model, data = recipe("ultrafeedback_qwen2-0.5b_t4")
    lora = model["lora"]["init_args"]
    assert (trainer["precision"], lora["r"], lora["lora_alpha"], len(lora["target_modules"])) == ("16-mixed", 16, 32, 7)
    assert (data["max_prompt_length"], data["max_response_length"]) == (512, 256)
    assert model["objective"]["init_args"]["beta"] == 0.1
