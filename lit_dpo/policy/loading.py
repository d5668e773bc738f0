"""A base model's name ──► a model ready to train: base weights, quantization, adapters, fused layers."""

import os
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_info, rank_zero_warn
from peft import LoraConfig, PeftModel
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lit_dpo.base.names import BaseModelError, resolve_base
from lit_dpo.files.console import library_bars
from lit_dpo.policy.adapters import TRAINED_ADAPTER, add_adapters, disable_dropout
from lit_dpo.policy.full import BYTES, FullModel
from lit_dpo.policy.lora import fuse_adapters
from lit_dpo.policy.precision import disable_repacking, keep_residuals_in_float32
from lit_dpo.policy.sharding import base_digest, shard_base, weights_digest

ALLOW_PICKLE = "LIT_DPO_ALLOW_PICKLE"


def load_policy(
    base: str,
    *,
    quantization: BitsAndBytesConfig | None,
    lora: LoraConfig | None,
    adapter: str | None,
    dtype: torch.dtype,
    device: torch.device,
    mesh: DeviceMesh | None = None,
    moving: bool = False,
    progress_bar: bool = True,
    gguf_file: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PeftModel | FullModel:
    """Loads the base and adds adapters to it. Returns it in training mode, with the base's own dropout switched off.

    Args:
        base: Hub id, local folder, GGUF file or ``package:NAME``.
        quantization: Configuration of 4-bit or 8-bit quantization; None for no quantization.
        lora: Configuration of new adapters; unused if ``adapter`` is given. If both are None, all weights train, in
            float32.
        adapter: Folder or hub id of an adapter to continue training. A frozen copy of it is loaded as ``reference``.
        dtype: Type of all base weights that are not quantized.
        device: Device to load the model to.
        mesh: Processes over which the frozen weights are split; None for whole weights on each.
        moving: Whether to add a copy of the adapters that follows the trained ones.
        progress_bar: Whether to show a progress bar while the weights load.
        gguf_file: Name of a GGUF file inside a hub repository.
        revision: Revision of the hub repository.
        trust_remote_code: Whether to run model code that comes with the repository.

    Raises:
        BaseModelError: If the base cannot be loaded.
        ValueError: If ``check_lora`` refuses the adapters, or if 8-bit weights would have to be split.
    """
    if mesh is not None and quantization is not None and quantization.load_in_8bit:
        raise ValueError(
            "trainer.strategy=sharded does not split 8-bit weights. Use model.quantization=nf4 or null, or "
            "trainer.strategy=ddp."
        )
    all_train = lora is None and adapter is None
    if mesh is not None and all_train:
        raise ValueError(
            "trainer.strategy=sharded splits a frozen base. With model.lora=null, use trainer.strategy=ddp."
        )
    name = resolve_base(base, gguf_file, revision)
    options: dict[str, Any] = {"revision": revision} if revision else {}
    options |= {"trust_remote_code": trust_remote_code}
    options |= {"use_safetensors": None if os.environ.get(ALLOW_PICKLE) == "1" else True}

    def read(dtype: torch.dtype, place: Any) -> Any:
        with library_bars(progress_bar, "transformers"):
            return AutoModelForCausalLM.from_pretrained(
                name, dtype=dtype, quantization_config=quantization, device_map={"": place}, **options
            )

    try:
        model = read(torch.float32 if all_train else dtype, device if mesh is None else "cpu")
    except OSError as error:
        if "safetensors" in str(error):
            raise ValueError(
                f"model.base {base} has no weights in safetensors' format. A .bin file is a pickle, which can hold "
                f"code. If you trust it, set the environment variable {ALLOW_PICKLE}=1."
            ) from error
        raise BaseModelError(base, error) from error
    if trust_remote_code:
        rank_zero_warn(f"model.trust_remote_code: code that comes with {base} may have run in this process.")
    model.config.use_cache = False
    disable_dropout(model)
    disable_repacking(model)
    keep_residuals_in_float32(model)
    if all_train:
        if getattr(model.config, "quantization_config", None) is not None:
            raise ValueError(
                f"model.base {base} is quantized, and model.lora=null trains all weights. Use another base."
            )
        full = FullModel(model, lambda place: dict(read(torch.float32, place).named_parameters()))
        full.whole_digest = weights_digest(full)  # of the initial weights
        full.whole_base_digest = base_digest(full)
        number = full.get_nb_trainable_parameters()[0]
        rank_zero_info(
            f"All {number / 1e6:,.0f} M weights train: {number * BYTES / 1e9:.1f} GB for weights, gradients and the "
            "moments of AdamW, besides activations. A live reference takes a quarter of that more."
        )
        return full.train()
    model.requires_grad_(False)
    peft_model = add_adapters(model, name, lora or LoraConfig(), adapter, moving)
    peft_model.peft_config[TRAINED_ADAPTER].base_model_name_or_path = name
    peft_model.peft_config[TRAINED_ADAPTER].revision = revision
    fuse_adapters(peft_model)
    if mesh is not None:
        shard_base(peft_model, mesh, device)
    return peft_model.train()
