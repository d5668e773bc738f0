"""Estimates of memory and time, held against what training keeps, and against measured peaks."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaConfig

from lit_dpo.audit.cost import CARDS, operations
from lit_dpo.audit.estimate import place_of
from lit_dpo.audit.memory import (
    CPU_PROCESS,
    WORKSPACE,
    Batch,
    layer_bytes,
    model_size,
    reference_memory,
    training_memory,
)
from lit_dpo.cli.app import main
from lit_dpo.data.batch import PairBatch
from tests.benchmarks.bases import ARCHITECTURES
from tests.tiny import SIZES, random_pairs, save_tiny_base, tiny_policy

LORA = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
SMOLLM2 = LlamaConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49152,
    tie_word_embeddings=True,
)
QWEN = ARCHITECTURES["qwen2.5-0.5b"]
# Peaks of fit on an H200 in bf16-mixed, in GB, measured on 2026-11-26 by python -m tests.benchmarks.memory: by model,
# then for 1, 4 and 16 pairs of 256 and of 1024 tokens, first with all activations kept, then recomputed.
MEASURED = {
    "SmolLM2-135M": (SMOLLM2, [(0.51, 0.35), (1.09, 0.46), (3.07, 0.60), (1.05, 0.45), (2.79, 0.58), (10.0, 1.43)]),
    "Qwen2.5-0.5B": (QWEN, [(1.20, 0.92), (2.26, 1.19), (5.56, 1.37), (2.14, 1.19), (5.13, 1.35), (17.21, 2.88)]),
}
CASES = [(pairs, length) for length in (256, 1024) for pairs in (1, 4, 16)]


@pytest.mark.parametrize("name", MEASURED)
def test_within_15_percent_of_peaks_on_a_gpu(name: str, tmp_path: Path) -> None:
    config, peaks = MEASURED[name]
    config.save_pretrained(tmp_path)
    size = model_size(str(tmp_path), LORA)
    for (pairs, length), both in zip(CASES, peaks, strict=True):
        prompt, response = length // 4 + 34, 3 * length // 8 + 2  # the template adds 34 tokens here, and an end of two
        batch = Batch(pairs * (prompt + 2 * response), pairs * prompt, 2 * pairs * response)
        for recompute, peak in zip((False, True), both, strict=True):
            found = training_memory(
                size, batch, quantized=True, precision="bf16-mixed", recompute=recompute, process=WORKSPACE, kind="cuda"
            )
            before = found.before_training + reference_memory(size, (2 * pairs + 8) * (prompt + 2 * response), 2)
            assert max(found.total, before) / 1e9 == pytest.approx(peak, rel=0.15), (pairs, length, recompute)


# The same on two cores of an AMD EPYC with AVX2 in 32-true, for 1, 4 and 8 pairs of 128, 256 and 512 tokens. The
# process holds half a GB without a model.
ON_A_CPU = [(1.34, 1.29), (2.21, 1.42), (3.34, 1.75), (1.64, 1.32), (3.17, 1.76), (5.29, 2.62), (2.05, 1.60)]
ON_A_CPU += [(5.01, 2.54), (9.42, 3.47)]


def test_within_15_percent_of_peaks_on_a_cpu(tmp_path: Path) -> None:
    SMOLLM2.save_pretrained(tmp_path)
    size = model_size(str(tmp_path), LORA)
    cases = [(pairs, length) for length in (128, 256, 512) for pairs in (1, 4, 8)]
    for (pairs, length), both in zip(cases, ON_A_CPU, strict=True):
        prompt, response = length // 4 + 34, 3 * length // 8 + 2
        batch = Batch(pairs * (prompt + 2 * response), pairs * prompt, 2 * pairs * response)
        for recompute, peak in zip((False, True), both, strict=True):
            options = {"precision": "32-true", "process": 0.5e9 + CPU_PROCESS, "kind": "cpu"}
            found = training_memory(size, batch, quantized=True, recompute=recompute, **options)  # type: ignore[arg-type]
            assert found.total / 1e9 == pytest.approx(peak, rel=0.15), (pairs, length, recompute)


@pytest.mark.parametrize("wide", [False, True])
def test_what_a_layer_keeps_is_counted_right(wide: bool, tmp_path: Path) -> None:
    """Against what autograd saves, for two shapes, in float32 on a CPU."""
    sizes = {
        **SIZES,
        "hidden_size": 64,
        "intermediate_size": 352 if wide else 96,
        "num_hidden_layers": 4,
        "head_dim": 16,
    }
    config = LlamaConfig(**sizes, vocab_size=320, tie_word_embeddings=True)
    base = save_tiny_base(tmp_path / "base", config)
    policy = tiny_policy(base)
    # multiples of 32, so that nothing is padded
    batch = PairBatch.from_pairs(random_pairs([(32, 64, 64)] * 3))
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept: dict[int, int] = {}
    alive = []  # or an address would be used again

    def note(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        address = tensor.untyped_storage().data_ptr()
        if address not in weights:
            kept[address] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        policy.logps(batch)
    size = model_size(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    tokens = Batch(len(batch.input_ids), 3 * 32, 3 * 128)
    assert size.layers * layer_bytes(size, tokens, 4, "32-true", "cpu") == pytest.approx(sum(kept.values()), rel=0.15)


def test_parts_that_are_known_exactly(tiny_base: str) -> None:
    size = model_size(tiny_base, LORA)
    batch = Batch(100, 20, 80)
    options = {"recompute": False, "process": 0.0, "kind": "cuda", "precision": "bf16-mixed"}
    found = training_memory(size, batch, quantized=False, **options)  # type: ignore[arg-type]
    assert found.weights + found.other_weights == 2 * size.total
    assert (found.adapters, found.optimizer) == (8 * size.trained, 8 * size.trained)
    packed = training_memory(size, batch, quantized=True, **options)  # type: ignore[arg-type]
    assert packed.weights == size.linear / 2
    assert 0 < packed.quantization_state < size.linear / 32
    full = model_size(tiny_base, None)
    every = training_memory(full, batch, quantized=True, **options)  # type: ignore[arg-type]
    assert every.weights + every.other_weights + every.adapters + every.optimizer == 16 * full.total
    assert operations(size, 10) == 2 * 2 * size.linear * 10
    assert operations(full, 10, recompute=True) == 4 * 2 * full.linear * 10


def test_the_command(tiny_base: str, pairs_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["estimate", "--model.base", tiny_base, "--data.source", pairs_file, "--data.val_size", "4"]
    arguments += ["--data.batch_size", "4", "--trainer.max_epochs", "3", "--trainer.enable_progress_bar", "false"]
    main([*arguments, "--device", "t4", "--output", str(tmp_path / "e.json")])
    printed = capsys.readouterr().out
    for part in ("Memory on T4 in 16-mixed", "quantization state", "optimizer", "caches on disk", "12 steps, 3 epochs"):
        assert part in printed
    assert "It fits: " in printed
    needs = json.loads((tmp_path / "e.json").read_text())
    assert (needs["fits"], needs["pairs"], needs["run"]["steps"]) == (True, 16, 12)
    main([*arguments, "--device", "h100", "--memory_gb", "0.0625", "--trainer.limit_train_batches", "2"])
    printed = capsys.readouterr().out
    assert "It does not fit: " in printed or "It fits" in printed
    assert "6 steps, 1.5 epochs" in printed
    main([*arguments, "--device", "a10", "--memory_gb", "0.0001", "--model.quantization", "null"])
    printed = capsys.readouterr().out
    assert "It does not fit" in printed
    assert "model.quantization=nf4" in printed
    assert "It fits on T4" in printed
    main([*arguments, "--device", "a10", "--memory_gb", "0.0001", "--model.gradient_checkpointing", "false"])
    assert "model.gradient_checkpointing=auto takes" in capsys.readouterr().out
    main([*arguments, "--device", "h100", "--trainer.precision", "32-true", "--trainer.devices", "2"])
    printed = capsys.readouterr().out
    assert "Memory on H100 in 32-true" in printed
    assert "6 steps, 3 epochs" in printed
    assert "2, of which each takes that memory" in printed
    main([*arguments, "--device", "h100", "--trainer.accumulate_grad_batches", "3"])
    assert "6 steps, 3 epochs" in capsys.readouterr().out, "the last step of an epoch has one batch"
    with pytest.raises(ValueError, match="The run has no end"):
        main([*arguments, "--trainer.max_epochs", "-1"])
    another = ["--model.reference", "AnotherModel", "--model.reference.base", tiny_base]
    main([*arguments, "--device", "h100", *another, "--model.reference.cached", "false"])
    assert "reference model" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--memory_gb must be positive"):
        main([*arguments, "--memory_gb", "-1"])


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, card in CARDS.items():
        place = place_of(name)  # type: ignore[arg-type]
        assert place.room < card.memory * 1e9
        assert place.precision == ("16-mixed" if name == "t4" else "bf16-mixed")
    own = place_of("cpu")
    assert own.rate is not None
    assert own.rate > 1e8
    assert place_of("mps").kind == "mps"
    assert place_of("h100", "32-true", 40).precision == "32-true"
