"""What a checkpoint holds besides weights: hyper-parameters as plain values, optimizer settings, random states."""

import inspect
import random
from dataclasses import asdict, is_dataclass
from enum import Enum
from typing import Any

import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from lit_dpo.policy.loading import LORA


def random_state() -> dict[str, Any]:
    """State of this process's generators: torch's, its current CUDA device's, and Python's."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Puts back what ``random_state`` gave."""
    torch.set_rng_state(state["torch"].cpu())
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def apply_settings(optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """Puts the settings that an optimizer was built with in the place of those that a checkpoint brought."""
    for index, group in enumerate(optimizer.param_groups):
        for name, value in optimizer.defaults.items():
            if name != "lr":
                group[name] = value
            elif scheduler.base_lrs[index] != value:
                group["lr"] *= value / scheduler.base_lrs[index]
                group["initial_lr"] = scheduler.base_lrs[index] = value


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


def plain_hyperparameters(module: Any, quantization: Any) -> dict[str, Any]:
    """The constructor's arguments as plain values, which a checkpoint can hold under ``weights_only=True``.

    All but the optimizer, a function, whose settings are known once it is built.

    Args:
        module: A ``DPOModule``.
        quantization: Its quantization as it was given, ``nf4`` staying so.

    Raises:
        ValueError: If the objective, or another object, does not keep an argument under its own name.
    """
    names = ["base", "adapter", "lr_scheduler", "warmup", "gradient_checkpointing", "token_metrics", "layout"]
    names += ["on_nonfinite", "gguf_file", "revision", "trust_remote_code"]
    return {
        **{name: getattr(module, name) for name in names},
        "reference": _plain_object(module.reference_choice),
        "compile": module.compilation,
        "objective": _plain_object(module.objective),
        "lora": _plain_fields(module.lora, LoraConfig(), always=tuple(LORA)),
        "quantization": _plain_object(quantization),
        "_instantiator": "lightning.pytorch.cli.instantiate_module",
    }


def _plain_object(value: Any) -> Any:
    """An object as its class and the arguments that it was made with, and so those among them.

    Arguments are null if they are what null stands for, so that a configuration file without them says the same.
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
        raise ValueError(f"{type(value).__name__} must keep its argument {lost[0]!r} as an attribute of that name.")
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
    """The constructor's arguments that differ from their defaults, and those named, as plain values."""
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
