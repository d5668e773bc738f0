"""A GGUF file becomes a folder that holds the same model, and is read once on the way."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGUFWriter
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from lit_dpo.base.gguf import convert


def write_gguf(base: str, path: Path) -> None:
    """The tiny Llama as llama.cpp writes one."""
    model: Any = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    vocabulary = AutoTokenizer.from_pretrained(base).get_vocab()
    config, layers = model.config, gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(vocabulary["<|im_start|>"])
    writer.add_eos_token_id(vocabulary["<|im_end|>"])
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        for part, number in heads.items():
            if part in name:  # llama.cpp turns pairs of neighbours, transformers turns halves
                tensor = tensor.unflatten(0, (number, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(layers.get_name(name, (".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_file_is_read_once_and_gives_the_same_model(
    tiny_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers asks for the header several times; if it asks elsewhere, a conversion takes thrice as long."""
    write_gguf(tiny_base, tmp_path / "tiny.gguf")
    calls = []

    def counted(name: str) -> Any:
        original = getattr(gguf, name)
        return lambda *arguments: calls.append(name) or original(*arguments)

    for name in ("GGUFReader", "get_tensor_name_map"):
        monkeypatch.setattr(gguf, name, counted(name))
    monkeypatch.setenv("LIT_DPO_CACHE", str(tmp_path / "cache"))
    folder = convert(tmp_path / "tiny.gguf")
    assert sorted(calls) == ["GGUFReader", "get_tensor_name_map"]
    found = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    expected = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<|im_end|>"
