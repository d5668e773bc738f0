"""StepProgress: shows the progress of a run in one line, on a terminal or in a log file."""

import math
import shutil
import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

from lit_dpo.files.console import say

FIELDS = {  # metric ──► how it is shown
    "train/loss": "loss {:.3f}",
    "train/rewards/accuracies": "acc {:.2f}",
    "train/rewards/margins": "margin {:.2f}",
    "lr": "lr {:.1e}",
    "train/pairs_per_second": "{:.2g} pairs/s",
}


class StepProgress(ProgressBar):
    """Shows ``step 12/600  loss 0.612  acc 0.66  margin 0.31  lr 4.8e-05  3.4 pairs/s  ETA 12:40``.

    A terminal shows one line that is rewritten in place. Fields that do not fit into its width are left out. A log file
    gets a new line every ``every_n_seconds``, without control characters. ``trainer.enable_progress_bar=false``
    switches it off.

    Args:
        every_n_seconds: Seconds between two lines in a log file.

    Raises:
        ValueError: If ``every_n_seconds`` is negative.
    """

    def __init__(self, every_n_seconds: float = 30.0) -> None:
        super().__init__()
        if every_n_seconds < 0:
            raise ValueError(f"progress.every_n_seconds must be 0 or more, not {every_n_seconds}.")
        self.every_n_seconds = every_n_seconds
        self._enabled = True
        self._started = self._last_line = 0.0
        self._first_step = self._shown_step = 0
        self._open = False  # whether the terminal's line is unfinished

    def disable(self) -> None:
        """Shows nothing. Lightning calls it on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Shows the line again."""
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Prints on a new line. Lightning calls it for ``module.print``."""
        self._close()
        say(" ".join(map(str, args)))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._started, self._last_line = time.monotonic(), -math.inf
        self._first_step = self._shown_step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Shows the previous step, whose metrics have been logged by now."""
        self._show_step(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows the last step before the evaluation."""
        if not trainer.sanity_checking:
            self._show_step(trainer, last=True)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Shows how far the evaluation is, on a terminal."""
        batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self._rewrite([f"held-out pairs, batch {batch_idx + 1}/{batches[dataloader_idx]}"])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows the held-out metrics in a line that stays."""
        metrics = trainer.callback_metrics
        names = {
            "val/loss": "loss {:.3f}",
            "val/rewards/accuracies": "acc {:.2f}",
            "val/rewards/margins": "margin {:.2f}",
        }
        found = [text.format(float(metrics[name])) for name, text in names.items() if name in metrics]
        self._write([self._place(trainer), "held out", *found])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows the last step and ends the line."""
        self._show_step(trainer, last=True)
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Ends the line, so that an error message starts on a new one."""
        self._close()

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Shows how far the test is, on a terminal."""
        self._rewrite([f"test pairs, batch {batch_idx + 1}/{trainer.num_test_batches[dataloader_idx]}"])

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the line."""
        self._close()

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Shows how far the prediction is, on a terminal."""
        self._rewrite([f"predicting, batch {batch_idx + 1}/{trainer.num_predict_batches[dataloader_idx]}"])

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the line."""
        self._close()

    def _show_step(self, trainer: Trainer, last: bool = False) -> None:
        if trainer.global_step == self._shown_step:
            return
        self._shown_step = trainer.global_step
        now = time.monotonic()
        if not sys.stderr.isatty() and not last and now - self._last_line < self.every_n_seconds:
            return
        self._last_line = now
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name in FIELDS}
        if trainer.optimizers:
            metrics["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        fields = [text.format(metrics[name]) for name, text in FIELDS.items() if name in metrics]
        total, done = trainer.estimated_stepping_batches, trainer.global_step - self._first_step
        if math.isfinite(total):
            fields.append(f"ETA {_clock((total - trainer.global_step) * (now - self._started) / done)}")
        self._rewrite([self._place(trainer), *fields], or_write=True)

    def _place(self, trainer: Trainer) -> str:
        total = trainer.estimated_stepping_batches if trainer.state.fn == "fit" else math.inf
        return f"step {trainer.global_step}" + (f"/{int(total)}" if math.isfinite(total) else "")

    def _rewrite(self, fields: list[str], or_write: bool = False) -> None:
        """Rewrites the terminal's line. Without a terminal, writes a line if ``or_write`` is true, else nothing."""
        if not self._enabled:
            return
        if sys.stderr.isatty():
            width = shutil.get_terminal_size((80, 24)).columns - 1
            while len(fields) > 1 and len("  ".join(fields)) > width:
                fields = fields[:-1]
            sys.stderr.write("\r" + "  ".join(fields)[:width].ljust(width))
            sys.stderr.flush()
            self._open = True
        elif or_write:
            self._write(fields)

    def _write(self, fields: list[str]) -> None:
        """Writes a line that stays."""
        if self._enabled:
            self._rewrite(fields)
            if self._open:
                self._close()
            else:
                say("  ".join(fields), sys.stderr)

    def _close(self) -> None:
        if self._open:
            sys.stderr.write("\n")
            self._open = False


def _clock(seconds: float) -> str:
    """Seconds as minutes and seconds, with hours if there are any.

    Example:
        >>> _clock(760), _clock(7260)
        ('12:40', '2:01:00')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
