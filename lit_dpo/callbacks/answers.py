"""HeldOutAnswers: answers held-out prompts at each evaluation, and hands the texts to the loggers."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info

from lit_dpo.policy.generation import Answer, Comparison, Prompt, answers, markdown
from lit_dpo.training.resume import random_state, restore_random_state
from lit_dpo.training.run_dir import run_dir

FILENAME = "answers.jsonl"
COLUMNS = ["step", "prompt", "base", "aligned"]


class HeldOutAnswers(Callback):
    """Answers the same held-out prompts at each evaluation. The run's steps are the same to the last bit without it.

    The base answers once, before the first step. The texts go to ``answers.jsonl`` in the run's folder, and to the
    loggers that take texts: TensorBoard (text), W&B and MLflow (a table).

    Args:
        num_prompts: Number of held-out prompts to answer; 0 for none.
        max_new_tokens: Maximum number of tokens of an answer.
        temperature: Temperature of sampling; 0 for greedy decoding.
        batch_size: Number of prompts that are answered together.
    """

    def __init__(
        self, num_prompts: int = 0, max_new_tokens: int = 64, temperature: float = 0.0, batch_size: int = 8
    ) -> None:
        if num_prompts < 0 or max_new_tokens < 1 or temperature < 0 or batch_size < 1:
            raise ValueError(
                "answers.num_prompts and answers.temperature are at least 0, answers.max_new_tokens and "
                "answers.batch_size at least 1."
            )
        self.num_prompts, self.max_new_tokens = num_prompts, max_new_tokens
        self.temperature, self.batch_size = temperature, batch_size
        self._prompts: list[Prompt] = []
        self._base: list[Answer] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Chooses the prompts, and names loggers that take no texts."""
        pairs: Any = getattr(getattr(trainer, "datamodule", None), "val_pairs", None)
        self._prompts, self._base = [], []
        number = self.num_prompts if hasattr(pairs, "prompt") and not trainer.fast_dev_run else 0  # type: ignore[attr-defined]
        if number:
            found = (Prompt(*pairs.prompt(index)) for index in range(len(pairs)))
            self._prompts = list({tuple(one.ids): one for one in found}.values())[:number]
        elif self.num_prompts:
            rank_zero_info("HeldOutAnswers answers nothing: there are no held-out pairs, or this is a dry run.")
        known = (CSVLogger, TensorBoardLogger, WandbLogger, MLFlowLogger)
        for logger in trainer.loggers if number else ():
            if not isinstance(logger, known):
                rank_zero_info(f"{type(logger).__name__} gets no texts from HeldOutAnswers: they are in {FILENAME}.")

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Answers on the first rank, while the others wait. All take part where the base is split over them."""
        folder = run_dir(trainer)
        takes_part = trainer.is_global_zero or pl_module.policy.sharded
        if self._prompts and takes_part and trainer.state.fn == "fit":
            state = random_state()
            if not self._base:
                with pl_module.policy.initial():
                    self._base = self._answer(pl_module)
                pl_module.policy.release_initial()
            found = self._base if trainer.global_step == 0 else self._answer(pl_module)
            restore_random_state(state)
            if trainer.is_global_zero:
                rows = zip(self._prompts, self._base, found, strict=True)
                comparisons = [Comparison(prompt.text, base.shown, own.shown) for prompt, base, own in rows]
                write(folder / FILENAME, trainer.global_step, comparisons)
                for logger in trainer.loggers:
                    log(logger, trainer.global_step, comparisons)
        trainer.strategy.barrier("answers")

    def _answer(self, module: Any) -> list[Answer]:
        found = []
        for start in range(0, len(self._prompts), self.batch_size):
            ids = [prompt.ids for prompt in self._prompts[start : start + self.batch_size]]
            found += answers(module.policy, module.tokenizer, ids, self.max_new_tokens, self.temperature)
        return found


def write(path: Path, step: int, comparisons: list[Comparison]) -> None:
    """Appends a line for each prompt."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({"step": step, **vars(one)}) + "\n" for one in comparisons)


def log(logger: Logger, step: int, comparisons: list[Comparison]) -> None:
    """Hands the texts to a logger in its own form. Others have the file."""
    rows = [[step, one.prompt, one.base, one.aligned] for one in comparisons]
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text("answers", markdown(comparisons), step)
    elif isinstance(logger, WandbLogger):
        logger.log_table("answers", columns=COLUMNS, data=rows, step=step)
    elif isinstance(logger, MLFlowLogger):
        columns = dict(zip(COLUMNS, map(list, zip(*rows, strict=True)), strict=True))
        logger.experiment.log_table(logger.run_id, columns, artifact_file="answers.json")
