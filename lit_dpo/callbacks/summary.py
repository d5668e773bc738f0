"""RunSummary: prints held-out metrics before the first step and after the last, and the files of the run."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_dpo.files.console import say
from lit_dpo.training.run_dir import run_dir

ROWS = ("val/loss", "val/rewards/accuracies", "val/rewards/margins", "val/logps/chosen", "val/logps/rejected")
FILES = {
    "adapter": "the aligned adapter, for peft.AutoPeftModelForCausalLM",
    "checkpoints": "last.ckpt to resume from, and the best by val/loss",
    "config.yaml": "the whole configuration",
    "metrics.csv": "every logged number",
    "samples.md": "base against aligned answers",
}


class RunSummary(Callback):
    """Prints held-out metrics before and after training. The first need ``trainer.num_sanity_val_steps=-1``."""

    def __init__(self) -> None:
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the held-out metrics."""
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
        """Prints the table, and those files of the run that exist."""
        folder = run_dir(trainer)
        if not trainer.is_global_zero:
            return
        if self.after:
            say(f"\n{'held-out pairs':<26}{'before':>12}{'after':>12}")
            for name in ROWS:
                before = f"{self.before[name]:.4f}" if name in self.before else "-"
                say(f"{name.removeprefix('val/'):<26}{before:>12}{self.after.get(name, float('nan')):>12.4f}")
        say(f"\n{folder}/")
        for name, meaning in FILES.items():
            if (folder / name).exists():
                say(f"  {name:<14}{meaning}")
