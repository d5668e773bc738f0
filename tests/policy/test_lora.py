"""The fused LoRA layers give what PEFT's own give, and their gradients are those of finite differences."""

from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from lit_dpo.policy import loading, lora
from lit_dpo.policy.policy import Policy
from lit_dpo.policy.precision import NF4
from tests.closeness import TINY, assert_same, rounding
from tests.tiny import random_batch, tiny_policy

BATCH = random_batch([(5, 7, 3), (2, 3, 4)])
HALF = rounding(2 * (2 * 6 + 1), torch.bfloat16)  # products are summed in float32 and rounded once
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "nf4": {"quantization": BitsAndBytesConfig(**NF4)},
    "8 bit": {"quantization": BitsAndBytesConfig(load_in_8bit=True)},
    "dora": {"lora": LoraConfig(target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM")},
    "rank-stabilized": {"lora": LoraConfig(target_modules="all-linear", use_rslora=True, task_type="CAUSAL_LM")},
    "few layers": {"lora": LoraConfig(target_modules=["q_proj", "gate_proj"], task_type="CAUSAL_LM")},
}


def gradients(policy: Policy) -> dict[str, torch.Tensor]:
    logps = policy.logps(BATCH)
    (logps.chosen.sum() - 0.5 * logps.rejected.sum()).backward()
    return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_same_as_pefts_own(tiny_base: str, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    fused = tiny_policy(tiny_base, **OPTIONS[name])
    monkeypatch.setattr(loading, "fuse_adapters", lambda model: None)
    own = tiny_policy(tiny_base, **OPTIONS[name])
    assert_same(fused.logps(BATCH).chosen, own.logps(BATCH).chosen, TINY)
    with fused.initial(), own.initial():
        assert_same(fused.logps(BATCH).chosen, own.logps(BATCH).chosen, TINY)
    assert_same(gradients(fused), gradients(own), TINY)


def test_dropout_goes_pefts_way(tiny_base: str) -> None:
    config = LoraConfig(target_modules="all-linear", lora_dropout=0.5, task_type="CAUSAL_LM")
    policy = tiny_policy(tiny_base, lora=config)
    torch.manual_seed(0)
    assert not torch.equal(policy.logps(BATCH).chosen, policy.logps(BATCH).chosen)
    policy.eval()
    assert torch.equal(policy.logps(BATCH).chosen, policy.logps(BATCH).chosen)


def test_every_gated_layer_is_recognized_by_its_numbers(tiny_base: str) -> None:
    policy = tiny_policy(tiny_base)
    gated = [module for module in policy.modules() if hasattr(module, "gated_product")]
    assert len(gated) == 2
    stranger: Any = tiny_policy(tiny_base).model.get_base_model().model.layers[0].mlp  # type: ignore[union-attr]
    stranger.forward = lambda x: x
    assert not lora.is_gated(stranger)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    weight, bias = numbers(4, 5).detach(), numbers(4).detach()
    a, b = numbers(2, 5), numbers(4, 2)
    assert torch.autograd.gradcheck(lambda x: lora._FrozenLinear.apply(x, weight, bias), (numbers(3, 5),))
    assert torch.autograd.gradcheck(
        lambda x, a, b: lora._LoraLinear.apply(x, weight, bias, a, b, 0.7), (numbers(1, 3, 5), a, b)
    )

    def product(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return lora.gated_product(torch.nn.functional.silu, gate, up)

    assert torch.autograd.gradcheck(
        lambda gate, up, a, b: lora._GatedLoraLinear.apply(gate, up, product, weight, None, a, b, 0.7),
        (numbers(1, 3, 5), numbers(1, 3, 5), a, b),
    )


@pytest.mark.parametrize("targets", ["all-linear", ["gate_proj", "down_proj"], ["q_proj", "up_proj"]])
@pytest.mark.parametrize("quantization", [None, BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=torch.bfloat16)])
def test_the_same_as_pefts_own_under_autocast(
    tiny_base: str, monkeypatch: pytest.MonkeyPatch, targets: Any, quantization: Any
) -> None:
    options = {"quantization": quantization, "lora": LoraConfig(target_modules=targets, task_type="CAUSAL_LM")}
    fused = tiny_policy(tiny_base, **options)
    monkeypatch.setattr(loading, "fuse_adapters", lambda model: None)
    own = tiny_policy(tiny_base, **options)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(fused.logps(BATCH).chosen, own.logps(BATCH).chosen, HALF)
        assert_same(gradients(fused), gradients(own), HALF)


def test_adapters_can_be_merged_and_unloaded(tiny_base: str) -> None:
    policy = tiny_policy(tiny_base)
    with torch.no_grad():
        expected = policy.logps(BATCH).chosen
        policy.model.merge_adapter()
        assert_same(policy.logps(BATCH).chosen, expected, TINY)
        policy.model.unmerge_adapter()
    ids = torch.arange(5)[None]
    merged: Any = policy.model.merge_and_unload()
    assert merged(ids).logits.requires_grad is False


def test_a_chosen_type_of_quantized_products_is_kept(tiny_base: str) -> None:
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        policy = tiny_policy(tiny_base, quantization=BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=dtype))
        results.append(policy.logps(BATCH).chosen)
    assert not torch.equal(*results)
