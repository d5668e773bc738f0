"""Whether vLLM serves an adapter as it is, by vLLM's own requirements. vLLM itself is not needed.

Source: vLLM's documentation of LoRA adapters, and the checks of its ``LoRAConfig`` and ``PEFTHelper``.
"""

import re
from pathlib import Path

from peft import LoraConfig

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values of --max-lora-rank


def vllm_options(adapter: LoraConfig) -> tuple[str, list[str]]:
    """How vLLM loads an adapter.

    Args:
        adapter: The adapter's configuration.

    Returns:
        Options of ``vllm serve``, and reasons why it would refuse the adapter; none if it serves it.
    """
    rank = max([adapter.r, *(adapter.rank_pattern or {}).values()])
    fitting = [one for one in RANKS if one >= rank]
    base = str(adapter.base_model_name_or_path)
    reasons = []
    if not fitting:
        reasons.append(f"its rank {rank} is above {RANKS[-1]}")
    if adapter.use_dora:
        reasons.append("it is DoRA")
    if adapter.modules_to_save:
        reasons.append("it has modules_to_save")
    if adapter.bias != "none":
        reasons.append("it has biases")
    if not Path(base).exists() and not re.fullmatch(r"\w[\w.-]*/[\w.-]+", base):
        reasons.append(f"its base {base} is found neither on the hub nor beside this process")
    return f"--enable-lora --max-lora-rank {fitting[0] if fitting else RANKS[-1]}", reasons
