"""Adapter and base ──► one model in 16 bits, which plain transformers loads. One tensor is computed at a time.

The default merges into the weights that the adapter was trained on: those of the base after quantization. Merged into
the original weights, it gives another model (measured in README.md).
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

from lit_dpo.files.console import library_bars
from lit_dpo.policy.adapters import TRAINED_ADAPTER

SHARD = 2**30  # bytes of a file of weights, and so about the memory that a merge takes


def write_merged(
    adapter: Path,
    base: str,
    output: Path,
    *,
    quantization: BitsAndBytesConfig | None,
    dtype: torch.dtype | None = None,
    shard_size: int = SHARD,
    copies: int = 1,
    progress_bar: bool = True,
    **repository: Any,
) -> None:
    """Writes the merged model with its configuration. The base's weights are read from its files as they are needed.

    Args:
        adapter: Folder of the adapter.
        base: Hub id or local safetensors folder of the base.
        output: Folder to write to.
        quantization: Quantization of the base in training; None merges into the original weights.
        dtype: Type of the weights; by default that of the base, bfloat16 if it is in float32.
        shard_size: Number of bytes after which a new file begins.
        copies: How often the weights must find room on the disk.
        progress_bar: Whether to show a progress bar.
        repository: ``revision`` and ``trust_remote_code`` of the base.

    Raises:
        OSError: If the disk does not take the weights.
        ValueError: If a merged weight is not finite.
    """
    with library_bars(False, "transformers"):
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", device_map={"": "cpu"}, **repository)
    if dtype is None:
        dtype = torch.bfloat16 if model.dtype == torch.float32 else model.dtype
    names = list(model.state_dict())
    quantized = {} if quantization is None else quantized_layers(model, quantization)
    peft_model = PeftModel.from_pretrained(model, str(adapter))
    inner: Any = peft_model.get_base_model()
    config, names = inner.config, _without_ties(inner, names)
    config.dtype = dtype
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    _check_space(output, sum(_weight_of(inner, name).numel() for name in names) * dtype.itemsize * copies)
    shards = Shards(output, shard_size, lambda weights: revert_weight_conversion(inner, weights))
    for name in tqdm(names, desc="Merging", unit="tensor", disable=not progress_bar):
        tensor = _merged(inner, name, quantized).to(dtype).contiguous()
        if not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite in {dtype}, so the model cannot be written in this type.")
        shards.add(name, tensor)
    shards.close()
    config.save_pretrained(output)
    if model.can_generate():
        model.generation_config.save_pretrained(output)


def quantized_layers(model: nn.Module, quantization: BitsAndBytesConfig) -> dict[str, Any]:
    """The layers that a quantization replaces, by name, without weights. transformers chooses which."""
    plain: Any = model
    with torch.device("meta"):
        twin = type(plain)(plain.config)
    AutoHfQuantizer.from_config(quantization).preprocess_model(model=twin, device_map={"": "cpu"})
    kinds = dict(twin.named_modules())
    return {name: kinds[name] for name, module in model.named_modules() if type(kinds[name]) is not type(module)}


def as_trained(weight: Tensor, layer: Any) -> Tensor:
    """A weight after quantization and back, in float32.

    Args:
        weight: The original weight, of shape (out, in).
        layer: The layer of ``quantized_layers`` that it belongs to.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = type(layer.weight)
    layer.weight = kind(weight.float(), requires_grad=False, **vars(layer.weight)).to(device)
    restored: Tensor = dequantize_module_weight(layer).detach().float().cpu()
    layer.weight = kind(torch.empty(0, device="meta"), requires_grad=False)
    return restored


@torch.no_grad()
def _merged(model: nn.Module, name: str, quantized: dict[str, Any]) -> Tensor:
    """A tensor of the base's state dict, after quantization, with the adapter merged into it."""
    path, _, attribute = name.rpartition(".")
    module: Any = model.get_submodule(path)
    base = module.get_base_layer() if isinstance(module, LoraLayer) else module
    tensor: Tensor = getattr(base, attribute)
    if attribute != "weight":
        return tensor
    if path in quantized:
        turned = isinstance(base, Conv1D)
        tensor = as_trained(tensor.T if turned else tensor, quantized[path])
        tensor = tensor.T if turned else tensor
    elif type(tensor).__name__ in ("Params4bit", "Int8Params"):  # a base that the hub has in 4 or 8 bits
        tensor = dequantize_module_weight(base).detach()
    if base is module:
        return tensor
    original, base.weight = base.weight, nn.Parameter(tensor.float(), requires_grad=False)
    try:
        module.merge(safe_merge=True, adapter_names=[TRAINED_ADAPTER])
        merged: Tensor = base.weight.detach()
        return merged
    finally:
        base.weight, module.merged_adapters = original, []


def _without_ties(model: Any, names: list[str]) -> list[str]:
    """The names without those of tied weights. An adapter on one of two tied weights makes two of them."""
    tied = {"input": model.get_input_embeddings(), "output": model.get_output_embeddings()}
    weights = [getattr(module, "weight", None) for module in tied.values()]
    if weights[0] is not weights[1]:
        return names
    if any(isinstance(module, LoraLayer) for module in tied.values()):
        model.config.tie_word_embeddings = False
        return names
    return [name for name in names if model.get_submodule(name.rpartition(".")[0]) is not tied["output"]]


def _weight_of(model: nn.Module, name: str) -> Tensor:
    """A tensor of the base's state dict, below its adapter."""
    path, _, attribute = name.rpartition(".")
    module: Any = model.get_submodule(path)
    found: Tensor = getattr(module.get_base_layer() if isinstance(module, LoraLayer) else module, attribute)
    return found


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder.parent}: the merged model needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free."
        )


@dataclass
class Shards:
    """Tensors ──► safetensors files of limited size, and their index, under the names that transformers uses.

    Args:
        folder: Folder to write to.
        size: Number of bytes after which a file ends. Tensors of one layer stay together.
        convert: Names and shapes of the model ──► those of files. transformers reads some models in others.
    """

    folder: Path
    size: int
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    waiting: dict[str, Tensor] = field(default_factory=dict)
    written: list[list[str]] = field(default_factory=list)
    total: int = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Adds a tensor."""
        last = next(reversed(self.waiting), None)
        if last is not None and _layer(last) != _layer(name) and self._num_waiting() + tensor.nbytes > self.size:
            self._write()
        self.waiting[name] = tensor

    def close(self) -> None:
        """Writes the rest, names the files by their number, and writes the index if there are several."""
        self._write()
        many, index = len(self.written), dict[str, str]()
        for number, names in enumerate(self.written, 1):
            last = "model.safetensors" if many == 1 else f"model-{number:05}-of-{many:05}.safetensors"
            (self.folder / f"part-{number}").rename(self.folder / last)
            index |= dict.fromkeys(names, last)
        if many > 1:
            told = {"metadata": {"total_size": self.total}, "weight_map": index}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(told, indent=2), encoding="utf-8")

    def _num_waiting(self) -> int:
        return sum(tensor.nbytes for tensor in self.waiting.values())

    def _write(self) -> None:
        tensors = {name: tensor.contiguous() for name, tensor in self.convert(self.waiting).items()}
        path = self.folder / f"part-{len(self.written) + 1}"
        try:
            save_file(tensors, path, metadata={"format": "pt"})
        except SafetensorError as error:  # the library has no error of its own for a full disk
            raise OSError(f"{path.parent}: the weights could not be written: {error}") from error
        self.total += sum(tensor.nbytes for tensor in tensors.values())
        self.written.append(list(tensors))
        self.waiting = {}


def _layer(name: str) -> str:
    """What comes before and at the first number of a name: the layer that a tensor belongs to."""
    found = re.match(r".*?\.\d+\.", name)
    return found[0] if found else name
