"""HeldOutIntervals: prints every metric of ``test`` with its interval, by group, and writes ``test.json``."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_dpo.evaluation.held_out import HeldOut, compared, held_out_metrics
from lit_dpo.evaluation.statistics import Comparison, Resampling
from lit_dpo.evaluation.table import PairTable, TableCollector
from lit_dpo.evaluation.text import comparison_text, held_out_text
from lit_dpo.files.atomic import write_json
from lit_dpo.files.console import say
from lit_dpo.training.run_dir import run_dir

FILENAME = "test.json"


class HeldOutIntervals(Callback):
    """Reports the held-out pairs of ``test``: metrics with intervals, by group, and against another model.

    Args:
        num_resamples: Number of draws of the bootstrap over prompts.
        level: Confidence level of the intervals.
        seed: Seed of the draws.

    Raises:
        ValueError: If an argument is outside its range.
    """

    def __init__(self, num_resamples: int = 2000, level: float = 0.95, seed: int = 0) -> None:
        self.num_resamples, self.level, self.seed = num_resamples, level, seed
        self._resampling = Resampling(num_resamples, level, seed)
        self._collector = TableCollector()
        self.tables: list[tuple[str, PairTable]] = []  # names and tables of the models that were tested
        self.model_name = ""  # of the model in test

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts an empty table. A third model begins a new comparison."""
        self._collector.start()
        if len(self.tables) == 2:
            self.tables = []

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Adds a batch."""
        self._collector.add(pl_module, batch)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Computes the report, prints it and writes it.

        Collective, so it comes after ``KeepInStep`` has made up for batches that this process does not have.
        """
        folder = run_dir(trainer)
        pairs = getattr(getattr(trainer, "datamodule", None), "val_pairs", None)
        table = self._collector.finish(trainer, pairs)
        if table is None:
            if trainer.is_global_zero:  # never nothing: Lightning's own table is off on the command line
                say("No intervals: the pairs are not those of a PreferenceDataModule.")
                for name, value in trainer.callback_metrics.items():
                    say(f"{name:<44}{float(value):>12.4f}")
            return
        self.tables.append((self.model_name, table))
        if len(self.tables) == 1:
            found = held_out_metrics(table, self._resampling)
            say(held_out_text(found))
            self._found = found
            self._folder = None if trainer.fast_dev_run else folder  # type: ignore[attr-defined]
            self._write(found.to_dict())
            return
        first, second = self.tables
        comparison = compared(first[1], second[1], self._resampling)
        say(comparison_text(first[0], second[0], comparison, self.level))
        self._write({**self._found.to_dict(), "against": _plain(second[0], comparison)})

    def _write(self, content: dict[str, Any]) -> None:
        if self._folder is not None:
            write_json(self._folder / FILENAME, content)

    _found: HeldOut  # of the first model
    _folder: Path | None  # of its run; a second model is tested without loggers


def _plain(name: str, comparison: dict[str, Comparison]) -> dict[str, Any]:
    return {"model": name, "metrics": {key: one._asdict() for key, one in comparison.items()}}
