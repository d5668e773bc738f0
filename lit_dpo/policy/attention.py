"""Attention over the flat layout of ``PairBatch``, registered with transformers as ``lit_dpo``.

A prompt token attends to its prompt; a response token to its prompt and its own response; nothing else. That is causal
attention over prompt + chosen, and over prompt + rejected for the rejected tokens alone. Where the forward carries no
``segments`` (generation, padded rows), transformers' own SDPA is used.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lit_dpo.data.batch import Segment

NAME = "lit_dpo"


class UnsupportedAttentionError(NotImplementedError):
    """The architecture asks for something that attention over the flat layout does not do."""


def flat_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Sequence[Segment], *, scale: float, window: int | None = None
) -> Tensor:
    """Attention of each pair's prompt, chosen and rejected tokens.

    Args:
        query: Queries of the flat row, (1, H, T, D).
        key: Keys, (1, G, T, D) with G a divisor of H (grouped-query attention).
        value: Values, (1, G, T, D).
        segments: Lengths of the pairs' parts, T tokens in all.
        scale: Factor of the scores.
        window: Number of keys, counting its own, that a token sees (sliding-window attention); None for all.

    Returns:
        (1, H, T, D).

    Example:
        >>> q = torch.randn(1, 2, 5, 4)
        >>> flat_attention(q, q, q, [Segment(2, 2, 1)], scale=0.5).shape
        torch.Size([1, 2, 5, 4])
    """
    if query.shape[1] != key.shape[1]:  # with a mask, CUDA's fast kernels want as many keys as queries
        key, value = (part.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for part in (key, value))
    outputs = []
    for pair in zip(
        *(part.split([sum(s) for s in segments], dim=2) for part in (query, key, value)), segments, strict=True
    ):
        q, k, v, (prompt, chosen, rejected) = pair
        q_first, q_rejected = q.split([prompt + chosen, rejected], dim=2)
        k_prompt, k_chosen, k_rejected = k.split([prompt, chosen, rejected], dim=2)
        v_prompt, v_chosen, v_rejected = v.split([prompt, chosen, rejected], dim=2)
        keys, values = torch.cat([k_prompt, k_chosen], 2), torch.cat([v_prompt, v_chosen], 2)
        if window is None or window >= prompt + chosen:
            outputs.append(scaled_dot_product_attention(q_first, keys, values, is_causal=True, scale=scale))
        else:
            mask = _causal(prompt + chosen, prompt + chosen, window, query.device)
            outputs.append(scaled_dot_product_attention(q_first, keys, values, mask, scale=scale))
        keys, values = torch.cat([k_prompt, k_rejected], 2), torch.cat([v_prompt, v_rejected], 2)
        mask = _causal(rejected, prompt + rejected, window, query.device)
        outputs.append(scaled_dot_product_attention(q_rejected, keys, values, mask, scale=scale))
    return torch.cat(outputs, dim=2)


def _causal(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """Who sees whom, (num_queries, num_keys), the queries being the last of the keys' positions."""
    distance = (
        torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
        - torch.arange(num_keys, device=device)[None, :]
    )
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Sequence[Segment] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in each attention layer."""
    if segments is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise UnsupportedAttentionError(f"{type(module).__name__} uses {name}")
    config: Any = getattr(module, "config", None)
    if getattr(config, "attention_chunk_size", None) or (
        getattr(config, "sliding_window", None) and "sliding_window" not in kwargs
    ):
        raise UnsupportedAttentionError(f"{type(module).__name__} keeps its window in the mask")
    if not getattr(module, "is_causal", True):
        raise UnsupportedAttentionError(f"{type(module).__name__} is not causal")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = flat_attention(query, key, value, segments, scale=scale, window=kwargs.get("sliding_window"))
    return output.transpose(1, 2), None


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
