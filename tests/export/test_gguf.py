"""A GGUF file, read back by transformers, is the model and the tokenizer that were written."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from lit_dpo.export.gguf import LLAMA3, check_architecture, split_name, write_gguf
from tests.export.test_merge import SHAPE, distributions
from tests.tiny import save_tiny_base

pytestmark = pytest.mark.filterwarnings("ignore:.*")
CASES: dict[str, Any] = {
    "llama with tied embeddings": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama": LlamaConfig(
        **SHAPE, tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    ),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**{**SHAPE, "head_dim": 128}, tie_word_embeddings=True),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_read_back(case: str, tmp_path: Path) -> None:
    base = Path(save_tiny_base(tmp_path / "base", CASES[case]))
    expected = distributions(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval())
    for kind, bound in {"f16": 0.02, "q8_0": 0.3}.items():
        write_gguf(base, tmp_path / "model.gguf", kind, progress_bar=False)  # type: ignore[arg-type]
        read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
        assert (distributions(read) - expected).abs().max() < bound, kind
    text = "<|im_start|>user\nThe cat sat on 123 mats, naïvely!<|im_end|>\n"
    tokenizers = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    own, again = (tokenizer(text)["input_ids"] for tokenizer in tokenizers)
    assert own == again
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
    assert tokenizers[0].eos_token == tokenizers[1].eos_token


REFUSED: dict[str, tuple[Any, str]] = {
    "another architecture": (GemmaConfig(architectures=["GemmaForCausalLM"]), "and the base is GemmaForCausalLM"),
    "scaled positions": (
        LlamaConfig(
            architectures=["LlamaForCausalLM"],
            rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        ),
        "positions of the kind 'linear'",
    ),
    "a window": (
        MistralConfig(architectures=["MistralForCausalLM"], sliding_window=8),
        "cannot write a sliding window",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_hold_is_refused(case: str) -> None:
    config, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        check_architecture(config)


def test_how_texts_are_split_has_a_name() -> None:
    def split(regex: str) -> dict[str, Any]:
        steps = [{"type": "Split", "pattern": {"Regex": regex}}, {"type": "ByteLevel", "use_regex": False}]
        return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}

    assert split_name(split(LLAMA3)) == "llama-bpe"
    assert split_name(split(LLAMA3.replace("{1,3}", ""))) == "qwen2"
    assert split_name({"pre_tokenizer": {"type": "ByteLevel", "use_regex": True}}) == "gpt-2"
    digits = [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}]
    assert split_name({"pre_tokenizer": {"type": "Sequence", "pretokenizers": digits}}) == "smollm"
    with pytest.raises(ValueError, match="how the tokenizer splits texts has no name here"):
        split_name(split("."))
