"""LastCheckpoint: ``checkpoints/last.ckpt`` always holds the latest state, after Ctrl-C too."""

import signal
import threading
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info

from lit_dpo.run_dir import run_dir


class LastCheckpoint(Checkpoint):
    """Saves ``checkpoints/last.ckpt`` now and then, at the end of an epoch or of the run, and when Ctrl-C is pressed.

    The first Ctrl-C lets the optimizer step finish, so that the checkpoint goes on from it exactly; the second stops
    at once and leaves the checkpoint before.

    Args:
        every_n_steps: Optimizer steps between two checkpoints.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ValueError(f"last.every_n_steps must be at least 1, not {every_n_steps}.")
        self.every_n_steps = every_n_steps
        self._interrupted = False
        self._consistent = True  # no half-done optimizer step, whose gradients a checkpoint would not hold
        self._handler: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes over Ctrl-C."""
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGINT, self._on_sigint)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """From here to the end of the step, the state is between two states."""
        self._consistent = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves at the end of an optimizer step, if it is time or Ctrl-C was pressed."""
        if trainer.fit_loop._should_accumulate():
            return
        self._consistent = True
        interrupted = self._interrupted
        if trainer.world_size > 1:
            interrupted = trainer.strategy.reduce_boolean_decision(interrupted, all=False)
        if interrupted:
            raise KeyboardInterrupt
        ends = trainer.should_stop or trainer.global_step == trainer.max_steps
        if ends or trainer.global_step % self.every_n_steps == 0:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves at the end of an epoch, from where a run with more of them goes on; not where ``max_steps`` cut it."""
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._save(trainer)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Evaluation may be stopped anywhere."""
        if self._interrupted and trainer.world_size == 1:
            raise KeyboardInterrupt

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives Ctrl-C back."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves after Ctrl-C, if no step was half done, and says where."""
        self._release()
        if isinstance(exception, KeyboardInterrupt) and trainer.state.fn == "fit" and trainer.global_step > 0:
            path = self._path(trainer)
            if self._consistent:
                self._save(trainer)
            elif not path.exists():
                rank_zero_info("Stopped in the middle of an optimizer step, before there was a checkpoint.")
                return
            state = f"after {trainer.global_step} optimizer steps" if self._consistent else "in the middle of a step"
            rank_zero_info(f"Stopped {state}. Everything is in {path.parent.parent}.\nGo on with: --ckpt_path {path}")

    def _on_sigint(self, signum: int, frame: Any) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        rank_zero_info("\nCtrl-C: finishing the optimizer step, then saving. Press it again to stop at once.")

    def _release(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self._handler = None

    def _path(self, trainer: Trainer) -> Path:
        return run_dir(trainer) / "checkpoints" / "last.ckpt"

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self._path(trainer), weights_only=False)  # with optimizer and loop states
