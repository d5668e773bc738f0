import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import (
    BitsAndBytesConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from lit_dpo.data.batch import PairBatch
from lit_dpo.objectives import PairLogps
from lit_dpo.policy.policy import Policy
from lit_dpo.policy.precision import NF4
from tests.closeness import SMOLLM2, TINY, assert_same
from tests.tiny import SIZES, random_batch, random_pairs, save_tiny_base, tiny_policy

EXTREMES = [
    [(5, 7, 3)],
    [(1, 1, 1), (6, 2, 9), (3, 12, 1)],
    [(40, 1, 30), (1, 60, 2), (17, 5, 5), (2, 2, 2)],
    [(7, 3, 9, 1, 4), (5, 7, 3), (2, 8, 6, 5)],  # ranked lists among pairs
]


def adapter_gradients(policy: Policy, batch: PairBatch) -> dict[str, torch.Tensor]:
    policy.zero_grad()
    return adapter_gradients_of(policy, policy.logps(batch))


def adapter_gradients_of(policy: Policy, logps: PairLogps) -> dict[str, torch.Tensor]:
    (logps.chosen.sum() - 0.5 * logps.rejected.sum()).backward()
    found = gradients_of(policy)
    policy.zero_grad()
    return found


def gradients_of(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def assert_same_policy(flat: Policy, padded: Policy, batch: PairBatch) -> None:
    one, other = flat.logps(batch), padded.logps(batch)
    assert_same(one[:4], other[:4], TINY)
    assert_same(one.responses.token_logps, other.responses.token_logps, TINY)  # type: ignore[union-attr]
    assert_same(adapter_gradients(flat, batch), adapter_gradients(padded, batch), TINY)


@pytest.mark.parametrize("sizes", EXTREMES)
def test_the_flat_layout_gives_what_separate_padded_rows_give(tiny_base: str, sizes: list[tuple[int, ...]]) -> None:
    flat, padded = tiny_policy(tiny_base, "flat"), tiny_policy(tiny_base, "padded")
    assert (flat.flat, padded.flat) == (True, False)
    assert_same_policy(flat, padded, random_batch(sizes))


# A prompt of one token, responses of one token, responses of very different lengths, a prompt of 400 tokens.
PECULIAR = [(1, 1, 1), (1, 30, 2), (12, 1, 25), (3, 2, 90), (7, 5, 5), (2, 40, 1), (30, 8, 9), (400, 3, 12)]
# Short ones beside them, some of the same lengths.
SHORT = [(1, 1, 1), (7, 5, 5), (7, 5, 5), (1, 2, 1), (2, 1, 3), (3, 1, 1), (1, 1, 4), (4, 6, 3)]


@pytest.mark.parametrize(
    "groups",
    [
        [PECULIAR[:3], SHORT[:5]],
        pytest.param([PECULIAR[:3], PECULIAR[3:4], PECULIAR[4:7], PECULIAR[7:], SHORT], marks=pytest.mark.slow),
    ],
    ids=["8 pairs", "16 pairs"],
)
def test_on_the_embedded_model(embedded_base: str, groups: list[list[tuple[int, int, int]]]) -> None:
    """All pairs in one flat row against padded rows of one response each, with transformers' own attention."""
    flat = tiny_policy(embedded_base, "flat")
    padded = tiny_policy(embedded_base, "padded")
    pairs = iter(random_pairs([sizes for group in groups for sizes in group], vocabulary=40_000))
    parted = [list(itertools.islice(pairs, len(group))) for group in groups]
    logps = flat.logps(PairBatch.from_pairs([pair for group in parted for pair in group]))
    found = torch.stack([logps.chosen, logps.rejected], dim=1)
    gradients = adapter_gradients_of(flat, logps)
    expected = []
    for group in parted:  # each response is a row of its own, padded at its end: short ones together, long ones alone
        own = padded.logps(PairBatch.from_pairs(group))
        (own.chosen.sum() - 0.5 * own.rejected.sum()).backward()
        expected.append(torch.stack([own.chosen, own.rejected], dim=1).detach())
    assert_same(found, torch.cat(expected), SMOLLM2)
    assert_same(gradients, gradients_of(padded), SMOLLM2)


def test_log_probs_equal_a_slow_float64_loop(tiny_base: str) -> None:
    policy = tiny_policy(tiny_base, "flat")
    batch = random_batch(EXTREMES[1])
    logps = policy.logps(batch)
    model = tiny_policy(tiny_base, "padded").model.double()
    start, expected = 0, []
    for prompt, (chosen, rejected), _ in batch.segments:
        ids = batch.input_ids[start : start + prompt + chosen + rejected].tolist()
        start += len(ids)
        for response in (ids[prompt : prompt + chosen], ids[prompt + chosen :]):
            conversation, total = ids[:prompt], 0.0
            for token in response:  # one forward a token, nothing shared
                logits = model(input_ids=torch.tensor([conversation])).logits[0, -1]
                total += torch.log_softmax(logits, -1)[token].item()
                conversation = [*conversation, token]
            expected.append(total)
    found = torch.stack([logps.chosen, logps.rejected], dim=1)
    assert_same(found.flatten(), torch.tensor(expected), TINY)


WINDOWED = ["sliding_attention", "full_attention"]
ARCHITECTURES: dict[str, tuple[Any, bool]] = {
    "qwen2": (Qwen2Config(**SIZES), True),
    "qwen3": (Qwen3Config(**SIZES), True),
    "mistral-window": (MistralConfig(**SIZES, sliding_window=5), True),
    "phi3": (Phi3Config(**SIZES, pad_token_id=0), True),
    "gpt2": (GPT2Config(n_embd=32, n_layer=2, n_head=4), True),
    "gemma3-window": (Gemma3TextConfig(**SIZES, sliding_window=6, layer_types=WINDOWED, pad_token_id=0), True),
    "gemma2": (Gemma2Config(**SIZES, sliding_window=6), False),
    "granite": (GraniteConfig(**SIZES, logits_scaling=4.0), False),
    "cohere": (CohereConfig(**SIZES), False),
    "mamba": (MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4), False),
}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_are_served_exactly_or_fall_back_and_say_so(name: str, tmp_path: Path) -> None:
    config, served = ARCHITECTURES[name]
    config.vocab_size = 322
    base = save_tiny_base(tmp_path / name, config)
    batch = random_batch([(5, 7, 3), (9, 4, 12)])
    if served:
        assert_same_policy(tiny_policy(base, "auto"), tiny_policy(base, "padded"), batch)
        return
    # peft refuses adapters on a Mamba's output projection
    options = {"lora": LoraConfig(target_modules=["in_proj"], task_type="CAUSAL_LM")} if name == "mamba" else {}
    with pytest.warns(UserWarning, match="padded layout is used"):
        policy = tiny_policy(base, "auto", **options)
    assert not policy.flat
    policy.logps(batch).chosen.sum().backward()
    with pytest.raises(ValueError, match=r"model\.layout=flat does not work"):
        tiny_policy(base, "flat", **options)


def test_the_initial_policy_is_the_base_alone(tiny_base: str) -> None:
    policy, fresh = tiny_policy(tiny_base), tiny_policy(tiny_base)
    for name, parameter in fresh.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    batch = random_batch([(5, 7, 3)])
    with policy.initial():
        initial = policy.logps(batch)
    assert torch.equal(initial.chosen, fresh.logps(batch).chosen.detach())
    assert not torch.equal(initial.chosen, policy.logps(batch).chosen)
    assert initial.chosen.grad_fn is None
    assert all(parameter.requires_grad for name, parameter in policy.named_parameters() if "lora_" in name)


def test_a_frozen_copy_of_the_starting_adapter_is_the_initial_policy(tiny_base: str, tmp_path: Path) -> None:
    first = tiny_policy(tiny_base)
    first.model.save_pretrained(str(tmp_path / "adapter"))
    batch = random_batch([(5, 7, 3), (2, 3, 4)])
    start = first.logps(batch).chosen.detach()

    from lit_dpo.policy.loading import load_policy

    model = load_policy(
        tiny_base,
        quantization=None,
        lora=None,  # type: ignore[arg-type]
        adapter=str(tmp_path / "adapter"),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    policy = Policy(model)
    assert torch.equal(policy.logps(batch).chosen, start)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.01)
    with policy.initial():
        assert torch.equal(policy.logps(batch).chosen, start)
    moved = policy.logps(batch).chosen
    assert not torch.equal(moved, start)
    moved.sum().backward()
    trained = [name for name, parameter in policy.named_parameters() if parameter.grad is not None]
    assert trained
    assert not any(".reference" in name for name in trained)


@pytest.mark.parametrize("quantization", [NF4, {"load_in_8bit": True}])
def test_quantized_weights_train_after_an_evaluation(tiny_base: str, quantization: dict[str, Any]) -> None:
    """An evaluation repacks 4-bit weights on some CPUs, and the adapters below them then get no gradient."""
    policy = tiny_policy(tiny_base, quantization=BitsAndBytesConfig(**quantization))
    layers = [module for module in policy.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    if "load_in_4bit" in quantization:
        assert layers
    batch = random_batch([(5, 7, 3), (2, 3, 4)])
    with torch.no_grad():
        evaluated = policy.eval().logps(batch).chosen
    trained = policy.train().logps(batch).chosen
    if layers:  # on a CPU, 8-bit products are rounded otherwise in evaluation
        assert torch.equal(trained, evaluated)
    gradients = adapter_gradients(policy, batch)
    assert len(gradients) == 2 * 2 * 7
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())


def test_gradient_checkpointing_changes_nothing(tiny_base: str) -> None:
    batch = random_batch([(5, 7, 3), (2, 3, 4)])
    plain, checkpointed = tiny_policy(tiny_base, "flat"), tiny_policy(tiny_base, "flat", recompute=True)
    assert torch.equal(plain.logps(batch).chosen, checkpointed.logps(batch).chosen)
    expected = adapter_gradients(plain, batch)
    for name, gradient in adapter_gradients(checkpointed, batch).items():
        assert torch.equal(gradient, expected[name]), name


def test_adapters_that_leave_no_initial_policy_are_refused(tiny_base: str) -> None:
    for field, value in (("bias", "all"), ("modules_to_save", ["lm_head"]), ("init_lora_weights", "pissa")):
        lora = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **{field: value})
        with pytest.raises(ValueError, match=f"model.lora.{field}"):
            tiny_policy(tiny_base, lora=lora)


def test_adapters_are_float32_and_dropout_is_off(tiny_base: str) -> None:
    policy = tiny_policy(tiny_base, quantization=BitsAndBytesConfig(**NF4))
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}
    assert policy.training
    assert all(module.p == 0 for module in policy.modules() if isinstance(module, torch.nn.Dropout))
