"""Which weights a checkpoint holds, how they are loaded, and how a checkpoint file is replaced safely.

A checkpoint holds the trained adapters, the moving copy and the objective's running statistics. It never holds the base
weights: the hub has them, and a 4-bit state dict could not be loaded back.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lit_dpo.files.atomic import atomic_write
from lit_dpo.policy.adapters import MOVING_ADAPTER, belongs_to


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def kept_names(module: Any) -> set[str]:
    """Names in a checkpoint's state dict: trained adapters, the moving copy, the objective's running statistics."""
    kept = set(trained_parameters(module))
    kept |= {name for name, _ in module.named_parameters() if belongs_to(name, MOVING_ADAPTER)}
    return kept | {f"objective.{name}" for name in module.objective.state_dict()}


def keep_trained(module: Any, checkpoint: dict[str, Any]) -> None:
    """Removes everything but ``kept_names`` from a checkpoint's state dict."""
    names = kept_names(module)
    checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in names}


def move_weights(module: Any, checkpoint: dict[str, Any]) -> None:
    """Moves a checkpoint's weights to the policy's device.

    ``load_from_checkpoint`` then moves the module to the device of these weights, but a quantized base must not be
    moved.
    """
    device = module.model.device
    checkpoint["state_dict"] = {name: value.to(device) for name, value in checkpoint["state_dict"].items()}


def fitting_weights(module: Any, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of a checkpoint that fit this module.

    Raises:
        ValueError: If the adapters do not fit. Lightning's ``strict=False`` would not notice.
    """
    if "policy" not in module._modules:  # ddp_fork, ddp_spawn and ddp_notebook train in processes of their own
        rank_zero_info("The policy was trained in other processes. To use it here, load its checkpoint or its adapter.")
        return {}
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    found, expected = set(state_dict), kept_names(module)
    fitting = {name for name in found & expected if state_dict[name].shape == own[name].shape}
    optional = {name for name in found | expected if name.startswith("objective.") or belongs_to(name, MOVING_ADAPTER)}
    differing = (found | expected) - fitting
    if differing - optional:
        raise ValueError(
            f"The checkpoint holds {len(found - optional)} weights; {len(fitting - optional)} of them fit the "
            f"{len(expected - optional)} of this model ({sorted(differing - optional)[0]} does not). Was its "
            "model.lora another?"
        )
    if differing:
        rank_zero_warn(
            f"The checkpoint belongs to another model.objective or model.reference: {sorted(differing)[0]} and what "
            "else it holds of them is not used, and starts anew."
        )
    return {name: value for name, value in state_dict.items() if name in fitting}


def save_checkpoint(trainer: Trainer, path: Path) -> None:
    """Saves a full checkpoint, with optimizer and loop states. An older file stays until the new one is complete.

    Lightning writes to the folder for temporary files and moves the file. Across file systems, this copies over the old
    checkpoint, and an interrupted copy destroys it. Collective: every rank must call it.
    """
    if not trainer.is_global_zero:
        trainer.save_checkpoint(path, weights_only=False)  # takes part in the collectives and writes nothing
    else:
        with atomic_write(path) as beside:
            trainer.save_checkpoint(beside, weights_only=False)


def try_to_save_checkpoint(trainer: Trainer, path: Path) -> None:
    """Saves a checkpoint as ``save_checkpoint`` does. If it cannot be written, warns, and the run goes on."""
    try:
        save_checkpoint(trainer, path)
    except (OSError, RuntimeError) as error:
        if not _cannot_write(error):
            raise
        trainer.strategy.barrier("Trainer.save_checkpoint")  # where the other ranks wait
        rank_zero_warn(f"{path} could not be written, so an older one stays: {str(error).splitlines()[0]:.200}")


def _cannot_write(error: BaseException) -> bool:
    """Whether an error comes from the disk. torch raises one of its own over it."""
    return isinstance(error, OSError) or "PytorchStreamWriter" in str(error) or isinstance(error.__context__, OSError)
