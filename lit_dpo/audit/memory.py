"""A model's sizes and a batch's tokens ──► the memory of training, by part. No weights are loaded.

What a layer keeps for its backward pass is counted tensor by tensor, for layers of Llama's kind: norms, attention,
gated feed-forward. Other architectures are near it. tests/benchmarks holds it against measured peaks.
"""

from copy import copy
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lit_dpo.base.names import resolve_base
from lit_dpo.policy.logprobs import CHUNK
from lit_dpo.reference.cache import BATCH_TOKENS

CODE_BYTES, STATE_BYTES = 0.5, 1 / 64 + 1 / 64 / 64  # of a 4-bit weight: its code; its share of scales, quantized twice
ADAM_MOMENTS = 8  # bytes of a trained parameter
HALF = ("bf16-mixed", "16-mixed")
WORKSPACE = 0.06e9  # of a GPU's libraries
# A CPU's allocator does not give back all: a backward pass allocates in a thread of its own, and blocks that are freed
# in another order leave holes. In units of what a layer keeps, and as a factor on what all of them keep; then bytes
# that loading, data and a Trainer leave. Fitted to the embedded model.
CPU_LAYERS, CPU_HOLES, CPU_PROCESS = 14, 1.28, 0.36e9
Kind: TypeAlias = Literal["cuda", "mps", "cpu"]


@dataclass(frozen=True)
class ModelSize:
    """Numbers of parameters, and sizes, of a model with adapters."""

    linear: int  # weights of linear layers without the head
    other: int  # all other parameters of the base
    trained: int
    layers: int
    hidden: int
    intermediate: int  # width of the feed-forward layers
    queries: int  # width of all query heads
    keys: int  # width of all key heads
    heads: int
    vocabulary: int
    rank: int  # of the adapters; 0 if all weights train
    largest: int  # weights of the largest linear layer

    @property
    def total(self) -> int:
        """Parameters of the base."""
        return self.linear + self.other

    @property
    def all_train(self) -> bool:
        """Whether there are no adapters."""
        return self.rank == 0


class Batch(NamedTuple):
    """Numbers of tokens of a batch."""

    tokens: int  # each prompt once
    prompts: int
    responses: int  # trained tokens


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a training step, by part."""

    weights: float  # linear layers
    quantization_state: float
    other_weights: float  # embeddings, norms, head
    adapters: float  # weights that train, and their gradients
    optimizer: float
    activations: float  # kept for the backward pass, with what the backward pass of a layer needs besides
    logprobs: float  # a chunk of logits, and the gradients of the hidden states
    process: float  # what is there without a model
    reference_model: float = 0.0  # another model that stays in memory

    @property
    def total(self) -> float:
        """Bytes of all parts."""
        return float(sum(vars(self).values()))

    @property
    def before_training(self) -> float:
        """Bytes of what is there before the first step."""
        return self.weights + self.quantization_state + self.other_weights + self.adapters / 2 + self.process


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
        layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
        linear, largest = sum(m.weight.numel() for m in layers), max(m.weight.numel() for m in layers)
        total = sum(parameter.numel() for parameter in model.parameters())
        trained = total if lora is None else get_peft_model(model, copy(lora)).get_nb_trainable_parameters()[0]
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return ModelSize(
        linear=linear,
        other=total - linear,
        trained=trained,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        queries=heads * width,
        keys=(getattr(config, "num_key_value_heads", None) or heads) * width,
        heads=heads,
        vocabulary=config.vocab_size,
        rank=0 if lora is None else int(lora.r),
        largest=largest,
    )


def training_memory(
    size: ModelSize, batch: Batch, *, quantized: bool, precision: str, recompute: bool, process: float, kind: Kind
) -> Memory:
    """The peak of a training step.

    Args:
        size: The model.
        batch: The longest batch.
        quantized: Whether the linear layers are in 4 bits.
        precision: ``trainer.precision``.
        recompute: Whether layers recompute their activations.
        process: Bytes that the process holds without a model.
        kind: The kind of device.
    """
    wide = 2 if precision in HALF else 4  # bytes of a number in matrix products
    if size.all_train:
        weights, state, others, quantized = 4.0 * size.linear, 0.0, 4.0 * size.other, False
        adapters = 4.0 * size.total  # gradients
    else:
        weights = size.linear * (CODE_BYTES if quantized else wide)
        state, others = (size.linear * STATE_BYTES if quantized else 0.0), float(size.other * wide)
        adapters = 8.0 * size.trained
    kept = layer_bytes(size, batch, wide, precision, kind)
    work = CPU_LAYERS * kept if kind == "cpu" else backward_bytes(size, batch, wide)
    stream = batch.tokens * size.hidden * (4 if precision == "16-mixed" else wide)
    dense = size.largest * wide if quantized else 0  # a layer's weights, dequantized for a product
    layers = size.layers * stream + kept if recompute else size.layers * kept
    activations = layers * (CPU_HOLES if kind == "cpu" else 1.0) + work + dense
    # Of several chunks, one is still there when the next one is computed.
    chunk = min(CHUNK, batch.responses) * size.vocabulary * (2 * wide + (8 if batch.responses > CHUNK else 4))
    gradients = 2.0 * batch.responses * size.hidden * wide
    return Memory(
        weights,
        state,
        others,
        adapters,
        float(ADAM_MOMENTS * size.trained),
        activations,
        # A chunk of logits is there when no layer is in its backward pass, and the other way round.
        gradients + max(0.0, chunk - work - (kept if recompute else 0.0)),
        process,
    )


def layer_bytes(size: ModelSize, batch: Batch, wide: int, precision: str, kind: Kind) -> float:
    """What a layer keeps for its backward pass."""
    norm = 4 + 2 * wide if wide == 2 else 2 * wide  # its input in float32, and its output
    if precision == "16-mixed":
        norm += 4  # the residual stream is float32
    repeated = batch.tokens + batch.prompts  # a prompt's keys are there once for each response
    # A GPU attends without padding; elsewhere queries are repeated too, and put in order again.
    queries, ordered = (batch.tokens, 0) if kind == "cuda" else (repeated, batch.tokens)
    attention = wide * (size.queries * (2 * queries + ordered) + 2 * size.keys * repeated)
    attention += 4 * size.heads * queries  # sums of the softmax
    low_rank = 7 * size.rank * wide * batch.tokens
    return batch.tokens * (2 * norm * size.hidden + 2 * wide * size.intermediate) + attention + low_rank


def backward_bytes(size: ModelSize, batch: Batch, wide: int) -> float:
    """What the backward pass of the feed-forward part of a layer needs besides: gradients, and the product anew."""
    return float(batch.tokens * wide * (4 * size.intermediate + 2 * size.hidden))


def base_bytes(size: ModelSize, quantized: bool, wide: int) -> float:
    """Bytes of a frozen base.

    Args:
        size: The model.
        quantized: Whether the linear layers are in 4 bits.
        wide: Bytes of a number that is not quantized.
    """
    return size.linear * ((CODE_BYTES + STATE_BYTES) if quantized else wide) + size.other * wide


def reference_memory(size: ModelSize, num_tokens: int, wide: int) -> float:
    """What the pass that fills the reference cache needs besides the weights. It forms batches of its own.

    Args:
        size: The model.
        num_tokens: Tokens of all pairs of the pass.
        wide: Bytes of a number.
    """
    tokens = min(BATCH_TOKENS, num_tokens)
    chunk = min(CHUNK, tokens) * size.vocabulary * (wide + 4)
    return float(tokens * wide * (3 * size.intermediate + 4 * size.hidden) + size.largest * wide + chunk)
