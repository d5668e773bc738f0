"""A module's arguments in a checkpoint: stored as plain values, and loaded without ``trust_remote_code``."""

import inspect
from dataclasses import asdict, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import fsspec
import torch
from lightning.fabric.utilities import rank_zero_warn
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from lit_dpo.policy.adapters import LORA

TRUST = "trust_remote_code"


def without_trust(arguments: Any) -> Any:
    """Arguments without any ``trust_remote_code``, at every depth.

    A checkpoint may come from anyone. Only the caller and the command line may allow a repository's code to run.
    """
    if isinstance(arguments, dict):
        return {name: without_trust(value) for name, value in arguments.items() if name != TRUST}
    return [without_trust(item) for item in arguments] if isinstance(arguments, list | tuple) else arguments


def asks_for_trust(arguments: Any) -> bool:
    """Whether the arguments set ``trust_remote_code`` to true, at any depth."""
    if isinstance(arguments, dict):
        return bool(arguments.get(TRUST)) or any(asks_for_trust(value) for value in arguments.values())
    return isinstance(arguments, list | tuple) and any(asks_for_trust(item) for item in arguments)


def trust_overrides(checkpoint_path: Any, weights_only: bool | None = None, **_: Any) -> dict[str, Any]:
    """Replacements for those arguments of a checkpoint that would let a repository's code run.

    Args:
        checkpoint_path: Path or address of the checkpoint, or an open file, whose position is kept.
        weights_only: As in ``load_from_checkpoint``; only False loads arbitrary objects.
    """
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": weights_only is not False}
    if isinstance(checkpoint_path, str | Path):
        with fsspec.open(str(checkpoint_path), "rb") as file:
            checkpoint = torch.load(file, **options)
    else:
        position = checkpoint_path.tell()
        checkpoint = torch.load(checkpoint_path, **options)
        checkpoint_path.seek(position)
    stored = checkpoint.get("hyper_parameters", {})
    cleaned = {name: without_trust(value) for name, value in stored.items()}
    return {name: value for name, value in cleaned.items() if value != stored[name]} | {TRUST: False}


def plain_hyperparameters(module: Any, quantization: Any) -> dict[str, Any]:
    """The constructor's arguments as plain values, which a checkpoint can hold under ``weights_only=True``.

    The optimizer is missing: the argument is a function, and the settings are known only after it is called.
    ``trust_remote_code`` is left out on purpose (see ``without_trust``).

    Args:
        module: A ``DPOModule``.
        quantization: The argument ``quantization`` as it was given; ``nf4`` stays ``nf4``.

    Raises:
        ValueError: If an object, such as the objective, does not keep an argument as an attribute of the same name.
    """
    names = ["base", "adapter", "lr_scheduler", "warmup", "gradient_checkpointing", "token_metrics", "layout"]
    names += ["on_nonfinite"]
    return {
        **_arguments_of_subclass(module),
        **{name: getattr(module, name) for name in names},
        **without_trust(module.repository),
        "reference": without_trust(_plain_object(module.reference_choice)),
        "compile": module.compilation,
        "objective": _plain_object(module.objective),
        "lora": None if module.lora is None else _plain_fields(module.lora, LoraConfig(), always=tuple(LORA)),
        "quantization": _plain_object(quantization),
        "_instantiator": "lightning.pytorch.cli.instantiate_module",
    }


def _arguments_of_subclass(module: Any) -> dict[str, Any]:
    """The arguments that derived classes add, read from their constructors, which are running.

    An argument that is no plain value, such as a function, is left out with a warning.
    """
    kinds = type(module).__mro__
    first = next(place for place, kind in enumerate(kinds) if kind.__module__.startswith("lit_dpo."))
    known, found = set(inspect.signature(kinds[first].__init__).parameters), {}  # type: ignore[misc]
    frame = inspect.currentframe()
    while frame is not None:
        for kind in kinds[:first]:
            if "__init__" in vars(kind) and frame.f_code is kind.__init__.__code__:  # type: ignore[misc]
                found.update({name: frame.f_locals[name] for name in _named(kind) if name not in known})
        frame = frame.f_back
    plain = {}
    for name, value in found.items():
        try:
            plain[name] = str(value) if isinstance(value, Path) else _plain_object(value)
        except (TypeError, ValueError):
            rank_zero_warn(
                f"{type(module).__name__}: the argument {name} is no plain value, so checkpoints leave it out."
            )
    return plain


def _named(kind: type) -> list[str]:
    """Names of a constructor's arguments, without ``*args`` and ``**kwargs``."""
    arguments = inspect.signature(kind.__init__).parameters.values()  # type: ignore[misc]
    return [one.name for one in arguments if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]


def plain_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Class and settings of an optimizer as plain values."""
    settings: dict[str, Any] = {}
    for name in inspect.signature(type(optimizer).__init__).parameters:
        value = optimizer.defaults.get(name)
        if isinstance(value, bool | int | float | str):
            settings[name] = value
        elif isinstance(value, tuple):
            settings[name] = [float(item) for item in value]
    return {"class_path": _path(type(optimizer)), "init_args": settings}


def _plain_object(value: Any) -> Any:
    """An object as its class path and its arguments, at every depth.

    Some constructors replace an argument that is null. If the attribute has the value that null gives, null is stored,
    as in a configuration file that leaves the argument out.
    """
    if isinstance(value, BitsAndBytesConfig):
        return _plain_fields(value, BitsAndBytesConfig())
    if isinstance(value, list | tuple | torch.nn.ModuleList):
        return [_plain_object(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain_object(item) for name, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    arguments = inspect.signature(type(value)).parameters
    lost = [name for name in arguments if not hasattr(value, name)]
    if lost:
        raise ValueError(f"{type(value).__name__} must store its argument {lost[0]!r} as the attribute self.{lost[0]}.")
    plain = {name: _plain_object(getattr(value, name)) for name in arguments}
    optional = [name for name, argument in arguments.items() if argument.default is None and plain[name] is not None]
    if optional:
        bare = type(value)(**{name: getattr(value, name) for name in arguments if name not in optional})
        if all(_plain_object(getattr(bare, name)) == plain[name] for name in optional):
            plain |= dict.fromkeys(optional)
    return {"class_path": _path(type(value)), "init_args": plain}


def _path(cls: type) -> str:
    """The dotted path of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _plain_fields(config: Any, default: Any, always: tuple[str, ...] = ()) -> dict[str, Any]:
    """The constructor's arguments that differ from those of ``default``, and those in ``always``, as plain values."""
    plain = {}
    for name in inspect.signature(type(config).__init__).parameters:
        value = getattr(config, name, None)
        if name in always or value != getattr(default, name, None):
            if isinstance(value, Enum):
                value = value.value
            elif isinstance(value, set):
                value = sorted(value)
            elif isinstance(value, torch.dtype):
                value = str(value).removeprefix("torch.")
            elif is_dataclass(value) and not isinstance(value, type):
                value = asdict(value)
            plain[name] = value
    return plain
