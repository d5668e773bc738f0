"""What only a GPU can show: the kernels of the flat layout against transformers' own attention on padded rows."""

from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig, MistralConfig

from lit_dpo.policy.policy import Policy
from lit_dpo.policy.precision import NF4
from tests.closeness import TINY, assert_same, rounding
from tests.tiny import SIZES, random_batch, save_tiny_base, tiny_policy

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.3}


def cuda_policy(base: str, dtype: torch.dtype, layout: Any, **options: Any) -> Policy:
    return tiny_policy(base, layout, dtype=dtype, device=torch.device("cuda"), **options)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("quantization", [None, BitsAndBytesConfig(**NF4)], ids=["plain", "nf4"])
def test_flat_equals_padded(tmp_path: Any, dtype: torch.dtype, window: int | None, quantization: Any) -> None:
    config = MistralConfig(**{**SIZES, "head_dim": 16}, sliding_window=window, vocab_size=322)
    base = save_tiny_base(tmp_path / "mistral", config)
    batch = random_batch([(5, 7, 3), (1, 1, 9), (30, 40, 2)]).to("cuda")
    gradients = []
    for layout in ("flat", "padded"):
        policy = cuda_policy(base, dtype, layout, quantization=quantization)
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            logps = policy.logps(batch)
        (logps.chosen.sum() - 0.5 * logps.rejected.sum()).backward()
        gradients.append((logps, {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}))
    (flat, ours), (padded, theirs) = gradients
    # The logits, rounded once, and their errors over the tokens of a response, are most of what log-probs are off by.
    assert_same(flat[:2], padded[:2], TINY if dtype == torch.float32 else rounding(1, dtype))
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert (gradient - theirs[name]).norm() <= (TOLERANCE[dtype] + 1e-3) * theirs[name].norm() + 1e-6, name
