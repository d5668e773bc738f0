"""The front door: ``python -m lit_dpo fit | validate | test | predict | generate``.

A ``LightningCLI`` with every Trainer flag, plus our defaults: precision by the hardware, a run folder, the callbacks
that leave adapter, checkpoints, samples and a summary behind, and errors of one line.
"""

import argparse
import importlib
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NoReturn
from unittest.mock import patch

import torch
import yaml
from jsonargparse import _typehints
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from lightning_utilities.core.imports import RequirementCache

from lit_dpo import objectives
from lit_dpo.callbacks import (
    AdapterExport,
    CollapseGuard,
    ComparisonSamples,
    LastCheckpoint,
    PredictionWriter,
    RunSummary,
)
from lit_dpo.cli_errors import in_a_line, is_the_users, own_words, with_suggestion
from lit_dpo.commands import DESCRIPTIONS
from lit_dpo.commands.generate import generate
from lit_dpo.datamodule import PreferenceDataModule
from lit_dpo.module import DPOModule
from lit_dpo.policy.loading import LORA, precision_for
from lit_dpo.policy.reference import AnotherModel, MovingReference
from lit_dpo.run_dir import run_dir

GENERATE = "generate"
LIGHTNING_CHECKPOINTS = ("hpc", "registry")  # names that the Trainer resolves itself


class Parser(LightningArgumentParser):
    """An argument parser whose errors name the key and the nearest right one, in a line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the error and leaves with status 2."""
        parser = getattr(ex, "subcommand_parser", None) or self
        sys.stderr.write(f"error: {with_suggestion(in_a_line(message), parser)}\n")
        self.exit(2)


class SaveFitConfig(SaveConfigCallback):
    """Saves ``config.yaml`` of a fit alone, so that a later ``validate`` cannot overwrite it."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Saves into the run's folder."""
        if stage != "fit" or self.already_saved:
            return
        path = run_dir(trainer) / self.config_filename
        if trainer.is_global_zero:
            if path.exists():
                raise ValueError(f"{path} is another run's: choose another folder or version for the logger.")
            path.parent.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, str(path), skip_none=False)
        self.already_saved = True


class DPOCLI(LightningCLI):
    """``LightningCLI`` with this project's defaults and its own subcommand ``generate``.

    Args:
        args: The arguments, command first; None for those of the process.
        options: Those of ``LightningCLI``.
    """

    def __init__(self, args: list[str] | None, **options: Any) -> None:
        self._args = sys.argv[1:] if args is None else args
        super().__init__(args=args, **options)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the run's name and the callbacks, each configurable under its own key."""
        parser.add_argument(
            "--run_name",
            type=str | None,
            default=None,
            help="Name of the folder under runs/; by default that of the configuration file.",
        )
        callbacks = {
            "best": ModelCheckpoint,
            "last": LastCheckpoint,
            "guard": CollapseGuard,
            "export": AdapterExport,
            "samples": ComparisonSamples,
            "summary": RunSummary,
            "predictions": PredictionWriter,
        }
        for key, callback in callbacks.items():
            parser.add_lightning_class_args(callback, key)
        parser.set_defaults(
            {
                "model.objective": {"class_path": "lit_dpo.objectives.Sigmoid"},
                "model.lora": {"class_path": "peft.LoraConfig", "init_args": LORA},
                "best.monitor": "val/loss",
                "best.filename": "best-step{step}",
                "best.auto_insert_metric_name": False,
                "best.save_on_train_epoch_end": False,  # at an evaluation, when there is a val/loss
                "trainer.enable_model_summary": False,  # it counts packed 4-bit weights; the module tells its own
                # The whole held-out set, so that its numbers before the first step are known.
                "trainer.num_sanity_val_steps": -1,
                "trainer.max_epochs": 1,
                "trainer.log_every_n_steps": 1,
            }
        )

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """Adds the commands, with the arguments of the one that is asked for: building all takes seconds."""
        self._subcommand_parsers: dict[str, LightningArgumentParser] = {}
        commands = parser.add_subcommands()
        for name, description in DESCRIPTIONS.items():
            options: dict[str, Any] = {"prog": f"lit_dpo {name}", "description": description, "allow_abbrev": False}
            if name not in self._args:
                command = self.parser_class(**options)
            elif name == GENERATE:
                command = self.init_parser(**options)
                command.add_function_arguments(generate)
            else:
                command = self._prepare_subcommand_parser(Trainer, name, **options)
                command.set_defaults({"weights_only": True})  # a checkpoint may not bring code
            self._subcommand_parsers[name] = command
            commands.add_subcommand(name, command, help=description)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses upon the model's arguments of a checkpoint, if there is one; what is given beats them, with a warning.

        Raises:
            FileNotFoundError: If the checkpoint is not there.
            ValueError: If it is not plain which one is meant.
        """
        command = next((arg for arg in self._args if arg in DESCRIPTIONS), GENERATE)
        path = None if command == GENERATE else _given_checkpoint(self._args, command)
        stored: dict[str, Any] = {}
        if path is not None:
            if path in ("last", "best"):
                raise ValueError(
                    f"--ckpt_path {path}: each run has a folder of its own. Give the file, as in "
                    "runs/NAME/version_0/checkpoints/last.ckpt."
                )
            if not Path(path).is_file():
                raise FileNotFoundError(f"--ckpt_path {path}: there is no such file.")
            try:
                checkpoint = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
            except (RuntimeError, UnpicklingError, EOFError) as error:
                raise ValueError(f"--ckpt_path {path}: the file is no checkpoint, or it is damaged.") from error
            plain = {key: value for key, value in checkpoint.get("hyper_parameters", {}).items() if key[0] != "_"}
            stored = parser.parse_object({command: {"model": plain}})[command].model.as_dict()
            self._subcommand_parsers[command].set_defaults({f"model.{key}": stored[key] for key in plain})
        with _new_classes_start_afresh():
            self.config = parser.parse_args(self._args)
        final = self.config[command].get("ckpt_path") if command != GENERATE else None
        if (final or None) != path and final not in LIGHTNING_CHECKPOINTS:
            raise ValueError(
                f"ckpt_path is {path} at first and {final} in the end: give it after the files of --config."
            )
        if stored:
            for setting, now, was in _differences("model", self.config[command].model.as_dict(), stored):
                rank_zero_warn(f"{setting} is {_shown(now)}, as given; the checkpoint stored {_shown(was)}.")

    def _parse_ckpt_path(self) -> None:
        """Nothing: the checkpoint has been read before the arguments were."""

    def _set_seed(self) -> None:
        if self.subcommand != GENERATE:
            super()._set_seed()

    def before_instantiate_classes(self) -> None:
        """Chooses what depends on hardware and configuration file, so that the saved configuration holds it."""
        if self.subcommand == GENERATE:
            return
        config = self.config[self.subcommand]
        if config.trainer.precision is None:
            on_gpu = config.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
            config.trainer.precision = precision_for(torch.device("cuda" if on_gpu else "cpu"))
        if config.run_name is None:
            files = config.get("config") or []
            config.run_name = Path(str(files[-1])).stem if files else "dpo"

    def instantiate_classes(self) -> None:
        """Builds model, data and trainer; ``generate`` needs none of them."""
        if self.subcommand == GENERATE:
            self.config_init = self.parser.instantiate_classes(self.config)
        else:
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Logs to ``runs/<name>/version_N`` unless a logger was chosen."""
        config = self.config_init[self.subcommand]
        if config.trainer.logger in (None, True):
            kwargs["logger"] = default_loggers(config.run_name)
        elif config.trainer.logger is False and config.trainer.default_root_dir is None:
            kwargs["default_root_dir"] = CSVLogger("runs", name=config.run_name).log_dir
        return super().instantiate_trainer(**kwargs)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        left_out: tuple[type[Callback], ...] = ()
        if config.get("enable_checkpointing") is False:
            left_out = (Checkpoint,)
        if config.get("fast_dev_run"):
            left_out = (Checkpoint, AdapterExport, ComparisonSamples)
        callbacks = [callback for callback in callbacks if not isinstance(callback, left_out)]
        return super()._instantiate_trainer(config, callbacks)

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand == GENERATE:
            generate(**{key: value for key, value in self.config_init[GENERATE].items() if key != "config"})
        else:
            super()._run_subcommand(subcommand)


OPTIONS: dict[str, Any] = {
    "model_class": DPOModule,
    "datamodule_class": PreferenceDataModule,
    "save_config_callback": SaveFitConfig,
    "seed_everything_default": 42,
    "parser_class": Parser,
    "parser_kwargs": {"prog": "lit_dpo", "allow_abbrev": False},
    "auto_configure_optimizers": False,  # the module has its own optimizer and schedule
}


def default_loggers(name: str) -> list[Logger]:
    """``metrics.csv``, and TensorBoard events where tensorboard is installed, in a folder that no run had before."""
    csv = CSVLogger("runs", name=name)
    if not RequirementCache("tensorboard"):
        return [csv]
    return [csv, TensorBoardLogger("runs", name=name, version=csv.version)]


def quiet_libraries() -> None:
    """Keeps back what libraries say of themselves and nobody running a command can act on."""
    for message in (
        "`loftq_config` specified but will be ignored",  # peft, of its own default
        "`is_gradient_checkpointing` is deprecated",  # peft, calling transformers
        "`isinstance\\(treespec, LeafSpec\\)` is deprecated",  # lightning, calling torch
        "The dirpath has changed from",  # lightning, of a resumed run, which gets a folder of its own
    ):
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "litlogger" not in record.getMessage() and "litmodels" not in record.getMessage()
    )


@contextmanager
def _new_classes_start_afresh() -> Iterator[None]:
    """Within it an objective, or another class of ours, that takes another one's place starts from its own defaults.

    jsonargparse would carry over what has the same name: the β of one objective, from a file, to another. For classes
    of libraries that stays: another optimizer keeps the learning rate.
    """
    carry_over = _typehints.discard_init_args_on_class_path_change

    def discard(parser: Any, before: Any, now: Any) -> None:
        classes = [_class(config["class_path"]) for config in (before, now) if config]
        if "init_args" in (before or ()) and classes[0] != classes[1] and _is_ours(classes[1]):
            before.pop("init_args")
        carry_over(parser, before, now)  # type: ignore[no-untyped-call]

    with patch.object(_typehints, "discard_init_args_on_class_path_change", discard):
        yield


def _given_checkpoint(args: list[str], command: str) -> str | None:
    """The checkpoint's file that arguments or configuration files name; None for names that the Trainer resolves."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--ckpt_path")
    parser.add_argument("--config", "-c", action="append", default=[])
    given, _ = parser.parse_known_args(args)
    found = [given.ckpt_path] if given.ckpt_path is not None else []
    for file in given.config if not found else ():
        try:
            config = yaml.safe_load(Path(file).read_text())
        except OSError:  # the parser will say so
            continue
        except yaml.YAMLError as error:  # the parser would not say in which file
            raise ValueError(f"--config {file} is not valid YAML: {' '.join(str(error).split())}.") from error
        parts = [config, config.get(command)] if isinstance(config, dict) else []
        found += [part["ckpt_path"] for part in parts if isinstance(part, dict) and "ckpt_path" in part]
    path: str | None = found[-1] if found else None
    return None if path in (*LIGHTNING_CHECKPOINTS, "null") else path


def _differences(key: str, now: Any, was: Any) -> Iterator[tuple[str, Any, Any]]:
    """The settings under a key that are not the same in two configurations; of another class, all as one."""
    both = isinstance(now, dict) and isinstance(was, dict)
    if both and _class(now.get("class_path")) == _class(was.get("class_path")):
        now, was = now.get("init_args", now), was.get("init_args", was)
        for name in now:
            yield from _differences(f"{key}.{name}", now[name], was.get(name))
    elif _comparable(now) != _comparable(was):
        yield key, now, was


def _class(path: Any) -> Any:
    """The class of a path, whichever of its modules that names; the path itself where there is no such class."""
    module, _, name = str(path).rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return path


def _is_ours(found: Any) -> bool:
    """Whether a class is a kind of what this project defines."""
    kinds = (objectives.Objective, objectives.Divergence, AnotherModel, MovingReference)
    return isinstance(found, type) and issubclass(found, kinds)


def _comparable(value: Any) -> Any:
    """A value whose equality means the same setting, however a class is named and modules are ordered."""
    if isinstance(value, dict):
        return {
            **{name: _comparable(item) for name, item in value.items()},
            "class_path": _class(value.get("class_path")),
        }
    if isinstance(value, list | tuple | set):
        names = all(isinstance(item, str) for item in value)
        return sorted(value) if names else [_comparable(item) for item in value]
    return value


def _shown(value: Any) -> str:
    """A setting in few words."""
    if isinstance(value, dict) and "class_path" in value:
        arguments = ", ".join(f"{name}={_shown(item)}" for name, item in value.get("init_args", {}).items())
        return f"{value['class_path'].rpartition('.')[2]}({arguments})"
    return repr(value)


def main(args: list[str] | None = None) -> None:
    """Runs the command line.

    Args:
        args: The arguments, command first; by default those of the process, whose errors are then told in a line.
    """
    quiet_libraries()
    try:
        DPOCLI(args, **OPTIONS)
    except (ValueError, OSError, MisconfigurationException) as error:
        message = str(error) if is_the_users(error) else own_words(str(error))
        if args is not None or not message:
            raise
        sys.stderr.write(f"error: {message}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        sys.exit(130)
