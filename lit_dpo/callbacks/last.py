"""LastCheckpoint: ``checkpoints/last.ckpt`` always holds the latest state, also after Ctrl-C or a signal."""

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info

from lit_dpo.training.checkpoint import save_checkpoint, try_to_save_checkpoint
from lit_dpo.training.interruption import (
    NAMES,
    SIGUSR1,
    Terminated,
    asks_to_requeue,
    is_dead_worker,
    is_interruption,
    note_checkpoint,
    requeue,
)
from lit_dpo.training.run_dir import run_dir
from lit_dpo.training.step import OptimizerStep

DUE = 1  # less than the number of any signal that ends a run


class LastCheckpoint(Checkpoint):
    """Saves ``checkpoints/last.ckpt`` every few steps, at the end of an epoch or of the run, and when a signal ends it.

    The first Ctrl-C lets the optimizer step finish, so that a resumed run continues exactly from there. A second Ctrl-C
    stops at once and leaves the previous checkpoint. SIGTERM and SIGUSR1, which job schedulers send, also let the step
    finish. The process then exits with status 143 or 138. Under SLURM, SIGUSR1 also requeues the job. Before the first
    training batch, and during an evaluation on one process, all of them stop the run at once.

    Args:
        every_n_steps: Number of optimizer steps between two checkpoints; null for no such checkpoints.
        every_minutes: Also save when the last checkpoint is older than this.
    """

    def __init__(self, every_n_steps: int | None = 50, every_minutes: float | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"last.every_n_steps must be at least 1, not {every_n_steps}.")
        if every_minutes is not None and every_minutes <= 0:
            raise ValueError(f"last.every_minutes must be above 0, not {every_minutes}.")
        self.every_n_steps, self.every_minutes = every_n_steps, every_minutes
        self._saved = time.monotonic()
        self._received: int | None = None  # the signal that asked to stop
        self._training = False
        self._consistent = True  # False in the middle of an optimizer step: a checkpoint has no gradients
        self._step = OptimizerStep()
        self._handlers: dict[int, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes SIGUSR1 before Lightning does, whose handler saves in the middle of a step, to another folder."""
        if stage == "fit" and SIGUSR1:
            self._install(SIGUSR1)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Installs the signal handlers."""
        self._install()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Installs the signal handlers, if there was no sanity check."""
        self._install()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Marks that an optimizer step is in progress. Nothing is saved before it ends."""
        self._training, self._consistent = True, False
        self._step.start_batch(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves every ``every_n_steps`` optimizer steps and after the last. Ends the run if a signal asked for it."""
        if not self._step.is_complete(trainer):
            return
        self._consistent = True
        due = self.every_minutes is not None and time.monotonic() - self._saved > 60 * self.every_minutes
        received = self._received or (DUE if due else 0)
        if trainer.world_size > 1:  # maybe only one rank received it; SIGTERM has the largest number
            number = torch.tensor(received, device=trainer.strategy.root_device)
            received = int(trainer.strategy.reduce(number, reduce_op="max"))
        if received > DUE:
            raise _exception(received)
        if trainer.should_stop or trainer.global_step == trainer.max_steps:
            self._save(trainer)
        elif received == DUE or (self.every_n_steps and trainer.global_step % self.every_n_steps == 0):
            self._try_to_save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves if an evaluation ends the run, such as by EarlyStopping in the middle of an epoch."""
        if trainer.should_stop and self._training and trainer.state.fn == "fit":
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves at the end of a full epoch, so that a run with more epochs can continue from there."""
        if not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return
        if trainer.current_epoch + 1 == trainer.max_epochs:
            self._save(trainer)
        else:
            self._try_to_save(trainer)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Ends the run if a signal asked for it. On one process, an evaluation can be stopped at any batch."""
        if self._received is not None and trainer.world_size == 1:
            raise _exception(self._received)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restores the signal handlers."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves if the run was interrupted between two steps, and says where the checkpoint is."""
        self._restore()
        alone = trainer.world_size == 1  # other processes would not take part in saving
        if trainer.state.fn == "fit" and (is_interruption(exception) or (alone and is_dead_worker(exception))):
            if self._training and trainer.global_step > 0:
                self._save_interrupted(trainer)
            elif trainer.global_step > 0:
                rank_zero_info("Stopped before the first step. Nothing is lost: resume from the same checkpoint.")
            if asks_to_requeue(exception) and trainer.is_global_zero:
                rank_zero_info(requeue())

    def _save_interrupted(self, trainer: Trainer) -> None:
        """Saves if the run is between two steps, and says where the checkpoint is."""
        path = self._path(trainer)
        if self._consistent:
            self._save(trainer)
        elif not path.exists():
            rank_zero_info("Stopped during an optimizer step. No checkpoint has been saved yet.")
            return
        state = f"after {trainer.global_step} optimizer steps" if self._consistent else "in the middle of a step"
        rank_zero_info(f"Stopped {state}. Everything is in {path.parent.parent}.\nResume with: --ckpt_path {path}")

    def _on_signal(self, number: int, frame: Any) -> None:
        if not self._handlers:  # the run is over, but Lightning has put this handler back
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if not self._training or (self._received and number == signal.SIGINT):
            raise _exception(number)
        self._received = max(self._received or 0, number)  # SIGTERM takes precedence
        again = " Press it again to stop at once." if number == signal.SIGINT else ""
        rank_zero_info(f"\n{NAMES[signal.Signals(number)]}: finishing the optimizer step, then saving.{again}")

    def _install(self, *numbers: int) -> None:
        """Installs the handler of some signals, by default of all."""
        if threading.current_thread() is not threading.main_thread():
            return
        if not self._handlers:
            self._received, self._training, self._consistent = None, False, True
        for number in numbers or NAMES:
            if number not in self._handlers:
                self._handlers[number] = signal.signal(number, self._on_signal)

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def _path(self, trainer: Trainer) -> Path:
        return run_dir(trainer) / "checkpoints" / "last.ckpt"

    def _save(self, trainer: Trainer) -> None:
        self._write(trainer, save_checkpoint)

    def _try_to_save(self, trainer: Trainer) -> None:
        self._write(trainer, try_to_save_checkpoint)

    def _write(self, trainer: Trainer, save: Callable[[Trainer, Path], None]) -> None:
        path = self._path(trainer)
        save(trainer, path)
        self._saved = time.monotonic()
        if trainer.is_global_zero:
            note_checkpoint(path)


def _exception(number: int) -> BaseException:
    """The exception that a signal raises."""
    return KeyboardInterrupt() if number == signal.SIGINT else Terminated(number)
