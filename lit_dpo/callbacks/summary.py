"""RunSummary: held-out metrics before the first step and after the last, the files of the run, and ``summary.json``."""

import time
from datetime import UTC, datetime
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_dpo.evaluation.held_out import held_out_metrics
from lit_dpo.evaluation.statistics import Resampling
from lit_dpo.evaluation.table import PairTable, TableCollector
from lit_dpo.files.atomic import write_json
from lit_dpo.files.console import say
from lit_dpo.training.environment import hardware, releases
from lit_dpo.training.run_dir import run_dir
from lit_dpo.training.throughput import peak_memory

ROWS = ("val/loss", "val/rewards/accuracies", "val/rewards/margins", "val/logps/chosen", "val/logps/rejected")
FILES = {
    "adapter": "the aligned adapter, for peft.AutoPeftModelForCausalLM",
    "model": "the aligned model, for transformers.AutoModelForCausalLM",
    "checkpoints": "last.ckpt to resume from, and the best by val/loss",
    "config.yaml": "the whole configuration",
    "metrics.csv": "every logged number",
    "samples.md": "base against aligned answers",
    "summary.json": "data, metrics before and after, hardware and time, for the model card",
}
FILENAME = "summary.json"
LIMITS = ("limit_train_batches", "limit_val_batches")  # of the Trainer, which leave out pairs


class RunSummary(Callback):
    """Prints held-out metrics before and after training, and writes what is to be told of the run to ``summary.json``.

    The metrics before training need ``trainer.num_sanity_val_steps=-1``. A resumed run takes them from its checkpoint.
    """

    def __init__(self) -> None:
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}
        self._seconds = 0.0  # of the runs before, if this one goes on from a checkpoint
        self._start: float | None = None
        self._collector = TableCollector()
        self._table: PairTable | None = None  # of the last evaluation
        self.intervals: dict[str, list[float]] = {}
        self.intervals_before: dict[str, list[float]] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets an earlier run's."""
        if stage == "fit":
            self.before, self.after, self._seconds, self._start = {}, {}, 0.0, None
            self._table, self.intervals, self.intervals_before = None, {}, {}

    def state_dict(self) -> dict[str, Any]:
        """The metrics before training, and the time so far."""
        return {"before": self.before, "seconds": self._time(), "intervals_before": self.intervals_before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the metrics before training, and the time, of the run that this one goes on from."""
        self.before, self._seconds = state_dict["before"], state_dict["seconds"]
        self.intervals_before = state_dict["intervals_before"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._start = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts an empty table of pairs."""
        self._collector.start()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Adds a batch to the table."""
        self._collector.add(pl_module, batch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the held-out metrics and the table.

        Collective, so it comes after ``KeepInStep`` has made up for batches that this process does not have.
        """
        pairs = getattr(getattr(trainer, "datamodule", None), "val_pairs", None)
        self._table = self._collector.finish(trainer, pairs)
        if trainer.sanity_checking and trainer.num_sanity_val_batches == trainer.num_val_batches:
            self.intervals_before = {} if self._table is None else _intervals(self._table)
        values = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
        if not trainer.sanity_checking:
            self.after = values
        elif trainer.num_sanity_val_batches == trainer.num_val_batches:
            self.before = values

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Requests an evaluation after the last step if ``max_steps`` ends the run in the middle of an epoch."""
        if 0 < trainer.max_steps <= trainer.global_step:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the table, writes the file, and prints those files of the run that exist."""
        folder = run_dir(trainer)
        if not trainer.is_global_zero:
            return
        if self.after:
            self.intervals = {} if self._table is None else _intervals(self._table)
            say(f"\n{'held-out pairs':<26}{'before':>12}{'after':>12}{'95 % interval' if self.intervals else '':>24}")
            for name in ROWS:
                before = f"{self.before[name]:.4f}" if name in self.before else "-"
                bounds = "[{:.4f}, {:.4f}]".format(*self.intervals[name]) if name in self.intervals else ""
                after = self.after.get(name, float("nan"))
                say(f"{name.removeprefix('val/'):<26}{before:>12}{after:>12.4f}{bounds:>24}".rstrip())
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            write_json(folder / FILENAME, self._facts(trainer))
        say(f"\n{folder}/")
        for name, meaning in FILES.items():
            if (folder / name).exists():
                say(f"  {name:<14}{meaning}")

    def _facts(self, trainer: Trainer) -> dict[str, Any]:
        data: Any = getattr(trainer, "datamodule", None)
        pairs: dict[str, Any] = {name: getattr(data, f"{name}_pairs", None) for name in ("train", "val")}
        return {
            "date": datetime.now(UTC).date().isoformat(),
            "steps": trainer.global_step,
            "epochs": trainer.current_epoch,
            "processes": trainer.world_size,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "precision": str(trainer.precision),
            "num_pairs": {name: len(found) for name, found in pairs.items() if hasattr(found, "indices")},
            "limits": {
                name: limit for name in LIMITS if repr(limit := getattr(trainer, name)) != "1.0"
            },  # 1 is a batch
            "data": getattr(getattr(data, "loaded", None), "report", []),
            "before": self.before,
            "after": self.after,
            "intervals": self.intervals,
            "intervals_before": self.intervals_before,
            "hardware": hardware(trainer),
            "seconds": round(self._time(), 1),
            "peak_memory_gb": round(peak_memory(trainer) / 1e9, 2),
            "releases": releases(),
        }

    def _time(self) -> float:
        return self._seconds + (0.0 if self._start is None else time.perf_counter() - self._start)


def _intervals(table: PairTable) -> dict[str, list[float]]:
    """Intervals of the metrics, by name; none where there are too few prompts."""
    metrics = held_out_metrics(table, Resampling(), by_group=False).total.metrics
    return {f"val/{name}": [one.low, one.high] for name, one in metrics.items() if one.low == one.low}
