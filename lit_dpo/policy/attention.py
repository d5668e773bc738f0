"""Attention over the flat layout of ``PairBatch``, registered with transformers as ``lit_dpo``.

A prompt token attends to its prompt. A response token attends to its prompt and to its own response. For each response
this is causal attention over prompt + response. ``AttentionLayout`` computes once per batch where each token is. Every
layer then gathers its queries, keys and values and calls the fastest kernel that the hardware has. A forward pass
without a ``layout`` argument (generation, padded rows) runs transformers' own SDPA.
"""

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lit_dpo.data.batch import Segment
from lit_dpo.policy.precision import matmul_dtype

NAME = "lit_dpo"
# Cost of one SDPA call, in attention scores. Fewer groups need fewer calls but more padding, which adds scores.
CALL_COST = {"cpu": 2e4, "cuda": 2e6}
# Padded lengths are multiples of this. A CPU kernel then works on whole vectors only, so the rounding of a pair's
# attention does not depend on the other pairs in the batch.
ROW_MULTIPLE = 32


class UnsupportedAttentionError(NotImplementedError):
    """The architecture needs an attention feature that the flat layout does not support."""


@dataclass(frozen=True)
class Gather:
    """A reordering of the flat row in which a prompt appears once for each of its responses.

    Attributes:
        index: Index of the token at each of N places, (N,).
        first_places: First place of each of T tokens, (T,).
        repeats: (tokens, places) of the tokens that appear a second time, then of those that appear a third time, and
            so on.
    """

    index: Tensor
    first_places: Tensor
    repeats: tuple[tuple[Tensor, Tensor], ...]

    def __call__(self, row: Tensor) -> Tensor:
        """Maps (T, …) to (N, …). The gradient of a repeated token is the sum over its places, in a fixed order."""
        return _Gathered.apply(row, self)  # type: ignore[no-any-return, no-untyped-call]


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, row: Tensor, gather: Gather) -> Tensor:
        ctx.gather = gather
        return row.index_select(0, gather.index)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None]:
        (gradient,) = outputs
        row = gradient.index_select(0, ctx.gather.first_places)
        for tokens, places in ctx.gather.repeats:
            row[tokens] += gradient.index_select(0, places)
        return row, None


class AttentionLayout:
    """Where the attention kernels find the tokens of each pair. Computed once per batch, used by every layer.

    Args:
        segments: Lengths of the pairs' parts, T tokens in all.
        device: Device of the flat row.
    """

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        self.segments, self.device = segments, device
        self._masks: dict[tuple[int, int], Tensor] = {}

    def window_mask(self, length: int, window: int) -> Tensor:
        """Mask of causal attention with a sliding window, (length, length). True where a query sees a key."""
        if (length, window) not in self._masks:
            position = torch.arange(length, device=self.device)
            distance = position[:, None] - position[None, :]
            self._masks[length, window] = (distance >= 0) & (distance < window)
        return self._masks[length, window]

    @cached_property
    def rows(self) -> tuple[Gather, list[tuple[int, int]]]:
        """Each prompt + response as a row of its own, in groups of similar length, padded within a group.

        Returns:
            The gather that builds the rows, and (number of rows, padded length) of each group.
        """
        rows = list(self._conversations())
        lengths = [len(row) for row in rows]
        order = sorted(range(len(rows)), key=lambda row: lengths[row])
        sizes = group([lengths[row] for row in order], CALL_COST["cuda" if self.device.type == "cuda" else "cpu"])
        groups, padded, start = [], [], 0
        for size in sizes:
            members = order[start : start + size]
            longest = math.ceil(lengths[members[-1]] / ROW_MULTIPLE) * ROW_MULTIPLE
            # Padding repeats the last token. It comes after all real tokens, so causal attention never sees it.
            padded += [torch.cat([rows[row], rows[row][-1:].expand(longest - lengths[row])]) for row in members]
            groups.append((size, longest))
            start += size
        offsets = [0] * len(rows)
        offset = 0
        for row, tokens in zip(order, padded, strict=True):
            offsets[row] = offset
            offset += len(tokens)
        return self._gather(torch.cat(padded), rows, offsets), groups

    @cached_property
    def keys(self) -> Gather:
        """Gathers the keys (or values) of each prompt + response, pair by pair, without padding.

        The queries stay in the order of the flat row: prompt + first response, then each other response alone.
        """
        rows = list(self._conversations())
        offsets = torch.tensor([0, *map(len, rows[:-1])]).cumsum(0).tolist()
        return self._gather(torch.cat(rows), rows, offsets)

    @cached_property
    def bounds(self) -> tuple[Tensor, Tensor, int, int]:
        """Offsets of the queries and of the keys of S sequences, (S + 1,) each, and the greatest length of each."""
        queries = [length for s in self.segments for length in (s.prompt + s.responses[0], *s.responses[1:])]
        keys = [s.prompt + length for s in self.segments for length in s.responses]
        q, k = (torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32) for lengths in (queries, keys))
        return self._moved(q), self._moved(k), max(queries), max(keys)

    def _conversations(self) -> Iterator[Tensor]:
        """The tokens of each prompt + response, as indices into the flat row."""
        start = 0
        for segment in self.segments:
            tokens = torch.arange(start, start + segment.num_tokens)
            prompt, *responses = tokens.split((segment.prompt, *segment.responses))
            for response in responses:
                yield torch.cat([prompt, response])
            start += len(tokens)

    def _gather(self, index: Tensor, rows: Sequence[Tensor], offsets: Sequence[int]) -> Gather:
        """The gather that puts each conversation at its offset."""
        first_places = torch.empty(sum(segment.num_tokens for segment in self.segments), dtype=torch.long)
        most = max(len(segment.responses) for segment in self.segments)
        repeats: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(most - 1)]
        responses = [(segment.prompt, number) for segment in self.segments for number in range(len(segment.responses))]
        for (prompt, number), row, offset in zip(responses, rows, offsets, strict=True):
            places = torch.arange(offset, offset + len(row))
            new = prompt if number else 0  # the prompt's first places are beside the first response
            first_places[row[new:]] = places[new:]
            if number:
                repeats[number - 1].append((row[:new], places[:new]))

        joined = ((torch.cat(tokens), torch.cat(places)) for tokens, places in (zip(*r, strict=True) for r in repeats))
        pairs = tuple((self._moved(tokens), self._moved(places)) for tokens, places in joined)
        return Gather(self._moved(index), self._moved(first_places), pairs)

    def _moved(self, part: Tensor) -> Tensor:
        """The tensor on the device. A GPU's driver buffers what is not page-locked, so the host need not wait."""
        return part.to(self.device, non_blocking=True)


def group(lengths: Sequence[int], call_cost: float) -> list[int]:
    """Splits rows of ascending length into groups at the lowest total cost, and returns the group sizes.

    Each row is padded to the longest of its group. A row padded to length n costs n² scores. Each group costs
    ``call_cost`` scores in addition.

    Example:
        >>> group([10, 11, 100, 101], call_cost=1000)
        [2, 2]
    """
    best, split = [0.0], [0]
    for end in range(1, len(lengths) + 1):
        costs = [best[start] + call_cost + (end - start) * lengths[end - 1] ** 2 for start in range(end)]
        best.append(min(costs))
        split.append(costs.index(best[-1]))
    sizes, end = [], len(lengths)
    while end:
        sizes.append(end - split[end])
        end = split[end]
    return sizes[::-1]


def flat_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: AttentionLayout, *, scale: float, window: int | None = None
) -> Tensor:
    """Attention over the flat row of all pairs.

    Args:
        query: Queries of the flat row, (T, H, D).
        key: Keys, (T, G, D) with G a divisor of H (grouped-query attention).
        value: Values, (T, G, D).
        layout: Where the tokens of each pair are, T in all.
        scale: Factor on the scores.
        window: Number of keys that a token sees, its own included (sliding-window attention); None for all.

    Returns:
        (T, H, D).

    Example:
        >>> q = torch.randn(5, 2, 4)
        >>> flat_attention(q, q, q, AttentionLayout([Segment(2, (2, 1))], q.device), scale=0.5).shape
        torch.Size([5, 2, 4])
    """
    if _can_run_varlen(query):
        return _varlen(query, key, value, layout, scale, window)
    return _padded_groups(query, key, value, layout, scale, window)


@cache
def varlen_parameters() -> frozenset[str]:
    """Names of the parameters of torch's variable-length attention. Empty if this torch does not have it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def _can_run_varlen(query: Tensor) -> bool:
    """Whether variable-length flash attention can run: on CUDA, Ampere or newer, in half precision.

    It must have ``window_size``, which defines how queries are aligned with a larger number of keys.
    """
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and {"window_size", "scale"} <= varlen_parameters()
    )


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, layout: AttentionLayout, scale: float, window: int | None
) -> Tensor:
    """One call for all pairs: causal attention with more keys than queries, both aligned at their ends."""
    from torch.nn.attention.varlen import varlen_attn

    q_bounds, k_bounds, longest_q, longest_k = layout.bounds
    options: dict[str, Any] = {"scale": scale, "window_size": (-1 if window is None else window - 1, 0)}
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in varlen_parameters():
            options["enable_gqa"] = True
        else:
            key, value = (_expand_heads(part, query.shape[1]) for part in (key, value))
    output: Tensor = varlen_attn(  # type: ignore[assignment]
        query.contiguous(),
        layout.keys(key),
        layout.keys(value),
        q_bounds,
        k_bounds,
        longest_q,
        longest_k,
        **options,
    )
    return output


def _padded_groups(
    query: Tensor, key: Tensor, value: Tensor, layout: AttentionLayout, scale: float, window: int | None
) -> Tensor:
    """One SDPA call per group of rows of similar length. Padding comes last, so causal attention needs no mask."""
    gather, groups = layout.rows
    heads, width = query.shape[1:]
    grouped = query.shape[1] != key.shape[1]
    if grouped and query.is_cuda:  # SDPA's memory-efficient kernel needs as many key heads as query heads
        key, value = (_expand_heads(part, heads) for part in (key, value))
        grouped = False
    sizes = [rows * length for rows, length in groups]
    parts = [gather(part.reshape(len(part), -1)).split(sizes) for part in (query, key, value)]
    outputs = []
    for (rows, length), *tensors in zip(groups, *parts, strict=True):
        q, k, v = (tensor.view(rows, length, -1, width).transpose(1, 2) for tensor in tensors)
        mask = None if window is None or window >= length else layout.window_mask(length, window)
        output = scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=grouped)
        outputs.append(output.transpose(1, 2).reshape(rows * length, heads, width))
    return torch.cat(outputs).index_select(0, gather.first_places)


def _expand_heads(part: Tensor, heads: int) -> Tensor:
    """Repeats the heads of grouped keys or values, (T, G, D), to (T, heads, D)."""
    return part.repeat_interleave(heads // part.shape[1], dim=1)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: AttentionLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in each attention layer, with tensors of (1, H, T, D)."""
    if layout is None:
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
        raise UnsupportedAttentionError(
            f"{type(module).__name__} passes its sliding window only through the attention mask"
        )
    if not getattr(module, "is_causal", True):
        raise UnsupportedAttentionError(f"{type(module).__name__} is not causal")
    scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    dtype = matmul_dtype(value)  # autocast does not reach the varlen kernel, and rotary embeddings may be in float32
    query, key, value = (part[0].transpose(0, 1).to(dtype) for part in (query, key, value))
    return flat_attention(query, key, value, layout, scale=scale, window=kwargs.get("sliding_window"))[None], None


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
