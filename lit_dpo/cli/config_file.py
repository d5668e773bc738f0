"""The ``config.yaml`` that a run leaves: without secrets, and beside those of earlier starts of the same run."""

import shutil
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_warn

from lit_dpo.files.secrets import remove_secrets
from lit_dpo.training.run_dir import run_dir


class SaveFitConfig(SaveConfigCallback):
    """Saves ``config.yaml`` only for ``fit``, so that a later ``validate`` cannot overwrite it.

    Secrets, such as a logger's ``api_key``, are left out.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Saves into the run's folder."""
        if stage != "fit" or self.already_saved:
            return
        path = run_dir(trainer) / self.config_filename
        if trainer.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.parser.save(without_secrets(self.config), str(path), skip_none=False, overwrite=True)
        self.already_saved = True


def check_folder(trainer: Trainer, ckpt_path: Any) -> None:
    """Lets a logger of a fixed version go on with its own run, and with no other. Collective.

    Resumed from a checkpoint in the run's folder, the files of the first start are copied beside. Lightning's loggers
    replace them without asking as soon as a run begins.

    Raises:
        ValueError: If the folder belongs to another run.
    """
    if not any(isinstance(callback, SaveFitConfig) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        return  # a dry run leaves no files
    folder = run_dir(trainer)
    path = folder / "config.yaml"
    if trainer.is_global_zero and path.exists():
        if not trainer.loggers or not is_inside(ckpt_path, folder):
            raise ValueError(f"{path} belongs to another run. Choose another folder or version for the logger.")
        keep_earlier(path, folder / "metrics.csv")


def without_secrets(config: Namespace) -> Namespace:
    """A copy of a configuration without keys and passwords. Warns of what it leaves out."""
    copy = config.clone()
    left_out = sorted(set(remove_secrets(copy)))
    if left_out:
        rank_zero_warn(
            f"config.yaml does not hold the secret {', '.join(left_out)}. Give it again, or in the environment "
            "variable that the library reads."
        )
    return copy


def is_inside(path: Any, folder: Path) -> bool:
    """Whether a path, if there is one, lies in a folder."""
    return path is not None and Path(path).resolve().is_relative_to(folder.resolve())


def keep_earlier(*paths: Path) -> None:
    """Copies files that are about to be replaced to the next free number: ``metrics.csv`` to ``metrics_1.csv``."""
    for path in paths:
        if path.exists():
            number = 1
            while (kept := path.with_name(f"{path.stem}_{number}{path.suffix}")).exists():
                number += 1
            shutil.copy2(path, kept)
