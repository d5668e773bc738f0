"""Metrics ──► Lightning's loggers and progress bar."""

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from lit_dpo.training.throughput import Throughput

IN_PROGRESS_BAR = ("loss", "rewards/accuracies")


class LoggedMeans(Callback):
    """Logs means over the pairs of each optimizer step and of each evaluation.

    ``DPOModule`` adds this callback itself.
    """

    def __init__(self) -> None:
        self._throughput = Throughput()

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Discards the unfinished step of an interrupted run."""
        pl_module.step.batches.clear()
        pl_module.train_metrics.reset()
        self._throughput = Throughput()

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Notes that a batch begins, for the step and the throughput."""
        pl_module.step.start_batch(trainer)
        self._throughput.start_batch()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Logs the metrics of an optimizer step when it is complete, on all ranks."""
        step = pl_module.step
        if step.is_complete(trainer):
            _log(pl_module, "train", step.means | self._throughput.end_step(trainer, step))
            pl_module.train_metrics.reset()
            step.batches.clear()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Logs the held-out metrics, including those of a complete sanity check, which Lightning would not log."""
        values = _log_evaluation(trainer, pl_module, "val")
        if trainer.sanity_checking and trainer.num_sanity_val_batches == trainer.num_val_batches:
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Logs the test metrics."""
        _log_evaluation(trainer, pl_module, "test")


def _log_evaluation(trainer: Trainer, module: Any, stage: str) -> dict[str, float]:
    """Logs the metrics of an evaluation and resets them. Collective: every rank must call it."""
    pairs = getattr(getattr(trainer, "datamodule", None), "val_pairs", None)
    means = module.eval_metrics.compute(getattr(pairs, "names", ()))
    module.eval_metrics.reset()
    return _log(module, stage, {name: value.item() for name, value in means.items()})


def _log(module: Any, stage: str, means: dict[str, float]) -> dict[str, float]:
    """Logs numbers that all ranks have, under ``stage/``, and returns them under these names."""
    values = {f"{stage}/{name}": value for name, value in means.items()}
    if module.trainer.barebones:  # Lightning logs nothing then
        return values
    shown = {f"{stage}/{name}" for name in IN_PROGRESS_BAR}
    # Lightning asks for sync_dist when it logs a value of an epoch.
    options = {"sync_dist": stage != "train", "batch_size": 1}
    logged: dict[str, Any] = dict(values)
    if stage == "train":  # Lightning would move each plain number to the GPU and wait for it
        logged = {key: torch.tensor(value) for key, value in values.items()}
    module.log_dict({key: value for key, value in logged.items() if key in shown}, prog_bar=True, **options)
    module.log_dict({key: value for key, value in logged.items() if key not in shown}, **options)
    return values
