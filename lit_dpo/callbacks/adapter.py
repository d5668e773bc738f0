"""AdapterExport: saves the aligned adapter in PEFT's format, for any tool that reads it."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_dpo.policy.adapters import save_adapter
from lit_dpo.policy.full import FullModel
from lit_dpo.training.interruption import is_interruption
from lit_dpo.training.run_dir import run_dir

MODEL = "model"  # folder of a model of which all weights train


class AdapterExport(Callback):
    """Saves adapter, tokenizer and chat template at the end of training, and when Ctrl-C or SIGTERM ends it.

    If all weights train, it saves the whole model, in bfloat16, into the folder ``model``.

    Args:
        dirname: Name of the adapter's folder inside the run's folder.
    """

    def __init__(self, dirname: str = "adapter") -> None:
        self.dirname = dirname
        self._trained = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing has been trained yet."""
        self._trained = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the final adapter."""
        self._trained = True
        self._save(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the adapter of a finished run that was resumed. There was nothing to train, so no training ended."""
        if not self._trained and trainer.global_step > 0:
            self._save(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves the current adapter if the run is interrupted."""
        if is_interruption(exception) and trainer.global_step > 0:
            self._save(trainer, pl_module)

    def _save(self, trainer: Trainer, pl_module: Any) -> None:
        folder = run_dir(trainer)
        if not trainer.is_global_zero:
            return
        if isinstance(pl_module.model, FullModel):
            pl_module.model.save(pl_module.tokenizer, folder / MODEL)
        else:
            save_adapter(pl_module.model, pl_module.tokenizer, folder / self.dirname)
