"""Pairs and a configuration ──► estimates of tokens, operations, memory and time, from the model's configuration alone.

They are meant to choose a card by, not to be exact: attention, the loss and the memory of the allocator are left out.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lit_dpo.base.names import resolve_base

# Cards: memory in GB, and rate of bf16 products (float16 on the T4) in 10¹² operations a second, by their makers.
CARDS = {"T4": (16, 65), "L4": (24, 121), "A100": (80, 312), "H100": (80, 989)}
SHARE = 0.4  # of that rate. A 7B at batch 8 reached 0.47 on an H100 (tests/benchmarks); small models reach far less
NF4_BYTES = 0.5 + 1 / 64 + 1 / 64 / 64  # of a weight: the code, its share of a one-byte scale, and of that one's scale
ADAM_BYTES = 16  # of a trained parameter: weight, gradient and two moments in float32
# Values a token that a layer keeps for its backward pass, in units of the hidden size. Fitted to the peak memory of
# Qwen2.5 0.5B and 7B on an H100.
LAYER_VALUES = 12


@dataclass(frozen=True)
class ModelSize:
    """Numbers of parameters, and sizes, of a model with adapters."""

    linear: int  # weights of linear layers without the head
    other: int  # all other parameters of the base
    trained: int
    layers: int
    hidden: int


@dataclass(frozen=True)
class Cost:
    """Estimates for one run."""

    tokens: int  # of an epoch, each prompt once
    operations: float  # of an epoch, without the reference
    reference_operations: float  # once
    memory: float  # bytes on the card, for the longest batch, with recomputation
    memory_without_recomputation: float
    hours: dict[str, float]  # of an epoch and the reference pass, by card on which it fits


def model_size(base: str, lora: LoraConfig | None, *, trust_remote_code: bool = False, **repository: Any) -> ModelSize:
    """Counts a model's parameters. No weights are loaded.

    Args:
        base: Hub id, local folder, GGUF file or ``package:NAME``.
        lora: Configuration of the adapters; None if all weights train.
        trust_remote_code: Whether to run model code that comes with the repository.
        repository: ``gguf_file`` and ``revision`` of the hub repository.

    Raises:
        OSError: If the model's configuration cannot be loaded.
        ValueError: If the architecture is unknown, or has nothing that the adapters fit.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    name = resolve_base(base, repository.get("gguf_file"), repository.get("revision"))
    config = AutoConfig.from_pretrained(
        name, revision=repository.get("revision"), trust_remote_code=trust_remote_code
    ).get_text_config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        head = model.get_output_embeddings()
        linear = sum(
            module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear) and module is not head
        )
        total = sum(parameter.numel() for parameter in model.parameters())
        trained = total if lora is None else get_peft_model(model, lora).get_nb_trainable_parameters()[0]
    return ModelSize(linear, total - linear, trained, config.num_hidden_layers, config.hidden_size)


def cost_of(
    size: ModelSize,
    num_tokens: np.ndarray,
    weights: np.ndarray | float = 1.0,
    *,
    batch_size: int,
    quantized: bool,
    reference: bool,
) -> Cost:
    """Estimates the cost of training on some pairs.

    Args:
        size: The model.
        num_tokens: Tokens of each training pair, prompt and responses together, (P,).
        weights: How often an epoch sees each pair, (P,).
        batch_size: Pairs in a batch.
        quantized: Whether the linear layers are in 4 bits.
        reference: Whether a reference is computed once.
    """
    tokens = round(float((num_tokens * weights).sum()))
    forward = 2.0 * size.linear
    # A frozen weight costs a product in the forward pass, one for the gradient of its input, and one to recompute. A
    # trained one costs another, for its own gradient.
    all_train = size.trained == size.linear + size.other
    operations = (4 if all_train else 3) * forward * tokens
    reference_operations = forward * int(num_tokens.sum()) if reference else 0.0
    longest = int(np.sort(num_tokens)[-batch_size:].sum())
    frozen = 0.0 if all_train else size.linear * (NF4_BYTES if quantized else 2) + size.other * 2
    model = frozen + size.trained * ADAM_BYTES
    layer = longest * size.hidden * 2 * LAYER_VALUES
    inputs = longest * size.hidden * 2 * size.layers
    memory, without = model + inputs + layer, model + layer * size.layers
    hours = {
        card: (operations + reference_operations) / (rate * 1e12 * SHARE) / 3600
        for card, (room, rate) in CARDS.items()
        if memory < 0.9 * room * 1e9
    }
    return Cost(tokens, operations, reference_operations, memory, without, hours)
