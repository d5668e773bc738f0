"""The floor: matrix products that no implementation of DPO can avoid, and the rate at which this machine does them."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.nn.functional import linear
from transformers import PreTrainedConfig

from lit_dpo.data.tokenization import TokenizedPair


@dataclass(frozen=True)
class Shape:
    """Matrix products of one token of a decoder-only transformer.

    Attributes:
        layer: (in, out) of each product of one layer.
        num_layers: Layers.
        head: (d, V) of the language-model head.
    """

    layer: tuple[tuple[int, int], ...]
    num_layers: int
    head: tuple[int, int]

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Shape":
        """The shape of a Llama-like model."""
        d, ff = config.hidden_size, config.intermediate_size
        head_dim = getattr(config, "head_dim", None) or d // config.num_attention_heads
        q, kv = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
        layer = ((d, q), (d, kv), (d, kv), (q, d), (d, ff), (d, ff), (ff, d))
        return cls(layer, config.num_hidden_layers, (d, config.vocab_size))

    @property
    def trunk_parameters(self) -> int:
        """Weights of all layers' products."""
        return self.num_layers * sum(i * o for i, o in self.layer)

    def flops(self, pairs: Iterable[TokenizedPair], checkpointing: bool = False) -> int:
        """FLOPs that one step on the pairs cannot avoid: forward, and backward to the adapters past frozen weights.

        Attention itself and the adapters are not counted; recomputation is where it is asked for.
        """
        total = 0
        for pair in pairs:
            responses = len(pair.chosen) + len(pair.rejected)
            trunk = 2 * self.trunk_parameters * (len(pair.prompt) + responses)
            head = 2 * self.head[0] * self.head[1] * responses
            total += 2 * (trunk + head) + (trunk if checkpointing else 0)
        return total


def matmul_rate(shape: Shape, dtype: torch.dtype, device: torch.device, tokens: int = 4096, repeats: int = 5) -> float:
    """FLOP/s of this machine on the shapes of a model, all weighted as a step weighs them; the best of some repeats."""
    products = [*shape.layer, shape.head]
    counts = [shape.num_layers] * len(shape.layer) + [1]
    flops, seconds = 0, 0.0
    for (inputs, outputs), count in zip(products, counts, strict=True):
        x = torch.randn(tokens, inputs, device=device, dtype=dtype)
        weight = torch.randn(outputs, inputs, device=device, dtype=dtype)
        linear(x, weight)
        best = float("inf")
        for _ in range(repeats):
            synchronize(device)
            start = time.perf_counter()
            linear(x, weight)
            synchronize(device)
            best = min(best, time.perf_counter() - start)
        seconds += count * best
        flops += count * 2 * tokens * inputs * outputs
    return flops / seconds


def synchronize(device: torch.device) -> None:
    """Waits for what the device was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
