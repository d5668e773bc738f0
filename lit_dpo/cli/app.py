"""A ``LightningCLI`` with this project's defaults and its own commands."""

import inspect
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import docstring_parser
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelSummary, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger

from lit_dpo.callbacks import AdapterExport, ComparisonSamples, HeldOutIntervals, ParameterSummary
from lit_dpo.cli.config_file import SaveFitConfig, check_folder
from lit_dpo.cli.defaults import BAREBONES, CALLBACKS, DEFAULTS, default_loggers, quiet_libraries
from lit_dpo.cli.errors import line_for, one_line, with_suggestion
from lit_dpo.cli.overrides import (
    LIGHTNING_CHECKPOINTS,
    check_environment,
    check_nulls,
    given_checkpoint,
    last_given,
    new_classes_start_afresh,
    read_integers_first,
    run_name,
    stored_arguments,
    warn_of_overrides,
    with_checkpoint_of_run,
)
from lit_dpo.commands import DESCRIPTIONS, LIKE_FIT, OWN, function_of
from lit_dpo.datamodule import PreferenceDataModule
from lit_dpo.evaluation.against import run_against
from lit_dpo.evaluation.trained import Trained, find_checkpoint
from lit_dpo.files.console import make_streams_safe
from lit_dpo.module import DPOModule
from lit_dpo.policy.precision import precision_for

# Arguments of our own commands that are built from the options of fit
GIVEN: dict[str, Callable[["DPOCLI", Any], Any]] = {
    "trainer": lambda cli, config: cli.trainer,
    "model": lambda cli, config: config.model,
    "data": lambda cli, config: config.data,
    "length": lambda cli, config: {
        "epochs": config.trainer.max_epochs,
        "steps": config.trainer.max_steps,
        "accumulate": config.trainer.accumulate_grad_batches,
        "limit": config.trainer.limit_train_batches,
        "processes": number_of_devices(config.trainer.devices) * config.trainer.num_nodes,
        "split": str(config.trainer.strategy).startswith("sharded"),
        "precision": cli.given_precision,
    },
    "progress_bar": lambda cli, config: config.trainer.enable_progress_bar is not False,
}


class Parser(LightningArgumentParser):
    """An argument parser whose errors take one line and name the nearest known key."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the error and exits with status 2."""
        if os.environ.get("LIT_DPO_TRACEBACK") == "1" and ex is not None:
            raise ex
        parser = getattr(ex, "subcommand_parser", None) or self
        sys.stderr.write(f"error: {with_suggestion(one_line(message), parser)}\n")
        self.exit(2)


OPTIONS: dict[str, Any] = {
    "save_config_callback": SaveFitConfig,
    "seed_everything_default": 42,
    "parser_class": Parser,
    "parser_kwargs": {"prog": "lit_dpo", "allow_abbrev": False},
    "auto_configure_optimizers": False,  # the module has its own optimizer and schedule
}


class DPOCLI(LightningCLI):
    """``LightningCLI`` with this project's defaults and its own commands.

    Args:
        model_class: ``DPOModule`` or a class derived from it.
        datamodule_class: ``PreferenceDataModule``, a class derived from it, or any whose batches are ``PairBatch``.
        args: The command and its arguments; None for those of the process.
        options: Options of ``LightningCLI`` that replace those of this command line.
    """

    def __init__(
        self,
        model_class: type[LightningModule] = DPOModule,
        datamodule_class: type[LightningDataModule] = PreferenceDataModule,
        *,
        args: list[str] | None = None,
        **options: Any,
    ) -> None:
        self._args = sys.argv[1:] if args is None else args
        options = {**OPTIONS, **options}
        # Reading variables takes a tenth of a second, so it is done only if there are any: PL_FIT__TRAINER__MAX_EPOCHS.
        given = any(re.match(r"PL_[A-Z]+__", name) for name in os.environ)
        options["parser_kwargs"] = {"default_env": given, "env_prefix": "PL", **options["parser_kwargs"]}
        super().__init__(model_class, datamodule_class, args=args, **options)

    given_precision: str | None = None  # trainer.precision, before it is chosen for this machine
    _against: Trained | None = None  # the checkpoint that ``test`` compares with

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the run's name and the callbacks, each configurable under its own key."""
        parser.add_argument(
            "--run_name",
            type=str | None,
            default=None,
            help="Name of the folder under runs/; by default that of the configuration file.",
        )
        for key, callback in CALLBACKS.items():
            parser.add_lightning_class_args(callback, key)
        parser.set_defaults(DEFAULTS)

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """Adds the commands. Only the command in use gets its arguments, because building them takes seconds.

        ``LightningCLI.subcommands`` would be the public way, but it accepts only methods of the Trainer.
        """
        self._subcommand_parsers: dict[str, LightningArgumentParser] = {}
        commands = parser.add_subcommands()
        for name, description in DESCRIPTIONS.items():
            options: dict[str, Any] = {"prog": f"lit_dpo {name}", "description": description, "allow_abbrev": False}
            if name not in self._args:
                command = self.parser_class(**options)
            elif name in LIKE_FIT:
                command = self._prepare_subcommand_parser(Trainer, "fit", **options)
                read_integers_first(command)
                command.add_function_arguments(function_of(name), skip=set(GIVEN))
            elif name in OWN:
                command = self.init_parser(**options)
                for several in _several(function_of(name)):
                    command.add_argument(several, nargs="+", help=_help_of(function_of(name), several))
                command.add_function_arguments(function_of(name))
            else:
                command = self._prepare_subcommand_parser(Trainer, name, **options)
                read_integers_first(command)
                command.set_defaults({"weights_only": True})  # loading a checkpoint must not run code
            if name == "test" and name in self._args:
                command.set_defaults({"verbose": False})  # HeldOutIntervals prints more than Lightning's table
                command.add_argument(
                    "--against",
                    type=str | None,
                    default=None,
                    help="Another checkpoint, to be compared on the same pairs.",
                )
            self._subcommand_parsers[name] = command
            commands.add_subcommand(name, command, help=description)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the arguments. A checkpoint's arguments become the model's defaults; overriding one gives a warning.

        Raises:
            FileNotFoundError: If the checkpoint does not exist.
            ValueError: If it is not clear which checkpoint is meant.
        """
        command = next((arg for arg in self._args if arg in DESCRIPTIONS), None)
        if command is not None:
            check_environment(self._subcommand_parsers[command], command, DESCRIPTIONS)
        if command is not None and command not in OWN:
            self._args = with_checkpoint_of_run(self._args, command)
        path = None if command is None or command in OWN else given_checkpoint(self._args, command)
        stored: dict[str, Any] = {}
        if path is not None and command is not None:
            plain = stored_arguments(path)
            stored = parser.parse_object({command: {"model": plain}})[command].model.as_dict()
            self._subcommand_parsers[command].set_defaults({f"model.{key}": stored[key] for key in plain})
        with new_classes_start_afresh():
            self.config = parser.parse_args(self._args)
        if command in LIKE_FIT and self.config[command].ckpt_path is not None:
            raise ValueError(f"{command} reads no checkpoint. If a configuration file sets one, add --ckpt_path null.")
        if command is None or command in OWN:
            return
        final = self.config[command].get("ckpt_path")
        if (final or None) != path and final not in LIGHTNING_CHECKPOINTS:
            raise ValueError(
                f"ckpt_path is {path} at first and {final} in the end: give it after the files of --config."
            )
        if stored:
            warn_of_overrides(self.config[command].model.as_dict(), stored)

    def _parse_ckpt_path(self) -> None:
        """Does nothing, because ``parse_arguments`` has read the checkpoint already."""

    def _set_seed(self) -> None:
        if "trainer" in self._taken():
            super()._set_seed()

    def before_instantiate_classes(self) -> None:
        """Chooses precision and run name, so that the saved configuration holds them."""
        if self.subcommand in OWN and self.subcommand not in LIKE_FIT:
            return
        config = self.config[self.subcommand]
        for key, kind in (("model", self._model_class), ("data", self._datamodule_class)):
            if isinstance(kind, type):
                check_nulls(key, kind, config[key])
        follows = last_given(self._args, str(self.subcommand), "data.seed") is None
        if type(config.seed_everything) is int and follows and "seed" in config.data:
            config.data.seed = config.seed_everything
        self.given_precision = config.trainer.precision
        if config.trainer.precision is None:
            on_gpu = config.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
            config.trainer.precision = precision_for(torch.device("cuda" if on_gpu else "cpu"))
        if isinstance(config.trainer.strategy, str) and "." in config.trainer.strategy:
            raise ValueError(
                f"trainer.strategy={config.trainer.strategy}: a class is given in a configuration file, by class_path "
                "and init_args. On the command line, give a name: ddp, sharded, ddp_fork or sharded_fork."
            )
        if config.run_name is None:
            config.run_name = run_name([str(file) for file in config.get("config") or []])

    def instantiate_classes(self) -> None:
        """Builds model, data and trainer, or those of them that the command takes."""
        if "trainer" in self._taken():
            super().instantiate_classes()
        else:
            self.config_init = self.parser.instantiate_classes(self.config)

    def before_fit(self) -> None:
        """Checks that the run's folder is its own, before Lightning's loggers replace files in it."""
        check_folder(self.trainer, self.config.fit.ckpt_path)

    def before_test(self) -> None:
        """Finds the checkpoint to compare with, before anything is computed, and names both for the report."""
        config = self.config.test
        self._against = (
            None
            if config.against is None
            else find_checkpoint(
                Path(config.against), trust_remote_code=config.model.trust_remote_code, option="--against"
            )
        )
        for callback in self._intervals():
            callback.model_name = str(config.ckpt_path or self.model.base)

    def after_test(self) -> None:
        """Tests the checkpoint to compare with."""
        if self._against is not None:
            for callback in self._intervals():
                callback.model_name = str(self._against.path)
            run_against(self.trainer, self.model, self._against)

    def _intervals(self) -> list[HeldOutIntervals]:
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        return [callback for callback in callbacks if isinstance(callback, HeldOutIntervals)]

    def _taken(self) -> set[str]:
        """The arguments that the command's function takes, of those in ``GIVEN``. Commands of the Trainer take all."""
        if self.subcommand not in OWN:
            return set(GIVEN)
        if self.subcommand not in LIKE_FIT:
            return set()
        return set(GIVEN) & inspect.signature(function_of(self.subcommand)).parameters.keys()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Logs to ``runs/<name>/version_N`` unless another logger was chosen."""
        config = self.config_init[self.subcommand]
        if self.subcommand in OWN:
            nothing = {"logger": False, "enable_checkpointing": False, "min_epochs": None, "min_steps": None}
            return super().instantiate_trainer(**nothing, num_sanity_val_steps=1)  # it fills in all held-out pairs
        if config.trainer.barebones:
            pass
        elif config.trainer.logger in (None, True):
            kwargs["logger"] = default_loggers(config.run_name, claimed=not config.trainer.fast_dev_run)
        elif config.trainer.logger is False and config.trainer.default_root_dir is None:
            kwargs["default_root_dir"] = CSVLogger("runs", name=config.run_name).log_dir
        return super().instantiate_trainer(**kwargs)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        if self.subcommand in OWN:  # nothing is trained, so nothing is logged or saved
            return Trainer(**{**config, "callbacks": []})
        left_out: tuple[type[Callback], ...] = ()
        if config.get("enable_checkpointing") is False:
            left_out = (Checkpoint,)
        if config.get("fast_dev_run"):
            left_out = (Checkpoint, AdapterExport, ComparisonSamples)
        if config.get("barebones"):  # nothing but training, to measure its overhead
            return Trainer(**{**config, **BAREBONES})
        chosen = config.get("callbacks") or []
        if config.get("enable_progress_bar") is False or any(isinstance(one, ProgressBar) for one in chosen):
            left_out += (CALLBACKS["progress"],)
        callbacks = [callback for callback in callbacks if not isinstance(callback, left_out)]
        if config.get("enable_model_summary") and not any(isinstance(one, ModelSummary) for one in chosen):
            callbacks.append(ParameterSummary())
        return super()._instantiate_trainer(config, callbacks)

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand not in OWN:
            super()._run_subcommand(subcommand)
            return
        config, function = self.config_init[subcommand], function_of(subcommand)
        taken = self._taken()
        arguments = {name: config[name] for name in inspect.signature(function).parameters if name not in taken}
        several = [value for name in _several(function) for value in arguments.pop(name)]
        function(*several, **arguments, **{name: GIVEN[name](self, config) for name in taken})


def number_of_devices(devices: Any) -> int:
    """The number of devices that ``trainer.devices`` asks for; ``auto`` and -1 count as one."""
    if isinstance(devices, list | tuple):
        return len(devices)
    return int(devices) if str(devices).isdigit() and int(devices) > 0 else 1


def _help_of(function: Callable[..., Any], name: str) -> str:
    """What the docstring of a function tells of a parameter."""
    parameters = docstring_parser.parse(function.__doc__ or "").params
    return next((one.description or "" for one in parameters if one.arg_name.lstrip("*") == name), "")


def _several(function: Callable[..., Any]) -> list[str]:
    """The name of the parameter ``*name`` of a function, if it has one: its values are given without a dash."""
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.VAR_POSITIONAL]


def main(args: list[str] | None = None) -> None:
    """Runs the command line.

    Args:
        args: The command and its arguments; by default those of the process. Only by default are errors shortened to
            one line. ``LIT_DPO_TRACEBACK=1`` shows the full traceback.
    """
    make_streams_safe()
    quiet_libraries()
    try:
        DPOCLI(args=args)
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        sys.exit(130)
    except Exception as error:
        message = line_for(error)
        if args is not None or not message or os.environ.get("LIT_DPO_TRACEBACK") == "1":
            raise
        sys.stderr.write(f"error: {message}\n")
        sys.exit(1)
