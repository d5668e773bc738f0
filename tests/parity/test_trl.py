"""Loss, rewards, log-probs and gradients equal TRL's DPOTrainer on the same pairs, base, adapters and precision.

The recorded values are those of ``record_trl.py``; the slow test records them anew.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from lightning.pytorch import Callback, Trainer
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from lit_dpo.base.tokenizer import load_tokenizer
from lit_dpo.data.filters import Filters
from lit_dpo.data.preparation import prepare_pairs
from lit_dpo.data.rendering import ChatTemplate
from lit_dpo.data.tokenization import Truncation
from lit_dpo.datamodule import PreferenceDataModule
from lit_dpo.module import DPOModule
from lit_dpo.objectives import IPO, APOZero, Objective, Sigmoid
from lit_dpo.policy.adapters import LORA
from lit_dpo.policy.loading import load_policy
from lit_dpo.policy.policy import Policy
from lit_dpo.policy.precision import NF4
from lit_dpo.reference import InitialPolicy
from lit_dpo.training.metrics import PreferenceMetrics
from lit_dpo.training.requirements import Placement
from tests.closeness import SMOLLM2, assert_same
from tests.conftest import EMBEDDED, REPOSITORY
from tests.parity.record_trl import (
    ADAPTER_SCALE,
    BETA,
    KEYS,
    LEARNING_RATE,
    STEPS_BATCH_SIZE,
    STEPS_LOSSES,
    STEPS_MAX_LENGTH,
    gradient_summary,
    read_rows,
    run_trl,
)
from tests.tiny import wake_adapters

EXAMPLES = REPOSITORY / "lit_dpo/data/examples/train_prefs.jsonl"


def ours(rows: list[dict[str, Any]], max_length: int) -> dict[str, Any]:
    model = load_policy(
        EMBEDDED,
        quantization=BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=torch.float32),
        lora=LoraConfig(**LORA),
        adapter=None,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    wake_adapters(model, ADAPTER_SCALE)
    policy = Policy(model, "flat")
    pairs, _ = prepare_pairs(
        Dataset.from_list(rows), "rows", ChatTemplate(load_tokenizer(EMBEDDED)), Truncation(max_length)
    )
    batch = pairs[list(range(len(pairs)))]
    objective, metrics = Sigmoid(BETA), PreferenceMetrics()
    reference, logps = InitialPolicy(policy).logps(batch), policy.logps(batch)
    losses = objective(logps, reference)
    losses.mean().backward()
    metrics.update(losses, objective.rewards(logps, reference), logps)
    values = {name: value.item() for name, value in metrics.compute().items()}
    return {**values, "gradients": gradient_summary(model)}


def assert_equal(found: dict[str, Any], recorded: dict[str, Any]) -> None:
    for key in ("loss", *KEYS):  # of log-probs of hundreds of nats, of which a reward is a tenth
        assert found[key] == pytest.approx(recorded[key], rel=1e-4, abs=1e-4), key
    summaries = ({name: torch.tensor(n) for name, n in values["gradients"].items()} for values in (found, recorded))
    assert_same(*summaries, SMOLLM2)  # each begins with the norm


def our_steps(rows: list[dict[str, Any]], objective: Objective) -> list[float]:
    """The loss of each optimizer step of the Trainer, from the same adapters."""
    module = DPOModule(
        EMBEDDED,
        objective,
        lr_scheduler="constant",
        warmup=0.0,
        optimizer=lambda p: torch.optim.AdamW(p, lr=LEARNING_RATE, weight_decay=0.0),
    )
    module.build_policy(Placement(torch.float32, torch.device("cpu")))
    wake_adapters(module.model, 0.0)
    data = PreferenceDataModule(
        Dataset.from_list(rows),
        val_source=Dataset.from_list(rows[:1]),
        filters=Filters(leaks="keep"),
        max_length=STEPS_MAX_LENGTH,
        batch_size=STEPS_BATCH_SIZE,
        shuffle=False,
    )
    losses = []

    class Note(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, *rest: Any) -> None:
            losses.append(outputs["loss"].item())

    trainer = Trainer(
        accelerator="cpu",
        precision="32-true",
        max_epochs=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Note()],
    )
    trainer.fit(module, data)
    return losses


def recorded(name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((Path(__file__).parent / f"trl_{name}.json").read_text())
    assert abs(record["rewards/margins"]) > 0.01, "with policy and reference the same, nothing would be tested"
    return record


OBJECTIVES = dict(zip(STEPS_LOSSES, (Sigmoid(BETA), IPO(BETA), APOZero(BETA)), strict=True))


@pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers")
@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("sigmoid", 3),
        pytest.param("sigmoid", 20, marks=pytest.mark.slow),
        pytest.param("ipo", 20, marks=pytest.mark.slow),
        pytest.param("apo_zero", 20, marks=pytest.mark.slow),
    ],
)
def test_optimizer_steps(embedded_base: str, name: str, steps: int) -> None:
    record = json.loads((Path(__file__).parent / "trl_steps.json").read_text())["losses"][name][:steps]
    losses = our_steps(read_rows(EXAMPLES, steps * STEPS_BATCH_SIZE), OBJECTIVES[name])
    assert len(losses) == steps
    assert min(record) < 0.95 * record[0], "the steps must move the loss"
    assert_same(torch.tensor(losses), torch.tensor(record), 20 * SMOLLM2)


@pytest.mark.ci
@pytest.mark.slow
def test_on_the_shipped_pairs_with_truncation(embedded_base: str) -> None:
    record = recorded("examples")
    assert_equal(ours(read_rows(EXAMPLES, record["pairs"]), record["max_length"]), record)


@pytest.mark.slow
def test_on_real_ultrafeedback_pairs_with_truncation(embedded_base: str, ultrafeedback: Path) -> None:
    record = recorded("ultrafeedback")
    assert_equal(ours(read_rows(ultrafeedback / "train_prefs.jsonl", record["pairs"]), record["max_length"]), record)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_live(embedded_base: str) -> None:
    rows = read_rows(EXAMPLES, 4)
    assert_equal(ours(rows, 384), run_trl(rows, 384))
