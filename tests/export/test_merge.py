"""A merged model is what was trained, for adapters and architectures of several kinds."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
)

from lit_dpo.export import merge
from lit_dpo.export.merge import write_merged
from lit_dpo.policy.adapters import save_adapter
from lit_dpo.policy.loading import load_policy
from lit_dpo.policy.precision import NF4, quantization_for
from tests.tiny import SIZES, save_tiny_base, tiny_tokenizer, wake_adapters

pytestmark = pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
VOCABULARY = len(tiny_tokenizer())
SHAPE: dict[str, Any] = {**SIZES, "vocab_size": VOCABULARY, "initializer_range": 0.2}
NF4_ = BitsAndBytesConfig(**NF4)
INT8 = BitsAndBytesConfig(load_in_8bit=True)
ALL: dict[str, Any] = {"target_modules": "all-linear"}
CASES: dict[str, tuple[Any, Any, Any]] = {
    "llama in 4 bits": (LlamaConfig(**SHAPE, tie_word_embeddings=True), NF4_, ALL),
    "llama in 8 bits": (LlamaConfig(**SHAPE), INT8, ALL),
    "llama, not quantized": (LlamaConfig(**SHAPE), None, ALL),
    "dora of several ranks, on tied embeddings": (
        LlamaConfig(**SHAPE, tie_word_embeddings=True),
        NF4_,
        {"target_modules": ["q_proj", "v_proj", "embed_tokens"], "use_dora": True, "rank_pattern": {"q_proj": 3}},
    ),
    "rank-stabilized, of several alphas": (
        LlamaConfig(**SHAPE),
        NF4_,
        {**ALL, "use_rslora": True, "alpha_pattern": {"down_proj": 3}},
    ),
    "qwen2, with biases": (Qwen2Config(**SHAPE), NF4_, ALL),
    "phi-3, with fused projections": (
        Phi3Config(**{name: SHAPE[name] for name in SHAPE if name != "head_dim"}, pad_token_id=0),
        NF4_,
        ALL,
    ),
    "gpt-2, with transposed layers": (
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2),
        NF4_,
        {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    ),
    "mixtral, whose experts are one tensor in memory": (
        MixtralConfig(**SHAPE, num_local_experts=4),
        NF4_,
        {"target_modules": ["q_proj", "o_proj"]},
    ),
}


def trained(folder: Path, config: Any, quantization: BitsAndBytesConfig | None, lora: dict[str, Any]) -> Any:
    """A model with adapters that are not zero, and its folders ``base`` and ``adapter``."""
    base = save_tiny_base(folder / "base", config)
    model = load_policy(
        base,
        quantization=quantization_for(quantization, torch.float32),
        lora=LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **lora),
        adapter=None,
        dtype=torch.float32,
        device=torch.device("cpu"),
        progress_bar=False,
    )
    wake_adapters(model, 0.2)
    save_adapter(model, tiny_tokenizer(), folder / "adapter")
    return model.eval()


@torch.no_grad()
def distributions(model: Any) -> torch.Tensor:
    return model(input_ids=torch.arange(40, 80)[None], use_cache=False).logits.log_softmax(-1)  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("case", CASES)
def test_a_merged_model_is_the_trained_one(case: str, tmp_path: Path) -> None:
    config, quantization, lora = CASES[case]
    model = trained(tmp_path, config, quantization, lora)
    output = tmp_path / "merged"
    output.mkdir()
    write_merged(
        tmp_path / "adapter",
        str(tmp_path / "base"),
        output,
        quantization=quantization,
        dtype=torch.float32,
        shard_size=20_000,
        progress_bar=False,
    )
    assert len(list(output.glob("*.safetensors"))) > 1, "several files, and an index"
    merged = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    expected = distributions(model)
    # In 8 bits the activations are rounded too, which no weight can hold.
    bound = 0.3 if quantization is INT8 else 5e-5
    assert (distributions(merged) - expected).abs().max() < bound
    with model.disable_adapter():
        assert (distributions(model) - expected).abs().max() > 2 * bound, "the adapter does something"


@pytest.mark.filterwarnings("ignore:.*")
def test_the_original_weights_make_another_model(tmp_path: Path) -> None:
    model = trained(tmp_path, *CASES["llama in 4 bits"])
    (tmp_path / "merged").mkdir()
    where = (tmp_path / "adapter", str(tmp_path / "base"), tmp_path / "merged")
    write_merged(*where, quantization=None, progress_bar=False)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").eval()
    assert merged.dtype == torch.bfloat16, "16 bits, although the base has 32"
    assert (distributions(merged.float()) - distributions(model)).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore:.*")
def test_a_full_disk_is_told_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(tmp_path, *CASES["llama in 4 bits"])
    (tmp_path / "merged").mkdir()
    where = (tmp_path / "adapter", str(tmp_path / "base"), tmp_path / "merged")

    def full(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as disk:
        disk.setattr(merge, "save_file", full)
        with pytest.raises(OSError, match="the weights could not be written: I/O error: No space left"):
            write_merged(*where, quantization=None, progress_bar=False)
    free = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(merge.shutil, "disk_usage", lambda folder: free)
    with pytest.raises(OSError, match="the merged model needs 0.0 GB, and 0.0 GB are free"):
        write_merged(*where, quantization=None, progress_bar=False)
