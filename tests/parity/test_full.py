"""With all weights trained, the losses of optimizer steps are those of TRL's DPOTrainer without PEFT."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from lightning.pytorch import Callback, Trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_dpo import DPOModule, PreferenceDataModule
from lit_dpo.data.filters import Filters
from tests.parity.record_trl import losses_of_training
from tests.tiny import made_up_rows

pytestmark = [pytest.mark.slow, pytest.mark.ci, pytest.mark.filterwarnings("ignore:.*")]
STEPS, BATCH, RATE = 5, 4, 1e-3


def rows() -> list[dict[str, Any]]:
    return [
        {"prompt": row["chosen"][:-1], "chosen": row["chosen"][-1:], "rejected": row["rejected"][-1:]}
        for row in made_up_rows(STEPS * BATCH)
    ]


def of_trl(base: str, folder: Path) -> list[float]:
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    options = {"train_dataset": Dataset.from_list(rows()), "processing_class": AutoTokenizer.from_pretrained(base)}
    trainer = DPOTrainer(model=model, args=config, **options)
    return losses_of_training(trainer)


class Note(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, *rest: Any) -> None:
        self.losses.append(outputs["loss"].item())


def test_optimizer_steps(tiny_base: str, tmp_path: Path) -> None:
    module = DPOModule(
        tiny_base,
        lora=None,
        quantization=None,
        lr_scheduler="constant",
        warmup=0.0,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0),
    )
    source = Dataset.from_list(rows())
    keep = Filters(leaks="keep")
    data = PreferenceDataModule(source, val_source=source, filters=keep, batch_size=BATCH, shuffle=False)
    note = Note()
    off: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        accelerator="cpu",
        precision="32-true",
        max_epochs=1,
        limit_val_batches=0,
        callbacks=[note],
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **off,
    )
    trainer.fit(module, data)
    losses = of_trl(tiny_base, tmp_path / "trl")
    assert losses[0] == pytest.approx(0.693147, abs=1e-5)
    assert abs(losses[-1] - losses[0]) > 1e-3, "the steps must move the loss"
    assert note.losses == pytest.approx(losses, abs=2e-5)
