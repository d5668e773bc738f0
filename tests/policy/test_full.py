"""All weights train: log-probs and gradients are those of the plain model, and the initial weights come back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_dpo.module import DPOModule
from lit_dpo.policy.full import FullModel
from lit_dpo.policy.loading import load_policy
from lit_dpo.policy.policy import Policy
from tests.tiny import random_batch, random_pairs, tiny_tokenizer

SIZES = [(5, 7, 4), (1, 3, 9), (8, 2, 2)]


def full_policy(base: str, **options: Any) -> Policy:
    where: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu"), "progress_bar": False, **options}
    model = load_policy(base, quantization=None, lora=None, adapter=None, **where)
    return Policy(model, recompute=False)


def test_log_probs_and_gradients_are_those_of_the_plain_model(tiny_base: str) -> None:
    policy = full_policy(tiny_base)
    assert policy.flat
    policy.logps(random_batch(SIZES)).chosen.sum().backward()
    plain = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for pair in random_pairs(SIZES):
        ids = torch.tensor([pair.prompt + pair.chosen])
        logps = plain(ids).logits[0, len(pair.prompt) - 1 : -1].log_softmax(-1)
        total = total + logps.gather(1, torch.tensor(pair.chosen)[:, None]).sum()
    total.backward()
    found = dict(policy.model.base.named_parameters())
    for name, parameter in plain.named_parameters():
        assert found[name].grad is not None, name
        difference = (found[name].grad.double() - parameter.grad).norm() / parameter.grad.norm()
        assert difference < 1e-5, name


def test_the_initial_weights_come_back(tiny_base: str) -> None:
    policy, batch = full_policy(tiny_base), random_batch(SIZES)
    with torch.no_grad():
        before = policy.logps(batch).chosen
        for parameter in policy.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
        after = policy.logps(batch).chosen
        with policy.initial():
            assert torch.equal(policy.logps(batch).chosen, before)
        assert torch.equal(policy.logps(batch).chosen, after)
    assert not torch.equal(before, after)
    policy.release_initial()
    assert policy.model._initial is None


def test_it_is_saved_in_16_bits(tiny_base: str, tmp_path: Path) -> None:
    model = full_policy(tiny_base).model
    assert isinstance(model, FullModel)
    model.save(tiny_tokenizer(), tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16
    assert model.config.dtype == torch.float32, "the model in training stays as it is"


def test_what_cannot_train_all_weights_is_refused(tiny_base: str) -> None:
    with pytest.raises(ValueError, match=r"Set model\.quantization=null"):
        DPOModule(tiny_base, lora=None)
    with pytest.raises(ValueError, match=r"model\.adapter has its own LoRA configuration"):
        DPOModule(tiny_base, lora=None, quantization=None, adapter="somewhere")
    with pytest.raises(ValueError, match=r"trainer\.strategy=sharded splits a frozen base"):
        full_policy(tiny_base, mesh=object())
