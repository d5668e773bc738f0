"""A merged model's folder ──► a GGUF file, which llama.cpp, Ollama and LM Studio load. One tensor is written at a time.

The format and the names of tensors are those of the ``gguf`` package, which llama.cpp maintains.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeAlias

import gguf as library
import numpy as np
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer

GGUFType: TypeAlias = Literal["f16", "q8_0"]
ARCHITECTURES = {
    "LlamaForCausalLM": library.MODEL_ARCH.LLAMA,
    "MistralForCausalLM": library.MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": library.MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": library.MODEL_ARCH.QWEN3,
}
TYPES = {"f16": library.GGMLQuantizationType.F16, "q8_0": library.GGMLQuantizationType.Q8_0}
FILE_TYPES = {"f16": library.LlamaFileType.MOSTLY_F16, "q8_0": library.LlamaFileType.MOSTLY_Q8_0}
# How a tokenizer splits a text before its merges ──► llama.cpp's name for it
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {LLAMA3: "llama-bpe", LLAMA3.replace("{1,3}", ""): "qwen2"}


def check_architecture(config: Any) -> None:
    """Checks that a GGUF file can hold a model, before anything is computed.

    Raises:
        ValueError: If it cannot.
    """
    kind = (getattr(config, "architectures", None) or [type(config).__name__])[0]
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"--format gguf writes {known}, and the base is {kind}. Use --format safetensors.")
    scaling = _rope(config).get("rope_type", "default")
    if scaling != "default":
        raise ValueError(
            f"--format gguf cannot write positions of the kind {scaling!r} (rope_scaling): transformers does not read "
            "them back, so the file could not be checked. Use --format safetensors, and llama.cpp's own converter."
        )
    if getattr(config, "use_sliding_window", kind == "MistralForCausalLM") and getattr(config, "sliding_window", None):
        raise ValueError("--format gguf cannot write a sliding window. Use --format safetensors.")


def write_gguf(folder: Path, path: Path, kind: GGUFType = "f16", progress_bar: bool = True) -> None:
    """Writes a model as one GGUF file.

    Args:
        folder: The model in safetensors' format, with its tokenizer.
        path: File to write.
        kind: Type of matrices: ``f16``, or ``q8_0`` (8 bits, in blocks of 32). Vectors are float32.
        progress_bar: Whether to show a progress bar.

    Raises:
        ValueError: If the architecture or the tokenizer is one that this function does not know.
    """
    config = AutoConfig.from_pretrained(folder)
    check_architecture(config)
    arch = ARCHITECTURES[config.architectures[0]]
    writer = library.GGUFWriter(path, library.MODEL_ARCH_NAMES[arch])
    _add_settings(writer, config, kind)
    _add_tokenizer(writer, folder, config.vocab_size)
    names = library.get_tensor_name_map(arch, config.num_hidden_layers)
    plan = [(file, name) for file in sorted(folder.glob("*.safetensors")) for name in _names(file)]
    convert = _converter(config, arch, kind)
    for number, (file, name) in enumerate(plan + plan):
        if number == len(plan):
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            progress = tqdm(total=len(plan), desc="Writing GGUF", unit="tensor", disable=not progress_bar)
        with safe_open(file, "pt") as tensors:
            data, raw = convert(name, tensors.get_tensor(name))
        if number < len(plan):
            known = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if known is None:
                raise ValueError(f"--format gguf: GGUF has no name for {name}. Use --format safetensors.")
            writer.add_tensor_info(known, data.shape, data.dtype, data.nbytes, raw)
        else:
            writer.write_tensor_data(data)
            progress.update()
    progress.close()
    writer.close()


def _names(file: Path) -> list[str]:
    with safe_open(file, "pt") as tensors:
        return list(tensors.keys())


def _converter(
    config: Any, arch: library.MODEL_ARCH, kind: GGUFType
) -> Callable[[str, Tensor], tuple[np.ndarray, library.GGMLQuantizationType]]:
    """A function from name and tensor to the bytes in the file and their type."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}

    def convert(name: str, tensor: Tensor) -> tuple[np.ndarray, library.GGMLQuantizationType]:
        part = name.split(".")[-2]
        if arch is library.MODEL_ARCH.LLAMA and part in heads:
            tensor = interleave(tensor, heads[part])
        values = tensor.float().numpy()
        raw = TYPES[kind] if tensor.dim() > 1 else library.GGMLQuantizationType.F32
        if raw is library.GGMLQuantizationType.Q8_0 and tensor.shape[-1] % 32:
            raw = library.GGMLQuantizationType.F16  # no whole blocks
        return library.quants.quantize(values, raw), raw

    return convert


def interleave(tensor: Tensor, num_heads: int) -> Tensor:
    """Query or key weights for rotary positions of neighbouring pairs, which GGUF's Llama has, instead of two halves.

    Args:
        tensor: Weight or bias of a projection, (heads · head size, …).
        num_heads: Number of heads.
    """
    half = tensor.shape[0] // num_heads // 2
    return tensor.reshape(num_heads, 2, half, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _rope(config: Any) -> dict[str, Any]:
    return getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}


def _add_settings(writer: library.GGUFWriter, config: Any, kind: GGUFType) -> None:
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_type(library.GGUFType.MODEL)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(library.GGML_QUANT_VERSION)
    writer.add_name(getattr(config, "name_or_path", "") or "model")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(_rope(config).get("rope_theta") or getattr(config, "rope_theta", 10_000.0))
    writer.add_key_length(size)
    writer.add_value_length(size)


def _add_tokenizer(writer: library.GGUFWriter, folder: Path, vocab_size: int) -> None:
    """Adds tokens, merges, special tokens and chat template."""
    file = folder / "tokenizer.json"
    if not file.exists():
        raise ValueError("--format gguf needs a tokenizer in the form of tokenizer.json. Use --format safetensors.")
    content = json.loads(file.read_text(encoding="utf-8"))
    kinds: dict[int, tuple[str, float, int]]
    if content["model"].get("byte_fallback"):
        vocabulary = library.LlamaHfVocab(folder)
        writer.add_tokenizer_model("llama")
        kinds = {
            number: (token.decode(), score, int(kind))
            for number, (token, score, kind) in enumerate(vocabulary.all_tokens())
        }
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(split_name(content))
        kinds = _byte_level_tokens(content, folder)
    tokens = [kinds.get(number, (f"[PAD{number}]", 0.0, int(library.TokenType.UNUSED))) for number in range(vocab_size)]
    writer.add_token_list([token for token, _, _ in tokens])
    if content["model"].get("byte_fallback"):
        writer.add_token_scores([score for _, score, _ in tokens])
    writer.add_token_types([kind for _, _, kind in tokens])
    special = library.SpecialVocab(folder, load_merges=not content["model"].get("byte_fallback"), n_vocab=vocab_size)
    special.add_to_gguf(writer, quiet=True)


def _byte_level_tokens(content: dict[str, Any], folder: Path) -> dict[int, tuple[str, float, int]]:
    """Text, score and type of each token of a byte-level tokenizer, by id."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = {number: (token, 0.0, int(library.TokenType.NORMAL)) for token, number in tokenizer.get_vocab().items()}
    for added in content.get("added_tokens", []):
        kind = library.TokenType.CONTROL if added["special"] else library.TokenType.USER_DEFINED
        found[added["id"]] = (added["content"], 0.0, int(kind))
    return found


def split_name(content: dict[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer splits a text, from the content of its tokenizer.json.

    Raises:
        ValueError: If it has none that is known here.
    """
    splitter = content.get("pre_tokenizer") or {}
    steps = splitter.get("pretokenizers", [splitter])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        name = SPLITS.get(steps[0].get("pattern", {}).get("Regex", ""))
        if name is not None:
            return name
    raise ValueError(
        "--format gguf: how the tokenizer splits texts has no name here, so llama.cpp would read other tokens. Use "
        "--format safetensors, and llama.cpp's own converter."
    )
