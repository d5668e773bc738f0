"""Whether vLLM serves an adapter as it is, by vLLM's own requirements. vLLM itself is not needed, and was not run.

Source: vLLM's documentation of LoRA adapters and of bitsandbytes, and the checks of its ``LoRAConfig`` and
``PEFTHelper``.
"""

import re
from pathlib import Path
from typing import Any

from peft import LoraConfig

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values of --max-lora-rank


def vllm_options(adapter: LoraConfig, base: str, quantization: Any) -> tuple[str, list[str]]:
    """How vLLM loads an adapter.

    Args:
        adapter: The adapter's configuration.
        base: Hub id or folder of its base.
        quantization: Quantization of the base in training, as ``DPOModule`` takes it.

    Returns:
        Options of ``vllm serve``, and reasons why it would not serve what was trained; none if it does.
    """
    fitting = [one for one in RANKS if one >= adapter.r]
    reasons = []
    if not fitting:
        reasons.append(f"its rank {adapter.r} is above {RANKS[-1]}")
    if adapter.rank_pattern or adapter.alpha_pattern:
        reasons.append("its layers have several ranks or alphas")
    if adapter.use_dora:
        reasons.append("it is DoRA")
    if adapter.modules_to_save:
        reasons.append("it has modules_to_save")
    if adapter.bias != "none":
        reasons.append("it has biases")
    if quantization is not None and quantization != "nf4":
        reasons.append("its base was quantized in another way than nf4, so vLLM would load other weights")
    if not Path(base).exists() and not re.fullmatch(r"\w[\w.-]*/[\w.-]+", base):
        reasons.append(f"its base {base} is neither a hub id nor a folder here")
    weights = " --quantization bitsandbytes" if quantization == "nf4" else ""  # vLLM's 4 bits are NF4 too
    return f"--enable-lora --max-lora-rank {fitting[0] if fitting else RANKS[-1]}{weights}", reasons
