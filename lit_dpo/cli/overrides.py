"""Precedence of settings: a checkpoint's arguments become defaults; files and the command line override them."""

import argparse
import difflib
import importlib
import os
import re
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, get_args, get_type_hints
from unittest.mock import patch

import torch
import yaml
from jsonargparse import _typehints
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_dpo import objectives
from lit_dpo.reference import AnotherModel, MovingReference
from lit_dpo.training.hyperparameters import asks_for_trust, without_trust
from lit_dpo.training.interruption import checkpoint_of_job

OF_RUN = ("last", "best", "auto")  # names of checkpoints in the folder of the run
LIGHTNING_CHECKPOINTS = ("hpc", "registry")  # names that the Trainer resolves itself


def given_checkpoint(args: list[str], command: str) -> str | None:
    """The checkpoint file named in arguments or configuration files; None if the Trainer resolves the name."""
    path = last_given(args, command, "ckpt_path")
    return None if path in (*LIGHTNING_CHECKPOINTS, "null") else path


def with_checkpoint_of_run(args: list[str], command: str) -> list[str]:
    """The arguments with ``last``, ``best`` or ``auto`` replaced by the newest such checkpoint of the run's name.

    ``auto`` is ``last`` if there is one, and no checkpoint if there is none. A SLURM job that runs again goes
    on from the checkpoint that it left, whatever is given.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
    """
    wanted = last_given(args, command, "ckpt_path")
    if command == "fit" and (left := checkpoint_of_job()) is not None:
        rank_zero_info(f"SLURM runs this job again. It goes on from {left}.")
        return [*args, "--ckpt_path", left]
    if wanted not in OF_RUN:
        return args
    name = last_given(args, command, "run_name") or run_name(_configs(args))
    found = newest_checkpoint(name, "best-*.ckpt" if wanted == "best" else "last.ckpt")
    if found is None and wanted != "auto":
        raise FileNotFoundError(
            f"--ckpt_path {wanted}: no run of the name {name!r} has left one under runs/{name}. --run_name gives "
            "another name; a checkpoint elsewhere is given by its path."
        )
    rank_zero_info(f"--ckpt_path {wanted}: {found or f'there is none under runs/{name} yet, so the run starts'}.")
    return [*args, "--ckpt_path", str(found or "null")]


def run_name(configs: Sequence[str]) -> str:
    """The name of a run that is given none: that of its last configuration file."""
    return Path(configs[-1]).stem if configs else "dpo"


def newest_checkpoint(name: str, pattern: str) -> Path | None:
    """The newest checkpoint among those of all versions of a run; None if there is none."""
    found = Path("runs", name).glob(f"version_*/checkpoints/{pattern}")
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def _configs(args: list[str]) -> list[str]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", "-c", action="append", default=[])
    configs: list[str] = parser.parse_known_args(args)[0].config
    return configs or [value for name, value in os.environ.items() if re.fullmatch(r"PL_[A-Z]+__CONFIG", name)]


def last_given(args: list[str], command: str, key: str) -> str | None:
    """The value of a key in the arguments or, if it is not there, in the last configuration file that has it.

    If no file has it, the value of its environment variable.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{key}", dest="given")
    given: str | None = parser.parse_known_args(args)[0].given
    found = [given] if given is not None else []
    for file in _configs(args) if not found else ():
        try:
            config = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except OSError:  # the parser reports this
            continue
        except yaml.YAMLError as error:  # the parser would not name the file
            raise ValueError(f"--config {file} is not valid YAML: {' '.join(str(error).split())}.") from error
        parts = [config, config.get(command)] if isinstance(config, dict) else []
        *folders, name = key.split(".")
        for folder in folders:
            parts = [part.get(folder) for part in parts if isinstance(part, dict)]
        found += [part[name] for part in parts if isinstance(part, dict) and name in part]
    return found[-1] if found else os.environ.get(f"PL_{command}__{key}".replace(".", "__").upper())


def stored_arguments(path: str) -> dict[str, Any]:
    """The model's arguments that a checkpoint holds, without any ``trust_remote_code``.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not a checkpoint.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"--ckpt_path {path}: there is no such file.")
    try:
        checkpoint = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except (RuntimeError, UnpicklingError, EOFError) as error:
        raise ValueError(f"--ckpt_path {path}: the file is no checkpoint, or it is damaged.") from error
    stored = {key: value for key, value in checkpoint.get("hyper_parameters", {}).items() if key[0] != "_"}
    plain: dict[str, Any] = without_trust(stored)
    if asks_for_trust(stored):
        rank_zero_warn(f"{path} would set trust_remote_code. Only the command line or a configuration file can set it.")
    return plain


def warn_of_overrides(now: dict[str, Any], stored: dict[str, Any]) -> None:
    """Warns about each setting of the model that differs from the checkpoint's."""
    for setting, given, was in _differences("model", now, stored):
        rank_zero_warn(f"{setting} is {_shown(given)}, as given; the checkpoint stored {_shown(was)}.")


def read_integers_first(parser: Any) -> None:
    """Makes the parser read ``--trainer.limit_train_batches 1`` as one batch, and not as 1.0, which is all of them.

    typing caches unions without regard to order, so ``Union[int, float]`` is float first if another library made that
    union before. jsonargparse tries the types in order, and has no public way to change the type of an argument.
    """
    for action in parser._actions:
        kinds = get_args(getattr(action, "_typehint", None))
        if action.dest.startswith("trainer.") and set(kinds) == {int, float, type(None)}:
            action._typehint = int | float | None


def check_environment(parser: Any, command: str, commands: Container[str]) -> None:
    """Checks that each environment variable of a command, such as ``PL_FIT__TRAINER__MAX_EPOCHS``, is an option.

    Args:
        parser: The parser of the command.
        command: The command in use.
        commands: All commands. Variables of the others are left alone.

    Raises:
        ValueError: If one is not, or if it belongs to no command. The parser would ignore it.
    """
    prefix = f"PL_{command}__".upper()
    options = {action.dest for action in parser._actions if not action.dest.endswith(".help")}
    known = {prefix + option.replace(".", "__").upper() for option in options}
    for name in os.environ:
        owner = re.match(r"PL_([A-Z]+)__", name)
        if owner is not None and owner[1].lower() not in commands:
            raise ValueError(f"The environment variable {name} belongs to no command. Did you mean {prefix}…?")
        if name.startswith(prefix) and name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.9)
            hint = (
                f"Did you mean {close[0]}?"
                if close and not name.startswith(f"{close[0]}__")
                else "An argument of a class is given in the variable of the class, as YAML: "
                f"{prefix}MODEL__OBJECTIVE='{{class_path: Sigmoid, init_args: {{beta: 0.2}}}}'."
            )
            raise ValueError(f"The environment variable {name} is no option of {command}. {hint}")


def check_nulls(key: str, kind: type, config: Any) -> None:
    """Checks that no argument of a class is null in a configuration file that must not be. The parser lets it pass.

    Raises:
        ValueError: If one is.
    """
    hints = get_type_hints(kind.__init__)  # type: ignore[misc]
    for name, hint in hints.items():
        optional = hint is Any or type(None) in get_args(hint)
        if not optional and name in config and config[name] is None and name != "return":
            raise ValueError(f"{key}.{name} must not be null. Leave it out for its default.")


@contextmanager
def new_classes_start_afresh() -> Iterator[None]:
    """Within this context, a class of this project that replaces another starts from its own defaults.

    jsonargparse would keep arguments of the same name, so that a new objective would get the β of the old one. Classes
    of libraries still keep them: another optimizer keeps the learning rate. jsonargparse has no public setting for
    this. A setting of ``ArgumentParser`` would be the public way.
    """
    carry_over = _typehints.discard_init_args_on_class_path_change

    def discard(parser: Any, before: Any, now: Any) -> None:
        classes = [_class(config["class_path"]) for config in (before, now) if config]
        if "init_args" in (before or ()) and classes[0] != classes[1] and _is_ours(classes[1]):
            before.pop("init_args")
        carry_over(parser, before, now)  # type: ignore[no-untyped-call]

    with patch.object(_typehints, "discard_init_args_on_class_path_change", discard):
        yield


def _differences(key: str, now: Any, was: Any) -> Iterator[tuple[str, Any, Any]]:
    """The settings under a key that differ between two configurations. Different classes count as one difference."""
    both = isinstance(now, dict) and isinstance(was, dict)
    if both and _class(now.get("class_path")) == _class(was.get("class_path")):
        now, was = now.get("init_args", now), was.get("init_args", was)
        for name in now:
            yield from _differences(f"{key}.{name}", now[name], was.get(name))
    elif _comparable(now) != _comparable(was):
        yield key, now, was


def _class(path: Any) -> Any:
    """The class at a dotted path, so that different paths of one class compare equal; else the path itself."""
    module, _, name = str(path).rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return path


def _is_ours(found: Any) -> bool:
    """Whether a class is an objective, a divergence or a reference of this project."""
    kinds = (objectives.Objective, objectives.Divergence, AnotherModel, MovingReference)
    return isinstance(found, type) and issubclass(found, kinds)


def _comparable(value: Any) -> Any:
    """A form in which equal settings compare equal: class paths become classes, and lists of names are sorted."""
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
    """A setting as a short text."""
    if isinstance(value, dict) and "class_path" in value:
        arguments = ", ".join(f"{name}={_shown(item)}" for name, item in value.get("init_args", {}).items())
        return f"{value['class_path'].rpartition('.')[2]}({arguments})"
    return repr(value)
