"""The policy as it was before training: the default reference."""

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

from lit_dpo.data.batch import PairBatch
from lit_dpo.objectives import PairLogps
from lit_dpo.policy.adapters import REFERENCE_ADAPTER
from lit_dpo.policy.policy import Policy
from lit_dpo.policy.sharding import weights_digest
from lit_dpo.reference.base import Reference

FORMAT_VERSION = 1  # increase it when the log-probs of the same pair and model, or the format of a shard, change


class InitialPolicy(Reference):
    """The policy as it was before training: adapters off, a frozen copy of the first adapter, or the initial weights.

    Args:
        policy: The policy in training.
    """

    policy: Policy

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def release(self) -> None:
        """Called when all log-probs are on disk, to free memory: the initial weights, if they are a copy."""
        self.policy.release_initial()

    def keep_in_step(self, num_batches: int) -> None:
        """Called for batches that other processes compute and this one does not."""
        self.policy.keep_in_step(num_batches)

    def logps(self, batch: PairBatch) -> PairLogps:
        """Log-probs of P pairs, without gradients."""
        return batch.sum_responses(self.token_logps(batch))

    def token_logps(self, batch: PairBatch) -> Tensor:
        """Log-prob of each response token, (R,), in nats."""
        with self.policy.initial():
            return self.policy.token_logps(batch).logps

    def identity(self, dtype: torch.dtype) -> str:
        """Digest of all that the log-probs depend on, except the token ids, with matrix products in ``dtype``."""
        model = self.policy.model
        settings = {
            "version": FORMAT_VERSION,
            "products": str(dtype),
            "kernels": [self.policy.flat, self.policy.compiled, torch.__version__, _processor(model.device)],
            "config": {
                name: value
                for name, value in model.get_base_model().config.to_dict().items()
                if not name.startswith("_") and name not in ("transformers_version", "use_cache")
            },
            "adapter": {
                name: value
                for name, value in model.peft_config[REFERENCE_ADAPTER].to_dict().items()
                if "path" not in name and name != "revision"
            }
            if REFERENCE_ADAPTER in model.peft_config
            else None,
        }
        text = json.dumps(settings, sort_keys=True, default=_plain) + weights_digest(model)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _processor(device: torch.device) -> str:
    """Name of the processor that the kernels run on."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()


def _plain(value: Any) -> Any:
    """Converts a value that JSON cannot hold: a set to a sorted list, anything else to a string."""
    return sorted(value) if isinstance(value, set) else str(value)
