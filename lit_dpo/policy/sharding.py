"""The frozen weights of a base, split over the processes of a node (FSDP2; Zhao et al. 2023, arXiv:2304.11277).

Each layer gathers its weights before it computes, and frees them afterwards. Adapters, embeddings and head stay whole
on every process, so that nothing else has to know of the split.
"""

import hashlib
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from lit_dpo.policy.adapters import TRAINED_ADAPTER, belongs_to
from lit_dpo.policy.full import FullModel
from lit_dpo.policy.precision import is_linear4bit


def shard_base(model: PeftModel, mesh: DeviceMesh, device: torch.device) -> None:
    """Splits the frozen weights of the layers, and moves the model to its device, one layer after the other.

    Args:
        model: The model with its adapters, on the CPU.
        mesh: The processes that share the weights, in one dimension.
        device: Device of this process.

    Raises:
        ValueError: If the model has no layers of transformers' kind.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"trainer.strategy=sharded cannot split {type(model.get_base_model()).__name__}: it has no layers that "
            "transformers marks as such. Use trainer.strategy=ddp."
        )
    model.whole_digest = weights_digest(model)  # a part of the weights tells neither
    model.whole_base_digest = base_digest(model)
    model.whole_size = model.get_nb_trainable_parameters()
    for layer in layers:
        _store_packed_as_floats(layer)
        kept = {parameter for name, parameter in layer.named_parameters() if "lora_" in name}
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
    whole = {parameter for parameter in model.parameters() if not is_part(parameter)}
    inner: Any = model.get_base_model()
    fully_shard(inner.base_model, mesh=mesh, ignored_params=whole)  # the root, which gathers one layer ahead
    model.to(device)


def _store_packed_as_floats(layer: nn.Module) -> None:
    """Gives packed 4-bit weights a floating-point type, bit for bit. FSDP2 of torch 2.11 splits no integers.

    bitsandbytes unpacks weights of any type: its ``bnb_4bit_quant_storage`` exists for the same reason.
    """
    for module in layer.modules():
        if is_linear4bit(module):
            weight: Any = module.weight
            weight.data = weight.data.flatten().view(torch.bfloat16)[:, None]


def is_sharded(model: nn.Module) -> bool:
    """Whether ``shard_base`` has split the weights of a model."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def is_part(value: Any) -> bool:
    """Whether a tensor is split over processes."""
    return isinstance(value, DTensor)


def sharded_names(module: nn.Module) -> list[str]:
    """Names of the parameters that are split."""
    return [name for name, parameter in module.named_parameters() if is_part(parameter)]


def num_parameters(model: PeftModel | FullModel) -> tuple[int, int]:
    """The numbers of trained and of all parameters. Packed 4-bit weights count as what they stand for."""
    trained, total = getattr(model, "whole_size", None) or model.get_nb_trainable_parameters()
    return int(trained), int(total)


@torch.no_grad()
def base_digest(model: PeftModel | FullModel) -> str:
    """A quick digest of a base: type and shape of each weight, and its first and last numbers.

    Numbers count in bfloat16, so that a base loaded in another type is the same.
    """
    known = getattr(model, "whole_base_digest", None)
    if known is not None:
        return str(known)
    names, ends = [], []
    for name, tensor in sorted(model.named_parameters()):
        if "lora_" not in name:
            names.append(f"{name.replace('.base_layer', '')} {tuple(tensor.shape)}")
            flat = tensor.detach().flatten()
            both = torch.cat([flat[:64], flat[-64:]])
            ends.append((both.bfloat16() if both.is_floating_point() else both).view(torch.uint8))
    digest = hashlib.blake2b("\n".join(names).encode(), digest_size=8)
    digest.update(torch.cat(ends).cpu().numpy().tobytes())
    return digest.hexdigest()


def weights_digest(model: PeftModel | FullModel) -> str:
    """Digest of all weights but the trained adapters, with the state of their quantization."""
    known = getattr(model, "whole_digest", None)
    if known is not None:
        return str(known)
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        if not belongs_to(name, TRAINED_ADAPTER):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
