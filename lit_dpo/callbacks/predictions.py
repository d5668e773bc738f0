"""PredictionWriter: writes the implicit rewards of each pair as JSON lines."""

import json
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lit_dpo.training.run_dir import run_dir


class PredictionWriter(Callback):
    """Writes the results of ``predict`` to ``predictions.jsonl``, batch by batch. Several ranks write one file each.

    Each line has ``source``, ``row``, ``reward_chosen``, ``reward_rejected`` and their ``margin``.

    Args:
        filename: Name of the file inside the run's folder.
    """

    def __init__(self, filename: str = "predictions.jsonl") -> None:
        self.filename = filename

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts an empty file."""
        name = self.filename
        if trainer.world_size > 1:
            stem, _, suffix = self.filename.rpartition(".")
            name = f"{stem}.rank{trainer.global_rank}.{suffix}"
        self.path = run_dir(trainer) / name
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("", encoding="utf-8")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Appends one line per pair."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in outputs)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says where the file is."""
        rank_zero_info(f"Implicit rewards of each pair: {self.path}")
