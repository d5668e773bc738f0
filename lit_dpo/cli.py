"""The front door: ``python -m lit_dpo fit | validate | test | predict | generate``.

A ``LightningCLI`` with every Trainer flag, plus our defaults: precision by the hardware, a run folder, the callbacks
that leave adapter, checkpoints, samples and a summary behind, and errors of one line.
"""

import copy
import difflib
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from lightning_utilities.core.imports import RequirementCache

from lit_dpo.callbacks import (
    AdapterExport,
    CollapseGuard,
    ComparisonSamples,
    LastCheckpoint,
    PredictionWriter,
    RunSummary,
)
from lit_dpo.commands import DESCRIPTIONS
from lit_dpo.commands.generate import generate
from lit_dpo.datamodule import PreferenceDataModule
from lit_dpo.module import DPOModule
from lit_dpo.policy.loading import LORA, precision_for
from lit_dpo.run_dir import run_dir

GENERATE = "generate"
LIGHTNING_CHECKPOINTS = ("best", "last", "hpc", "registry")  # names that the Trainer resolves itself


class Parser(LightningArgumentParser):
    """An argument parser whose errors name the key and the nearest right one, in a line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the error and leaves with status 2."""
        parser = getattr(ex, "subcommand_parser", None) or self
        sys.stderr.write(f"error: {_with_suggestion(_in_a_line(message), parser)}\n")
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
        """Parses, with the parameters of an objective that is chosen here at their own defaults."""
        self.config = parser.parse_args(afresh(self._args))

    def _parse_ckpt_path(self) -> None:
        """Takes the model's arguments from a checkpoint, but for those given on the command line or in a file."""
        command = self.config.subcommand
        config = self.config[command]
        path = config.get("ckpt_path")
        if command == GENERATE or not path or path in LIGHTNING_CHECKPOINTS:
            return
        if not Path(path).is_file():
            raise FileNotFoundError(f"--ckpt_path {path}: there is no such file.")
        checkpoint = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        stored = {key: value for key, value in checkpoint.get("hyper_parameters", {}).items() if key[0] != "_"}
        as_stored = self.parser.parse_object({command: {"model": stored}}, self.config)[command].model
        given = {key: _value(config.model, key) for key in _given_model_keys(self._args, config.get("config") or [])}
        for key, value in given.items():
            for setting, now, was in _differences(key, value, _value(as_stored, key)):
                rank_zero_warn(f"model.{setting} is {now!r}, as given; the checkpoint stored {was!r}.")
        self.config = self.parser.parse_object({command: {"model": override(stored, given)}}, self.config)

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


def afresh(args: list[str]) -> list[str]:
    """Takes away an objective, or a part of it, before another one is chosen.

    A parser would carry parameters of the same name over: the β of one objective, from a file, to another. It can take
    away no part of a part of a part.

    Args:
        args: Arguments, as in ``["--config", FILE, "--model.objective", "IPO"]``.
    """
    found: list[str] = []
    outermost = "outermost"
    for arg in args:
        key = re.match(r"--model\.objective(\.objective|\.divergence)?(?==|$)", arg)
        if key and not key[0].startswith(f"{outermost}."):
            outermost = key[0]
            found.append(f"{outermost}=null")
        found.append(arg)
    return found


def override(stored: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Puts given values in the place of stored ones.

    Args:
        stored: Hyper-parameters, nested.
        given: Values by dotted key, ``init_args`` left out: ``objective.beta``.

    Returns:
        The hyper-parameters, without those that are given whole.
    """
    result = copy.deepcopy(stored)
    for key, value in given.items():
        *path, name = key.split(".")
        node = result
        for step in path:
            node = node[step] if isinstance(node.get(step), dict) else {}
            node = node.get("init_args", node)
        if path:
            node[name] = value
        else:
            node.pop(name, None)
    return result


def _differences(key: str, now: Any, was: Any) -> Iterator[tuple[str, Any, Any]]:
    """The settings under a key that are not the same in two configurations; of another class, all as one."""
    same_class = isinstance(now, dict) and isinstance(was, dict) and _class_name(now) == _class_name(was)
    if same_class:
        now, was = now.get("init_args", now), was.get("init_args", was)
        for name in now:
            yield from _differences(f"{key}.{name}", now[name], was.get(name))
    elif _comparable(now) != _comparable(was):
        yield key, now, was


def _class_name(config: dict[str, Any]) -> str:
    """The name of a class without its modules; nothing where there is none."""
    return str(config.get("class_path", "")).rpartition(".")[2]


def _comparable(value: Any) -> Any:
    """A value whose equality means the same setting, however a class is named and modules are ordered."""
    if isinstance(value, dict):
        return {**{name: _comparable(item) for name, item in value.items()}, "class_path": _class_name(value)}
    if isinstance(value, list | tuple | set):
        names = all(isinstance(item, str) for item in value)
        return sorted(value) if names else [_comparable(item) for item in value]
    return value


def _value(config: Any, key: str) -> Any:
    """The value under a dotted key that leaves ``init_args`` out, as plain values; None where there is none."""
    for name in key.split("."):
        if isinstance(config, Namespace):
            config = config.as_dict()
        if not isinstance(config, dict):
            return None
        config = config.get(name, config.get("init_args", {}).get(name) if name not in config else None)
    return config.as_dict() if isinstance(config, Namespace) else config


def _given_model_keys(args: list[str], files: list[Any]) -> list[str]:
    """Dotted keys, without ``model.`` and ``init_args``, that arguments and configuration files set.

    A class that is given anew brings all its arguments, so that its key stands for them.
    """
    keys = [arg.removeprefix("--model.").split("=")[0].rstrip("+") for arg in args if arg.startswith("--model.")]
    for file in files:
        keys += _leaves(yaml.safe_load(Path(str(file)).read_text()).get("model") or {})
    keys = [key.replace(".init_args", "").removesuffix(".class_path") for key in dict.fromkeys(keys)]
    return [key for key in keys if not any(key.startswith(f"{whole}.") for whole in keys)]


def _leaves(config: dict[str, Any], prefix: str = "") -> list[str]:
    """The dotted keys of a nested mapping."""
    keys = []
    for key, value in config.items():
        nested = isinstance(value, dict) and value
        keys += _leaves(value, f"{prefix}{key}.") if nested else [prefix + key]
    return keys


def _in_a_line(message: str) -> str:
    """Says shortly that a value is of none of several types; other long errors as they are."""
    found = re.search(r'key "([\w.]+)":.*Subtypes: \[(.*?)\]\n.*Given value: ([^\n]*)', message, re.DOTALL)
    if not found:
        return " ".join(message.split()) if message.count("\n") <= 2 else message
    key, types, value = found.groups()
    types = re.sub(r"typing\.Literal\[(.*?)\]|<class '(?:\w+\.)*(\w+)'>", r"\1\2", types)
    return f'Parser key "{key}": expected one of {types}, not {value}'


def _with_suggestion(message: str, parser: Any) -> str:
    """Adds the nearest known key to an error about an unknown one."""
    known = {key.removeprefix("--") for action in parser._actions for key in action.option_strings if key[:2] == "--"}
    known |= set(getattr(getattr(parser, "_subcommands_action", None), "choices", None) or ())
    for candidate in re.findall(r"[\w.]+", message):
        close = difflib.get_close_matches(candidate, known - {candidate}, n=1, cutoff=0.75)
        if close and candidate not in known and len(candidate) > 3:
            return f"{message.rstrip('.')}. Did you mean {close[0]}?"
    return message


def main(args: list[str] | None = None) -> None:
    """Runs the command line.

    Args:
        args: The arguments, command first; by default those of the process, whose errors are then told in a line.
    """
    quiet_libraries()
    try:
        DPOCLI(args, **OPTIONS)
    except (ValueError, OSError, MisconfigurationException) as error:
        if args is not None or not _is_the_users(error):
            raise
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        sys.exit(130)


def _is_the_users(error: BaseException) -> bool:
    """Whether an error was raised here, or by Lightning's checks, and so tells the user what to do."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    raised_here = frame is not None and Path(frame.tb_frame.f_code.co_filename).is_relative_to(Path(__file__).parent)
    return raised_here or isinstance(error, MisconfigurationException)
