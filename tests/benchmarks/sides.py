"""One measured run of one side: the same pairs, order, adapter shape, quantization, precision and optimizer."""

import itertools
import resource
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset
from lightning.pytorch import Callback, Trainer, seed_everything
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from lit_dpo.base.names import resolve_base
from lit_dpo.base.tokenizer import load_tokenizer
from lit_dpo.data.filters import Filters
from lit_dpo.data.pairs import PairDataset
from lit_dpo.data.preparation import prepare_pairs
from lit_dpo.data.rendering import ChatTemplate
from lit_dpo.data.tokenization import Truncation
from lit_dpo.policy.adapters import LORA
from lit_dpo.policy.precision import NF4, PRECISIONS
from tests.benchmarks.floor import Shape, matmul_rate, synchronize
from tests.parity.record_trl import read_rows

LEARNING_RATE = 5e-5


@dataclass(frozen=True)
class Task:
    """What both sides do.

    Attributes:
        base: Name or folder of the base model.
        data: JSONL file of preference pairs.
        pairs: Pairs that are timed.
        warmup: Pairs before them that are not.
        compile: Whether our side compiles its layers.
        repeat: Whether the warm-up is on the very pairs that are timed, so that kernels compiled for a shape are ready.
        batch_size: Pairs in a batch.
        max_length: Most tokens of prompt and response.
        precision: Lightning's name of it.
        gradient_checkpointing: On both sides, or on none.
    """

    base: str
    data: str
    pairs: int
    warmup: int
    batch_size: int
    max_length: int
    precision: str
    gradient_checkpointing: bool
    compile: bool = False
    repeat: bool = False

    @property
    def device(self) -> torch.device:
        """Where to run."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def rows(self) -> list[dict[str, Any]]:
        """Rows that both sides take: warm-up pairs, then those that are timed."""
        rows = read_rows(Path(self.data), 10**9)
        pairs, _ = self.tokenized(rows)
        kept = [rows[pairs.pair(index).row] for index in range(len(pairs))]
        needed = self.pairs if self.repeat else self.warmup + self.pairs
        if len(kept) < needed:
            raise SystemExit(f"{self.data} holds {len(kept)} usable pairs of the {needed} wanted.")
        return kept[:needed] * (2 if self.repeat else 1)

    def tokenized(self, rows: list[dict[str, Any]]) -> tuple[PairDataset, list[str]]:
        """The rows as tokenized pairs."""
        return prepare_pairs(
            Dataset.from_list(rows), "rows", ChatTemplate(load_tokenizer(self.base)), Truncation(self.max_length)
        )


@dataclass
class Meter:
    """Times optimizer steps after a warm-up; keeps the losses.

    Attributes:
        task: What is run.
        losses: One a step, all of them.
    """

    task: Task
    losses: list[float] = field(default_factory=list)
    _times: list[float] = field(default_factory=list)  # when each step was over

    def step(self, loss: float) -> None:
        """Called when an optimizer step is over."""
        synchronize(self.task.device)
        self.losses.append(loss)
        if len(self.losses) * self.task.batch_size == self.task.warmup and self.task.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._times.append(time.perf_counter())

    def report(self, tokens: int, flops: int) -> dict[str, Any]:
        """The numbers of the run."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self.task.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        timed = self._times[self.task.warmup // self.task.batch_size - 1 :]
        seconds = timed[-1] - timed[0]
        return {
            "pairs_per_second": self.task.pairs / seconds,
            "seconds": seconds,
            "step_seconds": [round(end - start, 2) for start, end in itertools.pairwise(timed)],
            "peak_memory_gb": peak / 1e9,
            "tokens": tokens,
            "floor_flops_per_second": flops / seconds,
            "losses": self.losses,
        }


def run_lit_dpo(task: Task) -> dict[str, Any]:
    """Lightning's Trainer and our two parts, from an empty reference cache."""
    meter = Meter(task)
    rows = task.rows()

    class Timer(Callback):
        reference_seconds = 0.0

        def on_train_start(self, trainer: Trainer, module: Any) -> None:  # before the module's own: the reference pass
            fill = module.reference.fill

            def timed(*arguments: Any, **options: Any) -> Any:
                start = time.perf_counter()
                fill(*arguments, **options)
                synchronize(task.device)
                self.reference_seconds = time.perf_counter() - start

            module.reference.fill = timed

        def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
            meter.step(outputs["loss"].item())

    timer = Timer()
    fit_lit_dpo(task, rows, [timer])
    pairs, _ = task.tokenized(rows)
    timed = [pairs.pair(index) for index in range(task.warmup, len(pairs))]
    tokens = sum(len(p.prompt) + len(p.chosen) + len(p.rejected) for p in timed)
    report = meter.report(tokens, shape(task).flops(timed, task.gradient_checkpointing))
    # The pass went over the warm-up pairs as well: a share of its time by tokens.
    share = tokens / sum(pairs.num_tokens(range(len(pairs))))
    reference_seconds = timer.reference_seconds * share
    cold = task.pairs / (report["seconds"] + reference_seconds)
    return {**report, "reference_seconds": reference_seconds, "pairs_per_second_cold": cold}


def fit_lit_dpo(task: Task, rows: list[dict[str, Any]], callbacks: list[Callback]) -> None:
    """One epoch over the rows, in order."""
    from lit_dpo.datamodule import PreferenceDataModule
    from lit_dpo.module import DPOModule

    data = PreferenceDataModule(
        Dataset.from_list(rows),
        val_source=Dataset.from_list(rows[:1]),
        filters=Filters(leaks="keep"),
        max_length=task.max_length,
        batch_size=task.batch_size,
        shuffle=False,
    )
    seed_everything(0, verbose=False)
    module = DPOModule(
        task.base,
        lr_scheduler="constant",
        warmup=0.0,
        gradient_checkpointing=task.gradient_checkpointing,
        compile=task.compile,
        optimizer=lambda p: torch.optim.AdamW(p, lr=LEARNING_RATE, weight_decay=0.0),
    )
    trainer = Trainer(
        accelerator="auto",
        devices=1,
        precision=task.precision,
        max_epochs=1,
        limit_val_batches=0,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with tempfile.TemporaryDirectory() as cache, patch("lit_dpo.reference.cache.cache_dir", lambda: Path(cache)):
        trainer.fit(module, data)


def run_trl(task: Task, best: bool) -> dict[str, Any]:
    """TRL's DPOTrainer: with its defaults, or with what is known to make it faster."""
    from transformers import TrainerCallback, set_seed
    from trl import DPOConfig, DPOTrainer

    meter = Meter(task)
    rows = task.rows()
    base = resolve_base(task.base)
    dtype = PRECISIONS[task.precision]
    model = AutoModelForCausalLM.from_pretrained(
        base,
        dtype=dtype,
        quantization_config=BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=dtype),
        device_map={"": task.device},
    )
    for module in model.modules():
        # Otherwise bitsandbytes repacks weights at the first evaluation, and on some CPUs nothing trains any more.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model.requires_grad_(False)
    set_seed(0)
    model = get_peft_model(model, LoraConfig(**LORA))

    tokens = 0

    class Timed(DPOTrainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
            nonlocal tokens
            loss = super().training_step(model, inputs, num_items_in_batch)
            if len(meter.losses) * task.batch_size >= task.warmup:
                tokens += inputs["input_ids"].numel() * (1 if best else 2)
            self.step_loss = loss.item()
            return loss

    class Timer(TrainerCallback):
        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            meter.step(trainer.step_loss)

    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder,
            max_length=task.max_length,
            per_device_train_batch_size=task.batch_size,
            gradient_checkpointing=task.gradient_checkpointing,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            bf16=task.precision == "bf16-mixed",
            fp16=task.precision == "16-mixed",
            use_cpu=task.device.type == "cpu",
            dataloader_pin_memory=task.device.type == "cuda",
            precompute_ref_log_probs=best,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Timed(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(base),
            callbacks=[Timer()],
        )
        trainer.train()
    pairs, _ = task.tokenized(rows)
    timed = [pairs.pair(index) for index in range(task.warmup, len(pairs))]
    return meter.report(tokens, shape(task).flops(timed, task.gradient_checkpointing))


def run_probe(task: Task) -> dict[str, Any]:
    """The rate of this machine's matrix products, on the model's shapes."""
    return {"matmul_flops_per_second": matmul_rate(shape(task), PRECISIONS[task.precision], task.device)}


def shape(task: Task) -> Shape:
    """The products of the task's model."""
    return Shape.of(AutoConfig.from_pretrained(resolve_base(task.base)))
