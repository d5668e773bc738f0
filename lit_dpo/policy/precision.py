"""Number types: the Trainer's precision, and the quantization of the base weights."""

import copy
import importlib.util
import sys
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

Quantization: TypeAlias = BitsAndBytesConfig | Literal["nf4"] | None
# Trainer.precision ──► type of the base weights that are not quantized, and of 4-bit matrix products
PRECISIONS = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
# NF4 with double quantization (QLoRA; Dettmers et al. 2023, arXiv:2305.14314)
NF4: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def precision_for(device: torch.device) -> str:
    """The fastest Trainer precision on a device: bfloat16 if the hardware supports it.

    A GPU without bfloat16 (T4, V100) gets ``16-mixed``. A CPU without it gets ``32-true``, because emulating bfloat16
    is a hundred times slower.
    """
    if device.type == "cuda":
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    return "bf16-mixed" if _cpu_multiplies_bfloat16() else "32-true"


def dtype_for(precision: str) -> torch.dtype:
    """The type of matrix products under a Trainer precision.

    Raises:
        ValueError: If the precision would corrupt 4-bit weights or train the adapters in half precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(
            f"trainer.precision={precision} is not supported: half '-true' precisions corrupt 4-bit weights and "
            f"train the adapters in half precision. Use one of {', '.join(PRECISIONS)}."
        )
    return PRECISIONS[precision]


def quantization_for(choice: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """The configuration of a quantization. 4-bit matrix products are in ``dtype`` unless it sets another type.

    Raises:
        ValueError: If the configuration quantizes nothing.
        ModuleNotFoundError: If bitsandbytes is not installed.
    """
    if choice is None:
        return None
    quantization = BitsAndBytesConfig(**NF4) if choice == "nf4" else copy.deepcopy(choice)
    if not (quantization.load_in_4bit or quantization.load_in_8bit):
        raise ValueError(
            "model.quantization has neither load_in_4bit nor load_in_8bit. A configuration replaces nf4 completely. "
            f"To change one field of nf4, give its other fields too: {NF4}."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModuleNotFoundError(
            "model.quantization needs bitsandbytes, which is not installed. Install it (pip install bitsandbytes), or "
            "set model.quantization=null."
        )
    if quantization.bnb_4bit_compute_dtype == torch.float32:
        quantization.bnb_4bit_compute_dtype = dtype
    return quantization


def describe(quantization: BitsAndBytesConfig | None, dtype: torch.dtype) -> str:
    """The type of the base weights, in a word: ``nf4``, ``int8``, ``bfloat16``."""
    if quantization is None:
        return str(dtype).removeprefix("torch.")
    return str(quantization.bnb_4bit_quant_type) if quantization.load_in_4bit else "int8"


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The type of matrix products with x: autocast's type if autocast is on, else the type of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def is_linear4bit(module: nn.Module) -> bool:
    """Whether a module is bitsandbytes' 4-bit linear layer. Does not import bitsandbytes."""
    bitsandbytes: Any = sys.modules.get("bitsandbytes")
    return bitsandbytes is not None and type(module) is bitsandbytes.nn.Linear4bit


def disable_repacking(model: nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights at the first evaluation on a CPU with AVX512-BF16.

    Repacked weights are multiplied by a kernel without autograd, so the adapters of earlier layers get no gradient.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def keep_residuals_in_float32(model: Any) -> None:
    """Makes the hidden states between layers float32 under autocast to float16.

    A base loaded in float16 would otherwise add up its residual stream in float16. Large activations exceed its largest
    number, 65504. Products remain in float16, so this costs only memory for the hidden states.
    """

    def widen(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        device = output.device.type
        under_float16 = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.float16
        return output.float() if under_float16 else output

    model.get_input_embeddings().register_forward_hook(widen)


def float16_autocast(model: Any) -> torch.autocast:
    """Autocast for a base in float16, so that ``keep_residuals_in_float32`` works outside a training step too."""
    dtype = model.get_input_embeddings().weight.dtype
    return torch.autocast(model.device.type, torch.float16, enabled=dtype is torch.float16)


def _cpu_multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16 products. torch has no public function for this."""
    return bool(torch.cpu._is_avx512_bf16_supported())
