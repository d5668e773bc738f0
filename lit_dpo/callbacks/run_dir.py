"""Where a run leaves its files."""

from pathlib import Path

from lightning.pytorch import Trainer


def run_dir(trainer: Trainer) -> Path:
    """The folder of the user's logger, or ``default_root_dir`` without one. Collective: every rank must call it."""
    return Path(trainer.log_dir or trainer.default_root_dir)
