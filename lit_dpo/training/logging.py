"""Metrics ──► Lightning's loggers and progress bar."""

from typing import Any

from lightning.pytorch import Callback, Trainer

from lit_dpo.training.metrics import PreferenceMetrics
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
        if pl_module.step.is_complete(trainer):
            _log(pl_module, "train", pl_module.train_metrics)
            pl_module.log_dict(self._throughput.end_step(trainer, pl_module.step), batch_size=1)
            pl_module.step.batches.clear()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Logs the held-out metrics, including those of a complete sanity check, which Lightning would not log."""
        values = _log(pl_module, "val", pl_module.eval_metrics)
        if trainer.sanity_checking and trainer.num_sanity_val_batches == trainer.num_val_batches:
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Logs the test metrics."""
        _log(pl_module, "test", pl_module.eval_metrics)


def _log(module: Any, stage: str, metrics: PreferenceMetrics) -> dict[str, float]:
    """Logs the means under ``stage/`` and resets the metrics. Collective: every rank must call it."""
    values = {f"{stage}/{name}": value.item() for name, value in metrics.compute().items()}
    metrics.reset()
    shown = {f"{stage}/{name}" for name in IN_PROGRESS_BAR}
    # All ranks already have the same values. Lightning asks for sync_dist when it logs a value of an epoch.
    options = {"sync_dist": stage != "train", "batch_size": 1}
    module.log_dict({key: value for key, value in values.items() if key in shown}, prog_bar=True, **options)
    module.log_dict({key: value for key, value in values.items() if key not in shown}, **options)
    return values
