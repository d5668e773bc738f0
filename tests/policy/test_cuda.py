"""What only a GPU can show of a policy: its kernels in value and gradient, and generation from packed weights."""

from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch.nn.functional import log_softmax, scaled_dot_product_attention
from transformers import BitsAndBytesConfig, LlamaConfig, MistralConfig

from lit_dpo.policy import attention, lora
from lit_dpo.policy.attention import AttentionLayout, flat_attention
from lit_dpo.policy.logprobs import token_logps
from lit_dpo.policy.policy import Policy
from lit_dpo.policy.precision import NF4
from tests.closeness import TINY, assert_same, rounding
from tests.policy.test_attention import SEGMENTS, dense_mask
from tests.tiny import SIZES, random_batch, save_tiny_base, tiny_policy, wake_adapters

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.3}
HALVES = [torch.float16, torch.bfloat16]
NF4_CONFIG = BitsAndBytesConfig(**NF4)


def cuda_policy(base: str, dtype: torch.dtype, layout: Any, **options: Any) -> Policy:
    return tiny_policy(base, layout, dtype=dtype, device=CUDA, **options)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("quantization", [None, NF4_CONFIG], ids=["plain", "nf4"])
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


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kernel", ["varlen", "sdpa"])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_attention_equals_the_dense_mask(
    monkeypatch: pytest.MonkeyPatch, groups: int, window: int | None, kernel: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    tokens = sum(segment.num_tokens for segment in SEGMENTS)
    query = torch.randn(tokens, 4, 64, dtype=dtype, device=CUDA, requires_grad=True)
    key, value = (torch.randn(tokens, groups, 64, dtype=dtype, device=CUDA, requires_grad=True) for _ in range(2))
    upstream = torch.randn_like(query)
    if kernel == "varlen":
        assert attention._can_run_varlen(query)
    else:
        monkeypatch.setattr(attention, "_can_run_varlen", lambda query: False)
    layout = AttentionLayout(SEGMENTS, CUDA)
    flat = flat_attention(query, key, value, layout, scale=0.3, window=window)
    found = torch.autograd.grad(flat, (query, key, value), upstream)

    wide = [part.detach().double().requires_grad_() for part in (query, key, value)]
    repeated = [part.repeat_interleave(4 // groups, dim=1) for part in wide[1:]]
    heads_first = [part.transpose(0, 1) for part in (wide[0], *repeated)]
    mask = dense_mask(window).to(CUDA)
    dense = scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=0.3).transpose(0, 1)
    expected = torch.autograd.grad(dense, wide, upstream.double())
    assert_same(flat, dense, rounding(2, dtype))
    # Together: under a window of one key, queries and keys have no gradient.
    assert_same(*(torch.cat([part.flatten() for part in parts]) for parts in (found, expected)), rounding(8, dtype))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_log_probs_equal_float64(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 5000, bias=False, device=CUDA, dtype=dtype).requires_grad_(False)
    hidden = torch.randn(600, 64, device=CUDA, dtype=dtype, requires_grad=True)
    targets = torch.randint(5000, (600,), device=CUDA)
    upstream = torch.randn(600, device=CUDA)
    found = token_logps(hidden, targets, head).logps
    (gradient,) = torch.autograd.grad(found, hidden, upstream)
    wide = hidden.detach().double().requires_grad_()
    logits = wide @ head.weight.double().T
    expected = log_softmax(logits, -1).gather(-1, targets[:, None])[:, 0]
    (wide_gradient,) = torch.autograd.grad(expected, wide, upstream.double())
    assert_same(found, expected, rounding(2, dtype))
    assert_same(gradient, wide_gradient, rounding(4, dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_fused_lora_on_4_bits_equals_float64(tmp_path: Any, dtype: torch.dtype) -> None:
    base = save_tiny_base(tmp_path / "llama", LlamaConfig(**{**SIZES, "hidden_size": 128}, vocab_size=322))
    policy = cuda_policy(base, dtype, "flat", quantization=BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=dtype))
    wake_adapters(policy.model, 0.2)
    layer: Any = policy.model.get_base_model().model.layers[0].self_attn.q_proj  # type: ignore[union-attr]
    assert layer.forward.func is lora._forward
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(9, 128, device=CUDA, dtype=dtype, requires_grad=True)
    with torch.autocast("cuda", dtype):
        output = layer(x)
    upstream = torch.randn_like(output)
    found = torch.autograd.grad(output, (x, a, b), upstream)

    weight = lora._dense(layer.get_base_layer().weight, dtype).double()
    wide = [part.detach().double().requires_grad_() for part in (x, a, b)]
    expected = wide[0] @ weight.T + layer.scaling["default"] * (wide[0] @ wide[1].T) @ wide[2].T
    assert_same(output, expected, rounding(4, dtype))
    assert_same(found, torch.autograd.grad(expected, wide, upstream.double()), rounding(6, dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_one_token_by_packed_weights_equals_it_by_dense_ones(tmp_path: Any, dtype: torch.dtype) -> None:
    base = save_tiny_base(tmp_path / "llama", LlamaConfig(**{**SIZES, "hidden_size": 128}, vocab_size=322))
    policy = cuda_policy(base, dtype, "flat", quantization=BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=dtype))
    layer: Any = policy.model.get_base_model().model.layers[0].self_attn.q_proj  # type: ignore[union-attr]
    x = torch.randn(1, 1, 128, device=CUDA, dtype=dtype)
    with torch.autocast("cuda", dtype):
        dense = layer(x)
        with torch.no_grad():
            packed = layer(x)
    assert_same(packed, dense, rounding(8, dtype))


def test_greedy_answers_are_those_of_the_cpu(tmp_path: Any) -> None:
    base = save_tiny_base(tmp_path / "llama")
    ids = torch.tensor([[5, 7, 9, 11], [3, 8, 200, 17]])
    answers = []
    for device in ("cpu", "cuda"):
        policy = tiny_policy(base, device=torch.device(device)).eval()
        mask = torch.ones_like(ids).to(device)
        options = {"max_new_tokens": 20, "do_sample": False, "use_cache": True, "pad_token_id": 0}
        answers.append(policy.model.generate(input_ids=ids.to(device), attention_mask=mask, **options).cpu())
    assert torch.equal(*answers)


def test_residuals_beyond_float16_stay_finite(tmp_path: Any) -> None:
    base = save_tiny_base(tmp_path / "llama", LlamaConfig(**SIZES, vocab_size=322, tie_word_embeddings=False))
    policy = cuda_policy(base, torch.float16, "flat", quantization=NF4_CONFIG)
    with torch.no_grad():
        policy.model.get_input_embeddings().weight.fill_(6e4)  # twice as much is more than float16 holds
        for layer in policy.model.get_base_model().model.layers:  # type: ignore[union-attr]
            layer.post_attention_layernorm.weight.fill_(100)
    with torch.autocast("cuda", torch.float16):
        logps = policy.logps(random_batch([(5, 7, 3)]).to("cuda"))
    (logps.chosen.sum()).backward()
    assert logps.chosen.isfinite().all()
    gradients = [p.grad for p in policy.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_dropout_on_a_gpu_goes_pefts_way(tmp_path: Any) -> None:
    base = save_tiny_base(tmp_path / "llama")
    config = LoraConfig(target_modules="all-linear", lora_dropout=0.5, task_type="CAUSAL_LM")
    policy = cuda_policy(base, torch.bfloat16, "flat", quantization=NF4_CONFIG, lora=config)
    batch = random_batch([(5, 7, 3)]).to("cuda")
    with torch.autocast("cuda", torch.bfloat16):
        assert not torch.equal(policy.logps(batch).chosen, policy.logps(batch).chosen)
