"""The ``config.yaml`` that a run leaves: without secrets, and beside those of earlier starts of the same run."""

import inspect
import shutil
import sys
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_warn

from lit_dpo.files.atomic import write_json
from lit_dpo.files.secrets import remove_secrets
from lit_dpo.report.content import flatten
from lit_dpo.report.evidence import CHANGED, FOLDER
from lit_dpo.training.run_dir import run_dir


class SaveFitConfig(SaveConfigCallback):
    """Saves ``config.yaml`` only for ``fit``, so that a later ``validate`` cannot overwrite it.

    What differs from the defaults goes to ``evidence/changed.json``, for the report.

    Secrets, such as a logger's ``api_key``, are left out.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Saves into the run's folder."""
        if stage != "fit" or self.already_saved:
            return
        path = run_dir(trainer) / self.config_filename
        if trainer.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            config = without_secrets(self.config)
            self.parser.save(config, str(path), skip_none=False, overwrite=True)
            defaults = self.parser.get_defaults(skip_validation=True)
            write_json(path.parent / FOLDER / CHANGED, changed_settings(config.as_dict(), defaults.as_dict()))
        self.already_saved = True


def changed_settings(config: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The settings that are not the defaults, by dotted name.

    Of a class that is not the default one, its arguments are compared with its own defaults. ``loftq_config`` is left
    out: it is always spelled out.
    """
    given, usual = flatten(config), flatten(defaults)
    for name, class_path in given.items():
        if name.endswith(".class_path") and usual.get(name) != class_path:
            prefix = f"{name.removesuffix('class_path')}init_args."
            usual |= {f"{prefix}{key}": value for key, value in _own_defaults(class_path).items()}
    return {
        name: value
        for name, value in given.items()
        if name != "config" and ".loftq_config." not in name and not (name in usual and _alike(usual[name], value))
    }


def _own_defaults(class_path: Any) -> dict[str, Any]:
    """The defaults in the signature of a class, which a configuration has imported already; none if it is unknown."""
    module, _, name = str(class_path).rpartition(".")
    kind = getattr(sys.modules.get(module), name, None)
    if kind is None:
        return {}
    parameters = inspect.signature(kind).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not one.empty}


def _alike(first: Any, second: Any) -> bool:
    """Whether two settings are the same; a tuple is written as a list."""
    return first == second or str(first).replace("(", "[").replace(")", "]") == str(second)


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
