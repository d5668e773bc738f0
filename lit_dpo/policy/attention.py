"""Attention over the flat layout of ``PairBatch``, registered with transformers as ``lit_dpo``.

A prompt token attends to its prompt; a response token to its prompt and its own response; nothing else: causal
attention over prompt + response, for each response. Which tokens those are is laid out once a batch
(``AttentionLayout``); each layer then gathers and calls the hardware's best kernel. Where the forward carries no
``layout`` (generation, padded rows), transformers' own SDPA is used.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lit_dpo.data.batch import Segment

NAME = "lit_dpo"
# What one more SDPA call costs, in scores computed needlessly: a group of rows padded to the longest saves calls.
CALL_COST = {"cpu": 2e4, "cuda": 2e6}
# Padded lengths are multiples of this: the vectors of a CPU's kernels then end where the row does, and attention rounds
# a pair the same whatever it is batched with.
ROW_MULTIPLE = 32


class UnsupportedAttentionError(NotImplementedError):
    """The architecture asks for something that attention over the flat layout does not do."""


@dataclass(frozen=True)
class Gather:
    """Tokens of the flat row, those of prompts taken once for each response, in another order.

    Attributes:
        index: For each place its token, (N,).
        first: For each token of the row the first place that holds it, (T,).
        again: Tokens that are taken a second time, and their places; those taken a third time, and so on.
    """

    index: Tensor
    first: Tensor
    again: tuple[tuple[Tensor, Tensor], ...]

    def __call__(self, row: Tensor) -> Tensor:
        """Takes (T, …) to (N, …); the gradient of a token taken several times is the sum, in a fixed order."""
        return _Gathered.apply(row, self)  # type: ignore[no-any-return, no-untyped-call]


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, row: Tensor, gather: Gather) -> Tensor:
        ctx.gather = gather
        return row.index_select(0, gather.index)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None]:
        (gradient,) = outputs
        row = gradient.index_select(0, ctx.gather.first)
        for tokens, places in ctx.gather.again:
            row[tokens] += gradient.index_select(0, places)
        return row, None


class AttentionLayout:
    """Where the kernels find the tokens of each pair; laid out once a batch, used by every layer.

    Args:
        segments: Lengths of the pairs' parts, T tokens in all.
        device: Where the flat row is.
    """

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        self.segments, self.device = segments, device
        self._bands: dict[tuple[int, int], Tensor] = {}

    def band(self, length: int, window: int) -> Tensor:
        """Who sees whom in a row under causal attention with a window, (length, length)."""
        if (length, window) not in self._bands:
            place = torch.arange(length, device=self.device)
            distance = place[:, None] - place[None, :]
            self._bands[length, window] = (distance >= 0) & (distance < window)
        return self._bands[length, window]

    @cached_property
    def rows(self) -> tuple[Gather, list[tuple[int, int]]]:
        """Each prompt + response as a row, padded at their end to groups of similar length.

        Returns:
            The tokens, and (rows, length) of each group.
        """
        rows = list(self._conversations())
        lengths = [len(row) for row in rows]
        order = sorted(range(len(rows)), key=lambda row: lengths[row])
        sizes = group([lengths[row] for row in order], CALL_COST["cuda" if self.device.type == "cuda" else "cpu"])
        groups, places, start = [], [], 0
        for size in sizes:
            members = order[start : start + size]
            longest = math.ceil(lengths[members[-1]] / ROW_MULTIPLE) * ROW_MULTIPLE
            # Padding repeats a token: being last, it is never seen.
            places += [torch.cat([rows[row], rows[row][-1:].expand(longest - lengths[row])]) for row in members]
            groups.append((size, longest))
            start += size
        offsets = [0] * len(rows)
        place = 0
        for row, tokens in zip(order, places, strict=True):
            offsets[row] = place
            place += len(tokens)
        return self._gather(torch.cat(places), rows, offsets), groups

    @cached_property
    def keys(self) -> Gather:
        """Keys of the queries prompt + first response, then of those of each other, pair by pair, without padding."""
        rows = list(self._conversations())
        offsets = torch.tensor([0, *map(len, rows[:-1])]).cumsum(0).tolist()
        return self._gather(torch.cat(rows), rows, offsets)

    @cached_property
    def bounds(self) -> tuple[Tensor, Tensor, int, int]:
        """Where queries and keys of each of the S sequences begin and end, (S + 1,), and the longest of both."""
        queries = [length for s in self.segments for length in (s.prompt + s.responses[0], *s.responses[1:])]
        keys = [s.prompt + length for s in self.segments for length in s.responses]
        q, k = (torch.tensor([0, *lengths]).cumsum(0).to(self.device, torch.int32) for lengths in (queries, keys))
        return q, k, max(queries), max(keys)

    def _conversations(self) -> Any:
        """Tokens of prompt + response, for each response of each pair, as indices in the flat row."""
        start = 0
        for segment in self.segments:
            tokens = torch.arange(start, start + segment.num_tokens)
            prompt, *responses = tokens.split((segment.prompt, *segment.responses))
            for response in responses:
                yield torch.cat([prompt, response])
            start += len(tokens)

    def _gather(self, index: Tensor, rows: Sequence[Tensor], offsets: Sequence[int]) -> Gather:
        """The gather that puts each conversation at its offset."""
        first = torch.empty(sum(segment.num_tokens for segment in self.segments), dtype=torch.long)
        again: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(max(len(s.responses) for s in self.segments) - 1)]
        responses = [(segment.prompt, number) for segment in self.segments for number in range(len(segment.responses))]
        for (prompt, number), row, offset in zip(responses, rows, offsets, strict=True):
            places = torch.arange(offset, offset + len(row))
            new = prompt if number else 0  # the prompt has its first places with the first response
            first[row[new:]] = places[new:]
            if number:
                again[number - 1].append((row[:new], places[:new]))

        def moved(part: Tensor) -> Tensor:
            return part.to(self.device, non_blocking=True)

        repeated = ((torch.cat(tokens), torch.cat(places)) for tokens, places in (zip(*a, strict=True) for a in again))
        return Gather(moved(index), moved(first), tuple((moved(tokens), moved(places)) for tokens, places in repeated))


def group(lengths: Sequence[int], call_cost: float) -> list[int]:
    """Sizes of the groups, each padded to its longest, in which rows of ascending length cost least.

    A row padded to length n costs n² scores, and a group ``call_cost`` of them.

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
    """Attention of each pair's prompt, chosen and rejected tokens.

    Args:
        query: Queries of the flat row, (T, H, D).
        key: Keys, (T, G, D) with G a divisor of H (grouped-query attention).
        value: Values, (T, G, D).
        layout: Which tokens belong together, T in all.
        scale: Factor of the scores.
        window: Number of keys, counting its own, that a token sees (sliding-window attention); None for all.

    Returns:
        (T, H, D).

    Example:
        >>> q = torch.randn(5, 2, 4)
        >>> flat_attention(q, q, q, AttentionLayout([Segment(2, (2, 1))], q.device), scale=0.5).shape
        torch.Size([5, 2, 4])
    """
    if _has_varlen(query):
        return _varlen(query, key, value, layout, scale, window)
    return _padded_groups(query, key, value, layout, scale, window)


def _has_varlen(query: Tensor) -> bool:
    """Whether variable-length flash attention runs: on CUDA from Ampere on, in half precision."""
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
    )


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, layout: AttentionLayout, scale: float, window: int | None
) -> Tensor:
    """One call for all pairs: causal attention with more keys than queries, aligned at their ends."""
    q_bounds, k_bounds, longest_q, longest_k = layout.bounds
    output: Tensor = varlen_attn(  # type: ignore[assignment]
        query.contiguous(),
        layout.keys(key),
        layout.keys(value),
        q_bounds,
        k_bounds,
        longest_q,
        longest_k,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output


def _padded_groups(
    query: Tensor, key: Tensor, value: Tensor, layout: AttentionLayout, scale: float, window: int | None
) -> Tensor:
    """One SDPA call a group of rows of similar length; causal, so that padding at their end needs no mask."""
    gather, groups = layout.rows
    heads, width = query.shape[1:]
    grouped = query.shape[1] != key.shape[1]
    if grouped and query.is_cuda:  # its memory-efficient kernel wants as many keys as queries
        key, value = (part.repeat_interleave(heads // key.shape[1], dim=1) for part in (key, value))
        grouped = False
    sizes = [rows * length for rows, length in groups]
    parts = [gather(part.reshape(len(part), -1)).split(sizes) for part in (query, key, value)]
    outputs = []
    for (rows, length), *tensors in zip(groups, *parts, strict=True):
        q, k, v = (tensor.view(rows, length, -1, width).transpose(1, 2) for tensor in tensors)
        mask = None if window is None or window >= length else layout.band(length, window)
        output = scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=grouped)
        outputs.append(output.transpose(1, 2).reshape(rows * length, heads, width))
    return torch.cat(outputs).index_select(0, gather.first)


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
        raise UnsupportedAttentionError(f"{type(module).__name__} keeps its window in the mask")
    if not getattr(module, "is_causal", True):
        raise UnsupportedAttentionError(f"{type(module).__name__} is not causal")
    scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
    return flat_attention(query, key, value, layout, scale=scale, window=kwargs.get("sliding_window"))[None], None


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
