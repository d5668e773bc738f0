"""A checkpoint ──► PEFT's folder of its adapter. No weights of the base are loaded."""

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from lit_dpo.base.names import resolve_base
from lit_dpo.evaluation.trained import Trained
from lit_dpo.files.cache import cache_dir
from lit_dpo.policy.adapters import TRAINED_ADAPTER, belongs_to, save_adapter

WEIGHTS = "adapter_model.safetensors"
BESIDE = "base"  # folder of the converted base, inside the adapter's


def write_adapter(trained: Trained, folder: Path, with_base: bool = True) -> None:
    """Writes the adapter with tokenizer and chat template.

    Args:
        trained: What was trained.
        folder: Folder to write to.
        with_base: Whether to copy a base that was converted from a GGUF file, which lies in this machine's cache alone,
            into the folder.
    """
    name = base_of(trained)
    copied = with_base and is_converted(name)
    if copied:
        shutil.copytree(name, folder / BESIDE)
    where = {"base_model_name_or_path": BESIDE if copied else name, "revision": trained.module.repository["revision"]}
    if trained.weights:
        model = skeleton(trained)
        vars(model.peft_config[TRAINED_ADAPTER]).update(where)
        save_adapter(model, trained.tokenizer, folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(trained.path / WEIGHTS, folder / WEIGHTS)
    config = PeftConfig.from_pretrained(str(trained.path))
    vars(config).update(where)
    config.save_pretrained(str(folder))
    trained.tokenizer.save_pretrained(str(folder))


def base_of(trained: Trained) -> str:
    """The hub id or the local folder of the base."""
    repository = trained.module.repository
    return resolve_base(trained.module.base, repository["gguf_file"], repository["revision"])


def is_converted(name: str) -> bool:
    """Whether a base lies in the cache of this machine, where a GGUF file was converted."""
    return Path(name).is_relative_to(cache_dir().resolve() / "models")


def skeleton(trained: Trained) -> PeftModel:
    """The model without weights of its base (torch's device ``meta``), with the adapter of a checkpoint.

    Raises:
        ValueError: If the checkpoint lacks weights of the adapter.
    """
    module, repository = trained.module, trained.module.repository
    options: dict[str, Any] = {"trust_remote_code": repository["trust_remote_code"]}
    config = AutoConfig.from_pretrained(base_of(trained), revision=repository["revision"], **options)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, **options)
        lora = copy.deepcopy(module.lora) if module.adapter is None else PeftConfig.from_pretrained(module.adapter)
        model = get_peft_model(base, lora)
    prefix = "policy.model."
    weights = {
        name.removeprefix(prefix): value
        for name, value in trained.weights.items()
        if name.startswith(prefix) and belongs_to(name, TRAINED_ADAPTER)
    }
    model.load_state_dict(weights, strict=False, assign=True)
    missing = [name for name, parameter in model.named_parameters() if "lora_" in name and parameter.is_meta]
    if missing:
        raise ValueError(f"{trained.path}: the checkpoint lacks {missing[0]}, and {len(missing)} such weights in all.")
    return model
