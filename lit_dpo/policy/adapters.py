"""LoRA adapters: which configurations are allowed, how adapters are added to a base, and the names of their copies."""

import copy
import warnings
from pathlib import Path
from typing import Any, Literal

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedTokenizerBase

TRAINED_ADAPTER = "default"  # PEFT's default name
REFERENCE_ADAPTER = "reference"  # a frozen copy of the adapter that training starts from
MOVING_ADAPTER = "moving"  # a copy that follows the trained adapter
# Initializations that leave the base weights unchanged, so that "adapters off" is the initial policy.
PLAIN_INITIALIZATIONS = (True, "gaussian")
# Adapters on every linear layer except the head
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def belongs_to(name: str, adapter: str) -> bool:
    """Whether the parameter ``name`` belongs to ``adapter``."""
    return adapter in name.split(".")  # in the middle of a linear layer's name, at the end of an embedding's


def trained_counterpart(name: str) -> str:
    """The name of the trained parameter that the parameter ``name`` of the moving copy follows."""
    return ".".join(TRAINED_ADAPTER if part == MOVING_ADAPTER else part for part in name.split("."))


def choose_lora(lora: LoraConfig | Literal["auto"] | None, adapter: str | None, quantized: bool) -> LoraConfig | None:
    """The adapters' configuration: ``LORA`` for ``auto``; None if all weights train.

    Raises:
        ValueError: If ``adapter`` is given with a ``lora`` other than the default: it has its own configuration. Or if
            all weights are to train and the base is quantized.
    """
    default = LoraConfig(**LORA)
    if adapter is not None and (lora is None or (lora != "auto" and lora.to_dict() != default.to_dict())):
        raise ValueError("model.adapter has its own LoRA configuration: leave model.lora out.")
    if lora is None and quantized:
        raise ValueError(
            "model.lora=null trains all weights, and quantized ones do not train. Set model.quantization=null."
        )
    return default if lora == "auto" else lora


def check_lora(lora: LoraConfig) -> None:
    """Refuses adapters for which "adapters off" is not the initial policy.

    Raises:
        ValueError: If a field is not supported. The message names the field and the remedy.
    """
    if lora.bias != "none":
        raise ValueError(f"model.lora.bias={lora.bias!r} trains the base, which is the reference. Use 'none'.")
    if lora.modules_to_save:
        raise ValueError(
            f"model.lora.modules_to_save={lora.modules_to_save} trains copies of base modules without adapters, but "
            "the reference needs these modules unchanged. Put adapters on them with lora.target_modules instead."
        )
    for field in ("trainable_token_indices", "alora_invocation_tokens"):
        if getattr(lora, field, None):
            raise ValueError(f"model.lora.{field} is not supported: the flat layout's log-probs would ignore it.")
    if lora.init_lora_weights not in PLAIN_INITIALIZATIONS:
        raise ValueError(
            f"model.lora.init_lora_weights={lora.init_lora_weights!r} changes the base weights or starts away from "
            f"the initial policy, so the reference would be another model. Use one of {PLAIN_INITIALIZATIONS}."
        )


def add_adapters(model: Any, base: str, lora: LoraConfig, adapter: str | None, moving: bool) -> PeftModel:
    """Adds new or existing adapters to a frozen base, and the copies that the reference needs.

    Args:
        model: The base model, frozen.
        base: Name or folder that the base was loaded from.
        lora: Configuration of new adapters.
        adapter: Folder or hub id of an adapter to continue training. A frozen copy of it is loaded as ``reference``.
        moving: Whether to add a copy that follows the trained adapter.

    Raises:
        ValueError: If ``check_lora`` refuses the adapters, or if a local adapter is not in safetensors' format.
    """
    if adapter is None:
        check_lora(lora)
        try:
            peft_model = get_peft_model(model, lora)
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise ValueError(f"model.lora does not fit the base: {error}") from error
    else:
        _check_base(adapter, base)
        if not (Path(adapter) / "adapter_model.safetensors").exists() and Path(adapter).is_dir():
            raise ValueError(f"model.adapter {adapter} has no adapter_model.safetensors. Save it with a recent peft.")
        peft_model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
        check_lora(peft_model.peft_config[TRAINED_ADAPTER])
        peft_model.load_adapter(adapter, adapter_name=REFERENCE_ADAPTER, is_trainable=False)
        disable_dropout(peft_model)  # the dropout in an adapter's config belongs to its earlier training
    if moving:
        config = copy.deepcopy(peft_model.peft_config[TRAINED_ADAPTER])
        config.lora_dropout = 0.0
        peft_model.add_adapter(MOVING_ADAPTER, config)
    parameters = dict(peft_model.named_parameters())
    for name, parameter in parameters.items():
        parameter.requires_grad_("lora_" in name and belongs_to(name, TRAINED_ADAPTER))
        if parameter.requires_grad or belongs_to(name, MOVING_ADAPTER):
            parameter.data = parameter.data.float()
    for name, parameter in parameters.items():
        if belongs_to(name, MOVING_ADAPTER):
            parameter.data.copy_(parameters[trained_counterpart(name)])
    return peft_model


def save_adapter(model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes ``adapter_model.safetensors``, ``adapter_config.json``, tokenizer and chat template into ``folder``."""
    # Embeddings are never trained here. By default PEFT would ask the hub whether they were resized.
    model.save_pretrained(str(folder), selected_adapters=[TRAINED_ADAPTER], save_embedding_layers=False)
    tokenizer.save_pretrained(str(folder))


def disable_dropout(model: nn.Module) -> None:
    """Switches off all dropout. It would make policy and reference differ by noise."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


def _check_base(adapter: str, base: str) -> None:
    """Warns if the adapter was trained on a base other than ``base``.

    Raises:
        ValueError: If there is no such adapter.
    """
    try:
        trained_on = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    except (ValueError, OSError) as error:
        raise ValueError(f"model.adapter {adapter}: there is no adapter of this name. {error}") from error
    if trained_on and Path(trained_on).name != Path(base).name:
        warnings.warn(f"The adapter {adapter} was trained on {trained_on}, but model.base is {base}.", stacklevel=2)
