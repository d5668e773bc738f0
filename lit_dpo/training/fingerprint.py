"""What a checkpoint was trained on: its base, quantization, tokenizer and chat template, as short digests."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_dpo.policy.sharding import base_digest

KEY = "lit_dpo"  # of a checkpoint
VERSION = 2  # of the format of checkpoints; version 1 had no such number


class Fingerprint(Callback):
    """Stores in each checkpoint what it was trained on, and compares this when a run resumes.

    ``DPOModule`` adds this callback itself.
    """

    def __init__(self) -> None:
        self._own: dict[str, str] | None = None  # of this run; it takes some tenths of a second

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Forgets an earlier run's."""
        self._own = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Adds the fingerprint and the version of the format."""
        checkpoint[KEY] = {"version": VERSION, "fingerprint": self._of(trainer, pl_module)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Compares the fingerprint with this run's.

        Raises:
            ValueError: If they differ in ``fit``, unless the model's ``allow_mismatch`` is set; or if a later version
                of this package has written the checkpoint.
        """
        if KEY not in checkpoint:
            rank_zero_info("The checkpoint has format 1, which names no base and no tokenizer: they are not compared.")
            return
        stored = checkpoint[KEY]
        if stored["version"] > VERSION:
            raise ValueError(
                f"The checkpoint has the format {stored['version']}, of a later lit_dpo. This one reads formats up to "
                f"{VERSION}. Update lit_dpo."
            )
        differing = differences(stored["fingerprint"], self._of(trainer, pl_module))
        if not differing:
            return
        message = f"The checkpoint was trained with another {' and another '.join(differing)}."
        if trainer.state.fn == "fit" and not pl_module.allow_mismatch:
            raise ValueError(f"{message} If that is meant, set model.allow_mismatch=true.")
        rank_zero_warn(message)

    def _of(self, trainer: Trainer, module: Any) -> dict[str, str]:
        if self._own is None:
            self._own = fingerprint(trainer, module)
        return dict(self._own)


def fingerprint(trainer: Trainer, module: Any) -> dict[str, str]:
    """Digests of what the log-probs of a run depend on besides the trained weights, by name."""
    data: Any = getattr(trainer, "datamodule", None)
    tokenizer = data.load_tokenizer() if hasattr(data, "load_tokenizer") else module.tokenizer
    config = module.model.get_base_model().config.to_dict().get("quantization_config") or {}
    config = config if isinstance(config, Mapping) else config.to_dict()
    plain = {name: str(value) for name, value in config.items() if "dtype" not in name and value is not None}
    return {
        "quantization": _digest(json.dumps(plain, sort_keys=True)),
        "base model": base_digest(module.model),
        "tokenizer": _digest(json.dumps(tokenizer.get_vocab(), sort_keys=True)),
        "chat template": _digest(str(tokenizer.chat_template)),
    }


def differences(stored: Mapping[str, str], own: Mapping[str, str]) -> list[str]:
    """Names of what differs. Other quantization makes other weights, so it is named alone."""
    found = [name for name in own if name in stored and stored[name] != own[name]]
    return [name for name in found if name != "base model"] if "quantization" in found else found


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
