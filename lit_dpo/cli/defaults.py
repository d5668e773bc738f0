"""Defaults of the command line: callbacks under their own keys, loggers, quiet libraries."""

import logging
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning_utilities.core.imports import RequirementCache

from lit_dpo.callbacks import (
    AdapterExport,
    CollapseGuard,
    ComparisonSamples,
    HeldOutAnswers,
    HeldOutIntervals,
    LastCheckpoint,
    PredictionWriter,
    RunReport,
    RunSummary,
    StepProgress,
)
from lit_dpo.policy.adapters import LORA

CALLBACKS: dict[str, type[Callback]] = {
    "progress": StepProgress,
    "best": ModelCheckpoint,
    "last": LastCheckpoint,
    "guard": CollapseGuard,
    "export": AdapterExport,
    "samples": ComparisonSamples,
    "summary": RunSummary,
    "predictions": PredictionWriter,
    "intervals": HeldOutIntervals,
    "answers": HeldOutAnswers,
    "report": RunReport,
}
DEFAULTS: dict[str, Any] = {
    "model.objective": {"class_path": "lit_dpo.objectives.Sigmoid"},
    "model.lora": {"class_path": "peft.LoraConfig", "init_args": LORA},
    "best.monitor": "val/loss",
    "best.filename": "best-step{step}",
    "best.auto_insert_metric_name": False,
    "best.save_on_train_epoch_end": False,  # but after an evaluation, when val/loss is known
    "trainer.enable_model_summary": False,  # it miscounts packed 4-bit weights; the module logs its own
    "trainer.num_sanity_val_steps": -1,  # all held-out pairs, so that their metrics before the first step are known
    "trainer.max_epochs": 1,
    "trainer.log_every_n_steps": 1,
}
# What trainer.barebones allows of the settings that have a default here
BAREBONES: dict[str, Any] = {
    "callbacks": None,
    "logger": None,
    "enable_checkpointing": None,
    "enable_progress_bar": None,
    "enable_model_summary": None,
    "num_sanity_val_steps": None,
    "log_every_n_steps": None,
}


def default_loggers(name: str, claimed: bool = True) -> list[Logger]:
    """Loggers to a new folder: ``metrics.csv``, and TensorBoard events if tensorboard is installed.

    Args:
        name: Name of the run.
        claimed: Whether to make the folder now, so that no run that starts at the same time takes it.
    """
    csv = CSVLogger("runs", name=name)
    if claimed and getattr(rank_zero_only, "rank", 0) == 0:
        claim(csv)
    if not RequirementCache("tensorboard"):
        return [csv]
    return [csv, TensorBoardLogger("runs", name=name, version=csv.version)]


def claim(logger: CSVLogger) -> None:
    """Makes the folder of a logger's version, or of the next one if a run that started at the same time has it."""
    while True:
        try:
            Path(logger.log_dir).mkdir(parents=True)
            return
        except FileExistsError:
            logger._version = int(logger.version) + 1


def quiet_libraries() -> None:
    """Hides messages of libraries if the user of a command can do nothing about them."""
    for message in (
        "`loftq_config` specified but will be ignored",  # peft, about its own default
        "`is_gradient_checkpointing` is deprecated",  # peft, calling transformers
        "`isinstance\\(treespec, LeafSpec\\)` is deprecated",  # lightning, calling torch
        "The dirpath has changed from",  # lightning, about a resumed run, which gets its own folder
    ):
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "litlogger" not in record.getMessage() and "litmodels" not in record.getMessage()
    )
