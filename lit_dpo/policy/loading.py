"""Base weights, quantization, adapters ──► a PEFT model ready to train, with its initial policy within reach."""

import copy
import warnings
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lit_dpo.base_model import BaseModelError, resolve_base
from lit_dpo.policy.lora import fuse_adapters

REFERENCE_ADAPTER = "reference"  # the frozen copy of the adapter that training goes on from
MOVING_ADAPTER = "moving"  # the copy that follows those in training
Quantization: TypeAlias = BitsAndBytesConfig | Literal["nf4"] | None
# Initialisations that leave the base weights alone, so that "adapters off" is the initial policy.
PLAIN_INITIALISATIONS = (True, "gaussian")
# NF4 with double quantization (QLoRA; Dettmers et al. 2023, arXiv:2305.14314)
NF4: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
# Adapters on every linear layer but the head
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def precision_for(device: torch.device) -> str:
    """The Trainer's precision that is fastest on a device: bfloat16 where the hardware multiplies it.

    A GPU without bfloat16 (T4, V100) gets ``16-mixed``; a CPU without it gets ``32-true``, being a hundred times slower
    otherwise.
    """
    if device.type == "cuda":
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    return "bf16-mixed" if torch.cpu._is_avx512_bf16_supported() else "32-true"


def quantization_for(choice: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """The quantization that was chosen, with 4-bit matrix products in ``dtype`` unless it says otherwise.

    Raises:
        ValueError: If it quantizes nothing.
    """
    quantization = BitsAndBytesConfig(**NF4) if choice == "nf4" else copy.deepcopy(choice)
    if quantization is not None and not (quantization.load_in_4bit or quantization.load_in_8bit):
        raise ValueError(
            "model.quantization has neither load_in_4bit nor load_in_8bit: what is given takes the place of nf4 as a "
            f"whole. For that with changes add {NF4}."
        )
    if quantization is not None and quantization.bnb_4bit_compute_dtype == torch.float32:
        quantization.bnb_4bit_compute_dtype = dtype
    return quantization


def of_adapter(name: str, adapter: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return adapter in name.split(".")  # a part of its own, at the end for embeddings


def followed(name: str) -> str:
    """The name of the parameter in training that one of the moving copy follows."""
    return ".".join("default" if part == MOVING_ADAPTER else part for part in name.split("."))


def check_lora(lora: LoraConfig) -> None:
    """Refuses adapters under which switching them off would not give back the initial policy.

    Raises:
        ValueError: Naming the field and the remedy.
    """
    if lora.bias != "none":
        raise ValueError(f"model.lora.bias={lora.bias!r} trains the base, which is the reference. Use 'none'.")
    if lora.modules_to_save:
        raise ValueError(
            f"model.lora.modules_to_save={lora.modules_to_save} trains copies of base modules without adapters; the "
            "reference needs them as they were. Put adapters on them with lora.target_modules instead."
        )
    for field in ("trainable_token_indices", "alora_invocation_tokens"):
        if getattr(lora, field, None):
            raise ValueError(
                f"model.lora.{field} is not supported: the log-probs of the flat layout would leave it out."
            )
    if lora.init_lora_weights not in PLAIN_INITIALISATIONS:
        raise ValueError(
            f"model.lora.init_lora_weights={lora.init_lora_weights!r} changes the base weights or starts off the "
            f"initial policy, so the reference would be another model. Use one of {PLAIN_INITIALISATIONS}."
        )


def load_policy(
    base: str,
    *,
    quantization: BitsAndBytesConfig | None,
    lora: LoraConfig,
    adapter: str | None,
    dtype: torch.dtype,
    device: torch.device,
    moving: bool = False,
    gguf_file: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PeftModel:
    """Loads the base and puts adapters on it, in training mode, without dropout of the base's own.

    Args:
        base: Hub id, local folder, GGUF file or ``package:NAME``.
        quantization: 4-bit or 8-bit; None for none.
        lora: Shape of fresh adapters; unused where ``adapter`` goes on from existing ones.
        adapter: Folder or hub id of an adapter to go on from; its frozen copy is loaded as ``reference``.
        dtype: Type of all base weights that are not quantized.
        device: Where to load.
        moving: Whether to add a frozen copy of the adapters that can be moved.
        gguf_file: Name of a GGUF file inside a hub repository.
        revision: Revision of the hub repository.
        trust_remote_code: Whether to run the repository's own model code.

    Raises:
        ValueError: If the adapters would leave no initial policy to refer to.
    """
    name = resolve_base(base, gguf_file, revision)
    options: dict[str, Any] = {"revision": revision} if revision else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            quantization_config=quantization,
            device_map={"": device},
            trust_remote_code=trust_remote_code,
            **options,
        )
    except OSError as error:
        raise BaseModelError(base, error) from error
    model.config.use_cache = False
    _disable_dropout(model)
    _disable_repacking(model)
    model.requires_grad_(False)
    if adapter is None:
        check_lora(lora)
        peft_model = get_peft_model(model, lora)
    else:
        _check_base(adapter, name)
        peft_model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
        check_lora(peft_model.peft_config["default"])
        peft_model.load_adapter(adapter, adapter_name=REFERENCE_ADAPTER, is_trainable=False)
        _disable_dropout(peft_model)  # the adapter's own: of its training, not of this one
    peft_model.peft_config["default"].base_model_name_or_path = name
    peft_model.peft_config["default"].revision = revision
    if moving:
        config = copy.deepcopy(peft_model.peft_config["default"])
        config.lora_dropout = 0.0
        peft_model.add_adapter(MOVING_ADAPTER, config)
    parameters = dict(peft_model.named_parameters())
    for parameter_name, parameter in parameters.items():
        parameter.requires_grad_("lora_" in parameter_name and of_adapter(parameter_name, "default"))
        if parameter.requires_grad or of_adapter(parameter_name, MOVING_ADAPTER):
            parameter.data = parameter.data.float()
    for parameter_name, parameter in parameters.items():
        if of_adapter(parameter_name, MOVING_ADAPTER):
            parameter.data.copy_(parameters[followed(parameter_name)])
    fuse_adapters(peft_model)
    return peft_model.train()


def _disable_dropout(model: nn.Module) -> None:
    """Switches off every dropout: it would make policy and reference differ by noise."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


def _disable_repacking(model: nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16 at the first evaluation.

    Repacked weights go through a kernel without autograd, and the adapters before them get no gradient.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _check_base(adapter: str, base: str) -> None:
    """Warns if an adapter was trained on another base than the one that it is put on."""
    trained_on = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    if trained_on and Path(trained_on).name != Path(base).name:
        warnings.warn(f"The adapter {adapter} was trained on {trained_on}, but model.base is {base}.", stacklevel=2)
