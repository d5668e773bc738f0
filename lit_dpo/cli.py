"""The front door: ``python -m lit_dpo fit | validate | test | predict | generate``.

A ``LightningCLI`` with every Trainer flag, plus our defaults: precision by the hardware, a run folder, the callbacks
that leave adapter, checkpoints, samples and a summary behind, and errors of one line.
"""

import difflib
import logging
import re
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from lightning_utilities.core.imports import RequirementCache

from lit_dpo.callbacks import AdapterExport, ComparisonSamples, LastCheckpoint, PredictionWriter, RunSummary
from lit_dpo.commands import DESCRIPTIONS
from lit_dpo.commands.generate import generate
from lit_dpo.datamodule import PreferenceDataModule
from lit_dpo.module import DPOModule
from lit_dpo.policy.loading import LORA, precision_for

GENERATE = "generate"


class Parser(LightningArgumentParser):
    """An argument parser whose errors name the key and the nearest right one, in a line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the error and leaves with status 2."""
        parser = getattr(ex, "subcommand_parser", None) or self
        sys.stderr.write(f"error: {_with_suggestion(message, parser)}\n")
        self.exit(2)


class SaveFitConfig(SaveConfigCallback):
    """Saves ``config.yaml`` of a fit alone, so that a later ``validate`` cannot overwrite it."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Saves into the run's folder."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


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
            options: dict[str, Any] = {"prog": f"lit_dpo {name}", "description": description}
            if name not in self._args:
                command = self.parser_class(**options)
            elif name == GENERATE:
                command = self.init_parser(**options)
                command.add_function_arguments(generate)
            else:
                command = self._prepare_subcommand_parser(Trainer, name, **options)
            self._subcommand_parsers[name] = command
            commands.add_subcommand(name, command, help=description)

    def _parse_ckpt_path(self) -> None:
        """Defaults, then what the checkpoint stored, then configuration file and command line; the later wins."""
        if self.config.subcommand == GENERATE:
            return
        given = self.config
        super()._parse_ckpt_path()
        if self.config is given:
            return
        stored = self.config
        self.config = self.parser.parse_args(self._args, namespace=stored.clone())
        model = f"{self.config.subcommand}.model"
        was, now = (dict(_leaves(config[model], "model")) for config in (stored, self.config))
        for key in sorted(was.keys() & now.keys()):
            if was[key] != now[key]:
                rank_zero_warn(f"{key} is {now[key]!r}, as given; the checkpoint stored {was[key]!r}.")

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
        return super().instantiate_trainer(**kwargs)

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand == GENERATE:
            generate(**{key: value for key, value in self.config_init[GENERATE].items() if key != "config"})
        else:
            super()._run_subcommand(subcommand)


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
    ):
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "litlogger" not in record.getMessage() and "litmodels" not in record.getMessage()
    )


def _leaves(config: Any, prefix: str) -> list[tuple[str, Any]]:
    """The keys and values of a nested configuration."""
    if isinstance(config, Namespace | dict):
        items = vars(config).items() if isinstance(config, Namespace) else config.items()
        return [leaf for key, value in items for leaf in _leaves(value, f"{prefix}.{key}")]
    return [(prefix, config)]


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
        DPOCLI(
            args=args,
            model_class=DPOModule,
            datamodule_class=PreferenceDataModule,
            save_config_callback=SaveFitConfig,
            seed_everything_default=42,
            parser_class=Parser,
            parser_kwargs={"prog": "lit_dpo"},
            auto_configure_optimizers=False,  # the module's own optimizer and schedule
        )
    except (ValueError, OSError) as error:
        if args is not None:
            raise
        rank_zero_only(sys.stderr.write)(f"error: {error}\n")
        sys.exit(1)
