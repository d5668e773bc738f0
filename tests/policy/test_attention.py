import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from lit_dpo.data.batch import Segment
from lit_dpo.policy import attention
from lit_dpo.policy.attention import CALL_COST, AttentionLayout, flat_attention, group

# Pairs, and ranked lists of three and of four responses
SEGMENTS = [Segment(3, (4, 2)), Segment(1, (1, 6)), Segment(2, (3, 1, 5, 2)), Segment(9, (1, 1)), Segment(4, (1, 1, 1))]


def dense_mask(window: int | None) -> torch.Tensor:
    """Who sees whom, token by token, from the definition."""
    places = [
        (pair, part, (0 if part == 0 else segment.prompt) + offset)
        for pair, segment in enumerate(SEGMENTS)
        for part, length in enumerate((segment.prompt, *segment.responses))
        for offset in range(length)
    ]
    return torch.tensor(
        [
            [
                pair == other
                and other_part in (0, part)
                and place <= position
                and (window is None or position - place < window)
                for other, other_part, place in places
            ]
            for pair, part, position in places
        ]
    )


def slow_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> torch.Tensor:
    """What ``torch.nn.attention.varlen.varlen_attn`` is documented to compute, which only CUDA does."""
    assert window_size[1] == 0
    assert enable_gqa == (query.shape[1] != key.shape[1])
    outputs = []
    for sequence in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[sequence] : cu_seq_q[sequence + 1]]
        k, v = (part[cu_seq_k[sequence] : cu_seq_k[sequence + 1]] for part in (key, value))
        assert len(q) <= max_q
        assert len(k) <= max_k
        # aligned at the end: the last query is at the last key
        distance = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))[None, :]
        seen = (distance >= 0) & ((distance <= window_size[0]) if window_size[0] >= 0 else True)
        k, v = (part.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for part in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v))
    return torch.cat(outputs)


@pytest.fixture
def varlen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Puts the stand-in in the place of torch's kernel, as torch 2.12 and later or as torch 2.11 has it."""

    def slow_varlen_211(*arguments: Any, scale: float, window_size: tuple[int, int]) -> torch.Tensor:
        return slow_varlen(*arguments, scale=scale, window_size=window_size)

    def install(kernel: str) -> None:
        module = types.ModuleType("torch.nn.attention.varlen")
        module.varlen_attn = slow_varlen if kernel == "varlen" else slow_varlen_211  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
        monkeypatch.setattr(attention, "_can_run_varlen", lambda query: True)
        attention.varlen_parameters.cache_clear()

    yield install
    attention.varlen_parameters.cache_clear()


@pytest.mark.parametrize("kernel", ["sdpa", "varlen", "varlen without enable_gqa"])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_equals_attention_under_the_dense_mask(
    varlen: Callable[[str], None], groups: int, window: int | None, kernel: str
) -> None:
    if kernel != "sdpa":
        varlen(kernel)
    torch.manual_seed(0)
    tokens = sum(segment.num_tokens for segment in SEGMENTS)
    query = torch.randn(tokens, 4, 8, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(tokens, groups, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    upstream = torch.randn_like(query)

    layout = AttentionLayout(SEGMENTS, query.device)
    flat = flat_attention(query, key, value, layout, scale=0.3, window=window)
    gradients = torch.autograd.grad(flat, (query, key, value), upstream)
    repeated = [part.repeat_interleave(4 // groups, dim=1) for part in (key, value)]
    heads_first = [part.transpose(0, 1) for part in (query, *repeated)]
    dense = scaled_dot_product_attention(*heads_first, attn_mask=dense_mask(window), scale=0.3).transpose(0, 1)
    torch.testing.assert_close(flat, dense)
    torch.testing.assert_close(gradients, torch.autograd.grad(dense, (query, key, value), upstream))


class OnCuda:
    """A tensor's properties, as on an Ampere card in half precision."""

    is_cuda, dtype, device, shape = True, torch.bfloat16, torch.device("cuda"), (5, 4, 64)


@pytest.mark.parametrize(
    ("parameters", "runs"),
    [
        (None, False),  # torch before 2.10
        (["query", "is_causal", "return_aux"], False),  # 2.10 says nothing of fewer queries than keys
        (["query", "return_aux", "scale", "window_size"], True),  # 2.11
        (["query", "return_aux", "scale", "window_size", "enable_gqa"], True),
    ],
)
def test_the_varlen_kernel_is_recognised_by_what_it_offers(
    monkeypatch: pytest.MonkeyPatch, parameters: list[str] | None, runs: bool
) -> None:
    module: Any = None
    if parameters is not None:
        module = types.ModuleType("torch.nn.attention.varlen")
        exec(f"def varlen_attn({', '.join(parameters)}): ...", vars(module))  # noqa: S102
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    attention.varlen_parameters.cache_clear()
    try:
        assert attention._can_run_varlen(OnCuda()) == runs  # type: ignore[arg-type]
    finally:
        attention.varlen_parameters.cache_clear()


def test_a_few_calls_serve_however_many_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    calls: list[Any] = []

    def counted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **options: Any) -> torch.Tensor:
        calls.append(q.shape[0] * q.shape[2])
        return scaled_dot_product_attention(q, k, v, mask, **options)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", counted)
    for pairs in (8, 128):
        calls.clear()
        lengths = torch.randint(1, 160, (pairs, 3), generator=generator).tolist()
        segments = [Segment(prompt, (chosen, rejected)) for prompt, chosen, rejected in lengths]
        rows = torch.randn(sum(map(sum, lengths)), 1, 8)
        flat_attention(rows, rows, rows, AttentionLayout(segments, rows.device), scale=1.0)
        assert len(calls) <= 24
        conversations = sum(s.prompt + length for s in segments for length in s.responses)
        assert sum(calls) < 1.35 * conversations, "padding"


def test_groups_are_the_cheapest() -> None:
    assert group([5] * 100, 1.0) == [100]
    assert group([1, 1000], CALL_COST["cpu"]) == [1, 1]
    assert group([999, 1000], CALL_COST["cpu"]) == [2]
    assert sum(group(list(range(1, 500)), CALL_COST["cuda"])) == 499
