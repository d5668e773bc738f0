"""``python -m lit_dpo prepare``: tokenizes the pairs and computes the reference log-probs, then stops."""

from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lit_dpo.datamodule import PreferenceDataModule
from lit_dpo.module import DPOModule
from lit_dpo.reference.cache import CachedReference


def prepare(trainer: Trainer, model: DPOModule, data: PreferenceDataModule) -> None:
    """Does what ``fit`` would do before its first step: tokenizes the pairs and fills the reference cache.

    All ranks of the Trainer share the reference pass. A later ``fit`` of the same settings reads both from the caches.

    Args:
        trainer: The Trainer, without callbacks and loggers.
        model: The model.
        data: The data.
    """
    if data.streaming:
        raise ValueError("A stream is tokenized on the way, so there is nothing to prepare: leave data.streaming out.")
    trainer.callbacks.append(_StopBeforeTraining())  # type: ignore[attr-defined]
    trainer.fit(model, datamodule=data)
    cached = isinstance(model.reference, CachedReference)
    where = "The reference log-probs of those that the run uses are cached." if cached else "No reference is cached."
    parts: dict[str, Any] = {"training": data.train_pairs, "held-out": data.val_pairs}
    numbers = [f"{len(pairs):,} {name}" for name, pairs in parts.items() if pairs is not None]
    rank_zero_info(f"Prepared: {' and '.join(numbers)} pairs. {where}")


class _StopBeforeTraining(Callback):
    """Ends the run when everything before the first step is done."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Ends the run. The reference pass comes in the same hook, and is done all the same."""
        trainer.should_stop = True
