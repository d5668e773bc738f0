"""Loads an exported model as a user would, with transformers and peft alone, and compares it with the trained policy.

A script for a process of its own. It imports nothing of this project.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def load(
    folder: str,
    dtype: str,
    device: str,
    gguf_file: str | None,
    base: str | None,
    revision: str | None,
    quantization: dict[str, Any] | None,
    trust_remote_code: bool,
) -> Any:
    """The model, in evaluation mode."""
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "device_map": {"": device}}
    if quantization is not None:
        options["quantization_config"] = BitsAndBytesConfig.from_dict(quantization)
    if gguf_file is not None:
        options["gguf_file"] = gguf_file
    if base is not None:
        options["revision"] = revision
    model = AutoModelForCausalLM.from_pretrained(base or folder, trust_remote_code=trust_remote_code, **options)
    if base is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder)
    return model.eval()


@torch.no_grad()
def compare(model: Any, path: str) -> tuple[float, float, int]:
    """KL(trained ‖ exported) in nats per token, the share of the same most likely token, the number of tokens."""
    kl, same, tokens = 0.0, 0, 0
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            if not name.startswith("ids_"):
                continue
            ids, trained = file.get_tensor(name), file.get_tensor(name.replace("ids", "logps"))
            logits = model(input_ids=ids[None].to(model.device), use_cache=False).logits[0, -len(trained) - 1 : -1]
            exported = logits.float().log_softmax(-1).cpu()
            width = min(exported.shape[-1], trained.shape[-1])  # a GGUF file may pad the vocabulary
            difference = trained[:, :width].double() - exported[:, :width].double()
            kl += float((trained[:, :width].double().exp() * difference).sum())
            same += int((trained.argmax(-1) == exported.argmax(-1)).sum())
            tokens += len(trained)
    return kl / tokens, same / tokens, tokens


if __name__ == "__main__":
    *spec, distributions = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    sys.stdout.write(json.dumps(compare(load(*spec), distributions)) + "\n")
