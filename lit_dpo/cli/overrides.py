"""Precedence of settings: a checkpoint's arguments become defaults; files and the command line override them."""

import argparse
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, get_args
from unittest.mock import patch

import torch
import yaml
from jsonargparse import _typehints
from lightning.pytorch.utilities import rank_zero_warn

from lit_dpo import objectives
from lit_dpo.reference import AnotherModel, MovingReference
from lit_dpo.training.hyperparameters import asks_for_trust, without_trust

LIGHTNING_CHECKPOINTS = ("hpc", "registry")  # names that the Trainer resolves itself


def given_checkpoint(args: list[str], command: str) -> str | None:
    """The checkpoint file named in arguments or configuration files; None if the Trainer resolves the name."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--ckpt_path")
    parser.add_argument("--config", "-c", action="append", default=[])
    given, _ = parser.parse_known_args(args)
    found = [given.ckpt_path] if given.ckpt_path is not None else []
    for file in given.config if not found else ():
        try:
            config = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except OSError:  # the parser reports this
            continue
        except yaml.YAMLError as error:  # the parser would not name the file
            raise ValueError(f"--config {file} is not valid YAML: {' '.join(str(error).split())}.") from error
        parts = [config, config.get(command)] if isinstance(config, dict) else []
        found += [part["ckpt_path"] for part in parts if isinstance(part, dict) and "ckpt_path" in part]
    path: str | None = found[-1] if found else None
    return None if path in (*LIGHTNING_CHECKPOINTS, "null") else path


def stored_arguments(path: str) -> dict[str, Any]:
    """The model's arguments that a checkpoint holds, without any ``trust_remote_code``.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not a checkpoint, or ``last`` or ``best``, which could mean several files.
    """
    if path in ("last", "best"):
        raise ValueError(
            f"--ckpt_path {path}: each run has a folder of its own. Give the path of the file, such as "
            "runs/NAME/version_0/checkpoints/last.ckpt."
        )
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
