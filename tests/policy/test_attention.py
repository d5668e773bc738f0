import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from lit_dpo.data.batch import Segment
from lit_dpo.policy.attention import AttentionLayout, flat_attention

SEGMENTS = [Segment(3, 4, 2), Segment(1, 1, 6), Segment(9, 1, 1)]


def dense_mask(window: int | None) -> torch.Tensor:
    """Who sees whom, token by token, from the definition."""
    places = [
        (pair, part, (0 if part == 0 else segment.prompt) + offset)
        for pair, segment in enumerate(SEGMENTS)
        for part, length in enumerate(segment)
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


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_equals_attention_under_the_dense_mask(groups: int, window: int | None) -> None:
    torch.manual_seed(0)
    tokens = sum(map(sum, SEGMENTS))
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
